"""A training step on the rows of the values that its batch has, whatever number of others there is.

The step is an ordinary one (`step.train_step`), of a smaller feature space (`adapters.present`):

    the values present  →  their rows of parameters and moments  →  a step  →  back in their places

Neither gradients nor the optimizer then see any other value, which keeps its parameters and moments
bit for bit. That is what the optimizer is lazy in:

    moments         of a value decay in the steps that have it, not in those between
    weight decay    is applied in the steps that have it
    a value's own momentum moves it in no step without it
    bias correction and schedule go by the run's step, for all values alike

It is the same update as that of an optimizer that is not lazy where every value is in every batch;
and in any batch under plain gradient descent without weight decay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from flix_jax.adapters import present as present_lib
from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.present import WHOLE, Present
from flix_jax.training.step import Batch, Metrics, Step, TrainState


def state_places(
    places: Any, optimizer: optax.GradientTransformation, template: TrainState
) -> TrainState:
    """Where a state has a row for every value: a state of `present.Place`.

    Args:
      places: those of what is trained (`present.places`).
      optimizer: whose state the template's is; moments have the shapes of the parameters.
      template: the state, arrays or shapes.
    """
    opt_state = optax.tree.map_params(
        optimizer,
        lambda moment, place: place,
        template.opt_state,
        places,
        transform_non_params=lambda leaf: WHOLE,
    )
    return TrainState(WHOLE, places, opt_state)  # type: ignore[arg-type]


def lazy_step(
    step_of: Callable[[Present], Step],
    space: FeatureSpace,
    narrow: FeatureSpace,
    places: TrainState,
) -> Step:
    """The function ``(state, frozen, batch, seed) -> (state, metrics)``, to be jitted.

    Args:
      step_of: the values that are present -> the step of a model whose adapters have the narrow
        space.
      space: the features that the ids of batches count in.
      narrow: what `present.narrowed` gives for the examples of a batch.
      places: `state_places` of the state.
    """

    def step(
        state: TrainState, frozen: Any, batch: Batch, seed: jax.typing.ArrayLike
    ) -> tuple[TrainState, Metrics]:
        present, ids = present_lib.find(space, narrow, batch["feature_ids"])
        taken = functools.partial(present_lib.taken, present=present)
        replaced = functools.partial(present_lib.replaced, present=present)
        rows = jax.tree.map(taken, state, places)
        rows, metrics = step_of(present)(rows, frozen, {**batch, "feature_ids": ids}, seed)
        return jax.tree.map(replaced, state, rows, places), metrics

    return step
