"""Seconds from the command to the first step, with compiled programs kept from before and without.

    python benchmarks/start_up.py [--rounds 5]

The run of configs/experiments/babel.gin with configs/adapters/flix.gin, whose data and whose base
(of few steps) are there already. Every start is a process of its own with a folder of its own; both
kinds take turns, and a ratio is taken within a round. The first step counts when its metrics have
been written.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import figures

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--gin_file=configs/experiments/babel.gin",
    "--gin_file=configs/adapters/flix.gin",
    "--gin.Run.total_steps=1",
    "--gin.Run.log_every=1",
    "--gin.Schedule.warmup_steps=0",
)
BASE = ("--gin.Run.base='random'", "--gin.Run.adapters=None")


def start(folder: Path, name: str, cache: str, flags: Sequence[str]) -> float:
    """Seconds until the first step of a run that had none; `cache` is '' for none."""
    run_dir = folder / name
    command = [sys.executable, "-m", "flix_jax.cli", "train", *FLAGS]
    command += [f"--gin.BABEL_DIR='{folder / 'babel'}'", f"--run_dir={run_dir}", *flags]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    log = folder / f"{name}.log"
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
        while process.poll() is None and not (run_dir / "metrics.jsonl").exists():
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        if process.wait() != 0:
            sys.exit(log.read_text())
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept, adapted = str(folder / "kept"), (f"--gin.Run.base='{folder / 'base'}'",)
        start(folder, "base", "", BASE)
        start(folder, "first", kept, adapted)
        without, with_kept = [], []
        for number in range(arguments.rounds):
            without.append(start(folder, f"without_{number}", "", adapted))
            with_kept.append(start(folder, f"kept_{number}", kept, adapted))
            print(f"{without[-1]:6.1f} s without, {with_kept[-1]:6.1f} s with", flush=True)
    figures.tell_ratios("seconds, compiled anew", without)
    figures.tell_ratios("seconds, programs kept from before", with_kept)
    ratios = sorted(b / a for a, b in zip(without, with_kept, strict=True))
    print(
        f"median {statistics.median(without):.1f} s without, {statistics.median(with_kept):.1f} s "
        f"with kept programs; ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} – "
        f"{ratios[-1]:.2f}, {arguments.rounds} rounds)"
    )


if __name__ == "__main__":
    main()
