"""Where the English source of an example comes from: a template over its record, or a file.

The adapters fuse with the source (FLARE, arXiv 2501.06892), or the encoder reads it before the
input. An example without one runs on plain adapters, on its input alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.cells import Cell
from flix_jax.tasks.records import (
    Record,
    Template,
    first_fields,
    read_records,
    shorten,
    template_fields,
    text,
)

#: What a line of a file of translations has, beside whatever else.
ID, SOURCE = "id", "source"
_OF_A_FILE = ("task", "language", "file", "split")
_OF_AN_INPUT = ("source", "input")


@dataclass(frozen=True)
class SourceText:
    """The English sources of a run's examples.

    Attributes:
      templates: by task, a text with fields of the record, `{task}`, `{language}` and the columns
        of the language table, such as `'question: {question_translated} context: {context}'`;
        before what the task's format has (`TaskFormat.source`). A record that lacks one of the
        fields, has null there or has nothing in any of them, has no source.
      files: instead of fields of the record: the jsonl files of translations, one for each split of
        a cell, as `'translations/{task}/{split}/{file}.jsonl'`. A line is
        `{"id": …, "source": "…"}`. Of a split without a file no record has a source.
      id: the field of the record that such a line names it by, a text or a number; None for its
        place among the records of its file, from 0.
      length: of sources in tokens, the end included; longer ones are cut, and counted. None is
        that of the inputs, which fusions that go position by position need.
      joined: None hands sources to the adapters; a text with `{source}` and `{input}`, such as
        `'{source} = {input}'`, puts both into the input of the encoder, whose length must hold
        both. An example without a source is then its input alone.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    files: str | None = None
    id: str | None = None
    length: int | None = None
    joined: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.templates, Mapping):
            raise ValueError(
                f"SourceText.templates={self.templates!r}: expected a mapping from task, "
                "{'topic': '{input_en}'}"
            )
        for task, template in self.templates.items():
            if not self.template(task, None).fields:
                raise ValueError(
                    f"SourceText.templates[{task!r}]={template!r}: expected fields of the record "
                    "in it, such as {input_en}"
                )
        if self.files is not None:
            if self.templates:
                raise ValueError("SourceText.templates and SourceText.files exclude each other")
            _check_fields("files", self.files, _OF_A_FILE)
        elif self.id is not None:
            raise ValueError(f"SourceText.id={self.id!r} has no effect without SourceText.files")
        if self.length is not None and self.length < 1:
            raise ValueError(f"SourceText.length={self.length}: expected at least 1")
        if self.joined is None:
            return
        if self.length is not None:
            raise ValueError(
                f"SourceText.length={self.length} has no effect with SourceText.joined: the length "
                "of the inputs holds both"
            )
        _check_fields("joined", self.joined, _OF_AN_INPUT)
        for name in _OF_AN_INPUT:
            if name not in self._joined.fields:
                raise ValueError(f"SourceText.joined={self.joined!r}: expected {{{name}}} in it")

    def template(self, task: str, default: str | None) -> Template | None:
        """The template of a task, whose format has `default`; None where there is neither."""
        if task in self.templates:
            return Template.parse(self.templates[task], f"SourceText.templates[{task!r}]")
        return None if default is None else Template.parse(default, "TaskFormat.source")

    def path(self, cell: Cell, split: str) -> str:
        """The file of translations of a split of a cell."""
        assert self.files is not None
        of = {"task": cell.task, "language": cell.language, "file": cell.file, "split": split}
        return Template.parse(self.files, "").fill(of.__getitem__)

    def join(self, source: str, input: str) -> str:
        """What the encoder reads of both, where they are joined: of the input alone without one."""
        if self.joined is None or not source:
            return input
        both = {"source": source, "input": input}
        return self._joined.fill(both.__getitem__)

    @property
    def joiner(self) -> Callable[[str, str], str] | None:
        """`join`; None where sources are apart from the inputs."""
        return None if self.joined is None else self.join

    @functools.cached_property
    def _joined(self) -> Template:
        return Template.parse(self.joined or "", "")


def _check_fields(name: str, template: str, known: tuple[str, ...]) -> None:
    place = f"SourceText.{name}"
    for given in Template.parse(template, place).fields:
        if given not in known:
            raise ValueError(
                f"{place}={template!r}: no {{{given}}} here; {did_you_mean(given, known)}"
            )


