"""Defines and opens the compute backends: NumPy on the host, or CuPy on a GPU.

Kernels take the array namespace of their arguments. A backend adds host-device transfers, the element-wise passes that
a GPU fuses, and the library calls of the ``ndimage`` engine, whose names differ between the libraries.
`gpuprep.compute.cupy_backend` is imported only when a GPU is requested.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, Protocol, Self, cast, get_args

import numpy as np
from numpy.typing import NDArray

from gpuprep.core import hounsfield
from gpuprep.errors import BackendError, RequestError

log = logging.getLogger(__name__)

BackendName = Literal["auto", "cpu", "gpu"]
Engine = Literal["operators", "ndimage"]
"""Resampling method: banded matrices, or calls to SciPy, scikit-image and their GPU counterparts."""
CACHE_REMEDY = "set CUPY_CACHE_DIR to a folder that can be written"
"""Remedy if CuPy cannot cache its compiled kernels."""

Body = Literal["kernels", "loops", "matmul"]
"""Implementation of the engine ``operators``: a CUDA kernel, CPU loops compiled by Numba, or matrix products of any
array library."""


class Transfers(Protocol):
    """Host-device transfers of one series: see `gpuprep.compute.pinned_transfer`."""

    def uploads(self, read: Callable[..., NDArray[Any]], spans: Sequence[tuple[int, int]]) -> Iterator[Any]:
        """Yield ``read(start, stop)`` of each span as an array of the backend."""
        ...

    def downloads(self, chunks: Iterator[Any]) -> Iterator[NDArray[Any]]:
        """Yield arrays of the backend as NumPy arrays, each valid until the next is requested."""
        ...

    def seconds(self) -> dict[str, float]:
        """Return the device time of each stage, "upload_s", "kernels_s" and "download_s"; call it after the last chunk.

        Empty on the host.
        """
        ...


class Backend(Protocol):
    """Compute device and its array operations. Instances can be pickled and sent to worker processes."""

    name: str
    device: str
    chunk_slices: int
    """Output slices per chunk along z. Larger chunks read source slices less often."""
    slab_slices: int
    """Slices per upload, and per pass through window and resize: few stay in a CPU's cache, more keep a GPU busy."""
    body: Body
    """Implementation of the engine ``operators``."""

    def session(self) -> AbstractContextManager[Transfers]:
        """Make the device and a new stream current in this thread, for the work on one volume.

        Raises DeviceMemoryError or DeviceLostError for errors of the device.
        """
        ...

    def free_bytes(self) -> int | None:
        """Return the free memory of the device in bytes; None for the host."""
        ...

    def environment(self) -> dict[str, str]:
        """Return the environment variables that make this device the only one that a new process sees."""
        ...

    def alone(self) -> Self:
        """Return this backend for a process with that `environment`, where the device is the first one."""
        ...

    def to_device(self, host: Any) -> Any:
        """Return a small host array as an array of this backend."""
        ...

    def to_hu(self, stored: Any, slope: Any, intercept: Any, padding: Any, rule: str) -> Any:
        """Return the result of `gpuprep.core.hounsfield.to_hu`, perhaps computed in one pass."""
        ...

    def finish(self, values: Any, window: tuple[float, float, float, float] | None, dtype: str) -> Any:
        """Return the result of `gpuprep.core.hounsfield.finish`, perhaps computed in one pass."""
        ...

    def zoom(self, values: Any, factors: Sequence[float], *, order: int, mode: str, grid_mode: bool) -> Any:
        """Call `scipy.ndimage.zoom` or its CuPy counterpart."""
        ...

    def gaussian_filter(self, values: Any, sigma: Sequence[float], *, mode: str) -> Any:
        """Call `scipy.ndimage.gaussian_filter` or its CuPy counterpart."""
        ...

    def resize(self, values: Any, shape: Sequence[int], *, mode: str, anti_aliasing: bool) -> Any:
        """Call `skimage.transform.resize` or its cuCIM counterpart: linear interpolation, value range preserved."""
        ...


def spans_of(count: int, step: int) -> Iterator[tuple[int, int]]:
    """Return spans [start, stop) of length `step` that cover `count`; the last one may be shorter."""
    return ((start, min(start + step, count)) for start in range(0, count, step))


class NoTransfers:
    """No-op transfers for backends that compute on the host."""

    def uploads(self, read: Callable[..., NDArray[Any]], spans: Sequence[tuple[int, int]]) -> Iterator[Any]:
        return (read(start, stop) for start, stop in spans)

    def downloads(self, chunks: Iterator[Any]) -> Iterator[NDArray[Any]]:
        return chunks

    def seconds(self) -> dict[str, float]:
        return {}


