"""A step with tables against one whose layers get the banks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_runs import SPLIT_MESH, make_base_run, write_words

from flix_jax.adapters import tables, tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.fusion import Fusion
from flix_jax.adapters.injection import AdapterSpec, Match
from flix_jax.adapters.modules import ALL, MERGED, ROWS
from flix_jax.experiments import compiled, table_kinds
from flix_jax.experiments.job import Job
from flix_jax.experiments.step_program import step_program
from flix_jax.training.axis_rules import AxisRules
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.partitioning import MeshSpec
from flix_jax.training.table_placement import TablePlacement

TYPES = (
    FeatureType("task", rank=2, dropout=0.3),
    FeatureType("language", ("x", "y", "w"), rank=4, ranks={"y": 1}),
    FeatureType("shared", ("shared",), rank=1),
)
# The words of `tiny_runs` know two tasks and three languages; two tasks divide over fsdp.
MESHES = [
    MeshSpec(data=1),
    MeshSpec(data=8),
    SPLIT_MESH,
]
# Every kind in one network, siblings of two kinds among them.
BY_LAYER = {
    "encoder/.*/mlp/.*": "merged",
    ".*/value": "banks",
    "encoder": "rows",
    "decoder/.*/self_attention/.*": "all",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    return dataclasses.replace(
        base,
        adapters=AdapterSpec(FeatureSpace(TYPES), alpha=3.0),
        optimizer=Optimizer("sgd", Schedule(learning_rate=0.3)),
    )


def one_step(run, folder):
    """(metrics, banks after, banks before as leaves) of a step from banks that are zero nowhere."""
    job = Job(run, folder, mesh=run.mesh.make(jax.devices()[: 1 if run.mesh.data == 1 else 8]))
    optimizer = job.optimizer()
    template = job.parameters.state_template(optimizer)
    trained, frozen = job.initial_parameters(None)
    leaves, structure = jax.tree.flatten(trained)
    rng = np.random.default_rng(0)
    made = [jax.device_put(rng.normal(size=x.shape) * 0.1, x.sharding) for x in leaves]
    start = [x.astype(leaf.dtype) for x, leaf in zip(made, leaves, strict=True)]
    made = jax.device_get(start)
    state = job.parameters.create_state(jax.tree.unflatten(structure, start), optimizer)
    step = step_program(job, template)
    with job.batches(job.pipeline(), 0) as batches:
        batch = dict(next(batches))
    ids = np.array(batch["feature_ids"])
    ids[0, 0] = -1  # an absent feature
    batch["feature_ids"] = jax.device_put(ids, batch["feature_ids"].sharding)
    state, metrics = step(state, frozen, batch, run.seed)
    return jax.device_get(metrics), jax.device_get(state.trained), made


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory):
    """Whether layers are scanned, dropout -> what a step with banks gives, on one device."""

    @functools.cache
    def step(scanned, dropout=0.0):
        banks = dataclasses.replace(with_dropout(run, dropout), tables="banks", mesh=MESHES[0])
        return one_step(with_layers(banks, scanned), tmp_path_factory.mktemp("banks"))

    return step


def with_dropout(run, dropout):
    """With dropout of an adapter's own input: then no two layers read the same."""
    return dataclasses.replace(run, adapters=dataclasses.replace(run.adapters, dropout=dropout))


def with_layers(run, scanned):
    return dataclasses.replace(
        run, model=dataclasses.replace(run.model, scan_layers=scanned, remat="minimal")
    )


def check(run, kind, mesh, scanned, microbatches, expected, folder, dropout=0.0):
    changed = dataclasses.replace(
        with_layers(run, scanned), tables=kind, mesh=MESHES[mesh], microbatches=microbatches
    )
    metrics, trained, _ = one_step(with_dropout(changed, dropout), folder)
    wanted, parameters, _ = expected(scanned, dropout)
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    for (path, one), (_, other) in zip(
        tree.named_leaves(trained), tree.named_leaves(parameters), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6, err_msg="/".join(path))


