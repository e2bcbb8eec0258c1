"""Training a run in its folder, from wherever it stands."""

from __future__ import annotations

import contextlib
import functools
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from flix_jax import preemption, processes
from flix_jax.adapters import tree
from flix_jax.data.pipeline import TrainPipeline
from flix_jax.evaluation import files
from flix_jax.experiments import (
    checks,
    data_notes,
    dumps,
    ensembles,
    flops,
    inference,
    parity,
    scoring,
    topology,
)
from flix_jax.experiments.claims import Claims
from flix_jax.experiments.job import Job
from flix_jax.experiments.replay import replay
from flix_jax.experiments.run import Run
from flix_jax.experiments.run_folder import saved_steps
from flix_jax.experiments.step_program import step_program
from flix_jax.training import tracing
from flix_jax.training.checkpoints import Checkpoints, digest
from flix_jax.training.loop import REPORT, UNEVALUATED, fit
from flix_jax.training.not_finite import NotFinite
from flix_jax.training.reporting import Reporter, read_metrics
from flix_jax.training.step import TrainState

_logger = logging.getLogger(__name__)


def train(
    run: Run,
    run_dir: epath.PathLike,
    *,
    bases_dir: epath.PathLike | None = None,
    config: str | None = None,
    title: str = "train",
    show_cells: bool = True,
    profile: tuple[int, int] | None = None,
    allow_changes: Sequence[str] = (),
    strict: bool = False,
    check_parity: bool = False,
) -> Job:
    """Trains ``run`` in ``run_dir`` up to its last step, its base first if that is a run.

    Args:
      run: what is trained.
      run_dir: the run's folder; one that holds the run already goes on where it stood.
      bases_dir: where a base that is a run is trained, by default ``<run_dir>/bases``. Runs that
        share it share their bases.
      config: the operative gin config, kept as ``config.gin``.
      title: what the progress display calls the run.
      show_cells: whether the log has the table of tasks and languages too, beside ``cells.txt``.
      profile: the first and the last step of which a trace is written to ``profile``.
      allow_changes: what may differ from the run that the folder holds; see `check_folder`.
      strict: whether a damaged checkpoint is an error; else it is set aside, with a warning, and
        training goes on from the newest sound one.
      check_parity: whether loss and gradient of one batch are compared with float32's first.

    Raises:
      ValueError: before any compute, in one line, for whatever in the run cannot work.
      NotFinite: a loss or gradient is not finite; with the step, its cells, the first module
        concerned and where the dump is.
    """
    # A mistake is better found before anything is trained than after.
    job, report = checks.start(run, run_dir, bases_dir=bases_dir, allow_changes=allow_changes)
    files.clear(job.run_dir)
    saved = saved_steps(job.run_dir)
    start = None if saved else job.start
    if profile is not None:
        _check_profile(profile, max(saved, default=0) + 1, run.total_steps)
    train_base(job, bases_dir=bases_dir, title=title, show_cells=show_cells)
    base = job.load_base()
    with preemption.phase("reading the data"):
        pipeline = job.pipeline()
    optimizer = job.optimizer()
    origin = job.base_digest(base)  # hashed once: a base may be large
    template = job.parameters.state_template(optimizer)

    with contextlib.ExitStack() as stack:
        warn = None if strict else _logger.warning
        checkpoints = stack.enter_context(job.checkpoints(base, origin=origin, warn=warn))
        resumed = checkpoints.resume(template, pipeline.check_state)
        if resumed is not None:
            state, data_state = resumed
            frozen = job.frozen_parameters(base)
        else:
            trained, frozen = job.initial_parameters(base, origin=origin)
            state, data_state = job.parameters.create_state(trained, optimizer), None
            del trained
        del base
        evaluate = _evaluation(job, frozen) if run.evaluation.every else None
        batches = stack.enter_context(job.batches(pipeline, int(state.step)))

        job.note_folder(int(state.step))
        data = pipeline.report()
        notes = data_notes.write(job, data)
        keep_config(job, config)
        reporter = stack.enter_context(
            Reporter(
                job.run_dir,
                total_steps=run.total_steps,
                start_step=int(state.step),
                log_every=run.log_every,
                wait_seconds=lambda: batches.wait_seconds,
                devices=job.mesh.size,
                utilization=_utilization(job, pipeline),
                title=title,
                hparams=run.hparams(),
                wandb_project=run.wandb_project,
                resumed=(data_state or {}).get(REPORT),
                skips_in_a_row=run.skips_in_a_row,
            )
        )
        reporter.say(f"{title}: {_summary(job, state)}, in {job.run_dir}")
        if start is not None:
            reporter.say(f"{title}: {start.line()}")
        if show_cells:
            reporter.say(f"{title}: training examples by cell\n{job.cells_table(data)}")
        for name, (before, now) in job.changes.items():
            reporter.say(
                f"{title}: changed from step {int(state.step)} on: {name} {before} -> {now}"
            )
        for note in [*report.warnings, *notes]:
            reporter.say(f"{title}: {note}")
        if checkpoints.best is not None:
            step, value = checkpoints.best
            reporter.say(
                f"{title}: best so far step {step}, {run.evaluation.keep_best} {value:.2f}"
            )
        if check_parity:
            with preemption.phase("comparing with float32"):
                found = parity.measure(job, state, frozen, pipeline)
            reporter.say(f"{title}: {found.line()}")
            found.check()
        program = step_program(job, template)
        step_fn = tracing.telling_compilations(program, lambda s: reporter.say(f"{title}: {s}"))
        if profile is not None:
            folder, start_step = job.run_dir / "profile", int(state.step)
            step_fn = tracing.traced(step_fn, *profile, start_step=start_step, folder=folder)
        failure: NotFinite | None = None
        try:
            fit(
                state,
                frozen,
                step_fn=step_fn,
                seed=run.seed,
                batches=batches,
                checkpoints=checkpoints,
                reporter=reporter,
                total_steps=run.total_steps,
                saves_at=run.saves_at,
                eval_every=run.evaluation.every,
                evaluate=evaluate,
                judge=scoring.judge(run, job.split),
                unevaluated=(data_state or {}).get(UNEVALUATED, False),
            )
        except NotFinite as error:
            failure = error.with_traceback(None)  # whose frames hold the state
        if failure is not None:
            batches.close()  # its thread asks for examples, too
            raise _explained(job, failure, checkpoints, pipeline, program, template, frozen, origin)
    return job


