"""Finds slices of a series by position, number or UID, for contours and painted planes."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.mask_options import Reading
from gpuprep.dicom.stack import Stack
from gpuprep.errors import SegmentationError
from gpuprep.masks import oblique_planes
from gpuprep.masks.model import Segmentation, SliceKey

ROUNDED = 1e-3
"""Layers by which positions in files may be off."""


HALF_LAYER = 0.5 + ROUNDED
"""Layers up to which something lies on a slice."""


SAME_PLANE = 0.1
"""Layers within which parts of a structure lie in one plane …"""

SAME_PLANE_MM = 0.1
"""… and millimetres: slices of half a millimetre are close together in a layer of eight."""

EVEN = 0.1
"""Layers by which slices may lie beside even ones."""


class SeriesSlices:
    """The slices of a stack, as segmentations speak of them."""

    def __init__(self, segmentation: Segmentation, stack: Stack, reading: Reading) -> None:
        count = len(stack.slices)
        placement = stack.placement
        self.matrix = stack.matrix
        self.to_index = np.linalg.inv(stack.geometry.affine)
        self.along = np.arange(count, dtype=np.float64) if placement is None else placement.along
        self.shift = np.zeros((count, 2)) if placement is None or placement.shift is None else placement.shift
        if placement is None and all(header.position_mm for header in stack.slices):
            # Kept as they are, slices may lie elsewhere than in even layers: what is drawn on one belongs on that one.
            positions = np.array([header.position_mm for header in stack.slices])
            where = positions @ self.to_index[:3, :3].T + self.to_index[:3, 3]
            if np.abs(where[:, 0] - self.along).max() > EVEN:
                self.along, self.shift = where[:, 0], where[:, 1:]
        self.spacing_mm = stack.geometry.spacing_mm
        self._by_uid: dict[str, set[int]] = defaultdict(set)
        for n, header in (*enumerate(stack.slices), *stack.duplicates):
            self._by_uid[header.sop_instance_uid].add(n)
        named = segmentation.sop_uids
        self.are_named = not named or not named.isdisjoint(self._by_uid)
        """Whether the images that the segmentation names, if it names any, are among them."""
        self.oblique = oblique_planes.Slices(stack.geometry.affine, self.along, self.shift, self.matrix)
        self._z = np.array([header.position_mm[2] for header in stack.slices if header.position_mm])
        self._by_number = _numbering(segmentation, stack, reading)

    def nearest(self, k: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the slices within half a layer of layers `k`; −1 where there is none."""
        above = np.clip(np.searchsorted(self.along, k), 1, len(self.along) - 1)
        to_lower, to_upper = np.abs(k - self.along[above - 1]), np.abs(k - self.along[above])
        n = np.where(to_lower <= to_upper + 2 * ROUNDED, above - 1, above)  # half-way, always the lower one
        return np.where(np.minimum(to_lower, to_upper) <= HALF_LAYER, n, -1)

    def are_between(self, k: NDArray[np.float64]) -> bool:
        """Whether a part of what reaches over layers `k` lies within half a layer of the first to the last slice."""
        return bool(k.max() >= self.along[0] - HALF_LAYER and k.min() <= self.along[-1] + HALF_LAYER)

    @property
    def plane_layers(self) -> float:
        """Layers within which parts of a structure lie in one plane."""
        return min(SAME_PLANE, SAME_PLANE_MM / self.spacing_mm[0])

    def same_plane(self, k: float) -> int | None:
        """Return the slice in whose plane layer `k` lies; None where there is none."""
        n = int(np.abs(self.along - k).argmin())
        return n if abs(self.along[n] - k) <= self.plane_layers else None

    def is_of(self, n: int, sop_instance_uid: str) -> bool:
        """Whether a slice is of the image with that UID."""
        return n in self._by_uid.get(sop_instance_uid, ())

    def within(self, k: float, half: float) -> list[int]:
        """Return the slices within `half` layers of layer `k`."""
        return np.flatnonzero(np.abs(self.along - k) <= half).tolist()

    def find(self, key: SliceKey | None) -> int | None:
        """Return the slice that a key means; None where there is no such slice.

        Raises
        ------
        SegmentationError
            If keys of that kind mean nothing here.
        """
        if key is None:
            raise SegmentationError(
                "it does not say which slice it belongs to: put the slice's number, z or SOP Instance UID into the "
                "file name, or say --slice-from name|column|z|uid"
            )
        if key.by == "number":
            return self._by_number.get(float(key.value))
        if key.by == "uid":
            found = self._by_uid.get(str(key.value), set())
            if len(found) > 1:
                raise SegmentationError("its slices are frames of one image, whose UID does not tell them apart")
            return next(iter(found), None)
        step = float(np.abs(np.diff(self._z)).min())
        if step < 0.1 * self.spacing_mm[0]:
            raise SegmentationError("it names slices by z, along which the slices of this series do not advance")
        n = int(np.abs(self._z - float(key.value)).argmin())
        return n if abs(self._z[n] - float(key.value)) <= HALF_LAYER * step else None


def _numbering(segmentation: Segmentation, stack: Stack, reading: Reading) -> dict[float, int]:
    """Return the slice that each slice number of a segmentation means, as far as there is one.

    Numbers may count slices from 0 or 1, along the normal or as *Instance Number* does. Whatever leaves no number
    outside is possible; if what is possible differs, people have to say.
    """
    keys = {c.slice for s in segmentation.structures for c in s.contours}
    keys |= {r.slice for s in segmentation.structures for r in s.rasters}
    numbers = {float(key.value) for key in keys if key is not None and key.by == "number"}
    if not numbers:
        return {}
    count = len(stack.slices)
    ways: dict[str, dict[float, int]] = {}
    instances = [s.instance_number for s in stack.slices]
    if reading.slice_order != "stack" and None not in instances and len(set(instances)) == count:
        if reading.index_base is None:
            ways["Instance Number"] = {float(v): n for n, v in enumerate(instances) if v is not None}
        else:
            order = np.argsort([v or 0 for v in instances], kind="stable")
            ways["Instance Number"] = {float(k + reading.index_base): int(n) for k, n in enumerate(order)}
    if reading.slice_order != "instance":
        for base in (0, 1) if reading.index_base is None else (reading.index_base,):
            ways[f"place along the normal, counted from {base}"] = {float(k + base): k for k in range(count)}
    if not ways:
        raise SegmentationError("Instance Numbers of the series are absent or not unique: say --slice-order stack")
    fitting = {name: way for name, way in ways.items() if numbers <= way.keys()}
    # Where none fits all, the way that fits most, if it does so alone.
    most = max(len(numbers & way.keys()) for way in ways.values())
    fitting = fitting or {name: way for name, way in ways.items() if len(numbers & way.keys()) == most}
    meanings = {tuple(way.get(n) for n in sorted(numbers)) for way in fitting.values()}
    if len(meanings) > 1:
        of = f"slice numbers {min(numbers):g} to {max(numbers):g}" if len(numbers) > 1 else f"slice {min(numbers):g}"
        open_ = [] if reading.index_base is not None else ["--index-base 0|1"]
        open_ += [] if reading.slice_order is not None else ["--slice-order stack|instance"]
        raise SegmentationError(f"{of} of {count} may be by {', or '.join(fitting)}: say {' and '.join(open_)}")
    return next(iter(fitting.values()))
