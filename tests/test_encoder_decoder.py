"""Loss and prediction with and without adapters; mixtures of features in one batch."""

import dataclasses
import functools

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from test_decoding import assert_hypotheses, beam_in_python

from flix_jax.adapters.activation import activate
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec, inject
from flix_jax.models import losses
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer

ROWS, INPUT_LENGTH, LENGTH = 5, 9, 7
BEAMS, ALPHA, BEAM_EOS = 3, 0.6, 5
SPACE = FeatureSpace(
    (
        FeatureType("task", ("ner", "qa"), rank=2),
        FeatureType("language", ("sw", "yo", "sn"), rank=3),
    )
)
CONFIG = T5Config(
    vocab_size=40,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
)
SHAPES = {
    "encoder_input_tokens": (ROWS, INPUT_LENGTH),
    "decoder_input_tokens": (ROWS, LENGTH),
    "decoder_target_tokens": (ROWS, LENGTH),
    "feature_ids": (ROWS, 2),
}


def _batch():
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, 40, (ROWS, INPUT_LENGTH))
    inputs[1, 6:] = 0
    targets = rng.integers(2, 40, (ROWS, LENGTH))
    targets[2, 4:] = 0
    shifted = np.concatenate([np.zeros((ROWS, 1), int), targets[:, :-1]], axis=1)
    ids = [[0, 0], [1, 2], [-1, 1], [0, -1], [-1, -1]]
    arrays = (inputs, shifted, targets, ids)
    return {name: jnp.asarray(a, jnp.int32) for name, a in zip(SHAPES, arrays, strict=True)}


def _random_params(model):
    """Parameters drawn with NumPy, adapters not zero: far from where every token is the same."""
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(lambda rng: model.init(rng, SHAPES), jax.random.key(0))

    def draw(path, leaf):
        scale, offset = (0.2, 1.0) if "scale" in jax.tree_util.keystr(path) else (0.35, 0.0)
        return jnp.asarray(offset + scale * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))


class Case:
    """A model, its parameters and its compiled functions."""

    def __init__(self, scan_layers):
        config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
        self.model = EncoderDecoder(Transformer(config), AdapterSpec(SPACE), z_loss=1e-3)
        self.params = _random_params(self.model)
        self.batch = _batch()
        self.logits = jax.jit(self.model.logits)
        self.predict = jax.jit(lambda p, batch: self.model.predict(p, batch, max_length=LENGTH))
        # a token that ends some hypotheses and not others
        ending = dataclasses.replace(self.model, eos_id=BEAM_EOS)
        options = {"max_length": LENGTH, "beams": BEAMS, "alpha": ALPHA}
        self.predict_n = jax.jit(lambda p, batch: ending.predict_n(p, batch, **options))


@pytest.fixture(scope="module")
def looped():
    return Case(scan_layers=False)


@pytest.fixture(scope="module")
def scanned():
    return Case(scan_layers=True)


@pytest.mark.parametrize("form", ["looped", "scanned"])
def test_decoding_with_a_cache_equals_the_full_forward_for_mixed_features(form, request):
    case = request.getfixturevalue(form)
    decoded = np.zeros((ROWS, LENGTH), np.int32)
    for step in range(LENGTH):
        shifted = np.concatenate([np.zeros((ROWS, 1), np.int32), decoded[:, :-1]], axis=1)
        # the target tokens only mark which positions are real
        real = np.broadcast_to(np.arange(LENGTH) <= step, (ROWS, LENGTH)).astype(np.int32)
        fed = dict(
            case.batch,
            decoder_input_tokens=jnp.asarray(shifted),
            decoder_target_tokens=jnp.asarray(real),
        )
        decoded[:, step] = np.argmax(case.logits(case.params, fed)[:, step], axis=-1)
    ended = np.cumsum(decoded == 1, axis=1) - (decoded == 1) > 0
    decoded = np.where(ended, 0, decoded)
    assert len(np.unique(decoded)) > 5, "the example is too easy"
    np.testing.assert_array_equal(case.predict(case.params, case.batch), decoded)


