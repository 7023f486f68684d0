"""Reads RT structure sets (RTSTRUCT): the outlines of each region of interest (ROI), in patient coordinates.

References
----------
DICOM PS3.3, C.8.8.5 (Structure Set module), C.8.8.6 (ROI Contour module).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import format_count, quoted
from gpuprep.core.mask_options import ReadingOptions
from gpuprep.dicom.decimal_strings import BLOCK_BYTES, parse_decimals
from gpuprep.dicom.elements import Elements
from gpuprep.errors import SegmentationError
from gpuprep.masks.formats.segmentation_values import (
    decimals,
    image_frames,
    integer,
    items,
    items_without_names,
    name,
    raw,
    text,
    uid,
)
from gpuprep.masks.model import Collector, Contour, ImageFrame, References, Segmentation
from gpuprep.masks.text_parsing import LARGEST_COORDINATE, unique_names

if TYPE_CHECKING:
    import pydicom

CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "CLOSED_PLANAR_XOR")
"""*Contour Geometric Type* of closed outlines. The third is a common misspelling of the second."""

_NUMERIC = b"0123456789eE+-. \\"
"""Characters of decimal strings and their separator. Python's float() accepts more than the standard does."""

LONGEST_PARSED_BYTES = 2**20
"""Longer *Contour Data* are parsed by float(): all numbers at once would need more memory."""

_PADDING = b" \0"
"""Characters around decimal strings that are no part of them."""


def read(ds: pydicom.Dataset, path: str, reading: ReadingOptions) -> Segmentation:  # noqa: ARG001 - as in `seg.read`
    """Return the closed outlines of a structure set.

    The points of a contour give its slice, because the images it refers to may be absent or wrong. Open contours and
    contours of fewer than three points enclose no area and are left out with a note.

    Parameters
    ----------
    ds : pydicom.Dataset
        Data set with the elements as read from the file.
    path : str
        Path for messages.
    reading : Reading
        Options; not used.

    Raises
    ------
    SegmentationError
        If coordinates are no numbers, or contours cannot be assigned to ROIs.
    """
    rois, frames = _rois(ds)
    sequence = items_without_names(ds, "ROIContourSequence")
    if not rois or not sequence:  # both are required; a file cut short between elements may lack one
        raise SegmentationError(
            f"it names {len(rois)} ROIs and has contours of {len(sequence)}: cut short, or nothing was outlined"
        )
    for n, roi in enumerate(sequence, 1):  # adds ROIs without a description, before names are made unique
        number = integer(roi, "ReferencedROINumber")
        if number is None and items_without_names(roi, "ContourSequence"):
            raise SegmentationError(f"contours {n} of {len(sequence)} do not say to which ROI they belong")
        if number is not None and number not in rois:
            rois[number] = ""
    numbers = list(rois)
    names = dict(zip(numbers, unique_names((rois[n] or f"ROI {n}", n) for n in numbers), strict=True))
    collector = Collector()
    for n in numbers:
        collector.declare(names[n])
    notes: list[str] = []
    images = _Images()
    for roi in sequence:
        number = integer(roi, "ReferencedROINumber")
        if number is not None:
            notes += _contours(roi, names[number], collector, images)
    frame_by_name = {names[number]: frame for number, frame in frames.items()}
    structures = (replace(s, frame_of_reference_uid=frame_by_name.get(s.name, "")) for s in collector.structures)
    series, studies, listed = _references(ds)
    return Segmentation(
        path=path,
        format="RTSTRUCT",
        why="SOP Class UID: RT Structure Set Storage",
        structures=tuple(structures),
        series_uids=tuple(dict.fromkeys(chain.from_iterable(series.values()))),
        study_uids=studies,
        frame_of_reference_uid=_main_frame(ds, frames.values()),
        series_by_frame={frame: frozenset(uids) for frame, uids in series.items()},
        sop_uids=frozenset(image.sop_uid for image in images.found | listed),
        drawn_on=frozenset(images.found),
        notes=tuple(notes),
    )


