"""SLURM: a batch script for a cluster of GPUs."""

from __future__ import annotations

import dataclasses
import os
import shlex

from flix_jax.experiments.launch.job import Job
from flix_jax.experiments.launch.shell import Shell
from flix_jax.experiments.launch.worker import SCRIPT
from flix_jax.preemption import STATUS

BATCH = "job.sbatch"
LOG = "log"

_TEMPLATE = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --gpus-per-node={gpus}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@60
{more}set -euo pipefail
# After a preemption, at its time limit or after the loss of a node the job is queued again, and the
# run goes on from its last checkpoint.
if ((${{SLURM_RESTART_COUNT:-0}} > {restarts})); then
  echo "no restart is left" >&2
  exit 1
fi
export FLIX_COMMIT={version}
cd {folder}
bash {script} install
# A process a GPU, which is how JAX finds its processes under SLURM.
status=0
srun bash {script} train || status=$?
if ((status == {stopped})); then # asked to stop, with all saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What is asked of SLURM.

    Attributes:
      nodes: machines.
      gpus: of each.
      extra: further options of sbatch, such as '--partition=a100'.
    """

    nodes: int = 1
    gpus: int = 8
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("nodes", self.nodes), ("gpus_per_node", self.gpus)):
            if value < 1:
                raise ValueError(f"--{name}={value}: expected at least 1")

    @property
    def devices(self) -> int:
        return self.nodes * self.gpus

    @property
    def jax_devices(self) -> int:
        """As JAX counts them."""
        return self.devices

    def __str__(self) -> str:
        nodes = f"{self.nodes} node{'s' * (self.nodes > 1)}"
        return f"{nodes} of {self.gpus} GPUs: {self.devices} GPUs"


def script(job: Job, allocation: Allocation, restarts: int) -> str:
    """The batch script: installs once in the launched folder, which all nodes see, and trains."""
    folder = os.path.abspath(job.folder)
    return _TEMPLATE.format(
        name=job.name,
        nodes=allocation.nodes,
        gpus=allocation.gpus,
        log=os.path.join(folder, LOG),
        more="".join(f"#SBATCH {option}\n" for option in allocation.extra),
        restarts=restarts,
        version=job.checkout.version,
        folder=shlex.quote(folder),
        script=SCRIPT,
        stopped=STATUS,
    )


def submit(job: Job, shell: Shell) -> None:
    """Queues the job; sbatch prints its number."""
    shell.check(["sbatch", os.path.join(job.folder, BATCH)])


def follow(job_folder: str) -> list[str]:
    """The command that shows the job's log until it is interrupted."""
    return ["tail", "--lines=+1", "--follow=name", "--retry", os.path.join(job_folder, LOG)]


def delete(name: str) -> list[str]:
    """The command that takes a job out of the queue, or ends it."""
    return ["scancel", f"--name={name}"]
