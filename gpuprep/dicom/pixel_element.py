"""Finds the pixels of an image in its file: offset and length of *Pixel Data*, and what a JPEG 2000 stream says."""

from __future__ import annotations

from typing import Any, BinaryIO

from gpuprep.dicom.elements import LONG_VRS, SHORT_VRS, DataSet
from gpuprep.dicom.header_values import Frame, binary_of, integer_of
from gpuprep.dicom.jpeg_markers import frame_info


def locate_pixels(start: int, head: bytes, implicit: bool, big: bool) -> tuple[int | None, int | None]:
    """Return offset and length of the value of *Pixel Data* from its first 12 bytes at `start`; length 0 if absent.

    The element itself shows whether it has a VR: lengths are even, but the letters of a VR of pixels (O., U. or S.)
    would be an odd length. For other letters, the VR encoding of the data set decides.

    References
    ----------
    DICOM PS3.5, 7.1.2 and 7.1.3 (Data Element Structure with and without VR).
    """
    tag = bytes((head[1], head[0], head[3], head[2])) if len(head) >= 8 and not big else head[:4]
    if tag in _FLOAT_PIXELS:
        raise ValueError(f"its pixels are {_FLOAT_PIXELS[tag]}, which are not stored values of CT")
    if tag != b"\x7f\xe0\x00\x10" or len(head) < 8:
        return None, 0
    order: Any = "big" if big else "little"
    vr = head[4:6]
    odd = bool(vr[0] % 2)
    if vr in SHORT_VRS and (odd or not implicit):
        return start + 8, int.from_bytes(head[6:8], order)
    if vr in LONG_VRS or (not implicit and (odd or (vr.isalpha() and vr.isupper()))):
        return start + 12, int.from_bytes(head[8:12], order)  # the two reserved bytes may have any value
    return start + 8, int.from_bytes(head[4:8], order)


def jpeg2000_format(f: BinaryIO, offset: int) -> str | None:
    """Return sign and bits of the first code stream of encapsulated pixels ("i16", "u12"); None unless JPEG 2000."""
    f.seek(offset)
    table_bytes = int.from_bytes(f.read(8)[4:], "little")
    f.seek(offset + 8 + table_bytes + 8)
    info = frame_info(f.read(CODE_STREAM_HEAD_BYTES))
    if info is None or info.kind != "JPEG 2000":
        return None
    return f"{'i' if info.signed else 'u'}{info.precision}"


CODE_STREAM_HEAD_BYTES = 512
"""Length that contains the precision of a JPEG 2000 code stream, even in a JP2 file."""

_FLOAT_PIXELS = {
    b"\x7f\xe0\x00\x08": "Float Pixel Data (7FE0,0008)",
    b"\x7f\xe0\x00\x09": "Double Float Pixel Data (7FE0,0009)",
}


def is_native_length(ds: DataSet, length: int | None) -> bool:
    """Whether a value has the length of the native pixels of all frames."""
    image = Frame(ds)
    rows, columns, bits = (binary_of(image, k) or 0 for k in ("Rows", "Columns", "BitsAllocated"))
    samples, frames = binary_of(image, "SamplesPerPixel") or 1, integer_of(image, "NumberOfFrames") or 1
    size = rows * columns * samples * frames * bits // 8
    return size > 0 and length in (size, size + size % 2)
