"""Splits a sequence in memory into its items, several times as fast as pydicom.

A sequence is split only if nothing in it is unusual. Any other one is refused, and pydicom reads it. So pydicom alone
decides what damage and deviations from the standard mean.

References
----------
DICOM PS3.5, 7.1 (Data Elements), 7.5 (Nesting of Data Sets).
"""

from __future__ import annotations

import struct
import sys
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

from gpuprep.dicom.elements import LONG_VRS, SHORT_VRS, TAGS
from gpuprep.dicom.uids import UNDEFINED_LENGTH

if TYPE_CHECKING:
    import pydicom

MOST_NESTED = 8
"""Upper limit of sequences inside each other."""

_IMPLICIT, _EXPLICIT, _LENGTH = Struct("<HHL").unpack_from, Struct("<HH2sH").unpack_from, Struct("<L").unpack_from
_HEAD_BYTES = dict.fromkeys(SHORT_VRS, 8) | dict.fromkeys(LONG_VRS, 12)
_NAMES = {vr: vr.decode() for vr in _HEAD_BYTES}
_CHARACTER_SET = TAGS["SpecificCharacterSet"]
_DELIMITERS = 0xFFFE_0000
_ITEM, _ITEM_END, _SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0\0\0\0\0", b"\xfe\xff\xdd\xe0\0\0\0\0"

DELIMITER_BYTES = len(_SEQUENCE_END)
"""Length of the delimiter after the last item of a sequence of undefined length."""


class _UnusualError(Exception):
    """The sequence is not ordinary."""


class ItemElement(NamedTuple):
    """An element of an item as it stands in the file, with the attributes of pydicom's `RawDataElement`."""

    VR: str | None
    length: int
    value: bytes
    """Without the delimiter, if the length is undefined."""
    value_tell: int
    """Position of the value, as pydicom counts it: a sequence of defined length is a file of its own."""
    is_implicit_VR: bool  # noqa: N815 - the name in pydicom
    is_little_endian: bool = True


class Item:
    """An item of a sequence, whose values are taken from the bytes of the sequence when they are asked for."""

    __slots__ = ("_elements", "_source")

    def __init__(self, source: _Source, elements: dict[int, tuple[bytes, int, int, int]]) -> None:
        self._source = source
        self._elements = elements

    def get_item(self, tag: int) -> ItemElement | None:
        """Return the element of a tag; None where it is absent."""
        found = self._elements.get(tag)
        if found is None:
            return None
        vr, length, start, stop = found
        data, implicit, origin = self._source
        return ItemElement(_NAMES.get(vr), length, data[start:stop], origin + start, implicit)

    def as_dataset(self) -> pydicom.Dataset:
        """Return the item as pydicom would."""
        from pydicom import Dataset
        from pydicom.dataelem import RawDataElement
        from pydicom.tag import BaseTag

        found = {BaseTag(tag): self.get_item(tag) for tag in self._elements}
        return Dataset({tag: RawDataElement(tag, *element) for tag, element in found.items() if element is not None})


class _Source(NamedTuple):
    """Bytes of a sequence."""

    data: bytes
    implicit: bool
    """Whether its elements have no VR."""
    origin: int
    """Position at which pydicom counts the first byte."""


def ordinary_items(element: Any) -> list[Item] | None:
    """Return the items of a sequence; None if pydicom has to read them.

    Parameters
    ----------
    element : RawDataElement or ItemElement
        Element of a sequence. Names in its items cannot be read, because the character set is unknown.
    """
    value = element.value
    if not isinstance(value, bytes) or element.VR not in ("SQ", None) or not element.is_little_endian:
        return None
    if element.length not in (len(value), UNDEFINED_LENGTH):
        return None
    origin = element.value_tell if element.length == UNDEFINED_LENGTH else 0
    found: list[Item] = []
    try:
        _after_items(_Source(value, element.is_implicit_VR, origin), 0, len(value), 0, found)
    except (_UnusualError, struct.error, KeyError):
        return None
    return found


def ordinary_length(data: bytes, implicit: bool) -> int | None:
    """Return the length of the items at the beginning of `data`, up to the delimiter of their sequence.

    Parameters
    ----------
    data : bytes
        Value of a sequence of undefined length, and what follows.
    implicit : bool
        Whether its elements have no VR.

    Returns
    -------
    int or None
        None if pydicom has to read the sequence.
    """
    try:
        return _after_items(_Source(data, implicit, 0), 0, None, 0) - DELIMITER_BYTES
    except (_UnusualError, struct.error, KeyError):
        return None


def _after_items(source: _Source, at: int, end: int | None, nested: int, found: list[Item] | None = None) -> int:
    """Return the position after a sequence whose items begin at `at`; its length is undefined without an `end`."""
    data = source.data
    while at != end:
        head = data[at : at + 8]
        at += 8
        if head == _SEQUENCE_END and end is None:
            return at
        if head[:4] != _ITEM or len(head) < 8 or nested > MOST_NESTED:
            raise _UnusualError
        (length,) = _LENGTH(head, 4)
        elements: dict[int, tuple[bytes, int, int, int]] | None = None if found is None else {}
        stop = sys.maxsize if length == UNDEFINED_LENGTH else at + length
        if stop > len(data) and stop != sys.maxsize:
            raise _UnusualError
        at = _after_elements(source, at, stop, nested, elements)
        if length == UNDEFINED_LENGTH:
            if data[at : at + 8] != _ITEM_END:
                raise _UnusualError
            at += 8
        if found is not None and elements is not None:
            found.append(Item(source, elements))
    return at


def _after_elements(
    source: _Source, at: int, stop: int, nested: int, found: dict[int, tuple[bytes, int, int, int]] | None
) -> int:
    """Return the position after the elements of an item, at `stop` or a delimiter; add them to `found`."""
    data, implicit, _ = source
    vr, head_bytes, last = b"", 8, -1
    while at < stop:
        if implicit:
            group, number, length = _IMPLICIT(data, at)
        else:
            group, number, vr, length = _EXPLICIT(data, at)
        tag = group << 16 | number
        if tag >= _DELIMITERS:
            break
        if not implicit and (head_bytes := _HEAD_BYTES[vr]) == 12:
            (length,) = _LENGTH(data, at + 8)
        if tag <= last or tag == _CHARACTER_SET:
            raise _UnusualError
        last = tag
        start = at + head_bytes
        if length == UNDEFINED_LENGTH:
            if not (_is_sequence(tag, data[start : start + 4]) if implicit else vr == b"SQ"):
                raise _UnusualError
            at = _after_items(source, start, None, nested + 1)
            value_stop = at - DELIMITER_BYTES
        else:
            at = value_stop = start + length
            if at > len(data):
                raise _UnusualError
        if found is not None:
            found[tag] = vr, length, start, value_stop
    if at != stop and stop != sys.maxsize:
        raise _UnusualError
    return at


def _is_sequence(tag: int, head: bytes) -> bool:
    """Return whether pydicom takes an element of undefined length without a VR for a sequence."""
    from pydicom.datadict import dictionary_VR

    try:
        return dictionary_VR(tag) == "SQ"
    except KeyError:  # private, or unknown
        return head == _ITEM
