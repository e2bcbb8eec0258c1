"""Decoding over any one-step function, with early stopping; jit-friendly.

Every decoder has the same shape: it is given `tokens_to_logits`, the cache that this function
threads through, the batch size, the length and the end-of-sequence id. One that follows several
hypotheses per row maps the step over them with `jax.vmap`: what the hypotheses of a row have in
common (the encoded inputs, the features) is held once, and the network sees no more rows than
there are.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Cache = Any
# (tokens int32 [rows], cache) -> (logits [rows, vocab], cache), one step further
TokensToLogits = Callable[[Int[Array, " rows"], Cache], tuple[Float[Array, "rows vocab"], Cache]]

START_ID = 0
EXACT, HUGGINGFACE = MANNERS = ("exact", "huggingface")  # of beam search


def greedy(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    batch: int,
    max_length: int,
    eos_id: int,
    *,
    finished: Bool[Array, " batch"] | None = None,
) -> Int[Array, "batch {max_length}"]:
    """Takes the most probable token at every step until each row has ended.

    Args:
      tokens_to_logits: one step; the first token it is given is 0.
      cache: its state before the first step.
      batch: number of rows.
      max_length: tokens to decode at most, `eos_id` included.
      eos_id: the token that ends a row.
      finished: rows to leave empty (padding of a batch): they do not hold up the others.

    Returns:
      int32 [batch, max_length]: tokens up to and including `eos_id`, then 0.
    """

    def most_probable(logits: Array, step: Array) -> Array:
        return jnp.argmax(logits, axis=-1)

    return _one_by_one(tokens_to_logits, cache, batch, max_length, eos_id, most_probable, finished)


def sample(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    batch: int,
    max_length: int,
    eos_id: int,
    rng: Array,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    finished: Bool[Array, " batch"] | None = None,
) -> Int[Array, "batch {max_length}"]:
    """Draws every token from the network's distribution, or from its most probable part.

    Args:
      tokens_to_logits, cache, batch, max_length, eos_id, finished: as in `greedy`.
      rng: a key; what row r draws at step t follows from (rng, t, r).
      temperature: above 0; logits are divided by it.
      top_k: draw from the k most probable tokens; 0 is all.
      top_p: draw from the fewest most probable tokens whose probabilities, after `top_k`, sum to p
        or more (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751); 1 is all.

    Returns:
      As `greedy`.

    Raises:
      ValueError: an option out of its range.
    """
    check_sampling(temperature, top_k, top_p)

    def draw(logits: Array, step: Array) -> Array:
        logits = most_probable_part(logits.astype(jnp.float32) / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(rng, step), logits)

    return _one_by_one(tokens_to_logits, cache, batch, max_length, eos_id, draw, finished)


def most_probable_part(
    logits: Float[Array, "rows vocab"], top_k: int, top_p: float
) -> Float[Array, "rows vocab"]:
    """The logits, at -inf but for those that `sample` may draw; equal ones stay or go together."""
    if 0 < top_k < logits.shape[-1]:
        least = lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _one_by_one(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    batch: int,
    max_length: int,
    eos_id: int,
    choose: Callable[[Array, Array], Array],
    finished: Array | None,
) -> Array:
    """A token a step for every row, chosen from (logits, step), until all rows have ended."""
    _check_positive("max_length", max_length)
    if finished is None:
        finished = jnp.zeros((batch,), bool)

    def unfinished(state):
        step, _, done, _, _ = state
        return (step < max_length) & ~jnp.all(done)

    def advance(state):
        step, tokens, done, decoded, cache = state
        logits, cache = tokens_to_logits(tokens, cache)
        tokens = jnp.where(done, 0, choose(logits, step).astype(jnp.int32))
        decoded = lax.dynamic_update_slice(decoded, tokens[:, None], (0, step))
        return step + 1, tokens, done | (tokens == eos_id), decoded, cache

    start = jnp.full((batch,), START_ID, jnp.int32)
    decoded = jnp.zeros((batch, max_length), jnp.int32)
    state = (jnp.int32(0), start, finished, decoded, cache)
    return lax.while_loop(unfinished, advance, state)[3]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How texts are decoded: greedily, by beams, or by drawing them.

    Attributes:
      beams: hypotheses of beam search; 0 is none.
      alpha, manner: of beam search (see `beam`).
      sampling: whether tokens are drawn; then there are no beams.
      temperature, top_k, top_p: of drawing (see `sample`).
      seed: of drawing.

    Raises:
      ValueError: an option out of its range, or one that has no effect.
    """

    beams: int = 0
    alpha: float = 0.6
    manner: str = EXACT
    sampling: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.beams < 0:
            raise ValueError(f"beams = {self.beams!r}: expected at least 0")
        if self.beams and self.sampling:
            raise ValueError("beams and sampling exclude each other")
        unused = () if self.sampling else ("temperature", "top_k", "top_p", "seed")
        unused = (*unused, *(() if self.beams else ("alpha", "manner")))
        for field in dataclasses.fields(self):
            if field.name in unused and getattr(self, field.name) != field.default:
                needed = "beams" if field.name in ("alpha", "manner") else "sampling"
                raise ValueError(
                    f"{field.name} = {getattr(self, field.name)!r} has no effect without {needed}"
                )
        check_penalty(self.alpha, self.manner)
        check_sampling(self.temperature, self.top_k, self.top_p)


