"""The CuPy backend: the only module that imports CuPy and cuCIM."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import cupy  # type: ignore[import-not-found, unused-ignore]  # noqa: TID251
import cupyx.scipy.ndimage as cupy_ndimage  # type: ignore[import-not-found, unused-ignore]  # noqa: TID251
from cucim.skimage.transform import (  # type: ignore[import-not-found, unused-ignore]  # noqa: TID251
    resize as cucim_resize,
)

from gpuprep.errors import BackendError, DeviceMemoryError


class CupyBackend:
    """One GPU.

    Each `session` has a stream of its own, on which everything for one volume happens: upload, kernels, download.
    CuPy keeps one memory arena per stream and does not track use across streams, so arrays must not leave theirs.

    Raises
    ------
    BackendError
        If there is no driver, no GPU, or a first tiny kernel fails.
    """

    name = "gpu"
    body: Literal["matmul", "loops"] = "matmul"
    chunk_slices = 64
    slab_slices = 64

    def __init__(self, ordinal: int = 0) -> None:
        if os.environ.get("CUPY_TF32", "0") not in ("", "0"):
            raise BackendError("CUPY_TF32 is set: TF32 products are wrong by up to 1.7 HU; unset it")
        if not cupy.is_available():
            raise BackendError("CuPy finds no GPU: check that nvidia-smi lists one and that the driver is loaded")
        try:
            self._device = cupy.cuda.Device(ordinal)
            with self._device:
                # One kernel, compiled and run, and one product: the driver, NVRTC and cuBLAS all have to be there.
                ones = cupy.ones((2, 2), dtype=cupy.float32) * 2
                if float((ones @ ones).sum()) != 32.0:
                    raise BackendError("a first product on the GPU came out wrong; do not use this device")
                properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
        except RuntimeError as exc:  # CUDA, NVRTC and missing-library errors all derive from it
            raise BackendError(f"the GPU does not work: {exc}") from exc
        self.device = f"{properties['name'].decode()} (device {ordinal})"

    @contextmanager
    def _session(self) -> Iterator[None]:
        with self._device, cupy.cuda.Stream(non_blocking=True) as stream:
            try:
                yield
            except cupy.cuda.memory.OutOfMemoryError as exc:
                cupy.get_default_memory_pool().free_all_blocks()
                raise DeviceMemoryError(
                    f"{exc}; {self.device} has {self._device.mem_info[0] / 1e9:.1f} GB free: use fewer --jobs, "
                    "or --backend cpu"
                ) from exc
            finally:
                stream.synchronize()

    def session(self) -> AbstractContextManager[None]:
        return self._session()

    def to_device(self, host: Any) -> Any:
        return cupy.asarray(host)

    def to_host(self, array: Any) -> Any:
        return cupy.asnumpy(array)

    def zoom(self, values: Any, factors: Sequence[float], *, order: int, mode: str, grid_mode: bool) -> Any:
        return cupy_ndimage.zoom(values, factors, order=order, mode=mode, grid_mode=grid_mode)

    def gaussian_filter(self, values: Any, sigma: Sequence[float], *, mode: str) -> Any:
        return cupy_ndimage.gaussian_filter(values, sigma, mode=mode)

    def resize(self, values: Any, shape: Sequence[int], *, mode: str, anti_aliasing: bool) -> Any:
        # clip=False: the default would wait for the GPU twice, and linear interpolation cannot overshoot.
        return cucim_resize(
            values, shape, order=1, mode=mode, clip=False, preserve_range=True, anti_aliasing=anti_aliasing
        )
