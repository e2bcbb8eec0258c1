"""Injection into linen models that know nothing of adapters: an MLP, a transformer, T5X's layer."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flix_jax.adapters import siblings, tables
from flix_jax.adapters.activation import activate
from flix_jax.adapters.dense import dense_inputs
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec, inject, matches
from flix_jax.adapters.modules import MERGED, LowRankDelta
from flix_jax.adapters.tree import from_named, join, named_leaves, split_adapters

SPACE = FeatureSpace(
    (
        FeatureType("task", ("ner", "qa", "topic"), rank=2, dropout=0.5),
        FeatureType("language", ("am", "sw"), rank=3, ranks={"am": 1}),
    )
)
IDS = np.array([[0, 1], [2, -1], [-1, -1], [1, 0]], np.int32)
WIDTH, LAYERS = 8, 2
X = jax.random.normal(jax.random.key(1), (4, 5, WIDTH))
TARGETS = ("attention", ".*/mlp")


class DenseGeneral(nn.Module):
    """Shaped as the dense layer of T5X: a kernel of two dimensions whatever the axes."""

    features: int | Sequence[int]
    axis: int | Sequence[int] = -1
    dtype: jnp.dtype | None = None  # the input's

    @nn.compact
    def __call__(self, inputs):
        dtype = self.dtype or inputs.dtype
        features = tuple(np.atleast_1d(self.features).tolist())
        axis = tuple(a % inputs.ndim for a in np.atleast_1d(self.axis).tolist())
        shape = tuple(inputs.shape[a] for a in axis)
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "joined_kv")),
            (int(np.prod(shape)), int(np.prod(features))),
        )
        kernel = kernel.astype(dtype).reshape(shape + features)
        contract = (axis, tuple(range(len(axis))))
        return jax.lax.dot_general(inputs.astype(dtype), kernel, (contract, ((), ())))


class Attention(nn.Module):
    """Two heads, with T5X's names and its dense layer."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (
            DenseGeneral((2, 4), name=name)(x) for name in ("query", "key", "value")
        )  # [batch, length, heads, width]
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return DenseGeneral(WIDTH, axis=(-2, -1), name="out")(out)


class Block(nn.Module):
    foreign: bool

    @nn.compact
    def __call__(self, x, _=None):
        if self.foreign:
            x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x, x)
        else:
            x = x + Attention(name="attention")(x)
        return x + nn.tanh(nn.Dense(WIDTH, name="mlp")(x)), None


class Net(nn.Module):
    layers: str = "loop"
    foreign: bool = False
    axis: int = 1

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if "remat" in self.layers else Block
        if "scan" in self.layers:
            stack = nn.scan(
                block,
                variable_axes={"params": self.axis},
                split_rngs={"params": True, "dropout": True},
                length=LAYERS,
                metadata_params={nn.meta.PARTITION_NAME: "layers"},
            )
            x, _ = stack(self.foreign, name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = block(self.foreign, name=f"layers_{i}")(x)
        return nn.Dense(3, name="head")(x)


def make(net, spec, x=X, ids=IDS, seed=0):
    """Parameters as after some training: every one random, B too."""

    def init():
        with inject(spec, activate(spec.space, ids)):
            return net.init(jax.random.key(0), x)["params"]

    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype),
        nn.meta.unbox(jax.eval_shape(init)),
    )


def run(net, spec, params, x=X, ids=IDS, rngs=None, **kwargs):
    @jax.jit
    def apply(params, x, ids):
        with inject(spec, activate(spec.space, ids), **kwargs):
            return net.apply({"params": params}, x, rngs=rngs)

    return apply(params, x, ids)


def stack(params, axis):
    layers = [params[f"layers_{i}"] for i in range(LAYERS)]
    rest = {k: v for k, v in params.items() if not k.startswith("layers_")}
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *layers)}


SPEC = AdapterSpec(SPACE, TARGETS, alpha=4.0)


@pytest.fixture(scope="module")
def loop_params():
    return make(Net(), SPEC)


