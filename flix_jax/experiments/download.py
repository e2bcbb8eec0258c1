"""XTREME-UP's data from where they are published, as the folder that the tasks read.

The release (arXiv 2305.11938, v1.1) is one archive. Its named-entity data are not in it: they are
MasakhaNER-X, published in MasakhaNER's repository, whose files have the release's record layout
(`text`, `spans` with `start_byte`, `limit_byte` and `label`) and are joined in as `ner/`.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flix_jax.experiments.transfer import FetchError, Progress, fetch, sha256_of, unpacked
from flix_jax.tasks.xtreme_up import SPLITS

RELEASE = "xtreme_up_v1.1"
RELEASE_URL = "https://storage.googleapis.com/xtreme-up/xtreme-up-v1.1.jsonl.tgz"
NER_REPOSITORY = "https://github.com/masakhane-io/masakhane-ner"
NER_COMMIT = "2290592aaa889c3d5c0030c15c80e153941fe4e9"
NER_FOLDER = "xtreme-up/MasakhaNER-X"
NER_URL = f"https://raw.githubusercontent.com/masakhane-io/masakhane-ner/{NER_COMMIT}/{NER_FOLDER}"
NER_PINS = "masakhaner_x.tsv"


@dataclass(frozen=True)
class Pin:
    """A published file that is known: `name` is `train/sw.jsonl`."""

    name: str
    size: int
    sha256: str


def ner_pins() -> tuple[Pin, ...]:
    """The 60 files of MasakhaNER-X, 20 languages in 3 splits, as of NER_COMMIT."""
    table = importlib.resources.files("flix_jax.experiments") / NER_PINS
    rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()[1:]]
    return tuple(Pin(name, int(size), sha256) for name, size, sha256 in rows)


def xtreme_up(
    out_dir: str | os.PathLike[str],
    *,
    url: str = RELEASE_URL,
    ner_url: str = NER_URL,
    pins: tuple[Pin, ...] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Fetches XTREME-UP v1.1 and MasakhaNER-X into `<out_dir>/xtreme_up_v1.1`.

    What is fetched lies in `<out_dir>/downloads` and is used from there: a file that was put there
    by hand is not fetched. A release that is unpacked already is left as it is; what is missing of
    its `ner/` is added. Started again after any failure, it goes on.

    The files of MasakhaNER-X are compared with sizes and digests that are known beforehand. For the
    archive none are published: what the server announces is compared, and the SHA-256 of the first
    archive that could be unpacked is written beside it (`.sha256`, in the format of `sha256sum`)
    and compared with ever after.

    Args:
      out_dir: a local folder; made if it is missing.
      url: of the archive; of a mirror, say.
      ner_url: of the folder that holds MasakhaNER-X's `{split}/{language}.jsonl`.
      pins: the files of MasakhaNER-X; None takes `ner_pins()`.
      say: takes lines on what was done.

    Returns:
      The folder, for `XtremeUp.data_dir`.

    Raises:
      ValueError: in one line, with the address and where to put a file that was fetched by hand,
        for what cannot be fetched; for a file of another size or digest; for an archive that is
        damaged, unsafe, or holds no release.
    """
    if "://" in os.fspath(out_dir):
        raise ValueError(f"{os.fspath(out_dir)} is not a local folder, where archives are unpacked")
    out = Path(out_dir)
    downloads, release = out / "downloads", out / RELEASE
    downloads.mkdir(parents=True, exist_ok=True)
    if release.exists():
        say(f"{release} is there already: not fetched again")
    else:
        _release(url, downloads / RELEASE_URL.rpartition("/")[2], release, say)
    pins = ner_pins() if pins is None else pins
    _join_ner(ner_url, pins, downloads / "MasakhaNER-X", release / "ner", say)
    tasks = _tasks(release)
    count = sum(1 for task in tasks for _ in (release / task).glob("*/*.jsonl"))
    say(f"{release}: {count} files of {len(tasks)} tasks: {', '.join(tasks)}")
    return release


# --------------------------------------------------------------------------------------------
# The release