class _Search(NamedTuple):
    """Where a beam search stands; `beams` hypotheses of each kind per row.

    Attributes:
      step: tokens decoded so far.
      tokens: int32 [batch, beams], the last one of every live hypothesis.
      decoded: int32 [batch, beams, max_length], the live hypotheses, most probable first.
      log_probs: float32 [batch, beams], theirs; -inf where there is none.
      ended: int32 [batch, beams, max_length], the ended hypotheses, best first.
      scores: float32 [batch, beams], theirs; -inf where there is none.
      cache: of the live hypotheses.
    """

    step: Array
    tokens: Array
    decoded: Array
    log_probs: Array
    ended: Array
    scores: Array
    cache: Cache


def beam(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    batch: int,
    beams: int,
    max_length: int,
    eos_id: int,
    *,
    alpha: float = 0.6,
    manner: str = EXACT,
    cache_axes: Any = 0,
    finished: Bool[Array, " batch"] | None = None,
) -> tuple[Int[Array, "batch {beams} {max_length}"], Float[Array, "batch {beams}"]]:
    """Beam search for the `beams` hypotheses of each row that score best.

    The score of a hypothesis of n tokens, `eos_id` included, is its log probability divided by
    ((5 + n) / 6) ** alpha: the length penalty of Wu et al. 2016 (arXiv 1609.08144, Eq. 14), as T5X
    has it. In every step the `beams` most probable extensions of the live hypotheses are kept;
    those that end leave the search for the best `beams` that have ended, the others live on. At
    `max_length` tokens the live ones end as they are, without `eos_id`. A live hypothesis that
    cannot come among the best any more, however it went on, is dropped, and a row's search is over
    when none lives; neither changes the result.

    One beam is greedy decoding, whatever `alpha`; with as many beams as there are hypotheses the
    search is exhaustive. T5X keeps twice as many extensions in a step, so that one that ends takes
    no live one's place: its result may differ, and that of one beam is not greedy decoding.

    No two hypotheses of a row have the same tokens, though they may be the same text. Of extensions
    that are equally probable, those of the better hypothesis come first, then those of the larger
    logit, then those of the lower token id. Of ended hypotheses that score the same, the shorter
    comes first, then one that `eos_id` ends, then one whose last extension came first.

    Args:
      tokens_to_logits: one step of one hypothesis per row, mapped over the hypotheses by
        `jax.vmap`; the first token it is given is 0. A token with a logit of -inf is never taken.
      cache: its state before the first step, of one hypothesis per row.
      batch: number of rows.
      beams: number of hypotheses per row.
      max_length: tokens to decode at most, `eos_id` included.
      eos_id: the token that ends a hypothesis.
      alpha: strength of the length penalty, at least 0, T5X's by default. 0 is none, and the score
        the log probability.
      manner: 'exact', as above, or 'huggingface', as Transformers does with `early_stopping=False`:
        the penalty is n ** alpha; a step takes the best 2 * `beams` extensions, of which those that
        end count if they are among the first `beams`, and the best `beams` others live on; a row is
        over when it has `beams` ended ones and its best live one scores no better than the worst of
        them, by the length that it has.
      cache_axes: which axis of every leaf of `cache` is that of the rows; None for a leaf that is
        the same for all hypotheses of a row: a count of steps, the keys of the encoded inputs. A
        tree like `cache` or a prefix of it, as `in_axes` of `jax.vmap`.
      finished: rows to leave without hypotheses (padding of a batch).

    Returns:
      Tokens int32 [batch, beams, max_length], best first: up to and including `eos_id`, then 0; and
      their scores float32 [batch, beams]. Where a row has fewer hypotheses, the last are 0 and
      score -inf. A row whose logits are not numbers has scores that are none either.

    Raises:
      ValueError: `beams` or `max_length` below 1, a negative or infinite `alpha`; from `jax.vmap`
        when a leaf whose axis is None depends on the tokens.
    """
    _check_positive("max_length", max_length)
    _check_positive("beams", beams)
    check_penalty(alpha, manner)
    theirs = manner == HUGGINGFACE
    # by the number of tokens; in one table, so that no rounding tells two equal penalties apart
    lengths = np.arange(max_length + 1)
    penalties = jnp.asarray(
        (np.maximum(lengths, 1) if theirs else (5 + lengths) / 6) ** alpha, jnp.float32
    )
    kept = 2 * beams if theirs else beams

    def extensions(tokens: Array, cache: Cache) -> tuple[Array, Array, Cache]:
        """[batch] -> log probabilities and tokens [batch, width]: no more can be among the best."""
        logits, cache = tokens_to_logits(tokens, cache)
        logits = logits.astype(jnp.float32)
        largest, tokens = lax.top_k(logits, min(kept, logits.shape[-1]))
        return largest - jax.nn.logsumexp(logits, axis=-1, keepdims=True), tokens, cache

    # the hypotheses are the first axis of what is not shared
    mapped = _map_axes(lambda axis: 0, cache_axes)
    extensions = jax.vmap(extensions, in_axes=(1, mapped), out_axes=(1, 1, mapped))

    def alive(state: _Search) -> Array:
        return (state.step < max_length) & jnp.any(state.log_probs != -jnp.inf)

    def advance(state: _Search) -> _Search:
        log_probs, tokens, cache = extensions(state.tokens, state.cache)
        width = tokens.shape[-1]
        log_probs = (state.log_probs[:, :, None] + log_probs).reshape(batch, -1)
        log_probs, chosen = lax.top_k(log_probs, min(kept, log_probs.shape[-1]))
        tokens = jnp.take_along_axis(tokens.reshape(batch, -1), chosen, axis=1)
        parents = chosen // width
        decoded = jnp.take_along_axis(state.decoded, parents[:, :, None], axis=1)
        decoded = lax.dynamic_update_slice(decoded, tokens[:, :, None], (0, 0, state.step))

        step = state.step + 1
        ends = tokens == eos_id
        if theirs:
            ends |= step == max_length
        first = jnp.arange(log_probs.shape[-1]) < beams
        just_ended = jnp.where(ends & first, log_probs, -jnp.inf) / penalties[step]
        ended, scores = _best(state.ended, state.scores, decoded, just_ended)
        log_probs = jnp.where(ends, -jnp.inf, log_probs)
        if theirs:
            log_probs, chosen = lax.top_k(log_probs, beams)
            tokens, parents = (jnp.take_along_axis(x, chosen, axis=1) for x in (tokens, parents))
            decoded = jnp.take_along_axis(decoded, chosen[:, :, None], axis=1)
            hopeless = log_probs[:, :1] / penalties[step] <= scores[:, -1:]
        else:
            # The most that a live hypothesis can still score is its log probability as it is, over
            # the largest penalty. What is not a number stays, to be seen in the result.
            hopeless = log_probs / penalties[max_length] <= scores[:, -1:]
        log_probs = jnp.where(hopeless, -jnp.inf, log_probs)
        cache = _map_axes(lambda axis, part: _reorder(part, parents, axis), cache_axes, cache)
        return _Search(step, tokens, decoded, log_probs, ended, scores, cache)

    first = jnp.arange(beams) == 0
    if finished is not None:
        first = first & ~finished[:, None]
    nothing = jnp.zeros((batch, beams, max_length), jnp.int32)
    state = _Search(
        step=jnp.int32(0),
        tokens=jnp.full((batch, beams), START_ID, jnp.int32),
        decoded=nothing,
        log_probs=jnp.broadcast_to(jnp.where(first, 0.0, -jnp.inf), (batch, beams)),
        ended=nothing,
        scores=jnp.full((batch, beams), -jnp.inf),
        cache=_map_axes(lambda axis, part: _repeat(part, beams), cache_axes, cache),
    )
    state = lax.while_loop(alive, advance, state)
    cut = state.log_probs / penalties[max_length]
    return _best(state.ended, state.scores, state.decoded, cut)


