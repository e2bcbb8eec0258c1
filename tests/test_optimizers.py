"""Schedules and optimizers against their formulas, step by step in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flix_jax.training.optimizers import Optimizer, Schedule, masked

PEAK, WARMUP, TOTAL = 0.5, 10, 110


def expected(kind: str, step: int) -> float:
    if step < WARMUP:
        return PEAK * step / WARMUP
    done = (step - WARMUP) / (TOTAL - WARMUP)
    return {
        "constant": PEAK,
        "linear": PEAK * (1 - done),
        "cosine": PEAK * 0.5 * (1 + np.cos(np.pi * done)),
        "rsqrt": PEAK * np.sqrt(WARMUP / step),
    }[kind]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "rsqrt"])
def test_schedule_follows_its_formula(kind):
    rate = Schedule(kind, PEAK, WARMUP).build(TOTAL)
    for step in (0, 1, 5, 10, 11, 60, 109):
        np.testing.assert_allclose(rate(step), expected(kind, step), rtol=1e-6, atol=1e-7)


def run(optimizer: Optimizer, params, gradients):
    transformation = optimizer.build(total_steps=len(gradients) + 1)
    state = transformation.init(params)
    for gradient in gradients:
        updates, state = transformation.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def test_adamw_is_kingma_and_ba_with_decoupled_weight_decay():
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(3, 4)).astype(np.float32) for _ in range(5)]
    start = rng.normal(size=(3, 4)).astype(np.float32)
    got = run(Optimizer("adamw", Schedule("constant", 0.1), 0.01, None), start, gradients)

    p, m, v = start.astype(np.float64), np.zeros((3, 4)), np.zeros((3, 4))
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - 0.1 * ((m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.01 * p)
    np.testing.assert_allclose(got, p, rtol=1e-5, atol=1e-6)


def test_clipping_scales_the_whole_tree_to_the_norm():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    got = run(Optimizer("sgd", Schedule("constant", 1.0), 0.0, 1.0), params, [gradient])
    np.testing.assert_allclose(got["a"], [-0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(got["b"], [-0.8], rtol=1e-6)


def test_adafactor_steps_have_the_learning_rate_as_their_size():
    params = {"a": jnp.ones((4, 4))}
    gradient = {"a": jnp.full((4, 4), 1e-3)}
    got = run(Optimizer("adafactor", Schedule("constant", 0.1), 0.0, None), params, [gradient])
    np.testing.assert_allclose(got["a"], 0.9, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_a_masked_optimizer_trains_rows_as_if_there_were_no_others(name):
    """Those rows are clipped by their own norm; the others keep their bits, zeros their signs."""
    rng = np.random.default_rng(0)
    mask = {"a": np.array([True, False, True]).reshape(-1, 1, 1), "b": np.zeros((2, 1), bool)}
    start = {"a": rng.normal(size=(3, 2, 4)), "b": rng.normal(size=(2, 3))}
    start = jax.tree.map(lambda x: x.astype(np.float32), start)
    start["a"][1, 0, :3] = -0.0, 0.0, 1e-30
    gradients = [
        jax.tree.map(lambda x: 10 * rng.normal(size=x.shape).astype(np.float32), start)
        for _ in range(4)
    ]
    optimizer = Optimizer(name, Schedule("constant", 0.1), 0.1, clip_norm=1.0)

    def steps(optimizer, params, gradients):
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return jax.tree.map(np.asarray, (params, state))

    built = optimizer.build(total_steps=5)
    found, state = steps(masked(built, mask), start, gradients)
    assert found["b"].tobytes() == start["b"].tobytes()
    assert found["a"][1].tobytes() == start["a"][1].tobytes()
    assert jax.tree.structure(state) == jax.tree.structure(built.init(start))
    assert (found["a"][::2] != start["a"][::2]).all()
    if name != "adafactor":  # it looks at whole arrays
        alone, _ = steps(built, {"a": start["a"][::2]}, [{"a": g["a"][::2]} for g in gradients])
        np.testing.assert_allclose(found["a"][::2], alone["a"], rtol=1e-6, atol=1e-7)
    if name == "adamw":
        assert (state[1].mu["a"][1] == 0).all() and (state[1].nu["b"] == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule("lineal"), "lineal"),
        (lambda: Schedule(learning_rate=0.0), "learning_rate"),
        (lambda: Schedule(warmup_steps=-1), "warmup_steps"),
        (lambda: Schedule("constant", 1.0, 10).build(10), "total_steps 10"),
        (lambda: Optimizer("adam"), "adam"),
        (lambda: Optimizer(clip_norm=0.0), "clip_norm"),
        (lambda: Optimizer(weight_decay=-1.0), "weight_decay"),
    ],
)
def test_bad_values_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
