"""Feature values after training: made, appended, removed and merged, and the size of their updates.

The value is the first axis of every bank, so that all of this is done to rows of arrays:

    <dense>/flix/<type>/a   [values, d_in, rank],   of scanned layers [values, stack, d_in, rank]
    <dense>/flix/<type>/b   [values, rank, d_out],  of scanned layers [values, stack, rank, d_out]

Nothing here changes its arguments, and values that are not asked for keep their bits and, but for a
removal, their ids.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import CHILD
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.adapters.tree import from_named, named_leaves

Tree = Mapping[str, Any]
Path = tuple[str, ...]
#: {path of the dense layer: (a [d_in, rank], b [rank, d_out])} of one value, a stack before these.
Rows = Mapping[Path, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Part:
    """Adapters that are to be merged.

    Attributes:
      name: of them, for messages.
      space: their features.
      banks: their parameters, a tree of NumPy arrays.
    """

    name: str
    space: FeatureSpace
    banks: Tree


def rows(banks: Tree, of: FeatureType, value: str) -> Rows:
    """The matrices of a value, within its rank; ValueError where the type has no such value."""
    place = _id(of, value)
    rank = of.value_ranks[place]
    return {
        path: (a[place, ..., :rank], b[place, ..., :rank, :])
        for path, (a, b) in _pairs(banks, of.name).items()
    }


def fresh(banks: Tree, of: FeatureType, value: str, rank: int, seed: int = 0) -> Rows:
    """Matrices whose update is zero and which can be trained: a ~ N(0, 1 / d_in) and b = 0.

    What is drawn follows from the seed, the layer, the type and the value.
    """
    found = {}
    for path, (a, b) in _pairs(banks, of.name).items():
        name = f"{'/'.join(path)}:{of.name}={value}"
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        d_in = a.shape[-2]
        normal = jax.random.normal(key, (*a.shape[1:-1], rank), a.dtype) * d_in**-0.5
        shape = (*b.shape[1:-2], rank, b.shape[-1])
        found[path] = np.asarray(normal, a.dtype), np.zeros(shape, b.dtype)
    return found


def mean(
    banks: Tree, of: FeatureType, values: Sequence[str], start: Rows, alpha: float | None
) -> tuple[Rows, float]:
    """The best approximation of the mean of some values' updates, in the Frobenius norm.

    (1/n) Σ s_f A_f B_f ≈ s A B is found by the singular value decomposition of each layer's mean,
    truncated to the rank; the matrices themselves are never formed. A and B share √(S / s).

    Args:
      banks: the parameters.
      of: the type.
      values: whose updates the mean is of.
      start: `fresh` matrices of the new value, which say its rank; columns that the mean does not
        need stay what they are there, so that they can be trained.
      alpha: of the scales s = alpha / rank; None is s = 1.

    Returns:
      The matrices, and the share of the mean's norm that they keep, over all layers.

    Raises:
      ValueError: no values, or one that the type has not.
    """
    if not values:
        raise ValueError(f"the mean of no value of {of.name}, expected at least one")
    found: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
    kept = total = 0.0
    of_values = [rows(banks, of, value) for value in values]
    for path, (start_a, start_b) in start.items():
        firsts, seconds = zip(*(of_value[path] for of_value in of_values), strict=True)
        weights = [_scale(alpha, a.shape[-1]) / len(values) for a in firsts]
        q, r = np.linalg.qr(
            np.concatenate([np.float64(w) * a for w, a in zip(weights, firsts, strict=True)], -1)
        )
        p, s = np.linalg.qr(_transposed(np.concatenate(seconds, -2).astype(np.float64)))
        u, sizes, v = np.linalg.svd(r @ _transposed(s), full_matrices=False)
        rank = start_a.shape[-1]
        most = min(rank, sizes.shape[-1])
        total, kept = total + np.sum(sizes**2), kept + np.sum(sizes[..., :most] ** 2)
        root = np.sqrt(sizes[..., :most] / _scale(alpha, rank))
        a = (q @ u[..., :most]) * root[..., None, :]
        b = root[..., :, None] * (v[..., :most, :] @ _transposed(p))
        needed = sizes[..., :most] > sizes[..., :1] * sizes.shape[-1] * np.finfo(np.float64).eps
        new_a, new_b = start_a.copy(), start_b.copy()
        new_a[..., :most] = np.where(needed[..., None, :], a, start_a[..., :most])
        new_b[..., :most, :] = np.where(needed[..., :, None], b, start_b[..., :most, :])
        found[path] = new_a, new_b
    return found, float(np.sqrt(kept / total)) if total else 1.0


def append(
    space: FeatureSpace,
    banks: Tree,
    type_name: str,
    value: str,
    new: Rows,
    *,
    dropout: float | None = None,
) -> tuple[FeatureSpace, dict[str, Any]]:
    """Gives a type one more value, the last one; banks are widened where its rank asks for it.

    Args:
      space, banks: the features and their parameters.
      type_name, value: which value of which type.
      new: its matrices, of one rank in all layers.
      dropout: its feature dropout; None is that of the type.

    Raises:
      ValueError: no such type, a value that it has already, or matrices that do not fit.
    """
    of = space.type(type_name)
    if value in of.known_values:
        raise ValueError(f"{type_name}={value} is there already; remove it first")
    pairs = _pairs(banks, type_name)
    ranks = {a.shape[-1] for a, _ in new.values()}
    if new.keys() != pairs.keys() or len(ranks) != 1:
        raise ValueError(
            f"{type_name}={value}: matrices of {len(new)} layers and ranks {sorted(ranks)}, "
            f"expected those of {len(pairs)} layers and of one rank"
        )
    (rank,) = ranks
    changed = _with_values(
        of,
        (*of.known_values, value),
        {**of.ranks, value: rank},
        of.dropouts if dropout is None else {**of.dropouts, value: dropout},
    )
    width = changed.max_rank
    found = {}
    for path, (a, b) in pairs.items():
        new_a, new_b = new[path]
        if new_a.shape[:-1] != a.shape[1:-1] or new_b.shape[-1] != b.shape[-1]:
            raise ValueError(
                f"{'/'.join(path)}: matrices {new_a.shape} and {new_b.shape} beside banks "
                f"{a.shape} and {b.shape}"
            )
        found[path] = (
            np.concatenate([_wide(a, -1, width), _wide(new_a, -1, width)[None].astype(a.dtype)]),
            np.concatenate([_wide(b, -2, width), _wide(new_b, -2, width)[None].astype(b.dtype)]),
        )
    return _replaced(space, banks, changed, found)


def remove(
    space: FeatureSpace, banks: Tree, type_name: str, value: str
) -> tuple[FeatureSpace, dict[str, Any]]:
    """Takes a value from a type; those behind it move up, and banks are as wide as they must be.

    Raises:
      ValueError: no such type or value, or the only one that the type has.
    """
    of = space.type(type_name)
    place = _id(of, value)
    left = tuple(v for v in of.known_values if v != value)
    if not left:
        raise ValueError(f"{type_name}={value} is the only {type_name}, expected another to stay")
    changed = _with_values(of, left, of.ranks, of.dropouts)
    width = changed.max_rank
    found = {
        path: (
            np.delete(_wide(a, -1, width), place, axis=0),
            np.delete(_wide(b, -2, width), place, axis=0),
        )
        for path, (a, b) in _pairs(banks, type_name).items()
    }
    return _replaced(space, banks, changed, found)


def merge(parts: Sequence[Part]) -> tuple[FeatureSpace, dict[str, Any]]:
    """Unites the values of adapters of one network, type by type.

    Order, default rank and dropout, and everything else that a type says are the first's. A value
    that several have must be the same in all of them, bit by bit, and is then one.

    Raises:
      ValueError: types that only some have or that combine values otherwise, other layers, and a
        value that is not the same everywhere.
    """
    first, *others = parts
    space, banks = first.space, dict(first.banks)
    for other in others:
        for name in (*space.names, *other.space.names):
            if name not in space.names or name not in other.space.names:
                has, lacks = (first, other) if name in space.names else (other, first)
                raise ValueError(
                    f"{has.name} has the feature type {name!r}, and {lacks.name} has not"
                )
        for of in space.types:
            theirs = other.space.type(of.name)
            if of.combine != theirs.combine:
                raise ValueError(
                    f"feature type {of.name!r}: combine is {of.combine!r} in {first.name} and "
                    f"{theirs.combine!r} in {other.name}"
                )
            if _shapes(banks, of.name) != _shapes(other.banks, of.name):
                raise ValueError(
                    f"feature type {of.name!r}: {first.name} and {other.name} adapt other layers"
                )
            for value, dropout in zip(theirs.known_values, theirs.value_dropouts, strict=True):
                new = rows(other.banks, theirs, value)
                if value not in of.known_values:
                    space, banks = append(space, banks, of.name, value, new, dropout=dropout)
                elif not _equal(rows(banks, of, value), new):
                    before = next(
                        p.name for p in parts if value in p.space.type(of.name).known_values
                    )
                    raise ValueError(
                        f"{of.name}={value} of {other.name} is not that of {before}; remove it "
                        "from one of them first (flix features remove)"
                    )
    return space, banks


def norms(space: FeatureSpace, banks: Tree, alpha: float | None) -> dict[str, dict[str, float]]:
    """type -> value -> the Frobenius norm of its update s A B over all layers.

    ‖A B‖² is the sum of the elements of AᵀA times those of BBᵀ: the products are not formed.
    """
    found: dict[str, dict[str, float]] = {}
    for of in space.types:
        found[of.name] = {}
        for value, rank in zip(of.known_values, of.value_ranks, strict=True):
            total = 0.0
            for a, b in rows(banks, of, value).values():
                a, b = a.astype(np.float64), b.astype(np.float64)
                total += float(np.sum((_transposed(a) @ a) * (b @ _transposed(b))))
            found[of.name][value] = _scale(alpha, rank) * float(np.sqrt(max(total, 0.0)))
    return found


def _id(of: FeatureType, value: str) -> int:
    values = of.known_values
    if value not in values:
        raise ValueError(f"{value!r} is no {of.name}; {did_you_mean(value, values)}")
    return values.index(value)


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _transposed(matrices: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrices, -1, -2)


def _pairs(banks: Tree, type_name: str) -> dict[Path, tuple[np.ndarray, np.ndarray]]:
    """Path of every adapted dense layer -> (a, b) of a type."""
    halves: dict[Path, dict[str, np.ndarray]] = {}
    for path, leaf in named_leaves(banks):
        if path[-3:-1] == (CHILD, type_name):
            halves.setdefault(path[:-3], {})[path[-1]] = leaf
    return {path: (pair["a"], pair["b"]) for path, pair in halves.items()}


def _shapes(banks: Tree, type_name: str) -> dict[Path, tuple[tuple[int, ...], int]]:
    """What banks of one network have in common, whatever their values and ranks are."""
    pairs = _pairs(banks, type_name)
    return {path: (a.shape[1:-1], b.shape[-1]) for path, (a, b) in pairs.items()}


def _equal(one: Rows, other: Rows) -> bool:
    """Whether two values have the same matrices, bit by bit."""
    return all(
        a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for path, pair in one.items()
        for a, b in zip(pair, other[path], strict=True)
    )


def _wide(array: np.ndarray, axis: int, width: int) -> np.ndarray:
    """Of this width on the last axis or the one before it: padded with zeros, or cut."""
    have = array.shape[axis]
    if have < width:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, width - have)
        return np.pad(array, widths)
    return array[..., :width] if axis == -1 else array[..., :width, :]


def _with_values(
    of: FeatureType,
    values: tuple[str, ...],
    ranks: Mapping[str, int],
    dropouts: Mapping[str, float],
) -> FeatureType:
    """The type with other values; of ranks and dropouts those of its values that are exceptions."""
    return dataclasses.replace(
        of,
        values=values,
        ranks={v: r for v, r in ranks.items() if v in values and r != of.rank},
        dropouts={v: d for v, d in dropouts.items() if v in values and d != of.dropout},
    )


def _replaced(
    space: FeatureSpace,
    banks: Tree,
    changed: FeatureType,
    pairs: Mapping[Path, tuple[np.ndarray, np.ndarray]],
) -> tuple[FeatureSpace, dict[str, Any]]:
    """The space with one type changed, and the banks with that type's."""
    types = tuple(changed if t.name == changed.name else t for t in space.types)
    leaves = []
    for path, leaf in named_leaves(banks):
        if path[-3:-1] == (CHILD, changed.name):
            leaf = pairs[path[:-3]]["ab".index(path[-1])]
        leaves.append((path, leaf))
    return dataclasses.replace(space, types=types), from_named(leaves)
