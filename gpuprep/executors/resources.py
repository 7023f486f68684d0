"""Chooses what computes: this process, workers on this machine or its GPUs, or those of a Dask cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpuprep.compute.backend import Backend, BackendName, get_backend, get_backends
from gpuprep.compute.memory_estimate import AT_REST_BYTES, CONTEXT_BYTES, for_volumes, host_bytes_free, workers
from gpuprep.errors import RequestError
from gpuprep.executors.cores import usable_cores
from gpuprep.executors.logs import quiet_libraries
from gpuprep.executors.processes import FOR_LOOPS, FOR_VOLUMES, Executor, Here, Place, Processes


@dataclass(frozen=True, slots=True)
class Means:
    """What runs the tasks of a run, and what it has for them."""

    backend: Backend
    executor: Executor
    workers: int
    room: int | None
    at_rest_bytes: int


def chosen_means(
    backend: BackendName | Backend, gpus: Sequence[int] | None, scheduler: str | None, jobs: int | None, share: float
) -> Means:
    """Return what runs the tasks."""
    if scheduler is not None:
        from gpuprep.executors.dask import Cluster
        from gpuprep.executors.dask_worker import elsewhere

        if not isinstance(backend, str):
            raise RequestError("the workers of a scheduler open their backend themselves: give its name")
        there = elsewhere() if backend == "gpu" else get_backend("cpu")
        cluster = Cluster(scheduler, jobs, gpu=backend == "gpu")
        return Means(there, cluster, cluster.jobs, None, AT_REST_BYTES[there.body])
    return means_of(get_backends(backend, gpus) if isinstance(backend, str) else [backend], jobs, share)


def means_of(
    backends: Sequence[Backend], jobs: int | None, share: float, preload: tuple[str, ...] | None = None
) -> Means:
    """Return the executor that computes on the host, or on some GPUs, and its room for volumes."""
    backend = backends[0].alone()
    preload = preload or (FOR_LOOPS if backend.body == "loops" else FOR_VOLUMES)
    if backend.free_bytes() is None:
        at_rest = AT_REST_BYTES[backend.body]
        if jobs is None:
            return Means(backend, Here(), 1, None, at_rest)
        free = host_bytes_free()
        room = None if free is None else for_volumes(free, jobs, at_rest, share)
        return Means(backend, Processes([Place(jobs, room)], quiet_libraries, preload), jobs, room, at_rest)
    places = []
    for n, device in enumerate(backends):
        free = device.free_bytes() or 0
        # Cores, or what was asked for, are dealt out to the devices.
        hands = workers(free, ((jobs or usable_cores()) + n) // len(backends))
        places.append(Place(hands, for_volumes(free, hands, CONTEXT_BYTES, share), device.environment()))
    count, room = sum(p.workers for p in places), sum(p.room or 0 for p in places)
    return Means(backend, Processes(places, quiet_libraries, preload), count, room, CONTEXT_BYTES)
