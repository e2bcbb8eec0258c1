"""What a trained run says: scores per cell, and predictions for text of one's own."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from flix_jax.adapters.features import ABSENT, FeatureSpace
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data import cells as cells_lib
from flix_jax.evaluation import files
from flix_jax.evaluation.bootstrap import check_confidence
from flix_jax.evaluation.scoreboard import Scoreboard
from flix_jax.experiments import ensembles, scoring
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import Run
from flix_jax.models.decoding import Decoding
from flix_jax.tasks.xtreme_up import read_records
from flix_jax.training.checkpoints import Step, digest

if TYPE_CHECKING:
    from flix_jax.evaluation.evaluator import CellEvaluator, Progress


GREEDILY = Decoding()
AUTO, ALWAYS, NEVER = FOLDS = ("auto", "always", "never")


def evaluator(
    job: Job, split: str, examples_per_cell: int | None = None, cells: Sequence[str] | None = None
) -> CellEvaluator:
    """The evaluator of a job's cells: trained on and held out, those that have the split.

    Args:
      job: whose cells.
      split: the split.
      examples_per_cell: a budget; None takes the whole split.
      cells: patterns of the cells to evaluate; None takes all.

    Raises:
      ValueError: no cell has the split, or a pattern matches no cell.
    """
    from flix_jax.data.converter import FlixFeatureConverter
    from flix_jax.evaluation.evaluator import CellEvaluator

    job = ensembles.evaluated(job)
    chosen = job.split.cells if cells is None else cells_lib.match(cells, job.split.cells)
    job.check_split(split, chosen)
    ensembles.check_kinds(job.run, chosen)
    source, vocabulary = job.run.source, job.run.vocabulary
    having = [cell for cell in chosen if split in source.splits(cell)]
    return CellEvaluator(
        tasks=source.register(chosen, vocabulary=vocabulary, space=job.space),
        split=split,
        lengths=job.lengths,
        converter=FlixFeatureConverter(None if job.space is None else job.space.num_slots),
        batch_size=job.run.evaluation.batch_size,
        examples_per_cell=examples_per_cell,
        kinds={cell: source.inference(cell) for cell in chosen},
        indexes=source.register_indexes(having, vocabulary=vocabulary, space=job.space),
    )


def fingerprint(job: Job, trained: Any, frozen: str) -> str:
    """What predictions depend on, beside the examples: parameters, network and ensemble.

    `frozen` is the digest of the frozen parameters, which are hashed once, for they may be large.
    """
    made = f"{digest(trained)} {frozen} {job.run.model}"
    evaluation = job.run.evaluation
    if evaluation.ensemble is None:
        return made
    return f"{made} ensemble of {evaluation.ensemble}, {evaluation.ensemble_of}"


def restore(job: Job, step: Step = None) -> tuple[Any, Any, int]:
    """(trained, frozen, step) of a run that has been trained.

    Raises:
      ValueError: the run has no checkpoint, or not of that step, or keeps no best one.
    """
    base = None
    if not job.run.trains_everything:
        base = job.load_base()
    template, _ = job.parameters.templates
    with job.checkpoints(base, create=False) as checkpoints:
        trained, found = checkpoints.restore_trained(template, step)
    frozen: Any = {}
    if not job.run.trains_everything:
        frozen = job.frozen_parameters(base)
    return trained, frozen, found


def evaluate(
    run: Run,
    run_dir: epath.PathLike,
    *,
    split: str | None = None,
    cells: Sequence[str] | None = None,
    step: Step = None,
    confidence: float | None = None,
    bases_dir: epath.PathLike | None = None,
    say: Callable[[str], None] = print,
) -> Scoreboard:
    """Scores a trained run cell by cell; predictions and scores stay in its folder.

    Args:
      run: the run.
      run_dir: its folder.
      split: the split; None takes the run's own.
      cells: patterns of the cells; None takes all, trained on and held out.
      step: the checkpoint; None takes the newest, 'best' the one that `Evaluation.keep_best` kept.
      confidence: of bootstrap intervals of the scores (0.95); None makes none.
      bases_dir: as in training.
      say: takes lines of progress.

    Returns:
      The scores. Those of all cells are written beside the predictions, as ``scores.md``,
      ``scores.json`` and ``scores.csv``, and to the run's folder where they are of its own split.

    Raises:
      ValueError: nothing was trained here, or there is no such step, split or cell.
    """
    if confidence is not None:
        check_confidence(confidence)
    job = Job(run, run_dir, bases_dir=bases_dir)
    split = split or run.evaluation.split
    trained, frozen, found = restore(job, step)
    job = ensembles.evaluated(job)
    evaluation = evaluator(job, split, cells=cells)
    predictors = job.predictors(trained, frozen)
    mark = fingerprint(job, trained, digest(frozen))
    board, folder = score(job, evaluation, predictors, found, mark, say)
    if confidence is not None:
        board = scoring.with_intervals(board, folder, confidence)
    if cells is None:
        write_board(job, board, folder, found, split)
    return board


def score(
    job: Job,
    evaluation: CellEvaluator,
    predictors: Mapping[str, Any],
    step: int,
    mark: str,
    say: Callable[[str], None],
) -> tuple[Scoreboard, epath.Path]:
    """The scores of a job's cells, and the folder with their predictions.

    Args:
      job: whose folder and cells.
      evaluation: of its cells.
      predictors: as `Job.predictors` gives them.
      step: of the parameters.
      mark: their `fingerprint`.
      say: takes lines of progress.
    """
    watch = _Watch(say)
    scores = evaluation.evaluate(predictors, job.run_dir, step, fingerprint=mark, progress=watch)
    for name, without in job.unknown_features(evaluation.tasks).items():
        examples = sum(int(scores[cell.name]["examples"]) for cell in without)
        say(
            f"evaluate: the adapters have no {name} for {len(without)} of {len(scores)} cells, "
            f"{examples:,} examples, which run without one: " + cells_lib.name_some(without)
        )
    board = scoring.scoreboard(job.run, job.split, scores)
    return board, evaluation.folder(job.run_dir, step)


def write_board(job: Job, board: Scoreboard, folder: epath.Path, step: int, split: str) -> None:
    """Leaves the scores of all cells beside the predictions, and in the run's folder its own."""
    made = {"step": step, "split": split}
    board.write(folder, made)
    if split == job.run.evaluation.split:
        board.write(job.run_dir, made)


