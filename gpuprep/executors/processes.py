"""Runs one function over many tasks, in this process or in worker processes.

Each has ``run(function, tasks)``, which yields ``(task, outcome)`` as tasks finish, with no more tasks in flight than
workers; the outcome is what the function returned, or `WorkerDiedError`. `stop` ends whatever runs. Dask is a third
way: see `gpuprep.executors.dask`.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_connections
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from gpuprep.errors import BackendError, GpuprepError
from gpuprep.executors.signals import held_back

FOR_HEADERS = ("gpuprep.dicom.headers", "pydicom")
FOR_VOLUMES = (*FOR_HEADERS, "gpuprep.compute.process", "gpuprep.dicom.read", "gpuprep.output.writers")
FOR_LOOPS = (*FOR_VOLUMES, "gpuprep.compute.numba_warmup")
"""What workers need, imported once by the fork server, so that they share its pages."""

HAVE_FORK_SERVER = "forkserver" in multiprocessing.get_all_start_methods()

LONGEST_WAIT_S = 3600.0
"""At a time; the system counts milliseconds in 32 bits."""

ATTEMPTS = 5
"""To start a worker."""

T = TypeVar("T")
R = TypeVar("R")


class WorkerDiedError(GpuprepError):
    """A worker process ended in the middle of a task: killed, out of memory, or crashed in a decoder.

    `deaths` is how many of them the task has cost.
    """

    def __init__(self, text: str, deaths: int = 1) -> None:
        super().__init__(text)
        self.deaths = deaths


class OverdueError(WorkerDiedError):
    """A task took longer than it may, and its worker was ended."""


def never() -> bool:
    """Return False: nobody wants it to stop."""
    return False


@dataclass(frozen=True, slots=True)
class Place:
    """Where some workers compute."""

    workers: int
    room: int | None = None
    """What the tasks in flight there share, such as bytes of memory."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the workers find set, such as which GPU they see."""


