"""Runs the ``operators`` engine on a CPU in compiled loops, a slice at a time through the cache.

Each source slice is resampled within its plane as it is read. Across slices, the first half of the spline filter goes
along with the reading; the second half runs downwards from a few slices ahead, for one group of output slices after the
other. Each output slice is then combined from four filtered ones, windowed, resized and rounded without leaving the
cache.
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
    """Yield the output slice by slice, each valid until the next is asked for.

    Parameters
    ----------
    hu : iterator of arrays of float32
        HU of the source slices, one at a time: shape (1, j, i).
    count : int
        Number of source slices.
    plan : Plan
        What to do.
    """
    scratch = Scratch()
    across, *within = _lines(plan.resample)
    groups = list(_groups(across)) if across else []
    planes = _Planes(across, within, scratch, max((high - low for _, _, low, high in groups), default=1))
    window = SlidingWindow(count, 1, planes.forwards(hu), scratch)
    finish = _Finish(plan)
    if across is None:
        window.reserve(1)
        for k in range(count):
            yield finish(window.get(k, k + 1), _ONE)
        return
    ahead = resample_taps.REACH if across.solve.shape[1] else 0
    window.reserve(max(min(high + ahead, count) - low for _, _, low, high in groups))
    for first, last, low, high in groups:
        slices = window.get(low, min(high + ahead, count))
        if ahead:
            slices = planes.backwards(slices, low, high)
        for q in range(first, last):
            k = across.start[q] - low
            yield finish(slices[k : k + across.taps], across.weights[q])
    window.get(count, count)  # the rest counts in the statistics even where no output needs it


_ONE = np.ones(1, dtype=np.float32)


def _lines(step: Step) -> list[resample_taps.Line | None]:
    """Return how to resample each axis; None where it is left alone."""
    return [resample_taps.build(**step.arguments(axis)) if step.moves(axis) else None for axis in range(3)]


def _groups(across: resample_taps.Line) -> Iterator[tuple[int, int, int, int]]:
    """Yield output slices [first, last) with the filtered slices [low, high) that they need."""
    step = max(1, round(resample_taps.GROUP * across.n_out / across.n_in))
    for first in range(0, across.n_out, step):
        last = min(first + step, across.n_out)
        start = across.start[first:last]
        yield first, last, int(start.min()), int(start.max()) + across.taps


class _Planes:
    """Source slices resampled within their planes, and filtered across them."""

    def __init__(
        self, across: resample_taps.Line | None, within: list[resample_taps.Line | None], scratch: Scratch, most: int
    ) -> None:
        self._most = most
        self._across = across if across is not None and across.solve.shape[1] else None
        self._rows, self._columns = within
        self._scratch = scratch
        self._parity = 0

    def forwards(self, hu: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Yield slices resampled within their planes, after the first half of the filter."""
        former: NDArray[np.float32] | None = None
        for k, slab in enumerate(hu):
            values = np.ascontiguousarray(slab)
            self._parity ^= 1  # the slice before must outlast the making of this one
            if self._rows is not None:
                values = self._along_rows(values, self._rows)
            if self._columns is not None:
                values = self._along_columns(values, self._columns)
            if self._across is not None:
                p, q, _ = self._across.solve[:, k]
                numba_kernels.forwards(values, values if former is None else former, p, q)
                former = values
            yield values

    def backwards(self, slices: NDArray[np.float32], low: int, high: int) -> NDArray[np.float32]:
        """Return the filtered slices [low, high) from half-filtered ones that begin at `low` and reach further."""
        assert self._across is not None  # noqa: S101 - only called where there is a filter
        out = self._scratch.like(slices, (self._most, *slices.shape[1:]), "filtered")[: high - low]
        line = self._scratch.like(slices, slices.shape[2:], "line across")
        numba_kernels.backwards(slices, self._across.solve[2, low:], line, out)
        return np.asarray(out)

    def _along_rows(self, values: NDArray[np.float32], line: resample_taps.Line) -> NDArray[np.float32]:
        out = self._output(values, (line.n_out, values.shape[2]), "rows")
        strip = self._scratch.like(values, (line.n_in, numba_kernels.STRIP), "strip")
        numba_kernels.along_rows(values[0], line.solve, line.start, line.weights, strip, out[0])
        return out

    def _along_columns(self, values: NDArray[np.float32], line: resample_taps.Line) -> NDArray[np.float32]:
        out = self._output(values, (values.shape[1], line.n_out), "columns")
        row = self._scratch.like(values, (line.n_in + 2 * resample_taps.REACH,), "line")
        solved = self._scratch.like(values, (line.n_in,), "solved")
        numba_kernels.along_columns(values[0], line.beyond, line.start, line.columns, row, solved, out[0])
        return out

    def _output(self, values: NDArray[np.float32], plane: tuple[int, int], name: str) -> NDArray[np.float32]:
        return np.asarray(self._scratch.like(values, (1, *plane), (name, self._parity)))


class _Finish:
    """Filtered slices to one slice of output."""

    def __init__(self, plan: Plan) -> None:
        low, high = plan.recipe.window_hu or (-np.inf, np.inf)
        self._window = np.array([low, high, plan.shift_hu, plan.scale], dtype=np.float32)
        self._slice = quantise(np.full(plan.target.shape[1:], plan.air, dtype=np.float32), plan.recipe.dtype)
        self._limits: tuple[np.float32, np.float32] | None = None
        if plan.recipe.dtype != "float32":
            limits = np.iinfo(self._slice.dtype)
            self._limits = np.float32(limits.min), np.float32(limits.max)
        have, want = plan.resampled.shape[1:], plan.target.shape[1:]
        # Where slices are not resized, they are cut, or have air around them.
        self._top, self._left = (max(0, offset) for offset in plan.offset)
        self._below, self._right = (max(0, -offset) for offset in plan.offset)
        cut = zip(plan.offset, have, want, strict=True)
        used = [min(n, o + m) - max(0, o) for o, n, m in cut] if plan.resize.idle else have
        resize = zip(_lines(plan.resize)[1:], used, strict=True)
        self._rows, self._columns = (line or resample_taps.unchanged(n) for line, n in resize)
        self._line = np.empty(self._columns.n_in, dtype=np.float32)
        self._wide = np.empty((self._rows.n_in, self._columns.n_out), dtype=np.float32)
        self._row = np.empty((1, self._columns.n_out), dtype=np.float32)

    def __call__(self, slices: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[Any]:
        """Return the weighted sum of some slices as output: array of shape (1, j, i)."""
        columns, rows = self._columns, self._rows
        numba_kernels.finish(
            slices,
            weights,
            self._top,
            self._left,
            self._window,
            columns.start,
            columns.columns,
            self._line,
            self._wide,
        )
        into = self._slice, self._below, self._right
        if self._limits is None:
            numba_kernels.combine(self._wide, rows.start, rows.weights, *into, columns.n_out)
        else:
            numba_kernels.combine_rounded(self._wide, rows.start, rows.weights, *self._limits, self._row, *into)
        return np.asarray(self._slice[None])
