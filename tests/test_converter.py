import numpy as np
import pytest
import seqio
import tensorflow as tf
from test_vocabularies import train_model

from flix_jax.data.cells import Cell
from flix_jax.data.converter import FlixFeatureConverter
from flix_jax.data.pipeline import TrainPipeline, as_batch
from flix_jax.data.seqio_tasks import (
    load_cell,
    load_cells,
    register_mixture,
    register_task,
    task_name,
)
from flix_jax.data.vocabularies import ByteVocabulary, SentencePieceVocabulary

LENGTHS = {"inputs": 12, "targets": 6}
TEXTS = [
    ("habari ya asubuhi", "safi"),
    ("", ""),
    ("ሰላም", "peace: መልካም"),
    ("a\tb\u00a0c\u2028d", "é"),
    ("exactly 11", "12345"),
    ("one more 1234", "123456"),
]


def in_bytes(text, length):
    """ByT5's ids, written down independently of seqio: bytes + 3, cut to leave room for the end."""
    return [byte + 3 for byte in text.encode()][: length - 1] + [1]


def read(split):
    return [source for source, _ in TEXTS], [target for _, target in TEXTS]


def exact(targets, predictions):
    return {"exact": float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))}


def register(name="test.plain", ids=(0, -1, 3), vocabulary=ByteVocabulary(), reader=read):  # noqa: B008
    feature_ids = None if ids is None else np.array(ids, np.int32)
    return register_task(
        name,
        reader,
        ("train", "validation"),
        vocabulary=vocabulary,
        feature_ids=feature_ids,
        metric_fn=exact,
    )


def test_examples_are_tokenised_cut_and_ended():
    data = load_cell(register(), LENGTHS)
    assert len(data) == len(TEXTS)
    for i, (source, target) in enumerate(TEXTS):
        assert data.inputs[i].tolist() == in_bytes(source, 12)
        assert data.targets[i].tolist() == in_bytes(target, 6)
    assert data.feature_ids.tolist() == [[0, -1, 3]] * len(TEXTS)
    assert data.inputs.values.dtype == data.feature_ids.dtype == np.int32


def test_cut_inputs_and_targets_are_counted():
    data = load_cell(register(), LENGTHS)
    assert data.cut_inputs == sum(len(s.encode()) + 1 > 12 for s, _ in TEXTS) == 2
    assert data.cut_targets == sum(len(t.encode()) + 1 > 6 for _, t in TEXTS) == 2


