"""Code for the other processes of a Dask cluster: tasks on a worker, and the process that holds a local cluster."""

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
from gpuprep.executors.fork_server import VOLUME_MODULES
from gpuprep.executors.logs import quiet_libraries
from gpuprep.executors.processes import replacement_requested

log = logging.getLogger(__name__)


GRACE_S = 2.0
"""Time that a local cluster may take to end before it is killed."""


@dataclass(slots=True)
class RemoteBackend:
    """Placeholder in the client, which may have no GPU, for a backend that the worker opens.

    The worker takes the slices per chunk and per slab from the placeholder, so the client can change them.
    """

    name: BackendName = "gpu"
    device: str = ""
    body: Body = "kernels"
    chunk_slices: int = 64
    slab_slices: int = 32

    def free_bytes(self) -> None:
        """Return None, since the memory of the workers is unknown."""
        return

    def opened(self) -> Backend:
        """Return the backend of this process, with the placeholder's slices per chunk and slab."""
        backend = copy(_cached_backend(self.name))
        backend.chunk_slices, backend.slab_slices = self.chunk_slices, self.slab_slices
        return backend


def remote_gpu() -> Backend:
    """Return a placeholder for the GPU of a worker; it cannot compute in the client."""
    return cast(Backend, RemoteBackend())


_cached_backend = cache(get_backend)


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer of a worker to a task."""

    kind: Literal["done", "raised", "not started", "no backend"]
    worker: str
    """Address of the worker."""
    pid: int
    """Process of the worker."""
    outcome: Any = None
    """Pickled outcome of a task that is done; else the text of the error."""
    last: bool = False
    """Whether the worker has to be replaced."""


def distributed_module() -> Any:
    """Return the module `distributed`, imported late because it is slow to import and an extra."""
    try:
        return import_module("distributed")
    except ImportError as exc:
        raise BackendError(f"Dask is not installed ({exc}): pip install 'gpuprep[dask]'") from exc


KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


def run_local_cluster() -> None:
    """Run a local cluster until standard input ends; the main function of the process that `Cluster` starts."""
    distributed = distributed_module()
    jobs, folder = int(sys.argv[1]), sys.argv[2]
    import_module("dask").config.set(
        {
            "distributed.scheduler.allowed-failures": 1,
            "distributed.worker.profile.enabled": False,
            # A worker that dies again after this timeout counts as lost, and its nanny does not restart it.
            "distributed.deploy.lost-worker-timeout": "1000 days",
        }
    )
    cluster = distributed.LocalCluster(
        n_workers=0,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",  # Dask starts this server even without a dashboard
        scheduler_kwargs={"dashboard": False},
        memory_limit=0,
        silence_logs=logging.CRITICAL,
        local_directory=folder,
    )
    print(cluster.scheduler_address, flush=True)  # noqa: T201 - read by the parent
    os.dup2(2, 1)  # output of workers must not go to the parent
    cluster.scale(jobs)
    sys.stdin.read()
    _signal_group(os.getpid(), signal.SIGTERM)


def end_local_cluster(process: subprocess.Popen[str]) -> None:
    """End the process of a local cluster and its workers, even in the middle of tasks."""
    # The resource tracker of `multiprocessing` survives SIGTERM, and gets time to clean up before the kill.
    _signal_group(process.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + GRACE_S
    while time.monotonic() < deadline_s and _signal_group(process.pid, 0):
        process.poll()
        time.sleep(0.01)
    _signal_group(process.pid, KILL)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    process.wait()


def _signal_group(leader: int, number: int) -> bool:
    """Send a signal to a process group; return whether the group exists.

    On systems without process groups only the leader gets the signal, and its workers then end by themselves.
    """
    try:
        if hasattr(os, "killpg"):
            os.killpg(leader, number)
        elif number:
            os.kill(leader, number)
    except (ProcessLookupError, PermissionError):
        return False
    return hasattr(os, "killpg")


def worker_version() -> str:
    """Return the version of gpuprep of this worker."""
    return __version__


@cache
def _prepare() -> None:
    """Set up a Dask worker like a worker of `ProcessExecutor`, before its first task."""
    from threadpoolctl import threadpool_limits

    quiet_libraries()
    for name in VOLUME_MODULES:
        import_module(name)  # the limit applies only to libraries that are loaded
    threadpool_limits(1)


def run_task(run: str, ticket: int, payload: bytes) -> Answer:
    """Run a task in the worker, and return its answer."""
    distributed = distributed_module()
    worker, client = distributed.get_worker().address, distributed.get_client()
    if replacement_requested() or distributed.Event(run, client=client).is_set():
        return Answer("not started", worker, os.getpid(), last=replacement_requested())
    _prepare()
    # This call waits for the scheduler, so that the start is known before the task can kill its worker.
    client.log_event(run, (ticket, worker, os.getpid()))
    function, task = pickle.loads(payload)  # noqa: S301 - made by gpuprep's own client
    placeholder = getattr(task, "backend", None)
    if isinstance(placeholder, RemoteBackend):
        try:
            task = replace(task, backend=placeholder.opened())
        except BackendError as exc:
            return Answer("no backend", worker, os.getpid(), str(exc))
    try:
        outcome = pickle.dumps(function(task))
    except BaseException as exc:  # SystemExit, too, ends only the task
        log.exception("a task raised an exception")
        return Answer("raised", worker, os.getpid(), f"{type(exc).__name__}: {exc}", replacement_requested())
    return Answer("done", worker, os.getpid(), outcome, replacement_requested())
