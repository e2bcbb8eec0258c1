"""Batches made ahead of the device that they are for."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from flix_jax.data.pipeline import Batch, TrainPipeline


class PrefetchIterator:
    """Batches from a step on, made and placed by a background thread.

    Args:
      pipeline: where the batches come from.
      step: the first step to deliver.
      depth: how many batches wait at most.
      put: applied to each batch in the thread (say, placement on the devices).

    Attributes:
      wait_seconds: how long the consumer has waited for batches so far.

    An exception in the thread is raised by the `next` that would have delivered the batch. Close
    the iterator, or use it as a context manager, to end the thread.
    """

    def __init__(
        self,
        pipeline: TrainPipeline,
        step: int = 0,
        *,
        depth: int = 2,
        put: Callable[[Batch], Any] | None = None,
    ):
        if depth < 1:
            raise ValueError(f"depth={depth}: expected at least 1 batch")
        self._pipeline = pipeline
        self._depth = depth
        self._put = put
        self.wait_seconds = 0.0
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        self._start(step)

    def __iter__(self) -> PrefetchIterator:
        return self

    def __next__(self) -> Any:
        if self._failure is not None:
            raise self._failure
        if self._thread is None:
            raise ValueError("the iterator is closed")
        started = time.perf_counter()
        batch, failure = self._queue.get()
        self.wait_seconds += time.perf_counter() - started
        if failure is not None:
            self._failure = failure
            raise failure
        self._step += 1
        return batch

    @property
    def step(self) -> int:
        """The step that the next batch belongs to."""
        return self._step

    def state(self) -> dict[str, Any]:
        """The position, and what the sequence depends on, as json."""
        return self._pipeline.position(self._step)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
          ValueError: when the state belongs to another sequence; says what differs.
        """
        self._pipeline.check_state(state)
        self.close()
        self._start(int(state["step"]))

    def close(self) -> None:
        """Ends the thread; batches that were made and not delivered are dropped. Safe to repeat."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            thread.join()

    def __enter__(self) -> PrefetchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, step: int) -> None:
        if step < 0:
            raise ValueError(f"step={step}: expected at least 0")
        self._step = step
        self._failure = None
        self._stop = threading.Event()
        self._queue: queue.Queue = queue.Queue(self._depth)
        # The thread gets its own stop and queue, so that it cannot meet those of a later start.
        thread = threading.Thread(
            target=self._produce, args=(step, self._stop, self._queue), daemon=True, name="prefetch"
        )
        thread.start()
        self._thread = thread

    def _produce(self, step: int, stop: threading.Event, out: queue.Queue) -> None:
        while not stop.is_set():
            item: tuple[Any, Exception | None]
            try:
                batch = self._pipeline.batch_at(step)
                item = (batch if self._put is None else self._put(batch), None)
            except Exception as failure:  # handed to the consumer, which raises it
                item = (None, failure)
            while not stop.is_set():
                try:
                    out.put(item, timeout=0.05)
                    break
                except queue.Full:
                    continue
            if item[1] is not None:
                return
            step += 1
