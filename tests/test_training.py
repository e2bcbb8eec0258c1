"""A whole run on small files: base, adapters, restart, evaluation, inference, mistakes."""

import dataclasses
import json
import re
import shutil
import threading
import time

import jax
import numpy as np
import pytest
from tiny_runs import MODEL, arrays, make_base_run, write_words

from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data.cells import Mixture
from flix_jax.data.vocabularies import ByteVocabulary
from flix_jax.experiments import inference, prediction, training
from flix_jax.experiments.claims import Claims
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import Evaluation
from flix_jax.tasks.xtreme_up import TaskFormat, XtremeUp
from flix_jax.training import loop
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.reporting import read_metrics

TYPES = (FeatureType("task", rank=2, dropout=0.3), FeatureType("language", rank=2, dropout=0.3))
STEPS = 40


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base_run(data_dir):
    return make_base_run(data_dir)


@pytest.fixture(scope="module")
def run(base_run):
    return dataclasses.replace(
        base_run,
        base=base_run,
        adapters=AdapterSpec(FeatureSpace(TYPES), dropout=0.1),
        optimizer=Optimizer("adamw", Schedule(learning_rate=1e-2)),
        total_steps=STEPS,
        keep=5,
    )


@pytest.fixture(scope="module")
def bases_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def whole(run, bases_dir, tmp_path_factory):
    """A run of 40 steps without an interruption, evaluated on the way."""
    run_dir = tmp_path_factory.mktemp("whole")
    run = dataclasses.replace(run, evaluation=Evaluation(batch_size=8, every=20))
    training.train(run, run_dir, bases_dir=bases_dir)
    return run_dir


def data_state(run_dir, step):
    """The position in the data; what was reported until then is another thing."""
    saved = json.loads((run_dir / "checkpoints" / str(step) / "data" / "metadata").read_text())
    return {name: value for name, value in saved.items() if name != loop.REPORT}


