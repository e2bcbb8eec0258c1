"""English sources of examples: templates, files of translations, tokens, batches, counts."""

import json
import logging

import numpy as np
import pytest
import seqio
from hypothesis import given, settings
from hypothesis import strategies as st

from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.data.cells import Cell
from flix_jax.data.converter import FlixFeatureConverter
from flix_jax.data.description import describe
from flix_jax.data.examples import CellData, Ragged, report_on
from flix_jax.data.pipeline import TrainPipeline
from flix_jax.data.prefetch import PrefetchIterator
from flix_jax.data.seqio_tasks import load_cell, register_task
from flix_jax.data.vocabularies import ByteVocabulary
from flix_jax.evaluation.batches import predict_in_batches
from flix_jax.evaluation.examples import CellExamples
from flix_jax.tasks.formats import TaskFormat
from flix_jax.tasks.source_text import SourceText
from flix_jax.tasks.xtreme_up import XtremeUp

VOCABULARY = ByteVocabulary()
TOPIC, PARSING = Cell("topic", "sw", "sw"), Cell("semantic_parsing", "sw", "sw")
QA = Cell("qa_cross_lang", "sw", "sw")


def write(root, name, lines):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


@pytest.fixture
def folder(tmp_path):
    """Three tasks in Swahili; some topics have no English."""
    topics = [
        {"input": "habari", "target": "a", "input_en": "news", "key": "x"},
        {"input": "michezo", "target": "b", "input_en": None, "key": "y"},
        {"input": "siasa", "target": "c", "key": "z"},
        {"input": "afya", "target": "d", "input_en": "  ", "key": 7},
        {"input": "safari", "target": "e", "input_en": "travel and more", "key": "w"},
    ]
    questions = [
        {
            "question": "nani?",
            "question_translated": "who?",
            "title": "",
            "context": "Somebody.",
            "target": "Somebody",
        }
    ]
    for split in ("train", "validation"):
        write(tmp_path, f"data/topic/{split}/sw.jsonl", topics)
        write(tmp_path, f"data/qa_cross_lang/{split}/sw.jsonl", questions)
        parsing = [{"input": "weka", "target": "[IN:SET ]", "input_en": "set"}]
        write(tmp_path, f"data/semantic_parsing/{split}/sw.jsonl", parsing)
    return tmp_path


@pytest.fixture
def source(folder):
    return XtremeUp(str(folder / "data"))


def in_bytes(text, length):
    """ByT5's ids, by hand: bytes + 3, cut to leave room for the end; nothing for nothing."""
    return [byte + 3 for byte in text.encode()][: length - 1] + [1] if text else []


