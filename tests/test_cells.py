import fnmatch
import math
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flix_jax.data.cells import Cell, CellSplit, Mixture, columns, expand, find, match

NAMES = ["ner/sw", "ner/yo", "ner/zu", "qa/sw", "qa/yo", "topic/ha", "topic/zu"]
CELLS = tuple(Cell(*name.split("/")) for name in NAMES)


def names(cells):
    return [cell.name for cell in cells]


def test_a_cell_names_its_annotations():
    cell = Cell("ner", "sw", "sw")
    assert cell.annotations() == {
        "task": "ner",
        "language": "sw",
        "cell": "ner/sw",
        "shared": "shared",
    }


def test_cells_of_one_task_and_language_stay_apart_by_their_variant():
    two = [Cell("translation", "sw", f, f) for f in ("en2sw", "fr2sw")]
    assert names(two) == ["translation/sw:en2sw", "translation/sw:fr2sw"]
    assert match(["translation/sw"], two) == tuple(two)
    assert match(["*/sw:fr2sw"], two) == (two[1],)


@pytest.mark.parametrize("bad", ["a/b", "a b", "a*", "", "a:b"])
def test_names_that_patterns_could_not_tell_apart_are_refused(bad):
    with pytest.raises(ValueError, match="Cell"):
        Cell(bad, "sw")


def test_braces_expand():
    assert expand("{a,b}/{c,d}") == ("a/c", "a/d", "b/c", "b/d")
    assert expand("semantic_parsing/{yo,ha}") == ("semantic_parsing/yo", "semantic_parsing/ha")


@pytest.mark.parametrize("bad", ["ner/{sw", "ner/sw}", "{a,{b}}", "", None])
def test_broken_patterns_are_refused(bad):
    with pytest.raises(ValueError, match="cell pattern"):
        expand(bad)


@given(st.lists(st.sampled_from(["ner/*", "*/sw", "qa/yo", "t*/z?", "[nq]*/yo"]), min_size=1))
def test_patterns_select_as_fnmatch_does(patterns):
    expected = [n for n in NAMES if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    assert names(match(patterns, CELLS)) == expected


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("ner/swa", "ner/sw"), ("topics/ha", "topic/ha"), ("nre/*", "ner/"), ("qa/yo2", "qa/yo")],
)
def test_a_pattern_that_matches_nothing_names_the_nearest_cell_in_one_line(pattern, near):
    with pytest.raises(ValueError, match=near) as error:
        Mixture(include=(pattern,)).select(CELLS)
    assert "\n" not in str(error.value) and "Mixture.include" in str(error.value)


def test_find_names_the_nearest_cell():
    assert find("ner/sw", CELLS).name == "ner/sw"
    with pytest.raises(ValueError, match="did you mean 'ner/sw'"):
        find("ner/sww", CELLS)


def test_a_mixture_splits_the_cells():
    split = Mixture(include=("ner/*", "qa/*"), exclude=("*/zu",), held_out=("ner/yo",)).select(
        reversed(CELLS)
    )
    assert names(split.train) == ["ner/sw", "qa/sw", "qa/yo"]
    assert names(split.held_out) == ["ner/yo"]
    assert names(split.cells) == ["ner/sw", "ner/yo", "qa/sw", "qa/yo"]


def test_groups_tell_unseen_cells_from_unseen_languages():
    split = Mixture(held_out=("ner/yo", "*/zu")).select(CELLS)
    groups = {cell.name: split.group(cell) for cell in split.cells}
    assert groups["ner/sw"] == "seen"
    assert groups["ner/yo"] == "unseen"  # Yoruba is trained on in qa
    assert groups["ner/zu"] == groups["topic/zu"] == "unseen_language"


def test_a_cell_without_training_data_is_held_out_by_nature():
    split = Mixture(include=("qa/*",)).select(CELLS, has_train=lambda cell: cell.language != "sw")
    assert (names(split.train), names(split.held_out)) == (["qa/yo"], ["qa/sw"])


def test_a_held_out_pattern_must_match_an_included_cell():
    with pytest.raises(ValueError, match="Mixture.held_out: the pattern 'qa/yo' matches none"):
        Mixture(include=("ner/*",), held_out=("qa/yo",)).select(CELLS)


@pytest.mark.parametrize("mixture", [Mixture(held_out=("*/*",)), Mixture(exclude=("*/*",))])
def test_a_mixture_that_comes_out_empty_is_refused(mixture):
    with pytest.raises(ValueError, match="Mixture.held_out: no cell to train on is left"):
        mixture.select(CELLS)


