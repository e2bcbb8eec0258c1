"""The layers of T5 1.1: bias-free dense layers, RMS norm, attention, gated MLP, embeddings.

Parameter names, shapes, initialisers and logical axes are those of T5X's `t5` network, so that its
checkpoints fit leaf by leaf. Parameters are float32; `dtype` is the dtype of the computation.
Attention logits and softmax are always float32.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flix_jax.models import int8
from flix_jax.models.products import matmul

MASKED_LOGIT = -1e10
# Names by which rematerialisation knows what else it keeps: a dense layer's output with what was
# added to it, and activations that are narrow beside it.
DENSE_OUTPUT, LOW_RANK = "dense_output", "low_rank"

Initializer = Callable[..., Any]
dense_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
attention_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
relative_position_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


def neighbour_init(strength: float, *, bidirectional: bool) -> Initializer:
    """T5's initial relative biases, with `strength` added to a near distance in four of the heads.

    Encoder heads 0 to 3 begin by looking at the positions -1, +1, -2 and +2, decoder heads at -1,
    0, -2 and -3. Heads that look at the token before are what copying is built from, and small
    models that are trained from scratch are slow to form them; strength 0 is T5's initialisation.
    """

    def init(rng: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
        heads, buckets = shape
        half = buckets // 2
        near = (1, half + 1, 2, half + 2) if bidirectional else (1, 0, 2, 3)
        table = relative_position_init(rng, shape, dtype)
        for head, bucket in zip(range(heads), near, strict=False):
            table = table.at[head, bucket].add(strength)
        return table

    return init


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


class DenseGeneral(nn.Module):
    """Linear map without bias over one or several axes, its kernel kept two-dimensional.

    `kernel` is [prod(contracted axes), prod(features)], whatever the number of axes on either side.
    It may be int8, with `kernel_scale` beside it (see models.int8).

    Attributes:
      features: sizes of the output axes.
      axis: input axes that are contracted; they must be the last ones, in order.
      kernel_axes: logical names of the kernel's two axes.
      operands: dtype that the product's operands are rounded to; None is `dtype`.
    """

    features: int | tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    dtype: Any = jnp.float32
    operands: Any = None
    kernel_init: Initializer = dense_init
    kernel_axes: tuple[str, ...] = ("embed", "mlp")

    @nn.compact
    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:
        """[..., *contracted] -> [..., *features], in `dtype`."""
        features = _as_tuple(self.features)
        axes = tuple(axis % inputs.ndim for axis in _as_tuple(self.axis))
        contracted = tuple(inputs.shape[axis] for axis in axes)
        kernel: Any = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.kernel_axes),
            (math.prod(contracted), math.prod(features)),
            jnp.float32,
        )
        # As one product of matrices, whose gradients XLA forms without transposing the inputs.
        rows = jnp.asarray(inputs, self.dtype).reshape(-1, math.prod(contracted))
        if kernel.dtype == jnp.int8:
            scale: Any = self.get_variable("params", int8.scale_name("kernel"))
            outputs = int8.matmul(rows, kernel, scale, self.operands or self.dtype)
        else:
            outputs = matmul(rows, kernel, self.operands or self.dtype)
        return outputs.reshape(inputs.shape[: inputs.ndim - len(axes)] + features)


class RMSNorm(nn.Module):
    """T5's layer norm: x / rms(x) * scale, without centring or bias, the mean taken in float32."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """[..., embed] -> [..., embed], in `dtype`."""
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
            (x.shape[-1],),
            jnp.float32,
        )
        x = jnp.asarray(x, jnp.float32)
        mean_square = jnp.mean(lax.square(x), axis=-1, keepdims=True)
        y = jnp.asarray(x * lax.rsqrt(mean_square + self.epsilon), self.dtype)
        return y * jnp.asarray(scale, self.dtype)


