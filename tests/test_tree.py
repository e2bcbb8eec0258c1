"""Trees of parameters: split, join, count, fold, logical axes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from flix_jax.adapters.activation import activate
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec, inject
from flix_jax.adapters.tree import (
    adapter_counts,
    adapter_logical_axes,
    count_parameters,
    fold,
    join,
    split_adapters,
    split_by_pattern,
)

SPACE = FeatureSpace(
    (
        FeatureType("task", ("ner", "qa"), rank=2),
        FeatureType("language", ("am", "sw", "yo"), rank=3, ranks={"sw": 1}, slots=2),
    )
)
SPEC = AdapterSpec(SPACE, (".*/(query|out)", ".*/wi"), alpha=6.0)
WIDTH, LAYERS, BATCH = 4, 2, 3
X = np.random.default_rng(0).normal(size=(BATCH, 5, WIDTH)).astype(np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.DenseGeneral((2, 3), name="query")(x)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(nn.tanh(h))
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return x + nn.tanh(nn.Dense(WIDTH, kernel_init=kernel, name="wi")(x)), None


class Net(nn.Module):
    axis: int | None = None

    @nn.compact
    def __call__(self, x):
        if self.axis is None:
            for i in range(LAYERS):
                x, _ = Block(name=f"layers_{i}")(x)
            return x
        stack = nn.scan(
            Block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.meta.PARTITION_NAME: "layers"},
        )
        return stack(name="layers")(x, None)[0]


def boxed_shapes(net):
    def init():
        with inject(SPEC, activate(SPACE, np.full((BATCH, 3), -1, np.int32))):
            return net.init(jax.random.key(0), X)["params"]

    return jax.eval_shape(init)


def boxed_params(net):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), boxed_shapes(net)
    )


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


TREE = {
    "mlp": {"wi": {"kernel": np.ones((2, 3)), "flix": {"task": {"a": np.ones((2, 2, 1))}}}},
    "norm": {"scale": np.ones(2), "bias": np.ones(2)},
}


def test_split_and_join():
    base, adapters = split_adapters(TREE)
    assert shapes(base) == {
        "mlp": {"wi": {"kernel": (2, 3)}},
        "norm": {"scale": (2,), "bias": (2,)},
    }
    assert shapes(adapters) == {"mlp": {"wi": {"flix": {"task": {"a": (2, 2, 1)}}}}}
    assert shapes(join(base, adapters)) == shapes(TREE) == shapes(join(adapters, base))
    assert split_adapters(base) == (base, {})
    assert join({}, {}) == {}


def test_join_refuses_a_parameter_of_both():
    with pytest.raises(ValueError, match="^norm/scale: a parameter of both trees"):
        join(TREE, {"norm": {"scale": np.ones(2)}})
    with pytest.raises(ValueError, match="^norm: a parameter of both"):
        join(TREE, {"norm": np.ones(2)})


def test_split_by_pattern():
    trained, frozen = split_by_pattern(TREE, (".*/bias", ".*/flix/.*"))
    assert shapes(trained) == {
        "mlp": {"wi": {"flix": {"task": {"a": (2, 2, 1)}}}},
        "norm": {"bias": (2,)},
    }
    assert shapes(join(trained, frozen)) == shapes(TREE)
    assert split_by_pattern(TREE, ".*")[1] == {}
    with pytest.raises(
        ValueError, match="'norm/scal' matches none of 4.*did you mean 'norm/scale'"
    ):
        split_by_pattern(TREE, (".*/bias", "norm/scal"))
    with pytest.raises(ValueError, match="'norm\\[' is no regular expression"):
        split_by_pattern(TREE, "norm[")


def test_counts_per_type_and_value_leave_out_columns_beyond_the_rank():
    assert count_parameters(TREE) == 6 + 4 + 4
    for axis in (None, 1):
        tree = boxed_shapes(Net(axis))
        _, adapters = split_adapters(tree)
        per_rank = LAYERS * ((WIDTH + 6) + (6 + WIDTH) + 2 * WIDTH)
        assert adapter_counts(adapters, SPACE) == {
            "task": {"ner": 2 * per_rank, "qa": 2 * per_rank},
            "language": {"am": 3 * per_rank, "sw": per_rank, "yo": 3 * per_rank},
        }
        assert count_parameters(adapters) == (4 + 9) * per_rank


def test_counts_of_another_space_are_an_error():
    _, adapters = split_adapters(boxed_shapes(Net()))
    other = FeatureSpace((FeatureType("task", tuple("abcdefg"), rank=11), SPACE.types[1]))
    with pytest.raises(ValueError, match="flix/task/a: shape .* expected 7 values of rank 11"):
        adapter_counts(adapters, other)
    with pytest.raises(ValueError, match="no type 'language'"):
        adapter_counts(adapters, FeatureSpace(SPACE.types[:1]))


FEATURES = {"task": "qa", "language": ("sw", "yo"), "cell": "ignored"}
WEIGHTED = {"task": {"qa": 0.5, "ner": -1.5}, "language": {"sw": 0.7, "yo": 2.0, "am": 0.3}}


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("features", [FEATURES, WEIGHTED])
def test_folded_equals_unfolded(features, axis):
    net = Net(axis)
    boxed = boxed_params(net)
    base, adapters = split_adapters(boxed)
    folded = fold(base, adapters, SPEC, features, layers_axis=axis or 0)
    assert jax.tree.structure(folded) == jax.tree.structure(base)  # boxes are kept
    space = SPACE.room_for([features])
    spec = dataclasses.replace(SPEC, space=space)
    ids, weights = (np.tile(one, (BATCH, 1)) for one in space.encode_weighted(features))

    @jax.jit
    def both(params, folded):
        with inject(spec, activate(space, ids, weights)):
            adapted = net.apply({"params": params}, X)
        return adapted, net.apply({"params": folded}, X), net.apply({"params": base}, X)

    adapted, merged, plain = both(nn.meta.unbox(boxed), nn.meta.unbox(folded))
    error = np.abs(adapted - merged).max() / np.abs(adapted).max()
    assert error < 1e-5
    assert np.abs(adapted - plain).max() > 0.1


def test_fold_keeps_the_dtype_of_the_base_and_the_order_of_its_parameters():
    base, adapters = split_adapters(nn.meta.unbox(boxed_params(Net())))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    folded = fold(half, adapters, SPEC, {"task": "qa"})
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {np.dtype(jnp.bfloat16)}
    assert list(folded["layers_0"]["wi"]) == list(base["layers_0"]["wi"])


def test_fold_refuses_what_would_fold_nothing_or_the_wrong_thing():
    base, adapters = split_adapters(nn.meta.unbox(boxed_params(Net())))
    with pytest.raises(ValueError, match="none of {'task': 'qo'} is a known feature"):
        fold(base, adapters, SPEC, {"task": "qo"})
    lacking = {"layers_0": base["layers_0"]}
    with pytest.raises(ValueError, match=r"layers_1/\w+ is adapted but has no kernel"):
        fold(lacking, adapters, SPEC, FEATURES)
    base, adapters = split_adapters(nn.meta.unbox(boxed_params(Net(1))))
    with pytest.raises(
        ValueError, match=r"layers/\w+: bank .* values, expected .*layers_axis is 0"
    ):
        fold(base, adapters, SPEC, FEATURES, layers_axis=0)


@pytest.mark.parametrize(
    ("axis", "a", "b"),
    [
        (None, ("features", "embed", "rank"), ("features", "rank", "mlp")),
        (0, ("layers", "features", "embed", "rank"), ("layers", "features", "rank", "mlp")),
        (1, ("features", "layers", "embed", "rank"), ("features", "layers", "rank", "mlp")),
    ],
)
def test_logical_axes_follow_those_of_the_kernel(axis, a, b):
    boxed = boxed_shapes(Net(axis))
    base, adapters = split_adapters(boxed)
    axes = adapter_logical_axes(adapters, nn.get_partition_spec(base))
    layer = axes["layers_1" if axis is None else "layers"]
    assert layer["wi"]["flix"]["task"] == {"a": a, "b": b}
    # Kernels without names leave the width unnamed; ranks agree everywhere.
    nameless = layer["query"]["flix"]["language"]
    assert nameless["a"][-1] == "rank" and nameless["a"][-2] is None and nameless["b"][-1] is None
    jax.tree.map(lambda leaf, names: len(leaf.shape) == len(names) or 1 / 0, adapters, axes)


def test_logical_axes_need_the_kernel_of_every_adapter():
    with pytest.raises(ValueError, match="mlp/wi: adapted, but its kernel has no entry"):
        adapter_logical_axes(split_adapters(TREE)[1], {"norm": {"scale": PartitionSpec("embed")}})
