"""Finds the box around structures on the slices of a series."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from gpuprep.compute.crop_box import FoundBox
from gpuprep.core.formatting import first_few, printable
from gpuprep.core.geometry import IndexBox
from gpuprep.core.mask_options import normalised
from gpuprep.core.plan import CROP_NOT_FOUND
from gpuprep.core.stacking_rules import SeriesWarning
from gpuprep.dicom.stack import Stack
from gpuprep.masks.place_on_slices import PlacedStructure

NAMES_SHOWN = 5
"""Structures that a message names."""


def structures_box(placed: Sequence[PlacedStructure], names: Sequence[str], stack: Stack) -> FoundBox:
    """Return the box of the voxels of structures.

    Parameters
    ----------
    placed : sequence of PlacedStructure
        Structures of the series, under the names by which they are used.
    names : sequence of str
        Names of those to look at, in any case; all of them if there are none.
    stack : Stack
        Slices of the series.

    Returns
    -------
    FoundBox
        Box on the grid of the stack, without margin; None if no structure covers a voxel.
    """
    chosen = [p for p in placed if not names or normalised(p.name) in set(map(normalised, names))]
    drawn = {normalised(p.name) for p in chosen}
    missing = [name for name in names if normalised(name) not in drawn]
    if (box := box_of(chosen, stack)) is not None:
        warnings: tuple[SeriesWarning, ...] = ()
        if missing:
            text = f"nothing of {_listed(missing)} is drawn on the series: it is cropped to {_listed(sorted(drawn))}"
            warnings = (SeriesWarning("crop-partial", text),)
        return FoundBox(box, warnings)
    wanted = f"of {_listed(names)} " if names else ""
    there = _listed([p.name for p in placed]) if placed else "none"
    text = f"no voxel {wanted}is drawn on the series; its structures: {there}"
    return FoundBox(None, (SeriesWarning(CROP_NOT_FOUND, text),))


def box_of(structures: Iterable[PlacedStructure], stack: Stack) -> IndexBox | None:
    """Return the box of the voxels of structures on the grid of the stack; None if they cover none."""
    placement = stack.placement
    low, high = np.full(3, math.inf), np.full(3, -math.inf)
    for structure in structures:
        for n in structure.parts:
            (rows, columns), mask = structure.paint(n, stack.matrix)
            j, i = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if not len(j):
                continue
            layer = n if placement is None else placement.along[n]
            shift = (0.0, 0.0) if placement is None or placement.shift is None else placement.shift[n]
            first = layer, rows.start + j[0] + shift[0], columns.start + i[0] + shift[1]
            last = layer, rows.start + j[-1] + shift[0], columns.start + i[-1] + shift[1]
            low, high = np.minimum(low, np.floor(first)), np.maximum(high, np.ceil(last) + 1)
    if not np.isfinite(low).all():
        return None
    k, j0, i0 = (int(n) for n in low)
    k_stop, j_stop, i_stop = (int(min(n, m)) for n, m in zip(high, stack.geometry.shape, strict=True))
    return IndexBox((k, j0, i0), (k_stop, j_stop, i_stop))


def _listed(names: Sequence[str]) -> str:
    return first_few([printable(name) for name in names], NAMES_SHOWN)
