"""What is evaluated: a cell's examples, as model features and to score, and an index's passages."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import absl.logging
import numpy as np
from jaxtyping import Int

from flix_jax.data.examples import SOURCES
from flix_jax.data.libraries import seqio
from flix_jax.data.seqio_tasks import ANSWER, HAS_SOURCE
from flix_jax.evaluation.batches import Batch

INDEX_SPLIT = "index"


class CellExamples:
    """A split of a cell's seqio task, read.

    Attributes:
      outputs: the predictions last scored, as the task postprocessed them.
      examples: how many there are.
      cut_inputs, cut_sources: how many inputs and sources are cut at the given lengths.
      without_source: how many examples have no source; 0 of a task without sources.

    Raises:
      ValueError: the task has no metrics.
    """

    def __init__(
        self,
        task: seqio.Task,
        converter: seqio.FeatureConverter,
        split: str,
        lengths: Mapping[str, int],
        limit: int | None = None,
    ):
        """Reads `split`, or `limit` examples from all over it; `lengths` as in CellEvaluator."""
        self._task = task
        with _quiet():
            self._evaluator = seqio.Evaluator(
                task.name,
                converter,
                eval_split=split,
                sequence_length=dict(lengths),
                num_examples=limit,
                # A budget's examples come from the whole cell: files are often sorted by document.
                shuffle=limit is not None,
                logger_cls=[_KeepOutputs],
                log_dir=os.devnull,  # Asked for by seqio; nothing is written to it.
                async_compute_metrics=False,
            )
        if not self._evaluator.eval_tasks:
            raise ValueError(f"seqio task {task.name!r} has no metrics to be evaluated by")
        self.outputs: Sequence[Any] = ()
        self._widths: dict[str, tuple[int, ...]] = {}
        self._batches: list[Batch] = []
        dataset = self._evaluator.cached_model_datasets[task.name]
        for _, batch in dataset.batch(256).as_numpy_iterator():
            self._widths = {name: array.shape[1:] for name, array in batch.items()}
            self._batches.append({name: _cut_padding(array) for name, array in batch.items()})
        self.examples = sum(len(next(iter(batch.values()))) for batch in self._batches)
        examples = list(self._evaluator.cached_task_datasets[task.name].as_numpy_iterator())
        self.cut_inputs = _count_cut(examples, "inputs", lengths["inputs"])
        self.cut_sources = _count_cut(examples, SOURCES, lengths.get(SOURCES, 0))
        self.without_source = sum(not example.get(HAS_SOURCE, True) for example in examples)

    @functools.cached_property
    def digest(self) -> str:
        """Names what is predicted from and scored against: another one for other examples."""
        return _digest(self._evaluator.cached_task_datasets[self._task.name].as_numpy_iterator())

    def rows(self) -> Iterator[Batch]:
        """Each example's model features, at their full length."""
        for batch in self._batches:
            whole = {name: _pad(array, self._widths[name]) for name, array in batch.items()}
            for row in range(len(next(iter(whole.values())))):
                yield {name: array[row] for name, array in whole.items()}

    def score(self, tokens: Int[np.ndarray, "examples length"], step: int) -> dict[str, float]:
        """The task's metrics of these predictions, by seqio, and the number of examples."""
        future, _ = self._evaluator.evaluate(
            compute_metrics=True, step=step, predict_fn=lambda *_: list(enumerate(tokens))
        )
        self.outputs = self._evaluator.loggers[0].outputs
        metrics = future.result()[self._task.name]
        scores = {name: float(getattr(value, "value", value)) for name, value in metrics.items()}
        return scores | {"examples": len(tokens)}

    def score_rankings(self, rankings: Sequence[Sequence[str]]) -> dict[str, float]:
        """The task's metrics of rankings, against the `answer` of each example, and their number.

        Not by seqio's evaluator, which scores against the tokens of the targets.
        """
        dataset = self._evaluator.cached_task_datasets[self._task.name].as_numpy_iterator()
        answers = [example[ANSWER].decode() for example in dataset]
        self.outputs = rankings
        scores: dict[str, float] = {}
        for metric_fn in self._task.metric_fns:
            scores |= metric_fn(answers, rankings)
        return scores | {"examples": len(rankings)}

    def lines(self) -> list[str]:
        """The predictions last scored as lines of json."""
        feature_ids = [row["feature_ids"] for row in self.rows() if "feature_ids" in row]
        dataset = self._evaluator.cached_task_datasets[self._task.name].as_numpy_iterator()
        lines = []
        for position, (example, prediction) in enumerate(zip(dataset, self.outputs, strict=True)):
            record = {
                "inputs": self._text(example, "inputs"),
                "targets": self._text(example, "targets"),
                "predictions": prediction,
            }
            if f"{SOURCES}_pretokenized" in example:
                record["source"] = self._text(example, SOURCES)
            if ANSWER in example:
                record["answer"] = example[ANSWER].decode()
            if feature_ids:
                record["feature_ids"] = feature_ids[position].tolist()
            lines.append(json.dumps(record, ensure_ascii=False))
        return lines

    def _text(self, example: Mapping[str, Any], feature: str) -> str:
        text = example.get(f"{feature}_pretokenized")
        if text is None:
            vocabulary = self._task.output_features[feature].vocabulary
            return vocabulary.decode(example[feature].tolist())
        return text.decode("utf-8") if isinstance(text, bytes) else text


