"""The low-rank delta of a batch in which every example has its own features.

    delta(x)[n] = Σ_{f ∈ F(n)} w_nf · s_f · x[n] A_f B_f          (arXiv 2402.17934, Eq. 2)

with s_f = alpha / rank_f (or 1) and w_nf the weight of feature f in example n. The matrices of an
example's features are gathered and laid side by side along the rank, so that their sum is two
batched products however many features there are:

    A[n] = [A_f1 | A_f2 | …]  [d_in, R]      B[n] = [B_f1 ; B_f2 ; …]  [R, d_out]
    delta(x)[n] = ((x[n] A[n]) · c[n]) B[n],   c[n, column of f] = w_nf · s_f

The derivative of the gather would be a scatter, which is slow; the gradients of the banks are
formed by a product with the one-hot ids instead. A type of one value (LoRA) needs no gather: it is
a plain low-rank product whose activation is weighted per example.

Of packed rows whose examples have features of their own, the matrices of all of a row's examples
stand side by side, and c says at each position which of them are those of its example:

    delta(x)[n, l] = ((x[n, l] A[n]) · c[n, l]) B[n]
    c[n, l, column of f in example e] = w_ef · s_f if l belongs to e, else 0
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flix_jax.adapters import coefficients
from flix_jax.adapters.activation import ActiveFeatures, check_shape
from flix_jax.adapters.features import FeatureSpace, FeatureType

Bank = tuple[Array, Array]
Copies = tuple[Array | None, Array] | None


class Table(NamedTuple):
    """The matrices of all types side by side, along R columns.

    They are those of each example's own values, slot by slot, or those of every value.

    Attributes:
      a: [groups, R, d_in], or of every value [R, d_in]; None where x A is given (`narrowed`). A
        group is a row, or several that have the same features (`ActiveFeatures.rows`).
      b: [groups, R, d_out] or [R, d_out].
      copies: both in the dtype of the products, which are computed with them, while the gradients
        are those of a and b in theirs; None where they are made in the layer.
    """

    a: Array | None
    b: Array
    copies: Copies = None


def narrowed(
    x: Float[Array, "batch *positions d_in"], a: Array, copy: Array | None = None
) -> Float[Array, "groups length R"]:
    """x A of a table, the positions as one axis, in the accumulator's dtype.

    Args:
      x: the input of an adapted layer, or of several.
      a: [groups, R, d_in] or [R, d_in], of several layers one beside the other.
      copy: a in x's dtype; None where it is to be made here.
    """
    groups = a.shape[0] if a.ndim == 3 else x.shape[0]
    return _down(x.reshape(groups, -1, x.shape[-1]), a, copy)


#: rows [batch, length, d_in] -> rows A [batch, length, R].
Down = Callable[[Array], Array]
#: (types, x A of their features side by side, the same for other rows) -> what is put in its place.
Meet = Callable[[tuple[FeatureType, ...], Array, Down], Array]

#: What the narrow activations x A are called, for rematerialisation that goes by names.
LOW_RANK = "low_rank"

_WRITTEN_OUT = 16  # the largest rank of which `_batched_product` is a sum of outer products


def delta(
    x: Float[Array, "batch *positions d_in"],
    banks: Mapping[str, Bank] | Table,
    active: ActiveFeatures,
    space: FeatureSpace,
    *,
    alpha: float | None = None,
    meet: Meet | None = None,
    narrow: Float[Array, "groups length R"] | None = None,
) -> Float[Array, "batch *positions d_out"]:
    """The summed low-rank update of every example's active features.

    Args:
      x: the input of the adapted layer.
      banks: type name -> (a [values, d_in, rank], b [values, rank, d_out]), usually float32; or
        the table that was made of them (`tables`), with which nothing can meet.
      active: the features of each example, ids and weights [batch, slots], or of each group of
        `active.rows` rows; of packed rows [batch, examples, slots], with the `segments` of x's
        positions.
      space: the feature space that the ids count in.
      alpha: scale alpha / rank of each value, where `active` has no scales; None means 1.
      meet: what takes the place of the narrow activations x A before they are multiplied with c and
        B, for some of the types at a time (fusion, see `fusion.meeting`); None leaves them.
      narrow: x A of a table that has no `a` of its own.

    Returns:
      The update, in x's dtype; the products are computed in that dtype and accumulate in float32
      (or wider).

    Raises:
      ValueError: when the ids are of another batch size or number of slots, the segments of other
        positions, or a bank has a shape that the space does not give it.
    """
    check_shape(space, active.ids, active.weights)
    active.check_rows(x)
    # The rows of a group are one long row: they have the same matrices.
    rows = x.reshape(active.ids.shape[0], -1, x.shape[-1])
    assert meet is None or active.rows == 1
    if active.ids.ndim == 3:
        assert meet is None
        found = None if active.segments is None else active.segments.shape
        if found != rows.shape[:2]:
            raise ValueError(
                f"segments have shape {found}, expected {rows.shape[:2]}, an example of the packed "
                "row for each position of the layer's input"
            )
    if isinstance(banks, Table):
        assert meet is None
        if narrow is not None:
            narrow = narrow.reshape(*rows.shape[:2], -1)
        total = _of_table(rows, banks, narrow, active, space, alpha)
        return total.reshape(*x.shape[:-1], total.shape[-1])
    _check_banks(x.shape[-1], banks, space)
    updates = []
    for types in (
        tuple(t for t in space.types if t.num_values > 1),
        tuple(t for t in space.types if t.num_values == 1),
    ):
        if not types:
            continue
        down, up = _halves(types, banks, active, space, alpha, x.dtype)
        h = down(rows)
        updates.append(up(h if meet is None else meet(types, h, down)))
    total = updates[0] if len(updates) == 1 else updates[0] + updates[1]
    return total.reshape(*x.shape[:-1], total.shape[-1])


def _halves(
    types: tuple[FeatureType, ...],
    banks: Mapping[str, Bank],
    active: ActiveFeatures,
    space: FeatureSpace,
    alpha: float | None,
    dtype: DTypeLike,
) -> tuple[Down, Callable[[Array], Array]]:
    """(rows [batch, length, d_in] -> rows A, those [batch, length, R] -> (· c) B) of some types.

    The types have all several values, or all one.
    """
    c = coefficients.of_banks(types, space, active, alpha)
    if types[0].num_values == 1:
        a = jnp.concatenate([banks[t.name][0][0] for t in types], axis=1).T
        b = jnp.concatenate([banks[t.name][1][0] for t in types], axis=0)
        return lambda rows: _down(rows, a, None), lambda h: _up(dtype, h, b, None, c)
    ids_of = [coefficients.in_slots(active.ids, space.slots(t)) for t in types]
    ids_of = [ids.reshape(len(ids), -1) for ids in ids_of]
    layouts = tuple(
        _Layout(t.num_values, ids.shape[1], t.max_rank, banks[t.name][0].dtype)
        for t, ids in zip(types, ids_of, strict=True)
    )
    ids = jnp.concatenate(ids_of, axis=1)
    a_banks = tuple(banks[t.name][0] for t in types)
    b_banks = tuple(banks[t.name][1] for t in types)
    return (
        lambda rows: _gathered_down(layouts, rows, a_banks, ids),
        lambda h: _gathered_up(layouts, dtype, h, b_banks, ids, c),
    )


def _of_table(
    rows: Array,
    table: Table,
    h: Array | None,
    active: ActiveFeatures,
    space: FeatureSpace,
    alpha: float | None,
) -> Array:
    c = coefficients.of_table(space, active, alpha, every=table.b.ndim == 2)
    return of_columns(rows, table, c, h)


def of_columns(
    rows: Float[Array, "groups length d_in"], table: Table, c: Array, h: Array | None = None
) -> Float[Array, "groups length d_out"]:
    """((rows A) · c) B of a table, in the dtype of the rows; `h` is rows A where that is given."""
    a, b = (None, None) if table.copies is None else table.copies
    if h is None:
        assert table.a is not None
        h = narrowed(rows, table.a, a)
    return _up(rows.dtype, h, table.b, b, c)


def _check_banks(d_in: int, banks: Mapping[str, Bank], space: FeatureSpace) -> None:
    d_out = {b.shape[-1] for _, b in banks.values()}
    for t in space.types:
        a, b = banks[t.name]
        expected = (t.num_values, d_in, t.max_rank), (t.num_values, t.max_rank)
        if a.shape != expected[0] or b.shape[:-1] != expected[1] or len(d_out) != 1:
            raise ValueError(
                f"bank {t.name!r} has a {tuple(a.shape)} and b {tuple(b.shape)}, expected "
                f"a {expected[0]} and b ({t.num_values}, {t.max_rank}, d_out)"
            )


def _at_positions(c: Array) -> Array:
    """c [batch, R], or already [batch, positions, R], for products with [batch, positions, R]."""
    return c if c.ndim == 3 else c[:, None, :]


def _gradient_of_c(dz: Array, h: Array, c: Array) -> Array:
    found = dz * h
    return (found if c.ndim == 3 else jnp.sum(found, axis=1)).astype(c.dtype)


def accumulator(x: Array) -> Any:
    """The dtype that products of x are summed in: float32, or wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


