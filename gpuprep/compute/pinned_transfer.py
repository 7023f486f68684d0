"""Overlaps reading, host-device copies and computation, for a device with its own memory and stream.

While the device processes one slab, a thread reads the next one into page-locked memory; while a finished chunk is
written, the next one is computed and downloaded. Everything runs in one stream, so the device works in order of
submission. Only the host has to wait, for buffers that are still being copied from or to.

This module does not depend on CUDA. A `Device` starts copies and provides events; tests use a stand-in without a GPU.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Empty = Callable[[Any, Any], NDArray[Any]]
"""``empty(shape, dtype)`` returns an uninitialised array, like `numpy.empty`."""

Read = Callable[[int, int, Empty], NDArray[Any]]
"""``read(start, stop, empty)`` returns slices [start, stop) in an array allocated with `empty`."""

Span = tuple[int, int]

UPLOAD, KERNELS, DOWNLOAD, IDLE = "upload_s", "kernels_s", "download_s", ""

SLOTS = 2
"""Page-locked buffers per direction: the host fills or empties one while the other one is being copied."""

DEVICE_VARIABLE = "GPUPREP_DEVICE"
"""Environment variable with the name of the device that is assigned to a worker."""


class Event(Protocol):
    """A point in the stream."""

    def synchronize(self) -> None:
        """Wait, without using a CPU core, until the device has reached this point."""
        ...


class Device(Protocol):
    """Device operations that `Transfers` needs; all of them run in the stream of the session."""

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Return page-locked host memory of `size` bytes."""
        ...

    def start_upload(self, host: NDArray[Any]) -> tuple[Any, Event]:
        """Start to upload page-locked memory; return the array and the event after which `host` may change."""
        ...

    def start_download(self, array: Any, empty: Empty) -> tuple[NDArray[Any], Event]:
        """Start to download an array into memory from `empty`; return that memory and the event of completion."""
        ...

    def mark(self) -> Any:
        """Return a marker of the current point in the stream, for `elapsed`."""
        ...

    def elapsed(self, start: Any, stop: Any) -> float:
        """Return the seconds between two markers; wait for the later one if necessary."""
        ...


class Transfers:
    """Uploads and downloads of one series."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        # Kept until the session ends and the stream is synchronised: after an error, a copy may still be running.
        self._up = [_Buffer(device) for _ in range(SLOTS)]
        self._down = [_Buffer(device) for _ in range(SLOTS)]

    def uploads(self, read: Read, spans: Sequence[Span]) -> Iterator[Any]:
        """Yield the slices of each span as an array on the device, while a thread reads the next span."""
        with ThreadPoolExecutor(1, thread_name_prefix="gpuprep-read") as reader:
            ahead = [reader.submit(read, *span, self._up[0].empty) for span in spans[:1]]
            for n in range(len(spans)):
                self._enter_stage(IDLE)
                host = ahead.pop().result()
                if n + 1 < len(spans):
                    ahead.append(reader.submit(read, *spans[n + 1], self._up[(n + 1) % SLOTS].empty))
                else:
                    reader.shutdown(wait=False)
                self._enter_stage(UPLOAD)
                array, self._up[n % SLOTS].event = self._device.start_upload(host)
                self._enter_stage(KERNELS)
                yield array

    def downloads(self, chunks: Iterator[Any]) -> Iterator[NDArray[Any]]:
        """Yield each chunk as a NumPy array, valid until the next is requested; later chunks are computed meanwhile."""
        in_flight: deque[tuple[_Buffer, NDArray[Any]]] = deque()
        for n, chunk in enumerate(chunks):
            buffer = self._down[n % SLOTS]
            self._enter_stage(DOWNLOAD)
            host, buffer.event = self._device.start_download(chunk, buffer.empty)
            self._enter_stage(IDLE)
            in_flight.append((buffer, host))
            if len(in_flight) == SLOTS:
                yield _completed(*in_flight.popleft())
            self._enter_stage(KERNELS)
        self._enter_stage(IDLE)
        while in_flight:
            yield _completed(*in_flight.popleft())

    def seconds(self) -> dict[str, float]:
        """Return the seconds that the stream has spent in uploads, kernels and downloads; call it after the last chunk.

        Idle time is excluded. If several processes share the device, the time of the others is included.
        """
        total = dict.fromkeys((UPLOAD, KERNELS, DOWNLOAD), 0.0)
        for (stage, start), (_, stop) in pairwise(self._marks):
            if stage != IDLE:
                total[stage] += self._device.elapsed(start, stop)
        return total

    def _enter_stage(self, stage: str) -> None:
        self._marks.append((stage, self._device.mark()))


class _Buffer:
    """Page-locked memory for one array at a time; grows as needed."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._bytes: NDArray[np.uint8] | None = None
        self.event: Event | None = None
        """Completion of the last copy from or to this memory."""

    def empty(self, shape: Any, dtype: Any) -> NDArray[Any]:
        """Wait for the last copy, and return an array in this memory."""
        self.wait()
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._bytes is None or self._bytes.size < size:
            self._bytes = self._device.pinned(size)
        array: NDArray[Any] = self._bytes[:size].view(dtype).reshape(shape)
        return array

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()
            self.event = None


def _completed(buffer: _Buffer, host: NDArray[Any]) -> NDArray[Any]:
    buffer.wait()
    return host
