"""The banks of a whole tree as one table a layer, made once a step and not in every layer.

A layer multiplies with two matrices, those of all types side by side (`low_rank.Table`). What is
made of the banks in a layer is made, and differentiated, in each layer anew. Here it is made for
the tree, in one of two ways, or three:

    {..., "flix": {"task": {"a", "b"}, "language": {"a", "b"}}}
        of_all ->   {..., "flix": {"(all)": {"a", "b"}}}      the columns of every value
        of_rows ->  {..., "flix": {"(rows)": {"a", "b"}}}     those of the values of each example
                    {..., "flix": {"(merged)": {"a", "b"}}}   the same, for kernels that hold the
                                                              update (`merged`)

`LowRankDelta` takes such a tree in place of banks. Joined with `as_copies` of it in the dtype of
the products, it computes with the copies; the gradient is that of the tables.

Layers that read the same input (`siblings`) have their `a` side by side, as
one leaf of the first (`modules.common_leaf`): one product makes the narrow activations of all.

`of_all` costs what the number of values asks for, and `of_rows` what the examples do, but for the
sum of their gradients by value, which is as large as the banks. Layers of a network may have tables
of several kinds, or none (`apart`).
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from flix_jax.adapters import low_rank, tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import Match
from flix_jax.adapters.modules import ALL, COPIES, MERGED, ROWS, common_leaf

#: Logical names of the axes of tables: columns of every value, or examples and their columns.
COLUMNS, EXAMPLES, OWN_COLUMNS = "columns", "examples", "own_columns"
_FEATURES, _RANK = "features", "rank"

#: What a run may say of tables: what is fastest where it runs and rounds no more than banks would,
#: what is fastest, none, or one of the kinds.
AUTO, FASTEST, NONE = "auto", "fastest", "banks"
KINDS = {"all": ALL, "rows": ROWS, "merged": MERGED}

_LANES = 128  # columns that a TPU multiplies with at the price of one
_SMALL = 2**26  # parameters: of mT5-base with 30 features of rank 4 there are 0.76 of them
#: Positions for each of a kernel's inputs and outputs, (1 / d_in + 1 / d_out) times their number,
#: from which on a TPU a kernel with the update is worth making for them.
_WORTH_MERGING_ALONE, _WORTH_MERGING = 0.2, 1.0

Axes = tuple[str | None, ...]
Siblings = Sequence[Sequence[str]]
#: (an array, the names of its axes, those of a bank) -> the array, where it is to lie.
Place = Callable[[Array, Axes, Axes], Array]


def choose(
    layer: Match,
    space: FeatureSpace,
    examples: int,
    platform: str,
    *,
    parameters: int,
    rows: int = 1,
    mergeable: bool = False,
) -> str | None:
    """The kind of table of a layer that a training step is fastest with; None is with none.

    On a TPU a product takes as long with 8 columns as with 128, and what is made of banks in every
    layer costs more than the products. Kernels that hold the update are the fastest, where making
    them costs less than they save. Of the other two tables the smaller one is chosen; but that of
    every value also where it is larger, if its columns fill no more than the lanes: its products
    are not example by example. Devices then exchange the gradients of every value, so only of
    banks that are small. On a CPU the products of a row's own matrices, gathered in the layer, are
    the fastest; but where all rows of a device have the same features, kernels that hold the update
    are.

    Args:
      layer: what is adapted.
      space: the features.
      examples: that a device has at a time, those of equal features by `rows` as one.
      platform: of the devices, as JAX names it.
      parameters: of all banks.
      rows: how many rows are known to have equal features.
      mergeable: whether kernels can, and may, hold the update.
    """
    if platform != "tpu":
        return MERGED if mergeable and rows > 1 and examples == 1 else None
    every = sum(t.num_values * t.max_rank for t in space.types)
    own = sum(t.slots * t.max_rank for t in space.types)
    positions = layer.positions * rows * (1 / layer.d_in + 1 / layer.d_out)
    alone = examples == 1
    if mergeable and positions >= (_WORTH_MERGING_ALONE if alone else _WORTH_MERGING):
        return MERGED
    at_once = examples > 1 and every <= _LANES and parameters <= _SMALL
    return ALL if at_once or every <= own * examples else ROWS


def apart(leaves: tree.Tree, kinds: Mapping[str, str]) -> dict[str | None, dict[str, Any]]:
    """The adapters' tree by the kinds of its layers' tables; None is that of layers without one.

    Args:
      leaves: the tree, of whatever leaves.
      kinds: path of a layer -> kind.
    """
    found: dict[str | None, list[tuple[tree.Path, Any]]] = {}
    for path, leaf in tree.named_leaves(leaves):
        found.setdefault(kinds.get(tree.layer_of(path)), []).append((path, leaf))
    return {kind: tree.from_named(part) for kind, part in found.items()}


def of_all(
    banks: tree.Tree, axes: tree.Tree, space: FeatureSpace, siblings: Siblings = ()
) -> dict[str, Any]:
    """The columns of every value; differentiable.

    Args:
      banks: the adapters' tree.
      axes: its logical names (`tree.adapter_logical_axes`).
      space: whose types are side by side, in order.
      siblings: paths of layers that read the same input, group by group.

    Returns:
      A tree with `<dense>/flix/(all)/a` [columns, in] and `b` [columns, out]; a stack of layers is
      on the axis on which it was.
    """
    made = []
    for path, sides in _layers(banks, axes, space, ALL, siblings):
        at = sides[0][2].index(_FEATURES)
        columns = [_side_by_side(leaf, at, names.index(_RANK)) for _, leaf, names in sides]
        made.append((path, jnp.concatenate(columns, axis=at)))
    return tree.from_named(made)


def of_rows(
    banks: tree.Tree,
    axes: tree.Tree,
    space: FeatureSpace,
    ids: Int[Array, "batch *examples slots"],
    place: Place = lambda x, axes, bank: x,
    siblings: Siblings = (),
    name: str = ROWS,
    dtype: DTypeLike = "float32",
) -> dict[str, Any]:
    """The columns of the values that each example has; differentiable.

    Args:
      banks, axes, space, siblings: as in `of_all`.
      ids: of the examples' values, -1 where absent (then what stands there is of any value, or
        zero); of packed rows those of all their examples.
      place: brings what is of examples (`EXAMPLES`) beside a bank: ids, and what is taken of it for
        a slot. The gradient of that is brought there, too, before it is added up by value.
      name: ROWS or MERGED.
      dtype: of the products. For float32 what is taken is exact; for bfloat16 a TPU may round it
        to that, which takes less time.

    Returns:
      A tree with `<dense>/flix/(rows)/a` [batch, columns, in] and `b` [batch, columns, out], the
      columns as many as the ranks of all slots, of packed rows example by example within a type;
      a stack of layers is on the axis on which it was.
    """
    made = []
    for path, sides in _layers(banks, axes, space, name, siblings):
        taken = []
        for t, leaf, names in sides:
            take = _Take(place, names, dtype)
            slots = space.slots(t)
            for of in ids[..., slots.start : slots.stop].reshape(len(ids), -1).T:
                rows = _taken(take, leaf, place(of, (EXAMPLES,), names))
                taken.append(jnp.moveaxis(rows, names.index(_RANK), -2))
        made.append((path, jnp.concatenate(taken, axis=-2)))
    return tree.from_named(made)


class _Take(NamedTuple):
    """How matrices are taken: who brings them beside the bank, its axes, of which dtype."""

    place: Place
    bank: Axes
    dtype: DTypeLike

    @property
    def axis(self) -> int:
        return self.bank.index(_FEATURES)

    def placed(self, taken: Array) -> Array:
        axes = tuple(EXAMPLES if name == _FEATURES else name for name in self.bank)
        return self.place(taken, axes, self.bank)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taken(how: _Take, bank: Array, ids: Array) -> Array:
    """The matrices of the ids, in place of all matrices.

    On a TPU by a product with the one-hot ids, where the values are no more than rows or lanes: it
    reads a bank whose widths are split where it lies, while of a gather the compiler brings a bank
    of few values to all devices first. A value that is not finite is then in rows of others, too.
    """

    def gathered(bank: Array, ids: Array) -> Array:
        return jnp.take(bank, ids, axis=how.axis, mode="clip")

    few = bank.shape[how.axis] <= max(len(ids), _LANES)
    by_product = functools.partial(_by_product, how) if few else gathered
    return how.placed(jax.lax.platform_dependent(bank, ids, tpu=by_product, default=gathered))


def _by_product(how: _Take, bank: Array, ids: Array) -> Array:
    one_hot = jax.nn.one_hot(ids, bank.shape[how.axis], dtype=bank.dtype)
    precision = "default" if jnp.dtype(how.dtype) == jnp.bfloat16 else "highest"
    rows = jnp.tensordot(one_hot, bank, axes=((1,), (how.axis,)), precision=precision)
    return jnp.moveaxis(rows, 0, how.axis)


def _taken_forward(how, bank, ids):
    return _taken(how, bank, ids), (jnp.zeros((bank.shape[how.axis], 0), bank.dtype), ids)


def _taken_backward(how, saved, g):
    values, ids = saved
    total = low_rank.sum_by_value(jnp.moveaxis(how.placed(g), how.axis, 0), ids, values.shape[0])
    return jnp.moveaxis(total, 0, how.axis).astype(values.dtype), None


_taken.defvjp(_taken_forward, _taken_backward)


def logical_axes(
    axes: tree.Tree, space: FeatureSpace, name: str, siblings: Siblings = ()
) -> dict[str, Any]:
    """The logical names of what `of_all` (`name` is ALL) or `of_rows` gives."""
    made = []
    for path, sides in _layers(axes, axes, space, name, siblings):
        names = [n for n in sides[0][2] if n != _RANK]
        at = names.index(_FEATURES)
        names[at] = COLUMNS if name == ALL else EXAMPLES
        if name != ALL:
            names.insert(len(names) - 1, OWN_COLUMNS)
        made.append((path, tuple(names)))
    return tree.from_named(made)


def as_copies(tables: tree.Tree) -> dict[str, Any]:
    """The same leaves as what products are computed with, to be joined with those they are of."""
    return tree.from_named(
        [((*path[:-2], COPIES, path[-1]), leaf) for path, leaf in tree.named_leaves(tables)]
    )


def _layers(
    banks: tree.Tree, axes: tree.Tree, space: FeatureSpace, name: str, siblings: Siblings
) -> Iterator[tuple[tree.Path, list[tuple[FeatureType, Any, Axes]]]]:
    """(path of a leaf of a table called `name`, (type, leaf, axes) of the banks that go into it).

    The banks are those of all types, in the order of the siblings and for each in that of the
    types.
    """
    names = dict(tree.named_leaves(axes))
    leaves = dict(tree.named_leaves(banks))
    paths = [[tuple(path.split("/")) for path in group] for group in siblings]
    groups = {layer: group for group in paths for layer in group}
    for *layer, own, kind, side in leaves:
        dense = tuple(layer)
        group = groups.get(dense, [dense]) if side == "a" else [dense]
        if kind != space.types[0].name or dense != group[0]:
            continue
        leaf = common_leaf([one[-1] for one in group]) if len(group) > 1 else side
        of = [((*one, own, t.name, side), t) for one in group for t in space.types]
        yield (*dense, own, name, leaf), [(t, leaves[p], names[p]) for p, t in of]


def _side_by_side(bank: Array, at: int, rank: int) -> Array:
    """[…, features, …, rank, …] -> […, features × rank, …, …]."""
    moved = jnp.moveaxis(bank, rank, at + 1)
    return moved.reshape(*moved.shape[:at], -1, *moved.shape[at + 2 :])
