"""Evaluation of cells through seqio, on tiny tasks in memory and a model that knows the answers."""

import json
import logging

import numpy as np
import pytest
import seqio
import tensorflow as tf

from flix_jax.data.cells import Cell
from flix_jax.data.converter import FlixFeatureConverter
from flix_jax.data.seqio_tasks import register_task
from flix_jax.data.vocabularies import ByteVocabulary
from flix_jax.evaluation import evaluator, metrics

VOCABULARY = seqio.ByteVocabulary()
LENGTHS = {"inputs": 24, "targets": 12, "feature_ids": 2}
METRICS = {"ner": ("span_f1", "exact_match")}
SIZES = {"ner/sw": 5, "ner/yo": 1, "topic/sw": 8, "topic/yo": 0}


def register(cell, size):
    def dataset_fn(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensor_slices(
            {
                "inputs": [f"{cell.name} {i} ሀ" for i in range(size)] or tf.zeros([0], tf.string),
                "targets": [f"PER: {i}" for i in range(size)] or tf.zeros([0], tf.string),
            }
        )

    def add_features(dataset):
        ids = [0, 1] if cell.task == "ner" else [1, -1]
        return dataset.map(lambda example: {**example, "feature_ids": tf.constant(ids, tf.int32)})

    name = f"evaluator_test.{cell.task}.{cell.language}"
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset_fn, splits=["validation"]),
        preprocessors=[
            seqio.preprocessors.tokenize,
            add_features,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={
            "inputs": seqio.Feature(VOCABULARY),
            "targets": seqio.Feature(VOCABULARY),
            "feature_ids": seqio.Feature(
                seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.int32
            ),
        },
        metric_fns=[metrics.metric_fn(METRICS.get(cell.task, ("exact_match",)))],
    )
    return name


@pytest.fixture(scope="module")
def tasks():
    cells = {Cell(*name.split("/"), ""): size for name, size in SIZES.items()}
    return {cell: register(cell, size) for cell, size in cells.items()}


