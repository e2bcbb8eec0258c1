"""A frozen base as int8: against a quantiser in NumPy, against the float base, in whole runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_meshes import steps
from tiny_runs import make_base_run, write_words

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.experiments import (
    exchange,
    inference,
    plan,
    plan_text,
    together,
    topology,
    training,
)
from flix_jax.experiments.job import Job
from flix_jax.interop import bases, network
from flix_jax.models import int8
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.partitioning import MeshSpec
from flix_jax.training.reporting import read_metrics

RNG = np.random.default_rng(0)


def reference(weights, axis):
    """(integers, scales) channel by channel, in float64."""
    rows = np.moveaxis(np.asarray(weights, np.float64), axis, 0)
    found, scales = np.zeros_like(rows), np.zeros(rows.shape[1:])
    for channel in np.ndindex(scales.shape):
        column = rows[(slice(None), *channel)]
        scales[channel] = max(column.max(), -column.min()) / 127
        if scales[channel] > 0:
            found[(slice(None), *channel)] = np.round(column / scales[channel])
    return np.moveaxis(found, 0, axis), np.expand_dims(scales, axis)


@pytest.mark.parametrize("shape", [(12, 7), (6, 3, 5)])
@pytest.mark.parametrize("name", ["kernel", "embedding"])
def test_weights_move_by_half_a_scale_at_most(shape, name):
    weights = (RNG.normal(size=shape) * RNG.uniform(0.01, 10, size=shape[-1])).astype(np.float32)
    weights[..., 0] = 0.0
    axis = int8.AXES[name]
    integers, scales = reference(weights, axis)
    given = {"layer": {name: jnp.asarray(weights), "scale": jnp.ones(3)}}
    found = int8.quantise(given)["layer"]
    assert found[name].dtype == jnp.int8 and found["scale"].dtype == jnp.float32
    np.testing.assert_allclose(found[f"{name}_scale"], scales, rtol=1e-6)
    exact = weights / np.where(scales == 0, 1, scales)
    tie = np.abs(np.abs(exact) % 1 - 0.5) < 1e-4
    assert tie.mean() < 0.1
    np.testing.assert_array_equal(np.where(tie, 0, found[name]), np.where(tie, 0, integers))
    np.testing.assert_array_equal(int8.scales(weights, axis), found[f"{name}_scale"])
    np.testing.assert_array_equal(int8.integers(weights, int8.scales(weights, axis)), found[name])
    again = int8.dequantise({"layer": found})["layer"]
    assert set(again) == {name, "scale"}
    error = np.abs(np.asarray(again[name], np.float64) - weights)
    assert (error <= scales / 2 * (1 + 1e-5)).all()
    assert error[..., 1:].max() > 0


@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
def test_the_product_and_its_gradient(operands):
    weights = RNG.normal(size=(24, 10)).astype(np.float32)
    pair = int8.quantise({"kernel": jnp.asarray(weights)})
    x, wanted = RNG.normal(size=(6, 24)), RNG.normal(size=(6, 10))
    x, wanted = (np.asarray(jnp.asarray(a, operands), np.float64) for a in (x, wanted))
    kernel = np.asarray(pair["kernel"], np.float64) * np.asarray(pair["kernel_scale"], np.float64)

    def product(x):
        return int8.matmul(x, pair["kernel"], pair["kernel_scale"], operands)

    found, pull = jax.vjp(jax.jit(product), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, x @ kernel, rtol=1e-5, atol=1e-5)
    gradient = pull(jnp.asarray(wanted, jnp.float32))[0]
    # A gradient is rounded to the operands' dtype once, after its scale.
    rounding = {"float32": 2.0**-23, "bfloat16": 2.0**-8}[operands]
    error = np.abs(gradient - wanted @ kernel.T)
    assert (error <= rounding * (np.abs(wanted) @ np.abs(kernel.T)) + 1e-5).all()


SPEC = AdapterSpec(FeatureSpace((FeatureType("task", ("a", "b"), rank=2),)))
SHAPES = {
    "encoder_input_tokens": (3, 6),
    "decoder_input_tokens": (3, 4),
    "decoder_target_tokens": (3, 4),
    "feature_ids": (3, 1),
}


@functools.cache
def networks(scan, tied, one_hot=False):
    """(model, adapters, the base: as float32, as int8, and dequantised; a batch)."""
    config = T5Config(
        vocab_size=40,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=24,
        num_encoder_layers=2,
        num_decoder_layers=2,
        dropout_rate=0.0,
        scan_layers=scan,
        remat="minimal" if scan else "none",
        logits_via_embedding=tied,
        one_hot_embedding=one_hot,
    )
    model = EncoderDecoder(Transformer(config), SPEC)
    params = jax.jit(lambda key: nn.unbox(model.init(key, SHAPES)))(jax.random.key(0))
    base, adapters = tree.split_adapters(params)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, jnp.float32), adapters
    )
    batch = {name: jnp.asarray(rng.integers(2, 40, s), jnp.int32) for name, s in SHAPES.items()}
    batch["feature_ids"] = jnp.asarray([[0], [1], [-1]], jnp.int32)
    narrow = int8.quantise(base)
    return model, adapters, {"float": base, "int8": narrow, "wide": int8.dequantise(narrow)}, batch


@pytest.mark.parametrize(
    ("scan", "tied"), [(True, False), pytest.param(False, True, marks=pytest.mark.exhaustive)]
)
def test_a_network_computes_with_the_dequantised_weights(scan, tied):
    """Logits, gradients of adapters and decoding; near the float base, and not equal to it."""
    model, adapters, of, batch = networks(scan, tied)
    logits, gradients = {}, {}
    loss = jax.jit(jax.grad(lambda a, b: model.loss(tree.join(b, a), batch)[0]))
    for name, base in of.items():
        logits[name] = jax.jit(model.logits)(tree.join(base, adapters), batch)
        gradients[name] = np.concatenate(
            [np.ravel(g) for g in jax.tree.leaves(loss(adapters, base))]
        )

    def apart(values, one, other):
        return np.abs(values[one] - values[other]).max() / np.abs(values[other]).max()

    for values in (logits, gradients):
        assert apart(values, "int8", "wide") < 1e-5
        assert 1e-4 < apart(values, "int8", "float") < 0.05
    predict = jax.jit(functools.partial(model.predict, max_length=5))
    one, other = (predict(tree.join(of[name], adapters), batch) for name in ("int8", "wide"))
    np.testing.assert_array_equal(one, other)


def test_tokens_are_looked_up_either_way():
    (model, adapters, of, batch), by_product = networks(True, False), networks(True, False, True)[0]
    params = tree.join(of["int8"], adapters)
    one, other = (jax.jit(m.logits)(params, batch) for m in (model, by_product))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    beyond = batch | {"encoder_input_tokens": batch["encoder_input_tokens"].at[0, 0].set(40)}
    assert np.isnan(jax.jit(model.logits)(params, beyond)[0]).all()


def test_chunks_of_the_loss_read_an_int8_output_layer():
    model, adapters, of, batch = networks(True, False)
    found = []
    for chunks in (1, 2):
        whole = dataclasses.replace(model, loss_chunks=chunks)
        step = jax.jit(
            jax.value_and_grad(lambda a, m=whole: m.loss(tree.join(of["int8"], a), batch)[0])
        )
        found.append(jax.tree.leaves(step(adapters)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_folding_wants_the_dequantised_base():
    _, adapters, of, _ = networks(True, False)
    with pytest.raises(ValueError, match="kernel is int8, expected floating point: dequantise"):
        tree.fold(of["int8"], adapters, SPEC, {"task": "a"})
    folded = tree.fold(of["wide"], adapters, SPEC, {"task": "a"})
    assert jax.tree.structure(folded) == jax.tree.structure(of["float"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Beside a base that is a folder of Hugging Face's."""
    base = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    folder = tmp_path_factory.mktemp("base")
    training.train(base, folder / "run", show_cells=False)
    exchange.export(base, folder / "run", folder / "out", form="huggingface")
    types = (FeatureType("task", rank=2, dropout=0.3), FeatureType("language", rank=2))
    return dataclasses.replace(
        base,
        base=str(folder / "out"),
        adapters=AdapterSpec(FeatureSpace(types)),
        frozen_dtype="int8",
        optimizer=Optimizer("adamw", Schedule(learning_rate=1e-2)),
        total_steps=20,
        log_every=1,
    )


