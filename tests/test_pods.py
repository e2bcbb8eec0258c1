"""The meshes and rules that are shipped for pods: each fits its topology and its network."""

import math
import pathlib

import pytest
from tiny_runs import write_gin

from flix_jax.configuration import load
from flix_jax.experiments import plan, topology
from flix_jax.experiments.topology import Topology

PODS = sorted(
    path.stem for path in (pathlib.Path(__file__).parent.parent / "configs/pods").glob("*.gin")
)


def shipped(pod, folder):
    """(run, topology without devices) of a file of configs/pods over the XTREME-UP experiment."""
    write_gin(folder)
    bindings = [f"DATA_DIR='{folder}/data'", "BASE='random'", "VOCABULARY=''"]
    bindings += ["Run.vocabulary=@ByteVocabulary()", "Mixture.include=('*/*',)"]
    bindings += ["Mixture.held_out=()", "Evaluation.every=None", "Evaluation.examples=None"]
    bindings += ["Evaluation.keep_best=None"]
    files = ["configs/experiments/xtreme_up.gin", f"configs/pods/{pod}.gin"]
    size, kind, shape = pod.removeprefix("mt5_").split("_")
    run = load(files, bindings).build("Run")
    name = f"{kind}:{shape}"
    found = Topology(name, topology.CHIPS[kind], (), topology.parse(name)[1], "not compiled")
    return size, run, found


def test_there_is_one_for_every_size_and_topology():
    sizes = ("base", "large", "xl", "xxl")
    chips = ("v4_4x4x4", "v5e_16x16", "v5p_4x4x4", "v6e_16x16")
    assert sorted(f"mt5_{size}_{chip}" for size in sizes for chip in chips) == PODS


@pytest.mark.slow
@pytest.mark.parametrize(
    "pod",
    [pod if "v5e" in pod else pytest.param(pod, marks=pytest.mark.exhaustive) for pod in PODS],
)
def test_the_state_fits_with_room_to_spare(pod, tmp_path):
    size, run, place = shipped(pod, tmp_path)
    made = plan.make(run, place)  # every dimension divides, or this is an error
    assert math.prod(made.mesh.values()) == place.count
    parameters = {"base": 0.58e9, "large": 1.23e9, "xl": 3.74e9, "xxl": 12.9e9}[size]
    assert made.parameters["base"] == pytest.approx(parameters, rel=0.01)
    assert run.frozen_dtype == "bfloat16" and not made.unsplit
    assert sum(made.state.values()) < 0.9 * made.room
    # What is trained and its moments are the smaller part, or all in all little.
    trained = made.state["trained"] + made.state["optimizer"]
    assert trained < max(made.state["base"], 2**30)
