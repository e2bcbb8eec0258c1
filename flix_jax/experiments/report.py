"""What a sweep found: the best of the axes to choose, and the comparison of what is left."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from etils import epath
from flax.core import FrozenDict

from flix_jax.adapters import text_tables
from flix_jax.evaluation import files
from flix_jax.evaluation.comparison import Comparison, Estimate
from flix_jax.evaluation.scoreboard import GROUPS, MISSING, Scoreboard, csv_text
from flix_jax.experiments import pictures
from flix_jax.experiments.pictures import Setting
from flix_jax.experiments.sweep import Sweep
from flix_jax.experiments.trial_records import TrialRecord, read_record, read_sweep, shown_by

_COSTS = ("parameters", "step_seconds")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best labels of the axes to choose, for one variant of a sweep.

    Attributes:
      variant: the variant's name.
      labels: {axis: label} of the best candidate.
      candidates: ({axis: label}, estimate on the split to choose by) of all candidates, over the
        seeds that all of them have.
      edges: the axes whose best label is the first or the last of three or more.
    """

    variant: str
    labels: Mapping[str, str]
    candidates: tuple[tuple[Mapping[str, str], Estimate], ...]
    edges: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """A sweep's records, the choices made among them, and the comparison of the chosen."""

    sweep: Sweep
    records: tuple[TrialRecord, ...]
    choices: tuple[Choice, ...]
    comparison: Comparison
    run_dir: epath.PathLike

    @functools.cached_property
    def settings(self) -> tuple[Setting, ...]:
        """The finished trials by the settings of the axes."""
        return pictures.settings(self.records, self.sweep.report_on)

    def to_markdown(self, shown: Mapping[str, str] = FrozenDict()) -> str:
        """Best setting, choices, comparison, settings, pictures, and what is not finished.

        Args:
          shown: pictures beside the comparison's, by name without ending, and what they show.
        """
        sweep = self.sweep
        parts = [f"# {sweep.name}"]
        if len(self.comparison.boards) > 1:
            parts.append(self._best_text())
        if self.choices:
            parts.append(self._choices_text())
        parts += [
            f"On {sweep.report_on}, {sweep.metric or 'each task by its own metric'}:",
            f"![{sweep.name}](comparison.svg)",
            self.comparison.to_markdown().strip(),
        ]
        if len(self.settings) > 1:
            parts.append(self._settings_text())
        parts += [f"![{text}]({name}.svg)" for name, text in shown.items()]
        unfinished = [r for r in self.records if r.state != "finished"]
        if unfinished:
            parts.append(f"{len(unfinished)} of {len(self.records)} trials are not finished:")
            parts.append(
                "\n".join(
                    f"- {record.trial}: {record.state}{record.error and f' ({record.error})'}"
                    for record in unfinished
                )
            )
        return "\n\n".join(parts) + "\n"

    def trials_csv(self) -> str:
        """A line per trial and split, with the mean over tasks of every group."""
        axes, rows = self._axes, []
        for record in self.records:
            trial = record.trial
            known = [trial.labels.get(axis, "") for axis in axes]
            known += [str(trial.seed), record.state, f"{record.seconds:.1f}"]
            for split, board in record.scores.items():
                rows.append([*known, split, *(board.mean(group) for group in GROUPS)])
            if not record.scores:
                rows.append([*known, *[""] * (len(GROUPS) + 1)])
        return csv_text([*axes, "seed", "state", "seconds", "split", *GROUPS], rows)

    def write(self, folder: epath.PathLike) -> None:
        """Writes report.md, its pictures, comparison.csv, settings.csv, trials.csv, chosen.json."""
        folder = epath.Path(folder)
        self.comparison.write_picture(folder / "comparison", self.sweep.name)
        files.write_text(folder / "comparison.csv", self.comparison.to_csv())
        files.write_text(folder / "trials.csv", self.trials_csv())
        if self.choices:
            chosen = {choice.variant: dict(choice.labels) for choice in self.choices}
            files.write_json(folder / "chosen.json", chosen)
        files.write_text(folder / "settings.csv", self.settings_csv())
        shown = pictures.write_pictures(folder, self.settings, self.run_dir, self.sweep.name)
        files.write_text(folder / "report.md", self.to_markdown(shown))

    def settings_csv(self) -> str:
        """A line per setting and group: mean, standard error, seeds, and what it costs."""
        axes, rows = self._axes, []
        for setting in self.settings:
            known = [setting.labels.get(axis, "") for axis in axes]
            costs = [setting.measure(name) for name in _COSTS]
            for group in GROUPS:
                estimate = setting.estimate(group)
                if estimate is not None:
                    rows.append([*known, group, *dataclasses.astuple(estimate), *costs])
        return csv_text([*axes, "group", "mean", "standard_error", "seeds", *_COSTS], rows)

    @functools.cached_property
    def _axes(self) -> list[str]:
        """The axes of all trials, in order of appearance."""
        return list(dict.fromkeys(axis for r in self.records for axis in r.trial.labels))

    def _best_text(self) -> str:
        """The best row of the comparison in every group, with Student's t over its seeds."""
        lines = []
        for group in self.comparison.groups:
            every = {name: self.comparison.estimate(name, group) for name in self.comparison.boards}
            found = {name: e for name, e in every.items() if e is not None}
            most = max(estimate.seeds for estimate in found.values())
            fewer = sum(estimate.seeds < most for estimate in found.values())
            found = {name: e for name, e in found.items() if e.seeds == most}
            name, estimate = max(found.items(), key=lambda item: item[1].mean)
            interval = student_interval(estimate)
            within = "one seed, no interval"
            if interval is not None:
                low, high = interval
                within = f"95 % interval {low:.1f} to {high:.1f} over {estimate.seeds} seeds"
            if fewer:
                within += f"; {fewer} settings with fewer seeds do not compete"
            lines.append(f"- {GROUPS[group]}: {name}, {estimate.mean:.1f} ({within})")
        of = f"{len(self.comparison.boards)} settings"
        if self.choices:
            of += f", each at its choice of {', '.join(self.sweep.choose)}"
        return (
            f"The best of {of}, by the mean over tasks:\n\n"
            + "\n".join(lines)
            + "\n\nThe best of many is flattered by the choice: its interval does not know of the"
            " others."
        )

    def _settings_text(self) -> str:
        axes = self._axes
        groups = self.comparison.groups
        header = [*axes, *(GROUPS[group] for group in groups), "parameters", "ms a step", "seeds"]
        rows = []
        for setting in self.settings:
            estimates = [setting.estimate(group) for group in groups]
            count, seconds = (setting.measure(name) for name in _COSTS)
            rows.append(
                [setting.labels.get(axis, "") for axis in axes]
                + [MISSING if estimate is None else estimate.text() for estimate in estimates]
                + [MISSING if count is None else f"{count:,.0f}"]
                + [MISSING if seconds is None else f"{1000 * seconds:.1f}"]
                + [str(len(setting.records))]
            )
        return "Every setting, mean over tasks ± standard error over seeds:\n\n" + (
            text_tables.markdown([header, *rows])
        )

    def _choices_text(self) -> str:
        sweep = self.sweep
        rows = [
            [
                choice.variant,
                ", ".join(f"{axis} {label}" for axis, label in labels.items()),
                estimate.text() + (" **best**" if labels == choice.labels else ""),
            ]
            for choice in self.choices
            for labels, estimate in choice.candidates
        ]
        group = GROUPS[sweep.group]
        text = f"Chosen by the mean over tasks of {group} on {sweep.choose_on}:\n\n"
        text += text_tables.markdown([["", "candidate", group], *rows])
        for choice in self.choices:
            for axis in choice.edges:
                text += (
                    f"\n\nThe best {axis} of {choice.variant}, {choice.labels[axis]}, is at the"
                    " edge of its grid: a better one may lie beyond."
                )
        if sweep.choose_on == sweep.report_on:
            text += (
                f"\n\nChoice and comparison use the same examples ({sweep.choose_on}): what was"
                " chosen among more candidates is flattered more."
            )
        return text


