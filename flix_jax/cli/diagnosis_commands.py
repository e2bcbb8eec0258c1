"""`flix diagnose`: its flags, and what it does with them."""

import argparse
from collections.abc import Callable
from typing import Any

from flix_jax.cli import commands


def add_diagnose(parsers: Any, command: Callable[..., Any], add_gin: Callable[..., None]) -> None:
    """Adds the command to `parsers`; `command` makes its parser, `add_gin` the flags of gin."""
    parser = command(
        parsers,
        "diagnose",
        diagnose,
        "make one training step again, and look at every module",
        "Makes a step again, from its dump (a step that was not finite has one) or from the last\n"
        "checkpoint before it, and prints what every module makes, forward, and the gradient of\n"
        "every parameter: the largest absolute value, and whether all of it is finite.",
        "  flix diagnose --run_dir=runs/a\n  flix diagnose --run_dir=runs/a --step=1200",
    )
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--step", type=int, metavar="N", help="the step, from 1 (default: the last one dumped)"
    )
    add_gin(parser, required=False)


def diagnose(arguments: argparse.Namespace) -> None:
    run, config = commands._build(arguments, commands._saved_config(arguments))
    from flix_jax.experiments import diagnosis

    with config.placing_errors():
        print(diagnosis.diagnose(run, arguments.run_dir, step=arguments.step).text())
