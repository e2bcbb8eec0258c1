"""Files of strangers: refused in one line, before they take memory, time, code or other files."""

import ast
import dataclasses
import gzip
import itertools
import json
import math
import pickle
import resource
import sys
import tarfile
import time
import types
import zlib
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tensorstore as ts
from flax import serialization
from safetensors.numpy import save_file

import flix_jax
from flix_jax.adapters import plain_json
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data import bounded
from flix_jax.evaluation import files
from flix_jax.experiments import requests
from flix_jax.experiments.transfer import unpacked
from flix_jax.interop import (
    bases,
    flix_adapters,
    huggingface,
    network,
    peft,
    t5x_checkpoints,
    zarr_arrays,
)
from flix_jax.interop.leaves import Leaf
from flix_jax.models.config import T5Config
from flix_jax.tasks.records import read_records

CONFIG = T5Config(
    vocab_size=16,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
ROOT = Path(flix_jax.__file__).parents[1]


@pytest.fixture(autouse=True)
def unchecked():
    """Types of annotations are checked in tests alone, and before what is tested here."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def refusal(read, *arguments):
    """The line of a refusal that took neither a second nor a hundred MiB more than there were."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError) as raised:
        read(*arguments)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < 100 * 2**10 and time.monotonic() - start < 5
    message = str(raised.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------
# Code


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_nothing_that_reads_can_execute_what_it_reads():
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
    read = sorted(path for f in ("flix_jax", "tasks") for path in (ROOT / f).rglob("*.py"))
    assert len(read) > 100
    for path in read:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.partition(".")[0] for name in names}, path
        for name, options in calls(tree):
            assert name not in ("eval", "exec", "yaml.load", "yaml.unsafe_load"), path
            if name in ("np.load", "numpy.load"):
                assert options.get("allow_pickle") == "False", path
            if name == "torch.load":
                assert options.get("weights_only") == "True", path


def test_a_pickle_is_left_to_a_pytorch_that_reads_weights_alone(tmp_path, monkeypatch):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({}))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.5.1+cpu"))
    assert "which PyTorch 2.5.1+cpu does not read safely" in refusal(huggingface.weights, tmp_path)
    asked = {}

    def load(path, **options):
        asked.update(options)
        raise pickle.UnpicklingError("Weights only load failed.\n\tos.system is not allowed")

    newer = types.SimpleNamespace(__version__="2.10.0", load=load)
    monkeypatch.setitem(sys.modules, "torch", newer)
    message = refusal(huggingface.weights, tmp_path)
    assert (
        message == f"{path}: refused or damaged: Weights only load failed. os.system is not allowed"
    )
    assert asked["weights_only"] is True


# ------------------------------------------------------------------------------------------------
# Json and lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "malformed JSON: nested too deeply"),
        (b"[" * 65 + b"]" * 65, "nested too deeply: more than 64 levels"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "nested too deeply: more than 64 levels"),
        (b"9" * 5000, "malformed JSON: a number of too many digits"),
        (b"\xff", "not UTF-8: byte 0xff at column 1"),
        (b'{\n  "a\xff"}', "not UTF-8: byte 0xff at line 2, column 5"),
        (b"{\n\n]", "malformed JSON: Expecting property name enclosed in double quotes at line 3"),
        (b"", "malformed JSON: Expecting value at column 1"),
    ],
)
def test_json_of_strangers_has_one_kind_of_error(text, message, tmp_path):
    assert refusal(plain_json.parse, text).startswith(message)
    path = tmp_path / "record.json"
    path.write_bytes(text)
    assert refusal(files.read_object, path).startswith(f"{path}: {message}")


def test_notes_of_a_run_are_what_they_must_be(tmp_path):
    path = tmp_path / "note.json"
    assert files.read_object(path) is None and files.read_texts(path) is None
    for text in ("[1]", '"x"', "null", "3"):
        path.write_text(text)
        assert refusal(files.read_object, path) == f"{path}: expected a JSON object, got {text}"
    for text in ('{"a": 1}', "[1]", '"x"', '[["a"]]'):
        path.write_text(text)
        assert refusal(files.read_texts, path).startswith(f"{path}: expected a JSON list of texts")
    path.write_text('["a", "b"]')
    assert files.read_texts(path) == ["a", "b"]


