"""Json of unknown origin: one error for whatever is wrong with it, and no deep nesting."""

import json
from typing import Any

#: Brackets within brackets; what is written here has four.
MOST_LEVELS = 64


def parse(text: str | bytes) -> Any:
    """The value that a json text holds.

    Args:
      text: bytes are UTF-8.

    Raises:
      ValueError: in one line with the place, for what is no json, for bytes that are no UTF-8, for
        more than `MOST_LEVELS` levels and for whole numbers of more digits than Python reads.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            wrong = f"byte {error.object[error.start]:#04x}"
            raise ValueError(f"not UTF-8: {wrong} at {_at(before)}") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = _at(text[: error.pos].encode(errors="replace"), error.colno)
        raise ValueError(f"malformed JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise ValueError("malformed JSON: nested too deeply") from None
    except ValueError:
        raise ValueError("malformed JSON: a number of too many digits") from None
    if text.count("[") + text.count("{") > MOST_LEVELS and _levels_exceed(value, MOST_LEVELS):
        raise ValueError(f"nested too deeply: more than {MOST_LEVELS} levels")
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """`parse` of what must be an object; ValueError where it is something else."""
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {shorten(value)}")
    return value


def shorten(value: Any) -> str:
    """`value` as JSON, cut to fit an error message."""
    shown = json.dumps(value, ensure_ascii=True)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _at(before: bytes, column: int | None = None) -> str:
    """Line and column of what follows these bytes; of a single line the column alone."""
    line = before.count(b"\n") + 1
    column = len(before) - before.rfind(b"\n") if column is None else column
    return f"column {column}" if line == 1 else f"line {line}, column {column}"


def _levels_exceed(value: Any, most: int) -> bool:
    """Whether containers lie within containers more than `most` deep; without recursion."""
    level = [value]
    for _ in range(most):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = inner
    return any(isinstance(item, dict | list) for item in level)
