"""Prediction in batches of one size, in which short inputs are padded less."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from flix_jax.data.cells import COMPLETE, GENERATE, RETRIEVE
from flix_jax.data.pipeline import SOURCE_TOKENS

Key = TypeVar("Key")
Batch = dict[str, np.ndarray]
PredictFn = Callable[[Batch], np.ndarray]

GUESSES = 3  # of a completion: what the benchmark's scorer takes, neither more nor fewer
SHAPES: Mapping[str, tuple[int, type, str]] = {
    GENERATE: (2, np.integer, "token ids [batch, length]"),
    COMPLETE: (3, np.integer, "token ids [batch, guesses, length]"),
    RETRIEVE: (2, np.floating, "embeddings [batch, width]"),
}

INPUTS = "encoder_input_tokens"
_SHORTEST = 64  # tokens; halving lengths further would cost more compilation than it saves


def predict_in_batches(
    predict: Mapping[str, PredictFn], rows: Iterable[tuple[Key, str, Batch] | None], batch_size: int
) -> Iterator[list[tuple[Key, np.ndarray]]]:
    """Predicts (key, kind, row) in batches of one kind and one length; yields each batch.

    As `CellEvaluator.evaluate` says of `predict`. Rows come back in another order than they went
    in, each with its key: a row waits for others of its kind and length. None among the rows has
    all that wait predicted.

    Raises:
      ValueError: `predict` lacks a kind, or returned another shape or no numbers of the kind.
    """
    waiting: dict[tuple[str, int], list[tuple[Key, Batch]]] = {}

    def flush(kind: str, length: int) -> list[tuple[Key, np.ndarray]]:
        keyed = waiting.pop((kind, length))
        filled = [row for _, row in keyed]
        filled += filled[:1] * (batch_size - len(filled))
        batch = {name: np.stack([row[name] for row in filled]) for name in filled[0]}
        for name in _alike(batch):
            batch[name] = batch[name][:, :length]
        if kind not in predict:
            raise ValueError(f"no predict function for {kind!r}, only for {list(predict)}")
        predicted = _checked(kind, predict[kind](batch), batch_size)
        return [(key, row) for (key, _), row in zip(keyed, predicted, strict=False)]

    for item in rows:
        if item is None:
            for group in list(waiting):
                yield flush(*group)
            continue
        key, kind, row = item
        group = kind, max(_padded_length(row[name]) for name in _alike(row))
        waiting.setdefault(group, []).append((key, row))
        if len(waiting[group]) == batch_size:
            yield flush(*group)
    for group in list(waiting):
        yield flush(*group)


def _alike(batch: Batch) -> list[str]:
    """What is cut to one length: the inputs, and sources that are as long.

    Adapters may fuse them position by position. Sources of a length of their own keep it.
    """
    length = batch[INPUTS].shape[-1]
    return [n for n in (INPUTS, SOURCE_TOKENS) if n in batch and batch[n].shape[-1] == length]


def _checked(kind: str, predicted: Any, batch_size: int) -> np.ndarray:
    predicted = np.asarray(predicted)
    ndim, dtype, expected = SHAPES[kind]
    if predicted.ndim != ndim or len(predicted) != batch_size:
        raise ValueError(
            f"predict returned an array of shape {predicted.shape}; expected {expected} with "
            f"batch {batch_size}"
        )
    if not np.issubdtype(predicted.dtype, dtype):
        raise ValueError(f"predict returned {predicted.dtype}; expected {expected}")
    return predicted


def _padded_length(inputs: np.ndarray) -> int:
    """The least of the full length, its half and its quarter that holds the tokens of a row."""
    used = int(np.flatnonzero(inputs)[-1]) + 1 if inputs.any() else 1
    length = len(inputs)
    while length % 2 == 0 and length // 2 >= max(used, _SHORTEST) and length > len(inputs) // 4:
        length //= 2
    return length
