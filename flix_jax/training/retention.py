"""Which checkpoints stay: the newest, those of a period, the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orbax.checkpoint.checkpoint_managers import preservation_policy

from flix_jax.training.best_step import BestStep


class Retention(preservation_policy.PreservationPolicy):
    """What is kept, in orbax's terms; its own `BestN` keeps the latest of equal ones."""

    def __init__(
        self,
        newest: int | None,
        period: int | None,
        best: BestStep,
        planned: Callable[[int], bool] | None,
    ) -> None:
        self._newest, self._period, self._best, self._planned = newest, period, best, planned

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Of ascending steps those that stay."""
        return kept(steps, self._newest, self._period, self._best.among(steps), self._planned)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        staying = self.kept(steps)
        return [step in staying for step in steps]


def kept(
    steps: Sequence[int],
    newest: int | None,
    period: int | None,
    best: tuple[int, Any] | None,
    planned: Callable[[int], bool] | None = None,
) -> set[int]:
    """Of ascending steps those that stay: the `newest` (None: all), each of `period`, the best.

    Of the newest only those that are `planned` count, but for the last one.
    """
    counted = [step for step in steps if planned is None or planned(step)]
    found = set(counted if newest is None else counted[-newest:]) | set(steps[-1:])
    if period is not None:
        found |= {step for step in steps if step % period == 0}
    return found | ({best[0]} if best is not None else set())
