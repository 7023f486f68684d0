"""One file to the facts of its header: what it is, where it lies, where its pixels begin. Pixels are not read."""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from gpuprep.series import Series, SliceHeader
from gpuprep.text import printable

if TYPE_CHECKING:
    import pydicom

# pydicom is imported where a file is read: the parent of a cohort has its workers do that, and stays small.

CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT Image Storage",
}

TAGS = {
    "SOPClassUID": 0x0008_0016,
    "SOPInstanceUID": 0x0008_0018,
    "InstanceNumber": 0x0020_0013,
    "StudyInstanceUID": 0x0020_000D,
    "SeriesInstanceUID": 0x0020_000E,
    "SeriesNumber": 0x0020_0011,
    "ImagePositionPatient": 0x0020_0032,
    "ImageOrientationPatient": 0x0020_0037,
    "FrameOfReferenceUID": 0x0020_0052,
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
}
"""Everything that is read of a header. No name, no date, no free text ever enters the program."""

IMPLICIT_VR, EXPLICIT_VR, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
"""Not compressed; in the first two the pixel bytes lie in the file as little-endian integers."""


FINEST_MM, COARSEST_MM, FARTHEST_MM = 1e-3, 100.0, 1e6
"""Pixel spacings and positions beyond these are damage."""


@dataclass(slots=True)
class Headers:
    """What a list of files turned out to be."""

    found: list[tuple[Series, tuple[int, int]]]
    """CT images as series of one slice, with device and inode: these are equal for a file and a link to it."""
    passed_over: Counter[str]
    unreadable: list[tuple[str, str]]


def read_headers(files: list[str]) -> Headers:
    """Return what each of some files is."""
    headers = Headers([], Counter(), [])
    for file in files:
        try:
            status = os.stat(file)
            series = _read_header(file, status)
        except _NotCtError as exc:
            headers.passed_over[str(exc)] += 1
        except Exception as exc:  # pydicom raises whatever a broken file provokes
            headers.unreadable.append((printable(file), printable(f"{type(exc).__name__}: {exc}")))
        else:
            headers.found.append((series, (status.st_dev, status.st_ino)))
    return headers


class _NotCtError(Exception):
    """The file is no CT image; the text says what it is."""


def _read_header(file: str, status: os.stat_result) -> Series:
    import pydicom

    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise _NotCtError("not a regular file")
    if not status.st_size and file.lower().endswith(".dcm"):
        raise ValueError("the file is empty")
    with open(file, "rb") as f:
        head = f.read(132)
        # Without a preamble a data set begins with a group 0008 or 0002 element, in either byte order.
        bare = head[:4] in _FIRST_TAGS
        if head[128:] != b"DICM" and not bare:
            raise _NotCtError("not DICOM")
        f.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd values are dealt with below, one by one
            ds = pydicom.dcmread(f, stop_before_pixels=True, specific_tags=list(TAGS.values()), force=bare)
            _check_class(
                _text(ds, "SOPClassUID"), str(getattr(ds.file_meta, "MediaStorageSOPClassUID", "") or ""), bare
            )
            syntax = str(getattr(ds.file_meta, "TransferSyntaxUID", "") or "")
            if not syntax:  # no meta group: what pydicom found by looking
                implicit, little = ds.original_encoding
                syntax = IMPLICIT_VR if implicit else EXPLICIT_VR if little else BIG_ENDIAN
            offset, length = _pixels(f) if syntax in (IMPLICIT_VR, EXPLICIT_VR) else (None, None)
            return _facts(ds, file, status, syntax, offset, length)


_FIRST_TAGS = {
    group + element
    for group, elements in (
        (b"\x08\x00", (b"\x00\x00", b"\x01\x00", b"\x05\x00", b"\x08\x00", b"\x12\x00", b"\x16\x00", b"\x18\x00")),
        (b"\x02\x00", (b"\x00\x00", b"\x01\x00", b"\x02\x00", b"\x10\x00")),
        (b"\x00\x08", (b"\x00\x00", b"\x00\x01", b"\x00\x05", b"\x00\x08", b"\x00\x12", b"\x00\x16", b"\x00\x18")),
    )
    for element in elements
}


def _check_class(sop_class: str, announced: str, bare: bool) -> None:
    """Raise unless the file is a CT image: by its data set, or by its meta group where the data set was cut short."""
    kind = sop_class or announced
    if kind in CT_CLASSES:
        return
    if announced in CT_CLASSES:
        raise ValueError("SOP Class UID is damaged: the meta group announces a CT image")
    if not kind:
        if bare:
            raise _NotCtError("not DICOM")
        raise ValueError("no SOP Class UID: cut short or damaged")
    from pydicom.uid import UID

    # In words of the standard, never of the file's own.
    name = UID(kind).name
    raise _NotCtError(name if name != kind else "DICOM of an unknown SOP class")


