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
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from flix_jax.adapters import text_tables
from flix_jax.adapters.activation import ActiveFeatures
from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.modules import LowRankDelta
from flix_jax.adapters.suggest import did_you_mean

CHILD = "flix"
#: What an adapted layer's output is called, for rematerialisation that goes by names.
DENSE_OUTPUT = "dense_output"

_ATTENTION = r"(?:.*/)?[^/]*[aA]ttention[^/]*/(?:query|key|value|out)"
_MLP = r"(?:.*/)?[^/]*(?:mlp|MLP|Mlp)[^/]*/[^/]+"
# What the named targets mean, for the module names of T5X (and of flax's own attention).
NAMED_TARGETS: Mapping[str, str] = {
    "all": f"{_ATTENTION}|{_MLP}",
    "attention": _ATTENTION,
    "mlp": _MLP,
    "encoder": f"encoder/(?:{_ATTENTION}|{_MLP})",
    "decoder": f"decoder/(?:{_ATTENTION}|{_MLP})",
}


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

    Raises:
      ValueError: when a field is not as described above.
    """

    space: FeatureSpace
    targets: str | tuple[str, ...] = "all"
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)
        if not isinstance(self.space, FeatureSpace):
            raise ValueError(f"adapter: space is {self.space!r}, expected a FeatureSpace")
        if not targets:
            raise ValueError("adapter: targets is empty, expected at least one; 'all' is usual")
        for target in targets:
            _compile(target)
        if self.alpha is not None and not (
            isinstance(self.alpha, numbers.Real) and math.isfinite(self.alpha) and self.alpha > 0
        ):
            raise ValueError(f"adapter: alpha is {self.alpha!r}, expected None or a number > 0")
        if not isinstance(self.dropout, numbers.Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"adapter: dropout is {self.dropout!r}, expected a number in [0, 1)")

    def matching(self, path: str) -> tuple[str, ...]:
        """The targets that match a module path such as 'encoder/layers_0/mlp/wi_0'."""
        return tuple(t for t in self.targets if _compile(t).fullmatch(path))


def _compile(target: Any) -> re.Pattern[str]:
    if not isinstance(target, str) or not target:
        raise ValueError(f"adapter: target {target!r}, expected a name or a regular expression")
    try:
        return re.compile(NAMED_TARGETS.get(target, target))  # re keeps its own cache
    except re.error as error:
        raise ValueError(
            f"adapter: target {target!r} is not a regular expression: {error}"
        ) from error


@dataclasses.dataclass(frozen=True)
class _DenseCall:
    """One call of a dense layer, its dimensions flattened."""

    path: str
    axes: tuple[int, ...]  # the input's axes that are contracted, in order
    d_in: int
    d_out: int


def _dense_call(context: nn.module.InterceptorContext, x: Any) -> _DenseCall | None:
    """Describes the call when it is that of a dense layer that has made its kernel, else None.

    A dense layer is told by what it has, not by its class: `features`, perhaps `axis`, and a
    parameter `kernel` of as many elements as contracted inputs times features. That holds for
    nn.Dense, nn.DenseGeneral and T5X's own DenseGeneral, not for convolutions and embeddings.
    """
    module = context.module
    if context.method_name != "__call__" or not hasattr(module, "features"):
        return None
    if getattr(module, "batch_dims", ()) or hasattr(module, "kernel_size"):
        return None
    if not hasattr(x, "shape") or not module.has_variable("params", "kernel"):
        return None
    # A box of flax's is a tree of one leaf; unboxing it would ask for a sharding.
    (kernel,) = jax.tree.leaves(module.get_variable("params", "kernel"))
    try:
        features = tuple(int(f) for f in np.atleast_1d(module.features))
        axes = tuple(int(a) % x.ndim for a in np.atleast_1d(getattr(module, "axis", -1)))
    except (TypeError, ValueError):
        return None
    d_in, d_out = math.prod(x.shape[a] for a in axes), math.prod(features)
    if kernel.size != d_in * d_out:
        return None
    return _DenseCall("/".join(module.path), axes, d_in, d_out)


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


@contextlib.contextmanager
def inject(
    spec: AdapterSpec, active: ActiveFeatures, *, deterministic: bool = True
) -> Iterator[None]:
    """A context in which the targeted dense layers of any linen model add their update.

    Enter it inside the jitted function. Around an initialisation it makes the parameters, too.

    Args:
      spec: what is adapted.
      active: the features of the batch (`activate`).
      deterministic: False switches on the dropout of the adapters' input, where `spec` has one.

    Raises:
      ValueError: when a batch is not of `active`'s size, when a targeted layer has a child named
        `flix` already, and on leaving an initialisation in which a target matched nothing.
    """
    seen: dict[str, _DenseCall] = {}
    initialising = False

    def interceptor(next_fun, args, kwargs, context):
        nonlocal initialising
        y = next_fun(*args, **kwargs)
        x = _input(args, kwargs)
        call = _dense_call(context, x)
        if call is None:
            return y
        seen[call.path] = call
        initialising = initialising or context.module.is_initializing()
        if not spec.matching(call.path):
            return y
        update = _update(spec, active, call, context.module, x, y, deterministic)
        return checkpoint_name(y + update, DENSE_OUTPUT)

    with nn.intercept_methods(interceptor):
        yield
    if initialising:
        _check_targets(spec, tuple(seen))


def _update(spec, active, call: _DenseCall, module, x, y, deterministic: bool):
    if 0 in call.axes:
        raise ValueError(f"{call.path}: contracts the batch axis of {x.shape}, cannot be adapted")
    others = tuple(a for a in range(x.ndim) if a not in call.axes)
    rows = jnp.asarray(x).transpose(*others, *call.axes)
    rows = rows.reshape(*rows.shape[: len(others)], call.d_in).astype(y.dtype)
    if math.prod(rows.shape[:-1]) * call.d_out != y.size:
        raise ValueError(
            f"{call.path}: output {y.shape} for input {x.shape}, expected "
            f"{call.d_out} features for each position"
        )
    try:
        child = LowRankDelta(spec.space, spec.alpha, spec.dropout, name=CHILD, parent=module)
    except flax.errors.NameInUseError as error:
        raise ValueError(
            f"{call.path}: has a child {CHILD!r} already, expected inject() to be entered once"
        ) from error
    try:
        update = child(rows, call.d_out, active, deterministic=deterministic)
    except ValueError as error:
        raise ValueError(f"{call.path}: {error}") from error
    return update.reshape(y.shape)


def _check_targets(spec: AdapterSpec, paths: Sequence[str]) -> None:
    """ValueError for the first target that matches none of the dense layers at `paths`."""
    for target in spec.targets:
        if not any(_compile(target).fullmatch(p) for p in paths):
            raise ValueError(
                f"AdapterSpec.targets: {target!r} matches none of {len(paths)} dense layers; "
                + did_you_mean(target, (*paths, *NAMED_TARGETS) if paths else ())
            )


@dataclasses.dataclass(frozen=True)
class Match:
    """One adapted dense layer, or the copies of it that a scan stacks.

    Attributes:
      path: its module path.
      times: how many copies its kernel holds: the length of the scan, else 1.
      d_in, d_out: its width, dimensions flattened.
      parameters: how many parameters the adapters of all its copies have; columns beyond the rank
        of a value are not counted.
    """

    path: str
    times: int
    d_in: int
    d_out: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class MatchReport:
    """Which dense layers the targets matched, and which they left alone."""

    matched: tuple[Match, ...]
    unmatched: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(m.parameters for m in self.matched)

    def table(self) -> str:
        """The report as text, layers that differ by their number alone on one line."""
        groups: dict[tuple[str, int, int], list[Match]] = {}
        for m in self.matched:
            groups.setdefault((_without_numbers(m.path), m.d_in, m.d_out), []).append(m)
        rows = [("module", "times", "d_in", "d_out", "parameters")]
        for (path, d_in, d_out), members in groups.items():
            times = sum(m.times for m in members)
            parameters = sum(m.parameters for m in members)
            rows.append((path, f"{times}", f"{d_in}", f"{d_out}", f"{parameters:,}"))
        times = sum(m.times for m in self.matched)
        rows.append(("all", f"{times}", "", "", f"{self.parameters:,}"))
        left = list(dict.fromkeys(_without_numbers(p) for p in self.unmatched))
        return f"{text_tables.plain(rows)}\nnot adapted: {', '.join(left) or 'no dense layer'}"

    def __str__(self) -> str:
        return self.table()


def _without_numbers(path: str) -> str:
    """'encoder/layers_3/mlp/wi_0' -> 'encoder/layers_*/mlp/wi_0': the layer's own name stays."""
    *parents, name = path.split("/")
    return "/".join([re.sub(r"_\d+$", "_*", p) for p in parents] + [name])


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
    calls: dict[str, _DenseCall] = {}

    def record(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        call = _dense_call(context, _input(args, kwargs))
        if call is not None:
            calls[call.path] = call
        return y

    with nn.intercept_methods(record):
        # A new function each time: a trace that jax has kept would not pass the interceptor.
        variables = jax.eval_shape(lambda *a: init_fn(*a, **kwargs), *args)
    params = variables.get("params", variables)
    _check_targets(spec, tuple(calls))
    total_rank = sum(sum(t.value_ranks) for t in spec.space.types)
    matched = []
    for call in calls.values():
        if not spec.matching(call.path):
            continue
        layer = params
        for name in call.path.split("/"):
            layer = layer[name]
        (kernel,) = jax.tree.leaves(layer["kernel"])
        times = kernel.size // (call.d_in * call.d_out)
        matched.append(
            Match(
                path=call.path,
                times=times,
                d_in=call.d_in,
                d_out=call.d_out,
                parameters=times * total_rank * (call.d_in + call.d_out),
            )
        )
    unmatched = tuple(p for p in calls if not spec.matching(p))
    return MatchReport(matched=tuple(matched), unmatched=unmatched)
