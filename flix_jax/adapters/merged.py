"""An adapted layer as one product: its kernel and the update of a group of rows as one matrix.

    y[g] = x[g] (W + Σ_{f ∈ F(g)} w_gf · s_f · A_f B_f)

for groups of rows that have equal features and weights. Forward, and back to the input, there is no
narrow product and no second output to write, read and add; only the gradients of A and B have
narrow products, as they have otherwise. Where a group has few positions beside the kernel's width,
making the matrices costs more than it saves, but where the compiler makes them within the product
that reads them, as a TPU's does.

The sum of kernel and update is rounded to the kernel's dtype, and to the layer's. In float32 that
is what the separate products give but for rounding; of a kernel in bfloat16, what an update adds to
an entry is lost while it is below half a unit in its last place.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flix_jax.adapters.low_rank import Table, accumulator, of_columns

Params = Mapping[str, Any]
#: (its parameters, x [rows, …, d_in]) -> y [rows, …, features].
Layer = Callable[[Params, Array], Array]


def product(
    layer: Layer,
    params: Params,
    x: Float[Array, "batch ..."],
    table: Table,
    c: Float[Array, "groups R"],
) -> Float[Array, "batch ..."]:
    """What a dense layer gives with the update in its kernel.

    Args:
      layer: linear in `kernel` of its parameters, contracting the last axes of x.
      params: its parameters; `kernel` [d_in, d_out] or as many elements in that order.
      x: of the layer, the rows of a group one after another.
      table: a [groups, R, d_in] and b [groups, R, d_out].
      c: the coefficients of the columns (`coefficients`).

    Returns:
      As the layer gives it. Gradients are those of the separate products, for `params` too.
    """
    groups = c.shape[0]
    assert table.a is not None
    if table.a.shape[0] != groups or x.shape[0] % groups:
        raise ValueError(
            f"a table of {table.a.shape[0]} groups and coefficients of {groups} for "
            f"{x.shape[0]} rows: expected as many groups, and a multiple of them"
        )
    apart = x.reshape(groups, -1, *x.shape[1:])
    dtype = jax.eval_shape(layer, params, apart[0]).dtype
    copies = table.copies
    if copies is None:
        copies = jax.tree.map(lambda m: jax.lax.stop_gradient(m).astype(dtype), table[:2])
    y = _product(layer, apart, dict(params), table.a, table.b, copies, c)
    return y.reshape(x.shape[0], *y.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(layer, x, params, a, b, copies, c):
    """For x [groups, rows, …]; computed with the copies, whose gradients are those of a and b."""
    return _forward(layer, x, params, a, b, copies, c)[0]


def _forward(layer, x, params, a, b, copies, c):
    y = _of_groups(layer, _kernels(params["kernel"], *copies, c), params, x)
    return y, (x, params, Table(a, b, copies), c)


def _backward(layer, saved, g):
    x, params, table, c = saved
    kernels = _kernels(params["kernel"], *table.copies, c)
    _, pull = jax.vjp(functools.partial(_of_groups, layer), kernels, params, x)
    dkernels, dparams, dx = pull(g)
    dparams["kernel"] = dkernels.sum(axis=0).astype(params["kernel"].dtype)

    # The gradients of a, b and c are those of the update beside the layer.
    dtype = table.copies[0].dtype
    x, g = (
        m.reshape(len(c), -1, of.shape[2]).astype(dtype)
        for m, of in zip((x, g), table[:2], strict=True)
    )
    _, pull = jax.vjp(lambda table, c: of_columns(x, table, c), table, c)
    dtable, dc = pull(g)
    return dx, dparams, dtable.a, dtable.b, None, dc


_product.defvjp(_forward, _backward)


def _kernels(kernel: Array, a: Array, b: Array, c: Array) -> Array:
    """[groups, *kernel.shape]: the kernel with each group's update, in the kernel's dtype."""
    wide = accumulator(a)
    z = (b.astype(wide) * c[:, :, None].astype(wide)).astype(b.dtype)
    update = jnp.einsum("grd,gro->gdo", a, z, preferred_element_type=wide)
    total = kernel.astype(jnp.promote_types(kernel.dtype, wide)) + update.reshape(
        len(c), *kernel.shape
    )
    return total.astype(kernel.dtype)


def _of_groups(layer: Layer, kernels: Array, params: Params, x: Array) -> Array:
    """The layer on each group, with the group's kernel."""

    def one(kernel: Array, x: Array) -> Array:
        return layer({**params, "kernel": kernel}, x)

    if len(kernels) == 1:
        return one(kernels[0], x[0])[None]
    return jax.vmap(one)(kernels, x)
