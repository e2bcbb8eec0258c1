"""Runs that are trained as one program end where each ends by itself."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_preemption import ask, lines
from tiny_runs import make_base_run, write_words

from flix_jax import preemption
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.evaluation import files
from flix_jax.experiments import inference, together, training
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import Evaluation
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.reporting import read_metrics

STEPS = 100


def space(task_rank, language_rank, dropout, **options):
    return FeatureSpace(
        (
            FeatureType("task", rank=task_rank, dropout=dropout),
            FeatureType("language", rank=language_rank, dropout=dropout, **options),
        )
    )


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    return make_base_run(write_words(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def bases_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def trials(base_run, optimizer, steps=STEPS):
    """Ranks, dropout rates, alphas, learning rates and seeds mixed."""
    run = dataclasses.replace(
        base_run,
        base=base_run,
        adapters=AdapterSpec(space(2, 2, 0.3)),
        optimizer=optimizer,
        total_steps=steps,
        save_every=steps // 2,
        log_every=1,
        data_seed=5,
        evaluation=Evaluation(batch_size=8),
    )

    def changed(rate, seed, adapters):
        schedule = dataclasses.replace(optimizer.schedule, learning_rate=rate)
        other = dataclasses.replace(optimizer, schedule=schedule)
        return dataclasses.replace(run, seed=seed, adapters=adapters, optimizer=other)

    return [
        changed(1e-2, 0, AdapterSpec(space(2, 2, 0.3))),
        changed(3e-3, 1, AdapterSpec(space(1, 4, 0.0, ranks={"y": 3}))),
        changed(1e-2, 1, AdapterSpec(space(3, 1, 0.7), alpha=4.0)),
    ]


def losses(folder):
    return np.array([line["loss"] for line in read_metrics(folder / "metrics.jsonl")])


def trained(run, folder, bases_dir):
    adapters, _, step = inference.restore(Job(run, folder, bases_dir=bases_dir))
    assert step == run.total_steps
    return jax.tree.map(np.asarray, adapters)


def run_together(runs, folder, bases_dir, **options):
    return together.train_together(
        runs,
        [folder / str(i) for i in range(len(runs))],
        bases_dir=bases_dir,
        configs=[None] * len(runs),
        splits=["validation"],
        log_dir=folder / "program",
        title="program",
        say=lambda line: None,
        **options,
    )


OPTIMIZERS = {
    "adamw": Optimizer("adamw", Schedule("linear", 1e-2, 5), weight_decay=0.01),
    "sgd": Optimizer("sgd", Schedule(learning_rate=1e-2), clip_norm=None),
    "adafactor": Optimizer("adafactor", Schedule("cosine", 1e-2), multiply_by_parameter_scale=True),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param("adamw", STEPS, marks=pytest.mark.exhaustive),
        ("sgd", 20),
        pytest.param("adafactor", 20, marks=pytest.mark.exhaustive),
    ],
)
def test_every_trial_equals_its_solo_run(name, steps, base_run, bases_dir, tmp_path, capfd):
    runs = trials(base_run, OPTIMIZERS[name], steps)
    outcomes = run_together(runs, tmp_path / "together", bases_dir)
    assert "compiled again" not in capfd.readouterr().err
    for i, (run, outcome) in enumerate(zip(runs, outcomes, strict=True)):
        alone, beside = tmp_path / f"alone{i}", tmp_path / "together" / str(i)
        training.train(run, alone, bases_dir=bases_dir)
        np.testing.assert_allclose(losses(beside), losses(alone), rtol=1e-4)
        ours, theirs = (trained(run, folder, bases_dir) for folder in (beside, alone))
        assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, theirs)
        if name == "sgd":
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), ours, theirs
            )
        assert not outcome.error
        board = inference.evaluate(run, alone, bases_dir=bases_dir, say=lambda line: None)
        assert outcome.scores["validation"].groups == board.groups
        assert len(losses(beside)) == steps


def test_a_trial_that_diverges_stops_alone(base_run, bases_dir, tmp_path):
    runs = trials(base_run, Optimizer("sgd", Schedule(learning_rate=1e-2), clip_norm=None), 8)
    wild = dataclasses.replace(runs[1].optimizer, schedule=Schedule(learning_rate=1e30))
    runs[1] = dataclasses.replace(runs[1], optimizer=wild)
    outcomes = run_together(runs, tmp_path, bases_dir)
    assert [bool(outcome.error) for outcome in outcomes] == [False, True, False]
    assert "the loss is nan at step" in outcomes[1].error
    assert len(losses(tmp_path / "0")) == 8
    # Nothing of the diverged one was saved after it had.
    assert not (tmp_path / "1" / "checkpoints" / "8").exists()


@pytest.mark.exhaustive
def test_an_interrupted_program_goes_on_and_ends_bit_for_bit(base_run, bases_dir, tmp_path):
    runs = trials(base_run, OPTIMIZERS["adamw"], 12)
    run_together(runs, tmp_path / "whole", bases_dir)

    class Killed(BaseException):
        pass

    calls = []
    original = together.Checkpoints.save

    def save(self, state, data_state, value=None):
        calls.append(int(state.step))
        if len(calls) == 5:  # one of three trials has its last step
            raise Killed
        return original(self, state, data_state, value)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(together.Checkpoints, "save", save)
        run_together(runs, tmp_path / "cut", bases_dir)
    run_together(runs, tmp_path / "cut", bases_dir)
    for i, run in enumerate(runs):
        whole, cut = (
            trained(run, tmp_path / name / str(i), bases_dir) for name in ("whole", "cut")
        )
        jax.tree.map(np.testing.assert_array_equal, cut, whole)
        assert lines(tmp_path / "cut" / str(i)) == lines(tmp_path / "whole" / str(i))


@pytest.mark.exhaustive
def test_a_program_that_is_asked_to_stop_ends_as_one_that_is_not(
    base_run, bases_dir, tmp_path, monkeypatch
):
    """Asked after step 3, and again in the evaluation of the second trial at step 5."""
    evaluation = Evaluation(batch_size=8, every=5, examples_per_cell=2, keep_best="mean_seen")
    runs = [
        dataclasses.replace(run, evaluation=evaluation, log_every=4)
        for run in trials(base_run, OPTIMIZERS["adamw"], 8)
    ]
    whole = run_together(runs, tmp_path / "whole", bases_dir)
    steps, evaluated = [], []
    value, report = together._Group._value, together._Group._report

    def reporting(self, pending, *arguments, **options):
        steps.extend(number for number, _ in pending)
        report(self, pending, *arguments, **options)

    def asking(self, i, own, number, reporter):
        evaluated.append((i, number))
        if evaluated == [(0, 5), (1, 5)]:
            ask()
        return value(self, i, own, number, reporter)

    class Asking(together.PrefetchIterator):
        def __next__(self):
            if self.step == 2 and not steps:
                ask()
            return super().__next__()

    monkeypatch.setattr(together._Group, "_report", reporting)
    monkeypatch.setattr(together._Group, "_value", asking)
    monkeypatch.setattr(together, "PrefetchIterator", Asking)
    for number in (3, 5):
        with pytest.raises(preemption.Preempted, match=f"step {number} of 8 of program is saved"):
            with preemption.installed():
                run_together(runs, tmp_path / "stopped", bases_dir)
    outcomes = run_together(runs, tmp_path / "stopped", bases_dir)
    assert steps == list(range(1, 9))
    assert evaluated[:5] == [(0, 5), (1, 5), (1, 5), (2, 5), (0, 8)]
    assert [o.scores for o in outcomes] == [o.scores for o in whole]
    for name in ("0", "1", "2", "program"):
        assert lines(tmp_path / "stopped" / name) == lines(tmp_path / "whole" / name)
    for i, run in enumerate(runs):
        ours, theirs = (
            trained(run, tmp_path / name / str(i), bases_dir) for name in ("stopped", "whole")
        )
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        best = [
            files.read_object(tmp_path / n / str(i) / "best.json") for n in ("stopped", "whole")
        ]
        assert best[0] == best[1] is not None


def test_what_runs_of_a_program_have_in_common(base_run):
    runs = trials(base_run, OPTIMIZERS["adamw"])
    assert together.program_of(runs[0]) == together.program_of(runs[1])
    other = dataclasses.replace(runs[0], batch_size=16)
    assert together.program_of(other) != together.program_of(runs[0])
    reseeded = dataclasses.replace(runs[0], data_seed=None)
    assert together.program_of(reseeded) != together.program_of(runs[0])


def test_whole_networks_and_ensembles_are_programs_of_their_own(base_run):
    runs = trials(base_run, OPTIMIZERS["adamw"])[:2]
    evaluation = dataclasses.replace(runs[0].evaluation, ensemble="weights")
    runs += [dataclasses.replace(runs[0], evaluation=evaluation)] * 2
    runs += [dataclasses.replace(runs[0], adapters=None)] * 2
    groups = together.programs(runs, 16)
    assert groups == [[0, 1], [2], [3], [4], [5]]
    assert together.reasons(runs, groups) == [
        "",
        *["an ensemble is evaluated"] * 2,
        *["a whole network is trained"] * 2,
    ]


@pytest.mark.exhaustive
def test_predictions_of_a_padded_trial_are_those_of_its_folder(base_run, bases_dir, tmp_path):
    runs = trials(base_run, OPTIMIZERS["adamw"], 8)
    outcomes = run_together(runs, tmp_path, bases_dir)
    for i, run in enumerate(runs):
        folder = files.evaluation_folder(tmp_path / str(i), 8, "validation")
        there = {p.name: p.read_text() for p in folder.glob("*.jsonl")}
        for path in folder.glob("*.scores.json"):
            path.unlink()  # so that the cells are predicted again
        board = inference.evaluate(run, tmp_path / str(i), bases_dir=bases_dir, say=lambda _: None)
        assert {p.name: p.read_text() for p in folder.glob("*.jsonl")} == there
        assert json.dumps(board.to_json()) == json.dumps(outcomes[i].scores["validation"].to_json())


def test_runs_go_on_together_from_a_step_that_they_have_in_common():
    def parts(*steps):
        return together.with_common_step([frozenset(of) for of in steps])

    assert parts((), (), ()) == [[0, 1, 2]]
    assert parts((3, 6), (3,), (3, 6)) == [[0, 1, 2]]
    assert parts((3, 6), (), (3, 6), ()) == [[0, 2], [1, 3]]
    assert parts((9, 12), (3, 6), (9,)) == [[0, 2], [1]]


def test_hyperparameters_are_what_is_not_at_its_default_in_types_of_its_own(base_run):
    found = trials(base_run, OPTIMIZERS["adamw"])[1].hparams()
    assert found["seed"] == 1 and isinstance(found["seed"], int)
    assert found["optimizer.schedule.kind"] == "linear"
    assert found["model.scan_layers"] is True
    assert found["optimizer.schedule.learning_rate"] == 3e-3
    assert "optimizer.b1" not in found and not [name for name in found if name.startswith("base.")]
