"""Reads values of an image or of one of its frames: text, numbers, units and UIDs."""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gpuprep.core.formatting import printable
from gpuprep.core.series import MALFORMED_UID_PREFIX
from gpuprep.dicom.elements import (
    TAGS,
    UID_PATTERN,
    DataSet,
    Elements,
    ElementTable,
    ascii_of,
    element_of,
    first_16_bits,
)
from gpuprep.dicom.odd_numbers import BINARY, binary_numbers, with_points, written_number

if TYPE_CHECKING:
    import pydicom


MOST_DIMENSIONS = 16
"""Dimensions of a multi-frame image that are read; more come from a damaged header."""


MOST_FRAMES = 2**16
"""Frames in one file; more come from a damaged header."""


class Frame:
    """One frame of a multi-frame image: its own attributes, else the shared ones, else those of the image.

    References
    ----------
    DICOM PS3.3, C.7.6.16 (Multi-frame Functional Groups module).
    """

    def __init__(self, *layers: DataSet) -> None:
        self.remarks: set[str] = set()
        """Deviations from DICOM that were understood: see `SliceHeader.remarks`."""
        elements: Mapping[int, Any]
        if len(layers) == 1 and isinstance(layers[0], ElementTable):
            elements = layers[0]
        else:
            # Keys are plain integers, since pydicom compares its tags in Python: forty times for each image.
            elements = {
                int(tag): layer.get_item(tag)
                for layer in reversed(layers)
                for tag in layer.keys()  # noqa: SIM118 - a data set iterates over its elements, and converts them
            }
        self.get_item: Callable[[int], Any] = elements.get
        """Returns the element of the innermost layer that has a tag; None where none has."""


def frames_of(ds: DataSet) -> list[tuple[Frame, int]]:
    """Return the frames of an image, each with the number of frames; only the first if others have no attributes."""
    image = Frame(ds)
    binary = getattr(element_of(image, "NumberOfFrames"), "VR", None) in BINARY
    count = integer_of(image, "NumberOfFrames") if binary or text_of(image, "NumberOfFrames") else 1
    shared_tag, own_tag = TAGS["SharedFunctionalGroupsSequence"], TAGS["PerFrameFunctionalGroupsSequence"]
    if count == 0 and own_tag not in ds:
        image.remarks.add("frames-0")
        count = 1
    if count is None or count < 1:
        raise ValueError(f"Number of Frames is {text_of(image, 'NumberOfFrames')[:20]!r}")
    if own_tag not in ds:
        # The only sequence that matters for a single frame describes how it was computed from several energies.
        return [(Frame(*energies, ds) if (energies := _energies(ds)) else image, count)]
    shared: list[DataSet] = [
        layer for item in ((ds[shared_tag].value or []) if shared_tag in ds else []) for layer in _macros(item)
    ]
    own = list(ds[own_tag].value or [])
    if len(own) != count or count > MOST_FRAMES:
        raise ValueError(f"{len(own)} functional groups for {count} frames")
    shared += _energies(ds)
    return [(Frame(*_macros(item), *shared, ds), count) for item in own]


def _energies(ds: DataSet) -> list[DataSet]:
    """Return the first item of the Multi-energy CT Processing Sequence of an image that has one outside its frames."""
    tag = TAGS["MultienergyCTProcessingSequence"]
    return [items[0]] if tag in ds and (items := ds[tag].value) else []


def _macros(item: pydicom.Dataset) -> list[pydicom.Dataset]:
    """Return the macros of a functional group, each of which is a sequence of one item."""
    return [element.value[0] for element in item if element.VR == "SQ" and element.value]


