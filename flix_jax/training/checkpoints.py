"""Checkpoints of what is trained, with orbax: never the base, which is named by its digest.

A step's folder holds ``trained`` (parameters), ``optimizer`` (its state), ``data`` (the position
in the example sequence) and ``identity`` (the feature space, the base's digest and whatever else
must agree before these arrays mean anything). A step that was evaluated also holds ``metrics``, the
value by which the best one is kept.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from flix_jax import processes
from flix_jax.evaluation import files
from flix_jax.training.partitioning import gathered
from flix_jax.training.step import TrainState

logger = logging.getLogger(__name__)

#: Beside the folder of checkpoints: step and value of the best one, and what the value is of.
BEST_FILE = "best.json"

Step = int | Literal["best"] | None


def digest(params: Any) -> str:
    """A digest of a parameter tree: its names, shapes, dtypes and bytes."""
    total = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(gathered(leaf) if isinstance(leaf, jax.Array) else leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


class Checkpoints:
    """The checkpoints of one run, ``<directory>/<step>``.

    Args:
      directory: where they are, local or a bucket.
      identity: name -> text of everything that the arrays depend on. It is saved with each step,
        and what is named here is compared when one is restored.
      keep: how many of the newest steps are kept; None keeps all.
      create: whether to make the directory; False is for reading.
      best: what the values given to ``save`` are of: which number, of which examples. The step of
        the greatest value, the earliest of equal ones, is then kept beside the newest, and told in
        ``best.json`` beside the directory. Values are stored with their steps, and only those of
        the same description are compared. None keeps the newest alone.
      differences: name -> what tells how a saved text of the identity differs from the one here;
        where there is none, both are shown.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        identity: Mapping[str, str],
        *,
        keep: int | None = None,
        create: bool = True,
        best: Mapping[str, Any] | None = None,
        differences: Mapping[str, Callable[[str], str]] | None = None,
    ) -> None:
        self.directory = epath.Path(directory).resolve()
        if not create and not self.directory.exists():
            raise ValueError(f"{self.directory.parent} holds no trained run: no {self.directory}")
        self._identity = dict(identity)
        self._differences = dict(differences or {})
        self._best_of = None if best is None else dict(best)
        self._values: dict[int, float] = {}
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=create,
                # Makes orbax store metrics; what is kept by them is the policy's to say.
                best_fn=None if best is None else lambda metrics: metrics["value"],
                preservation_policy=preservation_policy.AnyPreservationPolicy(
                    [preservation_policy.LatestN(keep), _TheBest(self)]
                ),
            ),
            item_handlers={
                "trained": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "identity": ocp.JsonCheckpointHandler(),
            },
        )
        if self._best_of is not None:
            self._values = self._stored_values(self._best_of)
        if create:
            self._note_best()  # a run may have ended between a checkpoint and its note

    def latest_step(self) -> int | None:
        """The newest whole checkpoint, None if there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> tuple[int, ...]:
        """The steps that are there, ascending."""
        return tuple(sorted(self._manager.all_steps()))

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, value) of the best checkpoint, None if none has a value."""
        return _greatest(self._values)

    def improves(self, value: float | None) -> bool:
        """Whether a step of this value would be the best; never for None, which is no value."""
        if value is None or self._best_of is None:
            return False
        return self.best is None or value > self.best[1]

    def save(
        self, state: TrainState, data_state: Mapping[str, Any], value: float | None = None
    ) -> None:
        """Starts to save; the arrays are copied before this returns, the writing goes on.

        Args:
          state: what is saved.
          data_state: the position in the examples.
          value: by which the best step is kept, higher as better; None where it was not evaluated.
            A step that is the best is on disk when this returns, and noted.
        """
        step, metrics = int(state.step), None
        improved = self.improves(value)
        if self._best_of is not None:  # orbax warns where it gets none
            metrics = {} if value is None else {"value": value, "of": self._best_of}
        if self._best_of is not None and value is not None:
            self._values[step] = value
        self._manager.save(
            step,
            metrics=metrics,
            args=ocp.args.Composite(
                trained=ocp.args.StandardSave(state.trained),
                optimizer=ocp.args.StandardSave(_leaves(state.opt_state)),
                data=ocp.args.JsonSave(dict(data_state)),
                identity=ocp.args.JsonSave(self._identity),
            ),
        )
        if improved:
            self.wait()
            self._note_best()

    def restore(self, template: TrainState, step: Step = None) -> tuple[TrainState, dict[str, Any]]:
        """The state and the data position of ``step`` (the newest by default).

        Args:
          template: arrays or shapes with the shardings that are wanted.
          step: one of ``all_steps()``, or ``'best'``: what the folder's ``best.json`` tells of.

        Raises:
          ValueError: no such step, another identity, or arrays of other names, shapes or dtypes.
        """
        wanted = {"trained": template.trained, "optimizer": _leaves(template.opt_state)}
        step, items = self._restore(step, wanted, data=ocp.args.JsonRestore())
        opt_state = jax.tree.unflatten(
            jax.tree.structure(template.opt_state), list(items["optimizer"].values())
        )
        count = jax.device_put(np.int32(step), template.step.sharding)
        return TrainState(count, items["trained"], opt_state), items["data"]

    def restore_trained(self, template: Any, step: Step = None) -> tuple[Any, int]:
        """The trained parameters alone and the step that they are of; raises as ``restore``."""
        step, items = self._restore(step, {"trained": template})
        return items["trained"], step

    def wait(self) -> None:
        """Returns when everything that was begun is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the manager's threads."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stored_values(self, of: Mapping[str, Any]) -> dict[int, float]:
        stored = {step: self._manager.metrics(step) or {} for step in self.all_steps()}
        return {s: metrics["value"] for s, metrics in stored.items() if metrics.get("of") == of}

    def _note_best(self) -> None:
        """Makes `best.json` say what is so; a folder that keeps no best step has none."""
        path = self.directory.parent / BEST_FILE
        if self.best is None:
            if processes.is_first():
                path.unlink(missing_ok=True)
            return
        step, value = self.best
        record = {"step": step, "value": value, "of": self._best_of}
        if files.read_json(path) != record:
            files.write_json(path, record)

    def _best_step(self) -> int:
        """The step to read as the best one; of the checkpoints, for the note may be behind."""
        path = self.directory.parent / BEST_FILE
        record = files.read_json(path)
        found = record and _greatest(self._stored_values(record["of"]))
        if not found:
            raise ValueError(
                f"{self.directory.parent} holds no best checkpoint: train it with "
                "Evaluation.keep_best"
            )
        return found[0]

    def _restore(
        self, step: Step, wanted: Mapping[str, Any], **others: Any
    ) -> tuple[int, Mapping[str, Any]]:
        steps = self.all_steps()
        if not steps:
            raise ValueError(f"no checkpoint in {self.directory}")
        if step == "best":
            step = self._best_step()
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {self.directory}, only {steps}")
        self._check_identity(step)
        metadata = self._manager.item_metadata(step)
        for name, tree in wanted.items():
            _check_arrays(f"{self.directory / str(step) / name}", metadata[name], tree)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        return step, self._manager.restore(step, args=ocp.args.Composite(**args, **others))

    def _check_identity(self, step: int) -> None:
        args = ocp.args.Composite(identity=ocp.args.JsonRestore())
        saved = self._manager.restore(step, args=args)["identity"]
        for name, here in self._identity.items():
            there = saved.get(name)
            if there != here:
                shown = f"saved {_short(there)}, here {_short(here)}"
                if there is not None and name in self._differences:
                    shown = self._differences[name](there)
                raise ValueError(
                    f"checkpoint {self.directory / str(step)} has another {name}: {shown}"
                )


class _TheBest(preservation_policy.PreservationPolicy):
    """Keeps the best step, in orbax's terms; its own `BestN` keeps the latest of equal ones."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        best = self._checkpoints.best
        return [best is not None and info.step == best[0] for info in checkpoints]


def _greatest(values: Mapping[int, float]) -> tuple[int, float] | None:
    """(step, value) of the greatest value, of the earliest step among equal ones."""
    return max(values.items(), key=lambda item: (item[1], -item[0])) if values else None


def _leaves(opt_state: Any) -> dict[str, Any]:
    # Optimizer states are named tuples, whose saved form would depend on optax's classes.
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(opt_state))}


def _check_arrays(where: str, saved: Any, wanted: Any) -> None:
    there, here = _specs(saved), _specs(wanted)
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"checkpoint {where}: array {name} is {there.get(name, 'absent')} there, "
                f"{here.get(name, 'absent')} here"
            )


def _specs(tree: Any) -> dict[str, str]:
    """Leaf name -> ``dtype[shape]``, for arrays, shapes and orbax's metadata alike."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for path, leaf in leaves
    }


def _short(text: str | None) -> str:
    return str(text) if len(str(text)) <= 200 else f"{str(text)[:200]}…"
