"""The network against Hugging Face's MT5 and T5X's parameter trees; loop, scan and remat agree."""

import ast
import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flix_jax.models.config import T5Config
from flix_jax.models.t5 import Transformer

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CONFIGS = pathlib.Path(__file__).parents[1] / "configs" / "models"
TOKENS = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")

TINY = T5Config(
    vocab_size=48,
    emb_dim=16,
    num_heads=3,
    head_dim=4,
    mlp_dim=24,
    num_encoder_layers=2,
    num_decoder_layers=2,
)

# Hugging Face's name of a weight -> ours; kernels are transposed.
_NAMES = (
    (r"shared\.weight", "token_embedder/embedding"),
    (r"lm_head\.weight", "decoder/logits_dense/kernel"),
    (r"(\w+)\.final_layer_norm\.weight", r"\1/\1_norm/scale"),
    (
        r"(\w+)\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        r"\1/relpos_bias/rel_embedding",
    ),
    (
        r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight",
        r"encoder/layers_\1/pre_attention_layer_norm/scale",
    ),
    (
        r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight",
        r"encoder/layers_\1/pre_mlp_layer_norm/scale",
    ),
    (
        r"decoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight",
        r"decoder/layers_\1/pre_self_attention_layer_norm/scale",
    ),
    (
        r"decoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight",
        r"decoder/layers_\1/pre_cross_attention_layer_norm/scale",
    ),
    (
        r"decoder\.block\.(\d+)\.layer\.2\.layer_norm\.weight",
        r"decoder/layers_\1/pre_mlp_layer_norm/scale",
    ),
    (
        r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.(\w)\.weight",
        r"encoder/layers_\1/attention/\2/kernel",
    ),
    (
        r"decoder\.block\.(\d+)\.layer\.0\.SelfAttention\.(\w)\.weight",
        r"decoder/layers_\1/self_attention/\2/kernel",
    ),
    (
        r"decoder\.block\.(\d+)\.layer\.1\.EncDecAttention\.(\w)\.weight",
        r"decoder/layers_\1/encoder_decoder_attention/\2/kernel",
    ),
    (
        r"(\w+)\.block\.(\d+)\.layer\.\d\.DenseReluDense\.(\w+)\.weight",
        r"\1/layers_\2/mlp/\3/kernel",
    ),
)
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def _from_hugging_face(name, value):
    for pattern, ours in _NAMES:
        if match := re.fullmatch(pattern, name):
            path = match.expand(ours).split("/")
            if "attention" in path[-3 if len(path) > 2 else 0]:
                path[-2] = _PROJECTIONS[path[-2]]
            transposed = path[-1] in ("kernel", "rel_embedding")
            return tuple(path), value.T if transposed else value
    raise AssertionError(name)


@pytest.fixture(scope="module")
def golden():
    """(looped parameters, batch, logits) of the Hugging Face model."""
    with np.load(GOLDENS / "hf_mt5.npz") as arrays:
        weights = dict(
            _from_hugging_face(name.removeprefix("weights/"), arrays[name])
            for name in arrays.files
            if name.startswith("weights/")
        )
        batch = {name: jnp.asarray(arrays[name]) for name in TOKENS}
        return jax.tree.map(jnp.asarray, unflatten_dict(weights)), batch, arrays["logits"]


def stack_layers(params, *, share_relative_positions=False):
    """Looped parameters -> scanned ones; shared relative positions are repeated per layer."""
    out, layers = {}, {}
    for path, value in flatten_dict(params).items():
        if path[1].startswith("layers_"):
            layers.setdefault((path[0], path[0], *path[2:]), []).append(value)
        elif path[1] == "relpos_bias" and not share_relative_positions:
            count = sum(name.startswith("layers_") for name in params[path[0]])
            layers[(path[0], path[0], *path[1:])] = [value] * count
        else:
            out[path] = value
    out |= {path: jnp.stack(values, axis=1) for path, values in layers.items()}
    return unflatten_dict(out)


SCANNED = dataclasses.replace(TINY, scan_layers=True)  # the one that compiles fastest


def _logits(config, params, batch):
    module = Transformer(config)
    return jax.jit(lambda p: module.apply({"params": p}, **batch, enable_dropout=False))(params)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_logits_equal_those_of_hugging_face(golden, scan_layers):
    params, batch, expected = golden
    if scan_layers:
        params = stack_layers(params)
    logits = _logits(dataclasses.replace(TINY, scan_layers=scan_layers), params, batch)
    real = np.asarray(batch["decoder_target_tokens"]) > 0
    error = np.abs(np.asarray(logits) - expected)[real].max()
    assert error < 1e-5 * np.abs(expected).max()


