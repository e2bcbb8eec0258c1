"""Dropout by example: what an example loses does not depend on the batch around it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.models.config import T5Config
from flix_jax.models.dropout import by_example
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer
from flix_jax.training.step import TrainState, train_step

ROWS = 8


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, broadcast_dims=(-2,), deterministic=False)(x)
        return nn.Dropout(0.25)(x, deterministic=False), None


class Stack(nn.Module):
    """Of layers that are scanned and rematerialised, as those of the network."""

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(nn.remat(Layer), split_rngs={"dropout": True}, length=2)
        return scanned()(x)[0]


@functools.partial(jax.jit, static_argnames="apart")
def dropped(x, numbers, apart=True):
    with by_example(numbers):
        return (Stack() if apart else Layer()).apply({}, x, rngs={"dropout": jax.random.key(3)})


def test_a_mask_is_a_function_of_the_number_of_the_example():
    x = jnp.ones((6, 5, 40))
    whole = np.asarray(dropped(x, jnp.arange(6)))
    chosen = jnp.asarray([4, 1, 1])
    np.testing.assert_array_equal(dropped(x[:3], chosen), whole[np.asarray(chosen)])
    other = np.asarray(dropped(x, jnp.arange(6) + 6))
    rows = np.concatenate([whole, other]).reshape(12, -1) > 0
    agree = (rows[:, None] == rows[None]).mean(-1)[~np.eye(12, dtype=bool)]
    assert agree.max() < 0.95  # no two examples have one mask


def test_it_drops_as_linens_own():
    """Its rates, scales and shared axes."""
    x = jnp.ones((200, 3, 50))
    once = np.asarray(dropped(x, jnp.arange(200), apart=False)[0])
    assert set(np.unique(once)) == {0.0, np.float32(1 / 0.5 / 0.75)}
    first = (once > 0).any(axis=1)  # shared by the positions
    assert first.mean() == pytest.approx(0.5 * (1 - 0.25**3), abs=0.02)
    assert once.mean() == pytest.approx(1.0, abs=0.02)


def test_masks_that_are_shared_by_the_batch_stay_so():
    x, numbers = jnp.ones((4, 30)), jnp.arange(4)
    shared = nn.Dropout(0.5, broadcast_dims=(0,), deterministic=False)
    rngs = {"dropout": jax.random.key(0)}
    with by_example(numbers):
        found = shared.apply({}, x, rngs=rngs)
        off = nn.Dropout(0.5, deterministic=True).apply({}, x)
        given = nn.Dropout(0.5, deterministic=False).apply({}, x, rng=jax.random.key(1))
    np.testing.assert_array_equal(found, shared.apply({}, x, rngs=rngs))
    np.testing.assert_array_equal(off, x)
    own = nn.Dropout(0.5, deterministic=False).apply({}, x, rng=jax.random.key(1))
    np.testing.assert_array_equal(given, own)


def test_rows_that_are_no_examples_are_refused():
    with by_example(jnp.arange(3)), pytest.raises(ValueError, match="dropout of 6 rows, expected"):
        nn.Dropout(0.5, deterministic=False).apply(
            {}, jnp.ones((6, 2)), rngs={"dropout": jax.random.key(0)}
        )


TYPES = (FeatureType("task", ("a", "b"), rank=2, dropout=0.3), FeatureType("language", ("x", "y")))
SHAPES = {
    "encoder_input_tokens": (ROWS, 12),
    "decoder_input_tokens": (ROWS, 6),
    "decoder_target_tokens": (ROWS, 6),
    "feature_ids": (ROWS, 2),
}


@functools.cache
def made(scan):
    """(model, trained, frozen, batch) with every kind of dropout that there is."""
    config = T5Config(
        vocab_size=64,
        emb_dim=32,
        num_heads=2,
        head_dim=16,
        mlp_dim=64,
        num_encoder_layers=2,
        num_decoder_layers=2,
        dropout_rate=0.1,
        scan_layers=scan,
        remat="full" if scan else "none",
    )
    space = FeatureSpace(TYPES, keep_one=True)
    model = EncoderDecoder(Transformer(config), AdapterSpec(space, dropout=0.1), z_loss=1e-3)
    params = jax.jit(lambda key: nn.unbox(model.init(key, SHAPES)))(jax.random.key(0))
    frozen, trained = tree.split_adapters(params)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, jnp.float32), trained
    )
    batch = {name: jnp.asarray(rng.integers(2, 64, s), jnp.int32) for name, s in SHAPES.items()}
    batch["feature_ids"] = jnp.asarray(rng.integers(0, 2, (ROWS, 2)), jnp.int32)
    batch["decoder_target_tokens"] *= rng.random((ROWS, 6)) < 0.8
    return model, trained, frozen, batch


def step_of(model, trained, microbatches):
    """(the step, jitted; its state), of an optimizer whose state is the last gradients."""
    optimizer = optax.trace(decay=0.0)
    step = jax.jit(train_step(model.loss, optimizer, microbatches=microbatches))
    return step, TrainState.create(trained, optimizer)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_microbatches_change_neither_losses_nor_gradients(scan):
    model, trained, frozen, batch = made(scan)
    found = {}
    for microbatches in (1, 2, 4):
        step, state = step_of(model, trained, microbatches)
        new, metrics = step(state, frozen, batch, 5)
        found[microbatches] = metrics, new.opt_state.trace
    still = dataclasses.replace(model, adapters=dataclasses.replace(model.adapters, dropout=0.0))
    step, state = step_of(still, trained, 1)
    assert step(state, frozen, batch, 5)[1]["loss"] != found[1][0]["loss"]
    for microbatches in (2, 4):
        for name, value in found[1][0].items():
            np.testing.assert_allclose(found[microbatches][0][name], value, rtol=1e-6)
        one, other = (jax.tree.leaves(found[m][1]) for m in (microbatches, 1))
        for x, y in zip(one, other, strict=True):  # a bank alone is small beside its summands
            assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)
        one, other = (np.concatenate([np.ravel(x) for x in leaves]) for leaves in (one, other))
        assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(other)


@pytest.mark.exhaustive
def test_microbatches_need_no_more_memory():
    model, trained, frozen, batch = made(True)
    needed = []
    for microbatches in (1, 2, 4):
        step, state = step_of(model, trained, microbatches)
        sizes = step.lower(state, frozen, batch, 5).compile().memory_analysis()
        needed.append(sizes.temp_size_in_bytes)
    assert needed == sorted(needed, reverse=True)
