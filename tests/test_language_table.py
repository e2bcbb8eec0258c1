import os
import re

import pytest

from flix_jax import configuration
from flix_jax.data.cells import Cell
from flix_jax.data.language_table import LanguageTable, read_language_table
from flix_jax.tasks.xtreme_up import XtremeUp
from flix_jax.tasks.xtreme_up_languages import FILES

PACKAGED = "configs/features/languages.tsv"


@pytest.fixture(scope="module")
def packaged():
    return read_language_table(PACKAGED)


def table(tmp_path, content):
    path = tmp_path / "languages.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_language_table(str(path))


def test_columns_become_annotations_beside_those_of_the_cell(tmp_path):
    read = table(tmp_path, "# who\n\nlanguage\tfamily\ttone\nsw\tBantu\tno\nyo\tYoruboid\tyes\r\n")
    assert read.annotations(Cell("ner", "yo")) == {"family": "Yoruboid", "tone": "yes"}
    cell = read.annotate(Cell("ner", "sw", "sw"))
    assert cell.annotations() == {
        **Cell("ner", "sw", "sw").annotations(),
        "family": "Bantu",
        "tone": "no",
    }


def test_an_annotated_cell_is_the_cell(tmp_path):
    cell, other = Cell("ner", "sw", "sw"), Cell("ner", "yo", "yo")
    annotated = Cell("ner", "sw", "sw", extra=(("family", "Bantu"),))
    assert annotated == cell and cell == annotated and annotated != other and other != annotated
    assert {cell: 1}[annotated] == 1 and hash(annotated) == hash(cell)
    assert annotated.name == "ner/sw" and annotated != "ner/sw"


def test_a_code_with_a_suffix_falls_back_on_the_language():
    read = LanguageTable("x.tsv", {"de": {"family": "a"}, "cmn_hans": {"family": "b"}})
    assert read.annotations(Cell("semantic_parsing", "de_localized")) == {"family": "a"}
    assert read.annotations(Cell("asr", "cmn_hans")) == {"family": "b"}
    with pytest.raises(ValueError, match="x.tsv has no row for the language 'cmn_hant' of asr/cmn"):
        read.annotations(Cell("asr", "cmn_hant"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("language\tfamily\nsw\tBantu\nsw\tBantu\n", ":3: the language 'sw' has a row already, in"),
        ("# one\nlanguage\tfamily\nsw\n", ":3: 1 fields, expected 2 .*: language, family"),
        ("language\tfamily\nsw\t \n", ":2: the field 'family' is empty"),
        ("language\tfamily\n\tBantu\n", ":2: the field 'language' is empty"),
        ("langauge\tfamily\nsw\tBantu\n", ":1: no column 'language'; did you mean 'langauge'"),
        ("language\tfamily\tfamily\nsw\ta\tb\n", ":1: column 'family' is named more than once"),
        ("language\ttask\nsw\ta\n", ":1: column 'task': cells have an annotation of that name"),
        ("language\tthe family\nsw\ta\n", ":1: column 'the family': expected letters"),
        ("language\nsw\n", ":1: no column beside 'language'"),
        ("language\tfamily\n", "holds no languages"),
        ("", "holds no languages"),
        (b"language\tfamily\nsw\t\xff\n", ":2: not UTF-8"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, content, message):
    with pytest.raises(ValueError, match="languages.tsv.*" + message) as error:
        table(tmp_path, content)
    assert "\n" not in str(error.value)


def test_a_missing_table_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="'configs/features/language.tsv'.*mean 'configs/features"):
        read_language_table("configs/features/language.tsv")


def test_the_packaged_table_is_found_from_anywhere(tmp_path, monkeypatch, packaged):
    monkeypatch.chdir(tmp_path)
    assert read_language_table(PACKAGED).rows == packaged.rows


def test_the_packaged_table_knows_every_language_of_the_benchmark(packaged):
    for task, files in FILES.items():
        for language in files.values():
            row = packaged.annotations(Cell(task, language))
            assert list(row) == ["name", "family", "genus", "script"]
            assert re.fullmatch("[A-Z][a-z]{3}", row["script"])


def test_the_packaged_table_is_consistent_and_agrees_with_the_names_of_files(packaged):
    family_of = {}
    for code, row in packaged.rows.items():
        assert family_of.setdefault(row["genus"], row["family"]) == row["family"], code
    assert list(packaged.rows) == sorted(packaged.rows)
    assert len({row["name"] for row in packaged.rows.values()}) == len(packaged.rows)
    # Transliteration is from Latin to the script that the language is written in.
    scripts = {lang: set() for lang in FILES["transliteration"].values()}
    for file, language in FILES["transliteration"].items():
        scripts[language].add(file.partition(".")[0].partition("2")[2])
    assert all(packaged.rows[language]["script"] in found for language, found in scripts.items())


def test_the_real_data_have_languages_of_the_table(packaged):
    folder = os.environ.get("XTREME_UP_DIR")
    if not folder:
        pytest.skip("XTREME_UP_DIR is not set")
    cells = XtremeUp(folder, languages=PACKAGED).cells()
    assert all({"family", "script"} <= set(cell.annotations()) for cell in cells)


def test_the_family_is_a_gin_file_away():
    read = configuration.load(
        ["configs/adapters/flix.gin", "configs/features/family.gin"], ["XtremeUp.data_dir='x'"]
    )
    assert read.build("FeatureSpace").names == ("task", "language", "family")
    assert read.build("XtremeUp").languages == PACKAGED
