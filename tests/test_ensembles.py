"""Ensembles of adapters trained apart: means of weights and logits against NumPy and each alone."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_runs import MODEL

from flix_jax.adapters import tree
from flix_jax.adapters.activation import activate
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data.cells import Cell, CellSplit, Mixture
from flix_jax.data.vocabularies import ByteVocabulary
from flix_jax.experiments import ensembles, inference, training
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import Evaluation, Run
from flix_jax.models import decoding
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer
from flix_jax.tasks.xtreme_up import XtremeUp
from flix_jax.training.optimizers import Optimizer, Schedule

ROWS, INPUT_LENGTH, LENGTH, RANK, ALPHA = 6, 9, 7, 2, 4.0
CELLS = ("a/x", "a/y", "b/x", "b/y")
ONE = FeatureSpace((FeatureType("cell", CELLS, rank=RANK),))
MANY = FeatureSpace((FeatureType("cell", CELLS, rank=RANK, slots=3, combine="mean"),))
# Seen cells, ensembles of two and three, with padding before, between and after, and no member.
IDS = np.array(
    [[1, -1, -1], [0, 3, -1], [2, 1, 0], [-1, -1, -1], [-1, 2, -1], [-1, 3, 1]], np.int32
)


@pytest.fixture(scope="module")
def case():
    """(one adapter a row, an ensemble by weights, one by logits), parameters, a batch."""
    network = Transformer(
        T5Config(
            vocab_size=40,
            emb_dim=16,
            num_heads=2,
            head_dim=8,
            mlp_dim=32,
            num_encoder_layers=1,
            num_decoder_layers=1,
        )
    )
    one = EncoderDecoder(network, AdapterSpec(ONE, alpha=ALPHA))
    weights = EncoderDecoder(network, AdapterSpec(MANY, alpha=ALPHA))
    logits = dataclasses.replace(one, members=3)
    rng = np.random.default_rng(0)
    shapes = {
        "encoder_input_tokens": (ROWS, INPUT_LENGTH),
        "decoder_input_tokens": (ROWS, LENGTH),
        "decoder_target_tokens": (ROWS, LENGTH),
        "feature_ids": (ROWS, 1),
    }
    templates = jax.eval_shape(lambda key: one.init(key, shapes), jax.random.key(0))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        scale, offset = (0.2, 1.0) if "scale" in name else (0.2 if "flix" in name else 0.3, 0.0)
        return jnp.asarray(offset + scale * rng.normal(size=leaf.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, nn.unbox(templates))
    inputs = rng.integers(2, 40, (ROWS, INPUT_LENGTH))
    inputs[1, 6:] = 0
    targets = rng.integers(2, 40, (ROWS, LENGTH))
    shifted = np.concatenate([np.zeros((ROWS, 1), int), targets[:, :-1]], axis=1)
    arrays = (inputs, shifted, targets, IDS)
    batch = {name: jnp.asarray(a, jnp.int32) for name, a in zip(shapes, arrays, strict=True)}
    return one, weights, logits, params, batch


def predict(model, params, batch):
    return np.asarray(jax.jit(lambda p, b: model.predict(p, b, max_length=LENGTH))(params, batch))


def row_of(batch, row, **changed):
    return {name: array[row : row + 1] for name, array in batch.items()} | changed


def folded_by_numpy(params, members):
    """The base's parameters with the mean of the members' updates added, no adapters."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(params).items()}
    plain = {path: leaf for path, leaf in flat.items() if "flix" not in path}
    for path in [path for path in flat if path[-3:] == ("flix", "cell", "a")]:
        a, b = flat[path], flat[(*path[:-1], "b")]
        kernel = (*path[:-3], "kernel")
        for m in members:
            update = ALPHA / RANK * a[m] @ b[m] / len(members)
            plain[kernel] = plain[kernel] + update.reshape(plain[kernel].shape)
    return unflatten_dict({path: jnp.asarray(x, jnp.float32) for path, x in plain.items()})


def present(ids):
    return [int(i) for i in ids if i >= 0]


