"""From the scores of cells to tables: language × task, and means of seen and unseen cells.

A `Scoreboard` is one model's; `comparison.Comparison` sets several side by side over seeds.
"""

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.evaluation import files
from flix_jax.evaluation.metrics import METRICS, Metric, find_metric

GROUPS: Mapping[str, str] = {
    "seen": "seen cells",
    "unseen": "unseen cells",
    "unseen_language": "unseen language",
}
"""Groups of cells and their titles: trained on; held out, with a language that other cells train;
held out together with every cell of its language."""

MISSING = "–"
_MARKS = {"seen": "", "unseen": " †", "unseen_language": " ‡"}


@dataclasses.dataclass(frozen=True)
class Scoreboard:
    """The scores of one model on the cells of one split.

    Attributes:
      scores: {cell name: {metric: value, 'examples': n}} as an evaluator returns them; a cell with
        'examples' of 0 was asked for and not evaluated.
      groups: {cell name: 'seen' | 'unseen' | 'unseen_language'}, for every cell of `scores`.
      metric: the metric every task is shown by; '' shows each task by its own headline metric.
    """

    scores: Mapping[str, Mapping[str, float]]
    groups: Mapping[str, str]
    metric: str = ""

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

    def headline(self, task: str) -> Metric:
        """The metric a task is shown by: `metric`, else the first that its cells were scored by."""
        if self.metric:
            return METRICS[self.metric]
        cells = [cell for cell in self.scores if _task(cell) == task]
        if not cells:
            raise ValueError(f"no scores of a task {task!r}; {did_you_mean(task, self.tasks)}")
        measured = (name for cell in cells for name in self.scores[cell] if name in METRICS)
        return METRICS[next(measured, "exact_match")]

    def value(self, cell: str) -> float | None:
        """The headline metric of a cell; None where the cell was not evaluated."""
        if cell not in self.scores or not self._evaluated(cell):
            return None
        return float(self.scores[cell][self.headline(_task(cell)).name])

    def mean(self, group: str, task: str | None = None) -> float | None:
        """The mean over the cells of a group.

        Of one task: the mean over languages of its headline metric (several files of one language
        count as one). Of all tasks (`task=None`): the mean over the tasks that have cells in the
        group, every task weighing the same and error rates turned into `100 - rate`. None where
        the group has no evaluated cell.
        """
        if task is None:
            means = {name: self.mean(group, name) for name in self.tasks}
            return _mean(
                self.headline(name).utility(mean)
                for name, mean in means.items()
                if mean is not None
            )
        by_language: dict[str, list[float]] = {}
        for cell in self.scores:
            value = self.value(cell)
            if _task(cell) == task and self.groups[cell] == group and value is not None:
                by_language.setdefault(_language(cell).partition(":")[0], []).append(value)
        return _mean(statistics.fmean(values) for values in by_language.values())

    def to_json(self) -> dict[str, Any]:
        """What scores.json holds; `from_json` reads it. The means are there for other readers."""
        return {
            "metric": self.metric,
            "cells": {
                cell: {"group": self.groups[cell], **scores} for cell, scores in self.scores.items()
            },
            "means": {
                group: {"all tasks": self.mean(group)}
                | {
                    task: mean
                    for task in self.tasks
                    if (mean := self.mean(group, task)) is not None
                }
                for group in self.present_groups
            },
        }

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
        return cls(scores, groups, record.get("metric", ""))

    def to_markdown(self) -> str:
        """Two tables: means per group and task, then language × task."""
        titles = [f"{task} ({_title(self.headline(task))})" for task in self.tasks]
        means = [
            [GROUPS[group], number(self.mean(group))]
            + [number(self.mean(group, task)) for task in self.tasks]
            for group in self.present_groups
        ]
        cells = [
            [language] + [self._entry(f"{task}/{language}") for task in self.tasks]
            for language in self.languages
        ]
        parts = [
            table(["mean", "all tasks", *titles], means),
            table(["language", *titles], cells),
        ]
        used = {self.groups[cell] for cell in self.scores}
        legend = [f"{_MARKS[g].strip()} {GROUPS[g]}" for g in GROUPS if _MARKS[g] and g in used]
        if any(not self.headline(task).higher_is_better for task in self.tasks):
            legend.append("↓ lower is better; the mean of all tasks counts 100 − rate")
        if legend:
            parts.append("; ".join(legend) + ".")
        absent = [cell for cell in self.scores if not self._evaluated(cell)]
        if absent:
            parts.append(f"Not evaluated, without examples: {', '.join(absent)}.")
        return "\n\n".join(parts) + "\n"

    def to_csv(self) -> str:
        """A line per cell and metric."""
        rows = [
            [cell, _task(cell), _language(cell), self.groups[cell], scores["examples"], name, value]
            for cell, scores in self.scores.items()
            for name, value in scores.items()
            if name != "examples"
        ]
        return csv_text(["cell", "task", "language", "group", "examples", "metric", "value"], rows)

    def write(self, folder: epath.PathLike) -> None:
        """Writes scores.md, scores.json and scores.csv into a folder."""
        folder = epath.Path(folder)
        files.write_text(folder / "scores.md", self.to_markdown())
        files.write_json(folder / "scores.json", self.to_json())
        files.write_text(folder / "scores.csv", self.to_csv())

    def _evaluated(self, cell: str) -> bool:
        return self.scores[cell].get("examples", 0) > 0

    def _entry(self, cell: str) -> str:
        if cell not in self.scores:
            return ""
        return number(self.value(cell)) + _MARKS[self.groups[cell]]


def read_scores(folder: epath.PathLike) -> Scoreboard:
    """The scoreboard in a folder's scores.json.

    Raises:
      ValueError: there is none, or it is none.
    """
    path = epath.Path(folder) / "scores.json"
    record = files.read_json(path)
    if record is None:
        raise ValueError(f"{path}: no such file; evaluate the run first")
    try:
        return Scoreboard.from_json(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def number(value: float | None) -> str:
    """A score as tables show it."""
    return MISSING if value is None else f"{value:.1f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, the first column to the left, all others to the right, aligned as text."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def text(line: Sequence[str]) -> str:
        first, *others = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(entry.rjust(width) for entry, width in others)]
        return f"| {' | '.join(cells)} |"

    first, *others = widths
    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)])
    return "\n".join([text(lines[0]), f"|{rule}|", *map(text, lines[1:])])


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


def _mean(values: Iterable[float]) -> float | None:
    collected = list(values)
    return statistics.fmean(collected) if collected else None
