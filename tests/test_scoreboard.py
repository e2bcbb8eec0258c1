"""Score tables against values by hand, and comparisons over seeds against scipy."""

import csv
import io
import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from flix_jax.evaluation import comparison, scoreboard
from flix_jax.evaluation.scoreboard import Scoreboard

SCORES = {
    "ner/sw": {"span_f1": 60.0, "exact_match": 10.0, "examples": 50},
    "ner/yo": {"span_f1": 40.0, "exact_match": 20.0, "examples": 5},
    "transliteration/pa:Arab2Guru": {"cer": 30.0, "exact_match": 50.0, "examples": 8},
    "transliteration/pa:Latn2Guru": {"cer": 10.0, "exact_match": 70.0, "examples": 9},
    "transliteration/hi": {"cer": 40.0, "exact_match": 0.0, "examples": 9},
    "ner/ha": {"span_f1": 15.0, "exact_match": 0.0, "examples": 7},
    "ner/zu": {"examples": 0},
}
GROUPS = dict.fromkeys(SCORES, "seen") | {"ner/ha": "unseen", "ner/zu": "unseen_language"}


@pytest.fixture
def board():
    return Scoreboard(SCORES, GROUPS)


def boards(values):
    """{method: {seed: board}} from {method: {seed: {cell: exact match}}}, all cells seen."""
    return {
        method: {
            seed: Scoreboard(
                {cell: {"exact_match": v, "examples": 60} for cell, v in cells.items()},
                dict.fromkeys(cells, "seen"),
            )
            for seed, cells in seeds.items()
        }
        for method, seeds in values.items()
    }


def test_means_of_a_task_weigh_languages_and_those_of_all_tasks_weigh_tasks(board):
    assert board.mean("seen", "ner") == 50.0
    # Two files of Punjabi are one language: (20 + 40) / 2.
    assert board.mean("seen", "transliteration") == 30.0
    # An error rate of 30 is worth 70.
    assert board.mean("seen") == (50.0 + 70.0) / 2
    assert board.mean("unseen") == 15.0
    assert board.mean("unseen_language") is None
    assert board.present_groups == ("seen", "unseen")


def test_one_metric_for_all_tasks(board):
    exact = Scoreboard(SCORES, GROUPS, metric="exact_match")
    assert exact.mean("seen", "transliteration") == 30.0
    assert exact.mean("seen") == (15.0 + 30.0) / 2
    # A task that lacks its usual metric is shown by one that it has.
    plain = Scoreboard({"ner/sw": {"exact_match": 5.0, "examples": 1}}, {"ner/sw": "seen"})
    assert plain.mean("seen") == 5.0


def test_markdown(board):
    assert (
        board.to_markdown()
        == """\
| mean         | all tasks | ner (span F1) | transliteration (CER ↓) |
|--------------|----------:|--------------:|------------------------:|
| seen cells   |      60.0 |          50.0 |                    30.0 |
| unseen cells |      15.0 |          15.0 |                       – |

| language     | ner (span F1) | transliteration (CER ↓) |
|--------------|--------------:|------------------------:|
| ha           |        15.0 † |                         |
| hi           |               |                    40.0 |
| pa:Arab2Guru |               |                    30.0 |
| pa:Latn2Guru |               |                    10.0 |
| sw           |          60.0 |                         |
| yo           |          40.0 |                         |
| zu           |           – ‡ |                         |

† unseen cells; ‡ unseen language; ↓ lower is better; the mean of all tasks counts 100 − rate.

Not evaluated, without examples: ner/zu.
"""
    )


def test_files_hold_the_same_scores(board, tmp_path):
    board.write(tmp_path)
    assert scoreboard.read_scores(tmp_path) == board
    assert (tmp_path / "scores.md").read_text() == board.to_markdown()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "scores.csv").read_text())))
    assert {(row["cell"], row["metric"]): float(row["value"]) for row in rows} == {
        (cell, name): value
        for cell, scores in SCORES.items()
        for name, value in scores.items()
        if name != "examples"
    }
    assert json.loads((tmp_path / "scores.json").read_text())["means"]["seen"] == {
        "all tasks": 60.0,
        "ner": 50.0,
        "transliteration": 30.0,
    }


@pytest.mark.parametrize(
    ("scores", "groups", "metric", "message"),
    [
        ({}, {}, "", "at least one cell"),
        ({"ner": {"examples": 0}}, {"ner": "seen"}, "", "'ner': expected task/language"),
        ({"ner/sw": {"examples": 0}}, {}, "", "'ner/sw' is of group None; expected one of seen"),
        (SCORES, GROUPS, "spanf1", "did you mean 'span_f1'"),
        (SCORES, GROUPS, "cer", "'ner/sw' has no 'cer', only span_f1"),
    ],
)
def test_bad_scores_are_refused_in_one_line(scores, groups, metric, message):
    with pytest.raises(ValueError, match=message) as error:
        Scoreboard(scores, groups, metric)
    assert "\n" not in str(error.value)


