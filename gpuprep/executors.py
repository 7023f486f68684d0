"""Ways to run one function over many tasks: here, or in worker processes.

Each has ``run(function, tasks)``, which yields ``(task, outcome)`` as tasks finish, with no more tasks in flight than
workers; the outcome is what the function returned, or `WorkerDiedError`. `stop` ends whatever runs.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_connections
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from gpuprep.errors import BackendError, GpuprepError
from gpuprep.interruption import held_back

FOR_HEADERS = ("gpuprep.headers", "pydicom")
FOR_VOLUMES = (*FOR_HEADERS, "gpuprep.processing", "gpuprep.reading", "gpuprep.writers")
FOR_LOOPS = (*FOR_VOLUMES, "gpuprep.warm")
"""What workers need, imported once by the fork server, so that they share its pages."""

HAVE_FORK_SERVER = "forkserver" in multiprocessing.get_all_start_methods()

T = TypeVar("T")
R = TypeVar("R")


class WorkerDiedError(GpuprepError):
    """A worker process ended in the middle of a task: killed, out of memory, or crashed in a decoder."""


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Budget:
    """Something that tasks in flight share, such as the memory of a GPU."""

    size: int
    cost: Callable[[Any], int]
    """What a task takes of it."""


class Executor(Protocol):
    """See the module's docstring."""

    def run(
        self, function: Callable[[T], R], tasks: Iterable[T], budget: Budget | None = None
    ) -> Iterator[tuple[T, R | WorkerDiedError]]:
        """Yield (task, outcome) as tasks finish.

        Tasks begin in their order, each as soon as what is in flight leaves enough of the budget; alone if need be.
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
    """One task after the other, in this thread."""

    def run(
        self,
        function: Callable[[T], R],
        tasks: Iterable[T],
        budget: Budget | None = None,  # noqa: ARG002 - each task is alone
    ) -> Iterator[tuple[T, R | WorkerDiedError]]:
        for task in tasks:
            yield task, function(task)

    def stop(self) -> None:
        pass


class Processes:
    """Worker processes with one compute thread each; one that dies costs its task, and is replaced.

    `prepare` is called in each of them before its first task; `preload` names modules that they need. A worker may ask
    to be replaced after a task: see `last_task`.
    """

    def __init__(
        self, jobs: int, prepare: Callable[[], None] | None = None, preload: tuple[str, ...] = FOR_VOLUMES
    ) -> None:
        self._context: Any = multiprocessing.get_context("forkserver" if HAVE_FORK_SERVER else "spawn")
        if HAVE_FORK_SERVER:
            # Started later, in the middle of starting a worker, it would let through the signals that are held back.
            resource_tracker.ensure_running()
            self._context.set_forkserver_preload(list(preload))
        self.jobs = jobs
        self._prepare = prepare
        self._workers: dict[Any, BaseProcess] = {}
        self._idle: list[Any] = []

    def run(
        self, function: Callable[[T], R], tasks: Iterable[T], budget: Budget | None = None
    ) -> Iterator[tuple[T, R | WorkerDiedError]]:
        queue = iter(tasks)
        flying: dict[Any, T] = {}
        task = next(queue, _END)
        while True:
            while task is not _END and len(flying) < self.jobs and _affordable(task, flying.values(), budget):
                flying[self._send(function, task)] = task
                task = next(queue, _END)
            if not flying:
                return
            connections: list[Any] = wait_connections(list(flying))
            for ready in connections:
                done = flying.pop(ready)
                outcome: R | WorkerDiedError
                try:
                    outcome, last = ready.recv()
                except (EOFError, OSError):
                    outcome = WorkerDiedError(self._bury(ready))
                else:
                    if last:
                        self._workers[ready].kill()  # its own way out may be blocked
                        self._bury(ready)
                    else:
                        self._idle.append(ready)
                yield done, outcome

    def stop(self) -> None:
        for worker in self._workers.values():
            worker.kill()
        for connection, worker in self._workers.items():
            worker.join()
            connection.close()
        self._workers.clear()
        self._idle.clear()

    def _send(self, function: Callable[[Any], Any], task: Any) -> Any:
        """Give a task to an idle worker, or to a new one; one that died while idle is replaced."""
        while self._idle:
            connection = self._idle.pop()
            try:
                connection.send((function, task))
            except OSError:
                self._bury(connection)
            else:
                return connection
        try:
            connection = self._hire()
        except (EOFError, OSError):  # the fork server has died, and is started again by asking once more
            try:
                connection = self._hire()
            except (EOFError, OSError) as exc:
                raise BackendError(
                    f"no worker process can be started ({type(exc).__name__}: {exc}), most often for lack of memory: "
                    "use fewer --jobs"
                ) from exc
        with contextlib.suppress(OSError):  # it died at once: reading the answer will tell
            connection.send((function, task))
        return connection

    def _hire(self) -> Any:
        """Start a worker and return the connection to it."""
        connection, theirs = self._context.Pipe()
        try:
            worker = self._context.Process(target=_work, args=(theirs, self._prepare), daemon=True)
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


_END: Any = object()


def _affordable(task: Any, flying: Iterable[Any], budget: Budget | None) -> bool:
    """Whether a task may join those in flight."""
    if budget is None:
        return True
    taken = [budget.cost(t) for t in flying]
    return not taken or sum(taken) + budget.cost(task) <= budget.size


_ending = False


def last_task() -> None:
    """Have this worker end, and be replaced, once it has given its outcome; it is in no state to do more."""
    global _ending
    _ending = True


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


def _work(connection: Any, prepare: Callable[[], None] | None) -> None:
    """Answer tasks until the other end closes; runs in the worker."""
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
