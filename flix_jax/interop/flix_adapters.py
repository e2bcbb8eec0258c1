"""Adapters alone, as one can hand them on: `adapters.json` and `adapters.safetensors`.

The first says what they are (features with their ranks, alpha, targets) and what they belong to
(the network, its parameters by digest, the vocabulary); the second holds the banks by their paths,
`encoder/layers_0/attention/query/flix/task/a` [values, in, rank].
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from flix_jax.adapters import plain_json, tree
from flix_jax.adapters import targets as targets_lib
from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.fusion import Fusion
from flix_jax.adapters.injection import CHILD
from flix_jax.data import bounded
from flix_jax.interop import huggingface, network
from flix_jax.interop.leaves import Leaf
from flix_jax.models.config import T5Config

RECORD, STEM = "adapters.json", "adapters"
VERSION = 1
_FIELDS: Mapping[str, tuple[type, ...]] = {
    "space": (dict,),
    "alpha": (float, int, type(None)),
    "targets": (list,),
    "model": (dict,),
    "base": (str,),
    "vocabulary": (str,),
    "step": (int,),
}
_JSON = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
_JSON[type(None)] = "null"


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters and what they say of themselves.

    Attributes:
      banks: by path, read when they are needed.
      space: the features.
      alpha: of the scales, alpha / rank; None is 1.
      targets: patterns of the adapted layers, as of AdapterSpec.
      model: the fields of the network's T5Config.
      base: digest of the parameters that they were trained beside.
      vocabulary: digest of the vocabulary.
      step: of the training that made them.
      fusion: of adapters that read a source, as of AdapterSpec.
    """

    banks: Mapping[str, Leaf]
    space: FeatureSpace
    alpha: float | None
    targets: tuple[str, ...]
    model: Mapping[str, Any]
    base: str
    vocabulary: str
    step: int
    fusion: Fusion | None = None

    def tree(self) -> dict[str, Any]:
        """The banks as a tree of NumPy arrays."""
        return network.nested({name: leaf.read() for name, leaf in self.banks.items()})

    def write(self, folder: epath.PathLike) -> None:
        """Makes the folder; adapters that are there are replaced."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "format": "flix_jax adapters",
            "version": VERSION,
            "space": json.loads(self.space.to_json()),
            "alpha": self.alpha,
            "targets": list(self.targets),
            "model": dict(self.model),
            "base": self.base,
            "vocabulary": self.vocabulary,
            "step": self.step,
        }
        if self.fusion is not None:
            record["fusion"] = dataclasses.asdict(self.fusion)
        arrays = {name: leaf.read() for name, leaf in self.banks.items()}
        huggingface.save_weights(arrays, folder / f"{STEM}.safetensors")
        (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read(folder: epath.PathLike) -> Adapters:
    """The adapters of a folder.

    Raises:
      ValueError: there are none, of another version, or banks of another shape than is said.
    """
    path = epath.Path(folder) / RECORD
    if not path.exists():
        raise ValueError(f"{folder}: no {RECORD}, expected a folder of flix export --format=flix")
    record = bounded.read_object(path)
    if record.get("version") != VERSION:
        raise ValueError(f"{path}: version {record.get('version')!r}, expected {VERSION}")
    for name, kinds in _FIELDS.items():
        if name not in record or type(record[name]) not in kinds:
            got = plain_json.shorten(record[name]) if name in record else "nothing"
            expected = " or ".join(_JSON[kind] for kind in kinds)
            raise ValueError(f"{path}: {name} is {got}, expected {expected}")
    alpha, targets = record["alpha"], record["targets"]
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ValueError(f"{path}: alpha is {alpha!r}, expected a positive number")
    for name in record["model"]:
        if name not in {field.name for field in dataclasses.fields(T5Config)}:
            raise ValueError(f"{path}: model has {name!r}, which T5Config has not")
    network.stated_config(record["model"], str(path))
    try:
        targets_lib.as_tuple(targets, "adapters")
        space = FeatureSpace.from_json(json.dumps(record["space"]))
        for t in space.types:
            _ = t.known_values
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    banks = huggingface.weights(epath.Path(folder), STEM)
    for name, leaf in banks.items():
        _check_bank(name, leaf, space, str(folder))
    return Adapters(
        banks,
        space,
        alpha,
        tuple(targets),
        record["model"],
        record["base"],
        record["vocabulary"],
        record["step"],
        _fusion(record.get("fusion"), path),
    )


def _check_bank(name: str, leaf: Leaf, space: FeatureSpace, folder: str) -> None:
    """ValueError for an array that is none of the adapters', or of other values than is said."""
    path = tuple(name.split("/"))
    if "" in path or not name.isprintable():
        raise ValueError(f"{folder}: {name!r} among its arrays, expected paths of parameters")
    if tree.is_shared(path):
        return
    if len(path) < 4 or path[-3] != CHILD:
        raise ValueError(f"{folder}: {name} among its arrays, expected …/{CHILD}/TYPE/a and b")
    t = space.type(path[-2])
    stack = 1 if len(leaf.shape) == 4 else 0
    if len(leaf.shape) != 3 + stack:
        raise ValueError(f"{folder}: {name} is {list(leaf.shape)}, expected 3 axes, or 4 of a scan")
    rank = leaf.shape[-1] if path[-1] == "a" else leaf.shape[1 + stack]
    if leaf.shape[0] != t.num_values or rank != t.max_rank:
        raise ValueError(
            f"{folder}: {name} is {list(leaf.shape)}, expected {t.num_values} values of rank "
            f"{t.max_rank}"
        )


def _fusion(fields: Any, path: epath.Path) -> Fusion | None:
    if fields is None:
        return None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: fusion is {plain_json.shorten(fields)}, expected an object")
    known = [field.name for field in dataclasses.fields(Fusion)]
    for name in fields:
        if name not in known:
            raise ValueError(f"{path}: fusion has {name!r}, which Fusion has not")
    try:
        targets = {"targets": tuple(fields["targets"])} if "targets" in fields else {}
        return Fusion(**{**fields, **targets})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