class _Watch:
    """Says how far an evaluation is, every few seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._started = self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < 10 and progress.cells_done < progress.cells:
            return
        self._last = now
        rate = (progress.examples_done - progress.examples_before) / (now - self._started)
        self._say(
            f"evaluate: {progress.cells_done}/{progress.cells} cells, "
            f"{progress.examples_done:,} examples, {rate:,.0f} a second"
        )


def infer(
    run: Run,
    run_dir: epath.PathLike,
    *,
    input_path: epath.PathLike,
    output_path: epath.PathLike,
    features: str = "",
    decoding: Decoding = GREEDILY,
    fold: str = AUTO,
    step: Step = None,
    bases_dir: epath.PathLike | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Predicts for every line of a jsonl file, in its order.

    A line is an object with ``input``; its fields named as feature types (``task``, ``language``)
    are its features, before those of ``features``. A feature that is not known is absent, and
    counted. `Evaluation.ensemble` is of evaluations: a line runs on its own cell's adapter alone.

    Args:
      run, run_dir, step, bases_dir: as in ``evaluate``.
      input_path: the file to read.
      output_path: the file to write: the same lines with ``prediction`` added, whole or not at all.
      features: ``task=ner,language=sw``, of every line that does not say otherwise.
      fold: whether the adapters are folded into the base first, so that decoding costs what it
        costs without them; possible where all lines have the same features. 'auto' does where that
        is so and the base is float32; 'always' refuses lines of several sets; 'never'.
      decoding: how; by beams a line has also its ``predictions``, the best first, and ``scores``.
      say: takes the count of unknown features.

    Returns:
      The number of lines.

    Raises:
      ValueError: a line that cannot be used, with file and line number, or as in ``evaluate``.
    """
    job = Job(run, run_dir, bases_dir=bases_dir)
    records = _read_records(epath.Path(input_path), job.space, features, say)
    vocabulary = run.vocabulary.build()
    encoded = [vocabulary.encode(record["input"]) for record, _ in records]
    room = run.inputs_length - 1  # for the end of sequence
    cut = [number for number, ids in enumerate(encoded, 1) if len(ids) > room]
    if cut:
        say(
            f"{len(cut)} of {len(records)} inputs are cut at Run.inputs_length={run.inputs_length} "
            f"tokens: of {input_path}:{cut[0]}" + (f" to {cut[-1]}" if len(cut) > 1 else "")
        )
    sets = {tuple(map(int, ids)) for _, ids in records}
    folds = job.space is not None and _folds(fold, run, sets)
    trained, frozen, _ = restore(job, step)
    if folds:
        assert job.space is not None
        frozen = job.folded(trained, frozen, job.space.decode(next(iter(sets))))
        job, trained = job.with_model(dataclasses.replace(job.model, adapters=None)), {}
    decode = job.decoder(trained, frozen, decoding)
    size = run.evaluation.batch_size
    lines: list[str] = []
    for start in range(0, len(records), size):
        part = records[start : start + size]
        tokens = np.zeros((size, run.inputs_length), np.int32)
        ids = np.full((size, 0 if job.space is None else job.space.num_slots), -1, np.int32)
        for row, (_, feature_ids) in enumerate(part):
            kept = [*encoded[start + row][:room], run.vocabulary.eos_id]
            tokens[row, : len(kept)] = kept
            ids[row] = feature_ids
        batch = {"encoder_input_tokens": tokens}
        if job.space is not None and not folds:
            batch["feature_ids"] = ids
        tokens_of, scores_of = decode(batch, start // size)
        for (record, _), found, scores in zip(part, tokens_of, scores_of, strict=False):
            texts = [vocabulary.decode([int(t) for t in row if t > 0]) for row in found]
            line = {**record, "prediction": texts[0]}
            if decoding.beams:
                kept = [i for i, score in enumerate(scores) if np.isfinite(score)]
                line["predictions"] = [texts[i] for i in kept]
                line["scores"] = [round(float(scores[i]), 6) for i in kept]
            lines.append(json.dumps(line, ensure_ascii=False))
    files.write_text(output_path, "".join(line + "\n" for line in lines))
    return len(lines)


def _folds(fold: str, run: Run, sets: Collection[Any]) -> bool:
    if fold not in FOLDS:
        raise ValueError(f"unknown fold {fold!r}; {did_you_mean(fold, FOLDS)}")
    if fold == ALWAYS and len(sets) > 1:
        raise ValueError(
            f"fold 'always': the lines have {len(sets)} sets of features, expected one"
        )
    plain = run.frozen_dtype in (None, "float32")  # else rounding would change what is folded
    return len(sets) == 1 and (fold == ALWAYS or (fold == AUTO and plain))


def _read_records(
    path: epath.Path, space: FeatureSpace | None, features: str, say: Callable[[str], None]
) -> list[tuple[dict[str, Any], Any]]:
    """(record, feature ids) of every line."""
    given = parse_features(features, space)
    records = []
    unknown: Counter[str] = Counter()
    for number, record in read_records(path):
        try:
            if not isinstance(record.get("input"), str):
                raise ValueError("expected a text in the field 'input'")
            ids: Any = []
            if space is not None:
                annotations = _annotations({**given, **record})
                ids = space.encode(annotations)
                if (ids == ABSENT).all():
                    raise ValueError(
                        f"no known feature of {', '.join(space.names)}: the adapters would be off; "
                        "name them in the line or with --features"
                    )
                unknown.update(space.unknown_types(annotations))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        records.append((dict(record), ids))
    for name, count in unknown.items():
        say(f"{count} of {len(records)} lines have an unknown {name} and run without one")
    return records


def _annotations(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line's annotations as those of a cell: every example is shared, and a cell has a name."""
    annotations = {"shared": "shared", **record}
    if "task" in record and "language" in record:
        annotations.setdefault("cell", f"{record['task']}/{record['language']}")
    return annotations


def parse_features(text: str, space: FeatureSpace | None) -> dict[str, str]:
    """Reads ``task=ner,language=sw``.

    Raises:
      ValueError: an entry of another form, an unknown type, or a value that the type has not.
    """
    features: dict[str, str] = {}
    for entry in filter(None, text.split(",")):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not value:
            raise ValueError(f"features {text!r}: {entry!r} is not of the form type=value")
        if space is None:
            raise ValueError(f"features {text!r}: the run has no adapters, hence no features")
        known = space.type(name).known_values
        if value not in known:
            raise ValueError(
                f"features {text!r}: {value!r} is no {name}; {did_you_mean(value, known)}"
            )
        features[name] = value
    return features
