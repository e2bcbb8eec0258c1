"""What is looked at before a run computes anything: everything that could stop it later.

`start` is what every job begins with, and all of `flix check`. Cheap things come first, the reading
of the data last; what does not depend on each other is told together.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from flix_jax import buckets, preemption
from flix_jax.adapters import text_tables, tree
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.cells import RETRIEVE, Cell
from flix_jax.data.cells import columns as columns_of
from flix_jax.data.pipeline import check_same
from flix_jax.experiments import base as base_lib
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import Run
from flix_jax.experiments.run_folder import saved_steps
from flix_jax.mistakes import Collected, Mistake
from flix_jax.training import stored_steps

TRAIN = "train"
_NO_FOLDER = "a folder of its own"  # where none is named; it is never made
_FILES = 10  # with bad records, of which the first of each is told
_STEPS = ("Run.save_every", "Evaluation.every", "Run.log_every")


@dataclasses.dataclass(frozen=True)
class Report:
    """What the checks of a run found.

    Attributes:
      rows: what was looked at, and what was found.
      warnings: what is no mistake and yet worth a second look.
      checkpoints: bytes that the checkpoints to come need beside those that are there.
    """

    rows: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = ()
    checkpoints: int = 0

    def table(self) -> str:
        return text_tables.plain([("checked", "found"), *self.rows], numbers=False)


def start(
    run: Run,
    run_dir: epath.PathLike | None,
    *,
    bases_dir: epath.PathLike | None = None,
    allow_changes: Sequence[str] = (),
    read: bool = True,
) -> tuple[Job, Report]:
    """The job of a run that is to be trained, and what the checks of it and its bases found.

    Args:
      run, bases_dir, allow_changes: as of `Job`.
      run_dir: the run's folder; None where it is not known yet, and nothing of it is checked.
      read: whether the data are read; False where that is done elsewhere.

    Raises:
      ValueError: whatever cannot work, in one line with what is at fault; `Mistakes` for several.
    """
    mistakes = Collected()
    if run_dir is not None:
        check_place(run_dir)
    with mistakes.part():
        folder = _NO_FOLDER if run_dir is None else run_dir
        job = Job(run, folder, bases_dir=bases_dir, allow_changes=allow_changes)
    mistakes.tell()
    # Of bases that are trained first, what is wrong is told now, and not after one of them.
    jobs = [job, *_bases_to_train(job, mistakes)]
    reports = [_checked(one, mistakes) for one in jobs]
    mistakes.tell()
    need = sum(report.checkpoints for report in reports)
    rows = list(reports[0].rows)
    if run_dir is not None:
        with mistakes.part("Run.keep"):
            rows.append(("disk", _check_space(run_dir, need)))
        mistakes.tell()
    seen: list[tuple[Any, ...]] = []
    for one in jobs if read else ():
        data = (one.run.source, one.run.mixture, one.run.evaluation, one.run.source_text)
        if data not in seen:
            with mistakes.part(), preemption.phase("reading the data"):
                examples = read_data(one)
                rows += examples if one is job else []
        seen.append(data)
    mistakes.tell()
    warnings = list(reports[0].warnings)
    for number, report in enumerate(reports[1:], 1):
        whose = f"{'base of ' * (number - 1)}base: "
        rows += [(whose + what, text) for what, text in report.rows]
        warnings += [whose + warning for warning in report.warnings]
    return job, Report(tuple(rows), tuple(warnings))


def with_saved(report: Report, run_dir: epath.PathLike) -> Report:
    """A report with what the checkpoints in the run's folder are, every file of them compared.

    A job compares those that it reads.

    Raises:
      ValueError: there are some and none is sound: the run cannot go on.
    """
    if not saved_steps(run_dir):
        return report
    steps = stored_steps.find(run_dir, verify=True)
    newest = max((one.step for one in steps if one.damage is None), default=None)
    if newest is None:
        raise ValueError(
            f"no checkpoint is sound; {steps[-1].folder} is damaged: {steps[-1].damage}"
        )
    damaged = [
        f"checkpoint {one.folder} is damaged: {one.damage}; "
        + ("it would be set aside" if one.step > newest else f"step {newest} is sound")
        for one in steps
        if one.damage is not None
    ]
    sound = f"{len(steps) - len(damaged)} of {len(steps)} sound, the newest of step {newest:,}"
    return dataclasses.replace(
        report,
        rows=(*report.rows, ("saved", sound)),
        warnings=(*report.warnings, *damaged),
    )


def _bases_to_train(job: Job, mistakes: Collected) -> Iterator[Job]:
    """The jobs of a run's base, of that one's base and so on, as far as they are not finished."""
    base = job.run.base
    while isinstance(base, Run):
        assert job.base_dir is not None
        if base.total_steps in saved_steps(job.base_dir):
            return
        found: Job | None = None
        with mistakes.part():
            found = job.of_base(base)
        if found is None:
            return
        yield found
        job, base = found, base.base


def check_place(run_dir: epath.PathLike) -> None:
    """Refuses a folder that cannot be made or written to; in a bucket that is tried.

    Raises:
      ValueError: with the path that is in the way.
    """
    if buckets.is_bucket(run_dir):
        buckets.check_writable(run_dir)
        return
    place = _existing(run_dir)
    if not os.path.isdir(place):
        raise Mistake(f"--run_dir={os.fspath(run_dir)}: {place} is a file, expected a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise Mistake(f"--run_dir={os.fspath(run_dir)}: no permission to write to {place}")


def _existing(path: epath.PathLike) -> str:
    """A local path, or the nearest folder above it that there is."""
    place = os.path.abspath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    return place


def _checked(job: Job, mistakes: Collected) -> Report:
    run, base, steps = job.run, "", saved_steps(job.run_dir)
    with mistakes.part("Run.base"):
        base = base_lib.check(run, job.base_dir)
    starts = ""
    with mistakes.part("Run.adapters_from"):
        if not steps and job.start is not None:
            starts = job.start.line()
    with mistakes.part("Run.total_steps"):
        if (reached := max(steps, default=0)) > run.total_steps:
            raise ValueError(
                f"Run.total_steps = {run.total_steps:,} is below step {reached:,}, which "
                f"{job.run_dir} has reached; expected at least that"
            )
    trained, frozen = job.parameters.templates
    size = _bytes(job.parameters.state_template(job.optimizer()))
    need, kept = checkpoints_to_come(run, steps, size)
    rows = [
        ("run folder", _standing(job, steps)),
        ("devices", _mesh(job)),
        ("cells", f"{len(job.split.train)} trained on, {len(job.split.held_out)} held out"),
        ("features", _features(job)),
        (
            "vocabulary",
            f"{run.vocabulary.vocab_size:,} ids, {run.model.vocab_size:,} rows of the embedding",
        ),
        (
            "parameters",
            f"{tree.count_parameters(trained):,} trained, {tree.count_parameters(frozen):,} frozen",
        ),
        ("adapted layers", _layers(job)),
        ("base", base),
        ("adapters from", starts),
        ("steps", f"{run.total_steps:,} of batch {run.batch_size}, saved every {run.save_every:,}"),
        ("checkpoints", f"{_size(size)} each, {kept} at a time"),
    ]
    return Report(tuple(row for row in rows if row[1]), tuple(_warnings(job)), need)


def _standing(job: Job, steps: frozenset[int]) -> str:
    if not (job.run_dir / "run.json").exists():
        return "a new one"
    text = f"this run, step {max(steps, default=0):,} of {job.run.total_steps:,}"
    changes = "; ".join(f"{name} {a} -> {b}" for name, (a, b) in job.changes.items())
    return f"{text}, changed: {changes}" if changes else text


def _mesh(job: Job) -> str:
    axes = ", ".join(f"{name} {size}" for name, size in job.mesh.shape.items() if size > 1)
    kind = job.mesh.devices.flat[0].device_kind
    return f"{job.mesh.size} of {kind}" + (f": {axes}" if axes else "")


def _features(job: Job) -> str:
    if job.space is None:
        return ""
    return ", ".join(f"{t.name} {t.num_values}" for t in job.space.types)


def _layers(job: Job) -> str:
    adapters = job.model.adapters
    if adapters is None:
        return ""
    times = sum(match.times for match in job.matches.matched)
    return f"{times} of {', '.join(adapters.targets)}"


def _bytes(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def checkpoints_to_come(run: Run, steps: frozenset[int], size: int) -> tuple[int, int]:
    """Bytes that are needed beside the checkpoints that are there, and how many there will be.

    While one is written, those that are kept are there still.
    """
    left = run.total_steps - max(steps, default=0)
    if left <= 0:
        return 0, len(steps)
    saves = -(-left // run.save_every)
    kept = run.keep + (run.evaluation.keep_best is not None)
    if run.keep_period is not None:
        kept += run.total_steps // run.keep_period
    at_most = min(kept + 1, len(steps) + saves)
    return max(at_most - len(steps), 1) * size, at_most


def _check_space(run_dir: epath.Path, need: int) -> str:
    """How much is free on the disk of a folder.

    Raises:
      ValueError: it is less than the checkpoints need.
    """
    if buckets.is_bucket(run_dir):
        return f"{_size(need)} needed in a bucket"
    place = _existing(run_dir)
    free = shutil.disk_usage(place).free
    if need > free:
        raise ValueError(
            f"--run_dir={run_dir}: the checkpoints to come need {_size(need)} and {place} has "
            f"{_size(free)} left: expected a larger disk, or fewer of them (Run.keep, "
            "Run.save_every) or smaller ones (ranks, targets)"
        )
    return f"{_size(need)} needed for checkpoints, {_size(free)} free"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _warnings(job: Job) -> Iterator[str]:
    run = job.run
    values = run.save_every, run.evaluation.every, run.log_every
    for name, every in zip(_STEPS, values, strict=True):
        if every is not None and every > run.total_steps:
            what = {
                "Run.save_every": "a checkpoint is written at the last step alone",
                "Evaluation.every": "the last step alone is evaluated",
                "Run.log_every": "metrics are written at the last step alone",
            }[name]
            yield f"{name} = {every} is beyond Run.total_steps = {run.total_steps}: {what}"
    split = run.evaluation.split
    known = {s for cell in job.split.cells for s in run.source.splits(cell)}
    if split not in known:
        yield f"Evaluation.split: no cell has the split {split!r}; {did_you_mean(split, known)}"
    if job.space is not None and run.train_values is None and run.adapters_from is None:
        columns = columns_of(job.split.train)
        for of in job.space.types:
            idle = [value for value in of.known_values if value not in columns.get(of.name, ())]
            if idle:
                more = f", nor {len(idle) - 1} more values" if idle[1:] else ""
                yield (
                    f"FeatureType.values: no cell that is trained on has the {of.name} "
                    f"{idle[0]!r}{more}"
                )


def read_data(job: Job) -> list[tuple[str, str]]:
    """Reads the texts that a run will train on and be evaluated on while it trains.

    Returns:
      What was read, for a table.

    Raises:
      ValueError: with file and line, for records that cannot be read: the first of each file.
    """
    mistakes = Collected()
    with mistakes.part():
        compared = job.comparison  # reads every split of every cell
    if mistakes.errors:
        for cell, split in _splits(job, all_of_them=True):
            if len(mistakes.errors) < _FILES:
                with mistakes.part():
                    job.run.source.pairs(cell, split)
        mistakes.tell()
    source: Any = job.run.source
    found: dict[tuple[Cell, str], int] = {}
    if hasattr(source, "pairs") and (compared is None or getattr(source, "prompts", None)):
        for cell, split in _splits(job):
            with mistakes.part():
                found[cell, split] = len(source.pairs(cell, split)[0])
    if job.run.source_text is not None:
        for cell, split in _splits(job):
            with mistakes.part():
                source.sources(cell, split, job.run.source_text)
    if job.run.evaluation.every and hasattr(source, "index"):
        retrieving = [cell for cell in job.split.cells if source.inference(cell) == RETRIEVE]
        for cell in {source.index_path(cell): cell for cell in retrieving}.values():
            with mistakes.part():
                source.index(cell)
    mistakes.tell()
    if compared is None:
        examples = {cell.name: n for (cell, split), n in found.items() if split == TRAIN}
    else:
        examples = {
            name: n - len(compared.dropped.get(name, ())) for name, n in compared.examples.items()
        }
    _check_unchanged(job, examples)
    return [
        ("examples", f"{sum(examples.values()):,} to train on; all of their records can be read")
    ]


def _check_unchanged(job: Job, examples: Mapping[str, int]) -> None:
    """Refuses records that are more or fewer than those that a run in its folder was trained on.

    Whether they are the same is known when they are tokenised, which takes much longer.
    """
    saved = stored_steps.data_position(job.run_dir) or {}
    if examples.keys() == saved.get("sizes", {}).keys():
        check_same(saved, {"sizes": examples})


def _splits(job: Job, *, all_of_them: bool = False) -> Iterator[tuple[Cell, str]]:
    """What a run reads while it trains; or everything that its cells have."""
    source, evaluation = job.run.source, job.run.evaluation
    for cell in job.split.cells:
        for split in source.splits(cell):
            trained = split == TRAIN and cell in job.split.train
            evaluated = split == evaluation.split and evaluation.every is not None
            if trained or evaluated or all_of_them:
                yield cell, split
