"""T5 1.1, mT5, ByT5 and umT5 as a flax.linen encoder-decoder, with T5X's parameters and interface.

With its layers in a loop the parameter tree is that of T5X's `t5` network
(`encoder/layers_0/attention/query/kernel`, `decoder/relpos_bias/rel_embedding`); scanned, that of
T5X's `scalable_t5`: layers stacked on axis 1 under `encoder/encoder` and `decoder/decoder`, with
relative positions in every layer. Kernels are two-dimensional in both, so that T5X's scanned
attention kernels [embed, layers, heads, kv] are here [embed, layers, heads * kv].
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.models import layers

REMAT_POLICIES = ("none", "minimal", "full")
_ACTIVATIONS = ("linear", "gelu", "relu", "silu", "swish", "tanh", "sigmoid")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape and manner of a T5-family network; the fields that T5X has carry T5X's names.

    Attributes:
      vocab_size: rows of the embedding, usually the vocabulary rounded up.
      emb_dim: width of the residual stream (d_model).
      num_heads, head_dim: attention heads and the width of each.
      mlp_dim: width of the feed-forward block (d_ff).
      mlp_activations: one activation per input projection; ('gelu', 'linear') is gated GELU.
      dropout_rate: rate of every dropout of the network.
      logits_via_embedding: tie the output layer to the embedding (T5 1.0).
      dtype: dtype of the computation; parameters, softmax and logits are float32.
      product_dtype: dtype that operands of the dense layers' products are rounded to, their sums
        kept in float32; None is `dtype`. 'bfloat16' beside a float32 `dtype` is what a TPU does by
        default, and the fast way on CPUs with bfloat16 matrix units.
      scan_layers: stack the layers and scan over them; compiles once per stack, not per layer.
      remat: 'none', 'minimal' (keep products of weights and activations) or 'full'.
      relative_attention_num_buckets, relative_attention_max_distance: of the relative positions.
      relative_attention_per_layer: whether every layer has its own relative positions. None does as
        T5X does: shared by the stack in a loop, per layer when scanned. umT5 needs True.
      relative_attention_neighbours: added to near distances in four heads of the initial relative
        positions (see layers.neighbour_init); 0 is T5's initialisation.
      one_hot_embedding: look tokens up by a one-hot product (see layers.Embed).
    """

    vocab_size: int
    emb_dim: int = 512
    num_heads: int = 6
    head_dim: int = 64
    mlp_dim: int = 1024
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    mlp_activations: Sequence[str] = ("gelu", "linear")
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    dtype: str = "float32"
    product_dtype: str | None = None
    scan_layers: bool = False
    remat: str = "none"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_attention_per_layer: bool | None = None
    relative_attention_neighbours: float = 0.0
    one_hot_embedding: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "emb_dim",
            "num_heads",
            "head_dim",
            "mlp_dim",
            "num_encoder_layers",
            "num_decoder_layers",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"T5Config.{name} = {value!r}: expected a positive integer")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"T5Config.dropout_rate = {self.dropout_rate!r}: expected [0, 1)")
        if not math.isfinite(self.relative_attention_neighbours):
            raise ValueError(
                f"T5Config.relative_attention_neighbours = {self.relative_attention_neighbours!r}: "
                "expected a finite number"
            )
        buckets = self.relative_attention_num_buckets
        if buckets % 4 or self.relative_attention_max_distance <= buckets // 2:
            raise ValueError(
                f"T5Config.relative_attention_num_buckets = {buckets!r}: expected a multiple of 4 "
                f"below twice relative_attention_max_distance ="
                f" {self.relative_attention_max_distance!r}"
            )
        if isinstance(self.mlp_activations, str) or not self.mlp_activations:
            raise ValueError(
                f"T5Config.mlp_activations = {self.mlp_activations!r}: expected names, such as "
                "('gelu', 'linear')"
            )
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for activation in self.mlp_activations:
            _check_choice("mlp_activations", activation, _ACTIVATIONS)
        _check_choice("remat", self.remat, REMAT_POLICIES)
        _check_choice("dtype", self.dtype, _DTYPES)
        if self.product_dtype is not None:
            _check_choice("product_dtype", self.product_dtype, _DTYPES)

    @property
    def relative_positions_in_layers(self) -> bool:
        """Whether relative positions belong to each layer rather than to the stack."""
        if self.relative_attention_per_layer is None:
            return self.scan_layers
        return self.relative_attention_per_layer


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"T5Config.{name} = {value!r}: expected one of {', '.join(choices)}; "
            f"{did_you_mean(str(value), choices)}"
        )


