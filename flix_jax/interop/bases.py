"""Parameters of a whole network from wherever they are: what is at a path, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from flix_jax.adapters.suggest import nearest_path
from flix_jax.interop import huggingface, network, t5x_checkpoints
from flix_jax.interop.leaves import Leaf, load
from flix_jax.models import int8
from flix_jax.models.config import T5Config

HUGGINGFACE, T5X = "huggingface", "t5x"


def kind(path: epath.PathLike) -> str | None:
    """The format of the network at a path, 'huggingface' or 't5x'; None where there is neither."""
    path = epath.Path(path)
    if huggingface.is_folder(path):
        return HUGGINGFACE
    return T5X if t5x_checkpoints.find(path) is not None else None


def read(path: epath.PathLike, config: T5Config) -> dict[str, Leaf]:
    """The parameters at a path, as `network.fit` gives them.

    Raises:
      ValueError: there is no network, it is damaged, or it is not the one that `config` describes.
    """
    found = kind(path)
    if found == HUGGINGFACE:
        _check_config(path, config)
        return huggingface.read(path, config)
    if found == T5X:
        return network.fit(t5x_checkpoints.read(path), config, str(path))
    raise ValueError(_nothing(path))


def _nothing(path: epath.PathLike) -> str:
    near = "" if epath.Path(path).exists() else nearest_path(str(path))
    return f"{path}: no network, expected Hugging Face's config.json or a checkpoint of T5X's{near}"


def config_of(path: epath.PathLike) -> T5Config:
    """The T5Config of the network at a path: what is stated there, or what its shapes tell.

    A checkpoint of T5X's states nothing: heads, widths and layers follow from its shapes, a gated
    feed-forward block is taken for GELU and a plain one for ReLU, as in all released networks.
    """
    found = kind(path)
    if found is None:
        raise ValueError(_nothing(path))
    if found == HUGGINGFACE:
        return T5Config(**huggingface.read_config(path))
    return network.config_of(t5x_checkpoints.read(path), str(path))


def load_parameters(path: epath.PathLike, config: T5Config, template: Mapping[str, Any]) -> Any:
    """The parameters at a path on devices: every array of the sharding and dtype of its template.

    What a device holds is read for it alone, an array after the other.

    Args:
      path: of the network.
      config: of the template's network.
      template: nested mappings of `jax.ShapeDtypeStruct` with shardings; where it is int8, with the
        scales beside (`models.int8.template`), the parameters are quantised as they are read.

    Raises:
      ValueError: as `read` does.
    """
    found = network.scanned_as(read(path, config), config)
    wanted: dict[str, jax.ShapeDtypeStruct] = network.flat(template)
    for name, shape in wanted.items():
        if shape.dtype == np.int8:
            axis = int8.AXES[name.rpartition("/")[2]]
            found[name], found[int8.scale_name(name)] = found[name].quantised(axis)
    return network.nested(load(found, wanted))


def _check_config(path: epath.PathLike, config: T5Config) -> None:
    """What shapes do not tell: heads, activations, the manner of relative positions."""
    names = (
        "num_heads",
        "head_dim",
        "mlp_activations",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "logits_via_embedding",
    )
    there = huggingface.read_config(path)
    for name in names:
        here = getattr(config, name)
        if there[name] != here:
            raise ValueError(
                f"{epath.Path(path) / 'config.json'}: says {name} {there[name]!r}, but "
                f"T5Config.{name} = {here!r}"
            )
