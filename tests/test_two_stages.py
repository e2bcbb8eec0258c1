"""A base that is a run of one LoRA: folded into its own base, it is what the next run stands on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import make_base_run, write_words

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data.cells import Mixture
from flix_jax.experiments import inference, training
from flix_jax.experiments.job import Job
from flix_jax.training.optimizers import Optimizer, Schedule

LORA = FeatureSpace((FeatureType("shared", ("shared",), rank=2),))
FLIX = FeatureSpace((FeatureType("task", rank=2), FeatureType("language", rank=2)))


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """(the base, the run of a LoRA, the run of FLix on it)."""
    base = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    english = dataclasses.replace(
        base,
        base=base,
        mixture=Mixture(include=("*/x",)),
        adapters=AdapterSpec(LORA, alpha=6.0),
        optimizer=Optimizer("sgd", Schedule(learning_rate=1.0)),
    )
    target = dataclasses.replace(
        english,
        base=english,
        mixture=Mixture(include=("*/y",)),
        adapters=AdapterSpec(FLIX),
    )
    return base, english, target


@pytest.fixture(scope="module")
def trained(stages, tmp_path_factory):
    """(the folder of the last run, where the two before it are)."""
    bases_dir = tmp_path_factory.mktemp("bases")
    folder = tmp_path_factory.mktemp("run")
    training.train(stages[2], folder, bases_dir=bases_dir)
    return folder, bases_dir


def test_the_adapters_of_the_base_are_folded(stages, trained):
    base, english, target = stages
    folder, bases_dir = trained
    assert {path.name for path in bases_dir.iterdir()} >= {
        base.fingerprint(),
        english.fingerprint(),
    }
    below = Job(english, bases_dir / english.fingerprint(), bases_dir=bases_dir)
    adapters, frozen, step = inference.restore(below)
    assert step == english.total_steps
    found = dict(tree.named_leaves(Job(target, folder, bases_dir=bases_dir).load_base()))
    banks = dict(tree.named_leaves(adapters))
    moved = 0
    for path, kernel in tree.named_leaves(frozen):
        name = (*path[:-1], "flix", "shared")
        expected = np.asarray(kernel)
        if (*name, "a") in banks:
            first, second = (np.asarray(banks[(*name, x)], np.float64) for x in "ab")
            # Scanned: kernels [in, layers, out], banks [values, layers, …]; alpha / rank is 3.
            rows = expected.reshape(expected.shape[0], expected.shape[1], -1)
            update = [3.0 * first[0, i] @ second[0, i] for i in range(rows.shape[1])]
            assert np.abs(update).max() > 1e-6
            expected = expected + np.stack(update, 1).reshape(expected.shape)
            moved += 1
        np.testing.assert_allclose(np.asarray(found[path]), expected, rtol=1e-5, atol=1e-6)
    assert moved > 5


def test_the_next_run_begins_where_the_lora_ended(stages, trained):
    _, english, target = stages
    folder, bases_dir = trained
    first = Job(english, bases_dir / english.fingerprint(), bases_dir=bases_dir)
    second = Job(target, folder, bases_dir=bases_dir)
    ends = tree.join(*reversed(inference.restore(first)[:2]))
    begins = tree.join(*reversed(second.initial_parameters(second.load_base())))
    batch = {name: jnp.ones(shape, jnp.int32) for name, shape in first.batch_shapes(2).items()}
    batch["encoder_input_tokens"] = jnp.arange(2 * 8).reshape(2, 8) + 100
    batch["feature_ids"] = jnp.zeros((2, 1), jnp.int32)
    one = jax.jit(first.model.loss)(ends, batch)[0]
    batch["feature_ids"] = jnp.zeros((2, 2), jnp.int32)
    np.testing.assert_allclose(jax.jit(second.model.loss)(begins, batch)[0], one, rtol=1e-5)


def test_a_run_on_two_stages_is_started_again_and_evaluated(stages, trained):
    _, english, target = stages
    folder, bases_dir = trained
    longer = dataclasses.replace(target, total_steps=6)
    job = training.train(longer, folder, bases_dir=bases_dir)
    assert inference.restore(job)[2] == 6
    board = inference.evaluate(longer, folder, bases_dir=bases_dir, say=lambda text: None)
    assert set(board.scores) == {"up/y", "back/y"}
    other = dataclasses.replace(target, base=dataclasses.replace(english, seed=5))
    with pytest.raises(ValueError, match="holds another run: base.seed is absent|base.seed is 0"):
        Job(other, folder, bases_dir=bases_dir)


def test_a_base_that_cannot_be_folded_is_refused(stages, tmp_path):
    _, english, target = stages
    several = dataclasses.replace(english, adapters=AdapterSpec(FLIX))
    with pytest.raises(ValueError, match=r"its 2 cells use in 2 ways.*configs/adapters/lora.gin"):
        Job(dataclasses.replace(target, base=several), tmp_path)
    one_cell = dataclasses.replace(several, mixture=Mixture(include=("up/x",)))
    Job(dataclasses.replace(target, base=one_cell), tmp_path)  # one use of it
    rounded = dataclasses.replace(english, frozen_dtype="bfloat16")
    with pytest.raises(ValueError, match="cannot be folded without rounding"):
        dataclasses.replace(target, base=rounded)
    some = dataclasses.replace(english, adapters=None, trainable=(".*/scale",))
    with pytest.raises(ValueError, match="Run.base must train every parameter, or adapters"):
        dataclasses.replace(target, base=some)
