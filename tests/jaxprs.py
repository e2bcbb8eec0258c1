"""What a jaxpr computes."""

import math

from jax.extend.core import jaxprs_in_params


def product_flops(jaxpr) -> float:
    """Multiplications and additions of all products in a jaxpr and in those that it calls.

    Of branches by platform, those of the default, which is the last.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        inside = list(jaxprs_in_params(equation.params))
        if equation.primitive.name == "cond":
            inside = inside[-1:]
        total += sum(map(product_flops, inside))
    return total
