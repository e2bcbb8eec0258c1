"""Babel's records in its pivot language, which plays English, as a machine would translate them.

A translation says what the record says: it is made from the same choices, in the pivot's words and
order. Words may be mistaken for others and whole translations may be missing, as they are where a
machine translates at test time.
"""

from dataclasses import dataclass

from flix_jax.tasks.babel_languages import (
    ADJECTIVES,
    ADPOSITIONS,
    THINGS,
    VERBS,
    Concept,
    Draw,
    Language,
    Name,
    Word,
    draw_name,
)
from flix_jax.tasks.babel_tasks import TASKS, Record, short_clause

#: The field of a record that holds its translation; a record without one has no such field.
FIELD = "source"
SPLITS = ("train", "validation", "test")
_KINDS = (THINGS, ADJECTIVES, VERBS, ADPOSITIONS)


@dataclass(frozen=True)
class Translations:
    """How good the translations are.

    Attributes:
      mistaken: share of the words that are another word of the same kind (a thing for a thing, a
        name for a name); the word that asks in a question is never one of them.
      missing: share of the records that have no translation.
      splits: of which this holds; in the others every record has a faultless one.
    """

    mistaken: float = 0.0
    missing: float = 0.0
    splits: tuple[str, ...] = SPLITS

    def __post_init__(self) -> None:
        for name in ("mistaken", "missing"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"Translations.{name}={share}: expected a share, 0 to 1")
        if isinstance(self.splits, str) or not set(self.splits) <= set(SPLITS):
            raise ValueError(f"Translations.splits={self.splits!r}: expected some of {SPLITS}")
        object.__setattr__(self, "splits", tuple(self.splits))


class Translator:
    """Makes the translation of a record from the choices that the record was made from."""

    def __init__(self, pivot: Language, quality: Translations, tag: str):
        """See the class; `tag` is what the pivot's own inputs open with."""
        self._pivot, self._quality, self._tag = pivot, quality, tag

    def __call__(self, task: str, choices: Draw, faults: Draw, split: str) -> Record:
        """The field of a record that holds its translation; none where that is missing.

        Args:
          task: of the record.
          choices: as they stood before the record was made.
          faults: by which words are mistaken and translations missing.
          split: of the record.
        """
        faulty = split in self._quality.splits
        if faulty and faults.chance(self._quality.missing):
            return {}
        language = self._pivot
        if faulty and self._quality.mistaken:
            language = _mistaking(self._pivot, self._quality.mistaken, faults)
        if task in ("translation", "transliteration"):  # the pivot's own turn words around
            return {FIELD: self._tag + language.say(short_clause(choices))}
        record = TASKS[task](language, choices, self._tag)
        return {FIELD: record.get("text", record.get("input"))}


@dataclass(frozen=True)
class _Mistaking(Language):
    """A language that says another word now and then."""

    share: float = 0.0
    faults: Draw | None = None

    def word(self, concept: Concept, role: str) -> Word:
        assert self.faults is not None
        if self.faults.chance(self.share):
            concept = _another(concept, self.faults)
        return super().word(concept, role)


def _mistaking(language: Language, share: float, faults: Draw) -> Language:
    return _Mistaking(**vars(language), share=share, faults=faults)


def _another(concept: Concept, draw: Draw) -> Concept:
    """A concept of the same kind, and not the same."""
    while True:
        if isinstance(concept, Name):
            other: Concept = draw_name(draw)
        else:
            other = draw.pick(next(kind for kind in _KINDS if concept in kind))
        if other != concept:
            return other
