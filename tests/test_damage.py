"""Damaged checkpoints: what changed is named, and is never restored."""

import errno
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from flix_jax import cli
from flix_jax.training import array_digests, manifest, stored_steps
from flix_jax.training.checkpoints import Checkpoints, Damaged
from flix_jax.training.step import TrainState

IDENTITY = {"features": "task: ner", "base": "abc"}


def a_state(step: int) -> TrainState:
    draw = np.random.default_rng(step)
    trained = {
        "flix": {
            "a": jnp.asarray(draw.normal(size=(6, 5)), jnp.float32),
            "b": jnp.asarray(draw.normal(size=(3, 7)), jnp.bfloat16),
        }
    }
    state = TrainState.create(trained, optax.adam(0.1))
    return state.replace(step=jnp.int32(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    with Checkpoints(run_dir / "checkpoints", IDENTITY) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(a_state(step), {"position": step})
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def flip(path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def resumed(run_dir, strict=False):
    said: list[str] = []
    warn = None if strict else said.append
    with Checkpoints(run_dir / "checkpoints", IDENTITY, warn=warn) as checkpoints:
        state, data = checkpoints.resume(a_state(0))
        return int(state.step), data, said, checkpoints.all_steps()


def test_every_file_of_a_checkpoint_is_in_its_manifest(saved):
    folder = saved / "checkpoints" / "3"
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files - {manifest.NAME} == set(manifest.read(folder)["files"])
    assert manifest.damage(folder) is None


@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_damage_of_every_file_is_found_and_named(run_dir, how):
    draw = random.Random(0)
    folder = run_dir / "checkpoints" / "3"
    names = manifest.files_of(folder)
    assert len(names) > 10
    for name in names:
        path = folder / name
        before = path.read_bytes()
        if how == "flip":
            flip(path, draw)
        elif how == "cut":
            path.write_bytes(before[: draw.randrange(len(before))])
        else:
            path.unlink()
        found = manifest.damage(folder)
        assert found is not None and name in found
        path.write_bytes(before)
    assert manifest.damage(folder) is None


def test_a_damaged_step_is_set_aside_and_the_one_before_it_is_taken(run_dir):
    for step in (3, 2):
        file = next((run_dir / "checkpoints" / str(step) / "trained" / "d").iterdir())
        flip(file, random.Random(step))
    step, data, said, steps = resumed(run_dir)
    assert step == 1 and data == {"position": 1} and steps == (1,)
    assert all(
        f"checkpoints/{s} is damaged: trained/d/" in x for s, x in zip((3, 2), said, strict=True)
    )
    assert sorted(path.name for path in (run_dir / "damaged").iterdir()) == ["2", "3"]
    # What is trained again is saved again, and may be damaged again.
    with Checkpoints(run_dir / "checkpoints", IDENTITY) as checkpoints:
        checkpoints.save(a_state(2), {})
    (run_dir / "checkpoints" / "2" / "manifest.json").unlink()
    step, _, (said,), _ = resumed(run_dir)
    assert step == 1 and said.endswith(f"set aside in {run_dir / 'damaged' / '2-2'}")
    assert "manifest.json is missing" in said


def test_strict_and_reading_refuse_damage(run_dir):
    folder = run_dir / "checkpoints" / "3"
    (folder / "identity" / "metadata").write_text("{}")
    with pytest.raises(Damaged, match=r"identity/metadata holds 2 bytes of \d+; the newest"):
        resumed(run_dir, strict=True)
    reader = Checkpoints(run_dir / "checkpoints", IDENTITY, create=False)
    with pytest.raises(Damaged, match=r"identity/metadata.*; the newest sound one is of step 2"):
        reader.restore_trained(a_state(0).trained)
    assert reader.restore_trained(a_state(0).trained, 2)[1] == 2
    assert folder.exists()


@pytest.mark.parametrize("content", ["1", "[]", '{"commit_timestamp_nsecs": "x"}'])
def test_a_record_that_orbax_cannot_read_is_named(run_dir, content):
    """Orbax reads when a step was written for every step that there is, before any is asked for."""
    place = run_dir / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    place.write_text(content)
    told = rf"{place.parent} is damaged: {place.name} "
    with pytest.raises(Damaged, match=told + ".*; move it away to read the others"):
        resumed(run_dir, strict=True)
    with pytest.raises(Damaged, match=told):
        Checkpoints(run_dir / "checkpoints", IDENTITY, create=False)
    (run_dir / "checkpoints" / "1" / place.name).write_text(content)
    step, _, said, left = resumed(run_dir)
    assert step == 2 and left == (2,)
    assert [re.search(r"/(\d) is damaged", line)[1] for line in said] == ["3", "1"]
    assert said[0].endswith(f"set aside in {run_dir / 'damaged' / '3'}")


def test_without_a_sound_step_nothing_begins_anew_by_itself(run_dir):
    for step in (1, 2, 3):
        (run_dir / "checkpoints" / str(step) / "commit_success.txt").unlink()
    for _ in range(2):  # nor when it is started again, with nothing left to set aside
        told = "no sound step is left in .*: the damaged ones are in .*; remove that to begin again"
        with pytest.raises(Damaged, match=told):
            resumed(run_dir)
    shutil.rmtree(run_dir / "damaged")
    with Checkpoints(run_dir / "checkpoints", IDENTITY) as checkpoints:
        assert checkpoints.resume(a_state(0)) is None


@pytest.mark.parametrize("name", ["commit_success.txt", manifest.NAME])
def test_a_file_that_its_disk_does_not_give_is_damage(run_dir, name):
    """As a folder in its place, which fails alike; other errors (permissions, networks) do not."""
    path = run_dir / "checkpoints" / "3" / name
    path.unlink()
    path.mkdir()
    step, _, said, _ = resumed(run_dir)
    assert step == 2 and f"{name} cannot be read: Is a directory" in said[0]


def test_an_error_that_is_none_of_the_disk_is_no_damage(run_dir, monkeypatch):
    def refused(*arguments, **more):
        raise PermissionError(errno.EACCES, "Permission denied")

    folder = epath.Path(run_dir / "checkpoints" / "3")
    monkeypatch.setattr(type(folder), "open", refused)
    with pytest.raises(PermissionError):
        manifest.damage(folder)


def test_prune_keeps_the_best_of_the_sound_ones(run_dir):
    values = {"1": 4.0, "2": 5.0, "3": 1.0}
    (run_dir / "best.json").write_text(json.dumps({"values": values}))
    (run_dir / "checkpoints" / "2" / "commit_success.txt").unlink()
    assert [one.step for one in stored_steps.prune(run_dir, keep=1)] == [2]


@pytest.mark.parametrize("values", [[1], ["a"], {"a": 3}, {"4": "x"}, {"4": None}])
def test_a_record_of_the_best_that_holds_something_else_is_named(run_dir, values):
    (run_dir / "best.json").write_text(json.dumps({"values": values}))
    with pytest.raises(ValueError, match=r"best.json: values are .*, expected numbers by step"):
        stored_steps.find(run_dir, verify=False)


def test_arrays_are_compared_where_they_lie(run_dir):
    # Nothing is wrong with the files, but an array is not the one that was saved.
    folder = run_dir / "checkpoints" / "3"
    record = json.loads((folder / "manifest.json").read_text())
    record["arrays"]["trained/flix/b"] = "0" * 16
    record["checksum"] = manifest._checksum(record)
    (folder / "manifest.json").write_text(json.dumps(record))
    step, _, (said,), _ = resumed(run_dir)
    assert step == 2 and "array trained/flix/b is another one" in said


def test_what_an_interrupted_save_or_deletion_left_is_removed(run_dir):
    directory = run_dir / "checkpoints"
    shutil.copytree(directory / "3", directory / "4.orbax-checkpoint-tmp")
    (directory / "1" / "manifest.json").unlink()  # half deleted
    said: list[str] = []
    with Checkpoints(directory, IDENTITY, keep=2, warn=said.append) as checkpoints:
        state, _ = checkpoints.resume(a_state(0))
    assert int(state.step) == 3 and not said
    assert sorted(path.name for path in directory.iterdir()) == ["2", "3"]


def test_steps_of_a_period_are_kept(tmp_path):
    with Checkpoints(tmp_path / "c", IDENTITY, keep=1, keep_period=2) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(a_state(step), {})
        checkpoints.wait()
        assert checkpoints.all_steps() == (2, 4, 5)


def test_a_value_may_come_after_its_step(tmp_path):
    with Checkpoints(tmp_path / "c", IDENTITY, keep=1, best={"of": "x"}) as checkpoints:
        checkpoints.save(a_state(1), {})
        checkpoints.set_value(1, 5.0)
        checkpoints.save(a_state(2), {}, 4.0)
        assert checkpoints.best == (1, 5.0)
    with Checkpoints(tmp_path / "c", IDENTITY, keep=1, best={"of": "x"}) as checkpoints:
        assert checkpoints.best == (1, 5.0) and checkpoints.all_steps() == (1, 2)


# Digests of arrays.

DTYPES = ("float32", "bfloat16", "int8", "int32", "bool", "uint16")


def digest(array) -> str:
    return array_digests.texts(array_digests.of({"x": array}))["x"]


def numpy_digest(array: np.ndarray) -> str:
    """The same, element by element in Python."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        return x ^ (x >> 13)

    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    places = [i * 0x9E3779B9 % 2**32 for i in range(len(bits))]
    mixed = [mix((int(x) + place) % 2**32) for x, place in zip(bits, places, strict=True)]
    weighted = sum(h * (place | 1) for h, place in zip(mixed, places, strict=True))
    return f"{sum(mixed) % 2**32:08x}{weighted % 2**32:08x}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_is_that_of_a_loop_and_sees_every_bit(dtype):
    draw = np.random.default_rng(1)
    array = draw.integers(0, 2 if dtype == "bool" else 100, (3, 4, 2)).astype(dtype)
    before = digest(jnp.asarray(array))
    assert before == numpy_digest(np.asarray(jnp.asarray(array)))
    width = array.dtype.itemsize
    for place in range(array.size):
        for bit in range(1 if dtype == "bool" else 8 * width):
            changed = array.copy()
            changed.reshape(-1).view(f"u{width}")[place] ^= 1 << bit
            if dtype == "bool" or bit % 3 == 0:
                assert digest(jnp.asarray(changed)) != before
    assert digest(jnp.asarray(array[::-1])) != before


def test_a_digest_is_the_same_on_any_mesh():
    array = np.random.default_rng(2).normal(size=(16, 12)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    alone = digest(jnp.asarray(array))
    for spec in (("data", "model"), ("model",), (None, "data"), (("data", "model"),)):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert digest(jax.device_put(array, sharding)) == alone


# The command.


def run_cli(*arguments, capsys):
    status = cli.main(["checkpoints", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_the_data_position_of_the_newest_step_is_what_was_written_or_none(run_dir, tmp_path):
    assert stored_steps.data_position(run_dir) == {"position": 3}
    flip(run_dir / "checkpoints" / "3" / stored_steps.DATA_FILE, random.Random(0))
    assert stored_steps.data_position(run_dir) is None
    (run_dir / "checkpoints" / "3" / manifest.NAME).unlink()
    assert stored_steps.data_position(run_dir) is None
    assert stored_steps.data_position(tmp_path / "new") is None


def test_the_command_lists_verifies_and_prunes(run_dir, capsys):
    status, out, _ = run_cli("list", f"--run_dir={run_dir}", capsys=capsys)
    assert status == 0 and [line.split()[0] for line in out.splitlines()[2:]] == ["1", "2", "3"]
    assert run_cli("verify", f"--run_dir={run_dir}", capsys=capsys)[0] == 0
    flip(run_dir / "checkpoints" / "2" / "data" / "metadata", random.Random(0))
    status, out, error = run_cli("verify", f"--run_dir={run_dir}", capsys=capsys)
    assert status == cli.USER_ERROR and out.count("sound") == 2
    assert "step 2: data/metadata holds other bytes" in error and error.count("\n") == 1
    assert run_cli("verify", f"--run_dir={run_dir}", "--step=3", capsys=capsys)[0] == 0
    _, _, error = run_cli("verify", f"--run_dir={run_dir}", "--step=4", capsys=capsys)
    assert "no checkpoint of step 4" in error
    prune = ("prune", f"--run_dir={run_dir}", "--keep=1")
    _, out, _ = run_cli(*prune, "--dry_run", capsys=capsys)
    assert out.startswith("would delete 2 checkpoints") and out.endswith(": 1, 2\n")
    assert len(stored_steps.find(run_dir, verify=False)) == 3
    run_cli(*prune, capsys=capsys)
    assert [one.step for one in stored_steps.find(run_dir, verify=True)] == [3]
    status, _, error = run_cli("prune", f"--run_dir={run_dir}", "--keep=0", capsys=capsys)
    assert status == cli.USER_ERROR and "--keep=0: expected at least 1" in error


def test_a_full_disk_is_told_and_the_steps_before_stand(tmp_path, monkeypatch):
    directory = tmp_path / "run" / "checkpoints"
    with Checkpoints(directory, IDENTITY) as checkpoints:
        checkpoints.save(a_state(1), {})
    write = manifest.write

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    message = "could not be written to .*No space left on device; the steps before it stand: 1$"
    monkeypatch.setattr(manifest, "write", full)
    checkpoints = Checkpoints(directory, IDENTITY)
    checkpoints.save(a_state(2), {})
    with pytest.raises(ValueError, match=message):
        checkpoints.wait()
    checkpoints.close()
    assert [path.name for path in directory.iterdir()] == ["1"]
    monkeypatch.setattr(manifest, "write", write)
    with Checkpoints(directory, IDENTITY) as checkpoints:
        checkpoints.save(a_state(2), {})
        checkpoints.wait()
        assert checkpoints.all_steps() == (1, 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs limits on the size of files")
def test_a_file_that_cannot_grow_is_told_by_the_command(run_dir):
    # A limit on the size of files stands for a disk that is full: tensorstore fails in its threads.
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_damage import IDENTITY, Checkpoints, a_state, jnp
checkpoints = Checkpoints({str(run_dir / "checkpoints")!r}, IDENTITY)
state = a_state(4)
state.trained["flix"]["a"] = jnp.asarray(__import__("numpy").random.normal(size=(400, 300)))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints.save(state, {{}})
try:
    checkpoints.wait()
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "File too large; the steps before it stand: 1, 2, 3" in done.stdout, done.stderr
    assert resumed(run_dir)[0] == 3
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["1", "2", "3"]
