"""A hundred mistakes and more: each ends in one line that says what is wrong."""

import dataclasses
import json
import re
import shutil

import hundred_mistakes as mistakes
import pytest
from tiny_runs import make_base_run

from flix_jax import cli
from flix_jax.experiments import checks
from flix_jax.mistakes import Collected, Mistake, Mistakes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mistakes.make_world(folder)
        yield folder


def test_there_are_a_hundred_and_each_is_another():
    lines = {(m.line, *map(repr, m.files.items())) for m in mistakes.MISTAKES}
    assert len(lines) == len(mistakes.MISTAKES) >= 100
    assert len({m.name for m in mistakes.MISTAKES}) == len(mistakes.MISTAKES)


@pytest.mark.parametrize("group", mistakes.GROUPS)
def test_mistakes_are_one_line_with_the_culprit(group, world, capsys):
    capsys.readouterr()  # what making the world has said
    found, before = [], mistakes.contents(world)
    for mistake in mistakes.GROUPS[group]:
        with mistakes.made(mistake, world):
            try:
                status = cli.main(mistake.line.split())
            except Exception as error:  # a fault of the program is one more to be listed
                status = repr(error)
        told = capsys.readouterr()
        wrong = mistakes.faults(mistake, status, told.err)
        after = mistakes.contents(world)
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        written = sorted(changed - mistake.files.keys())
        if written:
            wrong.append(f"changed {written}")
        if wrong:
            found.append(f"{mistake.name}: {', '.join(wrong)}: {told.err.strip()[-300:]}")
        before = after
    assert not found, "\n".join(found)


def main(line, capsys):
    status = cli.main(line.split())
    return status, capsys.readouterr()


TRAIN = "train --gin_file=run.gin --gin.DATA_DIR='data' --run_dir=trained"


def test_check_shows_what_it_found(world, capsys):
    status, told = main(TRAIN.replace("train ", "check ", 1), capsys)
    assert status == 0
    found = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in told.out.splitlines()[2:])
    assert found["run folder"] == "this run, step 4 of 4"
    assert found["cells"] == "3 trained on, 1 held out"
    assert found["features"] == "task 2, language 2"
    assert found["examples"] == "12 to train on; all of their records can be read"
    assert found["base"] == "a run, step 2"
    # Counted from the folder's table; beside it are two moments, two counters and the step.
    lines = (world / "trained" / "parameters.txt").read_text().splitlines()
    trained = [re.split(r"\s{2,}", line.strip()) for line in lines if "  trained  " in line]
    count = sum(int(re.sub(r"\D", "", row[-1])) for row in trained) // 4
    assert found["parameters"].startswith(f"{count:,} trained")
    assert found["checkpoints"] == f"{(3 * 4 * count + 12) / 1024:,.1f} KiB each, 1 at a time"
    assert found["saved"] == "1 of 1 sound, the newest of step 4"
    assert "warning: Run.save_every = 1000 is beyond Run.total_steps = 4" in told.err


