"""The source pass: a network reads the source without adapters, and its layers' inputs are kept.

    with record(spec) as same:
        encoded, variables = model.apply({"params": base}, source, method="encode",
                                         mutable=[LAYER_STATES])
    variables = of_layers(variables, encoded, same, spec.fusion.layer_offset)

`read` does it for a batch of an encoder-decoder.

Every fused layer leaves its input in the collection `layer_states` of its own scope, which the
adapted pass is then given, so that a scan stacks the inputs of its layers and takes them apart
again. For that a scan names the collection among its `variable_axes`, as `models.stacks` does.
Layers that read the same array (query and value) keep it once.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from flix_jax.adapters.dense import dense_call, layer_input
from flix_jax.adapters.fusion import Source, align
from flix_jax.adapters.injection import (
    CHILD,
    LAYER_STATES,
    PROJECTION,
    SOURCE_INPUT,
    AdapterSpec,
)
from flix_jax.adapters.tree import named_leaves, split_adapters

SOURCE_TOKENS, SOURCE_SEGMENTS = "source_input_tokens", "source_segment_ids"
SOURCE_STATES, SOURCE_MASK = "source_states", "source_mask"
#: The entries of a batch that a source consists of.
SOURCE_INPUTS = (SOURCE_TOKENS, SOURCE_SEGMENTS, SOURCE_STATES, SOURCE_MASK)

_NUMBER = re.compile(r"(.*_)(\d+)")


@contextlib.contextmanager
def record(
    spec: AdapterSpec, constrain: Callable[[Array], Array] = lambda x: x
) -> Iterator[dict[str, str]]:
    """A context in which the fused layers of any linen model keep their inputs, without gradient.

    Enter it inside the jitted function, around a call that makes LAYER_STATES mutable.

    Args:
      spec: its fusion says which layers; they are not adapted here.
      constrain: applied to every input, to say where it lies.

    Yields:
      Path of a fused layer -> path of the layer that keeps its input; filled by the call.

    Raises:
      ValueError: a scan around a layer does not carry the collection.
    """
    same: dict[str, str] = {}
    kept: dict[int, tuple[Any, str]] = {}  # by identity; an array that is held is not another's

    def interceptor(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        x = layer_input(args, kwargs)
        call = dense_call(context, x)
        if call is None or not spec.fuses(call.path):
            return y
        before = kept.get(id(x))
        if before is not None:
            same[call.path] = before[1]
            return y
        kept[id(x)] = x, call.path
        same[call.path] = call.path
        state = constrain(jax.lax.stop_gradient(x))
        try:
            context.module.put_variable(LAYER_STATES, SOURCE_INPUT, state)
        except flax.errors.ModifyScopeVariableError as error:
            raise ValueError(_not_carried(call.path)) from error
        return y

    with nn.intercept_methods(interceptor):
        yield same


def _not_carried(path: str) -> str:
    return (
        f"{path}: is fused, but a scan around it does not carry {LAYER_STATES!r}, expected that "
        "among its variable_axes"
    )


def of_layers(
    variables: Mapping[str, Any], encoded: Array, same: Mapping[str, str], offset: int
) -> dict[str, Any]:
    """What the adapted pass is given: with an offset of 1, every layer the input of the next one.

    Args:
      variables: what the recorded call has made, LAYER_STATES among them.
      encoded: its result [batch, length, width], which is what the last layer is given.
      same: as `record` has it.
      offset: 0 or 1.

    Raises:
      ValueError: an input is missing; or, with an offset, is not of the encoded result's shape.
    """
    found = variables.get(LAYER_STATES, {})
    inputs = {}
    for path in dict.fromkeys(same.values()):
        node = found
        for name in path.split("/"):
            node = node.get(name, {})
        if SOURCE_INPUT not in node:
            raise ValueError(_not_carried(path))
        inputs[path] = node[SOURCE_INPUT]
    if offset:
        inputs = {path: _next(path, inputs, encoded) for path in inputs}
    tree: dict[str, Any] = {}
    for path, x in inputs.items():
        node = tree
        for name in path.split("/"):
            node = node.setdefault(name, {})
        node[SOURCE_INPUT] = x
    return {LAYER_STATES: tree}


def _next(path: str, inputs: Mapping[str, Array], encoded: Array) -> Array:
    """The input of the layer after that of a path, stacked layers included."""
    x = inputs[path]
    if x.shape[-encoded.ndim :] != encoded.shape or x.ndim - encoded.ndim not in (0, 1):
        raise ValueError(
            f"Fusion.layer_offset = 1: {path} reads {x.shape}, expected the shape of the encoder's "
            f"output {encoded.shape}, which the last layer meets"
        )
    if x.ndim > encoded.ndim:
        return jnp.concatenate([x[1:], encoded[None].astype(x.dtype)])
    *parents, name = path.split("/")
    for place, parent in enumerate(parents):
        numbered = _NUMBER.fullmatch(parent)
        if numbered is not None:
            stem, number = numbered[1], int(numbered[2])
            following = "/".join([*parents[:place], f"{stem}{number + 1}", *parents[place + 1 :]])
            return inputs.get(f"{following}/{name}", encoded.astype(x.dtype))
    raise ValueError(
        f"Fusion.layer_offset = 1: {path} has no number of a layer, expected one such as in "
        "'encoder/layers_0/attention/query'"
    )


def read(
    module: nn.Module,
    spec: AdapterSpec,
    params: Any,
    batch: Mapping[str, Any],
    constrain: Callable[[Array], Array] = lambda x: x,
) -> Source:
    """The source of a batch, as the layers of an encoder-decoder read it: one pass of the encoder.

    Args:
      module: with T5X's method `encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)`.
      spec: with a fusion.
      params: of the network and its adapters; of these only what projects given states is used.
      batch: `encoder_input_tokens` int32 [batch, length] and `source_input_tokens` int32 [batch,
        source_length], 0 is padding; of packed rows `encoder_segment_ids` and `source_segment_ids`.
        Of a fusion with a `source_width`, instead of the source's tokens, `source_states` float
        [batch, source_length, source_width] and `source_mask` [batch, source_length], not 0 where
        there is a state: no pass is made.
      constrain: as for `record`.

    Raises:
      ValueError: an array is missing or of another shape; a layer's input cannot be recorded.
    """
    fusion = spec.fusion
    assert fusion is not None
    tokens = _integers(batch, SOURCE_TOKENS if fusion.source_width is None else SOURCE_MASK)
    target_segments, segments = batch.get("encoder_segment_ids"), None
    if target_segments is not None:
        segments = _integers(batch, SOURCE_SEGMENTS)
        if segments.shape != tokens.shape:
            raise ValueError(
                f"{SOURCE_SEGMENTS} has shape {segments.shape}: expected {tokens.shape}, the shape "
                "of the source"
            )
    target = batch["encoder_input_tokens"] > 0
    alignment = align(fusion.function, target, tokens != 0, target_segments, segments)
    if fusion.source_width is not None:
        states = _states(batch, (*tokens.shape, fusion.source_width))
        projection = params[CHILD][PROJECTION].astype(states.dtype)
        return Source(alignment, states=constrain(jax.lax.stop_gradient(states) @ projection))
    base = jax.tree.map(jax.lax.stop_gradient, split_adapters(params)[0])
    with record(spec, constrain) as same:
        encoded, variables = module.apply(
            {"params": base},
            tokens,
            **({} if segments is None else {"encoder_segment_ids": segments}),
            enable_dropout=False,
            mutable=[LAYER_STATES],
            method="encode",
        )
    given = of_layers(variables, encoded, same, fusion.layer_offset)
    return Source(alignment, variables=given, same=same)


def projection(spec: AdapterSpec, params: Mapping[str, Any], rng: Array) -> dict[str, Any]:
    """The parameter beside an adapted network's that brings given states to the layers' width.

    Args:
      spec: with a fusion.
      params: of network and adapters, which say that width.
      rng: the key of its initial values, N(0, 1 / source_width).

    Returns:
      {CHILD: {PROJECTION: [source_width, width]}}; {} where no states are given.

    Raises:
      ValueError: the fused layers' inputs have several widths.
    """
    if spec.fusion is None or spec.fusion.source_width is None:
        return {}
    widths = {
        leaf.shape[-2]
        for path, leaf in named_leaves(split_adapters(params)[1])
        if path[-1] == "a" and spec.fuses("/".join(path[:-3]))
    }
    if len(widths) != 1:
        raise ValueError(
            f"Fusion.targets: read inputs of widths {sorted(widths)}, expected one, to which "
            "Fusion.source_width is projected"
        )
    given = spec.fusion.source_width
    return {CHILD: {PROJECTION: jax.random.normal(rng, (given, *widths)) * given**-0.5}}


def _entry(batch: Mapping[str, Any], name: str) -> Any:
    if name not in batch:
        raise ValueError(
            f"batch has no {name!r}, which adapters with a fusion need; it has "
            + ", ".join(sorted(batch))
        )
    return batch[name]


def _states(batch: Mapping[str, Any], shape: tuple[int, ...]) -> Array:
    states = jnp.asarray(_entry(batch, SOURCE_STATES))
    if states.shape != shape or not jnp.issubdtype(states.dtype, jnp.floating):
        raise ValueError(
            f"{SOURCE_STATES} has shape {states.shape} and dtype {states.dtype}: expected {shape}, "
            f"as {SOURCE_MASK} and Fusion.source_width say, and floating point"
        )
    return states


def _integers(batch: Mapping[str, Any], name: str) -> Any:
    """An array of integers [batch, source_length] of the batch."""
    array, rows = _entry(batch, name), batch["encoder_input_tokens"].shape[0]
    if array.ndim != 2 or array.shape[0] != rows or not array.shape[1]:
        raise ValueError(
            f"{name} has shape {array.shape}: expected [{rows}, source length], a row for each of "
            "encoder_input_tokens"
        )
    if not (jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool):
        raise ValueError(f"{name} has dtype {array.dtype}, expected integers")
    return array
