"""Runs whose batches are of nearly one length: the same training, on any devices, told in full."""

import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from tiny_runs import (
    SPLIT_MESH,
    check_same_bits,
    check_same_training,
    check_trials_are_solo_runs,
    make_base_run,
)

from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.fusion import Fusion
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data import length_buckets
from flix_jax.data.denoising import SpanCorruption
from flix_jax.data.pipeline import SOURCE_TOKENS
from flix_jax.experiments import (
    data_notes,
    flops,
    plan,
    plan_text,
    topology,
    training,
)
from flix_jax.experiments.job import Job
from flix_jax.tasks.source_text import SourceText
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.partitioning import MeshSpec
from flix_jax.training.reporting import read_metrics
from flix_jax.training.step import gradient_sums

STEPS = 6
WINDOW = 4  # batches: every run sees two windows
PEAK = 1e12
SEVERAL = {"inputs": 3, "targets": 2}
FULL = {"encoder_input_tokens": 16, SOURCE_TOKENS: 16}  # targets: 8


def write_lengths(root):
    """As `tiny_runs.write_words`, of words that are long in one task and short in the other."""
    rng = np.random.default_rng(0)
    for task, most in (("up", 5), ("back", 14)):
        for language, letters in (("x", "abc"), ("y", "def"), ("z", "ghi")):
            for split, count in (("train", 30), ("validation", 5)):
                sizes = rng.integers(1, most, count)
                words = ["".join(rng.choice(list(letters), size)) for size in sizes]
                path = root / task / split / f"{language}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps({"input": word, "target": word[:6]}) for word in words]
                path.write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    types = (FeatureType("task", rank=2, dropout=0.3), FeatureType("language", rank=2))
    plain = make_base_run(write_lengths(tmp_path_factory.mktemp("data")))
    return dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, dropout_rate=0.0),
        adapters=AdapterSpec(FeatureSpace(types)),
        optimizer=Optimizer("sgd", Schedule(learning_rate=0.3)),
        inputs_length=16,
        targets_length=8,
        length_buckets={"inputs": 2, "targets": 1},
        total_steps=STEPS,
        save_every=4,
        log_every=2,
        keep=5,
    )


@pytest.fixture(scope="module", autouse=True)
def small_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length_buckets, "BATCHES", WINDOW)
        yield


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    training.train(run, run_dir)
    return run_dir


def shapes(pipeline, steps=STEPS):
    return [tuple(pipeline.lengths_at(step).values()) for step in range(steps)]


def test_a_restarted_run_is_the_run_bit_for_bit(run, whole, tmp_path):
    training.train(dataclasses.replace(run, total_steps=4), tmp_path)
    training.train(run, tmp_path)
    check_same_bits(tmp_path, whole, STEPS)
    assert len(set(shapes(Job(run, whole).pipeline()))) > 1


@pytest.mark.parametrize(
    "changed",
    [
        {"mesh": MeshSpec(data=2, fsdp=2, model=2), "microbatches": 2},
        {"loss_chunks": 2, "tables": "rows"},
        {"optimizer": Optimizer("sgd", Schedule(learning_rate=0.3), lazy=True)},
        pytest.param({"tables": "all", "mesh": SPLIT_MESH}, marks=pytest.mark.exhaustive),
    ],
    ids=["mesh and microbatches", "chunks and rows", "lazy", "all on a mesh"],
)
def test_a_run_is_the_same_however_it_is_computed(run, whole, changed, tmp_path):
    training.train(dataclasses.replace(run, **changed), tmp_path)
    check_same_training(tmp_path, whole, STEPS)


def padded(batch):
    """The batch at the full lengths of the run."""

    def pad(name, array):
        if name == "feature_ids":
            return array
        return np.pad(array, ((0, 0), (0, FULL.get(name, 8) - array.shape[1])))

    return {name: pad(name, array) for name, array in batch.items()}


