"""Determines the box to which a series is cropped.

The box is found on the host from the slices as acquired, whatever backend computes the volume: so it does not depend on
the backend, nor on spacing, window or size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute.coarse_hu import coarse_hu
from gpuprep.core.geometry import Geometry, IndexBox
from gpuprep.core.plan import CROP_NOT_FOUND
from gpuprep.core.recipe import Recipe
from gpuprep.core.stacking_rules import SeriesWarning
from gpuprep.core.volume import StoredVolume
from gpuprep.errors import PlanError, RecipeError

if TYPE_CHECKING:
    from gpuprep.compute.crop_box import FoundBox


@dataclass(frozen=True, slots=True, eq=False)
class Crop:
    """The box to which a series is cropped."""

    box: IndexBox
    """Voxels of the grid of the stack, with the margin; all of them if the part was not found."""
    found: bool
    warnings: tuple[SeriesWarning, ...]
    coarse: NDArray[np.int16]
    """HU of every fourth row and column of the slices as acquired."""

    def to_dict(self, recipe: Recipe, geometry: Geometry) -> dict[str, Any] | None:
        """Return the crop as JSON values, as in ``volume.json``; None if nothing is cropped."""
        if not self.found:
            return None
        corners = geometry.points_mm(np.array([self.box.start, self.box.stop]) - [[0], [1]])
        return {
            "to": recipe.crop,
            "margin_mm": recipe.crop_margin_mm,
            "start": list(self.box.start),
            "stop": list(self.box.stop),
            "corners_mm": np.round(corners, 4).tolist(),
            "share": float(f"{math.prod(self.box.shape) / math.prod(geometry.shape):.4g}"),
        }


def crop_of(volume: StoredVolume, recipe: Recipe, structures: FoundBox | None = None) -> Crop | None:
    """Return the box to which a series is cropped by a recipe; None if the recipe does not crop.

    Parameters
    ----------
    volume : StoredVolume
        The series.
    recipe : Recipe
        Its `crop`, `crop_margin_mm` and `crop_missing` are used.
    structures : FoundBox, optional
        Box of the structures of segmentations, needed if the recipe crops to these.

    Raises
    ------
    RecipeError
        If the recipe crops to structures, and there are none.
    PlanError
        With code "crop-not-found" if the part is not found and ``crop_missing = "reject"``.
    """
    kind = recipe.crop_kind
    if kind is None:
        return None
    from gpuprep.compute.crop_box import find_box  # imports SciPy

    coarse = coarse_hu(volume)
    if kind == "mask":
        if structures is None:
            raise RecipeError(f"crop = {recipe.crop!r} needs segmentations: convert with --masks")
        found = structures
    else:
        found = find_box(volume, coarse, cast(Literal["body", "lungs"], kind))
    whole = IndexBox((0, 0, 0), volume.geometry.shape)
    if found.box is None:
        if recipe.crop_missing == "reject":
            raise PlanError("; ".join(w.text for w in found.warnings), CROP_NOT_FOUND)
        warnings = tuple(replace(w, text=f"{w.text}: not cropped") for w in found.warnings)
        return Crop(whole, False, warnings, coarse)
    return Crop(with_margin(found.box, volume.geometry, recipe.crop_margin_mm), True, found.warnings, coarse)


def with_margin(box: IndexBox, geometry: Geometry, margin_mm: float) -> IndexBox:
    """Return a box grown by a margin on each side, within the grid."""
    more = [math.ceil(round(margin_mm / spacing_mm, 6)) for spacing_mm in geometry.spacing_mm]
    k, j, i = (max(0, low - m) for low, m in zip(box.start, more, strict=True))
    k_stop, j_stop, i_stop = (min(n, high + m) for n, high, m in zip(geometry.shape, box.stop, more, strict=True))
    return IndexBox((k, j, i), (k_stop, j_stop, i_stop))
