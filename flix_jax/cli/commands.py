"""What each command does, given its parsed flags.

Nothing heavy is imported before a command runs, so that help and mistakes answer at once.
"""

import argparse
import contextlib
import dataclasses
import functools
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flix_jax.mistakes import Collected

if TYPE_CHECKING:
    from flix_jax.configuration import Configuration
    from flix_jax.data.cells import Cell
    from flix_jax.experiments.checks import Report
    from flix_jax.experiments.run import Run
    from flix_jax.experiments.sweep import Bindings, Sweep, Trial
    from flix_jax.experiments.trial_records import Outcome
    from flix_jax.experiments.workers import Assignment
    from flix_jax.interop.flix_adapters import Adapters
    from flix_jax.models.decoding import Decoding


# Flags of `infer` and `chat` that are options of `models.decoding.Decoding`.
DECODING = ("beams", "alpha", "manner", "sampling", "temperature", "top_k", "top_p", "seed")


# Of what a run reads, by names in its description.
_DATA = ("source", "mixture", "evaluation")


class UsageError(ValueError):
    """A command line that cannot be understood."""


class _TrialRun(NamedTuple):
    config: "Configuration"
    run: "Run"
    text: str = ""


def _configure(arguments: argparse.Namespace, gin_files: Sequence[str]) -> "Configuration":
    from flix_jax import configuration

    return configuration.load(gin_files, arguments.bindings, arguments.gin_import)


def _build(
    arguments: argparse.Namespace, gin_files: Sequence[str]
) -> tuple["Run", "Configuration"]:
    """The run; bindings without effect are errors (flags) or warnings (files)."""
    config = _configure(arguments, gin_files)
    built = config.build("Run")
    for line in config.check_used():
        _warn(line)
    return built, config


def _warn(line: str) -> None:
    from flix_jax import processes

    if processes.is_first():
        print(f"warning: {line}", file=sys.stderr)


def _join(arguments: argparse.Namespace) -> None:
    """Joins the other processes of the command; all but the first say nothing but errors."""
    from flix_jax import processes

    processes.start(arguments.coordinator, arguments.processes, arguments.process)
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        logging.disable(logging.WARNING)


def _saved_config(arguments: argparse.Namespace) -> list[str]:
    """The gin files given, or the config that the run's folder holds."""
    if arguments.gin_file:
        return list(arguments.gin_file)
    from etils import epath

    path = epath.Path(arguments.run_dir) / "config.gin"
    if not path.exists():
        raise UsageError(f"{arguments.run_dir} holds no run: there is no {path}")
    return [str(path)]


def train(arguments: argparse.Namespace) -> None:
    _join(arguments)
    run, config = _build(arguments, arguments.gin_file)
    from flix_jax import configuration
    from flix_jax.experiments import training

    with config.placing_errors():
        training.train(
            run,
            arguments.run_dir,
            config=configuration.operative_config(),
            profile=arguments.profile,
            allow_changes=_patterns(arguments.allow_changes),
            strict=arguments.strict,
            check_parity=arguments.check_parity,
        )


def check(arguments: argparse.Namespace) -> None:
    config = _configure(arguments, arguments.gin_file)
    if any(binding.name.startswith("Sweep.") for binding in config.bindings):
        sweep = _sweep_of(config)
        trials = _check_trials(arguments, config, sweep)
        print(f"{sweep.name}: {len(trials)} trials")
        for trial, report in _check_starts(sweep, trials, arguments.run_dir):
            _print_report(report, f"{trial}\n")
        return
    built = config.build("Run")
    unused = config.check_used()
    from flix_jax.experiments import checks

    with config.placing_errors():
        _, report = checks.start(
            built, arguments.run_dir, allow_changes=_patterns(arguments.allow_changes)
        )
        if arguments.run_dir is not None:
            report = checks.with_saved(report, arguments.run_dir)
    _print_report(report)
    for line in unused:
        _warn(line)


def _print_report(report: "Report", title: str = "") -> None:
    print(f"{title}{report.table()}")
    for line in report.warnings:
        _warn(line)


def _patterns(given: str) -> tuple[str, ...]:
    return tuple(filter(None, (pattern.strip() for pattern in given.split(","))))


def evaluate(arguments: argparse.Namespace) -> None:
    _join(arguments)
    run, config = _build(arguments, _saved_config(arguments))
    from flix_jax.experiments import inference

    with config.placing_errors():
        board = inference.evaluate(
            run,
            arguments.run_dir,
            split=arguments.split,
            cells=arguments.cells,
            step=arguments.step,
            confidence=arguments.confidence,
        )
    print(board.to_markdown())


