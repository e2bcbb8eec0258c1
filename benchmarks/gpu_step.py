"""Training step of FLix on a GPU, against what it is to be measured by.

    python benchmarks/gpu_step.py [--model large] [--rows 16] [--sides frozen,banks,rows,lora,peft]

An mT5-shaped network with random parameters, its base frozen in bfloat16, dropout as in training,
on one device. All sides are interleaved in one process: each round runs every side a few steps, and
a ratio is taken within its round. A side is

    frozen              no adapters: forward, and backward to the embedded inputs of both stacks
    banks, rows, all    the training step of FLix (two types, two features of rank 4 active for each
                        example), by what `Run.tables` makes of the banks, AdamW included
    lora                the training step with one shared update of rank 8
    everything          the training step of full fine-tuning, its parameters in float32
    peft                Hugging Face's network with PEFT's LoRA of rank 8, bfloat16, torch.compile
                        and AdamW; the same rate of dropout, batch and lengths (needs torch,
                        transformers and peft)

Model-FLOPs are those of products, forward and for gradients with respect to activations and to what
is trained; of the peak of the device's bfloat16 units without sparsity.
"""

import argparse
import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other framework needs some

import interleaved
import jax
import jax.numpy as jnp
import numpy as np
from adapted import flix, lora, perturbed_embeddings

from flix_jax.adapters import tables, tree
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer
from flix_jax.training import partitioning
from flix_jax.training.optimizers import Optimizer
from flix_jax.training.parameters import Parameters
from flix_jax.training.step import train_step

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 384, "emb_dim": 32, "mlp_dim": 64, "num_heads": 2, "head_dim": 16},
    "base": {"vocab_size": 250_112, "emb_dim": 768, "mlp_dim": 2048, "num_heads": 12},
    "large": {"vocab_size": 250_112, "emb_dim": 1024, "mlp_dim": 2816, "num_heads": 16},
}
LAYERS = {"tiny": 2, "base": 12, "large": 24}
#: FLOPs a second of bfloat16 products, without sparsity (NVIDIA's data sheets, SXM).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
FLIX = ("banks", *tables.KINDS)
SIDES = ("frozen", *FLIX, "lora", "everything", "peft")


class Side(interleaved.Timed):
    """A step that is run several times before it is waited for."""

    def __init__(self, name: str, flops: float, repeats: int):
        self.name, self.flops, self.repeats = name, flops, repeats
        self.times: list[float] = []

    def once(self) -> Any:
        """Starts a step; what it gives can be waited for, and is a loss."""
        raise NotImplementedError

    def run(self, clock: Callable[[], float]) -> None:
        start = clock()
        losses = [self.once() for _ in range(self.repeats)]
        value = float(losses[-1])
        self.times.append((clock() - start) / self.repeats)
        if not np.isfinite(value):
            raise RuntimeError(f"{self.name}: loss is {value}")


class Ours(Side):
    """A side of this package."""

    def compiled(
        self, function: Callable[..., Any], donated: tuple[int, ...], *arguments: Any
    ) -> Any:
        start = time.perf_counter()
        made = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
        memory = made.memory_analysis()
        temporary = 0.0 if memory is None else memory.temp_size_in_bytes / 2**30
        print(
            f"compiled {self.name}: {time.perf_counter() - start:.1f} s, "
            f"temporaries {temporary:.1f} GiB",
            flush=True,
        )
        return made


class Training(Ours):
    """A training step, of adapters or of everything."""

    def __init__(self, name, flops, repeats, model, shapes, batch, frozen, config, table=None):
        super().__init__(name, flops, repeats)
        spec = model.adapters
        mesh = partitioning.MeshSpec().make(jax.devices()[:1])
        parameters = Parameters(
            model,
            shapes,
            mesh,
            adapters=spec is not None,
            spec=spec,
            dtype=config.dtype,
        )
        if table is not None:
            paths = (path for path, _ in tree.named_leaves(parameters.templates[0]))
            kinds = dict.fromkeys(map(tree.layer_of, paths), table)
            parameters = dataclasses.replace(parameters, kinds=kinds)
        optimizer = Optimizer("adamw").build(1000)
        if spec is not None:
            trained = parameters.fresh_adapters(0)
        else:
            trained, frozen = jax.tree.map(lambda x: x.astype(jnp.float32), frozen), {}
        self.state = parameters.create_state(trained, optimizer)
        self.rest = frozen, batch, np.int32(0)
        step = train_step(model.loss, optimizer, tables=parameters.tables)
        self.step = self.compiled(step, (0,), self.state, *self.rest)

    def once(self) -> Any:
        self.state, metrics = self.step(self.state, *self.rest)
        return metrics["loss"]


