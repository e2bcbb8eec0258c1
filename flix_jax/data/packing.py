"""Packing: several short examples share a row of a batch, which would be padding for the most part.

Examples of a row have equal features, so that an adapter's update is one for the row, as it is
without packing; or any, at most so many, and each position has the update of its own example.
Which examples share a row follows from the order of the examples alone: the sequence falls into
windows of WINDOW examples, each is packed by itself, longest examples first into the first row that
has room (first-fit decreasing), and its rows are shuffled. So every window holds each cell as often
as it does without packing, and no example is cut or left out for it.

A window has as many rows as it needs. Which window holds a row is therefore known only once those
before it are counted; a saved position says it, so that a resumed run does not pack them again.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from flix_jax.data.examples import CellData, PackingReport
from flix_jax.data.order import Drawn, ExampleOrder, Recent, permutation

WINDOW = 8192  # examples; a multiple of the order's blocks
VERSION = 1  # changes when the same examples are packed otherwise


def pack(
    sizes: Int[np.ndarray, "examples dimensions"],
    groups: Int[np.ndarray, " examples"],
    limits: Sequence[int],
) -> list[list[int]]:
    """Fills rows with examples of one group each, by first-fit decreasing.

    Args:
      sizes: of every example in each dimension (tokens of the input, of the target).
      groups: of which rows hold one each.
      limits: of the sum of the sizes in a row, in each dimension.

    Returns:
      The examples of every row, by number.

    Raises:
      ValueError: an example is larger than a row.
    """
    room = np.asarray(limits, np.int64)
    if (sizes > room).any():
        worst = int(np.argmax((sizes > room).any(axis=1)))
        raise ValueError(f"example {worst} of size {sizes[worst].tolist()} in rows of {limits}")
    longest = (sizes / room).max(axis=1)
    order = np.lexsort((np.arange(len(sizes)), -longest, groups))
    rows: list[list[int]] = []
    for group in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        first = len(rows)
        left = np.tile(room, (len(group), 1))  # of the group's rows
        for example in group:
            open_rows = left[: len(rows) - first + 1]  # those in use and one more
            row = int(np.argmax((open_rows >= sizes[example]).all(axis=1)))
            left[row] -= sizes[example]
            if first + row == len(rows):
                rows.append([])
            rows[first + row].append(int(example))
    return rows


class PackedOrder:
    """The rows of a packed sequence of examples, a pure function of their number.

    Args:
      order: of the examples.
      data: of the cells, by name.
      lengths: of a row, {'inputs': L, 'targets': T}; longer examples count as cut to them.
      transformed: names of cells whose examples change when they are drawn, and so their lengths.
      examples_per_row: how many examples of any features a row holds at most; None for any number,
        of equal features.

    Raises:
      ValueError: there are such cells, or cells whose examples have sources.
    """

    def __init__(
        self,
        order: ExampleOrder,
        data: Mapping[str, CellData],
        lengths: Mapping[str, int],
        transformed: Sequence[str] = (),
        examples_per_row: int | None = None,
    ) -> None:
        if transformed:
            raise ValueError(
                f"packing: the lengths of {transformed[0]} change by a transform when an example "
                "is drawn, expected none"
            )
        if any(of.sources is not None for of in data.values()):
            raise ValueError("packing: examples have sources, which are not packed")
        self._order = order
        self._limits = (lengths["inputs"], lengths["targets"])
        self._sizes = [data[name].token_counts(lengths) for name in order.names]
        self._most = examples_per_row
        apart = examples_per_row is None
        of_cells = [data[name].feature_ids if apart else None for name in order.names]
        self._groups = _groups(of_cells, order.sizes)
        self._lock = threading.Lock()  # a position is saved while a thread makes batches
        self._windows: Recent = Recent(4)
        self._known = [(0, 0)]  # ascending: (first row, number) of windows

    @property
    def version(self) -> list[int]:
        """What the same examples are packed by, to be compared where a run goes on."""
        return [VERSION, WINDOW, *([] if self._most is None else [self._most])]

    def rows_at(self, start: int, count: int) -> list[list[Drawn]]:
        """The examples of `count` rows from the row `start` on."""
        found: list[list[Drawn]] = []
        with self._lock:
            first, window = self._window_of(start)
            while len(found) < count:
                rows = self._window(window)
                begin = start + len(found) - first
                found += rows[begin : begin + count - len(found)]
                first, window = first + len(rows), window + 1
                self._note(first, window)
        return found

    def mark(self, row: int) -> dict[str, int]:
        """What a position before a row has to say, so that it is found again without counting."""
        with self._lock:
            first, window = self._window_of(row)
        return {"window": window, "first_row": first}

    def take_over(self, mark: Any) -> None:
        """Knows from now on what a `mark` of the same sequence says.

        Raises:
          ValueError: it is none.
        """
        known = mark if isinstance(mark, Mapping) else {}
        first, window = known.get("first_row"), known.get("window")
        if not (type(first) is int and type(window) is int and min(first, window) >= 0):
            raise ValueError(f"the saved data position tells no window of packed rows: {mark!r}")
        with self._lock:
            self._note(first, window)

    def report(self) -> PackingReport:
        """How full rows are, by the first window."""
        with self._lock:
            rows = self._window(0)
        tokens = sum(self._sizes[one.cell][one.example] for row in rows for one in row)
        return PackingReport(len(rows), WINDOW, tuple(tokens.tolist()), self._limits)

    def _window_of(self, row: int) -> tuple[int, int]:
        """(first row, number) of the window with a row."""
        first, window = self._known[bisect.bisect(self._known, (row, np.inf)) - 1]
        while True:
            limit = first + len(self._window(window))
            if row < limit:
                return first, window
            first, window = limit, window + 1
            self._note(first, window)

    def _note(self, first: int, window: int) -> None:
        place = bisect.bisect_left(self._known, (first, window))
        if self._known[place : place + 1] != [(first, window)]:
            self._known.insert(place, (first, window))

    def _window(self, window: int) -> list[list[Drawn]]:
        return self._windows.get(window, lambda: self._make(window))

    def _make(self, window: int) -> list[list[Drawn]]:
        start = window * WINDOW
        cells, draws = self._order.cells_at(start, WINDOW)
        examples = self._order.examples(cells, draws)
        sizes = np.zeros((WINDOW, 2), np.int64)
        groups = np.zeros(WINDOW, np.int64)
        for cell in np.unique(cells):
            of = cells == cell
            sizes[of] = self._sizes[cell][examples[of]]
            groups[of] = self._groups[cell][examples[of]]
        limits: tuple[int, ...] = self._limits
        if self._most is not None:
            sizes = np.column_stack([sizes, np.ones(WINDOW, np.int64)])
            limits = (*limits, self._most)
        rows = pack(sizes, groups, limits)
        shuffled = permutation(len(rows), self._order.seed, "rows", window)
        return [
            [Drawn(int(cells[i]), int(examples[i]), start + i) for i in rows[row]]
            for row in shuffled
        ]


def _groups(
    feature_ids: Sequence[np.ndarray | None], sizes: Sequence[int]
) -> list[Int[np.ndarray, " examples"]]:
    """By cell, a number for every example that is the same where the features are."""
    known = [ids for ids in feature_ids if ids is not None]
    if not known:
        return [np.zeros(size, np.int64) for size in sizes]
    _, numbers = np.unique(np.concatenate(known), axis=0, return_inverse=True)
    return np.split(numbers.reshape(-1), np.cumsum(sizes)[:-1])
