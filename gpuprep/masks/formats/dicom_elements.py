"""Reads single attributes of RTSTRUCT and SEG objects, as they stand in the file.

pydicom converts what it is asked for by name, in Python, number by number; a structure set has millions of them. So
values are taken from the bytes of an element, and nothing is asked for that is not needed: no patient, no date.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpuprep.core.formatting import quoted
from gpuprep.dicom.uids import UNDEFINED_LENGTH
from gpuprep.errors import SegmentationError
from gpuprep.masks.model import ImageFrame

if TYPE_CHECKING:
    import pydicom

TAGS = {
    "TransferSyntaxUID": 0x0002_0010,
    "MediaStorageSOPClassUID": 0x0002_0002,
    "SpecificCharacterSet": 0x0008_0005,
    "SOPClassUID": 0x0008_0016,
    "CodeValue": 0x0008_0100,
    "CodingSchemeDesignator": 0x0008_0102,
    "ReferencedSeriesSequence": 0x0008_1115,
    "ReferencedInstanceSequence": 0x0008_114A,
    "ReferencedSOPInstanceUID": 0x0008_1155,
    "ReferencedFrameNumber": 0x0008_1160,
    "SourceImageSequence": 0x0008_2112,
    "DerivationImageSequence": 0x0008_9124,
    "SliceThickness": 0x0018_0050,
    "SpacingBetweenSlices": 0x0018_0088,
    "StudyInstanceUID": 0x0020_000D,
    "SeriesInstanceUID": 0x0020_000E,
    "ImagePositionPatient": 0x0020_0032,
    "ImageOrientationPatient": 0x0020_0037,
    "FrameOfReferenceUID": 0x0020_0052,
    "PlanePositionSequence": 0x0020_9113,
    "PlaneOrientationSequence": 0x0020_9116,
    "DimensionOrganizationType": 0x0020_9311,
    "SamplesPerPixel": 0x0028_0002,
    "NumberOfFrames": 0x0028_0008,
    "Rows": 0x0028_0010,
    "Columns": 0x0028_0011,
    "PixelSpacing": 0x0028_0030,
    "BitsAllocated": 0x0028_0100,
    "PixelPaddingValue": 0x0028_0120,
    "PixelMeasuresSequence": 0x0028_9110,
    "SegmentationType": 0x0062_0001,
    "SegmentSequence": 0x0062_0002,
    "SegmentNumber": 0x0062_0004,
    "SegmentLabel": 0x0062_0005,
    "SegmentIdentificationSequence": 0x0062_000A,
    "ReferencedSegmentNumber": 0x0062_000B,
    "MaximumFractionalValue": 0x0062_000E,
    "SegmentedPropertyTypeCodeSequence": 0x0062_000F,
    "ReferencedFrameOfReferenceSequence": 0x3006_0010,
    "RTReferencedStudySequence": 0x3006_0012,
    "RTReferencedSeriesSequence": 0x3006_0014,
    "ContourImageSequence": 0x3006_0016,
    "StructureSetROISequence": 0x3006_0020,
    "ROINumber": 0x3006_0022,
    "ReferencedFrameOfReferenceUID": 0x3006_0024,
    "ROIName": 0x3006_0026,
    "ROIContourSequence": 0x3006_0039,
    "ContourSequence": 0x3006_0040,
    "ContourGeometricType": 0x3006_0042,
    "ContourOffsetVector": 0x3006_0045,
    "NumberOfContourPoints": 0x3006_0046,
    "ContourData": 0x3006_0050,
    "ReferencedROINumber": 0x3006_0084,
    "SharedFunctionalGroupsSequence": 0x5200_9229,
    "PerFrameFunctionalGroupsSequence": 0x5200_9230,
    "ExtendedOffsetTable": 0x7FE0_0001,
    "ExtendedOffsetTableLengths": 0x7FE0_0002,
    "PixelData": 0x7FE0_0010,
}
"""Everything that is read of a file."""

_BINARY_VRS = (None, "US", "SS", "UL", "SL", "UN")
_UID = re.compile("[0-9A-Fa-f.]{1,64}")  # some write hexadecimal digits, which do no harm
_WORDS = re.compile("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def words(keyword: str) -> str:
    """Return the name of an attribute as the standard writes it: "ROI Contour Sequence"."""
    return _WORDS.sub(" ", keyword)


def raw(ds: pydicom.Dataset, keyword: str) -> Any:
    """Return the value of an element as it stands in the file, bytes as a rule; None where there is none.

    Raises
    ------
    SegmentationError
        If the element is longer than what is left of the file, or of the sequence it is in.
    """
    element = ds.get_item(TAGS[keyword])
    value = None if element is None else element.value
    if isinstance(value, bytes):
        length = getattr(element, "length", UNDEFINED_LENGTH)
        if length not in (len(value), UNDEFINED_LENGTH):
            raise SegmentationError(
                f"its {words(keyword)} announces {length} bytes and has {len(value)}: the file is cut short or "
                "damaged; get a whole copy"
            )
    return value


def items(ds: pydicom.Dataset, keyword: str) -> Sequence[pydicom.Dataset]:
    """Return the items of a sequence; none where it is absent or empty."""
    import pydicom

    if raw(ds, keyword) is None:
        return ()
    value = ds[TAGS[keyword]].value
    if isinstance(value, pydicom.Sequence):
        return value
    if not value:
        return ()
    raise SegmentationError(f"its {words(keyword)} is no sequence: the file is damaged")


def text(ds: pydicom.Dataset, keyword: str) -> str:
    """Return a value that is written in ASCII; "" where it is absent."""
    value = raw(ds, keyword)
    if value is None:
        return ""
    return (value.decode("latin-1") if isinstance(value, bytes) else str(value)).strip(" \0")


def name(ds: pydicom.Dataset, keyword: str) -> str:
    """Return a text in the character set of the file; "" where it is absent."""
    if raw(ds, keyword) is None:
        return ""
    value = ds[TAGS[keyword]].value
    if isinstance(value, bytes):  # of an unknown VR
        value = value.decode("utf-8", "replace")
    parts = [value] if isinstance(value, str) else list(value)
    return "\\".join(map(str, parts)).strip(" \0")


def uid(ds: pydicom.Dataset, keyword: str) -> str:
    """Return a UID; "" where it is absent or none."""
    found = text(ds, keyword)
    return found if _UID.fullmatch(found) else ""


def image_frames(item: pydicom.Dataset) -> set[ImageFrame]:
    """Return the image that an item of a sequence of images refers to, or the frames of it; none without a UID."""
    sop_uid = uid(item, "ReferencedSOPInstanceUID")
    numbers = text(item, "ReferencedFrameNumber").split("\\")
    frames = {int(n) for n in numbers if re.fullmatch(r" *0*[1-9][0-9]{0,8} *", n)}
    return {ImageFrame(sop_uid, n) for n in frames or (0,)} if sop_uid else set()


def binary(ds: pydicom.Dataset, keyword: str) -> int | None:
    """Return an unsigned number of 16 bits (US); None where it is absent."""
    element = ds.get_item(TAGS[keyword])
    value = raw(ds, keyword)
    if value is None or value == b"":
        return None
    if not isinstance(value, bytes) or element is None or element.VR not in _BINARY_VRS or len(value) < 2:
        raise SegmentationError(f"its {words(keyword)} is no number of 16 bits: the file is damaged")
    if getattr(element, "is_little_endian", True):
        return int.from_bytes(value[:2], "little")
    return int.from_bytes(value[-2:], "big")


def integer(ds: pydicom.Dataset, keyword: str) -> int | None:
    """Return a whole number that is written in digits (IS); None where it is absent."""
    found = text(ds, keyword)
    if not found:
        return None
    if not re.fullmatch(r"[+-]?[0-9]{1,10}", found):
        raise SegmentationError(f"its {words(keyword)} is {quoted(found)}, no whole number")
    return int(found)


def decimals(ds: pydicom.Dataset, keyword: str, count: int, most: float) -> tuple[float, ...] | None:
    """Return `count` numbers of at most `most` that are written in digits (DS); None where they are absent."""
    found = text(ds, keyword)
    if not found:
        return None
    try:
        values = tuple(float(part.replace("_", "?")) for part in found.split("\\"))  # 1_0 is no number
    except ValueError:
        values = ()
    if len(values) != count or not all(math.isfinite(v) and abs(v) <= most for v in values):
        some = f"{count} numbers" if count > 1 else "a number"
        raise SegmentationError(f"its {words(keyword)} is {quoted(found)}, not {some} of at most {most:g}")
    return values
