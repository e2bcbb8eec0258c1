"""The command line: `flix train | evaluate | infer | submission | sweep | report | data` and more.

Nothing heavy is imported before a command runs, so that help and mistakes answer at once.
"""

import argparse
import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from flix_jax.adapters.suggest import did_you_mean

if TYPE_CHECKING:
    from etils import epath

    from flix_jax.configuration import Configuration
    from flix_jax.data.cells import Cell
    from flix_jax.evaluation.scoreboard import Scoreboard
    from flix_jax.experiments.run import Run
    from flix_jax.experiments.sweep import Bindings, Sweep
    from flix_jax.training.checkpoints import Step

DIVERGED = 1
USER_ERROR = 2
INTERRUPTED = 130

DESCRIPTION = """\
Featurized low-rank mixtures (FLix) for T5-family encoder-decoders.

A run is described by gin files and lives in a folder: train it, evaluate it cell by cell
(a cell is a task in a language), read its predictions on text of yours. The same command
in the same folder goes on where the run stood.
"""

EPILOG = """\
first steps:
  flix sweep --gin_file=configs/sweeps/babel_quickstart.gin --run_dir=runs/quickstart
  flix train --help

environment:
  JAX_PLATFORMS   the devices to compute on, for example cpu
"""

GIN_HELP = """\
Files are looked up from the working directory, then among those that flix_jax brings
(configs/...). A file opens with the list of what it requires.

  --gin.NAME=VALUE             sets the macro NAME, for example --gin.DATA_DIR="'data'"
  --gin.Name.parameter=VALUE   sets a parameter, for example --gin.AdapterSpec.alpha=8,
                               or in a scope --gin.task/FeatureType.rank=2

VALUE is a Python literal, so a text has quotes of its own. Flags win over files.
"""


class UsageError(ValueError):
    """A command line that cannot be understood."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


# --------------------------------------------------------------------------------------------
# Commands


def _configure(arguments: argparse.Namespace, gin_files: Sequence[str]) -> "Configuration":
    from flix_jax import configuration

    return configuration.load(gin_files, arguments.bindings)


def _build(
    arguments: argparse.Namespace, gin_files: Sequence[str]
) -> tuple["Run", "Configuration"]:
    """The run; bindings without effect are errors (flags) or warnings (files)."""
    config = _configure(arguments, gin_files)
    built = config.build("Run")
    for line in config.check_used():
        print(f"warning: {line}", file=sys.stderr)
    return built, config


def _saved_config(arguments: argparse.Namespace) -> list[str]:
    """The gin files given, or the config that the run's folder holds."""
    if arguments.gin_file:
        return list(arguments.gin_file)
    from etils import epath

    path = epath.Path(arguments.run_dir) / "config.gin"
    if not path.exists():
        raise UsageError(f"{arguments.run_dir} holds no run: there is no {path}")
    return [str(path)]


def _train(arguments: argparse.Namespace) -> None:
    run, config = _build(arguments, arguments.gin_file)
    from flix_jax import configuration
    from flix_jax.experiments import training

    with config.placing_errors():
        training.train(run, arguments.run_dir, config=configuration.operative_config())


def _evaluate(arguments: argparse.Namespace) -> None:
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


def _infer(arguments: argparse.Namespace) -> None:
    run, config = _build(arguments, _saved_config(arguments))
    from flix_jax.experiments import inference

    with config.placing_errors():
        count = inference.infer(
            run,
            arguments.run_dir,
            input_path=arguments.input,
            output_path=arguments.output,
            features=arguments.features,
            step=arguments.step,
        )
    print(f"{count} predictions in {arguments.output}")


def _submission(arguments: argparse.Namespace) -> None:
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


