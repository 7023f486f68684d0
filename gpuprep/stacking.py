"""Slices in spatial order and the grid they form, or the reason why they form none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuprep.errors import DecodeError, GeometryError, InputError, IntensityError, MissingTagError
from gpuprep.geometry import Geometry
from gpuprep.series import Series, SliceHeader

RELATIVE_TOLERANCE = 0.01
"""Distances between neighbours may differ from their median by this share of it …"""

ABSOLUTE_TOLERANCE_MM = 0.02
"""… or by this much, whichever is more: positions are often rounded to hundredths."""

PLACE_TOLERANCE = 0.1
"""A slice may lie this share of the spacing away from its place in the regular grid."""

DRIFT_TOLERANCE_MM = 0.1
"""Slices may lie this far off the line along their normal; more is a tilted gantry."""

UNDEFINED_LENGTH = 0xFFFF_FFFF
"""Of an element that is a sequence of fragments: encoded pixels."""

STEEPEST_SLOPE = 100.0
LARGEST_INTERCEPT_HU = 65536.0
"""Beyond these a rescale does not lead to CT numbers."""

NAMED = 3
"""Slices named in a message before it says how many more there are."""


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """A series whose slices are in order."""

    slices: tuple[SliceHeader, ...]
    """Along the normal: for axial slices from the feet to the head."""
    geometry: Geometry


def stack(series: Series) -> Stack:
    """Return the slices of a series in spatial order, and their grid.

    Slices are ordered by the projection of *Image Position (Patient)* on the slice normal; the spacing between them
    is measured on those positions. Names, *Instance Number*, *Slice Location* and *Slice Thickness* play no part.

    Raises
    ------
    MissingTagError
        If an attribute is absent or unreadable without which the place or the HU of a slice are unknown.
    IntensityError
        If the stored values cannot be called HU.
    DecodeError
        If a file is too short for the pixels it announces.
    GeometryError
        If the slices do not form a regular grid: gaps, doubles, a tilted gantry, a single slice.

    References
    ----------
    DICOM PS3.3, C.7.6.2.1.1 (Image Position and Image Orientation), 10.7.1.3 (Pixel Spacing).
    """
    _check_tags(series)
    _check_intensity(series)
    _check_lengths(series)
    assert series.orientation is not None and series.pixel_spacing_mm is not None  # noqa: PT018, S101 - checked
    row, column = np.array(series.orientation[:3]), np.array(series.orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if abs(lengths[0] - 1) > 1e-2 or abs(lengths[1] - 1) > 1e-2 or abs(row @ column) > 1e-2:
        raise GeometryError(f"Image Orientation (Patient) {series.orientation} is not a pair of perpendicular units")
    row, column = row / lengths[0], column / lengths[1]
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)

    positions = np.array([s.position_mm for s in series.slices], dtype=np.float64)
    order = np.argsort(positions @ normal, kind="stable")
    slices = tuple(series.slices[n] for n in order)
    positions = positions[order]
    if len(slices) < 2:
        apart = ", unlike the rest of its series in matrix, spacing or orientation" if series.part else ""
        raise GeometryError(f"one slice only ({slices[0].name}{apart}): the spacing between slices cannot be measured")
    step = _regular_step(slices, positions, normal)
    between_rows, between_columns = series.pixel_spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = column * between_rows  # the next row lies along a column
    affine[:3, 2] = row * between_columns
    affine[:3, 3] = positions[0]
    return Stack(slices, Geometry((len(slices), series.rows, series.columns), affine))


def _regular_step(
    slices: tuple[SliceHeader, ...], positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the vector from each slice to the next, having made sure that there is one."""
    along = positions @ normal
    gaps = np.diff(along)
    typical = float(np.median(gaps))
    double = np.flatnonzero(gaps < max(ABSOLUTE_TOLERANCE_MM, RELATIVE_TOLERANCE * typical))
    if double.size:
        raise GeometryError(
            f"neighbouring slices share a position, {double.size} times: "
            + _named([f"{slices[n].name} and {slices[n + 1].name} at {along[n]:.2f} mm" for n in double])
        )
    uneven = np.flatnonzero(np.abs(gaps - typical) > max(ABSOLUTE_TOLERANCE_MM, RELATIVE_TOLERANCE * typical))
    if uneven.size:
        raise GeometryError(
            f"slices are {typical:.3f} mm apart (median), but not all: "
            + _named([f"{gaps[n]:.3f} mm between {slices[n].name} and {slices[n + 1].name}" for n in uneven])
        )
    spacing = (along[-1] - along[0]) / (len(slices) - 1)
    off = np.abs(along - along[0] - spacing * np.arange(len(slices)))
    worst = int(np.argmax(off))
    if off[worst] > max(ABSOLUTE_TOLERANCE_MM, PLACE_TOLERANCE * typical):
        raise GeometryError(
            f"small differences in spacing add up: {slices[worst].name} lies {off[worst]:.2f} mm from its place in a "
            f"grid of {spacing:.3f} mm"
        )
    step = spacing * normal
    drift = np.linalg.norm(positions - positions[0] - np.outer(along - along[0], normal), axis=1)
    worst = int(np.argmax(drift))
    if drift[worst] > DRIFT_TOLERANCE_MM:
        tilt_deg = np.degrees(np.arctan2(drift[worst], abs(along[worst] - along[0])))
        raise GeometryError(
            f"the stack leans by {tilt_deg:.2f}° (gantry tilt): {slices[worst].name} lies {drift[worst]:.2f} mm beside "
            f"the normal through {slices[0].name}"
        )
    return np.asarray(step)