def test_the_mean_of_weights_is_that_folded_into_the_base_by_hand(case):
    one, weights, _, params, batch = case
    network = EncoderDecoder(one.module)
    logits = jax.jit(weights.logits)(params, batch)
    tokens = predict(weights, params, batch)
    for row, ids in enumerate(IDS):
        plain = folded_by_numpy(params, present(ids))
        single = row_of(batch, row)
        expected = network.logits(plain, single)[0]
        np.testing.assert_allclose(logits[row], expected, atol=1e-5)
        np.testing.assert_array_equal(tokens[row], predict(network, plain, single)[0])
        assert len(set(tokens[row].tolist())) > 1


def test_folding_takes_the_mean_too(case):
    _, weights, _, params, batch = case
    base, adapters = tree.split_adapters(params)
    folded = tree.fold(base, adapters, weights.adapters, {"cell": ("b/x", "a/y", "a/x")})
    expected = flatten_dict(folded_by_numpy(params, [2, 1, 0]))
    for path, leaf in flatten_dict(folded).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5)


def test_the_mean_of_logits_is_that_of_the_members_run_alone(case):
    one, _, model, params, batch = case
    tokens = predict(model, params, batch)
    run = jax.jit(one.logits)
    for row, ids in enumerate(IDS):
        decoded = np.zeros((1, LENGTH), np.int32)
        for step in range(LENGTH):
            shifted = np.concatenate([np.zeros((1, 1), np.int32), decoded[:, :-1]], axis=1)
            real = (np.arange(LENGTH) <= step).astype(np.int32)[None]
            alone = [
                run(
                    params,
                    row_of(
                        batch,
                        row,
                        decoder_input_tokens=jnp.asarray(shifted),
                        decoder_target_tokens=jnp.asarray(real),
                        feature_ids=jnp.asarray([[member]], jnp.int32),
                    ),
                )[0, step]
                for member in present(ids) or [-1]
            ]
            decoded[0, step] = np.argmax(np.mean(alone, axis=0))
            if decoded[0, step] == 1:
                break
        np.testing.assert_array_equal(tokens[row], decoded[0])


def test_logits_are_the_mean_of_those_of_the_members(case, monkeypatch):
    one, _, model, params, batch = case
    inputs, seen = batch["decoder_input_tokens"], []

    def forced(tokens_to_logits, cache, rows, max_length, eos_id, *, finished):
        """Decodes given tokens and keeps the logits [rows, length, vocab]."""
        steps = []
        for step in range(max_length):
            logits, cache = tokens_to_logits(inputs[:, step], cache)
            steps.append(logits)
        seen.append(np.asarray(jnp.stack(steps, axis=1)))
        return jnp.zeros((rows, max_length), jnp.int32)

    monkeypatch.setattr(decoding, "greedy", forced)
    for i in range(-1, len(CELLS)):
        ids = jnp.full((ROWS, 1), i, jnp.int32)
        one.predict(params, dict(batch, feature_ids=ids), max_length=LENGTH)
    model.predict(params, batch, max_length=LENGTH)
    *alone, got = seen
    for row, ids in enumerate(IDS):
        expected = np.mean([alone[i + 1][row] for i in present(ids) or [-1]], axis=0)
        np.testing.assert_allclose(got[row], expected, atol=1e-5)


@pytest.mark.parametrize("kind", [1, 2])
def test_one_member_is_the_plain_run_wherever_the_padding_is(case, kind):
    one, params, batch = case[0], case[3], case[4]
    cells = jnp.asarray([[0], [1], [2], [3], [-1], [0]], jnp.int32)
    plain = predict(one, params, dict(batch, feature_ids=cells))
    for place in range(3):
        ids = jnp.full((ROWS, 3), -1, jnp.int32).at[:, place].set(cells[:, 0])
        got = predict(case[kind], params, dict(batch, feature_ids=ids))
        np.testing.assert_array_equal(got, plain)


def test_the_mean_of_logits_is_refused_but_for_greedy_decoding(case):
    model, params, batch = case[2:]
    message = "members = 3: the mean of logits is for greedy decoding"
    with pytest.raises(ValueError, match=message):
        model.predict_n(params, batch, max_length=LENGTH, beams=2)
    with pytest.raises(ValueError, match=message):
        model.loss(params, batch)
    with pytest.raises(ValueError, match="expected adapters of one slot"):
        dataclasses.replace(case[1], members=2)


