"""The loss against its definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flix_jax.models import losses


def _definition(logits, targets, label_smoothing, z_loss):
    """Cross-entropy with the smoothed targets, less their entropy, plus z_loss * log(Z)^2."""
    logits = np.asarray(logits, np.float64)
    vocab = logits.shape[-1]
    wanted = np.full(logits.shape, label_smoothing / (vocab - 1))
    np.put_along_axis(wanted, targets[..., None], 1.0 - label_smoothing, axis=-1)
    log_z = np.log(np.exp(logits).sum(-1))
    cross = -(wanted * (logits - log_z[..., None])).sum(-1)
    entropy = -(wanted * np.log(np.maximum(wanted, 1e-300))).sum(-1)
    return cross - entropy + z_loss * log_z**2, z_loss * log_z**2


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
def test_loss_and_its_gradient(label_smoothing, z_loss):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 9)).astype(np.float32) * 3
    targets = rng.integers(0, 9, (2, 3))
    arrays = jnp.asarray(logits), jnp.asarray(targets)
    loss, z = losses.cross_entropy(*arrays, label_smoothing, z_loss)
    expected_loss, expected_z = _definition(logits, targets, label_smoothing, z_loss)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(z, expected_z, rtol=1e-5)

    weights = rng.random((2, 3))

    def total(logits, targets):
        return losses.weighted_sums(
            logits, targets, jnp.asarray(weights), label_smoothing=label_smoothing, z_loss=z_loss
        )[0]

    gradient = jax.grad(total)(*arrays)
    numerical = np.zeros_like(logits, np.float64)
    for index in np.ndindex(logits.shape):
        ends = []
        for sign in (1, -1):
            moved = logits.astype(np.float64)
            moved[index] += sign * 1e-4
            ends.append((weights * _definition(moved, targets, label_smoothing, z_loss)[0]).sum())
        numerical[index] = (ends[0] - ends[1]) / 2e-4
    np.testing.assert_allclose(gradient, numerical, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_a_perfect_prediction_costs_nothing(label_smoothing):
    wanted = np.full((1, 5), max(label_smoothing / 4, 1e-30), np.float32)
    wanted[0, 3] = 1.0 - label_smoothing
    loss, _ = losses.cross_entropy(jnp.log(wanted), jnp.asarray([3]), label_smoothing)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)


def test_sums_are_weighted():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    best = np.asarray(jnp.argmax(logits, -1))
    targets = jnp.asarray(np.where([[1, 1, 0], [1, 0, 1]], best, (best + 1) % 5))
    weights = jnp.asarray([[1.0, 0.5, 1.0], [0.0, 1.0, 0.25]])
    total, sums = losses.weighted_sums(logits, targets, weights, z_loss=0.1)
    token_loss, token_z = _definition(logits, np.asarray(targets), 0.0, 0.1)
    np.testing.assert_allclose(total, (token_loss * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["z_loss"], (token_z * weights).sum(), rtol=1e-5)
    assert float(sums["loss"]) == float(total)
    assert float(sums["weight"]) == 3.75
    assert float(sums["correct"]) == 1.75
