"""Rows of several examples: which share one, and that the network sees each by itself."""

import collections
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data import packing
from flix_jax.data.cells import Cell
from flix_jax.data.examples import CellData, Ragged
from flix_jax.data.pipeline import SEGMENTS, TrainPipeline, as_batch
from flix_jax.data.prefetch import PrefetchIterator
from flix_jax.models import config as config_lib
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer

LENGTHS = {"inputs": 16, "targets": 10}
CELLS = {Cell("ner", "sw"): (0, 0), Cell("ner", "yo"): (0, 1), Cell("qa", "sw"): (1, 0)}
ROWS = 8


def data_of(seed, features=CELLS, longest=(9, 5)):
    """Cells of 40 examples, whose tokens tell cell and example apart."""
    draw = np.random.default_rng(seed)
    found = {}
    for number, cell in enumerate(CELLS):
        sides = []
        for limit in longest:
            rows = [draw.integers(2, 60, draw.integers(1, limit + 1)) for _ in range(40)]
            sides.append(Ragged.from_rows(rows))
        ids = None if features is None else np.tile(np.int32([features[cell]]), (40, 1))
        found[cell] = CellData(*sides, ids, cut_inputs=number)
    return found


def make(seed=0, features=CELLS, batch=ROWS, pack=True, **options):
    data = data_of(seed, features)
    rates = dict(zip(data, (0.2, 0.5, 0.3), strict=True))
    more = {"lengths": LENGTHS, "global_batch_size": batch, "packing": pack}
    return TrainPipeline(data, rates, **more, **options)


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 64)


def unpacked(pipeline, data, step, rows):
    """The examples of a batch, one in a row of `rows`; the others are padding."""
    by_name = {cell.name: (cell, of) for cell, of in data.items()}
    inputs = np.zeros((rows, LENGTHS["inputs"]), np.int32)
    targets = np.zeros((rows, LENGTHS["targets"]), np.int32)
    ids = np.zeros((rows, 2), np.int32)
    for row, (name, example, _) in enumerate(pipeline.origins_at(step)):
        cell, of = by_name[name]
        inputs[row, : len(of.inputs[example])] = of.inputs[example]
        targets[row, : len(of.targets[example])] = of.targets[example]
        ids[row] = CELLS[cell]
    return as_batch(inputs, targets) | {"feature_ids": ids}


# Which examples share a row


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5), st.integers(0, 3)), max_size=60),
    st.integers(12, 30),
    st.integers(5, 9),
)
def test_rows_hold_every_example_once_within_their_limits_and_of_one_group(examples, most, few):
    sizes = np.array([e[:2] for e in examples], np.int64).reshape(-1, 2)
    groups = np.array([e[2] for e in examples], np.int64)
    rows = packing.pack(sizes, groups, (most, few))
    assert sorted(i for row in rows for i in row) == list(range(len(examples)))
    for row in rows:
        assert (sizes[row].sum(axis=0) <= (most, few)).all()
        assert len(set(groups[row])) == 1
    # First fit: no row would have room for all of a later one of its group.
    for early, row in enumerate(rows):
        for later in rows[early + 1 :]:
            if groups[later[0]] == groups[row[0]]:
                both = sizes[row].sum(axis=0) + sizes[later].sum(axis=0)
                assert (both > (most, few)).any()


def test_an_example_that_fits_no_row_is_an_error():
    with pytest.raises(ValueError, match=r"example 1 of size \[9, 1\] in rows of \(8, 8\)"):
        packing.pack(np.array([[1, 1], [9, 1]]), np.zeros(2, np.int64), (8, 8))


def test_a_window_holds_the_examples_that_it_holds_without_packing(small_windows):
    """So rates are kept exactly, and no example is lost or seen twice."""
    packed = make(batch=1)
    plain = make(pack=False, batch=64)
    row = 0
    for window in range(3):
        expected = collections.Counter(plain.origins_at(window))
        found = collections.Counter()
        while found.total() < 64:
            found.update(packed.origins_at(row))
            row += 1
        assert found == expected


def test_without_features_or_with_equal_ones_all_cells_share_rows(small_windows):
    for features in (None, dict.fromkeys(CELLS, (0, 0))):
        rows = [make(features=features, batch=1).origins_at(step) for step in range(12)]
        assert any(len({name for name, _, _ in row}) > 1 for row in rows)
    rows = [make(batch=1).origins_at(step) for step in range(12)]
    assert all(len({name for name, _, _ in row}) == 1 for row in rows)
    assert any(len(row) > 2 for row in rows)


