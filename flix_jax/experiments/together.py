"""Runs that are trained together as one program, each in a folder of its own.

What may differ among them is told by `MAY_DIFFER`: adapters' ranks, feature dropout, alpha,
learning rate, the optimizer's other numbers, the seed. Each folder is that of the run by itself,
with its checkpoints, metrics and predictions: any of them may go on alone, or be evaluated again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from flix_jax import preemption, processes
from flix_jax.adapters import tree
from flix_jax.adapters.activation import FeatureSettings
from flix_jax.adapters.features import FeatureSpace
from flix_jax.data.prefetch import PrefetchIterator
from flix_jax.experiments import checks, data_notes, inference, scoring, training
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import FREE, RANDOM, SKIP, Run
from flix_jax.experiments.run_folder import saved_steps
from flix_jax.experiments.trial_records import Outcome
from flix_jax.preemption import Preempted
from flix_jax.training import not_finite, tracing
from flix_jax.training import trials as trials_lib
from flix_jax.training.checkpoints import Checkpoints, digest
from flix_jax.training.loop import REPORT, UNEVALUATED
from flix_jax.training.parameters import Parameters
from flix_jax.training.reporting import Reporter
from flix_jax.training.step import TrainState

_logger = logging.getLogger(__name__)

PROGRAM = "program"  # saved with a step: by the name of its folder, what the program has reported

# Values of a run, by their names in its description, that may differ within a program.
MAY_DIFFER = re.compile(
    r"adapters\.alpha|adapters\.space\.types\.\d+\.(rank|ranks\b.*|dropout|dropouts\b.*)"
    r"|optimizer\.(b1|b2|eps|weight_decay|clip_norm)|optimizer\.schedule\..*|seed|data_seed"
)


def program_of(run: Run) -> dict[str, str]:
    """The values that runs of one program have in common, by name."""
    values = {
        name: text
        for name, text in run.describe().items()
        if not MAY_DIFFER.fullmatch(name) and not FREE.fullmatch(f"{name}={text}")
    }
    values["total_steps"] = str(run.total_steps)
    values["order of the data: seed"] = str(run.order_seed)
    if run.base == RANDOM:
        values["base of seed"] = str(run.seed)
    optimizer = run.optimizer
    values["optimizer.clip_norm is None"] = str(optimizer.clip_norm is None)
    values["optimizer.weight_decay is 0"] = str(optimizer.weight_decay == 0)
    for name in ("evaluation.split", "evaluation.batch_size", "evaluation.every", "save_every"):
        values[name] = run.describe().get(name, "")
    return values


def alone(run: Run) -> str:
    """Why a run is always a program of its own; '' where it is not."""
    if run.adapters is None:
        return "a whole network is trained"
    if run.adapters_from is not None:
        return "its adapters start from a folder"
    if run.train_values is not None:
        return "some values alone are trained"
    if run.optimizer.lazy:
        return "its optimizer is lazy"
    if run.not_finite == SKIP:
        return "steps that are not finite are skipped"
    return "an ensemble is evaluated" if run.evaluation.ensemble is not None else ""


def programs(runs: Sequence[Run], at_most: int) -> list[list[int]]:
    """Which runs train together, by their places: as few groups as can be, of nearly one size."""
    alike: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        key = str(place) if alone(run) else repr(sorted(program_of(run).items()))
        alike.setdefault(key, []).append(place)
    found = []
    for places in alike.values():
        parts = -(-len(places) // at_most)
        found += [
            places[i * len(places) // parts : (i + 1) * len(places) // parts] for i in range(parts)
        ]
    return found


def why_apart(one: Run, other: Run) -> str:
    """Why two runs cannot share a program; '' where they can."""
    if reason := alone(other) or alone(one):
        return reason
    ours, theirs = program_of(one), program_of(other)
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]

    def short(text: str) -> str:
        return text if len(text) <= 40 else f"{text[:37]}…"

    texts = [
        f"{name} is {short(ours.get(name, '–'))} and {short(theirs.get(name, '–'))}"
        for name in names[:2]
    ]
    return "; ".join(texts) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def reasons(runs: Sequence[Run], groups: Sequence[Sequence[int]]) -> list[str]:
    """Why each program is not a part of one before it: the shortest reason, '' for the first."""
    leads = [runs[places[0]] for places in groups]
    number = "the number of trials in a program"
    return [
        min((why_apart(before, lead) for before in leads[:i]), key=len) or number if i else ""
        for i, lead in enumerate(leads)
    ]


def explain(runs: Sequence[Run], groups: Sequence[Sequence[int]]) -> list[str]:
    """A line for every program after the first that says why it is one of its own."""
    told = zip(groups, reasons(runs, groups), strict=True)
    return [
        f"program {number}, {len(places)} trials, is one of its own: {reason}"
        for number, (places, reason) in enumerate(told, 1)
        if reason
    ]


def log_dir(run_dir: epath.PathLike, folders: Sequence[epath.PathLike]) -> epath.Path:
    """Where the metrics of a program go: named after its trials."""
    names = "\n".join(sorted(epath.Path(folder).name for folder in folders))
    return epath.Path(run_dir) / "programs" / hashlib.sha256(names.encode()).hexdigest()[:12]


def wide_space(spaces: Sequence[FeatureSpace]) -> FeatureSpace:
    """The space whose banks hold those of all of ``spaces``, which differ in ranks at most."""
    types = [
        dataclasses.replace(
            same[0], rank=max(t.max_rank for t in same), ranks={}, dropout=0.0, dropouts={}
        )
        for same in zip(*(space.types for space in spaces), strict=True)
    ]
    return dataclasses.replace(spaces[0], types=tuple(types))


def train_together(
    runs: Sequence[Run],
    folders: Sequence[epath.PathLike],
    *,
    bases_dir: epath.PathLike,
    configs: Sequence[str | None],
    splits: Sequence[str],
    log_dir: epath.PathLike,
    title: str,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Trains runs of one program in their folders, from where they stand, and scores them.

    Args:
      runs: equal in `program_of`.
      folders: of each.
      bases_dir: where their base lives.
      configs: the operative gin config of each.
      splits: on which they are scored.
      log_dir: for the metrics of all of them together.
      title: what the progress display calls them.
      say: takes lines of progress of evaluations.

    Returns:
      The outcome of each; a run whose loss was not finite has failed, and the others went on.
    """
    outcomes: dict[int, Outcome] = {}
    for part in with_common_step([saved_steps(folder) for folder in folders]):
        group = _Group([runs[i] for i in part], [folders[i] for i in part], bases_dir, title)
        with contextlib.closing(group):
            states = group.fit([configs[i] for i in part], epath.Path(log_dir))
            outcomes |= zip(part, group.score(states, splits, say), strict=True)
    return [outcomes[i] for i in range(len(runs))]