def make_report(run_dir: epath.PathLike, *, more_seeds: str = "") -> Report:
    """Reads a sweep's folder and reports on its finished trials.

    For every variant (a method, or a combination of labels) the candidates of the axes to choose
    are compared by the mean of `sweep.group` on `sweep.choose_on`, over the seeds that all
    candidates with finished trials have; one choice holds for all seeds. A candidate that failed
    under any seed is not chosen.

    Args:
      run_dir: the folder of a sweep.
      more_seeds: a command to name where one seed is all there is.

    Raises:
      ValueError: not the folder of a sweep, or too little in it to compare yet.
    """
    sweep = read_sweep(run_dir)
    read = (read_record(run_dir, trial) for trial in sweep.trials())
    # A sweep's metric may have changed since its trials ran.
    records = tuple(
        dataclasses.replace(record, scores=shown_by(sweep.metric, record.scores)) for record in read
    )
    boards: dict[str, dict[int, Scoreboard]] = {}
    choices = []
    for variant in sweep.variants():
        own = [record for record in records if sweep.variant(record.trial.labels) == variant]
        if any(axis in own[0].trial.labels for axis in sweep.choose):
            choice = _choose(sweep, variant, own)
            if choice is None:
                continue
            choices.append(choice)
            own = [record for record in own if _candidate(sweep, record) == choice.labels]
        found = {
            record.trial.seed: record.scores[sweep.report_on]
            for record in own
            if record.state == "finished"
        }
        if found:
            boards[variant] = found
    if not boards:
        raise ValueError(f"{run_dir}: too few of the {len(records)} trials are finished to compare")
    baseline = sweep.baseline if sweep.baseline in boards else ""
    return Report(sweep, records, tuple(choices), Comparison(boards, baseline, more_seeds), run_dir)


