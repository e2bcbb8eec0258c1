"""What a run needs of a machine that is not here: its very programs, compiled for it and read."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flix_jax.adapters import tree
from flix_jax.adapters.source import SOURCE_INPUTS
from flix_jax.experiments import compiled as reading
from flix_jax.experiments.flops import model_flops
from flix_jax.experiments.job import Job
from flix_jax.experiments.parameter_table import bytes_per_device
from flix_jax.experiments.run import RANDOM, Run
from flix_jax.experiments.step_program import step_program
from flix_jax.experiments.topology import Topology
from flix_jax.training import partitioning

_FOLDER = "plan-of-no-run"  # in which nothing is written
_SHARE_FOR_COMPILER = 0.25 / 16  # of the memory, which the compiler keeps: 0.25 of a v5e's 16 GiB
_FLOATS = 4


@dataclasses.dataclass(frozen=True)
class Program:
    """A program on one device, as the compiler sees it; bytes.

    Attributes:
      arguments: what it is given and keeps.
      temporaries: what it needs while it runs.
      outputs: what it makes, where that does not take the place of arguments.
      code: of the program.
      cycles: estimated, without collectives; 0 where the compiler estimates none.
      collectives: by kind.
      compile_seconds: on this machine.
      refused: what the compiler said if it did not fit; then the rest is 0.
    """

    compile_seconds: float
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    code: int = 0
    cycles: int = 0
    collectives: Mapping[str, reading.Collective] = dataclasses.field(default_factory=dict)
    refused: str = ""

    @property
    def memory(self) -> int:
        """All that it needs at once."""
        return self.arguments + self.temporaries + self.outputs + self.code


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs on a topology.

    Attributes:
      topology: the devices.
      run: the run.
      mesh: axis -> size.
      parameters: 'base' and 'trained' -> how many.
      state: what a device holds while training, bytes: 'base', 'trained', 'optimizer', 'batch'.
      logits: bytes of the logits of one microbatch on a device, float32.
      flops: of the model in a step, on all devices (see `model_flops`).
      unsplit: banks whose features the mesh does not divide (`Parameters.unsplit`).
      train, decode: the programs; None where there is no compiler, or one was not asked for.
    """

    topology: Topology
    run: Run
    mesh: Mapping[str, int]
    parameters: Mapping[str, int]
    state: Mapping[str, int]
    logits: int
    flops: float
    unsplit: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    train: Program | None = None
    decode: Program | None = None

    @property
    def room(self) -> float:
        """Bytes that a program may have on a device; infinite where that is not known."""
        chip = self.topology.chip
        return math.inf if chip is None else chip.memory * (1 - _SHARE_FOR_COMPILER)

    @property
    def fits(self) -> bool:
        """Whether the programs fit, or without a compiler, whether what they are given does."""
        programs = [p for p in (self.train, self.decode) if p is not None]
        if not programs:
            return sum(self.state.values()) <= self.room
        return all(not p.refused and p.memory <= self.room for p in programs)

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """Of a training step: if collectives cost nothing, and if none ran beside products."""
        chip = self.topology.chip
        if chip is None or self.train is None or not self.train.cycles:
            return None
        least = self.train.cycles / chip.clock
        moved = sum(c.nbytes for c in self.train.collectives.values())
        return least, least + moved / chip.link


def make(run: Run, topology: Topology, *, decode: bool = True) -> Plan:
    """Compiles a run's training step and greedy decoding for a topology; nothing is computed.

    Args:
      run: whose data must be there, for they say which features there are; its base need not be.
      topology: as `topology.find` gives it.
      decode: whether decoding is compiled too.

    Raises:
      ValueError: what `Job` refuses; a mesh that does not fit the devices.
    """
    run = dataclasses.replace(run, base=RANDOM, seen_by_base=(), adapters_from=None)
    if not topology.devices:
        return _without_compiler(run, topology)
    job = Job(run, _FOLDER, mesh=run.mesh.make(topology.devices))
    plan = _analytic(job, topology)
    return dataclasses.replace(plan, train=_train(job), decode=_decode(job) if decode else None)


