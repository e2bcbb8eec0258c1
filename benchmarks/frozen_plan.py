"""What adapters cost on a TPU pod against the frozen network, by the TPU compiler.

    pip install '.[tpu]'
    python benchmarks/frozen_plan.py [--pod mt5_base_v5e_16x16] [--rows 1] [--gin BINDING ...]

Compiles, for a file of configs/pods, the training step of FLix, of FLix with a lazy optimizer and
of LoRA of equal active rank, and the forward and backward pass of the network without adapters
(gradients with respect to the embedded inputs of encoder and decoder, so that no part of the
backward pass is dropped), and prints the cycles that the compiler estimates, loops counted as often
as they run, without collectives. Features, lengths and data as in benchmarks/plan_table.py. Nothing
runs on a TPU. With --topology=cpu:N there are no cycles.
"""

import argparse
import dataclasses
import pathlib
import tempfile
from typing import Any

import figures
import plan_table

SIDES = {
    "frozen": ("flix", []),
    "LoRA": ("lora", []),
    "FLix": ("flix", []),
    "FLix, lazy": ("flix", ["Optimizer.lazy=True"]),
}


def compile_side(side: str, pod: str, bindings: list[str], topology_name: str) -> Any:
    """The compiled program of a side."""
    import jax
    import jax.numpy as jnp
    from adapted import perturbed_embeddings

    from flix_jax import configuration
    from flix_jax.experiments import topology
    from flix_jax.experiments.job import Job
    from flix_jax.experiments.step_program import step_program
    from flix_jax.training import partitioning

    kind, own = SIDES[side]
    there = topology.find(topology_name)
    if not there.devices:
        raise SystemExit(there.missing)
    with tempfile.TemporaryDirectory() as folder:
        plan_table.write_data(pathlib.Path(folder))
        files = ["configs/experiments/xtreme_up.gin", f"configs/pods/{pod}.gin"]
        files += [f"configs/adapters/{kind}.gin"]
        bindings = [*plan_table.BINDINGS, f"DATA_DIR={folder!r}", *bindings, *own]
        run = configuration.load(files, bindings).build("Run")
        job = Job(run, f"{folder}/run", mesh=run.mesh.make(there.devices))
    by_batch = partitioning.batch_sharding(job.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_batch)
        for name, shape in job.batch_shapes(run.batch_size).items()
    }
    if side != "frozen":
        optimizer = job.optimizer()
        state = job.parameters.state_template(optimizer)
        seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioning.replicated(job.mesh))
        program = step_program(job, state)
        return program.lower(state, job.frozen_template, batch, seed).compile()
    network = dataclasses.replace(job.model, adapters=None)
    del batch["feature_ids"]
    perturbations = tuple(
        jax.ShapeDtypeStruct(
            (*batch[f"{part}_input_tokens"].shape, run.model.emb_dim),
            run.model.dtype,
            sharding=by_batch,
        )
        for part in ("encoder", "decoder")
    )

    def loss(perturbations: Any, frozen: Any, batch: Any, seed: Any) -> Any:
        with perturbed_embeddings(perturbations):
            return network.loss(frozen, batch, rng=jax.random.key(seed))

    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return program.lower(perturbations, job.frozen_template, batch, 0).compile()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pod", default="mt5_base_v5e_16x16", help="a file of configs/pods")
    parser.add_argument("--topology", help="another one than the pod's")
    parser.add_argument("--rows", type=int, help="of a chip (default: the file's)")
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    args = parser.parse_args()
    from flix_jax.experiments import topology

    name = args.topology or plan_table.topology_of(args.pod)
    topology.use(name)
    from flix_jax.experiments import compiled

    bindings = list(args.gin)
    if args.rows is not None:
        bindings.append(f"Run.batch_size={args.rows * topology.find(name).count}")
    rows = "rows as in the file" if args.rows is None else f"{args.rows} rows of a chip"
    print(f"{args.pod} for {name}, {rows}{''.join(f', {b}' for b in args.gin)}\n")
    print("| side | memory of a chip | cycles | / " + f"{args.sides[0]} |")
    print("|---|---:|---:|---:|")
    first = 0
    for side in args.sides:
        done = compile_side(side, args.pod, bindings, name)
        sizes = done.memory_analysis()
        memory = (sizes.argument_size_in_bytes + sizes.temp_size_in_bytes) / 2**30
        cycles = compiled.read(done.as_text()).cycles
        first = first or cycles
        ratio = f"{cycles / first:.3f}" if first else ""
        if first:
            figures.tell(f"{side} / {args.sides[0]}", cycles / first)
        print(f"| {side} | {memory:.2f} GiB | {cycles / 1e6:,.1f} million | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
