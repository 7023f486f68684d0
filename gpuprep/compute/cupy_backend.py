"""Computes on a GPU: the only module that imports CuPy and cuCIM."""

from __future__ import annotations

import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import copy
from functools import cache
from typing import Any, Self

import cupy  # type: ignore[import-not-found, unused-ignore]  # noqa: TID251
import cupyx  # type: ignore[import-not-found, unused-ignore]  # noqa: TID251
import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpuprep.compute import cuda_kernels, resample_blocks
from gpuprep.compute.backend import CACHE_REMEDY, Body
from gpuprep.compute.cuda_kernels import Rescale, Window
from gpuprep.compute.pinned_transfer import DEVICE_VARIABLE, Empty, Transfers
from gpuprep.compute.resample_blocks import OUTPUTS, BlockTables
from gpuprep.core.formatting import format_cuda_version, quoted
from gpuprep.core.sampling import lost_samples
from gpuprep.errors import BackendError, DeviceLostError, DeviceMemoryError


@cache
def _kernel(voxels: cuda_kernels.Variant) -> Any:
    kernel = cupy.RawKernel(cuda_kernels.SOURCE, cuda_kernels.NAME, options=voxels.options)
    try:
        kernel.compile()
    except OSError as exc:  # CuPy caches compiled kernels on disk
        raise BackendError(f"CuPy cannot cache its compiled kernels ({exc}): {CACHE_REMEDY}") from exc
    return kernel


@cache
def _libraries() -> tuple[Any, Any]:
    """Return `cupyx.scipy.ndimage`, and the ``resize`` of cuCIM.

    Importing cuCIM takes longer than importing CuPy, and only the engine ``ndimage`` needs it.
    """
    try:
        import cupyx.scipy.ndimage  # type: ignore[import-not-found, unused-ignore]  # noqa: TID251
        from cucim.skimage.transform import resize  # type: ignore[import-not-found, unused-ignore]  # noqa: TID251
    except Exception as exc:  # importing cuCIM also runs code of CuPy and scikit-image
        raise BackendError(
            f"on a GPU, the engine ndimage needs cuCIM, which cannot be imported ({exc}): "
            "pip install 'gpuprep[cuda12]' or 'gpuprep[cuda13]', or use the engine operators"
        ) from exc
    return cupyx.scipy.ndimage, resize


def check_ndimage() -> None:
    """Raise a BackendError if the libraries of the engine ``ndimage`` cannot be imported."""
    _libraries()


def _resample(values: Any, out: Any, tables: BlockTables, **options: Any) -> None:
    kernel = _kernel(cuda_kernels.variant(values.dtype, out.dtype))
    arguments = cuda_kernels.arguments(values, out, tables, **options)
    kernel(cuda_kernels.grid(values.shape, tables.n_out), cuda_kernels.BLOCK, arguments)


