"""Finds padding: values declared in headers, and undeclared fill around the reconstruction circle."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.hounsfield import AIR_HU, LOWEST_HU, TISSUE_HU
from gpuprep.core.series import SliceHeader
from gpuprep.core.stacking_rules import SeriesWarning

AIR_TOLERANCE_HU = 50.0
"""Fill within this distance from air is not replaced."""

MAX_FILL_FRACTION_INSIDE = 0.05
"""Largest fraction of the circle with the value outside it; more is the background of a phantom, not fill."""


def declared_padding(
    slices: tuple[SliceHeader, ...], dtype: np.dtype[Any]
) -> tuple[NDArray[Any] | None, tuple[SeriesWarning, ...]]:
    """Return the declared padding of each slice as (lowest, highest), and warnings about values that are ignored.

    Parameters
    ----------
    slices : tuple of SliceHeader
        Slices in spatial order.
    dtype : dtype
        Type of the stored values.

    Returns
    -------
    padding : array of `dtype`, shape (k, 2), or None
        Lowest > highest for a slice without padding; None if no slice has any.
    warnings : tuple of SeriesWarning
        Declared values that are ignored, and why.

    References
    ----------
    DICOM PS3.3, C.7.5.1.1.2 (Pixel Padding Value and Pixel Padding Range Limit).
    """
    limits = np.iinfo(dtype)
    padding = np.tile(np.array([limits.max, limits.min], dtype=dtype), (len(slices), 1))
    ignored: list[tuple[int, list[float]]] = []
    for k, s in enumerate(slices):
        if s.padding is None:
            continue
        (low, high), hu = _padding_range(s, s.padding)
        if _overlaps_tissue(hu):
            ignored.append((s.padding, hu))
        elif hu[1] >= LOWEST_HU and limits.min <= low and high <= limits.max:  # lower values become air anyway
            padding[k] = low, high
    warnings: tuple[SeriesWarning, ...] = ()
    if ignored:
        value, (hu_low, hu_high) = ignored[0]
        span = f"{hu_low:g} HU" if hu_low == hu_high else f"{hu_low:g} to {hu_high:g} HU with its range limit"
        text = (
            f"Pixel Padding Value {value} is {span}, in the range of tissue, in {len(ignored)} slices: it is "
            "not treated as padding"
        )
        warnings = (SeriesWarning("padding-ignored", text),)
    return (padding if (padding[:, 0] <= padding[:, 1]).any() else None), warnings


def is_declared(s: SliceHeader, value: int) -> bool:
    """Whether the slice declares a stored value as padding, and the declared HU do not overlap tissue."""
    if s.padding is None:
        return False
    (low, high), hu = _padding_range(s, s.padding)
    return low <= value <= high and not _overlaps_tissue(hu)


def _padding_range(s: SliceHeader, padding: int) -> tuple[list[int], list[float]]:
    """Return the lowest and highest padding value of a slice, as stored values and in HU."""
    stored = sorted((padding, padding if s.padding_limit is None else s.padding_limit))
    return stored, sorted(v * (s.rescale_slope or 1) + (s.rescale_intercept or 0) for v in stored)


def _overlaps_tissue(hu: list[float]) -> bool:
    return hu[0] <= TISSUE_HU[1] and hu[1] >= TISSUE_HU[0]


def replace_fill(values: NDArray[Any], slope: float, intercept: float) -> float | None:
    """Replace, in place, constant fill around the reconstruction circle by air; return the HU of the fill.

    Scanners fill the corners outside the circle with a value that has no noise. The slice is left unchanged and None
    returned if the area outside the circle is not constant, is air or below all CT numbers, or if its value is
    frequent inside the circle.

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
    if hu < LOWEST_HU or abs(hu - AIR_HU) <= AIR_TOLERANCE_HU:
        return None
    rows, columns = values.shape
    inside = circle(rows, columns)
    is_fill = values == fill
    if not is_fill[~inside].all() or is_fill[inside].mean() > MAX_FILL_FRACTION_INSIDE:
        return None
    # Replace from both ends of each row inwards only, so that equal values inside the patient stay.
    border = np.logical_and.accumulate(is_fill, axis=1)
    border |= np.logical_and.accumulate(is_fill[:, ::-1], axis=1)[:, ::-1]
    limits = np.iinfo(values.dtype)
    values[border] = np.clip(round((AIR_HU - intercept) / slope), limits.min, limits.max)
    return hu


@lru_cache(maxsize=8)
def circle(rows: int, columns: int) -> NDArray[np.bool_]:
    """Return the mask of the largest circle in a slice: array of bool, shape (rows, columns)."""
    y, x = np.ogrid[:rows, :columns]
    radius = min(rows, columns) / 2
    mask = np.asarray((y - (rows - 1) / 2) ** 2 + (x - (columns - 1) / 2) ** 2 <= radius**2)
    mask.setflags(write=False)
    return mask
