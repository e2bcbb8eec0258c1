"""The train step against gradient descent written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flix_jax.training.step import TrainState, train_step

RNG = np.random.default_rng(0)
W = RNG.normal(size=(3, 2)).astype(np.float32)
A = RNG.normal(size=(3, 1)).astype(np.float32)
B = RNG.normal(size=(1, 2)).astype(np.float32)
BATCH = {
    "x": RNG.normal(size=(8, 3)).astype(np.float32),
    "y": RNG.normal(size=(8, 2)).astype(np.float32),
    "weight": np.array([1, 0, 1, 1, 1, 0, 0, 1], np.float32),
}


def loss(params, batch, *, rng):
    """Weighted squared error of ``x (W + A B)``; the noise metric shows the randomness."""
    kernel = params["dense"]["kernel"] + params["dense"]["flix"]["a"] @ params["dense"]["flix"]["b"]
    errors = jnp.sum((batch["x"] @ kernel - batch["y"]) ** 2, axis=-1)
    total = jnp.sum(errors * batch["weight"])
    noise = jax.random.uniform(rng)
    sums = {"loss": total, "z_loss": noise, "weight": batch["weight"].sum(), "correct": 0.0 * total}
    return total, sums


def parts():
    return {"dense": {"flix": {"a": jnp.asarray(A), "b": jnp.asarray(B)}}}, {
        "dense": {"kernel": jnp.asarray(W)}
    }


def root_loss(params, batch, *, rng):
    """Finite at zero, where its gradient is not."""
    total, sums = loss(params, batch, rng=rng)
    roots = jnp.sqrt(params["dense"]["flix"]["b"] * batch["root"][:, None])
    return total + jnp.sum(roots), sums


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_bit_for_bit(microbatches, where):
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    trained, frozen = parts()
    trained = jax.tree.map(jnp.abs, trained)
    step = jax.jit(train_step(root_loss, optimizer, microbatches=microbatches, skip=True))
    good = BATCH | {"root": np.ones(8, np.float32)}
    bad = dict(good)
    if where == "loss":
        bad["x"] = np.full_like(BATCH["x"], np.inf)
    else:
        bad["root"] = np.zeros(8, np.float32)
    first, metrics = step(TrainState.create(trained, optimizer), frozen, good, 0)
    assert metrics["skipped"] == 0 and np.isfinite(metrics["grad_norm"])
    second, metrics = step(first, frozen, bad, 0)
    assert metrics["skipped"] == 1 and second.step == 2
    assert np.isfinite(metrics["loss"]) == (where == "gradient")
    for before, after in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        if before.shape or before.dtype != jnp.int32:
            assert before.tobytes() == after.tobytes()
    counts = [s.opt_state[0].count for s in (first, second)]
    assert counts == [1, 1]
    # What follows is what would have followed the first step, but for the step's own randomness.
    third, _ = step(second, frozen, good, 0)
    straight, _ = step(first.replace(step=second.step), frozen, good, 0)
    for one, other in zip(*map(jax.tree.leaves, (third, straight)), strict=True):
        np.testing.assert_array_equal(one, other)
    plain = jax.jit(train_step(root_loss, optimizer, microbatches=microbatches))
    for one, other in zip(
        jax.tree.leaves(plain(TrainState.create(trained, optimizer), frozen, good, 0)[0]),
        jax.tree.leaves(first),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def run(microbatches: int, steps: int = 1, seed: int = 0):
    optimizer = optax.sgd(0.1)
    trained, frozen = parts()
    state = TrainState.create(trained, optimizer)
    step = jax.jit(train_step(loss, optimizer, microbatches=microbatches))
    history = []
    for _ in range(steps):
        state, metrics = step(state, frozen, BATCH, seed)
        history.append(metrics)
    return state, history


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_one_step_is_gradient_descent_on_the_mean_over_weighted_tokens(microbatches):
    state, history = run(microbatches)
    x, y, weight = (BATCH[k].astype(np.float64) for k in ("x", "y", "weight"))
    error = (x @ (W + A @ B) - y) * weight[:, None]
    kernel_grad = 2 * x.T @ error / weight.sum()
    a_grad, b_grad = kernel_grad @ B.T, A.T @ kernel_grad
    flix = state.trained["dense"]["flix"]
    np.testing.assert_allclose(flix["a"], A - 0.1 * a_grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flix["b"], B - 0.1 * b_grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(history[0]["loss"], (error**2).sum() / weight.sum(), rtol=1e-5)
    norm = np.sqrt((a_grad**2).sum() + (b_grad**2).sum())
    np.testing.assert_allclose(history[0]["grad_norm"], norm, rtol=1e-5)
    assert history[0]["tokens"] == weight.sum() and state.step == 1


def test_randomness_is_a_function_of_seed_and_step():
    noise = [float(m["z_loss"]) for m in run(1, steps=3)[1]]
    assert len(set(noise)) == 3
    assert noise == [float(m["z_loss"]) for m in run(1, steps=3)[1]]
    assert noise != [float(m["z_loss"]) for m in run(1, steps=3, seed=1)[1]]


def test_only_what_is_trained_is_in_the_state():
    trained, _ = parts()
    assert jax.tree.structure(run(1)[0].trained) == jax.tree.structure(trained)
