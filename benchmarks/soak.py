"""Trains for a long time, with evaluations, saves and kills, and watches memory and open files.

    python benchmarks/soak.py --minutes 60 --seed 0

One process after another trains the same run; each is killed, or asked to stop, after a lifetime
that is drawn, and the next one goes on. Of each the resident memory, that of files left out, and
the open file descriptors are read every second. Of lives that are long enough the slope after the
first part is fitted by least squares; the slopes are averaged with the lives as their samples.
Prints them per hour with their uncertainty, and exits with 1 where memory grows by more than its
allowance with certainty, a life ends with more files than it had, or a process does not go on.

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
import statistics
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

WARM_UP = 90.0  # seconds after the first step: evaluations have been compiled, caches are full
SHORTEST = 90.0  # seconds of samples behind it, in which a slope can be seen
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
        return np.array([s for s in self.samples if s[0] > WARM_UP], float).reshape(-1, 3)

    @property
    def counts(self) -> bool:
        return len(self.settled) > 2 and float(np.ptp(self.settled[:, 0])) >= SHORTEST

    @property
    def more_files(self) -> int:
        """Descriptors at the end beyond those at the beginning; of samples with no save under way.

        A save opens files and closes them, so that the fewest of a third of the samples count.
        """
        files, third = self.settled[:, 2], len(self.settled) // 3
        return int(files[-third:].min() - files[:third].min())

    def slope(self, column: int) -> float:
        """Of MiB (1) or descriptors (2), per hour."""
        return 3600 * float(np.polyfit(self.settled[:, 0], self.settled[:, column], 1)[0])


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


def shown(name: str, unit: str, slopes: list[float]) -> tuple[str, float, float]:
    """A line, the mean slope and its standard error."""
    mean = statistics.mean(slopes)
    error = statistics.stdev(slopes) / len(slopes) ** 0.5 if len(slopes) > 1 else float("inf")
    return f"{name}: {mean:+.2f} ± {error:.2f} {unit} an hour", mean, error


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
        # Two short lives for every long one.
        long_enough = WARM_UP + SHORTEST
        lifetime = (
            draw.uniform(1.2, 4.0) * long_enough if len(lives) % 3 == 0 else draw.uniform(1, 40)
        )
        lifetime = min(lifetime, max(left, 1.2 * long_enough))
        number = draw.choice((signal.SIGKILL, signal.SIGTERM))
        life = live(folder, folder / "run", lifetime, number, flags)
        lives.append(life)
        held, files = life.samples[-1][1:] if life.samples else (0.0, 0)
        line = f"life {len(lives)}: {lifetime:.0f} s, {life.steps} steps, {life.saves} saves, "
        line += f"{life.ended_by}, {held:.0f} MiB and {files} files at its end"
        if life.counts:
            line += f"; {life.slope(1):+.1f} MiB and {life.slope(2):+.2f} files an hour"
        print(line, flush=True)
    counted = [life for life in lives if life.counts]
    if not counted:
        sys.exit("no life was long enough: give more --minutes")
    hours = sum(float(np.ptp(life.settled[:, 0])) for life in counted) / 3600
    memory_line, mean, error = shown("memory", "MiB", [life.slope(1) for life in counted])
    files_line, _, _ = shown("files", "descriptors", [life.slope(2) for life in counted])
    grown = [life for life in counted if life.more_files > 0]
    print(
        f"{len(lives)} lives, {sum(life.steps for life in lives)} steps; {len(counted)} lives of "
        f"{hours:.2f} h behind the warm-up"
    )
    print(f"{memory_line}\n{files_line}")
    saves = 3600 * statistics.mean(life.saves / life.samples[-1][0] for life in counted)
    plain = reference(folder)
    print(
        f"saves: {saves:.0f} an hour; all growth is {1024 * mean / saves:.0f} KiB a save, that of "
        f"orbax alone with the same arrays {1024 * plain:.0f} KiB"
    )
    mean -= saves * plain
    print(f"memory beside orbax's: {mean:+.2f} MiB an hour")
    grows = mean - 2 * error > ALLOWED if len(counted) > 1 else mean > ALLOWED
    print("verdict: " + ("memory grows" if grows else "memory does not grow"), end=", ")
    print(f"files grow in {len(grown)} lives" if grown else "files do not")
    if arguments.folder is None:
        shutil.rmtree(folder)
    return bool(grows or grown)


if __name__ == "__main__":
    sys.exit(main())
