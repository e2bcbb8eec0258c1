"""What flix_jax costs, measured anew: every benchmark of speed that can run here, as one table.

    python benchmarks/run_all.py [--out docs/results/performance] [--data_dir DIR] [--only TEXT]

runs the benchmarks one after another, each a command of its own that is told in the table, and
writes OUT.json (what they found) and OUT.md (the table, with machine and versions). Figures that
are in OUT.json are not measured again, so that it goes on where it was interrupted; delete the file
to measure all anew. What needs something that is not here (a TPU's compiler, data, a GPU, PyTorch)
is named with the reason. Leave the machine to it: sides of a ratio take turns in one process, but
what runs beside them widens the spread.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import figures

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio")
TITLE = "# What flix_jax costs"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A command, what it needs, and the figures that it tells.

    Attributes:
      command: the file and its flags; DATA stands for the folder of --data_dir.
      goals: name of a figure -> what it is to be ('≤ 1.15', '≥ 1.8', '' for none).
      of: what is measured, in words.
      packages: what it needs beside what flix_jax itself does; what brings it is in `INSTALLS`.
    """

    command: str
    of: str
    goals: Mapping[str, str]
    packages: tuple[str, ...] = ()


TORCH = ("torch", "transformers", "peft")
INSTALLS = {"libtpu": "'.[tpu]'", **dict.fromkeys(TORCH, " ".join(TORCH))}
POD = "benchmarks/frozen_plan.py --pod mt5_base_v5e_16x16"
FULL = """--rows 32 --gin "T5Config.remat='full'" --gin Run.loss_chunks=4"""
BENCHMARKS = (
    Benchmark(
        "benchmarks/step_time.py --clock cpu --features 30",
        "forward and backward, mT5-small's widths, 30 features, two of rank 4 in an example",
        {
            "FLix / frozen": "≤ 1.15",
            "FLix / LoRA of rank 8": "≤ 1.00",
            "FLix by cell / frozen": "≤ 1.15",
            "FLix by cell / LoRA of rank 8": "≤ 1.00",
            "FLix by cell / LoRA by cell": "≤ 1.00",
            "LoRA / frozen": "",
            "LoRA by cell / frozen": "",
        },
    ),
    Benchmark(
        "benchmarks/many_features.py --layers 2 --rounds 9 --clock cpu",
        "whole steps with AdamW over the number of features, with `Optimizer.lazy`",
        {"1,000 features, lazy / 4": "≤ 1.03", "32 different in a batch / 2": "≤ 1.10"},
    ),
    Benchmark(
        "benchmarks/packing.py --data_dir DATA --layers 2 --batch 16 --rounds 9 --clock cpu",
        "useful tokens per second on ner, topic, translation and qa_cross_lang",
        {"packed / padded": "≥ 1.8", "mixed / packed": "", "by length / padded": ""},
    ),
    Benchmark(
        "benchmarks/decoding.py --rounds 15",
        "greedy decoding, against the network without adapters",
        {"one set of features, folded in": "", "every row with another two": ""},
    ),
    Benchmark(
        "benchmarks/peft_cpu.py",
        "seconds of Hugging Face's network with PEFT's LoRA over ours, mT5-small's widths",
        {
            "training, PEFT / LoRA": "≥ 2.0",
            "training, PEFT / FLix": "",
            "forward, PEFT / LoRA": "≥ 2.5",
            "forward, PEFT / FLix": "",
            "greedy decoding, PEFT / LoRA": "≥ 2.5",
            "greedy decoding, PEFT / FLix": "",
        },
        TORCH,
    ),
    Benchmark(
        "benchmarks/start_up.py --rounds 3",
        "the command of the quickstart's run until its first step",
        {"seconds, programs kept from before": "≤ 30", "seconds, compiled anew": ""},
    ),
    Benchmark(
        "benchmarks/chunked_loss.py --chunks 1 4",
        "the loss of mT5's vocabulary in four chunks against whole, v5e, by the TPU compiler",
        {"temporary memory": "≤ 0.25", "cycles": "≤ 1.03"},
        ("libtpu",),
    ),
    Benchmark(
        f"{POD} --sides frozen LoRA FLix",
        "mT5-base on v5e:16x16, 1 row of a chip, cycles by the TPU compiler",
        {"FLix / frozen": "≤ 1.25", "LoRA / frozen": ""},
        ("libtpu",),
    ),
    Benchmark(
        f"{POD} {FULL} --sides frozen LoRA FLix",
        "mT5-base on v5e:16x16, 32 rows of a chip, cycles by the TPU compiler",
        {"FLix / frozen": "≤ 1.15", "LoRA / frozen": ""},
        ("libtpu",),
    ),
    Benchmark(
        f"""{POD} {FULL} --gin "Run.tables='fastest'" --sides frozen LoRA FLix""",
        "the same with `Run.tables = 'fastest'`",
        {"FLix / frozen": "≤ 1.15", "LoRA / frozen": ""},
        ("libtpu",),
    ),
    Benchmark(
        "benchmarks/frozen_plan.py --pod mt5_xxl_v5e_16x16 --sides frozen LoRA FLix",
        "mT5-xxl on v5e:16x16, 1 row of a chip, cycles by the TPU compiler",
        {"FLix / frozen": "≤ 1.111", "LoRA / frozen": ""},  # a tenth of all cycles
        ("libtpu",),
    ),
)


