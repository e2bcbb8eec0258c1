"""Trials of one program whose adapters read a source are the trials by themselves."""

import dataclasses

import jax
import numpy as np
import pytest
from test_source import BATCH, CONFIG, SHAPES

from flix_jax.adapters.activation import FeatureSettings
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.fusion import Fusion
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.experiments.together import wide_space
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.parameters import Parameters
from flix_jax.training.partitioning import MeshSpec
from flix_jax.training.step import train_step
from flix_jax.training.trials import Trial, Trials

STEPS, ALPHAS, RANKS = 2, (4.0, 1.0), (1, 3)


def space(rank):
    return FeatureSpace(
        (
            FeatureType("task", ("ner", "qa"), rank=rank),
            FeatureType("language", ("sw", "yo"), rank=2),
        )
    )


@pytest.mark.exhaustive
def test_trials_of_other_ranks_are_the_trials_by_themselves():
    """With the function whose logits are divided by the root of a rank."""
    fusion = Fusion("cross_attention")
    mesh = MeshSpec().make(jax.devices()[:1])
    network = Transformer(dataclasses.replace(CONFIG, scan_layers=True))
    optimizer = Optimizer("adamw", Schedule(learning_rate=1e-2))
    wide = wide_space([space(rank) for rank in RANKS])
    widths = {t.name: t.max_rank for t in wide.types}
    trials, states, alone = [], [], []
    for seed, (rank, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True)):
        spec = AdapterSpec(space(rank), "encoder", alpha, fusion=fusion)
        model = EncoderDecoder(network, spec)
        parameters = Parameters(model, SHAPES, mesh, True)
        built = optimizer.build(STEPS)
        settings = FeatureSettings.of(spec.space, alpha, widths)
        trials.append(Trial(parameters.state_template(built), optimizer, seed, settings))
        states.append(parameters.create_state(parameters.fresh_adapters(seed), built))
        _, frozen = parameters.random(0)
        state, step = states[-1], jax.jit(train_step(model.loss, built))
        for _ in range(STEPS):
            state, _ = step(state, frozen, BATCH, seed)
        alone.append(state.trained)

    shared = EncoderDecoder(network, AdapterSpec(wide, "encoder", fusion=fusion))

    def loss_of(settings):
        return dataclasses.replace(shared, settings=settings).loss

    program = Trials(trials, loss_of, total_steps=STEPS, mesh=mesh)
    state = program.stack(states)
    batch = program.put_batch({name: np.asarray(array) for name, array in BATCH.items()})
    for _ in range(STEPS):
        state, _ = program.step(state, frozen, batch)
    for found, expected in zip(program.unstack(state), alone, strict=True):
        for mine, theirs in zip(
            jax.tree.leaves(found.trained), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
