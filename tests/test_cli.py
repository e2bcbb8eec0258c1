"""The command line answers at once, teaches, and puts every mistake in one line."""

import subprocess
import sys
import time

import pytest

from flix_jax import cli
from flix_jax.mistakes import Mistakes

COMMANDS = ("train", "check", "evaluate", "infer", "sweep", "report", "data")


def test_what_is_logged_is_a_line_of_the_command():
    code = """
import logging
from flix_jax import cli
try:
    cli.main(["--help"])
finally:
    logging.info("nothing to be told")
    logging.getLogger("flix_jax.x").warning("cut at %d tokens", 5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "warning: cut at 5 tokens\n"


def test_help_takes_under_two_seconds_and_imports_nothing_heavy():
    code = """
import sys
from flix_jax import cli
try:
    cli.main(["--help"])
finally:
    heavy = {"jax", "flax", "numpy", "tensorflow", "seqio", "gin", "matplotlib"} & set(sys.modules)
    assert not heavy, heavy
"""
    seconds = []
    for _ in range(3):  # the fastest of three, since tests run beside others
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 2.0
    for command in COMMANDS:
        assert f"    {command}" in done.stdout


@pytest.mark.parametrize("command", [*COMMANDS, "data babel"])
def test_every_command_explains_itself_by_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "example:" in text and f"flix {command}" in text.split("example:")[1]
    assert all(len(line) <= 100 for line in text.splitlines())


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err


MISTAKES = {
    "trian": "unknown command 'trian'; did you mean 'train'?",
    "data babl --out=x": "unknown command 'data babl'; did you mean 'babel'?",
    "data": "a command is missing: babel",
    "train --run_dri=x": "flix train has no flag --run_dri; did you mean '--run_dir'",
    "train --gin_file=x.gin": "the following arguments are required: --run_dir",
    "train --run_dir=x": "the following arguments are required: --gin_file",
    "train --run_dir=x --gin_file=no.gin": "no gin file 'no.gin'",
    "train --run_dir=x --gin_file=x.gin --gin.Rnu.seed=3": "--gin.Rnu.seed=3: unknown name 'Rnu'",
    "train --run_dir=x --gin_file=x.gin --gin.DATA_DIR=x": "--gin.DATA_DIR=\"'x'\"",
    "train --run_dir=x --gin_file=x.gin": "required and not given: DATA_DIR (where it is, x.gin:1)",
    "evaluate --run_dir=no_run": "no_run holds no run: there is no no_run/config.gin",
    "evaluate --run_dir=x --step=last": "argument --step: expected a number or 'best', got 'last'",
    "evaluate --run_dir=x --confidence=x": "argument --confidence: invalid float value: 'x'",
    "report --run_dir=x --gin.X=1": "flix report takes no --gin. flags, got --gin.X=1",
    "train more": "unrecognized arguments: more",
}


@pytest.mark.parametrize("line, expected", MISTAKES.items(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_status_2(line, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.gin").write_text(
        "DATA_DIR = %gin.REQUIRED  # where it is\nRun.source = @XtremeUp()\n"
        "XtremeUp.data_dir = %DATA_DIR\n"
    )
    if line == "train more":
        line = "train --run_dir=x --gin_file=x.gin more"
    assert cli.main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert expected in captured.err


def run_that(error):
    def run(arguments):
        raise error

    return run


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("rank is -1,\n  expected at least 1"), "rank is -1, expected at least 1"),
        (FileNotFoundError(2, "No such file or directory", "x"), "x: No such file or directory"),
    ],
)
def test_what_a_command_refuses_is_one_line(error, line, monkeypatch, capsys):
    monkeypatch.setattr(cli.commands, "report", run_that(error))
    assert cli.main(["report", "--run_dir=x"]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_debug_shows_where_an_error_came_from(monkeypatch):
    monkeypatch.setattr(cli.commands, "report", run_that(ValueError("rank")))
    with pytest.raises(ValueError, match="rank"):
        cli.main(["report", "--run_dir=x", "--debug"])


def test_a_fault_of_the_program_is_not_taken_for_one_of_the_user(monkeypatch, capsys):
    monkeypatch.setattr(cli.commands, "report", run_that(KeyError("x")))
    assert cli.main(["report", "--run_dir=x"]) == cli.INTERNAL_ERROR
    told = capsys.readouterr().err
    assert told.startswith("internal error: KeyError: 'x' (at ") and told.count("\n") == 1
    assert "test_cli.py:" in told
    with pytest.raises(KeyError):
        cli.main(["report", "--run_dir=x", "--debug"])


def test_several_mistakes_are_a_line_each(monkeypatch, capsys):
    error = Mistakes([ValueError("rank is\n-1"), FileNotFoundError(2, "No such file", "x")])
    monkeypatch.setattr(cli.commands, "report", run_that(error))
    assert cli.main(["report", "--run_dir=x"]) == 2
    assert capsys.readouterr().err == "error: rank is -1\nerror: x: No such file\n"
    many = Mistakes([ValueError(f"mistake {i}") for i in range(30)])
    monkeypatch.setattr(cli.commands, "report", run_that(many))
    assert cli.main(["report", "--run_dir=x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[19:] == ["error: mistake 19", "error: and 10 more mistakes"]


def test_gin_flags_and_files_are_kept_in_order():
    line = "train --gin_file=a.gin --gin.A=1 --gin_file b.gin --gin.x/B.c='d=e' --run_dir=x"
    arguments = cli.parse(line.split())
    assert arguments.gin_file == ["a.gin", "b.gin"]
    assert arguments.bindings == ["A=1", "x/B.c='d=e'"]


def test_a_step_is_a_number_or_the_best_and_intervals_are_of_95_per_cent():
    assert cli.parse(["infer", "--run_dir=x", "--input=a", "--output=b"]).step is None
    assert cli.parse("infer --run_dir=x --input=a --output=b --step=20".split()).step == 20
    arguments = cli.parse("evaluate --confidence --run_dir=x --step=best".split())
    assert (arguments.step, arguments.confidence) == ("best", 0.95)
    assert cli.parse(["evaluate", "--run_dir=x", "--confidence=0.9"]).confidence == 0.9
    assert cli.parse(["evaluate", "--run_dir=x"]).confidence is None


def test_babel_is_written_by_a_command(tmp_path, capsys, monkeypatch):
    from flix_jax.tasks import babel

    calls = []

    def write(out_dir, seed, *, sizes=None, tags):
        calls.append((out_dir, seed, tags))
        return out_dir

    monkeypatch.setattr(babel, "write", write)
    assert cli.main(["data", "babel", "--out=here", "--seed=3", "--tags=none"]) == 0
    assert calls == [("here", 3, "none")] and capsys.readouterr().out == "here\n"