def test_weights_of_a_mean_are_divided_by_the_values_present():
    space = FeatureSpace((FeatureType("task", ("t",)), *MANY.types))
    ids = np.array([[0, 1, 2, -1], [-1, -1, -1, -1], [0, 3, -1, -1]], np.int32)
    np.testing.assert_array_equal(
        activate(space, ids).weights, [[1, 0.5, 0.5, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    )


def test_combine_is_kept_compared_and_checked():
    assert FeatureSpace.from_json(MANY.to_json()) == MANY
    assert "combine" not in ONE.to_json()  # the text of older checkpoints
    assert FeatureSpace.from_json(ONE.to_json()) == ONE
    summed = FeatureSpace((dataclasses.replace(MANY.types[0], combine="sum"),))
    assert MANY.difference(summed) == "feature type 'cell': combine is 'mean' here and 'sum' there"
    with pytest.raises(ValueError, match="combine is 'maen', .* did you mean 'mean'"):
        FeatureType("cell", combine="maen")


@pytest.mark.parametrize(
    ("of", "names"), [("related", CELLS[:3]), ("task", CELLS[:2]), ("language", ("b/x",))]
)
def test_members_share_task_or_language_and_a_trained_cell_has_itself(of, names):
    trained = tuple(Cell(*name.split("/")) for name in CELLS if name != "a/x")
    unseen = Cell("a", "x")
    split = CellSplit(trained, (unseen, Cell("c", "z")))
    space = FeatureSpace((FeatureType("cell", CELLS[1:]),))
    expected = tuple(name for name in names if name != "a/x")
    assert ensembles.members(unseen, split, space, of) == expected
    assert ensembles.members(trained[0], split, space, of) == (trained[0].name,)
    assert ensembles.members(split.held_out[1], split, space, of) == ()


# From records to scores.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`up/x` has two members of its language and task, `low/z` of its task, `odd/w` none."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    names = ("up/x", "up/y", "low/x", "low/y", "low/z", "odd/w")
    for task, language in (name.split("/") for name in names):
        for split in ("train", "validation"):
            words = ["".join(rng.choice(list("abcd"), 4)) for _ in range(5)]
            path = root / task / split / f"{language}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"input": word, "target": word.upper()}) for word in words]
            path.write_text("\n".join(lines) + "\n")
    return Run(
        model=dataclasses.replace(MODEL, dropout_rate=0.0, scan_layers=False),
        source=XtremeUp(str(root)),
        vocabulary=ByteVocabulary(),
        mixture=Mixture(held_out=("up/x", "low/z", "odd/w"), overlap="ignore"),
        adapters=AdapterSpec(FeatureSpace((FeatureType("cell", rank=2),))),
        inputs_length=8,
        targets_length=6,
        total_steps=3,
        batch_size=8,
        optimizer=Optimizer("sgd", Schedule(learning_rate=1.0)),
        save_every=3,
        log_every=1,
        evaluation=Evaluation(batch_size=8),
    )


def with_evaluation(run, **changed):
    return dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, **changed))


