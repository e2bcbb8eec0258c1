"""Training batches: a pure function of (seed, step) over examples held in memory.

`TrainPipeline.batch_at(step)` can be asked for any step in any order, and `prefetch` walks the
steps in a background thread. Neither touches TensorFlow: the examples come from `seqio_tasks`. A
row holds one example, or several where rows are packed (`packing`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flix_jax.adapters.ids import ABSENT
from flix_jax.data.cells import Cell, match
from flix_jax.data.examples import (
    SOURCES,
    TOKENS,
    CellData,
    DataReport,
    Example,
    report_on,
)
from flix_jax.data.length_buckets import BucketedOrder
from flix_jax.data.order import VERSION, Drawn, ExampleOrder, philox
from flix_jax.data.packing import PackedOrder

Batch = dict[str, np.ndarray]
Transform = Callable[[Example, np.random.Generator], Example]
SOURCE_TOKENS = "source_input_tokens"  # of a batch
SEGMENTS = ("encoder_segment_ids", "decoder_segment_ids")  # of a packed batch
PACKED = "packed"  # in a saved position: where its row is


class TrainPipeline:
    """Batches of a mixture of cells, the same for the same seed on any number of processes.

    Args:
      data: the training examples of each cell.
      rates: the share of each cell; they sum to 1 (`Mixture.rates_for`).
      lengths: {'inputs': L, 'targets': T}, and 'sources' where the cells have them; every batch is
        padded to them with zeros.
      global_batch_size: rows over all processes.
      seed: of the order, and of the transforms.
      transforms: by pattern over cell names, a function (example, generator) -> example that is
        applied whenever an example is drawn (masking, noise); its generator is keyed by the seed
        and the global position. The first pattern that matches a cell counts. What comes out longer
        than `lengths` is cut. A transform that has a method `prepared` is asked by it for the one
        to apply, given the cell's examples.
      rows: which rows of the global batch to make, ascending, where another process makes the
        others; None makes all.
      packing: whether a row holds several examples of equal features, as many as have room.
      examples_per_row: with packing, how many a row holds at most, then of any features; None is
        equal features.
      rows_per_cell: without packing, how many consecutive rows are of one cell; a divisor of
        `global_batch_size`.
      length_buckets: without packing, how many lengths inputs and targets of a batch may have,
        {'inputs': n, 'targets': m}: those of `lengths` and their halves (`data.length_buckets`).

    Raises:
      ValueError: for no cells, lengths below 1, rows that are not of the batch, cells of which only
        some have feature ids or sources, transforms for no cell; packing with transforms or with
        sources; examples_per_row without packing; rows_per_cell with packing, not a divisor, or
        with a cell whose examples have different features; length_buckets with packing, or of a
        length that cannot be halved so often.
    """

    def __init__(
        self,
        data: Mapping[Cell, CellData],
        rates: Mapping[Cell, float],
        *,
        lengths: Mapping[str, int],
        global_batch_size: int,
        seed: int = 0,
        transforms: Mapping[str, Transform] | None = None,
        rows: Sequence[int] | np.ndarray | None = None,
        packing: bool = False,
        examples_per_row: int | None = None,
        rows_per_cell: int = 1,
        length_buckets: Mapping[str, int] | None = None,
    ):
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size={global_batch_size}: expected at least 1")
        if packing and rows_per_cell > 1:
            raise ValueError(f"rows_per_cell={rows_per_cell}: has no effect with packing")
        if packing and length_buckets:
            raise ValueError(f"length_buckets={dict(length_buckets)}: no effect with packing")
        if rows_per_cell < 1 or global_batch_size % rows_per_cell:
            raise ValueError(
                f"rows_per_cell={rows_per_cell}: expected a divisor of global_batch_size="
                f"{global_batch_size}"
            )
        if examples_per_row is not None and not packing:
            raise ValueError(f"examples_per_row={examples_per_row}: has no effect without packing")
        self.rows = np.arange(global_batch_size) if rows is None else np.asarray(rows, np.int64)
        if not np.isin(self.rows, np.arange(global_batch_size)).all() or not self.rows.size:
            raise ValueError(f"rows={rows}: expected some of a batch of {global_batch_size}")
        self.has_sources = _have_sources({cell.name: of for cell, of in data.items()})
        names = (*TOKENS, *([SOURCES] if self.has_sources else []))
        check_lengths(lengths, names)
        self.lengths = {name: int(lengths[name]) for name in names}
        self.global_batch_size = int(global_batch_size)
        self._data = {cell.name: examples for cell, examples in data.items()}
        self._order = ExampleOrder(
            sizes={name: len(examples) for name, examples in self._data.items()},
            rates={cell.name: rate for cell, rate in rates.items()},
            seed=seed,
            together=rows_per_cell,
        )
        if rows_per_cell > 1:
            _check_equal_features(self._data)
        self.num_slots = _num_slots(self._data)
        self._transforms = _assign(transforms or {}, tuple(data))
        self._prepared = {
            name: transform.prepared(self._data[name])
            if hasattr(transform, "prepared")
            else transform
            for name, transform in self._transforms.items()
        }
        self._packed = None
        if packing:
            of = (self._order, self._data, self.lengths, tuple(self._transforms))
            self._packed = PackedOrder(*of, examples_per_row)
        self._examples_per_row = examples_per_row
        self._bucketed = None
        if length_buckets:
            self._bucketed = BucketedOrder(
                self._order,
                self._data,
                self.lengths,
                length_buckets,
                self.global_batch_size,
                self._example,
                self._transforms,
            )
        self._report = report_on(
            data,
            rates,
            None if self._packed is None else self._packed.report(),
            None if self._bucketed is None else self._bucketed.report(),
        )
        self._state = self._describe()

    @property
    def seed(self) -> int:
        return self._order.seed

    def batch_at(self, step: int) -> Batch:
        """`rows` of the batch of `step` (from 0), padded with zeros to `lengths_at` it.

        Returns:
          int32 `encoder_input_tokens` [rows, L], `decoder_input_tokens`, `decoder_target_tokens`,
          `decoder_loss_weights` [rows, T], and, where the cells have them, `feature_ids` [rows,
          slots] and `source_input_tokens` [rows, S], zeros for an example without a source. Of
          packed rows `encoder_segment_ids` [rows, L] and `decoder_segment_ids` [rows, T], too: the
          examples of a row by number from 1 on, 0 where there is padding. With `examples_per_row`
          `feature_ids` are [rows, examples_per_row, slots], -1 where a row has fewer.
        """
        rows, lengths = len(self.rows), self.lengths_at(step)
        inputs = np.zeros((rows, lengths["inputs"]), np.int32)
        targets = np.zeros((rows, lengths["targets"]), np.int32)
        packed = self._packed is not None
        segments = [np.zeros_like(inputs), np.zeros_like(targets)] if packed else []
        each = () if self._examples_per_row is None else (self._examples_per_row,)
        feature_ids = np.full((rows, *each, self.num_slots or 0), ABSENT, np.int32)
        sources = np.zeros((rows, lengths.get(SOURCES, 0)), np.int32)
        for row, drawn in enumerate(self._rows_at(step, self.rows)):
            ends = [0, 0]
            for number, one in enumerate(drawn, 1):
                example = self._example(one)
                for side, array in enumerate((inputs, targets)):
                    start = ends[side]
                    tokens = example[TOKENS[side]][: array.shape[1] - start]
                    ends[side] = end = start + len(tokens)
                    array[row, start:end] = tokens
                    if packed:
                        segments[side][row, start:end] = number
                if self.num_slots is not None:  # else the same for all of a row
                    feature_ids[(row, number - 1) if each else row] = example["feature_ids"]
                if self.has_sources:
                    tokens = example[SOURCES][: sources.shape[1]]
                    sources[row, : len(tokens)] = tokens
        batch = as_batch(inputs, targets)
        if packed:
            batch |= zip(SEGMENTS, segments, strict=True)
            starts = segments[1][:, 1:] != segments[1][:, :-1]
            batch["decoder_input_tokens"][:, 1:][starts] = 0
        if self.num_slots is not None:
            batch["feature_ids"] = feature_ids
        if self.has_sources:
            batch[SOURCE_TOKENS] = sources
        return batch

    def lengths_at(self, step: int) -> dict[str, int]:
        """The lengths of the batch of `step`, as `lengths`."""
        return self.lengths if self._bucketed is None else self._bucketed.lengths_at(int(step))

    def origins_at(self, step: int) -> list[tuple[str, int, int]]:
        """Where the examples of the global batch of `step` come from.

        Returns:
          (name of the cell, example of the cell, position in the sequence) of every example, row
          by row.
        """
        return [
            (self._order.names[one.cell], one.example, one.position)
            for row in self._rows_at(step, np.arange(self.global_batch_size))
            for one in row
        ]

    def _rows_at(self, step: int, places: np.ndarray) -> list[list[Drawn]]:
        """The examples of rows of the global batch."""
        start = int(step) * self.global_batch_size
        if self._packed is not None:
            rows = self._packed.rows_at(start, self.global_batch_size)
            return [rows[place] for place in places]
        if self._bucketed is not None:
            batch = self._bucketed.rows_at(int(step))
            return [[batch[place]] for place in places]
        cells, draws = (of[places] for of in self._order.cells_at(start, self.global_batch_size))
        examples = self._order.examples(cells, draws)
        drawn = zip(cells.tolist(), examples.tolist(), (start + places).tolist(), strict=True)
        return [[Drawn(*one)] for one in drawn]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array of the global batch, where it is as long as any."""
        return batch_shapes(
            self.global_batch_size,
            self.lengths,
            self.num_slots,
            packing=self._packed is not None,
            examples_per_row=self._examples_per_row,
        )

    def report(self) -> DataReport:
        """Examples, rates, lengths and cut examples per cell, and how rows or batches are made.

        Cells are as they were read, before transforms.
        """
        return self._report

    def state(self) -> dict[str, Any]:
        """What the sequence of batches depends on, as json; equal states give equal batches."""
        return dict(self._state)

    def position(self, step: int) -> dict[str, Any]:
        """What is saved to go on with `step`, as json: the step and the `state`.

        Of packed rows also what saves the packing of all that came before.
        """
        packed = {}
        if self._packed is not None:
            packed = {PACKED: self._packed.mark(int(step) * self.global_batch_size)}
        return {"step": int(step), **self._state, **packed}

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """ValueError, in one line, when a saved state belongs to another sequence of batches.

        Of the same one, what a `position` says of packed rows is known from now on.
        """
        check_same(saved, self._state)
        if self._packed is not None and PACKED in saved:
            self._packed.take_over(saved[PACKED])

    def _describe(self) -> dict[str, Any]:
        order = self._order
        digests = {name: self._data[name].digest() for name in order.names}
        return {
            "order_version": VERSION,
            "seed": order.seed,
            "global_batch_size": self.global_batch_size,
            "lengths": dict(self.lengths),
            "sizes": dict(zip(order.names, order.sizes, strict=True)),
            "shares": dict(zip(order.names, order.shares, strict=True)),
            "transforms": {name: describe(self._transforms[name]) for name in self._transforms},
            "data_digest": hashlib.blake2b(repr(digests).encode(), digest_size=16).hexdigest(),
            "packing": None if self._packed is None else self._packed.version,
            "rows_per_cell": None if order.together == 1 else order.together,
            "length_buckets": None if self._bucketed is None else self._bucketed.version,
        }

    def _example(self, drawn: Drawn) -> Example:
        name = self._order.names[drawn.cell]
        example = self._data[name][drawn.example]
        transform = self._prepared.get(name)
        if transform is None:
            return example
        generator = np.random.Generator(philox(self.seed, "transform", drawn.position))
        return {**example, **transform(example, generator)}


