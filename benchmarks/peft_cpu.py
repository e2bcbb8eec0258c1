"""Training, forward pass and greedy decoding against Hugging Face's mT5 with PEFT, on a CPU.

    pip install torch transformers peft
    python benchmarks/peft_cpu.py [--layers 8] [--batch 16] [--rounds 9] [--compiled]

One architecture (mT5-small's widths, vocabulary 8,192), one batch without padding, random
parameters, float32, no dropout, as many threads as there are cores on both sides. All sides take
turns in one process, and a ratio is taken within a round:

    peft    Hugging Face's network with PEFT's LoRA of rank 8 on every projection
    lora    ours, with one LoRA of rank 8 on every projection
    flix    ours, with 30 features, two of rank 4 in every example

A training step is forward, backward and AdamW; the forward pass gives all logits; decoding uses a
cache and makes --target_length tokens of every row. Says too how fast both multiply matrices of the
shapes that the layers have. `--compiled` takes PyTorch's step and forward pass through
torch.compile.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import figures
import flax.linen as nn
import interleaved
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_step
import torch
from adapted import flix, lora, network_and_batch

from flix_jax.adapters import text_tables
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.adapters.tree import count_parameters, join, split_adapters
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer
from flix_jax.training.step import TrainState, train_step

Calls = dict[str, Callable[[], Any]]
TRAINING, FORWARD, DECODING = "training", "forward", "greedy decoding"


def ours(name: str, spec: AdapterSpec, config: T5Config, batch: dict[str, Any]) -> Calls:
    """By what is done, a call of it."""
    # An end that is never drawn: every row is decoded to its full length.
    model = EncoderDecoder(Transformer(config), spec, eos_id=-1)
    rng = np.random.default_rng(0)
    rows, length = batch["decoder_target_tokens"].shape
    ids = [rng.integers(0, t.num_values, rows) for t in spec.space.slot_types]
    batch = batch | {"feature_ids": jnp.asarray(np.stack(ids, axis=1), jnp.int32)}
    shapes = {name: array.shape for name, array in batch.items()}
    params = nn.unbox(jax.jit(lambda key: model.init(key, shapes))(jax.random.key(0)))
    base, adapters = split_adapters(params)
    print(f"{name}: {count_parameters(adapters):,} trained", flush=True)
    # Its buffers are taken by each step's.
    kept = jax.tree.map(jnp.copy, adapters)
    optimizer = optax.adamw(1e-3, weight_decay=0.0)
    step: Any = jax.jit(train_step(model.loss, optimizer), donate_argnums=0)
    state = TrainState.create(kept, optimizer)
    forward = jax.jit(model.logits)
    predict = jax.jit(lambda params, batch: model.predict(params, batch, max_length=length))
    whole = join(base, adapters)

    def train() -> None:
        nonlocal state
        state, metrics = step(state, base, batch, 0)
        jax.block_until_ready((state, metrics))

    return {
        TRAINING: train,
        FORWARD: lambda: jax.block_until_ready(forward(whole, batch)),
        DECODING: lambda: jax.block_until_ready(predict(whole, batch)),
    }


def products(config: T5Config, inputs: int, targets: int, rounds: int) -> None:
    """Tells how fast both sides multiply matrices of the shapes that the layers have."""
    embed, width = config.emb_dim, config.num_heads * config.head_dim
    shapes = [
        (inputs, embed, width),
        (inputs, embed, config.mlp_dim),
        (inputs, config.mlp_dim, embed),
        (targets, embed, config.vocab_size),
    ]
    dot = jax.jit(jnp.dot)

    def multiplied(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.block_until_ready(dot(a, b))

    rng = np.random.default_rng(0)
    rows = [["product", "PyTorch, GFLOP/s", "XLA, GFLOP/s", "XLA's time / PyTorch's"]]
    for m, k, n in shapes:
        both = [rng.normal(size=shape).astype(np.float32) for shape in ((m, k), (k, n))]
        theirs, own = [torch.tensor(x) for x in both], [jnp.asarray(x) for x in both]
        times = interleaved.seconds(
            {
                "theirs": functools.partial(torch.matmul, *theirs),
                "ours": functools.partial(multiplied, *own),
            },
            10 * rounds,
        )
        speeds = [f"{2e-9 * m * k * n / np.median(times[side]):.0f}" for side in times]
        ratios = interleaved.quartiles(times["ours"] / times["theirs"])
        rows.append([f"{m} x {k} x {n}", *speeds, ratios])
    print(f"\n{text_tables.plain(rows)}")


def main() -> None:
    parser = interleaved.parser(__doc__)
    parser.add_argument("--compiled", action="store_true", help="by torch.compile")
    parser.set_defaults(rounds=9)
    args = parser.parse_args()
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    config, batch = network_and_batch(args)
    theirs = peft_step.Network(config, jax.tree.map(np.asarray, batch), torch.float32)
    networks: dict[str, Calls] = {
        "peft": {
            TRAINING: theirs.training(compiled=args.compiled),
            FORWARD: theirs.forward(compiled=args.compiled),
            DECODING: theirs.decoding(args.target_length),
        },
        "lora": ours("lora", lora(8), config, batch),
        "flix": ours("flix", flix(30), config, batch),
    }
    print(
        f"\n{args.layers}+{args.layers} layers, batch {args.batch} x {args.input_length}/"
        f"{args.target_length}, {threads} threads, {args.rounds} rounds: median [quartiles]\n"
    )
    rows = [["", *(f"{name}, seconds" for name in networks), "peft / lora", "peft / flix"]]
    for what in (TRAINING, FORWARD, DECODING):
        times = interleaved.seconds(
            {name: calls[what] for name, calls in networks.items()}, args.rounds
        )
        ratios = {name: times["peft"] / times[name] for name in ("lora", "flix")}
        for name, said in (("lora", "LoRA"), ("flix", "FLix")):
            figures.tell_ratios(f"{what}, PEFT / {said}", ratios[name])
        seconds = [f"{np.median(of):.3f}" for of in times.values()]
        rows.append([what, *seconds, *(interleaved.quartiles(of) for of in ratios.values())])
    print(text_tables.plain(rows))
    products(config, args.batch * args.input_length, args.batch * args.target_length, args.rounds)


if __name__ == "__main__":
    main()
