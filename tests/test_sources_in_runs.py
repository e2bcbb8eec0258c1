"""Runs whose examples have English sources: fused inside adapters, or read before the input."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_runs import make_base_run

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.fusion import Fusion
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.experiments import inference, prediction, requests, together, training
from flix_jax.experiments.chat import chat
from flix_jax.experiments.job import Job
from flix_jax.models.decoding import Decoding
from flix_jax.tasks.formats import TaskFormat
from flix_jax.tasks.source_text import SourceText
from flix_jax.tasks.xtreme_up import XtremeUp
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.partitioning import MeshSpec

LORA = FeatureSpace((FeatureType("shared", ("shared",), rank=2),))
FLIX = FeatureSpace((FeatureType("task", rank=2), FeatureType("language", rank=2)))
FORMATS = {"up": TaskFormat(source="{en}"), "back": TaskFormat(source="{en}")}
JOINED = SourceText(joined="{source}={input}")


def write_parallel(root):
    """Two tasks in three languages, a third of the records without English, one of it too long."""
    rng = np.random.default_rng(0)
    for task, change in (("up", str.upper), ("back", lambda word: word[::-1])):
        for language, letters in (("x", "abc"), ("y", "def"), ("z", "ghi")):
            for split, count in (("train", 30), ("validation", 6)):
                lines = []
                for number in range(count):
                    word = "".join(rng.choice(list(letters), 4))
                    english = {"en": change(word) if number else "x" * 20} if number % 3 else {}
                    english = {"en": "x" * 20} if number == 1 else english
                    lines.append(json.dumps({"input": word, "target": change(word), **english}))
                path = root / task / split / f"{language}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    run = make_base_run(write_parallel(tmp_path_factory.mktemp("data")))
    source = XtremeUp(run.source.data_dir, formats=FORMATS)
    return dataclasses.replace(run, source=source, inputs_length=16, total_steps=2)


@pytest.fixture(scope="module")
def bases_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def adapted(run, **changes):
    options = {
        "base": run,
        "adapters": AdapterSpec(FLIX, fusion=Fusion("cross_attention_from_target")),
        "source_text": SourceText(),
        "optimizer": Optimizer("sgd", Schedule(learning_rate=3.0)),
        "total_steps": 4,
        **changes,
    }
    return dataclasses.replace(run, **options)


@pytest.fixture(scope="module")
def run(base):
    return adapted(base)


@pytest.fixture(scope="module")
def whole(run, bases_dir, tmp_path_factory):
    """(the folder of the trained run, what its evaluation said)."""
    folder, said = tmp_path_factory.mktemp("run"), []
    training.train(run, folder, bases_dir=bases_dir)
    inference.evaluate(run, folder, bases_dir=bases_dir, say=said.append)
    return folder, said


def parameters(run, folder, bases_dir):
    return dict(tree.named_leaves(inference.restore(Job(run, folder, bases_dir=bases_dir))[0]))


def evaluated(folder):
    """The lines of all cells' predictions, by cell."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((folder / "evaluations").rglob("*.jsonl"))
    }


def test_training_tells_of_sources(run, whole):
    folder, _ = whole
    cells = (folder / "cells.txt").read_text()
    lines = [line.split() for line in cells.splitlines() if line.startswith("up/y")]
    # 10 of 30 have none, and the one of 20 letters is cut.
    assert lines[-1][-4:] == ["1", "(3.3%)", "10", "(33.3%)"]
    batch = Job(run, folder, bases_dir=folder).pipeline().batch_at(0)
    assert batch["source_input_tokens"].shape == (8, 16)
    empty = (batch["source_input_tokens"] == 0).all(axis=1)
    assert 0 < empty.sum() < 8


def test_evaluation_reads_sources_and_tells_of_those_that_are_not_there(whole):
    folder, said = whole
    told = [line for line in said if "have no source" in line]
    assert told == [
        "evaluate: 12 examples of 6 of 6 cells have no source and run on their input alone: "
        "back/x, back/y, back/z, up/x, up/y, up/z"
    ]
    for cell, lines in evaluated(folder).items():
        assert [bool(line["source"]) for line in lines] == [False, True, True] * 2, cell


def ask(run, folder, bases_dir, tmp_path, lines, name="in", **options):
    said = []
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prediction.infer(
        run,
        folder,
        input_path=tmp_path / f"{name}.jsonl",
        output_path=tmp_path / f"{name}.out.jsonl",
        bases_dir=bases_dir,
        say=said.append,
        **options,
    )
    found = [json.loads(x) for x in (tmp_path / f"{name}.out.jsonl").read_text().splitlines()]
    return [line["prediction"] for line in found], said


