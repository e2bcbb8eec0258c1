"""Mesh, logical axis rules and shardings: one program for one chip and for a pod.

A parameter names its dimensions (``('embed', 'mlp')``); a rule maps each name to mesh axes. One
device is a mesh of one, so nothing else in the project asks how many devices there are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")
_AXIS_TYPES = (jax.sharding.AxisType.Auto,) * len(AXES)

#: Logical axis name -> mesh axes; the names are T5X's, and the adapters' own two at the end.
LOGICAL_AXIS_RULES: tuple[tuple[str, str | None], ...] = (
    ("vocab", "model"),
    ("embed", "fsdp"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("kv", None),
    ("relpos_buckets", None),
    ("layers", None),
    ("features", None),
    ("rank", None),
)


#: The same for activations: split by their batch, and never by the width that layers share.
ACTIVATION_AXIS_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", BATCH_AXES),
    ("length", None),
    ("embed", None),
    ("heads", "model"),
    ("kv", None),
    ("mlp", "model"),
    ("vocab", "model"),
)


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh axes; one of them may be -1, "whatever devices are left".

    Attributes:
      data: devices over which the batch alone is split.
      fsdp: devices over which the batch and the parameters' ``embed`` dimension are split.
      model: devices over which heads, MLP width and vocabulary are split.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        sizes = self.sizes
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"Mesh(data={self.data}, fsdp={self.fsdp}, model={self.model}): every size must be "
                "positive, and at most one may be -1"
            )

    @property
    def sizes(self) -> tuple[int, int, int]:
        return (self.data, self.fsdp, self.model)

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over ``devices`` (all of them by default).

        Raises:
          ValueError: the sizes do not multiply to the number of devices.
        """
        devices = list(jax.devices() if devices is None else devices)
        return jax.make_mesh(
            self._sizes_of(len(devices)), AXES, axis_types=_AXIS_TYPES, devices=devices
        )

    def abstract(self, count: int) -> jax.sharding.AbstractMesh:
        """The mesh over `count` devices that need not be there: shapes, and nothing compiled.

        Raises:
          ValueError: as `make`.
        """
        return jax.sharding.AbstractMesh(self._sizes_of(count), AXES, axis_types=_AXIS_TYPES)

    def _sizes_of(self, count: int) -> tuple[int, ...]:
        known = math.prod(size for size in self.sizes if size != -1)
        sizes = tuple(count // known if size == -1 else size for size in self.sizes)
        if math.prod(sizes) != count:
            raise ValueError(
                f"Mesh(data={self.data}, fsdp={self.fsdp}, model={self.model}) does not fit "
                f"{count} device(s)"
            )
        return sizes


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of scalars and of everything that each device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: their first axis over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Over how many parts of the mesh a batch is spread: the smallest batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(mesh: Mesh, batch_size: int, microbatches: int = 1) -> None:
    """Refuses a global batch that the mesh and the microbatches do not divide evenly.

    Raises:
      ValueError: with the sizes that disagree.
    """
    shards = batch_shards(mesh)
    if microbatches < 1 or batch_size < 1 or batch_size % (shards * microbatches):
        raise ValueError(
            f"batch_size {batch_size} is not a positive multiple of {shards} batch shard(s) "
            f"(mesh {dict(mesh.shape)}) times {microbatches} microbatch(es)"
        )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold, ascending."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in slices]))


def put_batch(
    mesh: Mesh, batch: Mapping[str, np.ndarray], batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Forms global arrays of a batch.

    Args:
      mesh: of the devices, of all processes.
      batch: the whole batch, or of one of `batch_size` rows those of `local_rows`.
      batch_size: of the global batch; None where `batch` is whole.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)

    def put(local: np.ndarray) -> jax.Array:
        size = len(local) if batch_size is None else batch_size
        rows = np.arange(size) if batch_size is None else local_rows(mesh, size)

        def shard(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(size)
            place = int(np.searchsorted(rows, first))
            return local[place : place + last - first]

        return jax.make_array_from_callback((size, *local.shape[1:]), sharding, shard)

    return {name: put(local) for name, local in batch.items()}


def gathered(array: jax.Array) -> np.ndarray:
    """The whole of an array, on every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def logical_axes(boxed_params: Any) -> Any:
    """The logical axis names of a tree of boxed parameters, a tuple per leaf.

    Leaves that carry no names (a model that is not annotated) get ``None`` for every dimension.
    """

    def names(leaf: Any) -> tuple[str | None, ...]:
        if isinstance(leaf, nn.Partitioned):
            return tuple(leaf.names)
        return (None,) * leaf.ndim

    return jax.tree.map(names, boxed_params, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def param_shardings(
    mesh: Mesh,
    axes: Any,
    shapes: Any,
    rules: Sequence[tuple[str, str | None]] = LOGICAL_AXIS_RULES,
) -> Any:
    """A ``NamedSharding`` per parameter from its logical axis names.

    Args:
      mesh: the device mesh.
      axes: tree of tuples of logical names, one name (or None) per dimension.
      shapes: tree of the same structure whose leaves have ``.shape``.
      rules: pairs (logical name, mesh axis or None for "not split").

    Raises:
      ValueError: a name without a rule, or a dimension that its mesh axis does not divide.
    """
    table = dict(rules)

    def sharding(path: Any, leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
        where = "/".join(str(getattr(key, "key", key)) for key in path)
        spec: list[str | None] = []
        for size, name in zip(leaf.shape, names, strict=True):
            if name is not None and name not in table:
                raise ValueError(f"{where}: no rule for logical axis {name!r}, only {list(table)}")
            axis = table[name] if name is not None else None
            # A mesh axis splits at most one dimension of an array; the first one keeps it.
            axis = None if axis in spec else axis
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"{where}: dimension {name!r} of size {size} is not divisible by mesh axis "
                    f"{axis!r} of size {mesh.shape[axis]}"
                )
            spec.append(axis)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, shapes, axes)
