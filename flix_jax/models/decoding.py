"""Decoding over any one-step function, with early stopping; jit-friendly.

Every decoder has the same shape: it is given `tokens_to_logits`, the cache that this function
threads through, the batch size, the length and the end-of-sequence id. A decoder that follows
several hypotheses per example repeats the leaves of the cache and calls with as many rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Cache = Any
# (tokens int32 [rows], cache) -> (logits [rows, vocab], cache), one step further
TokensToLogits = Callable[[Int[Array, " rows"], Cache], tuple[Float[Array, "rows vocab"], Cache]]

START_ID = 0


def greedy(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    batch: int,
    max_length: int,
    eos_id: int,
    *,
    finished: Bool[Array, " batch"] | None = None,
) -> Int[Array, "batch {max_length}"]:
    """Takes the most probable token at every step until each row has ended.

    Args:
      tokens_to_logits: one step; the first token it is given is 0.
      cache: its state before the first step.
      batch: number of rows.
      max_length: tokens to decode at most, `eos_id` included.
      eos_id: the token that ends a row.
      finished: rows to leave empty (padding of a batch): they do not hold up the others.

    Returns:
      int32 [batch, max_length]: tokens up to and including `eos_id`, then 0.
    """
    if max_length < 1:
        raise ValueError(f"max_length = {max_length!r}: expected a positive integer")
    if finished is None:
        finished = jnp.zeros((batch,), bool)

    def unfinished(state):
        step, _, done, _, _ = state
        return (step < max_length) & ~jnp.all(done)

    def advance(state):
        step, tokens, done, decoded, cache = state
        logits, cache = tokens_to_logits(tokens, cache)
        tokens = jnp.where(done, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        decoded = jax.lax.dynamic_update_slice(decoded, tokens[:, None], (0, step))
        return step + 1, tokens, done | (tokens == eos_id), decoded, cache

    start = jnp.full((batch,), START_ID, jnp.int32)
    decoded = jnp.zeros((batch, max_length), jnp.int32)
    state = (jnp.int32(0), start, finished, decoded, cache)
    return jax.lax.while_loop(unfinished, advance, state)[3]
