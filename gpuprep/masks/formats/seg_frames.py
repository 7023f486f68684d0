"""Places the frames of a segmentation image (SEG) by its functional groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.geometry import COARSEST_MM, FINEST_MM, PERPENDICULAR, Geometry, directions
from gpuprep.errors import SegmentationError
from gpuprep.masks.formats.dicom_elements import binary, decimals, image_frames, items, raw, text
from gpuprep.masks.formats.seg_image import SegImage
from gpuprep.masks.model import ONE_PLANE_MM, ImageFrame, Slab, SliceKey
from gpuprep.masks.text_parsing import LARGEST_COORDINATE

if TYPE_CHECKING:
    import pydicom


EVEN = 0.1
"""Share by which distances between planes may differ from their median and are even."""


NEXT = 1.5
"""Up to so many spacings away, another plane is the next one; farther away, empty planes between were left out."""


@dataclass(frozen=True, slots=True)
class FramePlace:
    """Where a frame lies."""

    slice: SliceKey | None
    geometry: Geometry | None
    slab: Slab | None
    sources: frozenset[ImageFrame]
    """Images that the frame was made from."""


class Groups:
    """The functional groups: what each frame says of itself, and what all of them share."""

    def __init__(self, ds: pydicom.Dataset, image: SegImage) -> None:
        self.sop_uids: set[str] = set()
        self._shape = (1, image.rows, image.columns)
        self._own = items(ds, "PerFrameFunctionalGroupsSequence")
        if len(self._own) != image.frames:
            raise SegmentationError(
                f"it has functional groups of {len(self._own)} frames and says it has {image.frames}: it is damaged"
            )
        self._shared = [*items(ds, "SharedFunctionalGroupsSequence")][:1]
        self._sources: dict[bytes, frozenset[ImageFrame]] = {}
        self._places: dict[tuple[str, ...], tuple[Geometry, Slab]] = {}

    def segment(self, frame: int, segments: dict[int, str]) -> int:
        """Return the number of the segment of a frame; the only one where it does not say."""
        macro = self._macro(frame, "SegmentIdentificationSequence")
        number = None if macro is None else binary(macro, "ReferencedSegmentNumber")
        if number is None and len(segments) == 1:
            return next(iter(segments))
        if number is None:
            raise SegmentationError(f"frame {frame + 1} does not say which of {len(segments)} segments it is of")
        return number

    def place(self, frame: int) -> FramePlace:
        """Return where a frame lies: in the patient, or on which image if it does not say that."""
        sources = self._source(frame)
        uids = {source.sop_uid for source in sources}
        self.sop_uids |= uids
        try:
            measured = self._measured(frame)
        except SegmentationError as exc:
            raise SegmentationError(f"frame {frame + 1}: {exc}") from None
        if measured is not None:
            geometry, slab = measured
            if len(sources) == 1:  # which frame of it, its place says
                slab = slab._replace(source_uid=next(iter(uids)))
            elif sources:
                slab = slab._replace(is_known=True)
            return FramePlace(None, geometry, slab, sources)
        if len(uids) == 1 and not any(source.number for source in sources):
            return FramePlace(SliceKey("uid", next(iter(uids))), None, None, sources)
        raise SegmentationError(
            f"frame {frame + 1} does not say where it lies: it lacks its position, orientation or pixel spacing, and "
            f"refers to {len(uids)} images"
        )

    def _measured(self, frame: int) -> tuple[Geometry, Slab] | None:
        where = self._macro(frame, "PlanePositionSequence")
        oriented = self._macro(frame, "PlaneOrientationSequence")
        measures = self._macro(frame, "PixelMeasuresSequence")
        if where is None or oriented is None or measures is None:
            return None
        distances = ("SpacingBetweenSlices", "SliceThickness")
        key = (
            text(where, "ImagePositionPatient"),
            text(oriented, "ImageOrientationPatient"),
            *(text(measures, k) for k in ("PixelSpacing", *distances)),
        )
        if key not in self._places:
            position = decimals(where, "ImagePositionPatient", 3, LARGEST_COORDINATE)
            orientation = decimals(oriented, "ImageOrientationPatient", 6, 1 + PERPENDICULAR)
            spacing = decimals(measures, "PixelSpacing", 2, COARSEST_MM)
            if position is None or orientation is None or spacing is None:
                return None
            stated_mm, thickness_mm = (_distance(measures, k) for k in distances)
            planes = self._planes.get(key[1], NO_PLANES)
            # A frame is one layer; how thick it is said to be has no bearing on where it lies. Slices that overlap are
            # thicker than they are far apart, and a frame stands for no more than its part of the way to the next.
            layer_mm = min(stated_mm or thickness_mm or 1.0, planes.closest_mm)
            geometry = _plane(self._shape, position, orientation, (layer_mm, *spacing))
            normal = geometry.affine[:3, 0] / layer_mm
            self._places[key] = geometry, planes.slab(float(normal @ position), stated_mm, thickness_mm)
        return self._places[key]

    @cached_property
    def _planes(self) -> dict[str, Planes]:
        """Where the planes of all frames lie along their normal, by orientation."""
        positions: dict[str, set[str]] = {}
        for frame in range(len(self._own)):
            where = self._macro(frame, "PlanePositionSequence")
            oriented = self._macro(frame, "PlaneOrientationSequence")
            if where is not None and oriented is not None:
                found = positions.setdefault(text(oriented, "ImageOrientationPatient"), set())
                found.add(text(where, "ImagePositionPatient"))
        return {written: Planes.of(written, found) for written, found in positions.items()}

    def _source(self, frame: int) -> frozenset[ImageFrame]:
        """Return the images, or frames of an image, that a frame was made from."""
        for layer in (self._own[frame], *self._shared):
            packed = raw(layer, "DerivationImageSequence")
            if isinstance(packed, bytes) and packed in self._sources:
                sources = self._sources[packed]  # frames of one slice refer to it in the same bytes
            else:
                derivations = items(layer, "DerivationImageSequence")
                named = [items(derivation, "SourceImageSequence") for derivation in derivations]
                sources = frozenset().union(*(image_frames(image) for images in named for image in images))
            if isinstance(packed, bytes):
                self._sources[packed] = sources
            if sources:
                return sources
        return frozenset()

    def _macro(self, frame: int, keyword: str) -> pydicom.Dataset | None:
        """Return what a macro holds: the frame's own, else the shared one; None where there is neither."""
        for layer in (self._own[frame], *self._shared):
            if found := items(layer, keyword):
                return found[0]
        return None


