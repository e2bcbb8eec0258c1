"""Folders in buckets of Google Cloud Storage: what must be so, and what may go wrong.

A bucket holds objects, which appear whole and at once. There are no folders to make, nothing can be
appended, and renaming is copying; whoever writes to a run's folder does without.

Three clients read and write there: gcsfs, by etils' epath, for files; tensorstore for arrays; and
google-cloud-storage, by orbax, for what is known of the bucket. Importing this module settles what
would go wrong unnoticed: etils takes TensorFlow's client where TensorFlow is installed, and fsspec
remembers listings, which hides what other workers and tensorstore have written. Both may be set
otherwise, by `EPATH_USE_TF` and by fsspec's own configuration.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import posixpath
import uuid
from pathlib import Path, PurePath

import fsspec.config
from etils import epath
from etils.epath import gpath

from flix_jax.mistakes import reason

# gcsfs brings google-cloud-storage along.
NOT_INSTALLED = (
    "buckets need gcsfs, which is not installed; pip install gcsfs (or the extra 'gcs' of flix_jax)"
)

os.environ.setdefault("EPATH_USE_TF", "false")
with contextlib.suppress(AttributeError):  # who came before may have made etils read it already
    gpath._is_tf_installed.cache_clear()
# Asks every bucket, by another service, whether it is of a kind that we do not support.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def is_bucket(path: epath.PathLike) -> bool:
    """Whether a path is not of this machine's file systems."""
    return "://" in os.fspath(path)


def resolved(path: epath.PathLike) -> epath.Path:
    """A path that is absolute and without `..`; epath's own `resolve` takes buckets for folders."""
    if not is_bucket(path):
        return epath.Path(path).resolve()
    scheme, _, rest = os.fspath(path).partition("://")
    return epath.Path(f"{scheme}://{posixpath.normpath(rest)}")


def relative(path: epath.PathLike, start: epath.PathLike) -> str:
    """A path as seen from a folder; as it is, where one is in a bucket and the other is not."""
    if is_bucket(path) != is_bucket(start):
        return os.fspath(path)
    return os.path.relpath(path, start)


def joined(start: epath.Path, path: str) -> epath.Path:
    """What `relative` was made of."""
    if is_bucket(path) or PurePath(path).is_absolute():
        return epath.Path(path)
    return resolved(start / path) if is_bucket(start) else start / path


def put(local: epath.PathLike, folder: epath.PathLike) -> None:
    """Copies the files of a local folder, and of those in it, to a folder in a bucket."""
    for path in Path(local).rglob("*"):
        if path.is_file():
            target = epath.Path(folder) / path.relative_to(local).as_posix()
            target.write_bytes(path.read_bytes())


def check_installed(path: epath.PathLike) -> None:
    """Refuses a folder in a bucket that cannot be reached from here; a local one is fine.

    Raises:
      ValueError: it is of another cloud, or the clients are missing; names the extra.
    """
    if not is_bucket(path):
        return
    if not os.fspath(path).startswith("gs://"):
        raise ValueError(f"{path}: a folder is local or in a bucket of Google's, gs://bucket/…")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{path}: {NOT_INSTALLED}")


def check_writable(folder: epath.PathLike) -> None:
    """Tries what a run does to its folder, where that is in a bucket: it costs four requests.

    Raises:
      ValueError: the bucket does not exist, or an object cannot be written or deleted there, or
        the bucket cannot be described; in one line.
    """
    check_installed(folder)
    if not is_bucket(folder):
        return
    bucket = os.fspath(folder).removeprefix("gs://").partition("/")[0]
    probe = epath.Path(folder) / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        probe.write_text("")
        probe.unlink()
    except FileNotFoundError:
        raise ValueError(f"{folder}: there is no bucket {bucket}") from None
    except Exception as error:  # each client has its own kinds
        raise ValueError(f"{folder}: cannot be written: {reason(error)}") from None
    try:
        _describe(bucket)
    except Exception as error:
        raise ValueError(
            f"{folder}: cannot be described, for which storage.buckets.get is needed: "
            f"{reason(error)}"
        ) from None


def mistake(error: BaseException) -> str | None:
    """A line for what a client of buckets raises that is no fault of the program's; None else."""
    if isinstance(error, ImportError) and "gcsfs" in str(error):
        return NOT_INSTALLED
    refused = isinstance(error, OSError) and str(error).startswith("Forbidden: ")
    if refused or type(error).__module__.startswith(("gcsfs.", "google.a")):
        return f"a bucket refuses: {reason(error)}"
    return None


def _describe(bucket: str) -> None:
    # As orbax does whenever it looks for checkpoints.
    from google.cloud import storage

    storage.Client().get_bucket(bucket)
