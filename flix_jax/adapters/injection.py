"""Injection: which dense layers of a linen model are adapted, and adding the update to them.

The model is not changed and knows nothing of adapters. `inject` is a context in which the call of
every dense layer whose path matches a target adds a child module named `flix` to that layer, so
that the adapter's parameters stand beside its kernel:

    encoder/layers_0/attention/query/kernel            [d_in, d_out]
    encoder/layers_0/attention/query/flix/task/a       [values, d_in, rank]
    encoder/layers_0/attention/query/flix/task/b       [values, rank, d_out]

Enter it inside the function that is jitted: a jitted function does not see a context entered around
its call, and keeps one that it was traced in.

    def loss(params, batch, rng):
        active = activate(spec.space, batch["feature_ids"], dropout_rng=rng)
        with inject(spec, active, deterministic=False):
            logits = model.apply({"params": params}, batch["inputs"])
"""

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from flix_jax.adapters import siblings, text_tables
from flix_jax.adapters import targets as targets_lib
from flix_jax.adapters.activation import ActiveFeatures
from flix_jax.adapters.dense import (
    DenseCall,
    as_rows,
    dense_call,
    dense_inputs,
    layer_input,
    without_numbers,
)
from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.fusion import MATRICES, Fusion, Source
from flix_jax.adapters.modules import MERGED, LowRankDelta
from flix_jax.adapters.suggest import did_you_mean

CHILD = "flix"
#: What an adapted layer's output is called, for rematerialisation that goes by names.
DENSE_OUTPUT = "dense_output"

#: The collection of variables that holds what a layer is given, or recorded, from outside.
LAYER_STATES = "layer_states"
#: Beside CHILD at the top of the parameters: the matrix of source states that are given.
PROJECTION = "source_projection"
#: In a fused layer's part of it: its input when the network read the source.
SOURCE_INPUT = "source_input"


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """What is adapted, and by what. Hashable, so it may be static under jit.

    Attributes:
      space: the feature space.
      targets: one or several of 'all', 'attention', 'mlp', 'encoder', 'decoder' (the projections of
        a T5-like network) or regular expressions that match a dense layer's whole path, such as
        'encoder/layers_\\d+/attention/(query|value)'. Several are united.
      alpha: scale alpha / rank of each feature's update; None means 1.
      dropout: rate of dropout on the adapters' input (LoRA's own), apart from feature dropout.
      fusion: how some of the adapters read a source text beside the target; None, none does.

    Raises:
      ValueError: when a field is not as described above.
    """

    space: FeatureSpace
    targets: str | tuple[str, ...] = "all"
    alpha: float | None = None
    dropout: float = 0.0
    fusion: Fusion | None = None

    def __post_init__(self) -> None:
        targets = targets_lib.as_tuple(self.targets, "adapter")
        object.__setattr__(self, "targets", targets)
        if not isinstance(self.space, FeatureSpace):
            raise ValueError(f"adapter: space is {self.space!r}, expected a FeatureSpace")
        if self.alpha is not None and not (
            isinstance(self.alpha, numbers.Real) and math.isfinite(self.alpha) and self.alpha > 0
        ):
            raise ValueError(f"adapter: alpha is {self.alpha!r}, expected None or a number > 0")
        if not isinstance(self.dropout, numbers.Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"adapter: dropout is {self.dropout!r}, expected a number in [0, 1)")
        if self.fusion is not None and not isinstance(self.fusion, Fusion):
            raise ValueError(f"adapter: fusion is {self.fusion!r}, expected a Fusion or None")

    def matching(self, path: str) -> tuple[str, ...]:
        """The targets that match a module path such as 'encoder/layers_0/mlp/wi_0'."""
        return targets_lib.matching(tuple(self.targets), path)

    def fuses(self, path: str) -> bool:
        """Whether the layer at a path is adapted, and its adapter reads the source."""
        return self.fusion is not None and self.fusion.matches(path) and bool(self.matching(path))