def test_a_source_without_cells_is_refused():
    with pytest.raises(ValueError, match="mixture is empty"):
        Mixture().select(())


def test_a_cell_cannot_be_trained_on_and_held_out():
    with pytest.raises(ValueError, match="both trained on and held out: ner/sw"):
        CellSplit(train=CELLS[:2], held_out=CELLS[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rates": "proportonal"}, "did you mean 'proportional'"),
        ({"rates": {"ner/*": 0.0}}, "above zero"),
        ({"rates": {"ner/*": math.nan}}, "above zero"),
        ({"rates": "equal", "cap": 5}, "no effect"),
        ({"cap": 0}, "at least 1"),
        ({"temperature": 2.0}, "no effect"),
        ({"rates": "temperature", "temperature": 0.0}, "above zero"),
        ({"overlap": "dorp"}, "Mixture.overlap='dorp'.*did you mean 'drop'"),
        ({"include": "ner/*"}, "list of patterns"),
        ({"include": ()}, "empty"),
    ],
)
def test_settings_of_a_mixture_are_checked_when_it_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**settings)


def test_a_mixture_asks_for_cells_that_need_not_be_there():
    mixture = Mixture(include=("ner/*", "qa/sw"), exclude=("ner/zu",), held_out=("ner/yo",))
    asked = [cell.name for cell in CELLS if mixture.asks_for(cell)]
    assert asked == names(mixture.select(CELLS).cells) == ["ner/sw", "ner/yo", "qa/sw"]
    assert mixture.asks_for(Cell("ner", "am", "am", "am_et"))


SIZES = dict(zip(CELLS[:3], (100, 300, 1600), strict=True))


def rates(**settings):
    found = Mixture(**settings).rates_for(SIZES)
    assert list(found) == list(SIZES)
    return list(found.values())


def test_rates():
    assert rates() == pytest.approx([0.05, 0.15, 0.8], rel=1e-12)
    assert rates(cap=400) == pytest.approx([0.125, 0.375, 0.5], rel=1e-12)
    assert rates(rates="equal") == pytest.approx([1 / 3] * 3, rel=1e-12)
    # Square roots: 10, 17.32, 40.
    root = [10, math.sqrt(300), 40]
    expected = [r / sum(root) for r in root]
    assert rates(rates="temperature", temperature=2.0) == pytest.approx(expected, rel=1e-12)
    assert rates(rates="temperature", temperature=math.inf) == pytest.approx([1 / 3] * 3, rel=1e-12)
    given_rates = {"ner/yo": 2, "ner/*": 1}
    assert rates(rates=given_rates) == pytest.approx([0.25, 0.5, 0.25], rel=1e-12)


def test_rates_of_cells_that_no_pattern_names_are_refused():
    with pytest.raises(ValueError, match="no pattern gives a weight to the cell ner/zu"):
        rates(rates={"ner/{sw,yo}": 1})
    with pytest.raises(ValueError, match="'qa/\\*' matches none"):
        rates(rates={"ner/*": 1, "qa/*": 1})


def test_empty_cells_have_no_rate():
    with pytest.raises(ValueError, match="ner/sw has no training examples"):
        Mixture().rates_for({CELLS[0]: 0})
    with pytest.raises(ValueError, match="no cell"):
        Mixture().rates_for({})


def test_columns_are_annotations_by_name():
    found = columns(CELLS[:2])
    assert found["task"] == ("ner", "ner") and found["language"] == ("sw", "yo")
    assert found["cell"] == ("ner/sw", "ner/yo") and set(found["shared"]) == {"shared"}


def test_the_table_shows_sizes_held_out_and_absent():
    split = Mixture(include=("ner/*", "qa/*"), held_out=("ner/yo",)).select(
        random.Random(0).sample(CELLS, len(CELLS))
    )
    table = split.table({cell: 1234 for cell in split.train}).splitlines()
    assert [line.split() for line in table] == [
        ["language", "ner", "qa"],
        ["--------", "--------", "-----"],
        ["sw", "1,234", "1,234"],
        ["yo", "held", "out", "1,234"],
        ["zu", "1,234", "-"],
    ]


def test_cells_and_the_pipeline_import_without_tensorflow():
    code = (
        "import sys, flix_jax.data.cells, flix_jax.data.pipeline, flix_jax.data.vocabularies, "
        "flix_jax.data.denoising, flix_jax.tasks.xtreme_up; "
        "sys.exit(any(m in sys.modules for m in ('tensorflow', 'seqio', 'jax')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
