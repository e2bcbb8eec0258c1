"""One step looked at from within: what every module makes, and every parameter's gradient.

The numbers go the way of what layers record for a source text (`adapters.source`): a collection of
variables, which a scan over layers stacks. So they are made by the compiled network, on any mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flix_jax.adapters import text_tables, tree
from flix_jax.adapters.injection import CHILD, LAYER_STATES
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.training.step import Batch, TrainState, in_parts, randomness

_WATCHED = "watched"
_METHODS = ("__call__", "attend")


class Output(NamedTuple):
    """What a module has made.

    Attributes:
      path: of the module; of a layer that is scanned with its number in brackets.
      largest: the largest absolute value that is finite.
      finite: whether all of it is.
      inputs_finite: whether all that the module was called with is.
    """

    path: str
    largest: float
    finite: bool
    inputs_finite: bool


class Gradient(NamedTuple):
    """The gradient of a parameter: as `Output`, of the sum over the batch's target tokens."""

    path: str
    largest: float
    finite: bool


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was seen of a step.

    Attributes:
      outputs: of the modules, in the order in which they were done.
      gradients: of what is trained, in the order in which the backward pass comes to them.
    """

    outputs: tuple[Output, ...]
    gradients: tuple[Gradient, ...]

    @property
    def first(self) -> str | None:
        """Where the step stops being finite, in half a line; None if it does not.

        The first module whose output is not finite while its inputs are, or else the first
        parameter whose gradient is not.
        """
        for output in self.outputs:
            if not output.finite and output.inputs_finite:
                return f"the output of {output.path}, whose inputs are finite"
        for gradient in self.gradients:
            if not gradient.finite:
                return f"the gradient of {gradient.path}, all outputs being finite"
        return None

    def table(self) -> str:
        """A line for every module and every gradient."""
        rows = [["output of", "largest", ""]]
        rows += [
            [o.path, f"{o.largest:.4g}", _told(o.finite, o.inputs_finite)] for o in self.outputs
        ]
        more = [["gradient of", "largest", ""]]
        more += [[g.path, f"{g.largest:.4g}", _told(g.finite)] for g in self.gradients]
        return f"{text_tables.plain(rows)}\n\n{text_tables.plain(more)}"


def _told(finite: bool, inputs_finite: bool = True) -> str:
    if finite:
        return ""
    return "NOT FINITE" if inputs_finite else "not finite, as its inputs"


def watch(
    model: EncoderDecoder,
    state: TrainState,
    frozen: Any,
    batch: Batch,
    seed: int,
    *,
    microbatches: int = 1,
    rows_together: int = 1,
    in_use: Callable[[Any], Any] = lambda trained: trained,
    tables: Callable[[Any, Batch], tuple[Any, Any]] = lambda trained, batch: (trained, {}),
) -> Findings:
    """Makes the forward and the backward pass of a training step, and looks at everything.

    Args:
      model: whose layers are scanned only where the scan carries `LAYER_STATES`.
      state: before the step.
      frozen: the parameters that are not trained.
      batch: the global batch.
      seed, microbatches, rows_together, in_use, tables: as in `train_step`.
    """
    order: list[str] = []
    watched = _Watched(
        **{field.name: getattr(model, field.name) for field in dataclasses.fields(EncoderDecoder)}
    )

    @jax.jit
    def program(trained: Any, frozen: Any, part: Batch, rng: jax.Array) -> tuple[Any, Any]:
        def total(trained: Any) -> tuple[jax.Array, Any]:
            used, copies = tables(trained, part)
            params = tree.join(tree.join(frozen, copies), used)
            with _watching(order):
                loss, _ = watched.loss(params, part, rng=rng)
            return loss, watched.seen.pop()

        gradients, seen = jax.grad(total, has_aux=True)(in_use(trained))
        return seen, jax.tree.map(lambda x: _summary([x]), gradients)

    rng = randomness(seed, state.step)
    parts = [batch]
    if microbatches > 1:
        cut = jax.jit(in_parts, static_argnums=(1, 2))
        stacked = cut(batch, microbatches, rows_together)
        parts = [jax.tree.map(lambda x: x[i], stacked) for i in range(microbatches)]  # noqa: B023
    found = [jax.device_get(program(state.trained, frozen, part, rng)) for part in parts]
    seen, gradients = (jax.tree.map(_together, *of) for of in zip(*found, strict=True))
    order = list(dict.fromkeys(order))
    return Findings(tuple(_outputs(seen, order)), tuple(_gradients(gradients, order)))


@dataclasses.dataclass(frozen=True)
class _Watched(EncoderDecoder):
    """A model of which the recorded variables of every call are in `seen`."""

    seen: list[Any] = dataclasses.field(default_factory=list, compare=False)

    def _apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        result, made = super()._apply(variables, *args, mutable=[LAYER_STATES], **kwargs)
        self.seen.append(_of_modules(made[LAYER_STATES]))
        return result


@contextlib.contextmanager
def _watching(order: list[str]) -> Iterator[None]:
    """While it is open, modules record what they are given and what they make."""

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name not in _METHODS or not module.path or isinstance(module, nn.Dropout):
            return y
        if CHILD in module.path[:-1]:  # a bank, with the rows of features that the batch has not
            return y
        made, given = _numbers(y), _numbers((args, kwargs))
        if made:
            finite = _summary(given)[1:] if given else jnp.ones(1)
            module.sow(LAYER_STATES, _WATCHED, jnp.concatenate([_summary(made), finite]))
            order.append("/".join(module.path))
        return y

    with nn.intercept_methods(interceptor):
        yield


def _numbers(values: Any) -> list[Any]:
    return [
        leaf
        for leaf in jax.tree.leaves(values)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size
    ]


def _summary(leaves: list[Any]) -> jax.Array:
    """float32 [2]: the largest absolute value that is finite, and 1 where all are."""
    leaves = [jax.lax.stop_gradient(leaf).astype(jnp.float32) for leaf in leaves]
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]).all()
    largest = [jnp.max(jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), 0.0)) for leaf in leaves]
    return jnp.stack([jnp.stack(largest).max(), finite.astype(jnp.float32)])


def _together(*parts: np.ndarray) -> np.ndarray:
    """The summary of several microbatches."""
    stacked = np.stack(parts)
    largest, others = stacked[..., :1].max(axis=0), stacked[..., 1:].min(axis=0)
    return np.concatenate([largest, others], axis=-1)


def _of_modules(states: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Path of a module -> what it has recorded, call by call."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, value in states.items():
        if name == _WATCHED:
            found[""] = value
        elif isinstance(value, Mapping):
            for path, calls in _of_modules(value).items():
                found[f"{name}/{path}".rstrip("/")] = calls
    return found


def _outputs(seen: Mapping[str, tuple[np.ndarray, ...]], order: list[str]) -> Iterator[Output]:
    """In the order in which modules were done; scanned ones layer by layer."""
    calls = [(path, call) for path in order for call in seen.get(path, ())]
    for layers, group in itertools.groupby(calls, lambda item: item[1].ndim > 1):
        items = list(group)
        if not layers:
            yield from (_output(path, call) for path, call in items)
            continue
        for layer in range(max(len(call) for _, call in items)):
            for path, call in items:
                yield _output(f"{path}[{layer}]", call[layer])


def _output(path: str, call: np.ndarray) -> Output:
    return Output(path, float(call[0]), bool(call[1]), bool(call[2]))


def _gradients(gradients: Any, order: list[str]) -> Iterator[Gradient]:
    places = {path: place for place, path in enumerate(order)}
    named = [("/".join(path), leaf) for path, leaf in tree.named_leaves(gradients)]

    def place(path: str) -> int:
        while path and path not in places:
            path = path.rpartition("/")[0]
        return places.get(path, -1)

    for path, leaf in sorted(named, key=lambda item: -place(item[0])):
        yield Gradient(path, float(leaf[0]), bool(leaf[1]))