class Passages:
    """The passages that a cell's inputs are to find, read from the split 'index' of a task.

    Attributes:
      ids: of the passages, in the order of `rows`.
      cut_inputs: how many passages are cut at the given length.
      digest: names the passages: another one for other texts, ids or features.
    """

    def __init__(
        self, task: seqio.Task, converter: seqio.FeatureConverter, lengths: Mapping[str, int]
    ):
        dataset = task.get_dataset(dict(lengths), INDEX_SPLIT, shuffle=False).cache()
        examples = list(dataset.as_numpy_iterator())
        self.ids = [example["targets_pretokenized"].decode() for example in examples]
        self.cut_inputs = _count_cut(examples, "inputs", lengths["inputs"])
        self.digest = _digest(examples)
        whole = {
            name: lengths.get(name) or max(len(example[name]) for example in examples)
            for name in task.output_features
        }
        self._converted = converter(dataset, whole)

    def rows(self) -> Iterator[Batch]:
        """Each passage's model features, at their full length."""
        return self._converted.as_numpy_iterator()


class _KeepOutputs(seqio.Logger):
    """Keeps the decoded predictions of the last evaluation, which seqio hands to loggers only."""

    outputs: Sequence[str] = ()

    def __call__(self, task_name, step, metrics, dataset, inferences, targets) -> None:
        self.outputs = inferences["output"]


def _digest(examples: Iterable[Mapping[str, Any]]) -> str:
    """Of all that the examples hold: texts, tokens, features, answers."""
    found = hashlib.sha256()
    for example in examples:
        for name in sorted(example):
            array = np.asarray(example[name])
            # A list of texts is an array of objects, which have no bytes of their own.
            listed = array.dtype == object
            content = repr(array.tolist()).encode() if listed else array.tobytes()
            found.update(f"{name} {array.dtype} {array.shape} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _count_cut(examples: Iterable[Mapping[str, Any]], name: str, length: int) -> int:
    """How many texts were longer, as the task counted; one of other making may not tell."""
    return sum(int(example.get(f"{name}_length", 0)) > length for example in examples)


def _cut_padding(array: np.ndarray) -> np.ndarray:
    """Drops the trailing columns that are zero in every row (`_pad` puts them back)."""
    if array.ndim != 2:
        return array
    used = np.flatnonzero(array.any(axis=0))
    return array[:, : used[-1] + 1 if len(used) else 0].copy()


def _pad(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.ndim != 2:
        return array
    return np.pad(array, ((0, 0), (0, shape[0] - array.shape[1])))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences seqio's advice on lengths, which it logs as a warning for every cell."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(verbosity)
