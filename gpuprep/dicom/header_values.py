"""Reads values of an image object or of one of its frames: texts, numbers, units, UIDs."""

from __future__ import annotations

import hashlib
import math
import re
import struct
from typing import TYPE_CHECKING, Any

from gpuprep.core.formatting import printable
from gpuprep.core.series import MALFORMED
from gpuprep.dicom.odd_numbers import BINARY, binary_numbers, with_points, written_number

if TYPE_CHECKING:
    import pydicom


TAGS = {
    "MediaStorageSOPClassUID": 0x0002_0002,
    "TransferSyntaxUID": 0x0002_0010,
    "ImageType": 0x0008_0008,
    "SOPClassUID": 0x0008_0016,
    "SOPInstanceUID": 0x0008_0018,
    "SeriesDate": 0x0008_0021,
    "AcquisitionDate": 0x0008_0022,
    "ContentDate": 0x0008_0023,
    "AcquisitionDateTime": 0x0008_002A,
    "SeriesTime": 0x0008_0031,
    "AcquisitionTime": 0x0008_0032,
    "ContentTime": 0x0008_0033,
    "Modality": 0x0008_0060,
    "FrameType": 0x0008_9007,
    "PatientID": 0x0010_0020,
    "ScanOptions": 0x0018_0022,
    "FrameAcquisitionDateTime": 0x0018_9074,
    "KVP": 0x0018_0060,
    "TriggerTime": 0x0018_1060,
    "ConvolutionKernel": 0x0018_1210,
    "MultienergyCTProcessingSequence": 0x0018_9363,
    "MonoenergeticEnergyEquivalent": 0x0018_937C,
    "InstanceNumber": 0x0020_0013,
    "AcquisitionNumber": 0x0020_0012,
    "StudyInstanceUID": 0x0020_000D,
    "SeriesInstanceUID": 0x0020_000E,
    "SeriesNumber": 0x0020_0011,
    "ImagePositionPatient": 0x0020_0032,
    "ImageOrientationPatient": 0x0020_0037,
    "FrameOfReferenceUID": 0x0020_0052,
    "TemporalPositionIdentifier": 0x0020_0100,
    "TemporalPositionIndex": 0x0020_9128,
    "StackID": 0x0020_9056,
    "InStackPositionNumber": 0x0020_9057,
    "NominalCardiacTriggerDelayTime": 0x0020_9153,
    "FrameAcquisitionNumber": 0x0020_9156,
    "DimensionIndexValues": 0x0020_9157,
    "NominalPercentageOfCardiacPhase": 0x0020_9241,
    "NominalPercentageOfRespiratoryPhase": 0x0020_9245,
    "NominalRespiratoryTriggerDelayTime": 0x0020_9255,
    "TemporalPositionTimeOffset": 0x0020_930D,
    "SamplesPerPixel": 0x0028_0002,
    "PhotometricInterpretation": 0x0028_0004,
    "NumberOfFrames": 0x0028_0008,
    "Rows": 0x0028_0010,
    "Columns": 0x0028_0011,
    "PixelSpacing": 0x0028_0030,
    "BitsAllocated": 0x0028_0100,
    "BitsStored": 0x0028_0101,
    "HighBit": 0x0028_0102,
    "PixelRepresentation": 0x0028_0103,
    "PixelPaddingValue": 0x0028_0120,
    "PixelPaddingRangeLimit": 0x0028_0121,
    "RescaleIntercept": 0x0028_1052,
    "RescaleSlope": 0x0028_1053,
    "RescaleType": 0x0028_1054,
    "ModalityLUTSequence": 0x0028_3000,
    "SharedFunctionalGroupsSequence": 0x5200_9229,
    "PerFrameFunctionalGroupsSequence": 0x5200_9230,
    "ExtendedOffsetTable": 0x7FE0_0001,
}
"""Everything that is read of a header. No name and no free text ever enters the program. Dates, times and Patient ID
enter it only as hashes, which tell images of one series apart."""


MOST_DIMENSIONS = 16
"""Dimensions of a multi-frame image beyond these are damage."""


MOST_FRAMES = 2**16
"""More in one file come from a damaged header."""


class Frame:
    """One frame of a multi-frame image: attributes of its own, then shared ones, then those of the image.

    References
    ----------
    DICOM PS3.3, C.7.6.16 (Multi-frame Functional Groups module).
    """

    def __init__(self, *layers: pydicom.Dataset) -> None:
        self.remarks: set[str] = set()
        """What is written in another way than DICOM asks and was understood: see `SliceHeader.remarks`."""
        # By plain integers: pydicom's tags are compared in Python, forty times for every image of a cohort.
        self._elements = {
            int(tag): layer.get_item(tag)
            for layer in reversed(layers)
            for tag in layer.keys()  # noqa: SIM118 - a data set iterates over its elements, and converts them
        }

    def get_item(self, tag: int) -> Any:
        """Return the element of the innermost layer that has it; None where none has."""
        return self._elements.get(tag)


