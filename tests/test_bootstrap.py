"""Bootstrap intervals against resampled texts, the normal approximation, and their coverage."""

import numpy as np
import pytest

from flix_jax.evaluation.bootstrap import confidence_interval
from flix_jax.evaluation.metrics import METRICS


def corpus(metric, examples, seed=0):
    """Targets and predictions, some of them right, in the form that the metric takes."""
    rng = np.random.default_rng(seed)
    words = ["PER: Ade", "LOC: Kano", "ነገ ጠዋት", "नमस्ते दुनिया", "the market opens", "بازار"]
    lines = [" $$ ".join(rng.choice(words, size=rng.integers(1, 5))) for _ in range(examples)]
    guesses = [
        [str(guess) for guess in rng.choice([line, *rng.choice(lines, size=4)], size=3)]
        for line in lines
    ]
    return lines, guesses if metric.ranked else [ranking[0] for ranking in guesses]


@pytest.mark.parametrize("name", METRICS)
def test_is_the_interval_of_scores_of_resampled_texts(name):
    metric = METRICS[name]
    targets, predictions = corpus(metric, 25)
    rng = np.random.default_rng(7)
    scores = []
    for _ in range(60):
        drawn = rng.integers(25, size=25)
        resampled = [targets[i] for i in drawn], [predictions[i] for i in drawn]
        scores.append(metric.function(*resampled)[name])
    interval = confidence_interval(name, targets, predictions, seed=7, confidence=0.8, resamples=60)
    assert interval == pytest.approx(np.percentile(scores, [10, 90]), abs=1e-9)
    low, high = interval
    assert low < metric.function(targets, predictions)[name] < high


def test_is_as_wide_as_the_normal_approximation_and_shrinks_with_the_root_of_the_examples():
    for examples in (100, 400, 1600):
        predictions = ["yes", "no"] * (examples // 2)
        low, high = confidence_interval(
            "exact_match", ["yes"] * examples, predictions, seed=1, resamples=2000
        )
        expected = 100 * 2 * 1.96 * np.sqrt(0.5 * 0.5 / examples)
        assert high - low == pytest.approx(expected, rel=0.08)
        assert (low + high) / 2 == pytest.approx(50, abs=0.05 * expected)


def test_covers_the_true_score_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        predictions = ["yes" if right else "no" for right in rng.random(150) < 0.6]
        low, high = confidence_interval("exact_match", ["yes"] * 150, predictions, resamples=200)
        covered += low <= 60 <= high
    # Binomial with p = 0.95: sd 1.5 % of 200.
    assert 0.9 <= covered / 200 <= 0.99


def test_is_a_function_of_the_seed():
    targets, predictions = corpus(METRICS["cer"], 40)
    first, again, other = (
        confidence_interval("cer", targets, predictions, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_greater_confidence_is_a_wider_interval():
    targets, predictions = corpus(METRICS["span_f1"], 40)
    (low, high), (lower, higher) = (
        confidence_interval("span_f1", targets, predictions, confidence=confidence)
        for confidence in (0.5, 0.99)
    )
    assert lower < low < high < higher


def test_scores_without_spread_give_no_width():
    assert confidence_interval("token_f1", ["x y"], ["y z"]) == (50.0, 50.0)
    assert confidence_interval("cer", ["abc"] * 9, ["abc"] * 9) == (0.0, 0.0)


def test_wrong_arguments_are_refused_in_one_line():
    with pytest.raises(ValueError, match="^confidence 95: expected more than 0 and less than 1$"):
        confidence_interval("cer", ["a"], ["a"], confidence=95)
    with pytest.raises(ValueError, match="^resamples 0: expected at least 1$"):
        confidence_interval("cer", ["a"], ["a"], resamples=0)
    with pytest.raises(ValueError, match="unknown metric 'crf'; did you mean 'chrf'"):
        confidence_interval("crf", ["a"], ["a"])
    with pytest.raises(ValueError, match="^cer: no examples to score$"):
        confidence_interval("cer", [], [])
