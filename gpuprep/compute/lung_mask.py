"""Finds aerated lung in coarse HU: air mixed with tissue, enclosed by tissue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gpuprep.compute.plane_masks import Mask, between, dilated, in_cells, of_cells, parts
from gpuprep.core.geometry import Vector3

TISSUE_ABOVE_HU = -500
"""Half-way between air and skin, and nearly so between lung and the chest wall. What is less is air or lung."""

PURE_AIR_BELOW_HU = -950
"""Lungs are denser; air around a patient, and gas in airways and bowel, is not."""

MIN_WIDTH_MM, MIN_WIDTH_SHARE = 25.0, 0.06
"""Smallest mean width of lungs along rows and columns of an axial plane, in mm and as a fraction of the smaller side of
the field of view."""

MIN_ROUNDNESS = 0.4
"""Smallest ratio of the two mean widths of lungs. They have 0.5 to 1, and a mattress on a curved table 0.2 to 0.3."""

SHARE_OF_LARGEST = 0.02
"""Smallest volume of a part of the lungs, as a fraction of the largest part; the rest of a lung may be compressed."""

MAX_PARTS = 20
"""Largest number of parts of the lungs; noise may have thousands of equal size."""

MIN_OVERLAP = 0.5
"""Smallest fraction of the slices of a part that also hold the largest part; stool in the colon is elsewhere."""

MIN_SHARE_OF_BODY = 0.06
"""Smallest area of lungs as a fraction of the body, in the slice with the largest fraction. Chests have 0.1 to 0.5;
air cells of the skull and stool less."""

EDGE_SAMPLES = 4
"""Width in samples of the edge of the lungs that the search in cells leaves out."""

WITHIN_BODY = 0.9
"""Fraction of the circle of reconstruction, beyond which a field of view lies within the body, as in cardiac CT."""

MIN_MIXED = 0.4
"""Smallest fraction of the enclosed air that is mixed with tissue. Chests have 0.9, less with emphysema; gas in the
bowel, and air between two legs, is pure."""


@dataclass(frozen=True, slots=True, eq=False)
class LungLike:
    """Parts of enclosed air that is mixed with tissue, in cells of 2 × 2 samples of axial planes."""

    labels: NDArray[np.intp]
    """Label of each cell, from 1; 0 for other cells."""
    lungs: Mask
    """Whether the part of each label has the shape of lungs, and is within the field of view."""
    border: Mask | None
    """Cells outside a circle of reconstruction that lies within the body, shape (y, x)."""


@dataclass(frozen=True, slots=True, eq=False)
class CoarseLungs:
    """Lungs in coarse HU."""

    mask: Mask | None
    """Samples of lung in axial planes (z, y, x); None if there are no lungs."""
    share: float
    """Largest fraction of the body in a slice that is lung."""
    problem: str = ""
    """Reason why there is no mask, with the measure."""


def lung_like(hu: NDArray[np.int16], spacing_mm: Vector3, unmeasured: Mask | None) -> LungLike:
    """Return what may be lung, before the patient is found.

    Parameters
    ----------
    hu : array of int16, shape (z, y, x)
        Coarse HU in axial planes.
    spacing_mm : tuple of float
        Distances of the samples along (z, y, x).
    unmeasured : array of bool, shape (y, x), optional
        Samples outside the circle of reconstruction; it counts as tissue if nearly all of it cuts the body.
    """
    border = None
    if unmeasured is not None and _is_within_body(hu, unmeasured):
        border = in_cells(unmeasured[None], 4)[0]
    inside = _inside(in_cells(hu > TISSUE_ABOVE_HU, 1), border)
    labels, sizes = parts(inside & in_cells((hu <= TISSUE_ABOVE_HU) & (hu > PURE_AIR_BELOW_HU), 2))
    field_mm = min(n * mm for n, mm in zip(hu.shape[1:], spacing_mm[1:], strict=True))
    least_mm = min(MIN_WIDTH_MM, MIN_WIDTH_SHARE * field_mm)
    lungs = np.zeros(len(sizes), dtype=bool)
    least_cells = least_mm**2 / (4 * spacing_mm[1] * spacing_mm[2])
    large = np.flatnonzero(sizes >= max(least_cells, SHARE_OF_LARGEST * sizes.max()))
    boxes = ndimage.find_objects(labels) if len(large) else []
    for n in large:
        box = boxes[n - 1]
        if any(box[a].start == 0 or box[a].stop == labels.shape[a] for a in (1, 2)):
            continue  # it may be a mattress, and its wall is outside
        part = labels[box] == n
        widths_mm = [2 * spacing_mm[a] * sizes[n] / np.count_nonzero(part.any(axis=a)) for a in (1, 2)]
        lungs[n] = min(widths_mm) >= max(least_mm, MIN_ROUNDNESS * max(widths_mm))
    return LungLike(labels, lungs, border)


def filled(tissue: Mask, like: LungLike) -> Mask:
    """Return tissue and the lungs in it, so that the chest wall is not a thin plate."""
    if not like.lungs.any():
        return tissue
    cells = dilated(dilated(like.lungs[like.labels], 1), 2)
    return tissue | of_cells(cells, tissue.shape)


def find_lungs(hu: NDArray[np.int16], like: LungLike, body: Mask) -> CoarseLungs:
    """Return aerated lung without airways, and without gas of stomach and bowel.

    Parameters
    ----------
    hu : array of int16, shape (z, y, x)
        Coarse HU in axial planes.
    like : LungLike
        Its `lung_like`.
    body : array of bool, shape (z, y, x)
        The patient, without air inside.

    Notes
    -----
    Air outside is not enclosed: seen from it, the body is missing in some direction of the axial plane. Where the
    field of view cuts the body, its border counts as body. Airways and bowel hold pure gas and have sharp walls, so
    few samples in and around them have the HU of lung.
    """
    inside = _inside(in_cells(body, 1), like.border)
    labels = np.where(inside, like.labels, 0)
    sizes = np.bincount(labels.ravel(), minlength=len(like.lungs))
    sizes[0] = 0
    kept = _of_the_lungs(labels, sizes)[labels]
    pure = np.count_nonzero((inside & in_cells(hu <= PURE_AIR_BELOW_HU, 2))[kept.any(axis=(1, 2))])
    # A foot or the top of a head is no measure for lungs.
    areas, own = (np.asarray(m.sum(axis=(1, 2)), dtype=np.float64) for m in (inside, kept))
    share = float(np.max(own / np.maximum(1, np.maximum(areas, np.max(areas) / 2))))
    mixed = float(own.sum() / max(1.0, own.sum() + pure))
    if share < MIN_SHARE_OF_BODY or mixed < MIN_MIXED:
        return CoarseLungs(
            None,
            share,
            f"air mixed with tissue ({PURE_AIR_BELOW_HU} to {TISSUE_ABOVE_HU} HU) is at most {share:.1%} of the body "
            f"in a slice and {mixed:.0%} of its air (lungs: at least {MIN_SHARE_OF_BODY:.0%} and {MIN_MIXED:.0%})",
        )
    air = (hu <= TISSUE_ABOVE_HU) & (hu > PURE_AIR_BELOW_HU)
    mask = of_cells(kept, hu.shape) & air
    for _ in range(EDGE_SAMPLES):  # up to the chest wall, from which `_inside` keeps away
        mask = dilated(mask, 1) | dilated(mask, 2)
        mask &= air
    return CoarseLungs(mask, share)


def _is_within_body(hu: NDArray[np.int16], unmeasured: Mask) -> bool:
    """Return whether the circle of reconstruction cuts the body along nearly all of its length."""
    ring = dilated(dilated(unmeasured, 0), 1) & ~unmeasured
    return bool(np.count_nonzero(hu[:, ring] > PURE_AIR_BELOW_HU) > WITHIN_BODY * len(hu) * np.count_nonzero(ring))


def _inside(body: Mask, border: Mask | None) -> Mask:
    """Return the body and all that it encloses from four sides in an axial plane.

    The border of the field of view encloses what lies between two places where it cuts the body. Without the outermost
    cells, as those of the skin may have the HU of lung.
    """
    walls = body.copy() if border is None else body | border
    for edge in (walls[:, 0], walls[:, -1], walls[:, :, 0], walls[:, :, -1]):
        edge |= between(edge, 1)
    inside = between(walls, 1) & between(walls, 2)
    outside = ~inside
    return ~(dilated(outside, 1) | dilated(outside, 2))


def _of_the_lungs(labels: NDArray[np.intp], sizes: NDArray[np.intp]) -> Mask:
    """Return for each label whether it is a part of the lungs: large enough, and beside the largest part."""
    chosen = np.zeros(len(sizes), dtype=bool)
    order = np.argsort(sizes)[::-1][:MAX_PARTS]
    slices = (labels == order[0]).any(axis=(1, 2))
    for n in order[sizes[order] >= max(1.0, SHARE_OF_LARGEST * sizes[order[0]])]:
        own = np.count_nonzero(labels == n, axis=(1, 2))
        chosen[n] = own[slices].sum() >= MIN_OVERLAP * own.sum()
    return chosen