def test_a_row_holds_its_examples_one_after_another(small_windows):
    pipeline, data = make(), {cell.name: of for cell, of in data_of(0).items()}
    for step in range(5):
        batch, left = pipeline.batch_at(step), pipeline.origins_at(step)
        for row in range(ROWS):
            numbers = batch["encoder_segment_ids"][row]
            assert (np.diff(numbers[numbers > 0]) >= 0).all()
            for number in range(1, numbers.max() + 1):
                name, example, _ = left.pop(0)
                inputs = batch["encoder_input_tokens"][row][numbers == number]
                of_targets = batch["decoder_segment_ids"][row] == number
                targets = batch["decoder_target_tokens"][row][of_targets]
                read = batch["decoder_input_tokens"][row][of_targets]
                assert inputs.tolist() == data[name].inputs[example].tolist()
                assert targets.tolist() == data[name].targets[example].tolist()
                assert read.tolist() == [0, *targets[:-1]]
            for side, segments in zip(("encoder_input", "decoder_target"), SEGMENTS, strict=True):
                tokens = batch[f"{side}_tokens"][row]
                assert ((tokens > 0) == (batch[segments][row] > 0)).all()
        assert not left


def test_batches_have_the_shapes_that_were_announced(small_windows):
    pipeline = make()
    batch = pipeline.batch_at(3)
    assert {name: array.shape for name, array in batch.items()} == pipeline.shapes()
    assert all(array.dtype == np.int32 for array in batch.values())
    assert set(SEGMENTS) <= set(batch)


# Which batch comes at which step


@pytest.mark.parametrize("processes", [2, 4])
def test_the_slices_of_the_processes_make_the_global_batch(small_windows, processes):
    parts = [make(rows=rows) for rows in np.split(np.arange(ROWS), processes)]
    for step in (0, 3, 40):
        whole = make().batch_at(step)
        for name, array in whole.items():
            joined = np.concatenate([part.batch_at(step)[name] for part in parts])
            np.testing.assert_array_equal(array, joined)


def test_steps_may_be_asked_for_in_any_order(small_windows):
    one, other = make(), make()
    later = {step: one.batch_at(step) for step in (30, 2, 17)}
    for step in (2, 17, 30):
        for name, array in other.batch_at(step).items():
            np.testing.assert_array_equal(array, later[step][name])


def test_a_saved_position_spares_the_packing_of_what_came_before(small_windows, monkeypatch):
    with PrefetchIterator(make(), 0) as batches:
        expected = [next(batches) for _ in range(45)][40:]
    with PrefetchIterator(make(), 0) as batches:
        for _ in range(40):
            next(batches)
        saved = batches.state()
    made = []
    make_window = packing.PackedOrder._make
    monkeypatch.setattr(
        packing.PackedOrder, "_make", lambda self, n: made.append(n) or make_window(self, n)
    )
    pipeline = make()
    made.clear()  # the first one, for the report
    pipeline.check_state(saved)
    with PrefetchIterator(pipeline, saved["step"]) as batches:
        found = [next(batches) for _ in range(5)]
    for one, other in zip(found, expected, strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name])
    assert min(made) >= saved["packed"]["window"] > 5
    # Steps before it are counted from the beginning.
    np.testing.assert_array_equal(
        pipeline.batch_at(7)["encoder_input_tokens"], make().batch_at(7)["encoder_input_tokens"]
    )


def test_packed_and_unpacked_positions_are_told_apart(small_windows):
    packed, plain = make(), make(pack=False)
    for pipeline in (packed, plain):
        pipeline.check_state(pipeline.position(3))
    with pytest.raises(ValueError, match=r"other training data .*: packing None -> \[1, 64\]"):
        packed.check_state(plain.position(3))
    with pytest.raises(ValueError, match=r"other training data .*: packing \[1, 64\] -> None"):
        plain.check_state(packed.position(3))
    older = plain.position(3)  # of a version that did not pack
    del older["packing"]
    plain.check_state(older)


@pytest.mark.parametrize("mark", [3, {}, {"window": 1}, {"window": "1", "first_row": 8}])
def test_a_position_that_is_none_is_refused(mark):
    pipeline = make()
    with pytest.raises(ValueError, match="tells no window of packed rows"):
        pipeline.check_state(pipeline.position(0) | {"packed": mark})


