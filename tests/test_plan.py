"""Plans: bytes against real arrays, FLOPs against a program's products, texts against counts."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jaxprs import product_flops
from tiny_runs import make_base_run, write_gin, write_words

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.experiments import compiled, flops, plan, plan_text, topology
from flix_jax.experiments.job import Job
from flix_jax.experiments.topology import Topology
from flix_jax.training.optimizers import Optimizer
from flix_jax.training.partitioning import MeshSpec

TEXT = """
HloModule jit_f

%inner_condition (p: (s32[], f32[4])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %three), direction=LT
}

%inner_body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %fusion.1 = f32[4]{0} fusion(%x), calls=%fused, backend_config={"estimated_cycles":"10"}
  %gather.1 = f32[8,4]{1,0:T(8,128)} all-gather(%x), channel_id=1, dimensions={0}
}

%outer_condition (p: (s32[], f32[4])) -> pred[] {
  ROOT %fusion.9 = pred[] fusion(%i), kind=kLoop, calls=%wrapped_compare
}

%wrapped_compare (i: s32[]) -> pred[] {
  %five = s32[] constant(5)
  ROOT %lt.2 = pred[] compare(%i, %five), direction=LT
}

%outer_body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %while.2 = (s32[], f32[4]{0}) while(%t), condition=%inner_condition, body=%inner_body
  %copy.1 = f32[4]{0} copy(%x), backend_config={"estimated_cycles":"100"}
}

