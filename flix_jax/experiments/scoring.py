"""From the scores of a run's cells to its scoreboard, and to the number that its best step has.

What only some sources know is asked of those: `under_represented` and `benchmark_size` (a
benchmark's own task scores), `format` (a task's metrics), `pairs` (how many examples a cell has).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.cells import Cell, CellSplit
from flix_jax.evaluation import bootstrap, files
from flix_jax.evaluation.metrics import METRICS
from flix_jax.evaluation.scoreboard import Scoreboard
from flix_jax.experiments.run import Run
from flix_jax.experiments.sweep import Sweep
from flix_jax.tasks.records import read_records

Scores = Mapping[str, Mapping[str, float]]


def scoreboard(run: Run, split: CellSplit, scores: Scores) -> Scoreboard:
    """The scoreboard of cells of a run.

    Args:
      run: the run.
      split: its cells.
      scores: {cell name: {metric: value, 'examples': n}}, of some or all of them.
    """
    cells = {cell.name: cell for cell in split.cells if cell.name in scores}
    source: Any = run.source
    marked, sizes = {}, {}
    if hasattr(source, "under_represented"):
        found = {name: source.under_represented(cell) for name, cell in cells.items()}
        marked = {name: value for name, value in found.items() if value is not None}
        tasks = dict.fromkeys(cells[name].task for name in marked)
        sizes = {task: source.benchmark_size(task) for task in tasks}
    groups = {name: split.group(cell) for name, cell in cells.items()}
    return Scoreboard(
        scores,
        {name: groups[name] for name in scores},
        under_represented=marked,
        benchmark_sizes=sizes,
    )


def judge(run: Run, split: CellSplit) -> Callable[[Scores], float] | None:
    """Scores of an evaluation -> the number by which the best step is kept; None for no such run.

    The returned function raises a ValueError where the number's cells hold no example.
    """
    name = run.evaluation.keep_best
    if name is None:
        return None

    def value(scores: Scores) -> float:
        named = scoreboard(run, split, scores).named()
        if name not in named:
            raise ValueError(
                f"Evaluation.keep_best={name!r}: there is no such number, for want of examples in "
                f"the split {run.evaluation.split!r}"
            )
        return named[name]

    return value


def check_evaluation(run: Run, split: CellSplit) -> None:
    """Refuses what evaluations while training could not do; reads no examples.

    Raises:
      ValueError: `Evaluation.keep_best` names none of their numbers, or `Evaluation.examples` are
        fewer than their cells.
    """
    evaluation = run.evaluation
    cells = [cell for cell in split.cells if evaluation.split in run.source.splits(cell)]
    if evaluation.examples is not None:
        if not hasattr(run.source, "pairs"):
            raise ValueError(
                f"Evaluation.examples: Run.source={type(run.source).__name__} does not tell how "
                "many examples a cell has; give Evaluation.examples_per_cell"
            )
        if evaluation.examples < len(cells):
            raise ValueError(
                f"Evaluation.examples={evaluation.examples} are fewer than the {len(cells)} cells "
                f"with the split {evaluation.split!r}"
            )
    if evaluation.keep_best is not None:
        scores = {cell.name: dict.fromkeys(_metrics(run, cell), 0.0) for cell in cells}
        named = scoreboard(run, split, {n: {**s, "examples": 1} for n, s in scores.items()}).named()
        if evaluation.keep_best not in named:
            raise ValueError(
                f"Evaluation.keep_best={evaluation.keep_best!r} is no number of an evaluation; "
                f"{did_you_mean(evaluation.keep_best, named)}"
            )


def check_sweep(sweep: Sweep, run: Run) -> None:
    """Refuses a sweep whose numbers a run of it will not have; reads no examples.

    Raises:
      ValueError: no cell has the split to report or choose by, a task is not scored by the metric,
        or no cell is of the group to choose by.
    """
    split = run.split()
    for name in sweep.splits:
        cells = [cell for cell in split.cells if name in run.source.splits(cell)]
        if not cells:
            known = {s for cell in split.cells for s in run.source.splits(cell)}
            raise ValueError(f"no cell has the split {name!r}; {did_you_mean(name, known)}")
        for cell in cells if sweep.metric else ():
            metrics = _metrics(run, cell)
            if sweep.metric not in metrics:
                raise ValueError(
                    f"Sweep.metric={sweep.metric!r} is no metric of the task {cell.task!r}, which "
                    f"is scored by {', '.join(metrics)}"
                )
        groups = {split.group(cell) for cell in cells}
        if name == sweep.choose_on and sweep.choose and sweep.group not in groups:
            raise ValueError(
                f"Sweep.group={sweep.group!r}: no cell of {name!r} is of it, only of "
                f"{', '.join(sorted(groups))}"
            )


def examples_per_cell(run: Run, cells: Iterable[Cell]) -> int | None:
    """The examples of each cell in an evaluation while training; None for the whole split."""
    evaluation = run.evaluation
    source: Any = run.source
    if evaluation.examples is None:
        return evaluation.examples_per_cell
    with_split = [cell for cell in cells if evaluation.split in source.splits(cell)]
    sizes = [len(source.pairs(cell, evaluation.split)[0]) for cell in with_split]
    return even_share(sizes, evaluation.examples)


def even_share(sizes: Sequence[int], examples: int) -> int | None:
    """How many examples each cell gives, if they take turns until `examples` are given.

    A cell that has no more is passed over. Whole rounds only, so that every cell which is not
    exhausted gives as many: fewer are left of `examples` than cells that could still give.

    Args:
      sizes: examples of each cell.
      examples: at least as many as there are cells.

    Returns:
      The greatest n with Σ min(size, n) <= examples; None where that is all of them.
    """
    left, ordered = examples, sorted(size for size in sizes if size)
    for place, size in enumerate(ordered):
        waiting = len(ordered) - place
        if size * waiting > left:
            return left // waiting
        left -= size
    return None


def with_intervals(board: Scoreboard, folder: epath.Path, confidence: float) -> Scoreboard:
    """The board with bootstrap intervals, from the predictions that its evaluation left.

    Each cell is resampled by a seed of its own, made of its name: the same for every run.

    Args:
      board: the scores.
      folder: of `<cell>.jsonl`, with `targets` (or, of retrieval, `answer`) and `predictions`.
      confidence: the share of the resampled scores inside, between 0 and 1.

    Raises:
      ValueError: a cell's predictions are missing, or have another score than the board.
    """
    resampled: dict[str, np.ndarray] = {}
    for cell in board.scores:
        value = board.value(cell)
        if value is None:
            continue
        path = files.predictions_file(folder, cell)
        if not path.exists():
            raise ValueError(f"{path}: no predictions of {cell}; evaluate it first")
        records = [record for _, record in read_records(path)]
        metric = board.headline(cell.partition("/")[0])
        try:
            targets, predictions = zip(
                *((r.get("answer", r["targets"]), r["predictions"]) for r in records), strict=True
            )
            statistics = metric.statistics(targets, predictions)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: not the predictions of a cell: {error}") from None
        there = float(metric.formula(statistics.sum(axis=0)))
        if abs(there - value) > 1e-6:
            raise ValueError(
                f"{path}: its {metric.title} is {there:.6f}, but {cell} was scored {value:.6f}"
            )
        seed = np.frombuffer(cell.encode(), np.uint8).tolist()
        resampled[cell] = bootstrap.resample(metric, statistics, seed=seed)
    return board.with_intervals(resampled, confidence)


def _metrics(run: Run, cell: Cell) -> Sequence[str]:
    """What a cell is scored by; anything where the source does not tell."""
    source: Any = run.source
    return source.format(cell.task).metrics if hasattr(source, "format") else tuple(METRICS)