# What is said


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"templates": "{input_en}"}, r"SourceText.templates='{input_en}': expected a mapping"),
        ({"templates": {"ner": "{"}}, r"SourceText.templates\['ner'\]='{': "),
        ({"templates": {"ner": "{a!r}"}}, r"SourceText.templates\['ner'\]='{a!r}': expected plain"),
        (
            {"templates": {"ner": "none"}},
            r"templates\['ner'\]='none': expected fields of the record",
        ),
        ({"templates": {"ner": "{a}"}, "files": "{file}"}, "exclude each other"),
        ({"files": "mt/{fiel}.jsonl"}, r"no {fiel} here; did you mean 'file'"),
        ({"id": "example_id"}, "SourceText.id='example_id' has no effect without SourceText.files"),
        ({"length": 0}, "SourceText.length=0: expected at least 1"),
        ({"length": 8, "joined": "{source} {input}"}, "SourceText.length=8 has no effect with"),
        ({"joined": "{source}"}, r"SourceText.joined='{source}': expected {input} in it"),
        ({"joined": "{sauce} {input}"}, r"no {sauce} here; did you mean 'source'"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        SourceText(**chosen)


def test_a_format_says_where_its_sources_are():
    with pytest.raises(ValueError, match="TaskFormat.source='none': expected fields"):
        TaskFormat(source="none")
    with pytest.raises(ValueError, match="TaskFormat.source='{': "):
        TaskFormat(source="{")


def test_sources_are_joined_with_inputs_and_without_one_the_input_is_alone():
    both = SourceText(joined="{source} = {input} {{}}")
    assert both.join("a {input}", "b") == "a {input} = b {}"
    assert both.join("", "b") == "b"
    assert both.joiner("a", "b") == "a = b {}"
    assert SourceText().join("a", "b") == "b" and SourceText().joiner is None


# Templates


def test_sources_are_what_the_templates_make_of_the_records(source):
    assert source.sources(TOPIC, "train", SourceText()) == ["news", "", "", "", "travel and more"]
    assert source.sources(PARSING, "train", SourceText()) == ["set"]
    assert source.sources(QA, "train", SourceText()) == [
        "question: who? title:  context: Somebody."
    ]
    chosen = SourceText({"qa_cross_lang": "{task}-{language}: {question_translated} {{{title}}}"})
    assert source.sources(QA, "train", chosen) == ["qa_cross_lang-sw: who? {}"]
    own = XtremeUp(source.data_dir, formats={"topic": TaskFormat(source="{key}")})
    assert own.sources(TOPIC, "train", SourceText()) == ["x", "y", "z", "7", "w"]
    assert own.sources(TOPIC, "train", SourceText({"topic": "{input_en}"}))[0] == "news"


def test_a_source_that_is_no_text_is_an_error_whatever_becomes_of_bad_records(folder):
    lines = [{"input": "a", "target": "b", "input_en": ["a"]}]
    path = write(folder, "data/topic/train/sw.jsonl", ["", *lines])
    for on_bad_record in ("error", "skip"):
        source = XtremeUp(str(folder / "data"), on_bad_record=on_bad_record)
        with pytest.raises(
            ValueError, match=rf"^{path}:2: field 'input_en': expected a string, got"
        ):
            source.sources(TOPIC, "train", SourceText())


def test_sources_belong_to_the_records_that_are_read(folder):
    lines = [
        {"input": "a", "target": "b", "input_en": "A"},
        {"input": "bad"},
        "not json",
        {"input": "c", "target": "d", "input_en": "C"},
    ]
    write(folder, "data/topic/train/sw.jsonl", lines)
    source = XtremeUp(str(folder / "data"), on_bad_record="skip")
    assert source.pairs(TOPIC, "train")[0] == ["a", "c"]
    assert source.sources(TOPIC, "train", SourceText()) == ["A", "C"]


def test_what_cannot_have_a_source_is_told_before_anything_is_read(source):
    source.check_sources([TOPIC, PARSING, QA], SourceText())
    cases = [
        (SourceText({"topci": "{a}"}), r"SourceText.templates: no task 'topci' in .*'topic'"),
        (
            SourceText({"topic": "{input_n}"}),
            r"templates\['topic'\]: no field 'input_n' in .*"
            r"topic/train/sw.jsonl; did you mean 'input_en'",
        ),
    ]
    for chosen, message in cases:
        with pytest.raises(ValueError, match=message):
            source.check_sources([TOPIC, QA], chosen)
    plain = XtremeUp(source.data_dir, formats={"topic": TaskFormat()})
    with pytest.raises(ValueError, match="no example has a source: topic has no template; give"):
        plain.check_sources([TOPIC], SourceText())
    plain.check_sources([TOPIC, QA], SourceText())  # one of them has
    absent = XtremeUp(source.data_dir, formats={"topic": TaskFormat(source="{english}")})
    with pytest.raises(ValueError, match=r"no example has a source: no field 'english' in the rec"):
        absent.check_sources([TOPIC], SourceText())


# Files of translations


def translations(folder, lines, split="train"):
    write(folder, f"mt/topic/{split}/sw.jsonl", lines)
    return f"{folder}/mt/{{task}}/{{split}}/{{file}}.jsonl"


def test_translations_are_joined_by_place_or_by_a_field(folder, source):
    by_place = [{"id": 4, "source": "trip"}, {"id": "0", "source": "news!", "system": "mt"}]
    files = translations(folder, [*by_place, "", {"id": 1, "source": " "}])
    assert source.sources(TOPIC, "train", SourceText(files=files)) == ["news!", "", "", "", "trip"]
    assert source.sources(TOPIC, "validation", SourceText(files=files)) == [""] * 5  # no file
    by_key = [{"id": key, "source": f"of {key}"} for key in (7, "w", "x")]
    translations(folder, by_key)
    found = source.sources(TOPIC, "train", SourceText(files=files, id="key"))
    assert found == ["of x", "", "", "of 7", "of w"]


@settings(max_examples=30)
@given(st.data())
def test_joining_is_a_left_join(tmp_path_factory, data):
    keys = data.draw(st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=8))
    some = data.draw(st.lists(st.sampled_from(keys), unique=True))
    texts = {key: data.draw(st.text().filter(str.strip)) for key in some}
    folder = tmp_path_factory.mktemp("join")
    write(
        folder,
        "data/topic/train/sw.jsonl",
        [{"input": "i", "target": "t", "key": key} for key in keys],
    )
    if not some:
        return
    files = translations(folder, [{"id": key, "source": texts[key]} for key in some])
    source = XtremeUp(str(folder / "data"))
    found = source.sources(TOPIC, "train", SourceText(files=files, id="key"))
    assert found == [texts.get(key, "") for key in keys]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [{"id": 0, "source": "a"}, {"id": "0", "source": "b"}],
            r"sw.jsonl:2: id \"0\" is there twice: first in line 1",
        ),
        ([{"id": 0}], r"sw.jsonl:1: field 'source' is missing: the record has id"),
        (["", {"source": "a"}], r"sw.jsonl:2: field 'id' is missing"),
        ([{"id": 0, "source": None}], r"sw.jsonl:1: field 'source': expected a string, got null"),
        ([{"id": [0], "source": "a"}], r"sw.jsonl:1: field 'id': expected a string, got"),
        (
            [{"id": 0, "source": "a"}, {"id": 5, "source": "b"}, {"id": 6, "source": "c"}],
            r"sw.jsonl:2: id \"5\" names no record of .*data/topic/train/sw.jsonl \(1 more\); ",
        ),
        (["{"], r"sw.jsonl:1: malformed JSON"),
        ([], r"mt/topic/train/sw.jsonl: the file holds no records"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_line(folder, source, lines, message):
    files = translations(folder, lines)
    with pytest.raises(ValueError, match=message):
        source.sources(TOPIC, "train", SourceText(files=files))


def test_a_record_that_cannot_be_named_is_refused_with_its_line(folder, source):
    files = translations(folder, [{"id": "x", "source": "a"}])
    with pytest.raises(ValueError, match=r"data/topic/train/sw.jsonl:1: field 'kee' is missing"):
        source.sources(TOPIC, "train", SourceText(files=files, id="kee"))
    with pytest.raises(
        ValueError, match=r"id \"x\" names no record .*; there is: 'afya', 'habari'"
    ):
        source.sources(TOPIC, "train", SourceText(files=files, id="input"))
    write(folder, "data/topic/train/sw.jsonl", [{"input": "a", "target": "b", "key": 1}] * 2)
    with pytest.raises(
        ValueError, match=r"sw.jsonl:2: field 'key': \"1\" is that of a record before"
    ):
        source.sources(TOPIC, "train", SourceText(files=files, id="key"))


def test_translations_of_records_left_out_are_counted(folder, caplog):
    lines = [{"input": "a", "target": "b"}, {"input": "bad"}, {"input": "c", "target": "d"}]
    write(folder, "data/topic/train/sw.jsonl", lines)
    files = translations(folder, [{"id": i, "source": f"s{i}"} for i in range(3)])
    source = XtremeUp(str(folder / "data"), on_bad_record="skip")
    with caplog.at_level(logging.WARNING):
        assert source.sources(TOPIC, "train", SourceText(files=files)) == ["s0", "s2"]
    assert "1 translations are of records left out" in caplog.text


def test_files_of_a_run_are_one_for_each_split(folder, source):
    files = translations(folder, [{"id": 0, "source": "a"}])
    source.check_sources([TOPIC, QA], SourceText(files=files))
    for pattern, both in (
        ("mt/{task}/{file}.jsonl", "topic/sw train and of topic/sw validation"),
        ("mt/{split}/{file}.jsonl", "topic/sw train and of qa_cross_lang/sw train"),
    ):
        with pytest.raises(ValueError, match=rf"would be of {both}; name {{task}}, {{split}}"):
            source.check_sources([TOPIC, QA], SourceText(files=pattern))
    with pytest.raises(
        ValueError, match=r"none of the 4 files is there, such as no/topic/train/sw"
    ):
        source.check_sources([TOPIC, QA], SourceText(files="no/{task}/{split}/{file}.jsonl"))


# Tokens and batches

LENGTHS = {"inputs": 12, "targets": 6, "sources": 8}
SPACE = FeatureSpace((FeatureType("task", ("topic",), rank=2),))


def register(source, cell=TOPIC, chosen=SourceText(), space=SPACE):  # noqa: B008
    return source.register([cell], vocabulary=VOCABULARY, space=space, source_text=chosen)[cell]


def test_sources_are_tokens_of_their_own_cut_ended_and_counted(source):
    data = load_cell(register(source), LENGTHS)
    texts = ["news", "", "", "", "travel and more"]
    assert [data.sources[i].tolist() for i in range(5)] == [in_bytes(t, 8) for t in texts]
    assert data[4].keys() == {"inputs", "targets", "feature_ids", "sources"}
    assert (data.without_source, data.cut_sources, data.cut_inputs) == (3, 1, 0)
    dropped = load_cell(register(source), LENGTHS, drop=np.array([1, 4]))
    assert [len(dropped.sources[i]) for i in range(3)] == [5, 0, 0]
    assert (dropped.without_source, dropped.cut_sources) == (2, 0)
    assert data.digest() != dropped.digest()
    with pytest.raises(ValueError, match=r"'sources' is missing, which xtreme_up.topic.sw has"):
        load_cell(register(source), {"inputs": 12, "targets": 6})


def test_without_sources_everything_is_as_it_was(source):
    names = source.register([TOPIC], vocabulary=VOCABULARY, space=SPACE)
    data = load_cell(names[TOPIC], LENGTHS)
    assert data.sources is data.cut_sources is data.without_source is None
    pipeline = TrainPipeline({TOPIC: data}, {TOPIC: 1.0}, lengths=LENGTHS, global_batch_size=2)
    assert "source_input_tokens" not in pipeline.batch_at(0)
    assert "sources" not in pipeline.state()["lengths"]
    assert "source" not in pipeline.report().table()


def test_joined_sources_are_part_of_the_inputs(source):
    data = load_cell(register(source, chosen=SourceText(joined="{source} | {input}")), LENGTHS)
    assert data.sources is None and data.without_source == 3
    assert data.inputs[0].tolist() == in_bytes("news | habari", 12)
    assert data.inputs[2].tolist() == in_bytes("siasa", 12)
    assert data.cut_inputs == 2
    assert "without source" in report_on({TOPIC: data}, {TOPIC: 1.0}).table()
    assert "sources cut" not in report_on({TOPIC: data}, {TOPIC: 1.0}).table()


def test_the_converter_and_the_pipeline_make_the_same_batch(source):
    name = register(source)
    converter = FlixFeatureConverter(1, sources=True)
    dataset = seqio.TaskRegistry.get(name).get_dataset(LENGTHS, "train", shuffle=False)
    rows = list(converter(dataset, converter.task_feature_lengths(LENGTHS)).as_numpy_iterator())
    stacked = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    data = load_cell(name, LENGTHS)
    pipeline = TrainPipeline({TOPIC: data}, {TOPIC: 1.0}, lengths=LENGTHS, global_batch_size=5)
    batch = pipeline.batch_at(0)
    assert {k: v.shape for k, v in batch.items()} == pipeline.shapes()
    order = [
        stacked["decoder_target_tokens"][:, 0].tolist().index(t)
        for t in batch["decoder_target_tokens"][:, 0]
    ]
    assert stacked.keys() == batch.keys()
    for key, array in batch.items():
        assert (stacked[key][order] == array).all(), key
        assert array.dtype == stacked[key].dtype == np.int32
    expected = [in_bytes(t, 8) + [0] * 8 for t in ("news", "", "", "", "travel and more")]
    assert stacked["source_input_tokens"].tolist() == [row[:8] for row in expected]


@st.composite
def cells_with_sources(draw):
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    data = {}
    for number in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 6))
        inputs = [[10 + number, 100 + i] for i in range(size)]
        sources = [  # tells its example, or nothing
            [10 + number, 100 + i, *[5] * int(rng.integers(0, 9))] if rng.random() < 0.7 else []
            for i in range(size)
        ]
        data[Cell("t", f"l{number}")] = CellData(
            Ragged.from_rows(inputs),
            Ragged.from_rows([[7, 1]] * size),
            sources=Ragged.from_rows(sources),
        )
    return data


