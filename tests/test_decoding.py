"""Greedy decoding over small tables against a Python loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flix_jax.models.decoding import greedy

EOS = 1


def _bigram(table):
    """A step function whose logits depend on the last token; its cache counts the steps."""

    def tokens_to_logits(tokens, steps):
        return table[tokens], steps + 1

    return tokens_to_logits


def _expected(table, start_rows, max_length):
    decoded = np.zeros((start_rows, max_length), np.int32)
    for row in range(start_rows):
        token = 0
        for step in range(max_length):
            token = int(np.argmax(table[token]))
            decoded[row, step] = token
            if token == EOS:
                break
    return decoded


@pytest.mark.parametrize("seed", range(4))
def test_greedy_follows_the_largest_logit_until_the_end(seed):
    table = np.random.default_rng(seed).normal(size=(7, 7)).astype(np.float32)
    decode = jax.jit(lambda table: greedy(_bigram(table), jnp.int32(0), 2, 9, EOS))
    np.testing.assert_array_equal(decode(table), _expected(table, 2, 9))


def test_rows_end_by_themselves_and_decoding_ends_with_the_last():
    # Row r counts down from r + 2 to 1; the table wraps the row into the cache.
    def tokens_to_logits(tokens, cache):
        row, steps = cache
        following = jnp.where(tokens == 0, row + 2, tokens - 1)
        jax.debug.callback(lambda step: taken.append(int(step)), steps)
        return jax.nn.one_hot(following, 12), (row, steps + 1)

    taken: list[int] = []
    cache = (jnp.arange(3), jnp.int32(0))
    decoded = jax.block_until_ready(greedy(tokens_to_logits, cache, 3, 8, EOS))
    jax.effects_barrier()
    np.testing.assert_array_equal(
        decoded,
        [[2, 1, 0, 0, 0, 0, 0, 0], [3, 2, 1, 0, 0, 0, 0, 0], [4, 3, 2, 1, 0, 0, 0, 0]],
    )
    assert max(taken) == 3, "decoding goes on after every row has ended"


def test_finished_rows_stay_empty():
    table = jnp.asarray(np.eye(5, dtype=np.float32)[[3, 1, 2, 4, 3]])
    finished = jnp.asarray([False, True])
    decoded = greedy(_bigram(table), jnp.int32(0), 2, 4, EOS, finished=finished)
    np.testing.assert_array_equal(decoded, [[3, 4, 3, 4], [0, 0, 0, 0]])


def test_a_length_of_zero_is_refused():
    with pytest.raises(ValueError, match="max_length = 0: expected a positive integer"):
        greedy(_bigram(jnp.eye(3)), jnp.int32(0), 1, 0, EOS)
