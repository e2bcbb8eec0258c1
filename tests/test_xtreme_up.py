import json
import os
import time

import numpy as np
import pytest
import seqio
from hypothesis import given
from hypothesis import strategies as st

from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.data.cells import Cell, Mixture, columns, find
from flix_jax.data.seqio_tasks import load_cells
from flix_jax.data.vocabularies import ByteVocabulary
from flix_jax.tasks.xtreme_up import (
    FORMATS,
    TaskFormat,
    XtremeUp,
    ner,
    read_records,
    text,
)

SW = Cell("ner", "sw", "sw")
NAME, PLACE = "Wangarĩ", "Nyeri\u00a0mjini"
SENTENCE = f"{NAME} alizaliwa\t{PLACE} 1940."


def span(entity, label, sentence=SENTENCE):
    start = sentence.encode().index(entity.encode())
    return {"start_byte": start, "limit_byte": start + len(entity.encode()), "label": label}


def write(root, files):
    for path, records in files.items():
        file = root / f"{path}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return XtremeUp(str(root))


PLAIN = {"input": "hello", "target": "habari"}
NER = {"text": SENTENCE, "spans": [span(PLACE, "LOC"), span(NAME, "PER"), span("1940", "DATE")]}
QA = {"question": "Nani?", "title": "", "context": "Ni mimi.", "target": "mimi", "other": 1}


# Records


@pytest.mark.parametrize(
    ("task", "file", "record", "expected"),
    [
        ("ner", "sw", NER, (SENTENCE, f"PER: {NAME} $$ LOC: {PLACE} $$ DATE: 1940")),
        ("ner", "sw", {"text": "Hakuna.", "spans": []}, ("Hakuna.", "")),
        ("ner", "sw", {"text": "Hakuna.", "target": "PER: x"}, ("Hakuna.", "PER: x")),
        ("qa_cross_lang", "ha", QA, ("question: Nani? title:  context: Ni mimi.", "mimi")),
        ("qa_in_lang", "sw", QA, ("question: Nani? title:  context: Ni mimi.", "mimi")),
        ("translation", "en2sw", PLAIN, ("hello", "habari")),
        ("semantic_parsing", "de_localized", PLAIN, ("hello", "habari")),
        ("transliteration", "Latn2Deva.hi", PLAIN, ("hi-Latn-Deva hello", "habari")),
        ("asr", "af_za", PLAIN, ("hello", "habari")),
        ("sentiment", "jv", PLAIN, ("hello", "habari")),
        ("my_own_task", "sw", {"input": "", "target": ""}, ("", "")),
    ],
)
def test_records_become_pairs(tmp_path, task, file, record, expected):
    source = write(tmp_path, {f"{task}/train/{file}": [record]})
    (cell,) = source.cells()
    assert list(zip(*source.pairs(cell, "train"), strict=True)) == [expected]


words = st.text(st.characters(blacklist_categories=["Cs"]), max_size=6)


@given(st.lists(st.tuples(words, st.sampled_from(["PER", "LOC", "ORG"]), words), max_size=6))
def test_entities_are_cut_out_of_any_text(pieces):
    """The text is put together from known entities; the offsets are counted on the way."""
    content, spans, expected = b"", [], []
    for before, label, entity in pieces:
        content += before.encode()
        start, content = len(content), content + entity.encode()
        if entity:
            spans.append({"start_byte": start, "limit_byte": len(content), "label": label})
            expected.append(f"{label}: {entity}")
    record = {"text": content.decode(), "spans": spans[::-1]}
    assert ner(record, SW) == (content.decode(), " $$ ".join(expected))


@pytest.mark.parametrize(
    ("start", "limit", "message"),
    [
        (0, 10**6, "outside the text"),
        (-1, 3, "outside the text"),
        (3, 3, "is empty"),
        (5, 2, "outside the text"),
        (None, 2, "start_byte=None"),
        (0, 7, "splits a UTF-8 character"),
        (7, 9, "splits a UTF-8 character"),
    ],
)
def test_bad_offsets_are_refused(start, limit, message):
    bad = {"start_byte": start, "limit_byte": limit, "label": "PER"}
    with pytest.raises(ValueError, match=message):
        ner({"text": SENTENCE, "spans": [bad]}, SW)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "a", "target"', "malformed JSON"),
        ('{"input": "a"}', "field 'target' is missing: the record has input"),
        ('{"input": "a", "target": null}', "field 'target': expected a string, got null"),
        ('{"input": "a", "target": ["b"]}', 'expected a string, got \\["b"\\]'),
        ('{"input": "a", "target": "\\ud800"}', "surrogate"),
        ('["a", "b"]', "expected a JSON object"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, line, message):
    source = write(tmp_path, {"topic/train/sw": [PLAIN, "", line]})
    with pytest.raises(ValueError, match=message) as error:
        source.pairs(source.cells()[0], "train")
    assert f"{tmp_path}/topic/train/sw.jsonl:3: " in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_spans_name_file_and_line(tmp_path):
    source = write(tmp_path, {"ner/train/sw": [NER, {"text": "a"}, NER]})
    with pytest.raises(ValueError, match=r"sw.jsonl:2: field 'spans': expected a list"):
        source.pairs(SW, "train")


