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


def test_arguments_that_change_alike_are_told_together():
    said = []
    names = ("inputs", "targets", "weights", "features")
    step = tracing.telling_compilations(jax.jit(lambda batch: sum(batch.values())), said.append)
    for size in (4, 2):
        step({name: jnp.zeros(size) for name in names})
    step({name: jnp.zeros(2) if name == "inputs" else jnp.zeros(1) for name in names})
    assert said == [
        "compiled again: arguments 0/features, 0/inputs, 0/targets and 1 more were float32[4], "
        "are float32[2]",
        "compiled again: arguments 0/features, 0/targets, 0/weights were float32[2], "
        "are float32[1]",
    ]


def test_what_an_argument_is_split_over_is_told_where_that_changed():
    said = []
    step = tracing.telling_compilations(jax.jit(lambda x: x + 1), said.append)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for size, axes in ((8, ("data",)), (16, ("data",)), (16, ())):
        spec = jax.sharding.PartitionSpec(*axes)
        step(jax.device_put(jnp.zeros(size), jax.sharding.NamedSharding(mesh, spec)))
    assert said == [
        "compiled again: argument 0 was float32[8], is float32[16]",
        "compiled again: argument 0 was float32[16] over P('data',), is float32[16]",
    ]


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
