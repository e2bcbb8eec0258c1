"""What a folder of cells holds: sizes, lengths, what would be cut, what occurs twice.

Texts are read once, split by split, and reduced to lengths and to keys (flix_jax.data.overlap,
which says when two texts are the same); everything is counted on those.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from flix_jax.adapters import text_tables
from flix_jax.data.cells import Cell
from flix_jax.data.overlap import Keys, count_elsewhere, count_repeats, text_keys
from flix_jax.data.vocabularies import ByteVocabulary, Vocabulary

FORMATS = ("text", "markdown", "json")
ORDER = ("train", "validation", "test")  # of splits; others follow


class Readable(Protocol):
    """A source of cells whose texts can be read."""

    def cells(self) -> tuple[Cell, ...]: ...

    def splits(self, cell: Cell) -> tuple[str, ...]: ...

    def pairs(self, cell: Cell, split: str) -> tuple[list[str], list[str]]:
        """Inputs and targets, in the order of the file."""
        ...


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of the texts of a split. A percentile is the least length that as many do not exceed."""

    median: int
    p95: int
    p99: int
    maximum: int

    @classmethod
    def of(cls, lengths: Int[np.ndarray, " examples"]) -> Lengths:
        """Counts `lengths`; all are zero where there is no text."""
        if not len(lengths):
            return cls(0, 0, 0, 0)
        found = np.percentile(lengths, (50, 95, 99, 100), method="inverted_cdf")
        return cls(*(int(length) for length in found))

    def __str__(self) -> str:
        return "/".join(map(str, dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Part:
    """One split of a cell, or of all cells together (`cell` is then `all`).

    Attributes:
      cell, split: which.
      examples: how many.
      input_bytes, target_bytes: lengths in UTF-8.
      input_tokens, target_tokens: lengths in tokens, the end of the sequence included; None
        without a vocabulary.
      cut_inputs, cut_targets: texts with more tokens than configured; None where no lengths are.
      duplicates: examples whose input and target both occurred before in the split.
      empty_targets: examples whose target is the empty text.
      in_other_splits: examples whose input is also one of another split of the cell.
      in_other_cells: examples whose input is also one of another cell, in any split.
      without_source: examples without an English source; None where no sources are asked for.
      source_tokens: lengths of the sources that there are, as of the inputs; None without a
        vocabulary.
      cut_sources: as `cut_inputs`, where a length is configured for them.
    """

    cell: str
    split: str
    examples: int
    input_bytes: Lengths
    target_bytes: Lengths
    input_tokens: Lengths | None
    target_tokens: Lengths | None
    cut_inputs: int | None
    cut_targets: int | None
    duplicates: int
    empty_targets: int
    in_other_splits: int
    in_other_cells: int
    without_source: int | None = None
    source_tokens: Lengths | None = None
    cut_sources: int | None = None


@dataclasses.dataclass(frozen=True)
class Description:
    """Of the cells of a source.

    Attributes:
      cells: those described, sorted by name.
      parts: every split of every cell.
      totals: every split of all cells together.
      lengths: the configured lengths in tokens, of `inputs`, `targets` and `sources`, if any.
    """

    cells: tuple[Cell, ...]
    parts: tuple[Part, ...]
    totals: tuple[Part, ...]
    lengths: Mapping[str, int] | None = None

    def format(self, kind: str = "text") -> str:
        """As `text`, `markdown` or `json`."""
        if kind == "json":
            return self.to_json()
        table = text_tables.markdown if kind == "markdown" else text_tables.plain
        return "\n\n".join([table(self._overview()), table(self._rows()), self._legend()])

    def to_json(self) -> str:
        """Every number: `{"lengths", "cells": [...], "all": [...]}`, a split of a cell an entry."""
        of = {cell.name: {"task": cell.task, "language": cell.language} for cell in self.cells}
        value = {
            "lengths": None if self.lengths is None else dict(self.lengths),
            "cells": [of[part.cell] | dataclasses.asdict(part) for part in self.parts],
            "all": [dataclasses.asdict(part) for part in self.totals],
        }
        return json.dumps(value, indent=2, ensure_ascii=False)

    def _overview(self) -> list[list[str]]:
        """Language by task: the examples of each split, `701/99/204`."""
        examples = {(part.cell, part.split): part.examples for part in self.parts}
        splits = [part.split for part in self.totals]
        tasks = sorted({cell.task for cell in self.cells})
        rows = [["language", *tasks]]
        for language in sorted({cell.language for cell in self.cells}):
            row = [language]
            for task in tasks:
                here = [c for c in self.cells if (c.task, c.language) == (task, language)]
                entries = [
                    "/".join(str(examples.get((cell.name, split), "-")) for split in splits)
                    for cell in here
                ]
                row.append(" + ".join(entries) or "-")
            rows.append(row)
        return rows

    def _rows(self) -> list[list[str]]:
        tokens = self.totals[0].input_tokens is not None
        header = ["cell", "split", "examples", "input bytes", "target bytes"]
        header += ["input tokens", "target tokens"] * tokens
        header += ["inputs cut", "targets cut"] * (self.lengths is not None)
        header += ["duplicates", "empty targets", "in other splits", "in other cells"]
        sources = self.totals[0].without_source is not None
        source_tokens = self.totals[0].source_tokens is not None
        cut_sources = self.totals[0].cut_sources is not None
        header += ["without source"] * sources + ["source tokens"] * source_tokens
        header += ["sources cut"] * cut_sources
        rows = [header]
        for part in (*self.parts, *(self.totals if len(self.cells) > 1 else ())):

            def share(count: int | None, part: Part = part) -> str:
                return f"{count:,} ({count / part.examples:.1%})" if count else "0"

            row = [part.cell, part.split, f"{part.examples:,}"]
            row += [str(part.input_bytes), str(part.target_bytes)]
            row += [str(part.input_tokens), str(part.target_tokens)] * tokens
            if self.lengths is not None:
                row += [share(part.cut_inputs), share(part.cut_targets)]
            row += [share(part.duplicates), share(part.empty_targets)]
            row += [share(part.in_other_splits), share(part.in_other_cells)]
            row += [share(part.without_source)] * sources
            row += [str(part.source_tokens)] * source_tokens
            rows.append(row + [share(part.cut_sources)] * cut_sources)
        return rows

    def _legend(self) -> str:
        splits = "/".join(part.split for part in self.totals)
        lines = [f"The first table counts examples: {splits}."]
        lines.append("Lengths: median/95 %/99 %/maximum; tokens include the end of the sequence.")
        if self.lengths is not None:
            lines.append(
                f"Cut: longer than {self.lengths['inputs']} tokens (inputs) or "
                f"{self.lengths['targets']} (targets)."
            )
            if "sources" in self.lengths:
                lines[-1] = lines[-1].removesuffix(".") + f", {self.lengths['sources']} (sources)."
        lines.append("Duplicates: input and target both occurred before in the split.")
        lines.append("In other splits or cells: the same input stands there too.")
        lines.append("The same: after Unicode's NFC, and with white space collapsed.")
        return "\n".join(lines)


def describe(
    source: Readable,
    cells: Iterable[Cell] | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    lengths: Mapping[str, int] | None = None,
    sources: Callable[[Cell, str], Sequence[str]] | None = None,
    join: Callable[[str, str], str] | None = None,
) -> Description:
    """Reads all splits of cells and counts them.

    Args:
      source: where they are.
      cells: of the source; None takes all.
      vocabulary: counts tokens besides bytes. seqio and TensorFlow are imported for a SentencePiece
        model only.
      lengths: in tokens, of `inputs`, `targets` and perhaps `sources`; counts what they would cut.
        Needs a vocabulary.
      sources: gives the English source of every example of a split, '' where it has none.
      join: (source, input) -> what is read of both; the lengths of inputs are then those of it.

    Raises:
      ValueError: for no cells, lengths without a vocabulary, and with file and line for a record
        that cannot be read.
    """
    cells = tuple(source.cells() if cells is None else cells)
    if not cells:
        raise ValueError("no cells to describe")
    if lengths is not None and vocabulary is None:
        raise ValueError(f"lengths {dict(lengths)} are in tokens: a vocabulary is needed")
    measure = _Measure(vocabulary, join)
    counted = {
        (cell, split): measure(
            *source.pairs(cell, split), None if sources is None else sources(cell, split)
        )
        for cell in cells
        for split in source.splits(cell)
    }
    elsewhere = count_elsewhere({key: part.inputs for key, part in counted.items()})
    duplicates = {key: part.duplicates() for key, part in counted.items()}

    def make(name: str, split: str, keys: Sequence[tuple[Cell, str]]) -> Part:
        data = _Counted.join([counted[key] for key in keys])
        in_tokens, out_tokens = data.input_tokens, data.target_tokens
        given = data.source_bytes
        source_tokens = None
        if given is not None and data.source_tokens is not None:
            source_tokens = data.source_tokens[given > 0]
        limit = lengths or {}
        return Part(
            cell=name,
            split=split,
            examples=len(data.inputs),
            input_bytes=Lengths.of(data.input_bytes),
            target_bytes=Lengths.of(data.target_bytes),
            input_tokens=None if in_tokens is None else Lengths.of(in_tokens),
            target_tokens=None if out_tokens is None else Lengths.of(out_tokens),
            cut_inputs=_above(in_tokens, limit.get("inputs")),
            cut_targets=_above(out_tokens, limit.get("targets")),
            duplicates=sum(duplicates[key] for key in keys),
            empty_targets=int((data.target_bytes == 0).sum()),
            in_other_splits=sum(elsewhere[key][0] for key in keys),
            in_other_cells=sum(elsewhere[key][1] for key in keys),
            without_source=None if given is None else int((given == 0).sum()),
            source_tokens=None if source_tokens is None else Lengths.of(source_tokens),
            cut_sources=_above(source_tokens, limit.get("sources")),
        )

    splits = dict.fromkeys(split for _, split in counted)
    order = sorted(splits, key=lambda s: ORDER.index(s) if s in ORDER else len(ORDER))
    return Description(
        cells=cells,
        parts=tuple(make(key[0].name, key[1], [key]) for key in counted),
        totals=tuple(make("all", s, [key for key in counted if key[1] == s]) for s in order),
        lengths=lengths,
    )


# --------------------------------------------------------------------------------------------
# Texts as numbers


@dataclasses.dataclass(frozen=True, eq=False)
class _Counted:
    """The texts of a split: their keys, and arrays [examples] of their lengths."""

    inputs: Keys
    targets: Keys
    input_bytes: Int[np.ndarray, " examples"]
    target_bytes: Int[np.ndarray, " examples"]
    input_tokens: Int[np.ndarray, " examples"] | None
    target_tokens: Int[np.ndarray, " examples"] | None
    source_bytes: Int[np.ndarray, " examples"] | None = None
    source_tokens: Int[np.ndarray, " examples"] | None = None

    @classmethod
    def join(cls, parts: Sequence[_Counted]) -> _Counted:
        def joined(name: str) -> Any:
            columns = [getattr(part, name) for part in parts]
            if isinstance(columns[0], list):
                return list(itertools.chain.from_iterable(columns))
            return None if columns[0] is None else np.concatenate(columns)

        return cls(*(joined(field.name) for field in dataclasses.fields(cls)))

    def duplicates(self) -> int:
        return count_repeats(list(zip(self.inputs, self.targets, strict=True)))


class _Measure:
    """Turns the texts of a split into `_Counted`."""

    def __init__(
        self, vocabulary: Vocabulary | None, join: Callable[[str, str], str] | None
    ) -> None:
        self._join = join
        self._bytes = isinstance(vocabulary, ByteVocabulary)
        self._encode: Any = None
        if vocabulary is not None and not self._bytes:
            self._encode = vocabulary.build().encode

    def __call__(
        self, inputs: Sequence[str], targets: Sequence[str], sources: Sequence[str] | None
    ) -> _Counted:
        read = inputs
        if self._join is not None and sources is not None:
            read = [self._join(*both) for both in zip(sources, inputs, strict=True)]
        input_bytes, input_tokens = self._lengths(read)
        target_bytes, target_tokens = self._lengths(targets)
        of_sources = (None, None) if sources is None else self._lengths(sources)
        return _Counted(
            text_keys(inputs),
            text_keys(targets),
            input_bytes,
            target_bytes,
            input_tokens,
            target_tokens,
            *of_sources,
        )

    def _lengths(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        num_bytes = np.fromiter((len(text.encode()) for text in texts), np.int64, len(texts))
        if self._bytes:
            return num_bytes, num_bytes + 1
        if self._encode is None:
            return num_bytes, None
        tokens = (len(self._encode(text)) + 1 for text in texts)
        return num_bytes, np.fromiter(tokens, np.int64, len(texts))


def _above(lengths: np.ndarray | None, limit: int | None) -> int | None:
    return None if lengths is None or limit is None else int((lengths > limit).sum())
