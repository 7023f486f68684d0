"""Segmentation images (SEG): painted frames, each with its place in the patient.

References
----------
DICOM PS3.3, C.8.20.2 (Segmentation Image module), C.7.6.16 (Multi-frame Functional Groups module).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import quoted
from gpuprep.core.geometry import COARSEST_MM, FINEST_MM, PERPENDICULAR, Geometry, directions
from gpuprep.core.mask_options import Reading
from gpuprep.core.series import SliceHeader
from gpuprep.dicom.deflate import inflated_frame
from gpuprep.dicom.encapsulation import fragments_of
from gpuprep.dicom.uids import ENCODINGS, UNDEFINED_LENGTH, syntax_name
from gpuprep.errors import DecodeError, SegmentationError
from gpuprep.masks.formats.dicom_elements import binary, decimals, image_frames, integer, items, name, raw, text, uid
from gpuprep.masks.model import ONE_PLANE_MM, Collector, ImageFrame, References, Segmentation, Slab, SliceKey, painted
from gpuprep.masks.text_parsing import FARTHEST, distinct

if TYPE_CHECKING:
    import pydicom

# gpuprep.dicom.decode, which imports pydicom, is imported where frames are encoded.

BITS = {"BINARY": (1, 8), "FRACTIONAL": (8, 16), "LABELMAP": (8, 16)}
"""*Bits Allocated* by *Segmentation Type*. The standard has 1 and 8 for the first two; the others are harmless."""

MOST_PIXELS = 2**26
"""Of a frame: 8192 × 8192. A code stream of a few bytes can announce any number."""
MOST_PAINTED = 2**32
"""Pixels in the rectangles of all frames together, which take a byte each."""

EVEN = 0.1
"""Share by which distances between planes may differ from their median and are even."""

NEXT = 1.5
"""Up to so many spacings away, another plane is the next one; farther away, empty planes between were left out."""


def read(ds: pydicom.Dataset, path: str, reading: Reading) -> Segmentation:
    """Return the painted pixels of a segmentation image, frame by frame.

    Of a fractional one, a pixel belongs to the segment where its share, which is value / *Maximum Fractional Value*, is
    `reading.threshold` or more, and more than 0. Of a label map, the *Pixel Padding Value* is background, and so is 0
    unless it is described as something else.

    Parameters
    ----------
    ds : pydicom.Dataset
        The file, its elements as they were read.
    path : str
        For messages.
    reading : Reading
        Says the threshold.

    Raises
    ------
    SegmentationError
        If frames cannot be decoded, do not say where they are, or are not as many and as large as the header says.
    """
    image = _Image.of(ds, path)
    segments = _segments(ds)
    background = _background(ds, segments) if image.type == "LABELMAP" else frozenset()
    names = {n: called for n, called in segments.items() if n not in background}
    groups = _Groups(ds, image)
    drawn_on: set[ImageFrame] = set()
    collector = Collector()
    for called in names.values():
        collector.declare(called)
    values_that_belong = _belonging(ds, image, reading.threshold)
    painted_px = 0
    notes: list[str] = []
    for frame, values in enumerate(image.decoded(ds)):
        place = groups.place(frame)
        if image.type == "LABELMAP":
            numbers = [int(n) for n in np.unique(values) if int(n) not in background]
        else:
            numbers = [groups.segment(frame, segments)]
            values = values != 0 if image.type == "BINARY" else values_that_belong.take(values)
        for number in numbers:
            mask = values == number if image.type == "LABELMAP" else values
            if number not in names:
                names[number] = _name_of_unknown(number, names)
                notes.append(f"segment {number} has pixels and no description")
                collector.declare(names[number])
            raster = painted(mask, place.slice, place.geometry, place.slab)
            if raster is None:
                continue
            painted_px += raster.mask.size
            if painted_px > MOST_PAINTED:
                raise SegmentationError(f"its segments take more than {MOST_PAINTED} pixels, up to frame {frame + 1}")
            collector.add(names[number], raster)
            drawn_on |= place.sources
    series, of_series = _references(ds)
    return Segmentation(
        path=path,
        format="SEG",
        why=f"SOP Class UID: Segmentation Storage, {image.type}",
        structures=collector.structures,
        series_uids=series,
        study_uids=frozenset({uid(ds, "StudyInstanceUID")} - {""}),
        frame_of_reference_uid=uid(ds, "FrameOfReferenceUID"),
        sop_uids=frozenset(of_series | groups.sop_uids),
        drawn_on=frozenset(drawn_on),
        notes=tuple(notes),
    )


def _belonging(ds: pydicom.Dataset, image: _Image, threshold: float) -> NDArray[np.bool_]:
    """Return which values of a fractional frame belong to its segment, by value."""
    if image.type != "FRACTIONAL":
        return np.empty(0, dtype=bool)
    values = np.arange(2**image.bits)
    whole = binary(ds, "MaximumFractionalValue")
    if not whole:
        raise SegmentationError("it is fractional and has no Maximum Fractional Value: what a whole is is not known")
    return (values / whole >= threshold) & (values > 0)


@dataclass(frozen=True, slots=True)
class _Image:
    """What the header says of the pixels."""

    path: str
    type: str
    rows: int
    columns: int
    bits: int
    frames: int
    encapsulated: bool
    syntax: str

    @staticmethod
    def of(ds: pydicom.Dataset, path: str) -> _Image:
        """Return it, checked, before anything is made room for."""
        kind = text(ds, "SegmentationType").upper()
        if kind not in BITS:
            raise SegmentationError(f"its Segmentation Type is {quoted(kind)}, not one of {', '.join(BITS)}")
        if text(ds, "DimensionOrganizationType").upper().startswith("TILED"):
            raise SegmentationError("it is made of tiles, as for microscopy: only whole slices can be read")
        rows, columns, bits = (binary(ds, k) or 0 for k in ("Rows", "Columns", "BitsAllocated"))
        frames = 1 if (count := integer(ds, "NumberOfFrames")) is None else count
        if not 1 <= rows * columns <= MOST_PIXELS or frames < 1:
            raise SegmentationError(
                f"it says that it has {frames} frames of {rows} × {columns} pixels: the header is damaged"
            )
        if (binary(ds, "SamplesPerPixel") or 1) != 1 or bits not in BITS[kind]:
            raise SegmentationError(
                f"its pixels have {binary(ds, 'SamplesPerPixel')} samples of {bits} bits: {kind} has one of "
                f"{' or '.join(map(str, BITS[kind]))}"
            )
        pixels = ds.get_item(0x7FE0_0010)
        if pixels is None or not isinstance(raw(ds, "PixelData"), bytes):
            raise SegmentationError("it has no Pixel Data: the file is cut short; get a whole copy")
        encapsulated = getattr(pixels, "length", None) == UNDEFINED_LENGTH
        return _Image(path, kind, rows, columns, bits, frames, encapsulated, text(ds.file_meta, "TransferSyntaxUID"))

    def decoded(self, ds: pydicom.Dataset) -> Iterator[NDArray[Any]]:
        """Yield the values of one frame after the other, shape (rows, columns)."""
        return self._encapsulated(ds) if self.encapsulated else self._native(ds)

    def _native(self, ds: pydicom.Dataset) -> Iterator[NDArray[Any]]:
        data = raw(ds, "PixelData")
        size = self.rows * self.columns
        need = -(-size * self.frames * self.bits // 8)
        if not need <= len(data) <= need + 1:
            raise SegmentationError(
                f"its pixels have {len(data)} bytes, and {self.frames} frames of {self.rows} × {self.columns} in "
                f"{self.bits} bits take {need}: the file is cut short, or its header is damaged"
            )
        _, little = ds.original_encoding
        if not little and self.bits != 16:  # 8 bits may be packed two to a big-endian word
            raise SegmentationError("its pixels are big-endian: write it with another transfer syntax")
        for frame in range(self.frames):
            if self.bits == 1:
                yield self._bits(data, frame * size)
            else:
                dtype = np.dtype("u1" if self.bits == 8 else "<u2" if little else ">u2")
                values = np.frombuffer(data, dtype, size, frame * size * dtype.itemsize)
                yield values.reshape(self.rows, self.columns)

    def _bits(self, data: bytes, start: int) -> NDArray[Any]:
        """Return a frame that begins at any bit: frames are packed one right after the other (PS3.5, 8.1.1)."""
        size = self.rows * self.columns
        packed = np.frombuffer(data, np.uint8, (start % 8 + size + 7) // 8, start // 8)
        return np.unpackbits(packed, bitorder="little")[start % 8 :][:size].reshape(self.rows, self.columns)

    def _encapsulated(self, ds: pydicom.Dataset) -> Iterator[NDArray[Any]]:
        from gpuprep.dicom.decode import decode_frame

        table = raw(ds, "ExtendedOffsetTable")
        try:
            pixels = fragments_of(raw(ds, "PixelData"), table if isinstance(table, bytes) else b"")
            if (count := pixels.count(self.frames)) != self.frames:
                raise SegmentationError(f"its pixels have {count} frames, its header says {self.frames}: it is damaged")
            for frame in range(self.frames):
                if self.bits == 1:
                    yield self._bits(self._single_bits(pixels.frame(frame, self.frames)), 0)
                else:
                    yield decode_frame(pixels, self._header(frame), frame, self.rows, self.columns)
        except DecodeError as exc:
            raise SegmentationError(str(exc)) from exc

    def _single_bits(self, stream: bytes) -> bytes:
        """Return the bytes of a frame of single bits, each of which begins at a byte."""
        size = -(-self.rows * self.columns // 8)
        encoding = ENCODINGS.get(self.syntax)
        if encoding == "deflate":
            return inflated_frame(stream, size)
        if encoding != "none":
            how = "run lengths" if encoding == "RLE" else syntax_name(self.syntax)
            raise SegmentationError(f"its pixels are {how} of single bits: write it with another transfer syntax")
        if len(stream) < size:
            raise SegmentationError(f"a frame has {len(stream)} bytes, not {size}: it is damaged")
        return stream

    def _header(self, frame: int) -> SliceHeader:
        """Return what the decoders of CT want to know."""
        return SliceHeader(
            path=self.path,
            mtime_ns=0,
            member=None,
            frame=frame,
            frames=self.frames,
            file_bytes=0,
            sop_instance_uid="",
            instance_number=None,
            position_mm=None,
            localizer=False,
            secondary=False,
            modality=None,
            temporal_position=None,
            acquisition_number=None,
            acquisition_time="",
            reconstruction="",
            phase="",
            rescale_slope=None,
            rescale_intercept=None,
            rescale_type=None,
            photometric=None,
            samples_per_pixel=1,
            bits_allocated=max(self.bits, 8),
            bits_stored=max(self.bits, 8),
            high_bit=max(self.bits, 8) - 1,
            signed=False,
            padding=None,
            padding_limit=None,
            transfer_syntax=self.syntax,
            pixel_offset=None,
            pixel_bytes=None,
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a frame lies."""

    slice: SliceKey | None
    geometry: Geometry | None
    slab: Slab | None
    sources: frozenset[ImageFrame]
    """Images that the frame was made from."""


