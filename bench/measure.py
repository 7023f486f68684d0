"""What the benchmarks share: time, memory and processor time of processes, differences of volumes, the machine."""

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

from gpuprep.pipeline.convert_series import versions

SAMPLING_S = 0.02


class MemoryWatch:
    """Watches a process and its descendants from a thread, as a context manager; watching slows them down.

    `peak_bytes` is the highest sum, over the processes, of the memory they do not share plus their part of what they
    do (PSS). `largest_process_bytes` is the highest resident size (RSS) of any single one.
    """

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0
        self.largest_process_bytes = 0

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            total = 0
            for p in tree(self._process):
                try:
                    info = p.memory_full_info()
                except (psutil.Error, OSError):
                    continue  # it has just ended
                total += info.pss
                self.largest_process_bytes = max(self.largest_process_bytes, info.rss)
            self.peak_bytes = max(self.peak_bytes, total)
            if self._over.wait(SAMPLING_S):
                return


def seconds(command: list[str]) -> float:
    """Run a command to its end and return how long it took."""
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    taken = time.perf_counter() - started
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended {done.returncode}:\n{done.stderr.decode()}")
    return taken


def peak_bytes(command: list[str]) -> int:
    """Run a command to its end and return the highest sum of PSS over its processes."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with MemoryWatch(process) as watch:
        process.wait()
    return watch.peak_bytes


def tree(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and its descendants, as far as they still run."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def cpu_s(process: psutil.Process) -> float:
    """Return the processor time that a process, its descendants and those that they have waited for have used."""
    total = 0.0
    for p in tree(process):
        try:
            times = p.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def largest_difference(a: Path, b: Path) -> float:
    """Return the largest difference between two folders of equal slices."""
    names = sorted(f.name for f in a.glob("*.tif"))
    if names != sorted(f.name for f in b.glob("*.tif")) or not names:
        raise SystemExit(f"{a} and {b} do not hold the same slices")
    return max(float(np.abs(tifffile.imread(a / n) - tifffile.imread(b / n)).max()) for n in names)


def save(out: Path | None, module: str, figures: dict[str, Any]) -> None:
    """Write the figures of a benchmark as JSON, with command, machine and versions, if there is a file to write to."""
    if out is None:
        return
    made_by = {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(made_by | figures, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
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
