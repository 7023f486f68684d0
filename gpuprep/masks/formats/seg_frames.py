"""Reads the positions of the frames of a segmentation image (SEG) from its functional groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.geometry import COARSEST_MM, FINEST_MM, PERPENDICULARITY_TOLERANCE, Geometry, directions
from gpuprep.errors import SegmentationError
from gpuprep.masks.formats.seg_image import SegImage
from gpuprep.masks.formats.segmentation_values import binary, decimals, image_frames, items, raw, text
from gpuprep.masks.model import ONE_PLANE_MM, ImageFrame, Slab, SliceKey
from gpuprep.masks.text_parsing import LARGEST_COORDINATE

if TYPE_CHECKING:
    import pydicom


EVEN = 0.1
"""Largest relative deviation from the median at which distances between planes are even."""


NEIGHBOUR_SPACINGS = 1.5
"""Largest distance of neighbouring planes, in spacings; farther planes have empty planes left out between them."""


@dataclass(frozen=True, slots=True)
class FramePosition:
    """Position of a frame: either its image (`slice`), or `geometry` and `slab`."""

    slice: SliceKey | None
    geometry: Geometry | None
    slab: Slab | None
    sources: frozenset[ImageFrame]
    """Images that the frame was derived from."""


class Groups:
    """Functional groups of an object: those of each frame, and the shared ones."""

    def __init__(self, ds: pydicom.Dataset, image: SegImage) -> None:
        self.sop_uids: set[str] = set()
        self._shape = (1, image.rows, image.columns)
        self._own = items(ds, "PerFrameFunctionalGroupsSequence")
        if len(self._own) != image.frames:
            raise SegmentationError(
                f"it has functional groups of {len(self._own)} frames, but Number of Frames is {image.frames}: "
                "it is damaged"
            )
        self._shared = [*items(ds, "SharedFunctionalGroupsSequence")][:1]
        self._known_sources: dict[bytes, frozenset[ImageFrame]] = {}
        self._known_geometries: dict[tuple[str, ...], tuple[Geometry, Slab]] = {}

    def segment(self, frame: int, segments: dict[int, str]) -> int:
        """Return the segment number of a frame; if the frame has none, that of the only segment."""
        macro = self._macro(frame, "SegmentIdentificationSequence")
        number = None if macro is None else binary(macro, "ReferencedSegmentNumber")
        if number is None and len(segments) == 1:
            return next(iter(segments))
        if number is None:
            raise SegmentationError(f"frame {frame + 1} does not say which of {len(segments)} segments it belongs to")
        return number

    def position(self, frame: int) -> FramePosition:
        """Return the position of a frame: in the patient, else by the image that it was derived from."""
        sources = self._sources(frame)
        uids = {source.sop_uid for source in sources}
        self.sop_uids |= uids
        try:
            found = self._geometry_and_slab(frame)
        except SegmentationError as exc:
            raise SegmentationError(f"frame {frame + 1}: {exc}") from None
        if found is not None:
            geometry, slab = found
            if len(sources) == 1:  # in an image of several frames, the position tells which frame it was
                slab = slab._replace(source_uid=next(iter(uids)))
            elif sources:
                slab = slab._replace(is_known=True)
            return FramePosition(None, geometry, slab, sources)
        if len(uids) == 1 and not any(source.number for source in sources):
            return FramePosition(SliceKey("uid", next(iter(uids))), None, None, sources)
        raise SegmentationError(
            f"frame {frame + 1} does not say where it lies: it lacks its position, orientation or pixel spacing, and "
            f"refers to {len(uids)} images"
        )

    def _geometry_and_slab(self, frame: int) -> tuple[Geometry, Slab] | None:
        plane_position = self._macro(frame, "PlanePositionSequence")
        plane_orientation = self._macro(frame, "PlaneOrientationSequence")
        measures = self._macro(frame, "PixelMeasuresSequence")
        if plane_position is None or plane_orientation is None or measures is None:
            return None
        distances = ("SpacingBetweenSlices", "SliceThickness")
        key = (
            text(plane_position, "ImagePositionPatient"),
            text(plane_orientation, "ImageOrientationPatient"),
            *(text(measures, k) for k in ("PixelSpacing", *distances)),
        )
        if key not in self._known_geometries:
            position = decimals(plane_position, "ImagePositionPatient", 3, LARGEST_COORDINATE)
            orientation = decimals(plane_orientation, "ImageOrientationPatient", 6, 1 + PERPENDICULARITY_TOLERANCE)
            spacing = decimals(measures, "PixelSpacing", 2, COARSEST_MM)
            if position is None or orientation is None or spacing is None:
                return None
            stated_mm, thickness_mm = (_distance(measures, k) for k in distances)
            planes = self._planes.get(key[1], NO_PLANES)
            # The layer is no thicker than the smallest distance between planes: overlapping slices state a thickness
            # that exceeds their spacing.
            layer_mm = min(stated_mm or thickness_mm or 1.0, planes.closest_mm)
            geometry = _plane(self._shape, position, orientation, (layer_mm, *spacing))
            normal = geometry.affine[:3, 0] / layer_mm
            self._known_geometries[key] = geometry, planes.slab(float(normal @ position), stated_mm, thickness_mm)
        return self._known_geometries[key]

    @cached_property
    def _planes(self) -> dict[str, Planes]:
        """Planes of all frames, by orientation as written in the file."""
        positions: dict[str, set[str]] = {}
        for frame in range(len(self._own)):
            plane_position = self._macro(frame, "PlanePositionSequence")
            plane_orientation = self._macro(frame, "PlaneOrientationSequence")
            if plane_position is not None and plane_orientation is not None:
                found = positions.setdefault(text(plane_orientation, "ImageOrientationPatient"), set())
                found.add(text(plane_position, "ImagePositionPatient"))
        return {orientation: Planes.of(orientation, found) for orientation, found in positions.items()}

    def _sources(self, frame: int) -> frozenset[ImageFrame]:
        """Return the images, or frames of an image, that a frame was derived from."""
        for group in (self._own[frame], *self._shared):
            encoded = raw(group, "DerivationImageSequence")
            if isinstance(encoded, bytes) and encoded in self._known_sources:
                sources = self._known_sources[encoded]  # frames of one slice repeat the same bytes
            else:
                derivations = items(group, "DerivationImageSequence")
                named = [items(derivation, "SourceImageSequence") for derivation in derivations]
                sources = frozenset().union(*(image_frames(image) for images in named for image in images))
            if isinstance(encoded, bytes):
                self._known_sources[encoded] = sources
            if sources:
                return sources
        return frozenset()

    def _macro(self, frame: int, keyword: str) -> pydicom.Dataset | None:
        """Return the item of a functional group macro: the frame's own, else the shared one, else None."""
        for group in (self._own[frame], *self._shared):
            if found := items(group, keyword):
                return found[0]
        return None


