"""What a run's folder and its log tell of its data.

cells.txt     examples per cell: how many there are, are cut, and are dropped
overlap.txt   inputs that stand in training and in evaluation data
missing.txt   files that the benchmark lists and the data folder lacks
skipped.txt   records that cannot be read and were left out
"""

from __future__ import annotations

from typing import Any

from flix_jax.data.cells import Cell
from flix_jax.data.examples import DataReport
from flix_jax.evaluation import files
from flix_jax.experiments.job import Job
from flix_jax.tasks.xtreme_up_languages import FILES


def write(job: Job, report: DataReport) -> list[str]:
    """Writes the files of a run whose training data are loaded.

    Args:
      job: the run in its folder.
      report: of its pipeline.

    Returns:
      A line for the log for each thing that a user should know of.
    """
    return [*_cells(job, report), *_overlap(job), *_missing(job), *_skipped(job)]


def _note(job: Job, name: str, text: str) -> str:
    """Writes a file of the folder; says where it is."""
    files.write_text(job.run_dir / name, text + "\n")
    return f"see {job.run_dir / name}"


def _cells(job: Job, report: DataReport) -> list[str]:
    place = _note(job, "cells.txt", job.cells_table(report))
    lines = [f"some examples are cut, {place}"] if report.cut else []
    if job.run.mixture.overlap == "drop":
        dropped = report.dropped
        found = f"{sum(dropped.values()):,} training examples of {len(dropped)} cells are dropped"
        reason = "their inputs stand in evaluation data of held-out cells"
        lines.append(
            f"{found}: {reason}, {place}" if dropped else f"no training examples to drop: {reason}"
        )
    return lines


def _overlap(job: Job) -> list[str]:
    if job.comparison is None:
        return []
    overlap = job.comparison.overlap
    groups = {cell.name: job.split.group(cell) for cell in job.split.cells}
    table = overlap.table(groups=groups) or "no input of evaluation data stands in training data"
    place = _note(job, "overlap.txt", table)
    held_out = [cell.name for cell in job.split.held_out]
    return [f"{overlap.summary(held_out)}, {place}"] if overlap else []


def _missing(job: Job) -> list[str]:
    """Of a run on the benchmark: what the folder lacks, and, in the log, what the mixture misses.

    A folder without any task of the benchmark is another one's data and lacks nothing.
    """
    source: Any = job.run.source
    if not hasattr(source, "missing_text") or not any(c.task in FILES for c in job.split.cells):
        return []
    counts = {
        task: sum(
            job.run.mixture.asks_for(Cell(task, language, file, variant=file))
            for file, language in FILES[task].items()
            if file in names or language in names
        )
        for task, names in source.missing().items()
    }
    asked = [f"{task} {count}" for task, count in counts.items() if count]
    if not asked:
        return []
    place = _note(job, "missing.txt", source.missing_text())
    return [f"files of the benchmark that the folder lacks: {', '.join(asked)}, {place}"]


def _skipped(job: Job) -> list[str]:
    source: Any = job.run.source
    text = source.skipped_text() if hasattr(source, "skipped_text") else ""
    if not text:
        return []
    place, number = _note(job, "skipped.txt", text), len(text.splitlines())
    return [f"files with records that cannot be read and are left out: {number}, {place}"]
