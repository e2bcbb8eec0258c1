"""T5 1.1, mT5, ByT5 and umT5 as a flax.linen encoder-decoder, with T5X's parameters and interface.

With its layers in a loop the parameter tree is that of T5X's `t5` network
(`encoder/layers_0/attention/query/kernel`, `decoder/relpos_bias/rel_embedding`); scanned, that of
T5X's `scalable_t5`: layers stacked on axis 1 under `encoder/encoder` and `decoder/decoder`, with
relative positions in every layer. Kernels are two-dimensional in both, so that T5X's scanned
attention kernels [embed, layers, heads, kv] are here [embed, layers, heads * kv].
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flix_jax.models import layers
from flix_jax.models.config import T5Config
from flix_jax.models.stacks import Decoder, Encoder


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
        output: bool = True,
    ) -> Float[Array, "batch length vocab"] | Float[Array, "batch length embed"]:
        """Logits [batch, length, vocab] (float32) of the targets given the inputs.

        `decoder_input_tokens` are the targets shifted right; 0 is padding in both. With `decode` a
        cache for decoding is made, without the encoded inputs: T5X makes its cache from dummies.
        Without `output`, the decoder's states [batch, length, embed], of which `output_layer` makes
        the logits.
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
            output=output,
        )

    @nn.nowrap
    def output_layer(
        self, params: Mapping[str, Any]
    ) -> tuple[Callable[[Any, Array], Array], Mapping[str, Any]]:
        """(function of parameters and the decoder's states -> logits, those parameters)."""
        if self.config.logits_via_embedding:
            own = params["token_embedder"]
        else:
            own = params["decoder"]["logits_dense"]
        return functools.partial(output_logits, self.config), own

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
        output: bool = True,
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
            output=output,
        )


def output_logits(
    config: T5Config, params: Mapping[str, Any], states: Float[Array, "batch length embed"]
) -> Float[Array, "batch length vocab"]:
    """Float32 logits of a decoder's states, by the parameters of its output layer."""
    if config.logits_via_embedding:
        embed = layers.Embed(config.vocab_size, config.emb_dim)
        logits: Any = embed.apply({"params": params}, states, method="attend")
        logits = logits / jnp.sqrt(states.shape[-1])
    else:
        dense = layers.DenseGeneral(
            config.vocab_size, dtype=jnp.float32, kernel_axes=("embed", "vocab")
        )
        logits = dense.apply({"params": params}, states)
    return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))
