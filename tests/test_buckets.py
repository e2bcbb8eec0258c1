"""Runs in a bucket: the clients themselves, against a stand-in that refuses appends and renames."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec.config
import jax
import numpy as np
import pytest
from etils import epath
from object_store import ObjectStore
from tiny_runs import make_base_run, write_gin, write_words

from flix_jax import buckets, cli
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.evaluation import files
from flix_jax.experiments import inference, prediction, training
from flix_jax.experiments.claims import Claims
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import RANDOM, Evaluation
from flix_jax.experiments.run_folder import saved_steps
from flix_jax.interop import t5x_checkpoints
from flix_jax.interop.leaves import Leaf
from flix_jax.training import manifest, tensorboard_sink
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.reporting import read_metrics

TYPES = (FeatureType("task", rank=2, dropout=0.3), FeatureType("language", rank=2, dropout=0.3))
ROOT = str(Path(__file__).parent.parent)
TIMING = ("per_second", "per_chip", "data_wait", "device_memory", "mfu")


@pytest.fixture(scope="module")
def store():
    """The stand-in, where all clients look for Google's."""
    store = ObjectStore("bucket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", store.url)  # of gcsfs and google-cloud-storage
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # of tensorstore
        patch.setitem(fsspec.config.conf["gcs"], "token", "anon")
        patch.setenv("EPATH_USE_TF", "false")
        yield store
    store.close()


@pytest.fixture(autouse=True)
def nothing_is_appended_or_renamed(store, tmp_path, monkeypatch):
    """And nothing of a bucket comes to lie in a folder of this machine that is called `gs:`."""
    monkeypatch.chdir(tmp_path)
    known = len(store.forbidden)
    yield
    assert store.forbidden[known:] == []
    assert not Path("gs:").exists()
    assert "unknown" not in {action for action, _ in store.requests}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    return dataclasses.replace(
        base,
        base=RANDOM,
        adapters=AdapterSpec(FeatureSpace(TYPES), dropout=0.1),
        optimizer=Optimizer("adamw", Schedule(learning_rate=1e-2)),
        total_steps=6,
        save_every=2,
        log_every=1,
        keep=1,
        evaluation=Evaluation(batch_size=8, every=6, keep_best="mean_seen"),
    )


@pytest.fixture(scope="module")
def local(run, tmp_path_factory):
    """The run in a folder of this machine."""
    folder = tmp_path_factory.mktemp("local")
    training.train(run, folder, config="# as it was")
    return folder


def train_and_stop(run, folder, at, store=None):
    """Trains until the step `at`, which fails; with a store, the number of requests before each."""
    made = training.step_program
    counts = []

    def program(job, *arguments):
        compiled = made(job, *arguments)

        class Stopping:
            def _cache_size(self):
                return compiled._cache_size()

            def __call__(self, state, *others):
                step = int(state.step) + 1
                if job.run == run and store is not None:
                    counts.append((step, len(store.requests)))
                if job.run == run and step == at:
                    raise KeyboardInterrupt
                return compiled(state, *others)

        return Stopping()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "step_program", program)
        training.train(run, folder, config="# as it was")
    return dict(counts)


@pytest.fixture(scope="module")
def bucket(run, store):
    """The same run in a bucket, stopped after its second save and started again."""
    folder = epath.Path("gs://bucket/runs/whole")
    train_and_stop(run, folder, at=6)
    training.train(run, folder, config="# as it was")
    return folder


@pytest.fixture(scope="module")
def stopped(run, store):
    """A run and its folder, saved once and stopped; the number of requests before each step."""
    run = dataclasses.replace(run, total_steps=9, save_every=6, evaluation=Evaluation(batch_size=8))
    folder = epath.Path("gs://bucket/runs/stopped")
    return (run, folder), train_and_stop(run, folder, at=8, store=store)


def trained(run, folder):
    """Every array of the last checkpoint, and where it stands in the data."""
    job = Job(run, folder)
    template = job.parameters.state_template(job.optimizer())
    with job.checkpoints(job.load_base(), create=False) as checkpoints:
        state, data = checkpoints.restore(template)
        assert checkpoints.latest_step() == run.total_steps
    return jax.device_get((state.trained, state.opt_state)), data


def timeless(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in x.items() if not k.endswith(TIMING)} for x in lines]


def test_a_run_in_a_bucket_is_the_run_bit_for_bit(run, local, bucket, store):
    expected, got = trained(run, local), trained(run, bucket)
    jax.tree.map(np.testing.assert_array_equal, expected[0], got[0])
    assert expected[1] == got[1]
    assert timeless(local) == timeless(bucket)
    assert sum("loss" in line for line in timeless(bucket)) == run.total_steps
    assert read_best(local) == read_best(bucket)
    assert saved_steps(local) == saved_steps(bucket)