@pytest.mark.parametrize("levels", [1, 63, 64])
def test_what_is_not_nested_deeply_is_read(levels):
    text = "[" * levels + "]" * levels
    assert plain_json.parse(text + " " * 70) == json.loads(text)
    many = [{"a": [1]}] * 100
    assert plain_json.parse(json.dumps(many).encode()) == many


def test_a_file_is_read_no_further_than_it_may_be_long(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    assert refusal(bounded.read_bytes, path).startswith(f"{path}: more than 67,108,864 bytes")
    (tmp_path / "y").write_bytes(b"abc")
    assert bounded.read_bytes(tmp_path / "y", 3) == b"abc"
    assert refusal(
        bounded.read_bytes, tmp_path / "y", 2
    ) == f"{tmp_path}/y: more than 2 bytes, " + ("expected a smaller file")
    (tmp_path / "device").symlink_to("/dev/zero")  # says that it has no bytes
    assert "more than 4,194,304 bytes" in refusal(bounded.read_bytes, tmp_path / "device", 2**22)


def test_a_line_of_gigabytes_is_refused_with_its_number(tmp_path):
    path = tmp_path / "sw.jsonl"
    with path.open("wb") as file:
        file.write(b'{"input": "a"}\n')
        file.truncate(2**33)
    assert refusal(lambda: list(read_records(path, lambda line, error: None))) == (
        f"{path}:2: a line of more than 8,388,608 bytes"
    )


def test_lines_are_those_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, "_BLOCK", 5)
    rng = np.random.default_rng(0)
    for length in range(40):
        content = bytes(rng.choice(list(b"ab\r\n"), length).astype(np.uint8))
        (tmp_path / "x").write_bytes(content)
        assert list(bounded.lines(tmp_path / "x", 40)) == content.split(b"\n")


# ------------------------------------------------------------------------------------------------
# Features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 10**12}, "slots is 1000000000000, expected at most 1,024"),
        ({"rank": 10**12}, "rank is 1000000000000, expected at most 65,536"),
        ({"ranks": {"a": 10**9}}, "rank is 1000000000, expected at most 65,536"),
        ({"dropout": 10**400}, "dropout is 1000"),
        ({"values": ["\ud800"]}, "holds half of a surrogate pair"),
        ({"values": {"a": 1}}, "values is the mapping"),
        ({"values": 7}, "not the json of one: 'int' object is not iterable"),
        ({"no": 7}, "FeatureType has 'no'; there is: 'name'"),
        ({"ran\nk": 7}, "FeatureType has 'ran\\nk'; did you mean 'rank'"),
        ({"ranks": {"a": {"b": 1}}}, "value 'a': rank is {'b': 1}, expected an integer"),
        ({"ranks": ["a"]}, "ranks is ['a'], expected a mapping from value"),
    ],
)
def test_a_space_that_would_take_the_memory_is_refused(change, message):
    record = {"name": "task", "values": ["a"], **change}
    assert message in refusal(FeatureSpace.from_json, json.dumps({"types": [record]}))


@pytest.mark.parametrize("text", ["[]", "{}", '{"types": 3}', '{"types": [], "rescale": 1}', "nul"])
def test_what_is_no_space_is_refused(text):
    assert "feature space: " in refusal(FeatureSpace.from_json, text)


def test_many_values_take_no_more_time_than_they_must():
    values = [f"v{i}" for i in range(100_000)]
    of = {"name": "task", "values": values, "ranks": {value: 2 for value in values}}
    start = time.monotonic()
    assert FeatureSpace.from_json(json.dumps({"types": [of]})).num_features == 100_000
    assert time.monotonic() - start < 5
    twice = {"name": "task", "values": [*values, values[-1]]}
    assert "named more than once" in refusal(FeatureSpace.from_json, json.dumps({"types": [twice]}))


def test_names_of_a_stranger_are_compared_in_no_time():
    start = time.monotonic()
    assert did_you_mean("x" * 10**6, ["y" * 10**6, "z"] + [f"n{i}" for i in range(10**5)])
    assert time.monotonic() - start < 5
    assert did_you_mean("sww", ["q" * 100, "sw"]) == "did you mean 'sw'?"


