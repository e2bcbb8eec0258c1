"""The tokenised examples of one cell as flat arrays in memory."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from flix_jax.adapters import text_tables
from flix_jax.data.cells import Cell

Example = dict[str, np.ndarray]
INPUTS, TARGETS = TOKENS = ("inputs", "targets")
SOURCES = "sources"  # of an example, and of the seqio task that it comes from


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of different lengths: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Int[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " rows_plus_one"]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int] | np.ndarray]) -> "Ragged":
        """Joins `rows` into one int32 array."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        values = np.zeros(offsets[-1], np.int32)
        for row, start, limit in zip(rows, offsets[:-1], offsets[1:], strict=True):
            values[start:limit] = row
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int[np.ndarray, " length"]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def without(self, rows: Int[np.ndarray, " left_out"]) -> "Ragged":
        """The other rows, in their order."""
        lengths = np.diff(self.offsets)
        kept = np.ones(len(lengths), bool)
        kept[rows] = False
        offsets = np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64)
        return Ragged(self.values[np.repeat(kept, lengths)], offsets)


@dataclass(frozen=True, eq=False)
class CellData:
    """All training examples of a cell, tokenised, ended by EOS and cut to the configured lengths.

    Attributes:
      inputs, targets: one row of token ids per example.
      feature_ids: int32 [examples, slots], or None for data without features.
      cut_inputs, cut_targets: how many rows were longer than the configured length and lost
        their end; None where the source does not tell.
      dropped: how many examples were left out of the data before.
      sources: the English source of each example, an empty row where it has none; None for data
        without sources.
      cut_sources: as of the inputs.
      without_source: how many examples have none; None for data without sources.
    """

    inputs: Ragged
    targets: Ragged
    feature_ids: Int[np.ndarray, "examples slots"] | None = None
    cut_inputs: int | None = 0
    cut_targets: int | None = 0
    dropped: int = 0
    sources: Ragged | None = None
    cut_sources: int | None = None
    without_source: int | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs but {len(self.targets)} targets")
        if self.feature_ids is not None and len(self.feature_ids) != len(self.inputs):
            raise ValueError(f"{len(self.inputs)} inputs but {len(self.feature_ids)} feature_ids")
        if self.sources is not None and len(self.sources) != len(self.inputs):
            raise ValueError(f"{len(self.inputs)} inputs but {len(self.sources)} sources")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Example:
        example = {"inputs": self.inputs[index], "targets": self.targets[index]}
        if self.feature_ids is not None:
            example["feature_ids"] = self.feature_ids[index]
        if self.sources is not None:
            example["sources"] = self.sources[index]
        return example

    def token_counts(self, lengths: Mapping[str, int]) -> Int[np.ndarray, "examples sides"]:
        """Of every example's inputs, targets or sources, those that a batch of `lengths` holds."""
        rows = [(getattr(self, side), length) for side, length in lengths.items()]
        return np.stack([np.minimum(np.diff(of.offsets), length) for of, length in rows], axis=1)

    def digest(self) -> str:
        """Hash of everything that the examples consist of."""
        hasher = hashlib.blake2b(digest_size=16)
        arrays = [self.inputs.values, self.inputs.offsets, self.targets.values]
        arrays += [self.targets.offsets]
        if self.feature_ids is not None:
            arrays.append(self.feature_ids)
        if self.sources is not None:
            arrays += [self.sources.values, self.sources.offsets]
        for array in arrays:
            hasher.update(f"{array.dtype.str}{array.shape}".encode())
            hasher.update(np.ascontiguousarray(array).data)
        return hasher.hexdigest()


@dataclass(frozen=True)
class CellReport:
    """What training sees of one cell; lengths are means in tokens, EOS included.

    `dropped` examples are not among the others. `cut_sources` and `without_source` are None where
    the examples have no sources.
    """

    examples: int
    rate: float
    cut_inputs: int | None
    cut_targets: int | None
    mean_input_length: float
    mean_target_length: float
    dropped: int = 0
    cut_sources: int | None = None
    without_source: int | None = None


@dataclass(frozen=True)
class PackingReport:
    """How full rows are that hold several examples.

    Attributes:
      rows, examples: of a window.
      tokens: of all its inputs and of all its targets.
      limits: tokens of inputs and of targets that a row has room for.
    """

    rows: int
    examples: int
    tokens: tuple[int, ...]
    limits: tuple[int, int]

    def line(self) -> str:
        """The report in a line, with what it would be without packing."""
        full = [
            f"{used / (rows * limit):.0%}"
            for rows in (self.rows, self.examples)
            for used, limit in zip(self.tokens, self.limits, strict=True)
        ]
        return (
            f"packed: {self.examples / self.rows:.1f} examples a row; {full[0]} of the inputs' "
            f"positions and {full[1]} of the targets' hold tokens (without packing {full[2]} and "
            f"{full[3]})"
        )


