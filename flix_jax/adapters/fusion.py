"""Fusion: an adapted layer that reads the states of a source text beside those of the target.

FLARE (arXiv 2501.06892) puts a function φ between the two matrices of a LoRA:

    y = W x_t + s · B φ(s, t),   s = A x_s,   t = A x_t

x_t enters the layer; x_s entered it when the network read a source text, the English translation of
the input, say, without adapters. Here A and B are those of an example's active features, and φ is
applied to each feature's columns by themselves, so that with c as in `low_rank`

    y = W x_t + Σ_f c_f B_f φ_f(A_f x_s, A_f x_t)

A position to which the source has no token is plain: φ is t there, which is what an adapter
without fusion computes. So is a whole row, or a packed segment, that has no source.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from flix_jax.adapters import targets as targets_lib
from flix_jax.adapters.activation import ActiveFeatures
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.low_rank import Down, Meet
from flix_jax.adapters.suggest import did_you_mean

#: φ by position: of s and t at the same place.
POINTWISE: Mapping[str, Callable[[Array, Array], Array]] = {
    "add": lambda s, t: s + t,
    "mul": lambda s, t: s * t,
    "add_relu": lambda s, t: jax.nn.relu(s) + jax.nn.relu(t),
}
FROM_SOURCE, FROM_TARGET = "cross_attention", "cross_attention_from_target"
FUNCTIONS = (*POINTWISE, FROM_SOURCE, FROM_TARGET)

#: The matrices of an attention, [values, rank, rank] beside a type's `a` and `b`.
MATRICES = ("query", "key", "value")

_TARGETS = r"encoder/(?:.*/)?[^/]*[aA]ttention[^/]*/(?:query|value)"
_MASKED_LOGIT = -1e10

#: A feature type's name -> its matrices by name.
Matrices = Mapping[str, Mapping[str, Array]]


@dataclasses.dataclass(frozen=True)
class Fusion:
    """That adapters read a source beside the target, and how.

    Attributes:
      function: φ. 'add' is s + t, 'mul' s · t, 'add_relu' relu(s) + relu(t), each of the same
        position of source and target. 'cross_attention' queries from the source at each position
        with keys and values of the target. 'cross_attention_from_target' needs no such alignment:
        t + attention that queries from the target, with keys and values of the source.
      targets: which of the adapted layers, as in AdapterSpec; by default the query and value
        projections of the encoder's self-attention. Others are adapted plainly.
      layer_offset: 0, layer l of the target meets what enters layer l of the source pass; 1, what
        enters layer l + 1, and in the last layer the encoder's output.
      source_width: of source states that are given, vectors of another encoder, which a trained
        matrix brings to the width of the layers; None, the network itself reads a source text.

    Raises:
      ValueError: when a field is not as described above.
    """

    function: str = "add_relu"
    targets: str | tuple[str, ...] = _TARGETS
    layer_offset: int = 0
    source_width: int | None = None

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(
                f"Fusion.function = {self.function!r}: expected one of "
                f"{', '.join(map(repr, FUNCTIONS))}; {did_you_mean(str(self.function), FUNCTIONS)}"
            )
        targets = targets_lib.as_tuple(self.targets, "Fusion.targets")
        object.__setattr__(self, "targets", targets)
        if isinstance(self.layer_offset, bool) or self.layer_offset not in (0, 1):
            raise ValueError(f"Fusion.layer_offset = {self.layer_offset!r}: expected 0 or 1")
        width = self.source_width
        if width is not None and (isinstance(width, bool) or not isinstance(width, int)):
            raise ValueError(f"Fusion.source_width = {width!r}: expected an integer or None")
        if width is not None and width < 1:
            raise ValueError(f"Fusion.source_width = {width!r}: expected at least 1")
        if width is not None and self.layer_offset:
            raise ValueError(
                "Fusion.layer_offset = 1 has no effect with Fusion.source_width: states that are "
                "given are the same for all layers"
            )

    @property
    def attends(self) -> bool:
        """Whether φ is an attention, which has matrices of its own."""
        return self.function not in POINTWISE

    def matches(self, path: str) -> bool:
        """Whether the layer at a path is fused, if it is adapted."""
        return bool(targets_lib.matching(tuple(self.targets), path))


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Which source tokens the positions of a target meet.

    Attributes:
      fused: bool [batch, length], where φ is; elsewhere the adapter is plain.
      index: int32 [batch, length], the source position beside each position; None is the same one.
      mask: bool [batch, length, keys], where an attention may look; None without one.
    """

    fused: Any
    index: Any = None
    mask: Any = None


def align(
    function: str,
    target: Bool[Array, "batch length"],
    source: Bool[Array, "batch source_length"],
    target_segments: Int[Array, "batch length"] | None = None,
    source_segments: Int[Array, "batch source_length"] | None = None,
) -> Alignment:
    """The alignment of a batch: the nth token of a target stands beside the nth of its source.

    Args:
      function: φ, one of FUNCTIONS.
      target, source: True where there is a token.
      target_segments, source_segments: of packed rows: segments of equal number belong together.
    """
    segments = None
    if target_segments is not None and source_segments is not None:
        segments = target_segments, source_segments
    if function == FROM_TARGET:
        seen = source[:, None, :] & target[:, :, None]
        if segments is not None:
            seen &= _same(*segments)
        return Alignment(fused=seen.any(axis=2), mask=seen)
    index = None
    if segments is not None:
        pairs = _same(*segments) & _same(*map(_positions, segments)) & source[:, None, :]
        fused, index = pairs.any(axis=2), jnp.argmax(pairs, axis=2).astype(jnp.int32)
    else:
        more = max(0, target.shape[1] - source.shape[1])
        fused = jnp.pad(source[:, : target.shape[1]], ((0, 0), (0, more)))
    fused &= target
    if function != FROM_SOURCE:
        return Alignment(fused, index)
    seen = fused[:, :, None] & target[:, None, :]
    if segments is not None:
        seen &= _same(segments[0], segments[0])
    return Alignment(fused, index, seen)


