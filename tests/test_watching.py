"""What is seen of a step from within, against the model's own logits and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import make_base_run, write_words

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.experiments import dumps
from flix_jax.experiments.job import Job
from flix_jax.experiments.replay import Replayed
from flix_jax.training import partitioning

TYPES = (FeatureType("task", rank=2), FeatureType("language", rank=2))


@pytest.mark.parametrize(
    ("scan", "remat", "microbatches", "tables"),
    [
        (True, "none", 1, "banks"),
        pytest.param(True, "minimal", 2, "rows", marks=pytest.mark.exhaustive),
        pytest.param(False, "full", 1, "all", marks=pytest.mark.exhaustive),
        pytest.param(True, "minimal", 1, "merged", marks=pytest.mark.exhaustive),
    ],
)
def test_outputs_and_gradients_are_those_of_the_model(tmp_path, scan, remat, microbatches, tables):
    base = make_base_run(write_words(tmp_path / "data"))
    model = dataclasses.replace(
        base.model, scan_layers=scan, remat=remat, num_decoder_layers=2, dropout_rate=0.0
    )
    run = dataclasses.replace(
        base,
        model=model,
        adapters=AdapterSpec(FeatureSpace(TYPES)),
        microbatches=microbatches,
        batch_size=16,
        tables=tables,
    )
    job = Job(run, tmp_path / "run")
    trained, frozen = job.initial_parameters(None)
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    trained = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) * 0.1, trained)
    state = job.parameters.create_state(trained, job.optimizer())
    batch = partitioning.put_batch(job.mesh, job.pipeline().batch_at(0))
    found = dumps.look(job, Replayed(1, state, batch, {}, None), frozen)

    @jax.jit
    def own(trained, batch):
        params = tree.join(frozen, trained)
        logits = job.model.logits(params, batch)
        grads = jax.grad(lambda t: job.model.loss(tree.join(frozen, t), batch)[0])(trained)
        return jnp.max(jnp.abs(logits)), grads

    logits, _ = own(trained, batch)
    # A microbatch takes every other row; the largest of their gradients is told.
    parts = [{k: v[i::microbatches] for k, v in batch.items()} for i in range(microbatches)]
    each = [own(trained, jax.device_get(part))[1] for part in parts]
    outputs = {output.path: output for output in found.outputs}
    np.testing.assert_allclose(outputs["decoder/logits_dense"].largest, logits, rtol=1e-5)
    assert all(o.finite and o.inputs_finite for o in found.outputs) and found.first is None
    layer = "decoder/decoder/mlp/wo[1]" if scan else "decoder/layers_1/mlp/wo"
    assert outputs[layer].largest > 0
    assert [o.path for o in found.outputs].index(layer) > 10
    expected = {
        "/".join(path): max(float(jnp.max(jnp.abs(x))) for x in leaves)
        for path, leaves in (
            (path, [dict(tree.named_leaves(e))[path] for e in each])
            for path, _ in tree.named_leaves(each[0])
        )
    }
    assert expected.keys() == {g.path for g in found.gradients}
    for gradient in found.gradients:
        np.testing.assert_allclose(
            gradient.largest, expected[gradient.path], rtol=1e-4, err_msg=gradient.path
        )
    # The backward pass comes to the decoder first.
    assert found.gradients[0].path.startswith("decoder/")
    assert found.gradients[-1].path.startswith("encoder/")
