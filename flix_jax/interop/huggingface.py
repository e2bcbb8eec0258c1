"""Hugging Face's T5, mT5, ByT5 and umT5: `config.json` and weights, in and out.

A folder holds `config.json` and `model.safetensors`, or several files that
`model.safetensors.index.json` lists, or `pytorch_model.bin` in the same two ways (which needs
PyTorch). Weights are [out, in] there and [in, out] here; attention is unscaled in both.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data import bounded
from flix_jax.interop import network
from flix_jax.interop.leaves import Index, Leaf
from flix_jax.mistakes import reason
from flix_jax.models.config import T5Config

MODEL_TYPES = ("t5", "mt5", "umt5")  # ByT5 is a t5
SHARD_BYTES = 2**30
_TORCH = (2, 6)  # before it, loading weights alone could be made to execute code
_FILE = re.compile(r"[^/\\\0]*[^/\\\0.][^/\\\0]*")  # a name, and not '..'
_COMPARED_ROWS = 4096  # of the output layer and the embedding, at a time
_FEED_FORWARD = {
    "relu": ("relu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-silu": ("silu", "linear"),
    "gated-relu": ("relu", "linear"),
}
# Copies of `shared.weight` that some files hold, and what no released network uses: the relative
# positions of attention to the inputs in the first T5 files.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

_OUTPUT = "decoder/logits_dense/kernel"
_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
_BLOCKS = {
    ("encoder", 0): ("SelfAttention", "attention", "pre_attention_layer_norm"),
    ("encoder", 1): ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
    ("decoder", 0): ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
    ("decoder", 1): (
        "EncDecAttention",
        "encoder_decoder_attention",
        "pre_cross_attention_layer_norm",
    ),
    ("decoder", 2): ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
}


def names(config: T5Config) -> dict[str, tuple[str, bool]]:
    """{our name: (Hugging Face's, whether it is the transpose)} of every parameter."""
    found = {
        "token_embedder/embedding": ("shared.weight", False),
        "encoder/encoder_norm/scale": ("encoder.final_layer_norm.weight", False),
        "decoder/decoder_norm/scale": ("decoder.final_layer_norm.weight", False),
    }
    if not config.logits_via_embedding:
        found[_OUTPUT] = ("lm_head.weight", True)
    inputs = ("wi",) if len(config.mlp_activations) == 1 else ("wi_0", "wi_1")
    counts = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for (part, place), (block, ours, norm) in _BLOCKS.items():
        for i in range(counts[part]):
            there, here = f"{part}.block.{i}.layer.{place}", f"{part}/layers_{i}"
            found[f"{here}/{norm}/scale"] = (f"{there}.layer_norm.weight", False)
            weights = _ATTENTION if block != "DenseReluDense" else {n: n for n in (*inputs, "wo")}
            for their_name, our_name in weights.items():
                their = f"{there}.{block}.{their_name}.weight"
                found[f"{here}/{ours}/{our_name}/kernel"] = (their, True)
            if block == "SelfAttention":
                their = f"{there}.{block}.relative_attention_bias.weight"
                if config.relative_positions_in_layers:
                    found[f"{here}/{network.RELATIVE}"] = (their, True)
                elif i == 0:
                    found[f"{part}/{network.RELATIVE}"] = (their, True)
    return found


def is_folder(path: epath.PathLike) -> bool:
    """Whether a folder is one of Hugging Face's."""
    path = epath.Path(path)
    return (path / "config.json").exists() and not (path / "adapter_config.json").exists()


def read_config(folder: epath.PathLike) -> dict[str, Any]:
    """The T5Config fields that `config.json` states.

    Raises:
      ValueError: a model of another family, or a manner that T5Config has not.
    """
    path, record = epath.Path(folder) / "config.json", _record(epath.Path(folder))
    family = record["model_type"]
    feed_forward = record.get("feed_forward_proj", "relu")
    if not isinstance(feed_forward, str) or feed_forward not in _FEED_FORWARD:
        raise ValueError(
            f"{path}: feed_forward_proj is {feed_forward!r}, expected one of "
            f"{', '.join(_FEED_FORWARD)}; {did_you_mean(str(feed_forward), _FEED_FORWARD)}"
        )
    if record.get("layer_norm_epsilon", 1e-6) != 1e-6:
        raise ValueError(
            f"{path}: layer_norm_epsilon is {record['layer_norm_epsilon']}, expected 1e-06"
        )
    missing = [n for n in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads") if n not in record]
    if missing or "vocab_size" not in record:
        raise ValueError(f"{path}: states no {', '.join(missing or ['vocab_size'])}")
    tied, scaled = _output(record, weights(epath.Path(folder)))
    layers = record["num_layers"]
    return {
        "vocab_size": record["vocab_size"],
        "emb_dim": record["d_model"],
        "head_dim": record["d_kv"],
        "mlp_dim": record["d_ff"],
        "num_heads": record["num_heads"],
        "num_encoder_layers": layers,
        "num_decoder_layers": record.get("num_decoder_layers") or layers,
        "mlp_activations": _FEED_FORWARD[feed_forward],
        "logits_via_embedding": tied and scaled,
        "relative_attention_num_buckets": record.get("relative_attention_num_buckets", 32),
        "relative_attention_max_distance": record.get("relative_attention_max_distance", 128),
        "relative_attention_per_layer": True if family == "umt5" else None,
        "dropout_rate": record.get("dropout_rate", 0.1),
    }


def _record(folder: epath.Path) -> dict[str, Any]:
    path = folder / "config.json"
    record = bounded.read_object(path)
    family = record.get("model_type")
    if family not in MODEL_TYPES:
        raise ValueError(
            f"{path}: model_type is {family!r}, expected one of {', '.join(MODEL_TYPES)}"
        )
    return record


def _output(record: Mapping[str, Any], there: Mapping[str, Leaf]) -> tuple[bool, bool]:
    """(tied, scaled) of the output layer: whether it is the embedding, and divided by √d_model.

    Up to its version 4, Transformers scaled where `tie_word_embeddings` was set, and the default
    was set. Since then it says `scale_decoder_outputs`, never scales mT5, and always states that
    weights are tied: whether they are is told by the file.
    """
    tied = bool(record.get("tie_word_embeddings", True)) and _same_output(there)
    version = re.match(r"[0-9]{1,4}", str(record.get("transformers_version", "4")))
    newer = version is not None and int(version[0]) > 4
    if record["model_type"] == "mt5" and newer:
        return tied, False
    if "scale_decoder_outputs" in record:
        return tied, bool(record["scale_decoder_outputs"])
    return tied, bool(record.get("tie_word_embeddings", True))


def _same_output(there: Mapping[str, Leaf]) -> bool:
    """Whether the output layer is the embedding: not stored, or stored as a copy."""
    output, shared = there.get("lm_head.weight"), there.get("shared.weight")
    if output is None or shared is None:
        return output is None
    return (
        len(shared.shape) == 2
        and output.shape == shared.shape
        and all(
            np.array_equal(output.read(part), shared.read(part))
            for start in range(0, shared.shape[0], _COMPARED_ROWS)
            for part in [(slice(start, start + _COMPARED_ROWS), slice(None))]
        )
    )


def config_record(config: T5Config, family: str = "") -> dict[str, Any]:
    """What `config.json` says of a network.

    Args:
      config: of the network.
      family: 't5', 'mt5' or 'umt5'; '' is umt5 where layers have relative positions of their own,
        mt5 where the output layer is not tied, t5 else.

    Raises:
      ValueError: Hugging Face's family has no such network.
    """
    own = config.relative_positions_in_layers
    family = family or ("umt5" if own else "t5" if config.logits_via_embedding else "mt5")
    if family not in MODEL_TYPES:
        raise ValueError(f"family {family!r}: {did_you_mean(family, MODEL_TYPES)}")
    if own != (family == "umt5"):
        has = "its own relative positions in every layer" if own else "shared relative positions"
        raise ValueError(f"a {family} of Hugging Face's cannot have {has}, as the T5Config has")
    known = {value: name for name, value in _FEED_FORWARD.items()}
    activations = tuple(config.mlp_activations)
    if activations not in known:
        raise ValueError(
            f"T5Config.mlp_activations = {activations!r}: Hugging Face's {family} has only "
            f"{', '.join(map(repr, known))}"
        )
    architecture = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[family]
    return {
        "architectures": [f"{architecture}ForConditionalGeneration"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "dropout_rate": config.dropout_rate,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "feed_forward_proj": known[activations],
        "is_encoder_decoder": True,
        "use_cache": True,
        "tie_word_embeddings": config.logits_via_embedding,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def read(folder: epath.PathLike, config: T5Config) -> dict[str, Leaf]:
    """The parameters of a folder by our names, layers not scanned; see `network.fit`.

    Raises:
      ValueError: the folder holds other parameters than the network, or its files are damaged.
    """
    record = _record(epath.Path(folder))
    there = weights(epath.Path(folder))
    used = {*_UNUSED, *(_COPIES if "shared.weight" in there else ())}
    own = record["model_type"] == "umt5"
    stored = dataclasses.replace(config, scan_layers=False, relative_attention_per_layer=own)
    renamed = {}
    for ours, (theirs, transposed) in names(stored).items():
        if theirs in there:
            used.add(theirs)
            renamed[ours] = there[theirs].transposed() if transposed else there[theirs]
    tied, scaled = _output(record, there)
    if config.logits_via_embedding:
        used.add("lm_head.weight")  # some store a tied output layer as itself too
    else:
        output = there.get("shared.weight") if tied else there.get("lm_head.weight")
        if output is not None:
            factor = config.emb_dim**-0.5 if scaled else 1.0
            renamed[_OUTPUT] = output.transposed().scaled(factor)
    renamed |= {name: leaf for name, leaf in there.items() if name not in used}
    return network.fit(renamed, config, str(folder))


def save_weights(arrays: Mapping[str, np.ndarray], path: epath.Path) -> None:
    """Writes one file of safetensors, local or in a bucket."""
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as local:
        made = epath.Path(local) / path.name
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(contiguous, made, metadata={"format": "pt"})
        del contiguous
        made.copy(path, overwrite=True)


def module_shapes(config: T5Config) -> dict[str, tuple[int, int]]:
    """[out, in] of every dense layer, by Hugging Face's name of it."""
    shapes = network.shapes(config)
    return {
        theirs.removesuffix(".weight"): (shapes[ours][1], shapes[ours][0])
        for ours, (theirs, _) in names(config).items()
        if ours.endswith("/kernel")
    }


def weights(folder: epath.Path, stem: str = "") -> dict[str, Leaf]:
    """The weights of a folder by their names.

    Args:
      folder: with `model.safetensors` or `pytorch_model.bin`, or an index of several of either.
      stem: of the files, 'model' and 'pytorch_model' by default.

    Raises:
      ValueError: there are none, or not those that an index names.
    """
    files = (
        (f"{stem or 'model'}.safetensors", _safetensors),
        (f"{stem or 'pytorch_model'}.bin", _pytorch),
    )
    for name, reader in files:
        index = folder / f"{name}.index.json"
        if index.exists():
            return _indexed(index, reader)
        if (folder / name).exists():
            return reader(folder / name)
    expected = " or ".join(name for name, _ in files)
    raise ValueError(f"{folder}: no weights, expected {expected}, or an index of several")


def _indexed(index: epath.Path, reader: Callable[[epath.Path], dict[str, Leaf]]) -> dict[str, Leaf]:
    of_file = bounded.read_object(index).get("weight_map")
    if not isinstance(of_file, dict):
        raise ValueError(f"{index}: no weight_map, expected an index of weights")
    for name, file in of_file.items():
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise ValueError(
                f"{index}: {name} lies in {str(file)[:80]!r}, expected the name of a file beside it"
            )
    there = {file: reader(index.parent / file) for file in dict.fromkeys(of_file.values())}
    for name, file in of_file.items():
        if name not in there[file]:
            raise ValueError(f"{index.parent / file}: no {name}, which {index.name} promises")
    return {name: there[file][name] for name, file in of_file.items()}


def _local(path: epath.Path) -> str:
    """A path that the operating system knows: of the file, or of a copy of one in a bucket."""
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if "://" not in str(path):
        return str(path)
    return _copied(str(path))


@functools.cache
def _copied(path: str) -> str:
    folder = tempfile.TemporaryDirectory(prefix="flix_weights")
    _kept.append(folder)  # until the process ends
    target = epath.Path(folder.name) / epath.Path(path).name
    epath.Path(path).copy(target)
    return str(target)


_kept: list[tempfile.TemporaryDirectory] = []


def _safetensors(path: epath.Path) -> dict[str, Leaf]:
    from safetensors import SafetensorError, safe_open

    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
    try:
        file = safe_open(_local(path), framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error}") from None
    leaves = {}
    for name in file.keys():  # noqa: SIM118, it is no mapping
        part = file.get_slice(name)
        kind = part.get_dtype()
        if kind not in kinds:
            raise ValueError(f"{path}: {name} is {kind}, expected one of {', '.join(kinds)}")

        def fetch(index: Index, part: Any = part) -> np.ndarray:
            return part[index]

        shape = tuple(part.get_shape())
        leaves[name] = Leaf(shape, np.dtype(kinds[kind]), fetch, f"{path}: {name}")
    return leaves


def _pytorch(path: epath.Path) -> dict[str, Leaf]:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path}: pytorch_model.bin needs PyTorch to be read (pip install torch), or save the "
            "model as safetensors"
        ) from None

    version = tuple(map(int, re.findall(r"[0-9]+", torch.__version__)[:2]))
    if version < _TORCH:
        raise ValueError(
            f"{path}: is a pickle, which PyTorch {torch.__version__} does not read safely "
            "(CVE-2025-32434): install 2.6 or newer, or save the model as safetensors"
        )
    try:  # weights alone: a pickle may name any code
        tensors = torch.load(_local(path), map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of any kind, for what it is given
        raise ValueError(f"{path}: refused or damaged: {reason(error)[:200]}") from None
    leaves = {}
    for name, tensor in tensors.items() if isinstance(tensors, dict) else ((None, tensors),):
        source = f"{path}: {name}"
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{source}: expected tensors by their names")
        if tensor.layout != torch.strided or tensor.dtype not in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
        ):
            raise ValueError(f"{source}: is {tensor.layout} {tensor.dtype}, expected floats")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{source}: claims {tensor.nbytes:,} bytes, but fewer are stored")

        def fetch(index: Index, tensor: Any = tensor) -> np.ndarray:
            part = tensor[index]
            return part.float().numpy() if part.dtype == torch.bfloat16 else part.numpy()

        dtype = np.dtype(np.float32 if tensor.dtype == torch.bfloat16 else _dtype(tensor))
        leaves[name] = Leaf(tuple(tensor.shape), dtype, fetch, source)
    return leaves


def _dtype(tensor: Any) -> Any:
    return tensor[:0].numpy().dtype


def write(
    leaves: Mapping[str, Leaf],
    config: T5Config,
    folder: epath.PathLike,
    *,
    family: str = "",
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a network as Hugging Face's folder, one file's worth of it in memory at a time.

    Args:
      leaves: what `network.fit` gives.
      config: of the network.
      folder: which is made; a model that is there is replaced.
      family: as of `config_record`.
      dtype: of the weights written; None keeps each as it is.
      shard_bytes: of a file at most, but for a weight that is larger.
    """
    record = config_record(config, family)
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[list[tuple[str, Leaf]]] = [[]]
    size = 0
    for ours, (theirs, transposed) in names(config).items():
        leaf = leaves[ours].transposed() if transposed else leaves[ours]
        if parts[-1] and size + leaf.nbytes > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append((theirs, leaf))
        size += leaf.nbytes
    kinds = {leaf.dtype if dtype is None else np.dtype(dtype) for _, leaf in parts[0]}
    record["torch_dtype"] = min(kinds, key=str).name
    of_file, total = {}, 0
    for number, part in enumerate(parts, 1):
        name = "model.safetensors"
        if len(parts) > 1:
            name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        arrays = {}
        for theirs, leaf in part:
            array = leaf.read()
            arrays[theirs] = array if dtype is None else array.astype(dtype)
            total += arrays[theirs].nbytes
            of_file[theirs] = name
        save_weights(arrays, folder / name)
        del arrays
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": of_file}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
