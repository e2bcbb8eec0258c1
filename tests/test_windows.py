"""Windows of named-entity examples: whole words, whole entities, true targets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flix_jax.data.vocabularies import ByteVocabulary, SentencePieceVocabulary
from flix_jax.data.windows import EntityWindows, locate, swap, window

TEXT = "Ali Manzu wa Nairobi alikutana na Amina Yusuf huko Paris, na Ali akasafiri."
TARGET = "PER: Ali Manzu $$ LOC: Nairobi $$ PER: Amina Yusuf $$ LOC: Paris $$ PER: Ali"


def tokens(text):
    return np.array([*(b + 3 for b in text.encode()), 1], np.int32)


def text_of(ids):
    assert ids[-1] == 1
    return bytes(int(i) - 3 for i in ids[:-1] if i < 259).decode()


def example():
    return {"inputs": tokens(TEXT), "targets": tokens(TARGET), "feature_ids": np.array([1, 2])}


@pytest.mark.parametrize("length", [24, 40, 200])
def test_the_target_names_what_the_window_holds_and_nothing_else(length):
    seen = set()
    for seed in range(40):
        out = EntityWindows(length, 200)(example(), np.random.default_rng(seed))
        part, target = text_of(out["inputs"]), text_of(out["targets"])
        assert len(part.encode()) <= length and part in TEXT
        start = TEXT.index(part)
        inside, position = [], 0
        for entity in TARGET.split(" $$ "):
            name = entity.split(": ")[1]
            position = TEXT.index(name, position)
            if start <= position and position + len(name) <= start + len(part):
                inside.append(entity)
            position += len(name)
        assert target == " $$ ".join(inside)
        assert (out["feature_ids"] == [1, 2]).all()
        seen.add(part)
    assert len(seen) > (1 if length < len(TEXT) else 0)


@pytest.mark.parametrize("copying", [0.0, 0.999])
def test_a_target_is_never_too_long_and_still_true(copying):
    for seed in range(60):
        out = EntityWindows(200, 30, copying=copying)(example(), np.random.default_rng(seed))
        target, part = text_of(out["targets"]), text_of(out["inputs"])
        assert len(target) <= 30 and out["targets"][-1] == 1
        if not copying:
            names = [e.split(": ")[1] for e in TARGET.split(" $$ ")]
            inside = [e.split(": ")[1] for e in target.split(" $$ ")]
            assert inside == names[: len(inside)] and part == TEXT[: len(part)]


def test_copying_marks_spans_of_words_and_asks_for_them():
    vocabulary = ByteVocabulary()
    transform = EntityWindows(40, 200, copying=0.999)
    opening, closing = vocabulary.sentinel_id(0), vocabulary.sentinel_id(1)
    for seed in range(40):
        out = transform(example(), np.random.default_rng(seed))
        assert len(out["inputs"]) <= 40 + 5
        marked, spans = [], out["inputs"].tolist()
        while opening in spans:
            start, end = spans.index(opening), spans.index(closing)
            marked.append(bytes(i - 3 for i in spans[start + 1 : end]).decode())
            spans = spans[end + 1 :]
        assert marked and text_of(out["targets"]) == " $$ ".join(marked)
        assert text_of(out["inputs"]) in TEXT
        assert all(word in TEXT.split() for span in marked for word in span.split())


@given(
    words=st.lists(st.text("abé ", min_size=1, max_size=9), min_size=1, max_size=20),
    length=st.integers(8, 60),
    seed=st.integers(0, 99),
)
def test_a_window_lies_in_the_text_and_is_not_empty(words, length, seed):
    text = " ".join(words).encode()
    start, end = window(text, [], length, np.random.default_rng(seed))
    assert 0 <= start < end <= len(text) and end - start <= length
    if len(text) <= length:
        assert (start, end) == (0, len(text))


def test_entities_are_located_in_order_and_missing_ones_left_out():
    found = locate(TEXT.encode(), f"{TARGET} $$ LOC: Roma".encode())
    assert [TEXT.encode()[i:j].decode() for i, j, _ in found] == [
        "Ali Manzu",
        "Nairobi",
        "Amina Yusuf",
        "Paris",
        "Ali",
    ]
    assert found[-1][0] > found[-2][0]
    assert locate(b"none here", b"") == []


def test_entities_are_swapped_for_others_of_their_label_in_text_and_target():
    other = {"inputs": tokens("Juma wa Dodoma"), "targets": tokens("PER: Juma $$ LOC: Dodoma")}
    people = {"Ali Manzu", "Amina Yusuf", "Ali", "Juma"}
    places = {"Nairobi", "Paris", "Dodoma"}
    transform = EntityWindows(200, 200, swapping=0.5).prepared([example(), other])
    seen = set()
    for seed in range(60):
        out = transform(example(), np.random.default_rng(seed))
        names = []
        for entity in text_of(out["targets"]).split(" $$ "):
            label, name = entity.split(": ")
            assert name in {"PER": people, "LOC": places}[label]
            names.append(name)
        seen.update(names)
        a, b, c, d, e = names
        expected = f"{a} wa {b} alikutana na {c} huko {d}, na {e} akasafiri."
        assert text_of(out["inputs"]) == expected
    assert seen == people | places


@pytest.mark.parametrize("swapping", [0.0, 0.5])
def test_texts_of_a_cell_are_joined_until_the_window_is_full(swapping):
    texts = {TEXT: TARGET, "Juma wa Dodoma": "PER: Juma $$ LOC: Dodoma", "Hakuna mtu.": ""}
    examples = [{"inputs": tokens(t), "targets": tokens(e)} for t, e in texts.items()]
    transform = EntityWindows(160, 200, swapping=swapping, joining=0.999).prepared(examples)
    firsts = set()
    for seed in range(60):
        out = transform(examples[seed % 3], np.random.default_rng(seed))
        part, target = text_of(out["inputs"]), text_of(out["targets"])
        assert 110 < len(part) <= 160
        position = 0
        for entity in filter(None, target.split(" $$ ")):
            position = part.index(entity.split(": ")[1], position)
        if not swapping:
            expected, rest = [], part
            while rest:
                text = next((t for t in texts if rest.startswith(t)), None)
                if text is None:  # the last one is cut
                    (text,) = [t for t in texts if t.startswith(rest)] or [rest]
                    names = [e for e in texts[text].split(" $$ ") if e]
                    expected += names[: target.count(": ") - len(expected)]
                    break
                expected += filter(None, texts[text].split(" $$ "))
                rest = rest[len(text) + 1 :]
                firsts.add(text)
            assert target == " $$ ".join(expected)
    assert swapping or firsts == set(texts)


def test_a_text_that_fills_the_window_is_joined_to_nothing():
    transform = EntityWindows(40, 200, joining=0.999).prepared([example()])
    parts = [text_of(transform(example(), np.random.default_rng(i))["inputs"]) for i in range(20)]
    assert all(part in TEXT for part in parts) and len(set(parts)) > 3


def test_without_swapping_and_joining_nothing_is_prepared():
    windows = EntityWindows(200, 200)
    assert windows.prepared([example()]) is windows


def test_of_two_entities_that_overlap_the_first_is_swapped():
    text, entities = swap(
        b"New York City",
        [(0, 8, b"LOC: New York"), (4, 13, b"LOC: York City")],
        {b"LOC": [b"Bo"]},
        1.0,
        np.random.default_rng(0),
    )
    assert (text, entities) == (b"Bo City", [(0, 2, b"LOC: Bo")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 4}, "length=4"),
        ({"target_length": 4}, "target_length=4"),
        ({"copying": 1.0}, "copying=1.0"),
        ({"swapping": -0.1}, "swapping=-0.1"),
        ({"joining": 1.5}, "joining=1.5"),
        ({"vocabulary": ByteVocabulary(extra_ids=1)}, "at least 2 extra_ids"),
        ({"vocabulary": SentencePieceVocabulary("m.model")}, "expected a ByteVocabulary"),
    ],
)
def test_what_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EntityWindows(**{"length": 40, "target_length": 40, **change})
