"""TensorBoard's events of a run, made of its protocol buffers alone: no TensorFlow is imported."""

from __future__ import annotations

import time
from collections.abc import Mapping

from etils import epath
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoardSink:
    """Events in the folder ``tensorboard`` of a run.

    Args:
      run_dir: the run's folder.
      start_step: the step that the run goes on from; what an earlier attempt wrote of later ones is
        dropped by TensorBoard.
      hparams: what its page of hyperparameters shows of the run, by name.
    """

    def __init__(
        self, run_dir: epath.PathLike, start_step: int, hparams: Mapping[str, str | float]
    ) -> None:
        self._events = EventFileWriter(str(epath.Path(run_dir) / "tensorboard"))
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
