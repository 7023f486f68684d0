"""Measures positions of slices along and beside the normal of their series, and sets tolerances for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.series import Series, SliceHeader
from gpuprep.core.stacking_rules import Rules

FINE_POSITION_MM, FINE_LEAN_MM = 0.1, 0.3
"""In pixels finer than these, as of micro-CT, tolerances of positions and of slices beside the normal shrink too."""


STRAIGHT_MM = 0.1
"""Slices may lie this far from a line, or a tenth of how far they lie beside the normal, and be a stack that leans."""


@dataclass(slots=True)
class Measures:
    """What was measured on the positions, as far as it went."""

    spacing_mm: float | None = None
    """Median distance between neighbours along the normal."""
    spacing_deviation_mm: float | None = None
    """Largest difference of such a distance from the median."""
    gaps: tuple[tuple[str, float, int], ...] = ()
    """(slice before it, millimetres to the next, slices missing)."""
    identical: int = 0
    """Images that repeat another one, as far as headers tell."""
    different: int = 0
    """Images at the place of another one, but unlike it."""
    tilt_deg: float | None = None
    """Angle between the normal and the line through the slices, by positions; tags play no part."""
    obliqueness_deg: float | None = None
    """Angle between the normal and the nearest axis of the patient."""
    orientation: str = ""
    """Plane and directions in which slices, rows and columns grow: "axial SPL"."""


@dataclass(frozen=True, slots=True)
class Tolerances:
    """What positions are compared with, and how exactly they are told."""

    position_mm: float
    lean_mm: float
    scatter_mm: float
    """Slices that lie so near to a straight line lean; others are moved."""
    digits: int
    """Decimals of millimetres beside the usual ones."""

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
        """Return a length as text."""
        return f"{value:.{decimals + self.digits}f}"


def position_tolerance_mm(series: Series, rules: Rules) -> float:
    """Return how far apart along the normal images may lie that are at one position."""
    return Tolerances.of(series, rules).position_mm


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Slices in order along the normal, and where they are."""

    slices: tuple[SliceHeader, ...]
    along: NDArray[np.float64]
    """Millimetres along the normal from the first slice, ascending, shape (n,)."""
    beside: NDArray[np.float64]
    """Millimetres beside the normal through the first slice, along (columns, rows), shape (n, 2)."""

    @classmethod
    def of(cls, slices: tuple[SliceHeader, ...], axes: NDArray[np.float64]) -> Places:
        row, column, normal = axes
        positions = np.array([s.position_mm for s in slices], dtype=np.float64)
        order = np.argsort(positions @ normal, kind="stable")
        offsets = positions[order] - positions[order[0]]
        return cls(
            tuple(slices[n] for n in order), offsets @ normal, np.stack([offsets @ column, offsets @ row], axis=1)
        )

    def only(self, kept: list[int]) -> Places:
        return Places(tuple(self.slices[n] for n in kept), self.along[kept], self.beside[kept])

    def doubles(self, tolerance_mm: float) -> list[tuple[int, int]]:
        """Return (first image at a position, another one there)."""
        found = []
        first = 0
        for n in range(1, len(self.slices)):
            if self.along[n] - self.along[first] <= tolerance_mm:
                found.append((first, n))
            else:
                first = n
        return found
