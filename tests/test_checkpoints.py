"""Checkpoints: what comes back is what was saved, and nothing else is accepted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flix_jax.evaluation import files
from flix_jax.training.checkpoints import Checkpoints, digest
from flix_jax.training.step import TrainState

IDENTITY = {"features": "task: ner", "base": "abc"}


def a_state(steps: int = 3, dtype=jnp.float32, rows: int = 4) -> TrainState:
    optimizer = optax.adamw(0.1)
    trained = {"flix": {"a": jnp.arange(rows * 2, dtype=dtype).reshape(rows, 2), "b": jnp.ones(3)}}
    state = TrainState.create(trained, optimizer)
    for _ in range(steps):
        grads = jax.tree.map(jnp.cos, state.trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        state = TrainState(state.step + 1, optax.apply_updates(state.trained, updates), opt_state)
    return state


def equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(directory, IDENTITY, keep=2)
    for steps in (1, 2, 3):
        checkpoints.save(a_state(steps), {"position": steps})
    checkpoints.close()
    return directory


def test_the_newest_state_comes_back_bit_for_bit(saved):
    checkpoints = Checkpoints(saved, IDENTITY)
    state, data = checkpoints.restore(a_state(0))
    equal(state, a_state(3))
    assert data == {"position": 3}
    assert checkpoints.all_steps() == (2, 3) and checkpoints.latest_step() == 3


def test_an_older_step_and_the_trained_part_alone(saved):
    trained, step = Checkpoints(saved, IDENTITY).restore_trained(a_state(0).trained, 2)
    assert step == 2
    equal(trained, a_state(2).trained)


def test_fewer_names_may_be_asked_for(saved):
    trained, _ = Checkpoints(saved, {"base": "abc"}).restore_trained(a_state(0).trained)
    equal(trained, a_state(3).trained)


@pytest.mark.parametrize(
    ("identity", "template", "step", "message"),
    [
        ({**IDENTITY, "base": "xyz"}, a_state(0), None, "another base: saved abc, here xyz"),
        ({**IDENTITY, "base": "x\n y"}, a_state(0), None, "another base: saved abc, here x y"),
        (IDENTITY, a_state(0), 7, r"no checkpoint of step 7 .*\(2, 3\)"),
        (IDENTITY, a_state(0, jnp.bfloat16), None, "flix/a is float32.* there, bfloat16"),
        (IDENTITY, a_state(0, rows=5), None, r"flix/a is float32\[4, 2\] there, float32\[5, 2\]"),
    ],
)
def test_what_does_not_agree_is_refused(saved, identity, template, step, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(saved, identity).restore(template, step)


@pytest.mark.parametrize("saved_text", [None, ["a"], "no space"])
def test_a_text_that_none_has_saved_is_shown_as_it_is(tmp_path, saved_text):
    """What tells differences in the program's words reads texts that the program has saved."""

    def difference(text: str) -> str:
        raise ValueError(f"{text} is no feature space")

    with Checkpoints(tmp_path, {"features": saved_text}) as checkpoints:
        checkpoints.save(a_state(), {})
    with (
        Checkpoints(tmp_path, IDENTITY, differences={"features": difference}) as checkpoints,
        pytest.raises(ValueError, match="3 has another features: saved .*, here") as refused,
    ):
        checkpoints.restore(a_state())
    assert str(saved_text) in str(refused.value)


def test_an_array_that_is_missing_is_named(saved):
    template = a_state(0)
    del template.trained["flix"]["b"]
    with pytest.raises(ValueError, match=r"flix/b is float32\[3\] there, absent here"):
        Checkpoints(saved, IDENTITY).restore_trained(template.trained)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", IDENTITY)
    assert checkpoints.latest_step() is None
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoints.restore(a_state(0))


BY_SEEN = {"keep_best": "mean_seen", "split": "validation"}
# Step -> value. The best comes early, and its equal does not take its place.
VALUES = {1: 10.0, 2: 70.25, 3: None, 4: 70.25, 5: 60.0, 6: None}


def keep_best(directory, steps, best=BY_SEEN, values=VALUES):
    with Checkpoints(directory, IDENTITY, keep=2, best=best) as checkpoints:
        for step in steps:
            checkpoints.save(a_state(step), {"position": step}, values[step])
        return checkpoints.best, checkpoints.all_steps()


