"""Finds the box of the body or of the lungs on the grid of a series, before it is resampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute.body_mask import find_body, table_thickness_mm
from gpuprep.compute.box_refine import Look, Refined, refine
from gpuprep.compute.coarse_hu import STEP
from gpuprep.compute.lung_mask import PURE_AIR_BELOW_HU, TISSUE_ABOVE_HU, find_lungs
from gpuprep.compute.plane_masks import Mask, dilated, opened
from gpuprep.core.geometry import IndexBox, Vector3
from gpuprep.core.hounsfield import LOWEST_HU
from gpuprep.core.stacking_rules import SeriesWarning
from gpuprep.core.volume import StoredVolume

SMALL_BODY = 0.02
"""Area of a box of the body in a slice, as a fraction of the field of view, under which a warning is given."""

SMALL_LUNGS = 0.12
"""Largest area of the lungs in a slice, as a fraction of the body, under which a warning is given."""

TUBE_MM, TUBE_SHARE = 5.0, 0.03
"""Width under which a structure on the skin is a tube, in mm and as a fraction of the body's smaller side."""

FAINT_SKIN_HU, FAINT_LUNG_HU = -800.0, -300.0
"""HU of a voxel with a fifth of skin in air, and with more than a third of lung in the chest wall."""

SEARCH_MM, SEARCH_SHARE = 6.0, 0.02
"""Distance of axial planes up to which some are left out of the search, in mm and as a fraction of the smaller side of
the field of view; refinement uses all."""


@dataclass(frozen=True, slots=True)
class FoundBox:
    """Result of the search for a box."""

    box: IndexBox | None
    """Box on `volume.geometry`, without margin; None if the series cannot be cropped."""
    warnings: tuple[SeriesWarning, ...]
    """Findings: ``crop-not-found``, ``crop-small``, ``crop-edge``."""


def find_box(volume: StoredVolume, coarse: NDArray[np.int16], kind: Literal["body", "lungs"]) -> FoundBox:
    """Find the box of the body or of the lungs.

    Parameters
    ----------
    volume : StoredVolume
        Stacked series, in any orientation.
    coarse : array of int16, shape (slices, ceil(rows / 4), ceil(columns / 4))
        Its `coarse_hu`.
    kind : {"body", "lungs"}
        "body": everything above −500 HU that is thicker than a table, with arms that touch it and both legs. "lungs":
        aerated lung, without trachea and bowel gas.

    Returns
    -------
    FoundBox
        The box is at most about one pixel larger than the object.
    """
    axes = volume.geometry.to_axial.axes
    spacing_mm = volume.geometry.spacing_mm
    cell_mm = (spacing_mm[0], spacing_mm[1] * STEP, spacing_mm[2] * STEP)
    field_mm = min(coarse.shape[axis] * cell_mm[axis] for axis in axes[1:])
    search_mm = min(SEARCH_MM, SEARCH_SHARE * field_mm)
    step = max(1, int(search_mm / cell_mm[axes[0]]))
    axial_mm = (cell_mm[axes[0]] * step, cell_mm[axes[1]], cell_mm[axes[2]])
    hu = np.ascontiguousarray(coarse.transpose(axes)[::step])
    unmeasured = _unmeasured(volume)
    body = find_body(hu, axial_mm, unmeasured if axes[0] == 0 else None)
    if body.mask is None:
        return _not_found(f"no body: {body.problem}")
    if kind == "body":
        table_mm = table_thickness_mm(hu.shape, axial_mm)
        tube_mm = min(TUBE_MM, TUBE_SHARE * _smaller_side_mm(body.mask, axial_mm))
        look = Look(False, TISSUE_ABOVE_HU, FAINT_SKIN_HU, reach_mm=search_mm, support_mm=tube_mm, table_mm=table_mm)
        found = _on_all_slices(body.mask, step, axes, coarse.shape) & (coarse > TISSUE_ABOVE_HU)
        refined = refine(volume, coarse, found, look, table_axes=axes[1:])
        small = _small_body(refined.box, volume)
    else:
        lungs = find_lungs(hu, body.like, body.mask)
        if lungs.mask is None:
            return _not_found(f"no lungs: {lungs.problem}")
        look = Look(True, TISSUE_ABOVE_HU, FAINT_LUNG_HU, reach_mm=search_mm, support_mm=0, table_mm=0)
        found = _on_all_slices(lungs.mask, step, axes, coarse.shape)
        found &= (coarse <= TISSUE_ABOVE_HU) & (coarse > PURE_AIR_BELOW_HU)
        refined = refine(volume, coarse, found, look, table_axes=())
        small = _small_lungs(refined.box, lungs.share)
    return FoundBox(refined.box, (*small, *_edges(refined, found, unmeasured, kind)))


