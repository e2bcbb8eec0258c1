"""Predictions for texts of one's own: decoded in buckets of length, a part of a file at a time."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from flix_jax import buckets, preemption, processes
from flix_jax.adapters import tree
from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.ids import ABSENT
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.pipeline import SOURCE_TOKENS
from flix_jax.evaluation import files
from flix_jax.experiments import inference, requests
from flix_jax.experiments.job import Job
from flix_jax.experiments.requests import Request
from flix_jax.experiments.run import Run
from flix_jax.models.decoding import Decoding
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.training import partitioning
from flix_jax.training.checkpoints import Step, digest

GREEDILY = Decoding()
AUTO, ALWAYS, NEVER = FOLDS = ("auto", "always", "never")
_SHORTEST = 32  # tokens of the first bucket
_BATCHES = 16  # in a part of a file

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What was decoded for a text.

    Attributes:
      texts: the best first; one, unless by beams.
      scores: of the texts of a beam search: log probability over length penalty.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...] = ()


class Asked(NamedTuple):
    """What is predicted for: tokens of an input, its annotations, tokens of its English source."""

    tokens: Sequence[int]
    features: Mapping[str, Any]
    source: Sequence[int] = ()


class Predictor:
    """Predicts for any texts, each with features of its own.

    Compiles once for every bucket of length; another predictor of the same model, decoding and
    number of rows finds these programs.
    """

    def __init__(
        self,
        job: Job,
        trained: Any,
        frozen: Any,
        how: Decoding,
        examples: Sequence[Mapping[str, Any]],
        *,
        rows: int,
        fold: str = NEVER,
    ) -> None:
        """See the class.

        Args:
          job, trained, frozen: the run and its parameters, as `inference.restore` gives them.
          how: decoding.
          examples: annotations of all that will be predicted for, to make room for: a slot for each
            value, and weights.
          rows: of a batch.
          fold: whether the adapters are folded into the base first, so that decoding costs what it
            costs without them; possible where all examples have the same features. 'auto' does
            where that is so and the base is float32; 'always' refuses several sets; 'never'.

        Raises:
          ValueError: a `fold` that cannot be, or several processes.
        """
        if processes.count() > 1:
            raise ValueError(f"{processes.count()} processes: texts are predicted for by one")
        self._vocabulary = job.run.vocabulary.build()
        self._eos_id = job.run.vocabulary.eos_id
        self._longest = job.run.inputs_length
        self._longest_source = job.run.sources_length
        self._rows, self._how = rows, how
        _check_fold(fold, adapted=job.space is not None)
        adapters = job.model.adapters
        self._space = None if job.space is None else job.space.room_for(examples)
        if adapters is not None and self._space is not None:
            encoded = [self._space.encode_weighted(one) for one in examples]
            self._weighted = any((weights != 1).any() for _, weights in encoded)
            if _folds(fold, job.run, _sets(self._space, examples)):
                frozen, trained = job.folded(trained, frozen, examples[0]), {}
                adapters = self._space = None
            else:
                adapters = dataclasses.replace(adapters, space=self._space)
            job = job.with_model(dataclasses.replace(job.model, adapters=adapters))
        self._mesh = job.mesh
        if trained:
            trained = job.parameters.in_use(trained)
        self._params, self._key = tree.join(frozen, trained), jax.random.key(how.seed)
        self._program = _program(
            job.model, how, job.run.targets_length, partitioning.replicated(job.mesh)
        )

    def tokens(self, text: str) -> tuple[list[int], bool]:
        """The tokens of a text with the end of sequence, and whether they were cut."""
        return self._ended(text, self._longest)

    def source_tokens(self, source: str) -> tuple[list[int], bool]:
        """`tokens` of an English source; none for '', and in a run without sources."""
        if self._longest_source is None or not source:
            return [], False
        return self._ended(source, self._longest_source)

    def _ended(self, text: str, limit: int) -> tuple[list[int], bool]:
        ids = self._vocabulary.encode(text)
        kept = ids[: limit - 1]
        return [*kept, self._eos_id], len(kept) < len(ids)

    def bucket(self, length: int) -> int:
        """To how many tokens inputs of `length` are padded: a power of two, or the run's most."""
        return min(max(_SHORTEST, 1 << (length - 1).bit_length()), self._longest)

    def __call__(
        self,
        asked: Sequence[Asked],
        number: int = 0,
        progress: Callable[[int], None] = lambda more: None,
    ) -> list[Prediction]:
        """Predictions in the order of what is asked.

        Texts of similar length are decoded together. What is drawn follows from the seed, `number`,
        which counts batches, and what else is asked. `progress` is told of every batch.
        """
        order = sorted(range(len(asked)), key=lambda i: self._length(asked[i]))
        found: list[Prediction] = [Prediction(())] * len(asked)
        for at in range(0, len(order), self._rows):
            part = order[at : at + self._rows]
            batch = self._batch([asked[i] for i in part])
            key = jax.random.fold_in(self._key, number + at // self._rows)
            placed = partitioning.put_batch(self._mesh, batch)
            rows = jax.device_get(self._program(self._params, placed, key))
            for i, tokens, scores in zip(part, *rows, strict=False):
                found[i] = self._prediction(tokens, scores)
            progress(len(part))
        return found

    def _length(self, one: Asked) -> int:
        """Of what is padded to one length: the input, and a source that may be as long."""
        alike = self._longest_source == self._longest
        return max(len(one.tokens), len(one.source)) if alike else len(one.tokens)

    def _batch(self, part: Sequence[Asked]) -> dict[str, np.ndarray]:
        length = self.bucket(max(self._length(one) for one in part))
        batch = {"encoder_input_tokens": np.zeros((self._rows, length), np.int32)}
        if self._longest_source is not None:
            if self._longest_source != self._longest:
                length = self._longest_source
            batch[SOURCE_TOKENS] = np.zeros((self._rows, length), np.int32)
        if self._space is not None:
            shape = (self._rows, self._space.num_slots)
            batch["feature_ids"] = np.full(shape, ABSENT, np.int32)
            if self._weighted:
                batch["feature_weights"] = np.ones(shape, np.float32)
        for row, (tokens, features, source) in enumerate(part):
            batch["encoder_input_tokens"][row, : len(tokens)] = tokens
            if self._longest_source is not None:
                batch[SOURCE_TOKENS][row, : len(source)] = source
            if self._space is not None:
                ids, weights = self._space.encode_weighted(features)
                batch["feature_ids"][row] = ids
                if self._weighted:
                    batch["feature_weights"][row] = weights
        return batch

    def _prediction(self, tokens: np.ndarray, scores: np.ndarray) -> Prediction:
        texts = [self._vocabulary.decode([int(t) for t in row if t > 0]) for row in tokens]
        if not self._how.beams:
            return Prediction((texts[0],))
        kept = [i for i, score in enumerate(scores) if np.isfinite(score)]
        return Prediction(
            tuple(texts[i] for i in kept or [0]), tuple(float(scores[i]) for i in kept)
        )


@functools.lru_cache(maxsize=16)
def _program(
    model: EncoderDecoder, how: Decoding, length: int, sharding: NamedSharding
) -> Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]:
    """(parameters, batch, key) -> tokens int32 [batch, n, length] and scores [batch, n], compiled.

    n is the beams, or 1; only beams have scores, others are 0.
    """

    def program(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        if how.beams:
            return model.predict_n(
                params,
                batch,
                max_length=length,
                beams=how.beams,
                alpha=how.alpha,
                manner=how.manner,
            )
        if how.sampling:
            tokens = model.sample(
                params,
                batch,
                max_length=length,
                rng=key,
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
            )
        else:
            tokens = model.predict(params, batch, max_length=length)
        return tokens[:, None], jnp.zeros((len(tokens), 1))

    return jax.jit(program, out_shardings=sharding)


def _check_fold(fold: str, *, adapted: bool) -> None:
    if fold not in FOLDS:
        raise ValueError(f"unknown fold {fold!r}; {did_you_mean(fold, FOLDS)}")
    if fold == ALWAYS and not adapted:
        raise ValueError("fold 'always': the run has no adapters")


def _sets(space: FeatureSpace, examples: Sequence[Mapping[str, Any]]) -> int:
    """How many sets of features, with their weights, examples have."""
    roomy = space.room_for(examples)
    encoded = (roomy.encode_weighted(one) for one in examples)
    return len({(ids.tobytes(), weights.tobytes()) for ids, weights in encoded})


def _folds(fold: str, run: Run, sets: int) -> bool:
    if fold == ALWAYS and sets != 1:
        raise ValueError(f"fold 'always': the lines have {sets} sets of features, expected one")
    fused = run.adapters is not None and run.adapters.fusion is not None
    if fused and fold == ALWAYS:
        raise ValueError(
            "fold 'always': adapters with a fusion read a source, and cannot be folded"
        )
    # else rounding would change what is folded
    plain = run.frozen_dtype in (None, "float32") and not fused
    return sets == 1 and (fold == ALWAYS or (fold == AUTO and plain))


def infer(
    run: Run,
    run_dir: epath.PathLike,
    *,
    input_path: epath.PathLike,
    output_path: epath.PathLike,
    form: str | None = None,
    features: str = "",
    override: bool = False,
    decoding: Decoding = GREEDILY,
    fold: str = AUTO,
    step: Step = None,
    bases_dir: epath.PathLike | None = None,
    say: Say = print,
) -> int:
    """Predicts for every line of a file, in its order; begun again, it goes on where it stood.

    What is done lies beside the output, in ``<output>.parts-<digest of the request>``, some lines
    to a file, until all is.
    `Evaluation.ensemble` is of evaluations: a line runs on its own cell's adapter alone.

    Args:
      run, run_dir, step, bases_dir: as in ``inference.evaluate``.
      input_path, form, features, override: what is asked, see ``requests.read``.
      output_path: the file to write, jsonl: the lines read, ``input`` and whatever else they have,
        with ``prediction`` added; whole or not at all.
      decoding: how; by beams a line has also its ``predictions``, the best first, and ``scores``.
      fold: see ``Predictor``.
      say: takes counts of what is unknown or cut, and progress.

    Returns:
      The number of lines.

    Raises:
      ValueError: a line that cannot be used, with file and line number; an output that is a folder;
        several processes; or as in ``inference.evaluate``.
    """
    job = Job(run, run_dir, bases_dir=bases_dir)
    buckets.check_writable(epath.Path(output_path).parent)
    asked = requests.read(
        input_path,
        job.space,
        features,
        form=form,
        override=override,
        cells=job.split.cells,
        source_text=run.source_text,
        say=say,
    )
    _check_fold(fold, adapted=job.space is not None)
    if job.space is not None:  # before anything is restored for it
        _folds(fold, run, _sets(job.space, [request.annotations for request in asked]))
    trained, frozen, found = inference.restore(job, step)
    identity = {
        "run": run.fingerprint(),
        "step": str(found),
        "parameters": digest(trained),
        "input": hashlib.sha256(epath.Path(input_path).read_bytes()).hexdigest(),
        "input_form": requests.form_of(input_path, form),
        "features": f"{features}{', before those of the lines' if override else ''}",
        "decoding": str(decoding),
        "fold": fold,
        "batch_size": str(run.evaluation.batch_size),
    }
    parts = _Parts(output_path, identity)
    predictor = Predictor(
        job,
        trained,
        frozen,
        decoding,
        [request.annotations for request in asked],
        rows=run.evaluation.batch_size,
        fold=fold,
    )
    encoded = [predictor.tokens(request.text) for request in asked]
    sources = [predictor.source_tokens(request.source) for request in asked]
    limits = f"Run.inputs_length={run.inputs_length}", f"{run.sources_length}"
    for what, limit, of in zip(("inputs", "sources"), limits, (encoded, sources), strict=True):
        cut = [number for number, (_, is_cut) in enumerate(of, start=1) if is_cut]
        if cut:
            say(
                f"{len(cut)} of {len(asked)} {what} are cut at {limit} tokens: of "
                f"{input_path}:{cut[0]}" + (f" to {cut[-1]}" if len(cut) > 1 else "")
            )
    size = _BATCHES * run.evaluation.batch_size
    starts = range(0, len(asked), size)
    done = sum(len(asked[start : start + size]) for start in starts if parts.has(start))
    watch = _Watch(len(asked), done, say)
    for start in starts:
        if parts.has(start):
            continue
        part = slice(start, start + size)
        rows = [
            Asked(tokens, request.annotations, source)
            for (tokens, _), request, (source, _) in zip(
                encoded[part], asked[part], sources[part], strict=True
            )
        ]
        with preemption.phase("decoding"):
            predictions = predictor(rows, start // run.evaluation.batch_size, watch)
        parts.write(start, [_line(*of) for of in zip(asked[part], predictions, strict=True)])
    parts.join(starts)
    return len(asked)


def _line(request: Request, prediction: Prediction) -> str:
    line = {**request.record, "prediction": prediction.texts[0]}
    for name in ("predictions", "scores"):  # of a file that was predicted for before
        line.pop(name, None)
    if prediction.scores:
        line["predictions"] = list(prediction.texts)
        line["scores"] = [round(score, 6) for score in prediction.scores]
    return json.dumps(line, ensure_ascii=False)


class _Parts:
    """The lines of an output that are done, beside it, until all are.

    The folder is named by what is asked for, so that no request finds the lines of another.
    """

    def __init__(self, output: epath.PathLike, identity: Mapping[str, str]) -> None:
        """ValueError where the output cannot be written."""
        self._output = epath.Path(output)
        if self._output.is_dir():
            raise ValueError(f"{output}: is a folder, expected a file to write")
        mark = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
        self._folder = epath.Path(f"{os.fspath(output)}.parts-{mark[:12]}")

    def _path(self, start: int) -> epath.Path:
        return self._folder / f"{start:09d}.jsonl"

    def has(self, start: int) -> bool:
        return self._path(start).exists()

    def write(self, start: int, lines: Sequence[str]) -> None:
        files.write_text(self._path(start), "".join(line + "\n" for line in lines))

    def join(self, starts: Sequence[int]) -> None:
        """Makes the output of its parts; ValueError where another process has taken them away."""
        for start in starts:
            if not self.has(start):
                raise ValueError(f"{self._path(start)} is gone: does the same command run twice?")
        files.write_text(self._output, "".join(self._path(at).read_text() for at in starts))
        if starts:
            self._folder.rmtree()


class _Watch:
    """Says how far the predictions are, every few seconds."""

    def __init__(self, lines: int, before: int, say: Say) -> None:
        self._lines, self._before, self._say = lines, before, say
        self._done, self._started, self._last = before, time.monotonic(), time.monotonic()
        if before:
            say(f"infer: {before:,} of {lines:,} lines were there already")

    def __call__(self, more: int) -> None:
        self._done += more
        now = time.monotonic()
        if now - self._last < 10:
            return
        self._last = now
        rate = (self._done - self._before) / (now - self._started)
        left = math.ceil((self._lines - self._done) / rate)
        self._say(
            f"infer: {self._done:,} of {self._lines:,} lines, {rate:,.1f} a second, "
            f"{left // 60}:{left % 60:02d} left"
        )
