"""Arrays of zarr's second format, whose metadata are held against what is stored.

Metadata may claim any shape, and a compressed chunk may hold any number of zeros: what reads on
without a look allocates terabytes. Here a chunk of gzip, as T5X writes them, is inflated no further
than a chunk is large. Other compressors, and whatever lies in a bucket, are tensorstore's to read.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from flix_jax.data import bounded
from flix_jax.interop.leaves import Index, Leaf

#: No deflate stream becomes more than 1032 times as long.
_INFLATION = 1100
#: Bytes that may be claimed without being stored: a zarr array need not store zeros.
_UNSTORED = 2**26
_METADATA_BYTES = 2**20
_MOST_AXES = 16
_THREADS = 8
_DTYPE = re.compile(r"[<>|]([fiu][1248]|b1)")


def local(path: epath.PathLike) -> bool:
    """Whether a path is of this machine, not of a bucket."""
    return "://" not in str(path)


def stored_bytes(folder: epath.Path) -> int:
    """The bytes of all files below a folder."""
    if not folder.is_dir():
        return folder.stat().length if folder.exists() else 0
    return sum(stored_bytes(child) for child in folder.iterdir())


def check_claim(source: str, claimed: int, stored: int) -> None:
    """ValueError for more bytes than anything compresses to what is stored."""
    if claimed > stored * _INFLATION + _UNSTORED:
        raise ValueError(
            f"{source}: claims {claimed:,} bytes, but no more than {stored:,} are stored"
        )


def kvstore(path: epath.PathLike) -> dict[str, str]:
    """tensorstore's name of a folder."""
    text = str(path)
    if text.startswith("gs://"):
        bucket, _, rest = text.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{rest}/"}
    return {"driver": "file", "path": f"{text}/"}


def read(folder: epath.Path, source: str) -> Leaf:
    """The array of a folder.

    Args:
      folder: that holds `.zarray`.
      source: what it is, for messages.

    Raises:
      ValueError: no array, metadata that are none or claim what cannot be. Reading it, a chunk that
        is damaged or holds another number of bytes than a chunk.
    """
    if not local(folder):
        return through_tensorstore({"driver": "zarr", "kvstore": kvstore(folder)}, source)
    file = folder / ".zarray"
    if not file.is_file():
        raise ValueError(f"{source}: cannot be opened: no {file}")
    metadata = bounded.read_object(file, _METADATA_BYTES)
    try:
        array = _Array.of(metadata, folder)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source}: cannot be opened: {file}: {error}") from None
    check_claim(source, math.prod(array.shape) * array.dtype.itemsize, stored_bytes(folder))
    if array.compressor in (None, "gzip", "zlib"):
        return Leaf(array.shape, array.dtype, array.fetch, source)
    return through_tensorstore({"driver": "zarr", "kvstore": kvstore(folder)}, source)


def through_tensorstore(spec: Mapping[str, Any], source: str) -> Leaf:
    """An array that tensorstore reads; ValueError as of `read`, for its chunks' size alone."""
    import tensorstore as ts

    try:
        store = ts.open(dict(spec), open=True, read=True).result()
    except ValueError as error:
        message = " ".join(str(error).partition(" [")[0].split())
        raise ValueError(f"{source}: cannot be opened: {message}") from None
    dtype = np.dtype(store.dtype.numpy_dtype)
    if dtype.kind not in "fiubV":
        raise ValueError(f"{source}: holds {dtype}, expected numbers")
    shape = tuple(int(size) for size in store.shape)
    _check_chunks(source, shape, store.chunk_layout.read_chunk.shape or (), dtype.itemsize)

    def fetch(index: Index) -> np.ndarray:
        try:
            return store[index].read().result() if index else np.asarray(store.read().result())
        except ValueError as error:
            message = " ".join(str(error).partition(" [")[0].split())
            raise ValueError(f"{source}: cannot be read: {message}") from None

    return Leaf(shape, dtype, fetch, source)


def _check_chunks(place: str, shape: Any, chunks: Any, itemsize: int) -> None:
    size = math.prod(chunks) * itemsize
    if size > max(math.prod(shape) * itemsize, _UNSTORED):
        raise ValueError(f"{place}: chunks of {size:,} bytes, more than the array has")


