"""Decides whether coordinates are pixels or mm, where the file does not say it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.mask_options import Reading, Units
from gpuprep.errors import SegmentationError
from gpuprep.masks.formats.column_roles import Columns, in_patient, is_whole
from gpuprep.masks.model import Plane

ROUNDING_PX = 2e-3
"""How far from a whole number of pixels a length may be that was written in mm, with four decimals."""


def said(reading: Reading, columns: Columns | None) -> Units | None:
    """Return the units that the header or somebody names; raise where they differ."""
    header = columns.units if columns else None
    if header and reading.units and header != reading.units:
        raise SegmentationError(f"--units {reading.units}, but the header says {header}: leave the option out")
    return header or reading.units


def of_outline(points: NDArray[np.float64], pointed: bool, plane: Plane | None) -> Units:
    """Return the units of an ImageJ outline, "px" or "mm", both counted from the corner of the image.

    Whole numbers are pixels: so ImageJ writes an outline along pixels, in an image without a scale. With a scale it
    writes mm; then all points are whole numbers of pixels once they are divided by the spacing. What is neither is mm,
    or an outline between pixels, and only tells itself apart if one of the two lies outside of the slice.

    Parameters
    ----------
    points : array of float, shape (n, 2)
    pointed : bool
        Whether any number was written with a decimal point. Whole numbers with one can be mm where pixels are large.
    plane : Plane or None

    Raises
    ------
    SegmentationError
        If it could be both.
    """
    whole = is_whole(points)
    if whole and (not pointed or plane is None):
        return "px"
    if plane is None:
        raise SegmentationError("coordinates with decimals are pixels or mm: say which with --units px or --units mm")
    spacing_mm = np.array(plane.pixel_spacing_mm[::-1])
    if (spacing_mm == 1).all():
        return "px"  # it makes no difference
    in_px = points / spacing_mm
    on_pixels = bool((np.abs(in_px - np.rint(in_px)) <= ROUNDING_PX).all())
    if whole and not on_pixels:
        return "px"
    # Halves and quarters are what outlines between pixels have, and some spacings too.
    if on_pixels and not is_whole(points * 4):
        return "mm"
    fits_px, fits_mm = _within(points, plane), _within(in_px, plane)
    if fits_px == fits_mm:
        what = (
            "lie in the slice both as pixels and as mm" if fits_px else "lie in the slice neither as pixels nor as mm"
        )
        raise SegmentationError(f"its coordinates {what}: say which they are with --units px or --units mm")
    return "px" if fits_px else "mm"


def _within(points: NDArray[np.float64], plane: Plane) -> bool:
    return bool(points.min() >= 0 and (points <= np.array([plane.columns, plane.rows])).all())


def of_points(xyz: NDArray[np.float64], plane: Plane | None) -> Units:
    """Return the units of points x, y, z: "px" with z a slice number, or "mm" in the patient.

    Raises
    ------
    SegmentationError
        If it could be both, or z is in mm but x and y are pixels.
    """
    if in_patient(xyz, plane):
        return "mm"
    if is_whole(xyz[:, :2]) and xyz[:, :2].min() >= 0:
        if is_whole(xyz[:, 2]) and xyz[:, 2].min() >= 0:
            return "px"
        raise SegmentationError(
            "x and y could be pixels, but z counts no slices: say --units mm, or --units px --slice-from z"
        )
    raise SegmentationError("coordinates with decimals are pixels or mm: say which with --units px or --units mm")
