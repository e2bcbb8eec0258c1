"""LoRAs of PEFT's: the logits there are the logits here, in both directions."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_huggingface import GOLDENS, golden

from flix_jax.interop import bases, network, peft
from flix_jax.models.t5 import Transformer

CONFIG = bases.config_of(GOLDENS / "mt5")
FOLDER = GOLDENS / "peft"


def logits(updates):
    """mT5's with updates added to its kernels by NumPy, on the golden's inputs."""
    leaves = {name: leaf.read() for name, leaf in bases.read(GOLDENS / "mt5", CONFIG).items()}
    for name, update in updates.items():
        kernel = leaves[f"{name}/kernel"].astype(np.float64)
        leaves[f"{name}/kernel"] = kernel + update.a.astype(np.float64) @ update.b
    params = network.nested({n: jnp.asarray(x, jnp.float32) for n, x in leaves.items()})
    arrays = golden("peft")
    inputs, targets = (jnp.asarray(arrays[n], jnp.int32) for n in ("inputs", "decoder_inputs"))
    ones = jnp.ones_like(targets)
    return Transformer(CONFIG).apply(
        {"params": params}, inputs, targets, ones, enable_dropout=False
    )


def test_logits_of_a_lora_are_those_of_peft():
    updates = peft.read(FOLDER, CONFIG)
    assert {u.a.shape[1] for n, u in updates.items() if n.endswith("query")} == {3}
    assert {u.a.shape[1] for n, u in updates.items() if n.endswith("wi_0")} == {2}
    expected = golden("peft")["logits"]
    largest = np.abs(expected).max()
    np.testing.assert_allclose(logits(updates) / largest, expected / largest, atol=1e-5)
    apart = np.abs(logits({}) - expected).max() / largest
    assert apart > 0.05  # the adapters are what makes the difference


def test_a_lora_goes_out_as_peft_names_it(tmp_path):
    updates = peft.read(FOLDER, CONFIG)
    peft.write(updates, CONFIG, tmp_path, base="mt5")
    ours, theirs = (load_file(f / peft.WEIGHTS) for f in (tmp_path, FOLDER))
    assert ours.keys() == theirs.keys()
    record = json.loads((tmp_path / peft.CONFIG).read_text())
    assert record["r"] == record["lora_alpha"] == 3 and set(record["rank_pattern"].values()) == {2}
    again = peft.read(tmp_path, CONFIG)
    for name, update in updates.items():
        np.testing.assert_array_equal(again[name].a, update.a)
        np.testing.assert_array_equal(again[name].b, update.b)


@pytest.fixture
def copy(tmp_path):
    """A function that copies the LoRA with changes to its weights and its record."""

    def make(change=lambda weights: None, **record) -> pathlib.Path:
        shutil.copytree(FOLDER, tmp_path / "peft")
        weights = load_file(FOLDER / peft.WEIGHTS)
        change(weights)
        save_file(weights, tmp_path / "peft" / peft.WEIGHTS)
        old = json.loads((FOLDER / peft.CONFIG).read_text())
        (tmp_path / "peft" / peft.CONFIG).write_text(json.dumps(old | record))
        return tmp_path / "peft"

    return make


KEY = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_{}.weight"


def test_alpha_of_a_pattern_and_of_the_square_root(copy):
    folder = copy(alpha_pattern={"q": 12}, use_rslora=True)
    plain, found = peft.read(FOLDER, CONFIG), peft.read(folder, CONFIG)
    query, value = (f"encoder/layers_0/attention/{n}" for n in ("query", "value"))
    np.testing.assert_allclose(found[query].b, plain[query].b * (12 / 3**0.5) / (5 / 3), rtol=1e-6)
    np.testing.assert_allclose(found[value].b, plain[value].b * 3**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "record", "message"),
    [
        (None, {"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        (None, {"use_dora": True}, "use_dora is True, expected plain LoRA"),
        (None, {"bias": "all"}, "trains more than low-rank updates"),
        (lambda w: w.pop(KEY.format("A")), {}, "SelfAttention.q has lora_B alone"),
        (
            lambda w: w.update({KEY.format("A"): np.zeros((3, 17), np.float32)}),
            {},
            r"SelfAttention.q: lora_A is \[3, 17\] and lora_B \[16, 3\], expected \[r, 16\]",
        ),
        (
            lambda w: w.update({KEY.format("A").replace(".0.", ".7."): w[KEY.format("A")]}),
            {},
            "belongs to no dense layer of the network; did you mean",
        ),
    ],
)
def test_what_is_no_plain_lora_of_the_network_is_refused(copy, change, record, message):
    folder = copy(change or (lambda weights: None), **record)
    with pytest.raises(ValueError, match=message) as error:
        peft.read(folder, CONFIG)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_lora_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter_config.json, expected a folder of PEFT's"):
        peft.read(tmp_path, CONFIG)
