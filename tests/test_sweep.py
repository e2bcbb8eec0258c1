"""Which trials a sweep has, and that each is run once, through interruptions and failures."""

import itertools
import json

import pytest

from flix_jax.evaluation.scoreboard import Scoreboard
from flix_jax.experiments.sweep import Method, Sweep, Uniform
from flix_jax.experiments.trial_records import Outcome, TrialRecord, read_sweep
from flix_jax.experiments.workers import run_sweep

DROPOUT = {"0": ("features.dropout = 0.0",), "0.5": ("features.dropout = 0.5",)}
RANK = {2: "rank = 2", 4: "rank = 4", 8: "rank = 8"}


def board(value=50.0):
    return Scoreboard({"ner/sw": {"exact_match": value, "examples": 3}}, {"ner/sw": "seen"})


class Runner:
    """Runs trials by noting them; raises `error` at the trial of that number."""

    def __init__(self, error=None, at=None):
        self.calls, self.error, self.at = [], error, at

    def __call__(self, assignments):
        return [self.one(*assignment) for assignment in assignments]

    def one(self, bindings, folder, seed):
        self.calls.append((bindings, folder.name, seed))
        if len(self.calls) - 1 == self.at:
            raise self.error
        return Outcome({"validation": board(10.0 * len(self.calls))})


def quiet(line):
    pass


def test_trials_are_the_cross_product_with_seeds_slowest():
    sweep = Sweep("grid", axes={"dropout": DROPOUT, "rank": RANK}, seeds=(0, 1))
    trials = sweep.trials()
    assert [(t.seed, t.labels["dropout"], t.labels["rank"]) for t in trials] == list(
        itertools.product((0, 1), ("0", "0.5"), ("2", "4", "8"))
    )
    assert trials[1].bindings == ("features.dropout = 0.0", "rank = 4")
    assert trials[1].name == "dropout=0,rank=4,seed=0"
    assert str(trials[1]) == "dropout 0, rank 4, seed 0"


def test_methods_have_bindings_and_grids_of_their_own():
    sweep = Sweep(
        "rates",
        methods={
            "LoRA": Method(
                ("kind = 'lora'",), {"rate": {"1e-3": "lr = 1e-3", "1e-2": "lr = 1e-2"}}
            ),
            "FLix": {"bindings": ("kind = 'flix'",), "axes": {"rate": {"3e-2": "lr = 3e-2"}}},
            "full, frozen": "kind = 'full'",
        },
        axes={"steps": {"9": "steps = 9"}},
        choose="rate",
    )
    assert [trial.bindings for trial in sweep.trials()] == [
        ("kind = 'lora'", "steps = 9", "lr = 1e-3"),
        ("kind = 'lora'", "steps = 9", "lr = 1e-2"),
        ("kind = 'flix'", "steps = 9", "lr = 3e-2"),
        ("kind = 'full'", "steps = 9"),
    ]
    assert sweep.trials()[3].name == "method=full-frozen,steps=9,seed=0"
    assert sweep.variants() == ("LoRA, steps 9", "FLix, steps 9", "full, frozen, steps 9")


def test_an_axis_may_be_a_parameter_and_its_values():
    sweep = Sweep(
        "grid",
        axes={
            "FeatureType.dropout": (0.0, 0.25),
            "task/FeatureType.rank, language/FeatureType.rank": ((1, 4), (2, 2)),
            "Optimizer.name": ("sgd",),
        },
    )
    assert sweep.trials()[1].bindings == (
        "FeatureType.dropout = 0.0",
        "task/FeatureType.rank = 2",
        "language/FeatureType.rank = 2",
        "Optimizer.name = 'sgd'",
    )
    assert sweep.trials()[2].labels == {
        "FeatureType.dropout": "0.25",
        "task/FeatureType.rank, language/FeatureType.rank": "1, 4",
        "Optimizer.name": "sgd",
    }
    assert Sweep.from_json(json.loads(json.dumps(sweep.to_json()))) == sweep


