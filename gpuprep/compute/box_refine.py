"""Refines the box of an object that was found in coarse HU to single voxels of the source grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute.box_faces import Shell, depths
from gpuprep.compute.coarse_hu import STEP
from gpuprep.compute.plane_masks import Mask
from gpuprep.core.geometry import IndexBox
from gpuprep.core.hounsfield import LOWEST_HU
from gpuprep.core.volume import StoredVolume

OUTER_CELLS = 2
"""Cells (of four pixels) outside the outermost sample of an object that it may reach into: what the search missed or
removed as too thin."""

PLATE_SIDE_MM = 45.0
"""Distance beside the object in which a table is looked for."""


@dataclass(frozen=True, slots=True)
class Look:
    """Definition of the voxels of an object."""

    air: bool
    """Whether the object is lighter than its surroundings (lung) or denser (body)."""
    edge_hu: float
    """Half-way between object and surroundings."""
    faint_hu: float
    """HU of a voxel with a fifth of the object in it."""
    reach_mm: float
    """Length along the slice axis that the search may have removed at an end, in mm; at least one slice."""
    support_mm: float
    """Smallest width of the object in mm."""
    table_mm: float
    """Largest thickness of a table in mm; 0 if none can touch the object. The object is thicker everywhere."""

    def inner_cells(self, cell_mm: float) -> int:
        """Return the number of cells inside the outermost sample of an object that are examined.

        They hold a table that touches the object, and the gap that opens beside the contact.
        """
        return int(self.table_mm / cell_mm) + 2


@dataclass(frozen=True, slots=True)
class Refined:
    """A box, and where it ends at the border of the field of view."""

    box: IndexBox
    """Box on the regular grid of the stack."""
    cut: tuple[str, ...]
    """Borders of the slices that it touches: "first row", "last row", "first column", "last column"."""


def refine(
    volume: StoredVolume, coarse: NDArray[np.int16], found: Mask, look: Look, *, table_axes: tuple[int, ...]
) -> Refined:
    """Return the box of an object.

    Parameters
    ----------
    volume : StoredVolume
        Stacked series.
    coarse : array of int16, shape (slices, rows / 4, columns / 4)
        Its coarse HU.
    found : array of bool, same shape
        Samples that belong to the object.
    look : Look
        Definition of its voxels.
    table_axes : tuple of int
        Axes (0: slices, 1: rows, 2: columns) along which a table may touch the object.
    """
    search = _Search(volume, found, look, table_axes)
    first, last = (search.along_slices(coarse, side) for side in (-1, 1))
    placement = volume.placement
    if placement is not None:
        first, last = math.floor(placement.along[first] + 1e-6), math.ceil(placement.along[last] - 1e-6)
    start, stop, cut = [first], [last + 1], []
    for axis, name in ((1, "row"), (2, "column")):
        lines = np.asarray(found.any(axis=3 - axis))
        faces = []
        for side, which in ((-1, "first"), (1, "last")):
            face, touches = search.in_plane(axis, side, lines)
            faces.append(face)
            if touches:
                cut.append(f"{which} {name}")
        if faces[0] > faces[1]:  # the object has gaps in it, beside which both faces are: all samples are kept
            faces += search.sampled(axis, lines)
        start.append(min(faces))
        stop.append(max(faces) + 1)
    shape = volume.geometry.shape
    low = [max(0, n) for n in start]
    high = [min(n, size) for n, size in zip(stop, shape, strict=True)]
    return Refined(IndexBox((low[0], low[1], low[2]), (high[0], high[1], high[2])), tuple(cut))


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """Search for the faces of an object; fields as the arguments of `refine`."""

    volume: StoredVolume
    found: Mask
    look: Look
    table_axes: tuple[int, ...]

    def along_slices(self, coarse: NDArray[np.int16], side: int) -> int:
        """Return the first (side −1) or last (1) slice of an object."""
        slices = np.flatnonzero(self.found.any(axis=(1, 2)))
        end = int(slices[0] if side < 0 else slices[-1])
        spacing_mm = self.volume.geometry.spacing_mm[0]
        reach = max(1, int(self.look.reach_mm / spacing_mm))
        plate = self._plate(0)
        if not plate:
            return self._tip(end, side, reach)
        inner = min(self.look.inner_cells(spacing_mm), len(slices) - 1)
        planes = end + side * np.arange(-inner, reach + plate + 3)
        planes = planes[(planes >= 0) & (planes < len(coarse))]
        turn = (0, 2, 1) if self._lateral(0) == 1 else (0, 1, 2)
        shell = Shell(
            dense=coarse[planes].transpose(turn) > self.look.edge_hu,
            seeds=_innermost(self.found[planes[: inner + 1]].transpose(turn)),
            step=1,
            limit=min(len(planes), inner + 1 + reach),
            support=1,
            plate=plate,
        )
        return int(planes[max(0, depths(shell)[0].max())])

    def _tip(self, end: int, side: int, reach: int) -> int:
        """Return the slice up to which an object continues, voxel by voxel, beyond its last samples."""
        rows, columns = (np.flatnonzero(self.found[end].any(axis=a)) for a in (1, 0))
        own = self.found[end, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        own = own.repeat(STEP, axis=0).repeat(STEP, axis=1)
        corner = rows[0] * STEP, columns[0] * STEP
        for k in range(end, end + side * (reach + 1), side):
            if not 0 <= k < len(self.found):
                break
            values = self.volume.stored[k, corner[0] : corner[0] + own.shape[0], corner[1] : corner[1] + own.shape[1]]
            dense = _belongs(self.volume, np.array([k]), values[None], self.look, self.look.edge_hu)
            own = own[: dense.shape[1], : dense.shape[2]] & dense[0]
            if not own.any():
                break
            end = k
        return end

    def in_plane(self, axis: int, side: int, lines: Mask) -> tuple[int, bool]:
        """Return the outermost row (axis 1) or column (2) of an object on one side, and whether it ends a slice.

        `lines` tells which rows or columns of samples of each slice belong to the object.
        """
        spacing_mm = self.volume.geometry.spacing_mm
        count = lines.shape[1]
        outer = np.where(side > 0, count - 1 - lines[:, ::-1].argmax(axis=1), lines.argmax(axis=1))
        shift = self._shift(axis)
        position = side * (outer * STEP + shift)
        present = lines.any(axis=1)
        extreme = position[present].max()
        inner = self.look.inner_cells(spacing_mm[axis] * STEP)
        slices = np.flatnonzero(present & (position >= extreme - inner * STEP))
        across_slices = self._lateral(axis) == 0
        if across_slices:
            more = round(PLATE_SIDE_MM / spacing_mm[0])
            slices = np.arange(max(0, slices[0] - more), min(len(lines), slices[-1] + more + 1))
        # The window begins at a sample, `inner` cells inside the outermost one, in every slice.
        anchor = np.floor((side * extreme - shift[slices]) / STEP + 1e-6) - side * inner
        first = np.clip(anchor, 0, count - 1).astype(int) * STEP
        limit = (inner + OUTER_CELLS) * STEP
        plate = self._plate(axis)
        planes = limit + (plate + 3 if plate else 1)
        dense, seeds, lateral = self._shell(axis, side, slices, first, planes, inner + 1)
        if across_slices:
            dense, seeds = dense.transpose(0, 2, 1), seeds.transpose(0, 2, 1)
        support = max(1, round(self.look.support_mm / spacing_mm[self._lateral(axis)]))
        far, table = depths(Shell(dense, seeds, step=STEP, limit=limit, support=support, plate=plate))
        if across_slices:
            far, table = far.T, table.T
        face = first[:, None] + side * far
        on_canvas = np.where(far >= 0, side * (face + shift[slices][:, None]), -np.inf)
        best = float(on_canvas.max())
        if best == -np.inf:  # much noise: none of these samples is as wide as the object, so they are kept
            return side * math.ceil(extreme + STEP - 1 - 1e-6), False
        line, voxel = np.nonzero((on_canvas > best - 1) & ~table & (far < limit - 1))
        faint = self._is_faint(axis, slices[line], face[line, voxel] + side, lateral + voxel)
        best = max(best, float((on_canvas[line, voxel][faint] + 1).max(initial=best)))
        touches = face[on_canvas > best - 1] == (self.volume.stored.shape[axis] - 1 if side > 0 else 0)
        return side * math.ceil(best - 1e-6), bool(touches.any())

    def _is_faint(
        self, axis: int, slices: NDArray[np.intp], position: NDArray[np.intp], lateral: NDArray[np.intp]
    ) -> Mask:
        """Return which pixels hold a smaller fraction of the object; none does outside a slice."""
        size = self.volume.stored.shape[axis]
        inside: Mask = (position >= 0) & (position < size)
        clipped = np.clip(position, 0, size - 1)
        rows, columns = (clipped, lateral) if axis == 1 else (lateral, clipped)
        values = self.volume.stored[slices, rows, columns][:, None, None]
        if not len(values):
            return inside
        return inside & _belongs(self.volume, slices, values, self.look, self.look.faint_hu)[:, 0, 0]

    def sampled(self, axis: int, lines: Mask) -> tuple[int, int]:
        """Return the first and last row or column with a sample of the object."""
        slices, cells = np.nonzero(lines)
        position = cells * STEP + self._shift(axis)[slices]
        return math.floor(position.min()), math.ceil(position.max())

    def _plate(self, axis: int) -> int:
        """Return the largest thickness of a table in voxels along an axis; 0 if there is none."""
        return math.ceil(self.look.table_mm / self.volume.geometry.spacing_mm[axis]) if axis in self.table_axes else 0

    def _lateral(self, axis: int) -> int:
        """Return the axis of the axial plane across the given one, along which a table is seen beside the back."""
        if axis in self.table_axes:
            return sum(self.table_axes) - axis
        return 3 - axis if axis else 2

    def _shift(self, axis: int) -> NDArray[np.float64]:
        """Return the position of the first row or column of each slice in the regular grid."""
        placement = self.volume.placement
        if placement is None or placement.shift is None:
            return np.zeros(len(self.found))
        shift: NDArray[np.float64] = placement.shift[:, axis - 1]
        return shift

    def _shell(
        self, axis: int, side: int, slices: NDArray[np.int64], first: NDArray[np.int64], count: int, sampled: int
    ) -> tuple[Mask, Mask, int]:
        """Return voxels of `count` rows or columns outward from `first` in each slice, seeds, and where lines begin.

        The masks have shape (planes, slices, voxels of a line); beyond the border of a slice there is nothing.
        """
        stored = self.volume.stored
        size, lateral_size = stored.shape[axis], stored.shape[3 - axis]
        lines = self.found[slices] if axis == 1 else self.found[slices].transpose(0, 2, 1)
        cell = first[:, None] // STEP + side * np.arange(sampled)
        valid = (cell >= 0) & (cell < lines.shape[1])
        samples = lines[np.arange(len(slices))[:, None], np.clip(cell, 0, lines.shape[1] - 1)] & valid[:, :, None]
        used = np.flatnonzero(samples.any(axis=(0, 1)))
        more = math.ceil(PLATE_SIDE_MM / (STEP * self.volume.geometry.spacing_mm[3 - axis])) if self._plate(axis) else 0
        low = max(0, int(used[0]) - more - OUTER_CELLS)
        high = min(lines.shape[2], int(used[-1]) + 1 + more + OUTER_CELLS)
        lateral = slice(low * STEP, min(high * STEP, lateral_size))
        width = lateral.stop - lateral.start
        seeds = np.zeros((sampled, len(slices), width), dtype=bool)
        planes = samples[:, :, low:high].transpose(1, 0, 2)
        seeds[:, :, ::STEP] = _innermost(planes) if self._plate(axis) else planes
        dense = np.zeros((len(slices), count, width), dtype=bool)
        for pixel in np.unique(first):
            own = np.flatnonzero(first == pixel)
            inside = min(count, size - pixel if side > 0 else pixel + 1)
            rows = slice(pixel, pixel + inside) if side > 0 else slice(pixel - inside + 1, pixel + 1)
            if axis == 1:
                values = stored[slices[own], rows, lateral]
            else:
                values = stored[slices[own], lateral, rows].transpose(0, 2, 1)
            dense[own, :inside] = _belongs(self.volume, slices[own], values[:, ::side], self.look, self.look.edge_hu)
        return np.ascontiguousarray(dense.transpose(1, 0, 2)), seeds, lateral.start


def _innermost(planes: Mask) -> Mask:
    """Return the samples that are not in the plane before: what is outside them may be a table."""
    first = planes.copy()
    first[1:] &= ~planes[:-1]
    return first


def _belongs(volume: StoredVolume, slices: NDArray[np.int64], values: NDArray[Any], look: Look, edge_hu: float) -> Mask:
    """Return which stored values are on the object's side of a CT number; padding is not."""
    above = _above(volume, slices, values, edge_hu)
    if look.air:
        above = ~above & _above(volume, slices, values, math.nextafter(LOWEST_HU, -math.inf))
    if volume.padding is not None:
        low, high = (volume.padding[slices, n][:, None, None] for n in (0, 1))
        above &= (values < low) | (values > high)
    return above


def _above(volume: StoredVolume, slices: NDArray[np.int64], values: NDArray[Any], hu: float) -> Mask:
    """Return which stored values are above a CT number, compared as integers."""
    slope = volume.slope[slices]
    edge = (hu - volume.intercept[slices]) / slope
    negative = slope < 0
    highest_below = np.where(negative, np.ceil(edge) - 1, np.floor(edge)).astype(np.int64)
    same = (highest_below == highest_below[0]).all()
    above: Mask = values > (int(highest_below[0]) if same else highest_below[:, None, None])
    return above ^ negative[:, None, None] if negative.any() else above
