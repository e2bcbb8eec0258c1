"""From the scores of cells to tables: language × task, and means of seen and unseen cells.

A `Scoreboard` is one model's; `comparison.Comparison` sets several side by side over seeds.
"""

import csv
import dataclasses
import functools
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from flix_jax.adapters import text_tables
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.evaluation import files
from flix_jax.evaluation.bootstrap import check_confidence, percentile_interval
from flix_jax.evaluation.metrics import METRICS, Metric, find_metric

GROUPS: Mapping[str, str] = {
    "seen": "seen cells",
    "unseen": "unseen cells",
    "unseen_language": "unseen language",
}
"""Groups of cells and their titles: trained on; held out, with a language that other cells train;
held out together with every cell of its language."""

UNDER_REPRESENTED = "under_represented"
MEANS: Mapping[str, str] = {**GROUPS, UNDER_REPRESENTED: "under-represented"}
"""All means and their titles: those of the groups, and that of the languages that a benchmark's own
score of a task averages over, seen or not."""

ALL_TASKS = "all tasks"
MISSING = "–"
_MARKS = {"seen": "", "unseen": " †", "unseen_language": " ‡"}


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Bootstrap intervals (low, high) of a scoreboard's numbers.

    Attributes:
      confidence: the share of the resampled scores inside.
      cells: by cell, of its headline metric.
      means: by name of the mean and by task, or 'all tasks'.
    """

    confidence: float
    cells: Mapping[str, tuple[float, float]]
    means: Mapping[str, Mapping[str, tuple[float, float]]]

    def __post_init__(self) -> None:
        check_confidence(self.confidence)

    @property
    def title(self) -> str:
        """`95 %`, as tables show it."""
        return f"{100 * self.confidence:g} %"


@dataclasses.dataclass(frozen=True)
class Scoreboard:
    """The scores of one model on the cells of one split.

    Attributes:
      scores: {cell name: {metric: value, 'examples': n}} as an evaluator returns them; a cell with
        'examples' of 0 was asked for and not evaluated.
      groups: {cell name: 'seen' | 'unseen' | 'unseen_language'}, for every cell of `scores`.
      metric: the metric every task is shown by; '' shows each task by its own headline metric.
      under_represented: {cell name: whether the benchmark's score of its task averages over it};
        without the cells that the benchmark does not have.
      benchmark_sizes: {task: over how many cells the benchmark's score of it averages}, for every
        task of an under-represented cell.
      intervals: as `with_intervals` makes them; None without.
    """

    scores: Mapping[str, Mapping[str, float]]
    groups: Mapping[str, str]
    metric: str = ""
    under_represented: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    benchmark_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    intervals: Intervals | None = None

    def __post_init__(self) -> None:
        if not self.scores:
            raise ValueError("a scoreboard needs the scores of at least one cell, got none")
        if self.metric:
            find_metric(self.metric)
        for cell in self.scores:
            task, slash, language = cell.partition("/")
            if not (task and slash and language):
                raise ValueError(f"cell name {cell!r}: expected task/language, such as 'ner/sw'")
            group = self.groups.get(cell)
            if group not in GROUPS:
                raise ValueError(
                    f"cell {cell!r} is of group {group!r}; expected one of {', '.join(GROUPS)}"
                )
            if self._evaluated(cell) and self.headline(task).name not in self.scores[cell]:
                raise ValueError(
                    f"cell {cell!r} has no {self.headline(task).name!r}, only"
                    f" {', '.join(self.scores[cell])}"
                )
        for task in self.tasks:
            marked = [c for c in self.scores if _task(c) == task and self.under_represented.get(c)]
            if len(marked) > self.benchmark_sizes.get(task, 0):
                raise ValueError(
                    f"task {task!r} has {len(marked)} under-represented cells, more than the "
                    f"{self.benchmark_sizes.get(task, 0)} of the benchmark"
                )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the order in which they first occur."""
        return tuple(dict.fromkeys(_task(cell) for cell in self.scores))

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages (with the variant, where a cell has one), sorted."""
        return tuple(sorted({_language(cell) for cell in self.scores}))

    @property
    def present_groups(self) -> tuple[str, ...]:
        """The groups that have an evaluated cell."""
        found = {self.groups[cell] for cell in self.scores if self._evaluated(cell)}
        return tuple(group for group in GROUPS if group in found)

    @property
    def present_means(self) -> tuple[str, ...]:
        """The names of `MEANS` that have an evaluated cell."""
        evaluated = any(self.under_represented.get(cell) for cell in self._values)
        return (*self.present_groups, *([UNDER_REPRESENTED] if evaluated else []))

    def headline(self, task: str) -> Metric:
        """The metric a task is shown by: `metric`, else the first that its cells were scored by."""
        if self.metric:
            return METRICS[self.metric]
        if task not in self._headlines:
            raise ValueError(f"no scores of a task {task!r}; {did_you_mean(task, self.tasks)}")
        return self._headlines[task]

    def coverage(self, task: str) -> tuple[int, int] | None:
        """Of the cells that the benchmark's score of a task averages over: (evaluated here, all).

        None for a task that has no such score.
        """
        if task not in self.benchmark_sizes:
            return None
        here = [c for c in self._values if _task(c) == task and self.under_represented.get(c)]
        return len(here), self.benchmark_sizes[task]

    def value(self, cell: str) -> float | None:
        """The headline metric of a cell; None where the cell was not evaluated."""
        if cell not in self.scores or not self._evaluated(cell):
            return None
        return float(self.scores[cell][self.headline(_task(cell)).name])

    def mean(self, name: str, task: str | None = None) -> float | None:
        """A mean over cells, by its name in `MEANS`.

        Of one task: the mean over languages of its headline metric, where several files of one
        language count as one; over 'under_represented' cells every file counts, as in the
        benchmark's score of a task, which this is if all of them are there (`coverage`). Of all
        tasks (`task=None`): the mean over the tasks that have such cells, every task weighing the
        same and error rates turned into `100 - rate`. None where no such cell was evaluated.
        """
        mean = self._mean(name, task, self._values)
        return None if mean is None else float(mean)

    def named(self) -> dict[str, float]:
        """Every number by a name of its own, higher as better: an error rate as `100 - rate`.

        Over tasks `mean_seen`, `mean_unseen`, `mean_unseen_language`, `mean_under_represented`; of
        a task `ner/mean_seen` and so on; of a cell `ner/sw`, its headline metric, and
        `ner/sw:exact_match`. Without what was not evaluated.
        """
        found: dict[str, float] = {}
        for name in self.present_means:
            for task in (None, *self.tasks):
                mean = self.mean(name, task)
                if mean is not None:
                    prefix = "" if task is None else f"{task}/"
                    metric = None if task is None else self.headline(task)
                    found[f"{prefix}mean_{name}"] = metric.utility(mean) if metric else mean
        for cell, value in self._values.items():
            for name, score in self.scores[cell].items():
                if name in METRICS:
                    found[f"{cell}:{name}"] = METRICS[name].utility(float(score))
            found[cell] = self.headline(_task(cell)).utility(value)
        return found

    def with_intervals(
        self, resampled: Mapping[str, np.ndarray], confidence: float = 0.95
    ) -> "Scoreboard":
        """The same board with bootstrap intervals of its cells and means.

        The resamples of a mean are the means of its cells' resamples, position by position, so
        cells must have been resampled independently of each other.

        Args:
          resampled: by cell, scores [resamples] of its headline metric (`bootstrap.resample`), for
            every evaluated cell and equally many for each.
          confidence: the share of the resampled scores inside, between 0 and 1.

        Raises:
          ValueError: a cell has no resampled scores; an impossible confidence.
        """
        absent = [cell for cell in self._values if cell not in resampled]
        if absent:
            raise ValueError(f"no resampled scores of {', '.join(absent)}")
        means: dict[str, dict[str, tuple[float, float]]] = {}
        for name in self.present_means:
            for task in (None, *self.tasks):
                scores = self._mean(name, task, resampled)
                if scores is not None:
                    interval = percentile_interval(scores, confidence)
                    means.setdefault(name, {})[task or ALL_TASKS] = interval
        cells = {cell: percentile_interval(resampled[cell], confidence) for cell in self._values}
        return dataclasses.replace(self, intervals=Intervals(confidence, cells, means))

    def to_json(self) -> dict[str, Any]:
        """What scores.json holds; `from_json` reads it. The means are there for other readers."""
        record: dict[str, Any] = {
            "metric": self.metric,
            "cells": {
                cell: {"group": self.groups[cell], **scores} for cell, scores in self.scores.items()
            },
            "means": {
                name: {ALL_TASKS: self.mean(name)}
                | {task: mean for task in self.tasks if (mean := self.mean(name, task)) is not None}
                for name in self.present_means
            },
        }
        if self.benchmark_sizes:
            record["under_represented"] = {
                "cells": dict(self.under_represented),
                "evaluated": {
                    task: found[0] for task in self.tasks if (found := self.coverage(task))
                },
                "of": dict(self.benchmark_sizes),
            }
        if self.intervals is not None:
            record["intervals"] = dataclasses.asdict(self.intervals)
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Scoreboard":
        """The scoreboard that `to_json` wrote.

        Raises:
          ValueError: the record is of another kind.
        """
        if not isinstance(record, Mapping) or not isinstance(record.get("cells"), Mapping):
            raise ValueError(f"not a scoreboard: {json.dumps(record)[:80]}")
        groups = {cell: scores.get("group", "") for cell, scores in record["cells"].items()}
        scores = {
            cell: {name: value for name, value in scores.items() if name != "group"}
            for cell, scores in record["cells"].items()
        }
        benchmark = record.get("under_represented", {})
        return cls(
            scores,
            groups,
            record.get("metric", ""),
            benchmark.get("cells", {}),
            benchmark.get("of", {}),
            _intervals(record.get("intervals")),
        )

    def to_markdown(self) -> str:
        """Two tables: means per group and task, then language × task."""
        titles = [f"{task} ({_title(self.headline(task))})" for task in self.tasks]
        means = [
            [MEANS[name], *self._mean_entries(name, None)]
            + [entry for task in self.tasks for entry in self._mean_entries(name, task)]
            for name in self.present_means
        ]
        cells = [
            [language]
            + [entry for task in self.tasks for entry in self._entries(f"{task}/{language}")]
            for language in self.languages
        ]
        parts = [
            text_tables.markdown([["mean", *self._columns([ALL_TASKS, *titles])], *means]),
            text_tables.markdown([["language", *self._columns(titles)], *cells]),
        ]
        used = {self.groups[cell] for cell in self.scores}
        legend = [f"{_MARKS[g].strip()} {GROUPS[g]}" for g in GROUPS if _MARKS[g] and g in used]
        if any(not self.headline(task).higher_is_better for task in self.tasks):
            legend.append("↓ lower is better; the mean of all tasks counts 100 − rate")
        if UNDER_REPRESENTED in self.present_means:
            legend.append(
                "n of m: of the m languages (files, where one has several) that the benchmark's "
                "score of the task averages over, the mean is over n"
            )
        if self.intervals is not None:
            legend.append(f"{self.intervals.title}: bootstrap interval over each cell's examples")
        if legend:
            parts.append("; ".join(legend) + ".")
        absent = [cell for cell in self.scores if not self._evaluated(cell)]
        if absent:
            parts.append(f"Not evaluated, without examples: {', '.join(absent)}.")
        return "\n\n".join(parts) + "\n"

    def to_csv(self) -> str:
        """A line per cell and metric, then, without a cell, a line per mean."""
        header = ["cell", "task", "language", "group", "examples", "metric", "value"]
        header += ["under_represented", "languages", "of"] if self.benchmark_sizes else []
        header += ["low", "high"] if self.intervals is not None else []
        rows: list[dict[str, Any]] = []
        row: dict[str, Any]
        for cell, scores in self.scores.items():
            row = {"cell": cell, "task": _task(cell), "language": _language(cell)}
            row |= {"group": self.groups[cell], "examples": scores["examples"]}
            row |= {"under_represented": self.under_represented.get(cell)}
            for metric, value in scores.items():
                if metric != "examples":
                    headline = metric == self.headline(_task(cell)).name
                    bounds = self._bounds("cells", cell) if headline else {}
                    rows.append(row | {"metric": metric, "value": value} | bounds)
        for name in self.present_means:
            for task in (None, *self.tasks):
                if (mean := self.mean(name, task)) is None:
                    continue
                row = {"task": task or ALL_TASKS, "group": name, "value": mean}
                row |= {"metric": self.headline(task).name} if task else {}
                if name == UNDER_REPRESENTED and task and (covered := self.coverage(task)):
                    row |= {"languages": covered[0], "of": covered[1]}
                rows.append(row | self._bounds(name, task or ALL_TASKS))
        return csv_text(header, ([row.get(name) for name in header] for row in rows))

    def write(self, folder: epath.PathLike, made: Mapping[str, Any] | None = None) -> None:
        """Writes scores.md, scores.json and scores.csv into a folder.

        Args:
          folder: local or in a bucket.
          made: what else scores.json is to tell: of which step, of which split.
        """
        folder = epath.Path(folder)
        files.write_text(folder / "scores.md", self.to_markdown())
        files.write_json(folder / "scores.json", {**(made or {}), **self.to_json()})
        files.write_text(folder / "scores.csv", self.to_csv())

    @functools.cached_property
    def _headlines(self) -> dict[str, Metric]:
        measured: dict[str, Metric] = {}
        for cell, scores in self.scores.items():
            for name in scores:
                if name in METRICS:
                    measured.setdefault(_task(cell), METRICS[name])
        return {task: measured.get(task, METRICS["exact_match"]) for task in self.tasks}

    @functools.cached_property
    def _values(self) -> dict[str, float]:
        """The headline metrics of the cells that were evaluated."""
        values = {cell: self.value(cell) for cell in self.scores}
        return {cell: value for cell, value in values.items() if value is not None}

    def _mean(self, name: str, task: str | None, values: Mapping[str, Any]) -> Any:
        """`mean` of these values of the cells: a number each, or an array [resamples] each."""
        if task is None:
            means = {name_of: self._mean(name, name_of, values) for name_of in self.tasks}
            return _mean(
                self.headline(name_of).utility(mean)
                for name_of, mean in means.items()
                if mean is not None
            )
        of_task = {cell: value for cell, value in values.items() if _task(cell) == task}
        if name == UNDER_REPRESENTED:
            return _mean(v for cell, v in of_task.items() if self.under_represented.get(cell))
        by_language: dict[str, list[Any]] = {}
        for cell, value in of_task.items():
            if self.groups[cell] == name:
                by_language.setdefault(_language(cell).partition(":")[0], []).append(value)
        return _mean(_mean(of_one) for of_one in by_language.values())

    def _evaluated(self, cell: str) -> bool:
        return self.scores[cell].get("examples", 0) > 0

    def _bounds(self, of: str, name: str) -> dict[str, float]:
        """{'low', 'high'} of a cell (`of='cells'`) or of the mean `of`; empty without intervals."""
        if self.intervals is None:
            return {}
        found = self.intervals.cells if of == "cells" else self.intervals.means.get(of, {})
        return dict(zip(("low", "high"), found[name], strict=True)) if name in found else {}

    def _columns(self, titles: Sequence[str]) -> list[str]:
        beside = [] if self.intervals is None else [self.intervals.title]
        return [column for title in titles for column in (title, *beside)]

    def _beside(self, of: str, name: str) -> list[str]:
        """The entry in the column of intervals, where there is one."""
        bounds = self._bounds(of, name)
        shown = f"[{bounds['low']:.1f}, {bounds['high']:.1f}]" if bounds else ""
        return [] if self.intervals is None else [shown]

    def _mean_entries(self, name: str, task: str | None) -> list[str]:
        entry = number(self.mean(name, task))
        if name == UNDER_REPRESENTED:
            if task is None:
                count = sum(self.mean(name, task) is not None for task in self.tasks)
                entry += f" ({count} task{'s' if count > 1 else ''})"
            elif covered := self.coverage(task):
                entry += f" ({covered[0]} of {covered[1]})"
        return [entry, *self._beside(name, task or ALL_TASKS)]

    def _entries(self, cell: str) -> list[str]:
        entry = ""
        if cell in self.scores:
            entry = number(self.value(cell)) + _MARKS[self.groups[cell]]
        return [entry, *self._beside("cells", cell)]


def _intervals(record: Mapping[str, Any] | None) -> Intervals | None:
    if record is None:
        return None
    pair = {cell: (low, high) for cell, (low, high) in record["cells"].items()}
    means = {
        name: {task: (low, high) for task, (low, high) in of_tasks.items()}
        for name, of_tasks in record["means"].items()
    }
    return Intervals(record["confidence"], pair, means)


def read_scores(folder: epath.PathLike) -> Scoreboard:
    """The scoreboard in a folder's scores.json.

    Raises:
      ValueError: there is none, or it is none.
    """
    path = epath.Path(folder) / "scores.json"
    record = files.read_object(path)
    if record is None:
        raise ValueError(f"{path}: no such file; evaluate the run first")
    try:
        return Scoreboard.from_json(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def number(value: float | None) -> str:
    """A score as tables show it."""
    return MISSING if value is None else f"{value:.1f}"


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated values with `\\n` line ends; None is an empty field."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([header, *rows])
    return buffer.getvalue()


def _task(cell: str) -> str:
    return cell.partition("/")[0]


def _language(cell: str) -> str:
    return cell.partition("/")[2]


def _title(metric: Metric) -> str:
    return metric.title if metric.higher_is_better else f"{metric.title} ↓"


def _mean(values: Iterable[Any]) -> Any:
    """The mean of numbers, or of arrays position by position; None of nothing."""
    collected = list(values)
    return np.mean(collected, axis=0) if collected else None