def _on_all_slices(mask: Mask, step: int, axes: tuple[int, int, int], shape: tuple[int, ...]) -> Mask:
    """Return a mask of every `step`-th axial plane on all of them, in the orientation of the source."""
    nearest = np.minimum((np.arange(shape[axes[0]]) + step // 2) // step, len(mask) - 1)
    return (mask if step == 1 else mask[nearest]).transpose(np.argsort(axes))


def _not_found(reason: str) -> FoundBox:
    return FoundBox(None, (SeriesWarning("crop-not-found", reason),))


def _smaller_side_mm(mask: Mask, spacing_mm: Vector3) -> float:
    """Return the smaller side of a mask in axial planes."""
    rows, columns = (np.count_nonzero(mask.any(axis=(0, axis))) for axis in (2, 1))
    return min(rows * spacing_mm[1], columns * spacing_mm[2])


def _unmeasured(volume: StoredVolume) -> Mask | None:
    """Return the samples outside the circle of reconstruction, from the middle slice; None without such a circle."""
    k = len(volume.stored) // 2
    values = volume.stored[k, ::STEP, ::STEP]
    outside: Mask = values * volume.slope[k] + volume.intercept[k] < LOWEST_HU
    if volume.padding is not None:
        outside |= (values >= volume.padding[k, 0]) & (values <= volume.padding[k, 1])
    for axis in (0, 1):  # single samples of air may have noise below it
        outside = opened(outside, 3, axis)
    corners = outside[[0, 0, -1, -1], [0, -1, 0, -1]]
    return outside if corners.all() and not outside.all() else None


def _small_body(box: IndexBox, volume: StoredVolume) -> tuple[SeriesWarning, ...]:
    """Return a warning if a box is implausibly small for a body."""
    _, rows, columns = box.shape
    _, all_rows, all_columns = volume.geometry.shape
    share = rows * columns / (all_rows * all_columns)
    if share >= SMALL_BODY:
        return ()
    _, row_mm, column_mm = volume.geometry.spacing_mm
    text = (
        f"the box of the body is {rows * row_mm:.0f} x {columns * column_mm:.0f} mm in a slice, {share:.1%} of the "
        f"field of view (usual: over {SMALL_BODY:.0%})"
    )
    return (SeriesWarning("crop-small", text),)


def _small_lungs(box: IndexBox, share: float) -> tuple[SeriesWarning, ...]:
    """Return a warning if lungs are implausibly small for the body around them."""
    if share >= SMALL_LUNGS:
        return ()
    text = (
        f"lungs cover at most {share:.1%} of the body in a slice (usual: over {SMALL_LUNGS:.0%}); their box has "
        f"{box.shape[0]} x {box.shape[1]} x {box.shape[2]} voxels"
    )
    return (SeriesWarning("crop-small", text),)


def _edges(refined: Refined, found: Mask, unmeasured: Mask | None, kind: str) -> tuple[SeriesWarning, ...]:
    """Return a warning if a box ends where the field of view ends, in the plane of the slices."""
    borders = list(refined.cut)
    if unmeasured is not None and (found.any(axis=0) & dilated(dilated(unmeasured, 0), 1)).any():
        borders.append("circle of reconstruction")
    if not borders:
        return ()
    verb = "reaches" if kind == "body" else "reach"
    text = f"the {kind} {verb} the border of the field of view ({', '.join(borders)}): the rest was not measured"
    return (SeriesWarning("crop-edge", text),)
