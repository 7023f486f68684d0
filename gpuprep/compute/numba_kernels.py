"""Defines the Numba loops that resample line by line with the tables of `gpuprep.compute.resample_taps`.

The loops release the GIL and compute in float32. Inner loops run over adjacent memory, so that the compiler can
vectorise them. Compilation takes ten to thirty seconds; Numba caches the result on disk if it can.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from threading import Event
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core.runtime.nrt import rtsys

from gpuprep.compute.numba_gather import PERMUTES, four_of_one, four_of_two, two_of_one, two_of_two
from gpuprep.compute.resample_taps import INVERSE, LANES, PREFILTER_RADIUS
from gpuprep.core.hounsfield import AIR_HU, LOWEST_HU

STRIP = 128
"""Columns filtered together when resampling along axis 0: few enough that a strip of a slice stays in the cache."""

Loop = TypeVar("Loop", bound=Callable[..., Any])


compiling = Event()
"""Set when a loop has to be compiled because it is not in the cache."""

uncached = Event()
"""Set when a compiled loop cannot be cached on disk, so that every process has to compile it."""


def why_uncached() -> str:
    """Return a message that names the folders that cannot be written, and the remedy."""
    folders = [os.path.join(os.path.dirname(os.path.abspath(__file__)), "__pycache__"), "this user's cache folder"]
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        folders.insert(0, named)
    return (
        f"compiled code cannot be cached, because neither {' nor '.join(folders)} can be written: "
        "set NUMBA_CACHE_DIR to a folder that can"
    )


class _FaultTolerantCache:
    """Wrapper of Numba's cache that treats a damaged or unwritable cache as empty."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def load_overload(self, signature: Any, context: Any) -> Any:
        found = None
        with suppress(Exception):  # a damaged cache file may raise anything when it is unpickled
            # `load_overload` of Numba first imports all that it needs to compile, which takes three times as long as
            # the rest. Cached code needs its run-time library only; compiling imports the rest itself.
            rtsys.initialize(context)
            found = self._cache._load_overload(signature, context)
        if found is None:
            compiling.set()
        return found

    def save_overload(self, *args: Any) -> None:
        try:
            self._cache.save_overload(*args)
        except Exception:
            uncached.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _compiler(**options: Any) -> Callable[[Loop], Loop]:
    def compiled(function: Loop) -> Loop:
        loop: Any = numba.njit(nogil=True, error_model="numpy", **options)(function)
        try:
            loop.enable_caching()
            loop._cache = _FaultTolerantCache(loop._cache)
        except RuntimeError:  # Numba found no writable cache folder
            uncached.set()
            compiling.set()
        return cast(Loop, loop)

    return compiled


_compiled = _compiler(fastmath={"contract"})
_compiled_exact = _compiler()
"""Without contraction of products and sums: each operation is rounded separately, as in NumPy."""

_AIR, _LOWEST = np.float32(AIR_HU), np.float32(LOWEST_HU)
_INVERSE = tuple(np.float32(w) for w in INVERSE)


@_compiled
def summary(stored: Any, padding: Any) -> Any:
    """Return minimum, maximum and sum of a slice, and the number of values in either of the two ranges of `padding`.

    Three loops per row with 32-bit sums, because the compiler vectorises them.
    """
    least, most, total, count = stored[0, 0], stored[0, 0], 0, 0
    a, b, c, d = padding[0, 0], padding[0, 1], padding[1, 0], padding[1, 1]
    for j in range(stored.shape[0]):
        row = stored[j]
        for i in range(len(row)):
            least, most = min(least, row[i]), max(most, row[i])
        row_total, row_count = np.int32(0), np.int32(0)
        for i in range(len(row)):
            row_total = np.int32(row_total + np.int32(row[i]))
        for i in range(len(row)):
            v = row[i]
            row_count = np.int32(row_count + np.int32(((v >= a) & (v <= b)) | ((v >= c) & (v <= d))))
        total += int(row_total)
        count += int(row_count)
    return least, most, total, count


@_compiled_exact
def to_hu(stored: Any, slope: Any, intercept: Any, padding: Any, out: Any) -> None:
    """Write the HU of slices to `out`: air below `LOWEST_HU`, and for values in the padding range of the slice."""
    for k in range(stored.shape[0]):
        m, b, low, high = slope[k], intercept[k], padding[k, 0], padding[k, 1]
        for j in range(stored.shape[1]):
            values, hu = stored[k, j], out[k, j]
            for i in range(len(values)):
                v = values[i]
                h = np.float32(v) * m + b
                hu[i] = _AIR if (h < _LOWEST) | ((v >= low) & (v <= high)) else h