def test_a_base_is_quantised_as_it_is_read(run, tmp_path):
    """In parts, on a mesh that splits every axis, to the bit of the whole base quantised."""
    mesh = MeshSpec(data=1, fsdp=4, model=2)
    job = Job(dataclasses.replace(run, mesh=mesh), tmp_path)
    found, template = job.load_base(), job.frozen_template
    plain = Job(dataclasses.replace(run, mesh=mesh, frozen_dtype=None), tmp_path)
    whole = plain.load_base()
    for other in (int8.quantise(whole), job.parameters.frozen_of(whole, "int8")):
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(one, two)
    assert job.frozen_parameters(found) is found
    drawn = job.parameters.random(0, "int8")[1]
    for made in (found, job.parameters.frozen_of(whole, "int8"), drawn):
        assert jax.tree.structure(made) == jax.tree.structure(template)
        for leaf, shape in zip(jax.tree.leaves(made), jax.tree.leaves(template), strict=True):
            assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
            assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)


@pytest.mark.exhaustive
def test_a_run_trains_beside_it(run, tmp_path):
    """It learns, near to the float base; what it trained alone is kept, and goes out whole."""
    training.train(run, tmp_path / "run", show_cells=False)
    training.train(
        dataclasses.replace(run, frozen_dtype=None), tmp_path / "float", show_cells=False
    )
    losses, plain = (
        np.array(
            [x["loss"] for x in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in x]
        )
        for name in ("run", "float")
    )
    assert losses[-5:].mean() < losses[:5].mean()
    np.testing.assert_allclose(losses, plain, rtol=0.02)
    assert np.abs(losses - plain).max() > 0
    job = Job(run, tmp_path / "run")
    trained, frozen, _ = inference.restore(job)
    assert int8.is_quantised(frozen) and not int8.is_quantised(trained)
    assert "kernel_scale" in (tmp_path / "run" / "parameters.txt").read_text()
    features = {"task": "up", "language": "y"}
    exchange.export(
        run, tmp_path / "run", tmp_path / "out", form="huggingface", features="task=up,language=y"
    )
    config = bases.config_of(tmp_path / "out")
    leaves = network.scanned_as(bases.read(tmp_path / "out", config), config)
    params = network.nested({name: jnp.asarray(leaf.read()) for name, leaf in leaves.items()})
    batch = {name: jnp.asarray(RNG.integers(3, 90, (4, 6)), jnp.int32) for name in list(SHAPES)[:3]}
    ids = jnp.tile(jnp.asarray(job.space.encode(features), jnp.int32), (4, 1))
    expected = jax.jit(job.model.logits)(tree.join(frozen, trained), batch | {"feature_ids": ids})
    alone = EncoderDecoder(Transformer(config))
    found = jax.jit(alone.logits)(params, batch)
    folded = jax.jit(EncoderDecoder(job.model.module).logits)(
        job.folded(trained, frozen, features), batch
    )
    largest = jnp.abs(expected).max()
    for logits in (found, folded):
        np.testing.assert_allclose(logits / largest, expected / largest, atol=1e-5)


