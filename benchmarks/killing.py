"""A tiny run that is killed and started again: how it starts, what it tells, how it is compared.

Started as `python benchmarks/killing.py JOURNAL train ...` it is `flix` with a journal: a line for
every phase that it enters and every step that it dispatches.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BASE = "base: "  # before the phases of a base's training
ENDING = "ending"

# Dropout, feature dropout, cells at rates of their own, one held out; nothing divides anything.
CONFIG = """
include 'configs/runs/adapt.gin'
include 'configs/adapters/flix.gin'
DATA_DIR = 'data'
T5Config.vocab_size = 384
T5Config.emb_dim = 16
T5Config.num_heads = 2
T5Config.head_dim = 8
T5Config.mlp_dim = 32
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
T5Config.dropout_rate = 0.1
AdapterSpec.dropout = 0.1
language/FeatureType.dropout = 0.3
Run.source = @XtremeUp()
XtremeUp.data_dir = %DATA_DIR
Run.vocabulary = @ByteVocabulary()
Mixture.held_out = ('up/y',)
Mixture.rates = {'up/*': 3.0, '*': 1.0}
Evaluation.batch_size = 8
Evaluation.every = 6
Evaluation.keep_best = 'mean_seen'
Run.inputs_length = 8
Run.targets_length = 6
Run.batch_size = 8
Run.total_steps = 50
Run.save_every = 4
Run.log_every = 7
Run.base = @base/Run()
base/Run.base = 'random'
base/Run.adapters = None
base/Run.total_steps = 12
base/Evaluation.every = None
base/Evaluation.keep_best = None
base/Run.evaluation = @base/Evaluation()
"""

# Times and speeds; all else of a line of metrics must be what it was.
TIMES = (
    "tokens_per_second",
    "tokens_per_second_per_chip",
    "steps_per_second",
    "data_wait",
    "mfu",
    "device_memory",
)


def write(folder: Path) -> None:
    """Writes run.gin and its data."""
    for task in ("up", "same"):
        for language, letters in (("x", "abc"), ("y", "cde")):
            words = [a + b + c for a in letters for b in letters for c in letters]
            for split, part in (("train", words[:18]), ("validation", words[18:])):
                path = folder / "data" / task / split / f"{language}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = [{"input": w, "target": w.upper() if task == "up" else w} for w in part]
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.gin").write_text(CONFIG)


def environment(folder: Path) -> dict[str, str]:
    """One CPU device a process, quick compilations, and a cache of them."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }


class Told(NamedTuple):
    """What a journal says: (phase, when it was entered), and of base and run the steps."""

    phases: list[tuple[str, float]]
    started: dict[str, int]  # the step that training went on from
    steps: dict[str, list[int]]  # that were dispatched

    @property
    def phase(self) -> str:
        return self.phases[-1][0] if self.phases else "python"

    @property
    def has_met_others(self) -> bool:
        """Whether it has done what comes behind that, where there are several processes."""
        return any(name.endswith("reading the data") for name, _ in self.phases)


