"""Optimizers from optax, with the schedules that the T5 family is trained with.

The transformation sees the trained parameters only (the adapters; everything in pretraining), so
its state is as small as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flix_jax.adapters.suggest import did_you_mean

OPTIMIZERS = ("adafactor", "adamw", "sgd")
#: Those of which no parameter's update depends on another one, but for the norm that is clipped.
ELEMENTWISE = ("adamw", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "rsqrt")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of the step.

    Attributes:
      kind: ``constant``; ``linear`` or ``cosine`` decay to zero at the run's last step; ``rsqrt``,
        T5's pretraining decay ``learning_rate * sqrt(warmup_steps / max(step, warmup_steps))``.
      learning_rate: the peak.
      warmup_steps: steps of linear warm-up from zero, for every kind.
    """

    kind: str = "constant"
    learning_rate: float = 1e-3
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            near = did_you_mean(self.kind, SCHEDULES)
            raise ValueError(f"Schedule.kind {self.kind!r} is none of {list(SCHEDULES)}; {near}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"Schedule.learning_rate must be positive and finite, got {self.learning_rate}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"Schedule.warmup_steps must be at least 0, got {self.warmup_steps}")

    @property
    def depends_on_total_steps(self) -> bool:
        """Whether a longer run has another learning rate at the same step."""
        return self.kind in ("linear", "cosine")

    def build(
        self, total_steps: int, learning_rate: Any = None
    ) -> Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]:
        """The optax schedule of a run of ``total_steps`` steps.

        Args:
          total_steps: of the run.
          learning_rate: the peak in place of the schedule's own; it may be traced.

        Raises:
          ValueError: the warm-up outlasts the run.
        """
        peak = self.learning_rate if learning_rate is None else learning_rate
        warmup = self.warmup_steps
        if warmup >= total_steps:
            raise ValueError(
                f"Schedule.warmup_steps {warmup} is not below the run's total_steps {total_steps}"
            )
        if self.kind == "constant":
            decay: optax.Schedule = optax.constant_schedule(peak)
        elif self.kind == "linear":
            decay = optax.linear_schedule(peak, 0.0, total_steps - warmup)
        elif self.kind == "cosine":
            decay = optax.cosine_decay_schedule(peak, total_steps - warmup)
        else:
            offset = max(warmup, 1)

            def decay(step: jax.typing.ArrayLike) -> jax.Array:
                return peak * (offset / (offset + jax.numpy.maximum(step, 0))) ** 0.5

        if not warmup:
            return decay
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax optimizer over the trained parameters.

    Attributes:
      name: ``adafactor`` (T5's; factored second moments, no momentum), ``adamw`` or ``sgd``.
      schedule: the learning rate.
      weight_decay: decoupled, times the learning rate, for every optimizer.
      clip_norm: global norm to which gradients are clipped; None leaves them.
      b1, b2, eps: AdamW's.
      multiply_by_parameter_scale: Adafactor's relative step sizes (T5's choice in pretraining). A
        low-rank ``b`` starts at zero, so that its steps are then tiny at first.
      lazy: whether a step updates the features that its batch has and no others, which then cost
        nothing but their memory: neither moments nor weight decay of the others go on (see
        `training.lazy`). Of adapters, with an optimizer that works element by element.
    """

    name: str = "adamw"
    schedule: Schedule = Schedule()
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    multiply_by_parameter_scale: bool = False
    lazy: bool = False

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            near = did_you_mean(self.name, OPTIMIZERS)
            raise ValueError(f"Optimizer.name {self.name!r} is none of {list(OPTIMIZERS)}; {near}")
        if self.lazy not in (True, False):
            raise ValueError(f"Optimizer.lazy = {self.lazy!r}: expected True or False")
        if self.lazy and self.name not in ELEMENTWISE:
            raise ValueError(
                f"Optimizer.lazy = True: {self.name} takes sizes of whole arrays, the features "
                f"that a batch has not among them; expected Optimizer.name one of {ELEMENTWISE} "
                "(in gin, a base that is a run may need base/Optimizer.lazy = False)"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"Optimizer.weight_decay must be >= 0, got {self.weight_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"Optimizer.clip_norm must be positive or None, got {self.clip_norm}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"Optimizer.eps must be positive, got {self.eps}")

    def build(self, total_steps: int, learning_rate: Any = None) -> optax.GradientTransformation:
        """The transformation of a run; ``total_steps`` and ``learning_rate`` as in Schedule."""
        parts = []
        if self.clip_norm is not None:
            parts.append(optax.clip_by_global_norm(self.clip_norm))
        if self.name == "adafactor":
            parts += [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
            if self.multiply_by_parameter_scale:
                parts.append(optax.scale_by_param_block_rms())
        elif self.name == "adamw":
            parts.append(optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps))
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay))
        schedule = self.schedule.build(total_steps, learning_rate)
        parts.append(optax.scale_by_learning_rate(schedule))
        return optax.chain(*parts)


def masked(optimizer: optax.GradientTransformation, mask: Any) -> optax.GradientTransformation:
    """The optimizer where a mask is true; elsewhere parameters keep their bits.

    Gradients are masked before the optimizer sees them, so that it clips by the norm of what is
    trained and its moments elsewhere stay zero; updates are masked after it, for weight decay. What
    is added elsewhere is -0.0, which changes neither zero (a device that rounds numbers below 1e-38
    to zero may do so). Adafactor's sizes that are of a whole array (its clipping, the scale of the
    parameters) count the others as they are.

    Args:
      optimizer: of all parameters; its state is the state.
      mask: a tree of the parameters' structure with bools that broadcast against them.
    """

    def only(tree: Any, other: float) -> Any:
        return jax.tree.map(
            lambda leaf, where: jnp.where(where, leaf, jnp.asarray(other, leaf.dtype)), tree, mask
        )

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(only(grads, 0.0), state, params)
        return only(updates, -0.0), state

    return optax.GradientTransformation(optimizer.init, update)
