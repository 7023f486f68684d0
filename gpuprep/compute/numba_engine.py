"""Runs the ``operators`` engine on the CPU in compiled loops, one slice at a time in the cache.

Each source slice is resampled in its plane when it is read, and passes the causal half of the spline prefilter across
slices. The anticausal half starts a few slices ahead and runs backwards, for one group of output slices at a time.
Each output slice is then combined from four filtered slices, windowed, resized and rounded within the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute import numba_kernels, resample_taps
from gpuprep.core.hounsfield import quantise
from gpuprep.core.plan import Plan, Step


def chunks(hu: Iterator[NDArray[np.float32]], count: int, plan: Plan) -> Iterator[NDArray[Any]]:
    """Yield the output slice by slice, each valid until the next is requested.

    Parameters
    ----------
    hu : iterator of arrays of float32
        HU of the source slices, one at a time: shape (1, j, i).
    count : int
        Number of source slices.
    plan : Plan
        Plan of the series.
    """
    across, *in_plane = _axis_tables(plan.resample)
    across = across or resample_taps.identity(count)
    resample, finish = _PlaneResampler(across, in_plane, plan.resample.source[2]), _Finisher(plan)
    ahead = resample_taps.PREFILTER_RADIUS if across.prefiltered else 0
    groups = [(first, last, low, high, min(high + ahead, count)) for first, last, low, high in _slice_groups(across)]
    # Slices wait in a ring: slice k has the place k modulo its length.
    waiting = max(stop - low for _, _, low, _, stop in groups)
    ring = np.empty((waiting, *plan.resample.target[1:]), dtype=np.float32)
    places = np.arange(count, dtype=np.uint32) % np.uint32(waiting)
    filtered = np.empty((max(high - low for _, _, low, high, _ in groups) if ahead else 0, *ring.shape[1:]), np.float32)
    line = np.empty(ring.shape[2], dtype=np.float32)
    samples = across.start[:, None] + np.arange(across.taps, dtype=np.uint32)
    loaded = 0
    for first, last, low, high, stop in groups:
        for k in range(loaded, stop):
            resample(next(hu), k, ring[places[k]], ring[places[k - 1]])
        loaded = max(loaded, stop)
        if ahead:
            numba_kernels.backwards(ring, places[low:stop], across.recursion[2, low:stop], line, filtered[: high - low])
            planes, combined = filtered, (samples[first:last] - low).astype(np.uint32)
        else:
            planes, combined = ring, places[samples[first:last]]
        for planes_of_slice, weights in zip(combined, across.weights[first:last], strict=True):
            yield finish(planes, planes_of_slice, weights)
    for _ in hu:  # the remaining slices count in the HU statistics
        pass


def _axis_tables(step: Step) -> list[resample_taps.LineTables | None]:
    """Return the resampling tables of each axis; None for an axis that is not resampled."""
    return [resample_taps.build(**step.matrix_arguments(axis)) if step.resamples(axis) else None for axis in range(3)]


def _slice_groups(across: resample_taps.LineTables) -> Iterator[tuple[int, int, int, int]]:
    """Yield groups of output slices [first, last) with the filtered slices [low, high) that they need."""
    step = max(1, round(resample_taps.GROUP_SLICES * across.n_out / across.n_in)) if across.prefiltered else 1
    for first in range(0, across.n_out, step):
        last = min(first + step, across.n_out)
        start = across.start[first:last]
        yield first, last, int(start.min()), int(start.max()) + across.taps


class _PlaneResampler:
    """Resamples source slices in their planes and applies the causal half of the spline prefilter across slices."""

    def __init__(
        self, across: resample_taps.LineTables, in_plane: list[resample_taps.LineTables | None], columns: int
    ) -> None:
        self._across = across
        self._rows, self._columns = in_plane
        if self._rows is not None:
            self._strip = np.empty((self._rows.n_in, numba_kernels.STRIP), dtype=np.float32)
            self._resampled_rows = np.empty((self._rows.n_out, columns), dtype=np.float32)
        if self._columns is not None:
            self._line = np.empty(columns + 2 * resample_taps.PREFILTER_RADIUS, dtype=np.float32)
            self._solved = np.empty(columns, dtype=np.float32)

    def __call__(
        self, hu: NDArray[np.float32], k: int, out: NDArray[np.float32], previous: NDArray[np.float32]
    ) -> None:
        """Write slice k, resampled, to `out`; `previous` is the slice before."""
        values = np.ascontiguousarray(hu[0])
        if (rows := self._rows) is not None:
            numba_kernels.along_rows(
                values, rows.recursion, rows.start, rows.weights, self._strip, self._resampled_rows
            )
            values = self._resampled_rows
        if (columns := self._columns) is not None:
            numba_kernels.along_columns(
                values,
                columns.boundary,
                columns.start,
                columns.weights_transposed,
                columns.vectors,
                self._line,
                self._solved,
                out,
            )
        else:
            out[...] = values
        if self._across.prefiltered:
            p, q, _ = self._across.recursion[:, k]
            numba_kernels.forwards(out, previous if k else out, p, q)


class _Finisher:
    """Combines filtered slices into one output slice."""

    def __init__(self, plan: Plan) -> None:
        low, high = plan.recipe.window_hu or (-np.inf, np.inf)
        self._window = np.array([low, high, plan.shift_hu, plan.scale], dtype=np.float32)
        self._slice = quantise(np.full((1, *plan.target.shape[1:]), plan.air, dtype=np.float32), plan.recipe.dtype)
        self._limits: tuple[np.float32, np.float32] | None = None
        if plan.recipe.dtype != "float32":
            limits = np.iinfo(self._slice.dtype)
            self._limits = np.float32(limits.min), np.float32(limits.max)
        resampled, target = plan.resampled.shape[1:], plan.target.shape[1:]
        # Slices that are not resized are cropped, or padded with air.
        self._top, self._left = (max(0, offset) for offset in plan.offset)
        self._top_margin, self._left_margin = (max(0, -offset) for offset in plan.offset)
        axes = zip(plan.offset, resampled, target, strict=True)
        used = [min(n, o + m) - max(0, o) for o, n, m in axes] if plan.resize.is_identity else resampled
        resize = zip(_axis_tables(plan.resize)[1:], used, strict=True)
        self._rows, self._columns = (tables or resample_taps.identity(n) for tables, n in resize)
        self._line = np.empty(self._columns.n_in, dtype=np.float32)
        self._resized_columns = np.empty((self._rows.n_in, self._columns.n_out), dtype=np.float32)
        self._rounding_row = np.empty((1, self._columns.n_out), dtype=np.float32)

    def __call__(
        self, planes: NDArray[np.float32], combined: NDArray[np.uint32], weights: NDArray[np.float32]
    ) -> NDArray[Any]:
        """Return the weighted sum of planes as an output slice: array of shape (1, j, i)."""
        columns, rows = self._columns, self._rows
        numba_kernels.finish(
            planes,
            combined,
            weights,
            self._top,
            self._left,
            self._window,
            columns.start,
            columns.weights_transposed,
            columns.vectors,
            self._line,
            self._resized_columns,
        )
        into = self._slice[0], self._top_margin, self._left_margin
        if self._limits is None:
            numba_kernels.combine(self._resized_columns, rows.start, rows.weights, *into, columns.n_out)
        else:
            numba_kernels.combine_rounded(
                self._resized_columns, rows.start, rows.weights, *self._limits, self._rounding_row, *into
            )
        return np.asarray(self._slice)
