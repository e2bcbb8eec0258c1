"""The order of the training examples: a pure function of (seed, global example index).

No state is carried from one example to the next. Which cell the example at global position g
comes from, and which of that cell's examples it is, follow from the seed and g alone. A run that is
stopped and resumed, on as many processes or on others, therefore goes on with exactly the sequence
that it would have seen.

Cells. Positions fall into blocks of BLOCK. In block b, cell c is drawn `ceil(R_c - u_b) -
ceil(R_(c-1) - u_b)` times, where R_c is the cumulated share of the cells up to c, times BLOCK, and
u_b in [0, 1) is a golden-ratio sequence (systematic sampling). So every block holds each cell
within one draw of its exact share, and what is left evens out over the blocks. The draws of a
block are then shuffled. All of it is integer arithmetic on shares rounded to 2**-32, the same on
every machine.

Examples. The k-th draw of a cell of n examples is example `permutation[k % n]` of epoch `k // n`,
each epoch with its own permutation: every epoch visits every example once.

Random words come from Philox, a counter-based generator, keyed by the seed and the purpose. NumPy
guarantees the stream of raw words across versions (not that of shuffles): permutations sort them.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

VERSION = 1  # of the order; changes when the same seed gives another sequence
BLOCK = 1024  # positions
_ONE = 1 << 32  # shares are integers in units of 2**-32
_STRIDE = 256  # blocks between two stored counts
_GOLDEN = 2654435769  # 2**32 / golden ratio, odd: u_b visits all of [0, 2**32) evenly


class Drawn(NamedTuple):
    """An example: the number of its cell in the order's names, its own there, its position."""

    cell: int
    example: int
    position: int


def philox(*key: Hashable) -> np.random.Philox:
    """A counter-based bit generator of its own for every `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def permutation(size: int, *key: Hashable) -> Int[np.ndarray, " size"]:
    """A uniformly random permutation of range(size), determined by `key`."""
    return np.argsort(philox(*key).random_raw(size), kind="stable")


def integer_shares(rates: Sequence[float]) -> list[int]:
    """`rates`, which sum to 1, as integers above zero that sum to 2**32 (largest remainders)."""
    exact = [rate * _ONE for rate in rates]
    shares = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(rates)), key=lambda i: shares[i] - exact[i])
    for i in range(_ONE - sum(shares)):
        shares[by_remainder[i % len(shares)]] += 1
    shares[int(np.argmax(shares))] -= sum(shares) - _ONE
    return shares


class ExampleOrder:
    """Maps global positions to (cell, example), see the module's docstring.

    Args:
      sizes: number of examples of each cell, by name.
      rates: share of each cell, by name; they sum to 1.
      seed: of the whole order.
      together: how many consecutive positions are of one cell, and are drawn as one: positions
        above are then those of so many examples.
    """

    def __init__(
        self, sizes: Mapping[str, int], rates: Mapping[str, float], seed: int, together: int = 1
    ):
        if together < 1:
            raise ValueError(f"together={together}: expected at least 1")
        if set(sizes) != set(rates):
            different = ", ".join(sorted(set(sizes) ^ set(rates)))
            raise ValueError(f"cells with either a size or a rate, but not both: {different}")
        if not sizes:
            raise ValueError("the mixture is empty: no cell to draw from")
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"cell {name}: {size} examples, expected at least 1")
            if not rates[name] > 0:
                raise ValueError(f"cell {name}: rate {rates[name]}, expected above zero")
        if abs(sum(rates.values()) - 1) > 1e-6:
            raise ValueError(f"the rates sum to {sum(rates.values())}, expected 1")
        # Sorted, so that the order in which the cells were named does not matter.
        self.names = tuple(sorted(sizes))
        self.sizes = tuple(int(sizes[name]) for name in self.names)
        self.shares = tuple(integer_shares([rates[name] for name in self.names]))
        self.seed = int(seed)
        self.together = int(together)
        edges = np.cumsum((0, *self.shares), dtype=np.int64)
        self._edges = edges * BLOCK
        self._offset = int(philox(self.seed, "offset").random_raw() % _ONE)
        # Draws of every cell before each _STRIDE-th block.
        self._drawn = [np.zeros(len(self.names), np.int64)]
        self._blocks: Recent = Recent(4)
        self._permutations: Recent = Recent(2 * len(self.names))

    def cells_at(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of `count` positions from `start`: index into `names`, and number of that cell's draw."""
        if self.together == 1:
            return self._drawn_at(start, count)
        first, last = start // self.together, -(-(start + count) // self.together)
        cells, draws = self._drawn_at(first, last - first)
        each = np.arange(self.together)
        draws = (draws[:, None] * self.together + each).reshape(-1)
        own = slice(start - first * self.together, start - first * self.together + count)
        return np.repeat(cells, self.together)[own], draws[own]

    def _drawn_at(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`cells_at` of positions that are drawn one by one."""
        cells, draws = [], []
        position, limit = start, start + count
        while position < limit:
            block, first = divmod(position, BLOCK)
            last = min(BLOCK, first + limit - position)
            block_cells, block_draws = self._block(block)
            cells.append(block_cells[first:last])
            draws.append(block_draws[first:last])
            position += last - first
        return np.concatenate(cells), np.concatenate(draws)

    def example(self, cell: int, draw: int) -> int:
        """Index of the example that the `draw`-th draw of the cell `names[cell]` gives."""
        size = self.sizes[cell]
        epoch, index = divmod(int(draw), size)
        key = (self.seed, "epoch", self.names[cell], epoch)
        order = self._permutations.get(key, lambda: permutation(size, *key))
        return int(order[index])

    def examples(self, cells: np.ndarray, draws: np.ndarray) -> Int[np.ndarray, " draws"]:
        """`example` of many draws at once, each of its cell."""
        both = zip(cells.tolist(), draws.tolist(), strict=True)
        return np.array([self.example(cell, draw) for cell, draw in both], np.int64)

    def _counts(self, first: int, limit: int) -> np.ndarray:
        """Draws of every cell in the blocks first to limit: int64 [blocks, cells]."""
        blocks = np.arange(first, limit, dtype=np.uint64)
        shift = (np.uint64(self._offset) + blocks * np.uint64(_GOLDEN)) % np.uint64(_ONE)
        edges = -((shift.astype(np.int64)[:, None] - self._edges[None, :]) // _ONE)  # ceiling
        return np.diff(edges, axis=1)

    def _drawn_before(self, block: int) -> np.ndarray:
        stride, rest = divmod(block, _STRIDE)
        while len(self._drawn) <= stride:
            first = (len(self._drawn) - 1) * _STRIDE
            counts = self._counts(first, first + _STRIDE)
            self._drawn.append(self._drawn[-1] + counts.sum(axis=0))
        return self._drawn[stride] + self._counts(block - rest, block).sum(axis=0)

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        return self._blocks.get(block, lambda: self._make_block(block))

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        counts = self._counts(block, block + 1)[0]
        in_order = np.repeat(np.arange(len(counts)), counts)
        cells = in_order[permutation(BLOCK, self.seed, "block", block)]
        # The draws of a cell are numbered by position: `stable` keeps the positions in order.
        by_cell = np.argsort(cells, kind="stable")
        rank = np.empty(BLOCK, np.int64)
        rank[by_cell] = np.arange(BLOCK) - (np.cumsum(counts) - counts)[in_order]
        return cells, self._drawn_before(block)[cells] + rank


class Recent:
    """The `limit` values that were used last."""

    def __init__(self, limit: int):
        self._limit = limit
        self._values: OrderedDict = OrderedDict()

    def get(self, key, make):
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self._limit:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]
