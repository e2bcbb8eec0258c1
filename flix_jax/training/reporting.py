"""What a run says while it runs: the console, ``metrics.jsonl`` and TensorBoard.

Metrics stay on the device until the window that they belong to is over and the next step has been
dispatched, so that reporting never makes a step wait.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from flix_jax.evaluation import files
from flix_jax.training.wandb_sink import WandbSink


class Reporter:
    """Writes the metrics of a run, averaged over windows of ``log_every`` steps.

    Lines of ``metrics.jsonl`` hold ``step``, ``loss``, ``z_loss``, ``accuracy``, ``grad_norm``
    (means over the window), ``tokens`` (target tokens since the start of this process),
    ``tokens_per_second``, ``steps_per_second`` and ``data_wait`` (share of the window's time spent
    waiting for data); lines of evaluations hold ``step`` and ``<cell>/<metric>``.

    Args:
      run_dir: the run's folder.
      total_steps: the last step.
      start_step: the step that the run goes on from; lines of later steps are dropped.
      log_every: the window in steps.
      wait_seconds: the time so far in which the loop waited for data.
      title: what is running, before the progress bar.
      show: whether the console is written to.
      hparams: what TensorBoard's page of hyperparameters shows of the run, by name.
      wandb_project: of Weights & Biases, which gets the same numbers; None does without.
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        *,
        total_steps: int,
        start_step: int,
        log_every: int,
        wait_seconds: Callable[[], float],
        title: str = "train",
        show: bool = True,
        hparams: Mapping[str, str | float] | None = None,
        wandb_project: str | None = None,
    ) -> None:
        self._path = epath.Path(run_dir) / "metrics.jsonl"
        self._lines = [x for x in read_metrics(self._path) if x["step"] <= start_step]
        self._events = EventFileWriter(str(epath.Path(run_dir) / "tensorboard"))
        # TensorBoard drops what an earlier attempt wrote of the steps that come again.
        restart = SessionLog(status=SessionLog.START)
        self._events.add_event(
            Event(wall_time=time.time(), step=start_step + 1, session_log=restart)
        )
        if hparams:
            summary = _hparams_summary(hparams, group=epath.Path(run_dir).name)
            self._events.add_event(Event(wall_time=time.time(), summary=summary))
        first = jax.process_index() == 0  # several processes are one W&B run
        self._wandb = None
        if wandb_project and first:
            self._wandb = WandbSink(run_dir, wandb_project, hparams or {})
        self._log_every = log_every
        self._wait_seconds = wait_seconds
        self._pending: list[tuple[int, Any]] = []
        self._tokens = 0.0
        self._written = 0.0
        self._total = total_steps
        self._title = title
        self._console = Console(stderr=True, quiet=not show)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self._console,
            disable=not (show and self._console.is_terminal),
        )
        self._task = self._progress.add_task(
            title, total=total_steps, completed=start_step, values="compiling"
        )
        self._progress.start()
        self._start_window()
        self._started = (start_step, time.monotonic())

    def step(self, step: int, metrics: Mapping[str, jax.typing.ArrayLike]) -> None:
        """Takes a step's metrics, still on the device."""
        if len(self._pending) >= self._log_every:
            self.flush()
        self._pending.append((step, metrics))
        if self._progress.live.is_started:
            self._progress.update(self._task, completed=step)

    def flush(self) -> None:
        """Fetches the window's metrics and writes them.

        Raises:
          FloatingPointError: a loss is not finite, with its step.
        """
        if not self._pending:
            return
        steps, values = zip(*self._pending, strict=True)
        self._pending = []
        values = jax.device_get(values)
        for step, value in zip(steps, values, strict=True):
            if not math.isfinite(value["loss"]):
                raise FloatingPointError(f"the loss is {value['loss']} at step {step}")
        now = time.monotonic()
        seconds = now - self._window_start
        tokens = float(sum(value.pop("tokens") for value in values))
        self._tokens += tokens
        line = {
            "step": steps[-1],
            **{k: float(sum(v[k] for v in values) / len(values)) for k in values[0]},
            "tokens": self._tokens,
            "tokens_per_second": tokens / seconds,
            "steps_per_second": len(steps) / seconds,
            "data_wait": (self._wait_seconds() - self._window_wait) / seconds,
        }
        self._write(line, prefix="train/")
        self._show(line)
        self._start_window()

    def scores(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Writes the scores of an evaluation, one entry per cell and metric."""
        self.flush()
        flat = {f"{cell}/{name}": float(v) for cell, s in scores.items() for name, v in s.items()}
        self._write({"step": step, **flat}, prefix="evaluation/")
        self._start_window()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def sync(self) -> None:
        """Puts all that was reported on disk."""
        self.flush()
        self._store()
        self._events.flush()

    def close(self) -> None:
        """Writes what is pending and gives the console back."""
        try:
            self.sync()
        finally:
            self._progress.stop()
            self._events.close()
            if self._wandb:
                self._wandb.close()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_window(self) -> None:
        self._window_start = time.monotonic()
        self._window_wait = self._wait_seconds()

    def _write(self, line: dict[str, Any], prefix: str) -> None:
        self._lines.append(line)
        values = [
            Summary.Value(tag=prefix + k, simple_value=v) for k, v in line.items() if k != "step"
        ]
        self._events.add_event(
            Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values))
        )
        if self._wandb:
            self._wandb.write(line["step"], {value.tag: value.simple_value for value in values})
        if time.monotonic() - self._written > 10:
            self._store()

    def _store(self) -> None:
        # Whole, since a bucket knows no appending.
        files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))
        self._written = time.monotonic()

    def _show(self, line: Mapping[str, float]) -> None:
        values = (
            f"loss {line['loss']:.4f}  accuracy {line['accuracy']:.3f}  "
            f"{line['tokens_per_second']:,.0f} tokens/s  waiting {line['data_wait']:.1%}"
        )
        if self._progress.live.is_started:
            self._progress.update(self._task, values=values)
            return
        first, then = self._started
        rate = (line["step"] - first) / (time.monotonic() - then)
        left = (self._total - line["step"]) / rate
        self.say(f"{self._title}: step {line['step']}/{self._total}  {values}  {left:.0f} s left")


def _hparams_summary(hparams: Mapping[str, str | float], group: str) -> Summary:
    """TensorBoard's record of a session's hyperparameters (plugin 'hparams', data version 0).

    Made of the protocol buffers alone: the helpers around them import TensorFlow.
    """
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


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that was cut short is left out.

    Raises:
      ValueError: any other line is not json, with file and line number.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    values = []
    for number, text in enumerate(lines, 1):
        try:
            values.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a line of json: {error}") from None
    return values
