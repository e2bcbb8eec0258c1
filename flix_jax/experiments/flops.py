"""What a training step computes, as the model asks for it."""

from __future__ import annotations

import math

from flix_jax.adapters import tree
from flix_jax.experiments.job import Job


def model_flops(job: Job) -> float:
    """Multiplications and additions of a step that the model asks for, over the whole batch.

    The products with kernels and within attention, forward and for the gradients with respect to
    activations, and for those with respect to what is trained; of adapters the columns of an
    example's own features. What rematerialisation does again is not counted.
    """
    run, config = job.run, job.run.model
    inputs = run.batch_size * run.inputs_length
    targets = run.batch_size * run.targets_length
    times = 3 if run.trains_everything else 2
    total = 0.0

    def tokens(*dense: str) -> int:
        """That a dense layer sees: in the decoder, keys and values of the inputs see those."""
        crossed = "encoder_decoder_attention" in dense and dense[-1] in ("key", "value")
        return inputs if dense[0] == "encoder" or crossed else targets

    for path, leaf in tree.named_leaves(job.parameters.base_template):
        if path[-1] == "kernel":
            total += times * 2.0 * tokens(*path[:-1]) * math.prod(leaf.shape)
    adapters = job.parameters.templates[0] if job.space is not None else {}
    for path, leaf in tree.named_leaves(adapters):
        assert job.space is not None
        of = job.space.type(path[-2])
        per_column = math.prod(leaf.shape) / (of.num_values * of.max_rank)
        total += 3 * 2.0 * tokens(*path[:-3]) * per_column * of.slots * of.max_rank
    if config.logits_via_embedding:
        total += times * 2.0 * targets * config.emb_dim * config.vocab_size
    width = config.num_heads * config.head_dim
    attended = config.num_encoder_layers * run.inputs_length**2 + config.num_decoder_layers * (
        run.targets_length**2 + run.targets_length * run.inputs_length
    )
    return total + 3 * 4.0 * run.batch_size * width * attended
