"""Hears where each task on a Dask cluster begins, and which are done."""

from __future__ import annotations

import contextlib
import queue
import time
import uuid
from dataclasses import dataclass
from typing import Any

from gpuprep.executors.dask_worker import distributed_module


@dataclass(slots=True, eq=False)
class Flight:
    """A task on its way."""

    task: Any
    payload: bytes
    future: Any = None
    begins: int = 0
    """How often a worker has begun it."""
    worker: str = ""
    pid: int = 0
    """The last of them, and its process."""
    begun_s: float | None = None


class News:
    """What is heard of the tasks of one run: where each begins, and which futures are done."""

    def __init__(self, client: Any, flying: dict[int, Flight]) -> None:
        self.name = f"gpuprep-{uuid.uuid4().hex}"
        self._client = client
        self._flying = flying
        self._queue: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._stop = distributed_module().Event(self.name, client=client)
        client.subscribe_topic(self.name, self._begun)

    def _begun(self, event: tuple[float, tuple[int, str, int]]) -> None:
        """Note at once who is busy with what, whether or not anybody waits for outcomes; in a thread of Dask."""
        ticket, worker, pid = event[1]
        flight = self._flying.get(ticket)
        if flight is not None:
            flight.worker, flight.pid, flight.begun_s = worker, pid, time.monotonic()
            flight.begins += 1

    def expect(self, ticket: int, future: Any) -> None:
        future.add_done_callback(lambda done: self._queue.put((ticket, done)))

    def next(self, timeout_s: float) -> tuple[int, Any]:
        """Return the next future that is done, with its ticket; (-1, None) if there is none for some time."""
        try:
            return self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return -1, None

    def is_empty(self) -> bool:
        return self._queue.empty()

    def stop_begins(self) -> None:
        """Have workers give back what they have not begun."""
        self._stop.set()

    def close(self) -> None:
        with contextlib.suppress(*LOST):
            if self._client.status == "running":
                self._client.unsubscribe_topic(self.name)
                self._stop.clear()


LOST = (OSError, RuntimeError, AttributeError)
"""What calls of a client raise when its scheduler has gone, or it is closed: CommClosedError is an OSError."""