@pytest.fixture(scope="module")
def loop_output(loop_params):
    return run(Net(), SPEC, loop_params)


@pytest.fixture(scope="module")
def initial():
    """What one compiled initialisation gives with and without the injection."""

    @jax.jit
    def init(rng):
        with inject(SPEC, activate(SPACE, IDS)):
            adapted = Net().init(rng, X)
        return nn.meta.unbox((adapted["params"], Net().init(rng, X)["params"]))

    return init(jax.random.key(0))


def test_parameters_stand_beside_the_kernel_and_the_base_is_unchanged(initial):
    adapted, plain = initial
    base, adapters = split_adapters(adapted)
    jax.tree.map(np.testing.assert_array_equal, base, plain)
    query = adapters["layers_1"]["attention"]["query"]["flix"]
    assert query["task"]["a"].shape == (3, WIDTH, 2)
    assert query["language"]["b"].shape == (2, 3, WIDTH)
    assert "head" not in adapters


def test_zero_b_is_the_base_bit_for_bit(initial):
    adapted, base = initial
    plain = jax.jit(lambda p, x: Net().apply({"params": p}, x))(base, X)
    assert np.any(adapted["layers_0"]["mlp"]["flix"]["task"]["a"])
    assert np.asarray(run(Net(), SPEC, adapted)).tobytes() == np.asarray(plain).tobytes()


