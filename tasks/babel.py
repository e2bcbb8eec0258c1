"""The embedded benchmark: small artificial languages times tasks shaped like XTREME-UP's.

`write` generates the jsonl files of a seed in XTREME-UP's folder layout; `Babel` is the source of
cells that generates them once and leaves the reading to the reader of that layout. A pivot
language carries every task in pretraining, where the others are text, glossaries and words borrowed
by the pivot; of the nine others one is held out of every task, and
at least three cells a task are held out besides, other ones for every seed.
"""

import hashlib
import io
import json
import os
import shutil
import string
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.cells import Cell, Inference
from flix_jax.data.vocabularies import SentencePieceVocabulary
from flix_jax.tasks.babel_languages import (
    LANGUAGES,
    PIVOT,
    SCRIPTS,
    Draw,
    Language,
    make_languages,
)
from flix_jax.tasks.babel_tasks import TASKS, Record, dictionary, make_record, make_tag
from flix_jax.tasks.babel_translations import FIELD, Translations, Translator
from flix_jax.tasks.source_text import SourceText
from flix_jax.tasks.xtreme_up import TaskFormat, XtremeUp, ner, plain

if TYPE_CHECKING:
    from flix_jax.adapters.features import FeatureSpace
    from flix_jax.data.vocabularies import Vocabulary

TAG_KINDS = ("none", "task", "task_language")
VERSION = 1  # raised whenever the same seed gives other data
HELD_OUT_PER_TASK = 3
SETTINGS_FILE = "babel.json"
VOCABULARY_FILE = "characters.model"
CHARACTERS = " _=?:[]$" + string.ascii_letters + SCRIPTS["cyrillic"] + SCRIPTS["greek"]
# Of translation and transliteration a translation says what is asked for: they have no source.
FORMATS = {
    "ner": TaskFormat(ner, ("exact_match", "span_f1"), source=f"{{{FIELD}}}"),
    "semantic_parsing": TaskFormat(plain, ("exact_match",), source=f"{{{FIELD}}}"),
    "qa": TaskFormat(plain, ("exact_match", "token_f1"), source=f"{{{FIELD}}}"),
    "translation": TaskFormat(plain, ("exact_match", "chrf")),
    "transliteration": TaskFormat(plain, ("exact_match", "cer")),
}
_TASK_PATTERN = "{" + ",".join(TASKS) + "}"
PRETRAINING = ("denoising/*", "glossary/*", f"{_TASK_PATTERN}/{PIVOT.code}")
ADAPTATION = (f"{_TASK_PATTERN}/{{{','.join(t.code for t in LANGUAGES)}}}",)


@dataclass(frozen=True)
class Sizes:
    """Records per cell. Records of a cell are distinct, over all its splits.

    Attributes:
      train, validation, test: of a task in one language.
      pivot: training records of a task in the pivot, for pretraining.
      text: masked clauses and glossed clauses per language, for pretraining. The glossary holds
        the whole dictionary besides.
    """

    train: int = 256
    validation: int = 64
    test: int = 200
    pivot: int = 2048
    text: int = 1024

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1 or value > 4096:
                raise ValueError(f"Sizes.{name}={value}: expected 1 to 4096 records")


def held_out_language(seed: int) -> str:
    """The language whose tasks are all held out.

    Pretraining shows its text, its glossary, and words of it borrowed into the pivot's tasks.
    """
    return Draw("babel", seed, "held out").shuffled(LANGUAGES)[0].code