def read_best(folder):
    return files.read_object(folder / "best.json")


def test_the_folder_in_a_bucket_holds_what_a_local_one_holds(local, bucket, store):
    prefix = "runs/whole/"
    names = {name.removeprefix(prefix) for name in store.names("bucket", prefix)}
    there = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}

    def apart(names):  # names of files that hold arrays and events are drawn
        inside = ("checkpoints/", "tensorboard/")
        return {name for name in names if not any(part in name for part in inside)}

    assert apart(names) == apart(there)
    for name in ("features.json", "cells.txt", "parameters.txt", "config.gin"):
        assert store.content("bucket", prefix + name) == (local / name).read_bytes()
    predictions = [name for name in there if name.startswith("evaluations/")]
    assert len(predictions) >= 6
    for name in predictions:
        assert store.content("bucket", prefix + name) == (local / name).read_bytes()


def test_tensorboard_finds_every_step_of_a_run_in_a_bucket(run, bucket, store, tmp_path):
    losses = {}
    for name in store.names("bucket", "runs/whole/tensorboard/"):
        losses |= read_events(tmp_path, store.content("bucket", name))
    assert sorted(losses) == list(range(1, run.total_steps + 1))
    told = {x["step"]: x["loss"] for x in timeless(bucket) if "loss" in x}
    assert losses == pytest.approx(told)


def read_events(folder, content):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    path = folder / "events.out.tfevents.1"
    path.write_bytes(content)
    return {
        event.step: value.tensor.float_val[0]
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == "train/loss"
    }


def test_long_events_are_written_in_parts(store, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard_sink, "_PART", 1000)
    sink = tensorboard_sink.TensorBoardSink("gs://bucket/parts", 0, {"seed": 1.0})
    for step in range(1, 101):
        sink.write(step, {"train/loss": float(step)})
        if step % 5 == 0:
            sink.flush()
    sink.close()
    parts = store.names("bucket", "parts/tensorboard/")
    contents = [store.content("bucket", name) for name in parts]
    assert len(parts) > 3 and max(map(len, contents)) < 2000
    found = [read_events(tmp_path, content) for content in contents]
    assert {step: value for part in found for step, value in part.items()} == {
        step: float(step) for step in range(1, 101)
    }


def test_evaluation_and_inference_in_a_bucket(run, bucket, store):
    prefix = f"runs/whole/evaluations/{run.total_steps}/up.x"
    before = {name: store.content("bucket", name) for name in store.names("bucket", prefix)}
    with store.lock:
        for name in before:
            del store.buckets["bucket"][name]
    inference.evaluate(run, bucket, cells=["up/x"], say=lambda _: None)
    assert {name: store.content("bucket", name) for name in before} == before

    told = [json.loads(line) for line in before[f"{prefix}.jsonl"].splitlines()]
    asked, answers = (epath.Path(f"gs://bucket/texts/{name}.jsonl") for name in ("in", "out"))
    lines = [{"input": line["inputs"], "task": "up", "language": "x"} for line in told]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prediction.infer(run, bucket, input_path=asked, output_path=answers, say=lambda _: None)
    found = [json.loads(line)["prediction"] for line in answers.read_text().splitlines()]
    assert found == [line["predictions"] for line in told]
    assert store.names("bucket", "texts/") == ["texts/in.jsonl", "texts/out.jsonl"]


def test_steps_between_logs_and_saves_ask_nothing_of_a_bucket(stopped):
    # The first line is written at once, others after ten seconds; the first save is of step 6.
    _, counts = stopped
    assert len({counts[step] for step in (3, 4, 5, 6)}) == 1 and counts[7] > counts[6]


def test_a_save_that_was_cut_off_is_no_step_and_is_removed(run, store, stopped):
    (run, folder), _ = stopped
    assert saved_steps(folder) == {6}
    prefix = "runs/stopped/checkpoints/"
    with store.lock:  # what a process leaves that is killed in a save
        for name in [n for n in store.buckets["bucket"] if n.startswith(f"{prefix}6/")]:
            if name != f"{prefix}6/commit_success.txt":
                content = store.buckets["bucket"][name].content
                store.put("bucket", name.replace("/6/", "/9/"), content)
    assert saved_steps(folder) == {6}
    with Job(run, folder).checkpoints(None) as checkpoints:
        assert checkpoints.all_steps() == (6,)
    for _ in range(200):  # orbax removes it in the background, and waits before it saves
        if not store.names("bucket", f"{prefix}9/"):
            break
        time.sleep(0.05)
    assert not store.names("bucket", f"{prefix}9/") and store.names("bucket", f"{prefix}6/")


