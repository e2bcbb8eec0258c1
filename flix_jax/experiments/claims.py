"""Claims: which worker trains which trial or base, by files in a shared folder.

A worker writes a file of its own into the run's folder of claims, then lists that folder. If it
finds its own alone, the run is its; if it finds another's, it takes its own back. Of two that
come at the same time at least one sees the other, so that a run never has two. That needs a
listing that shows what was written before it, as local disks and buckets have (and NFS, if it does
not cache folders), and neither renaming nor exclusive creation.

A claim is kept alive by writing it anew. One that has not been for `EXPIRES` seconds, or whose
process is gone from this machine, has expired.
"""

import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable

from etils import epath

from flix_jax.evaluation import files

EXPIRES = 300.0  # seconds; clocks of workers must agree to a good part of it


class Claims:
    """The claims of one worker; use as a context manager, which gives all of them back."""

    def __init__(self, *, expires: float = EXPIRES) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._expires = expires
        self._held: set[epath.Path] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="claims")

    def take(self, folder: epath.PathLike) -> bool:
        """Whether the run of this folder is now this worker's."""
        place = epath.Path(folder) / "claims"
        own = place / f"{self.name}.json"
        with self._lock:
            self._write(own)
            if self._others(place):
                own.unlink(missing_ok=True)
                return False
            self._held.add(own)
        return True

    def wait_for(
        self, folder: epath.PathLike, *, poll: float = 2.0, say: Callable[[str], None] = print
    ) -> None:
        """Takes a folder as soon as no other worker has it; `say` is told of who has."""
        told = None
        while not self.take(folder):
            holder = self.holder(folder)
            if holder not in (None, told):
                say(f"{folder}: waiting for {holder}")
                told = holder
            time.sleep(poll * random.uniform(0.5, 1.0))  # two that come at once part

    def give_back(self, folder: epath.PathLike) -> None:
        """Frees a run."""
        own = epath.Path(folder) / "claims" / f"{self.name}.json"
        with self._lock:
            self._held.discard(own)
            own.unlink(missing_ok=True)

    def holder(self, folder: epath.PathLike) -> str | None:
        """The worker that has the run of this folder, None if it is free."""
        return next(iter(self._others(epath.Path(folder) / "claims")), None)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with self._lock:
            for own in self._held:
                own.unlink(missing_ok=True)
            self._held.clear()

    def _write(self, path: epath.Path) -> None:
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process_start(os.getpid()),
            "time": time.time(),
        }
        files.write_text(path, json.dumps(record) + "\n")

    def _beat(self) -> None:
        while not self._stop.wait(self._expires / 5):
            with self._lock:
                for own in self._held:
                    self._write(own)

    def _others(self, place: epath.Path) -> Iterable[str]:
        """Names of the other workers with a claim that has not expired; expired ones go."""
        try:
            paths = list(place.iterdir())
        except FileNotFoundError:  # in a bucket a folder is gone with the last claim in it
            return []
        found = []
        for path in paths:
            if path.name.startswith(".") or path.stem == self.name:
                continue
            try:
                record = json.loads(path.read_text())
            except (FileNotFoundError, ValueError):  # given back just now, or not a claim
                continue
            if self._expired(record):
                path.unlink(missing_ok=True)
            else:
                found.append(path.stem)
        return sorted(found)

    def _expired(self, record: dict) -> bool:
        if time.time() - record["time"] > self._expires:
            return True
        here = record["host"] == socket.gethostname()
        return here and _process_start(record["pid"]) != record["process"]


def _process_start(pid: int) -> str | None:
    """When a process of this machine began, None if it is gone, '' where that cannot be told."""
    if not os.path.isdir("/proc/self"):
        return ""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # Behind the name, in brackets, that may hold spaces: state is field 3, start field 22.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