def test_invalid_utf8_names_file_and_line(tmp_path):
    source = write(tmp_path, {"topic/train/sw": [PLAIN]})
    path = tmp_path / "topic/train/sw.jsonl"
    path.write_bytes(path.read_bytes() + b'{"input": "\xff", "target": ""}\n')
    with pytest.raises(ValueError, match=r"sw.jsonl:2: not UTF-8: byte 0xff at column 12"):
        source.pairs(source.cells()[0], "train")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_files_without_records_are_refused(tmp_path, content):
    (tmp_path / "sw.jsonl").write_text(content)
    with pytest.raises(ValueError, match="sw.jsonl: the file holds no records"):
        list(read_records(tmp_path / "sw.jsonl"))


def test_lines_end_at_newlines_only(tmp_path):
    odd = "a\u2028b\u0085c\u000bd\u001ce\u00a0f\u1361\u0301"
    record = {"input": odd.replace("\u000b", "").replace("\u001c", ""), "target": odd}
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(record, ensure_ascii=False).encode() + b"\r\n")
    assert list(read_records(path)) == [(1, record)]


def test_text_does_not_confuse_missing_with_empty():
    assert text({"a": ""}, "a") == ""
    with pytest.raises(ValueError, match="the record has none"):
        text({}, "a")


# Folders


def test_cells_come_from_the_folder(tmp_path):
    source = write(
        tmp_path,
        {
            "ner/train/sw": [NER],
            "ner/test/sw": [NER],
            "translation/validation/en2sw": [PLAIN],
            "transliteration/train/Latn2Deva.hi": [PLAIN],
            "index/other/sw": [PLAIN],
        },
    )
    assert [cell.name for cell in source.cells()] == [
        "ner/sw",
        "translation/sw",
        "transliteration/hi",
    ]
    ner_sw, translation_sw, _ = source.cells()
    assert source.splits(ner_sw) == ("train", "test")
    assert source.splits(translation_sw) == ("validation",)
    assert translation_sw.file == "en2sw"
    with pytest.raises(ValueError, match="translation/sw has no split 'train'"):
        source.pairs(translation_sw, "train")


def test_files_of_one_language_become_cells_of_their_own(tmp_path):
    source = write(
        tmp_path,
        {f"translation/train/{name}": [PLAIN] for name in ("en2sw", "fr2sw", "en2zu")}
        | {"transliteration/train/Latn2Arab.sd": [PLAIN], "transliteration/test/Deva2Latn.sd": []},
    )
    names = [cell.name for cell in source.cells()]
    assert names == [
        "translation/sw:en2sw",
        "translation/sw:fr2sw",
        "translation/zu",
        "transliteration/sd:Deva2Latn.sd",
        "transliteration/sd:Latn2Arab.sd",
    ]
    assert {cell.language for cell in source.cells()} == {"sw", "zu", "sd"}
    registered = source.register(source.cells(), vocabulary=ByteVocabulary(), space=None)
    assert len(set(registered.values())) == 5


@pytest.mark.parametrize(("make", "message"), [(False, "not a folder"), (True, "holds no data")])
def test_a_folder_without_data_is_refused(tmp_path, make, message):
    root = tmp_path / "xtreme"
    if make:
        root.mkdir()
    with pytest.raises(ValueError, match=message):
        XtremeUp(str(root)).cells()
    with pytest.raises(ValueError, match="not a folder"):
        XtremeUp("").cells()


def test_a_file_name_that_tells_no_language_is_refused(tmp_path):
    source = write(tmp_path, {"translation/train/swahili": [PLAIN]})
    with pytest.raises(ValueError, match="translation: the file name swahili.jsonl"):
        source.cells()


def test_a_task_of_ones_own_has_its_own_format(tmp_path):
    def shout(record, cell):
        return record["q"], f"{record['a']} ({cell.language})"

    write(tmp_path, {"quiz/train/sw": [{"q": "x", "a": "Y"}]})
    source = XtremeUp(str(tmp_path), formats={"quiz": TaskFormat(shout, ("token_f1",))})
    (cell,) = source.cells()
    assert source.pairs(cell, "train") == (["x"], ["Y (sw)"])
    assert source.format("ner") is FORMATS["ner"]