%fused (x: f32[4]) -> f32[4] {
  %gather.2 = f32[8,4]{1,0} all-gather(%x), channel_id=1, dimensions={0}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %while.1 = (s32[], f32[4]{0}) while(%t), condition=%outer_condition, body=%outer_body
  %reduce.1 = (f32[2,3]{1,0}, bf16[6]{0}) all-reduce(%a, %b), channel_id=7, to_apply=%add
  %start.1 = (f32[2]{0}, f32[16]{0}) all-gather-start(%c), channel_id=8, dimensions={0}
  %done.1 = f32[16]{0} all-gather-done(%start.1)
  ROOT %add.1 = f32[4]{0} add(%y, %z), backend_config={"estimated_cycles":"1000"}
}
"""


def test_loops_count_as_often_as_they_run():
    read = compiled.read(TEXT)
    assert read.cycles == 5 * (3 * 10 + 100) + 1000
    assert read.collectives == {
        "all-gather": compiled.Collective(15 + 1, 15 * 8 * 4 * 4 + 16 * 4),
        "all-reduce": compiled.Collective(1, 2 * 3 * 4 + 6 * 2),
    }


def test_collectives_of_a_real_program():
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("x",))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x")
    )
    def turns(x):
        def turn(x, _):
            whole = jax.lax.all_gather(jnp.sin(x), "x")  # [4, 2, 3]
            return x + whole.sum(axis=0) + jax.lax.ppermute(x, "x", [(0, 1), (1, 0)]), None

        return jax.lax.scan(turn, x, None, length=7)[0]

    text = jax.jit(turns).lower(jnp.zeros((8, 3))).compile().as_text()
    assert compiled.read(text).collectives == {
        "all-gather": compiled.Collective(7, 7 * 4 * 2 * 3 * 4),
        "collective-permute": compiled.Collective(7, 7 * 2 * 3 * 4),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    types = (FeatureType("task", rank=2), FeatureType("language", rank=4))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, scan_layers=False, num_encoder_layers=2),
        adapters=AdapterSpec(FeatureSpace(types)),
        optimizer=Optimizer("adamw"),
        frozen_dtype="bfloat16",
        mesh=MeshSpec(data=2, fsdp=2, model=2),
    )


@pytest.fixture(scope="module")
def made(run):
    return plan.make(run, topology.find("cpu:8"))


def on_first_device(arrays):
    return sum(
        shard.data.nbytes
        for array in jax.tree.leaves(arrays)
        for shard in array.addressable_shards
        if shard.device == jax.devices()[0]
    )


def test_bytes_are_those_of_the_arrays(run, made, tmp_path):
    job = Job(run, tmp_path)
    trained, frozen = job.initial_parameters(None)
    state = job.parameters.create_state(trained, job.optimizer())
    assert made.state["base"] == on_first_device(frozen)
    assert made.state["trained"] == on_first_device(state.trained)
    assert made.state["optimizer"] == on_first_device(state.opt_state)
    given = sum(made.state.values())
    assert given <= made.train.arguments <= given + 1024
    assert made.fits and made.train.temporaries > made.logits > 0
    assert made.mesh == {"data": 2, "fsdp": 2, "model": 2}


def test_a_table_has_every_parameter(run, made, tmp_path):
    job = Job(run, tmp_path)
    job.note_folder()
    lines = (tmp_path / "parameters.txt").read_text().splitlines()
    leaves = len(jax.tree.leaves(job.parameters.templates))
    assert len(lines) == 2 + leaves + 2
    (logits,) = [line.split() for line in lines if line.startswith("decoder/logits_dense/kernel")]
    # embed over fsdp, vocabulary over model: a quarter of 16 × 384 in bfloat16
    assert logits[1:] == ["frozen", "bfloat16", "16", "×", "384", "fsdp", "model", "3,072"]
    sums = f"frozen {made.state['base']:,}, trained {made.state['trained']:,}"
    assert lines[-1] == f"bytes of a device: {sums}"


def test_flops_are_those_of_the_products(run, tmp_path):
    whole = dataclasses.replace(run, adapters=None, frozen_dtype=None)

    def forward_and_gradients(run):
        job = Job(run, tmp_path)
        trained, frozen = job.parameters.templates
        params = tree.join(frozen, trained)
        batch = {
            name: jnp.ones(shape, jnp.int32)
            for name, shape in job.batch_shapes(run.batch_size).items()
        }

        def loss(params):
            return job.model.loss(params, batch)[0]

        forward = product_flops(jax.make_jaxpr(loss)(params).jaxpr)
        return job, forward, product_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    job, forward, gradients = forward_and_gradients(whole)
    assert flops.model_flops(job) == gradients == 3 * forward
    config = run.model
    pairs = config.num_encoder_layers * run.inputs_length**2
    pairs += run.targets_length * (run.targets_length + run.inputs_length)
    attention = 4 * run.batch_size * config.num_heads * config.head_dim * pairs
    adapted, adapted_forward, _ = forward_and_gradients(run)
    expected = 2 * (forward - attention) + 3 * attention + 3 * (adapted_forward - forward)
    assert flops.model_flops(adapted) == expected


def test_without_a_compiler_what_follows_from_shapes_is_told(run, made):
    there = plan.make(run, Topology("v5e:2x4", topology.CHIPS["v5e"], (), 8, "no compiler"))
    for name in ("mesh", "parameters", "state", "logits", "flops"):
        assert getattr(there, name) == getattr(made, name)
    text = plan_text.to_markdown(there)
    assert "no compiler: what a program needs beside its state is not known" in text
    assert there.fits and there.step_seconds is None


def test_what_does_not_fit_is_told_with_what_would_help(run, made):
    small = dataclasses.replace(topology.CHIPS["v5e"], memory=made.train.memory)
    crowded = dataclasses.replace(made, topology=Topology("v5e:2x4", small, (), 8))
    assert not crowded.fits
    text = plan_text.to_markdown(crowded)
    assert "Does not fit." in text and "remat = 'full'" in text and "Run.microbatches" in text
    refused = plan.Program(1.0, refused="Ran out of memory on HBM")
    text = plan_text.to_markdown(dataclasses.replace(crowded, train=refused))
    assert "The compiler says of training: Ran out of memory on HBM." in text


def test_the_time_of_a_step(made):
    chip = topology.CHIPS["v4"]
    assert chip.clock == pytest.approx(1.05e9, rel=2e-3)  # as Google Cloud gives it
    moved = {"all-reduce": compiled.Collective(1, 10**9)}
    train = dataclasses.replace(made.train, cycles=int(chip.clock / 10), collectives=moved)
    there = dataclasses.replace(made, topology=Topology("v4:2x2x2", chip, (), 8), train=train)
    assert there.step_seconds == pytest.approx((0.1, 0.11), rel=1e-6)
    assert "100 to 110 ms" in plan_text.ranking([there])


@pytest.mark.exhaustive
def test_a_search_ranks_meshes_and_leaves_out_what_cannot_be(run):
    run = dataclasses.replace(
        run, batch_size=4, evaluation=dataclasses.replace(run.evaluation, batch_size=8)
    )
    told = []
    plans = plan.search(run, topology.find("cpu:4"), lambda *of: told.append(plan_text.line(*of)))
    # 4 rows on 4 devices: every factorisation of 4 into three axes
    assert len(told) == 6
    heads = [line for line in told if "is not divisible by mesh axis 'model'" in line]
    assert len(plans) == 6 - len(heads) and all("model 4" in line for line in heads)
    assert plan_text.ranking(plans).count("yes") == len(plans)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5:8x8", "unknown kind 'v5'; did you mean 'v5"),
        ("v5e", "expected a form such as v5e:16x16"),
        ("cpu:2x2", "expected a number of virtual devices, cpu:8"),
        ("v5e:0x4", "sizes must be positive"),
    ],
)
def test_topologies_that_there_are_not(name, says):
    with pytest.raises(ValueError, match=says):
        topology.parse(name)


def test_topologies_are_counted():
    assert topology.parse("v5e:16x16*2") == ("v5e", 512, 2)
    assert topology.parse("v4:4x4x8") == ("v4", 128, 1)
    assert topology.parse("cpu:8") == ("cpu", 8, 1)


def flix_plan(folder, *flags):
    """`flix plan` in a process of its own, where JAX has not started."""
    command = [sys.executable, "-m", "flix_jax.cli", "plan", "--gin_file=run.gin", *flags]
    names = {"JAX_PLATFORMS", "XLA_FLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command(tmp_path):
    write_gin(tmp_path)
    data = "--gin.DATA_DIR='data'"
    done = flix_plan(tmp_path, data, "--topology=cpu:4", "--out=plan.md")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "cpu:4: 4 devices, mesh data 4 × fsdp 1 × model 1" in done.stdout
    assert (tmp_path / "plan.md").read_text() in done.stdout
    done = flix_plan(tmp_path, data, "--topology=cpu:3")
    assert done.returncode == 2 and "batch_size 8 is not a positive multiple of 3" in done.stderr
    assert done.stderr.count("\n") == 1


needs_the_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
ARRANGED = """
from flix_jax.experiments import topology
topology.use("v5e:4x4*2")
import numpy as np
from jax.experimental import mesh_utils
from flix_jax.training.partitioning import MeshSpec
devices = topology.find("v5e:4x4*2").devices
for data, fsdp, model in ((8, 4, 1), (4, 2, 4), (2, 1, 16), (32, 1, 1)):
    found = MeshSpec(data, fsdp, model).make(devices).devices
    inner, outer = (data // 2, fsdp, model), (2, 1, 1)
    expected = mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )
    assert (found == expected).all()
