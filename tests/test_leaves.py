"""Arrays read in parts are those read whole and sliced, whatever was rearranged before."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flix_jax.interop.leaves import Leaf, load, stacked

ARRAY = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32)


def leaf(array):
    return Leaf.of(array, "here")


def arrangements():
    """(leaf, what it should be) of every arrangement, and of arrangements of them."""
    matrix = ARRAY.reshape(4, -1)
    rows = [leaf(ARRAY[i]) for i in range(4)]
    return {
        "as it is": (leaf(ARRAY), ARRAY),
        "transposed": (leaf(matrix).transposed(), matrix.T),
        "rows of one axis": (leaf(ARRAY).matrix(4), matrix),
        "rows of two axes": (leaf(ARRAY).matrix(12), ARRAY.reshape(12, -1)),
        "columns of one axis": (leaf(ARRAY).matrix(24), ARRAY.reshape(24, 5)),
        "a place of an axis": (leaf(ARRAY).part(1, 2), ARRAY[:, 2]),
        "stacked first": (stacked(rows, 0), ARRAY),
        "stacked on 1": (stacked(rows, 1), np.moveaxis(ARRAY, 0, 1)),
        "another shape": (leaf(ARRAY).reshaped((6, 20)), ARRAY.reshape(6, 20)),
        "times a number": (leaf(ARRAY).scaled(0.5), ARRAY * np.float32(0.5)),
        "a layer as a matrix, transposed": (
            leaf(ARRAY).part(1, 0).matrix(4).transposed(),
            ARRAY[:, 0].reshape(4, -1).T,
        ),
    }


@pytest.mark.parametrize("name", arrangements())
@given(data=st.data())
def test_a_part_is_the_part_of_the_whole(name, data):
    made, expected = arrangements()[name]
    assert made.shape == expected.shape
    index = []
    for size in expected.shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    np.testing.assert_array_equal(made.read(tuple(index)), expected[tuple(index)])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"here: shape \(4, 3, 2, 5\), expected a matrix"):
        leaf(ARRAY).transposed()
    with pytest.raises(ValueError, match=r"here: shape \(4, 3, 2, 5\), expected 7 rows"):
        leaf(ARRAY).matrix(7)
    with pytest.raises(ValueError, match="but here"):
        stacked([leaf(ARRAY), leaf(ARRAY[:2])], 0)


def test_devices_get_their_parts_and_no_more():
    asked = []
    matrix = ARRAY.reshape(8, 15)

    def fetch(index):
        asked.append(tuple((s.start, s.stop) for s in index))
        return matrix[index]

    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    sharding = NamedSharding(mesh, PartitionSpec("data", None))
    template = jax.ShapeDtypeStruct((8, 15), "bfloat16", sharding=sharding)
    found = load({"w": Leaf((8, 15), matrix.dtype, fetch)}, {"w": template})["w"]
    assert found.dtype == "bfloat16" and found.sharding == sharding
    np.testing.assert_array_equal(np.asarray(found), matrix.astype(found.dtype))
    assert set(asked) == {((i, i + 2), (0, 15)) for i in range(0, 8, 2)}
