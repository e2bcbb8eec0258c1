"""The source pass in networks: what is recorded, who reads it, and what no gradient reaches."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_runs import make_base_run, write_words

from flix_jax.adapters import source as source_lib
from flix_jax.adapters import trained_values
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.fusion import Alignment, Fusion, Source
from flix_jax.adapters.injection import LAYER_STATES, AdapterSpec
from flix_jax.adapters.tree import adapter_counts, count_parameters, join, split_adapters
from flix_jax.data.cells import columns
from flix_jax.experiments import starting_values
from flix_jax.experiments.job import Job
from flix_jax.interop import flix_adapters, network
from flix_jax.interop.leaves import Leaf
from flix_jax.models import int8
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder, Layout
from flix_jax.models.t5 import Transformer
from flix_jax.training.partitioning import MeshSpec
from flix_jax.training.step import TrainState, train_step

ROWS, INPUTS, SOURCES, LENGTH = 8, 7, 5, 4
SPACE = FeatureSpace(
    (FeatureType("task", ("ner", "qa"), rank=2), FeatureType("language", ("sw", "yo"), rank=3))
)
CONFIG = T5Config(
    vocab_size=24,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    num_encoder_layers=2,
    num_decoder_layers=1,
    relative_attention_per_layer=True,
)
LAYER = "encoder/layers_{}/attention/{}"


def model_of(function="add_relu", *, targets="all", space=SPACE, fused=True, **config):
    fusion_fields = {name: config.pop(name) for name in ("layer_offset",) if name in config}
    fusion = Fusion(function, **fusion_fields) if fused else None
    module = Transformer(dataclasses.replace(CONFIG, **config))
    return EncoderDecoder(module, AdapterSpec(space, targets, alpha=4.0, fusion=fusion))


def make_batch():
    """Rows of several lengths; the sources of rows 2 and 5 are padding alone."""
    rng = np.random.default_rng(0)
    lengths = {"encoder_input_tokens": INPUTS, "source_input_tokens": SOURCES}
    batch = {name: rng.integers(2, 24, (ROWS, size)) for name, size in lengths.items()}
    for row in range(ROWS):
        batch["encoder_input_tokens"][row, INPUTS - row % 3 :] = 0
        batch["source_input_tokens"][row, SOURCES - row % 4 :] = 0
    batch["source_input_tokens"][[2, 5]] = 0
    targets = rng.integers(2, 24, (ROWS, LENGTH))
    batch["decoder_target_tokens"] = targets
    batch["decoder_input_tokens"] = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    batch["feature_ids"] = rng.integers(-1, 2, (ROWS, 2))
    return {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}


BATCH = make_batch()
NO_SOURCE = BATCH | {"source_input_tokens": jnp.zeros((ROWS, SOURCES), jnp.int32)}
SHAPES = {name: array.shape for name, array in BATCH.items()}


def params_of(model, seed=2):
    rng = np.random.default_rng(seed)
    of = SHAPES | {"feature_ids": (ROWS, model.adapters.space.num_slots)}
    shapes = nn.unbox(jax.eval_shape(lambda rng: model.init(rng, of), jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape)), shapes)


def loss_and_gradient(model, params, batch=BATCH, by=0):
    """The mean loss, and its gradient by the adapters (`by` 0) or by the base (1)."""
    base, adapters = split_adapters(params)

    @jax.jit
    def run(adapters, base, batch):
        def mean(adapters, base):
            total, sums = model.loss(join(base, adapters), batch)
            return total / sums["weight"]

        return jax.value_and_grad(mean, argnums=by)(adapters, base)

    return run(adapters, base, batch)


def read(model, params, batch=BATCH):
    """The source of a batch, its arrays computed in one program."""
    found = {}

    @jax.jit
    def run(params, batch):
        source = source_lib.read(model.module, model.adapters, params, batch)
        alignment = source.alignment
        found["same"] = source.same
        return source.variables, (alignment.fused, alignment.index, alignment.mask)

    variables, alignment = run(params, batch)
    return Source(Alignment(*alignment), variables=variables, same=found["same"])


def close(actual, expected, tolerance=1e-6):
    for mine, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def looped():
    model = model_of()
    params = params_of(model)
    return model, params, *loss_and_gradient(model, params)


def test_it_records_what_enters_each_fused_layer_once():
    model = model_of(targets="encoder")
    params = params_of(model)
    source = read(model, params)
    _, kept = model.module.apply(
        {"params": split_adapters(params)[0]},
        BATCH["source_input_tokens"],
        enable_dropout=False,
        method="encode",
        capture_intermediates=lambda module, _: module.name == "pre_attention_layer_norm",
    )
    recorded = {
        "/".join(p[:-1]): x for p, x in flatten_dict(source.variables[LAYER_STATES]).items()
    }
    assert recorded.keys() == {LAYER.format(n, "query") for n in range(2)}
    for n in range(2):
        (expected,) = kept["intermediates"]["encoder"][f"layers_{n}"]["pre_attention_layer_norm"][
            "__call__"
        ]
        np.testing.assert_allclose(recorded[LAYER.format(n, "query")], expected, atol=1e-6)
        assert source.same[LAYER.format(n, "value")] == LAYER.format(n, "query")


def by_hand(params, batch, offset):
    """The encoder with LoRA + FLARE (add_relu), written down with an interceptor of its own."""
    module, (base, adapters) = Transformer(CONFIG), split_adapters(params)
    states = []

    def recording(next_fun, args, kwargs, context):
        if context.module.name == "pre_attention_layer_norm":
            states.append(next_fun(*args, **kwargs))
            return states[-1]
        return next_fun(*args, **kwargs)

    arguments = {"enable_dropout": False, "method": "encode"}
    with nn.intercept_methods(recording):
        last = module.apply({"params": base}, batch["source_input_tokens"], **arguments)
    states = [*states, last][offset:]
    there = (batch["source_input_tokens"] > 0).any(axis=1)

    def adapting(next_fun, args, kwargs, context):
        y, path = next_fun(*args, **kwargs), context.module.path
        if path[:1] != ("encoder",) or path[-1] not in ("query", "value"):
            return y
        own = adapters["encoder"][path[1]][path[2]][path[3]]["flix"]["shared"]
        a, b = own["a"][0], own["b"][0]
        t = args[0] @ a
        s = jnp.pad(states[int(path[1][-1])] @ a, ((0, 0), (0, INPUTS - SOURCES), (0, 0)))
        real = jnp.pad(batch["source_input_tokens"] > 0, ((0, 0), (0, INPUTS - SOURCES)))
        real = real & there[:, None]
        fused = jnp.where(real[:, :, None], jnp.maximum(s, 0) + jnp.maximum(t, 0), t)
        return y + (4.0 / a.shape[1] * fused @ b).reshape(y.shape)

    with nn.intercept_methods(adapting):
        return module.apply({"params": base}, batch["encoder_input_tokens"], **arguments)


@pytest.mark.parametrize("offset", [0, 1])
def test_the_encoder_is_that_of_the_published_equation(offset):
    space = FeatureSpace((FeatureType("shared", ("shared",), rank=3),))
    targets = "encoder/.*/attention/(query|value)"
    model = model_of(space=space, targets=targets, layer_offset=offset)
    params = params_of(model)
    batch = BATCH | {"feature_ids": jnp.zeros((ROWS, 1), jnp.int32)}
    encoded = jax.jit(lambda p, b: model.embed(p, b))(params, batch)
    real = (batch["encoder_input_tokens"] > 0)[:, :, None]
    expected = jnp.where(real, by_hand(params, batch, offset), 0).sum(axis=1) / real.sum(axis=1)
    np.testing.assert_allclose(encoded, expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_reaches_the_base_through_the_source(looped):
    """Base parameters get what they get when the recorded states are constants."""
    model, params, *_ = looped
    _, by_base = loss_and_gradient(model, params, by=1)
    source = read(model, params)
    constant = dataclasses.replace(source, variables=jax.device_get(source.variables))
    held = _Held(model.module, model.adapters, source=constant)
    _, expected = loss_and_gradient(held, params, by=1)
    close(by_base, expected)

    @jax.jit
    @jax.grad
    def gradient(params):
        found = source_lib.read(model.module, model.adapters, params, BATCH)
        return sum(jnp.sum(x) for x in jax.tree.leaves(found.variables))

    for leaf in jax.tree.leaves(gradient(params)):
        assert not np.any(leaf)


@dataclasses.dataclass(frozen=True)
class _Held(EncoderDecoder):
    """A model whose source is given."""

    source: object = dataclasses.field(default=None, compare=False)

    def _source(self, params, batch):
        return self.source


def test_zero_b_is_the_base_bit_for_bit(looped):
    model, params, *_ = looped
    base, adapters = split_adapters(params)
    adapters = unflatten_dict(
        {p: x * 0 if p[-1] == "b" else x for p, x in flatten_dict(adapters).items()}
    )
    plain = jax.jit(EncoderDecoder(model.module).logits)(base, BATCH)
    np.testing.assert_array_equal(jax.jit(model.logits)(join(base, adapters), BATCH), plain)


def test_without_a_source_it_is_the_plain_adapter_bit_for_bit():
    model = model_of("add")
    params = params_of(model)
    plain = EncoderDecoder(model.module, dataclasses.replace(model.adapters, fusion=None))
    np.testing.assert_array_equal(
        jax.jit(model.logits)(params, NO_SOURCE), jax.jit(plain.logits)(params, NO_SOURCE)
    )
    loss, by_adapters = loss_and_gradient(model, params, NO_SOURCE)
    expected, by_plain = loss_and_gradient(plain, params, NO_SOURCE)
    assert loss == expected
    close(by_adapters, by_plain, 0)


def test_a_row_does_not_depend_on_the_sources_of_others(looped):
    model, params, *_ = looped
    logits = jax.jit(model.logits)
    together = logits(params, BATCH)
    changed = BATCH["source_input_tokens"].at[0].set(7).at[5].set(9)
    other = logits(params, BATCH | {"source_input_tokens": changed})
    differs = np.abs(other - together).max(axis=(1, 2))
    np.testing.assert_array_equal(differs > 1e-4, np.isin(np.arange(ROWS), (0, 5)))
    np.testing.assert_array_equal(other[1:5], together[1:5])


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [
        pytest.param(True, "none", marks=pytest.mark.exhaustive),
        pytest.param(False, "minimal", marks=pytest.mark.exhaustive),
        (True, "full"),
    ],
)
def test_loop_scan_and_remat_agree(looped, scan_layers, remat):
    _, params, loss, by_adapters = looped
    model = model_of(scan_layers=scan_layers, remat=remat)
    if scan_layers:
        params, by_adapters = scanned(params), scanned(by_adapters)
    found, gradient = loss_and_gradient(model, params)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    close(gradient, by_adapters)


def scanned(params):
    """Layers stacked on axis 1, under the names of a scanned network."""
    made = dict(params)
    for part in ("encoder", "decoder"):
        if part in params:
            rest = {k: v for k, v in params[part].items() if not k.startswith("layers_")}
            layers = [v for k, v in sorted(params[part].items()) if k.startswith("layers_")]
            made[part] = rest | {part: jax.tree.map(lambda *x: jnp.stack(x, 1), *layers)}
    return made


@pytest.mark.parametrize("offset", [0, 1])
def test_offsets_of_loop_and_scan_agree(looped, offset):
    _, params, *_ = looped
    loop = jax.jit(model_of(layer_offset=offset).logits)(params, BATCH)
    scan = jax.jit(model_of(layer_offset=offset, scan_layers=True).logits)
    np.testing.assert_allclose(scan(scanned(params), BATCH), loop, rtol=1e-5, atol=1e-5)


def test_eight_devices_agree_with_one(looped):
    _, params, loss, by_adapters = looped
    model = model_of(scan_layers=True)
    params, by_adapters = scanned(params), scanned(by_adapters)
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    rules = {"batch": "data", "length": None, "embed": None, "heads": "model", "mlp": "model"}
    rules |= {"kv": None, "vocab": "model"}
    model = dataclasses.replace(model, layout=Layout(mesh.abstract_mesh, tuple(rules.items())))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.device_put(BATCH, rows)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found, gradient = loss_and_gradient(model, jax.device_put(params, whole), batch)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    close(gradient, by_adapters)


def test_decoding_reads_the_source(looped):
    """Greedy decoding equals the full forward, and beams and samples differ with the source."""
    model, params, *_ = looped
    logits, decoded = jax.jit(model.logits), np.zeros((ROWS, LENGTH), np.int32)
    for step in range(LENGTH):
        fed = BATCH | {
            "decoder_input_tokens": jnp.asarray(np.pad(decoded[:, :-1], ((0, 0), (1, 0)))),
            "decoder_target_tokens": jnp.asarray(
                np.broadcast_to(np.arange(LENGTH) <= step, (ROWS, LENGTH)).astype(np.int32)
            ),
        }
        decoded[:, step] = np.argmax(logits(params, fed)[:, step], axis=-1)
    ended = np.cumsum(decoded == 1, axis=1) - (decoded == 1) > 0
    decoded = np.where(ended, 0, decoded)
    predict = functools.partial(model.predict, max_length=LENGTH)
    beams = functools.partial(model.predict_n, max_length=LENGTH, beams=2)
    draw = functools.partial(model.sample, max_length=LENGTH, rng=jax.random.key(0))
    found = []
    for search in map(jax.jit, (predict, lambda *of: beams(*of)[0], draw)):
        found.append(search(params, BATCH))
        differs = np.asarray(found[-1] != search(params, NO_SOURCE))
        assert differs.any() and not differs[[2, 5]].any()  # which have none anyway
    np.testing.assert_array_equal(found[0], decoded)
    scan = functools.partial(model_of(scan_layers=True).predict, max_length=LENGTH)
    np.testing.assert_array_equal(jax.jit(scan)(scanned(params), BATCH), decoded)


def test_members_of_an_ensemble_read_the_source_of_their_row():
    """The mean of two logits that are the same is each of them."""
    space = FeatureSpace((FeatureType("cell", ("a", "b", "c"), rank=2),))
    alone = model_of("mul", space=space)
    ensemble = dataclasses.replace(alone, members=2)
    params, ids = params_of(alone), jnp.arange(ROWS)[:, None] % 3
    predict = functools.partial(alone.predict, max_length=LENGTH)
    expected = jax.jit(predict)(params, BATCH | {"feature_ids": ids})
    twice = jax.jit(functools.partial(ensemble.predict, max_length=LENGTH))
    found = twice(params, BATCH | {"feature_ids": jnp.repeat(ids, 2, axis=1)})
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) > 3


@pytest.mark.exhaustive
def test_microbatches_read_their_own_sources():
    model = model_of("cross_attention", scan_layers=True)
    base, adapters = split_adapters(params_of(model))
    optimizer = optax.sgd(1.0)
    after = []
    for parts in (1, 2):
        step = jax.jit(train_step(model.loss, optimizer, microbatches=parts))
        state, _ = step(TrainState.create(adapters, optimizer), base, BATCH, 0)
        after.append(state.trained)
    close(*after, 1e-5)


@pytest.mark.parametrize("frozen", ["bfloat16", "int8"])
def test_the_source_is_read_by_a_base_of_few_bits(looped, frozen):
    model, params, *_ = looped
    base, adapters = split_adapters(params)
    if frozen == "int8":
        base, exact = int8.quantise(base), int8.dequantise(int8.quantise(base))
    else:
        base = jax.tree.map(lambda x: x.astype(frozen), base)
        exact = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    logits = jax.jit(model.logits)
    np.testing.assert_allclose(
        logits(join(base, adapters), BATCH), logits(join(exact, adapters), BATCH), atol=2e-4
    )


def test_the_source_pass_has_no_dropout_and_the_rest_of_the_step_has(monkeypatch):
    model = model_of(dropout_rate=0.3)
    params, whole, seen = params_of(model), source_lib.read, []

    def spied(*args):
        seen.append(whole(*args).variables)
        return whole(*args)

    monkeypatch.setattr("flix_jax.models.encoder_decoder.read", spied)
    loss = jax.jit(lambda key: (model.loss(params, BATCH, rng=key)[0], seen[-1]))
    (first, states), (second, others) = loss(jax.random.key(0)), loss(jax.random.key(1))
    assert first != second
    close(states, others, 0)


def test_input_dropout_is_drawn_for_the_source_too():
    adapters = dataclasses.replace(model_of("add").adapters, dropout=0.5)
    model = EncoderDecoder(Transformer(CONFIG), adapters)
    params = params_of(model)
    loss = jax.jit(lambda key, batch: model.loss(params, batch, rng=key)[0])
    key = jax.random.key(3)
    assert loss(key, BATCH) == loss(key, BATCH) != loss(jax.random.key(4), BATCH)
    assert loss(key, BATCH) != loss(key, NO_SOURCE)


def test_nothing_of_the_source_pass_is_kept_for_the_backward_pass_but_the_recorded_states():
    """What a backward pass keeps with the source is what it keeps with given states."""
    model = model_of("add", targets="encoder", remat="none")
    params = params_of(model)
    base, adapters = split_adapters(params)

    def kept(model):
        def pull(adapters, base, batch):
            return jax.vjp(lambda adapters: model.loss(join(base, adapters), batch)[0], adapters)[1]

        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(pull, adapters, base, BATCH)))

    source = read(model, params)
    given = kept(_Held(model.module, model.adapters, source=source))
    states = sum(x.size for x in jax.tree.leaves(source.variables))
    assert given <= kept(model) <= given + states


class Loop(nn.Module):
    """A network of another origin: an encoder with its own names, its blocks rematerialised."""

    scan: bool = False

    @nn.compact
    def encode(self, encoder_input_tokens, encoder_segment_ids=None, enable_dropout=True):
        x = nn.Embed(24, 8, name="embed")(encoder_input_tokens)
        if self.scan:
            axes = {"params": 0}
            block = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
            return block(name="blocks")(x, None)[0]
        for n in range(2):
            x, _ = nn.remat(Block)(name=f"block_{n}")(x, None)
        return x

    def __call__(self, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens, **_):
        return self.encode(encoder_input_tokens) @ jnp.ones((8, 24))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="out")(nn.relu(nn.Dense(6, name="wi")(x))), None


def test_a_loop_of_another_origin_is_fused_and_a_scan_that_cannot_be_says_so():
    spec = AdapterSpec(SPACE, ".*/(wi|out)", fusion=Fusion("mul", ".*/wi"))
    batch = {n: BATCH[n] for n in ("encoder_input_tokens", "source_input_tokens", "feature_ids")}
    fed = batch | {n: batch["encoder_input_tokens"] for n in ("decoder_input_tokens",)}
    fed["decoder_target_tokens"] = batch["encoder_input_tokens"]
    model = EncoderDecoder(Loop(), spec)
    shapes = {name: array.shape for name, array in fed.items()}
    params = jax.tree.map(lambda x: x + 0.1, nn.unbox(model.init(jax.random.key(0), shapes)))
    embedded = jax.jit(model.embed)
    other = batch | {"source_input_tokens": batch["source_input_tokens"].at[0].set(3)}
    differs = np.abs(embedded(params, batch) - embedded(params, other)).max(axis=1) > 1e-6
    assert differs.tolist() == [True] + [False] * (ROWS - 1)

    model = EncoderDecoder(Loop(scan=True), spec)
    with pytest.raises(
        ValueError, match="blocks/wi: is fused, but a scan around it does not carry"
    ):
        model.init(jax.random.key(0), shapes)


GIVEN_WIDTH = 5


def given_states():
    """States of another encoder; those of rows 2 and 5 are all masked."""
    rng = np.random.default_rng(4)
    mask = BATCH["source_input_tokens"] > 0
    states = jnp.asarray(rng.normal(size=(ROWS, SOURCES, GIVEN_WIDTH)), jnp.float32)
    plain = {name: x for name, x in BATCH.items() if name != "source_input_tokens"}
    return plain | {"source_states": states, "source_mask": mask.astype(jnp.int32)}


def test_given_states_are_projected_alike_for_all_layers():
    """They are read as if every fused layer's recorded input were their projection."""
    adapters = model_of("add").adapters
    given = dataclasses.replace(adapters, fusion=Fusion("add", source_width=GIVEN_WIDTH))
    config = dataclasses.replace(CONFIG, scan_layers=True, remat="minimal")
    model, batch = EncoderDecoder(Transformer(config), given), given_states()
    params = params_of(model)
    assert params["flix"]["source_projection"].shape == (GIVEN_WIDTH, CONFIG.emb_dim)
    loss, gradient = loss_and_gradient(model, params, batch)

    recorded = EncoderDecoder(model.module, adapters)
    rest = {name: x for name, x in params.items() if name != "flix"}
    source = read(recorded, rest)

    def by_hand(projection, states):
        projected = states @ projection
        variables = jax.tree.map(lambda x: jnp.broadcast_to(projected, x.shape), source.variables)
        held = dataclasses.replace(source, variables=variables)
        return _Held(recorded.module, adapters, source=held).loss(rest, BATCH)

    def mean(projection, states):
        total, sums = by_hand(projection, states)
        return total / sums["weight"]

    projection = params["flix"]["source_projection"]
    value, expected = jax.jit(jax.value_and_grad(mean))(projection, batch["source_states"])
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    close(gradient["flix"]["source_projection"], expected)

    base, own = split_adapters(params)
    assert "flix" in own and "flix" not in base
    by_states = jax.jit(jax.grad(lambda s: model.loss(params, batch | {"source_states": s})[0]))
    assert not np.any(by_states(batch["source_states"]))
    changed = batch["source_states"].at[5].set(9.0)
    logits = jax.jit(model.logits)
    np.testing.assert_array_equal(
        logits(params, batch | {"source_states": changed}), logits(params, batch)
    )


