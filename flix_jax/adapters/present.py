"""The values that a batch has, as a smaller feature space of their own.

A batch of few examples has few of many values. What is computed with the banks of these alone does
not depend on how many others there are:

    narrowed(space, examples)   a space of as many values as so many examples can have
    find(space, narrow, ids)    which values those are, and the ids counted among them
    taken, replaced             their rows of a bank, and the bank with other rows in their place
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from flix_jax.adapters import tree
from flix_jax.adapters.activation import FeatureSettings
from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.ids import ABSENT

#: By type, int32 [values of the narrow space]: the values that are present in rising order, then
#: the number of values for the places that are left.
Present = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array has a row for every value; a leaf of trees, not a tree itself.

    Attributes:
      type: name of the feature type; None for an array that belongs to no feature (`WHOLE`).
      axis: of the values.
    """

    type: str | None = None
    axis: int = 0


#: Of an array that is used whole.
WHOLE = Place()


def places(axes: tree.Tree) -> dict[str, Any]:
    """The tree of places of adapters with these logical axes (`tree.adapter_logical_axes`)."""
    return tree.from_named(
        [
            (path, WHOLE if tree.is_shared(path) else Place(path[-2], names.index("features")))
            for path, names in tree.named_leaves(axes)
        ]
    )


def narrowed(space: FeatureSpace, examples: int) -> FeatureSpace:
    """The space of the most values that so many examples can have, which are numbers.

    The values' own ranks and dropout rates are to come from settings (`settings_of`).
    """

    def narrow(t):
        values = min(t.num_values, examples * t.slots)
        return dataclasses.replace(
            t,
            values=tuple(str(number) for number in range(values)),
            rank=t.max_rank,
            ranks={},
            dropout=0.0,
            dropouts={},
        )

    return dataclasses.replace(space, types=tuple(narrow(t) for t in space.types))


def find(
    space: FeatureSpace, narrow: FeatureSpace, ids: Int[Array, "batch *examples slots"]
) -> tuple[dict[str, Array], Int[Array, "batch *examples slots"]]:
    """(the values present, the ids counted among them) of a batch, packed or not.

    Absent features stay absent, and an id out of range stays out of range.

    Raises:
      ValueError: the batch can have more values than the narrow space.
    """
    found, columns = {}, []
    for t, own in zip(space.types, narrow.types, strict=True):
        of = ids[..., space.slots(t).start : space.slots(t).stop]
        if own.num_values < min(t.num_values, of.size):
            raise ValueError(
                f"feature type {t.name!r}: a batch of {of.size // t.slots} examples can have "
                f"{min(t.num_values, of.size)} values, the narrow space has {own.num_values}"
            )
        known = (of >= 0) & (of < t.num_values)
        # What is no value sorts behind all of them, and is the first to find no room.
        rows, among = jnp.unique(
            jnp.where(known, of, t.num_values).ravel(),
            size=own.num_values,
            fill_value=t.num_values,
            return_inverse=True,
        )
        unknown = jnp.where(of == ABSENT, ABSENT, own.num_values)
        found[t.name] = rows.astype(jnp.int32)
        columns.append(jnp.where(known, among.reshape(of.shape), unknown).astype(ids.dtype))
    return found, jnp.concatenate(columns, axis=-1)


def settings_of(settings: FeatureSettings, present: Present) -> FeatureSettings:
    """Dropout rates and scales of the values that are present."""

    def rows(of: Mapping[str, Any]) -> dict[str, Any]:
        return {name: taken(array, Place(name), present) for name, array in of.items()}

    return FeatureSettings(rows(settings.dropouts), rows(settings.scales))


def taken(array: Array | np.ndarray, place: Place, present: Present) -> Array | np.ndarray:
    """The rows of the values that are present; any rows in the places that are left.

    An array of one value is used whole, though no example may have it.
    """
    if place.type is None or array.shape[place.axis] == 1:
        return array
    return jnp.take(array, present[place.type], axis=place.axis, mode="clip")


def replaced(array: Array, rows: Array, place: Place, present: Present) -> Array:
    """The array with other rows of the values that are present; the others keep their bits."""
    if place.type is None:
        return rows
    at = (slice(None),) * place.axis + (present[place.type],)
    return array.at[at].set(rows, mode="drop", indices_are_sorted=True)