def as_requests(folder, sources=True):
    """The evaluated examples as lines for `flix infer`, and what was predicted for them."""
    lines, predicted = [], []
    for cell, of in evaluated(folder).items():
        task, language = cell.split(".")
        for line in of:
            asked = {"input": line["inputs"], "task": task, "language": language}
            lines.append({**asked, "source": line["source"]} if sources else asked)
            predicted.append(line["predictions"])
    return lines, predicted


def test_a_request_with_its_source_gets_what_evaluation_predicts(run, whole, bases_dir, tmp_path):
    folder, _ = whole
    lines, predicted = as_requests(folder)
    found, said = ask(run, folder, bases_dir, tmp_path, lines)
    assert found == predicted
    assert "12 of 36 lines have no source and run on their input alone" in said
    assert any("6 of 36 sources are cut at 16 tokens" in line for line in said)
    without, said = ask(run, folder, bases_dir, tmp_path, as_requests(folder, False)[0], "without")
    assert "36 of 36 lines have no source and run on their input alone" in said
    differ = [one != other for one, other in zip(found, without, strict=True)]
    has = [bool(line["source"]) for line in lines]
    assert any(differ) and not any(d for d, h in zip(differ, has, strict=True) if not h)


def test_a_request_whose_source_is_no_text_is_refused(run, whole, bases_dir, tmp_path):
    with pytest.raises(ValueError, match=r"in.jsonl:1: expected a text in the field 'source'"):
        ask(run, whole[0], bases_dir, tmp_path, [{"input": "a", "task": "up", "source": 3}])


def test_a_prompt_takes_a_source_for_the_next_input(run, whole, bases_dir):
    folder, _ = whole
    lines, predicted = as_requests(folder)
    said = []

    def answers(typed, run=run, folder=folder):
        said.clear()
        chat(
            run,
            folder,
            typed,
            features="task=up,language=y",
            decoding=Decoding(),
            bases_dir=bases_dir,
            say=said.append,
        )
        return said[1:]

    mine = [(x, p) for x, p in zip(lines, predicted, strict=True) if x["source"]]
    mine = [(x, p) for x, p in mine if (x["task"], x["language"]) == ("up", "y")]
    typed = []
    for line, _ in mine:
        typed += [f":source {line['source']}", line["input"]]
    found = answers(typed)
    texts = [found[i].rpartition("\n")[2] for i in range(1, len(found), 2)]
    assert texts == [p for _, p in mine]
    assert found[1].startswith("(source cut at 16 tokens)\n")
    # The source is that of one input alone.
    line, _ = mine[1]
    once = answers([f":source {line['source']}", line["input"], line["input"]])
    assert once[2] == answers([line["input"]])[0]


@pytest.mark.exhaustive
def test_a_run_goes_on_bit_for_bit(run, whole, bases_dir, tmp_path):
    training.train(dataclasses.replace(run, total_steps=2), tmp_path, bases_dir=bases_dir)
    training.train(run, tmp_path, bases_dir=bases_dir)
    ours, theirs = (parameters(run, x, bases_dir) for x in (whole[0], tmp_path))
    assert all((np.asarray(ours[path]) == np.asarray(theirs[path])).all() for path in ours)


@pytest.mark.exhaustive
def test_microbatches_and_devices_change_nothing(run, whole, bases_dir, tmp_path):
    parts = dataclasses.replace(run, microbatches=2, mesh=MeshSpec(data=4, model=2))
    training.train(parts, tmp_path, bases_dir=bases_dir)
    ours = parameters(run, whole[0], bases_dir)
    for path, leaf in parameters(parts, tmp_path, bases_dir).items():
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(ours[path]), rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_fused_trials_train_together(base, bases_dir, tmp_path):
    runs = [
        adapted(
            base,
            adapters=AdapterSpec(
                FeatureSpace((FeatureType("shared", ("shared",), rank=rank),)), fusion=Fusion(phi)
            ),
            optimizer=Optimizer("adamw", Schedule(learning_rate=0.01)),
        )
        for rank in (1, 3)
        for phi in ("cross_attention",)
    ]
    together.train_together(
        runs,
        [tmp_path / "a", tmp_path / "b"],
        bases_dir=bases_dir,
        configs=[None, None],
        splits=("validation",),
        log_dir=tmp_path / "log",
        title="both",
        say=lambda text: None,
    )
    for run, name in zip(runs, "ab", strict=True):
        training.train(run, tmp_path / "alone" / name, bases_dir=bases_dir)
        alone = parameters(run, tmp_path / "alone" / name, bases_dir)
        for path, leaf in parameters(run, tmp_path / name, bases_dir).items():
            np.testing.assert_allclose(leaf, alone[path], rtol=1e-3, atol=1e-5)
    lines = evaluated(tmp_path / "a")["up.y"]
    assert [bool(line["source"]) for line in lines] == [False, True, True] * 2


