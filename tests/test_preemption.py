"""Being asked to stop: nothing is lost, nothing is done twice, and the line says what was saved."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from test_training import TYPES, arrays
from tiny_runs import make_base_run, write_words

from flix_jax import cli, preemption
from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data.cells import Mixture
from flix_jax.evaluation import evaluator, files
from flix_jax.experiments import training
from flix_jax.experiments.run import Evaluation
from flix_jax.training import loop
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.reporting import Reporter, read_metrics
from flix_jax.training.step import TrainState

STEPS = 12
TIMES = ("per_second", "data_wait", "mfu", "device_memory")


def ask(number=signal.SIGTERM):
    """A signal that is known of when this returns."""
    os.kill(os.getpid(), number)
    end = time.monotonic() + 10
    while not preemption._watch._stop_at == 0 and time.monotonic() < end:
        time.sleep(0.001)


def lines(run_dir):
    return [
        {name: value for name, value in line.items() if not any(t in name for t in TIMES)}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


class Store:
    """Checkpoints in memory, as the loop uses them."""

    def __init__(self):
        self.saved, self.values, self.log = {}, {}, []

    def check(self):
        """Nothing fails here."""

    def save(self, state, data_state, value=None):
        step = int(state.step)
        assert step not in self.saved
        self.saved[step] = float(state.trained), json.loads(json.dumps(data_state))
        self.log.append(step)
        if value is not None:
            self.values[step] = value

    def set_value(self, step, value):
        assert step in self.saved and step not in self.values
        self.values[step] = value

    def improves(self, value):
        return value is not None and value > max(self.values.values(), default=-1.0)

    def wait(self):
        pass


class Batches:
    def __init__(self, step):
        self.step = step

    def __next__(self):
        self.step += 1
        return float(np.random.default_rng(self.step).normal())

    def state(self):
        return {"step": self.step}


def attempt(folder, store, steps, asked_at=(), interrupted_at=(), log_every=3, log=None):
    """Trains from the newest of the stored states to the end, or to where it is asked to stop."""
    first = max(store.saved, default=0)
    value, data = store.saved.get(first, (0.0, {}))
    left, unscored = set(asked_at), set(interrupted_at)
    executed = [] if log is None else log

    def step_fn(state, frozen, batch, seed):
        step = int(state.step) + 1
        executed.append(step)
        if step in left and step > first + 1:
            left.remove(step)
            ask()
        moved = state.trained * 0.5 + batch
        metrics = {"loss": moved, "accuracy": moved**2, "tokens": jnp.float32(step)}
        return TrainState(jnp.int32(step), moved, None), metrics

    def evaluate(step, trained):
        if step in unscored:
            ask()
            preemption.check()
        return {"up/x": {"score": float(trained) % 1}}

    with Reporter(
        folder,
        total_steps=steps,
        start_step=first,
        log_every=log_every,
        wait_seconds=lambda: 0.0,
        show=False,
        resumed=data.get(loop.REPORT),
    ) as reporter:
        loop.fit(
            TrainState(jnp.int32(first), jnp.float32(value), None),
            None,
            step_fn=step_fn,
            seed=0,
            batches=Batches(first),
            checkpoints=store,
            reporter=reporter,
            total_steps=steps,
            saves_at=lambda step: step == steps or step % 5 == 0,
            eval_every=4,
            evaluate=evaluate,
            judge=lambda scores: scores["up/x"]["score"],
            unevaluated=data.get(loop.UNEVALUATED, False),
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    store, folder = Store(), tmp_path_factory.mktemp("undisturbed")
    attempt(folder, store, STEPS)
    return store, lines(folder)


@pytest.mark.parametrize(
    ("asked", "interrupted"),
    [((stop,), ()) for stop in range(2, STEPS + 1)]
    + [((), (stop,)) for stop in range(4, STEPS + 1, 4)]
    + [((3, 6, 10), ()), ((2,), (4, 8, 12)), ((7, 11), (8,))],
)
def test_a_stopped_loop_goes_on_as_if_it_had_not_been(undisturbed, tmp_path, asked, interrupted):
    whole, expected = undisturbed
    store, executed = Store(), []
    for _ in range(20):
        try:
            with preemption.installed():
                attempt(
                    tmp_path, store, STEPS, asked, set(interrupted) - set(store.saved), 3, executed
                )
            break
        except preemption.Preempted as error:
            step = executed[-1] if executed else 0
            assert step == STEPS or f"step {step} of {STEPS} is saved" in str(error)
    else:
        pytest.fail("it does not come to its end")
    assert executed == list(range(1, STEPS + 1))
    assert lines(tmp_path) == expected
    assert store.values == whole.values
    for step in whole.saved:
        assert store.saved[step][0] == whole.saved[step][0]


@pytest.mark.parametrize("killed_after", range(1, STEPS + 1))
def test_a_killed_loop_repeats_the_steps_since_the_last_save_alone(
    undisturbed, tmp_path, killed_after
):
    """Killed: nothing is closed, and the file is that of any moment before, or of no moment."""

    class Killed(BaseException):
        pass

    class Dying(Store):
        def wait(self):
            raise Killed

    whole, expected = undisturbed
    store, executed = Dying() if killed_after == STEPS else Store(), []
    step = Reporter.step

    def dying(self, number, metrics):
        if number > killed_after:
            raise Killed
        step(self, number, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "step", dying)
        patch.setattr(Reporter, "close", lambda self, **_: None)
        with pytest.raises(Killed):
            attempt(tmp_path, store, STEPS, log=executed)
    last = max(store.saved, default=0)
    store.__class__ = Store
    again = []
    attempt(tmp_path, store, STEPS, log=again)
    assert again == list(range(last + 1, STEPS + 1))
    assert last >= killed_after // 5 * 5
    assert lines(tmp_path) == expected and store.values == whole.values


@pytest.mark.parametrize("log_every", [1, 4, 7])
def test_windows_are_those_of_the_run_and_not_of_its_saves(tmp_path, log_every):
    attempt(tmp_path / "a", Store(), STEPS, log_every=log_every)
    steps = [line["step"] for line in lines(tmp_path / "a") if "loss" in line]
    ends, start = [], 0
    for step in range(1, STEPS + 1):  # by hand: log_every steps, or up to an evaluation or the end
        if step - start == log_every or step % 4 == 0 or step == STEPS:
            ends.append(step)
            start = step
    assert steps == ends
    tokens = [line["tokens"] for line in lines(tmp_path / "a") if "tokens" in line]
    assert tokens == [step * (step + 1) / 2 for step in ends]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_point_is_reached_after_a_signal_alone(number, status):
    with pytest.raises(preemption.Preempted) as stopped:
        with preemption.installed(), preemption.holding(), preemption.phase("decoding"):
            assert not preemption.reached()
            preemption.check()
            ask(number)
            assert preemption.reached()
            preemption.check()
    assert stopped.value.status == status and "stopped while decoding" in str(stopped.value)


def test_a_signal_that_no_point_meets_stops_at_the_end():
    with pytest.raises(preemption.Preempted, match="stopped by SIGTERM: all was saved; the same"):
        with preemption.installed(), preemption.holding():
            ask()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_error_goes_before_a_stop():
    with pytest.raises(KeyError), preemption.installed(), preemption.holding():
        ask()
        raise KeyError


def test_a_grace_must_be_above_zero(capsys):
    arguments = ["train", "--gin_file=x.gin", "--run_dir=x", "--grace_seconds=0"]
    assert cli.main(arguments) == cli.USER_ERROR
    assert capsys.readouterr().err == "error: --grace_seconds=0: expected more than 0\n"


# What a process does, told by what it says: {work} is done in the main thread.
SCRIPT = """
import ctypes, signal, sys, time
from flix_jax import preemption

