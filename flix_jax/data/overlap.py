"""The same text in held-out data and in training data, and twice within a cell.

Two texts are the same when they are equal after Unicode's NFC and with every run of white space
as one space, none at the ends. Examples are the same when their inputs are, or, on request, their
inputs and their targets. All functions are pure and take time linear in the texts: an example is
compared by a hash of 16 bytes (BLAKE2b), so that the texts need not be kept.
"""

from __future__ import annotations

import collections
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from flix_jax.data.cells import format_table

Texts = tuple[Sequence[str], Sequence[str]]  # inputs, targets: as many
Keys = list[bytes]


def normalize(text: str) -> str:
    """`text` in NFC, with single spaces and none at its ends."""
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def keys(texts: Texts, targets: bool = False) -> Keys:
    """A hash of 16 bytes per example: of its input, or of its input and its target.

    Raises:
      ValueError: not as many targets as inputs, where targets count.
    """
    if not targets:
        return [_digest(normalize(source)) for source in texts[0]]
    if len(texts[0]) != len(texts[1]):
        raise ValueError(f"{len(texts[0])} inputs but {len(texts[1])} targets; expected as many")
    # A line break never stands in a normalised text.
    return [
        _digest(f"{normalize(source)}\n{normalize(target)}")
        for source, target in zip(*texts, strict=True)
    ]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True)
class OverlapRow:
    """Examples of one split of one cell that one training cell holds too.

    Attributes:
      cell, split: what is evaluated, and `trained`: the training cell, by name.
      examples: how many examples of the split are also in `trained`; `of`: of how many.
    """

    cell: str
    split: str
    trained: str
    examples: int
    of: int


@dataclass(frozen=True)
class Overlap:
    """What evaluated cells share with training cells; only pairs that share something."""

    rows: tuple[OverlapRow, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows)

    def table(self, at_most: int | None = None) -> str:
        """A line for each pair of cells that share an example; '' where none do.

        Args:
          at_most: of many pairs, show so many of those that share most, and count the rest.
        """
        if not self.rows:
            return ""
        shown = self.rows
        if at_most is not None and len(shown) > at_most:
            shown = tuple(sorted(shown, key=lambda row: -row.examples)[:at_most])
        lines = [["evaluated", "split", "trained on", "shared", "of", "%"]]
        for row in shown:
            share = f"{100 * row.examples / row.of:.1f}"
            counts = [f"{row.examples:,}", f"{row.of:,}", share]
            lines.append([row.cell, row.split, row.trained, *counts])
        more = len(self.rows) - len(shown)
        return format_table(lines) + (f"\nand {more:,} more pairs that share less" if more else "")


def find_overlap(
    training: Mapping[str, Texts],
    evaluation: Mapping[str, Mapping[str, Texts]],
    *,
    targets: bool = False,
) -> Overlap:
    """Counts the examples of every evaluated cell and split that each training cell holds too.

    Args:
      training: by cell, its training inputs and targets.
      evaluation: by cell and split, inputs and targets; a cell may be a training cell too.
      targets: whether the targets have to be the same as well.

    Returns:
      Rows in the order of `evaluation`, its splits and `training`.
    """
    holders: dict[bytes, list[int]] = collections.defaultdict(list)
    for number, texts in enumerate(training.values()):
        for key in set(keys(texts, targets)):
            holders[key].append(number)
    names = tuple(training)
    rows = []
    for cell, splits in evaluation.items():
        for split, texts in splits.items():
            shared = collections.Counter(
                number for key in keys(texts, targets) for number in holders.get(key, ())
            )
            rows += [
                OverlapRow(cell, split, names[number], shared[number], len(texts[0]))
                for number in sorted(shared)
            ]
    return Overlap(tuple(rows))


def examples_to_drop(
    training: Mapping[str, Texts],
    evaluation: Mapping[str, Mapping[str, Texts]],
    *,
    targets: bool = False,
) -> dict[str, Int[np.ndarray, " dropped"]]:
    """Which training examples also stand in the evaluation data of any cell.

    Args:
      training, evaluation, targets: as of `find_overlap`.

    Returns:
      By training cell, the places of its examples to drop: int64, ascending. Cells that keep all
      of theirs are left out.
    """
    evaluated = {
        key
        for splits in evaluation.values()
        for texts in splits.values()
        for key in keys(texts, targets)
    }
    dropped = {}
    for cell, texts in training.items():
        places = [i for i, key in enumerate(keys(texts, targets)) if key in evaluated]
        if places:
            dropped[cell] = np.asarray(places, np.int64)
    return dropped


@dataclass(frozen=True)
class CellRepeats:
    """How often one cell repeats itself.

    Attributes:
      cell: its name.
      examples: by split, how many there are.
      repeats: by split, how many of them have an equal one before them in the split.
      between: by pair of splits, how many examples of the second are also in the first.
    """

    cell: str
    examples: Mapping[str, int]
    repeats: Mapping[str, int]
    between: Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class Repeats:
    """What `find_repeats` found, a row for each cell, repeats or none."""

    rows: tuple[CellRepeats, ...] = ()

    def table(self) -> str:
        """Cells by splits and pairs of splits; a dash where the cell lacks one."""
        splits = list(dict.fromkeys(split for row in self.rows for split in row.examples))
        pairs = list(dict.fromkeys(pair for row in self.rows for pair in row.between))
        lines = [["repeated", *splits, *(f"{second} in {first}" for first, second in pairs)]]
        for row in self.rows:
            counts = [row.repeats.get(split) for split in splits]
            counts += [row.between.get(pair) for pair in pairs]
            lines.append([row.cell, *("-" if n is None else f"{n:,}" for n in counts)])
        return format_table(lines)


def find_repeats(cells: Mapping[str, Mapping[str, Texts]], *, targets: bool = False) -> Repeats:
    """Counts, per cell, examples that repeat within a split and from one split to another.

    Args:
      cells: by cell and split, inputs and targets.
      targets: whether the targets have to be the same as well.
    """
    rows = []
    for cell, splits in cells.items():
        hashed = {split: keys(texts, targets) for split, texts in splits.items()}
        distinct = {split: set(found) for split, found in hashed.items()}
        names = list(hashed)
        between = {
            (first, second): sum(key in distinct[first] for key in hashed[second])
            for i, first in enumerate(names)
            for second in names[i + 1 :]
        }
        rows.append(
            CellRepeats(
                cell,
                {split: len(found) for split, found in hashed.items()},
                {split: len(found) - len(distinct[split]) for split, found in hashed.items()},
                between,
            )
        )
    return Repeats(tuple(rows))
