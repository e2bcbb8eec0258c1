"""Networks of Hugging Face's compute here what they compute there, and go back as they came."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flix_jax.interop import bases, huggingface, network
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "huggingface"
FAMILIES = ("mt5", "t5_1_1", "byt5", "t5_1_0", "umt5")


def golden(name):
    with np.load(GOLDENS / name / "golden.npz") as arrays:
        return dict(arrays)


def parameters(folder, config):
    leaves = network.scanned_as(bases.read(folder, config), config)
    return network.nested({name: jnp.asarray(leaf.read()) for name, leaf in leaves.items()})


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name, scan):
    arrays = golden(name)
    config = dataclasses.replace(bases.config_of(GOLDENS / name), scan_layers=scan)
    targets = np.ones_like(arrays["decoder_inputs"])
    logits = Transformer(config).apply(
        {"params": parameters(GOLDENS / name, config)},
        jnp.asarray(arrays["inputs"], jnp.int32),
        jnp.asarray(arrays["decoder_inputs"], jnp.int32),
        jnp.asarray(targets, jnp.int32),
        enable_dropout=False,
    )
    largest = np.abs(arrays["logits"]).max()
    np.testing.assert_allclose(logits / largest, arrays["logits"] / largest, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_decoding_is_that_of_transformers(name):
    arrays = golden(name)
    config = bases.config_of(GOLDENS / name)
    model = EncoderDecoder(Transformer(config))
    batch = {"encoder_input_tokens": jnp.asarray(arrays["inputs"], jnp.int32)}
    length = arrays["greedy"].shape[1]
    predict = jax.jit(lambda p, b: model.predict(p, b, max_length=length))
    tokens = np.asarray(predict(parameters(GOLDENS / name, config), batch))
    np.testing.assert_array_equal(tokens, arrays["greedy"])
    assert len({tuple(row) for row in tokens}) > 3


@pytest.mark.parametrize("name", FAMILIES)
def test_beam_search_in_their_manner_is_that_of_transformers(name):
    arrays = golden(name)
    config = bases.config_of(GOLDENS / name)
    model = EncoderDecoder(Transformer(config))
    batch = {"encoder_input_tokens": jnp.asarray(arrays["inputs"], jnp.int32)}
    _, beams, length = arrays["beams"].shape
    predict = jax.jit(
        lambda p, b: model.predict_n(
            p, b, max_length=length, beams=beams, alpha=1.0, manner="huggingface"
        )
    )
    tokens, scores = predict(parameters(GOLDENS / name, config), batch)
    np.testing.assert_allclose(scores, arrays["beam_scores"], atol=1e-5)
    np.testing.assert_array_equal(tokens, arrays["beams"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_goes_out_as_it_came(name, tmp_path):
    config = bases.config_of(GOLDENS / name)
    leaves = bases.read(GOLDENS / name, config)
    family = json.loads((GOLDENS / name / "config.json").read_text())["model_type"]
    huggingface.write(leaves, config, tmp_path, family=family, shard_bytes=8000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    written = {}
    for path in tmp_path.glob("*.safetensors"):
        written |= load_file(path)
    original = load_file(GOLDENS / name / "model.safetensors")
    assert written.keys() == original.keys()
    for key, array in original.items():
        np.testing.assert_array_equal(written[key], array)
    assert bases.config_of(tmp_path) == config
    again = bases.read(tmp_path, config)
    for key, leaf in leaves.items():
        np.testing.assert_array_equal(again[key].read(), leaf.read())


def test_a_smaller_dtype_is_written_when_asked(tmp_path):
    config = bases.config_of(GOLDENS / "mt5")
    leaves = bases.read(GOLDENS / "mt5", config)
    huggingface.write(leaves, config, tmp_path, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, leaf in bases.read(tmp_path, config).items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf.read(), leaves[name].read().astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("changes", "tied", "scaled"),
    [
        ({"tie_word_embeddings": False}, False, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False, False),
        ({"tie_word_embeddings": True, "transformers_version": "5.1"}, False, False),
        ({"tie_word_embeddings": True, "transformers_version": "4.57"}, False, True),
    ],
)
def test_the_output_layer_is_what_both_generations_of_transformers_mean(
    changes, tied, scaled, tmp_path
):
    record = json.loads((GOLDENS / "mt5" / "config.json").read_text())
    for name in ("scale_decoder_outputs", "transformers_version"):
        record.pop(name, None)
    weights = load_file(GOLDENS / "mt5" / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(record | changes))
    config = bases.config_of(tmp_path)
    assert config.logits_via_embedding == (tied and scaled)
    output = bases.read(tmp_path, config)["decoder/logits_dense/kernel"].read()
    expected = weights["lm_head.weight"].T * np.float32(0.25 if scaled else 1.0)
    np.testing.assert_array_equal(output, expected)


def test_a_tied_output_that_is_not_scaled_becomes_one_of_its_own(tmp_path):
    record = json.loads((GOLDENS / "t5_1_0" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {"scale_decoder_outputs": False}))
    weights = load_file(GOLDENS / "t5_1_0" / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    config = bases.config_of(tmp_path)
    assert not config.logits_via_embedding
    output = bases.read(tmp_path, config)["decoder/logits_dense/kernel"].read()
    np.testing.assert_array_equal(output, weights["shared.weight"].T)


def test_a_tied_output_may_be_stored_as_a_copy(tmp_path):
    weights = load_file(GOLDENS / "t5_1_0" / "model.safetensors")
    weights["lm_head.weight"] = weights["shared.weight"].copy()
    save_file(weights, tmp_path / "model.safetensors")
    record = (GOLDENS / "t5_1_0" / "config.json").read_text()
    (tmp_path / "config.json").write_text(record)
    config = bases.config_of(GOLDENS / "t5_1_0")
    assert bases.config_of(tmp_path) == config and config.logits_via_embedding
    assert bases.read(tmp_path, config).keys() == network.shapes(config).keys()


def copy_with(tmp_path, change_weights=lambda weights: None, **record):
    """A copy of mT5 with other weights, or another config."""
    weights = load_file(GOLDENS / "mt5" / "model.safetensors")
    change_weights(weights)
    save_file(weights, tmp_path / "model.safetensors")
    old = json.loads((GOLDENS / "mt5" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(old | record))


def refuse(folder, message, config=None):
    with pytest.raises(ValueError, match=message) as error:
        bases.read(folder, config or bases.config_of(folder))
    assert "\n" not in str(error.value)


def test_every_weight_is_accounted_for_on_both_sides(tmp_path):
    def change(weights):
        weights["encoder.block.0.layer.0.SelfAttention.r.weight"] = weights.pop(
            "encoder.block.0.layer.0.SelfAttention.q.weight"
        )

    copy_with(tmp_path, change)
    refuse(
        tmp_path,
        "missing there: encoder/layers_0/attention/query/kernel; .*SelfAttention.r.weight.*; "
        "left over there: encoder.block.0.layer.0.SelfAttention.r.weight",
    )


def test_copies_of_the_embedding_are_known(tmp_path):
    def change(weights):
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            weights[name] = weights["shared.weight"].copy()

    copy_with(tmp_path, change)
    assert len(bases.read(tmp_path, bases.config_of(tmp_path))) == len(
        network.shapes(bases.config_of(tmp_path))
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"model_type": "bart"}, "model_type is 'bart', expected one of t5, mt5, umt5"),
        ({"feed_forward_proj": "gated-gel"}, "did you mean 'gated-gelu'"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05, expected 1e-06"),
        ({"d_ff": 25}, r"of another shape: .*mlp/wi_0/kernel is \[16, 24\] there, \[16, 25\] here"),
        ({"num_layers": 3}, "missing there: encoder/layers_2/"),
        ({"num_layers": 1}, "left over there: encoder.block.1.layer.0"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(record, message, tmp_path):
    copy_with(tmp_path, **record)
    refuse(tmp_path, message)


def test_a_config_of_ones_own_must_agree_with_what_shapes_do_not_tell(tmp_path):
    copy_with(tmp_path)
    config = bases.config_of(tmp_path)
    other = dataclasses.replace(config, num_heads=4, head_dim=4)
    refuse(tmp_path, "says num_heads 2, but T5Config.num_heads = 4", other)


def test_a_file_that_is_cut_short_is_named(tmp_path):
    copy_with(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors: "):
        bases.config_of(tmp_path)


def test_a_network_that_there_is_not_in_the_family_is_not_written(tmp_path):
    config = T5Config(vocab_size=8, mlp_activations=("tanh", "linear"))
    with pytest.raises(ValueError, match=r"mlp_activations = \('tanh', 'linear'\)"):
        huggingface.write({}, config, tmp_path / "out")
    with pytest.raises(ValueError, match="mt5 of Hugging Face's cannot have its own relative"):
        huggingface.config_record(T5Config(vocab_size=8, relative_attention_per_layer=True), "mt5")
    assert not (tmp_path / "out").exists()
