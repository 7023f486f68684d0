"""Deflated transfer syntax: everything after the meta group is one zlib stream, unpacked here within limits.

pydicom unpacks it whole, however large it turns out to be.
"""

from __future__ import annotations

import io
import zlib
from typing import BinaryIO

from gpuprep.syntaxes import DEFLATED

_LONG_FORM = {b"OB", b"OW", b"SQ", b"UN", b"UT", b"OF", b"OD", b"OL", b"OV", b"UC", b"UR", b"SV", b"UV"}
_META_BYTES = 4096
"""The transfer syntax stands among the first few hundred."""
_CHUNK = 64 * 1024


def inflated(f: BinaryIO, most_bytes: int) -> tuple[BinaryIO, str]:
    """Return the unpacked data set of a deflated file and the SOP class its meta group announces.

    Any other file is returned as it is, at its beginning, with "".

    Parameters
    ----------
    f : binary stream
        At the beginning of a DICOM file.
    most_bytes : int
        Stop unpacking there.

    References
    ----------
    DICOM PS3.5, A.5 (DICOM Deflated Little Endian Transfer Syntax).
    """
    head = f.read(132 + _META_BYTES)
    meta, end = _meta(head)
    if meta.get(0x0010, b"").strip(b" \0") != DEFLATED.encode():
        f.seek(0)
        return f, ""
    f.seek(end)
    unpack = zlib.decompressobj(-zlib.MAX_WBITS)
    out = io.BytesIO()
    while not unpack.eof and out.tell() < most_bytes and (packed := unpack.unconsumed_tail or f.read(_CHUNK)):
        try:
            out.write(unpack.decompress(packed, most_bytes - out.tell()))
        except zlib.error:  # what came before the damage may be enough
            break
    out.seek(0)
    return out, meta.get(0x0002, b"").strip(b" \0").decode("ascii", "replace")


def _meta(head: bytes) -> tuple[dict[int, bytes], int]:
    """Return the elements of a meta group by number, and where it ends.

    References
    ----------
    DICOM PS3.10, 7.1 (DICOM File Meta Information): explicit VR, little endian.
    """
    elements: dict[int, bytes] = {}
    at = 132
    while head[128:132] == b"DICM" and head[at : at + 2] == b"\x02\x00" and at + 12 <= len(head):
        number = int.from_bytes(head[at + 2 : at + 4], "little")
        start = at + (12 if head[at + 4 : at + 6] in _LONG_FORM else 8)
        length = int.from_bytes(head[start - 4 : start] if start - at == 12 else head[at + 6 : at + 8], "little")
        elements[number] = head[start : start + length]
        at = start + length
    return elements, at
