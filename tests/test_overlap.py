import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flix_jax.data.overlap import (
    OverlapRow,
    examples_to_drop,
    find_overlap,
    find_repeats,
    keys,
    normalize,
)

# Few letters, so that examples coincide; forms of one letter and of white space among them.
texts = st.text("ae\u00e9\u0301 \u00a0\n\u3000", max_size=3)
examples = st.lists(st.tuples(texts, texts), max_size=5).map(
    lambda rows: ([source for source, _ in rows], [target for _, target in rows])
)
training = st.dictionaries(st.sampled_from(["t/a", "t/b", "t/c"]), examples)
splits = st.dictionaries(st.sampled_from(["validation", "test"]), examples)
evaluation = st.dictionaries(st.sampled_from(["t/a", "t/d"]), splits)


def same(left, right):
    """Written out anew: split at white space first, then composed."""
    words = [[unicodedata.normalize("NFC", w) for w in text.split()] for text in (left, right)]
    return words[0] == words[1]


def equal(example, other, targets):
    return same(example[0], other[0]) and (not targets or same(example[1], other[1]))


def rows(texts):
    return list(zip(*texts, strict=True))


@given(training, evaluation, st.booleans())
def test_overlap_is_what_comparing_all_pairs_finds(train, held_out, targets):
    expected = []
    for cell, parts in held_out.items():
        for split, texts in parts.items():
            for trained, given_texts in train.items():
                count = sum(
                    any(equal(example, other, targets) for other in rows(given_texts))
                    for example in rows(texts)
                )
                if count:
                    expected.append(OverlapRow(cell, split, trained, count, len(texts[0])))
    assert list(find_overlap(train, held_out, targets=targets).rows) == expected


@given(training, evaluation, st.booleans())
def test_nothing_is_left_to_report_of_what_was_dropped(train, held_out, targets):
    dropped = examples_to_drop(train, held_out, targets=targets)
    held = [example for parts in held_out.values() for t in parts.values() for example in rows(t)]
    kept = {}
    for cell, texts in train.items():
        places = dropped[cell].tolist() if cell in dropped else []
        assert places == [
            i
            for i, example in enumerate(rows(texts))
            if any(equal(example, other, targets) for other in held)
        ]
        left = [example for i, example in enumerate(rows(texts)) if i not in places]
        kept[cell] = ([source for source, _ in left], [target for _, target in left])
    assert not find_overlap(kept, held_out, targets=targets)
    assert all(len(places) for places in dropped.values())


@given(st.dictionaries(st.sampled_from(["train", "validation", "test"]), examples), st.booleans())
def test_repeats_are_what_comparing_all_pairs_finds(parts, targets):
    (row,) = find_repeats({"t/a": parts}, targets=targets).rows
    names = list(parts)
    for i, split in enumerate(names):
        found = rows(parts[split])
        assert row.examples[split] == len(found)
        assert row.repeats[split] == sum(
            any(equal(example, other, targets) for other in found[:place])
            for place, example in enumerate(found)
        )
        for later in names[i + 1 :]:
            assert row.between[split, later] == sum(
                any(equal(example, other, targets) for other in found)
                for example in rows(parts[later])
            )
    assert len(row.between) == len(names) * (len(names) - 1) // 2


def test_text_is_the_same_in_any_form_of_unicode_and_white_space():
    assert normalize(" cafe\u0301\u00a0 \tnoir\n") == "café noir"
    assert keys((["a b"], ["x"]), targets=True) != keys((["a"], ["b x"]), targets=True)
    assert keys((["A"], [""])) != keys((["a"], [""]))  # case counts
    with pytest.raises(ValueError, match="2 inputs but 1 targets"):
        keys((["a", "b"], ["x"]), targets=True)


def test_tables_show_pairs_of_cells():
    train = {"ner/sw": (["a", "b"], ["1", "2"]), "ner/zu": (["b"], ["9"])}
    held_out = {"ner/yo": {"test": (["b", "c", "b"], ["2", "3", "4"])}}
    assert find_overlap(train, held_out).table().split("\n") == [
        "evaluated  split  trained on  shared  of     %",
        "---------  -----  ----------  ------  --  ----",
        "ner/yo      test      ner/sw       2   3  66.7",
        "ner/yo      test      ner/zu       2   3  66.7",
    ]
    exact = find_overlap(train, held_out, targets=True)
    assert [(row.trained, row.examples) for row in exact.rows] == [("ner/sw", 1)]
    shortened = find_overlap(train, held_out).table(at_most=1).split("\n")
    assert len(shortened) == 4 and shortened[-1] == "and 1 more pairs that share less"
    assert find_overlap(train, {}).table() == ""
    repeats = find_repeats({"a/b": {"train": train["ner/sw"], "test": held_out["ner/yo"]["test"]}})
    assert repeats.table().split("\n")[-1].split() == ["a/b", "0", "1", "2"]


def test_fifty_thousand_texts_take_about_a_second():
    many = [f"sentence number {i} of a text as long as most of them are" for i in range(50_000)]
    train = {"t/a": (many[:30_000], many[:30_000])}
    held_out = {"t/b": {"test": (many[20_000:], many[20_000:])}}
    started = time.process_time()
    (row,) = find_overlap(train, held_out).rows
    taken = time.process_time() - started
    assert row.examples == 10_000 and row.of == 30_000
    assert taken < 2
