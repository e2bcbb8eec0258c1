"""T5X's checkpoints, in the three layouts that they have had; out in the one that all of T5X reads.

    legacy   checkpoint_<step>/checkpoint   a msgpack of {version, optimizer: {state, target}}: a
                                            leaf is an array, or a tensorstore spec beside whose
                                            file there is a zarr folder `target.encoder.…kernel`
    middle   the same file                  with `PLACEHOLDER://target.encoder.…kernel` for specs
    current  checkpoint_<step>/state/       an orbax checkpoint of {target: …, …}, OCDBT or zarr

The public mT5 checkpoints are of the first layout. Of each only `target` is read. A leaf that a
msgpack holds itself is in memory with the whole file.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from flix_jax.data import bounded
from flix_jax.interop import msgpack_trees, network, zarr_arrays
from flix_jax.interop.leaves import Index, Leaf
from flix_jax.mistakes import reason
from flix_jax.models.config import T5Config

MSGPACK, STATE = "checkpoint", "state"
VERSION = 3
_PLACEHOLDER = "PLACEHOLDER://"
_STEP = re.compile(r"checkpoint_(\d+)")
_CHUNK_BYTES = 2**26
_MOST_LEVELS = 64


def find(path: epath.PathLike) -> epath.Path | None:
    """The checkpoint at a path: its folder, or the newest `checkpoint_<step>` there; else None."""
    path = epath.Path(path)
    if _is_checkpoint(path):
        return path
    if not path.is_dir():
        return None
    steps = {}
    for child in path.iterdir():
        step = _STEP.fullmatch(child.name)
        if step and _is_checkpoint(child):
            steps[int(step.group(1))] = child
    return steps[max(steps)] if steps else None


def _is_checkpoint(path: epath.Path) -> bool:
    state = path / STATE
    return (path / MSGPACK).is_file() or any(
        (state / name).exists() for name in ("_METADATA", "manifest.ocdbt")
    )


def layout(path: epath.PathLike) -> str:
    """'legacy', 'middle' or 'current': the layout of a checkpoint that `find` found."""
    path = epath.Path(path)
    if not (path / MSGPACK).is_file():
        return "current"
    kinds = {type(leaf) for leaf in _flat(_target(path), str(path)).values()}
    return "middle" if str in kinds else "legacy"


def read(path: epath.PathLike) -> dict[str, Leaf]:
    """The parameters of a checkpoint by T5X's names, layers scanned or not; see `network.fit`.

    Nothing in it is evaluated, and no name in it leads out of its folder.

    Raises:
      ValueError: no checkpoint, or one that is damaged.
    """
    found = find(path)
    if found is None:
        raise ValueError(f"{path}: no checkpoint of T5X's, expected {MSGPACK} or {STATE}/ in it")
    if not (found / MSGPACK).is_file():
        return _read_orbax(found / STATE)
    leaves = {}
    for name, leaf in _flat(_target(found), str(found / MSGPACK)).items():
        source = f"{found}: {name}"
        if isinstance(leaf, str):
            if not leaf.startswith(_PLACEHOLDER):
                raise ValueError(f"{source}: is the text {leaf[:40]!r}, expected {_PLACEHOLDER}…")
            inside = leaf.removeprefix(_PLACEHOLDER)
            leaves[name] = zarr_arrays.read(found / _checked(inside, source), source)
        elif isinstance(leaf, Mapping):
            leaves[name] = zarr_arrays.read(found / _spec_path(leaf, source), source)
        elif isinstance(leaf, np.ndarray):
            leaves[name] = Leaf.of(leaf, source)
        else:
            raise ValueError(f"{source}: is {str(leaf)[:40]!r}, expected an array")
    return leaves


def _target(folder: epath.Path) -> Mapping[str, Any]:
    file = folder / MSGPACK
    record = msgpack_trees.read(file)
    record = record.get("optimizer", record) if isinstance(record, Mapping) else None
    if not isinstance(record, Mapping) or not isinstance(record.get("target"), Mapping):
        raise ValueError(f"{file}: holds no 'target', expected a checkpoint of T5X's")
    return record["target"]


def _flat(record: Mapping[str, Any], place: str, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """By name; a mapping of a driver is a spec, and so a leaf."""
    if len(path) > _MOST_LEVELS:
        raise ValueError(f"{place}: nested too deeply: more than {_MOST_LEVELS} levels")
    found: dict[str, Any] = {}
    for name, child in record.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"{place}: {str(name)[:40]!r} among the names, expected no slashes")
        if isinstance(child, Mapping) and "driver" not in child:
            found |= _flat(child, place, (*path, name))
        else:
            found["/".join((*path, name))] = child
    return found


def _spec_path(spec: Mapping[str, Any], source: str) -> str:
    """The zarr folder of a spec; its driver and bucket are those of where it was written."""
    store = spec.get("kvstore", {})
    path = spec.get("path") or (store.get("path") if isinstance(store, Mapping) else None)
    if not isinstance(path, str) or not path.strip("/"):
        raise ValueError(f"{source}: a tensorstore spec without a path")
    return _checked(path.strip("/").rpartition("/")[2], source)


def _checked(name: str, source: str) -> str:
    """The name of a folder in the checkpoint; ValueError for one that leads elsewhere."""
    name = name.rstrip("/")
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(f"{source}: lies in {name[:80]!r}, expected the name of a folder")
    return name


def _read_orbax(folder: epath.Path) -> dict[str, Leaf]:
    import orbax.checkpoint as ocp

    file = folder / "_METADATA"
    if file.exists():
        bounded.read_object(file)  # orbax would tell neither the file nor the place
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(folder)
        entries = metadata.tree if hasattr(metadata, "tree") else metadata
        if "target" not in entries:
            raise ValueError("holds no 'target', expected a checkpoint of T5X's")
        names = list(_flat(entries["target"], "target"))
    except Exception as error:  # of any kind, for what it is given
        raise ValueError(f"{folder}: {reason(error)[:400]}") from None
    ocdbt = (folder / "manifest.ocdbt").exists()
    leaves = {}
    for name in names:
        source = f"{folder}: {name}"
        key = _checked(".".join(("target", *name.split("/"))), source)
        if ocdbt:
            store = {"driver": "ocdbt", "base": zarr_arrays.kvstore(folder), "path": f"{key}/"}
            leaves[name] = zarr_arrays.through_tensorstore(
                {"driver": "zarr", "kvstore": store}, source
            )
        else:
            leaves[name] = zarr_arrays.read(folder / key, source)
    if ocdbt and zarr_arrays.local(folder):
        claimed = sum(leaf.nbytes for leaf in leaves.values())
        zarr_arrays.check_claim(str(folder), claimed, zarr_arrays.stored_bytes(folder))
    return leaves


def write(
    leaves: Mapping[str, Leaf], folder: epath.PathLike, *, step: int = 0, dtype: Any = None
) -> epath.Path:
    """Writes parameters as `checkpoint_<step>` of the legacy layout, a leaf in memory at a time.

    Args:
      leaves: by T5X's names, as its network has them (layers scanned or not).
      folder: in which the checkpoint is made.
      step: of the checkpoint.
      dtype: of what is written; None keeps each as it is.

    Returns:
      The checkpoint's folder.

    Raises:
      ValueError: it is there already.
    """
    import tensorstore as ts
    from flax import serialization

    made = epath.Path(folder) / f"checkpoint_{step}"
    if _is_checkpoint(made):
        raise ValueError(f"{made}: is there already")
    if made.exists():  # of an attempt that did not come to its last file
        made.rmtree()
    made.mkdir(parents=True)
    target: dict[str, Any] = {}
    for name, leaf in leaves.items():
        kind = leaf.dtype if dtype is None else np.dtype(dtype)
        key = ".".join(("target", *name.split("/")))
        chunks = _chunks(leaf.shape, _CHUNK_BYTES // kind.itemsize)
        metadata = {"compressor": {"id": "gzip"}, "shape": list(leaf.shape), "chunks": chunks}
        spec = {"driver": "zarr", "dtype": kind.name, "metadata": metadata}
        store = ts.open({**spec, "kvstore": zarr_arrays.kvstore(made / key)}, create=True).result()
        for index in _parts(leaf.shape, chunks):
            store[index] = leaf.read(index).astype(kind, copy=False)
        node = target
        *path, last = name.split("/")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = {**spec, "kvstore": {"driver": "file", "path": f"{key}/"}}
    record = {
        "version": VERSION,
        "optimizer": {"state": {"step": np.asarray(step, np.int32)}, "target": target},
    }
    (made / MSGPACK).write_bytes(serialization.msgpack_serialize(record))  # the last: now it is one
    return made


def _chunks(shape: Sequence[int], elements: int) -> list[int]:
    """The shape of chunks of at most so many elements, which divides the array's."""
    sizes = list(shape)
    while math.prod(sizes) > elements:
        axis = sizes.index(max(sizes))
        size = shape[axis]
        sizes[axis] = next(n for n in range(sizes[axis] - 1, 0, -1) if size % n == 0)
    return sizes


def _parts(shape: Sequence[int], chunks: Sequence[int]) -> list[Index]:
    """The indexes of the chunks of an array."""
    found: list[Index] = [()]
    for size, chunk in zip(shape, chunks, strict=True):
        found = [
            (*index, slice(start, start + chunk))
            for index in found
            for start in range(0, size, chunk)
        ]
    return found


def scanned(leaves: Mapping[str, Leaf], config: T5Config) -> dict[str, Leaf]:
    """The tree of T5X's `scalable_t5`, whose attention kernels keep heads apart from their width.

    Args:
      leaves: what `network.fit` gives, with relative positions in every layer.
      config: of the network.
    """
    apart = {}
    for name, leaf in leaves.items():
        split = re.search(r"attention/(query|key|value|out)/kernel$", name)
        if split is not None:
            heads = (config.num_heads, config.head_dim)
            width = leaf.shape[1] if split.group(1) == "out" else leaf.shape[0]
            leaf = leaf.reshaped((*heads, width) if split.group(1) == "out" else (width, *heads))
        apart[name] = leaf
    return network.scanned_as(apart, dataclasses.replace(config, scan_layers=True))