def search(
    run: Run, topology: Topology, done: Callable[[Run, Plan | ValueError], None]
) -> list[Plan]:
    """Plans with other meshes, and for each, other remat and microbatches until it fits.

    Args:
      run, topology: as in `make`; a compiler is needed.
      done: is told of every plan, or why there is none.

    Returns:
      Those that fit first, then by the time of a step.
    """
    found = []
    for changed in _meshes(run, topology.count):
        for variant in _savings(changed):
            try:
                plan = make(variant, topology)
            except ValueError as error:  # a dimension that the mesh does not divide, a batch
                done(variant, error)
                break
            found.append(plan)
            done(variant, plan)
            if plan.fits:
                break
    return sorted(found, key=lambda p: (not p.fits, (p.step_seconds or (0.0, 0.0))[1]))


def _without_compiler(run: Run, topology: Topology) -> Plan:
    job = Job(run, _FOLDER, mesh=run.mesh.abstract(topology.count, topology.slices))
    return _analytic(job, topology)


def _analytic(job: Job, topology: Topology) -> Plan:
    """What follows from shapes and shardings alone."""
    run = job.run
    state = job.parameters.state_template(job.optimizer())
    kinds = {
        "base": job.frozen_template,
        "trained": state.trained,
        "optimizer": state.opt_state,
        "batch": _batch(job, run.batch_size, training=True),
    }
    held = {kind: bytes_per_device(shapes) for kind, shapes in kinds.items()}
    counted = {"base": job.parameters.templates[1], "trained": state.trained}
    shards = partitioning.batch_shards(job.mesh) * run.microbatches
    rows = run.batch_size // shards
    over = run.mesh.rules.table("activations")["vocab"]
    vocabulary = run.model.vocab_size // partitioning.shards(job.mesh, over)
    return Plan(
        topology=topology,
        run=run,
        mesh=dict(job.mesh.shape),
        parameters={kind: tree.count_parameters(shapes) for kind, shapes in counted.items()},
        state=held,
        logits=rows * run.targets_length * vocabulary * _FLOATS,
        flops=model_flops(job),
        unsplit=job.parameters.unsplit,
    )


def _batch(job: Job, batch_size: int, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = partitioning.batch_sharding(job.mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
        for name, shape in job.batch_shapes(batch_size, training=training).items()
    }


def _train(job: Job) -> Program:
    optimizer = job.optimizer()
    state = job.parameters.state_template(optimizer)
    program = step_program(job, state)
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioning.replicated(job.mesh))
    batch = _batch(job, job.run.batch_size, training=True)
    return _compile(lambda: program.lower(state, job.frozen_template, batch, seed))


def _decode(job: Job) -> Program:
    run, trained = job.run, job.parameters.trained_in_use
    wanted = ("encoder_input_tokens", "feature_ids", *SOURCE_INPUTS)
    batch = _batch(job, run.evaluation.batch_size, training=False)
    batch = {name: shape for name, shape in batch.items() if name in wanted}
    program = jax.jit(
        functools.partial(job.model.predict, max_length=run.targets_length),
        out_shardings=partitioning.replicated(job.mesh),
    )
    return _compile(lambda: program.lower(tree.join(job.frozen_template, trained), batch))


def _compile(lower: Callable[[], Any]) -> Program:
    started = time.monotonic()
    try:
        done = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        text = " ".join(str(error).split())
        told = re.search(r"(?:total memory required|Used|Attempted)[^.]*\.\d+\w[^.]*\.\d+\w", text)
        reason = told[0] if told else text.removeprefix("RESOURCE_EXHAUSTED: ")[:200]
        return Program(time.monotonic() - started, refused=reason)
    seconds = time.monotonic() - started
    sizes: Any = done.memory_analysis()
    read = reading.read(done.as_text())
    return Program(
        compile_seconds=seconds,
        arguments=sizes.argument_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        cycles=read.cycles,
        collectives=read.collectives,
    )


def _meshes(run: Run, count: int) -> Iterator[Run]:
    """The run on every mesh of powers of two whose batch is spread evenly."""
    for model in (2**i for i in range(count.bit_length())):
        for fsdp in (2**i for i in range(count.bit_length())):
            data, rest = divmod(count, model * fsdp)
            if data and not rest and not run.batch_size % (data * fsdp * run.microbatches):
                mesh = dataclasses.replace(run.mesh, data=data, fsdp=fsdp, model=model)
                yield dataclasses.replace(run, mesh=mesh)


def _savings(run: Run) -> Iterator[Run]:
    """The run, then with full remat, then with more microbatches: each needs less memory."""
    yield run
    if run.model.remat != "full":
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, remat="full"))
        yield run
    shards = run.mesh.data * run.mesh.fsdp
    more = run.microbatches * 2
    while not run.batch_size % (shards * more):
        yield dataclasses.replace(run, microbatches=more)
        more *= 2
