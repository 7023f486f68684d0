"""Opens the backends that compute: NumPy on the host, or CuPy on a GPU.

Kernels take their namespace from the array they are given. What a backend adds is the way there and back, the passes
over voxels that a GPU fuses, and the library calls of the ``ndimage`` engine, which have other names on each side.
`gpuprep.compute.cupy_backend` is imported only when a GPU is asked for.
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
"""How the arithmetic is done on either: banded matrices, or the libraries' own calls."""
Body = Literal["matmul", "loops"]
"""How banded matrices are applied: by an array library, or on the host by loops that Numba compiles."""


class Lane(Protocol):
    """The way of one series to where it is computed and back: see `gpuprep.compute.pinned_transfer`."""

    def uploads(self, read: Callable[..., NDArray[Any]], spans: Sequence[tuple[int, int]]) -> Iterator[Any]:
        """Yield ``read(start, stop)`` of each span as an array of the backend."""
        ...

    def downloads(self, chunks: Iterator[Any]) -> Iterator[NDArray[Any]]:
        """Yield arrays of the backend as NumPy, each valid until the next is asked for."""
        ...

    def seconds(self) -> dict[str, float]:
        """Return the time spent in each stage on a device, "upload_s", "kernels_s" and "download_s", after the last."""
        ...


class Backend(Protocol):
    """What `process` needs to know of the machine under it. An instance travels to worker processes."""

    name: str
    device: str
    chunk_slices: int
    """Output slices made at a time along z: the more, the less often the source slices are read."""
    slab_slices: int
    """Slices that then go through window and resize at a time: few stay in a CPU's cache, more keep a GPU busy."""
    block_rows: int
    """Rows of an in-plane operator multiplied at a time: the more, the fewer calls and the more zeros in them."""
    body: Body
    """What does the arithmetic of the engine ``operators``."""

    def session(self) -> AbstractContextManager[Lane]:
        """Make the device and a stream of its own current in this thread; around the work on one volume.

        Raises DeviceMemoryError or DeviceLostError for what went wrong on the device.
        """
        ...

    def free_bytes(self) -> int | None:
        """Return how much memory the device has to give; None where that is the host's."""
        ...

    def environment(self) -> dict[str, str]:
        """Return the variables with which a process that is about to start sees this device alone, as its first."""
        ...

    def alone(self) -> Self:
        """Return this backend as such a process takes it."""
        ...

    def to_device(self, host: Any) -> Any:
        """Return a small host array as an array of this backend."""
        ...

    def to_hu(self, stored: Any, slope: Any, intercept: Any, padding: Any, rule: str) -> Any:
        """Return `gpuprep.core.hounsfield.to_hu`, or the same in one pass."""
        ...

    def finish(self, values: Any, window: tuple[float, float, float, float] | None, dtype: str) -> Any:
        """Return `gpuprep.core.hounsfield.finish`, or the same in one pass."""
        ...

    def zoom(self, values: Any, factors: Sequence[float], *, order: int, mode: str, grid_mode: bool) -> Any:
        """Return `scipy.ndimage.zoom`, or its namesake on the device."""
        ...

    def gaussian_filter(self, values: Any, sigma: Sequence[float], *, mode: str) -> Any:
        """Return `scipy.ndimage.gaussian_filter`, or its namesake on the device."""
        ...

    def resize(self, values: Any, shape: Sequence[int], *, mode: str, anti_aliasing: bool) -> Any:
        """Return `skimage.transform.resize`, linear and with the range kept, or its namesake on the device."""
        ...


class Direct:
    """No way at all: what is read is where it is computed, and what is computed is where it is written."""

    def uploads(self, read: Callable[..., NDArray[Any]], spans: Sequence[tuple[int, int]]) -> Iterator[Any]:
        return (read(start, stop) for start, stop in spans)

    def downloads(self, chunks: Iterator[Any]) -> Iterator[NDArray[Any]]:
        return chunks

    def seconds(self) -> dict[str, float]:
        return {}


