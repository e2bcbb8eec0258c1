"""What of a model is trained and what is frozen: shapes, shardings and first values of both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from flix_jax.adapters import dense, siblings, tables, tree
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.adapters.modules import ALL, MERGED
from flix_jax.models import int8
from flix_jax.training import partitioning
from flix_jax.training.axis_rules import FEATURES, AxisRules
from flix_jax.training.step import TrainState
from flix_jax.training.table_placement import TablePlacement


class Model(Protocol):
    """Anything that makes its parameters from the shapes of a batch."""

    def init(self, rng: jax.Array, batch_shapes: Mapping[str, tuple[int, ...]]) -> Any: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Parameters:
    """The parameters of a model on a mesh, split into trained and frozen.

    Nothing is computed until ``random`` or ``from_base`` is called, and then everything is made
    already sharded.

    Attributes:
      model: makes the parameters, adapters included.
      batch_shapes: the shapes of a batch of one example.
      mesh: where they live.
      adapters: whether the adapters alone are trained.
      trainable: without adapters, patterns over parameter paths; None trains everything.
      rules: which mesh axes split which dimension.
      kinds: path of an adapted layer -> the kind of table that a training step makes of its banks
        before the network uses them (`adapters.tables`).
      rows_together: how many consecutive rows of a batch have the same features, and one table.
      spec: the adapters, where a layer has a table.
      dtype: of the products with tables.
    """

    model: Model
    batch_shapes: Mapping[str, tuple[int, ...]]
    mesh: Mesh
    adapters: bool
    trainable: tuple[str, ...] | None = None
    rules: AxisRules = AxisRules()
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rows_together: int = 1
    spec: AdapterSpec | None = None
    dtype: str = "float32"

    def split(self, params: Any) -> tuple[Any, Any]:
        """(trained, frozen) of a whole tree."""
        if self.adapters:
            base, adapters = tree.split_adapters(params)
            return adapters, base
        if self.trainable is not None:
            return tree.split_by_pattern(params, self.trainable)
        return params, {}

    @functools.cached_property
    def templates(self) -> tuple[Any, Any]:
        """(trained, frozen) as ``jax.ShapeDtypeStruct`` with shardings."""
        return self._templates(self.rules)

    @functools.cached_property
    def trained_in_use(self) -> Any:
        """The trained part of the templates as it lies while the network runs."""
        return self._templates(self.rules.in_use)[0]

    @functools.cached_property
    def _banks_in_use(self) -> Any:
        """The same, but banks of which tables are made as they are kept."""
        if not self.kinds:
            return self.trained_in_use
        used = dict(tree.named_leaves(self.trained_in_use))
        return tree.from_named(
            [
                (path, kept if tree.layer_of(path) in self.kinds else used[path])
                for path, kept in tree.named_leaves(self.templates[0])
            ]
        )

    def _templates(self, rules: AxisRules) -> tuple[Any, Any]:
        shapes, axes = self._shapes_and_axes
        shardings = [
            partitioning.param_shardings(self.mesh, part_axes, part, rules.table(kind))
            for kind, part, part_axes in zip(
                ("parameters", "adapters"),
                tree.split_adapters(shapes),
                tree.split_adapters(axes),
                strict=True,
            )
        ]
        return self.split(jax.tree.map(_with_sharding, shapes, tree.join(*shardings)))

    @functools.cached_property
    def unsplit(self) -> dict[str, tuple[int, int]]:
        """Banks whose features are not split as the rules say: path -> (values, parts).

        The number of values is none that the parts divide, so each device holds all of them.
        """
        over = self.rules.table("adapters")[FEATURES]
        parts = partitioning.shards(self.mesh, over)
        _, shapes = tree.split_adapters(self._shapes_and_axes[0])
        names = dict(tree.named_leaves(self.adapter_axes))
        sizes = (
            (path, leaf.shape[names[path].index(FEATURES)])
            for path, leaf in tree.named_leaves(shapes)
            if FEATURES in names[path]
        )
        return {"/".join(path): (size, parts) for path, size in sizes if size % parts}

    @property
    def adapter_axes(self) -> Any:
        """The adapters' tree with the logical names of each array's axes as leaf, a tuple."""
        return tree.split_adapters(self._shapes_and_axes[1])[1]

    @functools.cached_property
    def _shapes_and_axes(self) -> tuple[Any, Any]:
        """The whole tree as shapes, and as tuples of logical names."""
        boxed, _ = self._traced
        shapes, axes = nn.unbox(boxed), partitioning.logical_axes(boxed)
        if self.adapters:
            base_axes, _ = tree.split_adapters(axes)
            _, adapters = tree.split_adapters(shapes)
            axes = tree.join(base_axes, tree.adapter_logical_axes(adapters, base_axes))
        return shapes, axes

    @functools.cached_property
    def _traced(self) -> tuple[Any, tuple[tuple[str, ...], ...]]:
        """The boxed parameters as shapes, and the siblings."""
        with dense.dense_inputs() as inputs:
            boxed = jax.eval_shape(self._init, jax.random.key(0))
        if self.spec is None or self.spec.dropout:
            return boxed, ()
        beside = {path: kind for path, kind in self.kinds.items() if kind != MERGED}
        return boxed, siblings.find(beside.get, inputs)

    @property
    def siblings(self) -> tuple[tuple[str, ...], ...]:
        """With tables, paths of adapted layers whose narrow activations one product makes.

        None where each drops out of its input by itself.
        """
        return self._traced[1]

    @property
    def base_template(self) -> Any:
        """The whole base, as ``from_base`` takes it."""
        trained, frozen = self.templates
        return frozen if self.adapters else tree.join(trained, frozen)

    def frozen_template(self, dtype: str | None = None) -> Any:
        """The frozen part as ``frozen_of`` keeps it."""
        frozen = self.templates[1]
        if dtype == int8.INT8:
            return int8.template(frozen)
        if dtype is None:
            return frozen
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), frozen
        )

    def random(self, seed: int, dtype: str | None = None) -> tuple[Any, Any]:
        """(trained, frozen), both freshly initialised; the frozen part kept as in ``from_base``."""
        kept = self.templates[0], self.frozen_template(dtype)

        def init(key: jax.Array) -> tuple[Any, Any]:
            trained, frozen = self.split(nn.unbox(self._init(key)))
            return trained, _kept(frozen, dtype)

        return jax.jit(init, out_shardings=_shardings(kept))(jax.random.key(seed))

    def from_base(self, base: Any, seed: int, dtype: str | None = None) -> tuple[Any, Any]:
        """(trained, frozen) around the parameters of a base; adapters are freshly initialised.

        Args:
          base: a tree as ``base_template`` describes it.
          seed: of the adapters.
          dtype: in which the frozen part is kept; None leaves it, and 'int8' quantises its
            matrices (see ``models.int8``).
        """
        trained = self.fresh_adapters(seed) if self.adapters else self.split(base)[0]
        return trained, self.frozen_of(base, dtype)

    def fresh_adapters(self, seed: int) -> Any:
        """The adapters of ``random``, made without the base's own initial values."""
        return self._adapters_program(jax.random.key(seed))

    @functools.cached_property
    def _adapters_program(self) -> Callable[[jax.Array], Any]:
        return jax.jit(
            lambda key: self.split(nn.unbox(self._init(key)))[0],
            out_shardings=_shardings(self.templates[0]),
        )

    def frozen_of(self, base: Any, dtype: str | None = None) -> Any:
        """What of a base is not trained; the second half of ``from_base``."""
        frozen = base if self.adapters else self.split(base)[1]
        if dtype != int8.INT8:
            return _kept(frozen, dtype)
        if int8.is_quantised(frozen):
            return frozen
        shardings = _shardings(self.frozen_template(dtype))
        return jax.jit(int8.quantise, out_shardings=shardings)(frozen)

    def state_template(self, optimizer: optax.GradientTransformation) -> TrainState:
        """The train state as ``jax.ShapeDtypeStruct`` with shardings.

        Moments are sharded as their parameters are; what has another shape (factored moments,
        counters) is replicated.
        """
        trained = self.templates[0]
        state = jax.eval_shape(lambda x: TrainState.create(x, optimizer), trained)
        whole = partitioning.replicated(self.mesh)

        def like_parameter(leaf: Any, parameter: Any) -> Any:
            same = leaf.shape == parameter.shape
            return _with_sharding(leaf, parameter.sharding if same else whole)

        opt_state = optax.tree.map_params(
            optimizer,
            like_parameter,
            state.opt_state,
            trained,
            transform_non_params=lambda leaf: _with_sharding(leaf, whole),
        )
        return state.replace(
            step=_with_sharding(state.step, whole), trained=trained, opt_state=opt_state
        )

    def in_use(self, trained: Any) -> Any:
        """What is trained, brought to where the network uses it, or `tables` makes tables of it."""
        return self._placed(trained, self._banks_in_use)

    def kept(self, trained: Any) -> Any:
        """Gradients of what is trained, brought to where it is kept.

        Those of banks of which there are tables lie in memory as programs are given banks: a TPU
        has the wider of their last two axes innermost. Without more said, an optimizer's update is
        in the order of the gradient, and bank and moments are copied back, all three.
        """
        placed = self._placed(trained, self.templates[0])
        if not self.kinds:
            return placed
        shardings = dict(tree.named_leaves(_shardings(self.templates[0])))
        return tree.from_named(
            [
                (path, self._in_order(self.kinds.get(tree.layer_of(path)), bank, shardings[path]))
                for path, bank in tree.named_leaves(placed)
            ]
        )

    def _in_order(self, kind: str | None, bank: jax.Array, there: NamedSharding) -> jax.Array:
        if kind is None:
            return bank
        *outer, rows, columns = range(bank.ndim)
        sizes = there.shard_shape(bank.shape)
        if sizes[columns] < sizes[rows]:
            rows, columns = columns, rows
        kept = (*outer, rows, columns)
        if kind == ALL:
            return partitioning.in_order_of_memory(bank, there, kept)
        # A sum by value is made with the values innermost but one. It crosses devices so, and is
        # turned where it is read; else it would be turned, and have more padding, before.
        values, *others = kept[:-1]
        return partitioning.in_order_of_memory(bank, there, (*others, values, columns), kept)

    def _placed(self, trained: Any, template: Any) -> Any:
        if not self.rules.adapters:  # it lies there already
            return trained
        return jax.lax.with_sharding_constraint(trained, _shardings(template))

    def tables(self, trained: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
        """What the network uses of adapters in a training step: (with a gradient, without one).

        The tables that are made of the banks, and copies of them in the dtype of the products; the
        banks of layers that have no table. Differentiable with respect to `trained`.

        Args:
          trained: as `in_use` gives it.
          batch: or a part of it, of which `feature_ids` are used.
        """
        if not self.kinds:
            return trained, {}
        axes = tables.apart(self.adapter_axes, self.kinds)
        templates = tables.apart(self.templates[0], self.kinds)
        used: dict[str, Any] = {}
        copied: dict[str, Any] = {}
        for kind, banks in tables.apart(trained, self.kinds).items():
            if kind is None:
                used = tree.join(used, banks)
                continue
            kept = jax.lax.with_sharding_constraint(banks, _shardings(templates[kind]))
            made, copies = self._tables_of(kind, kept, axes[kind], batch["feature_ids"])
            used, copied = tree.join(used, made), tree.join(copied, copies)
        return used, copied

    def _tables_of(self, kind: str, banks: Any, axes: Any, ids: jax.Array) -> tuple[Any, Any]:
        """The tables of some banks, and copies of them in the dtype of the products."""
        assert self.spec is not None
        space, siblings = self.spec.space, self.siblings
        place = TablePlacement(self.mesh, self.rules)
        names = tables.logical_axes(axes, space, kind, siblings)
        if kind == ALL:
            bring = place.in_use
            made = tables.of_all(banks, axes, space, siblings)
        else:
            bring = place.brought
            ids = ids[:: self.rows_together]
            made = tables.of_rows(
                banks, axes, space, ids, place.beside, siblings, kind, dtype=self.dtype
            )
        copies = jax.tree.map(lambda x: jax.lax.stop_gradient(x).astype(self.dtype), made)
        return bring(made, names), tables.as_copies(bring(copies, names))

    def create_state(self, trained: Any, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step, sharded as its template."""
        shardings = _shardings(self.state_template(optimizer))
        create = jax.jit(lambda x: TrainState.create(x, optimizer), out_shardings=shardings)
        return create(trained)

    def _init(self, key: jax.Array) -> Any:
        return self.model.init(key, self.batch_shapes)


def _kept(params: Any, dtype: str | None) -> Any:
    if dtype == int8.INT8:
        return int8.quantise(params)
    return params if dtype is None else jax.tree.map(lambda x: x.astype(dtype), params)


def _shardings(template: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, template)


def _with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
