"""Being asked to stop: nothing is lost, nothing is done twice, and the line says what was saved."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_training import TYPES, arrays
from tiny_runs import make_base_run, write_gin, write_words

from flix_jax import cli, preemption
from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data.cells import Mixture
from flix_jax.evaluation import evaluator, files
from flix_jax.experiments import training
from flix_jax.experiments.run import Evaluation
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.reporting import Reporter, read_metrics

STEPS = 12
TIMES = ("per_second", "data_wait", "mfu", "device_memory")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    return dataclasses.replace(
        base,
        base=base,
        adapters=AdapterSpec(FeatureSpace(TYPES), dropout=0.1),
        mixture=Mixture(held_out=("up/x", "*/z"), rates={"up/*": 3.0, "*": 1.0}),
        optimizer=Optimizer("adamw", Schedule(learning_rate=1e-2)),
        total_steps=STEPS,
        save_every=5,
        log_every=3,
        evaluation=Evaluation(batch_size=8, every=4, keep_best="mean_seen"),
    )


@pytest.fixture(scope="module")
def bases_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def whole(run, bases_dir, tmp_path_factory):
    """The run without an interruption."""
    run_dir = tmp_path_factory.mktemp("whole")
    training.train(run, run_dir, bases_dir=bases_dir)
    return run_dir


def ask(number=signal.SIGTERM):
    """A signal that is known of when this returns."""
    os.kill(os.getpid(), number)
    end = time.monotonic() + 10
    while not preemption._watch._stop_at == 0 and time.monotonic() < end:
        time.sleep(0.001)


def lines(run_dir):
    return [
        {name: value for name, value in line.items() if not any(t in name for t in TIMES)}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


def listing(run_dir):
    paths = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}
    return {path for path in paths if not path.startswith("tensorboard")}


def same(run_dir, whole):
    """Whether a run's folder holds what that of the undisturbed one holds."""
    assert lines(run_dir) == lines(whole)
    assert listing(run_dir) == listing(whole)
    for step in sorted(int(path.name) for path in (whole / "checkpoints").iterdir()):
        got, expected = arrays(run_dir, step), arrays(whole, step)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
    for path in (whole / "evaluations").rglob("*.json*"):
        assert (run_dir / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert files.read_json(run_dir / "best.json") == files.read_json(whole / "best.json")


@pytest.mark.parametrize("stops", [(2,), (4, 7), (5, 10), (11,)])
def test_sigterm_in_training_loses_no_step_and_repeats_none(
    run, whole, bases_dir, tmp_path, monkeypatch, stops
):
    steps, left = [], set(stops)
    reported = Reporter.step

    def step(self, number, metrics):
        steps.append(number)
        reported(self, number, metrics)
        if number in left:
            left.remove(number)
            ask()

    monkeypatch.setattr(Reporter, "step", step)
    for number in stops:
        with pytest.raises(preemption.Preempted) as stopped, preemption.installed():
            training.train(run, tmp_path, bases_dir=bases_dir)
        more = ", to be evaluated" if number % 4 == 0 else ""
        assert str(stopped.value) == (
            f"stopped by SIGTERM: step {number} of {STEPS} is saved{more}; the same command goes "
            "on from there"
        )
        assert stopped.value.status == 75
    training.train(run, tmp_path, bases_dir=bases_dir)
    assert steps == list(range(1, STEPS + 1))
    same(tmp_path, whole)


@pytest.mark.parametrize("at", [4, STEPS])
def test_an_evaluation_that_sigterm_interrupts_is_made_up_for(
    run, whole, bases_dir, tmp_path, monkeypatch, at
):
    predict, batches = evaluator.predict_in_batches, []

    def asking(*arguments):
        for batch in predict(*arguments):
            batches.append(batch)
            yield batch
            if len(batches) == 2 + 4 * (at // 4 - 1):
                ask()

    monkeypatch.setattr(evaluator, "predict_in_batches", asking)
    with pytest.raises(preemption.Preempted, match=f"step {at} of 12 is saved, to be eval"):
        with preemption.installed():
            training.train(run, tmp_path, bases_dir=bases_dir)
    assert f"evaluations/{at}" in listing(tmp_path)
    assert not any("up/y/exact_match" in x for x in lines(tmp_path) if x["step"] == at)
    training.train(run, tmp_path, bases_dir=bases_dir)
    same(tmp_path, whole)


def test_a_kill_between_a_checkpoint_and_the_metrics_loses_no_line(
    run, whole, bases_dir, tmp_path, monkeypatch
):
    """The file is that of the moment before the last save; what it had ahead is another's."""
    sync, kept = Reporter.sync, []

    def keeping(self):
        sync(self)
        kept.append((tmp_path / "metrics.jsonl").read_text())

    monkeypatch.setattr(Reporter, "sync", keeping)
    training.train(dataclasses.replace(run, total_steps=10), tmp_path, bases_dir=bases_dir)
    at_ten = kept[-2]
    for text in (at_ten, at_ten + '{"step": 11, "loss": 1.0}\n'):
        (tmp_path / "metrics.jsonl").write_text(text)
        training.train(dataclasses.replace(run, total_steps=10), tmp_path, bases_dir=bases_dir)
        assert (tmp_path / "metrics.jsonl").read_text() == at_ten


