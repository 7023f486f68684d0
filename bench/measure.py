"""Shared functions of the benchmarks: time, memory and CPU time of processes, differences of volumes, the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import tifffile

from gpuprep.core.versions import versions

SAMPLING_S = 0.02


class MemoryWatch:
    """Context manager that samples the memory of a process and its descendants in a thread, which slows them down.

    `peak_bytes` is the peak of the summed proportional set sizes (PSS). `largest_process_bytes` is the peak resident
    set size (RSS) of a single process.
    """

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0
        self.largest_process_bytes = 0

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self._finished.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            total = 0
            for p in tree(self._process):
                try:
                    info = p.memory_full_info()
                except (psutil.Error, OSError):
                    continue  # the process has ended
                total += info.pss
                self.largest_process_bytes = max(self.largest_process_bytes, info.rss)
            self.peak_bytes = max(self.peak_bytes, total)
            if self._finished.wait(SAMPLING_S):
                return


def seconds(command: list[str]) -> float:
    """Run a command and return its duration in seconds."""
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    taken = time.perf_counter() - started
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr.decode()}")
    return taken


def peak_bytes(command: list[str]) -> int:
    """Run a command and return the peak of the summed PSS of its processes."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with MemoryWatch(process) as watch:
        process.wait()
    return watch.peak_bytes


def tree(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and its descendants that are still running."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU time of a process, its descendants, and their terminated children, in seconds."""
    total = 0.0
    for p in tree(process):
        try:
            times = p.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def largest_difference(a: Path, b: Path) -> float:
    """Return the largest difference of pixel values between two folders with slices of the same names."""
    names = sorted(f.name for f in a.glob("*.tif"))
    if names != sorted(f.name for f in b.glob("*.tif")) or not names:
        raise SystemExit(f"{a} and {b} do not hold the same slices")
    return max(float(np.abs(tifffile.imread(a / n) - tifffile.imread(b / n)).max()) for n in names)


def save(out: Path | None, module: str, figures: dict[str, Any], *, gpu: bool = False) -> None:
    """Write the results of a benchmark to `out`, if given, as JSON with command, machine and versions."""
    if out is None:
        return
    provenance = {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(gpu),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(provenance | figures, indent=1) + "\n")


def shape_argument(text: str) -> tuple[int, int, int]:
    """Return the value of ``--shape``: slices, rows and columns, separated by commas."""
    slices, rows, columns = (int(n) for n in text.split(","))
    return slices, rows, columns


def machine() -> dict[str, Any]:
    """Return CPU, number of cores, memory and operating system."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
    }
