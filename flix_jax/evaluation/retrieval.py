"""Retrieval: the passages of an index whose embeddings have the largest products with a query's."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float

Id = TypeVar("Id")


def rank(
    queries: Float[np.ndarray, "queries embed"],
    passages: Float[np.ndarray, "passages embed"],
    ids: Sequence[Id],
    k: int = 10,
    *,
    block: int = 1024,
) -> list[list[Id]]:
    """The ids of the `k` passages with the largest inner product with each query, best first.

    Of passages whose products are equal, the one that stands first in `passages` comes first.
    Products are summed in float64 and compared in float32, so that rounding does not tell equal
    passages apart and the size of a block changes nothing. One block of products is held at a time,
    whatever the size of the index.

    Args:
      queries: embeddings, [queries, embed].
      passages: embeddings, [passages, embed]; np.memmap will do.
      ids: of the passages, in their order; a range gives their places.
      k: how many passages for each query.
      block: so many queries are compared with so many passages at a time.

    Returns:
      For each query its `k` best ids; all ids, where the index has no more than `k`.

    Raises:
      ValueError: `k` or `block` below 1, an index without passages, embeddings of other shapes or
        with values that are not finite, or not as many ids as passages.
    """
    for name, value in (("k", k), ("block", block)):
        if value < 1:
            raise ValueError(f"rank: {name} = {value!r}: expected a positive integer")
    if queries.ndim != 2 or passages.ndim != 2 or queries.shape[1] != passages.shape[1]:
        raise ValueError(
            f"rank: queries have shape {queries.shape} and passages {passages.shape}; "
            "expected [queries, embed] and [passages, embed]"
        )
    if len(ids) != len(passages):
        raise ValueError(f"rank: {len(ids)} ids but {len(passages)} passages; expected as many")
    if not len(passages):
        raise ValueError("rank: the index has no passages")
    ranked: list[list[Id]] = []
    for start in range(0, len(queries), block):
        places = _rank_block(_finite("query", queries, start, block), passages, k, block)
        ranked.extend([ids[place] for place in row] for row in places.tolist())
    return ranked


def _rank_block(queries: np.ndarray, passages: np.ndarray, k: int, block: int) -> np.ndarray:
    """The places of the best passages of a few queries, int64 [queries, min(k, passages)]."""
    best = np.zeros((len(queries), 0), np.float32)
    places = np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(passages), block):
        part = _finite("passage", passages, start, block)
        products = (queries @ part.T).astype(np.float32)
        # What was found before stands before: columns of equals are in the order of the index.
        products = np.concatenate([best, products], axis=1)
        new = np.arange(start, start + len(part))
        columns = _largest(products, min(k, products.shape[1]))
        best = np.take_along_axis(products, columns, axis=1)
        places = np.concatenate([places, np.broadcast_to(new, (len(queries), len(new)))], axis=1)
        places = np.take_along_axis(places, columns, axis=1)
    return places


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Columns of the `k` largest of each row, largest first; of equals the first column first."""
    size = values.shape[1]
    smallest = np.partition(values, size - k, axis=1)[:, size - k, None]  # of those to be taken
    rows, columns = np.nonzero(values >= smallest)
    order = np.lexsort((columns, -values[rows, columns], rows))
    firsts = np.searchsorted(rows, np.arange(len(values)))
    return columns[order][firsts[:, None] + np.arange(k)]


def _finite(kind: str, embeddings: np.ndarray, start: int, block: int) -> np.ndarray:
    """A block of embeddings in float64; ValueError for one that is not finite."""
    part = np.asarray(embeddings[start : start + block], np.float64)
    wrong = ~np.isfinite(part).all(axis=1)
    if wrong.any():
        raise ValueError(
            f"rank: the embedding of {kind} {start + int(wrong.argmax())} is not finite"
        )
    return part
