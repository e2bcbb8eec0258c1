"""Lazy steps against those that update every feature, and against lazy Adam in a NumPy loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import SPLIT_MESH, arrays, make_base_run, write_words

from flix_jax.adapters import present, tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.fusion import Fusion
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.experiments import together, training
from flix_jax.experiments.job import Job
from flix_jax.experiments.step_program import step_program
from flix_jax.tasks.source_text import SourceText
from flix_jax.training import partitioning
from flix_jax.training.lazy import state_places
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.partitioning import MeshSpec
from flix_jax.training.step import gradient_sums, randomness

LANGUAGES = tuple(f"l{i:02}" for i in range(20))
SPACE = FeatureSpace(
    (
        FeatureType("task", ("up", "back", "other"), rank=2, dropout=0.3),
        FeatureType("language", LANGUAGES, rank=4, ranks={"l01": 1}, dropouts={"l02": 0.5}),
        FeatureType("pair", ("a", "b", "c", "d"), rank=1, slots=2, combine="mean"),
        FeatureType("shared", ("shared",), rank=1),
    ),
    keep_one=True,
)
BATCH = 4
ADAMW = Optimizer("adamw", Schedule(learning_rate=0.03), weight_decay=0.1, clip_norm=0.5)
LAZY = dataclasses.replace(ADAMW, lazy=True)
SKIPPING = {"not_finite": "skip"}
SGD = Optimizer("sgd", Schedule(learning_rate=0.3), clip_norm=0.5)
MESHES = {
    "data 4": MeshSpec(data=4),
    "fsdp 2, model 2": SPLIT_MESH,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    return dataclasses.replace(
        base,
        batch_size=BATCH,
        adapters=AdapterSpec(
            SPACE, targets=(r".*/attention/query", r".*/mlp/wo"), alpha=3.0, dropout=0.1
        ),
        optimizer=ADAMW,
    )


class Steps:
    """The step of a run on batches of random tokens, of random parameters."""

    def __init__(self, run, folder, devices=1):
        self.run = run
        self.job = Job(run, folder, mesh=run.mesh.make(jax.devices()[:devices]))
        optimizer = self.job.optimizer()
        self.template = self.job.parameters.state_template(optimizer)
        rng = np.random.default_rng(0)

        def draw(x):
            return (rng.normal(size=x.shape) * 0.1).astype(x.dtype)

        trained = jax.tree.map(lambda x, own: draw(x) * own, self.template.trained, self.inside())
        self.first = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.template)
        self.first = self.first.replace(trained=trained)
        self.frozen = jax.tree.map(
            lambda x: jax.device_put(draw(x), x.sharding), self.job.frozen_template
        )
        self.program = step_program(self.job, self.template)

    def inside(self):
        """1 where a bank has a column of its value's rank, 0 beyond."""
        leaves = []
        for path, leaf in tree.named_leaves(self.template.trained):
            t = self.job.space.type(path[-2])
            columns = np.arange(t.max_rank) < np.asarray(t.value_ranks)[:, None]
            shape = [1] * len(leaf.shape)
            shape[0] = t.num_values
            shape[-1 if path[-1] == "a" else -2] = t.max_rank
            leaves.append((path, columns.reshape(shape).astype(np.float32)))
        return tree.from_named(leaves)

    def batch(self, ids, seed=0):
        rng = np.random.default_rng(seed)
        lengths = {"encoder_input_tokens": 8, "decoder_input_tokens": 6, "decoder_target_tokens": 6}
        if self.run.source_text is not None:
            lengths["source_input_tokens"] = self.run.sources_length
        made = {
            name: rng.integers(1, 300, (len(ids), length)).astype(np.int32)
            for name, length in lengths.items()
        }
        return partitioning.put_batch(
            self.job.mesh, {**made, "feature_ids": np.asarray(ids, np.int32)}
        )

    def __call__(self, all_ids, state=None):
        """[(state, metrics)] after each step."""
        state = self.first if state is None else state
        state = jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), state, self.template)
        history = []
        for number, ids in enumerate(all_ids):
            state, metrics = self.program(state, self.frozen, self.batch(ids, number), 7)
            history.append(jax.device_get((state, metrics)))
        return history


