"""XTREME-UP as a source of cells: folders of jsonl files become seqio tasks.

The layout is that of the XTREME-UP release (arXiv 2305.11938): `{task}/{split}/{file}.jsonl`, a
record per line. Any further folder of files is a task too: with records of `input` and `target` as
it is, with others by a `TaskFormat`. Which files the release has was read in the repository
published with it (github.com/google-research/xtreme-up): languages in evaluation/constants.py,
names of files in evaluation/score_system.py, and of the retrieval index, `{task}/index.jsonl`, in
baseline/jsonl_to_seqio_tsv.py.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args

from flix_jax.adapters.suggest import did_you_mean, nearest_path
from flix_jax.data.cells import RETRIEVE, Cell, Inference
from flix_jax.data.language_table import read_language_table
from flix_jax.tasks.formats import (
    FORMATS,
    Pair,
    TaskFormat,
    ner,
    passage,
    passage_id,
    plain,
)
from flix_jax.tasks.records import (
    LINES_SHOWN,
    Record,
    Skipped,
    Template,
    first_fields,
    read_records,
    shorten,
    template_fields,
    text,
)
from flix_jax.tasks.source_text import FromFile, SourceText, check_sources, from_record
from flix_jax.tasks.xtreme_up_languages import CODE_SWITCHED, FILES, under_represented

if TYPE_CHECKING:
    from flix_jax.adapters.features import FeatureSpace
    from flix_jax.data.vocabularies import Vocabulary

__all__ = [
    "FORMATS",
    "Pair",
    "Record",
    "TaskFormat",
    "XtremeUp",
    "ner",
    "plain",
    "read_records",
    "shorten",
    "text",
]

SPLITS = ("train", "validation", "test")
OnBadRecord = Literal["error", "skip"]
Converted = TypeVar("Converted")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Row(Generic[Converted]):
    """A record that was read: its line from 1, its place among the records of the file from 0."""

    line: int
    place: int
    record: Record
    converted: Converted


@dataclass(frozen=True)
class XtremeUp:
    """A folder in XTREME-UP's layout as a Source (flix_jax.data.cells).

    The language of a cell is the name of its file, but for the locales of `asr` and `pt_br`
    (`af_za` is `af`), and `en2sw` in `translation` is `sw`, `Latn2Deva.hi` in `transliteration` is
    `hi`. Where a task has several files of one language, their cells carry the file's name as a
    variant: `translation/sw:fr2sw`.

    Attributes:
      data_dir: local or in a bucket; holds `{task}/{split}/{file}.jsonl`.
      name: prefix of the seqio task names.
      formats: by task, beside or instead of those of FORMATS; a task without one is read as `input`
        and `target` and measured by exact match.
      prompts: by task, a template around the input that the format gives, which stands in it as
        `{input}`, with `{task}`, `{language}`, the columns of the language table and the fields of
        the record; none by default. Targets and the passages of an index have no prompt.
      on_bad_record: 'error', or 'skip' to leave out what cannot be read; skipped records are logged
        once per file and counted in `skipped`.
      code_switched: whether `semantic_parsing` includes its code-switched files (bn_cs, hi_cs,
        ta_cs), which the benchmark's score leaves out.
      languages: a table of languages (flix_jax.data.language_table) whose columns become
        annotations of the cells, and so feature types: 'configs/features/languages.tsv' is one.

    Raises:
      ValueError: for a prompt without `{input}` and an unknown `on_bad_record`. In `cells`: when
        the folder is missing or holds no such files, `formats` or `prompts` name an unknown task, a
        template names a field that the records lack, or the table lacks a language.
    """

    data_dir: str
    name: str = "xtreme_up"
    formats: Mapping[str, TaskFormat] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    on_bad_record: OnBadRecord = "error"
    code_switched: bool = False
    languages: str | None = None

    def __post_init__(self) -> None:
        if self.on_bad_record not in get_args(OnBadRecord):
            raise ValueError(
                f"XtremeUp.on_bad_record={self.on_bad_record!r}: expected 'error' or 'skip'; "
                f"{did_you_mean(self.on_bad_record, get_args(OnBadRecord))}"
            )
        for name in ("formats", "prompts"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(
                    f"XtremeUp.{name}={getattr(self, name)!r}: expected a mapping from task, "
                    "{'ner': …}"
                )
        for task, given in self.formats.items():
            if not isinstance(given, TaskFormat):
                raise ValueError(
                    f"XtremeUp.formats[{task!r}]={given!r}: expected a TaskFormat, in gin "
                    "@TaskFormat()"
                )
        for task, template in self._prompts.items():
            if "input" not in template.fields:
                hints = [(name, did_you_mean(name, ["input"])) for name in template.fields]
                near = [f"; {name!r}: {hint}" for name, hint in hints if hint.startswith("did")]
                raise ValueError(
                    f"XtremeUp.prompts[{task!r}]={self.prompts[task]!r}: expected {{input}}, what "
                    f"the format of the task gives, in it{''.join(near)}"
                )

    # Cells

    def cells(self) -> tuple[Cell, ...]:
        """All cells that have a file in any split, sorted by name.

        Reads no file, but for a few records of each task whose templates name their fields.
        """
        return tuple(self._files)

    def splits(self, cell: Cell) -> tuple[str, ...]:
        """The splits in which `cell` has a file, in the order train, validation, test."""
        return tuple(self._files[cell])

    def format(self, task: str) -> TaskFormat:
        """How the files of `task` are read."""
        return {**FORMATS, **self.formats}.get(task, TaskFormat())

    def under_represented(self, cell: Cell) -> bool | None:
        """Whether the benchmark's score of the task averages over the file of `cell`.

        None for what the benchmark does not have, as `translation/sw:fr2sw`.
        """
        return under_represented(cell.task, cell.file)

    def benchmark_size(self, task: str) -> int:
        """Over how many files the benchmark's score of `task` averages: the under-represented."""
        return sum(bool(under_represented(task, file)) for file in FILES.get(task, {}))

    def missing(self) -> dict[str, tuple[str, ...]]:
        """What the benchmark lists and the folder lacks, in any split.

        Returns:
          By task of the benchmark, the languages; the names of the files where a task has several
          of one language. Tasks that lack nothing are left out.
        """
        there: dict[str, set[str]] = {}
        for cell in self._files:
            there.setdefault(cell.task, set()).add(cell.file)
        absent = {}
        for task, files in FILES.items():
            languages = list(files.values())
            names = tuple(
                language if languages.count(language) == 1 else file
                for file, language in files.items()
                if file not in there.get(task, ()) and not self._leaves_out(task, file)
            )
            if names:
                absent[task] = names
        return absent

    def missing_text(self) -> str:
        """`missing` for a log, a line for each task; '' where nothing is missing."""
        held = {cell.task for cell in self._files}
        lines = []
        for task, names in self.missing().items():
            of = sum(not self._leaves_out(task, file) for file in FILES[task])
            all_of_them = f"{len(names)} of {of} files not there: {', '.join(names)}"
            lines.append(f"{task}: {all_of_them if task in held else 'not there'}")
        return "\n".join(lines)

    # Records

    def pairs(self, cell: Cell, split: str) -> tuple[list[str], list[str]]:
        """Inputs and targets of a split of `cell`, in the order of the file.

        Raises:
          ValueError: for a split that the cell lacks, with file and line for a record that cannot
            be read, and for a file of which `on_bad_record` would skip all.
        """
        examples = [row.converted for row in self._examples(cell, split)]
        return [source for source, _ in examples], [target for _, target in examples]

    def texts(self, cell: Cell, split: str) -> list[str]:
        """The inputs of `pairs` without their prompts: what a format makes of each record."""
        return [row.converted[0] for row in self._examples(cell, split, prompted=False)]

    def sources(self, cell: Cell, split: str, source_text: SourceText) -> list[str]:
        """The English source of each example, in the order of `pairs`; '' where it has none.

        Raises:
          ValueError: with file and line, for a field that is no text, and for a file of
            translations with lines that cannot be read or name no record.
        """
        path, known = self._files[cell][split], template_fields(cell)
        template = source_text.template(cell.task, self.format(cell.task).source)
        given = None
        if source_text.files is not None:
            given = FromFile(source_text.path(cell, split), source_text.id)
        found = []
        for row in self._examples(cell, split):
            try:
                if given is not None:
                    found.append(given(row.record, row.place))
                elif template is not None:
                    found.append(from_record(row.record, template, known))
                else:
                    found.append("")
            except ValueError as error:  # never passed over: as many sources as examples are needed
                raise ValueError(f"{path}:{row.line}: {error}") from None
        if given is not None:
            unknown = given.check_all_asked(path, str(path) in self._skipped)
            if unknown:
                _logger.warning("%s: %d translations are of records left out", given.path, unknown)
        return found

    def check_sources(self, cells: Iterable[Cell], source_text: SourceText) -> None:
        """Holds a run's choice of sources against what there is, before anything is read for it.

        Raises:
          ValueError: no example can have a source, a task that there is not, a field that the
            records lack, or splits whose translations would be of one file.
        """
        tasks = sorted({cell.task for cell in self._files})
        for task in source_text.templates:
            if task not in tasks:
                raise ValueError(
                    f"SourceText.templates: no task {task!r} in {self.data_dir}; "
                    f"{did_you_mean(task, tasks)}"
                )
        paths = {cell: self._files[cell] for cell in cells}
        check_sources(source_text, paths, lambda task: self.format(task).source)

    def passage_ids(self, cell: Cell, split: str) -> list[str]:
        """Of a retrieval cell: the id of each query's passage, in the order of `pairs`."""
        self._check_retrieval(cell)
        return [passage_id(row.record) for row in self._examples(cell, split)]

    def index_path(self, cell: Cell) -> str:
        """The file of passages that the queries of a retrieval cell are looked up in.

        `{task}/index/{file}.jsonl` where there is one, else the release's `{task}/index.jsonl`,
        which all languages and splits of the task share.

        Raises:
          ValueError: for a cell of another task, or without either file.
        """
        from etils import epath

        self._check_retrieval(cell)
        folder = epath.Path(self.data_dir) / cell.task
        paths = folder / "index" / f"{cell.file}.jsonl", folder / "index.jsonl"
        for path in paths:
            if path.exists():
                return str(path)
        raise ValueError(f"{cell.name}: no index of passages: neither {paths[1]} nor {paths[0]}")

    def index(self, cell: Cell) -> tuple[list[str], list[str]]:
        """The passages of `index_path`: their ids and their texts, `title context`."""
        passages = list(
            self._read(self.index_path(cell), lambda record: (passage_id(record), passage(record)))
        )
        ids, contents = zip(*(row.converted for row in passages), strict=True)
        return list(ids), list(contents)

    @property
    def skipped(self) -> Mapping[str, Skipped]:
        """By path, what `on_bad_record='skip'` left out of the files that were read so far."""
        return dict(self._skipped)

    def skipped_text(self) -> str:
        """`skipped` for a log, a line for each file; '' where nothing was skipped."""
        return "\n".join(f"{path}: {entry}" for path, entry in self._skipped.items())

    def register(
        self,
        cells: Iterable[Cell],
        *,
        vocabulary: Vocabulary,
        space: FeatureSpace | None,
        source_text: SourceText | None = None,
    ) -> dict[Cell, str]:
        """Registers a seqio task per cell, in place of earlier ones of the same names.

        Args:
          cells: of this source.
          vocabulary: of inputs, targets and sources.
          space: gives every example its `feature_ids`; None for tasks without features.
          source_text: gives examples their English source; None for tasks without.

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
                answers=functools.partial(self.passage_ids, cell)
                if self.inference(cell) == RETRIEVE
                else None,
                sources=None
                if source_text is None
                else functools.partial(self.sources, cell, source_text=source_text),
                join=None if source_text is None else source_text.joiner,
            )
            for cell in cells
        }

    def register_indexes(
        self,
        cells: Iterable[Cell],
        *,
        vocabulary: Vocabulary,
        space: FeatureSpace | None,
        source_text: SourceText | None = None,
    ) -> dict[Cell, str]:
        """Registers the passages that retrieval cells are looked up in, in the split `index`.

        Inputs are the passages, targets their ids. Passages have the features of the cell that asks
        for them; cells of one index and the same features share a task.

        Args:
          cells: of this source; those of tasks without retrieval are passed over.
          vocabulary, space, source_text: as of `register`. Passages have no source.

        Returns:
          The name of each retrieval cell's index: `xtreme_up.retrieval_in_lang.index`, with the
          cell's feature ids where it has some.

        Raises:
          ValueError: for a retrieval cell without an index of passages.
        """
        from flix_jax.data.seqio_tasks import register_task

        registered: dict[tuple[str, tuple[int, ...]], str] = {}
        names = {}
        for cell in cells:
            if self.inference(cell) != RETRIEVE:
                continue
            path = self.index_path(cell)
            ids = None if space is None else space.encode(cell.annotations())
            key = path, () if ids is None else tuple(int(i) for i in ids)
            if key not in registered:
                features = "".join(f"_{'x' if i < 0 else i}" for i in key[1])
                own = "" if path.endswith(f"{cell.task}/index.jsonl") else f".{cell.language}"
                registered[key] = register_task(
                    f"{self.name}.{cell.task}.index{own}{features}",
                    lambda split, cell=cell: tuple(reversed(self.index(cell))),
                    ("index",),
                    vocabulary=vocabulary,
                    feature_ids=ids,
                    sources=None
                    if source_text is None
                    else lambda split, cell=cell: [""] * len(self.index(cell)[0]),
                    join=None if source_text is None else source_text.joiner,
                )
            names[cell] = registered[key]
        return names

    def inference(self, cell: Cell) -> Inference:
        """How predictions for a cell are made (see `TaskFormat.inference`)."""
        return self.format(cell.task).inference

    def _examples(self, cell: Cell, split: str, *, prompted: bool = True) -> Iterator[_Row[Pair]]:
        if split not in self._files[cell]:
            held = ", ".join(self._files[cell])
            raise ValueError(f"cell {cell.name} has no split {split!r} in {self.data_dir}: {held}")
        read = self.format(cell.task).read
        prompt = self._prompts.get(cell.task) if prompted else None
        known = template_fields(cell)

        def convert(record: Record) -> Pair:
            source, target = read(record, cell)
            if prompt is None:
                return source, target
            given = {"input": source, **known}

            def value(name: str) -> str:
                return given[name] if name in given else text(record, name, numbers=True)

            return prompt.fill(value), target

        return self._read(self._files[cell][split], convert)

    def _read(self, path: Any, convert: Callable[[Record], Converted]) -> Iterator[_Row[Converted]]:
        """The records of a file, each with what `convert` makes of it, under `on_bad_record`."""
        bad: list[tuple[int, str]] = []
        good = 0

        def skip(line: int, error: ValueError) -> None:
            if self.on_bad_record == "error":
                raise ValueError(f"{path}:{line}: {error}") from None
            bad.append((line, str(error)))

        for line, record in read_records(path, skip):
            try:
                converted = convert(record)
            except ValueError as error:
                skip(line, error)
                continue
            yield _Row(line, good + len(bad), record, converted)
            good += 1
        if not bad:
            return
        lines = tuple(line for line, _ in bad[:LINES_SHOWN])
        entry = Skipped(len(bad), good + len(bad), lines, bad[0][1])
        if not good:
            raise ValueError(f"{path}: none of the {len(bad)} records can be read: {entry.first}")
        if self._skipped.get(str(path)) != entry:
            self._skipped[str(path)] = entry
            _logger.warning("%s: %s", path, entry)

    def _check_retrieval(self, cell: Cell) -> None:
        if self.format(cell.task).inference != RETRIEVE:
            raise ValueError(f"{cell.name}: the task {cell.task} has no index of passages")

    @functools.cached_property
    def _skipped(self) -> dict[str, Skipped]:
        return {}

    @functools.cached_property
    def _prompts(self) -> dict[str, Template]:
        return {
            task: Template.parse(template, f"XtremeUp.prompts[{task!r}]")
            for task, template in self.prompts.items()
        }

    # Files

    def _leaves_out(self, task: str, file: str) -> bool:
        return task == "semantic_parsing" and file in CODE_SWITCHED and not self.code_switched

    @functools.cached_property
    def _files(self) -> dict[Cell, dict[str, Any]]:
        from etils import epath

        root = epath.Path(self.data_dir)
        layout = "expected {task}/{train,validation,test}/{file}.jsonl in it"
        if not self.data_dir or not root.is_dir():
            near = "" if root.exists() else nearest_path(self.data_dir)
            raise ValueError(f"XtremeUp.data_dir={self.data_dir!r} is not a folder: {layout}{near}")
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for task in sorted(path for path in root.iterdir() if path.is_dir()):
            for split in SPLITS:
                folder = task / split
                for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
                    stem = path.name.removesuffix(".jsonl")
                    if not self._leaves_out(task.name, stem):
                        found.setdefault(task.name, {}).setdefault(stem, {})[split] = path
        if not found:
            raise ValueError(f"XtremeUp.data_dir={self.data_dir!r} holds no data: {layout}")
        self._check_tasks(found)
        try:
            table = None if self.languages is None else read_language_table(self.languages)
        except ValueError as error:
            raise ValueError(f"XtremeUp.languages: {error}") from None
        files = {}
        for task_name, stems in found.items():
            languages = {stem: self._language(task_name, stem) for stem in stems}
            for stem, language in languages.items():
                several = list(languages.values()).count(language) > 1
                cell = Cell(task_name, language, stem, stem if several else "")
                files[cell if table is None else table.annotate(cell)] = stems[stem]
        files = dict(sorted(files.items(), key=lambda item: item[0].name))
        firsts = {cell.task: cell for cell in reversed(files)}
        for cell in firsts.values():
            self._check_fields(cell, next(iter(files[cell].values())))
        return files

    def _language(self, task: str, stem: str) -> str:
        try:
            return self.format(task).language(stem)
        except ValueError as error:
            raise ValueError(f"{self.data_dir}/{task}: {error}") from None

    def _check_tasks(self, found: Iterable[str]) -> None:
        known = {"formats": {*found, *FORMATS}, "prompts": {*found, *FORMATS, *self.formats}}
        for parameter, tasks in known.items():
            for task in getattr(self, parameter):
                if task not in tasks:
                    raise ValueError(
                        f"XtremeUp.{parameter}: no task {task!r} in {self.data_dir}; "
                        f"{did_you_mean(task, sorted(tasks))}"
                    )

    def _check_fields(self, cell: Cell, path: Any) -> None:
        """Holds the templates of a task against the fields of its first records."""
        known = template_fields(cell)
        named = [
            (f"TaskFormat.{parameter} of XtremeUp.formats[{cell.task!r}]", fields, list(known))
            for parameter, fields in self.format(cell.task).fields.items()
            if cell.task in self.formats
        ]
        if cell.task in self._prompts:
            place = f"XtremeUp.prompts[{cell.task!r}]"
            named.append((place, self._prompts[cell.task].fields, ["input", *known]))
        if all(name in given for _, fields, given in named for name in fields):
            return
        held = first_fields(path)
        if not held:
            return  # not a record among them: reading will say what is wrong
        for place, fields, given in named:
            for name in fields:
                if name not in (*given, *held):
                    raise ValueError(
                        f"{place}: no field {name!r} in the records of {path}; "
                        f"{did_you_mean(name, [*given, *held])}"
                    )
