"""Summarises a slice: lowest and highest stored value, their sum, and the number of padding pixels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute.backend import compiled_loops
from gpuprep.core.hounsfield import LOWEST_HU


class Summary(NamedTuple):
    """Statistics of all pixels of a slice."""

    low: int
    """Lowest stored value."""
    high: int
    """Highest stored value."""
    total: int
    """Sum of all stored values."""
    padding: int
    """Number of padding pixels: declared padding, or HU below `LOWEST_HU`."""


def summary(
    values: NDArray[Any], slope: float, intercept: float, padding: NDArray[Any] | None, *, loops: bool = False
) -> Summary:
    """Return the statistics of the pixels of a slice.

    Parameters
    ----------
    values : array of integers, shape (rows, columns)
        Stored values.
    slope, intercept : float
        *Rescale Slope* (HU per unit) and *Rescale Intercept* (HU) of the slice.
    padding : array of integers, shape (2,), or None
        Lowest and highest declared padding value.
    loops : bool
        Whether to use a compiled loop, which reads the slice once instead of five times.
    """
    limits = np.iinfo(values.dtype)
    ranges = np.array([[limits.max, limits.min]] * 2, dtype=values.dtype)  # empty ranges
    edge = min(max((LOWEST_HU - intercept) / slope, limits.min - 1), limits.max + 1)
    below = (int(limits.min), math.ceil(edge) - 1) if slope > 0 else (math.floor(edge) + 1, int(limits.max))
    if below[0] <= below[1]:
        ranges[0] = below
    if padding is not None:
        ranges[1] = padding
    if loops:
        return Summary(*compiled_loops().summary(values, ranges))
    low, high, outside = int(values.min()), int(values.max()), 0
    occurring = [(first, last) for first, last in ranges if first <= last and first <= high and last >= low]
    if occurring:
        mask = np.logical_or.reduce([(values >= first) & (values <= last) for first, last in occurring])
        outside = int(np.count_nonzero(mask))
    return Summary(low, high, int(values.sum(dtype=np.int64)), outside)
