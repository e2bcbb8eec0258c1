"""The flags of every command, and the help that explains them."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from flix_jax import preemption
from flix_jax.cli import checkpoint_commands, commands, diagnosis_commands, launching
from flix_jax.cli.commands import UsageError

if TYPE_CHECKING:
    from flix_jax.training.checkpoints import Step

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


class Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _command(
    parsers: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    description: str,
    example: str,
) -> Parser:
    parser: Parser = parsers.add_parser(
        name, help=summary, description=description, epilog=f"example:\n{example}"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_gin(parser: Parser, *, required: bool) -> None:
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
    launching.add_gin_import(group)


def _add_run_dir(parser: Parser, text: str) -> None:
    parser.add_argument("--run_dir", required=True, type=_folder, metavar="DIR", help=text)


def _folder(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("empty, expected a folder")
    return text


def _add_allow_changes(parser: Parser) -> None:
    parser.add_argument(
        "--allow_changes",
        default="",
        metavar="NAME,...",
        help="values that may differ from the run that the folder holds, for example "
        "'optimizer.schedule.*'; they are noted there",
    )


def _add_processes(parser: Parser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "Start the command once on every host, each with devices of its own; flix launch does.",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT|auto",
        help="of the first process; auto: as TPU VMs, GKE and SLURM tell (default: none, but auto "
        "where the environment lists the workers of a TPU slice)",
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which this is, from 0")


def _add_grace(parser: Parser) -> None:
    parser.add_argument(
        "--grace_seconds",
        type=float,
        default=preemption.GRACE,
        metavar="S",
        help="in which a command that SIGTERM or Ctrl-C asks to stop saves what there is to save; "
        f"then it is ended, with status {preemption.STATUS} ({preemption.INTERRUPTED} after "
        f"Ctrl-C; default: {preemption.GRACE:g})",
    )


def _add_step(parser: Parser) -> None:
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N|best",
        help="checkpoint to read; 'best' is that of Evaluation.keep_best (default: the latest)",
    )


def _add_chosen_features(parser: Parser, text: str) -> None:
    parser.add_argument(
        "--features",
        default="",
        metavar="TYPE=VALUE[:WEIGHT],...",
        help=f"{text}: task=ner,language=sw, or language=sw:0.7,language=rw:0.3",
    )


def _add_decoding(parser: Parser, text: str) -> Any:
    how = parser.add_argument_group("decoding", text)
    how.add_argument("--beams", type=_positive, metavar="N", help="beam search for N predictions")
    how.add_argument("--alpha", type=float, help="of the length penalty (default: 0.6)")
    how.add_argument(
        "--manner",
        choices=("exact", "huggingface"),
        help="of beam search: penalty ((5 + n) / 6)^alpha, or as in Transformers (default: exact)",
    )
    how.add_argument("--sampling", action="store_true", default=None, help="draw every token")
    how.add_argument("--temperature", type=float, help="of drawing (default: 1)")
    how.add_argument("--top_k", type=int, metavar="K", help="draw from the K most probable tokens")
    how.add_argument("--top_p", type=float, metavar="P", help="draw from the nucleus of mass P")
    how.add_argument("--seed", type=_seed, help="of drawing (default: 0)")
    return how


def _add_exchange(parser: Parser, formats: tuple[str, ...]) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--format", required=True, choices=formats)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of what is written (default: as it is)",
    )
    parser.add_argument(
        "--family",
        default="",
        metavar="NAME",
        help="of Hugging Face's: t5, mt5 or umt5 (default: as the network is)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a number below 2^32, got {text!r}")
    return int(text)


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"expected two steps such as 10:12, got {text!r}")
    return int(first), int(last)


def _step(text: str) -> "Step":
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number or 'best', got {text!r}")
    return int(text)


def _add_features(parsers: Any) -> None:
    features = parsers.add_parser(
        "features",
        help="list, add, remove and unite the values of trained adapters",
        description="Works on the feature values of trained adapters: those of\n"
        "flix export --format=flix, or those of a run's newest checkpoint.",
        epilog="example:\n  flix features list --from=runs/ner_tiny\n"
        "  flix features add language=rw --from=runs/ner_tiny --out=exports/with_rw \\\n"
        "      --init=family-mean",
    )
    features.set_defaults(parser=features)
    edits = features.add_subparsers(title="commands", metavar="NAME", parser_class=Parser)
    table = _command(
        edits,
        "list",
        commands.features_list,
        "print rank, dropout, norm and parameters of every value",
        "Prints a line for every value; the norm is that of its update over all layers.",
        "  flix features list --from=runs/ner_tiny",
    )
    _add_adapters(table)
    add = _command(
        edits,
        "add",
        commands.features_add,
        "add a value, which may start from others or from a LoRA of PEFT's",
        "Writes adapters with one more value; all others stay what they are. Train it with\n"
        "Run.adapters_from and Run.train_values.",
        "  flix features add language=rw --from=exports/all --out=exports/with_rw \\\n"
        "      --init=mean:sw,zu",
    )
    _add_feature(add)
    add.add_argument(
        "--init",
        default="zeros",
        metavar="HOW",
        help="what its update is: zeros; mean (of all values of the type) or mean:sw,zu; copy:sw; "
        "family-mean (of the languages of its family); peft:FOLDER, a LoRA of PEFT's "
        "(default: zeros)",
    )
    add.add_argument("--rank", type=int, metavar="N", help="of its update (default: the type's)")
    add.add_argument("--dropout", type=float, metavar="X", help="of it (default: the type's)")
    add.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of random starts (default: 0)"
    )
    add.add_argument(
        "--languages",
        default="configs/features/languages.tsv",
        metavar="FILE",
        help="the table of families (default: configs/features/languages.tsv)",
    )
    remove = _command(
        edits,
        "remove",
        commands.features_remove,
        "take a value out",
        "Writes adapters without one of their values; all others stay what they are.",
        "  flix features remove language=rw --from=exports/with_rw --out=exports/all",
    )
    _add_feature(remove)
    merge = _command(
        edits,
        "merge",
        commands.features_merge,
        "unite the values of several adapters of one base",
        "Writes the values of all of them. A value that several have must be the same in them.",
        "  flix features merge --from=exports/with_rw --from=exports/with_sn --out=exports/both",
    )
    merge.add_argument(
        "--from",
        dest="source",
        required=True,
        action="append",
        metavar="DIR",
        help="adapters, or a run; repeated, and of each type the first decides the order",
    )
    _add_out(merge)


def _add_feature(parser: Parser) -> None:
    parser.add_argument("feature", metavar="TYPE=VALUE", help="for example language=rw")
    _add_adapters(parser)
    _add_out(parser)


def _add_adapters(parser: Parser) -> None:
    parser.add_argument(
        "--from", dest="source", required=True, metavar="DIR", help="adapters, or a run"
    )


def _add_out(parser: Parser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command but for `--gin.` flags, which `main` takes out beforehand."""
    parser = Parser(prog="flix", description=DESCRIPTION, epilog=EPILOG)
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)

    train = _command(
        parsers,
        "train",
        commands.train,
        "train a run, or go on with it",
        "Trains what the gin files describe (Run) and writes checkpoints, metrics and the\n"
        "operative config to the run's folder. Started again there, it goes on.",
        "  flix train --gin_file=configs/experiments/ner_tiny.gin \\\n"
        "      --gin.DATA_DIR=\"'data/xtreme_up_v1.1'\" --run_dir=runs/ner_tiny",
    )
    _add_run_dir(train, "folder of the run; local or in a bucket (gs://...)")
    train.add_argument(
        "--profile",
        type=_steps,
        metavar="FIRST:LAST",
        help="steps of which a trace for TensorBoard and xprof is written to the run's profile/",
    )
    _add_allow_changes(train)
    train.add_argument(
        "--strict",
        action="store_true",
        help="refuse to go on where the newest checkpoint is damaged; else it is set aside, and "
        "the newest sound one is taken",
    )
    train.add_argument(
        "--check_parity",
        action="store_true",
        help="before the first step, compare loss and gradient norm of one batch with those in "
        "float32, and refuse to train where they differ by more than rounding can explain",
    )
    _add_grace(train)
    _add_processes(train)
    _add_gin(train, required=True)

    check = _command(
        parsers,
        "check",
        commands.check,
        "look for mistakes in a run, or in a sweep, without computing",
        "Reads the gin files, the data and the base's names and shapes, and tells everything that\n"
        "would stop the run, a line for each. Every job begins with the same checks.",
        "  flix check --gin_file=configs/experiments/ner_tiny.gin \\\n"
        "      --gin.DATA_DIR=\"'data/xtreme_up_v1.1'\" --run_dir=runs/ner_tiny",
    )
    check.add_argument(
        "--run_dir",
        type=_folder,
        metavar="DIR",
        help="folder that the run would be started in (default: none)",
    )
    _add_allow_changes(check)
    _add_gin(check, required=True)

    plan = _command(
        parsers,
        "plan",
        commands.plan,
        "what a run needs of a pod, with none here",
        "Compiles the run's training step and its decoding for a topology and prints memory by\n"
        "kind, whether it fits, step time, collectives, and what would help. TPUs are compiled\n"
        "for by their own compiler (extra 'tpu'), which needs none; without it the analytic part\n"
        "is printed.",
        "  flix plan --gin_file=configs/experiments/xtreme_up.gin --topology=v5e:8x8 \\\n"
        "      --gin.DATA_DIR=\"'data/xtreme_up_v1.1'\" --gin.BASE=\"'mt5_base'\" \\\n"
        "      --gin.VOCABULARY=\"'mc4.model'\"",
    )
    plan.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="v5e:16x16, v4:4x4x4, v5p:8x8x8, v6e:16x16, several slices v5e:16x16*2, or cpu:8",
    )
    plan.add_argument(
        "--search", action="store_true", help="try meshes, remat and microbatches, and rank them"
    )
    plan.add_argument("--out", metavar="FILE", help="markdown file to write, too")
    _add_gin(plan, required=True)

    launching.add_launch(parsers, _command, GIN_HELP)
    checkpoint_commands.add_checkpoints(parsers, _command, Parser)
    diagnosis_commands.add_diagnose(parsers, _command, _add_gin)

    evaluate = _command(
        parsers,
        "evaluate",
        commands.evaluate,
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
    _add_grace(evaluate)
    _add_processes(evaluate)
    _add_gin(evaluate, required=False)

    infer = _command(
        parsers,
        "infer",
        commands.infer,
        "apply a run to text of yours",
        "Reads a jsonl file with an 'input' on each line, or a file of text, an input a line, and\n"
        "writes jsonl with a 'prediction' on each. The features of a line are its own fields\n"
        "(task, language, ...) or, where it has none, those of --features. The same command goes\n"
        "on where one that was interrupted stood.",
        "  flix infer --run_dir=runs/ner_tiny --input=in.jsonl --output=out.jsonl \\\n"
        "      --features=task=ner,language=sw",
    )
    _add_run_dir(infer, "folder of a trained run")
    infer.add_argument("--input", required=True, metavar="FILE", help="jsonl or text to read")
    infer.add_argument(
        "--input_form",
        choices=("jsonl", "text"),
        help="what --input is (default: text if it ends in .txt, else jsonl)",
    )
    infer.add_argument("--output", required=True, metavar="FILE", help="jsonl file to write")
    _add_chosen_features(infer, "features of every line that has none of its own")
    infer.add_argument(
        "--override", action="store_true", help="--features go before those of the lines"
    )
    _add_decoding(infer, "Greedy by default.").add_argument(
        "--fold",
        default="auto",
        choices=("auto", "always", "never"),
        help="fold the adapters into the network first, where all lines have the same features "
        "(default: auto, with a float32 base)",
    )
    _add_step(infer)
    _add_grace(infer)
    _add_gin(infer, required=False)

    chat = _command(
        parsers,
        "chat",
        commands.chat,
        "type inputs and see what a run predicts",
        "Answers every line that is typed with the best predictions. Features and the number of\n"
        "predictions can be changed on the way; ':help' tells how.",
        "  flix chat --run_dir=runs/ner_tiny --features=task=ner,language=sw",
    )
    _add_run_dir(chat, "folder of a trained run")
    _add_chosen_features(chat, "features at the start")
    _add_decoding(chat, "Four beams by default.")
    _add_step(chat)
    _add_gin(chat, required=False)

    export = _command(
        parsers,
        "export",
        commands.export,
        "write what a run has trained, for others to load",
        "Writes the adapters alone (flix), a LoRA that is one set of features (peft), or a whole\n"
        "network with one set of features folded into it (huggingface, t5x, t5x_scanned).",
        "  flix export --run_dir=runs/ner_tiny --out=exports/ner_sw --format=peft \\\n"
        "      --features=task=ner,language=sw",
    )
    _add_run_dir(export, "folder of a trained run")
    _add_exchange(export, ("flix", "huggingface", "t5x", "t5x_scanned", "peft"))
    export.add_argument(
        "--features",
        default="",
        metavar="TYPE=VALUE,...",
        help="the set of features, for example task=ner,language=sw",
    )
    _add_step(export)
    _add_gin(export, required=False)

    convert = _command(
        parsers,
        "convert",
        commands.convert,
        "write a network in another format",
        "Reads a folder of Hugging Face's or a checkpoint of T5X's, in any of its layouts, and\n"
        "writes it as one of them. Nothing of it is computed, and little held in memory.",
        "  flix convert --from=mt5_base/checkpoint_1000000 --out=mt5_base_hf --format=huggingface",
    )
    convert.add_argument(
        "--from", dest="source", required=True, metavar="PATH", help="local or in a bucket"
    )
    _add_exchange(convert, ("huggingface", "t5x", "t5x_scanned"))

    _add_features(parsers)

    submission = _command(
        parsers,
        "submission",
        commands.submission,
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
        "--step",
        type=_step,
        metavar="N|best",
        help="evaluated checkpoint; 'best' is that of Evaluation.keep_best (default: the latest)",
    )
    submission.add_argument(
        "--partial", action="store_true", help="leave cells out that lack predictions, and say so"
    )
    _add_gin(submission, required=False)

    sweep = _command(
        parsers,
        "sweep",
        commands.sweep,
        "train and compare several runs",
        "Trains and evaluates every run of a Sweep, then writes the table and picture that\n"
        "compare them. Runs that are done already are not repeated.",
        "  flix sweep --gin_file=configs/sweeps/babel_quickstart.gin --run_dir=runs/quickstart",
    )
    _add_run_dir(sweep, "folder for all runs of the sweep")
    sweep.add_argument(
        "--dry_run",
        action="store_true",
        help="print the trials, the programs that they share, and what they cost, and stop",
    )
    sweep.add_argument(
        "--worker",
        metavar="I/N",
        help="one of N workers on the same folder, which may be on several machines; each takes "
        "trials that no other has",
    )
    _add_grace(sweep)
    _add_gin(sweep, required=True)

    report = _command(
        parsers,
        "report",
        commands.report,
        "print the comparison of a sweep again",
        "Reads the scores under a sweep's folder and writes its table and picture anew.",
        "  flix report --run_dir=runs/quickstart",
    )
    _add_run_dir(report, "folder of a sweep")

    data = parsers.add_parser(
        "data",
        help="describe data, or write those of an embedded benchmark",
        description="Describes data, or writes generated ones, in XTREME-UP's folder layout.",
        epilog="example:\n  flix data describe --data_dir=data/xtreme_up_v1.1\n"
        "  flix data babel --out=data/babel --seed=1",
    )
    data.set_defaults(parser=data)
    benchmarks = data.add_subparsers(title="commands", metavar="NAME", parser_class=Parser)
    babel = _command(
        benchmarks,
        "babel",
        commands.data_babel,
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
        commands.data_describe,
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
        "--on_bad_record",
        choices=("error", "skip"),
        help="with --data_dir: 'skip' leaves out what cannot be read and counts it "
        "(default: error)",
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
    launching.add_gin_import(group)

    download = parsers.add_parser(
        "download",
        help="fetch a published benchmark",
        description="Fetches published data into XTREME-UP's folder layout.",
        epilog="example:\n  flix download xtreme_up --out=data",
    )
    download.set_defaults(parser=download)
    published = download.add_subparsers(title="benchmarks", metavar="NAME", parser_class=Parser)
    xtreme_up = _command(
        published,
        "xtreme_up",
        commands.download_xtreme_up,
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
