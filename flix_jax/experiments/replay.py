"""A training step of a run made again: from the last checkpoint before it, or the beginning.

Steps are a function of the state, the seed and the position in the examples, so that what they were
needs not be kept while a run trains: it is found again, to the bit, when somebody asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flix_jax import preemption
from flix_jax.data.pipeline import TrainPipeline
from flix_jax.experiments.job import Job
from flix_jax.training import not_finite
from flix_jax.training.checkpoints import Checkpoints
from flix_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Replayed:
    """A step, ready to be made or just made again.

    Attributes:
      step: its number, from 1.
      state: before it.
      batch: the global batch, on the devices.
      metrics: of it, as the run's own program tells them.
      left: the path of the first array that is not finite after it; None if all are.
    """

    step: int
    state: TrainState
    batch: dict[str, jax.Array]
    metrics: dict[str, float]
    left: str | None

    @property
    def problem(self) -> str | None:
        """What is not finite, in a few words; None for a healthy step."""
        found = not_finite.found_in(self.metrics)
        if found is not None or self.left is None:
            return found
        return f"{self.left} is not finite after it"


def replay(
    job: Job,
    checkpoints: Checkpoints,
    pipeline: TrainPipeline,
    program: Any,
    template: TrainState,
    frozen: Any,
    step: int,
    *,
    first_bad_state: bool = False,
) -> Replayed:
    """Makes the steps of a run up to one again.

    Args:
      job: of the run.
      checkpoints: its own; those that are damaged are an error.
      pipeline: the training examples.
      program: the jitted step.
      template: the state's shapes with shardings.
      frozen: the parameters that are not trained.
      step: the step, from 1.
      first_bad_state: whether to end with an earlier one, if that leaves what is not finite.

    Raises:
      ValueError: a checkpoint cannot be read, or belongs to other data.
    """
    before = step_before(checkpoints, step)
    with preemption.phase("making steps again"):
        if before is not None:
            state, _ = checkpoints.restore(template, before, pipeline.check_state)
        else:
            base = job.load_base()
            trained, _ = job.initial_parameters(base)
            state = job.parameters.create_state(trained, job.optimizer())
            del base, trained
        with job.batches(pipeline, int(state.step)) as batches:
            for number in range(int(state.step) + 1, step + 1):
                batch = next(batches)
                if number < step and not first_bad_state:
                    state, _ = program(state, frozen, batch, job.run.seed)
                    continue
                made = make(program, state, frozen, batch, job.run.seed)
                if number == step or made.left is not None:
                    return made
                state, _ = program(state, frozen, batch, job.run.seed)
    raise AssertionError("a checkpoint before a step is followed by it")


def step_before(checkpoints: Checkpoints, step: int) -> int | None:
    """The newest checkpoint from which a step can be made again; None is the beginning."""
    return max((saved for saved in checkpoints.all_steps() if saved < step), default=None)


def make(
    program: Any, state: TrainState, frozen: Any, batch: Mapping[str, jax.Array], seed: int
) -> Replayed:
    """Makes the step that follows a state, which stays."""
    step = int(state.step) + 1
    # The program takes the buffers of the state that it is given.
    left, metrics = program(jax.tree.map(jnp.copy, state), frozen, dict(batch), seed)
    numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
    return Replayed(step, state, dict(batch), numbers, not_finite.first_array(left))
