"""A prompt: type an input, choose the features, see the best predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from flix_jax.adapters.suggest import did_you_mean
from flix_jax.experiments import inference, requests
from flix_jax.experiments.job import Job
from flix_jax.experiments.prediction import Asked, Predictor
from flix_jax.experiments.run import Run
from flix_jax.models.decoding import Decoding
from flix_jax.training import partitioning
from flix_jax.training.checkpoints import Step

HELP = """\
Any line is an input, but for
  :features task=ner,language=sw:0.7,language=rw:0.3   the features of the inputs that follow
  :beams 4                                             how many predictions to search for
  :source The same in English.                         the English source of the next input
  :help
  :quit"""
COMMANDS = (":features", ":beams", ":source", ":help", ":quit")


def chat(
    run: Run,
    run_dir: epath.PathLike,
    lines: Iterable[str],
    *,
    features: str = "",
    decoding: Decoding,
    step: Step = None,
    bases_dir: epath.PathLike | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Answers inputs one by one with predictions, the best first, until there are no more.

    A mistake is told, and the next line is read.

    Args:
      run, run_dir, step, bases_dir: as in ``inference.evaluate``.
      lines: what is typed: inputs, and commands (HELP).
      features: at the start, as ``requests.parse_features`` takes them.
      decoding: at the start; by beams there are several predictions, with scores.
      say: takes the answers.

    Raises:
      ValueError: features that there are not; as in ``inference.evaluate``.
    """
    job = Job(run, run_dir, bases_dir=bases_dir)
    session = _Session(job, requests.parse_features(features, job.space), decoding)
    session.trained, session.frozen, found = inference.restore(job, step)
    say(f"{run_dir}, step {found}. {session.standing()}. :help tells what can be typed.")
    for line in lines:
        line = line.strip()
        if line == ":quit":
            return
        if line:
            try:
                say(session.answer(line))
            except ValueError as error:
                say(f"error: {error}")


@dataclasses.dataclass
class _Session:
    """What the next input is answered with."""

    job: Job
    features: requests.Features
    decoding: Decoding
    trained: Any = None
    frozen: Any = None
    answered: int = 0
    source: str = ""
    _predictor: Predictor | None = None

    def standing(self) -> str:
        chosen = [
            f"{name}={value}" + ("" if weight == 1 else f":{weight:g}")
            for name, values in self.features.items()
            for value, weight in values.items()
        ]
        how = f"{self.decoding.beams} beams" if self.decoding.beams else "one prediction"
        return f"features {','.join(chosen) or 'none'}, {how}"

    def answer(self, line: str) -> str:
        """The predictions for an input, or what a command did."""
        if not line.startswith(":"):
            return self._predict(line)
        command, _, rest = line.partition(" ")
        if command == ":help":
            return HELP
        if command == ":source":
            if self.job.run.source_text is None:
                raise ValueError(":source: this run reads no sources")
            self.source = rest.strip()
            return f"source of the next input: {self.source or 'none'}"
        if command == ":features":
            self.features = requests.parse_features(rest, self.job.space)
        elif command == ":beams":
            if not rest.strip().isdecimal():
                raise ValueError(f":beams {rest}: expected a number")
            self.decoding = dataclasses.replace(self.decoding, beams=int(rest))
        else:
            raise ValueError(f"no command {command}; {did_you_mean(command, COMMANDS)}")
        self._predictor = None
        return self.standing()

    def _predict(self, text: str) -> str:
        of_languages = {cell.language: dict(cell.extra) for cell in self.job.split.cells}
        annotations = requests.as_of_a_cell(self.features, of_languages)
        if self.job.space is not None:
            requests.check(annotations, self.job.space)
        if self._predictor is None:  # compiles when it is first called
            self._predictor = Predictor(
                self.job,
                self.trained,
                self.frozen,
                self.decoding,
                [annotations],
                rows=partitioning.batch_shards(self.job.mesh),
            )
        source, self.source = self.source, ""
        source_text = self.job.run.source_text
        joined = text if source_text is None else source_text.join(source, text)
        tokens, cut = self._predictor.tokens(joined)
        source_tokens, source_cut = self._predictor.source_tokens(source)
        (found,) = self._predictor([Asked(tokens, annotations, source_tokens)], self.answered)
        self.answered += 1  # so that the same text is drawn for anew
        lines = [f"(cut at {len(tokens)} tokens)"] if cut else []
        lines += [f"(source cut at {len(source_tokens)} tokens)"] if source_cut else []
        if not found.scores:
            return "\n".join([*lines, found.texts[0]])
        numbered = zip(found.texts, found.scores, strict=True)
        return "\n".join([*lines, *(f"{score:8.3f}  {one}" for one, score in numbered)])
