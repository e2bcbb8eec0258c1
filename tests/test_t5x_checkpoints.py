"""T5X's checkpoints in the layouts that they have had, each made here as T5X makes it."""

import dataclasses

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import serialization

from flix_jax.interop import bases, network, t5x_checkpoints
from flix_jax.interop.leaves import Leaf
from flix_jax.models.config import T5Config

CONFIG = T5Config(
    vocab_size=48,
    emb_dim=16,
    num_heads=2,
    head_dim=4,
    mlp_dim=24,
    num_encoder_layers=3,
    num_decoder_layers=2,
)


def arrays(config=CONFIG):
    """Parameters by name, drawn."""
    rng = np.random.default_rng(0)
    shapes = network.shapes(config)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def state(target):
    return {"state": {"step": 7, "param_states": {}}, "target": network.nested(target)}


def write_zarr(folder, name, array):
    spec = {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"driver": "file", "path": str(folder / f"target.{name.replace('/', '.')}")},
        "metadata": {"shape": array.shape, "chunks": [max(1, n // 2) for n in array.shape]},
    }
    ts.open(spec, create=True).result()[...] = array


def stored_as(name, style):
    """A leaf as the msgpack names it: by drivers that differ from machine to machine."""
    path = f"target.{name.replace('/', '.')}"
    if style == "placeholder":
        return f"PLACEHOLDER://{path}"
    stores = {
        "file": {"kvstore": {"driver": "file", "path": f"{path}/"}},
        "gfile": {"kvstore": {"driver": "gfile", "path": f"/cns/elsewhere/checkpoint_7/{path}/"}},
        "gcs": {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"}, "path": path},
    }
    return {"driver": "zarr", "dtype": "float32", "metadata": {}, **stores[style]}


def legacy(folder, target, style):
    """Matrices beside the msgpack, vectors in it."""
    here = folder / "checkpoint_7"
    here.mkdir(parents=True)
    leaves = {}
    for name, array in target.items():
        leaves[name] = array
        if array.ndim > 1:
            write_zarr(here, name, array)
            leaves[name] = stored_as(name, style)
    record = {"version": 3, "optimizer": state(leaves)}
    (here / "checkpoint").write_bytes(serialization.msgpack_serialize(record))
    return here


def make(folder, kind, target):
    if kind == "one file":
        here = folder / "checkpoint_7"
        here.mkdir(parents=True)
        record = {"version": 3, "optimizer": state(target)}
        (here / "checkpoint").write_bytes(serialization.msgpack_serialize(record))
    elif kind in ("orbax", "orbax without OCDBT"):
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=kind == "orbax")
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save((folder / "checkpoint_7" / "state").resolve(), state(target))
    else:
        legacy(folder, target, kind)
    return folder


KINDS = {
    "file": "legacy",
    "gfile": "legacy",
    "gcs": "legacy",
    "one file": "legacy",
    "placeholder": "middle",
    "orbax": "current",
    "orbax without OCDBT": "current",
}


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].read(), array, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_is_read(kind, tmp_path):
    folder = make(tmp_path, kind, arrays())
    assert bases.kind(folder) == bases.T5X
    assert t5x_checkpoints.layout(t5x_checkpoints.find(folder)) == KINDS[kind]
    assert bases.config_of(folder) == CONFIG
    check(bases.read(folder, CONFIG), arrays())
    check(bases.read(folder / "checkpoint_7", CONFIG), arrays())
    part = bases.read(folder, CONFIG)["encoder/layers_1/mlp/wo/kernel"]
    whole = arrays()["encoder/layers_1/mlp/wo/kernel"]
    np.testing.assert_array_equal(part.read((slice(3, 20), slice(5, 9))), whole[3:20, 5:9])


def scanned(target):
    """T5X's scalable_t5: layers on axis 1, heads apart from their width."""
    stacks = {}
    for name, array in target.items():
        part, _, rest = name.partition("/")
        if not rest.startswith("layers_"):
            stacks[name] = array
            continue
        rest = rest.partition("/")[2]
        if "attention/" in rest and rest.endswith("kernel"):
            apart = (2, 4, 16) if "/out/" in rest else (16, 2, 4)
            array = array.reshape(apart)
        stacks.setdefault(f"{part}/{part}/{rest}", []).append(array)
    return {n: np.stack(x, axis=1) if isinstance(x, list) else x for n, x in stacks.items()}


PER_LAYER = dataclasses.replace(CONFIG, relative_attention_per_layer=True)


@pytest.mark.parametrize("kind", ["file", "orbax"])
def test_scanned_layers_are_taken_apart(kind, tmp_path):
    target = arrays(PER_LAYER)
    assert scanned(target)["encoder/encoder/attention/out/kernel"].shape == (2, 3, 4, 16)
    folder = make(tmp_path, kind, scanned(target))
    assert bases.config_of(folder) == PER_LAYER
    check(bases.read(folder, PER_LAYER), target)
    here = dataclasses.replace(CONFIG, scan_layers=True)
    stacked = network.scanned_as(bases.read(folder, here), here)
    kernel = stacked["decoder/decoder/self_attention/query/kernel"]
    assert kernel.shape == (16, 2, 8)
    expected = [target[f"decoder/layers_{i}/self_attention/query/kernel"] for i in range(2)]
    np.testing.assert_array_equal(kernel.read(), np.stack(expected, axis=1))


def test_relative_positions_are_shared_only_where_layers_agree(tmp_path):
    target = arrays(PER_LAYER)
    folder = make(tmp_path / "differ", "file", scanned(target))
    with pytest.raises(ValueError, match="decoder/layers_1/relpos_bias/rel_embedding differs from"):
        bases.read(folder, CONFIG)
    for part, count in (("encoder", 3), ("decoder", 2)):
        for i in range(count):
            first = target[f"{part}/layers_0/relpos_bias/rel_embedding"]
            target[f"{part}/layers_{i}/relpos_bias/rel_embedding"] = first
    folder = make(tmp_path / "agree", "file", scanned(target))
    found = bases.read(folder, CONFIG)
    table = target["encoder/layers_0/relpos_bias/rel_embedding"]
    np.testing.assert_array_equal(found["encoder/relpos_bias/rel_embedding"].read(), table)
    check(bases.read(make(tmp_path / "one", "file", arrays()), PER_LAYER), _repeated(arrays()))


def _repeated(target):
    expected = {n: a for n, a in target.items() if "relpos" not in n}
    for part, count in (("encoder", 3), ("decoder", 2)):
        for i in range(count):
            shared = target[f"{part}/relpos_bias/rel_embedding"]
            expected[f"{part}/layers_{i}/relpos_bias/rel_embedding"] = shared
    return expected


def test_what_is_written_is_read_again(tmp_path):
    leaves = {name: Leaf.of(array, name) for name, array in arrays().items()}
    made = t5x_checkpoints.write(leaves, tmp_path, step=12)
    assert made.name == "checkpoint_12" and t5x_checkpoints.layout(made) == "legacy"
    check(bases.read(tmp_path, CONFIG), arrays())
    with pytest.raises(ValueError, match="checkpoint_12: is there already"):
        t5x_checkpoints.write(leaves, tmp_path, step=12)
    (made / "checkpoint").unlink()  # as an attempt leaves it that is cut off
    assert t5x_checkpoints.find(tmp_path) is None
    t5x_checkpoints.write(leaves, tmp_path, step=12)
    check(bases.read(tmp_path, CONFIG), arrays())
    fitted = network.fit(leaves, PER_LAYER, "here")
    t5x_checkpoints.write(t5x_checkpoints.scanned(fitted, PER_LAYER), tmp_path / "s")
    check(t5x_checkpoints.read(tmp_path / "s"), scanned(_repeated(arrays())))


def test_large_arrays_are_written_in_chunks_that_divide_them():
    assert t5x_checkpoints._chunks((12, 10), 1000) == [12, 10]
    assert t5x_checkpoints._chunks((12, 10), 40) == [6, 5]
    assert t5x_checkpoints._chunks((7,), 3) == [1]
    parts = t5x_checkpoints._parts((12, 10), [4, 5])
    assert len(parts) == 6 and parts[-1] == (slice(8, 12), slice(5, 10))


def test_the_newest_step_is_taken(tmp_path):
    leaves = {name: Leaf.of(array, name) for name, array in arrays().items()}
    for step in (9, 100, 20):
        t5x_checkpoints.write(leaves, tmp_path, step=step)
    assert t5x_checkpoints.find(tmp_path).name == "checkpoint_100"
    assert t5x_checkpoints.find(tmp_path / "checkpoint_9").name == "checkpoint_9"


def test_damage_is_told_in_one_line(tmp_path):
    folder = make(tmp_path / "a", "file", arrays())
    kernel = "target.encoder.layers_1.mlp.wo.kernel"
    (folder / "checkpoint_7" / kernel / ".zarray").unlink()
    message = "encoder/layers_1/mlp/wo/kernel: cannot be opened"
    with pytest.raises(ValueError, match=message) as error:
        bases.read(folder, CONFIG)
    assert "\n" not in str(error.value)
    folder = make(tmp_path / "b", "one file", arrays())
    file = folder / "checkpoint_7" / "checkpoint"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match="checkpoint_7/checkpoint: "):
        bases.read(folder, CONFIG)
    file.write_bytes(serialization.msgpack_serialize({"params": {}}))
    with pytest.raises(ValueError, match="holds no 'target'"):
        bases.read(folder, CONFIG)
    assert bases.kind(tmp_path) is None
    with pytest.raises(ValueError, match="no network, expected Hugging Face's config.json or a"):
        bases.read(tmp_path, CONFIG)