@pytest.mark.exhaustive
def test_a_mesh_changes_no_loss(run, tmp_path):
    losses = [
        steps(dataclasses.replace(run, base="random", mesh=mesh), tmp_path, devices)[0]
        for mesh, devices in (
            (MeshSpec(data=1), jax.devices()[:1]),
            (MeshSpec(data=1, fsdp=4, model=2), jax.devices()),
        )
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.exhaustive
def test_trials_of_one_program_share_it(run, tmp_path):
    short = dataclasses.replace(run, total_steps=3, save_every=3)
    runs = [dataclasses.replace(short, seed=seed, data_seed=0) for seed in (0, 1)]
    together.train_together(
        runs,
        [tmp_path / "0", tmp_path / "1"],
        bases_dir=tmp_path / "bases",
        configs=[None, None],
        splits=(),
        log_dir=tmp_path / "log",
        title="both",
    )
    training.train(runs[1], tmp_path / "alone", show_cells=False)
    one, other = (
        [x["loss"] for x in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in x]
        for name in ("1", "alone")
    )
    assert len(one) == 3
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.exhaustive
def test_a_plan_tells_what_it_takes(run):
    made, plain = (
        plan.make(dataclasses.replace(run, frozen_dtype=dtype), topology.find("cpu:8"))
        for dtype in ("int8", "float32")
    )
    shapes = network.shapes(run.model)
    matrices = {n: s for n, s in shapes.items() if n.rpartition("/")[2] in int8.AXES}
    channels = sum(s[1 - int8.AXES[n.rpartition("/")[2]]] for n, s in matrices.items())
    count, small = (sum(map(np.prod, of)) for of in (shapes.values(), matrices.values()))
    assert made.parameters["base"] == plain.parameters["base"] == count
    assert made.state["base"] == small + 4 * channels + 4 * (count - small)
    assert plain.state["base"] == 4 * count
    saved = plain.state["base"] - made.state["base"]
    for program in ("train", "decode"):
        one, other = getattr(made, program), getattr(plain, program)
        assert other.arguments - one.arguments == saved
    assert "frozen (int8)" in plan_text.to_markdown(made)


def test_a_dtype_that_there_is_not(run):
    with pytest.raises(ValueError, match=r"frozen_dtype 'int4' is none of .*'int8'"):
        dataclasses.replace(run, frozen_dtype="int4")
