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
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from flix_jax.adapters.activation import ActiveFeatures, check_shape
from flix_jax.adapters.features import ABSENT, FeatureSpace, FeatureType

Bank = tuple[Array, Array]

#: What the narrow activations x A are called, for rematerialisation that goes by names.
LOW_RANK = "low_rank"

_WRITTEN_OUT = 16  # the largest rank of which `_batched_product` is a sum of outer products


def delta(
    x: Float[Array, "batch *positions d_in"],
    banks: Mapping[str, Bank],
    active: ActiveFeatures,
    space: FeatureSpace,
    *,
    alpha: float | None = None,
) -> Float[Array, "batch *positions d_out"]:
    """The summed low-rank update of every example's active features.

    Args:
      x: the input of the adapted layer.
      banks: type name -> (a [values, d_in, rank], b [values, rank, d_out]), usually float32.
      active: the features of each example, ids and weights [batch, slots].
      space: the feature space that the ids count in.
      alpha: scale alpha / rank of each value, where `active` has no scales; None means 1.

    Returns:
      The update, in x's dtype; the products are computed in that dtype and accumulate in float32
      (or wider).

    Raises:
      ValueError: when the ids are of another batch size or number of slots, or a bank has a shape
        that the space does not give it.
    """
    check_shape(space, active.ids, active.weights)
    if active.ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"feature_ids are of {active.ids.shape[0]} examples, expected {x.shape[0]}, the batch "
            f"of the layer's input {tuple(x.shape)}"
        )
    _check_banks(x.shape[-1], banks, space)
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    shared = [t for t in space.types if t.num_values == 1]
    gathered = [t for t in space.types if t.num_values > 1]

    def coefficients(types: list[FeatureType]) -> Array:
        return jnp.concatenate([_coefficients(t, space, active, alpha) for t in types], axis=1)

    updates = []
    if gathered:
        layouts = tuple(
            _Layout(t.num_values, t.slots, t.max_rank, banks[t.name][0].dtype) for t in gathered
        )
        ids = jnp.concatenate([_columns(active.ids, space.slots(t)) for t in gathered], axis=1)
        a_banks = tuple(banks[t.name][0] for t in gathered)
        b_banks = tuple(banks[t.name][1] for t in gathered)
        c = coefficients(gathered)
        updates.append(_gathered_product(layouts, rows, a_banks, b_banks, ids, c))
    if shared:
        a = jnp.concatenate([banks[t.name][0][0] for t in shared], axis=1)
        b = jnp.concatenate([banks[t.name][1][0] for t in shared], axis=0)
        updates.append(_shared_product(rows, a, b, coefficients(shared)))
    total = updates[0] if len(updates) == 1 else updates[0] + updates[1]
    return total.reshape(*x.shape[:-1], total.shape[-1])


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


def _columns(values: Array, columns: range) -> Array:
    return values[:, columns.start : columns.stop]


def _coefficients(
    t: FeatureType, space: FeatureSpace, active: ActiveFeatures, alpha: float | None
) -> Array:
    """c: [batch, slots of the type × rank], weight times scale, 0 beyond a value's rank."""
    slots = space.slots(t)
    ids = _columns(active.ids, slots)
    weights = jnp.where(ids == ABSENT, 0.0, _columns(active.weights, slots))
    known = t.scales(alpha) if active.scales is None else active.scales[t.name]
    scales = jnp.asarray(known, weights.dtype)  # [values, rank]
    if t.num_values == 1:
        # One value in several slots is one update with the sum of their weights.
        return weights.sum(axis=1, keepdims=True) * scales
    by_slot = weights[:, :, None] * jnp.take(scales, ids, axis=0, mode="clip")
    return by_slot.reshape(weights.shape[0], -1)


def _accumulator(x: Array):
    return jnp.promote_types(x.dtype, jnp.float32)


@jax.custom_vjp
def _shared_product(x: Array, a: Array, b: Array, c: Array) -> Array:
    """(x a · c) b for one a [d_in, R] and b [R, d_out] of the whole batch; c [batch, R]."""
    return _shared_forward(x, a, b, c)[0]


def _shared_forward(x, a, b, c):
    wide = _accumulator(x)
    h = jnp.einsum("nld,dr->nlr", x, a.astype(x.dtype), preferred_element_type=wide)
    h = checkpoint_name(h, LOW_RANK)
    z = (h * c.astype(wide)[:, None, :]).astype(x.dtype)
    return jnp.einsum("nlr,ro->nlo", z, b.astype(x.dtype)), (x, a, b, c, h)


def _shared_backward(saved, g):
    x, a, b, c, h = saved
    wide = h.dtype
    scale = c.astype(wide)[:, None, :]
    z = (h * scale).astype(x.dtype)
    dz = jnp.einsum("nlo,ro->nlr", g, b.astype(x.dtype), preferred_element_type=wide)
    dh = (dz * scale).astype(x.dtype)
    dx = jnp.einsum("nlr,dr->nld", dh, a.astype(x.dtype))
    # Example by example, then summed: in one product over both axes XLA transposes the wide factor.
    da = jnp.einsum("nlr,nld->nrd", dh, x, preferred_element_type=wide).sum(axis=0).T
    db = jnp.einsum("nlr,nlo->nro", z, g, preferred_element_type=wide).sum(axis=0)
    dc = jnp.sum(dz * h, axis=1)
    return dx, da.astype(a.dtype), db.astype(b.dtype), dc.astype(c.dtype)