def frames_of(ds: pydicom.Dataset) -> list[tuple[Frame, int]]:
    """Return the frames of an image, each with their number; one alone where nothing says where the others are."""
    image = Frame(ds)
    binary = getattr(raw_of(image, "NumberOfFrames"), "VR", None) in BINARY
    count = integer_of(image, "NumberOfFrames") if binary or text_of(image, "NumberOfFrames") else 1
    shared_tag, own_tag = TAGS["SharedFunctionalGroupsSequence"], TAGS["PerFrameFunctionalGroupsSequence"]
    if count == 0 and own_tag not in ds:
        image.remarks.add("frames-0")
        count = 1
    if count is None or count < 1:
        raise ValueError(f"Number of Frames is {text_of(image, 'NumberOfFrames')[:20]!r}")
    if own_tag not in ds:
        # Of the sequences of a single frame, one says what was computed of several energies.
        return [(Frame(*energies, ds) if (energies := _energies(ds)) else image, count)]
    shared = [layer for item in ((ds[shared_tag].value or []) if shared_tag in ds else []) for layer in _macros(item)]
    own = list(ds[own_tag].value or [])
    if len(own) != count or count > MOST_FRAMES:
        raise ValueError(f"{len(own)} functional groups for {count} frames")
    shared += _energies(ds)
    return [(Frame(*_macros(item), *shared, ds), count) for item in own]


def _energies(ds: pydicom.Dataset) -> list[pydicom.Dataset]:
    """Return the first item of the Multi-energy CT Processing Sequence of an image that has it beside its frames."""
    tag = TAGS["MultienergyCTProcessingSequence"]
    return [items[0]] if tag in ds and (items := ds[tag].value) else []


def _macros(item: pydicom.Dataset) -> list[pydicom.Dataset]:
    """Return what the macros of a functional group hold, each of which is a sequence of one item."""
    return [element.value[0] for element in item if element.VR == "SQ" and element.value]


