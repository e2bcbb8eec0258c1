"""Kills a run at random moments, in every phase, and compares how it ends with one left in peace.

    python benchmarks/kill_matrix.py --seed 0 --kills 100 --processes 1
    python benchmarks/kill_matrix.py --seed 0 --kills 100 --processes 2 --jobs 2

A run is started again and again, and ended by SIGKILL, or asked to stop by SIGTERM, at a moment
that is drawn: of the time that it takes, or of a phase. When it has come to its end, every array,
the metrics but for times, evaluations and the listing of its folder are compared with those of the
undisturbed run, and another one begins. After SIGKILL training must go on from the newest step that
was saved; after SIGTERM with the step after the last one that was made. Prints a table by phase;
exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import logging
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import killing
from killing import BASE, ENDING, Attempt, base_dir, saved

from flix_jax.preemption import STATUS

PHASES = (
    "starting",
    "reading the data",
    "compiling",
    "training",
    "evaluating",
    "decoding",
    "scoring",
    "saving",
)
SEVERAL = ("training", "evaluating", "decoding", "scoring", "saving")  # times in an attempt
OF_BASE = tuple(BASE + name for name in ("starting", "compiling", "training", "saving"))
SAVE_EVERY = 4
GRACE = 20.0
PATIENCE = 300.0  # seconds for an attempt that is not ended


@dataclasses.dataclass
class Kill:
    """What came of one."""

    signal: str
    phase: str
    repeated: int  # steps
    seconds: float  # from the signal to the end
    wrong: list[str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """When an attempt is ended: so many seconds after its start, or after a phase's n-th one."""

    signal: int
    to: tuple[int, ...]
    after: float
    phase: str | None = None
    occurrence: int = 1


class Matrix:
    """The kills of several runs side by side."""

    def __init__(self, folder: Path, kills: int, processes: int, seed: int) -> None:
        self.folder, self.processes, self.seed = folder, processes, seed
        self.whole, self.left = folder / "whole", kills
        self.seconds = 0.0
        self.kills: list[Kill] = []
        self.wrong: list[str] = []
        self.runs = self.attempts = 0
        self._lock = threading.Lock()

    def reference(self) -> None:
        """The undisturbed run, twice: the second one has compiled programs, and is timed."""
        killing.write(self.folder)
        for _ in range(2):
            shutil.rmtree(self.whole, ignore_errors=True)
            started = time.monotonic()
            attempt = Attempt(self.folder, self.whole, self.processes, [])
            if attempt.wait(1200) != [0] * self.processes:
                sys.exit(f"the undisturbed run failed:\n{attempt.log.read_text()}")
            self.seconds = time.monotonic() - started

    def worker(self, number: int) -> None:
        """Runs, one after another, until there have been enough kills."""
        draw = random.Random(f"{self.seed} {number}")
        for run in range(10**6):
            if self.left <= 0:
                return
            self._run(draw, self.folder / f"run_{number}_{run}")

    def _run(self, draw: random.Random, run_dir: Path) -> None:
        kills: list[Kill] = []
        for _ in range(1000):
            if self.left <= 0:
                break
            plan = self._plan(draw, fresh=not (run_dir / "checkpoints").exists())
            kill = self._attempt(run_dir, plan)
            if kill is None:
                break
            with self._lock:
                kills.append(kill)
                self.left -= 1
                self.kills.append(kill)
                _show(kill, run_dir, len(self.kills))
        else:
            self.wrong.append(f"{run_dir.name} does not come to its end")
        if not self._finish(run_dir):
            return
        found = killing.differences(run_dir, self.whole)
        with self._lock:
            self.runs += 1
            self.wrong += [f"{run_dir.name}: {text}" for text in found]
            verdict = "; ".join(found[:3]) or "equals the undisturbed one"
            print(f"{run_dir.name}, after {len(kills)} kills: {verdict}", flush=True)
        if not found:
            shutil.rmtree(run_dir)

    def _plan(self, draw: random.Random, fresh: bool) -> Plan:
        number = signal.SIGTERM if draw.random() < 0.4 else signal.SIGKILL
        everyone = tuple(range(self.processes))
        to = everyone if draw.random() < 0.5 else (draw.choice(everyone),)
        if number == signal.SIGKILL and draw.random() < 0.5:
            return Plan(number, to, draw.uniform(0.0, self.seconds))
        with self._lock:  # the phases that were met least
            phases = OF_BASE if fresh else PHASES
            name = signal.Signals(number).name
            met = [(k.signal, k.phase) for k in self.kills]
            phase = min(phases, key=lambda phase: (met.count((name, phase)), draw.random()))
        occurrence = draw.randint(1, 5) if phase in SEVERAL else 1
        # Phases are short: half of the signals come just where they begin.
        delay = draw.choice((0.0, draw.expovariate(1 / 0.05)))
        return Plan(number, to, delay, phase, occurrence)

    def _attempt(self, run_dir: Path, plan: Plan) -> Kill | None:
        """The kill; None where the run came to its end before."""
        attempt = Attempt(self.folder, run_dir, self.processes, [f"--grace_seconds={GRACE}"])
        self.attempts += 1
        began = time.monotonic()
        while attempt.runs and time.monotonic() < began + PATIENCE:
            told = attempt.told()
            if plan.phase is None:
                if time.monotonic() > began + plan.after:
                    break
            else:
                entered = [at for name, at in told.phases if name == plan.phase]
                if len(entered) >= plan.occurrence:
                    time.sleep(max(0.0, entered[plan.occurrence - 1] + plan.after - time.time()))
                    break
            time.sleep(0.002)
        journals = [attempt.told(index) for index in range(self.processes)]
        phases = [journal.phase for journal in journals]
        # Before processes have met, one cannot tell the others: whoever asks has to ask them all.
        met = all(journal.has_met_others for journal in journals)
        to = plan.to if met or plan.signal == signal.SIGKILL else range(self.processes)
        sent = time.monotonic()
        attempt.send(plan.signal, to)
        if plan.signal == signal.SIGKILL:
            # What flix launch does: the others are given a moment, and are ended then.
            attempt.wait(2.0)
            statuses: list[int] | None = [process.returncode for process in attempt.processes]
        else:
            statuses = attempt.wait(GRACE + 20)
        seconds = time.monotonic() - sent
        if statuses == [0] * self.processes:
            return None
        return self._judge(attempt, plan, phases, statuses, seconds, run_dir)

    def _judge(
        self,
        attempt: Attempt,
        plan: Plan,
        phases: list[str],
        statuses: list[int] | None,
        seconds: float,
        run_dir: Path,
    ) -> Kill:
        phase = phases[0]
        told = [attempt.told(index) for index in range(self.processes)]
        folders = {"base": base_dir(run_dir), "run": run_dir}
        wrong, repeated = [], 0
        for name, folder in folders.items():
            # A step that is not begun by all processes is made by none.
            made = min(max(one.steps[name], default=0) for one in told)
            if made:
                repeated = made - saved(folder)
        name = signal.Signals(plan.signal).name
        if plan.signal == signal.SIGTERM:
            if statuses is None:
                wrong.append("it did not end in time")
            elif {s for s, p in zip(statuses, phases, strict=True) if p != "python"} - {STATUS}:
                wrong.append(f"exit status {statuses}")
            if repeated > 0:
                wrong.append(f"{repeated} steps were lost")
        elif repeated > 2 * SAVE_EVERY:  # what is written while training goes on may be lost, too
            wrong.append(f"{repeated} steps were lost")
        with self._lock:
            self.wrong += [f"{run_dir.name}, {name} while {phase}: {text}" for text in wrong]
        return Kill(name, phase, max(repeated, 0), seconds, wrong)

    def _finish(self, run_dir: Path) -> bool:
        """Whether the run, left in peace, comes to its end; its folder is then what it leaves."""
        attempt = Attempt(self.folder, run_dir, self.processes, [])
        self.attempts += 1
        if attempt.wait(PATIENCE) == [0] * self.processes:
            return True
        with self._lock:
            tail = attempt.log.read_text()[-2000:]
            self.wrong.append(f"{run_dir.name} did not go on: {tail}")
        return False


