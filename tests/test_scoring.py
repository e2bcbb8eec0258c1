"""A run's scoreboard, budget and best number against counting by hand and the published lists."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flix_jax.data.cells import Cell, Mixture
from flix_jax.evaluation.bootstrap import confidence_interval
from flix_jax.evaluation.scoreboard import Scoreboard
from flix_jax.experiments import scoring
from flix_jax.experiments.run import Evaluation
from flix_jax.tasks.xtreme_up import XtremeUp


def by_turns(sizes, examples):
    """Gives one example of each cell after the other, in whole rounds."""
    given = [0] * len(sizes)
    while True:
        turn = [i for i, size in enumerate(sizes) if given[i] < size]
        if not turn or sum(given) + len(turn) > examples:
            return given
        for i in turn:
            given[i] += 1


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 120))
def test_a_budget_is_given_by_turns(sizes, more):
    examples = len(sizes) + more
    share = scoring.even_share(sizes, examples)
    given = [size if share is None else min(size, share) for size in sizes]
    assert given == by_turns(sizes, examples)
    assert (share is None) == (sum(sizes) <= examples)


FILES = {
    "ner/sw": 4,
    "ner/yo": 2,
    "translation/en2sw": 3,
    "translation/fr2sw": 3,
    "transliteration/Latn2Guru.pa": 3,
    "transliteration/Guru2Latn.pa": 3,
    "transliteration/Latn2Deva.hi": 3,
    "mine/sw": 3,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What of a run is looked at here, over files of XTREME-UP's names."""
    root = tmp_path_factory.mktemp("data")
    for name, count in FILES.items():
        task, _, file = name.partition("/")
        record = {"text": "a", "spans": []} if task == "ner" else {"input": "a", "target": "b"}
        for split in ("train", "validation"):
            path = root / task / split / f"{file}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(count * (json.dumps(record) + "\n"))
    return SimpleNamespace(source=XtremeUp(str(root)), evaluation=Evaluation(every=1))


@pytest.fixture(scope="module")
def split(run):
    return Mixture(held_out=("ner/yo",)).select(run.source.cells(), lambda cell: True)


def test_the_source_knows_the_benchmarks_languages(run):
    found = {cell.name: run.source.under_represented(cell) for cell in run.source.cells()}
    assert found == {
        "ner/sw": True,
        "ner/yo": True,
        "translation/sw:en2sw": True,
        "translation/sw:fr2sw": None,
        "transliteration/pa:Latn2Guru.pa": True,
        "transliteration/pa:Guru2Latn.pa": True,
        "transliteration/hi": False,
        "mine/sw": None,
    }
    # As the paper counts them, arXiv 2305.11938: all of ner, 70 of translation, 77 of asr.
    sizes = {
        task: run.source.benchmark_size(task) for task in ("ner", "translation", "asr", "mine")
    }
    assert sizes == {"ner": 20, "translation": 70, "asr": 77, "mine": 0}


def test_the_scoreboard_of_a_run_knows_groups_and_the_benchmark(run, split):
    values = {"ner/sw": 60.0, "ner/yo": 20.0}
    scores = {name: {"span_f1": value, "examples": 2} for name, value in values.items()}
    scores["mine/sw"] = {"exact_match": 90.0, "examples": 3}
    board = scoring.scoreboard(run, split, scores)
    assert board.groups == {"ner/sw": "seen", "ner/yo": "unseen_language", "mine/sw": "seen"}
    assert board.mean("under_represented") == 40.0
    assert board.coverage("ner") == (2, 20) and board.coverage("mine") is None
    plain = SimpleNamespace(source=SimpleNamespace(), evaluation=run.evaluation)
    assert scoring.scoreboard(plain, split, scores).present_means == ("seen", "unseen_language")


def evaluated(run, **changes):
    evaluation = dataclasses.replace(run.evaluation, **changes)
    return SimpleNamespace(source=run.source, evaluation=evaluation)


