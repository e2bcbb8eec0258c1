"""Ensembles of adapters that were trained apart, a cell each: what cells without their own run on.

A cell that was trained on runs on its own adapter. Any other runs on those of the trained cells
that share its task or its language, its members, by the mean of their weights,

    W + 1/M Σ_m s A_m B_m,

or by the mean of their logits at every step of decoding. A cell without a member runs on the base.
Training and checkpoints know nothing of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flix_jax.adapters.features import FeatureSpace
from flix_jax.data.cells import GENERATE, Cell, CellSplit
from flix_jax.experiments.run import Run

if TYPE_CHECKING:
    from flix_jax.experiments.job import Job

CELL = "cell"


def check(run: Run, space: FeatureSpace | None) -> None:
    """Refuses an ensemble of a run whose features are not one cell each.

    Raises:
      ValueError: the space is not of one type 'cell' of one slot.
    """
    ensemble = run.evaluation.ensemble
    if ensemble is None:
        return
    if space is None or space.names != (CELL,) or space.num_slots != 1:
        has = "no adapters" if space is None else f"features of {', '.join(space.names)}"
        if space is not None and space.num_slots > len(space.types):
            has += f" in {space.num_slots} slots"
        raise ValueError(
            f"Evaluation.ensemble={ensemble!r}: the run has {has}; expected an adapter for each "
            "cell, features of the one type 'cell' (configs/adapters/lora_per_cell.gin)"
        )


def check_kinds(run: Run, cells: Iterable[Cell]) -> None:
    """Refuses the mean of logits where cells are inferred otherwise than by greedy decoding.

    Raises:
      ValueError: naming the first such cell.
    """
    if run.evaluation.ensemble != "logits":
        return
    for cell in cells:
        kind = run.source.inference(cell)
        if kind != GENERATE:
            raise ValueError(
                f"Evaluation.ensemble='logits': {cell.name} is inferred by {kind!r}, expected "
                f"{GENERATE!r} (greedy decoding); Evaluation.ensemble='weights' does all kinds"
            )


def members(cell: Cell, split: CellSplit, space: FeatureSpace, of: str) -> tuple[str, ...]:
    """Names of the trained cells on whose adapters a cell runs, in the order of their ids.

    Args:
      cell: of the split.
      split: the cells that are trained on and those that are held out.
      space: of the one type 'cell'.
      of: 'task', 'language' or 'related', as of `Evaluation.ensemble_of`.
    """
    if cell in split.train:
        found = {cell.name}
    else:
        same_task = {c.name for c in split.train if c.task == cell.task}
        same_language = {c.name for c in split.train if c.language == cell.language}
        by = {"task": same_task, "language": same_language, "related": same_task | same_language}
        found = by[of]
    return tuple(value for value in space.type(CELL).known_values if value in found)


def evaluated(job: Job) -> Job:
    """A job as its evaluation sees it: itself, or one whose cells are annotated by their members.

    Its space has the values of the job's and as many slots as the largest ensemble has members; it
    predicts from the job's own parameters. It is not to be trained, or asked for checkpoints.
    """
    evaluation, space, adapters = job.run.evaluation, job.space, job.model.adapters
    if evaluation.ensemble is None or space is None or adapters is None:
        return job
    if space.num_slots > 1 or job.model.members > 1:
        return job  # one already

    of_cell = {c: members(c, job.split, space, evaluation.ensemble_of) for c in job.split.cells}

    def annotated(cell: Cell) -> Cell:
        names = of_cell[cell]
        # One without members keeps its name, which is not known: it is told, and runs without.
        return dataclasses.replace(cell, extra=(*cell.extra, (CELL, names))) if names else cell

    slots = max(1, *map(len, of_cell.values()))
    by_weights = evaluation.ensemble == "weights"
    (cell_type,) = space.types
    combine = "mean" if by_weights else cell_type.combine
    cell_type = dataclasses.replace(cell_type, slots=slots, combine=combine)
    space = dataclasses.replace(space, types=(cell_type,))
    if by_weights:
        adapters = dataclasses.replace(adapters, space=space)
        made = job.with_model(dataclasses.replace(job.model, adapters=adapters))
    else:
        made = job.with_model(dataclasses.replace(job.model, members=slots))
    made.space = space
    made.split = CellSplit(
        tuple(map(annotated, job.split.train)), tuple(map(annotated, job.split.held_out))
    )
    return made
