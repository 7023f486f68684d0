"""A CUDA runtime without a GPU: devices, and streams whose work runs late.

Work is queued and runs only when the host waits for some of it. The order across streams is then a random one of those
that CUDA allows, so a missing wait or a missing dependency shows as a wrong value:

* the work of one stream runs in order;
* the null stream waits for all streams that were not created with `non_blocking`, and these wait for it;
* nothing else is ordered, except by waiting.

Time is simulated: an upload takes `UPLOAD_S`, a kernel `KERNEL_S`, a download `DOWNLOAD_S`, anything else no time.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

UPLOAD_S, KERNEL_S, DOWNLOAD_S = 1.0, 0.25, 16.0
"""Durations on the simulated clock."""

VARIABLE = "SIMULATED_MACHINE"
"""Environment variable with the machine that child processes simulate: see `Machine.to_json`."""

ERRORS = {
    1: "cudaErrorInvalidValue: invalid argument",
    2: "cudaErrorMemoryAllocation: out of memory",
    3: "cudaErrorInitializationError: initialization error",
    35: "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version",
    100: "cudaErrorNoDevice: no CUDA-capable device is detected",
    101: "cudaErrorInvalidDevice: invalid device ordinal",
    400: "cudaErrorInvalidResourceHandle: invalid resource handle",
    600: "cudaErrorNotReady: device not ready",
    700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
}


class CUDARuntimeError(RuntimeError):
    """Error of the CUDA runtime."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(ERRORS[status])


CUDARuntimeError.__module__ = "cupy_backends.cuda.api.runtime"


@dataclass(frozen=True)
class Gpu:
    """A GPU, or an instance of one (MIG)."""

    uuid: str = "GPU-5a3f1c22-0000-4000-8000-000000000000"
    name: str = "Simulated GPU"
    memory_bytes: int = 10**10


@dataclass(frozen=True)
class Machine:
    """What is simulated."""

    gpus: tuple[Gpu, ...] = (Gpu(),)
    """GPUs; instances of a GPU (MIG) have a UUID that begins with ``MIG-``."""
    driver_version: int = 13000
    """CUDA version of the driver; 0 if none is loaded."""
    runtime_version: int = 13000
    """CUDA version that CuPy was built for."""
    largest_bytes: int | None = None
    """Largest allocation that succeeds, as if the free memory was in pieces; None for no limit."""
    fatal_value: int | None = None
    """The device fails for good when this value is uploaded."""
    stuck_value: int | None = None
    """The device works forever on an upload of this value."""
    seed: int = 0
    """Chooses the order of work."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Machine:
        fields = json.loads(text)
        return cls(**fields | {"gpus": tuple(Gpu(**gpu) for gpu in fields["gpus"])})

    def visible(self) -> tuple[Gpu, ...]:
        """Return the GPUs that CUDA lists by CUDA_VISIBLE_DEVICES: up to the first entry that names none."""
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        # CUDA shows one instance to a process.
        numbered = tuple(gpu for gpu in self.gpus if gpu.uuid.startswith("GPU-")) or self.gpus[:1]
        if listed is None:
            return numbered
        found: list[Gpu] = []
        for entry in (text.strip() for text in listed.split(",")):
            if entry.isdigit():
                named = numbered[int(entry) : int(entry) + 1]
            elif entry.startswith("GPU-"):
                named = tuple(gpu for gpu in numbered if gpu.uuid.startswith(entry))
            else:
                named = tuple(gpu for gpu in self.gpus if gpu.uuid == entry)
            if len(named) != 1:
                break
            found += named
        return tuple(found)


class Operation:
    """Work in a stream."""

    __slots__ = ("after", "done", "duration_s", "finished_s", "run")

    def __init__(self, run: Callable[[], None] | None, after: list[Operation], duration_s: float) -> None:
        self.run = run
        self.after = after
        """Work that must be done before."""
        self.done = False
        self.duration_s = duration_s
        self.finished_s = 0.0
        """Time at which it was done."""

    @property
    def ready(self) -> bool:
        return all(earlier.done for earlier in self.after)

    def execute(self) -> None:
        if self.run is not None:
            self.run()
        self.finished_s = self.duration_s + max((earlier.finished_s for earlier in self.after), default=0.0)
        self.run, self.after, self.done = None, [], True


class Queue:
    """A stream of the device. It outlives its handle until its work is done."""

    def __init__(self, handle: int, *, blocking: bool) -> None:
        self.handle = handle
        self.blocking = blocking
        self.pending: deque[Operation] = deque()
        self.last: Operation | None = None
        self.destroyed = False


class DeviceState:
    """A device as this process sees it."""

    def __init__(self, ordinal: int, gpu: Gpu) -> None:
        self.ordinal = ordinal
        self.gpu = gpu
        self.null = Queue(0, blocking=True)
        self.queues = [self.null]
        self.free_handles: list[int] = []
        self.allocated_bytes = 0
        self.pool: Any = None
        """CuPy's memory pool of the device."""


class ThreadState(threading.local):
    """Current device and streams of a thread."""

    def __init__(self) -> None:
        self.device = 0
        self.outer_devices: list[int] = []
        self.streams: dict[int, list[Any]] = {}
        """Streams of ``with`` statements by device, the current one last."""
        self.stream_devices: list[int] = []
        """Devices of these ``with`` statements."""


