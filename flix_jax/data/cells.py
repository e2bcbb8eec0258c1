"""Cells: which (task, language) data sets a mixture trains on, and which it holds out.

A cell is one data set of one task in one language. Cells are named `task/language`, selected by
patterns over those names, and drawn from at given rates. Nothing here reads a file or imports
seqio: what a folder holds is told by a `Source`.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, get_args

from flix_jax.adapters import text_tables
from flix_jax.adapters.suggest import did_you_mean

if TYPE_CHECKING:
    from flix_jax.adapters.features import FeatureSpace

Group = Literal["seen", "unseen", "unseen_language"]
OnOverlap = Literal["report", "drop", "ignore"]
RATES = ("proportional", "equal", "temperature")

# How a cell is inferred: one text for each example, several guesses, or passages of an index.
Inference = Literal["generate", "complete", "retrieve"]
GENERATE: Final = "generate"
COMPLETE: Final = "complete"
RETRIEVE: Final = "retrieve"


@dataclass(frozen=True, order=True)
class Cell:
    """One data set: a task in a language, read from the files named `file`.

    `variant` is set only where a task has several files of one language (say `en2sw` and `fr2sw`);
    it is then part of the name, so that every name is unique: `translation/sw:fr2sw`. `extra` is
    what a table of languages knows of it, (annotation, value) each; it does not tell cells apart.
    """

    task: str
    language: str
    file: str = ""
    variant: str = ""
    extra: tuple[tuple[str, Any], ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("task", "language", "variant"):
            value = getattr(self, name)
            if any(character in "/{}*?[],:" or character.isspace() for character in value):
                raise ValueError(
                    f"Cell.{name}={value!r}: expected no spaces and none of / {{}} * ? [] , :"
                )
        if not self.task or not self.language:
            raise ValueError(
                f"Cell({self.task!r}, {self.language!r}): task and language are needed"
            )

    @property
    def name(self) -> str:
        """`ner/sw`, or `translation/sw:fr2sw` where the language alone is ambiguous."""
        name = f"{self.task}/{self.language}"
        return f"{name}:{self.variant}" if self.variant else name

    def annotations(self) -> dict[str, str]:
        """What is known of every example of this cell; what a FeatureSpace turns into ids."""
        return {
            "task": self.task,
            "language": self.language,
            "cell": self.name,
            "shared": "shared",
            **dict(self.extra),
        }

    def matches(self, pattern: str) -> bool:
        """Whether `pattern` (see `expand`) matches the name, with or without its variant."""
        names = {self.name, f"{self.task}/{self.language}"}
        return any(fnmatch.fnmatchcase(name, plain) for plain in expand(pattern) for name in names)


class Source(Protocol):
    """Where cells come from: a folder of files, or a generator."""

    @property
    def name(self) -> str:
        """Prefix of the seqio task names: `xtreme_up` gives `xtreme_up.ner.sw`."""
        ...

    def cells(self) -> tuple[Cell, ...]:
        """All cells, sorted by name. Cheap: reads no records."""
        ...

    def splits(self, cell: Cell) -> tuple[str, ...]:
        """The splits of `cell`, in the order train, validation, test."""
        ...

    def pairs(self, cell: Cell, split: str) -> tuple[Sequence[str], Sequence[str]]:
        """Inputs and targets of a split of `cell`, as many, in the order of its seqio task.

        A source whose inputs hold more than an example's own text, a prompt, has a method `texts`
        beside it, of the same arguments, which gives that text alone; overlap is found by it.
        """
        ...

    # A source whose examples may have an English source besides, for Run.source_text, has methods
    # `sources(cell, split, source_text)`, as many texts as `pairs` gives, '' for none, and
    # `check_sources(cells, source_text)`; its `register` takes `source_text=`.

    def register(
        self, cells: Iterable[Cell], *, vocabulary: Any, space: FeatureSpace | None
    ) -> dict[Cell, str]:
        """Registers a seqio task per cell, replacing earlier ones; returns the task names."""
        ...

    def inference(self, cell: Cell) -> Inference:
        """How predictions for `cell` are made (see evaluation.evaluator)."""
        ...

    def register_indexes(
        self, cells: Iterable[Cell], *, vocabulary: Any, space: FeatureSpace | None
    ) -> dict[Cell, str]:
        """Registers the passages that retrieval cells among `cells` are looked up in."""
        ...


def expand(pattern: str) -> tuple[str, ...]:
    """Expands braces: `semantic_parsing/{yo,ha}` -> two fnmatch patterns.

    Raises:
      ValueError: for braces that are nested or do not pair up.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"cell pattern {pattern!r}: expected a string such as 'ner/*'")
    head, brace, rest = pattern.partition("{")
    if not brace:
        if "}" in pattern:
            raise ValueError(f"cell pattern {pattern!r}: '}}' without '{{'")
        return (pattern,)
    body, closing, tail = rest.partition("}")
    if not closing or "{" in body or "}" in head:
        raise ValueError(f"cell pattern {pattern!r}: braces must pair up and not nest")
    ends = expand(tail) if tail else ("",)
    options = [option.strip() for option in body.split(",")]
    return tuple(head + option + end for option in options for end in ends)


