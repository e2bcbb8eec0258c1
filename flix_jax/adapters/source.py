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

from flix_jax.adapters.fusion import Source, align
from flix_jax.adapters.injection import (
    LAYER_STATES,
    SOURCE_INPUT,
    AdapterSpec,
    dense_call,
    layer_input,
)
from flix_jax.adapters.tree import split_adapters

SOURCE_TOKENS, SOURCE_SEGMENTS = "source_input_tokens", "source_segment_ids"
#: The entries of a batch that a source consists of.
SOURCE_INPUTS = (SOURCE_TOKENS, SOURCE_SEGMENTS)

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
      params: of the network and its adapters, which are not used.
      batch: `encoder_input_tokens` int32 [batch, length] and `source_input_tokens` int32 [batch,
        source_length], 0 is padding; of packed rows `encoder_segment_ids` and `source_segment_ids`.
      constrain: as for `record`.

    Raises:
      ValueError: an array is missing or of another shape; a layer's input cannot be recorded.
    """
    assert spec.fusion is not None
    tokens = _tokens(batch, SOURCE_TOKENS)
    segments = {}
    if batch.get("encoder_segment_ids") is not None:
        segments = {"encoder_segment_ids": _tokens(batch, SOURCE_SEGMENTS)}
        if segments["encoder_segment_ids"].shape != tokens.shape:
            raise ValueError(
                f"{SOURCE_SEGMENTS} has shape {segments['encoder_segment_ids'].shape}: expected "
                f"{tokens.shape}, as {SOURCE_TOKENS} has"
            )
    base = jax.tree.map(jax.lax.stop_gradient, split_adapters(params)[0])
    with record(spec, constrain) as same:
        encoded, variables = module.apply(
            {"params": base},
            tokens,
            **segments,
            enable_dropout=False,
            mutable=[LAYER_STATES],
            method="encode",
        )
    alignment = align(
        spec.fusion.function,
        batch["encoder_input_tokens"] > 0,
        tokens > 0,
        batch.get("encoder_segment_ids"),
        segments.get("encoder_segment_ids"),
    )
    given = of_layers(variables, encoded, same, spec.fusion.layer_offset)
    return Source(alignment, variables=given, same=same)


def _tokens(batch: Mapping[str, Any], name: str) -> Any:
    """An array of integers [batch, source_length] of the batch."""
    if name not in batch:
        raise ValueError(
            f"batch has no {name!r}, which adapters with a fusion need; it has "
            + ", ".join(sorted(batch))
        )
    array, rows = batch[name], batch["encoder_input_tokens"].shape[0]
    if array.ndim != 2 or array.shape[0] != rows or not array.shape[1]:
        raise ValueError(
            f"{name} has shape {array.shape}: expected [{rows}, source length], a row for each of "
            "encoder_input_tokens"
        )
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {array.dtype}, expected integers")
    return array
