"""Feature types and the feature space: names to ids and back, ranks and dropout rates.

A *feature* is one value of one annotation of a dataset: its task, its language, or anything
else that is annotated. Every feature owns a low-rank update, and an example adds up the
updates of the features it has (FLix, arXiv 2402.17934, Eq. 2). Its baselines are feature
spaces too:

    FLix              FeatureSpace((FeatureType("task"), FeatureType("language")))
    LoRA              FeatureSpace((FeatureType("shared", ("shared",), rank=8),))
    per-dataset LoRA  FeatureSpace((FeatureType("cell", rank=8),))

A type whose `values` are None takes them from the data: see `FeatureSpace.complete`.
"""

import contextlib
import dataclasses
import json
import numbers
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.core import FrozenDict
from jaxtyping import Float, Int

from flix_jax.adapters import plain_json
from flix_jax.adapters.ids import ABSENT
from flix_jax.adapters.suggest import did_you_mean

MOST_RANK = 2**16
MOST_SLOTS = 1024
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*")
_UNKNOWN = ("absent", "error")
_COMBINE = ("sum", "mean")


def first_values(values: Sequence[str], count: int) -> tuple[str, ...]:
    """The first `count` of some values, for sweeps over the number of a type's values.

    Raises:
      ValueError: fewer than `count` values, or `count` below 1.
    """
    if not 1 <= count <= len(values):
        raise ValueError(f"first_values.count={count}: expected 1 to {len(values)}, the values")
    return tuple(values[:count])


def _check_rank(rank: Any, place: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        raise ValueError(f"{place}: rank is {rank!r}, expected an integer of at least 1")
    if int(rank) > MOST_RANK:
        raise ValueError(f"{place}: rank is {rank!r}, expected at most {MOST_RANK:,}")


def _check_dropout(rate: Any, place: str) -> None:
    # No float(rate): a whole number may be too large for one.
    real = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
    if not real or not 0 <= rate < 1:  # type: ignore[operator]
        raise ValueError(f"{place}: dropout is {rate!r}, expected a number in [0, 1)")


@dataclasses.dataclass(frozen=True)
class FeatureType:
    """One kind of annotation (task, language, …) and the values it may take.

    Attributes:
      name: name of the annotation; also the name of the parameters, `<dense>/flix/<name>/{a,b}`.
      values: the values in the order of their ids; None until `FeatureSpace.complete` fills it.
      rank: rank of each value's update.
      dropout: probability with which the feature is switched off for an example in training.
      ranks: rank of single values, where it differs from `rank`.
      dropouts: dropout of single values, where it differs from `dropout`.
      unknown: what a value outside `values` means: 'absent' (the example lacks the feature) or
        'error'.
      slots: how many values one example may have at once (source and target language, say).
      combine: what an example of several values gets, the 'sum' of their updates or their 'mean'.

    Raises:
      ValueError: when a field is not as described above.
    """

    name: str
    values: Sequence[str] | None = None
    rank: int = 4
    dropout: float = 0.0
    ranks: Mapping[str, int] = FrozenDict()
    dropouts: Mapping[str, float] = FrozenDict()
    unknown: str = "absent"
    slots: int = 1
    combine: str = "sum"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"feature type: name is {self.name!r}, expected letters, digits, '_' or '-'"
            )
        place = f"feature type {self.name!r}"
        if isinstance(self.values, str | Mapping):
            kind = "string" if isinstance(self.values, str) else "mapping"
            raise ValueError(f"{place}: values is the {kind} {self.values!r}, expected a sequence")
        for field in ("ranks", "dropouts"):
            if not isinstance(getattr(self, field), Mapping):
                raise ValueError(
                    f"{place}: {field} is {getattr(self, field)!r}, expected a mapping from value"
                )
        for value, rank in self.ranks.items():
            _check_rank(rank, f"{place}, value {value!r}")
        for value, rate in self.dropouts.items():
            _check_dropout(rate, f"{place}, value {value!r}")
        # Frozen containers, so that a type can be hashed and be static under jit.
        if self.values is not None:
            object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "ranks", FrozenDict(self.ranks))
        object.__setattr__(self, "dropouts", FrozenDict(self.dropouts))
        self._check_values(place)
        _check_rank(self.rank, place)
        _check_dropout(self.dropout, place)
        if self.unknown not in _UNKNOWN:
            raise ValueError(
                f"{place}: unknown is {self.unknown!r}, expected 'absent' or 'error'; "
                + did_you_mean(str(self.unknown), _UNKNOWN)
            )
        if isinstance(self.slots, bool) or not isinstance(self.slots, int) or self.slots < 1:
            raise ValueError(f"{place}: slots is {self.slots!r}, expected an integer >= 1")
        if self.slots > MOST_SLOTS:
            raise ValueError(f"{place}: slots is {self.slots!r}, expected at most {MOST_SLOTS:,}")
        if self.combine not in _COMBINE:
            raise ValueError(
                f"{place}: combine is {self.combine!r}, expected 'sum' or 'mean'; "
                + did_you_mean(str(self.combine), _COMBINE)
            )

    def _check_values(self, place: str) -> None:
        if self.values is None:
            return
        if not self.values:
            raise ValueError(f"{place}: values is empty, expected at least one")
        for value in self.values:
            if not isinstance(value, str) or not value:
                raise ValueError(f"{place}: value {value!r}, expected a non-empty string")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{place}: value {value!r} holds half of a surrogate pair"
                ) from None
        counts = Counter(self.values)
        if len(counts) != len(self.values):
            twice = next(value for value, count in counts.items() if count > 1)
            raise ValueError(f"{place}: value {twice!r} is named more than once")
        for field in ("ranks", "dropouts"):
            for value in getattr(self, field):
                if value not in counts:
                    raise ValueError(
                        f"{place}: {field} names {value!r}, which is not one of its values; "
                        + did_you_mean(value, self.values)
                    )

    @property
    def known_values(self) -> tuple[str, ...]:
        """The values; ValueError while they are still to be taken from the data."""
        if self.values is None:
            raise ValueError(
                f"feature type {self.name!r}: its values are not known yet, expected "
                "FeatureSpace.complete(columns) to have filled them"
            )
        return tuple(self.values)

    @property
    def num_values(self) -> int:
        return len(self.known_values)

    @property
    def max_rank(self) -> int:
        """The width of the banks: the largest rank of any value."""
        return max(self.value_ranks)

    @property
    def value_ranks(self) -> tuple[int, ...]:
        """The rank of each value, in the order of the ids."""
        return tuple(int(self.ranks.get(v, self.rank)) for v in self.known_values)

    @property
    def value_dropouts(self) -> tuple[float, ...]:
        """The dropout rate of each value, in the order of the ids."""
        return tuple(float(self.dropouts.get(v, self.dropout)) for v in self.known_values)

    def scales(self, alpha: float | None = None) -> Float[np.ndarray, "values rank"]:
        """What the columns of each value's `a` are multiplied with: s_f, and 0 beyond its rank.

        Args:
          alpha: s_f = alpha / rank of the value; None means s_f = 1.
        """
        ranks = np.asarray(self.value_ranks)
        scale = np.ones(len(ranks)) if alpha is None else alpha / ranks
        inside = np.arange(self.max_rank)[None, :] < ranks[:, None]
        return scale[:, None] * inside

    def id_of(self, value: str) -> int:
        """The id of `value`, or ABSENT; ValueError where `unknown` is 'error'."""
        values = self.known_values
        if value in values:
            return values.index(value)
        if self.unknown == "error":
            raise ValueError(
                f"feature type {self.name!r}: unknown value {value!r}; "
                + did_you_mean(str(value), values)
            )
        return ABSENT


