import collections
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flix_jax.data.cells import Cell
from flix_jax.data.examples import CellData, Ragged
from flix_jax.data.order import BLOCK, VERSION, ExampleOrder, integer_shares, permutation
from flix_jax.data.pipeline import TrainPipeline
from flix_jax.data.prefetch import PrefetchIterator

LENGTHS = {"inputs": 6, "targets": 4}


def make_data(sizes, slots=2, seed=0):
    """Cells whose examples start with (cell number, example number), in tokens above 2."""
    rng = np.random.default_rng(seed)
    data = {}
    for number, (name, size) in enumerate(sizes.items()):
        inputs = [
            [10 + number, 100 + i, *rng.integers(3, 9, rng.integers(0, 4))] for i in range(size)
        ]
        targets = [[100 + i, 1][: rng.integers(1, 3)] for i in range(size)]
        ids = np.tile(np.arange(slots, dtype=np.int32) + number, (size, 1)) if slots else None
        data[Cell(*name.split("/"))] = CellData(
            Ragged.from_rows(inputs), Ragged.from_rows(targets), ids, cut_inputs=number
        )
    return data


SIZES = {"ner/sw": 7, "ner/yo": 40, "qa/sw": 3}
RATES = {"ner/sw": 0.2, "ner/yo": 0.7, "qa/sw": 0.1}


def make(sizes=SIZES, batch=8, slots=2, **settings):
    data = make_data(sizes, slots)
    rates = settings.pop("rates", {cell: RATES.get(cell.name, 1 / len(data)) for cell in data})
    return TrainPipeline(data, rates, lengths=LENGTHS, global_batch_size=batch, **settings)


def keep(example, rng):
    return example


def identities(batches):
    """(cell number, example number) of every row."""
    return [
        (int(row[0]) - 10, int(row[1]) - 100)
        for batch in batches
        for row in batch["encoder_input_tokens"]
    ]


def equal(one, other):
    return one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


# The order of the examples


@given(
    weights=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=30),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 3000),
    blocks=st.integers(1, 8),
)
def test_every_block_holds_each_cell_within_one_draw_of_its_rate(weights, seed, first, blocks):
    rates = {f"t/{i:02}": w / sum(weights) for i, w in enumerate(weights)}
    order = ExampleOrder(dict.fromkeys(rates, 5), rates, seed)
    cells, _ = order.cells_at(first * BLOCK, blocks * BLOCK)
    expected = np.array(list(rates.values())) * BLOCK
    for block in cells.reshape(blocks, BLOCK):
        count = np.bincount(block, minlength=len(weights))
        assert (np.abs(count - expected) < 1 + 1e-3).all()


def test_rates_hold_over_long_windows_better_than_by_chance():
    rates = {"t/a": 0.001, "t/b": 0.3337, "t/c": 0.6653}
    cells, _ = ExampleOrder(dict.fromkeys(rates, 5), rates, 3).cells_at(0, 300 * BLOCK)
    drift = np.bincount(cells) - np.array(list(rates.values())) * 300 * BLOCK
    assert (np.abs(drift) < 4).all()  # chance alone: +-270 for the second


def test_cells_are_mixed_within_a_block():
    order = ExampleOrder({"t/a": 5, "t/b": 5}, {"t/a": 0.5, "t/b": 0.5}, 0)
    cells, _ = order.cells_at(0, 100 * BLOCK)
    in_batches = cells.reshape(-1, 32).sum(axis=1)
    assert 7.0 < in_batches.var() < 9.0  # a fair coin: 8


@given(st.integers(0, 5000), st.integers(1, 2500), st.integers(0, 9))
def test_draws_of_a_cell_are_numbered_without_a_gap_from_any_position(start, count, seed):
    rates = {"t/a": 0.05, "t/b": 0.6, "t/c": 0.35}
    sizes = dict.fromkeys(rates, 5)
    cells, draws = ExampleOrder(sizes, rates, seed).cells_at(0, start + count)
    for cell in range(3):
        mine = draws[cells == cell]
        assert (mine == np.arange(len(mine))).all()
    # A fresh order that never saw the beginning.
    late_cells, late_draws = ExampleOrder(sizes, rates, seed).cells_at(start, count)
    assert (late_cells == cells[start:]).all() and (late_draws == draws[start:]).all()


# Several consecutive positions of one cell


