"""Values of adapters' features after training: added, removed, united and listed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from flix_jax.adapters import text_tables, tree, values
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.language_table import read_language_table
from flix_jax.experiments.starting_values import check_network
from flix_jax.interop import network, peft
from flix_jax.interop.flix_adapters import Adapters
from flix_jax.interop.leaves import Leaf
from flix_jax.models.config import T5Config

LANGUAGES = "configs/features/languages.tsv"
ZEROS, MEAN, COPY, FAMILY_MEAN, PEFT = INITS = ("zeros", "mean", "copy", "family-mean", "peft")
_ARGUMENT = {COPY: "a value", PEFT: "a folder"}  # what stands behind the colon, where it must


def add(
    adapters: Adapters,
    feature: str,
    *,
    init: str = ZEROS,
    rank: int | None = None,
    dropout: float | None = None,
    seed: int = 0,
    languages: str = LANGUAGES,
) -> tuple[Adapters, str]:
    """Adapters with one more value.

    Args:
      adapters: what there is.
      feature: ``language=rw``.
      init: what the value's update is: ``zeros``; ``copy:sw``, that of another value; ``mean`` or
        ``mean:sw,zu``, the best approximation of the mean of all or of some; ``family-mean``, of
        the languages of its family; ``peft:FOLDER``, a LoRA that PEFT has trained.
      rank: of its update; None is that of the type. A copy and a LoRA bring their own.
      dropout: its feature dropout; None is that of the type, or of what is copied.
      seed: of what is drawn.
      languages: the table that says which family a language has.

    Returns:
      The adapters, and a line that says what was done.

    Raises:
      ValueError: a feature that is there, another type, an unknown start, a value, family or LoRA
        that it cannot be made of, and a rank that has no effect.
    """
    of, value = _parse(feature, adapters.space)
    _check_name(of, value)
    if value in of.known_values:
        raise ValueError(f"{feature}: is there already, expected a new {of.name}")
    kind, colon, given = init.partition(":")
    if kind not in INITS:
        raise ValueError(f"unknown init {init!r}; {did_you_mean(kind, INITS)}")
    if kind in _ARGUMENT and not given:
        raise ValueError(f"init {init!r}: expected {kind}:{_ARGUMENT[kind].upper()}")
    if colon and kind in (ZEROS, FAMILY_MEAN):
        raise ValueError(f"init {init!r}: nothing stands behind {kind}")
    if rank is not None and kind in (COPY, PEFT):
        raise ValueError(f"rank {rank} has no effect on init {init!r}, which brings its own")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    _check_fusion(adapters, kind)
    banks = adapters.tree()
    start = values.fresh(banks, of, value, of.rank if rank is None else rank, seed)
    if kind == ZEROS:
        new, how = start, "as an update of zero"
    elif kind == COPY:
        new, how = values.rows(banks, of, given), f"as a copy of {given}"
        if dropout is None:
            dropout = of.value_dropouts[of.known_values.index(given)]
    elif kind == PEFT:
        new, how = _of_lora(adapters, banks, of, value, given, seed)
    else:
        named = tuple(filter(None, given.split(","))) if given else of.known_values
        if len(set(named)) != len(named):
            raise ValueError(f"init {init!r}: names a value more than once")
        if kind == FAMILY_MEAN:
            named = _family(of, value, languages)
        new, kept = values.mean(banks, of, named, start, adapters.alpha)
        how = f"as the mean of {', '.join(named)} (keeps {100 * kept:.0f} % of the norm)"
    space, banks = values.append(adapters.space, banks, of.name, value, new, dropout=dropout)
    own = space.type(of.name).value_ranks[-1]
    return _edited(adapters, space, banks), (
        f"{feature} added {how} at rank {own}, {_count(space, of.name)}"
    )


def _check_fusion(adapters: Adapters, kind: str = ZEROS) -> None:
    """ValueError for an edit of fused adapters that is not defined, or not written."""
    fusion = adapters.fusion
    if fusion is not None and fusion.attends:
        raise ValueError(
            f"adapters with the fusion {fusion.function!r} have matrices of their own for every "
            "value, which edits do not know"
        )
    if fusion is not None and fusion.source_width is not None:
        raise ValueError(
            "adapters that are given source states share a matrix, expected none edited"
        )
    if fusion is not None and kind not in (ZEROS, COPY):
        raise ValueError(
            f"init {kind!r}: an update with the fusion {fusion.function!r} is no product of two "
            f"matrices, expected {ZEROS!r} or {COPY!r}"
        )


def remove(adapters: Adapters, feature: str) -> tuple[Adapters, str]:
    """Adapters without one of their values, and a line that says so.

    Raises:
      ValueError: there is no such value, or it is the only one of its type.
    """
    _check_fusion(adapters)
    of, value = _parse(feature, adapters.space)
    space, banks = values.remove(adapters.space, adapters.tree(), of.name, value)
    return _edited(adapters, space, banks), f"{feature} removed, {_count(space, of.name)}"


def merge(parts: Sequence[tuple[str, Adapters]]) -> tuple[Adapters, str]:
    """The values of several adapters in one, and a line that counts them; see `values.merge`.

    Args:
      parts: adapters with their names, for messages.

    Raises:
      ValueError: fewer than two, or adapters of another network, base, vocabulary, targets, alpha
        or fusion; and what `values.merge` refuses.
    """
    if len(parts) < 2:
        raise ValueError(f"{len(parts)} adapters, expected two or more to unite")
    (first_name, first), *others = parts
    _check_fusion(first)
    for name, other in others:
        check_network(T5Config(**first.model), other.model, name)
        for field in ("base", "vocabulary", "targets", "alpha", "fusion"):
            one, two = getattr(first, field), getattr(other, field)
            if one != two:
                raise ValueError(f"{field} is {one!r} in {first_name} and {two!r} in {name}")
    space, banks = values.merge([values.Part(n, a.space, a.tree()) for n, a in parts])
    counts = ", ".join(_count(space, name) for name in space.names)
    return _edited(first, space, banks), f"{len(parts)} adapters united, {counts}"


def table(adapters: Adapters) -> str:
    """A line for every value: rank, feature dropout, the norm of its update, parameters."""
    banks = adapters.tree()
    norms = values.norms(adapters.space, banks, adapters.alpha)
    counts = tree.adapter_counts(banks, adapters.space)
    lines = [["type", "value", "rank", "dropout", "norm", "parameters"]]
    for of in adapters.space.types:
        for value, rank, dropout in zip(
            of.known_values, of.value_ranks, of.value_dropouts, strict=True
        ):
            norm, count = norms[of.name][value], counts[of.name][value]
            lines.append([of.name, value, str(rank), f"{dropout:g}", f"{norm:.4g}", f"{count:,}"])
    return text_tables.plain(lines)


def _check_name(of: FeatureType, value: str) -> None:
    """ValueError for a name that features on a command line would not be read as."""
    if "," in value or not value.isprintable():
        raise ValueError(f"{of.name}={value!r}: expected a name without commas and line breaks")
    head, colon, tail = value.rpartition(":")
    try:
        float(tail)
    except ValueError:
        return
    if colon and head in of.known_values:
        raise ValueError(f"{of.name}={value}: would be read as {of.name}={head} with a weight")


def _parse(feature: str, space: FeatureSpace) -> tuple[FeatureType, str]:
    name, equals, value = (part.strip() for part in feature.partition("="))
    if not equals or not name or not value:
        raise ValueError(f"feature {feature!r}: expected type=value, such as language=sw")
    return space.type(name), value


def _family(of: FeatureType, language: str, path: str) -> tuple[str, ...]:
    """The values that are languages of the same family as another."""
    if of.name != "language":
        raise ValueError(
            f"init {FAMILY_MEAN!r} is of languages, expected language=..., not {of.name}"
        )
    known = read_language_table(path)
    row = known.row(language)
    if row is None:
        raise ValueError(
            f"{path} has no row for {language!r}; {did_you_mean(language, known.rows)}"
        )
    if "family" not in row:
        raise ValueError(f"{path}: no column 'family'; {did_you_mean('family', row)}")
    families = {value: (known.row(value) or {}).get("family") for value in of.known_values}
    same = tuple(value for value, family in families.items() if family == row["family"])
    if not same:
        there = sorted({family for family in families.values() if family})
        raise ValueError(
            f"language={language}: none of {of.num_values} languages is of the family "
            f"{row['family']}; there is: {', '.join(there) or 'none'}"
        )
    return same


def _of_lora(
    adapters: Adapters,
    banks: Mapping[str, Any],
    of: FeatureType,
    value: str,
    folder: epath.PathLike,
    seed: int,
) -> tuple[values.Rows, str]:
    """A LoRA of PEFT's as a value; where it is narrower or has no layer, the update is zero."""
    config = T5Config(**adapters.model)
    updates = peft.read(folder, config)
    rank = max(update.a.shape[1] for update in updates.values())
    start = values.fresh(banks, of, value, rank, seed)
    # An axis before the others, as that of the values, for a scan stacks layers on axis 1.
    halves = {
        "/".join((*path, side)): Leaf.of(half[None])
        for path, pair in start.items()
        for side, half in zip("ab", pair, strict=True)
    }
    apart = {name: leaf.read().copy() for name, leaf in network.unscanned(halves).items()}
    layers = {name.rpartition("/")[0] for name in apart}
    for name in updates:
        if name not in layers:
            raise ValueError(
                f"{folder}: has an update of {name}, which the adapters do not adapt (targets "
                f"{', '.join(adapters.targets)})"
            )
    scale = 1.0 if adapters.alpha is None else adapters.alpha / rank
    for name, update in updates.items():
        width = update.a.shape[1]
        apart[f"{name}/a"][0, :, :width] = update.a
        apart[f"{name}/b"][0, :width] = update.b / np.float32(scale)
    stored = {name: Leaf.of(half, name) for name, half in apart.items()}
    joined = {name: leaf.read()[0] for name, leaf in network.scanned_as(stored, config).items()}
    new = {path: (joined["/".join((*path, "a"))], joined["/".join((*path, "b"))]) for path in start}
    without = len(layers) - len(updates)
    more = f" ({without} of {len(layers)} adapted layers are not in it)" if without else ""
    return new, f"as the LoRA of {folder}{more}"


def _count(space: FeatureSpace, name: str) -> str:
    return f"{space.type(name).num_values} values of {name}"


def _edited(adapters: Adapters, space: FeatureSpace, banks: Mapping[str, Any]) -> Adapters:
    leaves = {name: Leaf.of(bank, name) for name, bank in network.flat(banks).items()}
    return dataclasses.replace(adapters, banks=leaves, space=space)
