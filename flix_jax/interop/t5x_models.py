"""FLix under T5X's own trainer: a model class, a feature converter, an optimizer.

T5X's networks are used as they are: the adapters are injected into them. `configs/t5x/` has the gin
files, for T5X's `t5` and `scalable_t5`. Importing this needs T5X.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, traverse_util
from flax.linen import partitioning as flax_partitioning
from jaxtyping import Array
from t5x import decoding, models, optimizers

from flix_jax.adapters import tree
from flix_jax.adapters.activation import activate
from flix_jax.adapters.fusion import Source
from flix_jax.adapters.injection import CHILD, AdapterSpec, inject
from flix_jax.adapters.source import read
from flix_jax.data import cells as cells_lib
from flix_jax.data.cells import Mixture
from flix_jax.data.converter import FEATURE_IDS, FlixFeatureConverter
from flix_jax.data.vocabularies import Vocabulary

AXES = "params_axes"  # T5X's collection of the parameters' logical axes
_registered: dict[str, tuple[Any, ...]] = {}  # what `mixture` made, by name


class FlixModel(models.EncoderDecoderModel):
    """T5X's encoder-decoder model whose network has adapters; a batch has `feature_ids` too.

    With a fusion it has `source_input_tokens`, which T5X's networks read where their layers are not
    scanned.

    No gradient is taken of the base, and with `adapters_only` no optimizer state is kept of it.

    Args:
      module: T5X's network.
      adapters: what is injected; its features' values must be stated.
      options: all else that T5X's model takes: vocabularies, `optimizer_def`, losses, `decode_fn`.
    """

    def __init__(self, module: Any, adapters: AdapterSpec, **options: Any) -> None:
        for feature_type in adapters.space.types:
            _ = feature_type.known_values  # T5X has no data yet to take them from
        self._adapters = adapters
        converter = functools.partial(
            converter_for, adapters.space.num_slots, adapters.fusion is not None
        )
        super().__init__(module=module, feature_converter_cls=converter, **options)

    def get_initial_variables(
        self,
        rng: Array,
        input_shapes: Mapping[str, Any],
        input_types: Mapping[str, Any] | None = None,
    ) -> core.FrozenDict:
        """T5X's, with the adapters' parameters and logical axes."""
        rows = input_shapes["encoder_input_tokens"][0]
        ids = jnp.zeros((rows, self._adapters.space.num_slots), jnp.int32)
        with self._injected(ids):
            made = super().get_initial_variables(rng, input_shapes, input_types)
        variables = core.unfreeze(made)
        _, adapters = tree.split_adapters(variables["params"])
        if AXES in variables:
            base_axes = flax_partitioning.get_axis_names(variables[AXES])
            axes = tree.adapter_logical_axes(adapters, core.unfreeze(base_axes))
            for path, names in tree.named_leaves(axes):
                node = variables[AXES]
                for name in path[:-1]:
                    node = node.setdefault(name, {})
                # T5X's rules know no axes of features and ranks; they are whole on every device.
                known = tuple(None if n in ("features", "rank") else n for n in names)
                node[f"{path[-1]}_axes"] = flax_partitioning.AxisMetadata(names=known)
        return core.freeze(variables)

    def _compute_logits(
        self,
        params: Any,
        batch: Mapping[str, Array],
        dropout_rng: Array | None = None,
        mutable: Any = False,
        other_variables: Any = None,
    ) -> Any:
        feature_rng = None
        if dropout_rng is not None:
            feature_rng, dropout_rng = jax.random.split(dropout_rng)
        source = self._source(params, batch)
        others = {**(other_variables or {}), **({} if source is None else source.variables)}
        with self._injected(batch[FEATURE_IDS], feature_rng, source):
            return super()._compute_logits(
                _base_stopped(params), batch, dropout_rng, mutable, others or None
            )

    def predict_batch_with_aux(
        self,
        params: Any,
        batch: Mapping[str, Array],
        rng: Array | None = None,
        decoder_params: MutableMapping[str, Any] | None = None,
        return_all_decodes: bool | None = None,
        num_decodes: int | None = None,
        prompt_with_targets: bool = False,
    ) -> tuple[Array, Mapping[str, Array]]:
        """T5X's, every hypothesis with the features of its row."""
        defaults = self._default_decoder_params
        if return_all_decodes is None:
            return_all_decodes = defaults.return_all_decodes
        if num_decodes is None:
            num_decodes = defaults.num_decodes
        ids, inputs = batch[FEATURE_IDS], batch["encoder_input_tokens"]
        prompts = jnp.zeros_like(batch["decoder_input_tokens"])
        if prompt_with_targets:
            given = batch["decoder_input_tokens"]
            prompts = given * (given != self.output_vocabulary.eos_id)
        options = dict(decoder_params or {})
        options.setdefault("eos_id", self.output_vocabulary.eos_id or 1)
        if rng is not None:
            if options.get("decode_rng") is not None:
                raise ValueError("an rng is given twice: as rng and in decoder_params")
            options["decode_rng"] = rng
        prefills = (
            "initial_index" in inspect.signature(self.decode_fn).parameters
            and "prefill" in inspect.signature(self.module.decode).parameters
        )
        source = self._source(params, batch)
        variables = {"params": params, **({} if source is None else source.variables)}
        with self._injected(ids, source=source):
            encoded = self.module.apply(
                variables, inputs, enable_dropout=False, method=self.module.encode
            )
            cache, start = self._compute_kv_cache(
                params,
                encoded_inputs=encoded,
                encoder_input_tokens=inputs,
                decoder_input_tokens=prompts,
                prefill_decoder_prompt=prefills,
            )
        if start is not None:
            options["initial_index"] = start
        repeat = functools.partial(decoding.flat_batch_beam_expand, beam_size=num_decodes)
        with self._injected(repeat(ids)):
            decodes, scores = self.decode_fn(
                inputs=prompts,
                cache=cache,
                tokens_to_logits=functools.partial(
                    self._compute_logits_from_slice,
                    params=params,
                    encoded_inputs=repeat(encoded),
                    raw_inputs=repeat(inputs),
                    max_decode_length=prompts.shape[1],
                ),
                num_decodes=num_decodes,
                cache_offset=1 if getattr(self.module, "scan_layers", False) else 0,
                **options,
            )
        if return_all_decodes:
            return decodes, {"scores": scores}
        return decodes[:, -1, :], {"scores": scores[:, -1]}

    def _source(self, params: Any, batch: Mapping[str, Array]) -> Source | None:
        if self._adapters.fusion is None:
            return None
        return read(self.module, self._adapters, core.unfreeze(params), batch)

    @contextlib.contextmanager
    def _injected(
        self, ids: Array, feature_rng: Array | None = None, source: Source | None = None
    ) -> Iterator[None]:
        active = activate(self._adapters.space, ids, dropout_rng=feature_rng)
        deterministic = feature_rng is None
        with inject(self._adapters, active, deterministic=deterministic, source=source):
            yield


