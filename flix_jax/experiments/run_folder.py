"""Which run a folder holds: a run that is started again goes on only as what it was.

run.json          the description of the run
trained_on.json   names of the cells that it and its bases are trained on
changes.json      what of the run was changed on the way: at which step, from what to what
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data.cells import CellSplit, match, name_some
from flix_jax.evaluation import files
from flix_jax.experiments.run import FREE, RANDOM, Run
from flix_jax.mistakes import Mistake
from flix_jax.training import checkpoints

TRAINED_ON_FILE = "trained_on.json"
CHANGES_FILE = "changes.json"

#: Values that change the result and can be changed in a folder, where that is allowed expressly.
MAY_CHANGE = re.compile(
    r"total_steps|microbatches|loss_chunks|label_smoothing|z_loss|train_values|seen_by_base"
    r"|optimizer\.(weight_decay|clip_norm|b1|b2|eps|multiply_by_parameter_scale|lazy)"
    r"|optimizer\.schedule\..*"
    r"|model\.(dropout_rate|dtype|product_dtype|remat|one_hot_embedding)"
    r"|adapters\.dropout|adapters\.space\.(rescale|keep_one)"
    r"|adapters\.space\.types\.\d+\.(dropout|dropouts\b.*)"
)
# What the others decide; the first pattern that matches the beginning of a name counts.
_DECIDES = (
    (r"base|frozen_dtype|seed$", "the base"),
    (r"model|trainable", "the network's arrays"),
    (r"adapters\.space", "the features and their arrays"),
    (r"adapters", "the adapters' arrays"),
    (r"optimizer", "the optimizer's state"),
    (r"vocabulary", "the tokens"),
    (r"", "the sequence of examples"),
)


def saved_steps(folder: epath.PathLike) -> frozenset[int]:
    """The steps of a run's checkpoints."""
    return checkpoints.saved_steps(epath.Path(folder) / "checkpoints")


def check_folder(
    run: Run, run_dir: epath.Path, allow_changes: Sequence[str] = ()
) -> dict[str, tuple[str, str]]:
    """Refuses a folder that belongs to another run, but for changes that are allowed.

    Args:
      run, run_dir: the run and its folder.
      allow_changes: patterns over the values of a run by name (`optimizer.schedule.*`) that may
        differ from what the folder holds. What the arrays or the order of the examples depend on
        may not, whatever is allowed.

    Returns:
      What differs and is allowed: name -> (there, here).

    Raises:
      ValueError: with the values that differ and what would allow them, or why nothing does; for a
        pattern that matches no value.
    """
    there = files.read_object(run_dir / "run.json")
    # Where the schedule does not depend on them, the steps may change anyway, and be named.
    known = sorted({*run.describe(), *(there or {}), "total_steps"})
    for pattern in allow_changes:
        if not fnmatch.filter(known, pattern):
            raise ValueError(
                f"--allow_changes={pattern}: no value of the run is called {pattern!r}; "
                f"{did_you_mean(pattern, known)}"
            )
    if there is None:
        if steps := saved_steps(run_dir):
            raise ValueError(
                f"{run_dir / 'run.json'} is missing beside checkpoints up to step {max(steps)}: it "
                "says which run they are of; put it back, or move the checkpoints away"
            )
        return {}
    changed = _changed(run, there, FREE)
    refused = [
        name
        for name in changed
        if _why_not(name) or not any(fnmatch.fnmatchcase(name, p) for p in allow_changes)
    ]
    if refused:
        never = [name for name in refused if _why_not(name)]
        if never:
            how = f"{never[0]} cannot change in a folder, for it decides {_why_not(never[0])}: "
        else:
            how = f"go on with --allow_changes={','.join(refused)} (noted in the folder), or "
        values = {name: changed[name] for name in [*never, *refused] if name in changed}
        raise Mistake(
            f"{run_dir} holds another run: {_shown(values)}; {how}use another run_dir",
            _places(run, values),
        )
    return changed


def check_base_folder(run: Run, base_dir: epath.Path) -> None:
    """Refuses a base whose network or vocabulary is another one than the run's."""
    there = files.read_object(base_dir / "run.json") or {}
    network = {k: v for k, v in there.items() if k.startswith(("model.", "vocabulary."))}
    free = re.compile(
        r"(?!model\.|vocabulary\.).*|model\.(dtype|product_dtype|remat|dropout_rate)=.*"
        r"|vocabulary\.path=.*",
        re.DOTALL,
    )
    changed = _changed(run, network, free) if network else {}
    if changed:
        raise Mistake(
            f"{base_dir} holds another network: {_shown(changed)}; expected a base of the run's",
            _places(run, changed),
        )


