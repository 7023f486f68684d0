"""Stacks slices in spatial order into a regular grid, or says why they form none."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import first_few, numbered
from gpuprep.core.geometry import Geometry, Placement, directions, facing
from gpuprep.core.series import Series, SliceHeader
from gpuprep.core.stacking_rules import Irregularity, Rules
from gpuprep.dicom.header_checks import check, names
from gpuprep.dicom.slice_places import Measures, Places, Tolerances
from gpuprep.errors import GeometryError, InputError, MissingTagError

PLACE_TOLERANCE = 0.1
"""A slice may lie this share of the spacing away from its place in the regular grid."""

UNEVEN = 1.75
"""Up to so many times the median is uneven; at more, a slice is missing."""

RUN = 3
"""So many equal distances in a row are a spacing of their own: nothing is missing in them."""

CLOSEST = 0.2
"""Slices nearer to each other than this share of the median cannot be interpolated between: noise would explode."""


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """A series whose slices are in order."""

    slices: tuple[SliceHeader, ...]
    """Along the normal: for axial slices from the feet to the head."""
    geometry: Geometry
    """The regular grid that they form, or that is interpolated from them."""
    placement: Placement | None
    """Where the slices lie in that grid; None: slice k is its layer k."""
    twins: tuple[tuple[int, SliceHeader], ...]
    """Images dropped as identical to a slice, with the index of that slice: what pixels have to confirm."""
    irregularities: tuple[Irregularity, ...]
    """What was put right, or kept as it is."""
    measures: Measures

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of a slice, as acquired."""
        return self.geometry.shape[1:] if self.placement is None else self.placement.matrix