def test_a_restarted_run_is_the_run_bit_for_bit(run, whole, bases_dir, tmp_path):
    training.train(dataclasses.replace(run, total_steps=20), tmp_path, bases_dir=bases_dir)
    training.train(run, tmp_path, bases_dir=bases_dir)
    for step in (20, STEPS):
        expected, got = arrays(whole, step), arrays(tmp_path, step)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(value, got[name], err_msg=name)
        assert data_state(whole, step) == data_state(tmp_path, step)
    losses = [
        [(x["step"], x["loss"]) for x in read_metrics(d / "metrics.jsonl") if "loss" in x]
        for d in (whole, tmp_path)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS // run.log_every


def test_adapters_move_and_are_all_that_is_saved(whole):
    before, after = arrays(whole, 20), arrays(whole, STEPS)
    trained = {name for name in after if name.startswith("['trained']")}
    assert trained and all("['flix']" in name for name in trained)
    assert any((before[name] != after[name]).any() for name in trained)


def test_the_folder_tells_what_was_done(whole, run):
    assert "up" in (whole / "cells.txt").read_text()
    assert "attention/query" in (whole / "matched_modules.txt").read_text()
    space = FeatureSpace.from_json((whole / "features.json").read_text())
    assert space.type("language").values == ("x", "y")
    scored = [x for x in read_metrics(whole / "metrics.jsonl") if "up/x/exact_match" in x]
    assert [x["step"] for x in scored] == [20, 40]


def test_evaluation_scores_seen_unseen_and_unseen_language_apart(run, whole, bases_dir):
    said: list[str] = []
    board = inference.evaluate(run, whole, bases_dir=bases_dir, say=said.append)
    assert (
        "evaluate: the adapters have no language for 2 of 6 cells, 10 examples, which run "
        "without one: back/z, up/z"
    ) in said
    assert board.groups == {
        "back/x": "seen",
        "back/y": "seen",
        "up/y": "seen",
        "up/x": "unseen",
        "up/z": "unseen_language",
        "back/z": "unseen_language",
    }
    table = json.loads((whole / "scores.json").read_text())
    assert table["cells"]["up/x"]["examples"] == 5
    assert (table["step"], table["split"]) == (40, "validation")
    folder = whole / "evaluations" / "40"
    assert json.loads((folder / "up.x.scores.json").read_text())["cut_inputs"] == 0
    # A part of the cells leaves the table of all of them alone.
    written = (folder / "scores.json").read_text()
    part = inference.evaluate(run, whole, cells=["up/*"], bases_dir=bases_dir, say=said.append)
    assert len(part.scores) == 3 and (folder / "scores.json").read_text() == written
    lines = (whole / "evaluations" / "40" / "up.z.jsonl").read_text().splitlines()
    assert [json.loads(line)["feature_ids"] for line in lines] == [[1, -1]] * 5


def test_inference_predicts_what_evaluation_predicts(run, whole, bases_dir, tmp_path):
    inference.evaluate(run, whole, bases_dir=bases_dir, say=lambda text: None)
    path = whole / "evaluations" / "40" / "back.y.jsonl"
    expected = [json.loads(line) for line in path.read_text().splitlines()]
    source = tmp_path / "in.jsonl"
    source.write_text(
        "".join(json.dumps({"input": x["inputs"], "language": "y"}) + "\n" for x in expected)
    )
    count = prediction.infer(
        run,
        whole,
        input_path=source,
        output_path=tmp_path / "out.jsonl",
        features="task=back",
        bases_dir=bases_dir,
    )
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert count == len(expected) == len(got)
    assert [x["prediction"] for x in got] == [x["predictions"] for x in expected]


def test_nothing_is_compiled_after_the_first_steps(run, bases_dir, tmp_path, caplog):
    jax.config.update("jax_log_compiles", True)
    try:
        training.train(
            dataclasses.replace(run, total_steps=3, log_every=1),
            tmp_path / "a",
            bases_dir=bases_dir,
        )
        short = sum("Compiling jit(step)" in r.getMessage() for r in caplog.records)
        assert short == 1
    finally:
        jax.config.update("jax_log_compiles", False)


def test_a_base_that_another_worker_trains_is_waited_for(run, base_run, tmp_path):
    base = dataclasses.replace(base_run, total_steps=2, save_every=2)
    job = Job(dataclasses.replace(run, base=base), tmp_path / "trial", bases_dir=tmp_path)
    mine = threading.Thread(
        target=training.train_base, args=[job], kwargs={"bases_dir": tmp_path, "title": "mine"}
    )
    with Claims() as other:
        assert other.take(job.base_dir)
        mine.start()
        time.sleep(1.0)
        assert mine.is_alive() and not (job.base_dir / "run.json").exists()
        training.train(base, job.base_dir)
        made = (job.base_dir / "metrics.jsonl").read_text()
    mine.join(30)
    assert not mine.is_alive() and (job.base_dir / "metrics.jsonl").read_text() == made


@pytest.mark.exhaustive
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(run, bases_dir, tmp_path):
    diverging = dataclasses.replace(
        run,
        optimizer=Optimizer("sgd", Schedule(learning_rate=1e30), clip_norm=None),
        total_steps=8,
        save_every=8,
        log_every=4,
    )
    with pytest.raises(FloatingPointError, match="the loss is (nan|inf) at step"):
        training.train(diverging, tmp_path, bases_dir=bases_dir)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs_length": 0}, "Run.inputs_length must be at least 1, got 0"),
        ({"batch_size": 12}, "batch_size 12 is not a positive multiple of 8"),
        ({"vocabulary": ByteVocabulary(126), "base": "random"}, "385 ids .*, but the model's"),
        ({"mixture": Mixture(include=("upp/*",))}, "'upp/\\*' matches none .* 'up/"),
        ({"mixture": Mixture(held_out=("*/*",))}, "no cell to train on"),
        ({"adapters": AdapterSpec(FeatureSpace(TYPES), "encoder/.*/qurey")}, "qurey.*query"),
        ({"adapters": AdapterSpec(FeatureSpace((FeatureType("lang"),)))}, "'lang'.*'language'"),
        ({"base": "nowhere"}, "nowhere holds no trained run"),
        ({"optimizer": Optimizer(schedule=Schedule(warmup_steps=40))}, "warmup_steps 40"),
        ({"trainable": (".*",)}, "exclude each other"),
        ({"frozen_dtype": "bfloat61"}, "'bfloat61' is none of"),
        ({"transforms": {"upp/*": len}}, "Run.transforms: .*'upp/\\*' matches none"),
        ({"mixture": Mixture(rates={"up/*": 1.0})}, "no pattern gives a weight to .* back/"),
        ({"evaluation": Evaluation(split="tset", every=1)}, "no cell has the split 'tset'"),
        ({"evaluation": Evaluation(keep_best="mean_sen", every=1)}, "did you mean 'mean_seen'"),
        ({"evaluation": Evaluation(examples=5, every=1)}, "examples=5 are fewer than the 6 cells"),
        ({"model": dataclasses.replace(MODEL, emb_dim=24)}, "Run.base has another model"),
        (
            {"mixture": Mixture(held_out=("up/x", "*/z", "up/y"))},
            "Mixture.held_out: the base is trained on up/y, which would not be unseen",
        ),
        (
            {"mixture": Mixture(held_out=("up/y", "*/z")), "seen_by_base": ("up/x",)},
            "Run.seen_by_base: .*'up/x' matches none",
        ),
    ],
)
def test_a_run_that_cannot_work_is_refused_in_one_line(run, bases_dir, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        training.train(dataclasses.replace(run, **change), tmp_path, bases_dir=bases_dir)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_a_folder_tells_what_it_was_trained_on(run, base_run, tmp_path):
    Job(base_run, tmp_path / "base").note_folder()
    cells = json.loads((tmp_path / "base" / "trained_on.json").read_text())
    assert cells == ["back/x", "back/y", "up/y"]
    base, mixture = str(tmp_path / "base"), Mixture(held_out=("back/x", "up/x"))
    other = dataclasses.replace(run, base=base, mixture=mixture)
    with pytest.raises(ValueError, match="the base is trained on back/x, which would not"):
        Job(other, tmp_path / "run")
    Job(dataclasses.replace(other, seen_by_base=("back/*",)), tmp_path / "run")


def test_a_language_more_in_the_data_is_named(run, data_dir, whole, bases_dir, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(data_dir, tmp_path / "data")
    for path in (tmp_path / "data" / "up").glob("*/y.jsonl"):
        shutil.copy(path, path.with_stem("w"))
    more = dataclasses.replace(run, source=XtremeUp(str(tmp_path / "data")))
    message = "has another features: feature type 'language': id 0 is 'w' here and 'x' there"
    with pytest.raises(ValueError, match=message):
        inference.evaluate(more, tmp_path / "run", bases_dir=bases_dir)


@pytest.mark.exhaustive
def test_the_best_checkpoint_is_kept_through_a_restart_and_read(run, data_dir, bases_dir, tmp_path):
    chrf = TaskFormat(metrics=("chrf", "cer"))  # varies more than the exact match of a tiny model
    run = dataclasses.replace(
        run,
        source=XtremeUp(str(data_dir), formats={"up": chrf, "back": chrf}),
        evaluation=Evaluation(batch_size=8, every=3, examples=20, keep_best="mean_seen"),
        total_steps=12,
        save_every=4,
        keep=1,
    )
    for stop in (5, 12):
        training.train(dataclasses.replace(run, total_steps=stop), tmp_path, bases_dir=bases_dir)

    values = {}  # by hand, of what was logged: back/x, back/y and up/y are trained on
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        if "up/x/chrf" in line:
            assert {line[f"{cell}/examples"] for cell in ("up/x", "up/z", "back/y")} == {3}
            back = (line["back/x/chrf"] + line["back/y/chrf"]) / 2
            values[line["step"]] = (back + line["up/y/chrf"]) / 2
    assert list(values) == [3, 5, 6, 9, 12]
    best = max(values, key=values.get)
    record = json.loads((tmp_path / "best.json").read_text())
    assert record["step"] == best and record["value"] == pytest.approx(values[best], abs=1e-9)
    assert record["of"] == run.evaluation.best_by
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {best, 12}

    board = inference.evaluate(
        run, tmp_path, step="best", confidence=0.95, bases_dir=bases_dir, say=lambda text: None
    )
    assert (tmp_path / "evaluations" / str(best) / "scores.json").exists()
    assert board.scores["up/x"]["examples"] == 5  # the whole split
    low, high = board.intervals.cells["up/x"]
    assert low <= board.value("up/x") <= high


def test_a_folder_that_holds_another_run_is_refused(run, whole, bases_dir):
    other = dataclasses.replace(run, seed=1, batch_size=16)
    message = "batch_size is 8 there and 16 here; seed is 0 there and 1 here"
    with pytest.raises(ValueError, match=re.escape(message)):
        training.train(other, whole, bases_dir=bases_dir)


def test_bitfit_trains_what_its_patterns_name_only(run, bases_dir, tmp_path):
    bitfit = dataclasses.replace(
        run, adapters=None, trainable=(r".*/scale",), total_steps=2, frozen_dtype="bfloat16"
    )
    training.train(bitfit, tmp_path, bases_dir=bases_dir)
    trained = {n for n in arrays(tmp_path, 2) if n.startswith("['trained']")}
    assert trained and all(n.endswith("['scale']") for n in trained)
    board = inference.evaluate(bitfit, tmp_path, bases_dir=bases_dir, say=lambda text: None)
    assert board.scores["up/y"]["examples"] == 5
