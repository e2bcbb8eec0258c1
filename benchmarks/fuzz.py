"""Feeds the readers of files of unknown origin with damaged and made-up ones, guided by coverage.

    python benchmarks/fuzz.py --target=records --inputs=1000000 --seed=0

A finding is whatever is neither success nor one of the errors that the command line tells in a line
which names the file; so is an input that takes more than some seconds or some hundred MiB, or that
ends the process. Every one is printed once, with the file that keeps its input.

Atheris (libFuzzer for Python) mutates valid files: bits, lengths, numbers, splices, and words that
the reader was seen to compare with; json besides by its values (`fuzz_mutations.py`). What reaches
new lines is kept and mutated further. Needs `pip install flix_jax[fuzz]`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS = 5.0  # of CPU time that an input may take
MEBIBYTES = 300  # by which an input may raise the peak of memory
LONGEST = 4096  # bytes of an input, or as long as the longest valid file
NAMES = (
    *("records", "requests", "features", "gin", "languages", "sentencepiece"),
    *("adapters", "peft", "huggingface", "t5x", "orbax", "checkpoints", "forged"),
)
_COVERED = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--target", choices=NAMES, required=True)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="after which it ends anyway")
    parser.add_argument("--keep", type=Path, default=Path("findings"), help="folder of findings")
    parser.add_argument("--replay", type=Path, help="an input of a finding, to see its traceback")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if arguments.replay:
        _replay(arguments)
    elif arguments.child:
        _child(arguments)
    else:
        sys.exit(_parent(arguments))


def _replay(arguments: argparse.Namespace) -> None:
    import fuzz_targets

    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        accepted = fuzz_targets.make(arguments.target, Path(folder) / "x")(
            arguments.replay.read_bytes()
        )
    print("accepted" if accepted else "refused in a line")


def _memory() -> str | None:
    """A folder in memory, where there is one: inputs are files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _parent(arguments: argparse.Namespace) -> int:
    """Runs children until the inputs are used up; one that dies is a finding, too."""
    keep = arguments.keep / arguments.target
    total: dict[str, Any] = {"inputs": 0, "accepted": 0, "findings": {}}
    covered, start, seed = (0, 0, 0), time.monotonic(), arguments.seed
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        while total["inputs"] < arguments.inputs:
            left = arguments.minutes * 60 - (time.monotonic() - start)
            if left < 1:
                break
            command = [sys.executable, __file__, *sys.argv[1:], f"--child={folder}"]
            rest = arguments.inputs - total["inputs"]
            command += [f"--inputs={rest}", f"--seed={seed}", f"--minutes={left / 60}"]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
            summary = Path(folder) / "summary.json"
            if not summary.exists():
                print(done.stderr, file=sys.stderr)
                return 2
            found = json.loads(summary.read_text())
            total["inputs"] += found["inputs"]
            total["accepted"] += found["accepted"]
            total["findings"] |= found["findings"]
            for match in _COVERED.finditer(done.stderr):
                covered = max(covered, tuple(map(int, match.groups())))  # type: ignore[assignment]
            if done.returncode:
                tail = done.stderr[-1500:]
                place = keep / f"died-{seed}"
                place.parent.mkdir(parents=True, exist_ok=True)
                current = Path(folder) / "current"
                place.write_bytes(current.read_bytes() if current.exists() else b"")
                total["findings"][f"the process ended with {done.returncode}: {tail}"] = str(place)
                if not found["inputs"]:
                    break
            seed += 1
    seconds = time.monotonic() - start
    for what, place in total["findings"].items():
        print(f"finding, kept in {place}:\n  {what}")
    print(
        f"{arguments.target}: {total['inputs']:,} inputs in {seconds:.0f} s, "
        f"{total['accepted']:,} accepted, {len(total['findings'])} findings; "
        f"coverage {covered[0]:,} edges, {covered[1]:,} features, corpus {covered[2]:,}"
    )
    return 1 if total["findings"] else 0


def _child(arguments: argparse.Namespace) -> None:
    import atheris
    import fuzz_mutations

    with atheris.instrument_imports(include=["flix_jax"]):
        import fuzz_targets

        folder = Path(arguments.child)
        target = fuzz_targets.make(arguments.target, folder / "files" / "x")
    keep = arguments.keep / arguments.target
    found: dict[str, Any] = {"inputs": 0, "accepted": 0, "findings": {}}
    current, summary = folder / "current", folder / "summary.json"
    start = time.monotonic()

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def note(what: str, data: bytes) -> None:
        if what in found["findings"]:
            return
        keep.mkdir(parents=True, exist_ok=True)
        place = keep / hashlib.sha256(data).hexdigest()[:16]
        place.write_bytes(data)
        found["findings"][what] = str(place)

    slow = arguments.target in ("checkpoints", "forged", "orbax")

    def one(data: bytes) -> None:
        if slow or arguments.target in ("sentencepiece", "t5x", "huggingface"):
            current.write_bytes(data)  # of readers in C++, which can end the process
        before, began = peak(), time.process_time()
        try:
            found["accepted"] += target(data)
        except Exception as error:
            note(_described(error), data)
        taken, seconds = peak() - before, time.process_time() - began
        # What every first call imports and compiles is not the input's.
        if found["inputs"] > 100 and (taken > MEBIBYTES or seconds > SECONDS):
            note(f"took {seconds:.1f} s and {taken:.0f} MiB", data)
        found["inputs"] += 1
        ended = found["inputs"] >= arguments.inputs
        ended |= time.monotonic() - start > arguments.minutes * 60
        if ended or found["inputs"] % 1000 == 1:
            summary.write_text(json.dumps(found))
        if ended:
            sys.stderr.flush()
            os._exit(0)

    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    summary.write_text(json.dumps(found))
    longest = max(LONGEST, *map(len, target.seeds))
    options = [f"-seed={arguments.seed + 1}", f"-max_len={longest}", "-timeout=120"]
    options += ["-rss_limit_mb=0", f"-artifact_prefix={folder}/", "-mutate_depth=2"]

    def mutated(data: bytes, longest: int, seed: int) -> bytes:
        return fuzz_mutations.mutate(data, longest, seed, atheris.Mutate, target.folder)

    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutated)
    atheris.Fuzz()


def _described(error: BaseException) -> str:
    """Kind, message and innermost places of an error: equal ones are one finding."""
    cause = error.__cause__ or error
    frames = traceback.extract_tb(cause.__traceback__)[-3:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
    kind = type(cause).__name__
    line = re.sub(r"\d+", "#", " ".join(str(error).split()))[:60]
    return f"{type(error).__name__} ({kind}) at {places}: {line}"


if __name__ == "__main__":
    main()
