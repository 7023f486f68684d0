"""Chooses the executor of a run: this process, worker processes on this machine or its GPUs, or a Dask cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpuprep.compute.backend import Backend, BackendName, get_backend, get_backends
from gpuprep.compute.memory_estimate import (
    AT_REST_BYTES,
    CONTEXT_BYTES,
    host_bytes_free,
    volume_memory_bytes,
    worker_count,
)
from gpuprep.errors import RequestError
from gpuprep.executors.cores import usable_cores
from gpuprep.executors.fork_server import LOOP_MODULES, VOLUME_MODULES
from gpuprep.executors.logs import quiet_libraries
from gpuprep.executors.processes import (
    Executor,
    InProcessExecutor,
    ProcessExecutor,
    WorkerGroup,
)


@dataclass(frozen=True, slots=True)
class Resources:
    """Backend, executor, worker count and memory budget of a run."""

    backend: Backend
    """Backend that tasks carry to their worker."""
    executor: Executor
    """Executor of the tasks."""
    workers: int
    """Number of tasks that run at the same time."""
    budget_bytes: int | None
    """Bytes of memory that all volumes in flight share; None if unlimited or unknown."""
    at_rest_bytes: int
    """Bytes of memory of a worker without a volume."""


def choose_resources(
    backend: BackendName | Backend, gpus: Sequence[int] | None, scheduler: str | None, jobs: int | None, share: float
) -> Resources:
    """Return executor, worker count and memory budget for the options of a run.

    Raises
    ------
    RequestError
        If `backend` is an object although a Dask scheduler is given.
    """
    if scheduler is not None:
        from gpuprep.executors.dask import Cluster
        from gpuprep.executors.dask_worker import remote_gpu

        if not isinstance(backend, str):
            raise RequestError("Dask workers open their backend themselves: give the name of the backend")
        remote = remote_gpu() if backend == "gpu" else get_backend("cpu")
        cluster = Cluster(scheduler, jobs, gpu=backend == "gpu")
        return Resources(remote, cluster, cluster.jobs, None, AT_REST_BYTES[remote.body])
    return local_resources(get_backends(backend, gpus) if isinstance(backend, str) else [backend], jobs, share)


def local_resources(
    backends: Sequence[Backend], jobs: int | None, share: float, preload: tuple[str, ...] | None = None
) -> Resources:
    """Return executor, worker count and memory budget on this machine: on the host, or on some GPUs."""
    backend = backends[0].alone()
    preload = preload or (LOOP_MODULES if backend.body == "loops" else VOLUME_MODULES)
    if backend.free_bytes() is None:
        at_rest = AT_REST_BYTES[backend.body]
        if jobs is None:
            return Resources(backend, InProcessExecutor(), 1, None, at_rest)
        free = host_bytes_free()
        budget_bytes = None if free is None else volume_memory_bytes(free, jobs, at_rest, share)
        return Resources(
            backend,
            ProcessExecutor([WorkerGroup(jobs, budget_bytes)], quiet_libraries, preload),
            jobs,
            budget_bytes,
            at_rest,
        )
    groups = []
    for n, device in enumerate(backends):
        free = device.free_bytes() or 0
        # The requested workers, by default one per core, are divided evenly among the devices.
        count = worker_count(free, ((jobs or usable_cores()) + n) // len(backends))
        groups.append(WorkerGroup(count, volume_memory_bytes(free, count, CONTEXT_BYTES, share), device.environment()))
    count, budget_bytes = sum(p.workers for p in groups), sum(p.budget_bytes or 0 for p in groups)
    return Resources(backend, ProcessExecutor(groups, quiet_libraries, preload), count, budget_bytes, CONTEXT_BYTES)
