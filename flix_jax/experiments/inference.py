"""What a trained run has learnt: its parameters restored, and its scores cell by cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from flix_jax import buckets
from flix_jax.data import cells as cells_lib
from flix_jax.data.cells import Cell
from flix_jax.evaluation.bootstrap import check_confidence
from flix_jax.evaluation.scoreboard import Scoreboard
from flix_jax.experiments import ensembles, scoring
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import Run
from flix_jax.training.checkpoints import Step, digest

if TYPE_CHECKING:
    from flix_jax.evaluation.evaluator import CellEvaluator, Progress


def evaluator(
    job: Job, split: str, examples_per_cell: int | None = None, cells: Sequence[str] | None = None
) -> CellEvaluator:
    """The evaluator of a job's cells: trained on and held out, those that have the split.

    Args:
      job: whose cells.
      split: the split.
      examples_per_cell: a budget; None takes the whole split.
      cells: patterns of the cells to evaluate; None takes all.

    Raises:
      ValueError: no cell has the split, or a pattern matches no cell.
    """
    from flix_jax.data.converter import FlixFeatureConverter
    from flix_jax.evaluation.evaluator import CellEvaluator

    job = ensembles.evaluated(job)
    chosen = _chosen(job, cells)
    job.check_split(split, chosen)
    ensembles.check_kinds(job.run, chosen)
    source = job.run.source
    having = [cell for cell in chosen if split in source.splits(cell)]
    return CellEvaluator(
        tasks=job.register(chosen),
        split=split,
        lengths=job.lengths,
        converter=FlixFeatureConverter(
            None if job.space is None else job.space.num_slots,
            sources=job.run.sources_length is not None,
        ),
        batch_size=job.run.evaluation.batch_size,
        examples_per_cell=examples_per_cell,
        kinds={cell: source.inference(cell) for cell in chosen},
        indexes=job.register_indexes(having),
    )


def _chosen(job: Job, cells: Sequence[str] | None) -> tuple[Cell, ...]:
    """The cells of a job that patterns match; None takes all."""
    return job.split.cells if cells is None else cells_lib.match(cells, job.split.cells)


def fingerprint(job: Job, trained: Any, frozen: str) -> str:
    """What predictions depend on, beside the examples: parameters, network and ensemble.

    `frozen` is the digest of the frozen parameters, which are hashed once, for they may be large.
    """
    made = f"{digest(trained)} {frozen} {job.run.model}"
    evaluation = job.run.evaluation
    if evaluation.ensemble is None:
        return made
    return f"{made} ensemble of {evaluation.ensemble}, {evaluation.ensemble_of}"


def restore(job: Job, step: Step = None) -> tuple[Any, Any, int]:
    """(trained, frozen, step) of a run that has been trained.

    Raises:
      ValueError: the run has no checkpoint, or not of that step, or keeps no best one.
    """
    base = None
    if not job.run.trains_everything:
        base = job.load_base()
    template, _ = job.parameters.templates
    with job.checkpoints(base, create=False) as checkpoints:
        trained, found = checkpoints.restore_trained(template, step)
    frozen: Any = {}
    if not job.run.trains_everything:
        frozen = job.frozen_parameters(base)
    return trained, frozen, found


def evaluate(
    run: Run,
    run_dir: epath.PathLike,
    *,
    split: str | None = None,
    cells: Sequence[str] | None = None,
    step: Step = None,
    confidence: float | None = None,
    bases_dir: epath.PathLike | None = None,
    say: Callable[[str], None] = print,
) -> Scoreboard:
    """Scores a trained run cell by cell; predictions and scores stay in its folder.

    Args:
      run: the run.
      run_dir: its folder.
      split: the split; None takes the run's own.
      cells: patterns of the cells; None takes all, trained on and held out.
      step: the checkpoint; None takes the newest, 'best' the one that `Evaluation.keep_best` kept.
      confidence: of bootstrap intervals of the scores (0.95); None makes none.
      bases_dir: as in training.
      say: takes lines of progress.

    Returns:
      The scores. Those of all cells are written beside the predictions, as ``scores.md``,
      ``scores.json`` and ``scores.csv``, and to the run's folder where they are of its own split.

    Raises:
      ValueError: nothing was trained here, or there is no such step, split or cell.
    """
    if confidence is not None:
        check_confidence(confidence)
    job = Job(run, run_dir, bases_dir=bases_dir)
    buckets.check_writable(job.run_dir)
    split = split or run.evaluation.split
    job.check_split(split, _chosen(job, cells))  # before anything is restored for it
    trained, frozen, found = restore(job, step)
    job = ensembles.evaluated(job)
    evaluation = evaluator(job, split, cells=cells)
    predictors = job.predictors(trained, frozen)
    mark = fingerprint(job, trained, digest(frozen))
    board, folder = score(job, evaluation, predictors, found, mark, say)
    if confidence is not None:
        board = scoring.with_intervals(board, folder, confidence)
    if cells is None:
        write_board(job, board, folder, found, split)
    return board


def score(
    job: Job,
    evaluation: CellEvaluator,
    predictors: Mapping[str, Any],
    step: int,
    mark: str,
    say: Callable[[str], None],
) -> tuple[Scoreboard, epath.Path]:
    """The scores of a job's cells, and the folder with their predictions.

    Args:
      job: whose folder and cells.
      evaluation: of its cells.
      predictors: as `Job.predictors` gives them.
      step: of the parameters.
      mark: their `fingerprint`.
      say: takes lines of progress.
    """
    watch = _Watch(say)
    scores = evaluation.evaluate(predictors, job.run_dir, step, fingerprint=mark, progress=watch)
    for name, without in job.unknown_features(evaluation.tasks).items():
        examples = sum(int(scores[cell.name]["examples"]) for cell in without)
        say(
            f"evaluate: the adapters have no {name} for {len(without)} of {len(scores)} cells, "
            f"{examples:,} examples, which run without one: " + cells_lib.name_some(without)
        )
    without_source = evaluation.without_source()
    if without_source:
        cells = [cell for cell in evaluation.tasks if cell.name in without_source]
        say(
            f"evaluate: {sum(without_source.values()):,} examples of {len(cells)} of {len(scores)} "
            "cells have no source and run on their input alone: " + cells_lib.name_some(cells)
        )
    board = scoring.scoreboard(job.run, job.split, scores)
    return board, evaluation.folder(job.run_dir, step)


def write_board(job: Job, board: Scoreboard, folder: epath.Path, step: int, split: str) -> None:
    """Leaves the scores of all cells beside the predictions, and in the run's folder its own."""
    made = {"step": step, "split": split}
    board.write(folder, made)
    if split == job.run.evaluation.split:
        board.write(job.run_dir, made)


class _Watch:
    """Says how far an evaluation is, every few seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._started = self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < 10 and progress.cells_done < progress.cells:
            return
        self._last = now
        rate = (progress.examples_done - progress.examples_before) / (now - self._started)
        self._say(
            f"evaluate: {progress.cells_done}/{progress.cells} cells, "
            f"{progress.examples_done:,} examples, {rate:,.0f} a second"
        )
