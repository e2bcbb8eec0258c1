"""Encoder and decoder of a T5-family network: stacks of layers, in a loop or scanned."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flix_jax.models import layers
from flix_jax.models.config import T5Config


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
        # What is added to a product, example by example, would else be made again.
        outputs = policies.save_only_these_names(layers.LOW_RANK, layers.DENSE_OUTPUT)
        minimal = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, outputs
        )
        layer_class = nn.remat(
            layer_class,
            prevent_cse=not config.scan_layers,
            policy=minimal if config.remat == "minimal" else policies.nothing_saveable,
        )
    if config.scan_layers:
        stack = nn.scan(
            layer_class,
            # what may be recorded of a layer, or given to it, from outside: layer by layer
            variable_axes={"params": 1, "cache": 0, "layer_states": 0},
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
        output: bool = True,
    ) -> Float[Array, "batch length vocab"] | Float[Array, "batch length embed"]:
        """Token ids [batch, length] -> float32 logits [batch, length, vocab].

        Without `output`, what its output layer makes logits of: `t5.output_logits` does, too.
        """
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
        if not output:
            return x
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