@pytest.mark.parametrize("kind", [*tables.KINDS, BY_LAYER], ids=str)
def test_a_step_is_that_of_banks(run, kind, expected, tmp_path):
    check(run, kind, 0, True, 2, expected, tmp_path)


@pytest.mark.exhaustive
def test_a_step_with_dropout_of_the_input_is_that_of_banks(run, expected, tmp_path):
    check(run, "rows", 0, True, 1, expected, tmp_path, dropout=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*tables.KINDS, BY_LAYER], ids=str)
@pytest.mark.parametrize(
    ("mesh", "scanned"),
    [
        pytest.param(0, False, marks=pytest.mark.exhaustive),
        pytest.param(1, True, marks=pytest.mark.exhaustive),
        (2, True),
    ],
)
def test_a_step_on_a_mesh_is_that_of_banks(run, kind, mesh, scanned, expected, tmp_path):
    check(run, kind, mesh, scanned, 1, expected, tmp_path)


@pytest.mark.exhaustive
def test_in_bfloat16_gradients_are_those_of_float32_tables(run, tmp_path):
    """Products are rounded, sums over the batch are not: as close to float32 as with banks."""
    exact, before = one_step(with_layers(run, True), tmp_path)[1:]
    errors = {}
    for kind in ("banks", *tables.KINDS):
        model = dataclasses.replace(run.model, dtype="bfloat16", scan_layers=True)
        changed = dataclasses.replace(run, model=model, tables=kind)
        found = one_step(changed, tmp_path / kind)[1]
        assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(np.float32)}
        updates = [
            (one - start, other - start)
            for one, other, start in zip(
                jax.tree.leaves(found), jax.tree.leaves(exact), before, strict=True
            )
        ]
        away = sum(float(np.sum((one - other) ** 2)) for one, other in updates)
        errors[kind] = (away / sum(float(np.sum(other**2)) for _, other in updates)) ** 0.5
    assert errors["banks"] > 1e-4  # it is rounded at all
    for kind in tables.KINDS:
        assert errors[kind] < 1.2 * errors["banks"], errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", BY_LAYER], ids=str)
def test_what_a_step_computes_on_a_tpu_is_that_of_banks(run, kind, expected, tmp_path, monkeypatch):
    """Its branches for a TPU, on a mesh of CPUs: products for gathers, orders in memory."""

    def on_tpu(*args, default=None, tpu=None, **other):
        return (tpu or default)(*args)

    expected(True)  # as on a CPU
    monkeypatch.setattr(jax.lax, "platform_dependent", on_tpu)
    check(run, kind, 2, True, 2, expected, tmp_path)


def test_shapes_and_names():
    space = FeatureSpace((FeatureType("t", ("a", "b", "c"), rank=2, slots=2), TYPES[1]))
    bank = {
        "t": {"a": np.arange(3 * 5 * 2.0).reshape(3, 5, 2), "b": np.ones((3, 2, 7))},
        "language": {"a": np.ones((3, 5, 4)), "b": np.ones((3, 4, 7))},
    }
    axes = {
        name: {"a": ("features", "embed", "rank"), "b": ("features", "rank", "mlp")}
        for name in bank
    }
    banks = {"wi": {"flix": jax.tree.map(jnp.asarray, bank)}}
    axes = {"wi": {"flix": axes}}
    every = tables.of_all(banks, axes, space)["wi"]["flix"][ALL]
    assert every["a"].shape == (3 * 2 + 3 * 4, 5) and every["b"].shape == (18, 7)
    # Value by value, and of each its columns.
    np.testing.assert_array_equal(every["a"][2:4], bank["t"]["a"][1].T)
    rows = tables.of_rows(banks, axes, space, jnp.array([[2, -1, 0], [1, 0, 2]]))
    rows = rows["wi"]["flix"][ROWS]
    assert rows["a"].shape == (2, 2 * 2 + 4, 5) and rows["b"].shape == (2, 8, 7)
    np.testing.assert_array_equal(rows["a"][0, :2], bank["t"]["a"][2].T)
    assert tables.logical_axes(axes, space, ROWS)["wi"]["flix"][ROWS] == {
        "a": ("examples", "own_columns", "embed"),
        "b": ("examples", "own_columns", "mlp"),
    }
    assert tables.logical_axes(axes, space, ALL)["wi"]["flix"][ALL]["b"] == ("columns", "mlp")


