"""Several runs over one frozen base as one program: their states on a leading axis.

The runs differ in what is numbers (feature dropout, scales, learning rate, seed) and in the ranks
of their adapters, which are padded to the widest: a column beyond a run's own rank has a scale of
zero, so that it has neither effect nor gradient. Every run's step is the one it takes by itself.

An optimizer that works element by element (AdamW, SGD) leaves padding at zero. One that looks at a
whole array (Adafactor's factored moments, its clipping) is applied to each run's own shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flix_jax.training import partitioning
from flix_jax.training.optimizers import ELEMENTWISE, Optimizer
from flix_jax.training.step import Batch, LossFn, Metrics, TrainState, is_sound, train_step


class TrialsState(struct.PyTreeNode):
    """The states of several runs.

    Attributes:
      state: every leaf with an axis of runs before its own, padded to the largest of them.
      alive: bool [runs]; False from the step on whose loss or gradient is not finite, when a run's
        parameters and optimizer stay what they were.
    """

    state: TrainState
    alive: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """One of the runs.

    Attributes:
      template: the shapes of its state, as it is by itself.
      optimizer: its optimizer.
      seed: of its randomness.
      settings: a tree of numbers that its loss takes; of the same structure and shapes for all.
    """

    template: TrainState
    optimizer: Optimizer
    seed: int
    settings: Any


class Trials:
    """The program of several runs on a mesh, whose batch axes split the runs and not the batch.

    Args:
      trials: the runs; the trees of their states must agree but for sizes.
      loss_of: a trial's settings -> its loss function, as ``train_step`` takes it.
      total_steps: of every run.
      mesh: where they are computed.
      microbatches, rows_together: as in ``train_step``.
      at_once: how many runs a device computes side by side (``vmap``), the others after them; None
        is all, but one on a CPU, whose caches hold no more.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        loss_of: Callable[[Any], LossFn],
        *,
        total_steps: int,
        mesh: Mesh,
        microbatches: int = 1,
        rows_together: int = 1,
        at_once: int | None = None,
    ) -> None:
        self.trials = tuple(trials)
        self._loss_of = loss_of
        self._total_steps = total_steps
        self._mesh = mesh
        self._microbatches, self._rows_together = microbatches, rows_together
        self._shards = math.prod(mesh.shape[axis] for axis in partitioning.BATCH_AXES)
        self._rows = -(-len(self.trials) // self._shards) * self._shards
        if at_once is None and jax.default_backend() == "cpu":
            at_once = 1
        self._at_once = min(at_once or self._rows, self._rows // self._shards)
        self._variants = _variants(self.trials)
        widest = [t.template for t in self.trials]
        self.template = jax.tree.map(_widest, *widest)
        split = NamedSharding(mesh, PartitionSpec(partitioning.BATCH_AXES))
        self._numbers = jax.device_put(self._stack_numbers(), split)
        self._split = split
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=split)

    def stack(self, states: Sequence[TrainState]) -> TrialsState:
        """The state of all runs from those of each."""
        filled = [*states, *[states[-1]] * (self._rows - len(states))]

        def together(shape: Any, *leaves: Any) -> jax.Array:
            padded = [pad(np.asarray(leaf), shape.shape) for leaf in leaves]
            return jax.device_put(np.stack(padded), self._split)

        alive = jax.device_put(np.ones(self._rows, bool), self._split)
        return TrialsState(jax.tree.map(together, self.template, *filled), alive)

    def unstack(self, state: TrialsState) -> Iterator[TrainState]:
        """The states of the runs in turn, each of its own shapes and on every device."""
        leaves = jax.device_get(state.state)  # once: a leaf at a time, a run at a time is slow
        for index, trial in enumerate(self.trials):

            def own(leaf: np.ndarray, shape: Any, index: int = index) -> jax.Array:
                return jax.device_put(crop(leaf[index], shape.shape), shape.sharding)

            yield jax.tree.map(own, leaves, trial.template)

    def put_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """A batch where every run sees it."""
        return jax.device_put(batch, partitioning.replicated(self._mesh))

    def _step(self, states: TrialsState, frozen: Any, batch: Batch) -> tuple[TrialsState, Metrics]:
        """One step of every run; metrics as those of ``train_step``, each [runs]."""

        def local(states: TrialsState, frozen: Any, batch: Batch, numbers: Any) -> Any:
            one = functools.partial(self._one, frozen=frozen, batch=batch)
            size = self._at_once if self._at_once > 1 else None
            if self._at_once == states.alive.shape[0] and size is not None:
                return jax.vmap(one)((states, numbers))
            return jax.lax.map(one, (states, numbers), batch_size=size)

        if self._shards > 1:
            rows, whole = PartitionSpec(partitioning.BATCH_AXES), PartitionSpec()
            local = jax.shard_map(
                local,
                mesh=self._mesh,
                in_specs=(rows, whole, whole, rows),
                out_specs=rows,
                axis_names=set(partitioning.BATCH_AXES),
                check_vma=False,
            )
        return local(states, frozen, batch, self._numbers)

    def _one(self, states_and_numbers: Any, *, frozen: Any, batch: Batch) -> Any:
        states, (variant, learning_rate, seed, settings) = states_and_numbers
        step = train_step(
            self._loss_of(settings),
            self._optimizer(variant, learning_rate),
            microbatches=self._microbatches,
            rows_together=self._rows_together,
        )
        new, metrics = step(states.state, frozen, batch, seed)
        alive = states.alive & is_sound(metrics)
        kept = jax.tree.map(lambda a, b: jnp.where(alive, a, b), new, states.state)
        return TrialsState(kept, alive), metrics

    def _optimizer(self, variant: jax.Array, rate: jax.Array) -> optax.GradientTransformation:
        """The optimizer of one run, of those that there are."""

        def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            def by(optimizer: Optimizer, own: TrainState | None) -> Callable[..., Any]:
                def branch(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
                    made = optimizer.build(self._total_steps, rate)
                    if own is None:
                        return made.update(grads, state, params)
                    own_part = functools.partial(jax.tree.map, lambda x, s: crop(x, s.shape))
                    updates, new = made.update(
                        own_part(grads, own.trained),
                        own_part(state, own.opt_state),
                        own_part(params, own.trained),
                    )
                    whole = functools.partial(jax.tree.map, lambda x, s: pad(x, s.shape))
                    return whole(updates, self.template.trained), whole(
                        new, self.template.opt_state
                    )

                return branch

            branches = [by(optimizer, own) for optimizer, own in self._variants]
            if len(branches) == 1:
                return branches[0](grads, state, params)
            return jax.lax.switch(variant, branches, grads, state, params)

        return optax.GradientTransformation(lambda params: None, update)

    def _stack_numbers(self) -> tuple[Any, ...]:
        filled = [*self.trials, *[self.trials[-1]] * (self._rows - len(self.trials))]
        keys = [_variant_key(trial) for trial in filled]
        order = list(dict.fromkeys(_variant_key(trial) for trial in self.trials))
        return (
            np.asarray([order.index(key) for key in keys], np.int32),
            np.asarray([t.optimizer.schedule.learning_rate for t in filled], np.float32),
            np.asarray([t.seed for t in filled], np.int32),
            jax.tree.map(lambda *x: np.stack(x), *[t.settings for t in filled]),
        )


def _variant_key(trial: Trial) -> tuple[Any, ...]:
    """Equal for runs whose updates are the same function of gradients and learning rate."""
    schedule = dataclasses.replace(trial.optimizer.schedule, learning_rate=1.0)
    optimizer = dataclasses.replace(trial.optimizer, schedule=schedule)
    shapes = ()
    if optimizer.name not in ELEMENTWISE:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(trial.template))
    return optimizer, shapes


def _variants(trials: Sequence[Trial]) -> list[tuple[Optimizer, TrainState | None]]:
    """(optimizer, its own shapes or None for the padded ones) by key, in order of appearance."""
    first: dict[tuple[Any, ...], Trial] = {}
    for trial in trials:
        first.setdefault(_variant_key(trial), trial)
    return [(t.optimizer, t.template if key[1] else None) for key, t in first.items()]


def _widest(*shapes: Any) -> jax.ShapeDtypeStruct:
    """The least shape that holds all of them."""
    sizes = tuple(max(sizes) for sizes in zip(*(s.shape for s in shapes), strict=True))
    return jax.ShapeDtypeStruct(sizes, shapes[0].dtype)


def pad(leaf: Any, shape: tuple[int, ...]) -> Any:
    """``leaf`` with zeros behind its own elements, on every axis."""
    if leaf.shape == shape:
        return leaf
    widths = [(0, size - have) for have, size in zip(leaf.shape, shape, strict=True)]
    return jnp.pad(leaf, widths) if isinstance(leaf, jax.Array) else np.pad(leaf, widths)


def crop(leaf: Any, shape: tuple[int, ...]) -> Any:
    """The first elements of ``leaf`` on every axis: what ``pad`` padded."""
    return leaf if leaf.shape == shape else leaf[tuple(map(slice, shape))]
