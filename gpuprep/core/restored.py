"""Defines `OutputGrid`, where an output and the slices of its series lie, and `Restored`, labels of those slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.geometry import Geometry, Placement, Shape3
from gpuprep.errors import GeometryError

LARGEST_SKEW = 1e-3
"""Largest change in voxels of an index of the output along an axis of the source that it does not belong to."""


class AxisMap(NamedTuple):
    """Index x along an axis of the source as an index along an axis of the output: scale · x + shift."""

    axis: int
    """Axis of the output."""
    scale: float
    shift: float

    def at(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return positions along the source as positions along the output, rounded to 1e-6 voxel."""
        return np.round(self.scale * positions + self.shift, 6)


@dataclass(frozen=True, slots=True, eq=False)
class OutputGrid:
    """Grid of a converted volume, and the positions of the slices from which it was made."""

    target: Geometry
    """Grid of the output."""
    source: Geometry
    """Regular grid of the series."""
    placement: Placement | None
    """Positions of the slices in `source`; None if slice k is layer k of it."""

    @property
    def slices_shape(self) -> Shape3:
        """Number of slices, and their rows and columns, as acquired."""
        return self.source.shape if self.placement is None else (len(self.placement.along), *self.placement.matrix)

    @property
    def along(self) -> NDArray[np.float64]:
        """Position of each slice along the slice axis of `source`, shape (slices,)."""
        return np.arange(self.source.shape[0], dtype=np.float64) if self.placement is None else self.placement.along

    @property
    def shift(self) -> NDArray[np.float64]:
        """Position (row, column) in `source` of the first voxel of each slice, shape (slices, 2)."""
        if self.placement is None or self.placement.shift is None:
            return np.zeros((self.slices_shape[0], 2))
        return self.placement.shift

    def axis_maps(self) -> tuple[AxisMap, AxisMap, AxisMap]:
        """Return for slices, rows and columns of the source how they map to the output.

        Every step of a conversion (reorder axes, resample, crop, pad, stretch) acts on each axis on its own.

        Raises
        ------
        GeometryError
            If the axes of both grids are not parallel.
        """
        to_target = np.linalg.inv(self.target.affine) @ self.source.affine
        steps = to_target[:3, :3]
        axes = np.argmax(np.abs(steps), axis=0)
        skew = np.abs(steps)
        skew[axes, range(3)] = 0
        if sorted(axes) != [0, 1, 2] or (skew * self.source.shape).max() > LARGEST_SKEW:
            raise GeometryError("the axes of the output are not parallel to those of the series")
        k, j, i = (AxisMap(int(axes[n]), float(steps[axes[n], n]), float(to_target[axes[n], 3])) for n in range(3))
        return k, j, i


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """Labels on the slices of a series as acquired, from a prediction on the grid of its output.

    Examples
    --------
    >>> import numpy
    >>> grid = gpuprep.Geometry((2, 4, 4), [[0, 0, 1, 0], [0, 1, 0, 0], [3, 0, 0, 7], [0, 0, 0, 1]])
    >>> restored = gpuprep.Restored(numpy.zeros((2, 4, 4), "uint8"), grid, None, {1: "heart"}, "1.2.3", "1.2.3")
    >>> restored.first_voxels_mm.tolist()  # Image Position (Patient) of each slice
    [[0.0, 0.0, 7.0], [0.0, 0.0, 10.0]]
    """

    values: NDArray[Any]
    """Labels in uint8 or uint16, shape (slices, rows, columns), slices in order along the normal; 0 is background."""
    geometry: Geometry
    """Regular grid of the series."""
    placement: Placement | None
    """Positions of the slices in that grid; None if slice k is layer k of it."""
    names: dict[int, str]
    """Names of the label values, as far as ``volume.json`` has them."""
    key: str
    """Key of the series in the manifest."""
    series_uid: str
    """*Series Instance UID*, or its pseudonym."""

    @property
    def first_voxels_mm(self) -> NDArray[np.float64]:
        """Centre of the first voxel of each slice, LPS, in mm, shape (slices, 3)."""
        grid = OutputGrid(self.geometry, self.geometry, self.placement)
        return self.geometry.points_mm(np.column_stack([grid.along, grid.shift]))

    def regular_grid(self) -> tuple[Geometry, float]:
        """Return the grid of evenly spaced slices that is nearest to the slices, and the largest distance in mm.

        The grid has a shear if the slices lean evenly. The distance is 0 for a regular series, apart from rounding.
        """
        if self.placement is None:
            return self.geometry, 0.0
        first_mm, count = self.first_voxels_mm, len(self.values)
        affine = np.array(self.geometry.affine)
        design = np.column_stack([np.arange(count), np.ones(count)])
        if count > 1:  # otherwise the distance between slices is that of the grid
            affine[:3, 0] = np.linalg.lstsq(design, first_mm)[0][0]
        affine[:3, 3] = first_mm.mean(axis=0) - affine[:3, 0] * (count - 1) / 2
        fitted_mm = affine[:3, 3] + np.arange(count)[:, None] * affine[:3, 0]
        away_mm = float(np.linalg.norm(fitted_mm - first_mm, axis=1).max())
        k, j, i = self.values.shape
        return Geometry((k, j, i), affine), away_mm
