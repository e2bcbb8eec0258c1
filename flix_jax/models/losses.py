"""Token cross-entropy with label smoothing and z-loss, summed over tokens, as T5X defines it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cross_entropy(
    logits: Float[Array, "*tokens vocab"],
    targets: Int[Array, "*tokens"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
    """Loss of every token, in nats, and the part of it that is z-loss.

    The target distribution gives 1 - label_smoothing to the target and shares the rest among the
    other tokens; its entropy is subtracted, so that predicting it exactly costs nothing. The z-loss
    is z_loss * log(Z)^2, with Z the softmax's normaliser. As in T5X, the second output has no
    gradient: it is for logging.

    Args:
      logits: float32 [..., vocab].
      targets: integers [...], below vocab.
      label_smoothing: in [0, 1).
      z_loss: coefficient, at least 0.

    Returns:
      (loss including z-loss, z-loss), float32 [...] each.
    """
    loss, z, _ = _forward(logits, targets, label_smoothing, z_loss)
    return loss, z


def _smoothed(label_smoothing: float, vocab: int) -> tuple[float, float, float]:
    """Probability of the target, of each other token, and the entropy of that distribution."""
    confidence = 1.0 - label_smoothing
    low = label_smoothing / max(vocab - 1, 1)
    entropy = -confidence * math.log(confidence) - (vocab - 1) * low * math.log(low + 1e-20)
    return confidence, low, entropy


def _is_target(logits: Array, targets: Array) -> Array:
    # A comparison rather than a gather: it fuses into the sums over the vocabulary, and stays local
    # where the vocabulary is sharded.
    vocab = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    return targets[..., None] == vocab


def _forward(
    logits: Array, targets: Array, label_smoothing: float, z_loss: float
) -> tuple[Array, Array, Array]:
    confidence, low, entropy = _smoothed(label_smoothing, logits.shape[-1])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_target = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
    if label_smoothing == 0.0:
        expected_logit = at_target
    else:
        expected_logit = (confidence - low) * at_target + low * jnp.sum(logits, axis=-1)
    z = z_loss * jnp.square(log_z)
    return log_z - expected_logit - entropy + z, z, log_z


def _vjp_forward(logits, targets, label_smoothing, z_loss):
    loss, z, log_z = _forward(logits, targets, label_smoothing, z_loss)
    # Nothing of the vocabulary's size is kept beside the logits themselves.
    return (loss, z), (logits, targets, log_z)


def _vjp_backward(label_smoothing, z_loss, residuals, gradients):
    logits, targets, log_z = residuals
    confidence, low, _ = _smoothed(label_smoothing, logits.shape[-1])
    scale = (1.0 + 2.0 * z_loss * log_z)[..., None]
    probabilities = jnp.exp(logits - log_z[..., None])
    wanted = jnp.where(_is_target(logits, targets), confidence, low)
    gradient = gradients[0][..., None] * (scale * probabilities - wanted)
    return gradient.astype(logits.dtype), None


cross_entropy.defvjp(_vjp_forward, _vjp_backward)


def weighted_sums(
    logits: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    weights: Num[Array, "batch length"] | Bool[Array, "batch length"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted sums over all tokens, float32: what a mean over any set of devices is made of.

    Returns:
      (total loss, {'loss': the same, 'z_loss': its z-loss, 'weight': sum of the weights,
      'correct': weight of the tokens whose logit is the largest}).
    """
    weights = weights.astype(jnp.float32)
    logits = logits.astype(jnp.float32)
    token_loss, token_z = cross_entropy(logits, targets, label_smoothing, z_loss)
    total = jnp.sum(token_loss * weights)
    # Like the loss, by sums over the vocabulary: an argmax would read the logits once more.
    at_target = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
    correct = at_target >= jnp.max(logits, axis=-1)
    metrics = {
        "loss": total,
        "z_loss": jnp.sum(token_z * weights),
        "weight": jnp.sum(weights),
        "correct": jnp.sum(correct * weights),
    }
    return total, metrics


