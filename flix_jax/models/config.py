"""Shape and manner of a T5-family network."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

from flix_jax.adapters.suggest import did_you_mean

REMAT_POLICIES = ("none", "minimal", "full")
_ACTIVATIONS = ("linear", "gelu", "relu", "silu", "swish", "tanh", "sigmoid")
_DTYPES = ("float32", "bfloat16", "float16")
_MOST_LAYERS = 1024  # of a stack; a stranger's file may say anything
_MOST = 2**31 - 1


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
            most = _MOST_LAYERS if name.endswith("_layers") else _MOST
            if value > most:
                raise ValueError(f"T5Config.{name} = {value!r}: expected at most {most:,}")
        for name in ("logits_via_embedding", "scan_layers", "one_hot_embedding"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"T5Config.{name} = {getattr(self, name)!r}: expected True or False"
                )
        own = self.relative_attention_per_layer
        if own is not None and not isinstance(own, bool):
            raise ValueError(
                f"T5Config.relative_attention_per_layer = {own!r}: expected True, False or None"
            )
        rate, neighbours = self.dropout_rate, self.relative_attention_neighbours
        if not isinstance(rate, numbers.Real) or not 0.0 <= rate < 1.0:
            raise ValueError(f"T5Config.dropout_rate = {rate!r}: expected [0, 1)")
        if not isinstance(neighbours, numbers.Real) or not abs(neighbours) < math.inf:
            raise ValueError(
                f"T5Config.relative_attention_neighbours = {neighbours!r}: expected a finite number"
            )
        buckets = self.relative_attention_num_buckets
        if buckets % 4 or self.relative_attention_max_distance <= buckets // 2:
            raise ValueError(
                f"T5Config.relative_attention_num_buckets = {buckets!r}: expected a multiple of 4 "
                f"below twice relative_attention_max_distance ="
                f" {self.relative_attention_max_distance!r}"
            )
        given = self.mlp_activations
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
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
