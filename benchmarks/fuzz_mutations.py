"""Changes of json that leave it json: another value, field, order or depth."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, 0.5),
    *(float("nan"), float("inf"), "", "..", "../x", "/etc/passwd", "a/b", "\0", "\ud800", "😀"),
    *("a" * 3000, "1e999", "{}", [], {}, [[]], [None], {"": None}, {"a": 1}, [1, "a"], "nan"),
)


def mutate(
    data: bytes, longest: int, seed: int, of_bytes: Callable[[bytes, int], bytes], folder: bool
) -> bytes:
    """Another input: of bytes in half of the cases and where there is no json in it.

    Args:
      data: the input.
      longest: bytes of what is returned, at most.
      seed: what it is follows from it.
      of_bytes: libFuzzer's own mutation, (input, longest) -> input.
      folder: whether the first byte says which file the others are.
    """
    draw = random.Random(seed)
    head, body = (data[:1], data[1:]) if folder else (b"", data)
    if draw.random() < 0.5:
        try:
            changed = _json(body, draw)
        except (ValueError, ArithmeticError, RecursionError):  # of what cannot be written as json
            changed = None
        if changed is not None and len(changed) < longest:
            return head + changed
    return of_bytes(data, longest)


def _json(body: bytes, draw: random.Random) -> bytes | None:
    """Some line of it, or the whole, with a change; None where neither is json."""
    lines = body.split(b"\n")
    places: list[tuple[int | None, bytes]] = [(None, body)] if len(lines) > 3 else []
    places += [(i, line) for i, line in enumerate(lines) if line.strip()]
    draw.shuffle(places)
    for place, text in places[:3]:
        # A file of safetensors opens with the length of its json.
        skip = 8 if text[8:9] == b"{" else 0
        try:
            value, end = json.JSONDecoder().raw_decode(text[skip:].decode(errors="surrogateescape"))
        except (ValueError, RecursionError):
            continue
        rest = text[skip:].decode(errors="surrogateescape")[end:]
        for _ in range(draw.choice((1, 1, 2, 4))):
            # Written and read again, for swapped fields may lie in each other.
            value = json.loads(json.dumps(_changed(value, draw)))
        written = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode(errors="replace")
        if skip:
            written = len(written).to_bytes(8, "little") + written
        written += rest.encode(errors="surrogateescape")
        if place is None:
            return written
        return b"\n".join([*lines[:place], written, *lines[place + 1 :]])
    return None


def _changed(value: Any, draw: random.Random) -> Any:
    """The value with one node of it changed."""
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any, depth: int) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in list(items):
            nodes.append((node, key))
            if isinstance(child, dict | list) and depth < 30:
                walk(child, depth + 1)

    if isinstance(value, dict | list):
        walk(value, 0)
    if not nodes:
        return draw.choice(_VALUES)
    node, key = draw.choice(nodes)
    other, other_key = draw.choice(nodes)
    kind = draw.randrange(7)
    if kind == 0:
        node[key] = draw.choice(_VALUES)
    elif kind == 1:
        del node[key]
    elif kind == 2:  # swapped fields
        node[key], other[other_key] = other[other_key], node[key]
    elif kind == 3:
        for _ in range(draw.choice((1, 2, 80))):
            node[key] = [node[key]]
    elif kind == 4 and isinstance(node, dict):
        name = draw.choice(("", "name", str(other_key), "driver", "é"))
        node[name] = draw.choice(_VALUES)
    elif kind == 5 and isinstance(node[key], int | float):
        node[key] = draw.choice((node[key] + 1, -node[key], node[key] * 2**20, float(node[key])))
    elif isinstance(node, list):
        node.insert(key, node[key])
    else:
        node[key] = json.dumps(node[key])[:100]
    return value
