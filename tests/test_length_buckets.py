"""Batches of examples of nearly one length: which examples share one, and how long it is."""

import collections
import concurrent.futures
import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flix_jax.data import length_buckets
from flix_jax.data.cells import Cell
from flix_jax.data.denoising import SpanCorruption
from flix_jax.data.examples import CellData, Ragged
from flix_jax.data.pipeline import SOURCE_TOKENS, TrainPipeline
from flix_jax.data.vocabularies import ByteVocabulary

LENGTHS = {"inputs": 16, "targets": 8}
BUCKETS = {"inputs": 3, "targets": 2}
CELLS = {Cell("ner", "sw"): 0.2, Cell("ner", "yo"): 0.5, Cell("qa", "sw"): 0.3}
ROWS = 6
WINDOW = 5  # batches


@pytest.fixture(scope="module", autouse=True)
def small_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length_buckets, "BATCHES", WINDOW)
        yield


def data_of(seed=0, sources=None):
    """Cells of 40 examples: long ones are few, and a cell's are of a length of their own."""
    draw = np.random.default_rng(seed)
    found = {}
    for number, cell in enumerate(CELLS):

        def rows(most, number=number):
            sizes = 1 + draw.binomial(most - 1, (0.15, 0.3, 0.7)[number], 40)
            return Ragged.from_rows([draw.integers(2, 60, size) for size in sizes])

        ids = np.tile(np.int32([[number, number + 1]]), (40, 1))
        texts = None if sources is None else rows(sources)
        found[cell] = CellData(rows(20), rows(8), ids, sources=texts)
    return found


def make(seed=0, buckets=BUCKETS, lengths=LENGTHS, sources=None, **options):
    if sources is not None:
        lengths = {**lengths, "sources": sources}
    more = {"lengths": lengths, "global_batch_size": ROWS, "seed": seed, **options}
    return TrainPipeline(data_of(seed, sources), CELLS, length_buckets=buckets, **more)


def positions(pipeline, step):
    return [position for _, _, position in pipeline.origins_at(step)]


def rows_by_position(pipeline, steps):
    """Every row of the first batches, by the position of its example in the sequence."""
    return {
        position: {name: array[row] for name, array in batch.items()}
        for step in range(steps)
        for batch in [pipeline.batch_at(step)]
        for row, position in enumerate(positions(pipeline, step))
    }


def least(tokens, known):
    """The least of the known lengths that holds so many tokens."""
    return min(length for length in known if length >= tokens)


# Which examples share a batch


@settings(max_examples=25)
@given(
    seed=st.integers(0, 99),
    inputs=st.integers(1, 4),
    targets=st.integers(1, 3),
    first=st.integers(0, 9),
)
def test_a_window_has_the_examples_that_it_has_without(seed, inputs, targets, first):
    pipeline = make(seed, {"inputs": inputs, "targets": targets})
    plain = make(seed, None)
    steps = range(first * WINDOW, (first + 1) * WINDOW)
    found = sorted(one for step in steps for one in pipeline.origins_at(step))
    assert found == sorted(one for step in steps for one in plain.origins_at(step))
    assert collections.Counter(len(pipeline.origins_at(step)) for step in steps) == {ROWS: WINDOW}