def test_the_update_is_the_delta_of_the_layers_input():
    """One dense layer of each kind against x (A_f B_f) written out, kernels of any rank."""

    class One(nn.Module):
        kind: str

        @nn.compact
        def __call__(self, x):
            match self.kind:
                case "Dense":
                    return nn.Dense(6, name="layer")(x)
                case "split":
                    return nn.DenseGeneral((2, 3), name="layer")(x)
                case "merge":
                    return nn.DenseGeneral(6, axis=(-2, -1), name="layer")(x)
                case "middle":
                    return nn.DenseGeneral(6, axis=1, name="layer")(x)
                case "t5x":
                    return DenseGeneral(6, axis=(-2, -1), name="layer")(x)

    spec = AdapterSpec(SPACE, "layer", alpha=4.0)
    rng = np.random.default_rng(0)
    for kind, shape, axes in [
        ("Dense", (4, 5, 7), "nld,do->nlo"),
        ("Dense", (4, 7), "nd,do->no"),
        ("split", (4, 5, 7), "nld,do->nlo"),
        ("merge", (4, 5, 2, 3), "nlhd,hdo->nlo"),
        ("middle", (4, 5, 2), "ndl,do->nlo"),
        ("t5x", (4, 5, 2, 3), "nlhd,hdo->nlo"),
    ]:
        x = rng.normal(size=shape).astype(np.float32)
        params = make(One(kind), spec, x)
        plain = One(kind).apply({"params": split_adapters(params)[0]}, x)
        update = run(One(kind), spec, params, x) - plain
        for n, row in enumerate(IDS):
            matrix = sum(
                4.0 / rank * bank["a"][f, :, :rank] @ bank["b"][f, :rank]
                for t, f in zip(SPACE.types, row, strict=True)
                for bank, rank in [(params["layer"]["flix"][t.name], t.value_ranks[f])]
                if f >= 0
            )
            if np.ndim(matrix) == 0:
                assert not np.any(update[n])
                continue
            inner = tuple(shape[i] for i, c in enumerate(axes.split(",")[0]) if c in "hd")
            matrix = np.asarray(matrix).reshape(*inner, 6)
            expected = np.einsum(axes, x[n : n + 1], matrix).reshape(update[n].shape)
            np.testing.assert_allclose(update[n], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", ["remat", "scan", "scan and remat"])
def test_loop_scan_remat_and_both_agree(layers, loop_params, loop_output):
    params = loop_params
    if "scan" in layers:
        made = make(Net(layers), SPEC)
        params = stack(params, axis=1)
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(run(Net(layers), SPEC, params), loop_output, rtol=1e-5, atol=1e-5)


def test_gradients_of_loop_and_rematerialised_scan_agree(loop_params):
    params = loop_params

    def gradients(net, params):
        base, adapters = split_adapters(params)
        return jax.grad(lambda a: jnp.sum(run(net, SPEC, join(base, a)) ** 2))(adapters)

    looped = stack(gradients(Net(), params), axis=1)
    scanned = gradients(Net("scan and remat"), stack(params, axis=1))
    for mine, theirs in zip(jax.tree.leaves(scanned), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_flax_attention_scanned_on_its_first_axis():
    net = Net("scan", foreign=True, axis=0)
    params = make(net, SPEC)
    query = params["layers"]["attention"]["query"]
    assert query["kernel"].shape == (LAYERS, WIDTH, 2, 4)
    assert query["flix"]["task"]["a"].shape == (LAYERS, 3, WIDTH, 2)
    y = run(net, SPEC, params)
    plain = run(net, SPEC, params, ids=np.full_like(IDS, -1))
    changed = np.any(np.asarray(y != plain), axis=(1, 2))
    np.testing.assert_array_equal(changed, [True, True, False, True])


def test_a_layer_that_is_called_twice_shares_its_adapter():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(WIDTH, name="layer")
            return layer(layer(x))

    spec = AdapterSpec(SPACE, "layer")
    params = make(Tied(), spec)
    assert set(params) == {"layer"}
    assert np.any(run(Tied(), spec, params) != Tied().apply({"params": params}, X))


def test_layers_made_in_setup_are_adapted():
    class Net(nn.Module):
        def setup(self):
            self.layers = [nn.Dense(WIDTH) for _ in range(2)]

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    params = make(Net(), AdapterSpec(SPACE, r"layers_\d"))
    assert all("flix" in params[f"layers_{i}"] for i in range(2))


def test_convolutions_and_embeddings_are_no_dense_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(7, WIDTH, name="embed")(tokens)
            x = nn.Conv(WIDTH, (1,), name="conv")(x)
            return nn.Dense(3, name="dense")(x)

    spec = AdapterSpec(SPACE, ".*")
    report = matches(spec, Net().init, jax.random.key(0), jnp.zeros((4, 5), jnp.int32))
    assert [m.path for m in report.matched] == ["dense"]


def test_a_bfloat16_layer_gives_bfloat16():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(WIDTH, dtype=jnp.bfloat16, name="layer")(x)

    spec = AdapterSpec(SPACE, "layer")
    params = make(Net(), spec)
    assert params["layer"]["flix"]["task"]["a"].dtype == jnp.float32
    assert run(Net(), spec, params).dtype == jnp.bfloat16


def test_input_dropout_draws_from_the_dropout_rng_in_training_alone(loop_params, loop_output):
    spec = AdapterSpec(SPACE, TARGETS, alpha=4.0, dropout=0.5)
    np.testing.assert_array_equal(run(Net(), spec, loop_params), loop_output)

    @jax.jit
    def draw(params, rng):
        with inject(spec, activate(SPACE, IDS), deterministic=False):
            return Net("scan and remat").apply({"params": params}, X, rngs={"dropout": rng})

    stacked = stack(loop_params, axis=1)
    draws = [draw(stacked, jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.any(draws[0] != draws[2]) and np.any(draws[0] != loop_output)
    with pytest.raises(ValueError, match="layers_0/attention/query: dropout 0.5 .* needs"):
        run(Net(), spec, loop_params, deterministic=False)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (IDS[:1], "layers_0/attention/query: feature_ids are of 1 examples, expected 4"),
        (np.concatenate([IDS, IDS]), "are of 8 examples, expected 4"),
        (IDS[:, :1], r"shape \(4, 1\), expected \[..., 2\]"),
    ],
)
def test_ids_of_another_batch_are_an_error_at_trace(ids, says, loop_params):
    with pytest.raises(ValueError, match=says):
        with inject(SPEC, activate(SPACE, ids)):
            jax.eval_shape(lambda p: Net().apply({"params": p}, X), loop_params)


def test_a_target_that_matches_nothing_is_an_error_with_the_nearest_paths():
    for targets in ("layers/atention/query", ("attention", "layers/atention/query")):
        spec = AdapterSpec(SPACE, targets)
        says = r"'layers/atention/query' matches none of 6 dense layers; did you mean "
        with pytest.raises(ValueError, match=says + "'layers/attention/query'"):
            make(Net("scan"), spec)
        with pytest.raises(ValueError, match=says + "'layers/attention/query'"):
            matches(spec, Net("scan").init, jax.random.key(0), X)


def test_a_misspelt_named_target_is_told_the_name():
    with pytest.raises(ValueError, match="'atention' matches none.*did you mean 'attention'"):
        make(Net("scan"), AdapterSpec(SPACE, "atention"))


def test_an_injection_inside_another_is_an_error():
    active = activate(SPACE, IDS)
    with pytest.raises(ValueError, match="query: has a child 'flix' already"):
        with inject(SPEC, active), inject(SPEC, active):
            jax.eval_shape(lambda: Net().init(jax.random.key(0), X))
    # and both contexts are left behind
    plain = jax.eval_shape(lambda: Net().init(jax.random.key(0), X))["params"]
    assert not split_adapters(plain)[1]


def test_injections_one_after_the_other_do_not_know_each_other():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(WIDTH, name="layer")(x)

    other = FeatureSpace((FeatureType("domain", ("news", "web")),))
    net = Net()
    for space, ids in [(SPACE, IDS), (other, IDS[:, :1] * 0), (SPACE, IDS)]:
        params = make(net, AdapterSpec(space, "layer"), ids=ids)
        assert set(params["layer"]["flix"]) == set(space.names)


@pytest.mark.parametrize("layers", ["loop", "scan"])
def test_the_report_counts_layers_and_parameters(layers, loop_params):
    report = matches(SPEC, Net(layers).init, jax.random.key(0), X)
    assert sum(m.times for m in report.matched) == 5 * LAYERS
    assert {m.positions for m in report.matched} == {math.prod(X.shape[1:-1])}
    assert report.unmatched == ("head",)
    # task: 3 values of rank 2; language: 1 + 3
    assert report.parameters == 5 * LAYERS * (3 * 2 + 4) * 2 * WIDTH
    lines = report.table().splitlines()
    name = "layers_*/attention/query" if layers == "loop" else "layers/attention/query"
    assert any(re.fullmatch(rf"{re.escape(name)} +2 +8 +8 +320", line) for line in lines)
    assert lines[-1] == "not adapted: head"
    # Tracing twice gives the same report, from arrays or shapes.
    again = matches(
        SPEC, Net(layers).init, jax.random.key(0), jax.ShapeDtypeStruct(X.shape, X.dtype)
    )
    assert again == report


def siblings_of(net, spec=SPEC, x=X):
    with dense_inputs() as inputs:
        jax.eval_shape(lambda: net.init(jax.random.key(0), x))
    return siblings.find(spec.matching, inputs)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("layers", ["loop", "scan", "remat", "remat scan"])
def test_siblings_read_the_same_input(layers, foreign):
    names = ["layers"] if "scan" in layers else [f"layers_{i}" for i in range(LAYERS)]
    expected = [
        tuple(f"{name}/attention/{part}" for part in ("query", "key", "value")) for name in names
    ]
    assert list(siblings_of(Net(layers, foreign))) == expected
    # Of those that are adapted.
    only = dataclasses.replace(SPEC, targets=".*/(query|value)")
    assert siblings_of(Net(layers, foreign), only)[0] == (expected[0][0], expected[0][2])


def test_layers_that_read_several_inputs_have_no_siblings():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            one, other, third = (nn.Dense(WIDTH, name=name) for name in ("one", "other", "third"))
            return one(x) + other(x) + other(third(x) + 1)

    assert siblings_of(Twice(), dataclasses.replace(SPEC, targets=".*")) == ()


class Apart(nn.Module):
    """Two siblings, or two that read different inputs."""

    together: bool = True

    @nn.compact
    def __call__(self, x):
        read = x if self.together else x + 1
        return nn.Dense(WIDTH, name="one")(x) * nn.Dense(WIDTH, name="other")(read)


@pytest.mark.parametrize("of", ["all", "rows"])
def test_the_tables_of_siblings_are_refused_where_they_read_other_inputs(of):
    spec = dataclasses.replace(SPEC, targets=".*")
    made, base = as_tables(Apart(), spec, make(Apart(), spec), of)
    with pytest.raises(ValueError, match=r"^other: reads another input than one, other"):
        run(Apart(together=False), spec, join(base, made))


def as_tables(net, spec, params, of):
    """(tables with siblings together, the base) of a network's parameters."""
    base, banks = split_adapters(params)
    names = {"a": ("features", "embed", "rank"), "b": ("features", "rank", "mlp")}
    axes = from_named([(path, names[path[-1]]) for path, _ in named_leaves(banks)])
    groups = siblings_of(net, spec)
    if of == "all":
        made = tables.of_all(banks, axes, spec.space, groups)
    else:
        made = tables.of_rows(banks, axes, spec.space, jnp.asarray(IDS), siblings=groups)
    return made, base


@pytest.mark.parametrize(
    ("net", "of", "copies"),
    [
        (Net("remat"), "all", True),
        (Net("remat"), "rows", False),
        (Net(foreign=True), "rows", True),
        (Apart(), "all", False),
    ],
)
def test_tables_with_siblings_together_are_the_banks(net, of, copies):
    spec = dataclasses.replace(SPEC, targets=".*")
    params = make(net, spec)
    base, banks = split_adapters(params)

    def by_tables(banks):
        made, _ = as_tables(net, spec, join(base, banks), of)
        if copies:
            made = join(made, tables.as_copies(jax.lax.stop_gradient(made)))
        return run(net, spec, join(base, made), wide)

    def total(outputs):
        return jnp.sum(outputs * jnp.sin(jnp.arange(outputs.size)).reshape(outputs.shape))

    with jax.enable_x64(True):
        banks, base, wide = jax.tree.map(lambda x: x.astype(jnp.float64), (banks, base, X))
        one = jax.value_and_grad(lambda b: total(run(net, spec, join(base, b), wide)))(banks)
        other = jax.value_and_grad(lambda b: total(by_tables(b)))(banks)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), one, other)


