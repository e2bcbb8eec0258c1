"""The benchmark of a GPU's training step: what it counts, and that it runs (on a CPU, tiny)."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jaxprs import product_flops

from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS, INPUTS, TARGETS = 2, 12, 6


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return importlib.import_module("gpu_step")


@pytest.mark.parametrize("kernels", [2, 3])
def test_the_flops_are_those_of_the_products_of_the_network(benchmark, kernels):
    config = T5Config(
        40, emb_dim=8, num_heads=2, head_dim=6, mlp_dim=20, num_encoder_layers=2,
        num_decoder_layers=3, dropout_rate=0.0,
    )  # fmt: skip
    model = EncoderDecoder(Transformer(config))
    tokens = {
        "encoder_input_tokens": jnp.ones((ROWS, INPUTS), jnp.int32),
        "decoder_input_tokens": jnp.ones((ROWS, TARGETS), jnp.int32),
        "decoder_target_tokens": jnp.ones((ROWS, TARGETS), jnp.int32),
    }
    shapes = {name: value.shape for name, value in tokens.items()}
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), shapes))
    widths = [
        jax.ShapeDtypeStruct((ROWS, length, config.emb_dim), jnp.float32)
        for length in (INPUTS, TARGETS)
    ]

    def loss(added, params):
        with benchmark.perturbed_embeddings(added):
            return model.loss(params, tokens)[0]

    # In float32 nothing is formed by itself: what is not differentiated has no product.
    of = (0,) if kernels == 2 else (0, 1)
    found = product_flops(jax.make_jaxpr(jax.grad(loss, of))(widths, params).jaxpr)
    expected = benchmark.model_flops(config, ROWS, INPUTS, TARGETS, kernels=kernels)
    assert found == expected


@pytest.mark.exhaustive
def test_it_prints_every_side_beside_the_first(benchmark, monkeypatch, capsys):
    command = "gpu_step --model tiny --rows 2 --input_length 8 --target_length 4 --rounds 2"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--sides", "frozen,rows,lora"])
    benchmark.main()
    lines = capsys.readouterr().out.rpartition("median [quartiles]")[2].split("\n")
    assert [line.split()[0] for line in lines if line] == ["side", "frozen", "rows", "lora"]