class _Array:
    """What `.zarray` says, checked, and the reading of parts."""

    def __init__(
        self,
        folder: epath.Path,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: np.dtype,
        compressor: str | None,
        fill: Any,
        order: str,
        separator: str,
    ) -> None:
        self.folder, self.shape, self.chunks = folder, shape, chunks
        self.compressor, self._order = compressor, order
        self._separator = separator
        self._stored, self.dtype = dtype, dtype.newbyteorder("=")
        self._fill = np.asarray(0 if fill is None else fill).astype(self.dtype)

    @classmethod
    def of(cls, metadata: Mapping[str, Any], folder: epath.Path) -> _Array:
        if metadata.get("zarr_format") != 2:
            raise ValueError(f"zarr_format is {metadata.get('zarr_format')!r}, expected 2")
        shape, chunks = (_sizes(metadata, name) for name in ("shape", "chunks"))
        if len(shape) != len(chunks) or 0 in chunks:
            raise ValueError(f"chunks {list(chunks)} of an array {list(shape)}")
        name = metadata["dtype"]
        if not isinstance(name, str) or (name != "bfloat16" and not _DTYPE.fullmatch(name)):
            raise ValueError(f"dtype is {name!r}, expected numbers")
        dtype = np.dtype(jnp.bfloat16 if name == "bfloat16" else name)
        _check_chunks("it has", shape, chunks, dtype.itemsize)
        compressor = metadata.get("compressor")
        if compressor is not None:
            compressor = compressor["id"]
            if not isinstance(compressor, str):
                raise ValueError(f"compressor is {compressor!r}")
        if metadata.get("filters"):
            raise ValueError("has filters, expected none")
        fill, order = metadata.get("fill_value"), metadata.get("order", "C")
        if isinstance(fill, str):  # of floats alone: NaN, Infinity and -Infinity
            fill = float(fill)
        if order not in ("C", "F"):
            raise ValueError(f"order is {order!r}, expected 'C' or 'F'")
        separator = metadata.get("dimension_separator", ".")
        if separator not in (".", "/"):
            raise ValueError(f"dimension_separator is {separator!r}, expected '.' or '/'")
        if not isinstance(fill, int | float | None):
            raise ValueError(f"fill_value is {fill!r}, expected a number")
        return cls(folder, shape, chunks, dtype, compressor, fill, order, separator)

    def fetch(self, index: Index) -> np.ndarray:
        """The part of the array at slices with bounds."""
        found = np.full([s.stop - s.start for s in index], self._fill, self.dtype)
        if not found.size:
            return found
        grid = [
            range(s.start // size, -(-s.stop // size))
            for s, size in zip(index, self.chunks, strict=True)
        ]

        def place(chunk: tuple[int, ...]) -> None:
            values = self._chunk(chunk)
            if values is None:
                return
            here, there = [], []
            for s, number, size in zip(index, chunk, self.chunks, strict=True):
                low, high = max(s.start, number * size), min(s.stop, (number + 1) * size)
                here.append(slice(low - s.start, high - s.start))
                there.append(slice(low - number * size, high - number * size))
            found[tuple(here)] = values[tuple(there)]

        chunks = list(itertools.product(*grid))
        if len(chunks) == 1:
            place(chunks[0])
            return found
        with ThreadPoolExecutor(min(_THREADS, len(chunks))) as pool:  # inflating lets others run
            list(pool.map(place, chunks))
        return found

    def _chunk(self, chunk: tuple[int, ...]) -> np.ndarray | None:
        path = self.folder / (self._separator.join(map(str, chunk)) or "0")
        if not path.exists():
            return None
        size = math.prod(self.chunks) * self.dtype.itemsize
        # What does not compress grows by its blocks' headers alone.
        content = bounded.read_bytes(path, size + size // 64 + 2**16)
        try:
            content = content if self.compressor is None else inflated(content, size)
        except zlib.error as error:
            raise ValueError(f"{path}: damaged: {error}") from None
        if len(content) != size:
            more = "more than " if len(content) > size else ""
            raise ValueError(f"{path}: holds {more}{len(content):,} bytes, expected {size:,}")
        return np.frombuffer(content, self._stored).reshape(self.chunks, order=self._order)  # type: ignore[call-overload]


def inflated(content: bytes, most: int) -> bytes:
    """What gzip or zlib made, but no more than a byte beyond `most`; zlib.error where damaged."""
    found = b""
    while content and len(found) <= most:
        stream = zlib.decompressobj(wbits=47)  # of either
        found += stream.decompress(content, most + 1 - len(found))
        if not stream.eof and len(found) <= most:
            raise zlib.error("it ends early")
        content = stream.unused_data
    return found


def _sizes(metadata: Mapping[str, Any], name: str) -> tuple[int, ...]:
    sizes = metadata[name]
    if not isinstance(sizes, list) or len(sizes) > _MOST_AXES:
        raise ValueError(f"{name} is {sizes!r}, expected a list of sizes")
    for size in sizes:
        if type(size) is not int or not 0 <= size < 2**63:
            raise ValueError(f"{name} is {sizes!r}, expected a list of sizes")
    return tuple(sizes)