def hash_of(text: str) -> str:
    """Return 64 bits of SHA-256: no two values of one series have the same."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def either(a: int | None, b: int | None) -> int | None:
    """Return the first of two numbers that is there."""
    return b if a is None else a


def raw_of(ds: Frame, keyword: str) -> Any:
    """Return the bytes of an attribute as they stand in the file, with their byte order; converting them costs more."""
    return ds.get_item(TAGS[keyword])


def text_of(ds: Frame | pydicom.Dataset, keyword: str) -> str:
    """Return a value as printable text; "" where it is absent."""
    element = ds.get_item(TAGS[keyword])
    value = element.value if element is not None else None
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return "" if value is None else printable(str(value).strip(" \0"))


TERMS = {
    "Modality": "CT MR PT NM CR DX MG XA RF US OT SC SEG RTIMAGE RTDOSE RTSTRUCT RTPLAN PR SR REG",
    "RescaleType": "HU US OD HU_MOD MGML Z_EFF ED EDW PCT",
    "PhotometricInterpretation": "MONOCHROME1 MONOCHROME2 RGB PALETTE_COLOR YBR_FULL YBR_FULL_422 YBR_ICT YBR_RCT",
}
"""Words that are kept; any other, which might be a name, is "another"."""


def term_of(ds: Frame | pydicom.Dataset, keyword: str) -> str | None:
    """Return a defined term in capitals, or "another"; None where it is absent."""
    word = text_of(ds, keyword).upper()
    return None if not word else word if word.replace(" ", "_") in TERMS[keyword].split() else "another"


_HOUNSFIELD = re.compile(r"HU|HOUN[DT]?S?E?F[IE]{1,2}LDS?(UNITS?)?(HU)?|HNSF'U")
"""HU as writers spell it, without blanks and punctuation: some GE workstations write "Houndsfield Unit"; UCUM has
[hnsf'U]."""


_PUNCTUATION = str.maketrans("", "", " ._-()[]")


_CODE = re.compile("[A-Z][A-Z0-9_]{0,15}")


def _unit(written: str, known: str | None) -> str | None:
    """Return "HU" for every spelling of it, any other unit that is written like a code as it is, else "another".

    The standard's own terms are single words in capital letters and digits. Such a word is kept for messages. Text in
    any other form, which might be a name, is not.
    """
    if known != "another":
        return known
    if _HOUNSFIELD.fullmatch(written.upper().translate(_PUNCTUATION)):
        return "HU"
    return written if _CODE.fullmatch(written) else known


MAPS = {"EFF_ATOMIC_NUM": "Z_EFF", "ELECTRON_DENSITY": "ED", "MAT_FRACTIONAL": "PCT", "MAT_SPECIFIC": "MGML"}
"""Rescale types of what the fourth value of *Image Type* or *Frame Type* says of images in several energies."""


def rescale_type_of(ds: Frame, kinds: list[str]) -> str | None:
    """Return what rescaled values are; a map of a material, which may leave that out or call it HU, is none in HU.

    References
    ----------
    DICOM PS3.3, C.11.1.1.2 (Modality LUT and Rescale Type), C.8.15.2.1.1.5 (Multi-energy CT images).
    """
    said = _unit(text_of(ds, "RescaleType"), term_of(ds, "RescaleType"))
    kind = kinds[3] if len(kinds) > 3 else ""
    if said is None or (said == "HU" and kind != "MAT_SPECIFIC"):  # what a material absorbs may be given in HU
        return MAPS.get(kind, said)
    return said


def uid_of(ds: Frame | pydicom.Dataset, keyword: str) -> str:
    """Return a UID; of one that cannot be one, a hash, since a damaged length lets it swallow what follows it."""
    text = text_of(ds, keyword)
    return text if UID_PATTERN.fullmatch(text) else f"{MALFORMED}{hashlib.sha256(text.encode()).hexdigest()[:16]}"


UID_PATTERN = re.compile("[0-9A-Fa-f.]{0,64}")  # some write hexadecimal digits, which do no harm


MOST_GROUPED = {
    "RescaleSlope": 0.0,
    "RescaleIntercept": 65536.0,
    "PixelSpacing": 0.0,
    "ImageOrientationPatient": 0.0,
    "ImagePositionPatient": 10_000.0,
}
"""The largest number that could be meant by one with a comma before its thousands. Others have no decimals."""


def decimals_of(ds: Frame, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return `count` finite numbers, or None: half a position is none."""
    values = binary_numbers(raw_of(ds, keyword), short=keyword not in MOST_GROUPED)
    if values is None:
        text = text_of(ds, keyword)
        if "," in text and (text := with_points(text, count, MOST_GROUPED.get(keyword, math.inf))):
            ds.remarks.add("comma")
        try:
            values = tuple(float(part.replace("_", "?")) for part in text.split("\\"))  # 1_0 is no number
        except ValueError:
            return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def decimal_of(ds: Frame, keyword: str) -> float | None:
    """Return a number that is written in digits (DS); None where there is none."""
    values = decimals_of(ds, keyword, 1)
    return values[0] if values else None


def number_of(ds: Frame, keyword: str) -> str:
    """Return one number in floating point (FL, FD) or as text (DS), in six digits; "" where there is none."""
    element = raw_of(ds, keyword)
    if element is None:
        return ""
    value = element.value
    if isinstance(value, bytes) and element.VR != "DS" and keyword != "TriggerTime":
        layout = {4: "f", 8: "d"}.get(len(value))
        number = struct.unpack(_order(element) + layout, value)[0] if layout else math.nan
    else:
        number = decimal_of(ds, keyword)
    return f"{number:.6g}" if number is not None and math.isfinite(number) else ""


def indices_of(ds: Frame) -> tuple[int, ...]:
    """Return Dimension Index Values (UL, as many as there are dimensions)."""
    element = raw_of(ds, "DimensionIndexValues")
    value = element.value if element is not None else None
    if isinstance(value, bytes):
        return struct.unpack(f"{_order(element)}{len(value) // 4}I", value[: len(value) // 4 * 4])[:MOST_DIMENSIONS]
    return () if value is None else (value,) if isinstance(value, int) else tuple(map(int, value))[:MOST_DIMENSIONS]


def _order(element: Any) -> str:
    return "<" if getattr(element, "is_little_endian", True) else ">"


def integer_of(ds: Frame, keyword: str) -> int | None:
    """Return an integer string (IS), which has 32 bits; some write it as a decimal."""
    value = decimal_of(ds, keyword)
    return int(value) if value is not None and value == int(value) and abs(value) < 2**31 else None


def binary_of(ds: Frame, keyword: str) -> int | None:
    """Return the first 16 bits (US, or SS taken as US); of UL, in either byte order, the low ones."""
    element = raw_of(ds, keyword)
    value = element.value if element is not None else None
    if isinstance(value, int):  # pydicom has converted it, to know the sign of padding in a functional group
        return value & 0xFFFF
    if (number := written_number(element)) is not None:  # as text, or as floating point
        return int(number) & 0xFFFF if number == int(number) and abs(number) < 2**16 else None
    if not isinstance(value, bytes) or len(value) < 2:
        return None
    if getattr(element, "is_little_endian", True):
        return int.from_bytes(value[:2], "little")
    return int.from_bytes(value[-2:], "big")


def pixel_value(value: int | None, bits: int | None, signed: bool | None) -> int | None:
    """Return a padding value with the sign of the pixels, whatever VR it was written with: 63536 may mean −2000."""
    if value is None or bits not in (8, 16):
        return None
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value
