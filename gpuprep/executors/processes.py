"""Runs one function over many tasks, in this process or in worker processes.

Each executor has ``run(function, tasks)``, which yields ``(task, outcome)`` as tasks finish, with at most one task in
flight per worker. The outcome is the function's result, or a `WorkerDiedError`. `stop` ends all workers. The third
executor is in `gpuprep.executors.dask`.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_connections
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from gpuprep.errors import BackendError, GpuprepError
from gpuprep.executors.fork_server import HAVE_FORK_SERVER, VOLUME_MODULES, starting_process

MAX_WAIT_S = 3600.0
"""Longest single wait for outcomes, since the system counts milliseconds in 32 bits."""

START_ATTEMPTS = 5
"""Number of attempts to start a worker."""

T = TypeVar("T")
R = TypeVar("R")


class WorkerDiedError(GpuprepError):
    """A worker process ended in the middle of a task: killed, out of memory, or crashed in a decoder.

    `deaths` is the number of workers that died with the task.
    """

    def __init__(self, text: str, deaths: int = 1) -> None:
        super().__init__(text)
        self.deaths = deaths


class OverdueError(WorkerDiedError):
    """A task exceeded the time limit, and its worker was ended."""


def never() -> bool:
    """Return False; the default of `stopped`."""
    return False


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """A group of workers that share a device and a memory budget."""

    workers: int
    """Number of workers."""
    budget_bytes: int | None = None
    """Total cost of tasks in flight in this group, such as bytes of memory; None for no limit."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the workers, such as those that select a GPU."""


class Executor(Protocol):
    """Interface of executors: see the module's docstring."""

    on_this_machine: bool
    """Whether tasks run on this machine."""

    def run(
        self,
        function: Callable[[T], R],
        tasks: Iterable[T],
        cost: Callable[[T], int] | None = None,
        *,
        limit_s: float | None = None,
        stopped: Callable[[], bool] = never,
    ) -> Iterator[tuple[T, R | WorkerDiedError]]:
        """Yield (task, outcome) as tasks finish.

        Parameters
        ----------
        function : callable
            Function that is called with each task.
        tasks : iterable
            Tasks, begun in this order. The next one is taken only when a worker is free.
        cost : callable, optional
            Returns the share of its group's budget that a task needs. It begins as soon as the tasks in flight leave
            enough, or when there are none.
        limit_s : float, optional
            Time limit in seconds. A task that exceeds it is ended; its outcome is `OverdueError`.
        stopped : callable, optional
            Once it returns True, no more tasks begin; those in flight are finished.

        Yields
        ------
        tuple
            The task, and the result of the function or a `WorkerDiedError`.
        """
        ...

    def stop(self) -> None:
        """End all workers, even in the middle of a task."""
        ...


def run_batches(
    executor: Executor,
    function: Callable[[list[T]], list[R]],
    tasks: list[list[T]],
    dead: Callable[[T, WorkerDiedError], R],
) -> Iterator[tuple[list[T], list[R]]]:
    """Yield (batch, one answer per item); if a worker dies, the items of its batch are tried again one by one.

    Parameters
    ----------
    executor : Executor
        Executor that runs the function.
    function : callable
        Returns one answer per item of a batch.
    tasks : list of lists
        Batches of items.
    dead : callable
        Returns the answer for an item whose worker died.
    """
    again = []
    for task, outcome in executor.run(function, tasks):
        if not isinstance(outcome, WorkerDiedError):
            yield task, outcome
        elif len(task) > 1:
            again += [[item] for item in task]  # any of them may have killed the worker
        else:
            yield task, [dead(task[0], outcome)]
    if again:
        yield from run_batches(executor, function, again, dead)


class InProcessExecutor:
    """Executor in this thread: one task after the other, without time limit."""

    on_this_machine = True

    def run(
        self,
        function: Callable[[T], R],
        tasks: Iterable[T],
        cost: Callable[[T], int] | None = None,  # noqa: ARG002 - one task at a time
        *,
        limit_s: float | None = None,  # noqa: ARG002
        stopped: Callable[[], bool] = never,
    ) -> Iterator[tuple[T, R | WorkerDiedError]]:
        for task in tasks:
            if stopped():
                return
            yield task, function(task)

    def stop(self) -> None:
        pass


