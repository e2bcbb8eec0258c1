"""Which run a folder holds: a run that is started again goes on only as what it was.

run.json          the description of the run
trained_on.json   names of the cells that it and its bases are trained on
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from etils import epath

from flix_jax.data.cells import CellSplit, match, name_some
from flix_jax.evaluation import files
from flix_jax.experiments.run import FREE, RANDOM, Run
from flix_jax.training import checkpoints

TRAINED_ON_FILE = "trained_on.json"


def saved_steps(folder: epath.PathLike) -> frozenset[int]:
    """The steps of a run's checkpoints."""
    return checkpoints.saved_steps(epath.Path(folder) / "checkpoints")


def check_folder(run: Run, run_dir: epath.Path) -> None:
    """Refuses a folder that belongs to another run.

    Raises:
      ValueError: with the values that differ.
    """
    there = files.read_json(run_dir / "run.json")
    if there is not None:
        _compare(run, there, run_dir, FREE)


def check_base_folder(run: Run, base_dir: epath.Path) -> None:
    """Refuses a base whose network is another one than the run's."""
    there = files.read_json(base_dir / "run.json") or {}
    network = {k: v for k, v in there.items() if k.startswith("model.")}
    if network:
        free = re.compile(
            r"(?!model\.).*|model\.(dtype|product_dtype|remat|dropout_rate)=.*", re.DOTALL
        )
        _compare(run, network, base_dir, free)


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
    return set(files.read_json(epath.Path(run.base) / TRAINED_ON_FILE) or ())


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


def _compare(run: Run, there: Mapping[str, str], folder: epath.Path, free: re.Pattern[str]) -> None:
    # A folder may be older than an option: it was made with what is now the default.
    unsaid = run.defaults() - there.keys()
    here = {k: v for k, v in run.describe().items() if k not in unsaid}

    def is_free(name: str) -> bool:
        values = [values[name] for values in (here, there) if name in values]
        return all(free.fullmatch(f"{name}={value}") for value in values)

    changed = sorted(k for k in {*here, *there} if here.get(k) != there.get(k) and not is_free(k))
    if changed:
        values = "; ".join(
            f"{k} is {there.get(k, 'absent')} there and {here.get(k, 'absent')} here"
            for k in changed[:5]
        )
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ValueError(f"{folder} holds another run: {values}{more}; use another run_dir")