@given(
    weights=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=30),
    together=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 3000),
)
def test_cells_drawn_together_keep_their_rates_over_a_block(weights, together, seed, first):
    rates = {f"t/{i:02}": w / sum(weights) for i, w in enumerate(weights)}
    order = ExampleOrder(dict.fromkeys(rates, 5), rates, seed, together)
    cells, draws = order.cells_at(first * BLOCK * together, BLOCK * together)
    groups = cells.reshape(BLOCK, together)
    assert (groups == groups[:, :1]).all()
    count = np.bincount(groups[:, 0], minlength=len(weights))
    assert (np.abs(count - np.array(list(rates.values())) * BLOCK) < 1 + 1e-3).all()
    # They are the cells that are drawn one by one, each as often.
    alone, numbers = ExampleOrder(dict.fromkeys(rates, 5), rates, seed).cells_at(
        first * BLOCK, BLOCK
    )
    assert (groups[:, 0] == alone).all()
    expected = numbers[:, None] * together + np.arange(together)
    assert (draws.reshape(BLOCK, together) == expected).all()


@given(st.integers(0, 3000), st.integers(1, 1500), st.integers(2, 7), st.integers(0, 9))
def test_draws_together_are_numbered_without_a_gap_from_any_position(start, count, together, seed):
    rates = {"t/a": 0.05, "t/b": 0.6, "t/c": 0.35}
    sizes = dict.fromkeys(rates, 5)
    cells, draws = ExampleOrder(sizes, rates, seed, together).cells_at(0, start + count)
    for cell in range(3):
        mine = draws[cells == cell]
        assert (mine == np.arange(len(mine))).all()
    late = ExampleOrder(sizes, rates, seed, together).cells_at(start, count)
    assert (late[0] == cells[start:]).all() and (late[1] == draws[start:]).all()


def test_batches_by_cell_hold_whole_groups_and_every_example_once_an_epoch():
    pipeline = make(batch=8, rows_per_cell=4)
    batches = [pipeline.batch_at(step) for step in range(60)]
    for batch in batches:
        for name in ("encoder_input_tokens", "feature_ids"):
            groups = batch[name].reshape(2, 4, -1)[..., : 1 if name[0] == "e" else None]
            assert (groups == groups[:, :1]).all()  # the first token names the cell
    seen = collections.defaultdict(list)
    for cell, example in identities(batches):
        seen[cell].append(example)
    for cell, (name, size) in enumerate(SIZES.items()):
        whole = len(seen[cell]) // size * size
        for epoch in np.reshape(seen[cell][:whole], (-1, size)):
            assert sorted(epoch) == list(range(size)), name
    # Of 480 rows, each cell has its share but for the groups that a block holds more or less.
    counts = np.array([len(seen[cell]) for cell in range(3)])
    np.testing.assert_allclose(counts, np.array(list(RATES.values())) * 480, atol=4 * 8)


def test_batches_by_cell_are_the_same_on_several_processes():
    whole = make(batch=12, rows_per_cell=3)
    parts = [make(batch=12, rows_per_cell=3, rows=range(i, 12, 2)) for i in range(2)]
    for step in (0, 5):
        expected = whole.batch_at(step)
        for i, part in enumerate(parts):
            assert equal(part.batch_at(step), {k: v[i::2] for k, v in expected.items()})


