"""The layers against NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flix_jax.models import layers


def _bucket(relative_position: int, bidirectional: bool, num_buckets: int, max_distance: int):
    """T5's bucket of one distance, from its description (arXiv 1910.10683, section 2.1)."""
    bucket, distance = 0, -relative_position
    if bidirectional:
        num_buckets //= 2
        bucket = num_buckets if relative_position > 0 else 0
        distance = abs(distance)
    distance = max(distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return bucket + distance
    logarithmic = np.log(distance / exact) / np.log(max_distance / exact) * (num_buckets - exact)
    return bucket + min(exact + int(logarithmic + 1e-6), num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_exact_then_logarithmic(bidirectional):
    positions = np.arange(-300, 301)
    buckets = layers.relative_position_buckets(
        positions, bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    expected = [_bucket(int(position), bidirectional, 32, 128) for position in positions]
    np.testing.assert_array_equal(buckets, expected)


@pytest.fixture(params=["tpu", "default"])
def platform(request, monkeypatch):
    """Computes here as on a TPU, or on another platform."""

    def chosen(*args, **branches):
        return branches[request.param](*args)

    monkeypatch.setattr(layers.lax, "platform_dependent", chosen)


def _relative_positions(bidirectional=True, **kwargs):
    module = layers.RelativePositionBiases(
        num_heads=2, num_buckets=8, max_distance=10, bidirectional=bidirectional
    )
    table = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    return module, {"params": {"rel_embedding": jnp.asarray(table)}}, table


@pytest.mark.parametrize(
    ("queries", "keys", "bidirectional"),
    [(1, 1, True), (1, 9, False), (2, 1, True), (14, 5, True), (6, 13, False), (9, 9, True)],
)
def test_relative_position_biases_lay_out_every_pair(queries, keys, bidirectional, platform):
    module, params, table = _relative_positions(bidirectional)
    biases = module.apply(params, queries, keys)
    expected = np.zeros((1, 2, queries, keys), np.float32)
    for q in range(queries):
        for k in range(keys):
            expected[0, :, q, k] = table[:, _bucket(k - q, bidirectional, 8, 10)]
    np.testing.assert_array_equal(biases, expected)


def test_one_query_gets_its_row_of_the_biases(platform):
    module, params, _ = _relative_positions(bidirectional=False)
    whole = module.apply(params, 12, 12)
    row = jax.jit(lambda position: module.apply(params, 1, 12, position))
    for position in (0, 5, 11):
        np.testing.assert_array_equal(row(position)[:, :, 0], whole[:, :, position])


@pytest.mark.parametrize(
    ("bidirectional", "nearest"), [(True, (-1, 1, -2, 2)), (False, (-1, 0, -2, -3))]
)
def test_heads_can_begin_by_looking_at_a_neighbour(bidirectional, nearest):
    module = layers.RelativePositionBiases(4, bidirectional=bidirectional, neighbour_strength=6.0)
    biases, _ = module.init_with_output(jax.random.key(0), 9, 9)
    looked_at = np.argmax(biases[0, :, 4, : 9 if bidirectional else 5], axis=-1)
    np.testing.assert_array_equal(looked_at - 4, nearest)


def test_gradient_of_relative_positions_counts_the_pairs_of_a_bucket(platform):
    module, params, _ = _relative_positions()
    gradient = jax.grad(lambda p: module.apply(p, 6, 9).sum())(params)["params"]["rel_embedding"]
    counts = np.zeros((2, 8))
    for q in range(6):
        for k in range(9):
            counts[:, _bucket(k - q, True, 8, 10)] += 1
    np.testing.assert_allclose(gradient, counts, rtol=1e-6)


def test_rms_norm_divides_by_the_root_mean_square():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(2, 5, 7)).astype(np.float32)
    scale = np.linspace(0.5, 1.5, 7, dtype=np.float32)
    y = layers.RMSNorm().apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_dense_general_keeps_a_two_dimensional_kernel():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)
    module = layers.DenseGeneral(features=(6, 7), axis=(-2, -1), kernel_axes=("joined_kv", "embed"))
    kernel = rng.normal(size=(12, 42)).astype(np.float32)
    y = module.apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x))
    expected = (x.reshape(2, 5, 12) @ kernel).reshape(2, 5, 6, 7)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_attention_is_a_masked_softmax_over_keys():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, n, 3, 4)).astype(np.float32) for n in (5, 6, 6))
    bias = rng.normal(size=(1, 3, 5, 6)).astype(np.float32)
    mask = rng.random((2, 1, 5, 6)) < 0.7
    mask[..., 0] = True
    out = layers.dot_product_attention(
        *(jnp.asarray(a) for a in (query, key, value)), jnp.asarray(mask), jnp.asarray(bias)
    )
    for b, q, h in np.ndindex(2, 5, 3):
        seen = mask[b, 0, q]
        logits = (key[b, :, h].astype(np.float64) @ query[b, q, h] + bias[0, h, q])[seen]
        weights = np.exp(logits - logits.max())
        expected = weights @ value[b, seen, h] / weights.sum()
        np.testing.assert_allclose(out[b, q, h], expected, rtol=1e-5, atol=1e-6)


