"""The same text in evaluation data and in training data, and twice within a cell.

Two texts are the same when they are equal after Unicode's NFC and with every run of white space
as one space, none at the ends. Examples are the same when their inputs are, or, on request, their
inputs and their targets. An example is compared by its key, a hash of 16 bytes (BLAKE2b), so that
the texts need not be kept; everything takes time linear in them.
"""

from __future__ import annotations

import collections
import hashlib
import unicodedata
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from flix_jax.adapters import text_tables
from flix_jax.data.cells import CellSplit, Source

Texts = tuple[Sequence[str], Sequence[str]]  # inputs, targets: as many
Keys = list[bytes]
Name = TypeVar("Name", bound=Hashable)

#: The split that is trained on; the others are evaluated.
TRAIN = "train"


def normalize(text: str) -> str:
    """`text` in NFC, with single spaces and none at its ends."""
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def keys(texts: Texts, targets: bool = False) -> Keys:
    """The key of every example: a hash of its input, or of its input and its target.

    Raises:
      ValueError: not as many targets as inputs, where targets count.
    """
    if not targets:
        return text_keys(texts[0])
    if len(texts[0]) != len(texts[1]):
        raise ValueError(f"{len(texts[0])} inputs but {len(texts[1])} targets; expected as many")
    # A line break never stands in a normalised text.
    return [
        _digest(f"{normalize(source)}\n{normalize(target)}")
        for source, target in zip(*texts, strict=True)
    ]


def text_keys(texts: Iterable[str]) -> Keys:
    """The key of every text."""
    return [_digest(normalize(text)) for text in texts]


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
    """What evaluated cells share with training cells.

    Attributes:
      rows: pairs of an evaluated split and a training cell; only those that share something.
      shared: by evaluated cell, how many examples of its splits any training cell holds.
    """

    rows: tuple[OverlapRow, ...] = ()
    shared: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def summary(self, held_out: Collection[str] = ()) -> str:
        """How many examples are shared, and the pair that shares most, in a line; '' if none are.

        Args:
          held_out: of these cells, the number is told apart, and the pair if any shares something.
        """
        if not self.rows:
            return ""
        rows = [row for row in self.rows if row.cell in held_out] or self.rows
        most = max(rows, key=lambda row: row.examples)
        total = sum(self.shared.values())
        held = sum(self.shared.get(cell, 0) for cell in held_out)
        return (
            f"evaluation examples whose input stands in training data too: {total:,}, of them in "
            f"held-out cells {held:,}; most: {most.examples:,} of {most.of:,} of {most.cell} "
            f"{most.split} in {most.trained}"
        )

    def table(self, at_most: int | None = None, groups: Mapping[str, str] | None = None) -> str:
        """A line for each pair of cells that share an example; '' where none do.

        Args:
          at_most: of many pairs, show so many of those that share most, and count the rest.
          groups: by evaluated cell, what it is (`CellSplit.group`): another column.
        """
        if not self.rows:
            return ""
        shown = self.rows
        if at_most is not None and len(shown) > at_most:
            shown = tuple(sorted(shown, key=lambda row: -row.examples)[:at_most])
        group = ["group"] if groups else []
        lines = [["evaluated", *group, "split", "trained on", "shared", "of", "%"]]
        for row in shown:
            group = [groups[row.cell]] if groups else []
            share = f"{100 * row.examples / row.of:.1f}"
            counts = [f"{row.examples:,}", f"{row.of:,}", share]
            lines.append([row.cell, *group, row.split, row.trained, *counts])
        more = len(self.rows) - len(shown)
        rest = f"\nand {more:,} more pairs that share less" if more else ""
        return text_tables.plain(lines) + rest


def find_overlap(
    training: Mapping[str, Keys], evaluation: Mapping[str, Mapping[str, Keys]]
) -> Overlap:
    """Counts the examples of every evaluated cell and split that each training cell holds too.

    Args:
      training: by cell, the `keys` of its training examples.
      evaluation: by cell and split, `keys`; a cell may be a training cell too.

    Returns:
      Rows in the order of `evaluation`, its splits and `training`.
    """
    holders: dict[bytes, list[int]] = collections.defaultdict(list)
    for number, found in enumerate(training.values()):
        for key in set(found):
            holders[key].append(number)
    names = tuple(training)
    rows, total = [], {}
    for cell, splits in evaluation.items():
        total[cell] = sum(key in holders for found in splits.values() for key in found)
        for split, found in splits.items():
            shared = collections.Counter(number for key in found for number in holders.get(key, ()))
            rows += [
                OverlapRow(cell, split, names[number], shared[number], len(found))
                for number in sorted(shared)
            ]
    return Overlap(tuple(rows), total)


