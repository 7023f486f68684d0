"""Runs in the other processes of a Dask cluster: the tasks of a worker, and the keeper of a local cluster."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any, Literal, cast

from gpuprep._version import __version__
from gpuprep.compute.backend import Backend, BackendName, Body, get_backend
from gpuprep.errors import BackendError
from gpuprep.executors.logs import quiet_libraries
from gpuprep.executors.processes import FOR_VOLUMES, is_last_task

log = logging.getLogger(__name__)


GRACE_S = 2.0
"""How long a local cluster may take to end."""


@dataclass(slots=True)
class Elsewhere:
    """A GPU that is opened where the task runs; in its stead in the client, which may have none.

    What a client may want to change, the slices of a chunk, is what the worker then uses.
    """

    name: BackendName = "gpu"
    device: str = ""
    body: Body = "matmul"
    chunk_slices: int = 64
    slab_slices: int = 32
    block_rows: int = 128

    def free_bytes(self) -> None:
        """Return None: nobody has asked the workers, and each has its own."""
        return

    def opened(self) -> Backend:
        """Return the backend of this process that it stands for."""
        backend = copy(_opened(self.name))
        backend.chunk_slices, backend.slab_slices = self.chunk_slices, self.slab_slices
        return backend


def elsewhere() -> Backend:
    """Return the GPU that each worker has, for tasks to carry there; nothing can be computed with it here."""
    return cast(Backend, Elsewhere())


_opened = cache(get_backend)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker says of a task."""

    kind: Literal["done", "raised", "not begun", "no backend"]
    worker: str
    pid: int
    outcome: Any = None
    """Pickled if it is done; else a text."""
    last: bool = False
    """Whether the worker is in no state to do more."""


def distributed_module() -> Any:
    """Return Dask's module, which takes its time to import, and is an extra."""
    try:
        return import_module("distributed")
    except ImportError as exc:
        raise BackendError(f"Dask is not installed ({exc}): pip install 'gpuprep[dask]'") from exc


KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


def keep() -> None:
    """Be a local cluster until standard input ends; the process that `Cluster` starts for it."""
    distributed = distributed_module()
    jobs, folder = int(sys.argv[1]), sys.argv[2]
    import_module("dask").config.set(
        {
            "distributed.scheduler.allowed-failures": 1,
            "distributed.worker.profile.enabled": False,
            # Else one that dies again after just that long is taken for lost, and not started any more.
            "distributed.deploy.lost-worker-timeout": "1000 days",
        }
    )
    cluster = distributed.LocalCluster(
        n_workers=0,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",  # of the server that Dask has in any case
        scheduler_kwargs={"dashboard": False},
        memory_limit=0,
        silence_logs=logging.CRITICAL,
        local_directory=folder,
    )
    print(cluster.scheduler_address, flush=True)  # noqa: T201 - to who started us
    os.dup2(2, 1)  # what workers print is not for him
    cluster.scale(jobs)
    sys.stdin.read()
    _signal_group(os.getpid(), signal.SIGTERM)


def end_keeper(keeper: subprocess.Popen[str]) -> None:
    """End a local cluster and its workers, whatever they do."""
    _signal_group(keeper.pid, signal.SIGTERM)  # the helper of `multiprocessing` that tidies up behind it lives on …
    deadline_s = time.monotonic() + GRACE_S
    while time.monotonic() < deadline_s and _signal_group(keeper.pid, 0):
        keeper.poll()
        time.sleep(0.01)
    _signal_group(keeper.pid, KILL)  # … for as long as it takes
    for stream in (keeper.stdin, keeper.stdout):
        if stream is not None:
            stream.close()
    keeper.wait()


def _signal_group(leader: int, number: int) -> bool:
    """Send a signal to a process and those it has started; return whether there are any.

    Where there are no groups it is for the process alone: without it, workers end by themselves.
    """
    try:
        if hasattr(os, "killpg"):
            os.killpg(leader, number)
        elif number:
            os.kill(leader, number)
    except (ProcessLookupError, PermissionError):
        return False
    return hasattr(os, "killpg")


def version_here() -> str:
    """Return the version of gpuprep; runs in the worker."""
    return __version__


@cache
def _prepare() -> None:
    """Make of a worker of Dask one like ours, before its first task."""
    from threadpoolctl import threadpool_limits

    quiet_libraries()
    for name in FOR_VOLUMES:
        import_module(name)  # a limit holds for the libraries that are there
    threadpool_limits(1)


def do_task(run: str, ticket: int, payload: bytes) -> Answer:
    """Do a task; runs in the worker."""
    distributed = distributed_module()
    worker, client = distributed.get_worker().address, distributed.get_client()
    if is_last_task() or distributed.Event(run, client=client).is_set():
        return Answer("not begun", worker, os.getpid(), last=is_last_task())
    _prepare()
    # Returns when the scheduler has it, so that no task ends its worker before it is known to have begun.
    client.log_event(run, (ticket, worker, os.getpid()))
    function, task = pickle.loads(payload)  # noqa: S301 - made by our own client
    placeholder = getattr(task, "backend", None)
    if isinstance(placeholder, Elsewhere):
        try:
            task = replace(task, backend=placeholder.opened())
        except BackendError as exc:
            return Answer("no backend", worker, os.getpid(), str(exc))
    try:
        outcome = pickle.dumps(function(task))
    except BaseException as exc:  # SystemExit too: what it ends is a task, as it would be in a worker of ours
        log.exception("a task raised an exception")
        return Answer("raised", worker, os.getpid(), f"{type(exc).__name__}: {exc}", is_last_task())
    return Answer("done", worker, os.getpid(), outcome, is_last_task())
