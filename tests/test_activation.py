"""Which features act: weights, feature dropout, shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flix_jax.adapters.activation import activate
from flix_jax.adapters.features import FeatureSpace, FeatureType

BATCH = 4000
SPREAD = 4 * 0.5 / BATCH**0.5  # four standard errors of a rate at its worst


def space(**options):
    return FeatureSpace(
        (
            FeatureType("task", ("ner", "qa"), dropout=0.5, dropouts={"qa": 0.2}),
            FeatureType("language", ("am", "sw", "yo"), dropout=0.3, slots=2),
        ),
        **options,
    )


def batch_of(row):
    return np.tile(np.asarray(row, np.int32), (BATCH, 1))


def test_without_dropout_present_features_weigh_one_and_absent_ones_nothing():
    active = activate(space(), np.array([[0, 2, -1], [-1, -1, -1]], np.int32))
    assert active.ids.dtype == jnp.int32 and active.weights.dtype == jnp.float32
    np.testing.assert_array_equal(active.weights, [[1, 1, 0], [0, 0, 0]])


def test_given_weights_are_used_and_those_of_absent_features_are_not():
    ids = np.array([[0, 2, -1]], np.int32)
    weights = np.array([[0.5, -2.0, 9.0]], np.float32)
    np.testing.assert_array_equal(activate(space(), ids, weights).weights, [[0.5, -2, 0]])


def test_each_value_is_dropped_at_its_rate_independently_of_the_other_type():
    ids = batch_of([0, 1, -1])
    weights = np.asarray(activate(space(), ids, dropout_rng=jax.random.key(0)).weights)
    kept = weights > 0
    assert set(np.unique(weights)) == {0.0, 1.0}
    assert abs(kept[:, 0].mean() - 0.5) < SPREAD
    assert abs(kept[:, 1].mean() - 0.7) < SPREAD
    assert not kept[:, 2].any()
    assert abs((kept[:, 0] & kept[:, 1]).mean() - 0.35) < SPREAD
    other = np.asarray(
        activate(space(), batch_of([1, 1, -1]), dropout_rng=jax.random.key(1)).weights
    )
    assert abs((other[:, 0] > 0).mean() - 0.8) < SPREAD


def test_dropout_is_a_function_of_the_key():
    ids = batch_of([0, 1, 2])
    draws = [activate(space(), ids, dropout_rng=jax.random.key(k)).weights for k in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_a_type_of_several_slots_is_dropped_whole():
    weights = np.asarray(
        activate(space(), batch_of([0, 1, 2]), dropout_rng=jax.random.key(2)).weights
    )
    np.testing.assert_array_equal(weights[:, 1], weights[:, 2])


def test_rescaling_keeps_the_mean():
    active = activate(space(rescale=True), batch_of([0, 1, -1]), dropout_rng=jax.random.key(3))
    np.testing.assert_allclose(np.asarray(active.weights).mean(0), [1, 1, 0], atol=4 / BATCH**0.5)
    assert float(active.weights[:, 0].max()) == 2.0


def test_keep_one_leaves_no_example_bare_and_chooses_fairly():
    ids = batch_of([0, 1, -1])
    ids[0] = -1
    plain = np.asarray(activate(space(), ids, dropout_rng=jax.random.key(4)).weights)
    kept = np.asarray(activate(space(keep_one=True), ids, dropout_rng=jax.random.key(4)).weights)
    bare = (plain == 0).all(axis=1)
    np.testing.assert_array_equal(plain[~bare], kept[~bare])
    assert (kept[1:] > 0).any(axis=1).all()
    assert not kept[0].any()
    rescued = kept[1:][bare[1:]]
    assert ((rescued > 0).sum(axis=1) == 1).all()
    assert abs((rescued[:, 0] > 0).mean() - 0.5) < 4 * 0.5 / len(rescued) ** 0.5


def test_ids_out_of_range_are_an_error_on_the_host_and_nan_under_jit():
    with pytest.raises(ValueError, match=r"row 0, slot 0 \(task\): id 2"):
        activate(space(), np.array([[2, 0, 0]], np.int32))
    weights = jax.jit(lambda ids: activate(space(), ids).weights)(jnp.array([[2, 0, -3]]))
    np.testing.assert_array_equal(weights, [[np.nan, 1, np.nan]])


@pytest.mark.parametrize(
    ("ids", "weights", "says"),
    [
        (np.zeros((2, 2), np.int32), None, r"\(2, 2\), expected"),
        (jnp.zeros((3,), jnp.int32), None, r"\(3,\), expected \[batch, 3\]"),
        (jnp.zeros((2, 3)), None, "dtype float32, expected integers"),
        (jnp.zeros((2, 3), jnp.int32), np.ones((1, 3)), r"\(1, 3\), expected \(2, 3\)"),
    ],
)
def test_shapes_and_dtypes_are_checked(ids, weights, says):
    with pytest.raises(ValueError, match=says):
        activate(space(), ids, weights)
