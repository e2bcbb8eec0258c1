"""Hugging Face's mT5 with PEFT's LoRA, on PyTorch's device: training, forward, greedy decoding."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import peft
import torch
import transformers

from flix_jax.models.config import T5Config

TARGETS = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]


class Network:
    """One that is adapted, and a batch for it.

    Base and adapters have one dtype: with PEFT's default, adapters in float32 beside bfloat16, a
    step is slower.

    Args:
      config: of the network, whose parameters are random.
      batch: of tokens without padding.
      dtype: of parameters and products.
      rank: of the LoRA.
    """

    def __init__(
        self,
        config: T5Config,
        batch: Mapping[str, np.ndarray],
        dtype: torch.dtype = torch.bfloat16,
        rank: int = 8,
    ):
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
            decoder_start_token_id=0,
            use_cache=False,
        )
        with device:
            base = transformers.MT5ForConditionalGeneration(shape).to(dtype)
        low_rank = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            target_modules=TARGETS,
            task_type="SEQ_2_SEQ_LM",
        )
        self.network = peft.get_peft_model(base, low_rank, autocast_adapter_dtype=False)
        self.tokens = {
            ours: torch.tensor(np.array(batch[name]), dtype=torch.long, device=device)
            for ours, name in (
                ("input_ids", "encoder_input_tokens"),
                ("decoder_input_ids", "decoder_input_tokens"),
                ("labels", "decoder_target_tokens"),
            )
        }
        self.mask = torch.ones_like(self.tokens["input_ids"])
        trained = [p for p in self.network.parameters() if p.requires_grad]
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=fused)
        print(
            f"torch {torch.__version__}, transformers {transformers.__version__}, "
            f"peft {peft.__version__}, attention {shape._attn_implementation}, "
            f"{sum(p.numel() for p in trained):,} trained",
            flush=True,
        )

    def training(self, *, compiled: bool) -> Callable[[], torch.Tensor]:
        """A function that makes a step with AdamW and gives its loss."""
        network: Any = self.network.train()
        call = torch.compile(network, dynamic=False) if compiled else network

        def step() -> torch.Tensor:
            loss = call(**self.tokens, attention_mask=self.mask).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    def forward(self, *, compiled: bool) -> Callable[[], torch.Tensor]:
        """A function that gives the logits."""
        network: Any = self.network
        call = torch.compile(network, dynamic=False) if compiled else network

        def run() -> torch.Tensor:
            network.eval()
            tokens = {name: of for name, of in self.tokens.items() if name != "labels"}
            with torch.inference_mode():
                return call(**tokens, attention_mask=self.mask).logits

        return run

    def decoding(self, length: int) -> Callable[[], torch.Tensor]:
        """A function that decodes greedily, with a cache, so many tokens of every row."""
        network: Any = self.network

        def run() -> torch.Tensor:
            network.eval()
            with torch.inference_mode():
                return network.generate(
                    input_ids=self.tokens["input_ids"],
                    attention_mask=self.mask,
                    max_new_tokens=length,
                    min_new_tokens=length,
                    num_beams=1,
                    do_sample=False,
                    use_cache=True,
                )

        return run
