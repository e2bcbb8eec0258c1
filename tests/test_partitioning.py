"""Meshes, rules and batches on virtual devices."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from flix_jax.configuration import ConfigurationError, load
from flix_jax.training import partitioning
from flix_jax.training.axis_rules import AxisRules
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
    rules = AxisRules(parameters=(("mlp", ("data", "model")),)).table("parameters")
    with pytest.raises(ValueError, match=r"mesh axis \('data', 'model'\) of size 4"):
        partitioning.param_shardings(mesh, {"mlp": {"wi": ("embed", "mlp")}}, shapes, rules)


@dataclasses.dataclass(frozen=True)
class Described:
    """As much of a device as arranging a mesh asks for."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "described"


def slices_of_groups(mesh, slice_of):
    """The slices that each row along one axis, for each axis, touches."""
    touched = {}
    for axis, name in enumerate(mesh.axis_names):
        rows = np.moveaxis(mesh.devices, axis, -1).reshape(-1, mesh.devices.shape[axis])
        touched[name] = {frozenset(map(slice_of, row)) for row in rows}
    return touched


@pytest.mark.parametrize("sizes", [(4, 2, 2), (8, 2, 1), (2, 1, 8), (-1, 4, 1), (16, 1, 1)])
def test_fsdp_and_model_stay_within_a_slice(sizes):
    # Slices take turns in the order of the devices, so that this order is not the mesh's.
    devices = [Described(i, slice_index=i % 2) for i in range(16)]
    mesh = MeshSpec(*sizes).make(devices)
    assert sorted(d.id for d in mesh.devices.flat) == list(range(16))
    touched = slices_of_groups(mesh, lambda device: device.slice_index)
    for name in ("fsdp", "model"):
        assert touched[name] == {frozenset([0]), frozenset([1])}
    assert touched["data"] == {frozenset([0, 1])}
    # Along `data` one slice is over before the next begins.
    along = [device.slice_index for device in mesh.devices[:, 0, 0]]
    assert along == sorted(along)


@dataclasses.dataclass(frozen=True)
class OfTorus:
    """As much of a TPU as arranging a mesh asks for."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


@pytest.mark.parametrize("sizes", [(64, 1, 1), (8, 8, 1), (4, 16, 1), (2, 8, 4)])
def test_a_mesh_may_split_an_axis_of_the_torus(sizes):
    places = np.ndindex(4, 4, 4)
    devices = [OfTorus(i, (x, y, z)) for i, (z, y, x) in enumerate(places)]
    mesh = MeshSpec(*sizes).make(devices)
    assert mesh.devices.shape == sizes
    assert sorted(d.id for d in mesh.devices.flat) == list(range(64))


def test_slices_of_devices_that_tell_none_are_said():
    mesh = MeshSpec(data=4, fsdp=2, slices=2).make(DEVICES)
    places = {device: i // 4 for i, device in enumerate(DEVICES)}
    touched = slices_of_groups(mesh, places.__getitem__)
    assert touched["fsdp"] == {frozenset([0]), frozenset([1])}
    assert touched["data"] == {frozenset([0, 1])}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (MeshSpec(data=3, fsdp=4), "MeshSpec.data = 3 is not a multiple of the 2 slices"),
        (MeshSpec(data=1, fsdp=-1), "MeshSpec.data = 1 is not a multiple of the 2 slices"),
        (MeshSpec(slices=3), "MeshSpec.slices = 3, but the devices are of 2"),
    ],
)
def test_slices_that_do_not_suit_are_refused(spec, says):
    devices = [Described(i, slice_index=i // 6) for i in range(12)]
    for make in (lambda: spec.make(devices), lambda: spec.abstract(12, 2)):
        with pytest.raises(ValueError, match=says):
            make()


def test_devices_of_several_slices_may_be_taken_as_one():
    devices = [Described(i, slice_index=i // 4) for i in range(8)]
    mesh = MeshSpec(data=1, fsdp=8, slices=1).make(devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "model": 1}


def test_slices_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="MeshSpec.slices = 0: expected at least 1"):
        MeshSpec(slices=0)
    with pytest.raises(ValueError, match="MeshSpec.slices = 3 does not divide 8"):
        MeshSpec(slices=3).make(DEVICES)


def bank_spec(mesh, features, rules):
    shapes = {"flix": {"task": {"b": jax.ShapeDtypeStruct((features, 2, 12, 16), "float32")}}}
    axes = {"flix": {"task": {"b": ("features", "layers", "rank", "mlp")}}}
    table = rules.table("adapters")
    return partitioning.param_shardings(mesh, axes, shapes, table)["flix"]["task"]["b"]


def test_features_of_a_bank_are_split_where_they_divide():
    mesh = MeshSpec(2, 2, 2).make(DEVICES)
    rules = AxisRules(adapters=(("features", ("data", "fsdp")), ("mlp", ("fsdp", "model"))))
    even = bank_spec(mesh, 8, rules)
    # fsdp splits one dimension of an array only: the features, which come first.
    assert even.spec == PartitionSpec(("data", "fsdp"), None, None, "model")
    assert even.shard_shape((8, 2, 12, 16)) == (2, 2, 12, 8)
    uneven = bank_spec(mesh, 6, rules)
    assert uneven.spec == PartitionSpec(None, None, None, ("fsdp", "model"))
    assert bank_spec(mesh, 8, AxisRules()).spec == PartitionSpec(None, None, None, "model")


def test_rules_replace_defaults_by_name_and_adapters_follow_parameters():
    rules = AxisRules(parameters=[["embed", ["data", "fsdp"]], ("vocab", None)])
    parameters, adapters = rules.table("parameters"), rules.table("adapters")
    assert parameters == {**AxisRules().table("parameters"), "embed": ("data", "fsdp"), "vocab": ()}
    assert adapters["embed"] == ("data", "fsdp") and adapters["mlp"] == ("model",)
    own = AxisRules(parameters=(("embed", "data"),), adapters=(("embed", None),))
    assert own.table("adapters")["embed"] == ()
    assert rules.table("activations") == AxisRules().table("activations")
    assert hash(rules) == hash(AxisRules(parameters=(("embed", ("data", "fsdp")), ("vocab", None))))


@pytest.mark.parametrize(
    ("binding", "says"),
    [
        ("AxisRules.adapters=(('feature','fsdp'),)", "'feature'; did you mean 'features'"),
        ("AxisRules.parameters=(('features','fsdp'),)", "unknown logical name 'features'"),
        ("AxisRules.parameters=(('embed','fdsp'),)", "axis 'fdsp'; did you mean 'fsdp'"),
        ("AxisRules.parameters=(('embed',('data','data')),)", "expected every axis once"),
        ("AxisRules.activations=(('mlp','model'),('mlp',None))", "'mlp' has 2 rules"),
        ("AxisRules.activations=('mlp','model')", "expected pairs such as"),
    ],
)
def test_rules_that_cannot_be_are_refused_with_their_place(binding, says):
    config = load([], ["MeshSpec.rules=@AxisRules()", binding])
    with pytest.raises(ConfigurationError, match=says) as caught:
        config.build("MeshSpec")
    assert "--gin.AxisRules" in str(caught.value) and "\n" not in str(caught.value)


def test_rules_are_given_in_gin():
    flag = "AxisRules.adapters=(('features',('data','fsdp')),)"
    spec = load([], ["MeshSpec.rules=@AxisRules()", flag]).build("MeshSpec")
    assert spec == MeshSpec(rules=AxisRules(adapters=(("features", ("data", "fsdp")),)))


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