class CupyBackend:
    """One GPU.

    Each `session` has its own stream, which runs everything for one volume: upload, kernels, download.
    CuPy keeps one memory arena per stream and does not track use across streams, so an array must stay on its stream.
    Memory is returned to the driver at the end of the session, because other processes share the GPU.

    An instance holds no handle of the device, so it can be pickled and sent to worker processes. The CUDA context is
    created in the process that opens a session, never in one that is forked later.

    Raises
    ------
    BackendError
        If there is no driver or no GPU, or if a small test kernel fails.
    """

    name = "gpu"
    body: Body = "kernels"

    def __init__(self, ordinal: int = 0) -> None:
        self._ordinal = ordinal
        self.device = _checked_device(ordinal)
        self.chunk_slices = 64
        self.slab_slices = 32

    @contextmanager
    def _session(self) -> Iterator[Transfers]:
        _checked_device(self._ordinal)
        try:
            # Arrays that an earlier session returned may have been deleted while kernels of other streams still read
            # them. This session could get the same stream handle, and with it their memory. Freeing it waits for them.
            self._free_memory()
            with cupy.cuda.Device(self._ordinal), cupy.cuda.Stream(non_blocking=True):
                transfers = Transfers(_Copies())
                try:
                    yield transfers
                except BaseException:
                    with suppress(Exception):  # keep the first error
                        _event().synchronize()
                    raise
                _event().synchronize()
        except Exception as exc:
            traceback.clear_frames(exc.__traceback__)  # finished frames hold references to arrays
            if (device_exc := device_error(exc, self)) is None:
                raise
            raise device_exc from exc
        finally:
            with suppress(Exception):  # fails if the device is lost
                self._free_memory()

    def _free_memory(self) -> None:
        """Return unused memory of CuPy's pool to the driver: of the current device, since each has its own pool."""
        with cupy.cuda.Device(self._ordinal):
            cupy.get_default_memory_pool().free_all_blocks()

    def session(self) -> AbstractContextManager[Transfers]:
        return self._session()

    def free_bytes(self) -> int:
        return int(cupy.cuda.Device(self._ordinal).mem_info[0])

    def environment(self) -> dict[str, str]:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        name = visible[self._ordinal] if visible else str(self._ordinal)
        return {"CUDA_VISIBLE_DEVICES": name, DEVICE_VARIABLE: self.device}

    def alone(self) -> Self:
        first = copy(self)
        first._ordinal = 0
        return first

    def to_device(self, host: Any) -> Any:
        return cupy.asarray(host)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        return cupy.empty(shape, dtype=dtype)

    def resample(
        self,
        values: Any,
        out: Any,
        tables: BlockTables,
        *,
        transposed: bool = False,
        window: Window | None = None,
        rescale: Rescale | None = None,
    ) -> None:
        _resample(cupy.ascontiguousarray(values), out, tables, transposed=transposed, window=window, rescale=rescale)

    def to_hu(self, stored: Any, slope: Any, intercept: Any, padding: Any, rule: str) -> Any:
        hu = cupy.empty(stored.shape, dtype=np.float32)
        self.resample(stored, hu, self._unchanged(stored.shape[1]), rescale=Rescale(slope, intercept, padding, rule))
        return hu

    def finish(self, values: Any, window: tuple[float, float, float, float] | None, dtype: str) -> Any:
        if window is None and dtype == "float32":
            return values
        out = cupy.empty(values.shape, dtype=dtype)
        low_hu, high_hu, scale, shift_hu = window or (-np.inf, np.inf, 1.0, 0.0)
        self.resample(values, out, self._unchanged(values.shape[1]), window=Window(low_hu, high_hu, shift_hu, scale))
        return out

    def _unchanged(self, rows: int) -> BlockTables:
        return resample_blocks.selection(rows, 0, rows).on(self.to_device)

    def zoom(self, values: Any, factors: Sequence[float], *, order: int, mode: str, grid_mode: bool) -> Any:
        cupy_ndimage, _ = _libraries()
        if mode != "constant":
            return cupy_ndimage.zoom(values, factors, order=order, mode=mode, grid_mode=grid_mode)
        # CuPy computes sample positions in float32, so the planes it leaves at 0 differ from SciPy's. With
        # mode="mirror" no position is outside. Values inside the volume are the same, because the spline of
        # mode="constant" is also extended by mirroring. The planes that SciPy leaves at 0 are then set to 0.
        zoomed = cupy_ndimage.zoom(values, factors, order=order, mode="mirror", grid_mode=grid_mode)
        for axis, samples in enumerate(values.shape):
            for index in lost_samples(samples, zoomed.shape[axis], mode, grid_mode):
                cupy.moveaxis(zoomed, axis, 0)[int(index)] = 0
        return zoomed

    def gaussian_filter(self, values: Any, sigma: Sequence[float], *, mode: str) -> Any:
        cupy_ndimage, _ = _libraries()
        return cupy_ndimage.gaussian_filter(values, sigma, mode=mode)

    def resize(self, values: Any, shape: Sequence[int], *, mode: str, anti_aliasing: bool) -> Any:
        _, cucim_resize = _libraries()
        # clip=True would synchronise with the GPU twice, and linear interpolation cannot overshoot.
        return cucim_resize(
            values, shape, order=1, mode=mode, clip=False, preserve_range=True, anti_aliasing=anti_aliasing
        )


class _Copies:
    """Asynchronous copies on the current stream: see `gpuprep.compute.pinned_transfer.Device`."""

    def pinned(self, size: int) -> NDArray[np.uint8]:
        return page_locked(size)

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
        return _seconds_between(start, stop)


def _event(*, timing: bool = False) -> Any:
    """Record an event on the current stream; waiting for it blocks without using a CPU core."""
    event = cupy.cuda.Event(block=True, disable_timing=not timing)
    event.record(cupy.cuda.get_current_stream())
    return event


def _seconds_between(start: Any, stop: Any) -> float:
    stop.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, stop)) / 1000


def device_error(exc: Exception, backend: CupyBackend) -> BackendError | None:
    """Return the BackendError for an exception raised by CuPy or CUDA; None for other exceptions.

    Most CUDA errors leave the context unusable, and CUDA does not document which. So every error except lack of memory
    counts as loss of the device, and the worker process ends.
    """
    if not type(exc).__module__.startswith(("cupy", "cuda.")):
        return None
    if _is_out_of_memory(exc):
        free = "?"
        with suppress(Exception):
            free = f"{backend.free_bytes() / 1e9:.2f}"
        return DeviceMemoryError(f"{exc}; {backend.device} has {free} GB free")
    return DeviceLostError(f"the GPU failed: {type(exc).__name__}: {exc}")


def _is_out_of_memory(exc: Exception) -> bool:
    words = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY")
    return isinstance(exc, cupy.cuda.memory.OutOfMemoryError) or any(word in str(exc) for word in words)


