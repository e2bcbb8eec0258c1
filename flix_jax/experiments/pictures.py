"""Pictures of a sweep: scores against its axes, maps of two of them, languages, learning curves."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from flix_jax.evaluation.comparison import Estimate
from flix_jax.evaluation.figures import COLOURS, line_style, write_figure
from flix_jax.evaluation.scoreboard import GROUPS
from flix_jax.experiments.sweep import METHOD
from flix_jax.experiments.trial_records import TrialRecord, trial_dir
from flix_jax.training.reporting import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 12
Labels = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Setting:
    """The finished trials of one setting of the axes, over seeds.

    Attributes:
      labels: {axis: label}.
      records: one for each seed, each with scores of `split`.
      split: the split that is shown.
    """

    labels: Mapping[str, str]
    records: tuple[TrialRecord, ...]
    split: str

    def estimate(self, group: str) -> Estimate | None:
        """Mean over tasks of a group, over seeds."""
        means = [record.scores[self.split].mean(group) for record in self.records]
        return Estimate.of([mean for mean in means if mean is not None])

    def measure(self, name: str) -> float | None:
        """The median of a measure over seeds; None where it was not taken."""
        found = [r.measures[name] for r in self.records if name in r.measures]
        return statistics.median(found) if found else None


def settings(records: Sequence[TrialRecord], split: str) -> tuple[Setting, ...]:
    """The settings of finished trials, in order of appearance."""
    found: dict[Labels, list[TrialRecord]] = {}
    for record in records:
        if record.state == "finished" and split in record.scores:
            found.setdefault(tuple(record.trial.labels.items()), []).append(record)
    return tuple(Setting(dict(key), tuple(of), split) for key, of in found.items())


def numeric_axes(shown: Sequence[Setting]) -> tuple[str, ...]:
    """Axes of two or more values, all of which are numbers."""
    axes: dict[str, dict[str, None]] = {}
    for setting in shown:
        for axis, label in setting.labels.items():
            axes.setdefault(axis, {})[label] = None
    return tuple(
        axis for axis, labels in axes.items() if len(labels) > 1 and all(map(_is_number, labels))
    )


def write_pictures(
    folder: epath.PathLike, shown: Sequence[Setting], run_dir: epath.PathLike, title: str
) -> dict[str, str]:
    """Writes the pictures that the settings allow; {name without ending: what it shows}."""
    folder, found = epath.Path(folder), {}
    axes = numeric_axes(shown)
    groups = [g for g in GROUPS if any(setting.estimate(g) for setting in shown)]

    def free(name: str) -> str:
        """`name`, or it with a number where axes that differ in punctuation share it."""
        others = (f"{name}_{number}" for number in itertools.count(2))
        return next(n for n in itertools.chain([name], others) if n not in found)

    for axis in axes:
        name = free(f"score_{_slug(axis)}")
        _against(folder / name, shown, axis, groups, title)
        found[name] = f"score against {axis}"
        if any(setting.measure("step_seconds") for setting in shown):
            name = free(f"cost_{_slug(axis)}")
            _costs(folder / name, shown, axis, title)
            found[name] = f"parameters and step time against {axis}"
    for first, second in itertools.combinations(axes, 2):
        name = free(f"map_{_slug(first)}_{_slug(second)}")
        _map(folder / name, shown, first, second, groups, title)
        found[name] = f"{first} and {second}"
    compared = shown if len(shown) <= len(COLOURS) else best_of_methods(shown)
    if 1 < len(compared) <= len(COLOURS):
        _languages(folder / "languages", compared, title)
        which = (
            "" if compared is shown else ", the setting of each method that is best on seen cells"
        )
        found["languages"] = f"languages, means over tasks († held out in some task or all){which}"
    drawn, unreadable = _curves(folder / "learning_curves", shown, run_dir, title)
    if drawn:
        without = f", without what cannot be read: {'; '.join(unreadable)}" if unreadable else ""
        found["learning_curves"] = f"learning curves{without}"
    return found


def best_of_methods(shown: Sequence[Setting]) -> list[Setting]:
    """The setting of each method with the highest mean over the cells that it is trained on."""
    best: dict[str, tuple[float, Setting]] = {}
    for setting in shown:
        method = setting.labels.get(METHOD)
        estimate = next((e for g in GROUPS if (e := setting.estimate(g)) is not None), None)
        if method is None or estimate is None:
            continue
        if method not in best or estimate.mean > best[method][0]:
            best[method] = estimate.mean, setting
    return [setting for _, setting in best.values()]


def _figure(panels: int, width: float = 4.2, height: float = 3.4) -> tuple[Any, list["Axes"]]:
    from matplotlib.figure import Figure  # without pyplot, which keeps state

    figure = Figure(figsize=(max(1, panels) * width, height), layout="constrained")
    found = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def _against(
    path: epath.Path, shown: Sequence[Setting], axis: str, groups: Sequence[str], title: str
) -> None:
    figure, panels = _figure(len(groups))
    lines = _lines(shown, axis)
    for group, panel in zip(groups, panels, strict=True):
        for number, (label, members) in enumerate(lines.items()):
            points = [
                (float(setting.labels[axis]), estimate)
                for setting in members
                if (estimate := setting.estimate(group)) is not None
            ]
            points.sort(key=lambda point: point[0])
            panel.errorbar(
                [x for x, _ in points],
                [estimate.mean for _, estimate in points],
                yerr=[
                    math.nan if estimate.standard_error is None else estimate.standard_error
                    for _, estimate in points
                ],
                markersize=4,
                capsize=3,
                label=label or None,
                **line_style(number),
            )
        _scale(panel, [float(setting.labels[axis]) for setting in shown if axis in setting.labels])
        panel.set_title(GROUPS[group], fontsize=10)
        panel.set_xlabel(axis)
    panels[0].set_ylabel("mean over tasks")
    _legend(figure, panels[0], lines)
    figure.suptitle(title, fontsize=10)
    write_figure(figure, path)


def _costs(path: epath.Path, shown: Sequence[Setting], axis: str, title: str) -> None:
    figure, panels = _figure(2)
    lines = _lines(shown, axis)
    names = (("parameters", "trained parameters"), ("step_seconds", "seconds a step"))
    for (measure, label), panel in zip(names, panels, strict=True):
        for number, (line, members) in enumerate(lines.items()):
            points = sorted(
                (float(setting.labels[axis]), value)
                for setting in members
                if (value := setting.measure(measure)) is not None
            )
            panel.plot(
                [x for x, _ in points],
                [y for _, y in points],
                markersize=4,
                label=line or None,
                **line_style(number),
            )
        _scale(panel, [float(setting.labels[axis]) for setting in shown if axis in setting.labels])
        panel.set_ylim(bottom=0)
        panel.set_xlabel(axis)
        panel.set_ylabel(label)
    _legend(figure, panels[0], lines)
    figure.suptitle(title, fontsize=10)
    write_figure(figure, path)


def _map(
    path: epath.Path,
    shown: Sequence[Setting],
    first: str,
    second: str,
    groups: Sequence[str],
    title: str,
) -> None:
    """Means of each pair of values, over the seeds and other settings that all pairs have."""
    rows, columns = (
        sorted({s.labels[a] for s in shown if a in s.labels}, key=float) for a in (first, second)
    )
    width = max(3.2, 0.8 * len(columns) + 1.4)
    figure, panels = _figure(len(groups), width, max(2.6, 0.5 * len(rows) + 1.5))
    for group, panel in zip(groups, panels, strict=True):
        means = _pair_means(shown, group, first, second)
        cells = [[means.get((r, c), math.nan) for c in columns] for r in rows]
        panel.imshow(cells, cmap="cividis", aspect="auto")
        known = [value for row in cells for value in row if not math.isnan(value)]
        middle = (min(known) + max(known)) / 2 if known else 0.0
        for (i, row), j in itertools.product(enumerate(cells), range(len(columns))):
            if not math.isnan(row[j]):
                colour = "black" if row[j] > middle else "white"
                panel.text(j, i, f"{row[j]:.1f}", ha="center", va="center", color=colour)
        panel.set_xticks(range(len(columns)), columns)
        panel.set_yticks(range(len(rows)), rows)
        panel.set_xlabel(second)
        panel.set_title(GROUPS[group], fontsize=10)
    panels[0].set_ylabel(first)
    figure.suptitle(title, fontsize=10)
    write_figure(figure, path)


def _pair_means(
    shown: Sequence[Setting], group: str, first: str, second: str
) -> dict[tuple[str, str], float]:
    """Means by the labels of two axes, over trials that differ from pair to pair in these alone.

    A trial that failed would otherwise shift the mean of its pair by what it was set to beside.
    """
    values: dict[tuple[str, str], dict[tuple[Labels, int], float]] = {}
    for setting in shown:
        if first not in setting.labels or second not in setting.labels:
            continue
        pair = setting.labels[first], setting.labels[second]
        rest = tuple(item for item in setting.labels.items() if item[0] not in (first, second))
        for record in setting.records:
            mean = record.scores[setting.split].mean(group)
            if mean is not None:
                values.setdefault(pair, {})[rest, record.trial.seed] = mean
    common = set.intersection(*(set(of) for of in values.values())) if values else set()
    if not common:
        return {}
    return {pair: statistics.fmean(of[key] for key in common) for pair, of in values.items()}


def _languages(path: epath.Path, shown: Sequence[Setting], title: str) -> None:
    """A bar per setting and language: mean over the language's tasks and over seeds."""
    means: list[dict[str, float]] = []
    held_out: set[str] = set()
    for setting in shown:
        values: dict[str, list[float]] = {}
        for record in setting.records:
            board = record.scores[setting.split]
            for cell, group in board.groups.items():
                if (value := board.value(cell)) is None:
                    continue
                task, _, language = cell.partition("/")
                values.setdefault(language, []).append(board.headline(task).utility(value))
                if group != "seen":
                    held_out.add(language)
        means.append({language: statistics.fmean(of) for language, of in values.items()})
    languages = sorted({language for of in means for language in of})
    figure, (panel,) = _figure(1, max(5.0, 0.16 * len(languages) * len(shown) + 2), 3.4)
    width = 0.8 / len(shown)
    for index, (setting, of) in enumerate(zip(shown, means, strict=True)):
        places = [i + (index - (len(shown) - 1) / 2) * width for i in range(len(languages))]
        heights = [of.get(language, math.nan) for language in languages]
        label = _text(setting.labels)
        panel.bar(places, heights, width * 0.92, color=COLOURS[index], label=label)
    ticks = [f"{name}{' †' if name in held_out else ''}" for name in languages]
    panel.set_xticks(range(len(languages)), ticks, rotation=90 if len(languages) > 12 else 0)
    panel.set_ylabel("mean over tasks")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    write_figure(figure, path)


