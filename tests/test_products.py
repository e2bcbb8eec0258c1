"""Products of narrow operands: against the formula on rounded operands, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flix_jax.models import products


def _arrays(x_dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((40, 24), (24, 16), (40, 16))
    x, kernel, gradient = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    return x.astype(x_dtype), kernel, gradient.astype(x_dtype)


def _rounded(array, operands):
    return np.asarray(array.astype(operands), np.float64)


@pytest.mark.parametrize("operands", ["float32", "bfloat16", "float16"])
def test_the_product_and_its_gradients_sum_rounded_operands(operands):
    x, kernel, gradient = _arrays()

    @jax.jit
    def run(x, kernel, gradient):
        y, pull = jax.vjp(lambda x, kernel: products.matmul(x, kernel, operands), x, kernel)
        return y, *pull(gradient)

    y, to_x, to_kernel = run(x, kernel, gradient)
    a, w, g = (_rounded(array, operands) for array in (x, kernel, gradient))
    for found, expected in ((y, a @ w), (to_x, g @ w.T), (to_kernel, a.T @ g)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_float32_kernel_are_not_rounded():
    """The sum over the rows is what loses most in bfloat16."""
    x, kernel, gradient = _arrays(jnp.bfloat16)
    y, pull = jax.vjp(lambda x, k: products.matmul(x, k, "bfloat16"), x, kernel)
    to_x, to_kernel = pull(gradient)
    assert (y.dtype, to_x.dtype, to_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected = np.asarray(x, np.float64).T @ np.asarray(gradient, np.float64)
    np.testing.assert_allclose(to_kernel, expected, rtol=1e-5, atol=1e-5)


def test_both_forms_of_the_kernel_gradient_agree_and_batch():
    x, _, gradient = (array.astype(jnp.bfloat16) for array in _arrays())
    one, other = (jax.jit(f)(x, gradient) for f in (products._inner, products._transposed_first))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    several = jnp.stack([x, 2 * x])
    batched = jax.jit(jax.vmap(products._transposed_first, in_axes=(0, None)))(several, gradient)
    np.testing.assert_allclose(batched, [other, 2 * other], rtol=1e-5, atol=1e-5)
