"""The manifest of a checkpoint: a digest of each of its files and arrays.

It is written last, before the checkpoint gets its name, and carries a checksum of its own, so that
whatever changes in the folder afterwards is found. Orbax itself restores flipped bits in silence.

manifest.json   {"format": 2, "step": int, "time": seconds since 1970, "versions": {package: text},
                "files": {path in the folder: [bytes, xxh3-128]},
                "arrays": {"trained/…": digest (training.array_digests)},
                "checksum": xxh3-128 of the others as canonical json}
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
import xxhash
from etils import epath

import flix_jax

NAME = "manifest.json"
FORMAT = 2

_CHUNK = 1 << 18  # bytes that are read at a time: they are hashed while the cache has them
# Errors of a disk, and of a folder where a file was: not those of permissions, nor of a network.
_DAMAGE = (errno.EIO, errno.EISDIR, errno.ENOTDIR)
_THREADS = 8  # xxhash and reading both release the interpreter


def write(
    folder: epath.Path, step: int, arrays: Mapping[str, str], announced: Mapping[str, bytes]
) -> None:
    """Writes the manifest of all that a folder holds.

    Args:
      folder: of the checkpoint, which has not got its name yet.
      step: that it is of.
      arrays: the digests of its arrays.
      announced: path in the folder -> content of what will be written after the manifest.
    """
    files = _digests(folder, files_of(folder))
    for found in files.values():
        if len(found) == 1:
            raise OSError(f"{folder}: {found[0]}")
    record: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "time": time.time(),
        "versions": {
            "flix_jax": flix_jax.__version__,
            "jax": jax.__version__,
            "orbax-checkpoint": ocp.__version__,
        },
        "files": files
        | {name: [len(x), xxhash.xxh3_128_hexdigest(x)] for name, x in announced.items()},
        "arrays": dict(arrays),
    }
    record["checksum"] = _checksum(record)
    (folder / NAME).write_text(json.dumps(record, indent=1) + "\n")


def read(folder: epath.Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    path = folder / NAME
    if not path.exists():
        raise ValueError(f"{NAME} is missing: its files were changed, or another program wrote it")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(_unreadable(NAME, error)) from None
    try:
        record = json.loads(text)
        sound = record["checksum"] == _checksum(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{NAME} is damaged: its own checksum does not match")
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{NAME} has the format {record.get('format')}; this version reads {FORMAT}"
        )
    if not _is_one(record):
        raise ValueError(f"{NAME} has a checksum, but is none of flix_jax's")
    return record


def damage(folder: epath.Path) -> str | None:
    """What is wrong with a checkpoint's files, in half a line; None if they are as written."""
    try:
        expected = read(folder)["files"]
    except ValueError as error:
        return str(error)
    missing = [name for name in expected if not (folder / name).exists()]
    found = _digests(folder, [name for name in expected if name not in missing])
    changed = [name for name in found if found[name] != expected[name]]
    problems = [f"{name} is missing" for name in missing]
    for name in changed:
        if len(found[name]) == 1:
            problems += found[name]
            continue
        (size, _), (before, _) = found[name], expected[name]
        what = "other bytes than were written" if size == before else f"{size} bytes of {before}"
        problems.append(f"{name} holds {what}")
    if not problems:
        return None
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def content(folder: epath.Path, name: str) -> bytes | None:
    """What a small file of a checkpoint holds; None where that is not what was written."""
    try:
        expected = read(folder)["files"].get(name)
        found = (folder / name).read_bytes()
    except (ValueError, OSError):
        return None
    return found if expected == [len(found), xxhash.xxh3_128_hexdigest(found)] else None


def files_of(folder: epath.Path) -> list[str]:
    """The paths of all files in a folder, relative to it."""
    found: list[str] = []
    for path in folder.iterdir():
        if path.is_dir():
            found += [f"{path.name}/{name}" for name in files_of(path)]
        else:
            found.append(path.name)
    return sorted(found)


def _unreadable(name: str, error: OSError) -> str:
    """What is wrong with a file that its disk does not give; raises any other error again."""
    if error.errno not in _DAMAGE:
        raise error
    return f"{name} cannot be read: {error.strerror}"


def _digests(folder: epath.Path, names: list[str]) -> dict[str, list[Any]]:
    """By name [bytes, digest] of a file, or [why it cannot be read] of one that is damaged so."""

    def digest(name: str) -> list[Any]:
        total, size = xxhash.xxh3_128(), 0
        chunk = memoryview(bytearray(_CHUNK))
        try:
            with (folder / name).open("rb") as file:
                while read := file.readinto(chunk):
                    total.update(chunk[:read])
                    size += read
        except OSError as error:
            return [_unreadable(name, error)]
        return [size, total.hexdigest()]

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _is_one(record: Mapping[str, Any]) -> bool:
    """Whether a record names files in the folder, with size and digest, and digests of arrays."""
    found, arrays = record.get("files"), record.get("arrays")
    if not isinstance(found, dict) or not isinstance(arrays, dict):
        return False
    parts = [part for name in found for part in name.split("/")]
    return not {"", ".", ".."} & set(parts) and all(
        isinstance(value, list) and list(map(type, value)) == [int, str] for value in found.values()
    )


def _checksum(record: Mapping[str, Any]) -> str:
    body = {key: value for key, value in record.items() if key != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