def test_sentencepiece_ids_are_those_of_the_library(tmp_path):
    import sentencepiece

    model = train_model(tmp_path / "swahili.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    name = register("test.spm", vocabulary=SentencePieceVocabulary(model, extra_ids=5))
    data = load_cell(name, {"inputs": 64, "targets": 64})
    for i, (source, target) in enumerate(TEXTS):
        assert data.inputs[i].tolist() == [*processor.encode(source), 1]
        assert data.targets[i].tolist() == [*processor.encode(target), 1]
    vocabulary = SentencePieceVocabulary(model, extra_ids=5)
    assert vocabulary.build().vocab_size == vocabulary.vocab_size
    assert vocabulary.eos_id == vocabulary.build().eos_id == 1


def test_sizes_agree_with_seqio():
    for extra_ids in (0, 125):
        vocabulary = ByteVocabulary(extra_ids)
        assert vocabulary.build().vocab_size == vocabulary.vocab_size
        assert vocabulary.build().eos_id == vocabulary.eos_id


def test_registering_again_replaces_the_task():
    register(ids=(1, 1, 1))
    register(ids=(2,))
    assert load_cell("test.plain", LENGTHS).feature_ids.tolist() == [[2]] * len(TEXTS)


@pytest.mark.parametrize("ids", [(0, -1, 3), (0,), None])
def test_the_converter_and_the_pipeline_make_the_same_batch(ids):
    name = register(ids=ids)
    converter = FlixFeatureConverter(None if ids is None else len(ids))
    dataset = seqio.TaskRegistry.get(name).get_dataset(LENGTHS, "train", shuffle=False)
    converted = converter(dataset, converter.task_feature_lengths(LENGTHS))
    rows = list(converted.as_numpy_iterator())
    stacked = {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    data = load_cell(name, LENGTHS)
    padded = {
        key: np.array([(in_bytes(t, n) + [0] * n)[:n] for t in read("train")[side]])
        for side, (key, n) in enumerate(LENGTHS.items())
    }
    expected = as_batch(padded["inputs"], padded["targets"])
    if ids is not None:
        expected["feature_ids"] = data.feature_ids
    assert stacked.keys() == expected.keys()
    for key, array in expected.items():
        assert (stacked[key] == array).all(), key
        assert stacked[key].dtype == np.int32
    cell = Cell("t", "l")
    pipeline = TrainPipeline({cell: data}, {cell: 1.0}, lengths=LENGTHS, global_batch_size=6)
    batch = pipeline.batch_at(0)  # one epoch: the same rows in another order
    assert batch.keys() == stacked.keys()
    for key, array in batch.items():
        assert sorted(array.tolist()) == sorted(stacked[key].tolist()), key


def test_a_converter_with_features_leaves_others_without():
    FlixFeatureConverter(3)
    assert set(FlixFeatureConverter(None).TASK_FEATURES) == {"inputs", "targets"}
    with pytest.raises(ValueError, match="num_slots=0"):
        FlixFeatureConverter(0)


def test_the_seqio_evaluator_passes_feature_ids_to_the_model():
    evaluator = seqio.Evaluator(
        register(), FlixFeatureConverter(3), sequence_length=LENGTHS, eval_split="validation"
    )
    seen = []

    def predict(dataset):
        answers = []
        for index, row in dataset.as_numpy_iterator():
            seen.append(row["feature_ids"].tolist())
            answers.append((int(index), row["decoder_target_tokens"].tolist()))
        return answers

    metrics, _ = evaluator.evaluate(
        compute_metrics=True, step=0, predict_fn=predict, score_fn=lambda *_: []
    )
    assert seen == [[0, -1, 3]] * len(TEXTS)
    fitting = sum(len(target.encode()) < 6 for _, target in TEXTS)
    assert metrics.result()["test.plain"]["exact"] == pytest.approx(fitting / len(TEXTS))


def test_tasks_of_other_people_load_too():
    def one(split, shuffle_files):
        return tf.data.Dataset.from_tensors({"inputs": [5, 6, 7], "targets": [8]})

    vocabulary = seqio.PassThroughVocabulary(100, eos_id=1)
    seqio.TaskRegistry.remove("test.foreign")
    seqio.TaskRegistry.add(
        "test.foreign",
        seqio.FunctionDataSource(one, splits=["train"]),
        output_features={n: seqio.Feature(vocabulary, add_eos=True) for n in LENGTHS},
        preprocessors=[seqio.preprocessors.append_eos],
    )
    data = load_cell("test.foreign", {"inputs": 2, "targets": 3})
    assert data.inputs[0].tolist() == [5, 6] and data.targets[0].tolist() == [8, 1]
    assert data.cut_inputs is data.cut_targets is data.feature_ids is None


def test_a_mixture_of_the_cells_is_there_for_users_of_seqio():
    names = [register(f"test.{letter}", ids=(i,)) for i, letter in enumerate("ab")]
    for _ in range(2):  # again, as a second run of the same process does
        register_mixture("test.train", dict(zip(names, (0.25, 0.75), strict=True)))
    dataset = seqio.MixtureRegistry.get("test.train").get_dataset(
        {**LENGTHS, "feature_ids": 1}, "train", shuffle=False, num_epochs=None, seed=0
    )
    drawn = [int(row["feature_ids"][0]) for row in dataset.take(400).as_numpy_iterator()]
    assert 0.65 < np.mean(drawn) < 0.85


def test_loading_refuses_lengths_and_data_of_zero():
    with pytest.raises(ValueError, match=r"lengths\['inputs'\]=0"):
        load_cell(register(), {"inputs": 0, "targets": 3})
    empty = register("test.empty", reader=lambda split: ([], []))
    with pytest.raises(ValueError, match="test.empty: the split 'train' has no examples"):
        load_cell(empty, LENGTHS)


def test_errors_of_the_reader_come_out_as_they_are():
    def broken(split):
        raise ValueError("ner/train/sw.jsonl:3: malformed JSON")

    name = register("test.broken", reader=broken)
    with pytest.raises(ValueError, match=r"^ner/train/sw.jsonl:3: malformed JSON$"):
        load_cell(name, LENGTHS)


def test_cells_are_loaded_by_their_tasks():
    cells = {Cell("t", "a"): register("test.a", ids=(7,))}
    assert load_cells(cells, LENGTHS)[Cell("t", "a")].feature_ids[0].tolist() == [7]


def test_names_hold_what_seqio_allows():
    assert task_name("xtreme_up", Cell("ner", "sw")) == "xtreme_up.ner.sw"
    variant = Cell("transliteration", "hi", "Latn2Deva.hi", "Latn2Deva.hi")
    assert task_name("up", variant) == "up.transliteration.hi:Latn2Deva.hi"
    assert task_name("my-data", Cell("t", "zh-TW")) == "my_data.t.zh_TW"