def _attention(config: T5Config, name: str) -> layers.MultiHeadAttention:
    return layers.MultiHeadAttention(
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        dtype=jnp.dtype(config.dtype),
        operands=config.product_dtype,
        dropout_rate=config.dropout_rate,
        name=name,
    )


def _relative_positions(config: T5Config, *, bidirectional: bool) -> layers.RelativePositionBiases:
    return layers.RelativePositionBiases(
        num_heads=config.num_heads,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        bidirectional=bidirectional,
        neighbour_strength=config.relative_attention_neighbours,
        dtype=jnp.dtype(config.dtype),
        name="relpos_bias",
    )


class _Layer(nn.Module):
    """What encoder and decoder layers share: pre-norm, dropout over the length, residual."""

    config: T5Config
    deterministic: bool = True

    def norm(self, x: Array, name: str) -> Array:
        return layers.RMSNorm(dtype=jnp.dtype(self.config.dtype), name=name)(x)

    def residual(self, x: Array, update: Array) -> Array:
        dropout = nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))
        x = x + dropout(update, deterministic=self.deterministic)
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))

    def feed_forward(self, x: Array) -> Array:
        mlp = layers.MlpBlock(
            self.config.mlp_dim,
            activations=tuple(self.config.mlp_activations),
            dropout_rate=self.config.dropout_rate,
            dtype=jnp.dtype(self.config.dtype),
            operands=self.config.product_dtype,
            name="mlp",
        )
        normed = self.norm(x, "pre_mlp_layer_norm")
        return self.residual(x, mlp(normed, deterministic=self.deterministic))


class EncoderLayer(_Layer):
    """Self-attention and feed-forward; returns (x, None), as a scan over layers wants it."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], mask: Array, bias: Array | None
    ) -> tuple[Float[Array, "batch length embed"], None]:
        """`bias` is the stack's relative positions, None where the layer has its own."""
        if bias is None:
            length = x.shape[-2]
            bias = _relative_positions(self.config, bidirectional=True)(length, length)
        normed = self.norm(x, "pre_attention_layer_norm")
        attention = _attention(self.config, "attention")
        x = self.residual(
            x, attention(normed, normed, mask, bias, deterministic=self.deterministic)
        )
        return self.feed_forward(x), None


class DecoderLayer(_Layer):
    """Causal self-attention, attention to the encoded inputs, feed-forward; returns (x, None)."""

    keep_encoded_keys: bool = False
    max_decode_length: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        encoded: Float[Array, "batch input_length embed"],
        self_mask: Array | None,
        cross_mask: Array,
        bias: Array | None,
        position: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "batch length embed"], None]:
        """`position` is that of the decoding step, None outside decoding."""
        if bias is None:
            bias = _decoder_bias(self.config, x.shape[-2], self.max_decode_length, position)
        normed = self.norm(x, "pre_self_attention_layer_norm")
        attention = _attention(self.config, "self_attention")
        update = attention(
            normed,
            normed,
            self_mask,
            bias,
            deterministic=self.deterministic,
            position=position,
        )
        x = self.residual(x, update)
        normed = self.norm(x, "pre_cross_attention_layer_norm")
        attention = _attention(self.config, "encoder_decoder_attention")
        update = attention(
            normed,
            encoded,
            cross_mask,
            deterministic=self.deterministic,
            keep_keys=self.keep_encoded_keys,
        )
        return self.feed_forward(self.residual(x, update)), None


def _decoder_bias(
    config: T5Config, length: int, max_decode_length: int | None, position: Array | None
) -> Array:
    """Relative positions of the whole target, or of one step against `max_decode_length` keys."""
    positions = _relative_positions(config, bidirectional=False)
    if position is None or max_decode_length is None:
        return positions(length, length)
    return positions(1, max_decode_length, position)


