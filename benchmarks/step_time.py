"""Step time of FLix against the frozen model and against LoRA of equal active rank.

    python benchmarks/step_time.py [--layers 8] [--batch 16] [--rounds 15] [--clock wall]

One network at mT5-small's widths (vocabulary reduced), forward and backward, all sides interleaved
in one process: each round runs every side once, and a ratio is taken within its round. A
side is the network with

    frozen         no adapters
    lora           one shared update of rank 8
    flix N         N features in two types, two active for each example, rank 4 each
    ... by cell    the same where all rows of the batch are of one cell (Run.batching), whose
                   kernels hold the update

The loss is a cross-entropy; gradients are taken with respect to the embedded inputs of encoder and
decoder on every side, so that no part of the backward pass can be dropped, and to the adapters
where there are any. Gradients go into the buffers of the last step's, as they do in training.
"""

import contextlib
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import figures
import flax.linen as nn
import interleaved
import jax
import jax.numpy as jnp
import numpy as np
from adapted import adapter_axes, flix, lora, network_and_batch, perturbed_embeddings

from flix_jax.adapters import tables
from flix_jax.adapters.activation import activate
from flix_jax.adapters.injection import AdapterSpec, inject
from flix_jax.adapters.modules import MERGED
from flix_jax.adapters.tree import count_parameters, join, split_adapters
from flix_jax.models.config import T5Config
from flix_jax.models.t5 import Transformer


class Side(interleaved.Timed):
    """One compiled forward and backward pass, its arguments, and its times."""

    def __init__(
        self,
        name: str,
        spec: AdapterSpec | None,
        config: T5Config,
        batch: dict[str, Any],
        by_cell: bool = False,
    ):
        self.name = name
        network = Transformer(config)
        rng = np.random.default_rng(0)
        rows = batch["encoder_input_tokens"].shape[0]
        ids = None
        if spec is not None:
            ids = np.stack(
                [rng.integers(0, t.num_values, rows) for t in spec.space.slot_types], axis=1
            ).astype(np.int32)
            if by_cell:
                ids = np.repeat(ids[:1], rows, axis=0)
        together = rows if by_cell else 1

        def injected(ids):
            if spec is None:
                return contextlib.nullcontext()
            return inject(spec, activate(spec.space, ids, rows=together))

        def init():
            with injected(ids):
                return network.init(jax.random.key(0), **batch, enable_dropout=False)["params"]

        boxed = jax.eval_shape(init)
        shapes = nn.meta.unbox(boxed)
        axes = adapter_axes(boxed)
        params = jax.tree.map(
            lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.05, s.dtype), shapes
        )
        self.base, self.adapters = split_adapters(params)
        self.num_adapter_parameters = count_parameters(self.adapters)
        self.perturbations = tuple(
            jnp.zeros((*batch[f"{part}_input_tokens"].shape, config.emb_dim), config.dtype)
            for part in ("encoder", "decoder")
        )

        def loss(trained, base, ids, batch):
            perturbations, adapters = trained
            if by_cell:
                own = ids[::together]
                adapters = tables.of_rows(adapters, axes, spec.space, own, name=MERGED)
            with injected(ids), perturbed_embeddings(perturbations):
                logits = network.apply(
                    {"params": join(base, adapters)}, **batch, enable_dropout=False
                )
            log_probs = jax.nn.log_softmax(logits)
            targets = batch["decoder_target_tokens"][..., None]
            return -jnp.mean(jnp.take_along_axis(log_probs, targets, axis=-1))

        def step(trained, base, ids, batch, last_gradients):
            del last_gradients  # donated: its buffers take the new gradients
            return jax.value_and_grad(loss)(trained, base, ids, batch)

        self.ids, self.batch = ids, batch
        self.gradients = jax.tree.map(jnp.zeros_like, (self.perturbations, self.adapters))
        self.compile(step, donated=4)

    def arguments(self) -> tuple[Any, ...]:
        trained = (self.perturbations, self.adapters)
        return trained, self.base, self.ids, self.batch, self.gradients


def main() -> None:
    parser = interleaved.parser(__doc__)
    parser.add_argument("--features", type=int, nargs="*", default=[4, 30, 120, 300])
    args = parser.parse_args()

    config, batch = network_and_batch(args)
    specs = {"frozen": None, "lora r8": lora(8), **{f"flix {n}": flix(n) for n in args.features}}
    sides = [Side(name, spec, config, batch) for name, spec in specs.items()]
    by_cell = {"lora r8 by cell": lora(8), **{f"flix {n} by cell": flix(n) for n in args.features}}
    sides += [Side(name, spec, config, batch, by_cell=True) for name, spec in by_cell.items()]
    interleaved.run(sides, args.rounds, interleaved.CLOCKS[args.clock])

    frozen, lora_side = sides[:2]
    print(
        f"\n{args.layers}+{args.layers} layers, batch {args.batch} x {args.input_length}/"
        f"{args.target_length}, {os.cpu_count()} cores, {args.clock} time, {args.rounds} rounds: "
        "median [quartiles]"
    )
    flattest = sides[2] if len(sides) > 2 else frozen
    header = ("side", "seconds", "/ frozen", "/ lora r8", f"/ {flattest.name}", "adapters")
    row = "{:<18}{:>9}  {:<22}{:<22}{:<22}{:>12}"
    print(row.format(*header))
    for side in sides:
        print(
            row.format(
                side.name,
                f"{np.median(side.times):.3f}",
                interleaved.ratio(side, frozen),
                interleaved.ratio(side, lora_side),
                interleaved.ratio(side, flattest),
                f"{side.num_adapter_parameters:,}",
            )
        )
    figures.tell_ratios("LoRA / frozen", interleaved.ratios(lora_side, frozen))
    lora_by_cell = next(side for side in sides if side.name == "lora r8 by cell")
    figures.tell_ratios("LoRA by cell / frozen", interleaved.ratios(lora_by_cell, frozen))
    named = {"flix 30": "FLix", "flix 30 by cell": "FLix by cell"}
    for side in (side for side in sides if side.name in named):
        name = named[side.name]
        figures.tell_ratios(f"{name} / frozen", interleaved.ratios(side, frozen))
        figures.tell_ratios(f"{name} / LoRA of rank 8", interleaved.ratios(side, lora_side))
        figures.tell_ratios(f"{name} / LoRA by cell", interleaved.ratios(side, lora_by_cell))


if __name__ == "__main__":
    main()
