"""Finds one face of a box outward from an object, plane by plane, and removes a table that touches the object there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute.plane_masks import Mask, dilated, opened

MAX_PLATE_SLOPE = 0.15
"""Largest slope of a table within its contact with the object, in planes by voxel of a line."""


@dataclass(frozen=True, slots=True, eq=False)
class Shell:
    """Planes across which a face is found, from inside outward; a plane consists of lines."""

    dense: Mask
    """Voxels that may belong to the object, shape (planes, lines, voxels of a line)."""
    seeds: Mask
    """Voxels that belong to it in every `step`-th plane, or in the first of these planes."""
    step: int
    limit: int
    """First plane that the object does not reach; what goes beyond it is not the object."""
    support: int
    """Smallest width of the object along a line, in voxels; tubes are narrower."""
    plate: int
    """Largest thickness of a table, in planes; 0 if there is none in this direction."""


def depths(shell: Shell) -> tuple[NDArray[np.int16], Mask]:
    """Return the outermost plane of the object at each voxel of a plane, and where a table was removed there.

    Both have shape (lines, voxels); the plane is −1 where the object is absent. On a plane, the object is what is dense
    next to the object on the plane before.
    """
    reached = far = _reached(shell)
    if shell.plate and _has_steps(far, shell.plate):
        far = _without_plate(shell, far)
    return np.minimum(far, np.int16(shell.limit - 1)), far < reached


def _reached(shell: Shell) -> NDArray[np.int16]:
    """Return the outermost plane of the object at each voxel of a plane; −1 for none. Shape (lines, voxels)."""
    planes = len(shell.dense)
    far = np.full(shell.dense.shape[1:], -1, dtype=np.int16)
    reached = np.zeros(far.shape, dtype=bool)
    last = (len(shell.seeds) - 1) * shell.step
    for d in range(planes if shell.plate else shell.limit):
        sampled = d <= last and d % shell.step == 0
        if sampled:
            reached |= shell.seeds[d // shell.step]
        if reached.any():
            dense = opened(shell.dense[d], shell.support, 1)
            for _ in range(shell.step if sampled else 1):  # samples are this far apart
                reached = dilated(reached, 1)
                reached &= dense
        elif d > last:
            break
        np.copyto(far, np.int16(d), where=reached)
    return far


def _has_steps(far: NDArray[np.int16], plate: int) -> bool:
    """Return whether the outermost part of a face has steps, as at both ends of its contact with a table."""
    steps = np.abs(np.diff(far, axis=1)) > 1
    steps &= np.maximum(far[:, 1:], far[:, :-1]) >= max(0, int(far.max()) - plate)
    return bool(steps.any())


def _without_plate(shell: Shell, far: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return the outermost planes without a table that touches the object.

    Beside the contact, a gap separates table and object, so its thickness is known there, on both sides. In the
    contact there is no gap, and the object seems to end where the table ends.
    """
    dense = opened(shell.dense, shell.support, 2)
    planes = np.arange(len(dense), dtype=np.int16)[:, None, None]
    beyond = dense & (planes > far)
    apart = beyond.any(axis=0)
    start = beyond.argmax(axis=0)
    after = ~dense & (planes > start.astype(np.int16))
    end = after.argmax(axis=0) - 1
    thickness = end - start + 1
    seen = apart & after.any(axis=0) & (start >= far + 2) & (thickness <= shell.plate)
    count = far.shape[1]
    voxel = np.arange(count)
    left = np.maximum.accumulate(np.where(seen, voxel, -1), axis=1)
    right = np.minimum.accumulate(np.where(seen, voxel, count)[:, ::-1], axis=1)[:, ::-1]
    contact = (left >= 0) & (right < count) & ~apart & (far >= 0)
    line, at = np.nonzero(contact)
    low, high = left[line, at], right[line, at]
    thin = np.minimum(thickness[line, low], thickness[line, high])
    expected = end[line, low] + (end[line, high] - end[line, low]) * (at - low) / (high - low)
    tolerance = np.maximum(1, thin / 2) + MAX_PLATE_SLOPE * np.minimum(at - low, high - at)
    # The object ends deeper by table and gap where the contact begins. A sheet that just fades away makes no such step.
    steps = (far[line, low + 1] - far[line, low] > thickness[line, low]) & (
        far[line, high - 1] - far[line, high] > thickness[line, high]
    )
    merged = steps & (np.abs(far[line, at] - expected) <= tolerance)
    far = far.copy()
    far[line[merged], at[merged]] -= thin[merged].astype(np.int16)
    return far
