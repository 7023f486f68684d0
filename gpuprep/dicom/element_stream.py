"""Reads the elements of an ordinary header from its bytes, several times as fast as pydicom.

A header is read only if nothing in it is unusual. Any other one is refused, and pydicom reads it (see
`gpuprep.dicom.parse_header`). So pydicom alone decides what damage and deviations from the standard mean.

References
----------
DICOM PS3.5, 7.1 (Data Elements), 7.5 (Nesting of Data Sets); PS3.10, 7.1 (DICOM File Meta Information).
"""

from __future__ import annotations

import re
import struct
import sys
from dataclasses import dataclass
from typing import BinaryIO

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
from gpuprep.dicom.elements import IMAGE_TAGS, TAGS, Element, ElementTable
from gpuprep.dicom.uids import ENCODINGS, EXPLICIT_VR, IMPLICIT_VR, UNDEFINED_LENGTH

FIRST_BYTES = 16 * 2**10
"""Length of the beginning of a file that is read at once. Few headers are longer."""
WINDOW_BYTES = 64 * 2**10
"""Length of each further part, and upper limit of a value."""
MOST_WINDOWS = 12
"""Upper limit of further parts. They have fewer elements than pydicom may read (`bounded_reader.MOST_READS`)."""
LARGEST_SEQUENCE_BYTES = 2**20
"""Upper limit of a sequence of undefined length, whose elements have to be read to find its end."""


@dataclass(frozen=True, slots=True)
class OrdinaryHeader:
    """Wanted elements of a header, up to *Pixel Data*."""

    meta: ElementTable
    dataset: ElementTable
    syntax: str
    pixels: int
    """Offset of the element *Pixel Data*."""
    pixels_head: bytes
    """The first 12 bytes of that element."""


def read_ordinary_header(f: BinaryIO) -> OrdinaryHeader | None:
    """Return the wanted elements of a DICOM file at its beginning; None if pydicom has to read it."""
    try:
        return _Reader(f).header()
    except Exception:  # whatever it is, pydicom comes upon it too, and reports it
        return None


_META = {tag for tag in IMAGE_TAGS.values() if tag >> 16 == 2}
_META_LENGTH = 0x0002_0000
_CHARACTER_SET = TAGS["SpecificCharacterSet"]
_WANTED = frozenset({*IMAGE_TAGS.values(), _CHARACTER_SET} - _META)
_WANTED_META = frozenset({*_META, _META_LENGTH})
_WANTED_NESTED = frozenset({_CHARACTER_SET})

