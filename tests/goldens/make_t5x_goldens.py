"""Makes t5x_mt5_small.json: T5X's parameters of mT5-small, by name, with shapes and logical axes.

Both of T5X's networks, `t5` (layers in a loop) and `scalable_t5` (layers scanned), are traced with
jax.eval_shape, which allocates nothing. Needs jax, flax and a checkout of T5X, which need not be
installed:

    git clone https://github.com/google-research/t5x
    python tests/goldens/make_t5x_goldens.py t5x
"""

import importlib
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
from flax.linen import partitioning
from flax.traverse_util import flatten_dict

MT5_SMALL = {
    "vocab_size": 250112,
    "emb_dim": 512,
    "num_heads": 6,
    "num_encoder_layers": 8,
    "num_decoder_layers": 8,
    "head_dim": 64,
    "mlp_dim": 1024,
    "mlp_activations": ("gelu", "linear"),
    "logits_via_embedding": False,
}


def parameters(network) -> dict[str, dict[str, list]]:
    """Path -> shape and axes of every parameter of one of T5X's networks."""
    module = network.Transformer(network.T5Config(**MT5_SMALL))
    tokens = jnp.ones((1, 4), jnp.int32)
    variables = jax.eval_shape(
        lambda rng: module.init(rng, tokens, tokens, tokens, enable_dropout=False),
        jax.random.key(0),
    )
    shapes = flatten_dict(variables["params"], sep="/")
    axes = flatten_dict(partitioning.get_axis_names(variables["params_axes"]), sep="/")
    return {
        path: {"shape": list(shapes[path].shape), "axes": list(axes[path])}
        for path in sorted(shapes)
    }


def main() -> None:
    checkout = pathlib.Path(sys.argv[1])
    # A bare package in place of T5X's own, whose __init__ imports all of its dependencies.
    package = types.ModuleType("t5x")
    package.__path__ = [str(checkout / "t5x")]
    sys.modules["t5x"] = package
    golden = {
        name: parameters(importlib.import_module(f"t5x.examples.{name}.network"))
        for name in ("t5", "scalable_t5")
    }
    lines = []
    for name, tree in golden.items():
        leaves = [f"  {json.dumps(path)}: {json.dumps(leaf)}" for path, leaf in tree.items()]
        lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(leaves) + "\n }")
    path = pathlib.Path(__file__).with_name("t5x_mt5_small.json")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path}: {', '.join(f'{len(tree)} of {name}' for name, tree in golden.items())}")


if __name__ == "__main__":
    main()