def held_out(seed: int, tasks: Sequence[str] = TASKS) -> tuple[str, ...]:
    """Patterns of the held-out cells of a seed, as `Mixture(held_out=...)` takes them.

    All cells of one language, and three of each task spread evenly over the eight others, so
    that each of those is still seen in at least three tasks and each task in five languages.

    Args:
      seed: of the data.
      tasks: those of the mixture; which cells of a task are held out does not depend on the others.

    Raises:
      ValueError: a task that Babel has not.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"babel_held_out.tasks names {task!r}; {did_you_mean(task, TASKS)}")
    first, *others = (t.code for t in Draw("babel", seed, "held out").shuffled(LANGUAGES))
    patterns = [f"{{{','.join(tasks)}}}/{first}"]
    for i, task in enumerate(TASKS):
        if task not in tasks:
            continue
        unseen = [
            others[(i * HELD_OUT_PER_TASK + j) % len(others)] for j in range(HELD_OUT_PER_TASK)
        ]
        patterns.append(f"{task}/{{{','.join(sorted(unseen))}}}")
    return tuple(patterns)


def records(
    task: str,
    language: Language,
    languages: Sequence[Language],
    *,
    seed: int,
    sizes: Sizes,
    tags: str,
    translations: Translations | None = None,
) -> dict[str, list[Record]]:
    """The records of a cell by split. `languages` are all of them, the pivot first.

    With `translations`, task records of the others have their translation into the pivot besides.
    """
    pivot = languages[0]
    tag = make_tag(task, language, tags)
    counts = {"train": sizes.train, "validation": sizes.validation, "test": sizes.test}
    if language is pivot:
        counts["train"] = sizes.pivot
    if task in ("denoising", "glossary"):
        counts = {"train": sizes.text}
    # Tags take no part in the choices, so that data with and without them are the same data.
    draw = Draw("babel", seed, task, language.code)
    translated = translations is not None and task in TASKS and language is not pivot
    distinct: dict[str, tuple[Record, Draw]] = {}
    while len(distinct) < sum(counts.values()):
        before = draw.copy() if translated else draw
        record = make_record(task, language, draw, languages=languages, tag=tag)
        distinct.setdefault(str(record.get("text", record.get("input"))), (record, before))
    remaining = iter(distinct.values())
    drawn = {split: [next(remaining) for _ in range(n)] for split, n in counts.items()}
    splits = {split: [record for record, _ in of] for split, of in drawn.items()}
    if translated:
        assert translations is not None
        translator = Translator(pivot, translations, make_tag(task, pivot, tags))
        for split, of in drawn.items():
            for number, (record, before) in enumerate(of):
                key = "babel", seed, "translation", task, language.code, split, number
                record |= translator(task, before, Draw(*key), split)
    if task == "glossary":
        splits["train"] += dictionary(language, pivot, tag)
    return splits


def write(
    out_dir: str | os.PathLike[str],
    seed: int,
    *,
    sizes: Sizes | None = None,
    tags: str = "task",
    translations: Translations | None = None,
) -> Path:
    """Writes the data of a seed as `<out_dir>/<task>/<split>/<language>.jsonl`.

    The folder appears whole or not at all.

    Args:
      out_dir: a local folder that does not exist yet or is empty.
      seed: languages, records and held-out cells follow from it, the same on every machine.
      tags: what inputs open with: 'none', 'task' (`ner: `) or 'task_language' (`ner qal: `).
      translations: of the tasks' records into the pivot, beside what they have without them.

    Raises:
      ValueError: for other `tags`, and if `out_dir` holds something already.
    """
    _check_tags(tags)
    out_dir, sizes = Path(out_dir), sizes or Sizes()
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"Babel cannot be written to {out_dir}: it is not an empty folder")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        partial.chmod(0o755)
        _write_files(partial, seed, sizes, tags, translations)
        os.replace(partial, out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out_dir


def _write_files(
    folder: Path, seed: int, sizes: Sizes, tags: str, translations: Translations | None
) -> None:
    languages = list(make_languages(seed).values())
    for task in (*TASKS, "denoising", "glossary"):
        for language in languages[1:] if task == "glossary" else languages:
            splits = records(
                task,
                language,
                languages,
                seed=seed,
                sizes=sizes,
                tags=tags,
                translations=translations,
            )
            for split, lines in splits.items():
                path = folder / task / split / f"{language.code}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                path.write_text(text, encoding="utf-8", newline="\n")
    (folder / VOCABULARY_FILE).write_bytes(_character_model())
    settings = json.dumps(_settings(seed, sizes, tags, translations), indent=2) + "\n"
    (folder / SETTINGS_FILE).write_text(settings, encoding="utf-8", newline="\n")


def _character_model() -> bytes:
    """A SentencePiece model of single characters: 0 padding, 1 end, 2 unknown, then CHARACTERS.

    A letter of any script is one token, where bytes would make two of most.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    kinds = model.SentencePiece
    model.pieces.add(piece="<pad>", score=0.0, type=kinds.CONTROL)
    model.pieces.add(piece="</s>", score=0.0, type=kinds.CONTROL)
    model.pieces.add(piece="<unk>", score=0.0, type=kinds.UNKNOWN)
    for rank, character in enumerate(CHARACTERS):
        piece = character.replace(" ", "\u2581")  # how SentencePiece writes a space
        model.pieces.add(piece=piece, score=-float(rank), type=kinds.NORMAL)
    trainer = model.trainer_spec
    trainer.model_type = trainer.CHAR
    trainer.vocab_size = len(model.pieces)
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, -1
    model.normalizer_spec.name = "user_defined"
    model.normalizer_spec.precompiled_charsmap = _character_map()
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString(deterministic=True)


def _check_tags(tags: str) -> None:
    if tags not in TAG_KINDS:
        raise ValueError(
            f"Babel.tags={tags!r}: expected one of {TAG_KINDS}; "
            f"{did_you_mean(str(tags), TAG_KINDS)}"
        )


def _character_map() -> bytes:
    """A normalisation that changes nothing in CHARACTERS: a no-break space becomes a space.

    TensorFlow's SentencePiece announces every model that has no normalisation at all.
    """
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        rules, model = Path(folder, "rules.tsv"), io.BytesIO()
        rules.write_text("A0\t20\n")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b"]),
            model_writer=model,
            model_type="char",
            vocab_size=6,
            hard_vocab_limit=False,
            normalization_rule_tsv=str(rules),
            minloglevel=2,
        )
    from sentencepiece import sentencepiece_model_pb2

    trained = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    trained.ParseFromString(model.getvalue())
    return bytes(trained.normalizer_spec.precompiled_charsmap)