def test_siblings_share_a_leaf():
    space = FeatureSpace((FeatureType("t", ("x", "y", "z"), rank=2), TYPES[2]))
    rng = np.random.default_rng(0)
    banks = {
        f"w{i}": {
            "flix": {
                t.name: {"a": rng.normal(size=(n, 5, r)), "b": rng.normal(size=(n, r, 7))}
                for t, n, r in zip(space.types, (3, 1), (2, 1), strict=True)
            }
        }
        for i in range(3)
    }
    names = {"a": ("features", "embed", "rank"), "b": ("features", "rank", "mlp")}
    axes = tree.from_named([(p, names[p[-1]]) for p, _ in tree.named_leaves(banks)])
    banks = jax.tree.map(jnp.asarray, banks)
    siblings = [("m/w0", "m/w2")]
    made = tables.of_all({"m": banks}, {"m": axes}, space, siblings)["m"]
    assert {name: set(layer["flix"][ALL]) for name, layer in made.items()} == {
        "w0": {"w0+w2", "b"},
        "w1": {"a", "b"},
        "w2": {"b"},
    }
    apart = tables.of_all({"m": banks}, {"m": axes}, space)["m"]
    both = [apart[name]["flix"][ALL]["a"] for name in ("w0", "w2")]
    np.testing.assert_array_equal(made["w0"]["flix"][ALL]["w0+w2"], np.concatenate(both))
    ids = jnp.array([[2, 0], [0, -1]])
    made = tables.of_rows({"m": banks}, {"m": axes}, space, ids, siblings=siblings)["m"]
    apart = tables.of_rows({"m": banks}, {"m": axes}, space, ids)["m"]
    both = [apart[name]["flix"][ROWS]["a"] for name in ("w0", "w2")]
    np.testing.assert_array_equal(made["w0"]["flix"][ROWS]["w0+w2"], np.concatenate(both, axis=1))
    found = tables.logical_axes({"m": axes}, space, ROWS, siblings)["m"]
    assert found["w0"]["flix"][ROWS]["w0+w2"] == ("examples", "own_columns", "embed")
    assert set(found["w2"]["flix"][ROWS]) == {"b"}


def test_matched_modules_say_which_layers_are_narrowed_together(run, tmp_path):
    told = Job(dataclasses.replace(run, tables="rows"), tmp_path).match_table()
    for group in ("attention/query + key + value", "encoder_decoder_attention/key + value"):
        assert f"/{group}" in told.splitlines()[-1]
    assert "mlp/wi_0 + wi_1" in told.splitlines()[-1]
    for apart in (dataclasses.replace(run, tables="banks"), with_dropout(run, 0.1)):
        assert "query + key" not in Job(apart, tmp_path).match_table()
    by_layer = Job(dataclasses.replace(run, tables=BY_LAYER), tmp_path).match_table()
    assert by_layer.splitlines()[-1].endswith(
        ": encoder/encoder/attention/query + key, decoder/decoder/self_attention/query + key"
    )


def kinds_told(job):
    """By path of a module, what `matched_modules.txt` says that it multiplies with."""
    lines = [line.split() for line in job.match_table().splitlines()]
    assert lines[0] == ["module", "times", "d_in", "d_out", "parameters", "Run.tables"]
    return {line[0]: line[-1] for line in lines if line and "/" in line[0]}


def test_matched_modules_say_what_each_layer_multiplies_with(run, tmp_path):
    used = kinds_told(Job(dataclasses.replace(run, tables=BY_LAYER), tmp_path))
    assert used["encoder/encoder/mlp/wi_0"] == used["encoder/encoder/mlp/wo"] == "merged"
    assert used["encoder/encoder/attention/query"] == "rows"
    assert used["encoder/encoder/attention/value"] == "banks"
    assert used["decoder/decoder/self_attention/out"] == "all"
    assert used["decoder/decoder/self_attention/value"] == "banks"
    # 'auto', on a CPU
    assert used["decoder/decoder/mlp/wo"] == "banks"
    assert used["decoder/decoder/encoder_decoder_attention/query"] == "banks"


