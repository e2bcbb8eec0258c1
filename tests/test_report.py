"""Reports on sweeps whose scores are known: what is chosen, compared and said."""

import csv
import io
import json
import re

import pytest

from flix_jax.evaluation.scoreboard import Scoreboard
from flix_jax.experiments.report import make_report
from flix_jax.experiments.sweep import Method, Sweep
from flix_jax.experiments.trial_records import Outcome
from flix_jax.experiments.workers import run_sweep

RATES = {rate: f"lr = {rate}" for rate in ("2e-3", "5e-3", "1.2e-2")}
# Exact match on seen development cells; LoRA is best at 5e-3, FLix at the edge.
DEVELOPMENT = {
    ("lora", "2e-3"): 40.0,
    ("lora", "5e-3"): 60.0,
    ("lora", "1.2e-2"): 50.0,
    ("flix", "2e-3"): 30.0,
    ("flix", "5e-3"): 62.0,
    ("flix", "1.2e-2"): 70.0,
}


def sweep(**changes):
    settings = {
        "methods": {
            "LoRA": Method(("kind = lora",), {"rate": RATES}),
            "FLix": Method(("kind = flix",), {"rate": RATES}),
        },
        "seeds": (0, 1),
        "choose": ("rate",),
        "report_on": "test",
    }
    return Sweep("rates", **(settings | changes))


def run_trial(bindings, folder, seed):
    kind, rate = (binding.split(" = ")[1] for binding in bindings)
    seen = DEVELOPMENT[kind, rate]

    def board(seen, unseen):
        scores = {"ner/sw": seen, "ner/yo": unseen}
        return Scoreboard(
            {cell: {"exact_match": value, "examples": 9} for cell, value in scores.items()},
            {"ner/sw": "seen", "ner/yo": "unseen"},
        )

    # On the test split every rate is as good, so that a choice by test scores would show.
    final = {"lora": 55.0, "flix": 66.0}[kind] + seed * (2.0 if kind == "lora" else 4.0)
    # Unseen cells would choose the other way round.
    return {"validation": board(seen + seed, 100 - seen), "test": board(final, 7.0)}


def report_of(sweep, folder, trial=run_trial):
    def run_trials(assignments):
        return [Outcome(trial(*assignment)) for assignment in assignments]

    run_sweep(sweep, folder, run_trials, log=lambda line: None)
    return make_report(folder)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return report_of(sweep(), tmp_path_factory.mktemp("sweep"))


def test_chooses_the_best_rate_of_each_method_on_development_scores(report):
    assert {choice.variant: choice.labels for choice in report.choices} == {
        "LoRA": {"rate": "5e-3"},
        "FLix": {"rate": "1.2e-2"},
    }
    # 60 and 61 under the two seeds.
    assert report.choices[0].candidates[1][1].mean == 60.5
    assert [choice.edges for choice in report.choices] == [(), ("rate",)]


def test_compares_the_chosen_on_the_split_to_report(report):
    comparison = report.comparison
    assert comparison.estimate("LoRA", "seen").mean == 56.0
    # (66 - 55 + 70 - 57) / 2 with differences 11 and 13.
    assert comparison.difference("FLix", "seen").mean == 12.0
    assert comparison.difference("FLix", "seen").standard_error == pytest.approx(1.0)


def test_the_group_to_choose_by_is_the_sweeps(tmp_path):
    report = report_of(sweep(group="unseen"), tmp_path)
    assert report.choices[0].labels == {"rate": "2e-3"}


def test_the_report_is_written_with_its_tables_and_pictures(report, tmp_path):
    report.write(tmp_path)
    # Without the spaces that align the tables.
    text = re.sub(" +", " ", (tmp_path / "report.md").read_text())
    assert "| LoRA | rate 5e-3 | 60.5 ± 0.5 **best** |" in text
    assert "The best rate of FLix, 1.2e-2, is at the edge of its grid" in text
    assert "| FLix | +12.0 ± 1.0 |" in text
    assert "Choice and comparison use the same examples" not in text
    assert "The best of 2 settings, each at its choice of rate, by the mean over tasks" in text
    assert "- seen cells: FLix, 68.0 (95 % interval" in text
    assert json.loads((tmp_path / "chosen.json").read_text())["FLix"] == {"rate": "1.2e-2"}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "trials.csv").read_text())))
    assert len(rows) == 12 * 2
    assert rows[0]["method"] == "LoRA" and float(rows[0]["seen"]) == 40.0
    assert {path.name for path in tmp_path.iterdir()} >= {"comparison.png", "comparison.svg"}


def test_choosing_and_reporting_on_one_split_is_said(tmp_path):
    text = report_of(sweep(report_on="validation", seeds=(0,)), tmp_path).to_markdown()
    assert "Choice and comparison use the same examples (validation)" in text
    assert "One seed proves nothing" in text


def test_without_an_axis_to_choose_every_combination_is_compared(tmp_path):
    report = report_of(sweep(choose=()), tmp_path)
    assert list(report.comparison.boards)[:2] == ["LoRA, rate 2e-3", "LoRA, rate 5e-3"]
    assert report.choices == () and len(report.comparison.boards) == 6


def test_a_candidate_that_diverged_is_not_chosen(tmp_path):
    def diverging(bindings, folder, seed):
        if bindings == ("kind = flix", "lr = 1.2e-2") and seed == 1:
            raise FloatingPointError("loss is NaN at step 7")
        return run_trial(bindings, folder, seed)

    report = report_of(sweep(), tmp_path, diverging)
    assert report.choices[1].labels == {"rate": "5e-3"}
    text = report.to_markdown()
    assert "1 of 12 trials are not finished:" in text
    assert "- FLix, rate 1.2e-2, seed 1: failed (loss is NaN at step 7)" in text


def test_a_sweep_under_way_is_reported_as_far_as_it_is(tmp_path):
    calls = []

    def killed(bindings, folder, seed):
        calls.append(seed)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return run_trial(bindings, folder, seed)

    with pytest.raises(KeyboardInterrupt):
        report_of(sweep(), tmp_path, killed)
    report = make_report(tmp_path)
    assert [choice.labels["rate"] for choice in report.choices] == ["5e-3", "2e-3"]
    assert "8 of 12 trials are not finished:" in report.to_markdown()


def test_nothing_to_report_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="sweep.json: no such file; not the folder of a sweep"):
        make_report(tmp_path)

    def killed(bindings, folder, seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report_of(sweep(), tmp_path, killed)
    with pytest.raises(ValueError, match="too few of the 12 trials are finished"):
        make_report(tmp_path)
