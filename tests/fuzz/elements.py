"""Splits DICOM files into elements and assembles them again byte for byte, also if they violate the standard.

pydicom would refuse to write most of the files that the fuzzer makes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

LONG_VRS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
"""VRs with a length field of four bytes."""

SHORT_VRS = {b"AS", b"AT", b"CS", b"DS", b"FD", b"FL", b"IS", b"LO", b"SH", b"SL", b"SS", b"UI", b"UL", b"US"}
VRS = sorted(LONG_VRS | SHORT_VRS)
UNDEFINED = 0xFFFF_FFFF
PIXEL_DATA = 0x7FE0_0010


@dataclass
class Element:
    """A data element, with optional faults."""

    tag: int
    vr: bytes
    value: bytes = b""
    items: list[list[Element]] | None = None
    length: int | None = None
    """Length to write instead of the true one."""
    letters: bytes | None = None
    """Letters to write as VR; the element keeps the form of `vr`."""
    reserved: bytes = b"\0\0"
    """The two bytes after a VR with a length field of four bytes."""


@dataclass
class Parsed:
    """A DICOM file as elements."""

    head: bytes
    meta: list[Element]
    body: list[Element]
    implicit: bool
    big: bool
    deflated: bool
    meta_length: bool = True
    """Whether `built` corrects the length of the meta group."""


def parsed(data: bytes) -> Parsed:
    """Split a valid file into elements."""
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
    """Return the bytes of a file; for an unchanged file, its original bytes."""
    if file.meta_length and file.meta and file.meta[0].tag == 0x0002_0000:
        file.meta[0].value = struct.pack("<I", sum(len(encoded(e, False, False)) for e in file.meta[1:]))
    body = b"".join(encoded(e, file.implicit, file.big) for e in file.body)
    if file.deflated:
        body = deflate(body)
    return file.head + b"".join(encoded(e, False, False) for e in file.meta) + body


def deflate(body: bytes) -> bytes:
    """Return bytes as a raw deflate stream of even length."""
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
    if length == UNDEFINED:  # encapsulated pixels, always the last element here
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
    """Return an element as bytes of a file."""
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
    """Return the VR of a tag by the standard: the first if there are two, UN for an unknown tag."""
    from pydicom.datadict import dictionary_VR

    try:
        vr = dictionary_VR(tag)
    except KeyError:
        return b"UN"
    return {"US or SS": b"US", "OB or OW": b"OW"}.get(vr, vr.encode())


def everywhere(elements: list[Element]) -> Iterator[tuple[list[Element], int]]:
    """Yield list and index of every element, sequences before their items."""
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
    """Set an attribute in tag order, and return its element.

    Parameters
    ----------
    file : Parsed
        The file; its byte order is used.
    keyword : str
        The attribute.
    value : object
        Bytes, text, one or more numbers, or items as lists of elements.
    vr : bytes, optional
        The VR; default: the one of the standard.
    home : list of Element, optional
        Elements of the meta group or of an item; default: by the tag, meta group or data set.
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
    """Return the first element of an attribute, outside sequences."""
    tag = tag_of(keyword)
    return next((e for e in elements if e.tag == tag), None)


def number_of(file: Parsed, keyword: str) -> int:
    """Return the value of an attribute with the VR US."""
    element = element_of(file.body, keyword)
    assert element is not None, keyword
    return int(struct.unpack(">H" if file.big else "<H", element.value)[0])


# -------------------------------------------------------------------------------------------------- encapsulated pixels

ITEM, SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"


def as_item(content: bytes) -> bytes:
    """Return bytes as an item: a fragment, or an offset table."""
    return ITEM + struct.pack("<I", len(content)) + content


def items_of(value: bytes) -> list[bytes]:
    """Return the content of all items of valid encapsulated pixels, the offset table first."""
    contents, at = [], 0
    while value[at : at + 4] == ITEM:
        (length,) = struct.unpack_from("<I", value, at + 4)
        contents.append(value[at + 8 : at + 8 + length])
        at += 8 + length
    return contents


def encapsulate(file: Parsed, frames: list[bytes], syntax: str) -> None:
    """Set encoded frames, with one fragment each and an empty offset table, and the transfer syntax."""
    value = b"".join(as_item(frame + b"\0" * (len(frame) % 2)) for frame in (b"", *frames)) + SEQUENCE_END
    put(file, "PixelData", value, vr=b"OB").length = UNDEFINED
    put(file, "TransferSyntaxUID", syntax)
