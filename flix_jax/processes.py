"""Several processes of one program: how they start, agree and stop together.

Each holds some of the devices and runs the same commands in the same order. The first of them
writes what a run's folder holds beside its checkpoints, and says what there is to say. One that
fails tells the others why, through JAX's coordination service, and they stop.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax

AUTO = "auto"  # the coordinator that JAX finds itself: on TPU VMs, GKE and SLURM

_FAILURE = "flix_jax/failure"
_PATIENCE = 5.0  # seconds that the coordinator waits for the others to read why all stop
_POLL = 0.2
_FOREVER = 10**9  # milliseconds

_values = 0  # that `from_first` has given
_connected = False  # JAX ends a process that asks its store for something before that


class Failure(NamedTuple):
    """Why all stop: which process failed first, what it said, and its exit status."""

    process: int
    message: str
    status: int


def start(coordinator: str | None, count: int | None = None, index: int | None = None) -> None:
    """Joins the other processes; to be called before anything asks for devices.

    Args:
      coordinator: ``host:port`` of the first process, or 'auto' for what the environment tells (of
        Cloud TPU VMs, GKE, SLURM, Open MPI; JAX's own detection). None starts nothing, unless the
        environment lists several workers of a TPU slice: then it is 'auto'.
      count, index: how many processes there are and which this is; not with 'auto'.

    Raises:
      ValueError: the three do not go together, or 'auto' finds nothing.
      ConnectionError: the others did not come.
    """
    if coordinator is None and _lists_workers(os.environ):
        coordinator = AUTO
    if coordinator is None:
        if (count, index) != (None, None):
            raise ValueError("--processes and --process go with --coordinator=HOST:PORT")
        return
    if coordinator == AUTO:
        if (count, index) != (None, None):
            raise ValueError("--coordinator=auto finds --processes and --process itself")
    elif count is None or index is None:
        raise ValueError(f"--coordinator={coordinator} needs --processes and --process")
    elif not 0 <= index < count:
        raise ValueError(f"--process={index}: expected 0 to {count - 1}, for --processes={count}")
    elif not coordinator.rpartition(":")[2].isdecimal() or ":" not in coordinator:
        raise ValueError(f"--coordinator={coordinator!r}: expected HOST:PORT, or auto")
    # Of CPU devices in several processes; others have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It takes SIGTERM, and knows of nothing else; `preemption` does more with it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if coordinator == AUTO:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(
                coordinator, count, index, cluster_detection_method="deactivate"
            )
    except ValueError as error:
        raise ValueError(
            f"--coordinator={coordinator}: no cluster found, on which JAX knows its processes "
            f"({error})"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        raise ConnectionError(f"--coordinator={coordinator}: {first}") from None
    global _connected
    _connected = True
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(done,), daemon=True, name="other processes")
    watch.start()

    def end_watch() -> None:
        global _connected
        _connected = False
        done.set()
        watch.join()

    atexit.register(end_watch)  # before JAX's own, which takes the coordination away


def _lists_workers(environment: Mapping[str, str]) -> bool:
    """Whether there is a TPU slice of several hosts, or several slices."""
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1


def count() -> int:
    """How many processes there are."""
    return _state().num_processes or 1


def index() -> int:
    """Which of them this is, from 0."""
    return _state().process_id or 0


def are_connected() -> bool:
    """Whether there are several processes, and they have met."""
    return _connected and count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return index() == 0


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` gives in the first process, as json, in all of them.

    For what is read from a folder and decides what is done next: processes that read at different
    times might see different things.
    """
    global _values
    if count() == 1:
        return make()
    _values += 1
    key = f"flix_jax/values/{_values}"
    if is_first():
        _state().client.key_value_set(key, json.dumps(make()))
    return json.loads(_state().client.blocking_key_value_get(key, _FOREVER))


def wait_for_first() -> None:
    """Returns once the first process has come here."""
    from_first(lambda: None)


def tell(name: str, text: str) -> None:
    """Leaves a text for all processes; the first of a name stands."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _state().client.key_value_set(f"flix_jax/{name}", text)


def told(name: str) -> str | None:
    """What a process has left under a name; None if there is nothing."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return str(_state().client.key_value_try_get(f"flix_jax/{name}"))
    return None


def wait_told(name: str, seconds: float) -> str | None:
    """`told`, for which it waits; None if it does not come."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        milliseconds = int(1000 * seconds)
        return str(_state().client.blocking_key_value_get(f"flix_jax/{name}", milliseconds))
    return None


def fail(message: str, status: int) -> Failure:
    """Tells all processes why they stop; gives the failure that was told first."""
    mine = Failure(index(), message, status)
    # It is there already where another failed before.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _state().client.key_value_set(_FAILURE, json.dumps(mine))
    return _told() or mine


def cause(patience: float = 2.0) -> Failure | None:
    """What another process told of its failure, for which this one waits a little."""
    end = time.monotonic() + patience
    while (told := _told()) is None and time.monotonic() < end:
        time.sleep(_POLL)
    return told


def leave(status: int) -> NoReturn:
    """Ends this process after a failure: at once, for at exit it would wait for the others."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it may be gone
            stream.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _state().client.key_value_set(f"flix_jax/left/{index()}", "")
        if is_first():  # with it goes the place where the others read why
            end = time.monotonic() + _PATIENCE
            while len(_state().client.key_value_dir_get("flix_jax/left/")) < count():
                if time.monotonic() > end:
                    break
                time.sleep(_POLL)
    os._exit(status)


def _watch(done: threading.Event) -> None:
    while not done.wait(_POLL):
        told = _told()
        if told is not None and told.process != index():
            try:
                print(f"process {told.process}: {told.message}", file=sys.stderr)
            finally:
                leave(told.status)


def _told() -> Failure | None:
    try:
        return Failure(*json.loads(_state().client.key_value_try_get(_FAILURE)))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        reason = str(error).splitlines()[0]
        return Failure(0, f"the first process, which coordinates, is gone: {reason}", 1)


def _state() -> Any:
    # JAX has no public way to its key-value store, and its public way to the number of a process
    # starts the devices.
    from jax._src import distributed

    return distributed.global_state
