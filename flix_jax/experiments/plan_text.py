"""A plan as text: memory by kind, the verdict and what would help, collectives, time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from flix_jax.adapters import text_tables
from flix_jax.experiments.parameter_table import unsplit_lines
from flix_jax.experiments.plan import Plan
from flix_jax.experiments.run import Run
from flix_jax.models.config import T5Config

_GIB = 2**30


def to_markdown(plan: Plan) -> str:
    """The plan as text."""
    return "\n\n".join(_sections(plan)) + "\n"


def line(run: Run, plan: Plan | ValueError) -> str:
    """What came of a search's run, on a line."""
    if isinstance(plan, ValueError):
        return f"{_settings(run)}: {plan}"
    times = plan.step_seconds
    fits = "fits" if plan.fits else "does not fit"
    return f"{_settings(run)}: {fits}" + (f", {_time(times)} a step" if times else "")


def ranking(plans: Sequence[Plan]) -> str:
    """A table of plans, in their order."""
    rows = [["settings", "fits", "memory of a chip", "step", "compile"]]
    for plan in plans:
        train = plan.train
        memory = "" if train is None or train.refused else f"{train.memory / _GIB:.2f} GiB"
        times = plan.step_seconds
        seconds = "" if train is None else f"{train.compile_seconds:.0f} s"
        rows.append(
            [
                _settings(plan.run),
                "yes" if plan.fits else "no",
                memory,
                _time(times) if times else "",
                seconds,
            ]
        )
    return text_tables.markdown(rows)


def _settings(run: Run) -> str:
    mesh, config = run.mesh, run.model
    return (
        f"data {mesh.data} × fsdp {mesh.fsdp} × model {mesh.model}, remat {config.remat}, "
        f"{run.microbatches} microbatches"
    )


def _time(seconds: tuple[float, float]) -> str:
    low, high = (f"{1000 * s:,.0f}" for s in seconds)
    return f"{low} ms" if low == high else f"{low} to {high} ms"


def _sections(plan: Plan) -> Iterator[str]:
    run, topology = plan.run, plan.topology
    slices = "" if topology.slices == 1 else f" in {topology.slices} slices"
    longest = ", the longest batch of Run.length_buckets" if run.lengths_per_side else ""
    yield (
        f"{topology.name}: {topology.count} devices{slices}, mesh "
        + " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
        + f". {_network(run.model)}; {plan.parameters['base']:,} parameters frozen "
        f"({run.frozen_dtype or 'float32'}), {plan.parameters['trained']:,} trained. Batch "
        f"{run.batch_size} in {run.microbatches} microbatches, {run.inputs_length} tokens in, "
        f"{run.targets_length} out{longest}; remat {run.model.remat}."
    )
    yield text_tables.markdown(_memory(plan))
    yield _verdict(plan)
    if plan.train is not None and plan.train.collectives:
        rows = [["collectives of a training step", "times", "bytes of results, of a device"]]
        for kind, found in plan.train.collectives.items():
            rows.append([kind, f"{found.count:,}", _size(found.nbytes)])
        yield text_tables.markdown(rows)
    yield "\n".join([*_figures(plan), *(f"- {line}." for line in unsplit_lines(plan.unsplit))])


def _network(config: T5Config) -> str:
    layers = f"{config.num_encoder_layers} + {config.num_decoder_layers} layers"
    scanned = ", scanned" if config.scan_layers else ""
    return f"Width {config.emb_dim}, {layers}{scanned}, computed in {config.dtype}"


def _memory(plan: Plan) -> list[list[str]]:
    state, train, decode = plan.state, plan.train, plan.decode
    rows = [["memory of a device", "training", "decoding"]]
    for kind in ("base", "trained", "optimizer", "batch"):
        served = kind in ("base", "trained")
        rows.append([kind, _size(state[kind]), _size(state[kind]) if served else ""])
    if train is None or decode is None or train.refused or decode.refused:
        return rows
    of_decoding = state["base"] + state["trained"]
    given = train.arguments - sum(state.values()), decode.arguments - of_decoding
    rows += [
        ["layout of these, and other inputs", *(_size(max(0, extra)) for extra in given)],
        ["activations, gradients, logits", *(_size(p.temporaries) for p in (train, decode))],
        ["results", *(_size(p.outputs) for p in (train, decode))],
        ["program", *(_size(p.code) for p in (train, decode))],
        ["all", *(_size(p.memory) for p in (train, decode))],
    ]
    if math.isfinite(plan.room):
        rows.append(["spare", *(_size(plan.room - p.memory) for p in (train, decode))])
    return rows


