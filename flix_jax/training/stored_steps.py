"""The checkpoints in a run's folder, looked at from outside of a run."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from etils import epath

from flix_jax import buckets
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.training import best_step, manifest
from flix_jax.training.checkpoints import saved_steps
from flix_jax.training.retention import kept

DATA_FILE = "data/metadata"  # of a step, where orbax writes the json of its item `data`


class StoredStep(NamedTuple):
    """A checkpoint: what its manifest says, and what is wrong with it.

    Attributes:
      step, folder: which, and where.
      time: when it was written, in seconds since 1970; None if the manifest is damaged.
      size: of its files, in bytes.
      arrays: how many there are.
      value: by which the best is kept; None if it has none.
      damage: what differs from what was written; None if that was not looked for, or nothing.
    """

    step: int
    folder: epath.Path
    time: float | None
    size: int
    arrays: int
    value: float | None
    damage: str | None


def find(run_dir: epath.PathLike, *, step: int | None = None, verify: bool) -> list[StoredStep]:
    """The checkpoints of a run, ascending, or the one of a step.

    Args:
      run_dir: the run's folder.
      step: which; None is all.
      verify: whether to compare every file with its digest; else the manifest's own is.

    Raises:
      ValueError: there are none, or not this one, or no client for the bucket that it is in.
    """
    buckets.check_installed(run_dir)
    directory = epath.Path(run_dir) / "checkpoints"
    steps = sorted(saved_steps(directory))
    if not steps:
        raise ValueError(f"no checkpoint in {directory}")
    if step is not None and step not in steps:
        raise ValueError(
            f"no checkpoint of step {step} in {directory}; "
            f"{did_you_mean(str(step), map(str, steps))}"
        )
    values = best_step.values(epath.Path(run_dir))
    found = []
    for one in steps if step is None else [step]:
        folder = directory / str(one)
        time, size, arrays, damage = None, 0, 0, None
        try:
            record = manifest.read(folder)
            time, arrays = record["time"], len(record["arrays"])
            size = sum(size for size, _ in record["files"].values())
        except ValueError as error:
            damage = str(error)
        if verify:
            damage = manifest.damage(folder)
        found.append(StoredStep(one, folder, time, size, arrays, values.get(one), damage))
    return found


def data_position(run_dir: epath.PathLike) -> dict[str, Any] | None:
    """The position in the examples of a run's newest checkpoint; None for none that is sound."""
    directory = epath.Path(run_dir) / "checkpoints"
    newest = max(saved_steps(directory), default=None)
    text = None if newest is None else manifest.content(directory / str(newest), DATA_FILE)
    return None if text is None else dict(json.loads(text))


def prune(
    run_dir: epath.PathLike, *, keep: int, period: int | None = None, dry_run: bool = False
) -> list[StoredStep]:
    """Deletes all checkpoints of a run but the newest, those of a period, and the best.

    Args:
      run_dir: the run's folder; nothing may train in it meanwhile.
      keep: how many of the newest stay; damaged ones do not count.
      period: steps that it divides stay too.
      dry_run: whether nothing is deleted.

    Returns:
      What is deleted.

    Raises:
      ValueError: there are no checkpoints, or none of those that would stay is sound.
    """
    steps = find(run_dir, verify=True)
    sound = [one.step for one in steps if one.damage is None]
    values = {one.step: one.value for one in steps if one.value is not None and one.step in sound}
    if not sound:
        raise ValueError(f"{run_dir}: every checkpoint is damaged; nothing is deleted")
    staying = kept(sound, keep, period, best_step.greatest(values))
    going = [one for one in steps if one.step not in staying]
    for one in () if dry_run else going:
        # Without its manifest no part of a step passes for a whole one.
        (one.folder / manifest.NAME).unlink(missing_ok=True)
        one.folder.rmtree()
    return going
