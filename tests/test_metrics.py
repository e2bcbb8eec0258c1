"""The metrics against the published scorer's numbers, values by hand, and plain references."""

import json
import math
import pathlib
import unicodedata

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from flix_jax.evaluation import metrics

# Made by goldens/make_xtreme_up_goldens.py, which tells what is in it and what is not.
PUBLISHED = json.loads(
    (pathlib.Path(__file__).parent / "goldens" / "xtreme_up_scorer.json").read_text("utf-8")
)
ERROR_RATES = ("cer", "asr_cer")

texts = st.text(alphabet=st.sampled_from("ab c.:$éß읶ﬁ"), max_size=8)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=8)


def in_the_form_of(metric, predictions):
    """Texts as they are, or each as the only guess of a ranking."""
    return [[text] for text in predictions] if metric.ranked else list(predictions)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_equals_the_published_scorer(kind):
    for corpus in PUBLISHED[kind]:
        for name, value in corpus["scores"].items():
            ours = metrics.METRICS[name].function(corpus["targets"], corpus["predictions"])[name]
            # The published span F1 has 1e-13 in its denominators.
            assert ours == pytest.approx(value, rel=0, abs=1e-9), name


def test_the_published_scorer_was_asked_for_every_metric_that_its_tasks_have():
    asked = {
        name for corpora in PUBLISHED.values() for corpus in corpora for name in corpus["scores"]
    }
    assert asked == set(metrics.METRICS) - {"bleu"}


@pytest.mark.parametrize(
    ("target", "prediction", "value"),
    [
        ("LOC: ratio 3:1", "LOC: ratio 3:1", 100.0),
        ("LOC: ratio 3:1", "LOC: ratio 3", 0.0),
        ("PER: a:b $$ LOC: c", "LOC: c", 100 * 2 / 3),
    ],
)
def test_entities_with_colons_count(target, prediction, value):
    assert metrics.span_f1([target], [prediction]) == {"span_f1": pytest.approx(value)}


def test_an_empty_target_holds_no_entity():
    assert metrics.parse_entities("") == []
    # One true positive, one false positive on the empty target.
    scores = metrics.span_f1(["PER: x", ""], ["PER: x", "PER: y"])
    assert scores["span_f1"] == pytest.approx(100 * 2 * 1 / (2 * 1 + 1))
    assert metrics.span_f1(["", ""], ["", ""]) == {"span_f1": 0.0}


def test_a_repeated_entity_counts_as_often_as_it_is_written():
    scores = metrics.span_f1(["PER: x"], ["PER: x $$ PER: x"])
    assert scores["span_f1"] == pytest.approx(200 / 3)


def test_squad_normalisation():
    assert metrics.normalize_squad("  The cat's  (an) A-team, the end. ") == "cats ateam end"


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("What? Yes,  no ... (I THINK)!", "what yes no i think"),
        ("it's 3.5 or 1,000", "it s 3.5 or 1,000"),
        (".net , ?really", ".net really"),
        ("(yes.) [no]\tmaybe\n", "yes. no maybe"),
        ('"so," he said', '"so," he said'),
        ("ሰላም። क्या? نہیں؟", "ሰላም። क्या نہیں؟"),
        (" . ", ""),
    ],
)
def test_asr_normalisation(text, normalised):
    assert metrics.normalize_asr(text) == normalised
    assert metrics.asr_cer([text + "x"], [normalised + "x"])["asr_cer"] < 100
    assert metrics.asr_cer(["abc"], ["Abc!"]) == {"asr_cer": 0}
    assert metrics.cer(["abc"], ["Abc!"])["cer"] == pytest.approx(200 / 3)


def test_where_all_targets_are_empty_the_error_rate_counts_one_character():
    assert metrics.cer([""], ["abc"]) == {"cer": 300}
    assert metrics.asr_cer(["..."], ["a"]) == {"asr_cer": 100}


def test_rankings_are_cut_where_the_metric_ends():
    guesses = ["b", "a", "a", "c", *"defghi", "j", "k"]
    top_3 = [metrics.top_3_accuracy([t], [guesses])["top_3_accuracy"] for t in "bac"]
    assert top_3 == [100, 100, 0]
    ranks = [metrics.mrr_at_10([t], [guesses])["mrr_at_10"] for t in "bacijk"]
    assert ranks == pytest.approx([100, 50, 25, 10, 0, 0])
    assert metrics.mrr_at_10(["a", "a"], [("a",), ()]) == {"mrr_at_10": 50}
    assert metrics.top_3_accuracy(["a", "a"], [("a",), ()]) == {"top_3_accuracy": 50}


@given(st.lists(st.tuples(texts, st.lists(texts, max_size=12)), min_size=1, max_size=8))
def test_ranked_metrics_are_their_definitions(examples):
    targets, rankings = zip(*examples, strict=True)
    hits = reciprocal = 0.0
    for target, ranking in examples:
        ranks = [rank for rank, guess in enumerate(ranking, 1) if guess == target]
        hits += any(rank <= 3 for rank in ranks)
        reciprocal += max((1 / rank for rank in ranks if rank <= 10), default=0)
    top_3 = metrics.top_3_accuracy(targets, rankings)["top_3_accuracy"]
    assert top_3 == pytest.approx(100 * hits / len(examples))
    mrr = metrics.mrr_at_10(targets, rankings)["mrr_at_10"]
    assert mrr == pytest.approx(100 * reciprocal / len(examples))


