"""Against Transformers and PEFT themselves, at random; where they are installed.

Without them test_huggingface.py and test_peft.py compare with what they once computed.
"""

import dataclasses
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.experiments import exchange
from flix_jax.interop import bases, huggingface, network, peft
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

sys.path.append(str(pathlib.Path(__file__).parent / "goldens"))
import make_huggingface as makers  # noqa: E402


@pytest.fixture(scope="module", params=list(makers.FAMILIES))
def peer(request, tmp_path_factory):
    """(Transformers' network, its folder, T5Config, parameters here)."""
    model = makers.network(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    config = bases.config_of(folder)
    return model, folder, config, parameters(folder, config)


def parameters(folder, config):
    leaves = network.scanned_as(bases.read(folder, config), config)
    return network.nested({name: jnp.asarray(leaf.read()) for name, leaf in leaves.items()})


def prompts(rows=200):
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 48, (rows, 9))
    lengths = rng.integers(1, 10, rows)
    return np.where(np.arange(9) < lengths[:, None], tokens, 0)


def logits_here(config, params, arrays):
    inputs, targets = (jnp.asarray(arrays[n], jnp.int32) for n in ("inputs", "decoder_inputs"))
    ones = jnp.ones_like(targets)
    return Transformer(config).apply(
        {"params": params}, inputs, targets, ones, enable_dropout=False
    )


def close(ours, theirs):
    largest = np.abs(theirs).max()
    np.testing.assert_allclose(ours / largest, theirs / largest, atol=1e-5)


def test_logits_agree_in_both_directions(peer, tmp_path):
    model, folder, config, params = peer
    rng = np.random.default_rng(1)
    arrays = {"inputs": prompts(), "decoder_inputs": rng.integers(2, 48, (200, 7))}
    close(logits_here(config, params, arrays), makers.logits(model, arrays))
    # Parameters drawn here, written, and loaded there.
    drawn = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(x.dtype), params)
    leaves = {name: huggingface.Leaf.of(x, name) for name, x in network.flat(drawn).items()}
    huggingface.write(leaves, config, tmp_path, family=model.config.model_type)
    there = type(model).from_pretrained(tmp_path).eval()
    close(logits_here(config, drawn, arrays), makers.logits(there, arrays))


def test_weights_come_back_bit_for_bit(peer, tmp_path):
    model, folder, config, _ = peer
    leaves = bases.read(folder, config)
    huggingface.write(leaves, config, tmp_path, family=model.config.model_type)
    again = type(model).from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    for name, leaf in bases.read(tmp_path, config).items():
        np.testing.assert_array_equal(leaf.read(), leaves[name].read())


def test_greedy_decoding_of_200_prompts(peer):
    model, _, config, params = peer
    inputs = prompts()
    here = EncoderDecoder(Transformer(config))
    predict = jax.jit(lambda p, b: here.predict(p, b, max_length=makers.DECODED))
    tokens = predict(params, {"encoder_input_tokens": jnp.asarray(inputs, jnp.int32)})
    np.testing.assert_array_equal(tokens, makers.generate(model, {"inputs": inputs}))


@pytest.mark.parametrize("alpha", [1.0, 0.0, 2.0])
def test_four_beams_of_200_prompts(peer, alpha):
    """N-best lists and scores; lists may differ where two of their scores are as good as equal."""
    model, _, config, params = peer
    inputs = prompts()
    theirs = makers.beams(model, {"inputs": inputs}, 4, alpha)
    tokens, scores = theirs["beams"], theirs["beam_scores"]
    here = EncoderDecoder(Transformer(config))
    predict = jax.jit(
        lambda p, b: here.predict_n(
            p, b, max_length=makers.DECODED, beams=4, alpha=alpha, manner="huggingface"
        )
    )
    batch = {"encoder_input_tokens": jnp.asarray(inputs, jnp.int32)}
    ours, our_scores = map(np.asarray, predict(params, batch))
    np.testing.assert_allclose(our_scores, scores, atol=1e-4)
    margin = 1e-4 / makers.DECODED**alpha  # of log probabilities
    close_calls = (np.abs(np.diff(scores, axis=1)) < margin).any(axis=1)
    assert close_calls.sum() < 20
    np.testing.assert_array_equal(ours[~close_calls], tokens[~close_calls])


