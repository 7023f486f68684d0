"""Describes a volume, image or labels, for its writer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gpuprep.core.geometry import Geometry, Shape3, Vector3
from gpuprep.core.plan import BYTES_PER_VOXEL, Plan
from gpuprep.core.recipe import Compression


class OnFileFinished(Protocol):
    """Callback for a finished file, which is flushed to disk while others are being written."""

    def __call__(self, file: str | os.PathLike[str], crc32: int | None = None) -> None:
        """Take a file that is complete, and its CRC-32 if it is known."""
        ...


def ignore_finished_file(file: str | os.PathLike[str], crc32: int | None = None) -> None:
    """Do nothing with a finished file."""


@dataclass(frozen=True, slots=True)
class Content:
    """Grid, type and display values of a volume that is about to be written."""

    grid: Geometry
    dtype: str
    """Name of the NumPy type of the voxels."""
    compression: Compression
    display: tuple[float, float]
    """Values to show as black and as white."""
    fill: float
    """Value of voxels that are not stored: air, or 0 for labels."""
    hu: tuple[float, float] | None = None
    """HU per unit and HU of value 0; None for labels."""

    @property
    def shape(self) -> Shape3:
        """Number of slices, rows and columns."""
        return self.grid.shape

    @property
    def spacing_mm(self) -> Vector3:
        """Distance between voxel centres in mm along (k, j, i)."""
        return self.grid.spacing_mm

    @property
    def bytes(self) -> int:
        """Uncompressed size of the voxels."""
        return int(np.prod(self.shape, dtype=np.int64)) * BYTES_PER_VOXEL[self.dtype]

    @classmethod
    def image(cls, plan: Plan) -> Content:
        """Return the content of the image of a plan, displayed in its window, or without one from −1000 to 400 HU."""
        low, high = ((hu + plan.shift_hu) * plan.scale for hu in plan.recipe.window_hu or (-1000.0, 400.0))
        hu = plan.hu_slope, plan.hu_intercept
        air = plan.air if plan.recipe.dtype == "float32" else round(plan.air)
        return cls(plan.target, plan.recipe.dtype, plan.recipe.compression, (low, high), air, hu)

    @classmethod
    def labels(cls, plan: Plan, dtype: str, highest: int) -> Content:
        """Return the content of labels from 0 to `highest` on the grid of a plan."""
        return cls(plan.target, dtype, plan.recipe.compression, (0, max(1, highest)), 0)