def test_a_folder_without_scores_says_so(tmp_path):
    with pytest.raises(ValueError, match="scores.json: no such file"):
        scoreboard.read_scores(tmp_path)
    (tmp_path / "scores.json").write_text("[]")
    with pytest.raises(ValueError, match="scores.json: not a scoreboard"):
        scoreboard.read_scores(tmp_path)


score = st.floats(0, 100)


@given(st.lists(st.tuples(score, score), min_size=2, max_size=7))
def test_means_and_paired_differences_are_scipys(pairs):
    ours, theirs = np.array(pairs).T
    found = comparison.Comparison(
        boards(
            {
                "LoRA": {seed: {"ner/sw": value} for seed, value in enumerate(theirs)},
                "FLix": {seed: {"ner/sw": value} for seed, value in enumerate(ours)},
            }
        )
    )
    for estimate, values in (
        (found.estimate("FLix", "seen"), ours),
        (found.difference("FLix", "seen", "ner"), ours - theirs),
    ):
        assert estimate.mean == pytest.approx(values.mean(), abs=1e-9)
        assert estimate.standard_error == pytest.approx(scipy.stats.sem(values), abs=1e-9)
        assert estimate.seeds == len(pairs)


def test_differences_are_taken_within_the_seeds_that_both_have():
    found = comparison.Comparison(
        boards(
            {
                "LoRA": {0: {"ner/sw": 10.0}, 1: {"ner/sw": 90.0}},
                "FLix": {1: {"ner/sw": 92.0}, 2: {"ner/sw": 0.0}},
            }
        )
    )
    assert found.difference("FLix", "seen") == comparison.Estimate(2.0, None, 1)
    assert "Seeds differ: LoRA has 0, 1; FLix has 1, 2." in found.to_markdown()


def test_one_seed_proves_nothing():
    values = {"LoRA": {"ner/sw": 70.0}, "FLix": {"ner/sw": 75.0}}
    one = comparison.Comparison(
        boards({method: {0: cells} for method, cells in values.items()}),
        more_seeds="flix sweep --seeds=0,1,2,3,4",
    )
    text = one.to_markdown()
    assert "1 seed (0). One seed proves nothing" in text
    assert "For more seeds: `flix sweep --seeds=0,1,2,3,4`" in text
    assert "±" not in text
    two = comparison.Comparison(
        boards({method: {0: cells, 1: cells} for method, cells in values.items()})
    )
    assert "proves nothing" not in two.to_markdown()


def test_comparison_tables():
    found = comparison.Comparison(
        boards(
            {
                "LoRA": {0: {"ner/sw": 50.0, "qa/sw": 20.0}, 1: {"ner/sw": 54.0, "qa/sw": 20.0}},
                "FLix": {0: {"ner/sw": 60.0, "qa/sw": 10.0}, 1: {"ner/sw": 60.0, "qa/sw": 10.0}},
            }
        )
    )
    assert (
        found.to_markdown()
        == """\
| mean over tasks | seen cells |
|-----------------|-----------:|
| LoRA            | 36.0 ± 1.0 |
| FLix            | 35.0 ± 0.0 |

| Δ from LoRA | seen cells |
|-------------|-----------:|
| FLix        | -1.0 ± 1.0 |

2 seeds (0, 1). ± is the standard error over seeds; differences (Δ) are paired by seed.

| seen cells | ner (exact match) | qa (exact match) |
|------------|------------------:|-----------------:|
| LoRA       |        52.0 ± 2.0 |       20.0 ± 0.0 |
| FLix       |        60.0 ± 0.0 |       10.0 ± 0.0 |
| Δ FLix     |        +8.0 ± 2.0 |      -10.0 ± 0.0 |
"""
    )
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    row = next(row for row in rows if row["method"] == "FLix" and row["task"] == "ner")
    assert (row["mean"], row["difference"], row["paired_seeds"]) == ("60.0", "8.0", "2")


def test_pictures_are_written_and_repeatable(tmp_path):
    found = comparison.Comparison(
        boards(
            {
                method: {seed: {"ner/sw": 50.0 + seed + place} for seed in range(3)}
                for place, method in enumerate(["LoRA", "FLix", "FLix, dropout 0.5"])
            }
        ),
        baseline="LoRA",
    )
    for name in ("a", "b"):
        found.write(tmp_path / name, title="Three methods")
    assert (tmp_path / "a" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "a" / "comparison.svg").read_text()
    assert svg == (tmp_path / "b" / "comparison.svg").read_text()
    assert "![Three methods](comparison.svg)" in (tmp_path / "a" / "comparison.md").read_text()


def test_an_unknown_baseline_names_the_nearest():
    with pytest.raises(ValueError, match=r"baseline 'lora' .*; did you mean 'LoRA'"):
        comparison.Comparison(boards({"LoRA": {0: {"ner/sw": 1.0}}}), baseline="lora")
    with pytest.raises(ValueError, match="got none of \\['LoRA'\\]"):
        comparison.Comparison({"LoRA": {}})
