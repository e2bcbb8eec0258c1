"""What runs do about inputs that stand in evaluation data too, and what they tell of their data."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data.cells import Mixture
from flix_jax.data.vocabularies import ByteVocabulary
from flix_jax.experiments import checks, data_notes, training
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import Evaluation, Run
from flix_jax.experiments.run_folder import check_folder, note_folder
from flix_jax.models.config import T5Config
from flix_jax.tasks.xtreme_up import XtremeUp
from flix_jax.training import stored_steps

MODEL = T5Config(
    vocab_size=384,
    emb_dim=8,
    num_heads=1,
    head_dim=8,
    mlp_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
# `up/z` is held out. What it evaluates on stands in training: `bb` and `e e` (with other white
# space) of x, `kkkkkkkkkk`, which is cut, of y. `dd` of x stands in evaluation data of a trained
# cell alone, and `ll` in training data of the held-out one.
ROWS = {
    ("x", "train"): ["aa", "bb", "cc", "dd", " e\u00a0e", "bb", "ll"],
    ("x", "validation"): ["dd", "qq"],
    ("y", "train"): ["gg", "kkkkkkkkkk", "hhhhhhhhhh"],
    ("z", "train"): ["ll"],
    ("z", "validation"): ["bb", "zz", "e e"],
    ("z", "test"): ["bb", "kkkkkkkkkk"],
}
LEFT = {("x", "train"): ["aa", "cc", "dd", "ll"], ("y", "train"): ["gg", "hhhhhhhhhh"]}


def write(root: Path, rows, task="up"):
    for (language, split), texts in rows.items():
        path = root / task / split / f"{language}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"input": text, "target": text.upper()}) for text in texts]
        path.write_text("".join(line + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(
        model=MODEL,
        source=XtremeUp(str(write(tmp_path_factory.mktemp("data"), ROWS))),
        vocabulary=ByteVocabulary(),
        mixture=Mixture(held_out=("up/z",)),
        inputs_length=8,
        targets_length=8,
        total_steps=1,
        batch_size=8,
        adapters=AdapterSpec(FeatureSpace((FeatureType("language", rank=2),))),
        evaluation=Evaluation(batch_size=8),
    )


def with_overlap(run, overlap, **changes):
    mixture = dataclasses.replace(run.mixture, overlap=overlap)
    return dataclasses.replace(run, mixture=mixture, **changes)


def test_dropping_trains_on_what_is_left_when_the_lines_are_taken_out_by_hand(run, tmp_path):
    by_hand = XtremeUp(str(write(tmp_path / "data", {**ROWS, **LEFT})))
    expected = Job(with_overlap(run, "ignore", source=by_hand), tmp_path / "a").pipeline()
    job = Job(with_overlap(run, "drop"), tmp_path / "b")
    found = job.pipeline()
    assert found.state() == expected.state()
    for name, array in found.batch_at(3).items():
        np.testing.assert_array_equal(array, expected.batch_at(3)[name])
    for cell, row in expected.report().cells.items():
        dropped = len(ROWS[cell.language, "train"]) - row.examples
        assert found.report().cells[cell] == dataclasses.replace(row, dropped=dropped)


def test_a_restarted_run_goes_on_with_the_same_examples_dropped_only(run, tmp_path):
    job, reporting = Job(with_overlap(run, "drop"), tmp_path), Job(run, tmp_path / "report")
    saved = {"step": 5, **job.pipeline().state()}
    again = Job(with_overlap(run, "drop"), tmp_path)
    again.pipeline().check_state(saved)
    with pytest.raises(ValueError, match="belongs to other training data"):
        reporting.pipeline().check_state(saved)


@pytest.mark.parametrize("overlap", ["drop", "report", "ignore"])
def test_other_numbers_of_records_are_told_before_anything_is_tokenised(
    run, overlap, tmp_path, monkeypatch
):
    run = with_overlap(run, overlap)
    saved = {"step": 1, **Job(run, tmp_path).pipeline().state()}
    monkeypatch.setattr(stored_steps, "data_position", lambda _: saved)
    monkeypatch.setattr(Job, "pipeline", None)
    checks.start(run, tmp_path)
    saved["sizes"]["up/x"] += 2
    with pytest.raises(ValueError, match=r"training data .*: sizes\[up/x\] (\d) -> (\d)$") as error:
        checks.start(run, tmp_path)
    there, here = map(int, str(error.value).split()[-3::2])
    assert there == here + 2


def test_the_folder_and_the_log_tell_what_was_dropped(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "fit", lambda *_, **__: None)
    training.train(with_overlap(run, "drop"), tmp_path)
    log = " ".join(capsys.readouterr().err.split())
    assert "inputs stand in evaluation data of held-out cells: 4, of 2 of 2 cells, see" in log
    lines = (tmp_path / "cells.txt").read_text().split("\n\n")[1].splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in lines[2:]] == [
        ("up/x", "3"),
        ("up/y", "1"),
        ("all", "4"),
    ]
    (row,) = (tmp_path / "overlap.txt").read_text().splitlines()[2:]
    assert row.split() == ["up/x", "seen", "validation", "up/x", "1", "2", "50.0"]


def test_overlap_is_reported_and_nothing_dropped_by_default(run, tmp_path):
    job = Job(run, tmp_path)
    pipeline = job.pipeline()
    lines = data_notes.write(job, pipeline.report())
    assert lines[-1] == (
        "evaluation examples whose input stands in training data too: 5, of them in held-out cells "
        f"4; most: 2 of 3 of up/z validation in up/x, see {tmp_path / 'overlap.txt'}"
    )
    table = (tmp_path / "overlap.txt").read_text().splitlines()
    assert [line.split()[:-1] for line in table[2:]] == [
        ["up/z", "unseen_language", "validation", "up/x", "2", "3"],
        ["up/z", "unseen_language", "test", "up/x", "1", "2"],
        ["up/z", "unseen_language", "test", "up/y", "1", "2"],
        ["up/x", "seen", "validation", "up/x", "1", "2"],
    ]
    assert "dropped" not in (tmp_path / "cells.txt").read_text()
    ignoring = Job(with_overlap(run, "ignore"), tmp_path).pipeline()
    assert ignoring.state() == pipeline.state()


def test_ignoring_reads_no_evaluation_data(run, tmp_path):
    data = write(tmp_path / "data", ROWS)
    (data / "up" / "test" / "z.jsonl").write_text("no json\n")
    broken = dataclasses.replace(run, source=XtremeUp(str(data)))
    with pytest.raises(ValueError, match=r"test/z.jsonl:1: malformed JSON"):
        Job(broken, tmp_path / "run").pipeline()
    job = Job(with_overlap(broken, "ignore"), tmp_path / "run")
    data_notes.write(job, job.pipeline().report())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cells.txt"]


def test_dropping_makes_another_run_and_looking_away_does_not(run, tmp_path):
    reporting, dropping, ignoring = (with_overlap(run, x) for x in ("report", "drop", "ignore"))
    assert reporting.fingerprint() == ignoring.fingerprint() != dropping.fingerprint()
    for first, second in ((reporting, ignoring), (ignoring, reporting), (dropping, dropping)):
        note_folder(first, tmp_path)
        check_folder(second, tmp_path)
    for other in (reporting, ignoring):
        note_folder(dropping, tmp_path)
        with pytest.raises(ValueError, match="mixture.overlap is 'drop' there and '"):
            check_folder(other, tmp_path)
    older = {k: v for k, v in reporting.describe().items() if k != "mixture.overlap"}
    (tmp_path / "run.json").write_text(json.dumps(older))
    check_folder(reporting, tmp_path)
    check_folder(ignoring, tmp_path)
    with pytest.raises(ValueError, match="mixture.overlap is absent there and 'drop' here"):
        check_folder(dropping, tmp_path)


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A source that tells other texts than it trains on, or none."""

    inner: XtremeUp
    told: str

    def __getattr__(self, name):
        if name == "texts" or (name == "pairs" and self.told == "none"):
            raise AttributeError(name)
        found = getattr(self.inner, name)
        if name != "pairs":
            return found
        if self.told == "fewer":
            return lambda *of: [x[1:] for x in found(*of)]
        return lambda *of: [x + ["bb"] for x in found(*of)]


