"""Estimates the memory that a series needs on a GPU or on the host, from shapes, and divides free memory."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import numpy as np

from gpuprep.compute import resample_matrix, resample_taps
from gpuprep.compute.backend import Backend, Body, Engine
from gpuprep.compute.cuda_engine import ring_slices, slices_per_chunk
from gpuprep.compute.resample_blocks import OUTPUTS
from gpuprep.core.axis_part import SPLINE_REACH
from gpuprep.core.plan import BYTES_PER_VOXEL, Plan, Step

CONTEXT_BYTES = 600 * 2**20
"""Device memory of a process before its first volume: CUDA context and loaded kernels."""

AT_REST_BYTES: dict[Body, int] = {"kernels": 70 * 10**6, "loops": 165 * 10**6, "matmul": 70 * 10**6}
"""Memory of a worker process without a volume: Python, imported modules, and for the loops most of a compiler."""

WRITING_BYTES = {"nifti": 80 * 10**6, "zarr": 150 * 10**6}
"""Memory of a writer by format: its library, and buffers while a volume is written. Other formats need little."""

USABLE_SHARE = 0.8
"""Share of the free memory to plan with: estimates count arrays, and allocators round sizes and fragment memory."""

FLOAT_BYTES = 4

ZOOM_PADDING = 24
"""Voxels by which `cupyx.scipy.ndimage.zoom` lengthens each axis before a prefilter."""


def worker_count(free: int, wanted: int) -> int:
    """Return the number of processes that may share a device: their contexts take at most half of its usable memory."""
    return max(1, min(wanted, int(USABLE_SHARE * free / 2) // CONTEXT_BYTES))


def volume_memory_bytes(free: int, processes: int, at_rest: int = CONTEXT_BYTES, share: float = USABLE_SHARE) -> int:
    """Return the bytes left for volumes: a share of the free memory, less the memory at rest of each process."""
    return max(0, int(share * free) - processes * at_rest)


def host_bytes_free() -> int | None:
    """Return the free memory of this machine, or of the container if it has less; None if it is unknown."""
    left = []
    with suppress(OSError, ValueError, LookupError):
        meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        left.append(1024 * int(meminfo["MemAvailable"].split()[0]))
    with suppress(OSError, ValueError, LookupError):  # int("max") fails: the container has no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # memory.current counts the page cache as used.
        left.append(limit - int((group / "memory.current").read_text()) + int(stat["file"]))
    return min(left, default=None)


def needed_bytes(plan: Plan, backend: Backend, engine: Engine) -> int:
    """Return `host_bytes` for the CPU backend, `device_bytes` for others."""
    return (host_bytes if backend.name == "cpu" else device_bytes)(plan, backend, engine)


def host_bytes(plan: Plan, backend: Backend, engine: Engine) -> int:
    """Return the estimated peak memory of a series in a process that computes on the host, beyond `AT_REST_BYTES`.

    The parameters are those of `device_bytes`.
    """
    step, out_bytes = plan.resample, _plane_voxels(plan.target.shape) * BYTES_PER_VOXEL[plan.recipe.dtype]
    source = _plane_voxels(plan.source.shape)
    whole = math.prod(plan.source.shape) if plan.turn.axes[0] != 0 or engine == "ndimage" else 0
    if engine == "ndimage":
        # SciPy pads in float32, filters in float64 and keeps both arrays while it resamples.
        padded = math.prod(n + ZOOM_PADDING for n in step.source) if step.order > 1 else math.prod(step.source)
        resampled = 0 if step.is_identity else math.prod(step.target)
        filtered = 0 if step.is_identity else (3 if step.order > 1 else 0) * padded
        chunk = backend.chunk_slices * (_plane_voxels(step.target) + 3 * _plane_voxels(plan.resize.target))
        return FLOAT_BYTES * (whole + max(filtered + resampled, resampled + chunk)) + backend.chunk_slices * out_bytes
    if backend.body == "matmul":
        return device_bytes(plan, backend, engine)
    rows, columns = step.target[1:]
    planes = 1  # slices that wait to be combined, and filtered ones
    if step.resamples(0):
        prefiltered = step.order == 3 and step.along[0] is None and not step.sigma[0]
        planes = _band_width(step, 0, 1)
        if prefiltered:
            planes = resample_taps.GROUP_SLICES + 4
            planes += min(step.source[0], planes + resample_taps.PREFILTER_RADIUS)
    voxels = whole + source * 3 // 2  # the slice being read, as 16-bit integers and as HU
    voxels += rows * step.source[2] if step.resamples(1) else 0
    voxels += planes * rows * columns + rows * plan.resize.target[2]
    return FLOAT_BYTES * voxels + out_bytes


def device_bytes(plan: Plan, backend: Backend, engine: Engine) -> int:
    """Return an upper estimate of the peak device memory of a series.

    Parameters
    ----------
    plan : Plan
        Plan of the series.
    backend : Backend
        Backend, for its numbers of slices per chunk and per slab.
    engine : {"operators", "ndimage"}
        Resampling method; "ndimage" holds the whole volume before and after resampling.
    """
    if backend.body == "kernels" and engine == "operators":
        return _kernel_bytes(plan, backend)
    step, slab = plan.resample, backend.slab_slices
    stack = math.prod(plan.source.shape)
    source = math.prod(plan.source.shape[1:])
    # The uploaded slab as integers and as HU, twice each: one is freed only after the next has been allocated.
    total = 2 * slab * source * (2 + FLOAT_BYTES)
    if any(plan.turn.axes[k] != k for k in range(3)) or engine == "ndimage":
        total += stack * FLOAT_BYTES
    if engine == "ndimage":
        voxels = backend.chunk_slices * 2 * (_plane_voxels(step.target) + _plane_voxels(plan.resize.target))
        if not step.is_identity:
            voxels += math.prod(step.target)
            voxels += stack if any(step.sigma) else 0
            voxels += 2 * math.prod(n + ZOOM_PADDING for n in step.source) if step.order > 1 else 0
        return total + FLOAT_BYTES * voxels + _output_bytes(plan, backend.chunk_slices)

    n, m = step.source, step.target
    shrunk = (n[0], min(n[1], m[1]), min(n[2], m[2]))
    shrink_kept, shrink_temporary = _in_plane_voxels(n, shrunk, slab, step)
    grow_kept, grow_temporary = _in_plane_voxels(shrunk, m, slab, step)
    resize_kept, resize_temporary = _in_plane_voxels(m, plan.resize.target, slab, plan.resize)
    chunk = min(backend.chunk_slices, m[0])
    band = _band_width(step, 0, chunk)
    window = min(n[0], band + max(band // 2, slab)) * _plane_voxels(shrunk)
    weights = 2 * sum(
        s.target[axis] * _band_width(s, axis, resample_matrix.BLOCK_ROWS if axis else chunk)
        for s in (step, plan.resize)
        for axis in range(3)
        if s.resamples(axis)
    )
    along_z = chunk * _plane_voxels(shrunk) if step.resamples(0) else 0
    windowed = slab * _plane_voxels(m) if plan.recipe.window_hu is not None else 0
    voxels = shrink_kept + window + along_z + grow_kept + windowed + resize_kept + weights
    voxels += max(shrink_temporary, grow_temporary, resize_temporary)
    return total + FLOAT_BYTES * voxels + _output_bytes(plan, slab)


def _kernel_bytes(plan: Plan, backend: Backend) -> int:
    """Return the estimate for `gpuprep.compute.cuda_engine`: its buffers, one by one."""
    step, chunk = plan.resample, min(slices_per_chunk(backend.chunk_slices), plan.target.shape[0])
    samples = _samples(step, 0), _samples(step, 1), _samples(step, 2)
    slab, plane = min(backend.slab_slices, samples[0]), _plane_voxels(step.target)
    slices = samples[plan.turn.axes.index(0)]
    source = min(backend.slab_slices, slices) * _plane_voxels(plan.source.shape)
    total = 2 * 2 * source  # uploaded integers: this slab and the next one
    # HU of this slab and the next one; or the next one as acquired, shifted along rows, and along columns
    loaded = (4 if plan.shifted else 2) * source
    if plan.turn.axes != (0, 1, 2):
        copied = slab * _plane_voxels(samples)  # a slab with adjacent rows
        total += FLOAT_BYTES * (slices * _plane_voxels(plan.source.shape) + max(loaded, copied))
    elif plan.shifted:
        total += FLOAT_BYTES * loaded
    if plan.shifted:
        total += FLOAT_BYTES * sum(plan.source.shape[1:]) * (SPLINE_REACH[step.order] + OUTPUTS)  # tables of a slice
    needed = _band_width(step, 0, chunk)
    voxels = ring_slices(needed, backend.slab_slices, samples[0]) * plane
    if step.resamples(2) or plan.turn.flips[2]:
        voxels += slab * samples[2] * step.target[1]
    finished = chunk
    if not plan.has_final_size:
        finished = min(backend.slab_slices, chunk)
        voxels += chunk * plane + finished * step.target[2] * plan.target.shape[1]
    weights = sum(
        -(-s.target[axis] // OUTPUTS) * OUTPUTS * _band_width(s, axis, OUTPUTS)
        for s in (step, plan.resize)
        for axis in range(3)
        if axis or s is step
    )
    output = finished * _plane_voxels(plan.target.shape) * BYTES_PER_VOXEL[plan.recipe.dtype]
    return total + FLOAT_BYTES * (voxels + weights) + output


def mask_bytes(plan: Plan, backend: Backend) -> int:
    """Return an upper estimate of the peak memory of the labels of a series."""
    # The labels of all source slices, in up to 16 bits, and one copy; the output is made in chunks.
    return 2 * (2 * math.prod(plan.source.shape) + 3 * backend.chunk_slices * _plane_voxels(plan.target.shape))


def _in_plane_voxels(
    before: tuple[int, int, int], after: tuple[int, int, int], slab: int, step: Step
) -> tuple[int, int]:
    """Return the voxels that stay allocated for resampling slabs along rows and columns, and the temporary maximum.

    `matmul` copies arguments and results that are not contiguous, such as blocks of an axis.
    """
    shape, kept, temporary = list(before), 0, 0
    for axis in (1, 2):
        if before[axis] == after[axis]:
            continue
        other = shape[3 - axis]
        rows = min(resample_matrix.BLOCK_ROWS, after[axis])
        temporary = max(temporary, slab * other * (_band_width(step, axis, rows) + rows))
        shape[axis] = after[axis]
        kept += slab * shape[1] * shape[2]
    return kept, temporary


def _band_width(step: Step, axis: int, rows: int) -> int:
    """Return the number of input samples on which `rows` consecutive output samples depend."""
    span, reach = rows * step.source[axis] / step.target[axis], SPLINE_REACH[step.order]
    blur = math.ceil(8 * step.sigma[axis])
    if step.along[axis] is None:
        return min(step.source[axis], math.ceil(span) + reach + blur)
    positions = np.array(step.along[axis])
    span += reach + blur if blur else 0  # first interpolated to the regular grid, then blurred and resampled
    densest = np.searchsorted(positions, positions + span, side="right") - np.arange(len(positions))
    return min(len(positions), int(densest.max()) + reach)


def _samples(step: Step, axis: int) -> int:
    """Return the number of input samples along an axis."""
    positions = step.along[axis]
    return step.source[axis] if positions is None else len(positions)


def _plane_voxels(shape: tuple[int, int, int]) -> int:
    return shape[1] * shape[2]


def _output_bytes(plan: Plan, slab: int) -> int:
    """Return the bytes of the finished chunks: the one being downloaded and the next one."""
    placed = slab * _plane_voxels(plan.target.shape) * FLOAT_BYTES if plan.resize.target != plan.target.shape else 0
    return placed + 2 * slab * _plane_voxels(plan.target.shape) * BYTES_PER_VOXEL[plan.recipe.dtype]