@pytest.mark.parametrize("sources", [None, "add", "cross_attention", "length of their own"])
def test_loss_and_gradients_are_those_of_the_padded_batch(run, tmp_path, sources):
    if sources is not None:
        own = sources == "length of their own"
        text = SourceText({"up": "{input}", "back": "{input}"}, length=12 if own else None)
        fused = dataclasses.replace(run.adapters, fusion=Fusion("add" if own else sources))
        run = dataclasses.replace(run, adapters=fused, source_text=text)
    job = Job(dataclasses.replace(run, length_buckets=SEVERAL), tmp_path)
    pipeline = job.pipeline()
    trained, frozen = job.initial_parameters(None)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.1).astype(x.dtype), trained)
    sums_of = jax.jit(gradient_sums(job.model.loss))
    for step in range(WINDOW):
        batch = pipeline.batch_at(step)
        whole = padded(batch)
        if sources == "length of their own":
            assert batch[SOURCE_TOKENS].shape[1] == 12
            whole[SOURCE_TOKENS] = batch[SOURCE_TOKENS]
        found, sums = sums_of(trained, frozen, batch, None)
        expected, wanted = sums_of(trained, frozen, whole, None)
        np.testing.assert_allclose(sums["loss"], wanted["loss"], rtol=1e-5)
        assert sums["weight"] == wanted["weight"] > 0
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())
    assert len(set(shapes(pipeline))) > 1


def test_examples_that_change_are_as_long_as_they_come_out(run, tmp_path):
    noise = SpanCorruption(run.vocabulary, noise_density=0.3)
    noisy = dataclasses.replace(run, transforms={"back/*": noise}, read_lengths=(16, 8))
    pipeline = Job(noisy, tmp_path).pipeline()
    for step in range(STEPS):
        for side, name in (
            ("inputs", "encoder_input_tokens"),
            ("targets", "decoder_target_tokens"),
        ):
            batch = pipeline.batch_at(step)[name]
            assert batch.shape[1] == pipeline.lengths_at(step)[side]
    counted = pipeline.report().by_length.target_tokens
    tokens = [int((pipeline.batch_at(s)["decoder_target_tokens"] > 0).sum()) for s in range(WINDOW)]
    assert counted == (min(tokens), max(tokens))


def test_rows_of_a_cell_are_sorted_as_one(run, tmp_path):
    by_cell = dataclasses.replace(
        run, batching="by_cell", rows_per_cell=4, mesh=MeshSpec(data=4, model=2)
    )
    job = Job(by_cell, tmp_path)
    data_notes.write(job, job.pipeline().report())
    told = (tmp_path / "cells.txt").read_text()
    assert "batches by length: " in told and "batches by cell: 4 rows" in told
    ids = np.stack([job.pipeline().batch_at(step)["feature_ids"] for step in range(STEPS)])
    groups = ids.reshape(STEPS, 2, 4, 2)
    assert (groups == groups[:, :, :1]).all()


@pytest.mark.exhaustive
def test_trials_of_one_program_are_their_solo_runs(run, whole, tmp_path, capfd):
    check_trials_are_solo_runs(run, whole, tmp_path)
    assert capfd.readouterr().err.count("program: compiled again: ") == 1


@pytest.fixture(scope="module")
def several(run, tmp_path_factory):
    """(job, log) of a run of many lengths, on devices whose peak is known."""
    run_dir = tmp_path_factory.mktemp("several")
    longer = dataclasses.replace(run, length_buckets=SEVERAL, total_steps=2 * WINDOW)
    log = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(log):
        patch.setattr(topology, "peak_flops", lambda kind: PEAK)
        job = training.train(longer, run_dir)
    return job, log.getvalue()


def test_every_length_is_compiled_once_and_what_is_made_is_told(several):
    job, log = several
    pipeline = job.pipeline()
    made = shapes(pipeline, 2 * WINDOW)
    assert log.count("compiled again: ") == len(set(made)) - 1 > 1
    line = pipeline.report().by_length.line()
    assert line in log and line in (job.run_dir / "cells.txt").read_text()
    for inputs, targets in set(made[:WINDOW]):
        assert f"{inputs}/{targets} (" in line