class Model:
    """Answers `PER: <number in the input>`, wrongly for odd numbers of ner/sw; keeps batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(batch)
        tokens = np.zeros([len(batch["encoder_input_tokens"]), 10], np.int32)
        for row, ids in enumerate(batch["encoder_input_tokens"]):
            name, number, _ = VOCABULARY.decode(ids.tolist()).split()
            wrong = name == "ner/sw" and int(number) % 2
            answer = VOCABULARY.encode(f"{'LOC' if wrong else 'PER'}: {number}") + [1]
            tokens[row, : len(answer)] = answer
            # What follows the end of sequence is not part of the answer.
            tokens[row, len(answer) :] = 77
        return tokens


def make(tasks, **settings):
    settings = {"split": "validation", "lengths": LENGTHS, "batch_size": 4} | settings
    settings = {"converter": FlixFeatureConverter(num_slots=2)} | settings
    return evaluator.CellEvaluator(tasks, **settings)


EXPECTED = {
    # Right for 0, 2 and 4 of five; precision and recall are both 3/5.
    "ner/sw": {"span_f1": pytest.approx(60), "exact_match": pytest.approx(60), "examples": 5},
    "ner/yo": {"span_f1": pytest.approx(100), "exact_match": 100, "examples": 1},
    "topic/sw": {"exact_match": 100, "examples": 8},
    "topic/yo": {"examples": 0},
}


@pytest.fixture(scope="module")
def run(tasks, tmp_path_factory):
    """One evaluation of everything: (evaluator, run folder, model, scores, progress)."""
    folder, model, progress = tmp_path_factory.mktemp("run"), Model(), []
    cells = make(tasks)
    scores = cells.evaluate({"generate": model}, folder, 40, progress=progress.append)
    return cells, folder, model, scores, progress


def test_scores_every_cell_by_its_tasks_metrics(run):
    assert run[3] == EXPECTED


def test_cells_share_batches_of_one_size(run):
    model = run[2]
    assert len(model.batches) == -(-sum(SIZES.values()) // 4)
    for batch in model.batches:
        assert batch["encoder_input_tokens"].shape == (4, 24)
        assert batch["decoder_target_tokens"].shape == (4, 12)
    # The second batch holds the end of ner/sw, ner/yo and the beginning of topic/sw.
    assert model.batches[1]["feature_ids"].tolist() == [[0, 1], [0, 1], [1, -1], [1, -1]]


def test_short_inputs_are_padded_less_and_keep_their_places(tmp_path):
    words = [1, 30, 6, 100, 60, 2, 29, 12, 3, 90, 31]  # of two bytes and a space

    def dataset_fn(split, shuffle_files=False, seed=None):
        inputs = [f"{i} " + "ab " * count for i, count in enumerate(words)]
        targets = [str(i) for i in range(len(words))]
        return tf.data.Dataset.from_tensor_slices({"inputs": inputs, "targets": targets})

    seqio.TaskRegistry.remove("evaluator_test.lengths")
    seqio.TaskRegistry.add(
        "evaluator_test.lengths",
        source=seqio.FunctionDataSource(dataset_fn, splits=["validation"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={name: seqio.Feature(VOCABULARY) for name in ("inputs", "targets")},
        metric_fns=[metrics.exact_match],
    )
    shapes = []

    def predict(batch):
        inputs = batch["encoder_input_tokens"]
        shapes.append(inputs.shape)
        answers = [VOCABULARY.decode(row.tolist()).split()[0] for row in inputs]
        return np.array([(VOCABULARY.encode(a) + [1, 0])[:3] for a in answers])

    cells = evaluator.CellEvaluator(
        {Cell("any", "sw"): "evaluator_test.lengths"},
        "validation",
        {"inputs": 320, "targets": 8},
        FlixFeatureConverter(None),
        batch_size=2,
    )
    assert cells.evaluate({"generate": predict}, tmp_path, 0)["any/sw"]["exact_match"] == 100
    # 320 is halved twice: of 11 inputs 5 fit into 80, 3 more into 160, 3 are longer.
    assert sorted(shapes) == [(2, 80)] * 3 + [(2, 160)] * 2 + [(2, 320)] * 2


def register_texts(name, splits, metric_names=(), answers=None):
    register_task(
        name,
        splits.__getitem__,
        tuple(splits),
        vocabulary=ByteVocabulary(),
        metric_fn=metrics.metric_fn(metric_names) if metric_names else None,
        answers=answers,
    )
    return name


def test_guesses_are_scored_in_their_order(tmp_path):
    words = ["alpha", "beta", "gamma"]
    task = register_texts(
        "evaluator_test.words",
        {"validation": ([f"w{i}" for i in range(3)], words)},
        ("top_3_accuracy",),
    )
    cell = Cell("autocomplete", "sw")

    def complete(batch):
        # The first two words are guessed, at the first and at the second place.
        out = np.zeros((4, 3, 8), np.int32)
        for row, ids in enumerate(batch["encoder_input_tokens"]):
            number = int(VOCABULARY.decode(ids.tolist())[1:])
            guesses = ["x", "y", "z"]
            if number < 2:
                guesses[number] = words[number]
            for place, guess in enumerate(guesses):
                answer = [*VOCABULARY.encode(guess), 1]
                out[row, place, : len(answer)] = answer
        return out

    cells = make({cell: task}, kinds={cell: "complete"}, converter=FlixFeatureConverter(None))
    scores = cells.evaluate({"complete": complete}, tmp_path, 5)
    assert scores["autocomplete/sw"] == {"top_3_accuracy": pytest.approx(200 / 3), "examples": 3}
    lines = (tmp_path / "evaluations" / "5" / "autocomplete.sw.jsonl").read_text().splitlines()
    assert [json.loads(line)["predictions"] for line in lines] == [
        ["alpha", "y", "z"],
        ["x", "beta", "z"],
        ["x", "y", "z"],
    ]


def test_retrieval_ranks_the_passages_of_an_index(tmp_path):
    questions, gold = ["q0", "q1", "q2", "q3", "q4"], ["p0", "p3", "p1", "p6", "p2"]
    passages = [f"p{i}" for i in range(7)]
    task = register_texts(
        "evaluator_test.questions",
        {"validation": (questions, ["a passage"] * 5)},
        ("mrr_at_10",),
        answers=lambda split: gold,
    )
    index = register_texts("evaluator_test.index", {"index": (passages, passages)})
    # On an arc, the passage of a number lies nearest to the question of that number.
    angles = np.arange(7) * np.pi / 20
    calls = []

    def embed(batch):
        calls.append(len(batch["encoder_input_tokens"]))
        numbers = [int(VOCABULARY.decode(r.tolist())[1:]) for r in batch["encoder_input_tokens"]]
        return np.stack([np.cos(angles[numbers]), np.sin(angles[numbers])], 1).astype(np.float32)

    cell = Cell("retrieval_in_lang", "sw")
    cells = make(
        {cell: task},
        kinds={cell: "retrieve"},
        indexes={cell: index},
        converter=FlixFeatureConverter(None),
    )
    scores = cells.evaluate({"retrieve": embed}, tmp_path, 5)
    lines = (tmp_path / "evaluations" / "5" / "retrieval_in_lang.sw.jsonl").read_text().splitlines()
    ranks = []
    for number, line in enumerate(map(json.loads, lines)):
        by_distance = sorted(range(7), key=lambda p: (abs(p - number), p))
        distances = [abs(int(guess[1:]) - number) for guess in line["predictions"]]
        assert distances == sorted(abs(p - number) for p in by_distance)
        assert line["answer"] == gold[number] and line["targets"] == "a passage"
        ranks.append(1 + line["predictions"].index(gold[number]))
    assert scores["retrieval_in_lang/sw"]["mrr_at_10"] == pytest.approx(
        100 * np.mean([1 / rank for rank in ranks])
    )
    assert calls == [4] * 4  # two batches of questions, two of passages
    # Another step's parameters embed the passages anew; a finished cell embeds nothing.
    cells.evaluate({"retrieve": embed}, tmp_path, 6)
    assert calls == [4] * 8
    assert cells.evaluate({"retrieve": embed}, tmp_path, 6) == scores
    assert calls == [4] * 8


@pytest.fixture
def predicts(tmp_path):
    """Whether evaluating (inputs, targets) under one name in one folder calls the model."""

    def evaluated(inputs, targets):
        name = "evaluator_test.edited"
        if name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(name)
        register_texts(name, {"validation": (inputs, targets)}, ("exact_match",))
        calls = []

        def predict(batch):
            calls.append(batch)
            return np.ones((4, 3), np.int32)

        cells = make({Cell("topic", "sw"): name}, converter=FlixFeatureConverter(None))
        cells.evaluate({"generate": predict}, tmp_path, 5)
        return bool(calls)

    return evaluated


def test_edited_examples_are_predicted_again(predicts):
    assert predicts(["a", "b"], ["x", "y"])
    assert not predicts(["a", "b"], ["x", "y"])
    assert predicts(["a", "b"], ["x", "z"])
    assert predicts(["a", "c"], ["x", "z"])
    assert not predicts(["a", "c"], ["x", "z"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": {Cell("topic", "sw"): "retreive"}}, "topic/sw.*did you mean 'retrieve'"),
        ({"kinds": {Cell("topic", "sw"): "retrieve"}}, "topic/sw.*needs an index"),
    ],
)
def test_a_kind_of_inference_is_checked_before_anything_is_read(tasks, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tasks, **settings)


def test_writes_the_predictions_of_each_cell(run):
    lines = (run[1] / "evaluations" / "40" / "ner.sw.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][:2] == [
        {
            "inputs": "ner/sw 0 ሀ",
            "targets": "PER: 0",
            "predictions": "PER: 0",
            "feature_ids": [0, 1],
        },
        {
            "inputs": "ner/sw 1 ሀ",
            "targets": "PER: 1",
            "predictions": "LOC: 1",
            "feature_ids": [0, 1],
        },
    ]
    assert len(lines) == 5
    assert not list(run[1].glob("**/*.tmp"))


def test_progress_counts_up_to_all_examples_and_cells(run):
    progress = run[4]
    assert (progress[-1].cells_done, progress[-1].cells) == (4, 4)
    assert progress[-1].examples_done == 14
    done = [step.examples_done for step in progress]
    assert done == sorted(done)


def test_a_missing_split_is_named(run, tasks, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "flix_jax"):
        scores = make(tasks, split="test").evaluate({"generate": Model()}, tmp_path, 0)
    assert scores == {name: {"examples": 0} for name in SIZES}
    assert "for want of a test split: ner/sw, ner/yo, topic/sw, topic/yo" in caplog.text
    assert make(tasks, split="test").missing == tuple(SIZES)


def test_a_finished_cell_is_not_predicted_again(run, tasks):
    def predict(batch):
        raise AssertionError("predicted again")

    assert make(tasks).evaluate({"generate": predict}, run[1], 40) == EXPECTED


def test_an_interrupted_evaluation_goes_on_where_it_stood(run, tmp_path):
    class Killed(Model):
        def __call__(self, batch):
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().__call__(batch)

    cells = run[0]
    with pytest.raises(KeyboardInterrupt):
        cells.evaluate({"generate": Killed()}, tmp_path, 3)
    model = Model()
    assert cells.evaluate({"generate": model}, tmp_path, 3) == EXPECTED
    # ner/sw and ner/yo had been written; only the eight rows of topic/sw remain.
    assert len(model.batches) == 2
    assert {tuple(row) for batch in model.batches for row in batch["feature_ids"]} == {(1, -1)}


def test_few_cells_wait_for_rows_of_a_rare_length(tmp_path):
    """Each cell has one long input, which would wait for those of 15 others to fill a batch."""
    rows = (["long " * 18, *["short"] * 16], ["x"] * 17)
    cells = {}
    for number in range(12):
        name = register_texts(f"evaluator_test.rare{number}", {"validation": rows}, ("cer",))
        cells[Cell("topic", f"l{number:02}")] = name
    waiting = make(
        cells,
        lengths={"inputs": 128, "targets": 4},
        converter=FlixFeatureConverter(None),
        batch_size=16,
    )
    kept = []

    def predict(batch):
        kept.append(len(list(tmp_path.rglob("*.scores.json"))))
        return np.ones((16, 3), np.int32)

    waiting.evaluate({"generate": predict}, tmp_path, 0)
    # A batch of short ones for each cell, and one of long ones after five cells, ten, and twelve.
    assert kept == [0, 0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 5, 10, 10, 10]


@pytest.mark.parametrize(
    "change", [{"fingerprint": "another checkpoint"}, {"examples_per_cell": 3}, "a cut file"]
)
def test_what_was_made_otherwise_is_made_again(run, tasks, tmp_path, change):
    run[0].evaluate({"generate": Model()}, tmp_path, 0)
    again, fingerprint = run[0], ""
    yoruba = {cell: task for cell, task in tasks.items() if cell.name == "ner/yo"}
    if change == "a cut file":
        file = tmp_path / "evaluations" / "0" / "ner.yo.jsonl"
        file.write_text(file.read_text()[:-9])
    elif "fingerprint" in change:
        again, fingerprint = make(yoruba), change["fingerprint"]
    else:
        again = make(yoruba, **change)
    model = Model()
    again.evaluate({"generate": model}, tmp_path, 0, fingerprint=fingerprint)
    assert len(model.batches) == 1


def test_a_budget_takes_the_same_examples_each_time(tasks, tmp_path):
    scores, inputs = [], []
    for step in range(2):
        cells = make(
            {cell: task for cell, task in tasks.items() if cell.name == "topic/sw"},
            examples_per_cell=3,
        )
        scores.append(cells.evaluate({"generate": Model()}, tmp_path, step))
        file = tmp_path / "evaluations" / str(step) / "topic.sw.jsonl"
        inputs.append([json.loads(line)["inputs"] for line in file.read_text().splitlines()])
    assert scores[0] == scores[1] == {"topic/sw": {"exact_match": 100, "examples": 3}}
    assert inputs[0] == inputs[1] and len(set(inputs[0])) == 3


def test_a_task_registered_anew_is_not_mistaken_for_the_old_one(tasks, tmp_path):
    cell = Cell("ner", "am")
    cells = make({cell: register(cell, 2)})
    seqio.TaskRegistry.remove("evaluator_test.ner.am")
    register(cell, 3)
    with pytest.raises(ValueError, match="'evaluator_test.ner.am' was registered anew"):
        cells.evaluate({"generate": Model()}, tmp_path, 0)


def test_splits_of_one_step_do_not_share_a_folder(tasks, tmp_path):
    folders = {make(tasks, split=split).folder(tmp_path, 7) for split in ("validation", "test")}
    assert folders == {tmp_path / "evaluations/7", tmp_path / "evaluations/7/test"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"examples_per_cell": 0}, "examples per cell must be at least 1, got 0"),
        ({"lengths": {"inputs": 8}}, "length of at least 1 for 'targets', got None"),
    ],
)
def test_bad_settings_are_refused(tasks, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tasks, **settings)
    with pytest.raises(ValueError, match="no cells to evaluate"):
        make({})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros([3, 5], np.int32), r"shape \(3, 5\); expected token ids \[batch, length\] with"),
        (np.zeros([4, 5], np.float32), "float32; expected token ids"),
    ],
)
def test_predictions_of_a_wrong_shape_are_refused(run, tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        run[0].evaluate({"generate": lambda batch: tokens}, tmp_path, 0)