def test_the_projection_of_given_states_is_a_parameter_like_others(tmp_path):
    """Sharded, counted to no feature, kept where values are chosen, stored with the adapters."""
    given = AdapterSpec(
        FeatureSpace((FeatureType("task", rank=2),)), fusion=Fusion("add", source_width=6)
    )
    plain = dataclasses.replace(given, fusion=None)
    base = make_base_run(write_words(tmp_path / "data"))
    run = dataclasses.replace(base, adapters=plain, mesh=MeshSpec(data=2, fsdp=2, model=2))
    job = Job(run, tmp_path / "run")
    # A run makes no batches of given states, so what has them is made beside it.
    model = dataclasses.replace(job.model, adapters=dataclasses.replace(given, space=job.space))
    parameters = dataclasses.replace(job.parameters, model=model)
    shapes = parameters.templates[0]
    projection = shapes["flix"]["source_projection"]
    assert projection.shape == (6, run.model.emb_dim)
    assert projection.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    counts = adapter_counts(shapes, job.space)
    owned = sum(sum(of.values()) for of in counts.values())
    assert owned == count_parameters(shapes) - 6 * run.model.emb_dim
    chosen = trained_values.matching(job.space, ("task=up",), columns(job.split.train))
    assert not trained_values.mask(shapes, job.space, chosen)["flix"]["source_projection"].any()

    fresh = [jax.device_get(parameters.fresh_adapters(seed)) for seed in (0, 1)]
    leaves = {name: Leaf.of(x, name) for name, x in network.flat(fresh[0]).items()}
    names = run.adapters.targets, dataclasses.asdict(run.model), "base", run.vocabulary.digest
    flix_adapters.Adapters(leaves, job.space, None, *names, 1, fusion=given.fusion).write(
        tmp_path / "adapters"
    )
    asked = {**vars(run), "adapters": given, "adapters_from": str(tmp_path / "adapters")}
    start = starting_values.find(types.SimpleNamespace(**asked), job.space)
    taken = start.into(parameters.fresh_adapters(1), "base")["flix"]["source_projection"]
    assert np.any(fresh[0]["flix"]["source_projection"] != fresh[1]["flix"]["source_projection"])
    np.testing.assert_array_equal(taken, fresh[0]["flix"]["source_projection"])
    assert taken.sharding.spec == projection.sharding.spec


