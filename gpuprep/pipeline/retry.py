"""Tries tasks again whose worker died or that lacked memory, and turns every outcome into a result."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from copy import copy
from dataclasses import replace
from typing import TypeVar

from gpuprep.core.formatting import format_bytes
from gpuprep.executors.processes import Executor, OverdueError, WorkerDiedError
from gpuprep.executors.signals import Stop
from gpuprep.output.folder_store import Output
from gpuprep.output.records import SeriesResult, now
from gpuprep.pipeline.convert_series import (
    DEVICE_MEMORY,
    Filled,
    commit_series,
    convert_series,
    fill_series,
    left_out,
)
from gpuprep.pipeline.task import Task

COMMITS = 4
"""Maximum number of series that are flushed to disk while workers convert the next ones."""

DEATHS_ALLOWED = 2
"""Number of workers that may die over a series before it is recorded as failed."""


T = TypeVar("T")


class Attempts:
    """Runs tasks, again where a worker died or memory was short, and returns the result of each."""

    def __init__(
        self, executor: Executor, output: Output, disk_share: float | None, limit_s: float | None, stop: Stop
    ) -> None:
        self._executor = executor
        self._output = output
        self._disk_share = disk_share or 0.0
        self._limit_s = limit_s
        self._stop = stop
        self._refused: list[tuple[Task, SeriesResult]] = []

    def of(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, SeriesResult]]:
        """Yield the result of each task.

        A task for which a device had too little memory, or whose worker died, is tried again alone, when all others
        have ended and their memory is free.
        """
        again = []
        for task, outcome in self._run(self._admitted(tasks)):
            if _worth_another(outcome):
                again.append(task)
            else:
                yield task, _result(task, outcome)
            yield from self._out_of_room()
        yield from self._out_of_room()
        for task in again:
            # Smaller chunks do not help the engine "ndimage", whose library calls take whole volumes.
            divisors = (1, 4, 64) if task.engine == "operators" else (1,)
            for attempt in (_smaller(task, divisor) for divisor in divisors):
                self._executor.stop()  # idle workers still hold memory
                outcomes = list(self._run([attempt]))
                if not outcomes:  # stopped
                    return
                result = _result(task, outcomes[0][1], DEATHS_ALLOWED)
                if DEVICE_MEMORY not in result.codes:
                    break
            else:
                advice = "alone on the device: ask for a coarser --spacing or a smaller --size, or use --backend cpu"
                result = replace(result, reason=f"{result.reason}, {advice}")
            yield task, result

    def _run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, SeriesResult | WorkerDiedError]]:
        if not (self._executor.on_this_machine and self._output.waits_for_disk):
            yield from self._outcomes(convert_series, tasks)
            return
        threads = ThreadPoolExecutor(COMMITS)
        waiting: deque[tuple[Task, Future[SeriesResult]]] = deque()
        try:
            for task, outcome in self._outcomes(fill_series, tasks):
                if isinstance(outcome, Filled):
                    waiting.append((task, threads.submit(commit_series, task, outcome)))
                else:
                    yield task, outcome
                while waiting and (waiting[0][1].done() or len(waiting) > COMMITS):
                    yield waiting[0][0], waiting[0][1].result()
                    waiting.popleft()
            while waiting:
                yield waiting[0][0], waiting[0][1].result()
                waiting.popleft()
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):  # which is raised below
                _wait_for(future for _, future in waiting)
            for committed, future in waiting:  # they are in place, so the manifest has to know them
                if not future.cancelled():
                    yield committed, future.result()
            raise
        finally:
            try:
                _wait_for(future for _, future in waiting)
            finally:
                threads.shutdown()

    def _outcomes(
        self, function: Callable[[Task], T], tasks: Iterable[Task]
    ) -> Iterator[tuple[Task, T | WorkerDiedError]]:
        return self._executor.run(
            function,
            tasks,
            lambda task: task.planned.needs.memory_bytes,
            limit_s=self._limit_s,
            stopped=lambda: self._stop.asked,
        )

    def _admitted(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """Yield the tasks whose outputs fit on the disk, checked as each task begins."""
        for task in tasks:
            need, free = int(task.planned.needs.output_bytes * self._disk_share), self._output.free_bytes()
            if free is None or need <= free:
                yield task
                continue
            reason = (
                f"OutputError: it needs {format_bytes(need)} and {format_bytes(free)} are free: free some and run again"
            )
            refused = replace(task.result(), reason=reason, codes=("disk-full",), finished=now())
            self._refused.append((task, refused))

    def _out_of_room(self) -> Iterator[tuple[Task, SeriesResult]]:
        refused, self._refused = self._refused, []
        yield from refused


def _wait_for(commits: Iterable[Future[SeriesResult]]) -> None:
    """Wait until the series in flight are in place, whatever signals arrive; the others are left to the next run.

    A thread that outlived the run would move its folder while that is being removed, or another run writes into OUT.
    """
    running = [commit for commit in commits if not commit.cancel()]
    interrupted: KeyboardInterrupt | None = None
    while not all(commit.done() for commit in running):
        try:
            wait(running)  # and not for the threads: Python takes a thread for ended if a signal interrupts that
        except KeyboardInterrupt as exc:
            interrupted = exc
    if interrupted is not None:
        raise interrupted


def _worth_another(outcome: SeriesResult | WorkerDiedError) -> bool:
    if isinstance(outcome, WorkerDiedError):
        return not isinstance(outcome, OverdueError) and outcome.deaths < DEATHS_ALLOWED
    return DEVICE_MEMORY in outcome.codes


def _result(task: Task, outcome: SeriesResult | WorkerDiedError, deaths: int = 1) -> SeriesResult:
    """Return an outcome as a result; `deaths` is the number of workers that have died over the series."""
    if isinstance(outcome, OverdueError):
        reason = f"OverdueError: {outcome}, the limit set by --time-limit: raise it, and gpuprep retry tries it again"
        return replace(left_out(task.result(), outcome), reason=reason, codes=("time",), finished=now())
    if isinstance(outcome, WorkerDiedError):
        died = left_out(task.result(), outcome)
        count = max(deaths, outcome.deaths)
        reason = f"{died.reason}; it has ended {count} workers, and is set aside: gpuprep retry tries it again"
        return replace(died, reason=reason, codes=("worker-died",), finished=now())
    return outcome


def _smaller(task: Task, divisor: int) -> Task:
    """Return a task whose chunks have fewer slices by a factor of `divisor`."""
    backend = copy(task.backend)
    backend.chunk_slices = max(1, backend.chunk_slices // divisor)
    backend.slab_slices = max(1, backend.slab_slices // divisor)
    return replace(task, backend=backend)