class _Groups:
    """The functional groups: what each frame says of itself, and what all of them share."""

    def __init__(self, ds: pydicom.Dataset, image: _Image) -> None:
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

    def place(self, frame: int) -> _Place:
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
            return _Place(None, geometry, slab, sources)
        if len(uids) == 1 and not any(source.number for source in sources):
            return _Place(SliceKey("uid", next(iter(uids))), None, None, sources)
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
            position = decimals(where, "ImagePositionPatient", 3, FARTHEST)
            orientation = decimals(oriented, "ImageOrientationPatient", 6, 1 + PERPENDICULAR)
            spacing = decimals(measures, "PixelSpacing", 2, COARSEST_MM)
            if position is None or orientation is None or spacing is None:
                return None
            stated_mm, thickness_mm = (_distance(measures, k) for k in distances)
            planes = self._planes.get(key[1], _NO_PLANES)
            # A frame is one layer; how thick it is said to be has no bearing on where it lies. Slices that overlap are
            # thicker than they are far apart, and a frame stands for no more than its part of the way to the next.
            layer_mm = min(stated_mm or thickness_mm or 1.0, planes.closest_mm)
            geometry = _plane(self._shape, position, orientation, (layer_mm, *spacing))
            normal = geometry.affine[:3, 0] / layer_mm
            self._places[key] = geometry, planes.slab(float(normal @ position), stated_mm, thickness_mm)
        return self._places[key]

    @cached_property
    def _planes(self) -> dict[str, _Planes]:
        """Where the planes of all frames lie along their normal, by orientation."""
        positions: dict[str, set[str]] = {}
        for frame in range(len(self._own)):
            where = self._macro(frame, "PlanePositionSequence")
            oriented = self._macro(frame, "PlaneOrientationSequence")
            if where is not None and oriented is not None:
                found = positions.setdefault(text(oriented, "ImageOrientationPatient"), set())
                found.add(text(where, "ImagePositionPatient"))
        return {written: _Planes.of(written, found) for written, found in positions.items()}

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
class _Planes:
    """Planes of all frames of one orientation."""

    offsets_mm: NDArray[np.float64]
    """Along the normal, ascending, shape (n,)."""

    @staticmethod
    def of(orientation: str, positions: set[str]) -> _Planes:
        """Return them from *Image Orientation (Patient)* and *Image Position (Patient)* as they are written."""
        pair, points = _numbers(orientation, 6), [p for written in positions if (p := _numbers(written, 3)) is not None]
        axes = None if pair is None else directions(pair)
        if axes is None or not points:
            return _NO_PLANES
        offsets = np.sort(np.array(points) @ axes[2])
        return _Planes(offsets[np.diff(offsets, prepend=-math.inf) > ONE_PLANE_MM])

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


