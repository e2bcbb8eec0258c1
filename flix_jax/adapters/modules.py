"""The adapter as a linen module: the parameters of the banks around `low_rank.delta`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flix_jax.adapters import low_rank
from flix_jax.adapters.activation import ActiveFeatures
from flix_jax.adapters.features import FeatureSpace, FeatureType


def _init_a(feature_type: FeatureType, d_in: int):
    """A ~ N(0, 1 / d_in), with the columns beyond a value's rank at zero."""
    inside = feature_type.scales() > 0  # [values, rank]

    def init(rng: Array, shape: tuple[int, ...], dtype) -> Array:
        normal = jax.random.normal(rng, shape, dtype) * (d_in**-0.5)
        return jnp.where(inside[:, None, :], normal, jnp.zeros((), dtype))

    return init


class FeatureBank(nn.Module):
    """The matrices of every value of one type: a [values, d_in, rank] and b [values, rank, d_out].

    A value whose rank is below the type's largest has the columns of `a` beyond its rank at zero,
    and they stay there: their coefficient is zero, so they get no gradient.
    """

    feature_type: FeatureType
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, d_in: int, d_out: int) -> low_rank.Bank:
        t = self.feature_type
        shape_a = (t.num_values, d_in, t.max_rank)
        shape_b = (t.num_values, t.max_rank, d_out)
        a = self.param("a", _init_a(t, d_in), shape_a, self.param_dtype)
        b = self.param("b", nn.initializers.zeros_init(), shape_b, self.param_dtype)
        return a, b


class LowRankDelta(nn.Module):
    """The update that a batch's features add to one dense layer; zero at the start (B = 0).

    Attributes:
      space: the feature space; its values must be known.
      alpha: scale alpha / rank of each value; None means 1.
      dropout: rate of dropout on the adapter's input (LoRA's own); draws from the 'dropout' rng.
      param_dtype: dtype of the banks.

    Parameters: `<type>/a [values, d_in, rank]`, `<type>/b [values, rank, d_out]`.
    """

    space: FeatureSpace
    alpha: float | None = None
    dropout: float = 0.0
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *positions d_in"],
        d_out: int,
        active: ActiveFeatures,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch *positions d_out"]:
        """The update in x's dtype; ValueError where `active` is not of x's batch."""
        banks = {
            t.name: FeatureBank(t, self.param_dtype, name=t.name)(x.shape[-1], d_out)
            for t in self.space.types
        }
        if self.dropout and not deterministic and not self.is_initializing():
            if not self.has_rng("dropout"):
                raise ValueError(
                    f"dropout {self.dropout} on the adapter's input needs a 'dropout' rng, and the "
                    "layer has none (apply's rngs; under nn.scan, its split_rngs)"
                )
            x = nn.Dropout(self.dropout, deterministic=False)(x)
        return low_rank.delta(x, banks, active, self.space, alpha=self.alpha)
