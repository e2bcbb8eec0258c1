"""Retrieval in blocks against sorting all products at once."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flix_jax.evaluation.retrieval import rank


def _ids(count):
    return [f"p{place}" for place in range(count)]


def _sorted_at_once(queries, passages, k):
    products = (queries.astype(np.float64) @ passages.astype(np.float64).T).astype(np.float32)
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return [[f"p{place}" for place in row] for row in order]


@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 5)),
    k=st.integers(1, 12),
    block=st.integers(1, 45),
    seed=st.integers(0, 2**32 - 1),
    ties=st.booleans(),
)
def test_blocks_of_any_size_rank_as_one_stable_sort(sizes, k, block, seed, ties):
    queries, passages, embed = sizes
    rng = np.random.default_rng(seed)
    q, p = rng.normal(size=(queries, embed)), rng.normal(size=(passages, embed))
    if ties:
        q, p = np.round(q), np.round(p)
    q, p = q.astype(np.float32), p.astype(np.float32)
    assert rank(q, p, _ids(passages), k, block=block) == _sorted_at_once(q, p, k)


def test_equal_passages_come_in_their_order_wherever_the_blocks_end():
    rng = np.random.default_rng(0)
    one, q = rng.normal(size=300).astype(np.float32), rng.normal(size=(3, 300)).astype(np.float32)
    p = np.tile(one, (50, 1))
    for block in (1, 7, 13, 50):
        assert rank(q, p, _ids(50), 5, block=block) == [_ids(5)] * 3


def test_all_ids_where_the_index_has_no_more_than_k():
    assert rank(np.ones((2, 1)), np.asarray([[1.0], [3.0], [2.0]]), "abc") == [list("bca")] * 2


def test_a_range_of_ids_gives_places():
    assert rank(np.ones((1, 1)), np.asarray([[1.0], [3.0], [2.0]]), range(3), 2) == [[1, 2]]


def test_memory_does_not_grow_with_the_index():
    def peak(passages):
        p = np.ones((passages, 8), np.float32)
        ids, q = _ids(passages), np.ones((200, 8), np.float32)
        tracemalloc.start()
        try:
            rank(q, p, ids, 10, block=64)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(20_000) < 1.05 * peak(1_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k = 0: expected a positive integer"),
        ({"block": 0}, "block = 0: expected a positive integer"),
        ({"ids": ["a"]}, "1 ids but 3 passages; expected as many"),
        ({"queries": np.ones((2, 5))}, r"queries have shape \(2, 5\) and passages \(3, 4\)"),
        ({"queries": np.ones(4)}, r"queries have shape \(4,\)"),
        ({"passages": np.ones((0, 4)), "ids": []}, "the index has no passages"),
        ({"queries": np.full((2, 4), np.nan)}, "the embedding of query 0 is not finite"),
        (
            {"passages": np.asarray([[1.0] * 4, [2.0] * 4, [np.inf] * 4]), "block": 2},
            "the embedding of passage 2 is not finite",
        ),
    ],
)
def test_what_cannot_be_ranked_is_refused_in_one_line(change, message):
    given = {"queries": np.ones((2, 4)), "passages": np.ones((3, 4)), "ids": ["a", "b", "c"]}
    with pytest.raises(ValueError, match=message) as error:
        rank(**{**given, **change})
    assert "\n" not in str(error.value)
