"""Finds slices of a series by position, number or UID, for contours and painted planes."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.mask_options import ReadingOptions
from gpuprep.dicom.stack import Stack
from gpuprep.errors import SegmentationError
from gpuprep.masks import oblique_planes
from gpuprep.masks.model import Segmentation, SliceKey

ROUNDING = 1e-3
"""Rounding error of positions in files, in layers."""

HALF_LAYER = 0.5 + ROUNDING
"""Largest distance, in layers, between a slice and a contour or plane on it."""

SAME_PLANE = 0.1
"""Largest distance, in layers, between parts of a structure in one plane. `SAME_PLANE_MM` applies too."""

SAME_PLANE_MM = 0.1
"""Limit in mm for thick layers: within a layer of 8 mm there may be separate planes of thin slices."""

EVEN = 0.1
"""Largest distance, in layers, of slices from evenly spaced positions that is ignored."""


class SeriesSlices:
    """Slices of a stack by position, slice number and SOP Instance UID.

    A layer is the distance of neighbouring slices of the grid; positions along the normal are in layers.
    """

    def __init__(self, segmentation: Segmentation, stack: Stack, reading: ReadingOptions) -> None:
        count = len(stack.slices)
        placement = stack.placement
        self.matrix = stack.matrix
        self.to_index = np.linalg.inv(stack.geometry.affine)
        self.along = np.arange(count, dtype=np.float64) if placement is None else placement.along
        self.shift = np.zeros((count, 2)) if placement is None or placement.shift is None else placement.shift
        if placement is None and all(header.position_mm for header in stack.slices):
            # With the policy "keep", uneven slices have no placement. Contours still belong to the slice they lie on.
            positions = np.array([header.position_mm for header in stack.slices])
            where = positions @ self.to_index[:3, :3].T + self.to_index[:3, 3]
            if np.abs(where[:, 0] - self.along).max() > EVEN:
                self.along, self.shift = where[:, 0], where[:, 1:]
        self.spacing_mm = stack.geometry.spacing_mm
        self._by_uid: dict[str, set[int]] = defaultdict(set)
        for n, header in (*enumerate(stack.slices), *stack.duplicates):
            self._by_uid[header.sop_instance_uid].add(n)
        named = segmentation.sop_uids
        self.has_named_images = not named or not named.isdisjoint(self._by_uid)
        """Whether the segmentation refers to an image of the series, or to no image at all."""
        self.oblique = oblique_planes.Slices(stack.geometry.affine, self.along, self.shift, self.matrix)
        self._z = np.array([header.position_mm[2] for header in stack.slices if header.position_mm])
        self._by_number = _numbering(segmentation, stack, reading)

    def nearest(self, k: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the slice within half a layer of each position `k`, in layers; −1 if there is none."""
        above = np.clip(np.searchsorted(self.along, k), 1, len(self.along) - 1)
        to_lower, to_upper = np.abs(k - self.along[above - 1]), np.abs(k - self.along[above])
        n = np.where(to_lower <= to_upper + 2 * ROUNDING, above - 1, above)  # half-way: the lower one
        return np.where(np.minimum(to_lower, to_upper) <= HALF_LAYER, n, -1)

    def overlap(self, k: NDArray[np.float64]) -> bool:
        """Return whether the range of positions `k`, in layers, overlaps that from the first slice to the last."""
        return bool(k.max() >= self.along[0] - ROUNDING and k.min() <= self.along[-1] + ROUNDING)

    @property
    def plane_layers(self) -> float:
        """Largest distance, in layers, between parts of a structure in one plane."""
        return min(SAME_PLANE, SAME_PLANE_MM / self.spacing_mm[0])

    def same_plane(self, k: float) -> int | None:
        """Return the slice whose plane contains position `k`, in layers; None if there is none."""
        n = int(np.abs(self.along - k).argmin())
        return n if abs(self.along[n] - k) <= self.plane_layers else None

    def is_image(self, n: int, sop_instance_uid: str) -> bool:
        """Return whether slice `n` is, or is a frame of, the image with that UID."""
        return n in self._by_uid.get(sop_instance_uid, ())

    def within(self, k: float, half: float) -> list[int]:
        """Return the slices within `half` layers of position `k`."""
        return np.flatnonzero(np.abs(self.along - k) <= half).tolist()

    def find(self, key: SliceKey | None) -> int | None:
        """Return the slice that a key names; None if there is no such slice.

        Raises
        ------
        SegmentationError
            If there is no key, or keys of that kind cannot identify slices of this series.
        """
        if key is None:
            raise SegmentationError(
                "it does not say which slice it belongs to: put the slice's number, z or SOP Instance UID into the "
                "file name, or use --slice-from name|column|z|uid"
            )
        if key.by == "number":
            return self._by_number.get(float(key.value))
        if key.by == "uid":
            found = self._by_uid.get(str(key.value), set())
            if len(found) > 1:
                raise SegmentationError(
                    "it names slices by SOP Instance UID, but several slices of the series are frames of one image"
                )
            return next(iter(found), None)
        step = float(np.abs(np.diff(self._z)).min())
        if step < 0.1 * self.spacing_mm[0]:
            raise SegmentationError("it names slices by z, but the slices of the series do not advance along z")
        n = int(np.abs(self._z - float(key.value)).argmin())
        return n if abs(self._z[n] - float(key.value)) <= HALF_LAYER * step else None