def test_another_number_of_rows_of_a_cell_is_another_sequence():
    with pytest.raises(ValueError, match=r"rows_per_cell None -> 4"):
        make(rows_per_cell=4).check_state(make().position(3))
    with pytest.raises(ValueError, match=r"rows_per_cell 2 -> 4"):
        make(rows_per_cell=4).check_state(make(rows_per_cell=2).position(3))
    with pytest.raises(ValueError, match=r"rows_per_cell 2 -> None"):
        make().check_state(make(rows_per_cell=2).position(3))
    make(rows_per_cell=2).check_state(make(rows_per_cell=2).position(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows_per_cell": 3}, r"rows_per_cell=3: expected a divisor of global_batch_size=8"),
        ({"rows_per_cell": 0}, r"rows_per_cell=0: expected a divisor"),
        ({"rows_per_cell": 2, "packing": True}, r"rows_per_cell=2: has no effect with packing"),
    ],
)
def test_refused_rows_per_cell(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_cell_of_several_features_has_no_batches_by_cell():
    data = make_data(SIZES)
    data[Cell("ner", "yo")].feature_ids[5] = [0, 3]
    rates = {cell: 1 / 3 for cell in data}
    with pytest.raises(
        ValueError, match=r"example 5 of ner/yo has feature ids \[0, 3\], its first"
    ):
        TrainPipeline(data, rates, lengths=LENGTHS, global_batch_size=8, rows_per_cell=2)
    TrainPipeline(data, rates, lengths=LENGTHS, global_batch_size=8)


def test_positions_far_away_cost_little():
    rates = {f"t/{i}": 1 / 50 for i in range(50)}
    order = ExampleOrder(dict.fromkeys(rates, 1000), rates, 0)
    started = time.perf_counter()
    order.cells_at(5 * 10**7, 128)
    assert time.perf_counter() - started < 5.0


def test_the_order_does_not_depend_on_how_the_cells_were_listed():
    names = list(SIZES)
    one = ExampleOrder(SIZES, RATES, 5)
    other = ExampleOrder({n: SIZES[n] for n in names[::-1]}, {n: RATES[n] for n in names[::-1]}, 5)
    assert one.names == other.names
    assert (one.cells_at(0, 100)[0] == other.cells_at(0, 100)[0]).all()


def test_the_order_of_version_1_stays_what_it_is():
    order = ExampleOrder(SIZES, RATES, 1)
    cells, draws = order.cells_at(2000, 12)
    examples = [order.example(c, d) for c, d in zip(cells, draws, strict=True)]
    # Saved positions point into this order: when it has to change, so has order.VERSION.
    assert VERSION == 1
    assert cells.tolist() == [1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 0]
    assert examples == [34, 20, 6, 33, 8, 0, 29, 24, 17, 12, 19, 1]


def test_permutations_are_permutations_and_differ_by_key():
    for size in (1, 2, 1000):
        assert sorted(permutation(size, 0, "a")) == list(range(size))
    assert (permutation(1000, 0, "a") != permutation(1000, 0, "b")).any()
    firsts = collections.Counter(permutation(4, seed)[0] for seed in range(4000))
    assert all(850 < firsts[i] < 1150 for i in range(4))


@given(st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=50))
def test_integer_shares_sum_to_one(weights):
    total = sum(weights)
    shares = integer_shares([w / total for w in weights])
    assert sum(shares) == 2**32 and min(shares) >= 1
    assert all(abs(s / 2**32 - w / total) < 1e-7 for s, w in zip(shares, weights, strict=True))


# Batches