def _sweep(arguments: argparse.Namespace) -> None:
    from flix_jax import configuration
    from flix_jax.experiments import inference, training
    from flix_jax.experiments.sweep import run_sweep

    config = _configure(arguments, arguments.gin_file)
    sweep = dataclasses.replace(config.build("Sweep"), base=config.digest(without=["Sweep"]))
    _check_trials(arguments, config, sweep)
    bases_dir = os.path.join(arguments.run_dir, "bases")
    splits = {sweep.report_on, *([sweep.choose_on] if sweep.choose else [])}

    def run_trial(bindings: "Bindings", folder: "epath.Path", seed: int) -> dict[str, "Scoreboard"]:
        trial_config = _trial(arguments, bindings, seed)
        run = trial_config.build("Run")
        text = configuration.operative_config()
        with trial_config.placing_errors():
            training.train(run, folder, bases_dir=bases_dir, config=text, title=folder.name)
            return {
                split: inference.evaluate(run, folder, split=split, bases_dir=bases_dir)
                for split in sorted(splits)
            }

    records = run_sweep(sweep, arguments.run_dir, run_trial)
    _report(arguments)
    failed = [record for record in records if record.state == "failed"]
    if failed:
        first = f"{failed[0].trial} ({failed[0].error})"
        raise FloatingPointError(f"{len(failed)} of {len(records)} trials failed: {first}, …")


def _trial(arguments: argparse.Namespace, bindings: "Bindings", seed: int) -> "Configuration":
    """A trial's configuration: the sweep's files and flags, its own bindings, the macro SEED."""
    from flix_jax import configuration

    flags = [*arguments.bindings, *bindings, f"SEED={seed}"]
    return configuration.load(arguments.gin_file, flags)


def _check_trials(arguments: argparse.Namespace, config: "Configuration", sweep: "Sweep") -> None:
    """Builds every trial's run before the first is trained.

    A trial's own binding must have an effect in it; any other, in the sweep or in some trial.
    """
    unused = {binding.key: (binding, line) for binding, line in config.unused().items()}
    shared = {binding.key for binding in config.bindings}
    for trial in sweep.trials():
        trial_config = _trial(arguments, trial.bindings, trial.seed)
        trial_config.build("Run")
        idle = {binding.key: line for binding, line in trial_config.unused().items()}
        for key in idle.keys() - shared:
            raise UsageError(f"trial {trial}: {idle[key]}")
        unused = {key: found for key, found in unused.items() if key in idle}
    for binding, line in unused.values():
        if binding.flag:
            raise UsageError(line)
        print(f"warning: {line}", file=sys.stderr)


def _report(arguments: argparse.Namespace) -> None:
    from flix_jax.experiments.report import make_report

    more = ""
    if getattr(arguments, "gin_file", None):
        files = [f"--gin_file={name}" for name in arguments.gin_file]
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


def _data_babel(arguments: argparse.Namespace) -> None:
    from flix_jax.tasks import babel

    print(babel.write(arguments.out, arguments.seed, tags=arguments.tags))


def _data_describe(arguments: argparse.Namespace) -> None:
    if bool(arguments.gin_file) == bool(arguments.data_dir):
        raise UsageError("flix data describe takes either --gin_file or --data_dir")
    if arguments.bindings and not arguments.gin_file:
        raise UsageError(f"--gin.{arguments.bindings[0]} has no effect without --gin_file")
    from flix_jax.tasks.xtreme_up import XtremeUp

    if arguments.data_dir:
        folder = XtremeUp(arguments.data_dir)
        _describe_cells(arguments, folder, folder.cells())
        return
    run, config = _build(arguments, arguments.gin_file)
    source: Any = run.source
    if not hasattr(source, "pairs"):
        raise UsageError(
            f"Run.source={type(source).__name__} cannot be described: it has no method pairs(cell, "
            "split) that gives its texts, as XtremeUp has"
        )
    with config.placing_errors():
        mixture = run.mixture.select(source.cells(), lambda cell: "train" in source.splits(cell))
        lengths = {"inputs": run.inputs_length, "targets": run.targets_length}
        _describe_cells(
            arguments, source, mixture.cells, vocabulary=run.vocabulary, lengths=lengths
        )


