"""Which values of the features are trained, where it is not all of them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.adapters.tree import from_named, is_shared, named_leaves

Tree = Mapping[str, Any]


def matching(
    space: FeatureSpace, patterns: Sequence[str], columns: Mapping[str, Sequence[str]]
) -> dict[str, frozenset[str]]:
    """type -> the values that some pattern matches; every type is there.

    Args:
      space: the features; their values must be known.
      patterns: regular expressions that match the whole of 'type=value'.
      columns: type -> the values that training examples have.

    Raises:
      ValueError: when a pattern is malformed, or matches nothing, with the nearest names, or only
        what no training example has.
    """
    names = {f"{t.name}={v}": (t.name, v) for t in space.types for v in t.known_values}
    found: dict[str, set[str]] = {t.name: set() for t in space.types}
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        matched = [of for name, of in names.items() if compiled.fullmatch(name)]
        if not matched:
            raise ValueError(
                f"{pattern!r} matches none of {len(names)} features; {did_you_mean(pattern, names)}"
            )
        if not any(value in columns.get(name, ()) for name, value in matched):
            raise ValueError(
                f"{pattern!r} matches no feature that is trained on: there is: "
                + ", ".join(
                    f for f, (name, value) in names.items() if value in columns.get(name, ())
                )
            )
        for type_name, value in matched:
            found[type_name].add(value)
    return {name: frozenset(values) for name, values in found.items()}


def mask(
    adapters: Tree, space: FeatureSpace, chosen: Mapping[str, frozenset[str]]
) -> dict[str, Any]:
    """The adapters' tree with bools [values, 1, …] as leaves, which broadcast against the banks.

    Args:
      adapters: arrays or shapes.
      space: their features.
      chosen: what `matching` gives; True for these. What belongs to no feature stays what it is.
    """
    leaves = []
    for path, leaf in named_leaves(adapters):
        if is_shared(path):
            leaves.append((path, np.zeros([1] * len(leaf.shape), bool)))
            continue
        of = space.type(path[-2])
        rows = np.array([value in chosen[of.name] for value in of.known_values])
        leaves.append((path, rows.reshape(-1, *[1] * (len(leaf.shape) - 1))))
    return from_named(leaves)
