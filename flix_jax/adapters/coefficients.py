"""The coefficients c of the low-rank columns: weight times scale of the features that are active.

    c[n, column of f] = w_nf · s_f,   s_f = alpha / rank_f (or 1), 0 beyond the rank of f

Of packed rows whose examples have features of their own they are those of each position: zero in
the columns of the row's other examples.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flix_jax.adapters.activation import ActiveFeatures
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.ids import ABSENT


def of_banks(
    types: Sequence[FeatureType], space: FeatureSpace, active: ActiveFeatures, alpha: float | None
) -> Array:
    """c of the matrices of some types, one type's after the other's.

    Those of the values in its slots; where a type has one value, of that: in several slots it is
    one update with the sum of their weights.

    Returns:
      [batch, columns], of packed rows with features of their own [batch, positions, columns].
    """
    of = [_of_every_value if t.num_values == 1 else _of_slots for t in types]
    found = [f(t, space, active, alpha) for f, t in zip(of, types, strict=True)]
    return jnp.concatenate(found, axis=-1)


def of_table(
    space: FeatureSpace, active: ActiveFeatures, alpha: float | None, *, every: bool
) -> Array:
    """c of a table (`low_rank.Table`): of every value, or of those in the slots; as `of_banks`."""
    of = _of_every_value if every else _of_slots
    return jnp.concatenate([of(t, space, active, alpha) for t in space.types], axis=-1)


def in_slots(values: Array, slots: range) -> Array:
    """Of [..., slots], those of some slots."""
    return values[..., slots.start : slots.stop]


def _of_slots(
    t: FeatureType, space: FeatureSpace, active: ActiveFeatures, alpha: float | None
) -> Array:
    """[batch, slots × rank]: weight times scale of the value in each slot.

    Of packed rows [batch, positions, examples × slots × rank].
    """
    ids, weights, scales = _weighted(t, space, active, alpha)
    by_slot = weights[..., None] * jnp.take(scales, ids, axis=0, mode="clip")
    by_example = by_slot.reshape(*weights.shape[:-1], -1)
    if by_example.ndim == 2:
        return by_example
    own = jnp.where(_belongs(active)[..., None], by_example[:, None], 0.0)
    return own.reshape(*own.shape[:2], -1)


def _of_every_value(
    t: FeatureType, space: FeatureSpace, active: ActiveFeatures, alpha: float | None
) -> Array:
    """[batch, values × rank]: weight times scale of every value, 0 where it is not there.

    Of packed rows [batch, positions, values × rank].
    """
    ids, weights, scales = _weighted(t, space, active, alpha)
    one_hot = jax.nn.one_hot(ids, t.num_values, dtype=weights.dtype)
    by_value = jnp.sum(one_hot * weights[..., None], axis=-2)
    by_example = (by_value[..., None] * scales).reshape(*weights.shape[:-1], -1)
    if by_example.ndim == 2:
        return by_example
    # Of the one example at most that there is: at the highest precision the sum is its value.
    belongs = _belongs(active).astype(by_example.dtype)
    return jnp.einsum("nle,nec->nlc", belongs, by_example, precision="highest")


def _belongs(active: ActiveFeatures) -> Array:
    """[batch, positions, examples]: whether a position of a packed row is of an example."""
    return active.segments[:, :, None] == jnp.arange(1, active.ids.shape[1] + 1)


def _weighted(
    t: FeatureType, space: FeatureSpace, active: ActiveFeatures, alpha: float | None
) -> tuple[Array, Array, Array]:
    """(ids […, slots], their weights, 0 where absent, scales [values, rank]) of a type."""
    slots = space.slots(t)
    ids = in_slots(active.ids, slots)
    weights = jnp.where(ids == ABSENT, 0.0, in_slots(active.weights, slots))
    known = t.scales(alpha) if active.scales is None else active.scales[t.name]
    return ids, weights, jnp.asarray(known, weights.dtype)