@given(cells_with_sources(), st.integers(1, 7), st.integers(0, 50), st.data())
def test_every_row_has_the_source_of_its_example_on_any_process(data, batch_size, step, draw):
    rates = dict.fromkeys(data, 1 / len(data))

    def make(rows=None):
        return TrainPipeline(
            data, rates, lengths=LENGTHS, global_batch_size=batch_size, seed=3, rows=rows
        )

    batch = make().batch_at(step)
    for row in range(batch_size):
        cell, number = batch["encoder_input_tokens"][row, :2]
        expected = data[Cell("t", f"l{cell - 10}")].sources[number - 100][: LENGTHS["sources"]]
        padded = [*expected, *[0] * (LENGTHS["sources"] - len(expected))]
        assert batch["source_input_tokens"][row].tolist() == padded
    rows = draw.draw(st.lists(st.integers(0, batch_size - 1), unique=True, min_size=1).map(sorted))
    part = make(rows).batch_at(step)
    assert all((part[name] == batch[name][rows]).all() for name in batch)


def test_a_pipeline_goes_on_and_other_sources_are_other_data(source):
    data = load_cell(register(source), LENGTHS)
    others = load_cell(register(source, chosen=SourceText({"topic": "{key}"})), LENGTHS)

    def make(data):
        return TrainPipeline({TOPIC: data}, {TOPIC: 1.0}, lengths=LENGTHS, global_batch_size=2)

    with PrefetchIterator(make(data)) as whole:
        batches = [next(whole) for _ in range(6)]
    with PrefetchIterator(make(data)) as first:
        for _ in range(3):
            next(first)
        state = json.loads(json.dumps(first.state()))
    with PrefetchIterator(make(data)) as second:
        second.restore(state)
        for expected in batches[3:]:
            found = next(second)
            assert all((found[name] == expected[name]).all() for name in expected)
    with PrefetchIterator(make(others)) as third, pytest.raises(ValueError, match="data_digest"):
        third.restore(state)