def test_a_row_is_decoded_the_same_whatever_its_neighbours(looped):
    together = looped.predict(looped.params, looped.batch)
    order = np.asarray([3, 1, 4, 0, 2])
    shuffled = {name: array[order] for name, array in looped.batch.items()}
    np.testing.assert_array_equal(looped.predict(looped.params, shuffled), together[order])
    swapped = dict(looped.batch, feature_ids=looped.batch["feature_ids"][order])
    changed = looped.predict(looped.params, swapped) != together
    assert bool(changed.any()), "features do not matter"


def test_rows_of_padding_decode_to_nothing(looped):
    inputs = looped.batch["encoder_input_tokens"].at[4].set(0)
    batch = dict(looped.batch, encoder_input_tokens=inputs)
    decoded = looped.predict(looped.params, batch)
    np.testing.assert_array_equal(decoded[4], 0)
    expected = looped.predict(looped.params, looped.batch)
    np.testing.assert_array_equal(decoded[:4], expected[:4])


@pytest.mark.parametrize("form", ["looped", "scanned"])
def test_beams_with_a_cache_equal_lists_over_full_forwards_for_mixed_features(form, request):
    case = request.getfixturevalue(form)
    batch = dict(case.batch)
    batch["encoder_input_tokens"] = batch["encoder_input_tokens"].at[3].set(0)
    tokens, scores = case.predict_n(case.params, batch)

    def log_probs(prefixes, row):
        """Each prefix in a row of its own, beside the same inputs and features."""
        decoded = np.zeros((ROWS, LENGTH), np.int32)
        for place, prefix in enumerate(prefixes):
            decoded[place, 1 : len(prefix) + 1] = prefix
        real = np.broadcast_to(np.arange(LENGTH) <= len(prefixes[0]), (ROWS, LENGTH))
        fed = {name: jnp.stack([array[row]] * ROWS) for name, array in batch.items()}
        fed["decoder_input_tokens"] = jnp.asarray(decoded)
        fed["decoder_target_tokens"] = jnp.asarray(real, jnp.int32)
        logits = case.logits(case.params, fed)[: len(prefixes), len(prefixes[0])]
        return np.asarray(jax.nn.log_softmax(logits), np.float64)

    lengths = set()
    for row in range(ROWS):
        expected = []
        if row != 3:  # padding alone
            following = functools.partial(log_probs, row=row)
            expected = beam_in_python(following, BEAMS, LENGTH, BEAM_EOS, ALPHA)
        lengths |= {len(hypothesis) for hypothesis, _ in expected}
        assert_hypotheses(tokens[row], scores[row], expected)
    assert len(lengths) > 2, "the example is too easy"


def test_one_beam_is_what_predict_gives():
    config = dataclasses.replace(CONFIG, num_encoder_layers=1, num_decoder_layers=1)
    model, batch = EncoderDecoder(Transformer(config)), _batch()
    params = _random_params(model)
    expected = jax.jit(lambda p, b: model.predict(p, b, max_length=LENGTH))(params, batch)
    assert len(np.unique(expected)) > 5, "the example is too easy"
    one = jax.jit(lambda p, b: model.predict_n(p, b, max_length=LENGTH, beams=1))
    np.testing.assert_array_equal(one(params, batch)[0][:, 0], expected)


def test_beam_search_refuses_a_cache_that_it_does_not_know():
    class Recurrent(nn.Module):
        def encode(self, tokens, enable_dropout):
            return tokens

        @nn.compact
        def decode(self, encoded, *inputs, **options):
            self.variable("cache", "carry", jnp.zeros, (2, 4))
            return encoded

    model, batch = EncoderDecoder(Recurrent()), {"encoder_input_tokens": jnp.ones((2, 3), int)}
    with pytest.raises(ValueError, match=r"cache entry carry of shape \(2, 4\): beam search knows"):
        model.predict_n({}, batch, max_length=3, beams=2)