def chunked_sums(
    head: Callable[[Any, Array], Array],
    params: Any,
    states: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    weights: Num[Array, "batch length"] | Bool[Array, "batch length"],
    *,
    chunks: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`weighted_sums` of the logits of states, only a part of which is in memory at a time.

    The length is cut into chunks, whose logits are made one after another. Where the loss is
    differentiated, a chunk's gradient with respect to its states is formed beside its loss, while
    its logits are there: they are neither kept nor made again. Parameters of the head get theirs
    the same way, if they are differentiated at all. The metrics have no gradient.

    Args:
      head: (params, states [batch, any length, embed]) -> float32 logits.
      params: of the head.
      states, targets, weights: of all tokens.
      chunks: a divisor of the length.
      label_smoothing, z_loss: as in `cross_entropy`.

    Raises:
      ValueError: the chunks do not divide the length.
    """
    if chunks < 1 or states.shape[1] % chunks:
        raise ValueError(f"{chunks} chunks do not divide a length of {states.shape[1]} tokens")
    return _chunked(head, chunks, label_smoothing, z_loss, params, states, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _chunked(head, chunks, label_smoothing, z_loss, params, states, targets, weights):
    loss = _loss_of_part(head, label_smoothing, z_loss)
    tokens = states, targets, weights

    def turn(sums, chunk):
        return jax.tree.map(jnp.add, sums, loss(params, *_part(tokens, chunk, chunks))), None

    return jax.lax.scan(turn, _no_sums(), jnp.arange(chunks))[0]


def _chunked_forward(head, chunks, label_smoothing, z_loss, params, states, targets, weights):
    # Each argument's leaves say whether they are differentiated.
    differentiated = any(leaf.perturbed for leaf in jax.tree.leaves(params, is_leaf=_is_primal))
    params, states, targets, weights = jax.tree.map(
        lambda leaf: leaf.value, (params, states, targets, weights), is_leaf=_is_primal
    )
    loss = _loss_of_part(head, label_smoothing, z_loss)
    gradients = jax.value_and_grad(loss, argnums=(1, 0) if differentiated else (1,), has_aux=True)

    tokens = states, targets, weights

    def turn(carry, chunk):
        sums, of_params, of_states = carry
        found, (of_part, *more) = gradients(params, *_part(tokens, chunk, chunks))
        if differentiated:
            of_params = jax.tree.map(jnp.add, of_params, more[0])
        offset = chunk * of_part.shape[1]
        of_states = jax.lax.dynamic_update_slice_in_dim(of_states, of_part, offset, axis=1)
        return (jax.tree.map(jnp.add, sums, found), of_params, of_states), None

    nothing = jax.tree.map(jnp.zeros_like, params) if differentiated else None
    initial = _no_sums(), nothing, jnp.zeros_like(states)
    (sums, of_params, of_states), _ = jax.lax.scan(turn, initial, jnp.arange(chunks))
    return sums, (of_states, of_params)


def _chunked_backward(head, chunks, label_smoothing, z_loss, gradients, cotangents):
    total = cotangents[0]
    if isinstance(total, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    of_states, of_params = jax.tree.map(lambda x: (total * x).astype(x.dtype), gradients)
    return of_params, of_states, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _loss_of_part(head, label_smoothing: float, z_loss: float):
    def loss(params, states, targets, weights):
        logits = head(params, states)
        return weighted_sums(
            logits, targets, weights, label_smoothing=label_smoothing, z_loss=z_loss
        )

    return loss


def _no_sums():
    zero = jnp.zeros((), jnp.float32)
    return zero, dict.fromkeys(("loss", "z_loss", "weight", "correct"), zero)


def _part(tokens: tuple[Array, ...], chunk: Array, chunks: int) -> list[Array]:
    """Each [batch, length, …] -> its chunk [batch, length / chunks, …].

    Taken where it lies: a scan over chunks would have them copied side by side first.
    """
    size = tokens[0].shape[1] // chunks
    return [jax.lax.dynamic_slice_in_dim(x, chunk * size, size, axis=1) for x in tokens]