def test_the_best_number_is_found_in_the_scores_of_an_evaluation(run, split):
    scores = {"ner/sw": {"span_f1": 60.0, "examples": 2}, "mine/sw": {"examples": 0}}
    scores["transliteration/hi"] = {"cer": 30.0, "exact_match": 1.0, "examples": 3}
    for name, value in (
        ("mean_seen", 65.0),
        ("transliteration/hi", 70.0),
        ("ner/sw:span_f1", 60.0),
    ):
        named = evaluated(run, keep_best=name)
        scoring.check_evaluation(named, split)
        assert scoring.judge(named, split)(scores) == value
    with pytest.raises(ValueError, match="keep_best='mine/sw': there is no such number, for want"):
        scoring.judge(evaluated(run, keep_best="mine/sw"), split)(scores)
    assert scoring.judge(run, split) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_best": "mean_sen"}, "'mean_sen' is no number .*; did you mean 'mean_seen'"),
        ({"keep_best": "ner/sw:span_f2"}, "did you mean 'ner/sw:span_f1'"),
        ({"keep_best": "ner/sw:chrf"}, "did you mean 'ner/sw'"),  # not a metric of the task
        ({"keep_best": "mean_unseen"}, "did you mean 'mean_seen'"),  # no such cells
        ({"examples": 7}, "examples=7 are fewer than the 8 cells with the split 'validation'"),
        ({"examples": 9, "examples_per_cell": 1}, "exclude each other"),
        ({"keep_best": "mean_seen", "every": None}, "no effect without Evaluation.every"),
        ({"examples": 0}, "Evaluation.examples must be at least 1, got 0"),
    ],
)
def test_what_an_evaluation_cannot_do_is_refused_in_one_line(run, split, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        scoring.check_evaluation(evaluated(run, **changes), split)
    assert "\n" not in str(error.value)


def test_a_total_of_examples_is_counted_over_the_cells_of_the_split(run, split):
    total = evaluated(run, examples=20)
    assert scoring.examples_per_cell(total, split.cells) == 2  # 8 cells, 3 each would be 24
    assert scoring.examples_per_cell(evaluated(run, examples=23), split.cells) == 3
    assert scoring.examples_per_cell(evaluated(run, examples=24), split.cells) is None
    assert scoring.examples_per_cell(evaluated(run, examples_per_cell=5), split.cells) == 5
    assert scoring.examples_per_cell(run, split.cells) is None
    untold = SimpleNamespace(
        source=SimpleNamespace(splits=run.source.splits), evaluation=total.evaluation
    )
    with pytest.raises(ValueError, match="SimpleNamespace does not tell .*examples_per_cell"):
        scoring.check_evaluation(untold, split)


def predictions(folder, cell, targets, guesses):
    lines = [
        json.dumps({"inputs": "", "targets": t, "predictions": p}) + "\n"
        for t, p in zip(targets, guesses, strict=True)
    ]
    (folder / f"{cell.replace('/', '.').replace(':', '.')}.jsonl").write_text("".join(lines))


def test_intervals_come_from_the_predictions_on_disk(tmp_path):
    rng = np.random.default_rng(1)
    targets = ["".join(rng.choice(list("abቀቁ"), 6)) for _ in range(30)]
    guesses = [t if rng.random() < 0.5 else t[::-1] for t in targets]
    from flix_jax.evaluation.metrics import METRICS

    cells = {"a/x:en2x": "cer", "a/y": "cer", "b/x": "exact_match"}
    scores = {
        cell: METRICS[metric].function(targets, guesses) | {"examples": 30}
        for cell, metric in cells.items()
    }
    scores["b/y"] = {"examples": 0}
    for cell in cells:
        predictions(tmp_path, cell, targets, guesses)
    board = Scoreboard(scores, dict.fromkeys(scores, "seen"))
    found = scoring.with_intervals(board, tmp_path, 0.9)
    assert found.intervals.cells.keys() == cells.keys()
    for cell, metric in cells.items():
        expected = confidence_interval(
            metric, targets, guesses, seed=list(cell.encode()), confidence=0.9
        )
        assert found.intervals.cells[cell] == pytest.approx(expected, abs=1e-9)
    # Cells are drawn independently of each other, and alike the next time.
    assert found.intervals.cells["a/y"] != found.intervals.cells["a/x:en2x"]
    assert scoring.with_intervals(board, tmp_path, 0.9) == found
    # Two languages of one score each: the mean varies less, by the root of two.
    width = [high - low for low, high in found.intervals.cells.values()]
    low, high = found.intervals.means["seen"]["a"]
    assert high - low == pytest.approx(np.mean(width[:2]) / np.sqrt(2), rel=0.1)

    predictions(tmp_path, "a/y", targets, targets)
    with pytest.raises(ValueError, match=r"a.y.jsonl: its CER is 0.000000, but a/y was scored"):
        scoring.with_intervals(board, tmp_path, 0.9)
    (tmp_path / "a.y.jsonl").write_text('{"targets": "a"}\n')
    with pytest.raises(ValueError, match="a.y.jsonl: not the predictions of a cell: 'predictions'"):
        scoring.with_intervals(board, tmp_path, 0.9)
    (tmp_path / "a.y.jsonl").unlink()
    with pytest.raises(ValueError, match="a.y.jsonl: no predictions of a/y; evaluate it first"):
        scoring.with_intervals(board, tmp_path, 0.9)


def test_a_cell_without_a_file_is_none_of_the_benchmarks(run):
    assert run.source.under_represented(Cell("ner", "xx", "xx")) is None