def match(patterns: Sequence[str], cells: Iterable[Cell], what: str = "cells") -> tuple[Cell, ...]:
    """The cells that match any of `patterns`, in the order of `cells`.

    Raises:
      ValueError: when a pattern matches none of the cells; names the nearest cells.
    """
    cells = tuple(cells)
    chosen: set[Cell] = set()
    for pattern in patterns:
        found = [cell for cell in cells if cell.matches(pattern)]
        if not found:
            raise ValueError(
                f"{what}: the pattern {pattern!r} matches none of {_nearest(pattern, cells)}"
            )
        chosen.update(found)
    return tuple(cell for cell in cells if cell in chosen)


def find(name: str, cells: Iterable[Cell]) -> Cell:
    """The cell called `name`; ValueError with the nearest names when there is none."""
    cells = tuple(cells)
    for cell in cells:
        if cell.name == name:
            return cell
    raise ValueError(f"cell {name!r} is not among {_nearest(name, cells)}")


@dataclass(frozen=True)
class CellSplit:
    """What a mixture made of the cells: `train` and, evaluated but never trained on, `held_out`."""

    train: tuple[Cell, ...]
    held_out: tuple[Cell, ...] = ()

    def __post_init__(self) -> None:
        both = sorted(cell.name for cell in set(self.train) & set(self.held_out))
        if both:
            raise ValueError(f"cells both trained on and held out: {', '.join(both)}")

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells of the mixture, trained on and held out, sorted by name."""
        return tuple(sorted(self.train + self.held_out, key=lambda cell: cell.name))

    def group(self, cell: Cell) -> Group:
        """`seen`: trained on. `unseen_language`: no cell of its language is. `unseen`: the rest."""
        if cell in self.train:
            return "seen"
        if cell.language in {trained.language for trained in self.train}:
            return "unseen"
        return "unseen_language"

    def table(self, sizes: Mapping[Cell, int] | None = None) -> str:
        """Language by task: training examples (or `train`), `held out`, or `-` where absent.

        Args:
          sizes: number of training examples per cell.
        """
        tasks = sorted({cell.task for cell in self.cells})
        languages = sorted({cell.language for cell in self.cells})
        rows = [["language", *tasks]]
        for language in languages:
            row = [language]
            for task in tasks:
                here = [c for c in self.cells if (c.task, c.language) == (task, language)]
                row.append(" + ".join(self._entry(cell, sizes) for cell in here) or "-")
            rows.append(row)
        return text_tables.plain(rows)

    def _entry(self, cell: Cell, sizes: Mapping[Cell, int] | None) -> str:
        if cell in self.held_out:
            return "held out"
        return f"{sizes[cell]:,}" if sizes is not None and cell in sizes else "train"


@dataclass(frozen=True)
class Mixture:
    """Which cells to train on, which to hold out, and how often each is drawn.

    Attributes:
      include: patterns over cell names (`ner/*`, `*/sw`, `semantic_parsing/{yo,ha}`).
      exclude: patterns taken out again: neither trained on nor evaluated.
      held_out: patterns of included cells that are evaluated and never trained on. A language is
        held out when all its cells are.
      rates: 'proportional' to the number of examples, 'equal', 'temperature' (size ** (1 /
        temperature), as mT5 samples languages, arXiv 2010.11934), or a mapping from pattern to the
        weight of each cell that it matches; the first pattern that matches a cell counts.
      cap: sizes above it count as it ('proportional' and 'temperature').
      temperature: only with rates='temperature'; 1 is proportional, infinity is equal.
      overlap: what is done when training starts about inputs that stand in evaluation data
        (splits other than `train`) too: 'report' counts them by pairs of cells, 'drop' besides
        leaves out of training those that stand in evaluation data of held-out cells, 'ignore' does
        not look.
    """

    include: tuple[str, ...] = ("*/*",)
    exclude: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    rates: str | Mapping[str, float] = "proportional"
    cap: int | None = None
    temperature: float = 1.0
    overlap: OnOverlap = "report"

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "held_out"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(
                    f"Mixture.{name}={value!r}: expected a list of patterns, [{value!r}]"
                )
            object.__setattr__(self, name, tuple(value))
            for pattern in getattr(self, name):
                expand(pattern)
        if not self.include:
            raise ValueError("Mixture.include is empty: expected patterns such as 'ner/*'")
        if isinstance(self.rates, str):
            if self.rates not in RATES:
                raise ValueError(
                    f"Mixture.rates={self.rates!r}: expected one of {', '.join(RATES)} "
                    f"or a mapping from pattern to weight; {did_you_mean(self.rates, RATES)}"
                )
        else:
            for pattern, weight in self.rates.items():
                expand(pattern)
                number = isinstance(weight, int | float)
                if not (number and math.isfinite(weight) and weight > 0):
                    raise ValueError(
                        f"Mixture.rates[{pattern!r}]={weight!r}: expected a weight above zero "
                        "(exclude or held_out leaves cells out of training)"
                    )
        if self.cap is not None:
            if not isinstance(self.cap, int) or self.cap < 1:
                raise ValueError(f"Mixture.cap={self.cap!r}: expected at least 1, or None")
            if self.rates not in ("proportional", "temperature"):
                raise ValueError(f"Mixture.cap={self.cap} has no effect with rates={self.rates!r}")
        if not (isinstance(self.temperature, int | float) and self.temperature > 0):
            raise ValueError(f"Mixture.temperature={self.temperature}: expected above zero")
        if self.temperature != 1.0 and self.rates != "temperature":
            raise ValueError(
                f"Mixture.temperature={self.temperature} has no effect with rates={self.rates!r}: "
                "expected rates='temperature'"
            )
        if self.overlap not in get_args(OnOverlap):
            raise ValueError(
                f"Mixture.overlap={self.overlap!r}: expected one of {get_args(OnOverlap)}; "
                f"{did_you_mean(str(self.overlap), get_args(OnOverlap))}"
            )

    def select(
        self, cells: Iterable[Cell], has_train: Callable[[Cell], bool] | None = None
    ) -> CellSplit:
        """Splits `cells` into those to train on and those held out; the rest is left out.

        Args:
          cells: what the source holds.
          has_train: whether a cell has a training split; a cell without one is held out by nature.

        Raises:
          ValueError: when a pattern matches no cell, a held-out pattern no included one, or when
            no cell is left to train on.
        """
        cells = tuple(sorted(cells, key=lambda cell: cell.name))
        if not cells:
            raise ValueError("the mixture is empty: the source holds no cells")
        included = match(self.include, cells, "Mixture.include")
        excluded = set(match(self.exclude, cells, "Mixture.exclude"))
        included = tuple(cell for cell in included if cell not in excluded)
        held_out = set(match(self.held_out, included, "Mixture.held_out"))
        if has_train is not None:
            held_out.update(cell for cell in included if not has_train(cell))
        split = CellSplit(
            train=tuple(cell for cell in included if cell not in held_out),
            held_out=tuple(cell for cell in included if cell in held_out),
        )
        if not split.train:
            raise ValueError(
                "Mixture.include, Mixture.held_out: no cell to train on is left: "
                f"{len(cells)} cells in the source, "
                f"{len(included)} included, {len(held_out)} held out or without training data"
            )
        return split

    def asks_for(self, cell: Cell) -> bool:
        """Whether the mixture takes `cell` where there is one."""
        return any(map(cell.matches, self.include)) and not any(map(cell.matches, self.exclude))

    def rates_for(self, sizes: Mapping[Cell, int]) -> dict[Cell, float]:
        """The share of the training examples drawn from each cell; they sum to 1.

        Args:
          sizes: number of training examples of every training cell.

        Raises:
          ValueError: when there is no cell, a cell has no examples, a pattern of `rates` matches
            no cell, or no pattern matches a cell.
        """
        if not sizes:
            raise ValueError("the mixture has no cell to train on")
        for cell, size in sizes.items():
            if size < 1:
                raise ValueError(f"cell {cell.name} has no training examples: exclude it")
        if isinstance(self.rates, Mapping):
            weights = self._given_weights(tuple(sizes))
        elif self.rates == "equal":
            weights = {cell: 1.0 for cell in sizes}
        else:
            capped = {c: n if self.cap is None else min(n, self.cap) for c, n in sizes.items()}
            exponent = 1 / self.temperature
            weights = {cell: float(size) ** exponent for cell, size in capped.items()}
        total = math.fsum(weights.values())
        return {cell: weight / total for cell, weight in weights.items()}

    def _given_weights(self, cells: Sequence[Cell]) -> dict[Cell, float]:
        assert isinstance(self.rates, Mapping)
        for pattern in self.rates:
            match([pattern], cells, "Mixture.rates")
        weights = {}
        for cell in cells:
            found = [weight for pattern, weight in self.rates.items() if cell.matches(pattern)]
            if not found:
                raise ValueError(
                    f"Mixture.rates: no pattern gives a weight to the cell {cell.name}"
                )
            weights[cell] = float(found[0])
        return weights


def columns(cells: Iterable[Cell]) -> dict[str, tuple[str, ...]]:
    """The annotations of `cells` by name, one entry per cell: what FeatureSpace.complete takes."""
    rows = [cell.annotations() for cell in cells]
    return {name: tuple(row[name] for row in rows) for name in (rows[0] if rows else ())}


def name_some(cells: Sequence[Cell], at_most: int = 8) -> str:
    """The names of the first cells, and how many more there are."""
    names = ", ".join(cell.name for cell in cells[:at_most])
    return names + (f" and {len(cells) - at_most} more" if len(cells) > at_most else "")


def _nearest(name: str, cells: Sequence[Cell]) -> str:
    names = sorted({cell.name for cell in cells})
    near = difflib.get_close_matches(name, names, 3, 0.5)
    if not near and "/" in name:
        # A wrong task spoils the comparison of the whole name: compare the halves.
        task, _, language = name.partition("/")
        tasks = difflib.get_close_matches(task, sorted({c.task for c in cells}), 1, 0.5) or [task]
        near = [n for n in names if fnmatch.fnmatchcase(n, f"{tasks[0]}/{language}")][:3]
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"the {len(names)} cells ({shown}){hint}" if names else "the cells: there are none"