def _numbering(segmentation: Segmentation, stack: Stack, reading: ReadingOptions) -> dict[float, int]:
    """Return the slice of each slice number of a segmentation.

    Numbers count slices from 0 or 1, along the normal or by *Instance Number*. Numberings that contain all numbers of
    the segmentation are possible. If these give different slices, an error names the options that decide.
    """
    keys = {c.slice for s in segmentation.structures for c in s.contours}
    keys |= {r.slice for s in segmentation.structures for r in s.rasters}
    numbers = {float(key.value) for key in keys if key is not None and key.by == "number"}
    if not numbers:
        return {}
    count = len(stack.slices)
    numberings: dict[str, dict[float, int]] = {}
    instances = [s.instance_number for s in stack.slices]
    if reading.slice_order != "stack" and None not in instances and len(set(instances)) == count:
        if reading.index_base is None:
            numberings["Instance Number"] = {float(v): n for n, v in enumerate(instances) if v is not None}
        else:
            order = np.argsort([v or 0 for v in instances], kind="stable")
            numberings["Instance Number"] = {float(k + reading.index_base): int(n) for k, n in enumerate(order)}
    if reading.slice_order != "instance":
        for base in (0, 1) if reading.index_base is None else (reading.index_base,):
            numberings[f"place along the normal, counted from {base}"] = {float(k + base): k for k in range(count)}
    if not numberings:
        raise SegmentationError("Instance Numbers of the series are absent or not unique: use --slice-order stack")
    fitting = {name: numbering for name, numbering in numberings.items() if numbers <= numbering.keys()}
    # If no numbering contains all numbers, the one that contains most of them is taken, unless there are several.
    most = max(len(numbers & numbering.keys()) for numbering in numberings.values())
    fitting = fitting or {
        name: numbering for name, numbering in numberings.items() if len(numbers & numbering.keys()) == most
    }
    results = {tuple(numbering.get(n) for n in sorted(numbers)) for numbering in fitting.values()}
    if len(results) > 1:
        which = f"slice numbers {min(numbers):g} to {max(numbers):g}" if len(numbers) > 1 else f"slice {min(numbers):g}"
        options = [] if reading.index_base is not None else ["--index-base 0|1"]
        options += [] if reading.slice_order is not None else ["--slice-order stack|instance"]
        raise SegmentationError(f"{which} of {count} may be by {', or '.join(fitting)}: use {' and '.join(options)}")
    return next(iter(fitting.values()))