def test_joined_sources_are_read_by_the_encoder_of_plain_adapters(base, bases_dir, tmp_path):
    run = adapted(base, adapters=AdapterSpec(LORA), source_text=JOINED, inputs_length=32)
    job = training.train(run, tmp_path, bases_dir=bases_dir)
    assert set(job.batch_shapes(2)) == {
        "encoder_input_tokens",
        "decoder_input_tokens",
        "decoder_target_tokens",
        "decoder_loss_weights",
        "feature_ids",
    }
    text = (tmp_path / "cells.txt").read_text()
    assert "without source" in text and "sources cut" not in text
    said = []
    inference.evaluate(run, tmp_path, bases_dir=bases_dir, say=said.append)
    assert any("12 examples of 6 of 6 cells have no source" in line for line in said)
    lines, predicted = [], []
    for cell, of in evaluated(tmp_path).items():
        for line in of:
            source, _, text = line["inputs"].rpartition("=")
            lines.append({"input": text, "source": source, "language": cell.split(".")[1]})
            predicted.append(line["predictions"])
    assert sum(bool(line["source"]) for line in lines) == 24
    assert ask(run, tmp_path, bases_dir, tmp_path, lines)[0] == predicted


def test_requests_of_a_run_without_sources_may_have_the_field(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"input": "a", "source": 3}\n')
    (request,) = requests.read(tmp_path / "in.jsonl", None, "")
    assert request.text == "a" and request.source == "" and request.record["source"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_text": None}, r"AdapterSpec.fusion = 'cross_attention_from_target' reads a sou"),
        ({"source_text": JOINED}, r"which the run has not: expected Run.source_text = @SourceText"),
        ({"adapters": AdapterSpec(FLIX)}, r"Run.source_text has no effect without AdapterSpec.fus"),
        ({"adapters": None}, r"a base that is a run needs base/Run.source_text = None"),
        (
            {"adapters": AdapterSpec(FLIX, fusion=Fusion(source_width=3))},
            "Fusion.source_width = 3: a run reads sources as text",
        ),
    ],
)
def test_a_fusion_and_a_source_need_each_other(base, change, message):
    with pytest.raises(ValueError, match=message):
        adapted(base, **change)


def test_a_run_without_any_source_is_refused_before_it_computes(base, tmp_path):
    plain = dataclasses.replace(base.source, formats={})
    with pytest.raises(ValueError, match="no example has a source: up has no template"):
        Job(adapted(base, source=plain), tmp_path)
    chosen = SourceText({"up": "{eng}"})
    with pytest.raises(ValueError, match=r"templates\['up'\]: no field 'eng'.*did you mean 'en'"):
        Job(adapted(base, source_text=chosen), tmp_path)

    class Other:
        name = "other"

    with pytest.raises(ValueError, match="Run.source=Other has no English sources"):
        adapted(base, source=Other())


def test_a_bad_file_of_translations_stops_a_run_before_it_trains(base, tmp_path):
    path = tmp_path / "mt" / "up" / "train" / "y.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"id": 99, "source": "a"}\n')
    files = SourceText(files=f"{tmp_path}/mt/{{task}}/{{split}}/{{file}}.jsonl")
    with pytest.raises(ValueError, match=rf"{path}:1: id \"99\" names no record of"):
        training.train(adapted(base, source_text=files), tmp_path / "run", bases_dir=tmp_path)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_base_with_a_fusion_cannot_be_folded(base, run):
    with pytest.raises(ValueError, match=r"Run.base: adapters with a fusion .*read a source text"):
        adapted(base, base=run)


def test_runs_without_sources_are_described_as_ever(base, run):
    assert "source_text" not in dataclasses.replace(base).hparams()
    assert base.fingerprint() == dataclasses.replace(base, source_text=None).fingerprint()
    assert run.fingerprint() != adapted(base, source_text=SourceText(length=8)).fingerprint()