class Simulation:
    """The CUDA runtime of this process.

    Parameters
    ----------
    machine : Machine
        What is simulated.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.lock = threading.RLock()
        self.fault: Exception | None = None
        """Why every call fails from now on."""
        self.thread = ThreadState()
        self.computes = True
        """Whether work is done at all; without it, values are undefined, and large arrays take no time."""
        self._random = random.Random(machine.seed)  # noqa: S311 - repeatable
        self._devices: list[DeviceState] | None = None
        self._process = 0
        self._next_handle = 0x1000
        self.modules: dict[tuple[str, tuple[str, ...]], Any] = {}
        """Compiled modules by source and options."""
        self.copies: list[tuple[str, str, tuple[int, ...]]] = []
        """Direction ("up" or "down"), dtype and shape of each copy that was begun."""
        self._discarded: list[tuple[DeviceState, Queue]] = []

    def devices(self) -> list[DeviceState]:
        """Return the devices; the first call of a process reads CUDA_VISIBLE_DEVICES."""
        if self.machine.driver_version < self.machine.runtime_version:
            raise CUDARuntimeError(35)
        if self._devices is None:
            self._process = os.getpid()
            self._devices = [DeviceState(n, gpu) for n, gpu in enumerate(self.machine.visible())]
        if self._process != os.getpid():
            raise CUDARuntimeError(3)  # CUDA does not survive a fork
        if not self._devices:
            raise CUDARuntimeError(100)
        return self._devices

    def device(self, ordinal: int | None = None) -> DeviceState:
        """Return a device, by default the current one of this thread."""
        self.check()
        devices = self.devices()
        number = self.thread.device if ordinal is None else ordinal
        if not 0 <= number < len(devices):
            raise CUDARuntimeError(101)
        return devices[number]

    def check(self) -> None:
        """Raise the error of a device that has failed."""
        if self.fault is not None:
            raise self.fault

    def inspect(self, uploaded: Any) -> None:
        """Let the device fail, or never end, if uploaded values say so."""
        if self.machine.fatal_value in uploaded:
            self.fault = CUDARuntimeError(700)
        while self.machine.stuck_value in uploaded:
            time.sleep(1)

    def next_seed(self) -> int:
        """Return a number that chooses the order of the blocks of a kernel."""
        return self._random.getrandbits(32)

    def create_queue(self, *, blocking: bool) -> Queue:
        with self.lock:
            device = self.device()
            self._destroy_discarded()
            if device.free_handles:
                handle = device.free_handles.pop()
            else:
                handle = self._next_handle
                self._next_handle += 0x10
            queue = Queue(handle, blocking=blocking)
            device.queues.append(queue)
            return queue

    def discard_queue(self, device: DeviceState, queue: Queue) -> None:
        """Destroy a stream: its work will be done, and its handle may be given to another one. Takes no lock."""
        self._discarded.append((device, queue))

    def _destroy_discarded(self) -> None:
        while self._discarded:
            device, queue = self._discarded.pop()
            queue.destroyed = True
            device.free_handles.append(queue.handle)
        for device in self.devices():
            device.queues = [queue for queue in device.queues if queue.pending or not queue.destroyed]

    def enqueue(
        self,
        device: DeviceState,
        queue: Queue,
        run: Callable[[], None] | None,
        duration_s: float = 0.0,
        after: Sequence[Operation] = (),
    ) -> Operation:
        """Append work to a stream; it runs after the earlier work of the stream, and after the given operations."""
        with self.lock:
            self.check()
            if queue not in device.queues:
                raise CUDARuntimeError(400)
            others = device.queues if queue is device.null else [device.null] if queue.blocking else []
            run = run if self.computes else None
            before = [q.last for q in (queue, *others) if q.blocking or q is queue]
            operation = Operation(run, [*after, *(last for last in before if last is not None)], duration_s)
            queue.pending.append(operation)
            queue.last = operation
            return operation

    def wait(self, operations: Iterable[Operation | None]) -> None:
        """Run work in a random order until these operations are done."""
        with self.lock:
            self.check()
            awaited = [operation for operation in operations if operation is not None]
            needed = _closure(awaited) if self._random.random() < 0.5 else None
            while not all(operation.done for operation in awaited):
                self._step(needed)
            self.check()

    def wait_for_device(self, device: DeviceState) -> None:
        with self.lock:
            self.wait([queue.last for queue in device.queues])

    def is_done(self, operation: Operation | None) -> bool:
        """Return whether work is done; if not, some other work is done meanwhile."""
        with self.lock:
            self.check()
            if operation is None or operation.done:
                return True
            self._step(None)
            return False

    def _step(self, needed: set[Operation] | None) -> None:
        ready = [
            queue
            for device in self.devices()
            for queue in device.queues
            if queue.pending and queue.pending[0].ready and (needed is None or queue.pending[0] in needed)
        ]
        operation = self._random.choice(ready).pending.popleft()
        try:
            operation.execute()
        except Exception as exc:
            self.fault = self.fault or exc
            raise


_current: Simulation | None = None


def simulation() -> Simulation:
    """Return the simulation of this process; in a child process, of the machine that the environment describes."""
    global _current
    if _current is None:
        _current = Simulation(Machine.from_json(os.environ[VARIABLE]))
    return _current


def simulate(machine: Machine | None) -> None:
    """Begin a new simulation, or end it."""
    global _current
    _current = None if machine is None else Simulation(machine)


def _closure(operations: Sequence[Operation]) -> set[Operation]:
    """Return operations with everything that must be done before them."""
    found: set[Operation] = set()
    stack: list[Any] = list(operations)
    while stack:
        operation = stack.pop()
        if operation not in found and not operation.done:
            found.add(operation)
            stack += operation.after
    return found