def student_interval(estimate: Estimate, confidence: float = 0.95) -> tuple[float, float] | None:
    """The interval of a mean over seeds by Student's t; None of one seed."""
    from scipy.stats import t

    if estimate.standard_error is None:
        return None
    reach = float(t.ppf((1 + confidence) / 2, estimate.seeds - 1)) * estimate.standard_error
    return estimate.mean - reach, estimate.mean + reach


def _choose(sweep: Sweep, variant: str, records: Sequence[TrialRecord]) -> Choice | None:
    failed = [_candidate(sweep, record) for record in records if record.state == "failed"]
    scores: dict[tuple[tuple[str, str], ...], dict[int, float]] = {}
    for record in records:
        candidate = _candidate(sweep, record)
        if record.state != "finished" or candidate in failed:
            continue
        mean = record.scores[sweep.choose_on].mean(sweep.group)
        if mean is not None:
            scores.setdefault(tuple(candidate.items()), {})[record.trial.seed] = mean
    common = set.intersection(*(set(seeds) for seeds in scores.values())) if scores else set()
    candidates = [
        (dict(labels), estimate)
        for labels, seeds in scores.items()
        if (estimate := Estimate.of([seeds[seed] for seed in sorted(common)])) is not None
    ]
    if not candidates:
        return None
    best = max(candidates, key=lambda candidate: candidate[1].mean)[0]
    edges = []
    for axis, label in best.items():
        tried = list(dict.fromkeys(labels[axis] for labels, _ in candidates))
        if len(tried) > 2 and label in (tried[0], tried[-1]):
            edges.append(axis)
    return Choice(variant, best, tuple(candidates), tuple(edges))


def _candidate(sweep: Sweep, record: TrialRecord) -> dict[str, str]:
    return {axis: label for axis, label in record.trial.labels.items() if axis in sweep.choose}
