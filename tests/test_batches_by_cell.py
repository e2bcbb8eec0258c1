"""Runs of which consecutive rows of a batch are of one cell, however they are computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import (
    SPLIT_MESH,
    check_same_bits,
    check_same_training,
    check_trials_are_solo_runs,
    make_base_run,
    write_words,
)

from flix_jax.adapters.activation import activate
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.fusion import Fusion
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.experiments import training
from flix_jax.experiments.job import Job
from flix_jax.models.dropout import EXAMPLE_NUMBERS
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.step import gradient_sums

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    types = (FeatureType("task", rank=2, dropout=0.3), FeatureType("language", rank=2, dropout=0.4))
    plain = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    return dataclasses.replace(
        plain,
        adapters=AdapterSpec(FeatureSpace(types)),
        optimizer=Optimizer("sgd", Schedule(learning_rate=0.3)),
        batch_size=64,  # 8 rows of a device
        batching="by_cell",
        rows_per_cell=4,
        tables="banks",
        total_steps=STEPS,
        save_every=2,
        log_every=2,
        keep=5,
    )


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    training.train(run, run_dir)
    return run_dir


def test_a_restarted_run_is_the_run_bit_for_bit(run, whole, tmp_path):
    training.train(dataclasses.replace(run, total_steps=2), tmp_path)
    training.train(run, tmp_path)
    check_same_bits(tmp_path, whole, STEPS)


@pytest.mark.parametrize(
    "changed",
    [
        {"tables": "merged", "microbatches": 2},
        {"tables": "rows"},
        {"microbatches": 4, "tables": "merged"},  # a device has half of a cell's rows at a time
        pytest.param({"tables": "all", "mesh": SPLIT_MESH}, marks=pytest.mark.exhaustive),
        pytest.param({"tables": "merged", "mesh": SPLIT_MESH}, marks=pytest.mark.exhaustive),
        pytest.param(
            {"optimizer": Optimizer("sgd", Schedule(learning_rate=0.3), lazy=True)},
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["merged", "rows", "half", "mesh", "merged on a mesh", "lazy"],
)
def test_a_run_is_the_same_however_it_is_computed(run, whole, changed, tmp_path):
    training.train(dataclasses.replace(run, **changed), tmp_path)
    check_same_training(tmp_path, whole, STEPS)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_gradients_are_those_of_rows_with_the_weights_of_their_group(run, tmp_path, microbatches):
    """Against a model that is told, row by row, which features are dropped."""
    job = Job(run, tmp_path)
    batch = {name: jnp.asarray(of) for name, of in job.pipeline().batch_at(0).items()}
    numbers = jnp.arange(len(batch["feature_ids"]))
    trained, frozen = job.initial_parameters(None)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype), trained)
    key = jax.random.key(5)
    model = dataclasses.replace(job.model, rows_together=4)
    found, sums = jax.jit(gradient_sums(model.loss, microbatches=microbatches, rows_together=4))(
        trained, frozen, batch, key
    )

    features, _ = jax.random.split(key)
    groups = activate(
        job.space, batch["feature_ids"][::4], dropout_rng=features, numbers=numbers[::4] // 4
    )
    assert 0 < float(groups.weights.mean()) < 1  # some are dropped
    types = [dataclasses.replace(t, dropout=0.0) for t in job.space.types]
    plain = dataclasses.replace(
        job.model,
        rows_per_cell=1,
        rows_together=1,
        adapters=dataclasses.replace(
            job.model.adapters, space=dataclasses.replace(job.space, types=tuple(types))
        ),
    )
    told = {"feature_weights": jnp.repeat(groups.weights, 4, axis=0), EXAMPLE_NUMBERS: numbers}
    expected, wanted = jax.jit(gradient_sums(plain.loss))(trained, frozen, batch | told, key)
    np.testing.assert_allclose(sums["loss"], wanted["loss"], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_rows_of_a_group_that_differ_are_no_number(run, tmp_path):
    job = Job(run, tmp_path)
    batch = {name: np.array(of) for name, of in job.pipeline().batch_at(0).items()}
    trained, frozen = job.initial_parameters(None)
    batch["feature_ids"][1] = batch["feature_ids"][1][::-1] + 1
    _, sums = jax.jit(gradient_sums(job.model.loss, rows_together=4))(trained, frozen, batch, None)
    assert np.isnan(float(sums["loss"]))


@pytest.mark.exhaustive
def test_trials_of_one_program_are_their_solo_runs(run, whole, tmp_path):
    check_trials_are_solo_runs(run, whole, tmp_path)


def test_what_is_fastest_is_chosen_and_told(run, tmp_path):
    def used(**changed):
        job = Job(dataclasses.replace(run, **{"tables": "auto", **changed}), tmp_path)
        (column,) = {line.split()[-1] for line in job.match_table().splitlines() if "/mlp/" in line}
        return column

    assert used() == "banks"  # two cells at a time, on a CPU
    assert used(microbatches=2) == "merged"
    assert used(microbatches=4) == "merged"
    assert used(microbatches=8, batching="mixed", rows_per_cell=None) == "banks"
    narrow = dataclasses.replace(run.model, dtype="bfloat16")
    assert used(microbatches=2, model=narrow) == "merged"
    assert used(microbatches=2, frozen_dtype="bfloat16") == "banks"
    assert used(microbatches=2, frozen_dtype="bfloat16", tables="fastest") == "merged"
    assert used(microbatches=2, frozen_dtype="int8", tables="fastest") == "banks"
    dropping = dataclasses.replace(run.adapters, dropout=0.1)
    assert used(microbatches=2, adapters=dropping) == "banks"


def test_the_log_says_what_it_does_to_the_gradient(run, whole):
    told = (whole / "cells.txt").read_text()
    assert (
        "batches by cell: 4 rows of a cell at a time, so that a batch of 64 rows has 16 draws of a "
        "cell: what cells differ in has 4 times the variance in a gradient that it has where every "
        "row is drawn by itself; "
    ) in told
    assert "the rarest, is in one batch of " in told


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batching": "by_cells"}, r"Run.batching = 'by_cells': expected .*'by_cell'"),
        ({"batching": "mixed"}, r"Run.rows_per_cell = 4 has no effect without"),
        ({"rows_per_cell": 0}, r"Run.rows_per_cell must be at least 1, got 0"),
        ({"rows_per_cell": 6}, r"Run.batch_size = 64: expected a multiple of Run.rows_per_cell"),
        ({"packing": True}, r"Run.batching = 'by_cell': packed rows have the cells that fill"),
    ],
)
def test_refused_in_the_run(run, changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(run, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frozen_dtype": "int8"}, "Run.tables = 'merged': Run.frozen_dtype = 'int8': such kernel"),
        ({"packing": "mixed"}, "Run.tables = 'merged': Run.packing = 'mixed': examples of a row"),
        ({"adapters": None}, "Run.tables = 'merged' has no effect without Run.adapters"),
    ],
)
def test_kernels_that_cannot_hold_the_update_are_refused(run, changed, message):
    plain = dataclasses.replace(run, batching="mixed", rows_per_cell=None)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plain, tables="merged", **changed)
    for spec, told in (
        (dataclasses.replace(run.adapters, dropout=0.1), "AdapterSpec.dropout = 0.1 is of"),
        (dataclasses.replace(run.adapters, fusion=Fusion("add")), "where layers are fused"),
    ):
        with pytest.raises(ValueError, match=told):
            dataclasses.replace(plain, tables="merged", adapters=spec)
