"""Stacks slices in spatial order on a regular grid, or raises if they form none."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import first_few, format_count
from gpuprep.core.geometry import Geometry, Placement, directions, facing
from gpuprep.core.series import Series, SliceHeader
from gpuprep.core.stacking_rules import Irregularity, Rules
from gpuprep.dicom.header_checks import check, names
from gpuprep.dicom.slice_positions import Measures, SlicePositions, Tolerances
from gpuprep.errors import GeometryError, InputError, MissingTagError

GRID_TOLERANCE = 0.1
"""Largest distance of a slice from its grid position, as a fraction of the spacing."""

GAP_FACTOR = 1.75
"""A distance of more than this many times the median is a gap with missing slices; a smaller one is uneven."""

SHORTEST_RUN = 3
"""This many equal distances in a row are a regular spacing without missing slices, even if wide."""

SMALLEST_DISTANCE = 0.2
"""Smallest distance between slices, as a fraction of the median: interpolation would amplify noise below it."""


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Slices of a series in spatial order, and the grid they are placed on."""

    slices: tuple[SliceHeader, ...]
    """Slices in order along the normal: for axial slices from feet to head."""
    geometry: Geometry
    """Regular grid that the slices form, or onto which they are interpolated."""
    placement: Placement | None
    """Positions of the slices in the grid; None if slice k is layer k."""
    duplicates: tuple[tuple[int, SliceHeader], ...]
    """Dropped images, with the index of the slice that each repeats; the reader compares their pixels."""
    irregularities: tuple[Irregularity, ...]
    """Irregularities that were corrected, or kept."""
    measures: Measures

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of a slice, as acquired."""
        return self.geometry.shape[1:] if self.placement is None else self.placement.matrix


def stack(series: Series, rules: Rules | None = None, measures: Measures | None = None) -> Stack:
    """Return the slices of a series in spatial order, with their grid.

    Slices are ordered by the projection of *Image Position (Patient)* on the slice normal; the spacing between them
    is measured on those positions. File names, *Instance Number*, *Slice Location*, *Slice Thickness*, *Spacing Between
    Slices* and *Gantry/Detector Tilt* are not used.

    Parameters
    ----------
    series : Series
        From `gpuprep.discover`.
    rules : Rules, optional
        Policy and tolerances; `Rules()` by default.
    measures : Measures, optional
        Filled in as far as possible, even if an error is raised.

    Raises
    ------
    InputError
        As `gpuprep.dicom.header_checks.check` raises; and GeometryError if the slices do not form a regular grid and
        the rules do not allow a correction.

    References
    ----------
    DICOM PS3.3, C.7.6.2.1.1 (Image Position and Image Orientation), 10.7.1.3 (Pixel Spacing).

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> stacked = gpuprep.stack(gpuprep.discover("dicom")[0])
    >>> stacked.geometry.shape, stacked.geometry.spacing_mm
    ((12, 32, 32), (3.0, 9.0, 9.0))
    >>> [slice_.instance_number for slice_ in stacked.slices[:3]]  # this scanner counted from the head down
    [12, 11, 10]
    """
    rules = rules or Rules()
    measures = measures if measures is not None else Measures()
    try:
        check(series, rules)
    except InputError:
        with suppress(InputError):  # fill in `measures` nevertheless
            _stack(series, rules, measures)
        raise
    return _stack(series, rules, measures)


def _stack(series: Series, rules: Rules, measures: Measures) -> Stack:
    """Return the stack of a series, whose pixel attributes may be invalid."""
    axes = _axes(series)
    row, column, _ = axes
    measures.orientation, measures.obliqueness_deg = facing(axes)
    found = list(series.irregularities)
    _check_strict(found, rules)

    if not series.pixel_spacing_mm or any(s.position_mm is None for s in series.slices):
        raise MissingTagError("Pixel Spacing or Image Position (Patient) absent")
    positions = SlicePositions.of(series.slices, axes)
    tolerances = Tolerances.of(series, rules)
    if float(np.ptp(positions.along_mm)) <= tolerances.position_mm:
        what = "one slice only" if len(series.slices) == 1 else f"all {len(series.slices)} images share one position"
        code = "one-slice" if len(series.slices) == 1 else "one-position"
        others = f"; {series.alone} series of one image are in its folder: --group-by folder joins them"
        raise GeometryError(
            f"{what} ({names(series.slices)}): the spacing between slices cannot be measured"
            + (others if series.alone else ""),
            code,
        )
    duplicates: list[tuple[int, SliceHeader]] = []
    if rules.policy == "keep":
        _count_duplicates(positions, tolerances, measures, found)
    else:
        positions, duplicates = _drop_duplicates(positions, tolerances, measures, found)
    placement, step_mm, count = _fit_grid(positions, axes, series, rules, tolerances, measures, found)
    _check_strict(found, rules)

    between_rows, between_columns = series.pixel_spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = step_mm
    affine[:3, 1] = column * between_rows  # the next row lies along a column
    affine[:3, 2] = row * between_columns
    affine[:3, 3] = positions.slices[0].position_mm
    rows, columns = series.rows, series.columns
    if placement is not None and placement.shift is not None:
        rows, columns = placement.canvas
        affine[:3, 3] -= placement.shift[0] @ affine[:3, 1:3].T
    geometry = Geometry((count, rows, columns), affine)
    return Stack(positions.slices, geometry, placement, tuple(duplicates), tuple(found), measures)


def _check_strict(found: list[Irregularity], rules: Rules) -> None:
    """Raise if the policy is "strict" and an irregularity was found."""
    if rules.policy == "strict" and found:
        raise GeometryError(f"irregular, which --policy strict rejects: {found[0].what}", found[0].code)


def _axes(series: Series) -> NDArray[np.float64]:
    """Return the directions of a row, of a column and of the normal: unit vectors, shape (3, 3)."""
    if series.orientation is None:
        raise MissingTagError("Image Orientation (Patient) absent")
    axes = directions(series.orientation)
    if axes is None:
        raise GeometryError(
            f"Image Orientation (Patient) {series.orientation} is not a pair of perpendicular unit vectors",
            "orientation",
        )
    return axes


def _drop_duplicates(
    positions: SlicePositions, tolerances: Tolerances, measures: Measures, found: list[Irregularity]
) -> tuple[SlicePositions, list[tuple[int, SliceHeader]]]:
    """Drop images that repeat another one; raise if different images share a position."""
    duplicates = positions.duplicates(tolerances.position_mm)
    if not duplicates:
        return positions, []
    slices = positions.slices
    different = [
        (a, b)
        for a, b in duplicates
        if not same_image(slices[a], slices[b])
        or np.abs(positions.lateral_mm[a] - positions.lateral_mm[b]).max() > tolerances.lean_mm
    ]
    measures.identical, measures.different = len(duplicates) - len(different), len(different)
    if different:
        pairs = first_few(
            [
                f"{slices[a].name} and {slices[b].name} at {tolerances.mm(positions.along_mm[a])} mm"
                for a, b in different
            ]
        )
        raise GeometryError(
            f"different images share a position, {len(different)} times, and cannot be separated into regular stacks "
            f"by acquisition, time or reconstruction: {pairs}",
            "duplicate",
        )
    dropped = {b for _, b in duplicates}
    kept = [n for n in range(len(slices)) if n not in dropped]
    index = {n: k for k, n in enumerate(kept)}
    found.append(
        Irregularity(
            "duplicate",
            f"{format_count(len(duplicates), 'repeated image')}: {names([slices[b] for _, b in duplicates])}",
            "dropped, if their pixels are equal",
        )
    )
    return positions.subset(kept), [(index[a], slices[b]) for a, b in duplicates]


def _count_duplicates(
    positions: SlicePositions, tolerances: Tolerances, measures: Measures, found: list[Irregularity]
) -> None:
    duplicates = positions.duplicates(tolerances.position_mm)
    measures.identical = sum(same_image(positions.slices[a], positions.slices[b]) for a, b in duplicates)
    measures.different = len(duplicates) - measures.identical
    if duplicates:
        found.append(
            Irregularity(
                "duplicate",
                f"{len(duplicates)} images share the position of another one: "
                + names([positions.slices[b] for _, b in duplicates]),
                "kept",
            )
        )


def along_normal_mm(series: Series) -> NDArray[np.float64]:
    """Return the positions of slices along their normal, in the order of `series.slices`: array of shape (n,)."""
    positions = np.array([s.position_mm for s in series.slices], dtype=np.float64)
    return np.asarray(positions @ _axes(series)[2])


def same_image(a: SliceHeader, b: SliceHeader) -> bool:
    """Whether two images at one position are the same image, according to their headers."""
    if a.sop_instance_uid and (a.sop_instance_uid, a.frame) == (b.sop_instance_uid, b.frame):
        return True
    return acquisition_attributes(a) == acquisition_attributes(b)


def acquisition_attributes(s: SliceHeader) -> tuple[object, ...]:
    """Return the attributes that are equal for all images of one acquisition."""
    return (
        s.temporal_position, s.acquisition_number, s.acquisition_time, s.reconstruction, s.phase, s.rescale_slope,
        s.rescale_intercept, s.bits_stored, s.signed,
    )  # fmt: skip


def _fit_grid(
    positions: SlicePositions,
    axes: NDArray[np.float64],
    series: Series,
    rules: Rules,
    tolerances: Tolerances,
    measures: Measures,
    found: list[Irregularity],
) -> tuple[Placement | None, NDArray[np.float64], int]:
    """Return the placement of slices in a regular grid, the step between layers in mm (x, y, z), and their number."""
    row, column, normal = axes
    gaps_mm = np.diff(positions.along_mm)
    steps_mm = np.sort(gaps_mm[gaps_mm > tolerances.position_mm])  # policy "keep" keeps duplicates, with gaps of 0
    typical_mm = float(steps_mm[(len(steps_mm) - 1) // 2] + steps_mm[len(steps_mm) // 2]) / 2  # the median
    tolerance_mm = max(tolerances.position_mm, rules.spacing_tolerance * typical_mm)
    missing = _missing_between(gaps_mm, typical_mm)
    missing[(gaps_mm <= GAP_FACTOR * typical_mm) | _regular_runs(gaps_mm, tolerance_mm)] = 0
    measures.spacing_mm = typical_mm
    measures.spacing_deviation_mm = float(np.abs(gaps_mm - typical_mm).max())
    measures.gaps = tuple(
        (positions.slices[n].name, float(gaps_mm[n]), int(missing[n])) for n in np.flatnonzero(missing)
    )
    scatter_mm = _scatter_mm(positions, tolerances, measures)

    count = len(positions.slices)
    if rules.policy == "keep":
        if missing.any():
            what = _gaps_text(positions, gaps_mm, missing, tolerances)
            found.append(Irregularity("gap", what, "stacked as if even"))
        elif (np.abs(gaps_mm - typical_mm) > tolerance_mm).any():
            what = _spacings_text(positions, gaps_mm, typical_mm, tolerance_mm, tolerances)
            found.append(Irregularity("uneven", what, "stacked as if even"))
        if scatter_mm is not None:
            what = f"the stack leans by {measures.tilt_deg:.2f}°"
            found.append(Irregularity("tilt", what, "kept, in a sheared affine"))
        offset = normal * positions.along_mm[-1] + positions.lateral_mm[-1] @ np.array([column, row])
        return None, offset / (count - 1), count

    indices: NDArray[np.float64] | None = None
    spacing_mm = float(positions.along_mm[-1]) / (count - 1)
    _check_gaps(positions, gaps_mm, missing, typical_mm, rules, tolerances)
    if missing.any():
        what = _gaps_text(positions, gaps_mm, missing, tolerances)
        found.append(Irregularity("gap", what, "interpolated from the slices around"))
    uneven = np.abs(gaps_mm - (missing + 1) * typical_mm) > tolerance_mm
    if uneven.any():
        what = _spacings_text(positions, gaps_mm, typical_mm, tolerance_mm, tolerances)
        found.append(Irregularity("uneven", what, "resampled from true positions"))
    deviation_mm = np.abs(positions.along_mm - spacing_mm * np.arange(count))
    if missing.any() or uneven.any() or deviation_mm.max() > max(tolerances.position_mm, GRID_TOLERANCE * typical_mm):
        if not (missing.any() or uneven.any()):
            worst = int(np.argmax(deviation_mm))
            what = (
                f"small differences in spacing add up: {positions.slices[worst].name} lies "
                f"{tolerances.mm(deviation_mm[worst])} mm from its place in a grid of {tolerances.mm(spacing_mm, 3)} mm"
            )
            found.append(Irregularity("uneven", what, "resampled from true positions"))
        _check_smallest_distance(positions, gaps_mm, typical_mm, tolerances)
        # The spacing is no coarser than acquired.
        count = math.ceil(float(positions.along_mm[-1]) / typical_mm - GRID_TOLERANCE) + 1
        spacing_mm = float(positions.along_mm[-1]) / (count - 1)
        indices = positions.along_mm / spacing_mm
    shift = None
    if scatter_mm is not None:
        shift = _slice_shifts(positions, series, tolerances, found, measures, scatter_mm)
    if indices is None and shift is None:
        return None, spacing_mm * normal, count
    if indices is None:
        indices = np.arange(count, dtype=np.float64)
    return Placement(indices, shift, (series.rows, series.columns)), spacing_mm * normal, count


def _check_smallest_distance(
    positions: SlicePositions, gaps_mm: NDArray[np.float64], typical_mm: float, tolerances: Tolerances
) -> None:
    closest = int(np.argmin(gaps_mm))
    if gaps_mm[closest] < SMALLEST_DISTANCE * typical_mm:
        raise GeometryError(
            f"{positions.slices[closest].name} and {positions.slices[closest + 1].name} are only "
            f"{tolerances.mm(gaps_mm[closest], 3)} mm apart, where {tolerances.mm(typical_mm, 3)} mm is usual: nothing "
            "can be interpolated between them",
            "uneven",
        )


def _missing_between(gaps_mm: NDArray[np.float64], typical_mm: float) -> NDArray[np.int_]:
    """Return the number of slices that fit into each distance at the typical spacing, excluding both ends."""
    return np.asarray(np.maximum(np.rint(gaps_mm / typical_mm) - 1, 0), dtype=int)


def _regular_runs(gaps_mm: NDArray[np.float64], tolerance_mm: float) -> NDArray[np.bool_]:
    """Return which distances belong to a run of equal ones."""
    same = np.abs(np.diff(gaps_mm)) <= tolerance_mm
    runs = np.zeros(len(gaps_mm), dtype=bool)
    start = 0
    for n in range(1, len(gaps_mm) + 1):
        if n == len(gaps_mm) or not same[n - 1]:
            runs[start:n] = n - start >= SHORTEST_RUN
            start = n
    return runs


def _scatter_mm(positions: SlicePositions, tolerances: Tolerances, measures: Measures) -> float | None:
    """Set the tilt, and return the largest distance of slices from a straight line; None if they follow the normal."""
    along_mm, lateral_mm = positions.along_mm, positions.lateral_mm
    slope = (along_mm @ lateral_mm) / (along_mm @ along_mm)
    measures.tilt_deg = math.degrees(math.atan(float(np.hypot(*slope))))
    if np.hypot(*lateral_mm.T).max() <= tolerances.lean_mm:
        return None
    return float(np.hypot(*(lateral_mm - np.outer(along_mm, slope)).T).max())


def _slice_shifts(
    positions: SlicePositions,
    series: Series,
    tolerances: Tolerances,
    found: list[Irregularity],
    measures: Measures,
    scatter_mm: float,
) -> NDArray[np.float64]:
    """Return the offset of each slice in an upright grid, as (rows, columns) in voxels, shape (n, 2)."""
    shift = positions.lateral_mm / np.array(series.pixel_spacing_mm)
    extent = np.ptp(shift, axis=0)
    if (extent > (series.rows, series.columns)).any():
        raise GeometryError(
            f"slices lie up to {tolerances.mm(np.ptp(positions.lateral_mm, axis=0).max(), 1)} mm beside each other, "
            "more than they are wide",
            "shift",
        )
    straight = scatter_mm <= max(tolerances.scatter_mm, 0.1 * np.ptp(positions.lateral_mm, axis=0).max())
    what = f"the stack leans by {measures.tilt_deg:.2f}° (gantry tilt)" if straight else "slices are moved sideways"
    found.append(
        Irregularity(
            "tilt" if straight else "shift",
            f"{what}: up to {tolerances.mm(np.hypot(*positions.lateral_mm.T).max())} mm beside the normal",
            "undone by shifting each slice",
        )
    )
    return np.asarray(shift - shift.min(axis=0))


def _check_gaps(
    positions: SlicePositions,
    gaps_mm: NDArray[np.float64],
    missing: NDArray[np.int_],
    typical_mm: float,
    rules: Rules,
    tolerances: Tolerances,
) -> None:
    """Raise if a gap is too wide, or too many slices are missing in total."""
    total, count = int(missing.sum()), len(positions.slices)
    if gaps_mm.max() > max(GAP_FACTOR, rules.max_missing + 1.5) * typical_mm:
        missing = _missing_between(gaps_mm, typical_mm)
        limit = f"more than {rules.max_missing} in a row (--max-missing)"
    elif total > rules.max_missing_share * (count + total):
        limit = f"{total / (count + total):.0%} of all, more than {rules.max_missing_share:.0%} (--max-missing-share)"
    else:
        return
    raise GeometryError(
        f"slices are {tolerances.mm(typical_mm, 3)} mm apart (median), but not all: "
        f"{_gaps_text(positions, gaps_mm, missing, tolerances)}: {limit}",
        "gap",
    )


def _gaps_text(
    positions: SlicePositions, gaps_mm: NDArray[np.float64], missing: NDArray[np.int_], tolerances: Tolerances
) -> str:
    where = [
        f"{missing[n]} missing in {tolerances.mm(gaps_mm[n], 3)} mm between {positions.slices[n].name} and "
        f"{positions.slices[n + 1].name}"
        for n in np.flatnonzero(missing)
    ]
    return first_few(where)


def _spacings_text(
    positions: SlicePositions,
    gaps_mm: NDArray[np.float64],
    typical_mm: float,
    tolerance_mm: float,
    tolerances: Tolerances,
) -> str:
    uneven = np.flatnonzero(np.abs(gaps_mm - typical_mm) > tolerance_mm)
    return f"slices are {tolerances.mm(typical_mm, 3)} mm apart (median), but not all: " + first_few(
        [
            f"{tolerances.mm(gaps_mm[n], 3)} mm between {positions.slices[n].name} and {positions.slices[n + 1].name}"
            for n in uneven
        ]
    )
