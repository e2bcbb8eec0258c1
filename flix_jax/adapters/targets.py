"""Names of dense layers by pattern: what targets an adapter, or a fusion, may have."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flix_jax.adapters.suggest import did_you_mean

_ATTENTION = r"(?:.*/)?[^/]*[aA]ttention[^/]*/(?:query|key|value|out)"
_MLP = r"(?:.*/)?[^/]*(?:mlp|MLP|Mlp)[^/]*/[^/]+"
# What the named targets mean, for the module names of T5X (and of flax's own attention).
NAMED_TARGETS: Mapping[str, str] = {
    "all": f"{_ATTENTION}|{_MLP}",
    "attention": _ATTENTION,
    "mlp": _MLP,
    "encoder": f"encoder/(?:{_ATTENTION}|{_MLP})",
    "decoder": f"decoder/(?:{_ATTENTION}|{_MLP})",
}


def as_tuple(targets: Any, place: str) -> tuple[str, ...]:
    """One or several targets as a tuple; ValueError, which begins with `place`, for none."""
    several = (targets,) if isinstance(targets, str) else tuple(targets)
    if not several:
        raise ValueError(f"{place}: targets is empty, expected at least one; 'all' is usual")
    for target in several:
        compiled(target, place)
    return several


def compiled(target: Any, place: str = "adapter") -> re.Pattern[str]:
    """The pattern of a named target or of a regular expression; ValueError where it is neither."""
    if not isinstance(target, str) or not target:
        raise ValueError(f"{place}: target {target!r}, expected a name or a regular expression")
    try:
        return re.compile(NAMED_TARGETS.get(target, target))  # re keeps its own cache
    except re.error as error:
        raise ValueError(
            f"{place}: target {target!r} is not a regular expression: {error}"
        ) from error


def matching(targets: Iterable[str], path: str) -> tuple[str, ...]:
    """Those of the targets that match the whole of a module's path."""
    return tuple(t for t in targets if compiled(t).fullmatch(path))


def check(targets: Iterable[str], paths: Sequence[str], place: str, layers: str) -> None:
    """ValueError for the first target that matches none of the layers at `paths`.

    Args:
      targets: names or regular expressions.
      paths: of the layers there are.
      place: what the targets are of, as gin names it: 'AdapterSpec.targets'.
      layers: what the layers are: 'dense layers'.
    """
    for target in targets:
        if not any(matching((target,), path) for path in paths):
            raise ValueError(
                f"{place}: {target!r} matches none of {len(paths)} {layers}; "
                + did_you_mean(target, (*paths, *NAMED_TARGETS) if paths else ())
            )
