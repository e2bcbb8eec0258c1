"""The adapters that benchmarks compare, and gradients that reach a network's inputs."""

import argparse
import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.models.config import T5Config
from flix_jax.training import partitioning


def flix(num_features: int) -> AdapterSpec:
    """Two types of rank 4: a third of the features are tasks, the rest languages."""
    tasks = max(2, num_features // 3)
    names = [tuple(f"v{i}" for i in range(n)) for n in (tasks, num_features - tasks)]
    return AdapterSpec(
        FeatureSpace((FeatureType("task", names[0]), FeatureType("language", names[1])))
    )


def lora(rank: int) -> AdapterSpec:
    return AdapterSpec(FeatureSpace((FeatureType("shared", ("shared",), rank=rank),)))


def adapter_axes(boxed: Any) -> Any:
    """The logical axes of the adapters among parameters as `init` gives them."""
    base_axes, _ = tree.split_adapters(partitioning.logical_axes(boxed))
    _, adapters = tree.split_adapters(nn.meta.unbox(boxed))
    return tree.adapter_logical_axes(adapters, base_axes)


def tokens(
    rng: np.random.Generator, vocabulary: int, rows: int, inputs: int, targets: int
) -> dict[str, jax.Array]:
    """A batch without padding, int32 [rows, inputs] and [rows, targets]."""
    shapes = {
        "encoder_input_tokens": (rows, inputs),
        "decoder_input_tokens": (rows, targets),
        "decoder_target_tokens": (rows, targets),
    }
    return {
        name: jnp.asarray(rng.integers(1, vocabulary, shape), jnp.int32)
        for name, shape in shapes.items()
    }


def network_and_batch(args: argparse.Namespace) -> tuple[T5Config, dict[str, jax.Array]]:
    """mT5-small's widths without dropout, and `tokens`, of the sizes of `interleaved.parser`."""
    config = T5Config(
        vocab_size=args.vocabulary,
        num_encoder_layers=args.layers,
        num_decoder_layers=args.layers,
        dropout_rate=0.0,
    )
    lengths = args.input_length, args.target_length
    return config, tokens(np.random.default_rng(1), args.vocabulary, args.batch, *lengths)


@contextlib.contextmanager
def perturbed_embeddings(perturbations: tuple[jax.Array, jax.Array]):
    """Adds to the embedded inputs of encoder and decoder, in the order of the two lookups."""
    remaining = list(perturbations)

    def interceptor(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if context.module.name == "token_embedder" and context.method_name == "__call__":
            y = y + remaining.pop(0)
        return y

    with nn.intercept_methods(interceptor):
        yield
    if remaining:
        raise RuntimeError(f"{len(remaining)} embedding lookups were not seen")