@pytest.mark.parametrize(
    ("told", "overlap", "message"),
    [
        ("none", "report", "Mixture.overlap='report' compares texts, but Run.source=Wrapped has"),
        ("fewer", "report", "up/x: Wrapped.pairs gives 6 training examples but its seqio task 7"),
        ("more", "drop", "xtreme_up.up.x: no example 7 to drop, but 7 in the split"),
    ],
)
def test_a_source_that_cannot_be_compared_is_refused(run, tmp_path, told, overlap, message):
    source = Wrapped(run.source, told)
    with pytest.raises(ValueError, match=message):
        Job(with_overlap(run, overlap, source=source), tmp_path).pipeline()
    if told == "none":
        Job(with_overlap(run, "ignore", source=source), tmp_path).pipeline()


@pytest.mark.parametrize("overlap", ["report", "drop"])
def test_a_prompt_does_not_hide_what_stands_elsewhere(run, tmp_path, overlap):
    prompted = dataclasses.replace(run.source, prompts={"up": "{language}: {input}"})
    plain = Job(with_overlap(run, overlap), tmp_path / "a").comparison
    found = Job(with_overlap(run, overlap, source=prompted), tmp_path / "b").comparison
    assert found.overlap == plain.overlap
    assert {k: v.tolist() for k, v in found.dropped.items()} == {
        k: v.tolist() for k, v in plain.dropped.items()
    }


