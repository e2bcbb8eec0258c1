"""What a sweep would do and cost, without doing it."""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from flix_jax.adapters import text_tables
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import Run
from flix_jax.experiments.step_program import step_of
from flix_jax.experiments.sweep import Sweep
from flix_jax.experiments.together import reasons
from flix_jax.experiments.training import trained_parameters
from flix_jax.experiments.trial_records import read_record, trial_dir
from flix_jax.experiments.workers import duration

TIMED_STEPS = 3
LARGEST_TIMED = 0.5  # of the host's memory; a larger step is not run to be timed


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program of trials costs.

    Attributes:
      parameters: trained ones of each trial.
      memory: bytes of the step's arguments and temporary arrays on a device.
      compile_seconds: of the step, once a program.
      step_seconds: of a trial's step; None where it is too large to be run here.
    """

    parameters: tuple[int, ...]
    memory: int
    compile_seconds: float
    step_seconds: float | None


def describe(
    sweep: Sweep, runs: Sequence[Run], programs: Sequence[Sequence[int]], run_dir: epath.PathLike
) -> str:
    """The trials, their programs and costs, as text; compiles one step for each program.

    Args:
      sweep, runs: the trials' runs in the order of `sweep.trials()`.
      programs: which of them train together.
      run_dir: the sweep's folder, which is read and not written to.
    """
    trials = sweep.trials()
    number = {place: n for n, places in enumerate(programs, 1) for place in places}
    costs = [cost([runs[p] for p in places], run_dir, trials[places[0]]) for places in programs]
    parameters = {
        place: count
        for places, found in zip(programs, costs, strict=True)
        for place, count in zip(places, found.parameters, strict=True)
    }
    rows = [["trial", "state", "program", "trained parameters", "changes"]]
    for place, trial in enumerate(trials):
        state = read_record(run_dir, trial).state
        changes = "; ".join((*trial.bindings, f"SEED = {trial.seed}"))
        rows.append([str(trial), state, str(number[place]), f"{parameters[place]:,}", changes])
    parts = [f"{sweep.name}: {len(trials)} trials in {len(programs)} programs"]
    parts.append(text_tables.plain(rows))
    rows = [["program", "trials", "memory", "compile", "training", "of its own, because"]]
    total: float | None = 0.0
    told = zip(programs, costs, reasons(runs, programs), strict=True)
    for n, (places, found, reason) in enumerate(told, 1):
        seconds = None
        if found.step_seconds is not None:
            steps = runs[places[0]].total_steps * len(places)
            seconds = found.compile_seconds + found.step_seconds * steps
        total = None if seconds is None or total is None else total + seconds
        rows.append(
            [
                str(n),
                str(len(places)),
                f"{found.memory / 2**20:,.0f} MiB",
                duration(found.compile_seconds),
                "too large to time here" if seconds is None else duration(seconds),
                reason,
            ]
        )
    parts.append(text_tables.plain(rows))
    if total is not None:
        parts.append(
            f"about {duration(total)} of training on this machine, one program after another; "
            "bases, reading of data and evaluation come on top"
        )
    if any(run.lengths_per_side for run in runs):
        parts.append(
            "steps are those of the longest batches that Run.length_buckets has, of which one is "
            "compiled: shorter ones take less, and each length is compiled, too"
        )
    return "\n\n".join(parts)


def cost(runs: Sequence[Run], run_dir: epath.PathLike, trial: object) -> Cost:
    """What the runs of a program cost, from the step of the widest of them by itself."""
    bases_dir = os.path.join(run_dir, "bases")
    jobs = [Job(run, trial_dir(run_dir, trial), bases_dir=bases_dir) for run in runs]  # type: ignore[arg-type]
    counts = tuple(trained_parameters(job) for job in jobs)
    job = jobs[counts.index(max(counts))]
    run = job.run
    optimizer = job.optimizer()
    state, frozen = job.parameters.state_template(optimizer), job.frozen_template
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32)
        for name, shape in job.batch_shapes(run.batch_size).items()
    }
    started = time.monotonic()
    step = step_of(job, state)
    compiled = jax.jit(step).lower(state, frozen, batch, 0).compile()
    compile_seconds = time.monotonic() - started
    sizes: Any = compiled.memory_analysis()
    more = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    memory = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + more * (len(runs) - 1)
    seconds = None
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory < LARGEST_TIMED * room:
        zeros = jax.tree.map(
            lambda leaf: jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding),
            (state, frozen),
        )
        arrays = {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in batch.items()}
        if "feature_ids" in arrays:
            arrays["feature_ids"] = jnp.zeros_like(arrays["feature_ids"])
        jax.block_until_ready(compiled(*zeros, arrays, 0))
        started = time.monotonic()
        for _ in range(TIMED_STEPS):
            jax.block_until_ready(compiled(*zeros, arrays, 0))
        seconds = (time.monotonic() - started) / TIMED_STEPS
    return Cost(counts, memory, compile_seconds, seconds)
