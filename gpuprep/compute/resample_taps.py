"""Resamples a line by few weights per sample.

The cubic spline through samples takes two steps: samples become coefficients, which solve a tridiagonal system, and
four coefficients give a value. Together they are the matrix of `gpuprep.compute.resample_matrix`, in a seventh of the
multiplications. Anything else is taken from that matrix, as the narrow band that it is.

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

from gpuprep.core.sampling import lost_samples, sample_positions

POLE = math.sqrt(3) - 2
"""Of the cubic spline: what one sample does to coefficients falls by this per sample."""

REACH = 12
"""Samples to either side beyond which that is nothing: 1.4e-7 of it is left."""

GROUP = 16
"""Source slices whose span of output is made at a time: many, and few are filtered twice; few, and memory is small."""

INVERSE = tuple(-6 * POLE / (1 - POLE**2) * POLE**t for t in range(REACH + 1))
"""What a sample does to the coefficients at its own place, one further, two further, …, far from both ends."""


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """How a line of `n_in` samples becomes one of `n_out`."""

    n_in: int
    n_out: int
    start: NDArray[np.uint32]
    """First sample, or coefficient, that counts for each output; shape (n_out,)."""
    weights: NDArray[np.float32]
    """Of that one and those after it; shape (n_out, taps)."""
    solve: NDArray[np.float32]
    """Samples s to coefficients c: d = ``solve[0]`` · s − ``solve[1]`` · (d before), upwards, then c = d −
    ``solve[2]`` · (c after), downwards. Shape (3, n_in); (3, 0) where samples are used as they are."""
    beyond: NDArray[np.uint32]
    """The samples that stand for the `REACH` ones before the first and after the last; shape (2, REACH), or (2, 0)."""
    columns: NDArray[np.float32]
    """The weights transposed."""

    @property
    def taps(self) -> int:
        """Number of weights per output."""
        return int(self.weights.shape[1])


@lru_cache(maxsize=512)
def build(
    n_in: int,
    n_out: int,
    *,
    along: tuple[float, ...] | None,
    order: int,
    mode: str,
    grid_mode: bool,
    sigma: float,
    blur_mode: str,
) -> Line:
    """Return how to resample a line; the arguments are those of `gpuprep.compute.resample_matrix.matrix`."""
    places = sample_positions(n_in, n_out, mode, grid_mode) if order in (1, 3) and along is None and not sigma else None
    if places is None or n_in < 4:
        from gpuprep.compute import resample_matrix  # and SciPy, which most lines do without

        matrix = resample_matrix.matrix(
            n_in, n_out, along=along, order=order, mode=mode, grid_mode=grid_mode, sigma=sigma, blur_mode=blur_mode
        )
        return _line(matrix.shape[1], *_band(matrix, resample_matrix.NEGLIGIBLE))
    if order == 1:
        start = np.clip(np.floor(places), 0, n_in - 2)
        part = np.clip(places, 0, n_in - 1) - start
        return _line(n_in, start, _blank(np.stack([1 - part, part], axis=1), n_in, mode, grid_mode))
    edge = np.array([4 + POLE, 1]) / (5 + POLE) if mode == "nearest" else np.array([4, 2]) / 6
    ghosts = _edge_ghosts(edge) if mode == "nearest" else np.eye(4)[[2, 1]]
    start, weights = _cubic(places, n_in, np.concatenate([ghosts, np.eye(4)]))
    beyond = np.pad(np.arange(n_in), REACH, mode="edge" if mode == "nearest" else "reflect")
    return _line(n_in, start, _blank(weights, n_in, mode, grid_mode), _elimination(n_in, edge), beyond)


def unchanged(n: int) -> Line:
    """Return the line that stays as it is."""
    return _line(n, np.arange(n), np.ones((n, 1)))


def _line(
    n_in: int, start: Any, weights: NDArray[np.float64], solve: Any = None, beyond: NDArray[Any] | None = None
) -> Line:
    tables = np.zeros((3, 0)) if solve is None else solve
    ends = np.zeros((2, 0)) if beyond is None else np.stack([beyond[:REACH], beyond[-REACH:]])
    return Line(
        n_in,
        len(start),
        np.asarray(start).astype(np.uint32),
        np.ascontiguousarray(weights, dtype=np.float32),
        np.ascontiguousarray(tables, dtype=np.float32),
        np.ascontiguousarray(ends, dtype=np.uint32),
        np.ascontiguousarray(weights.T, dtype=np.float32),
    )


def _blank(weights: NDArray[Any], n_in: int, mode: str, grid_mode: bool) -> NDArray[Any]:
    """Return the weights, with zeros for the outputs that SciPy leaves at 0."""
    weights[lost_samples(n_in, len(weights), mode, grid_mode)] = 0
    return weights


def _cubic(places: NDArray[Any], n_in: int, extended: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return first coefficient and four weights of cubic B-splines at places in a line.

    `extended` has the coefficients −2, −1, 0, … 3 in terms of 0, … 3; at the other end it is the same, mirrored.
    """
    first = np.floor(places)
    t = (places - first)[:, None]
    weights = np.concatenate([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1) / 6
    start = first.astype(int) - 1
    for q in np.flatnonzero(start < 0):
        weights[q], start[q] = weights[q] @ extended[start[q] + 2 : start[q] + 6], 0
    for q in np.flatnonzero(start > n_in - 4):
        s = n_in - 4 - start[q]  # where it starts, seen from the other end
        weights[q], start[q] = (weights[q][::-1] @ extended[s + 2 : s + 6])[::-1], n_in - 4
    return start, weights


def _edge_ghosts(edge: NDArray[Any]) -> NDArray[Any]:
    """Return the coefficients −2 and −1 in terms of 0, … 3, of a line whose first sample is repeated for ever.

    Without samples that change, coefficients approach the sample by POLE per step; the sample is ``edge`` · (0, 1).
    """
    sample = np.array([*edge, 0, 0])
    own = np.array([1, 0, 0, 0])
    return np.stack([sample + (own - sample) * POLE**2, sample + (own - sample) * POLE])


def _elimination(n: int, edge: NDArray[Any]) -> NDArray[np.float64]:
    """Return the tables of `Line.solve` for the system whose rows are (1, 4, 1)/6, the outer ones `edge`."""
    table = np.zeros((3, n))
    former = 0.0
    for k in range(n):
        below = 0.0 if k == 0 else edge[1] if k == n - 1 else 1 / 6
        above = 0.0 if k == n - 1 else edge[1] if k == 0 else 1 / 6
        own = edge[0] if k in (0, n - 1) else 4 / 6
        p = 1 / (own - below * former)
        former = above * p
        table[:, k] = p, below * p, former
    return table


def _band(matrix: NDArray[np.float64], negligible: float) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return the first column and the weights of each row, all equally many; where rows begin never falls."""
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