def _describe_cells(
    arguments: argparse.Namespace, source: Any, cells: Sequence["Cell"], **options: Any
) -> None:
    from flix_jax.data.cells import match
    from flix_jax.data.description import describe

    chosen = match(arguments.cells, cells, "--cells") if arguments.cells else cells
    print(describe(source, chosen, **options).format(arguments.format))


def _download_xtreme_up(arguments: argparse.Namespace) -> None:
    from flix_jax.experiments import download

    download.xtreme_up(
        arguments.out,
        url=arguments.url or download.RELEASE_URL,
        ner_url=arguments.ner_url or download.NER_URL,
    )


# --------------------------------------------------------------------------------------------
# Flags


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    description: str,
    example: str,
) -> _Parser:
    parser: _Parser = commands.add_parser(
        name, help=summary, description=description, epilog=f"example:\n{example}"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_gin(parser: _Parser, *, required: bool) -> None:
    group = parser.add_argument_group("configuration", GIN_HELP)
    note = "repeatable, later files win"
    group.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        required=required,
        help=f"gin file ({note})" if required else f"default: the run's own config.gin ({note})",
    )


def _add_run_dir(parser: _Parser, text: str) -> None:
    parser.add_argument("--run_dir", required=True, metavar="DIR", help=text)


def _add_step(parser: _Parser) -> None:
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N|best",
        help="checkpoint to read; 'best' is that of Evaluation.keep_best (default: the latest)",
    )


