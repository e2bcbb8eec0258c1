"""A training step of Hugging Face's mT5 with PEFT's LoRA, compiled, on PyTorch's device."""

from collections.abc import Callable, Mapping

import numpy as np
import peft
import torch
import transformers

from flix_jax.models.config import T5Config

TARGETS = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]


def make(
    config: T5Config, batch: Mapping[str, np.ndarray], rank: int = 8
) -> Callable[[], torch.Tensor]:
    """A function that makes a step with AdamW and gives its loss.

    Base and adapters are bfloat16: with PEFT's default, adapters in float32, it is slower.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    shape = transformers.MT5Config(
        vocab_size=config.vocab_size,
        d_model=config.emb_dim,
        d_kv=config.head_dim,
        d_ff=config.mlp_dim,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=config.num_heads,
        dropout_rate=config.dropout_rate,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        use_cache=False,
    )
    with device:
        base = transformers.MT5ForConditionalGeneration(shape).to(torch.bfloat16)
    low_rank = peft.LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=TARGETS, task_type="SEQ_2_SEQ_LM"
    )
    network = peft.get_peft_model(base, low_rank, autocast_adapter_dtype=False).train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=device.type == "cuda")
    tokens = {
        ours: torch.as_tensor(batch[name], dtype=torch.long, device=device)
        for ours, name in (
            ("input_ids", "encoder_input_tokens"),
            ("decoder_input_ids", "decoder_input_tokens"),
            ("labels", "decoder_target_tokens"),
        )
    }
    mask = torch.ones_like(tokens["input_ids"])
    compiled = torch.compile(network, dynamic=False)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}, attention {shape._attn_implementation}, "
        f"{sum(p.numel() for p in trained):,} trained",
        flush=True,
    )

    def step() -> torch.Tensor:
        loss = compiled(**tokens, attention_mask=mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
