"""A table of languages: what is known of each (family, script, ...) becomes feature types.

The table is a TSV file in UTF-8: lines that open with `#` are comments, the first other line names
the columns, one of them `language`, and every further line is a language. Each other column is an
annotation of every cell of that language, so that `FeatureType('family')` takes its values from the
training cells: an unseen language of a known family has that family's update, and a value that
training never saw is an absent feature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.configs import find_config
from flix_jax.data import bounded
from flix_jax.data.cells import Cell

KEY = "language"
_TAKEN = ("task", "cell", "shared")
_COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*")


@dataclass(frozen=True)
class LanguageTable:
    """What is known of each language.

    Attributes:
      path: where it was read.
      rows: by the code of a language, column name -> value; the same columns for all.
    """

    path: str
    rows: Mapping[str, Mapping[str, str]]

    def row(self, language: str) -> dict[str, str] | None:
        """What is known of a language by its code, or by what stands before its underscore."""
        for code in (language, language.partition("_")[0]):
            if code in self.rows:
                return dict(self.rows[code])
        return None

    def annotations(self, cell: Cell) -> dict[str, str]:
        """The columns of the cell's language: `{'family': 'Atlantic-Congo', 'script': 'Latn'}`.

        A code with a locale or suffix that has no row of its own (`de_localized`) has the row of
        the code before the underscore.

        Raises:
          ValueError: when there is neither; names the nearest code.
        """
        row = self.row(cell.language)
        if row is not None:
            return row
        raise ValueError(
            f"XtremeUp.languages: {self.path} has no row for the language {cell.language!r} of "
            f"{cell.name}; {did_you_mean(cell.language, self.rows)}"
        )

    def annotate(self, cell: Cell) -> Cell:
        """The cell with `annotations` beside its own."""
        return replace(cell, extra=tuple(self.annotations(cell).items()))


def read_language_table(path: str) -> LanguageTable:
    """Reads a table, from the working directory, a bucket, or the packaged configs.

    Raises:
      ValueError: with file and line, for a missing or empty file, text that is not UTF-8, a header
        that lacks `language` or names a column twice or as something else is called, a row of
        another length, an empty field, a language named twice.
    """
    file = find_config(path)
    try:
        content = bounded.read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}:{wrong}: not UTF-8") from None
    header: list[str] | None = None
    rows: dict[str, dict[str, str]] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        place = f"{file}:{number}"
        fields = [entry.strip() for entry in line.split("\t")]
        if header is None:
            header = fields
            _check_header(header, place)
            continue
        if len(fields) != len(header):
            raise ValueError(
                f"{place}: {len(fields)} fields, expected {len(header)} separated by tabs: "
                f"{', '.join(header)}"
            )
        row = dict(zip(header, fields, strict=True))
        for name, value in row.items():
            if not value:
                raise ValueError(f"{place}: the field {name!r} is empty")
        language = row.pop(KEY)
        if language in rows:
            raise ValueError(
                f"{place}: the language {language!r} has a row already, in line {lines[language]}"
            )
        rows[language], lines[language] = row, number
    if not rows:
        raise ValueError(f"{file}: the table holds no languages")
    return LanguageTable(str(file), rows)


def _check_header(header: list[str], place: str) -> None:
    for name in header:
        if not _COLUMN.fullmatch(name):
            raise ValueError(f"{place}: column {name!r}: expected letters, digits, '_' or '-'")
        if name in _TAKEN:
            raise ValueError(f"{place}: column {name!r}: cells have an annotation of that name")
        if header.count(name) > 1:
            raise ValueError(f"{place}: column {name!r} is named more than once")
    if KEY not in header:
        raise ValueError(f"{place}: no column {KEY!r}; {did_you_mean(KEY, header)}")
    if len(header) == 1:
        raise ValueError(f"{place}: no column beside {KEY!r}")
