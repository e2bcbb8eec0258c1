"""Frozen matrices as int8 with a float32 scale for every output channel.

Of a quantised tree the leaf `kernel` is int8, and `kernel_scale` stands beside it: the same axes,
the contracted one of size 1. Token embeddings have a scale for every row, which is a channel of the
logits where the output layer is tied. Everything else stays what it is.

    kernel       int8    [d_in, d_out]        or, of scanned layers, [d_in, layers, d_out]
    kernel_scale float32 [1, d_out]           [1, layers, d_out]

Quantisation is symmetric: w ≈ scale * q with scale = max|w| / 127 over a channel and q the nearest
integer, so that no weight moves by more than half a scale.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int8

INT8 = "int8"
# A product, for the compiler makes one of a division by a constant: scales are the same to the bit
# where NumPy reads a checkpoint.
_STEP = np.float32(1 / 127)
#: Name of a parameter that is quantised -> the axis over which its weights share a scale.
AXES: Mapping[str, int] = {"kernel": 0, "embedding": 1}


def scale_name(name: str) -> str:
    """The parameter beside `name` that holds its scales."""
    return f"{name}_scale"


def is_quantised(params: Mapping[str, Any]) -> bool:
    """Whether any leaf of a tree is int8; arrays or shapes."""
    return any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(params))


def scales(weights: Any, axis: int) -> Any:
    """max|w| / 127 along an axis, which is kept: float32, of NumPy's arrays or JAX's."""
    xp = np if isinstance(weights, np.ndarray) else jnp
    return xp.max(xp.abs(weights.astype(np.float32)), axis=axis, keepdims=True) * _STEP


def integers(weights: Any, scale: Any) -> Any:
    """The nearest integers to weights / scale, int8; 0 where the scale is."""
    xp = np if isinstance(weights, np.ndarray) else jnp
    divisor = xp.where(scale == 0, np.float32(1), scale)
    return xp.rint(weights.astype(np.float32) / divisor).astype(np.int8)


def quantise(params: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with its matrices as int8; those that are int8 already stay."""

    def pair(name: str, leaf: Any) -> dict[str, Any]:
        if name not in AXES or leaf.dtype == jnp.int8:
            return {name: leaf}
        scale = scales(leaf, AXES[name])
        return {name: integers(leaf, scale), scale_name(name): scale}

    return _by_name(params, pair)


def template(params: Mapping[str, Any]) -> dict[str, Any]:
    """What `quantise` makes of a tree of `jax.ShapeDtypeStruct` with `NamedSharding`s."""

    def pair(name: str, leaf: Any) -> dict[str, Any]:
        if name not in AXES:
            return {name: leaf}
        axis, sharding = AXES[name], leaf.sharding
        shape = (*leaf.shape[:axis], 1, *leaf.shape[axis + 1 :])
        spec = (*sharding.spec[:axis], None, *sharding.spec[axis + 1 :])
        beside = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, jnp.int8, sharding=sharding),
            scale_name(name): jax.ShapeDtypeStruct(shape, jnp.float32, sharding=beside),
        }

    return _by_name(params, pair)


def dequantise(params: Mapping[str, Any]) -> dict[str, Any]:
    """The float32 weights that a quantised tree computes with; another tree as it is."""
    found: dict[str, Any] = {}
    for name, leaf in params.items():
        if isinstance(leaf, Mapping):
            found[name] = dequantise(leaf)
        elif name in AXES and leaf.dtype == jnp.int8:
            found[name] = leaf.astype(jnp.float32) * params[scale_name(name)]
        elif not any(name == scale_name(of) and of in params for of in AXES):
            found[name] = leaf
    return found


def _by_name(params: Mapping[str, Any], pair: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, leaf in params.items():
        found |= {name: _by_name(leaf, pair)} if isinstance(leaf, Mapping) else pair(name, leaf)
    return found


def matmul(
    x: Float[Array, "rows inner"],
    kernel: Int8[Array, "inner outer"],
    scale: Float[Array, "1 outer"],
    operands: Any,
) -> Float[Array, "rows outer"]:
    """x @ (kernel * scale), in the dtype of x, without a gradient for the kernel.

    x is rounded to the dtype `operands`, which holds every int8 exactly; sums and scales are
    float32. The kernel is converted where it is multiplied, forward and backward, and what is kept
    for the gradient is the int8 kernel itself.
    """
    return _matmul(jnp.dtype(operands))(x, kernel, scale)


def _matmul(operands: jnp.dtype) -> Any:
    def forward(x: Array, kernel: Array, scale: Array) -> tuple[Array, Any]:
        y = jnp.dot(x.astype(operands), kernel.astype(operands), preferred_element_type=jnp.float32)
        # A zero-sized array carries the dtype of the gradient.
        return (y * scale).astype(x.dtype), (kernel, scale, jnp.zeros((0,), x.dtype))

    def backward(residuals: Any, gradient: Array) -> tuple[Array, None, None]:
        kernel, scale, x = residuals
        # Or the compiler shares the conversion with the forward pass, and keeps it until here.
        kernel, gradient = lax.optimization_barrier((kernel, gradient))
        scaled = (gradient.astype(jnp.float32) * scale).astype(operands)
        to_x = lax.dot_general(
            scaled,
            kernel.astype(operands),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return to_x.astype(x.dtype), None, None

    product = jax.custom_vjp(lambda x, kernel, scale: forward(x, kernel, scale)[0])
    product.defvjp(forward, backward)
    return product
