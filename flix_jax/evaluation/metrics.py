"""XTREME-UP's metrics as pure functions.

Every metric takes `(targets, predictions)`, two sequences of equally many examples, and returns a
dictionary of floats between 0 and 100 (an error rate may exceed 100): the signature that seqio and
T5X ask of a `metric_fn`. A target is a string. So is a prediction, or, for the metrics of ranked
guesses, a sequence of strings with the best first. Anything else is a ValueError, as are no
examples, and not as many predictions as targets.

The numbers are those of the scorer published with XTREME-UP (arXiv:2305.11938). Where that scorer
has a fault, the function computes what the scorer meant and its docstring says so.

Each metric counts something in every example, adds the counts up, and applies a formula to the
sums: `Metric` keeps the two steps apart, which is what `evaluation.bootstrap` resamples.
"""

import collections
import dataclasses
import functools
import re
import reprlib
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from flix_jax.adapters.suggest import did_you_mean

MetricFn = Callable[[Sequence[str], Sequence[Any]], dict[str, float]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LOOSE_MARKS = re.compile(r"[,.?!]+(?= |\Z)|(?<= )[,.?!]+")
_TABS_AND_LINE_ENDS = str.maketrans("\t\n", "  ")
_APOSTROPHES_AND_BRACKETS = str.maketrans("'()[]", "     ")
_SPACES = re.compile(" +")


def percentage(sums: Float64[np.ndarray, "*batch 2"]) -> Float64[np.ndarray, "*batch"]:
    """100 · numerator / denominator; where the denominator is 0 it counts as 1."""
    return 100.0 * sums[..., 0] / np.maximum(1.0, sums[..., 1])


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a metric counts in each example, and how the sums of the counts make its score.

    Attributes:
      name: the key of its value.
      title: its name in tables.
      count: (targets, predictions) -> a row of numbers per example, with equally many in each.
      formula: sums of the rows [..., counts] -> scores [...].
      higher_is_better: its good direction; False for error rates.
      ranked: a prediction is a ranking, a sequence of texts with the best first, not one text.
    """

    name: str
    title: str
    count: Callable[[Sequence[str], Sequence[Any]], ArrayLike]
    formula: Callable[[np.ndarray], np.ndarray] = percentage
    higher_is_better: bool = True
    ranked: bool = False

    def statistics(
        self, targets: Sequence[str], predictions: Sequence[Any]
    ) -> Float64[np.ndarray, "examples counts"]:
        """What each example adds to the sums that `formula` turns into the score.

        Raises:
          ValueError: no examples; not as many predictions as targets; a target that is no string;
            a prediction that is no string or, for a `ranked` metric, no sequence of strings.
        """
        if len(targets) != len(predictions):
            raise ValueError(
                f"{self.name}: {len(targets)} targets but {len(predictions)} predictions; "
                "expected as many"
            )
        if not len(targets):
            raise ValueError(f"{self.name}: no examples to score")
        self._check("target", targets, _is_text, "one text")
        if self.ranked:
            expected = "a ranking, a sequence of texts with the best first"
            self._check("prediction", predictions, _is_ranking, expected)
        else:
            self._check("prediction", predictions, _is_text, "one text")
        return np.asarray(self.count(targets, predictions), np.float64)

    def function(self, targets: Sequence[str], predictions: Sequence[Any]) -> dict[str, float]:
        """{name: score}; raises as `statistics` does."""
        sums = self.statistics(targets, predictions).sum(axis=0)
        return {self.name: float(self.formula(sums))}

    def utility(self, value: float) -> float:
        """The value with higher as better: an error rate becomes `100 - rate`.

        What is averaged over tasks is the utility, so that an error rate never raises a mean.
        """
        return value if self.higher_is_better else 100.0 - value

    def _check(
        self, what: str, values: Sequence[Any], fits: Callable[[Any], bool], expected: str
    ) -> None:
        for number, value in enumerate(values, 1):
            if not fits(value):
                raise ValueError(
                    f"{self.name}: {what} {number} of {len(values)} is {reprlib.repr(value)}; "
                    f"expected {expected}"
                )


METRICS: dict[str, Metric] = {}
"""All metrics by name; each function below that is a metric adds its own."""


def _metric(
    title: str,
    formula: Callable[[np.ndarray], np.ndarray] = percentage,
    *,
    higher_is_better: bool = True,
    ranked: bool = False,
) -> Callable[[Callable[[Sequence[str], Sequence[Any]], ArrayLike]], MetricFn]:
    """Makes a metric of a function that counts: its entry of `METRICS` and its `metric_fn`.

    The decorated function returns a row per example, by default (numerator, denominator) of the
    score; what callers get in its place is `Metric.function`.
    """

    def define(count: Callable[[Sequence[str], Sequence[Any]], ArrayLike]) -> MetricFn:
        name = count.__name__
        METRICS[name] = Metric(name, title, count, formula, higher_is_better, ranked)

        def function(targets: Sequence[str], predictions: Sequence[Any]) -> dict[str, float]:
            return METRICS[name].function(targets, predictions)

        function.__name__ = function.__qualname__ = name
        function.__doc__ = count.__doc__
        return function

    return define


@_metric("exact match")
def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> ArrayLike:
    """Percentage of predictions equal to their target, character by character."""
    return [(t == p, 1) for t, p in zip(targets, predictions, strict=True)]


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


@_metric("span F1")
def span_f1(targets: Sequence[str], predictions: Sequence[str]) -> ArrayLike:
    """Micro-averaged F1 over entities written as `PER: x $$ LOC: y`.

    Predicted and true entities are compared as multisets of (label, text) pairs within an example;
    true positives, false positives and false negatives are summed over all examples.

    The published scorer leaves out every entity that contains a colon, in targets and predictions
    alike ("LOC: ratio 3:1" counts for nothing); here the label ends at the first colon and the
    entity counts. On data without such entities the numbers are the same. As there, examples that
    hold no entity and predict none leave the score untouched, and if all are of that kind it is 0.
    """
    rows = []
    for target, prediction in zip(targets, predictions, strict=True):
        gold = collections.Counter(parse_entities(target))
        guess = collections.Counter(parse_entities(prediction))
        # F1 = 2TP / (2TP + FP + FN), whose denominator is all that was predicted or expected.
        rows.append((2 * (gold & guess).total(), gold.total() + guess.total()))
    return rows


def normalize_squad(answer: str) -> str:
    """SQuAD's: lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_ASCII_PUNCTUATION)).split())


@_metric("token F1")
def token_f1(targets: Sequence[str], predictions: Sequence[str]) -> ArrayLike:
    """Mean over examples of the F1 between the white-space tokens of target and prediction.

    Both are normalised as in SQuAD first. A pair without a common token scores 0, which includes
    a target whose normalised form is empty.
    """
    rows = []
    for target, prediction in zip(targets, predictions, strict=True):
        gold = normalize_squad(target).split()
        guess = normalize_squad(prediction).split()
        common = (collections.Counter(gold) & collections.Counter(guess)).total()
        # 2PR/(P+R) with P = common/len(guess) and R = common/len(gold).
        rows.append((2.0 * common / (len(gold) + len(guess)) if common else 0.0, 1))
    return rows


# sacrebleu and rapidfuzz are imported where they are used: the score tables need this module's
# names at start-up, never those libraries.
@functools.cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF(char_order=6, word_order=0, beta=2)


@functools.cache
def _bleu_scorer() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU()


# The two steps of a score are methods that sacrebleu asks of every metric derived from its base
# class. Its public functions take both at once, and resample by a seed in the environment, for 95 %
# and a symmetric interval only.
def _sacrebleu_rows(
    scorer: Any, targets: Sequence[str], predictions: Sequence[str]
) -> list[list[int]]:
    return scorer._extract_corpus_statistics(list(predictions), [list(targets)])


def _sacrebleu_formula(scorer: Callable[[], Any]) -> Callable[[np.ndarray], np.ndarray]:
    def score(sums: np.ndarray) -> float:
        return scorer()._compute_score_from_stats(sums.tolist()).score

    return lambda sums: np.apply_along_axis(score, -1, sums)


@_metric("chrF", _sacrebleu_formula(_chrf_scorer))
def chrf(targets: Sequence[str], predictions: Sequence[str]) -> ArrayLike:
    """Corpus chrF (Popović 2015): character n-grams up to 6, beta 2, as sacrebleu computes it.

    The published scorer needs a sacrebleu older than 1.4, whose function returned a bare float.
    This is today's sacrebleu: the same numbers on sentences. On references shorter than six
    characters they differ a little, for sacrebleu no longer counts the n-grams of a prediction
    whose reference has none of that length.
    """
    return _sacrebleu_rows(_chrf_scorer(), targets, predictions)


@_metric("BLEU", _sacrebleu_formula(_bleu_scorer))
def bleu(targets: Sequence[str], predictions: Sequence[str]) -> ArrayLike:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it by default.

    N-grams up to 4, the tokenizer 13a, exponential smoothing, case kept. No task of XTREME-UP is
    scored by it. The published scorer holds an unused one, with the tokenizer intl, which
    multiplies a percentage by 100.
    """
    return _sacrebleu_rows(_bleu_scorer(), targets, predictions)


@_metric("CER", higher_is_better=False)
def cer(targets: Sequence[str], predictions: Sequence[str]) -> ArrayLike:
    """Character error rate of the corpus: 100 · Σ Levenshtein(target, prediction) / Σ |target|.

    Both texts are brought to Unicode's NFKC form first; lengths are counted in code points. Lower
    is better and the rate can exceed 100. The published scorer divides by zero where all targets
    are empty; here such a corpus counts as one character long.
    """
    return _edits_and_lengths(targets, predictions)


def normalize_asr(text: str) -> str:
    """The published scorer's normalisation of transcripts, in its order.

    Lower case; tabs and line ends become spaces; runs of the marks `,.?!` are dropped where they
    stand before or after a space or at the end; the apostrophe `'` and the brackets `()[]` become
    spaces; white space at both ends is dropped, and several spaces become one.

    So marks inside a word stay ("3.5"), as do those at the start and those that touch a bracket
    ("(yes.)" is "yes."), quotation marks, and the punctuation of other scripts.
    """
    text = _LOOSE_MARKS.sub("", text.lower().translate(_TABS_AND_LINE_ENDS))
    return _SPACES.sub(" ", text.translate(_APOSTROPHES_AND_BRACKETS).strip())


@_metric("CER (normalised)", higher_is_better=False)
def asr_cer(targets: Sequence[str], predictions: Sequence[str]) -> ArrayLike:
    """`cer` of transcripts after `normalize_asr`, by which XTREME-UP scores its asr task."""
    return _edits_and_lengths(map(normalize_asr, targets), map(normalize_asr, predictions))


def _edits_and_lengths(targets: Iterable[str], predictions: Iterable[str]) -> ArrayLike:
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cpdist

    gold = [unicodedata.normalize("NFKC", t) for t in targets]
    guess = [unicodedata.normalize("NFKC", p) for p in predictions]
    edits = cpdist(gold, guess, scorer=Levenshtein.distance, dtype=np.int64)
    return np.stack([edits, [len(t) for t in gold]], axis=1)


@_metric("top-3 accuracy", ranked=True)
def top_3_accuracy(targets: Sequence[str], predictions: Sequence[Sequence[str]]) -> ArrayLike:
    """Percentage of targets that are among the first three guesses of their ranking.

    Guesses are compared character by character; those after the third count for nothing. The
    published scorer refuses rankings of another length than three.
    """
    return [(t in ranking[:3], 1) for t, ranking in zip(targets, predictions, strict=True)]


@_metric("MRR@10", ranked=True)
def mrr_at_10(targets: Sequence[str], predictions: Sequence[Sequence[str]]) -> ArrayLike:
    """100 times the mean over examples of 1 / rank of the target among the first ten guesses.

    A target that is not among them adds 0. The published scorer leaves the mean in 0..1, although
    it averages it with percentages, and trusts that no ranking is longer than ten.
    """
    rows = []
    for target, ranking in zip(targets, predictions, strict=True):
        first = list(ranking[:10])
        rows.append((1 / (1 + first.index(target)) if target in first else 0.0, 1))
    return rows


def find_metric(name: str) -> Metric:
    """The metric of that name; a ValueError with the nearest name where there is none."""
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; {did_you_mean(name, METRICS)}")
    return METRICS[name]


def metric_fn(names: Sequence[str]) -> MetricFn:
    """One function that computes several metrics, the first of them a task's headline.

    As the only `metric_fn` of a seqio task, for seqio decodes the predictions anew for each.

    Raises:
      ValueError: no names, a name that `METRICS` lacks, or metrics of rankings beside metrics of
        one text, which no task can predict at once.
    """
    if not names:
        raise ValueError("metrics: expected at least one name, got none")
    chosen = [find_metric(name) for name in names]
    by_kind = {metric.ranked: metric.name for metric in chosen}
    if len(by_kind) > 1:
        raise ValueError(
            f"metrics: {by_kind[True]!r} scores rankings and {by_kind[False]!r} one text per "
            "example; a task predicts either"
        )

    def compute(targets: Sequence[str], predictions: Sequence[Any]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for metric in chosen:
            scores |= metric.function(targets, predictions)
        return scores

    compute.__qualname__ = f"metric_fn({', '.join(names)})"  # what scores were made by
    return compute


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_ranking(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(guess, str) for guess in value)
    )
