"""What is known of a sweep's trials, in its folder.

sweep.json                   the sweep
trials/<name>/trial.json     state, scores and time of a trial, beside what it wrote itself
trials.jsonl                 all of these, a line each, gathered whenever a trial ends
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from flix_jax.evaluation import files
from flix_jax.evaluation.scoreboard import Scoreboard
from flix_jax.experiments.sweep import Sweep, Trial


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a trial that was run.

    Attributes:
      scores: by split.
      measures: as in TrialRecord.
      error: why it failed, by diverging; '' where it did not.
    """

    scores: Mapping[str, Scoreboard] = dataclasses.field(default_factory=dict)
    measures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """What is known of a trial: trial.json.

    Attributes:
      trial: which one.
      state: 'waiting', 'running' (or interrupted), 'finished', 'failed'.
      scores: {split: scoreboard} of a finished trial.
      seconds: what its last attempt took.
      error: why it failed.
      measures: numbers beside the scores: 'parameters' (trained ones) and 'step_seconds' (the
        median over the windows of its log).
    """

    trial: Trial
    state: str = "waiting"
    scores: Mapping[str, Scoreboard] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""
    measures: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self.trial) | {
            "state": self.state,
            "seconds": round(self.seconds, 3),
            "error": self.error,
            "measures": dict(self.measures),
            "scores": {split: board.to_json() for split, board in self.scores.items()},
        }


def read_sweep(run_dir: epath.PathLike) -> Sweep:
    """The sweep whose folder this is.

    Raises:
      ValueError: it is no sweep's.
    """
    path = epath.Path(run_dir) / "sweep.json"
    record = files.read_object(path)
    if record is None:
        raise ValueError(f"{path}: no such file; not the folder of a sweep")
    return Sweep.from_json(record)


def read_record(run_dir: epath.PathLike, trial: Trial) -> TrialRecord:
    """What a sweep's folder knows of a trial.

    Raises:
      ValueError: it knows a trial of the same name and other bindings.
    """
    path = trial_dir(run_dir, trial) / "trial.json"
    record = files.read_object(path)
    if record is None:
        return TrialRecord(trial)
    if tuple(record["bindings"]) != trial.bindings:
        raise ValueError(
            f"{path}: was run with {'; '.join(record['bindings'])}, not"
            f" {'; '.join(trial.bindings)}; choose another folder"
        )
    boards = {split: Scoreboard.from_json(board) for split, board in record["scores"].items()}
    return TrialRecord(
        trial,
        record["state"],
        boards,
        record["seconds"],
        record["error"],
        record.get("measures", {}),
    )


def shown_by(metric: str, scores: Mapping[str, Scoreboard]) -> dict[str, Scoreboard]:
    """Scores by split, with every task shown by a metric, or by its own for ''."""
    return {split: dataclasses.replace(board, metric=metric) for split, board in scores.items()}


def trial_dir(run_dir: epath.PathLike, trial: Trial) -> epath.Path:
    """The folder of a trial."""
    return epath.Path(run_dir) / "trials" / trial.name


def write_record(run_dir: epath.PathLike, record: TrialRecord) -> None:
    """Writes a trial's `trial.json`."""
    files.write_json(trial_dir(run_dir, record.trial) / "trial.json", record.to_json())


def write_summary(run_dir: epath.PathLike, records: Sequence[TrialRecord]) -> None:
    """Writes `trials.jsonl`: a line per trial."""
    lines = [json.dumps(record.to_json(), ensure_ascii=False) + "\n" for record in records]
    files.write_text(epath.Path(run_dir) / "trials.jsonl", "".join(lines))
