"""Dense layers of a linen model: telling their calls from others, and reading what they read."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class DenseCall:
    """One call of a dense layer, its dimensions flattened."""

    path: str
    axes: tuple[int, ...]  # the input's axes that are contracted, in order
    d_in: int
    d_out: int
    contracts_last: bool  # whether those are the last ones


def dense_call(context: nn.module.InterceptorContext, x: Any) -> DenseCall | None:
    """Describes the call when it is that of a dense layer that has made its kernel, else None.

    A dense layer is told by what it has, not by its class: `features`, perhaps `axis`, and a
    parameter `kernel` of as many elements as contracted inputs times features. That holds for
    nn.Dense, nn.DenseGeneral and T5X's own DenseGeneral, not for convolutions and embeddings.
    """
    module = context.module
    if context.method_name != "__call__" or not hasattr(module, "features"):
        return None
    if getattr(module, "batch_dims", ()) or hasattr(module, "kernel_size"):
        return None
    if not hasattr(x, "shape") or not module.has_variable("params", "kernel"):
        return None
    # A box of flax's is a tree of one leaf; unboxing it would ask for a sharding.
    (kernel,) = jax.tree.leaves(module.get_variable("params", "kernel"))
    try:
        features = tuple(int(f) for f in np.atleast_1d(module.features))
        axes = tuple(int(a) % x.ndim for a in np.atleast_1d(getattr(module, "axis", -1)))
    except (TypeError, ValueError):
        return None
    d_in, d_out = math.prod(x.shape[a] for a in axes), math.prod(features)
    if kernel.size != d_in * d_out:
        return None
    last = axes == tuple(range(x.ndim - len(axes), x.ndim))
    return DenseCall("/".join(module.path), axes, d_in, d_out, last)


DenseInput = tuple[DenseCall, Any]


@contextlib.contextmanager
def dense_inputs() -> Iterator[list[DenseInput]]:
    """A context in which the calls of dense layers are listed as they come, with their inputs."""
    found: list[DenseInput] = []

    def record(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        x = layer_input(args, kwargs)
        call = dense_call(context, x)
        if call is not None:
            found.append((call, x))
        return y

    with nn.intercept_methods(record):
        yield found


def layer_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def as_rows(call: DenseCall, x: Any) -> Array:
    """A layer's input [batch, …] as [batch, …, d_in], its contracted axes flattened."""
    if 0 in call.axes:
        raise ValueError(f"{call.path}: contracts the batch axis of {x.shape}, cannot be adapted")
    others = tuple(a for a in range(x.ndim) if a not in call.axes)
    rows = jnp.asarray(x).transpose(*others, *call.axes)
    return rows.reshape(*rows.shape[: len(others)], call.d_in)


def without_numbers(path: str) -> str:
    """'encoder/layers_3/mlp/wi_0' -> 'encoder/layers_*/mlp/wi_0': the layer's own name stays."""
    *parents, name = path.split("/")
    return "/".join([re.sub(r"_\d+$", "_*", p) for p in parents] + [name])
