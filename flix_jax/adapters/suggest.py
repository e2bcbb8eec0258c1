"""The tail of an error message: the valid names nearest to a name that is not."""

import difflib
import os
from collections.abc import Iterable


def did_you_mean(name: str, candidates: Iterable[str], *, at_most: int = 3) -> str:
    """Says on one line which of `candidates` come nearest to `name`.

    Args:
      name: what was asked for; upper and lower case are compared as the same.
      candidates: what there is.
      at_most: how many names to give.

    Returns:
      "did you mean 'a' or 'b'?" where something is near, else "there is: 'a', 'b', …", else
      "there is none".
    """
    candidates = list(dict.fromkeys(str(c) for c in candidates))
    lower: dict[str, list[str]] = {}
    for candidate in candidates:
        lower.setdefault(candidate.lower(), []).append(candidate)
    close = difflib.get_close_matches(str(name).lower(), lower, n=at_most, cutoff=0.5)
    near = [candidate for key in close for candidate in lower[key]][:at_most]
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    if not candidates:
        return "there is none"
    shown = ", ".join(repr(c) for c in candidates[: 2 * at_most])
    return f"there is: {shown}" + (", …" if len(candidates) > 2 * at_most else "")


def nearest_path(path: str) -> str:
    """ "; did you mean 'data'?" for a local path that is not there, '' where nothing is near it."""
    folder, name = os.path.split(path.rstrip("/"))
    try:
        there = os.listdir(folder or ".")
    except OSError:
        return ""
    hint = did_you_mean(name, there, at_most=1)
    if not hint.startswith("did you mean"):
        return ""
    return f"; {hint.replace(chr(39), chr(39) + os.path.join(folder, ''), 1)}"
