"""FLix on T5X's own networks and under its own trainer, where T5X is installed."""

import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.fusion import Fusion
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.interop import network, t5x_checkpoints
from flix_jax.interop.leaves import Leaf
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer

pytest.importorskip("t5x.models", reason="T5X is not installed")

ROOT = pathlib.Path(__file__).parent.parent
SPACE = FeatureSpace(
    (
        FeatureType("task", ("ner", "qa"), rank=2, dropout=0.5),
        FeatureType("language", ("sw", "yo", "zu"), rank=3, dropout=0.5),
    )
)
ROWS, INPUTS, TARGETS = 4, 8, 6


def batch():
    rng = np.random.default_rng(0)
    inputs = rng.integers(3, 60, (ROWS, INPUTS))
    inputs[1, 5:] = 0
    targets = rng.integers(3, 60, (ROWS, TARGETS))
    shifted = np.concatenate([np.zeros((ROWS, 1), int), targets[:, :-1]], axis=1)
    arrays = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones((ROWS, TARGETS)),
        "feature_ids": [[0, 0], [1, 2], [0, -1], [1, 1]],
    }
    return {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}


def make(name, adapters):
    """T5X's model with adapters, and its variables."""
    import seqio
    from t5x import adafactor

    from flix_jax.interop import t5x_models

    module = importlib.import_module(f"t5x.examples.{name}.network")
    more = {"scan_layers": True} if name == "scalable_t5" else {}
    config = module.T5Config(
        vocab_size=64,
        emb_dim=16,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=8,
        mlp_dim=32,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
        dtype=jnp.float32,
        **more,
    )
    vocabulary = seqio.PassThroughVocabulary(64, eos_id=1)
    model = t5x_models.FlixModel(
        module=module.Transformer(config),
        adapters=adapters,
        input_vocabulary=vocabulary,
        output_vocabulary=vocabulary,
        optimizer_def=t5x_models.adapters_only(adafactor.Adafactor(0.1, factored=False)),
    )
    shapes = {name: array.shape for name, array in batch().items()}
    return model, model.get_initial_variables(jax.random.key(0), shapes)


def drawn(variables):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(x + 0.2 * rng.normal(size=x.shape), x.dtype), variables["params"]
    )


@pytest.fixture(scope="module", params=["t5", "scalable_t5"])
def case(request):
    """(T5X's model with adapters, its variables with values drawn, the name of its network)."""
    model, variables = make(request.param, AdapterSpec(SPACE, alpha=3.0))
    return model, variables, drawn(variables), request.param


def test_every_parameter_has_logical_axes(case):
    from t5x import train_state

    model, variables, _, name = case
    state = train_state.FlaxOptimTrainState.create(model.optimizer_def, variables)
    axes = state.as_logical_axes().params
    banks = {k: v for k, v in network.flat(axes).items() if "/flix/" in k}
    assert banks and all(
        len(spec) == (4 if name == "scalable_t5" else 3) for spec in banks.values()
    )
    moments = jax.tree.leaves(state.param_states)
    assert len(moments) > 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.param_states):
        assert "flix" in jax.tree_util.keystr(path), leaf.shape


def test_logits_are_those_of_the_network_here(case):
    """The same parameters in this package's network, adapters by NumPy-checked code."""
    model, _, params, name = case
    base, adapters = tree.split_adapters(params)
    leaves = {n: Leaf.of(x, n) for n, x in network.flat(base).items()}
    config = network.config_of(leaves, name)
    scan = name == "scalable_t5"
    config = dataclasses.replace(config, scan_layers=scan)
    fitted = network.scanned_as(network.fit(leaves, config, name), config)
    here = network.nested({n: jnp.asarray(leaf.read()) for n, leaf in fitted.items()})
    ours = EncoderDecoder(Transformer(config), AdapterSpec(SPACE, alpha=3.0))
    expected = ours.logits(tree.join(here, adapters), batch())
    found = model._compute_logits(params, batch())
    largest = jnp.abs(expected).max()
    np.testing.assert_allclose(found / largest, expected / largest, atol=1e-5)
    without = model._compute_logits(
        params, batch() | {"feature_ids": batch()["feature_ids"] * 0 - 1}
    )
    assert jnp.abs(without - found).max() > 0.05 * largest


def test_the_base_gets_no_gradient_and_features_drop_out(case):
    model, _, params, _ = case
    loss = lambda p, key: model.loss_fn(p, batch(), key)[0]  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params, jax.random.key(0))
    base, adapters = tree.split_adapters(grads)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(base))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(adapters))
    values = {round(float(jax.jit(loss)(params, jax.random.key(seed))), 3) for seed in range(4)}
    assert len(values) > 1