_NO_PLANES = _Planes(np.empty(0))


def _distance(measures: pydicom.Dataset, keyword: str) -> float | None:
    """Return a distance along the normal; None where there is none that can be."""
    found = decimals(measures, keyword, 1, FARTHEST)
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


def _segments(ds: pydicom.Dataset) -> dict[int, str]:
    """Return the name of each segment by number."""
    named: list[tuple[str, int]] = []
    for n, item in enumerate(items(ds, "SegmentSequence"), 1):
        number = binary(item, "SegmentNumber")
        if number is None or any(number == other for _, other in named):
            raise SegmentationError(f"segment {n} in the file has no number of its own: {number}")
        named.append((name(item, "SegmentLabel") or f"segment {number}", number))
    return {number: called for (_, number), called in zip(named, distinct(named), strict=True)}


def _name_of_unknown(number: int, names: dict[int, str]) -> str:
    """Return a name for a segment without description that no other has."""
    called = f"segment {number}"
    while called in names.values():
        called += f" ({number})"
    return called


def _background(ds: pydicom.Dataset, segments: dict[int, str]) -> frozenset[int]:
    """Return the values of a label map that stand for no segment."""
    padding = binary(ds, "PixelPaddingValue")
    values = set() if padding is None else {padding}
    for item in items(ds, "SegmentSequence"):
        if binary(item, "SegmentNumber") == 0:
            codes = items(item, "SegmentedPropertyTypeCodeSequence")
            if any((text(c, "CodingSchemeDesignator"), text(c, "CodeValue")) == ("DCM", "125040") for c in codes):
                values.add(0)
    if 0 not in segments:
        values.add(0)
    return frozenset(values)


