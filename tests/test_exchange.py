"""`flix convert` and `flix export`: networks between formats, and what a run has trained."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_huggingface import GOLDENS
from tiny_runs import make_base_run, write_words

from flix_jax import cli
from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.experiments import exchange, feature_edits, inference, training
from flix_jax.experiments.job import Job
from flix_jax.interop import bases, flix_adapters, huggingface, network, peft
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.training.optimizers import Optimizer, Schedule

FEATURES = {"task": "up", "language": "x"}
TEXT = "task=up,language=x"


@pytest.mark.parametrize("form", ["t5x", "t5x_scanned"])
def test_a_network_goes_from_one_format_to_another_and_back(form, tmp_path, capsys):
    source, there, back = GOLDENS / "mt5", tmp_path / "t5x", tmp_path / "back"
    for one, other, kind in ((source, there, form), (there, back, "huggingface")):
        assert cli.main(["convert", f"--from={one}", f"--out={other}", f"--format={kind}"]) == 0
    assert "width 16, 2 heads of 8, feed-forward 24 (gelu, linear), 2 + 1 layers" in (
        capsys.readouterr().out
    )
    config = bases.config_of(source)
    first, last = bases.read(source, config), bases.read(back, config)
    for name, leaf in first.items():
        np.testing.assert_array_equal(last[name].read(), leaf.read())
    scanned = any("/encoder/" in name for name in bases.t5x_checkpoints.read(there))
    assert scanned == (form == "t5x_scanned")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from=nowhere", "--format=t5x"], "nowhere: no network"),
        ([f"--from={GOLDENS / 'mt5'}", "--format=t5x", "--family=t5"], "family 't5' has no effect"),
        ([f"--from={GOLDENS / 'umt5'}", "--format=huggingface", "--family=mt5"], "a mt5 of Hug"),
    ],
)
def test_a_conversion_that_cannot_be_leaves_nothing(flags, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["convert", f"--out={out}", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    types = (FeatureType("task", rank=2, ranks={"up": 1}), FeatureType("language", rank=3))
    return dataclasses.replace(
        base,
        base=dataclasses.replace(base, total_steps=4, save_every=4),
        adapters=AdapterSpec(FeatureSpace(types), alpha=3.0),
        optimizer=Optimizer("sgd", Schedule(learning_rate=3.0)),
        total_steps=4,
        save_every=4,
    )


@pytest.fixture(scope="module", params=[False, True], ids=["loop", "scan"])
def trained(request, run, tmp_path_factory):
    """(run, its folder, the job, trained, frozen)."""
    folder = tmp_path_factory.mktemp("run") / "run"
    if request.param:
        model = dataclasses.replace(run.model, scan_layers=True)
        run = dataclasses.replace(run, model=model, base=dataclasses.replace(run.base, model=model))
    training.train(run, folder)
    job = Job(run, folder)
    return run, folder, job, *inference.restore(job)[:2]


def examples(job):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(3, 90, (3, 4, 8)), jnp.int32)
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    return dict(zip(names, tokens, strict=True))


def adapted_logits(job, trained, frozen):
    ids = jnp.tile(jnp.asarray(job.space.encode(FEATURES), jnp.int32), (4, 1))
    batch = examples(job) | {"feature_ids": ids}
    return jax.jit(job.model.logits)(tree.join(frozen, trained), batch)


@pytest.mark.parametrize("form", exchange.NETWORKS)
def test_a_folded_network_computes_what_the_adapted_one_does(form, trained, tmp_path):
    run, folder, job, own, frozen = trained
    said = []
    exchange.export(run, folder, tmp_path / "out", form=form, features=TEXT, say=said.append)
    expected = adapted_logits(job, own, frozen)
    config = bases.config_of(tmp_path / "out")
    leaves = network.scanned_as(bases.read(tmp_path / "out", config), config)
    params = network.nested({name: jnp.asarray(leaf.read()) for name, leaf in leaves.items()})
    model = EncoderDecoder(job.model.module.clone(config=config))
    found = jax.jit(model.logits)(params, examples(job))
    largest = jnp.abs(expected).max()
    np.testing.assert_allclose(found / largest, expected / largest, atol=1e-5)
    plain = jax.jit(EncoderDecoder(job.model.module).logits)(frozen, examples(job))
    assert jnp.abs(plain - expected).max() > 1e-3 * largest  # adapters have learnt something
    assert any("rounded to bfloat16" in line for line in said)


def test_a_set_of_features_is_a_lora_of_peft(trained, tmp_path):
    run, folder, job, own, frozen = trained
    exchange.export(run, folder, tmp_path / "out", form="peft", features=TEXT)
    updates = peft.read(tmp_path / "out", run.model)
    assert {update.a.shape[1] for update in updates.values()} == {1 + 3}
    leaves = {n: np.asarray(x) for n, x in network.flat(frozen).items()}
    for name, update in updates.items():
        part, layer, rest = name.split("/", 2)
        kernel, place = f"{name}/kernel", ...
        if run.model.scan_layers:
            number = int(layer.removeprefix("layers_"))
            kernel, place = f"{part}/{part}/{rest}/kernel", (slice(None), number)
        changed = leaves[kernel].copy()
        changed[place] += update.a @ update.b
        leaves[kernel] = changed
    params = network.nested({n: jnp.asarray(x) for n, x in leaves.items()})
    found = jax.jit(EncoderDecoder(job.model.module).logits)(params, examples(job))
    expected = adapted_logits(job, own, frozen)
    largest = jnp.abs(expected).max()
    np.testing.assert_allclose(found / largest, expected / largest, atol=1e-5)


def test_a_lora_that_is_a_set_of_features_can_be_added_as_one_feature(trained, tmp_path):
    run, folder, *_ = trained
    exchange.export(run, folder, tmp_path / "out", form="peft", features=TEXT)
    adapters = exchange.adapters_of(run, folder)
    init = f"peft:{tmp_path / 'out'}"
    found, said = feature_edits.add(adapters, "language=up_x", init=init)
    assert "not in it" not in said and "at rank 4" in said
    (expected, added) = (
        tree.updates(of.tree(), AdapterSpec(of.space, alpha=of.alpha), features)
        for of, features in ((adapters, FEATURES), (found, {"language": "up_x"}))
    )
    for path, (a, b) in expected.items():
        update, other = np.asarray(a @ b), np.asarray(added[path][0] @ added[path][1])
        largest = np.abs(update).max()
        np.testing.assert_allclose(other / largest, update / largest, atol=1e-5)


def test_adapters_alone_come_back_with_what_they_are(trained, tmp_path):
    run, folder, job, own, _ = trained
    exchange.export(run, folder, tmp_path / "out", form="flix")
    found = flix_adapters.read(tmp_path / "out")
    assert (found.space, found.alpha, found.step) == (job.space, 3.0, 4)
    assert found.targets == run.adapters.targets
    assert found.base == job.base_digest(job.load_base())
    assert found.model["emb_dim"] == run.model.emb_dim
    for one, other in zip(jax.tree.leaves(found.tree()), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(one, other)
    record = tmp_path / "out" / flix_adapters.RECORD
    text = json.loads(record.read_text())
    text["space"]["types"][1]["values"].append("q")
    record.write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"language/[ab] is \[.*\], expected 3 values of rank 3"):
        flix_adapters.read(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "peft"}, "peft holds one set of features: name it with --features, of task"),
        ({"form": "flix", "features": TEXT}, "features 'task=up,language=x' have no effect: flix"),
        ({"form": "peft", "features": "task=upp"}, "'upp' is no task; did you mean 'up'"),
        ({"form": "peftt", "features": TEXT}, "unknown format 'peftt'; did you mean 'peft'"),
    ],
)
def test_an_export_that_means_nothing_is_refused(options, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        exchange.export(run, tmp_path / "run", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["huggingface", pytest.param("t5x", marks=pytest.mark.exhaustive)])
def test_a_run_adapts_a_network_of_others(form, run, tmp_path):
    """A base that is written out and read in again trains as the run's own does."""
    short = dataclasses.replace(run, total_steps=2, save_every=2)
    training.train(short, tmp_path / "own", bases_dir=tmp_path / "bases")
    exchange.export(run.base, Job(short, tmp_path / "own").base_dir, tmp_path / "out", form=form)
    foreign = dataclasses.replace(short, base=str(tmp_path / "out"))
    training.train(foreign, tmp_path / "foreign")
    states = [
        inference.restore(Job(r, tmp_path / name))
        for r, name in ((short, "own"), (foreign, "foreign"))
    ]
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)
    half = dataclasses.replace(foreign, frozen_dtype="bfloat16")
    frozen = Job(half, tmp_path / "half").load_base()
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}


def test_a_base_of_another_shape_is_refused_before_training(run, tmp_path):
    config = bases.config_of(GOLDENS / "mt5")
    huggingface.write(bases.read(GOLDENS / "mt5", config), config, tmp_path / "other")
    other = dataclasses.replace(run, base=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"says num_heads 2|of another shape|says head_dim 8"):
        training.train(other, tmp_path / "run")
    assert not (tmp_path / "run").exists()
