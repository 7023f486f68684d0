"""Estimates from shapes how much memory a series takes, on a device or on the host, and shares memory out."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from gpuprep.compute import resample_taps
from gpuprep.compute.backend import Backend, Body, Engine
from gpuprep.core.plan import BYTES, Plan, Step

CONTEXT_BYTES = 600 * 2**20
"""What a process takes before its first volume: CUDA's context, loaded kernels, cuBLAS and its workspace."""

AT_REST_BYTES: dict[Body, int] = {"loops": 165 * 10**6, "matmul": 70 * 10**6}
"""What a worker process takes without a volume: Python, what it imports, and for the loops most of a compiler."""

WRITING_BYTES = {"nifti": 80 * 10**6, "zarr": 150 * 10**6}
"""By format, what its library takes in a worker, and what is buffered while a volume is written; others take little."""

USABLE = 0.8
"""Share of the free memory that is planned with: predictions look at arrays, and allocators round and split."""

FLOAT = 4

REACH = {0: 2, 1: 3, 2: 26, 3: 32, 4: 42, 5: 52}
"""Input samples that an output sample depends on, by spline order: where weights fall under 1e-8, and some to spare."""

PADDED = 24
"""Voxels by which `cupyx.scipy.ndimage.zoom` lengthens each axis before a prefilter."""


