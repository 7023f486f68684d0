"""Samples painted planes that are not parallel to the slices of a series, in three dimensions.

The planes of one orientation are a volume, in which each plane reaches half-way to its neighbours. A voxel of a slice
belongs to the structure if its centre lies in a painted pixel of that volume.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuprep.masks.model import ONE_PLANE_MM, Raster, painted

DECIMALS = 6
"""Of millimetres and pixels, to which places are rounded, so that noise decides nothing half-way between two."""


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """The slices of a series."""

    affine: NDArray[np.float64]
    """From (layer, row, column, 1) to (x, y, z, 1) in mm, shape (4, 4)."""
    along: NDArray[np.float64]
    """Layer of each slice, shape (n,)."""
    shift: NDArray[np.float64]
    """(row, column) of the first voxel of each slice, shape (n, 2)."""
    matrix: tuple[int, int]
    """Rows and columns."""


def cut(rasters: Sequence[Raster], slices: Slices) -> Iterator[tuple[int, Raster]]:
    """Yield the painted pixels that some planes leave on slices, each with the index of the slice.

    Parameters
    ----------
    rasters : sequence of Raster
        Of one structure; of any orientations, each with its geometry.
    slices : Slices
        Of the series.
    """
    for volume in _volumes(rasters):
        where = _Where(volume, slices)
        for n in range(len(slices.along)):
            if (raster := where.on_slice(n)) is not None:
                yield n, raster


@dataclass(frozen=True, slots=True, eq=False)
class _Volume:
    """Planes of one orientation and pixel spacing, no two at the same place, in the order of their offsets."""

    axes: NDArray[np.float64]
    """Columns: the normal, and what leads to the next row and to the next column, in mm; shape (3, 3)."""
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    """Along the normal, in mm, where each plane begins and ends, shape (n,)."""
    first: NDArray[np.float64]
    """(row, column) along the axes of the first painted pixel of each plane, counted from the patient's origin, shape
    (n, 2)."""
    shapes: NDArray[np.int64]
    """Rows and columns of the rectangle that is painted in each plane, shape (n, 2)."""
    starts: NDArray[np.int64]
    """Where the rectangle of each plane begins in `pixels`, shape (n,)."""
    pixels: NDArray[np.bool_]
    """Of all rectangles, one after the other."""


def _volumes(rasters: Sequence[Raster]) -> Iterator[_Volume]:
    """Yield the volumes that planes form."""
    alike: dict[bytes, list[tuple[float, Raster]]] = defaultdict(list)
    for raster in rasters:
        assert raster.geometry is not None  # noqa: S101 - planes without are matched by other means
        affine = raster.geometry.affine
        offset_mm = float(affine[:3, 3] @ affine[:3, 0]) / raster.geometry.spacing_mm[0]
        alike[(np.round(affine[:3, 1:3], DECIMALS) + 0.0).tobytes()].append((offset_mm, raster))
    for found in alike.values():
        found.sort(key=lambda pair: pair[0])
        layers: list[list[tuple[float, Raster]]] = []
        for offset_mm, raster in found:
            free = (layer for layer in layers if offset_mm - layer[-1][0] > ONE_PLANE_MM)
            layer = next(free, None)
            if layer is None:
                layers.append(layer := [])
            layer.append((offset_mm, raster))
        yield from map(_volume, layers)


def _volume(planes: Sequence[tuple[float, Raster]]) -> _Volume:
    geometries = [raster.geometry for _, raster in planes if raster.geometry is not None]
    axes = geometries[0].affine[:3, :3] / (geometries[0].spacing_mm[0], 1, 1)
    origins = np.array([geometry.affine[:3, 3] for geometry in geometries])
    offsets = np.array([offset_mm for offset_mm, _ in planes])
    reach = np.array(
        [
            (geometry.spacing_mm[0] / 2,) * 2 if raster.slab is None else raster.slab[:2]
            for geometry, (_, raster) in zip(geometries, planes, strict=True)
        ]
    )
    sizes = [raster.mask.size for _, raster in planes]
    return _Volume(
        axes,
        np.round(offsets - reach[:, 0], DECIMALS),
        np.round(offsets + reach[:, 1], DECIMALS),
        (origins @ np.linalg.inv(axes).T)[:, 1:] + [(raster.row, raster.column) for _, raster in planes],
        np.array([raster.mask.shape for _, raster in planes]),
        np.cumsum([0, *sizes[:-1]], dtype=np.int64),
        np.concatenate([raster.mask.reshape(-1) for _, raster in planes]),
    )


class _Where:
    """Where the voxels of slices lie in a volume."""

    def __init__(self, volume: _Volume, slices: Slices) -> None:
        self._volume = volume
        self._slices = slices
        to_axes = np.linalg.inv(volume.axes)
        self._turn, self._origin = to_axes @ slices.affine[:3, :3], to_axes @ slices.affine[:3, 3]
        # The corners of each painted rectangle, as thick as it reaches, in layers, rows and columns of the series.
        across = np.stack([volume.lower, volume.upper], axis=1)
        inside = np.stack([volume.first - 0.5, volume.first + volume.shapes - 0.5], axis=1)
        corners = np.array(
            [[across[:, a], inside[:, b, 0], inside[:, c, 1]] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
        )
        index = np.linalg.inv(self._turn) @ (corners - self._origin[:, None])
        self._low, self._high = index.min(axis=0), index.max(axis=0)

    def on_slice(self, n: int) -> Raster | None:
        """Return the painted pixels on a slice; None where there are none."""
        along, shift = self._slices.along[n], self._slices.shift[n]
        here = (self._low[0] <= along + 1e-6) & (along - 1e-6 <= self._high[0])
        if not here.any():
            return None
        low, high = self._low[1:, here].min(axis=1) - shift, self._high[1:, here].max(axis=1) - shift
        top, left = (max(0, int(np.ceil(v - 1e-6))) for v in low)
        bottom, right = (
            min(size, int(np.floor(v + 1e-6)) + 1) for v, size in zip(high, self._slices.matrix, strict=True)
        )
        if bottom <= top or right <= left:
            return None
        rows, columns = np.arange(top, bottom)[:, None] + shift[0], np.arange(left, right) + shift[1]
        offset, row, column = (
            np.round(origin + turn[0] * along + turn[1] * rows + turn[2] * columns, DECIMALS)
            for origin, turn in zip(self._origin, self._turn, strict=True)
        )
        found = self._looked_up(offset, row, column)
        part = painted(found)
        if part is None:
            return None
        return Raster(part.mask, part.row + top, part.column + left, self._slices.matrix)

    def _looked_up(
        self, offset: NDArray[np.float64], row: NDArray[np.float64], column: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Return whether places in a volume are painted."""
        volume = self._volume
        # A plane reaches from just behind its lower end to its upper one: half-way, the lower of two has it.
        plane = np.searchsorted(volume.upper, offset)
        inside = plane < len(volume.upper)
        plane[~inside] = 0
        inside &= offset > volume.lower[plane]
        # A pixel has its left and its upper side, as pixels of parallel planes have.
        down, right = (
            np.floor(np.round(at - volume.first[plane, axis], DECIMALS) + 0.5).astype(np.int64)
            for axis, at in enumerate((row, column))
        )
        rows, columns = volume.shapes[plane, 0], volume.shapes[plane, 1]
        inside &= (down >= 0) & (down < rows) & (right >= 0) & (right < columns)
        at = np.where(inside, volume.starts[plane] + down * columns + right, 0)
        return inside & volume.pixels[at]
