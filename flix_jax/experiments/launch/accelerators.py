"""TPU slices as Google Cloud names and counts them: types, chips, hosts, shapes, runtimes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from flix_jax.adapters.suggest import did_you_mean

# Figures of Google Cloud's documentation: docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5p,v5e,v6e},
# /tpu/docs/runtimes, and /kubernetes-engine/docs/concepts/plan-tpus.


@dataclasses.dataclass(frozen=True)
class Kind:
    """A generation of TPUs.

    Attributes:
      prefix: of the names of its accelerator types, 'v5litepod' of 'v5litepod-256'.
      counted: what the number of a type counts for every chip: 2 TensorCores, or 1 chip.
      runtime: the software version of its VMs that is documented for JAX.
      gke: its name in GKE's node selector; None where GKE is not supported here.
      shapes: the usual shape of a slice, by its chips.
      host: chips of the largest slice that is one host; each host of a larger one has four.
      most: chips of the largest slice.
    """

    prefix: str
    counted: int
    runtime: str
    gke: str | None
    shapes: Mapping[int, str]
    host: int
    most: int

    @property
    def flat(self) -> bool:
        """Whether its slices are rectangles, of which there are only those of `shapes`."""
        return next(iter(self.shapes.values())).count("x") == 1


_RECTANGLES = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
_BOXES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip
_V2 = {4: "2x2", 16: "4x4", 64: "8x8", 128: "8x16", 256: "16x16"}
_V3 = {**_V2, 32: "4x8", 512: "16x32", 1024: "32x32"}
_V5P = {**_BOXES, 4096: "16x16x16", 6144: "16x16x24"}

KINDS = {
    "v2": Kind("v2", 2, "tpu-ubuntu2204-base", None, _V2, 4, 256),
    "v3": Kind("v3", 2, "tpu-ubuntu2204-base", None, _V3, 4, 1024),
    "v4": Kind("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", _BOXES, 4, 4096),
    "v5p": Kind("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", _V5P, 4, 6144),
    "v5e": Kind("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", _RECTANGLES, 8, 256),
    "v6e": Kind("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", _RECTANGLES, 8, 256),
}
_TYPE = re.compile(r"(?P<prefix>[a-z0-9]+)-(?P<number>\d+)")


@dataclasses.dataclass(frozen=True)
class Slices:
    """One slice, or several alike that train as one.

    Attributes:
      name: of the kind, one of `KINDS`.
      chips: of one slice.
      shape: of its torus, '16x16'; empty where the type does not tell.
      count: slices.
    """

    name: str
    chips: int
    shape: str
    count: int = 1

    def __post_init__(self) -> None:
        kind = self.kind
        types = [f"{kind.prefix}-{chips * kind.counted}" for chips in sorted(kind.shapes)]
        what = f"a slice of {self.chips} {self.name} chips"
        if self.chips > kind.most:
            raise ValueError(f"{what}: the largest has {kind.most} ({types[-1]})")
        if kind.flat and self.chips not in kind.shapes:
            raise ValueError(f"{what}: there is {', '.join(types)}")
        if self.chips < 1 or (not kind.flat and self.chips % 4):
            raise ValueError(f"{what}: every host has four, so expected a multiple of 4")
        if kind.flat and self.shape != kind.shapes[self.chips]:
            raise ValueError(f"{what} has the shape {kind.shapes[self.chips]}, not {self.shape}")
        sides = [int(side) for side in self.shape.split("x") if side]
        if not kind.flat and not self.usual and any(side % 4 for side in sides):
            raise ValueError(
                f"{what} of shape {self.shape}: sides are multiples of 4, or the shape is one of "
                f"{', '.join(list(kind.shapes.values())[:4])}"
            )
        if self.count < 1:
            raise ValueError(f"--slices={self.count}: expected at least 1")

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def accelerator_type(self) -> str:
        """Of one slice, 'v5litepod-256'; it counts TensorCores or chips, by the kind."""
        return f"{self.kind.prefix}-{self.chips * self.kind.counted}"

    @property
    def usual(self) -> bool:
        """Whether its type alone says its shape."""
        return self.shape in ("", self.kind.shapes.get(self.chips))

    @property
    def chips_per_host(self) -> int:
        return self.chips if self.chips <= self.kind.host else 4

    @property
    def hosts(self) -> int:
        """Of one slice."""
        return self.chips // self.chips_per_host

    @property
    def devices(self) -> int:
        """Chips of all slices."""
        return self.chips * self.count

    @property
    def jax_devices(self) -> int:
        """As JAX counts them: of v2 and v3 every TensorCore is one."""
        return self.devices * (self.kind.counted if self.name in ("v2", "v3") else 1)

    def __str__(self) -> str:
        hosts = f"{self.hosts} host{'s' * (self.hosts > 1)} of {self.chips_per_host}"
        slices = f"{self.count} slices of " if self.count > 1 else ""
        shape = f" ({self.shape})" if self.shape else ""
        each = "each " if self.count > 1 else ""
        return f"{slices}{self.accelerator_type}{shape}, {each}{self.chips} chips on {hosts}"


def of_type(accelerator: str, count: int = 1) -> Slices:
    """The slices of an accelerator type, `'v4-128'` (64 chips) or `'v5litepod-256'` (256 chips).

    Raises:
      ValueError: another form, an unknown kind, or a size that there is not.
    """
    found = _TYPE.fullmatch(accelerator)
    by_prefix = {kind.prefix: (name, kind) for name, kind in KINDS.items()}
    if found is None or found["prefix"] not in by_prefix:
        known = [
            f"{kind.prefix}-{chips * kind.counted}"
            for kind in KINDS.values()
            for chips in kind.shapes
        ]
        if found is not None and found["prefix"] in KINDS:
            accelerator_type = f"{KINDS[found['prefix']].prefix}-{found['number']}"
            raise ValueError(f"--accelerator={accelerator}: did you mean '{accelerator_type}'?")
        raise ValueError(f"--accelerator={accelerator}: {did_you_mean(accelerator, known)}")
    name, kind = by_prefix[found["prefix"]]
    chips, rest = divmod(int(found["number"]), kind.counted)
    if rest:
        raise ValueError(
            f"--accelerator={accelerator}: {kind.prefix} counts TensorCores, two a chip, so "
            "expected an even number"
        )
    return _placed("accelerator", accelerator, name, chips, kind.shapes.get(chips, ""), count)


def of_topology(topology: str, count: int | None = None) -> Slices:
    """The slices of a topology as `flix plan` writes it, `'v5e:16x16'` or `'v5e:16x16*2'`.

    Raises:
      ValueError: as `topology.parse`; a topology of a CPU, or one that there is not.
    """
    from flix_jax.experiments.topology import parse

    name, devices, slices = parse(topology)
    if name == "cpu":
        raise ValueError(f"--topology={topology}: a pod has TPUs, for example v5e:16x16")
    if count is not None and "*" in topology and count != slices:
        raise ValueError(f"--topology={topology} and --slices={count} differ")
    shape = topology.partition(":")[2].partition("*")[0]
    dimensions = 2 if KINDS[name].flat else 3
    if shape.count("x") != dimensions - 1:
        example = list(KINDS[name].shapes.values())[-1]
        raise ValueError(
            f"--topology={topology}: {name} has {dimensions} axes, for example {name}:{example}"
        )
    return _placed(
        "topology", topology, name, devices // slices, shape, slices if count is None else count
    )


def _placed(flag: str, text: str, name: str, chips: int, shape: str, count: int) -> Slices:
    try:
        return Slices(name, chips, shape, count)
    except ValueError as error:
        message = str(error)
        if message.startswith("--"):
            raise
        raise ValueError(f"--{flag}={text}: {message}") from None
