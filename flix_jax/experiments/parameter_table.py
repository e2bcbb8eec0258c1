"""Every parameter of a run: its shape, how it is split over the mesh, what a device holds of it."""

from __future__ import annotations

import math
from collections import Counter
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


def table(kinds: Mapping[str, Any], unsplit: Mapping[str, tuple[int, int]]) -> str:
    """A line for every parameter, sums, and which banks are not split as the rules say.

    Args:
      kinds: 'frozen', 'trained' -> tree of `jax.ShapeDtypeStruct` with shardings.
      unsplit: as `Parameters.unsplit`.
    """
    rows = [["parameter", "kind", "dtype", "shape", "split over", "bytes of a device"]]
    for kind, shapes in kinds.items():
        for path, leaf in tree.named_leaves(shapes):
            split = [_axes(axes) for axes in leaf.sharding.spec]
            rows.append(
                [
                    "/".join(path),
                    kind,
                    leaf.dtype.name,
                    " × ".join(map(str, leaf.shape)),
                    " ".join(split) or "-",
                    f"{bytes_per_device(leaf):,}",
                ]
            )
    sums = (f"{kind} {bytes_per_device(shapes):,}" for kind, shapes in kinds.items())
    lines = [f"bytes of a device: {', '.join(sums)}", *unsplit_lines(unsplit)]
    return f"{text_tables.plain(rows)}\n\n" + "\n".join(lines)


def unsplit_lines(unsplit: Mapping[str, tuple[int, int]]) -> list[str]:
    """A line for each number of features that the mesh does not divide; `Parameters.unsplit`."""
    banks = Counter(unsplit.values())
    return [
        f"{values} features are not split, for {parts} parts do not divide them: {count} banks"
        for (values, parts), count in banks.items()
    ]


def _axes(axes: str | tuple[str, ...] | None) -> str:
    return axes if isinstance(axes, str) else "+".join(axes or ("-",))