@dataclass(slots=True)
class _TaskInFlight:
    """A task that was sent to a worker."""

    task: Any
    group: WorkerGroup
    cost: int
    started_s: float


class ProcessExecutor:
    """Executor in worker processes with one compute thread each. A worker that dies fails its task and is replaced.

    Parameters
    ----------
    groups : int or sequence of WorkerGroup
        Number of workers, or groups of workers.
    prepare : callable, optional
        Called in each worker before its first task.
    preload : tuple of str
        Modules that the fork server imports for the workers.

    Notes
    -----
    A worker may request its replacement after a task: see `request_replacement`.
    """

    on_this_machine = True

    def __init__(
        self,
        groups: int | Sequence[WorkerGroup],
        prepare: Callable[[], None] | None = None,
        preload: tuple[str, ...] = VOLUME_MODULES,
    ) -> None:
        self._context: Any = multiprocessing.get_context("forkserver" if HAVE_FORK_SERVER else "spawn")
        if HAVE_FORK_SERVER:
            # If it were started with the first worker, it would unblock the signals that `signals_blocked` blocks.
            resource_tracker.ensure_running()
            self._context.set_forkserver_preload(list(preload))
        self._groups = [WorkerGroup(groups)] if isinstance(groups, int) else list(groups)
        self._prepare = prepare
        self._workers: dict[Any, BaseProcess] = {}
        self._idle: dict[int, list[Any]] = {id(group): [] for group in self._groups}

    @property
    def jobs(self) -> int:
        """Maximum number of tasks that run at the same time."""
        return sum(group.workers for group in self._groups)

    def run(
        self,
        function: Callable[[T], R],
        tasks: Iterable[T],
        cost: Callable[[T], int] | None = None,
        *,
        limit_s: float | None = None,
        stopped: Callable[[], bool] = never,
    ) -> Iterator[tuple[T, R | WorkerDiedError]]:
        queue = iter(tasks)
        in_flight: dict[Any, _TaskInFlight] = {}
        task: Any = _NONE
        while True:
            while task is not _END and len(in_flight) < self.jobs and not stopped():
                task = next(queue, _END) if task is _NONE else task
                if task is _END:
                    break
                needed = cost(task) if cost is not None else 0
                group = self._choose_group(needed, in_flight.values())
                if group is None:
                    break
                in_flight[self._send(function, task, group)] = _TaskInFlight(task, group, needed, time.monotonic())
                task = _NONE
            if not in_flight:
                return
            ready: list[Any] = wait_connections(list(in_flight), _wait_s(in_flight.values(), limit_s))
            for connection in ready:
                flight = in_flight.pop(connection)
                outcome: R | WorkerDiedError
                try:
                    outcome, last = connection.recv()
                except (EOFError, OSError):
                    outcome = WorkerDiedError(self._reap(connection))
                else:
                    if last:
                        self._workers[connection].kill()  # its own exit may hang
                        self._reap(connection)
                    else:
                        self._idle[id(flight.group)].append(connection)
                yield flight.task, outcome
            for connection, flight in list(in_flight.items()):
                overdue = limit_s is not None and time.monotonic() - flight.started_s >= limit_s
                if overdue and not connection.poll():  # it may have answered while the caller was busy
                    del in_flight[connection]
                    self._workers[connection].kill()
                    self._reap(connection)
                    yield flight.task, OverdueError(f"not finished after {limit_s:g} s")

    def _choose_group(self, needed: int, in_flight: Iterable[_TaskInFlight]) -> WorkerGroup | None:
        """Return the least busy group with a free worker and enough budget for a task; None if there is none."""
        costs: dict[int, list[int]] = {id(group): [] for group in self._groups}
        for flight in in_flight:
            costs[id(flight.group)].append(flight.cost)
        free = [
            group
            for group in self._groups
            if len(used := costs[id(group)]) < group.workers
            and (not used or group.budget_bytes is None or sum(used) + needed <= group.budget_bytes)
        ]
        return min(free, key=lambda group: len(costs[id(group)]) / group.workers, default=None)

    def stop(self) -> None:
        for worker in self._workers.values():
            worker.kill()
        for connection, worker in self._workers.items():
            worker.join()
            connection.close()
        self._workers.clear()
        for idle in self._idle.values():
            idle.clear()

    def _send(self, function: Callable[[Any], Any], task: Any, group: WorkerGroup) -> Any:
        """Send a task to an idle or new worker of a group, and return the connection to it."""
        idle = self._idle[id(group)]
        while idle:
            connection = idle.pop()
            try:
                connection.send((function, task))
            except OSError:
                self._reap(connection)
            else:
                return connection
        for attempt in range(START_ATTEMPTS):
            try:
                connection = self._start_worker(group)
                break
            except (EOFError, OSError) as exc:
                # The fork server died. The next attempt restarts it, once its end has been detected.
                if attempt == START_ATTEMPTS - 1:
                    raise BackendError(
                        f"no worker process can be started ({type(exc).__name__}: {exc}), most often for lack of "
                        "memory: use fewer --jobs"
                    ) from exc
                time.sleep(0.1 * attempt)
        with contextlib.suppress(OSError):  # the worker died at once, and reading its answer will fail
            connection.send((function, task))
        return connection

    def _start_worker(self, group: WorkerGroup) -> Any:
        """Start a worker of a group and return the connection to it."""
        connection, worker_end = self._context.Pipe()
        try:
            worker = self._context.Process(
                target=_serve_tasks, args=(worker_end, self._prepare, dict(group.environment)), daemon=True
            )
            with starting_process():
                worker.start()
        except BaseException:
            connection.close()
            raise
        finally:
            worker_end.close()  # so that the pipe closes when the worker ends
        self._workers[connection] = worker
        return connection

    def _reap(self, connection: Any) -> str:
        """Remove a dead worker and return the cause of its death as text."""
        worker = self._workers.pop(connection)
        connection.close()
        worker.join()
        code = worker.exitcode or 0
        if code == -9:
            return "the worker was killed, most often for lack of memory: use fewer --jobs"
        how = f"exit code {code}"
        if code < 0:
            names = {s.value: s.name for s in signal.Signals}
            how = names.get(-code, f"signal {-code}")
        return f"the worker died ({how}), most often in a decoder"


