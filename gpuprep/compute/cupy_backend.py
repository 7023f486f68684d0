"""Computes on a GPU: the only module that imports CuPy and cuCIM."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import copy
from functools import cache
from typing import Any, Literal, Self

import cupy  # type: ignore[import-not-found, unused-ignore]  # noqa: TID251
import cupyx  # type: ignore[import-not-found, unused-ignore]  # noqa: TID251
import cupyx.scipy.ndimage as cupy_ndimage  # type: ignore[import-not-found, unused-ignore]  # noqa: TID251
import numpy as np
from cucim.skimage.transform import (  # type: ignore[import-not-found, unused-ignore]  # noqa: TID251
    resize as cucim_resize,
)
from numpy.typing import NDArray

from gpuprep.compute import cuda_kernels
from gpuprep.compute.pinned_transfer import DEVICE, Empty, Lane
from gpuprep.core.sampling import lost_samples
from gpuprep.errors import BackendError, DeviceLostError, DeviceMemoryError


def _elementwise(kernel: cuda_kernels.Kernel) -> Any:
    return cupy.ElementwiseKernel(kernel.inputs, kernel.outputs, kernel.operation, kernel.name)


HU, WINDOW, QUANTISE = (_elementwise(k) for k in (cuda_kernels.HU, cuda_kernels.WINDOW, cuda_kernels.QUANTISE))


class CupyBackend:
    """One GPU.

    Each `session` has a stream of its own, on which everything for one volume happens: upload, kernels, download.
    CuPy keeps one memory arena per stream and does not track use across streams, so arrays must not leave theirs.
    Memory goes back to the driver with the session, because other processes share the GPU.

    An instance holds no handle of the device and so travels to worker processes; a context is made in the process
    that opens a session, and never in one that is forked later.

    Raises
    ------
    BackendError
        If there is no driver, no GPU, or a first tiny kernel fails.
    """

    name = "gpu"
    body: Literal["matmul", "loops"] = "matmul"

    def __init__(self, ordinal: int = 0) -> None:
        self._ordinal = ordinal
        self.device = _opened(ordinal)
        self.chunk_slices = 64
        self.slab_slices = 32
        self.block_rows = 128

    @contextmanager
    def _session(self) -> Iterator[Lane]:
        _opened(self._ordinal)
        try:
            with cupy.cuda.Device(self._ordinal), cupy.cuda.Stream(non_blocking=True):
                lane = Lane(_Copies())
                try:
                    yield lane
                except BaseException:
                    with suppress(Exception):  # what went wrong first is what counts
                        _event().synchronize()
                    raise
                _event().synchronize()
        except Exception as exc:
            traceback.clear_frames(exc.__traceback__)  # those that are finished hold arrays
            if (known := translated(exc, self)) is None:
                raise
            raise known from exc
        finally:
            with suppress(Exception):  # of a lost device
                cupy.get_default_memory_pool().free_all_blocks()

    def session(self) -> AbstractContextManager[Lane]:
        return self._session()

    def free_bytes(self) -> int:
        return int(cupy.cuda.Device(self._ordinal).mem_info[0])

    def environment(self) -> dict[str, str]:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        name = visible[self._ordinal] if visible else str(self._ordinal)
        return {"CUDA_VISIBLE_DEVICES": name, DEVICE: self.device}

    def alone(self) -> Self:
        first = copy(self)
        first._ordinal = 0
        return first

    def to_device(self, host: Any) -> Any:
        return cupy.asarray(host)

    def to_hu(self, stored: Any, slope: Any, intercept: Any, padding: Any, rule: str) -> Any:
        zero = rule == "minus2000-to-0" and stored.dtype.kind == "i"  # unsigned types cannot hold −2000
        declared = padding is not None
        plane = stored.shape[1] * stored.shape[2]
        return HU(stored, slope, intercept, padding if declared else stored, plane, zero, rule == "air", declared)

    def finish(self, values: Any, window: tuple[float, float, float, float] | None, dtype: str) -> Any:
        if window is None and dtype == "float32":
            return values
        low, high, scale, shift_hu = window or (-np.inf, np.inf, 1.0, 0.0)
        if dtype == "float32":
            return WINDOW(values, low, high, shift_hu, scale)
        limits = np.iinfo(dtype)
        out = cupy.empty(values.shape, dtype=dtype)
        return QUANTISE(values, low, high, shift_hu, scale, float(limits.min), float(limits.max), out)

    def zoom(self, values: Any, factors: Sequence[float], *, order: int, mode: str, grid_mode: bool) -> Any:
        if mode != "constant":
            return cupy_ndimage.zoom(values, factors, order=order, mode=mode, grid_mode=grid_mode)
        # CuPy reckons places in float32 and so leaves other planes at 0 than SciPy. Mirrored, no place is outside, and
        # within the volume values are the same, as the spline of mode="constant" is continued by mirroring too. The
        # planes that SciPy leaves at 0 are then put there.
        zoomed = cupy_ndimage.zoom(values, factors, order=order, mode="mirror", grid_mode=grid_mode)
        for axis, samples in enumerate(values.shape):
            for index in lost_samples(samples, zoomed.shape[axis], mode, grid_mode):
                cupy.moveaxis(zoomed, axis, 0)[int(index)] = 0
        return zoomed

    def gaussian_filter(self, values: Any, sigma: Sequence[float], *, mode: str) -> Any:
        return cupy_ndimage.gaussian_filter(values, sigma, mode=mode)

    def resize(self, values: Any, shape: Sequence[int], *, mode: str, anti_aliasing: bool) -> Any:
        # clip=False: the default would wait for the GPU twice, and linear interpolation cannot overshoot.
        return cucim_resize(
            values, shape, order=1, mode=mode, clip=False, preserve_range=True, anti_aliasing=anti_aliasing
        )


class _Copies:
    """Copies in the current stream: see `gpuprep.compute.pinned_transfer.Device`."""

    def pinned(self, size: int) -> NDArray[np.uint8]:
        # From CuPy's pool, which keeps it for the next series: page-locking takes as long as reading a slab.
        buffer: NDArray[np.uint8] = cupyx.empty_pinned((size,), dtype=np.uint8)
        return buffer

    def start_upload(self, host: NDArray[Any]) -> tuple[Any, Any]:
        array = cupy.empty(host.shape, dtype=host.dtype)
        array.set(host)
        return array, _event()

    def start_download(self, array: Any, empty: Empty) -> tuple[NDArray[Any], Any]:
        host = empty(array.shape, array.dtype)
        array.get(out=host, blocking=False)
        return host, _event()

    def mark(self) -> Any:
        return _event(timing=True)

    def elapsed(self, start: Any, stop: Any) -> float:
        stop.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, stop)) / 1000


def _event(*, timing: bool = False) -> Any:
    """Return the present point in the current stream; to wait for it leaves the core to others."""
    event = cupy.cuda.Event(block=True, disable_timing=not timing)
    event.record(cupy.cuda.get_current_stream())
    return event


def translated(exc: Exception, backend: CupyBackend) -> BackendError | None:
    """Return what an error of CuPy's means for a series; None for an error that is not CuPy's.

    After most errors of CUDA nothing works any more in this process, and which ones those are is not said. So all but
    a lack of memory count as the loss of the device, and a worker ends with it.
    """
    if not type(exc).__module__.startswith(("cupy", "cuda.")):
        return None
    if _is_lack_of_memory(exc):
        free = "?"
        with suppress(Exception):
            free = f"{backend.free_bytes() / 1e9:.2f}"
        return DeviceMemoryError(f"{exc}; {backend.device} has {free} GB free")
    return DeviceLostError(f"the GPU failed: {type(exc).__name__}: {exc}")


def _is_lack_of_memory(exc: Exception) -> bool:
    words = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(exc, cupy.cuda.memory.OutOfMemoryError) or any(word in str(exc) for word in words)


def device_count() -> int:
    """Return how many GPUs this process can see; 0 where there is no driver."""
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


@cache
def _opened(ordinal: int) -> str:
    """Try a device, once per process, and return its name."""
    if os.environ.get("CUPY_TF32", "0") not in ("", "0"):
        raise BackendError("CUPY_TF32 is set: TF32 products are wrong by up to 1.7 HU; unset it")
    if not cupy.is_available():
        raise BackendError("CuPy finds no GPU: check that nvidia-smi lists one and that the driver is loaded")
    try:
        with cupy.cuda.Device(ordinal):
            # One kernel, compiled and run, and one product: the driver, NVRTC and cuBLAS all have to be there.
            ones = cupy.ones((2, 2), dtype=cupy.float32) * 2
            if float((ones @ ones).sum()) != 32.0:
                raise BackendError("a first product on the GPU came out wrong; do not use this device")
            properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
    # CUDA's errors are RuntimeErrors, a missing cuBLAS is an ImportError, what NVRTC refuses or memory lacks neither.
    except OSError as exc:  # compiled kernels are kept on disk
        hint = "set CUPY_CACHE_DIR to a folder that can be written"
        raise BackendError(f"CuPy cannot keep its compiled kernels ({exc}): {hint}") from exc
    except (RuntimeError, ImportError, MemoryError, cupy.cuda.compiler.CompileException) as exc:
        if _is_lack_of_memory(exc):
            raise DeviceMemoryError(f"no memory left on the GPU to begin with: {exc}") from exc
        raise BackendError(f"the GPU does not work: {exc}") from exc
    return f"{properties['name'].decode()} (device {ordinal})"