def test_check_tells_of_damaged_checkpoints(world, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(world / "trained", run_dir)
    newest, older, newer = (run_dir / "checkpoints" / step for step in ("4", "3", "5"))
    line = f"check --gin_file=run.gin --gin.DATA_DIR='data' --run_dir={run_dir}"
    line += " --gin.Run.total_steps=8 --allow_changes=total_steps"
    for copy in (older, newer):
        shutil.copytree(newest, copy)
        (copy / "data" / "metadata").write_bytes(b"")
    status, told = main(line, capsys)
    assert status == 0 and "1 of 3 sound, the newest of step 4" in told.out
    for copy, then in ((older, "step 4 is sound"), (newer, "it would be set aside")):
        expected = f"warning: checkpoint {copy} is damaged: data/metadata holds 0 bytes of "
        [warning] = [one for one in told.err.splitlines() if one.startswith(expected)]
        assert warning.endswith(f"; {then}")
    (newest / "data" / "metadata").unlink()
    status, told = main(line, capsys)
    assert status == 2 and "no checkpoint is sound" in told.err and told.err.count("\n") == 1
    assert f"{newer} is damaged" in told.err


def test_warnings_of_a_base_say_so(world, tmp_path, capsys):
    (tmp_path / "m.gin").write_text(
        f"include '{world}/run.gin'\n{mistakes.TWO_STAGES}base/Run.save_every = 5000\n"
    )
    status, told = main(f"check --gin_file={tmp_path}/m.gin --gin.DATA_DIR='data'", capsys)
    assert status == 0
    assert "warning: base: Run.save_every = 5000 is beyond Run.total_steps = 2" in told.err


def test_several_mistakes_are_a_line_each(world, capsys):
    line = "check --gin_file=run.gin --gin.DATA_DIR='data' --gin.Run.batch_size=12"
    more = ["--gin.Mixture.held_out=('up/yy',)", "--gin.ByteVocabulary.extra_ids=200"]
    status = cli.main([*line.split(), *more])
    errors = capsys.readouterr().err.splitlines()
    assert status == 2 and all("--gin." in line for line in errors)
    for culprit in ("12 is not a positive multiple", "'up/yy'", "459 ids"):
        assert sum(culprit in line for line in errors) == 1
    assert len(errors) == 3


def test_every_bad_file_is_told(world, capsys):
    paths = [world / "data" / "same" / split / "x.jsonl" for split in ("train", "validation")]
    kept = [path.read_text() for path in paths]
    try:
        for path in paths:
            path.write_text("x\n")
        status, told = main(TRAIN.replace("train ", "check ", 1), capsys)
    finally:
        for path, text in zip(paths, kept, strict=True):
            path.write_text(text)
    assert status == 2
    places = re.findall(r"^error: (\S+): malformed", told.err, re.MULTILINE)
    assert places == ["data/same/train/x.jsonl:1", "data/same/validation/x.jsonl:1"]


@pytest.mark.exhaustive
def test_a_changed_run_goes_on_where_that_is_allowed(world, capsys):
    """The change is noted with its step, and the folder is the changed run's from then on."""
    folder = world / "changed"
    line = TRAIN.replace("trained", "changed")
    assert cli.main(line.split()) == 0
    changes = [
        "--gin.Run.total_steps=6",
        "--gin.Schedule.learning_rate=0.5",
        "--gin.language/FeatureType.dropout=0.25",
    ]
    capsys.readouterr()
    assert cli.main([*line.split(), *changes]) == 2
    told = capsys.readouterr().err
    assert "learning_rate is 0.001 there and 0.5 here" in told and told.count("\n") == 1
    allow = re.search(r"--allow_changes=\S+", told).group()
    assert cli.main([*line.split(), *changes, allow]) == 0
    told = capsys.readouterr().err
    assert "changed from step 4 on: optimizer.schedule.learning_rate 0.001 -> 0.5" in told
    noted = json.loads((folder / "changes.json").read_text())
    assert [entry["step"] for entry in noted["changes"]] == [4]
    assert noted["changes"][0]["values"] == {
        "adapters.space.types.1.dropout": {"from": "0.0", "to": "0.25"},
        "optimizer.schedule.learning_rate": {"from": "0.001", "to": "0.5"},
    }
    # It is another run from then on: what it was is the change now.
    assert (
        json.loads((folder / "run.json").read_text())["optimizer.schedule.learning_rate"] == "0.5"
    )
    assert cli.main([*line.split(), *changes]) == 0
    assert cli.main(["evaluate", "--run_dir=changed"]) == 0
    assert cli.main([*line.split(), "--gin.Run.total_steps=6"]) == 2


def test_parts_are_told_together_and_what_is_said_twice_once():
    mistakes = Collected()
    for message in ("a", "b", "a"):
        with mistakes.part("Run.seed"):
            raise ValueError(message)
    with pytest.raises(Mistakes) as raised:
        mistakes.tell()
    assert [(str(one), one.names) for one in raised.value.errors] == [
        ("a", ("Run.seed",)),
        ("b", ("Run.seed",)),
    ]
    with mistakes.part():
        raise FileNotFoundError(2, "No such file", "x")
    with pytest.raises(Mistake, match="^x: No such file$"):
        mistakes.tell()
    mistakes.tell()  # nothing is left


@pytest.mark.parametrize("saved", [(), (2,), (2, 4), (2, 4, 6), (6, 8)])
@pytest.mark.parametrize("total, every, keep", [(8, 2, 2), (9, 2, 1), (3, 5, 2), (100, 1, 3)])
def test_the_space_for_checkpoints_is_what_a_run_comes_to_hold(total, every, keep, saved):
    """Against the steps of a run, played through: the old ones go when a new one is whole."""
    if max(saved, default=0) > total or len(saved) > keep:
        return
    run = make_base_run("data")
    run = dataclasses.replace(run, total_steps=total, save_every=every, keep=keep)
    held, most = list(saved), len(saved)
    for step in range(max(saved, default=0) + 1, total + 1):
        if step == total or step % every == 0:
            held.append(step)
            most = max(most, len(held))
            held = held[-keep:]
    need, at_most = checks.checkpoints_to_come(run, frozenset(saved), size=10)
    assert at_most == most and need == 10 * (most - len(saved))
