"""What is launched: a folder with the code, the gin files and the script that workers run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from flix_jax.configs import FOLDER as CONFIGS
from flix_jax.experiments.launch import worker
from flix_jax.experiments.launch.checkout import Checkout
from flix_jax.experiments.launch.shell import Shell
from flix_jax.experiments.run import RANDOM, Run
from flix_jax.training import partitioning

# Kubernetes appends some twenty characters to make the names of pods, which have 63.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")

RECORD = "launch.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """What workers train, and from where.

    Attributes:
      name: of the machines or the job of an engine.
      run_dir: the run's folder.
      folder: the launched folder on this machine, which `write` fills.
      checkout: the code.
      extra: of the installation, 'tpu' or 'gpu', and 'gcs' for a bucket: 'tpu,gcs'.
      gin_files: as the workers name them.
      copies: files of this machine by their names in the launched folder's `gin/`.
      bindings: what followed each `--gin.`.
      grace_seconds: of `flix train`; None leaves it its own.
    """

    name: str
    run_dir: str
    folder: str
    checkout: Checkout
    extra: str
    gin_files: tuple[str, ...]
    copies: Mapping[str, str]
    bindings: tuple[str, ...] = ()
    grace_seconds: float | None = None

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def bucket(self) -> str:
        """Where the launched folder lies for workers that do not share this machine's files."""
        return f"{self.run_dir.rstrip('/')}/launch/{self.checkout.version}"

    @property
    def labels(self) -> dict[str, str]:
        """For whoever wonders what these machines do; lower-case letters, digits and dashes."""
        return {"flix-run": self.name, "flix-commit": self.checkout.version}

    def train(self) -> list[str]:
        """The command of every worker, which finds the others by itself."""
        files = [f"--gin_file={name}" for name in self.gin_files]
        flags = [f"--gin.{text}" for text in self.bindings]
        if self.grace_seconds is not None:
            flags.insert(0, f"--grace_seconds={self.grace_seconds:g}")
        return ["flix", "train", *files, f"--run_dir={self.run_dir}", "--coordinator=auto", *flags]

    def files(self) -> dict[str, str]:
        """The texts of the launched folder, by their names there, but for copied gin files."""
        script = worker.script(
            name=self.name,
            extra=self.extra,
            version=self.checkout.version,
            train=self.train(),
        )
        record = {
            "name": self.name,
            "commit": self.checkout.commit,
            "changed": self.checkout.dirty,
            "command": self.train(),
        }
        return {worker.SCRIPT: script, RECORD: json.dumps(record, indent=2) + "\n"}

    def write(self, shell: Shell, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Fills the launched folder, also with the texts `more`; returns all texts by their paths.

        A dry run returns them only.
        """
        texts = {**self.files(), **(more or {})}
        names = [*texts, *(f"{worker.GIN}/{name}" for name in self.copies), worker.CODE]
        shell.say(f"{self.folder}: {', '.join(names)}")
        if not shell.dry_run:
            folder = Path(self.folder)
            shutil.rmtree(folder / worker.GIN, ignore_errors=True)  # of an earlier launch
            folder.mkdir(parents=True, exist_ok=True)
            for name, source in self.copies.items():
                target = folder / worker.GIN / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(Path(source).read_bytes())
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
        shell.check(self.checkout.archive(os.path.join(self.folder, worker.CODE)))
        return {os.path.join(self.folder, name): text for name, text in texts.items()}

    def ship(self, shell: Shell) -> None:
        """Copies the launched folder to the run's bucket."""
        shell.check(["gcloud", "storage", "rsync", "--recursive", self.folder, self.bucket])


def check_name(name: str) -> None:
    """Raises ValueError for what cannot be the name of machines and jobs alike."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"--name={name}: expected at most 40 lower-case letters, digits and dashes, a letter "
            "first and no dash last"
        )


def usual_name(run_dir: str) -> str:
    """A name for a run in this folder, the same whenever it is asked for."""
    last = PurePosixPath(run_dir.rstrip("/")).name.lower()
    return re.sub(r"[^a-z0-9]+", "-", f"flix-{last}")[:40].strip("-")


def travelling(
    gin_files: Sequence[str], files: Mapping[str, object]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """How workers name the gin files, and which files must travel for it.

    Args:
      gin_files: as they were given.
      files: the files that were read, by the names that flags and includes have for them.

    Returns:
      (`gin_files` for a worker, paths here by their names in the launched folder). Files that come
      with flix_jax do not travel, for the code brings them; nor do those of a bucket.

    Raises:
      ValueError: a file is included by a name that means nothing elsewhere, or two have one name.
    """
    names: dict[str, str] = {}
    copies: dict[str, str] = {}
    for name, found in files.items():
        path = os.fspath(found)  # type: ignore[call-overload]
        names[name] = name
        if "://" in path or Path(path).resolve().is_relative_to(CONFIGS.resolve()):
            continue
        if Path(name).is_absolute() or ".." in Path(name).parts:
            if name not in gin_files:
                raise ValueError(
                    f"'{name}' is included by a path that workers do not have; name it from the "
                    "working directory"
                )
            names[name] = Path(name).name
        name = os.path.normpath(names[name])
        if copies.setdefault(name, path) != path:
            raise ValueError(f"gin files {copies[name]} and {path} would both be {name} on workers")
    return tuple(names[name] for name in gin_files), copies


def check_run(run: Run, *, shared: bool) -> None:
    """Refuses a run that names files which the workers do not find.

    Args:
      run: the run.
      shared: whether workers see the files of this machine, though they start in another folder.

    Raises:
      ValueError: in one line, naming the value.
    """
    paths = {
        "source.data_dir": getattr(run.source, "data_dir", None),
        "source_text.files": getattr(run.source_text, "files", None),
        "vocabulary.path": getattr(run.vocabulary, "path", None),
        "adapters_from": run.adapters_from,
    }
    if isinstance(run.base, Run):
        check_run(run.base, shared=shared)
    elif run.base != RANDOM:
        paths["base"] = run.base
    made = getattr(run.source, "cache_dir", None)  # where workers make the data themselves
    for name, path in paths.items():
        if path is None or (made is not None and Path(path).is_relative_to(made)):
            continue
        # An absolute path may be a disk that the workers have, too.
        if "://" not in str(path) and not Path(path).is_absolute():
            raise ValueError(
                f"Run.{name} = {str(path)!r}: workers do not start in this folder; give "
                + ("the whole path" if shared else "a copy in a bucket, gs://...")
            )


def check_mesh(run: Run, devices: int) -> None:
    """Refuses a run, or a base that it trains first, whose mesh or batch does not fit the devices.

    Raises:
      ValueError: with the sizes that disagree.
    """
    if isinstance(run.base, Run):
        check_mesh(run.base, devices)
    try:
        mesh: Any = run.mesh.abstract(devices)  # only its shape is looked at
        partitioning.check_batch_size(mesh, run.batch_size, run.microbatches)
        partitioning.check_batch_size(mesh, run.evaluation.batch_size)
    except ValueError as error:
        raise ValueError(f"on {devices} devices: {error}") from None


def check_run_dir(run_dir: str, *, shared: bool) -> None:
    """Raises ValueError for a folder that the workers of a pod do not share."""
    if not shared and not run_dir.startswith("gs://"):
        raise ValueError(
            f"--run_dir={run_dir}: every worker of a pod writes its part of a checkpoint there, "
            "and the machines are gone afterwards, so it must be a bucket (gs://BUCKET/FOLDER)"
        )


def cost(devices: int, unit: str, *, hours: float | None, run: Run, seconds: float | None) -> str:
    """What the run takes of the machines, as far as that is known, in one line."""
    if hours is None and seconds is None:
        return f"{unit}-hours unknown: give --hours, or --step_seconds as flix plan prints them"
    if hours is not None:
        return f"{devices * hours:,.1f} {unit}-hours: {devices} for {hours:g} hours"
    assert seconds is not None
    hours = seconds * run.total_steps / 3600
    base = ", without the training of its base" if isinstance(run.base, Run) else ""
    return (
        f"{devices * hours:,.1f} {unit}-hours of training steps{base}: {devices} for "
        f"{run.total_steps} steps of {seconds:g} s"
    )