def infer(arguments: argparse.Namespace) -> None:
    run, config = _build(arguments, _saved_config(arguments))
    from flix_jax.experiments import prediction

    with config.placing_errors():
        count = prediction.infer(
            run,
            arguments.run_dir,
            input_path=arguments.input,
            output_path=arguments.output,
            form=arguments.input_form,
            features=arguments.features,
            override=arguments.override,
            decoding=_decoding(arguments),
            fold=arguments.fold,
            step=arguments.step,
        )
    print(f"{count} predictions in {arguments.output}")


def chat(arguments: argparse.Namespace) -> None:
    run, config = _build(arguments, _saved_config(arguments))
    from flix_jax.experiments import chat

    if arguments.beams is None and not arguments.sampling:
        arguments.beams = 4
    with config.placing_errors():
        chat.chat(
            run,
            arguments.run_dir,
            _typed(),
            features=arguments.features,
            decoding=_decoding(arguments),
            step=arguments.step,
        )


def _decoding(arguments: argparse.Namespace) -> "Decoding":
    from flix_jax.models.decoding import Decoding

    given = {name: getattr(arguments, name) for name in DECODING}
    return Decoding(**{name: value for name, value in given.items() if value is not None})


def _typed() -> Iterator[str]:
    """The lines that are typed, with a prompt, or those of a pipe, without one."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then edits and remembers lines)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def plan(arguments: argparse.Namespace) -> None:
    from flix_jax.experiments import topology

    topology.use(arguments.topology)  # before JAX starts
    run, config = _build(arguments, arguments.gin_file)
    from flix_jax.evaluation import files
    from flix_jax.experiments import plan, plan_text

    with config.placing_errors():
        place = topology.find(arguments.topology)
        if arguments.search:
            if not place.devices:
                raise UsageError(f"--search compiles, and {place.missing}")
            plans = plan.search(run, place, lambda *done: print(plan_text.line(*done), flush=True))
            if not plans:
                raise UsageError(f"no mesh of {place.count} devices suits the run")
            text = f"{plan_text.ranking(plans)}\n\n{plan_text.to_markdown(plans[0])}"
        else:
            text = plan_text.to_markdown(plan.make(run, place))
    print(text)
    if arguments.out is not None:
        files.write_text(arguments.out, text)


def submission(arguments: argparse.Namespace) -> None:
    run, config = _build(arguments, _saved_config(arguments))
    from flix_jax.experiments.submission import write_submission

    with config.placing_errors():
        done = write_submission(
            run,
            arguments.run_dir,
            out_dir=arguments.out,
            split=arguments.split,
            step=arguments.step,
            partial=arguments.partial,
        )
    for cell, reason in done.missing.items():
        print(f"warning: {cell} is missing: {reason}", file=sys.stderr)
    if done.other_tasks:
        print(f"left out, for they are not the benchmark's: {', '.join(done.other_tasks)}")
    print(f"{len(done.files)} files of step {done.step} in {arguments.out}")


def convert(arguments: argparse.Namespace) -> None:
    from flix_jax.experiments import exchange

    exchange.convert(
        arguments.source,
        arguments.out,
        form=arguments.format,
        dtype=arguments.dtype,
        family=arguments.family,
    )


def export(arguments: argparse.Namespace) -> None:
    run, config = _build(arguments, _saved_config(arguments))
    from flix_jax.experiments import exchange

    with config.placing_errors():
        exchange.export(
            run,
            arguments.run_dir,
            arguments.out,
            form=arguments.format,
            features=arguments.features,
            step=arguments.step,
            dtype=arguments.dtype,
            family=arguments.family,
        )


def _adapters(folder: str) -> "Adapters":
    """The adapters of a folder: exported ones, or those of a run that has been trained."""
    from etils import epath

    from flix_jax.interop import flix_adapters

    if (epath.Path(folder) / flix_adapters.RECORD).exists():
        return flix_adapters.read(folder)
    path = epath.Path(folder) / "config.gin"
    if not path.exists():
        raise UsageError(
            f"{folder} holds no adapters: there is no {flix_adapters.RECORD} of flix export "
            "--format=flix, and no config.gin of a run"
        )
    from flix_jax import configuration
    from flix_jax.experiments import exchange

    config = configuration.load([str(path)], [])
    run = config.build("Run")
    with config.placing_errors():
        return exchange.adapters_of(run, folder)


def features_add(arguments: argparse.Namespace) -> None:
    from flix_jax.experiments import exchange, feature_edits

    exchange.check_new(arguments.out)
    adapters, done = feature_edits.add(
        _adapters(arguments.source),
        arguments.feature,
        init=arguments.init,
        rank=arguments.rank,
        dropout=arguments.dropout,
        seed=arguments.seed,
        languages=arguments.languages,
    )
    adapters.write(arguments.out)
    print(f"{arguments.out}: {done}")


def features_remove(arguments: argparse.Namespace) -> None:
    from flix_jax.experiments import exchange, feature_edits

    exchange.check_new(arguments.out)
    adapters, done = feature_edits.remove(_adapters(arguments.source), arguments.feature)
    adapters.write(arguments.out)
    print(f"{arguments.out}: {done}")


def features_merge(arguments: argparse.Namespace) -> None:
    from flix_jax.experiments import exchange, feature_edits

    exchange.check_new(arguments.out)
    parts = [(folder, _adapters(folder)) for folder in arguments.source]
    adapters, done = feature_edits.merge(parts)
    adapters.write(arguments.out)
    print(f"{arguments.out}: {done}")


def features_list(arguments: argparse.Namespace) -> None:
    from flix_jax.experiments import feature_edits

    print(feature_edits.table(_adapters(arguments.source)))


def sweep(arguments: argparse.Namespace) -> None:
    from flix_jax.experiments import together
    from flix_jax.experiments.workers import run_sweep

    config = _configure(arguments, arguments.gin_file)
    sweep = _sweep_of(config)
    trials = _check_trials(arguments, config, sweep)
    runs = [trial.run for trial in trials]
    worker = _worker(arguments.worker)
    at_most = min(sweep.trials_per_program, -(-len(runs) // worker[1]))
    programs = together.programs(runs, at_most)
    if arguments.dry_run:
        from flix_jax.experiments import dry_run

        print(dry_run.describe(sweep, runs, programs, arguments.run_dir))
        return
    _check_starts(sweep, trials, arguments.run_dir)
    bases_dir = os.path.join(arguments.run_dir, "bases")

    def run_trials(assignments: Sequence["Assignment"]) -> Sequence["Outcome"]:
        built = [_trial_run(arguments, bindings, seed) for bindings, _, seed in assignments]
        folders = [folder for _, folder, _ in assignments]
        with built[0].config.placing_errors():
            if len(assignments) == 1:
                return [
                    together.train_alone(
                        built[0].run,
                        folders[0],
                        sweep.splits,
                        bases_dir=bases_dir,
                        config=built[0].text,
                    )
                ]
            return together.train_together(
                [one.run for one in built],
                folders,
                bases_dir=bases_dir,
                configs=[one.text for one in built],
                splits=sweep.splits,
                log_dir=together.log_dir(arguments.run_dir, folders),
                title=f"{len(folders)} trials",
            )

    if sweep.trials_per_program > 1:
        for line in together.explain(runs, programs):
            print(line)
    records = run_sweep(sweep, arguments.run_dir, run_trials, programs=programs, worker=worker)
    report(arguments)
    failed = [record for record in records if record.state == "failed"]
    if failed:
        first = f"{failed[0].trial} ({failed[0].error})"
        raise FloatingPointError(f"{len(failed)} of {len(records)} trials failed: {first}, …")


def _sweep_of(config: "Configuration") -> "Sweep":
    sweep: Sweep = config.build("Sweep")
    return dataclasses.replace(sweep, base=config.digest(without=["Sweep"]))


def _worker(text: str | None) -> tuple[int, int]:
    """(i, n) of `--worker=i/n`."""
    if text is None:
        return 1, 1
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--worker={text}: expected i/n, such as 1/2")
    index, count = map(int, parts)
    if not 1 <= index <= count:
        raise UsageError(f"--worker={text}: i counts from 1 to n")
    return index, count


def _trial_run(arguments: argparse.Namespace, bindings: "Bindings", seed: int) -> "_TrialRun":
    from flix_jax import configuration

    config = _trial(arguments, bindings, seed)
    run = config.build("Run")
    return _TrialRun(config, run, configuration.operative_config())


def _trial(arguments: argparse.Namespace, bindings: "Bindings", seed: int) -> "Configuration":
    """A trial's configuration: the sweep's files and flags, its own bindings, the macro SEED."""
    from flix_jax import configuration

    flags = [*arguments.bindings, *bindings, f"SEED={seed}"]
    return configuration.load(arguments.gin_file, flags, arguments.gin_import)


def _check_trials(
    arguments: argparse.Namespace, config: "Configuration", sweep: "Sweep"
) -> list["_TrialRun"]:
    """Builds every trial's run before the first is trained.

    A trial's own binding must have an effect in it; any other, in the sweep or in some trial.
    """
    from flix_jax.experiments import scoring

    unused = {binding.key: (binding, line) for binding, line in config.unused().items()}
    shared = {binding.key for binding in config.bindings}
    built = []
    for trial in sweep.trials():
        try:
            trial_config = _trial(arguments, trial.bindings, trial.seed)
            run = trial_config.build("Run")
            with trial_config.placing_errors():
                scoring.check_sweep(sweep, run)
            built.append(_TrialRun(trial_config, run))
        except ValueError as error:
            raise UsageError(f"sweep {sweep.name!r}, trial {trial}: {error}") from error
        idle = {binding.key: line for binding, line in trial_config.unused().items()}
        for key in idle.keys() - shared:
            raise UsageError(f"trial {trial}: {idle[key]}")
        unused = {key: found for key, found in unused.items() if key in idle}
    for binding, line in unused.values():
        if binding.flag:
            raise UsageError(line)
        print(f"warning: {line}", file=sys.stderr)
    return built


def _check_starts(
    sweep: "Sweep", built: Sequence["_TrialRun"], run_dir: str | None
) -> list[tuple["Trial", "Report"]]:
    """Checks one trial of each program, which stands for the others, before the first is trained.

    Data are read once for all trials that have the same.
    """
    from flix_jax.experiments import checks, together
    from flix_jax.experiments.trial_records import read_record, trial_dir

    trials, found, read = sweep.trials(), [], set()
    for place, *_ in together.programs([one.run for one in built], len(built)):
        trial, (config, run, _) = trials[place], built[place]
        if run_dir is not None and read_record(run_dir, trial).state == "finished":
            continue
        data = "\n".join(f"{k}={v}" for k, v in run.describe().items() if k.startswith(_DATA))
        mistakes = Collected()
        with mistakes.part(), config.placing_errors():
            _, report = checks.start(
                run,
                None if run_dir is None else trial_dir(run_dir, trial),
                bases_dir=None if run_dir is None else os.path.join(run_dir, "bases"),
                read=data not in read,
            )
            found.append((trial, report))
        mistakes.tell(f"sweep {sweep.name!r}, trial {trial}: ")
        read.add(data)
    return found


def report(arguments: argparse.Namespace) -> None:
    from flix_jax.experiments.report import make_report

    more = ""
    if getattr(arguments, "gin_file", None):
        files = [f"--gin_file={name}" for name in arguments.gin_file]
        files += [f"--gin_import={module}" for module in arguments.gin_import]
        flags = [f"--gin.{text}" for text in arguments.bindings if not text.startswith("SEEDS=")]
        more = shlex.join(
            [
                os.path.relpath(sys.executable),
                "-m",
                "flix_jax.cli",
                "sweep",
                *files,
                f"--run_dir={arguments.run_dir}",
                *flags,
                "--gin.SEEDS=(0, 1, 2, 3, 4)",
            ]
        )
    report = make_report(arguments.run_dir, more_seeds=more)
    report.write(arguments.run_dir)
    print(report.to_markdown())


def data_babel(arguments: argparse.Namespace) -> None:
    from flix_jax.tasks import babel

    print(babel.write(arguments.out, arguments.seed, tags=arguments.tags))


def data_describe(arguments: argparse.Namespace) -> None:
    if bool(arguments.gin_file) == bool(arguments.data_dir):
        raise UsageError("flix data describe takes either --gin_file or --data_dir")
    if arguments.bindings and not arguments.gin_file:
        raise UsageError(f"--gin.{arguments.bindings[0]} has no effect without --gin_file")
    from flix_jax.tasks.xtreme_up import XtremeUp

    if arguments.data_dir:
        folder = XtremeUp(arguments.data_dir, on_bad_record=arguments.on_bad_record or "error")
        _describe_cells(arguments, folder, folder.cells())
        return
    if arguments.on_bad_record:
        raise UsageError("--on_bad_record goes with --data_dir; a run has XtremeUp.on_bad_record")
    run, config = _build(arguments, arguments.gin_file)
    source: Any = run.source
    if not hasattr(source, "pairs"):
        raise UsageError(
            f"Run.source={type(source).__name__} cannot be described: it has no method pairs(cell, "
            "split) that gives its texts, as XtremeUp has"
        )
    with config.placing_errors():
        mixture = run.split()
        options: dict[str, Any] = {"vocabulary": run.vocabulary}
        options["lengths"] = {"inputs": run.inputs_length, "targets": run.targets_length}
        if run.source_text is not None:
            source.check_sources(mixture.cells, run.source_text)
            options["sources"] = functools.partial(source.sources, source_text=run.source_text)
            options["join"] = run.source_text.joiner
            if run.sources_length is not None:
                options["lengths"]["sources"] = run.sources_length
        _describe_cells(arguments, source, mixture.cells, **options)


def _describe_cells(
    arguments: argparse.Namespace, source: Any, cells: Sequence["Cell"], **options: Any
) -> None:
    from flix_jax.data.cells import match
    from flix_jax.data.description import describe

    chosen = match(arguments.cells, cells, "--cells") if arguments.cells else cells
    print(describe(source, chosen, **options).format(arguments.format))


def download_xtreme_up(arguments: argparse.Namespace) -> None:
    from flix_jax.experiments import download

    download.xtreme_up(
        arguments.out,
        url=arguments.url or download.RELEASE_URL,
        ner_url=arguments.ner_url or download.NER_URL,
    )