@pytest.mark.parametrize("layers", ["remat", "remat scan"])
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(("rows", "copies"), [(1, True), (2, False), (4, False)])
def test_kernels_that_hold_the_update_are_the_banks(layers, foreign, rows, copies):
    """Values and all gradients, the base's too, of groups of rows with the same features."""
    net, spec = Net(layers, foreign, axis=0), dataclasses.replace(SPEC, targets=".*")
    base, banks = split_adapters(stack(make(Net(foreign=foreign), spec), 0))
    if "scan" not in layers:
        base, banks = split_adapters(make(net, spec))
    ids = np.repeat(IDS[: 4 // rows], rows, axis=0)
    at = {"a": ("features", "embed", "rank"), "b": ("features", "rank", "mlp")}

    def axes_of(path):
        return (*(["layers"] if "layers" in path else []), *at[path[-1]])

    axes = from_named([(path, axes_of(path)) for path, _ in named_leaves(banks)])
    weights = jnp.asarray(np.repeat([[0.5, 2.0]], 4, axis=0))
    asked = []

    @functools.partial(jax.jit, static_argnums=4)
    def total(base, banks, x, weights, merged):
        active = activate(spec.space, ids, weights, rows=rows if merged else 1)
        if merged:
            own = jnp.asarray(ids[::rows])
            banks = tables.of_rows(banks, axes, spec.space, own, name=MERGED)
            if copies:
                banks = join(banks, tables.as_copies(jax.lax.stop_gradient(banks)))
        with inject(spec, active), _listed(asked if merged else []):
            outputs = net.apply({"params": join(base, banks)}, x)
        return jnp.sum(outputs * jnp.sin(jnp.arange(outputs.size)).reshape(outputs.shape))

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (base, banks, X, weights))
        gradients = jax.value_and_grad(total, argnums=(0, 1, 2, 3))
        one, other = gradients(*wide, False), gradients(*wide, True)
    assert not asked  # no layer asked for an update beside its product
    (one, (*of_one, weights)), (other, (*of_other, of_first)) = one, other
    same = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    jax.tree.map(same, (one, of_one), (other, of_other))
    # Those of the weights, which are float32: a group has those of its first row.
    each = np.asarray(weights).reshape(-1, rows, 2).sum(axis=1)
    np.testing.assert_allclose(each, of_first[::rows], rtol=2e-6, atol=1e-6)


@contextlib.contextmanager
def _listed(found):
    """Lists the calls of `LowRankDelta`."""

    def interceptor(next_fun, args, kwargs, context):
        if isinstance(context.module, LowRankDelta) and context.method_name == "__call__":
            found.append(context.module.path)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield


def test_layers_whose_kernels_cannot_hold_the_update_add_it():
    """Dropout of the adapter's input, an integer kernel, an input contracted over other axes."""

    class Middle(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral(WIDTH, axis=1, name="middle")(x)

    spec = dataclasses.replace(SPEC, targets=".*", dropout=0.5)
    for net, deterministic in ((Middle(), True), (Apart(), False)):
        base, banks = split_adapters(make(net, spec))
        names = {"a": ("features", "embed", "rank"), "b": ("features", "rank", "mlp")}
        axes = from_named([(path, names[path[-1]]) for path, _ in named_leaves(banks)])
        made = tables.of_rows(banks, axes, spec.space, jnp.asarray(IDS), name=MERGED)
        found = [
            run(
                net,
                spec,
                join(base, of),
                rngs={"dropout": jax.random.key(3)},
                deterministic=deterministic,
            )
            for of in (banks, made)
        ]
        np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("encoder/layers_0/attention/query", {"all", "attention", "encoder"}),
        ("encoder/encoder/mlp/wi_0", {"all", "mlp", "encoder"}),
        ("decoder/layers_11/encoder_decoder_attention/out", {"all", "attention", "decoder"}),
        ("decoder/layers_0/self_attention/value", {"all", "attention", "decoder"}),
        ("decoder/layers_0/mlp/wo", {"all", "mlp", "decoder"}),
        ("decoder/logits_dense", set()),
        ("layers/MultiHeadDotProductAttention_0/key", {"all", "attention"}),
    ],
)
def test_what_the_named_targets_mean(path, names):
    spec = AdapterSpec(SPACE, ("all", "attention", "mlp", "encoder", "decoder"))
    assert set(spec.matching(path)) == names


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"targets": ()}, "targets is empty"),
        ({"targets": "layers_["}, "target 'layers_\\[' is not a regular expression"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_a_spec_checks_its_fields(fields, says):
    with pytest.raises(ValueError, match=says):
        AdapterSpec(SPACE, **fields)


def test_a_spec_is_hashable_and_equal_by_value():
    assert hash(AdapterSpec(SPACE, "all")) == hash(AdapterSpec(SPACE, ("all",)))
    assert AdapterSpec(SPACE, "all") == AdapterSpec(SPACE, ("all",))


def test_the_tutorial_runs():
    page = pathlib.Path(__file__).parents[1] / "docs" / "injection.md"
    text = page.read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    printed = []
    exec(compile(code, str(page), "exec"), {"print": lambda value: printed.append(str(value))})
    report = re.search(r"^    module(?:.*\n    )+.*\n", text, flags=re.MULTILINE)[0]
    assert [line.strip() for line in report.splitlines()] == [
        line.strip() for line in printed[0].splitlines()
    ]