def _verdict(plan: Plan) -> str:
    if plan.train is None or plan.decode is None:
        return (
            f"{plan.topology.missing}: what a program needs beside its state is not known. The "
            f"state alone {'fits' if plan.fits else 'does not fit'}."
        )
    if plan.fits:
        return (
            "Fits." if math.isfinite(plan.room) else "Compiles; how much memory there is is open."
        )
    lines = ["Does not fit."]
    for name, program in (("training", plan.train), ("decoding", plan.decode)):
        if program.refused:
            lines.append(f"The compiler says of {name}: {program.refused}.")
    return " ".join([*lines, *_advice(plan)])


def _advice(plan: Plan) -> Iterator[str]:
    """What would help, by what is large."""
    run, state = plan.run, plan.state
    yield f"What would help ('flix plan --search' tries it), with {_size(plan.room)} to a device:"
    parts = []
    if state["base"] > 0.25 * plan.room:
        parts.append(
            f"twice the fsdp or model axis halves the base ({_size(state['base'])} a device)"
        )
        if run.frozen_dtype in (None, "float32"):
            parts.append("Run.frozen_dtype = 'bfloat16' halves it too, 'int8' quarters it")
        elif run.frozen_dtype != "int8":
            parts.append("Run.frozen_dtype = 'int8' halves it too")
    moments = state["trained"] + state["optimizer"]
    if moments > 0.25 * plan.room:
        parts.append(
            f"trained parameters and moments ({_size(moments)}) shard with fsdp and model; "
            "Optimizer.name = 'adafactor' keeps less than adamw"
        )
    if run.model.remat != "full":
        parts.append("T5Config.remat = 'full' keeps only the inputs of layers")
    if run.loss_chunks == 1 and plan.logits > 0.1 * plan.room:
        parts.append(
            f"Run.loss_chunks makes the logits ({_size(plan.logits)} of a microbatch) in parts"
        )
    rows = run.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])
    if rows > run.microbatches:
        parts.append(f"more Run.microbatches, of {rows} rows that a device has")
    yield "; ".join(parts) + "."


def _figures(plan: Plan) -> Iterator[str]:
    chunks = plan.run.loss_chunks
    made = "at once" if chunks == 1 else f"in {chunks} parts"
    yield f"- Logits of a microbatch: {_size(plan.logits)} a device (float32), made {made}."
    yield f"- Model FLOPs of a step: {plan.flops:.3g}, over all devices."
    times, chip = plan.step_seconds, plan.topology.chip
    if times is not None and chip is not None and plan.train is not None:
        peak = plan.topology.count * chip.flops
        used = [100 * plan.flops / (peak * seconds) for seconds in times]
        tokens = plan.run.batch_size * plan.run.targets_length / times[0]
        yield (
            f"- The compiler estimates {plan.train.cycles:,} cycles, at {chip.clock / 1e9:.2f} GHz "
            f"{1000 * times[0]:,.1f} ms a step, and {1000 * times[1]:,.1f} ms if no collective ran "
            f"beside products (at {chip.link / 1e9:.0f} GB/s): {used[0]:.0f} to {used[1]:.0f} % of "
            f"the chips' peak; at most {tokens:,.0f} target tokens a second, padding included."
        )
        hours = plan.run.total_steps * times[1] / 3600
        yield (
            f"- {plan.run.total_steps:,} steps: {hours:,.1f} hours, "
            f"{hours * plan.topology.count:,.1f} chip-hours, beside evaluation, reading and saving."
        )
    if plan.train is not None and plan.decode is not None:
        yield (
            f"- Compiled here in {plan.train.compile_seconds:.0f} s (training) and "
            f"{plan.decode.compile_seconds:.0f} s (decoding)."
        )


def _size(nbytes: float) -> str:
    return f"{nbytes / _GIB:,.2f} GiB" if abs(nbytes) >= _GIB / 10 else f"{nbytes / 2**20:,.1f} MiB"
