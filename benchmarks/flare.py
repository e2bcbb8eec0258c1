"""Step time of adapters that read a source (FLARE) against plain LoRA and against input fusion.

    python benchmarks/flare.py [--layers 8] [--batch 16] [--rounds 15] [--scan] [--clock wall]

One network at mT5-small's widths (vocabulary reduced), loss and gradients of the adapters, all
sides interleaved in one process: each round runs every side once, and a ratio is taken within its
round. A side is one of

    lora r8        one shared update of rank 8 in every layer
    lora + φ       the same, whose query and value updates in the encoder read a source of the
                   input's length by φ: beside the step, the frozen encoder reads the source
    flix 30        30 features in two types, two active for each example, rank 4 each
    flix 30 + φ    the same with a source
    input fusion   lora r8 on inputs of twice the length, as if the source stood before them
    longer source  lora + add_relu with a source of twice the input's length

The loss is `EncoderDecoder.loss` without dropout; gradients go into the buffers of the last step's.
"""

import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses

import flax.linen as nn
import interleaved
import jax
import jax.numpy as jnp
import numpy as np
from adapted import flix, lora

from flix_jax.adapters.fusion import FUNCTIONS, Fusion
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.adapters.tree import count_parameters, join, split_adapters
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer


class Side(interleaved.Timed):
    """One compiled loss with the gradients of the adapters, its arguments, and its times."""

    def __init__(
        self,
        name: str,
        spec: AdapterSpec,
        config: T5Config,
        shapes: dict[str, tuple[int, int]],
    ):
        self.name = name
        model, rng = EncoderDecoder(Transformer(config), spec), np.random.default_rng(0)
        self.batch = {
            name: jnp.asarray(rng.integers(1, config.vocab_size, shape), jnp.int32)
            for name, shape in shapes.items()
        }
        rows = shapes["encoder_input_tokens"][0]
        ids = [rng.integers(0, t.num_values, rows) for t in spec.space.slot_types]
        self.batch["feature_ids"] = jnp.asarray(np.stack(ids, axis=1), jnp.int32)
        of = {name: array.shape for name, array in self.batch.items()}
        made = nn.meta.unbox(jax.eval_shape(lambda key: model.init(key, of), jax.random.key(0)))
        params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.05, s.dtype), made)
        self.base, self.adapters = split_adapters(params)
        self.gradients = jax.tree.map(jnp.zeros_like, self.adapters)

        def loss(adapters: Any, base: Any, batch: Any) -> jax.Array:
            return model.loss(join(base, adapters), batch)[0]

        def step(adapters: Any, base: Any, batch: Any, last: Any) -> Any:
            del last  # donated: its buffers take the new gradients
            return jax.value_and_grad(loss)(adapters, base, batch)

        self.compile(step, donated=3)
        sizes: Any = self.step.memory_analysis()
        self.temporaries = sizes.temp_size_in_bytes

    def arguments(self) -> tuple[Any, ...]:
        return self.adapters, self.base, self.batch, self.gradients


def main() -> None:
    parser = interleaved.parser(__doc__)
    parser.add_argument("--functions", nargs="*", default=list(FUNCTIONS), choices=FUNCTIONS)
    parser.add_argument("--scan", action="store_true", help="scanned layers")
    parser.add_argument("--remat", default="none")
    args = parser.parse_args()
    config = T5Config(
        vocab_size=args.vocabulary,
        num_encoder_layers=args.layers,
        num_decoder_layers=args.layers,
        dropout_rate=0.0,
        scan_layers=args.scan,
        remat=args.remat,
    )
    inputs, targets = (args.batch, args.input_length), (args.batch, args.target_length)
    plain = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": targets,
        "decoder_target_tokens": targets,
    }
    doubled = (args.batch, 2 * args.input_length)

    def fused(spec: AdapterSpec, function: str) -> AdapterSpec:
        return dataclasses.replace(spec, fusion=Fusion(function))

    sourced = plain | {"source_input_tokens": inputs}
    kinds: dict[str, tuple[AdapterSpec, dict[str, tuple[int, int]]]] = {"lora r8": (lora(8), plain)}
    for function in args.functions:
        kinds[f"lora + {function}"] = fused(lora(8), function), sourced
    kinds["flix 30"] = flix(30), plain
    kinds["flix 30 + add_relu"] = fused(flix(30), "add_relu"), sourced
    kinds["input fusion"] = lora(8), plain | {"encoder_input_tokens": doubled}
    longer = plain | {"source_input_tokens": doubled}
    kinds["longer source"] = fused(lora(8), "add_relu"), longer

    sides = {name: Side(name, spec, config, shapes) for name, (spec, shapes) in kinds.items()}
    interleaved.run(list(sides.values()), args.rounds, interleaved.CLOCKS[args.clock])

    print(
        f"\n{args.layers}+{args.layers} layers, {'scanned' if args.scan else 'in a loop'}, remat "
        f"{args.remat}, batch {args.batch} x {args.input_length}/{args.target_length}, "
        f"{os.cpu_count()} cores, {args.clock} time, {args.rounds} rounds: median [quartiles]"
    )
    row = "{:<36}{:>9}  {:<24}{:<24}{:>10}{:>14}"
    header = ("side", "seconds", "/ lora r8", "/ input fusion", "temp MiB", "adapters")
    print(row.format(*header))
    for name, side in sides.items():
        print(
            row.format(
                name,
                f"{np.median(side.times):.3f}",
                interleaved.ratio(side, sides["lora r8"]),
                interleaved.ratio(side, sides["input fusion"]),
                f"{side.temporaries / 2**20:,.0f}",
                f"{count_parameters(side.adapters):,}",
            )
        )


if __name__ == "__main__":
    main()
