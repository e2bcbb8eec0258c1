import json
import logging
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import seqio
from hypothesis import given
from hypothesis import strategies as st

from flix_jax import configuration
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
from flix_jax.tasks.xtreme_up_languages import FILES, languages, under_represented

DOCS = Path(__file__).parent.parent / "docs" / "data.md"
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
QUERY = {"id": "p1", "question": "NANI Ёж?", "title": "Mji", "context": "Ni Mimi."}


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
        ("asr", "af_za", {"input": "Hello, ", "target": "Habari."}, ("Hello, ", "Habari.")),
        ("retrieval_in_lang", "sw", QUERY, ("nani ёж?", "Mji Ni Mimi.")),
        ("retrieval_cross_lang", "as", QUERY | {"id": 7}, ("nani ёж?", "Mji Ni Mimi.")),
        ("autocomplete", "be", {"context": "Я ў", "target": "ўжо"}, ("be-Я ў$", "ўжо")),
        ("topic", "am", {"input": "ሰላም", "target": "travel"}, ("ሰላም", "travel")),
        ("sentiment", "jv", PLAIN, ("hello", "habari")),
        ("my_own_task", "sw", {"input": "", "target": ""}, ("", "")),
        ("my_own_task", "sw", {"input": "a", "target": 2.5}, ("a", "2.5")),
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
        (None, 2, "field 'start_byte': expected a whole number, got null"),
        ("0", 2, "field 'start_byte': expected a whole number"),
        (0, 7, "splits a UTF-8 character"),
        (7, 9, "splits a UTF-8 character"),
    ],
)
def test_bad_offsets_are_refused(start, limit, message):
    bad = {"start_byte": start, "limit_byte": limit, "label": "PER"}
    with pytest.raises(ValueError, match=message):
        ner({"text": SENTENCE, "spans": [bad]}, SW)
    with pytest.raises(ValueError, match="field 'limit_byte' is missing: there is start_byte"):
        ner({"text": SENTENCE, "spans": [{"start_byte": 0, "label": "PER"}]}, SW)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "a", "target"', "malformed JSON"),
        ('{"a\\n": 1}', r'field .input. is missing: the record has "a\\n"'),
        ('{"input": "a"}', "field 'target' is missing: the record has input"),
        ('{"input": "a", "target": null}', "field 'target': expected a string, got null"),
        ('{"input": "a", "target": ["b"]}', 'expected a string, got \\["b"\\]'),
        ('{"input": "a", "target": "\\ud800"}', "surrogate"),
        ('["a", "b"]', "expected a JSON object"),
        ("[" * 100_000, "nested too deeply"),
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


def test_locales_are_one_language_with_the_rest(tmp_path):
    files = ["asr/train/af_za", "asr/train/cmn_hans_cn", "asr/test/sd_arab_in"]
    files += ["semantic_parsing/train/pt_br", "semantic_parsing/train/de_localized"]
    source = write(tmp_path, {name: [PLAIN] for name in files})
    found = [(cell.name, cell.file) for cell in source.cells()]
    assert found == [
        ("asr/af", "af_za"),
        ("asr/cmn_hans", "cmn_hans_cn"),
        ("asr/sd", "sd_arab_in"),
        ("semantic_parsing/de_localized", "de_localized"),
        ("semantic_parsing/pt", "pt_br"),
    ]


def test_code_switched_files_come_on_request(tmp_path):
    write(tmp_path, {f"{task}/train/bn_cs": [PLAIN] for task in ("semantic_parsing", "topic")})
    write(tmp_path, {"semantic_parsing/train/bn": [PLAIN]})
    names = [cell.name for cell in XtremeUp(str(tmp_path)).cells()]
    assert names == ["semantic_parsing/bn", "topic/bn_cs"]
    source = XtremeUp(str(tmp_path), code_switched=True)
    assert find("semantic_parsing/bn_cs", source.cells()).language == "bn_cs"


