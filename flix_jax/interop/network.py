"""The parameters of a T5-family network by name, and how those of a checkpoint meet them.

The names that formats are brought to, and the shapes, are those of T5X's `t5` network, its layers
in a loop: `encoder/layers_0/attention/query/kernel` [in, out]. Scanned networks stack the layers on
axis 1 under `encoder/encoder` and `decoder/decoder`, with relative positions in every layer; T5X's
own scanned attention kernels keep heads and their width apart.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from flix_jax.adapters import tree
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.interop.leaves import Leaf, stacked
from flix_jax.models.config import T5Config
from flix_jax.models.t5 import Transformer

RELATIVE = "relpos_bias/rel_embedding"
_SCANNED = re.compile(r"(encoder|decoder)/\1/(.+)")
_LAYER = re.compile(r"(encoder|decoder)/layers_([0-9]{1,6})/(.+)")
_MOST_STACKED = 1024  # layers that a checkpoint may have on an axis
_NAMED = 4  # names of a kind that a message lists


def flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """{'encoder/…/kernel': leaf} of nested mappings."""
    return {"/".join(path): leaf for path, leaf in tree.named_leaves(params)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested mappings of `flat`.

    Raises:
      ValueError: a name that is the beginning of another's path.
    """
    for name in leaves:
        for end in range(len(name)):
            if name[end] == "/" and name[:end] in leaves:
                raise ValueError(f"{name}: beside an array {name[:end]}")
    return tree.from_named([(tuple(name.split("/")), leaf) for name, leaf in leaves.items()])


@functools.lru_cache(maxsize=16)
def _shapes(config: T5Config) -> tuple[tuple[str, tuple[int, ...]], ...]:
    one = dataclasses.replace(
        config,
        num_encoder_layers=1,
        num_decoder_layers=1,
        scan_layers=False,
        relative_attention_per_layer=config.relative_positions_in_layers,
        remat="none",
    )
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    init = functools.partial(Transformer(one).init, enable_dropout=False)
    params = nn.meta.unbox(
        jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)["params"]
    )
    found = []
    for name, leaf in flat(params).items():
        layer = _LAYER.fullmatch(name)
        if layer is None:
            found.append((name, leaf.shape))
            continue
        part, _, rest = layer.groups()
        count = config.num_encoder_layers if part == "encoder" else config.num_decoder_layers
        found += [(f"{part}/layers_{i}/{rest}", leaf.shape) for i in range(count)]
    return tuple(found)


def shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, layers not scanned; nothing is allocated."""
    return dict(_shapes(config))


def unscanned(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The leaves with those of scanned layers taken apart.

    Raises:
      ValueError: a leaf of scanned layers that has no axis of them.
    """
    found: dict[str, Leaf] = {}
    for name, leaf in leaves.items():
        scanned = _SCANNED.fullmatch(name)
        if scanned is None:
            found[name] = leaf
            continue
        part, rest = scanned.groups()
        if len(leaf.shape) < 2 or leaf.shape[1] > _MOST_STACKED:
            raise ValueError(
                f"{leaf.source}: shape {leaf.shape}, expected at most {_MOST_STACKED} layers on "
                "axis 1"
            )
        for layer in range(leaf.shape[1]):
            found[f"{part}/layers_{layer}/{rest}"] = leaf.part(1, layer)
    return found


def fit(leaves: Mapping[str, Leaf], config: T5Config, where: str) -> dict[str, Leaf]:
    """The leaves of a checkpoint as the parameters of a network, none missing and none left.

    Relative positions that the checkpoint shares among layers are repeated where the network has
    them in every layer; those of layers become a shared one where all are equal.

    Args:
      leaves: by name, layers scanned or not.
      config: of the network; its layers need not be scanned as the checkpoint's are.
      where: the checkpoint, for messages.

    Returns:
      A leaf for every name of `shapes(config)`.

    Raises:
      ValueError: in one line, with what is missing, left over or of another shape, and the nearest.
    """
    given, wanted = unscanned(leaves), shapes(config)
    found, missing, wrong = {}, [], []
    used: set[str] = set()
    for name, shape in wanted.items():
        leaf = given.get(name)
        if name.endswith(RELATIVE) and leaf is None:
            leaf = _relative(name, shape, given, used, where)
        if leaf is None:
            missing.append(name)
            continue
        used.add(name)
        found[name] = leaf
        if leaf.shape != shape:
            try:
                found[name] = leaf.matrix(shape[0])
            except ValueError:
                pass
            if found[name].shape != shape:
                wrong.append(f"{name} is {list(leaf.shape)} there, {list(shape)} here")
    left = [name for name in given if name not in used]
    if not (missing or wrong or left):
        return found
    parts = []
    if wrong:
        parts.append("of another shape: " + _some(wrong))
    if missing:
        near = did_you_mean(missing[0], left or list(given))
        parts.append(f"missing there: {_some(missing)}" + (f"; {near}" if near else ""))
    if left:
        parts.append("left over there: " + _some(left))
    raise ValueError(f"{where} does not fit the T5Config: {'; '.join(parts)}")