"""


@pytest.mark.exhaustive
@needs_the_tpu_compiler
def test_slices_are_arranged_as_jax_arranges_them():
    subprocess.run([sys.executable, "-c", ARRANGED], check=True)


@pytest.mark.exhaustive
@needs_the_tpu_compiler
def test_a_plan_for_two_slices(tmp_path):
    write_gin(tmp_path)
    flags = ["--gin.DATA_DIR='data'", "--gin.Run.batch_size=32", "--gin.Evaluation.batch_size=32"]
    flags += ["--topology=v5e:4x4*2", "--gin.MeshSpec.fsdp=4"]
    done = flix_plan(tmp_path, *flags, "--gin.AxisRules.adapters=(('features','data'),)")
    assert done.returncode == 0, done.stderr
    assert "32 devices in 2 slices, mesh data 8 × fsdp 4 × model 1" in done.stdout
    assert "Fits." in done.stdout and "2 features are not split, for 8 parts" in done.stdout
    done = flix_plan(tmp_path, *flags, "--gin.MeshSpec.fsdp=32")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "MeshSpec.data = 1 is not a multiple of the 2 slices" in done.stderr


@pytest.mark.slow
@needs_the_tpu_compiler
def test_mt5_base_for_a_pod_of_256_chips(tmp_path):
    write_gin(tmp_path)
    flags = ["--gin_file=configs/models/mt5_base.gin", "--gin.DATA_DIR='data'"]
    flags += ["--gin.T5Config.scan_layers=True", "--gin.T5Config.remat='full'"]
    flags += ["--gin.Run.batch_size=256", "--gin.Evaluation.batch_size=256"]
    done = flix_plan(tmp_path, *flags, "--topology=v5e:16x16")
    assert done.returncode == 0, done.stderr
    assert "256 devices" in done.stdout and "Fits." in done.stdout
    assert "all-reduce" in done.stdout and "cycles, at 1.50 GHz" in done.stdout