def _same(ones: Array, others: Array) -> Array:
    """[batch, length] and [batch, keys] -> bool [batch, length, keys], where they are equal."""
    return ones[:, :, None] == others[:, None, :]


def _positions(segments: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """How many tokens of its own segment stand before each token."""
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    first = jnp.concatenate(
        [jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1
    )
    return places - jax.lax.cummax(jnp.where(first, places, 0), axis=1)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a batch's source is to the layers that read it: inside one trace.

    Attributes:
      alignment: of its tokens with the target's.
      states: [batch, source_length, width], where they are the same for all layers.
      variables: else the inputs of the fused layers, as a collection of the network's variables
        (see `source.record`).
      same: path of a layer -> that of the layer whose input is the same, whose alone is recorded.
    """

    alignment: Alignment
    states: Any = None
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)


def meeting(
    function: str,
    source: Array,
    alignment: Alignment,
    matrices: Matrices,
    active: ActiveFeatures,
    space: FeatureSpace,
) -> Meet:
    """What `low_rank.delta` puts in the place of the narrow activations of a fused layer.

    Args:
      function: φ.
      source: [batch, source_length, d_in], the source's states.
      alignment: of the batch.
      matrices: of an attention; by type, MATRICES [values, rank, rank].
      active, space: as of the delta.
    """

    def meet(types: tuple[FeatureType, ...], t: Array, down: Down) -> Array:
        s = down(source)
        if function in POINTWISE:
            fused = POINTWISE[function](_beside(s, alignment, t.shape[1]), t)
        else:
            if function == FROM_SOURCE:
                s = _beside(s, alignment, t.shape[1])
            fused = _by_feature(function, s, t, alignment, types, matrices, active, space)
        return jnp.where(alignment.fused[:, :, None], fused, t)

    return meet


def _beside(s: Array, alignment: Alignment, length: int) -> Array:
    """The source's rows [batch, source_length, R] at the positions of the target."""
    if alignment.index is not None:
        return jnp.take_along_axis(s, alignment.index[:, :, None], axis=1)
    return jnp.pad(s[:, :length], ((0, 0), (0, max(0, length - s.shape[1])), (0, 0)))


def _by_feature(
    function: str,
    s: Array,
    t: Array,
    alignment: Alignment,
    types: Sequence[FeatureType],
    matrices: Matrices,
    active: ActiveFeatures,
    space: FeatureSpace,
) -> Array:
    """Attention among the columns of each feature."""
    blocks, column = [], 0
    for of in types:
        width = matrices[of.name]["query"].shape[-1]
        ranks = _ranks(of, active)
        slots = space.slots(of) if of.num_values > 1 else range(1)
        for slot in slots:
            columns = slice(column, column + width)
            column += width
            if of.num_values == 1:
                own = {name: m[0] for name, m in matrices[of.name].items()}
                rank = ranks[:1]
            else:
                # As a product, whose gradient is one, too; an absent feature has zeros.
                chosen = jax.nn.one_hot(active.ids[:, slot], of.num_values, dtype=t.dtype)
                own = {
                    name: jnp.einsum("nv,vij->nij", chosen, m, precision="highest")
                    for name, m in matrices[of.name].items()
                }
                rank = jnp.take(ranks, active.ids[:, slot], mode="clip")
            theirs, ours = s[:, :, columns], t[:, :, columns]
            if function == FROM_SOURCE:
                block = _attention(theirs, ours, own, rank, alignment.mask)
            else:
                block = ours + _attention(ours, theirs, own, rank, alignment.mask)
            blocks.append(block)
    return jnp.concatenate(blocks, axis=2)


def _ranks(of: FeatureType, active: ActiveFeatures) -> Array:
    """The rank of each value; of banks that are wider, that of the columns that have an effect."""
    if active.scales is None:
        return jnp.asarray(np.asarray(of.value_ranks), jnp.float32)
    return jnp.maximum(jnp.sum(active.scales[of.name] > 0, axis=1), 1).astype(jnp.float32)


def _attention(
    queries: Array, others: Array, own: Mapping[str, Array], rank: Array, mask: Array
) -> Array:
    """softmax((queries W_q)(others W_k)ᵀ / √rank) (others W_v), one head; matrices per row or one.

    Args:
      queries, others: [batch, length, r] and [batch, keys, r].
      own: MATRICES, each [r, r] or [batch, r, r].
      rank: [batch] or [1].
      mask: bool [batch, length, keys].
    """

    def projected(name: str, rows: Array) -> Array:
        matrix = own[name].astype(rows.dtype)
        return jnp.einsum("nlr,rq->nlq" if matrix.ndim == 2 else "nlr,nrq->nlq", rows, matrix)

    logits = jnp.einsum("nlr,nkr->nlk", projected("query", queries), projected("key", others))
    logits = logits / jnp.sqrt(rank).astype(logits.dtype)[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, logits, _MASKED_LOGIT))
    return jnp.einsum("nlk,nkr->nlr", weights, projected("value", others))