def test_a_tpu_has_what_pays_for_each_module(run, tmp_path, monkeypatch):
    """8 positions of the encoder's output and 6 of the decoder's, widths 16 and 32."""
    monkeypatch.setattr(table_kinds, "_platform", lambda job: "tpu")

    def used(**changed):
        mesh = MESHES[0].make(jax.devices()[:1])
        changed = dataclasses.replace(run, mesh=MESHES[0], **changed)
        return kinds_told(Job(changed, tmp_path, mesh=mesh))

    merged = ("encoder/encoder/attention/query", "encoder/encoder/attention/out")
    merged += tuple(f"decoder/decoder/encoder_decoder_attention/{n}" for n in ("key", "value"))
    beside = ("encoder/encoder/mlp/wi_0", "decoder/decoder/mlp/wo")
    beside += (
        "decoder/decoder/self_attention/key",
        "decoder/decoder/encoder_decoder_attention/out",
    )
    for found in (used(), used(frozen_dtype="bfloat16", tables="fastest")):
        assert {found[path] for path in merged} == {"merged"}
        assert {found[path] for path in beside} == {"all"}
    assert set(used(frozen_dtype="bfloat16").values()) == {"all"}
    of_mlp = used(frozen_dtype="bfloat16", tables={"mlp": "fastest", ".*/key": "rows"})
    assert of_mlp["encoder/encoder/attention/query"] == "all"
    assert of_mlp["encoder/encoder/attention/key"] == "rows"


def test_the_choice():
    many = FeatureSpace((FeatureType("f", tuple(map(str, range(30))), rank=4),))
    one = FeatureSpace((FeatureType("f", ("shared",), rank=8),))
    layer = Match("m", times=1, d_in=768, d_out=768, positions=512, parameters=0)
    choose = functools.partial(tables.choose, layer)
    assert choose(many, 1, "cpu", parameters=0) is None
    assert choose(many, 1, "tpu", parameters=0) == ROWS
    assert choose(many, 2, "tpu", parameters=0) == ALL
    assert choose(many, 29, "tpu", parameters=2**26 + 1) == ROWS
    assert choose(many, 30, "tpu", parameters=2**26 + 1) == ALL
    assert choose(one, 1, "tpu", parameters=2**30) == ALL
    wide = FeatureSpace((FeatureType("f", tuple(map(str, range(33))), rank=4),))
    assert choose(wide, 2, "tpu", parameters=0) == ROWS
    assert choose(wide, 33, "tpu", parameters=0) == ALL


@pytest.mark.parametrize(
    ("examples", "rows", "widths", "positions", "kind"),
    [
        (1, 1, (768, 2048), 512, MERGED),
        (1, 1, (4096, 4096), 128, ROWS),
        (2, 1, (768, 768), 512, MERGED),
        (2, 1, (768, 2048), 512, ALL),
        (2, 1, (768, 768), 128, ALL),
        (2, 8, (2048, 768), 128, MERGED),
    ],
)
def test_kernels_hold_the_update_where_that_pays(examples, rows, widths, positions, kind):
    space = FeatureSpace((FeatureType("f", tuple(map(str, range(30))), rank=4),))
    layer = Match("m", 1, *widths, positions=positions, parameters=0)
    choose = functools.partial(
        tables.choose, layer, space, examples, "tpu", parameters=0, rows=rows
    )
    assert choose(mergeable=True) == kind
    assert choose(mergeable=False) == (ALL if examples > 1 else ROWS)