def test_a_transform_may_change_sources(source):
    data = load_cell(register(source), LENGTHS)

    def drop(example, rng):
        return {"sources": example["sources"][:0] if len(example["sources"]) else np.arange(20)}

    pipeline = TrainPipeline(
        {TOPIC: data},
        {TOPIC: 1.0},
        lengths=LENGTHS,
        global_batch_size=5,
        transforms={"topic/*": drop},
    )
    rows = sorted(pipeline.batch_at(0)["source_input_tokens"].tolist())
    assert rows == [[0] * 8] * 2 + [list(range(8))] * 3


def test_cells_with_and_without_sources_do_not_mix(source):
    some = load_cell(register(source), LENGTHS)
    none = load_cell(
        source.register([PARSING], vocabulary=VOCABULARY, space=SPACE)[PARSING], LENGTHS
    )
    with pytest.raises(ValueError, match="topic/sw has them, semantic_parsing/sw has not"):
        TrainPipeline(
            {TOPIC: some, PARSING: none},
            {TOPIC: 0.5, PARSING: 0.5},
            lengths=LENGTHS,
            global_batch_size=2,
        )
    with pytest.raises(ValueError, match="'sources' is missing"):
        TrainPipeline(
            {TOPIC: some}, {TOPIC: 1.0}, lengths={"inputs": 4, "targets": 4}, global_batch_size=2
        )
    with pytest.raises(ValueError, match="1 inputs but 2 sources"):
        CellData(*[Ragged.from_rows([[1]])] * 2, sources=Ragged.from_rows([[1], [1]]))