def _explained(
    job: Job,
    error: NotFinite,
    checkpoints: Checkpoints,
    pipeline: TrainPipeline,
    program: Any,
    template: TrainState,
    frozen: Any,
    origin: str,
) -> NotFinite:
    """The error with cells and the first module concerned, of a step that is made again, dumped."""
    cells = dumps.cells_of(pipeline.origins_at(error.step - 1))
    try:
        checkpoints.wait()
        replayed = replay(
            job,
            checkpoints,
            pipeline,
            program,
            template,
            frozen,
            error.step,
            first_bad_state=error.in_state,
        )
        findings = dumps.look(job, replayed, frozen)
        origins = pipeline.origins_at(replayed.step - 1)
        folder = dumps.write(job, replayed, findings, origins, origin=origin)
    except (ValueError, OSError, RuntimeError) as reason:
        told = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
        return NotFinite(f"{error}, with {cells}; it could not be made again: {told}", error.step)
    if replayed.problem is None:
        where = "made again it is finite: a fault of the device, or a program that is not exact"
    else:
        again = "" if replayed.step == error.step else f"step {replayed.step}, "
        where = f"first not finite: {again}{findings.first or replayed.problem}"
    return NotFinite(
        f"{error}, with {dumps.cells_of(origins)}; {where}; dumped in {folder} "
        f"(flix diagnose --run_dir={job.run_dir})",
        error.step,
    )


def _check_profile(profile: tuple[int, int], first: int, last: int) -> None:
    if not first <= profile[0] <= profile[1] <= last:
        raise ValueError(
            f"--profile={profile[0]}:{profile[1]}: expected steps of those that are trained now, "
            f"{first} to {last}"
        )


