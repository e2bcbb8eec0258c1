"""Arrays that are somewhere else: read in parts, and rearranged without being read.

A checkpoint is a mapping of names to `Leaf`s. What one format keeps transposed, stacked or reshaped
against another is a `Leaf` made of `Leaf`s, and only what a device needs of it is ever in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flix_jax.models import int8

Index = tuple[slice, ...]
_ONE = slice(0, 1)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array to be read.

    Attributes:
      shape, dtype: of the array; any of NumPy's and ml_dtypes' (bfloat16).
      fetch: slices, one per axis, with their bounds and without steps -> the array's part.
      source: where it is, for messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[Index], np.ndarray]
    source: str = ""

    @classmethod
    def of(cls, array: Any, source: str = "") -> Leaf:
        """An array that is here, on the host or on devices."""
        return cls(
            tuple(array.shape),
            np.dtype(array.dtype),
            lambda index: np.asarray(jax.device_get(array[index])),
            source,
        )

    def read(self, index: Index | None = None) -> np.ndarray:
        """The array, or its part; slices may leave out their bounds."""
        index = (slice(None),) * len(self.shape) if index is None else index
        bounds = (s.indices(size)[:2] for s, size in zip(index, self.shape, strict=True))
        return self.fetch(tuple(slice(*pair) for pair in bounds))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def transposed(self) -> Leaf:
        """A matrix with its axes exchanged."""
        if len(self.shape) != 2:
            raise ValueError(f"{self.source}: shape {self.shape}, expected a matrix")
        return dataclasses.replace(
            self, shape=self.shape[::-1], fetch=lambda index: self.fetch(index[::-1]).T
        )

    def scaled(self, factor: float) -> Leaf:
        """Times a number, in its own dtype."""
        if factor == 1.0:
            return self
        return dataclasses.replace(
            self, fetch=lambda index: (self.fetch(index) * factor).astype(self.dtype)
        )

    def quantised(self, axis: int) -> tuple[Leaf, Leaf]:
        """(int8 values, float32 scales), which share one along an axis (see `models.int8`).

        A part's scales need the whole axis: it is read for them, a layer of three axes at a time.
        """
        known: dict[str, np.ndarray] = {}

        def scales(index: Index) -> np.ndarray:
            if repr(index) not in known:
                whole = (*index[:axis], slice(0, self.shape[axis]), *index[axis + 1 :])
                parts = [int8.scales(self.fetch(part), axis) for part in _by_layer(whole)]
                known[repr(index)] = np.concatenate(parts, axis=1)
            return known[repr(index)]

        def values(index: Index) -> np.ndarray:
            parts = [
                int8.integers(self.fetch(part), scales((*part[:axis], _ONE, *part[axis + 1 :])))
                for part in _by_layer(index)
            ]
            return np.concatenate(parts, axis=1)

        of_scales = (*self.shape[:axis], 1, *self.shape[axis + 1 :])
        return (
            dataclasses.replace(self, dtype=np.dtype(np.int8), fetch=values),
            dataclasses.replace(self, shape=of_scales, dtype=np.dtype(np.float32), fetch=scales),
        )

    def matrix(self, rows: int) -> Leaf:
        """[rows, columns] of more axes, the first of which make the rows; a matrix is itself.

        Raises:
          ValueError: no number of the first axes makes up the rows.
        """
        at = next((i for i in range(1, len(self.shape)) if math.prod(self.shape[:i]) == rows), 0)
        if not at:
            raise ValueError(f"{self.source}: shape {self.shape}, expected {rows} rows")
        if len(self.shape) == 2:
            return self
        columns = math.prod(self.shape[at:])

        def fetch(index: Index) -> np.ndarray:
            whole = [slice(0, size) for size in self.shape]
            if at == 1:  # rows are an axis of their own: read no others
                whole[0] = index[0]
                return self.fetch(tuple(whole)).reshape(-1, columns)[:, index[1]]
            if at == len(self.shape) - 1:
                whole[-1] = index[1]
                return self.fetch(tuple(whole)).reshape(rows, -1)[index[0]]
            return self.fetch(tuple(whole)).reshape(rows, columns)[index]

        return dataclasses.replace(self, shape=(rows, columns), fetch=fetch)

    def reshaped(self, shape: Sequence[int]) -> Leaf:
        """The same elements in another shape; read whole, whatever part is wanted."""
        shape = tuple(shape)
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{self.source}: shape {self.shape} does not make {shape}")
        return dataclasses.replace(
            self, shape=shape, fetch=lambda index: self.read().reshape(shape)[index]
        )

    def part(self, axis: int, place: int) -> Leaf:
        """What stands at a place of an axis, without the axis."""
        shape = self.shape[:axis] + self.shape[axis + 1 :]

        def fetch(index: Index) -> np.ndarray:
            at = (*index[:axis], slice(place, place + 1), *index[axis:])
            return self.fetch(at).squeeze(axis)

        return dataclasses.replace(
            self, shape=shape, fetch=fetch, source=f"{self.source}, layer {place}"
        )


def _by_layer(index: Index) -> Iterator[Index]:
    """The parts of a stack of matrices, one layer each; of a matrix itself."""
    if len(index) < 3:
        yield index
        return
    for place in range(index[1].start, index[1].stop):
        yield (index[0], slice(place, place + 1), index[2])


def stacked(leaves: Sequence[Leaf], axis: int) -> Leaf:
    """Arrays of one shape as one, along a new axis.

    Raises:
      ValueError: shapes differ.
    """
    first = leaves[0]
    for leaf in leaves:
        if leaf.shape != first.shape:
            raise ValueError(
                f"{leaf.source}: shape {leaf.shape}, but {first.source}: {first.shape}"
            )

    def fetch(index: Index) -> np.ndarray:
        rest = (*index[:axis], *index[axis + 1 :])
        chosen = leaves[index[axis]]
        shape = [s.stop - s.start for s in index]
        found = np.empty(shape, first.dtype)
        whole: tuple[Any, ...] = (slice(None),) * axis
        for place, leaf in enumerate(chosen):  # one at a time: no second copy of all
            found[whole + (place,)] = leaf.fetch(rest)
        return found

    shape = (*first.shape[:axis], len(leaves), *first.shape[axis:])
    return Leaf(shape, first.dtype, fetch, first.source)


def load(leaves: Mapping[str, Leaf], templates: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Arrays on devices, each of the sharding and dtype of its template; read part by part.

    Args:
      leaves: by name.
      templates: by name, with shardings; of the leaves' shapes.
    """
    return {name: _load(leaves[name], template) for name, template in templates.items()}


def _load(leaf: Leaf, template: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.shape != tuple(template.shape):
        raise ValueError(f"{leaf.source}: shape {leaf.shape}, expected {tuple(template.shape)}")
    last: tuple[Any, np.ndarray] | None = None

    def read(index: Index | None) -> np.ndarray:
        nonlocal last
        key = repr(index)
        if last is None or last[0] != key:  # devices that replicate ask for the same part in turn
            last = None
            last = key, leaf.read(index).astype(template.dtype, copy=False)
        return last[1]

    return jax.make_array_from_callback(tuple(template.shape), template.sharding, read)
