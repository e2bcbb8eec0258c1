"""`flix checkpoints list | verify | prune`: their flags, and what they do with them."""

import argparse
import datetime
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flix_jax.cli.commands import UsageError

if TYPE_CHECKING:
    from flix_jax.training.stored_steps import StoredStep


def add_checkpoints(parsers: Any, command: Callable[..., Any], parser_class: type) -> None:
    """Adds the commands to those of `parsers`; `command` makes their parsers."""
    group = parsers.add_parser("checkpoints", help="list, verify and prune a run's checkpoints")
    group.set_defaults(parser=group)
    commands = group.add_subparsers(title="commands", metavar="NAME", parser_class=parser_class)
    listing = command(
        commands,
        "list",
        list_steps,
        "what checkpoints a run has",
        "Steps, when they were written, their size and the value by which the best is kept.",
        "  flix checkpoints list --run_dir=runs/a",
    )
    verify = command(
        commands,
        "verify",
        verify_steps,
        "compare checkpoints with what was written",
        "Reads every file of every checkpoint and compares it with the digest in manifest.json.\n"
        "Exit status 2 if one is damaged.",
        "  flix checkpoints verify --run_dir=runs/a",
    )
    prune = command(
        commands,
        "prune",
        prune_steps,
        "delete checkpoints",
        "Keeps the newest, the best by Evaluation.keep_best, and those of a period; deletes the\n"
        "others and damaged ones. Not while something trains in the folder.",
        "  flix checkpoints prune --run_dir=runs/a --keep=1 --dry_run",
    )
    for parser in (listing, verify, prune):
        parser.add_argument("--run_dir", required=True, metavar="DIR", help="folder of the run")
    verify.add_argument("--step", type=int, metavar="N", help="this one alone")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="newest ones to keep")
    prune.add_argument("--keep_period", type=int, metavar="N", help="keep every N-th step, too")
    prune.add_argument("--dry_run", action="store_true", help="say what would go; delete nothing")


def list_steps(arguments: argparse.Namespace) -> None:
    from flix_jax.training import stored_steps

    print(_table(stored_steps.find(arguments.run_dir, verify=False)))


def verify_steps(arguments: argparse.Namespace) -> None:
    from flix_jax.training import stored_steps

    found = stored_steps.find(arguments.run_dir, step=arguments.step, verify=True)
    print(_table(found, sound="sound"))
    damaged = [f"step {one.step}: {one.damage}" for one in found if one.damage]
    if damaged:
        raise ValueError(f"{arguments.run_dir}: damaged checkpoints: {'; '.join(damaged)}")


def prune_steps(arguments: argparse.Namespace) -> None:
    from flix_jax.training import stored_steps

    for name in ("keep", "keep_period"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value}: expected at least 1")
    gone = stored_steps.prune(
        arguments.run_dir,
        keep=arguments.keep,
        period=arguments.keep_period,
        dry_run=arguments.dry_run,
    )
    verb = "would delete" if arguments.dry_run else "deleted"
    steps = ", ".join(str(one.step) for one in gone) or "none"
    print(f"{verb} {len(gone)} checkpoints, {_size(sum(one.size for one in gone))}: {steps}")


def _table(steps: "list[StoredStep]", sound: str = "") -> str:
    from flix_jax.adapters import text_tables

    rows = [["step", "written", "size", "arrays", "value", "state"]]
    for one in steps:
        written = ""
        if one.time is not None:
            written = datetime.datetime.fromtimestamp(one.time).isoformat(" ", "seconds")
        value = "" if one.value is None else f"{one.value:.2f}"
        state = "damaged" if one.damage else sound
        rows.append([str(one.step), written, _size(one.size), str(one.arrays), value, state])
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    return text_tables.plain(rows)


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