def test_attention_that_may_go_nowhere_is_finite_in_bfloat16():
    x = jnp.ones((1, 3, 2, 4), jnp.bfloat16)
    out = layers.dot_product_attention(x, x, x, jnp.zeros((1, 1, 3, 3), bool))
    assert out.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(out).all())


def test_attention_dropout_is_shared_by_the_queries():
    value = jnp.eye(8)[None]  # the output is the attention weights themselves
    attention = layers.MultiHeadAttention(1, 8, dropout_rate=0.5)
    kernels = {name: {"kernel": jnp.eye(8)} for name in ("query", "key", "value", "out")}
    weights = attention.apply(
        {"params": kernels},
        jnp.zeros((1, 4, 8)),
        value,
        deterministic=False,
        rngs={"dropout": jax.random.key(0)},
    )[0]
    assert set(np.unique(weights)) == {0.0, 0.25}
    np.testing.assert_array_equal(weights, np.broadcast_to(weights[0], weights.shape))


def test_mlp_is_a_gated_gelu_in_its_tanh_form():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 5)).astype(np.float32)
    wi_0, wi_1, wo = (rng.normal(size=s).astype(np.float32) for s in ((5, 7), (5, 7), (7, 5)))
    params = {
        name: {"kernel": jnp.asarray(k)} for name, k in (("wi_0", wi_0), ("wi_1", wi_1), ("wo", wo))
    }
    y = layers.MlpBlock(7).apply({"params": params}, jnp.asarray(x))
    h = x @ wi_0
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(y, (gelu * (x @ wi_1)) @ wo, rtol=2e-5, atol=1e-5)


def test_embeddings_by_gather_and_by_one_hot_agree_and_an_unknown_id_shows():
    table = {"params": {"embedding": jax.random.normal(jax.random.key(0), (6, 4))}}
    tokens = jnp.asarray([[0, 5, 2]])
    by_gather = layers.Embed(6, 4).apply(table, tokens)
    by_one_hot = layers.Embed(6, 4, one_hot=True).apply(table, tokens)
    np.testing.assert_allclose(by_gather, by_one_hot, rtol=1e-6)
    assert bool(jnp.isnan(layers.Embed(6, 4).apply(table, jnp.asarray([[6]]))).all())


def test_initialisers_have_t5x_scales():
    """fan-in scaled; the query kernel smaller by sqrt(head_dim); embeddings of unit variance."""
    x = jnp.zeros((1, 2, 64))

    @jax.jit
    def deviations(rng):
        attention = layers.MultiHeadAttention(num_heads=8, head_dim=16).init(rng, x, x)
        mlp = layers.MlpBlock(128).init(rng, x)
        embed = layers.Embed(200, 64).init(rng, jnp.zeros((1, 1), jnp.int32))
        return jax.tree.map(jnp.std, [attention["params"], mlp["params"], embed["params"]])

    attention, mlp, embed = nn.unbox(deviations(jax.random.key(0)))
    expected = {"query": 64**-0.5 / 4, "key": 64**-0.5, "value": 64**-0.5, "out": 128**-0.5}
    for name, deviation in expected.items():
        assert float(attention[name]["kernel"]) == pytest.approx(deviation, rel=0.05)
    assert float(mlp["wi_0"]["kernel"]) == pytest.approx(64**-0.5, rel=0.05)
    assert float(mlp["wo"]["kernel"]) == pytest.approx(128**-0.5, rel=0.05)
    assert float(embed["embedding"]) == pytest.approx(1.0, rel=0.05)


def test_masks():
    valid = jnp.asarray([[True, True, False]])
    padding = layers.padding_mask(valid, valid)[0, 0]
    np.testing.assert_array_equal(padding, [[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    segments = jnp.asarray([[1, 1, 2]])
    packed = layers.segment_mask(segments, segments)[0, 0]
    np.testing.assert_array_equal(packed, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(layers.causal_mask(3)[0, 0], np.tril(np.ones((3, 3))))
