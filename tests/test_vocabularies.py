import hashlib
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from flix_jax.data.denoising import SpanCorruption, noise_mask, replace_spans
from flix_jax.data.pipeline import describe
from flix_jax.data.vocabularies import ByteVocabulary, SentencePieceVocabulary

TEXT = "habari ya asubuhi rafiki yangu . tutaonana kesho mchana sokoni . asante sana ndugu . "


def train_model(path, **options):
    settings = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, **options}
    lines = path.with_suffix(".txt")
    lines.write_text(TEXT.replace(" . ", "\n") * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines),
        model_prefix=str(path.with_suffix("")),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_model(tmp_path_factory.mktemp("spm") / "swahili.model")


def test_bytes_have_the_size_of_the_published_models():
    assert ByteVocabulary().vocab_size == 384
    assert ByteVocabulary(extra_ids=0).vocab_size == 259


def test_sentinels_count_down_from_the_last_id(model):
    assert [ByteVocabulary(3).sentinel_id(i) for i in range(3)] == [261, 260, 259]
    with pytest.raises(ValueError, match="has 3 sentinels"):
        ByteVocabulary(3).sentinel_id(3)
    spm = SentencePieceVocabulary(model, extra_ids=2)
    assert [spm.sentinel_id(i) for i in range(2)] == [spm.vocab_size - 1, spm.vocab_size - 2]


def test_sentinels_inside_a_model_are_found(tmp_path):
    # As in mT5's file, whose last pieces are the sentinels in descending order.
    names = [f"<extra_id_{i}>" for i in (2, 1, 0)]
    inside = train_model(tmp_path / "inside.model", user_defined_symbols=[])
    processor = sentencepiece.SentencePieceProcessor(model_file=inside)
    before = processor.GetPieceSize()
    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(inside).read_bytes())
    for name in names:
        proto.pieces.add(piece=name, score=0.0, type=proto.SentencePiece.USER_DEFINED)
    (tmp_path / "with.model").write_bytes(proto.SerializeToString())
    vocabulary = SentencePieceVocabulary(str(tmp_path / "with.model"))
    assert vocabulary.num_sentinels == 3
    assert vocabulary.sentinel_id(0) == before + 2


def test_digests_tell_vocabularies_apart(model, tmp_path):
    assert ByteVocabulary().digest == "bytes+125"
    spm = SentencePieceVocabulary(model, extra_ids=7)
    assert spm.digest == f"sentencepiece:{hashlib.sha256(Path(model).read_bytes()).hexdigest()}+7"
    moved = tmp_path / "moved.model"
    moved.write_bytes(Path(model).read_bytes())
    assert SentencePieceVocabulary(str(moved), extra_ids=7).digest == spm.digest


def test_a_model_that_is_too_small_for_the_vocabulary_is_refused():
    ByteVocabulary().check_fits(384)
    with pytest.raises(ValueError, match="384 ids.*T5Config.vocab_size=256") as error:
        ByteVocabulary().check_fits(256)
    assert "\n" not in str(error.value)


def test_files_that_are_no_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        _ = SentencePieceVocabulary(str(tmp_path / "missing.model")).vocab_size
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        _ = SentencePieceVocabulary(str(tmp_path / "text.model")).vocab_size
    with pytest.raises(ValueError, match=r"SentencePieceVocabulary\.path"):
        _ = SentencePieceVocabulary(str(tmp_path)).vocab_size
    with pytest.raises(ValueError, match="extra_ids=-1"):
        ByteVocabulary(-1)


def test_a_model_without_padding_at_zero_is_refused(tmp_path):
    other = train_model(tmp_path / "other.model", pad_id=-1, unk_id=0, eos_id=1)
    with pytest.raises(ValueError, match="padding has the id -1, expected 0"):
        _ = SentencePieceVocabulary(other).eos_id


def generator(seed):
    return np.random.Generator(np.random.Philox(key=seed))


