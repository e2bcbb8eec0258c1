"""Being asked to stop: what SIGTERM and Ctrl-C do, in every phase of a command.

A thread reads the signals, so that one is seen while the main thread is in a compiler or waits for
devices, where Python's own handlers do not run. Where there is nothing to save, it ends the process
at once. Where there is (`holding`), the work is left to ask at its own points (`reached`) whether
to stop there; it saves, and raises `Preempted`. A process that has not ended when its grace is over
is ended by the thread, and so is one that is asked a second time.

Of several processes all stop at the same point: that after the last one that any of them had passed
when the first of them was asked.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import ModuleType
from typing import NoReturn

#: The exit status of what was asked to stop and can go on (EX_TEMPFAIL: try again).
STATUS = 75
#: That of what a person has interrupted, which nobody is to start again.
INTERRUPTED = 130

GRACE = 25.0  # seconds; Kubernetes and Google Cloud's spot machines give 30

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONCE = 1.0  # seconds in which signals are one, sent to a group and passed on by its first process
_POLL = 0.2

_STOP = "stop"  # in the store that several processes share: the signal
_AT = "stop/{}"  # the points that a process had passed


class Preempted(BaseException):
    """The work has stopped, for it was asked to. No error: `except Exception` lets it pass.

    Attributes:
      status: of the process's exit.
    """

    def __init__(self, saved: str) -> None:
        """`saved` says what was saved, or why nothing was."""
        asked = _watch.asked if _watch is not None else None
        name, self.status = _told(asked or signal.SIGTERM)
        super().__init__(f"{name}: {saved}; the same command goes on from there")


@contextlib.contextmanager
def installed(grace_seconds: float = GRACE, to_the_end: bool = False) -> Iterator[None]:
    """Takes SIGTERM and SIGINT while it is open; outside of the main thread it does nothing.

    Args:
      grace_seconds: after which a process that was asked to stop is ended, whatever it does.
      to_the_end: whether it goes on taking them while the process ends, until what was registered
        with `atexit` within is done. From then on SIGTERM changes nothing: Python takes handlers
        away before it unloads libraries, where the signal would make a failure of what is finished.

    Raises:
      ValueError: a grace that is not above 0.
    """
    global _watch, _phase
    if not grace_seconds > 0:
        raise ValueError(f"--grace_seconds={grace_seconds:g}: expected more than 0")
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch, before = _Watch(grace_seconds), _watch
    fd = signal.set_wakeup_fd(watch.write_to, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    _watch = watch

    def ignore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        watch.close()

    if to_the_end:
        atexit.register(ignore)  # before others are, which run first
    try:
        yield
    finally:
        if to_the_end:
            _phase = "ending"
        else:
            _watch = before
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd)
            watch.close()


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Names what is being done, for the line that a process says when it is ended."""
    global _phase
    before, _phase = _phase, name
    try:
        yield
    finally:
        _phase = before


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """While it is open there is something to save, and a signal waits for `reached`.

    Raises:
      Preempted: at its end, where a signal came too late for any point within.
    """
    watch = _watch
    if watch is None:
        yield
        return
    watch.hold()
    try:
        yield
    except BaseException:
        watch.release()
        raise
    if watch.release():
        raise Preempted("all was saved")


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """While it is open the thread does not end the process: for a few writes that belong together.

    A signal of which nothing is caught (SIGKILL) breaks it all the same.
    """
    watch = _watch
    if watch is None:
        yield
        return
    with watch.writing:
        yield


def reached() -> bool:
    """Whether to stop here; a point that all processes pass, in the same order.

    Costs a lock; to be asked after every step and every batch.
    """
    return _watch is not None and _watch.passes()


def check() -> None:
    """Raises Preempted where `reached`; for work within `holding` whose caller saves."""
    if reached():
        raise Preempted(f"stopped while {_phase}")


class _Watch:
    """The thread, and what it shares with the main one."""

    def __init__(self, grace: float) -> None:
        self.asked: int | None = None  # by which signal
        self.writing = threading.RLock()
        self._grace, self._since = grace, 0.0
        self._held = 0
        self._state = threading.Lock()  # of `asked` and `_held`
        self._points, self._stop_at = 0, float("inf")
        self._passing = threading.Lock()  # of the points; held while processes agree
        self._read_from, self.write_to = os.pipe()
        os.set_blocking(self.write_to, False)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="preemption")
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        os.close(self._read_from)
        os.close(self.write_to)

    def hold(self) -> None:
        with self._state:  # the thread keeps it while it ends the process
            self._held += 1

    def release(self) -> bool:
        """Whether what was held last was asked to stop meanwhile."""
        with self._state:
            self._held -= 1
            return not self._held and self.asked is not None

    def passes(self) -> bool:
        with self._passing:
            self._points += 1
            return self._points >= self._stop_at

    def _run(self) -> None:
        while not self._closed.is_set():
            ready, _, _ = select.select([self._read_from], [], [], _POLL)
            numbers = os.read(self._read_from, 64) if ready else b""
            now = time.monotonic()
            for number in numbers:
                if number not in _SIGNALS:
                    continue
                if self.asked is None:
                    self._ask(number, told=False)
                elif now - self._since > _ONCE:
                    self._end(f"{_told(number)[0]} again while {_phase}: ended without saving more")
            processes = _several()
            if self.asked is None:
                if processes and (told := processes.told(_STOP)) is not None:
                    self._ask(int(told), told=True)
            elif now - self._since > self._grace:
                self._end(
                    f"{_told(self.asked)[0]} while {_phase}: not done within the grace of "
                    f"{self._grace:g} s; the same command goes on from the last checkpoint"
                )

    def _ask(self, number: int, *, told: bool) -> None:
        self._since = time.monotonic()
        with self._state:
            self.asked = number
            if not self._held:
                self._end(
                    f"{_told(number)[0]} while {_phase}: there was nothing to save; the same "
                    "command goes on from there"
                )
        processes = _several()
        if processes is None:
            with self._passing:
                self._stop_at = 0
            return
        if not told:
            processes.tell(_STOP, str(number))
        with self._passing:
            processes.tell(_AT.format(processes.index()), str(self._points))
            passed = [
                processes.wait_told(_AT.format(index), self._grace)
                for index in range(processes.count())
            ]
            if None not in passed:  # else one of them is gone, and the grace ends this one
                self._stop_at = max(int(points) for points in passed if points is not None) + 1

    def _end(self, line: str) -> NoReturn:
        """Ends this process, and tells the others to end."""
        _, status = _told(self.asked or signal.SIGTERM)
        self.writing.acquire(timeout=_ONCE)
        with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h")  # the cursor, which a progress bar hides
            print(line, file=sys.stderr, flush=True)
            sys.stdout.flush()
        processes = _several()
        if processes is not None:
            processes.fail(line, status)
            processes.leave(status)
        os._exit(status)


def _told(number: int) -> tuple[str, int]:
    """How a signal is called, and the status after it."""
    if number == signal.SIGINT:
        return "interrupted", INTERRUPTED
    return f"stopped by {signal.Signals(number).name}", STATUS


def _several() -> ModuleType | None:
    """The module of processes where there are several, which are connected."""
    processes = sys.modules.get("flix_jax.processes")  # which imports JAX
    connected = getattr(processes, "are_connected", None)  # absent while it is imported
    return processes if connected is not None and connected() else None


_watch: _Watch | None = None
_phase = "starting"
