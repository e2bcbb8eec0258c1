"""The delta and its gradients against a loop over examples in NumPy."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flix_jax.adapters import tables
from flix_jax.adapters.activation import ActiveFeatures
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.low_rank import Table, delta
from flix_jax.adapters.modules import ALL, ROWS

TASK = FeatureType("task", ("a", "b", "c"), rank=2)
LANGUAGE = FeatureType("language", ("x", "y", "z", "w"), rank=3, ranks={"y": 1, "w": 2})
PAIR = FeatureType("pair", ("p", "q", "r"), rank=1, slots=2)
SHARED = FeatureType("shared", ("shared",), rank=4)
WIDE = FeatureType("wide", ("u", "v"), rank=20)

# Few configurations, each compiled once; hypothesis varies what is inside them.
CONFIGURATIONS = [
    # space, batch, positions, d_in, d_out, alpha
    (FeatureSpace((TASK,)), 1, (), 3, 2, None),
    (FeatureSpace((TASK, LANGUAGE)), 4, (5,), 6, 4, None),
    (FeatureSpace((LANGUAGE, PAIR)), 3, (2, 2), 1, 5, 8.0),
    (FeatureSpace((SHARED,)), 3, (4,), 5, 3, 2.0),
    (FeatureSpace((PAIR, SHARED, LANGUAGE)), 2, (1,), 4, 1, 1.0),
    (FeatureSpace((WIDE,)), 2, (3,), 2, 4, None),
]


def reference(space, alpha, x, banks, ids, weights, g):
    """y, twice, and the gradients of Σ y·g by x, banks and weights, one example at a time."""
    y = np.zeros((*x.shape[:-1], g.shape[-1]))
    dx, dweights = np.zeros(x.shape), np.zeros(weights.shape)
    dbanks = {k: (np.zeros(a.shape), np.zeros(b.shape)) for k, (a, b) in banks.items()}
    for n in range(x.shape[0]):
        for slot, t in enumerate(space.slot_types):
            f = ids[n, slot]
            if f < 0:
                continue
            rank = t.ranks.get(t.values[f], t.rank)
            s = 1.0 if alpha is None else alpha / rank
            a, b = banks[t.name][0][f][:, :rank], banks[t.name][1][f][:rank]
            rows, out = x[n].reshape(-1, x.shape[-1]), g[n].reshape(-1, g.shape[-1])
            w = weights[n, slot]
            y[n] += (w * s * (rows @ a @ b)).reshape(y[n].shape)
            dx[n] += (w * s * (out @ b.T @ a.T)).reshape(x[n].shape)
            dbanks[t.name][0][f][:, :rank] += w * s * rows.T @ (out @ b.T)
            dbanks[t.name][1][f][:rank] += w * s * (rows @ a).T @ out
            dweights[n, slot] += s * np.sum((rows @ a @ b) * out)
    return y, y, dx, dbanks, dweights


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(space, alpha, x, banks, ids, weights, g):
    def value(x, banks, weights):
        return delta(x, banks, ActiveFeatures(ids, weights), space, alpha=alpha)

    y, pull = jax.vjp(value, x, banks, weights)
    # Without gradients another formulation computes the value.
    return (value(x, banks, weights), y, *pull(g))


def example(configuration, ids, seed, dtype):
    space, batch, positions, d_in, d_out, alpha = configuration
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    banks = {
        t.name: (normal(t.num_values, d_in, t.max_rank), normal(t.num_values, t.max_rank, d_out))
        for t in space.types
    }
    weights = np.where(ids < 0, 0, normal(*ids.shape)).astype(dtype)
    x, g = normal(batch, *positions, d_in), normal(batch, *positions, d_out)
    return space, alpha, x, banks, ids, weights, g


NUM_VALUES = [[t.num_values for t in c[0].slot_types] for c in CONFIGURATIONS]


@st.composite
def examples(draw):
    """A configuration, ids of its batch, and a seed for the numbers."""
    number = draw(st.integers(0, len(CONFIGURATIONS) - 1))
    row = st.tuples(*(st.integers(-1, n - 1) for n in NUM_VALUES[number]))
    batch = CONFIGURATIONS[number][1]
    return number, draw(st.lists(row, min_size=batch, max_size=batch)), draw(st.integers(0, 2**31))


def assert_close(actual, expected, tolerance):
    for mine, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(examples())
def test_value_and_gradients_equal_the_loop_in_float64(drawn):
    number, ids, seed = drawn
    arguments = example(CONFIGURATIONS[number], np.asarray(ids, np.int32), seed, np.float64)
    with jax.enable_x64(True):
        actual = value_and_gradients(*arguments)
        assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {np.dtype(np.float64)}
        assert_close(actual, reference(*arguments), 1e-10)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(examples())
def test_value_and_gradients_equal_the_loop_in_float32(drawn):
    number, ids, seed = drawn
    arguments = example(CONFIGURATIONS[number], np.asarray(ids, np.int32), seed, np.float32)
    # The reference in float64 on the same numbers; relative to the size of the sums.
    wide = jax.tree.map(lambda v: v.astype(np.float64), arguments[2:4])
    expected = reference(*arguments[:2], *wide, arguments[4], *arguments[5:])
    for mine, theirs in zip(
        jax.tree.leaves(value_and_gradients(*arguments)), jax.tree.leaves(expected), strict=True
    ):
        assert np.max(np.abs(mine - theirs)) <= 1e-5 * max(1.0, np.max(np.abs(theirs)))


CONFIGURATION = CONFIGURATIONS[1]
IDS = np.array([[0, 1], [2, -1], [-1, -1], [0, 3]], np.int32)


def test_only_active_features_get_gradient():
    arguments = example(CONFIGURATION, IDS, 0, np.float32)
    _, _, _, banks, _ = value_and_gradients(*arguments)
    for name, active in {"task": {0, 2}, "language": {1, 3}}.items():
        for matrix in banks[name]:
            touched = {v for v in range(matrix.shape[0]) if np.any(matrix[v])}
            assert touched == active


def test_an_absent_and_a_dropped_feature_add_exactly_nothing():
    space, alpha, x, banks, ids, weights, g = example(CONFIGURATION, IDS, 1, np.float32)
    weights = weights.copy()
    weights[0, 1] = 0.0
    y, _, dx, dbanks, _ = value_and_gradients(space, alpha, x, banks, ids, weights, g)
    assert not np.any(y[2]) and not np.any(dx[2])
    assert not np.any(dbanks["language"][0][1])
    alone = ids.copy()
    alone[0, 1] = -1
    again = value_and_gradients(space, alpha, x, banks, alone, weights, g)
    np.testing.assert_array_equal(y, again[0])


def test_columns_beyond_the_rank_of_a_value_neither_act_nor_learn():
    space, alpha, x, banks, _, weights, g = example(CONFIGURATION, IDS, 2, np.float32)
    ids = np.full((4, 2), 1, np.int32)
    weights = np.ones((4, 2), np.float32)
    y, _, _, dbanks, _ = value_and_gradients(space, alpha, x, banks, ids, weights, g)
    assert not np.any(dbanks["language"][0][1, :, 1:]) and not np.any(dbanks["language"][1][1, 1:])
    a, b = (m.copy() for m in banks["language"])
    a[1, :, 1:], b[1, 1:] = 7.0, 7.0
    changed = {**banks, "language": (a, b)}
    again = value_and_gradients(space, alpha, x, changed, ids, weights, g)[0]
    np.testing.assert_array_equal(y, again)


@pytest.mark.parametrize("num_values", [1, 5])
def test_one_feature_is_the_lora_formula(num_values):
    """W x + (alpha / r) B A x: one value without a gather and one value of several with it."""
    values = tuple(f"v{i}" for i in range(num_values))
    space = FeatureSpace((FeatureType("shared", values, rank=4),))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 7, 6)).astype(np.float32)
    a = rng.normal(size=(num_values, 6, 4)).astype(np.float32)
    b = rng.normal(size=(num_values, 4, 5)).astype(np.float32)
    at = num_values - 1
    active = ActiveFeatures(jnp.full((3, 1), at), jnp.ones((3, 1)))
    y = delta(
        jnp.asarray(x), {"shared": (jnp.asarray(a), jnp.asarray(b))}, active, space, alpha=16.0
    )
    np.testing.assert_allclose(y, 4.0 * (x @ a[at] @ b[at]), rtol=1e-5, atol=1e-4)


def test_bfloat16_inputs_give_bfloat16_and_float32_gradients_of_the_banks():
    space, alpha, x, banks, ids, weights, g = example(CONFIGURATION, IDS, 3, np.float32)
    y, _, dx, dbanks, _ = value_and_gradients(
        space, alpha, x.astype(jnp.bfloat16), banks, ids, weights, g.astype(jnp.bfloat16)
    )
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(dbanks)} == {np.dtype(np.float32)}
    wide = reference(space, alpha, x, banks, ids, weights, g)
    np.testing.assert_allclose(y.astype(np.float32), wide[0], atol=0.03 * np.abs(wide[0]).max())


def test_the_gradient_needs_no_scatter():
    arguments = example(CONFIGURATION, IDS, 0, np.float32)
    text = value_and_gradients.lower(*arguments).as_text()
    assert "stablehlo.dot_general" in text
    assert "scatter" not in text


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (np.zeros((1, 2), np.int32), r"are of 1 examples, expected 4"),
        (np.zeros((8, 2), np.int32), r"are of 8 examples, expected 4"),
        (np.zeros((4, 1), np.int32), r"\(4, 1\), expected \[batch, 2\]"),
        (np.zeros((4, 3, 2), np.int32), r"segments have shape None, expected \(4, 5\)"),
    ],
)
def test_ids_of_another_batch_are_an_error_and_never_broadcast(ids, says):
    space, alpha, x, banks, _, _, g = example(CONFIGURATION, IDS, 0, np.float32)
    with pytest.raises(ValueError, match=says):
        value_and_gradients(space, alpha, x, banks, ids, np.ones(ids.shape, np.float32), g)


def test_banks_of_another_space_are_an_error():
    space, alpha, x, banks, ids, weights, g = example(CONFIGURATION, IDS, 0, np.float32)
    short = {**banks, "task": (banks["task"][0][:2], banks["task"][1])}
    with pytest.raises(ValueError, match=r"bank 'task' has a \(2, 6, 2\).*expected a \(3, 6, 2\)"):
        value_and_gradients(space, alpha, x, short, ids, weights, g)


# Packed rows, whose examples have features of their own.

PACKED = FeatureSpace((PAIR, SHARED, LANGUAGE))
AXES = {"a": ("features", "in", "rank"), "b": ("features", "rank", "out")}


@functools.partial(jax.jit, static_argnums=0)
def packed_value_and_gradients(route, x, banks, ids, weights, segments, g):
    def value(x, banks, weights):
        named = {name: dict(zip("ab", bank, strict=True)) for name, bank in banks.items()}
        axes = {"flix": dict.fromkeys(banks, AXES)}
        if route == "all":
            made = tables.of_all({"flix": named}, axes, PACKED)["flix"][ALL]
        elif route == "rows":
            made = tables.of_rows({"flix": named}, axes, PACKED, ids)["flix"][ROWS]
        used = banks if route == "banks" else Table(made["a"], made["b"])
        return delta(x, used, ActiveFeatures(ids, weights, segments=segments), PACKED, alpha=2.0)

    y, pull = jax.vjp(value, x, banks, weights)
    return (value(x, banks, weights), y, *pull(g))


@pytest.mark.parametrize("route", ["banks", "all", "rows"])
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.integers(0, 2**31))
def test_examples_of_a_packed_row_are_those_of_rows_of_their_own(route, seed):
    batch, positions, examples, d_in, d_out = 3, 7, 3, 4, 3
    rng = np.random.default_rng(seed)
    segments = rng.integers(0, examples + 1, (batch, positions)).astype(np.int32)
    counts = [t.num_values for t in PACKED.slot_types]
    ids = rng.integers(-1, counts, (batch * examples, len(counts))).astype(np.int32)
    configuration = PACKED, batch * examples, (positions,), d_in, d_out, 2.0
    _, alpha, x, banks, _, weights, g = example(configuration, ids, seed, np.float64)
    # The examples in rows of their own; all of a row's are added up to it.
    own = segments[:, None] == np.arange(1, examples + 1)[:, None]
    own = own.reshape(-1, positions, 1)
    x, g = (np.repeat(of[:batch], examples, axis=0) for of in (x, g))
    together = reference(PACKED, alpha, x * own, banks, ids, weights, g * own)
    y, _, dx, dbanks, dweights = together
    y, dx = (of.reshape(batch, examples, *of.shape[1:]).sum(axis=1) for of in (y, dx))
    with jax.enable_x64(True):
        found = packed_value_and_gradients(
            route,
            x[::examples],
            banks,
            ids.reshape(batch, examples, -1),
            weights.reshape(batch, examples, -1),
            segments,
            g[::examples],
        )
        expected = (y, y, dx, dbanks, dweights.reshape(batch, examples, -1))
        assert_close(found, expected, 1e-10)


def test_segments_of_other_positions_are_refused():
    ids = np.zeros((2, 3, PACKED.num_slots), np.int32)
    _, _, x, banks, *_ = example((PACKED, 2, (5,), 4, 3, None), ids[:, 0], 0, np.float32)
    x, banks = jax.tree.map(jnp.asarray, (x, banks))
    for segments in (None, np.ones((2, 4), np.int32)):
        active = ActiveFeatures(ids, np.ones(ids.shape, np.float32), segments=segments)
        shape = None if segments is None else segments.shape
        with pytest.raises(
            ValueError, match=re.escape(f"segments have shape {shape}, expected (2, 5)")
        ):
            delta(x, banks, active, PACKED)
