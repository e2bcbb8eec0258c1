"""Length bucketing: batches of examples of nearly one length, so that short ones are padded less.

The sequence of examples falls into windows of BATCHES batches. In a window examples are sorted by
the least length that holds them, of few that each side of a batch may have (a whole one, its half,
its quarter); those of one length stay in their order, which is random. Batches are cut from the
sorted examples, each is as long as its longest example needs, and they are shuffled. So a batch has
as many rows as ever, every window holds the same examples as without, and each length is a shape
that is compiled once.

All of it follows from the seed and the number of the batch: nothing is carried along. Examples that
change when they are drawn are made to know their lengths, those of the next window a part with each
batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from flix_jax.data.examples import (
    INPUTS,
    SOURCES,
    TARGETS,
    TOKENS,
    CellData,
    Example,
    LengthReport,
)
from flix_jax.data.order import Drawn, ExampleOrder, Recent, permutation

BATCHES = 64  # of a window
VERSION = 1  # changes when the same examples come in other batches


class BucketedOrder:
    """The batches of a sequence of examples that is sorted by length within windows.

    Args:
      order: of the examples.
      data: of the cells, by name.
      lengths: the longest of a batch, {'inputs': L, 'targets': T}, and 'sources' where there are
        some; longer examples count as cut to them.
      buckets: how many lengths a side may have, {'inputs': n, 'targets': m}; without a side 1.
        Sources that are as long as the inputs have their length in every batch, so that there are
        fewer shapes; others keep their own.
      rows: of a batch.
      made: how to make an example that is drawn.
      transformed: names of cells whose examples change by that, and so their lengths.

    Raises:
      ValueError: there is no such number of lengths.
    """

    def __init__(
        self,
        order: ExampleOrder,
        data: Mapping[str, CellData],
        lengths: Mapping[str, int],
        buckets: Mapping[str, int],
        rows: int,
        made: Callable[[Drawn], Example],
        transformed: Collection[str],
    ) -> None:
        self._order = order
        self._lengths = dict(lengths)
        self._choices = [choices(lengths[side], buckets.get(side, 1)) for side in TOKENS]
        self._rows = rows
        self._made = made
        self._transformed = [name in transformed for name in order.names]
        self._tied = SOURCES if lengths.get(SOURCES) == lengths[INPUTS] else None
        self._counts = [data[name].token_counts(lengths) for name in order.names]
        self._lock = threading.Lock()  # a thread makes batches while another asks for lengths
        self._stretches: Recent = Recent(2 * BATCHES)
        self._windows: Recent = Recent(4)
        self._window_lengths: Recent = Recent(1024)  # asked for when a window is long over

    @property
    def version(self) -> list[int]:
        """What the same examples are sorted by, to be compared where a run goes on."""
        return [VERSION, BATCHES, *map(len, self._choices)]

    def rows_at(self, batch: int) -> list[Drawn]:
        """The examples of a batch, row by row."""
        number, place = divmod(batch, BATCHES)
        with self._lock:
            window = self._window(number)
            self._stretch(batch + BATCHES)  # of the next window
        columns = (window.cells, window.examples, window.positions)
        return [Drawn(*one) for one in zip(*(of[place].tolist() for of in columns), strict=True)]

    def lengths_at(self, batch: int) -> dict[str, int]:
        """The lengths that a batch is padded to."""
        number, place = divmod(batch, BATCHES)
        with self._lock:
            lengths = self._window_lengths.get(number, lambda: self._window(number).lengths)
        inputs, targets = lengths[place].tolist()
        found = self._lengths | {INPUTS: inputs, TARGETS: targets}
        return found if self._tied is None else found | {self._tied: inputs}

    def report(self) -> LengthReport:
        """What it comes to, by the first window."""
        with self._lock:
            window = self._window(0)
            plain = [self._stretch(batch) for batch in range(BATCHES)]
        counts = np.stack([np.bincount(of, minlength=len(self._counts)) for of in window.cells])
        shares = counts / self._rows
        mean = shares.mean(axis=0)
        by_itself = float((mean * (1 - mean)).sum()) / self._rows
        return LengthReport(
            lengths=tuple(map(tuple, window.lengths.tolist())),
            tokens=tuple(window.tokens.sum(axis=(0, 1)).tolist()),
            rows=self._rows,
            limits=(self._lengths[INPUTS], self._lengths[TARGETS]),
            target_tokens=_range(window.tokens[:, :, 1]),
            target_tokens_without=_range(np.stack([of.tokens[:, 1] for of in plain])),
            variance=float(shares.var(axis=0).sum()) / by_itself if by_itself else None,
        )

    def _window(self, number: int) -> _Window:
        window = self._windows.get(number, lambda: self._sorted(number))
        self._window_lengths.get(number, lambda: window.lengths)
        return window

    def _sorted(self, number: int) -> _Window:
        first = number * BATCHES
        found = [self._stretch(batch) for batch in range(first, first + BATCHES)]
        cells, examples, tokens, levels = map(np.concatenate, zip(*found, strict=True))
        # Rows that are drawn together stay so.
        together = self._order.together
        needed = levels.reshape(-1, together, len(TOKENS)).max(axis=1)
        groups = np.lexsort(needed.T[::-1]).reshape(BATCHES, -1)  # by inputs, then by targets
        groups = groups[permutation(BATCHES, self._order.seed, "length buckets", number)]
        rows = (groups[:, :, None] * together + np.arange(together)).reshape(BATCHES, -1)
        longest = levels[rows].max(axis=1)
        sides = zip(self._choices, longest.T, strict=True)
        return _Window(
            cells[rows],
            examples[rows],
            first * self._rows + rows,
            tokens[rows],
            np.stack([known[of] for known, of in sides], axis=1),
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
        of = dict(zip(self._lengths, counts.T, strict=True))
        needed = of if self._tied is None else of | {INPUTS: np.maximum(of[INPUTS], of[SOURCES])}
        levels = [
            np.searchsorted(known, needed[side])
            for known, side in zip(self._choices, TOKENS, strict=True)
        ]
        tokens = np.stack([of[side] for side in TOKENS], axis=1)
        return _Stretch(cells, examples, tokens, np.stack(levels, axis=1))


def choices(length: int, buckets: int) -> Int[np.ndarray, " buckets"]:
    """The lengths that a side of a batch may have: `length` and its halves, ascending.

    Raises:
      ValueError: there are no so many of them, or none.
    """
    if not 1 <= buckets <= length.bit_length() or length % 2 ** (buckets - 1):
        raise ValueError(
            f"{buckets} lengths, of which each is half of the next, up to {length}: expected 1 or "
            "more, and a length that can be halved so often"
        )
    return length // 2 ** np.arange(buckets)[::-1]


class _Stretch(NamedTuple):
    """As many examples as a batch has, one after another in the sequence.

    `tokens` are those of inputs and targets, `levels` the places in the lengths of either side of
    the least one that holds them (and sources that are cut with the inputs).
    """

    cells: Int[np.ndarray, " rows"]
    examples: Int[np.ndarray, " rows"]
    tokens: Int[np.ndarray, "rows 2"]
    levels: Int[np.ndarray, "rows 2"]


class _Window(NamedTuple):
    """The batches of a window; `tokens` as of `_Stretch`, `lengths` of inputs and targets."""

    cells: Int[np.ndarray, "batches rows"]
    examples: Int[np.ndarray, "batches rows"]
    positions: Int[np.ndarray, "batches rows"]
    tokens: Int[np.ndarray, "batches rows 2"]
    lengths: Int[np.ndarray, "batches 2"]


def _range(tokens: Int[np.ndarray, "batches rows"]) -> tuple[int, int]:
    """The least and the most tokens of a batch."""
    sums = tokens.sum(axis=1)
    return int(sums.min()), int(sums.max())