def _some(names: Sequence[str]) -> str:
    text = ", ".join(names[:_NAMED])
    return text + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _relative(
    name: str, shape: tuple[int, ...], given: Mapping[str, Leaf], used: set[str], where: str
) -> Leaf | None:
    """Relative positions: the stack's for a layer, those of equal layers for the stack."""
    part = name.partition("/")[0]
    if name != f"{part}/{RELATIVE}":  # of a layer
        shared = f"{part}/{RELATIVE}"
        used.add(shared)
        return given.get(shared)
    layers = sorted(other for other in given if other.startswith(f"{part}/layers_"))
    layers = [other for other in layers if other.endswith(f"/{RELATIVE}")]
    if not layers or any(given[other].shape != shape for other in layers):
        return None if not layers else given[layers[0]]
    first = given[layers[0]].read()
    for other in layers[1:]:
        if not np.array_equal(given[other].read(), first):
            raise ValueError(
                f"{where}: {other} differs from {layers[0]}, but the T5Config has relative "
                "positions that layers share; T5Config.relative_attention_per_layer=True has not"
            )
    used.update(layers)
    return given[layers[0]]


def positions_are_equal(leaves: Mapping[str, Leaf]) -> bool:
    """Whether every layer of a stack has the relative positions of its first."""
    first: dict[str, np.ndarray] = {}
    for name, leaf in leaves.items():
        if name.endswith(RELATIVE):
            table = leaf.read()
            if not np.array_equal(first.setdefault(name.partition("/")[0], table), table):
                return False
    return True


def scanned_as(leaves: Mapping[str, Leaf], config: T5Config) -> dict[str, Leaf]:
    """What `fit` gives as the tree of the network itself: stacked where its layers are scanned."""
    if not config.scan_layers:
        return dict(leaves)
    found: dict[str, Leaf] = {}
    layers: dict[str, list[tuple[int, Leaf]]] = {}
    for name, leaf in leaves.items():
        layer = _LAYER.fullmatch(name)
        if layer is None:
            found[name] = leaf
        else:
            part, number, rest = layer.groups()
            layers.setdefault(f"{part}/{part}/{rest}", []).append((int(number), leaf))
    for name, numbered in layers.items():
        ordered = [leaf for _, leaf in sorted(numbered, key=lambda item: item[0])]
        found[name] = stacked(ordered, 1)
    return found


def config_of(leaves: Mapping[str, Leaf], where: str) -> T5Config:
    """The network whose parameters these are, as far as shapes tell it.

    A gated feed-forward block is taken for GELU, a plain one for ReLU; distances of relative
    positions for T5's 128.

    Raises:
      ValueError: they are not those of a T5-family network.
    """
    given = unscanned(leaves)
    layers = {part: 0 for part in ("encoder", "decoder")}
    for name in given:
        if found := _LAYER.fullmatch(name):
            layers[found.group(1)] = max(layers[found.group(1)], int(found.group(2)) + 1)

    def shape(name: str) -> tuple[int, ...]:
        if name not in given:
            raise ValueError(f"{where}: no {name}; {did_you_mean(name, given)}")
        found = given[name].shape
        if len(found) < 2 or 0 in found:
            raise ValueError(f"{where}: {name} is {list(found)}, expected a matrix")
        return found

    own = f"encoder/layers_0/{RELATIVE}" in given
    heads, buckets, *_ = shape(f"encoder/layers_0/{RELATIVE}" if own else f"encoder/{RELATIVE}")
    vocabulary, width, *_ = shape("token_embedder/embedding")
    query = shape("encoder/layers_0/attention/query/kernel")
    gated = "encoder/layers_0/mlp/wi_0/kernel" in given
    fields = {
        "vocab_size": vocabulary,
        "emb_dim": width,
        "num_heads": heads,
        "head_dim": math.prod(query) // width // heads,
        "mlp_dim": shape("encoder/layers_0/mlp/wo/kernel")[0],
        "num_encoder_layers": layers["encoder"],
        "num_decoder_layers": layers["decoder"],
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "logits_via_embedding": "decoder/logits_dense/kernel" not in given,
        "relative_attention_num_buckets": buckets,
        "relative_attention_per_layer": True if own else None,
    }
    return stated_config(fields, where)


def stated_config(fields: Mapping[str, Any], place: str) -> T5Config:
    """The network that a file states; ValueError, which opens with `place`, where it is none."""
    try:
        return T5Config(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from None
