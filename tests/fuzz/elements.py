"""DICOM files taken apart into elements and put together again, byte for byte, with what is wrong about them.

pydicom reads and writes what the standard allows. What is done to files here it would refuse.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

LONG_VRS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
"""VRs whose length has four bytes."""

SHORT_VRS = {b"AS", b"AT", b"CS", b"DS", b"FD", b"FL", b"IS", b"LO", b"SH", b"SL", b"SS", b"UI", b"UL", b"US"}
VRS = sorted(LONG_VRS | SHORT_VRS)
UNDEFINED = 0xFFFF_FFFF
PIXEL_DATA = 0x7FE0_0010


@dataclass
class Element:
    """One element, with what may be wrong about it: pydicom would not write most of that."""

    tag: int
    vr: bytes
    value: bytes = b""
    items: list[list[Element]] | None = None
    length: int | None = None
    """To be announced instead of the true one."""
    letters: bytes | None = None
    """To be announced instead of the VR in whose form the element is written."""
    reserved: bytes = b"\0\0"
    """The two bytes after the VR where the length has four."""


@dataclass
class Parsed:
    """A DICOM file taken apart."""

    head: bytes
    meta: list[Element]
    body: list[Element]
    implicit: bool
    big: bool
    deflated: bool
    meta_length: bool = True
    """Whether the meta group's length is made true again."""


def parsed(data: bytes) -> Parsed:
    """Take a valid file apart."""
    head, meta, syntax, at = b"", [], "", 0
    if data[128:132] == b"DICM":
        head, at = data[:132], 132
        end = at
        while data[end : end + 2] == b"\x02\x00":
            end = _element(data, end, False, False)[1]
        meta = _elements(data[at:end], False, False)
        at = end
        syntax = next(e.value for e in meta if e.tag == 0x0002_0010).rstrip(b"\0").decode()
    implicit = syntax == "1.2.840.10008.1.2" if syntax else not data[at + 4 : at + 6].isalpha()
    big, deflated = syntax == "1.2.840.10008.1.2.2", syntax == "1.2.840.10008.1.2.1.99"
    body = zlib.decompress(data[at:], -zlib.MAX_WBITS) if deflated else data[at:]
    return Parsed(head, meta, _elements(body, implicit, big), implicit, big, deflated)


def built(file: Parsed) -> bytes:
    """Return a file put together again; of an unchanged one, the very bytes it had."""
    if file.meta_length and file.meta and file.meta[0].tag == 0x0002_0000:
        file.meta[0].value = struct.pack("<I", sum(len(encoded(e, False, False)) for e in file.meta[1:]))
    body = b"".join(encoded(e, file.implicit, file.big) for e in file.body)
    if file.deflated:
        body = deflate(body)
    return file.head + b"".join(encoded(e, False, False) for e in file.meta) + body


