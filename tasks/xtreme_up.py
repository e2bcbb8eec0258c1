"""XTREME-UP as a source of cells: folders of jsonl files become seqio tasks.

The layout is that of the XTREME-UP release (arXiv 2305.11938): `{task}/{split}/{file}.jsonl`, a
record per line. Any further folder of files whose records have `input` and `target` is a task too.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flix_jax.data.cells import Cell

if TYPE_CHECKING:
    from flix_jax.adapters.features import FeatureSpace
    from flix_jax.data.vocabularies import Vocabulary

SPLITS = ("train", "validation", "test")
Record = Mapping[str, Any]
Pair = tuple[str, str]


def plain(record: Record, cell: Cell) -> Pair:
    """`input` -> `target`."""
    return text(record, "input"), text(record, "target")


def ner(record: Record, cell: Cell) -> Pair:
    """`text` -> `PER: x $$ LOC: y`, the entities in the order of the text; empty without any.

    `spans` gives each entity's `label` and its place by the byte offsets `start_byte` and
    `limit_byte` in the UTF-8 of `text`. A record without `spans` gives its `target` as it is.
    """
    sentence = text(record, "text")
    if "spans" not in record and "target" in record:
        return sentence, text(record, "target")
    spans = record.get("spans")
    if not isinstance(spans, list):
        raise ValueError(f"field 'spans': expected a list, got {shorten(spans)}")
    content = sentence.encode()
    entities = []
    for span in spans:
        if not isinstance(span, dict):
            raise ValueError(f"field 'spans': expected objects, got {shorten(span)}")
        start, limit = span.get("start_byte"), span.get("limit_byte")
        if not (type(start) is int and type(limit) is int and 0 <= start < limit <= len(content)):
            raise ValueError(
                f"span start_byte={start} limit_byte={limit} lies outside the text of "
                f"{len(content)} bytes, or is empty"
            )
        try:
            entity = content[start:limit].decode()
        except UnicodeDecodeError:
            raise ValueError(
                f"span start_byte={start} limit_byte={limit} splits a UTF-8 character"
            ) from None
        entities.append((start, limit, f"{text(span, 'label')}: {entity}"))
    return sentence, " $$ ".join(entity for _, _, entity in sorted(entities))


def question_answering(record: Record, cell: Cell) -> Pair:
    """`question: Q title: T context: C` -> `target`, an answer or `No Answer`."""
    question, title = text(record, "question"), text(record, "title")
    inputs = f"question: {question} title: {title} context: {text(record, 'context')}"
    return inputs, text(record, "target")


def transliteration(record: Record, cell: Cell) -> Pair:
    """`hi-Latn-Deva TEXT` -> `target`, for the file `Latn2Deva.hi`."""
    source, target = _TRANSLITERATION.fullmatch(cell.file).group("source", "target")  # type: ignore[union-attr]
    return f"{cell.language}-{source}-{target} {text(record, 'input')}", text(record, "target")


_TRANSLATION = re.compile(r"[A-Za-z_]+2(?P<language>[A-Za-z_]+)")
_TRANSLITERATION = re.compile(r"(?P<source>[A-Za-z]+)2(?P<target>[A-Za-z]+)\.(?P<language>\w+)")


@dataclass(frozen=True)
class TaskFormat:
    """How a task's files are read.

    Attributes:
      pair: (record, cell) -> (input, target); ValueErrors get the file and line put before them.
      metrics: names in flix_jax.evaluation.metrics.METRICS, the task's headline first.
      file: what the names of the files look like, with the group `language`; None for files that
        are named by the language.
    """

    pair: Callable[[Record, Cell], Pair] = plain
    metrics: tuple[str, ...] = ("exact_match",)
    file: re.Pattern[str] | None = None


QA = TaskFormat(question_answering, ("token_f1", "exact_match"))
FORMATS: Mapping[str, TaskFormat] = {
    "ner": TaskFormat(ner, ("span_f1",)),
    "semantic_parsing": TaskFormat(plain, ("exact_match",)),
    "qa_in_lang": QA,
    "qa_cross_lang": QA,
    "translation": TaskFormat(plain, ("chrf",), _TRANSLATION),
    "transliteration": TaskFormat(transliteration, ("cer", "exact_match"), _TRANSLITERATION),
    "asr": TaskFormat(plain, ("cer",)),
    "topic": TaskFormat(plain, ("exact_match",)),
    "sentiment": TaskFormat(plain, ("exact_match",)),
}


@dataclass(frozen=True)
class XtremeUp:
    """A folder in XTREME-UP's layout as a Source (flix_jax.data.cells).

    The language of a cell is the name of its file, except that `en2sw` in `translation` is `sw` and
    `Latn2Deva.hi` in `transliteration` is `hi`. Where a task has several files of one language,
    their cells carry the file's name as a variant: `translation/sw:fr2sw`.

    Attributes:
      data_dir: local or in a bucket; holds `{task}/{split}/{file}.jsonl`.
      name: prefix of the seqio task names.
      formats: by task, beside or instead of those of FORMATS; a task without one is read as `input`
        and `target` and measured by exact match.

    Raises:
      ValueError: in `cells`, when the folder is missing or holds no such files.
    """

    data_dir: str
    name: str = "xtreme_up"
    formats: Mapping[str, TaskFormat] = field(default_factory=dict)

    def cells(self) -> tuple[Cell, ...]:
        """All cells that have a file in any split, sorted by name; reads no file."""
        return tuple(self._files)

    def splits(self, cell: Cell) -> tuple[str, ...]:
        """The splits in which `cell` has a file, in the order train, validation, test."""
        return tuple(self._files[cell])

    def format(self, task: str) -> TaskFormat:
        """How the files of `task` are read."""
        return {**FORMATS, **self.formats}.get(task, TaskFormat())

    def pairs(self, cell: Cell, split: str) -> tuple[list[str], list[str]]:
        """Inputs and targets of a split of `cell`, in the order of the file.

        Raises:
          ValueError: for a split that the cell lacks, and with file and line for a record that
            cannot be read.
        """
        if split not in self._files[cell]:
            held = ", ".join(self._files[cell])
            raise ValueError(f"cell {cell.name} has no split {split!r} in {self.data_dir}: {held}")
        path, pair = self._files[cell][split], self.format(cell.task).pair
        inputs, targets = [], []
        for line, record in read_records(path):
            try:
                source, target = pair(record, cell)
            except ValueError as error:
                raise ValueError(f"{path}:{line}: {error}") from None
            inputs.append(source)
            targets.append(target)
        return inputs, targets

    def register(
        self, cells: Iterable[Cell], *, vocabulary: Vocabulary, space: FeatureSpace | None
    ) -> dict[Cell, str]:
        """Registers a seqio task per cell, in place of earlier ones of the same names.

        Args:
          cells: of this source.
          vocabulary: of inputs and targets.
          space: gives every example its `feature_ids`; None for tasks without features.

        Returns:
          The name of each cell's task: `xtreme_up.ner.sw`.
        """
        from flix_jax.data.seqio_tasks import register_task, task_name
        from flix_jax.evaluation.metrics import metric_fn

        return {
            cell: register_task(
                task_name(self.name, cell),
                functools.partial(self.pairs, cell),
                self.splits(cell),
                vocabulary=vocabulary,
                feature_ids=None if space is None else space.encode(cell.annotations()),
                metric_fn=metric_fn(self.format(cell.task).metrics),
            )
            for cell in cells
        }

    @functools.cached_property
    def _files(self) -> dict[Cell, dict[str, Any]]:
        from etils import epath

        root = epath.Path(self.data_dir)
        layout = "expected {task}/{train,validation,test}/{file}.jsonl in it"
        if not self.data_dir or not root.is_dir():
            raise ValueError(f"XtremeUp.data_dir={self.data_dir!r} is not a folder: {layout}")
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for task in sorted(path for path in root.iterdir() if path.is_dir()):
            for split in SPLITS:
                folder = task / split
                for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
                    stem = path.name.removesuffix(".jsonl")
                    found.setdefault(task.name, {}).setdefault(stem, {})[split] = path
        if not found:
            raise ValueError(f"XtremeUp.data_dir={self.data_dir!r} holds no data: {layout}")
        files = {}
        for task_name, stems in found.items():
            languages = {stem: self._language(task_name, stem) for stem in stems}
            for stem, language in languages.items():
                several = list(languages.values()).count(language) > 1
                cell = Cell(task_name, language, stem, stem if several else "")
                files[cell] = stems[stem]
        return dict(sorted(files.items(), key=lambda item: item[0].name))

    def _language(self, task: str, stem: str) -> str:
        pattern = self.format(task).file
        if pattern is None:
            return stem
        matched = pattern.fullmatch(stem)
        if matched is None:
            raise ValueError(
                f"{self.data_dir}/{task}: the file name {stem}.jsonl is not of the form "
                f"{pattern.pattern} and tells no language"
            )
        return matched["language"]


def read_records(path: Any) -> Iterator[tuple[int, Record]]:
    """The records of a jsonl file with their line numbers, from 1; blank lines are passed over.

    Raises:
      ValueError: with file and line, for text that is not UTF-8, malformed JSON or a line that is
        no object; for a file without any record.
    """
    from etils import epath

    empty = True
    content = epath.Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    # Lines end at \n alone: the texts hold characters that str.splitlines takes for ends of lines.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not UTF-8: byte {line[error.start]:#04x} at column "
                f"{error.start + 1}"
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: malformed JSON: {error.msg} at column {error.colno}"
            ) from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {shorten(record)}")
        empty = False
        yield number, record
    if empty:
        raise ValueError(f"{path}: the file holds no records")


def text(record: Record, name: str) -> str:
    """The string field `name`; ValueError when it is missing, no string, or no valid Unicode."""
    if name not in record:
        raise ValueError(f"field {name!r} is missing: the record has {', '.join(record) or 'none'}")
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r}: expected a string, got {shorten(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {name!r}: holds half of a surrogate pair") from None
    return value


def shorten(value: Any) -> str:
    """`value` as JSON, cut to fit an error message."""
    shown = json.dumps(value, ensure_ascii=True)
    return shown if len(shown) <= 40 else shown[:37] + "..."
