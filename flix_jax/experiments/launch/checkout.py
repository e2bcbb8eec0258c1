"""The code that is launched: a commit of a git checkout, or its tracked files as they are now."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import flix_jax

#: What an installation consists of; changes elsewhere reach no worker's program.
PARTS = ("flix_jax", "tasks", "configs", "scripts", "setup.py", "pyproject.toml")


@dataclasses.dataclass(frozen=True)
class Checkout:
    """What is packed for the workers.

    Attributes:
      folder: of the checkout.
      commit: the checked-out commit, in full.
      tree: what is packed: the commit, or one that git made of the changed files.
    """

    folder: str
    commit: str
    tree: str

    @property
    def dirty(self) -> bool:
        return self.tree != self.commit

    @property
    def version(self) -> str:
        """Twelve digits of the commit, with '-dirty' where files differ from it."""
        return self.commit[:12] + "-dirty" * self.dirty

    def archive(self, path: str) -> list[str]:
        """The command that packs the code."""
        pack = ["git", "-C", self.folder, "archive", "--format=tar.gz"]
        return [*pack, f"--output={Path(path).absolute()}", self.tree]


def find(folder: str | None, *, allow_dirty: bool) -> Checkout:
    """The code of a checkout, by default of that which this flix_jax is run from.

    Raises:
      ValueError: there is no checkout, or files differ from its commit and `allow_dirty` is False.
    """
    root = folder or str(Path(flix_jax.__file__).parent.parent)
    if not (Path(root) / ".git").exists():
        raise ValueError(
            f"{root} is no git checkout, so there is no commit to launch; give one by --code=DIR"
        )
    commit = _git(root, "rev-parse", "HEAD")
    parts = [part for part in PARTS if (Path(root) / part).exists()]
    lines = _git(root, "status", "--porcelain", "--", *parts).splitlines()
    if not lines:
        return Checkout(root, commit, commit)
    changed = [line[3:] for line in lines]
    if not allow_dirty:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ValueError(
            f"{root}: {changed[0]}{more} differ{'' if more else 's'} from commit {commit[:12]}, so "
            "the run could not be made again; commit, or give --allow_dirty"
        )
    untracked = [line[3:] for line in lines if line.startswith("??")]
    if untracked:
        raise ValueError(f"{root}: {untracked[0]} would not be packed: git does not track it")
    # An object that no branch names: neither the files nor the stash list change.
    who = ("-c", "user.name=flix", "-c", "user.email=flix@localhost")
    return Checkout(root, commit, _git(root, *who, "stash", "create"))


def _git(folder: str, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", folder, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"git {arguments[0]} in {folder}: {' '.join(done.stderr.split())}")
    return done.stdout.rstrip()