class Executor(Protocol):
    """See the module's docstring."""

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
            What is to be done.
        tasks : iterable
            They begin in their order; each is asked for only when there is a worker for it.
        cost : callable, optional
            What a task takes of the room where it runs: it begins as soon as those in flight leave enough, alone if
            need be.
        limit_s : float, optional
            A task that takes longer is ended; its outcome is `OverdueError`.
        stopped : callable, optional
            Once it returns True no more tasks begin; those in flight are finished.
        """
        ...

    def stop(self) -> None:
        """End all workers, in the middle of a task if need be."""
        ...


def answers(
    executor: Executor,
    function: Callable[[list[T]], list[R]],
    tasks: list[list[T]],
    dead: Callable[[T, WorkerDiedError], R],
) -> Iterator[tuple[list[T], list[R]]]:
    """Yield (task, one answer for each of its items); where a worker dies, its items are tried again one by one.

    Parameters
    ----------
    executor : Executor
        Runs the function.
    function : callable
        Answers a list of items.
    tasks : list of lists
        The items.
    dead : callable
        Gives the answer for an item that takes its worker with it.
    """
    again = []
    for task, outcome in executor.run(function, tasks):
        if not isinstance(outcome, WorkerDiedError):
            yield task, outcome
        elif len(task) > 1:
            again += [[item] for item in task]  # which of them was it?
        else:
            yield task, [dead(task[0], outcome)]
    if again:
        yield from answers(executor, function, again, dead)


class Here:
    """One task after the other, in this thread; nothing can end one of them."""

    def run(
        self,
        function: Callable[[T], R],
        tasks: Iterable[T],
        cost: Callable[[T], int] | None = None,  # noqa: ARG002 - each task is alone
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
class _Flight:
    """A task on its way."""

    task: Any
    place: Place
    cost: int
    started_s: float


class Processes:
    """Worker processes with one compute thread each; one that dies costs its task, and is replaced.

    Parameters
    ----------
    places : int or sequence of Place
        How many workers, and where.
    prepare : callable, optional
        Called in each of them before its first task.
    preload : tuple of str
        Modules that they need.

    Notes
    -----
    A worker may ask to be replaced after a task: see `last_task`.
    """

    def __init__(
        self,
        places: int | Sequence[Place],
        prepare: Callable[[], None] | None = None,
        preload: tuple[str, ...] = FOR_VOLUMES,
    ) -> None:
        self._context: Any = multiprocessing.get_context("forkserver" if HAVE_FORK_SERVER else "spawn")
        if HAVE_FORK_SERVER:
            # Started later, in the middle of starting a worker, it would let through the signals that are held back.
            resource_tracker.ensure_running()
            self._context.set_forkserver_preload(list(preload))
        self._places = [Place(places)] if isinstance(places, int) else list(places)
        self._prepare = prepare
        self._workers: dict[Any, BaseProcess] = {}
        self._idle: dict[int, list[Any]] = {id(place): [] for place in self._places}

    @property
    def jobs(self) -> int:
        """Tasks that run at a time, at most."""
        return sum(place.workers for place in self._places)

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
        flying: dict[Any, _Flight] = {}
        task: Any = _NONE
        while True:
            while task is not _END and len(flying) < self.jobs and not stopped():
                task = next(queue, _END) if task is _NONE else task
                if task is _END:
                    break
                needed = cost(task) if cost is not None else 0
                place = self._place(needed, flying.values())
                if place is None:
                    break
                flying[self._send(function, task, place)] = _Flight(task, place, needed, time.monotonic())
                task = _NONE
            if not flying:
                return
            ready: list[Any] = wait_connections(list(flying), _patience_s(flying.values(), limit_s))
            for connection in ready:
                flight = flying.pop(connection)
                outcome: R | WorkerDiedError
                try:
                    outcome, last = connection.recv()
                except (EOFError, OSError):
                    outcome = WorkerDiedError(self._bury(connection))
                else:
                    if last:
                        self._workers[connection].kill()  # its own way out may be blocked
                        self._bury(connection)
                    else:
                        self._idle[id(flight.place)].append(connection)
                yield flight.task, outcome
            for connection, flight in list(flying.items()):
                if limit_s is not None and time.monotonic() - flight.started_s >= limit_s:
                    del flying[connection]
                    self._workers[connection].kill()
                    self._bury(connection)
                    yield flight.task, OverdueError(f"not finished after {limit_s:g} s")

    def _place(self, needed: int, flying: Iterable[_Flight]) -> Place | None:
        """Return where a task may begin: of the places with a free worker and enough room, the emptiest."""
        there: dict[int, list[int]] = {id(place): [] for place in self._places}
        for flight in flying:
            there[id(flight.place)].append(flight.cost)
        free = [
            place
            for place in self._places
            if len(taken := there[id(place)]) < place.workers
            and (not taken or place.room is None or sum(taken) + needed <= place.room)
        ]
        return min(free, key=lambda place: len(there[id(place)]) / place.workers, default=None)

    def stop(self) -> None:
        for worker in self._workers.values():
            worker.kill()
        for connection, worker in self._workers.items():
            worker.join()
            connection.close()
        self._workers.clear()
        for idle in self._idle.values():
            idle.clear()

    def _send(self, function: Callable[[Any], Any], task: Any, place: Place) -> Any:
        """Give a task to an idle worker of a place, or to a new one; one that died while idle is replaced."""
        idle = self._idle[id(place)]
        while idle:
            connection = idle.pop()
            try:
                connection.send((function, task))
            except OSError:
                self._bury(connection)
            else:
                return connection
        for attempt in range(ATTEMPTS):
            try:
                connection = self._hire(place)
                break
            except (EOFError, OSError) as exc:
                # The fork server has died. It is started again by asking once more, when its end has been noticed.
                if attempt == ATTEMPTS - 1:
                    raise BackendError(
                        f"no worker process can be started ({type(exc).__name__}: {exc}), most often for lack of "
                        "memory: use fewer --jobs"
                    ) from exc
                time.sleep(0.1 * attempt)
        with contextlib.suppress(OSError):  # it died at once: reading the answer will tell
            connection.send((function, task))
        return connection

    def _hire(self, place: Place) -> Any:
        """Start a worker at a place and return the connection to it."""
        connection, theirs = self._context.Pipe()
        try:
            worker = self._context.Process(
                target=_work, args=(theirs, self._prepare, dict(place.environment)), daemon=True
            )
            with _hidden_main(), _no_strangers(), held_back():
                worker.start()
        except BaseException:
            connection.close()
            raise
        finally:
            theirs.close()  # so that the worker's end closes with the worker
        self._workers[connection] = worker
        return connection

    def _bury(self, connection: Any) -> str:
        """Forget a dead worker and say how it died."""
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


def _patience_s(flying: Iterable[_Flight], limit_s: float | None) -> float | None:
    """Return how long to wait for outcomes: until the first task is overdue."""
    if limit_s is None:
        return None
    return min(LONGEST_WAIT_S, max(0.0, min(flight.started_s for flight in flying) + limit_s - time.monotonic()))


_ending = False


def last_task() -> None:
    """Have this worker end, and be replaced, once it has given its outcome; it is in no state to do more."""
    global _ending
    _ending = True


def is_last_task() -> bool:
    """Whether this process has said that it is in no state to do more: see `last_task`."""
    return _ending


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep a new worker from running the main script again: no task lives there, and a script needs no guard then."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _no_strangers() -> Iterator[None]:
    """Keep a new Python from looking for modules in the current folder first: there may be a pydicom.py in it."""
    former = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if former is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = former


def _end_with_parent() -> None:
    """Leave when the parent is gone, in the middle of a task if need be; a thread of the worker."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(connection: Any, prepare: Callable[[], None] | None, environment: dict[str, str]) -> None:
    """Answer tasks until the other end closes; runs in the worker."""
    os.environ.update(environment)
    if prepare is not None:
        prepare()
    from threadpoolctl import threadpool_limits

    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # a collection would touch, and so copy, every page shared with the other workers
    threadpool_limits(1)  # one process per core beats several BLAS threads in each
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, task = connection.recv()
            connection.send((function(task), _ending))
            if _ending:
                return