def _run_layers(
    layer_class: type[_Layer],
    name: str,
    num_layers: int,
    x: Array,
    *inputs: Array | None,
    config: T5Config,
    **attributes: Any,
) -> Array:
    """Runs a stack of layers over x, looped or scanned; `inputs` are the same for every layer.

    Called inside a compact method, whose module the layers become children of.
    """
    if config.remat != "none":
        policies = jax.checkpoint_policies
        layer_class = nn.remat(
            layer_class,
            prevent_cse=not config.scan_layers,
            policy=policies.dots_with_no_batch_dims_saveable
            if config.remat == "minimal"
            else policies.nothing_saveable,
        )
    if config.scan_layers:
        stack = nn.scan(
            layer_class,
            variable_axes={"params": 1, "cache": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * len(inputs),
            length=num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(config=config, name=name, **attributes)(x, *inputs)[0]
    for index in range(num_layers):
        x, _ = layer_class(config=config, name=f"layers_{index}", **attributes)(x, *inputs)
    return x


class Encoder(nn.Module):
    """Embedding, layers and the final norm of the inputs."""

    config: T5Config
    token_embedder: layers.Embed

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch length"], mask: Array, *, deterministic: bool
    ) -> Float[Array, "batch length embed"]:
        """Token ids [batch, length] -> encoded inputs [batch, length, embed]."""
        config = self.config
        x = self.token_embedder(tokens)
        x = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))(x, deterministic=deterministic)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        bias = None
        if not config.relative_positions_in_layers:
            length = tokens.shape[1]
            bias = _relative_positions(config, bidirectional=True)(length, length)
        x = _run_layers(
            EncoderLayer,
            "encoder",
            config.num_encoder_layers,
            x,
            mask,
            bias,
            config=config,
            deterministic=deterministic,
        )
        x = layers.RMSNorm(dtype=jnp.dtype(config.dtype), name="encoder_norm")(x)
        return nn.Dropout(config.dropout_rate)(x, deterministic=deterministic)


class Decoder(nn.Module):
    """Embedding, layers, final norm and logits of the targets.

    While decoding, `cache_index` in the collection `cache` counts the tokens taken so far.
    """

    config: T5Config
    token_embedder: layers.Embed

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        encoded: Float[Array, "batch input_length embed"],
        self_mask: Array | None,
        cross_mask: Array,
        *,
        deterministic: bool,
        decode: bool,
        keep_encoded_keys: bool,
        max_decode_length: int | None,
    ) -> Float[Array, "batch length vocab"]:
        """Token ids [batch, length] -> float32 logits [batch, length, vocab]."""
        config = self.config
        position = self._next_position(max_decode_length) if decode else None
        x = self.token_embedder(tokens)
        x = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))(x, deterministic=deterministic)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        bias = None
        if not config.relative_positions_in_layers:
            bias = _decoder_bias(config, tokens.shape[1], max_decode_length, position)
        x = _run_layers(
            DecoderLayer,
            "decoder",
            config.num_decoder_layers,
            x,
            encoded,
            self_mask,
            cross_mask,
            bias,
            position,
            config=config,
            deterministic=deterministic,
            keep_encoded_keys=keep_encoded_keys,
            max_decode_length=max_decode_length,
        )
        x = layers.RMSNorm(dtype=jnp.dtype(config.dtype), name="decoder_norm")(x)
        x = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))(x, deterministic=deterministic)
        if config.logits_via_embedding:
            logits = self.token_embedder.attend(x) / jnp.sqrt(x.shape[-1])
        else:
            logits = layers.DenseGeneral(
                config.vocab_size,
                dtype=jnp.float32,
                kernel_axes=("embed", "vocab"),
                name="logits_dense",
            )(x)
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))

    def _next_position(self, max_decode_length: int | None) -> Int[Array, ""]:
        """Position of the token being decoded; making the cache does not advance it."""
        stepping = self.has_variable("cache", "cache_index")
        if stepping and max_decode_length is None:
            raise ValueError("Transformer.decode: a decoding step needs max_decode_length")
        index = self.variable("cache", "cache_index", jnp.zeros, (), jnp.int32)
        position = index.value
        if stepping:
            index.value = position + 1
        return position