def _weighted(value: Any) -> tuple[tuple[Any, float], ...]:
    """(value, weight) of each value that an annotation names."""
    if value is None:
        return ()
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, Mapping):
        return tuple((name, check_weight(name, weight)) for name, weight in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple((one, 1.0) for one in value)
    return ((value, 1.0),)


def check_weight(name: Any, weight: Any) -> float:
    """The weight of a value; ValueError unless it is a number that float32 can hold."""
    if isinstance(weight, numbers.Real) and not isinstance(weight, bool):
        with contextlib.suppress(OverflowError):  # of integers
            if abs(float(weight)) <= float(np.finfo(np.float32).max):
                return float(weight)
    raise ValueError(f"weight {weight!r} of {name!r}: expected a finite number of float32")


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
    """The feature types of a run, in order. Hashable, so it may be static under jit.

    Each type owns `slots` columns of the ids, so that a batch carries `feature_ids [batch, K]`
    with K = `num_slots`, each id counting within its type and -1 where the example has none.

    Attributes:
      types: the types, in the order of their columns.
      rescale: divide the weight of a feature that was not dropped by 1 - dropout.
      keep_one: where dropout takes every feature of an example, give one of them back.

    Raises:
      ValueError: when there is no type, or two of one name.
    """

    types: Sequence[FeatureType]
    rescale: bool = False
    keep_one: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "types", tuple(self.types))
        if not self.types:
            raise ValueError("feature space: types is empty, expected at least one FeatureType")
        for t in self.types:
            if not isinstance(t, FeatureType):
                raise ValueError(f"feature space: {t!r} among its types, expected a FeatureType")
        names = [t.name for t in self.types]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ValueError(f"feature space: type {twice!r} is named more than once")
        for name in ("rescale", "keep_one"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"feature space: {name} is {getattr(self, name)!r}, expected True or False"
                )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.types)

    @property
    def num_slots(self) -> int:
        """K: how many ids an example carries."""
        return sum(t.slots for t in self.types)

    @property
    def num_features(self) -> int:
        """How many values there are, over all types."""
        return sum(t.num_values for t in self.types)

    def type(self, name: str) -> FeatureType:
        """The type called `name`; ValueError with the nearest name where there is none."""
        for t in self.types:
            if t.name == name:
                return t
        raise ValueError(f"feature space: no type {name!r}; " + did_you_mean(name, self.names))

    def slots(self, name: str | FeatureType) -> range:
        """The columns of `feature_ids` that belong to a type."""
        wanted = self.type(name if isinstance(name, str) else name.name).name
        start = 0
        for t in self.types:
            if t.name == wanted:
                return range(start, start + t.slots)
            start += t.slots
        raise AssertionError("unreachable: the type was found above")

    @property
    def slot_types(self) -> tuple[FeatureType, ...]:
        """The type of each slot."""
        return tuple(t for t in self.types for _ in range(t.slots))

    def encode(self, annotations: Mapping[str, Any]) -> Int[np.ndarray, " slots"]:
        """The ids of one example.

        Args:
          annotations: type name -> value, or a sequence of values for a type of several slots;
            a missing name or None is an absent feature. Other annotations are ignored.

        Returns:
          int32 [num_slots], -1 where the example has no (known) value.

        Raises:
          ValueError: for more values than slots, for an unknown value of a type that says so, and
            for weights, which are `encode_weighted`'s.
        """
        ids, weights = self.encode_weighted(annotations)
        if (weights != 1).any():
            raise ValueError(f"{dict(annotations)!r} has weights, expected features alone")
        return ids

    def encode_weighted(
        self, annotations: Mapping[str, Any]
    ) -> tuple[Int[np.ndarray, " slots"], Float[np.ndarray, " slots"]]:
        """Ids and weights of one example.

        Args:
          annotations: as for `encode`; values may also be given with weights, value -> weight:
            `{'task': 'ner', 'language': {'sw': 0.7, 'rw': 0.3}}`.

        Returns:
          int32 [num_slots], as of `encode`, and float32 [num_slots], 1 where nothing else is said.

        Raises:
          ValueError: as `encode`; for a weight that is no finite number.
        """
        ids = np.full((self.num_slots,), ABSENT, np.int32)
        weights = np.ones((self.num_slots,), np.float32)
        for t in self.types:
            values = _weighted(annotations.get(t.name))
            if len(values) > t.slots:
                raise ValueError(
                    f"feature type {t.name!r}: {len(values)} values "
                    f"{tuple(value for value, _ in values)!r}, expected at most {t.slots} "
                    "(its slots)"
                )
            for slot, (value, weight) in zip(self.slots(t), values, strict=False):
                ids[slot], weights[slot] = t.id_of(value), weight
        return ids, weights

    def room_for(self, examples: Iterable[Mapping[str, Any]]) -> "FeatureSpace":
        """The space with as many slots of each type as some example has values of it.

        The parameters do not depend on the slots: what was trained with one language in an example
        can be applied with two.

        Raises:
          ValueError: for an example of more values than `MOST_SLOTS`.
        """
        slots = {t.name: t.slots for t in self.types}
        for annotations in examples:
            for name in slots:
                slots[name] = max(slots[name], len(_weighted(annotations.get(name))))
        types = [dataclasses.replace(t, slots=slots[t.name]) for t in self.types]
        return dataclasses.replace(self, types=tuple(types))

    def unknown_types(self, annotations: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the types for which the annotations give a value that is not known."""
        return tuple(
            t.name
            for t in self.types
            if any(v not in t.known_values for v, _ in _weighted(annotations.get(t.name)))
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """The inverse of `encode`: type name -> value, None where absent.

        A type of several slots gives the tuple of the values it has.
        """
        ids = np.asarray(ids)
        if ids.shape != (self.num_slots,):
            raise ValueError(f"feature ids have shape {ids.shape}, expected ({self.num_slots},)")
        self.validate_ids(ids[None])
        decoded: dict[str, Any] = {}
        for t in self.types:
            present = tuple(t.known_values[ids[s]] for s in self.slots(t) if ids[s] != ABSENT)
            decoded[t.name] = present if t.slots > 1 else (present[0] if present else None)
        return decoded

    def complete(self, columns: Mapping[str, Sequence[str]]) -> "FeatureSpace":
        """Fills the types whose values are still open from columns of annotations.

        Args:
          columns: annotation name -> the values it takes in the training data.

        Returns:
          A space in which every type has values: sorted and unique where they came from a column.

        Raises:
          ValueError: when an open type has no column, or an empty one.
        """
        types = []
        for t in self.types:
            if t.values is None:
                if t.name not in columns:
                    raise ValueError(
                        f"feature type {t.name!r}: no values given and no annotation of that "
                        "name in the data; " + did_you_mean(t.name, columns)
                    )
                t = dataclasses.replace(t, values=tuple(sorted(set(columns[t.name]))))
            types.append(t)
        return dataclasses.replace(self, types=tuple(types))

    def validate_ids(self, ids: np.ndarray) -> None:
        """Checks the ids of a batch, integers [..., num_slots], on the host.

        Raises:
          ValueError: naming row, slot, value and bound of the first id that is out of range, or
            the shape or dtype where that is wrong.
        """
        ids = np.asarray(ids)
        if ids.ndim < 1 or ids.shape[-1] != self.num_slots:
            raise ValueError(
                f"feature_ids have shape {ids.shape}, expected [..., {self.num_slots}] "
                f"(slots of {', '.join(self.names)})"
            )
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"feature_ids have dtype {ids.dtype}, expected integers")
        bounds = np.asarray([t.num_values for t in self.slot_types])
        wrong = (ids < ABSENT) | (ids >= bounds)
        if wrong.any():
            *row, slot = (int(i) for i in np.argwhere(wrong)[0])
            row_name = row[0] if len(row) == 1 else tuple(row)
            raise ValueError(
                f"feature_ids, row {row_name}, slot {slot} ({self.slot_types[slot].name}): id "
                f"{int(ids[(*row, slot)])}, expected -1 (absent) or 0 to {bounds[slot] - 1}"
            )

    def to_json(self) -> str:
        """The space as json, as it is saved with every checkpoint."""
        types = []
        for t in self.types:
            fields = {f.name: getattr(t, f.name) for f in dataclasses.fields(t)}
            fields["values"] = None if t.values is None else list(t.values)
            fields["ranks"], fields["dropouts"] = dict(t.ranks), dict(t.dropouts)
            if t.combine == "sum":  # checkpoints are told apart by this text, and some are older
                del fields["combine"]
            types.append(fields)
        whole = {"types": types, "rescale": self.rescale, "keep_one": self.keep_one}
        return json.dumps(whole, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "FeatureSpace":
        """Reads what `to_json` wrote; ValueError for anything else."""
        try:
            whole = plain_json.parse_object(text)
        except ValueError as error:
            raise ValueError(f"feature space: not the json of one: {error}") from None
        try:
            _check_fields(cls, whole)
            for record in whole["types"]:
                _check_fields(FeatureType, record)
            types = tuple(FeatureType(**t) for t in whole.pop("types"))
            return cls(types=types, **whole)
        except KeyError as error:
            raise ValueError(f"feature space: not the json of one: no {error}") from error
        except TypeError as error:
            raise ValueError(f"feature space: not the json of one: {error}") from error

    def difference(self, other: "FeatureSpace") -> str | None:
        """The first difference from `other` on one line, None where they are equal."""
        if self.names != other.names:
            return f"feature types are {list(self.names)} here and {list(other.names)} there"
        for mine, theirs in zip(self.types, other.types, strict=True):
            if mine.values != theirs.values:
                return f"feature type {mine.name!r}: " + _values_difference(
                    mine.values, theirs.values
                )
            for field in dataclasses.fields(FeatureType):
                here, there = getattr(mine, field.name), getattr(theirs, field.name)
                if here != there:
                    here, there = (dict(v) if isinstance(v, Mapping) else v for v in (here, there))
                    return (
                        f"feature type {mine.name!r}: {field.name} is {here!r} here and "
                        f"{there!r} there"
                    )
        for option in ("rescale", "keep_one"):
            if getattr(self, option) != getattr(other, option):
                return (
                    f"{option} is {getattr(self, option)} here and {getattr(other, option)} there"
                )
        return None


def _check_fields(of: Any, record: Any) -> None:
    """TypeError for what is no object of a dataclass's fields."""
    known = [field.name for field in dataclasses.fields(of)]
    for name in record.keys() if isinstance(record, dict) else ("",):
        if name not in known:
            got = f"has {name!r}; {did_you_mean(name, known)}" if name else "an object is expected"
            raise TypeError(f"{of.__name__} {got}")


def _values_difference(mine: Sequence[str] | None, theirs: Sequence[str] | None) -> str:
    if mine is None or theirs is None:
        return "its values are known on one side only"
    for here, there in zip(mine, theirs, strict=False):
        if here != there:
            return f"id {list(mine).index(here)} is {here!r} here and {there!r} there"
    return f"{len(mine)} values here and {len(theirs)} there"
