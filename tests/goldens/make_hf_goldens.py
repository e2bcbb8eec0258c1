"""Makes hf_mt5.npz: weights, inputs and logits of a small random Hugging Face MT5, in float32.

Run in an environment of its own:

    pip install torch==2.13.0 transformers
    python tests/goldens/make_hf_goldens.py

Inputs are longer than the largest relative distance, and the second row of each side is padded.
"""

import pathlib

import numpy as np
import torch
import transformers

INPUT_LENGTH, TARGET_LENGTH = 150, 12


def main() -> None:
    torch.manual_seed(0)
    config = transformers.MT5Config(
        vocab_size=48,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_heads=3,
        num_layers=2,
        num_decoder_layers=2,
        dropout_rate=0.0,
        tie_word_embeddings=False,
        initializer_factor=1.0,
    )
    model = transformers.MT5ForConditionalGeneration(config).eval().float()
    with torch.no_grad():  # scales other than one, and attention that is not nearly uniform
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in name:
                parameter.normal_()
            elif any(part in name for part in (".q.", ".k.")):
                parameter.mul_(3.0)
    inputs = torch.randint(2, config.vocab_size, (2, INPUT_LENGTH))
    targets = torch.randint(2, config.vocab_size, (2, TARGET_LENGTH))
    inputs[1, 100:] = 0
    targets[1, 7:] = 0
    shifted = torch.nn.functional.pad(targets, (1, 0))[:, :-1]
    with torch.no_grad():
        logits = model(
            input_ids=inputs,
            attention_mask=(inputs > 0).long(),
            decoder_input_ids=shifted,
            decoder_attention_mask=(targets > 0).long(),
        ).logits
    weights = {
        f"weights/{name}": value.numpy()
        for name, value in model.state_dict().items()
        if "embed_tokens" not in name  # copies of shared.weight
    }
    path = pathlib.Path(__file__).with_name("hf_mt5.npz")
    np.savez_compressed(
        path,
        encoder_input_tokens=inputs.numpy().astype(np.int32),
        decoder_input_tokens=shifted.numpy().astype(np.int32),
        decoder_target_tokens=targets.numpy().astype(np.int32),
        logits=logits.numpy(),
        **weights,
    )
    print(f"{path}: {path.stat().st_size} bytes, transformers {transformers.__version__}")
    for name, value in weights.items():
        print(name, value.shape)


if __name__ == "__main__":
    main()
