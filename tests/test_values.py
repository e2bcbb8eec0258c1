"""Values of features: made, appended, removed, merged; against dense matrices in NumPy."""

import dataclasses

import numpy as np
import pytest

from flix_jax.adapters import trained_values, values
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.tree import from_named, named_leaves

ALPHA = 3.0
D_IN, D_OUT, STACK = 7, 5, 3
LANGUAGES = FeatureType(
    "language", ("sw", "zu", "xh"), rank=2, ranks={"zu": 3}, dropout=0.1, dropouts={"sw": 0.2}
)
SPACE = FeatureSpace((FeatureType("task", ("ner", "qa"), rank=1), LANGUAGES))
COLUMNS = {"task": ("ner", "qa"), "language": ("sw",)}  # of the training cells
LAYERS = {"loop": ("encoder", "layers_0", "mlp", "wi"), "scan": ("decoder", "decoder", "mlp", "wo")}


def make_banks(space=SPACE, seed=0):
    """A layer of a loop and a scanned one; columns beyond a value's rank are zero."""
    rng = np.random.default_rng(seed)
    leaves = []
    for kind, layer in LAYERS.items():
        stack = (STACK,) if kind == "scan" else ()
        for t in space.types:
            a = rng.normal(size=(t.num_values, *stack, D_IN, t.max_rank)).astype(np.float32)
            b = rng.normal(size=(t.num_values, *stack, t.max_rank, D_OUT)).astype(np.float32)
            for i, rank in enumerate(t.value_ranks):
                a[i, ..., rank:], b[i, ..., rank:, :] = 0, 0
            leaves += [((*layer, "flix", t.name, "a"), a), ((*layer, "flix", t.name, "b"), b)]
    return from_named(leaves)


def bank(banks, layer, type_name):
    node = banks
    for name in (*layer, "flix", type_name):
        node = node[name]
    return node["a"], node["b"]


def dense(space, banks, layer, type_name, value, alpha=ALPHA):
    """s A B of every layer of a stack, float64 [layers, in, out]."""
    t = space.type(type_name)
    i = t.values.index(value)
    a, b = (x[i].astype(np.float64) for x in bank(banks, layer, type_name))
    if a.ndim == 2:
        a, b = a[None], b[None]
    scale = 1.0 if alpha is None else alpha / t.value_ranks[i]
    return np.stack([scale * one @ other for one, other in zip(a, b, strict=True)])


def added(value, rank, *, how=None, alpha=ALPHA, dropout=None, space=SPACE, banks=None):
    """(space, banks, share of the norm) with a language that is the mean of some, or zero."""
    banks = make_banks(space) if banks is None else banks
    of = space.type("language")
    new, kept = values.fresh(banks, of, value, rank), None
    if how is not None:
        new, kept = values.mean(banks, of, how, new, alpha)
    return *values.append(space, banks, "language", value, new, dropout=dropout), kept


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("how", [("sw", "zu"), ("sw", "zu", "xh")])
def test_the_mean_is_the_truncated_svd_of_the_dense_mean(alpha, rank, how):
    banks = make_banks()
    space, new, kept = added("rw", rank, how=how, alpha=alpha, banks=banks)
    norms = np.zeros(2)
    for layer in LAYERS.values():
        mean = np.mean([dense(SPACE, banks, layer, "language", v, alpha) for v in how], axis=0)
        found = dense(space, new, layer, "language", "rw", alpha)
        for one, other in zip(mean, found, strict=True):
            u, s, v = np.linalg.svd(one)
            best = (u[:, :rank] * s[:rank]) @ v[:rank]
            np.testing.assert_allclose(other, best, atol=1e-5 * s[0])
            norms += np.sum(s[:rank] ** 2), np.sum(s**2)
    assert kept == pytest.approx(np.sqrt(norms[0] / norms[1]), rel=1e-6)


def test_a_mean_of_as_many_columns_as_it_needs_is_exact():
    banks = make_banks()
    space, new, kept = added("rw", 7, how=("sw", "zu", "xh"), banks=banks)
    assert kept == 1.0
    for layer in LAYERS.values():
        mean = np.mean([dense(SPACE, banks, layer, "language", v) for v in LANGUAGES.values], 0)
        np.testing.assert_allclose(dense(space, new, layer, "language", "rw"), mean, atol=1e-5)
        a, b = bank(new, layer, "language")
        # [in, out] is of rank 5 at most: two columns start as those of a new value do.
        assert (b[-1, ..., D_OUT:, :] == 0).all() and (a[-1, ..., D_OUT:] != 0).all()


