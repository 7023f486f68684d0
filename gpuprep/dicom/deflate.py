"""Inflates deflated data sets and deflated frames within limits.

In the deflated transfer syntax, everything after the meta group is one raw DEFLATE stream. pydicom inflates all of it,
without a limit on its size.
"""

from __future__ import annotations

import io
import zlib
from typing import BinaryIO

from gpuprep.dicom.elements import LONG_VRS
from gpuprep.dicom.uids import DEFLATED_DATA_SETS
from gpuprep.errors import DecodeError

_META_BYTES = 4096
"""Length of the file that is searched for the meta group, which takes a few hundred bytes."""
_CHUNK = 64 * 1024


def inflated(f: BinaryIO, most_bytes: int) -> tuple[BinaryIO, str, str]:
    """Return the inflated data set of a deflated file, and the transfer syntax and SOP class of its meta group.

    A file that is not deflated is returned as it is, at its beginning, with "" for both.

    Parameters
    ----------
    f : binary stream
        A DICOM file, positioned at its beginning.
    most_bytes : int
        Largest number of bytes to inflate.

    References
    ----------
    DICOM PS3.5, A.5 (DICOM Deflated Little Endian Transfer Syntax).
    """
    head = f.read(132 + _META_BYTES)
    meta, end = _meta(head)
    syntax = _text(meta, 0x0010)
    if syntax not in DEFLATED_DATA_SETS:
        f.seek(0)
        return f, "", ""
    f.seek(end)
    unpack = zlib.decompressobj(-zlib.MAX_WBITS)
    out = io.BytesIO()
    while not unpack.eof and out.tell() < most_bytes and (packed := unpack.unconsumed_tail or f.read(_CHUNK)):
        try:
            out.write(unpack.decompress(packed, most_bytes - out.tell()))
        except zlib.error:  # the data before the damage may be enough
            break
    out.seek(0)
    return out, syntax, _text(meta, 0x0002)


def inflated_frame(stream: bytes, size: int) -> bytes:
    """Return the inflated bytes of a frame that is deflated on its own.

    Parameters
    ----------
    stream : bytes
        The deflated frame with its padding.
    size : int
        Expected number of inflated bytes; one more, for padding, is accepted.

    Raises
    ------
    DecodeError
        If the frame is damaged, truncated, or inflates to another size.

    References
    ----------
    DICOM PS3.5, A.4 (Deflated Image Frame Compression).
    """
    unpack = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = unpack.decompress(stream, size + 2)
    except zlib.error as exc:
        raise DecodeError(f"its deflated frame is damaged: {exc}") from exc
    if not size <= len(data) <= size + 1 or not unpack.eof:
        state = "" if unpack.eof else " and does not end there"
        raise DecodeError(f"its deflated frame unpacks to {len(data)} bytes{state}, not {size}")
    return data[:size]


def _text(meta: dict[int, bytes], number: int) -> str:
    return meta.get(number, b"").strip(b" \0").decode("ascii", "replace")


def _meta(head: bytes) -> tuple[dict[int, bytes], int]:
    """Return the values of the meta group by element number, and its end in bytes.

    References
    ----------
    DICOM PS3.10, 7.1 (DICOM File Meta Information): explicit VR, little endian.
    """
    elements: dict[int, bytes] = {}
    at = 132
    while head[128:132] == b"DICM" and head[at : at + 2] == b"\x02\x00" and at + 12 <= len(head):
        number = int.from_bytes(head[at + 2 : at + 4], "little")
        start = at + (12 if head[at + 4 : at + 6] in LONG_VRS else 8)
        length = int.from_bytes(head[start - 4 : start] if start - at == 12 else head[at + 6 : at + 8], "little")
        elements[number] = head[start : start + length]
        at = start + length
    return elements, at
