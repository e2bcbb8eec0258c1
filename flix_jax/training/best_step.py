"""Which checkpoint is the best, by values that evaluations give: ``best.json`` of a run's folder.

It holds ``step`` and ``value`` of the best step that is on disk, what the values are ``of``, and
the ``values`` of all steps that were evaluated, on disk or not. A value is written down before its
step is, so that none is lost where a run ends between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from flix_jax import processes
from flix_jax.evaluation import files

NAME = "best.json"


class BestStep:
    """The values of a run's steps.

    Args:
      run_dir: the run's folder.
      of: what the values are of; those of another description do not count. None keeps none.
    """

    def __init__(self, run_dir: epath.Path, of: Mapping[str, Any] | None) -> None:
        self._path = run_dir / NAME
        self._of = None if of is None else dict(of)
        record = files.read_object(self._path) or {}
        same = of is not None and record.get("of") == self._of
        self._values = _of_record(record, self._path) if same else {}

    @property
    def counts(self) -> bool:
        """Whether there is something that values are of."""
        return self._of is not None

    def set(self, step: int, value: float) -> None:
        """Notes a value; `write` puts it on disk."""
        self._values[step] = value

    def among(self, steps: Iterable[int]) -> tuple[int, float] | None:
        """(step, value) of the best of these steps, the earliest of equal ones; None for none."""
        return greatest({step: self._values[step] for step in steps if step in self._values})

    def forget_after(self, last: int) -> None:
        """Drops values of steps behind the last one that is there: they will be made again."""
        self._values = {step: value for step, value in self._values.items() if step <= last}

    def write(self, steps: Iterable[int]) -> None:
        """Makes the file say what is so of the steps on disk; without values there is none."""
        if not self._values:
            if processes.is_first():
                self._path.unlink(missing_ok=True)
            return
        step, value = self.among(steps) or (None, None)
        values = {str(step): value for step, value in sorted(self._values.items())}
        record = {"step": step, "value": value, "of": self._of, "values": values}
        if files.read_object(self._path) != record:
            files.write_json(self._path, record)


def find(run_dir: epath.Path, steps: Iterable[int] | None = None) -> int:
    """The best of the steps of a run that has been trained, of all that were evaluated by default.

    Raises:
      ValueError: none has a value.
    """
    found = values(run_dir)
    here = found.keys() if steps is None else set(steps)
    best = greatest({step: value for step, value in found.items() if step in here})
    if best is None:
        raise ValueError(f"{run_dir} holds no best checkpoint: train it with Evaluation.keep_best")
    return best[0]


def values(run_dir: epath.Path) -> dict[int, float]:
    """Step -> value of all steps of a run that were evaluated.

    Raises:
      ValueError: the file holds something else.
    """
    return _of_record(files.read_object(run_dir / NAME) or {}, run_dir / NAME)


def greatest(values: Mapping[int, float]) -> tuple[int, float] | None:
    """(step, value) of the greatest value, of the earliest step of equal ones; None for none."""
    return max(values.items(), key=lambda item: (item[1], -item[0])) if values else None


def _of_record(record: Mapping[str, Any], path: epath.Path) -> dict[int, float]:
    try:
        return {int(step): float(value) for step, value in record.get("values", {}).items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"{path}: values are {str(record['values'])[:80]}, expected numbers by step"
        ) from None
