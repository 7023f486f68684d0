"""Reads, copies and computes at the same time, on a device with memory and a stream of its own.

While the device works on one slab, the next one is read into page-locked memory by a thread; while a finished chunk is
written, the next one is computed and copied down. All of it happens in one stream, so the device does it in the order
in which it was asked for, and only the host has to wait: for a buffer that is still being copied from or into.

Nothing in here knows CUDA. A `Device` starts copies and says when they are done; a test has one without a GPU.
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
"""``empty(shape, dtype)`` returns an array to be filled, as `numpy.empty` does."""

Read = Callable[[int, int, Empty], NDArray[Any]]
"""``read(start, stop, empty)`` returns slices [start, stop) in an array that it got from `empty`."""

Span = tuple[int, int]

UPLOAD, KERNELS, DOWNLOAD, IDLE = "upload_s", "kernels_s", "download_s", ""

SLOTS = 2
"""Page-locked buffers in either direction: one is filled or emptied by the host while the other one is copied."""

DEVICE = "GPUPREP_DEVICE"
"""Variable with the name of the device that a worker has for itself."""


class Event(Protocol):
    """A point in the stream."""

    def synchronize(self) -> None:
        """Wait, without using a core, until the device has come to it."""
        ...


class Device(Protocol):
    """What the choreography asks of a device; everything happens in the stream of the session."""

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Return page-locked host memory of so many bytes."""
        ...

    def start_upload(self, host: NDArray[Any]) -> tuple[Any, Event]:
        """Begin to copy page-locked memory up; return the array and the event after which `host` may change."""
        ...

    def start_download(self, array: Any, empty: Empty) -> tuple[NDArray[Any], Event]:
        """Begin to copy an array down into what `empty` gives; it is there after the event."""
        ...

    def mark(self) -> Any:
        """Return the present point in the stream, for `elapsed`."""
        ...

    def elapsed(self, start: Any, stop: Any) -> float:
        """Return the seconds between two marks, waiting for the later one if need be."""
        ...


class Lane:
    """The way of one series to a device and back."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        # Held to the end of the session, which waits for the stream: a copy may be under way when an error ends it.
        self._up = [_Buffer(device) for _ in range(SLOTS)]
        self._down = [_Buffer(device) for _ in range(SLOTS)]

    def uploads(self, read: Read, spans: Sequence[Span]) -> Iterator[Any]:
        """Yield the slices of each span as an array on the device; the next ones are read meanwhile, by a thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="gpuprep-read") as reader:
            ahead = [reader.submit(read, *span, self._up[0].empty) for span in spans[:1]]
            for n in range(len(spans)):
                self._switch(IDLE)
                host = ahead.pop().result()
                if n + 1 < len(spans):
                    ahead.append(reader.submit(read, *spans[n + 1], self._up[(n + 1) % SLOTS].empty))
                else:
                    reader.shutdown(wait=False)
                self._switch(UPLOAD)
                array, self._up[n % SLOTS].event = self._device.start_upload(host)
                self._switch(KERNELS)
                yield array

    def downloads(self, chunks: Iterator[Any]) -> Iterator[NDArray[Any]]:
        """Yield each chunk as NumPy, valid until the next is asked for, which is computed and copied meanwhile."""
        flying: deque[tuple[_Buffer, NDArray[Any]]] = deque()
        for n, chunk in enumerate(chunks):
            buffer = self._down[n % SLOTS]
            self._switch(DOWNLOAD)
            host, buffer.event = self._device.start_download(chunk, buffer.empty)
            self._switch(IDLE)
            flying.append((buffer, host))
            if len(flying) == SLOTS:
                yield _landed(*flying.popleft())
            self._switch(KERNELS)
        self._switch(IDLE)
        while flying:
            yield _landed(*flying.popleft())

    def seconds(self) -> dict[str, float]:
        """Return the time the stream has spent in uploads, kernels and downloads, once everything is done.

        Without the time it had nothing to do. Where several processes share a device, their turns are in it.
        """
        total = dict.fromkeys((UPLOAD, KERNELS, DOWNLOAD), 0.0)
        for (stage, start), (_, stop) in pairwise(self._marks):
            if stage != IDLE:
                total[stage] += self._device.elapsed(start, stop)
        return total

    def _switch(self, stage: str) -> None:
        self._marks.append((stage, self._device.mark()))


class _Buffer:
    """Page-locked memory for one array at a time, grown as needed."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._bytes: NDArray[np.uint8] | None = None
        self.event: Event | None = None
        """After it, the last copy from or into the memory is done."""

    def empty(self, shape: Any, dtype: Any) -> NDArray[Any]:
        """Return an array in this memory, once nothing is copied from or into it any more."""
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


def _landed(buffer: _Buffer, host: NDArray[Any]) -> NDArray[Any]:
    buffer.wait()
    return host