@_compiled
def along_rows(values: Any, recursion: Any, start: Any, weights: Any, strip: Any, out: Any) -> None:
    """Resample a slice along axis 0; `strip` is scratch of shape (rows, STRIP)."""
    rows, columns = values.shape
    if recursion.shape[1] == 0:
        combine(values, start, weights, out, 0, 0, columns)
        return
    for left in range(0, columns, STRIP):
        width = min(STRIP, columns - left)
        for x, v in enumerate(values[0, left : left + width]):
            strip[0, x] = recursion[0, 0] * v
        for j in range(1, rows):
            p, q = recursion[0, j], recursion[1, j]
            row, to, before = values[j, left : left + width], strip[j, :width], strip[j - 1, :width]
            for x in range(width):
                to[x] = p * row[x] - q * before[x]
        for j in range(rows - 2, -1, -1):
            g = recursion[2, j]
            to, after = strip[j, :width], strip[j + 1, :width]
            for x in range(width):
                to[x] -= g * after[x]
        combine(strip, start, weights, out, 0, left, width)


@_compiled
def combine(values: Any, start: Any, weights: Any, out: Any, top: int, left: int, width: int) -> None:
    """Write weighted sums of rows of `values` to rows of `out`, starting at row `top` and column `left`."""
    for y in range(len(start)):
        s, o = start[y], out[top + y, left : left + width]
        if weights.shape[1] == 4:
            a, b, c, d = weights[y, 0], weights[y, 1], weights[y, 2], weights[y, 3]
            v, w, y_, z = values[s], values[s + 1], values[s + 2], values[s + 3]
            for x in range(width):
                o[x] = a * v[x] + b * w[x] + c * y_[x] + d * z[x]
        elif weights.shape[1] == 2:
            a, b = weights[y, 0], weights[y, 1]
            v, w = values[s], values[s + 1]
            for x in range(width):
                o[x] = a * v[x] + b * w[x]
        else:
            a, v = weights[y, 0], values[s]
            for x in range(width):
                o[x] = a * v[x]
            for t in range(1, weights.shape[1]):
                a, v = weights[y, t], values[s + t]
                for x in range(width):
                    o[x] += a * v[x]


@_compiled
def combine_rounded(
    values: Any, start: Any, weights: Any, least: Any, most: Any, line: Any, out: Any, top: int, left: int
) -> None:
    """Like `combine`, with rounding to the integer type of `out`; `line` is scratch of shape (1, columns)."""
    width = values.shape[1]
    for y in range(len(start)):
        o = out[top + y, left : left + width]
        if weights.shape[1] == 2:
            a, b = weights[y, 0], weights[y, 1]
            v, w = values[start[y]], values[start[y] + 1]
            for x in range(width):
                o[x] = np.rint(min(max(a * v[x] + b * w[x], least), most))
        else:
            combine(values, start[y : y + 1], weights[y : y + 1], line, 0, 0, width)
            v = line[0]
            for x in range(width):
                o[x] = np.rint(min(max(v[x], least), most))


@_compiled
def along_columns(
    values: Any, boundary: Any, start: Any, weights: Any, vectors: Any, line: Any, solved: Any, out: Any
) -> None:
    """Resample a slice along axis 1; `weights` has shape (taps, columns of `out`); `line` and `solved` are scratch."""
    columns = values.shape[1]
    for j in range(values.shape[0]):
        if boundary.shape[1]:
            for x in range(PREFILTER_RADIUS):
                line[x] = values[j, boundary[0, x]]
                line[PREFILTER_RADIUS + columns + x] = values[j, boundary[1, x]]
            for x in range(columns):
                line[PREFILTER_RADIUS + x] = values[j, x]
            for x in range(columns):
                c = _INVERSE[0] * line[x + PREFILTER_RADIUS]
                for t in range(1, PREFILTER_RADIUS + 1):
                    c += _INVERSE[t] * (line[x + PREFILTER_RADIUS - t] + line[x + PREFILTER_RADIUS + t])
                solved[x] = c
            gather(solved, start, weights, vectors, out[j])
        else:
            gather(values[j], start, weights, vectors, out[j])


