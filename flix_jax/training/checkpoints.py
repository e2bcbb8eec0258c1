"""Checkpoints of what is trained, with orbax: never the base, which is named by its digest.

A step's folder holds ``trained`` (parameters), ``optimizer`` (its state), ``data`` (the position
in the example sequence), ``identity`` (the feature space, the base's digest and whatever else must
agree before these arrays mean anything) and ``manifest.json``, digests of all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from flix_jax import buckets, processes
from flix_jax.adapters.tree import leaves_by_name
from flix_jax.mistakes import reason
from flix_jax.training import array_digests, best_step, manifest, sealing
from flix_jax.training.best_step import BestStep
from flix_jax.training.partitioning import gathered
from flix_jax.training.retention import Retention
from flix_jax.training.step import TrainState

_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a checkpoint's folder until it is whole

# What a failed write is raised as, by orbax and by tensorstore.
_WRITING = (OSError, ValueError, RuntimeError)
# What orbax raises where a file is not of the form that it expects.
_READING = (ValueError, KeyError, TypeError, AttributeError, AssertionError, OverflowError)

Step = int | Literal["best"] | None


def digest(params: Any) -> str:
    """A digest of a parameter tree: its names, shapes, dtypes and bytes."""
    total = hashlib.blake2b(digest_size=16)
    for name, leaf in leaves_by_name(params):
        array = np.ascontiguousarray(gathered(leaf) if isinstance(leaf, jax.Array) else leaf)
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


class Damaged(ValueError):
    """A checkpoint is not what was written. Says what is changed, and where."""


class Checkpoints:
    """The checkpoints of one run, ``<directory>/<step>``.

    A step is there as a whole or not at all: its folder gets its name when all of it is written, a
    manifest (`training.manifest`) last. What is restored is compared with the manifest, its files
    before they are read and its arrays where they have come to lie.

    Args:
      directory: where they are, local or a bucket.
      identity: name -> text of everything that the arrays depend on. It is saved with each step,
        and what is named here is compared when one is restored.
      keep: how many of the newest steps are kept; None keeps all.
      keep_period: steps that it divides are kept too; None keeps no others.
      planned: of which steps `keep` counts; None is all. Another one, as where a run was asked to
        stop, is deleted when a newer one is whole, unless it is the best.
      create: whether to make the directory, and to remove what an interrupted save left there;
        False is for reading.
      best: what the values given to ``save`` are of: which number, of which examples. The step of
        the greatest value, the earliest of equal ones, is then kept beside the newest, and told in
        ``best.json`` beside the directory. Only values of the same description are compared. None
        keeps the newest alone.
      differences: name -> what tells how a saved text of the identity differs from the one here;
        where there is none, both are shown.
      warn: is told of each damaged step that is set aside, in the folder ``damaged`` of the run, so
        that training goes on from the one before; None makes it an error.

    Raises:
      Damaged: orbax cannot list the steps, for one is damaged that is not set aside.
      ValueError: there is nothing to read, or orbax cannot list it.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        identity: Mapping[str, str],
        *,
        keep: int | None = None,
        keep_period: int | None = None,
        planned: Callable[[int], bool] | None = None,
        create: bool = True,
        best: Mapping[str, Any] | None = None,
        differences: Mapping[str, Callable[[str], str]] | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.directory = buckets.resolved(directory)
        if not create and not self.directory.exists():
            raise ValueError(f"{self.directory.parent} holds no trained run: no {self.directory}")
        self._writes = create
        self._identity = dict(identity)
        self._differences = dict(differences or {})
        # Of steps that are being written.
        self._digests: dict[int, Future[array_digests.Digests]] = {}
        self._sound: set[int] = set()  # steps whose files were compared already
        self._best = BestStep(self.directory.parent, best)
        self._retention = Retention(keep, keep_period, self._best, planned)
        self._warn = warn
        self._manager = self._open()
        if create:  # a run may have ended between a checkpoint and its note
            self._best.forget_after(self.latest_step() or 0)
            self._best.write(self.all_steps())

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager, which reads of every step when it was written."""
        while True:
            try:
                return ocp.CheckpointManager(
                    self.directory,
                    options=ocp.CheckpointManagerOptions(
                        create=self._writes,
                        cleanup_tmp_directories=self._writes,
                        preservation_policy=self._retention,
                        temporary_path_class=sealing.sealed(self.directory, self._seal),
                    ),
                    item_handlers={
                        "trained": ocp.StandardCheckpointHandler(),
                        "optimizer": ocp.StandardCheckpointHandler(),
                        "data": ocp.JsonCheckpointHandler(),
                        "identity": ocp.JsonCheckpointHandler(),
                    },
                )
            except _READING as error:
                found = self._newest_damaged()
                if found is None:
                    raise ValueError(
                        f"the checkpoints in {self.directory} cannot be read: {reason(error)[:300]}"
                    ) from error
                step, damage = found
                if self._warn is None:
                    raise Damaged(f"{damage}; move it away to read the others") from error
                self._set_aside(step, damage)

    def latest_step(self) -> int | None:
        """The newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> tuple[int, ...]:
        """The steps that are there, ascending."""
        return tuple(sorted(self._manager.all_steps()))

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, value) of the best checkpoint, None if none has a value."""
        return self._best.among(self.all_steps())

    def improves(self, value: float | None) -> bool:
        """Whether a step of this value would be the best; never for None, which is no value."""
        if value is None or not self._best.counts:
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

        Raises:
          ValueError: an earlier step could not be written.
        """
        self.check()
        step, improved = int(state.step), self.improves(value)
        if value is not None:
            self._note(step, value)
        arrays = {"trained": state.trained, "optimizer": _leaves(state.opt_state)}
        digests: Future[array_digests.Digests] = Future()
        self._digests[step] = digests
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    trained=ocp.args.StandardSave(arrays["trained"]),
                    optimizer=ocp.args.StandardSave(arrays["optimizer"]),
                    data=ocp.args.JsonSave(dict(data_state)),
                    identity=ocp.args.JsonSave(self._identity),
                ),
            )
            digests.set_result(array_digests.of(arrays))  # while the copies are written
        except _WRITING as error:
            raise self._unwritten(error) from error
        finally:
            digests.cancel()  # what waits for them, if there are none
        # What was saved before is on disk: only the first process of several has sealed it.
        self._digests = {step: digests} if step in self._digests else {}
        if improved:
            self.wait()
            self._best.write(self.all_steps())

    def set_value(self, step: int, value: float) -> None:
        """Gives a step that was saved without one the value by which the best is kept."""
        self._note(step, value)
        self._end_deletions()  # of what was the best

    def resume(
        self,
        template: TrainState,
        fits: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest sound state and its data position, to train on from; None for no step.

        Args:
          template, fits: as for `restore`.

        Raises:
          Damaged: no step is left of those that there were, now or when the run was started before;
            or the newest is damaged and not to be set aside.
          ValueError: as `restore`.
        """
        for step in reversed(self.all_steps()):
            try:
                restored = self.restore(template, step, fits)
                self._end_deletions()
                return restored
            except Damaged as error:
                self._set_aside(step, error)
                self._manager.reload()
        self._check_one_is_left()
        return None

    def delete_after(self, step: int) -> None:
        """Deletes the steps behind one from which training goes on; they will be made again."""
        for later in self.all_steps():
            if later > step:
                self._manager.delete(later)
        self._best.forget_after(step)

    def set_aside_damaged(self) -> None:
        """Sets aside the newest steps up to one whose files are sound.

        Raises:
          Damaged: no step is left, or one is damaged and not to be set aside.
        """
        for step in reversed(self.all_steps()):
            try:
                self._check_files(step)
                return self._end_deletions()
            except Damaged as error:
                self._set_aside(step, error)
                self._manager.reload()
        self._check_one_is_left()

    def _check_one_is_left(self) -> None:
        """Refuses to begin anew where all the steps that there were have been set aside."""
        aside = processes.from_first(lambda: sorted(saved_steps(self._damaged)))
        if aside and not self.all_steps():
            raise Damaged(
                f"no sound step is left in {self.directory}: the damaged ones are in "
                f"{self._damaged}; remove that to begin again"
            )

    @property
    def _damaged(self) -> epath.Path:
        """Where damaged steps are set aside."""
        return self.directory.parent / "damaged"

    def _set_aside(self, step: int, damage: Damaged) -> None:
        """Moves a damaged step out of the way, where that is wanted; else raises what is told.

        A manager of orbax's that is made already does not see it.
        """
        if self._warn is None:
            raise Damaged(f"{damage}{self._instead(step)}") from None
        source, damaged = self.directory / str(step), self._damaged

        def move() -> str:
            names = itertools.chain([str(step)], (f"{step}-{n}" for n in itertools.count(2)))
            place = next(damaged / name for name in names if not (damaged / name).exists())
            _move(source, place)
            return str(place)

        self._warn(f"{damage}; set aside in {processes.from_first(move)}")

    def restore(
        self,
        template: TrainState,
        step: Step = None,
        fits: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and the data position of ``step`` (the newest by default).

        Args:
          template: arrays or shapes with the shardings that are wanted.
          step: one of ``all_steps()``, or ``'best'``: what the folder's ``best.json`` tells of.
          fits: is given the data position before any array is read, to refuse another one.

        Raises:
          Damaged: the step is not what was written.
          ValueError: no such step, another identity, or arrays of other names, shapes or dtypes.
        """
        wanted = {"trained": template.trained, "optimizer": _leaves(template.opt_state)}
        step, data, items = self._restore(step, wanted, fits)
        opt_state = jax.tree.unflatten(
            jax.tree.structure(template.opt_state), list(items["optimizer"].values())
        )
        count = jax.device_put(np.int32(step), template.step.sharding)
        return TrainState(count, items["trained"], opt_state), data

    def restore_trained(self, template: Any, step: Step = None) -> tuple[Any, int]:
        """The trained parameters alone and the step that they are of; raises as ``restore``."""
        step, _, items = self._restore(step, {"trained": template})
        return items["trained"], step

    def check(self) -> None:
        """Raises ValueError if a step could not be written."""
        try:
            self._manager.check_for_errors()
        except _WRITING as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Returns when everything that was begun is on disk; raises as `check`."""
        try:
            self._manager.wait_until_finished()
        except _WRITING as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Waits, then releases the manager's threads; raises as `check`."""
        try:
            self._manager.close()
        except _WRITING as error:
            raise self._unwritten(error) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _note(self, step: int, value: float) -> None:
        if self._best.counts:
            self._best.set(step, value)
            self._best.write(self.all_steps())

    def _end_deletions(self) -> None:
        """Deletes what is not kept: the run may have ended while it did that."""
        steps = self.all_steps()
        for step in set(steps) - self._retention.kept(steps):
            self._manager.delete(step)

    def _seal(self, folder: epath.Path, announced: Mapping[str, bytes]) -> None:
        """Writes the manifest of a step that is about to get its name."""
        step = int(folder.name.partition(".")[0])
        digests = self._digests.pop(step).result()
        manifest.write(folder, step, array_digests.texts(digests), announced)

    def _unwritten(self, error: BaseException) -> ValueError:
        said = reason(error)
        # Of tensorstore's long tale the end says why: "…: No space left on device [os_error…]".
        told = re.search(r"([^:]*) \[(os_error|http_)", said)
        steps = sorted(saved_steps(self.directory))
        with contextlib.suppress(OSError):  # what there is of it takes space that is needed
            for path in self.directory.glob(f"*{_TEMPORARY}*"):
                path.rmtree()
        return ValueError(
            f"a checkpoint could not be written to {self.directory}: "
            f"{told[1].strip() if told else _short(said)}; "
            f"the steps before it stand: {', '.join(map(str, steps)) or 'none'}"
        )

    def _restore(
        self,
        step: Step,
        wanted: Mapping[str, Any],
        fits: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> tuple[int, dict[str, Any], Mapping[str, Any]]:
        """The step, its data position, and the arrays that are wanted."""
        steps = self.all_steps()
        if not steps:
            raise ValueError(f"no checkpoint in {self.directory}")
        if step == "best":
            step = best_step.find(self.directory.parent, steps)
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {self.directory}, only {steps}")
        try:
            self._check_files(step)
        except Damaged as error:
            more = "" if self._writes else self._instead(step)
            raise Damaged(f"{error}{more}") from None
        told = ocp.args.Composite(identity=ocp.args.JsonRestore(), data=ocp.args.JsonRestore())
        with self._reading(step):
            found = self._manager.restore(step, args=told)
            identity, data = dict(found["identity"]), dict(found["data"])
        self._check_identity(step, identity)
        if fits is not None:
            fits(data)
        with self._reading(step):
            metadata = self._manager.item_metadata(step)
        for name, tree in wanted.items():
            _check_arrays(f"{self.directory / str(step) / name}", metadata[name], tree)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        with self._reading(step):
            items = self._manager.restore(step, args=ocp.args.Composite(**args))
        self._check_digests(step, {name: items[name] for name in wanted})
        return step, data, items

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """One error for those of orbax that no damage explains, for the manifest fits the files.

        A stranger can write both. It is not `Damaged`: such a step is not set aside.
        """
        try:
            yield
        except _READING as error:
            folder = self.directory / str(step)
            raise ValueError(
                f"checkpoint {folder} cannot be read: {reason(error)[:300]}"
            ) from error

    def _newest_damaged(self) -> tuple[int, Damaged] | None:
        """The newest step whose files are not as written, and what is told of it; None for none."""
        for step in processes.from_first(lambda: sorted(saved_steps(self.directory), reverse=True)):
            try:
                self._check_files(step)
            except Damaged as error:
                return step, error
        return None

    def _check_files(self, step: int) -> None:
        if step in self._sound:
            return
        folder = self.directory / str(step)
        found = processes.from_first(lambda: manifest.damage(folder))
        if found is not None:
            raise Damaged(f"checkpoint {folder} is damaged: {found}")
        self._sound.add(step)

    def _instead(self, step: int) -> str:
        """What else could be read, if the newest step was to be."""
        older = [s for s in sorted(saved_steps(self.directory), reverse=True) if s < step]
        sound = next((s for s in older if manifest.damage(self.directory / str(s)) is None), None)
        return "" if sound is None else f"; the newest sound one is of step {sound}"

    def _check_digests(self, step: int, items: Mapping[str, Any]) -> None:
        folder = self.directory / str(step)
        expected = manifest.read(folder)["arrays"]
        for name, found in array_digests.texts(array_digests.of(items)).items():
            if found != expected.get(name):
                raise Damaged(f"checkpoint {folder} is damaged: array {name} is another one")

    def _check_identity(self, step: int, saved: Mapping[str, Any]) -> None:
        for name, here in self._identity.items():
            there = saved.get(name)
            if there != here:
                shown = f"saved {_short(there)}, here {_short(here)}"
                if isinstance(there, str) and name in self._differences:
                    with contextlib.suppress(ValueError):  # no text that was ever saved
                        shown = self._differences[name](there)
                raise ValueError(
                    f"checkpoint {self.directory / str(step)} has another {name}: {shown}"
                )


def saved_steps(directory: epath.PathLike) -> frozenset[int]:
    """The steps of the checkpoints in a folder, which need not be there."""
    if not epath.Path(directory).exists():
        return frozenset()
    return frozenset(ocp.utils.checkpoint_steps(directory))


def _move(source: epath.Path, place: epath.Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if not buckets.is_bucket(source):
        source.rename(place)
        return
    for name in manifest.files_of(source):  # a bucket cannot rename
        to = place / name
        to.parent.mkdir(parents=True, exist_ok=True)
        (source / name).copy(to)
    source.rmtree()


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
    leaves = leaves_by_name(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in leaves}


def _short(saved: Any) -> str:
    text = " ".join(str(saved).split())
    return text if len(text) <= 200 else f"{text[:200]}…"
