"""Damages checkpoints, and counts what is found: flipped bits, files that are cut or gone.

    python benchmarks/damage.py --tries 500 --seed 0

A small run's newest checkpoint is damaged in one file, chosen at random over all files, then read
as training does: the file must be named, and the older step be taken. Says too what digests cost.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flix_jax.training import array_digests, manifest
from flix_jax.training.checkpoints import Checkpoints
from flix_jax.training.step import TrainState

KINDS = ("flip", "cut", "delete")


def a_state(step: int, size: int) -> TrainState:
    """Random bits of several dtypes, moments too, which no compression makes much smaller."""
    draw = np.random.default_rng(step)
    trained = {
        "adapter_a": jnp.asarray(draw.normal(size=(30, size, 4)), jnp.float32),
        "adapter_b": jnp.asarray(draw.normal(size=(30, 4, size)), jnp.float32),
        "scale": jnp.asarray(draw.normal(size=(size,)), jnp.bfloat16),
    }
    state = TrainState.create(trained, optax.adam(0.1))
    moments = [
        jnp.asarray(draw.normal(size=x.shape), x.dtype) if x.ndim else jnp.int32(step)
        for x in jax.tree.leaves(state.opt_state)
    ]
    opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), moments)
    return state.replace(step=jnp.int32(step), opt_state=opt_state)


def damage(path: Path, kind: str, draw: random.Random) -> None:
    if kind == "delete":
        return path.unlink()
    content = bytearray(path.read_bytes())
    if kind == "cut":
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def outcomes(run_dir: Path, tries: int, draw: random.Random) -> collections.Counter:
    """(kind, what came of it) -> how often."""
    newest, spare = run_dir / "checkpoints" / "2", run_dir / "spare"
    shutil.copytree(newest, spare)
    names = manifest.files_of(spare)
    found: collections.Counter = collections.Counter()
    for _ in range(tries):
        kind, name = draw.choice(KINDS), draw.choice(names)
        damage(newest / name, kind, draw)
        said: list[str] = []
        with Checkpoints(run_dir / "checkpoints", {}, warn=said.append) as checkpoints:
            resumed = checkpoints.resume(a_state(0, 64))
        taken = resumed is not None and int(resumed[0].step) == 1
        named = len(said) == 1 and name in said[0]
        found[kind, "found, named, older step" if taken and named else f"MISSED {name}"] += 1
        shutil.rmtree(run_dir / "damaged", ignore_errors=True)
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(spare, newest)
    return found


def costs(folder: Path, megabytes: int, rounds: int) -> None:
    """Times saves and restores with digests and without, by turns."""
    size = megabytes * 2**20 // (30 * 8 * 4 * 3)
    seconds: dict[tuple[str, bool], list[float]] = collections.defaultdict(list)
    for step in range(1, 2 * rounds + 3):
        state, digested = jax.block_until_ready(a_state(step, size)), step % 2 == 0
        with contextlib.ExitStack() as stack:
            if not digested:
                for of, name in (
                    (array_digests, "of"),
                    (manifest, "write"),
                    (Checkpoints, "_check_files"),
                    (Checkpoints, "_check_digests"),
                ):
                    nothing: Any = mock.patch.object(of, name, lambda *_: {})
                    stack.enter_context(nothing)
            checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", {}, keep=1))
            start = time.perf_counter()
            checkpoints.save(state, {})
            seconds["that training waits for a save", digested].append(time.perf_counter() - start)
            checkpoints.wait()
            seconds["until it is on disk", digested].append(time.perf_counter() - start)
            start = time.perf_counter()
            jax.block_until_ready(checkpoints.restore(state)[0])
            seconds["a restore", digested].append(time.perf_counter() - start)
    print(f"\n{megabytes} MiB of arrays, {rounds} rounds, median seconds and ratio (quartiles):")
    for what in dict.fromkeys(name for name, _ in seconds):
        without, with_them = (seconds[what, side][1:] for side in (False, True))
        ratios = [b / a for a, b in zip(without, with_them, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{what:32} {statistics.median(without):6.3f} without, "
            f"{statistics.median(with_them):6.3f} with digests: "
            f"{middle:.2f} ({low:.2f} – {high:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=256, help="of the timed checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Checkpoints(folder / "run" / "checkpoints", {}) as checkpoints:
            for step in (1, 2):
                checkpoints.save(a_state(step, 64), {"position": step})
        found = outcomes(folder / "run", arguments.tries, draw)
        for (kind, what), count in sorted(found.items()):
            print(f"{kind:8} {what}: {count}")
        missed = sum(count for (_, what), count in found.items() if what.startswith("MISSED"))
        print(f"{arguments.tries - missed} of {arguments.tries} found and named")
        costs(folder / "cost", arguments.megabytes, arguments.rounds)
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
