"""Predictions that an evaluation left, as XTREME-UP's scorer reads them."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from flix_jax import cli
from flix_jax.data.cells import Mixture
from flix_jax.experiments.run import Run
from flix_jax.experiments.submission import write_submission
from flix_jax.tasks.xtreme_up import XtremeUp

TEXTS = {"input": "x", "target": "y", "text": "x", "spans": []}
COUNTS = {"ner/sw": 3, "translation/en2sw": 2, "transliteration/Latn2Deva.hi": 1, "topic/sw": 1}
VALUES = {"ner.sw": ["PER: ü", "", "\u2028 $$"], "translation.sw": ["a", "b\n"]}
VALUES |= {"transliteration.hi": ["हि"], "topic.sw": ["health"]}


@pytest.fixture
def run(tmp_path):
    """A run over four cells, one of a task that the benchmark does not have."""
    for name, count in COUNTS.items():
        task, file = name.split("/")
        for split in ("train", "test"):
            path = tmp_path / "data" / task / split / f"{file}.jsonl"
            path.parent.mkdir(parents=True)
            path.write_text("\n".join([json.dumps(TEXTS)] * count + ["", " "]))
    (tmp_path / "data" / "ner" / "train" / "yo.jsonl").write_text(json.dumps(TEXTS))
    return run_on(tmp_path / "data")


def run_on(data):
    """What a submission reads of a run."""
    run = SimpleNamespace(source=XtremeUp(str(data)), mixture=Mixture())
    run.split = lambda: Run.split(run)
    return run


def leave(folder, stem, values, **settings):
    """What an evaluation leaves of a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"inputs": "x", "targets": "y", "predictions": value} for value in values]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{stem}.jsonl").write_text(text)
    made = {
        "cell": stem.replace(".", "/"),
        "split": "test",
        "examples_per_cell": None,
        "fingerprint": "a model",
        "predictions_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    (folder / f"{stem}.scores.json").write_text(json.dumps(made | settings))


@pytest.fixture
def evaluated(tmp_path):
    folder = tmp_path / "run" / "evaluations" / "40" / "test"
    for stem, values in VALUES.items():
        leave(folder, stem, values)
    return folder


def write(run, tmp_path, **options):
    return write_submission(run, tmp_path / "run", out_dir=tmp_path / "out", **options)


def read(path):
    """As the published scorer: lines that are blank are passed over."""
    lines = path.read_text(encoding="ascii").splitlines()
    return [json.loads(line)["prediction"] for line in lines if line.strip()]


def all_files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_predictions_lie_where_the_data_do_in_their_order(run, evaluated, tmp_path):
    done = write(run, tmp_path)
    out = tmp_path / "out"
    assert read(out / "ner" / "test" / "sw.jsonl") == VALUES["ner.sw"]
    assert read(out / "translation" / "test" / "en2sw.jsonl") == VALUES["translation.sw"]
    path = out / "transliteration" / "test" / "Latn2Deva.hi.jsonl"
    assert read(path) == VALUES["transliteration.hi"]
    assert all_files(out) == sorted(done.files) and len(done.files) == 3
    assert (done.step, done.missing, done.other_tasks) == (40, {}, ("topic",))


def test_the_evaluators_own_files_make_a_round_trip(run, tmp_path):
    from flix_jax.data.converter import FlixFeatureConverter
    from flix_jax.data.vocabularies import ByteVocabulary
    from flix_jax.evaluation.evaluator import CellEvaluator

    path = tmp_path / "data" / "ner" / "test" / "sw.jsonl"
    texts = ["ab ü", "", "hapana", "ab"]
    path.write_text("".join(json.dumps({"text": text, "spans": []}) + "\n" for text in texts))
    vocabulary = ByteVocabulary()
    cells = [cell for cell in run.source.cells() if "test" in run.source.splits(cell)]
    tasks = run.source.register(cells, vocabulary=vocabulary, space=None)

    def answer(batch):  # the inputs themselves
        return batch["encoder_input_tokens"]

    CellEvaluator(
        tasks=tasks,
        split="test",
        lengths={"inputs": 32, "targets": 32},
        converter=FlixFeatureConverter(None),
        batch_size=4,
    ).evaluate({"generate": answer}, tmp_path / "run", 7, fingerprint="x")
    write(run, tmp_path)
    assert read(tmp_path / "out" / "ner" / "test" / "sw.jsonl") == texts
    hindi = read(tmp_path / "out" / "transliteration" / "test" / "Latn2Deva.hi.jsonl")
    assert hindi == ["hi-Latn-Deva x"]


def test_the_newest_step_with_the_split_is_taken(run, evaluated, tmp_path):
    leave(tmp_path / "run" / "evaluations" / "50", "ner.sw", ["validation only"])
    leave(tmp_path / "run" / "evaluations" / "9" / "test", "ner.sw", VALUES["ner.sw"])
    assert write(run, tmp_path).step == 40
    with pytest.raises(ValueError, match="no predictions of the split 'test' at step 41, but at 9"):
        write(run, tmp_path, step=41)
    with pytest.raises(ValueError, match="no cell has the split 'tset'; did you mean 'test'"):
        write(run, tmp_path, split="tset")


def test_the_best_step_is_taken_on_request(run, evaluated, tmp_path):
    leave(tmp_path / "run" / "evaluations" / "9" / "test", "ner.sw", VALUES["ner.sw"])
    with pytest.raises(ValueError, match="holds no best checkpoint"):
        write(run, tmp_path, step="best")
    (tmp_path / "run" / "best.json").write_text(json.dumps({"values": {"9": 5.0, "8": 4.5}}))
    assert write(run, tmp_path, step="best", partial=True).step == 9


def test_missing_cells_are_named_with_the_reason(run, evaluated, tmp_path):
    leave(evaluated, "translation.sw", ["a"])
    (evaluated / "ner.sw.scores.json").unlink()
    with pytest.raises(ValueError) as error:
        write(run, tmp_path)
    assert "2 of 3 cells with the split 'test'" in str(error.value)
    assert "not evaluated: ner/sw; 1 predictions for 2 records: translation/sw;" in str(error.value)
    assert "--partial" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    done = write(run, tmp_path, partial=True)
    assert done.files == ("transliteration/test/Latn2Deva.hi.jsonl",)
    assert set(done.missing) == {"ner/sw", "translation/sw"}


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"examples_per_cell": 2}, "evaluated in part: ner/sw"),
        ({"predictions_sha256": "0"}, "altered since its evaluation: ner/sw"),
        ({"split": "validation"}, "evaluated as another cell or split: ner/sw"),
        ({"fingerprint": "another"}, "several models, of ner/sw and translation/sw"),
    ],
)
def test_what_is_not_the_whole_cell_by_one_model_is_refused(
    settings, problem, run, evaluated, tmp_path
):
    leave(evaluated, "ner.sw", VALUES["ner.sw"], **settings)
    with pytest.raises(ValueError, match=problem):
        write(run, tmp_path)


