"""Loss and prediction of an encoder-decoder, with or without adapters.

The one place where adapters meet a network: `EncoderDecoder` enters the injection around each call
of the module, inside whatever is being traced. The module is any linen encoder-decoder with T5X's
calling interface (`__call__`, `encode`, `decode`), T5X's own networks among them.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flix_jax.adapters.activation import ActiveFeatures, FeatureSettings, activate
from flix_jax.adapters.fusion import Source
from flix_jax.adapters.ids import ABSENT
from flix_jax.adapters.injection import AdapterSpec, inject
from flix_jax.adapters.source import SOURCE_INPUTS, SOURCE_STATES, projection, read
from flix_jax.models import decoding, losses
from flix_jax.models.dropout import EXAMPLE_NUMBERS, by_example

Batch = Mapping[str, Array]
Params = Any

_SEGMENTS = ("encoder_segment_ids", "decoder_segment_ids")
_PACKING = (*_SEGMENTS, "encoder_positions", "decoder_positions")
#: Layers whose input has the encoder's positions, by T5X's names; those of others the decoder's.
_READS_INPUTS = re.compile(r"encoder/|.*/encoder_decoder_attention/(key|value)$")
_OUTPUT = "decoder/logits_dense"
_FLOAT_INPUTS = ("decoder_loss_weights", "feature_weights", SOURCE_STATES)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where activations lie on a mesh.

    Attributes:
      mesh: of the devices.
      rules: logical name of an activation's axis -> mesh axes, as `flax.linen.logical_axis_rules`.
    """

    mesh: jax.sharding.AbstractMesh
    rules: tuple[tuple[str, str | tuple[str, ...] | None], ...]


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """An encoder-decoder, its adapters, its loss and its decoding. Hashable: a static argument.

    A batch has `encoder_input_tokens` [batch, input_length], `decoder_input_tokens`,
    `decoder_target_tokens` [batch, length] (int32, 0 is padding), optionally
    `decoder_loss_weights` [batch, length] (default: 1 on every target token) and T5X's
    `*_segment_ids` and `*_positions`, and `example_numbers` int32 [batch], by which each row's
    dropout is drawn (default: its place); with adapters also `feature_ids` int32 [batch, slots] and
    optionally `feature_weights` of the same shape. In packed rows both may be [batch, examples,
    slots]: example e of a row is the one whose segment is e + 1. With a fusion
    `source_input_tokens` int32 [batch, source_length] (0 is padding, and a row of zeros has no
    source), in packed rows with `source_segment_ids`; or states of a source (see
    `adapters.source.read`).

    Attributes:
      module: the network.
      adapters: what is injected into it; None for the network alone.
      label_smoothing, z_loss: of the loss (see losses.cross_entropy).
      eos_id: the token that ends a decoded sequence.
      members: with more than one, an ensemble: `feature_ids` are [batch, members], each row is
        decoded with one id at a time, and every token is taken by the mean of the logits of the
        ids that are present (of the network alone where none is). For `predict` only.
      loss_chunks: parts of the length whose logits `loss` makes one after another, so that they
        never stand whole; needs a module that tells its output layer apart, as `models.t5` does.
      layout: where the activations lie; None leaves it to the compiler.
      rows_per_cell: in training, how many consecutive rows have equal `feature_ids` and
        `feature_weights`, and the same of them dropped.
      rows_together: how many of those an adapter computes as one, a divisor of them.
      settings: dropout rates and scales in place of the feature space's own, to be set within a
        trace: arrays, so they are no part of what a model is equal by.
    """

    module: nn.Module
    adapters: AdapterSpec | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    eos_id: int = 1
    members: int = 1
    loss_chunks: int = 1
    layout: Layout | None = None
    rows_per_cell: int = 1
    rows_together: int = 1
    settings: FeatureSettings | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"EncoderDecoder.label_smoothing = {self.label_smoothing!r}: expected [0, 1)"
            )
        if self.z_loss < 0.0:
            raise ValueError(f"EncoderDecoder.z_loss = {self.z_loss!r}: expected at least 0")
        if self.loss_chunks < 1:
            raise ValueError(f"EncoderDecoder.loss_chunks = {self.loss_chunks!r}: expected >= 1")
        if self.loss_chunks > 1 and not hasattr(self.module, "output_layer"):
            raise ValueError(
                f"EncoderDecoder.loss_chunks = {self.loss_chunks!r}: "
                f"{type(self.module).__name__} does not tell its output layer apart"
            )
        if self.loss_chunks > 1 and self.adapters and self.adapters.matching(_OUTPUT):
            raise ValueError(
                f"EncoderDecoder.loss_chunks = {self.loss_chunks!r}: adapters of {_OUTPUT} need "
                "its logits whole"
            )
        if self.rows_together < 1 or self.rows_per_cell % self.rows_together:
            raise ValueError(
                f"EncoderDecoder.rows_together = {self.rows_together!r}: expected a divisor of "
                f"EncoderDecoder.rows_per_cell = {self.rows_per_cell!r}"
            )
        if self.members < 1:
            raise ValueError(f"EncoderDecoder.members = {self.members!r}: expected at least 1")
        if self.members > 1 and (self.adapters is None or self.adapters.space.num_slots != 1):
            raise ValueError(
                f"EncoderDecoder.members = {self.members!r}: expected adapters of one slot"
            )

    def init(self, rng: Array, batch_shapes: Mapping[str, tuple[int, ...]]) -> Params:
        """Initial parameters of network and adapters, boxed with their logical axes.

        Args:
          rng: the key; the same key gives the network the same parameters whatever the adapters.
          batch_shapes: shape of each entry of a batch; the parameters do not depend on its batch
            size or lengths.
        """
        batch = {
            name: jnp.zeros(shape, jnp.float32 if name in _FLOAT_INPUTS else jnp.int32)
            for name, shape in batch_shapes.items()
        }
        check_tokens(batch)
        apart = dataclasses.replace(self, layout=None)  # parameters' own axes have those names, too
        with apart._injected(self._active(batch, None), deterministic=True, batch=batch):
            variables = self.module.init({"params": rng}, **_inputs(batch), enable_dropout=False)
        params = variables["params"]
        if self.adapters is not None and self.adapters.fusion is not None:
            own = projection(self.adapters, params, jax.random.fold_in(rng, 1))
            params = {**params, **own}
            jax.eval_shape(apart._check_source, params, batch)
        return params

    def _check_source(self, params: Params, batch: Batch) -> None:
        """ValueError where the fused layers cannot read a source, whatever it is."""
        assert self.adapters is not None and self.adapters.fusion is not None
        tokens, width = batch["encoder_input_tokens"], self.adapters.fusion.source_width or 1
        given = dict.fromkeys(SOURCE_INPUTS, tokens)
        batch = {**batch, **given, SOURCE_STATES: jnp.zeros((*tokens.shape, width))}
        active, source = self._active(batch, None), self._source(params, batch)
        with self._injected(active, source, deterministic=True):
            self._apply(_variables(params, source), **_inputs(batch), enable_dropout=False)

    def logits(
        self, params: Params, batch: Batch, *, rng: Array | None = None
    ) -> Float[Array, "batch length vocab"]:
        """Float32 logits of the targets; `rng` switches dropout on, of features and network."""
        check_tokens(batch)
        return self._call(params, batch, rng)

    def _call(self, params: Params, batch: Batch, rng: Array | None, **options: Any) -> Array:
        feature_rng, dropout_rng = (None, None) if rng is None else jax.random.split(rng)
        numbers = batch.get(EXAMPLE_NUMBERS)
        if numbers is None:
            numbers = jnp.arange(batch["encoder_input_tokens"].shape[0])
        drawn = numbers // self.rows_per_cell if self.rows_per_cell > 1 else numbers
        active = self._active(batch, feature_rng, drawn, self.rows_together)
        source = self._source(params, batch)
        injected = self._injected(active, source, deterministic=rng is None, batch=batch)
        with by_example(numbers), injected:
            return self._apply(
                _variables(params, source),
                **_inputs(batch),
                enable_dropout=rng is not None,
                rngs=None if dropout_rng is None else {"dropout": dropout_rng},
                **options,
            )

    def loss(
        self, params: Params, batch: Batch, *, rng: Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Loss summed over the batch's target tokens, and sums for the metrics.

        Args:
          params: parameters of network and adapters, boxed or not.
          batch: see the class.
          rng: key of all dropout; None for none, as in evaluation.

        Returns:
          (total loss, {'loss', 'z_loss', 'weight', 'correct'}), float32 scalars, none of them
          divided by the weight.

        Raises:
          ValueError: when traced with arrays that are missing or whose shapes disagree.
        """
        check_tokens(batch)
        targets = batch["decoder_target_tokens"]
        weights = batch.get("decoder_loss_weights")
        if weights is None:
            weights = (targets > 0).astype(jnp.float32)
        smoothing = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        if self.loss_chunks == 1:
            logits = self.logits(params, batch, rng=rng)
            return losses.weighted_sums(logits, targets, weights, **smoothing)
        head, own = self.module.output_layer(params)
        states = self._call(params, batch, rng, output=False)
        with self._injected(None, deterministic=True):
            return losses.chunked_sums(
                head, own, states, targets, weights, chunks=self.loss_chunks, **smoothing
            )

    def predict(
        self, params: Params, batch: Batch, *, max_length: int
    ) -> Int[Array, "batch {max_length}"]:
        """Greedy decoding with a key-value cache; rows may have any mixture of features.

        Args:
          params: parameters of network and adapters, boxed or not.
          batch: `encoder_input_tokens` and, with adapters, `feature_ids`; the rest is not used.
            A row of padding alone is left empty.
          max_length: tokens to decode at most; static under jit.

        Returns:
          int32 [batch, max_length]: tokens up to and including `eos_id`, then 0.
        """
        check_tokens(batch, ("encoder_input_tokens",))
        if self.members > 1:
            return self._predict_by_mean(params, batch, max_length)
        search = functools.partial(decoding.greedy, max_length=max_length, eos_id=self.eos_id)
        return self._search(params, batch, max_length, search)

    def _search(
        self, params: Params, batch: Batch, max_length: int, search: Callable[..., Any]
    ) -> Any:
        """What a decoder finds, given (step function, cache, rows) and the rows to leave empty."""
        check_tokens(batch, ("encoder_input_tokens",))
        tokens = batch["encoder_input_tokens"]
        source = self._source(params, batch)
        with self._injected(self._active(batch, None), source, deterministic=True):
            encoded = self._encode(params, tokens, source)
            return search(
                self._step_function(params, encoded, tokens, max_length),
                self._empty_cache(params, encoded, tokens, max_length),
                tokens.shape[0],
                finished=jnp.all(tokens == 0, axis=1),
            )

    def _predict_by_mean(self, params: Params, batch: Batch, max_length: int) -> Array:
        """`predict` by the mean of the members' logits: each is a row of its own to the network."""
        tokens = batch["encoder_input_tokens"]
        rows, members = tokens.shape[0], self.members
        ids = batch["feature_ids"]
        if ids.shape != (rows, members):
            raise ValueError(
                f"feature_ids has shape {ids.shape}: expected [batch, members] = "
                f"({rows}, {members})"
            )
        present = ids != ABSENT
        alone = jnp.zeros_like(present).at[:, 0].set(~present.any(axis=1))
        counted = (present | alone)[:, :, None]
        repeated = jnp.repeat(tokens, members, axis=0)
        each = {"encoder_input_tokens": repeated, "feature_ids": ids.reshape(-1, 1)}
        for name in SOURCE_INPUTS:
            if name in batch:
                each[name] = jnp.repeat(batch[name], members, axis=0)
        source = self._source(params, each)
        with self._injected(self._active(each, None), source, deterministic=True):
            encoded = self._encode(params, repeated, source)
            step = self._step_function(params, encoded, repeated, max_length)

            def mean_step(step_tokens: Array, cache: Any) -> tuple[Array, Any]:
                logits, cache = step(jnp.repeat(step_tokens, members), cache)
                logits = logits.astype(jnp.float32).reshape(rows, members, -1)
                total = jnp.sum(jnp.where(counted, logits, 0.0), axis=1)
                return total / jnp.sum(counted, axis=1), cache

            return decoding.greedy(
                mean_step,
                self._empty_cache(params, encoded, repeated, max_length),
                rows,
                max_length,
                self.eos_id,
                finished=jnp.all(tokens == 0, axis=1),
            )

    def sample(
        self,
        params: Params,
        batch: Batch,
        *,
        max_length: int,
        rng: Array,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Int[Array, "batch {max_length}"]:
        """A prediction drawn for every row, with a key-value cache.

        Args:
          params, batch, max_length: as in `predict`.
          rng: a key.
          temperature, top_k, top_p: see decoding.sample; static under jit.

        Returns:
          As `predict`.
        """
        search = functools.partial(
            decoding.sample,
            max_length=max_length,
            eos_id=self.eos_id,
            rng=rng,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        return self._search(params, batch, max_length, search)

    def predict_n(
        self,
        params: Params,
        batch: Batch,
        *,
        max_length: int,
        beams: int,
        alpha: float = 0.6,
        manner: str = decoding.EXACT,
    ) -> tuple[Int[Array, "batch {beams} {max_length}"], Float[Array, "batch {beams}"]]:
        """The `beams` best predictions of every row, by beam search with a key-value cache.

        Args:
          params, batch, max_length: as in `predict`.
          beams: predictions per row; static under jit. One is what `predict` gives.
          alpha, manner: of the length penalty and the search (see decoding.beam); static under jit.

        Returns:
          Tokens int32 [batch, beams, max_length], best first: up to and including `eos_id`, then 0;
          and scores float32 [batch, beams]: log probability over length penalty. A row of padding
          alone has tokens 0 and scores -inf, as have predictions that there are not.
        """

        def search(step: Any, cache: Any, rows: int, finished: Array) -> Any:
            return decoding.beam(
                step,
                cache,
                rows,
                beams,
                max_length,
                self.eos_id,
                alpha=alpha,
                manner=manner,
                cache_axes=_cache_axes(cache),
                finished=finished,
            )

        return self._search(params, batch, max_length, search)

    def embed(
        self, params: Params, batch: Batch, *, normalize: bool = False
    ) -> Float[Array, "batch embed"]:
        """Sentence embeddings: the encoded inputs, averaged over each row's tokens.

        Args:
          params: parameters of network and adapters, boxed or not.
          batch: `encoder_input_tokens` and, with adapters, `feature_ids`; the rest is not used.
            Every token that is not padding counts, that which ends the inputs too.
          normalize: divide each row by its Euclidean norm, so that inner products are cosines.

        Returns:
          float32 [batch, embed]; zeros for a row of padding alone.
        """
        check_tokens(batch, ("encoder_input_tokens",))
        tokens = batch["encoder_input_tokens"]
        source = self._source(params, batch)
        with self._injected(self._active(batch, None), source, deterministic=True):
            encoded = self._encode(params, tokens, source).astype(jnp.float32)
        real = (tokens > 0)[:, :, None]
        total = jnp.sum(jnp.where(real, encoded, 0.0), axis=1)
        if normalize:  # the sum is as good as the mean
            norm = jnp.linalg.norm(total, axis=1, keepdims=True)
            return total / jnp.where(norm == 0.0, 1.0, norm)
        return total / jnp.maximum(jnp.sum(real, axis=1), 1)

    def _apply(self, variables: Params, *args: Any, **kwargs: Any) -> Any:
        return self.module.apply(variables, *args, **kwargs)

    def _encode(self, params: Params, tokens: Array, source: Source | None) -> Array:
        variables = _variables(params, source)
        return self._apply(variables, tokens, enable_dropout=False, method="encode")

    def _source(self, params: Params, batch: Batch) -> Source | None:
        """What the adapters read of the batch's source; None where they read none."""
        if self.adapters is None or self.adapters.fusion is None:
            return None
        with self._placed():
            return read(self.module, self.adapters, params, batch, _placed_state)

    def _empty_cache(
        self, params: Params, encoded: Array, tokens: Array, max_length: int
    ) -> decoding.Cache:
        targets = jnp.zeros((tokens.shape[0], max_length), jnp.int32)
        _, variables = self._apply(
            {"params": params},
            encoded,
            tokens,
            targets,
            targets,
            enable_dropout=False,
            decode=True,
            mutable=["cache"],
            method="decode",
        )
        return variables["cache"]

    def _step_function(
        self, params: Params, encoded: Array, tokens: Array, max_length: int
    ) -> decoding.TokensToLogits:
        def tokens_to_logits(step_tokens: Array, cache: Any) -> tuple[Array, Any]:
            logits, variables = self._apply(
                {"params": params, "cache": cache},
                encoded,
                tokens,
                step_tokens[:, None],
                step_tokens[:, None],
                enable_dropout=False,
                decode=True,
                max_decode_length=max_length,
                mutable=["cache"],
                method="decode",
            )
            return logits[:, 0], variables["cache"]

        return tokens_to_logits

    def _active(
        self,
        batch: Batch,
        feature_rng: Array | None,
        numbers: Array | None = None,
        together: int = 1,
    ) -> ActiveFeatures | None:
        if self.adapters is None:
            return None
        if "feature_ids" not in batch:
            raise ValueError(
                "batch has no 'feature_ids', which the adapters' feature space "
                f"({', '.join(t.name for t in self.adapters.space.types)}) needs; "
                f"it has {', '.join(sorted(batch))}"
            )
        ids, rows = batch["feature_ids"], batch["encoder_input_tokens"].shape[0]
        if self.members > 1 and ids.shape == (rows, self.members):
            raise ValueError(
                f"EncoderDecoder.members = {self.members}: the mean of logits is for greedy "
                "decoding (predict) only"
            )
        if ids.ndim == 3:
            self._check_packed(batch, rows)
        elif ids.shape != (rows, self.adapters.space.num_slots):
            raise ValueError(
                f"feature_ids has shape {ids.shape}: expected [batch, slots] = "
                f"({rows}, {self.adapters.space.num_slots}), one row per row of "
                "encoder_input_tokens"
            )
        active = activate(
            self.adapters.space,
            ids,
            batch.get("feature_weights"),
            dropout_rng=feature_rng,
            numbers=numbers,
            settings=self.settings,
            rows=together,
        )
        # Fused layers meet each row's own source.
        return active if self.adapters.fusion is None else active.of_each_row()

    def _check_packed(self, batch: Batch, rows: int) -> None:
        """ValueError unless a batch of examples with features of their own can be routed."""
        assert self.adapters is not None
        shape, slots = batch["feature_ids"].shape, self.adapters.space.num_slots
        if (shape[0], shape[2]) != (rows, slots):
            raise ValueError(
                f"feature_ids has shape {shape}: expected [batch, examples, slots] = ({rows}, any "
                f"number, {slots})"
            )
        if any(name not in batch for name in _SEGMENTS):
            raise ValueError(
                f"feature_ids has shape {shape}, of packed rows: expected "
                f"{' and '.join(_SEGMENTS)} beside it"
            )
        if self.adapters.fusion is not None:
            raise ValueError(
                f"feature_ids has shape {shape}, of packed rows: adapters with a fusion read a "
                "source of the whole row, expected [batch, slots]"
            )

    @contextlib.contextmanager
    def _placed(self) -> Iterator[None]:
        """The context that says where the activations of the network lie."""
        with contextlib.ExitStack() as stack:
            if self.layout is not None:
                stack.enter_context(jax.sharding.use_abstract_mesh(self.layout.mesh))
                stack.enter_context(nn.logical_axis_rules(self.layout.rules))
            yield

    @contextlib.contextmanager
    def _injected(
        self,
        active: ActiveFeatures | None,
        source: Source | None = None,
        *,
        deterministic: bool,
        batch: Batch | None = None,
    ) -> Iterator[None]:
        """The context of a call of the network: its adapters, and where its activations lie.

        `batch` is that of a call whose rows may be packed.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._placed())
            if self.adapters is not None and active is not None:
                adapted = inject(
                    self.adapters,
                    active,
                    deterministic=deterministic,
                    source=source,
                    segments=None if batch is None else _segments(batch),
                )
                stack.enter_context(adapted)
            yield


def _segments(batch: Batch) -> Callable[[str], Array] | None:
    """Path of a layer -> the segments of its input, where the examples of rows are told apart."""
    if batch["feature_ids"].ndim == 2:
        return None

    def of(path: str) -> Array:
        return batch[_SEGMENTS[0 if _READS_INPUTS.match(path) else 1]]

    return of


def _variables(params: Params, source: Source | None) -> dict[str, Any]:
    """The variables of a call of the network: what its layers are given of the source, too."""
    return {"params": params, **({} if source is None else source.variables)}


def _placed_state(x: Array) -> Array:
    return nn.with_logical_constraint(x, ("batch", "length", "embed")) if x.ndim == 3 else x


_TOKENS = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")


def check_tokens(batch: Batch, names: tuple[str, ...] = _TOKENS) -> None:
    """Checks that the arrays of a batch are there and that their shapes agree.

    Shapes are known when a function is traced, so this costs nothing under jit; token ids are not.

    Raises:
      ValueError: names the array, its shape and what was expected.
    """
    for name in names:
        if name not in batch:
            raise ValueError(f"batch has no {name!r}: it has {', '.join(sorted(batch))}")
        shape = batch[name].shape
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{name} has shape {shape}: expected [batch, length], neither zero")
        if shape[0] != batch[names[0]].shape[0]:
            raise ValueError(
                f"{name} has shape {shape}: expected {batch[names[0]].shape[0]} rows, "
                f"as {names[0]} has"
            )
    if "decoder_target_tokens" not in names:
        return
    expected = batch["decoder_target_tokens"].shape
    for name in ("decoder_input_tokens", "decoder_loss_weights"):
        if name in batch and batch[name].shape != expected:
            raise ValueError(
                f"{name} has shape {batch[name].shape}: expected {expected}, "
                "as decoder_target_tokens has"
            )


def _cache_axes(cache: decoding.Cache) -> Any:
    """Where the rows are in a cache of T5X's names, for `decoding.beam`.

    Keys and values are [batch, heads, …, …], behind an axis of layers where those are scanned. The
    hypotheses of a row share those of the encoded inputs, which no step changes, and `cache_index`.
    """

    def rows(path: tuple[Any, ...], leaf: Array) -> int | None:
        names = [key.key for key in path]
        if names[-1] == "cache_index" or "encoder_decoder_attention" in names:
            return None
        if names[-1] not in ("cached_key", "cached_value"):
            raise ValueError(
                f"cache entry {'/'.join(names)} of shape {leaf.shape}: beam search knows "
                "cached_key, cached_value and cache_index only"
            )
        return leaf.ndim - 4

    return jax.tree_util.tree_map_with_path(rows, cache)


def _inputs(batch: Batch) -> dict[str, Any]:
    """The arguments of the module's `__call__` that a batch has."""
    return {name: batch[name] for name in (*_TOKENS, *_PACKING) if name in batch}
