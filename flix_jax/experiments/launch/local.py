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

from flix_jax.preemption import INTERRUPTED, STATUS

# Seconds in which the others stop by themselves: where one failed, which it tells them, and where
# one was killed, which it could not.
_AFTER_FAILURE, _AFTER_KILL = 15.0, 2.0
_POLL = 0.05

# Signals that ask to stop, and what the processes get. A terminal that closes is no reason to lose
# anything either.
_PASSED_ON: dict[int, int] = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,
}


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
    Where one fails or is killed, the others stop. SIGTERM and Ctrl-C are passed on to all of them,
    which save what there is to save.
    """
    started: list[_Process] = []
    asked: list[int] = []

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        for process in started:
            process.send(_PASSED_ON[number])

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        for index, command in enumerate(commands):
            started.append(_Process(index, command))
            if asked:
                started[-1].send(_PASSED_ON[asked[0]])
                break
        failed = _watch(started, asked)
    finally:
        for process in started:
            process.end()
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed is None or asked or not failed.was_killed:
        for process in started:
            process.show()
    if failed is None and len(started) == len(commands):
        return 0
    if asked and (failed is None or failed.was_killed):  # before it could tell what it does of it
        return INTERRUPTED if asked[0] == signal.SIGINT else STATUS
    assert failed is not None
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
            process_group=0,  # else Ctrl-C would reach it twice
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

    def send(self, number: int) -> None:
        """Sends it a signal."""
        self._process.send_signal(number)

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


def _watch(processes: Sequence[_Process], asked: Sequence[int]) -> _Process | None:
    """Shows what all say until they have ended, or have been given time to.

    Args:
      processes: all of them.
      asked: the signals that were passed on to them.

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
                if failed.was_killed and not asked:
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