def test_a_damaged_step_is_set_aside_in_a_bucket(store, stopped):
    (run, folder), _ = stopped
    job = Job(run, folder)
    place = "runs/stopped/checkpoints/6/"
    with store.lock:
        (name, *_) = [n for n in store.buckets["bucket"] if n.startswith(f"{place}trained/d/")]
        content = bytearray(store.buckets["bucket"][name].content)
        content[len(content) // 2] ^= 1
        store.put("bucket", name, bytes(content))
    names = {name.removeprefix(place) for name in store.names("bucket", place)}
    said = []
    with (
        job.checkpoints(None, warn=said.append) as checkpoints,
        pytest.raises(ValueError, match="no sound step is left"),
    ):
        checkpoints.resume(job.parameters.state_template(job.optimizer()))
    assert name.removeprefix(place) in said[0] and "gs://bucket/runs/stopped/damaged/6" in said[0]
    aside = "runs/stopped/damaged/6/"
    assert {name.removeprefix(aside) for name in store.names("bucket", aside)} == names
    assert not store.names("bucket", place)


def test_a_bucket_that_is_busy_for_a_moment_is_asked_again(store):
    with store.busy(1):
        files.write_text("gs://bucket/busy/a.txt", "written once")
    with store.busy(1):
        assert epath.Path("gs://bucket/busy/a.txt").read_text() == "written once"
    values = {"a": Leaf.of(np.arange(6.0, dtype=np.float32))}
    with store.busy(1):  # of tensorstore's first
        made = t5x_checkpoints.write(values, "gs://bucket/busy/networks")
    assert t5x_checkpoints.read(made)["a"].read().tolist() == list(range(6))


def test_of_workers_that_come_together_at_most_one_has_a_run(store):
    folder = epath.Path("gs://bucket/claimed")
    holding, most, taken = [], [], Counter()

    def work(number):
        draw = random.Random(number)
        with Claims() as claims:
            while taken[number] < 3:
                if claims.take(folder):
                    holding.append(number)
                    most.append(len(holding))
                    time.sleep(0.005)
                    holding.remove(number)
                    claims.give_back(folder)
                    taken[number] += 1
                time.sleep(draw.uniform(0, 0.02))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert max(most) == 1 and len(most) == 12
    assert not store.names("bucket", "claimed/")


SWEEP = """
include 'run.gin'
SEED = 0
Run.seed = %SEED
Run.save_every = 4
Sweep.name = 'rank'
Sweep.seeds = (0,)
Sweep.trials_per_program = 1
Sweep.axes = {'FeatureType.rank': (1, 2)}
"""


@pytest.fixture
def environment(store):
    """Of commands that are to find the stand-in."""
    return os.environ | {"FSSPEC_GCS": '{"token": "anon"}', "PYTHONPATH": ROOT}


@pytest.mark.exhaustive
def test_a_run_that_is_killed_in_its_saves_ends_as_one_that_was_not(store, tmp_path, environment):
    write_gin(tmp_path)
    flags = ["train", "--gin_file=run.gin", "--gin.DATA_DIR='data'", "--gin.Run.base='random'"]
    flags += ["--gin.Run.save_every=1", "--gin.Run.keep=9"]
    program = [sys.executable, "-m", "flix_jax.cli", *flags]
    # Of as many devices as those that are killed.
    whole = [*program, "--run_dir=whole"]
    subprocess.run(whole, env=environment, check=True, capture_output=True)
    command = [*program, "--run_dir=gs://bucket/runs/killed"]
    draw, place = random.Random(0), "runs/killed/checkpoints/"
    for _ in range(2):
        start, wait = len(store.requests), draw.randrange(5, 150)
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            asked = store.requests[start:]
            if sum(a in ("write", "delete") and n.startswith(place) for a, n in asked) > wait:
                process.kill()
            time.sleep(0.001)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, env=environment, check=True, capture_output=True)
    digests = [
        [manifest.read(epath.Path(folder) / "checkpoints" / str(step))["arrays"] for step in (1, 4)]
        for folder in ("whole", "gs://bucket/runs/killed")
    ]
    assert digests[0] == digests[1]
    assert timeless(epath.Path("whole")) == timeless(epath.Path("gs://bucket/runs/killed"))


