"""T5's span corruption (arXiv 1910.10683, section 3.1.4) at the time an example is drawn."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from flix_jax.data.examples import Example
from flix_jax.data.vocabularies import Vocabulary


@dataclass(frozen=True)
class SpanCorruption:
    """A transform of TrainPipeline: the text in `inputs` becomes a denoising example.

    Random spans of the text are each replaced by a sentinel; the targets are the sentinels, each
    followed by the tokens it stands for. Sentinels count down from the vocabulary's last id. Both
    end with EOS. What the example had as `targets` is dropped. A text of n tokens gives
    round(n * noise_density / mean_noise_span_length) spans, as in T5, but never more than there are
    sentinels.

    Attributes:
      vocabulary: gives the sentinels and EOS.
      noise_density: share of the tokens that are replaced.
      mean_noise_span_length: in tokens.
    """

    vocabulary: Vocabulary
    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.noise_density < 1:
            raise ValueError(
                f"SpanCorruption.noise_density={self.noise_density}: expected between 0 and 1"
            )
        if not self.mean_noise_span_length >= 1:
            raise ValueError(
                f"SpanCorruption.mean_noise_span_length={self.mean_noise_span_length}: "
                "expected at least 1 token"
            )
        if not self.vocabulary.num_sentinels:
            raise ValueError(
                f"SpanCorruption: {self.vocabulary} has no sentinels, give it extra_ids"
            )

    @property
    def digest(self) -> str:
        """Equal for equal noise, wherever the file of the vocabulary lies."""
        rates = f"{self.noise_density}, {self.mean_noise_span_length}"
        return f"SpanCorruption({self.vocabulary.digest}, {rates})"

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        tokens = example["inputs"]
        eos = self.vocabulary.eos_id
        if len(tokens) and tokens[-1] == eos:
            tokens = tokens[:-1]
        noise = noise_mask(
            len(tokens),
            self.noise_density,
            self.mean_noise_span_length,
            rng,
            max_spans=self.vocabulary.num_sentinels,
        )
        first_sentinel = self.vocabulary.sentinel_id(0)
        end = np.array([eos], np.int32)
        return {
            **example,
            "inputs": np.concatenate([replace_spans(tokens, noise, first_sentinel), end]),
            "targets": np.concatenate([replace_spans(tokens, ~noise, first_sentinel), end]),
        }


def noise_mask(
    length: int,
    noise_density: float,
    mean_noise_span_length: float,
    rng: np.random.Generator,
    *,
    max_spans: int | None = None,
) -> Bool[np.ndarray, " length"]:
    """T5's random_spans_noise_mask: true where a token is noise.

    Spans of kept and of noise tokens alternate, a kept one first; the lengths of each kind are a
    uniformly random partition. A text of fewer than two tokens is kept.
    """
    if length < 2:
        return np.zeros(length, bool)
    noise_tokens = min(max(round(length * noise_density), 1), length - 1)
    spans = max(round(noise_tokens / mean_noise_span_length), 1)
    spans = min(spans, noise_tokens, length - noise_tokens, max_spans or length)
    kept = _random_partition(length - noise_tokens, spans, rng)
    lost = _random_partition(noise_tokens, spans, rng)
    lengths = np.stack([kept, lost], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def replace_spans(
    tokens: Int[np.ndarray, " length"], spans: Bool[np.ndarray, " length"], first_sentinel: int
) -> Int[np.ndarray, " shorter"]:
    """Replaces every run of true in `spans` by a sentinel, counting down from `first_sentinel`."""
    starts = spans & ~np.concatenate([[False], spans[:-1]])
    sentinels = first_sentinel + 1 - np.cumsum(starts)
    return np.where(starts, sentinels, tokens)[starts | ~spans].astype(np.int32)


def _random_partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`parts` lengths above zero that sum to `total`, every such partition equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
