"""Finds the patient in coarse HU: the parts above air that are thicker than a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gpuprep.compute.lung_mask import PURE_AIR_BELOW_HU, TISSUE_ABOVE_HU, LungLike, filled, lung_like
from gpuprep.compute.plane_masks import Mask, between, dilated, opened, parts
from gpuprep.core.geometry import Vector3

TABLE_MM = 5.0
"""Thickness up to which a plate is a table. Skins of a patient table are 1 to 3 mm thick, with foam between them."""

TABLE_SHARE = 0.03
"""Same, as a fraction of the smaller side of the field of view; it applies to small animals."""

SHARE_OF_LARGEST = 0.05
"""Smallest volume of another part of the body (a second leg, an arm), as a fraction of the largest part."""

DEPTH_OF_LARGEST = 0.25
"""Smallest depth of another part, as a fraction of the largest part's; boards are thinner. Depth is area by outline."""

LIMB_MM = 35.0
"""Mean width along rows and columns from which another part is a limb, also beside a trunk that is far larger."""

MAX_ENCLOSED_AIR = 0.4
"""Largest fraction of pure air within the outline of a body; more is a shell, such as an incubator."""


@dataclass(frozen=True, slots=True, eq=False)
class CoarseBody:
    """The patient in coarse HU."""

    mask: Mask | None
    """Samples of the patient in axial planes (z, y, x), without air inside; None if there is none."""
    like: LungLike
    """What may be lung in it."""
    problem: str = ""
    """Reason why there is no mask, with the measure."""


def find_body(hu: NDArray[np.int16], spacing_mm: Vector3, unmeasured: Mask | None = None) -> CoarseBody:
    """Return the patient without table, tubes and sheets.

    Parameters
    ----------
    hu : array of int16, shape (z, y, x)
        Coarse HU in axial planes; each axis may be reversed.
    spacing_mm : tuple of float
        Distances of the samples along (z, y, x).
    unmeasured : array of bool, shape (y, x), optional
        Samples outside the circle of reconstruction.

    Notes
    -----
    Everything thinner than a table in an axial plane is removed first, which also separates the table from the back.
    Lungs are filled before, since the chest wall may be as thin. What is removed of nose, ears and fingers is found
    again at full resolution.
    """
    tissue = hu > TISSUE_ABOVE_HU
    like = lung_like(hu, spacing_mm, unmeasured)
    table_mm = table_thickness_mm(hu.shape, spacing_mm)
    thick = filled(tissue, like)
    for axis in (1, 2):
        thick = opened(thick, samples_beyond(table_mm, spacing_mm[axis]), axis)
    # Whatever is left is at least two samples wide, so every second sample has the connections.
    labels, sizes = parts(thick[:, ::2, ::2])
    if not sizes.any():
        thickness = f"nothing above {TISSUE_ABOVE_HU} HU is thicker than {table_mm:.3g} mm"
        return CoarseBody(None, like, f"{thickness} (highest value: {int(hu.max())} HU)")
    kept = _of_the_body(labels, sizes, (2 * spacing_mm[1], 2 * spacing_mm[2]))[labels]
    air = _enclosed_air(kept, hu[:, ::2, ::2])
    if air > MAX_ENCLOSED_AIR:
        share = f"{air:.0%} of the largest object is air below {PURE_AIR_BELOW_HU} HU (limit {MAX_ENCLOSED_AIR:.0%})"
        return CoarseBody(None, like, f"{share}, as in an incubator or another shell")
    mask = np.zeros_like(thick)
    mask[:, ::2, ::2] = kept
    mask = dilated(dilated(mask, 1), 2)
    mask &= thick
    mask &= tissue
    return CoarseBody(mask, like)


def table_thickness_mm(shape: tuple[int, ...], spacing_mm: Vector3) -> float:
    """Return the thickness up to which a plate in axial planes is a table."""
    return min(TABLE_MM, TABLE_SHARE * min(shape[1] * spacing_mm[1], shape[2] * spacing_mm[2]))


def samples_beyond(length_mm: float, spacing_mm: float) -> int:
    """Return the number of adjacent samples that no object of a length can hold; at least two."""
    return int(length_mm / spacing_mm) + 2


def _of_the_body(labels: NDArray[np.intp], sizes: NDArray[np.intp], cell_mm: tuple[float, float]) -> Mask:
    """Return for each label whether it is a part of the body; `cell_mm` is the size of a cell in axial planes."""
    chosen: Mask = sizes >= max(1.0, SHARE_OF_LARGEST * sizes.max())
    if np.count_nonzero(chosen) > 1:
        inside = labels > 0
        inner = inside.copy()
        for own, beside in ((inner[:, 1:], inside[:, :-1]), (inner[:, :-1], inside[:, 1:])):
            own &= beside
        for own, beside in ((inner[:, :, 1:], inside[:, :, :-1]), (inner[:, :, :-1], inside[:, :, 1:])):
            own &= beside
        outline = np.maximum(1, np.bincount(labels[inside & ~inner], minlength=len(sizes)))
        depth = sizes / outline
        chosen &= depth >= DEPTH_OF_LARGEST * depth[np.argmax(sizes)]
    other = np.flatnonzero(~chosen & (sizes >= LIMB_MM**2 / (cell_mm[0] * cell_mm[1])))
    boxes = ndimage.find_objects(labels) if len(other) else []
    for n in other:
        part = labels[boxes[n - 1]] == n
        widths_mm = [mm * sizes[n] / np.count_nonzero(part.any(axis=a)) for a, mm in zip((1, 2), cell_mm, strict=True)]
        chosen[n] = min(widths_mm) >= LIMB_MM
    return chosen


def _enclosed_air(body: Mask, hu: NDArray[np.int16]) -> float:
    """Return the fraction of pure air within the outline of a body."""
    inside = between(body, 1) & between(body, 2)
    return float(np.count_nonzero(inside & (hu < PURE_AIR_BELOW_HU)) / np.count_nonzero(inside))