def test_what_the_benchmark_has_and_the_folder_lacks_is_named(tmp_path):
    there = {f"ner/test/{name}": [NER] for name in languages("ner") if name not in ("bbj", "yo")}
    there |= {"transliteration/train/Latn2Deva.hi": [PLAIN], "topic/train/sw": [PLAIN]}
    there |= {f"qa_in_lang/train/{name}": [QA] for name in languages("qa_in_lang")}
    source = write(tmp_path, there)
    missing = source.missing()
    assert missing["ner"] == ("bbj", "yo")
    assert len(missing["transliteration"]) == 29
    assert {"Deva2Latn.hi", "Latn2Guru.pa"} <= set(missing["transliteration"])
    assert len(missing["translation"]) == 93 and "sw" in missing["translation"]
    assert "bn_cs" not in missing["semantic_parsing"]
    assert "qa_in_lang" not in missing and "topic" not in missing
    lines = source.missing_text().split("\n")
    assert "ner: 2 of 20 files not there: bbj, yo" in lines
    assert "asr: not there" in lines and len(lines) == len(missing) == 9


# The benchmark's languages


@pytest.mark.parametrize(
    ("task", "count", "counted", "others"),
    [
        ("ner", 20, 20, ""),
        ("semantic_parsing", 24, 9, "pt ru tr de_localized de en bn_cs hi_cs ta_cs"),
        ("qa_in_lang", 9, 4, "ar fi ko ru en"),
        ("qa_cross_lang", 26, 21, "ar fi ko ru hi"),
        ("retrieval_in_lang", 9, 4, "ar fi ko ru en"),
        ("retrieval_cross_lang", 26, 21, "ar fi ko ru hi"),
        ("translation", 93, 70, "ar zh fa vi"),
        ("transliteration", 13, 12, "hi"),
        ("autocomplete", 23, 22, "en"),
        ("asr", 102, 77, "ar cmn_hans cmn_hant en vi"),
    ],
)
def test_the_benchmark_counts_the_languages_that_the_paper_counts(task, count, counted, others):
    assert len(languages(task)) == count
    chosen = [name for name in languages(task) if under_represented(task, name)]
    assert len(chosen) == counted
    assert not {name for name in others.split() if under_represented(task, name) is not False}
    if len(others.split()) == count - counted:
        assert set(languages(task)) - set(chosen) == set(others.split())


def test_under_representation_is_known_of_the_benchmarks_own_only():
    assert under_represented("asr", "af_za") is under_represented("asr", "af") is True
    assert under_represented("translation", "en2sw") is True
    assert under_represented("translation", "en2de") is False
    assert under_represented("transliteration", "Latn2Deva.hi") is False
    assert under_represented("topic", "sw") is under_represented("ner", "de") is None


def test_every_published_file_is_of_the_language_that_its_name_tells():
    for task, files in FILES.items():
        for file, language in files.items():
            assert FORMATS[task].language(file) == language
            assert (
                language == language.lower()
                and file.endswith(language)
                or task
                in (
                    "asr",
                    "semantic_parsing",
                )
            )


# Retrieval


def passages(*names):
    return [{"id": name, "title": name.upper(), "context": "c"} for name in names]


def test_a_retrieval_task_has_an_index_that_its_languages_share(tmp_path):
    source = write(
        tmp_path,
        {
            "retrieval_in_lang/test/sw": [QUERY, QUERY | {"id": 2}],
            "retrieval_in_lang/test/te": [QUERY],
            "retrieval_in_lang/index": passages("p1", "p2"),
            "retrieval_in_lang/index/te": passages("p3"),
            "ner/test/sw": [NER],
        },
    )
    sw, te = (find(f"retrieval_in_lang/{name}", source.cells()) for name in ("sw", "te"))
    assert source.index(sw) == (["p1", "p2"], ["P1 c", "P2 c"])
    assert source.index(te) == (["p3"], ["P3 c"])
    assert source.passage_ids(sw, "test") == ["p1", "2"]
    with pytest.raises(ValueError, match="ner/sw: the task ner has no index"):
        source.index(SW)
    with pytest.raises(ValueError, match="ner/sw: the task ner has no index"):
        source.passage_ids(SW, "test")