def test_every_hypothesis_has_the_features_of_its_row(case):
    model, _, params, _ = case
    whole, aux = model.predict_batch_with_aux(
        params, batch(), return_all_decodes=True, num_decodes=3
    )
    assert whole.shape[:2] == (ROWS, 3)
    for row in range(ROWS):
        one = {name: array[row : row + 1] for name, array in batch().items()}
        alone, scores = model.predict_batch_with_aux(
            params, one, return_all_decodes=True, num_decodes=3
        )
        np.testing.assert_array_equal(alone[0], whole[row])
        np.testing.assert_allclose(scores["scores"][0], aux["scores"][row], rtol=1e-4)


def with_sources():
    rng = np.random.default_rng(2)
    sources = rng.integers(3, 60, (ROWS, INPUTS))
    sources[0, 3:] = 0
    sources[2] = 0  # none
    return batch() | {"source_input_tokens": jnp.asarray(sources, jnp.int32)}


@pytest.mark.parametrize("function", ["add_relu", "cross_attention_from_target"])
def test_sources_are_fused_as_in_the_network_here(function):
    spec = AdapterSpec(SPACE, alpha=3.0, fusion=Fusion(function))
    model, variables = make("t5", spec)
    params = drawn(variables)
    base, adapters = tree.split_adapters(params)
    leaves = {n: Leaf.of(x, n) for n, x in network.flat(base).items()}
    config = network.config_of(leaves, "t5")
    fitted = network.scanned_as(network.fit(leaves, config, "t5"), config)
    here = network.nested({n: jnp.asarray(leaf.read()) for n, leaf in fitted.items()})
    ours = EncoderDecoder(Transformer(config), spec)
    expected = ours.logits(tree.join(here, adapters), with_sources())
    found = model._compute_logits(params, with_sources())
    largest = jnp.abs(expected).max()
    np.testing.assert_allclose(found / largest, expected / largest, atol=1e-5)
    none = with_sources() | {"source_input_tokens": jnp.zeros((ROWS, INPUTS), jnp.int32)}
    moved = jnp.abs(model._compute_logits(params, none) - found).max(axis=(1, 2))
    assert moved[2] == 0 and (moved[jnp.array([0, 1, 3])] > 1e-3 * largest).all()
    tokens, _ = model.predict_batch_with_aux(params, with_sources(), num_decodes=1)
    rows = [
        model.predict_batch_with_aux(
            params, {k: v[row : row + 1] for k, v in with_sources().items()}, num_decodes=1
        )[0][0]
        for row in range(ROWS)
    ]
    np.testing.assert_array_equal(tokens, rows)
    greedy = ours.predict(tree.join(here, adapters), with_sources(), max_length=TARGETS)
    np.testing.assert_array_equal(tokens, greedy)


def test_a_scanned_network_of_t5x_says_that_it_reads_no_source():
    spec = AdapterSpec(SPACE, fusion=Fusion("add"))
    model, variables = make("scalable_t5", spec)
    with pytest.raises(ValueError, match="a scan around it does not carry 'layer_states'"):
        model._compute_logits(variables["params"], with_sources())


def test_packing_is_refused():
    from flix_jax.interop import t5x_models

    with pytest.raises(ValueError, match=r"DatasetConfig.pack = True: rows with feature ids"):
        t5x_models.converter_for(2, pack=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "scalable_t5"])
def test_its_trainer_moves_the_adapters_and_leaves_the_base(name, tmp_path):
    for language in ("sw", "yo"):
        for split in ("train", "validation"):
            path = tmp_path / "data" / "ner" / split / f"{language}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            span = {"start_byte": 0, "limit_byte": 4, "label": "LOC"}
            records = [{"text": f"Lagos {i}", "spans": [span]} for i in range(16)]
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [
        *(sys.executable, "-m", "t5x.train", f"--gin_search_paths={ROOT}"),
        f"--gin_file=configs/t5x/tiny_{name}.gin",
        f"--gin.DATA_DIR='{tmp_path / 'data'}'",
        f"--gin.MODEL_DIR='{tmp_path / 'model'}'",
        "--gin.TRAIN_STEPS=20",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = (
        t5x_checkpoints.read(tmp_path / "model" / f"checkpoint_{step}") for step in (0, 20)
    )
    for parameter, leaf in first.items():
        same = np.array_equal(leaf.read(), last[parameter].read())
        assert same == ("/flix/" not in parameter), parameter