class Transformer(nn.Module):
    """Encoder-decoder with T5X's calling interface."""

    config: T5Config

    def setup(self) -> None:
        config = self.config
        self.token_embedder = layers.Embed(
            num_embeddings=config.vocab_size,
            features=config.emb_dim,
            dtype=jnp.dtype(config.dtype),
            one_hot=config.one_hot_embedding,
        )
        self.encoder = Encoder(config, self.token_embedder)
        self.decoder = Decoder(config, self.token_embedder)

    @property
    def scan_layers(self) -> bool:
        """Whether the layers are stacked; the name under which T5X asks for it."""
        return self.config.scan_layers

    def encode(
        self,
        encoder_input_tokens: Int[Array, "batch length"],
        encoder_segment_ids: Int[Array, "batch length"] | None = None,
        enable_dropout: bool = True,
    ) -> Float[Array, "batch length embed"]:
        """Encodes token ids (0 is padding); packed rows attend within their segments."""
        valid = encoder_input_tokens > 0
        mask = layers.padding_mask(valid, valid)
        if encoder_segment_ids is not None:
            mask &= layers.segment_mask(encoder_segment_ids, encoder_segment_ids)
        return self.encoder(encoder_input_tokens, mask, deterministic=not enable_dropout)

    def decode(
        self,
        encoded: Float[Array, "batch input_length embed"],
        encoder_input_tokens: Int[Array, "batch input_length"],
        decoder_input_tokens: Int[Array, "batch length"],
        decoder_target_tokens: Int[Array, "batch length"],
        encoder_segment_ids: Int[Array, "batch input_length"] | None = None,
        decoder_segment_ids: Int[Array, "batch length"] | None = None,
        decoder_positions: Int[Array, "batch length"] | None = None,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Logits of the decoder, float32.

        With `decode` and `mutable=['cache']`, the first call (no cache yet) makes a cache for as
        many tokens as `decoder_input_tokens` has, with the keys and values of `encoded`; every
        later call takes one token per row, appends it to the cache and needs `max_decode_length`,
        the length of the cache. `decoder_positions` is accepted for T5X's sake: positions are
        relative, and packed segments are told apart by their ids.
        """
        return self._decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            enable_dropout=enable_dropout,
            decode=decode,
            keep_encoded_keys=decode and not self.variables.get("cache"),
            max_decode_length=max_decode_length,
        )

    def __call__(
        self,
        encoder_input_tokens: Int[Array, "batch input_length"],
        decoder_input_tokens: Int[Array, "batch length"],
        decoder_target_tokens: Int[Array, "batch length"],
        encoder_segment_ids: Int[Array, "batch input_length"] | None = None,
        decoder_segment_ids: Int[Array, "batch length"] | None = None,
        encoder_positions: Int[Array, "batch input_length"] | None = None,
        decoder_positions: Int[Array, "batch length"] | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
    ) -> Float[Array, "batch length vocab"]:
        """Logits [batch, length, vocab] (float32) of the targets given the inputs.

        `decoder_input_tokens` are the targets shifted right; 0 is padding in both. With `decode` a
        cache for decoding is made, without the encoded inputs: T5X makes its cache from dummies.
        """
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)
        return self._decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            enable_dropout=enable_dropout,
            decode=decode,
            keep_encoded_keys=False,
            max_decode_length=None,
        )

    def _decode(
        self,
        encoded: Array,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None,
        decoder_segment_ids: Array | None,
        *,
        enable_dropout: bool,
        decode: bool,
        keep_encoded_keys: bool,
        max_decode_length: int | None,
    ) -> Array:
        input_valid = encoder_input_tokens > 0
        if decode:
            if encoder_segment_ids is not None or decoder_segment_ids is not None:
                raise ValueError("Transformer.decode: packed rows cannot be decoded step by step")
            # Step by step, targets have no padding yet and causality follows from the cache.
            self_mask = None
            cross_mask = layers.padding_mask(
                jnp.ones_like(decoder_target_tokens, bool), input_valid
            )
        else:
            valid = decoder_target_tokens > 0
            self_mask = layers.causal_mask(valid.shape[1]) & layers.padding_mask(valid, valid)
            cross_mask = layers.padding_mask(valid, input_valid)
            if decoder_segment_ids is not None:
                self_mask &= layers.segment_mask(decoder_segment_ids, decoder_segment_ids)
            if encoder_segment_ids is not None:
                if decoder_segment_ids is None:
                    raise ValueError("encoder_segment_ids are given without decoder_segment_ids")
                cross_mask &= layers.segment_mask(decoder_segment_ids, encoder_segment_ids)
        return self.decoder(
            decoder_input_tokens,
            encoded,
            self_mask,
            cross_mask,
            deterministic=not enable_dropout,
            decode=decode,
            keep_encoded_keys=keep_encoded_keys,
            max_decode_length=max_decode_length,
        )
