"""Files from the web: fetched so that a broken transfer goes on, checked, and unpacked safely."""

from __future__ import annotations

import base64
import bz2
import contextlib
import dataclasses
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from flix_jax.evaluation import files

#: (bytes that are here, bytes in all or None) of a transfer under way.
Progress = Callable[[int, int | None], None]

TRIES = 4  # broken attempts in a row, counted anew from each that gets further
PAUSE = 1.0  # seconds before the second of them, doubled before each further one
TIMEOUT = 60.0  # seconds without any byte
_CHUNK = 1 << 18
_INFLATION = 100  # text becomes a tenth, repetitive text a fiftieth
_SMALL = 1 << 26
_MOST_MEMBERS = 100_000
_TRANSIENT = (OSError, http.client.HTTPException)  # of a connection
_BUSY = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may pass


class FetchError(ValueError):
    """A file could not be had; the message says why, in one line."""


class _Broken(Exception):
    """A transfer that may go on in another attempt."""


@dataclasses.dataclass(frozen=True)
class _Version:
    """Which file the bytes of a `.part` belong to, as the server told when it sent them.

    Attributes:
      url: where they came from.
      tag: the ETag or the time of the last change; empty where the server tells neither.
      size: of the whole, in bytes; None where the server did not tell.
      md5: of the whole, in base64, as Google's storage tells it; empty elsewhere.
    """

    url: str
    tag: str = ""
    size: int | None = None
    md5: str = ""

    @classmethod
    def read(cls, path: Path, url: str) -> _Version:
        """What `path` holds of `url`; a version without a tag where it holds nothing of it."""
        try:
            version = cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return cls(url)
        return version if version.url == url else cls(url)


def fetch(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    progress: Progress = lambda done, total: None,
    tries: int = TRIES,
    pause: float = PAUSE,
) -> None:
    """Fetches `url` into the file `path`, which appears whole and checked or not at all.

    The bytes gather in `<path>.part`. A later attempt, or a later call, asks for those that are
    missing (HTTP Range) where the server can tell that they belong to the same version of the file
    (If-Range), and starts over where it cannot.

    What arrived is compared with the length that the server announced, with the MD5 that Google's
    storage announces (x-goog-hash), and with `size` and `sha256`.

    Args:
      url: http or https.
      path: a local file; missing parent folders are made.
      size, sha256: of the whole file, in bytes and in hexadecimal digits, where they are known.
      progress: called with (bytes here, bytes in all or None) as they arrive.
      tries: broken attempts in a row before it is given up, counted anew from each that gets
        further than those before it.
      pause: seconds before the second of them, doubled before each further one.

    Raises:
      FetchError: in one line, without the address: no connection, a refusal, too many broken
        transfers, another size or digest, no room on the disk.
    """
    if not re.match(r"https?://", url):
        raise FetchError("expected an address that begins with http:// or https://")
    part, note = _beside(path, ".part"), _beside(path, ".part.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    furthest, failures = _size(part), 0
    while True:
        try:
            version = _transfer(url, part, note, size, progress)
            break
        except _Broken as error:
            here = _size(part)
            failures = 1 if here > furthest else failures + 1
            furthest = max(furthest, here)
            if failures >= tries:
                kept = f", {here:,} bytes are kept in {part}" if here else ""
                raise FetchError(f"{error} (tried {tries} times{kept})") from None
            time.sleep(pause * 2 ** (failures - 1))
    _check(part, version, size, sha256, discard=(part, note))
    os.replace(part, path)
    note.unlink(missing_ok=True)


def _transfer(url: str, part: Path, note: Path, size: int | None, progress: Progress) -> _Version:
    """Adds the missing bytes to `part`; returns what the server told of the file."""
    version, here = _Version.read(note, url), _size(part)
    if here and here == version.size:
        return version
    headers = {"User-Agent": "flix_jax"}
    if here and version.tag:
        headers |= {"Range": f"bytes={here}-", "If-Range": version.tag}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # there are not so many bytes: the part is of no use
            part.unlink(missing_ok=True)
        refusal = f"the server answered {error.code} {error.reason}".strip()
        if error.code in (416, *_BUSY):
            raise _Broken(refusal) from None
        raise FetchError(refusal) from None
    except _TRANSIENT as error:
        raise _Broken(_reason(error)) from None
    with response:
        resumed = response.status == 206
        if resumed:
            matched = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if matched is None or int(matched[1]) != here:
                part.unlink()
                raise _Broken("the server sent another part of the file than was asked for")
            total: int | None = int(matched[2])
        else:
            here = 0
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            version = _Version(
                url, _tag(response.headers), total, _google_md5(response.headers) or ""
            )
        if size is not None and total is not None and total != size:
            raise FetchError(f"the server's file has {total:,} bytes, expected {size:,}")
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - here > free:
            raise FetchError(
                f"{part.parent} has room for {free:,} bytes, {total - here:,} are to come"
            )
        if not resumed:
            # The old bytes go before the note says that they are of the new version.
            part.write_bytes(b"")
            files.write_json(note, dataclasses.asdict(version))
        progress(here, total)
        try:
            with part.open("ab") as file:
                while chunk := _read(response):
                    file.write(chunk)
                    here += len(chunk)
                    progress(here, total)
        except OSError as error:
            raise FetchError(f"{part}: {error.strerror}") from None
    if total is not None and here < total:  # http.client says nothing of it
        raise _Broken(f"the connection ended after {here:,} of {total:,} bytes")
    return version


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK)
    except _TRANSIENT as error:
        raise _Broken(_reason(error)) from None