@pytest.mark.exhaustive
def test_a_sweep_in_a_bucket(store, tmp_path, capsys):
    write_gin(tmp_path, sweep=SWEEP)
    flags = ["sweep", "--gin_file=sweep.gin", "--gin.DATA_DIR='data'"]
    start = len(store.requests)
    assert cli.main([*flags, "--run_dir=gs://bucket/sweeps/rank"]) == 0
    root = "sweeps/rank/"
    trials = [
        json.loads(line) for line in store.content("bucket", root + "trials.jsonl").splitlines()
    ]
    assert [trial["state"] for trial in trials] == ["finished", "finished"]
    names = store.names("bucket", root)
    assert root + "report.md" in names and root + "trials.csv" in names
    asked = {name for action, name in store.requests[start:] if action == "write"}
    assert sum("/claims/" in name for name in asked) == 3  # two trials and their base
    assert not [name for name in names if "/claims/" in name]
    capsys.readouterr()
    assert cli.main([*flags, "--run_dir=gs://bucket/sweeps/rank"]) == 0
    assert "2 of 2 trials are finished already" in capsys.readouterr().out


def test_networks_are_read_and_written_in_a_bucket(store):
    values = {"target/encoder/a": np.arange(6.0, dtype=np.float32).reshape(2, 3)}
    names = {name.removeprefix("target/"): Leaf.of(value) for name, value in values.items()}
    made = t5x_checkpoints.write(names, "gs://bucket/networks", step=3)
    found = t5x_checkpoints.read(made)
    assert {name: leaf.read().tolist() for name, leaf in found.items()} == {
        "encoder/a": values["target/encoder/a"].tolist()
    }


@pytest.mark.parametrize(
    ("folder", "denied", "message"),
    [
        ("gs://buckte/run", (), "gs://buckte/run: there is no bucket buckte"),
        ("gs://bucket/denied", ("write",), "gs://bucket/denied: cannot be written: Forbidden"),
        ("gs://bucket/denied", ("delete",), "gs://bucket/denied: cannot be written: Forbidden"),
        ("gs://bucket/denied", ("bucket",), "gs://bucket/denied: cannot be described, for which"),
        ("s3://bucket/run", (), "s3://bucket/run: a folder is local or in a bucket of Google's"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_before_compute(
    run, store, folder, denied, message, monkeypatch
):
    monkeypatch.setattr(Job, "load_base", lambda _: pytest.fail("computes"))
    with store.denying(*denied), pytest.raises(ValueError) as caught:
        training.train(run, folder)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_bucket_that_cannot_be_read_is_told_in_a_line(store, capsys):
    with store.denying("stat", "list"):
        assert cli.main(["evaluate", "--run_dir=gs://bucket/secret"]) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: a bucket refuses: Forbidden") and error.count("\n") == 1
    assert "secret" in error


def test_the_extra_that_is_missing_is_named(run, store, monkeypatch):
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^gs://bucket/run: buckets need gcsfs.*extra 'gcs'"):
        training.train(run, "gs://bucket/run")


def test_paths_in_buckets():
    start = epath.Path("gs://bucket/sweep/trials/a")
    for path in ("gs://bucket/sweep/bases", "gs://other/bases", "/local/bases"):
        seen = buckets.relative(path, start)
        assert str(buckets.joined(start, seen)) == path
    assert buckets.relative("gs://bucket/sweep/bases", start) == "../../bases"
    assert str(buckets.joined(epath.Path("/runs/a"), "gs://b/c")) == "gs://b/c"
    assert str(buckets.joined(epath.Path("/runs/a"), "../bases")) == "/runs/a/../bases"
    assert str(buckets.resolved("gs://bucket/a/../b")) == "gs://bucket/b"


def test_the_stand_in_refuses_and_notes_appends_and_renames():
    """With a store of its own, for the fixture above allows none; asked without a client."""
    import urllib.error
    import urllib.request

    store = ObjectStore("b")
    with store.lock:
        store.put("b", "x", b"1")
    for action in ("x/rewriteTo/b/b/o/y", "x/copyTo/b/b/o/y", "x/moveTo/o/y", "x/compose"):
        url = f"{store.url}/storage/v1/b/b/o/{action}"
        with pytest.raises(urllib.error.HTTPError, match="412"):
            urllib.request.urlopen(urllib.request.Request(url, data=b"{}", method="POST"))
    assert len(store.forbidden) == 4 and store.names("b") == ["x"]
    url = f"{store.url}/upload/storage/v1/b/b/o?uploadType=media&name=x&ifGenerationMatch=0"
    with pytest.raises(urllib.error.HTTPError, match="412"):
        urllib.request.urlopen(urllib.request.Request(url, data=b"2", method="POST"))
    assert store.content("b", "x") == b"1"
    store.close()