@pytest.fixture(scope="module")
def steps(run, tmp_path_factory):
    """The steps of a run with another optimizer and other values of its own, made once."""

    @functools.cache
    def of(optimizer, devices=1, **values):
        changed = dataclasses.replace(run, optimizer=optimizer, **values)
        return Steps(changed, tmp_path_factory.mktemp("run"), devices)

    return of


def lazy(optimizer):
    return dataclasses.replace(optimizer, lazy=True)


def close(one, other, relative=1e-5):
    """Every leaf to within that part of its own largest element."""
    for (name, a), b in zip(tree.leaves_by_name(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max(initial=0) <= relative * np.abs(b).max(initial=0), name


def some_ids(number):
    """Of a batch, absent features and the same ones in several rows among them."""
    rng = np.random.default_rng(number)
    most = [t.num_values for t in SPACE.slot_types]
    return rng.integers(-1, most, (BATCH, len(most)))


# Tasks, languages, pairs of two and what is shared: every value of FEW in every batch.
FEW = dataclasses.replace(
    SPACE, types=tuple(dataclasses.replace(t, values=t.values[:3]) for t in SPACE.types)
)
EVERY = [[0, 2, 1, 0, 0], [1, 1, 2, -1, 0], [2, 0, 0, 2, 0], [1, 2, 0, 1, 0]]


def test_where_a_batch_has_every_feature_nothing_is_lazy(run, steps):
    few = dataclasses.replace(run.adapters, space=FEW)
    batches = [EVERY, EVERY[::-1], EVERY]
    usual = steps(ADAMW, adapters=few)(batches)
    own = steps(LAZY, adapters=few, microbatches=2)(batches)
    for (state, metrics), (wanted, expected) in zip(own, usual, strict=True):
        assert state.step == wanted.step
        close(metrics, expected)
        # Adam divides by the root of a second moment: small gradients have large steps.
        close((state.trained, state.opt_state), (wanted.trained, wanted.opt_state), 1e-4)


@pytest.mark.parametrize(
    "tables",
    ["banks", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("all", "rows", "merged"))],
)
def test_gradient_descent_is_never_lazy(run, steps, tables):
    batches = [some_ids(number) for number in range(4)]
    adapters = run.adapters
    if tables == "merged":  # which dropout of the input has none of
        adapters = dataclasses.replace(adapters, dropout=0.0)
    usual = steps(SGD, adapters=adapters)(batches)
    own = steps(lazy(SGD), adapters=adapters, tables=tables)(batches)
    for (state, metrics), (wanted, expected) in zip(own, usual, strict=True):
        close(metrics, expected)
        close(state.trained, wanted.trained)


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", ["add_relu", "cross_attention"])
def test_so_are_adapters_that_read_a_source(run, steps, function):
    fused = {
        "adapters": dataclasses.replace(run.adapters, fusion=Fusion(function)),
        "source_text": SourceText({"up": "{input}", "back": "{input}"}, length=5),
    }
    batches = [some_ids(number) for number in range(3)]
    usual = steps(SGD, **fused)(batches)
    own = steps(lazy(SGD), **fused)(batches)
    for (state, metrics), (wanted, expected) in zip(own, usual, strict=True):
        close(metrics, expected)
        close(state.trained, wanted.trained)


def of_values(state, places, present):
    """By name of the parameters and moments, their rows of the values that `present` chooses."""
    found = {}
    for part, where in ((state.trained, places.trained), (state.opt_state, places.opt_state)):
        for (name, leaf), place in zip(
            tree.leaves_by_name(part), jax.tree.leaves(where), strict=True
        ):
            if place.type is not None:
                rows = np.moveaxis(np.asarray(leaf), place.axis, 0)
                found[name, len(found)] = rows[present[place.type]]
    return found


def all_places(of):
    places = present.places(of.job.parameters.adapter_axes)
    return state_places(places, of.job.optimizer(), of.template)


def in_batch(ids):
    """By type, whether each value is in the batch."""
    return {t.name: np.isin(np.arange(t.num_values), ids[:, SPACE.slots(t)]) for t in SPACE.types}


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_the_other_features_keep_their_bits(steps, seed):
    """Parameters and moments of what the second batch has not; what it has is changed."""
    own = steps(LAZY, **SKIPPING)
    ids = [some_ids(seed), some_ids(seed + 1)]
    (before, _), (after, metrics) = own(ids)
    assert metrics["grad_norm"] > 0
    there = in_batch(ids[1])
    absent = {name: ~rows for name, rows in there.items()}
    before, after = (of_values(state, all_places(own), absent) for state in (before, after))
    assert len(before) == 3 * len(jax.tree.leaves(own.first.trained))
    for name, rows in before.items():
        assert rows.tobytes() == after[name].tobytes(), name


def test_what_is_updated_is_lazy_adam(steps):
    """Gradients as without laziness; Adam in NumPy, of the values that a batch has."""
    own = steps(LAZY, **SKIPPING)
    gradients_of = jax.jit(gradient_sums(steps(ADAMW).job.model.loss))
    places = jax.tree.leaves(present.places(own.job.parameters.adapter_axes))
    parameters = [np.asarray(x, np.float64) for x in jax.tree.leaves(own.first.trained)]
    moments = [[np.zeros_like(x), np.zeros_like(x)] for x in parameters]
    state = own.first
    for number in range(3):
        ids = some_ids(number + 20)
        ((state_after, metrics),) = own([ids], state)
        batch = own.batch(ids, 0)
        rng = randomness(7, state.step)
        sums, totals = gradients_of(state.trained, own.frozen, batch, rng)
        gradients = [np.asarray(g, np.float64) / totals["weight"] for g in jax.tree.leaves(sums)]
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        there = in_batch(ids)
        for x, g, both, place in zip(parameters, gradients, moments, places, strict=True):
            g *= min(1.0, ADAMW.clip_norm / norm)
            rows = there[place.type].reshape([-1 if i == place.axis else 1 for i in range(x.ndim)])
            for moment, decay, power in zip(both, (ADAMW.b1, ADAMW.b2), (1, 2), strict=True):
                moment[...] = np.where(rows, decay * moment + (1 - decay) * g**power, moment)
            mean = both[0] / (1 - ADAMW.b1 ** (number + 1))
            square = both[1] / (1 - ADAMW.b2 ** (number + 1))
            step = mean / (np.sqrt(square) + ADAMW.eps) + ADAMW.weight_decay * x
            x[...] = np.where(rows, x - ADAMW.schedule.learning_rate * step, x)
        state = state_after
        leaves = jax.tree.leaves(state.trained)
        for x, leaf in zip(parameters, leaves, strict=True):
            np.testing.assert_allclose(leaf, x, rtol=1e-4, atol=1e-4)
            x[...] = leaf  # so that errors do not add up over the steps


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_on_a_mesh_it_is_the_same(steps, mesh):
    devices = 4 if mesh == "data 4" else 8
    batches = [some_ids(number) for number in range(3)]
    wanted = steps(lazy(SGD))(batches)
    own = steps(lazy(SGD), devices, mesh=MESHES[mesh])
    for (state, metrics), (expected, told) in zip(own(batches), wanted, strict=True):
        close(metrics, told)
        close(state.trained, expected.trained)


def test_an_id_out_of_range_is_not_a_number(steps):
    ids = some_ids(0)
    ids[0, 1] = len(LANGUAGES)
    ((_, metrics),) = steps(lazy(SGD), tables="banks")([ids])
    assert np.isnan(metrics["loss"])


def test_a_step_that_is_skipped_leaves_all_as_it_was(steps):
    own = steps(LAZY, **SKIPPING)
    ids = some_ids(0)
    bad = ids.copy()
    bad[0, 1] = len(LANGUAGES)
    (first, _), (second, metrics) = own([ids, bad])
    assert metrics["skipped"] == 1 and second.step == 2
    for one, other in zip(
        jax.tree.leaves((first.trained, first.opt_state)),
        jax.tree.leaves((second.trained, second.opt_state)),
        strict=True,
    ):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_and_trains_what_it_is_to_train(run, tmp_path):
    """A language that no batch has, and one that is not to be trained, stay what they were."""
    types = (
        FeatureType("task", rank=2, dropout=0.3),
        FeatureType("language", ("x", "y", "z"), rank=2),
    )
    run = dataclasses.replace(
        run,
        batch_size=8,
        adapters=AdapterSpec(FeatureSpace(types), targets=r".*/mlp/wo"),
        train_values=("task=.*", "language=(x|z)"),
        optimizer=LAZY,
        save_every=2,
    )
    training.train(run, tmp_path / "whole")
    training.train(dataclasses.replace(run, total_steps=2), tmp_path / "parts")
    training.train(run, tmp_path / "parts")
    whole, parts = (arrays(tmp_path / name, 4) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        assert array.tobytes() == parts[name].tobytes(), name
    job = Job(run, tmp_path / "whole")
    first, _ = job.initial_parameters(None)
    saved = {name: x for name, x in whole.items() if name.startswith("['trained']")}
    for (path, start), (name, after) in zip(
        jax.tree_util.tree_leaves_with_path(first), saved.items(), strict=True
    ):
        assert name.endswith(jax.tree_util.keystr(path))
        if "language" in name:
            np.testing.assert_array_equal(after[1:], start[1:], err_msg=name)
            assert (after[0] != start[0]).any()


def test_what_cannot_be_lazy_is_told(run):
    with pytest.raises(ValueError, match="adafactor takes sizes of whole arrays"):
        Optimizer("adafactor", lazy=True)
    with pytest.raises(ValueError, match="expected True or False"):
        Optimizer(lazy="yes")
    with pytest.raises(ValueError, match=r"Optimizer.lazy = True has no effect without Run.adap"):
        dataclasses.replace(run, adapters=None, optimizer=LAZY)
    changed = dataclasses.replace(run, optimizer=LAZY)
    assert together.alone(run) == "" and together.alone(changed) == "its optimizer is lazy"


def test_a_batch_that_can_have_more_values_is_refused():
    with pytest.raises(ValueError, match="'language': a batch of 9 examples can have 9 values"):
        present.find(SPACE, present.narrowed(SPACE, BATCH), jnp.zeros((9, SPACE.num_slots), int))


@given(
    st.lists(
        st.tuples(*[st.integers(-1, t.num_values - 1) for t in SPACE.slot_types]),
        min_size=BATCH,
        max_size=BATCH,
    )
)
def test_the_values_present_are_found_and_put_back(ids):
    ids = np.asarray(ids, np.int32)
    narrow = present.narrowed(SPACE, BATCH)
    found, among = present.find(SPACE, narrow, jnp.asarray(ids))
    for t, own in zip(SPACE.types, narrow.types, strict=True):
        rows = np.asarray(found[t.name])
        there = np.unique(ids[:, SPACE.slots(t)])
        there = there[there >= 0]
        assert own.num_values == len(rows) == min(t.num_values, BATCH * t.slots)
        np.testing.assert_array_equal(rows[: len(there)], there)
        assert (rows[len(there) :] == t.num_values).all()
        of, by = ids[:, SPACE.slots(t)], np.asarray(among)[:, SPACE.slots(t)]
        np.testing.assert_array_equal(of == -1, by == -1)
        np.testing.assert_array_equal(np.where(by >= 0, rows[by], -1), of)
        place = present.Place(t.name, 1)
        bank = np.arange(2 * t.num_values, dtype=np.float32).reshape(2, -1)
        taken = present.taken(jnp.asarray(bank), place, found)
        np.testing.assert_array_equal(taken[:, : len(there)], bank[:, there])
        put = present.replaced(jnp.asarray(bank), -taken - 1, place, found)
        bank[:, there] = -bank[:, there] - 1
        np.testing.assert_array_equal(put, bank)
