import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flix_jax.data.cells import Cell, CellSplit
from flix_jax.data.overlap import (
    OverlapRow,
    compare,
    count_elsewhere,
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


def keys_of(tree, targets=False):
    """`keys` of every pair of lists in a tree of mappings."""
    if isinstance(tree, dict):
        return {name: keys_of(value, targets) for name, value in tree.items()}
    return keys(tree, targets)


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
    found = find_overlap(keys_of(train, targets), keys_of(held_out, targets))
    assert list(found.rows) == expected
    trained = [example for given_texts in train.values() for example in rows(given_texts)]
    assert found.shared == {
        cell: sum(
            any(equal(example, other, targets) for other in trained)
            for given_texts in parts.values()
            for example in rows(given_texts)
        )
        for cell, parts in held_out.items()
    }


@given(training, evaluation, st.booleans())
def test_nothing_is_left_to_report_of_what_was_dropped(train, held_out, targets):
    dropped = examples_to_drop(keys_of(train, targets), keys_of(held_out, targets))
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
    assert not find_overlap(keys_of(kept, targets), keys_of(held_out, targets))
    assert all(len(places) for places in dropped.values())


@given(st.dictionaries(st.sampled_from(["train", "validation", "test"]), examples), st.booleans())
def test_repeats_are_what_comparing_all_pairs_finds(parts, targets):
    (row,) = find_repeats({"t/a": keys_of(parts, targets)}).rows
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


@given(evaluation)
def test_what_stands_elsewhere_is_what_comparing_all_pairs_finds(cells):
    flat = {(cell, split): texts for cell, parts in cells.items() for split, texts in parts.items()}
    found = count_elsewhere(keys_of(flat))
    assert found.keys() == flat.keys()
    for (cell, split), texts in flat.items():
        others = [
            [e for (c, s), t in flat.items() if c == cell and s != split for e in rows(t)],
            [e for (c, _), t in flat.items() if c != cell for e in rows(t)],
        ]
        assert list(found[cell, split]) == [
            sum(any(equal(example, e, False) for e in there) for example in rows(texts))
            for there in others
        ]


class Memory:
    """A source that holds {cell: {split: texts}} and counts what is read."""

    def __init__(self, data):
        self.data, self.read = data, []

    def splits(self, cell):
        return tuple(self.data[cell])

    def pairs(self, cell, split):
        self.read.append((cell.name, split))
        return self.data[cell][split]


def test_a_mixture_is_compared_reading_each_split_once():
    sw, yo, other = Cell("ner", "sw"), Cell("ner", "yo"), Cell("qa", "sw")

    def texts(letters):
        return list(letters), list(letters)

    source = Memory(
        {
            sw: {"train": texts("abcd"), "validation": texts("dx")},
            yo: {"train": texts("y"), "validation": texts("bcz"), "test": texts("b")},
            other: {"train": texts("e")},
        }
    )
    split = CellSplit(train=(sw, other), held_out=(yo,))
    reported = compare(source, split)
    assert reported.dropped == {} and reported.examples == {"ner/sw": 4, "qa/sw": 1}
    assert reported.overlap.rows == (
        OverlapRow("ner/yo", "validation", "ner/sw", 2, 3),
        OverlapRow("ner/yo", "test", "ner/sw", 1, 1),
        OverlapRow("ner/sw", "validation", "ner/sw", 1, 2),
    )
    assert reported.overlap.summary(["ner/yo"]) == (
        "evaluation examples whose input stands in training data too: 4, of them in held-out cells "
        "3; most: 2 of 3 of ner/yo validation in ner/sw"
    )
    expected = [(c.name, s) for c in source.data for s in source.data[c] if (c, s) != (yo, "train")]
    assert sorted(source.read) == sorted(expected)
    # What a trained cell repeats of its own is told and stays.
    dropped = compare(source, split, drop=True)
    assert {name: places.tolist() for name, places in dropped.dropped.items()} == {"ner/sw": [1, 2]}
    assert dropped.overlap.rows == (OverlapRow("ner/sw", "validation", "ner/sw", 1, 2),)
    assert dropped.examples == reported.examples


def test_text_is_the_same_in_any_form_of_unicode_and_white_space():
    assert normalize(" cafe\u0301\u00a0 \tnoir\n") == "café noir"
    assert keys((["a b"], ["x"]), targets=True) != keys((["a"], ["b x"]), targets=True)
    assert keys((["A"], [""])) != keys((["a"], [""]))  # case counts
    with pytest.raises(ValueError, match="2 inputs but 1 targets"):
        keys((["a", "b"], ["x"]), targets=True)


def test_tables_show_pairs_of_cells():
    train = {"ner/sw": (["a", "b"], ["1", "2"]), "ner/zu": (["b"], ["9"])}
    held_out = {"ner/yo": {"test": (["b", "c", "b"], ["2", "3", "4"])}}
    found = find_overlap(keys_of(train), keys_of(held_out))
    assert found.table().split("\n") == [
        "evaluated  split  trained on  shared  of     %",
        "---------  -----  ----------  ------  --  ----",
        "ner/yo      test      ner/sw       2   3  66.7",
        "ner/yo      test      ner/zu       2   3  66.7",
    ]
    exact = find_overlap(keys_of(train, True), keys_of(held_out, True))
    assert [(row.trained, row.examples) for row in exact.rows] == [("ner/sw", 1)]
    shortened = found.table(at_most=1).split("\n")
    assert len(shortened) == 4 and shortened[-1] == "and 1 more pairs that share less"
    grouped = found.table(groups={"ner/yo": "unseen"}).split("\n")
    assert grouped[2].split()[:4] == ["ner/yo", "unseen", "test", "ner/sw"]
    nothing = find_overlap(keys_of(train), {})
    assert nothing.table() == nothing.summary() == ""
    repeats = find_repeats(
        {"a/b": keys_of({"train": train["ner/sw"], "test": held_out["ner/yo"]["test"]})}
    )
    assert repeats.table().split("\n")[-1].split() == ["a/b", "0", "1", "2"]


def test_fifty_thousand_texts_take_about_a_second():
    many = [f"sentence number {i} of a text as long as most of them are" for i in range(50_000)]
    train = {"t/a": (many[:30_000], many[:30_000])}
    held_out = {"t/b": {"test": (many[20_000:], many[20_000:])}}
    started = time.process_time()
    (row,) = find_overlap(keys_of(train), keys_of(held_out)).rows
    taken = time.process_time() - started
    assert row.examples == 10_000 and row.of == 30_000
    assert taken < 2
