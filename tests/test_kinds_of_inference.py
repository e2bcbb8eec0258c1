"""Completion and retrieval from records to scores, against the model applied by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import MODEL

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data.cells import Mixture, find
from flix_jax.data.vocabularies import ByteVocabulary
from flix_jax.experiments import inference, training
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import Evaluation, Run
from flix_jax.tasks.xtreme_up import XtremeUp
from flix_jax.training.optimizers import Optimizer, Schedule

LENGTHS = {"inputs": 24, "targets": 6}
PASSAGES = [{"id": f"p{i}", "title": f"T{i}", "context": f"text {i * 7}"} for i in range(14)]


def write(root, name, records):
    path = root / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write(root, "retrieval_in_lang/index", PASSAGES)
    for language, shift in (("sw", 0), ("te", 3)):
        asked = [{"question": f"Which {i + shift}?", **PASSAGES[i + shift]} for i in range(5)]
        for split in ("train", "validation"):
            write(root, f"retrieval_in_lang/{split}/{language}", asked)
    for split in ("train", "validation"):
        words = [{"context": f"a b{i}", "target": f"b{i}c"} for i in range(6)]
        write(root, f"autocomplete/{split}/be", words)
    return root


@pytest.fixture(scope="module")
def run(data_dir):
    types = (FeatureType("task", rank=2), FeatureType("language", rank=2))
    return Run(
        model=dataclasses.replace(MODEL, dropout_rate=0.0, scan_layers=False),
        source=XtremeUp(str(data_dir)),
        vocabulary=ByteVocabulary(),
        mixture=Mixture(),
        adapters=AdapterSpec(FeatureSpace(types)),
        base="random",
        inputs_length=LENGTHS["inputs"],
        targets_length=LENGTHS["targets"],
        total_steps=2,
        batch_size=8,
        optimizer=Optimizer("sgd", Schedule(learning_rate=1.0)),
        save_every=2,
        log_every=1,
        evaluation=Evaluation(batch_size=8),
    )


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    training.train(run, run_dir)
    return run_dir, inference.evaluate(run, run_dir, say=lambda text: None)


@pytest.fixture(scope="module")
def by_hand(run, evaluated):
    """(model, its parameters, text and cell -> a batch of one)."""
    job = Job(run, evaluated[0])
    trained, frozen, _ = inference.restore(job)

    def batch(text, cell):
        tokens = [*(byte + 3 for byte in text.encode()), 1]
        ids = np.zeros((1, LENGTHS["inputs"]), np.int32)
        ids[0, : len(tokens)] = tokens
        features = job.space.encode(find(cell, run.source.cells()).annotations())
        return {
            "encoder_input_tokens": jnp.asarray(ids),
            "feature_ids": jnp.asarray(features)[None],
        }

    return job.model, tree.join(frozen, trained), batch


def lines(run_dir, cell):
    path = run_dir / "evaluations" / "2" / f"{cell.replace('/', '.')}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("language", ["sw", "te"])
def test_retrieval_ranks_by_embeddings_under_the_cells_features(evaluated, by_hand, language):
    run_dir, board = evaluated
    model, params, batch = by_hand
    cell = f"retrieval_in_lang/{language}"
    embed = jax.jit(lambda batch: model.embed(params, batch, normalize=True)[0])
    passages = np.stack([embed(batch(f"{p['title']} {p['context']}", cell)) for p in PASSAGES])
    reciprocal = []
    for line in lines(run_dir, cell):
        closeness = passages @ np.asarray(embed(batch(line["inputs"], cell)))
        order = np.argsort(-closeness, kind="stable")[:10]
        np.testing.assert_allclose(
            [closeness[int(name[1:])] for name in line["predictions"]], closeness[order], atol=1e-5
        )
        found = line["predictions"]
        answer = line["answer"]
        reciprocal.append(1 / (1 + found.index(answer)) if answer in found else 0.0)
    assert line["inputs"].startswith("which") and len(reciprocal) == 5
    assert board.scores[cell]["mrr_at_10"] == pytest.approx(100 * np.mean(reciprocal))


def test_completion_gives_the_three_best_guesses(evaluated, by_hand):
    run_dir, board = evaluated
    model, params, batch = by_hand
    search = jax.jit(
        lambda batch: model.predict_n(params, batch, max_length=LENGTHS["targets"], beams=3)[0][0]
    )
    vocabulary = ByteVocabulary().build()
    for line in lines(run_dir, "autocomplete/be"):
        assert line["inputs"].startswith("be-a b") and line["inputs"].endswith("$")
        tokens = np.asarray(search(batch(line["inputs"], "autocomplete/be")))
        assert line["predictions"] == [vocabulary.decode(row.tolist()) for row in tokens]
    assert set(board.scores["autocomplete/be"]) == {"top_3_accuracy", "examples"}


def test_intervals_are_made_of_the_predictions(run, evaluated):
    run_dir, board = evaluated
    again = inference.evaluate(run, run_dir, confidence=0.9, say=lambda text: None)
    for cell, scores in board.scores.items():
        assert again.scores[cell] == scores
        low, high = again.intervals.cells[cell]
        assert low <= board.value(cell) <= high


def test_the_table_shows_every_task_by_its_own_metric(evaluated):
    text = (evaluated[0] / "scores.md").read_text()
    assert "MRR@10" in text and "top-3 accuracy" in text