class NumpyBackend:
    """NumPy, SciPy and scikit-image; going to the device and back is the identity."""

    name = "cpu"
    device = "cpu"
    chunk_slices = 16
    block_rows = 32

    def __init__(self, body: Body | None = None) -> None:
        self.body: Body = body or ("loops" if numba_works() else "matmul")
        # Loops take a slice at a time through the cache; products are worth their calls from a few on.
        self.slab_slices = 1 if self.body == "loops" else 4

    def session(self) -> AbstractContextManager[Lane]:
        return nullcontext(Direct())

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
        nothing = np.array([[limits.max, limits.min]] * len(stored), dtype=stored.dtype)
        compiled_loops().to_hu(stored, slope, intercept, nothing if padding is None else padding, hu)
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
    """Whether Numba is there to compile loops; nothing is imported for it."""
    return find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")


def compiled_loops() -> Any:
    """Return `gpuprep.compute.numba_kernels`, and say once if every run has to compile them anew."""
    loops = imported_loops()
    if loops.unkept.is_set():
        _say_unkept()
    return loops


@cache
def _say_unkept() -> None:
    log.warning("compiling the inner loops takes ten to thirty seconds in every run: %s", imported_loops().why_unkept())


def imported_loops() -> Any:
    """Return `gpuprep.compute.numba_kernels`; Numba takes its time to import, and is an extra."""
    try:
        from gpuprep.compute import numba_kernels
    except Exception as exc:  # Numba checks its surroundings when it is imported, and raises what it likes
        raise BackendError(
            f"Numba is installed and does not work ({exc}): pip install 'gpuprep[fast]' again, or set "
            "NUMBA_DISABLE_JIT=1 to do without it"
        ) from exc
    return numba_kernels


def checked_engine(name: str) -> Engine:
    """Return the name of an engine, or raise a RequestError."""
    if name not in get_args(Engine):
        raise RequestError(f"there is no engine {name!r}: choose one of {', '.join(get_args(Engine))}")
    return cast(Engine, name)


def get_backend(name: BackendName = "auto") -> Backend:
    """Return the backend of that name.

    Parameters
    ----------
    name : {"auto", "cpu", "gpu"}
        "auto" takes the GPU where one works and says once, in the log, why not otherwise; "gpu" never falls back.

    Raises
    ------
    BackendError
        If "gpu" is asked for and cannot run, with the reason and the remedy.
    """
    if name not in ("auto", "cpu", "gpu"):
        raise BackendError(f"there is no backend {name!r}: choose auto, cpu or gpu")
    if name == "cpu":
        return NumpyBackend()
    return open_gpus([0])[0] if name == "gpu" else _gpu_or_cpu()


def get_backends(name: BackendName = "auto", gpus: Sequence[int] | None = None) -> list[Backend]:
    """Return the backend of that name, once for each of some GPUs, or of all that can be seen.

    Raises
    ------
    BackendError
        As `get_backend`.
    RequestError
        If GPUs are named and nothing computes on one.
    """
    backend = get_backend(name)
    if backend.name == "gpu":
        return open_gpus(gpus)
    if gpus is not None:
        raise RequestError(f"gpus = {','.join(map(str, gpus))}: the CPU computes here, so leave them out")
    return [backend]


@cache
def _gpu_or_cpu() -> Backend:
    """Look for a GPU once per process, and say once that there is none."""
    try:
        return open_gpus([0])[0]
    except BackendError as exc:
        log.warning("no GPU, so the CPU computes: %s", exc)
        return NumpyBackend()


def open_gpus(ordinals: Sequence[int] | None = None) -> list[Backend]:
    """Return a CuPy backend for each of some GPUs, or of all that can be seen.

    Raises
    ------
    BackendError
        If CuPy or cuCIM is missing, or one of the GPUs cannot be used, with the reason and the remedy.
    """
    try:
        from gpuprep.compute.cupy_backend import CupyBackend, device_count
    except ImportError as exc:
        raise BackendError(
            f"CuPy or cuCIM is not installed ({exc}): pip install 'gpuprep[cuda12]' or 'gpuprep[cuda13]'"
        ) from exc
    except OSError as exc:
        # CuPy makes its folder of compiled kernels when it is imported.
        hint = "set CUPY_CACHE_DIR to a folder that can be written" if exc.filename else "install CuPy and cuCIM again"
        raise BackendError(f"CuPy cannot be imported ({exc}): {hint}") from exc
    return [CupyBackend(n) for n in (range(max(1, device_count())) if ordinals is None else dict.fromkeys(ordinals))]
