"""Cells as seqio tasks: registering them, and loading a task's training split into memory."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from flix_jax.data.cells import Cell
from flix_jax.data.converter import FEATURE_IDS
from flix_jax.data.examples import SOURCES, TOKENS, CellData, Ragged
from flix_jax.data.libraries import seqio, tf
from flix_jax.data.pipeline import check_lengths

ANSWER = "answer"
HAS_SOURCE = "has_source"
Pairs = tuple[Sequence[str], Sequence[str]]


def task_name(source: str, cell: Cell) -> str:
    """seqio's name of a cell: `xtreme_up.ner.sw`, `xtreme_up.translation.sw:fr2sw`."""
    name = ".".join([source, cell.task, cell.language])
    name = f"{name}:{cell.variant}" if cell.variant else name
    return re.sub(r"[^\w.:]", "_", name)  # seqio allows no other characters


def register_task(
    name: str,
    read: Callable[[str], Pairs],
    splits: Sequence[str],
    *,
    vocabulary: Any,
    feature_ids: Int[np.ndarray, " slots"] | None = None,
    metric_fn: Callable[..., Mapping[str, float]] | None = None,
    answers: Callable[[str], Sequence[str]] | None = None,
    sources: Callable[[str], Sequence[str]] | None = None,
    join: Callable[[str, str], str] | None = None,
) -> str:
    """Registers a text-to-text task with seqio, in place of an earlier one of its name.

    Args:
      name: see `task_name`.
      read: split -> (inputs, targets), two lists of strings; called whenever the data is read.
      splits: the splits that `read` knows.
      vocabulary: a description of flix_jax.data.vocabularies, for inputs and targets.
      feature_ids: int32 [slots], the same for every example; None for a task without features.
      metric_fn: (targets, predictions) -> {metric: value}, over strings; None for a task that is
        not evaluated.
      answers: split -> a string per example, what rankings are scored against in place of the
        target; None for tasks whose targets are the answers. Stands in the examples as `answer`.
      sources: split -> the English source of every example, '' where it has none; they are a
        feature of their own, `sources`, empty for ''. None for a task without.
      join: (source, input) -> the inputs, in place of that feature.

    Returns:
      `name`.
    """
    tokens = seqio.Feature(vocabulary.build(), add_eos=True)
    features: dict[str, seqio.Feature] = {"inputs": tokens, "targets": tokens}
    apart = sources is not None and join is None
    if apart:  # `finish` ends them, for an example without a source has not even an end
        features[SOURCES] = seqio.Feature(tokens.vocabulary, add_eos=False, required=False)
    if feature_ids is not None:
        features[FEATURE_IDS] = seqio.Feature(
            seqio.PassThroughVocabulary(0), add_eos=False, dtype=tf.int32
        )

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # one file: there is nothing to shuffle
        texts = dict(zip(TOKENS, read(split), strict=True))
        if answers is not None:
            texts[ANSWER] = list(answers(split))
        columns = {}
        if sources is not None:
            given = sources(split)
            columns[HAS_SOURCE] = np.array([bool(source) for source in given], np.int32)
            if join is None:
                texts[SOURCES] = given
            else:
                texts["inputs"] = [join(*both) for both in zip(given, texts["inputs"], strict=True)]
        for name, column in texts.items():
            columns[name] = np.array([x.encode() for x in column], object)
        return tf.data.Dataset.from_tensor_slices(columns)

    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits=tuple(splits)),
        preprocessors=[seqio.preprocessors.tokenize, finish(feature_ids)],
        output_features=features,
        metric_fns=[] if metric_fn is None else [metric_fn],
    )
    return name


def register_mixture(name: str, rates: Mapping[str, float]) -> str:
    """Registers a seqio mixture of registered tasks, in place of an earlier one of its name.

    For users of seqio; TrainPipeline draws from the same tasks in an order of its own.
    """
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, list(rates.items()))
    return name


