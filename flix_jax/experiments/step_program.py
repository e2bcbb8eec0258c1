"""The training step of a run."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import optax

from flix_jax.adapters import present as present_lib
from flix_jax.adapters.activation import FeatureSettings
from flix_jax.adapters.present import Present
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import SKIP
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.training import partitioning
from flix_jax.training.lazy import lazy_step, state_places
from flix_jax.training.parameters import Parameters
from flix_jax.training.step import Step, TrainState, train_step


def step_program(job: Job, template: TrainState) -> Any:
    """A run's training step, jitted; `template` is its state with shardings."""
    return jax.jit(
        step_of(job, template),
        donate_argnums=0,
        out_shardings=(
            jax.tree.map(lambda x: x.sharding, template),
            partitioning.replicated(job.mesh),
        ),
    )


def step_of(job: Job, template: TrainState) -> Step:
    """A run's training step, to be jitted."""
    if job.run.optimizer.lazy:
        return _on_values_present(job, template)
    return _step(job, job.model, job.parameters, job.optimizer())


def _step(
    job: Job,
    model: EncoderDecoder,
    parameters: Parameters,
    optimizer: optax.GradientTransformation,
) -> Step:
    return train_step(
        model.loss,
        optimizer,
        microbatches=job.run.microbatches,
        rows_together=job.rows_together,
        in_use=parameters.in_use,
        kept=parameters.kept,
        tables=parameters.tables,
        skip=job.run.not_finite == SKIP,
    )


def _on_values_present(job: Job, template: TrainState) -> Step:
    """The step of the values that the batch has (`Optimizer.lazy`)."""
    assert job.space is not None and job.model.adapters is not None
    narrow = present_lib.narrowed(job.space, job.run.most_examples)
    model, parameters = job.narrowed(narrow)
    places = present_lib.places(job.parameters.adapter_axes)
    settings = FeatureSettings.of(job.space, job.model.adapters.alpha)

    def of_present(present: Present) -> Step:
        own = present_lib.settings_of(settings, present)
        rows = functools.partial(present_lib.taken, present=present)
        return _step(
            job,
            dataclasses.replace(model, settings=own),
            parameters,
            job.optimizer(lambda mask: jax.tree.map(rows, mask, places)),
        )

    whole = state_places(places, job.optimizer(), template)
    return lazy_step(of_present, job.space, narrow, whole)
