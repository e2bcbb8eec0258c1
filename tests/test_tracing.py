"""What is told of a step that is compiled again, and what a trace holds."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from flix_jax.experiments import topology
from flix_jax.training import tracing


def test_a_step_that_is_compiled_again_says_what_changed():
    said = []
    step = tracing.telling_compilations(
        jax.jit(lambda state, batch: state + batch["x"]), said.append
    )
    for shape in ((4,), (4,), (2, 4), (2, 4), (4,)):
        step(jnp.zeros(4), {"x": jnp.zeros(shape)})
    assert said == ["compiled again: argument 1/x was float32[4], is float32[2, 4]"]
    step(jnp.zeros(4), {"x": jnp.zeros(4, jnp.int32)})
    assert said[1:] == ["compiled again: argument 1/x was float32[2, 4], is int32[4]"]


def test_the_donated_arguments_of_a_step_can_be_told_of():
    said = []
    step = tracing.telling_compilations(jax.jit(lambda x: x + 1, donate_argnums=0), said.append)
    step(step(jnp.zeros(4)))
    step(jnp.zeros(5))
    assert said == ["compiled again: argument 0 was float32[4], is float32[5]"]


def test_the_trace_holds_the_steps_that_were_asked_for(tmp_path):
    step = tracing.traced(jax.jit(lambda x: x + 1), 12, 13, start_step=10, folder=tmp_path)
    x = jnp.zeros(4)
    for _ in range(5):
        x = step(x)
    assert x[0] == 5
    (path,) = tmp_path.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    numbers = {int(e["args"]["step_num"]) for e in events if "step_num" in e.get("args", {})}
    assert numbers == {12, 13}


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
        ("TPU v52", None),
    ],
)
def test_the_peak_of_devices_follows_from_their_names(kind, peak):
    assert topology.peak_flops(kind) == peak
