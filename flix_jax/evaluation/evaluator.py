"""Evaluation of cells through seqio: decode, score, write down, and never do a cell twice.

Every cell is a seqio task with its own `seqio.Evaluator`, which holds the examples, decodes and
postprocesses the model's tokens and calls the task's metrics. Prediction runs across cells: rows of
one batch may be of several, for the compiled batch size is fixed. Rows of short inputs are batched
apart from long ones and padded less: most inputs are much shorter than the longest.

A cell is evaluated by one of three kinds of inference: one text per example ('generate'), several
guesses ('complete'), or passages of an index that come nearest to the input ('retrieve').
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import absl.logging
import numpy as np
import seqio
from etils import epath
from jaxtyping import Int

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.cells import Cell
from flix_jax.data.seqio_tasks import ANSWER
from flix_jax.evaluation import files, retrieval

_logger = logging.getLogger(__name__)

Key = TypeVar("Key")
Batch = dict[str, np.ndarray]
PredictFn = Callable[[Batch], np.ndarray]

GENERATE, COMPLETE, RETRIEVE = "generate", "complete", "retrieve"
INDEX_SPLIT = "index"
RANKED = 10  # passages of a ranking
_SHAPES = {
    GENERATE: (2, np.integer, "token ids [batch, length]"),
    COMPLETE: (3, np.integer, "token ids [batch, guesses, length]"),
    RETRIEVE: (2, np.floating, "embeddings [batch, width]"),
}

INPUTS = "encoder_input_tokens"
_SHORTEST = 64  # tokens; halving lengths further would cost more compilation than it saves


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an evaluation is. `cell` is the one just finished, or just predicted in part."""

    cell: str
    cells_done: int
    cells: int
    examples_done: int


