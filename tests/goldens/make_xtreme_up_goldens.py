"""Makes xtreme_up_scorer.json: the numbers of XTREME-UP's published scorer on made-up predictions.

Needs numpy, absl-py, nltk and a sacrebleu older than 1.4 (1.3.7 was used), which need not be
installed together with the package, and a checkout of the scorer (made at 26bb6d8):

    git clone https://github.com/google-research/xtreme-up
    python tests/goldens/make_xtreme_up_goldens.py xtreme-up

The file holds, by kind of text, small corpora of targets and predictions in four scripts and all
of them mixed, each with the scores of the metrics that the kind is fit for, in percent (MRR, which
the scorer leaves in 0..1, times 100). Left out or marked is what the scorer does not mean:

- `colons`: it skips entities that hold a colon. Their colons are replaced by a middle dot, which
  nothing else holds, in the text that it scores.
- chrF is taken on `sentences` only, whose references have six characters or more: on shorter ones
  sacrebleu has changed its definition since.
"""

import importlib
import json
import pathlib
import random
import re
import sys
import types

WORDS = {
    "Latn": "habari ya asubuhi rafiki Kano Ẹ̀gbá ọjà 2012 an a the River Niger É́kó ﬁlm".split(),
    "Ethi": "ነገ ጠዋት እንገናኛለን በገበያ አዲስ አበባ ሰላም ኢትዮጵያ ውሃ ቤት".split(),
    "Deva": "नमस्ते आगरा दिल्ली बाज़ार किताब पानी क़लम स्कूल घर हिन्दी".split(),
    "Arab": "بازار کتاب پانی لاہور دریا ﷲ ﻻ مدرسہ گھر شہر".split(),
}
SCRIPTS = [[script] for script in WORDS] + [list(WORDS)]
LABELS = ("PER", "ORG", "LOC", "DATE")
MARKS = (".", ",", "?", "!", "...", "።", "।", "؟", "'", "(", ")", "[", "]", '"', "-", ":")
SPACES = (" ", " ", " ", "  ", "   ", "\t")
CORPORA, PAIRS = 10, 20


def words(rng: random.Random, scripts: list[str], at_least: int, at_most: int) -> list[str]:
    """Words of any of the scripts."""
    vocabulary = [word for script in scripts for word in WORDS[script]]
    return rng.choices(vocabulary, k=rng.randint(at_least, at_most))


def sentence(rng: random.Random, scripts: list[str], at_least: int, at_most: int) -> str:
    """Words with marks before and after some, odd spaces and capitals."""
    text = ""
    for word in words(rng, scripts, at_least, at_most):
        before = rng.choice(MARKS) if rng.random() < 0.1 else ""
        after = rng.choice(MARKS) if rng.random() < 0.2 else ""
        word = word.upper() if rng.random() < 0.1 else word
        text += before + word + after + rng.choice(SPACES)
    return text if rng.random() < 0.1 else text.strip()


def damaged(rng: random.Random, text: str, scripts: list[str]) -> str:
    """The text as a model might have it: the same, nothing, or with a few edits."""
    kind = rng.random()
    if kind < 0.2:
        return text
    if kind < 0.25:
        return ""
    if kind < 0.3:
        return "No Answer"
    characters = list(text)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(characters) + 1)
        letters = [*"".join(words(rng, scripts, 1, 1)), *MARKS, " ", "\n"]
        characters[at : at + rng.randint(0, 2)] = rng.choices(letters, k=rng.randint(0, 2))
    return "".join(characters)


def answer(rng: random.Random, scripts: list[str]) -> str:
    """A short answer, sometimes none."""
    kind = rng.random()
    if kind < 0.1:
        return "No Answer"
    if kind < 0.15:
        return rng.choice(["", "the", "...", " "])
    return sentence(rng, scripts, 1, 4)


def long_sentence(rng: random.Random, scripts: list[str]) -> str:
    """A sentence of at least six characters that are no white space."""
    while len("".join((text := sentence(rng, scripts, 3, 9)).split())) < 6:
        pass
    return text