def _check_tags(series: Series) -> None:
    """Raise unless every slice says where it is and what its numbers mean."""
    if not series.series_uid:
        raise MissingTagError(f"no Series Instance UID in {_files(series.slices)}: nothing tells series apart")
    multi = [s for s in series.slices if s.frames > 1]
    if multi:
        raise InputError(
            f"multi-frame image of {multi[0].frames} frames ({multi[0].name}): only single frames are read"
        )
    for name, slices in (
        ("Image Orientation (Patient)", series.slices if series.orientation is None else ()),
        ("Pixel Spacing", series.slices if series.pixel_spacing_mm is None else ()),
        ("Rows and Columns", series.slices if not (series.rows and series.columns) else ()),
        ("Image Position (Patient)", [s for s in series.slices if s.position_mm is None]),
        ("Bits Allocated", [s for s in series.slices if s.bits_allocated is None]),
        ("Bits Stored", [s for s in series.slices if not s.bits_stored]),
        ("Pixel Representation", [s for s in series.slices if s.signed is None]),
        ("Rescale Slope", [s for s in series.slices if s.rescale_slope is None]),
        ("Rescale Intercept", [s for s in series.slices if s.rescale_intercept is None]),
        ("Pixel Data", [s for s in series.slices if s.pixel_bytes == 0]),
    ):
        if slices:
            raise MissingTagError(f"{name} absent, unreadable or impossible in {_files(slices)}")


def _check_intensity(series: Series) -> None:
    """Raise unless stored value times slope plus intercept is a CT number in HU.

    References
    ----------
    DICOM PS3.3, C.8.2.1 (CT Image module): MONOCHROME2, one sample, Rescale Type HU unless said otherwise.
    """
    for name, slices in (
        ("several samples per pixel", [s for s in series.slices if s.samples_per_pixel != 1]),
        ("Photometric Interpretation not MONOCHROME2", [s for s in series.slices if s.photometric != "MONOCHROME2"]),
        ("Rescale Type not HU", [s for s in series.slices if s.rescale_type not in (None, "HU")]),
        ("Rescale Slope 0", [s for s in series.slices if s.rescale_slope == 0]),
        ("Rescale Slope absurd", [s for s in series.slices if abs(s.rescale_slope or 0) > STEEPEST_SLOPE]),
        (
            "Rescale Intercept absurd",
            [s for s in series.slices if abs(s.rescale_intercept or 0) > LARGEST_INTERCEPT_HU],
        ),
        ("Bits Allocated neither 8 nor 16", [s for s in series.slices if s.bits_allocated not in (8, 16)]),
        (
            "Bits Stored above Bits Allocated",
            [s for s in series.slices if (s.bits_stored or 0) > (s.bits_allocated or 0)],
        ),
    ):
        if slices:
            raise IntensityError(f"{name} in {_files(slices)}: the values cannot be called HU")


def _check_lengths(series: Series) -> None:
    """Raise if plain pixels do not fill the matrix, or the file ends before they do."""
    for s in series.slices:
        if s.pixel_offset is None:
            continue
        if s.pixel_bytes == UNDEFINED_LENGTH:
            raise DecodeError(f"{s.name} holds encoded pixels, which its transfer syntax denies: it is damaged")
        need = series.rows * series.columns * (s.bits_allocated or 0) // 8
        if (s.pixel_bytes or 0) < need:
            raise DecodeError(
                f"{s.name} announces {s.pixel_bytes} bytes of pixels where {need} are needed: it is damaged"
            )
        if s.pixel_offset + need > s.file_bytes:
            have = max(0, s.file_bytes - s.pixel_offset)
            raise DecodeError(f"{s.name} ends after {have} of {need} bytes of pixels: it is truncated")


def _files(slices: tuple[SliceHeader, ...] | list[SliceHeader]) -> str:
    return _named([s.name for s in slices])


def _named(parts: list[str]) -> str:
    more = len(parts) - NAMED
    return ", ".join(parts[:NAMED]) + (f" and {more} more" if more > 0 else "")
