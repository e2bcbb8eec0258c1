"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flix_jax.training.checkpoints import Checkpoints
from flix_jax.training.reporting import Reporter
from flix_jax.training.step import Batch, Metrics, TrainState

Scores = Mapping[str, Mapping[str, float]]
"""{cell: {metric: value}}."""


class Batches(Protocol):
    """An iterator of batches on the device, whose position can be saved."""

    def __next__(self) -> Batch: ...

    def state(self) -> Mapping[str, Any]: ...


def fit(
    state: TrainState,
    frozen: Any,
    *,
    step_fn: Callable[[TrainState, Any, Batch, int], tuple[TrainState, Metrics]],
    seed: int,
    batches: Batches,
    checkpoints: Checkpoints,
    reporter: Reporter,
    total_steps: int,
    save_every: int,
    eval_every: int | None = None,
    evaluate: Callable[[int, Any], Scores] | None = None,
    judge: Callable[[Scores], float] | None = None,
) -> TrainState:
    """Trains from ``state.step`` to ``total_steps``.

    Args:
      state: where to start; its buffers are donated to the first step.
      frozen: the parameters that are not trained.
      step_fn: the jitted step, ``(state, frozen, batch, seed) -> (state, metrics)``.
      seed: of all randomness in the step.
      batches: stands at the batch that follows ``state.step``.
      checkpoints: saved every ``save_every`` steps, at the end, and where one is the best so far.
      reporter: takes every step's metrics.
      evaluate: ``(step, trained) -> scores`` per cell, every ``eval_every`` steps and at the end.
      judge: scores -> the value by which the best checkpoint is kept, higher as better.

    Returns:
      The state at ``total_steps``, saved.

    Raises:
      FloatingPointError: the loss is not finite; what was saved before stands.
    """
    for step in range(int(state.step) + 1, total_steps + 1):
        state, metrics = step_fn(state, frozen, next(batches), seed)
        reporter.step(step, metrics)

        last, value = step == total_steps, None

        if evaluate and eval_every and (last or step % eval_every == 0):
            reporter.flush()  # before, so that the evaluation's time is not the steps'
            scores = evaluate(step, state.trained)
            reporter.scores(step, scores)
            value = judge(scores) if judge else None

        if last or step % save_every == 0 or checkpoints.improves(value):
            reporter.sync()  # before, so that a loss that is not finite is never saved
            checkpoints.save(state, batches.state(), value)

    checkpoints.wait()
    return state
