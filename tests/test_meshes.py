"""One run on one device and on meshes of eight: the same losses, parameters and checkpoints."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from tiny_runs import make_base_run, write_words

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.experiments import training
from flix_jax.experiments.job import Job
from flix_jax.experiments.step_program import step_program
from flix_jax.training.axis_rules import AxisRules
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.partitioning import MeshSpec
from flix_jax.training.reporting import read_metrics

STEPS = 20
MESHES = [
    MeshSpec(data=8),
    MeshSpec(data=4, model=2),
    MeshSpec(data=1, fsdp=4, model=2),
]
# Two tasks are split over fsdp; three languages are not, and their banks are split by width.
BANKS = MeshSpec(
    data=2,
    fsdp=2,
    model=2,
    slices=2,
    rules=AxisRules(
        adapters=(
            ("features", "fsdp"),
            ("mlp", ("fsdp", "model")),
            ("joined_kv", ("data", "fsdp")),
        )
    ),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    types = (
        FeatureType("task", rank=2, dropout=0.3),
        FeatureType("language", ("x", "y", "w"), rank=4),
    )
    return dataclasses.replace(
        base,
        adapters=AdapterSpec(FeatureSpace(types), dropout=0.1),
        total_steps=STEPS,
        loss_chunks=2,
    )


def with_optimizer(run, name):
    rate = {"sgd": 0.3, "adamw": 1e-2}[name]
    return dataclasses.replace(run, optimizer=Optimizer(name, Schedule(learning_rate=rate)))


def test_adapters_and_moments_are_split_by_their_rules(run, tmp_path):
    run = dataclasses.replace(with_optimizer(run, "adamw"), mesh=BANKS)
    job = Job(run, tmp_path)
    job.note_folder()
    state = job.parameters.state_template(job.optimizer())
    moments = optax.tree.get(state.opt_state, "mu")
    for path, bank in tree.named_leaves(state.trained):
        inner, (kind, side) = path[-5], path[-2:]
        spec = bank.sharding.spec  # [features, layers, in, rank] or [features, layers, rank, out]
        assert spec[0] == ("fsdp" if kind == "task" else None), path
        if (inner, side) in (("wi_0", "b"), ("wo", "a")):  # feed-forward width
            wide = spec[3 if side == "b" else 2]
            assert wide == ("model" if kind == "task" else ("fsdp", "model")), path
        moment = functools.reduce(lambda node, name: node[name], path, moments)
        assert moment.sharding == bank.sharding
    plain = dataclasses.replace(run, mesh=dataclasses.replace(BANKS, rules=AxisRules()))
    beside_kernels = Job(plain, tmp_path / "plain").parameters.templates[0]
    assert job.parameters.trained_in_use == beside_kernels
    text = (tmp_path / "parameters.txt").read_text()
    banks = len(jax.tree.leaves(state.trained)) // 2
    assert text.splitlines()[-1] == (
        f"3 features are not split, for 2 parts do not divide them: {banks} banks"
    )


def steps(run, folder, devices):
    """(losses, trained parameters) of the run's own step, on some of the devices."""
    job = Job(run, folder, mesh=run.mesh.make(devices))
    optimizer = job.optimizer()
    template = job.parameters.state_template(optimizer)
    trained, frozen = job.initial_parameters(None)
    state = job.parameters.create_state(trained, optimizer)
    step = step_program(job, template)
    losses = []
    with job.batches(job.pipeline(), 0) as batches:
        for _ in range(STEPS):
            state, metrics = step(state, frozen, next(batches), run.seed)
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.trained)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("sgd", marks=pytest.mark.exhaustive), "adamw"])
def test_a_mesh_changes_neither_losses_nor_parameters(run, name, tmp_path):
    run = with_optimizer(run, name)
    alone = dataclasses.replace(run, mesh=MeshSpec(data=1))
    expected, parameters = steps(alone, tmp_path, jax.devices()[:1])
    assert expected[-1] < expected[0]
    for mesh in (*MESHES, BANKS) if name == "sgd" else (MESHES[-1], BANKS):
        losses, found = steps(dataclasses.replace(run, mesh=mesh), tmp_path, jax.devices())
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=str(mesh))
        if name == "sgd":
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(parameters), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(run, tmp_path, monkeypatch):
    """From one device to eight and back to one."""
    run = dataclasses.replace(with_optimizer(run, "adamw"), log_every=1)
    training.train(dataclasses.replace(run, mesh=MESHES[1]), tmp_path / "whole")
    every = jax.devices()
    for mesh, count, until in ((MeshSpec(data=1), 1, 7), (BANKS, 8, 14), (MeshSpec(data=1), 1, 20)):
        part = dataclasses.replace(run, mesh=mesh, total_steps=until)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda count=count: every[:count])
            training.train(part, tmp_path / "parts")
    expected, found = (
        [x["loss"] for x in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in x]
        for name in ("whole", "parts")
    )
    assert len(found) == STEPS
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.exhaustive
def test_predictions_are_those_of_one_device(run, tmp_path):
    rows = np.random.default_rng(0).integers(3, 300, (8, run.inputs_length), dtype=np.int32)
    ids = np.asarray([[0, 1], [1, 0], [-1, 2], [0, -1]] * 2, np.int32)
    batch = {"encoder_input_tokens": rows, "feature_ids": ids}
    found = []
    for mesh, devices in ((MeshSpec(data=1), jax.devices()[:1]), (BANKS, jax.devices())):
        made = dataclasses.replace(run, mesh=mesh)
        job = Job(made, tmp_path, mesh=mesh.make(devices))
        trained, frozen = job.initial_parameters(None)
        trained = jax.tree.map(
            lambda x: jax.device_put(np.cos(np.arange(x.size)).reshape(x.shape), x.sharding),
            trained,
        )
        found.append(job.predictors(trained, frozen)["generate"](batch))
    np.testing.assert_array_equal(*found)
    assert len(np.unique(found[0])) > 2