def test_utilization_counts_what_a_batch_computes(several):
    job, _ = several
    pipeline = job.pipeline()
    lines = [x for x in read_metrics(job.run_dir / "metrics.jsonl") if "loss" in x]
    assert len(lines) == WINDOW
    for line in lines:
        steps = (line["step"] - 2, line["step"] - 1)  # from 0
        counted = [flops.model_flops(job, pipeline.lengths_at(step)) for step in steps]
        expected = sum(counted) / (PEAK * 8) * line["steps_per_second"] / 2
        assert line["mfu"] == pytest.approx(expected, rel=1e-6)
    sizes = [flops.model_flops(job, pipeline.lengths_at(step)) for step in range(2 * WINDOW)]
    assert min(sizes) < 0.6 * max(sizes) and max(sizes) == flops.model_flops(job)


def test_a_folder_goes_on_with_its_lengths(run, whole):
    with pytest.raises(ValueError, match=r"length_buckets\.targets is 1 there and 2 here"):
        Job(dataclasses.replace(run, length_buckets={"inputs": 2, "targets": 2}), whole)


def test_a_plan_says_which_batch_it_is_of(run):
    there = topology.Topology("v5e:2x4", topology.CHIPS["v5e"], (), 8, "no compiler")
    longest = "16 tokens in, 8 out, the longest batch of Run.length_buckets; remat"
    assert longest in plan_text.to_markdown(plan.make(run, there))
    alike = dataclasses.replace(run, length_buckets=1)
    assert "16 tokens in, 8 out; remat" in plan_text.to_markdown(plan.make(alike, there))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length_buckets": 0}, r"Run.length_buckets = 0: expected how many lengths"),
        ({"length_buckets": True}, r"Run.length_buckets = True: expected how many lengths"),
        ({"length_buckets": {"inputs": "3"}}, r"Run.length_buckets = .*: expected how many"),
        ({"length_buckets": {"input": 3}}, r"'input' is none of .*did you mean 'inputs'"),
        ({"length_buckets": 512}, r"those of Run.inputs_length = 16 are at most 5"),
        ({"length_buckets": {"targets": 5}}, r"those of Run.targets_length = 8 are at most 4"),
        ({"inputs_length": 15}, r"Run.inputs_length = 15 is halved .* multiple of 2 .*base/Run"),
        (
            {"length_buckets": 3, "loss_chunks": 4},
            r"Run.targets_length = 8 .*with this and Run.loss_chunks = 4, a multiple of 16",
        ),
        ({"packing": True}, r"Run.length_buckets = .*: Run.packing = True fills rows of one"),
    ],
)
def test_refused_in_the_run(run, changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(run, **changed)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, {}),
        ({}, {}),
        ({"targets": 1}, {}),
        (2, {"inputs": 2, "targets": 2}),
        ({"inputs": 3}, {"inputs": 3, "targets": 1}),
    ],
)
def test_a_number_is_of_both_sides(run, given, expected):
    assert dataclasses.replace(run, length_buckets=given).lengths_per_side == expected


@pytest.mark.parametrize(
    "equal",
    [
        (1, {}, {"inputs": 1}, {"targets": 1, "inputs": 1}),
        (2, {"inputs": 2, "targets": 2}, {"targets": 2, "inputs": 2}),
        ({"inputs": 2}, {"inputs": 2, "targets": 1}, {"targets": 1, "inputs": 2}),
    ],
)
def test_equal_values_are_one_run(run, equal):
    runs = [dataclasses.replace(run, length_buckets=given) for given in equal]
    assert len({one.fingerprint() for one in runs}) == 1
    assert all(one.describe() == runs[0].describe() for one in runs)
    other = dataclasses.replace(run, length_buckets={"targets": 2})
    assert other.fingerprint() != runs[0].fingerprint()
    assert ("length_buckets" in runs[0].defaults()) == (equal[0] == 1)
