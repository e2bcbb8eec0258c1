"""flax's msgpack of a tree of arrays, from anyone: names, texts, numbers and arrays of numbers.

flax's own reader trusts what it reads, and fails in as many ways as there are mistakes in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np
from etils import epath

from flix_jax.data import bounded
from flix_jax.mistakes import reason

MOST_BYTES = 2**35  # what is in the file is in memory
_MOST_CHILDREN = 2**16
_ARRAY, _SCALAR = 1, 3  # flax's extension types
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in ("?", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
} | {"bfloat16": np.dtype(jnp.bfloat16)}


def read(file: epath.Path) -> Any:
    """The tree of a file, as flax wrote it: mappings, lists, texts, numbers, NumPy arrays.

    Raises:
      ValueError: with the file, for anything else.
    """
    content = bounded.read_bytes(file, MOST_BYTES)
    try:
        tree = msgpack.unpackb(
            content,
            ext_hook=_extension,
            strict_map_key=False,
            # Lists are allocated as long as they claim to be, before there is anything in them.
            max_array_len=_MOST_CHILDREN,
            max_map_len=_MOST_CHILDREN,
        )
        return _joined(tree)
    except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"{file}: no msgpack of flax's: {reason(error)[:200]}") from None


def _extension(code: int, data: bytes) -> np.ndarray:
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"a value of type {code}, expected arrays")
    shape, name, content = msgpack.unpackb(data, raw=True, max_array_len=64, max_map_len=0)
    dtype = _DTYPES.get(name.decode() if isinstance(name, bytes) else "")
    if dtype is None:
        raise ValueError(f"an array of {str(name)[:20]}, expected numbers")
    return np.frombuffer(content, dtype).reshape(_sizes(shape))


def _sizes(shape: Any) -> tuple[int, ...]:
    for size in shape:
        if type(size) is not int or size < 0:
            raise ValueError(f"an array of shape {str(shape)[:40]}")
    return tuple(shape)


def _joined(tree: Any) -> Any:
    """The tree, with arrays that were cut to chunks whole again."""
    if not isinstance(tree, Mapping):
        return tree
    if _CHUNKED not in tree:
        return {name: _joined(child) for name, child in tree.items()}
    shape, chunks = (tree[name] for name in ("shape", "chunks"))
    parts = [chunks[str(i)] for i in range(len(chunks))]
    sizes = _sizes([shape[str(i)] for i in range(len(shape))])
    if sum(part.size for part in parts) != math.prod(sizes):
        raise ValueError(f"chunks that do not make an array of shape {sizes}")
    return np.concatenate(parts).reshape(sizes)
