"""Small text files that are whole or absent, on a local disk or in a bucket."""

import json
import os
import re
import socket
from typing import Any

from etils import epath

from flix_jax import buckets, preemption, processes
from flix_jax.adapters import plain_json
from flix_jax.data import bounded

# Names of temporary files say whose they are.
_HERE = socket.gethostname()
_TEMPORARY = re.compile(rf"\..+\.{re.escape(_HERE)}\.(\d+)\.tmp")

EVALUATIONS = "evaluations"  # in a run's folder


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes `text` (UTF-8) so that a reader finds the old content or the new, never a part.

    On a local disk through a neighbouring temporary file; a bucket's objects appear whole anyway
    and cannot be renamed. Missing parent folders are made. Of several processes, which all have the
    same to write, the first one writes.
    """
    if not processes.is_first():
        return
    path = epath.Path(path)
    if buckets.is_bucket(path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{_HERE}.{os.getpid()}.tmp"
    with preemption.unbroken():
        try:
            temporary.write_text(text)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def clear(folder: epath.PathLike) -> None:
    """Removes what `write_text` has left below a folder in processes of this machine that are gone.

    Of several processes the first one does. A bucket has nothing of the kind.
    """
    if not processes.is_first() or buckets.is_bucket(folder) or not os.path.isdir("/proc/self"):
        return
    for place, _, names in os.walk(folder):
        for name in names:
            found = _TEMPORARY.fullmatch(name)
            if found and not os.path.isdir(f"/proc/{found[1]}"):
                os.unlink(os.path.join(place, name))


def write_json(path: epath.PathLike, value: Any) -> None:
    """`write_text` of readable json: indented, keys in the order given, no escaped letters."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_object(path: epath.PathLike) -> dict[str, Any] | None:
    """The json object in a file; None where there is no such file.

    Raises:
      ValueError: the file is no json or of something else, or larger than any that is written
        here; names the file.
    """
    return bounded.read_object(path) if epath.Path(path).exists() else None


def read_texts(path: epath.PathLike) -> list[str] | None:
    """The json list of texts in a file; None and errors as of `read_object`."""
    if not epath.Path(path).exists():
        return None
    found = bounded.read_json(path)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{path}: expected a JSON list of texts, got {plain_json.shorten(found)}")
    return found


def evaluation_folder(run_dir: epath.PathLike, step: int, split: str) -> epath.Path:
    """`evaluations/<step>` of a run for validation, a folder of the split's name in it else."""
    folder = epath.Path(run_dir) / EVALUATIONS / str(step)
    return folder if split == "validation" else folder / split


def predictions_file(folder: epath.Path, cell: str) -> epath.Path:
    """Where an evaluation leaves the predictions of a cell: `ner.sw.jsonl` for `ner/sw`."""
    return folder / f"{_stem(cell)}.jsonl"


def scores_file(folder: epath.Path, cell: str) -> epath.Path:
    """Where an evaluation leaves the scores of a cell, and what they were made with."""
    return folder / f"{_stem(cell)}.scores.json"


def _stem(cell: str) -> str:
    return cell.replace("/", ".").replace(":", ".")
