"""Sweeps as a user types them: together and alone, killed and started again, and mistakes."""

import csv
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tiny_runs import write_gin

from flix_jax import cli
from flix_jax.training.reporting import read_metrics

SWEEP = """
include 'run.gin'
SEED = 0
STEPS = 12
Run.seed = %SEED
Run.total_steps = %STEPS
Run.save_every = 3
Run.log_every = 1
Sweep.name = 'dropout and rank'
Sweep.seeds = (0, 1)
Sweep.trials_per_program = 8
Sweep.axes = {'FeatureType.dropout, FeatureType.rank': ((0.0, 1), (0.5, 2))}
Run.data_seed = 0
base/Run.seed = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_gin(tmp_path_factory.mktemp("sweep"), sweep=SWEEP)


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def flags(run_dir, *more):
    return ["sweep", "--gin_file=sweep.gin", "--gin.DATA_DIR='data'", f"--run_dir={run_dir}", *more]


def scores(run_dir):
    """All that a sweep found, by trial and split; not how long it took."""
    with open(run_dir / "trials.csv") as file:
        rows = list(csv.DictReader(file))
    timed = ("seconds", "step_seconds")
    return [{name: text for name, text in row.items() if name not in timed} for row in rows]


@pytest.fixture(scope="module")
def together(folder):
    """The sweep whose trials train as one program."""
    os.chdir(folder)
    assert cli.main(flags("together")) == 0
    return folder / "together"


@pytest.mark.exhaustive
def test_a_sweep_together_is_the_sweep_one_after_another(folder, together):
    alone = folder / "alone"
    assert cli.main(flags("alone", "--gin.Sweep.trials_per_program=1")) == 0
    trials = sorted(path.name for path in (alone / "trials").iterdir())
    assert len(trials) == 4 and len(list((together / "programs").iterdir())) == 1
    for trial in trials:
        ours, theirs = (
            read_metrics(root / "trials" / trial / "metrics.jsonl") for root in (together, alone)
        )
        assert len(ours) == 12
        for one, other in zip(ours, theirs, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert scores(together) == scores(alone)


@pytest.mark.exhaustive
def test_a_sweep_that_is_killed_at_random_ends_as_if_it_had_not_been(folder, together):
    kills = int(os.environ.get("FLIX_TEST_KILLS", "3"))
    draw = random.Random(int(os.environ.get("FLIX_TEST_SEED", "0")))
    command = [sys.executable, "-m", "flix_jax.cli", *flags("killed")]
    for _ in range(kills):
        with open(folder / "killed.log", "a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            time.sleep(draw.uniform(5, 30))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert scores(folder / "killed") == scores(together)


def test_a_dry_run_tells_trials_and_costs_and_writes_nothing(folder, capsys):
    assert cli.main(flags("dry", "--dry_run", "--gin.Sweep.seeds=(0,)")) == 0
    out = capsys.readouterr().out
    assert "2 trials in 1 programs" in out
    assert "FeatureType.dropout = 0.5; FeatureType.rank = 2; SEED = 0" in out
    assert "MiB" in out and "of training on this machine" in out
    assert "Run.length_buckets" not in out
    assert not (folder / "dry").exists()


@pytest.mark.exhaustive
def test_a_dry_run_says_which_batches_it_has_timed(folder, capsys):
    longest = flags("dry", "--dry_run", "--gin.Sweep.seeds=(0,)", "--gin.Run.length_buckets=2")
    assert cli.main(longest) == 0
    assert "steps are those of the longest batches" in capsys.readouterr().out


AXES = "--gin.Sweep.axes="


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (AXES + "{'FeatureTyp.rank': (1, 2)}", "did you mean 'FeatureType'"),
        (AXES + "{'FeatureType.rnk': (1, 2)}", "did you mean 'rank'"),
        (AXES + "{'FeatureType.rank': ('two',)}", "rank is 'two', expected"),
        (AXES + "{'FeatureType.rank': (0,)}", "rank is 0, expected an integer of at least 1"),
        (AXES + "{'FeatureType.rank': ()}", "'FeatureType.rank': expected {label: bindings}"),
        (
            AXES + "{'FeatureType.rank': (1,), 'a': {'b': ('FeatureType.rank = 2',)}}",
            "FeatureType.rank is set by axis 'FeatureType.rank' and by axis 'a'",
        ),
        ("--gin.Sweep.metric='span_f1'", "Sweep.metric='span_f1' is no metric of the task"),
        ("--gin.Sweep.metric='exact_mach'", "did you mean 'exact_match'"),
        ("--gin.Sweep.report_on='tset'", "no cell has the split 'tset'"),
        (
            "--gin.Sweep.group='unseen_language'",
            "no cell of 'validation' is of it, only of seen, unseen",
        ),
        ("--worker=3/2", "i counts from 1 to n"),
        ("--worker=one", "expected i/n, such as 1/2"),
        ("--gin.Sweep.samples=3", "Sweep.random of 0 axes needs Sweep.samples"),
    ],
)
def test_mistakes_are_one_line_before_any_compute(folder, capsys, more, message):
    axis = "FeatureType.dropout, FeatureType.rank"
    choose = (f"--gin.Sweep.choose=('{axis}',)",) if "group" in more else ()
    assert cli.main(flags("mistake", more, *choose)) == cli.USER_ERROR
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (folder / "mistake").exists()


@pytest.mark.exhaustive
def test_the_folder_of_another_sweep_is_refused(together, capsys):
    assert cli.main(flags("together", "--gin.Sweep.name='other'")) == cli.USER_ERROR
    assert "holds a sweep of name" in capsys.readouterr().err
