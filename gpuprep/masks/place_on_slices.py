"""Places a segmentation on the slices of its series: finds the slice and the pixels of each part.

Outlines and painted pixels that lie in the patient are matched to slices by position: a slice takes what lies within
half a layer of it. If several planes of one structure do, because it was drawn on thinner slices, the nearest is taken.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import numbered, printable
from gpuprep.core.mask_options import Reading
from gpuprep.dicom.stack import Stack
from gpuprep.errors import SegmentationError
from gpuprep.masks import oblique_planes
from gpuprep.masks.model import Contour, Plane, Raster, Segmentation, Slab, Structure
from gpuprep.masks.overlapping_outlines import arranged
from gpuprep.masks.rasterize import filled, on_outline, united
from gpuprep.masks.series_slices import HALF_LAYER, SeriesSlices

CORNERS = 1024
"""Parts of a pixel to which coordinates are rounded that were written in millimetres and stood for pixels."""

WHOLE = 0.01
"""Pixels by which a painted plane may lie beside the pixels of a slice and still be copied, not sampled."""

PARALLEL = 0.1
"""Layers by which a painted plane may rise from corner to corner and still be parallel to the slices."""


@dataclass(slots=True)
class _Part:
    """What a structure has on one slice."""

    outlines: list[NDArray[np.float64]] = field(default_factory=list)
    """By parity; points as (column, row)."""
    nested: list[NDArray[np.float64]] = field(default_factory=list)
    """By parity too, but for those that overlap in part: only until it is known which do."""
    united: list[list[NDArray[np.float64]]] = field(default_factory=list)
    """Groups of outlines that overlap in part, each of which is an area like that of one outline."""
    insides: list[NDArray[np.float64]] = field(default_factory=list)
    holes: list[NDArray[np.float64]] = field(default_factory=list)
    rasters: list[tuple[Raster, NDArray[np.float64] | None]] = field(default_factory=list)
    """With the matrix from (row, column, 1) of the slice to those of the raster's plane; None where both are one."""


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A structure on the slices of its series."""

    name: str
    source: str
    """The file, for messages."""
    parts: dict[int, _Part]
    """By slice of the stack."""
    contours: int

    def renamed(self, name: str) -> Placed:
        """Return the same structure under another name."""
        return replace(self, name=name)

    def paint(self, n: int, shape: tuple[int, int]) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
        """Return a rectangle of slice `n`, as slices of rows and columns, and its pixels that belong to the structure.

        Outside of it, none does.
        """
        part = self.parts[n]
        low, high = np.array(shape[::-1], dtype=np.float64), np.zeros(2)
        if part.outlines or part.united or part.insides:
            points = np.concatenate([*part.outlines, *chain.from_iterable(part.united), *part.insides])
            low, high = np.minimum(low, points.min(axis=0)), np.maximum(high, points.max(axis=0) + 1)
        for raster, to_plane in part.rasters:
            first, stop = _reach(raster, to_plane)
            low, high = np.minimum(low, first), np.maximum(high, stop)
        left, top = np.clip(np.floor(low), 0, shape[::-1]).astype(int).tolist()
        right, bottom = np.clip(np.ceil(high), (left, top), np.maximum((left, top), shape[::-1])).astype(int).tolist()
        size, corner = (bottom - top, right - left), np.array([left, top])
        mask = filled([polygon - corner for polygon in part.outlines], size)
        for group in part.united:
            mask ^= united([polygon - corner for polygon in group], size)
        for polygon in part.insides:
            mask |= filled([polygon - corner], size) & ~on_outline(polygon - corner, size)
        for raster, to_plane in part.rasters:
            _paint_raster(mask, raster, to_plane, (top, left))
        for polygon in part.holes:
            mask &= ~(filled([polygon - corner], size) | on_outline(polygon - corner, size))
        return (slice(top, bottom), slice(left, right)), mask


def plane_of(stack: Stack) -> Plane:
    """Return what readers have to know of the slices of a stack."""
    rows, columns = stack.matrix
    _, between_rows, between_columns = stack.geometry.spacing_mm
    return Plane(rows, columns, (between_rows, between_columns))


def place(segmentation: Segmentation, stack: Stack, reading: Reading) -> tuple[list[Placed], list[str]]:
    """Return the structures of a segmentation on the slices of a stack, and what was left out of them and why.

    Parameters
    ----------
    segmentation : Segmentation
        From `gpuprep.masks.read.read_segmentation`.
    stack : Stack
        Of the series.
    reading : Reading
        What people say about slice numbers.

    Raises
    ------
    SegmentationError
        If it is not clear which slices are meant, or pixels do not fit into them.
    """
    slices = SeriesSlices(segmentation, stack, reading)
    placed = []
    notes = list(segmentation.notes)
    for structure in segmentation.structures:
        if not structure.contours and not structure.rasters:
            notes.append(f"{printable(structure.name)}: it is empty")
            continue
        one, more = _placed(structure, slices, segmentation.path)
        placed.append(one)
        notes += more
    return placed, notes


@dataclass(slots=True)
class _Candidate:
    """A contour or raster in the patient, and how far it lies from a slice."""

    distance: float
    contour: Contour | None
    points: NDArray[np.float64] | None
    raster: Raster | None
    to_plane: NDArray[np.float64] | None


def _placed(structure: Structure, slices: SeriesSlices, source: str) -> tuple[Placed, list[str]]:
    """Return a structure on its slices, and what of it was left out."""
    parts: dict[int, _Part] = defaultdict(_Part)
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
    slanting: list[Raster] = []
    for raster in structure.rasters:
        if raster.geometry is not None and _is_parallel(raster, slices):
            _match_raster(raster, slices, candidates, left_out)
        elif raster.geometry is not None and not slices.are_between(_layers(raster, slices)):
            left_out["on no slice of the series"] += 1
        elif raster.geometry is not None:
            slanting.append(raster)
        elif raster.matrix is not None and raster.matrix != slices.matrix:
            (rows, columns), (have_rows, have_columns) = raster.matrix, slices.matrix
            raise SegmentationError(
                f"it has {rows} × {columns} pixels, the slices of the series have {have_rows} × {have_columns}"
            )
        elif (n := slices.find(raster.slice)) is None:
            left_out["on no slice of the series"] += 1
        else:
            parts[n].rasters.append((raster, None))
    for n, cut in oblique_planes.cut(slanting, slices.oblique):
        parts[n].rasters.append((cut, None))
    for n, found in candidates.items():
        nearest = min(abs(c.distance) for c in found)
        same = slices.plane_layers
        plane = next(c.distance for c in found if abs(c.distance) == nearest)
        for c in found:
            if abs(c.distance - plane) > same:
                left_out["between slices, with others nearer to them"] += 1
            elif c.contour is not None and c.points is not None:
                _add(parts[n], c.contour, c.points)
            elif c.raster is not None:
                parts[n].rasters.append((c.raster, c.to_plane))
    name = printable(structure.name)
    kind = "frame" if structure.rasters else "contour"
    notes = [f"{name}: {numbered(count, kind)} left out: {why}" for why, count in left_out.items()]
    notes += [f"{name}: {note}" for note in _untangled(parts.values(), slices.matrix)]
    if parts and not structure.rasters:
        between = max(parts) - min(parts) + 1 - len(parts)
        notes += (
            [f"{name}: no contour on {numbered(between, 'slice')} between its first and its last"] if between else []
        )
    return Placed(structure.name, source, dict(parts), len(structure.contours)), notes


def _untangled(parts: Iterable[_Part], matrix: tuple[int, int]) -> list[str]:
    """Sort the outlines of each part by how they overlap; return what there is to say about them."""
    repeated = holes = joint = slices = 0
    for part in parts:
        found = arranged(part.nested, matrix)
        part.outlines += found.alone
        part.united = found.united
        part.nested = []
        repeated, holes = repeated + found.repeated, holes + found.holes
        joint, slices = joint + sum(map(len, found.united)), slices + bool(found.united)
    notes = []
    if repeated:
        notes.append(f"{numbered(repeated, 'outline')} left out: the same as another, point by point")
    if joint:
        notes.append(f"{numbered(joint, 'outline')} on {numbered(slices, 'slice')} united: they overlap in part")
    if holes:
        notes.append(f"{numbered(holes, 'outline')} inside others taken as {'hole' if holes == 1 else 'holes'}")
    return notes


def _add(part: _Part, contour: Contour, points: NDArray[np.float64]) -> None:
    {"xor": part.outlines, "even-odd": part.nested, "inside": part.insides, "hole": part.holes}[contour.rule].append(
        points
    )


def _in_pixels(contour: Contour, slices: SeriesSlices) -> NDArray[np.float64]:
    """Return the points of a contour that knows its slice, as (column, row)."""
    points = contour.points
    if contour.frame == "corner":
        # Four decimals of a millimetre: corners of pixels have to be corners again, or what touches a centre is chance.
        points = np.rint(points / np.array(slices.spacing_mm[:0:-1]) * CORNERS) / CORNERS - 0.5
    rows, columns = slices.matrix
    low, high = points.min(axis=0), points.max(axis=0)
    if (
        (high < -1).any()
        or (low > (columns, rows)).any()
        or (contour.rule in ("inside", "hole") and ((low < -1).any() or (high > (columns, rows)).any()))
    ):
        raise SegmentationError(
            f"a contour reaches from column {low[0]:.6g}, row {low[1]:.6g} to {high[0]:.6g}, {high[1]:.6g}, but slices "
            f"have {columns} columns and {rows} rows: is it in other units (--units px|mm|cm), or of another series?"
        )
    return points


def _match_contours(
    contours: list[Contour], slices: SeriesSlices, candidates: dict[int, list[_Candidate]], left_out: Counter[str]
) -> None:
    """Add contours in the patient to the candidates of the slices on which they lie."""
    if not contours:
        return
    ends = np.cumsum([len(c.points) for c in contours])
    starts = ends - [len(c.points) for c in contours]
    index = np.concatenate([c.points for c in contours]) @ slices.to_index[:3, :3].T + slices.to_index[:3, 3]
    lowest, highest = (at.reduceat(index[:, 0], starts) for at in (np.minimum, np.maximum))
    layers = (lowest + highest) / 2
    in_plane = index[:, :0:-1]
    found = slices.nearest(layers).tolist()
    across = (highest - lowest > 2 * HALF_LAYER).tolist()
    for contour, start, end, n, is_across, layer in zip(contours, starts, ends, found, across, layers, strict=True):
        if is_across:
            left_out["across slices, not in their plane"] += 1
        elif n < 0:
            left_out["on no slice of the series"] += 1
        else:
            points = in_plane[start:end] - slices.shift[n, ::-1]
            candidates[n].append(_Candidate(float(layer - slices.along[n]), contour, points, None, None))


def _is_parallel(raster: Raster, slices: SeriesSlices) -> bool:
    """Whether the plane of a raster, from corner to corner, is parallel to the slices."""
    assert raster.geometry is not None  # noqa: S101 - only such rasters are asked about
    rise = np.abs((slices.to_index @ raster.geometry.affine)[0, 1:3])
    return bool(rise @ (np.array(raster.geometry.shape[1:]) - 1) <= PARALLEL)


def _layers(raster: Raster, slices: SeriesSlices) -> NDArray[np.float64]:
    """Return the layers in which the corners of the painted pixels of a plane lie, shape (4,)."""
    assert raster.geometry is not None  # noqa: S101 - only such rasters are asked about
    rows, columns = raster.mask.shape
    corners = [[0, raster.row + r, raster.column + c, 1] for r in (0, rows - 1) for c in (0, columns - 1)]
    return np.asarray((slices.to_index @ raster.geometry.affine)[0] @ np.array(corners, dtype=np.float64).T)


def _match_raster(
    raster: Raster, slices: SeriesSlices, candidates: dict[int, list[_Candidate]], left_out: Counter[str]
) -> None:
    """Add a plane that is parallel to the slices to the candidates of those it stands for."""
    assert raster.geometry is not None  # noqa: S101 - that is why it comes here
    to_index = slices.to_index @ raster.geometry.affine  # (0, row, column) of the plane to (k, j, i) of the grid
    middle = float(_layers(raster, slices).mean())
    to_plane = np.linalg.inv(np.vstack([to_index[1:3, 1:], [0, 0, 1]]))
    # A plane thicker than a layer stands for all slices in it.
    half = HALF_LAYER * max(1.0, abs(float(to_index[0, 0])))
    n = slices.same_plane(middle)
    found = [n] if n is not None and _is_painted_on(raster, n, to_plane, slices) else slices.within(middle, half)
    if not found:
        left_out["on no slice of the series"] += 1
    for n in found:
        candidates[n].append(_Candidate(middle - slices.along[n], None, None, raster, to_plane @ _moved(slices, n)))


def _moved(slices: SeriesSlices, n: int) -> NDArray[np.float64]:
    """Return the matrix from (row, column, 1) of a slice to those of the grid."""
    moved = np.eye(3)
    moved[:2, 2] = slices.shift[n]
    return moved


def _is_painted_on(raster: Raster, n: int, to_plane: NDArray[np.float64], slices: SeriesSlices) -> bool:
    """Whether a plane was painted on the slice in whose plane it lies, so that it stands for that slice alone.

    The file says so, by the image it was made from. If it names none, and does not say how far its planes are apart,
    thickness says nothing, because slices may overlap: then a plane on the very pixels of a slice was painted on it.
    """
    slab = raster.slab or Slab(0.0, 0.0)
    if slab.source_uid:
        return slices.is_of(n, slab.source_uid)
    if slab.is_known or not slices.are_named or raster.matrix != slices.matrix:
        return False
    away = np.abs(to_plane @ _moved(slices, n) - np.eye(3))
    return bool(away[:, :2].max() < WHOLE / max(slices.matrix) and away[:, 2].max() < WHOLE)


def _reach(raster: Raster, to_plane: NDArray[np.float64] | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return between which (column, row) of a slice, the second past the end, the painted pixels of a plane may lie."""
    rows, columns = raster.mask.shape
    corners = np.array([[raster.row + r, raster.column + c, 1] for r in (-1, rows) for c in (-1, columns)], dtype=float)
    if to_plane is not None:
        corners = corners @ np.linalg.inv(to_plane).T
    return corners.min(axis=0)[1::-1], corners.max(axis=0)[1::-1] + 1


def _paint_raster(
    mask: NDArray[np.bool_], raster: Raster, to_plane: NDArray[np.float64] | None, corner: tuple[int, int]
) -> None:
    """Add the painted pixels of a plane to those of a slice from `corner` on, whose centres are looked up in it."""
    to_plane = np.eye(3) if to_plane is None else to_plane
    whole = np.rint(to_plane)
    away = np.abs(to_plane - whole)
    if away[:, :2].max() < WHOLE / max(*raster.mask.shape, *mask.shape) and away[:, 2].max() < WHOLE:
        to_plane = whole
    j, i = (n + first for n, first in zip(np.indices(mask.shape), corner, strict=True))
    row, column = (
        np.floor(np.round(to_plane[axis, 0] * j + to_plane[axis, 1] * i + to_plane[axis, 2], 6) + 0.5).astype(int)
        - first
        for axis, first in enumerate((raster.row, raster.column))
    )
    inside = (row >= 0) & (row < raster.mask.shape[0]) & (column >= 0) & (column < raster.mask.shape[1])
    mask[inside] |= raster.mask[row[inside], column[inside]]
