"""Numbers that are not finite: a training step that must not be gone on from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flix_jax.adapters.tree import leaves_by_name
from flix_jax.training.step import TrainState

# What is looked at of a step's metrics, and how it is called.
_LOOKED_AT = {"loss": "the loss", "grad_norm": "the norm of the gradient"}


class NotFinite(FloatingPointError):
    """A step's loss, gradient or result is not finite. Says which, and the step.

    Attributes:
      step: the step, from 1.
      in_state: whether it is what the step left, its loss and gradient being finite. Then an
        earlier step since the last checkpoint may have left it.
    """

    def __init__(self, message: str, step: int, *, in_state: bool = False) -> None:
        super().__init__(message)
        self.step, self.in_state = step, in_state


def found_in(metrics: Mapping[str, float]) -> str | None:
    """What of a step's metrics is not finite, ``'the loss is nan'``; None if all is."""
    for name, called in _LOOKED_AT.items():
        if not math.isfinite(metrics.get(name, 0.0)):
            return f"{called} is {metrics[name]}"
    return None


def first_array(state: TrainState) -> str | None:
    """The path of the first array of a state that is not finite; None if all are.

    One pass over the state, on the devices.
    """
    named = [
        (name, leaf)
        for name, leaf in leaves_by_name({"trained": state.trained, "optimizer": state.opt_state})
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    sound = jax.device_get(_all_finite([leaf for _, leaf in named])) if named else ()
    return next((name for (name, _), fine in zip(named, sound, strict=True) if not fine), None)


def check_state(state: TrainState) -> None:
    """Raises NotFinite where a step has left what no step can go on from."""
    name = first_array(state)
    if name is not None:
        step = int(state.step)
        raise NotFinite(f"{name} is not finite after step {step}", step, in_state=True)


@jax.jit
def _all_finite(leaves: list[Any]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]
