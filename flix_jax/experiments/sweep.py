"""Sweeps: the trials that axes, methods, random draws and seeds span.

A sweep knows bindings as text and never reads them: what they mean is the caller's to know.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.order import philox
from flix_jax.evaluation.metrics import find_metric
from flix_jax.evaluation.scoreboard import GROUPS

Bindings = tuple[str, ...]
Axis = Mapping[str, Bindings]

METHOD = "method"
"""The name of the axis that a sweep's methods form."""


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A distribution that random values of an axis are drawn from.

    Attributes:
      low, high: bounds; both may be drawn.
      log: whether the logarithm is uniform (learning rates), rather than the value.
      integer: whether values are integers (ranks); others have three significant digits.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"Uniform.low={self.low} is not below Uniform.high={self.high}")
        if self.log and not self.low > 0:
            raise ValueError(f"Uniform.low={self.low}: expected above 0 where Uniform.log is set")

    def value(self, *key: Any) -> float | int:
        """The value that belongs to a key: the same on every machine."""
        share = philox(*key).random_raw() / 2**64
        low, high = self.low, self.high
        if self.integer:
            low, high = low - 0.5 * (not self.log), high + 0.5 * (not self.log)
        if self.log:
            drawn = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        else:
            drawn = low + share * (high - low)
        if self.integer:
            return int(min(max(round(drawn), self.low), self.high))
        return min(max(float(f"{drawn:.3g}"), self.low), self.high)


