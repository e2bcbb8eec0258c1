"""Writes what tests/test_huggingface.py and tests/test_peft.py compare with.

    python tests/goldens/make_huggingface.py

Needs torch, transformers and peft (made with 2.13, 5.24 and 0.21). For every family a small network
with random weights as Transformers writes it, with inputs, its logits for them and what it
generates greedily and by beams; and for mT5 a LoRA of PEFT's with random weights, and the logits
with it.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

HERE = pathlib.Path(__file__).parent / "huggingface"
SIZE = {
    "vocab_size": 48,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
FAMILIES = {
    "mt5": ("MT5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5_1_1": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "byt5": (
        "T5",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 3},
    ),
    "t5_1_0": ("T5", {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
    "umt5": ("UMT5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}
DECODED = 12


def network(name: str, **size):
    """The network of a family with random weights; an untied output layer is its own."""
    kind, settings = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZE, **settings, **size})
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    if not settings["tie_word_embeddings"]:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(model.shared.weight.shape))
    generator = torch.Generator().manual_seed(sorted(FAMILIES).index(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            centre, spread = (1.0, 0.1) if "norm" in parameter_name else (0.0, 0.25)
            parameter.copy_(centre + spread * drawn)
    return model


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, 48, (6, 9))
    inputs[1, 6:] = 0
    inputs[4, 3:] = 0
    targets = rng.integers(2, 48, (6, 5))
    targets[:, 0] = 0
    return {"inputs": inputs, "decoder_inputs": targets}


def logits(model, arrays) -> np.ndarray:
    inputs = torch.tensor(arrays["inputs"])
    with torch.no_grad():
        return model(
            input_ids=inputs,
            attention_mask=(inputs > 0).long(),
            decoder_input_ids=torch.tensor(arrays["decoder_inputs"]),
        ).logits.numpy()


def generate(model, arrays) -> np.ndarray:
    """What it decodes greedily, 0 behind the end."""
    inputs = torch.tensor(arrays["inputs"])
    with torch.no_grad():
        made = model.generate(
            input_ids=inputs,
            attention_mask=(inputs > 0).long(),
            max_new_tokens=DECODED,
            do_sample=False,
        )
    padded = np.zeros((len(made), DECODED), np.int32)
    padded[:, : made.shape[1] - 1] = made[:, 1:].numpy()
    return padded


def beams(model, arrays, count: int = 3, alpha: float = 1.0) -> dict[str, np.ndarray]:
    """The best hypotheses of every row, 0 behind their end, and their scores."""
    inputs = torch.tensor(arrays["inputs"])
    with torch.no_grad():
        made = model.generate(
            input_ids=inputs,
            attention_mask=(inputs > 0).long(),
            max_new_tokens=DECODED,
            num_beams=count,
            num_return_sequences=count,
            length_penalty=alpha,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    tokens = made.sequences[:, 1:].reshape(len(inputs), count, -1).numpy()
    ended = np.cumsum(tokens == 1, axis=-1) - (tokens == 1) > 0  # filled with what ends them
    padded = np.zeros((*tokens.shape[:2], DECODED), np.int32)
    padded[:, :, : tokens.shape[-1]] = np.where(ended, 0, tokens)
    scores = made.sequences_scores.reshape(len(inputs), count).numpy()
    return {"beams": padded, "beam_scores": scores}


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    for name in FAMILIES:
        model, arrays = network(name), batch()
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink()
        arrays["logits"] = logits(model, arrays)
        arrays["greedy"] = generate(model, arrays)
        arrays |= beams(model, arrays)
        np.savez(HERE / name / "golden.npz", **arrays)
        if name != "mt5":
            continue
        settings = LoraConfig(
            r=3, lora_alpha=5, target_modules=["q", "v", "wi_0"], rank_pattern={"wi_0": 2}
        )
        adapted = get_peft_model(model, settings)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_" in parameter_name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(HERE / "peft")
        (HERE / "peft" / "README.md").unlink()
        record = json.loads((HERE / "peft" / "adapter_config.json").read_text())
        record["target_modules"] = sorted(record["target_modules"])
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        (HERE / "peft" / "adapter_config.json").write_text(text)
        np.savez(HERE / "peft" / "golden.npz", **batch(), logits=logits(adapted, batch()))


if __name__ == "__main__":
    main()