def _base_stopped(params: Any) -> Any:
    base, adapters = tree.split_adapters(core.unfreeze(params))
    joined = tree.join(jax.lax.stop_gradient(base), adapters)
    return core.freeze(joined) if isinstance(params, core.FrozenDict) else joined


def adapters_only(optimizer: optimizers.OptimizerDef) -> optimizers.MultiOptimizer:
    """T5X's optimizer of the adapters alone: the base is left as it is, and has no state.

    Of T5X's Adafactor choose `factored=False`: it knows no rule for banks, which have three axes.
    """
    adapters = traverse_util.ModelParamTraversal(lambda path, _: f"/{CHILD}/" in path)
    return optimizers.MultiOptimizer([(adapters, optimizer)])


def converter_for(
    num_slots: int,
    sources: bool = False,
    pack: bool = False,
    use_custom_packing_ops: bool = False,
) -> FlixFeatureConverter:
    """The feature converter, as T5X asks for it; `sources` for adapters that fuse with them.

    Raises:
      ValueError: packing is asked for; packed rows would mix features.
    """
    if pack:
        raise ValueError(
            "utils.DatasetConfig.pack = True: rows with feature ids are not packed; set it to False"
        )
    return FlixFeatureConverter(num_slots, sources)


def mixture(
    source: cells_lib.Source,
    vocabulary: Vocabulary,
    adapters: AdapterSpec,
    mixture: Mixture,
    name: str,
    source_text: Any = None,
) -> str:
    """Registers the cells that a mixture trains on as a seqio mixture, and returns its name.

    For `utils.DatasetConfig.mixture_or_task_name`. `task_feature_lengths` name `feature_ids` too:
    the number of slots; and with a `source_text`, English sources for adapters that fuse with them,
    `sources`.
    """
    from flix_jax.data.seqio_tasks import load_cells, register_mixture

    wanted = (source, vocabulary, adapters.space, mixture, source_text)
    if _registered.get(name) == wanted:  # each of T5X's data sets asks for it
        return name
    split = mixture.select(source.cells())
    given = {} if source_text is None else {"source_text": source_text}
    tasks = source.register(split.train, vocabulary=vocabulary, space=adapters.space, **given)
    lengths = {"inputs": 1, "targets": 1, "sources": 1}
    counts = {cell: len(data) for cell, data in load_cells(tasks, lengths).items()}
    rates = mixture.rates_for(counts)
    register_mixture(name, {tasks[cell]: rate for cell, rate in rates.items()})
    _registered[name] = wanted
    return name


def built(vocabulary: Vocabulary) -> Any:
    """seqio's vocabulary of one of ours, for T5X's models."""
    return vocabulary.build()
