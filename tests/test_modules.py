"""The linen module: names, shapes and initial values of the banks, dropout on the input."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flix_jax.adapters.activation import activate
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.modules import LowRankDelta

SPACE = FeatureSpace(
    (
        FeatureType("task", ("ner", "qa"), rank=3),
        FeatureType("language", tuple(f"l{i}" for i in range(40)), rank=4, ranks={"l0": 1}),
    )
)
IDS = np.array([[0, 0], [1, 39]], np.int32)
X = jax.random.normal(jax.random.key(1), (2, 3, 64))


@pytest.fixture(scope="module")
def params():
    return LowRankDelta(SPACE).init(jax.random.key(0), X, 5, activate(SPACE, IDS))["params"]


def with_b(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.1 if path[-1].key == "b" else leaf, params
    )


def test_names_shapes_and_dtypes(params):
    shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), params)
    assert shapes == {
        "task": {"a": ((2, 64, 3), "float32"), "b": ((2, 3, 5), "float32")},
        "language": {"a": ((40, 64, 4), "float32"), "b": ((40, 4, 5), "float32")},
    }


def test_a_is_normal_with_variance_one_over_d_in_and_b_is_zero(params):
    a = np.asarray(params["language"]["a"])
    assert abs(a[1:].mean()) < 4 / 8 / a[1:].size ** 0.5
    assert abs(a[1:].std() * 8 - 1) < 0.03
    assert not np.any(params["task"]["b"]) and not np.any(params["language"]["b"])


def test_columns_beyond_the_rank_of_a_value_start_at_zero(params):
    a = params["language"]["a"]
    assert not np.any(a[0, :, 1:])
    assert np.all(a[0, :, 0]) and np.all(a[1:])


def test_the_update_is_in_the_dtype_of_the_input(params):
    active = activate(SPACE, IDS)
    y = LowRankDelta(SPACE).apply({"params": params}, X.astype(jnp.bfloat16), 5, active)
    assert y.shape == (2, 3, 5) and y.dtype == jnp.bfloat16


def test_dropout_on_the_input_keeps_the_mean_and_needs_its_rng(params):
    active, module = activate(SPACE, IDS), LowRankDelta(SPACE, dropout=0.25)
    variables = {"params": with_b(params)}
    plain = module.apply(variables, X, 5, active)
    draw = jax.vmap(
        lambda key: module.apply(
            variables, X, 5, active, deterministic=False, rngs={"dropout": key}
        )
    )(jax.random.split(jax.random.key(2), 2000))
    spread = draw.std(axis=0) / 2000**0.5
    assert np.all(np.abs(draw.mean(axis=0) - plain) < 6 * spread + 1e-6)
    assert np.all(spread > 0)
    with pytest.raises(ValueError, match="dropout 0.25 on the adapter's input needs"):
        module.apply(variables, X, 5, active, deterministic=False)


def test_a_batch_of_another_size_is_an_error(params):
    with pytest.raises(ValueError, match="are of 1 examples, expected 2"):
        LowRankDelta(SPACE).apply({"params": params}, X, 5, activate(SPACE, IDS[:1]))


def test_a_type_without_values_cannot_make_parameters():
    space = FeatureSpace((FeatureType("task"),))
    with pytest.raises(ValueError, match="'task': its values are not known yet"):
        active = activate(SPACE, IDS).replace(ids=jnp.zeros((2, 1), jnp.int32))
        LowRankDelta(space).init(jax.random.key(0), X, 5, active)


def test_it_is_a_module_like_any_other(params):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, active):
            return nn.Dense(5)(x) + LowRankDelta(SPACE, name="delta")(x, 5, active)

    made = Net().init(jax.random.key(0), X, activate(SPACE, IDS))["params"]
    assert set(made) == {"Dense_0", "delta"}
