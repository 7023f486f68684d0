"""`cupy.cuda.Device`, `Stream` and `Event`, and the runtime functions that gpuprep uses, on the simulated runtime."""

from __future__ import annotations

import weakref
from typing import Any, Self

from simulated_cuda import CUDARuntimeError, DeviceState, Operation, Queue, simulation


class Device:
    """`cupy.cuda.Device`."""

    def __init__(self, device: Any = None) -> None:
        self.id = simulation().device().ordinal if device is None else int(device)

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __enter__(self) -> Self:
        simulation().device(self.id)
        thread = simulation().thread
        thread.outer_devices.append(thread.device)
        thread.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        thread = simulation().thread
        thread.device = thread.outer_devices.pop()

    def use(self) -> Self:
        simulation().device(self.id)
        simulation().thread.device = self.id
        return self

    def synchronize(self) -> None:
        simulation().wait_for_device(simulation().device(self.id))

    @property
    def mem_info(self) -> tuple[int, int]:
        device = simulation().device(self.id)
        return device.gpu.memory_bytes - device.allocated_bytes, device.gpu.memory_bytes

    @property
    def compute_capability(self) -> str:
        return "90"


class Stream:
    """`cupy.cuda.Stream`. When it is deleted, its handle may be given to the next one, with its memory arena."""

    null: Stream

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        assert not ptds, "per-thread default streams are not simulated"
        assert priority is None, "priorities are not simulated"
        self._queue: Queue | None = None
        self.ptr, self.device_id = 0, -1
        if not null:
            device = simulation().device()
            self._queue = simulation().create_queue(blocking=not non_blocking)
            self.ptr, self.device_id = self._queue.handle, device.ordinal
            finalizer = weakref.finalize(self, simulation().discard_queue, device, self._queue)
            finalizer.atexit = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return self.ptr

    def __enter__(self) -> Self:
        ordinal = self._on_current_device()
        simulation().thread.streams.setdefault(ordinal, []).append(self)
        simulation().thread.stream_devices.append(ordinal)
        return self

    def __exit__(self, *_: object) -> None:
        thread = simulation().thread
        thread.streams[thread.stream_devices.pop()].pop()

    def _on_current_device(self) -> int:
        current = simulation().device().ordinal
        if self.device_id not in (-1, current):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) does not match with the current device "
                f"({current})"
            )
        return current

    @property
    def place(self) -> tuple[DeviceState, Queue]:
        """Device and queue of the stream."""
        device = simulation().device(None if self.device_id == -1 else self.device_id)
        return device, self._queue or device.null

    @property
    def done(self) -> bool:
        return simulation().is_done(self.place[1].last)

    @property
    def is_non_blocking(self) -> bool:
        return not self.place[1].blocking

    def synchronize(self) -> None:
        simulation().wait([self.place[1].last])

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        simulation().enqueue(*self.place, None, after=event.recorded)


Stream.null = Stream(null=True)


def get_current_stream(device_id: int = -1) -> Stream:
    ordinal = simulation().device(None if device_id == -1 else device_id).ordinal
    streams = simulation().thread.streams.get(ordinal)
    current: Stream = streams[-1] if streams else Stream.null
    return current


class Event:
    """`cupy.cuda.Event`."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        assert not interprocess, "events of several processes are not simulated"
        self._device = simulation().device()
        self.block = block
        self.timed = not disable_timing
        self.recorded: list[Operation] = []
        """The last record, if there is one."""

    @property
    def done(self) -> bool:
        return all(simulation().is_done(operation) for operation in self.recorded)

    def record(self, stream: Stream | None = None) -> None:
        device, queue = (stream or get_current_stream()).place
        if device is not self._device:
            raise CUDARuntimeError(400)
        self.recorded = [simulation().enqueue(device, queue, None)]

    def synchronize(self) -> None:
        simulation().wait(self.recorded)


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Return milliseconds of the simulated clock."""
    times = []
    for event in (start_event, end_event):
        if not event.timed or not event.recorded:
            raise CUDARuntimeError(400)
        if not event.recorded[0].done:
            raise CUDARuntimeError(600)
        times.append(event.recorded[0].finished_s)
    return 1000 * (times[1] - times[0])


# The names of cupy.cuda.runtime.


def get_device_count() -> int:
    return len(simulation().devices())


def driver_get_version() -> int:
    return simulation().machine.driver_version


def runtime_get_version() -> int:
    return simulation().machine.runtime_version


def get_device_properties(ordinal: int) -> dict[str, Any]:
    gpu = simulation().device(ordinal).gpu
    return {
        "name": gpu.name.encode(),
        "uuid": gpu.uuid.split("-", 1)[1].replace("-", "").encode()[:16],
        "totalGlobalMem": gpu.memory_bytes,
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 132,
    }