class Embed(nn.Module):
    """Token embeddings, [vocab, embed]; they may be int8 (see models.int8).

    Attributes:
      one_hot: look tokens up by a one-hot product instead of a gather. Costs vocab x embed
        multiplications a token; useful where a vocabulary-sharded gather is partitioned badly.
    """

    num_embeddings: int
    features: int
    dtype: Any = jnp.float32
    one_hot: bool = False

    def setup(self) -> None:
        self.embedding: Any = self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(stddev=1.0), ("vocab", "embed")),
            (self.num_embeddings, self.features),
            jnp.float32,
        )

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length embed"]:
        """Token ids -> embeddings in `dtype`. By gather, an id beyond the table gives NaN."""
        if self.embedding.dtype == jnp.int8:
            # An id beyond the table is a NaN by its scale.
            scale = jnp.take(self._scale(), tokens, axis=0, mode="fill")
            return jnp.asarray(self._rows(self.embedding, tokens) * scale, self.dtype)
        return self._rows(jnp.asarray(self.embedding, self.dtype), tokens)

    def _rows(self, table: Array, tokens: Array) -> Array:
        if self.one_hot:
            dtype = self.dtype  # which holds every int8 exactly
            one_hot = jax.nn.one_hot(tokens, self.num_embeddings, dtype=dtype)
            return jnp.dot(one_hot, table.astype(dtype))
        # 'fill' makes an id beyond the table a NaN: clipping would train on a wrong token silently.
        return jnp.take(table, tokens, axis=0, mode="fill")

    def _scale(self) -> Any:
        return self.get_variable("params", int8.scale_name("embedding"))

    def attend(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
        """Products with every embedding, in float32: logits of a tied output layer."""
        x = x.astype(jnp.float32)
        if self.embedding.dtype == jnp.int8:
            rows = x.reshape(-1, x.shape[-1])
            logits = int8.matmul(rows, self.embedding.T, self._scale().T, jnp.float32)
            return logits.reshape(*x.shape[:-1], -1)
        return jnp.dot(x, jnp.asarray(self.embedding, jnp.float32).T)


def relative_position_buckets(
    relative_positions: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """T5's buckets: exact for small distances, logarithmic up to `max_distance`, then one.

    Args:
      relative_positions: key position - query position, any shape.
      bidirectional: half of the buckets for keys after the query; otherwise those share bucket 0.

    Returns:
      Bucket numbers in [0, num_buckets), int32, of the same shape.
    """
    distance = -np.asarray(relative_positions, np.int32)
    offset = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = (distance < 0).astype(np.int32) * num_buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = num_buckets // 2
    # epsilon keeps log(0) finite; those entries are replaced by the exact buckets below
    ratio = distance.astype(np.float32) / exact + np.finfo(np.float32).eps
    far = np.log(ratio) / np.log(max_distance / exact) * (num_buckets - exact)
    far = np.minimum(exact + far.astype(np.int32), num_buckets - 1)
    return (offset + np.where(distance < exact, distance, far)).astype(np.int32)


class RelativePositionBiases(nn.Module):
    """Attention bias of each head by the bucket of (key position - query position).

    A bias depends on the distance alone, so only one value per distance is looked up; the matrix of
    all pairs is laid out from those by reshapes, whose gradient needs no scatter. TPUs, to whose
    tiles those reshapes are moves of single rows, look up every pair, by a product.
    """

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    neighbour_strength: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, query_length: int, key_length: int, query_position: Int[Array, ""] | None = None
    ) -> Float[Array, "1 heads query key"]:
        """Biases of queries 0..query_length-1, or of the one query at `query_position`.

        With `query_position` (below key_length, may be traced) the result is [1, heads, 1, key].
        """
        init = neighbour_init(self.neighbour_strength, bidirectional=self.bidirectional)
        table = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(init, ("heads", "relpos_buckets")),
            (self.num_heads, self.num_buckets),
            jnp.float32,
        )
        queries = key_length if query_position is not None else query_length
        distances = np.arange(-(queries - 1), key_length)
        buckets = relative_position_buckets(
            distances,
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        biases = jnp.asarray(table, self.dtype)
        if query_position is not None:
            start = queries - 1 - query_position
            by_distance = jnp.take(biases, buckets, axis=1)
            row = lax.dynamic_slice_in_dim(by_distance, start, key_length, axis=1)
            return row[None, :, None, :]
        lengths = query_length, key_length
        return lax.platform_dependent(
            biases,
            tpu=lambda table: _by_product(table, buckets, *lengths),
            default=lambda table: _toeplitz(jnp.take(table, buckets, axis=1), *lengths)[None],
        )


def _by_product(
    table: Float[Array, "heads buckets"],
    bucket_of: Int[np.ndarray, " distances"],
    query_length: int,
    key_length: int,
) -> Float[Array, "1 heads query key"]:
    """The biases of all pairs as a product with their buckets, one-hot."""
    distances = np.arange(key_length) - np.arange(query_length)[:, None] + query_length - 1
    buckets = lax.broadcasted_iota(jnp.int32, (table.shape[1], 1, 1), 0)
    one_hot = (jnp.asarray(bucket_of[distances]) == buckets).astype(table.dtype)
    # With an axis of a batch it is no product that rematerialisation keeps: it costs less anew.
    return jnp.einsum("nhb,nbqk->nhqk", table[None], one_hot[None], precision="highest")


def _toeplitz(
    by_distance: Float[Array, "heads distances"], query_length: int, key_length: int
) -> Float[Array, "heads query key"]:
    """matrix[h, q, k] = by_distance[h, k - q + query_length - 1], without a gather."""
    heads, count = by_distance.shape
    if query_length == 1:
        return by_distance[:, None, :]
    # Rows of `count` read as rows of `count - 1` are each shifted by one against the row above.
    rolled = jnp.roll(by_distance, 1 - query_length, axis=1)
    repeated = jnp.broadcast_to(rolled[:, None], (heads, query_length, count))
    flat = repeated.reshape(heads, query_length * count)[:, : query_length * (count - 1)]
    return flat.reshape(heads, query_length, count - 1)[:, :, :key_length]


def dot_product_attention(
    query: Float[Array, "batch query heads depth"],
    key: Float[Array, "batch key heads depth"],
    value: Float[Array, "batch key heads depth"],
    mask: Bool[Array, " batch #heads query key"] | None = None,
    bias: Float[Array, "#batch heads query key"] | None = None,
    *,
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "batch query heads depth"]:
    """softmax(query key^T + bias) value, with unscaled logits and the softmax in float32.

    `dropout` is of the weights [batch, heads, query, key].
    """
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    return _attend(logits, value, "bkhd", mask, bias, dropout)


def _attend(
    logits: Array,
    value: Array,
    layout: str,
    mask: Array | None,
    bias: Array | None,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return jnp.einsum(f"bhqk,{layout}->bqhd", weights, value)


class MultiHeadAttention(nn.Module):
    """Multi-head attention without biases; keys and values can be kept in the `cache` collection.

    Cached keys and values are [batch, heads, length, head_dim] under `cached_key` and
    `cached_value`. Self-attention is given `position` while decoding: the first call, which finds
    no cache, makes one of zeros with the length of its inputs; every later call takes one token,
    writes its key and value at `position` and attends to positions 0..position. Attention to a
    fixed sequence with `keep_keys` keeps its keys and values, and reads them whenever it finds
    them.
    """

    num_heads: int
    head_dim: int
    dtype: Any = jnp.float32
    operands: Any = None
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "batch query embed"],
        inputs_kv: Float[Array, "batch key embed"],
        mask: Bool[Array, "batch 1 query keys"] | None = None,
        bias: Float[Array, "1 heads query keys"] | None = None,
        *,
        deterministic: bool = True,
        position: Int[Array, ""] | None = None,
        keep_keys: bool = False,
    ) -> Float[Array, "batch query embed"]:
        """[batch, query, embed] -> [batch, query, embed]; a mask is True where attention may go.

        `keys` is the length of `inputs_kv`, or of the cache in a step of self-attention.
        """
        cached = self.has_variable("cache", "cached_key")

        def project(name: str, init: Initializer, inputs: Array) -> Array:
            heads = DenseGeneral(
                features=(self.num_heads, self.head_dim),
                kernel_init=init,
                kernel_axes=("embed", "joined_kv"),
                dtype=self.dtype,
                operands=self.operands,
                name=name,
            )(inputs)
            return nn.with_logical_constraint(heads, ("batch", "length", "heads", "kv"))

        # Logits are not divided by sqrt(head_dim): the query kernel starts that much smaller.
        query = project("query", _scaled_init(self.head_dim**-0.5), inputs_q)
        key: Array
        value: Array
        if cached and position is None:
            key = self.get_variable("cache", "cached_key")
            value = self.get_variable("cache", "cached_value")
        else:
            key = project("key", attention_init, inputs_kv)
            value = project("value", attention_init, inputs_kv)
            if position is not None:
                key, value = self._keep_step(key, value, position if cached else None)
                if cached:
                    earlier = jnp.arange(key.shape[2]) <= position
                    mask = jnp.broadcast_to(earlier, (key.shape[0], 1, 1, key.shape[2]))
            elif keep_keys:
                self.variable("cache", "cached_key", lambda: key.swapaxes(1, 2))
                self.variable("cache", "cached_value", lambda: value.swapaxes(1, 2))

        if cached:
            logits = jnp.einsum("bqhd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
            x = _attend(logits, value, "bhkd", mask, bias)
        else:
            # Drawn once per key and shared by the queries, as in T5.
            dropout = nn.Dropout(self.dropout_rate, (-2,), deterministic)
            x = dot_product_attention(query, key, value, mask, bias, dropout=dropout)
        return DenseGeneral(
            features=inputs_q.shape[-1],
            axis=(-2, -1),
            kernel_init=attention_init,
            kernel_axes=("joined_kv", "embed"),
            dtype=self.dtype,
            operands=self.operands,
            name="out",
        )(x)

    def _keep_step(self, key: Array, value: Array, position: Array | None) -> tuple[Array, Array]:
        """Makes the cache (position None) or writes one token's key and value into it."""
        kept = []
        for name, new in (("cached_key", key), ("cached_value", value)):
            by_head = new.swapaxes(1, 2)
            cache = self.variable("cache", name, jnp.zeros, by_head.shape, by_head.dtype)
            if position is None:
                kept.append(new)
                continue
            if new.shape[1] != 1:
                raise ValueError(
                    f"{self.name}: a decoding step takes one token, got {new.shape[1]} at once"
                )
            cache.value = lax.dynamic_update_slice_in_dim(cache.value, by_head, position, axis=2)
            kept.append(cache.value)
        return kept[0], kept[1]


def _scaled_init(factor: float) -> Initializer:
    def init(*args: Any) -> Array:
        return attention_init(*args) * factor

    return init


class MlpBlock(nn.Module):
    """Feed-forward block: the product of the activated `wi_*` projections, dropped out, then `wo`.

    `activations` names one function of `flax.linen` (or 'linear') per projection: ('gelu',
    'linear') is T5 1.1's gated GELU in its tanh form, ('relu',) T5 1.0's, whose projection is `wi`.
    """

    intermediate_dim: int
    activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    operands: Any = None

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch length embed"], *, deterministic: bool = True
    ) -> Float[Array, "batch length embed"]:
        """[batch, length, embed] -> [batch, length, embed]."""
        branches = []
        for index, activation in enumerate(self.activations):
            x = DenseGeneral(
                self.intermediate_dim,
                kernel_axes=("embed", "mlp"),
                dtype=self.dtype,
                operands=self.operands,
                name="wi" if len(self.activations) == 1 else f"wi_{index}",
            )(inputs)
            branches.append(x if activation == "linear" else getattr(nn, activation)(x))
        x = functools.reduce(operator.mul, branches)
        x = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(x, deterministic=deterministic)
        x = nn.with_logical_constraint(x, ("batch", "length", "mlp"))
        return DenseGeneral(
            inputs.shape[-1],
            kernel_axes=("mlp", "embed"),
            dtype=self.dtype,
            operands=self.operands,
            name="wo",
        )(x)


def padding_mask(
    query_valid: Bool[Array, "batch query"], key_valid: Bool[Array, "batch key"]
) -> Bool[Array, "batch 1 query key"]:
    """True where both the query and the key are real tokens."""
    return query_valid[:, None, :, None] & key_valid[:, None, None, :]


def segment_mask(
    query_segments: Int[Array, "batch query"], key_segments: Int[Array, "batch key"]
) -> Bool[Array, "batch 1 query key"]:
    """True where the query and the key belong to the same packed segment."""
    return query_segments[:, None, :, None] == key_segments[:, None, None, :]


def causal_mask(length: int) -> Bool[Array, "1 1 query key"]:
    """True where the key is not after the query."""
    return jnp.tril(jnp.ones((1, 1, length, length), bool))