def test_a_mean_of_untrained_values_can_be_trained():
    space, banks, _ = added("rw", 2)
    space, banks, _ = added("rw2", 2, how=("rw", "rw"), space=space, banks=banks)
    for layer in LAYERS.values():
        a, b = bank(banks, layer, "language")
        assert (b[-1] == 0).all() and (a[-1, ..., :2] != 0).all()


def test_a_new_value_is_an_update_of_zero_with_a_random_a():
    space = FeatureSpace((FeatureType("language", ("sw",), rank=4),))
    layer = ("mlp", "wi", "flix", "language")
    shapes = {"a": (1, 400, 4), "b": (1, 4, 400)}
    banks = from_named([((*layer, side), np.ones(x, np.float32)) for side, x in shapes.items()])
    (pair,) = values.fresh(banks, space.type("language"), "rw", 64, seed=3).values()
    assert (pair[1] == 0).all() and pair[1].shape == (64, 400)
    assert pair[0].std() * 400**0.5 == pytest.approx(1, abs=0.03) and abs(pair[0].mean()) < 1e-3
    (again,) = values.fresh(banks, space.type("language"), "rw", 64, seed=3).values()
    np.testing.assert_array_equal(pair[0], again[0])
    for value, seed in (("rw", 4), ("rn", 3)):
        (apart,) = values.fresh(banks, space.type("language"), value, 64, seed).values()
        assert (apart[0] != pair[0]).any()


def assert_same_bits(one, other):
    assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_others_keep_their_bits_their_ids_and_the_other_types_everything(rank):
    banks = make_banks()
    space, new, _ = added("rw", rank, how=("sw", "xh"), banks=banks, dropout=0.4)
    t = space.type("language")
    assert t.values == ("sw", "zu", "xh", "rw") and t.value_ranks == (2, 3, 2, rank)
    assert t.value_dropouts == (0.2, 0.1, 0.1, 0.4) and (t.rank, t.dropout) == (2, 0.1)
    assert space.type("task") == SPACE.type("task")
    for layer in LAYERS.values():
        for old, wide in zip(bank(banks, layer, "task"), bank(new, layer, "task"), strict=True):
            assert old is wide
        (a, b), (wide_a, wide_b) = (bank(x, layer, "language") for x in (banks, new))
        assert wide_a.shape[-1] == wide_b.shape[-2] == max(3, rank) == t.max_rank
        assert_same_bits(wide_a[:3, ..., :3], a)
        assert_same_bits(wide_b[:3, ..., :3, :], b)
        assert (wide_a[:3, ..., 3:] == 0).all() and (wide_b[:3, ..., 3:, :] == 0).all()
        assert (wide_a[3, ..., rank:] == 0).all()


def test_a_rank_and_a_dropout_of_the_type_are_no_exceptions():
    t = added("rw", 2, dropout=0.1)[0].type("language")
    assert dict(t.ranks) == {"zu": 3} and dict(t.dropouts) == {"sw": 0.2}


def test_what_was_appended_is_removed_without_a_trace():
    banks = make_banks()
    space, new, _ = added("rw", 6, banks=banks, dropout=0.4)
    space, new = values.remove(space, new, "language", "rw")
    assert space == SPACE
    for (path, old), (other, found) in zip(named_leaves(banks), named_leaves(new), strict=True):
        assert path == other
        assert_same_bits(found, old)


def test_the_banks_are_as_wide_as_the_values_that_stay():
    banks = make_banks()
    space, new = values.remove(SPACE, banks, "language", "zu")
    t = space.type("language")
    assert t.values == ("sw", "xh") and t.max_rank == 2 and not t.ranks
    for layer in LAYERS.values():
        assert bank(new, layer, "language")[0].shape[-1] == 2
        for value in t.values:
            old, found = (
                dense(s, x, layer, "language", value) for s, x in ((SPACE, banks), (space, new))
            )
            np.testing.assert_array_equal(old, found)


