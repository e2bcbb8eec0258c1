"""What a training step computes, as the model asks for it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from flix_jax.adapters import tree
from flix_jax.adapters.fusion import FROM_TARGET, MATRICES
from flix_jax.data.examples import SOURCES
from flix_jax.experiments.job import Job


def model_flops(job: Job, lengths: Mapping[str, int] | None = None) -> float:
    """Multiplications and additions of a step that the model asks for, over the whole batch.

    The products with kernels and within attention, forward and for the gradients with respect to
    activations, and for those with respect to what is trained; of adapters the columns of an
    example's own features; of a source that they read the forward pass of the whole encoder. What
    rematerialisation does again is not counted. `lengths` are those of the batch, by default the
    longest that the run has.
    """
    run, config = job.run, job.run.model
    lengths = job.lengths if lengths is None else lengths
    inputs = run.batch_size * lengths["inputs"]
    targets = run.batch_size * lengths["targets"]
    source_length = _source_length(job, lengths)
    sources = run.batch_size * source_length
    times = 3 if run.trains_everything else 2
    total = 0.0

    def tokens(*dense: str) -> int:
        """That a dense layer sees: in the decoder, keys and values of the inputs see those."""
        crossed = "encoder_decoder_attention" in dense and dense[-1] in ("key", "value")
        return inputs if dense[0] == "encoder" or crossed else targets

    for path, leaf in tree.named_leaves(job.parameters.base_template):
        if path[-1] == "kernel":
            total += times * 2.0 * tokens(*path[:-1]) * math.prod(leaf.shape)
            if path[0] == "encoder":
                total += 2.0 * sources * math.prod(leaf.shape)
    adapters = job.parameters.templates[0] if job.space is not None else {}
    for path, leaf in tree.named_leaves(adapters):
        if tree.is_shared(path):  # forward, and its own gradient
            total += 2 * 2.0 * sources * math.prod(leaf.shape)
            continue
        size = math.prod(leaf.shape)
        total += _adapter_flops(job, path, size, tokens(*path[:-3]), sources)
    if config.logits_via_embedding:
        total += times * 2.0 * targets * config.emb_dim * config.vocab_size
    width = config.num_heads * config.head_dim
    length, target_length = lengths["inputs"], lengths["targets"]
    attended = config.num_encoder_layers * length**2 + config.num_decoder_layers * (
        target_length**2 + target_length * length
    )
    total += 4.0 * run.batch_size * width * config.num_encoder_layers * source_length**2
    return total + 3 * 4.0 * run.batch_size * width * attended


def _source_length(job: Job, lengths: Mapping[str, int]) -> int:
    """Of the source texts that adapters read; 0 where they read none."""
    spec = job.model.adapters
    return 0 if spec is None or spec.fusion is None else lengths.get(SOURCES, 0)


def _adapter_flops(job: Job, path: tuple[str, ...], size: int, tokens: int, sources: int) -> float:
    """Those of the products with one leaf of the adapters, of `size` elements.

    `tokens` are those that the layer sees in a batch, `sources` those of its sources.
    """
    spec = job.model.adapters
    assert job.space is not None and spec is not None
    of = job.space.type(path[-2])
    rows = job.run.batch_size
    columns = of.slots * of.max_rank
    fused = sources > 0 and spec.fuses("/".join(path[:-3]))
    per_column = size / (of.num_values * of.max_rank)  # of all layers of a stack
    if path[-1] in MATRICES:
        assert spec.fusion is not None
        from_target = spec.fusion.function == FROM_TARGET
        others = sources if from_target else tokens
        own = tokens if path[-1] == "query" else others
        total = 3 * 2.0 * own * per_column * columns
        if path[-1] != "query":  # its product with the queries, or with the weights
            layers = per_column / of.max_rank
            total += 3 * 2.0 * tokens * others / rows * columns * layers
        return total
    total = 3 * 2.0 * tokens * per_column * columns
    if fused and path[-1] == "a":  # no gradient is taken of the source
        total += 2 * 2.0 * sources * per_column * columns
    return total
