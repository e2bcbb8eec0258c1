"""The base of a run: where it is, what must agree before it is read, and how it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from flix_jax.adapters.suggest import nearest_path
from flix_jax.data import cells as cells_lib
from flix_jax.evaluation import files
from flix_jax.experiments.run import RANDOM, Run
from flix_jax.experiments.run_folder import check_base_folder, saved_steps
from flix_jax.interop import bases
from flix_jax.mistakes import Mistake
from flix_jax.training.checkpoints import Checkpoints

if TYPE_CHECKING:
    from flix_jax.experiments.job import Job

#: What the checkpoints of a run say it trained, where that is the whole network.
WHOLE = "every parameter"


def find(run: Run, bases_dir: epath.Path) -> epath.Path | None:
    """The folder or checkpoint of a run's base; None for random parameters.

    Args:
      run: whose base.
      bases_dir: where bases that are runs are trained.
    """
    if isinstance(run.base, Run):
        return bases_dir / run.base.fingerprint()
    return None if run.base == RANDOM else epath.Path(run.base)


def check(run: Run, base_dir: epath.Path | None) -> str:
    """Compares names, shapes and records of a base with a run; reads no parameters.

    A base that is a run is checked where it is trained.

    Returns:
      What the base is, for a table.

    Raises:
      ValueError: there is no base, it is damaged, or it is not of the run's network.
    """
    if base_dir is None:
        return f"random parameters, seed {run.seed}"
    if isinstance(run.base, Run):
        there = run.base.total_steps in saved_steps(base_dir)
        return f"a run of {run.base.total_steps} steps, {'finished' if there else 'trained first'}"
    kind = bases.kind(base_dir)
    if kind is not None:
        leaves = bases.read(base_dir, run.model)
        return f"{kind}, {sum(leaf.nbytes for leaf in leaves.values()) / 2**20:,.1f} MiB"
    return _check_run_folder(run, base_dir)


def _check_run_folder(run: Run, base_dir: epath.Path) -> str:
    if not (base_dir / "checkpoints").exists():
        near = "" if base_dir.exists() else nearest_path(str(base_dir))
        raise Mistake(
            f"{base_dir} holds no trained run, no network of Hugging Face's (config.json) "
            f"and no checkpoint of T5X's{near}",
            ["Run.base"],
        )
    check_base_folder(run, base_dir)
    there = files.read_object(base_dir / "run.json") or {}
    partly = [name for name in ("adapters", "trainable") if there.get(name, "None") != "None"]
    if partly or any(name.startswith("adapters.") for name in there):
        raise Mistake(
            f"{base_dir} holds a run that trained {'a part' if partly else 'adapters'} alone: "
            "expected one that trained every parameter (flix export --format=huggingface writes "
            "its network with one set of features folded in)",
            ["Run.base"],
        )
    steps = saved_steps(base_dir)
    if not steps:
        raise Mistake(f"{base_dir}: the run there has no checkpoint yet", ["Run.base"])
    return f"a run, step {max(steps)}"


def check_folds(base: Run) -> None:
    """Refuses a base whose adapters change the network from example to example."""
    if base.adapters is None:
        return
    cells = base.split().train
    space = base.adapters.space.complete(cells_lib.columns(cells))
    sets = {space.encode(cell.annotations()).tobytes() for cell in cells}
    if len(sets) > 1:
        raise ValueError(
            f"Run.base has adapters that its {len(cells)} cells use in {len(sets)} ways, of "
            "which one alone can be folded: expected one LoRA for all "
            "(configs/adapters/lora.gin), or Run.adapters = None"
        )


def load(job: Job) -> Any | None:
    """The parameters of a job's base, whole; None for random ones.

    Of a run's folder they are its newest checkpoint; a run that trains adapters has them folded
    into its own base; a folder of Hugging Face's or a checkpoint of T5X's is read into this
    run's network, in the dtype that frozen parameters have.

    Raises:
      ValueError: the base's folder holds no network like this one.
    """
    run, base_dir = job.run, job.base_dir
    if base_dir is None:
        return None
    template = job.parameters.base_template
    if not isinstance(run.base, Run) and bases.kind(base_dir) is not None:
        if run.adapters is not None:
            template = job.frozen_template
        return bases.load_parameters(base_dir, run.model, template)
    if not isinstance(run.base, Run):
        _check_run_folder(run, base_dir)
    if isinstance(run.base, Run) and not run.base.trains_everything:
        return _folded(job, run.base, template)
    whole = {"trained": WHOLE, "vocabulary": run.vocabulary.digest}
    step = run.base.total_steps if isinstance(run.base, Run) else None
    with Checkpoints(base_dir / "checkpoints", whole, create=False) as checkpoints:
        base, _ = checkpoints.restore_trained(template, step)
    return base


def _folded(job: Job, base: Run, template: Any) -> Any:
    """The parameters of a base that trained one LoRA: that is folded into its own base."""
    of_base = job.of_base(base, job.mesh)
    below = load(of_base)
    shapes, _ = of_base.parameters.templates
    with of_base.checkpoints(below, create=False) as checkpoints:
        trained, _ = checkpoints.restore_trained(shapes, base.total_steps)
    frozen = of_base.frozen_parameters(below)
    folded = of_base.folded(trained, frozen, of_base.split.train[0].annotations())
    return jax.tree.map(lambda leaf, of: jax.device_put(leaf, of.sharding), folded, template)
