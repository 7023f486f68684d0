"""Keeps arrays that are used again and again while one volume is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from array_api_compat import array_namespace, device


class Scratch:
    """Buffers by name, used again and again: fresh memory costs a page fault per page, ten times the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Any] = {}

    def like(self, values: Any, shape: Sequence[int], name: Any) -> Any:
        """Return an array of the library, device and dtype of `values`; what was in it is lost."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < shape[0]:
            xp = array_namespace(values)
            buffer = xp.empty(tuple(shape), dtype=values.dtype, device=device(values))
            self._buffers[name] = buffer
        return buffer[: shape[0], ...]


class SlidingWindow:
    """The source slices that the next output slices need; earlier ones are dropped, so long series cost no more.

    `slabs` are of `step` slices each, the last one perhaps of fewer.
    """

    def __init__(self, count: int, step: int, slabs: Iterator[Any], scratch: Scratch) -> None:
        self.count = count
        self._step = step
        self._slabs = slabs
        self._scratch = scratch
        self._capacity = 0
        self._buffer: Any = None
        self._start = 0
        """Slice that lies first in the buffer."""
        self._stop = 0

    def reserve(self, slices: int) -> None:
        """Say how many slices will be asked for at a time; room for half as many more makes moving them rare."""
        self._capacity = min(self.count, slices + max(slices // 2, self._step))

    def get(self, low: int, high: int) -> Any:
        """Return slices [low, high), shape (high − low, j, i); `low` never falls from call to call."""
        while self._stop < high:
            stop = min(self._stop + self._step, self.count)
            slab = next(self._slabs)
            if self._buffer is None:
                self._buffer = self._scratch.like(slab, (self._capacity, *slab.shape[1:]), "window")
            if stop - self._start > self._capacity:
                for k in range(max(0, self._stop - low)):  # one by one and upwards, since the two ranges may overlap
                    self._buffer[k, :, :] = self._buffer[low - self._start + k, :, :]
                self._start = min(low, self._stop)
            self._buffer[self._stop - self._start : stop - self._start, :, :] = slab
            self._stop = stop
        return self._buffer[low - self._start : high - self._start, :, :]
