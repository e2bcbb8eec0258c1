"""Machines that a program can be compiled for: TPU pods, with none of them here, or this host."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax

from flix_jax.adapters.suggest import did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip; figures of Google Cloud's documentation.

    Attributes:
      memory: HBM, bytes.
      flops: of bfloat16 products, a second.
      products: multiplications and additions that the matrix units do in a cycle.
      link: bytes a second over one axis of the interconnect, both ways together.
      options: of the compiler's description of the topology.
    """

    memory: int
    flops: float
    products: int
    link: float
    options: tuple[tuple[str, str], ...] = ()

    @property
    def clock(self) -> float:
        """Cycles a second: what makes `products` come to `flops`."""
        return self.flops / self.products


_MXU = 2 * 128 * 128  # of one matrix unit, in a cycle
CHIPS = {
    # Two cores of four matrix units, which compute as one.
    "v4": Chip(32 * 2**30, 275e12, 8 * _MXU, 100e9, (("chip_config_name", "megacore"),)),
    "v5p": Chip(95 * 2**30, 459e12, 8 * _MXU, 200e9),
    "v5e": Chip(16 * 2**30, 197e12, 4 * _MXU, 100e9),
    "v6e": Chip(32 * 2**30, 918e12, 16 * _MXU, 224e9),  # four of 256 × 256
}
# What JAX calls a device -> FLOPs a second of bfloat16 products, dense; of the makers' data sheets.
_PEAKS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
_NAME = re.compile(r"(?P<kind>[a-z0-9]+):(?P<shape>\d+(x\d+)*)(\*(?P<slices>\d+))?")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: 'v5e:16x16', 'v4:4x4x4', several slices 'v5e:16x16*2', or 'cpu:8'.
      chip: of them; None for a CPU.
      devices: the devices; none where no compiler for them is here.
      count: how many they are.
      missing: why there are none.
    """

    name: str
    chip: Chip | None
    devices: Sequence[jax.Device]
    count: int
    missing: str = ""

    @property
    def slices(self) -> int:
        """How many slices the devices are."""
        return parse(self.name)[2]


def parse(name: str) -> tuple[str, int, int]:
    """(kind, devices, slices) of the name of a topology.

    Raises:
      ValueError: another form, an unknown kind, or a number that is none.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"topology {name!r}: expected a form such as v5e:16x16, v4:4x4x4 or cpu:8")
    kinds = (*CHIPS, "cpu")
    if found["kind"] not in kinds:
        near = did_you_mean(found["kind"], kinds)
        raise ValueError(f"topology {name!r}: unknown kind {found['kind']!r}; {near}")
    sizes = [int(size) for size in found["shape"].split("x")]
    slices = int(found["slices"] or 1)
    if found["kind"] == "cpu" and (len(sizes) > 1 or slices > 1):
        raise ValueError(f"topology {name!r}: expected a number of virtual devices, cpu:8")
    if min(*sizes, slices) < 1:
        raise ValueError(f"topology {name!r}: sizes must be positive")
    return found["kind"], math.prod(sizes) * slices, slices


def find(name: str) -> Topology:
    """The devices of a topology.

    TPUs are described by their compiler, which need not run on one: package `libtpu`, extra `tpu`.
    Virtual CPU devices must have been asked for before JAX started (`use`).

    Raises:
      ValueError: as `parse`; a topology that the compiler does not know.
    """
    kind, count, slices = parse(name)
    if kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < count:
            raise ValueError(f"topology {name!r}: {len(devices)} CPU devices here")
        return Topology(name, None, devices[:count], count)
    chip = CHIPS[kind]
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        reason = "the TPU compiler is not installed (pip install 'flix_jax[tpu]')"
        return Topology(name, chip, (), count, reason)
    from jax.experimental import topologies

    options: dict[str, object] = dict(chip.options)
    if slices > 1:
        options["num_slices"] = slices
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name.partition("*")[0], **options
        )
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split()).removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(f"topology {name!r}: {text}") from None
    return Topology(name, chip, described.devices, count)


def peak_flops(device_kind: str) -> float | None:
    """FLOPs a second of a device by what JAX calls it; None where that is not known."""
    found = [name for name in _PEAKS if re.match(rf"{re.escape(name)}\b(?! lite)", device_kind)]
    return _PEAKS[found[0]] if found else None


def use(name: str) -> None:
    """Prepares this process, in which JAX has not started, to compile for a topology.

    Raises:
      ValueError: as `parse`.
    """
    kind, count, _ = parse(name)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, no accelerator is to be held
    if kind == "cpu":
        jax.config.update("jax_num_cpu_devices", count)
        return
    # There is no TPU machine to ask; what it would answer is said, so that nothing complains.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several plans at once
