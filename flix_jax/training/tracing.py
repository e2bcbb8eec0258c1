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
    known: dict[str, tuple[str, str]] = {}
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


def _signature(arguments: tuple[Any, ...]) -> dict[str, tuple[str, str]]:
    """Argument and place in it -> dtype[shape], and what it is split over."""
    return {name: _described(leaf) for name, leaf in tree.leaves_by_name(arguments)}


def _described(leaf: Any) -> tuple[str, str]:
    if not isinstance(leaf, jax.Array):
        return type(leaf).__name__, ""
    spec = getattr(leaf.sharding, "spec", "")
    return f"{leaf.dtype.name}{list(leaf.shape)}", f" over {spec}" if spec else ""


def _difference(before: dict[str, tuple[str, str]], now: dict[str, tuple[str, str]]) -> str:
    changes: dict[tuple[str, str], list[str]] = {}
    for name in sorted({*before, *now}):
        was, found = (of.get(name, ("absent", "")) for of in (before, now))
        if was != found:
            split = was[1] != found[1]  # told where that is what has changed
            pair = ("".join(was), "".join(found)) if split else (was[0], found[0])
            changes.setdefault(pair, []).append(name)
    if not changes:
        return "shapes, dtypes and shardings are what they were"
    told = [
        f"argument {names[0]} was {was}, is {found}"
        if len(names) == 1
        else f"arguments {_some(names, ', ')} were {was}, are {found}"
        for (was, found), names in changes.items()
    ]
    return _some(told, "; ")


def _some(texts: list[str], between: str) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return between.join(texts[:3]) + more
