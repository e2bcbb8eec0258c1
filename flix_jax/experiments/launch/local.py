"""Several processes of one command on this machine, as a small pod."""

from __future__ import annotations

import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

# Seconds in which the others stop by themselves: where one failed, which it tells them, and where
# one was killed, which it could not.
_AFTER_FAILURE, _AFTER_KILL = 15.0, 2.0
_POLL = 0.05


def commands(
    arguments: Sequence[str], processes: int, devices_per_process: int | None = None
) -> list[list[str]]:
    """The commands of several processes, which find each other on a free port.

    Args:
      arguments: of `flix`, such as ``['train', '--gin_file=run.gin', '--run_dir=runs/a']``; a
        command that takes ``--coordinator``.
      processes: how many.
      devices_per_process: virtual CPU devices of each; None leaves each what it finds.

    Raises:
      ValueError: numbers below 1.
    """
    if processes < 1:
        raise ValueError(f"--local_processes={processes}: expected at least 1")
    if devices_per_process is not None and devices_per_process < 1:
        raise ValueError(f"--devices_per_process={devices_per_process}: expected at least 1")
    command = [sys.executable, "-m", "flix_jax.cli", *arguments]
    command += [f"--coordinator=127.0.0.1:{_free_port()}", f"--processes={processes}"]
    if devices_per_process is not None:
        devices = ("JAX_PLATFORMS=cpu", f"JAX_NUM_CPU_DEVICES={devices_per_process}")
        command = ["env", *devices, *command]
    return [[*command, f"--process={index}"] for index in range(processes)]


def run(commands: Sequence[Sequence[str]]) -> int:
    """Runs the commands at once and returns the exit status of the first that fails, or 0.

    What the first one says is shown as it is, what the others say with their number before it.
    Where one fails or is killed, the others stop.
    """
    started: list[_Process] = []
    # As by Ctrl-C, which reaches all of them: none is left behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for index, command in enumerate(commands):
            started.append(_Process(index, command))
        failed = _watch(started)
    finally:
        for process in started:
            process.end()
        signal.signal(signal.SIGTERM, before)
    if failed is None or not failed.was_killed:
        for process in started:
            process.show()
    if failed is None:
        return 0
    return 128 - failed.status if failed.was_killed else failed.status


class _Process:
    """One of the processes, and what it says."""

    def __init__(self, index: int, command: Sequence[str]) -> None:
        self.index = index
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if index else None,  # the first shows its progress there
            text=True,
            errors="replace",
        )
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    @property
    def status(self) -> int:
        """As subprocess gives it, negative where a signal has killed it; 0 while it runs."""
        return self._process.poll() or 0

    @property
    def was_killed(self) -> bool:
        return self.status < 0

    def show(self) -> None:
        """Shows what it has said since."""
        while not self._said.empty():
            line = self._said.get()
            print(f"[{self.index}] {line}" if self.index else line, end="", flush=True)

    def end(self) -> None:
        """Kills it where it still runs, and reads what it said last."""
        self._process.kill()
        self._process.wait()
        self._reader.join(timeout=1)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("[Gloo]"):  # which tells of every connection that it makes
                self._said.put(line)


def _watch(processes: Sequence[_Process]) -> _Process | None:
    """Shows what all say until they have ended, or have been given time to.

    Returns:
      The one that failed first, None where none did.
    """
    failed: _Process | None = None
    end = float("inf")
    while any(process.runs for process in processes) and time.monotonic() < end:
        if failed is None:
            failed = next((process for process in processes if process.status), None)
            if failed is not None:
                end = time.monotonic() + (_AFTER_KILL if failed.was_killed else _AFTER_FAILURE)
                if failed.was_killed:
                    name = signal.Signals(-failed.status).name
                    print(f"process {failed.index} was killed by {name}", file=sys.stderr)
        if failed is None or not failed.was_killed:  # else the rest is about the one that is gone
            for process in processes:
                process.show()
        time.sleep(_POLL)
    return failed or next((process for process in processes if process.status), None)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
