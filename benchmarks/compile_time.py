"""Compile time of the training step at 12 + 12 against 24 + 24 scanned layers.

    python benchmarks/compile_time.py [--topology cpu:1] [--rounds 3] [--width 256]

One network, adapted with FLix (30 features of rank 4), differs in its number of layers alone. Both
depths are lowered and compiled in each round, in turns, in one process, and a ratio is taken within
its round. `--topology v5e:4x4` asks the TPU compiler (pip install '.[tpu]'), where none is there.
Seconds are those of the process on all its cores, so that others on the machine do not count.
"""

import argparse
import functools
import statistics
import time

from flix_jax.experiments import topology


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="cpu:1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    arguments = parser.parse_args()
    topology.use(arguments.topology)  # before JAX starts

    import jax
    import jax.numpy as jnp

    from flix_jax.adapters import injection, tables
    from flix_jax.adapters.features import FeatureSpace, FeatureType
    from flix_jax.adapters.injection import AdapterSpec
    from flix_jax.models.config import T5Config
    from flix_jax.models.encoder_decoder import EncoderDecoder
    from flix_jax.models.t5 import Transformer
    from flix_jax.training import partitioning
    from flix_jax.training.optimizers import Optimizer
    from flix_jax.training.parameters import Parameters
    from flix_jax.training.step import train_step

    found = topology.find(arguments.topology)
    mesh = partitioning.MeshSpec().make(found.devices)
    names = [tuple(f"v{i}" for i in range(count)) for count in (10, 20)]
    space = FeatureSpace((FeatureType("task", names[0]), FeatureType("language", names[1])))
    rows, inputs, targets = found.count, 512, 128

    def seconds(layers: int) -> float:
        config = T5Config(
            vocab_size=4096,
            emb_dim=arguments.width,
            num_heads=arguments.width // 64,
            head_dim=64,
            mlp_dim=2 * arguments.width,
            num_encoder_layers=layers,
            num_decoder_layers=layers,
            scan_layers=True,
            remat="full",
            dtype="bfloat16",
        )
        spec = AdapterSpec(space)
        model = EncoderDecoder(Transformer(config), spec)
        shapes = {"encoder_input_tokens": (rows, inputs), "feature_ids": (rows, space.num_slots)}
        for name in ("input_tokens", "target_tokens", "loss_weights"):
            shapes[f"decoder_{name}"] = (rows, targets)
        init = functools.partial(model.init, batch_shapes=shapes)
        best = functools.partial(tables.choose, parameters=0)
        kinds = {
            layer.path: best(layer, space, 1, found.devices[0].platform)
            for layer in injection.matches(spec, init, jax.random.key(0)).matched
        }
        parameters = Parameters(
            model,
            shapes,
            mesh,
            adapters=True,
            kinds={path: kind for path, kind in kinds.items() if kind is not None},
            spec=spec,
            dtype=config.dtype,
        )
        optimizer = Optimizer("adamw").build(1000)
        state = parameters.state_template(optimizer)
        split = partitioning.batch_sharding(mesh)
        batch = {n: jax.ShapeDtypeStruct(s, jnp.int32, sharding=split) for n, s in shapes.items()}
        step = jax.jit(
            train_step(model.loss, optimizer, tables=parameters.tables),
            donate_argnums=0,
            out_shardings=(
                jax.tree.map(lambda x: x.sharding, state),
                partitioning.replicated(mesh),
            ),
        )
        started = time.process_time()
        step.lower(state, parameters.templates[1], batch, 0).compile()
        return time.process_time() - started

    seconds(1)  # what a first compilation alone pays
    ratios = []
    for number in range(arguments.rounds):
        order = (12, 24) if number % 2 == 0 else (24, 12)
        took = {layers: seconds(layers) for layers in order}
        ratios.append(took[24] / took[12])
        print(
            f"12 + 12 layers {took[12]:.1f} s, 24 + 24 layers {took[24]:.1f} s, "
            f"ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(
        f"{arguments.topology}, width {arguments.width}: ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