_LEFT_TO_PYDICOM = {
    TAGS[keyword]
    for keyword in (
        "SharedFunctionalGroupsSequence",
        "PerFrameFunctionalGroupsSequence",
        "MultienergyCTProcessingSequence",
    )
}
"""Sequences whose items are read."""
_AMBIGUOUS = [TAGS[keyword] for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit", "ModalityLUTSequence")]
"""Elements that pydicom converts with the help of others if they are empty."""

_SYNTAXES = {uid.encode() + b"\0" * (len(uid) % 2): uid for uid in (IMPLICIT_VR, EXPLICIT_VR, *ENCODINGS)}
_CHARACTER_SETS = re.compile(rb"[A-Z0-9 _\\]*")
"""Names of character sets, which pydicom looks up."""

_AFTER_META = 0x0003_0000
_PIXELS = 0x7FE0_0008
_PIXEL_TAGS = {b"\xe0\x7f\x08\x00", b"\xe0\x7f\x09\x00", b"\xe0\x7f\x10\x00"}
"""Float Pixel Data, Double Float Pixel Data and Pixel Data."""


class _Reader:
    """Reads a file from its beginning to its end, one part after the other; positions are offsets in the file."""

    def __init__(self, f: BinaryIO) -> None:
        self._f = f
        self._start = 0
        self._block = f.read(FIRST_BYTES)
        self._windows = 0

    def header(self) -> OrdinaryHeader:
        """Return the header, or raise an exception of any class."""
        if self._block[128:132] != b"DICM":
            raise UnusualError
        at, meta = self._elements(132, False, _WANTED_META, _META_LENGTH, _AFTER_META)
        if any(("UL" if tag == _META_LENGTH else "UI") != element.VR for tag, element in meta.items()):
            raise UnusualError
        syntax = _SYNTAXES[meta[TAGS["TransferSyntaxUID"]].value]
        implicit = syntax == IMPLICIT_VR
        if len(meta[_META_LENGTH].value) != 4 or (implicit and _is_vr(self._bytes(at, 6)[4:])):
            raise UnusualError
        at, dataset = self._elements(at, implicit, _WANTED, _AFTER_META, _PIXELS)
        head = self._bytes(at, 12)
        if head[:4] not in _PIXEL_TAGS or not (implicit or head[4:6] in HEAD_BYTES):
            raise UnusualError
        if not _LEFT_TO_PYDICOM.isdisjoint(dataset) or any(t in dataset and not dataset[t].value for t in _AMBIGUOUS):
            raise UnusualError
        return OrdinaryHeader(meta, dataset, syntax, at, head)

    def _elements(
        self,
        at: int,
        implicit: bool,
        wanted: frozenset[int],
        first: int,
        stop: int,
        end: int = sys.maxsize,
        nested: int = 0,
    ) -> tuple[int, ElementTable]:
        """Return the position of the first tag that is not less than `stop`, and the wanted elements before it.

        Parameters
        ----------
        at : int
            Position of the first element.
        implicit : bool
            Whether the elements have no VR.
        wanted : frozenset of int
            Tags of the elements to return.
        first, stop : int
            Smallest tag, and the tag after the largest one.
        end : int
            Position after the last element, at which reading stops as well.
        nested : int
            Number of sequences around the elements.
        """
        found = ElementTable()
        block, start = self._block, self._start
        last, vr, head_bytes = first - 1, b"", 8
        while at < end:
            try:
                if implicit:
                    group, number, length = IMPLICIT(block, at - start)
                else:
                    group, number, vr, length = EXPLICIT(block, at - start)
                tag = group << 16 | number
                if tag >= stop:
                    break
                if not implicit and (head_bytes := HEAD_BYTES[vr]) == 12:
                    (length,) = LENGTH(block, at - start + 8)
            except struct.error:
                block, start = self._next_part(at), at
                continue
            if tag <= last:
                raise UnusualError
            body = at - start + head_bytes
            if tag in wanted:
                value = block[body : body + length]
                if len(value) != length:
                    block, start = self._next_part(at), at
                    continue
                found[tag] = Element(VR_NAMES.get(vr), value)
            elif length == UNDEFINED_LENGTH:
                at = self._after_items(at + head_bytes, tag, vr, implicit, nested + 1)
                block, start, last = self._block, self._start, tag
                continue
            at += head_bytes + length
            last = tag
        if _CHARACTER_SET in found and not _is_ordinary_character_set(found[_CHARACTER_SET]):
            raise UnusualError
        return at, found

    def _after_items(self, at: int, tag: int, vr: bytes, implicit: bool, nested: int) -> int:
        """Return the position after a sequence of undefined length, whose items begin at `at`."""
        has_items = is_sequence(tag, self._bytes(at, 4)) if implicit else vr in (b"SQ", b"UN")
        most = at + LARGEST_SEQUENCE_BYTES
        while has_items and nested <= MOST_NESTED and at < most:
            head = self._bytes(at, 8)
            at += 8
            if head == SEQUENCE_END:
                return at
            if head[:4] != ITEM:
                break
            length = int.from_bytes(head[4:], "little")
            if length == 0:
                continue
            # An item may be without VRs in a data set that has them, as PS3.5, 6.2.2 demands of UN.
            without_vr = implicit or not _is_vr(self._bytes(at, 6)[4:])
            end = sys.maxsize if length == UNDEFINED_LENGTH else at + length
            at, _ = self._elements(at, without_vr, _WANTED_NESTED, 0, DELIMITERS, end, nested)
            if length == UNDEFINED_LENGTH:
                if self._bytes(at, 8) != ITEM_END:
                    break
                at += 8
            elif at != end:
                break
        raise UnusualError

    def _bytes(self, at: int, size: int) -> bytes:
        """Return the bytes [at, at + size), all of which must exist."""
        if at + size > self._start + len(self._block):
            self._next_part(at)
        taken = self._block[at - self._start : at - self._start + size]
        if len(taken) < size:
            raise UnusualError
        return taken

    def _next_part(self, at: int) -> bytes:
        """Return the part of the file that begins at `at`."""
        self._windows += 1
        if at == self._start or self._windows > MOST_WINDOWS:
            raise UnusualError
        self._f.seek(at)
        self._start, self._block = at, self._f.read(WINDOW_BYTES)
        return self._block


def _is_vr(text: bytes) -> bool:
    """Return whether two bytes are capitals, by which pydicom recognises a VR."""
    return text.isalpha() and text.isupper()


def _is_ordinary_character_set(element: Element) -> bool:
    return element.VR in ("CS", None) and _CHARACTER_SETS.fullmatch(element.value) is not None
