"""What `Run.not_finite = 'skip'` adds to a training step: the select over what is trained.

    python benchmarks/skip_cost.py [--layers 8] [--batch 16] [--rounds 15] [--clock wall]

One network at mT5-small's widths (vocabulary reduced), the whole training step with AdamW, all
sides interleaved in one process: each round runs every side once, and a ratio is taken within its
round. With adapters (120 features in two types, two active for each example, rank 4 each), and with
every parameter trained.
"""

import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import interleaved
import jax
import jax.numpy as jnp
import numpy as np
from adapted import flix, tokens

from flix_jax.adapters.injection import AdapterSpec
from flix_jax.adapters.tree import split_adapters
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer
from flix_jax.training.optimizers import Optimizer
from flix_jax.training.step import TrainState, train_step


class Side(interleaved.Timed):
    """One compiled training step; its state is what the steps hand on (`gradients`)."""

    def __init__(
        self,
        name: str,
        spec: AdapterSpec | None,
        config: T5Config,
        batch: dict[str, Any],
        skip: bool,
    ):
        self.name = name
        model = EncoderDecoder(Transformer(config), spec)
        self.batch = {k: v for k, v in batch.items() if spec is not None or k != "feature_ids"}
        shapes = {name: array.shape for name, array in self.batch.items()}
        params = nn.meta.unbox(jax.jit(lambda key: model.init(key, shapes))(jax.random.key(0)))
        base, adapters = split_adapters(params)
        trained, self.frozen = (params, {}) if spec is None else (adapters, base)
        optimizer = Optimizer("adamw").build(1000)
        self.gradients = TrainState.create(trained, optimizer)
        step = train_step(model.loss, optimizer, skip=skip)

        def timed(state, frozen, batch):
            state, metrics = step(state, frozen, batch, 0)
            return metrics["loss"], state

        self.compile(timed, donated=0)

    def arguments(self) -> tuple[Any, ...]:
        return self.gradients, self.frozen, self.batch


def main() -> None:
    args = interleaved.parser(__doc__).parse_args()
    config = T5Config(
        vocab_size=args.vocabulary,
        num_encoder_layers=args.layers,
        num_decoder_layers=args.layers,
        scan_layers=True,
    )
    rng = np.random.default_rng(1)
    batch = tokens(rng, args.vocabulary, args.batch, args.input_length, args.target_length)
    spec = flix(120)
    ids = [rng.integers(0, t.num_values, args.batch) for t in spec.space.slot_types]
    batch["feature_ids"] = jnp.asarray(np.stack(ids, axis=1), jnp.int32)
    sides = [
        Side(f"{what}, {'skip' if skip else 'stop'}", of, config, batch, skip)
        for what, of in (("adapters", spec), ("everything", None))
        for skip in (False, True)
    ]
    interleaved.run(sides, args.rounds, interleaved.CLOCKS[args.clock])
    for stop, skip in (sides[:2], sides[2:]):
        print(
            f"{skip.name}: {np.median(skip.times):.3f} s, "
            f"{interleaved.ratio(skip, stop)} of {stop.name}"
        )


if __name__ == "__main__":
    main()
