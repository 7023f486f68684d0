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
from gpuprep.compute.scratch import Scratch, SlidingWindow
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
    scratch = Scratch()
    across_slices, *in_plane = _axis_tables(plan.resample)
    groups = list(_slice_groups(across_slices)) if across_slices else []
    max_slices = max((high - low for _, _, low, high in groups), default=1)
    planes = _PlaneResampler(across_slices, in_plane, scratch, max_slices)
    window = SlidingWindow(count, 1, planes.resampled(hu), scratch)
    finish = _Finisher(plan)
    if across_slices is None:
        window.reserve(1)
        for k in range(count):
            yield finish(window.get(k, k + 1), _ONE)
        return
    ahead = resample_taps.PREFILTER_RADIUS if across_slices.recursion.shape[1] else 0
    window.reserve(max(min(high + ahead, count) - low for _, _, low, high in groups))
    for first, last, low, high in groups:
        slices = window.get(low, min(high + ahead, count))
        if ahead:
            slices = planes.filtered(slices, low, high)
        for q in range(first, last):
            k = across_slices.start[q] - low
            yield finish(slices[k : k + across_slices.taps], across_slices.weights[q])
    window.get(count, count)  # read the remaining slices too: they count in the HU statistics


_ONE = np.ones(1, dtype=np.float32)


def _axis_tables(step: Step) -> list[resample_taps.LineTables | None]:
    """Return the resampling tables of each axis; None for an axis that is not resampled."""
    return [resample_taps.build(**step.matrix_arguments(axis)) if step.resamples(axis) else None for axis in range(3)]


def _slice_groups(across_slices: resample_taps.LineTables) -> Iterator[tuple[int, int, int, int]]:
    """Yield groups of output slices [first, last) with the filtered slices [low, high) that they need."""
    step = max(1, round(resample_taps.GROUP_SLICES * across_slices.n_out / across_slices.n_in))
    for first in range(0, across_slices.n_out, step):
        last = min(first + step, across_slices.n_out)
        start = across_slices.start[first:last]
        yield first, last, int(start.min()), int(start.max()) + across_slices.taps


class _PlaneResampler:
    """Resamples source slices in their planes and applies the spline prefilter across slices."""

    def __init__(
        self,
        across_slices: resample_taps.LineTables | None,
        in_plane: list[resample_taps.LineTables | None],
        scratch: Scratch,
        max_slices: int,
    ) -> None:
        self._max_slices = max_slices
        self._across = across_slices if across_slices is not None and across_slices.recursion.shape[1] else None
        self._rows, self._columns = in_plane
        self._scratch = scratch
        self._parity = 0

    def resampled(self, hu: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Yield slices resampled in their planes, after the causal half of the prefilter."""
        previous: NDArray[np.float32] | None = None
        for k, slab in enumerate(hu):
            values = np.ascontiguousarray(slab)
            self._parity ^= 1  # alternate between two buffers: the previous slice is still needed
            if self._rows is not None:
                values = self._resample_rows(values, self._rows)
            if self._columns is not None:
                values = self._resample_columns(values, self._columns)
            if self._across is not None:
                p, q, _ = self._across.recursion[:, k]
                numba_kernels.forwards(values, values if previous is None else previous, p, q)
                previous = values
            yield values

    def filtered(self, slices: NDArray[np.float32], low: int, high: int) -> NDArray[np.float32]:
        """Return the filtered slices [low, high), computed from half-filtered slices from `low` to beyond `high`."""
        assert self._across is not None  # noqa: S101 - only called if there is a prefilter
        out = self._scratch.like(slices, (self._max_slices, *slices.shape[1:]), "filtered")[: high - low]
        line = self._scratch.like(slices, slices.shape[2:], "line across")
        numba_kernels.backwards(slices, self._across.recursion[2, low:], line, out)
        return np.asarray(out)

    def _resample_rows(self, values: NDArray[np.float32], tables: resample_taps.LineTables) -> NDArray[np.float32]:
        out = self._output(values, (tables.n_out, values.shape[2]), "rows")
        strip = self._scratch.like(values, (tables.n_in, numba_kernels.STRIP), "strip")
        numba_kernels.along_rows(values[0], tables.recursion, tables.start, tables.weights, strip, out[0])
        return out

    def _resample_columns(self, values: NDArray[np.float32], tables: resample_taps.LineTables) -> NDArray[np.float32]:
        out = self._output(values, (values.shape[1], tables.n_out), "columns")
        row = self._scratch.like(values, (tables.n_in + 2 * resample_taps.PREFILTER_RADIUS,), "line")
        solved = self._scratch.like(values, (tables.n_in,), "solved")
        numba_kernels.along_columns(
            values[0], tables.boundary, tables.start, tables.weights_transposed, row, solved, out[0]
        )
        return out

    def _output(self, values: NDArray[np.float32], plane: tuple[int, int], name: str) -> NDArray[np.float32]:
        return np.asarray(self._scratch.like(values, (1, *plane), (name, self._parity)))


class _Finisher:
    """Combines filtered slices into one output slice."""

    def __init__(self, plan: Plan) -> None:
        low, high = plan.recipe.window_hu or (-np.inf, np.inf)
        self._window = np.array([low, high, plan.shift_hu, plan.scale], dtype=np.float32)
        self._slice = quantise(np.full(plan.target.shape[1:], plan.air, dtype=np.float32), plan.recipe.dtype)
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

    def __call__(self, slices: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[Any]:
        """Return the weighted sum of slices as an output slice: array of shape (1, j, i)."""
        columns, rows = self._columns, self._rows
        numba_kernels.finish(
            slices,
            weights,
            self._top,
            self._left,
            self._window,
            columns.start,
            columns.weights_transposed,
            self._line,
            self._resized_columns,
        )
        into = self._slice, self._top_margin, self._left_margin
        if self._limits is None:
            numba_kernels.combine(self._resized_columns, rows.start, rows.weights, *into, columns.n_out)
        else:
            numba_kernels.combine_rounded(
                self._resized_columns, rows.start, rows.weights, *self._limits, self._rounding_row, *into
            )
        return np.asarray(self._slice[None])