def noted(directory):
    return files.read_object(directory.parent / "best.json")


@pytest.mark.parametrize("ends", [[], [1], [2], [3, 5], [1, 2, 3, 4, 5]])
def test_the_best_is_kept_beside_the_newest_through_any_restarts(tmp_path, ends):
    directory = tmp_path / "checkpoints"
    edges = [0, *ends, 6]
    for start, stop in itertools.pairwise(edges):
        best, steps = keep_best(directory, range(start + 1, stop + 1))
    assert best == (2, 70.25) and steps == (2, 5, 6)
    assert sorted(int(path.name) for path in directory.iterdir()) == [2, 5, 6]
    values = {"1": 10.0, "2": 70.25, "4": 70.25, "5": 60.0}
    assert noted(directory) == {"step": 2, "value": 70.25, "of": BY_SEEN, "values": values}
    template = a_state(0).trained
    trained, step = Checkpoints(directory, IDENTITY, create=False).restore_trained(template, "best")
    assert step == 2
    equal(trained, a_state(2).trained)


def test_a_better_one_takes_the_place_of_the_best(tmp_path):
    directory = tmp_path / "checkpoints"
    keep_best(directory, (1, 2, 3, 4, 5))
    best, steps = keep_best(directory, (6, 7, 8), values={6: 71.0, 7: None, 8: None})
    assert best == (6, 71.0) and steps == (6, 7, 8)
    best, steps = keep_best(directory, (9,), values={9: 0.0})
    assert best == (6, 71.0) and steps == (6, 8, 9)


def test_a_run_that_ended_before_its_note_finds_the_best_again(tmp_path):
    directory = tmp_path / "checkpoints"
    keep_best(directory, (1,))
    before = noted(directory)
    keep_best(directory, (2, 3, 4))
    values = noted(directory)["values"]
    # The best is of a step that is gone, and a value of one that was never written.
    before |= {"values": {**values, "9": 99.0}}
    files.write_json(tmp_path / "best.json", before)
    reader = Checkpoints(directory, IDENTITY, create=False)
    assert reader.restore_trained(a_state(0).trained, "best")[1] == 2
    assert noted(directory) == before  # reading changes nothing
    best, _ = keep_best(directory, ())
    assert best == (2, 70.25)
    assert noted(directory) == {"step": 2, "value": 70.25, "of": BY_SEEN, "values": values}


def test_values_of_another_number_are_not_compared(tmp_path):
    directory = tmp_path / "checkpoints"
    keep_best(directory, (1, 2))
    other = {**BY_SEEN, "keep_best": "mean_unseen"}
    best, steps = keep_best(directory, (3, 4, 5), best=other, values={3: 1.0, 4: None, 5: 0.5})
    assert best == (3, 1.0) and steps == (3, 4, 5)
    values = {"3": 1.0, "5": 0.5}
    assert noted(directory) == {"step": 3, "value": 1.0, "of": other, "values": values}
    # Without any, the newest alone are kept, and the folder no longer tells of a best one.
    assert keep_best(directory, (6, 7), best=None, values=dict.fromkeys((6, 7)))[1] == (6, 7)
    assert noted(directory) is None
    reader = Checkpoints(directory, IDENTITY, create=False)
    with pytest.raises(ValueError, match="holds no best checkpoint: train it with Evaluation.keep"):
        reader.restore_trained(a_state(0).trained, "best")


def test_what_improves(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", IDENTITY, best=BY_SEEN) as checkpoints:
        assert checkpoints.improves(0.0) and not checkpoints.improves(None)
        checkpoints.save(a_state(1), {}, 5.0)
        assert checkpoints.improves(5.5) and not checkpoints.improves(5.0)
    with Checkpoints(tmp_path / "others", IDENTITY) as checkpoints:
        assert not checkpoints.improves(99.0)


def test_the_digest_sees_names_shapes_dtypes_and_bits():
    x = np.arange(6, dtype=np.float32)
    trees = [
        {"a": x},
        {"b": x},
        {"a": x.reshape(2, 3)},
        {"a": x.view(np.int32)},
        {"a": np.nextafter(x, 9, dtype=np.float32)},
        {"a": x.astype(jnp.bfloat16)},
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)
    assert digest({"a": jnp.asarray(x)}) == digest({"a": x})