def _curves(
    path: epath.Path, shown: Sequence[Setting], run_dir: epath.PathLike, title: str
) -> tuple[int, list[str]]:
    """Training loss against the step, mean over seeds: (curves drawn, logs that are damaged)."""
    figure, (panel,) = _figure(1, 5.2, 3.6)
    drawn, unreadable = 0, []
    for setting in shown:
        curves: dict[int, list[float]] = {}
        for record in setting.records:
            try:
                lines = read_metrics(trial_dir(run_dir, record.trial) / "metrics.jsonl")
            except ValueError as error:  # what was scored is to be reported all the same
                unreadable.append(str(error))
                continue
            for line in lines:
                if "loss" in line:
                    curves.setdefault(line["step"], []).append(line["loss"])
        if curves and drawn < MOST_LINES:
            steps = sorted(curves)
            style = "-" if drawn < len(COLOURS) else "--"
            panel.plot(
                steps,
                [statistics.fmean(curves[step]) for step in steps],
                style,
                color=COLOURS[drawn % len(COLOURS)],
                linewidth=1.2,
                label=_text(setting.labels) or None,
            )
            drawn += 1
    if not drawn:
        return 0, unreadable
    panel.set_xlabel("step")
    panel.set_ylabel("training loss")
    if any(setting.labels for setting in shown):
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    left = len(shown) - drawn
    figure.suptitle(f"{title} (the first {drawn} settings)" if left else title, fontsize=10)
    write_figure(figure, path)
    return drawn, unreadable


def _lines(shown: Sequence[Setting], axis: str) -> dict[str, list[Setting]]:
    """The settings that have the axis, by what they are set to beside it."""
    lines: dict[str, list[Setting]] = {}
    for setting in shown:
        if axis in setting.labels:
            others = {name: label for name, label in setting.labels.items() if name != axis}
            lines.setdefault(_text(others), []).append(setting)
    return lines


def _legend(figure: Any, panel: "Axes", lines: Mapping[str, Any]) -> None:
    if len(lines) > 1:
        handles, labels = panel.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8
        )


def _scale(panel: "Axes", values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) > 20 * min(values):
        panel.set_xscale("log")


def _text(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{axis.rpartition('.')[2]} {label}" for axis, label in labels.items())


def _slug(axis: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in axis)


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False