def test_parts_of_adapters_make_the_whole():
    banks = make_banks()
    first = values.remove(SPACE, banks, "language", "zu")
    second = values.remove(*values.remove(SPACE, banks, "language", "xh"), "task", "qa")
    space, united = values.merge([values.Part("one", *first), values.Part("two", *second)])
    t = space.type("language")
    assert t.values == ("sw", "xh", "zu") and t.value_ranks == (2, 2, 3)
    assert t.value_dropouts == (0.2, 0.1, 0.1) and dict(t.ranks) == {"zu": 3}
    assert space.type("task") == SPACE.type("task")
    for layer in LAYERS.values():
        for value in t.values:
            old, found = (
                dense(s, x, layer, "language", value) for s, x in ((SPACE, banks), (space, united))
            )
            np.testing.assert_array_equal(old, found)


def test_norms_are_those_of_the_dense_updates():
    banks = make_banks()
    for alpha in (None, ALPHA):
        found = values.norms(SPACE, banks, alpha)
        for t in SPACE.types:
            for value in t.values:
                updates = [dense(SPACE, banks, x, t.name, value, alpha) for x in LAYERS.values()]
                norm = np.sqrt(sum(np.sum(u**2) for u in updates))
                assert found[t.name][value] == pytest.approx(norm, rel=1e-6)


def other_types(**changes):
    types = [dataclasses.replace(t, **changes) for t in SPACE.types[1:]]
    return dataclasses.replace(SPACE, types=(SPACE.types[0], *types))


def merged(space, banks):
    return values.merge([values.Part("a", SPACE, make_banks()), values.Part("b", space, banks)])


def changed():
    banks = make_banks()
    bank(banks, LAYERS["scan"], "language")[1][1, 0, 0, 0] = -0.0
    return banks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: added("sw", 2), "language=sw is there already"),
        (lambda: added("rw", 2, how=("s",)), "'s' is no language; did you mean 'sw'"),
        (lambda: added("rw", 2, how=()), "the mean of no value of language"),
        (lambda: values.remove(SPACE, make_banks(), "language", "zuu"), "'zuu' is no .* 'zu'"),
        (lambda: values.remove(SPACE, make_banks(), "langage", "zu"), "no type 'langage'"),
        (lambda: merged(SPACE, changed()), "language=zu of b is not that of a; remove it from one"),
        (lambda: merged(SPACE, make_banks(seed=1)), "task=ner of b is not that of a"),
        (lambda: merged(other_types(name="tongue"), {}), "a has .* type 'language', and b has not"),
        (
            lambda: merged(other_types(combine="mean"), make_banks()),
            "combine is 'sum' in a and 'mean' in b",
        ),
        (
            lambda: merged(SPACE, {"encoder": make_banks()["encoder"]}),
            "type 'task': a and b adapt other layers",
        ),
        (
            lambda: values.append(SPACE, make_banks(), "language", "rw", {}),
            "matrices of 0 layers .* expected those of 2 layers",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_last_value_of_a_type_stays():
    space, banks = values.remove(SPACE, make_banks(), "task", "ner")
    with pytest.raises(ValueError, match="task=qa is the only task"):
        values.remove(space, banks, "task", "qa")


def test_patterns_choose_values_of_all_types():
    found = trained_values.matching(SPACE, ("language=(sw|xh)", "task=n.*"), COLUMNS)
    assert found == {"task": {"ner"}, "language": {"sw", "xh"}}
    assert trained_values.matching(SPACE, ("task=.*",), COLUMNS)["language"] == frozenset()
    for pattern, message in (
        ("language=sww", "matches none of 5 features; did you mean 'language=sw'"),
        ("sw", "'sw' matches none of 5 features"),
        ("(", "is no regular expression"),
        ("language=xh", "matches no feature that is trained on: there is: task=ner, task=qa, lan"),
    ):
        with pytest.raises(ValueError, match=message):
            trained_values.matching(SPACE, (pattern,), COLUMNS)


def test_a_mask_broadcasts_against_every_bank():
    chosen = trained_values.matching(SPACE, ("language=(sw|xh)",), COLUMNS)
    found = trained_values.mask(make_banks(), SPACE, chosen)
    for kind, layer in LAYERS.items():
        for type_name, rows in (("task", [False, False]), ("language", [True, False, True])):
            for one in bank(found, layer, type_name):
                assert one.ndim == (4 if kind == "scan" else 3) and one.size == len(rows)
                np.testing.assert_array_equal(one.ravel(), rows)
