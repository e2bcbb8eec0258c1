"""What a run's folder and its log tell of its data.

cells.txt     examples per cell: how many there are, are cut, and are dropped; how rows are packed,
              or what batches by cell or by length do
overlap.txt   inputs that stand in training and in evaluation data
missing.txt   files that the benchmark lists and the data folder lacks
skipped.txt   records that cannot be read and were left out
"""

from __future__ import annotations

from typing import Any

from flix_jax.data.cells import Cell, name_some
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
    return [
        *_cells(job, report),
        *_unknown(job),
        *_overlap(job),
        *_missing(job),
        *_skipped(job),
    ]


def _note(job: Job, name: str, text: str) -> str:
    """Writes a file of the folder, or removes one that is out of date; says where it is."""
    path = job.run_dir / name
    if text:
        files.write_text(path, text + "\n")
    else:
        path.unlink(missing_ok=True)
    return f"see {path}"


def _cells(job: Job, report: DataReport) -> list[str]:
    told = [of.line() for of in (report.packing, report.by_length) if of is not None]
    rows = [*told, *_by_cell(job, report)]
    tables = [job.cells_table(report), report.table(), *rows]
    place = _note(job, "cells.txt", "\n\n".join(tables))
    lines = [*rows, *([f"some examples are cut, {place}"] if report.cut else [])]
    without = report.without_source
    if without:
        lines.append(
            "training examples without a source, which train on their input alone: "
            f"{sum(without.values()):,}, of {len(without)} of {len(report.cells)} cells, {place}"
        )
    if job.run.mixture.overlap == "drop":
        dropped = report.dropped
        lines.append(
            "training examples dropped, since their inputs stand in evaluation data of held-out "
            f"cells: {sum(dropped.values()):,}, of {len(dropped)} of {len(report.cells)} cells"
            + (f", {place}" if dropped else "")
        )
    return lines


def _by_cell(job: Job, report: DataReport) -> list[str]:
    """What batches by cell do to the gradient, beside batches of as many rows drawn one by one.

    Of the mean over a batch, the variance within cells is the same, and that between cells goes by
    the number of draws (cluster sampling).
    """
    together, rows = job.run.rows_of_a_cell, job.run.batch_size
    if together == 1:
        return []
    draws = rows // together
    rarest = min(report.cells, key=lambda cell: report.cells[cell].rate)

    def one_batch_of(draws: int) -> str:
        """Of how many batches one has the rarest cell."""
        return f"{1 / (1 - (1 - report.cells[rarest].rate) ** draws):.3g}"

    return [
        f"batches by cell: {together} rows of a cell at a time, so that a batch of {rows} rows has "
        f"{draws} draws of a cell: what cells differ in has {together} times the variance in a "
        f"gradient that it has where every row is drawn by itself; {rarest.name}, the rarest, is "
        f"in one batch of {one_batch_of(draws)}, and not of {one_batch_of(rows)}"
    ]


def _unknown(job: Job) -> list[str]:
    return [
        f"held-out cells that will run without a {name}, since no training cell has theirs: "
        + name_some(cells)
        for name, cells in job.unknown_features(job.split.cells).items()
    ]


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

    A run without any task of the benchmark is on other data, which lack nothing.
    """
    source: Any = job.run.source
    counts = {}
    if hasattr(source, "missing") and any(cell.task in FILES for cell in job.split.cells):
        counts = {
            task: sum(
                job.run.mixture.asks_for(Cell(task, language, file, variant=file))
                for file, language in FILES[task].items()
                if file in names or language in names
            )
            for task, names in source.missing().items()
        }
    asked = [f"{task} {count}" for task, count in counts.items() if count]
    place = _note(job, "missing.txt", source.missing_text() if asked else "")
    if not asked:
        return []
    return [f"files of the benchmark that the folder lacks: {', '.join(asked)}, {place}"]


def _skipped(job: Job) -> list[str]:
    source: Any = job.run.source
    text = source.skipped_text() if hasattr(source, "skipped_text") else ""
    place = _note(job, "skipped.txt", text)
    if not text:
        return []
    number = len(text.splitlines())
    return [f"files with records that cannot be read and are left out: {number}, {place}"]
