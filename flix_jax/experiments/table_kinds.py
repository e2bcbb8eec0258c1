"""Which kind of table a training step makes for each adapted layer (`Run.tables`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from flix_jax.adapters import tables, targets, tree

if TYPE_CHECKING:
    from flix_jax.experiments.job import Job


def of_layers(job: Job) -> dict[str, str]:
    """By path of a layer, the kind of its table; layers without one are left out.

    Raises:
      ValueError: a target of `Run.tables` matches no adapted layer.
    """
    run, adapters = job.run, job.model.adapters
    by_target, others = run.tables_by_target
    if adapters is None or adapters.fusion is not None or run.tables == tables.NONE:
        return {}
    chosen = {tables.AUTO: run.merges_exactly, tables.FASTEST: run.merge_problem is None}
    never = _platform(job) != "tpu" and job.rows_together == 1
    if never and not by_target and others in chosen:
        return {}  # as `tables.choose` says of every layer; this saves a trace of them
    layers = job.matches.matched
    targets.check(by_target, [layer.path for layer in layers], "Run.tables", "adapted layers")
    choose = _choice(job)
    kinds = {}
    for layer in layers:
        name = next((by_target[t] for t in targets.matching(by_target, layer.path)), others)
        kind = tables.KINDS.get(name)
        if name in chosen:
            kind = choose(layer, mergeable=chosen[name])
        if kind is not None:
            kinds[layer.path] = kind
    return kinds


def _choice(job: Job) -> Callable[..., str | None]:
    """`tables.choose` of a layer, with what all layers have in common."""
    assert job.space is not None
    examples = job.rows_at_once * (job.run.own_features or 1)
    return functools.partial(
        tables.choose,
        space=job.space,
        examples=examples // job.rows_together,
        platform=_platform(job),
        parameters=tree.count_parameters(job.parameters.templates[0]),
        rows=job.rows_together,
    )


def _platform(job: Job) -> str:
    """Of the devices, as JAX names it; '' of an abstract mesh."""
    if isinstance(job.mesh, jax.sharding.AbstractMesh):
        return ""
    return job.mesh.devices.flat[0].platform
