"""Receives events of tasks on a Dask cluster: where each task starts, and which tasks are done."""

from __future__ import annotations

import contextlib
import queue
import time
import uuid
from dataclasses import dataclass
from typing import Any

from gpuprep.executors.dask_worker import distributed_module


@dataclass(slots=True, eq=False)
class TaskInFlight:
    """A submitted task."""

    task: Any
    payload: bytes
    """The pickled function and task."""
    future: Any = None
    """Dask's future of the last submission."""
    starts: int = 0
    """Number of times that a worker started it."""
    worker: str = ""
    """Address of the last worker that started it."""
    pid: int = 0
    """Process of that worker."""
    started_s: float | None = None
    """Monotonic time of the last start; None if it is not running."""


class TaskEvents:
    """Events of the tasks of one run: starts, which update `in_flight`, and futures that are done."""

    def __init__(self, client: Any, in_flight: dict[int, TaskInFlight]) -> None:
        self.name = f"gpuprep-{uuid.uuid4().hex}"
        self._client = client
        self._in_flight = in_flight
        self._queue: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._stop = distributed_module().Event(self.name, client=client)
        client.subscribe_topic(self.name, self._on_start)

    def _on_start(self, event: tuple[float, tuple[int, str, int]]) -> None:
        """Record the start of a task; called at once in a thread of Dask, even while no outcome is awaited."""
        ticket, worker, pid = event[1]
        flight = self._in_flight.get(ticket)
        if flight is not None:
            flight.worker, flight.pid, flight.started_s = worker, pid, time.monotonic()
            flight.starts += 1

    def expect(self, ticket: int, future: Any) -> None:
        """Add a future to those that `next` returns when done."""
        future.add_done_callback(lambda done: self._queue.put((ticket, done)))

    def next(self, timeout_s: float) -> tuple[int, Any]:
        """Return the next future that is done, with its ticket; (-1, None) after the timeout."""
        try:
            return self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return -1, None

    def is_empty(self) -> bool:
        return self._queue.empty()

    def prevent_starts(self) -> None:
        """Make workers return tasks that they have not started."""
        self._stop.set()

    def close(self) -> None:
        with contextlib.suppress(*LOST_ERRORS):
            if self._client.status == "running":
                self._client.unsubscribe_topic(self.name)
                self._stop.clear()


LOST_ERRORS = (OSError, RuntimeError, AttributeError)
"""Errors of calls of a client that is closed or has lost its scheduler; CommClosedError is an OSError."""
