"""What `Run.loss_chunks` saves and costs: of the loss alone, by the compiler.

    python benchmarks/chunked_loss.py [--topology v5e:2x2] [--rows 32] [--length 128]

Compiles the loss of mT5-base's vocabulary and its gradient with respect to the decoder's states
(bfloat16, frozen output layer) for a number of chunks, and prints the temporary memory of a device
and the cycles that the TPU compiler estimates, each against one chunk. Nothing is computed.
`--topology cpu:1` needs no TPU compiler and gives no cycles. Rows are those of a device.
"""

import argparse
import functools
from typing import Any

import figures
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from flix_jax.experiments import compiled, topology
from flix_jax.models import losses
from flix_jax.models.config import T5Config
from flix_jax.models.t5 import output_logits
from flix_jax.training import partitioning
from flix_jax.training.partitioning import MeshSpec


def measure(args: argparse.Namespace, devices: list[jax.Device], chunks: int) -> tuple[int, int]:
    """(temporary bytes of a device, estimated cycles)."""
    mesh = MeshSpec(data=-1).make(devices)
    config = T5Config(args.vocabulary, emb_dim=args.width, dtype="bfloat16")
    rows = args.rows * len(devices)
    by_batch = partitioning.batch_sharding(mesh)
    kernel = jax.ShapeDtypeStruct(
        (args.width, args.vocabulary),
        args.frozen_dtype,
        sharding=NamedSharding(mesh, PartitionSpec()),
    )
    states = jax.ShapeDtypeStruct((rows, args.length, args.width), jnp.bfloat16, sharding=by_batch)
    tokens = jax.ShapeDtypeStruct((rows, args.length), jnp.int32, sharding=by_batch)
    head = functools.partial(output_logits, config)

    def loss(states, params, targets):
        weights = targets > 0
        if chunks == 1:
            return losses.weighted_sums(head(params, states), targets, weights)
        return losses.chunked_sums(head, params, states, targets, weights, chunks=chunks)

    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    done: Any = program.lower(states, {"kernel": kernel}, tokens).compile()
    return done.memory_analysis().temp_size_in_bytes, compiled.read(done.as_text()).cycles


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--rows", type=int, default=32, help="of a device")
    parser.add_argument("--length", type=int, default=128, help="of the targets, in tokens")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=250112)
    parser.add_argument("--frozen_dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--chunks", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    args = parser.parse_args()
    topology.use(args.topology)
    there = topology.find(args.topology)
    if not there.devices:
        raise SystemExit(there.missing)
    print(
        f"{there.name}, {args.rows} × {args.length} targets of a device, width {args.width}, "
        f"vocabulary {args.vocabulary:,}, output layer {args.frozen_dtype}\n"
    )
    print("| chunks | temporaries | / one chunk | cycles | / one chunk |")
    print("|---:|---:|---:|---:|---:|")
    first: tuple[int, int] | None = None
    for chunks in args.chunks:
        memory, cycles = measure(args, list(there.devices), chunks)
        first = first or (memory, cycles)
        slower = f"{cycles / first[1]:.3f}" if first[1] else ""
        if chunks == 4:
            figures.tell("temporary memory", memory / first[0])
            if first[1]:
                figures.tell("cycles", cycles / first[1])
        print(
            f"| {chunks} | {memory / 2**20:,.0f} MiB | {memory / first[0]:.3f} | "
            f"{cycles / 1e6:,.2f} million | {slower} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
