"""PEFT's LoRA format for Hugging Face's networks: one set of features out, one LoRA in.

The update of a set of features, Σ_f s_f A_f B_f, is a LoRA of rank Σ r: its A are theirs side by
side, scales included, and its B one below the other. `lora_alpha` is the rank, so that PEFT's scale
alpha / r is 1.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import regex
from etils import epath

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data import bounded
from flix_jax.interop import huggingface
from flix_jax.models.config import T5Config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
_PATTERN_SECONDS = 1.0  # a stranger's regular expression may take for ever
# Methods of PEFT's that are no plain product of two matrices beside a frozen weight.
_OTHERS = ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "trainable_token_indices")


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The update of one dense layer: x A B, scales included.

    Attributes:
      a: [in, rank].
      b: [rank, out].
    """

    a: np.ndarray
    b: np.ndarray


def write(
    updates: Mapping[str, LowRank],
    config: T5Config,
    folder: epath.PathLike,
    *,
    base: str | None = None,
    dtype: Any = np.float32,
) -> None:
    """Writes a LoRA as PEFT's `adapter_config.json` and `adapter_model.safetensors`.

    Args:
      updates: by our names of dense layers, layers not scanned:
        'encoder/layers_0/attention/query'. Ranks may differ.
      config: of the network.
      folder: which is made.
      base: the name or path of the network that PEFT is told it belongs to.
      dtype: of the weights.

    Raises:
      ValueError: an adapted layer that Hugging Face's network has not.
    """
    theirs = modules(config)
    weights, ranks = {}, {}
    for name, update in updates.items():
        if name not in theirs:
            raise ValueError(f"{name}: adapted, but no layer there; {did_you_mean(name, theirs)}")
        module, rank = theirs[name], update.a.shape[1]
        ranks[module] = rank
        weights[f"{_PREFIX}{module}.lora_A.weight"] = np.asarray(update.a.T, dtype)
        weights[f"{_PREFIX}{module}.lora_B.weight"] = np.asarray(update.b.T, dtype)
    most = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != most}
    record = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    huggingface.save_weights(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n")


def read(folder: epath.PathLike, config: T5Config) -> dict[str, LowRank]:
    """The LoRA of a folder, scales included, by our names of dense layers, layers not scanned.

    Raises:
      ValueError: another method than plain LoRA, a weight without its other half, a layer that the
        network has not, or another shape than its kernel takes.
    """
    folder = epath.Path(folder)
    record = _config(folder)
    ours = {module: name for name, module in modules(config).items()}
    shapes = huggingface.module_shapes(config)
    halves: dict[str, dict[str, np.ndarray]] = {}
    for key, leaf in huggingface.weights(folder, "adapter_model").items():
        found = _KEY.fullmatch(key)
        if found is None or found["module"] not in ours:
            near = did_you_mean(key, [f"{_PREFIX}{m}.lora_A.weight" for m in ours])
            raise ValueError(f"{folder}: {key} belongs to no dense layer of the network; {near}")
        if len(leaf.shape) != 2 or 0 in leaf.shape:
            raise ValueError(f"{folder}: {key} is {list(leaf.shape)}, expected a matrix")
        halves.setdefault(found["module"], {})[found["side"]] = leaf.read()
    updates = {}
    for module, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{folder}: {module} has lora_{''.join(pair)} alone")
        a, b = (np.asarray(pair[side], np.float32).T for side in "AB")
        d_out, d_in = shapes[module]
        if a.shape[0] != d_in or b.shape[1] != d_out or a.shape[1] != b.shape[0]:
            raise ValueError(
                f"{folder}: {module}: lora_A is {list(a.shape[::-1])} and lora_B "
                f"{list(b.shape[::-1])}, expected [r, {d_in}] and [{d_out}, r]"
            )
        scale = _scale(record, module, a.shape[1], folder / CONFIG)
        updates[ours[module]] = LowRank(a, b * np.float32(scale))
    if not updates:
        raise ValueError(f"{folder}: holds no LoRA weights")
    return updates


def modules(config: T5Config) -> dict[str, str]:
    """{our name of a dense layer: Hugging Face's}."""
    return {
        ours.removesuffix("/kernel"): theirs.removesuffix(".weight")
        for ours, (theirs, _) in huggingface.names(config).items()
        if ours.endswith("/kernel")
    }


def _config(folder: epath.Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise ValueError(f"{folder}: no {CONFIG}, expected a folder of PEFT's")
    record = bounded.read_object(path)
    if record.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {record.get('peft_type')!r}, expected 'LORA'")
    for name in _OTHERS:
        if record.get(name):
            raise ValueError(f"{path}: {name} is {record[name]!r}, expected plain LoRA")
    if record.get("bias", "none") != "none" or record.get("modules_to_save"):
        raise ValueError(f"{path}: trains more than low-rank updates (bias, modules_to_save)")
    return record


def _scale(record: Mapping[str, Any], module: str, rank: int, path: epath.Path) -> float:
    """alpha / r, or alpha / √r, with the alpha of the module's pattern.

    Raises:
      ValueError: an alpha that is no number, or patterns that are none or take too long.
    """
    alpha = record.get("lora_alpha", rank)
    patterns = record.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{path}: alpha_pattern is {patterns!r}, expected an object")
    for pattern, value in patterns.items():
        try:
            matches = regex.fullmatch(rf"(.*\.)?({pattern})", module, timeout=_PATTERN_SECONDS)
        except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path}: alpha_pattern {pattern[:80]!r}: {error}") from None
        if matches:
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < math.inf:
        raise ValueError(f"{path}: lora_alpha of {module} is {alpha!r}, expected a number")
    return alpha / (math.sqrt(rank) if record.get("use_rslora") else rank)