@settings(max_examples=25)
@given(seed=st.integers(0, 99), inputs=st.integers(1, 4), targets=st.integers(1, 3))
def test_a_batch_is_as_long_as_its_longest_example_needs(seed, inputs, targets):
    pipeline, data = make(seed, {"inputs": inputs, "targets": targets}), data_of(seed)
    by_name = {cell.name: of for cell, of in data.items()}
    known = {
        "inputs": [16 // 2**i for i in range(inputs)],
        "targets": [8 // 2**i for i in range(targets)],
    }
    for step in range(2 * WINDOW):
        rows = [(by_name[name], example) for name, example, _ in pipeline.origins_at(step)]
        for side, names in known.items():
            tokens = [min(len(getattr(of, side)[i]), LENGTHS[side]) for of, i in rows]
            assert pipeline.lengths_at(step)[side] == least(max(tokens), names)


def test_rows_are_those_of_the_plain_batches_with_less_padding():
    pipeline, plain = make(), make(buckets=None)
    at = rows_by_position(plain, WINDOW)
    shapes = set()
    for step in range(WINDOW):
        batch, lengths = pipeline.batch_at(step), pipeline.lengths_at(step)
        assert batch["encoder_input_tokens"].shape == (ROWS, lengths["inputs"])
        assert batch["decoder_target_tokens"].shape == (ROWS, lengths["targets"])
        shapes.add(tuple(lengths.values()))
        for row, position in enumerate(positions(pipeline, step)):
            for name, whole in at[position].items():
                part = batch[name][row]
                np.testing.assert_array_equal(part, whole[: len(part)], err_msg=name)
                if name != "decoder_input_tokens":  # whose last token may stand before padding
                    assert name == "feature_ids" or not whole[len(part) :].any(), name
    assert 1 < len(shapes) < WINDOW


def test_batches_are_sorted_within_a_window_and_not_over_it():
    """Lengths are those of sorted examples cut into batches, which come in any order."""
    pipeline = make(global_batch_size=4)
    monotonous = 0
    for window in range(40):
        lengths = [
            pipeline.lengths_at(step) for step in range(window * WINDOW, (window + 1) * WINDOW)
        ]
        inputs = [of["inputs"] for of in lengths]
        ordered = sorted((of["inputs"], of["targets"]) for of in lengths)
        monotonous += inputs == sorted(inputs)
        needed = sorted(
            tuple(
                least(min(len(getattr(of, side)[i]), LENGTHS[side]), known)
                for side, known in (("inputs", (4, 8, 16)), ("targets", (4, 8)))
            )
            for step in range(window * WINDOW, (window + 1) * WINDOW)
            for of, i in [
                (pipeline._data[name], example) for name, example, _ in pipeline.origins_at(step)
            ]
        )
        parts = [needed[i * 4 : (i + 1) * 4] for i in range(WINDOW)]
        assert ordered == sorted(tuple(np.max(part, axis=0).tolist()) for part in parts)
    assert monotonous < 20  # of 40: batches are shuffled


def test_examples_of_one_length_stay_in_their_order():
    """So that their batches are as balanced as without."""
    data = {
        cell: dataclasses.replace(of, inputs=Ragged.from_rows([[5]] * 40))
        for cell, of in data_of().items()
    }
    more = {"lengths": LENGTHS, "global_batch_size": 32, "seed": 0}
    made, plain = (
        TrainPipeline(data, CELLS, length_buckets=buckets, **more)
        for buckets in ({"inputs": 3}, None)
    )
    for window in range(3):
        steps = range(window * WINDOW, (window + 1) * WINDOW)
        batches = [made.origins_at(step) for step in steps]
        assert sorted(batches, key=lambda batch: batch[0][2]) == [
            plain.origins_at(step) for step in steps
        ]
    assert {made.lengths_at(step)["inputs"] for step in range(3 * WINDOW)} == {4}


def test_rates_are_kept_over_windows():
    pipeline = make(global_batch_size=64)
    for first in (0, 7):
        names = [
            name
            for step in range(first * WINDOW * 16, (first + 1) * WINDOW * 16)  # 5 blocks
            for name, *_ in pipeline.origins_at(step)
        ]
        for cell, rate in CELLS.items():
            assert abs(names.count(cell.name) - rate * len(names)) <= 5


# A pure function of seed and step


def test_any_step_at_any_time_from_any_thread():
    pipeline, again = make(), make()
    steps = np.random.default_rng(0).permutation(6 * WINDOW).tolist()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = dict(zip(steps, pool.map(again.batch_at, steps), strict=True))
        lengths = dict(zip(steps, pool.map(again.lengths_at, steps), strict=True))
    for step in range(6 * WINDOW):
        batch = pipeline.batch_at(step)
        assert lengths[step] == pipeline.lengths_at(step)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, found[step][name])
    assert any(
        (pipeline.batch_at(s)["decoder_target_tokens"].tolist())
        != make(seed=1).batch_at(s)["decoder_target_tokens"].tolist()
        for s in range(3)
    )


def test_processes_have_parts_of_one_batch():
    whole = make()
    parts = [make(rows=rows) for rows in ([0, 1, 4], [2, 3, 5])]
    for step in (0, 3, WINDOW, 4 * WINDOW + 1):
        batch = whole.batch_at(step)
        for part in parts:
            for name, array in part.batch_at(step).items():
                np.testing.assert_array_equal(array, batch[name][part.rows], err_msg=name)


def test_a_position_belongs_to_its_buckets():
    pipeline = make()
    pipeline.check_state(make().position(3))
    with pytest.raises(ValueError, match=r"length_buckets \[1, 5, 3, 2\] -> \[1, 5, 2, 2\]"):
        make(buckets={"inputs": 2, "targets": 2}).check_state(pipeline.position(3))
    with pytest.raises(ValueError, match=r"length_buckets None -> \[1, 5, 3, 2\]"):
        old = make(buckets=None).position(3)
        del old["length_buckets"]
        pipeline.check_state(old)
    older = make(buckets=None)
    older.check_state({k: v for k, v in older.position(3).items() if k != "length_buckets"})


# What packing does not do: examples that change, sources, rows of a cell


def cut_anywhere(example, rng):
    """Of a length that the draw alone knows."""
    return {
        **example,
        "inputs": example["inputs"][: int(rng.integers(1, 20))],
        "targets": np.repeat(example["targets"], 3)[: int(rng.integers(1, 9))],
    }


@pytest.mark.parametrize(
    "transform", [cut_anywhere, SpanCorruption(ByteVocabulary(), noise_density=0.4)]
)
@pytest.mark.parametrize("rows_per_cell", [1, 3])
def test_lengths_are_those_of_the_examples_as_they_are_drawn(transform, rows_per_cell):
    more = {"transforms": {"ner/*": transform}, "rows_per_cell": rows_per_cell}
    more["lengths"] = {"inputs": 16, "targets": 16}
    pipeline, plain = make(**more), make(buckets=None, **more)
    at = rows_by_position(plain, 2 * WINDOW)
    shapes = set()
    for step in range(2 * WINDOW):
        batch, lengths = pipeline.batch_at(step), pipeline.lengths_at(step)
        shapes.add(tuple(lengths.values()))
        for row, position in enumerate(positions(pipeline, step)):
            for name in ("encoder_input_tokens", "decoder_target_tokens"):
                part, whole = batch[name][row], at[position][name]
                np.testing.assert_array_equal(part, whole[: len(part)])
                assert not whole[len(part) :].any()  # nothing is cut
    assert len(shapes) > 1


def make_counting():
    """A pipeline, and a list that grows with each call of its transform."""
    calls = []

    def transform(example, rng):
        calls.append(None)
        return example

    return make(transforms={"*/*": transform}), calls


def test_lengths_of_steps_that_are_over_are_known():
    """A run's log asks for them, of many windows at once."""
    pipeline, calls = make_counting()
    expected = [pipeline.lengths_at(step) for step in range(12 * WINDOW)]
    made = len(calls)
    assert [pipeline.lengths_at(step) for step in range(12 * WINDOW)] == expected
    assert len(calls) == made


def test_threads_do_not_make_windows_at_once():
    inside, most = [], []

    def transform(example, rng):
        inside.append(None)
        most.append(len(inside))
        time.sleep(1e-4)
        inside.pop()
        return example

    pipeline = make(transforms={"*/*": transform})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(pipeline.lengths_at, range(0, 20 * WINDOW, WINDOW)))
    assert len(most) >= 20 * WINDOW * ROWS and max(most) == 1