def examples_to_drop(
    training: Mapping[str, Keys], evaluation: Mapping[str, Mapping[str, Keys]]
) -> dict[str, Int[np.ndarray, " dropped"]]:
    """Which training examples also stand in the evaluation data of any cell.

    Args:
      training, evaluation: as of `find_overlap`.

    Returns:
      By training cell, the places of its examples to drop: int64, ascending. Cells that keep all
      of theirs are left out.
    """
    evaluated = {
        key for splits in evaluation.values() for found in splits.values() for key in found
    }
    dropped = {}
    for cell, found in training.items():
        places = [i for i, key in enumerate(found) if key in evaluated]
        if places:
            dropped[cell] = np.asarray(places, np.int64)
    return dropped


@dataclass(frozen=True)
class Comparison:
    """The training data of a mixture beside its evaluation data.

    Attributes:
      overlap: of what is left to train on with all evaluation data, those of held-out cells first.
      examples: by training cell, how many there were.
      dropped: by training cell, the places of the examples that are not trained on.
    """

    overlap: Overlap
    examples: Mapping[str, int]
    dropped: Mapping[str, Int[np.ndarray, " dropped"]]


def compare(source: Source, split: CellSplit, *, drop: bool = False) -> Comparison:
    """Reads the data of a mixture and compares the inputs.

    Args:
      source: where the cells of `split` are. All their splits are read once.
      drop: leave out the training examples that also stand in evaluation data of held-out cells.
    """
    texts = getattr(source, "texts", lambda cell, name: source.pairs(cell, name)[0])
    training = {cell.name: text_keys(texts(cell, TRAIN)) for cell in split.train}
    examples = {name: len(found) for name, found in training.items()}
    evaluation = {
        cell.name: {s: text_keys(texts(cell, s)) for s in source.splits(cell) if s != TRAIN}
        for cell in split.held_out + split.train
    }
    dropped = {}
    if drop:
        held_out = {cell.name: evaluation[cell.name] for cell in split.held_out}
        dropped = examples_to_drop(training, held_out)
        for name, places in dropped.items():
            gone = set(places.tolist())
            training[name] = [key for i, key in enumerate(training[name]) if i not in gone]
    return Comparison(find_overlap(training, evaluation), examples, dropped)


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
        return text_tables.plain(lines)


def find_repeats(cells: Mapping[str, Mapping[str, Keys]]) -> Repeats:
    """Counts, per cell, examples that repeat within a split and from one split to another.

    Args:
      cells: by cell and split, the `keys` of the examples.
    """
    rows = []
    for cell, splits in cells.items():
        distinct = {split: set(found) for split, found in splits.items()}
        names = list(splits)
        between = {
            (first, second): sum(key in distinct[first] for key in splits[second])
            for i, first in enumerate(names)
            for second in names[i + 1 :]
        }
        rows.append(
            CellRepeats(
                cell,
                {split: len(found) for split, found in splits.items()},
                {split: count_repeats(found) for split, found in splits.items()},
                between,
            )
        )
    return Repeats(tuple(rows))


def count_repeats(found: Sequence[Hashable]) -> int:
    """How many of the keys have an equal one before them."""
    return len(found) - len(set(found))


def count_elsewhere(
    cells: Mapping[tuple[Name, str], Keys],
) -> dict[tuple[Name, str], tuple[int, int]]:
    """How many examples of each split stand elsewhere too.

    Args:
      cells: by (cell, split), the `keys` of the examples.

    Returns:
      By (cell, split): (in another split of the cell, in another cell).
    """
    splits: dict[Name, collections.Counter[bytes]] = {}
    for (cell, _), found in cells.items():
        splits.setdefault(cell, collections.Counter()).update(set(found))
    holders = collections.Counter(key for counted in splits.values() for key in counted)
    return {
        (cell, split): (
            sum(splits[cell][key] > 1 for key in found),
            sum(holders[key] > 1 for key in found),
        )
        for (cell, split), found in cells.items()
    }