def measure(benchmark: Benchmark, data_dir: str | None) -> dict[str, Any]:
    """What it tells, as OUT.json holds it; `missing` says why there is nothing."""
    missing = ""
    for package in benchmark.packages:
        if importlib.util.find_spec(package) is None:
            missing = f"needs {package}: pip install {INSTALLS[package]}"
    if "DATA" in benchmark.command and data_dir is None:
        missing = "needs --data_dir, a folder in XTREME-UP's layout"
    found: dict[str, Any] = {"command": benchmark.command, "missing": missing, "figures": []}
    if missing:
        return found
    if benchmark.packages:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in benchmark.packages]
        found["package"] = ", ".join(versions)
    command = benchmark.command.replace("DATA", f"'{data_dir}'")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "figures.jsonl"
        path.touch()
        environment = os.environ | {figures.FILE: str(path)}
        started = time.monotonic()
        done = subprocess.run(
            f"{sys.executable} {command}", shell=True, cwd=ROOT, env=environment, check=False
        )
        found["minutes"] = (time.monotonic() - started) / 60
        if done.returncode:
            return found | {"missing": f"failed with exit status {done.returncode}"}
        found["figures"] = [json.loads(line) for line in path.read_text().splitlines()]
    told = {figure["name"] for figure in found["figures"]}
    if absent := benchmark.goals.keys() - told:
        raise SystemExit(f"{benchmark.command} did not tell {', '.join(sorted(absent))}")
    return found


def machine() -> str:
    """Processor, cores, memory, and the versions of what was measured."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return (
        f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB; Python {platform.python_version()}, "
        + ", ".join(versions)
    )


def reached(value: float, goal: str) -> str:
    """'yes' or 'no'; '' without a goal."""
    if not goal:
        return ""
    sign, bound = goal.split()
    return "yes" if (value <= float(bound) if sign == "≤" else value >= float(bound)) else "no"


def page(found: Mapping[str, dict[str, Any]]) -> str:
    """The table as markdown."""
    lines = [TITLE, "", "    python benchmarks/run_all.py --data_dir DIR", ""]
    machines = dict.fromkeys(x["machine"] for x in found.values() if not x["missing"])
    lines += [
        "Medians with the quartiles of the rounds; sides of a ratio take turns in one process.",
        "Figures of the TPU compiler are its estimates and have no spread. Measured on",
        "; and on ".join(machines) + ".",
        "",
        "| | figure | goal | measured | reached |",
        "|---|---|---:|---:|---|",
    ]
    notes = []
    for number, benchmark in enumerate(BENCHMARKS, 1):
        record = found.get(benchmark.command)
        if record is None:
            continue
        if record["missing"]:
            notes.append(f"{number}. `{benchmark.command}`: {record['missing']}.")
            continue
        took = ", ".join(filter(None, (f"{record['minutes']:.0f} min", record.get("package"))))
        notes.append(f"{number}. `python {benchmark.command}` ({took})")
        told = {figure["name"]: figure for figure in record["figures"]}
        for place, (name, goal) in enumerate(benchmark.goals.items()):
            value, spread = told[name]["value"], told[name]["spread"]
            measured = f"{value:.3f}"
            if spread is not None:
                measured += f" [{spread[0]:.3f} {spread[1]:.3f}]"
            of = "" if place else f"{benchmark.of} ({number})"
            lines.append(f"| {of} | {name} | {goal} | {measured} | {reached(value, goal)} |")
    return "\n".join([*lines, "", *notes]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="performance", help="OUT.json and OUT.md")
    parser.add_argument("--data_dir", help="a folder in XTREME-UP's layout")
    parser.add_argument("--only", default="", help="a part of the commands to run")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    stored = out.with_suffix(".json")
    found = {}
    if stored.exists():
        found = {x["command"]: x for x in json.loads(stored.read_text()) if not x["missing"]}
    for benchmark in BENCHMARKS:
        if args.only not in benchmark.command or benchmark.command in found:
            continue
        print(f"\n$ python {benchmark.command}", flush=True)
        record = measure(benchmark, args.data_dir) | {"machine": machine()}
        if record["missing"]:
            print(record["missing"], flush=True)
        found[benchmark.command] = record
        stored.write_text(json.dumps(list(found.values()), indent=1) + "\n")
    out.with_suffix(".md").write_text(page(found))
    print(f"\n{page(found)}")


if __name__ == "__main__":
    main()
