"""Adapters that start from those of a folder: what must agree, and which values are taken over."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.experiments.run import Run
from flix_jax.interop import flix_adapters, network
from flix_jax.interop.leaves import Leaf
from flix_jax.models.config import T5Config

# Fields of the T5Config that say how the network is computed, not which one it is.
_FREE = ("dtype", "product_dtype", "remat", "dropout_rate")

Values = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Start:
    """The values of a folder from which a run's adapters start.

    Attributes:
      folder: where they are.
      adapters: what is there.
      space: the run's features.
      taken, fresh, left_out: by type, values that both have, that the run alone has, and that the
        folder alone has.
    """

    folder: str
    adapters: flix_adapters.Adapters
    space: FeatureSpace
    taken: Values
    fresh: Values
    left_out: Values

    def line(self) -> str:
        """What is taken over and what is not, for the log."""
        taken = ", ".join(f"{len(values)} of {name}" for name, values in self.taken.items())
        text = f"adapters start from the values of {self.folder}: {taken}"
        for what, values in (("fresh", self.fresh), ("left out", self.left_out)):
            if values:
                text += f"; {what}: {_names(values)}"
        return text

    def into(self, trained: Any, base: str) -> Any:
        """Freshly initialised adapters with the rows of the folder's values, sharded as they were.

        Args:
          trained: the adapters' arrays.
          base: the digest of the run's base.

        Raises:
          ValueError: the folder's values were trained beside another base.
        """
        if self.adapters.base != base:
            raise ValueError(
                f"Run.adapters_from={self.folder!r}: its base is {self.adapters.base!r} there and "
                f"{base!r} here, expected the same parameters, in the same dtype (Run.frozen_dtype)"
            )
        found = dict(network.flat(trained))
        for name, array in found.items():
            type_name = name.split("/")[-2]
            if tree.is_shared(tuple(name.split("/"))):
                found[name] = jax.device_put(self.adapters.banks[name].read(), array.sharding)
            elif type_name in self.taken:
                found[name] = self._filled(array, self.adapters.banks[name], type_name)
        return network.nested(found)

    def _filled(self, fresh: jax.Array, leaf: Leaf, type_name: str) -> jax.Array:
        """A bank with the rows of the values that are taken; what a device holds is read for it."""
        here = self.space.type(type_name).known_values
        there = self.adapters.space.type(type_name).known_values
        places = {here.index(v): there.index(v) for v in self.taken[type_name]}
        parts: dict[str, np.ndarray] = {}
        arrays = []
        for shard in fresh.addressable_shards:
            key = repr(shard.index)
            if key not in parts:
                parts[key] = np.array(shard.data)
                bounds = [
                    s.indices(size)[:2] for s, size in zip(shard.index, fresh.shape, strict=True)
                ]
                # Banks may differ in width: beyond a value's own rank both are zero.
                bounds[1:] = [
                    (low, min(high, size))
                    for (low, high), size in zip(bounds[1:], leaf.shape[1:], strict=True)
                ]
                index = tuple(slice(0, max(0, high - low)) for low, high in bounds[1:])
                read = tuple(slice(*pair) for pair in bounds[1:])
                for row in range(*bounds[0]):
                    if row in places:
                        place = places[row]
                        values = leaf.read((slice(place, place + 1), *read))[0]
                        parts[key][(row - bounds[0][0], *index)] = values
            arrays.append(jax.device_put(parts[key], shard.device))
        return jax.make_array_from_single_device_arrays(fresh.shape, fresh.sharding, arrays)


def find(run: Run, space: FeatureSpace) -> Start:
    """What of `run.adapters_from` a run takes over; nothing is computed.

    Args:
      run: whose network, targets, alpha, fusion and vocabulary must be the folder's.
      space: its features, their values known. Types and values that the folder has not start
        freshly, and those that only the folder has are left out.

    Raises:
      ValueError: no adapters in the folder, or something of another network, rank or scale there;
        or nothing to be taken over.
    """
    folder = run.adapters_from
    assert folder is not None and run.adapters is not None
    place = f"Run.adapters_from={folder!r}"
    try:
        adapters = flix_adapters.read(folder)
    except ValueError as error:
        raise ValueError(f"Run.adapters_from: {error}") from None
    check_network(run.model, adapters.model, place)
    for name, there, here in (
        ("targets", adapters.targets, tuple(run.adapters.targets)),
        ("alpha", adapters.alpha, run.adapters.alpha),
        ("fusion", adapters.fusion, run.adapters.fusion),
        ("vocabulary", adapters.vocabulary, run.vocabulary.digest),
    ):
        if there != here:
            raise ValueError(f"{place}: {name} is {there!r} there and {here!r} here")
    taken, fresh, left_out = _compared(space, adapters.space, place)
    if not taken:
        near = did_you_mean(_names(fresh), _names(left_out).split(", "))
        raise ValueError(f"{place}: has none of the run's features, {_names(fresh)}; {near}")
    return Start(folder, adapters, space, taken, fresh, left_out)


def _compared(here: FeatureSpace, there: FeatureSpace, place: str) -> tuple[Values, Values, Values]:
    """By type, the values of both spaces, of the first alone and of the second alone.

    Raises:
      ValueError: a value of both has two ranks.
    """
    both: dict[str, tuple[str, ...]] = {}
    first: dict[str, tuple[str, ...]] = {}
    second: dict[str, tuple[str, ...]] = {}
    others = {t.name: _ranks(t) for t in there.types}
    for of in here.types:
        ours, theirs = _ranks(of), others.pop(of.name, {})
        for value, rank in ours.items():
            if theirs.get(value, rank) != rank:
                raise ValueError(
                    f"{place}: {of.name}={value} has rank {theirs[value]} there and {rank} here; "
                    "FeatureType.ranks gives single values a rank of their own"
                )
        for found, names in (
            (both, [v for v in ours if v in theirs]),
            (first, [v for v in ours if v not in theirs]),
            (second, [v for v in theirs if v not in ours]),
        ):
            if names:
                found[of.name] = tuple(names)
    return both, first, second | {name: tuple(ranks) for name, ranks in others.items()}


def check_network(config: T5Config, there: Mapping[str, Any], place: str) -> None:
    """Compares a network with the fields that were written down of one.

    Raises:
      ValueError: with `place` and the first field that differs, but for those that say how a
        network is computed.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, value in dataclasses.asdict(config).items():
        here = json.loads(json.dumps(value))
        other = json.loads(json.dumps(there.get(name, defaults[name]), default=repr))
        if name not in _FREE and here != other:
            raise ValueError(f"{place}: T5Config.{name} is {other!r} there and {here!r} here")


def _ranks(of: FeatureType) -> dict[str, int]:
    return dict(zip(of.known_values, of.value_ranks, strict=True))


def _names(values: Values) -> str:
    return ", ".join(f"{name}={value}" for name, of in values.items() for value in of)
