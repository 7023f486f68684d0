"""Keeps buffers that are reused during the computation of one volume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from array_api_compat import device

from gpuprep.core.array_namespace import array_namespace


class Scratch:
    """Reusable buffers by name. Page faults of fresh memory would take ten times as long as the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Any] = {}

    def like(self, values: Any, shape: Sequence[int], name: Any) -> Any:
        """Return a buffer with the library, device and dtype of `values`. Its contents are undefined."""
        xp = array_namespace(values)
        return self.of(shape, name, lambda: xp.empty(tuple(shape), dtype=values.dtype, device=device(values)))

    def of(self, shape: Sequence[int], name: Any, make: Callable[[], Any]) -> Any:
        """Return the buffer of this name, made by `make` if there is none with enough elements along axis 0."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < shape[0]:
            buffer = self._buffers[name] = make()
        return buffer[: shape[0], ...]


class SlidingWindow:
    """Sliding window over source slices: earlier slices are dropped, so memory does not grow with the series.

    Each array of `slabs` has `step` slices; the last one may have fewer.
    """

    def __init__(self, count: int, step: int, slabs: Iterator[Any], scratch: Scratch) -> None:
        self.count = count
        self._step = step
        self._slabs = slabs
        self._scratch = scratch
        self._capacity = 0
        self._buffer: Any = None
        self._start = 0
        """Source slice at the start of the buffer."""
        self._stop = 0

    def reserve(self, slices: int) -> None:
        """Set the number of slices per `get`. The buffer holds half as many more, so slices rarely have to be moved."""
        self._capacity = min(self.count, slices + max(slices // 2, self._step))

    def get(self, low: int, high: int) -> Any:
        """Return slices [low, high), shape (high − low, j, i). `low` must not decrease between calls."""
        while self._stop < high:
            stop = min(self._stop + self._step, self.count)
            slab = next(self._slabs)
            if self._buffer is None:
                self._buffer = self._scratch.like(slab, (self._capacity, *slab.shape[1:]), "window")
            if stop - self._start > self._capacity:
                for k in range(max(0, self._stop - low)):  # one by one in ascending order: the ranges may overlap
                    self._buffer[k, :, :] = self._buffer[low - self._start + k, :, :]
                self._start = min(low, self._stop)
            self._buffer[self._stop - self._start : stop - self._start, :, :] = slab
            self._stop = stop
        return self._buffer[low - self._start : high - self._start, :, :]