def _release(url: str, archive: Path, release: Path, say: Callable[[str], None]) -> None:
    if archive.exists():
        say(f"{archive} is there already: not fetched")
    else:
        by_hand = (
            f"give another address with --url, or fetch that file by hand, put it at {archive}, "
            "and run the command again"
        )
        with _placed(url, by_hand), _bar(archive.name) as progress:
            fetch(url, archive, progress=progress)
    noted, found = archive.with_name(f"{archive.name}.sha256"), sha256_of(archive)
    expected = noted.read_text().split()[:1] if noted.exists() else []
    if expected and expected != [found]:
        raise ValueError(
            f"{archive} has the sha256 {found}, but {noted} holds {expected[0]} of an earlier "
            "download: remove the file that is wrong and run the command again"
        )
    with unpacked(archive, release.parent) as folder:
        os.rename(_find_release(folder, archive), release)
    size = f"{archive.name}: {archive.stat().st_size:,} bytes, sha256 {found}"
    if expected:
        say(f"{size}, as of the first download ({noted})")
    else:
        noted.write_text(f"{found}  {archive.name}\n")
        say(f"{size}; none is published to compare with: later downloads are, by {noted}")


def _find_release(folder: Path, archive: Path) -> Path:
    """The folder that holds the tasks: the archive's own, or one or two levels down in it."""
    for depth in ("", "*/", "*/*/"):
        found = {path.parents[2] for path in folder.glob(f"{depth}*/*/*.jsonl") if _in_split(path)}
        if len(found) == 1:
            return found.pop()
    raise ValueError(
        f"{archive} holds no folder of {{task}}/{{{','.join(SPLITS)}}}/{{file}}.jsonl: it is not "
        "the release; remove it and run the command again"
    )


def _in_split(path: Path) -> bool:
    return path.parent.name in SPLITS


def _tasks(release: Path) -> list[str]:
    return sorted({p.parts[-3] for p in release.glob("*/*/*.jsonl") if _in_split(p)})


# --------------------------------------------------------------------------------------------
# MasakhaNER-X


def _join_ner(
    url: str, pins: tuple[Pin, ...], downloads: Path, ner: Path, say: Callable[[str], None]
) -> None:
    absent = [pin for pin in pins if not (ner / pin.name).exists()]
    others = [p.name for p in pins if p not in absent and sha256_of(ner / p.name) != p.sha256]
    if others:
        say(f"{ner}: not MasakhaNER-X's and left as they are: {', '.join(others)}")
    if not absent:
        return
    by_hand = (
        f"give another address with --ner_url, or put the folder {NER_FOLDER} of "
        f"{NER_REPOSITORY} at {downloads} by hand, and run the command again"
    )
    done, total = 0, sum(pin.size for pin in absent)
    with _bar(downloads.name) as progress:
        for pin in absent:
            path, address = downloads / pin.name, f"{url.rstrip('/')}/{pin.name}"
            if not path.exists():

                def together(here: int, _: int | None, done: int = done) -> None:
                    progress(done + here, total)

                with _placed(address, by_hand):
                    fetch(address, path, size=pin.size, sha256=pin.sha256, progress=together)
            elif (found := sha256_of(path)) != pin.sha256:
                raise ValueError(
                    f"{path} has the sha256 {found}, expected {pin.sha256}: remove it and run the "
                    "command again"
                )
            done += pin.size
    for pin in absent:
        target = ner / pin.name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(downloads / pin.name, partial)
        os.replace(partial, target)
    say(
        f"{ner}: {len(absent)} files of MasakhaNER-X (CC BY-NC 4.0), {total:,} bytes, with the "
        f"sizes and digests of commit {NER_COMMIT[:7]}"
    )


# --------------------------------------------------------------------------------------------
# On the way


@contextlib.contextmanager
def _placed(url: str, by_hand: str) -> Iterator[None]:
    """Adds to a failed transfer which address it was, and what else can be done."""
    try:
        yield
    except FetchError as error:
        moved = "; it may have moved" if re.search(r"answered (403|404|410)", str(error)) else ""
        raise FetchError(f"could not fetch {url}: {error}{moved}; {by_hand}") from None


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Progress]:
    """A bar on the terminal's standard error; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns,
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        task = bars.add_task(title, total=None)
        yield lambda here, total: bars.update(task, completed=here, total=total)