def _show(kill: Kill, run_dir: Path, number: int) -> None:
    line = f"{number:4} {run_dir.name}: {kill.signal} while {kill.phase}, {kill.repeated} steps "
    line += f"to repeat, ended in {kill.seconds:.1f} s"
    print("; ".join([line, *kill.wrong]), flush=True)


def table(kills: list[Kill]) -> str:
    """Kills by phase."""
    head = ("phase", "SIGKILL", "steps to repeat", "SIGTERM", "steps to repeat", "seconds to end")
    rows = [head]
    order = ["python", *OF_BASE, *PHASES, ENDING]
    others = sorted({kill.phase for kill in kills} - set(order))
    seen = [phase for phase in [*order, *others] if any(kill.phase == phase for kill in kills)]
    for phase in [*seen, "all"]:
        of = [kill for kill in kills if phase in (kill.phase, "all")]
        killed = [kill for kill in of if kill.signal == "SIGKILL"]
        asked = [kill for kill in of if kill.signal == "SIGTERM"]
        rows.append(
            (
                phase,
                str(len(killed)),
                f"at most {max(k.repeated for k in killed)}" if killed else "",
                str(len(asked)),
                f"at most {max(k.repeated for k in asked)}" if asked else "",
                f"{statistics.median(k.seconds for k in asked):.1f}, at most "
                f"{max(k.seconds for k in asked):.1f}"
                if asked
                else "",
            )
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--folder", type=Path, help="where all lies (default: a temporary one)")
    arguments = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax, of what it reads to compare
    started = time.monotonic()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="kill_matrix_"))
    matrix = Matrix(folder, arguments.kills, arguments.processes, arguments.seed)
    matrix.reference()
    print(f"the undisturbed run takes {matrix.seconds:.1f} s", flush=True)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(matrix.worker, number) for number in range(arguments.jobs)]:
            done.result()
    seconds = time.monotonic() - started
    print(f"\n{table(matrix.kills)}\n")
    print(
        f"{len(matrix.kills)} kills of {matrix.runs} runs in {matrix.attempts} attempts of "
        f"{arguments.processes} process{'es' * (arguments.processes > 1)}, {seconds / 60:.1f} min"
    )
    for text in matrix.wrong:
        print(f"WRONG {text}")
    print("verdict: " + (f"{len(matrix.wrong)} things are wrong" if matrix.wrong else "all equal"))
    if not matrix.wrong and arguments.folder is None:
        shutil.rmtree(folder)
    return bool(matrix.wrong)


if __name__ == "__main__":
    sys.exit(main())
