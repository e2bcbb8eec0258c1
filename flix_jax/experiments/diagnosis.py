"""What happened in a training step: made again, with a look at every module (`flix diagnose`)."""

from __future__ import annotations

import dataclasses

from etils import epath

from flix_jax.experiments import dumps
from flix_jax.experiments.job import Job
from flix_jax.experiments.replay import Replayed, make, replay, step_before
from flix_jax.experiments.run import Run
from flix_jax.experiments.step_program import step_program
from flix_jax.training.watching import Findings


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A step, and what was seen of it.

    Attributes:
      replayed: the step.
      findings: of its modules and gradients.
      cells: of its batch, with the number of their examples.
      source: from what it was made again.
    """

    replayed: Replayed
    findings: Findings
    cells: str
    source: str

    def text(self) -> str:
        """The table of modules and gradients, below what is so of the whole step."""
        step, first = self.replayed, self.findings.first
        metrics = "  ".join(f"{name} {value:.8g}" for name, value in step.metrics.items())
        lines = [
            f"step {step.step}, from {self.source}",
            metrics,
            f"cells: {self.cells}",
            f"not finite: {step.problem or 'nothing'}",
            f"first: {first}" if first else "first: no module and no gradient",
        ]
        return "\n".join(lines) + f"\n\n{self.findings.table()}"


def diagnose(
    run: Run,
    run_dir: epath.PathLike,
    *,
    step: int | None = None,
    bases_dir: epath.PathLike | None = None,
) -> Diagnosis:
    """Makes one step of a run again, from its dump or from a checkpoint before it.

    Args:
      run: the run.
      run_dir: its folder.
      step: which, from 1; None is the last that was dumped.
      bases_dir: as for `training.train`.

    Raises:
      ValueError: there is no such step, or what it is made from cannot be read.
    """
    job = Job(run, run_dir, bases_dir=bases_dir)
    dumped = dumps.steps(job.run_dir)
    if step is None:
        if not dumped:
            raise ValueError(
                f"{job.run_dir / dumps.FOLDER} holds no dump of a step; --step=N makes one again"
            )
        step = dumped[-1]
    if not 1 <= step <= run.total_steps:
        raise ValueError(f"step {step}: expected one of 1 to {run.total_steps}")
    base = job.load_base()
    origin = job.base_digest(base)
    frozen = job.frozen_parameters(base)
    del base
    optimizer = job.optimizer()
    template = job.parameters.state_template(optimizer)
    program = step_program(job, template)
    if step in dumped:
        state, batch, record = dumps.read(job, step, template, origin=origin)
        replayed = make(program, state, frozen, batch, run.seed)
        cells, source = record["cells"], str(dumps.folder_of(job.run_dir, step))
    else:
        pipeline = job.pipeline()
        with job.checkpoints(None, create=False, origin=origin) as checkpoints:
            before = step_before(checkpoints, step)
            replayed = replay(job, checkpoints, pipeline, program, template, frozen, step)
        cells = dumps.cells_of(pipeline.origins_at(step - 1))
        source = "the beginning" if before is None else f"the checkpoint of step {before}"
    return Diagnosis(replayed, dumps.look(job, replayed, frozen), cells, source)
