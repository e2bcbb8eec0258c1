"""Cloud TPU VMs and queued resources: made, waited for, trained on, followed, made again."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping

from flix_jax.experiments.launch.accelerators import Slices
from flix_jax.experiments.launch.job import Job
from flix_jax.experiments.launch.shell import Shell, named
from flix_jax.experiments.launch.worker import LOST, SCRIPT

CAPACITIES = ("on_demand", "spot", "reserved")

# States of the two APIs in which there is nothing left to wait for.
READY = ("READY", "ACTIVE")
GONE = ("PREEMPTED", "TERMINATED", "SUSPENDING", "SUSPENDED")
FAILED = ("FAILED", "STOPPED", "HIDDEN", "UNKNOWN")
GOING = ("SUSPENDING", "DELETING", "STOPPING")  # to be waited out before they are made again

CONNECTION_LOST = 255  # of ssh, which gcloud passes on as it does a command's own status
TRIES = 3  # of an installation, whose package index may be out of reach for a moment


class Lost(Exception):
    """The machines went away under a run, or cannot be had again now: start again if asked to."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of the API.

    Attributes:
      slices: what the machines have.
      runtime: the software version of the VMs.
      capacity: one of `CAPACITIES`.
      labels: of the machines.
      extra: further flags of the command that creates them.
    """

    slices: Slices
    runtime: str
    capacity: str = "on_demand"
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extra: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Machines:
    """The machines of one name: a TPU VM, or a queued resource of one slice or more.

    Attributes:
      name: of them.
      queued: whether they are a queued resource, which waits for its capacity.
      zone, project: where they are; the project may be left to gcloud's own configuration.
    """

    name: str
    queued: bool
    zone: str
    project: str | None = None

    def _gcloud(self, action: str, *arguments: str) -> list[str]:
        group = "queued-resources" if self.queued else "tpu-vm"
        place = [f"--zone={self.zone}"]
        if self.project:
            place.append(f"--project={self.project}")
        return ["gcloud", "compute", "tpus", group, action, *arguments, *place]

    def create(self, request: Request) -> list[str]:
        """Makes them; of a TPU VM it returns when it is there, of a queued resource at once.

        Raises:
          ValueError: several slices of a TPU VM.
        """
        slices, what = request.slices, []
        if slices.usual:
            what.append(f"--accelerator-type={slices.accelerator_type}")
        else:
            what += [f"--type={slices.name}", f"--topology={slices.shape}"]
        if not self.queued and slices.count > 1:
            raise ValueError(
                f"--engine=tpu_vm makes one slice, not {slices.count}; "
                "--engine=queued_resource makes several that know of each other"
            )
        if not self.queued:
            what.append(f"--version={request.runtime}")
        elif slices.count > 1:
            what.append(f"--runtime-version={request.runtime}")
            what += [f"--node-count={slices.count}", f"--node-prefix={self.name}"]
        else:
            what += [f"--runtime-version={request.runtime}", f"--node-id={self.name}"]
        if request.capacity != "on_demand":
            what.append(f"--{request.capacity}")
        labels = ",".join(f"{key}={value}" for key, value in request.labels.items())
        return self._gcloud("create", self.name, *what, f"--labels={labels}", *request.extra)

    def describe(self) -> list[str]:
        """Prints their state."""
        field = "state.state" if self.queued else "state"
        return self._gcloud("describe", self.name, f"--format=value({field})")

    def delete(self) -> list[str]:
        """Deletes them, and of a queued resource its nodes, without a question."""
        force = ["--force"] if self.queued else []
        return self._gcloud("delete", self.name, *force, "--quiet")

    def ssh(self, command: str, *, everywhere: bool) -> list[str]:
        """Runs a command on every worker, or on the first."""
        where = "all" if everywhere else "0"
        nodes = [f"--node={where}"] if self.queued else []
        workers = [f"--worker={where}", *nodes]
        return self._gcloud("ssh", self.name, *workers, f"--command={command}", "--quiet")

    def state(self, shell: Shell, *, assumed: str = "READY") -> str | None:
        """The state that the API has for them; None if there are none.

        Raises:
          ValueError: it does not answer.
        """
        argv = self.describe()
        done = shell.run(argv, quiet=True, assumed=assumed)
        if done.status and "NOT_FOUND" in done.errors:
            return None
        if done.status:
            raise ValueError(f"{named(argv)}: {done.reason}")
        return done.output or None


def launch(
    job: Job, machines: Machines, request: Request, shell: Shell, *, restarts: int, detach: bool
) -> None:
    """Trains a job on machines that are made if they are not there, and follows its log.

    Args:
      job: what is trained; its launched folder is in its bucket.
      machines: to train it on.
      request: by which they are made.
      shell: that runs the commands.
      restarts: how often it may start again after the machines were preempted or restarted; the
        preempted ones are deleted then, for their name is needed.
      detach: return as soon as training has started.

    Raises:
      ValueError: in one line: no machines, no restarts left, or training failed.
    """
    for left in reversed(range(restarts + 1)):
        try:
            again = left < restarts
            _obtain(machines, request, shell, again=again, may_delete=restarts > 0)
            _start(job, machines, shell, again=again)
            if not detach:
                follow(machines, shell)
            return
        except Lost as lost:
            if not left:
                raise ValueError(
                    f"{machines.name}: {lost}, and no restart is left; the same command goes on "
                    "from the last checkpoint (--restarts=N starts again by itself)"
                ) from None
            shell.say(f"{lost}; starting again from the last checkpoint ({left - 1} restarts left)")
            shell.wait()


def follow(machines: Machines, shell: Shell) -> None:
    """Shows the log of the first worker until training ends there.

    Raises:
      Lost: the machines were preempted or restarted.
      ValueError: training failed.
    """
    argv = machines.ssh(f"bash {_folder(machines)}/{SCRIPT} follow", everywhere=False)
    while True:
        done = shell.run(argv)
        if not done.status:
            return
        # The state may lag behind what became of the machines.
        shell.wait()
        state = machines.state(shell)
        if state is None or state in GONE:
            raise Lost(f"the machines were preempted ({state or 'they are gone'})")
        if done.status == LOST or state not in READY:
            raise Lost(f"a worker was stopped or restarted ({state})")
        if done.status == CONNECTION_LOST:
            shell.say("the connection was lost; following again")
            continue
        # The first worker fails, too, where it loses another one.
        lost = machines.ssh(f"bash {_folder(machines)}/{SCRIPT} lost", everywhere=True)
        if shell.run(lost, quiet=True).status == LOST:
            raise Lost("a worker was stopped or restarted")
        raise ValueError(
            f"training failed on {machines.name} with status {done.status}: see its log above; "
            "the machines are still there"
        )


def _obtain(
    machines: Machines, request: Request, shell: Shell, *, again: bool, may_delete: bool
) -> None:
    """Makes the machines if they are not there, and waits until they are ready."""
    state = machines.state(shell, assumed="")
    while state in GOING:
        shell.wait()
        state = machines.state(shell)
    if state in GONE or (state in FAILED and again):
        if not may_delete:
            raise ValueError(
                f"{machines.name} is there and {state}: delete it (--action=delete), or give "
                "--restarts=N, by which such machines are deleted and made again"
            )
        shell.check(machines.delete())
        state = None
    if state is None:
        _create(machines.create(request), machines, shell, again=again)
        state = machines.state(shell)
    seen = None
    while state not in READY:
        if state is None or state in GONE:
            raise Lost(f"the machines were preempted before they were ready ({state or 'gone'})")
        if state in FAILED:
            raise ValueError(f"{machines.name} is {state}: {_why(machines, shell)}")
        if state != seen:
            shell.say(f"{machines.name}: {state}")
        seen = state
        shell.wait()
        state = machines.state(shell)


def _create(argv: list[str], machines: Machines, shell: Shell, *, again: bool) -> None:
    done = shell.run(argv)
    if not done.status:
        return
    if again:  # after a preemption there may be no capacity for a while
        raise Lost(f"no machines: {done.reason}")
    hint = "" if machines.queued else "; --engine=queued_resource waits for capacity"
    raise ValueError(f"{named(argv)}: {done.reason}{hint}")


def _why(machines: Machines, shell: Shell) -> str:
    """What the API says of machines that failed, in one line."""
    argv = [word for word in machines.describe() if not word.startswith("--format=")]
    done = shell.run([*argv, "--format=value(state)"], quiet=True)
    return " ".join(done.output.split()) or "no reason is given"


def _start(job: Job, machines: Machines, shell: Shell, *, again: bool) -> None:
    folder = _folder(machines)
    if again:  # workers that are left over wait for those that were lost
        script = f"{folder}/{SCRIPT}"
        _everywhere(f"if [ -e {script} ]; then bash {script} stop; fi", machines, shell)
    copy = f"gcloud storage rsync --recursive {shlex.quote(job.bucket)} {folder}"
    install = f"mkdir -p {folder} && {copy} && bash {folder}/{SCRIPT} install"
    _everywhere(install, machines, shell)
    _everywhere(f"bash {folder}/{SCRIPT} start", machines, shell)


def _everywhere(command: str, machines: Machines, shell: Shell) -> None:
    argv = machines.ssh(command, everywhere=True)
    for left in reversed(range(TRIES)):
        done = shell.run(argv)
        if not done.status:
            return
        shell.wait()
        state = machines.state(shell)
        if state not in READY:
            raise Lost(f"the machines went away while they were set up ({state or 'gone'})")
        if not left:
            raise ValueError(f"{named(argv)}, {TRIES} times: {done.reason}")


def _folder(machines: Machines) -> str:
    """Of the launched folder on a worker, from its home."""
    return f"flix/{machines.name}"


def fetch(run_dir: str, folder: str, shell: Shell) -> None:
    """Copies a run's folder from its bucket, but for checkpoints and what was launched."""
    shell.check(["mkdir", "-p", folder])
    big = "--exclude=^(bases|checkpoints|launch)/"
    shell.check(["gcloud", "storage", "rsync", "--recursive", big, run_dir, folder])
