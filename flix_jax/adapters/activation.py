"""Which features act on which example, and how much: ids, weights and feature dropout.

Feature dropout (FLix, arXiv 2402.17934) switches a random subset of an example's features off in
training, so that the model does not lean on the annotation. It is drawn once per example,
outside the network, and reaches the network as weights: a rematerialised or scanned layer then
needs no random numbers for it, and every layer sees the same subset.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.ids import ABSENT


@flax.struct.dataclass
class ActiveFeatures:
    """The features of a batch as the network sees them.

    Attributes:
      ids: int32 [batch, slots], each id counting within its type, -1 where absent. Of packed rows
        whose examples have features of their own [batch, examples, slots].
      weights: float32, of the same shape, what each feature's update is multiplied with: 0 where
        the feature is absent or dropped.
      scales: by type, float32 [values, rank], what the columns of each value are multiplied with;
        None is what the space says (`FeatureType.scales`).
      segments: of such packed rows int32 [batch, positions], to which example of its row each
        position of the layer's input belongs, from 1 on; at 0 there is no update.
      rows: how many consecutive rows of the batch each of ids and weights is of.
    """

    # No shapes here: JAX rebuilds a tree with shardings and the like in place of its arrays.
    ids: Any
    weights: Any
    scales: Any = None
    segments: Any = None
    rows: int = flax.struct.field(pytree_node=False, default=1)

    def check_rows(self, x: Array) -> None:
        """ValueError unless a layer's input x [batch, …] is of this batch."""
        if self.ids.shape[0] * self.rows != x.shape[0]:
            of = f"{self.ids.shape[0]} examples"
            if self.rows > 1:
                of = f"{self.ids.shape[0]} groups of {self.rows} rows"
            raise ValueError(
                f"feature_ids are of {of}, expected {x.shape[0]}, the batch of the layer's input "
                f"{tuple(x.shape)}"
            )

    def of_each_row(self) -> "ActiveFeatures":
        """The same with ids and weights of every row."""
        ids, weights = (jnp.repeat(of, self.rows, axis=0) for of in (self.ids, self.weights))
        return dataclasses.replace(self, ids=ids, weights=weights, rows=1)


@flax.struct.dataclass
class FeatureSettings:
    """What of a feature space are numbers and no shapes: so that a compiled program takes them.

    Attributes:
      dropouts: by type, float32 [values], the dropout rate of each value.
      scales: by type, float32 [values, rank], as in ActiveFeatures; zero in the columns beyond a
        value's rank.
    """

    dropouts: Any
    scales: Any

    @classmethod
    def of(
        cls, space: FeatureSpace, alpha: float | None, widths: Mapping[str, int] | None = None
    ) -> "FeatureSettings":
        """Those of a space, NumPy arrays.

        Args:
          space: its values must be known.
          alpha: scale alpha / rank of each value; None means 1.
          widths: by type, the rank of banks that are wider than the space's own; what is beyond has
            a scale of zero, and so no effect and no gradient.
        """
        scales = {}
        for t in space.types:
            own = t.scales(alpha).astype(np.float32)
            width = t.max_rank if widths is None else widths[t.name]
            scales[t.name] = np.pad(own, ((0, 0), (0, width - own.shape[1])))
        dropouts = {t.name: np.asarray(t.value_dropouts, np.float32) for t in space.types}
        return cls(dropouts, scales)


