"""seqio's encoder-decoder feature converter with feature ids and English sources beside it."""

from __future__ import annotations

from collections.abc import Mapping

from flix_jax.data.examples import SOURCES
from flix_jax.data.libraries import seqio, tf
from flix_jax.data.pipeline import SOURCE_TOKENS

FEATURE_IDS = "feature_ids"


class FlixFeatureConverter(seqio.EncDecFeatureConverter):
    """Task features to model features for models that take `feature_ids`.

    `inputs` and `targets` are padded and become T5X's `encoder_input_tokens`,
    `decoder_input_tokens`, `decoder_target_tokens` and `decoder_loss_weights`; `feature_ids` int32
    [slots] passes as it is, -1 included; `sources` is padded and becomes `source_input_tokens`, a
    row of zeros where an example has none. Examples are not packed: seqio's packing drops the zeros
    of every feature it packs, and 0 is a feature id.

    Args:
      num_slots: how many feature slots the tasks have; None for tasks without features.
      sources: whether the tasks have `sources`.
    """

    def __init__(self, num_slots: int | None, sources: bool = False):
        if num_slots is not None and num_slots < 1:
            raise ValueError(f"num_slots={num_slots}: expected at least 1, or None")
        self._num_slots = num_slots
        self._sources = sources
        spec = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
        task, model = {}, {}
        if num_slots is not None:
            task[FEATURE_IDS] = model[FEATURE_IDS] = spec
        if sources:
            task[SOURCES] = model[SOURCE_TOKENS] = spec
        # On the instance: another converter of this process may have neither.
        plain = seqio.EncDecFeatureConverter
        self.TASK_FEATURES = {**plain.TASK_FEATURES, **task}
        self.MODEL_FEATURES = {**plain.MODEL_FEATURES, **model}
        # The tasks cut to the lengths themselves; seqio's check of it costs half a second a task.
        super().__init__(pack=False, apply_length_check=False)

    def task_feature_lengths(self, lengths: Mapping[str, int]) -> dict[str, int]:
        """`lengths` of inputs, targets and sources, completed by the number of slots."""
        names = ["inputs", "targets", *([SOURCES] if self._sources else [])]
        completed = {name: lengths[name] for name in names}
        if self._num_slots is not None:
            completed[FEATURE_IDS] = self._num_slots
        return completed

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
        converted = dict(super()._convert_example(features))
        if self._num_slots is not None:
            converted[FEATURE_IDS] = features[FEATURE_IDS]
        if self._sources:
            converted[SOURCE_TOKENS] = features[SOURCES]
        return converted

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> Mapping[str, int]:
        converted = dict(super().get_model_feature_lengths(task_feature_lengths))
        if self._num_slots is not None:
            converted[FEATURE_IDS] = task_feature_lengths[FEATURE_IDS]
        if self._sources:
            converted[SOURCE_TOKENS] = task_feature_lengths[SOURCES]
        return converted