@_compiled
def gather(line: Any, start: Any, weights: Any, vectors: Any, out: Any) -> None:
    """Write weighted sums of neighbouring values of a line to `out`."""
    if PERMUTES and vectors:
        _gather_by_eight(line, start, weights, vectors, out)
    elif weights.shape[0] == 4:
        a, b, c, d = weights[0], weights[1], weights[2], weights[3]
        for x in range(len(out)):
            s = start[x]
            out[x] = a[x] * line[s] + b[x] * line[s + 1] + c[x] * line[s + 2] + d[x] * line[s + 3]
    elif weights.shape[0] == 2:
        a, b = weights[0], weights[1]
        for x in range(len(out)):
            s = start[x]
            out[x] = a[x] * line[s] + b[x] * line[s + 1]
    else:
        for x in range(out.shape[0]):
            out[x] = weights[0, x] * line[start[x]]
        for t in range(1, weights.shape[0]):
            for x in range(out.shape[0]):
                out[x] += weights[t, x] * line[start[x] + t]


@_compiled
def _gather_by_eight(line: Any, start: Any, weights: Any, vectors: Any, out: Any) -> None:
    """Like `gather`, for eight outputs at a time; the last eight may overlap with those before."""
    last = len(line) - LANES * vectors
    for group in range(0, len(out), LANES):
        x = min(group, len(out) - LANES)
        base = min(int(start[x]), last)
        if weights.shape[0] == 2:
            if vectors == 1:
                two_of_one(line, base, start, weights, out, x)
            else:
                two_of_two(line, base, start, weights, out, x)
        elif vectors == 1:
            four_of_one(line, base, start, weights, out, x)
        else:
            four_of_two(line, base, start, weights, out, x)


@_compiled
def forwards(plane: Any, previous: Any, p: Any, q: Any) -> None:
    """Apply the causal half of the spline prefilter across slices in place; `previous` is the filtered slice before."""
    for j in range(plane.shape[0]):
        for i in range(plane.shape[1]):
            plane[j, i] = p * plane[j, i] - q * previous[j, i]


@_compiled
def backwards(planes: Any, places: Any, g: Any, line: Any, out: Any) -> None:
    """Apply the anticausal half of the spline prefilter across slices, and write the first ones to `out`.

    `places` has the index in `planes` of each slice, in order.
    """
    count = len(places)
    for j in range(planes.shape[1]):
        plane = planes[places[count - 1], j]
        for i in range(len(line)):
            line[i] = plane[i]
        if count <= out.shape[0]:
            for i in range(len(line)):
                out[count - 1, j, i] = line[i]
        for k in range(count - 2, -1, -1):
            gk, plane = g[k], planes[places[k], j]
            for i in range(len(line)):
                line[i] = plane[i] - gk * line[i]
            if k < out.shape[0]:
                to = out[k, j]
                for i in range(len(line)):
                    to[i] = line[i]


@_compiled
def finish(
    planes: Any,
    combined: Any,
    weights_k: Any,
    top: int,
    left: int,
    window: Any,
    start: Any,
    weights: Any,
    vectors: Any,
    line: Any,
    out: Any,
) -> None:
    """Combine planes into one, starting at row `top` and column `left`, apply the window, and resample along axis 1.

    `combined` has the indices of the planes, and `weights_k` their weights. `line` is scratch for a row. `window` has
    the lowest and highest HU, the shift in HU and the scale factor.
    """
    low, high, shift, scale = window[0], window[1], window[2], window[3]
    right = left + len(line)
    for j in range(out.shape[0]):
        a, e = weights_k[0], planes[combined[0], top + j, left:right]
        if len(weights_k) == 4:
            b, c, d = weights_k[1], weights_k[2], weights_k[3]
            f, g = planes[combined[1], top + j, left:right], planes[combined[2], top + j, left:right]
            h = planes[combined[3], top + j, left:right]
            for i in range(len(line)):
                line[i] = a * e[i] + b * f[i] + c * g[i] + d * h[i]
        else:
            for i in range(len(line)):
                line[i] = a * e[i]
            for t in range(1, len(weights_k)):
                a, e = weights_k[t], planes[combined[t], top + j, left:right]
                for i in range(len(line)):
                    line[i] += a * e[i]
        for i in range(len(line)):
            line[i] = (min(max(line[i], low), high) + shift) * scale
        gather(line, start, weights, vectors, out[j])
