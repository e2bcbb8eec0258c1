"""Evaluation of cells through seqio: decode, score, write down, and never do a cell twice.

Every cell is a seqio task with its own `seqio.Evaluator`, which holds the examples, decodes and
postprocesses the model's tokens and calls the task's metrics. Prediction runs across cells: rows of
one batch may be of several, for the compiled batch size is fixed. Rows of short inputs are batched
apart from long ones and padded less: most inputs are much shorter than the longest.

A cell is evaluated by one of three kinds of inference: one text per example ('generate'), several
guesses ('complete'), or passages of an index that come nearest to the input ('retrieve').
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from flix_jax import preemption, processes
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.cells import GENERATE, RETRIEVE, Cell
from flix_jax.data.examples import SOURCES
from flix_jax.data.libraries import seqio
from flix_jax.evaluation import files, retrieval
from flix_jax.evaluation.batches import (
    SHAPES,
    Batch,
    PredictFn,
    predict_in_batches,
)
from flix_jax.evaluation.examples import CellExamples, Passages

_logger = logging.getLogger(__name__)

RANKED = 10  # passages of a ranking
MAX_HELD = 4  # cells that wait for a few rows, which wait for others of their length


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an evaluation is.

    Attributes:
      cell: the one just finished, or just predicted in part.
      cells_done, cells: finished, of all.
      examples_done, examples_before: predicted, now or before; of cells that were finished before.
    """

    cell: str
    cells_done: int
    cells: int
    examples_done: int
    examples_before: int


