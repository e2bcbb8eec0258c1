"""Which mesh axes split which dimension: defaults, and what a run says otherwise.

A dimension has a logical name (``embed``); a rule gives the mesh axes that split it. There are
three tables, for the same name may lie otherwise in parameters, adapters and activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from flix_jax.adapters.suggest import did_you_mean

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")

#: The logical name of the values of a bank: as many as the data have, so they may not divide.
FEATURES = "features"

#: Mesh axes that split a dimension; none is "not split".
Axes = tuple[str, ...]
#: A rule as it is given: one axis, several, or None.
Rule = tuple[str, str | Axes | None]

# The names are T5X's.
_PARAMETERS: Mapping[str, Axes] = {
    "vocab": ("model",),
    "embed": ("fsdp",),
    "mlp": ("model",),
    "heads": ("model",),
    "joined_kv": ("model",),
    "kv": (),
    "relpos_buckets": (),
    "layers": (),
}
# A bank's widths are named after those of the kernel beside it.
_ADAPTERS: Mapping[str, Axes] = {**_PARAMETERS, FEATURES: (), "rank": ()}
# Split by their batch, and never by the width that layers share.
_ACTIVATIONS: Mapping[str, Axes] = {
    "batch": BATCH_AXES,
    "length": (),
    "embed": (),
    "heads": ("model",),
    "kv": (),
    "mlp": ("model",),
    "vocab": ("model",),
}
_DEFAULTS = {"parameters": _PARAMETERS, "adapters": _ADAPTERS, "activations": _ACTIVATIONS}


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """What differs from the default rules, as pairs (logical name, mesh axes).

    Mesh axes are one of ``AXES``, a tuple of several, which together split the dimension, or None.
    A mesh axis splits at most one dimension of an array: the first one that asks for it.

    Attributes:
      parameters: of the network's parameters.
      adapters: of the adapters' banks, `a` [features, in, rank] and `b` [features, rank, out],
        whose ``in`` and ``out`` have the kernel's names; what is not said here is as in
        `parameters`. Features that the mesh axes do not divide are not split, and the axes
        are left to the bank's other dimensions. These rules are of banks, gradients and moments
        as they are kept; the network sees banks as without them (`in_use`).
      activations: of activations.

    Raises:
      ValueError: a logical name or a mesh axis that there is not, or one that comes twice.
    """

    parameters: tuple[Rule, ...] = ()
    adapters: tuple[Rule, ...] = ()
    activations: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for kind, known in _DEFAULTS.items():
            given = getattr(self, kind)
            rules = tuple(_checked(rule, f"AxisRules.{kind}", known) for rule in given)
            names = [name for name, _ in rules]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"AxisRules.{kind}: {name!r} has {names.count(name)} rules")
            object.__setattr__(self, kind, rules)

    @property
    def in_use(self) -> AxisRules:
        """The rules while the network runs: adapters beside their kernels.

        Examples of any features meet on every device. Banks that are spread over the batch's axes
        are brought together once a step, and not layer by layer.
        """
        return dataclasses.replace(self, adapters=())

    def table(self, kind: str) -> Mapping[str, Axes]:
        """Logical name -> mesh axes of 'parameters', 'adapters' or 'activations'."""
        of_kind = _as_axes(getattr(self, kind))
        if kind == "adapters":
            shared = {n: axes for n, axes in _as_axes(self.parameters).items() if n in _ADAPTERS}
            of_kind = {**shared, **of_kind}
        return MappingProxyType({**_DEFAULTS[kind], **of_kind})


def _as_axes(rules: tuple[Rule, ...]) -> dict[str, Axes]:
    return {
        name: () if axes is None else (axes,) if isinstance(axes, str) else axes
        for name, axes in rules
    }


def _checked(rule: Rule, where: str, known: Mapping[str, Axes]) -> Rule:
    if not isinstance(rule, tuple | list) or len(rule) != 2 or not isinstance(rule[0], str):
        raise ValueError(f"{where}: {rule!r}, expected pairs such as ('embed', 'fsdp')")
    name, axes = rule
    if name not in known:
        raise ValueError(f"{where}: unknown logical name {name!r}; {did_you_mean(name, known)}")
    several = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in several:
        if axis not in AXES:
            near = did_you_mean(str(axis), AXES)
            raise ValueError(f"{where}: {name!r} over unknown mesh axis {axis!r}; {near}")
    if len(set(several)) < len(several):
        raise ValueError(f"{where}: {name!r} over {several}, expected every axis once")
    return name, axes if axes is None or isinstance(axes, str) else several
