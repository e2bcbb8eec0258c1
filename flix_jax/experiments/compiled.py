"""What a compiled program says of itself: cycles and collectives, read from its text.

The compiler's own summaries count the body of a loop once; here it counts as often as it runs. The
number of turns is the constant that the loop's condition compares with, which for a loop that may
end early is its most.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_COMPUTATION = re.compile(r"(?:ENTRY )?%(?P<name>[\w.\-]+) \(")
_OPERATION = re.compile(r"\s(?P<kind>[a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?P<how>condition|body|calls|to_apply)=%(?P<name>[\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(?P<names>[^}]*)\}")
_ARRAY = re.compile(r"(?P<type>pred|[a-z]+(?P<bits>\d+)(?:e\d+m\d+\w*)?)\[(?P<shape>[\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a run of a program.

    Attributes:
      count: how many run.
      nbytes: of their results, on one device, over all of them.
    """

    count: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a program's text says.

    Attributes:
      cycles: that the TPU compiler estimates, without collectives; 0 of another compiler.
      collectives: by kind.
    """

    cycles: int
    collectives: Mapping[str, Collective]


def read(text: str) -> Reading:
    """Reads `jax.stages.Compiled.as_text()`."""
    computations, entry = _computations(text)
    turns = dict.fromkeys(computations, 0)
    for name, times in _runs(computations, entry, 1):
        turns[name] += times
    cycles = 0
    seen: set[str] = set()
    found: dict[str, list[int]] = {}
    for name, lines in computations.items():
        for line in lines:
            estimate = _CYCLES.search(line)
            if estimate:
                cycles += turns[name] * int(estimate[1])
            kind = _kind(line).removesuffix("-start")
            if kind not in _COLLECTIVES or not turns[name]:
                continue
            mark = _mark(kind, line)
            if mark and mark in seen:  # one that runs beside others stands in several computations
                continue
            seen.add(mark)
            count, nbytes = found.setdefault(kind, [0, 0])
            found[kind] = [count + turns[name], nbytes + turns[name] * _result_bytes(line)]
    return Reading(cycles, {kind: Collective(*found[kind]) for kind in sorted(found)})


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """{name: lines of its operations}, and the name of the one that runs first."""
    found: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head and line.rstrip().endswith("{"):
            lines = found.setdefault(head["name"], [])
            if line.startswith("ENTRY"):
                entry = head["name"]
        elif line.startswith("}"):
            lines = None
        elif lines is not None and " = " in line:
            lines.append(line)
    return found, entry


def _runs(
    computations: Mapping[str, list[str]], name: str, times: int
) -> Iterator[tuple[str, int]]:
    """(computation, how often it runs) for every place that it is called from."""
    yield name, times
    for line in computations.get(name, ()):
        called = {match["how"]: match["name"] for match in _CALLED.finditer(line)}
        called.pop("to_apply", None)  # of reductions: on elements
        turns = 1
        if "body" in called:
            turns = _turns(computations, called.pop("condition"))
        branches = _BRANCHES.search(line)
        names = [*called.values(), *re.findall(r"[\w.\-]+", branches["names"] if branches else "")]
        for inner in names:
            yield from _runs(computations, inner, times * turns)


def _turns(computations: Mapping[str, list[str]], condition: str) -> int:
    """The largest constant of a loop's condition, or 1."""
    lines = [line for name, _ in _runs(computations, condition, 1) for line in computations[name]]
    constants = [re.search(r"s32\[\]\S* constant\((\d+)\)", line) for line in lines]
    return max((int(found[1]) for found in constants if found), default=1)


def _mark(kind: str, line: str) -> str:
    """What is the same of all places where a collective stands; '' where it says nothing."""
    channel = re.search(r"channel_id=\d+", line)
    named = re.search(r'op_name="[^"]*"', line)
    return f"{kind} {channel[0]} {named[0] if named else ''}" if channel else ""


def _kind(line: str) -> str:
    found = _OPERATION.search(line.split(" = ", 1)[1])
    return "" if found is None else found["kind"]


def _result_bytes(line: str) -> int:
    """Of an operation's result; of one that starts, of the last array, which it will make."""
    before = line.split(" = ", 1)[1]
    result = before[: _OPERATION.search(before).start()]  # type: ignore[union-attr]
    sizes = []
    for array in _ARRAY.finditer(result):
        bits = int(array["bits"] or 8)
        sizes.append(math.prod(int(n) for n in array["shape"].split(",") if n) * bits // 8)
    return sizes[-1] if "-start(" in line and sizes else sum(sizes)