@contextlib.contextmanager
def inject(
    spec: AdapterSpec,
    active: ActiveFeatures,
    *,
    deterministic: bool = True,
    source: Source | None = None,
    segments: Callable[[str], Array] | None = None,
) -> Iterator[None]:
    """A context in which the targeted dense layers of any linen model add their update.

    Enter it inside the jitted function. Around an initialisation it makes the parameters, too.

    Args:
      spec: what is adapted.
      active: the features of the batch (`activate`).
      deterministic: False switches on the dropout of the adapters' input, where `spec` has one.
      source: what fused layers read; where they are scanned, its `variables` must be among those
        that the model is applied to. An initialisation needs none.
      segments: of packed rows whose examples have features of their own, path of a layer -> which
        example each position of its input belongs to (`ActiveFeatures.segments`).

    Raises:
      ValueError: when a fused layer has no source, when a batch is not of `active`'s size, when a
        targeted layer has a child named `flix` already, and on leaving an initialisation in which a
        target matched nothing.
    """
    seen: dict[str, DenseCall] = {}
    injected = _Injected(spec, active, deterministic, source, segments)
    initialising = within = False

    def interceptor(next_fun, args, kwargs, context):
        nonlocal initialising, within
        if within:  # a layer that is called by what takes its place
            return next_fun(*args, **kwargs)
        module, x = context.module, layer_input(args, kwargs)
        call = dense_call(context, x)
        if call is not None and len(args) + len(kwargs) == 1 and injected.merges(call, module):
            seen[call.path] = call
            within = True
            try:
                return checkpoint_name(injected.merged(call, module, x), DENSE_OUTPUT)
            finally:
                within = False
        y = next_fun(*args, **kwargs)
        call = call or dense_call(context, x)  # whose kernel an initialisation has made by now
        if call is None:
            return y
        seen[call.path] = call
        initialising = initialising or module.is_initializing()
        if not spec.matching(call.path):
            return y
        return checkpoint_name(y + injected.update(call, module, x, y), DENSE_OUTPUT)

    with nn.intercept_methods(interceptor):
        yield
    if initialising:
        _check_targets(spec, tuple(seen))


def _source_of(path: str, module: nn.Module, source: Source | None, states: dict[str, Any]) -> Any:
    """The source's states for the layer at a path; `states` holds those of layers before it."""
    if source is None:
        raise ValueError(f"{path}: is fused, and the injection was given no source")
    if source.states is not None:
        return source.states
    recorded = source.same.get(path)
    if recorded is None:
        raise ValueError(
            f"Fusion.targets: {path} is none of the layers that read the source "
            f"({len(source.same)} of the encoder); {did_you_mean(path, source.same)}"
        )
    if recorded == path:
        found: Any = module.get_variable(LAYER_STATES, SOURCE_INPUT)
        if found is None:  # not given by whoever applies the model; layers of a loop have theirs
            found = source.variables[LAYER_STATES]
            for name in (*path.split("/"), SOURCE_INPUT):
                found = found[name]
        states[path] = found
    return states[recorded]