def deflate(body: bytes) -> bytes:
    """Return bytes as a deflate stream of even length, without a header."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = packer.compress(body) + packer.flush()
    return packed + b"\0" * (len(packed) % 2)


def _elements(data: bytes, implicit: bool, big: bool) -> list[Element]:
    elements, at = [], 0
    while at < len(data):
        element, at = _element(data, at, implicit, big)
        elements.append(element)
    return elements


def _element(data: bytes, at: int, implicit: bool, big: bool) -> tuple[Element, int]:
    order = ">" if big else "<"
    group, number = struct.unpack_from(order + "HH", data, at)
    tag = group << 16 | number
    if implicit:
        vr = dictionary_vr(tag)
        (length,), at = struct.unpack_from(order + "I", data, at + 4), at + 8
    elif (vr := data[at + 4 : at + 6]) in LONG_VRS:
        (length,), at = struct.unpack_from(order + "I", data, at + 8), at + 12
    else:
        (length,), at = struct.unpack_from(order + "H", data, at + 6), at + 8
    if length == UNDEFINED:  # encapsulated pixels, which are the last element of every file here
        return Element(tag, vr, data[at:], length=UNDEFINED), len(data)
    value, end = data[at : at + length], at + length
    if vr != b"SQ":
        return Element(tag, vr, value), end
    items, at = [], 0
    while at < len(value):
        (length,) = struct.unpack_from(order + "I", value, at + 4)
        items.append(_elements(value[at + 8 : at + 8 + length], implicit, big))
        at += 8 + length
    return Element(tag, vr, items=items), end


def encoded(element: Element, implicit: bool, big: bool) -> bytes:
    """Return an element as it stands in a file."""
    order = ">" if big else "<"
    value = element.value
    if element.items is not None:
        made = [b"".join(encoded(e, implicit, big) for e in item) for item in element.items]
        value = b"".join(struct.pack(order + "HHI", 0xFFFE, 0xE000, len(item)) + item for item in made)
    length = len(value) if element.length is None else element.length
    tag = struct.pack(order + "HH", element.tag >> 16, element.tag & 0xFFFF)
    if implicit:
        return tag + struct.pack(order + "I", length & UNDEFINED) + value
    letters = element.vr if element.letters is None else element.letters
    if element.vr in LONG_VRS:
        return tag + letters + element.reserved + struct.pack(order + "I", length & UNDEFINED) + value
    return tag + letters + struct.pack(order + "H", length & 0xFFFF) + value


def dictionary_vr(tag: int) -> bytes:
    """Return the VR that the standard gives a tag: the first of two, UN for a tag that it does not know."""
    from pydicom.datadict import dictionary_VR

    try:
        vr = dictionary_VR(tag)
    except KeyError:
        return b"UN"
    return {"US or SS": b"US", "OB or OW": b"OW"}.get(vr, vr.encode())


def everywhere(elements: list[Element]) -> Iterator[tuple[list[Element], int]]:
    """Yield the list and the index of every element, sequences before what is in them."""
    for n, element in enumerate(elements):
        yield elements, n
        for item in element.items or ():
            yield from everywhere(item)


def keyword_of(tag: int) -> str:
    """Return the keyword of a tag, or its numbers."""
    from pydicom.datadict import keyword_for_tag

    return keyword_for_tag(tag) or f"({tag >> 16:04x},{tag & 0xFFFF:04x})"


def tag_of(keyword: str) -> int:
    """Return the tag of a keyword of the standard."""
    from pydicom.datadict import tag_for_keyword

    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return tag


_CODES = {b"US": "H", b"SS": "h", b"UL": "I", b"SL": "i", b"FL": "f", b"FD": "d"}


def put(
    file: Parsed, keyword: str, value: object, *, vr: bytes | None = None, home: list[Element] | None = None
) -> Element:
    """Set an attribute, where its tag belongs, and return its element.

    Parameters
    ----------
    file : Parsed
        The file, which decides on the byte order.
    keyword : str
        The attribute.
    value : object
        Bytes as they are; text; a number or several, as the VR stores them; or items, as lists of elements.
    vr : bytes, optional
        The VR, if not that of the standard.
    home : list of Element, optional
        Where it belongs, if not into the data set itself: the meta group, or an item.
    """
    tag = tag_of(keyword)
    home = (file.meta if tag >> 16 == 2 else file.body) if home is None else home
    element = Element(tag, vr or dictionary_vr(tag))
    if element.vr == b"SQ" and isinstance(value, list):
        element.items = value
    elif isinstance(value, bytes):
        element.value = value
    elif (code := _CODES.get(element.vr)) is not None:
        numbers = value if isinstance(value, tuple | list) else (value,)
        element.value = struct.pack(
            f"{'>' if file.big and home is not file.meta else '<'}{len(numbers)}{code}", *numbers
        )
    else:
        text = "\\".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
        element.value = text.encode()
        element.value += (b"\0" if element.vr == b"UI" else b" ") * (len(element.value) % 2)
    at = sum(e.tag < tag for e in home)
    home[at : at + sum(e.tag == tag for e in home)] = [element]
    return element


def element_of(elements: list[Element], keyword: str) -> Element | None:
    """Return the first element of an attribute, not looking into sequences."""
    tag = tag_of(keyword)
    return next((e for e in elements if e.tag == tag), None)


def number_of(file: Parsed, keyword: str) -> int:
    """Return an attribute with the VR US of a file."""
    element = element_of(file.body, keyword)
    assert element is not None, keyword
    return int(struct.unpack(">H" if file.big else "<H", element.value)[0])


# -------------------------------------------------------------------------------------------------- encapsulated pixels

ITEM, SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"


def as_item(content: bytes) -> bytes:
    """Return bytes as an item: a fragment, or a table of offsets."""
    return ITEM + struct.pack("<I", len(content)) + content


def items_of(value: bytes) -> list[bytes]:
    """Return the content of all items of valid encapsulated pixels, the table of offsets first."""
    contents, at = [], 0
    while value[at : at + 4] == ITEM:
        (length,) = struct.unpack_from("<I", value, at + 4)
        contents.append(value[at + 8 : at + 8 + length])
        at += 8 + length
    return contents


def encapsulate(file: Parsed, frames: list[bytes], syntax: str) -> None:
    """Give a file encoded frames, one fragment each, without a table of offsets, and the name of their encoding."""
    value = b"".join(as_item(frame + b"\0" * (len(frame) % 2)) for frame in (b"", *frames)) + SEQUENCE_END
    put(file, "PixelData", value, vr=b"OB").length = UNDEFINED
    put(file, "TransferSyntaxUID", syntax)
