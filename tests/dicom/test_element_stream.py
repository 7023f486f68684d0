"""Tests of headers that are read from their bytes: pydicom reads the same from them, and all others are left to it."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import both_ways
import numpy as np
import pydicom
import pytest
from elements import ITEM, LONG_VRS, SEQUENCE_END, UNDEFINED, Element, Parsed, built, dictionary_vr, encoded, tag_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

import gpuprep
from gpuprep.dicom import headers
from gpuprep.dicom.element_heads import MOST_NESTED
from gpuprep.dicom.element_stream import (
    FIRST_BYTES,
    LARGEST_SEQUENCE_BYTES,
    MOST_WINDOWS,
    WINDOW_BYTES,
    read_ordinary_header,
)
from gpuprep.dicom.elements import IMAGE_TAGS, TAGS
from gpuprep.dicom.headers import Contents, read_headers
from gpuprep.testing import write_series

EXPLICIT, IMPLICIT, JPEG_LS = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.4.80"
CT = b"1.2.840.10008.5.1.4.1.1.2\0"
ITEM_END = b"\xfe\xff\x0d\xe0\0\0\0\0"
VRS = sorted({*LONG_VRS, *b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split()})
FUNCTIONAL_GROUPS = {
    TAGS["SharedFunctionalGroupsSequence"],
    TAGS["PerFrameFunctionalGroupsSequence"],
    TAGS["MultienergyCTProcessingSequence"],
}
"""Sequences that are left to pydicom."""


def element(keyword: str, value: bytes) -> Element:
    return Element(tag_of(keyword), dictionary_vr(tag_of(keyword)), value)


def header(body: list[Element], syntax: str = EXPLICIT) -> bytes:
    """Return a file with a meta group and the elements, in their order."""
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    meta = [Element(0x0002_0000, b"UL", b"\0\0\0\0"), element("MediaStorageSOPClassUID", CT)]
    meta.append(element("TransferSyntaxUID", uid))
    return built(Parsed(bytes(128) + b"DICM", meta, body, syntax == IMPLICIT, False, False))


def ct(*more: Element) -> list[Element]:
    """Return the elements of a CT image of 2 × 2 pixels, in tag order."""
    elements = {
        e.tag: e
        for e in (
            element("SOPClassUID", CT),
            element("SOPInstanceUID", b"1.2.3\0"),
            element("SeriesInstanceUID", b"1.2\0"),
            element("ImagePositionPatient", b"1\\2\\3 "),
            element("Rows", b"\2\0"),
            element("Columns", b"\2\0"),
            element("BitsAllocated", b"\x10\0"),
            element("RescaleSlope", b"2 "),
            Element(0x7FE0_0010, b"OW", bytes(8)),
            *more,
        )
    }
    return [elements[tag] for tag in sorted(elements)]


def is_read(data: bytes) -> bool:
    return read_ordinary_header(io.BytesIO(data)) is not None


def read_both_ways(file: Path, data: bytes) -> Contents:
    """Return the contents of a file; `both_ways` requires that they are the same from its bytes and from pydicom."""
    file.write_bytes(data)
    (contents,) = read_headers([str(file)])
    return contents


# Random headers


def sequence_value(draw: Callable[..., Any], implicit: bool, nested: int) -> bytes:
    """Return items of either kind of length, and the end of the sequence."""
    value = b""
    for _ in range(draw(st.integers(0, 2))):
        content = b"".join(encoded(e, implicit, False) for e in draw(elements(implicit, nested + 1)))
        if draw(st.booleans()):
            value += ITEM + struct.pack("<I", len(content)) + content
        else:
            value += ITEM + struct.pack("<I", UNDEFINED) + content + ITEM_END
    return value + SEQUENCE_END


CHARACTER_SET = TAGS["SpecificCharacterSet"]
WANTED = {*IMAGE_TAGS.values(), CHARACTER_SET}
TAG = st.one_of(
    st.sampled_from(sorted(WANTED)),
    st.sampled_from(sorted(WANTED)),
    st.sampled_from([0x0008_0000, 0x0008_1140, 0x0010_0010, 0x0018_0000, 0x0028_3010, 0x0040_0275, 0x0088_0200]),
    st.sampled_from([0x0008_1110, 0x0040_A730, 0x0088_0200, 0x0018_9301, 0x0009_1140, 0x7FE0_0007]),
    st.integers(0x0008_0000, 0x7FE0_0007),
    st.builds(lambda group, number: (2 * group + 1) << 16 | number, st.integers(4, 100), st.integers(0, 0xFFFF)),
)
VALUE = st.one_of(
    st.sampled_from([b"", b"0 ", b"1 ", b"2 ", b"-3.5", b"1\\2\\3 ", b"1,5 ", b"1.2.3\0", b"ORIGINAL\\PRIMARY\\AXIAL"]),
    st.sampled_from([CT, b"1.2.840.10008.5.1.4.1.1.4\0", b"\x10\0", b"\2\0", b"\0\0\x80?", b"12", b"1234"]),
    st.binary(max_size=20),
)
TERMS = [b"ISO_IR 100", b"ISO_IR 192", b"\\ISO 2022 IR 87", b"ISO 2022 IR 6\\ISO 2022 IR 58 ", b"", b"UNKNOWN ", b"a\0"]


@st.composite
def elements(draw: Callable[..., Any], implicit: bool, nested: int = 0) -> list[Element]:
    """Elements in tag order; some have another VR, and some are sequences of undefined length."""
    made: dict[int, Element] = {}
    for tag in draw(st.lists(TAG, max_size=10 if nested == 0 else 3)):
        rare = draw(st.integers(0, 15)) == 0
        if tag >> 16 == 2 or (tag in FUNCTIONAL_GROUPS and not rare):
            continue
        vr = draw(st.sampled_from(VRS)) if rare or dictionary_vr(tag) == b"UN" else dictionary_vr(tag)
        if nested < 4 and (rare or (vr == b"SQ" and tag not in WANTED)):
            vr = draw(st.sampled_from([b"SQ", b"SQ", b"UN"]))
            value = sequence_value(draw, implicit or vr == b"UN", nested)
            if draw(st.booleans()):
                made[tag] = Element(tag, vr, value, length=UNDEFINED)
            else:
                made[tag] = Element(tag, vr, value.removesuffix(SEQUENCE_END))
        else:
            made[tag] = Element(tag, vr, draw(st.sampled_from(TERMS) if tag == CHARACTER_SET else VALUE))
    return [made[tag] for tag in sorted(made)]


@st.composite
def ordinary_files(draw: Callable[..., Any]) -> bytes:
    """Files of valid structure with any values."""
    syntax = draw(st.sampled_from([EXPLICIT, IMPLICIT, JPEG_LS]))
    body = {e.tag: e for e in (*ct(), *draw(elements(syntax == IMPLICIT)))}
    return header([body[tag] for tag in sorted(body)], syntax)


WORDS = (
    *(b"SQ", b"UN", b"OB", b"DS", b"  ", b"??", b"ox", b"\0\0\0\0", b"\xff\xff\xff\xff"),
    *(ITEM, ITEM_END, SEQUENCE_END, b"\xe0\x7f\x10\0", b"\x08\0\x05\0"),
)


def damaged(data: bytes, seed: int) -> bytes:
    """Return bytes with one or two flips, cuts, insertions or copies, or with other tags, VRs and lengths."""
    rng = random.Random(seed)  # noqa: S311
    for _ in range(rng.randint(1, 2)):
        at, other = (rng.randrange(120, max(121, len(data))) for _ in range(2))
        size = rng.choice((1, 2, 4, 8))
        word = rng.choice(WORDS)
        data = rng.choice(
            (
                data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :],
                data[:at] + rng.randbytes(size) + data[at + size :],
                data[:at],
                data[:at] + data[at + size :],
                data[:at] + rng.randbytes(size) + data[at:],
                data[:at] + data[other : other + 4 * size] + data[at:],
                data[:at] + word + data[at + len(word) :],
            )
        )
    return data


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers") / "1.dcm"


@settings(max_examples=150)
@given(data=ordinary_files())
def test_headers_of_valid_structure_are_read_as_pydicom_reads_them(file: Path, data: bytes) -> None:
    read_both_ways(file, data)


@settings(max_examples=150)
@given(data=ordinary_files(), seeds=st.lists(st.integers(0, 2**32), min_size=4, max_size=4))
def test_damaged_headers_are_read_as_pydicom_reads_them_or_left_to_it(
    file: Path, data: bytes, seeds: list[int]
) -> None:
    for seed in seeds:
        read_both_ways(file, damaged(data, seed))


@settings(max_examples=50)
@given(data=st.binary(max_size=200))
@example(data=b"")
def test_any_bytes_after_the_preamble_are_read_or_left_to_pydicom(file: Path, data: bytes) -> None:
    read_both_ways(file, bytes(128) + b"DICM" + data)


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_every_single_changed_byte_of_a_header_leads_to_what_pydicom_reads(file: Path, syntax: str) -> None:
    lut = [Element(TAGS["RescaleType"], b"LO", b"HU")]
    nested = ITEM + struct.pack("<I", UNDEFINED) + b"".join(encoded(e, syntax == IMPLICIT, False) for e in lut)
    sequence = Element(0x0008_1140, b"SQ", nested + ITEM_END + SEQUENCE_END, length=UNDEFINED)
    data = header(ct(sequence, element("SpecificCharacterSet", b"ISO_IR 100")), syntax)
    assert is_read(data)
    for at in range(128, len(data) - 8):
        for value in {data[at] ^ 1, 0xFF}:
            read_both_ways(file, data[:at] + bytes([value]) + data[at + 1 :])
        read_both_ways(file, data[:at])
        read_both_ways(file, data[:at] + data[at + 1 :])


# What is read from its bytes, and what is left to pydicom


def undefined(tag: int, *items: bytes, vr: bytes = b"SQ") -> Element:
    """Return a sequence of undefined length."""
    return Element(tag, vr, b"".join(items) + SEQUENCE_END, length=UNDEFINED)


def item(content: bytes = b"", length: int | None = None) -> bytes:
    return ITEM + struct.pack("<I", len(content) if length is None else length) + content


CODE = encoded(element("CodeValue", b"1234"), False, False)
CODE_WITHOUT_VR = encoded(element("CodeValue", b"1234"), True, False)
REFERENCED = 0x0008_1140

ORDINARY = {
    "no other elements": [],
    "empty values": [element(k, b"") for k in ("SeriesNumber", "AcquisitionNumber", "KVP", "AcquisitionTime")],
    "private elements": [Element(0x0009_0010, b"LO", b"MAKER 1 "), Element(0x0009_1001, b"UN", bytes(40))],
    "group lengths": [Element(0x0008_0000, b"UL", bytes(4)), Element(0x0028_0000, b"UL", bytes(4))],
    "a character set": [element("SpecificCharacterSet", b"\\ISO 2022 IR 87")],
    "an empty character set": [element("SpecificCharacterSet", b"")],
    "a wanted element with another VR": [Element(TAGS["KVP"], b"FD", struct.pack("<d", 120.0))],
    "a sequence of defined length": [Element(REFERENCED, b"SQ", item(CODE))],
    "a lookup table": [Element(TAGS["ModalityLUTSequence"], b"SQ", item(CODE))],
    "a sequence of undefined length": [undefined(REFERENCED, item(CODE), item(CODE + ITEM_END, UNDEFINED), item())],
    "an empty sequence of undefined length": [undefined(REFERENCED)],
    "items without VRs": [undefined(0x0009_1140, item(CODE_WITHOUT_VR), vr=b"UN")],
    "a nested sequence": [undefined(REFERENCED, item(encoded(undefined(REFERENCED, item(CODE)), False, False)))],
    "an image in a sequence": [
        undefined(0x0088_0200, item(encoded(Element(0x7FE0_0010, b"OW", bytes(8)), False, False)))
    ],
    "an element that is longer than a part": [Element(0x0009_1001, b"OB", bytes(3 * WINDOW_BYTES))],
    "wanted elements after the first part": [Element(0x0009_1001, b"OB", bytes(FIRST_BYTES))],
    "a value across the end of the first part": [
        Element(0x0018_1000, b"UN", bytes(FIRST_BYTES - 600)),
        Element(TAGS["ConvolutionKernel"], b"SH", b"ABC " * 150),
    ],
}


@pytest.mark.parametrize("more", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_headers_are_read_without_pydicom(
    file: Path, more: list[Element], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = header(ct(*more))
    (theirs,) = read_both_ways(file, data).images
    monkeypatch.setattr(headers, "_read_header", both_ways.READ_HEADER)
    monkeypatch.setattr(pydicom, "dcmread", None)
    (contents,) = read_headers([str(file)])
    (image,) = contents.images
    assert image == theirs
    assert (image.rows, image.columns, image.header.position_mm) == (2, 2, (1, 2, 3))
    assert (image.header.pixel_offset, image.header.pixel_bytes) == (len(data) - 8, 8)


def nested(depth: int) -> Element:
    sequence = undefined(REFERENCED, item(CODE))
    for _ in range(depth - 1):
        sequence = undefined(REFERENCED, item(encoded(sequence, False, False)))
    return sequence


UNUSUAL = {
    "tags that do not ascend": [*ct()[:1], element("ImageType", b"ORIGINAL"), *ct()[1:]],
    "two elements of one tag": [*ct()[:1], *ct()],
    "no pixels": ct()[:-1],
    "an end in the pixel element": [*ct()[:-1], Element(0x7FE0_0010, b"US", b"")],
    "a tag after that of the pixels": [*ct()[:-1], Element(0x7FE1_0010, b"LO", b"MAKER 1 "), ct()[-1]],
    "an unknown VR": ct(Element(0x0009_1001, b"UN", b"", letters=b"ZZ")),
    "a VR in small letters": ct(Element(0x0009_1001, b"UN", b"", letters=b"un")),
    "a blank VR": ct(Element(0x0009_1001, b"SH", b"", letters=b"  ")),
    "a length beyond the end": ct(Element(0x0028_1199, b"OB", b"", length=1000)),
    "functional groups": ct(Element(TAGS["SharedFunctionalGroupsSequence"], b"SQ", item(CODE))),
    "empty functional groups": ct(Element(TAGS["PerFrameFunctionalGroupsSequence"], b"SQ")),
    "energies": ct(Element(TAGS["MultienergyCTProcessingSequence"], b"SQ", item(CODE))),
    "empty padding": ct(element("PixelPaddingValue", b"")),
    "a lookup table of undefined length": ct(undefined(TAGS["ModalityLUTSequence"], item(CODE))),
    "bytes of undefined length": ct(undefined(0x0009_1001, item(CODE), vr=b"OB")),
    "a long value": ct(Element(TAGS["ExtendedOffsetTable"], b"OV", bytes(WINDOW_BYTES))),
    "a character set with a null": ct(element("SpecificCharacterSet", b"ISO\0IR 1")),
    "a character set of another VR": ct(Element(CHARACTER_SET, b"US", b"AB")),
    "a character set in small letters in an item": ct(
        undefined(REFERENCED, item(encoded(element("SpecificCharacterSet", b"utf-8\0"), False, False)))
    ),
    "a sequence without its end": ct(Element(REFERENCED, b"SQ", item(CODE), length=UNDEFINED)),
    "a sequence with another tag than an item": ct(undefined(REFERENCED, b"\xfe\xff\x00\xe1\0\0\0\0")),
    "an end of a sequence with a length": ct(
        Element(REFERENCED, b"SQ", SEQUENCE_END[:4] + b"\1\0\0\0", length=UNDEFINED)
    ),
    "an item that ends in an element": ct(undefined(REFERENCED, item(CODE, len(CODE) - 2))),
    "an end of an item in an item of defined length": ct(undefined(REFERENCED, item(CODE + ITEM_END))),
    "an end of an item with a length": ct(undefined(REFERENCED, item(CODE + ITEM_END[:4] + b"UN\0\0", UNDEFINED))),
    "sequences that are nested too deeply": ct(nested(MOST_NESTED + 1)),
    "a large sequence": ct(
        undefined(REFERENCED, item(encoded(Element(0x0009_1001, b"OB", bytes(LARGEST_SEQUENCE_BYTES)), False, False)))
    ),
    "many parts": ct(*(Element(0x0009_1001 + n, b"OB", bytes(WINDOW_BYTES)) for n in range(MOST_WINDOWS + 1))),
}


@pytest.mark.parametrize("body", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_headers_are_left_to_pydicom(file: Path, body: list[Element]) -> None:
    data = header(body)
    assert not is_read(data)
    read_both_ways(file, data)


@pytest.mark.parametrize(
    "syntax",
    ["1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99", "1.2.840.113619.5.2", "1.2.3.4", ""],
)
def test_other_transfer_syntaxes_are_left_to_pydicom(file: Path, syntax: str) -> None:
    data = header(ct(), syntax)
    assert not is_read(data)
    read_both_ways(file, data)


@pytest.mark.parametrize(("said", "written"), [(EXPLICIT, IMPLICIT), (IMPLICIT, EXPLICIT)])
def test_a_data_set_that_is_not_encoded_as_its_transfer_syntax_says_is_left_to_pydicom(
    file: Path, said: str, written: str
) -> None:
    body = b"".join(encoded(e, written == IMPLICIT, False) for e in ct())
    data = header([], said) + body
    assert not is_read(data)
    (image,) = read_both_ways(file, data).images
    assert image.header.pixel_offset == len(data) - 8


def test_a_length_that_looks_like_a_vr_in_the_first_element_is_left_to_pydicom(file: Path) -> None:
    for length, read in ((0x4142, False), (0x4042, True)):
        data = header(ct(Element(0x0008_0001, b"UN", bytes(length))), IMPLICIT)
        assert is_read(data) is read
        read_both_ways(file, data)


def test_a_sequence_without_a_vr_is_recognised_by_its_tag_or_its_first_item(file: Path) -> None:
    for tag, items, read in (
        (REFERENCED, [], True),
        (REFERENCED, [item(CODE_WITHOUT_VR)], True),
        (0x0009_1140, [item(CODE_WITHOUT_VR)], True),
        (0x0009_1140, [], False),
        (0x0018_1000, [item(CODE_WITHOUT_VR)], False),  # Device Serial Number is no sequence
    ):
        data = header(ct(undefined(tag, *items)), IMPLICIT)
        assert is_read(data) is read
        (image,) = read_both_ways(file, data).images
        assert image.header.pixel_offset == len(data) - 8


class CountingFile(io.BytesIO):
    """A file that counts the bytes that are read of it."""

    taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


@pytest.mark.parametrize(
    "body",
    [
        bytes(20 * 2**20),
        b"".join(encoded(Element(0x0009_0000 + n, b"LO"), False, False) for n in range(2**16)) * 30,
        encoded(undefined(REFERENCED, *[item()] * 2**20), False, False),
        encoded(Element(TAGS["ImageType"], b"UN", bytes(20 * 2**20)), False, False),
        encoded(Element(REFERENCED, b"SQ", item(b"", UNDEFINED) * 2**20, length=UNDEFINED), False, False),
    ],
    ids=["zeros", "elements", "items", "a long value", "endless nesting"],
)
def test_reading_ends_after_a_limited_part_of_a_file(body: bytes) -> None:
    f = CountingFile(header([]) + body)
    assert read_ordinary_header(f) is None
    assert f.taken <= FIRST_BYTES + MOST_WINDOWS * WINDOW_BYTES


class BrokenFile(io.BytesIO):
    """A file that cannot be read."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise OSError(size)


