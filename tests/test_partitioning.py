"""Meshes, rules and batches on virtual devices."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from flix_jax.training import partitioning
from flix_jax.training.partitioning import MeshSpec

DEVICES = jax.devices()


def test_one_device_is_a_mesh_of_one():
    mesh = MeshSpec().make(DEVICES[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "model": 1}


def test_the_open_size_takes_what_is_left():
    assert dict(MeshSpec(-1, 1, 2).make(DEVICES[:4]).shape) == {"data": 2, "fsdp": 1, "model": 2}
    with pytest.raises(ValueError, match="does not fit 4"):
        MeshSpec(3, 1, 1).make(DEVICES[:4])


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-2, 1, 1), (-1, -1, 1)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="at most one"):
        MeshSpec(*sizes)


def test_parameters_are_split_by_the_names_of_their_dimensions():
    mesh = MeshSpec(1, 2, 2).make(DEVICES[:4])
    boxed = {
        "wi": nn.Partitioned(jax.ShapeDtypeStruct((8, 6), "float32"), ("embed", "mlp")),
        "plain": jax.ShapeDtypeStruct((3,), "float32"),
    }
    axes = partitioning.logical_axes(boxed)
    assert axes == {"wi": ("embed", "mlp"), "plain": (None,)}
    shardings = partitioning.param_shardings(mesh, axes, nn.unbox(boxed))
    assert shardings["wi"].spec == PartitionSpec("fsdp", "model")
    assert shardings["plain"].spec == PartitionSpec(None)


def test_a_dimension_that_does_not_divide_is_refused_with_its_path():
    mesh = MeshSpec(2, 1, 2).make(DEVICES[:4])
    shapes = {"mlp": {"wi": jax.ShapeDtypeStruct((8, 7), "float32")}}
    with pytest.raises(ValueError, match="mlp/wi: dimension 'mlp' of size 7"):
        partitioning.param_shardings(mesh, {"mlp": {"wi": ("embed", "mlp")}}, shapes)
    with pytest.raises(ValueError, match="no rule for logical axis 'mpl'"):
        partitioning.param_shardings(mesh, {"mlp": {"wi": ("embed", "mpl")}}, shapes)


def test_a_batch_is_split_over_data_and_fsdp_in_order():
    mesh = MeshSpec(2, 2, 1).make(DEVICES[:4])
    rows = np.arange(8 * 3).reshape(8, 3)
    array = partitioning.put_batch(mesh, {"x": rows})["x"]
    np.testing.assert_array_equal(array, rows)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize(("size", "micro"), [(6, 1), (8, 4), (0, 1), (8, 0)])
def test_a_batch_that_the_mesh_does_not_divide_is_refused(size, micro):
    mesh = MeshSpec(4, 1, 1).make(DEVICES[:4])
    partitioning.check_batch_size(mesh, 8, 2)
    with pytest.raises(ValueError, match=f"batch_size {size}"):
        partitioning.check_batch_size(mesh, size, micro)
