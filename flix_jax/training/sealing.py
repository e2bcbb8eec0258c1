"""How orbax names a checkpoint when all of it is written, and what is written just before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

# Files that orbax writes when it commits a checkpoint.
_METADATA = "_CHECKPOINT_METADATA"
_COMMITTED = "commit_success.txt"


def sealed(
    directory: epath.Path, seal: Callable[[epath.Path, Mapping[str, bytes]], None]
) -> type[Any]:
    """Orbax's class of paths that are not whole yet, for the checkpoints of a directory.

    Args:
      directory: local or in a bucket, where a file in it stands for a checkpoint's name.
      seal: is called with the folder of a checkpoint and with the contents, by path in the folder,
        of files that come after it.
    """
    base: Any = ocp.path.atomicity_defaults.get_default_temporary_path_class(directory)

    class Sealed(base):
        _checkpoint_metadata_store: Any

        async def finalize(self) -> None:
            if self.get_final().parent != directory:  # a part of a checkpoint
                return await super().finalize()
            store, self._checkpoint_metadata_store = self._checkpoint_metadata_store, None
            if store is not None:  # its last change would come behind the seal
                store.wait_until_finished()
                store.update(
                    file_path=self.get() / _METADATA, commit_timestamp_nsecs=time.time_ns()
                )
                store.wait_until_finished()
            told = f"Checkpoint commit was successful to {self.get_final()}"
            seal(self.get(), {_COMMITTED: told.encode()})
            return await super().finalize()

    return Sealed
