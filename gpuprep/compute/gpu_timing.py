"""Times copies, kernels and the compiler on a GPU, and compares kernels with a lower limit from their bytes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuprep.compute.backend import Backend, Engine, import_cupy_backend
from gpuprep.compute.hu_slabs import Source
from gpuprep.compute.memory_estimate import FLOAT_BYTES
from gpuprep.compute.process import host_chunks
from gpuprep.core.plan import Plan


def bandwidths(backend: Any, copied_bytes: int, repeats: int) -> dict[str, float]:
    """Return the median bandwidths of copies in bytes per second.

    Parameters
    ----------
    backend : CupyBackend
        Device.
    copied_bytes : int
        Size of a copy. The device needs twice, the host three times as much memory.
    repeats : int
        Number of timed copies of each kind, after one that is not timed.

    Returns
    -------
    dict of str to float
        "up" and "down" from and to page-locked memory, "up_pageable" and "down_pageable" from and to other memory,
        "device" within the device (bytes read plus bytes written).
    """
    module = import_cupy_backend()
    with backend.session():
        there, other = (backend.empty((copied_bytes,), np.uint8) for _ in range(2))
        locked = module.page_locked(copied_bytes)
        pageable = np.ones(copied_bytes, dtype=np.uint8)
        locked[...] = 1
        copies: dict[str, tuple[Callable[[], Any], int]] = {
            "up": (lambda: there.set(locked), copied_bytes),
            "down": (lambda: there.get(out=locked, blocking=False), copied_bytes),
            "up_pageable": (lambda: there.set(pageable), copied_bytes),
            "down_pageable": (lambda: there.get(out=pageable, blocking=False), copied_bytes),
            "device": (lambda: module.copy_on_device(other, there), 2 * copied_bytes),
        }
        found = {}
        for name, (copy, moved) in copies.items():
            taken = [module.device_seconds(copy) for _ in range(repeats + 1)]
            found[name] = moved / statistics.median(taken[1:])
    return found


def stage_seconds(source: Source, plan: Plan, backend: Backend, engine: Engine, repeats: int) -> dict[str, float]:
    """Return the seconds of one series: "first_whole_s" of the first run, medians of `repeats` further ones.

    The medians are "whole_s", measured by the host, and "upload_s", "kernels_s" and "download_s", measured by the
    device; a backend of the host has only "whole_s".
    """
    runs = []
    for _ in range(repeats + 1):
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        for _ in host_chunks(source, plan, backend, engine, seconds):
            pass
        runs.append(seconds | {"whole_s": time.perf_counter() - started})
    medians = {name: statistics.median(run[name] for run in runs[1:]) for name in runs[0]}
    return {"first_whole_s": runs[0]["whole_s"]} | medians


def pass_bytes(plan: Plan, stored_bytes: int) -> tuple[int, ...]:
    """Return the bytes that each pass of `gpuprep.compute.cuda_engine` has to read and write at least.

    Parameters
    ----------
    plan : Plan
        Plan of a series.
    stored_bytes : int
        Bytes of one stored value.
    """
    step = plan.resample
    stored = stored_bytes * math.prod(step.source)
    in_plane = FLOAT_BYTES * step.source[0] * math.prod(step.target[1:])
    if plan.has_final_size:  # resampling across writes the output
        return stored + in_plane, in_plane + plan.output_bytes
    across = FLOAT_BYTES * math.prod(step.target)
    return stored + in_plane, in_plane + across, across + plan.output_bytes
