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


CHUNKS, EMBED, VOCAB = 3, 5, 11


def _head(params, states):
    return states.astype(jnp.float32) @ params["kernel"]


def _tokens():
    rng = np.random.default_rng(1)
    states = rng.normal(size=(4, 6, EMBED)).astype(np.float32)
    kernel = rng.normal(size=(EMBED, VOCAB)).astype(np.float32)
    targets, weights = rng.integers(0, VOCAB, (4, 6)), rng.random((4, 6))
    return {"kernel": jnp.asarray(kernel)}, *map(jnp.asarray, (states, targets, weights))


@pytest.mark.parametrize("differentiated", [(0, 1), (1,), (0,)])
@pytest.mark.parametrize("chunks", [1, CHUNKS, 6])
def test_chunks_change_neither_loss_nor_gradients(chunks, differentiated):
    """Against the logits as a whole, in float32, and the metrics to the bit of their sums."""
    params, states, targets, weights = _tokens()
    settings = {"label_smoothing": 0.1, "z_loss": 1e-2}

    def whole(params, states):
        logits = _head(params, states)
        return losses.weighted_sums(logits, targets, weights, **settings)

    def parts(params, states):
        return losses.chunked_sums(
            _head,
            params,
            states,
            targets,
            weights,
            chunks=chunks,
            **settings,
        )

    plain = jax.jit(parts)(params, states)
    expected, found = (
        jax.jit(jax.value_and_grad(of, argnums=differentiated, has_aux=True))(params, states)
        for of in (whole, parts)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    scaled = jax.grad(lambda s: -3.0 * parts(params, s)[0])(states)
    np.testing.assert_allclose(
        scaled, -3.0 * jax.grad(lambda s: whole(params, s)[0])(states), rtol=1e-5, atol=1e-6
    )


def test_metrics_of_chunks_have_no_gradient():
    params, states, targets, weights = _tokens()

    def correct(states):
        return losses.chunked_sums(_head, params, states, targets, weights, chunks=CHUNKS)[1][
            "correct"
        ]

    assert not np.any(jax.grad(correct)(states))


def test_chunks_need_a_part_of_the_memory():
    """Of a head of 4,096 tokens of vocabulary: a quarter of the logits, and no second copy."""
    rows, length, vocab = 8, 64, 4096
    shapes = (
        {"kernel": jax.ShapeDtypeStruct((EMBED, vocab), jnp.float32)},
        jax.ShapeDtypeStruct((rows, length, EMBED), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
    )

    def needed(chunks):
        def loss(params, states, targets):
            sums = losses.weighted_sums
            if chunks == 1:
                return sums(_head(params, states), targets, targets > 0)[0]
            return losses.chunked_sums(_head, params, states, targets, targets > 0, chunks=chunks)[
                0
            ]

        compiled = jax.jit(jax.grad(loss, argnums=1)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = rows * length * vocab * 4
    assert needed(1) >= logits
    assert needed(4) < 0.6 * logits and needed(16) < 0.2 * logits


def test_chunks_must_divide_the_length():
    params, states, targets, weights = _tokens()
    with pytest.raises(ValueError, match="4 chunks do not divide a length of 6 tokens"):
        losses.chunked_sums(_head, params, states, targets, weights, chunks=4)
