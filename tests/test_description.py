"""The description of data against counting by loops over the texts themselves."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_vocabularies import train_model

from flix_jax import cli
from flix_jax.data.cells import Cell
from flix_jax.data.description import Lengths, describe
from flix_jax.data.vocabularies import ByteVocabulary, SentencePieceVocabulary
from flix_jax.tasks.xtreme_up import XtremeUp

BYTES = ByteVocabulary()
LIMITS = {"inputs": 4, "targets": 2}


@dataclasses.dataclass
class Memory:
    """A source that holds {cell: {split: [(input, target)]}}."""

    data: dict[Cell, dict[str, list[tuple[str, str]]]]

    def cells(self):
        return tuple(self.data)

    def splits(self, cell):
        return tuple(self.data[cell])

    def pairs(self, cell, split):
        inputs, targets = zip(*self.data[cell][split], strict=True)
        return list(inputs), list(targets)


# Few letters, so that texts coincide; a letter in two forms and two kinds of white space.
TEXTS = st.text("aüu\u0308 \u00a0", max_size=3)
ROWS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)
SPLITS = st.dictionaries(st.sampled_from(["train", "validation", "test"]), ROWS, min_size=1)
SOURCES = st.lists(SPLITS, min_size=1, max_size=3).map(
    lambda parts: Memory({Cell("ner", f"l{i}"): splits for i, splits in enumerate(parts)})
)


def percentile(values, percent):
    """The least value that `percent` of the values do not exceed."""
    return min(v for v in values if sum(w <= v for w in values) * 100 >= percent * len(values))


def same(text):
    """What equal texts have in common: split at white space first, then composed."""
    return tuple(unicodedata.normalize("NFC", word) for word in text.split())


def lengths(values):
    return Lengths(*(percentile(values, percent) for percent in (50, 95, 99, 100)))


@given(SOURCES)
def test_every_number_is_that_of_counting_by_loops(source):
    found = describe(source, vocabulary=BYTES, lengths=LIMITS)
    assert [(part.cell, part.split) for part in found.parts] == [
        (cell.name, split) for cell in source.data for split in source.data[cell]
    ]
    parts = iter(found.parts)
    for cell, splits in source.data.items():
        for split, rows in splits.items():
            part = next(parts)
            in_bytes = [len(text.encode()) for text, _ in rows]
            out_bytes = [len(text.encode()) for _, text in rows]
            assert part.examples == len(rows)
            assert (part.input_bytes, part.target_bytes) == (lengths(in_bytes), lengths(out_bytes))
            assert part.input_tokens == lengths([n + 1 for n in in_bytes])
            assert part.target_tokens == lengths([n + 1 for n in out_bytes])
            assert part.cut_inputs == sum(n + 1 > 4 for n in in_bytes)
            assert part.cut_targets == sum(n + 1 > 2 for n in out_bytes)
            both = [tuple(map(same, row)) for row in rows]
            assert part.duplicates == sum(row in both[:i] for i, row in enumerate(both))
            assert part.empty_targets == sum(target == "" for _, target in rows)
            elsewhere = [
                {same(text) for s, others in splits.items() if s != split for text, _ in others},
                {
                    same(text)
                    for c, others in source.data.items()
                    for rows_there in others.values()
                    for text, _ in rows_there
                    if c != cell
                },
            ]
            overlaps = [sum(same(text) in texts for text, _ in rows) for texts in elsewhere]
            assert [part.in_other_splits, part.in_other_cells] == overlaps


@given(SOURCES)
def test_totals_are_of_all_cells_together(source):
    found = describe(source, vocabulary=BYTES, lengths=LIMITS)
    assert [t.split for t in found.totals] == [
        s for s in ("train", "validation", "test") if any(s in d for d in source.data.values())
    ]
    summed = ("examples", "cut_inputs", "duplicates", "empty_targets")
    summed += ("cut_targets", "in_other_splits", "in_other_cells")
    for total in found.totals:
        parts = [part for part in found.parts if part.split == total.split]
        for name in summed:
            assert getattr(total, name) == sum(getattr(part, name) for part in parts)
        rows = [r for d in source.data.values() for r in d.get(total.split, [])]
        assert total.input_bytes == lengths([len(text.encode()) for text, _ in rows])


SW, YO = Cell("ner", "sw"), Cell("topic", "yo")
SMALL = Memory(
    {
        SW: {"train": [("abc", ""), ("abc", ""), ("ü", "x")], "test": [("abc", "y")]},
        YO: {"train": [("ü", "health")]},
    }
)


def test_the_tables_say_what_was_counted():
    text = describe(SMALL, vocabulary=BYTES, lengths=LIMITS).format()
    overview, details, legend = text.split("\n\n")
    assert [line.split() for line in overview.splitlines()[2:]] == [
        ["sw", "3/1", "-"],
        ["yo", "-", "1/-"],
    ]
    rows = [re.split(r"  +", line) for line in details.splitlines()]
    row = dict(zip(rows[0], rows[2], strict=True))
    assert row == {
        "cell": "ner/sw",
        "split": "train",
        "examples": "3",
        "input bytes": "3/3/3/3",
        "target bytes": "0/1/1/1",
        "input tokens": "4/4/4/4",
        "target tokens": "1/2/2/2",
        "inputs cut": "0",
        "targets cut": "0",
        "duplicates": "1 (33.3%)",
        "empty targets": "2 (66.7%)",
        "in other splits": "2 (66.7%)",
        "in other cells": "1 (33.3%)",
    }
    assert [row[:3] for row in rows[-2:]] == [["all", "train", "4"], ["all", "test", "1"]]
    assert "longer than 4 tokens (inputs) or 2 (targets)" in legend


def test_markdown_and_json_hold_the_same_numbers():
    found = describe(SMALL, vocabulary=BYTES, lengths=LIMITS)
    table = found.format("markdown").split("\n\n")[1].splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert set(table[1]) == set("|-:") and table[1].count("-:|") == table[0].count("|") - 2
    assert [entry.strip() for entry in table[2].split("|")][1:5] == [
        "ner/sw",
        "train",
        "3",
        "3/3/3/3",
    ]
    value = json.loads(found.format("json"))
    assert value["lengths"] == LIMITS and len(value["cells"]) == 3 and len(value["all"]) == 2
    first = value["cells"][0]
    assert (first["task"], first["language"], first["split"]) == ("ner", "sw", "train")
    assert first["target_bytes"] == {"median": 0, "p95": 1, "p99": 1, "maximum": 1}
    assert value["cells"][-1]["in_other_cells"] == 1


def test_without_vocabulary_or_lengths_their_columns_are_absent():
    plain = describe(SMALL)
    assert plain.parts[0].input_tokens is None and plain.parts[0].cut_inputs is None
    assert "input tokens" not in plain.format() and "inputs cut" not in plain.format()
    assert "inputs cut" not in describe(SMALL, vocabulary=BYTES).format()
    with pytest.raises(ValueError, match="a vocabulary is needed"):
        describe(SMALL, lengths=LIMITS)
    with pytest.raises(ValueError, match="no cells to describe"):
        describe(SMALL, [])


def test_tokens_are_those_that_training_sees(tmp_path):
    from flix_jax.data.seqio_tasks import load_cell

    rows = ["hapana mtu", "hapana", "mtu mtu mtu mtu"]
    path = tmp_path / "data" / "topic" / "train" / "sw.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps({"input": r, "target": r[:6]}) + "\n" for r in rows))
    source = XtremeUp(str(tmp_path / "data"))
    pieces = SentencePieceVocabulary(train_model(tmp_path / "swahili.model"))
    for vocabulary in (BYTES, pieces):
        limits = {"inputs": 11, "targets": 4}
        (task,) = source.register(source.cells(), vocabulary=vocabulary, space=None).values()
        whole = load_cell(task, {"inputs": 99, "targets": 99})
        cut = load_cell(task, limits)
        (part,) = describe(source, vocabulary=vocabulary, lengths=limits).parts
        assert part.input_tokens == lengths([len(whole.inputs[i]) for i in range(3)])
        assert part.target_tokens == lengths([len(whole.targets[i]) for i in range(3)])
        assert (part.cut_inputs, part.cut_targets) == (cut.cut_inputs, cut.cut_targets)


# The command


@pytest.fixture
def folder(tmp_path):
    for split, rows in {"train": ["ab", "ab"], "test": ["ab", "cd"]}.items():
        for task in ("topic", "mine"):
            path = tmp_path / "data" / task / split / "sw.jsonl"
            path.parent.mkdir(parents=True)
            path.write_text("".join(json.dumps({"input": r, "target": ""}) + "\n" for r in rows))
    (tmp_path / "run.gin").write_text(
        "include 'configs/models/tiny_bytes.gin'\ninclude 'configs/runs/train_all.gin'\n"
        f"Run.source = @XtremeUp()\nXtremeUp.data_dir = '{tmp_path / 'data'}'\n"
        "Mixture.include = ('topic/*',)\nRun.vocabulary = @ByteVocabulary()\n"
        "Run.total_steps = 1\nRun.batch_size = 1\nRun.inputs_length = 2\nRun.targets_length = 1\n"
    )
    return tmp_path


def run(capsys, *flags):
    status = cli.main(["data", "describe", *map(str, flags)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_folder_is_described_without_tensorflow_or_jax(folder):
    code = (
        "import sys; from flix_jax import cli;"
        f"assert cli.main(['data', 'describe', '--data_dir={folder / 'data'}']) == 0;"
        "assert not {'tensorflow', 'seqio', 'jax'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "topic/sw" in done.stdout and "mine/sw" in done.stdout


def test_a_configuration_gives_cells_vocabulary_and_lengths(folder, capsys):
    status, out, err = run(capsys, f"--gin_file={folder / 'run.gin'}", "--format=json")
    assert (status, err) == (0, "")
    value = json.loads(out)
    assert {entry["cell"] for entry in value["cells"]} == {"topic/sw"}
    assert value["lengths"] == {"inputs": 2, "targets": 1}
    assert [entry["cut_inputs"] for entry in value["cells"]] == [2, 2]
    assert [entry["cut_targets"] for entry in value["cells"]] == [0, 0]


def test_a_run_on_babel_is_described(folder, capsys):
    config = (folder / "run.gin").read_text()
    config = config.replace("@XtremeUp()", "@Babel()").replace("'topic/*'", "'qa/qal'")
    config = re.sub("XtremeUp.data_dir = .*", f"Babel.cache_dir = '{folder / 'babel'}'", config)
    sizes = "Babel.sizes = @Sizes()\nSizes.train = 6\nSizes.validation = 3\nSizes.test = 2\n"
    (folder / "babel.gin").write_text(config + sizes + "Sizes.pivot = 2\nSizes.text = 2\n")
    status, out, err = run(capsys, f"--gin_file={folder / 'babel.gin'}")
    assert (status, err) == (0, "")
    assert out.splitlines()[2].split() == ["qal", "6/3/2"]


def test_cells_may_be_chosen(folder, capsys):
    status, out, _ = run(capsys, f"--data_dir={folder / 'data'}", "--cells=mine/*")
    assert status == 0 and "mine/sw" in out and "topic" not in out


@pytest.mark.parametrize(
    "flags, problem",
    [
        ([], "takes either --gin_file or --data_dir"),
        (["--data_dir=data", "--gin_file=run.gin"], "takes either --gin_file or --data_dir"),
        (["--data_dir=data", "--gin.Run.seed=1"], "--gin.Run.seed=1 has no effect without"),
        (["--data_dir=data", "--cells=topik/*"], "--cells: the pattern 'topik/*' matches none"),
        (["--data_dir=data", "--fromat=json"], "no flag --fromat; did you mean '--format'"),
        (["--gin_file=run.gin", "--on_bad_record=skip"], "a run has XtremeUp.on_bad_record"),
        (["--data_dir=dta"], "XtremeUp.data_dir='dta' is not a folder"),
    ],
)
def test_a_mistake_is_one_line(flags, problem, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    status, out, err = run(capsys, *flags)
    assert (status, out) == (cli.USER_ERROR, "")
    assert problem in err and err.count("\n") == 1


def test_a_record_that_cannot_be_read_is_named_by_file_and_line(folder, capsys):
    with (folder / "data" / "topic" / "test" / "sw.jsonl").open("a") as file:
        file.write('{"input": 3}\n')
    status, _, err = run(capsys, f"--data_dir={folder / 'data'}")
    assert status == cli.USER_ERROR and "topic/test/sw.jsonl:3: field 'input'" in err


def test_records_that_cannot_be_read_may_be_skipped_and_are_counted(folder, capsys, caplog):
    with (folder / "data" / "topic" / "test" / "sw.jsonl").open("a") as file:
        file.write('{"input": 3}\n')
    status, out, _ = run(capsys, f"--data_dir={folder / 'data'}", "--on_bad_record=skip")
    assert status == 0 and "topic/sw" in out
    (told,) = [record.getMessage() for record in caplog.records if "topic/test" in str(record.args)]
    assert "1 of 3 records" in told


@pytest.mark.parametrize("command", ["data describe", "download xtreme_up", "submission"])
def test_the_commands_explain_themselves_by_an_example(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert f"flix {command}" in text.split("example:")[1]
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.skipif("XTREME_UP_DIR" not in os.environ, reason="XTREME_UP_DIR is not set")
def test_real_data_take_less_than_a_minute_and_no_line_is_lost():
    root = os.environ["XTREME_UP_DIR"]
    start = time.process_time()
    found = describe(XtremeUp(root), vocabulary=BYTES, lengths={"inputs": 512, "targets": 512})
    assert time.process_time() - start < 60
    expected = sum(path.read_bytes().count(b"\n") for path in Path(root).glob("*/*/*.jsonl"))
    assert sum(part.examples for part in found.parts) == expected
    assert sum(t.examples for t in found.totals) == expected