@dataclass(frozen=True, slots=True)
class Planes:
    """Planes of all frames of one orientation."""

    offsets_mm: NDArray[np.float64]
    """Along the normal, ascending, shape (n,)."""

    @staticmethod
    def of(orientation: str, positions: set[str]) -> Planes:
        """Return them from *Image Orientation (Patient)* and *Image Position (Patient)* as they are written."""
        pair, points = _numbers(orientation, 6), [p for written in positions if (p := _numbers(written, 3)) is not None]
        axes = None if pair is None else directions(pair)
        if axes is None or not points:
            return NO_PLANES
        offsets = np.sort(np.array(points) @ axes[2])
        return Planes(offsets[np.diff(offsets, prepend=-math.inf) > ONE_PLANE_MM])

    @property
    def closest_mm(self) -> float:
        """The smallest distance between two of them."""
        return float(min(np.diff(self.offsets_mm), default=math.inf))

    def slab(self, offset_mm: float, stated_mm: float | None, thickness_mm: float | None) -> Slab:
        """Return the extent of the plane at an offset.

        Parameters
        ----------
        offset_mm : float
            Along the normal.
        stated_mm, thickness_mm : float or None
            *Spacing Between Slices* and *Slice Thickness*.
        """
        gaps = np.diff(self.offsets_mm)
        even = len(gaps) > 1 and np.abs(gaps / np.median(gaps) - 1).max() <= EVEN
        if even:
            spacing_mm = min(stated_mm or math.inf, float(np.median(gaps)))
        else:
            spacing_mm = min(stated_mm or thickness_mm or 1.0, self.closest_mm)
        n = int(np.abs(self.offsets_mm - offset_mm).argmin()) if len(self.offsets_mm) else 0
        below, above = (
            float(gap[0] if len(gap) and gap[0] <= NEXT * spacing_mm else spacing_mm) / 2
            for gap in (gaps[max(n - 1, 0) : n], gaps[n : n + 1])
        )
        return Slab(below, above, even or stated_mm is not None)


NO_PLANES = Planes(np.empty(0))


def _distance(measures: pydicom.Dataset, keyword: str) -> float | None:
    """Return a distance along the normal; None where there is none that can be."""
    found = decimals(measures, keyword, 1, LARGEST_COORDINATE)
    return found[0] if found and found[0] >= FINEST_MM else None


def _plane(
    shape: tuple[int, int, int],
    position: tuple[float, ...],
    orientation: tuple[float, ...],
    spacing: tuple[float, ...],
) -> Geometry:
    axes = directions(orientation)
    if axes is None:
        raise SegmentationError(f"its Image Orientation Patient is {list(orientation)}, not perpendicular units")
    if min(spacing[1:]) < FINEST_MM:
        raise SegmentationError(f"its Pixel Spacing is {list(spacing[1:])} mm")
    row, column, normal = axes
    affine = np.eye(4)
    affine[:3, 0] = normal * spacing[0]
    affine[:3, 1] = column * spacing[1]  # the next row lies along a column
    affine[:3, 2] = row * spacing[2]
    affine[:3, 3] = position
    return Geometry(shape, affine)


def _numbers(written: str, count: int) -> tuple[float, ...] | None:
    """Return so many numbers; None where there are others, which is complained about when their frame is read."""
    try:
        values = tuple(map(float, written.split("\\")))
    except ValueError:
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None