def test_a_missing_or_broken_index_names_its_file(tmp_path):
    source = write(tmp_path, {"retrieval_in_lang/test/sw": [QUERY]})
    (cell,) = source.cells()
    with pytest.raises(ValueError, match=f"neither {tmp_path}/retrieval_in_lang/index.jsonl nor"):
        source.index(cell)
    write(tmp_path, {"retrieval_in_lang/index": [*passages("a"), {"id": "b", "title": ""}]})
    with pytest.raises(ValueError, match="index.jsonl:2: field 'context' is missing"):
        source.index(cell)


def test_formats_say_what_their_evaluation_asks_for():
    asked = {task: form.inference for task, form in FORMATS.items() if form.inference != "generate"}
    assert asked == {
        "autocomplete": "complete",
        "retrieval_in_lang": "retrieve",
        "retrieval_cross_lang": "retrieve",
    }


# Prompts


@pytest.mark.parametrize(
    ("task", "file", "record", "prompt", "expected"),
    [
        ("ner", "sw", NER, "{task} in {language}: {input}", f"ner in sw: {SENTENCE}"),
        ("transliteration", "Latn2Deva.hi", PLAIN, "{input}?", "hi-Latn-Deva hello?"),
        ("qa_in_lang", "sw", QA, "{context} {{{input}}} {other}", None),
        ("ner", "sw", NER | {"language": "swa"}, "{language} {input}", f"sw {SENTENCE}"),
    ],
)
def test_prompts_are_filled_around_the_input(tmp_path, task, file, record, prompt, expected):
    bare = write(tmp_path, {f"{task}/train/{file}": [record]})
    (cell,) = bare.cells()
    source = XtremeUp(str(tmp_path), prompts={task: prompt})
    (given,), targets = source.pairs(cell, "train")
    assert given == expected or expected is None
    assert targets == bare.pairs(cell, "train")[1]
    if expected is None:
        assert given == "Ni mimi. {question: Nani? title:  context: Ni mimi.} 1"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"ner": "Find {language}"}, r"prompts\['ner'\]='Find {language}': expected {input}"),
        ({"ner": "Find {inptu}"}, "'inptu': did you mean 'input'"),
        ({"ner": "Find {input"}, r"prompts\['ner'\]='Find {input': expected '}' before"),
        ({"ner": "Find {}{input}"}, "expected plain fields such as {input}"),
        ({"ner": "Find {input!r}"}, "expected plain fields such as {input}"),
        ({"ner": 3}, r"prompts\['ner'\]=3: expected a text"),
        ({"nre": "{input}"}, "no task 'nre' in .*; did you mean 'ner'"),
        ({"ner": "{langauge} {input}"}, r"\['ner'\]: no field 'langauge' .*mean 'language'"),
        ({"ner": "{txt} {input}"}, "no field 'txt' in the records of .*sw.jsonl.*mean 'text'"),
    ],
)
def test_wrong_prompts_are_refused_before_anything_is_read(tmp_path, prompts, message):
    write(tmp_path, {"ner/train/sw": [NER]})
    with pytest.raises(ValueError, match=message) as error:
        XtremeUp(str(tmp_path), prompts=prompts).cells()
    assert "XtremeUp.prompts" in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_prompt_in_a_gin_file_names_file_and_line(tmp_path):
    gin_file = tmp_path / "run.gin"
    gin_file.write_text("XtremeUp.data_dir = 'x'\nXtremeUp.prompts = {'ner': 'Find {inptu}'}\n")
    with pytest.raises(configuration.ConfigurationError, match=r"run.gin:2: .*'inptu': did you"):
        configuration.load([str(gin_file)]).build("XtremeUp")


