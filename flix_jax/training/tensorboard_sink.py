"""TensorBoard's events of a run, made of its protocol buffers alone: no TensorFlow is imported."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from etils import epath
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from flix_jax import buckets

_EVERY = 60.0  # seconds between two copies to a bucket, beside those that are asked for
_PART = 1 << 20  # bytes of a file in a bucket, behind which another is begun


class TensorBoardSink:
    """Events in the folder ``tensorboard`` of a run.

    On a local disk they are appended to a file. In a bucket they are files that are written anew as
    a whole until they hold a megabyte, and what was added since the last `flush` or the last minute
    is lost with the process.

    Args:
      run_dir: the run's folder.
      start_step: the step that the run goes on from; what an earlier attempt wrote of later ones is
        dropped by TensorBoard.
      hparams: what its page of hyperparameters shows of the run, by name.
    """

    def __init__(
        self, run_dir: epath.PathLike, start_step: int, hparams: Mapping[str, str | float]
    ) -> None:
        folder = epath.Path(run_dir) / "tensorboard"
        made = _PartsInBucket(folder) if buckets.is_bucket(folder) else EventFileWriter(str(folder))
        self._events: EventFileWriter | _PartsInBucket = made
        restart = SessionLog(status=SessionLog.START)
        self._events.add_event(
            Event(wall_time=time.time(), step=start_step + 1, session_log=restart)
        )
        if hparams:
            summary = _hparams_summary(hparams, group=epath.Path(run_dir).name)
            self._events.add_event(Event(wall_time=time.time(), summary=summary))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values of a step, by name."""
        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.add_event(
            Event(wall_time=time.time(), step=step, summary=Summary(value=found))
        )

    def flush(self) -> None:
        """Puts on disk what was added."""
        self._events.flush()

    def close(self) -> None:
        """Ends the file."""
        self._events.close()


class _PartsInBucket:
    """An `EventFileWriter` for a bucket: of a local folder, whose files are copied as they are."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        self._local = tempfile.TemporaryDirectory(prefix="flix_tensorboard")
        self._part = EventFileWriter(self._local.name)
        self._copied = time.monotonic()

    def add_event(self, event: Event) -> None:
        """Adds an event, and copies what there is once a minute."""
        self._part.add_event(event)
        if time.monotonic() - self._copied > _EVERY:
            self.flush()

    def flush(self) -> None:
        """Copies the part that is written, and begins another where that is large."""
        self._part.flush()
        (path,) = Path(self._local.name).iterdir()
        (self._folder / path.name).write_bytes(path.read_bytes())
        self._copied = time.monotonic()
        if path.stat().st_size > _PART:
            self._part.close()
            path.unlink()
            self._part = EventFileWriter(self._local.name)

    def close(self) -> None:
        """Copies the rest."""
        self.flush()
        self._part.close()
        self._local.cleanup()


def _hparams_summary(hparams: Mapping[str, str | float], group: str) -> Summary:
    """TensorBoard's record of a session's hyperparameters (plugin 'hparams', data version 0)."""
    start = plugin_data_pb2.SessionStartInfo(group_name=group, start_time_secs=time.time())
    for name, value in hparams.items():
        if isinstance(value, str):
            start.hparams[name].string_value = value
        elif isinstance(value, bool):
            start.hparams[name].bool_value = value
        else:
            start.hparams[name].number_value = value
    content = plugin_data_pb2.HParamsPluginData(version=0, session_start_info=start)
    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=content.SerializeToString())
    return Summary(
        value=[
            Summary.Value(
                tag="_hparams_/session_start_info",
                metadata=SummaryMetadata(plugin_data=plugin),
                tensor=TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto()),
            )
        ]
    )