def test_a_request_of_ten_thousand_languages_is_refused(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"input": "a", "language": ["sw"] * 10_000}) + "\n")
    space = FeatureSpace((FeatureType("language", ("sw",)),))
    message = refusal(requests.read, path, space, "")
    assert message.startswith(
        f"{path}:1: feature type 'language': slots is 10000, expected at most"
    )


# ------------------------------------------------------------------------------------------------
# Networks of Hugging Face's and adapters


def hf_folder(folder, **config):
    stated = huggingface.config_record(CONFIG, "mt5")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(stated | config))
    arrays = {}
    shapes = network.shapes(CONFIG)
    for ours, (theirs, transposed) in huggingface.names(CONFIG).items():
        shape = shapes[ours][::-1] if transposed else shapes[ours]
        arrays[theirs] = np.ones(shape, np.float32)
    save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 10**12}, "T5Config.num_encoder_layers = 1000000000000: expected at most"),
        ({"d_model": 2**40}, "T5Config.emb_dim = 1099511627776: expected at most 2,147,483,647"),
        ({"d_ff": "12"}, "T5Config.mlp_dim = '12': expected a positive integer"),
        ({"dropout_rate": "much"}, "T5Config.dropout_rate = 'much': expected [0, 1)"),
        ({"feed_forward_proj": ["relu"]}, "feed_forward_proj is ['relu'], expected one of"),
    ],
)
def test_a_config_that_claims_too_much_is_refused(config, message, tmp_path):
    folder = hf_folder(tmp_path / "net", **config)
    assert refusal(bases.config_of, folder).startswith(f"{folder / 'config.json'}: {message}")


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "..", "a/b", "a\\b", 3, ""]
)
def test_an_index_names_files_beside_it_alone(file, tmp_path):
    folder = hf_folder(tmp_path / "net")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"shared.weight": file}}))
    assert refusal(huggingface.weights, folder) == (
        f"{index}: shared.weight lies in {str(file)!r}, expected the name of a file beside it"
    )


@pytest.mark.parametrize("weight_map", [None, [], "a"])
def test_an_index_without_a_map_is_refused(weight_map, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(huggingface.weights, tmp_path).startswith(f"{index}: no weight_map")


@pytest.mark.parametrize(
    "header",
    [
        (2**62).to_bytes(8, "little"),  # a header longer than the file
        (10**8).to_bytes(8, "little") + b"{",
        b"".join(
            [(64).to_bytes(8, "little"), b'{"a":{"dtype":"F32","shape":[4294967296],"data_off']
        )
        + b'sets":[0,4]}}  ',
        b"\x02\0\0\0\0\0\0\0[]",
    ],
)
def test_weights_whose_header_lies_are_refused(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + b"\0" * 4)
    assert refusal(huggingface.weights, tmp_path).startswith(f"{path}: ")


def adapters(folder, **change):
    of = flix_adapters.Adapters(
        {
            f"encoder/layers_0/attention/query/flix/task/{side}": Leaf.of(
                np.ones(shape, np.float32)
            )
            for side, shape in (("a", (2, 8, 3)), ("b", (2, 3, 8)))
        },
        FeatureSpace((FeatureType("task", ("ner", "qa"), rank=3),)),
        None,
        ("attention",),
        dataclasses.asdict(CONFIG),
        "base",
        "vocabulary",
        7,
    )
    of.write(folder)
    path = folder / "adapters.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": "1"}, 'alpha is "1", expected a number or a whole number or null'),
        ({"alpha": float("nan")}, "alpha is nan, expected a positive number"),
        ({"targets": "attention"}, 'targets is "attention", expected a list'),
        ({"targets": [7]}, "adapters: target 7, expected a name or a regular expression"),
        ({"model": {"vocab_size": -1}}, "T5Config.vocab_size = -1: expected a positive integer"),
        ({"model": {"vocab_size": 8, "scan_layers": []}}, "T5Config.scan_layers = []: expected"),
        ({"step": True}, "step is true, expected a whole number"),
        ({"space": {}}, "feature space: not the json of one: no 'types'"),
        ({"space": {"types": [{"name": "task"}]}}, "feature type 'task': its values are not known"),
        ({"fusion": 3}, "fusion is 3, expected an object"),
        ({"fusion": {"targets": 3}}, "'int' object is not iterable"),
    ],
)
def test_adapters_that_say_something_else_are_refused(change, message, tmp_path):
    folder = adapters(tmp_path / "adapters", **change)
    assert refusal(flix_adapters.read, folder).startswith(f"{folder / 'adapters.json'}: {message}")