def with_common_step(steps: Sequence[frozenset[int]]) -> list[list[int]]:
    """Places of runs that can go on from one step: all that have it, or all that have none.

    Runs that were interrupted together have a step in common; one that was added later, or had
    failed before, need not hold the others up.
    """
    parts: list[tuple[frozenset[int], list[int]]] = []
    for place in sorted(range(len(steps)), key=lambda i: -max(steps[i], default=0)):
        for number, (common, places) in enumerate(parts):
            both = common & steps[place]
            if both or not (common or steps[place]):
                parts[number] = both, [*places, place]
                break
        else:
            parts.append((steps[place], [place]))
    return [sorted(places) for _, places in parts]


def train_alone(
    run: Run,
    folder: epath.Path,
    splits: Sequence[str],
    *,
    bases_dir: epath.PathLike,
    config: str | None,
) -> Outcome:
    """One run by itself; raises NotFinite where its loss or gradient is not finite."""
    job = training.train(
        run, folder, bases_dir=bases_dir, config=config, title=folder.name, show_cells=False
    )
    boards = {
        split: inference.evaluate(run, folder, split=split, bases_dir=bases_dir) for split in splits
    }
    return Outcome(boards, training.measures(job))


class _Group:
    """Jobs over one base and one stream of batches."""

    def __init__(
        self,
        runs: Sequence[Run],
        folders: Sequence[epath.PathLike],
        bases_dir: epath.PathLike,
        title: str,
    ) -> None:
        if processes.count() > 1:
            raise ValueError("trials of one program run in one process; got several")
        # They share their data: the first reads them.
        self.jobs = [
            checks.start(run, folder, bases_dir=bases_dir, read=place == 0)[0]
            for place, (run, folder) in enumerate(zip(runs, folders, strict=True))
        ]
        self.lead = self.jobs[0]
        self.run = self.lead.run
        self.title = title
        self.errors = [""] * len(runs)
        training.train_base(self.lead, bases_dir=bases_dir, title=title)
        self.base = self.lead.load_base()
        self.pipeline = self.lead.pipeline()
        spaces = [job.space for job in self.jobs if job.space is not None]
        self.wide = wide_space(spaces)
        adapters = self.lead.model.adapters
        assert adapters is not None
        self.model = dataclasses.replace(
            self.lead.model,
            adapters=dataclasses.replace(adapters, space=self.wide, alpha=None),
            layout=None,  # every device has trials of its own
        )
        self.optimizers = [job.optimizer() for job in self.jobs]
        self.templates = [
            job.parameters.state_template(optimizer)
            for job, optimizer in zip(self.jobs, self.optimizers, strict=True)
        ]
        self.settings = [self._settings(job) for job in self.jobs]
        self.program = trials_lib.Trials(
            [
                trials_lib.Trial(template, run.optimizer, run.seed, settings)
                for template, run, settings in zip(self.templates, runs, self.settings, strict=True)
            ],
            lambda settings: dataclasses.replace(self.model, settings=settings).loss,
            total_steps=self.run.total_steps,
            mesh=self.lead.mesh,
            microbatches=self.run.microbatches,
            rows_together=self.lead.rows_together,
        )
        self.frozen = self.lead.frozen_parameters(self.base)
        origin = self.lead.base_digest(self.base)  # hashed once: a base may be large
        self.checkpoints: list[Checkpoints] = [
            job.checkpoints(self.base, origin=origin, warn=_logger.warning) for job in self.jobs
        ]

    def close(self) -> None:
        for checkpoints in self.checkpoints:
            checkpoints.close()

    def _settings(self, job: Job) -> FeatureSettings:
        adapters = job.model.adapters
        assert adapters is not None and job.space is not None
        widths = {t.name: t.max_rank for t in self.wide.types}
        return FeatureSettings.of(job.space, adapters.alpha, widths)

    def _start(self) -> tuple[list[TrainState], list[Mapping[str, Any]]]:
        """The states to go on from, of the newest step that all have, and what was saved with them.

        Of no such step: those of the beginning, and nothing.
        """
        for checkpoints in self.checkpoints:
            checkpoints.set_aside_damaged()
        common = set.intersection(*(set(c.all_steps()) for c in self.checkpoints))
        for checkpoints in self.checkpoints:  # a program may have ended between two of its saves
            checkpoints.delete_after(max(common, default=0))
        if not common:
            states: list[TrainState] = []
            makers: dict[str, Parameters] = {}
            for job, optimizer in zip(self.jobs, self.optimizers, strict=True):
                assert job.space is not None
                ranks = repr([(t.rank, t.ranks) for t in job.space.types])
                maker = makers.setdefault(ranks, job.parameters)  # compiled once for equal ranks
                trained = maker.fresh_adapters(job.run.seed)
                states.append(job.parameters.create_state(trained, optimizer))
            return states, [{} for _ in states]
        restored = [
            checkpoints.restore(template, max(common), self.pipeline.check_state)
            for checkpoints, template in zip(self.checkpoints, self.templates, strict=True)
        ]
        return [state for state, _ in restored], [data for _, data in restored]

    def fit(self, configs: Sequence[str | None], log_dir: epath.Path) -> list[TrainState]:
        """Trains to the last step; the states of all runs, failed ones where they stopped.

        Raises:
          Preempted: asked to stop, after a step or in an evaluation; the states are saved.
        """
        states, data = self._start()
        first, total = int(states[0].step), self.run.total_steps
        unevaluated = [i for i, saved in enumerate(data) if saved.get(UNEVALUATED)]
        if first == total and not unevaluated:
            return states
        with contextlib.ExitStack() as stack:
            batches = stack.enter_context(
                PrefetchIterator(self.pipeline, first, put=self.program.put_batch)
            )
            reporters = self._reporters(stack, batches, first, configs, data)
            before = data[0].get(PROGRAM, {})
            overall = stack.enter_context(
                self._reporter(
                    log_dir, batches, first, self.title, resumed=before.get(log_dir.name)
                )
            )
            overall.say(
                f"{self.title}: {len(self.jobs)} trials as one program, "
                f"{tree.count_parameters(self.lead.parameters.templates[1]):,} parameters frozen, "
                f"step {first} of {total}"
            )
            for i in unevaluated:
                value = self._value(i, states[i], first, reporters[i])
                checkpoints = self.checkpoints[i]
                if value is not None and (self.run.saves_at(first) or checkpoints.improves(value)):
                    checkpoints.set_value(first, value)
            step_fn = tracing.telling_compilations(
                self.program.step, lambda text: overall.say(f"{self.title}: {text}")
            )
            state = self.program.stack(states)
            del states
            pending: list[tuple[int, Any]] = []

            def save(step: int, evaluating: bool, *, all_of_them: bool = False) -> None:
                self._report(pending, reporters, overall, partial=evaluating or step == total)
                more = {**batches.state(), PROGRAM: {log_dir.name: overall.state()}}
                overall.sync()
                self._save(state, step, more, reporters, overall, evaluating, all_of_them)

            stack.enter_context(preemption.phase("compiling"))
            for step in range(first + 1, total + 1):
                state, metrics = step_fn(state, self.frozen, next(batches))
                if step == first + 1:  # from here on there is something to save
                    stack.enter_context(preemption.holding())
                    stack.enter_context(preemption.phase("training"))
                if len(pending) >= self.run.log_every:
                    self._report(pending, reporters, overall)
                pending.append((step, metrics))
                last, every = step == total, self.run.evaluation.every
                evaluating = bool(every and (last or step % every == 0))
                if evaluating or self.run.saves_at(step):
                    save(step, evaluating)
                if preemption.reached() and not last:
                    save(step, False, all_of_them=True)
                    raise self._stopped(step)
            self._wait()
            return list(self.program.unstack(state))

    def _wait(self) -> None:
        with preemption.phase("saving"):
            for checkpoints in self.checkpoints:
                checkpoints.wait()

    def _stopped(self, step: int) -> Preempted:
        self._wait()
        return Preempted(f"step {step} of {self.run.total_steps} of {self.title} is saved")

    def _reporter(
        self,
        folder: epath.Path,
        batches: PrefetchIterator,
        first: int,
        title: str,
        of: Run | None = None,
        resumed: Mapping[str, Any] | None = None,
    ) -> Reporter:
        """A reporter of one run, which writes files alone; or of all, which shows them too."""
        return Reporter(
            folder,
            total_steps=self.run.total_steps,
            start_step=first,
            log_every=self.run.log_every,
            wait_seconds=lambda: batches.wait_seconds,
            title=title,
            show=of is None,
            hparams=None if of is None else of.hparams(),
            wandb_project=None if of is None else of.wandb_project,
            resumed=resumed,
        )

    def _reporters(
        self,
        stack: contextlib.ExitStack,
        batches: PrefetchIterator,
        first: int,
        configs: Sequence[str | None],
        saved: Sequence[Mapping[str, Any]],
    ) -> list[Reporter]:
        data = self.pipeline.report()
        reporters = []
        for job, config, before in zip(self.jobs, configs, saved, strict=True):
            job.note_folder()
            job.share_comparison(self.lead)
            data_notes.write(job, data)
            training.keep_config(job, config)
            name, resumed = job.run_dir.name, before.get(REPORT)
            reporter = self._reporter(job.run_dir, batches, first, name, job.run, resumed)
            reporters.append(stack.enter_context(reporter))
        return reporters

    def _report(
        self,
        pending: list[tuple[int, Any]],
        reporters: Sequence[Reporter],
        overall: Reporter,
        *,
        partial: bool = False,
    ) -> None:
        """Hands metrics to those of the runs that are well, and their mean on.

        With `partial` the window ends, else it does where it is full.
        """
        for step, metrics in jax.device_get(pending):
            alive = [i for i in range(len(self.jobs)) if not self.errors[i]]
            for i in alive:
                values = {name: float(value[i]) for name, value in metrics.items()}
                problem = not_finite.found_in(values)
                if problem is not None:
                    self._fail(i, f"{problem} at step {step}", overall)
                    continue
                reporters[i].step(step, values)
            well = [i for i in alive if not self.errors[i]]
            if not well:
                raise FloatingPointError(next(e for e in self.errors if e))
            mean = {name: float(np.mean(value[well])) for name, value in metrics.items()}
            overall.step(step, mean | {"tokens": mean["tokens"] * len(well)})
        pending.clear()
        for i, reporter in enumerate(reporters):
            if not self.errors[i]:
                reporter.flush(partial=partial)
        overall.flush(partial=partial)

    def _fail(self, index: int, error: str, overall: Reporter) -> None:
        self.errors[index] = error
        overall.say(f"{self.jobs[index].run_dir.name}: {error}; the others go on")

    def _sound(self, index: int, own: TrainState, overall: Reporter) -> bool:
        """Whether a run is well, and its state all finite; one that is not has failed."""
        if not self.errors[index]:
            try:
                not_finite.check_state(own)
            except not_finite.NotFinite as error:
                self._fail(index, str(error), overall)
        return not self.errors[index]

    def _save(
        self,
        state: trials_lib.TrialsState,
        step: int,
        data_state: Mapping[str, Any],
        reporters: Sequence[Reporter],
        overall: Reporter,
        evaluating: bool,
        all_of_them: bool,
    ) -> None:
        """Evaluates the runs that are well, and saves those that are due, or all of them."""
        there = {i for i, c in enumerate(self.checkpoints) if step in c.all_steps()}
        due = all_of_them or self.run.saves_at(step)
        evaluated: set[int] = set()

        def save(i: int, own: TrainState, value: float | None = None) -> None:
            there.add(i)
            with preemption.phase("saving"):
                report = reporters[i].state()
                reporters[i].sync()
                more = {REPORT: report, UNEVALUATED: evaluating and i not in evaluated}
                self.checkpoints[i].save(own, {**data_state, **more}, value)

        try:
            for i, own in enumerate(self.program.unstack(state)):
                if i in there or not self._sound(i, own, overall):
                    continue
                value = self._value(i, own, step, reporters[i]) if evaluating else None
                evaluated.add(i)
                if due or self.checkpoints[i].improves(value):
                    save(i, own, value)
        except Preempted:
            for i, own in enumerate(self.program.unstack(state)):
                if i not in there and self._sound(i, own, overall):
                    save(i, own)
            raise self._stopped(step) from None

    def _value(self, i: int, own: TrainState, step: int, reporter: Reporter) -> float | None:
        """Evaluates a run; the value by which its best checkpoint is kept."""
        job = self.jobs[i]
        with preemption.phase("evaluating"):
            scores = self._evaluator(job.run.evaluation.split, while_training=True).evaluate(
                self._predictors(i, own.trained),
                job.run_dir,
                step,
                fingerprint=inference.fingerprint(job, own.trained, self._frozen_digest),
            )
        reporter.scores(step, scores)
        judge = scoring.judge(job.run, job.split)
        return judge(scores) if judge else None

    @functools.cached_property
    def _frozen_digest(self) -> str:
        return digest(self.frozen)

    @functools.cached_property
    def _wide_job(self) -> Job:
        return self.lead.with_model(self.model)

    def _evaluator(self, split: str, while_training: bool = False) -> Any:
        key = split, while_training
        if key not in self._evaluators:
            limit = None
            if while_training:
                limit = scoring.examples_per_cell(self.run, self.lead.split.cells)
            self._evaluators[key] = inference.evaluator(self.lead, split, limit)
        return self._evaluators[key]

    @functools.cached_property
    def _evaluators(self) -> dict[tuple[str, bool], Any]:
        return {}

    def _predictors(self, index: int, trained: Any) -> dict[str, Any]:
        wide = jax.tree.map(
            lambda leaf, shape: trials_lib.pad(leaf, shape.shape),
            trained,
            self.program.template.trained,
        )
        return self._wide_job.predictors(wide, self.frozen, self.settings[index])

    def score(
        self, states: Sequence[TrainState], splits: Sequence[str], say: Callable[[str], None]
    ) -> list[Outcome]:
        """The outcome of every run; what was evaluated before is read."""
        outcomes = []
        for i, (job, state) in enumerate(zip(self.jobs, states, strict=True)):
            if self.errors[i]:
                outcomes.append(Outcome(error=self.errors[i]))
                continue
            boards, step = {}, int(state.step)
            mark = inference.fingerprint(job, state.trained, self._frozen_digest)
            predictors = self._predictors(i, state.trained)
            for split in splits:
                evaluation = self._evaluator(split)
                board, folder = inference.score(job, evaluation, predictors, step, mark, say)
                inference.write_board(job, board, folder, step, split)
                boards[split] = board
            measures = training.measures(job, share=1 / len(self.jobs))
            outcomes.append(Outcome(boards, measures))
        return outcomes
