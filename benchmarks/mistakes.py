"""A hundred mistakes and more, each in a process of its own: how soon it ends, and in which line.

Each is a command of tests/hundred_mistakes.py in a folder made for it, after one that warms the
caches. A mistake counts as answered where the command ends with status 2 in one line that names the
culprit and, where there is one, the nearest valid name, with its place in a gin file.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

import hundred_mistakes as mistakes  # noqa: E402

from flix_jax.adapters import text_tables  # noqa: E402

MOST_SECONDS = 10.0
SHOWN = 20
PATIENCE = 120.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """How a command ended, and what is wrong with that."""

    group: str
    mistake: str
    seconds: float
    cpu_seconds: float
    status: int
    told: str
    wrong: tuple[str, ...]


def run(line: list[str], folder: pathlib.Path) -> tuple[int, str, float, float]:
    """Exit status, what was told on stderr, seconds and CPU seconds of a command."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "flix_jax.cli", *line],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stderr, seconds, cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="a part of the names of those to run"
    )
    parser.add_argument("--out", help="json file for every mistake, its line and seconds")
    arguments = parser.parse_args()
    # Virtual devices, for mistakes about meshes; commands of the tests have as many.
    os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8")
    paths = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    answers: list[Answer] = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        os.chdir(folder)
        mistakes.make_world(folder)
        run(["check", "--gin_file=run.gin", "--gin.DATA_DIR='data'"], folder)
        before = mistakes.contents(folder)
        for group, members in mistakes.GROUPS.items():
            for mistake in members:
                if arguments.only and not any(text in mistake.name for text in arguments.only):
                    continue
                with mistakes.made(mistake, folder):
                    status, told, seconds, cpu = run(mistake.line.split(), folder)
                wrong = mistakes.faults(mistake, status, told)
                after = mistakes.contents(folder)
                names = {n for n in {*before, *after} if before.get(n) != after.get(n)}
                if names - mistake.files.keys():
                    wrong.append("files changed")
                before = after
                if seconds > MOST_SECONDS:
                    wrong.append("too slow")
                answers.append(
                    Answer(group, mistake.name, seconds, cpu, status, told, tuple(wrong))
                )
                print(".!"[bool(wrong)], end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    if arguments.out:
        records = [dataclasses.asdict(answer) for answer in answers]
        pathlib.Path(arguments.out).write_text(json.dumps(records, indent=2) + "\n")
    answers.sort(key=lambda answer: (not answer.wrong, -answer.seconds))
    wrong_ones = [answer for answer in answers if answer.wrong]
    rows = [["seconds", "of CPU", "verdict", "mistake"]]
    for answer in answers[: len(wrong_ones) + SHOWN]:
        verdict = "; ".join(answer.wrong) or "answered"
        times = f"{answer.seconds:.1f}", f"{answer.cpu_seconds:.1f}"
        rows.append([*times, verdict, answer.mistake])
    print(text_tables.plain(rows))
    spent = sorted(answer.seconds for answer in answers)
    accepted = sum(answer.status == 0 for answer in answers)
    print(
        f"\n{len(answers)} mistakes: {len(answers) - len(wrong_ones)} answered, {accepted} "
        f"accepted; median {spent[len(spent) // 2]:.1f} s, longest {spent[-1]:.1f} s"
    )
    return int(bool(wrong_ones))


if __name__ == "__main__":
    sys.exit(main())