def check_shape(space: FeatureSpace, ids, weights, place: str = "feature_ids") -> None:
    """ValueError unless ids (integers) and weights are both [batch, slots] or, of packed rows,
    [batch, examples, slots].
    """
    if ids.ndim not in (2, 3) or ids.shape[-1] != space.num_slots:
        raise ValueError(
            f"{place} have shape {tuple(ids.shape)}, expected [batch, {space.num_slots}] "
            f"(slots of {', '.join(space.names)}), or [batch, examples, {space.num_slots}] of "
            "packed rows"
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{place} have dtype {ids.dtype}, expected integers")
    if weights.shape != ids.shape:
        raise ValueError(
            f"feature_weights have shape {tuple(weights.shape)}, expected {tuple(ids.shape)}, the "
            "shape of feature_ids"
        )


def activate(
    space: FeatureSpace,
    feature_ids: Array | np.ndarray,
    feature_weights: Array | np.ndarray | None = None,
    *,
    dropout_rng: Array | None = None,
    numbers: Array | None = None,
    settings: FeatureSettings | None = None,
    rows: int = 1,
) -> ActiveFeatures:
    """Computes the active features of a batch, with feature dropout when given a key.

    A type of several slots is kept or dropped whole, at the largest rate of the values that the
    example has in it.

    Args:
      space: the feature space; its values must be known.
      feature_ids: integers [batch, slots], -1 where absent; [batch, examples, slots] of packed
        rows, whose `segments` are to be set for each layer. A NumPy array is checked for its
        values; under jit they cannot be, so an id out of range makes its example NaN rather than
        silently another feature.
      feature_weights: float, of the same shape; 1 by default.
      dropout_rng: key for feature dropout; None switches it off (evaluation).
      numbers: int32 [batch], those of the examples: what is dropped of an example is a function of
        the key and its number. By default its place in the batch, divided by `rows`. Of
        packed rows the numbers are the rows', and an example's is (its row's) * examples + its
        place in the row.
      settings: dropout rates and scales in place of the space's own.
      rows: how many consecutive rows have equal ids, weights and numbers, and are one group in what
        is returned. A group whose ids or weights differ is NaN.

    Returns:
      ActiveFeatures; weights are exactly 0 where a feature is absent or dropped. Those of a type
      whose values combine by their 'mean' are divided by the number of values present.

    Raises:
      ValueError: for shapes or dtypes other than the above, and for ids out of range where they
        are known.
    """
    if isinstance(feature_ids, np.ndarray):
        space.validate_ids(feature_ids)
    ids = jnp.asarray(feature_ids)
    weights = (
        jnp.ones(ids.shape, jnp.float32)
        if feature_weights is None
        else jnp.asarray(feature_weights, jnp.float32)
    )
    check_shape(space, ids, weights)
    ids = ids.astype(jnp.int32)
    if rows > 1:
        if ids.ndim == 3 or ids.shape[0] % rows:
            raise ValueError(
                f"feature_ids have shape {ids.shape}, expected [batch, {space.num_slots}] with a "
                f"multiple of {rows} rows, of which each {rows} have equal features"
            )
        groups = [of.reshape(-1, rows, space.num_slots) for of in (ids, weights)]
        same = [jnp.all(of == of[:, :1], axis=1) for of in groups]
        places = jnp.arange(ids.shape[0]) // rows if numbers is None else numbers
        first = activate(
            space,
            groups[0][:, 0],
            groups[1][:, 0],
            dropout_rng=dropout_rng,
            numbers=places[::rows],
            settings=settings,
        )
        weights = jnp.where(same[0] & same[1], first.weights, jnp.nan)
        return dataclasses.replace(first, weights=weights, rows=rows)
    if ids.ndim == 3:
        packed, examples, slots = ids.shape
        of_rows = jnp.arange(packed) if numbers is None else numbers
        apart = activate(
            space,
            ids.reshape(-1, slots),
            weights.reshape(-1, slots),
            dropout_rng=dropout_rng,
            numbers=(of_rows[:, None] * examples + jnp.arange(examples)).reshape(-1),
            settings=settings,
        )
        return dataclasses.replace(apart, ids=ids, weights=apart.weights.reshape(ids.shape))
    present = ids != ABSENT
    drops = settings is not None or any(max(t.value_dropouts) > 0 for t in space.types)
    if dropout_rng is not None and drops:
        rates = _rates(space, ids, settings)
        places = jnp.arange(ids.shape[0]) if numbers is None else numbers
        kept = _kept(space, present, rates, dropout_rng, places)
        weights = jnp.where(kept, weights, 0.0)
        if space.rescale:
            weights = weights / (1.0 - rates)
    weights = jnp.where(present, weights, 0.0)
    if any(t.combine == "mean" for t in space.types):
        weights = weights / _divisors(space, present)
    bounds = jnp.asarray([t.num_values for t in space.slot_types], jnp.int32)
    weights = jnp.where((ids < ABSENT) | (ids >= bounds), jnp.nan, weights)
    return ActiveFeatures(ids, weights, None if settings is None else settings.scales)


def _divisors(space: FeatureSpace, present: Array) -> Float[Array, "batch slots"]:
    """What each slot's weight is divided by: the values present, of types that take their mean."""
    columns = []
    for t in space.types:
        slots = present[:, space.slots(t).start : space.slots(t).stop]
        count = jnp.maximum(slots.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
        columns.append(jnp.broadcast_to(count if t.combine == "mean" else 1.0, slots.shape))
    return jnp.concatenate(columns, axis=1)


def _rates(
    space: FeatureSpace, ids: Array, settings: FeatureSettings | None
) -> Float[Array, "batch slots"]:
    """The dropout rate of every slot: the same for all slots of a type."""
    columns = []
    for t in space.types:
        slots = ids[:, space.slots(t).start : space.slots(t).stop]
        known = t.value_dropouts if settings is None else settings.dropouts[t.name]
        table = jnp.asarray(known, jnp.float32)
        rate = jnp.where(slots == ABSENT, 0.0, jnp.take(table, slots, mode="clip"))
        columns.append(jnp.broadcast_to(rate.max(axis=1, keepdims=True), slots.shape))
    return jnp.concatenate(columns, axis=1)


def _kept(space: FeatureSpace, present: Array, rates: Array, rng: Array, numbers: Array) -> Array:
    """[batch, slots] booleans: False where the feature is dropped."""
    repeats = np.asarray([t.slots for t in space.types])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, numbers)
    per_type = jax.vmap(lambda key: jax.random.uniform(key, (len(space.types),)))(keys)
    uniform = jnp.repeat(per_type, repeats, axis=1, total_repeat_length=space.num_slots)
    kept = uniform >= rates
    if space.keep_one:
        # Given that all were dropped, uniform / rate is uniform on [0, 1) for each of them, so the
        # largest is a fair choice without another random number.
        fraction = jnp.where(present & (rates > 0), uniform / jnp.maximum(rates, 1e-9), -1.0)
        chosen = fraction == fraction.max(axis=1, keepdims=True)
        none_left = ~jnp.any(kept & present, axis=1, keepdims=True)
        kept = kept | (none_left & chosen & present)
    return kept