@lru_cache(maxsize=4096)
def hash_of(text: str) -> str:
    """Return 64 bits of SHA-256: enough to distinguish the values of one series."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def either(a: int | None, b: int | None) -> int | None:
    """Return the first number, or the second where the first is None."""
    return b if a is None else a


def text_of(ds: Elements, keyword: str) -> str:
    """Return a value as printable text; "" where it is absent."""
    element = ds.get_item(TAGS[keyword])
    return "" if element is None else printable(ascii_of(element.value))


TERMS = {
    "Modality": "CT MR PT NM CR DX MG XA RF US OT SC SEG RTIMAGE RTDOSE RTSTRUCT RTPLAN PR SR REG",
    "RescaleType": "HU US OD HU_MOD MGML Z_EFF ED EDW PCT",
    "PhotometricInterpretation": "MONOCHROME1 MONOCHROME2 RGB PALETTE_COLOR YBR_FULL YBR_FULL_422 YBR_ICT YBR_RCT",
}
"""Defined terms that are kept; any other word, which might be a name, becomes "another"."""


def term_of(ds: Elements, keyword: str) -> str | None:
    """Return a defined term in capitals, or "another"; None where it is absent."""
    word = text_of(ds, keyword).upper()
    return None if not word else word if word.replace(" ", "_") in TERMS[keyword].split() else "another"


_HOUNSFIELD = re.compile(r"HU|HOUN[DT]?S?E?F[IE]{1,2}LDS?(UNITS?)?(HU)?|HNSF'U")
"""HU as writers spell it, without blanks and punctuation: some GE workstations write "Houndsfield Unit"; UCUM has
[hnsf'U]."""


_PUNCTUATION = str.maketrans("", "", " ._-()[]")


_CODE = re.compile("[A-Z][A-Z0-9_]{0,15}")


def _unit(written: str, known: str | None) -> str | None:
    """Return "HU" for every spelling of it, another unit unchanged if it looks like a code, else "another".

    The standard's terms are single words of capital letters and digits. Such a word is kept for messages. Any other
    text might be a name, and is not kept.
    """
    if known != "another":
        return known
    if _HOUNSFIELD.fullmatch(written.upper().translate(_PUNCTUATION)):
        return "HU"
    return written if _CODE.fullmatch(written) else known


MAPS = {"EFF_ATOMIC_NUM": "Z_EFF", "ELECTRON_DENSITY": "ED", "MAT_FRACTIONAL": "PCT", "MAT_SPECIFIC": "MGML"}
"""Rescale types by the fourth value of *Image Type* or *Frame Type* of multi-energy images."""


def rescale_type_of(ds: Frame, kinds: list[str]) -> str | None:
    """Return the unit of rescaled values; that of a material map is never HU, even if the header says so.

    References
    ----------
    DICOM PS3.3, C.11.1.1.2 (Modality LUT and Rescale Type), C.8.15.2.1.1.5 (Multi-energy CT images).
    """
    said = _unit(text_of(ds, "RescaleType"), term_of(ds, "RescaleType"))
    kind = kinds[3] if len(kinds) > 3 else ""
    if said is None or (said == "HU" and kind != "MAT_SPECIFIC"):  # the attenuation of a material may be given in HU
        return MAPS.get(kind, said)
    return said


def uid_of(ds: Elements, keyword: str) -> str:
    """Return a UID; a hash of a malformed one, since a damaged length makes it include the elements that follow."""
    text = text_of(ds, keyword)
    return (
        text
        if UID_PATTERN.fullmatch(text)
        else f"{MALFORMED_UID_PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    )


MOST_GROUPED = {
    "RescaleSlope": 0.0,
    "RescaleIntercept": 65536.0,
    "PixelSpacing": 0.0,
    "ImageOrientationPatient": 0.0,
    "ImagePositionPatient": 10_000.0,
}
"""Largest number that a comma before the thousands could mean, by keyword; others have no decimals."""


def decimals_of(ds: Frame, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return `count` finite numbers; None if there are fewer, more, or others."""
    values = binary_numbers(element_of(ds, keyword), short=keyword not in MOST_GROUPED)
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
    """Return a decimal string (DS); None where it is absent or malformed."""
    values = decimals_of(ds, keyword, 1)
    return values[0] if values else None


def number_of(ds: Frame, keyword: str) -> str:
    """Return a number (FL, FD or DS) with six digits; "" where it is absent."""
    number = decimal_of(ds, keyword) if keyword == "TriggerTime" else floating_of(ds, keyword)
    return f"{number:.6g}" if number is not None else ""


def floating_of(ds: Frame, keyword: str) -> float | None:
    """Return a binary number (FL or FD), which some writers give as a decimal string (DS); None where it is absent."""
    element = element_of(ds, keyword)
    if element is None:
        return None
    value = element.value
    if not isinstance(value, bytes) or element.VR == "DS":
        return decimal_of(ds, keyword)
    layout = {4: "f", 8: "d"}.get(len(value))
    number = struct.unpack(_order(element) + layout, value)[0] if layout else math.nan
    return number if math.isfinite(number) else None


def indices_of(ds: Frame) -> tuple[int, ...]:
    """Return *Dimension Index Values* (UL), one per dimension."""
    element = element_of(ds, "DimensionIndexValues")
    value = element.value if element is not None else None
    if isinstance(value, bytes):
        return struct.unpack(f"{_order(element)}{len(value) // 4}I", value[: len(value) // 4 * 4])[:MOST_DIMENSIONS]
    return () if value is None else (value,) if isinstance(value, int) else tuple(map(int, value))[:MOST_DIMENSIONS]


def _order(element: Any) -> str:
    return "<" if getattr(element, "is_little_endian", True) else ">"


def integer_of(ds: Frame, keyword: str) -> int | None:
    """Return an integer string (IS) of 32 bits, which some writers give as a decimal; None where it is absent."""
    value = decimal_of(ds, keyword)
    return int(value) if value is not None and value == int(value) and abs(value) < 2**31 else None


def binary_of(ds: Frame, keyword: str) -> int | None:
    """Return the first 16 bits (US, or SS taken as US); of UL, in either byte order, the low ones."""
    element = element_of(ds, keyword)
    value = element.value if element is not None else None
    if isinstance(value, int):  # pydicom converts padding in a functional group, to know its sign
        return value & 0xFFFF
    if (number := written_number(element)) is not None:  # as text or floating point
        return int(number) & 0xFFFF if number == int(number) and abs(number) < 2**16 else None
    if not isinstance(value, bytes) or len(value) < 2:
        return None
    return first_16_bits(element)


def pixel_value(value: int | None, bits: int | None, signed: bool | None) -> int | None:
    """Return a padding value with the signedness of the pixels, whatever its VR: 63536 may mean −2000."""
    if value is None or bits not in (8, 16):
        return None
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value
