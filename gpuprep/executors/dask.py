"""Runs tasks on the workers of a Dask cluster, of this machine or of a scheduler that is already there.

Imported late, because it is an extra; and what it needs of `distributed`, later still, because that takes a second.
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
from gpuprep.executors.dask_news import LOST, Flight, News
from gpuprep.executors.dask_worker import KILL, Answer, distributed_module, do_task, end_keeper, version_here
from gpuprep.executors.processes import OverdueError, WorkerDiedError, never

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

LOCAL = "local"
"""In place of an address: a cluster of this machine's own, for as long as the executor lives."""

PATIENCE_S = 30.0
"""How long a scheduler may take to answer, and a cluster to have a worker."""

PER_THREAD = 2
"""Tasks in flight per thread of the cluster: one that runs, and one that is there already when it ends."""


TICK_S = 0.1
LOOK_S = 2.0
"""How often limits are watched, and how often the workers are counted."""


class Cluster:
    """The workers of a Dask cluster; one that dies costs its tasks a second try, on another.

    What a worker may take of memory is between Dask and the machine it is on; what tasks cost is not looked at. The
    threads of a worker share a process and so its end: a cluster of workers with one thread each is what suits.

    Parameters
    ----------
    scheduler : str
        "local" for a cluster of this machine; or the address of a scheduler such as ``tcp://node1:8786``, or the path
        of the file that ``dask scheduler --scheduler-file`` writes.
    jobs : int, optional
        Workers of a local cluster; by default one per core.
    gpu : bool
        Whether tasks take a GPU each. Where workers offer the resource "GPU", only these get tasks then, one per GPU.
    patience_s : float
        How long the scheduler may take to answer, and how long it may be without workers.

    Raises
    ------
    BackendError
        From `run`: if `distributed` is not installed, if the scheduler does not answer or is lost, if there are no
        workers, if one of them has no GPU that works.
    RequestError
        From `run`: if a worker has another version of gpuprep or none, or cannot be restarted though there is a limit
        of time.
    """

    def __init__(
        self, scheduler: str, jobs: int | None = None, *, gpu: bool = False, patience_s: float = PATIENCE_S
    ) -> None:
        self.scheduler = scheduler
        self.jobs = jobs or usable_cores()
        self._gpu = gpu
        self._patience_s = patience_s
        self._client: Any | None = None
        self._keeper: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._news: News | None = None
        self._address = ""
        self._flying: dict[int, Flight] = {}
        self._workers: dict[str, dict[str, Any]] = {}
        self._known: set[str] = set()
        self._seen_s = 0.0

    def run(
        self,
        function: Callable[[T], R],
        tasks: Iterable[T],
        cost: Callable[[T], int] | None = None,  # noqa: ARG002 - each worker has its own memory: see the class
        *,
        limit_s: float | None = None,
        stopped: Callable[[], bool] = never,
    ) -> Iterator[tuple[T, R | WorkerDiedError]]:
        if self._client is None:
            try:
                self._client = self._connected()
                self._wait_for_workers(self._client)
            except BaseException:
                self.stop()
                raise
        client = self._client
        if limit_s is not None and (bare := [a for a, worker in self._workers.items() if not worker.get("nanny")]):
            raise RequestError(
                f"the Dask worker at {bare[0]} has no nanny to restart it, so no task there can be ended when it takes "
                "too long: start workers without --no-nanny, or set no limit of time"
            )
        self._flying = {}
        self._close_news()
        with _understood(self._address):
            self._news = News(client, self._flying)
        try:
            # Whoever takes the outcomes may take time, and may not come back for the next: no error of his is ours.
            yield from self._outcomes(client, self._news, function, iter(tasks), limit_s, stopped)
        finally:
            if not self._flying:  # else `stop` has to know what of it began after all
                self._close_news()

    def stop(self) -> None:
        client, self._client = self._client, None
        flying, self._flying = list(self._flying.values()), {}
        self._known.clear()
        if client is not None:
            with contextlib.suppress(*LOST):
                if flying and self._keeper is None and client.status == "running":
                    client.cancel([flight.future for flight in flying], force=True)
                    # A series that went on being written would get into the way of the next run.
                    for flight in flying:
                        if flight.begun_s is not None:
                            self._end_worker(client, flight.worker, flight.pid)
            self._close_news()
            with contextlib.suppress(*LOST):
                client.close(timeout=2)
        if self._keeper is not None:
            end_keeper(self._keeper)
            self._keeper = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _close_news(self) -> None:
        news, self._news = self._news, None
        if news is not None:
            news.close()

    def _outcomes(
        self,
        client: Any,
        news: News,
        function: Callable[[T], R],
        tasks: Iterator[T],
        limit_s: float | None,
        stopped: Callable[[], bool],
    ) -> Iterator[tuple[T, R | WorkerDiedError]]:
        flying = self._flying
        tickets = iter(range(sys.maxsize))
        no_more = stopping = False
        looked_s = time.monotonic()
        while True:
            with _understood(self._address):
                if client.status != "running":
                    raise self._lost()
                if time.monotonic() > looked_s + LOOK_S:
                    self._look(client)
                    looked_s = time.monotonic()
                if not stopping and stopped():
                    no_more = stopping = True
                    news.stop_begins()
            # Told apart from the rest, so that an error in making tasks is not taken for one of Dask.
            while not no_more and len(flying) < PER_THREAD * self._threads():
                task = next(tasks, _END)
                if task is _END:
                    no_more = True
                else:
                    payload = pickle.dumps((function, task))
                    ticket = next(tickets)
                    flying[ticket] = Flight(task, payload)
                    flying[ticket].future = self._submit(client, news, ticket, payload)
            if not flying and no_more:
                return
            ticket, future = news.next(TICK_S)
            flight = flying.get(ticket)
            if flight is not None and future is flight.future:
                with _understood(self._address):
                    landed = self._landed(client, news, ticket, flight, stopping=stopping)
                if landed is not None:
                    yield flight.task, landed[0]
            if limit_s is not None and news.is_empty():  # one that is done, and only not looked at, is not late
                for late in self._late(client, limit_s):
                    flight = flying.pop(late)
                    with _understood(self._address):
                        client.cancel([flight.future], force=True)
                        self._end_worker(client, flight.worker, flight.pid)
                    text = f"it took longer than {limit_s:g} s, and its worker was ended"
                    yield flight.task, OverdueError(text, flight.begins)

    def _late(self, client: Any, limit_s: float) -> list[int]:
        """Return the tickets of tasks that have run for too long."""

        def late() -> list[int]:
            now_s = time.monotonic()
            return [t for t, f in self._flying.items() if f.begun_s is not None and now_s > f.begun_s + limit_s]

        if late():
            with _understood(self._address):
                self._look(client)  # what lost its worker does not run, and has not begun anew
        return late()

    def _landed(self, client: Any, news: News, ticket: int, flight: Flight, *, stopping: bool) -> tuple[Any] | None:
        """Take a task out of those in flight and return its outcome; None for one that has to be begun again, or not.

        Raises
        ------
        BackendError
            If no task can be expected to fare better.
        """
        future, outcome = flight.future, None
        if future.status == "cancelled":
            raise self._lost()
        flight.begun_s = None
        if future.status == "error":
            exc = future.exception()
            if not isinstance(exc, distributed_module().KilledWorker):
                outcome = WorkerDiedError(f"Dask could not run it ({type(exc).__name__}: {exc})")
            elif flight.begins > exc.allowed_failures:
                text = f"{flight.begins} workers died with it, most often for lack of memory, or in a decoder"
                outcome = WorkerDiedError(text, flight.begins)
            # else it only stood in line behind what killed them: Dask counts that too
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
                del self._flying[ticket]
                return (pickle.loads(answer.outcome),)  # noqa: S301 - made by our own worker
            elif stopping:
                del self._flying[ticket]
                return None
        if outcome is None:
            flight.future = self._submit(client, news, ticket, flight.payload)
            return None
        del self._flying[ticket]
        return (outcome,)

    def _submit(self, client: Any, news: News, ticket: int, payload: bytes) -> Any:
        """Give a task to the scheduler; packed, because Dask would look into lists and tuples for tasks of its own."""
        resources = {"GPU": 1} if self._needs_gpu() else None
        with _understood(self._address):
            future = client.submit(do_task, news.name, ticket, payload, pure=False, resources=resources)
            news.expect(ticket, future)
            return future

    def _connected(self) -> Any:
        """Return a client of the scheduler, which is started if it is to be a local one."""
        distributed = distributed_module()
        self._address = self._started() if self.scheduler == LOCAL else _address(self.scheduler)
        # Of what it says every line is followed by an error of ours.
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        try:
            return distributed.Client(self._address, timeout=self._patience_s, set_as_default=False, name="gpuprep")
        except (OSError, ValueError, TypeError) as exc:
            raise BackendError(
                f"no Dask scheduler answers at {self._address} ({exc}): start one there with dask scheduler, or give "
                "the address of one that runs"
            ) from exc

    def _started(self) -> str:
        """Start a local cluster and return its address.

        In a process of its own: a script that uses us needs no guard against being run again by every worker, and
        nothing is found in the current folder that is not meant to be.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="gpuprep-dask-", ignore_cleanup_errors=True)
        # What it leaves behind when it is ended is tidied up, with a warning.
        ignored = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]))
        path = [str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]
        self._keeper = subprocess.Popen(  # noqa: S603 - our own Python
            [
                sys.executable,
                "-P",
                "-c",
                "from gpuprep.executors.dask_worker import keep; keep()",
                str(self.jobs),
                self._folder.name,
            ],
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
                "PYTHONSAFEPATH": "1",
                "PYTHONWARNINGS": ignored,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us; and a group can be ended as one
        )
        address = self._keeper.stdout.readline().strip() if self._keeper.stdout else ""
        if not address:
            raise BackendError("the local Dask scheduler ended as it started: what it said stands above")
        return address

    def _wait_for_workers(self, client: Any) -> None:
        """Return when there are workers; of a local cluster, all."""
        deadline_s = time.monotonic() + self._patience_s
        wanted = self.jobs if self.scheduler == LOCAL else 1
        while True:
            with _understood(self._address):
                self._look(client, patient=True)
            if self._threads() and len(self._workers) >= wanted:
                return
            if time.monotonic() > deadline_s:
                raise self._deserted()
            time.sleep(TICK_S)

    def _look(self, client: Any, *, patient: bool = False) -> None:
        """See which workers there are, and that new ones are such as we can use."""
        busy = [(flight, flight.worker) for flight in self._flying.values()]
        info: Any = client.scheduler_info(n_workers=-1)  # releases differ in how many they tell of by default
        self._workers = dict(info["workers"])
        if self._workers:
            self._seen_s = time.monotonic()
        elif not patient and time.monotonic() > self._seen_s + self._patience_s:
            raise self._deserted()
        new = [address for address in self._workers if address not in self._known]
        versions: Any = client.run(version_here, workers=new, on_error="return") if new else {}
        for address, version in versions.items():
            if isinstance(version, OSError):
                continue  # it has gone already
            if version != __version__:
                has = "no gpuprep that works" if isinstance(version, Exception) else f"gpuprep {version}"
                why = f" ({type(version).__name__}: {version})" if isinstance(version, Exception) else ""
                raise RequestError(
                    f"the Dask worker at {address} has {has}{why}, and here is gpuprep {__version__}: install the same "
                    "version in both places"
                )
            self._known.add(address)
        for flight, worker in busy:
            if worker == flight.worker and worker not in self._workers:
                flight.begun_s = None

    def _needs_gpu(self) -> bool:
        """Whether workers say what GPUs they have, and tasks want one."""
        return self._gpu and any(worker.get("resources", {}).get("GPU") for worker in self._workers.values())

    def _threads(self) -> int:
        """Return how many tasks can run at a time."""
        threads = 0
        for worker in self._workers.values():
            gpus = int(worker.get("resources", {}).get("GPU", 0))
            threads += min(gpus, worker["nthreads"]) if self._needs_gpu() else worker["nthreads"]
        return threads

    def _end_worker(self, client: Any, worker: str, pid: int) -> None:
        """Have a worker end in the middle of what it does; its nanny starts another.

        `Client.restart_workers` would ask it first, which one that hangs does not hear, and wait until it is back.
        """
        if self._workers.get(worker, {}).get("nanny"):
            with contextlib.suppress(KeyError):  # it has gone already
                client.run(os.kill, pid, KILL, workers=[worker], nanny=True, on_error="ignore")

    def _lost(self) -> BackendError:
        return BackendError(
            f"the Dask scheduler at {self._address} was lost: what is finished stays; run again when it is back"
        )

    def _deserted(self) -> BackendError:
        return BackendError(
            f"the Dask scheduler at {self._address} has had no workers for {self._patience_s:g} s: start some with "
            f"dask worker {self._address}"
        )


_END: Any = object()


@contextlib.contextmanager
def _understood(address: str) -> Iterator[None]:
    """Say in our words that the scheduler has gone."""
    try:
        yield
    except GpuprepError:
        raise
    except LOST as exc:
        raise BackendError(
            f"the Dask scheduler at {address} was lost ({type(exc).__name__}: {exc}): what is finished stays; run "
            "again when it is back"
        ) from exc


def _address(scheduler: str) -> str:
    """Return the address of a scheduler that is given by it or by its file."""
    if "://" in scheduler:
        return scheduler
    try:
        return str(json.loads(Path(scheduler).read_text())["address"])
    except (OSError, ValueError, LookupError, TypeError) as exc:
        raise RequestError(
            f"{scheduler!r} is no Dask scheduler ({type(exc).__name__}: {exc}): give local, an address such as "
            "tcp://node1:8786, or the file that dask scheduler --scheduler-file writes"
        ) from exc