def _rois(ds: pydicom.Dataset) -> tuple[dict[int, str], dict[int, str]]:
    """Return the names of ROIs by number, and their *Referenced Frame of Reference UID* by number."""
    rois: dict[int, str] = {}
    frames: dict[int, str] = {}
    for n, item in enumerate(items(ds, "StructureSetROISequence"), 1):
        number, roi_name = integer(item, "ROINumber"), name(item, "ROIName")
        if number is None:
            raise SegmentationError(f"ROI {n} in the file, {quoted(roi_name)}, has no ROI Number")
        if rois.setdefault(number, roi_name) != roi_name:
            raise SegmentationError(
                f"two ROIs, {quoted(rois[number])} and {quoted(roi_name)}, have the number {number}: it is not clear "
                "which contours belong to which"
            )
        frames[number] = uid(item, "ReferencedFrameOfReferenceUID")
    return rois, frames


def _contours(roi: Elements, structure: str, collector: Collector, images: _Images) -> list[str]:
    """Collect the contours of one ROI; return notes on irregular ones."""
    left_out: Counter[str] = Counter()
    miscounted = moved = 0
    label = f"ROI {quoted(structure)}"
    for n, (item, values) in enumerate(_with_coordinates(items_without_names(roi, "ContourSequence")), 1):
        kind = text(item, "ContourGeometricType").upper()
        if kind not in CLOSED:
            left_out[kind if kind.replace("_", "").isalpha() and len(kind) <= 16 else "no known type"] += 1
            continue
        if values is None:
            values = _values(raw(item, "ContourData"), label, n)
        if len(values) % 3:
            raise SegmentationError(f"{label}, contour {n}: {len(values)} values are no points of x, y and z")
        points = values.reshape(-1, 3)
        stated_count = text(item, "NumberOfContourPoints")
        miscounted += bool(stated_count) and stated_count != str(len(points))
        if len(points) < 3:
            left_out["fewer than 3 points"] += 1
            continue
        # The offset leads from the points to the outlined structure (C.8.8.6.2).
        if any(offset_mm := decimals(item, "ContourOffsetVector", 3, LARGEST_COORDINATE) or ()):
            points = points + offset_mm
            moved += 1
        collector.add(structure, Contour(points, "patient", rule="even-odd" if kind == "CLOSED_PLANAR" else "xor"))
        images.add(item)
    notes = [f"{label}: {count} contours left out: {why}" for why, count in left_out.items()]
    if moved:
        notes.append(f"{label}: {format_count(moved, 'contour')} moved by Contour Offset Vector")
    if miscounted:
        notes.append(f"{label}: {format_count(miscounted, 'contour')} with a wrong Number of Contour Points")
    return notes


def _with_coordinates(contours: Iterable[Elements]) -> Iterator[tuple[Elements, NDArray[np.float64] | None]]:
    """Yield each contour with its coordinates; None if they are missing or not written as usual."""
    block: list[tuple[Elements, bytes]] = []
    block_bytes = 0
    for contour in contours:
        try:
            data = raw(contour, "ContourData")
        except SegmentationError:  # raised again when it is this contour's turn
            data = b""
        if not isinstance(data, bytes) or len(data) > LONGEST_PARSED_BYTES:
            data = b""
        if block_bytes + len(data) > BLOCK_BYTES:
            yield from _parsed(block)
            block, block_bytes = [], 0
        block.append((contour, data.strip(_PADDING)))
        block_bytes += len(data)
    yield from _parsed(block)


def _parsed(block: list[tuple[Elements, bytes]]) -> Iterator[tuple[Elements, NDArray[np.float64] | None]]:
    if block:
        contours, texts = zip(*block, strict=True)
        yield from zip(contours, parse_decimals(texts, LARGEST_COORDINATE), strict=True)


