"""Fused adapters in all that has to do with runs: files, refusals, sweeps, plans, counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import product_flops
from tiny_runs import make_base_run, write_gin, write_words

from flix_jax import configuration
from flix_jax.adapters import trained_values, tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.fusion import FUNCTIONS, MATRICES, Fusion
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data.cells import columns
from flix_jax.experiments import (
    exchange,
    feature_edits,
    flops,
    prediction,
    starting_values,
    together,
)
from flix_jax.experiments.job import Job
from flix_jax.interop import flix_adapters, network
from flix_jax.interop.leaves import Leaf
from flix_jax.tasks.source_text import SourceText

SOURCES = 5
SOURCE_TEXT = SourceText({"up": "{input}", "back": "{input}"}, length=SOURCES)
FUSED = 4  # queries and values of two layers of the encoder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    space = FeatureSpace((FeatureType("task", rank=2), FeatureType("language", rank=3)))
    spec = AdapterSpec(space, fusion=Fusion("cross_attention"))
    model = dataclasses.replace(base.model, scan_layers=False, num_encoder_layers=2)
    return dataclasses.replace(base, model=model, adapters=spec, source_text=SOURCE_TEXT)


def with_fusion(run, fusion):
    adapters = dataclasses.replace(run.adapters, fusion=fusion)
    source_text = None if fusion is None else SOURCE_TEXT
    return dataclasses.replace(run, adapters=adapters, source_text=source_text)


@pytest.fixture(scope="module")
def job(run, tmp_path_factory):
    return Job(run, tmp_path_factory.mktemp("run"))


def test_counts_tables_and_reports_know_the_matrices_of_an_attention(job):
    counts = tree.adapter_counts(job.parameters.templates[0], job.space)
    total = sum(sum(of.values()) for of in counts.values())
    assert total == tree.count_parameters(job.parameters.templates[0])
    own = {"task": 2, "language": 3}
    plain = Job(with_fusion(job.run, None), job.run_dir / "plain")
    without = tree.adapter_counts(plain.parameters.templates[0], plain.space)
    for name, of in counts.items():
        for value, count in of.items():
            assert count - without[name][value] == FUSED * 3 * own[name] ** 2
    assert f"{total:,}" in job.match_table()
    leaves = dict(tree.named_leaves(job.parameters.templates[0]))
    path = ("encoder", "layers_0", "attention", "query", "flix", "language", "key")
    assert leaves[path].shape == (2, 3, 3)
    assert sum(path[-1] in MATRICES for path in leaves) == FUSED * 2 * 3


def test_values_that_are_not_trained_keep_their_matrices(job):
    chosen = trained_values.matching(job.space, ("language=y",), columns(job.split.train))
    mask = trained_values.mask(job.parameters.templates[0], job.space, chosen)
    own = mask["encoder"]["layers_0"]["attention"]["query"]["flix"]
    languages = job.space.type("language").known_values
    assert own["language"]["query"].shape == (len(languages), 1, 1)
    assert own["language"]["query"].ravel().tolist() == [v == "y" for v in languages]
    assert not own["task"]["query"].any()


def test_a_checkpoint_belongs_to_its_fusion(job, run, tmp_path):
    identities = set()
    for function in FUNCTIONS[:2]:
        other = Job(with_fusion(run, Fusion(function)), tmp_path / function)
        with other.checkpoints(None, origin="x") as checkpoints:
            identities.add(str(checkpoints._identity))
    assert len(identities) == 2
    described = run.describe()
    assert described["adapters.fusion.function"] == "'cross_attention'"
    prints = {with_fusion(run, f).fingerprint() for f in (None, Fusion("add"), Fusion("mul"))}
    assert len(prints) == 3


def adapters_of(job):
    trained = jax.tree.map(np.asarray, job.parameters.fresh_adapters(0))
    leaves = {name: Leaf.of(x, name) for name, x in network.flat(trained).items()}
    spec = job.model.adapters
    return flix_adapters.Adapters(
        leaves,
        job.space,
        spec.alpha,
        tuple(spec.targets),
        dataclasses.asdict(job.run.model),
        "base",
        job.run.vocabulary.digest,
        3,
        spec.fusion,
    )


def test_adapters_of_ones_own_format_carry_the_fusion_and_a_run_starts_from_them(job, tmp_path):
    made = adapters_of(job)
    made.write(tmp_path)
    found = flix_adapters.read(tmp_path)
    assert found.fusion == job.model.adapters.fusion
    run = dataclasses.replace(job.run, adapters_from=str(tmp_path))
    start = starting_values.find(run, job.space)
    fresh = job.parameters.fresh_adapters(1)
    taken = start.into(fresh, "base")
    for mine, theirs in zip(jax.tree.leaves(taken), jax.tree.leaves(made.tree()), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    other = dataclasses.replace(with_fusion(run, Fusion("add")), adapters_from=str(tmp_path))
    with pytest.raises(ValueError, match="fusion is .*cross_attention.* there and .*add.* here"):
        starting_values.find(other, job.space)
    record = tmp_path / flix_adapters.RECORD
    record.write_text(record.read_text().replace("cross_attention", "crossing"))
    with pytest.raises(ValueError, match="adapters.json: Fusion.function = 'crossing'"):
        flix_adapters.read(tmp_path)


def test_edits_of_fused_adapters_are_those_that_are_defined(job, run, tmp_path):
    with pytest.raises(ValueError, match="'cross_attention' have matrices of their own"):
        feature_edits.remove(adapters_of(job), "language=y")
    plain = adapters_of(Job(with_fusion(run, Fusion("mul")), tmp_path))
    added, _ = feature_edits.add(plain, "language=w", init="copy:y")
    left, _ = feature_edits.remove(added, "language=w")
    assert left.fusion == plain.fusion
    np.testing.assert_array_equal(jax.tree.leaves(left.tree())[0], jax.tree.leaves(plain.tree())[0])
    with pytest.raises(ValueError, match="init 'mean': an update with the fusion 'mul' is no prod"):
        feature_edits.add(plain, "language=w", init="mean")


@pytest.mark.parametrize("form", ["peft", "huggingface", "t5x"])
def test_what_reads_a_source_is_not_folded_into_a_network(run, tmp_path, form):
    with pytest.raises(ValueError, match=f"format '{form}': adapters with a fusion .*format=flix"):
        exchange.export(
            run, tmp_path / "run", tmp_path / "out", form=form, features="task=up,language=y"
        )


def test_prediction_does_not_fold_and_refuses_to(job, run):
    assert not prediction._folds("auto", run, 1)
    assert prediction._folds("auto", with_fusion(run, None), 1)
    with pytest.raises(ValueError, match="fold 'always': adapters with a fusion"):
        prediction._folds("always", run, 1)
    trained, frozen = job.parameters.templates
    with pytest.raises(ValueError, match="read a source text"):
        tree.fold(frozen, trained, job.model.adapters, {"task": "up"})


def test_functions_are_an_axis_of_a_sweep_each_with_a_program(run):
    def variant(function, rank):
        fused = with_fusion(run, None if function is None else Fusion(function))
        types = tuple(dataclasses.replace(t, rank=rank) for t in fused.adapters.space.types)
        space = dataclasses.replace(fused.adapters.space, types=types)
        adapters = dataclasses.replace(fused.adapters, space=space)
        return dataclasses.replace(fused, adapters=adapters)

    functions = (None, *FUNCTIONS)
    runs = [variant(function, rank) for function in functions for rank in (1, 2)]
    groups = together.programs(runs, 16)
    assert sorted(groups) == [[2 * i, 2 * i + 1] for i in range(len(functions))]
    reasons = together.reasons(runs, groups)
    assert all("adapters.fusion" in reason for reason in reasons[1:])


def test_gin_names_a_fusion(tmp_path, monkeypatch):
    monkeypatch.chdir(write_gin(tmp_path))
    bindings = ["DATA_DIR='data'", "AdapterSpec.fusion=@Fusion()", "Fusion.function='mul'"]
    bindings += ["Run.source_text=@SourceText()", "base/Run.source_text=None"]
    spec = configuration.load(["run.gin"], bindings).build("Run").adapters
    assert spec.fusion == Fusion("mul")
    with pytest.raises(ValueError, match="Fusion.function = 'mull'.*did you mean 'mul'"):
        configuration.load(["run.gin"], [*bindings, "Fusion.function='mull'"]).build("Run")


@pytest.mark.parametrize("function", ["add", "cross_attention", "cross_attention_from_target"])
def test_flops_count_the_source_pass_and_what_reads_it(run, tmp_path, function):
    def forward(run):
        job = Job(run, tmp_path)
        trained, frozen = job.parameters.templates
        shapes = job.batch_shapes(run.batch_size)
        batch = {name: jnp.ones(shape, jnp.int32) for name, shape in shapes.items()}
        params = tree.join(frozen, trained)
        loss = jax.make_jaxpr(lambda params: job.model.loss(params, batch)[0])(params)
        return job, product_flops(loss.jaxpr)

    plain, plain_forward = forward(with_fusion(run, None))
    sourced, sourced_forward = forward(with_fusion(run, Fusion(function)))
    # What is fused reads the source by A once more, with a gradient of A; the attention is as of
    # an adapter, three times; the pass itself is forward alone.
    config, rows = run.model, run.batch_size
    tokens, sources = rows * run.inputs_length, rows * SOURCES
    width, ranks = config.emb_dim, (2, 3)
    downs = 4 * 2 * sources * width * sum(ranks)
    attention = 0
    if function != "add":
        others = sources if function == "cross_attention_from_target" else tokens
        projected = 2 * (tokens + 2 * others) * sum(r * r for r in ranks)
        looked = 2 * 2 * tokens * others // rows * sum(ranks)
        # the matrices of a row are picked by a product with one-hot ids, which is no FLOP asked for
        picked = 3 * 2 * rows * sum(2 * r * r for r in ranks)
        attention = 4 * (projected + looked)
        sourced_forward -= 4 * picked
    passed = sourced_forward - plain_forward - downs - attention
    kernel = 4 * width * config.num_heads * config.head_dim + 3 * width * config.mlp_dim
    scores = 4 * rows * SOURCES**2 * config.num_heads * config.head_dim
    assert passed == 2 * (2 * sources * kernel + scores)
    expected = flops.model_flops(plain) + passed + 2 * downs + 3 * attention
    assert flops.model_flops(sourced) == expected