def test_a_report_counts_per_cell_and_in_all(source):
    topics = load_cell(register(source), LENGTHS)
    parses = load_cell(register(source, PARSING), LENGTHS)
    report = report_on({TOPIC: topics, PARSING: parses}, {TOPIC: 0.5, PARSING: 0.5})
    assert report.without_source == {TOPIC: 3} and report.cut
    lines = {line.split()[0]: line for line in report.table().splitlines()}
    assert "sources cut" in lines["cell"] and "without source" in lines["cell"]
    assert lines["topic/sw"].split()[-4:] == ["1", "(20.0%)", "3", "(60.0%)"]
    assert lines["semantic_parsing/sw"].split()[-4:] == ["0", "(0.0%)", "0", "(0.0%)"]
    assert lines["all"].split()[-4:] == ["1", "(16.7%)", "3", "(50.0%)"]


def test_a_description_counts_sources(source):
    chosen = SourceText()
    found = describe(
        source,
        [TOPIC, PARSING],
        vocabulary=VOCABULARY,
        lengths=LENGTHS,
        sources=lambda cell, split: source.sources(cell, split, chosen),
    )
    part = next(p for p in found.parts if (p.cell, p.split) == ("topic/sw", "train"))
    assert (part.without_source, part.cut_sources) == (3, 1)
    assert (part.source_tokens.median, part.source_tokens.maximum) == (5, 16)
    assert found.totals[0].without_source == 3
    text = found.format()
    assert "without source" in text and "source tokens" in text and "8 (sources)" in text
    assert "source" not in describe(source, [TOPIC]).format()
    joined = describe(
        source,
        [TOPIC],
        vocabulary=VOCABULARY,
        lengths={"inputs": 12, "targets": 6},
        sources=lambda cell, split: source.sources(cell, split, chosen),
        join=SourceText(joined="{source} | {input}").join,
    )
    assert joined.parts[0].cut_inputs == 2 and joined.parts[0].cut_sources is None


