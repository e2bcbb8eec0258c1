"""Which vocabulary a run uses: small comparable descriptions that make seqio's vocabularies.

A description is a frozen dataclass: it can be compared, printed, and saved with a run by its
digest. seqio and TensorFlow are imported by `build` alone.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

from flix_jax.adapters.suggest import nearest_path

PAD_ID = 0


@dataclass(frozen=True)
class ByteVocabulary:
    """ByT5's bytes (arXiv 2105.13626): 0 padding, 1 end, 2 unknown, then the 256 bytes of UTF-8.

    Attributes:
      extra_ids: ids above the bytes. 125 fills the published models' 384 rows.
    """

    extra_ids: int = 125

    def __post_init__(self) -> None:
        _check_extra_ids(self)

    @property
    def vocab_size(self) -> int:
        """Number of ids, extra ids included."""
        return 3 + 256 + self.extra_ids

    @property
    def eos_id(self) -> int:
        return 1

    @property
    def digest(self) -> str:
        """A name that is equal for vocabularies that give equal ids."""
        return f"bytes+{self.extra_ids}"

    @property
    def num_sentinels(self) -> int:
        return self.extra_ids

    def sentinel_id(self, index: int) -> int:
        """Id of the `index`-th sentinel, which count down from the last id as T5's do."""
        return _sentinel_id(self, index)

    def check_fits(self, model_vocab_size: int) -> None:
        """ValueError when the model's embedding has fewer rows than there are ids."""
        _check_fits(self, model_vocab_size)

    def build(self) -> Any:
        """The seqio vocabulary."""
        from flix_jax.data.libraries import seqio

        return seqio.ByteVocabulary(extra_ids=self.extra_ids)


@dataclass(frozen=True)
class SentencePieceVocabulary:
    """A SentencePiece model whose padding is id 0, as those of T5 and mT5 are.

    Attributes:
      path: of the model file, local or in a bucket (`gs://...`).
      extra_ids: ids added above those of the model. 0 for mT5, whose file holds its 100 already;
        100 for T5's `cc_all.32000.100extra`.

    Raises:
      ValueError: on first use, for a file that is missing, is no SentencePiece model, or has
        another padding id.
    """

    path: str
    extra_ids: int = 0

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("SentencePieceVocabulary.path is empty: expected a .model file")
        _check_extra_ids(self)

    @property
    def vocab_size(self) -> int:
        """Number of ids, extra ids included."""
        return _load_model(self.path).pieces + self.extra_ids

    @property
    def eos_id(self) -> int:
        return _load_model(self.path).eos_id

    @property
    def digest(self) -> str:
        """A name that is equal for vocabularies that give equal ids: by the file's SHA-256."""
        return f"sentencepiece:{_load_model(self.path).sha256}+{self.extra_ids}"

    @property
    def num_sentinels(self) -> int:
        """The added ids, and those at the end of the model that are named `<extra_id_N>`."""
        return self.extra_ids + _load_model(self.path).sentinels

    def sentinel_id(self, index: int) -> int:
        """Id of the `index`-th sentinel, which count down from the last id as T5's do."""
        return _sentinel_id(self, index)

    def check_fits(self, model_vocab_size: int) -> None:
        """ValueError when the model's embedding has fewer rows than there are ids."""
        _check_fits(self, model_vocab_size)

    def build(self) -> Any:
        """The seqio vocabulary."""
        from flix_jax.data.libraries import seqio

        _load_model(self.path)  # its errors are clearer
        return seqio.SentencePieceVocabulary(self.path, extra_ids=self.extra_ids)


Vocabulary = ByteVocabulary | SentencePieceVocabulary


@dataclass(frozen=True)
class _Model:
    pieces: int
    sentinels: int
    eos_id: int
    sha256: str


@functools.lru_cache(maxsize=8)
def _load_model(path: str) -> _Model:
    import sentencepiece
    from etils import epath

    from flix_jax.data import bounded

    try:
        content = bounded.read_bytes(epath.Path(path))
    except FileNotFoundError:
        raise ValueError(
            f"SentencePieceVocabulary.path={path!r}: no such file{nearest_path(path)}"
        ) from None
    except OSError as error:
        raise ValueError(f"SentencePieceVocabulary.path={path!r}: {error.strerror}") from None
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
        pieces = processor.GetPieceSize()
    except RuntimeError:
        pieces = 0
    if not pieces:
        raise ValueError(f"SentencePieceVocabulary.path={path!r} is not a SentencePiece model")
    if processor.pad_id() != PAD_ID:
        raise ValueError(
            f"SentencePieceVocabulary.path={path!r}: its padding has the id {processor.pad_id()}, "
            f"expected {PAD_ID} (train the model with --pad_id=0 --eos_id=1 --unk_id=2)"
        )
    sentinels = 0
    try:
        while sentinels < pieces and "<extra_id_" in processor.IdToPiece(pieces - 1 - sentinels):
            sentinels += 1
    except UnicodeDecodeError:
        raise ValueError(
            f"SentencePieceVocabulary.path={path!r}: a piece of it is not UTF-8"
        ) from None
    return _Model(pieces, sentinels, processor.eos_id(), hashlib.sha256(content).hexdigest())


def _check_extra_ids(vocabulary: Vocabulary) -> None:
    if vocabulary.extra_ids < 0:
        name = type(vocabulary).__name__
        raise ValueError(f"{name}.extra_ids={vocabulary.extra_ids}: expected 0 or more")


def _sentinel_id(vocabulary: Vocabulary, index: int) -> int:
    if not 0 <= index < vocabulary.num_sentinels:
        raise ValueError(
            f"sentinel {index} of {vocabulary}: it has {vocabulary.num_sentinels} sentinels"
        )
    return vocabulary.vocab_size - 1 - index


def _check_fits(vocabulary: Vocabulary, model_vocab_size: int) -> None:
    if vocabulary.vocab_size > model_vocab_size:
        raise ValueError(
            f"{vocabulary} has {vocabulary.vocab_size} ids ({type(vocabulary).__name__}.extra_ids "
            f"among them), but the model's embedding has only "
            f"T5Config.vocab_size={model_vocab_size} rows"
        )
