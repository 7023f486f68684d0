"""Reads segmentation images (SEG): painted frames, each with its position in the patient.

References
----------
DICOM PS3.3, C.8.20.2 (Segmentation Image module), C.7.6.16 (Multi-frame Functional Groups module).
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.mask_options import ReadingOptions
from gpuprep.errors import SegmentationError
from gpuprep.masks.formats.seg_frames import Groups
from gpuprep.masks.formats.seg_image import MOST_PAINTED, SegImage
from gpuprep.masks.formats.segmentation_values import binary, items, name, text, uid
from gpuprep.masks.model import Collector, ImageFrame, References, Segmentation, bounding_raster
from gpuprep.masks.text_parsing import unique_names

if TYPE_CHECKING:
    import pydicom

# gpuprep.dicom.decode, which imports pydicom, is imported only if frames are encapsulated.


def read(ds: pydicom.Dataset, path: str, reading: ReadingOptions) -> Segmentation:
    """Return the painted pixels of a segmentation image, frame by frame.

    In a fractional segmentation, a pixel belongs to the segment if value / *Maximum Fractional Value* is at least
    `reading.threshold` and above 0. In a label map, *Pixel Padding Value* is background, and so is 0 unless a segment 0
    is described as something else.

    Parameters
    ----------
    ds : pydicom.Dataset
        Data set with the elements as read from the file.
    path : str
        Path for messages.
    reading : Reading
        Options; only `threshold` is used.

    Raises
    ------
    SegmentationError
        If frames cannot be decoded, have no position, or differ from the header in number or size.
    """
    image = SegImage.of(ds, path)
    segments = _segments(ds)
    background = _background(ds, segments) if image.type == "LABELMAP" else frozenset()
    names = {n: label for n, label in segments.items() if n not in background}
    groups = Groups(ds, image)
    drawn_on: set[ImageFrame] = set()
    collector = Collector()
    for label in names.values():
        collector.declare(label)
    is_segment_value = _segment_values(ds, image, reading.threshold)
    painted_px = 0
    notes: list[str] = []
    for frame, values in enumerate(image.decoded(ds)):
        position = groups.position(frame)
        if image.type == "LABELMAP":
            numbers = [int(n) for n in np.unique(values) if int(n) not in background]
        else:
            numbers = [groups.segment(frame, segments)]
            values = values != 0 if image.type == "BINARY" else is_segment_value.take(values)
        for number in numbers:
            mask = values == number if image.type == "LABELMAP" else values
            if number not in names:
                names[number] = _unused_name(number, names)
                notes.append(f"segment {number} has pixels but no description")
                collector.declare(names[number])
            raster = bounding_raster(mask, position.slice, position.geometry, position.slab)
            if raster is None:
                continue
            painted_px += raster.mask.size
            if painted_px > MOST_PAINTED:
                raise SegmentationError(f"its segments take more than {MOST_PAINTED} pixels, up to frame {frame + 1}")
            collector.add(names[number], raster)
            drawn_on |= position.sources
    series, listed_images = _references(ds)
    return Segmentation(
        path=path,
        format="SEG",
        why=f"SOP Class UID: Segmentation Storage, {image.type}",
        structures=collector.structures,
        series_uids=series,
        study_uids=frozenset({uid(ds, "StudyInstanceUID")} - {""}),
        frame_of_reference_uid=uid(ds, "FrameOfReferenceUID"),
        sop_uids=frozenset(listed_images | groups.sop_uids),
        drawn_on=frozenset(drawn_on),
        notes=tuple(notes),
    )


def _segment_values(ds: pydicom.Dataset, image: SegImage, threshold: float) -> NDArray[np.bool_]:
    """Return for each stored value of a fractional frame whether it belongs to the segment; else an empty array."""
    if image.type != "FRACTIONAL":
        return np.empty(0, dtype=bool)
    values = np.arange(2**image.bits)
    maximum = binary(ds, "MaximumFractionalValue")
    if not maximum:
        raise SegmentationError("it is fractional, but has no Maximum Fractional Value: its shares are unknown")
    return (values / maximum >= threshold) & (values > 0)


def _segments(ds: pydicom.Dataset) -> dict[int, str]:
    """Return the name of each segment by number."""
    named: list[tuple[str, int]] = []
    for n, item in enumerate(items(ds, "SegmentSequence"), 1):
        number = binary(item, "SegmentNumber")
        if number is None or any(number == other for _, other in named):
            raise SegmentationError(f"segment {n} in the file has no unique Segment Number: {number}")
        named.append((name(item, "SegmentLabel") or f"segment {number}", number))
    return {number: label for (_, number), label in zip(named, unique_names(named), strict=True)}


def _unused_name(number: int, names: dict[int, str]) -> str:
    """Return a unique name for a segment without description."""
    label = f"segment {number}"
    while label in names.values():
        label += f" ({number})"
    return label


def _background(ds: pydicom.Dataset, segments: dict[int, str]) -> frozenset[int]:
    """Return the values of a label map that are background."""
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
    """Return the UIDs that a damaged segmentation refers to, as far as they can be read."""
    series: dict[str, None] = {}
    images: set[str] = set()
    with suppress(Exception):  # UIDs before the damage are kept
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
    """Return the series that a segmentation lists, and their images."""
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