class Attempt:
    """The processes of one start of a run."""

    def __init__(self, folder: Path, run_dir: Path, processes: int, flags: Sequence[str]) -> None:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self._journals = [
            Path(f"{run_dir}.{index}.journal").absolute() for index in range(processes)
        ]
        self.log = Path(f"{run_dir}.log").absolute()
        command = [sys.executable, str(Path(__file__).absolute())]
        train = ["train", "--gin_file=run.gin", f"--run_dir={run_dir.absolute()}", *flags]
        if processes > 1:
            train += [f"--coordinator=127.0.0.1:{_free_port()}", f"--processes={processes}"]
        self.processes = []
        for index, journal in enumerate(self._journals):
            journal.write_text("")
            which = [f"--process={index}"] if processes > 1 else []
            with self.log.open("a") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*command, str(journal), *train, *which],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=environment(folder),
                        cwd=folder,
                        process_group=0,
                    )
                )

    def told(self, index: int = 0) -> Told:
        """What a process has told so far."""
        told = Told([], {}, {"base": [], "run": []})
        for line in self._journals[index].read_text().splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "phase":
                when, _, name = rest.partition(" ")
                told.phases.append((name, float(when)))
            elif kind in ("start", "step"):
                name, _, number = rest.partition(" ")
                if kind == "start":
                    told.started[name] = int(number)
                else:
                    told.steps[name].append(int(number))
        return told

    @property
    def runs(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def send(self, number: int, to: Sequence[int]) -> None:
        for index in to:
            self.processes[index].send_signal(number)

    def wait(self, seconds: float) -> list[int] | None:
        """The exit statuses; None, with all of them killed, where one does not end in time."""
        end = time.monotonic() + seconds
        while self.runs and time.monotonic() < end:
            time.sleep(0.01)
        late = self.runs
        self.send(signal.SIGKILL, range(len(self.processes)))
        statuses = [process.wait() for process in self.processes]
        return None if late else statuses


def differences(run_dir: Path, whole: Path) -> list[str]:
    """In what a finished run's folder differs from that of the undisturbed one."""
    found = []
    ours, theirs = _listing(run_dir), _listing(whole)
    found += [f"{path} is there" for path in sorted(ours - theirs)]
    found += [f"{path} is missing" for path in sorted(theirs - ours)]
    for path in sorted(ours & theirs):
        one, other = run_dir / path, whole / path
        if not one.is_file() or Path(path).parts[-2:-1] == ("checkpoints",):
            continue
        if one.name == "metrics.jsonl":
            if _lines(one) != _lines(other):
                found.append(f"{path} has other lines")
        elif "checkpoints" not in Path(path).parts and one.read_bytes() != other.read_bytes():
            found.append(f"{path} has another content")
    for step in sorted(whole.rglob("checkpoints/*")):
        path = str(step.relative_to(whole))
        if path in ours:
            got, expected = _arrays(run_dir / path), _arrays(step)
            if got.keys() != expected.keys():
                found.append(f"{path} has other arrays")
            names = [n for n in got.keys() & expected.keys() if got[n] != expected[n]]
            found += [f"{path}: {name} has other bits" for name in sorted(names)]
    return found


def _listing(folder: Path) -> set[str]:
    """All paths, but for what orbax and TensorBoard name at random."""
    found = set()
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if "tensorboard" in parts:
            continue
        if "checkpoints" in parts:
            parts = parts[: parts.index("checkpoints") + 3]
        found.add(os.path.join(*parts))
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def _arrays(step: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """All arrays of a checkpoint, read by orbax alone: dtype, shape and bytes by name."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    found = {}
    for item in ("trained", "optimizer"):
        reader = ocp.StandardCheckpointer()
        metadata = reader.metadata(step / item).item_metadata
        template = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), metadata.tree
        )
        tree = reader.restore(step / item, template)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            array = np.asarray(leaf)
            name = f"{item}{jax.tree_util.keystr(path)}"
            found[name] = str(array.dtype), array.shape, array.tobytes()
    return found


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def work(journal: str, arguments: Sequence[str]) -> int:
    """`flix` with a journal."""
    from flix_jax import cli, preemption

    file = open(journal, "ab", buffering=0)  # noqa: SIM115  (until the process ends)
    prefix, watched = [""], [False]

    def tell(*words: object) -> None:
        file.write((" ".join(map(str, words)) + "\n").encode())

    def enter(name: str) -> None:
        tell("phase", time.time(), prefix[-1] + name)

    installed, phase = preemption.installed, preemption.phase

    @contextlib.contextmanager
    def telling_installed(grace: float, to_the_end: bool) -> Iterator[None]:
        with installed(grace, to_the_end):
            enter("starting")
            yield

    @contextlib.contextmanager
    def telling_phase(name: str) -> Iterator[None]:
        if name == "reading the data" and not watched[0]:  # what trains is imported by now
            watched[0] = True
            watch_steps()
        before = preemption._phase
        with phase(name):
            enter(name)
            try:
                yield
            finally:
                enter(before)

    def watch_steps() -> None:
        from flix_jax.experiments import training

        fit, train_base = training.fit, training.train_base

        def telling_fit(state: Any, *arguments: Any, step_fn: Any, **options: Any) -> Any:
            number = int(state.step)
            of = "base" if prefix[-1] else "run"
            tell("start", of, number)

            def step(*arguments: Any) -> Any:
                nonlocal number
                result = step_fn(*arguments)
                number += 1
                tell("step", of, number)
                return result

            result = fit(state, *arguments, step_fn=step, **options)
            enter(ENDING)
            return result

        def telling_base(*arguments: Any, **options: Any) -> None:
            prefix.append(BASE)
            try:
                train_base(*arguments, **options)
            finally:
                prefix.pop()
                enter("starting")

        training.__dict__.update(fit=telling_fit, train_base=telling_base)

    preemption.__dict__.update(installed=telling_installed, phase=telling_phase)
    return cli.main(arguments, to_the_end=True)


def saved(folder: Path) -> int:
    """The newest step of a run's checkpoints, 0 for none."""
    steps = [int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdecimal()]
    return max(steps, default=0)


def base_dir(run_dir: Path) -> Path:
    """The folder of the base of a run; of nothing where there is none yet."""
    return next((run_dir / "bases").glob("*"), run_dir / "bases" / "none")


if __name__ == "__main__":
    sys.exit(work(sys.argv[1], sys.argv[2:]))
