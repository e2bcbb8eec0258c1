"""What a run is asked to predict for: texts, and the features that each is to have."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from flix_jax.adapters.features import FeatureSpace, check_weight
from flix_jax.adapters.ids import ABSENT
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.cells import Cell
from flix_jax.tasks.source_text import SourceText
from flix_jax.tasks.xtreme_up import read_records, shorten

JSONL, TEXT = FORMS = ("jsonl", "text")

Features = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to predict for.

    Attributes:
      text: the input.
      record: what the prediction is added to.
      annotations: its features, as `FeatureSpace.encode_weighted` takes them.
      source: its English source, for adapters that fuse with it; '' for none.
    """

    text: str
    record: Mapping[str, Any]
    annotations: Mapping[str, Any]
    source: str = ""


def parse_features(text: str, space: FeatureSpace | None) -> Features:
    """Reads ``task=ner,language=sw`` and ``language=sw:0.7,language=rw:0.3``.

    Returns:
      Type -> value -> weight, 1 where none is given.

    Raises:
      ValueError: an entry of another form, an unknown type, a value that the type has not, or one
        that is named twice.
    """
    features: Features = {}
    for entry in filter(None, text.split(",")):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not value:
            raise ValueError(
                f"features {text!r}: {entry!r} is not of the form type=value or type=value:weight"
            )
        if space is None:
            raise ValueError(f"features {text!r}: the run has no adapters, hence no features")
        known = space.type(name).known_values
        value, weight = _split_weight(value, known)
        if value not in known:
            raise ValueError(
                f"features {text!r}: {value!r} is no {name}; {did_you_mean(value, known)}"
            )
        try:
            check_weight(value, weight)
        except ValueError as error:
            raise ValueError(f"features {text!r}: {error}") from None
        values = features.setdefault(name, {})
        if value in values:
            raise ValueError(f"features {text!r}: {name}={value} is named more than once")
        values[value] = weight
    return features


def _split_weight(value: str, known: tuple[str, ...]) -> tuple[str, float]:
    head, colon, tail = (part.strip() for part in value.rpartition(":"))
    if value in known or not colon:  # the names of cells may have a colon
        return value, 1.0
    try:
        return head, float(tail)
    except ValueError:
        return value, 1.0


def form_of(path: epath.PathLike, form: str | None) -> str:
    """The form of a file: as given, or by its name."""
    if form is None:
        return TEXT if epath.Path(path).suffix == ".txt" else JSONL
    if form not in FORMS:
        raise ValueError(f"unknown input form {form!r}; {did_you_mean(form, FORMS)}")
    return form


def read(
    path: epath.PathLike,
    space: FeatureSpace | None,
    features: str,
    *,
    form: str | None = None,
    override: bool = False,
    cells: Iterable[Cell] = (),
    source_text: SourceText | None = None,
    say: Callable[[str], None] = print,
) -> list[Request]:
    """The requests of a file, one per line.

    A line of jsonl is an object with ``input``; those of its fields that are called as feature
    types (``task``, ``language``) are its features: a value, a list of them, or an object value ->
    weight. A line of text is an input. A feature that is not known is absent, and counted. The
    field ``source`` is the English source for a run that reads sources; a line without one, or with
    an empty one, is counted too.

    Args:
      path: the file, UTF-8.
      space: the features of the run; None for a run without adapters.
      features: as `parse_features` takes them, for lines that do not say otherwise.
      form: 'jsonl' or 'text'; None goes by the file's name.
      override: whether `features` go before what lines say.
      cells: of the run, whose annotations (family, script) lines of their languages have too.
      source_text: of the run; None for one without sources.
      say: takes the counts of features that are unknown or not given, and of missing sources.

    Raises:
      ValueError: a line that cannot be used, with file and line number.
    """
    path = epath.Path(path)
    given = parse_features(features, space)
    if override and not given:
        raise ValueError("override has no effect without features")
    of_languages = {cell.language: dict(cell.extra) for cell in cells}
    found: list[Request] = []
    unknown: Counter[str] = Counter()
    without: Counter[str] = Counter()
    lines = _text(path) if form_of(path, form) == TEXT else read_records(path)
    for number, record in lines:
        try:
            if not isinstance(record.get("input"), str):
                raise ValueError("expected a text in the field 'input'")
            _check_text(record)
            annotations = {**record, **given} if override else {**given, **record}
            annotations = as_of_a_cell(annotations, of_languages)
            request = _request(record, annotations, source_text)
            if space is not None:
                check(annotations, space)
                unknown.update(space.unknown_types(annotations))
                without.update(name for name in space.names if not annotations.get(name))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        found.append(request)
    for name, count in unknown.items():
        say(f"{count} of {len(found)} lines have an unknown {name} and run without one")
    for name, count in sorted(without.items()):
        say(f"{count} of {len(found)} lines have no {name}")
    sourceless = sum(not request.record.get("source") for request in found)
    if source_text is not None and sourceless:
        say(f"{sourceless} of {len(found)} lines have no source and run on their input alone")
    return found


def _request(
    record: Mapping[str, Any], annotations: Mapping[str, Any], source_text: SourceText | None
) -> Request:
    if source_text is None:
        return Request(record["input"], dict(record), annotations)
    source = record.get("source") or ""
    if not isinstance(source, str):
        raise ValueError(f"expected a text in the field 'source', got {shorten(source)}")
    if source_text.joined is not None:
        return Request(source_text.join(source, record["input"]), dict(record), annotations)
    return Request(record["input"], dict(record), annotations, source)


def check(annotations: Mapping[str, Any], space: FeatureSpace) -> None:
    """ValueError where no feature is known: the network would run without adapters unnoticed."""
    ids, _ = space.room_for([annotations]).encode_weighted(annotations)
    if (ids == ABSENT).all():
        raise ValueError(
            f"no known feature of {', '.join(space.names)}: the adapters would be off; "
            "name them in the line or by features"
        )


def _text(path: epath.Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8") from None
    lines = content.removesuffix("\n").split("\n") if content else []
    return [(i, {"input": line.removesuffix("\r")}) for i, line in enumerate(lines, start=1)]


def _check_text(record: Mapping[str, Any]) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object[error.start]!r} is half a character") from None


def as_of_a_cell(
    record: Mapping[str, Any], of_languages: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Annotations as those of a cell: every example is shared, and a cell has a name.

    Args:
      record: what is said.
      of_languages: language -> what else cells of that language are annotated with.
    """
    task, language = (_only(record.get(name)) for name in ("task", "language"))
    annotations = {"shared": "shared", **of_languages.get(language or "", {}), **record}
    if task is not None and language is not None:
        annotations.setdefault("cell", f"{task}/{language}")
    return annotations


def _only(value: Any) -> str | None:
    """The one value that is named, without a weight of its own; else None."""
    if isinstance(value, Mapping):
        names = list(value)
        return names[0] if len(names) == 1 and value[names[0]] == 1 else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else None
