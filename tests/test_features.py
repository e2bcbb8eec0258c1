"""Feature types and spaces: ids, ranks, dropout rates, errors, json."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from flix_jax.adapters.features import FeatureSpace, FeatureType, first_values

TASK = FeatureType("task", ("ner", "qa", "topic"), rank=4, dropout=0.5)
LANGUAGE = FeatureType("language", ("am", "sw", "yo"), rank=2, ranks={"sw": 3}, slots=2)
SPACE = FeatureSpace((TASK, LANGUAGE))


def test_each_type_owns_its_slots():
    assert SPACE.num_slots == 3
    assert list(SPACE.slots("task")) == [0]
    assert list(SPACE.slots(LANGUAGE)) == [1, 2]
    assert SPACE.num_features == 6


def test_encode_fills_absent_slots_and_ignores_other_annotations():
    ids = SPACE.encode({"task": "qa", "language": ("yo", "am"), "cell": "qa/yo"})
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [1, 2, 0])
    np.testing.assert_array_equal(SPACE.encode({"language": "sw"}), [-1, 1, -1])
    np.testing.assert_array_equal(SPACE.encode({"task": None}), [-1, -1, -1])


def test_an_unknown_value_is_absent_or_an_error():
    annotations = {"task": "qa", "language": "zz"}
    np.testing.assert_array_equal(SPACE.encode(annotations), [1, -1, -1])
    assert SPACE.unknown_types(annotations) == ("language",)
    assert SPACE.unknown_types({"task": "qa"}) == ()
    strict = FeatureSpace((FeatureType("task", ("ner", "qa"), unknown="error"),))
    with pytest.raises(ValueError, match="'task': unknown value 'nre'; did you mean 'ner'"):
        strict.encode({"task": "nre"})


def test_more_values_than_slots_is_an_error():
    with pytest.raises(ValueError, match="'task': 2 values .* at most 1"):
        SPACE.encode({"task": ("ner", "qa")})


def test_weights_stand_beside_the_ids_that_they_are_of():
    ids, weights = SPACE.encode_weighted({"task": {"qa": 2}, "language": {"yo": 0.25, "zz": 3}})
    np.testing.assert_array_equal(ids, [1, 2, -1])
    np.testing.assert_array_equal(weights, np.float32([2, 0.25, 3]))
    assert weights.dtype == np.float32
    _, weights = SPACE.encode_weighted({"language": ("am", "yo")})
    np.testing.assert_array_equal(weights, [1, 1, 1])
    assert SPACE.unknown_types({"language": {"yo": 0.5, "zz": 0.5}}) == ("language",)
    with pytest.raises(ValueError, match="has weights, expected features alone"):
        SPACE.encode({"task": {"qa": 2}})
    for wrong in ("1", float("nan"), True, None):
        with pytest.raises(ValueError, match="of 'qa': expected a finite number"):
            SPACE.encode_weighted({"task": {"qa": wrong}})


def test_room_for_more_values_than_slots():
    wide = SPACE.room_for([{"task": "qa"}, {"task": {"qa": 0.5, "ner": 0.5}}, {"language": ()}])
    assert [t.slots for t in wide.types] == [2, 2]
    np.testing.assert_array_equal(wide.encode({"task": ("qa", "ner")}), [1, 0, -1, -1])
    assert SPACE.room_for([{"task": "qa", "language": ("am", "yo")}]) == SPACE
    assert SPACE.room_for([]) == SPACE


@hypothesis.given(
    st.sampled_from([None, *TASK.values]), st.lists(st.sampled_from(LANGUAGE.values), max_size=2)
)
def test_decode_inverts_encode(task, languages):
    decoded = SPACE.decode(SPACE.encode({"task": task, "language": languages}))
    assert decoded == {"task": task, "language": tuple(languages)}


def test_ranks_and_dropouts_of_single_values():
    t = FeatureType("t", ("a", "b"), rank=2, ranks={"b": 4}, dropout=0.1, dropouts={"a": 0.7})
    assert t.value_ranks == (2, 4)
    assert t.max_rank == 4
    assert t.value_dropouts == (0.7, 0.1)
    np.testing.assert_array_equal(t.scales(), [[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(t.scales(8.0), [[4, 4, 0, 0], [2, 2, 2, 2]])


def test_complete_takes_sorted_unique_values_from_the_data():
    space = FeatureSpace((FeatureType("task"), FeatureType("language", ("xx",))))
    done = space.complete({"task": ["qa", "ner", "qa"], "language": ["am"]})
    assert done.type("task").values == ("ner", "qa")
    assert done.type("language").values == ("xx",)


def test_complete_names_the_nearest_annotation():
    space = FeatureSpace((FeatureType("langage"),))
    with pytest.raises(ValueError, match="'langage'.*did you mean 'language'"):
        space.complete({"task": ["ner"], "language": ["am"]})


def test_a_space_whose_values_are_open_cannot_encode():
    with pytest.raises(ValueError, match="'task': its values are not known yet"):
        FeatureSpace((FeatureType("task"),)).encode({"task": "ner"})


def test_overrides_of_values_from_the_data_are_checked_when_they_are_known():
    space = FeatureSpace((FeatureType("task", ranks={"nre": 8}),))
    with pytest.raises(ValueError, match="ranks names 'nre'.*did you mean 'ner'"):
        space.complete({"task": ["ner", "qa"]})


def test_ids_are_checked_with_row_slot_value_and_bound():
    SPACE.validate_ids(np.array([[2, -1, 2], [-1, 0, 1]], np.int32))
    with pytest.raises(ValueError, match=r"row 1, slot 2 \(language\): id 3, expected .* 0 to 2"):
        SPACE.validate_ids(np.array([[2, -1, 2], [-1, 0, 3]]))
    with pytest.raises(ValueError, match=r"row 0, slot 0 \(task\): id -2"):
        SPACE.validate_ids(np.array([[-2, -1, 2]]))
    with pytest.raises(ValueError, match=r"shape \(1, 2\), expected \[..., 3\]"):
        SPACE.validate_ids(np.array([[1, 1]]))
    with pytest.raises(ValueError, match="dtype float64"):
        SPACE.validate_ids(np.array([[1.0, 1.0, 1.0]]))


def test_json_round_trip_and_hash():
    space = FeatureSpace((TASK, LANGUAGE), rescale=True)
    again = FeatureSpace.from_json(space.to_json())
    assert again == space
    assert hash(again) == hash(space)
    assert space.difference(again) is None
    open_space = FeatureSpace((FeatureType("task"),))
    assert FeatureSpace.from_json(open_space.to_json()) == open_space


@pytest.mark.parametrize("text", ["[]", "{", '{"types": [{"nome": "task"}]}'])
def test_json_of_something_else_is_an_error(text):
    with pytest.raises(ValueError):
        FeatureSpace.from_json(text)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (FeatureSpace((TASK,)), "feature types are"),
        (FeatureSpace((TASK, FeatureType("language", ("am", "yo", "sw")))), "id 1 is 'sw' here"),
        (
            FeatureSpace((TASK, FeatureType("language", LANGUAGE.values, rank=2, slots=2))),
            "ranks is {'sw': 3} here and {} there",
        ),
        (FeatureSpace((TASK, LANGUAGE), keep_one=True), "keep_one is False here"),
    ],
)
def test_difference_says_what_differs(other, says):
    assert says in SPACE.difference(other)
    assert "\n" not in SPACE.difference(other)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"name": "t", "values": ()}, "values is empty"),
        ({"name": "t", "values": "ab"}, "expected a sequence"),
        ({"name": "t", "values": ("a", "a")}, "'a' is named more than once"),
        ({"name": "t", "values": ("a", "")}, "value ''"),
        ({"name": "t", "rank": 0}, "rank is 0"),
        ({"name": "t", "dropout": 1.0}, "dropout is 1.0"),
        ({"name": "t", "values": ("a",), "ranks": {"b": 2}}, "ranks names 'b'"),
        ({"name": "t", "values": ("a",), "dropouts": {"a": -1.0}}, "value 'a': dropout is -1"),
        ({"name": "t", "unknown": "eror"}, "did you mean 'error'"),
        ({"name": "t", "slots": 0}, "slots is 0"),
    ],
)
def test_a_type_checks_its_fields(fields, says):
    with pytest.raises(ValueError, match=says):
        FeatureType(**fields)


def test_a_space_checks_its_types():
    with pytest.raises(ValueError, match="types is empty"):
        FeatureSpace(())
    with pytest.raises(ValueError, match="type 'task' is named more than once"):
        FeatureSpace((TASK, TASK))
    with pytest.raises(ValueError, match="no type 'tsak'; did you mean 'task'"):
        SPACE.type("tsak")


def test_the_first_of_some_values():
    assert first_values(("a", "b", "c"), 2) == ("a", "b")
    with pytest.raises(ValueError, match="first_values.count=4: expected 1 to 3"):
        first_values(("a", "b", "c"), 4)
    with pytest.raises(ValueError, match="first_values.count=0"):
        first_values(("a",), 0)
