"""What may be watched of a training step while it runs: its compilations, and a trace.

Both are steps around a step, so that the loop knows neither.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from flix_jax import buckets
from flix_jax.adapters import tree

StepFn = Callable[..., Any]


def telling_compilations(program: Any, say: Callable[[str], None]) -> StepFn:
    """A jitted function that tells, after its first compilation, of every other one.

    Args:
      program: what `jax.jit` gives.
      say: takes a line: which argument has another shape, dtype or sharding than before.
    """
    known: dict[str, str] = {}
    count = 0

    def step(*arguments: Any) -> Any:
        nonlocal known, count
        result = program(*arguments)
        if program._cache_size() != count:
            count = program._cache_size()
            found = _signature(arguments)
            if known:
                say(f"compiled again: {_difference(known, found)}")
            known = found
        return result

    return step


def traced(
    step_fn: StepFn, first: int, last: int, *, start_step: int, folder: epath.PathLike
) -> StepFn:
    """A step of which some are traced, for TensorBoard's profile plugin and xprof.

    Args:
      step_fn: the step.
      first, last: of the steps that are traced, counted from 1.
      start_step: how many were made before.
      folder: where the trace is written, ``plugins/profile/<time>``.
    """
    number, stack = start_step, contextlib.ExitStack()

    def step(*arguments: Any) -> Any:
        nonlocal number
        number += 1
        if not first <= number <= last:
            return step_fn(*arguments)
        if number == first:
            jax.block_until_ready(arguments)  # of steps before it nothing is in the trace
            stack.enter_context(_trace(folder))
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = step_fn(*arguments)
        if number == last:
            jax.block_until_ready(result)
            stack.close()
        return result

    return step


@contextlib.contextmanager
def _trace(folder: epath.PathLike) -> Iterator[None]:
    """A trace of what is computed in the block, in a folder; the profiler knows local ones only."""
    with contextlib.ExitStack() as stack:
        local = folder
        if buckets.is_bucket(folder):
            local = stack.enter_context(tempfile.TemporaryDirectory(prefix="flix_trace"))
        with jax.profiler.trace(local):
            yield
        if local != folder:
            buckets.put(local, folder)


def _signature(arguments: tuple[Any, ...]) -> dict[str, str]:
    """Argument and place in it -> dtype[shape] and sharding."""
    return {name: _described(leaf) for name, leaf in tree.leaves_by_name(arguments)}


def _described(leaf: Any) -> str:
    if not isinstance(leaf, jax.Array):
        return type(leaf).__name__
    spec = getattr(leaf.sharding, "spec", "")
    return f"{leaf.dtype.name}{list(leaf.shape)}{'' if not spec else f' over {spec}'}"


def _difference(before: dict[str, str], now: dict[str, str]) -> str:
    changed = [
        f"argument {name} was {before.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if not changed:
        return "shapes, dtypes and shardings are what they were"
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return "; ".join(changed[:3]) + more
