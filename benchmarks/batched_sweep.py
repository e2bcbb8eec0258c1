"""Eight trials as one program against the same eight one after another.

    python benchmarks/batched_sweep.py [--trials 8] [--steps 200] [--rounds 3] [--devices 1]

The trials are FLix of ranks 1 and 2 with four rates of feature dropout, on Babel over a random
base, evaluated on the validation data. Every side runs in a process of its own, the sides in turn,
on XLA's one-threaded CPU backend; with `--devices 2` the trials of the program are spread over two
virtual devices, one a core. Prints, as medians over the rounds with their range,

    whole      time of one after another / together: data, compilation, training, evaluation
    training   the same of the steps alone, without compilation
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

SIDES = ("alone", "together")


def bindings(trials: int, steps: int, folder: str) -> list[list[str]]:
    """The bindings of every trial."""
    shared = [
        f"BABEL_DIR = '{folder}'",
        "Run.base = 'random'",
        f"Run.total_steps = {steps}",
        "Run.save_every = 1000000",
        "Run.log_every = 20",
        "Evaluation.split = 'validation'",
    ]
    rates = [0.0, 0.2, 0.4, 0.6]
    return [
        [*shared, f"FeatureType.rank = {1 + i % 2}", f"FeatureType.dropout = {rates[i // 2 % 4]}"]
        for i in range(trials)
    ]


def measure(side: str, trials: int, steps: int, data: str) -> dict[str, float]:
    """Seconds of one side, in this process: whole, and of training alone."""
    from etils import epath

    from flix_jax import configuration
    from flix_jax.cli import quiet
    from flix_jax.experiments import together

    quiet()
    gin_files = ["configs/experiments/babel.gin", "configs/adapters/flix.gin"]
    runs = [
        configuration.load(gin_files, one).build("Run") for one in bindings(trials, steps, data)
    ]
    splits = ["validation"]
    with tempfile.TemporaryDirectory() as folder:
        folders = [epath.Path(folder) / str(i) for i in range(trials)]
        bases = os.path.join(folder, "bases")
        started = time.monotonic()
        if side == "together":
            outcomes = together.train_together(
                runs,
                folders,
                bases_dir=bases,
                configs=[None] * trials,
                splits=splits,
                log_dir=os.path.join(folder, "program"),
                title="together",
            )
        else:
            outcomes = [
                together.train_alone(run, place, splits, bases_dir=bases, config=None)
                for run, place in zip(runs, folders, strict=True)
            ]
        whole = time.monotonic() - started
    return {"whole": whole, "training": sum(o.measures["step_seconds"] for o in outcomes) * steps}


def run_side(side: str, arguments: argparse.Namespace, data: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    devices = arguments.devices if side == "together" else 1
    flags = f"--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, f"--side={side}", f"--data={data}"]
    command += [f"--trials={arguments.trials}", f"--steps={arguments.steps}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        found = measure(arguments.side, arguments.trials, arguments.steps, arguments.data)
        print(json.dumps(found))
        return
    ratios: dict[str, list[float]] = {"whole": [], "training": []}
    with tempfile.TemporaryDirectory() as data:
        for number in range(1, arguments.rounds + 1):
            alone, together = (run_side(side, arguments, data) for side in SIDES)
            for name, values in ratios.items():
                values.append(alone[name] / together[name])
            print(
                f"round {number}: alone {alone['whole']:.1f} s ({alone['training']:.1f} s of steps)"
                f", together {together['whole']:.1f} s ({together['training']:.1f} s of steps)",
                flush=True,
            )
    for name, values in ratios.items():
        middle = statistics.median(values)
        print(f"{name:<9} {middle:.2f} ({min(values):.2f} – {max(values):.2f})")


if __name__ == "__main__":
    main()