def test_embeddings_are_the_mean_over_real_tokens_under_each_rows_features(looped):
    model = looped.model
    tokens = looped.batch["encoder_input_tokens"].at[4].set(0)
    batch = dict(looped.batch, encoder_input_tokens=tokens)

    @jax.jit
    def encode(params, batch):
        with inject(model.adapters, activate(SPACE, batch["feature_ids"])):
            return model.module.apply(
                {"params": params},
                batch["encoder_input_tokens"],
                enable_dropout=False,
                method="encode",
            )

    encoded = np.asarray(encode(looped.params, batch), np.float64)
    expected = np.zeros((ROWS, CONFIG.emb_dim))
    for row in range(4):
        expected[row] = encoded[row, : np.count_nonzero(tokens[row])].mean(axis=0)
    embed = jax.jit(model.embed, static_argnames="normalize")
    embedded = embed(looped.params, batch)
    assert embedded.dtype == jnp.float32
    np.testing.assert_allclose(embedded, expected, rtol=1e-5, atol=1e-5)

    normalized = embed(looped.params, batch, normalize=True)
    expected[:4] /= np.linalg.norm(expected[:4], axis=1, keepdims=True)
    np.testing.assert_allclose(normalized, expected, rtol=1e-5, atol=1e-5)

    others = dict(batch, feature_ids=batch["feature_ids"][::-1])
    changed = np.abs(embed(looped.params, others) - embedded).max(axis=1)
    assert (changed[[0, 1, 3]] > 0.01).all(), "features do not matter"


def test_a_decoding_step_reads_the_encoded_keys_from_the_cache(scanned):
    """Once the cache is made, the encoded inputs are not looked at again."""
    tokens = scanned.batch["encoder_input_tokens"]
    targets = jnp.zeros((ROWS, 4), jnp.int32)
    params = _without_adapters(scanned.params)
    network = scanned.model.module

    @jax.jit
    def step(encoded, later):
        kwargs = {"enable_dropout": False, "decode": True, "mutable": ["cache"]}
        _, cache = network.apply(
            {"params": params}, encoded, tokens, targets, targets, method="decode", **kwargs
        )
        variables = {"params": params, **cache}
        one = targets[:, :1]
        return network.apply(
            variables, later, tokens, one, one, max_decode_length=4, method="decode", **kwargs
        )[0]

    encoded = jax.random.normal(jax.random.key(0), (ROWS, INPUT_LENGTH, 16))
    np.testing.assert_array_equal(step(encoded, jnp.zeros_like(encoded)), step(encoded, encoded))


