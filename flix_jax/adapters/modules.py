"""The adapter as a linen module: the parameters of the banks around `low_rank.delta`."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flix_jax.adapters import coefficients, fusion, low_rank, merged
from flix_jax.adapters.activation import ActiveFeatures
from flix_jax.adapters.features import FeatureSpace, FeatureType

#: What a tree calls the tables made of its banks (`tables`): no names of feature types.
ALL, ROWS, MERGED, COPIES = "(all)", "(rows)", "(merged)", "(copies)"
#: Between the names of siblings, layers that read the same input, in that of their common `a`.
_AND = "+"


def _init_a(feature_type: FeatureType, d_in: int):
    """A ~ N(0, 1 / d_in), with the columns beyond a value's rank at zero."""
    inside = feature_type.scales() > 0  # [values, rank]

    def init(rng: Array, shape: tuple[int, ...], dtype) -> Array:
        normal = jax.random.normal(rng, shape, dtype) * (d_in**-0.5)
        return jnp.where(inside[:, None, :], normal, jnp.zeros((), dtype))

    return init


def _init_matrix(feature_type: FeatureType):
    """M ~ N(0, 1 / rank of the value), zero beyond that rank on either side."""
    inside = feature_type.scales() > 0
    both = inside[:, :, None] & inside[:, None, :]
    deviations = np.asarray(feature_type.value_ranks, np.float32) ** -0.5

    def init(rng: Array, shape: tuple[int, ...], dtype) -> Array:
        normal = jax.random.normal(rng, shape, dtype) * deviations[:, None, None].astype(dtype)
        return jnp.where(both, normal, jnp.zeros((), dtype))

    return init


class FeatureBank(nn.Module):
    """The matrices of every value of one type: a [values, d_in, rank] and b [values, rank, d_out].

    A value whose rank is below the type's largest has the columns of `a` beyond its rank at zero,
    and they stay there: their coefficient is zero, so they get no gradient. So it is with the
    `query`, `key` and `value` [values, rank, rank] of a fusion that is an attention (`attends`).
    """

    feature_type: FeatureType
    param_dtype: DTypeLike = jnp.float32
    attends: bool = False

    @nn.compact
    def __call__(self, d_in: int, d_out: int) -> tuple[low_rank.Bank, dict[str, Array]]:
        """(a and b, the matrices of an attention by name: none without one)."""
        t = self.feature_type
        shape_a = (t.num_values, d_in, t.max_rank)
        shape_b = (t.num_values, t.max_rank, d_out)
        a = self.param("a", _init_a(t, d_in), shape_a, self.param_dtype)
        b = self.param("b", nn.initializers.zeros_init(), shape_b, self.param_dtype)
        matrices = {
            name: self.param(
                name, _init_matrix(t), (t.num_values, t.max_rank, t.max_rank), self.param_dtype
            )
            for name in (fusion.MATRICES if self.attends else ())
        }
        return (a, b), matrices


def common_leaf(siblings: Sequence[str]) -> str:
    """What the `a` of several layers' tables, one beside the other, is called: 'query+key+value'.

    It is among the leaves of the first.
    """
    return _AND.join(siblings)


class LowRankDelta(nn.Module):
    """The update that a batch's features add to one dense layer; zero at the start (B = 0).

    Attributes:
      space: the feature space; its values must be known.
      alpha: scale alpha / rank of each value; None means 1.
      dropout: rate of dropout on the adapter's input (LoRA's own); draws from the 'dropout' rng.
      param_dtype: dtype of the banks.
      function: φ of a fused layer (`fusion.Fusion.function`); None is a plain one.

    Parameters: `<type>/a [values, d_in, rank]`, `<type>/b [values, rank, d_out]`, and of a φ that
    is an attention `<type>/{query,key,value} [values, rank, rank]`. Or the tables
    that were made of the banks, where nothing is fused.
    """

    space: FeatureSpace
    alpha: float | None = None
    dropout: float = 0.0
    param_dtype: DTypeLike = jnp.float32
    function: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *positions d_in"],
        d_out: int,
        active: ActiveFeatures,
        *,
        deterministic: bool = True,
        source: Float[Array, "batch source_length d_in"] | None = None,
        alignment: fusion.Alignment | None = None,
        narrow: Float[Array, "groups length R"] | None = None,
    ) -> Float[Array, "batch *positions d_out"]:
        """The update in x's dtype; ValueError where `active` is not of x's batch.

        Of a fused layer, `source` are the states that its φ reads, and `alignment` says beside
        which position; without them its adapter is plain. Of a layer with siblings, `narrow` is its
        part of what `narrowed` gave.
        """
        attends = self.function is not None and self.function not in fusion.POINTWISE
        table = self._table()
        banks, matrices = {}, {}
        for t in self.space.types if table is None else ():
            bank = FeatureBank(t, self.param_dtype, attends, name=t.name)
            banks[t.name], matrices[t.name] = bank(x.shape[-1], d_out)
        if self.dropout and not deterministic and not self.is_initializing():
            assert narrow is None
            if not self.has_rng("dropout"):
                raise ValueError(
                    f"dropout {self.dropout} on the adapter's input needs a 'dropout' rng, and the "
                    "layer has none (apply's rngs; under nn.scan, its split_rngs)"
                )
            x = nn.Dropout(self.dropout, deterministic=False)(x)
            if source is not None:  # drawn by itself, as published
                source = nn.Dropout(self.dropout, deterministic=False)(source)
        meet = None
        if self.function is not None and source is not None:
            assert alignment is not None
            meet = fusion.meeting(
                self.function, source.astype(x.dtype), alignment, matrices, active, self.space
            )
        return low_rank.delta(
            x, table or banks, active, self.space, alpha=self.alpha, meet=meet, narrow=narrow
        )

    def merged(
        self, layer: merged.Layer, params: merged.Params, x: Array, active: ActiveFeatures
    ) -> Array:
        """What a dense layer gives with the update in its kernel, by a table MERGED.

        Args:
          layer, params, x: as in `merged.product`.
          active: as in the call.

        Raises:
          ValueError: `active` is not of x's batch.
        """
        table = self._table()
        assert table is not None
        active.check_rows(x)
        c = coefficients.of_table(self.space, active, self.alpha, every=False)
        return merged.product(layer, params, x, table, c)

    def narrowed(self, x: Float[Array, "batch *positions d_in"]) -> dict[str, Array]:
        """x A of this layer and its siblings, by their names; none where they are not with it."""
        made, copies = self._leaves()
        for leaf in made:
            names = leaf.split(_AND)
            if len(names) > 1:
                together = low_rank.narrowed(x, made[leaf], copies.get(leaf))
                return dict(zip(names, jnp.split(together, len(names), axis=-1), strict=True))
        return {}

    @property
    def has_siblings(self) -> bool:
        """Whether `a` is with those of other layers, in the first of them."""
        made, _ = self._leaves()
        return bool(made) and "a" not in made

    def _table(self) -> low_rank.Table | None:
        """The table that was made of the banks; None where there is none."""
        made, copies = self._leaves()
        if not made:
            return None
        both = (copies.get("a"), copies["b"]) if copies else None
        return low_rank.Table(made.get("a"), made["b"], both)

    def _leaves(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """The leaves of the table that was made of the banks and of its copies, if there are."""
        of: list[Any] = [self.get_variable("params", name) for name in (ALL, ROWS, MERGED)]
        copies: Any = self.get_variable("params", COPIES)
        return dict(next(filter(None, of), {})), dict(copies or {})
