"""The artificial languages of the embedded benchmark: words, sounds, order, affixes, scripts.

Everything follows from a seed through `Draw`, which uses only `random.Random(str).random()`: the
one sequence that Python promises to keep, so the data are the same on every machine.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

T = TypeVar("T")

CONSONANTS = "ptkbdgmnlrs"
SHIFTED_CONSONANTS = "fvzhxcjw"  # letters that no pivot word has: where a sound shift leads
VOWELS = "aeiou"
ALPHABET = CONSONANTS + SHIFTED_CONSONANTS + VOWELS
SCRIPTS: Mapping[str, str] = {  # one letter for each letter of ALPHABET
    "latin": ALPHABET,
    "cyrillic": "пткбдгмнлрсфвзхщцйшаеиоу",
    "greek": "πτκβδγμνλρσφωζχξψθςαειου",
}

THINGS = tuple(f"thing{i}" for i in range(12))
ADJECTIVES = tuple(f"adjective{i}" for i in range(6))
VERBS = ("get", "set", "add", "buy", "fix", "see", "cut", "tie")
ADPOSITIONS = ("at", "to")
QUESTIONS = ("who", "whom", "where")
CONCEPTS = (*THINGS, *ADJECTIVES, *VERBS, *ADPOSITIONS, *QUESTIONS)


class Draw:
    """Random choices that follow from a key alone, on every machine and Python version."""

    def __init__(self, *key: object):
        self._random = random.Random("/".join(str(part) for part in key))

    def copy(self) -> "Draw":
        """The same choices from here on, apart from this one's."""
        other = Draw()
        other._random.setstate(self._random.getstate())
        return other

    def below(self, bound: int) -> int:
        """A whole number in [0, bound)."""
        return int(self._random.random() * bound)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def pick(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        keys = [self._random.random() for _ in values]
        return [values[i] for i in sorted(range(len(values)), key=keys.__getitem__)]


@dataclass(frozen=True)
class Affix:
    """A short marker before or after a stem."""

    text: str
    suffix: bool

    def on(self, stem: str) -> str:
        return stem + self.text if self.suffix else self.text + stem


@dataclass(frozen=True)
class Typology:
    """What does not vary with the seed: the script, and the order of words."""

    code: str
    script: str
    order: str  # SVO, SOV or VSO
    adjective_first: bool
    preposition: bool

    def __post_init__(self) -> None:
        if self.script not in SCRIPTS:
            raise ValueError(f"script {self.script!r} of {self.code} is not one of {list(SCRIPTS)}")
        if self.order not in ("SVO", "SOV", "VSO"):
            raise ValueError(f"order {self.order!r} of {self.code} is not SVO, SOV or VSO")


# Codes from the range that ISO 639-3 keeps for local use, so that no real language is meant.
PIVOT = Typology("qpi", "latin", "SVO", True, True)
LANGUAGES = (
    Typology("qal", "latin", "SOV", True, False),
    Typology("qeb", "latin", "VSO", False, True),
    Typology("qim", "latin", "SVO", False, False),
    Typology("qod", "cyrillic", "SVO", True, True),
    Typology("qur", "cyrillic", "SOV", False, False),
    Typology("qas", "greek", "SOV", True, True),
    Typology("qen", "greek", "VSO", True, True),
    Typology("qit", "latin", "SOV", False, True),
    Typology("qok", "latin", "VSO", True, False),
)


@dataclass(frozen=True)
class Name:
    """A person or a place, spelt with the pivot's sounds: cognate in every language."""

    stem: str


Concept = str | Name


def draw_name(draw: Draw) -> Name:
    """One of some three thousand names, so that most of those in test data are new."""
    return Name(_letters(draw, "CVCV"))


def _letters(draw: Draw, shape: str) -> str:
    return "".join(draw.pick(CONSONANTS if sound == "C" else VOWELS) for sound in shape)


@dataclass(frozen=True)
class Clause:
    """A meaning: concepts by role. `adjective` belongs to the object, else to the subject."""

    verb: str
    subject: Concept | None = None
    object: Concept | None = None
    place: Name | None = None
    adposition: str = "at"
    adjective: str | None = None


@dataclass(frozen=True)
class Word:
    """A word of a sentence: as written, before the sound shift and in Latin, and what it is."""

    surface: str
    plain: str
    role: str
    concept: Concept


@dataclass(frozen=True)
class Language:
    """A language of one seed.

    Attributes:
      stems: by concept, spelt with the pivot's sounds, before `shift`.
      shift: the consonants of the pivot that another sound stands for.
      object_affix, verb_affix: markers of the object (its noun) and of every verb.
      lender: a language that `chosen` words are borrowed from: spelt and written as there, with
        the affixes and in the order of this language.
    """

    typology: Typology
    stems: Mapping[str, str] = field(repr=False)
    shift: Mapping[str, str]
    object_affix: Affix
    verb_affix: Affix
    lender: "Language | None" = None
    chosen: Draw | None = None

    @property
    def code(self) -> str:
        return self.typology.code

    def write(self, plain: str) -> str:
        """Text spelt with the pivot's sounds as this language writes it."""
        letters = SCRIPTS[self.typology.script]
        shifted = (self.shift.get(letter, letter) for letter in plain)
        return "".join(letters[ALPHABET.index(x)] if x in ALPHABET else x for x in shifted)

    def lemma(self, concept: Concept) -> str:
        return self.write(self.stem(concept))

    def stem(self, concept: Concept) -> str:
        """The bare word with the pivot's sounds."""
        return concept.stem if isinstance(concept, Name) else self.stems[concept]

    def borrowing(self, lender: "Language", chosen: Draw) -> "Language":
        """This language with about half its words borrowed from `lender`."""
        return replace(self, lender=lender, chosen=chosen)

    def word(self, concept: Concept, role: str) -> Word:
        source = self
        if self.lender is not None and self.chosen is not None and self.chosen.chance(0.5):
            source = self.lender
        plain = source.stem(concept)
        if role == "object":
            plain = self.object_affix.on(plain)
        elif role == "verb":
            plain = self.verb_affix.on(plain)
        return Word(source.write(plain), plain, role, concept)

    def words(self, clause: Clause) -> list[Word]:
        """The clause in this language's order of words."""
        typology = self.typology
        subject = [self.word(clause.subject, "subject")] if clause.subject else []
        object_ = [self.word(clause.object, "object")] if clause.object else []
        if clause.adjective:
            noun = object_ or subject
            adjective = self.word(clause.adjective, "adjective")
            noun.insert(0 if typology.adjective_first else len(noun), adjective)
        place = []
        if clause.place:
            place = [self.word(clause.place, "place")]
            adposition = self.word(clause.adposition, "adposition")
            place.insert(0 if typology.preposition else 1, adposition)
        verb = [self.word(clause.verb, "verb")]
        if typology.order == "SVO":
            return [*subject, *verb, *object_, *place]
        if typology.order == "SOV":
            return [*subject, *place, *object_, *verb]
        return [*verb, *subject, *object_, *place]

    def say(self, clause: Clause) -> str:
        return " ".join(word.surface for word in self.words(clause))


def _fresh_stem(draw: Draw, concept: str, taken: set[str]) -> str:
    shape = "VC" if concept in ADPOSITIONS + QUESTIONS else "CVC"
    while (stem := _letters(draw, shape)) in taken:
        pass
    taken.add(stem)
    return stem


def _affixes(draw: Draw) -> tuple[Affix, Affix]:
    """Markers of the object and of verbs: one of two vowels each, before or after the stem."""
    object_, verb = draw.pick("ou"), draw.pick("ae")
    return Affix(object_, draw.chance(0.5)), Affix(verb, draw.chance(0.5))


def _ambiguous(language: Language) -> bool:
    """Whether two concepts, or two forms of one, could be the same word."""
    forms = [language.lemma(concept) for concept in CONCEPTS]
    forms += [language.word(concept, "object").surface for concept in THINGS]
    forms += [language.word(concept, "verb").surface for concept in VERBS]
    return len(set(forms)) < len(forms)


def make_languages(seed: int, *, replaced: float = 0.25, shifts: int = 2) -> dict[str, Language]:
    """The pivot and the nine languages of a seed, by code.

    Args:
      seed: everything but the typology follows from it.
      replaced: share of the lexicon that a language does not share with the pivot.
      shifts: how many consonants of the pivot another sound stands for.
    """
    draw = Draw("babel", seed, "pivot")
    taken: set[str] = set()
    stems = {concept: _fresh_stem(draw, concept, taken) for concept in CONCEPTS}
    languages = {}
    for typology in (PIVOT, *LANGUAGES):
        attempt = 0
        while True:
            draw = Draw("babel", seed, typology.code, attempt)
            own, shift = dict(stems), {}
            if typology is not PIVOT:
                used = set(stems.values())
                for concept in CONCEPTS:
                    if draw.chance(replaced):
                        own[concept] = _fresh_stem(draw, concept, used)
                sources, targets = draw.shuffled(CONSONANTS), draw.shuffled(SHIFTED_CONSONANTS)
                shift = dict(zip(sources[:shifts], targets, strict=False))
            language = Language(typology, own, shift, *_affixes(draw))
            if not _ambiguous(language):
                break
            attempt += 1
        languages[typology.code] = language
    return languages
