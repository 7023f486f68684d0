"""Layout of elements, items and delimiters in little-endian data sets, for readers that do without pydicom.

References
----------
DICOM PS3.5, 7.1 (Data Elements), 7.5 (Nesting of Data Sets).
"""

from __future__ import annotations

from struct import Struct

from gpuprep.dicom.elements import LONG_VRS, SHORT_VRS

IMPLICIT = Struct("<HHL").unpack_from
"""Group, element number and length of an element without VR."""
EXPLICIT = Struct("<HH2sH").unpack_from
"""Group, element number, VR and short length of an element."""
LENGTH = Struct("<L").unpack_from
"""Long length."""

HEAD_BYTES = dict.fromkeys(SHORT_VRS, 8) | dict.fromkeys(LONG_VRS, 12)
"""Length of an element before its value, by VR."""
VR_NAMES = {vr: vr.decode() for vr in HEAD_BYTES}

DELIMITERS = 0xFFFE_0000
"""Smallest tag of items and delimiters."""
ITEM, ITEM_END, SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0\0\0\0\0", b"\xfe\xff\xdd\xe0\0\0\0\0"
"""Tag of an item, and the delimiters of items and sequences of undefined length."""

MOST_NESTED = 8
"""Upper limit of sequences inside each other."""


class UnusualError(Exception):
    """The data set is not ordinary, so pydicom has to read it."""


def is_sequence(tag: int, head: bytes) -> bool:
    """Return whether pydicom takes an element of undefined length without a VR for a sequence."""
    from pydicom.datadict import dictionary_VR

    try:
        return dictionary_VR(tag) == "SQ"
    except KeyError:  # private, or unknown
        return head == ITEM
