"""The embedded benchmark: reproducible, well formed, held out as promised, readable as a source."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from flix_jax.data.cells import Mixture
from flix_jax.data.vocabularies import SentencePieceVocabulary
from flix_jax.tasks import babel
from flix_jax.tasks.babel_languages import (
    ALPHABET,
    CONCEPTS,
    LANGUAGES,
    PIVOT,
    SCRIPTS,
    Clause,
    Draw,
    Name,
    Typology,
    make_languages,
)
from flix_jax.tasks.babel_tasks import TASKS

SMALL = babel.Sizes(train=20, validation=8, test=8, pivot=24, text=24)
CLAUSE = Clause("get", Name("bota"), "thing1", Name("pelu"), "to", "adjective1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return babel.write(tmp_path_factory.mktemp("babel") / "data", 0, sizes=SMALL)


def read(folder: Path, task: str, split: str, language: str) -> list[dict]:
    path = folder / task / split / f"{language}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digest(folder: Path) -> str:
    hasher = hashlib.sha256()
    for path in sorted(folder.rglob("*.jsonl")):
        hasher.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return hasher.hexdigest()


def test_data_of_a_seed_are_the_same_everywhere(folder, tmp_path):
    random.seed(1)
    again = babel.write(tmp_path / "again", 0, sizes=SMALL)
    other = babel.write(tmp_path / "other", 1, sizes=SMALL)
    assert digest(again) == digest(folder) != digest(other)
    # Changes whenever the generator does: raise babel.VERSION with it.
    assert digest(folder)[:16] == "a3e7c6edc8d9cecd"


@pytest.mark.parametrize("seed", range(20))
def test_held_out_cells_leave_every_language_and_task_seen(folder, seed):
    cells = babel.XtremeUp(str(folder), formats=babel.FORMATS).cells()
    split = Mixture(include=babel.ADAPTATION, held_out=babel.held_out(seed)).select(cells)
    assert len(split.train) == 25 and len(split.held_out) == 20
    unseen_language = babel.held_out_language(seed)
    groups: dict[str, list] = {"seen": [], "unseen": [], "unseen_language": []}
    for cell in split.cells:
        groups[split.group(cell)].append(cell)
    assert {cell.language for cell in groups["unseen_language"]} == {unseen_language}
    for task in TASKS:
        assert sum(cell.task == task for cell in groups["unseen"]) == 3
        assert sum(cell.task == task for cell in groups["seen"]) == 5
    for typology in LANGUAGES:
        if typology.code != unseen_language:
            assert 3 <= sum(cell.language == typology.code for cell in groups["seen"]) <= 4


def test_held_out_cells_rotate_with_the_seed():
    assert len({babel.held_out(seed) for seed in range(10)}) > 5
    assert len({babel.held_out_language(seed) for seed in range(30)}) > 5


def test_pretraining_has_text_of_every_language_and_tasks_of_the_pivot_alone(folder):
    cells = (
        Mixture(include=babel.PRETRAINING)
        .select(babel.XtremeUp(str(folder), formats=babel.FORMATS).cells())
        .train
    )
    others = {typology.code for typology in LANGUAGES}
    for task in TASKS:
        assert {cell.language for cell in cells if cell.task == task} == {PIVOT.code}
    texts = {cell.language for cell in cells if cell.task == "denoising"}
    assert texts == others | {PIVOT.code}
    assert {cell.language for cell in cells if cell.task == "glossary"} == others


def test_every_target_follows_from_its_input(folder):
    """Answers, slots and entities are words of the input; spans are where they say."""
    for typology in (PIVOT, *LANGUAGES):
        for record in read(folder, "ner", "train", typology.code):
            text = record["text"].encode()
            assert record["spans"]
            for span in record["spans"]:
                word = text[span["start_byte"] : span["limit_byte"]].decode()
                assert f" {word} " in f"{record['text']} "
        for record in read(folder, "qa", "train", typology.code):
            context = record["input"].split("? ")[1].split()
            assert context.count(record["target"]) == 1
        for record in read(folder, "semantic_parsing", "train", typology.code):
            value = record["target"].split(" ", 2)[2].removesuffix(" ] ]")
            assert f" {value} " in f"{record['input']} "
        for record in read(folder, "transliteration", "train", typology.code):
            source = record["input"].split(": ")[1]
            assert len(source) == len(record["target"])
            assert set(record["target"]) <= set(SCRIPTS["latin"] + " ")


def test_records_of_a_cell_are_distinct_over_its_splits(folder):
    for task in TASKS:
        for typology in (PIVOT, *LANGUAGES):
            splits = [
                read(folder, task, split, typology.code)
                for split in ("train", "validation", "test")
            ]
            inputs = [r.get("input", r.get("text")) for split in splits for r in split]
            assert len(inputs) == len(set(inputs))


@pytest.mark.parametrize("tags,length", [("none", 0), ("task", 1), ("task_language", 2)])
def test_tags_are_the_only_difference_between_data_with_and_without(folder, tmp_path, tags, length):
    other = babel.write(tmp_path / "other", 0, sizes=SMALL, tags=tags)
    for task in (*TASKS, "denoising", "glossary"):
        ours, theirs = (read(root, task, "train", "qur") for root in (folder, other))
        for one, two in zip(ours, theirs, strict=True):
            tagged, text = (r.get("input", r.get("text")) for r in (one, two))
            if task != "glossary":  # names its language always
                words = text.split(": ")[0].split() if length else []
                assert len(words) == length and words[1:] == ["qur"][: length - 1]
            assert tagged.split(": ")[-1] == text.split(": ")[-1]
            assert one.get("target") == two.get("target")
        assert task != "glossary" or all(r["input"].startswith("dic qur: ") for r in theirs)


def test_languages_differ_in_script_order_words_and_sounds():
    for seed in range(10):
        languages = make_languages(seed)
        pivot = languages[PIVOT.code]
        assert len({language.say(CLAUSE) for language in languages.values()}) == 10
        for code, language in languages.items():
            lemmas = [language.lemma(concept) for concept in CONCEPTS]
            assert len(set(lemmas)) == len(lemmas)
            same = sum(language.stems[c] == pivot.stems[c] for c in CONCEPTS)
            assert code == PIVOT.code or 0.55 < same / len(CONCEPTS) < 1
    assert len({typology.script for typology in LANGUAGES}) == 3
    assert len({typology.order for typology in LANGUAGES}) == 3


def test_clauses_follow_the_typology():
    languages = make_languages(0)
    roles = {code: [word.role for word in x.words(CLAUSE)] for code, x in languages.items()}
    assert roles["qpi"] == ["subject", "verb", "adjective", "object", "adposition", "place"]
    assert roles["qal"] == ["subject", "place", "adposition", "adjective", "object", "verb"]
    assert roles["qeb"] == ["verb", "subject", "object", "adjective", "adposition", "place"]


def test_borrowed_words_keep_the_order_and_affixes_of_the_borrower():
    languages = make_languages(0)
    pivot, lender = languages["qpi"], languages["qur"]
    mixed = pivot.borrowing(lender, Draw("test")).words(CLAUSE)
    own = pivot.words(CLAUSE)
    assert [word.role for word in mixed] == [word.role for word in own]
    for word, other in zip(mixed, own, strict=True):
        source = lender if word.surface != other.surface else pivot
        plain = source.stem(word.concept)
        if word.role in ("object", "verb"):
            plain = getattr(pivot, f"{word.role}_affix").on(plain)
        assert word.surface == source.write(plain)
    assert 0 < sum(a.surface != b.surface for a, b in zip(mixed, own, strict=True)) < len(own)


def test_scripts_have_one_letter_for_each_of_the_alphabet():
    for letters in SCRIPTS.values():
        assert len(letters) == len(set(letters)) == len(ALPHABET)


def test_write_takes_an_empty_folder_only_and_leaves_nothing_half_done(
    folder, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="not an empty folder"):
        babel.write(folder, 0, sizes=SMALL)
    monkeypatch.setattr(babel, "_character_model", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        babel.write(tmp_path / "data", 0, sizes=SMALL)
    assert not list(tmp_path.iterdir())


def test_misuse_is_told():
    with pytest.raises(ValueError, match="Sizes.test=0"):
        babel.Sizes(test=0)
    with pytest.raises(ValueError, match="Babel.tags='tasks'.*did you mean 'task'"):
        babel.Babel("unused", tags="tasks")
    with pytest.raises(ValueError, match="script 'runes' of qzz"):
        Typology("qzz", "runes", "SVO", True, True)


def test_source_generates_once_and_keeps_settings_apart(tmp_path, monkeypatch):
    source = babel.Babel(str(tmp_path), seed=3, sizes=SMALL)
    assert len(source.cells()) == 5 * 10 + 10 + 9
    monkeypatch.setattr(babel, "write", lambda *a, **k: pytest.fail("generated a second time"))
    again = babel.Babel(str(tmp_path), seed=3, sizes=SMALL)
    assert again.cells() == source.cells()
    cell = next(cell for cell in again.cells() if cell.name == "qa/qal")
    assert again.splits(cell) == ("train", "validation", "test")
    assert babel.Babel(str(tmp_path), seed=3).data_dir != source.data_dir
    assert babel.Babel(str(tmp_path), seed=4, sizes=SMALL).data_dir != source.data_dir


def test_the_texts_of_a_split_are_told(tmp_path):
    source = babel.Babel(str(tmp_path), seed=0, sizes=SMALL)
    cell = next(cell for cell in source.cells() if cell.name == "qa/qal")
    records = read(source.data_dir, "qa", "validation", "qal")
    inputs, targets = source.pairs(cell, "validation")
    assert inputs == [r["input"] for r in records] and targets == [r["target"] for r in records]


def test_seqio_reads_every_task_over_the_character_vocabulary(tmp_path):
    seqio = pytest.importorskip("seqio")
    source = babel.Babel(str(tmp_path), seed=0, sizes=SMALL)
    vocabulary = SentencePieceVocabulary(source.vocabulary_path)
    assert vocabulary.vocab_size <= 128
    wanted = {f"{task}/qur" for task in (*TASKS, "denoising", "glossary")}
    cells = [cell for cell in source.cells() if cell.name in wanted]
    names = source.register(cells, vocabulary=vocabulary, space=None)
    assert {cell.name for cell in names} == wanted
    built = vocabulary.build()
    for cell, name in names.items():
        task = seqio.get_mixture_or_task(name)
        dataset = task.get_dataset(None, "train", shuffle=False)
        first = next(dataset.as_numpy_iterator())
        record = read(source.data_dir, cell.task, "train", "qur")[0]
        assert built.decode(first["inputs"].tolist()) == record.get("input", record.get("text"))
        assert 2 not in first["inputs"] and 2 not in first["targets"]