def test_a_window_of_transforms_is_made_a_batch_at_a_time():
    pipeline, calls = make_counting()
    counts = []
    for step in range(3 * WINDOW):
        before = len(calls)
        pipeline.batch_at(step)
        counts.append(len(calls) - before)
    # Its own rows, and as many of the next window.
    assert set(counts) == {2 * ROWS}


@pytest.mark.parametrize("sources", [16, 12])
def test_sources_are_as_long_as_inputs_where_they_were(sources):
    pipeline, plain = make(sources=sources), make(buckets=None, sources=sources)
    at = rows_by_position(plain, WINDOW)
    cut = 0
    for step in range(WINDOW):
        batch = pipeline.batch_at(step)
        found = batch[SOURCE_TOKENS]
        assert found.shape[1] == pipeline.lengths_at(step)["sources"]
        inputs = batch["encoder_input_tokens"]
        assert found.shape[1] == (inputs.shape[1] if sources == 16 else sources)
        cut += inputs.shape[1] < 16
        for row, position in enumerate(positions(pipeline, step)):
            for name in (SOURCE_TOKENS, "encoder_input_tokens"):
                part, whole = batch[name][row], at[position][name]
                np.testing.assert_array_equal(part, whole[: len(part)])
                assert not whole[len(part) :].any()
    assert cut


