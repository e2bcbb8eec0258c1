"""What a training step with FLARE takes on a TPU, by its compiler, against LoRA and input fusion.

    python benchmarks/flare_plan.py [--topology v5e:2x2] [--rows 32] [--input_length 512]

Compiles the training step of mT5-base (bfloat16 base, minimal remat, AdamW over the adapters) for
every side of benchmarks/flare.py that is asked for, and prints the memory of a device and the
cycles that the TPU compiler estimates without collectives. Nothing is computed. Rows are those of a
device.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from adapted import flix, lora

from flix_jax.adapters.fusion import FUNCTIONS, Fusion
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.experiments import compiled, topology
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder, Layout
from flix_jax.models.t5 import Transformer
from flix_jax.training import partitioning
from flix_jax.training.optimizers import Optimizer
from flix_jax.training.parameters import Parameters
from flix_jax.training.partitioning import MeshSpec
from flix_jax.training.step import train_step

MT5_BASE = T5Config(
    vocab_size=250112,
    emb_dim=768,
    num_heads=12,
    head_dim=64,
    mlp_dim=2048,
    num_encoder_layers=12,
    num_decoder_layers=12,
    dtype="bfloat16",
)


def measure(
    spec: AdapterSpec, config: T5Config, devices: list[Any], shapes: dict[str, tuple[int, int]]
) -> tuple[int, int]:
    """(bytes of a device, estimated cycles) of a training step."""
    mesh = MeshSpec(data=-1).make(devices)
    rules = MeshSpec().rules.table("activations")
    layout = Layout(mesh.abstract_mesh, tuple((name, axes or None) for name, axes in rules.items()))
    model = EncoderDecoder(Transformer(config), spec, layout=layout)
    shapes = shapes | {"feature_ids": (1, spec.space.num_slots)}
    parameters = Parameters(model, {n: (1, s[1]) for n, s in shapes.items()}, mesh, True)
    optimizer = Optimizer("adamw").build(1000)
    state = parameters.state_template(optimizer)
    by_batch = partitioning.batch_sharding(mesh)
    whole = partitioning.replicated(mesh)
    rows = shapes["encoder_input_tokens"][0]
    batch = {
        name: jax.ShapeDtypeStruct((rows, size), jnp.int32, sharding=by_batch)
        for name, (_, size) in shapes.items()
    }
    program = jax.jit(
        train_step(model.loss, optimizer),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), whole),
    )
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    frozen = parameters.frozen_template("bfloat16")
    done: Any = program.lower(state, frozen, batch, seed).compile()
    sizes = done.memory_analysis()
    memory = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    return memory, compiled.read(done.as_text()).cycles


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--rows", type=int, default=32, help="of a device")
    parser.add_argument("--input_length", type=int, default=512)
    parser.add_argument("--target_length", type=int, default=128)
    parser.add_argument("--functions", nargs="*", default=list(FUNCTIONS), choices=FUNCTIONS)
    parser.add_argument("--only", help="a side by its name; ratios are to the first that is there")
    parser.add_argument("--scan", action="store_true", help="scanned layers")
    parser.add_argument("--remat", default="minimal")
    args = parser.parse_args()
    topology.use(args.topology)
    there = topology.find(args.topology)
    if not there.devices:
        raise SystemExit(there.missing)
    config = dataclasses.replace(MT5_BASE, scan_layers=args.scan, remat=args.remat)
    rows = args.rows * len(there.devices)
    targets = (rows, args.target_length)
    plain = {
        "encoder_input_tokens": (rows, args.input_length),
        "decoder_input_tokens": targets,
        "decoder_target_tokens": targets,
    }
    sourced = plain | {"source_input_tokens": (rows, args.input_length)}
    doubled = plain | {"encoder_input_tokens": (rows, 2 * args.input_length)}

    def fused(spec: AdapterSpec, function: str) -> AdapterSpec:
        return dataclasses.replace(spec, fusion=Fusion(function))

    sides: dict[str, tuple[AdapterSpec, dict[str, tuple[int, int]]]] = {"lora r8": (lora(8), plain)}
    for function in args.functions:
        sides[f"lora r8, {function}"] = fused(lora(8), function), sourced
    sides["flix 30"] = flix(30), plain
    sides["flix 30, add_relu"] = fused(flix(30), "add_relu"), sourced
    sides["lora r8, input fusion"] = lora(8), doubled
    print(
        f"{there.name}, mT5-base {'scanned' if args.scan else 'in a loop'}, remat {args.remat}, "
        f"{args.rows} rows of a device, {args.input_length} tokens in, {args.target_length} out\n"
    )
    if args.only is not None:
        sides = {args.only: sides[args.only]}
    print("| side | memory of a device | / first | cycles | / first |")
    print("|---|---:|---:|---:|---:|")
    first: tuple[int, int] | None = None
    for name, (spec, shapes) in sides.items():
        memory, cycles = measure(spec, config, list(there.devices), shapes)
        first = first or (memory, cycles)
        slower = f"{cycles / first[1]:.3f}" if first[1] else ""
        print(
            f"| {name} | {memory / 2**30:.2f} GiB | {memory / first[0]:.3f} | "
            f"{cycles / 1e6:,.1f} million | {slower} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
