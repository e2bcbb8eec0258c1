"""Runs whose batches are packed: they go on as they were, and say how full their rows are."""

import dataclasses

import pytest
from tiny_runs import (
    SPLIT_MESH,
    check_same_bits,
    check_same_training,
    check_trials_are_solo_runs,
    logged,
    make_base_run,
    write_words,
)

from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data import packing
from flix_jax.data.pipeline import SEGMENTS
from flix_jax.experiments import training
from flix_jax.experiments.job import Job
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.partitioning import MeshSpec

STEPS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    types = (FeatureType("task", rank=2, dropout=0.3), FeatureType("language", rank=2))
    plain = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    return dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, dropout_rate=0.0),
        adapters=AdapterSpec(FeatureSpace(types)),
        optimizer=Optimizer("adamw", Schedule(learning_rate=1e-2)),
        inputs_length=20,
        targets_length=16,
        batch_size=16,
        packing=True,
        total_steps=STEPS,
        save_every=12,
        log_every=4,
        keep=5,
    )


@pytest.fixture(scope="module", autouse=True)
def small_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", 64)  # of 64 examples: two or three steps
        yield


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    training.train(run, run_dir)
    return run_dir


def test_a_restarted_run_is_the_run_bit_for_bit(run, whole, tmp_path):
    training.train(dataclasses.replace(run, total_steps=12), tmp_path)
    training.train(run, tmp_path)
    check_same_bits(tmp_path, whole, STEPS)
    assert logged(whole)[-1][0] == STEPS


def test_it_learns_from_all_that_the_rows_hold(run, whole):
    pipeline = Job(run, whole).pipeline()
    tokens = sum((pipeline.batch_at(s)["decoder_target_tokens"] > 0).sum() for s in range(STEPS))
    losses = [loss for _, loss, _ in logged(whole)]
    assert logged(whole)[-1][2] == tokens > 1.5 * STEPS * run.batch_size * 5  # a word and its end
    assert losses[-1] < losses[0]


def test_the_folder_says_how_full_rows_are(run, whole):
    job = Job(run, whole)
    told = job.pipeline().report().packing.line()
    assert (
        told.startswith("packed: 2.8 examples a row; 70% of")
        and told in (whole / "cells.txt").read_text()
    )
    shapes = {name: array.shape for name, array in job.pipeline().batch_at(0).items()}
    assert job.batch_shapes(run.batch_size) == shapes


def test_a_folder_goes_on_packed_or_not_as_it_began(run, whole):
    with pytest.raises(ValueError, match="packing is True there and False here; packing cannot"):
        Job(dataclasses.replace(run, packing=False), whole)


# Rows of any examples, each with its own features.


@pytest.fixture(scope="module")
def mixed(run):
    return dataclasses.replace(
        run,
        packing="mixed",
        examples_per_row=4,
        tables="banks",
        optimizer=Optimizer("sgd", Schedule(learning_rate=0.3)),
        batch_size=8,
        total_steps=4,
        save_every=2,
        log_every=2,
    )


@pytest.fixture(scope="module")
def mixed_whole(mixed, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("mixed")
    training.train(mixed, run_dir)
    return run_dir


def test_a_restarted_mixed_run_is_the_run_bit_for_bit(mixed, mixed_whole, tmp_path):
    training.train(dataclasses.replace(mixed, total_steps=2), tmp_path)
    training.train(mixed, tmp_path)
    check_same_bits(tmp_path, mixed_whole, 4)


def test_mixed_batches_are_as_announced(mixed, mixed_whole):
    job = Job(mixed, mixed_whole)
    batch = job.pipeline().batch_at(0)
    assert job.batch_shapes(8) == {name: array.shape for name, array in batch.items()}
    assert (batch["feature_ids"][:, :, 0] >= 0).sum(axis=1).max() > 2
    several = [len({tuple(ids) for ids in row if ids[0] >= 0}) for row in batch["feature_ids"]]
    assert max(several) > 1
    assert job.batch_shapes(8, training=False)["feature_ids"] == (8, 2)
    assert not set(job.batch_shapes(8, training=False)) & set(SEGMENTS)


@pytest.mark.parametrize(
    "changed",
    [
        {"tables": "all"},
        {"tables": "rows"},
        {"optimizer": Optimizer("sgd", Schedule(learning_rate=0.3), lazy=True)},
        pytest.param({"tables": "rows", "mesh": SPLIT_MESH}, marks=pytest.mark.exhaustive),
        pytest.param(
            {"microbatches": 2, "mesh": MeshSpec(data=4, model=2)}, marks=pytest.mark.exhaustive
        ),
    ],
    ids=["all", "rows", "lazy", "rows on a mesh", "microbatches on a mesh"],
)
def test_a_mixed_run_is_the_same_however_it_is_computed(mixed, mixed_whole, changed, tmp_path):
    training.train(dataclasses.replace(mixed, **changed), tmp_path)
    check_same_training(tmp_path, mixed_whole, 4)


@pytest.mark.exhaustive
def test_trials_of_one_program_are_their_solo_runs(run, whole, tmp_path):
    check_trials_are_solo_runs(run, whole, tmp_path)