@dataclasses.dataclass(frozen=True, eq=False)
class CellEvaluator:
    """Evaluates a model on one split of several cells.

    Attributes:
      tasks: the registered seqio task of each cell.
      split: 'validation', 'test', or any other split of the tasks.
      lengths: maximal tokens per task feature, at least of 'inputs' and 'targets', and of 'sources'
        where the tasks have them. Longer inputs and sources are cut; targets are scored whole, as
        text.
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
    _loaded: dict[str, CellExamples] = dataclasses.field(default_factory=dict, init=False)
    _registered: dict[str, seqio.Task] = dataclasses.field(default_factory=dict, init=False)
    _indexes: dict[str, Passages] = dataclasses.field(default_factory=dict, init=False)

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
            if self.kind(cell) not in SHAPES:
                raise ValueError(
                    f"{cell.name}: unknown kind of inference {self.kind(cell)!r}; "
                    f"{did_you_mean(self.kind(cell), SHAPES)}"
                )
            if self.kind(cell) == RETRIEVE and cell not in self.indexes:
                raise ValueError(f"{cell.name}: to be evaluated by retrieval it needs an index")
        self._registered.update(
            {name: seqio.TaskRegistry.get(name) for name in self.tasks.values()}
        )

    def kind(self, cell: Cell) -> str:
        """How a cell is inferred."""
        return self.kinds.get(cell, GENERATE)

    def without_source(self) -> dict[str, int]:
        """By cell, how many of its examples, once read, have no English source; only some do."""
        counts = {name: loaded.without_source for name, loaded in self._loaded.items()}
        return {name: count for name, count in counts.items() if count}

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
        then `<cell>.scores.json`. A cell that has both, of the same examples, lengths, index and
        fingerprint, is read and not predicted again.

        Args:
          predict: by kind of inference, what maps a batch of model features, numpy arrays
            `[batch_size, ...]`, to token ids `[batch_size, length]` ('generate') or
            `[batch_size, guesses, length]`, the best first ('complete'), or to embeddings
            `[batch_size, width]` whose inner products compare ('retrieve'). Rows whose inputs, and
            sources of the same length, fit into half or a quarter of the length (not below 64
            tokens) come in batches of that length. The last batch of each length is filled up with
            copies of its first row.
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
          Preempted: asked to stop, after a batch or a cell.
        """
        folder = self.folder(run_dir, step)
        results: dict[str, dict[str, float]] = {}
        embedded: dict[str, tuple[list[str], np.ndarray]] = {}  # indexes, by these parameters
        missing = set(self.missing)
        for cell in self.tasks:
            if cell.name in missing:
                results[cell.name] = {"examples": 0}
        # Asked of one process, for others may read when the first has written more.
        finished = processes.from_first(
            lambda: {
                cell.name: self._finished(folder, cell, fingerprint)
                for cell in self.tasks
                if cell.name not in missing
            }
        )
        results |= {name: scores for name, scores in finished.items() if scores is not None}
        pending = [cell for cell in self.tasks if cell.name not in results]
        before = examples_done = sum(int(scores["examples"]) for scores in results.values())

        def report(cell: Cell, examples: int = 0) -> None:
            nonlocal examples_done
            examples_done += examples
            if progress is not None:
                done = len(results)
                progress(Progress(cell.name, done, len(self.tasks), examples_done, before))
            preemption.check()

        with preemption.phase("decoding"):
            for cell, predicted in self._predict(predict, pending, report):
                if not len(predicted):
                    missing.add(cell.name)
                    results[cell.name] = {"examples": 0}
                    report(cell)
                    continue
                loaded = self._load(cell)
                with preemption.phase("scoring"):
                    if self.kind(cell) == RETRIEVE:
                        index = self.indexes[cell]
                        if index not in embedded:
                            embedded[index] = self._embed(index, predict[RETRIEVE])
                        ids, passages = embedded[index]
                        rankings = retrieval.rank(predicted, passages, ids, RANKED)
                        results[cell.name] = loaded.score_rankings(rankings)
                    else:
                        results[cell.name] = loaded.score(predicted, step)
                    self._write(folder, cell, loaded.lines(), results[cell.name], fingerprint)
                report(cell)
        self._warn(missing)
        processes.wait_for_first()  # now what it has written can be read by all
        return {cell.name: results[cell.name] for cell in self.tasks}

    def _warn(self, missing: Collection[str]) -> None:
        """Tells of inputs that are cut, and of cells, named `missing`, that have no examples."""
        evaluated = [cell for cell in self.tasks if cell.name not in missing]
        cut = {cell.name: self._load(cell).cut_inputs for cell in evaluated}
        cut |= {f"passages of {name}": index.cut_inputs for name, index in self._indexes.items()}
        counts = ", ".join(f"{name} {count}" for name, count in cut.items() if count)
        if counts:
            _logger.warning("inputs cut at %d tokens: %s", self.lengths["inputs"], counts)
        cut = {cell.name: self._load(cell).cut_sources for cell in evaluated}
        counts = ", ".join(f"{name} {count}" for name, count in cut.items() if count)
        if counts:
            _logger.warning("sources cut at %d tokens: %s", self.lengths[SOURCES], counts)
        if missing:
            _logger.warning(
                "not evaluated, for want of a %s split: %s", self.split, ", ".join(sorted(missing))
            )

    def _predict(
        self,
        predict: Mapping[str, PredictFn],
        cells: Sequence[Cell],
        after_batch: Callable[[Cell, int], None],
    ) -> Iterator[tuple[Cell, np.ndarray]]:
        """Yields (cell, predictions [examples, ...]) for every cell once its rows are predicted.

        Calls `after_batch` with the cell of a batch's last row and the number of its rows.
        """
        done: dict[Cell, dict[int, np.ndarray]] = {}  # of cells that are read and not finished

        def rows() -> Iterator[tuple[tuple[Cell, int], str, Batch] | None]:
            for cell in cells:
                done[cell] = {}
                for position, row in enumerate(self._load(cell).rows()):
                    yield (cell, position), self.kind(cell), row
                if len(done) > MAX_HELD:
                    yield None

        def finished() -> Iterator[tuple[Cell, np.ndarray]]:
            for cell in list(done):
                examples = self._load(cell).examples
                if len(done[cell]) == examples:
                    predicted = done.pop(cell)
                    yield cell, np.array([predicted[position] for position in range(examples)])

        for batch in predict_in_batches(predict, rows(), self.batch_size):
            for (cell, position), prediction in batch:
                done[cell][position] = prediction
            after_batch(batch[-1][0][0], len(batch))
            yield from finished()
        yield from finished()

    def _embed(self, task: str, embed: PredictFn) -> tuple[list[str], np.ndarray]:
        """The passages of an index, as their ids and embeddings [passages, width]."""
        passages = self._passages(task)
        rows = ((position, RETRIEVE, row) for position, row in enumerate(passages.rows()))
        found = {
            position: embedding
            for batch in predict_in_batches({RETRIEVE: embed}, rows, self.batch_size)
            for position, embedding in batch
        }
        return passages.ids, np.array([found[position] for position in range(len(passages.ids))])

    def _passages(self, task: str) -> Passages:
        if task not in self._indexes:
            registered = seqio.TaskRegistry.get(task)
            self._indexes[task] = Passages(registered, self.converter, self.lengths)
        return self._indexes[task]

    def _load(self, cell: Cell) -> CellExamples:
        if cell.name not in self._loaded:
            task = self._registered[self.tasks[cell]]
            # Cells are loaded when they are needed, and seqio finds tasks by name only.
            if seqio.TaskRegistry.get(task.name) is not task:
                raise ValueError(
                    f"seqio task {task.name!r} was registered anew after its evaluator"
                )
            self._loaded[cell.name] = CellExamples(
                task, self.converter, self.split, self.lengths, self.examples_per_cell
            )
        return self._loaded[cell.name]

    def _settings(self, cell: Cell, fingerprint: str) -> dict[str, Any]:
        passages = self._passages(self.indexes[cell]) if self.kind(cell) == RETRIEVE else None
        return {
            "cell": cell.name,
            "seqio_task": self.tasks[cell],
            "split": self.split,
            "inference": self.kind(cell),
            "lengths": dict(self.lengths),
            "examples_per_cell": self.examples_per_cell,
            "metrics": [_name(fn) for fn in self._registered[self.tasks[cell]].metric_fns],
            "examples_sha256": self._load(cell).digest,
            "index_sha256": None if passages is None else passages.digest,
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
            | {
                "cut_inputs": self._load(cell).cut_inputs,
                "predictions_sha256": digest,
                "scores": dict(scores),
            },
        )

    def _finished(
        self, folder: epath.Path, cell: Cell, fingerprint: str
    ) -> dict[str, float] | None:
        record = files.read_object(files.scores_file(folder, cell.name))
        predictions = files.predictions_file(folder, cell.name)
        if record is None or not predictions.exists():
            return None
        settings = self._settings(cell, fingerprint)
        if {key: record.get(key) for key in settings} != settings:
            return None
        digest = hashlib.sha256(predictions.read_bytes()).hexdigest()
        return record["scores"] if digest == record["predictions_sha256"] else None


def _name(metric_fn: Callable[..., Any]) -> str:
    return getattr(metric_fn, "__qualname__", type(metric_fn).__name__)
