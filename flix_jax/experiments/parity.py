"""What rounding does to a run: loss and gradient of one batch, beside those of float32.

How far they may be apart. Rounding a product's operands changes it by a relative error e, in random
directions: 2^-8 of bfloat16 (8 bits), 2^-11 of float16, 2^-7 of int8, whose steps are 1/127 of the
largest weight of a channel. Errors of the products that follow one another add up as a random walk,
to e * sqrt(products). The loss may be off by that much, of itself or of one nat, whichever is more;
the norm of the gradient, which passes all products twice, by twice as much. Rounding stays far
below (errors of single tokens have either sign, and cancel in the mean); a wrong scale, an overflow
or another base's weights do not.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flix_jax.data.pipeline import TrainPipeline
from flix_jax.experiments.job import Job
from flix_jax.models.int8 import INT8
from flix_jax.models.t5 import Transformer
from flix_jax.training import partitioning
from flix_jax.training.step import TrainState, gradient_sums

_ERRORS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, INT8: 2.0**-7, "float32": 2.0**-24}
# Dense layers that one after another stand between input and output of a layer.
_ENCODER_PRODUCTS, _DECODER_PRODUCTS = 4, 6


@dataclasses.dataclass(frozen=True)
class Parity:
    """Loss and norm of the gradient of one batch, without dropout.

    Attributes:
      dtypes: what the run computes in.
      loss, norm: in these.
      exact_loss, exact_norm: in float32.
      bound: of the difference of the losses, relative to a loss that is at least 1.
    """

    dtypes: str
    loss: float
    norm: float
    exact_loss: float
    exact_norm: float
    bound: float

    @property
    def loss_difference(self) -> float:
        return (self.loss - self.exact_loss) / max(1.0, abs(self.exact_loss))

    @property
    def norm_difference(self) -> float:
        return (self.norm - self.exact_norm) / self.exact_norm if self.exact_norm else self.norm

    def line(self) -> str:
        """Both, and the differences."""
        return (
            f"parity of {self.dtypes} with float32: loss {self.loss:.6f}, {self.exact_loss:.6f} "
            f"({self.loss_difference:+.3%}); gradient norm {self.norm:.6f}, {self.exact_norm:.6f} "
            f"({self.norm_difference:+.3%})"
        )

    def check(self) -> None:
        """Raises ValueError where rounding does not explain the difference."""
        for name, difference, bound in (
            ("loss", self.loss_difference, self.bound),
            ("gradient norm", self.norm_difference, 2 * self.bound),
        ):
            if not abs(difference) <= bound:  # nor what is not a number
                raise ValueError(
                    f"{self.line()}: rounding explains at most {bound:.2%} of the {name}; expected "
                    "T5Config.dtype, T5Config.product_dtype and Run.frozen_dtype that the network "
                    "bears, such as 'float32'"
                )


def measure(job: Job, state: TrainState, frozen: Any, pipeline: TrainPipeline) -> Parity:
    """Compares loss and gradient of the next step's batch, with the base read again for float32.

    Args:
      job: of the run.
      state: of which the trained parameters are.
      frozen: as the run keeps them.
      pipeline: the training examples.
    """
    run, parameters = job.run, job.parameters
    batch = partitioning.put_batch(
        job.mesh, pipeline.batch_at(int(state.step)), pipeline.global_batch_size
    )

    def found(loss_fn: Any, frozen: Any, **how: Any) -> tuple[float, float]:
        sums_of = gradient_sums(
            loss_fn, microbatches=run.microbatches, rows_together=job.rows_together, **how
        )

        @jax.jit
        def program(trained: Any, frozen: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
            gradients, sums = sums_of(parameters.in_use(trained), frozen, batch, None)
            tokens = jnp.maximum(sums["weight"], 1.0)
            return sums["loss"] / tokens, optax.tree.norm(gradients) / tokens

        loss, norm = jax.device_get(program(state.trained, frozen, batch))
        return float(loss), float(norm)

    exact = copy.copy(job)
    exact.run = dataclasses.replace(run, frozen_dtype=None)
    whole = dataclasses.replace(run.model, dtype="float32", product_dtype="float32")
    model = dataclasses.replace(job.model, module=Transformer(whole))
    loss, norm = found(job.model.loss, frozen, tables=parameters.tables)
    base = exact.load_base()
    exact_loss, exact_norm = found(model.loss, exact.frozen_parameters(base))
    dtypes = {run.model.dtype, run.model.product_dtype or run.model.dtype}
    dtypes |= {run.frozen_dtype or "float32"}
    told = ", ".join(sorted(dtypes - {"float32"}, key=lambda name: _ERRORS[name])) or "float32"
    return Parity(told, loss, norm, exact_loss, exact_norm, bound(job, dtypes))


def bound(job: Job, dtypes: set[str]) -> float:
    """How far rounding may bring the loss from float32's; see the module."""
    model = job.run.model
    products = (
        _ENCODER_PRODUCTS * model.num_encoder_layers
        + _DECODER_PRODUCTS * model.num_decoder_layers
        + 1
    )
    return math.sqrt(products) * math.hypot(*(_ERRORS[name] for name in dtypes))
