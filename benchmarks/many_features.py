"""Training steps of FLix over the number of features, the optimizer included.

    python benchmarks/many_features.py [--features 4 30 1000] [--batch 16] [--clock cpu]

One network at mT5-small's widths (vocabulary reduced), whole steps with AdamW and clipping, all
sides interleaved in one process: every number of features with an optimizer that updates all of
them and with one that is lazy (`Optimizer.lazy`), two features of rank 4 for each example, drawn
from all; and of the largest number, lazy, batches of few different features.
"""

import dataclasses
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import figures
import flax.linen as nn
import interleaved
import jax
import jax.numpy as jnp
import numpy as np
from adapted import flix, network_and_batch

from flix_jax.adapters import present, tree
from flix_jax.adapters.activation import FeatureSettings
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer
from flix_jax.training.lazy import lazy_step, state_places
from flix_jax.training.optimizers import Optimizer
from flix_jax.training.step import Step, TrainState, train_step


class Side(interleaved.Timed):
    """One compiled training step, its state in place of gradients."""

    def __init__(
        self,
        name: str,
        features: int,
        lazy: bool,
        distinct: int | None,
        config: T5Config,
        batch: dict[str, Any],
    ):
        self.name, self.features, self.lazy, self.distinct = name, features, lazy, distinct
        spec = flix(features)
        model = EncoderDecoder(Transformer(config), spec)
        rng = np.random.default_rng(0)
        rows = len(batch["encoder_input_tokens"])
        if distinct is None:
            ids = rng.integers(0, [t.num_values for t in spec.space.types], (rows, 2))
        else:
            ids = np.repeat(np.arange(rows)[:, None] % (distinct // 2), 2, axis=1)
        self.batch = {**batch, "feature_ids": jnp.asarray(ids, jnp.int32)}
        boxed = jax.eval_shape(
            lambda: model.init(jax.random.key(0), {k: x.shape for k, x in self.batch.items()})
        )
        params = jax.tree.map(
            lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.05, s.dtype), nn.meta.unbox(boxed)
        )
        self.base, adapters = tree.split_adapters(params)
        optimizer = Optimizer().build(1000)
        self.gradients = TrainState.create(adapters, optimizer)
        step: Step = train_step(model.loss, optimizer)
        if lazy:
            step = self.lazily(model, optimizer, rows)

        def timed(state: Any, base: Any, batch: Any) -> tuple[Any, Any]:
            state, metrics = step(state, base, batch, 0)
            return metrics["loss"], state

        self.compile(timed, donated=0)

    def lazily(self, model: EncoderDecoder, optimizer: Any, rows: int) -> Step:
        assert model.adapters is not None
        space = model.adapters.space
        narrow = present.narrowed(space, rows)
        own = dataclasses.replace(model, adapters=dataclasses.replace(model.adapters, space=narrow))
        settings = FeatureSettings.of(space, None)
        places = tree.from_named(
            [
                (path, present.Place(path[-2]))
                for path, _ in tree.named_leaves(self.gradients.trained)
            ]
        )

        def step_of(there: present.Present) -> Step:
            taken = present.settings_of(settings, there)
            return train_step(dataclasses.replace(own, settings=taken).loss, optimizer)

        return lazy_step(step_of, space, narrow, state_places(places, optimizer, self.gradients))

    def arguments(self) -> tuple[Any, ...]:
        return self.gradients, self.base, self.batch


def main() -> None:
    parser = interleaved.parser(__doc__)
    parser.add_argument("--features", type=int, nargs="*", default=[4, 30, 1000])
    parser.add_argument("--distinct", type=int, nargs="*", default=[2, 16, 32])
    args = parser.parse_args()
    config, batch = network_and_batch(args)
    sides = []
    for number in args.features:
        for lazy in (False, True):
            name = f"{number} features{', lazy' if lazy else ''}"
            sides.append(Side(name, number, lazy, None, config, batch))
    most = max(args.features)
    several = [Side(f"{most}, {n} in a batch", most, True, n, config, batch) for n in args.distinct]
    interleaved.run([*sides, *several], args.rounds, interleaved.CLOCKS[args.clock])
    print(
        f"\n{args.layers}+{args.layers} layers, batch {args.batch} x {args.input_length}/"
        f"{args.target_length}, {os.cpu_count()} cores, {args.clock} time, {args.rounds} rounds: "
        "median [quartiles]"
    )
    row = "{:<24}{:>9}  {:<22}{:<22}"
    first = several[0].name if several else ""
    print(row.format("side", "seconds", f"/ {sides[0].name}", f"/ {first}" if several else ""))
    for side in [*sides, *several]:
        least = interleaved.ratio(side, several[0]) if side in several else ""
        seconds = f"{np.median(side.times):.3f}"
        print(row.format(side.name, seconds, interleaved.ratio(side, sides[0]), least))
        if side in several:
            name = f"{side.distinct} different in a batch / {several[0].distinct}"
            figures.tell_ratios(name, interleaved.ratios(side, several[0]))
        elif side.lazy:
            name = f"{side.features:,} features, lazy / {sides[0].features}"
            figures.tell_ratios(name, interleaved.ratios(side, sides[0]))


if __name__ == "__main__":
    main()