def check_sources(
    source_text: SourceText,
    paths: Mapping[Cell, Mapping[str, Any]],
    default: Callable[[str], str | None],
) -> None:
    """Holds a choice of sources against what there is, before anything is read for it.

    Args:
      source_text: the choice.
      paths: by cell and split, the file of the records.
      default: gives the template of a task's format.

    Raises:
      ValueError: no example can have a source, a template of the choice names a field that the
        records lack, or splits whose translations would be of one file.
    """
    if source_text.files is not None:
        _check_paths(source_text, paths)
        return
    firsts = {cell.task: cell for cell in reversed(paths)}
    reasons = {}
    for task, cell in firsts.items():
        template = source_text.template(task, default(task))
        if template is None:
            reasons[task] = f"{task} has no template"
            continue
        path = next(iter(paths[cell].values()))
        known = [*template_fields(cell), *first_fields(path)]
        lacking = [name for name in template.fields if name not in known]
        if not lacking:
            continue
        reasons[task] = f"no field {lacking[0]!r} in the records of {path}"
        if task in source_text.templates:
            hint = did_you_mean(lacking[0], known)
            raise ValueError(f"SourceText.templates[{task!r}]: {reasons[task]}; {hint}")
    if len(reasons) == len(firsts):
        raise ValueError(
            f"SourceText: no example has a source: {'; '.join(reasons.values())}; give "
            "SourceText.templates or SourceText.files"
        )


def _check_paths(source_text: SourceText, paths: Mapping[Cell, Mapping[str, Any]]) -> None:
    from etils import epath

    owners: dict[str, str] = {}
    for cell, of in paths.items():
        for split in of:
            path, name = source_text.path(cell, split), f"{cell.name} {split}"
            if path in owners:  # places and ids would be mixed up
                raise ValueError(
                    f"SourceText.files={source_text.files!r}: {path} would be of {owners[path]} "
                    f"and of {name}; name {{task}}, {{split}} and {{file}} in it"
                )
            owners[path] = name
    if not any(epath.Path(path).exists() for path in owners):
        raise ValueError(
            f"SourceText.files={source_text.files!r}: none of the {len(owners)} files is there, "
            f"such as {next(iter(owners))}"
        )


def from_record(record: Record, template: Template, known: Mapping[str, str]) -> str:
    """The source that a template makes of a record; '' where there is none.

    Raises:
      ValueError: a field that is neither a text nor a number.
    """
    fields = [name for name in template.fields if name not in known]
    if any(record.get(name) is None for name in fields):
        return ""
    given = {**{name: text(record, name, numbers=True) for name in fields}, **known}
    if not any(given[name].strip() for name in fields):
        return ""
    return template.fill(given.__getitem__)


class FromFile:
    """The sources of the records of a file, asked for one by one, from a file of translations.

    A line that names no record is an error, unless records were left out, which it may name.

    Raises:
      ValueError: with file and line, for a line that cannot be read, lacks `id` or `source`, has
        them of another type, or repeats an id.
    """

    def __init__(self, path: Any, id_field: str | None):
        """Reads the translations at `path`; none where there is no such file."""
        from etils import epath

        self.path, self._id_field = path, id_field
        self._sources: dict[str, tuple[int, str]] = {}
        self._asked: set[str] = set()
        if not epath.Path(path).exists():
            return
        for line, record in read_records(path):
            try:
                name, source = text(record, ID, numbers=True), text(record, SOURCE)
                if name in self._sources:
                    raise ValueError(
                        f"id {shorten(name)} is there twice: first in line {self._sources[name][0]}"
                    )
            except ValueError as error:
                raise ValueError(f"{path}:{line}: {error}") from None
            self._sources[name] = line, source.strip() and source

    def __call__(self, record: Record, place: int) -> str:
        """The source of a record, by its id or its place; '' where there is none.

        Raises:
          ValueError: a record without an id, or with that of another one.
        """
        name = str(place)
        if self._id_field is not None:
            name = text(record, self._id_field, numbers=True)
            if name in self._asked:
                raise ValueError(
                    f"field {self._id_field!r}: {shorten(name)} is that of a record before it, so "
                    "that no translation can be told by it"
                )
        self._asked.add(name)
        return self._sources.get(name, (0, ""))[1]

    def check_all_asked(self, of: Any, left_out: bool) -> int:
        """How many translations are of no record of the file `of`, after all were asked for.

        Raises:
          ValueError: there are some, and no record was left out.
        """
        unknown = [name for name in self._sources if name not in self._asked]
        if unknown and not left_out:
            line = self._sources[unknown[0]][0]
            near = did_you_mean(unknown[0], sorted(self._asked))
            more = f" ({len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise ValueError(
                f"{self.path}:{line}: id {shorten(unknown[0])} names no record of {of}{more}; "
                f"{near}"
            )
        return len(unknown)