@dataclass(frozen=True, slots=True)
class Planes:
    """Positions of the planes of all frames of one orientation."""

    offsets_mm: NDArray[np.float64]
    """Offsets along the normal, ascending, shape (n,)."""

    @staticmethod
    def of(orientation: str, positions: set[str]) -> Planes:
        """Return the planes from *Image Orientation (Patient)* and *Image Position (Patient)* as written."""
        cosines = _numbers(orientation, 6)
        points = [p for written in positions if (p := _numbers(written, 3)) is not None]
        axes = None if cosines is None else directions(cosines)
        if axes is None or not points:
            return NO_PLANES
        offsets = np.sort(np.array(points) @ axes[2])
        return Planes(offsets[np.diff(offsets, prepend=-math.inf) > ONE_PLANE_MM])

    @property
    def closest_mm(self) -> float:
        """Smallest distance between two planes; infinite for a single plane."""
        return float(min(np.diff(self.offsets_mm), default=math.inf))

    def slab(self, offset_mm: float, stated_mm: float | None, thickness_mm: float | None) -> Slab:
        """Return the extent of the plane at an offset.

        Parameters
        ----------
        offset_mm : float
            Offset along the normal.
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
            float(gap[0] if len(gap) and gap[0] <= NEIGHBOUR_SPACINGS * spacing_mm else spacing_mm) / 2
            for gap in (gaps[max(n - 1, 0) : n], gaps[n : n + 1])
        )
        return Slab(below, above, even or stated_mm is not None)


NO_PLANES = Planes(np.empty(0))


def _distance(measures: pydicom.Dataset, keyword: str) -> float | None:
    """Return a distance along the normal in mm; None if it is absent or below `FINEST_MM`."""
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
    """Return `count` numbers of a text; None if it holds anything else, which is an error when the frame is read."""
    try:
        values = tuple(map(float, written.split("\\")))
    except ValueError:
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None