def test_decoding_with_adapters_is_that_of_their_loras(tmp_path):
    """200 prompts of four sets of features in one batch, each set beside its LoRA under PEFT."""
    from peft import PeftModel

    makers.network("mt5").save_pretrained(tmp_path / "base")
    config = bases.config_of(tmp_path / "base")
    types = (FeatureType("task", ("a", "b"), rank=2), FeatureType("language", ("x", "y"), rank=3))
    spec = AdapterSpec(FeatureSpace(types), alpha=4.0)
    here = EncoderDecoder(Transformer(config), spec)
    inputs, tokens = prompts(), (1, 4)
    shapes = dict.fromkeys(
        ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens"), tokens
    )
    drawn = nn.unbox(here.init(jax.random.key(0), {**shapes, "feature_ids": (1, 2)}))
    rng = np.random.default_rng(2)
    _, adapters = tree.split_adapters(drawn)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), adapters
    )
    params = tree.join(parameters(tmp_path / "base", config), adapters)
    ids = rng.integers(0, 2, (len(inputs), 2))
    batch = {
        "encoder_input_tokens": jnp.asarray(inputs, jnp.int32),
        "feature_ids": jnp.asarray(ids, jnp.int32),
    }
    greedily = jax.jit(lambda p, b: here.predict(p, b, max_length=makers.DECODED))(params, batch)
    by_beams, scores = jax.jit(
        lambda p, b: here.predict_n(
            p, b, max_length=makers.DECODED, beams=4, alpha=1.0, manner="huggingface"
        )
    )(params, batch)
    compared = 0
    for task in range(2):
        for language in range(2):
            chosen = {"task": types[0].values[task], "language": types[1].values[language]}
            folder = tmp_path / f"{task}{language}"
            pairs = tree.updates(adapters, spec, chosen).items()
            updates = {"/".join(path): peft.LowRank(*map(np.asarray, ab)) for path, ab in pairs}
            peft.write(updates, config, folder)
            there = PeftModel.from_pretrained(makers.network("mt5"), folder).eval()
            rows = (ids == (task, language)).all(axis=1)
            theirs = makers.generate(there, {"inputs": inputs[rows]})
            np.testing.assert_array_equal(np.asarray(greedily)[rows], theirs)
            best = makers.beams(there, {"inputs": inputs[rows]}, 4, 1.0)
            np.testing.assert_allclose(np.asarray(scores)[rows], best["beam_scores"], atol=1e-4)
            apart = np.abs(np.diff(best["beam_scores"], axis=1)) >= 1e-4 / makers.DECODED
            clear = apart.all(axis=1)
            np.testing.assert_array_equal(np.asarray(by_beams)[rows][clear], best["beams"][clear])
            compared += clear.sum()
    assert compared > 180
    plain = makers.generate(makers.network("mt5"), {"inputs": inputs})
    assert (plain != greedily).any(axis=1).mean() > 0.5  # the adapters decide


def lora(model, **settings):
    """The network with a LoRA of PEFT's whose weights are drawn."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 5, "target_modules": ["q", "k", "v", "o", "wo"]},
        {"r": 4, "lora_alpha": 2, "target_modules": "all-linear", "use_rslora": True},
        {
            "r": 2,
            "lora_alpha": 7,
            "target_modules": ["q", "v"],
            "rank_pattern": {"v": 3},
            "alpha_pattern": {"encoder.block.0.layer.0.SelfAttention.q": 1},
        },
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_a_lora_of_peft_is_the_same_here(settings, tmp_path):
    model = makers.network("mt5")
    model.save_pretrained(tmp_path / "base")
    config = bases.config_of(tmp_path / "base")
    adapted = lora(model, **settings)
    adapted.save_pretrained(tmp_path / "lora")
    leaves = network.flat(parameters(tmp_path / "base", config))
    for name, update in peft.read(tmp_path / "lora", config).items():
        leaves[f"{name}/kernel"] += update.a @ update.b
    arrays = makers.batch()
    close(logits_here(config, network.nested(leaves), arrays), makers.logits(adapted, arrays))


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_an_exported_set_of_features_is_the_same_there(scan, tmp_path, tmp_path_factory):
    """A run over mT5's golden network, trained a little, exported, loaded by PEFT."""
    from peft import PeftModel
    from tiny_runs import make_base_run, write_words

    from flix_jax.experiments import inference, training
    from flix_jax.experiments.job import Job
    from flix_jax.training.optimizers import Optimizer, Schedule

    small = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    model = makers.network("mt5", vocab_size=small.model.vocab_size)
    model.save_pretrained(tmp_path / "base")
    config = dataclasses.replace(bases.config_of(tmp_path / "base"), scan_layers=scan)
    types = (FeatureType("task", rank=2, ranks={"up": 1}), FeatureType("language", rank=3))
    run = dataclasses.replace(
        small,
        base=str(tmp_path / "base"),
        model=config,
        adapters=AdapterSpec(FeatureSpace(types), alpha=3.0),
        optimizer=Optimizer("sgd", Schedule(learning_rate=1.0)),
        total_steps=4,
        save_every=4,
    )
    training.train(run, tmp_path / "run")
    exchange.export(
        run, tmp_path / "run", tmp_path / "lora", form="peft", features="task=up,language=x"
    )
    adapted = PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    job = Job(run, tmp_path / "run")
    trained, frozen, _ = inference.restore(job)
    arrays = makers.batch()
    targets = jnp.asarray(arrays["decoder_inputs"], jnp.int32)
    ids = jnp.asarray(job.space.encode({"task": "up", "language": "x"}), jnp.int32)
    ours = jax.jit(job.model.logits)(
        tree.join(frozen, trained),
        {
            "encoder_input_tokens": jnp.asarray(arrays["inputs"], jnp.int32),
            "decoder_input_tokens": targets,
            "decoder_target_tokens": jnp.ones_like(targets),
            "feature_ids": jnp.tile(ids, (len(targets), 1)),
        },
    )
    close(np.asarray(ours), makers.logits(adapted, arrays))
    with adapted.disable_adapter():
        plain = makers.logits(adapted, arrays)
    assert np.abs(plain - ours).max() > 1e-2 * np.abs(ours).max()  # adapters have learnt something
