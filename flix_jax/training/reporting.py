"""What a run says while it runs: the console, ``metrics.jsonl`` and TensorBoard.

Metrics stay on the device until the window that they belong to is over and the next step has been
dispatched, so that reporting never makes a step wait.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flix_jax import processes
from flix_jax.evaluation import files
from flix_jax.preemption import Preempted
from flix_jax.training.not_finite import NotFinite, found_in
from flix_jax.training.tensorboard_sink import TensorBoardSink
from flix_jax.training.wandb_sink import WandbSink


class Reporter:
    """Writes the metrics of a run, averaged over windows of ``log_every`` steps.

    Lines of ``metrics.jsonl`` hold ``step``, ``loss``, ``z_loss``, ``accuracy``, ``grad_norm``
    (means over the window), ``tokens`` (target tokens since the first step),
    ``tokens_per_second``, ``tokens_per_second_per_chip``, ``steps_per_second``, ``data_wait``
    (share of the window's time spent waiting for data), ``mfu`` (model-FLOPs utilisation, where the
    devices' peak is known), ``skipped`` (steps skipped since the first, where they may be; means
    are over the others, and absent where there is none) and ``device_memory`` (the most that a
    device had in use so far, bytes, where it tells); lines of evaluations hold ``step`` and
    ``<cell>/<metric>``. Of several processes, which all have the same metrics, the first alone
    writes and shows them.

    A window ends after ``log_every`` steps, before an evaluation and with the last step. One that a
    checkpoint finds open goes into it (`state`), so that a run that goes on from there writes the
    lines that it would have written without an interruption.

    Args:
      run_dir: the run's folder.
      total_steps: the last step.
      start_step: the step that the run goes on from; lines of later steps are dropped.
      resumed: the `state` that was saved with that step; None if there is none.
      log_every: the window in steps.
      wait_seconds: the time so far in which the loop waited for data.
      devices: how many there are, over all processes.
      utilization: by step, the share of the devices' peak that it would be if it took a second;
        None where that is not known.
      title: what is running, before the progress bar.
      show: whether the console is written to.
      hparams: what TensorBoard's page of hyperparameters shows of the run, by name.
      wandb_project: of Weights & Biases, which gets the same numbers; None does without.
      skips_in_a_row: how many steps in a row may be skipped.
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        *,
        total_steps: int,
        start_step: int,
        log_every: int,
        wait_seconds: Callable[[], float],
        devices: int = 1,
        utilization: Callable[[int], float] | None = None,
        title: str = "train",
        show: bool = True,
        hparams: Mapping[str, str | float] | None = None,
        wandb_project: str | None = None,
        resumed: Mapping[str, Any] | None = None,
        skips_in_a_row: int = 0,
    ) -> None:
        self._path = epath.Path(run_dir) / "metrics.jsonl"
        lines = read_metrics(self._path)
        if resumed is None:
            lines = [line for line in lines if line["step"] <= start_step]
            resumed = {name: _last(name, lines) for name in ("tokens", "skipped")}
        lost = max(0, resumed.get("lines", 0) - len(lines))
        lines = lines[: resumed.get("lines")]
        self._lines = [_as_text(line) for line in lines]  # a fraction of the memory of dicts
        self._sinks: list[TensorBoardSink | WandbSink] = []
        if processes.is_first():
            self._sinks.append(TensorBoardSink(run_dir, start_step, hparams or {}))
            if wandb_project:
                self._sinks.append(WandbSink(run_dir, wandb_project, hparams or {}))
        show = show and processes.is_first()
        self._log_every = log_every
        self._wait_seconds = wait_seconds
        self._devices = devices
        self._utilization = utilization
        self._pending: list[tuple[int, Any]] = [(s, m) for s, m in resumed.get("window", ())]
        self._tokens = resumed["tokens"]
        # Of the windows that are over: how many steps were skipped, and how many of the last ones.
        self._skipped, self._in_a_row = resumed.get("skipped", 0), resumed.get("in_a_row", 0)
        self._skips_in_a_row = skips_in_a_row
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
        if lost:
            self.say(
                f"{title}: {self._path} has lost {lost} of the {resumed['lines']} lines that "
                "it had; it goes on without them"
            )
        self._start_window()
        self._window_start -= resumed.get("seconds", 0.0)
        self._window_wait -= resumed.get("waited", 0.0)
        self._started = (start_step, time.monotonic())

    def step(self, step: int, metrics: Mapping[str, jax.typing.ArrayLike]) -> None:
        """Takes a step's metrics, still on the device."""
        if len(self._pending) >= self._log_every:
            self.flush()
        self._pending.append((step, metrics))
        if self._progress.live.is_started:
            self._progress.update(self._task, completed=step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the step reported last must hold for the lines to go on: json.

        Raises:
          NotFinite: a loss or gradient is not finite, or too many were in a row.
        """
        self.flush(partial=False)
        self._fetch()
        state: dict[str, Any] = {"lines": len(self._lines), "tokens": self._tokens}
        if self._skipped:
            state |= {"skipped": self._skipped, "in_a_row": self._in_a_row}
        if self._pending:
            state["window"] = [[step, metrics] for step, metrics in self._pending]
            state["seconds"] = time.monotonic() - self._window_start
            state["waited"] = self._wait_seconds() - self._window_wait
        return state

    def flush(self, *, partial: bool = True) -> None:
        """Fetches the window's metrics and writes them; without `partial`, if it is full.

        Raises:
          NotFinite: as `state`.
        """
        if not self._pending or (len(self._pending) < self._log_every and not partial):
            return
        in_a_row = self._fetch()
        steps, values = zip(*self._pending, strict=True)
        self._pending = []
        now = time.monotonic()
        seconds = now - self._window_start
        tokens = sum(value["tokens"] for value in values)
        self._tokens += tokens
        made = [value for value in values if not value.get("skipped")]
        means = {
            name: sum(value[name] for value in made) / len(made)
            for name in (made[0] if made else ())
            if name not in ("tokens", "skipped")
        }
        line = {
            "step": steps[-1],
            **means,
            "tokens": self._tokens,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_chip": tokens / seconds / self._devices,
            "steps_per_second": len(steps) / seconds,
            "data_wait": (self._wait_seconds() - self._window_wait) / seconds,
        }
        if "skipped" in values[0]:
            self._skipped += len(values) - len(made)
            self._in_a_row = in_a_row
            line["skipped"] = self._skipped
        if len(made) < len(values):
            numbers = [s for s, value in zip(steps, values, strict=True) if value.get("skipped")]
            self.say(
                f"{self._title}: skipped, for loss or gradient is not finite: "
                f"{', '.join(map(str, numbers))} ({self._skipped} steps so far)"
            )
        if self._utilization is not None:
            line["mfu"] = sum(map(self._utilization, steps)) / seconds
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            line["device_memory"] = memory["peak_bytes_in_use"]
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
        """Puts all lines that were written on disk."""
        self._store()
        for sink in self._sinks:
            sink.flush()

    def close(self, *, partial: bool = True) -> None:
        """Writes what is pending (`partial`: a window that is open, too), and ends the progress."""
        try:
            self.flush(partial=partial)
            self.sync()
        finally:
            self._progress.stop()
            for sink in self._sinks:
                sink.close()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What was saved with a checkpoint is written when the run goes on.
        self.close(partial=kind is None or not issubclass(kind, Preempted))

    def _fetch(self) -> int:
        """Brings the window's metrics to the host, as Python's numbers, and looks at all of them.

        Of a step that was skipped those stay that mean something. Returns how many steps at the end
        of the window were skipped in a row, those of windows before included.
        """
        fetched = jax.device_get([metrics for _, metrics in self._pending])
        steps = [step for step, _ in self._pending]
        self._pending, in_a_row = [], self._in_a_row
        window: list[tuple[int, dict[str, float]]] = []
        for step, found in zip(steps, fetched, strict=True):
            metrics = {name: float(value) for name, value in found.items()}
            problem = found_in(metrics)
            if metrics.get("skipped"):
                in_a_row += 1
                metrics = {name: metrics[name] for name in ("tokens", "skipped")}
                if in_a_row > self._skips_in_a_row:
                    problem = f"{in_a_row} steps in a row are not finite: the last"
                    raise NotFinite(f"{problem} is step {step}", step)
            elif problem is not None:
                raise NotFinite(f"{problem} at step {step}", step)
            else:
                in_a_row = 0
            window.append((step, metrics))
        self._pending = list(window)
        return in_a_row

    def _start_window(self) -> None:
        self._window_start = time.monotonic()
        self._window_wait = self._wait_seconds()

    def _write(self, line: dict[str, Any], prefix: str) -> None:
        self._lines.append(_as_text(line))
        values = {prefix + name: value for name, value in line.items() if name != "step"}
        for sink in self._sinks:
            sink.write(line["step"], values)
        if time.monotonic() - self._written > 10:
            self._store()

    def _store(self) -> None:
        # Whole, since a bucket knows no appending.
        files.write_text(self._path, "".join(self._lines))
        self._written = time.monotonic()

    def _show(self, line: Mapping[str, float]) -> None:
        values = "every step skipped  "
        if "loss" in line:
            values = f"loss {line['loss']:.4f}  accuracy {line['accuracy']:.3f}  "
        values += f"{line['tokens_per_second']:,.0f} tokens/s  waiting {line['data_wait']:.1%}"
        if line.get("skipped"):
            values += f"  skipped {line['skipped']}"
        if "mfu" in line:
            values += f"  MFU {line['mfu']:.1%}"
        if self._progress.live.is_started:
            self._progress.update(self._task, values=values)
            return
        first, then = self._started
        rate = (line["step"] - first) / (time.monotonic() - then)
        left = (self._total - line["step"]) / rate
        self.say(f"{self._title}: step {line['step']}/{self._total}  {values}  {left:.0f} s left")


def _as_text(line: Mapping[str, Any]) -> str:
    return json.dumps(line) + "\n"


def _last(name: str, lines: Sequence[Mapping[str, Any]]) -> Any:
    """What a count has come to."""
    return next((line[name] for line in reversed(lines) if name in line), 0)


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that was cut short is left out.

    Raises:
      ValueError: any other line is not json, or no object with a step; with file and line number.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    values = []
    for number, text in enumerate(lines, 1):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a line of json: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get("step"), int):
            raise ValueError(f"{path}:{number}: {text[:80]}: expected an object with a step")
        values.append(value)
    return values
