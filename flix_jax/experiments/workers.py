"""Running a sweep: its trials, never twice, alone or beside other workers on the same folder."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from etils import epath

from flix_jax import buckets
from flix_jax.evaluation import files
from flix_jax.evaluation.scoreboard import GROUPS, Scoreboard, number
from flix_jax.experiments.claims import Claims
from flix_jax.experiments.sweep import Bindings, Sweep, Trial
from flix_jax.experiments.trial_records import (
    Outcome,
    TrialRecord,
    read_record,
    shown_by,
    trial_dir,
    write_record,
    write_summary,
)

Assignment = tuple[Bindings, epath.Path, int]
RunTrials = Callable[[Sequence[Assignment]], Sequence[Outcome]]
"""[(bindings, folder of the trial, seed)] of trials that may share a program -> their outcomes. It
may find the folders with what an interrupted attempt left there. FloatingPointError says that all
of them have diverged."""


def run_sweep(
    sweep: Sweep,
    run_dir: epath.PathLike,
    run_trials: RunTrials,
    *,
    programs: Sequence[Sequence[int]] | None = None,
    worker: tuple[int, int] = (1, 1),
    log: Callable[[str], None] = print,
    poll: float = 2.0,
) -> tuple[TrialRecord, ...]:
    """Runs the trials that are not finished yet, and returns when all are.

    A sweep that was interrupted goes on; one to which labels or seeds were added runs the new
    trials only. A trial that diverges is recorded as failed and the others go on; any other error
    is recorded and raised, for the next trial would most likely meet it too. Trials that had failed
    before are run again.

    Any number of workers may run on one folder: each takes what no other has claimed, and waits in
    the end for what others still run.

    Args:
      sweep: what to run.
      run_dir: its folder, local or in a bucket.
      run_trials: runs trials together.
      programs: which trials, by their places in `sweep.trials()`, run together; None is each by
        itself.
      worker: (i, n), from 1: worker i of n begins with its share of the programs.
      log: takes progress, a line at a time.
      poll: seconds between two looks for trials that have become free.

    Returns:
      A record of every trial of the sweep, in the order of `sweep.trials()`.

    Raises:
      ValueError: the folder holds another sweep; a trial has no scores for the splits that the
        sweep chooses by and reports.
    """
    run_dir = epath.Path(run_dir)
    buckets.check_writable(run_dir)
    _claim_folder(sweep, run_dir)
    trials = sweep.trials()
    units = [tuple(unit) for unit in programs or [(place,) for place in range(len(trials))]]

    def read() -> list[TrialRecord]:
        return [read_record(run_dir, trial) for trial in trials]

    records = read()
    done = sum(record.state == "finished" for record in records)
    if done:
        log(f"{done} of {len(records)} trials are finished already")
    again = {place for place, record in enumerate(records) if record.state == "failed"}
    spent, ran = 0.0, 0

    def waiting(place: int) -> bool:
        record = read_record(run_dir, trials[place])
        return record.state != "finished" and (record.state != "failed" or place in again)

    with Claims() as claims:
        while True:
            progress = False
            for unit in _own_share_first(units, worker):
                folders = {place: trial_dir(run_dir, trials[place]) for place in unit}
                open_ = [place for place in unit if waiting(place)]
                mine = [place for place in open_ if claims.take(folders[place])]
                free = [place for place in mine if not waiting(place)]
                for place in free:  # another has finished it meanwhile
                    claims.give_back(folders[place])
                mine = [place for place in mine if place not in free]
                if not mine:
                    continue
                progress = True
                title = _title(mine, len(trials))
                log(f"{title}: {'; '.join(str(trials[place]) for place in mine)}")
                again -= set(mine)
                try:
                    found = _run(sweep, [trials[p] for p in mine], run_dir, run_trials)
                finally:
                    for place in mine:
                        claims.give_back(folders[place])
                records = read()
                write_summary(run_dir, records)
                spent, ran = spent + found[0].seconds, ran + len(mine)
                left = sum(record.state in ("waiting", "running") for record in records)
                more = f"; about {duration(left * spent / ran)} left" if left else ""
                for record in found:
                    log(f"{record.trial}: {_outcome(sweep, record)}")
                log(f"{title}: {duration(found[0].seconds)}{more}")
            held = [place for place in range(len(trials)) if waiting(place)]
            if not held:
                break
            if not progress:
                holders = {claims.holder(trial_dir(run_dir, trials[place])) for place in held}
                names = ", ".join(sorted(filter(None, holders)))
                if names:
                    log(f"waiting for {len(held)} trials that are run by {names}")
                time.sleep(poll)
    records = read()
    write_summary(run_dir, records)
    return tuple(records)


def _own_share_first(
    units: Sequence[tuple[int, ...]], worker: tuple[int, int]
) -> Iterator[tuple[int, ...]]:
    index, count = worker
    yield from (unit for place, unit in enumerate(units) if place % count == index - 1)
    yield from (unit for place, unit in enumerate(units) if place % count != index - 1)


def _title(places: Sequence[int], count: int) -> str:
    if len(places) == 1:
        return f"trial {places[0] + 1} of {count}"
    return f"{len(places)} of {count} trials as one program"


def _run(
    sweep: Sweep, trials: Sequence[Trial], run_dir: epath.Path, run_trials: RunTrials
) -> list[TrialRecord]:
    started = time.monotonic()

    def keep(trial: Trial, state: str, outcome: Outcome | None = None) -> TrialRecord:
        outcome = outcome or Outcome()
        record = TrialRecord(
            trial,
            state,
            outcome.scores,
            time.monotonic() - started,
            outcome.error,
            outcome.measures,
        )
        write_record(run_dir, record)
        return record

    for trial in trials:
        keep(trial, "running")
    try:
        outcomes = run_trials(
            [(trial.bindings, trial_dir(run_dir, trial), trial.seed) for trial in trials]
        )
        outcomes = [
            dataclasses.replace(outcome, scores=shown_by(sweep.metric, outcome.scores))
            for outcome in outcomes
        ]
        for trial, outcome in zip(trials, outcomes, strict=True):
            if not outcome.error:
                _check_scores(sweep, trial, outcome.scores)
    except FloatingPointError as error:
        failure = Outcome(error=str(error) or "diverged")
        return [keep(trial, "failed", failure) for trial in trials]
    except Exception as error:
        for trial in trials:
            keep(trial, "failed", Outcome(error=f"{type(error).__name__}: {error}"))
        raise
    return [
        keep(trial, "failed" if outcome.error else "finished", outcome)
        for trial, outcome in zip(trials, outcomes, strict=True)
    ]


def _check_scores(sweep: Sweep, trial: Trial, scores: Mapping[str, Scoreboard]) -> None:
    for split in sweep.splits:
        if split not in scores:
            raise ValueError(
                f"sweep {sweep.name!r}: trial {trial} has no scores of {split!r}, only of"
                f" {', '.join(scores) or 'nothing'}"
            )
    if sweep.choose and scores[sweep.choose_on].mean(sweep.group) is None:
        raise ValueError(
            f"sweep {sweep.name!r}: cannot choose by {GROUPS[sweep.group]}, of which trial {trial}"
            f" evaluated none on {sweep.choose_on!r}"
        )


def _claim_folder(sweep: Sweep, run_dir: epath.Path) -> None:
    record = files.read_object(run_dir / "sweep.json")
    if record is not None:
        for field in ("name", "base"):
            if record.get(field) != getattr(sweep, field):
                raise ValueError(
                    f"{run_dir}: holds a sweep of {field} {record.get(field)!r}, not"
                    f" {getattr(sweep, field)!r}; choose another folder"
                )
    for trial in sweep.trials():
        read_record(run_dir, trial)
    files.write_json(run_dir / "sweep.json", sweep.to_json())


def _outcome(sweep: Sweep, record: TrialRecord) -> str:
    if record.state != "finished":
        return f"{record.state} ({record.error})"
    board = record.scores[sweep.report_on]
    means = [f"{number(board.mean(group))} on {GROUPS[group]}" for group in board.present_groups]
    return f"{', '.join(means)} ({sweep.report_on})"


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
