"""Samples painted planes that are not parallel to the slices of a series, in three dimensions.

The planes of one orientation form a volume, in which each plane extends half-way to its neighbours. A voxel of a slice
belongs to the structure if its centre lies in a painted pixel of that volume.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuprep.masks.model import ONE_PLANE_MM, Raster, bounding_raster

DECIMALS = 6
"""Decimals to which positions in mm and pixels are rounded, so that a point half-way between two pixels is not assigned
by rounding errors."""


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """Positions of the slices of a series in its grid."""

    affine: NDArray[np.float64]
    """Matrix from (layer, row, column, 1) to (x, y, z, 1) in mm, shape (4, 4)."""
    along: NDArray[np.float64]
    """Layer of each slice, shape (n,)."""
    shift: NDArray[np.float64]
    """(row, column) of the first voxel of each slice, shape (n, 2)."""
    matrix: tuple[int, int]
    """Rows and columns."""


def sampled(rasters: Sequence[Raster], slices: Slices) -> Iterator[tuple[int, Raster]]:
    """Yield the index of each slice that painted planes intersect, with its painted pixels.

    Parameters
    ----------
    rasters : sequence of Raster
        Planes of one structure, of any orientations, each with its geometry.
    slices : Slices
        Slices of the series.
    """
    for volume in _volumes(rasters):
        sampler = _Sampler(volume, slices)
        for n in range(len(slices.along)):
            if (raster := sampler.on_slice(n)) is not None:
                yield n, raster


@dataclass(frozen=True, slots=True, eq=False)
class _Volume:
    """Planes of one orientation and pixel spacing at different offsets, in ascending order of offsets."""

    axes: NDArray[np.float64]
    """Columns: unit normal, step to the next row, step to the next column, in mm; shape (3, 3)."""
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    """Offsets along the normal, in mm, at which each plane begins and ends, shape (n,)."""
    first: NDArray[np.float64]
    """(row, column) along `axes` of the first pixel of the rectangle of each plane, counted from the patient's origin,
    shape (n, 2)."""
    shapes: NDArray[np.int64]
    """Rows and columns of the rectangle of painted pixels of each plane, shape (n, 2)."""
    starts: NDArray[np.int64]
    """Index in `pixels` at which the rectangle of each plane begins, shape (n,)."""
    pixels: NDArray[np.bool_]
    """Pixels of all rectangles, one rectangle after the other."""


def _volumes(rasters: Sequence[Raster]) -> Iterator[_Volume]:
    """Yield the volumes that planes form. Planes at the same offset go into different volumes."""
    by_orientation: dict[bytes, list[tuple[float, Raster]]] = defaultdict(list)
    for raster in rasters:
        assert raster.geometry is not None  # noqa: S101 - the caller passes only planes with a geometry
        affine = raster.geometry.affine
        offset_mm = float(affine[:3, 3] @ affine[:3, 0]) / raster.geometry.spacing_mm[0]
        by_orientation[(np.round(affine[:3, 1:3], DECIMALS) + 0.0).tobytes()].append((offset_mm, raster))
    for planes in by_orientation.values():
        planes.sort(key=lambda pair: pair[0])
        volumes: list[list[tuple[float, Raster]]] = []
        for offset_mm, raster in planes:
            free = (volume for volume in volumes if offset_mm - volume[-1][0] > ONE_PLANE_MM)
            volume = next(free, None)
            if volume is None:
                volumes.append(volume := [])
            volume.append((offset_mm, raster))
        yield from map(_volume, volumes)


def _volume(planes: Sequence[tuple[float, Raster]]) -> _Volume:
    geometries = [raster.geometry for _, raster in planes if raster.geometry is not None]
    axes = geometries[0].affine[:3, :3] / (geometries[0].spacing_mm[0], 1, 1)
    origins = np.array([geometry.affine[:3, 3] for geometry in geometries])
    offsets = np.array([offset_mm for offset_mm, _ in planes])
    extents = np.array([raster.extent_mm for _, raster in planes])
    sizes = [raster.mask.size for _, raster in planes]
    return _Volume(
        axes,
        np.round(offsets - extents[:, 0], DECIMALS),
        np.round(offsets + extents[:, 1], DECIMALS),
        (origins @ np.linalg.inv(axes).T)[:, 1:] + [(raster.row, raster.column) for _, raster in planes],
        np.array([raster.mask.shape for _, raster in planes]),
        np.cumsum([0, *sizes[:-1]], dtype=np.int64),
        np.concatenate([raster.mask.reshape(-1) for _, raster in planes]),
    )


class _Sampler:
    """Looks up the voxels of slices in a volume."""

    def __init__(self, volume: _Volume, slices: Slices) -> None:
        self._volume = volume
        self._slices = slices
        to_axes = np.linalg.inv(volume.axes)
        self._matrix, self._origin = to_axes @ slices.affine[:3, :3], to_axes @ slices.affine[:3, 3]
        # Bounds of each plane, a box as thick as the plane, in layers, rows and columns of the series.
        thickness = np.stack([volume.lower, volume.upper], axis=1)
        edges = np.stack([volume.first - 0.5, volume.first + volume.shapes - 0.5], axis=1)
        corners = np.array(
            [[thickness[:, a], edges[:, b, 0], edges[:, c, 1]] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
        )
        index = np.linalg.inv(self._matrix) @ (corners - self._origin[:, None])
        self._low, self._high = index.min(axis=0), index.max(axis=0)

    def on_slice(self, n: int) -> Raster | None:
        """Return the painted pixels on a slice; None if there are none."""
        along, shift = self._slices.along[n], self._slices.shift[n]
        crosses = (self._low[0] <= along + 1e-6) & (along - 1e-6 <= self._high[0])
        if not crosses.any():
            return None
        low, high = self._low[1:, crosses].min(axis=1) - shift, self._high[1:, crosses].max(axis=1) - shift
        top, left = (max(0, int(np.ceil(v - 1e-6))) for v in low)
        bottom, right = (
            min(size, int(np.floor(v + 1e-6)) + 1) for v, size in zip(high, self._slices.matrix, strict=True)
        )
        if bottom <= top or right <= left:
            return None
        rows, columns = np.arange(top, bottom)[:, None] + shift[0], np.arange(left, right) + shift[1]
        offset, row, column = (
            np.round(origin + step[0] * along + step[1] * rows + step[2] * columns, DECIMALS)
            for origin, step in zip(self._origin, self._matrix, strict=True)
        )
        part = bounding_raster(self._is_painted(offset, row, column))
        if part is None:
            return None
        return Raster(part.mask, part.row + top, part.column + left, self._slices.matrix)

    def _is_painted(
        self, offset: NDArray[np.float64], row: NDArray[np.float64], column: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Return whether points, in the axes of the volume, lie in painted pixels."""
        volume = self._volume
        # A plane includes its upper end but not its lower one, so a point half-way belongs to the lower of two planes.
        plane = np.searchsorted(volume.upper, offset)
        inside = plane < len(volume.upper)
        plane[~inside] = 0
        inside &= offset > volume.lower[plane]
        # A pixel includes its left and its upper edge, as in planes that are parallel to the slices.
        down, right = (
            np.floor(np.round(at - volume.first[plane, axis], DECIMALS) + 0.5).astype(np.int64)
            for axis, at in enumerate((row, column))
        )
        rows, columns = volume.shapes[plane, 0], volume.shapes[plane, 1]
        inside &= (down >= 0) & (down < rows) & (right >= 0) & (right < columns)
        at = np.where(inside, volume.starts[plane] + down * columns + right, 0)
        return inside & volume.pixels[at]
