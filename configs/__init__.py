"""The configs that come with flix_jax, and how a file is found: one's own first, then these."""

import os
from pathlib import Path

from etils import epath

from flix_jax.adapters.suggest import did_you_mean

FOLDER = Path(__file__).parent


def find_config(name: str) -> epath.Path:
    """The file `name`: a path, in the working directory or a bucket, or one of the packaged files.

    'configs/models/x.gin' and 'models/x.gin' both find a packaged file.

    Raises:
      ValueError: there is none; names the nearest packaged file of the same kind.
    """
    for candidate in map(epath.Path, (name, FOLDER.parent / name, FOLDER / name)):
        if candidate.is_file():
            return candidate
    suffix = Path(name).suffix or ".gin"
    known = [f"configs/{path.relative_to(FOLDER)}" for path in sorted(FOLDER.rglob(f"*{suffix}"))]
    raise ValueError(
        f"no {suffix[1:]} file '{name}' in {os.getcwd()} or among the packaged configs; "
        f"{did_you_mean(name, known)}"
    )