class _Injected:
    """What adapted layers compute in one call of the network; the arguments are `inject`'s."""

    def __init__(
        self,
        spec: AdapterSpec,
        active: ActiveFeatures,
        deterministic: bool,
        source: Source | None,
        segments: Callable[[str], Array] | None,
    ) -> None:
        self._spec, self._active = spec, active
        self._deterministic = deterministic
        self._source, self._segments = source, segments
        self._states: dict[str, Any] = {}  # of the source, by the layer that reads them first
        self._narrowed = siblings.Narrowed()

    def update(self, call: DenseCall, module: nn.Module, x: Any, y: Array) -> Array:
        """What is added to a layer's output y."""
        rows = as_rows(call, x).astype(y.dtype)
        if math.prod(rows.shape[:-1]) * call.d_out != y.size:
            raise ValueError(
                f"{call.path}: output {y.shape} for input {x.shape}, expected "
                f"{call.d_out} features for each position"
            )
        active = self._active
        if self._segments is not None:
            active = dataclasses.replace(active, segments=self._segments(call.path))
        states: Any = None
        if self._spec.fuses(call.path) and not module.is_initializing():
            states = _source_of(call.path, module, self._source, self._states)
        child = self._child(call, module)
        try:
            read: dict[str, Any] = {}
            if states is not None:
                assert self._source is not None
                read = {"source": as_rows(call, states), "alignment": self._source.alignment}
                _check_source(rows, **read)
            read["narrow"] = self._narrowed.of(call.path, child, x, rows)
            found = child(rows, call.d_out, active, deterministic=self._deterministic, **read)
        except ValueError as error:
            raise ValueError(f"{call.path}: {error}") from error
        return found.reshape(y.shape)

    def merges(self, call: DenseCall, module: nn.Module) -> bool:
        """Whether a layer multiplies with kernels that hold the update.

        Where the table says so, and the layer is one whose kernel takes it: it contracts the last
        axes, its kernel is no integer, each row has one set of features, and nothing is dropped out
        of the adapter's input.
        """
        if module.is_initializing() or not self._spec.matching(call.path):
            return False
        if not module.has_variable("params", CHILD):
            return False
        own: Any = module.get_variable("params", CHILD)
        if MERGED not in own or self._active.ids.ndim == 3:
            return False
        if self._spec.dropout and not self._deterministic:
            return False
        (kernel,) = jax.tree.leaves(module.get_variable("params", "kernel"))
        return call.contracts_last and jnp.issubdtype(kernel.dtype, jnp.floating)

    def merged(self, call: DenseCall, module: nn.Module, x: Any) -> Array:
        """What a layer gives whose kernel holds the update."""
        params: Any = dict(nn.unbox(module.variables["params"]))
        del params[CHILD]
        alone = module.clone(parent=None)

        def layer(params: Any, x: Array) -> Any:
            return alone.apply({"params": params}, x)

        try:
            return self._child(call, module).merged(layer, params, x, self._active)
        except ValueError as error:
            raise ValueError(f"{call.path}: {error}") from error

    def _child(self, call: DenseCall, module: nn.Module) -> LowRankDelta:
        spec = self._spec
        function = spec.fusion.function if spec.fusion and spec.fuses(call.path) else None
        try:
            return LowRankDelta(
                spec.space, spec.alpha, spec.dropout, function=function, name=CHILD, parent=module
            )
        except flax.errors.NameInUseError as error:
            raise ValueError(
                f"{call.path}: has a child {CHILD!r} already, expected inject() to be entered once"
            ) from error


def _check_source(rows: Array, source: Array, alignment: Any) -> None:
    """ValueError unless a fused layer's input and the source's states are of the alignment."""
    if rows.shape[:2] != alignment.fused.shape or rows.ndim != 3:
        raise ValueError(
            f"input {rows.shape}, expected {alignment.fused.shape} positions of the input tokens"
        )
    if source.ndim != 3 or source.shape[0] != rows.shape[0] or source.shape[2] != rows.shape[2]:
        raise ValueError(
            f"source states {source.shape}, expected [{rows.shape[0]}, source length, "
            f"{rows.shape[2]}]"
        )


def _check_targets(spec: AdapterSpec, paths: Sequence[str]) -> None:
    """ValueError for the first target that matches none of the dense layers at `paths`."""
    targets_lib.check(spec.targets, paths, "AdapterSpec.targets", "dense layers")
    if spec.fusion is not None:
        adapted = [path for path in paths if spec.matching(path)]
        targets_lib.check(spec.fusion.targets, adapted, "Fusion.targets", "adapted layers")