@pytest.mark.parametrize("batch", [8, 30])
def test_every_epoch_of_a_cell_visits_every_example_once(batch):
    pipeline = make(batch=batch, seed=2)
    seen = collections.defaultdict(list)
    for cell, example in identities(pipeline.batch_at(s) for s in range(3000 // batch)):
        seen[cell].append(example)
    for cell, size in enumerate(SIZES.values()):
        epochs = [seen[cell][i : i + size] for i in range(0, len(seen[cell]), size)]
        assert len(epochs) > 10
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
        assert len(set(map(tuple, epochs[:-1]))) > 1  # in another order each time


def test_rates_hold_in_the_batches():
    rows = identities(make(batch=32).batch_at(step) for step in range(4 * BLOCK // 32))
    counts = collections.Counter(cell for cell, _ in rows)
    for cell, rate in enumerate(RATES.values()):
        assert abs(counts[cell] - rate * 4 * BLOCK) < 4


def test_rows_hold_the_examples_padded_and_shifted():
    data = make_data(SIZES)
    by_number = dict(enumerate(data.values()))
    for step in range(20):
        batch = make(seed=7).batch_at(step)
        for row, (cell, example) in enumerate(identities([batch])):
            inputs = by_number[cell].inputs[example].tolist()
            targets = by_number[cell].targets[example].tolist()
            assert batch["encoder_input_tokens"][row].tolist() == (inputs + [0] * 6)[:6]
            padded = (targets + [0] * 4)[:4]
            assert batch["decoder_target_tokens"][row].tolist() == padded
            assert batch["decoder_input_tokens"][row].tolist() == [0] + padded[:3]
            assert batch["decoder_loss_weights"][row].tolist() == [int(t > 0) for t in padded]
            assert batch["feature_ids"][row].tolist() == [cell, cell + 1]


def test_batches_have_the_shapes_that_were_announced():
    for slots in (0, 2):
        pipeline = make(slots=slots)
        shapes = {name: array.shape for name, array in pipeline.batch_at(3).items()}
        assert shapes == pipeline.shapes()
        assert all(array.dtype == np.int32 for array in pipeline.batch_at(3).values())
        assert ("feature_ids" in shapes) == bool(slots)


def test_batches_are_a_function_of_seed_and_step():
    one, other = make(seed=4), make(seed=4)
    later = {step: one.batch_at(step) for step in (90, 3, 700)}
    assert all(equal(other.batch_at(step), later[step]) for step in (3, 700, 90))
    assert not equal(make(seed=5).batch_at(3), later[3])


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_slices_of_the_processes_make_the_global_batch(processes):
    parts = [make(rows=rows) for rows in np.split(np.arange(8), processes)]
    for step in (0, 127, 128, 1000):
        whole = make().batch_at(step)
        slices = [part.batch_at(step) for part in parts]
        joined = {name: np.concatenate([s[name] for s in slices]) for name in whole}
        assert equal(whole, joined)


def test_a_transform_is_keyed_by_the_global_position():
    def add_noise(example, rng):
        return {"inputs": np.append(example["inputs"][:2], rng.integers(3, 1000, 2))}

    def settings(**more):
        return {"transforms": {"ner/*": add_noise}, "seed": 3, **more}

    whole = [make(**settings()).batch_at(step) for step in range(6)]
    some = make(**settings(rows=(1, 4, 7)))
    assert equal(some.batch_at(5), {k: v[[1, 4, 7]] for k, v in whole[5].items()})
    drawn = {}
    for batch in whole:
        for (cell, example), row in zip(
            identities([batch]), batch["encoder_input_tokens"], strict=True
        ):
            if cell < 2:
                assert row[2:4].min() > 2 and row[4:].max() == 0
                drawn.setdefault((cell, example), set()).add(tuple(row[2:4]))
    assert max(map(len, drawn.values())) > 1  # another draw, another noise


def test_a_transform_may_be_prepared_from_the_examples_of_each_cell():
    class Longest:
        def prepared(self, examples):
            longest = max(len(example["inputs"]) for example in examples)
            return lambda example, rng: {"inputs": np.full(2, longest)}

        def __call__(self, example, rng):
            raise AssertionError("not prepared")

    pipeline = make(transforms={"*/*": Longest()})
    longest = {
        name: max(len(example["inputs"]) for example in examples)
        for name, examples in pipeline._data.items()
    }
    batch = pipeline.batch_at(0)
    assert set(batch["encoder_input_tokens"][:, 0]) <= set(longest.values())


def test_what_a_transform_makes_too_long_is_cut():
    def grow(example, rng):
        return {name: np.full(50, 5) for name in ("inputs", "targets")}

    batch = make(transforms={"*/*": grow}).batch_at(0)
    assert (batch["encoder_input_tokens"] == 5).all()
    assert (batch["decoder_target_tokens"] == 5).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "global_batch_size=0"),
        ({"batch": 9, "rows": (8, 9)}, r"rows=\(8, 9\): expected some of a batch of 9"),
        ({"rows": ()}, r"rows=\(\): expected some"),
        ({"sizes": {}}, "mixture is empty"),
        ({"sizes": {"ner/sw": 0}}, "ner/sw: 0 examples"),
        ({"transforms": {"topic/*": lambda e, r: e}}, "transforms: the pattern 'topic/\\*'"),
        ({"rates": {Cell("ner", "sw"): 1.0}}, "ner/yo, qa/sw"),
        ({"rates": {Cell(*n.split("/")): 1.0 for n in SIZES}}, "sum to 3"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "lengths", [{"inputs": 0, "targets": 4}, {"inputs": 3, "targets": -1}, {"inputs": 3}]
)
def test_lengths_below_one_are_refused(lengths):
    data = make_data(SIZES)
    with pytest.raises(ValueError, match="length"):
        TrainPipeline(data, {c: 1 / 3 for c in data}, lengths=lengths, global_batch_size=8)


def test_cells_must_agree_on_their_features():
    data = make_data({"ner/sw": 2}) | make_data({"qa/sw": 2}, slots=3)
    with pytest.raises(ValueError, match="ner/sw: 2, qa/sw: 3"):
        TrainPipeline(data, {c: 0.5 for c in data}, lengths=LENGTHS, global_batch_size=8)


def test_the_report_counts_cells():
    report = make().report()
    row = report.cells[Cell("ner", "yo")]
    assert (row.examples, row.rate, row.cut_inputs, row.cut_targets) == (40, 0.7, 1, 0)
    inputs = make_data(SIZES)[Cell("ner", "yo")].inputs
    mean = np.mean([len(inputs[i]) for i in range(40)])
    assert row.mean_input_length == pytest.approx(mean)
    assert report.cut
    lines = report.table().splitlines()
    assert lines[3].split()[:2] == ["ner/yo", "40"] and lines[-1].split()[:2] == ["all", "50"]


# The iterator


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_the_iterator_walks_the_steps():
    pipeline = make()
    with PrefetchIterator(pipeline, step=5, depth=3) as batches:
        for step, batch in zip(range(5, 30), batches, strict=False):
            assert equal(batch, pipeline.batch_at(step))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_restored_iterator_goes_on_exactly(processes):
    with PrefetchIterator(make(), depth=4) as batches:
        take(batches, 11)
        state = json.loads(json.dumps(batches.state()))
        expected = take(batches, 5)
    assert state["step"] == 11
    settings = [{"rows": rows} for rows in np.split(np.arange(8), processes)]
    slices = []
    for setting in settings:
        with PrefetchIterator(make(**setting)) as again:
            next(again)
            again.restore(state)
            assert again.step == 11
            slices.append(take(again, 5))
    for step in range(5):
        joined = {k: np.concatenate([s[step][k] for s in slices]) for k in expected[step]}
        assert equal(joined, expected[step])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"batch": 16}, "global_batch_size 8 -> 16"),
        ({"sizes": {**SIZES, "qa/sw": 4}}, r"sizes\[qa/sw\] 3 -> 4"),
        ({"slots": 3}, "data_digest"),
        ({"transforms": {"qa/*": keep}}, r"transforms\[qa/sw\] None -> test_pipeline.keep"),
        (
            {"rates": {Cell("ner", "sw"): 0.5, Cell("ner", "yo"): 0.4, Cell("qa", "sw"): 0.1}},
            "shares",
        ),
    ],
)
def test_a_state_of_other_data_is_refused_with_the_difference(other, message):
    with PrefetchIterator(make()) as batches:
        state = batches.state()
    with PrefetchIterator(make(**other)) as batches:
        with pytest.raises(ValueError, match=message) as error:
            batches.restore(state)
        assert "\n" not in str(error.value)
        next(batches)  # and the iterator is as it was


