"""Starts and ends the fork server, from which workers are forked with their modules already imported."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

from gpuprep.executors.signals import signals_blocked

HEADER_MODULES = ("gpuprep.dicom.headers", "threadpoolctl")
_SERIES_MODULES = (
    *HEADER_MODULES,
    "gpuprep.compute.process",
    "gpuprep.dicom.read",
    "gpuprep.output.writers",
    "gpuprep.pipeline.convert_series",
)
VOLUME_MODULES = (*_SERIES_MODULES, "scipy.ndimage")  # SciPy computes the matrices that replace the loops
LOOP_MODULES = (*_SERIES_MODULES, "gpuprep.compute.numba_warmup")
"""Modules that workers need. The fork server imports them once, so workers share its memory pages."""

WORKER_VARIABLES = {
    "PYTHONSAFEPATH": "1",  # no module is imported from the current folder, which may hold a pydicom.py
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",  # otherwise each fork starts its threads again, which spin for a tenth of a second
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
}
"""Environment variables of workers: one process per core is faster than several threads in each."""

HAVE_FORK_SERVER = "forkserver" in multiprocessing.get_all_start_methods()


def start_fork_server(preload: tuple[str, ...]) -> None:
    """Start the fork server, which imports modules for workers while this process goes on.

    Without this call it is started with the first worker, which waits for the imports.
    """
    if HAVE_FORK_SERVER:
        resource_tracker.ensure_running()
        forkserver.set_forkserver_preload(list(preload))
        with starting_process():
            forkserver.ensure_running()


def kill_fork_server() -> None:
    """End the fork server at once. Otherwise it would first finish its imports, and keep standard output open."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


_starting = threading.Lock()


@contextlib.contextmanager
def starting_process() -> Iterator[None]:
    """Prepare this process for the start of another one, and restore it afterwards; one thread at a time."""
    with _starting, _hidden_main_module(), _worker_environment(), signals_blocked():
        yield


@contextlib.contextmanager
def _hidden_main_module() -> Iterator[None]:
    """Keep a new worker from importing the main script, so that scripts need no ``if __name__ == "__main__"``.

    Tasks are never defined in the main script.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """Set `WORKER_VARIABLES` for processes that are started."""
    former = {name: os.environ.get(name) for name in WORKER_VARIABLES}
    os.environ.update(WORKER_VARIABLES)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
