"""Trains for a long time, with evaluations, saves and kills, and watches memory and open files.

    python benchmarks/soak.py --minutes 60 --seed 0

One process after another trains the same run; each is killed, or asked to stop, and the next one
goes on. The first lives for two thirds of the time, the others for up to 40 seconds. Of each the
resident memory, that of files left out, and the open file descriptors are read every second. Of
the first one the growth is fitted by least squares over medians of a minute, behind ten minutes in
which the heap comes to its size. Prints it per hour with its standard error, and exits with 1 where
memory grows by more than its allowance with certainty, the life ends with more files than it had,
or a process does not go on.

TensorStore (0.1.71 to 0.1.86) never frees the lists of what it tells as json: of its metrics, for
which orbax asks twice for each item of a checkpoint, and of specifications, for every array. How
much orbax alone grows by when it saves the same arrays again and again is measured at the end, and
taken off before the verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import killing
import numpy as np
import orbax.checkpoint as ocp

from flix_jax.preemption import STATUS
from flix_jax.training.checkpoints import saved_steps

WARM_UP = 600.0  # seconds after the first step, of which at most half are left out
LONG = 2 / 3  # of the time is the first life's
BLOCK = 60.0  # seconds of which a median is taken
ALLOWED = 16.0  # MiB an hour, beside what orbax's saves grow by
REFERENCE = 400  # saves by orbax alone
FLAGS = (
    "--gin.Run.total_steps=100000000",
    "--gin.Run.log_every=70",
    "--gin.Evaluation.every=500",
    "--gin.base/Run.total_steps=12",
)


@dataclasses.dataclass
class Life:
    """One process: seconds since its first step, MiB and descriptors at each sample."""

    ended_by: str
    steps: int
    saves: int
    samples: list[tuple[float, float, int]]

    @property
    def settled(self) -> np.ndarray:
        """Samples behind the warm-up [n, 3]."""
        first = min(WARM_UP, self.samples[-1][0] / 2)
        return np.array([s for s in self.samples if s[0] > first], float)

    @property
    def more_files(self) -> int:
        """Descriptors at the end beyond those at the beginning; of samples with no save under way.

        A save opens files and closes them, so that the fewest of a third of the samples count.
        """
        files, third = self.settled[:, 2], len(self.settled) // 3
        return int(files[-third:].min() - files[:third].min())

    def slope(self, column: int) -> tuple[float, float]:
        """Of MiB (1) or descriptors (2), per hour, and its standard error."""
        settled = self.settled
        minute = (settled[:, 0] // BLOCK).astype(int)
        medians = np.array([np.median(settled[minute == m], axis=0) for m in np.unique(minute)])
        hours, values = medians[:, 0] / 3600, medians[:, column]
        if len(hours) < 4:
            sys.exit(f"{len(hours)} minutes behind the warm-up tell nothing: give more --minutes")
        (slope, _), covariance = np.polyfit(hours, values, 1, cov=True)
        return float(slope), float(np.sqrt(covariance[0, 0]))


def memory(process: Path) -> float:
    """MiB of a process that no file holds: pages of libraries come and go with those of others."""
    lines = (process / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def live(folder: Path, run_dir: Path, lifetime: float, number: int, flags: list[str]) -> Life:
    """Trains for so many seconds from the first step on, and ends that by a signal."""
    attempt = killing.Attempt(folder, run_dir, 1, flags)
    process = Path("/proc") / str(attempt.processes[0].pid)
    samples: list[tuple[float, float, int]] = []
    first: float | None = None
    while attempt.runs:
        now = time.monotonic()
        if first is None and attempt.told().steps["run"]:
            first = now
        if first is not None:
            if now - first > lifetime:
                break
            with contextlib.suppress(OSError):  # it has just ended by itself, which is told below
                files = len(os.listdir(process / "fd"))
                samples.append((now - first, memory(process), files))
        time.sleep(1.0)
    attempt.send(number, [0])
    statuses = attempt.wait(60)
    expected = -signal.SIGKILL if number == signal.SIGKILL else STATUS
    if statuses != [expected]:
        tail = attempt.log.read_text()[-2000:]
        sys.exit(f"a life ended with {statuses}, expected {expected}:\n{tail}")
    told = attempt.told()
    saves = sum(name == "saving" for name, _ in told.phases)
    return Life(signal.Signals(number).name, len(told.steps["run"]), saves, samples)


def growth_of_orbax(checkpoint: Path) -> float:
    """MiB by which a process grows with each save of a checkpoint's arrays by orbax alone."""
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("trained", "optimizer")}
    reader = ocp.StandardCheckpointer()
    items = {name: reader.restore(checkpoint / name) for name in handlers}
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    resident = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager,
    ):
        for step in range(REFERENCE):
            args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
            manager.save(step, args=ocp.args.Composite(**args))
            resident.append(memory(Path("/proc/self")))
    settled = resident[REFERENCE // 4 :]
    return float(np.polyfit(np.arange(len(settled)), settled, 1)[0])


def reference(folder: Path) -> float:
    """`growth_of_orbax` in a process of its own, of the newest checkpoint of the run."""
    steps = folder / "run" / "checkpoints"
    newest = steps / str(max(saved_steps(steps)))
    command = [sys.executable, __file__, "--growth_of_orbax", str(newest)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=2000, help="steps, of some 10 ms")
    parser.add_argument("--folder", type=Path, help="where all lies (default: a temporary one)")
    parser.add_argument("--growth_of_orbax", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.growth_of_orbax:
        print(growth_of_orbax(arguments.growth_of_orbax))
        return 0
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak_"))
    killing.write(folder)
    flags = [*FLAGS, f"--gin.Run.save_every={arguments.save_every}"]
    draw = random.Random(arguments.seed)
    end = time.monotonic() + 60 * arguments.minutes
    lives: list[Life] = []
    while (left := end - time.monotonic()) > 0:
        lifetime = draw.uniform(1, 40) if lives else LONG * left
        number = draw.choice((signal.SIGKILL, signal.SIGTERM))
        life = live(folder, folder / "run", lifetime, number, flags)
        lives.append(life)
        held, files = life.samples[-1][1:] if life.samples else (0.0, 0)
        print(
            f"life {len(lives)}: {lifetime:.0f} s, {life.steps} steps, {life.saves} saves, "
            f"{life.ended_by}, {held:.0f} MiB and {files} files at its end",
            flush=True,
        )
    long = lives[0]
    print(f"{len(lives)} lives, {sum(life.steps for life in lives)} steps; of the first:")
    mean, error = long.slope(1)
    print(f"memory: {mean:+.2f} ± {error:.2f} MiB an hour")
    print("files: {:+.2f} ± {:.2f} descriptors an hour".format(*long.slope(2)))
    saves = 3600 * long.saves / long.samples[-1][0]
    plain = reference(folder)
    print(
        f"saves: {saves:.0f} an hour; all growth is {1024 * mean / saves:.0f} KiB a save, that of "
        f"orbax alone with the same arrays {1024 * plain:.0f} KiB"
    )
    mean -= saves * plain
    print(f"memory beside orbax's: {mean:+.2f} MiB an hour")
    grows = mean - 2 * error > ALLOWED
    print("verdict: " + ("memory grows" if grows else "memory does not grow"), end=", ")
    print("files grow" if long.more_files > 0 else "files do not")
    if arguments.folder is None:
        shutil.rmtree(folder)
    return bool(grows or long.more_files > 0)


if __name__ == "__main__":
    sys.exit(main())