_shared_product.defvjp(_shared_forward, _shared_backward)


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
def _gathered_product(layouts, x, a_banks, b_banks, ids, c):
    """Σ over slots of (x A_id · c) B_id.

    Args:
      layouts: of the banks, in order.
      x: [batch, length, d_in].
      a_banks, b_banks: one [values, d_in, rank] and [values, rank, d_out] for each type.
      ids: int32 [batch, slots].
      c: [batch, R], R = Σ over slots of the rank of their type.

    Where there is no gradient to be taken this is computed, else `_gathered_forward`. It is made
    for decoding, whose steps have one position of a row: all that does not depend on x, which XLA
    computes once for all steps, is laid out as the products read it.
    """
    wide = _accumulator(x)
    a = _side_by_side(layouts, a_banks, ids, 2, x.dtype).swapaxes(1, 2)  # [batch, R, d_in]
    b = _side_by_side(layouts, b_banks, ids, 1, x.dtype)  # [batch, R, d_out]
    h = jnp.einsum("nld,nrd->nlr", x, a, preferred_element_type=wide).astype(x.dtype)
    return _batched_product(h, (b * c.astype(wide)[:, :, None]).astype(x.dtype))


def _batched_product(h: Array, b: Array) -> Array:
    """[batch, length, R] × [batch, R, d_out], in the dtype of h.

    On CPUs a sum of R outer products: XLA makes one loop of it and of the sum with the layer's own
    output, where a product would write its result to memory and read it again.
    """

    def dot(h: Array, b: Array) -> Array:
        return jnp.einsum("nlr,nro->nlo", h, b)

    def outer(h: Array, b: Array) -> Array:
        wide = _accumulator(h)
        h, b = h.astype(wide)[:, :, :, None], b.astype(wide)[:, None]
        terms = [h[:, :, r] * b[:, :, r] for r in range(h.shape[2])]
        return functools.reduce(jnp.add, terms).astype(dtype)

    dtype = h.dtype
    if h.shape[2] > _WRITTEN_OUT:
        return dot(h, b)
    return jax.lax.platform_dependent(h, b, cpu=outer, default=dot)


def _gathered_forward(layouts, x, a_banks, b_banks, ids, c):
    wide = _accumulator(x)
    a = _side_by_side(layouts, a_banks, ids, 2, x.dtype)  # [batch, d_in, R]
    b = _side_by_side(layouts, b_banks, ids, 1, x.dtype)  # [batch, R, d_out]
    h = jnp.einsum("nld,ndr->nlr", x, a, preferred_element_type=wide)
    h = checkpoint_name(h, LOW_RANK)
    z = (h * c.astype(wide)[:, None, :]).astype(x.dtype)
    y = jnp.einsum("nlr,nro->nlo", z, b)
    return y, (x, a, b, h, ids, c)


def _gathered_backward(layouts, saved, g):
    x, a, b, h, ids, c = saved
    wide = h.dtype
    scale = c.astype(wide)[:, None, :]
    z = (h * scale).astype(x.dtype)
    dz = jnp.einsum("nlo,nro->nlr", g, b, preferred_element_type=wide)
    dh = (dz * scale).astype(x.dtype)
    dx = jnp.einsum("nlr,ndr->nld", dh, a)
    # The rank before the width in both: CPUs are several times slower at the other order.
    da = jnp.einsum("nlr,nld->nrd", dh, x, preferred_element_type=wide)
    db = jnp.einsum("nlr,nlo->nro", z, g, preferred_element_type=wide)
    dc = jnp.sum(dz * h, axis=1).astype(c.dtype)
    da_banks = _add_up(layouts, da, ids, transpose=True)
    db_banks = _add_up(layouts, db, ids, transpose=False)
    return dx, da_banks, db_banks, None, dc


def _add_up(layouts, gradients: Array, ids: Array, *, transpose: bool) -> tuple[Array, ...]:
    """The gradient of every bank from those of the gathered matrices, [batch, R, width].

    A product with the one-hot ids, [values, batch × slots] × [batch × slots, rank × width]; the
    row of an absent feature (-1) is all zeros. `transpose` is for banks [values, width, rank].
    """
    totals, slot, column = [], 0, 0
    for bank in layouts:
        part = gradients[:, column : column + bank.slots * bank.rank]
        part = part.reshape(-1, bank.rank, gradients.shape[2])
        if transpose:  # here, where it is small, and not in the gradient of the whole bank
            part = part.swapaxes(1, 2)
        rows = ids[:, slot : slot + bank.slots].reshape(-1)
        one_hot = jax.nn.one_hot(rows, bank.values, dtype=part.dtype)
        # At the highest precision: a sum of a few rows, which must not round them to bfloat16.
        total = jnp.einsum(
            "mv,mp->vp", one_hot, part.reshape(part.shape[0], -1), precision="highest"
        )
        totals.append(total.reshape(bank.values, *part.shape[1:]).astype(bank.dtype))
        slot, column = slot + bank.slots, column + bank.slots * bank.rank
    return tuple(totals)


_gathered_product.defvjp(_gathered_forward, _gathered_backward)
