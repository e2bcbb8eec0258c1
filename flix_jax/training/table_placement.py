"""Where tables of banks lie on a mesh, and how they come there.

Where the widths of banks are split, matrices of rows are taken where banks are kept: a device takes
its part of the widths, for the rows of all devices among which the widths are split. Then each
device gives the others what is of their rows. That is one exchange for all leaves of equal widths,
and not one for each layer: devices wait for few large messages and not for many small ones, and a
TPU moves what has many columns to its lanes at the price of what has few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from flix_jax.adapters import tables, tree
from flix_jax.training import partitioning
from flix_jax.training.axis_rules import BATCH_AXES, FEATURES, Axes, AxisRules

#: Where tables lie while the network runs, beside the rules for the widths of banks.
_RULES: Mapping[str, Axes] = {
    tables.COLUMNS: (),
    tables.OWN_COLUMNS: (),
    tables.EXAMPLES: BATCH_AXES,
}


@dataclasses.dataclass(frozen=True)
class TablePlacement:
    """Places for what is made of banks.

    Attributes:
      mesh: of the run.
      rules: which mesh axes split which dimension, of banks as they are kept and as they are used.
    """

    mesh: Mesh
    rules: AxisRules

    def beside(self, x: jax.Array, axes: tables.Axes, bank: tables.Axes) -> jax.Array:
        """What is there for examples, brought to where a bank is kept.

        Args:
          x: such as the examples' ids, or what is taken of the bank for them.
          axes: the logical names of x's axes.
          bank: those of the bank's.
        """
        return jax.lax.with_sharding_constraint(x, self._sharding_beside(x, axes, bank))

    def in_use(self, made: tree.Tree, names: tree.Tree) -> Any:
        """Tables as the network uses them; `names` are those of `tables.logical_axes`."""
        return jax.lax.with_sharding_constraint(made, self._shardings_in_use(made, names))

    def brought(self, made: tree.Tree, names: tree.Tree) -> Any:
        """The same of tables of rows, which lie beside their banks: those that are alike as one."""
        leaves, axes = dict(tree.named_leaves(made)), dict(tree.named_leaves(names))
        used = dict(tree.named_leaves(self._shardings_in_use(made, names)))
        groups: dict[tuple[Any, ...], list[tree.Path]] = {}
        for path, leaf in leaves.items():
            at = axes[path].index(tables.OWN_COLUMNS)
            move = at, self._sharding_beside(leaf, axes[path], axes[path]), used[path]
            like = leaf.dtype, leaf.shape[:at], leaf.shape[at + 1 :]
            groups.setdefault((move, *like), []).append(path)
        found: dict[tree.Path, jax.Array] = {}
        for (move, *_), paths in groups.items():
            found.update(zip(paths, _moved([leaves[p] for p in paths], *move), strict=True))
        return tree.from_named([(path, found[path]) for path in leaves])

    def _sharding_beside(self, x: jax.Array, axes: tables.Axes, bank: tables.Axes) -> NamedSharding:
        """The mesh axes of the batch that do not split the bank's widths split the examples."""
        rules = self.rules.table("adapters")
        widths = (name for name in bank if name != FEATURES)
        split = {axis for name in widths for axis in rules.get(name or "", ())}
        examples = tuple(axis for axis in BATCH_AXES if axis not in split)
        there = {**rules, **_RULES, tables.EXAMPLES: examples}
        return partitioning.param_shardings(self.mesh, {"x": axes}, {"x": x}, there)["x"]

    def _shardings_in_use(self, made: tree.Tree, names: tree.Tree) -> Any:
        rules = {**self.rules.in_use.table("adapters"), **_RULES}
        return partitioning.param_shardings(self.mesh, names, made, rules)


def _moved(
    parts: list[jax.Array], axis: int, source: NamedSharding, target: NamedSharding
) -> list[jax.Array]:
    """Arrays that differ on one axis alone, brought from one sharding to the other as one array."""
    constrain = jax.lax.with_sharding_constraint
    if source.is_equivalent_to(target, parts[0].ndim):
        return [constrain(part, target) for part in parts]
    # Said of the whole before and after, so that its gradient is one array where it moves, too.
    whole = constrain(constrain(jnp.concatenate(parts, axis), source), target)
    # With the last axis innermost, as layers read tables: without more said a TPU leaves columns
    # there, as it exchanges them, and turns what it cuts out for each layer.
    whole = partitioning.in_order_of_memory(whole, target, range(whole.ndim))
    return jnp.split(whole, np.cumsum([part.shape[axis] for part in parts])[:-1], axis)
