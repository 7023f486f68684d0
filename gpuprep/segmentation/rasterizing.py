"""Outlines to pixels: a pixel belongs to an area if its centre lies inside, by even-odd parity.

Centres lie at whole numbers, (column, row). A centre that lies exactly on an outline belongs to the area to its left,
or above where the outline is horizontal: as if every centre lay a hair further left and up. So areas that share an edge
never share a pixel and leave none out, and the rule is that of ImageJ's polygon fill.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SNAP = 1024
"""Points are rounded to so many parts of a pixel, so that rounding in a file, or on the way into pixels, does not
decide on which side of a centre an outline passes that was drawn through it."""


def filled(polygons: Sequence[NDArray[np.float64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels inside an odd number of outlines.

    Parameters
    ----------
    polygons : sequence of array of float, shape (n, 2)
        Points as (column, row), each outline closed by itself; parts may lie outside of the slice. Holes, keyholes and
        islands in holes are further outlines, or parts of one.
    shape : tuple of int
        Rows and columns of the slice.

    Returns
    -------
    array of bool, shape (rows, columns)
    """
    parity = np.zeros((shape[0], shape[1] + 1), dtype=np.uint8)
    start, stop = _edges(polygons)
    # Where the lines through the centres of each row cross each edge: row by row for all edges at once.
    upper, lower = np.minimum(start[:, 1], stop[:, 1]), np.maximum(start[:, 1], stop[:, 1])
    first = np.clip(np.floor(upper) + 1, 0, shape[0]).astype(np.int64)  # first row > upper
    count = np.clip(np.floor(lower) + 1, 0, shape[0]).astype(np.int64) - first  # last row ≤ lower
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    # From the upper end, whichever way the edge runs: edges that two areas share are crossed at the same place.
    down = start[:, 1] <= stop[:, 1]
    a, b = np.where(down[:, None], start, stop)[edge], np.where(down[:, None], stop, start)[edge]
    x = a[:, 0] + (row - a[:, 1]) * (b[:, 0] - a[:, 0]) / (b[:, 1] - a[:, 1])
    column = np.clip(np.floor(x) + 1, 0, shape[1]).astype(np.int64)  # first column > x
    np.bitwise_xor.at(parity, (row, column), 1)
    np.bitwise_xor.accumulate(parity, axis=1, out=parity)
    return parity[:, :-1].view(np.bool_)


def on_outline(polygon: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels whose centres lie on an outline through centres: points are rounded to whole numbers."""
    mask = np.zeros(shape, dtype=bool)
    points = np.rint(polygon).astype(np.int64)
    ends = np.roll(points, -1, axis=0)
    steps = np.maximum(np.gcd(*(ends - points).T), 1)
    edge = np.repeat(np.arange(len(points)), steps)
    n = np.arange(len(edge)) - np.repeat(np.cumsum(steps) - steps, steps)
    on = points[edge] + (ends - points)[edge] // steps[edge, None] * n[:, None]
    within = ((on >= 0) & (on < np.array(shape[::-1]))).all(axis=1)
    mask[on[within, 1], on[within, 0]] = True
    return mask


def _edges(polygons: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both ends of every edge, shape (n, 2) each."""
    if not polygons:
        return np.empty((0, 2)), np.empty((0, 2))
    snapped = [np.rint(p * SNAP) / SNAP for p in polygons]
    return np.concatenate(snapped), np.concatenate([np.roll(p, -1, axis=0) for p in snapped])