def workers(free: int, wanted: int) -> int:
    """Return how many processes may share a device with so much free memory: their contexts take half at most."""
    return max(1, min(wanted, int(USABLE * free / 2) // CONTEXT_BYTES))


def for_volumes(free: int, processes: int, at_rest: int = CONTEXT_BYTES, share: float = USABLE) -> int:
    """Return what is left for volumes, of a share of free memory, beside what each of the processes takes at rest."""
    return max(0, int(share * free) - processes * at_rest)


def host_bytes_free() -> int | None:
    """Return the memory that this machine, or the container around this process, has left; None where nobody says."""
    left = []
    with suppress(OSError, ValueError, LookupError):
        meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        left.append(1024 * int(meminfo["MemAvailable"].split()[0]))
    with suppress(OSError, ValueError, LookupError):  # the word "max" where the container has no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Files that are cached only because there is room count as used.
        left.append(limit - int((group / "memory.current").read_text()) + int(stat["file"]))
    return min(left, default=None)


def needed_bytes(plan: Plan, backend: Backend, engine: Engine) -> int:
    """Return `host_bytes` or `device_bytes`, whichever it is that a backend computes in."""
    return (host_bytes if backend.name == "cpu" else device_bytes)(plan, backend, engine)


def host_bytes(plan: Plan, backend: Backend, engine: Engine) -> int:
    """Return the memory that a series needs at one time in a process that computes on the host.

    That is beyond `AT_REST_BYTES`. The parameters are those of `device_bytes`.
    """
    step, out_bytes = plan.resample, _plane(plan.target.shape) * BYTES[plan.recipe.dtype]
    source, slab = _plane(plan.source.shape), backend.slab_slices
    whole = math.prod(plan.source.shape) if plan.turn.axes[0] != 0 or engine == "ndimage" else 0
    if engine == "ndimage":
        # SciPy pads in float32, filters in float64 and keeps both while it resamples.
        padded = math.prod(n + PADDED for n in step.source) if step.order > 1 else math.prod(step.source)
        resampled = 0 if step.idle else math.prod(step.target)
        filtered = 0 if step.idle else (3 if step.order > 1 else 0) * padded
        chunk = backend.chunk_slices * (_plane(step.target) + 3 * _plane(plan.resize.target))
        return FLOAT * (whole + max(filtered + resampled, resampled + chunk)) + backend.chunk_slices * out_bytes
    if backend.body == "matmul":
        return device_bytes(plan, backend, engine)
    rows, columns = step.target[1:]
    window = 1
    if step.moves(0):
        ahead = resample_taps.REACH if step.order == 3 and step.along[0] is None and not step.sigma[0] else 0
        span = (
            _band(step, 0, round(resample_taps.GROUP * step.target[0] / step.source[0]))
            if not ahead
            else resample_taps.GROUP + 4
        )
        slices = min(step.source[0], span + ahead)
        window = min(step.source[0], slices + slices // 2) + (min(step.source[0], span) if ahead else 0)
    voxels = whole + source * 3 // 2  # the slice that is read, as integers and as HU
    voxels += 2 * rows * step.source[2] if step.moves(1) else 0
    voxels += 2 * rows * columns if step.moves(2) else 0
    voxels += window * rows * columns + rows * plan.resize.target[2]
    return FLOAT * voxels + slab * out_bytes


def device_bytes(plan: Plan, backend: Backend, engine: Engine) -> int:
    """Return an upper estimate of the device memory that a series needs at one time.

    Parameters
    ----------
    plan : Plan
        Of the series.
    backend : Backend
        Its slices at a time count.
    engine : {"operators", "ndimage"}
        The latter holds the whole volume, before and after resampling.
    """
    step, slab = plan.resample, backend.slab_slices
    stack = math.prod(plan.source.shape)
    source = math.prod(plan.source.shape[1:])
    # The slab that goes up, as integers and as HU; each of them is replaced only when the next one is there.
    total = 2 * slab * source * (2 + FLOAT)
    if any(plan.turn.axes[k] != k for k in range(3)) or engine == "ndimage":
        total += stack * FLOAT
    if engine == "ndimage":
        voxels = backend.chunk_slices * 2 * (_plane(step.target) + _plane(plan.resize.target))
        if not step.idle:
            voxels += math.prod(step.target)
            voxels += stack if any(step.sigma) else 0
            voxels += 2 * math.prod(n + PADDED for n in step.source) if step.order > 1 else 0
        return total + FLOAT * voxels + _output(plan, backend.chunk_slices)

    n, m = step.source, step.target
    shrunk = (n[0], min(n[1], m[1]), min(n[2], m[2]))
    before, between = _in_plane(n, shrunk, slab, step, backend)
    grown, there = _in_plane(shrunk, m, slab, step, backend)
    resized, at_last = _in_plane(m, plan.resize.target, slab, plan.resize, backend)
    chunk = min(backend.chunk_slices, m[0])
    band = _band(step, 0, chunk)
    window = min(n[0], band + max(band // 2, slab)) * _plane(shrunk)
    weights = 2 * sum(
        s.target[axis] * _band(s, axis, backend.block_rows if axis else chunk)
        for s in (step, plan.resize)
        for axis in range(3)
        if s.moves(axis)
    )
    along_z = chunk * _plane(shrunk) if step.moves(0) else 0
    windowed = slab * _plane(m) if plan.recipe.window_hu is not None else 0
    voxels = before + window + along_z + grown + windowed + resized + max(between, there, at_last) + weights
    return total + FLOAT * voxels + _output(plan, slab)


def mask_bytes(plan: Plan, backend: Backend) -> int:
    """Return an upper estimate of what the labels of a series need at one time."""
    # Those of its slices are painted whole, in up to 16 bits, and copied once; the output comes in chunks.
    return 2 * (2 * math.prod(plan.source.shape) + 3 * backend.chunk_slices * _plane(plan.target.shape))


def _in_plane(
    before: tuple[int, int, int], after: tuple[int, int, int], slab: int, step: Step, backend: Backend
) -> tuple[int, int]:
    """Return the voxels that stay allocated for rows and then columns of slabs, and the most that are for a moment.

    `matmul` copies its arguments and its result where they are not contiguous, which blocks of an axis are not.
    """
    shape, kept, moment = list(before), 0, 0
    for axis in (1, 2):
        if before[axis] == after[axis]:
            continue
        other = shape[3 - axis]
        rows = min(backend.block_rows, after[axis])
        moment = max(moment, slab * other * (_band(step, axis, rows) + rows))
        shape[axis] = after[axis]
        kept += slab * shape[1] * shape[2]
    return kept, moment


def _band(step: Step, axis: int, rows: int) -> int:
    """Return how many input samples so many output samples in a row depend on."""
    places = step.along[axis]
    n = step.source[axis] if places is None else len(places)
    reach = REACH[step.order] + math.ceil(8 * step.sigma[axis])
    return min(n, math.ceil(rows * n / step.target[axis]) + reach)


def _plane(shape: tuple[int, int, int]) -> int:
    return shape[1] * shape[2]


def _output(plan: Plan, slab: int) -> int:
    """Return the bytes of the finished chunks: one that is copied down, and the next one."""
    placed = slab * _plane(plan.target.shape) * FLOAT if plan.resize.target != plan.target.shape else 0
    return placed + 2 * slab * _plane(plan.target.shape) * BYTES[plan.recipe.dtype]
