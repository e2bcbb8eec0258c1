"""The jitted train step: one program, differentiated with respect to what is trained only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from flix_jax.adapters import tree
from flix_jax.models.dropout import EXAMPLE_NUMBERS

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
#: (params, batch, rng) -> (sum of the loss over target tokens, sums for the metrics).
LossFn = Callable[..., tuple[jax.Array, Metrics]]


class TrainState(struct.PyTreeNode):
    """What a step changes, and all that a checkpoint holds of the parameters.

    Attributes:
      step: int32 scalar, the number of updates made.
      trained: the trained parameters (the adapters; everything in full fine-tuning).
      opt_state: the optimizer's state over them.
    """

    step: jax.Array
    trained: Any
    opt_state: Any

    @classmethod
    def create(cls, trained: Any, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step."""
        return cls(jnp.zeros([], jnp.int32), trained, optimizer.init(trained))


def gradient_sums(
    loss_fn: LossFn,
    *,
    microbatches: int = 1,
    rows_together: int = 1,
    tables: Callable[[Any, Batch], tuple[Any, Any]] = lambda trained, batch: (trained, {}),
) -> Callable[[Any, Any, Batch, Any], tuple[Any, Metrics]]:
    """The function ``(trained, frozen, batch, rng) -> (gradients, sums)`` of a global batch.

    Both are sums over target tokens, in float32 over microbatches. See `train_step`.
    """

    def gradients(trained: Any, frozen: Any, batch: Batch, rng: Any) -> tuple[Any, Metrics]:
        def total(trained: Any) -> tuple[jax.Array, Metrics]:
            used, copies = tables(trained, batch)
            return loss_fn(tree.join(tree.join(frozen, copies), used), batch, rng=rng)

        return jax.grad(total, has_aux=True)(trained)

    def accumulated(trained: Any, frozen: Any, batch: Batch, rng: Any) -> tuple[Any, Metrics]:
        parts = in_parts(batch, microbatches, rows_together)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, trained, frozen, first, rng)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

        def add(sums: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradients(trained, frozen, part, rng)), None

        return jax.lax.scan(add, zeros, parts)[0]

    return gradients if microbatches == 1 else accumulated


def in_parts(batch: Batch, microbatches: int, rows_together: int = 1) -> Batch:
    """The microbatches of a batch, on a leading axis, with each example's place in the batch.

    Every one takes rows from all shards of the batch, and leaves R = `rows_together` consecutive
    ones together: [B] -> [B / (M R), M, R] -> [M, B / M].
    """
    size = jax.tree.leaves(batch)[0].shape[0]

    def cut(x: jax.Array) -> jax.Array:
        parts = jnp.moveaxis(x.reshape(-1, microbatches, rows_together, *x.shape[1:]), 1, 0)
        return parts.reshape(microbatches, -1, *x.shape[1:])

    return jax.tree.map(cut, batch | {EXAMPLE_NUMBERS: jnp.arange(size)})


def randomness(seed: jax.typing.ArrayLike, step: jax.typing.ArrayLike) -> jax.Array:
    """The key of all that is drawn in the step that follows `step` updates."""
    return jax.random.fold_in(jax.random.key(seed), step)


def is_sound(metrics: Metrics) -> jax.Array:
    """Whether loss and gradient of a step are finite: a scalar, on the device."""
    return jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])


#: (state, frozen, batch, seed) -> (state, metrics).
Step = Callable[[TrainState, Any, Batch, jax.typing.ArrayLike], tuple[TrainState, Metrics]]


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    rows_together: int = 1,
    in_use: Callable[[Any], Any] = lambda trained: trained,
    kept: Callable[[Any], Any] = lambda trained: trained,
    tables: Callable[[Any, Batch], tuple[Any, Any]] = lambda trained, batch: (trained, {}),
    skip: bool = False,
) -> Step:
    """The function ``(state, frozen, batch, seed) -> (state, metrics)``, to be jitted.

    The loss is the mean over the target tokens of the global batch, and gradients are summed in
    float32. Randomness is a function of (seed, step) and, in a model that draws by the batch's
    `example_numbers` (models.dropout), of each example's place in the global batch: then the number
    of microbatches changes nothing but the order of sums. Each `rows_together` consecutive rows are
    in the same one. The seed is an argument, so that runs which differ in it are one program.

    `in_use` brings what is trained to where the network uses it, `kept` its gradients to where the
    optimizer does, and `tables` makes of both, the former and (a part of) a batch, what the network
    uses: what has a gradient, and what has none (`Parameters`).

    With `skip`, a step whose loss or gradient is not finite changes nothing but the step's number.

    Metrics are float32 scalars: ``loss`` and ``z_loss`` per target token, ``accuracy`` (of tokens,
    teacher forced), ``tokens`` (target tokens in the batch), ``grad_norm`` (before clipping) and,
    with `skip`, ``skipped`` (0 or 1).
    """
    sums_of = gradient_sums(
        loss_fn, microbatches=microbatches, rows_together=rows_together, tables=tables
    )

    def step(
        state: TrainState, frozen: Any, batch: Batch, seed: jax.typing.ArrayLike
    ) -> tuple[TrainState, Metrics]:
        rng = randomness(seed, state.step)
        grads, sums = sums_of(in_use(state.trained), frozen, batch, rng)
        grads = kept(grads)
        tokens = jnp.maximum(sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        metrics = {
            "loss": sums["loss"] / tokens,
            "z_loss": sums["z_loss"] / tokens,
            "accuracy": sums["correct"] / tokens,
            "tokens": sums["weight"],
            "grad_norm": optax.tree.norm(grads),
        }
        new = TrainState(state.step, optax.apply_updates(state.trained, updates), opt_state)
        if skip:
            sound = is_sound(metrics)
            new = jax.tree.map(lambda after, before: jnp.where(sound, after, before), new, state)
            metrics["skipped"] = 1.0 - sound.astype(jnp.float32)
        return new.replace(step=state.step + 1), metrics

    return step