def _settings(
    seed: int, sizes: Sizes, tags: str, translations: Translations | None
) -> dict[str, Any]:
    settings = {
        "version": VERSION,
        "seed": seed,
        "tags": tags,
        "sizes": asdict(sizes),
        "held_out": list(held_out(seed)),
    }
    if translations is not None:  # data without them stay where they are
        settings["translations"] = asdict(translations)
    return settings


@dataclass(frozen=True)
class Babel:
    """The embedded benchmark of a seed as a source of cells.

    Attributes:
      cache_dir: local folder in which the data are generated, once for each choice of the rest.
      seed: languages, records and held-out cells follow from it.
      tags: what inputs open with: 'none', 'task' (`ner: `) or 'task_language' (`ner qal: `). A
        base that has met a language's tag in pretraining, where only text bears it, binds the two
        and carries tasks over to that language less well; the words reveal their language anyway.
      sizes: records per cell.
      translations: of the tasks' records into the pivot, which plays English: what adapters fuse
        with (Run.source_text). Records are the same with and without them; None writes none.
    """

    cache_dir: str
    seed: int = 0
    tags: str = "task"
    sizes: Sizes = field(default_factory=Sizes)
    translations: Translations | None = None

    def __post_init__(self) -> None:
        _check_tags(self.tags)

    @property
    def name(self) -> str:
        return "babel"

    @property
    def data_dir(self) -> Path:
        """Where the generated files are, or will be."""
        made = _settings(self.seed, self.sizes, self.tags, self.translations)
        settings = json.dumps(made, sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        return Path(self.cache_dir) / f"babel_seed{self.seed}_{digest}"

    def held_out(self) -> tuple[str, ...]:
        """Patterns of this seed's held-out cells; see `held_out`."""
        return held_out(self.seed)

    @property
    def vocabulary_path(self) -> str:
        """The SentencePiece model of the benchmark's characters, for SentencePieceVocabulary."""
        self._generate()
        return str(self.data_dir / VOCABULARY_FILE)

    def cells(self) -> tuple[Cell, ...]:
        """All cells, sorted by name: those of ADAPTATION and of PRETRAINING."""
        return self._reader.cells()

    def splits(self, cell: Cell) -> tuple[str, ...]:
        """The splits of `cell`; denoising and the glossaries have training records only."""
        return self._reader.splits(cell)

    def pairs(self, cell: Cell, split: str) -> tuple[list[str], list[str]]:
        """Inputs and targets of a split of `cell`, in the order of the file."""
        return self._reader.pairs(cell, split)

    def sources(self, cell: Cell, split: str, source_text: SourceText) -> list[str]:
        """The translation into the pivot of each example of `pairs`; '' where it has none."""
        return self._reader.sources(cell, split, source_text)

    def check_sources(self, cells: Iterable[Cell], source_text: SourceText) -> None:
        """ValueError where no example of `cells` can have a source."""
        if self.translations is None and source_text.files is None:
            raise ValueError(
                "SourceText: the records of Babel have no source without Babel.translations = "
                "@Translations()"
            )
        self._reader.check_sources(cells, source_text)

    def register(
        self,
        cells: Iterable[Cell],
        *,
        vocabulary: "Vocabulary",
        space: "FeatureSpace | None",
        source_text: SourceText | None = None,
    ) -> dict[Cell, str]:
        """Registers a seqio task per cell, replacing earlier ones; returns the task names."""
        return self._reader.register(
            cells, vocabulary=vocabulary, space=space, source_text=source_text
        )

    def inference(self, cell: Cell) -> Inference:
        """How predictions for a cell are made: as text, all of them."""
        return self._reader.inference(cell)

    def register_indexes(
        self,
        cells: Iterable[Cell],
        *,
        vocabulary: "Vocabulary",
        space: "FeatureSpace | None",
        source_text: SourceText | None = None,
    ) -> dict[Cell, str]:
        """None: no task here is retrieval."""
        return {}

    @cached_property
    def _reader(self) -> XtremeUp:
        self._generate()
        return XtremeUp(str(self.data_dir), name=self.name, formats=FORMATS)

    def _generate(self) -> None:
        done = self.data_dir / SETTINGS_FILE
        if done.exists():
            return
        try:
            write(
                self.data_dir,
                self.seed,
                sizes=self.sizes,
                tags=self.tags,
                translations=self.translations,
            )
        except (OSError, ValueError):  # another process may have been first
            if not done.exists():
                raise


def vocabulary(source: Babel) -> SentencePieceVocabulary:
    """The benchmark's characters as a vocabulary: one token a letter, of any script."""
    return SentencePieceVocabulary(source.vocabulary_path)