@dataclasses.dataclass(frozen=True)
class Match:
    """One adapted dense layer, or the copies of it that a scan stacks.

    Attributes:
      path: its module path.
      times: how many copies its kernel holds: the length of the scan, else 1.
      d_in, d_out: its width, dimensions flattened.
      positions: of a row of a batch, that its input has.
      parameters: how many parameters the adapters of all its copies have; columns beyond the rank
        of a value are not counted.
    """

    path: str
    times: int
    d_in: int
    d_out: int
    positions: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class MatchReport:
    """Which dense layers the targets matched, and which they left alone."""

    matched: tuple[Match, ...]
    unmatched: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(m.parameters for m in self.matched)

    def table(self, more: Mapping[str, Callable[[str], str]] | None = None) -> str:
        """The report as text, layers that differ by their number alone on one line.

        `more` are columns that a layer's path has besides: title -> what stands there.
        """
        more = more or {}
        groups: dict[tuple[str, ...], list[Match]] = {}
        for m in self.matched:
            others = [of(m.path) for of in more.values()]
            line = (without_numbers(m.path), f"{m.d_in}", f"{m.d_out}", *others)
            groups.setdefault(line, []).append(m)
        rows = [("module", "times", "d_in", "d_out", "parameters", *more)]
        for (path, d_in, d_out, *others), members in groups.items():
            times = sum(m.times for m in members)
            parameters = sum(m.parameters for m in members)
            rows.append((path, f"{times}", d_in, d_out, f"{parameters:,}", *others))
        times = sum(m.times for m in self.matched)
        rows.append(("all", f"{times}", "", "", f"{self.parameters:,}", *("" for _ in more)))
        left = list(dict.fromkeys(without_numbers(p) for p in self.unmatched))
        return f"{text_tables.plain(rows)}\nnot adapted: {', '.join(left) or 'no dense layer'}"

    def __str__(self) -> str:
        return self.table()


def _positions(call: DenseCall, x: Any) -> int:
    """How many positions of a row of the batch a layer's input has."""
    return math.prod(size for axis, size in enumerate(x.shape) if axis and axis not in call.axes)


def matches(
    spec: AdapterSpec, init_fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> MatchReport:
    """Reports what the targets match in a model, without computing anything.

    Args:
      spec: what is to be adapted; the values of its space must be known.
      init_fn: the `init` of a linen model (or a function that calls it), returning its variables.
      *args: the arguments of `init_fn`, arrays or jax.ShapeDtypeStructs.
      **kwargs: its keyword arguments, kept as they are.

    Raises:
      ValueError: when a target matches nothing, with the nearest paths.
    """
    with dense_inputs() as inputs:
        # A new function each time: a trace that jax has kept would not pass the interceptor.
        variables = jax.eval_shape(lambda *a: init_fn(*a, **kwargs), *args)
    calls = {call.path: (call, _positions(call, x)) for call, x in inputs}
    params = variables.get("params", variables)
    _check_targets(spec, tuple(calls))
    ranks = [rank for t in spec.space.types for rank in t.value_ranks]
    attends = spec.fusion is not None and spec.fusion.attends
    matched = []
    for call, positions in calls.values():
        if not spec.matching(call.path):
            continue
        layer = params
        for name in call.path.split("/"):
            layer = layer[name]
        (kernel,) = jax.tree.leaves(layer["kernel"])
        times = kernel.size // (call.d_in * call.d_out)
        own = 0  # of the attention of a fused layer
        if attends and spec.fuses(call.path):
            own = len(MATRICES) * sum(rank**2 for rank in ranks)
        matched.append(
            Match(
                path=call.path,
                times=times,
                d_in=call.d_in,
                d_out=call.d_out,
                positions=positions,
                parameters=times * (sum(ranks) * (call.d_in + call.d_out) + own),
            )
        )
    unmatched = tuple(p for p in calls if not spec.matching(p))
    return MatchReport(matched=tuple(matched), unmatched=unmatched)