@dataclass(frozen=True)
class LengthReport:
    """What batches of nearly one length are, by those of a window.

    Attributes:
      lengths: of inputs and of targets, of every batch.
      tokens: of all inputs and of all targets.
      rows: of a batch.
      limits: the longest lengths of inputs and of targets.
      target_tokens: the least and the most of a batch.
      target_tokens_without: the same of the batches that there are without buckets.
      variance: of the shares that cells have in a batch, over the variance where every row is drawn
        by itself; None of a single cell.
    """

    lengths: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    rows: int
    limits: tuple[int, int]
    target_tokens: tuple[int, int]
    target_tokens_without: tuple[int, int]
    variance: float | None

    def line(self) -> str:
        """The report in a line."""
        batches = len(self.lengths)
        shapes = [
            f"{inputs}/{targets} ({count / batches:.0%})"
            for (inputs, targets), count in sorted(Counter(self.lengths).items())
        ]
        made = [self.rows * sum(of) for of in zip(*self.lengths, strict=True)]
        full = [
            f"{used / positions:.0%}"
            for all_positions in (made, [self.rows * batches * limit for limit in self.limits])
            for used, positions in zip(self.tokens, all_positions, strict=True)
        ]
        least, most = self.target_tokens
        least_without, most_without = self.target_tokens_without
        text = (
            f"batches by length: inputs/targets of {', '.join(shapes)}; {full[0]} of the inputs' "
            f"positions and {full[1]} of the targets' hold tokens (without buckets {full[2]} and "
            f"{full[3]}); a batch has {least:,} to {most:,} target tokens (without "
            f"{least_without:,} to {most_without:,})"
        )
        if self.variance is not None:
            text += (
                f"; the shares of cells in a batch have {self.variance:.1f} times the variance "
                "that they have where every row is drawn by itself"
            )
        return text


@dataclass(frozen=True)
class DataReport:
    """Per training cell: examples, rate, token lengths, and how much the lengths cut off.

    `packing` is None where a row holds one example, `by_length` where all batches have one length.
    """

    cells: Mapping[Cell, CellReport]
    packing: PackingReport | None = None
    by_length: LengthReport | None = None

    @property
    def cut(self) -> bool:
        """Whether any input, target or source lost its end."""
        return any(
            row.cut_inputs or row.cut_targets or row.cut_sources for row in self.cells.values()
        )

    @property
    def without_source(self) -> dict[Cell, int]:
        """How many examples have no source, of the cells that have such; {} without sources."""
        return {c: row.without_source for c, row in self.cells.items() if row.without_source}

    @property
    def dropped(self) -> dict[Cell, int]:
        """How many examples were left out, of the cells that lost any."""
        return {cell: row.dropped for cell, row in self.cells.items() if row.dropped}

    def table(self) -> str:
        """A line per cell, and one for the whole."""
        header = ["cell", "examples", "rate", "inputs cut", "targets cut"]
        rows = [[*header, "input tokens", "target tokens"]]
        reports = {cell.name: row for cell, row in self.cells.items()}
        if len(reports) > 1:
            reports["all"] = _total(list(self.cells.values()))
        rows += [_line(name, row) for name, row in reports.items()]
        if self.dropped:
            rows[0].append("dropped")
            for line, row in zip(rows[1:], reports.values(), strict=True):
                line.append(f"{row.dropped:,}")
        for title, name in (("sources cut", "cut_sources"), ("without source", "without_source")):
            if any(getattr(row, name) is not None for row in self.cells.values()):
                rows[0].append(title)
                for line, row in zip(rows[1:], reports.values(), strict=True):
                    line.append(_share(getattr(row, name), row.examples))
        return text_tables.plain(rows)


def report_on(
    data: Mapping[Cell, CellData],
    rates: Mapping[Cell, float],
    packing: PackingReport | None = None,
    by_length: LengthReport | None = None,
) -> DataReport:
    """Counts `data`."""
    return DataReport(
        {
            cell: CellReport(
                examples=len(examples),
                rate=rates[cell],
                cut_inputs=examples.cut_inputs,
                cut_targets=examples.cut_targets,
                mean_input_length=len(examples.inputs.values) / len(examples),
                mean_target_length=len(examples.targets.values) / len(examples),
                dropped=examples.dropped,
                cut_sources=examples.cut_sources,
                without_source=examples.without_source,
            )
            for cell, examples in data.items()
        },
        packing,
        by_length,
    )


def _total(rows: Sequence[CellReport]) -> CellReport:
    examples = sum(row.examples for row in rows)
    unknown = any(row.cut_inputs is None or row.cut_targets is None for row in rows)

    def total(name: str) -> int | None:
        counts = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        return sum(counts) if counts else None

    return CellReport(
        examples=examples,
        rate=sum(row.rate for row in rows),
        cut_inputs=None if unknown else sum(row.cut_inputs or 0 for row in rows),
        cut_targets=None if unknown else sum(row.cut_targets or 0 for row in rows),
        mean_input_length=sum(r.mean_input_length * r.examples for r in rows) / examples,
        mean_target_length=sum(r.mean_target_length * r.examples for r in rows) / examples,
        dropped=sum(row.dropped for row in rows),
        cut_sources=total("cut_sources"),
        without_source=total("without_source"),
    )


def _share(count: int | None, of: int) -> str:
    return "?" if count is None else f"{count:,} ({count / of:.1%})"


def _line(name: str, row: CellReport) -> list[str]:
    return [
        name,
        f"{row.examples:,}",
        f"{row.rate:.4f}",
        _share(row.cut_inputs, row.examples),
        _share(row.cut_targets, row.examples),
        f"{row.mean_input_length:.1f}",
        f"{row.mean_target_length:.1f}",
    ]