def references(ds: pydicom.Dataset) -> References:
    """Return what a segmentation names, as far as it can be read: for one that is damaged."""
    series: dict[str, None] = {}
    images: set[str] = set()
    with suppress(Exception):  # what is damaged further on does not matter
        _add_listed(ds, series, images)
    with suppress(Exception):
        for frame in items(ds, "PerFrameFunctionalGroupsSequence"):
            for derivation in items(frame, "DerivationImageSequence"):
                for source in items(derivation, "SourceImageSequence"):
                    images.add(uid(source, "ReferencedSOPInstanceUID"))
    frame_of_reference = ""
    with suppress(Exception):
        frame_of_reference = uid(ds, "FrameOfReferenceUID")
    return References(tuple(series), frame_of_reference, frozenset(images - {""}))


def _references(ds: pydicom.Dataset) -> tuple[tuple[str, ...], set[str]]:
    """Return the series that a segmentation refers to, and the images of them."""
    series: dict[str, None] = {}
    images: set[str] = set()
    _add_listed(ds, series, images)
    return tuple(series), images - {""}


def _add_listed(ds: pydicom.Dataset, series: dict[str, None], images: set[str]) -> None:
    """Add the series that a segmentation lists, and their images."""
    for item in items(ds, "ReferencedSeriesSequence"):
        if found := uid(item, "SeriesInstanceUID"):
            series[found] = None
        for image in items(item, "ReferencedInstanceSequence"):
            images.add(uid(image, "ReferencedSOPInstanceUID"))
