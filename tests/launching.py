"""What tests of `flix launch` share: a checkout to launch, and stand-ins for other programs."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

# A run that reads nothing when it is built.
GIN = (
    "--gin_file=configs/experiments/xtreme_up.gin",
    "--gin.DATA_DIR='gs://b/data'",
    "--gin.BASE='gs://b/base'",
    "--gin.VOCABULARY='gs://b/model'",
    "--gin.Run.batch_size=3072",
    "--gin.Evaluation.batch_size=3072",
)

# Logs its arguments, and plays the answers that are left for its verb: [status, output, errors].
_STAND_IN = """\
#!{python} -IS
import json, pathlib, sys
folder = pathlib.Path({folder!r})
argv = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open(folder / "log.jsonl", "a") as log:
    log.write(json.dumps(argv) + "\\n")
answers = json.loads((folder / "answers.json").read_text())
verb = next((word for word in argv if answers.get(word)), None)
status, output, errors = answers[verb].pop(0) if verb else (0, "", "")
(folder / "answers.json").write_text(json.dumps(answers))
print(output)
print(errors, file=sys.stderr)
sys.exit(status)
"""

NOT_FOUND = [1, "", "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource not found"]
STOCKOUT = [
    1,
    "",
    'ERROR: (gcloud.compute.tpus.tpu-vm.create) {\n  "code": 8,\n  "message": "There is no more'
    ' capacity in the zone \\"us-central2-b\\""\n}',
]


@dataclasses.dataclass(frozen=True)
class StandIns:
    """Programs on PATH that do nothing but log and answer."""

    folder: Path

    def play(self, **answers) -> None:
        """Leaves answers by verb (or any other word of a command), in the order of their use."""
        (self.folder / "answers.json").write_text(json.dumps(answers))
        (self.folder / "log.jsonl").write_text("")

    @property
    def commands(self) -> list[list[str]]:
        """What was run since `play`."""
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]


def make_stand_ins(folder: Path, monkeypatch, programs=("gcloud", "kubectl", "xpk", "sbatch")):
    """Puts stand-ins in front of PATH."""
    folder.mkdir()
    for name in programs:
        path = folder / name
        path.write_text(_STAND_IN.format(python=sys.executable, folder=str(folder)))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    made = StandIns(folder)
    made.play()
    return made


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    argv = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def make_checkout(folder: Path) -> str:
    """A git checkout with a file of the package, and its commit."""
    (folder / "flix_jax").mkdir(parents=True, exist_ok=True)
    (folder / "flix_jax" / "__init__.py").write_text("A = 1\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "-m", "first")
    return git(folder, "rev-parse", "HEAD")
