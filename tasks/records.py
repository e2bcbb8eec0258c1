"""Records of jsonl files: reading them with their line numbers, their fields, and templates."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flix_jax.adapters import plain_json
from flix_jax.adapters.plain_json import shorten
from flix_jax.data.cells import Cell

Record = Mapping[str, Any]
#: Bytes of a line. Nothing that a model reads comes near it, and json takes up to forty times as
#: much memory as its text.
MOST_BYTES = 2**23
LINES_SHOWN = 5
_PEEKED = 20  # records whose fields a template is checked against before anything is read


def read_records(
    path: Any, on_error: Callable[[int, ValueError], None] | None = None
) -> Iterator[tuple[int, Record]]:
    """The records of a jsonl file with their line numbers, from 1; blank lines are passed over.

    Args:
      path: local or in a bucket.
      on_error: called with line number and error for a line that is no record, instead of raising.

    Raises:
      ValueError: with file and line, for text that is not UTF-8, malformed JSON or a line that is
        no object; for a line of more than `MOST_BYTES`, whatever `on_error` is; for a file with
        blank lines only, or none.
    """
    from flix_jax.data import bounded

    empty = True
    # Lines end at \n alone: the texts hold characters that str.splitlines takes for ends of lines.
    for number, line in enumerate(bounded.lines(path, MOST_BYTES), start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        empty = False
        try:
            record = plain_json.parse_object(line)
        except ValueError as error:
            if on_error is None:
                raise ValueError(f"{path}:{number}: {error}") from None
            on_error(number, error)
            continue
        yield number, record
    if empty:
        raise ValueError(f"{path}: the file holds no records")


def first_fields(path: Any) -> list[str]:
    """The fields that the first records of a file have; none where no line is a record."""
    records = itertools.islice(read_records(path, lambda line, error: None), _PEEKED)
    return list(dict.fromkeys(name for _, record in records for name in record))


def _names(record: Record) -> str:
    """The fields of a record as an error tells them: in one line, whatever they are called."""
    shown = (name if name.isprintable() and len(name) <= 40 else shorten(name) for name in record)
    return ", ".join(shown) or "none"


def text(record: Record, name: str, *, numbers: bool = False) -> str:
    """The string field `name`; ValueError when it is missing, no string, or no valid Unicode.

    Args:
      numbers: take a number too, as JSON writes it.
    """
    if name not in record:
        raise ValueError(f"field {name!r} is missing: the record has {_names(record)}")
    value = record[name]
    if numbers and type(value) in (int, float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise ValueError(f"field {name!r}: expected a string, got {shorten(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {name!r}: holds half of a surrogate pair") from None
    return value


def integer(record: Record, name: str) -> int:
    """The whole number of the field `name`; ValueError when it is missing or something else."""
    if name not in record:
        raise ValueError(f"field {name!r} is missing: there is {_names(record)}")
    value = record[name]
    if type(value) is not int:
        raise ValueError(f"field {name!r}: expected a whole number, got {shorten(value)}")
    return value


@dataclass(frozen=True)
class Template:
    """A text with fields in braces, `Find the names in {language}: {input}`; `{{` is a brace.

    Attributes:
      pieces: plain text, each with the field that follows it; None at the end.
    """

    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, template: str, place: str) -> Template:
        """Reads `template`; ValueError that opens with `place` for what is no such text."""
        if not isinstance(template, str):
            raise ValueError(f"{place}={template!r}: expected a text with fields such as {{input}}")
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"{place}={template!r}: {error}") from None
        for _, name, form, conversion in parsed:
            if name is not None and (not name or form or conversion):
                raise ValueError(
                    f"{place}={template!r}: expected plain fields such as {{input}}, and {{{{ or "
                    "}} for a brace"
                )
        return cls(tuple((literal, name) for literal, name, _, _ in parsed))

    @property
    def fields(self) -> tuple[str, ...]:
        """The names in braces, each once."""
        return tuple(dict.fromkeys(name for _, name in self.pieces if name is not None))

    def fill(self, value: Callable[[str], str]) -> str:
        """The text with every field replaced by `value(field)`."""
        return "".join(
            literal if name is None else literal + value(name) for literal, name in self.pieces
        )


def template_fields(cell: Cell) -> dict[str, str]:
    """What a template may name beside a record's fields: task, language, columns of the table."""
    return {k: v for k, v in cell.annotations().items() if k not in ("cell", "shared")}


@dataclass(frozen=True)
class Skipped:
    """The records of one file that could not be read.

    Attributes:
      records: how many; `of`: of how many lines that are not blank.
      lines: the numbers of the first few.
      first: what was wrong with the first.
    """

    records: int
    of: int
    lines: tuple[int, ...]
    first: str

    def __str__(self) -> str:
        lines = ", ".join(map(str, self.lines)) + (", ..." if self.records > LINES_SHOWN else "")
        return f"{self.records:,} of {self.of:,} records skipped (lines {lines}): {self.first}"
