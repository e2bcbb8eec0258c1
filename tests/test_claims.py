"""A trial has one worker at most, and a worker that is gone has none."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest

from flix_jax.evaluation.scoreboard import Scoreboard
from flix_jax.experiments.claims import Claims
from flix_jax.experiments.sweep import Sweep
from flix_jax.experiments.trial_records import Outcome
from flix_jax.experiments.workers import run_sweep

AXES = {"rank": tuple(range(1, 13))}


def claim_file(folder):
    (path,) = (folder / "claims").iterdir()
    return path


def test_one_worker_at_a_time(tmp_path):
    with Claims() as first, Claims() as second:
        assert first.take(tmp_path) and not second.take(tmp_path)
        assert second.holder(tmp_path) == first.name
        first.give_back(tmp_path)
        assert second.take(tmp_path) and not first.take(tmp_path)
    assert not list((tmp_path / "claims").iterdir())


def test_a_claim_that_is_not_renewed_expires(tmp_path):
    with Claims() as first, Claims() as second:
        assert first.take(tmp_path)
        path = claim_file(tmp_path)
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"time": time.time() - 299}))
        assert not second.take(tmp_path)
        path.write_text(json.dumps(record | {"time": time.time() - 301}))
        assert second.take(tmp_path)


def test_a_claim_is_renewed_while_it_is_held(tmp_path):
    with Claims(expires=0.5) as first, Claims(expires=0.5) as second:
        assert first.take(tmp_path)
        time.sleep(1.0)
        assert not second.take(tmp_path)


def test_the_claim_of_a_killed_process_expires_at_once(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from flix_jax.experiments.claims import Claims\n"
        "claims = Claims()\n"
        "assert claims.take(sys.argv[1])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert claim_file(tmp_path)
    with Claims() as claims:
        assert claims.take(tmp_path)


def test_a_claim_from_another_machine_is_believed(tmp_path):
    with Claims() as claims:
        (tmp_path / "claims").mkdir()
        record = {"host": "elsewhere", "pid": 1, "process": "0", "time": time.time()}
        (tmp_path / "claims" / "elsewhere-1.json").write_text(json.dumps(record))
        assert not claims.take(tmp_path)
        assert claims.holder(tmp_path) == "elsewhere-1"


def test_one_who_waits_comes_after_the_one_who_has_it(tmp_path):
    said = []
    with Claims() as first, Claims() as second:
        assert first.take(tmp_path)
        threading.Timer(0.3, first.give_back, [tmp_path]).start()
        second.wait_for(tmp_path, poll=0.05, say=said.append)
        assert not first.take(tmp_path)
    assert said == [f"{tmp_path}: waiting for {first.name}"]


def work(folder, index, count):
    """A worker whose trials leave a mark each, with a pause in which others may come."""

    def run_trials(assignments):
        outcomes = []
        for bindings, trial_folder, _ in assignments:
            time.sleep(0.02)
            with open(folder / "ran.txt", "a") as file:
                file.write(f"{trial_folder.name}\n")
            rank = float(bindings[0].split("=")[1])
            board = Scoreboard({"ner/sw": {"exact_match": rank, "examples": 3}}, {"ner/sw": "seen"})
            outcomes.append(Outcome({"validation": board}))
        return outcomes

    sweep = Sweep("grid", axes=AXES)
    programs = [(0, 1, 2), (3, 4, 5), (6,), (7,), (8, 9, 10, 11)]
    records = run_sweep(
        sweep,
        folder,
        run_trials,
        programs=programs,
        worker=(index, count),
        log=lambda line: None,
        poll=0.05,
    )
    assert [record.state for record in records] == ["finished"] * 12


@pytest.mark.parametrize("count", [2, 4])
def test_workers_on_one_folder_run_every_trial_once(tmp_path, count):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(tmp_path, i, count)) for i in range(1, count + 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    ran = (tmp_path / "ran.txt").read_text().split()
    assert sorted(ran) == sorted(trial.name for trial in Sweep("grid", axes=AXES).trials())
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["finished"] * 12
    assert not [path for path in tmp_path.glob("trials/*/claims/*") if os.path.exists(path)]