@pytest.mark.parametrize("name", ["a", "x/flix/task/a/../b", "x//flix/task/a", "x/flax/task/a"])
def test_adapters_of_other_names_are_refused(name, tmp_path):
    folder = adapters(tmp_path / "adapters")
    assert flix_adapters.read(folder).step == 7
    save_file({name: np.ones((2, 8, 3), np.float32)}, folder / "adapters.safetensors")
    assert refusal(flix_adapters.read, folder).startswith(f"{folder}: ")


def lora(folder, **change):
    module = peft.modules(CONFIG)["encoder/layers_0/attention/query"]
    updates = {"encoder/layers_0/attention/query": peft.LowRank(np.ones((8, 2)), np.ones((2, 8)))}
    peft.write(updates, CONFIG, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder, module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern '(': "),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1], expected an object"),
        ({"lora_alpha": "2"}, "is '2', expected a number"),
        ({"lora_alpha": float("inf")}, "is inf, expected a number"),
    ],
)
def test_a_lora_of_other_numbers_is_refused(change, message, tmp_path):
    folder, _ = lora(tmp_path / "lora", **change)
    found = refusal(peft.read, folder, CONFIG)
    assert found.startswith(str(folder)) and message in found


def test_a_pattern_that_takes_for_ever_takes_no_time(tmp_path):
    never = r"((\w|[.a-z])+)+[!?]"  # 2^30 ways to match the name of a layer
    folder, _ = lora(tmp_path / "lora", alpha_pattern={never: 4, r".*SelfAttention\.q": 6})
    start = time.monotonic()
    (update,) = peft.read(folder, CONFIG).values()
    assert time.monotonic() - start < 5
    np.testing.assert_array_equal(update.b, np.full((2, 8), 3, np.float32))


# ------------------------------------------------------------------------------------------------
# Checkpoints of T5X's


def msgpack_checkpoint(folder, target):
    folder.mkdir(parents=True)
    record = {"version": 3, "optimizer": {"state": {}, "target": target}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(record))
    return folder


@pytest.mark.parametrize(
    "leaf",
    [
        "PLACEHOLDER://../outside",
        "PLACEHOLDER:///etc",
        "PLACEHOLDER://..",
        "PLACEHOLDER://",
        {"driver": "zarr", "kvstore": {"driver": "file", "path": "a/.."}},
        {"driver": "zarr", "kvstore": {"driver": "file", "path": "a/b\\c"}},
    ],
)
def test_an_array_of_t5x_lies_in_the_checkpoint(leaf, tmp_path):
    folder = msgpack_checkpoint(tmp_path / "checkpoint_1", {"a": leaf})
    write_zarr(tmp_path / "outside", np.ones(3, np.float32))
    message = refusal(t5x_checkpoints.read, folder)
    assert (
        message.startswith(f"{folder}: a: lies in ") and "expected the name of a folder" in message
    )


@pytest.mark.parametrize("name", ["a/../b", "", "a/b", 3])
def test_names_of_t5x_are_names(name, tmp_path):
    folder = msgpack_checkpoint(tmp_path / "checkpoint_1", {name: np.ones(2, np.float32)})
    assert "among the names" in refusal(t5x_checkpoints.read, folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),  # four thousand million children
        (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
        (b"\xdb\xff\xff\xff\xff", "no msgpack of flax's"),  # a text as long
        (b"\x91" * 2000, "no msgpack of flax's"),
        (b"\xdc\xff\xff" * 1000, "no msgpack of flax's"),  # each of them a list of 65,535
        (b"\xc7\x01\x01\xc0", "no msgpack of flax's"),
        (b"\xd4\x07\x00", "a value of type 7"),
        (b"", "no msgpack of flax's"),
    ],
)
def test_a_msgpack_that_lies_is_refused(content, message, tmp_path):
    folder = tmp_path / "checkpoint_1"
    folder.mkdir()
    (folder / "checkpoint").write_bytes(content)
    found = refusal(t5x_checkpoints.read, folder)
    assert found.startswith(f"{folder / 'checkpoint'}: ") and message in found


