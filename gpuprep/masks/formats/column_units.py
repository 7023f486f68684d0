"""Decides whether coordinates are pixels or mm if the file does not state it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.mask_options import ReadingOptions, Units
from gpuprep.errors import SegmentationError
from gpuprep.masks.formats.column_roles import Columns, in_patient, is_whole
from gpuprep.masks.model import Plane

ROUNDING_PX = 2e-3
"""Largest distance, in pixels, from a whole number of pixels of a length that was written in mm with four decimals."""


def stated(reading: ReadingOptions, columns: Columns | None) -> Units | None:
    """Return the units that the header or the options state, None if neither does; raise if they differ."""
    header = columns.units if columns else None
    if header and reading.units and header != reading.units:
        raise SegmentationError(f"--units {reading.units}, but the header says {header}: omit the option")
    return header or reading.units


def of_outline(points: NDArray[np.float64], pointed: bool, plane: Plane | None) -> Units:
    """Return the units of an ImageJ outline, "px" or "mm", both counted from the corner of the image.

    ImageJ writes an outline along pixel edges as whole numbers in an image without a scale, and in mm with a scale. In
    mm, the points divided by the spacing are whole numbers. Other points are in mm, or in pixels with fractions; they
    are decided only if one of the two lies outside of the slice.

    Parameters
    ----------
    points : array of float, shape (n, 2)
        Points as (x, y).
    pointed : bool
        Whether any number is written with a decimal point. Whole numbers with one can be mm if pixels are large.
    plane : Plane or None
        Matrix and pixel spacing of the series, if known.

    Raises
    ------
    SegmentationError
        If both units are possible.
    """
    whole = is_whole(points)
    if whole and (not pointed or plane is None):
        return "px"
    if plane is None:
        raise SegmentationError("coordinates with decimals are pixels or mm: say which with --units px or --units mm")
    spacing_mm = np.array(plane.pixel_spacing_mm[::-1])
    if (spacing_mm == 1).all():
        return "px"  # pixels and mm are equal
    in_px = points / spacing_mm
    on_pixels = bool((np.abs(in_px - np.rint(in_px)) <= ROUNDING_PX).all())
    if whole and not on_pixels:
        return "px"
    # Outlines in pixels may have halves and quarters, and so may outlines in mm with some spacings.
    if on_pixels and not is_whole(points * 4):
        return "mm"
    fits_px, fits_mm = _in_slice(points, plane), _in_slice(in_px, plane)
    if fits_px == fits_mm:
        what = (
            "lie in the slice both as pixels and as mm" if fits_px else "lie in the slice neither as pixels nor as mm"
        )
        raise SegmentationError(f"its coordinates {what}: say which they are with --units px or --units mm")
    return "px" if fits_px else "mm"


def _in_slice(points: NDArray[np.float64], plane: Plane) -> bool:
    return bool(points.min() >= 0 and (points <= np.array([plane.columns, plane.rows])).all())


def of_points(xyz: NDArray[np.float64], plane: Plane | None) -> Units:
    """Return the units of points (x, y, z): "px" if z is a slice number, or "mm" in the patient.

    Raises
    ------
    SegmentationError
        If both are possible, or z is no slice number although x and y can be pixels.
    """
    if in_patient(xyz, plane):
        return "mm"
    if is_whole(xyz[:, :2]) and xyz[:, :2].min() >= 0:
        if is_whole(xyz[:, 2]) and xyz[:, 2].min() >= 0:
            return "px"
        raise SegmentationError(
            "x and y could be pixels, but z is no slice number: use --units mm, or --units px --slice-from z"
        )
    raise SegmentationError("coordinates with decimals are pixels or mm: say which with --units px or --units mm")
