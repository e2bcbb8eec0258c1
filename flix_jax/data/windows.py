"""Named-entity examples as windows of the text, with copying in between, for training on bytes.

Small models trained from scratch learn slowly to copy, which naming entities needs; and texts are
longer than such training can afford. Both are changes of an example at the time it is drawn.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flix_jax.data.examples import Example
from flix_jax.data.vocabularies import ByteVocabulary

SEPARATOR = b" $$ "
_COLON = b": "
_SPACES = re.compile(rb"\s+")
_FIRST_BYTE = 3  # the id of byte 0 in ByT5's vocabulary

# Where an entity stands, and as what the target has it: (start, end, b"PER: x").
Entity = tuple[int, int, bytes]
Located = tuple[bytes, list[Entity]]  # a text and its entities


@dataclass(frozen=True)
class EntityWindows:
    """A transform of TrainPipeline for tasks of the form text -> `PER: x $$ LOC: y`, over bytes.

    A text that is longer than `length` becomes a random window of whole words that cuts no entity,
    and the target names the entities in the window; where they are too many for `target_length`,
    the window ends before the first that is too much. With probability `copying` the example
    becomes another task: some spans of words are put between sentinels, and the target is those
    spans, joined as entities are. The sentinels are the vocabulary's first two.

    Attributes:
      length: of the window, in bytes; below the run's inputs_length, by 1 for the end of sequence
        and by 4 more for the sentinels of two spans.
      target_length: of the target, in bytes; below the run's targets_length, by 1 for the end of
        sequence. At least twice `length` fits any target of one entity.
      copying: probability of the copying task.
      swapping: probability that an entity is replaced, in text and target, by another of its label
        from the same cell.
      joining: probability that a text shorter than `length` is followed by further ones of the same
        cell until the window is full, so that padding is not what is computed most.
      vocabulary: must be bytes.
    """

    length: int
    target_length: int
    copying: float = 0.0
    swapping: float = 0.0
    joining: float = 0.0
    vocabulary: ByteVocabulary = ByteVocabulary()

    def __post_init__(self) -> None:
        if self.length < 8:
            raise ValueError(f"EntityWindows.length={self.length}: expected at least 8 bytes")
        if self.target_length < 8:
            raise ValueError(
                f"EntityWindows.target_length={self.target_length}: expected at least 8 bytes"
            )
        for name in ("copying", "swapping", "joining"):
            probability = getattr(self, name)
            if not 0 <= probability < 1:
                raise ValueError(f"EntityWindows.{name}={probability}: expected in [0, 1)")
        if not isinstance(self.vocabulary, ByteVocabulary) or self.vocabulary.num_sentinels < 2:
            raise ValueError(
                f"EntityWindows.vocabulary={self.vocabulary}: expected a ByteVocabulary with at "
                "least 2 extra_ids"
            )

    def prepared(self, examples: Iterable[Example]) -> Callable[..., Example]:
        """The transform with a cell's entities to swap in and its texts to join."""
        if not self.swapping and not self.joining:
            return self
        cell = _Cell([self._located(example) for example in examples])
        return functools.partial(self.__call__, cell=cell)

    def __call__(
        self, example: Example, rng: np.random.Generator, cell: _Cell | None = None
    ) -> Example:
        """The example as this draw changes it, with what it takes from the others of its cell."""
        if rng.random() < self.copying:
            text = self._bytes(example["inputs"])
            start, end = window(text, [], self.length, rng)
            inputs, targets = self._copying(text[start:end], rng)
        else:
            text, entities = self._swapped(self._located(example), rng, cell)
            whole = len(text) > self.length or cell is None or rng.random() >= self.joining
            while not whole and cell is not None and len(text) < self.length * 0.9:
                other = cell.texts[int(rng.integers(len(cell.texts)))]
                text, entities = joined((text, entities), self._swapped(other, rng, cell))
            spans = [(i, j) for i, j, _ in entities]
            start, end = window(text, spans, self.length, rng, from_start=not whole)
            inside = [found for found in entities if start <= found[0] and found[1] <= end]
            while len(_target(inside)) > self.target_length:
                end = inside.pop()[0]
            inputs = self._tokens(text[start:end])
            targets = self._tokens(_target(inside))
        end_of_sequence = np.array([self.vocabulary.eos_id], np.int32)
        return {
            **example,
            "inputs": np.concatenate([inputs, end_of_sequence]),
            "targets": np.concatenate([targets, end_of_sequence]),
        }

    def _located(self, example: Example) -> Located:
        text = self._bytes(example["inputs"])
        return text, locate(text, self._bytes(example["targets"]))

    def _swapped(self, found: Located, rng: np.random.Generator, cell: _Cell | None) -> Located:
        if cell is None or not self.swapping:
            return found
        return swap(*found, cell.names, self.swapping, rng)

    def _copying(self, text: bytes, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One or two spans of one to three words, marked in the text; and those spans."""
        words = [match.span() for match in re.finditer(rb"\S+", text)]
        count = min(int(rng.integers(1, 3)), len(words))
        spans: list[tuple[int, int]] = []
        first = 0
        for remaining in range(count, 0, -1):
            start = int(rng.integers(first, len(words) - remaining + 1))
            last = min(start + int(rng.integers(0, 3)), len(words) - remaining)
            spans.append((words[start][0], words[last][1]))
            first = last + 1
        while len(SEPARATOR.join(text[i:j] for i, j in spans)) > self.target_length:
            spans.pop()
        opening, closing = (np.array([self.vocabulary.sentinel_id(i)], np.int32) for i in (0, 1))
        inputs, position = [], 0
        for i, j in spans:
            inputs += [self._tokens(text[position:i]), opening, self._tokens(text[i:j]), closing]
            position = j
        inputs.append(self._tokens(text[position:]))
        return np.concatenate(inputs), self._tokens(SEPARATOR.join(text[i:j] for i, j in spans))

    def _bytes(self, tokens: np.ndarray) -> bytes:
        return bytes(int(t) - _FIRST_BYTE for t in tokens if t >= _FIRST_BYTE)

    def _tokens(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int32) + _FIRST_BYTE


class _Cell:
    """What a transform takes from the other examples of a cell.

    Attributes:
      texts: with their entities.
      names: of the entities, by label.
    """

    def __init__(self, texts: Sequence[Located]) -> None:
        self.texts = texts
        names: dict[bytes, set[bytes]] = {}
        for _, entities in texts:
            for _, _, entity in entities:
                label, _, name = entity.partition(_COLON)
                names.setdefault(label, set()).add(name)
        self.names = {label: sorted(found) for label, found in names.items()}


def _target(entities: list[Entity]) -> bytes:
    return SEPARATOR.join(entity for _, _, entity in entities)


def locate(text: bytes, target: bytes) -> list[Entity]:
    """Where the entities of a target stand in the text: (start, end, `PER: x`), in order.

    An entity that is not found after the one before it is looked for from the beginning; one that
    is not in the text at all (a record whose text was cut) is left out.
    """
    found, position = [], 0
    for entity in filter(None, target.split(SEPARATOR)):
        _, _, name = entity.partition(_COLON)
        start = text.find(name, position)
        start = text.find(name) if start < 0 else start
        if start >= 0:
            position = start + len(name)
            found.append((start, position, entity))
    return found


def swap(
    text: bytes,
    entities: list[Entity],
    choices: Mapping[bytes, Sequence[bytes]],
    probability: float,
    rng: np.random.Generator,
) -> Located:
    """The text with some entities replaced by others of their label, and where they stand now."""
    parts, moved, position, length = [], [], 0, 0
    for start, end, entity in sorted(entities):
        if start < position:  # overlaps the one before it
            continue
        label, _, name = entity.partition(_COLON)
        if rng.random() < probability:
            name = choices[label][int(rng.integers(len(choices[label])))]
        parts += [text[position:start], name]
        length += start - position + len(name)
        moved.append((length - len(name), length, label + _COLON + name))
        position = end
    return b"".join([*parts, text[position:]]), moved


def joined(first: Located, second: Located) -> Located:
    """The second text after the first, and where the entities of both stand."""
    text = first[0] + b" "
    moved = [(len(text) + start, len(text) + end, entity) for start, end, entity in second[1]]
    return text + second[0], first[1] + moved


def window(
    text: bytes,
    spans: list[tuple[int, int]],
    length: int,
    rng: np.random.Generator,
    *,
    from_start: bool = False,
) -> tuple[int, int]:
    """Start and end of a random window of whole words of at most `length` bytes, cutting no span.

    A single word (or span) that is longer is cut at `length`. With `from_start`, the window is the
    first that there is.
    """
    if len(text) <= length:
        return 0, len(text)
    bounds = [0, *(match.end() for match in _SPACES.finditer(text)), len(text)]
    bounds = sorted({b for b in bounds if not any(i < b < j for i, j in spans)})
    starts = [b for b in bounds if b <= len(text) - length // 2] or [0]
    start = 0 if from_start else starts[int(rng.integers(len(starts)))]
    ends = [b for b in bounds if start < b <= start + length]
    return start, max(ends, default=min(start + length, len(text)))
