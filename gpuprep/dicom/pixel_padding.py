"""Finds padding: values that headers declare, and fill around the circle that nobody declared."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.hounsfield import AIR_HU, LOWEST_HU, TISSUE_HU
from gpuprep.core.series import SliceHeader
from gpuprep.core.stacking_rules import SeriesWarning

AIRLIKE_HU = 50.0
"""Fill this close to air needs no replacing."""

MOST_ALIKE = 0.05
"""If more than this share of the circle has the value around it, that is a phantom's background, and no fill."""


def declared(
    slices: tuple[SliceHeader, ...], dtype: np.dtype[Any]
) -> tuple[NDArray[Any] | None, tuple[SeriesWarning, ...]]:
    """Return the declared padding of each slice as (lowest, highest), and what was not believed.

    Parameters
    ----------
    slices : tuple of SliceHeader
        In order.
    dtype : dtype
        Of the stored values.

    Returns
    -------
    padding : array of `dtype`, shape (k, 2), or None
        Lowest > highest where a slice declares none; None where no slice declares any.
    warnings : tuple of SeriesWarning
        What was not believed, and why.

    References
    ----------
    DICOM PS3.3, C.7.5.1.1.2 (Pixel Padding Value and Pixel Padding Range Limit).
    """
    limits = np.iinfo(dtype)
    padding = np.tile(np.array([limits.max, limits.min], dtype=dtype), (len(slices), 1))
    doubted: list[tuple[int, list[float]]] = []
    for k, s in enumerate(slices):
        if s.padding is None:
            continue
        (low, high), hu = _range(s, s.padding)
        if _has_tissue(hu):
            doubted.append((s.padding, hu))
        elif hu[1] >= LOWEST_HU and limits.min <= low and high <= limits.max:  # what is lower becomes air anyway
            padding[k] = low, high
    warnings: tuple[SeriesWarning, ...] = ()
    if doubted:
        value, (hu_low, hu_high) = doubted[0]
        span = f"{hu_low:g} HU" if hu_low == hu_high else f"{hu_low:g} to {hu_high:g} HU with its range limit"
        text = (
            f"Pixel Padding Value {value} is {span}, which tissue has, in {len(doubted)} slices: it is "
            "not treated as padding"
        )
        warnings = (SeriesWarning("padding-ignored", text),)
    return (padding if (padding[:, 0] <= padding[:, 1]).any() else None), warnings


def is_declared(s: SliceHeader, value: int) -> bool:
    """Whether a stored value is padding that the slice declares, and its HU is none of tissue."""
    if s.padding is None:
        return False
    (low, high), hu = _range(s, s.padding)
    return low <= value <= high and not _has_tissue(hu)


def _range(s: SliceHeader, padding: int) -> tuple[list[int], list[float]]:
    """Return the lowest and highest padding value of a slice, as stored and in HU."""
    stored = sorted((padding, padding if s.padding_limit is None else s.padding_limit))
    return stored, sorted(v * (s.rescale_slope or 1) + (s.rescale_intercept or 0) for v in stored)


def _has_tissue(hu: list[float]) -> bool:
    return hu[0] <= TISSUE_HU[1] and hu[1] >= TISSUE_HU[0]


def replace_fill(values: NDArray[Any], slope: float, intercept: float) -> float | None:
    """Put air, in place, where a slice has one constant value all around the scanner's circle; return that value's HU.

    Scanners fill the corners outside their circle; whatever they fill it with, noise has no part in it. None is
    returned, and nothing is done, where the corners differ, where they are air or below all CT numbers already, or
    where the circle itself has much of the value.

    Parameters
    ----------
    values : array of integers, shape (rows, columns)
        Stored values.
    slope, intercept : float
        Rescale of the slice.
    """
    fill = values[0, 0]
    if not (values[0, -1] == fill == values[-1, 0] == values[-1, -1]):
        return None
    hu = float(fill) * slope + intercept
    if hu < LOWEST_HU or abs(hu - AIR_HU) <= AIRLIKE_HU:
        return None
    rows, columns = values.shape
    inside = circle(rows, columns)
    alike = values == fill
    if not alike[~inside].all() or alike[inside].mean() > MOST_ALIKE:
        return None
    # From both edges of each row inwards, so that equal values of the patient stay.
    border = np.logical_and.accumulate(alike, axis=1)
    border |= np.logical_and.accumulate(alike[:, ::-1], axis=1)[:, ::-1]
    limits = np.iinfo(values.dtype)
    values[border] = np.clip(round((AIR_HU - intercept) / slope), limits.min, limits.max)
    return hu


@lru_cache(maxsize=8)
def circle(rows: int, columns: int) -> NDArray[np.bool_]:
    """Return the largest circle in a slice: array of bool, shape (rows, columns)."""
    y, x = np.ogrid[:rows, :columns]
    radius = min(rows, columns) / 2
    mask = np.asarray((y - (rows - 1) / 2) ** 2 + (x - (columns - 1) / 2) ** 2 <= radius**2)
    mask.setflags(write=False)
    return mask