# Evaluation


def test_evaluated_examples_have_their_sources(source):
    name = register(source)
    converter = FlixFeatureConverter(1, sources=True)
    examples = CellExamples(seqio.TaskRegistry.get(name), converter, "validation", LENGTHS)
    assert (examples.without_source, examples.cut_sources, examples.cut_inputs) == (3, 1, 0)
    rows = [row["source_input_tokens"].tolist() for row in examples.rows()]
    texts = ["news", "", "", "", "travel and more"]
    assert rows == [(in_bytes(t, 8) + [0] * 8)[:8] for t in texts]
    examples.score(np.zeros((5, 3), np.int32), 1)
    assert [json.loads(line)["source"] for line in examples.lines()] == [
        text if text.strip() else "" for text in texts
    ]
    other = register(source, chosen=SourceText({"topic": "{key}"}))
    others = CellExamples(seqio.TaskRegistry.get(other), converter, "validation", LENGTHS)
    assert others.digest != examples.digest  # so that predictions are made anew


@given(st.lists(st.tuples(st.integers(1, 128), st.integers(0, 128)), min_size=1, max_size=9))
def test_inputs_and_sources_are_cut_to_one_length_that_holds_both(lengths):
    def padded(count):
        return np.array([7] * count + [0] * (128 - count), np.int32)

    rows = [
        (number, "generate", {"encoder_input_tokens": padded(i), "source_input_tokens": padded(s)})
        for number, (i, s) in enumerate(lengths)
    ]
    seen = []

    def predict(batch):
        shapes = {array.shape for array in batch.values()}
        assert len(shapes) == 1
        seen.append(shapes.pop())
        counts = [(array != 0).sum(axis=1) for array in batch.values()]
        return np.stack(counts, axis=1)

    found = dict(
        pair for batch in predict_in_batches({"generate": predict}, rows, 3) for pair in batch
    )
    assert {key: tuple(value) for key, value in found.items()} == dict(enumerate(lengths))
    assert all(length in (64, 128) for _, length in seen)


def test_sources_of_a_length_of_their_own_keep_it():
    row = {
        "encoder_input_tokens": np.ones(128, np.int32) * (np.arange(128) < 3),
        "source_input_tokens": np.ones(32, np.int32),
    }

    def predict(batch):
        assert batch["encoder_input_tokens"].shape == (2, 64)
        assert batch["source_input_tokens"].shape == (2, 32)
        return np.zeros((2, 1), np.int32)

    assert len(list(predict_in_batches({"generate": predict}, [(0, "generate", row)], 2))) == 1


def test_a_converter_for_sources_passes_on_their_length():
    converter = FlixFeatureConverter(None, sources=True)
    assert converter.task_feature_lengths(LENGTHS) == LENGTHS
    assert FlixFeatureConverter(None).task_feature_lengths(LENGTHS).keys() == {"inputs", "targets"}


def test_a_task_of_ones_own_takes_sources():
    def read(split):
        return ["a", "b"], ["c", "d"]

    name = register_task(
        "test.sources", read, ("train",), vocabulary=VOCABULARY, sources=lambda split: ["", "é"]
    )
    data = load_cell(name, LENGTHS)
    assert [data.sources[i].tolist() for i in (0, 1)] == [[], in_bytes("é", 8)]
