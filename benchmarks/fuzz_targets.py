"""What `benchmarks/fuzz.py` feeds: the readers of files of unknown origin, each with valid files.

A target takes bytes and calls a reader with them. Of a folder, the first byte says which of its
files the others replace. A reader may accept what it is given, or refuse it with one of the errors
that the command line tells in a line; the line must name the file. All else is a finding.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.cli import MISTAKES
from flix_jax.data.cells import Cell
from flix_jax.models.config import T5Config

CONFIG = T5Config(
    vocab_size=16,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
SPACE = FeatureSpace(
    (
        FeatureType("task", ("ner", "qa"), rank=3, ranks={"qa": 2}),
        FeatureType("language", ("sw", "yo", "a:b"), dropout=0.5, slots=2),
    )
)


class Finding(Exception):
    """What a reader must not do."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader, and what it is given.

    Attributes:
      seeds: valid inputs, which are mutated.
      read: calls the reader with an input.
      names: what the line of a refusal must hold, one of them: the file, or a place of its own.
      folder: whether the first byte of an input says which file of a folder the others are.
    """

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], None]
    names: tuple[str, ...]
    folder: bool = False

    def __call__(self, data: bytes) -> bool:
        """Whether the reader accepted an input; Finding where it did neither that nor refuse it."""
        try:
            self.read(data)
        except MISTAKES as error:
            line = str(error)
            if isinstance(error, UnicodeError) or "\n" in line or not line:
                raise Finding(f"no line of ours: {line!r}") from error
            if not any(name in line for name in self.names):
                raise Finding(f"no file in the line: {line!r}") from error
            return False
        return True


def make(name: str, folder: Path) -> Target:
    """The target of a name, with its files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return TARGETS[name](folder)


# Single files


