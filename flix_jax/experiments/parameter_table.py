"""Every parameter of a run: its shape, how it is split over the mesh, what a device holds of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from flix_jax.adapters import text_tables, tree


def bytes_per_device(shapes: Any) -> int:
    """What a device holds of a tree of `jax.ShapeDtypeStruct` with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
    )


def table(kinds: Mapping[str, Any]) -> str:
    """A line for every parameter, and sums.

    Args:
      kinds: 'frozen', 'trained' -> tree of `jax.ShapeDtypeStruct` with shardings.
    """
    rows = [["parameter", "kind", "dtype", "shape", "split over", "bytes of a device"]]
    for kind, shapes in kinds.items():
        for path, leaf in tree.named_leaves(shapes):
            split = [axis if axis is not None else "-" for axis in leaf.sharding.spec]
            rows.append(
                [
                    "/".join(path),
                    kind,
                    leaf.dtype.name,
                    " × ".join(map(str, leaf.shape)),
                    " ".join(map(str, split)) or "-",
                    f"{bytes_per_device(leaf):,}",
                ]
            )
    sums = (f"{kind} {bytes_per_device(shapes):,}" for kind, shapes in kinds.items())
    return f"{text_tables.plain(rows)}\n\nbytes of a device: {', '.join(sums)}"