def test_refusals(run):
    with pytest.raises(ValueError, match=r"Run.tables = 'row': .*'rows'"):
        dataclasses.replace(run, tables="row")
    with pytest.raises(ValueError, match="'rows' has no effect without Run.adapters"):
        dataclasses.replace(run, adapters=None, tables="rows")
    fused = dataclasses.replace(run.adapters, fusion=Fusion("add"))
    with pytest.raises(ValueError, match="'all' has no effect where layers are fused"):
        dataclasses.replace(run, adapters=fused, tables="all")
    with pytest.raises(ValueError, match=r"Run.tables\['mlp'\] = 'row': .*'rows'"):
        dataclasses.replace(run, tables={"encoder": "all", "mlp": "row"})
    with pytest.raises(ValueError, match=r"Run.tables\['mlp'\] = 'all' has no effect where"):
        dataclasses.replace(run, adapters=fused, tables={"mlp": "all"})
    with pytest.raises(ValueError, match=r"Run.tables\['mlp'\] = 'merged': AdapterSpec.dropout"):
        dataclasses.replace(with_dropout(run, 0.1), tables={"mlp": "merged"})
    with pytest.raises(ValueError, match=r"Run.tables: target '\(' is not a regular expression"):
        dataclasses.replace(run, tables={"(": "all"})


def test_a_target_that_matches_no_layer_is_refused(run, tmp_path):
    changed = dataclasses.replace(run, tables={"encoder": "rows", "encodr/.*": "all"})
    with pytest.raises(ValueError, match=r"Run.tables: 'encodr/\.\*' matches none of .* adapted"):
        Job(changed, tmp_path)


def test_matrices_are_taken_by_a_product_as_by_a_gather():
    """What a TPU does, here on a CPU: exact, and zero where there is no such value."""
    bank = jax.random.normal(jax.random.key(0), (5, 3, 7, 2))
    ids = jnp.array([4, 0, -1, 4, 5])
    expected = np.where(((ids < 0) | (ids > 4))[:, None, None, None], 0, bank[ids % 5])
    for axis in (0, 2):
        names = ["layers", "embed", "rank"]
        names.insert(axis, "features")
        how = tables._Take(lambda x, axes, bank: x, tuple(names), "float32")
        taken = tables._by_product(how, jnp.moveaxis(bank, 0, axis), ids)
        np.testing.assert_array_equal(np.moveaxis(taken, axis, 0), expected)


def test_tables_of_rows_move_together():
    """As many exchanges as there are widths, there and back, and every leaf is what it was."""
    rules = AxisRules(adapters=(("embed", "fsdp"), ("mlp", "fsdp")))
    mesh = MeshSpec(data=2, fsdp=4).make(jax.devices())
    place = TablePlacement(mesh, rules)
    rng = np.random.default_rng(0)
    made, names = {}, {}
    for layer, columns, width, axis in (
        ("query", 2, 16, "embed"),
        ("out", 3, 16, "embed"),
        ("wi", 2, 16, "embed"),
        ("wo", 4, 32, "mlp"),
        ("gate", 4, 32, "mlp"),
    ):
        made[layer] = rng.normal(size=(16, 3, columns, width)).astype(np.float32)
        names[layer] = (tables.EXAMPLES, "layers", tables.OWN_COLUMNS, axis)
    beside = NamedSharding(mesh, PartitionSpec("data", None, None, "fsdp"))
    in_use = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def weighted(made, weights):
        found = place.brought(made, names)
        return sum(jnp.vdot(found[layer], weights[layer]) for layer in found), found

    step = jax.jit(
        jax.value_and_grad(weighted, has_aux=True), out_shardings=((None, in_use), beside)
    )
    shapes = [
        jax.tree.map(lambda x, to=to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), made)
        for to in (beside, in_use)
    ]
    program = step.lower(*shapes).compile()
    exchanged = compiled.read(program.as_text()).collectives["all-to-all"]
    assert exchanged.count == 2 + 2  # the tables, and their gradients
    weights = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), made)
    (_, found), gradients = program(jax.device_put(made, beside), jax.device_put(weights, in_use))
    jax.tree.map(np.testing.assert_array_equal, found, made)
    jax.tree.map(np.testing.assert_array_equal, gradients, weights)
