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
from typing import TYPE_CHECKING, Any, NamedTuple

from gpuprep.dicom.element_heads import (
    DELIMITERS,
    EXPLICIT,
    HEAD_BYTES,
    IMPLICIT,
    ITEM,
    ITEM_END,
    LENGTH,
    MOST_NESTED,
    SEQUENCE_END,
    VR_NAMES,
    UnusualError,
    is_sequence,
)
from gpuprep.dicom.elements import TAGS, Element
from gpuprep.dicom.uids import UNDEFINED_LENGTH

if TYPE_CHECKING:
    import pydicom

_CHARACTER_SET = TAGS["SpecificCharacterSet"]

DELIMITER_BYTES = len(SEQUENCE_END)
"""Length of the delimiter after the last item of a sequence of undefined length."""


class Item:
    """An item of a sequence, whose values are taken from the bytes of the sequence when they are asked for."""

    __slots__ = ("_elements", "_source")

    def __init__(self, source: _Source, elements: dict[int, tuple[bytes, int, int, int]]) -> None:
        self._source = source
        self._elements = elements

    def get_item(self, tag: int) -> Element | None:
        """Return the element of a tag; None where it is absent."""
        found = self._elements.get(tag)
        if found is None:
            return None
        vr, _, start, stop = found
        return Element(VR_NAMES.get(vr), self._source.data[start:stop])

    def items(self, tag: int) -> list[Item] | None:
        """Return the items of a sequence in this item; None if pydicom has to read them."""
        found = self._elements.get(tag)
        if found is None:
            return []
        vr, length, start, stop = found
        if vr not in (b"SQ", b""):
            return None
        # Without a copy of the bytes, which may be nearly all of a file.
        origin = self._source.origin if length == UNDEFINED_LENGTH else -start
        return _split(self._source._replace(origin=origin), start, stop)

    def as_dataset(self) -> pydicom.Dataset:
        """Return the item as pydicom would."""
        from pydicom import Dataset
        from pydicom.dataelem import RawDataElement
        from pydicom.tag import BaseTag

        data, implicit, origin = self._source
        return Dataset(
            {
                BaseTag(tag): RawDataElement(
                    BaseTag(tag), VR_NAMES.get(vr), length, data[start:stop], origin + start, implicit, True
                )
                for tag, (vr, length, start, stop) in self._elements.items()
            }
        )


class _Source(NamedTuple):
    """Bytes of a sequence."""

    data: bytes
    implicit: bool
    """Whether its elements have no VR."""
    origin: int
    """Position of the first byte, as pydicom counts it: a sequence of defined length is a file of its own."""


def ordinary_items(element: Any) -> list[Item] | None:
    """Return the items of a sequence; None if pydicom has to read them.

    Parameters
    ----------
    element : RawDataElement
        Element of a sequence. Names in its items cannot be read, because the character set is unknown.
    """
    value = element.value
    if not isinstance(value, bytes) or element.VR not in ("SQ", None) or not element.is_little_endian:
        return None
    if element.length not in (len(value), UNDEFINED_LENGTH):
        return None
    origin = element.value_tell if element.length == UNDEFINED_LENGTH else 0
    return _split(_Source(value, element.is_implicit_VR, origin), 0, len(value))


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
    except (UnusualError, struct.error, KeyError):
        return None


def _split(source: _Source, start: int, stop: int) -> list[Item] | None:
    """Return the items in the bytes from `start` to `stop`; None if pydicom has to read them."""
    found: list[Item] = []
    try:
        _after_items(source, start, stop, 0, found)
    except (UnusualError, struct.error, KeyError):
        return None
    return found


def _after_items(source: _Source, at: int, end: int | None, nested: int, found: list[Item] | None = None) -> int:
    """Return the position after a sequence whose items begin at `at`; its length is undefined without an `end`."""
    data = source.data
    while at != end:
        if end is not None and at > end:
            raise UnusualError
        head = data[at : at + 8]
        at += 8
        if head == SEQUENCE_END and end is None:
            return at
        if head[:4] != ITEM or len(head) < 8 or nested > MOST_NESTED:
            raise UnusualError
        (length,) = LENGTH(head, 4)
        elements: dict[int, tuple[bytes, int, int, int]] | None = None if found is None else {}
        stop = sys.maxsize if length == UNDEFINED_LENGTH else at + length
        if stop > len(data) and stop != sys.maxsize:
            raise UnusualError
        at = _after_elements(source, at, stop, nested, elements)
        if length == UNDEFINED_LENGTH:
            if data[at : at + 8] != ITEM_END:
                raise UnusualError
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
            group, number, length = IMPLICIT(data, at)
        else:
            group, number, vr, length = EXPLICIT(data, at)
        tag = group << 16 | number
        if tag >= DELIMITERS:
            break
        if not implicit and (head_bytes := HEAD_BYTES[vr]) == 12:
            (length,) = LENGTH(data, at + 8)
        if tag <= last or tag == _CHARACTER_SET:
            raise UnusualError
        last = tag
        start = at + head_bytes
        if length == UNDEFINED_LENGTH:
            if not (is_sequence(tag, data[start : start + 4]) if implicit else vr == b"SQ"):
                raise UnusualError
            at = _after_items(source, start, None, nested + 1)
            value_stop = at - DELIMITER_BYTES
        else:
            at = value_stop = start + length
            if at > len(data):
                raise UnusualError
        if found is not None:
            found[tag] = vr, length, start, value_stop
    if at != stop and stop != sys.maxsize:
        raise UnusualError
    return at