def _step(text: str) -> "Step":
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number or 'best', got {text!r}")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command but for `--gin.` flags, which `main` takes out beforehand."""
    parser = _Parser(prog="flix", description=DESCRIPTION, epilog=EPILOG)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    train = _command(
        commands,
        "train",
        _train,
        "train a run, or go on with it",
        "Trains what the gin files describe (Run) and writes checkpoints, metrics and the\n"
        "operative config to the run's folder. Started again there, it goes on.",
        "  flix train --gin_file=configs/experiments/ner_tiny.gin \\\n"
        "      --gin.DATA_DIR=\"'data/xtreme_up_v1.1'\" --run_dir=runs/ner_tiny",
    )
    _add_run_dir(train, "folder of the run; local or in a bucket (gs://...)")
    _add_gin(train, required=True)

    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "score a run, cell by cell",
        "Decodes every cell that has the split and prints its scores, with means over seen and\n"
        "unseen cells. Predictions and scores are kept under the run's folder.",
        "  flix evaluate --run_dir=runs/ner_tiny --split=test",
    )
    _add_run_dir(evaluate, "folder of a trained run")
    evaluate.add_argument(
        "--split", metavar="NAME", help="split of the data (default: the run's, validation)"
    )
    evaluate.add_argument(
        "--cells",
        action="append",
        metavar="PATTERN",
        help="cells to score, for example 'ner/{sw,yo}'; repeatable (default: all)",
    )
    evaluate.add_argument(
        "--confidence",
        nargs="?",
        type=float,
        const=0.95,
        metavar="SHARE",
        help="add bootstrap intervals, of 0.95 unless another share is given",
    )
    _add_step(evaluate)
    _add_gin(evaluate, required=False)

    infer = _command(
        commands,
        "infer",
        _infer,
        "apply a run to text of yours",
        "Reads a jsonl file with an 'input' on each line and writes the same lines with a\n"
        "'prediction'. The features of a line are its own fields (task, language, ...) or,\n"
        "where it has none, those of --features.",
        "  flix infer --run_dir=runs/ner_tiny --input=in.jsonl --output=out.jsonl \\\n"
        "      --features=task=ner,language=sw",
    )
    _add_run_dir(infer, "folder of a trained run")
    infer.add_argument("--input", required=True, metavar="FILE", help="jsonl file to read")
    infer.add_argument("--output", required=True, metavar="FILE", help="jsonl file to write")
    infer.add_argument(
        "--features",
        default="",
        metavar="TYPE=VALUE,...",
        help="features of every line, for example task=ner,language=sw",
    )
    _add_step(infer)
    _add_gin(infer, required=False)

    submission = _command(
        commands,
        "submission",
        _submission,
        "write a run's predictions as XTREME-UP's scorer reads them",
        "Reads the predictions that flix evaluate left and writes {task}/{split}/{file}.jsonl, a\n"
        "line for each record of the data. Cells of the split that lack predictions are refused.",
        "  flix evaluate   --run_dir=runs/ner_tiny --split=test\n"
        "  flix submission --run_dir=runs/ner_tiny --split=test --out=submissions/ner_tiny",
    )
    _add_run_dir(submission, "folder of an evaluated run")
    submission.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    submission.add_argument(
        "--split", default="test", metavar="NAME", help="split of the data (default: test)"
    )
    submission.add_argument(
        "--step", type=int, metavar="N", help="evaluated checkpoint (default: the latest)"
    )
    submission.add_argument(
        "--partial", action="store_true", help="leave cells out that lack predictions, and say so"
    )
    _add_gin(submission, required=False)

    sweep = _command(
        commands,
        "sweep",
        _sweep,
        "train and compare several runs",
        "Trains and evaluates every run of a Sweep, then writes the table and picture that\n"
        "compare them. Runs that are done already are not repeated.",
        "  flix sweep --gin_file=configs/sweeps/babel_quickstart.gin --run_dir=runs/quickstart",
    )
    _add_run_dir(sweep, "folder for all runs of the sweep")
    _add_gin(sweep, required=True)

    report = _command(
        commands,
        "report",
        _report,
        "print the comparison of a sweep again",
        "Reads the scores under a sweep's folder and writes its table and picture anew.",
        "  flix report --run_dir=runs/quickstart",
    )
    _add_run_dir(report, "folder of a sweep")

    data = commands.add_parser(
        "data",
        help="describe data, or write those of an embedded benchmark",
        description="Describes data, or writes generated ones, in XTREME-UP's folder layout.",
        epilog="example:\n  flix data describe --data_dir=data/xtreme_up_v1.1\n"
        "  flix data babel --out=data/babel --seed=1",
    )
    data.set_defaults(parser=data)
    benchmarks = data.add_subparsers(title="commands", metavar="NAME", parser_class=_Parser)
    babel = _command(
        benchmarks,
        "babel",
        _data_babel,
        "ten artificial languages, five tasks",
        "Writes Babel: small artificial languages times tasks shaped like XTREME-UP's, the\n"
        "same for the same seed on every machine.",
        "  flix data babel --out=data/babel --seed=1",
    )
    babel.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    babel.add_argument("--seed", type=int, default=0, help="(default: 0)")
    babel.add_argument(
        "--tags",
        default="task",
        choices=("none", "task", "task_language"),
        help="what inputs open with (default: task, as in 'ner: ...')",
    )
    describe = _command(
        benchmarks,
        "describe",
        _data_describe,
        "sizes, lengths, cut and repeated examples of every cell",
        "Reads every split of every cell and counts examples, lengths in bytes and tokens, what\n"
        "the configured lengths cut, duplicates, empty targets, and inputs that stand elsewhere.",
        "  flix data describe --data_dir=data/xtreme_up_v1.1 --cells='ner/*'\n"
        "  flix data describe --gin_file=configs/experiments/ner_tiny.gin \\\n"
        "      --gin.DATA_DIR=\"'data/xtreme_up_v1.1'\" --format=markdown",
    )
    describe.add_argument(
        "--data_dir", metavar="DIR", help="folder of {task}/{split}/{file}.jsonl, all of it"
    )
    describe.add_argument(
        "--cells",
        action="append",
        metavar="PATTERN",
        help="cells to describe, for example 'ner/{sw,yo}'; repeatable (default: all)",
    )
    describe.add_argument(
        "--format", default="text", choices=("text", "markdown", "json"), help="(default: text)"
    )
    group = describe.add_argument_group(
        "configuration", f"The cells, vocabulary and lengths of a Run.\n{GIN_HELP}"
    )
    group.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="gin file, in place of --data_dir (repeatable, later files win)",
    )

    download = commands.add_parser(
        "download",
        help="fetch a published benchmark",
        description="Fetches published data into XTREME-UP's folder layout.",
        epilog="example:\n  flix download xtreme_up --out=data",
    )
    download.set_defaults(parser=download)
    published = download.add_subparsers(title="benchmarks", metavar="NAME", parser_class=_Parser)
    xtreme_up = _command(
        published,
        "xtreme_up",
        _download_xtreme_up,
        "XTREME-UP v1.1 with MasakhaNER-X",
        "Fetches the release and its named-entity data (MasakhaNER-X, CC BY-NC 4.0), checks,\n"
        "unpacks and joins them in DIR/xtreme_up_v1.1. A broken download goes on when the command\n"
        "is run again. Files fetched by hand are taken from DIR/downloads.",
        "  flix download xtreme_up --out=data",
    )
    xtreme_up.add_argument("--out", required=True, metavar="DIR", help="local folder")
    xtreme_up.add_argument(
        "--url", metavar="URL", help="address of the archive, of a mirror (default: as published)"
    )
    xtreme_up.add_argument(
        "--ner_url",
        metavar="URL",
        help="address above {split}/{language}.jsonl of MasakhaNER-X (default: as published)",
    )
    return parser


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads a command line; `bindings` holds what followed each `--gin.`.

    Raises:
      UsageError: an unknown command or flag (with the nearest one), or one that is missing.
    """
    rest = [argument for argument in argv if not argument.startswith("--gin.")]
    parser = make_parser()
    level: argparse.ArgumentParser = parser
    for argument in rest:
        choices = _choices(level)
        if not choices or argument.startswith("-"):
            break
        if argument not in choices:
            raise UsageError(
                f"unknown command '{level.prog.removeprefix('flix').lstrip()}"
                f"{' ' if level is not parser else ''}{argument}';"
                f" {did_you_mean(argument, choices)}"
            )
        level = choices[argument]
    flags = [flag for action in level._actions for flag in action.option_strings]
    for argument in rest:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag != "--" and flag not in flags:
            raise UsageError(f"{level.prog} has no flag {flag}; {did_you_mean(flag, flags)}")
    arguments = parser.parse_args(rest)
    if not hasattr(arguments, "run"):
        level.error(f"a command is missing: {', '.join(_choices(level))}")
    arguments.bindings = [
        argument.removeprefix("--gin.") for argument in argv if argument.startswith("--gin.")
    ]
    if arguments.bindings and not hasattr(arguments, "gin_file"):
        level.error(f"{level.prog} takes no --gin. flags, got --gin.{arguments.bindings[0]}")
    return arguments


def quiet() -> None:
    """Keeps TensorFlow and absl from logging; to be called before either is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it announces itself otherwise
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    logging.getLogger("absl").setLevel(logging.ERROR)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    0; 2 after a mistake of the user's; 1 where training diverged.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        make_parser().print_help(sys.stderr)
        return USER_ERROR
    quiet()
    try:
        arguments = parse(argv)
        arguments.run(arguments)
    except (
        ValueError,
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
        FileExistsError,
        PermissionError,
    ) as error:
        if "--debug" in argv:
            raise
        print(f"error: {_describe(error)}", file=sys.stderr)
        return USER_ERROR
    except FloatingPointError as error:
        if "--debug" in argv:
            raise
        print(f"error: {_describe(error)}", file=sys.stderr)
        return DIVERGED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
