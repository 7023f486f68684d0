"""Reads segmentation images (SEG): painted frames, each with its place in the patient.

References
----------
DICOM PS3.3, C.8.20.2 (Segmentation Image module), C.7.6.16 (Multi-frame Functional Groups module).
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.mask_options import Reading
from gpuprep.errors import SegmentationError
from gpuprep.masks.formats.dicom_elements import binary, items, name, text, uid
from gpuprep.masks.formats.seg_frames import Groups
from gpuprep.masks.formats.seg_image import MOST_PAINTED, SegImage
from gpuprep.masks.model import Collector, ImageFrame, References, Segmentation, bounding_raster
from gpuprep.masks.text_parsing import distinct

if TYPE_CHECKING:
    import pydicom

# gpuprep.dicom.decode, which imports pydicom, is imported where frames are encoded.


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
    image = SegImage.of(ds, path)
    segments = _segments(ds)
    background = _background(ds, segments) if image.type == "LABELMAP" else frozenset()
    names = {n: called for n, called in segments.items() if n not in background}
    groups = Groups(ds, image)
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
            raster = bounding_raster(mask, place.slice, place.geometry, place.slab)
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


def _belonging(ds: pydicom.Dataset, image: SegImage, threshold: float) -> NDArray[np.bool_]:
    """Return which values of a fractional frame belong to its segment, by value."""
    if image.type != "FRACTIONAL":
        return np.empty(0, dtype=bool)
    values = np.arange(2**image.bits)
    whole = binary(ds, "MaximumFractionalValue")
    if not whole:
        raise SegmentationError("it is fractional and has no Maximum Fractional Value: what a whole is is not known")
    return (values / whole >= threshold) & (values > 0)


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