def test_loss_is_that_of_the_logits(looped):
    targets = looped.batch["decoder_target_tokens"]
    total, sums = jax.jit(looped.model.loss)(looped.params, looped.batch)
    expected, _ = losses.weighted_sums(
        looped.logits(looped.params, looped.batch),
        targets,
        (targets > 0).astype(jnp.float32),
        z_loss=looped.model.z_loss,
    )
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert set(sums) == {"loss", "z_loss", "weight", "correct"}
    assert float(sums["weight"]) == float((targets > 0).sum())


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_chunks_of_the_loss_are_the_whole_with_dropout_and_adapters(tied):
    """Loss, metrics and gradients of adapters, and of the whole network, its output layer too."""
    config = dataclasses.replace(CONFIG, logits_via_embedding=tied)
    model = EncoderDecoder(Transformer(config), AdapterSpec(SPACE), z_loss=1e-3)
    params, batch = _random_params(model), _batch()
    key = jax.random.key(5)

    def found(chunks):
        chunked = dataclasses.replace(model, loss_chunks=chunks)
        loss = jax.jit(jax.value_and_grad(lambda p: chunked.loss(p, batch, rng=key), has_aux=True))
        return loss(params)

    for one, other in zip(jax.tree.leaves(found(LENGTH)), jax.tree.leaves(found(1)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6 * np.abs(other).max())


def test_chunks_are_refused_where_the_output_layer_is_not_apart():
    with pytest.raises(ValueError, match="Dense does not tell its output layer apart"):
        EncoderDecoder(nn.Dense(3), loss_chunks=2)
    with pytest.raises(ValueError, match="adapters of decoder/logits_dense need its logits whole"):
        spec = AdapterSpec(SPACE, ("decoder/logits_dense",))
        EncoderDecoder(Transformer(CONFIG), spec, loss_chunks=2)
    with pytest.raises(ValueError, match="loss_chunks = 0: expected >= 1"):
        EncoderDecoder(Transformer(CONFIG), loss_chunks=0)


def _without_adapters(params):
    flat = flatten_dict(params)
    return unflatten_dict({path: value for path, value in flat.items() if "flix" not in path})


def test_adapters_whose_b_is_zero_leave_the_network_as_it_is(looped):
    flat = flatten_dict(looped.params)
    zero = {p: jnp.zeros_like(x) if "flix" in p and p[-1] == "b" else x for p, x in flat.items()}
    alone = dataclasses.replace(looped.model, adapters=None)
    expected = jax.jit(alone.logits)(_without_adapters(looped.params), looped.batch)
    actual = looped.logits(unflatten_dict(zero), looped.batch)
    np.testing.assert_array_equal(actual, expected)


def test_adapters_do_not_change_what_the_network_is_initialised_with():
    config = dataclasses.replace(
        CONFIG, num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.0
    )
    adapted = EncoderDecoder(Transformer(config), AdapterSpec(SPACE, targets=".*/mlp/wo"))
    alone = dataclasses.replace(adapted, adapters=None)

    def init(model):
        # not optimised: it runs once, and compiling takes far longer than running
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        compiled = jax.jit(lambda rng: model.init(rng, SHAPES), compiler_options=options)
        return nn.unbox(compiled(jax.random.key(5)))

    params, expected = init(adapted), init(alone)
    assert "flix" in params["encoder"]["layers_0"]["mlp"]["wo"]
    jax.tree.map(np.testing.assert_array_equal, _without_adapters(params), expected)


def test_feature_dropout_is_on_only_with_a_key(scanned):
    types = tuple(dataclasses.replace(t, dropout=0.9) for t in SPACE.types)
    config = dataclasses.replace(scanned.model.module.config, dropout_rate=0.0)
    model = EncoderDecoder(Transformer(config), AdapterSpec(FeatureSpace(types)))
    dropped = jax.jit(model.logits)(scanned.params, scanned.batch, rng=jax.random.key(0))
    kept = scanned.logits(scanned.params, scanned.batch)
    difference = jnp.abs(dropped - kept).max(axis=(1, 2))
    assert float(difference[:4].max()) > 0.1
    assert float(difference[4]) < 1e-4, "a row without features has nothing to drop"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_ids": None}, "batch has no 'feature_ids'"),
        ({"feature_ids": (ROWS, 3)}, r"feature_ids has shape \(5, 3\): expected .* \(5, 2\)"),
        ({"feature_ids": (1, 2)}, r"feature_ids has shape \(1, 2\): expected .* \(5, 2\)"),
        ({"decoder_input_tokens": None}, "batch has no 'decoder_input_tokens'"),
        ({"decoder_input_tokens": (ROWS, 6)}, r"shape \(5, 6\): expected \(5, 7\)"),
        ({"decoder_loss_weights": (ROWS, 6)}, r"shape \(5, 6\): expected \(5, 7\)"),
        ({"encoder_input_tokens": (ROWS, 0)}, "neither zero"),
        ({"encoder_input_tokens": (4, 9)}, "expected 4 rows, as encoder_input_tokens has"),
    ],
)
def test_shapes_that_disagree_are_refused_when_traced(change, message):
    model = EncoderDecoder(Transformer(CONFIG), AdapterSpec(SPACE))
    batch = _batch()
    for name, shape in change.items():
        batch.pop(name, None)
        if shape is not None:
            batch[name] = jnp.zeros(shape, jnp.int32)
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(lambda batch: model.loss({}, batch), batch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["label_smoothing", "z_loss"])
def test_settings_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=f"EncoderDecoder.{field} = -0.1"):
        EncoderDecoder(Transformer(CONFIG), **{field: -0.1})


def _products_over_the_rank(jaxpr):
    """How many products contract the columns of an example's features, inner jaxprs too."""
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            found += [shape[axis] for axis in contracted] == [5]
        found += sum(map(_products_over_the_rank, jex.core.jaxprs_in_params(equation.params)))
    return found


def test_minimal_remat_makes_no_update_again():
    counts = {}
    for remat in ("none", "minimal", "full"):
        config = dataclasses.replace(CONFIG, remat=remat)
        model = EncoderDecoder(Transformer(config), AdapterSpec(SPACE))
        params = jax.eval_shape(lambda model=model: nn.unbox(model.init(jax.random.key(0), SHAPES)))

        def loss(params, model=model):
            return model.loss(params, _batch(), rng=jax.random.key(1))[0]

        counts[remat] = _products_over_the_rank(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    assert counts["minimal"] == counts["none"] < counts["full"]
