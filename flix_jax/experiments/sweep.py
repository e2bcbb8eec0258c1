"""Sweeps: the trials that axes and seeds span, run one after another and never twice.

A sweep knows bindings as text and never reads them: how a trial is run is given by the caller, and
how trials are run is decided here alone. Every trial has a folder of its own in
`<run_dir>/trials/`, with `trial.json` beside what the trial itself writes there.
"""

import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.evaluation import files
from flix_jax.evaluation.metrics import find_metric
from flix_jax.evaluation.scoreboard import GROUPS, Scoreboard, number

Bindings = tuple[str, ...]
Axis = Mapping[str, Bindings]

METHOD = "method"
"""The name of the axis that a sweep's methods form."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One of the methods that a sweep compares: its bindings, and axes that only it has.

    Attributes:
      bindings: such as `('features.TYPES = "task+language"',)`.
      axes: {axis: {label: bindings}}, such as a grid of learning rates of the method's own.
    """

    bindings: Bindings = ()
    axes: Mapping[str, Axis] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bindings", _as_bindings(self.bindings))
        object.__setattr__(self, "axes", _as_axes(self.axes))


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep: a label of every axis, a seed, and the bindings that the labels mean."""

    labels: Mapping[str, str]
    seed: int
    bindings: Bindings

    @property
    def name(self) -> str:
        """The trial's folder: `method=FLix,learning_rate=5e-3,seed=0`."""
        named = [*self.labels.items(), ("seed", str(self.seed))]
        return ",".join(f"{_slug(axis)}={_slug(label)}" for axis, label in named)

    def __str__(self) -> str:
        return ", ".join([*_labels_text(self.labels), f"seed {self.seed}"])


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What to vary and what to report.

    The trials are every combination of the axes' labels, for every method and every seed.

    Attributes:
      name: a sweep's folder is refused to a sweep of another name.
      axes: {axis: {label: bindings}}; the labels are what tables show.
      methods: {name: Method}, for methods that have bindings or grids of their own.
      seeds: passed to every trial; trials of one seed are compared with each other.
      metric: what tables show; '' shows each task by its own headline metric.
      group: the group of cells whose mean a choice is made by.
      choose: axes (such as a learning rate) of which the report keeps, for each method, the label
        that does best on `choose_on`.
      choose_on: the split to choose by.
      report_on: the split that the comparison shows.
      baseline: what differences are taken from, by its name in the comparison; '' is the first.
      base: names everything else a trial depends on, such as the digest of the base configuration;
        a sweep's folder is refused to a sweep of another base.
    """

    name: str
    axes: Mapping[str, Axis] = dataclasses.field(default_factory=dict)
    methods: Mapping[str, Method] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    metric: str = ""
    group: str = "seen"
    choose: tuple[str, ...] = ()
    choose_on: str = "validation"
    report_on: str = "validation"
    baseline: str = ""
    base: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", _as_axes(self.axes))
        methods = {str(name): _as_method(method) for name, method in self.methods.items()}
        object.__setattr__(self, "methods", methods)
        object.__setattr__(self, "seeds", tuple(self.seeds))
        chosen = (self.choose,) if isinstance(self.choose, str) else tuple(self.choose)
        object.__setattr__(self, "choose", chosen)
        if not self.name:
            raise ValueError("a sweep needs a name, got ''")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"sweep {self.name!r}: expected distinct seeds, got {self.seeds}")
        if self.metric:
            find_metric(self.metric)
        self._check_known("group", self.group, GROUPS)
        all_axes = [*self.axes, *(axis for m in self.methods.values() for axis in m.axes)]
        for axis in self.choose:
            self._check_known("axis to choose", axis, all_axes)
        for method, settings in self.methods.items():
            for axis in settings.axes:
                if axis in self.axes:
                    raise ValueError(
                        f"sweep {self.name!r}: axis {axis!r} is both the sweep's and {method!r}'s"
                    )
        if METHOD in all_axes:
            raise ValueError(f"sweep {self.name!r}: no axis may be called {METHOD!r}")
        for trial_name, same in itertools.groupby(sorted(t.name for t in self.trials())):
            if len(list(same)) > 1:
                raise ValueError(
                    f"sweep {self.name!r}: labels that differ in punctuation only would share the"
                    f" folder {trial_name!r}"
                )
        if self.baseline:
            self._check_known("baseline", self.baseline, self.variants())

    def trials(self) -> tuple[Trial, ...]:
        """All trials; seeds vary slowest, so that what is done first compares everything once."""
        settings: list[tuple[dict[str, str], Bindings]] = []
        for method, own in self.methods.items() or [("", Method())]:
            axes = {**self.axes, **own.axes}
            for labels in itertools.product(*axes.values()):
                named = dict(zip(axes, labels, strict=True))
                bound = {f"method {method!r}": own.bindings} if method else {}
                bound |= {f"axis {axis!r}": axes[axis][label] for axis, label in named.items()}
                self._check_bindings(bound)
                settings.append(
                    (
                        {METHOD: method, **named} if method else named,
                        tuple(itertools.chain.from_iterable(bound.values())),
                    )
                )
        return tuple(
            Trial(labels, seed, bindings) for seed in self.seeds for labels, bindings in settings
        )

    def variant(self, labels: Mapping[str, str]) -> str:
        """What the comparison calls trials of these labels: all of them but the chosen axes'."""
        kept = {axis: label for axis, label in labels.items() if axis not in self.choose}
        return ", ".join(_labels_text(kept)) or self.name

    def variants(self) -> tuple[str, ...]:
        """The rows of the comparison."""
        return tuple(dict.fromkeys(self.variant(trial.labels) for trial in self.trials()))

    def to_json(self) -> dict[str, Any]:
        """What sweep.json holds; `from_json` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Sweep":
        """The sweep that `to_json` wrote."""
        return cls(**record)

    def _check_known(self, what: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"sweep {self.name!r}: unknown {what} {name!r}; {hint}")

    def _check_bindings(self, bound: Mapping[str, Bindings]) -> None:
        owners: dict[str, str] = {}
        for owner, bindings in bound.items():
            for binding in bindings:
                parameter, equals, value = (part.strip() for part in binding.partition("="))
                if not (parameter and equals and value):
                    raise ValueError(
                        f"sweep {self.name!r}: {owner}: {binding!r} is not 'parameter = value'"
                    )
                if owners.setdefault(parameter, owner) != owner:
                    raise ValueError(
                        f"sweep {self.name!r}: {parameter} is set by {owners[parameter]} and by"
                        f" {owner}"
                    )


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


RunTrial = Callable[[Bindings, epath.Path, int], Mapping[str, Scoreboard]]
"""(bindings, folder of the trial, seed) -> {split: scoreboard}. It may find its folder with what
an interrupted attempt left there. FloatingPointError says that the trial has diverged."""


def run_sweep(
    sweep: Sweep,
    run_dir: epath.PathLike,
    run_trial: RunTrial,
    *,
    log: Callable[[str], None] = print,
) -> tuple[TrialRecord, ...]:
    """Runs the trials that are not finished yet, one after another.

    A sweep that was interrupted goes on; one to which labels or seeds were added runs the new
    trials only. A trial that diverges is recorded as failed and the others go on; any other error
    is recorded and raised, for the next trial would most likely meet it too. Failed trials are run
    again when the sweep is.

    Args:
      sweep: what to run.
      run_dir: its folder, local or in a bucket.
      run_trial: runs one trial and returns its scoreboards.
      log: takes progress, a line at a time.

    Returns:
      A record of every trial of the sweep, in the order of `sweep.trials()`.

    Raises:
      ValueError: the folder holds another sweep; a trial has no scores for the splits that the
        sweep chooses by and reports.
    """
    run_dir = epath.Path(run_dir)
    _claim_folder(sweep, run_dir)
    records = [read_record(run_dir, trial) for trial in sweep.trials()]
    waiting = [place for place, record in enumerate(records) if record.state != "finished"]
    if len(waiting) < len(records):
        log(f"{len(records) - len(waiting)} of {len(records)} trials are finished already")
    spent = 0.0
    for done, place in enumerate(waiting):
        trial = records[place].trial
        title = f"trial {place + 1} of {len(records)}"
        log(f"{title}: {trial}")
        record = records[place] = _run(sweep, trial, run_dir, run_trial)
        spent += record.seconds
        left = (len(waiting) - done - 1) * spent / (done + 1)
        more = f"; about {_duration(left)} left" if left else ""
        log(f"{title}: {_outcome(sweep, record)} in {_duration(record.seconds)}{more}")
    return tuple(records)


def read_sweep(run_dir: epath.PathLike) -> Sweep:
    """The sweep whose folder this is.

    Raises:
      ValueError: it is no sweep's.
    """
    path = epath.Path(run_dir) / "sweep.json"
    record = files.read_json(path)
    if record is None:
        raise ValueError(f"{path}: no such file; not the folder of a sweep")
    return Sweep.from_json(record)


def read_record(run_dir: epath.PathLike, trial: Trial) -> TrialRecord:
    """What a sweep's folder knows of a trial.

    Raises:
      ValueError: it knows a trial of the same name and other bindings.
    """
    path = _trial_dir(run_dir, trial) / "trial.json"
    record = files.read_json(path)
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


def _run(sweep: Sweep, trial: Trial, run_dir: epath.Path, run_trial: RunTrial) -> TrialRecord:
    folder = _trial_dir(run_dir, trial)
    started = time.monotonic()

    def keep(state: str, scores: Mapping[str, Scoreboard], error: str = "") -> TrialRecord:
        record = TrialRecord(trial, state, scores, time.monotonic() - started, error)
        files.write_json(folder / "trial.json", record.to_json())
        return record

    keep("running", {})
    try:
        scores = {
            split: dataclasses.replace(board, metric=sweep.metric)
            for split, board in run_trial(trial.bindings, folder, trial.seed).items()
        }
        _check_scores(sweep, trial, scores)
    except FloatingPointError as error:
        return keep("failed", {}, str(error) or "diverged")
    except Exception as error:
        keep("failed", {}, f"{type(error).__name__}: {error}")
        raise
    return keep("finished", scores)


def _check_scores(sweep: Sweep, trial: Trial, scores: Mapping[str, Scoreboard]) -> None:
    for split in {sweep.report_on, *([sweep.choose_on] if sweep.choose else [])}:
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
    record = files.read_json(run_dir / "sweep.json")
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


def _trial_dir(run_dir: epath.PathLike, trial: Trial) -> epath.Path:
    return epath.Path(run_dir) / "trials" / trial.name


def _labels_text(labels: Mapping[str, str]) -> list[str]:
    return [label if axis == METHOD else f"{axis} {label}" for axis, label in labels.items()]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _as_bindings(bindings: Any) -> Bindings:
    return (bindings,) if isinstance(bindings, str) else tuple(bindings)


def _as_axes(axes: Mapping[str, Mapping[Any, Any]]) -> dict[str, dict[str, Bindings]]:
    for axis, labels in axes.items():
        if not isinstance(labels, Mapping) or not labels:
            raise ValueError(
                f"sweep axis {axis!r}: expected {{label: bindings}} with at least one label, got"
                f" {labels!r}"
            )
    return {
        axis: {str(label): _as_bindings(bindings) for label, bindings in labels.items()}
        for axis, labels in axes.items()
    }


def _as_method(method: Any) -> Method:
    if isinstance(method, Method):
        return method
    return Method(**method) if isinstance(method, Mapping) else Method(_as_bindings(method))
