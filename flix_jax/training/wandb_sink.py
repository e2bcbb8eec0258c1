"""Weights & Biases beside TensorBoard, where a run asks for it.

W&B itself says where it writes: `WANDB_MODE=offline` keeps everything in the run's folder, to be
sent later with `wandb sync`.
"""

from __future__ import annotations

import importlib
import importlib.util
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from flix_jax import buckets
from flix_jax.evaluation import files

ID_FILE = "wandb_id.txt"  # in the run's folder: a run that goes on is one W&B run


def check_installed(project: str | None) -> None:
    """ValueError where W&B is asked for and not there."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"Run.wandb_project={project!r}: wandb is not installed; pip install wandb (or the "
            "extra 'wandb' of flix_jax)"
        )


class WandbSink:
    """One W&B run, named after the run's folder.

    Args:
      run_dir: the run's folder.
      project: of W&B.
      hparams: its config.
    """

    def __init__(
        self, run_dir: epath.PathLike, project: str, hparams: Mapping[str, str | float]
    ) -> None:
        wandb: Any = importlib.import_module("wandb")
        folder = epath.Path(run_dir)
        place = folder / ID_FILE
        if not place.exists():
            files.write_text(place, uuid.uuid4().hex[:8] + "\n")
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=place.read_text().strip(),
            resume="allow",
            config=dict(hparams),
            dir=None if buckets.is_bucket(folder) else str(folder),  # its own files are local
            reinit="create_new",
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs values of a step, by name."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """W&B sends in its own time."""

    def close(self) -> None:
        """Ends the W&B run."""
        self._run.finish()
