"""Length bucketing: batches of examples of nearly one length, so that short ones are padded less.

The sequence of examples falls into windows of BATCHES batches. In a window examples are sorted by
the least length that holds them, of few lengths that each side of a batch may have (a whole one,
its half, its quarter); among those of one length the order is random. Batches are cut from the
sorted examples, each is as long as its longest example needs, and they are shuffled. So a batch has
as many rows as ever, every window holds the same examples as without, and each length is a shape
that is compiled once.

All of it follows from the seed and the number of the batch: nothing is carried along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from flix_jax.data.examples import BucketReport, CellData, Example
from flix_jax.data.order import Drawn, ExampleOrder, Recent, permutation

BATCHES = 64  # of a window
VERSION = 1  # changes when the same examples come in other batches

INPUTS, TARGETS, SOURCES = "inputs", "targets", "sources"


def choices(length: int, buckets: int) -> list[int]:
    """The lengths that a side of a batch may have: `length` and its halves, ascending.

    Raises:
      ValueError: it cannot be halved so often.
    """
    shortest, rest = divmod(length, 2 ** (buckets - 1))
    if rest or not shortest:
        raise ValueError(
            f"{buckets} lengths of which each is half the next: expected a multiple of "
            f"{2 ** (buckets - 1)}, got {length}"
        )
    return [shortest * 2**i for i in range(buckets)]


class BucketedOrder:
    """The batches of a sequence of examples that is sorted by length within windows.

    Args:
      order: of the examples.
      data: of the cells, by name.
      lengths: the longest of a batch, {'inputs': L, 'targets': T}, and 'sources' where there are
        some; longer examples count as cut to them.
      buckets: how many lengths a side may have, {'inputs': n, 'targets': m}. Sources that are as
        long as the inputs have their length in every batch, for adapters may fuse both position by
        position; others keep their own.
      rows: of a batch.
      made: how to make an example that is drawn.
      transformed: names of cells whose examples change by that, and so their lengths.

    Raises:
      ValueError: a length cannot be halved so often.
    """

    def __init__(
        self,
        order: ExampleOrder,
        data: Mapping[str, CellData],
        lengths: Mapping[str, int],
        buckets: Mapping[str, int],
        rows: int,
        made: Callable[[Drawn], Example],
        transformed: Mapping[str, object],
    ) -> None:
        self._order = order
        self._lengths = dict(lengths)
        self._choices = [
            np.asarray(choices(lengths[side], buckets[side])) for side in (INPUTS, TARGETS)
        ]
        self._rows = rows
        self._made = made
        self._transformed = [name in transformed for name in order.names]
        self._with_inputs = [s for s in (INPUTS, SOURCES) if lengths.get(s) == lengths[INPUTS]]
        self._counts = [data[name].token_counts(lengths) for name in order.names]
        self._lock = threading.Lock()  # a thread makes batches while another asks for lengths
        self._windows: Recent = Recent(4)
        self._stretches: Recent = Recent(2 * BATCHES)

    @property
    def version(self) -> list[int]:
        """What the same examples are sorted by, to be compared where a run goes on."""
        return [VERSION, BATCHES, *(len(of) for of in self._choices)]

    def rows_at(self, batch: int) -> list[Drawn]:
        """The examples of a batch, row by row."""
        number, place = divmod(batch, BATCHES)
        with self._lock:
            window = self._window(number)
            # What the next window needs, a part with each batch: lengths of transformed examples
            # are known when they are made.
            self._stretch(batch + BATCHES)
        columns = (window.cells, window.examples, window.positions)
        return [Drawn(*one) for one in zip(*(of[place].tolist() for of in columns), strict=True)]

    def lengths_at(self, batch: int) -> dict[str, int]:
        """The lengths that a batch is padded to."""
        number, place = divmod(batch, BATCHES)
        with self._lock:
            inputs, targets = self._window(number).lengths[place].tolist()
        return self._lengths | dict.fromkeys(self._with_inputs, inputs) | {TARGETS: targets}

    def report(self) -> BucketReport:
        """What bucketing does, by the first window."""
        with self._lock:
            window = self._window(0)
            plain = [self._stretch(batch) for batch in range(BATCHES)]
        return BucketReport(
            lengths=tuple(map(tuple, window.lengths.tolist())),
            tokens=tuple(window.tokens.sum(axis=(0, 1)).tolist()),
            rows=self._rows,
            limits=(self._lengths[INPUTS], self._lengths[TARGETS]),
            target_tokens=_range(window.tokens[:, :, 1]),
            target_tokens_without=_range(np.stack([of.counts[:, 1] for of in plain])),
            variance=_ratio(
                self._variance(window.cells), self._variance(np.stack([of.cells for of in plain]))
            ),
        )

    def _variance(self, cells: Int[np.ndarray, "batches rows"]) -> float:
        """Of the shares that cells have in a batch, over all cells."""
        counts = np.stack([np.bincount(of, minlength=len(self._counts)) for of in cells])
        return float((counts / self._rows).var(axis=0).sum())

    def _window(self, number: int) -> _Window:
        return self._windows.get(number, lambda: self._make(number))

    def _make(self, number: int) -> _Window:
        first = number * BATCHES
        found = [self._stretch(batch) for batch in range(first, first + BATCHES)]
        cells, examples, counts = (np.concatenate(of) for of in zip(*found, strict=True))
        sides = zip(self._choices, counts.T, strict=True)
        levels = np.stack([np.searchsorted(known, of) for known, of in sides], axis=1)
        # Rows that are drawn together stay so.
        together, seed = self._order.together, self._order.seed
        needed = levels.reshape(-1, together, levels.shape[1]).max(axis=1)
        order = permutation(len(needed), seed, "length buckets", number)
        order = order[np.lexsort(needed[order].T[::-1])].reshape(BATCHES, -1)
        order = order[permutation(BATCHES, seed, "order of buckets", number)]
        rows = (order[:, :, None] * together + np.arange(together)).reshape(BATCHES, -1)
        longest = levels[rows].max(axis=1)
        return _Window(
            cells[rows],
            examples[rows],
            first * self._rows + rows,
            counts[rows],
            np.stack([of[longest[:, i]] for i, of in enumerate(self._choices)], axis=1),
        )

    def _stretch(self, batch: int) -> _Stretch:
        return self._stretches.get(batch, lambda: self._drawn(batch))

    def _drawn(self, batch: int) -> _Stretch:
        start = batch * self._rows
        cells, draws = self._order.cells_at(start, self._rows)
        examples = self._order.examples(cells, draws)
        counts = np.zeros((self._rows, len(self._lengths)), np.int64)
        for row, (cell, example) in enumerate(zip(cells.tolist(), examples.tolist(), strict=True)):
            if self._transformed[cell]:
                made = self._made(Drawn(cell, example, start + row))
                counts[row] = [min(len(made[s]), most) for s, most in self._lengths.items()]
            else:
                counts[row] = self._counts[cell][example]
        places = list(self._lengths)
        together = counts[:, [places.index(side) for side in self._with_inputs]].max(axis=1)
        return _Stretch(
            cells, examples, np.stack([together, counts[:, places.index(TARGETS)]], axis=1)
        )


class _Stretch(NamedTuple):
    """As many examples as a batch has, one after another in the sequence.

    `counts` are the tokens of the inputs (with sources that are cut alike, the longer of both) and
    of the targets.
    """

    cells: Int[np.ndarray, " rows"]
    examples: Int[np.ndarray, " rows"]
    counts: Int[np.ndarray, "rows 2"]


class _Window(NamedTuple):
    """The batches of a window; `tokens` as `_Stretch.counts`, `lengths` of inputs and targets."""

    cells: Int[np.ndarray, "batches rows"]
    examples: Int[np.ndarray, "batches rows"]
    positions: Int[np.ndarray, "batches rows"]
    tokens: Int[np.ndarray, "batches rows 2"]
    lengths: Int[np.ndarray, "batches 2"]


def _range(tokens: Int[np.ndarray, "batches rows"]) -> tuple[int, int]:
    """The least and the most tokens of a batch."""
    sums = tokens.sum(axis=1)
    return int(sums.min()), int(sums.max())


def _ratio(one: float, other: float) -> float | None:
    return one / other if other else None