def test_a_deep_tree_of_t5x_is_refused(tmp_path):
    tree = np.ones(1, np.float32)
    for _ in range(200):
        tree = {"a": tree}
    folder = msgpack_checkpoint(tmp_path / "checkpoint_1", tree)
    assert "nested too deeply" in refusal(t5x_checkpoints.read, folder)


def write_zarr(folder, array, *, chunks=None, compressor=None, order="C", separator=".", fill=None):
    metadata = {
        "shape": array.shape,
        "chunks": chunks or array.shape,
        "compressor": compressor,
        "order": order,
        "dimension_separator": separator,
        "fill_value": fill,
    }
    name = "bfloat16" if array.dtype == "bfloat16" else array.dtype.str
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": metadata | {"dtype": name},
    }
    ts.open(spec, create=True).result()[...] = array
    return folder


def restated(folder, **change):
    path = folder / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


GZIP, ZLIB = {"id": "gzip", "level": 1}, {"id": "zlib", "level": 1}


@pytest.mark.parametrize(
    "compressor", [None, GZIP, ZLIB, {"id": "blosc"}, {"id": "zstd", "level": 1}]
)
@pytest.mark.parametrize(
    ("shape", "chunks"), [((), ()), ((7,), (3,)), ((5, 6), (5, 6)), ((5, 6, 4), (2, 4, 4))]
)
def test_arrays_of_zarr_are_those_that_tensorstore_reads(compressor, shape, chunks, tmp_path):
    rng = np.random.default_rng(1)
    for number, (dtype, order, separator) in enumerate(
        [("<f4", "C", "."), (">f2", "F", "/"), (jnp.bfloat16, "C", "."), ("<i8", "F", ".")]
    ):
        array = rng.integers(0, 9, shape).astype(dtype)
        folder = write_zarr(
            tmp_path / str(number),
            array,
            chunks=chunks,
            compressor=compressor,
            order=order if len(shape) > 1 else "C",
            separator=separator,
            fill=2,
        )
        for absent in sorted(p for p in folder.rglob("*") if p.name[0].isdigit() and p.is_file())[
            1:2
        ]:
            absent.unlink()
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}
        expected = ts.open(spec).result().read().result()
        leaf = zarr_arrays.read(folder_of(folder), "x")
        np.testing.assert_array_equal(leaf.read(), expected)
        assert leaf.shape == shape and leaf.read().shape == shape
        cuts = [itertools.combinations(range(size + 1), 2) for size in shape]
        for bounds in itertools.islice(itertools.product(*cuts), 0, None, 17):
            index = tuple(slice(*pair) for pair in bounds)
            np.testing.assert_array_equal(leaf.read(index), expected[index])


def folder_of(path):
    from etils import epath

    return epath.Path(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2**44, 4]}, "claims 281,474,976,710,656 bytes, but no more than"),
        ({"shape": [2**62, 2**62]}, "claims "),
        ({"chunks": [2**40, 4]}, "chunks of 17,592,186,044,416 bytes, more than the array has"),
        ({"chunks": [0, 4]}, "chunks [0, 4] of an array [6, 4]"),
        ({"chunks": [3]}, "chunks [3] of an array [6, 4]"),
        ({"shape": [6, -4]}, "shape is [6, -4], expected a list of sizes"),
        ({"shape": [6, 1e3]}, "shape is [6, 1000.0], expected a list of sizes"),
        ({"shape": [1] * 1000}, "expected a list of sizes"),
        ({"dtype": "|O"}, "dtype is '|O', expected numbers"),
        ({"dtype": [["a", "<f4"]]}, "expected numbers"),
        ({"filters": [{"id": "pickle"}]}, "has filters, expected none"),
        ({"compressor": {"id": "pickle"}}, "cannot be opened"),
        ({"order": "Z"}, "order is 'Z', expected 'C' or 'F'"),
        ({"dimension_separator": "/../"}, "dimension_separator is '/../', expected '.' or '/'"),
        ({"fill_value": {}}, "fill_value is {}, expected a number"),
        ({"zarr_format": 3}, "zarr_format is 3, expected 2"),
    ],
)
def test_metadata_of_zarr_that_lie_are_refused(change, message, tmp_path):
    folder = write_zarr(tmp_path / "x", np.ones((6, 4), np.float32), chunks=(3, 4), compressor=GZIP)
    found = refusal(zarr_arrays.read, folder_of(restated(folder, **change)), "layer")
    assert found.startswith("layer: ") and message in found