def cuda_versions() -> dict[str, int]:
    """Return the CUDA versions of "driver", "runtime" (linked to CuPy) and "nvrtc"; 0 if absent.

    A version is a number: 1000 · major + 10 · minor.
    """
    found = dict.fromkeys(("driver", "runtime", "nvrtc"), 0)
    runtime = cupy.cuda.runtime
    with suppress(RuntimeError):
        found["driver"] = int(runtime.driverGetVersion())
    with suppress(RuntimeError):
        found["runtime"] = int(runtime.runtimeGetVersion())
    with suppress(Exception):  # CuPy loads the library at the first call
        major, minor = cupy.cuda.nvrtc.getVersion()
        found["nvrtc"] = 1000 * major + 10 * minor
    return found


def device_properties(ordinal: int) -> dict[str, Any]:
    """Return the fields of `cudaDeviceProp`, and "freeMem", the free memory in bytes."""
    with cupy.cuda.Device(ordinal) as device:
        return dict(cupy.cuda.runtime.getDeviceProperties(ordinal)) | {"freeMem": int(device.mem_info[0])}


def page_locked(size: int) -> NDArray[np.uint8]:
    """Return page-locked host memory of `size` bytes."""
    # CuPy's pinned memory pool keeps the buffer for the next series: page-locking takes as long as reading a slab.
    buffer: NDArray[np.uint8] = cupyx.empty_pinned((size,), dtype=np.uint8)
    return buffer


def copy_on_device(target: Any, source: Any) -> None:
    """Start to copy an array to another one on the same device."""
    cupy.copyto(target, source)


def device_seconds(work: Callable[[], Any]) -> float:
    """Return the seconds between two events in the current stream, around the work that `work` submits to it."""
    start = _event(timing=True)
    work()
    return _seconds_between(start, _event(timing=True))


def compiler_seconds(voxels: cuda_kernels.Variant) -> float:
    """Return the seconds that NVRTC needs to compile a variant of the kernel."""
    before = os.environ.get("CUPY_CACHE_IN_MEMORY")
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"  # neither reads nor writes the cache folder
    source = f"{cuda_kernels.SOURCE}// {uuid.uuid4()}\n"  # CuPy has not loaded it yet
    try:
        started = time.perf_counter()
        cupy.RawKernel(source, cuda_kernels.NAME, options=voxels.options).compile()
        return time.perf_counter() - started
    finally:
        if before is None:
            del os.environ["CUPY_CACHE_IN_MEMORY"]
        else:
            os.environ["CUPY_CACHE_IN_MEMORY"] = before


def device_count() -> int:
    """Return the number of GPUs visible to this process; 0 without a driver."""
    return _count_devices()[0]


def _count_devices() -> tuple[int, str]:
    """Return the number of visible GPUs, and the words of CUDA where there are none."""
    try:
        return int(cupy.cuda.runtime.getDeviceCount()), "CUDA lists none"
    except cupy.cuda.runtime.CUDARuntimeError as exc:
        return 0, str(exc)


def _why_no_device() -> str:
    """Return the reason why this process can use no GPU; "" if it can."""
    runtime = cupy.cuda.runtime
    count, reason = _count_devices()
    if count:
        return ""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") == "":
        return "CUDA_VISIBLE_DEVICES is empty: unset it, or list the GPUs to use"
    if not (driver := runtime.driverGetVersion()):
        return "no NVIDIA driver is loaded: check that nvidia-smi lists the GPU"
    if "InsufficientDriver" in reason:
        return (
            f"the driver supports CUDA {format_cuda_version(driver)}, CuPy needs "
            f"{format_cuda_version(runtime.runtimeGetVersion())}: update the driver, or install gpuprep[cuda12]"
        )
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return f"{reason}: check that nvidia-smi lists what CUDA_VISIBLE_DEVICES begins with, {quoted(visible)}"
    return f"{reason}: check that nvidia-smi lists the GPU"


@cache
def _checked_device(ordinal: int) -> str:
    """Test a device, once per process, and return its name."""
    if reason := _why_no_device():
        raise BackendError(f"CuPy finds no GPU: {reason}")
    try:
        with cupy.cuda.Device(ordinal):
            # The kernel itself, on a few values that are exact only in float32: it needs the driver and NVRTC.
            expected = np.full((1, OUTPUTS, 1), 1 + 2**-12, dtype=np.float32)
            found = cupy.empty(expected.shape, dtype=np.float32)
            _resample(cupy.asarray(expected), found, resample_blocks.selection(OUTPUTS, 0, OUTPUTS).on(cupy.asarray))
            if not np.array_equal(cupy.asnumpy(found), expected):
                raise BackendError("a small test kernel returns wrong values: do not use this device")
            properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
    # CUDA errors are RuntimeErrors, and a missing library is an ImportError; NVRTC and memory errors are neither.
    except (RuntimeError, ImportError, MemoryError, cupy.cuda.compiler.CompileException) as exc:
        if _is_out_of_memory(exc):
            raise DeviceMemoryError(f"the GPU has no memory left for a small test kernel: {exc}") from exc
        raise BackendError(f"the GPU does not work: {exc}") from exc
    return f"{properties['name'].decode()} (device {ordinal})"