SHARED = dataclasses.replace(TINY, relative_attention_per_layer=False)


def _loss_and_gradient(config, params, batch):
    module = Transformer(config)

    def loss(p):
        logits = module.apply({"params": p}, **batch, enable_dropout=False)
        return jnp.mean(jnp.square(nn.log_softmax(logits)))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def looped_gradient(golden):
    params, batch, _ = golden
    return _loss_and_gradient(SHARED, params, batch)


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [
        (True, "full"),
        pytest.param(False, "full", marks=pytest.mark.exhaustive),
        pytest.param(False, "minimal", marks=pytest.mark.exhaustive),
        pytest.param(True, "none", marks=pytest.mark.exhaustive),
        pytest.param(True, "minimal", marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_leave_loss_and_gradients_alone(golden, looped_gradient, scan_layers, remat):
    params, batch, _ = golden
    expected_loss, expected = looped_gradient
    if scan_layers:
        params = stack_layers(params, share_relative_positions=True)
        expected = stack_layers(expected, share_relative_positions=True)
    config = dataclasses.replace(SHARED, scan_layers=scan_layers, remat=remat)
    loss, gradient = _loss_and_gradient(config, params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))

    jax.tree.map(close, gradient, expected)


def _shapes(config):
    """Boxed parameters of a network as shapes, without allocating anything."""
    module = Transformer(config)
    tokens = jnp.ones((1, 4), jnp.int32)

    def init(rng):
        return module.init(rng, tokens, tokens, tokens, enable_dropout=False)["params"]

    return jax.eval_shape(init, jax.random.key(0))


def _described(config):
    boxed = _shapes(config)
    shapes = flatten_dict(nn.unbox(boxed), sep="/")
    axes = flatten_dict(nn.get_partition_spec(boxed), sep="/")
    return {name: {"shape": list(x.shape), "axes": list(axes[name])} for name, x in shapes.items()}


def _joined_heads(leaf):
    """T5X's scanned attention kernels have heads and kv apart; ours have them joined."""
    sizes = dict(zip(leaf["axes"], leaf["shape"], strict=True))
    if not {"heads", "kv"} <= set(sizes):
        return leaf
    joined = {"joined_kv": sizes["heads"] * sizes["kv"], "embed": sizes["embed"]}
    order = ["embed", "joined_kv"] if leaf["axes"][0] == "embed" else ["joined_kv", "embed"]
    order.insert(1, "layers")
    joined["layers"] = sizes["layers"]
    return {"shape": [joined[axis] for axis in order], "axes": order}


def read_config(name):
    """The T5Config that a file of configs/models binds, read without gin."""
    text = (CONFIGS / f"{name}.gin").read_text()
    fields = re.findall(r"^T5Config\.(\w+) = (.+)$", text, re.MULTILINE)
    return T5Config(**{field: ast.literal_eval(value) for field, value in fields})


@pytest.mark.parametrize("network", ["t5", "scalable_t5"])
def test_parameters_are_those_of_t5x(network):
    expected = json.loads((GOLDENS / "t5x_mt5_small.json").read_text())[network]
    config = dataclasses.replace(read_config("mt5_small"), scan_layers=network == "scalable_t5")
    assert _described(config) == {name: _joined_heads(leaf) for name, leaf in expected.items()}


PUBLISHED = {
    "mt5_small": 300e6,
    "mt5_base": 582e6,
    "mt5_large": 1.23e9,
    "mt5_xl": 3.74e9,
    "mt5_xxl": 12.9e9,
    "byt5_small": 300e6,
    "byt5_base": 582e6,
    "byt5_large": 1.23e9,
    "byt5_xl": 3.74e9,
    "byt5_xxl": 12.9e9,
    "t5_1_1_small": 77e6,
    "t5_1_1_base": 248e6,
    "t5_1_1_large": 783e6,
    "t5_1_1_xl": 2.85e9,
    "t5_1_1_xxl": 11.1e9,
    "t5_1_0_small": 60.5e6,
    "t5_1_0_base": 223e6,
    "t5_1_0_large": 738e6,
    "t5_1_0_3b": 2.85e9,
    "t5_1_0_11b": 11.3e9,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    # Scanned to trace one layer only, with relative positions shared as in the published models.
    config = dataclasses.replace(
        read_config(name), scan_layers=True, relative_attention_per_layer=False
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(_shapes(config)))
    assert count == pytest.approx(PUBLISHED[name], rel=5e-3)


def test_every_model_file_says_what_it_requires():
    names = {path.stem for path in CONFIGS.glob("*.gin")}
    assert names >= set(PUBLISHED)
    for name in names:
        comment = (CONFIGS / f"{name}.gin").read_text().split("T5Config.")[0]
        assert comment.startswith("# ") and "Requires" in comment, name
        read_config(name)


def test_packed_segments_do_not_see_each_other(golden):
    params, batch, _ = golden
    inputs = np.asarray(batch["encoder_input_tokens"])[0]
    targets = np.asarray(batch["decoder_target_tokens"])[0]
    shifted = np.concatenate([[0], targets[:4], [0], targets[5:-1]])
    zeros = np.zeros_like

    def rows(first, second, split):
        alone = [np.where(np.arange(len(first)) < split, first, 0), zeros(second)]
        alone[1][: len(second) - split] = second[split:]
        return jnp.asarray(np.stack(alone))

    separate = {
        "encoder_input_tokens": rows(inputs, inputs, 60),
        "decoder_input_tokens": rows(shifted, shifted, 5),
        "decoder_target_tokens": rows(targets, targets, 5),
    }
    packed = {
        "encoder_input_tokens": jnp.asarray(inputs[None]),
        "decoder_input_tokens": jnp.asarray(shifted[None]),
        "decoder_target_tokens": jnp.asarray(targets[None]),
        "encoder_segment_ids": jnp.asarray(np.where(np.arange(len(inputs)) < 60, 1, 2)[None]),
        "decoder_segment_ids": jnp.asarray(np.where(np.arange(len(targets)) < 5, 1, 2)[None]),
    }
    params = stack_layers(params)
    apart, together = _logits(SCANNED, params, separate), _logits(SCANNED, params, packed)[0]
    scale = 1e-5 * float(jnp.abs(apart).max())
    np.testing.assert_allclose(together[:5], apart[0, :5], rtol=0, atol=scale)
    np.testing.assert_allclose(together[5:], apart[1, : len(targets) - 5], rtol=0, atol=scale)


def test_dropout_is_a_function_of_its_key(golden):
    params, batch, _ = golden
    params = stack_layers(params)
    module = Transformer(SCANNED)

    @jax.jit
    def apply(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply({"params": params}, **batch, enable_dropout=True, rngs=rngs)

    first = apply(0)
    np.testing.assert_array_equal(apply(0), first)
    assert float(jnp.abs(apply(1) - first).max()) > 0.01


def test_bfloat16_stays_close_and_its_logits_are_float32(golden):
    params, batch, expected = golden
    config = dataclasses.replace(SCANNED, dtype="bfloat16")
    logits = _logits(config, stack_layers(params), batch)
    assert logits.dtype == jnp.float32
    real = np.asarray(batch["decoder_target_tokens"]) > 0
    error = np.linalg.norm((np.asarray(logits) - expected)[real])
    assert error < 0.1 * np.linalg.norm(expected[real])


def test_products_of_bfloat16_operands_stay_close_in_float32(golden):
    params, batch, expected = golden
    config = dataclasses.replace(SCANNED, product_dtype="bfloat16")
    logits = _logits(config, stack_layers(params), batch)
    real = np.asarray(batch["decoder_target_tokens"]) > 0
    error = np.linalg.norm((np.asarray(logits) - expected)[real]) / np.linalg.norm(expected[real])
    assert 1e-5 < error < 0.05


def test_tied_logits_have_no_output_layer():
    tied = dataclasses.replace(TINY, logits_via_embedding=True, mlp_activations=("relu",))
    names = flatten_dict(nn.unbox(_shapes(tied)), sep="/")
    assert not any("logits_dense" in name for name in names)
    assert "encoder/layers_0/mlp/wi/kernel" in names


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "T5Config.vocab_size = 0: expected a positive integer"),
        ("num_heads", True, "T5Config.num_heads = True: expected a positive integer"),
        ("dropout_rate", 1.0, r"T5Config.dropout_rate = 1.0: expected \[0, 1\)"),
        ("remat", "ful", "T5Config.remat = 'ful': .*did you mean 'full'"),
        ("dtype", "bf16", "T5Config.dtype = 'bf16': .*did you mean 'bfloat16'"),
        ("product_dtype", "bf16", "T5Config.product_dtype = 'bf16': .*did you mean 'bfloat16'"),
        ("mlp_activations", ("geluu",), "did you mean 'gelu'"),
        ("mlp_activations", "gelu", "expected names"),
        ("relative_attention_neighbours", float("nan"), "expected a finite number"),
        ("relative_attention_num_buckets", 6, "expected a multiple of 4"),
    ],
)
def test_config_errors_name_value_and_expectation(field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(TINY, **{field: value})
    assert "\n" not in str(error.value)
