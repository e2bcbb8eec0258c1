"""Babel's translations: of the same meaning, as good as asked for, beside the same records."""

import json
import re

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from flix_jax.data.vocabularies import ByteVocabulary
from flix_jax.tasks import babel
from flix_jax.tasks.babel_languages import (
    ADJECTIVES,
    ADPOSITIONS,
    ALPHABET,
    CONCEPTS,
    CONSONANTS,
    LANGUAGES,
    PIVOT,
    QUESTIONS,
    SCRIPTS,
    THINGS,
    VERBS,
    VOWELS,
    make_languages,
)
from flix_jax.tasks.babel_tasks import TASKS
from flix_jax.tasks.babel_translations import FIELD, Translations
from flix_jax.tasks.source_text import SourceText

SIZES = babel.Sizes(train=40, validation=20, test=20, pivot=24, text=24)
KINDS = {
    concept: number
    for number, kind in enumerate((THINGS, ADJECTIVES, VERBS, ADPOSITIONS, QUESTIONS))
    for concept in kind
}
NAME = re.compile(rf"([{CONSONANTS}][{VOWELS}]){{2}}")


def write(folder, translations, seed=3):
    return babel.write(folder, seed, sizes=SIZES, translations=translations)


def read(folder, task, split, language):
    text = (folder / task / split / f"{language}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("plain") / "data", None)


@pytest.fixture(scope="module")
def faultless(tmp_path_factory):
    return write(tmp_path_factory.mktemp("faultless") / "data", Translations())


def meanings(text, language):
    """What each word of a text may mean, by undoing script, sound shift and affixes: no generator.

    A word is a set of concepts, or of names by their stems.
    """
    letters = dict(zip(SCRIPTS[language.typology.script], ALPHABET, strict=True))
    back = {new: old for old, new in language.shift.items()}
    concepts = {stem: concept for concept, stem in language.stems.items()}
    found = []
    for word in text.replace("?", "").split():
        plain = "".join(back.get(letters[x], letters[x]) for x in word)
        stems = {plain}
        for affix in (language.object_affix, language.verb_affix):
            if affix.suffix and plain.endswith(affix.text):
                stems.add(plain.removesuffix(affix.text))
            elif not affix.suffix and plain.startswith(affix.text):
                stems.add(plain.removeprefix(affix.text))
        known = {concepts[stem] for stem in stems if stem in concepts}
        found.append(known | {stem for stem in stems if NAME.fullmatch(stem)})
    return found


def without_tag(text):
    return text.split(": ", 1)[1]


def alike(ours, theirs):
    """Whether the words of two texts pair up so that each pair may mean the same."""
    common = np.array([[bool(one & other) for other in theirs] for one in ours])
    rows, columns = linear_sum_assignment(common, maximize=True)
    return bool(common[rows, columns].all())


@pytest.mark.parametrize("typology", LANGUAGES, ids=lambda t: t.code)
def test_a_translation_says_what_the_record_says(faultless, typology):
    languages = make_languages(3)
    language, pivot = languages[typology.code], languages[PIVOT.code]
    for task in TASKS:
        texts, sources = [], []
        for record in read(faultless, task, "train", typology.code):
            own, source = record.get("text", record.get("input")), record[FIELD]
            assert source.split(": ")[0] == own.split(": ")[0]  # the task's tag
            texts.append(meanings(without_tag(own), language))
            sources.append(meanings(without_tag(source), pivot))
            # What is transliterated is the first words of the clause alone.
            assert len(texts[-1]) == len(sources[-1]) or task == "transliteration"
        assert all(map(alike, texts, sources))
        others = map(alike, texts, sources[1:] + sources[:1])
        assert sum(others) < len(texts) / 4  # of any other record it is none


def test_of_translation_the_translation_is_the_target(faultless):
    """So that this task has no source by default: it would be the answer."""
    for record in read(faultless, "translation", "test", "qal"):
        assert without_tag(record[FIELD]) == record["target"]
    assert babel.FORMATS["translation"].source is babel.FORMATS["transliteration"].source is None


def test_records_are_those_of_data_without_translations(plain, faultless):
    paths = sorted(p.relative_to(plain) for p in plain.rglob("*.jsonl"))
    assert paths == sorted(p.relative_to(faultless) for p in faultless.rglob("*.jsonl"))
    for path in paths:
        ours = [json.loads(line) for line in (plain / path).read_text().splitlines()]
        theirs = [json.loads(line) for line in (faultless / path).read_text().splitlines()]
        translated = path.parts[0] in TASKS and path.stem != PIVOT.code
        assert all((FIELD in record) == translated for record in theirs)
        for record in theirs:
            record.pop(FIELD, None)
        assert ours == theirs


def test_translations_are_as_bad_as_asked_for_and_only_where(faultless, tmp_path):
    translations = Translations(mistaken=0.25, missing=0.1, splits=("validation", "test"))
    folder = write(tmp_path / "data", translations)
    assert write(tmp_path / "again", translations).name == "again"
    pivot = make_languages(3)[PIVOT.code]
    words = wrong = records = missing = 0
    for task in ("ner", "semantic_parsing", "qa"):
        for typology in LANGUAGES:
            good = read(faultless, task, "train", typology.code)
            assert read(folder, task, "train", typology.code) == good
            for split in translations.splits:
                for bad, good in zip(
                    read(folder, task, split, typology.code),
                    read(faultless, task, split, typology.code),
                    strict=True,
                ):
                    records += 1
                    missing += FIELD not in bad
                    if FIELD not in bad:
                        continue
                    pairs = [meanings(without_tag(x[FIELD]), pivot) for x in (bad, good)]
                    for one, other in zip(*pairs, strict=True):
                        words += 1
                        wrong += not one & other
                        kinds = [{KINDS.get(c, "name") for c in word} for word in (one, other)]
                        assert kinds[0] & kinds[1]  # a thing for a thing
                    assert {**bad, FIELD: ""} == {**good, FIELD: ""}  # the rest is as it was
    questions = records // 3 * (records - missing) / records  # words that are never mistaken
    assert abs(wrong / (words - questions) - 0.25) < 0.02
    assert abs(missing / records - 0.1) < 0.03
    for path in folder.rglob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes()


def test_the_source_of_cells_gives_them(tmp_path):
    with_them = babel.Babel(
        str(tmp_path), sizes=SIZES, translations=Translations(missing=0.5, splits=("test",))
    )
    without = babel.Babel(str(tmp_path), sizes=SIZES)
    assert with_them.data_dir != without.data_dir
    cells = {cell.name: cell for cell in with_them.cells()}
    ner, translation = cells["ner/qal"], cells["translation/qal"]
    assert with_them.pairs(ner, "test") == without.pairs(ner, "test")
    assert all(text.startswith("ner: ") for text in with_them.sources(ner, "train", SourceText()))
    empty = with_them.sources(ner, "test", SourceText()).count("")
    assert 2 <= empty <= 18
    assert set(with_them.sources(translation, "train", SourceText())) == {""}
    with_them.check_sources([ner, translation], SourceText())
    with pytest.raises(ValueError, match=r"no example has a source: translation has no template"):
        with_them.check_sources([translation], SourceText())
    with pytest.raises(ValueError, match=r"without Babel.translations = @Translations\(\)"):
        without.check_sources([ner], SourceText())
    names = with_them.register(
        [ner], vocabulary=ByteVocabulary(), space=None, source_text=SourceText()
    )
    from flix_jax.data.seqio_tasks import load_cell

    data = load_cell(names[ner], {"inputs": 64, "targets": 64, "sources": 64}, split="test")
    assert data.without_source == empty
    assert sum(not len(row) for row in (data.sources[i] for i in range(len(data)))) == empty


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mistaken": 1.5}, r"Translations.mistaken=1.5: expected a share"),
        ({"missing": -0.1}, r"Translations.missing=-0.1: expected a share"),
        ({"splits": "test"}, r"Translations.splits='test': expected some of"),
        ({"splits": ("dev",)}, r"Translations.splits=\('dev',\): expected some of"),
    ],
)
def test_shares_and_splits_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Translations(**settings)


def test_concepts_have_one_kind():
    assert set(KINDS) == set(CONCEPTS)