class Frozen(Ours):
    """Forward, and backward to the embedded inputs."""

    def __init__(self, name, flops, repeats, model, batch, frozen, config):
        super().__init__(name, flops, repeats)
        perturbations = tuple(
            jnp.zeros((*batch[f"{part}_input_tokens"].shape, config.emb_dim), config.dtype)
            for part in ("encoder", "decoder")
        )

        def loss(perturbations, frozen, batch, key):
            with perturbed_embeddings(perturbations):
                total, sums = model.loss(frozen, batch, rng=key)
            return total / sums["weight"]

        def step(gradients, perturbations, frozen, batch):
            del gradients  # donated: its buffers take the new gradients
            value, gradients = jax.value_and_grad(loss)(
                perturbations, frozen, batch, jax.random.key(0)
            )
            return gradients, value

        self.gradients = jax.tree.map(jnp.zeros_like, perturbations)
        self.rest = perturbations, frozen, batch
        self.step = self.compiled(step, (0,), self.gradients, *self.rest)

    def once(self) -> Any:
        self.gradients, value = self.step(self.gradients, *self.rest)
        return value


class Peft(Side):
    """Hugging Face's network with PEFT's LoRA."""

    def __init__(self, name, flops, repeats, batch, config):
        import peft_step

        super().__init__(name, flops, repeats)
        start = time.perf_counter()
        tokens = {key: np.asarray(value) for key, value in batch.items()}
        self.step = peft_step.Network(config, tokens).training(compiled=True)
        value = float(self.step())
        print(f"compiled {name}: {time.perf_counter() - start:.1f} s, loss {value:.3f}", flush=True)

    def once(self) -> Any:
        return self.step()


def model_flops(
    config: T5Config, rows: int, inputs: int, targets: int, *, columns: int = 0, kernels: int = 2
) -> float:
    """Of a step.

    Args:
      config: of the network.
      rows, inputs, targets: of the batch.
      columns: trained low-rank columns of each example beside every kernel.
      kernels: products of a kernel: 2 where it is frozen, 3 where it is trained.
    """
    width, embed = config.num_heads * config.head_dim, config.emb_dim
    mlp = [(embed, config.mlp_dim)] * 2 + [(config.mlp_dim, embed)]
    projections = [(embed, width)] * 3 + [(width, embed)]
    seen = [  # a number of layers, the tokens that go through their kernels, the kernels
        (config.num_encoder_layers, inputs, projections + mlp),
        (config.num_decoder_layers, inputs, [(embed, width)] * 2),
        (config.num_decoder_layers, targets, projections + [(embed, width)] * 2 + mlp),
    ]
    total = 2.0 * kernels * rows * targets * embed * config.vocab_size
    for layers, tokens, shapes in seen:
        for d_in, d_out in shapes:
            each = 2.0 * kernels * d_in * d_out + 6.0 * columns * (d_in + d_out)
            total += rows * layers * tokens * each
    attended = config.num_encoder_layers * inputs**2
    attended += config.num_decoder_layers * (targets**2 + targets * inputs)
    return total + 3 * 4.0 * rows * width * attended


def make_batch(rng: np.random.Generator, args: argparse.Namespace, vocabulary: int) -> Any:
    lengths = {
        "encoder_input_tokens": args.input_length,
        "decoder_input_tokens": args.target_length,
        "decoder_target_tokens": args.target_length,
    }
    return {
        name: jnp.asarray(rng.integers(2, vocabulary, (args.rows, length)), jnp.int32)
        for name, length in lengths.items()
    }