def lines(run_dir, cell):
    path = run_dir / "evaluations" / "3" / f"{cell.replace('/', '.')}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(run_dir, cell):
    path = run_dir / "evaluations" / "3" / f"{cell.replace('/', '.')}.scores.json"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def run_dir(run, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    training.train(run, run_dir)
    return run_dir


@pytest.mark.exhaustive
def test_a_trained_run_is_evaluated_as_an_ensemble_in_its_own_folder(run, run_dir):
    inference.evaluate(run, run_dir, say=lambda text: None)
    cells = ("low/x", "low/z", "odd/w", "up/x", "up/y")
    plain = {cell: [x["predictions"] for x in lines(run_dir, cell)] for cell in cells}
    seen = set()
    job = Job(run, run_dir)
    trained, frozen, _ = inference.restore(job)
    for kind in ("weights", "logits"):
        said: list[str] = []
        ensemble = with_evaluation(run, ensemble=kind)
        assert ensemble.fingerprint() == run.fingerprint()
        board = inference.evaluate(ensemble, run_dir, say=said.append)
        assert len(board.scores) == 6
        ids = {cell: lines(run_dir, cell)[0]["feature_ids"] for cell in cells}
        # low/x, low/y, up/y are 0, 1, 2
        assert ids == {
            "low/x": [0, -1],
            "low/z": [0, 1],
            "odd/w": [-1, -1],
            "up/x": [0, 2],
            "up/y": [2, -1],
        }
        assert any("no cell for 1 of 6 cells" in text and "odd/w" in text for text in said)
        for cell in ("low/x", "up/y", "odd/w"):  # an adapter alone, or none
            assert [x["predictions"] for x in lines(run_dir, cell)] == plain[cell]
        seen.add(record(run_dir, "up/x")["fingerprint"])
        written = lines(run_dir, "up/x")
        evaluated = ensembles.evaluated(Job(ensemble, run_dir))
        tokens = np.zeros((8, 8), np.int32)
        for row, line in enumerate(written):
            text = [*(byte + 3 for byte in line["inputs"].encode()), 1]
            tokens[row, : len(text)] = text
        batch = {
            "encoder_input_tokens": jnp.asarray(tokens),
            "feature_ids": jnp.tile(jnp.asarray([[0, 2]], jnp.int32), (8, 1)),
        }
        if kind == "weights":
            params = tree.fold(
                frozen, trained, evaluated.model.adapters, {"cell": ("low/x", "up/y")}
            )
            model = EncoderDecoder(job.model.module)
        else:
            params, model = tree.join(frozen, trained), evaluated.model
        predicted = model.predict(params, batch, max_length=6)
        vocabulary = ByteVocabulary().build()
        for row, line in zip(predicted, written, strict=False):
            assert line["predictions"] == vocabulary.decode([int(t) for t in row if t > 0])
    assert len(seen) == 2  # one kind is not mistaken for the other
    training.train(with_evaluation(run, ensemble="logits", every=3), run_dir)  # the same run


def test_training_evaluates_the_ensemble_and_keeps_the_plain_space(run, tmp_path):
    training.train(with_evaluation(run, ensemble="logits", every=3), tmp_path)
    assert lines(tmp_path, "up/x")[0]["feature_ids"] == [0, 2]
    space = FeatureSpace.from_json((tmp_path / "features.json").read_text())
    assert space.num_slots == 1
    inference.restore(Job(run, tmp_path))  # the checkpoints are the plain run's


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ensemble": "logit"}, r"Evaluation.ensemble='logit': .* did you mean 'logits'\?"),
        (
            {"ensemble": "weights", "ensemble_of": "tasks"},
            r"Evaluation.ensemble_of='tasks': .* did you mean 'task'\?",
        ),
        ({"ensemble_of": "task"}, "no effect without Evaluation.ensemble"),
    ],
)
def test_unknown_names_are_refused(changed, message):
    with pytest.raises(ValueError, match=message) as error:
        Evaluation(**changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("adapters", "has"),
    [
        (None, "no adapters"),
        (
            AdapterSpec(FeatureSpace((FeatureType("task"), FeatureType("language")))),
            "features of task, language",
        ),
        (AdapterSpec(FeatureSpace((FeatureType("cell", slots=2),))), "features of cell in 2 slots"),
    ],
)
def test_a_space_of_other_types_is_refused_before_anything_is_computed(
    run, tmp_path, adapters, has
):
    other = with_evaluation(dataclasses.replace(run, adapters=adapters), ensemble="weights")
    with pytest.raises(ValueError, match=re.escape(f"the run has {has}")) as error:
        Job(other, tmp_path)
    assert "\n" not in str(error.value)


def test_the_best_by_an_ensemble_is_not_compared_with_the_plain_best():
    plain = Evaluation(every=1, keep_best="mean_unseen")
    assert "ensemble" not in plain.best_by
    assert dataclasses.replace(plain, ensemble="weights").best_by != plain.best_by


def test_the_mean_of_logits_is_refused_for_cells_that_are_not_decoded_greedily(run, monkeypatch):
    monkeypatch.setattr(XtremeUp, "inference", lambda self, cell: "complete")
    ensembles.check_kinds(with_evaluation(run, ensemble="weights"), [Cell("up", "x")])
    with pytest.raises(ValueError, match="'logits': up/x is inferred by 'complete', expected"):
        ensembles.check_kinds(with_evaluation(run, ensemble="logits"), [Cell("up", "x")])