# seqio


def metrics_of(name):
    (function,) = seqio.TaskRegistry.get(name).metric_fns
    return list(function(["x"], ["x"]))


def test_registered_tasks_carry_features_and_metrics(tmp_path):
    source = write(
        tmp_path,
        {
            "ner/train/sw": [NER, NER],
            "ner/validation/sw": [NER],
            "translation/train/en2sw": [PLAIN],
            "qa_in_lang/validation/te": [QA],
            "transliteration/train/Latn2Deva.hi": [PLAIN],
        },
    )
    split = Mixture().select(source.cells(), lambda cell: "train" in source.splits(cell))
    space = FeatureSpace((FeatureType("task"), FeatureType("language")))
    space = space.complete(columns(split.train))
    names = source.register(split.cells, vocabulary=ByteVocabulary(), space=space)
    assert names[SW] == "xtreme_up.ner.sw"
    by_name = {cell.name: metrics_of(name) for cell, name in names.items()}
    assert by_name == {
        "ner/sw": ["span_f1"],
        "translation/sw": ["chrf"],
        "qa_in_lang/te": ["token_f1", "exact_match"],
        "transliteration/hi": ["cer", "exact_match"],
    }
    data = load_cells({c: names[c] for c in split.train}, {"inputs": 64, "targets": 64})
    assert len(data[SW]) == 2
    for cell, examples in data.items():
        expected = space.encode(cell.annotations())
        assert (examples.feature_ids == expected).all() and (expected >= 0).all()
    # The held-out cell's task and language were never trained on: it has neither feature.
    (row,) = seqio.TaskRegistry.get(names[find("qa_in_lang/te", split.cells)]).get_dataset(
        split="validation", shuffle=False
    )
    assert row["feature_ids"].numpy().tolist() == [-1, -1]


def test_without_a_space_there_are_no_feature_ids(tmp_path):
    source = write(tmp_path, {"ner/train/sw": [NER]})
    names = source.register([SW], vocabulary=ByteVocabulary(), space=None)
    assert "feature_ids" not in seqio.TaskRegistry.get(names[SW]).output_features


# Real data


@pytest.fixture(scope="module")
def release():
    folder = os.environ.get("XTREME_UP_DIR")
    if not folder:
        pytest.skip("XTREME_UP_DIR is not set")
    return XtremeUp(folder)


def test_every_real_file_reads_and_ner_targets_are_those_of_the_release(release):
    examples, scripts, empty = 0, set(), 0
    for cell in release.cells():
        for split in release.splits(cell):
            inputs, targets = release.pairs(cell, split)
            path = f"{release.data_dir}/{cell.task}/{split}/{cell.file}.jsonl"
            with open(path, "rb") as file:
                assert len(inputs) == len(targets) == file.read().count(b"\n")
            examples += len(inputs)
            empty += targets.count("")
            letters = "".join(inputs[:5] + targets[:5])
            scripts |= {ord(letter) >> 7 for letter in letters}
            if cell.task == "ner":
                given_targets = [record["target"] for _, record in read_records(path)]
                assert targets == given_targets
    assert examples > 100_000 and empty > 5_000
    assert {0x1200 >> 7, 0x0600 >> 7, 0x0900 >> 7, 0} <= scripts


def test_real_training_data_loads(release):
    mixture = Mixture(include=("{ner,qa_cross_lang}/*",), held_out=("ner/{sn,yo}",))
    split = mixture.select(release.cells(), lambda cell: "train" in release.splits(cell))
    groups = {cell.name: split.group(cell) for cell in split.held_out}
    assert groups == {
        "ner/sn": "unseen_language",
        "ner/yo": "unseen",
        "qa_cross_lang/sw": "unseen",
    }
    some = split.train[:3]
    names = release.register(some, vocabulary=ByteVocabulary(), space=None)
    data = load_cells(names, {"inputs": 256, "targets": 128})
    for cell in some:
        inputs, targets = release.pairs(cell, "train")
        sizes = [len(i.encode()) + 1 for i in inputs]
        assert np.diff(data[cell].inputs.offsets).tolist() == [min(s, 256) for s in sizes]
        assert data[cell].cut_inputs == sum(s > 256 for s in sizes)


@pytest.mark.slow
def test_the_real_ner_data_loads_in_seconds(release):
    cells = [c for c in release.cells() if c.task == "ner"]
    names = release.register(cells, vocabulary=ByteVocabulary(), space=None)
    load_cells(dict(list(names.items())[:1]), {"inputs": 256, "targets": 128})
    started = time.process_time()
    data = load_cells(names, {"inputs": 256, "targets": 128})
    assert sum(map(len, data.values())) > 25_000
    assert time.process_time() - started < 15
