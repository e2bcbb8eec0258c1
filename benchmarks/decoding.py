"""What adapters cost in greedy decoding: folded into the network, and mixed in a batch.

    python benchmarks/decoding.py [--batch 16] [--length 32] [--rounds 9]

A network of mT5-small's widths (vocabulary 8,192, 4 + 4 layers, random), float32, decoded to the
full length. Sides are interleaved in one process, a ratio is taken within a round: against the
network without adapters, with a set of features folded into it, and with 30 features of which every
row has another two. Prints medians and quartiles.
"""

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import figures
import flax.linen as nn
import interleaved
import jax
import jax.numpy as jnp
import numpy as np

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer

SPACE = FeatureSpace(
    (
        FeatureType("task", tuple(f"t{i}" for i in range(10)), rank=4),
        FeatureType("language", tuple(f"l{i}" for i in range(20)), rank=4),
    )
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rows, length = arguments.batch, arguments.length
    config = T5Config(vocab_size=8192, num_encoder_layers=4, num_decoder_layers=4)
    network = Transformer(config)
    spec = AdapterSpec(SPACE)
    # An end that is never drawn: every row is decoded to its full length.
    adapted = EncoderDecoder(network, spec, eos_id=-1)
    plain = EncoderDecoder(network, eos_id=-1)
    shapes = {
        "encoder_input_tokens": (rows, 64),
        "decoder_input_tokens": (rows, length),
        "decoder_target_tokens": (rows, length),
        "feature_ids": (rows, SPACE.num_slots),
    }
    params = nn.unbox(jax.jit(lambda key: adapted.init(key, shapes))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(x.dtype), params)
    base, adapters = tree.split_adapters(params)
    folded = tree.fold(base, adapters, spec, {"task": "t0", "language": "l0"})
    batch = {"encoder_input_tokens": jnp.asarray(rng.integers(2, 8192, (rows, 64)), jnp.int32)}
    ids = np.stack([rng.integers(0, t.num_values, rows) for t in SPACE.types], axis=1)
    mixed = batch | {"feature_ids": jnp.asarray(ids, jnp.int32)}

    def decode(model: EncoderDecoder, params: dict, batch: dict) -> Callable[[], object]:
        run = jax.jit(lambda p, b: model.predict(p, b, max_length=length))
        return lambda: jax.block_until_ready(run(params, batch))

    sides = {
        "base": decode(plain, base, batch),
        "folded": decode(plain, folded, batch),
        "mixed": decode(adapted, params, mixed),
    }
    times = interleaved.seconds(sides, arguments.rounds)
    print(f"base      {np.median(times['base']):.3f} s")
    said = {"folded": "one set of features, folded in", "mixed": "every row with another two"}
    for name in ("folded", "mixed"):
        ratios = times[name] / times["base"]
        figures.tell_ratios(said[name], ratios)
        print(f"{name:<9} {interleaved.quartiles(ratios)}")


if __name__ == "__main__":
    main()
