"""Defines what a writer is told of a volume, be it an image or labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpuprep.core.geometry import Geometry, Shape3, Vector3
from gpuprep.core.plan import BYTES, Plan
from gpuprep.core.recipe import Compression

Settle = Callable[[Path], None]
"""Is told of a file that is finished, so that it gets on disk while others are being made."""


def nothing(_: Path) -> None:
    """Settle nothing: whoever asked for the files looks after them."""


@dataclass(frozen=True, slots=True)
class Content:
    """A volume that is about to be written."""

    grid: Geometry
    dtype: str
    compression: Compression
    display: tuple[float, float]
    """Values to show as black and as white."""
    fill: float
    """Value of what is not stored: air, or no structure."""
    hu: tuple[float, float] | None = None
    """HU per unit and HU of value 0; None for labels."""

    @property
    def shape(self) -> Shape3:
        """Number of slices, rows and columns."""
        return self.grid.shape

    @property
    def spacing_mm(self) -> Vector3:
        """Distance between voxel centres along (k, j, i)."""
        return self.grid.spacing_mm

    @property
    def bytes(self) -> int:
        """Size of the voxels, uncompressed."""
        return int(np.prod(self.shape, dtype=np.int64)) * BYTES[self.dtype]

    @classmethod
    def image(cls, plan: Plan) -> Content:
        """Return the image of a plan: shown in its window, or for unwindowed HU in what is usual for CT."""
        low, high = ((hu + plan.shift_hu) * plan.scale for hu in plan.recipe.window_hu or (-1000.0, 400.0))
        hu = plan.hu_slope, plan.hu_intercept
        air = plan.air if plan.recipe.dtype == "float32" else round(plan.air)
        return cls(plan.target, plan.recipe.dtype, plan.recipe.compression, (low, high), air, hu)

    @classmethod
    def labels(cls, plan: Plan, dtype: str, highest: int) -> Content:
        """Return labels on the grid of a plan, up to the highest."""
        return cls(plan.target, dtype, plan.recipe.compression, (0, max(1, highest)), 0)
