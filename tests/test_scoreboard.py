"""Score tables against values by hand, and comparisons over seeds against scipy."""

import csv
import dataclasses
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
    assert {(r["cell"], r["metric"]): float(r["value"]) for r in rows if r["cell"]} == {
        (cell, name): value
        for cell, scores in SCORES.items()
        for name, value in scores.items()
        if name != "examples"
    }
    assert {(r["task"], r["group"]): float(r["value"]) for r in rows if not r["cell"]} == {
        ("all tasks", "seen"): 60.0,
        ("ner", "seen"): 50.0,
        ("transliteration", "seen"): 30.0,
        ("all tasks", "unseen"): 15.0,
        ("ner", "unseen"): 15.0,
    }
    assert json.loads((tmp_path / "scores.json").read_text())["means"]["seen"] == {
        "all tasks": 60.0,
        "ner": 50.0,
        "transliteration": 30.0,
    }


# Of the benchmark's: all but Hindi; a task of one's own, `mine`, is not among them.
REPRESENTED = dict.fromkeys(SCORES, True) | {"transliteration/hi": False}
SIZES = {"ner": 20, "transliteration": 29}


@pytest.fixture
def benchmark():
    mine = {"mine/sw": {"exact_match": 90.0, "examples": 4}}
    groups = {**GROUPS, "mine/sw": "seen"}
    return Scoreboard({**SCORES, **mine}, groups, "", REPRESENTED, SIZES)


def test_the_score_of_a_benchmark_is_over_its_languages_and_says_how_many_there_are(benchmark):
    # Trained on or not; Zulu has no examples.
    assert benchmark.mean("under_represented", "ner") == pytest.approx((60 + 40 + 15) / 3)
    assert benchmark.coverage("ner") == (3, 20)
    # By file: two of Punjabi count twice, Hindi is well represented.
    assert benchmark.mean("under_represented", "transliteration") == 20.0
    assert benchmark.coverage("transliteration") == (2, 29)
    # A task of one's own has none, and CER is inverted before it meets F1.
    assert benchmark.mean("under_represented", "mine") is None
    assert benchmark.coverage("mine") is None
    expected = (115 / 3 + (100 - 20)) / 2
    assert benchmark.mean("under_represented") == pytest.approx(expected)
    assert benchmark.mean("seen") == (50.0 + 70.0 + 90.0) / 3  # as without


def test_the_score_of_a_benchmark_in_the_files(benchmark, tmp_path):
    benchmark.write(tmp_path)
    assert scoreboard.read_scores(tmp_path) == benchmark
    means, _, legend = benchmark.to_markdown().split("\n\n")[:3]
    rows = [[entry.strip() for entry in line.split("|")[1:-1]] for line in means.splitlines()]
    assert rows[2:] == [
        ["seen cells", "70.0", "50.0", "30.0", "90.0"],
        ["unseen cells", "15.0", "15.0", "–", "–"],
        ["under-represented", "59.2 (2 tasks)", "38.3 (3 of 20)", "20.0 (2 of 29)", "–"],
    ]
    assert "; n of m: of the m languages (files, where one has several) that" in legend
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["means"]["under_represented"]["transliteration"] == 20.0
    assert record["under_represented"]["evaluated"] == {"ner": 3, "transliteration": 2}
    assert record["under_represented"]["of"] == SIZES
    rows = list(csv.DictReader(io.StringIO(benchmark.to_csv())))
    row = next(r for r in rows if r["group"] == "under_represented" and r["task"] == "ner")
    assert (row["metric"], row["languages"], row["of"]) == ("span_f1", "3", "20")
    assert [r["under_represented"] for r in rows if r["cell"] == "transliteration/hi"] == [
        "False"
    ] * 2
    assert [r["under_represented"] for r in rows if r["cell"] == "mine/sw"] == [""]


def test_every_number_has_a_name_under_which_higher_is_better(benchmark):
    named = benchmark.named()
    assert named["mean_seen"] == 70.0 and named["ner/mean_seen"] == 50.0
    assert named["transliteration/mean_seen"] == 70.0  # of an error rate of 30
    assert named["transliteration/mean_under_represented"] == 80.0
    assert (
        named["transliteration/pa:Arab2Guru"] == named["transliteration/pa:Arab2Guru:cer"] == 70.0
    )
    assert named["ner/sw:exact_match"] == 10.0 and named["ner/sw"] == 60.0
    assert not {"mean_unseen_language", "mine/mean_unseen", "ner/zu"} & named.keys()


def test_intervals_of_means_are_those_of_the_means_of_resamples(benchmark, tmp_path):
    rng = np.random.default_rng(0)
    cells = [cell for cell in benchmark.scores if benchmark.value(cell) is not None]
    resampled = {cell: rng.uniform(0, 100, 50) for cell in cells}
    found = benchmark.with_intervals(resampled, 0.8)
    by_hand = {name: [] for name in found.intervals.means}
    for i in range(50):  # a scoreboard of every resample
        drawn = {
            cell: {**scores, benchmark.headline(cell.partition("/")[0]).name: resampled[cell][i]}
            if cell in resampled
            else scores
            for cell, scores in benchmark.scores.items()
        }
        board = dataclasses.replace(benchmark, scores=drawn)
        for name, values in by_hand.items():
            values.append([board.mean(name, task) for task in (None, "ner")])
    for name, values in by_hand.items():
        for task, column in zip(("all tasks", "ner"), np.array(values).T, strict=True):
            expected = np.percentile(column, [10, 90])
            assert found.intervals.means[name][task] == pytest.approx(expected, abs=1e-9)
    for cell in cells:
        expected = np.percentile(resampled[cell], [10, 90])
        assert found.intervals.cells[cell] == pytest.approx(expected, abs=1e-9)

    found.write(tmp_path)
    assert scoreboard.read_scores(tmp_path) == found
    low, high = found.intervals.cells["ner/sw"]
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    bounds = {r["metric"]: (r["low"], r["high"]) for r in rows if r["cell"] == "ner/sw"}
    assert bounds == {"span_f1": (str(low), str(high)), "exact_match": ("", "")}
    text = found.to_markdown()
    assert "| mean              |      all tasks |         80 % |  ner (span F1) |" in text
    assert f" 60.0 | {f'[{low:.1f}, {high:.1f}]':>12} |" in text
    assert "80 %: bootstrap interval over each cell's examples." in text


def test_intervals_need_every_cell_and_a_share():
    board = Scoreboard(SCORES, GROUPS)
    with pytest.raises(ValueError, match="no resampled scores of ner/sw, ner/yo, trans"):
        board.with_intervals({})
    resampled = {cell: np.ones(3) for cell in SCORES}
    with pytest.raises(ValueError, match="confidence 95: expected more than 0 and less than 1"):
        board.with_intervals(resampled, 95)
    with pytest.raises(ValueError, match="'ner' has 4 under-represented cells, more than the 3"):
        Scoreboard(SCORES, GROUPS, "", REPRESENTED, {**SIZES, "ner": 3})


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
    for text, message in (("[]", "expected a JSON object, got"), ("{}", "not a scoreboard")):
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(ValueError, match=f"scores.json: {message}"):
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