def test_random_axes_are_drawn_together_and_more_draws_keep_the_first():
    random = {
        "lr": Uniform(1e-4, 1e-1, log=True),
        "rank": Uniform(1, 8, integer=True),
        "dropout": Uniform(0.0, 0.9),
    }

    def values(samples, seed=0):
        sweep = Sweep("random", random=random, samples=samples, sampling_seed=seed, seeds=(0, 1))
        assert Sweep.from_json(json.loads(json.dumps(sweep.to_json()))) == sweep
        return [trial.bindings for trial in sweep.trials() if trial.seed == 0]

    assert values(200)[:20] == values(20)
    assert values(5) != values(5, seed=1)
    drawn = [[float(b.split("=")[1]) for b in bindings] for bindings in values(200)]
    rates, ranks, dropouts = zip(*drawn, strict=True)
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    # As many in the lower half of the logarithms as in the upper.
    assert 70 < sum(rate < 10**-2.5 for rate in rates) < 130
    assert set(ranks) == set(range(1, 9))
    assert all(15 < ranks.count(rank) < 40 for rank in range(1, 9))
    assert 0.4 < sum(dropouts) / len(dropouts) < 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axes": {"rank": ()}}, "axis 'rank': expected {label: bindings} with at least one"),
        ({"axes": {"rank": "12"}}, "axis 'rank': expected {label: bindings} with at least one"),
        ({"axes": {"rank": (1, 1)}}, "axis 'rank': 1 is there twice"),
        ({"axes": {"a, b": ((1, 2), (3,))}}, "expected a value for each of 2 parameters"),
        ({"axes": {"rank": (1, 2), "a, rank": ((1, 2),)}}, "rank is set by axis 'rank' and by"),
        ({"random": {"lr": 3}, "samples": 2}, "axis 'lr': expected a Uniform to draw from, got 3"),
        ({"samples": 2}, "Sweep.random of 0 axes needs Sweep.samples"),
        ({"trials_per_program": 0}, "Sweep.trials_per_program must be at least 1"),
        ({"axes": {"rank": {}}}, "axis 'rank': expected {label: bindings} with at least one"),
        ({"seeds": ()}, "expected distinct seeds, got \\(\\)"),
        ({"seeds": (1, 1)}, "expected distinct seeds"),
        ({"metric": "spanf1"}, "did you mean 'span_f1'"),
        ({"group": "unsen"}, "unknown group 'unsen'; did you mean 'unseen'"),
        (
            {"axes": {"rank": RANK}, "choose": ("ranks",)},
            "axis to choose 'ranks'; did you mean 'rank'",
        ),
        ({"axes": {"rank": RANK}, "baseline": "rank 3"}, "'rank 3'; did you mean 'rank"),
        ({"axes": {"a": RANK, "b": RANK}}, "rank is set by axis 'a' and by axis 'b'"),
        (
            {"methods": {"LoRA": Method(("rank = 1",), {"rank": RANK})}},
            "rank is set by method 'LoRA' and by axis 'rank'",
        ),
        ({"axes": {"rank": {"2": "rank"}}}, "axis 'rank': 'rank' is not 'parameter = value'"),
        ({"methods": {"a b": "x = 1", "a,b": "x = 2"}}, "share the folder 'method=a-b,seed=0'"),
        (
            {"axes": {"rank": RANK}, "methods": {"LoRA": Method(axes={"rank": RANK})}},
            "axis 'rank' is both the sweep's and 'LoRA'",
        ),
    ],
)
def test_bad_sweeps_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        Sweep("grid", **settings)
    assert "\n" not in str(error.value)


def test_every_trial_runs_in_its_folder_and_is_kept(tmp_path):
    sweep, runner, lines = Sweep("grid", axes={"dropout": DROPOUT}, seeds=(3, 4)), Runner(), []
    records = run_sweep(sweep, tmp_path, runner, log=lines.append)
    assert [record.state for record in records] == ["finished"] * 4
    assert runner.calls[1] == (("features.dropout = 0.5",), "dropout=0.5,seed=3", 3)
    assert records[1].scores == {"validation": board(20.0)}
    kept = json.loads((tmp_path / "trials" / "dropout=0.5,seed=3" / "trial.json").read_text())
    assert kept["state"] == "finished" and kept["bindings"] == ["features.dropout = 0.5"]
    assert lines[0] == "trial 1 of 4: dropout 0, seed 3"
    assert lines[1] == "dropout 0, seed 3: 10.0 on seen cells (validation)"
    assert read_sweep(tmp_path) == sweep


def test_finished_trials_are_not_run_again(tmp_path):
    sweep, lines = Sweep("grid", axes={"dropout": DROPOUT}), []
    first = run_sweep(sweep, tmp_path, Runner(), log=quiet)
    again = Runner()
    second = run_sweep(sweep, tmp_path, again, log=lines.append)
    assert again.calls == []
    assert lines == ["2 of 2 trials are finished already"]
    assert [record.scores for record in second] == [record.scores for record in first]