def _utilization(job: Job, pipeline: TrainPipeline) -> Callable[[int], float] | None:
    """By step, the share of the devices' peak that it would be if it took a second."""
    peak = topology.peak_flops(job.mesh.devices.flat[0].device_kind)
    if peak is None:
        return None

    @functools.cache
    def share(lengths: tuple[tuple[str, int], ...]) -> float:
        return flops.model_flops(job, dict(lengths)) / (peak * job.mesh.size)

    return lambda step: share(tuple(pipeline.lengths_at(step - 1).items()))


def train_base(
    job: Job, *, bases_dir: epath.PathLike | None, title: str, show_cells: bool = False
) -> None:
    """Trains the base of a job, where that is a run which is not finished; one worker does.

    Others that need the same base wait until it is there, or until that worker is gone.
    """
    base = job.run.base
    if not isinstance(base, Run):
        return
    assert job.base_dir is not None
    base_dir = job.base_dir

    def is_finished() -> bool:
        # Of checkpoints opened by orbax all processes would have to ask together.
        return base.total_steps in processes.from_first(lambda: sorted(saved_steps(base_dir)))

    if is_finished():
        return
    with claim(base_dir):
        if not is_finished():  # another may have been before us
            train(
                base,
                base_dir,
                bases_dir=bases_dir,
                title=f"{title}: base",
                show_cells=show_cells,
            )


@contextlib.contextmanager
def claim(folder: epath.Path) -> Iterator[None]:
    """Holds a folder for the processes of this run, of which the first one claims it."""
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            stack.enter_context(Claims()).wait_for(folder)
        processes.wait_for_first()
        yield


def keep_config(job: Job, config: str | None) -> None:
    """Writes the operative config to the run's folder."""
    if config is not None:
        files.write_text(job.run_dir / "config.gin", config)


def trained_parameters(job: Job) -> int:
    """How many parameters a run trains.

    Columns beyond the rank of a feature do not count, nor do values that `Run.train_values` leaves
    as they are.
    """
    shapes = job.parameters.templates[0]
    if job.space is None:
        return tree.count_parameters(shapes)
    chosen = job.trained_values
    return sum(
        count
        for name, of in tree.adapter_counts(shapes, job.space).items()
        for value, count in of.items()
        if chosen is None or value in chosen[name]
    )


def measures(job: Job, share: float = 1.0) -> dict[str, float]:
    """How many parameters are trained, and the median time of a step in the run's log.

    Args:
      job: a run that is trained.
      share: of a step's time that is this run's, where several ran as one program.
    """
    found = {"parameters": float(trained_parameters(job))}
    lines = read_metrics(job.run_dir / "metrics.jsonl")
    rates = [line["steps_per_second"] for line in lines if line.get("steps_per_second")]
    if rates:  # the first window holds the compilation
        found["step_seconds"] = share / statistics.median(rates[1:] or rates)
    return found


def _evaluation(job: Job, frozen: Any) -> Callable[[int, Any], Mapping[str, Mapping[str, float]]]:
    job = ensembles.evaluated(job)
    limit = scoring.examples_per_cell(job.run, job.split.cells)
    evaluator = inference.evaluator(job, job.run.evaluation.split, limit)
    frozen_digest = digest(frozen)

    def evaluate(step: int, trained: Any) -> Mapping[str, Mapping[str, float]]:
        return evaluator.evaluate(
            job.predictors(trained, frozen),
            job.run_dir,
            step,
            fingerprint=inference.fingerprint(job, trained, frozen_digest),
        )

    return evaluate


def _summary(job: Job, state: TrainState) -> str:
    trained = trained_parameters(job)
    still = tree.count_parameters(job.parameters.templates[1])
    of = ""
    if job.space is not None and job.trained_values is not None:
        chosen = sum(map(len, job.trained_values.values()))
        of = f" ({chosen} of {job.space.num_features} features)"
    return (
        f"{trained:,} parameters trained{of}, {still:,} frozen, {len(job.split.train)} cells "
        f"({len(job.split.held_out)} held out), batch {job.run.batch_size}, "
        f"step {int(state.step)} of {job.run.total_steps}"
    )
