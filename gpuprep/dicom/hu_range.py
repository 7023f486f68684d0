"""Counts HU that are no CT numbers or that the output type cannot hold, while a series is read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import numbered
from gpuprep.core.hounsfield import HIGHEST_HU, held_hu
from gpuprep.core.recipe import Recipe
from gpuprep.core.stacking_rules import SeriesWarning
from gpuprep.errors import IntensityError

MOST_FALSE = 0.01
"""A series with a larger share of its voxels above `HIGHEST_HU`, padding aside, does not hold HU."""

CODE = "hu-range"


class Extremes:
    """Voxels of a series whose HU are beyond `HIGHEST_HU`, or beyond what the output type holds.

    Source voxels are counted, so that the numbers do not depend on the interpolation.

    Parameters
    ----------
    recipe : Recipe
        Its window and dtype say what the output holds; its `padding`, whether low values and padding become air.
    voxels : int
        Of the whole series.
    """

    def __init__(self, recipe: Recipe, voxels: int) -> None:
        self._dtype = recipe.dtype
        self._keep = recipe.policy == "keep"
        self._air = recipe.padding == "air"
        low_hu, high_hu = held_hu(recipe.window_hu, recipe.dtype)
        self._held_hu = -math.inf if self._air else low_hu, high_hu  # what is too low becomes air before it is cut
        self._voxels = voxels
        self._false = self._cut = 0
        self._highest: tuple[float, str] = (-math.inf, "")
        self._cut_hu: tuple[float, float] = (math.inf, -math.inf)

    def add(
        self,
        name: str,
        values: NDArray[Any],
        ends: tuple[int, int],
        slope: float,
        intercept: float,
        padding: NDArray[Any] | None,
    ) -> None:
        """Take in a slice; its voxels are looked at only if its ends leave the range.

        Parameters
        ----------
        name : str
            Of the file.
        values : array of integers, shape (rows, columns)
            Stored values.
        ends : (int, int)
            Lowest and highest stored value.
        slope, intercept : float
            Rescale of the slice.
        padding : array of integers, shape (2,), optional
            Lowest and highest declared value.
        """
        low_hu, high_hu = sorted(end * slope + intercept for end in ends)
        if self._held_hu[0] <= low_hu and high_hu <= min(HIGHEST_HU, self._held_hu[1]):
            return
        hu = values * np.float64(slope) + intercept
        measured = np.ones(values.shape, bool) if padding is None else (values < padding[0]) | (values > padding[1])
        if (false := hu[measured & (hu > HIGHEST_HU)]).size:
            self._false += false.size
            self._highest = max(self._highest, (float(false.max()), name))
        cut = (hu < self._held_hu[0]) | (hu > self._held_hu[1])
        if (lost := hu[cut & measured if self._air else cut]).size:
            self._cut += lost.size
            self._cut_hu = min(self._cut_hu[0], float(lost.min())), max(self._cut_hu[1], float(lost.max()))

    def check(self, padding_voxels: int) -> None:
        """Raise IntensityError as soon as too many voxels are no CT numbers.

        `padding_voxels` counts those of the slices so far. Padding of the slices to come only makes the share larger,
        so that an early answer is never wrong, and the one after the last slice is exact.
        """
        if self._false > MOST_FALSE * (self._voxels - padding_voxels) and not self._keep:
            highest_hu, name = self._highest
            raise IntensityError(
                f"more than {MOST_FALSE:.0%} of the voxels are above {HIGHEST_HU:g} HU, where CT numbers end (up to "
                f"{highest_hu:g} HU in {name}): the rescale or the pixels are wrong; --policy keep takes them",
                CODE,
            )

    @property
    def warnings(self) -> tuple[SeriesWarning, ...]:
        """What was found so far."""
        found = []
        if self._false:
            highest_hu, name = self._highest
            text = f"HU of {numbered(self._false, 'voxel')} are above {HIGHEST_HU:g}, where CT numbers end: up to "
            found.append(SeriesWarning(CODE, f"{text}{highest_hu:g} in {name}"))
        if self._cut:
            low, high = self._cut_hu
            text = (
                f"HU of {numbered(self._cut, 'voxel')}, {low:g} to {high:g}, were cut to what {self._dtype} holds, "
                "−32768 to 32767; --dtype float32 holds them"
            )
            found.append(SeriesWarning(CODE, text))
        return tuple(found)
