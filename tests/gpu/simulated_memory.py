"""CuPy's memory pools on a simulated device: one arena for each stream handle, as in `cupy.cuda.memory`.

A block goes back to the arena of the stream on which it was allocated as soon as its array is deleted, while work may
still use it. The next array of a stream with this handle gets it at once. That is safe only within one stream.

New memory has NaN in all its bytes. This is written in the order of the stream, like the values that the program
writes later.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from cuda_on_host import POISON
from numpy.typing import NDArray
from simulated_cuda import CUDARuntimeError, DeviceState, Queue, Simulation, simulation

BLOCK_BYTES = 512


class OutOfMemoryError(MemoryError):
    """Error of CuPy's pool, with its words."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        text = f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes"
        super().__init__(text + (f", limit set to: {limit:,} bytes)." if limit else ")."))


OutOfMemoryError.__module__ = "cupy.cuda.memory"


class Chunk:
    """A part of an allocation of the device; a pool splits and merges them."""

    def __init__(self, region: NDArray[np.uint8], offset: int, size: int, arena: list[Chunk]) -> None:
        self.region = region
        self.offset = offset
        self.size = size
        self.arena = arena
        self.next: Chunk | None = None
        self.previous: Chunk | None = None

    @property
    def bytes(self) -> NDArray[np.uint8]:
        return self.region[self.offset : self.offset + self.size]

    def split(self, size: int) -> None:
        """Shrink to `size`, and put the rest into the arena."""
        if self.size == size:
            return
        rest = Chunk(self.region, self.offset + size, self.size - size, self.arena)
        self.size = size
        rest.next, rest.previous, self.next = self.next, self, rest
        if rest.next is not None:
            rest.next.previous = rest
        self.arena.append(rest)

    def merge_next(self) -> None:
        assert self.next is not None
        self.size += self.next.size
        self.next = self.next.next
        if self.next is not None:
            self.next.previous = self