@jax.custom_vjp
def _down(x: Array, a: Array, copy: Array | None) -> Array:
    """x aᵀ for a [R, d_in] of the whole batch or [batch, R, d_in], in the accumulator's dtype.

    `copy` is a in x's dtype, None where it is to be made here; the gradient is that of a.
    """
    return _down_forward(x, a, copy)[0]


def _down_forward(x, a, copy):
    kept = a.astype(x.dtype) if copy is None else copy
    h = jnp.einsum(f"nld,{_axes(a)}d->nlr", x, kept, preferred_element_type=accumulator(x))
    return checkpoint_name(h, LOW_RANK), (x, kept, _dtype_of(a))


def _down_backward(saved, dh):
    x, a, like = saved
    wide, dh = dh.dtype, dh.astype(x.dtype)
    dx = jnp.einsum(f"nlr,{_axes(a)}d->nld", dh, a)
    da = _summed(jnp.einsum("nlr,nld->nrd", dh, x, preferred_element_type=wide), a)
    return dx, da.astype(like.dtype), None


_down.defvjp(_down_forward, _down_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _up(dtype, h: Array, b: Array, copy: Array | None, c: Array) -> Array:
    """(h · c) b, in `dtype`, for b [R, d_out] or [batch, R, d_out]; c [batch, R], or of each
    position [batch, length, R].

    `copy` as in `_down`.
    """
    return _up_forward(dtype, h, b, copy, c)[0]


def _up_forward(dtype, h, b, copy, c):
    kept = b.astype(dtype) if copy is None else copy
    z = (h * _at_positions(c).astype(h.dtype)).astype(dtype)
    return jnp.einsum(f"nlr,{_axes(b)}o->nlo", z, kept), (h, kept, _dtype_of(b), c)


def _up_backward(dtype, saved, g):
    h, b, like, c = saved
    wide = h.dtype
    scale = _at_positions(c).astype(wide)
    z = (h * scale).astype(dtype)
    dz = jnp.einsum(f"nlo,{_axes(b)}o->nlr", g, b, preferred_element_type=wide)
    db = _summed(jnp.einsum("nlr,nlo->nro", z, g, preferred_element_type=wide), b)
    return dz * scale, db.astype(like.dtype), None, _gradient_of_c(dz, h, c)


_up.defvjp(_up_forward, _up_backward)


def _axes(matrix: Array) -> str:
    return "r" if matrix.ndim == 2 else "nr"


def _dtype_of(array: Array) -> Array:
    """An array of nothing that has the dtype: what a backward pass may keep."""
    return jnp.zeros((0,), array.dtype)


def _summed(gradients: Array, matrix: Array) -> Array:
    """[batch, R, width] as the matrix's own shape.

    Example by example, then summed: in one product over both axes XLA's CPU backend transposes the
    wide factor.
    """
    return gradients.sum(axis=0) if matrix.ndim == 2 else gradients


class _Layout(NamedTuple):
    """What the backward pass has to know of a bank, so that it need not keep the bank itself."""

    values: int
    slots: int
    rank: int
    dtype: np.dtype


def _side_by_side(layouts: tuple[_Layout, ...], banks, ids: Array, axis: int, dtype) -> Array:
    """Gathers every slot's matrix and lays them side by side along the rank (`axis`)."""
    bank_of_slot = [bank for bank, t in zip(banks, layouts, strict=True) for _ in range(t.slots)]
    matrices = [
        # Absent features have weight 0, so which row stands in for them does not matter.
        jnp.take(bank, ids[:, slot], axis=0, mode="clip").astype(dtype)
        for slot, bank in enumerate(bank_of_slot)
    ]
    return jnp.concatenate(matrices, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered_down(layouts, x, a_banks, ids):
    """x A_id, of all slots side by side [batch, length, R], in the accumulator's dtype.

    Args:
      layouts: of the banks, in order.
      x: [batch, length, d_in].
      a_banks: one [values, d_in, rank] for each type.
      ids: int32 [batch, slots].

    Where there is no gradient to be taken this is computed, else `_gathered_down_forward`. It is
    made for decoding, whose steps have one position of a row: all that does not depend on x, which
    XLA computes once for all steps, is laid out as the products read it.
    """
    a = _side_by_side(layouts, a_banks, ids, 2, x.dtype).swapaxes(1, 2)  # [batch, R, d_in]
    return jnp.einsum("nld,nrd->nlr", x, a, preferred_element_type=accumulator(x))


def _gathered_down_forward(layouts, x, a_banks, ids):
    a = _side_by_side(layouts, a_banks, ids, 2, x.dtype)  # [batch, d_in, R]
    h = jnp.einsum("nld,ndr->nlr", x, a, preferred_element_type=accumulator(x))
    return checkpoint_name(h, LOW_RANK), (x, a, ids)


def _gathered_down_backward(layouts, saved, dh):
    x, a, ids = saved
    wide, dh = dh.dtype, dh.astype(x.dtype)
    dx = jnp.einsum("nlr,ndr->nld", dh, a)
    # The rank before the width: CPUs are several times slower at the other order.
    da = jnp.einsum("nlr,nld->nrd", dh, x, preferred_element_type=wide)
    return dx, _add_up(layouts, da, ids, transpose=True), None


_gathered_down.defvjp(_gathered_down_forward, _gathered_down_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered_up(layouts, dtype, h, b_banks, ids, c):
    """(h · c) B_id, summed over the slots, in `dtype`; without a gradient, as `_gathered_down`.

    Args:
      layouts, ids: as in `_gathered_down`.
      dtype: of the products.
      h: [batch, length, R], in the accumulator's dtype.
      b_banks: one [values, rank, d_out] for each type.
      c: [batch, R], or of each position [batch, length, R].
    """
    b = _side_by_side(layouts, b_banks, ids, 1, dtype)  # [batch, R, d_out]
    if c.ndim == 3:
        return _batched_product((h * c.astype(h.dtype)).astype(dtype), b)
    return _batched_product(h.astype(dtype), (b * c.astype(h.dtype)[:, :, None]).astype(dtype))


def _gathered_up_forward(layouts, dtype, h, b_banks, ids, c):
    b = _side_by_side(layouts, b_banks, ids, 1, dtype)
    z = (h * _at_positions(c).astype(h.dtype)).astype(dtype)
    return jnp.einsum("nlr,nro->nlo", z, b), (h, b, ids, c)


def _gathered_up_backward(layouts, dtype, saved, g):
    h, b, ids, c = saved
    wide = h.dtype
    scale = _at_positions(c).astype(wide)
    z = (h * scale).astype(dtype)
    dz = jnp.einsum("nlo,nro->nlr", g, b, preferred_element_type=wide)
    db = jnp.einsum("nlr,nlo->nro", z, g, preferred_element_type=wide)
    db_banks = _add_up(layouts, db, ids, transpose=False)
    return dz * scale, db_banks, None, _gradient_of_c(dz, h, c)


_gathered_up.defvjp(_gathered_up_forward, _gathered_up_backward)


def _batched_product(h: Array, b: Array) -> Array:
    """[batch, length, R] × [batch, R, d_out], in the dtype of h.

    On CPUs a sum of R outer products: XLA makes one loop of it and of the sum with the layer's own
    output, where a product would write its result to memory and read it again.
    """

    def dot(h: Array, b: Array) -> Array:
        return jnp.einsum("nlr,nro->nlo", h, b)

    def outer(h: Array, b: Array) -> Array:
        wide = accumulator(h)
        h, b = h.astype(wide)[:, :, :, None], b.astype(wide)[:, None]
        terms = [h[:, :, r] * b[:, :, r] for r in range(h.shape[2])]
        return functools.reduce(jnp.add, terms).astype(dtype)

    dtype = h.dtype
    if h.shape[2] > _WRITTEN_OUT:
        return dot(h, b)
    return jax.lax.platform_dependent(h, b, cpu=outer, default=dot)


def _add_up(layouts, gradients: Array, ids: Array, *, transpose: bool) -> tuple[Array, ...]:
    """The gradient of every bank from those of the gathered matrices, [batch, R, width].

    `transpose` is for banks [values, width, rank].
    """
    totals, slot, column = [], 0, 0
    for bank in layouts:
        part = gradients[:, column : column + bank.slots * bank.rank]
        part = part.reshape(-1, bank.rank, gradients.shape[2])
        if transpose:  # here, where it is small, and not in the gradient of the whole bank
            part = part.swapaxes(1, 2)
        rows = ids[:, slot : slot + bank.slots].reshape(-1)
        totals.append(sum_by_value(part, rows, bank.values).astype(bank.dtype))
        slot, column = slot + bank.slots, column + bank.slots * bank.rank
    return tuple(totals)


def sum_by_value(parts: Array, ids: Array, values: int) -> Array:
    """[rows, …] and the id of each row -> [values, …], the sum of the rows of each value.

    A product with the one-hot ids, for a scatter is slow; the row of an absent feature (-1) counts
    nowhere.
    """
    one_hot = jax.nn.one_hot(ids, values, dtype=parts.dtype)
    # At the highest precision: a sum of a few rows, which must not round them to bfloat16.
    return jnp.tensordot(one_hot, parts, axes=((0,), (0,)), precision="highest")