def test_mixed_rows_hold_any_examples_and_at_most_so_many(small_windows):
    pipeline, data = make(examples_per_row=3), {cell.name: cell for cell in CELLS}
    mixed = 0
    for step in range(6):
        batch, left = pipeline.batch_at(step), pipeline.origins_at(step)
        assert {name: array.shape for name, array in batch.items()} == pipeline.shapes()
        assert batch["feature_ids"].shape == (ROWS, 3, 2)
        for row, ids in enumerate(batch["feature_ids"]):
            examples = batch["encoder_segment_ids"][row].max()
            assert 1 <= examples <= 3
            drawn = [data[left.pop(0)[0]] for _ in range(examples)]
            assert ids[:examples].tolist() == [list(CELLS[cell]) for cell in drawn]
            assert (ids[examples:] == -1).all()
            mixed += len(set(drawn)) > 1
        assert not left
    assert mixed > 6 * ROWS / 2
    assert make(examples_per_row=16).report().packing.rows < make().report().packing.rows


def test_mixed_and_equal_packing_are_told_apart(small_windows):
    mixed, equal = make(examples_per_row=3), make()
    mixed.check_state(mixed.position(2))
    with pytest.raises(ValueError, match=r"packing \[1, 64\] -> \[1, 64, 3\]"):
        mixed.check_state(equal.position(2))
    with pytest.raises(ValueError, match=r"packing \[1, 64, 4\] -> \[1, 64, 3\]"):
        mixed.check_state(make(examples_per_row=4).position(2))


def test_what_cannot_be_packed_is_refused():
    keep = {"qa/*": lambda example, rng: example}
    with pytest.raises(ValueError, match="packing: the lengths of qa/sw change by a transform"):
        make(transforms=keep)
    of = data_of(0)
    sourced = {
        cell: CellData(one.inputs, one.targets, one.feature_ids, sources=one.inputs)
        for cell, one in of.items()
    }
    rates = dict.fromkeys(of, 1 / 3)
    with pytest.raises(ValueError, match="packing: examples have sources"):
        TrainPipeline(
            sourced, rates, lengths=LENGTHS | {"sources": 16}, global_batch_size=8, packing=True
        )
    with pytest.raises(ValueError, match="examples_per_row=4: has no effect without packing"):
        TrainPipeline(of, rates, lengths=LENGTHS, global_batch_size=8, examples_per_row=4)


def test_the_report_tells_how_full_rows_are(small_windows):
    pipeline = make(batch=1)
    report = pipeline.report().packing
    drawn, rows = 0, 0
    used = np.zeros(2)
    while drawn < 64:
        batch = pipeline.batch_at(rows)
        drawn += len(pipeline.origins_at(rows))
        rows += 1
        for side, name in enumerate(("encoder_input_tokens", "decoder_target_tokens")):
            used[side] += (batch[name] > 0).sum()
    assert (report.rows, report.examples, report.tokens) == (rows, 64, tuple(used))
    shares = [used[0] / (rows * 16), used[1] / (rows * 10), used[0] / (64 * 16), used[1] / 640]
    full = [f"{share:.0%}" for share in shares]
    assert report.line() == (
        f"packed: {64 / rows:.1f} examples a row; {full[0]} of the inputs' positions and "
        f"{full[1]} of the targets' hold tokens (without packing {full[2]} and {full[3]})"
    )
    assert make(pack=False).report().packing is None


# What the network makes of them


EXAMPLES = 5  # of a mixed row at most
SPACES = {
    "flix": FeatureSpace(
        (
            FeatureType("task", ("ner", "qa"), rank=2, dropout=0.5),
            FeatureType("language", ("sw", "yo"), rank=3, dropout=0.5),
        )
    ),
    "beside one value": FeatureSpace(
        (
            FeatureType("all", ("any",), rank=2, dropout=0.5),
            FeatureType("language", ("sw", "yo"), rank=2, ranks={"yo": 3}),
        ),
        rescale=True,
    ),
}


@contextlib.contextmanager
def in_float64():
    """The network and its loss, also what is float32 whatever the dtype: softmax, norms, logits.

    Rounded to float32, gradients of packed and unpacked rows differ by some 1e-5, by more or less
    as the machine's products and exponentials are.
    """
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(config_lib, "_DTYPES", ("float64",))
        patch.setattr(jnp, "float32", jnp.float64)
        yield patch