def batch_shapes(
    rows: int,
    lengths: Mapping[str, int],
    num_slots: int | None,
    *,
    packing: bool = False,
    examples_per_row: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a batch.

    Args:
      rows: of the batch.
      lengths: of inputs, targets and, where there are some, sources.
      num_slots: of the features; None for none.
      packing: whether rows are packed.
      examples_per_row: of packed rows whose examples have features of their own, how many.
    """
    inputs, targets = (rows, lengths["inputs"]), (rows, lengths["targets"])
    shapes: dict[str, tuple[int, ...]] = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": targets,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": targets,
    }
    if packing:
        shapes |= zip(SEGMENTS, (inputs, targets), strict=True)
    if num_slots is not None:
        each = () if examples_per_row is None else (examples_per_row,)
        shapes["feature_ids"] = (rows, *each, num_slots)
    if SOURCES in lengths:
        shapes[SOURCE_TOKENS] = (rows, lengths[SOURCES])
    return shapes


def as_batch(inputs: np.ndarray, targets: np.ndarray) -> Batch:
    """The batch of padded `inputs` [rows, L] and `targets` [rows, T], as seqio converts it.

    The decoder reads the targets shifted right behind a zero, and the loss skips the padding.
    """
    shifted = np.zeros_like(targets)
    shifted[:, 1:] = targets[:, :-1]
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets != 0).astype(np.int32),
    }


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError, in one line, where a saved state is another one in the parts that `now` has."""
    differences = []
    for name, here in now.items():
        there = saved.get(name)
        if there == here:
            continue
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            for key in sorted({*there, *here}):
                if there.get(key) != here.get(key):
                    differences.append(f"{name}[{key}] {there.get(key)} -> {here.get(key)}")
        else:
            differences.append(f"{name} {there} -> {here}")
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(
            "the saved data position belongs to other training data (saved -> now): "
            + ", ".join(differences[:4])
            + more
        )


def check_lengths(lengths: Mapping[str, int], names: Sequence[str] = TOKENS) -> None:
    """ValueError unless `lengths` gives each of `names` a length of at least 1."""
    for name in names:
        if name not in lengths:
            raise ValueError(f"lengths {dict(lengths)}: {name!r} is missing")
        if lengths[name] < 1:
            raise ValueError(f"lengths[{name!r}]={lengths[name]}: expected at least 1 token")


def describe(transform: Transform) -> str:
    """What a saved position knows of a transform: its `digest`, or its fields, or its name."""
    if hasattr(transform, "digest"):
        return str(transform.digest)
    if hasattr(transform, "__dataclass_fields__"):
        return repr(transform)
    kind = transform if hasattr(transform, "__qualname__") else type(transform)
    return f"{kind.__module__}.{kind.__qualname__}"


def _assign(transforms: Mapping[str, Transform], cells: tuple[Cell, ...]) -> dict[str, Transform]:
    assigned: dict[str, Transform] = {}
    for pattern, transform in transforms.items():
        for cell in match([pattern], cells, "transforms"):
            assigned.setdefault(cell.name, transform)
    return assigned


def _have_sources(data: Mapping[str, CellData]) -> bool:
    having = [name for name, examples in data.items() if examples.sources is not None]
    if having and len(having) < len(data):
        without = next(name for name in data if name not in having)
        raise ValueError(f"cells with and without sources: {having[0]} has them, {without} has not")
    return bool(having)


def _check_equal_features(data: Mapping[str, CellData]) -> None:
    """ValueError for a cell whose examples differ in their features."""
    for name, examples in data.items():
        ids = examples.feature_ids
        if ids is None:
            continue
        different = np.flatnonzero((ids != ids[:1]).any(axis=1))
        if len(different):
            raise ValueError(
                f"batches by cell: example {different[0]} of {name} has feature ids "
                f"{ids[different[0]].tolist()}, its first has {ids[0].tolist()}; expected the same "
                "of all examples of a cell"
            )


def _num_slots(data: Mapping[str, CellData]) -> int | None:
    widths: dict[int | None, str] = {}
    for name, examples in data.items():
        slots = None if examples.feature_ids is None else examples.feature_ids.shape[1]
        widths.setdefault(slots, name)
    if len(widths) > 1:
        found = ", ".join(f"{name}: {slots}" for slots, name in widths.items())
        raise ValueError(f"cells with different numbers of feature slots: {found}")
    return next(iter(widths), None)