@pytest.mark.parametrize("overlap", ["report", "ignore"])
@pytest.mark.parametrize(("split", "every"), [("train", None), ("validation", 1)])
def test_a_bad_record_is_found_before_the_base_is_trained(
    run, tmp_path, monkeypatch, overlap, split, every
):
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained"))
    data = write(tmp_path / "data", ROWS)
    write(data, {("sw", "train"): ["aa"], ("sw", "validation"): ["aa"]}, task="own")
    with (data / "own" / split / "sw.jsonl").open("a") as file:
        file.write("no json\n")
    whole = with_overlap(run, overlap, source=XtremeUp(str(data)))
    up = dataclasses.replace(whole.mixture, include=("up/*",))
    base = dataclasses.replace(whole, adapters=None, mixture=up)
    evaluation = dataclasses.replace(whole.evaluation, every=every)
    for start in (base, "random"):
        bad = dataclasses.replace(whole, base=start, evaluation=evaluation)
        with pytest.raises(ValueError, match=rf"own/{split}/sw.jsonl:2: "):
            training.train(bad, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_cell_of_which_nothing_is_left_is_named(run, tmp_path):
    source = XtremeUp(str(write(tmp_path / "data", {**ROWS, ("y", "train"): ["bb", "bb"]})))
    with pytest.raises(ValueError, match="up/y: Mixture.overlap='drop' leaves nothing to train"):
        Job(with_overlap(run, "drop", source=source), tmp_path / "run").pipeline()


def test_missing_files_of_the_benchmark_and_skipped_records_are_told(run, tmp_path):
    data = write(tmp_path / "data", ROWS)
    rows = {("sw", "train"): ["a"], ("ha", "validation"): ["b"]}
    write(data, rows, task="semantic_parsing")
    with (data / "up" / "train" / "x.jsonl").open("a") as file:
        file.write("no json\n")
    source = XtremeUp(str(data), on_bad_record="skip")

    def notes(name, **mixture):
        job = Job(
            dataclasses.replace(run, source=source, mixture=Mixture(**mixture)), tmp_path / name
        )
        return data_notes.write(job, job.pipeline().report())

    *_, missing, skipped = notes("some", include=("up/x", "semantic_parsing/*"))
    of_parsing = len(source.missing()["semantic_parsing"])
    place = tmp_path / "some"
    assert missing == (
        "files of the benchmark that the folder lacks: "
        f"semantic_parsing {of_parsing}, see {place / 'missing.txt'}"
    )
    assert (place / "missing.txt").read_text() == source.missing_text() + "\n"
    assert "asr: not there" in source.missing_text()
    assert skipped.startswith("files with records that cannot be read and are left out: 1, see")
    assert (place / "skipped.txt").read_text() == source.skipped_text() + "\n"
    # Nothing of the benchmark is trained on or evaluated.
    assert not [line for line in notes("mine", include=("up/*",)) if "benchmark" in line]
    assert not (tmp_path / "mine" / "missing.txt").exists()
