"""Methods side by side over paired seeds: means, standard errors, paired differences, a picture."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from etils import epath

from flix_jax.adapters import text_tables
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.evaluation import files
from flix_jax.evaluation.figures import COLOURS, write_figure
from flix_jax.evaluation.scoreboard import GROUPS, MISSING, Scoreboard, csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error, sd / √n, which one seed does not have."""

    mean: float
    standard_error: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate | None":
        """The estimate from one value a seed; None without values."""
        if not values:
            return None
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    def text(self, sign: bool = False) -> str:
        """`71.3 ± 1.2`; with `sign` a plus before what is positive."""
        mean = f"{self.mean:+.1f}" if sign else f"{self.mean:.1f}"
        return mean if self.standard_error is None else f"{mean} ± {self.standard_error:.1f}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Methods evaluated on the same cells under the same seeds.

    A seed fixes what the methods share (the base, the data order, which cells are held out), so
    two methods are compared by the differences within each seed.

    Attributes:
      boards: {method: {seed: scoreboard}}, methods in the order of the tables.
      baseline: the method that differences are taken from; '' is the first.
      more_seeds: a command that runs more seeds, named where one seed is all there is.
    """

    boards: Mapping[str, Mapping[int, Scoreboard]]
    baseline: str = ""
    more_seeds: str = ""

    def __post_init__(self) -> None:
        empty = [method for method, boards in self.boards.items() if not boards]
        if not self.boards or empty:
            raise ValueError(f"a comparison needs scores of every method, got none of {empty}")
        if self.baseline and self.baseline not in self.boards:
            raise ValueError(
                f"baseline {self.baseline!r} is none of the methods; "
                f"{did_you_mean(self.baseline, self.boards)}"
            )

    @property
    def base(self) -> str:
        """The baseline's name."""
        return self.baseline or next(iter(self.boards))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups with scores in any board, in their usual order."""
        found = {group for board in self._all() for group in board.present_groups}
        return tuple(group for group in GROUPS if group in found)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of all boards, in the order in which they first occur."""
        return tuple(dict.fromkeys(task for board in self._all() for task in board.tasks))

    @property
    def one_seed(self) -> bool:
        """Whether some method has but one seed."""
        return min(map(len, self.boards.values())) == 1

    def estimate(self, method: str, group: str, task: str | None = None) -> Estimate | None:
        """Mean and standard error over the method's seeds of `Scoreboard.mean(group, task)`."""
        return Estimate.of(list(self._values(method, group, task).values()))

    def difference(self, method: str, group: str, task: str | None = None) -> Estimate | None:
        """Mean and standard error of (method − baseline) within the seeds that both have."""
        ours, theirs = (self._values(name, group, task) for name in (method, self.base))
        return Estimate.of([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def to_markdown(self) -> str:
        """Means and paired differences per group, then per task, with what the seeds can prove."""
        titles = [GROUPS[group] for group in self.groups]
        parts = [
            text_tables.markdown(
                [["mean over tasks", *titles]]
                + [
                    [method, *(_text(self.estimate(method, group)) for group in self.groups)]
                    for method in self.boards
                ]
            )
        ]
        others = [method for method in self.boards if method != self.base]
        if others:
            parts.append(
                text_tables.markdown(
                    [[f"Δ from {self.base}", *titles]]
                    + [
                        [m, *(_text(self.difference(m, group), sign=True) for group in self.groups)]
                        for m in others
                    ]
                )
            )
        parts.append(self._seeds_text())
        for group in self.groups:
            rows = [
                [method, *(_text(self.estimate(method, group, task)) for task in self.tasks)]
                for method in self.boards
            ]
            rows += [
                [f"Δ {m}"]
                + [_text(self.difference(m, group, task), sign=True) for task in self.tasks]
                for m in others
            ]
            header = [GROUPS[group], *map(self._task_title, self.tasks)]
            parts.append(text_tables.markdown([header, *rows]))
        return "\n\n".join(parts) + "\n"

    def to_csv(self) -> str:
        """A line per method, group and task; the task 'all' is the mean over tasks."""
        rows = []
        for method in self.boards:
            for group in self.groups:
                for task in (None, *self.tasks):
                    estimate = self.estimate(method, group, task)
                    if estimate is None:
                        continue
                    difference = self.difference(method, group, task)
                    metric = "" if task is None else self._board(task).headline(task).name
                    rows.append(
                        [method, group, task or "all", metric, *dataclasses.astuple(estimate)]
                        + list(dataclasses.astuple(difference) if difference else [None] * 3)
                    )
        return csv_text(
            ["method", "group", "task", "metric", "mean", "standard_error", "seeds"]
            + ["difference", "difference_standard_error", "paired_seeds"],
            rows,
        )

    def write_picture(self, path: epath.PathLike, title: str = "") -> None:
        """Writes `<path>.png` and `<path>.svg`: a bar per method and group, with standard errors.

        Args:
          path: without the ending.
          title: above the bars.
        """
        seeds = sorted({len(boards) for boards in self.boards.values()})
        count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        note = "1 seed, no error known" if seeds == [1] else f"{count} seeds, ± standard error"
        heading = f"{title}\n({note})" if title else note
        few = len(self.boards) <= len(COLOURS)
        write_figure(self._upright(heading) if few else self._lying(heading), path)

    def _upright(self, heading: str) -> "Figure":
        """Groups side by side, in each a bar for every method in its colour."""
        # Without pyplot, which keeps state and looks for a display.
        from matplotlib.figure import Figure

        methods, groups = list(self.boards), self.groups
        figure = Figure(figsize=(max(5.0, 1.6 + 0.55 * len(methods) * len(groups)), 3.6))
        axes = figure.subplots()
        width = 0.8 / len(methods)
        for index, method in enumerate(methods):
            for place, group in enumerate(groups):
                estimate = self.estimate(method, group)
                if estimate is None:
                    continue
                x = place + (index - (len(methods) - 1) / 2) * width
                error = estimate.standard_error
                axes.bar(
                    x,
                    estimate.mean,
                    width * 0.92,
                    yerr=error,
                    capsize=3,
                    color=COLOURS[index],
                    ecolor="#333333",
                )
                axes.annotate(
                    f"{estimate.mean:.1f}",
                    (x, estimate.mean + (error or 0.0)),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        handles = [axes.bar(0, 0, color=COLOURS[index]) for index in range(len(methods))]
        axes.legend(
            handles,
            methods,
            frameon=False,
            fontsize=8,
            ncols=min(len(methods), 4),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.1),
        )
        axes.set_xticks(range(len(groups)), [GROUPS[group] for group in groups])
        axes.set_ylabel("mean over tasks")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
        axes.set_title(heading, fontsize=10)
        return figure

    def _lying(self, heading: str) -> "Figure":
        """A line for every method, and a panel for every group: for more methods than colours."""
        from matplotlib.figure import Figure

        methods, groups = list(self.boards), self.groups
        size = (2.5 + 2.4 * len(groups), 1.2 + 0.24 * len(methods))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for group, panel in zip(groups, panels, strict=True):
            for place, method in enumerate(methods):
                estimate = self.estimate(method, group)
                if estimate is None:
                    continue
                error = estimate.standard_error
                panel.barh(place, estimate.mean, 0.75, xerr=error, capsize=2, color=COLOURS[0])
                panel.annotate(
                    f"{estimate.mean:.1f}",
                    (estimate.mean + (error or 0.0), place),
                    xytext=(2, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
            panel.set_title(GROUPS[group], fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(x=0.15)
        panels[0].set_yticks(range(len(methods)), methods, fontsize=7)
        panels[0].invert_yaxis()
        figure.supxlabel("mean over tasks", fontsize=9)
        figure.suptitle(heading, fontsize=10)
        return figure

    def write(self, folder: epath.PathLike, name: str = "comparison", title: str = "") -> None:
        """Writes `<name>.md` (with the picture in it), `.csv`, `.png` and `.svg` into a folder."""
        folder = epath.Path(folder)
        heading = f"# {title}\n\n" if title else ""
        picture = f"![{title or name}]({name}.svg)\n\n"
        files.write_text(folder / f"{name}.md", heading + picture + self.to_markdown())
        files.write_text(folder / f"{name}.csv", self.to_csv())
        self.write_picture(folder / name, title)

    def _all(self) -> list[Scoreboard]:
        return [board for boards in self.boards.values() for board in boards.values()]

    def _board(self, task: str) -> Scoreboard:
        return next(board for board in self._all() if task in board.tasks)

    def _task_title(self, task: str) -> str:
        metric = self._board(task).headline(task)
        return f"{task} ({metric.title}{'' if metric.higher_is_better else ' ↓'})"

    def _values(self, method: str, group: str, task: str | None) -> dict[int, float]:
        means = {seed: board.mean(group, task) for seed, board in self.boards[method].items()}
        return {seed: mean for seed, mean in means.items() if mean is not None}

    def _seeds_text(self) -> str:
        seeds = {method: sorted(boards) for method, boards in self.boards.items()}
        distinct = {tuple(values) for values in seeds.values()}
        if len(distinct) == 1:
            values = next(iter(distinct))
            text = f"{len(values)} seed{'s' * (len(values) > 1)} ({', '.join(map(str, values))})."
        else:
            text = "Seeds differ: " + "; ".join(
                f"{method} has {', '.join(map(str, values))}" for method, values in seeds.items()
            )
            text += ". Differences are over the seeds that both have."
        if self.one_seed:
            text += (
                " One seed proves nothing: no standard error can be given, and differences may be"
                " chance."
            )
            if self.more_seeds:
                text += f" For more seeds: `{self.more_seeds}`"
        else:
            text += " ± is the standard error over seeds; differences (Δ) are paired by seed."
        return text


def _text(estimate: Estimate | None, sign: bool = False) -> str:
    return MISSING if estimate is None else estimate.text(sign)