def random_base(model: EncoderDecoder, shapes: Any, dtype: str) -> Any:
    mesh = partitioning.MeshSpec().make(jax.devices()[:1])
    return Parameters(model, shapes, mesh, adapters=True).random(0, dtype)[1]


def make_sides(args: argparse.Namespace) -> list[Side]:
    shape = MODELS[args.model]
    config = T5Config(
        **shape,
        num_encoder_layers=LAYERS[args.model],
        num_decoder_layers=LAYERS[args.model],
        dropout_rate=0.1,
        dtype="bfloat16",
        scan_layers=not args.unrolled,
        remat=args.remat,
    )
    module, rng = Transformer(config), np.random.default_rng(0)
    batch = make_batch(rng, args, config.vocab_size)

    def model(spec: AdapterSpec | None) -> EncoderDecoder:
        return EncoderDecoder(module, spec, loss_chunks=args.loss_chunks)

    def with_features(spec: AdapterSpec) -> tuple[Any, Any]:
        ids = np.stack(
            [rng.integers(0, t.num_values, args.rows) for t in spec.space.slot_types], axis=1
        )
        own = batch | {"feature_ids": jnp.asarray(ids, jnp.int32)}
        return own, {name: (1, *value.shape[1:]) for name, value in own.items()}

    bare = {name: (1, *value.shape[1:]) for name, value in batch.items()}
    frozen = random_base(model(None), bare, config.dtype)
    flops = functools.partial(model_flops, config, args.rows, args.input_length, args.target_length)
    made: list[Side] = []
    for name in args.sides:
        columns = 0 if name in ("frozen", "everything") else 8
        kernels = 3 if name == "everything" else 2
        start = name, flops(columns=columns, kernels=kernels), args.repeats
        if name == "peft":
            made.append(Peft(*start, batch, config))
        elif name == "frozen":
            made.append(Frozen(*start, model(None), batch, frozen, config))
        elif name == "everything":
            made.append(Training(*start, model(None), bare, batch, frozen, config))
        else:
            spec = lora(8) if name == "lora" else flix(args.features)
            own, shapes = with_features(spec)
            table = tables.KINDS.get(name)
            made.append(Training(*start, model(spec), shapes, own, frozen, config, table))
    return made


def table(sides: list[Side], peak: float | None) -> list[tuple[str, ...]]:
    first = sides[0]
    lines: list[tuple[str, ...]] = [("side", "ms", f"/ {first.name}", "share of peak")]
    for side in sides:
        seconds = np.median(side.times)
        share = "" if peak is None else f"{side.flops / seconds / peak:.1%}"
        lines.append((side.name, f"{1e3 * seconds:.2f}", interleaved.ratio(side, first), share))
    return lines


def names(text: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in SIDES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SIDES)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="large")
    parser.add_argument("--sides", type=names, default=list(SIDES))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--input_length", type=int, default=512)
    parser.add_argument("--target_length", type=int, default=128)
    parser.add_argument("--features", type=int, default=30)
    parser.add_argument("--loss_chunks", type=int, default=1)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--unrolled", action="store_true", help="layers in a loop, not scanned")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=3, help="steps before a wait")
    parser.add_argument("--profile", help="a folder for a trace of one step of each side")
    args = parser.parse_args()

    device = jax.devices()[0]
    peak = next((PEAKS[name] for name in PEAKS if name in device.device_kind), None)
    sides = make_sides(args)
    interleaved.run(sides, args.rounds, time.perf_counter)
    if args.profile:
        for side in sides:
            with jax.profiler.trace(f"{args.profile}/{side.name}"):
                side.run(time.perf_counter)
            side.times.pop()
    print(
        f"\n{device.device_kind}, jax {jax.__version__}; mT5 {args.model}, {args.rows} x "
        f"{args.input_length}/{args.target_length}, {args.features} features, loss chunks "
        f"{args.loss_chunks}, remat {args.remat}, {'unrolled' if args.unrolled else 'scanned'}; "
        f"{args.rounds} rounds of {args.repeats} steps: median [quartiles]"
    )
    for name, milliseconds, ratio, share in table(sides, peak):
        print(f"{name:<12}{milliseconds:>9}  {ratio:<24}{share:>8}")


if __name__ == "__main__":
    main()