def undo(inputs, targets, first_sentinel, last_sentinel):
    """Puts the spans of `targets` back where the sentinels of `inputs` stand."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if last_sentinel <= token <= first_sentinel:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    restored = []
    for token in inputs:
        restored += spans[token] if last_sentinel <= token <= first_sentinel else [token]
    return restored


@given(
    tokens=st.lists(st.integers(3, 258), max_size=200),
    density=st.floats(0.01, 0.99),
    mean=st.floats(1.0, 10.0),
    extra_ids=st.integers(1, 125),
    seed=st.integers(0, 2**32),
)
def test_a_corrupted_text_can_be_put_together_again(tokens, density, mean, extra_ids, seed):
    corrupt = SpanCorruption(ByteVocabulary(extra_ids), density, mean)
    example = {"inputs": np.array([*tokens, 1], np.int32), "targets": np.array([1], np.int32)}
    made = corrupt(example, generator(seed))
    inputs, targets = made["inputs"].tolist(), made["targets"].tolist()
    assert made["inputs"].dtype == made["targets"].dtype == np.int32
    assert inputs.pop() == 1 and targets.pop() == 1
    assert undo(inputs, targets, 258 + extra_ids, 259) == tokens
    in_inputs = [t for t in inputs if t > 258]
    assert in_inputs == [258 + extra_ids - i for i in range(len(in_inputs))]
    assert [t for t in targets if t > 258][: len(in_inputs)] == in_inputs


def test_noise_is_as_dense_as_asked_for_in_spans_of_the_mean_length():
    # T5's defaults at its pretraining length of 568 give 512 inputs and 114 targets (with EOS).
    for seed in range(20):
        mask = noise_mask(568, 0.15, 3.0, generator(seed))
        starts = np.diff(mask.astype(int), prepend=0) == 1
        assert (mask.sum(), starts.sum()) == (85, 28)
        assert not mask[0] and mask[-1]
    example = {"inputs": np.full(569, 7, np.int32), "targets": np.array([1], np.int32)}
    example["inputs"][-1] = 1
    made = SpanCorruption(ByteVocabulary())(example, generator(0))
    assert (len(made["inputs"]), len(made["targets"])) == (568 - 85 + 28 + 1, 85 + 28 + 1)


def test_every_place_is_noise_about_equally_often():
    share = np.mean([noise_mask(40, 0.3, 2.0, generator(seed)) for seed in range(2000)], axis=0)
    assert abs(share.mean() - 0.3) < 1e-9
    assert share[5:-5].min() > 0.2 and share[5:-5].max() < 0.4


def test_replace_spans_as_in_t5():
    tokens = np.arange(10, 18)
    spans = np.array([0, 1, 1, 0, 0, 1, 0, 1], bool)
    assert replace_spans(tokens, spans, 99).tolist() == [10, 99, 13, 14, 98, 16, 97]
    assert replace_spans(tokens, ~spans, 99).tolist() == [99, 11, 12, 98, 15, 97, 17]


@pytest.mark.parametrize(
    "settings",
    [{"noise_density": 0.0}, {"noise_density": 1.0}, {"mean_noise_span_length": 0.5}],
)
def test_settings_of_span_corruption_are_checked(settings):
    with pytest.raises(ValueError, match="SpanCorruption"):
        SpanCorruption(ByteVocabulary(), **settings)


def test_a_moved_vocabulary_is_the_same_noise(model, tmp_path):
    moved = tmp_path / "moved.model"
    moved.write_bytes(Path(model).read_bytes())
    one, other = (
        describe(SpanCorruption(SentencePieceVocabulary(str(path), extra_ids=2)))
        for path in (model, moved)
    )
    assert one == other != describe(SpanCorruption(ByteVocabulary()))


def test_span_corruption_needs_sentinels():
    with pytest.raises(ValueError, match="no sentinels"):
        SpanCorruption(ByteVocabulary(0))