@functools.cache
def model_and_params(space="flix", scan=False):
    config = T5Config(
        vocab_size=64,
        emb_dim=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=12,
        num_encoder_layers=2 if scan else 1,
        num_decoder_layers=2 if scan else 1,
        dropout_rate=0.0,
        dtype="float64",
        scan_layers=scan,
    )
    model = EncoderDecoder(Transformer(config), AdapterSpec(SPACES[space]), z_loss=1e-3)
    shapes = {name: array.shape for name, array in make(pack=False).batch_at(0).items()}
    params = jax.jit(lambda key: model.init(key, shapes))(jax.random.key(0))
    # Adapters begin at zero; here they are to matter.
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)
    ]
    return model, jax.tree.unflatten(structure, moved)


@functools.cache
def loss_and_gradients(space="flix", scan=False):
    model, _ = model_and_params(space, scan)
    return jax.jit(
        jax.value_and_grad(lambda p, batch, rng=None: model.loss(p, batch, rng=rng), has_aux=True)
    )


def check_equal(found, expected):
    """Loss, its sums and gradients of a packed batch are those of the unpacked one."""
    (loss, sums), gradients = found
    (expected_loss, expected_sums), expected_gradients = expected
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-9)
    for name, value in expected_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-9, err_msg=name)
    for one, wanted in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        assert jnp.linalg.norm(one - wanted) <= 1e-9 * jnp.linalg.norm(wanted)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**16), st.integers(0, 30), st.sampled_from([None, EXAMPLES]))
def test_loss_and_gradients_are_those_of_the_unpacked_batch(seed, step, examples):
    with in_float64() as patch:
        patch.setattr(packing, "WINDOW", 64)
        _, params = model_and_params()
        pipeline = make(seed=seed, examples_per_row=examples)
        packed = pipeline.batch_at(step)
        plain = unpacked(pipeline, data_of(seed), step, rows=64)
        program = loss_and_gradients()
        found = program(params, jax.tree.map(jnp.asarray, packed))
        check_equal(found, program(params, jax.tree.map(jnp.asarray, plain)))
        assert found[0][1]["weight"] == (packed["decoder_target_tokens"] > 0).sum()


@pytest.mark.parametrize("space, scan", [("flix", True), ("beside one value", False)])
def test_examples_of_a_mixed_row_have_features_and_feature_dropout_of_their_own(
    space, scan, small_windows, monkeypatch
):
    # Of one length on both sides, so that no shape tells whose positions a layer's input has.
    monkeypatch.setitem(LENGTHS, "targets", LENGTHS["inputs"])
    pipeline = make(examples_per_row=EXAMPLES)
    packed, plain = pipeline.batch_at(2), unpacked(pipeline, data_of(0), 2, rows=64)
    if space != "flix":  # whose first type has one value
        for batch in (packed, plain):
            batch["feature_ids"] = np.minimum(batch["feature_ids"], [0, 1])
    examples = packed["encoder_segment_ids"].max(axis=1)
    numbers = [row * EXAMPLES + i for row, count in enumerate(examples) for i in range(count)]
    plain["example_numbers"] = np.array(numbers + [0] * (64 - len(numbers)), np.int32)
    with in_float64():
        _, params = model_and_params(space, scan)
        rng = jax.random.key(3)
        program = loss_and_gradients(space, scan)
        found = program(params, jax.tree.map(jnp.asarray, packed), rng)
        check_equal(found, program(params, jax.tree.map(jnp.asarray, plain), rng))
        without = program(params, jax.tree.map(jnp.asarray, packed))
        assert abs(found[0][0] / without[0][0] - 1) > 1e-4  # that there is feature dropout


def test_without_segments_examples_of_a_row_would_see_each_other(small_windows):
    with in_float64():
        _, params = model_and_params()
        batch = jax.tree.map(jnp.asarray, make().batch_at(1))
        loss = loss_and_gradients()(params, batch)[0][0]
        ones = {name: (batch[name] > 0).astype(jnp.int32) for name in SEGMENTS}
        mixed = loss_and_gradients()(params, batch | ones)[0][0]
        assert abs(mixed / loss - 1) > 1e-3
