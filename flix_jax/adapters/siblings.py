"""Siblings: adapted layers of one module that read the very same input, as query, key and value do.

Their narrow activations x A are made by one product, where a table says so: its `a` are side by
side (`modules.common_leaf`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array

from flix_jax.adapters.dense import DenseInput, without_numbers
from flix_jax.adapters.modules import LowRankDelta


def find(
    matches: Callable[[str], Any], inputs: Sequence[DenseInput]
) -> tuple[tuple[str, ...], ...]:
    """Paths of adapted layers of one module that read the very same input, in order of their calls.

    `matches` says of a path whether that layer is adapted, and so that siblings have it in common.
    Groups of two and more, of what `dense_inputs` found in a trace, in which each call may have
    been traced several times. A layer that reads with these once and with those another time has no
    siblings.
    """
    by_input: dict[Any, dict[str, None]] = {}
    for call, x in inputs:
        kind = matches(call.path)
        if kind:
            of = call.path.rpartition("/")[0], id(x), call.axes, kind
            by_input.setdefault(of, {})[call.path] = None
    groups = dict.fromkeys(map(tuple, by_input.values()))
    times = Counter(path for group in groups for path in group)
    return tuple(g for g in groups if len(g) > 1 and all(times[path] == 1 for path in g))


def described(siblings: Sequence[Sequence[str]]) -> list[str]:
    """Siblings in words, groups that differ by a layer's number as one: 'mlp/wi_0 + wi_1'."""
    words = [" + ".join([g[0], *(p.rpartition("/")[2] for p in g[1:])]) for g in siblings]
    return list(dict.fromkeys(map(without_numbers, words)))


class Narrowed:
    """The narrow activations of layers of a module that read the same input, made with the first.

    Only where a table says so (`modules.common_leaf`).
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[Any, dict[str, Array]]] = {}

    def of(self, path: str, child: LowRankDelta, x: Any, rows: Array) -> Array | None:
        """x A of the layer at a path; None where its table has an `a` of its own."""
        if not child.has_siblings:
            return None
        parent, _, name = path.rpartition("/")
        made = child.narrowed(rows)
        if made:
            self._made[parent] = x, made
        read, by_name = self._made.get(parent, (None, {}))
        if read is not x or name not in by_name:
            raise ValueError(f"reads another input than {', '.join(by_name) or 'its siblings'}")
        return by_name[name]
