"""Against T5X itself: what it writes is read here, what is written here it restores.

Runs where T5X is installed; the layouts are tested without it in test_t5x_checkpoints.py.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flix_jax.interop import bases, network, t5x_checkpoints
from flix_jax.interop.leaves import Leaf
from flix_jax.models.t5 import Transformer

pytest.importorskip("t5x.checkpoints", reason="T5X is not installed")

SHAPES = {"encoder_input_tokens": (3, 8), "decoder_input_tokens": (3, 6)}


def tokens():
    rng = np.random.default_rng(0)
    found = {name: rng.integers(2, 60, shape) for name, shape in SHAPES.items()}
    found["decoder_target_tokens"] = rng.integers(2, 60, (3, 6))
    found["encoder_input_tokens"][1, 5:] = 0
    return {name: jnp.asarray(array, jnp.int32) for name, array in found.items()}


@pytest.fixture(scope="module", params=["t5", "scalable_t5"])
def peer(request):
    """(name, T5X's network, its train state with parameters drawn, its partitioner)."""
    from t5x import adafactor, partitioning, train_state

    module = importlib.import_module(f"t5x.examples.{request.param}.network")
    more = {"scan_layers": True} if request.param == "scalable_t5" else {}
    config = module.T5Config(
        vocab_size=64,
        emb_dim=16,
        num_heads=8,  # its mesh on CPUs splits them over all devices
        num_encoder_layers=3,
        num_decoder_layers=2,
        head_dim=4,
        mlp_dim=32,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
        dtype=jnp.float32,
        **more,
    )
    net = module.Transformer(config)
    variables = net.init(jax.random.key(0), **tokens(), enable_dropout=False)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), x.dtype), variables
    )
    optimizer = adafactor.Adafactor(learning_rate=0.1, factored=False)
    state = train_state.FlaxOptimTrainState.create(optimizer, variables)
    return request.param, net, state, partitioning.PjitPartitioner(num_partitions=1)


def write(peer, folder, orbax):
    from t5x import checkpoints

    _, _, state, partitioner = peer
    if orbax:
        manager = checkpoints.OrbaxCheckpointManagerInterface(
            str(folder), state, partitioner, save_dtype=jnp.float32
        )
        manager.save(state)
        manager.wait_until_finished()
        manager.close()
    else:
        checkpoints.Checkpointer(state, partitioner, str(folder)).save(state)


@pytest.mark.parametrize("orbax", [False, True], ids=["legacy", "current"])
def test_logits_of_its_checkpoints_are_its_own(peer, orbax, tmp_path):
    _, net, state, _ = peer
    write(peer, tmp_path, orbax)
    found = t5x_checkpoints.layout(t5x_checkpoints.find(tmp_path))
    assert found == ("current" if orbax else "legacy")
    config = bases.config_of(tmp_path)
    leaves = network.scanned_as(bases.read(tmp_path, config), config)
    params = network.nested({name: jnp.asarray(leaf.read()) for name, leaf in leaves.items()})
    batch = tokens()
    here = Transformer(config).apply({"params": params}, **batch, enable_dropout=False)
    there = net.apply({"params": state.params}, **batch, enable_dropout=False)
    largest = float(jnp.abs(there).max())
    np.testing.assert_allclose(here / largest, there / largest, atol=1e-5)


def test_it_restores_what_is_written_here(peer, tmp_path):
    from t5x import checkpoints

    name, _, state, partitioner = peer
    leaves = {n: Leaf.of(x, n) for n, x in network.flat(state.params).items()}
    config = network.config_of(leaves, name)
    fitted = network.fit(leaves, config, name)
    if name == "scalable_t5":
        fitted = t5x_checkpoints.scanned(fitted, config)
    made = t5x_checkpoints.write(fitted, tmp_path, step=0)
    zeros = state.replace_params(jax.tree.map(jnp.zeros_like, state.params))
    restored = checkpoints.Checkpointer(zeros, partitioner, str(tmp_path)).restore(
        path=str(made), fallback_state=zeros.state_dict()
    )
    for one, other in zip(
        jax.tree.leaves(restored.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)