def test_a_file_that_cannot_be_read_is_left_to_pydicom() -> None:
    assert read_ordinary_header(BrokenFile(header(ct()))) is None


# Files of writers


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_pydicom_does_not_read_the_headers_of_a_synthetic_series(
    tmp_path: Path, syntax: UID, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in write_series(tmp_path, np.zeros((3, 4, 5), np.int16), (2.5, 0.8, 0.7)):
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(path, ds, implicit_vr=syntax.is_implicit_VR, little_endian=True)
    monkeypatch.setattr(headers, "_read_header", both_ways.READ_HEADER)
    monkeypatch.setattr(pydicom, "dcmread", None)
    (series,) = gpuprep.discover(tmp_path)
    assert {(s.position_mm, s.transfer_syntax) for s in series.slices} == {
        ((-100, -120, z_mm), syntax) for z_mm in (-300, -297.5, -295)
    }


def test_real_ct_is_read_from_its_bytes_as_pydicom_reads_it(data: Path) -> None:
    files = [str(path) for path in sorted(data.rglob("*")) if path.is_file()]
    read = []
    for file, contents in zip(files, read_headers(files), strict=True):  # pydicom reads them too: see `both_ways`
        slices = [image.header for image in contents.images]
        if len(slices) == 1 and slices[0].member is None and slices[0].transfer_syntax in (EXPLICIT, IMPLICIT, JPEG_LS):
            has_pixels = slices[0].pixel_offset is not None or slices[0].encoded_offset is not None
            assert is_read(Path(file).read_bytes()) is has_pixels, file
            read.append(file)
    assert len(read) > 700
