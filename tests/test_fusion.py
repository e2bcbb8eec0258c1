"""Every fusion function and its gradients against a loop over examples in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flix_jax.adapters import fusion, low_rank
from flix_jax.adapters.activation import ActiveFeatures, FeatureSettings
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.fusion import FUNCTIONS, Fusion
from flix_jax.adapters.modules import LowRankDelta

TASK = FeatureType("task", ("a", "b"), rank=2)
LANGUAGE = FeatureType("language", ("x", "y", "z"), rank=3, ranks={"y": 1}, slots=2)
SHARED = FeatureType("shared", ("shared",), rank=2)
SPACE = FeatureSpace((TASK, SHARED, LANGUAGE))
ALPHA, D_IN, D_OUT, LENGTH = 4.0, 3, 2, 5
IDS = np.asarray([[0, 0, 2, 1], [1, 0, 1, -1], [-1, 0, 0, 0], [0, -1, -1, -1]], np.int32)
TARGET_LENGTHS, SOURCE_LENGTHS = (5, 3, 4, 5), (3, 4, 0, 2)


def attention(queries, keys, matrices, rank):
    """One head, a query at a time; keys are already those that may be seen."""
    out = np.zeros_like(queries)
    for i, q in enumerate(queries):
        logits = (q @ matrices["query"]) @ (keys @ matrices["key"]).T / np.sqrt(rank)
        weights = np.exp(logits - logits.max())
        out[i] = (weights / weights.sum()) @ (keys @ matrices["value"])
    return out


def phi(function, s, t, matrices, rank):
    """φ of one feature and one example [positions, r]; positions without a source token are t."""
    relu = functools.partial(np.maximum, 0)
    if function == "cross_attention_from_target":
        return t + attention(t, s, matrices, rank) if len(s) else t
    n = min(len(s), len(t))
    beside, rest = s[:n], t[n:]
    if function == "add":
        fused = beside + t[:n]
    elif function == "mul":
        fused = beside * t[:n]
    elif function == "add_relu":
        fused = relu(beside) + relu(t[:n])
    else:
        fused = attention(beside, t, matrices, rank)
    return np.concatenate([fused, rest])


def reference(function, params, x, source, weights, target_lengths, source_lengths):
    """Σ_f c_f B_f φ(A_f x_s, A_f x_t) at the real positions of the target; 0 at its padding."""
    y = np.zeros((*x.shape[:2], D_OUT))
    for n in range(len(x)):
        xt, xs = x[n, : target_lengths[n]], source[n, : source_lengths[n]]
        for slot, of in enumerate(SPACE.slot_types):
            f = IDS[n, slot]
            if f < 0:
                continue
            r = of.ranks.get(of.values[f], of.rank)
            own = params[of.name]
            a, b = own["a"][f][:, :r], own["b"][f][:r]
            matrices = {k: own[k][f][:r, :r] for k in fusion.MATRICES if k in own}
            h = phi(function, xs @ a, xt @ a, matrices, r)
            y[n, : target_lengths[n]] += weights[n, slot] * ALPHA / r * (h @ b)
    return y


def arrays(function, seed=0, source_length=4):
    rng = np.random.default_rng(seed)
    module = module_of(function)
    shapes = jax.eval_shape(
        lambda: module.init(
            jax.random.key(0),
            jnp.zeros((4, LENGTH, D_IN)),
            D_OUT,
            ActiveFeatures(jnp.asarray(IDS), jnp.ones(IDS.shape)),
        )
    )["params"]
    params = jax.tree.map(lambda s: rng.normal(size=s.shape), shapes)
    for of in SPACE.types:  # zero beyond a value's rank, as they are made
        for value, rank in enumerate(of.value_ranks):
            params[of.name]["a"][value][:, rank:] = 0
            for name in fusion.MATRICES:
                if name in params[of.name]:
                    params[of.name][name][value][rank:] = 0
                    params[of.name][name][value][:, rank:] = 0
    x, source = rng.normal(size=(4, LENGTH, D_IN)), rng.normal(size=(4, source_length, D_IN))
    weights = np.where(IDS < 0, 0.0, rng.uniform(0.5, 1.5, IDS.shape))
    return params, x, source, weights


def single(tree):
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), tree)


def module_of(function):
    return LowRankDelta(SPACE, ALPHA, function=function)


def real(lengths, size):
    return jnp.arange(size)[None] < jnp.asarray(lengths)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def ours(function, params, x, source, weights):
    """The update at the real positions of the target."""
    target = real(TARGET_LENGTHS, x.shape[1])
    tokens = real(np.minimum(SOURCE_LENGTHS, source.shape[1]), source.shape[1])
    y = module_of(function).apply(
        {"params": params},
        x,
        D_OUT,
        ActiveFeatures(jnp.asarray(IDS), weights),
        source=source,
        alignment=fusion.align(function, target, tokens),
    )
    return jnp.where(target[:, :, None], y, 0.0)


@pytest.mark.parametrize("source_length", [4, 7])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_equal_the_loop(function, source_length):
    params, x, source, weights = arrays(function, source_length=source_length)
    expected = reference(function, params, x, source, weights, TARGET_LENGTHS, SOURCE_LENGTHS)
    actual = ours(function, *single((params, x, source, weights)))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_equal_differences_of_the_loop(function):
    params, x, source, weights = arrays(function, seed=1)
    g = np.random.default_rng(2).normal(size=(4, LENGTH, D_OUT))

    def total(params, x, source, weights):
        y = reference(function, params, x, source, weights, TARGET_LENGTHS, SOURCE_LENGTHS)
        return float(np.sum(y * g))

    with jax.enable_x64(True):
        gradients = jax.grad(lambda *of: jnp.sum(ours(function, *of) * g), argnums=(0, 1, 2, 3))(
            params, x, source, weights
        )
    assert jax.tree.leaves(gradients)[0].dtype == np.float64
    step, everything = 1e-6, (params, x, source, weights)
    for mine, values in zip(jax.tree.leaves(gradients), jax.tree.leaves(everything), strict=True):
        expected = np.zeros(values.shape)
        for place in np.ndindex(values.shape):
            kept = values[place]
            values[place] = kept + step
            above = total(*everything)
            values[place] = kept - step
            expected[place] = (above - total(*everything)) / (2 * step)
            values[place] = kept
        # weights of absent features have no effect; columns beyond a rank get no gradient
        if values is not weights:
            np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_allclose(
                np.where(IDS < 0, 0, mine), np.where(IDS < 0, 0, expected), rtol=1e-5, atol=1e-6
            )


def test_without_any_source_every_function_is_the_plain_adapter_bit_for_bit():
    params, x, source, weights = arrays("cross_attention")
    params, x, source, weights = single((params, x, source, weights))
    active = ActiveFeatures(jnp.asarray(IDS), weights)
    plain_params = {n: {"a": own["a"], "b": own["b"]} for n, own in params.items()}

    def value_and_gradients(function, params, **options):
        def total(params):
            y = module_of(function).apply({"params": params}, x, D_OUT, active, **options)
            return jnp.sum(y**2), y

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    (_, plain), plain_gradients = value_and_gradients(None, plain_params)
    for function in FUNCTIONS:
        own = params if Fusion(function).attends else plain_params
        alignment = fusion.align(function, real(TARGET_LENGTHS, LENGTH), jnp.zeros((4, 4), bool))
        (_, y), gradients = value_and_gradients(function, own, source=source, alignment=alignment)
        np.testing.assert_array_equal(y, plain)
        for name, of in plain_gradients.items():
            np.testing.assert_array_equal(gradients[name]["a"], of["a"])
            np.testing.assert_array_equal(gradients[name]["b"], of["b"])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_packed_segments_meet_their_own_sources_alone(function):
    """A row of two segments is two rows of one; the order of the sources does not matter."""
    params, x, source, _ = single(arrays(function, source_length=6))
    lengths, sources = (3, 2), (2, 3)
    first, second = x[0, : lengths[0]], x[1, : lengths[1]]
    source_1, source_2 = source[0, : sources[0]], source[1, : sources[1]]
    ids = np.asarray([IDS[0], IDS[0]])
    two = np.zeros((2, 3, D_IN), np.float32)
    two[0, :3], two[1, :2] = first, second
    two_sources = np.zeros((2, 3, D_IN), np.float32)
    two_sources[0, :2], two_sources[1, :3] = source_1, source_2
    run = module_of(function).apply

    def active(rows):
        return ActiveFeatures(jnp.asarray(ids[:rows]), jnp.ones((rows, 4)))

    separate = run(
        {"params": params},
        jnp.asarray(two),
        D_OUT,
        active(2),
        source=jnp.asarray(two_sources),
        alignment=fusion.align(function, real(lengths, 3), real(sources, 3)),
    )
    packed = run(
        {"params": params},
        jnp.concatenate([first, second, jnp.zeros((1, D_IN))])[None],
        D_OUT,
        active(1),
        source=jnp.concatenate([source_2, source_1])[None],
        alignment=fusion.align(
            function,
            real([5], 6),
            real([5], 5),
            jnp.asarray([[1, 1, 1, 2, 2, 0]]),
            jnp.asarray([[2, 2, 2, 1, 1]]),
        ),
    )
    np.testing.assert_allclose(packed[0, :3], separate[0, :3], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(packed[0, 3:5], separate[1, :2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", ["cross_attention", "cross_attention_from_target"])
def test_banks_wider_than_a_value_attend_as_its_own(function):
    """Trials of one program have wider banks; logits are divided by the root of their own rank."""
    params, x, source, _ = single(arrays(function))
    space = FeatureSpace((FeatureType("shared", ("shared",), rank=2),))
    wide = FeatureSpace((FeatureType("shared", ("shared",), rank=5),))
    own = {"shared": params["shared"]}
    ranks = {"a": (2,), "b": (1,)}  # the axes that are ranks; of an attention's matrices both
    padded = {
        name: jnp.pad(m, [(0, 3 if axis in ranks.get(name, (1, 2)) else 0) for axis in range(3)])
        for name, m in params["shared"].items()
    }
    alignment = fusion.align(function, real(TARGET_LENGTHS, LENGTH), real(SOURCE_LENGTHS, 4))

    def run(space, params, scales):
        active = ActiveFeatures(jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1)), scales)
        return LowRankDelta(space, 3.0, function=function).apply(
            {"params": params}, x, D_OUT, active, source=source, alignment=alignment
        )

    settings = FeatureSettings.of(space, 3.0, {"shared": 5})
    np.testing.assert_allclose(
        run(wide, {"shared": padded}, settings.scales), run(space, own, None), rtol=1e-5, atol=1e-6
    )


def test_the_gradient_needs_no_scatter():
    params, x, source, weights = single(arrays("cross_attention"))
    text = jax.jit(jax.grad(lambda *of: ours("cross_attention", *of).sum())).lower(
        params, x, source, weights
    )
    assert "scatter" not in text.as_text()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"function": "add_rellu"}, "Fusion.function = 'add_rellu'.*did you mean 'add_relu'"),
        ({"targets": ()}, "Fusion.targets: targets is empty"),
        ({"targets": "(query"}, "Fusion.targets: target .* not a regular expression"),
        ({"layer_offset": 2}, "Fusion.layer_offset = 2: expected 0 or 1"),
        ({"source_width": 0}, "Fusion.source_width = 0: expected at least 1"),
        ({"source_width": 8, "layer_offset": 1}, "layer_offset = 1 has no effect with"),
    ],
)
def test_a_fusion_checks_its_fields(fields, says):
    with pytest.raises(ValueError, match=says):
        Fusion(**fields)


def test_low_rank_knows_nothing_of_what_meets():
    """The hook sees every column once, in the order of the types."""
    params, x, _, weights = single(arrays("add"))
    banks = {n: (own["a"], own["b"]) for n, own in params.items()}
    seen = []

    def meet(types, t, down):
        seen.append(([of.name for of in types], t.shape[-1]))
        np.testing.assert_array_equal(down(x), t)
        return t

    active = ActiveFeatures(jnp.asarray(IDS), weights)
    plain = low_rank.delta(x, banks, active, SPACE)
    np.testing.assert_array_equal(low_rank.delta(x, banks, active, SPACE, meet=meet), plain)
    assert seen == [(["task", "language"], 2 + 2 * 3), (["shared"], 2)]
