"""Measures the positions of slices along and perpendicular to the normal of their series, and sets tolerances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.series import Series, SliceHeader
from gpuprep.core.stacking_rules import Rules

FINE_POSITION_MM, FINE_LEAN_MM = 0.1, 0.3
"""Pixel spacings below which the tolerances of positions and of lateral offsets shrink in proportion (micro-CT)."""


STRAIGHT_MM = 0.1
"""Largest distance from a straight line in a tilted stack, or a tenth of the lateral offset if that is more."""


@dataclass(slots=True)
class Measures:
    """Measures of the positions, filled in as far as they can be taken."""

    spacing_mm: float | None = None
    """Median distance between neighbouring slices along the normal."""
    spacing_deviation_mm: float | None = None
    """Largest difference of a distance between neighbours from the median."""
    gaps: tuple[tuple[str, float, int], ...] = ()
    """Gaps: (name of the slice before it, width in mm, number of missing slices)."""
    identical: int = 0
    """Number of images that repeat another one, according to their headers."""
    different: int = 0
    """Number of images that share a position with a different one."""
    tilt_deg: float | None = None
    """Angle between the normal and the line through the slice positions; *Gantry/Detector Tilt* is not used."""
    obliqueness_deg: float | None = None
    """Angle between the normal and the nearest axis of the patient."""
    orientation: str = ""
    """Plane, and directions of increasing slices, rows and columns: "axial SPL"."""


@dataclass(frozen=True, slots=True)
class Tolerances:
    """Tolerances of positions, and the number of decimals in messages."""

    position_mm: float
    lean_mm: float
    scatter_mm: float
    """Largest distance from a straight line for a tilted stack; beyond it, slices are shifted irregularly."""
    digits: int
    """Additional decimals of lengths in messages."""

    @classmethod
    def of(cls, series: Series, rules: Rules) -> Tolerances:
        finest_mm = min(series.pixel_spacing_mm or (1.0,))
        return cls(
            position_mm=rules.position_tolerance_mm * min(1.0, finest_mm / FINE_POSITION_MM),
            lean_mm=rules.lean_tolerance_mm * min(1.0, finest_mm / FINE_LEAN_MM),
            scatter_mm=STRAIGHT_MM * min(1.0, finest_mm / FINE_LEAN_MM),
            digits=max(0, math.ceil(math.log10(FINE_POSITION_MM / finest_mm))),
        )

    def mm(self, value: float, decimals: int = 2) -> str:
        """Return a length in mm as text."""
        return f"{value:.{decimals + self.digits}f}"


def position_tolerance_mm(series: Series, rules: Rules) -> float:
    """Return the largest distance along the normal between images that share a position."""
    return Tolerances.of(series, rules).position_mm


@dataclass(frozen=True, slots=True, eq=False)
class SlicePositions:
    """Slices in order along the normal, with their positions."""

    slices: tuple[SliceHeader, ...]
    along_mm: NDArray[np.float64]
    """Distance from the first slice along the normal, ascending, shape (n,)."""
    lateral_mm: NDArray[np.float64]
    """Offset from the normal through the first slice, in the directions of (columns, rows), shape (n, 2)."""

    @classmethod
    def of(cls, slices: tuple[SliceHeader, ...], axes: NDArray[np.float64]) -> SlicePositions:
        row, column, normal = axes
        positions = np.array([s.position_mm for s in slices], dtype=np.float64)
        order = np.argsort(positions @ normal, kind="stable")
        offsets = positions[order] - positions[order[0]]
        return cls(
            tuple(slices[n] for n in order), offsets @ normal, np.stack([offsets @ column, offsets @ row], axis=1)
        )

    def subset(self, kept: list[int]) -> SlicePositions:
        return SlicePositions(tuple(self.slices[n] for n in kept), self.along_mm[kept], self.lateral_mm[kept])

    def duplicates(self, tolerance_mm: float) -> list[tuple[int, int]]:
        """Return pairs of indices: the first image at a position, and another one at it."""
        found = []
        first = 0
        for n in range(1, len(self.slices)):
            if self.along_mm[n] - self.along_mm[first] <= tolerance_mm:
                found.append((first, n))
            else:
                first = n
        return found