# Records that cannot be read


def test_bad_records_are_skipped_on_request_counted_and_told(tmp_path, caplog):
    bad = ['{"input": "a"', '{"input": "a"}', '["a"]', '{"input": 1, "target": "b"}']
    write(tmp_path, {"topic/train/sw": [bad[0], PLAIN, *bad[1:], "", PLAIN, *bad[2:]]})
    source = XtremeUp(str(tmp_path), on_bad_record="skip")
    (cell,) = source.cells()
    assert not source.skipped and not source.skipped_text()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # told once, however often the file is read
            assert source.pairs(cell, "train") == (["hello"] * 2, ["habari"] * 2)
    ((path, entry),) = source.skipped.items()
    assert path == f"{tmp_path}/topic/train/sw.jsonl"
    assert (entry.records, entry.of, entry.lines) == (6, 8, (1, 3, 4, 5, 8))
    assert source.skipped_text() == (
        f"{path}: 6 of 8 records skipped (lines 1, 3, 4, 5, 8, ...): "
        "malformed JSON: Expecting ',' delimiter at column 14"
    )
    assert [record.message for record in caplog.records] == [source.skipped_text()]


def test_a_file_of_which_nothing_is_left_is_an_error_all_the_same(tmp_path):
    write(tmp_path, {"topic/train/sw": ["{", '{"input": "a"}']})
    source = XtremeUp(str(tmp_path), on_bad_record="skip")
    with pytest.raises(ValueError, match="sw.jsonl: none of the 2 records can be read: malformed"):
        source.pairs(source.cells()[0], "train")
    with pytest.raises(ValueError, match="on_bad_record='skp': .* did you mean 'skip'"):
        XtremeUp(str(tmp_path), on_bad_record="skp")


# Tasks of one's own


def test_a_task_of_ones_own_has_its_own_format(tmp_path):
    def shout(record, cell):
        return record["q"], f"{record['a']} ({cell.language})"

    write(tmp_path, {"quiz/train/sw": [{"q": "x", "a": "Y"}]})
    source = XtremeUp(str(tmp_path), formats={"quiz": TaskFormat(shout, ("token_f1",))})
    (cell,) = source.cells()
    assert source.pairs(cell, "train") == (["x"], ["Y (sw)"])
    assert source.format("ner") is FORMATS["ner"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"metrics": "cer"}, r"TaskFormat.metrics='cer': expected a list of names, \('cer',\)"),
        ({"metrics": ("span_f2",)}, "TaskFormat.metrics=.*unknown metric 'span_f2'; did you mean"),
        ({"metrics": ()}, r"TaskFormat.metrics=\(\): .*at least one name"),
        ({"metrics": ("mrr_at_10",)}, "'mrr_at_10' scores rankings, but .*'generate' gives one"),
        ({"inference": "complete"}, "'exact_match' scores one text, but .*'complete' gives rank"),
        ({"inference": "generat"}, "TaskFormat.inference='generat': .*did you mean 'generate'"),
        ({"file": "(?P<language"}, "TaskFormat.file=.*: not a regular expression"),
        ({"file": "x_(.*)"}, r"TaskFormat.file='x_\(.\*\)': expected a group"),
        ({"input": "{a", "target": "{b}"}, "TaskFormat.input='{a': "),
        ({"pair": ner, "input": "{a}"}, "TaskFormat.input='{a}' has no effect"),
    ],
)
def test_wrong_formats_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        TaskFormat(**parameters)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": {"quiz": {"input": "{q}"}}}, r"formats\['quiz'\]=.*expected a TaskFormat"),
        ({"formats": TaskFormat()}, "XtremeUp.formats=.*expected a mapping from task"),
        ({"prompts": "Say: {input}"}, "XtremeUp.prompts='Say: {input}': expected a mapping"),
    ],
)
def test_settings_of_another_type_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        XtremeUp("data", **settings)