class Pool:
    """CuPy's pool of one device: `cupy.cuda.memory.SingleDeviceMemoryPool`."""

    def __init__(self, simulation: Simulation, device: DeviceState) -> None:
        self._simulation = simulation
        self._device = device
        self._arenas: dict[int, list[Chunk]] = {}
        self._deleted: list[Chunk] = []
        self._used = 0
        self._total = 0
        self._limit = 0

    def allocate(self, size: int, queue: Queue) -> Memory:
        with self._simulation.lock:
            self._simulation.check()
            rounded = max(1, -(-size // BLOCK_BYTES)) * BLOCK_BYTES
            self._take_back()
            arena = self._arenas.setdefault(queue.handle, [])
            fitting = [chunk for chunk in arena if chunk.size >= rounded]
            if fitting:
                chunk = min(fitting, key=lambda chunk: chunk.size)
                arena.remove(chunk)
                chunk.split(rounded)
            else:
                chunk = Chunk(self._new_region(rounded), 0, rounded, arena)
            self._used += chunk.size
            contents = chunk.bytes.view(np.uint16)
            self._simulation.enqueue(self._device, queue, lambda: contents.fill(POISON))
            return Memory(self, chunk, self._device)

    def give_back(self, chunk: Chunk) -> None:
        """Note that an array was deleted. Takes no lock, because a garbage collection can begin anywhere."""
        self._deleted.append(chunk)

    def _take_back(self) -> None:
        while self._deleted:
            chunk = self._deleted.pop()
            self._used -= chunk.size
            while chunk.next is not None and chunk.next in chunk.arena:
                chunk.arena.remove(chunk.next)
                chunk.merge_next()
            while chunk.previous is not None and chunk.previous in chunk.arena:
                chunk = chunk.previous
                chunk.arena.remove(chunk)
                chunk.merge_next()
            chunk.arena.append(chunk)

    def _new_region(self, size: int) -> NDArray[np.uint8]:
        if self._limit and size > self._limit:
            raise OutOfMemoryError(size, self._total, self._limit)
        remedies: list[Callable[[], Any]] = [gc.collect, self.free_all_blocks]
        while True:
            if not self._limit or self._total + size <= self._limit:
                try:
                    region = self._malloc(size)
                except CUDARuntimeError as exc:
                    if exc.status != 2:
                        raise
                else:
                    self._total += size
                    return region
            if not remedies:
                raise OutOfMemoryError(size, self._total, self._limit)
            remedies.pop()()
            self.free_all_blocks()

    def _malloc(self, size: int) -> NDArray[np.uint8]:
        largest = self._simulation.machine.largest_bytes
        fragmented = largest is not None and size > largest
        if fragmented or self._device.allocated_bytes + size > self._device.gpu.memory_bytes:
            raise CUDARuntimeError(2)
        self._device.allocated_bytes += size
        raw = np.empty(size + BLOCK_BYTES, np.uint8)
        start = -raw.ctypes.data % BLOCK_BYTES
        return raw[start : start + size]

    def free_all_blocks(self) -> None:
        """Return blocks that are whole allocations to the device, which waits for all its work first."""
        with self._simulation.lock:
            self._take_back()
            for arena in self._arenas.values():
                for chunk in [c for c in arena if c.next is None and c.previous is None]:
                    self._simulation.wait_for_device(self._device)
                    arena.remove(chunk)
                    self._total -= chunk.size
                    self._device.allocated_bytes -= chunk.size

    def used_bytes(self) -> int:
        with self._simulation.lock:
            self._take_back()
            return self._used

    def total_bytes(self) -> int:
        with self._simulation.lock:
            self._take_back()
            return self._total

    def free_bytes(self) -> int:
        return self.total_bytes() - self.used_bytes()

    def n_free_blocks(self) -> int:
        with self._simulation.lock:
            self._take_back()
            return sum(map(len, self._arenas.values()))

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        if size is None:
            size = 0 if fraction is None else int(fraction * self._device.gpu.memory_bytes)
        self._limit = size

    def get_limit(self) -> int:
        return self._limit


class Memory:
    """Memory of an array; it goes back to the pool when the last array with it is deleted."""

    def __init__(self, pool: Pool, chunk: Chunk, device: DeviceState) -> None:
        self.bytes = chunk.bytes
        self.device = device
        self.chunk_bytes = chunk.size
        self._finalizer = weakref.finalize(self, pool.give_back, chunk)
        self._finalizer.atexit = False


def current_pool() -> Pool:
    """Return the pool of the current device."""
    simulated = simulation()
    device = simulated.device()
    with simulated.lock:
        device.pool = device.pool or Pool(simulated, device)
    pool: Pool = device.pool
    return pool


class PinnedPool:
    """Page-locked host memory: `cupy.cuda.PinnedMemoryPool`. A deleted buffer is reused at once, in use or not."""

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._all: list[NDArray[np.uint8]] = []

    def allocate(self, shape: Any, dtype: Any) -> NDArray[Any]:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = prod(shape) * np.dtype(dtype).itemsize
        rounded = max(BLOCK_BYTES, 1 << (size - 1).bit_length() if size else 0)
        free = self._free.setdefault(rounded, [])
        if free:
            memory = free.pop()
        else:
            memory = np.empty(rounded, np.uint8)
            self._all.append(memory)
        memory.view(np.uint16).fill(POISON)
        owner = _Owner(memory)
        weakref.finalize(owner, free.append, memory).atexit = False
        array: NDArray[Any] = np.asarray(owner)[:size].view(dtype).reshape(shape)
        return array

    def locate(self, array: NDArray[Any]) -> NDArray[Any] | None:
        """Return the page-locked memory of an array as an array that does not keep it; None for pageable memory."""
        for memory in self._all:
            offset = array.ctypes.data - memory.ctypes.data
            if 0 <= offset <= memory.nbytes - array.nbytes:
                return np.ndarray(array.shape, array.dtype, memory, offset, array.strides)
        return None


class _Owner:
    """Base of the arrays in one buffer."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.__array_interface__ = memory.__array_interface__
