"""Simulated GPU, for tests of the code around a GPU. No code runs on a GPU here, and nothing is timed.

It raises errors for mistakes that a real GPU does not report:

* its arrays (array-api-strict on another device) cannot be converted to NumPy, so a hidden copy to the host fails;
* copies use only page-locked memory that it has allocated itself;
* a download is complete when its event is waited for; until then the host memory has other values;
* the host memory of an upload must be unchanged when its event is waited for, or at the end of the session;
* its memory can be limited, and the device can be lost in the middle of a series.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute.backend import Body, NumpyBackend
from gpuprep.compute.pinned_transfer import Empty, Transfers
from gpuprep.core import hounsfield
from gpuprep.errors import DeviceLostError, DeviceMemoryError

UPLOAD_S, KERNEL_S, DOWNLOAD_S = 1.0, 0.25, 16.0
"""Duration of each copy and of each of the two fused kernels on the simulated clock."""


_lost: set[str] = set()
"""Lost devices of this process, shared by all its backends."""


class FakeMemoryError(MemoryError):
    """Error of the device's allocator."""


class FakeCudaError(RuntimeError):
    """Error of a lost device."""


class SimulatedGpu:
    """Backend on the simulated GPU. `transfers` lists direction, dtype and shape of each explicit copy.

    Parameters
    ----------
    largest : int, optional
        Size in bytes of the largest array that can be allocated.
    lost_at : int, optional
        A series of this number of slices makes the device fail permanently.
    memory : int
        Free memory in bytes that it reports.
    """

    name = "foreign"
    device = "array-api-strict device1"
    body: Body = "matmul"

    def __init__(self, *, largest: int | None = None, lost_at: int | None = None, memory: int = 10**11) -> None:
        self.chunk_slices = 16
        self.slab_slices = 8
        self.transfers: list[tuple[str, str, tuple[int, ...]]] = []
        self.sessions = 0
        self._largest = largest
        self._lost_at = lost_at
        self._memory = memory
        self.now = 0.0
        """Time of the simulated clock in s."""
        self.arrays: list[weakref.ref[Any]] = []
        """Weak references to every large array."""

    @contextmanager
    def _session(self) -> Iterator[Transfers]:
        self.sessions += 1
        stream = _Stream(self)
        try:
            self._check_alive()
            yield Transfers(stream)
            stream.finish()
        except FakeMemoryError as exc:
            raise DeviceMemoryError(f"{exc}; the stand-in has {self._memory} bytes free") from exc
        except FakeCudaError as exc:
            raise DeviceLostError(f"the stand-in failed: {exc}") from exc

    def session(self) -> AbstractContextManager[Transfers]:
        return self._session()

    def environment(self) -> dict[str, str]:
        return {}

    def alone(self) -> Self:
        return self

    def free_bytes(self) -> int:
        return self._memory

    def to_device(self, host: Any) -> Any:
        if host.shape == (self._lost_at,):  # the rescale slopes, one per slice
            _lost.add(self.name)
        self._check_alive()
        self.transfers.append(("up", str(host.dtype), host.shape))
        return self.put(host)

    def to_hu(self, stored: Any, slope: Any, intercept: Any, padding: Any, rule: str) -> Any:
        _take(slope), _take(intercept)  # they must be on the device too
        self.allocate(4 * stored.size)
        self.now += KERNEL_S
        return self._known(hounsfield.to_hu(stored, slope, intercept, padding, rule))

    def finish(self, values: Any, window: tuple[float, float, float, float] | None, dtype: str) -> Any:
        self.allocate(np.dtype(dtype).itemsize * values.size)
        self.now += KERNEL_S
        return hounsfield.finish(values, window, dtype)

    def zoom(self, values: Any, factors: Sequence[float], **options: Any) -> Any:
        return self.put(NumpyBackend().zoom(_take(values), factors, **options))

    def gaussian_filter(self, values: Any, sigma: Sequence[float], **options: Any) -> Any:
        return self.put(NumpyBackend().gaussian_filter(_take(values), sigma, **options))

    def resize(self, values: Any, shape: Sequence[int], **options: Any) -> Any:
        return self.put(NumpyBackend().resize(_take(values), shape, **options))

    def put(self, host: NDArray[Any]) -> Any:
        import array_api_strict as xp

        self.allocate(host.nbytes)
        return self._known(xp.asarray(host, device=xp.Device("device1"), copy=True))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"arrays": [], "transfers": []}

    def allocate(self, size: int) -> None:
        self._check_alive()
        if self._largest is not None and size > self._largest:
            raise FakeMemoryError(f"out of memory allocating {size} bytes")

    def _known(self, array: Any) -> Any:
        self.arrays.append(weakref.ref(array))
        return array

    def _check_alive(self) -> None:
        if _lost:
            raise FakeCudaError("an illegal memory access was encountered")


class _Stream:
    """Copies that complete only when they are waited for."""

    def __init__(self, backend: SimulatedGpu) -> None:
        self._backend = backend
        self._pinned: list[NDArray[np.uint8]] = []
        self._under_way: list[_Copy] = []

    def pinned(self, size: int) -> NDArray[np.uint8]:
        self._pinned.append(np.full(size, 0xEE, np.uint8))
        return self._pinned[-1]

    def start_upload(self, host: NDArray[Any]) -> tuple[Any, _Copy]:
        self._check_pinned(host)
        self._backend.now += UPLOAD_S
        self._backend.transfers.append(("up", str(host.dtype), host.shape))
        return self._backend.put(host), self._begin(_Upload(host))

    def start_download(self, array: Any, empty: Empty) -> tuple[NDArray[Any], _Copy]:
        values = _take(array)
        host = empty(values.shape, values.dtype)
        self._check_pinned(host)
        self._backend.now += DOWNLOAD_S
        host.view(np.uint8)[...] = 0xEE
        self._backend.transfers.append(("down", str(values.dtype), values.shape))
        return host, self._begin(_Download(values, host))

    def mark(self) -> float:
        return self._backend.now

    def elapsed(self, start: float, stop: float) -> float:
        return stop - start

    def finish(self) -> None:
        for copy in self._under_way:
            copy.synchronize()

    def _begin(self, copy: _Copy) -> _Copy:
        self._under_way.append(copy)
        return copy

    def _check_pinned(self, host: NDArray[Any]) -> None:
        assert any(np.shares_memory(host, memory) for memory in self._pinned), "the host memory is not page-locked"


class _Copy:
    def synchronize(self) -> None:
        raise NotImplementedError


class _Upload(_Copy):
    def __init__(self, host: NDArray[Any]) -> None:
        self._host = host
        self._before: NDArray[Any] | None = host.copy()

    def synchronize(self) -> None:
        if self._before is not None:
            np.testing.assert_array_equal(self._host, self._before, "overwritten while it was copied up")
            self._before = None


class _Download(_Copy):
    def __init__(self, values: NDArray[Any], host: NDArray[Any]) -> None:
        self._values: NDArray[Any] | None = values
        self._host = host

    def synchronize(self) -> None:
        if self._values is not None:
            self._host[...] = self._values
            self._values = None


def _take(array: Any) -> NDArray[Any]:
    """Return a device array as NumPy; only code that simulates the device may call this."""
    import array_api_strict as xp

    assert array.device == xp.Device("device1"), "the array is not on the device"
    return np.array(array.to_device(xp.Device("CPU_DEVICE")))


def to_numpy(array: Any) -> NDArray[Any]:
    """Return the values of a host or device array as NumPy."""
    if isinstance(array, np.ndarray):
        return array
    return np.asarray(array.get()) if hasattr(array, "get") else _take(array)
