"""How far an int8 base is from the float32 one: logits of random tokens, and memory.

    python benchmarks/int8_base.py [--base FOLDER] [--batch 4] [--length 32]

Without a base the network is a random one of mT5-small's widths with a reduced vocabulary; with one
(a folder of Hugging Face's or a checkpoint of T5X's) it is that, and tokens are drawn from its
whole vocabulary. Printed for float32 against int8 and, to compare, bfloat16: the mean and the
largest absolute difference of logits, each over the standard deviation of the float32 logits, the
share of positions whose likeliest token is another, and the bytes of the parameters.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flix_jax.interop import bases
from flix_jax.models import int8
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer
from flix_jax.training.parameters import Parameters
from flix_jax.training.partitioning import MeshSpec


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="a network of Hugging Face's or of T5X's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=8192, help="of a random network")
    args = parser.parse_args()

    if args.base:
        config = bases.config_of(args.base)
    else:
        config = T5Config(args.vocabulary)
    model = EncoderDecoder(Transformer(config))
    rng = np.random.default_rng(0)
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    shape = (args.batch, args.length)
    batch = {n: jnp.asarray(rng.integers(2, config.vocab_size, shape), jnp.int32) for n in names}
    if args.base:
        mesh = MeshSpec(data=1).make(jax.devices()[:1])
        template = Parameters(model, dict.fromkeys(names, shape), mesh, False).base_template
        params = bases.load_parameters(args.base, config, template)
    else:
        shapes = dict.fromkeys(names, shape)
        params = jax.jit(lambda key: nn.unbox(model.init(key, shapes)))(jax.random.key(0))

    logits = jax.jit(model.logits)
    exact = np.asarray(logits(params, batch))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    print(f"{args.base or 'random'}, {args.batch} × {args.length} random tokens\n")
    print("| base | parameters | mean difference | largest | other likeliest token |")
    print("|---|---:|---:|---:|---:|")
    for name, kept in (
        ("float32", params),
        ("bfloat16", narrow),
        ("int8", jax.jit(int8.quantise)(params)),
    ):
        found = np.asarray(logits(kept, batch))
        apart = np.abs(found - exact) / exact.std()
        other = (found.argmax(-1) != exact.argmax(-1)).mean()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
        print(
            f"| {name} | {size / 2**20:,.1f} MiB | {apart.mean():.4f} | {apart.max():.4f} | "
            f"{100 * other:.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
