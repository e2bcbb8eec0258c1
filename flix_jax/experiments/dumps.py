"""Dumps of training steps that are not finite, in a run's folder: all that makes one again.

not_finite/<step>/step.json     what is not finite and where, metrics, where the examples are from
                  batch.npz     the global batch
                  modules.txt   what every module makes, and every parameter's gradient
                  checkpoints/  the state before the step, as a run's checkpoints are
"""

from __future__ import annotations

import collections
import copy
import io
import math
from typing import Any

import numpy as np
from etils import epath

from flix_jax import processes
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.evaluation import files
from flix_jax.experiments.job import Job
from flix_jax.experiments.replay import Replayed
from flix_jax.training import partitioning
from flix_jax.training.step import TrainState
from flix_jax.training.watching import Findings, watch

FOLDER = "not_finite"
_BATCH, _STEP, _TABLE = "batch.npz", "step.json", "modules.txt"


def folder_of(run_dir: epath.PathLike, step: int) -> epath.Path:
    """Where the dump of a step is, or would be."""
    return epath.Path(run_dir) / FOLDER / str(step)


def steps(run_dir: epath.PathLike) -> list[int]:
    """The steps of which a run's folder has a whole dump, ascending."""
    folder = epath.Path(run_dir) / FOLDER
    if not folder.exists():
        return []
    return sorted(
        int(path.name)
        for path in folder.iterdir()
        if path.name.isdecimal() and (path / _STEP).exists()
    )


def look(job: Job, replayed: Replayed, frozen: Any) -> Findings:
    """Looks at the modules and gradients of a step, as the run's own program uses parameters."""
    parameters = job.parameters
    return watch(
        job.model,
        replayed.state,
        frozen,
        replayed.batch,
        job.run.seed,
        microbatches=job.run.microbatches,
        rows_together=job.rows_together,
        in_use=parameters.in_use,
        tables=parameters.tables,
    )


def cells_of(origins: list[tuple[str, int, int]]) -> str:
    """The cells of a batch with the number of their examples: ``'back/y 3, up/x 5'``."""
    counts = collections.Counter(cell for cell, _, _ in origins)
    return ", ".join(f"{cell} {count}" for cell, count in sorted(counts.items()))


def write(
    job: Job,
    replayed: Replayed,
    findings: Findings,
    origins: list[tuple[str, int, int]],
    *,
    origin: str,
) -> epath.Path:
    """Writes the dump of a step, in place of an older one.

    Args:
      job: of the run.
      replayed, findings: the step.
      origins: of its examples, as the pipeline tells them.
      origin: the base's digest.

    Returns:
      Its folder.
    """
    folder = folder_of(job.run_dir, replayed.step)
    if processes.is_first() and folder.exists():
        folder.rmtree()
    processes.wait_for_first()
    with _in(job, folder).checkpoints(None, origin=origin) as checkpoints:
        checkpoints.save(replayed.state, {})
    arrays = {name: partitioning.gathered(array) for name, array in replayed.batch.items()}
    if processes.is_first():
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)  # type: ignore[arg-type]
        (folder / _BATCH).write_bytes(content.getvalue())
    files.write_text(folder / _TABLE, findings.table() + "\n")
    files.write_json(
        folder / _STEP,
        {
            "step": replayed.step,
            "problem": replayed.problem,
            "first": findings.first,
            "metrics": {name: _as_json(value) for name, value in replayed.metrics.items()},
            "cells": cells_of(origins),
            "examples": [
                {"cell": cell, "example": example, "position": position}
                for cell, example, position in origins
            ],
        },
    )
    return folder


def read(
    job: Job, step: int, template: TrainState, *, origin: str
) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """(state before the step, its batch on the devices, what ``step.json`` says).

    Raises:
      ValueError: there is no such dump, or it is damaged.
    """
    folder = folder_of(job.run_dir, step)
    record = files.read_object(folder / _STEP)
    if record is None:
        known = map(str, steps(job.run_dir))
        raise ValueError(
            f"no dump of step {step} in {folder.parent}; {did_you_mean(str(step), known)}"
        )
    with _in(job, folder).checkpoints(None, create=False, origin=origin) as checkpoints:
        state, _ = checkpoints.restore(template)
    try:
        with np.load(io.BytesIO((folder / _BATCH).read_bytes()), allow_pickle=False) as stored:
            batch = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder / _BATCH}: no batch can be read: {error}") from None
    return state, partitioning.put_batch(job.mesh, batch), record


def _in(job: Job, folder: epath.Path) -> Job:
    """A job whose checkpoints are in a folder of their own."""
    other = copy.copy(job)
    other.run_dir = folder
    return other


def _as_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
