"""`flix features`, and runs that start from its values and train some of them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import MODEL, make_base_run, write_gin, write_words

from flix_jax import cli
from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data.cells import Mixture
from flix_jax.experiments import (
    feature_edits,
    inference,
    starting_values,
    together,
    training,
)
from flix_jax.experiments.job import Job
from flix_jax.interop import flix_adapters, network, peft
from flix_jax.interop.leaves import Leaf
from flix_jax.training.optimizers import Optimizer, Schedule

ALPHA = 3.0
TABLE = "language\tfamily\nx\tAba\ny\tBab\nz\tAba\nq\tCac\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    types = (FeatureType("task", rank=2, ranks={"up": 1}), FeatureType("language", rank=3))
    return dataclasses.replace(
        make_base_run(write_words(tmp_path_factory.mktemp("data"))),
        adapters=AdapterSpec(FeatureSpace(types), "mlp", alpha=ALPHA),
        optimizer=Optimizer("adamw", Schedule(learning_rate=1e-2), 0.1, clip_norm=0.1),
        total_steps=4,
        save_every=2,
    )


def random_adapters(scan, encoder_layers=2, targets="all", base="base", vocabulary="words"):
    """Adapters as training might leave them."""
    model = dataclasses.replace(MODEL, scan_layers=scan, num_encoder_layers=encoder_layers)
    task = FeatureType("task", ("up", "back"), rank=2, ranks={"up": 1})
    space = FeatureSpace((task, FeatureType("language", ("x", "y"), rank=3, dropout=0.1)))
    rng = np.random.default_rng(0)
    apart = {}
    for name, shape in network.shapes(model).items():
        layer, _, last = name.rpartition("/")
        if last != "kernel" or not AdapterSpec(space, targets).matching(layer):
            continue
        for t in space.types:
            inside = np.arange(t.max_rank) < np.array(t.value_ranks)[:, None]
            a = rng.normal(size=(t.num_values, shape[0], t.max_rank)) * inside[:, None, :]
            b = rng.normal(size=(t.num_values, t.max_rank, shape[1])) * inside[:, :, None]
            for side, half in (("a", a), ("b", b)):
                apart[f"{layer}/flix/{t.name}/{side}"] = Leaf.of(half.astype(np.float32))
    banks = network.scanned_as(apart, model)
    record = dataclasses.asdict(model)
    return flix_adapters.Adapters(banks, space, ALPHA, (targets,), record, base, vocabulary, 7)


@pytest.fixture(params=[False, True], ids=["loop", "scan"])
def adapters(request):
    return random_adapters(request.param)


def update_of(adapters, type_name, value):
    """{dense layer: the update of a value, s A B}, of scanned layers with the stack before it."""
    t = adapters.space.type(type_name)
    place, found = t.values.index(value), {}
    for name, leaf in adapters.banks.items():
        layer, _, side = name.rpartition(f"/flix/{type_name}/")
        if layer and side == "a":
            a = leaf.read()[place].astype(np.float64)
            b = adapters.banks[f"{layer}/flix/{type_name}/b"].read()[place]
            found[layer] = adapters.alpha / t.value_ranks[place] * (a @ b)
    return found


def assert_others_kept(before, after):
    for t in before.space.types:
        kept = after.space.type(t.name)
        for value, rank in zip(t.values, t.value_ranks, strict=True):
            if value not in kept.values:
                continue
            assert kept.value_ranks[kept.values.index(value)] == rank
            for name, leaf in before.banks.items():
                if f"/flix/{t.name}/" in name:
                    rows = [
                        x.read()[of.values.index(value)]
                        for x, of in ((leaf, t), (after.banks[name], kept))
                    ]
                    if name.endswith("a"):
                        rows = [row[..., :rank] for row in rows]
                    else:
                        rows = [row[..., :rank, :] for row in rows]
                    assert rows[0].tobytes() == rows[1].tobytes(), name


@pytest.mark.parametrize(
    ("options", "said", "rank", "dropout"),
    [
        ({}, "language=z added as an update of zero at rank 3, 3 values of language", 3, 0.1),
        ({"init": "copy:y"}, "added as a copy of y at rank 3", 3, 0.1),
        ({"init": "mean", "rank": 6, "dropout": 0.5}, "mean of x, y (keeps 100 % of", 6, 0.5),
        ({"init": "mean:y"}, "added as the mean of y (keeps 100 % of the norm) at rank 3", 3, 0.1),
        ({"init": "family-mean"}, "added as the mean of x (keeps 100 % of", 3, 0.1),
    ],
)
def test_a_value_starts_as_it_is_told(adapters, options, said, rank, dropout, tmp_path):
    (tmp_path / "table.tsv").write_text(TABLE)
    table = str(tmp_path / "table.tsv")
    found, line = feature_edits.add(adapters, "language=z", languages=table, **options)
    assert said in line
    t = found.space.type("language")
    assert t.values == ("x", "y", "z")
    assert (t.value_ranks[-1], t.value_dropouts[-1]) == (rank, dropout)
    assert_others_kept(adapters, found)
    shares = {"copy:y": (0, 1), "mean": (0.5, 0.5), "mean:y": (0, 1), "family-mean": (1, 0)}
    x, y, z = (update_of(found, "language", value) for value in "xyz")
    for path, update in z.items():
        of_x, of_y = shares.get(options.get("init"), (0, 0))
        np.testing.assert_allclose(update, of_x * x[path] + of_y * y[path], atol=1e-4)
    assert any(np.abs(update).max() > 1 for update in y.values())


def test_a_lora_of_peft_becomes_a_value(adapters, tmp_path):
    config = dataclasses.replace(MODEL, scan_layers=False, num_encoder_layers=2)
    shapes = network.shapes(config)
    rng = np.random.default_rng(1)
    layers = {
        f"encoder/layers_{i}/attention/{n}": r
        for i in (0, 1)
        for n, r in (("query", 2), ("value", 4))
    }
    lora = {}
    for name, rank in layers.items():
        d_in, d_out = shapes[f"{name}/kernel"]
        halves = (
            rng.normal(size=shape).astype(np.float32) for shape in ((d_in, rank), (rank, d_out))
        )
        lora[name] = peft.LowRank(*halves)
    peft.write(lora, config, tmp_path / "lora")
    found, line = feature_edits.add(adapters, "language=z", init=f"peft:{tmp_path / 'lora'}")
    adapted = len({n.rpartition("/flix/")[0] for n in network.unscanned(adapters.banks)})
    assert "at rank 4, 3 values" in line
    assert f"({adapted - 4} of {adapted} adapted layers are not in it)" in line
    assert_others_kept(adapters, found)
    scan = found.model["scan_layers"]
    for path, update in update_of(found, "language", "z").items():
        stack = update if scan else [update]
        for i, one in enumerate(stack):
            name = path.replace("encoder/encoder", f"encoder/layers_{i}")
            expected = lora[name].a.astype(np.float64) @ lora[name].b if name in lora else 0.0
            np.testing.assert_allclose(one, np.broadcast_to(expected, one.shape), atol=1e-4)
    # What is not of the LoRA can be trained: a is not zero.
    place = found.space.type("language").values.index("z")
    a = [leaf.read()[place] for name, leaf in found.banks.items() if name.endswith("language/a")]
    assert all((one[..., :4] != 0).all() for one in a)
    narrow = dataclasses.replace(
        adapters,
        targets=("mlp",),
        banks={name: leaf for name, leaf in adapters.banks.items() if "/mlp/" in name},
    )
    with pytest.raises(
        ValueError, match="has an update of encoder/layers_0/attention/.* not adapt"
    ):
        feature_edits.add(narrow, "language=z", init=f"peft:{tmp_path / 'lora'}")


@pytest.mark.parametrize(
    ("feature", "options", "message"),
    [
        ("language", {}, "feature 'language': expected type=value"),
        ("langage=z", {}, "no type 'langage'; did you mean 'language'"),
        ("language=x", {}, "language=x: is there already, expected a new language"),
        ("language=z", {"init": "men"}, "unknown init 'men'; did you mean 'mean'"),
        ("language=z", {"init": "copy"}, "init 'copy': expected copy:A VALUE"),
        ("language=z", {"init": "copy:w"}, "'w' is no language"),
        ("language=z", {"init": "zeros:x"}, "nothing stands behind zeros"),
        ("language=z", {"init": "copy:x", "rank": 2}, "rank 2 has no effect on init 'copy:x'"),
        ("language=z", {"rank": 0}, "rank is 0, expected at least 1"),
        ("language=z", {"dropout": 1.5}, "value 'z': dropout is 1.5"),
        ("language=a,b", {}, "expected a name without commas"),
        ("language=a\nb", {}, "expected a name without commas and line breaks"),
        ("language=x:2", {}, "would be read as language=x with a weight"),
        ("language=z", {"init": "mean:x,x"}, "names a value more than once"),
        ("language=q", {"init": "family-mean"}, "is of the family Cac; there is: Aba, Bab"),
        ("language=w", {"init": "family-mean"}, "table.tsv has no row for 'w'"),
        ("task=z", {"init": "family-mean"}, "is of languages, expected language=..., not task"),
    ],
)
def test_a_value_that_cannot_be_is_refused(feature, options, message, tmp_path):
    (tmp_path / "table.tsv").write_text(TABLE)
    with pytest.raises(ValueError, match=message) as error:
        feature_edits.add(
            random_adapters(True), feature, languages=str(tmp_path / "table.tsv"), **options
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "other"}, "base is 'base' in a and 'other' in b"),
        ({"alpha": None}, "alpha is 3.0 in a and None in b"),
        ({"targets": ("mlp",)}, "targets is"),
        ({"model": dataclasses.asdict(MODEL)}, "b: T5Config.num_encoder_layers is 1 there and 2"),
    ],
)
def test_adapters_of_other_networks_are_not_united(changes, message):
    one = random_adapters(True)
    with pytest.raises(ValueError, match=message):
        feature_edits.merge([("a", one), ("b", dataclasses.replace(one, **changes))])
    with pytest.raises(ValueError, match="1 adapters, expected two or more"):
        feature_edits.merge([("a", one)])


def test_commands_edit_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random_adapters(True).write("a")

    def flix(line):
        status = cli.main(["features", *line.split()])
        return status, *capsys.readouterr()

    assert flix("add language=z --from=a --out=b --init=copy:x") == (
        0,
        "b: language=z added as a copy of x at rank 3, 3 values of language\n",
        "",
    )
    assert flix("add language=w --from=a --out=c --rank=5 --dropout=0.2 --seed=1")[0] == 0
    status, out, _ = flix("merge --from=b --from=c --out=d")
    assert (status, out) == (0, "d: 2 adapters united, 2 values of task, 4 values of language\n")
    assert flix("remove language=x --from=d --out=e")[1] == (
        "e: language=x removed, 3 values of language\n"
    )
    status, table, _ = flix("list --from=e")
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["type", "value", "rank", "dropout", "norm", "parameters"]
    assert [row[:4] for row in rows[2:]] == [
        ["task", "up", "1", "0"],
        ["task", "back", "2", "0"],
        ["language", "y", "3", "0.1"],
        ["language", "z", "3", "0.1"],
        ["language", "w", "5", "0.2"],
    ]
    assert float(rows[-1][4]) == 0 and float(rows[-2][4]) > 0
    adapters = flix_adapters.read("e")
    norm = np.sqrt(sum(np.sum(u**2) for u in update_of(adapters, "language", "z").values()))
    assert float(rows[-2][4]) == pytest.approx(norm, rel=1e-3)
    for line, message in (
        ("remove language=yy --from=e --out=f", "'yy' is no language; did you mean 'y'"),
        ("remove language=y --from=e --out=d", "d: is there already, expected a new or empty"),
        ("add language=v --from=nowhere --out=f", "nowhere holds no adapters: there is no adapt"),
        ("add language=v --from=a --out=f --init=peft:a", "a: no adapter_config.json"),
        ("ad language=v", "unknown command 'features ad'; did you mean 'add'"),
        ("list", "the following arguments are required: --from"),
    ):
        status, out, error = flix(line)
        assert (status, out) == (2, "") and message in error and error.count("\n") == 1
    assert not (tmp_path / "f").exists()


@pytest.mark.exhaustive
def test_a_run_gives_its_adapters_and_another_starts_from_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write_gin(tmp_path))
    train = ["train", "--gin_file=run.gin", "--gin.DATA_DIR='data'"]
    assert cli.main([*train, "--run_dir=run"]) == 0
    assert cli.main(["export", "--run_dir=run", "--out=flix", "--format=flix"]) == 0
    capsys.readouterr()
    tables = []
    for folder in ("run", "flix"):
        assert cli.main(["features", "list", f"--from={folder}"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and "language      y" in tables[0]
    start = ["--gin.Run.adapters_from='flix'", "--gin.Run.train_values=('language=y',)"]
    assert cli.main([*train, *start, "--run_dir=second"]) == 2
    assert "base/Run.adapters_from = None" in capsys.readouterr().err
    start += [f"--gin.base/Run.{name}=None" for name in ("adapters_from", "train_values")]
    assert cli.main([*train, *start, "--run_dir=second"]) == 0
    assert "adapters start from the values of flix: 2 of task, 2 of language" in (
        capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def grown(run, tmp_path_factory):
    """A folder whose languages are x, y and z, the last of another rank."""
    adapters = random_adapters(True, 1, "mlp", f"random, seed {run.seed}", run.vocabulary.digest)
    adapters, _ = feature_edits.add(adapters, "language=z", init="mean", rank=5)
    folder = tmp_path_factory.mktemp("adapters") / "grown"
    adapters.write(folder)
    return folder


@pytest.fixture(scope="module")
def second(run, grown):
    """A run in which z alone is trained; it has its languages in another order."""
    languages = FeatureType("language", ("z", "x", "y"), rank=3, ranks={"z": 5})
    tasks = dataclasses.replace(run.adapters.space.types[0], values=("back", "up"))
    return dataclasses.replace(
        run,
        mixture=Mixture(include=("*/{x,z}",), held_out=("up/x",)),
        adapters=dataclasses.replace(run.adapters, space=FeatureSpace((tasks, languages))),
        adapters_from=str(grown),
        train_values=("language=z",),
    )


def as_adapters(job, trained):
    leaves = {name: Leaf.of(np.asarray(x)) for name, x in network.flat(trained).items()}
    return flix_adapters.Adapters(leaves, job.space, ALPHA, ("all",), {}, "", "", 0)


def test_a_value_is_trained_beside_others_that_keep_their_bits(second, grown, tmp_path, capsys):
    start = flix_adapters.read(grown)
    job = training.train(dataclasses.replace(second, total_steps=2), tmp_path)
    said = capsys.readouterr().err
    assert f"adapters start from the values of {grown}: 2 of task, 3 of language\n" in said
    counts = tree.adapter_counts(start.tree(), start.space)["language"]
    assert f"{counts['z']:,} parameters trained (1 of 5 features)" in said
    assert training.trained_parameters(job) == counts["z"]
    end = as_adapters(job, inference.restore(job)[0])
    assert_others_kept(feature_edits.remove(start, "language=z")[0], end)
    before, after = update_of(start, "language", "z"), update_of(end, "language", "z")
    assert all(np.abs(after[path] - before[path]).max() > 1e-4 for path in before)


@pytest.mark.exhaustive
def test_a_restarted_run_is_the_run_bit_for_bit_and_needs_the_folder_no_more(
    second, grown, tmp_path
):
    optimizer = dataclasses.replace(second.optimizer, name="adafactor")
    run = dataclasses.replace(second, optimizer=optimizer)
    training.train(dataclasses.replace(run, total_steps=2), tmp_path / "parts")
    jobs = [training.train(run, tmp_path / "whole")]
    start = flix_adapters.read(grown)
    expected = feature_edits.remove(start, "language=z")[0]
    shutil.move(grown, grown.with_name("away"))
    try:
        jobs.append(training.train(run, tmp_path / "parts"))
    finally:
        shutil.move(grown.with_name("away"), grown)
    states = [inference.restore(job) for job in jobs]
    assert [step for *_, step in states] == [4, 4]
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)
    assert_others_kept(expected, as_adapters(jobs[0], states[0][0]))


def test_rows_are_placed_by_name_whatever_the_sharding(second, grown):
    job = Job(second, grown / "none")
    template = job.parameters.templates[0]
    start = flix_adapters.read(grown)
    for part in (None, 2):

        def sharded(leaf, part=part):
            axes = [None] * len(leaf.shape)
            axes[-1] = None if part is None else "model"
            divides = part is None or leaf.shape[-1] % part == 0
            mesh = jax.make_mesh((part or 1,), ("model",), devices=jax.devices()[: part or 1])
            spec = jax.sharding.PartitionSpec(*(axes if divides else ()))
            return jax.device_put(jnp.full(leaf.shape, 7.0), jax.sharding.NamedSharding(mesh, spec))

        fresh = jax.tree.map(sharded, template)
        found = job.start.into(fresh, start.base)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(fresh), strict=True):
            assert one.sharding == other.sharding
        assert_others_kept(start, as_adapters(job, found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "0" * 8}, "its base is '00000000' there and 'random, seed 0' here"),
        ({"alpha": 2.0}, "alpha is 2.0 there and 3.0 here"),
        ({"targets": ["all"]}, r"targets is \('all',\) there and \('mlp',\) here"),
        ({"vocabulary": "w"}, "vocabulary is 'w' there and"),
        ({"model": {"emb_dim": 8}}, "adapters.json: missing a required argument: 'vocab_size'"),
    ],
)
def test_values_of_other_adapters_are_refused(change, message, second, grown, tmp_path):
    shutil.copytree(grown, tmp_path / "other")
    path = tmp_path / "other" / flix_adapters.RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    other = dataclasses.replace(second, adapters_from=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=message) as error:
        if "base" in change:
            job = Job(other, tmp_path / "run")
            job.start.into({}, job.base_digest(None))
        else:
            training.train(other, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def with_languages(run, values, **ranks):
    task, _ = run.adapters.space.types
    space = FeatureSpace((task, FeatureType("language", values, rank=3, ranks=ranks)))
    return dataclasses.replace(run, adapters=dataclasses.replace(run.adapters, space=space))


def test_what_is_not_there_starts_freshly_and_what_is_not_wanted_is_left(second, grown):
    other = with_languages(second, ("x", "v"))
    line = starting_values.find(other, other.adapters.space).line()
    assert line.endswith("1 of language; fresh: language=v; left out: language=y, language=z")
    wrong = with_languages(second, ("x", "z"))
    with pytest.raises(ValueError, match="language=z has rank 5 there and 3 here"):
        starting_values.find(wrong, wrong.adapters.space)
    space = FeatureSpace((FeatureType("tongue", ("x",)),))
    with pytest.raises(ValueError, match="has none of the run's features, tongue=x"):
        starting_values.find(second, space)
    missing = dataclasses.replace(second, adapters_from=str(grown / "none"))
    with pytest.raises(ValueError, match="Run.adapters_from: .*none: no adapters.json"):
        starting_values.find(missing, second.adapters.space)


def test_what_has_no_effect_is_refused(run, second, tmp_path):
    for name, value in (("adapters_from", "x"), ("train_values", ("x",))):
        with pytest.raises(ValueError, match=f"Run.{name} has no effect without Run.adapters"):
            dataclasses.replace(run, adapters=None, **{name: value})
    with pytest.raises(ValueError, match=r"Run.train_values = \(\): expected patterns"):
        dataclasses.replace(run, train_values=())
    with pytest.raises(ValueError, match=r"Run.train_values: 'language=zz' .* 'language=z'"):
        Job(dataclasses.replace(second, train_values=("language=zz",)), tmp_path)
    says = "'language=y' matches no feature that is trained on: there is: task=back"
    with pytest.raises(ValueError, match=says):
        Job(dataclasses.replace(second, train_values=("language=y",)), tmp_path)


def test_such_runs_are_programs_of_their_own_and_older_ones_are_what_they_were(run, second):
    some = dataclasses.replace(run, train_values=("language=x",))
    slower = dataclasses.replace(run.optimizer, schedule=Schedule(learning_rate=1e-3))
    runs = [run, dataclasses.replace(run, optimizer=slower), some, some, second]
    assert together.programs(runs, 9) == [[0, 1], [2], [3], [4]]
    assert together.why_apart(run, some) == "some values alone are trained"
    assert together.why_apart(run, second) == "its adapters start from a folder"
    assert {"adapters_from", "train_values"} <= run.defaults()
    assert run.fingerprint() != some.fingerprint()
