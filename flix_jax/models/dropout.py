"""Dropout that is drawn for every example by itself.

linen's `nn.Dropout` draws one mask for a whole batch, so that an example's mask depends on the
batch around it. Here it is a function of the key and of the example's number alone: a batch that is
cut into microbatches, in whatever way, has the masks that it has whole.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Int

#: Entry of a batch: int32 [batch], the number of each example; by default, its place.
EXAMPLE_NUMBERS = "example_numbers"


@contextlib.contextmanager
def by_example(numbers: Int[Array, " batch"]) -> Iterator[None]:
    """A context in which every `nn.Dropout` of any linen model draws by its examples' numbers.

    The first axis of what is dropped out must be the batch. Masks that are shared over axes counted
    from the front (`broadcast_dims`), and those of a key that is given, are drawn as they were.
    """

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not isinstance(module, nn.Dropout) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        return _drop(module, next_fun, *args, **kwargs)

    def _drop(module, next_fun, inputs, deterministic=None, rng=None):
        off = nn.merge_param("deterministic", module.deterministic, deterministic)
        shared = any(axis >= 0 for axis in module.broadcast_dims)
        if off or module.rate in (0.0, 1.0) or rng is not None or shared:
            return next_fun(inputs, deterministic, rng)
        if inputs.shape[0] != numbers.shape[0]:
            raise ValueError(
                f"{'/'.join(module.path)}: dropout of {inputs.shape[0]} rows, expected the batch's "
                f"{numbers.shape[0]}"
            )
        key = module.make_rng(module.rng_collection)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        return jax.vmap(lambda row, key: next_fun(row, deterministic, key))(inputs, keys)

    with nn.intercept_methods(interceptor):
        yield
