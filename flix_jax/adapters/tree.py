"""Parameter trees: split adapters from base and join them, count, fold, logical axes.

A tree is nested mappings; a leaf is an array, a jax.ShapeDtypeStruct or a box of flax's around one.

    {"mlp": {"wi": {"kernel": W, "flix": {"task": {"a": A, "b": B}}}}}
        split_adapters ->  {"mlp": {"wi": {"kernel": W}}},
                           {"mlp": {"wi": {"flix": {"task": {"a": A, "b": B}}}}}
        join           ->  the first again
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.fusion import MATRICES
from flix_jax.adapters.ids import ABSENT
from flix_jax.adapters.injection import CHILD, AdapterSpec
from flix_jax.adapters.suggest import did_you_mean

Tree = Mapping[str, Any]
Path = tuple[str, ...]


def _unbox(leaf: Any) -> Any:
    """The array in flax's box around it. Unlike flax's own `unbox`, asks for no sharding."""
    return jax.tree.leaves(leaf)[0] if isinstance(leaf, nn.meta.AxisMetadata) else leaf


def named_leaves(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of every leaf; `from_named` makes the tree again."""
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from named_leaves(child, (*path, name))
        else:
            yield (*path, name), child


def leaves_by_name(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """(name, leaf) of every leaf of any tree, a name as `encoder/0/kernel`, for what is told."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    ]


def from_named(leaves: Iterator[tuple[Path, Any]] | Sequence[tuple[Path, Any]]) -> dict[str, Any]:
    """The tree of leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def _split(tree: Tree, first: Callable[[Path], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    leaves = [(first(path), path, leaf) for path, leaf in named_leaves(tree)]
    return tuple(  # type: ignore[return-value]
        from_named([(path, leaf) for chosen, path, leaf in leaves if chosen is side])
        for side in (True, False)
    )


def split_adapters(params: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits parameters into (base, adapters); either may be empty."""
    return _split(params, lambda path: CHILD not in path)


def split_by_pattern(
    params: Tree, patterns: str | Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits parameters into (trained, frozen): BitFit-like masks, full fine-tuning ('.*').

    Args:
      params: the tree.
      patterns: regular expressions; a parameter whose whole path, such as
        'encoder/layers_0/mlp/wi_0/kernel', matches any of them is trained.

    Raises:
      ValueError: when a pattern is malformed or matches nothing, with the nearest paths.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    names = ["/".join(path) for path, _ in named_leaves(params)]
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
        if not any(compiled[-1].fullmatch(name) for name in names):
            raise ValueError(
                f"pattern {pattern!r} matches none of {len(names)} parameters; "
                + did_you_mean(pattern, names)
            )
    return _split(params, lambda path: any(c.fullmatch("/".join(path)) for c in compiled))


def join(first: Tree, second: Tree) -> dict[str, Any]:
    """Joins two trees that have no parameter in common; ValueError where they have."""
    joined: dict[str, Any] = dict(first)
    for name, child in second.items():
        if name not in joined:
            joined[name] = child
        elif isinstance(child, Mapping) and isinstance(joined[name], Mapping):
            try:
                joined[name] = join(joined[name], child)
            except ValueError as error:
                raise ValueError(f"{name}/{error}") from None
        else:
            raise ValueError(f"{name}: a parameter of both trees, expected it in one")
    return joined


def count_parameters(tree: Any) -> int:
    """The number of elements of all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def is_shared(path: Path) -> bool:
    """Whether a parameter of the adapters is none of a layer's and of no feature: PROJECTION."""
    return path[0] == CHILD


def layer_of(path: Path) -> str:
    """The path of the layer that a parameter of the adapters is of: 'encoder/layers_0/mlp/wi_0'."""
    return "/".join(path[: path.index(CHILD)])


def adapter_counts(adapters: Tree, space: FeatureSpace) -> dict[str, dict[str, int]]:
    """How many parameters each feature owns: type -> value -> count.

    The columns beyond the rank of a value are not counted: they are zero and stay so. What belongs
    to no feature is not, either.

    Raises:
      ValueError: when a bank is not of a type of `space`, or has not its values and rank.
    """
    counts = {t.name: dict.fromkeys(t.known_values, 0) for t in space.types}
    for path, leaf in named_leaves(adapters):
        if CHILD not in path or is_shared(path):
            continue
        t = space.type(path[-2])
        shape = _unbox(leaf).shape
        power = 2 if path[-1] in MATRICES else 1  # of the rank, in the size of a value's matrix
        per_rank, rest = divmod(math.prod(shape), t.num_values * t.max_rank**power)
        if rest:
            raise ValueError(
                f"{'/'.join(path)}: shape {tuple(shape)}, expected {t.num_values} values of "
                f"rank {t.max_rank}"
            )
        for value, rank in zip(t.known_values, t.value_ranks, strict=True):
            counts[t.name][value] += per_rank * rank**power
    return counts


def _dense_banks(adapters: Tree) -> dict[Path, dict[str, dict[str, Any]]]:
    """Path of every adapted dense layer -> type -> {'a': …, 'b': …}."""
    banks: dict[Path, dict[str, dict[str, Any]]] = {}
    for path, leaf in named_leaves(adapters):
        if CHILD in path and not is_shared(path):
            at = path.index(CHILD)
            banks.setdefault(path[:at], {}).setdefault(path[at + 1], {})[path[-1]] = _unbox(leaf)
    return banks


def fold(
    base: Tree,
    adapters: Tree,
    spec: AdapterSpec,
    features: Mapping[str, Any],
    *,
    layers_axis: int = 1,
) -> dict[str, Any]:
    """Folds the updates of one set of features into the base: kernel + Σ s_f A_f B_f.

    Of a type whose values combine by their 'mean', that of the values given.

    The result is a base that computes, without adapters, what the adapted model computes for
    examples of these features.

    Args:
      base, adapters: what `split_adapters` gives.
      spec: what the adapters were made with (space, alpha).
      features: annotations: {'task': 'ner', 'language': 'sw'}, or with weights, {'language':
        {'sw': 0.7, 'rw': 0.3}}; of a type there may be more values than it has slots.
      layers_axis: the axis on which a scan has stacked the parameters (1 in T5X).

    Returns:
      The base parameters, the adapted kernels replaced, each in its own dtype.

    Raises:
      ValueError: when no feature is known, an adapter's layer is missing in the base or has another
        shape, or adapters read a source, for which there is no place in a base.
    """
    kernels = {path[:-1]: leaf for path, leaf in named_leaves(base) if path[-1] == "kernel"}
    folded = {}
    for path, (first, second) in updates(adapters, spec, features, layers_axis=layers_axis).items():
        if path not in kernels:
            raise ValueError(
                f"fold: {'/'.join(path)} is adapted but has no kernel in the base; "
                + did_you_mean("/".join(path), ["/".join(p) for p in kernels])
            )
        kernel = kernels[path]
        try:
            value = _folded_kernel(_unbox(kernel), first, second, layers_axis)
        except ValueError as error:
            raise ValueError(f"fold: {'/'.join(path)}: {error}") from error
        boxed = isinstance(kernel, nn.meta.AxisMetadata)
        folded[(*path, "kernel")] = kernel.replace_boxed(value) if boxed else value
    return from_named([(path, folded.get(path, leaf)) for path, leaf in named_leaves(base)])


def updates(
    adapters: Tree, spec: AdapterSpec, features: Mapping[str, Any], *, layers_axis: int = 1
) -> dict[Path, tuple[Any, Any]]:
    """The update of one set of features as one product per adapted layer: Σ s_f A_f B_f = A B.

    Args:
      adapters, spec, features, layers_axis: as in `fold`.

    Returns:
      {path of the dense layer: (A [in, Σ r], B [Σ r, out])}, both float32 or wider, scales in A;
      of scanned layers with the stack before these axes.

    Raises:
      ValueError: when no feature is known, a bank is of another shape than its type says, or some
        are fused.
    """
    check_foldable(spec)
    spec = dataclasses.replace(spec, space=spec.space.room_for([features]))
    ids, weights = spec.space.encode_weighted(features)
    if (ids == ABSENT).all():
        raise ValueError(
            f"fold: none of {dict(features)!r} is a known feature; types are "
            + ", ".join(repr(n) for n in spec.space.names)
        )
    found = {}
    for path, banks in _dense_banks(adapters).items():
        try:
            found[path] = _product(banks, spec, ids, weights, layers_axis)
        except ValueError as error:
            raise ValueError(f"fold: {'/'.join(path)}: {error}") from error
    return found


def check_foldable(spec: AdapterSpec) -> None:
    """ValueError where an update is no product of two matrices, since it reads a source."""
    if spec.fusion is not None:
        raise ValueError(
            f"adapters with a fusion ({spec.fusion.function}) read a source text beside the input, "
            "so no base holds them: keep them as adapters (flix export --format=flix, flix infer)"
        )


def _product(
    banks, spec: AdapterSpec, ids: np.ndarray, weights: np.ndarray, layers_axis: int
) -> tuple[Any, Any]:
    firsts, seconds = [], []
    for t in spec.space.types:
        a, b = banks[t.name]["a"], banks[t.name]["b"]
        if a.ndim == 4:  # stacked by a scan: the stack goes first
            a, b = jnp.moveaxis(a, layers_axis, 0), jnp.moveaxis(b, layers_axis, 0)
        elif a.ndim != 3:
            raise ValueError(f"bank {t.name!r} has {a.ndim} axes, expected 3, or 4 when scanned")
        if a.shape[-3] != t.num_values:
            raise ValueError(
                f"bank {t.name!r} has {a.shape[-3]} values, expected {t.num_values} "
                f"(layers_axis is {layers_axis})"
            )
        scales = t.scales(spec.alpha)
        slots = spec.space.slots(t)
        if t.combine == "mean":
            scales = scales / max(1, int((ids[slots.start : slots.stop] != ABSENT).sum()))
        for slot in slots:
            value = ids[slot]
            if value != ABSENT:
                rank = t.value_ranks[value]
                wide = jnp.promote_types(a.dtype, jnp.float32)
                scale = jnp.asarray(weights[slot] * scales[value, :rank], wide)
                firsts.append(a[..., value, :, :rank].astype(wide) * scale)
                seconds.append(b[..., value, :rank, :].astype(wide))
    return jnp.concatenate(firsts, axis=-1), jnp.concatenate(seconds, axis=-2)


def _folded_kernel(kernel, first, second, layers_axis: int):
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"kernel is {kernel.dtype}, expected floating point: dequantise it first")
    update = jnp.matmul(first, second, precision="highest")
    stacked = update.ndim == 3
    moved = jnp.moveaxis(kernel, layers_axis, 0) if stacked else kernel
    if moved.size != update.size or (stacked and moved.shape[0] != update.shape[0]):
        raise ValueError(f"kernel {kernel.shape} does not take an update of {update.shape[-2:]}")
    total = (moved + update.reshape(moved.shape)).astype(kernel.dtype)
    return jnp.moveaxis(total, 0, layers_axis) if stacked else total


def adapter_logical_axes(
    adapters: Tree, base_axes: Tree, *, layers: str = "layers"
) -> dict[str, Any]:
    """Names the axes of the banks after those of the kernels they stand beside.

    The banks carry no axis names themselves: a model that others scan without naming its axes
    would break on them.

    Args:
      adapters: the adapters; arrays or shapes.
      base_axes: the base's tree with the logical axes of each parameter as leaf, a tuple or a
        PartitionSpec: what `nn.get_partition_spec` gives. None is a parameter without names.
      layers: the name of the axis on which a scan has stacked the parameters.

    Returns:
      The adapters' tree with tuples as leaves: a ('features', in axis, 'rank'), b ('features',
      'rank', out axis) and the matrices of an attention ('features', 'rank', None), with `layers`
      where the kernel has it. A kernel of more than two dimensions gives None for in and out axis:
      its axes do not say where its inputs end.

    Raises:
      ValueError: when an adapter's layer has no kernel in `base_axes`.
    """
    kernels = {p[:-1]: leaf for p, leaf in named_leaves(base_axes) if p[-1] == "kernel"}
    named: list[tuple[Path, tuple[str | None, ...]]] = []
    for path, leaf in named_leaves(adapters):
        if is_shared(path):
            named.append((path, (None, "embed")))
            continue
        dense = path[: path.index(CHILD)]
        if dense not in kernels:
            raise ValueError(
                f"{'/'.join(dense)}: adapted, but its kernel has no entry among the base's axes"
            )
        kernel = tuple(kernels[dense] or ())
        plain = tuple(name for name in kernel if name != layers)
        d_in, d_out = plain if len(plain) == 2 else (None, None)
        axes: tuple[str | None, ...] = ("features", "rank", d_out)
        if path[-1] != "b":
            axes = ("features", d_in, "rank") if path[-1] == "a" else ("features", "rank", None)
        if len(_unbox(leaf).shape) == 4:
            at = kernel.index(layers) if layers in kernel else 1
            axes = (*axes[:at], layers, *axes[at:])
        named.append((path, axes))
    return from_named(named)
