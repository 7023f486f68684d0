"""Counts voxels outside the range of CT numbers or of the output type while a series is read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import format_count
from gpuprep.core.hounsfield import HIGHEST_HU, representable_hu
from gpuprep.core.recipe import Recipe
from gpuprep.core.stacking_rules import SeriesWarning
from gpuprep.errors import IntensityError

MAX_IMPOSSIBLE_FRACTION = 0.01
"""Largest fraction of voxels above `HIGHEST_HU`, padding excluded, in a series that holds HU."""

CODE = "hu-range"


class HuRangeCheck:
    """Counts of voxels whose HU are above `HIGHEST_HU`, or outside the range of the output type.

    Source voxels are counted, so that the counts do not depend on the interpolation.

    Parameters
    ----------
    recipe : Recipe
        Window and dtype give the range of the output; `padding` says whether low values and padding become air.
    voxels : int
        Number of voxels of the whole series.
    """

    def __init__(self, recipe: Recipe, voxels: int) -> None:
        self._dtype = recipe.dtype
        self._keep = recipe.policy == "keep"
        self._padding_is_air = recipe.padding == "air"
        low_hu, high_hu = representable_hu(recipe.window_hu, recipe.dtype)
        self._range_hu = -math.inf if self._padding_is_air else low_hu, high_hu  # low values become air before clipping
        self._voxels = voxels
        self._impossible = self._clipped = 0
        self._highest: tuple[float, str] = (-math.inf, "")
        self._clipped_hu: tuple[float, float] = (math.inf, -math.inf)

    def add(
        self,
        name: str,
        values: NDArray[Any],
        extremes: tuple[int, int],
        slope: float,
        intercept: float,
        padding: NDArray[Any] | None,
    ) -> None:
        """Count the voxels of a slice; a slice whose extremes are within range is skipped.

        Parameters
        ----------
        name : str
            File name of the slice.
        values : array of integers, shape (rows, columns)
            Stored values.
        ends : (int, int)
            Lowest and highest stored value.
        slope, intercept : float
            Rescale of the slice.
        padding : array of integers, shape (2,), optional
            Lowest and highest declared padding value.
        """
        low_hu, high_hu = sorted(extreme * slope + intercept for extreme in extremes)
        if self._range_hu[0] <= low_hu and high_hu <= min(HIGHEST_HU, self._range_hu[1]):
            return
        hu = values * np.float64(slope) + intercept
        not_padding = np.ones(values.shape, bool) if padding is None else (values < padding[0]) | (values > padding[1])
        if (impossible := hu[not_padding & (hu > HIGHEST_HU)]).size:
            self._impossible += impossible.size
            self._highest = max(self._highest, (float(impossible.max()), name))
        clipped = (hu < self._range_hu[0]) | (hu > self._range_hu[1])
        if (out_of_range := hu[clipped & not_padding if self._padding_is_air else clipped]).size:
            self._clipped += out_of_range.size
            low_hu, high_hu = self._clipped_hu
            self._clipped_hu = min(low_hu, float(out_of_range.min())), max(high_hu, float(out_of_range.max()))

    def check(self, padding_voxels: int) -> None:
        """Raise IntensityError as soon as too many voxels are above `HIGHEST_HU`.

        `padding_voxels` is the count over the slices so far. More padding in later slices only makes the fraction
        larger, so an early rejection is never wrong, and the check after the last slice is exact.
        """
        if self._impossible > MAX_IMPOSSIBLE_FRACTION * (self._voxels - padding_voxels) and not self._keep:
            highest_hu, name = self._highest
            raise IntensityError(
                f"more than {MAX_IMPOSSIBLE_FRACTION:.0%} of the voxels are above {HIGHEST_HU:g} HU, the "
                f"upper limit of CT numbers (up to {highest_hu:g} HU in {name}): the rescale or the pixels are wrong; "
                "--policy keep accepts them",
                CODE,
            )

    @property
    def warnings(self) -> tuple[SeriesWarning, ...]:
        """Warnings about the slices so far."""
        found = []
        if self._impossible:
            highest_hu, name = self._highest
            text = (
                f"HU of {format_count(self._impossible, 'voxel')} are above {HIGHEST_HU:g}, the upper limit of CT "
                "numbers: "
                f"up to {highest_hu:g} in {name}"
            )
            found.append(SeriesWarning(CODE, text))
        if self._clipped:
            low, high = self._clipped_hu
            text = (
                f"HU of {format_count(self._clipped, 'voxel')}, {low:g} to {high:g}, were clipped to the range of "
                f"{self._dtype}, −32768 to 32767; --dtype float32 holds them"
            )
            found.append(SeriesWarning(CODE, text))
        return tuple(found)
