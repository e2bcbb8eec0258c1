"""Meshes and shardings: one program for one chip, for a pod and for several.

A parameter names its dimensions (``('embed', 'mlp')``); a rule maps each name to mesh axes
(`axis_rules`). One device is a mesh of one, so nothing else in the project asks how many devices
there are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils, multihost_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flix_jax.training.axis_rules import AXES, BATCH_AXES, FEATURES, Axes, AxisRules

_AXIS_TYPES = (jax.sharding.AxisType.Auto,) * len(AXES)


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh axes; one of them may be -1, "whatever devices are left".

    Attributes:
      data: devices over which the batch alone is split.
      fsdp: devices over which the batch and the parameters' ``embed`` dimension are split.
      model: devices over which heads, MLP width and vocabulary are split.
      slices: how many slices the devices are, each with a fast network of its own: ``data`` goes
        across them, ``fsdp`` and ``model`` stay within one. None is what the devices say (GPUs: a
        slice for every host); of devices that say nothing (CPUs) consecutive ones are a slice. 1
        takes all of them as one, whatever they say.
      rules: which of these axes split which dimension.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1
    slices: int | None = None
    rules: AxisRules = AxisRules()

    def __post_init__(self) -> None:
        if self.slices is not None and self.slices < 1:
            raise ValueError(f"MeshSpec.slices = {self.slices}: expected at least 1, or None")
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
          ValueError: the sizes do not multiply to the number of devices; ``data`` is no multiple
            of the slices; the devices are of another number of slices than was said.
        """
        devices = list(jax.devices() if devices is None else devices)
        slices = self._slices_of(devices)
        sizes = self._sizes_of(len(devices), len(slices))
        if len({getattr(device, "slice_index", 0) for device in slices[0]}) > 1:
            # Which is near which across slices nobody says: they stay in their order.
            return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=_AXIS_TYPES)
        inner = (sizes[0] // len(slices), *sizes[1:])
        # Slice by slice along `data`, so that every step along another axis stays within one.
        arranged = [
            mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True)
            for part in slices
        ]
        return Mesh(np.concatenate(arranged), AXES, axis_types=_AXIS_TYPES)

    def abstract(self, count: int, slices: int = 1) -> jax.sharding.AbstractMesh:
        """The mesh over `count` devices that need not be there: shapes, and nothing compiled.

        Raises:
          ValueError: as `make`.
        """
        sizes = self._sizes_of(count, self._checked_slices(slices))
        return jax.sharding.AbstractMesh(sizes, AXES, axis_types=_AXIS_TYPES)

    def _slices_of(self, devices: list[jax.Device]) -> list[list[jax.Device]]:
        if self.slices == 1 or not hasattr(devices[0], "slice_index"):
            count = self.slices or 1
            size, rest = divmod(len(devices), count)
            if rest:
                raise ValueError(
                    f"MeshSpec.slices = {count} does not divide {len(devices)} device(s)"
                )
            return [devices[i * size : (i + 1) * size] for i in range(count)]
        found: dict[int, list[jax.Device]] = {}
        for device in devices:
            found.setdefault(device.slice_index, []).append(device)
        self._checked_slices(len(found))
        return [found[index] for index in sorted(found)]

    def _checked_slices(self, found: int) -> int:
        if self.slices == 1:
            return 1
        if self.slices not in (None, found):
            raise ValueError(f"MeshSpec.slices = {self.slices}, but the devices are of {found}")
        return found

    def _sizes_of(self, count: int, slices: int) -> tuple[int, ...]:
        known = math.prod(size for size in self.sizes if size != -1)
        sizes = tuple(count // known if size == -1 else size for size in self.sizes)
        if math.prod(sizes) != count:
            raise ValueError(
                f"Mesh(data={self.data}, fsdp={self.fsdp}, model={self.model}) does not fit "
                f"{count} device(s)"
            )
        if sizes[0] % slices:
            raise ValueError(
                f"MeshSpec.data = {sizes[0]} is not a multiple of the {slices} slices: fsdp and "
                "model must stay within a slice"
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
    return shards(mesh, BATCH_AXES)


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

    size = len(next(iter(batch.values()))) if batch_size is None else batch_size
    rows = np.arange(size) if batch_size is None else local_rows(mesh, size)

    def put(local: np.ndarray) -> jax.Array:
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


def in_order_of_memory(x: jax.Array, there: NamedSharding, *orders: Sequence[int]) -> jax.Array:
    """The same array; on a TPU with its axes in an order in memory, the last one innermost.

    Said device by device, for of an array whose layout is given as a whole the partitioner has
    every device hold all.

    Args:
      x: an array that lies as `there` says.
      there: its sharding.
      orders: of its axes. It is first in one, then in the next: so it can be said not only how it
        is to lie, but up to where it is left as it was made.
    """

    def ordered(part: jax.Array) -> jax.Array:
        for order in orders:
            part = with_layout_constraint(part, Layout(major_to_minor=tuple(order)))
        return part

    spec = there.spec
    on_tpu = jax.shard_map(ordered, mesh=there.mesh, in_specs=spec, out_specs=spec)
    return jax.lax.platform_dependent(x, tpu=on_tpu, default=lambda x: x)


def param_shardings(
    mesh: Mesh, axes: Any, shapes: Any, rules: Mapping[str, Axes] | None = None
) -> Any:
    """A ``NamedSharding`` per parameter from its logical axis names.

    The features of a bank that the mesh axes do not divide are not split, and leave those axes to
    the dimensions after them: how many features there are is a matter of the data.

    Args:
      mesh: the device mesh.
      axes: tree of tuples of logical names, one name (or None) per dimension.
      shapes: tree of the same structure whose leaves have ``.shape``.
      rules: logical name -> mesh axes; None is the default for parameters.

    Raises:
      ValueError: a name without a rule, or a dimension that its mesh axes do not divide.
    """
    table = AxisRules().table("parameters") if rules is None else rules

    def sharding(path: Any, leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
        where = "/".join(str(getattr(key, "key", key)) for key in path)
        spec: list[str | Axes | None] = []
        taken: set[str] = set()
        for size, name in zip(leaf.shape, names, strict=True):
            if name is not None and name not in table:
                raise ValueError(f"{where}: no rule for logical axis {name!r}, only {list(table)}")
            # A mesh axis splits at most one dimension of an array; the first one keeps it.
            wanted = tuple(a for a in table[name] if a not in taken) if name is not None else ()
            parts = shards(mesh, wanted)
            if size % parts:
                if name != FEATURES:
                    over = wanted[0] if len(wanted) == 1 else wanted
                    raise ValueError(
                        f"{where}: dimension {name!r} of size {size} is not divisible by mesh axis "
                        f"{over!r} of size {parts}"
                    )
                wanted = ()
            taken.update(wanted)
            spec.append(wanted[0] if len(wanted) == 1 else wanted or None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, shapes, axes)


def shards(mesh: Mesh, axes: Axes) -> int:
    """Into how many parts the mesh axes together split a dimension."""
    return math.prod(mesh.shape[axis] for axis in axes)