def finish(
    feature_ids: Int[np.ndarray, " slots"] | None = None,
) -> Callable[..., tf.data.Dataset]:
    """The last preprocessor of a task, over tokenised examples; one map, which is what costs time.

    It adds `inputs_length` and `targets_length`, the tokens before any cut, EOS included; cuts to
    the lengths and appends EOS (seqio's append_eos_after_trim); adds `feature_ids`. The same with
    `sources`, where there are some, but for those that are empty: they stay so.
    """
    constant = None if feature_ids is None else np.asarray(feature_ids, np.int32)

    def finish_examples(
        dataset: tf.data.Dataset,
        output_features: Mapping[str, seqio.Feature],
        sequence_length: Mapping[str, int] | None = None,
    ) -> tf.data.Dataset:
        @tf.autograph.experimental.do_not_convert  # which takes longer than all the rest
        def finish_example(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            lengths = {f"{name}_length": tf.size(example[name]) + 1 for name in TOKENS}
            ended = seqio.preprocessors.append_eos_after_trim_impl(
                dict(example), output_features, sequence_length
            )
            features = {} if constant is None else {FEATURE_IDS: tf.constant(constant)}
            if SOURCES in output_features:
                limit = None if sequence_length is None else sequence_length.get(SOURCES)
                tokens, length = _ended(example[SOURCES], output_features[SOURCES], limit)
                features |= {SOURCES: tokens, f"{SOURCES}_length": length}
            return {**ended, **lengths, **features}

        return dataset.map(finish_example, num_parallel_calls=tf.data.AUTOTUNE)

    return finish_examples


def _ended(tokens: Any, feature: seqio.Feature, limit: int | None) -> tuple[Any, Any]:
    """Tokens cut to `limit` with EOS as the last of them, and their length uncut; both 0 for none.

    Args:
      tokens: int32 [length].
      feature: whose vocabulary has the EOS.
      limit: None does not cut.
    """
    length = tf.size(tokens) + 1
    kept = tokens if limit is None else tokens[: limit - 1]
    eos = tf.constant([feature.vocabulary.eos_id], tokens.dtype)
    some = tf.size(tokens) > 0
    return tf.concat([kept, eos[: tf.cast(some, tf.int32)]], 0), tf.where(some, length, 0)


def load_cell(
    task: str,
    lengths: Mapping[str, int],
    split: str = "train",
    drop: Int[np.ndarray, " dropped"] | None = None,
) -> CellData:
    """All examples of a registered task in order, tokenised, ended by EOS and cut to `lengths`.

    Any seqio task with `inputs` and `targets` will do; inputs and targets that were cut are counted
    where it tells `inputs_length` and `targets_length` (see `finish`). A task with `sources` needs
    a length of them too, and tells which examples have one. Examples at the places of `drop` are
    left out, and of all counts but their own.

    Raises:
      ValueError: the split has no examples, or none at a place to drop.
    """
    check_lengths(lengths)
    provider = seqio.TaskRegistry.get(task)
    has_features = FEATURE_IDS in provider.output_features
    has_sources = SOURCES in provider.output_features
    if has_sources and SOURCES not in lengths:
        raise ValueError(f"lengths {dict(lengths)}: {SOURCES!r} is missing, which {task} has")
    texts = (*TOKENS, *([SOURCES] if has_sources else []))
    sequence_length = {name: int(lengths[name]) for name in texts}
    dataset = provider.get_dataset(
        sequence_length,
        split,
        shuffle=False,
        num_epochs=1,
        trim_output_features=False,  # cut below, at a third less time than by a map
        try_in_mem_cache=False,
    )
    measured = [name for name in texts if f"{name}_length" in dataset.element_spec]
    batches = list(dataset.ragged_batch(1024))
    if not batches:
        raise ValueError(f"seqio task {task}: the split {split!r} has no examples")

    inputs, targets, *sources = (
        _ragged([batch[name] for batch in batches], sequence_length[name]) for name in texts
    )
    dropped = np.zeros(0, np.int64) if drop is None else drop
    if len(dropped) and dropped.max() >= len(inputs):
        raise ValueError(
            f"seqio task {task}: no example {dropped.max()} to drop, but {len(inputs)} in the "
            f"split {split!r}"
        )

    def cut(name: str) -> int | None:
        if name not in measured:
            return None
        found = np.concatenate([batch[f"{name}_length"].numpy() for batch in batches])
        return int((np.delete(found, dropped) > sequence_length[name]).sum())

    without_source = None
    if HAS_SOURCE in dataset.element_spec:
        found = np.concatenate([batch[HAS_SOURCE].numpy() for batch in batches])
        without_source = int((np.delete(found, dropped) == 0).sum())
    feature_ids = None
    if has_features:
        feature_ids = np.concatenate([_dense(batch[FEATURE_IDS]) for batch in batches])
        feature_ids = np.delete(feature_ids, dropped, axis=0)
    return CellData(
        inputs=inputs.without(dropped),
        targets=targets.without(dropped),
        feature_ids=feature_ids,
        cut_inputs=cut("inputs"),
        cut_targets=cut("targets"),
        dropped=len(dropped),
        sources=sources[0].without(dropped) if sources else None,
        cut_sources=cut(SOURCES) if sources else None,
        without_source=without_source,
    )


def load_cells(
    tasks: Mapping[Cell, str],
    lengths: Mapping[str, int],
    drop: Mapping[str, Int[np.ndarray, " dropped"]] | None = None,
) -> dict[Cell, CellData]:
    """The training data of every cell, by the names that `Source.register` returned.

    Args:
      tasks: the seqio task of each cell.
      lengths: as of `load_cell`.
      drop: by the name of a cell, the places of its examples to leave out.
    """
    return {
        cell: load_cell(task, lengths, drop=(drop or {}).get(cell.name))
        for cell, task in tasks.items()
    }


def _ragged(batches: Sequence[Any], limit: int) -> Ragged:
    """The rows of all batches, each cut to `limit`."""
    # ragged_batch makes a plain tensor of rows whose length is static.
    ragged = [
        batch if isinstance(batch, tf.RaggedTensor) else tf.RaggedTensor.from_tensor(batch)
        for batch in batches
    ]
    values = np.concatenate([np.asarray(batch.flat_values, np.int32) for batch in ragged])
    lengths = np.concatenate([batch.row_lengths().numpy() for batch in ragged])
    ends = np.cumsum(lengths)
    place = np.arange(len(values)) - np.repeat(ends - lengths, lengths)  # within the row
    ends = np.cumsum(np.minimum(lengths, limit))
    return Ragged(values[place < limit], np.concatenate([[0], ends]).astype(np.int64))


def _dense(batch: Any) -> np.ndarray:
    """The array of rows that are all of one length, whether or not TensorFlow knew it."""
    return (batch.to_tensor() if isinstance(batch, tf.RaggedTensor) else batch).numpy()
