"""Runs tasks on a Dask cluster: a local one, or that of a scheduler that is already running.

This module is imported late, because Dask is an extra. `distributed` is imported with the first run, because that takes
a second.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from gpuprep._version import __version__
from gpuprep.errors import BackendError, GpuprepError, RequestError
from gpuprep.executors.cores import usable_cores
from gpuprep.executors.dask_events import LOST_ERRORS, TaskEvents, TaskInFlight
from gpuprep.executors.dask_worker import KILL, Answer, distributed_module, end_local_cluster, run_task, worker_version
from gpuprep.executors.fork_server import WORKER_VARIABLES
from gpuprep.executors.processes import OverdueError, WorkerDiedError, never

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

LOCAL = "local"
"""Value in place of an address: a cluster on this machine that lives as long as the executor."""

TIMEOUT_S = 30.0
"""Time within which a scheduler has to answer, and a cluster has to have a worker."""

TASKS_PER_THREAD = 2
"""Tasks in flight per thread of the cluster: a running one, and one that waits at the worker."""

POLL_S = 0.1
"""Interval at which stop request and time limit are checked."""

REFRESH_S = 2.0
"""Interval at which the list of workers is refreshed."""


class Cluster:
    """Executor on a Dask cluster. If a worker dies, its tasks are run again on another worker.

    Dask limits the memory of workers; the costs of tasks are ignored. The threads of a worker share a process, so a
    task that ends it also ends the tasks of the other threads: workers with one thread each are recommended.

    Parameters
    ----------
    scheduler : str
        "local" for a cluster on this machine; the address of a scheduler, such as ``tcp://node1:8786``; or the path of
        the file that ``dask scheduler --scheduler-file`` writes.
    jobs : int, optional
        Workers of a local cluster; by default one per core.
    gpu : bool
        Whether each task needs a GPU. If workers offer the resource "GPU", only these get tasks, one per GPU.
    timeout_s : float
        Time within which the scheduler has to answer, and after which a scheduler without workers is an error.

    Raises
    ------
    BackendError
        From `run`: if `distributed` is not installed, the scheduler does not answer or is lost, there are no workers,
        or a worker has no working GPU.
    RequestError
        From `run`: if a worker has another version of gpuprep or none, or cannot be restarted although there is a time
        limit.
    """

    on_this_machine = False

    def __init__(
        self, scheduler: str, jobs: int | None = None, *, gpu: bool = False, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.scheduler = scheduler
        self.jobs = jobs or usable_cores()
        self._gpu = gpu
        self._timeout_s = timeout_s
        self._client: Any | None = None
        self._local_cluster: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._events: TaskEvents | None = None
        self._address = ""
        self._in_flight: dict[int, TaskInFlight] = {}
        self._workers: dict[str, dict[str, Any]] = {}
        self._compatible: set[str] = set()
        self._last_worker_s = 0.0

    def run(
        self,
        function: Callable[[T], R],
        tasks: Iterable[T],
        cost: Callable[[T], int] | None = None,  # noqa: ARG002 - Dask limits memory: see the class
        *,
        limit_s: float | None = None,
        stopped: Callable[[], bool] = never,
    ) -> Iterator[tuple[T, R | WorkerDiedError]]:
        if self._client is None:
            try:
                self._client = self._connect()
                self._wait_for_workers(self._client)
            except BaseException:
                self.stop()
                raise
        client = self._client
        without_nanny = [address for address, worker in self._workers.items() if not worker.get("nanny")]
        if limit_s is not None and without_nanny:
            raise RequestError(
                f"the Dask worker at {without_nanny[0]} has no nanny to restart it, so a task that exceeds the time "
                "limit cannot be ended there: start workers without --no-nanny, or set no time limit"
            )
        self._in_flight = {}
        self._close_events()
        with _lost_as_backend_error(self._address):
            self._events = TaskEvents(client, self._in_flight)
        try:
            # Outside of `_lost_as_backend_error`, so that errors of the consumer are not reported as errors of Dask.
            yield from self._outcomes(client, self._events, function, iter(tasks), limit_s, stopped)
        finally:
            if not self._in_flight:  # otherwise `stop` needs the events, to know which tasks have started
                self._close_events()

    def stop(self) -> None:
        client, self._client = self._client, None
        in_flight, self._in_flight = list(self._in_flight.values()), {}
        self._compatible.clear()
        if client is not None:
            with contextlib.suppress(*LOST_ERRORS):
                if in_flight and self._local_cluster is None and client.status == "running":
                    client.cancel([flight.future for flight in in_flight], force=True)
                    # A worker that continues writing a series would interfere with the next run.
                    for flight in in_flight:
                        if flight.started_s is not None:
                            self._end_worker(client, flight.worker, flight.pid)
            self._close_events()
            with contextlib.suppress(*LOST_ERRORS):
                client.close(timeout=2)
        if self._local_cluster is not None:
            end_local_cluster(self._local_cluster)
            self._local_cluster = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _close_events(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            events.close()

    def _outcomes(
        self,
        client: Any,
        events: TaskEvents,
        function: Callable[[T], R],
        tasks: Iterator[T],
        limit_s: float | None,
        stopped: Callable[[], bool],
    ) -> Iterator[tuple[T, R | WorkerDiedError]]:
        in_flight = self._in_flight
        tickets = iter(range(sys.maxsize))
        exhausted = stopping = False
        refreshed_s = time.monotonic()
        while True:
            with _lost_as_backend_error(self._address):
                if client.status != "running":
                    raise self._scheduler_lost()
                if time.monotonic() > refreshed_s + REFRESH_S:
                    self._refresh_workers(client)
                    refreshed_s = time.monotonic()
                if not stopping and stopped():
                    exhausted = stopping = True
                    events.prevent_starts()
            # Outside of `_lost_as_backend_error`, so that errors in making tasks are not reported as errors of Dask.
            while not exhausted and len(in_flight) < TASKS_PER_THREAD * self._threads():
                task = next(tasks, _END)
                if task is _END:
                    exhausted = True
                else:
                    payload = pickle.dumps((function, task))
                    ticket = next(tickets)
                    in_flight[ticket] = TaskInFlight(task, payload)
                    in_flight[ticket].future = self._submit(client, events, ticket, payload)
            if not in_flight and exhausted:
                return
            ticket, future = events.next(POLL_S)
            flight = in_flight.get(ticket)
            if flight is not None and future is flight.future:
                with _lost_as_backend_error(self._address):
                    finished = self._take_outcome(client, events, ticket, flight, stopping=stopping)
                if finished is not None:
                    yield flight.task, finished[0]
            if limit_s is not None and events.is_empty():  # else an overdue task may be among those that are done
                for ticket in self._overdue(client, limit_s):
                    flight = in_flight.pop(ticket)
                    with _lost_as_backend_error(self._address):
                        client.cancel([flight.future], force=True)
                        self._end_worker(client, flight.worker, flight.pid)
                    yield flight.task, OverdueError(f"not finished after {limit_s:g} s", flight.starts)

    def _overdue(self, client: Any, limit_s: float) -> list[int]:
        """Return the tickets of tasks that exceed the time limit."""

        def overdue() -> list[int]:
            now_s = time.monotonic()
            return [t for t, f in self._in_flight.items() if f.started_s is not None and now_s > f.started_s + limit_s]

        if overdue():
            with _lost_as_backend_error(self._address):
                self._refresh_workers(client)  # marks tasks whose worker died as not running
        return overdue()

    def _take_outcome(
        self, client: Any, events: TaskEvents, ticket: int, flight: TaskInFlight, *, stopping: bool
    ) -> tuple[Any] | None:
        """Return the outcome of a finished task in a tuple; None if it is submitted again, or dropped while stopping.

        Raises
        ------
        BackendError
            If the scheduler is lost, or a worker has no backend.
        """
        future, outcome = flight.future, None
        if future.status == "cancelled":
            raise self._scheduler_lost()
        flight.started_s = None
        if future.status == "error":
            exc = future.exception()
            if not isinstance(exc, distributed_module().KilledWorker):
                outcome = WorkerDiedError(f"Dask could not run it ({type(exc).__name__}: {exc})")
            elif flight.starts > exc.allowed_failures:
                text = f"{flight.starts} workers died with it, most often for lack of memory, or in a decoder"
                outcome = WorkerDiedError(text, flight.starts)
            # Otherwise the task only waited at workers that died; Dask counts these deaths, too. It is submitted again.
        else:
            answer: Answer = future.result()
            if answer.kind == "no backend":
                raise BackendError(
                    f"the Dask worker at {answer.worker} cannot compute: {answer.outcome}. Where only some workers "
                    'have a GPU, start these with --resources "GPU=1"'
                )
            if answer.last:
                self._end_worker(client, answer.worker, answer.pid)
            if answer.kind == "raised":
                outcome = WorkerDiedError(f"the worker gave up ({answer.outcome})")
            elif answer.kind == "done":
                del self._in_flight[ticket]
                return (pickle.loads(answer.outcome),)  # noqa: S301 - made by gpuprep's own worker
            elif stopping:
                del self._in_flight[ticket]
                return None
        if outcome is None:
            flight.future = self._submit(client, events, ticket, flight.payload)
            return None
        del self._in_flight[ticket]
        return (outcome,)

    def _submit(self, client: Any, events: TaskEvents, ticket: int, payload: bytes) -> Any:
        """Submit a pickled task and return its future; Dask would search an unpickled one for Dask tasks."""
        resources = {"GPU": 1} if self._needs_gpu() else None
        with _lost_as_backend_error(self._address):
            future = client.submit(run_task, events.name, ticket, payload, pure=False, resources=resources)
            events.expect(ticket, future)
            return future

    def _connect(self) -> Any:
        """Return a client of the scheduler; start a local cluster first if requested."""
        distributed = distributed_module()
        self._address = self._start_local_cluster() if self.scheduler == LOCAL else _address(self.scheduler)
        # Each error that the client logs is also raised as an error of gpuprep.
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        try:
            return distributed.Client(self._address, timeout=self._timeout_s, set_as_default=False, name="gpuprep")
        except (OSError, ValueError, TypeError) as exc:
            raise BackendError(
                f"no Dask scheduler answers at {self._address} ({exc}): start one there with dask scheduler, or give "
                "the address of one that runs"
            ) from exc

    def _start_local_cluster(self) -> str:
        """Start a local cluster in a separate process and return its address.

        Its workers then do not run the main script again, so scripts need no ``if __name__ == "__main__"``. They do not
        import modules from the current folder either.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="gpuprep-dask-", ignore_cleanup_errors=True)
        # The resource tracker would warn about what it cleans up after the cluster was ended.
        ignored = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]))
        path = [str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]
        self._local_cluster = subprocess.Popen(  # noqa: S603 - this Python with fixed code
            [
                sys.executable,
                "-P",
                "-c",
                "from gpuprep.executors.dask_worker import run_local_cluster; run_local_cluster()",
                str(self.jobs),
                self._folder.name,
            ],
            env=os.environ
            | WORKER_VARIABLES
            | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), "PYTHONWARNINGS": ignored},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal does not reach it, and it can be ended as a group
        )
        address = self._local_cluster.stdout.readline().strip() if self._local_cluster.stdout else ""
        if not address:
            raise BackendError("the local Dask scheduler ended while starting: see its messages above")
        return address

    def _wait_for_workers(self, client: Any) -> None:
        """Wait until there is a worker, or all workers of a local cluster."""
        deadline_s = time.monotonic() + self._timeout_s
        wanted = self.jobs if self.scheduler == LOCAL else 1
        while True:
            with _lost_as_backend_error(self._address):
                self._refresh_workers(client, starting=True)
            if self._threads() and len(self._workers) >= wanted:
                return
            if time.monotonic() > deadline_s:
                raise self._no_workers()
            time.sleep(POLL_S)

    def _refresh_workers(self, client: Any, *, starting: bool = False) -> None:
        """Refresh the list of workers, check the version of new ones, and mark tasks of dead ones as not running."""
        busy = [(flight, flight.worker) for flight in self._in_flight.values()]
        info: Any = client.scheduler_info(n_workers=-1)  # all of them; the default number depends on the release
        self._workers = dict(info["workers"])
        if self._workers:
            self._last_worker_s = time.monotonic()
        elif not starting and time.monotonic() > self._last_worker_s + self._timeout_s:
            raise self._no_workers()
        new = [address for address in self._workers if address not in self._compatible]
        versions: Any = client.run(worker_version, workers=new, on_error="return") if new else {}
        for address, version in versions.items():
            if isinstance(version, OSError):
                continue  # the worker has ended
            if version != __version__:
                has = "no working gpuprep" if isinstance(version, Exception) else f"gpuprep {version}"
                why = f" ({type(version).__name__}: {version})" if isinstance(version, Exception) else ""
                raise RequestError(
                    f"the Dask worker at {address} has {has}{why}, but this client has gpuprep {__version__}: install "
                    "the same version in both places"
                )
            self._compatible.add(address)
        for flight, worker in busy:
            if worker == flight.worker and worker not in self._workers:
                flight.started_s = None

    def _needs_gpu(self) -> bool:
        """Return whether tasks need a GPU and workers offer the resource "GPU"."""
        return self._gpu and any(worker.get("resources", {}).get("GPU") for worker in self._workers.values())

    def _threads(self) -> int:
        """Return the number of tasks that can run at the same time."""
        threads = 0
        for worker in self._workers.values():
            gpus = int(worker.get("resources", {}).get("GPU", 0))
            threads += min(gpus, worker["nthreads"]) if self._needs_gpu() else worker["nthreads"]
        return threads

    def _end_worker(self, client: Any, worker: str, pid: int) -> None:
        """Kill a worker in the middle of a task; its nanny starts another.

        `Client.restart_workers` would first ask the worker, which does not work if it hangs, and wait for its restart.
        """
        if self._workers.get(worker, {}).get("nanny"):
            with contextlib.suppress(KeyError):  # the worker has ended
                client.run(os.kill, pid, KILL, workers=[worker], nanny=True, on_error="ignore")

    def _scheduler_lost(self) -> BackendError:
        return BackendError(
            f"the Dask scheduler at {self._address} was lost: finished outputs are kept; run again when it is back"
        )

    def _no_workers(self) -> BackendError:
        return BackendError(
            f"the Dask scheduler at {self._address} has had no workers for {self._timeout_s:g} s: start some with "
            f"dask worker {self._address}"
        )


_END: Any = object()


@contextlib.contextmanager
def _lost_as_backend_error(address: str) -> Iterator[None]:
    """Turn errors of a lost scheduler into a `BackendError`."""
    try:
        yield
    except GpuprepError:
        raise
    except LOST_ERRORS as exc:
        raise BackendError(
            f"the Dask scheduler at {address} was lost ({type(exc).__name__}: {exc}): finished outputs are kept; run "
            "again when it is back"
        ) from exc


def _address(scheduler: str) -> str:
    """Return the address of a scheduler, given as an address or as the path of its file."""
    if "://" in scheduler:
        return scheduler
    try:
        return str(json.loads(Path(scheduler).read_text())["address"])
    except (OSError, ValueError, LookupError, TypeError) as exc:
        raise RequestError(
            f"{scheduler!r} is not a Dask scheduler ({type(exc).__name__}: {exc}): give local, an address such as "
            "tcp://node1:8786, or the file that dask scheduler --scheduler-file writes"
        ) from exc
