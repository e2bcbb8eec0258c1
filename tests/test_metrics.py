"""The metrics against the published scorer's numbers, values by hand, and plain references."""

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flix_jax.evaluation import metrics

# Scored once by google-research/xtreme-up's evaluation/metrics.py (with sacrebleu 1.3.7).
PUBLISHED = {
    "ner": (
        [
            "PER: Amina Yusuf $$ LOC: Kano",
            "",
            "ORG: Chuo Kikuu $$ DATE: 2012 $$ LOC: Dar",
            "LOC: አዲስ አበባ",
            "PER: Ade $$ PER: Ade",
            "DATE: jana",
        ],
        [
            "PER: Amina Yusuf $$ LOC: Kaduna",
            "LOC: Lagos",
            "DATE: 2012 $$ LOC: Dar $$ garbage",
            "LOC: አዲስ አበባ",
            "PER: Ade",
            "PER: jana",
        ],
        {
            "span_f1": 58.82352941175903,
            "exact_match": 16.666666666666664,
            "cer": 52.67857142857143,
            "token_f1": 60.55555555555555,
        },
    ),
    "qa": (
        ["The River Niger", "No Answer", "আগ্রা", "in 1945", "Nelson Mandela", "a"],
        ["river niger basin", "No Answer", "আগ্রা।", "1945.", "Mandela, Nelson", "a"],
        {"exact_match": 33.33333333333333, "token_f1": 57.777777777777786},
    ),
    "sentences": (
        [
            "Habari ya asubuhi, rafiki yangu",
            "ነገ ጠዋት እንገናኛለን በገበያ",
            "O ku aarọ, se daadaa ni o ji?",
            "The market opens at seven",
        ],
        ["Habari za asubuhi rafiki", "ነገ ማታ እንገናኛለን በገበያ", "O ku irole, se daadaa ni?", ""],
        {
            "exact_match": 0.0,
            "chrf": 44.05356353241517,
            "cer": 44.23076923076923,
            "token_f1": 53.273809523809526,
        },
    ),
    "words": (
        ["ﬁlm", "नमस्ते", "आसा", "بازار"],
        ["film", "नमस्त", "आसाम", "باذار"],
        {"cer": 16.666666666666668, "exact_match": 0.0},
    ),
}

texts = st.text(alphabet=st.sampled_from("ab c.:$éß읶ﬁ"), max_size=8)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=8)


@pytest.mark.parametrize("case", PUBLISHED)
def test_equals_the_published_scorer(case):
    targets, predictions, published = PUBLISHED[case]
    for name, value in published.items():
        ours = metrics.METRICS[name].function(targets, predictions)[name]
        # The published F1 has 1e-13 in its denominators.
        assert ours == pytest.approx(value, abs=1e-9), name


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
        value = metric.function(*zip(*examples, strict=True))[name]
        again = metric.function(*zip(*shuffled, strict=True))[name]
        assert again == pytest.approx(value)
        assert 0 <= value and (value <= 100 + 1e-9 or name == "cer")


@given(st.lists(texts.filter(lambda text: len(text.split()) > 1), min_size=1, max_size=5))
def test_perfect_predictions_are_perfect(targets):
    assert metrics.exact_match(targets, targets) == {"exact_match": 100}
    assert metrics.cer(targets, targets) == {"cer": 0}
    assert math.isclose(metrics.chrf(targets, targets)["chrf"], 100)


@pytest.mark.parametrize("metric", metrics.METRICS.values(), ids=lambda metric: metric.name)
def test_no_examples_and_unequal_numbers_are_refused_in_one_line(metric):
    with pytest.raises(ValueError, match=f"^{metric.name}: no examples to score$"):
        metric.function([], [])
    with pytest.raises(ValueError, match="2 targets but 1 predictions"):
        metric.function(["a", "b"], ["a"])


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
