"""mT5 with FLix on TPU pods, by the TPU compiler: what fits, how fast, and against plain LoRA.

    pip install '.[tpu]'
    python benchmarks/plan_table.py --out docs/results/plan_table [--kinds flix,lora] [--only WORDS]

compiles the training step of every `configs/pods/*.gin` (those whose names have the WORDS, such as
'base v5e') beside configs/experiments/xtreme_up.gin, each in a process of its own, and writes
OUT.json (what the compiler said) and OUT.md (the table). Cells that are in OUT.json are not
compiled again, so that it goes on where it was interrupted.

30 features: 10 tasks and 20 languages, whose data are a record each, made here; rank 4 each, two
active in an example. LoRA is one shared update of rank 8, so of equal active rank. 512 tokens in,
128 out. Cycles are the compiler's estimate without collectives; nothing runs on a TPU.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASKS, LANGUAGES = 10, 20
GIB = 2**30
COLUMNS = """- Base, trained, moments: GiB that a chip holds of each.
- Step: the cycles at the chip's clock, to the same with the bytes of all collectives after them, at
  the speed of one axis of the interconnect (`docs/plan.md`).
- Collectives: the bytes of their results in a step, and how many there are.
- Of LoRA's: cycles of the step against those of LoRA with the same mesh."""
BINDINGS = (
    "BASE='random'",
    "VOCABULARY=''",
    "Run.vocabulary=@ByteVocabulary()",  # only the network's own vocabulary counts here
    "Mixture.include=('*/*',)",
    "Mixture.held_out=()",
    "Evaluation.every=None",
    "Evaluation.examples=None",
    "Evaluation.keep_best=None",
    "Run.inputs_length=512",
    "Run.targets_length=128",
)


def write_data(folder: pathlib.Path) -> None:
    """A record for every language, in turns over the tasks."""
    for i in range(LANGUAGES):
        for split in ("train", "validation"):
            path = folder / f"task{i % TASKS}" / split / f"l{i:02}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"input": "a", "target": "b"}\n')


def compile_cell(pod: str, kind: str, bindings: list[str]) -> dict[str, Any]:
    """What the compiler says of one cell; in a process in which JAX has not started."""
    from flix_jax.experiments import topology

    name = topology_of(pod)
    topology.use(name)
    from flix_jax import configuration
    from flix_jax.experiments import plan

    with tempfile.TemporaryDirectory() as data:
        write_data(pathlib.Path(data))
        files = ["configs/experiments/xtreme_up.gin", f"configs/pods/{pod}.gin"]
        files += [f"configs/adapters/{kind}.gin"]
        run = configuration.load(files, [*BINDINGS, f"DATA_DIR={data!r}", *bindings]).build("Run")
        made = plan.make(run, topology.find(name), decode=False)
    train, times = made.train, made.step_seconds
    assert train is not None
    return {
        "pod": pod,
        "kind": kind,
        "mesh": dict(made.mesh),
        "remat": run.model.remat,
        "batch": run.batch_size,
        "trained": made.parameters["trained"],
        "state": {name: size / GIB for name, size in made.state.items()},
        "memory": train.memory / GIB,
        "room": made.room / GIB,
        "fits": made.fits,
        "refused": train.refused,
        "cycles": train.cycles,
        "milliseconds": [1000 * seconds for seconds in times or ()],
        "collectives": {k: [c.count, c.nbytes / GIB] for k, c in train.collectives.items()},
        "compile_seconds": train.compile_seconds,
    }


def topology_of(pod: str) -> str:
    """'mt5_xl_v5e_16x16' -> 'v5e:16x16'."""
    return ":".join(pod.rsplit("_", 2)[1:])


def page(cells: list[dict[str, Any]]) -> str:
    """What was asked and how, and the table."""
    title, _, text = (__doc__ or "").strip().partition("\n")
    return f"# {title.rstrip('.')}\n{text}\n\n{COLUMNS}\n\n{table(cells)}"


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as markdown, FLix's beside LoRA's where both are there."""
    head = ["model", "chips", "mesh", "remat", "batch", "adapters", "base, trained, moments"]
    head += ["memory of a chip", "fits", "step", "collectives", "cycles", "of LoRA's"]
    rows = [head, ["---"] * len(head)]
    lora = {cell["pod"]: cell for cell in cells if cell["kind"] == "lora"}
    for cell in sorted(cells, key=lambda c: (_order(c["pod"]), c["kind"])):
        size, chips = cell["pod"].split("_")[1], topology_of(cell["pod"])
        state = cell["state"]
        count = sum(n for n, _ in cell["collectives"].values())
        moved = sum(size for _, size in cell["collectives"].values())
        ratio = ""
        if cell["kind"] != "lora" and cell["pod"] in lora and lora[cell["pod"]]["cycles"]:
            ratio = f"{cell['cycles'] / lora[cell['pod']]['cycles']:.3f}"
        rows.append(
            [
                f"mT5-{size}",
                chips,
                " × ".join(f"{axis} {n}" for axis, n in cell["mesh"].items() if n > 1),
                cell["remat"],
                str(cell["batch"]),
                cell["kind"],
                f"{state['base']:.2f}, {state['trained']:.3f}, {state['optimizer']:.3f} GiB",
                "" if cell["refused"] else f"{cell['memory']:.2f} of {cell['room']:.2f} GiB",
                "yes" if cell["fits"] else "no",
                " to ".join(f"{ms:,.0f}" for ms in cell["milliseconds"]) + " ms",
                f"{moved:.2f} GiB in {count:,}",
                f"{cell['cycles']:,}",
                ratio,
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _order(pod: str) -> tuple[str, int]:
    sizes = ("base", "large", "xl", "xxl")
    return topology_of(pod), sizes.index(pod.split("_")[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="plan_table", help="OUT.json and OUT.md")
    parser.add_argument("--only", default="", help="words that a pod's name must have: 'xl v5e'")
    parser.add_argument("--kinds", default="flix", help="of configs/adapters, with commas")
    parser.add_argument("--gin", action="append", default=[], help="a binding more, NAME=VALUE")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        pod, kind = arguments.cell.split()
        print(json.dumps(compile_cell(pod, kind, arguments.gin)))
        return
    out = pathlib.Path(arguments.out)
    stored = out.with_suffix(".json")
    cells = json.loads(stored.read_text()) if stored.exists() else []
    pods = sorted((p.stem for p in (ROOT / "configs/pods").glob("*_*x*.gin")), key=_order)
    words = arguments.only.split()
    for kind in arguments.kinds.split(","):
        for pod in (p for p in pods if all(word in p.split("_") for word in words)):
            if any(cell["pod"] == pod and cell["kind"] == kind for cell in cells):
                continue
            command = [sys.executable, __file__, "--cell", f"{pod} {kind}"]
            command += [f"--gin={binding}" for binding in arguments.gin]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{pod} {kind}: failed", file=sys.stderr)
                continue
            cells.append(json.loads(done.stdout.splitlines()[-1]))
            stored.write_text(json.dumps(cells, indent=1) + "\n")
            out.with_suffix(".md").write_text(page(cells))
            print(table(cells[-1:]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
