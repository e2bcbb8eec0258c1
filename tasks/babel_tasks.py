"""The examples of the embedded benchmark: five tasks shaped like XTREME-UP's, and text.

Every function makes one record of one language from a `Draw`. Records are XTREME-UP's: `text` and
`spans` for ner, `input` and `target` for the rest. Inputs may open with a tag such as `ner: `.
"""

from collections.abc import Callable, Mapping, Sequence

from flix_jax.tasks.babel_languages import (
    ADJECTIVES,
    ADPOSITIONS,
    CONCEPTS,
    PIVOT,
    SCRIPTS,
    THINGS,
    VERBS,
    Clause,
    Concept,
    Draw,
    Language,
    Name,
    Word,
    draw_name,
)

Record = dict[str, object]
MASK = "_"
ROLE_QUESTIONS = {"subject": "who", "object": "whom", "place": "where"}
SLOTS = {"subject": "WHO", "object": "OBJ", "place": "LOC"}


def _actor(draw: Draw) -> Concept:
    return draw_name(draw) if draw.chance(0.6) else draw.pick(THINGS)


def full_clause(draw: Draw) -> Clause:
    """Subject, verb, object and place, all different."""
    while True:
        subject, object_, place = _actor(draw), _actor(draw), draw_name(draw)
        if len({subject, object_, place}) == 3:
            return Clause(draw.pick(VERBS), subject, object_, place, draw.pick(ADPOSITIONS))


def short_clause(draw: Draw) -> Clause:
    """A subject and a verb with an object, a place, or an object that has an adjective."""
    whole = full_clause(draw)
    kind = draw.below(3)
    if kind == 0:
        return Clause(whole.verb, whole.subject, whole.object)
    if kind == 1:
        return Clause(whole.verb, whole.subject, None, whole.place, whole.adposition)
    thing = draw.pick([thing for thing in THINGS if thing != whole.subject])
    return Clause(whole.verb, whole.subject, thing, adjective=draw.pick(ADJECTIVES))


def ner(language: Language, draw: Draw, tag: str) -> Record:
    """Names in a clause: `text` with byte spans labelled PER and LOC, at least one of them."""
    words: list[Word] = []
    while not any(isinstance(word.concept, Name) for word in words):
        words = language.words(short_clause(draw))
    text, spans = tag, []
    for word in words:
        text += "" if text == tag else " "
        start = len(text.encode())
        text += word.surface
        if isinstance(word.concept, Name):
            label = "LOC" if word.role == "place" else "PER"
            span = {"start_byte": start, "limit_byte": len(text.encode()), "label": label}
            spans.append(span)
    return {"text": text, "spans": spans}


def semantic_parsing(language: Language, draw: Draw, tag: str) -> Record:
    """A verb with one argument, perhaps described: `[IN:BUY [SL:OBJ big stone ] ]`."""
    whole = full_clause(draw)
    role = draw.pick(tuple(SLOTS))
    if role == "place":
        clause = Clause(whole.verb, place=whole.place, adposition=whole.adposition)
    else:
        adjective = draw.pick(ADJECTIVES) if draw.chance(0.5) else None
        concept = getattr(whole, role)
        clause = Clause(whole.verb, **{role: concept}, adjective=adjective)
    words = language.words(clause)
    inside = {role, "adjective"}
    value = " ".join(word.surface for word in words if word.role in inside)
    text = " ".join(word.surface for word in words)
    target = f"[IN:{clause.verb.upper()} [SL:{SLOTS[role]} {value} ] ]"
    return {"input": tag + text, "target": target}


def qa(language: Language, draw: Draw, tag: str) -> Record:
    """Who, whom or where, then a clause in which all three are: the answer is a word of it."""
    words = language.words(full_clause(draw))
    role = draw.pick(tuple(ROLE_QUESTIONS))
    answer = next(word.surface for word in words if word.role == role)
    context = " ".join(word.surface for word in words)
    return {"input": f"{tag}{language.lemma(ROLE_QUESTIONS[role])}? {context}", "target": answer}


def translation(language: Language, draw: Draw, tag: str, pivot: Language) -> Record:
    """A clause into the pivot. The pivot's own cell starts from its words in any order."""
    clause = short_clause(draw)
    source = language.say(clause)
    if language.typology is PIVOT:
        source = " ".join(draw.shuffled(source.split(" ")))
    return {"input": tag + source, "target": pivot.say(clause)}