class NumpyBackend:
    """CPU backend: NumPy, SciPy and scikit-image, or loops compiled by Numba. Arrays stay where they are."""

    name = "cpu"
    device = "cpu"
    chunk_slices = 16

    def __init__(self, body: Body | None = None) -> None:
        self.body: Body = body or ("loops" if numba_works() else "matmul")
        # Loops process one slice at a time in the cache; a matrix product needs a few slices to be worth its call.
        self.slab_slices = 1 if self.body == "loops" else 4

    def session(self) -> AbstractContextManager[Transfers]:
        return nullcontext(NoTransfers())

    def free_bytes(self) -> None:
        return None

    def environment(self) -> dict[str, str]:
        return {}

    def alone(self) -> Self:
        return self

    def to_device(self, host: Any) -> Any:
        return host

    def to_hu(self, stored: Any, slope: Any, intercept: Any, padding: Any, rule: str) -> Any:
        if self.body == "matmul" or rule != "air":
            return hounsfield.to_hu(stored, slope, intercept, padding, rule)
        hu = np.empty(stored.shape, dtype=np.float32)
        limits = np.iinfo(stored.dtype)
        if padding is None:
            padding = np.array([[limits.max, limits.min]] * len(stored), dtype=stored.dtype)  # empty ranges
        compiled_loops().to_hu(stored, slope, intercept, padding, hu)
        return hu

    def finish(self, values: Any, window: tuple[float, float, float, float] | None, dtype: str) -> Any:
        return hounsfield.finish(values, window, dtype)

    def zoom(self, values: Any, factors: Sequence[float], *, order: int, mode: str, grid_mode: bool) -> Any:
        from scipy import ndimage

        return ndimage.zoom(values, factors, order=order, mode=mode, grid_mode=grid_mode)

    def gaussian_filter(self, values: Any, sigma: Sequence[float], *, mode: str) -> Any:
        from scipy import ndimage

        return ndimage.gaussian_filter(values, sigma, mode=mode)

    def resize(self, values: Any, shape: Sequence[int], *, mode: str, anti_aliasing: bool) -> Any:
        from skimage.transform import resize

        resized = resize(
            values, shape, order=1, mode=mode, clip=False, preserve_range=True, anti_aliasing=anti_aliasing
        )
        return np.asarray(resized, dtype=values.dtype)


def numba_works() -> bool:
    """Whether Numba is installed and not disabled. Does not import it."""
    return find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")


def compiled_loops() -> Any:
    """Return the module `gpuprep.compute.numba_kernels`; warn once if compiled loops cannot be cached on disk."""
    loops = import_loops()
    if loops.uncached.is_set():
        _warn_uncached()
    return loops


@cache
def _warn_uncached() -> None:
    log.warning("compiling the inner loops takes ten to thirty seconds in every run: %s", import_loops().why_uncached())


def import_loops() -> Any:
    """Import and return `gpuprep.compute.numba_kernels`. Numba is an optional dependency and slow to import."""
    try:
        from gpuprep.compute import numba_kernels
    except Exception as exc:  # Numba checks its environment on import and may raise any exception
        raise BackendError(
            f"Numba is installed but cannot be imported ({exc}): reinstall it with pip install 'gpuprep[fast]', or set "
            "NUMBA_DISABLE_JIT=1 to run without it"
        ) from exc
    return numba_kernels


def checked_engine(name: str) -> Engine:
    """Return the name if it is one of an engine; raise a RequestError otherwise."""
    if name not in get_args(Engine):
        raise RequestError(f"there is no engine {name!r}: choose one of {', '.join(get_args(Engine))}")
    return cast(Engine, name)


def get_backend(name: BackendName = "auto") -> Backend:
    """Return the backend with this name.

    Parameters
    ----------
    name : {"auto", "cpu", "gpu"}
        "auto" uses the GPU if one works, and otherwise the CPU, with one warning in the log; "gpu" never falls back.

    Raises
    ------
    BackendError
        If "gpu" is requested and cannot run; the message has the reason and the remedy.
    """
    if name not in ("auto", "cpu", "gpu"):
        raise BackendError(f"there is no backend {name!r}: choose auto, cpu or gpu")
    if name == "cpu":
        return NumpyBackend()
    return open_gpus([0])[0] if name == "gpu" else _gpu_or_cpu()


def get_backends(name: BackendName = "auto", gpus: Sequence[int] | None = None) -> list[Backend]:
    """Return one backend for each of the given GPUs, or for all visible GPUs; on the CPU, a single one.

    Raises
    ------
    BackendError
        As `get_backend`.
    RequestError
        If GPUs are given and the backend is the CPU.
    """
    backend = get_backend(name)
    if backend.name == "gpu":
        return open_gpus(gpus)
    if gpus is not None:
        raise RequestError(f"gpus = {','.join(map(str, gpus))} does not apply: the backend is the CPU; omit gpus")
    return [backend]


@cache
def _gpu_or_cpu() -> Backend:
    """Look for a GPU once per process; without one, log a warning and return the CPU backend."""
    try:
        return open_gpus([0])[0]
    except BackendError as exc:
        log.warning("no GPU, so the CPU computes: %s", exc)
        return NumpyBackend()


def open_gpus(ordinals: Sequence[int] | None = None) -> list[Backend]:
    """Return a CuPy backend for each of the given GPUs, or for all visible GPUs.

    Raises
    ------
    BackendError
        If CuPy is missing, or one of the GPUs cannot be used; the message has the reason and the remedy.
    """
    module = import_cupy_backend()
    count = max(1, module.device_count())
    return [module.CupyBackend(n) for n in (range(count) if ordinals is None else dict.fromkeys(ordinals))]


def import_cupy_backend() -> Any:
    """Import and return `gpuprep.compute.cupy_backend`.

    Raises
    ------
    BackendError
        If CuPy is missing or cannot be imported; the message has the reason and the remedy.
    """
    try:
        from gpuprep.compute import cupy_backend
    except ImportError as exc:
        raise BackendError(
            f"CuPy is not installed ({exc}): pip install 'gpuprep[cuda12]' or 'gpuprep[cuda13]'"
        ) from exc
    except OSError as exc:
        # CuPy creates its kernel cache folder on import.
        hint = CACHE_REMEDY if exc.filename else "install CuPy again"
        raise BackendError(f"CuPy cannot be imported ({exc}): {hint}") from exc
    return cupy_backend


def check_engine(backend: Backend, engine: Engine) -> None:
    """Raise a BackendError if the backend lacks a library that the engine needs."""
    if backend.name == "gpu" and engine == "ndimage":
        import_cupy_backend().check_ndimage()
