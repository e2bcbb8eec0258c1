"""Tables as text, for logs and for reports. The first row is the header."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def plain(rows: Rows, *, numbers: bool = True) -> str:
    """Columns two spaces apart, the first to the left, all others to the right; a rule below the
    header.

    Args:
      rows: the header and what follows.
      numbers: whether the columns but the first hold numbers; texts stand to the left.
    """
    widths = _widths(rows)
    lines = ["  ".join(_aligned(row, widths, numbers)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown(rows: Rows) -> str:
    """A markdown table, aligned as `plain` is, as text and as rendered."""
    widths = _widths(rows)
    lines = [f"| {' | '.join(_aligned(row, widths))} |" for row in rows]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _widths(rows: Rows) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _aligned(row: Sequence[str], widths: Sequence[int], numbers: bool = True) -> list[str]:
    first, *others = zip(row, widths, strict=True)
    align = str.rjust if numbers else str.ljust
    return [first[0].ljust(first[1]), *(align(entry, width) for entry, width in others)]