def busy(seconds):  # as a compiler is: no bytecode of this thread runs, and no signal ends it
    signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM, signal.SIGINT}})
    ctypes.CDLL(None).sleep(seconds)

with preemption.installed({grace}):
    {work}
"""


def start(work, grace=30.0):
    return begun(SCRIPT.format(grace=grace, work=work))


def begun(text):
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process, seconds):
    """What it said, if it ends within so many seconds."""
    said = process.communicate(timeout=seconds)[1]
    return process.returncode, said


COMPILING = "with preemption.phase('compiling'): print('ready', flush=True); busy(60)"
HOLDING = "with preemption.holding(): print('ready', flush=True); busy(60)"


def test_with_nothing_to_save_a_process_ends_at_once_whatever_it_does():
    process = start(COMPILING)
    process.send_signal(signal.SIGTERM)
    status, said = ended(process, 5)
    assert status == 75
    assert said == (
        "stopped by SIGTERM while compiling: there was nothing to save; the same command goes on "
        "from there\n"
    )


def test_ctrl_c_ends_it_with_another_status():
    process = start(COMPILING)
    process.send_signal(signal.SIGINT)
    status, said = ended(process, 5)
    assert status == 130 and said.startswith("interrupted while compiling")


def test_after_its_grace_it_is_ended():
    process = start(HOLDING, grace=1.5)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    status, said = ended(process, 10)
    assert 1.0 < time.monotonic() - started < 5
    assert status == 75 and "not done within the grace of 1.5 s" in said


def test_a_second_signal_ends_it_at_once_but_not_the_same_one_passed_on():
    process = start(HOLDING)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    status, said = ended(process, 5)
    assert status == 75 and "again while starting: ended without saving more" in said


def test_a_few_writes_are_not_broken():
    work = "with preemption.unbroken(): print('ready', flush=True); time.sleep(0.6); print('whole')"
    process = start(work + "; sys.stdout.flush()\n    busy(60)")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "whole\n"
    assert ended(process, 5)[0] == 75


ENDING = """
import atexit, os, sys, time
from flix_jax import preemption

