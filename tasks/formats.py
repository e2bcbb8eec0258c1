"""How records become inputs and targets: the format of every task of XTREME-UP, and of one's own.

Fields, inputs and targets are those of the release (arXiv 2305.11938) and of the preprocessing
published with it (github.com/google-research/xtreme-up, baseline/jsonl_to_seqio_tsv_lib.py and
baseline/retrieval_tasks.py). Where ours is another, the function says so.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.cells import COMPLETE, GENERATE, RETRIEVE, Cell, Inference
from flix_jax.evaluation.metrics import find_metric, metric_fn
from flix_jax.tasks.records import Record, Template, integer, shorten, template_fields, text

Pair = tuple[str, str]


def plain(record: Record, cell: Cell) -> Pair:
    """`input` -> `target`."""
    return text(record, "input"), text(record, "target")


def ner(record: Record, cell: Cell) -> Pair:
    """`text` -> `PER: x $$ LOC: y`, the entities in the order of the text; empty without any.

    `spans` gives each entity's `label` and its place by the byte offsets `start_byte` and
    `limit_byte` in the UTF-8 of `text`. A record without `spans` gives its `target` as it is.
    Tabs stay; the published preprocessing, which writes TSV, makes spaces of them.
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
        start, limit = integer(span, "start_byte"), integer(span, "limit_byte")
        if not 0 <= start < limit <= len(content):
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


def autocomplete(record: Record, cell: Cell) -> Pair:
    """`be-CONTEXT$` -> `target`, the word that the context breaks off in, for the file `be`.

    The dollar keeps apart a context that ends in a word and one that ends in a space.
    """
    return f"{cell.file}-{text(record, 'context')}$", text(record, "target")


def retrieval(record: Record, cell: Cell) -> Pair:
    """The lower-cased `question` -> the text of its passage (`passage`); `id` names the passage.

    Lower case is Unicode's; the published preprocessing lower-cases A to Z only, and those in the
    passages too.
    """
    passage_id(record)
    return text(record, "question").lower(), passage(record)


def passage(record: Record) -> str:
    """`title context`: the text of a passage, in a record or in the index."""
    return f"{text(record, 'title')} {text(record, 'context')}"


def passage_id(record: Record) -> str:
    """`id`, a string or a number: what the index and a prediction call a passage."""
    return text(record, "id", numbers=True)


_TRANSLATION = re.compile(r"[A-Za-z_]+2(?P<language>[A-Za-z_]+)")
_TRANSLITERATION = re.compile(r"(?P<source>[A-Za-z]+)2(?P<target>[A-Za-z]+)\.(?P<language>\w+)")
_LOCALE = re.compile(r"(?P<language>[a-z]+_han[st]|[^_]+)(?:_.+)?")
_BRAZILIAN = re.compile(r"(?P<language>.+?)(?:_br)?")


