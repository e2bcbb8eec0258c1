"""The command line: `flix train | evaluate | infer | export | convert | sweep | …`."""

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from flix_jax import preemption
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.cli.commands import UsageError
from flix_jax.cli.flags import make_parser
from flix_jax.mistakes import Mistakes, describe

DIVERGED = 1
USER_ERROR = 2
INTERNAL_ERROR = 70
INTERRUPTED = preemption.INTERRUPTED
MOST_TOLD = 20  # mistakes at once
MISTAKES = (ValueError, OSError)  # a full disk and what a system refuses are no faults of ours


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
    # Orbax and gcsfs log with a traceback what they raise, or try again, too.
    for name in ("absl", "gcsfs", "fsspec"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class _Told(logging.Formatter):
    """As everything else that the command says on its standard error."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


def _tell_warnings() -> None:
    """Makes what is logged a line of the command's; where a program set logging up, that stays."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Told())
    logging.basicConfig(handlers=[handler])


def _lines(error: BaseException) -> str:
    """What is told of an error: a line for each mistake."""
    several = error.errors if isinstance(error, Mistakes) else (error,)
    lines = [f"error: {describe(one)}" for one in several[:MOST_TOLD]]
    if len(several) > MOST_TOLD:
        lines.append(f"error: and {len(several) - MOST_TOLD:,} more mistakes")
    return "\n".join(lines)


def _explained(error: BaseException) -> tuple[int, str] | None:
    """Exit status and lines of an error that is no fault of the program's; None of any other."""
    if isinstance(error, preemption.Preempted):
        return error.status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, FloatingPointError):
        return DIVERGED, _lines(error)
    from flix_jax import buckets

    told = buckets.mistake(error)
    if told is not None:
        return USER_ERROR, f"error: {told}"
    return (USER_ERROR, _lines(error)) if isinstance(error, MISTAKES) else None


def _internal(error: BaseException) -> tuple[int, str]:
    """Exit status and line of an error that is a fault of the program, or of what it stands on."""
    first = next(iter(str(error).splitlines()), "")[:300]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return INTERNAL_ERROR, (
        f"internal error: {type(error).__name__}: {first} (at {where.filename}:{where.lineno}; "
        "--debug shows how it came there)"
    )


def _several() -> bool:
    """Whether this is one of several processes; nothing heavy is imported to find out."""
    processes = sys.modules.get("flix_jax.processes")
    return processes is not None and processes.count() > 1


def _stop_all(error: BaseException, known: tuple[int, str] | None, debug: bool) -> NoReturn:
    """Ends this process and all others of the command, with what the first that failed said."""
    import jax

    from flix_jax import processes

    told = None
    if known is None:
        # Where a process is gone, the others fail in what they compute together.
        told = processes.cause()
        if debug:
            known = INTERNAL_ERROR, traceback.format_exc()
        elif isinstance(error, jax.errors.JaxRuntimeError):
            known = 1, f"error: {str(error).splitlines()[0]}"
        else:
            known = _internal(error)
    told = told or processes.fail(known[1], known[0])
    try:
        if told.process == processes.index():
            print(known[1], file=sys.stderr)
        elif told.message != known[1]:  # the same mistake is told once
            print(f"process {told.process}: {told.message}", file=sys.stderr)
    finally:  # whoever read it may be gone
        processes.leave(told.status)


def console() -> int:
    """`main` as the whole of a process, which heeds signals until it is gone."""
    return main(to_the_end=True)


def main(argv: Sequence[str] | None = None, *, to_the_end: bool = False) -> int:
    """Runs a command line and returns its exit status.

    0; 2 after a mistake of the user's; 1 where training diverged; 70 after a fault of the
    program's; 75 where SIGTERM has stopped what the same command goes on with, and 130 where Ctrl-C
    has.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        make_parser().print_help(sys.stderr)
        return USER_ERROR
    quiet()
    _tell_warnings()
    try:
        arguments = parse(argv)
        with contextlib.ExitStack() as stack:
            if hasattr(arguments, "grace_seconds"):
                stack.enter_context(preemption.installed(arguments.grace_seconds, to_the_end))
            arguments.run(arguments)
    except (Exception, KeyboardInterrupt, preemption.Preempted) as error:
        known, debug = _explained(error), "--debug" in argv
        if _several():
            _stop_all(error, None if debug and isinstance(error, Exception) else known, debug)
        if debug and isinstance(error, Exception):
            raise
        known = known or _internal(error)
        print(known[1], file=sys.stderr)
        return known[0]
    return 0