def test_rows_of_a_cell_stay_together():
    pipeline = make(rows_per_cell=3)
    for step in range(3 * WINDOW):
        origins = pipeline.origins_at(step)
        for group in (origins[:3], origins[3:]):
            assert len({name for name, *_ in group}) == 1
            first = group[0][2]
            assert first % 3 == 0
            assert [position for *_, position in group] == [first, first + 1, first + 2]


# What is told, and what is refused


@pytest.mark.parametrize("sources", [None, 16, 12])
def test_the_report_is_what_a_count_by_hand_gives(sources):
    pipeline, plain = make(sources=sources), make(buckets=None, sources=sources)
    told = pipeline.report().by_length
    batches, without = ([of.batch_at(step) for step in range(WINDOW)] for of in (pipeline, plain))
    names = ("encoder_input_tokens", "decoder_target_tokens")
    shapes = [tuple(batch[name].shape[1] for name in names) for batch in batches]
    assert told.lengths == tuple(shapes)
    assert told.tokens == tuple(sum(int((b[name] > 0).sum()) for b in batches) for name in names)
    for found, of in ((told.target_tokens, batches), (told.target_tokens_without, without)):
        counts = [int((b["decoder_target_tokens"] > 0).sum()) for b in of]
        assert found == (min(counts), max(counts))

    varied = by_itself = 0.0
    for cell in CELLS:
        shares = [
            sum(name == cell.name for name, *_ in pipeline.origins_at(step)) / ROWS
            for step in range(WINDOW)
        ]
        mean = sum(shares) / WINDOW
        varied += sum((share - mean) ** 2 for share in shares) / WINDOW
        by_itself += mean * (1 - mean) / ROWS  # of a binomial
    assert told.variance == pytest.approx(varied / by_itself)
    positions = [sum(of) * ROWS for of in zip(*shapes, strict=True)]
    full = [f"{tokens / held:.0%}" for tokens, held in zip(told.tokens, positions, strict=True)]
    line = told.line()
    assert f"; {full[0]} of the inputs' positions and {full[1]} of the targets' hold tokens" in line
    for shape in set(shapes):
        assert f"{shape[0]}/{shape[1]} ({shapes.count(shape) / WINDOW:.0%})" in line
    assert plain.report().by_length is None


def test_a_single_cell_has_no_shares_that_vary():
    (cell, of), *_ = data_of().items()
    more = {"lengths": LENGTHS, "global_batch_size": ROWS, "length_buckets": BUCKETS}
    told = TrainPipeline({cell: of}, {cell: 1.0}, **more).report().by_length
    assert told.variance is None and "shares" not in told.line()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, r"length_buckets=\{'inputs': 3, 'targets': 2\}: no effect with pack"),
        ({"lengths": {"inputs": 18, "targets": 8}}, "3 lengths, .* up to 18: expected 1 or more"),
        ({"buckets": {"inputs": 1, "targets": 5}}, "5 lengths, .* up to 8: expected 1 or more"),
        ({"buckets": {"inputs": 0, "targets": 2}}, "0 lengths, .* up to 16: expected 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
