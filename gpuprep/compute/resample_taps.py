"""Builds tables that resample a line with few weights per sample.

Cubic spline interpolation takes two steps: a prefilter solves a tridiagonal system for the B-spline coefficients, and
four coefficients give an output value. This equals the matrix of `gpuprep.compute.resample_matrix`, with a seventh of
the multiplications. Linear interpolation takes two weights. All other cases use the narrow band of that matrix.

References
----------
M. Unser, A. Aldroubi, M. Eden: B-spline signal processing, IEEE Transactions on Signal Processing 41 (1993) 821–848.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.axis_part import AxisPart
from gpuprep.core.sampling import lost_samples, sample_positions

POLE = math.sqrt(3) - 2
"""Pole of the cubic B-spline prefilter."""

PREFILTER_RADIUS = 12
"""Truncation radius of the prefilter in samples (|POLE|¹² = 1.4e-7 remains)."""

GROUP_SLICES = 16
"""Source slices per group of output slices. Larger groups filter fewer slices twice; smaller ones need less memory."""

LANES = 8
"""Outputs that are computed together from samples in vectors of the same length."""

INVERSE = tuple(-6 * POLE / (1 - POLE**2) * POLE**t for t in range(PREFILTER_RADIUS + 1))
"""Impulse response of the prefilter at distances of 0, 1, 2, … samples, far from both ends."""


@dataclass(frozen=True, slots=True, eq=False)
class LineTables:
    """Tables that resample a line of `n_in` samples to `n_out`."""

    n_in: int
    n_out: int
    start: NDArray[np.uint32]
    """Index of the first sample, or coefficient, with a weight for each output; shape (n_out,)."""
    weights: NDArray[np.float32]
    """Weights of that sample and the following ones; shape (n_out, taps)."""
    recursion: NDArray[np.float32]
    """Prefilter from samples s to coefficients c: d[k] = ``recursion[0, k]`` · s[k] − ``recursion[1, k]`` · d[k − 1]
    forwards, then c[k] = d[k] − ``recursion[2, k]`` · c[k + 1] backwards. Shape (3, n_in); (3, 0) without prefilter."""
    boundary: NDArray[np.uint32]
    """Indices of the samples that extend the line by the truncation radius before its start and after its end; shape
    (2, PREFILTER_RADIUS), or (2, 0) without prefilter."""
    weights_transposed: NDArray[np.float32]
    """`weights` transposed and contiguous; shape (taps, n_out)."""
    vectors: int
    """Vectors of `LANES` samples, 1 or 2, that contain all samples of `LANES` outputs in a row; 0 if there are more."""

    @property
    def prefiltered(self) -> bool:
        """Whether the weights apply to the coefficients of a spline, which a prefilter computes from the samples."""
        return self.recursion.size > 0

    @property
    def taps(self) -> int:
        """Number of weights per output sample."""
        return int(self.weights.shape[1])


@lru_cache(maxsize=512)
def build(n_in: int, n_out: int, **step: Any) -> LineTables:
    """Return the tables that resample a line; the arguments are those of `gpuprep.compute.resample_matrix.matrix`."""
    start, weights, prefiltered = _interpolation(n_in, n_out, **step)
    n_in = _samples(n_in, step)
    if not prefiltered:
        return _line_tables(n_in, start, weights)
    return _line_tables(n_in, start, weights, _recursion(n_in, _edge(step["mode"])), _extended(n_in, step["mode"]))


def _samples(n_in: int, step: dict[str, Any]) -> int:
    """Return the length of the line that is read."""
    part: AxisPart | None = step.get("part")
    return n_in if part is None else part.samples


def weights_of_samples(n_in: int, n_out: int, **step: Any) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the first sample, shape (n_out,), and the weights of samples, shape (n_out, taps), for each output.

    The arguments are those of `build`. The prefilter, cut off at `PREFILTER_RADIUS`, is included in the weights: a
    cubic output has up to 28 of them.
    """
    start, weights, prefiltered = _interpolation(n_in, n_out, **step)
    if not prefiltered:
        return start, weights
    n_in, n_out = _samples(n_in, step), len(start)
    response = np.array(INVERSE[:0:-1] + INVERSE)
    taps = weights.shape[1]
    folded = np.zeros((n_out, len(response) + taps - 1))
    for t in range(taps):
        folded[:, t : t + len(response)] += weights[:, [t]] * response  # coefficient start + t, as samples
    width = min(folded.shape[1], n_in)
    first = np.clip(start - PREFILTER_RADIUS, 0, n_in - width)
    samples = _extended(n_in, step["mode"])[start[:, None] + np.arange(folded.shape[1])]
    band = np.zeros((n_out, width))
    np.add.at(band, (np.arange(n_out)[:, None], samples - first[:, None]), folded)
    return first, band


def _interpolation(n_in: int, n_out: int, **step: Any) -> tuple[NDArray[np.intp], NDArray[np.float64], bool]:
    """Return first index and weights per output, and whether they apply to spline coefficients, not to samples."""
    order, mode, grid_mode = step["order"], step["mode"], step["grid_mode"]
    part: AxisPart | None = step.get("part")
    samples = _samples(n_in, step)
    positions = None
    if order in (1, 3) and step["along"] is None and not step["sigma"] and n_in != n_out and samples >= 4:
        positions = sample_positions(n_in, n_out, mode, grid_mode)
    if positions is None:
        from gpuprep.compute import resample_matrix  # imports SciPy, which most lines do not need

        matrix = resample_matrix.matrix(n_in, n_out, **step)
        return *band_of(matrix, resample_matrix.NEGLIGIBLE), False
    lost = lost_samples(n_in, n_out, mode, grid_mode)
    if part is not None:
        positions = positions[part.start : part.stop] - part.low
        lost = lost[(lost >= part.start) & (lost < part.stop)] - part.start
    if order == 1:
        start = np.clip(np.floor(positions), 0, samples - 2).astype(np.intp)
        share = np.clip(positions, 0, samples - 1) - start
        weights = np.stack([1 - share, share], axis=1)
    else:
        ghosts = _ghost_coefficients(_edge(mode)) if mode == "nearest" else np.eye(4)[[2, 1]]
        start, weights = _cubic(positions, samples, np.concatenate([ghosts, np.eye(4)]))
    weights[lost] = 0  # SciPy leaves these outputs at 0
    return start, weights, order == 3