def test_given_states_must_be_of_the_width_that_is_said():
    given = AdapterSpec(SPACE, fusion=Fusion("add", source_width=GIVEN_WIDTH + 1))
    model = EncoderDecoder(Transformer(CONFIG), given)
    params = params_of(model)
    with pytest.raises(ValueError, match=r"source_states has shape \(8, 5, 5\) .* \(8, 5, 6\)"):
        model.logits(params, given_states())
    with pytest.raises(ValueError, match="batch has no 'source_mask'"):
        model.logits(params, BATCH)
    several = Fusion("add", "encoder/.*/(query|wo)", source_width=3)
    model = EncoderDecoder(Transformer(CONFIG), AdapterSpec(SPACE, fusion=several))
    with pytest.raises(ValueError, match=r"Fusion.targets: read inputs of widths \[8, 12\]"):
        model.init(jax.random.key(0), SHAPES)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source_input_tokens": None}, "batch has no 'source_input_tokens'"),
        ({"source_input_tokens": jnp.zeros((3, 5), jnp.int32)}, r"shape \(3, 5\): expected \[8,"),
        ({"source_input_tokens": jnp.zeros((8, 5))}, "dtype float32, expected integers"),
        (
            {"encoder_segment_ids": jnp.ones((8, 7), jnp.int32)},
            "batch has no 'source_segment_ids'",
        ),
    ],
)
def test_a_batch_with_another_source_is_an_error(looped, change, says):
    model, params, *_ = looped
    batch = {name: array for name, array in {**BATCH, **change}.items() if array is not None}
    with pytest.raises(ValueError, match=says):
        model.logits(params, batch)


def test_targets_of_a_fusion_must_be_adapted_layers_of_the_encoder():
    adapters = AdapterSpec(SPACE, "encoder", fusion=Fusion(targets="encoder/.*/querry"))
    with pytest.raises(ValueError, match=r"Fusion.targets: .*querry.* none of .* adapted layers"):
        EncoderDecoder(Transformer(CONFIG), adapters).init(jax.random.key(0), SHAPES)
    adapters = AdapterSpec(SPACE, "all", fusion=Fusion(targets=(".*/query",)))
    model = EncoderDecoder(Transformer(CONFIG), adapters)
    with pytest.raises(ValueError, match="decoder/layers_0/.*query is none of the layers that"):
        model.init(jax.random.key(0), SHAPES)
    offset = Fusion(targets="encoder/.*/out", layer_offset=1)
    model = EncoderDecoder(Transformer(CONFIG), AdapterSpec(SPACE, "encoder", fusion=offset))
    with pytest.raises(ValueError, match="Fusion.layer_offset = 1: encoder/layers_0/attention/out"):
        model.init(jax.random.key(0), SHAPES)
