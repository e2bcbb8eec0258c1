"""Figures that a benchmark measures, told to `run_all.py` where that runs it."""

import json
import os
from collections.abc import Sequence

import numpy as np

FILE = "FLIX_FIGURES"  # a variable of the environment: where they go, a line of json each


def tell(name: str, value: float, spread: tuple[float, float] | None = None) -> None:
    """A figure, by the name that `run_all.py` has a goal for, with its quartiles."""
    if path := os.environ.get(FILE):
        with open(path, "a") as file:
            file.write(json.dumps({"name": name, "value": value, "spread": spread}) + "\n")


def tell_ratios(name: str, ratios: Sequence[float] | np.ndarray) -> None:
    """The median of ratios (or seconds), each of one round, with their quartiles."""
    low, middle, high = (float(x) for x in np.quantile(ratios, (0.25, 0.5, 0.75)))
    tell(name, middle, (low, high))