def test_a_format_that_names_an_unknown_field_or_task_is_refused(tmp_path):
    write(tmp_path, {"quiz/train/sw": [{"question": "x", "answer": "y"}]})
    wrong = TaskFormat(input="{qestion}", target="{answer}")
    with pytest.raises(ValueError, match=r"TaskFormat.input of .*'qestion'.* mean 'question'"):
        XtremeUp(str(tmp_path), formats={"quiz": wrong}).cells()
    right = TaskFormat(input="{task} {question}", target="{answer}")
    with pytest.raises(ValueError, match=r"XtremeUp.formats: no task 'quizz' .*did you mean 'quiz"):
        XtremeUp(str(tmp_path), formats={"quizz": right}).cells()
    source = XtremeUp(str(tmp_path), formats={"quiz": right})
    assert source.pairs(source.cells()[0], "train") == (["quiz x"], ["y"])


def test_the_examples_of_the_documentation_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    by_kind = {kind: [b for k, b in blocks if k == kind] for kind, _ in blocks}
    file = tmp_path / "my_data/quiz/train/quiz_sw.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(by_kind["jsonl"]), encoding="utf-8")
    Path("quiz.gin").write_text("".join(by_kind["gin"]), encoding="utf-8")
    source = configuration.load(["quiz.gin"]).build("XtremeUp")
    (cell,) = source.cells()
    assert cell.name == "quiz/sw"
    expected = ["Mji mkuu wa Kenya ni upi? Si Mombasa."], ["Nairobi"]
    assert source.pairs(cell, "train") == expected
    assert source.format("quiz").metrics == ("token_f1", "exact_match")
    names = source.register([cell], vocabulary=ByteVocabulary(), space=None)
    assert names == {cell: "xtreme_up.quiz.sw"}
    scope = {}
    exec("\n".join(by_kind["python"]), scope)
    assert (scope["inputs"], scope["targets"]) == expected
    assert scope["source"].format("quiz") == source.format("quiz")


# Feature types from a table of languages


def test_columns_of_a_table_of_languages_are_feature_types(tmp_path):
    table = tmp_path / "languages.tsv"
    table.write_text("language\tfamily\nsw\tBantu\nzu\tBantu\nha\tChadic\nyo\tYoruboid\n")
    write(tmp_path / "data", {f"ner/train/{name}": [NER] for name in ("sw", "zu", "ha", "yo")})
    source = XtremeUp(
        str(tmp_path / "data"), languages=str(table), prompts={"ner": "{family}: {input}"}
    )
    split = Mixture(held_out=("ner/{zu,yo}",)).select(source.cells())
    space = FeatureSpace((FeatureType("language"), FeatureType("family")))
    space = space.complete(columns(split.train))
    ids = {cell.language: space.encode(cell.annotations()).tolist() for cell in split.cells}
    assert space.type("family").values == ("Bantu", "Chadic")
    assert ids == {"sw": [1, 0], "ha": [0, 1], "zu": [-1, 0], "yo": [-1, -1]}
    (zu,) = (cell for cell in split.held_out if cell.language == "zu")
    assert source.pairs(zu, "train")[0] == [f"Bantu: {SENTENCE}"]
    assert zu == Cell("ner", "zu", "zu") and source.splits(Cell("ner", "zu", "zu")) == ("train",)
    write(tmp_path / "data", {"ner/train/wo": [NER]})
    with pytest.raises(ValueError, match="languages.tsv has no row for the language 'wo' of ner"):
        XtremeUp(str(tmp_path / "data"), languages=str(table)).cells()


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
        "translation/sw": ["chrf", "bleu"],
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
    examples, scripts, empty, files = 0, set(), 0, 0
    started = time.process_time()
    for cell in release.cells():
        for split in release.splits(cell):
            files += 1
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
    assert files == len(list(Path(release.data_dir).glob("*/*/*.jsonl"))) >= 330
    assert examples > 100_000 and empty > 5_000 and not release.skipped
    assert time.process_time() - started < 20
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