@dataclass(frozen=True)
class TaskFormat:
    """How a task's files are read, what it is measured by, and what its evaluation asks for.

    Input and target are templates over the fields of a record, beside `{task}`, `{language}` and
    the columns of the language table: `input='{question} {context}'`, `target='{answer}'`. Fields
    are texts or numbers.

    Attributes:
      pair: (record, cell) -> (input, target), in place of the templates; ValueErrors get the file
        and line put before them.
      metrics: names in flix_jax.evaluation.metrics.METRICS, the task's headline first. Those of
        rankings fit 'complete' and 'retrieve', all others 'generate'.
      file: regular expression for the names of the files, with the group `language`; None for
        files that are named by the language.
      input, target: templates.
      inference: 'generate' (one text), 'complete' (three guesses, the best first) or 'retrieve'
        (passages of an index, by the similarity of their encodings to the input's).
      source: a template for the English source of an example, where a run reads one
        (flix_jax.tasks.source_text); None for a task whose records have none.

    Raises:
      ValueError: naming the parameter, for what is not as described above.
    """

    pair: Callable[[Record, Cell], Pair] | None = None
    metrics: tuple[str, ...] = ("exact_match",)
    file: re.Pattern[str] | str | None = None
    input: str = "{input}"
    target: str = "{target}"
    inference: Inference = GENERATE
    source: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.metrics, str):
            raise ValueError(
                f"TaskFormat.metrics={self.metrics!r}: expected a list of names, "
                f"({self.metrics!r},)"
            )
        object.__setattr__(self, "metrics", tuple(self.metrics))
        try:
            metric_fn(self.metrics)
        except ValueError as error:
            raise ValueError(f"TaskFormat.metrics={self.metrics}: {error}") from None
        if self.inference not in get_args(Inference):
            raise ValueError(
                f"TaskFormat.inference={self.inference!r}: expected one of "
                f"{', '.join(get_args(Inference))}; "
                f"{did_you_mean(self.inference, get_args(Inference))}"
            )
        ranked = [name for name in self.metrics if find_metric(name).ranked]
        if bool(ranked) != (self.inference != GENERATE):
            scored, given = ("rankings", "one text") if ranked else ("one text", "rankings")
            raise ValueError(
                f"TaskFormat.metrics={self.metrics}: {self.metrics[0]!r} scores {scored}, but "
                f"TaskFormat.inference={self.inference!r} gives {given} for each example"
            )
        for name, template in self._parsed.items():
            if self.pair is not None and template != Template.parse(f"{{{name}}}", name):
                given = getattr(self, name)
                raise ValueError(f"TaskFormat.{name}={given!r} has no effect with TaskFormat.pair")
        if self.source is not None and not Template.parse(self.source, "TaskFormat.source").fields:
            raise ValueError(
                f"TaskFormat.source={self.source!r}: expected fields of the record in it"
            )
        try:
            pattern = None if self.file is None else re.compile(self.file)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"TaskFormat.file={self.file!r}: not a regular expression: {error}"
            ) from None
        if pattern is not None and "language" not in pattern.groupindex:
            raise ValueError(
                f"TaskFormat.file={pattern.pattern!r}: expected a group (?P<language>...) in it"
            )

    @property
    def fields(self) -> dict[str, tuple[str, ...]]:
        """The fields that the templates `input` and `target` name; nothing with a `pair`."""
        if self.pair is not None:
            return {}
        return {name: template.fields for name, template in self._parsed.items()}

    def read(self, record: Record, cell: Cell) -> Pair:
        """Input and target of a record; ValueError for one that lacks a field."""
        if self.pair is not None:
            return self.pair(record, cell)
        known = template_fields(cell)

        def value(name: str) -> str:
            return known[name] if name in known else text(record, name, numbers=True)

        parsed = self._parsed
        return parsed["input"].fill(value), parsed["target"].fill(value)

    def language(self, file: str) -> str:
        """The language that the name of a file tells; ValueError where it tells none."""
        if self.file is None:
            return file
        pattern = re.compile(self.file)
        matched = pattern.fullmatch(file)
        if matched is None:
            raise ValueError(
                f"the file name {file}.jsonl is not of the form {pattern.pattern} and tells no "
                "language"
            )
        return matched["language"]

    @functools.cached_property
    def _parsed(self) -> dict[str, Template]:
        return {
            name: Template.parse(getattr(self, name), f"TaskFormat.{name}")
            for name in ("input", "target")
        }


_QA = TaskFormat(question_answering, ("token_f1", "exact_match"))
# The contexts are in English as they are: the form of the input, with the question translated.
_QA_SOURCE = "question: {question_translated} title: {title} context: {context}"
_RETRIEVAL = TaskFormat(retrieval, ("mrr_at_10",), inference=RETRIEVE)
#: By task. Codes that differ from task to task by a locale only are one language: the speech file
#: `af_za` is `af`, the parsing file `pt_br` is `pt`, as in the published scorer.
FORMATS: Mapping[str, TaskFormat] = {
    "ner": TaskFormat(ner, ("span_f1",)),
    "semantic_parsing": TaskFormat(plain, ("exact_match",), _BRAZILIAN, source="{input_en}"),
    "qa_in_lang": _QA,
    "qa_cross_lang": replace(_QA, source=_QA_SOURCE),
    "retrieval_in_lang": _RETRIEVAL,
    "retrieval_cross_lang": _RETRIEVAL,
    "translation": TaskFormat(plain, ("chrf", "bleu"), _TRANSLATION),
    "transliteration": TaskFormat(transliteration, ("cer", "exact_match"), _TRANSLITERATION),
    "autocomplete": TaskFormat(autocomplete, ("top_3_accuracy",), inference=COMPLETE),
    # The published normalisation is the metric's; the texts stay as they are.
    "asr": TaskFormat(plain, ("asr_cer", "cer"), _LOCALE),
    # Not the benchmark's, but common beside it.
    "topic": TaskFormat(plain, ("exact_match",), source="{input_en}"),
    "sentiment": TaskFormat(plain, ("exact_match",)),
}
