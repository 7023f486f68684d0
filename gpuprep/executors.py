"""Ways to run one function over many tasks: here, in threads, or in worker processes.

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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait as wait_connections
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from gpuprep.backend import numba_works
from gpuprep.errors import GpuprepError
from gpuprep.interruption import held_back

FOR_HEADERS = ("gpuprep.headers", "pydicom")
FOR_VOLUMES = (
    *FOR_HEADERS,
    "gpuprep.processing",
    "gpuprep.reading",
    "gpuprep.writers",
    *(["gpuprep.warm"] if numba_works() else []),
)
"""What workers need, imported once by the fork server, so that they share its pages."""

HAVE_FORK_SERVER = "forkserver" in multiprocessing.get_all_start_methods()

T = TypeVar("T")
R = TypeVar("R")


def start_fork_server(preload: tuple[str, ...]) -> None:
    """Start the process that workers are forked from, unless it runs; it imports `preload` while we go on."""
    if HAVE_FORK_SERVER:
        # Started later, in the middle of starting a worker, it would let through the signals that are held back.
        resource_tracker.ensure_running()
        forkserver.set_forkserver_preload(list(preload))
        with _hidden_main(), _no_strangers(), held_back():
            forkserver.ensure_running()


class WorkerDiedError(GpuprepError):
    """A worker process ended in the middle of a task: killed, out of memory, or crashed in a decoder."""


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Executor(Protocol):
    """See the module's docstring."""

    def run(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[T, R | WorkerDiedError]]:
        """Yield (task, outcome) as tasks finish."""
        ...

    def stop(self) -> None:
        """End all workers, in the middle of a task if need be."""
        ...


class Here:
    """One task after the other, in this thread."""

    def run(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[T, R | WorkerDiedError]]:
        for task in tasks:
            yield task, function(task)

    def stop(self) -> None:
        pass


class Threads:
    """Threads of this process: for a GPU, where one thread reads or writes while another one's kernels run."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="gpuprep")

    def run(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[T, R | WorkerDiedError]]:
        queue = iter(tasks)
        flying: dict[Future[R], T] = {}
        while True:
            while len(flying) < self._jobs and (task := next(queue, _END)) is not _END:
                flying[self._pool.submit(function, task)] = task
            if not flying:
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                yield flying.pop(future), future.result()

    def stop(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Processes:
    """Worker processes with one compute thread each; one that dies costs its task, and is replaced.

    `prepare` is called in each of them before its first task; `preload` names modules that they need.
    """

    def __init__(
        self, jobs: int, prepare: Callable[[], None] | None = None, preload: tuple[str, ...] = FOR_VOLUMES
    ) -> None:
        self._context: Any = multiprocessing.get_context("forkserver" if HAVE_FORK_SERVER else "spawn")
        start_fork_server(preload)
        self._jobs = jobs
        self._prepare = prepare
        self._workers: dict[Any, BaseProcess] = {}
        self._idle: list[Any] = []

    def run(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[T, R | WorkerDiedError]]:
        queue = iter(tasks)
        flying: dict[Any, T] = {}
        while True:
            while len(flying) < self._jobs and (task := next(queue, _END)) is not _END:
                flying[self._send(function, task)] = task
            if not flying:
                return
            connections: list[Any] = wait_connections(list(flying))
            for ready in connections:
                task = flying.pop(ready)
                try:
                    outcome: R | WorkerDiedError = ready.recv()
                    self._idle.append(ready)
                except (EOFError, OSError):
                    outcome = WorkerDiedError(self._bury(ready))
                yield task, outcome

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
        connection, theirs = self._context.Pipe()
        worker = self._context.Process(target=_work, args=(theirs, self._prepare), daemon=True)
        with _hidden_main(), _no_strangers(), held_back():
            worker.start()
        theirs.close()  # so that the worker's end closes with the worker
        self._workers[connection] = worker
        with contextlib.suppress(OSError):  # it died at once: reading the answer will tell
            connection.send((function, task))
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
            connection.send(function(task))