def test_an_added_label_or_seed_runs_only_what_is_new(tmp_path):
    run_sweep(Sweep("grid", axes={"dropout": DROPOUT}), tmp_path, Runner(), log=quiet)
    more = DROPOUT | {"0.9": ("features.dropout = 0.9",)}
    runner = Runner()
    run_sweep(Sweep("grid", axes={"dropout": more}, seeds=(0, 1)), tmp_path, runner, log=quiet)
    assert [name for _, name, _ in runner.calls] == [
        "dropout=0.9,seed=0",
        "dropout=0,seed=1",
        "dropout=0.5,seed=1",
        "dropout=0.9,seed=1",
    ]


@pytest.mark.parametrize("killed_at", range(4))
def test_a_killed_sweep_goes_on_and_ends_as_if_it_had_not_been(tmp_path, killed_at):
    def run_trial(assignments):
        return [
            Outcome({"validation": board(seed + len(bindings[0]))})
            for bindings, _, seed in assignments
        ]

    class Killed:
        calls = 0

        def __call__(self, *trial):
            if self.calls == killed_at:
                raise KeyboardInterrupt
            self.calls += 1
            return run_trial(*trial)

    sweep = Sweep("grid", axes={"dropout": DROPOUT}, seeds=(0, 1))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, tmp_path / "killed", Killed(), log=quiet)
    killed = run_sweep(sweep, tmp_path / "killed", run_trial, log=quiet)
    whole = run_sweep(sweep, tmp_path / "whole", run_trial, log=quiet)
    assert [record.scores for record in killed] == [record.scores for record in whole]


def test_a_diverged_trial_fails_alone_and_is_tried_again(tmp_path):
    sweep = Sweep("grid", axes={"dropout": DROPOUT})
    diverging = Runner(FloatingPointError("loss is NaN at step 7"), at=0)
    records = run_sweep(sweep, tmp_path, diverging, log=quiet)
    assert [record.state for record in records] == ["failed", "finished"]
    assert records[0].error == "loss is NaN at step 7"
    runner = Runner()
    run_sweep(sweep, tmp_path, runner, log=quiet)
    assert [name for _, name, _ in runner.calls] == ["dropout=0,seed=0"]


def test_any_other_error_stops_the_sweep(tmp_path):
    sweep, runner = Sweep("grid", axes={"dropout": DROPOUT}), Runner(ValueError("no cell"), at=0)
    with pytest.raises(ValueError, match="no cell"):
        run_sweep(sweep, tmp_path, runner, log=quiet)
    assert len(runner.calls) == 1
    kept = json.loads((tmp_path / "trials" / "dropout=0,seed=0" / "trial.json").read_text())
    assert (kept["state"], kept["error"]) == ("failed", "ValueError: no cell")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Sweep("ranks", axes={"dropout": DROPOUT}), "holds a sweep of name 'grid', not 'ranks'"),
        (Sweep("grid", axes={"dropout": DROPOUT}, base="b"), "holds a sweep of base '', not 'b'"),
        (
            Sweep("grid", axes={"dropout": {"0": "features.dropout = 0.01"}}),
            "was run with features.dropout = 0.0, not features.dropout = 0.01",
        ),
    ],
)
def test_the_folder_of_another_sweep_is_refused_in_one_line(tmp_path, other, message):
    run_sweep(Sweep("grid", axes={"dropout": DROPOUT}), tmp_path, Runner(), log=quiet)
    runner = Runner()
    with pytest.raises(ValueError, match=message) as error:
        run_sweep(other, tmp_path, runner, log=quiet)
    assert runner.calls == [] and "\n" not in str(error.value)
    assert read_sweep(tmp_path).name == "grid"


def test_a_trial_must_have_the_scores_that_the_sweep_needs(tmp_path):
    sweep = Sweep("grid", axes={"dropout": DROPOUT}, report_on="test")
    with pytest.raises(ValueError, match="dropout 0, seed 0 has no scores of 'test', only of vali"):
        run_sweep(sweep, tmp_path, Runner(), log=quiet)
    sweep = Sweep("choice", axes={"dropout": DROPOUT}, choose=("dropout",), group="unseen")
    with pytest.raises(ValueError, match="cannot choose by unseen cells"):
        run_sweep(sweep, tmp_path / "choice", Runner(), log=quiet)


def test_a_trial_not_yet_run_is_waiting():
    assert TrialRecord(Sweep("one").trials()[0]).state == "waiting"
