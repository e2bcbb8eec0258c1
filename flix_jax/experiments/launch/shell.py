"""Commands of other programs: shown as they run, and only shown in a dry run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

WIDTH = 100

# Where the programs come from that a machine may lack.
SOURCES = {
    "gcloud": "https://cloud.google.com/sdk/docs/install",
    "kubectl": "https://kubernetes.io/docs/tasks/tools/",
    "xpk": "pip install xpk",
    "sbatch": "it is on the login nodes of a SLURM cluster",
}


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that has ended: its exit status, its output where asked for, its last errors."""

    status: int = 0
    output: str = ""
    errors: str = ""

    @property
    def reason(self) -> str:
        """What went wrong, in one line."""
        text = " ".join(self.errors.rpartition("ERROR:")[2].split())
        text = re.sub(r"^\([a-z.-]+\) ", "", text)  # gcloud names its command here
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["message"]  # as the API of TPUs has put it
        return text or f"exit status {self.status}"


def written(argv: Sequence[str]) -> str:
    """A command as a shell reads it; long ones on several lines."""
    text = shlex.join(argv)
    if len(text) <= WIDTH:
        return text
    lines: list[str] = []
    line = ""
    for word in map(shlex.quote, argv):
        if line and len(line) + len(word) > WIDTH - 3 - 4 * bool(lines):
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".lstrip()
    return " \\\n    ".join([*lines, line])


@dataclasses.dataclass(frozen=True)
class Shell:
    """Runs commands, or shows them only.

    Attributes:
      dry_run: whether nothing is executed.
      poll: seconds between two looks at a state.
    """

    dry_run: bool = False
    poll: float = 30.0

    def say(self, text: str) -> None:
        """A remark among the commands."""
        print(f"# {text}", flush=True)

    def wait(self) -> None:
        if not self.dry_run:
            time.sleep(self.poll)

    def run(self, argv: Sequence[str], *, quiet: bool = False, assumed: str = "") -> Done:
        """Runs a command and waits for its end.

        Args:
          argv: the program and its arguments.
          quiet: keep its output, and show neither it nor, a second time, the command.
          assumed: the output that a dry run goes on with.

        Raises:
          ValueError: there is no such program here.
        """
        if not quiet or self.dry_run:
            print(written(argv), flush=True)
        if self.dry_run:
            return Done(output=assumed)
        if shutil.which(argv[0]) is None:
            raise ValueError(f"{argv[0]} is not installed here: {SOURCES.get(argv[0], argv[0])}")
        if quiet:
            done = subprocess.run(list(argv), capture_output=True, text=True, check=False)
            return Done(done.returncode, done.stdout.strip(), done.stderr)
        with subprocess.Popen(list(argv), stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            errors: list[str] = []
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                errors = [*errors[-50:], line]
        return Done(process.returncode, "", "".join(errors))

    def check(self, argv: Sequence[str], *, quiet: bool = False, assumed: str = "") -> str:
        """Runs a command that must succeed and returns its output, where it is kept.

        Raises:
          ValueError: in one line, that it did not.
        """
        done = self.run(argv, quiet=quiet, assumed=assumed)
        if done.status:
            raise ValueError(f"{named(argv)}: {done.reason}")
        return done.output


def named(argv: Sequence[str]) -> str:
    """A command without its long flags, for messages."""
    words = [word for word in argv if not word.startswith("--")]
    return shlex.join(words[:6])