def transliteration(language: Language, draw: Draw, tag: str) -> Record:
    """Words in the pivot's letters and sounds. The pivot's own cell starts from other scripts."""
    words = language.words(short_clause(draw))[:3]
    text = " ".join(word.surface for word in words)
    if language.typology is PIVOT and language.lender is None:
        letters = SCRIPTS[draw.pick([script for script in SCRIPTS if script != "latin"])]
        text = text.translate(str.maketrans(SCRIPTS["latin"], letters))
    return {"input": tag + text, "target": " ".join(word.plain for word in words)}


def denoising(language: Language, draw: Draw, tag: str) -> Record:
    """A clause with its words shuffled, to be put in order, or with one of them masked.

    The mask hides a word or a part of it, never of a name, and the target is the whole word.
    """
    if draw.chance(0.5):
        text = language.say(short_clause(draw))
        return {"input": tag + " ".join(draw.shuffled(text.split(" "))), "target": text}
    words = language.words(full_clause(draw) if draw.chance(0.5) else short_clause(draw))
    known = [i for i, word in enumerate(words) if not isinstance(word.concept, Name)]
    place, texts = draw.pick(known), [word.surface for word in words]
    target = texts[place]
    start, limit = 0, len(target)
    if draw.chance(0.7):
        start = draw.below(len(target))
        limit = start + 1 + draw.below(min(2, len(target) - start))
    texts[place] = target[:start] + MASK + target[limit:]
    return {"input": tag + " ".join(texts), "target": target}


def gloss(language: Language, draw: Draw, tag: str, pivot: Language) -> Record:
    """A clause in which one word is marked, or given in the pivot: its gloss, or its form."""
    words = language.words(short_clause(draw))
    place = draw.below(len(words))
    texts = [word.surface for word in words]
    form, foreign = texts[place], pivot.lemma(words[place].concept)
    if draw.chance(0.5):
        texts[place] = f"[{form}]"
        return {"input": tag + " ".join(texts), "target": foreign}
    texts[place] = MASK + foreign
    return {"input": tag + " ".join(texts), "target": form}


def dictionary(language: Language, pivot: Language, tag: str) -> list[Record]:
    """A dictionary with one side of each line masked: `bako = _` and `_ = pako`."""
    lines: list[Record] = []
    for concept in CONCEPTS:
        own, foreign = language.lemma(concept), pivot.lemma(concept)
        lines.append({"input": f"{tag}{own} = {MASK}", "target": foreign})
        lines.append({"input": f"{tag}{MASK} = {foreign}", "target": own})
    return lines


TASKS: Mapping[str, Callable[..., Record]] = {
    "ner": ner,
    "semantic_parsing": semantic_parsing,
    "qa": qa,
    "translation": translation,
    "transliteration": transliteration,
}
TAGS: Mapping[str, str] = {
    "ner": "ner",
    "semantic_parsing": "sem",
    "qa": "qa",
    "translation": "mt",
    "transliteration": "tl",
    "denoising": "den",
    "glossary": "dic",
}


def make_tag(task: str, language: Language, tags: str) -> str:
    """What tells a model without features the task (`ner: `), and the language (`ner qal: `).

    A line of the glossary always names its language: one word alone does not reveal it.

    Args:
      tags: 'none', 'task' or 'task_language'.
    """
    if tags == "task_language" or task == "glossary":
        return f"{TAGS[task]} {language.code}: "
    return f"{TAGS[task]}: " if tags == "task" else ""


def make_record(
    task: str, language: Language, draw: Draw, *, languages: Sequence[Language], tag: str
) -> Record:
    """One record of a task, of denoising, or of the glosses in the glossary.

    Args:
      languages: all of them, the pivot first. Half the pivot's task records borrow words from one
        of the others, the held-out one included, as code-switched text does; the grammar stays the
        pivot's. Without it a small base knows tasks and languages and cannot bring them together.
    """
    pivot, *others = languages
    if language is pivot and task in TASKS and draw.chance(0.5):
        language = pivot.borrowing(draw.pick(others), draw)
    if task == "denoising":
        return denoising(language, draw, tag)
    if task == "glossary":
        return gloss(language, draw, tag, pivot)
    if task == "translation":
        return translation(language, draw, tag, pivot)
    return TASKS[task](language, draw, tag)
