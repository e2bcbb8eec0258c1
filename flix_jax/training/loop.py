"""The training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flix_jax import preemption, processes
from flix_jax.preemption import Preempted
from flix_jax.training import not_finite
from flix_jax.training.checkpoints import Checkpoints
from flix_jax.training.reporting import Reporter
from flix_jax.training.step import Batch, Metrics, TrainState

Scores = Mapping[str, Mapping[str, float]]
"""{cell: {metric: value}}."""

# What is saved with a step beside the position in the examples.
REPORT = "report"  # `Reporter.state`
UNEVALUATED = "unevaluated"  # whether an evaluation was due at the step, and was interrupted


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
    saves_at: Callable[[int], bool],
    eval_every: int | None = None,
    evaluate: Callable[[int, Any], Scores] | None = None,
    judge: Callable[[Scores], float] | None = None,
    unevaluated: bool = False,
) -> TrainState:
    """Trains from ``state.step`` to ``total_steps``.

    Args:
      state: where to start; its buffers are donated to the first step.
      frozen: the parameters that are not trained.
      step_fn: the jitted step, ``(state, frozen, batch, seed) -> (state, metrics)``.
      seed: of all randomness in the step.
      batches: stands at the batch that follows ``state.step``.
      checkpoints: saved where one is the best so far, too.
      reporter: takes every step's metrics.
      saves_at: step -> whether it is saved in any case; the last one is.
      evaluate: ``(step, trained) -> scores`` per cell, every ``eval_every`` steps and at the end.
      judge: scores -> the value by which the best checkpoint is kept, higher as better.
      unevaluated: whether the evaluation of ``state.step`` is still to be made.

    Returns:
      The state at ``total_steps``, saved.

    Raises:
      NotFinite: a loss, a gradient or what is to be saved is not; what was saved before stands.
      ValueError: a checkpoint could not be written; those before it stand.
      Preempted: asked to stop, after a step or in an evaluation; the state is saved.
    """

    def save(step: int, value: float | None = None, *, unevaluated: bool = False) -> None:
        with preemption.phase("saving"):
            report = reporter.state()  # before, so that what is not finite is never saved
            not_finite.check_state(state)  # an update may be too large, though its gradient is not
            reporter.sync()  # before, so that no line is missing that the run goes on behind
            more = {REPORT: report, UNEVALUATED: unevaluated}
            checkpoints.save(state, {**batches.state(), **more}, value)

    def wait() -> None:
        with preemption.phase("saving"):
            checkpoints.wait()
            processes.wait_for_first()  # which commits what all have written

    def stopped(step: int, more: str = "") -> Preempted:
        wait()
        return Preempted(f"step {step} of {total_steps} is saved{more}")

    def value_at(step: int) -> float | None:
        assert evaluate is not None
        reporter.flush()  # before, so that the evaluation's time is not the steps'
        with preemption.phase("evaluating"):
            scores = evaluate(step, state.trained)
        reporter.scores(step, scores)
        return judge(scores) if judge else None

    first = int(state.step)
    if unevaluated and evaluate:
        value = value_at(first)
        if value is not None and (saves_at(first) or checkpoints.improves(value)):
            checkpoints.set_value(first, value)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preemption.phase("compiling"))
        for step in range(first + 1, total_steps + 1):
            state, metrics = step_fn(state, frozen, next(batches), seed)
            if step == first + 1:  # from here on there is something to save
                stack.enter_context(preemption.holding())
                stack.enter_context(preemption.phase("training"))
            reporter.step(step, metrics)
            checkpoints.check()  # a save that failed in the background is told now, not at the next

            last, value = step == total_steps, None

            if evaluate and eval_every and (last or step % eval_every == 0):
                try:
                    value = value_at(step)
                except Preempted:
                    save(step, unevaluated=True)
                    raise stopped(step, ", to be evaluated") from None
            if last:
                reporter.flush()

            due = saves_at(step) or checkpoints.improves(value)
            if due:
                save(step, value)
            if preemption.reached() and not last:
                if not due:
                    save(step)
                raise stopped(step)

        wait()
    return state