def _values(data: Any, roi: str, contour: int) -> NDArray[np.float64]:
    """Return the numbers of *Contour Data*."""
    if data is None:
        return np.empty(0)
    if not isinstance(data, bytes):
        raise SegmentationError(f"{roi}, contour {contour}: its Contour Data are no numbers")
    data = data.strip(_PADDING)
    if not data:
        return np.empty(0)
    parts = data.split(b"\\")
    try:
        if data.translate(None, _NUMERIC):
            raise ValueError
        values = np.fromiter(map(float, parts), np.float64, len(parts))
        if not (np.abs(values) <= LARGEST_COORDINATE).all():
            raise ValueError
    except ValueError:
        n = next(n for n, part in enumerate(parts) if not _is_coordinate(part))
        raise SegmentationError(
            f"{roi}, contour {contour}, value {n + 1} of {len(parts)}: {quoted(parts[n].decode('latin-1'))} is no "
            f"coordinate in mm of at most {LARGEST_COORDINATE:.0f}"
        ) from None
    return values


def _is_coordinate(part: bytes) -> bool:
    try:
        return not part.translate(None, _NUMERIC) and math.fabs(float(part)) <= LARGEST_COORDINATE
    except ValueError:
        return False


class _Images:
    """Collects the images that contours refer to."""

    def __init__(self) -> None:
        self.found: set[ImageFrame] = set()
        self._seen: set[bytes] = set()

    def add(self, ds: Elements) -> None:
        """Add the images of a *Contour Image Sequence*. Contours of one slice repeat the same bytes, parsed once."""
        encoded = raw(ds, "ContourImageSequence")
        if isinstance(encoded, bytes):
            if encoded in self._seen:
                return
            self._seen.add(encoded)
        for image in items_without_names(ds, "ContourImageSequence"):
            self.found |= image_frames(image)

    @property
    def sop_uids(self) -> frozenset[str]:
        """SOP Instance UIDs of the images."""
        return frozenset(image.sop_uid for image in self.found)


def references(ds: pydicom.Dataset) -> References:
    """Return the UIDs that a damaged structure set refers to, as far as they can be read."""
    series: dict[str, list[str]] = {}
    images = _Images()
    frames: list[str] = []
    with suppress(Exception):  # UIDs before the damage are kept
        _add_listed(ds, series, set(), images)
    with suppress(Exception):
        frames.extend(uid(item, "ReferencedFrameOfReferenceUID") for item in items(ds, "StructureSetROISequence"))
    with suppress(Exception):
        for roi in items_without_names(ds, "ROIContourSequence"):
            for item in items_without_names(roi, "ContourSequence"):
                images.add(item)
    frame = ""
    with suppress(Exception):
        frame = _main_frame(ds, frames)
    return References(tuple(dict.fromkeys(chain.from_iterable(series.values()))), frame, images.sop_uids)


def _references(ds: pydicom.Dataset) -> tuple[dict[str, list[str]], frozenset[str], set[ImageFrame]]:
    """Return the series that a structure set lists, by frame of reference, their studies, and their images."""
    series: dict[str, list[str]] = {}
    studies: set[str] = set()
    images = _Images()
    _add_listed(ds, series, studies, images)
    studies = studies - {""} or {uid(ds, "StudyInstanceUID")} - {""}
    return series, frozenset(studies), images.found


def _add_listed(ds: pydicom.Dataset, series: dict[str, list[str]], studies: set[str], images: _Images) -> None:
    """Add the series that a structure set lists, by frame of reference, their studies, and their images."""
    for frame in items(ds, "ReferencedFrameOfReferenceSequence"):
        under = series.setdefault(uid(frame, "FrameOfReferenceUID"), [])
        for study in items(frame, "RTReferencedStudySequence"):
            studies.add(uid(study, "ReferencedSOPInstanceUID"))
            for item in items(study, "RTReferencedSeriesSequence"):
                if found := uid(item, "SeriesInstanceUID"):
                    under.append(found)
                images.add(item)


def _main_frame(ds: pydicom.Dataset, roi_frames: Iterable[str]) -> str:
    """Return the frame of reference UID of most ROIs; if they have none, that of the structure set."""
    listed = [uid(f, "FrameOfReferenceUID") for f in items(ds, "ReferencedFrameOfReferenceSequence")]
    counts = Counter(filter(None, roi_frames))
    most_common = [frame for frame, _ in counts.most_common(1)]
    return next(filter(None, [*most_common, *listed, uid(ds, "FrameOfReferenceUID")]), "")
