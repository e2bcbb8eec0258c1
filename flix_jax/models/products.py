"""Products of activations with kernels, in float32 or of narrower operands that sum in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


def matmul(
    x: Float[Array, "rows inner"], kernel: Float[Array, "inner outer"], operands: Any
) -> Float[Array, "rows outer"]:
    """x @ kernel of operands rounded to the dtype `operands`.

    With float32 it is the plain product. Narrower operands are multiplied as a TPU multiplies, and
    every sum is kept in float32, in the gradients too: the result and both gradients are float32,
    rounded to the dtype of `x` and of `kernel`.
    """
    operands = jnp.dtype(operands)
    if operands.itemsize >= 4:
        return jnp.dot(x.astype(operands), kernel.astype(operands))
    return _narrow(operands)(x, kernel)


def _narrow(operands: jnp.dtype) -> Any:
    def forward(x: Array, kernel: Array) -> tuple[Array, Any]:
        rows, columns = x.astype(operands), kernel.astype(operands)
        y = jnp.dot(rows, columns, preferred_element_type=jnp.float32).astype(x.dtype)
        # Zero-sized arrays carry the dtypes of the gradients.
        return y, (rows, columns, jnp.zeros((0,), x.dtype), jnp.zeros((0,), kernel.dtype))

    def backward(residuals: Any, gradient: Array) -> tuple[Array, Array]:
        rows, columns, x, kernel = residuals
        gradient = gradient.astype(operands)
        to_rows = lax.dot_general(
            gradient, columns, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        to_columns = lax.platform_dependent(rows, gradient, cpu=_transposed_first, default=_inner)
        return to_rows.astype(x.dtype), to_columns.astype(kernel.dtype)

    product = jax.custom_vjp(lambda x, kernel: forward(x, kernel)[0])
    product.defvjp(forward, backward)
    return product


def _inner(rows: Array, gradient: Array) -> Array:
    """rows^T @ gradient."""
    return lax.dot_general(
        rows, gradient, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _transposed_first(rows: Array, gradient: Array) -> Array:
    """The same with rows^T laid out in memory: XLA's matrix units on a CPU want it so."""
    transposed = with_layout_constraint(rows.T, Layout((0, 1)))
    return jnp.dot(transposed, gradient, preferred_element_type=jnp.float32)