_NONE: Any = object()
_END: Any = object()


def _wait_s(in_flight: Iterable[_TaskInFlight], limit_s: float | None) -> float | None:
    """Return the time to wait for outcomes: until the first task is overdue, or None without a limit."""
    if limit_s is None:
        return None
    return min(MAX_WAIT_S, max(0.0, min(flight.started_s for flight in in_flight) + limit_s - time.monotonic()))


_replacement_requested = False


def request_replacement() -> None:
    """Request that this worker is replaced after its current task, since it cannot run further tasks."""
    global _replacement_requested
    _replacement_requested = True


def replacement_requested() -> bool:
    """Return whether this process has called `request_replacement`."""
    return _replacement_requested


def _exit_with_parent() -> None:
    """End this worker when its parent ends, even in the middle of a task; runs in a thread."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _serve_tasks(connection: Any, prepare: Callable[[], None] | None, environment: dict[str, str]) -> None:
    """Receive tasks and send outcomes until the parent closes the connection; main function of a worker."""
    os.environ.update(environment)
    if prepare is not None:
        prepare()
    from threadpoolctl import threadpool_limits

    threading.Thread(target=_exit_with_parent, daemon=True).start()
    gc.freeze()  # a collection would write to, and so copy, all pages shared with other workers
    threadpool_limits(1)  # a fork server that the calling program started has no `WORKER_VARIABLES`
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, task = connection.recv()
            connection.send((function(task), _replacement_requested))
            if _replacement_requested:
                return