def test_texts_and_rankings_are_not_taken_for_each_other():
    with pytest.raises(ValueError, match="^top_3_accuracy: prediction 2 of 2 is 'b'; expected a r"):
        metrics.top_3_accuracy(["a", "b"], [["a"], "b"])
    with pytest.raises(
        ValueError, match=r"^mrr_at_10: prediction 1 of 1 is \[1, 2\]; expected a r"
    ):
        metrics.mrr_at_10(["1"], [[1, 2]])
    with pytest.raises(
        ValueError, match=r"^chrf: prediction 1 of 1 is \['a'\]; expected one text$"
    ):
        metrics.chrf(["a"], [["a"]])
    with pytest.raises(ValueError, match="^exact_match: target 1 of 1 is b'a'; expected one text$"):
        metrics.exact_match([b"a"], ["a"])


@given(pairs)
def test_chrf_and_bleu_are_sacrebleus_own(examples):
    targets, predictions = map(list, zip(*examples, strict=True))
    assert metrics.chrf(targets, predictions)["chrf"] == pytest.approx(
        sacrebleu.corpus_chrf(predictions, [targets]).score, abs=1e-12
    )
    assert metrics.bleu(targets, predictions)["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(predictions, [targets]).score, abs=1e-12
    )


def test_bleu_by_hand():
    targets = ["the cat sat on the mat", "it rained all day"]
    predictions = ["the cat sat on a mat", "it rained"]
    # n-grams in both: 7 of 8, 4 of 6, 2 of 4, 1 of 3; brevity exp(1 - 10 / 8).
    precisions = math.prod([7 / 8, 4 / 6, 2 / 4, 1 / 3])
    expected = 100 * math.exp(1 - 10 / 8) * precisions ** (1 / 4)
    assert metrics.bleu(targets, predictions)["bleu"] == pytest.approx(expected, abs=1e-9)


@given(pairs)
def test_cer_is_the_edit_distance_of_a_textbook(examples):
    def distance(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            previous, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
        return row[-1]

    folded = [[unicodedata.normalize("NFKC", text) for text in pair] for pair in examples]
    edits = sum(distance(target, prediction) for target, prediction in folded)
    length = max(1, sum(len(target) for target, _ in folded))
    targets, predictions = zip(*examples, strict=True)
    assert metrics.cer(targets, predictions)["cer"] == pytest.approx(100 * edits / length)


@given(pairs, st.randoms())
def test_every_metric_is_bounded_and_ignores_the_order_of_examples(examples, random):
    shuffled = random.sample(examples, len(examples))
    for name, metric in metrics.METRICS.items():
        value, again = (
            metric.function([t for t, _ in order], in_the_form_of(metric, [p for _, p in order]))
            for order in (examples, shuffled)
        )
        assert list(value) == [name]
        assert again == pytest.approx(value)
        assert 0 <= value[name] and (value[name] <= 100 + 1e-9 or name in ERROR_RATES)


@given(st.lists(texts.filter(lambda text: len(text.split()) > 1), min_size=1, max_size=5))
def test_perfect_predictions_are_perfect(targets):
    assert metrics.exact_match(targets, targets) == {"exact_match": 100}
    assert metrics.cer(targets, targets) == {"cer": 0}
    assert math.isclose(metrics.chrf(targets, targets)["chrf"], 100)


@pytest.mark.parametrize("metric", metrics.METRICS.values(), ids=lambda metric: metric.name)
def test_no_examples_and_unequal_numbers_are_refused_in_one_line(metric):
    with pytest.raises(ValueError, match=f"^{metric.name}: no examples to score$"):
        metric.function([], [])
    with pytest.raises(ValueError, match=f"^{metric.name}: 2 targets but 1 predictions"):
        metric.function(["a", "b"], ["a"])


def test_the_functions_of_this_module_are_those_of_the_table():
    for name, metric in metrics.METRICS.items():
        function = getattr(metrics, name)
        assert function.__name__ == metric.name == name
        assert function.__doc__
        arguments = (["a b"], in_the_form_of(metric, ["a b"]))
        assert function(*arguments) == metric.function(*arguments)
    assert {n for n, m in metrics.METRICS.items() if not m.higher_is_better} == set(ERROR_RATES)


def test_a_tasks_metrics_come_as_one_seqio_function():
    function = metrics.metric_fn(("span_f1", "exact_match"))
    assert function(targets=["PER: x"], predictions=["PER: x"]) == {
        "span_f1": 100,
        "exact_match": 100,
    }
    assert metrics.METRICS["cer"].utility(30.0) == 70.0


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(ValueError, match="unknown metric 'spanf1'; did you mean 'span_f1'"):
        metrics.metric_fn(("spanf1",))
    with pytest.raises(ValueError, match="at least one name"):
        metrics.metric_fn(())


def test_one_task_has_rankings_or_texts():
    assert metrics.metric_fn(("top_3_accuracy", "mrr_at_10"))(["a"], [["b", "a"]]) == {
        "top_3_accuracy": 100,
        "mrr_at_10": 50,
    }
    with pytest.raises(ValueError, match="'mrr_at_10' scores rankings and 'cer' one text per exam"):
        metrics.metric_fn(("cer", "mrr_at_10"))
