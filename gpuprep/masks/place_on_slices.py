"""Places a segmentation on the slices of its series: finds the slice and the pixels of each part.

Outlines and painted pixels in patient coordinates are matched to slices by position: a slice takes the planes within
half a layer of it. If there are several such planes, because a structure was drawn on thinner slices, the nearest one
is taken.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import format_count, printable
from gpuprep.core.mask_options import ReadingOptions
from gpuprep.dicom.stack import Stack
from gpuprep.errors import SegmentationError
from gpuprep.masks import oblique_planes
from gpuprep.masks.model import Contour, Plane, Raster, Segmentation, Slab, Structure
from gpuprep.masks.overlapping_outlines import grouped
from gpuprep.masks.rasterize import filled, filled_union, on_outline
from gpuprep.masks.series_slices import HALF_LAYER, SeriesSlices

SUBPIXELS = 1024
"""Fractions of a pixel to which pixel coordinates that were written in mm are rounded."""

ALIGNED_PX = 0.01
"""Largest distance, in pixels, between the pixels of a painted plane and of a slice that are copied, not sampled."""

PARALLEL_LAYERS = 0.1
"""Largest rise from corner to corner, in layers, of a painted plane that counts as parallel to the slices."""


@dataclass(slots=True)
class _SlicePart:
    """Outlines and painted pixels of a structure on one slice. Points of outlines are (column, row)."""

    outlines: list[NDArray[np.float64]] = field(default_factory=list)
    """Outlines that combine by parity."""
    ungrouped: list[NDArray[np.float64]] = field(default_factory=list)
    """Outlines of the rule "even-odd", until `_group_outlines` sorts them into `outlines` and `united`."""
    united: list[list[NDArray[np.float64]]] = field(default_factory=list)
    """Groups of outlines that overlap in part. The area of a group combines like that of one outline, by parity."""
    insides: list[NDArray[np.float64]] = field(default_factory=list)
    holes: list[NDArray[np.float64]] = field(default_factory=list)
    rasters: list[tuple[Raster, NDArray[np.float64] | None]] = field(default_factory=list)
    """Rasters, each with the matrix from (row, column, 1) of the slice to that of its plane; None for the identity."""


@dataclass(frozen=True, slots=True, eq=False)
class PlacedStructure:
    """A structure on the slices of its series."""

    name: str
    source: str
    """Path of the file, for messages."""
    parts: dict[int, _SlicePart]
    """Parts by the index of the slice in the stack."""
    contours: int
    """Number of contours in the file."""

    def renamed(self, name: str) -> PlacedStructure:
        """Return the same structure under another name."""
        return replace(self, name=name)

    def paint(self, n: int, shape: tuple[int, int]) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
        """Return a rectangle of slice `n`, as slices of rows and columns, and the mask of the structure in it.

        No pixel outside of the rectangle belongs to the structure.
        """
        part = self.parts[n]
        low, high = np.array(shape[::-1], dtype=np.float64), np.zeros(2)
        if part.outlines or part.united or part.insides:
            points = np.concatenate([*part.outlines, *chain.from_iterable(part.united), *part.insides])
            low, high = np.minimum(low, points.min(axis=0)), np.maximum(high, points.max(axis=0) + 1)
        for raster, to_plane in part.rasters:
            first, stop = _bounds(raster, to_plane)
            low, high = np.minimum(low, first), np.maximum(high, stop)
        left, top = np.clip(np.floor(low), 0, shape[::-1]).astype(int).tolist()
        right, bottom = np.clip(np.ceil(high), (left, top), np.maximum((left, top), shape[::-1])).astype(int).tolist()
        size, corner = (bottom - top, right - left), np.array([left, top])
        mask = filled([polygon - corner for polygon in part.outlines], size)
        for group in part.united:
            mask ^= filled_union([polygon - corner for polygon in group], size)
        for polygon in part.insides:
            mask |= filled([polygon - corner], size) & ~on_outline(polygon - corner, size)
        for raster, to_plane in part.rasters:
            _paint_raster(mask, raster, to_plane, (top, left))
        for polygon in part.holes:
            mask &= ~(filled([polygon - corner], size) | on_outline(polygon - corner, size))
        return (slice(top, bottom), slice(left, right)), mask


def slice_plane(stack: Stack) -> Plane:
    """Return matrix and pixel spacing of the slices of a stack."""
    rows, columns = stack.matrix
    _, between_rows, between_columns = stack.geometry.spacing_mm
    return Plane(rows, columns, (between_rows, between_columns))


def place(segmentation: Segmentation, stack: Stack, reading: ReadingOptions) -> tuple[list[PlacedStructure], list[str]]:
    """Return the structures of a segmentation on the slices of a stack, and notes on parts that were left out.

    Parameters
    ----------
    segmentation : Segmentation
        Segmentation from `gpuprep.masks.read.read_segmentation`.
    stack : Stack
        Stack of the series.
    reading : Reading
        Options; `index_base` and `slice_order` define slice numbers.

    Raises
    ------
    SegmentationError
        If the slices are ambiguous, or the matrix or coordinates do not fit the slices.
    """
    slices = SeriesSlices(segmentation, stack, reading)
    placed = []
    notes = list(segmentation.notes)
    for structure in segmentation.structures:
        if not structure.contours and not structure.rasters:
            notes.append(f"{printable(structure.name)}: it is empty")
            continue
        placed_structure, structure_notes = _place_structure(structure, slices, segmentation.path)
        placed.append(placed_structure)
        notes += structure_notes
    return placed, notes


@dataclass(slots=True)
class _Candidate:
    """A contour or raster in patient coordinates, and its signed distance from a slice, in layers."""

    distance: float
    contour: Contour | None
    points: NDArray[np.float64] | None
    raster: Raster | None
    to_plane: NDArray[np.float64] | None


def _place_structure(structure: Structure, slices: SeriesSlices, source: str) -> tuple[PlacedStructure, list[str]]:
    """Return a structure on its slices, and notes on parts that were left out."""
    parts: dict[int, _SlicePart] = defaultdict(_SlicePart)
    candidates: dict[int, list[_Candidate]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    _match_contours([c for c in structure.contours if c.frame == "patient"], slices, candidates, left_out)
    for contour in structure.contours:
        if contour.frame == "patient":
            continue
        if (n := slices.find(contour.slice)) is None:
            left_out["on no slice of the series"] += 1
        else:
            _add(parts[n], contour, _in_pixels(contour, slices))
    oblique: list[Raster] = []
    for raster in structure.rasters:
        if raster.geometry is not None and _is_parallel(raster, slices):
            _match_raster(raster, slices, candidates, left_out)
        elif raster.geometry is not None and not slices.overlap(_box_layers(raster, slices)):
            left_out["on no slice of the series"] += 1
        elif raster.geometry is not None:
            oblique.append(raster)
        elif raster.matrix is not None and raster.matrix != slices.matrix:
            (rows, columns), (have_rows, have_columns) = raster.matrix, slices.matrix
            raise SegmentationError(
                f"it has {rows} × {columns} pixels, the slices of the series have {have_rows} × {have_columns}"
            )
        elif (n := slices.find(raster.slice)) is None:
            left_out["on no slice of the series"] += 1
        else:
            parts[n].rasters.append((raster, None))
    for n, sampled in oblique_planes.sampled(oblique, slices.oblique):
        parts[n].rasters.append((sampled, None))
    for n, found in candidates.items():
        nearest = min(abs(c.distance) for c in found)
        plane = next(c.distance for c in found if abs(c.distance) == nearest)
        for c in found:
            if abs(c.distance - plane) > slices.plane_layers:
                left_out["between slices, with others nearer to them"] += 1
            elif c.contour is not None and c.points is not None:
                _add(parts[n], c.contour, c.points)
            elif c.raster is not None:
                parts[n].rasters.append((c.raster, c.to_plane))
    name = printable(structure.name)
    kind = "frame" if structure.rasters else "contour"
    notes = [f"{name}: {format_count(count, kind)} left out: {why}" for why, count in left_out.items()]
    notes += [f"{name}: {note}" for note in _group_outlines(parts.values(), slices.matrix)]
    if parts and not structure.rasters:
        gaps = max(parts) - min(parts) + 1 - len(parts)
        notes += [f"{name}: no contour on {format_count(gaps, 'slice')} between its first and its last"] if gaps else []
    return PlacedStructure(structure.name, source, dict(parts), len(structure.contours)), notes


def _group_outlines(parts: Iterable[_SlicePart], matrix: tuple[int, int]) -> list[str]:
    """Sort the outlines of each part by overlap; return notes on repeated and united outlines and on holes."""
    repeated = holes = united = slices = 0
    for part in parts:
        groups = grouped(part.ungrouped, matrix)
        part.outlines += groups.alone
        part.united = groups.united
        part.ungrouped = []
        repeated, holes = repeated + groups.repeated, holes + groups.holes
        united, slices = united + sum(map(len, groups.united)), slices + bool(groups.united)
    notes = []
    if repeated:
        notes.append(f"{format_count(repeated, 'outline')} left out: the same as another, point by point")
    if united:
        notes.append(
            f"{format_count(united, 'outline')} on {format_count(slices, 'slice')} united: they overlap in part"
        )
    if holes:
        notes.append(f"{format_count(holes, 'outline')} inside others taken as {'hole' if holes == 1 else 'holes'}")
    return notes


def _add(part: _SlicePart, contour: Contour, points: NDArray[np.float64]) -> None:
    by_rule = {"xor": part.outlines, "even-odd": part.ungrouped, "inside": part.insides, "hole": part.holes}
    by_rule[contour.rule].append(points)


def _in_pixels(contour: Contour, slices: SeriesSlices) -> NDArray[np.float64]:
    """Return the points of a contour in the frame "pixel" or "corner" as (column, row)."""
    points = contour.points
    if contour.frame == "corner":
        # Files have four decimals of a millimetre. Rounding restores exact pixel corners, so that rounding errors do
        # not decide on which side of a pixel centre an outline passes.
        points = np.rint(points / np.array(slices.spacing_mm[:0:-1]) * SUBPIXELS) / SUBPIXELS - 0.5
    rows, columns = slices.matrix
    low, high = points.min(axis=0), points.max(axis=0)
    if (
        (high < -1).any()
        or (low > (columns, rows)).any()
        or (contour.rule in ("inside", "hole") and ((low < -1).any() or (high > (columns, rows)).any()))
    ):
        raise SegmentationError(
            f"a contour extends from column {low[0]:.6g}, row {low[1]:.6g} to {high[0]:.6g}, {high[1]:.6g}, but slices "
            f"have {columns} columns and {rows} rows: is it in other units (--units px|mm|cm), or of another series?"
        )
    return points


def _match_contours(
    contours: list[Contour], slices: SeriesSlices, candidates: dict[int, list[_Candidate]], left_out: Counter[str]
) -> None:
    """Add contours in patient coordinates to the candidates of the slices on which they lie."""
    if not contours:
        return
    ends = np.cumsum([len(c.points) for c in contours])
    starts = ends - [len(c.points) for c in contours]
    index = np.concatenate([c.points for c in contours]) @ slices.to_index[:3, :3].T + slices.to_index[:3, 3]
    lowest, highest = (at.reduceat(index[:, 0], starts) for at in (np.minimum, np.maximum))
    layers = (lowest + highest) / 2
    in_plane = index[:, :0:-1]
    nearest = slices.nearest(layers).tolist()
    across = (highest - lowest > 2 * HALF_LAYER).tolist()
    for contour, start, end, n, is_across, layer in zip(contours, starts, ends, nearest, across, layers, strict=True):
        if is_across:
            left_out["across slices, not in their plane"] += 1
        elif n < 0:
            left_out["on no slice of the series"] += 1
        else:
            points = in_plane[start:end] - slices.shift[n, ::-1]
            candidates[n].append(_Candidate(float(layer - slices.along[n]), contour, points, None, None))


def _is_parallel(raster: Raster, slices: SeriesSlices) -> bool:
    """Return whether the plane of a raster is parallel to the slices, within `PARALLEL_LAYERS`."""
    assert raster.geometry is not None  # noqa: S101 - the caller passes only rasters with a geometry
    rise = np.abs((slices.to_index @ raster.geometry.affine)[0, 1:3])
    return bool(rise @ np.array(raster.geometry.shape[1:]) <= PARALLEL_LAYERS)


def _box_layers(raster: Raster, slices: SeriesSlices) -> NDArray[np.float64]:
    """Return the layers of the corners of the painted rectangle, from edge to edge and as thick as its plane."""
    assert raster.geometry is not None  # noqa: S101 - the caller passes only rasters with a geometry
    per_thickness, per_row, per_column, origin = (slices.to_index @ raster.geometry.affine)[0]
    below, above = (mm / raster.geometry.spacing_mm[0] for mm in raster.extent_mm)
    rows, columns = raster.mask.shape
    corners = [
        origin + per_thickness * depth + per_row * row + per_column * column
        for depth in (-below, above)
        for row in (raster.row - 0.5, raster.row + rows - 0.5)
        for column in (raster.column - 0.5, raster.column + columns - 0.5)
    ]
    return np.array(corners)


def _match_raster(
    raster: Raster, slices: SeriesSlices, candidates: dict[int, list[_Candidate]], left_out: Counter[str]
) -> None:
    """Add a plane that is parallel to the slices to the candidates of the slices it covers."""
    assert raster.geometry is not None  # noqa: S101 - the caller passes only rasters with a geometry
    to_index = slices.to_index @ raster.geometry.affine  # (0, row, column) of the plane to (k, j, i) of the grid
    rows, columns = raster.mask.shape
    middle = float(to_index[0] @ [0, raster.row + (rows - 1) / 2, raster.column + (columns - 1) / 2, 1])
    to_plane = np.linalg.inv(np.vstack([to_index[1:3, 1:], [0, 0, 1]]))
    # A plane thicker than a layer covers all slices within its thickness.
    half = HALF_LAYER * max(1.0, abs(float(to_index[0, 0])))
    n = slices.same_plane(middle)
    found = [n] if n is not None and _is_painted_on(raster, n, to_plane, slices) else slices.within(middle, half)
    if not found:
        left_out["on no slice of the series"] += 1
    for n in found:
        candidates[n].append(_Candidate(middle - slices.along[n], None, None, raster, to_plane @ _to_grid(slices, n)))


def _to_grid(slices: SeriesSlices, n: int) -> NDArray[np.float64]:
    """Return the matrix from (row, column, 1) of a slice to that of the grid."""
    matrix = np.eye(3)
    matrix[:2, 2] = slices.shift[n]
    return matrix


def _is_painted_on(raster: Raster, n: int, to_plane: NDArray[np.float64], slices: SeriesSlices) -> bool:
    """Return whether a plane was painted on slice `n`, in whose plane it lies, so that it covers that slice alone.

    The source image in the file decides. If the file names none and states no spacing of planes, the thickness is no
    evidence, because slices may overlap. Then a plane whose pixels coincide with the slice's was painted on it.
    """
    slab = raster.slab or Slab(0.0, 0.0)
    if slab.source_uid:
        return slices.is_image(n, slab.source_uid)
    if slab.is_known or not slices.has_named_images or raster.matrix != slices.matrix:
        return False
    difference = np.abs(to_plane @ _to_grid(slices, n) - np.eye(3))
    return bool(difference[:, :2].max() < ALIGNED_PX / max(slices.matrix) and difference[:, 2].max() < ALIGNED_PX)


def _bounds(raster: Raster, to_plane: NDArray[np.float64] | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the first (column, row) of a slice that a raster may cover, and the one past the last."""
    rows, columns = raster.mask.shape
    corners = np.array([[raster.row + r, raster.column + c, 1] for r in (-1, rows) for c in (-1, columns)], dtype=float)
    if to_plane is not None:
        corners = corners @ np.linalg.inv(to_plane).T
    return corners.min(axis=0)[1::-1], corners.max(axis=0)[1::-1] + 1


def _paint_raster(
    mask: NDArray[np.bool_], raster: Raster, to_plane: NDArray[np.float64] | None, corner: tuple[int, int]
) -> None:
    """Add to `mask`, which begins at `corner` (row, column) of a slice, the pixels whose centres a raster covers."""
    to_plane = np.eye(3) if to_plane is None else to_plane
    rounded = np.rint(to_plane)
    difference = np.abs(to_plane - rounded)
    largest = max(*raster.mask.shape, *mask.shape)
    if difference[:, :2].max() < ALIGNED_PX / largest and difference[:, 2].max() < ALIGNED_PX:
        to_plane = rounded
    j, i = (n + first for n, first in zip(np.indices(mask.shape), corner, strict=True))
    row, column = (
        np.floor(np.round(to_plane[axis, 0] * j + to_plane[axis, 1] * i + to_plane[axis, 2], 6) + 0.5).astype(int)
        - first
        for axis, first in enumerate((raster.row, raster.column))
    )
    inside = (row >= 0) & (row < raster.mask.shape[0]) & (column >= 0) & (column < raster.mask.shape[1])
    mask[inside] |= raster.mask[row[inside], column[inside]]