def wait(seconds, write=os.write, sleep=time.sleep):  # as modules are gone at the very end
    write(1, b"ready\\n")
    sleep(seconds)

class Late:
    def __del__(self, wait=wait):
        wait(0.5)

with preemption.installed(30, to_the_end=True):
    {work}
sys.exit(3)
"""


def test_sigterm_while_others_end_is_still_taken():
    # As JAX, which waits there for other processes.
    process = begun(ENDING.format(work="atexit.register(wait, 60)"))
    process.send_signal(signal.SIGTERM)
    status, said = ended(process, 5)
    assert status == 75 and said.startswith("stopped by SIGTERM while ending: there was nothing")


def test_sigterm_at_the_very_end_leaves_the_status():
    # Python has taken the handlers away when what is left is deleted.
    process = begun(ENDING.format(work="sys.late = Late()"))
    process.send_signal(signal.SIGTERM)
    assert ended(process, 5)[0] == 3


def test_errors_pass_through_to_the_end():
    process = begun(ENDING.format(work="wait(0); sys.exit(4)"))
    assert ended(process, 5)[0] == 4


def test_temporary_files_of_processes_that_are_gone_are_removed(tmp_path):
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    names = [
        f".a.json.{files._HERE}.{int(gone.stdout)}.tmp",
        f".a.json.{files._HERE}.{os.getpid()}.tmp",
    ]
    names += [".a.json.another-host.1.tmp", "a.json", ".tmp"]
    (tmp_path / "evaluations").mkdir()
    for name in names:
        (tmp_path / "evaluations" / name).write_text("")
    files.clear(tmp_path)
    assert {path.name for path in tmp_path.rglob("*.*")} == set(names[1:])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    return dataclasses.replace(
        base,
        base=base,
        adapters=AdapterSpec(FeatureSpace(TYPES), dropout=0.1),
        mixture=Mixture(held_out=("up/x", "*/z"), rates={"up/*": 3.0, "*": 1.0}),
        optimizer=Optimizer("adamw", Schedule(learning_rate=1e-2)),
        total_steps=STEPS,
        save_every=5,
        log_every=3,
        evaluation=Evaluation(batch_size=8, every=4, keep_best="mean_seen"),
    )


def listing(run_dir):
    """Paths in a run's folder, but for what orbax and TensorBoard name at random."""
    found = set()
    for path in run_dir.rglob("*"):
        parts = path.relative_to(run_dir).parts
        if parts[0] != "tensorboard":
            found.add(parts[:3] if parts[0] == "checkpoints" else parts)
    return found


@pytest.mark.exhaustive
def test_a_run_that_was_asked_to_stop_ends_as_one_that_was_not(run, tmp_path, monkeypatch):
    bases_dir, whole, stopped = (tmp_path / name for name in ("bases", "whole", "stopped"))
    training.train(run, whole, bases_dir=bases_dir)
    steps, batches, left = [], [], {7, 11}
    reported, predict = Reporter.step, evaluator.predict_in_batches

    def step(self, number, metrics):
        steps.append(number)
        reported(self, number, metrics)
        if number in left:
            left.remove(number)
            ask()

    def asking(*arguments):
        for batch in predict(*arguments):
            batches.append(batch)
            yield batch
            if len(batches) == 2:
                ask()

    monkeypatch.setattr(Reporter, "step", step)
    monkeypatch.setattr(evaluator, "predict_in_batches", asking)
    for number in (4, 7, 11):
        with pytest.raises(preemption.Preempted) as error, preemption.installed():
            training.train(run, stopped, bases_dir=bases_dir)
        more = ", to be evaluated" if number == 4 else ""
        assert f": step {number} of {STEPS} is saved{more};" in str(error.value)
    training.train(run, stopped, bases_dir=bases_dir)
    assert steps == list(range(1, STEPS + 1))
    assert lines(stopped) == lines(whole)
    assert listing(stopped) == listing(whole)
    for name in sorted(path.name for path in (whole / "checkpoints").iterdir()):
        got, expected = arrays(stopped, int(name)), arrays(whole, int(name))
        assert got.keys() == expected.keys()
        for array, value in expected.items():
            np.testing.assert_array_equal(got[array], value, err_msg=array)
    texts = itertools.chain((whole / "evaluations").rglob("*.json*"), [whole / "best.json"])
    for path in texts:
        assert (stopped / path.relative_to(whole)).read_bytes() == path.read_bytes()