def test_put_runs_in_the_thread():
    threads = set()

    def put(batch):
        threads.add(threading.current_thread())
        return batch["feature_ids"].shape

    with PrefetchIterator(make(), put=put) as batches:
        assert take(batches, 3) == [(8, 2)] * 3
    assert threading.main_thread() not in threads


def test_an_exception_in_the_thread_reaches_the_consumer_in_its_turn():
    calls = []

    def put(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise RuntimeError("no room")
        return batch

    with PrefetchIterator(make(), put=put) as batches:
        take(batches, 2)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no room"):
                next(batches)
        assert batches.state()["step"] == 2


def test_no_more_batches_are_made_than_fit():
    made = []
    with PrefetchIterator(make(), depth=2, put=made.append) as batches:
        deadline = time.monotonic() + 5
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(made) == 3  # two wait, one is ready to
        next(batches)


def test_closing_ends_the_thread_and_can_be_repeated():
    before = threading.active_count()
    batches = PrefetchIterator(make())
    next(batches)
    batches.close()
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_waiting_is_counted():
    def slow(batch):
        time.sleep(0.05)
        return batch

    with PrefetchIterator(make(), put=slow) as batches:
        take(batches, 4)
        assert batches.wait_seconds > 0.1
    with PrefetchIterator(make(), depth=4) as batches:
        time.sleep(0.3)
        take(batches, 4)
        assert batches.wait_seconds < 0.1


def test_settings_of_the_iterator_are_checked():
    with pytest.raises(ValueError, match="depth=0"):
        PrefetchIterator(make(), depth=0)
    with pytest.raises(ValueError, match="step=-1"):
        PrefetchIterator(make(), step=-1)