def _pixels(f: BinaryIO) -> tuple[int | None, int | None]:
    """Return offset and length of plain pixel bytes, from where pydicom stopped; length 0 where there are none.

    The element itself shows whether it has a VR, whatever the transfer syntax says: read as a length, the letters would
    be an odd one.
    """
    start = f.tell()
    head = f.read(12)
    if head[:4] != b"\xe0\x7f\x10\x00" or len(head) < 8:
        return None, 0
    explicit = head[4:8] in (b"OW\0\0", b"OB\0\0")
    return (
        (start + 12, int.from_bytes(head[8:12], "little"))
        if explicit
        else (start + 8, int.from_bytes(head[4:8], "little"))
    )


def _facts(
    ds: pydicom.Dataset, file: str, status: os.stat_result, syntax: str, offset: int | None, length: int | None
) -> Series:
    representation = _binary(ds, "PixelRepresentation")
    signed = {0: False, 1: True}.get(representation) if representation is not None else None
    bits = _binary(ds, "BitsAllocated")
    spacing = _decimals(ds, "PixelSpacing", 2)
    position = _decimals(ds, "ImagePositionPatient", 3)
    header = SliceHeader(
        path=file,
        file_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        sop_instance_uid=_uid(ds, "SOPInstanceUID"),
        instance_number=_integer(ds, "InstanceNumber"),
        position_mm=(position[0], position[1], position[2])
        if position and max(map(abs, position)) <= FARTHEST_MM
        else None,
        rescale_slope=_decimal(ds, "RescaleSlope"),
        rescale_intercept=_decimal(ds, "RescaleIntercept"),
        rescale_type=_text(ds, "RescaleType") or None,
        photometric=_text(ds, "PhotometricInterpretation") or None,
        samples_per_pixel=_binary(ds, "SamplesPerPixel") or 1,
        frames=_integer(ds, "NumberOfFrames") or 1,
        bits_allocated=bits,
        bits_stored=_binary(ds, "BitsStored"),
        high_bit=_binary(ds, "HighBit"),
        signed=signed,
        padding=_pixel_value(_binary(ds, "PixelPaddingValue"), bits, signed),
        padding_limit=_pixel_value(_binary(ds, "PixelPaddingRangeLimit"), bits, signed),
        transfer_syntax=syntax,
        pixel_offset=offset,
        pixel_bytes=length,
    )
    return Series(
        series_uid=_uid(ds, "SeriesInstanceUID"),
        study_uid=_uid(ds, "StudyInstanceUID"),
        frame_of_reference_uid=_uid(ds, "FrameOfReferenceUID"),
        series_number=_integer(ds, "SeriesNumber"),
        rows=_binary(ds, "Rows") or 0,
        columns=_binary(ds, "Columns") or 0,
        pixel_spacing_mm=(spacing[0], spacing[1])
        if spacing and FINEST_MM <= min(spacing) <= max(spacing) <= COARSEST_MM
        else None,
        orientation=_decimals(ds, "ImageOrientationPatient", 6),
        part=0,
        folder=os.path.dirname(file),
        slices=(header,),
    )


def _raw(ds: pydicom.Dataset, keyword: str) -> Any:
    """Return the bytes of an attribute as they stand in the file, with their byte order; converting them costs more."""
    tag = TAGS[keyword]
    return ds.get_item(tag) if tag in ds else None


def _text(ds: pydicom.Dataset, keyword: str) -> str:
    element = _raw(ds, keyword)
    value = element.value if element is not None else None
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return "" if value is None else printable(str(value).strip(" \0"))


def _uid(ds: pydicom.Dataset, keyword: str) -> str:
    """Return a UID; of one that cannot be one, a hash, since a damaged length lets it swallow what follows it."""
    text = _text(ds, keyword)
    return text if _UID.fullmatch(text) else f"malformed-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


_UID = re.compile("[0-9A-Fa-f.]{0,64}")  # some write hexadecimal digits, which do no harm


def _decimals(ds: pydicom.Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return `count` finite numbers, or None: half a position is none."""
    try:
        values = tuple(float(part.replace("_", "?")) for part in _text(ds, keyword).split("\\"))  # 1_0 is no number
    except ValueError:
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def _decimal(ds: pydicom.Dataset, keyword: str) -> float | None:
    values = _decimals(ds, keyword, 1)
    return values[0] if values else None


def _integer(ds: pydicom.Dataset, keyword: str) -> int | None:
    """Return an integer string (IS), which has 32 bits; some write it as a decimal."""
    value = _decimal(ds, keyword)
    return int(value) if value is not None and value == int(value) and abs(value) < 2**31 else None


def _binary(ds: pydicom.Dataset, keyword: str) -> int | None:
    """Return the first 16 bits (US, or SS taken as US)."""
    element = _raw(ds, keyword)
    value = element.value if element is not None else None
    if not isinstance(value, bytes) or len(value) < 2:
        return None
    return int.from_bytes(value[:2], "little" if element.is_little_endian else "big")


def _pixel_value(value: int | None, bits: int | None, signed: bool | None) -> int | None:
    """Return a padding value with the sign of the pixels, whatever VR it was written with: 63536 may mean −2000."""
    if value is None or bits not in (8, 16):
        return None
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value