def entities(rng: random.Random, scripts: list[str], colons: bool) -> tuple[str, str]:
    """Entities, and a prediction of them with faults of every kind."""
    gold = []
    for _ in range(rng.randint(0, 4)):
        text = words(rng, scripts, 1, 3)
        joint = rng.choice([":", " : ", ": "]) if colons and rng.random() < 0.5 else " "
        gold.append((rng.choice(LABELS), joint.join(text)))
    if gold and rng.random() < 0.2:
        gold.append(rng.choice(gold))
    guess = []
    for label, text in gold:
        kind = rng.random()
        if kind < 0.1:
            continue
        if kind < 0.2:
            label = rng.choice([*LABELS, "per", "MISC"])
        elif kind < 0.35:
            text = " ".join(words(rng, scripts, 1, 2))
        elif kind < 0.45:
            guess.append((label, text))
        guess.append((label, text))
    if rng.random() < 0.2:
        rng.shuffle(guess)
    parts = [rng.choice([f"{label}: {text}", f" {label} :{text}  "]) for label, text in guess]
    if rng.random() < 0.2:
        parts.insert(rng.randint(0, len(parts)), rng.choice(["No Answer", "", "LOC", "$$", "PER:"]))
    # Without its spaces it is no delimiter, and what follows a colon inside an entity.
    delimiter = "$$" if colons and rng.random() < 0.1 else " $$ "
    return " $$ ".join(f"{label}: {text}" for label, text in gold), delimiter.join(parts)


def without_inner_colons(text: str) -> str:
    """Every colon but the first of each entity becomes a middle dot."""
    parts = [re.split("(:)", part, maxsplit=1) for part in text.split(" $$ ")]
    return " $$ ".join("".join([*part[:-1], part[-1].replace(":", "·")]) for part in parts)


def corpora(make) -> list[dict]:
    """Corpora of pairs that `make(rng, scripts)` returns, the scripts taking turns."""
    found = []
    for number in range(CORPORA):
        rng = random.Random(f"{make.__name__} {number}")
        pairs = [make(rng, SCRIPTS[number % len(SCRIPTS)]) for _ in range(PAIRS)]
        targets, predictions = zip(*pairs, strict=True)
        found.append({"targets": targets, "predictions": predictions})
    return found


def answers_pair(rng, scripts):
    return (text := answer(rng, scripts)), damaged(rng, text, scripts)


def sentences_pair(rng, scripts):
    return (text := long_sentence(rng, scripts)), damaged(rng, text, scripts)


def entities_pair(rng, scripts):
    return entities(rng, scripts, colons=False)


def colons_pair(rng, scripts):
    return entities(rng, scripts, colons=True)


def guesses_pair(rng, scripts):
    # With repeated guesses, and guesses that differ in case or white space only.
    near = [(word := words(rng, scripts, 1, 1)[0]).upper(), f"{word} ", "", "No Answer"]
    return word, rng.choices([*words(rng, scripts, 5, 5), *near, word], k=3)


def passages_pair(rng, scripts):
    language = rng.choice(["am", "hi", "ur", "sw"])
    target = f"{language}-{rng.randint(0, 12)}"
    ranking = [f"{language}-{rng.randint(0, 12)}" for _ in range(rng.choice([0, 3, 10, 10, 10]))]
    return target, ranking


def main() -> None:
    # A bare package in place of the checkout's folder, whatever its name.
    package = types.ModuleType("xtreme_up")
    package.__path__ = [sys.argv[1]]
    sys.modules["xtreme_up"] = package
    scorer = importlib.import_module("xtreme_up.evaluation.metrics")

    texts = {
        "exact_match": scorer.sequence_accuracy,
        "token_f1": scorer.f1,
        "cer": scorer.cer,
        "asr_cer": lambda t, p: scorer.cer(t, p, apply_asr_normalization=True),
    }
    spans = {"span_f1": scorer.span_f1}
    kinds = {
        "answers": (answers_pair, texts),
        "sentences": (sentences_pair, texts | {"chrf": scorer.chrf}),
        "entities": (entities_pair, texts | spans),
        "colons": (
            colons_pair,
            {
                "span_f1": lambda t, p: scorer.span_f1(
                    list(map(without_inner_colons, t)), list(map(without_inner_colons, p))
                )
            },
        ),
        "guesses": (guesses_pair, {"top_3_accuracy": scorer.top3_accuracy}),
        "passages": (passages_pair, {"mrr_at_10": lambda t, p: 100 * scorer.compute_mrr(t, p)}),
    }
    lines = []
    for kind, (make, metrics) in kinds.items():
        found = corpora(make)
        for corpus in found:
            targets, predictions = list(corpus["targets"]), list(corpus["predictions"])
            corpus["scores"] = {
                name: float(metric(targets, predictions)) for name, metric in metrics.items()
            }
        rows = ",\n".join(f"  {json.dumps(corpus, ensure_ascii=False)}" for corpus in found)
        lines.append(f" {json.dumps(kind)}: [\n{rows}\n ]")
    path = pathlib.Path(__file__).with_name("xtreme_up_scorer.json")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{path}: {CORPORA} corpora of {PAIRS} pairs of each of {', '.join(kinds)}")


if __name__ == "__main__":
    main()
