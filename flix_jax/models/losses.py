"""Token cross-entropy with label smoothing and z-loss, summed over tokens, as T5X defines it."""

import functools
import math

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
    correct = jnp.argmax(logits, axis=-1) == targets
    metrics = {
        "loss": total,
        "z_loss": jnp.sum(token_z * weights),
        "weight": jnp.sum(weights),
        "correct": jnp.sum(correct * weights),
    }
    return total, metrics
