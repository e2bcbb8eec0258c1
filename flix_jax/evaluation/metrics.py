"""XTREME-UP's metrics as pure functions.

Every metric takes `(targets, predictions)`, two sequences of equally many strings, and returns a
dictionary of floats between 0 and 100 (an error rate may exceed 100): the signature that seqio and
T5X ask of a `metric_fn`. The numbers are those of the scorer published with XTREME-UP
(arXiv:2305.11938). Where that scorer has a fault, the function computes what the scorer meant and
its docstring says so.
"""

import collections
import dataclasses
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flix_jax.adapters.suggest import did_you_mean

MetricFn = Callable[[Sequence[str], Sequence[str]], dict[str, float]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Percentage of predictions equal to their target, character by character.

    Raises:
      ValueError: no examples, or not as many predictions as targets.
    """
    _check_pairs("exact_match", targets, predictions)
    matches = sum(t == p for t, p in zip(targets, predictions, strict=True))
    return {"exact_match": 100.0 * matches / len(targets)}


def parse_entities(text: str) -> list[tuple[str, str]]:
    """Entities of `PER: x $$ LOC: y` as (label, text) pairs, in order; an empty text holds none.

    The label ends at the first colon, so that an entity's text may hold colons. A part without a
    colon is no entity and is left out.
    """
    entities = []
    for part in text.split(" $$ "):
        label, colon, entity = part.partition(":")
        if colon:
            entities.append((label.strip(), entity.strip()))
    return entities


def span_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Micro-averaged F1 over entities written as `PER: x $$ LOC: y`.

    Predicted and true entities are compared as multisets of (label, text) pairs within an example;
    true positives, false positives and false negatives are summed over all examples.

    The published scorer leaves out every entity that contains a colon, in targets and predictions
    alike ("LOC: ratio 3:1" counts for nothing); here the label ends at the first colon and the
    entity counts. On data without such entities the numbers are the same. As there, examples that
    hold no entity and predict none leave the score untouched, and if all are of that kind it is 0.

    Raises:
      ValueError: no examples, or not as many predictions as targets.
    """
    _check_pairs("span_f1", targets, predictions)
    true_positives = predicted = expected = 0
    for target, prediction in zip(targets, predictions, strict=True):
        gold = collections.Counter(parse_entities(target))
        guess = collections.Counter(parse_entities(prediction))
        true_positives += (gold & guess).total()
        predicted += guess.total()
        expected += gold.total()
    if not predicted + expected:
        return {"span_f1": 0.0}
    return {"span_f1": 100.0 * 2 * true_positives / (predicted + expected)}


def normalize_squad(answer: str) -> str:
    """SQuAD's: lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_ASCII_PUNCTUATION)).split())


def token_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Mean over examples of the F1 between the white-space tokens of target and prediction.

    Both are normalised as in SQuAD first. A pair without a common token scores 0, which includes
    a target whose normalised form is empty.

    Raises:
      ValueError: no examples, or not as many predictions as targets.
    """
    _check_pairs("token_f1", targets, predictions)
    total = 0.0
    for target, prediction in zip(targets, predictions, strict=True):
        gold = normalize_squad(target).split()
        guess = normalize_squad(prediction).split()
        common = (collections.Counter(gold) & collections.Counter(guess)).total()
        if common:
            # 2PR/(P+R) with P = common/len(guess) and R = common/len(gold).
            total += 2.0 * common / (len(gold) + len(guess))
    return {"token_f1": 100.0 * total / len(targets)}


def chrf(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Corpus chrF (Popović 2015): character n-grams up to 6, beta 2, as sacrebleu computes it.

    The published scorer needs a sacrebleu older than 1.4, whose function returned a bare float.
    This is today's sacrebleu: the same numbers on sentences. On references shorter than six
    characters they differ a little, for sacrebleu no longer counts the n-grams of a prediction
    whose reference has none of that length.

    Raises:
      ValueError: no examples, or not as many predictions as targets.
    """
    # Imported here: the score tables need this module's names at start-up, never sacrebleu.
    from sacrebleu.metrics import CHRF

    _check_pairs("chrf", targets, predictions)
    scorer = CHRF(char_order=6, word_order=0, beta=2)
    return {"chrf": float(scorer.corpus_score(list(predictions), [list(targets)]).score)}


def cer(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Character error rate of the corpus: 100 · Σ Levenshtein(target, prediction) / Σ |target|.

    Both texts are brought to Unicode's NFKC form first; lengths are counted in code points. Lower
    is better and the rate can exceed 100. The published scorer divides by zero where all targets
    are empty; here such a corpus counts as one character long.

    Raises:
      ValueError: no examples, or not as many predictions as targets.
    """
    # Imported here for the same reason as sacrebleu above.
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cpdist

    _check_pairs("cer", targets, predictions)
    gold = [unicodedata.normalize("NFKC", t) for t in targets]
    guess = [unicodedata.normalize("NFKC", p) for p in predictions]
    edits = int(cpdist(gold, guess, scorer=Levenshtein.distance, dtype=np.int64).sum())
    return {"cer": 100.0 * edits / max(1, sum(map(len, gold)))}


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric function with the key of its value, its title in tables, and its good direction."""

    name: str
    title: str
    function: MetricFn
    higher_is_better: bool = True

    def utility(self, value: float) -> float:
        """The value with higher as better: an error rate becomes `100 - rate`.

        What is averaged over tasks is the utility, so that an error rate never raises a mean.
        """
        return value if self.higher_is_better else 100.0 - value


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "exact match", exact_match),
        Metric("span_f1", "span F1", span_f1),
        Metric("token_f1", "token F1", token_f1),
        Metric("chrf", "chrF", chrf),
        Metric("cer", "CER", cer, higher_is_better=False),
    )
}


def find_metric(name: str) -> Metric:
    """The metric of that name; a ValueError with the nearest name where there is none."""
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; {did_you_mean(name, METRICS)}")
    return METRICS[name]


def metric_fn(names: Sequence[str]) -> MetricFn:
    """One function that computes several metrics, the first of them a task's headline.

    As the only `metric_fn` of a seqio task, for seqio decodes the predictions anew for each.

    Raises:
      ValueError: no names, or a name that `METRICS` lacks.
    """
    if not names:
        raise ValueError("metrics: expected at least one name, got none")
    chosen = [find_metric(name) for name in names]

    def compute(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for metric in chosen:
            scores |= metric.function(targets, predictions)
        return scores

    return compute


def _check_pairs(metric: str, targets: Sequence[str], predictions: Sequence[str]) -> None:
    if len(targets) != len(predictions):
        raise ValueError(
            f"{metric}: {len(targets)} targets but {len(predictions)} predictions; expected as many"
        )
    if not len(targets):
        raise ValueError(f"{metric}: no examples to score")