def _check(
    part: Path,
    version: _Version,
    size: int | None,
    sha256: str | None,
    discard: tuple[Path, ...],
) -> None:
    found = _size(part)
    for expected in (size, version.size):
        if expected is not None and found != expected:
            problem = f"what arrived has {found:,} bytes, expected {expected:,}"
            break
    else:
        with part.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").digest()
        if version.md5 and base64.b64encode(md5).decode() != version.md5:
            problem = "what arrived has another MD5 than the server announced"
        elif sha256 is not None and (digest := sha256_of(part)) != sha256:
            problem = f"what arrived has the sha256 {digest}, expected {sha256}"
        else:
            return
    for path in discard:
        path.unlink(missing_ok=True)
    raise FetchError(problem)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def unpacked(archive: Path, beside: Path) -> Iterator[Path]:
    """Unpacks a tar archive into a new temporary folder in `beside`, removed again at the end.

    To keep what is in it, rename it: a reader then finds all of it or nothing.

    Only plain files and folders are accepted, with names below the folder: an archive with an
    absolute name, `..`, a link, a device or a name that occurs twice is refused. Owners,
    permissions and times are not taken over. So is one that becomes more than `_INFLATION` times as
    long, has more members than any data, or a header that would fill the memory.

    Raises:
      ValueError: in one line, with the archive and the member, for such an archive, one that is
        damaged or no archive at all, and for want of room.
    """
    temporary = Path(tempfile.mkdtemp(prefix=".unpacking.", dir=beside))
    folder = temporary / "archive"
    folder.mkdir()  # a temporary folder's own permissions are for its owner alone
    try:
        try:
            with _Bounded(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for number, member in enumerate(tar, start=1):
                    if number > _MOST_MEMBERS:
                        raise _Refused(f"it has more than {_MOST_MEMBERS:,} members")
                    _unpack(tar, member, folder, stream.left())
                # A gzip's checksum is compared when its end is read, which tar may not reach.
                while stream.read(_CHUNK):
                    pass
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            reason = str(getattr(error, "strerror", None) or error)
            if reason in ("bad checksum", "invalid header", "truncated header", "empty file"):
                reason = "it is no tar archive"
            raise ValueError(f"{archive} cannot be unpacked: {reason}") from None
        except _Refused as error:
            raise ValueError(f"{archive} is refused: {error}") from None
        yield folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Refused(Exception):
    """A member of an archive that is not unpacked."""


class _Bounded(io.RawIOBase):
    """What an archive inflates to, in parts that fit into memory, and up to a length."""

    def __init__(self, archive: Path) -> None:
        with archive.open("rb") as file:
            magic = file.read(3)
        opened: Any = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}.get(magic[:2], open)
        self._most = archive.stat().st_size * _INFLATION + _SMALL
        self._stream: Any = opened(archive, "rb")

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _SMALL:  # headers of tar are read at once, however long
            raise _Refused(f"a header of {size:,} bytes")
        content: bytes = self._stream.read(size)
        if self.left() < 0:
            raise _Refused(f"it becomes more than {_INFLATION} times as long")
        return content

    def left(self) -> int:
        """How many bytes may still be read."""
        return self._most - int(self._stream.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET and offset > self._most:
            raise _Refused(f"it becomes more than {_INFLATION} times as long")
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def close(self) -> None:
        self._stream.close()
        super().close()


def _unpack(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, left: int) -> None:
    name = PurePosixPath(member.name)
    shown = repr(member.name)
    if name.is_absolute():
        raise _Refused(f"{shown} is an absolute name")
    if ".." in name.parts or "\\" in member.name or "\0" in member.name:
        raise _Refused(f"{shown} may lie outside the folder")
    if member.issym() or member.islnk():
        raise _Refused(f"{shown} is a link")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise _Refused(f"{shown} is a device or the like")
    path = folder.joinpath(*name.parts)
    try:
        if member.isdir():
            path.mkdir(parents=True, exist_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if member.size > left:
            raise _Refused(f"{shown} has {member.size:,} bytes, {_INFLATION} times the archive's")
        if member.size > (free := shutil.disk_usage(folder).free):
            raise _Refused(f"{shown} has {member.size:,} bytes, the disk has room for {free:,}")
        source = tar.extractfile(member)
        assert source is not None  # it is a plain file
        with source, path.open("xb") as file:
            shutil.copyfileobj(source, file, _CHUNK)
    except (FileExistsError, NotADirectoryError):
        raise _Refused(f"{shown} occurs twice, or as a file and as a folder") from None


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag(headers: Any) -> str:
    """What If-Range may name: a strong ETag, else the time of the last change (RFC 9110)."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _google_md5(headers: Any) -> str | None:
    matched = re.search(r"md5=([\w+/=]+)", ", ".join(headers.get_all("x-goog-hash", [])))
    return matched[1] if matched else None


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    text = str(getattr(reason, "strerror", None) or reason) or type(error).__name__
    return " ".join(text.split())