@dataclasses.dataclass(frozen=True)
class Method:
    """One of the methods that a sweep compares: its bindings, and axes that only it has.

    Attributes:
      bindings: such as `('features.TYPES = "task+language"',)`.
      axes: {axis: {label: bindings}}, such as a grid of learning rates of the method's own.
    """

    bindings: Bindings = ()
    axes: Mapping[str, Axis] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bindings", _as_bindings(self.bindings))
        object.__setattr__(self, "axes", _as_axes(self.axes))


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep: a label of every axis, a seed, and the bindings that the labels mean."""

    labels: Mapping[str, str]
    seed: int
    bindings: Bindings

    @property
    def name(self) -> str:
        """The trial's folder: `method=FLix,learning_rate=5e-3,seed=0`."""
        named = [*self.labels.items(), ("seed", str(self.seed))]
        return ",".join(f"{_slug(axis)}={_slug(label)}" for axis, label in named)

    def __str__(self) -> str:
        return ", ".join([*_labels_text(self.labels), f"seed {self.seed}"])


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What to vary and what to report.

    The trials are every combination of the axes' labels, for every method, every draw of the random
    axes, and every seed.

    Attributes:
      name: a sweep's folder is refused to a sweep of another name.
      axes: what is varied, in one of two forms. {gin parameter: values}, such as
        `{'FeatureType.dropout': (0.0, 0.5)}`; several parameters that go together are named with
        commas between them, and every value is a tuple of one for each. Or {axis: {label:
        bindings}}; the labels are what tables show.
      random: {gin parameter: Uniform}, drawn together `samples` times.
      samples: how many draws; more of them leave the first ones as they were.
      sampling_seed: of the draws.
      trials_per_program: at most so many trials train as one program, where they can; 1 is one
        after another.
      methods: {name: Method}, for methods that have bindings or grids of their own.
      seeds: passed to every trial; trials of one seed are compared with each other.
      metric: what tables show; '' shows each task by its own headline metric.
      group: the group of cells whose mean a choice is made by.
      choose: axes (such as a learning rate) of which the report keeps, for each method, the label
        that does best on `choose_on`.
      choose_on: the split to choose by.
      report_on: the split that the comparison shows.
      baseline: what differences are taken from, by its name in the comparison; '' is the first.
      base: names everything else a trial depends on, such as the digest of the base configuration;
        a sweep's folder is refused to a sweep of another base.
    """

    name: str
    axes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    methods: Mapping[str, Method] = dataclasses.field(default_factory=dict)
    random: Mapping[str, Uniform] = dataclasses.field(default_factory=dict)
    samples: int = 0
    sampling_seed: int = 0
    trials_per_program: int = 1
    seeds: tuple[int, ...] = (0,)
    metric: str = ""
    group: str = "seen"
    choose: tuple[str, ...] = ()
    choose_on: str = "validation"
    report_on: str = "validation"
    baseline: str = ""
    base: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", _as_axes(self.axes))
        methods = {str(name): _as_method(method) for name, method in self.methods.items()}
        object.__setattr__(self, "methods", methods)
        random = {axis: _as_uniform(axis, value) for axis, value in self.random.items()}
        object.__setattr__(self, "random", random)
        object.__setattr__(self, "seeds", tuple(self.seeds))
        chosen = (self.choose,) if isinstance(self.choose, str) else tuple(self.choose)
        object.__setattr__(self, "choose", chosen)
        if not self.name:
            raise ValueError("a sweep needs a name, got ''")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"sweep {self.name!r}: expected distinct seeds, got {self.seeds}")
        if bool(self.random) != (self.samples > 0):
            raise ValueError(
                f"sweep {self.name!r}: Sweep.random of {len(self.random)} axes needs Sweep.samples,"
                f" and samples need it; got Sweep.samples={self.samples}"
            )
        if self.trials_per_program < 1:
            raise ValueError(
                f"Sweep.trials_per_program must be at least 1, got {self.trials_per_program}"
            )
        if self.metric:
            find_metric(self.metric)
        self._check_known("group", self.group, GROUPS)
        all_axes = [
            *self.axes,
            *self.random,
            *(axis for m in self.methods.values() for axis in m.axes),
        ]
        for axis in self.choose:
            self._check_known("axis to choose", axis, all_axes)
        for method, settings in self.methods.items():
            for axis in settings.axes:
                if axis in self.axes:
                    raise ValueError(
                        f"sweep {self.name!r}: axis {axis!r} is both the sweep's and {method!r}'s"
                    )
        if METHOD in all_axes:
            raise ValueError(f"sweep {self.name!r}: no axis may be called {METHOD!r}")
        for trial_name, same in itertools.groupby(sorted(t.name for t in self.trials())):
            if len(list(same)) > 1:
                raise ValueError(
                    f"sweep {self.name!r}: labels that differ in punctuation only would share the"
                    f" folder {trial_name!r}"
                )
        if self.baseline:
            self._check_known("baseline", self.baseline, self.variants())

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that trials are scored on: to report, and to choose by where that is done."""
        return tuple(sorted({self.report_on, *([self.choose_on] if self.choose else [])}))

    def trials(self) -> tuple[Trial, ...]:
        """All trials; seeds vary slowest, so that what is done first compares everything once."""
        settings: list[tuple[dict[str, str], Bindings]] = []
        for method, own in self.methods.items() or [("", Method())]:
            axes = {**self.axes, **own.axes}
            for labels, draw in itertools.product(itertools.product(*axes.values()), self._draws()):
                named = dict(zip(axes, labels, strict=True))
                bound = {f"method {method!r}": own.bindings} if method else {}
                bound |= {f"axis {axis!r}": axes[axis][label] for axis, label in named.items()}
                for axis, value in draw.items():
                    bound[f"axis {axis!r}"] = (f"{axis} = {value!r}",)
                    named[axis] = f"{value:g}"
                self._check_bindings(bound)
                settings.append(
                    (
                        {METHOD: method, **named} if method else named,
                        tuple(itertools.chain.from_iterable(bound.values())),
                    )
                )
        return tuple(
            Trial(labels, seed, bindings) for seed in self.seeds for labels, bindings in settings
        )

    def _draws(self) -> Iterable[dict[str, float | int]]:
        if not self.random:
            return [{}]
        draws = [
            {
                axis: uniform.value("sweep", self.sampling_seed, axis, sample)
                for axis, uniform in self.random.items()
            }
            for sample in range(self.samples)
        ]
        return {tuple(draw.values()): draw for draw in draws}.values()  # each but once

    def variant(self, labels: Mapping[str, str]) -> str:
        """What the comparison calls trials of these labels: all of them but the chosen axes'."""
        kept = {axis: label for axis, label in labels.items() if axis not in self.choose}
        return ", ".join(_labels_text(kept)) or self.name

    def variants(self) -> tuple[str, ...]:
        """The rows of the comparison."""
        return tuple(dict.fromkeys(self.variant(trial.labels) for trial in self.trials()))

    def to_json(self) -> dict[str, Any]:
        """What sweep.json holds; `from_json` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Sweep":
        """The sweep that `to_json` wrote."""
        return cls(**record)

    def _check_known(self, what: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"sweep {self.name!r}: unknown {what} {name!r}; {hint}")

    def _check_bindings(self, bound: Mapping[str, Bindings]) -> None:
        owners: dict[str, str] = {}
        for owner, bindings in bound.items():
            for binding in bindings:
                parameter, equals, value = (part.strip() for part in binding.partition("="))
                if not (parameter and equals and value):
                    raise ValueError(
                        f"sweep {self.name!r}: {owner}: {binding!r} is not 'parameter = value'"
                    )
                if owners.setdefault(parameter, owner) != owner:
                    raise ValueError(
                        f"sweep {self.name!r}: {parameter} is set by {owners[parameter]} and by"
                        f" {owner}"
                    )


def _labels_text(labels: Mapping[str, str]) -> list[str]:
    return [label if axis == METHOD else f"{axis} {label}" for axis, label in labels.items()]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def _as_bindings(bindings: Any) -> Bindings:
    return (bindings,) if isinstance(bindings, str) else tuple(bindings)


def _as_uniform(axis: str, value: Any) -> Uniform:
    if isinstance(value, Mapping):
        value = Uniform(**value)
    if not isinstance(value, Uniform):
        raise ValueError(f"sweep axis {axis!r}: expected a Uniform to draw from, got {value!r}")
    return value


def _as_axes(axes: Mapping[str, Any]) -> dict[str, dict[str, Bindings]]:
    return {axis: _as_axis(axis, values) for axis, values in axes.items()}


def _as_axis(axis: str, values: Any) -> dict[str, Bindings]:
    """{label: bindings} of an axis in either form."""
    if isinstance(values, str) or not isinstance(values, Mapping | Sequence) or not values:
        raise ValueError(
            f"sweep axis {axis!r}: expected {{label: bindings}} with at least one label, or values,"
            f" got {values!r}"
        )
    if isinstance(values, Mapping):
        return {str(label): _as_bindings(bindings) for label, bindings in values.items()}
    parameters = [name.strip() for name in axis.split(",")]
    labels: dict[str, Bindings] = {}
    for value in values:
        together = value if len(parameters) > 1 else (value,)
        if not isinstance(together, Sequence) or len(together) != len(parameters):
            raise ValueError(
                f"sweep axis {axis!r}: expected a value for each of {len(parameters)} parameters,"
                f" got {value!r}"
            )
        label = ", ".join(map(_label, together))
        if label in labels:
            raise ValueError(f"sweep axis {axis!r}: {label} is there twice")
        labels[label] = tuple(f"{p} = {v!r}" for p, v in zip(parameters, together, strict=True))
    return labels


def _label(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _as_method(method: Any) -> Method:
    if isinstance(method, Method):
        return method
    return Method(**method) if isinstance(method, Mapping) else Method(_as_bindings(method))
