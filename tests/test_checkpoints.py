"""Checkpoints: what comes back is what was saved, and nothing else is accepted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
        (IDENTITY, a_state(0), 7, r"no checkpoint of step 7 .*\(2, 3\)"),
        (IDENTITY, a_state(0, jnp.bfloat16), None, "flix/a is float32.* there, bfloat16"),
        (IDENTITY, a_state(0, rows=5), None, r"flix/a is float32\[4, 2\] there, float32\[5, 2\]"),
    ],
)
def test_what_does_not_agree_is_refused(saved, identity, template, step, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(saved, identity).restore(template, step)


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
