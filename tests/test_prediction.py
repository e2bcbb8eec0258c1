"""Predictions for texts of one's own: features, weights, forms of input, parts, a prompt."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import make_base_run, write_words

from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data.cells import Cell
from flix_jax.experiments import inference, prediction, requests, training
from flix_jax.experiments.chat import chat
from flix_jax.experiments.job import Job
from flix_jax.models.decoding import Decoding
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.training.optimizers import Optimizer, Schedule

SPACE = FeatureSpace(
    (FeatureType("task", ("up", "back"), rank=2), FeatureType("language", ("x", "y"), rank=2))
)
WORDS = ("abcd", "dcba", "ab", "fed", "e", "faced", "deface")
MIXED = [
    {"input": word, "task": ("up", "back")[i % 2], "language": "xy"[i // 2 % 2]}
    for i, word in enumerate(WORDS)
]


@pytest.fixture(scope="module")
def bases_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = make_base_run(write_words(tmp_path_factory.mktemp("data")))
    return dataclasses.replace(
        base,
        base=base,
        inputs_length=80,
        adapters=AdapterSpec(SPACE),
        optimizer=Optimizer("sgd", Schedule(learning_rate=3.0)),
        total_steps=4,
    )


@pytest.fixture(scope="module")
def whole(run, bases_dir, tmp_path_factory):
    """The folder of the trained run."""
    folder = tmp_path_factory.mktemp("run")
    training.train(run, folder, bases_dir=bases_dir)
    return folder


@pytest.fixture
def infer(run, whole, bases_dir, tmp_path):
    """(lines, options of prediction.infer) -> what is written; `.said` is what was said."""

    def infer(lines, run=run, run_dir=whole, output="out.jsonl", source="in.jsonl", **options):
        text = lines if isinstance(lines, str) else "".join(json.dumps(x) + "\n" for x in lines)
        (tmp_path / source).write_text(text)
        said.clear()
        count = prediction.infer(
            run,
            run_dir,
            input_path=tmp_path / source,
            output_path=tmp_path / output,
            bases_dir=bases_dir,
            say=said.append,
            **options,
        )
        got = [json.loads(line) for line in (tmp_path / output).read_text().splitlines()]
        assert count == len(got)
        return got

    said: list[str] = []
    infer.said = said
    return infer


@pytest.mark.exhaustive
def test_by_beams_and_by_drawing(infer):
    greedily = [line["prediction"] for line in infer(MIXED)]
    one = infer(MIXED, decoding=Decoding(beams=1))
    assert [line["predictions"] for line in one] == [[text] for text in greedily]
    for line, record in zip(infer(MIXED, decoding=Decoding(beams=3)), MIXED, strict=True):
        assert line.items() >= record.items()
        assert line["prediction"] == line["predictions"][0] and len(line["predictions"]) == 3
        assert line["scores"] == sorted(line["scores"], reverse=True) and line["scores"][0] < 0

    def drawn(**options):
        return infer(MIXED, decoding=Decoding(sampling=True, **options))

    some = [drawn(seed=seed, temperature=3.0) for seed in (1, 1, 2)]
    assert some[0] == some[1] != some[2] and "scores" not in some[0][0]
    assert [line["prediction"] for line in drawn(top_k=1)] == greedily


@pytest.mark.parametrize(
    "features", ["task=up,language=x", "task=back:0.5,task=up:2,language=x:-1,language=y:0.25"]
)
def test_folded_predicts_the_same(infer, monkeypatch, features):
    lines, folded = [{"input": word} for word in WORDS], []
    fold = Job.folded
    monkeypatch.setattr(Job, "folded", lambda *args: folded.append(1) or fold(*args))
    options = {"features": features, "decoding": Decoding(beams=2)}
    both = [infer(lines, fold=how, **options) for how in ("auto", "never")]
    assert len(folded) == 1
    for one, other in zip(*both, strict=True):
        assert one["predictions"] == other["predictions"]
        np.testing.assert_allclose(one["scores"], other["scores"], rtol=1e-4)


def test_lines_of_several_sets_are_not_folded(infer, monkeypatch):
    monkeypatch.setattr(Job, "folded", None)
    infer(MIXED, fold="auto")
    with pytest.raises(ValueError, match="fold 'always': the lines have 4 sets of features"):
        infer(MIXED, fold="always")
    with pytest.raises(ValueError, match="unknown fold 'alwys'; did you mean 'always'"):
        infer(MIXED, fold="alwys")


def test_a_lora_is_used_and_lines_without_features_are_refused(infer, run, bases_dir, tmp_path):
    lora = AdapterSpec(FeatureSpace((FeatureType("shared", ("shared",), rank=2),)))
    trial = dataclasses.replace(run, adapters=lora, total_steps=2)
    training.train(trial, tmp_path / "lora", bases_dir=bases_dir)
    lines = [{"input": "abc"}, {"input": "fed", "language": "zz"}]
    infer(lines, run=trial, run_dir=tmp_path / "lora")
    assert infer.said == []
    with pytest.raises(ValueError, match="override has no effect without features"):
        infer(lines, run=trial, run_dir=tmp_path / "lora", override=True)
    with pytest.raises(ValueError, match=r"in.jsonl:1: no known feature of task, language"):
        infer(lines)
    infer(lines, features="task=up")
    assert infer.said == [
        "1 of 2 lines have an unknown language and run without one",
        "1 of 2 lines have no language",
    ]


def test_inputs_that_are_too_long_are_cut_and_counted(infer):
    long, same, short = "ab" * 50, "ab" * 39 + "a", "abc"
    lines = [{"input": short}, {"input": long}, {"input": same}]
    first, cut, whole_one = infer(lines, features="task=up")
    said = infer.said[-1]
    assert said.startswith("1 of 3 inputs are cut at Run.inputs_length=80 tokens: of ")
    assert said.endswith("in.jsonl:2")
    assert cut["prediction"] == whole_one["prediction"]
    assert first == infer(lines[:1], features="task=up")[0]


def test_weights_are_of_the_sum(infer, run, whole, bases_dir):
    """Weighted features against the network whose kernels have the weighted updates added."""
    weighed = {"task": "up", "language": {"x": 0.7, "y": -0.3}}
    lines = [{"input": word, **weighed} for word in WORDS] + MIXED
    got = infer(lines, decoding=Decoding(beams=2))[: len(WORDS)]

    job = Job(run, whole, bases_dir=bases_dir)
    trained, frozen, _ = inference.restore(job)
    kernels = dict(tree.named_leaves(frozen))
    for path in kernels:
        if path[-1] != "kernel" or (*path[:-1], "flix", "task", "a") not in dict(
            tree.named_leaves(trained)
        ):
            continue
        banks = dict(tree.named_leaves(trained))
        parts = [("task", 0, 1.0), ("language", 0, 0.7), ("language", 1, -0.3)]
        for kind, value, weight in parts:
            a, b = (np.asarray(banks[(*path[:-1], "flix", kind, side)][value]) for side in "ab")
            update = weight * np.einsum("...dr,...ro->...do", a, b)  # layers first, if there
            kernel = np.asarray(kernels[path])
            if update.ndim == 3:
                update = update.swapaxes(0, 1)
            kernels[path] = kernel + update.reshape(kernel.shape)
    folded = tree.from_named(list(kernels.items()))
    plain = EncoderDecoder(job.model.module)
    search = jax.jit(
        lambda batch: plain.predict_n(folded, batch, max_length=run.targets_length, beams=2)
    )
    vocabulary = run.vocabulary.build()
    for word, line in zip(WORDS, got, strict=True):
        tokens = jnp.zeros((1, 10), jnp.int32)
        tokens = tokens.at[0, : len(word) + 1].set(jnp.asarray([*vocabulary.encode(word), 1]))
        ids, scores = search({"encoder_input_tokens": tokens})
        texts = [vocabulary.decode([int(t) for t in row if t > 0]) for row in ids[0]]
        assert line["predictions"] == texts
        np.testing.assert_allclose(line["scores"], scores[0], rtol=1e-4, atol=2e-6)


def test_an_output_that_cannot_be_written_is_refused_first(infer, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(prediction, "Predictor", None)
    with pytest.raises(ValueError, match="folder: is a folder, expected a file to write"):
        infer(MIXED, output="folder")


def test_what_was_predicted_before_is_replaced(infer):
    before = [{**line, "prediction": "p", "predictions": ["p"], "scores": [0.0]} for line in MIXED]
    assert infer(before) == infer(MIXED)


def test_a_language_has_the_annotations_of_its_cells(tmp_path):
    source = tmp_path / "in.jsonl"
    lines = [{"language": "x"}, {"language": ["x"]}, {"language": {"x": 1, "y": 1}}, {}]
    source.write_text("".join(json.dumps({"input": "a", "task": "up", **x}) + "\n" for x in lines))
    family = FeatureType("family", ("Bantu", "Romance"))
    space = FeatureSpace((*SPACE.types, family))
    cells = [Cell("up", language, extra=(("family", "Bantu"),)) for language in "xy"]
    said: list[str] = []
    read = requests.read(source, space, "", cells=cells, say=said.append)
    assert [r.annotations.get("family") for r in read] == ["Bantu", "Bantu", None, None]
    assert read[1].annotations["cell"] == "up/x"
    assert said == ["2 of 4 lines have no family", "1 of 4 lines have no language"]


def test_a_list_of_features_is_their_sum(infer):
    one = infer([{"input": w, "task": "up", "language": ["x", "y"]} for w in WORDS])
    other = infer([{"input": w, "task": "up", "language": {"x": 1, "y": 1}} for w in WORDS])
    assert [x["prediction"] for x in one] == [x["prediction"] for x in other]


def test_lines_say_what_they_are_unless_overridden(infer):
    lines = [{"input": word, "task": "up", "language": "x"} for word in WORDS]
    as_they_are = infer(lines, features="task=back,language=y")
    assert as_they_are == infer(lines)
    over = infer(lines, features="task=back", override=True)
    swapped = infer([{**line, "task": "back"} for line in lines])
    assert [x["prediction"] for x in over] == [x["prediction"] for x in swapped]
    assert [x["task"] for x in over] == ["up"] * len(lines)  # what is read is written


def test_text_is_read_line_by_line(infer):
    expected = infer([{"input": word} for word in ("ab", "", "déf")], features="task=up")
    assert infer("\ufeffab\n\r\ndéf\n", source="in.txt", features="task=up") == expected
    assert infer("ab\n\ndéf", source="in", form="text", features="task=up") == expected
    assert infer("", source="in.txt", features="task=up") == []
    with pytest.raises(ValueError, match="unknown input form 'txt'; did you mean 'text'"):
        infer("", form="txt")


def test_what_was_done_is_not_done_again(infer, monkeypatch, tmp_path):
    lines = [{"input": word, "task": "up"} for word in WORDS * 6]  # 42 lines, 8 to a batch
    monkeypatch.setattr(prediction, "_BATCHES", 2)
    expected = infer(lines, decoding=Decoding(sampling=True, temperature=2.0))
    called, predict = [], prediction.Predictor.__call__

    def fails_at_third(self, *args):
        called.append(args[1])
        if called == [0, 2]:
            raise KeyboardInterrupt
        return predict(self, *args)

    monkeypatch.setattr(prediction.Predictor, "__call__", fails_at_third)
    options = {"decoding": Decoding(sampling=True, temperature=2.0), "output": "again.jsonl"}
    with pytest.raises(KeyboardInterrupt):
        infer(lines, **options)
    assert not (tmp_path / "again.jsonl").exists()
    (parts,) = tmp_path.glob("again.jsonl.parts-*")
    other = infer(lines, features="language=x", **options)
    assert len(other) == len(lines) and called == [0, 2, 0, 2, 4]
    assert list(tmp_path.glob("again.jsonl.parts-*")) == [parts]  # others begin anew, in their own
    del called[:]
    called.append(None)
    again = infer(lines, **options)
    assert again == expected and called == [None, 2, 4]
    assert infer.said[-1] == "infer: 16 of 42 lines were there already"
    assert not list(tmp_path.glob("again.jsonl.parts-*"))


def test_one_program_for_each_length(infer, caplog):
    lengths = [*range(24, 32), *range(50, 58), *range(72, 80)]  # 8 to a batch
    lines = [{"input": "a" * n, "task": "up"} for n in lengths[::-1]]
    jax.config.update("jax_log_compiles", True)
    try:
        infer(lines, fold="never", decoding=Decoding(sampling=True, top_k=7))
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = sum("Compiling jit(program)" in r.getMessage() for r in caplog.records)
    assert compiled == 3  # 32, 64 and the run's 80


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("task=up,language=x", {"task": {"up": 1.0}, "language": {"x": 1.0}}),
        ("language=x:0.7, language = y : -.3", {"language": {"x": 0.7, "y": -0.3}}),
        ("", {}),
    ],
)
def test_features_are_read(text, features):
    assert requests.parse_features(text, SPACE) == features


def test_the_name_of_a_cell_may_have_a_colon():
    cells = FeatureSpace((FeatureType("cell", ("translation/sw:fr2sw", "a:2")),))
    read = requests.parse_features("cell=translation/sw:fr2sw,cell=a:2:0.5", cells)
    assert read == {"cell": {"translation/sw:fr2sw": 1.0, "a:2": 0.5}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task", "'task' is not of the form type=value"),
        ("task=upp", "'upp' is no task; did you mean 'up'"),
        ("task=up:x", "'up:x' is no task"),
        ("task=up:inf", "weight inf of 'up': expected a finite number"),
        ("task=up:1e39", "weight 1e\\+39 of 'up': expected a finite number of float32"),
        ("tsk=up", "no type 'tsk'; did you mean 'task'"),
        ("task=up,task=up:2", "task=up is named more than once"),
    ],
)
def test_features_that_there_are_not(text, says):
    with pytest.raises(ValueError, match=says):
        requests.parse_features(text, SPACE)
    with pytest.raises(ValueError, match="the run has no adapters"):
        requests.parse_features("task=up", None)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"task": "up"}, "in.jsonl:2: expected a text in the field 'input'"),
        ({"input": "a", "task": {"up": "much"}}, "in.jsonl:2: weight 'much' of 'up'"),
        ({"input": "a", "task": []}, "in.jsonl:2: no known feature of task, language"),
        ({"input": "a", "task": "up", "x": "\ud800"}, "in.jsonl:2: .* is half a character"),
        ({"input": "a", "task": {"up": 10**400}}, "in.jsonl:2: weight 10"),
    ],
)
def test_lines_that_cannot_be_used(infer, line, says):
    with pytest.raises(ValueError, match=says):
        infer([MIXED[0], line])


def test_a_prompt_answers_with_the_best_predictions(infer, run, whole, bases_dir):
    expected = infer(
        [{"input": "abcd", "task": "up"}, {"input": "abcd", "language": {"x": 0.5, "y": 0.5}}],
        decoding=Decoding(beams=2),
        fold="never",
    )
    said: list[str] = []
    lines = [
        "abcd\n",
        ":features task=up",
        "abcd",
        ":features language=x:0.5,language=y:0.5",
        "abcd",
        ":features task=upp",
        ":beam 4",
        ":beams many",
        ":beams 3",
        "abcd",
        ":help",
        "",
        ":quit",
        "abcd",
    ]
    chat(
        run,
        whole,
        iter(lines),
        decoding=Decoding(beams=2),
        bases_dir=bases_dir,
        say=said.append,
    )

    def answer(line):
        numbered = zip(line["predictions"], line["scores"], strict=True)
        return "\n".join(f"{score:8.3f}  {text}" for text, score in numbered)

    assert said[0].endswith("step 4. features none, 2 beams. :help tells what can be typed.")
    assert said[1].startswith("error: no known feature of task, language")
    assert said[2:6] == [
        "features task=up, 2 beams",
        answer(expected[0]),
        "features language=x:0.5,language=y:0.5, 2 beams",
        answer(expected[1]),
    ]
    assert said[6] == "error: features 'task=upp': 'upp' is no task; did you mean 'up'?"
    assert said[7].startswith("error: no command :beam; did you mean ':beams'")
    assert said[8] == "error: :beams many: expected a number"
    assert said[9] == "features language=x:0.5,language=y:0.5, 3 beams"
    assert len(said[10].split("\n")) == 3
    assert ":features task=ner" in said[11] and len(said) == 12