def _edge(mode: str) -> NDArray[np.float64]:
    """Return the two weights in the outer rows of the prefilter's system."""
    return np.array([4 + POLE, 1]) / (5 + POLE) if mode == "nearest" else np.array([4, 2]) / 6


def _extended(n_in: int, mode: str) -> NDArray[np.intp]:
    """Return the indices of the samples of a line that is extended by `PREFILTER_RADIUS` at both ends."""
    return np.pad(np.arange(n_in), PREFILTER_RADIUS, mode="edge" if mode == "nearest" else "reflect")


def identity(n: int) -> LineTables:
    """Return the tables that leave a line of `n` samples unchanged."""
    return _line_tables(n, np.arange(n), np.ones((n, 1)))


def _line_tables(
    n_in: int, start: Any, weights: NDArray[np.float64], recursion: Any = None, boundary: NDArray[Any] | None = None
) -> LineTables:
    tables = np.zeros((3, 0)) if recursion is None else recursion
    ends = (
        np.zeros((2, 0)) if boundary is None else np.stack([boundary[:PREFILTER_RADIUS], boundary[-PREFILTER_RADIUS:]])
    )
    return LineTables(
        n_in,
        len(start),
        np.asarray(start).astype(np.uint32),
        np.ascontiguousarray(weights, dtype=np.float32),
        np.ascontiguousarray(tables, dtype=np.float32),
        np.ascontiguousarray(ends, dtype=np.uint32),
        np.ascontiguousarray(weights.T, dtype=np.float32),
        _vectors(n_in, np.asarray(start), weights.shape[1]),
    )


def _vectors(n_in: int, start: NDArray[Any], taps: int) -> int:
    """Return `LineTables.vectors`."""
    if taps not in (2, 4) or len(start) < LANES:
        return 0
    group = np.minimum(np.arange(0, len(start), LANES), len(start) - LANES)
    for vectors in (1, 2):
        last = n_in - vectors * LANES  # the vectors must not reach beyond the line
        if last >= 0 and (start[group + LANES - 1] + taps - np.minimum(start[group], last)).max() <= vectors * LANES:
            return vectors
    return 0


def _cubic(positions: NDArray[Any], n_in: int, extended: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the index of the first coefficient and the four weights of cubic B-splines at positions on a line.

    `extended` expresses the coefficients −2, −1, 0, … 3 by those at 0, … 3; the other end is its mirror image.
    """
    first = np.floor(positions)
    t = (positions - first)[:, None]
    weights = np.concatenate([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1) / 6
    start = first.astype(int) - 1
    for q in np.flatnonzero(start < 0):
        weights[q], start[q] = weights[q] @ extended[start[q] + 2 : start[q] + 6], 0
    for q in np.flatnonzero(start > n_in - 4):
        s = n_in - 4 - start[q]  # start index counted from the other end
        weights[q], start[q] = (weights[q][::-1] @ extended[s + 2 : s + 6])[::-1], n_in - 4
    return start, weights


def _ghost_coefficients(edge: NDArray[Any]) -> NDArray[Any]:
    """Return the coefficients −2 and −1, expressed by 0, … 3, for a line whose first sample is repeated without end.

    Along constant samples, coefficients approach the sample by a factor of POLE per step. The first sample is ``edge``
    times the coefficients 0 and 1.
    """
    sample = np.array([*edge, 0, 0])
    first = np.array([1, 0, 0, 0])
    return np.stack([sample + (first - sample) * POLE**2, sample + (first - sample) * POLE])


def _recursion(n: int, edge: NDArray[Any]) -> NDArray[np.float64]:
    """Return `LineTables.recursion` for the tridiagonal system with rows (1, 4, 1)/6, and `edge` in the outer rows."""
    table = np.zeros((3, n))
    previous = 0.0
    for k in range(n):
        below = 0.0 if k == 0 else edge[1] if k == n - 1 else 1 / 6
        above = 0.0 if k == n - 1 else edge[1] if k == 0 else 1 / 6
        diagonal = edge[0] if k in (0, n - 1) else 4 / 6
        p = 1 / (diagonal - below * previous)
        previous = above * p
        table[:, k] = p, below * p, previous
    return table


def band_of(matrix: NDArray[np.float64], negligible: float) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return first column and weights of each row of a matrix: equally many weights, and ascending first columns."""
    used = np.abs(matrix) >= negligible
    n_in = matrix.shape[1]
    empty = ~used.any(axis=1)
    low = np.where(empty, n_in, used.argmax(axis=1))
    low = np.minimum.accumulate(low[::-1])[::-1]
    high = np.where(empty, low + 1, n_in - used[:, ::-1].argmax(axis=1))
    width = min(int((high - low).max()), n_in)
    low = np.minimum(low, n_in - width)
    weights = np.take_along_axis(matrix, low[:, None] + np.arange(width), axis=1)
    return low, np.where(np.abs(weights) < negligible, 0, weights)
