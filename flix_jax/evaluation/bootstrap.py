"""Confidence intervals of a cell's scores by resampling its examples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from flix_jax.evaluation.metrics import Metric, find_metric


def resample(
    metric: Metric,
    statistics: Float64[np.ndarray, "examples counts"],
    *,
    seed: int | Sequence[int] = 0,
    resamples: int = 1000,
) -> Float64[np.ndarray, " resamples"]:
    """Scores of examples drawn anew with replacement, as many as there are.

    Args:
      metric: whose formula makes a score of the sums of `statistics`.
      statistics: `Metric.statistics` of the examples.
      seed: of NumPy's default generator; the same seed draws the same examples for every metric.
      resamples: how many scores.

    Raises:
      ValueError: for less than one resample.
    """
    if resamples < 1:
        raise ValueError(f"resamples {resamples}: expected at least 1")
    generator, examples = np.random.default_rng(seed), len(statistics)
    sums = np.stack(
        [
            statistics[generator.integers(examples, size=examples)].sum(axis=0)
            for _ in range(resamples)
        ]
    )
    return np.asarray(metric.formula(sums), np.float64)


def percentile_interval(
    scores: Float64[np.ndarray, " resamples"], confidence: float = 0.95
) -> tuple[float, float]:
    """From the (1 - confidence) / 2 quantile of resampled scores to the (1 + confidence) / 2 one.

    Raises:
      ValueError: for a confidence that is not between 0 and 1.
    """
    check_confidence(confidence)
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(scores, [tail, 1.0 - tail])
    return float(low), float(high)


def check_confidence(confidence: float) -> None:
    """Refuses, by a ValueError, what is no share between 0 and 1."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence {confidence}: expected more than 0 and less than 1")


def confidence_interval(
    metric: str,
    targets: Sequence[str],
    predictions: Sequence[Any],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> tuple[float, float]:
    """The percentile interval of a score (Efron & Tibshirani 1993, chapter 13).

    The examples are drawn anew with replacement, as many as there are, and scored; the interval
    runs from the (1 - confidence) / 2 quantile of those scores to the (1 + confidence) / 2
    quantile. It tells how far the score depends on which examples the cell happens to hold, and
    nothing of how it varies between trainings. Examples on which the score does not vary, such as
    a single one, give an interval of no width.

    A resample adds up the examples' counts (`Metric.statistics`) and scores the sums, so that no
    text is read twice: this holds for every metric, corpus chrF and BLEU included.

    Args:
      metric: a name in `METRICS`.
      targets: a string per example.
      predictions: as the metric takes them.
      seed: of NumPy's default generator; the same seed draws the same examples for every metric.
      confidence: the share of the scores inside, between 0 and 1.
      resamples: how many scores. 1000 place each end of a 95 % interval with a standard error of
        about 2 % of the width.

    Returns:
      (low, high), as percentages.

    Raises:
      ValueError: as the metric does, or for an unknown metric, confidence or number of resamples.
    """
    check_confidence(confidence)
    chosen = find_metric(metric)
    statistics = chosen.statistics(targets, predictions)
    return percentile_interval(
        resample(chosen, statistics, seed=seed, resamples=resamples), confidence
    )
