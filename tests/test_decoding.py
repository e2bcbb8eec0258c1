"""Decoding over small tables: greedy against a Python loop, beams against exhaustive search."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from flix_jax.models.decoding import Decoding, beam, greedy, sample

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


VOCAB, LENGTH = 3, 4
# Hypotheses of up to LENGTH tokens: those that end after 1, 2, … tokens, and those that never do.
ALL = sum((VOCAB - 1) ** n for n in range(LENGTH)) + (VOCAB - 1) ** LENGTH


def _node(prefix):
    """The number of a prefix among all of up to LENGTH - 1 tokens."""
    return functools.reduce(lambda node, token: node * VOCAB + token + 1, prefix, 0)


NODES = _node((VOCAB - 1,) * (LENGTH - 1)) + 1


def _tree(tables):
    """A step over logits by row and prefix, [batch, nodes, vocab]; the prefix is in the cache.

    The cache has what a network's has: rows on the first axis, rows behind an axis of layers, a
    count of steps that all share, and what a row's hypotheses share.
    """
    rows = jnp.arange(len(tables))

    def tokens_to_logits(tokens, cache):
        step = cache["step"]
        node = jnp.where(step == 0, 0, cache["node"] * VOCAB + tokens + 1)
        layers = cache["layers"].at[:, :, step].set(tokens)
        # layers of the tokens so far must tell the same prefix
        walked = jnp.int32(0)
        for position in range(1, LENGTH):
            walked = jnp.where(
                position <= step, walked * VOCAB + layers[1, :, position] + 1, walked
            )
        logits = jnp.where((walked == node)[:, None], cache["tables"][rows, node], jnp.nan)
        return logits, dict(cache, node=node, layers=layers, step=step + 1)

    cache = {
        "node": jnp.zeros(len(tables), jnp.int32),
        "layers": jnp.zeros((2, len(tables), LENGTH), jnp.int32),
        "step": jnp.int32(0),
        "tables": tables,
    }
    return tokens_to_logits, cache


AXES = {"node": 0, "layers": 1, "step": None, "tables": None}


@functools.partial(jax.jit, static_argnames=("beams", "alpha"))
def _beam(tables, beams, alpha, finished=None):
    step, cache = _tree(tables)
    options = {"alpha": alpha, "cache_axes": AXES, "finished": finished}
    return beam(step, cache, len(tables), beams, LENGTH, EOS, **options)


@jax.jit
def _greedy(tables):
    step, cache = _tree(tables)
    return greedy(step, cache, len(tables), LENGTH, EOS)


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def beam_in_python(log_probs, beams, max_length, eos_id, alpha):
    """Beam search with lists, without early stopping: [(tokens, score)], best first.

    Args:
      log_probs: hypotheses of one length -> the log probabilities of each one's next token.
    """
    live, ended = [((), 0.0)], []
    for length in range(1, max_length + 1):
        following = log_probs([tokens for tokens, _ in live])
        extensions = [
            ((*tokens, token), total + float(row[token]))
            for (tokens, total), row in zip(live, following, strict=True)
            for token in range(len(row))
            if row[token] > -math.inf
        ]
        extensions = sorted(extensions, key=lambda pair: -pair[1])[:beams]
        penalty = ((5 + length) / 6) ** alpha
        cut = length == max_length
        ended += [(t, total / penalty) for t, total in extensions if t[-1] == eos_id or cut]
        live = [(t, total) for t, total in extensions if t[-1] != eos_id]
        if not live:
            break
    return sorted(ended, key=lambda pair: -pair[1])[:beams]


def _exhaustive(table, alpha):
    """Every hypothesis of a table [nodes, vocab] with its score, best first."""
    found = []
    for length in range(1, LENGTH + 1):
        for tokens in itertools.product(range(VOCAB), repeat=length):
            if EOS in tokens[:-1] or (length < LENGTH and tokens[-1] != EOS):
                continue
            total = sum(_log_softmax(table[_node(tokens[:n])])[tokens[n]] for n in range(length))
            if total > -math.inf:
                found.append((tokens, total / ((5 + length) / 6) ** alpha))
    return sorted(found, key=lambda pair: -pair[1])


def assert_hypotheses(tokens, scores, expected):
    """Tokens [beams, length] and scores [beams] are those expected, and nothing after them."""
    padded = np.zeros(tokens.shape, np.int32)
    expected_scores = np.full(scores.shape, -np.inf)
    for place, (hypothesis, score) in enumerate(expected):
        padded[place, : len(hypothesis)] = hypothesis
        expected_scores[place] = score
    np.testing.assert_array_equal(tokens, padded)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


def _random_tables(seed, batch=2):
    """Logits by prefix; here and there a token cannot follow."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2.0, size=(batch, NODES, VOCAB))
    never = rng.random(logits.shape[:2]) < 0.2
    logits[never, rng.integers(VOCAB, size=never.sum())] = -np.inf
    return logits.astype(np.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@given(seed=st.integers(0, 2**32 - 1))
def test_with_as_many_beams_as_hypotheses_the_search_is_exhaustive(alpha, seed):
    tables = _random_tables(seed)
    tokens, scores = _beam(tables, ALL + 2, alpha)
    assert scores.dtype == jnp.float32 and tokens.dtype == jnp.int32
    for row, table in enumerate(tables):
        assert_hypotheses(tokens[row], scores[row], _exhaustive(table, alpha))


@pytest.mark.parametrize(("beams", "alpha"), [(2, 0.0), (2, 0.6), (3, 0.6), (3, 2.0)])
@given(seed=st.integers(0, 2**32 - 1))
def test_a_narrow_beam_is_that_of_lists_without_early_stopping(beams, alpha, seed):
    tables = _random_tables(seed)
    tokens, scores = _beam(tables, beams, alpha)
    for row, table in enumerate(tables):

        def log_probs(prefixes, table=table):
            return [_log_softmax(table[_node(prefix)]) for prefix in prefixes]

        expected = beam_in_python(log_probs, beams, LENGTH, EOS, alpha)
        assert_hypotheses(tokens[row], scores[row], expected)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
def test_one_beam_is_greedy_decoding(alpha, seed, ties):
    tables = _random_tables(seed, batch=4)
    if ties:
        tables = np.round(tables / 2) + 0.0  # no zero below another
    tokens, _ = _beam(tables, 1, alpha)
    np.testing.assert_array_equal(tokens[:, 0], _greedy(tables))


def test_of_equal_hypotheses_the_shorter_and_the_lower_tokens_come_first():
    tokens, scores = _beam(np.zeros((1, NODES, VOCAB), np.float32), 4, 0.0)
    # [2] and [0] live on after the first step; of their six extensions four are kept, …
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(tokens[0], expected)
    np.testing.assert_allclose(scores[0], -np.log(3) * np.asarray([1, 2, 3, 4]), rtol=1e-6)


@pytest.mark.parametrize(("beams", "steps"), [(1, 1), (3, 2), (4, 3)])
def test_the_search_stops_when_no_live_hypothesis_can_be_among_the_best(beams, steps):
    taken: list[int] = []

    def tokens_to_logits(tokens, cache):
        jax.debug.callback(lambda step: taken.append(int(step)), cache)
        logits = jnp.asarray([0.01, 0.98, 0.01])  # the end is far more probable than all else
        return jnp.broadcast_to(jnp.log(logits), (2, 3)), cache + 1

    cache = jnp.int32(0)
    jax.block_until_ready(beam(tokens_to_logits, cache, 2, beams, 9, EOS, cache_axes=None))
    jax.effects_barrier()
    assert max(taken) + 1 == steps


def test_finished_rows_have_no_hypotheses_and_change_no_others():
    tables = _random_tables(7)
    tokens, scores = _beam(tables, 3, 0.6, jnp.asarray([True, False]))
    np.testing.assert_array_equal(tokens[0], 0)
    np.testing.assert_array_equal(scores[0], -np.inf)
    expected = _beam(tables, 3, 0.6)
    np.testing.assert_array_equal(tokens[1], expected[0][1])
    np.testing.assert_array_equal(scores[1], expected[1][1])


def test_logits_that_are_no_numbers_show_in_the_scores_of_their_row_alone():
    tables = _random_tables(8)
    expected = _beam(tables, 3, 0.6)
    tables[0, 0] = np.nan
    tokens, scores = _beam(tables, 3, 0.6)
    assert np.isnan(scores[0]).any()
    np.testing.assert_array_equal(tokens[1], expected[0][1])
    np.testing.assert_array_equal(scores[1], expected[1][1])


def test_a_cache_that_is_wrongly_said_to_be_shared_is_refused():
    step, cache = _tree(_random_tables(0))
    with pytest.raises(ValueError, match="vmap"):
        beam(step, cache, 2, 3, LENGTH, EOS, cache_axes={**AXES, "node": None})


@pytest.mark.parametrize(
    ("beams", "max_length", "alpha", "message"),
    [
        (0, 4, 0.0, "beams = 0: expected a positive integer"),
        (2, 0, 0.0, "max_length = 0: expected a positive integer"),
        (2, 4, -0.1, "alpha = -0.1: expected a finite number of at least 0"),
        (2, 4, math.inf, "alpha = inf: expected a finite number of at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(beams, max_length, alpha, message):
    with pytest.raises(ValueError, match=message):
        beam(_bigram(jnp.eye(3)), jnp.int32(0), 1, beams, max_length, EOS, alpha=alpha)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, range(6)),
        ({"temperature": 0.5}, range(6)),
        ({"top_k": 3}, None),
        ({"top_p": 0.7}, None),
        ({"temperature": 2.0, "top_k": 4, "top_p": 0.8}, None),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_are_probable(options, allowed):
    """Chi-square of the first and the second token against probabilities by a loop."""
    rows, table = 4000, np.random.default_rng(5).normal(size=(6, 6)).astype(np.float32) * 1.5
    table[:, EOS] = -20.0  # so that none ends
    decode = jax.jit(
        lambda key: sample(_bigram(jnp.asarray(table)), jnp.int32(0), rows, 2, EOS, key, **options)
    )
    drawn = np.asarray(decode(jax.random.key(0)))
    first = _probabilities(table[0], **options)
    _check_frequencies(drawn[:, 0], first)
    likely = int(np.argmax(first))
    _check_frequencies(drawn[drawn[:, 0] == likely, 1], _probabilities(table[likely], **options))
    assert allowed is None or (first > 0).sum() == len(allowed)


def _probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Token by token, the most probable first."""
    exp = np.exp(logits.astype(np.float64) / temperature)
    order = np.argsort(-exp)
    if top_k:
        order = order[:top_k]
    share = exp[order] / exp[order].sum()
    taken, total = [], 0.0
    for token, probability in zip(order, share, strict=True):
        if total >= top_p:
            break
        taken.append(token)
        total += probability
    found = np.zeros(len(logits))
    found[taken] = exp[taken] / exp[taken].sum()
    return found


def _check_frequencies(drawn, probabilities):
    counts = np.bincount(drawn, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(drawn)
    frequent = expected > 5
    chi2 = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum()
    assert scipy.stats.chi2.sf(chi2, frequent.sum() - 1) > 1e-3


def test_a_sample_follows_from_its_key_and_differs_between_rows():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(30, 30)), jnp.float32)
    table = table.at[:, EOS].set(-20.0)
    decode = jax.jit(lambda key: sample(_bigram(table), jnp.int32(0), 5, 8, EOS, key))
    one, again, other = (np.asarray(decode(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any() and len({tuple(row) for row in one}) == 5


def test_the_most_probable_alone_is_greedy():
    table = jnp.asarray(np.random.default_rng(3).normal(size=(9, 9)), jnp.float32)
    expected = greedy(_bigram(table), jnp.int32(0), 3, 6, EOS)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        found = sample(_bigram(table), jnp.int32(0), 3, 6, EOS, jax.random.key(0), **options)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0: expected a finite number above 0"),
        ({"top_k": -1}, "top_k = -1: expected an integer of at least 0"),
        ({"top_p": 0.0}, r"top_p = 0.0: expected a number in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p = 1.5"),
    ],
)
def test_options_of_sampling_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        sample(_bigram(jnp.eye(3)), jnp.int32(0), 1, 2, EOS, jax.random.key(0), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": -1}, "beams = -1: expected at least 0"),
        ({"beams": 2, "sampling": True}, "beams and sampling exclude each other"),
        ({"temperature": 0.5}, "temperature = 0.5 has no effect without sampling"),
        ({"alpha": 0.5}, "alpha = 0.5 has no effect without beams"),
        ({"beams": 2, "seed": 3}, "seed = 3 has no effect without sampling"),
        ({"beams": 2, "manner": "theirs"}, "manner = 'theirs': expected one of"),
        ({"sampling": True, "top_p": 2.0}, r"top_p = 2.0: expected a number in \(0, 1\]"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**options)


def test_one_beam_in_their_manner_is_greedy_too():
    table = jnp.asarray(np.random.default_rng(3).normal(size=(9, 9)), jnp.float32)
    expected = greedy(_bigram(table), jnp.int32(0), 3, 6, EOS)
    found, _ = beam(_bigram(table), jnp.zeros((3,)), 3, 1, 6, EOS, manner="huggingface")
    np.testing.assert_array_equal(found[:, 0], expected)
    with pytest.raises(ValueError, match="manner = 'theirs': expected one of 'exact', 'hugg"):
        beam(_bigram(table), jnp.zeros((3,)), 3, 1, 6, EOS, manner="theirs")