def note_changes(run_dir: epath.Path, step: int, changes: Mapping[str, tuple[str, str]]) -> None:
    """Adds to a folder what was changed at a step; before the first, how its features were."""
    if not changes:
        return
    path = run_dir / CHANGES_FILE
    noted = files.read_object(path) or {"features": None, "changes": []}
    features = run_dir / "features.json"
    if noted["features"] is None and features.exists():
        noted["features"] = features.read_text().removesuffix("\n")
    values = {name: {"from": there, "to": here} for name, (there, here) in changes.items()}
    entry = {"step": step, "values": values}
    if entry not in noted["changes"][-1:]:  # a start that was killed before run.json was written
        noted["changes"].append(entry)
    files.write_json(path, noted)


def features_identity(run_dir: epath.Path, space: FeatureSpace, changing: bool) -> str:
    """The feature space by which the checkpoints of a folder are known.

    That is the first one: rates of dropout may be changed on the way, which no array depends on.

    Args:
      run_dir: the folder.
      space: of the run as it is now.
      changing: whether it is about to be changed, and not noted yet.
    """
    noted = (files.read_object(run_dir / CHANGES_FILE) or {}).get("features")
    path = run_dir / "features.json"
    if noted is None and changing and path.exists():
        noted = path.read_text().removesuffix("\n")
    if noted is not None and _without_rates(FeatureSpace.from_json(noted)) == _without_rates(space):
        return str(noted)
    return space.to_json()


def _without_rates(space: FeatureSpace) -> FeatureSpace:
    types = [dataclasses.replace(t, dropout=0.0, dropouts={}) for t in space.types]
    return dataclasses.replace(space, types=tuple(types), rescale=False, keep_one=False)


def note_folder(run: Run, run_dir: epath.Path) -> None:
    """Writes down which run a folder holds, and the cells that it and its bases are trained on."""
    files.write_json(run_dir / "run.json", run.describe())
    files.write_json(run_dir / TRAINED_ON_FILE, sorted(trained_on(run)))


def trained_on(run: Run) -> set[str]:
    """Names of the cells that a run is trained on, and before it its base, as far as is known.

    A base that is a folder tells by what `note_folder` wrote there; one made elsewhere, nothing.
    """
    names = {cell.name for cell in run.split().train}
    return names | base_trained_on(run)


def base_trained_on(run: Run) -> set[str]:
    """Names of the cells that the base of a run is trained on; see `trained_on`."""
    if isinstance(run.base, Run):
        return trained_on(run.base)
    if run.base == RANDOM:
        return set()
    return set(files.read_texts(epath.Path(run.base) / TRAINED_ON_FILE) or ())


def check_held_out(run: Run, split: CellSplit) -> None:
    """Refuses a base that is trained on held-out cells, but for those of `Run.seen_by_base`."""
    allowed = set(match(run.seen_by_base, split.held_out, "Run.seen_by_base"))
    seen = base_trained_on(run)
    both = [cell for cell in split.held_out if cell.name in seen and cell not in allowed]
    if both:
        raise ValueError(
            f"Mixture.held_out: the base is trained on {name_some(both)}, which would not be "
            "unseen; hold them out there too, or name them in Run.seen_by_base"
        )


def _changed(
    run: Run, there: Mapping[str, str], free: re.Pattern[str]
) -> dict[str, tuple[str, str]]:
    """What differs from a description: name -> (there, here), but for what is free to."""
    # A folder may be older than an option: it was made with what is now the default.
    unsaid = run.defaults() - there.keys()
    here = {k: v for k, v in run.describe().items() if k not in unsaid}

    def is_free(name: str) -> bool:
        values = [values[name] for values in (here, there) if name in values]
        return all(free.fullmatch(f"{name}={value}") for value in values)

    return {
        name: (there.get(name, "absent"), here.get(name, "absent"))
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name) and not is_free(name)
    }


def _shown(changed: Mapping[str, tuple[str, str]]) -> str:
    values = "; ".join(
        f"{name} is {there} there and {here} here"
        for name, (there, here) in list(changed.items())[:5]
    )
    return values + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")


def _places(run: Run, names: Iterable[str]) -> list[str]:
    """The parameters that give values; of a feature type's name, that which lists the types."""
    places = run.places()
    listed = (re.sub(r"(types\.\d+)\.name$", r"\1.kind", name) for name in names)
    return [places[name] for name in listed if name in places]


def _why_not(name: str) -> str:
    """What depends on a value so that it can never change in a folder; '' where it may."""
    if MAY_CHANGE.fullmatch(name):
        return ""
    return next(what for pattern, what in _DECIDES if re.match(pattern, name))