def _file(path: Path, seeds: tuple[bytes, ...], read: Callable[[Path], Any]) -> Target:
    def call(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return Target(seeds, call, (str(path),))


def _lines(*records: Mapping[str, Any]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def records(folder: Path) -> Target:
    """Lines of jsonl, and what every format makes of them."""
    from flix_jax.tasks.formats import FORMATS, TaskFormat, passage, passage_id
    from flix_jax.tasks.records import Template, read_records
    from flix_jax.tasks.source_text import from_record

    template = TaskFormat(input="{question} in {language}: {n}", target="{answer}", source="{n}")
    formats = {**FORMATS, "mine": template}
    cells = {task: Cell(task, "sw", "Latn2Deva.sw") for task in formats}
    source = Template.parse("{input_en} {n}", "source")

    def read(path: Path) -> None:
        for number, record in read_records(path):
            for task, form in formats.items():
                try:
                    form.read(record, cells[task])
                except ValueError as error:
                    _check_inner(error)
            for other in (passage, passage_id, lambda r: from_record(r, source, {})):
                try:
                    other(record)
                except ValueError as error:
                    _check_inner(error)
            assert number > 0

    span = {"start_byte": 0, "limit_byte": 7, "label": "LOC"}
    seeds = (
        _lines({"text": "Ũkenya na", "spans": [span, {**span, "start_byte": 1}]}, {"text": "a"}),
        _lines({"input": "a", "target": "b", "input_en": None, "n": 1.5}, {"input": "a"}),
        _lines({"question": "Q?", "title": "T", "context": "C", "id": 7, "target": "No Answer"}),
        b"\xef\xbb\xbf\n" + _lines({"question": "😀", "answer": "x", "n": 10**20}),
        b'{"text": "\\ud800", "target": "\\u0000"}\r\n[1, {"a": {}}]\n',
    )
    return _file(folder / "sw.jsonl", seeds, read)


def _check_inner(error: ValueError) -> None:
    """Holds a refusal that its caller puts file and line before to what any must hold."""
    line = str(error)
    if isinstance(error, UnicodeError) or "\n" in line or not line:
        raise Finding(f"no line of ours: {line!r}") from error


def asked(folder: Path) -> Target:
    """Requests, and features as a command line has them."""
    from flix_jax.experiments import requests

    def read(path: Path) -> None:
        requests.read(path, SPACE, "task=ner", form="jsonl", say=lambda line: None)

    seeds = (
        _lines({"input": "a", "task": "ner", "language": {"sw": 0.7, "yo": 0.3}}),
        _lines({"input": "a", "task": ["qa"], "language": ["sw", "xx"], "source": "b"}),
        _lines({"input": "a", "task": None, "language": "a:b"}, {"input": ""}),
    )
    return _file(folder / "in.jsonl", seeds, read)


def features(folder: Path) -> Target:
    """Feature spaces, what they make of an example, and features of a command line."""
    from flix_jax.experiments import requests

    def read(data: bytes) -> None:
        text = data.decode(errors="surrogateescape")
        if text.startswith("?"):
            requests.parse_features(text[1:], SPACE)
            return
        space = FeatureSpace.from_json(text)
        if FeatureSpace.from_json(space.to_json()) != space:
            raise Finding("another space after writing and reading it")
        known = space.complete({t.name: ["x"] for t in space.types})
        value = {t.name: t.known_values[0] for t in known.types}
        ids = known.encode(value)
        known.validate_ids(ids[None])
        if known.encode({k: v for k, v in known.decode(ids).items()}).tolist() != ids.tolist():
            raise Finding("other ids after decoding and encoding them")
        for t in known.types:
            t.scales(2.0)
        known.difference(SPACE)

    seeds = (
        SPACE.to_json().encode(),
        FeatureSpace((FeatureType("shared", None, combine="mean", unknown="error"),), True, True)
        .to_json()
        .encode(),
        b"?task=ner,language=sw:0.7,language=yo:0.3",
        b"?language=a:b:1e3",
    )
    return Target(seeds, read, ("feature", "weight"))


def gin(folder: Path) -> Target:
    """Gin files; what they configure is not built."""
    from flix_jax import configuration

    def read(path: Path) -> None:
        configuration.load([str(path)])

    packaged = Path(configuration.__file__).parents[1] / "configs"
    seeds = tuple(
        path.read_bytes()
        for path in (
            *sorted((packaged / "adapters").glob("*.gin"))[:3],
            packaged / "experiments" / "ner_tiny.gin",
        )
    )
    more = b"A = [1, -2.5e3, 'x' \"y\", {'a': (None, True)}, @task/FeatureType(), %A]\nimport os\n"
    # An include may name any file, whose mistakes are told with its own name.
    return dataclasses.replace(_file(folder / "x.gin", (*seeds, more), read), names=(".gin", "no "))


def languages(folder: Path) -> Target:
    """Tables of languages."""
    from flix_jax.data.language_table import read_language_table

    seeds = (b"# c\nlanguage\tfamily\nsw\tBantu\nyo\tVolta-Niger\n",)
    return _file(folder / "languages.tsv", seeds, lambda path: read_language_table(str(path)))


def sentencepiece(folder: Path) -> Target:
    """Models of SentencePiece."""
    from flix_jax.data.vocabularies import SentencePieceVocabulary, _load_model
    from flix_jax.tasks.babel import _character_model

    def read(path: Path) -> None:
        _load_model.cache_clear()
        found = SentencePieceVocabulary(str(path))
        assert found.vocab_size > 0 and found.digest

    return _file(folder / "x.model", (_character_model(),), read)


# Folders


def _folder(folder: Path, read: Callable[[Path], Any], most: int = 256) -> Target:
    """Of a folder of valid files, one of which an input replaces or, when it is empty, removes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())[:most]
    contents = [path.read_bytes() for path in files]

    def call(data: bytes) -> None:
        place = (data[0] if data else 0) % len(files)
        path = files[place]
        if len(data) > 1:
            path.write_bytes(data[1:])
        else:
            path.unlink()
        try:
            read(folder)
        finally:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[place])

    seeds = tuple(bytes([i]) + content for i, content in enumerate(contents))
    return Target(seeds, call, (str(folder),), True)


def _arrays() -> dict[str, np.ndarray]:
    from flix_jax.interop import network

    rng = np.random.default_rng(0)
    shapes = network.shapes(CONFIG)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _whole(leaves: Mapping[str, Any]) -> None:
    for leaf in leaves.values():
        assert leaf.read().shape == leaf.shape


def adapters(folder: Path) -> Target:
    """What `flix export --format=flix` writes."""
    from flix_jax.adapters.fusion import Fusion
    from flix_jax.interop import flix_adapters
    from flix_jax.interop.leaves import Leaf

    banks = {}
    for t in SPACE.types:
        path = f"encoder/layers_0/attention/query/flix/{t.name}"
        banks[f"{path}/a"] = Leaf.of(np.ones((t.num_values, 8, t.max_rank), np.float32))
        banks[f"{path}/b"] = Leaf.of(np.ones((t.num_values, t.max_rank, 8), np.float32))
    fields = (0.5, ("attention",), dataclasses.asdict(CONFIG), "base", "vocabulary", 7, Fusion())
    flix_adapters.Adapters(banks, SPACE, *fields).write(folder)

    def read(folder: Path) -> None:
        found = flix_adapters.read(folder)
        _whole(found.banks)
        found.tree()

    return _folder(folder, read)


def lora(folder: Path) -> Target:
    """PEFT's LoRAs."""
    from flix_jax.interop import peft

    name = "encoder/layers_0/attention/query"
    rng = np.random.default_rng(0)
    update = peft.LowRank(rng.normal(size=(8, 2)), rng.normal(size=(2, 8)))
    peft.write({name: update}, CONFIG, folder)
    return _folder(folder, lambda folder: peft.read(folder, CONFIG))


def huggingface(folder: Path) -> Target:
    """Networks of Hugging Face's, in several files with their index."""
    from flix_jax.interop import bases
    from flix_jax.interop import huggingface as hf
    from flix_jax.interop.leaves import Leaf

    leaves = {name: Leaf.of(array) for name, array in _arrays().items()}
    hf.write(leaves, CONFIG, folder, shard_bytes=3000)

    def read(folder: Path) -> None:
        _whole(bases.read(folder, bases.config_of(folder)))

    return _folder(folder, read)


def t5x(folder: Path) -> Target:
    """T5X's checkpoints of the legacy layout, gzip and blosc."""
    from flix_jax.interop import bases, t5x_checkpoints
    from flix_jax.interop.leaves import Leaf

    leaves = {name: Leaf.of(array) for name, array in _arrays().items()}
    made = Path(t5x_checkpoints.write(leaves, folder, step=1))
    record = made / t5x_checkpoints.MSGPACK
    contents = record.read_bytes()
    target = _folder(folder, lambda folder: _whole(bases.read(folder, bases.config_of(folder))))
    assert contents == record.read_bytes()
    return target


def orbax(folder: Path) -> Target:
    """T5X's checkpoints of the current layout."""
    import orbax.checkpoint as ocp

    from flix_jax.interop import bases, network

    state = folder / "checkpoint_1" / "state"
    tree = {"target": network.nested(_arrays()), "state": {"step": np.int32(7)}}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(state, tree)
    return _folder(folder, lambda folder: _whole(bases.read(folder, bases.config_of(folder))))


def checkpoints(folder: Path, *, forged: bool = False) -> Target:
    """A run's own checkpoints, damaged; forged ones have a manifest that fits what was changed."""
    import jax
    from etils import epath

    from flix_jax.training import manifest
    from flix_jax.training.checkpoints import Checkpoints
    from flix_jax.training.step import TrainState

    arrays = {"encoder": {"flix": {"a": np.ones((2, 3), np.float32)}}}
    trained = jax.tree.map(jax.numpy.asarray, arrays)
    state = TrainState(jax.numpy.int32(3), trained, {"m": jax.numpy.zeros(3)})
    identity = {"features": SPACE.to_json()}
    with Checkpoints(folder / "run" / "checkpoints", identity) as saved:
        saved.save(state, {"position": 7})

    step = epath.Path(folder / "run" / "checkpoints" / "3")
    written = manifest.read(step)

    def forge() -> None:
        try:
            record = dict(json.loads((step / manifest.NAME).read_bytes()))
        except (ValueError, TypeError, OSError, RecursionError):
            return
        if record == written:
            (step / manifest.NAME).unlink()
            manifest.write(step, 3, written["arrays"], {})
            return
        record["checksum"] = manifest._checksum(record)
        (step / manifest.NAME).write_text(json.dumps(record))

    def read(folder: Path) -> None:
        if forged:
            forge()
        with Checkpoints(folder / "run" / "checkpoints", identity, create=False) as there:
            there.restore(state)

    copy = folder.with_name(f"{folder.name}.whole")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    target = _folder(folder, read)

    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def call(data: bytes) -> None:
        place = (data[0] if data else 0) % len(files)
        changed = files[place].read_bytes() != data[1:] and files[place].is_relative_to(step)
        try:
            target.read(data)
            if changed and not forged:
                raise Finding("a change that was not noticed")
        finally:  # a damaged step may have been set aside
            shutil.rmtree(folder)
            shutil.copytree(copy, folder)

    return dataclasses.replace(target, read=call)


TARGETS: Mapping[str, Callable[[Path], Target]] = {
    "records": records,
    "requests": asked,
    "features": features,
    "gin": gin,
    "languages": languages,
    "sentencepiece": sentencepiece,
    "adapters": adapters,
    "peft": lora,
    "huggingface": huggingface,
    "t5x": t5x,
    "orbax": orbax,
    "checkpoints": checkpoints,
    "forged": functools.partial(checkpoints, forged=True),
}
