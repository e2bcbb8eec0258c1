"""Several processes: one run whatever their number, and none that goes on alone."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import write_gin

from flix_jax import cli, preemption, processes
from flix_jax.experiments.run_folder import saved_steps
from flix_jax.training.checkpoints import Checkpoints
from flix_jax.training.reporting import read_metrics

STEPS = 20
SETTINGS = [
    "--gin_file=run.gin",
    "--gin.DATA_DIR='data'",
    "--gin.Run.log_every=1",
    "--gin.Run.save_every=5",
    "--gin.Run.loss_chunks=2",
    "--gin.Evaluation.every=10",
    "--gin.T5Config.dropout_rate=0.1",
    "--gin.AdapterSpec.dropout=0.1",
    "--gin.language/FeatureType.dropout=0.3",
]
SGD = ["--gin.Optimizer.name='sgd'", "--gin.Schedule.learning_rate=0.3"]
# The same for processes of which the second one meets an error at its third batch.
FAILING = """
import sys
from flix_jax import cli, processes
from flix_jax.data.pipeline import TrainPipeline

batch_at = TrainPipeline.batch_at

def failing(self, step):
    if processes.index() == 1 and step >= 3:
        raise ValueError("this disk is broken")
    return batch_at(self, step)

TrainPipeline.batch_at = failing
sys.exit(cli.main())
"""


def mesh(**sizes):
    return [f"--gin.MeshSpec.{name}={size}" for name, size in sizes.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_gin(tmp_path_factory.mktemp("processes"))
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def train(*arguments, steps=STEPS):
    """In this process, which has eight devices."""
    assert cli.main(["train", *SETTINGS, f"--gin.Run.total_steps={steps}", *arguments]) == 0


def launch(*arguments, steps=STEPS):
    """The command of two processes with four devices each, started."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "flix_jax.cli", "launch", "--local_processes=2"]
    command += ["--devices_per_process=4", *SETTINGS, *arguments]
    return subprocess.Popen(
        [*command, f"--gin.Run.total_steps={steps}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def children(process):
    """The processes that one has started, the first of the run first."""
    pid = process.pid
    return [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def finish(process):
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return said


def numbers(folder):
    """What every line of the metrics holds beside times."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if "per_second" not in k and k != "data_wait"}
        for line in lines
    ]


def close(found, expected):
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for one, other in zip(found, expected, strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-5, atol=1e-6, err_msg=name)


def trained(folder):
    with Checkpoints(folder / "checkpoints", {}, create=False) as checkpoints:
        metadata = checkpoints._manager.item_metadata(STEPS)["trained"]
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), metadata
        )
        return checkpoints.restore_trained(template)[0]


@pytest.mark.slow
def test_two_processes_train_what_one_does(folder):
    running = launch("--run_dir=two", *SGD, *mesh(data=1, fsdp=4, model=2))
    train("--run_dir=one", *SGD)
    said = finish(running)
    assert said.count("step 20/20") == 1  # one process speaks
    found, expected = numbers(folder / "two"), numbers(folder / "one")
    assert len(expected) == STEPS + 2 and expected[0]["loss"] > expected[-2]["loss"]
    close(found, expected)
    for one, other in zip(
        jax.tree.leaves(trained(folder / "two")),
        jax.tree.leaves(trained(folder / "one")),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert len(list((folder / "two" / "tensorboard").iterdir())) == 1
    for cell in ("up.x", "same.y"):
        one, other = (folder / name / "evaluations/20" / f"{cell}.jsonl" for name in ("one", "two"))
        assert one.read_text() == other.read_text()


@pytest.mark.exhaustive
def test_a_run_goes_on_in_other_numbers_of_processes(folder):
    train("--run_dir=whole")
    train("--run_dir=parts", *mesh(data=4, model=2), steps=7)
    finish(launch("--run_dir=parts", *mesh(data=4, model=2), steps=13))
    train("--run_dir=parts")

    def losses(name):
        return [line["loss"] for line in numbers(folder / name) if "loss" in line]

    np.testing.assert_allclose(losses("parts"), losses("whole"), rtol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_where_one_is_killed_the_other_stops_and_the_run_goes_on_later(folder):
    running = launch("--run_dir=killed", "--gin.Run.log_every=1000", steps=10**6)
    end = time.monotonic() + 600
    while len(saved_steps(folder / "killed")) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    first, second = children(running)
    os.kill(second, signal.SIGKILL)
    killed = time.monotonic()
    said, _ = running.communicate(timeout=60)
    assert time.monotonic() - killed < 10
    assert running.returncode == 128 + signal.SIGKILL
    assert "process 1 was killed by SIGKILL" in said
    assert not Path(f"/proc/{first}").exists()
    last = max(saved_steps(folder / "killed"))
    said = finish(launch("--run_dir=killed", steps=last + 2))
    assert f"step {last} of {last + 2}" in said
    steps = [line["step"] for line in numbers(folder / "killed") if "loss" in line]
    assert steps[-2:] == [last + 1, last + 2]


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize("asked", ["all, by the command that started them", "the second alone"])
def test_where_one_is_asked_to_stop_all_stop_at_one_step(folder, asked):
    name = f"--run_dir=asked_{len(asked)}"
    run_dir = folder / f"asked_{len(asked)}"
    often = ["--gin.Run.save_every=1000", "--gin.Run.log_every=7"]
    running = launch(name, *often, steps=10**6)
    end = time.monotonic() + 600
    while not (run_dir / "evaluations/20").exists() and time.monotonic() < end:
        time.sleep(0.1)
    pid = running.pid if asked.startswith("all") else children(running)[1]
    os.kill(pid, signal.SIGTERM)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == preemption.STATUS, said
    (stopped,) = saved_steps(run_dir)
    assert f"stopped by SIGTERM: step {stopped} of 1000000 is saved" in said
    assert "Traceback" not in said and "killed" not in said
    said = finish(launch(name, *often, steps=stopped + 9))
    assert f"step {stopped} of {stopped + 9}" in said
    train(name.replace("asked", "whole"), *often, *mesh(data=8), steps=stopped + 9)
    close(numbers(run_dir), numbers(folder / f"whole_{len(asked)}"))


@pytest.mark.slow
def test_where_one_fails_all_stop_with_what_it_said(folder, free_port):
    def start(index):
        flags = [f"--coordinator=127.0.0.1:{free_port}", "--processes=2", f"--process={index}"]
        return subprocess.Popen(
            [sys.executable, "-c", FAILING, "train", *SETTINGS, "--run_dir=failing", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "4"},
        )

    first, second = start(0), start(1)
    said = second.communicate(timeout=600)[1]
    ended = time.monotonic()
    other = first.communicate(timeout=60)[1]
    assert time.monotonic() - ended < 10
    assert (first.returncode, second.returncode) == (cli.USER_ERROR, cli.USER_ERROR)
    assert said.splitlines()[-1] == "error: this disk is broken"
    assert other.splitlines()[-1] == "process 1: error: this disk is broken"
    assert "Traceback" not in said + other


@pytest.fixture
def free_port():
    from flix_jax.experiments.launch.local import _free_port

    return _free_port()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--processes=2", "go with --coordinator"),
        ("--coordinator=auto --process=1", "finds --processes and --process itself"),
        ("--coordinator=here:1 --processes=2", "needs --processes and --process"),
        ("--coordinator=here:1 --processes=2 --process=2", "--process=2: expected 0 to 1"),
        ("--coordinator=here --processes=2 --process=1", "expected HOST:PORT, or auto"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(flags, message, capsys):
    arguments = ["train", "--gin_file=x.gin", "--run_dir=x", *flags.split()]
    assert cli.main(arguments) == cli.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --") and message in line


def test_where_no_cluster_is_found_that_is_one_line():
    command = [sys.executable, "-m", "flix_jax.cli", "train", "--coordinator=auto"]
    command += ["--gin_file=x.gin", "--run_dir=x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == cli.USER_ERROR
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --coordinator=auto: no cluster found")


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t1v-0", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_the_environment_of_a_tpu_slice_is_known(environment, several):
    assert processes._lists_workers(environment) is several


def test_a_dry_run_shows_the_commands(capsys):
    arguments = ["launch", "--local_processes=2", "--run_dir=my runs/x", "--dry_run"]
    arguments += ["--gin_file=x.gin", "--gin.A=1", "--devices_per_process=4"]
    assert cli.main(arguments) == 0
    first, second = capsys.readouterr().out.replace(" \\\n   ", "").splitlines()
    assert shlex.split(first)[:5] == [
        "env",
        "JAX_PLATFORMS=cpu",
        "JAX_NUM_CPU_DEVICES=4",
        sys.executable,
        "-m",
    ]
    flags = shlex.split(second)[5:]
    assert flags[:5] == [
        "flix_jax.cli",
        "train",
        "--gin_file=x.gin",
        "--run_dir=my runs/x",
        "--gin.A=1",
    ]
    assert flags[-1] == "--process=1" and first == second[:-1] + "0"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give one of --engine and --local_processes"),
        ("--local_processes=2 --engine=slurm", "give one of --engine and --local_processes"),
        ("--local_processes=0", "--local_processes=0: expected at least 1"),
        ("--local_processes=2 --devices_per_process=0", "--devices_per_process=0: expected"),
    ],
)
def test_launches_that_cannot_be_are_one_line(flags, message, capsys):
    arguments = ["launch", "--gin_file=x.gin", "--run_dir=x", *flags.split()]
    assert cli.main(arguments) == cli.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_alone_nothing_waits():
    assert (processes.count(), processes.index(), processes.is_first()) == (1, 0, True)
    assert processes.from_first(lambda: "value") == "value"
