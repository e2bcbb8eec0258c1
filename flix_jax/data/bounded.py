"""Files of unknown origin, read no further than what they may hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from etils import epath

from flix_jax.adapters import plain_json

#: Descriptions: of a network, an adapter, a run, an index of weights, a table of languages.
DESCRIPTION = 2**26
_BLOCK = 2**20

Value = TypeVar("Value")


def read_bytes(path: epath.PathLike, most: int = DESCRIPTION) -> bytes:
    """A file's content.

    Raises:
      ValueError: it has more than `most` bytes, of which no more are read.
    """
    path = epath.Path(path)
    # As much is allocated as is asked for; a pipe or a device has no length, and may have no end.
    size = path.stat().length
    with path.open("rb") as file:
        content = file.read(size + 1) if size <= most else b""
        while size <= most and (more := file.read(_BLOCK)):
            content += more
            size = len(content)
    if size > most:
        raise ValueError(f"{path}: more than {most:,} bytes, expected a smaller file")
    return content


def read_json(path: epath.PathLike, most: int = DESCRIPTION) -> Any:
    """The json value in a file.

    Raises:
      ValueError: as `read_bytes`; with the file, for what `plain_json.parse` refuses.
    """
    return _parsed(plain_json.parse, path, most)


def read_object(path: epath.PathLike, most: int = DESCRIPTION) -> dict[str, Any]:
    """`read_json` of what must be an object."""
    return _parsed(plain_json.parse_object, path, most)


def lines(path: epath.PathLike, most: int) -> Iterator[bytes]:
    """The lines of a file one after the other, without their ends, which are \\n alone.

    Raises:
      ValueError: with file and line, for one of more than `most` bytes, before more of it is read.
    """
    number, rest = 1, b""
    with epath.Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                if len(line) > most:
                    raise _too_long(path, number, most)
                yield line
                number += 1
            if len(rest) > most:
                raise _too_long(path, number, most)
    yield rest


def _parsed(parse: Callable[[bytes], Value], path: epath.PathLike, most: int) -> Value:
    content = read_bytes(path, most)
    try:
        return parse(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _too_long(path: epath.PathLike, line: int, most: int) -> ValueError:
    return ValueError(f"{path}:{line}: a line of more than {most:,} bytes")