def stack(series: Series, rules: Rules | None = None, measures: Measures | None = None) -> Stack:
    """Return the slices of a series in spatial order, and their grid.

    Slices are ordered by the projection of *Image Position (Patient)* on the slice normal; the spacing between them
    is measured on those positions. Names, *Instance Number*, *Slice Location*, *Slice Thickness*, *Spacing Between
    Slices* and *Gantry/Detector Tilt* play no part.

    Parameters
    ----------
    series : Series
        From `gpuprep.discover`.
    rules : Rules, optional
        Policy and tolerances; the default where absent.
    measures : Measures, optional
        Is filled in as far as possible, whatever is raised.

    Raises
    ------
    InputError
        As `gpuprep.dicom.header_checks.check` raises; and GeometryError if the slices do not form a regular grid and
        the rules do not allow to make one of them.

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
        with suppress(InputError):  # what can be measured is told nevertheless
            _arranged(series, rules, measures)
        raise
    return _arranged(series, rules, measures)


def _arranged(series: Series, rules: Rules, measures: Measures) -> Stack:
    """Return the stack of a series whose values may be anything."""
    axes = _axes(series)
    row, column, _ = axes
    measures.orientation, measures.obliqueness_deg = facing(axes)
    found = list(series.irregularities)
    _check_strict(found, rules)

    if not series.pixel_spacing_mm or any(s.position_mm is None for s in series.slices):
        raise MissingTagError("Pixel Spacing or Image Position (Patient) absent")
    places = Places.of(series.slices, axes)
    near = Tolerances.of(series, rules)
    if float(np.ptp(places.along)) <= near.position_mm:
        what = "one slice only" if len(series.slices) == 1 else f"all {len(series.slices)} images share one position"
        code = "one-slice" if len(series.slices) == 1 else "one-position"
        others = f"; {series.alone} series of one image lie in its folder: --group-by folder takes them for one"
        raise GeometryError(
            f"{what} ({names(series.slices)}): the spacing between slices cannot be measured"
            + (others if series.alone else ""),
            code,
        )
    twins: list[tuple[int, SliceHeader]] = []
    if rules.policy == "keep":
        _count_doubles(places, near, measures, found)
    else:
        places, twins = _without_doubles(places, near, measures, found)
    placement, step, count = _placed(places, axes, series, rules, near, measures, found)
    _check_strict(found, rules)

    between_rows, between_columns = series.pixel_spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = column * between_rows  # the next row lies along a column
    affine[:3, 2] = row * between_columns
    affine[:3, 3] = places.slices[0].position_mm
    rows, columns = series.rows, series.columns
    if placement is not None and placement.shift is not None:
        rows, columns = placement.canvas
        affine[:3, 3] -= placement.shift[0] @ affine[:3, 1:3].T
    geometry = Geometry((count, rows, columns), affine)
    return Stack(places.slices, geometry, placement, tuple(twins), tuple(found), measures)


def _check_strict(found: list[Irregularity], rules: Rules) -> None:
    """Raise if anything was found that the policy does not bear."""
    if rules.policy == "strict" and found:
        raise GeometryError(f"irregular, which --policy strict rejects: {found[0].what}", found[0].code)


def _axes(series: Series) -> NDArray[np.float64]:
    """Return the directions of a row, of a column and of the normal: unit vectors, shape (3, 3)."""
    if series.orientation is None:
        raise MissingTagError("Image Orientation (Patient) absent")
    axes = directions(series.orientation)
    if axes is None:
        raise GeometryError(
            f"Image Orientation (Patient) {series.orientation} is not a pair of perpendicular units", "orientation"
        )
    return axes


def _without_doubles(
    places: Places, near: Tolerances, measures: Measures, found: list[Irregularity]
) -> tuple[Places, list[tuple[int, SliceHeader]]]:
    """Drop images that repeat another one, or raise if one is another image at the same place."""
    doubles = places.doubles(near.position_mm)
    if not doubles:
        return places, []
    slices = places.slices
    unlike = [
        (a, b)
        for a, b in doubles
        if not same_image(slices[a], slices[b]) or np.abs(places.beside[a] - places.beside[b]).max() > near.lean_mm
    ]
    measures.identical, measures.different = len(doubles) - len(unlike), len(unlike)
    if unlike:
        pairs = first_few(
            [f"{slices[a].name} and {slices[b].name} at {near.mm(places.along[a])} mm" for a, b in unlike]
        )
        raise GeometryError(
            f"different images share a position, {len(unlike)} times, and cannot be told apart as regular stacks "
            f"by acquisition, time or reconstruction: {pairs}",
            "duplicate",
        )
    dropped = {b for _, b in doubles}
    kept = [n for n in range(len(slices)) if n not in dropped]
    index = {n: k for k, n in enumerate(kept)}
    found.append(
        Irregularity(
            "duplicate",
            f"{numbered(len(doubles), 'repeated image')}: {names([slices[b] for _, b in doubles])}",
            "dropped, if their pixels are equal",
        )
    )
    return places.only(kept), [(index[a], slices[b]) for a, b in doubles]


def _count_doubles(places: Places, near: Tolerances, measures: Measures, found: list[Irregularity]) -> None:
    doubles = places.doubles(near.position_mm)
    measures.identical = sum(same_image(places.slices[a], places.slices[b]) for a, b in doubles)
    measures.different = len(doubles) - measures.identical
    if doubles:
        found.append(
            Irregularity(
                "duplicate",
                f"{len(doubles)} images share the position of another one: "
                + names([places.slices[b] for _, b in doubles]),
                "kept",
            )
        )


def along_normal_mm(series: Series) -> NDArray[np.float64]:
    """Return where slices lie along their normal, in the order of `series.slices`: array of shape (n,)."""
    positions = np.array([s.position_mm for s in series.slices], dtype=np.float64)
    return np.asarray(positions @ _axes(series)[2])


def same_image(a: SliceHeader, b: SliceHeader) -> bool:
    """Whether two images at one position are one image twice, as far as headers tell."""
    if a.sop_instance_uid and (a.sop_instance_uid, a.frame) == (b.sop_instance_uid, b.frame):
        return True
    return acquisition(a) == acquisition(b)


def acquisition(s: SliceHeader) -> tuple[object, ...]:
    """Return what two images of one acquisition have in common, as far as headers tell."""
    return (
        s.temporal_position, s.acquisition_number, s.acquisition_time, s.reconstruction, s.phase, s.rescale_slope,
        s.rescale_intercept, s.bits_stored, s.signed,
    )  # fmt: skip


def _placed(
    places: Places,
    axes: NDArray[np.float64],
    series: Series,
    rules: Rules,
    near: Tolerances,
    measures: Measures,
    found: list[Irregularity],
) -> tuple[Placement | None, NDArray[np.float64], int]:
    """Return where slices lie in a regular grid, the step of its layers in mm (x, y, z), and their number."""
    row, column, normal = axes
    gaps = np.diff(places.along)
    apart = np.sort(gaps[gaps > near.position_mm])  # with policy "keep" there may be doubles
    typical = float(apart[(len(apart) - 1) // 2] + apart[len(apart) // 2]) / 2  # the median
    tolerance_mm = max(near.position_mm, rules.spacing_tolerance * typical)
    missing = _counted(gaps, typical)
    missing[(gaps <= UNEVEN * typical) | _regular_runs(gaps, tolerance_mm)] = 0
    measures.spacing_mm = typical
    measures.spacing_deviation_mm = float(np.abs(gaps - typical).max())
    measures.gaps = tuple((places.slices[n].name, float(gaps[n]), int(missing[n])) for n in np.flatnonzero(missing))
    lean = _lean(places, near, measures)

    count = len(places.slices)
    if rules.policy == "keep":
        if missing.any() or (np.abs(gaps - typical) > tolerance_mm).any():
            what = (
                _gaps(places, gaps, missing, near)
                if missing.any()
                else _spacings(places, gaps, typical, tolerance_mm, near)
            )
            found.append(Irregularity("gap" if missing.any() else "uneven", what, "stacked as if even"))
        if lean is not None:
            found.append(
                Irregularity("tilt", f"the stack leans by {measures.tilt_deg:.2f}°", "kept, in a sheared affine")
            )
        offset = normal * places.along[-1] + places.beside[-1] @ np.array([column, row])
        return None, offset / (count - 1), count

    along: NDArray[np.float64] | None = None
    spacing = float(places.along[-1]) / (count - 1)
    _check_gaps(places, gaps, missing, typical, rules, near)
    if missing.any():
        found.append(Irregularity("gap", _gaps(places, gaps, missing, near), "interpolated from the slices around"))
    odd = np.abs(gaps - (missing + 1) * typical) > tolerance_mm
    if odd.any():
        what = _spacings(places, gaps, typical, tolerance_mm, near)
        found.append(Irregularity("uneven", what, "resampled from true positions"))
    off = np.abs(places.along - spacing * np.arange(count))
    if missing.any() or odd.any() or off.max() > max(near.position_mm, PLACE_TOLERANCE * typical):
        if not (missing.any() or odd.any()):
            worst = int(np.argmax(off))
            what = (
                f"small differences in spacing add up: {places.slices[worst].name} lies {near.mm(off[worst])} mm "
                f"from its place in a grid of {near.mm(spacing, 3)} mm"
            )
            found.append(Irregularity("uneven", what, "resampled from true positions"))
        _check_closest(places, gaps, typical, near)
        count = math.ceil(float(places.along[-1]) / typical - PLACE_TOLERANCE) + 1  # no coarser than acquired
        spacing = float(places.along[-1]) / (count - 1)
        along = places.along / spacing
    shift = None
    if lean is not None:
        shift = _shift(places, series, near, found, measures, lean)
    if along is None and shift is None:
        return None, spacing * normal, count
    if along is None:
        along = np.arange(count, dtype=np.float64)
    return Placement(along, shift, (series.rows, series.columns)), spacing * normal, count


def _check_closest(places: Places, gaps: NDArray[np.float64], typical: float, near: Tolerances) -> None:
    closest = int(np.argmin(gaps))
    if gaps[closest] < CLOSEST * typical:
        raise GeometryError(
            f"{places.slices[closest].name} and {places.slices[closest + 1].name} are only "
            f"{near.mm(gaps[closest], 3)} mm apart, where {near.mm(typical, 3)} mm is usual: nothing can be "
            "interpolated between them",
            "uneven",
        )


def _counted(gaps: NDArray[np.float64], typical: float) -> NDArray[np.int_]:
    """Return how many slices each distance would hold beside the two at its ends."""
    return np.asarray(np.maximum(np.rint(gaps / typical) - 1, 0), dtype=int)


def _regular_runs(gaps: NDArray[np.float64], tolerance_mm: float) -> NDArray[np.bool_]:
    """Return which distances stand in a run of equal ones."""
    same = np.abs(np.diff(gaps)) <= tolerance_mm
    runs = np.zeros(len(gaps), dtype=bool)
    start = 0
    for n in range(1, len(gaps) + 1):
        if n == len(gaps) or not same[n - 1]:
            runs[start:n] = n - start >= RUN
            start = n
    return runs


def _lean(places: Places, near: Tolerances, measures: Measures) -> float | None:
    """Return how far slices lie from one straight line, in mm, if they lie beside the normal; None if they do not."""
    along, beside = places.along, places.beside
    slope = (along @ beside) / (along @ along)
    measures.tilt_deg = math.degrees(math.atan(float(np.hypot(*slope))))
    if np.hypot(*beside.T).max() <= near.lean_mm:
        return None
    return float(np.hypot(*(beside - np.outer(along, slope)).T).max())


def _shift(
    places: Places,
    series: Series,
    near: Tolerances,
    found: list[Irregularity],
    measures: Measures,
    scatter_mm: float,
) -> NDArray[np.float64]:
    """Return where the first voxel of each slice lies in an upright grid: (rows, columns) in voxels, shape (n, 2)."""
    shift = places.beside / np.array(series.pixel_spacing_mm)
    extent = np.ptp(shift, axis=0)
    if (extent > (series.rows, series.columns)).any():
        raise GeometryError(
            f"slices lie up to {near.mm(np.ptp(places.beside, axis=0).max(), 1)} mm beside each other, more than they "
            "are wide",
            "shift",
        )
    straight = scatter_mm <= max(near.scatter_mm, 0.1 * np.ptp(places.beside, axis=0).max())
    what = f"the stack leans by {measures.tilt_deg:.2f}° (gantry tilt)" if straight else "slices are moved sideways"
    found.append(
        Irregularity(
            "tilt" if straight else "shift",
            f"{what}: up to {near.mm(np.hypot(*places.beside.T).max())} mm beside the normal",
            "undone by shifting each slice",
        )
    )
    return np.asarray(shift - shift.min(axis=0))


def _check_gaps(
    places: Places,
    gaps: NDArray[np.float64],
    missing: NDArray[np.int_],
    typical: float,
    rules: Rules,
    near: Tolerances,
) -> None:
    """Raise if one distance is too wide to be filled, or too many slices are missing."""
    total, count = int(missing.sum()), len(places.slices)
    if gaps.max() > max(UNEVEN, rules.max_missing + 1.5) * typical:
        missing = _counted(gaps, typical)
        limit = f"more than {rules.max_missing} in a row (--max-missing)"
    elif total > rules.max_missing_share * (count + total):
        limit = f"{total / (count + total):.0%} of all, more than {rules.max_missing_share:.0%} (--max-missing-share)"
    else:
        return
    raise GeometryError(
        f"slices are {near.mm(typical, 3)} mm apart (median), but not all: "
        f"{_gaps(places, gaps, missing, near)}: {limit}",
        "gap",
    )


def _gaps(places: Places, gaps: NDArray[np.float64], missing: NDArray[np.int_], near: Tolerances) -> str:
    where = [
        f"{missing[n]} missing in {near.mm(gaps[n], 3)} mm between {places.slices[n].name} and "
        f"{places.slices[n + 1].name}"
        for n in np.flatnonzero(missing)
    ]
    return first_few(where)


def _spacings(places: Places, gaps: NDArray[np.float64], typical: float, tolerance_mm: float, near: Tolerances) -> str:
    odd = np.flatnonzero(np.abs(gaps - typical) > tolerance_mm)
    return f"slices are {near.mm(typical, 3)} mm apart (median), but not all: " + first_few(
        [f"{near.mm(gaps[n], 3)} mm between {places.slices[n].name} and {places.slices[n + 1].name}" for n in odd]
    )