@pytest.mark.parametrize("compressor", [GZIP, ZLIB, None, {"id": "blosc"}])
def test_a_chunk_that_inflates_beyond_itself_is_refused(compressor, tmp_path):
    folder = write_zarr(
        tmp_path / "x", np.ones((6, 4), np.float32), chunks=(3, 4), compressor=compressor
    )
    bomb = b"\0" * 2**28
    kind = (compressor or {}).get("id")
    if kind == "blosc":  # its header says two GiB
        content = bytearray((folder / "0.0").read_bytes())
        content[4:8] = (2**31 - 1).to_bytes(4, "little")
    else:
        content = {"gzip": gzip.compress, "zlib": zlib.compress}.get(kind, bytes)(bomb)
    del bomb
    (folder / "0.0").write_bytes(content)
    leaf = zarr_arrays.read(folder_of(folder), "layer")
    message = refusal(leaf.read)
    assert "0.0" in message or message.startswith("layer: cannot be read")


def test_a_chunk_that_is_cut_is_refused(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    folder = write_zarr(tmp_path / "x", array, chunks=(3, 4), compressor=GZIP)
    content = (folder / "1.0").read_bytes()
    (folder / "1.0").write_bytes(content[: len(content) // 2])
    leaf = zarr_arrays.read(folder_of(folder), "layer")
    np.testing.assert_array_equal(leaf.read((slice(0, 3), slice(0, 4))), array[:3])
    assert refusal(leaf.read).startswith(f"{folder / '1.0'}: damaged: it ends early")


def test_a_checkpoint_that_claims_layers_without_end_is_refused(tmp_path):
    arrays = {name: np.ones(shape, np.float32) for name, shape in network.shapes(CONFIG).items()}
    name = "encoder/layers_0/attention/query/kernel"
    for other in ("encoder/layers_999999/attention/query/kernel", "encoder/encoder/mlp/wo/kernel"):
        changed = arrays | {other: arrays[name]}
        if "layers" not in other:
            changed[other] = np.ones((1, 5000), np.float32)
        folder = msgpack_checkpoint(tmp_path / str(len(other)), network.nested(changed))
        message = refusal(bases.config_of, folder)
        assert "expected at most" in message


# ------------------------------------------------------------------------------------------------
# Archives


def archive(path, members, opened=gzip.open):
    """A tar of (name, size, bytes or None for zeros, type)."""
    with opened(path, "wb") as file:
        for name, size, content, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = size, kind
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            if content is not None:
                file.write(content + b"\0" * (-len(content) % 512))
            else:
                for _ in range(math.ceil(size / 2**20)):
                    file.write(b"\0" * 2**20)
        file.write(b"\0" * 1024)
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("big", 2**29, None, tarfile.REGTYPE)],
            "'big' has 536,870,912 bytes, 100 times the arch",
        ),
        ([("pax", 2**28, None, tarfile.XHDTYPE)], "a header of 268,435,456 bytes"),
        ([("gnu", 2**28, None, tarfile.GNUTYPE_LONGNAME)], "a header of 268,435,456 bytes"),
        ([("skip", 2**36, b"", tarfile.REGTYPE)], "'skip' has 68,719,476,736 bytes, 100 times"),
    ],
)
def test_an_archive_that_fills_memory_or_disk_is_refused(members, message, tmp_path):
    path = archive(tmp_path / "x.tgz", members)

    def unpack():
        with unpacked(path, tmp_path):
            pass

    assert refusal(unpack).startswith(f"{path} is refused: {message}")
    assert [p.name for p in tmp_path.iterdir()] == ["x.tgz"]


def test_an_archive_of_text_may_be_much_smaller_than_its_text(tmp_path):
    text = b"".join(b'{"input": "%d"}\n' % i for i in range(100_000))
    path = archive(tmp_path / "x.tgz", [("a/b.jsonl", len(text), text, tarfile.REGTYPE)])
    with unpacked(path, tmp_path) as folder:
        assert (folder / "a" / "b.jsonl").read_bytes() == text