def _best(
    ended: Array, scores: Array, others: Array, other_scores: Array
) -> tuple[Int[Array, "batch beams length"], Float[Array, "batch beams"]]:
    """The best of two sets of hypotheses, as many as the first has; of equal ones, the earlier."""
    best, chosen = lax.top_k(jnp.concatenate([scores, other_scores], axis=1), scores.shape[1])
    hypotheses = jnp.concatenate([ended, others], axis=1)
    return jnp.take_along_axis(hypotheses, chosen[:, :, None], axis=1), best


def _map_axes(function: Callable[..., Any], axes: Any, *caches: Cache) -> Any:
    """Maps over the axes that are not None, with the part of the cache that each stands for."""

    def apply(axis: int | None, *parts: Cache) -> Any:
        if axis is None:
            return parts[0] if parts else None
        return function(axis, *parts)

    return jax.tree.map(apply, axes, *caches, is_leaf=lambda axis: axis is None)


def _repeat(part: Cache, beams: int) -> Cache:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (beams, *leaf.shape)), part)


def _reorder(part: Cache, parents: Int[Array, "batch beams"], axis: int) -> Cache:
    """Leaves [beams, …, batch, …], the rows on `axis` of what follows the beams, by parent."""
    take = jax.vmap(lambda row, parents: row[parents], (axis + 1, 0), axis + 1)
    return jax.tree.map(lambda leaf: take(leaf, parents), part)


def check_penalty(alpha: float, manner: str) -> None:
    """ValueError unless these are an `alpha` and a `manner` of `beam`."""
    if not (math.isfinite(alpha) and alpha >= 0.0):
        raise ValueError(f"alpha = {alpha!r}: expected a finite number of at least 0")
    if manner not in MANNERS:
        raise ValueError(f"manner = {manner!r}: expected one of {', '.join(map(repr, MANNERS))}")


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """ValueError unless these are options of `sample`."""
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise ValueError(f"temperature = {temperature!r}: expected a finite number above 0")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k = {top_k!r}: expected an integer of at least 0")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p = {top_p!r}: expected a number in (0, 1]")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} = {value!r}: expected a positive integer")