@dataclasses.dataclass(frozen=True, eq=False)
class CellEvaluator:
    """Evaluates a model on one split of several cells.

    Attributes:
      tasks: the registered seqio task of each cell.
      split: 'validation', 'test', or any other split of the tasks.
      lengths: maximal tokens per task feature, at least of 'inputs' and 'targets'. Longer inputs
        are cut; targets are scored whole, as text.
      converter: a seqio feature converter that does not pack.
      batch_size: rows of every batch given to `predict`; never fewer, never more.
      examples_per_cell: at most so many examples of each cell, always the same ones, drawn from
        the whole cell; None takes all, in the order of the file.
      kinds: how cells are inferred, where it is not by 'generate'.
      indexes: of every cell that is inferred by 'retrieve', the registered seqio task whose split
        'index' holds the passages as inputs and their ids as targets. The cell's own examples
        have the id of the right passage as `answer`.
    """

    tasks: Mapping[Cell, str]
    split: str
    lengths: Mapping[str, int]
    converter: seqio.FeatureConverter
    batch_size: int
    examples_per_cell: int | None = None
    kinds: Mapping[Cell, str] = dataclasses.field(default_factory=dict)
    indexes: Mapping[Cell, str] = dataclasses.field(default_factory=dict)
    _loaded: dict[str, "_LoadedCell"] = dataclasses.field(default_factory=dict, init=False)
    _registered: dict[str, seqio.Task] = dataclasses.field(default_factory=dict, init=False)
    _embedded: dict[str, tuple[list[str], np.ndarray]] = dataclasses.field(
        default_factory=dict, init=False
    )

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("no cells to evaluate")
        names = [files.predictions_file(epath.Path(), cell.name).name for cell in self.tasks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"several cells would write to one file: {', '.join(repeated)}")
        if self.batch_size < 1:
            raise ValueError(f"evaluation batch size must be at least 1, got {self.batch_size}")
        if self.examples_per_cell is not None and self.examples_per_cell < 1:
            raise ValueError(f"examples per cell must be at least 1, got {self.examples_per_cell}")
        for feature in ("inputs", "targets"):
            if self.lengths.get(feature, 0) < 1:
                raise ValueError(
                    f"evaluation needs a length of at least 1 for {feature!r}, got"
                    f" {self.lengths.get(feature)}"
                )
        for cell in self.tasks:
            if self.kind(cell) not in _SHAPES:
                raise ValueError(
                    f"{cell.name}: unknown kind of inference {self.kind(cell)!r}; "
                    f"{did_you_mean(self.kind(cell), _SHAPES)}"
                )
            if self.kind(cell) == RETRIEVE and cell not in self.indexes:
                raise ValueError(f"{cell.name}: to be evaluated by retrieval it needs an index")
        self._registered.update(
            {name: seqio.TaskRegistry.get(name) for name in self.tasks.values()}
        )

    def kind(self, cell: Cell) -> str:
        """How a cell is inferred."""
        return self.kinds.get(cell, GENERATE)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the cells whose task does not have the split."""
        return tuple(
            cell.name
            for cell, task in self.tasks.items()
            if self.split not in self._registered[task].splits
        )

    def folder(self, run_dir: epath.PathLike, step: int) -> epath.Path:
        """`evaluations/<step>` of a run for validation, a folder of the split's name in it else."""
        return files.evaluation_folder(run_dir, step, self.split)

    def evaluate(
        self,
        predict: Mapping[str, PredictFn],
        run_dir: epath.PathLike,
        step: int,
        *,
        fingerprint: str = "",
        progress: Callable[[Progress], None] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Scores every cell and writes its predictions.

        Each cell is written as soon as its last row is predicted: `<cell>.jsonl` (such as
        `ner.sw.jsonl`; inputs, targets, predictions as text and feature_ids, a line an example),
        then `<cell>.scores.json`. A cell that has both, with the same split, lengths, number of
        examples and fingerprint, is read and not predicted again.

        Args:
          predict: by kind of inference, what maps a batch of model features, numpy arrays
            `[batch_size, ...]`, to token ids `[batch_size, length]` ('generate') or
            `[batch_size, guesses, length]`, the best first ('complete'), or to embeddings
            `[batch_size, width]` whose inner products compare ('retrieve'). Rows whose inputs fit
            into half or a quarter of the length (not below 64 tokens) come in batches of that
            length. The last batch of each length is filled up with copies of its first row.
          run_dir: the run's folder, local or in a bucket.
          step: the training step of the parameters, for the folder's name.
          fingerprint: names what else the predictions depend on: the digest of the parameters.
          progress: called after every batch and every finished cell.

        Returns:
          {cell name: {metric: value, 'examples': n}} in the order of `tasks`. A cell without the
          split, or with no example in it, has only `'examples': 0`; a warning names it.

        Raises:
          ValueError: `predict` lacks a kind, returned another shape or no numbers of the kind; a
            task has no metrics.
        """
        folder = self.folder(run_dir, step)
        results: dict[str, dict[str, float]] = {}
        missing = set(self.missing)
        for cell in self.tasks:
            if cell.name in missing:
                results[cell.name] = {"examples": 0}
            elif (scores := self._finished(folder, cell, fingerprint)) is not None:
                results[cell.name] = scores
        pending = [cell for cell in self.tasks if cell.name not in results]
        examples_done = sum(int(scores["examples"]) for scores in results.values())

        def report(cell: Cell, examples: int = 0) -> None:
            nonlocal examples_done
            examples_done += examples
            if progress is not None:
                progress(Progress(cell.name, len(results), len(self.tasks), examples_done))

        for cell, predicted in self._predict(predict, pending, report):
            if len(predicted):
                loaded = self._load(cell)
                if self.kind(cell) == RETRIEVE:
                    ids, passages = self._index(self.indexes[cell], predict[RETRIEVE])
                    rankings = retrieval.rank(predicted, passages, ids, RANKED)
                    results[cell.name] = loaded.score_rankings(rankings)
                else:
                    results[cell.name] = loaded.score(predicted, step)
                self._write(folder, cell, loaded.lines(), results[cell.name], fingerprint)
            else:
                missing.add(cell.name)
                results[cell.name] = {"examples": 0}
            report(cell)
        cut = {
            cell.name: self._loaded[cell.name].cut_inputs
            for cell in pending
            if cell.name in self._loaded
        }
        if any(cut.values()):
            _logger.warning(
                "inputs cut at %d tokens: %s",
                self.lengths["inputs"],
                ", ".join(f"{name} {count}" for name, count in cut.items() if count),
            )
        if missing:
            _logger.warning(
                "not evaluated, for want of a %s split: %s", self.split, ", ".join(sorted(missing))
            )
        return {cell.name: results[cell.name] for cell in self.tasks}

    def _predict(
        self,
        predict: Mapping[str, PredictFn],
        cells: Sequence[Cell],
        after_batch: Callable[[Cell, int], None],
    ) -> Iterator[tuple[Cell, np.ndarray]]:
        """Yields (cell, predictions [examples, ...]) for every cell once its rows are predicted.

        Calls `after_batch` with the cell of a batch's last row and the number of its rows.
        """
        done: dict[str, dict[int, np.ndarray]] = {cell.name: {} for cell in cells}
        unfinished = list(cells)

        def rows() -> Iterator[tuple[tuple[Cell, int], str, Batch]]:
            for cell in cells:
                for position, row in enumerate(self._load(cell).rows()):
                    yield (cell, position), self.kind(cell), row

        def finished() -> Iterator[tuple[Cell, np.ndarray]]:
            while unfinished and (loaded := self._loaded.get(unfinished[0].name)):
                if len(done[unfinished[0].name]) < loaded.examples:
                    return
                cell = unfinished.pop(0)
                predicted = done.pop(cell.name)
                yield cell, np.array([predicted[position] for position in range(loaded.examples)])

        for batch in self._in_batches(predict, rows()):
            for (cell, position), prediction in batch:
                done[cell.name][position] = prediction
            after_batch(batch[-1][0][0], len(batch))
            yield from finished()
        yield from finished()

    def _in_batches(
        self, predict: Mapping[str, PredictFn], rows: Iterable[tuple[Key, str, Batch]]
    ) -> Iterator[list[tuple[Key, np.ndarray]]]:
        """Predicts (key, kind, row) in batches of one kind and one length; yields each batch."""
        waiting: dict[tuple[str, int], list[tuple[Key, Batch]]] = {}

        def flush(kind: str, length: int) -> list[tuple[Key, np.ndarray]]:
            keyed = waiting.pop((kind, length))
            filled = [row for _, row in keyed]
            filled += filled[:1] * (self.batch_size - len(filled))
            batch = {name: np.stack([row[name] for row in filled]) for name in filled[0]}
            batch[INPUTS] = batch[INPUTS][:, :length]
            if kind not in predict:
                raise ValueError(f"no predict function for {kind!r}, only for {list(predict)}")
            predicted = _checked(kind, predict[kind](batch), self.batch_size)
            return [(key, row) for (key, _), row in zip(keyed, predicted, strict=False)]

        for key, kind, row in rows:
            group = kind, _padded_length(row[INPUTS])
            waiting.setdefault(group, []).append((key, row))
            if len(waiting[group]) == self.batch_size:
                yield flush(*group)
        for group in list(waiting):
            yield flush(*group)

    def _index(self, task: str, embed: PredictFn) -> tuple[list[str], np.ndarray]:
        """The passages of an index, as their ids and embeddings [passages, width]."""
        if task not in self._embedded:
            registered = seqio.TaskRegistry.get(task)
            dataset = registered.get_dataset(dict(self.lengths), INDEX_SPLIT, shuffle=False)
            examples = list(dataset.as_numpy_iterator())
            ids = [example["targets_pretokenized"].decode() for example in examples]
            lengths = {
                name: self.lengths.get(name) or max(len(example[name]) for example in examples)
                for name in registered.output_features
            }
            converted = self.converter(dataset, lengths).as_numpy_iterator()
            rows = ((position, RETRIEVE, row) for position, row in enumerate(converted))
            found = {
                position: embedding
                for batch in self._in_batches({RETRIEVE: embed}, rows)
                for position, embedding in batch
            }
            embeddings = np.array([found[position] for position in range(len(ids))])
            self._embedded[task] = ids, embeddings
        return self._embedded[task]

    def _load(self, cell: Cell) -> "_LoadedCell":
        if cell.name not in self._loaded:
            task = self._registered[self.tasks[cell]]
            # Cells are loaded when they are needed, and seqio finds tasks by name only.
            if seqio.TaskRegistry.get(task.name) is not task:
                raise ValueError(
                    f"seqio task {task.name!r} was registered anew after its evaluator"
                )
            with _quiet():
                self._loaded[cell.name] = _LoadedCell(self, task)
        return self._loaded[cell.name]

    def _settings(self, cell: Cell, fingerprint: str) -> dict[str, Any]:
        return {
            "cell": cell.name,
            "seqio_task": self.tasks[cell],
            "split": self.split,
            "inference": self.kind(cell),
            "lengths": dict(self.lengths),
            "examples_per_cell": self.examples_per_cell,
            "fingerprint": fingerprint,
        }

    def _write(
        self,
        folder: epath.Path,
        cell: Cell,
        lines: Sequence[str],
        scores: Mapping[str, float],
        fingerprint: str,
    ) -> None:
        text = "".join(line + "\n" for line in lines)
        files.write_text(files.predictions_file(folder, cell.name), text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        files.write_json(
            files.scores_file(folder, cell.name),
            self._settings(cell, fingerprint)
            | {"predictions_sha256": digest, "scores": dict(scores)},
        )

    def _finished(
        self, folder: epath.Path, cell: Cell, fingerprint: str
    ) -> dict[str, float] | None:
        record = files.read_json(files.scores_file(folder, cell.name))
        predictions = files.predictions_file(folder, cell.name)
        if record is None or not predictions.exists():
            return None
        settings = self._settings(cell, fingerprint)
        if {key: record.get(key) for key in settings} != settings:
            return None
        digest = hashlib.sha256(predictions.read_bytes()).hexdigest()
        return record["scores"] if digest == record["predictions_sha256"] else None


class _LoadedCell:
    """A cell's examples in memory: as model features, and as seqio's evaluator holds them."""

    def __init__(self, evaluator: CellEvaluator, task: seqio.Task):
        self._task = task
        self._evaluator = seqio.Evaluator(
            task.name,
            evaluator.converter,
            eval_split=evaluator.split,
            sequence_length=dict(evaluator.lengths),
            num_examples=evaluator.examples_per_cell,
            # A budget's examples come from the whole cell: files are often sorted by document.
            shuffle=evaluator.examples_per_cell is not None,
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
        limit = evaluator.lengths["inputs"]
        examples = self._evaluator.cached_task_datasets[task.name].as_numpy_iterator()
        # What the task counted before it cut; a task of other making may not tell.
        self.cut_inputs = sum(int(x.get("inputs_length", 0)) > limit for x in examples)

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


class _KeepOutputs(seqio.Logger):
    """Keeps the decoded predictions of the last evaluation, which seqio hands to loggers only."""

    outputs: Sequence[str] = ()

    def __call__(self, task_name, step, metrics, dataset, inferences, targets) -> None:
        self.outputs = inferences["output"]


def _checked(kind: str, predicted: Any, batch_size: int) -> np.ndarray:
    predicted = np.asarray(predicted)
    ndim, dtype, expected = _SHAPES[kind]
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