@pytest.mark.parametrize(
    "task, value, wanted",
    [
        ("autocomplete", ["a", "b", "c"], None),
        ("autocomplete", ["a", "b"], "a list of 3 texts for autocomplete"),
        ("autocomplete", "abc", "a list of 3 texts"),
        ("retrieval_in_lang", ["17", "4"], None),
        ("retrieval_in_lang", [17], "a list of ids"),
        ("asr", "text", None),
        ("asr", ["text"], "a text for asr"),
        ("asr", None, "null: expected a text"),
    ],
)
def test_each_task_has_its_form(task, value, wanted, tmp_path):
    path = tmp_path / "data" / task / "test" / "sw.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(TEXTS))
    (tmp_path / "data" / "ner" / "train").mkdir(parents=True)
    (tmp_path / "data" / "ner" / "train" / "sw.jsonl").write_text(json.dumps(TEXTS))
    run = run_on(tmp_path / "data")
    leave(tmp_path / "run" / "evaluations" / "1" / "test", f"{task}.sw", [value])
    if wanted is None:
        write(run, tmp_path)
        assert read(tmp_path / "out" / task / "test" / "sw.jsonl") == [value]
    else:
        with pytest.raises(ValueError, match=rf"{task}.sw.jsonl:1: predictions .*{wanted}"):
            write(run, tmp_path)


def test_several_runs_fill_one_folder_but_never_a_file_twice(run, evaluated, tmp_path):
    (tmp_path / "out" / "qa_in_lang").mkdir(parents=True)
    write(run, tmp_path)
    with pytest.raises(ValueError, match="ner/test/sw.jsonl exists already"):
        write(run, tmp_path)


def test_nothing_to_submit_is_one_line(run, tmp_path):
    with pytest.raises(ValueError, match="evaluations holds no predictions of the split 'test'"):
        write(run, tmp_path)
    run.mixture = Mixture(include=("topic/*",))
    with pytest.raises(ValueError, match="the run's tasks are not the benchmark's: topic"):
        write(run, tmp_path)
    with pytest.raises(ValueError, match="Run.source=SimpleNamespace: a submission needs"):
        write(SimpleNamespace(source=SimpleNamespace()), tmp_path)


def test_the_command_reads_the_runs_own_config(run, evaluated, tmp_path, capsys):
    (tmp_path / "run" / "config.gin").write_text(
        "include 'configs/models/tiny_bytes.gin'\ninclude 'configs/runs/train_all.gin'\n"
        "Run.source = @XtremeUp()\nXtremeUp.data_dir = 'nowhere'\nRun.mixture = @Mixture()\n"
        "Run.vocabulary = @ByteVocabulary()\nRun.total_steps = 1\nRun.batch_size = 1\n"
        "Run.inputs_length = 8\nRun.targets_length = 8\n"
    )
    (evaluated / "ner.sw.jsonl").unlink()
    flags = [f"--run_dir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    flags.append(f"--gin.XtremeUp.data_dir='{tmp_path / 'data'}'")
    assert cli.main(["submission", *flags]) == cli.USER_ERROR
    assert "not evaluated: ner/sw" in capsys.readouterr().err
    assert cli.main(["submission", *flags, "--partial"]) == 0
    captured = capsys.readouterr()
    assert "warning: ner/sw is missing: not evaluated" in captured.err
    assert captured.out.splitlines() == [
        "left out, for they are not the benchmark's: topic",
        f"2 files of step 40 in {tmp_path / 'out'}",
    ]
