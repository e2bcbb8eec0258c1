"""A small part of what `benchmarks/fuzz.py` does, the same examples on every run."""

import importlib
import json
import random
import sys
from pathlib import Path

import jaxtyping
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flix_jax

BENCHMARKS = Path(flix_jax.__file__).parents[1] / "benchmarks"
QUICK = ("records", "requests", "features", "gin", "languages", "adapters", "peft", "huggingface")
SLOW = ("t5x", "orbax", "checkpoints", "forged", "sentencepiece")


@pytest.fixture(scope="module")
def fuzz():
    """The modules of the fuzzer: targets and mutations."""
    sys.path.insert(0, str(BENCHMARKS))
    # Types of annotations are checked in tests alone, and before what is tested here.
    jaxtyping.config.update("jaxtyping_disable", True)
    yield tuple(importlib.import_module(name) for name in ("fuzz_targets", "fuzz_mutations"))
    jaxtyping.config.update("jaxtyping_disable", False)
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def target(fuzz, tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name] = fuzz[0].make(name, tmp_path_factory.mktemp(name) / "x")
        return made[name]

    return make


def damaged(data, longest, draw):
    """Another input by bits, cuts and splices, as libFuzzer makes them."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 3))):
        place = draw.randrange(len(content) + 1)
        kind = draw.randrange(4)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[place : place + draw.randrange(64)]
        elif kind == 2:
            content[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(9)))
        else:
            content[place:place] = content[: draw.randrange(64)]
    return bytes(content[:longest])


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_what_is_mutated_is_accepted_before(name, target):
    for seed in target(name).seeds:
        target(name)(seed)
    assert any(target(name)(seed) for seed in target(name).seeds)


@pytest.mark.parametrize("name", QUICK)
@given(seed=st.integers(0, 2**32))
def test_a_reader_accepts_or_refuses_in_a_line(name, target, fuzz, seed):
    of = target(name)
    draw = random.Random(seed)
    data = draw.choice(of.seeds)
    for _ in range(10):
        data = fuzz[1].mutate(
            data, 10**5, draw.randrange(2**32), lambda x, most: damaged(x, most, draw), of.folder
        )
        of(data)


@given(data=st.binary(max_size=200))
@pytest.mark.parametrize("name", ["records", "features", "gin", "adapters"])
def test_any_bytes_are_accepted_or_refused_in_a_line(name, target, data):
    target(name)(data)


def test_mutations_of_json_are_json_and_others(fuzz):
    text = json.dumps({"a": [1, {"b": None}], "c": {"d": "e"}}).encode()
    found = {fuzz[1].mutate(text, 10**5, seed, lambda x, most: b"", False) for seed in range(200)}
    assert len(found) > 60
    for other in found - {b""}:
        json.loads(other)


def test_a_finding_is_what_is_no_line_of_ours(fuzz):
    def failing(error):
        def read(data):
            raise error

        return fuzz[0].Target((b"",), read, ("x.jsonl",))

    assert failing(ValueError("x.jsonl:1: wrong"))(b"") is False
    for error in (ValueError("wrong"), ValueError("x.jsonl\nwrong"), UnicodeError("x.jsonl")):
        with pytest.raises(fuzz[0].Finding):
            failing(error)(b"")
    with pytest.raises(KeyError):
        failing(KeyError("x.jsonl"))(b"")
