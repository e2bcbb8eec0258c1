"""Predictions of a run as a submission to XTREME-UP.

The published scorer (google-research/xtreme-up, evaluation/) reads
`<submission>/{task}/{split}/{file}.jsonl`, named as the files of the data: a line for each record
there, in its order, with the field `prediction`: a text; for autocomplete a list of three guesses;
for retrieval a list of ids, the nearest first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.cells import Cell
from flix_jax.evaluation import files
from flix_jax.evaluation.batches import GUESSES
from flix_jax.experiments.run import Run
from flix_jax.tasks.xtreme_up import XtremeUp, read_records, shorten
from flix_jax.tasks.xtreme_up_languages import FILES
from flix_jax.training import best_step
from flix_jax.training.checkpoints import Step

#: The benchmark's tasks. The scorer reads no others.
TASKS = tuple(sorted(FILES))


@dataclasses.dataclass(frozen=True)
class Submission:
    """What was written.

    Attributes:
      step: the checkpoint's.
      files: the files, relative to the folder.
      missing: by cell, why it is not among them.
      other_tasks: of the run, which the benchmark does not have.
    """

    step: int
    files: tuple[str, ...]
    missing: Mapping[str, str]
    other_tasks: tuple[str, ...]


def write_submission(
    run: Run,
    run_dir: epath.PathLike,
    *,
    out_dir: epath.PathLike,
    split: str = "test",
    step: Step = None,
    partial: bool = False,
) -> Submission:
    """Writes the predictions that an evaluation of all cells left as a folder for the scorer.

    A cell counts as evaluated if its predictions are there, unaltered, one for each record of its
    file, and made by the same model as the others. Nothing is written before all are known.

    Args:
      run: whose cells.
      run_dir: its folder, with `evaluations/`.
      out_dir: local or in a bucket. It may hold other files, so that one submission can be put
        together from several runs, but none of those to be written.
      split: the split.
      step: of the evaluation; None takes the newest that has the split, 'best' the one that
        `Evaluation.keep_best` kept.
      partial: whether cells may be missing.

    Raises:
      ValueError: in one line: nothing was evaluated, cells are missing, predictions are of several
        models or of another form, files are in the way.
    """
    source = run.source
    if not isinstance(source, XtremeUp):
        raise ValueError(
            f"Run.source={type(source).__name__}: a submission needs the benchmark's own data, "
            "XtremeUp"
        )
    mixture = run.split()
    with_split = [cell for cell in mixture.cells if split in source.splits(cell)]
    if not with_split:
        having = {s for cell in mixture.cells for s in source.splits(cell)}
        raise ValueError(f"no cell has the split {split!r}; {did_you_mean(split, having)}")
    cells = [cell for cell in with_split if cell.task in TASKS]
    other_tasks = sorted({cell.task for cell in with_split} - set(TASKS))
    if not cells:
        raise ValueError(
            f"the run's tasks are not the benchmark's: {', '.join(other_tasks)} (it has "
            f"{', '.join(TASKS)})"
        )
    step, folder = _evaluation(epath.Path(run_dir), split, step)
    texts: dict[str, str] = {}
    missing: dict[str, str] = {}
    models: dict[str, str] = {}
    for cell in cells:
        name = f"{cell.task}/{split}/{cell.file}.jsonl"
        records = sum(1 for _ in read_records(epath.Path(source.data_dir) / name))
        predictions, fingerprint = _predictions(folder, cell, split, records)
        if isinstance(predictions, str):
            missing[cell.name] = predictions
            continue
        models.setdefault(fingerprint, cell.name)
        # Escaped letters are read alike in whatever encoding the scorer opens its files.
        texts[name] = "".join(json.dumps({"prediction": value}) + "\n" for value in predictions)
    if len(models) > 1:
        raise ValueError(
            f"{folder} holds predictions of several models, of {' and '.join(models.values())} for "
            f"example: run `flix evaluate --run_dir={run_dir} --split={split} --step={step}` again"
        )
    if missing and not (partial and texts):
        raise ValueError(
            f"{len(missing)} of {len(cells)} cells with the split {split!r} have no predictions "
            f"to submit in {folder}: {_by_reason(missing)}; run `flix evaluate "
            f"--run_dir={run_dir} --split={split} --step={step}`"
            + (", or give --partial" if texts else "")
        )
    out = epath.Path(out_dir)
    for name in texts:
        if (out / name).exists():
            raise ValueError(f"{out / name} exists already: remove it or give another --out")
    for name, text in texts.items():
        files.write_text(out / name, text)
    return Submission(step, tuple(texts), missing, tuple(other_tasks))


def _evaluation(run_dir: epath.Path, split: str, step: Step) -> tuple[int, epath.Path]:
    """The step, given or the newest, and the folder of its predictions."""
    if step == "best":
        step = best_step.find(run_dir)
    root = run_dir / files.EVALUATIONS
    names = [path.name for path in root.iterdir()] if root.exists() else []
    found = {
        int(name): files.evaluation_folder(run_dir, int(name), split)
        for name in names
        if name.isdigit()
    }
    steps = sorted(s for s, folder in found.items() if folder.exists() and _any_file(folder))
    again = f"run `flix evaluate --run_dir={run_dir} --split={split}` first"
    if not steps:
        raise ValueError(f"{root} holds no predictions of the split {split!r}: {again}")
    if step is not None and step not in steps:
        raise ValueError(
            f"{root} holds no predictions of the split {split!r} at step {step}, but at "
            f"{', '.join(map(str, steps))}: {again}"
        )
    step = steps[-1] if step is None else step
    return step, found[step]


def _any_file(folder: epath.Path) -> bool:
    return any(folder.glob("*.jsonl"))


def _predictions(
    folder: epath.Path, cell: Cell, split: str, records: int
) -> tuple[list[Any] | str, str]:
    """(the predictions of a cell, or why there are none; what names the model)."""
    path = files.predictions_file(folder, cell.name)
    made = files.read_object(files.scores_file(folder, cell.name))
    if made is None or not path.exists():
        return "not evaluated", ""
    if made.get("cell") != cell.name or made.get("split") != split:
        return "evaluated as another cell or split", ""
    if hashlib.sha256(path.read_bytes()).hexdigest() != made.get("predictions_sha256"):
        return "altered since its evaluation", ""
    if made.get("examples_per_cell") is not None:
        return "evaluated in part", ""
    values = []
    for line, record in read_records(path):
        try:
            values.append(_checked(cell.task, record))
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
    if len(values) != records:
        return f"{len(values)} predictions for {records} records", ""
    return values, str(made.get("fingerprint", ""))


def _checked(task: str, record: Mapping[str, Any]) -> Any:
    """The prediction of a line; ValueError where the scorer would not take it."""
    value: Any = record.get("predictions")
    if task == "autocomplete" or task.startswith("retrieval_"):
        wanted = f"a list of {GUESSES} texts" if task == "autocomplete" else "a list of ids"
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        fits = fits and (task != "autocomplete" or len(value) == GUESSES)
    else:
        wanted, fits = "a text", isinstance(value, str)
    if not fits:
        raise ValueError(f"predictions {shorten(value)}: expected {wanted} for {task}")
    return value


def _by_reason(missing: Mapping[str, str]) -> str:
    """`not evaluated: ner/sw, ner/yo; evaluated in part: ner/zu`."""
    reasons: dict[str, list[str]] = {}
    for cell, reason in missing.items():
        reasons.setdefault(reason, []).append(cell)
    return "; ".join(f"{reason}: {', '.join(cells)}" for reason, cells in reasons.items())
