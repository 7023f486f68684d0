"""Tests of encapsulated pixels: fragments, offset tables, multi-frame files, archives and damaged items."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from conftest import renamed
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, fragment_frame, generate_frames
from pydicom.uid import UID, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless
from test_sources import enhanced

import gpuprep
from gpuprep.core.series import Series, SliceHeader
from gpuprep.dicom.headers import read_headers
from gpuprep.dicom.read import PixelReader, SeriesReader
from gpuprep.errors import DecodeError
from gpuprep.testing import write_series

Stored = NDArray[np.int16]
SHAPE, SPACING_MM = (5, 24, 26), (2.5, 0.8, 0.7)
PIXELS = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
"""PS3.5, 7.1.2: tag, VR and undefined length of *Pixel Data*; the items follow."""
ITEM, END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"


@pytest.fixture
def stored(noise: Callable[..., Stored]) -> Stored:
    return noise(SHAPE)


def encode_rle(values: NDArray[Any]) -> bytes:
    ds = Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.SOPClassUID = ds.SOPInstanceUID = "1.2.3"
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 1
    ds.Rows, ds.Columns = values.shape
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit = 15
    ds.compress(RLELossless, values, encoding_plugin="pydicom")
    return next(generate_frames(ds.PixelData, number_of_frames=1))


ENCODERS: dict[UID, Callable[[NDArray[Any]], bytes]] = {
    JPEGLosslessSV1: lambda v: bytes(imagecodecs.ljpeg_encode(v.view("u2"), bitspersample=16)),
    JPEGLSLossless: lambda v: bytes(imagecodecs.jpegls_encode(v.view("u2"))),
    JPEG2000Lossless: lambda v: bytes(imagecodecs.jpeg2k_encode(v, level=0, codecformat="j2k", reversible=True)),
    RLELossless: encode_rle,
}


def set_encapsulated(ds: Dataset, syntax: UID, value: bytes) -> None:
    """Set encapsulated pixels in a data set."""
    ds.PixelData = value
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = syntax


def encoded(folder: Path, stored: Stored, syntax: UID = JPEGLSLossless, **options: Any) -> list[Path]:
    """Write an encapsulated series; the options are pydicom's."""

    def change(ds: Dataset, k: int) -> None:
        set_encapsulated(ds, syntax, encapsulate([ENCODERS[syntax](stored[k])], **options))

    return write_series(folder, stored, SPACING_MM, change=change)


def pack(files: list[Path], how: str) -> None:
    """Replace the files of a folder by gzip'd files or a zip archive."""
    if how == "zip":
        with zipfile.ZipFile(files[0].parent / "export.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, file.name)
    for file in files:
        if how == "gzip":
            file.with_suffix(".gz").write_bytes(gzip.compress(file.read_bytes()))
        if how != "plain":
            file.unlink()


def only_series(folder: Path, **options: Any) -> Series:
    (series,) = gpuprep.discover(folder, **options)
    return series


@pytest.fixture
def forbid_header_parsing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes further parsing of headers fail."""

    def never(*_: Any, **__: Any) -> Dataset:
        pytest.fail("a header is parsed twice")

    return lambda: monkeypatch.setattr(pydicom, "dcmread", never)


@pytest.mark.parametrize("how", ["plain", "gzip", "zip"])
@pytest.mark.parametrize("options", [{}, {"has_bot": False}, {"fragments_per_frame": 5, "has_bot": False}], ids=str)
@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name)
def test_no_header_is_parsed_twice(
    tmp_path: Path, stored: Stored, forbid_header_parsing: Callable[[], None], syntax: UID, options: Any, how: str
) -> None:
    pack(encoded(tmp_path, stored, syntax, **options), how)
    series = only_series(tmp_path)
    forbid_header_parsing()
    assert np.array_equal(gpuprep.read(series).stored, stored)


def test_headers_from_the_index_are_enough_to_read_pixels(
    tmp_path: Path, stored: Stored, forbid_header_parsing: Callable[[], None]
) -> None:
    encoded(tmp_path / "dicom", stored)
    index = tmp_path / "headers.sqlite"
    first = only_series(tmp_path / "dicom", index=index)
    forbid_header_parsing()
    again = only_series(tmp_path / "dicom", index=index)
    assert again == first
    assert np.array_equal(gpuprep.read(again).stored, stored)


@pytest.mark.parametrize("how", ["plain", "gzip", "zip"])
@pytest.mark.parametrize(
    "options",
    [{}, {"has_bot": False}, {"fragments_per_frame": 3}, {"fragments_per_frame": 3, "has_bot": False}],
    ids=str,
)
def test_each_of_several_frames_is_found(
    tmp_path: Path, stored: Stored, forbid_header_parsing: Callable[[], None], options: Any, how: str
) -> None:
    files = write_series(tmp_path / "single", stored, SPACING_MM)
    order = [3, 0, 4, 1, 2]
    file = tmp_path / "multi" / "e.dcm"
    enhanced(files, file, order=order)
    ds = pydicom.dcmread(file)
    set_encapsulated(ds, JPEGLSLossless, encapsulate([ENCODERS[JPEGLSLossless](stored[n]) for n in order], **options))
    ds.save_as(file)
    pack([file], how)
    series = only_series(tmp_path / "multi")
    forbid_header_parsing()
    assert np.array_equal(gpuprep.read(series).stored, stored)


def test_an_extended_offset_table_is_followed(tmp_path: Path, stored: Stored) -> None:
    files = write_series(tmp_path / "single", stored, SPACING_MM)
    file = tmp_path / "multi" / "e.dcm"
    enhanced(files, file)
    ds = pydicom.dcmread(file)
    value, offsets, lengths = encapsulate_extended([ENCODERS[JPEG2000Lossless](v) for v in stored])
    set_encapsulated(ds, JPEG2000Lossless, value)
    ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = offsets, lengths
    ds.save_as(file)
    assert np.array_equal(gpuprep.read(only_series(tmp_path / "multi")).stored, stored)
    ds.ExtendedOffsetTable = offsets[8:16] + offsets[:8] + offsets[16:]  # detected only if the table is used
    ds.save_as(file)
    with pytest.raises(DecodeError, match="does not ascend"):
        gpuprep.read(only_series(tmp_path / "multi"))


@pytest.fixture
def damaged(tmp_path: Path, stored: Stored) -> Callable[[Callable[[bytes, bytes], bytes]], Series]:
    """Return a function that changes the third file, as (bytes before its items, rest), and finds the series."""

    def make(change: Callable[[bytes, bytes], bytes]) -> Series:
        target = encoded(tmp_path / "dicom", stored)[2]
        head, items = target.read_bytes().split(PIXELS)
        target.write_bytes(change(head + PIXELS, items))
        return only_series(tmp_path / "dicom")

    return make


FRAGMENT = 12
"""Offset of the first fragment's item, after an offset table of one entry."""


@pytest.mark.parametrize(
    "keep",
    [0, 5, 8, FRAGMENT - 1, FRAGMENT, FRAGMENT + 3, FRAGMENT + 7, FRAGMENT + 8, FRAGMENT + 200, -100, -9],
)
@pytest.mark.parametrize("how", ["plain", "gzip", "zip"])
def test_a_file_that_ends_within_its_items_is_truncated(
    damaged: Callable[..., Series], tmp_path: Path, keep: int, how: str
) -> None:
    series = damaged(lambda head, items: head + items[: keep if keep >= 0 else len(items) + keep])
    if how != "plain":
        pack(sorted((tmp_path / "dicom").iterdir()), how)
        series = only_series(tmp_path / "dicom")
    with pytest.raises(DecodeError, match=r"S1-0003.* ends within its pixels: it is truncated") as caught:
        gpuprep.read(series)
    assert caught.value.code == "truncated"


@pytest.mark.parametrize(
    "end",
    [b"", END[:1], END[:3], END[:4], END[:7], bytes(3), bytes(8), bytes(16), b"\xfe\xff\x0d\xe0\0\0\0\0",
     b"\xfc\xff\xfc\xffOB\0\0\x02\0\0\0\0\0"],
    ids=["nothing", "1 byte", "3 bytes", "tag alone", "7 bytes", "3 zeros", "8 zeros", "16 zeros", "end of item",
         "next element"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("syntax", "how"), [*((s, "plain") for s in ENCODERS), (RLELossless, "gzip"), (RLELossless, "zip")]
)
def test_a_missing_delimiter_gives_a_warning(tmp_path: Path, stored: Stored, syntax: UID, end: bytes, how: str) -> None:
    files = encoded(tmp_path, stored, syntax)
    for file in files[1:3]:
        content = file.read_bytes()
        assert content.endswith(END)
        file.write_bytes(content[: -len(END)] + end)
    pack(files, how)
    assert warnings_of_read(tmp_path, stored) == [
        "no sequence delimiter follows the fragments in 2 of the images that were decoded"
    ]


def warnings_of_read(folder: Path, stored: Stored) -> list[str]:
    """Compare the pixels read with those stored, and return the texts of the "encapsulation" warnings."""
    series = only_series(folder)
    for policy in ("strict", "keep", "fix"):
        reader = SeriesReader(series, gpuprep.Recipe(policy=policy))
        assert np.array_equal(reader.slab(0, len(stored)), stored)
        assert reader.irregularities == ()
        assert {w.code for w in reader.warnings} <= {"encapsulation"}
    return [w.text for w in reader.warnings]


def test_unknown_data_in_place_of_the_delimiter_are_rejected(damaged: Callable[..., Series]) -> None:
    for tag in (b"\xe0\x7f\x11\0", b"garb", b"\xfe\xff\x01\xe0"):
        series = damaged(lambda head, items, tag=tag: head + items[: -len(END)] + tag + bytes(4))
        with pytest.raises(DecodeError, match=r"S1-0003.* no fragment where one should be"):
            gpuprep.read(series)


@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("table", [True, False], ids=["table", "no table"])
@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name)
def test_without_delimiter_a_frame_without_its_last_fragments_is_rejected(
    tmp_path: Path, stored: Stored, syntax: UID, table: bool, missing: int
) -> None:
    fragments = list(fragment_frame(ENCODERS[syntax](stored[2]), 4))

    def change(ds: Dataset, k: int) -> None:
        set_encapsulated(ds, syntax, encapsulate([ENCODERS[syntax](stored[k])], fragments_per_frame=4, has_bot=table))

    target = write_series(tmp_path, stored, SPACING_MM, change=change)[2]
    lost = sum(8 + len(f) for f in fragments[-missing:])
    target.write_bytes(target.read_bytes()[: -len(END) - lost])
    with pytest.raises(DecodeError, match="S1-0003"):
        gpuprep.read(only_series(tmp_path))


# Offset tables


Fragments = list[list[bytes]]
"""Fragments, by frame."""


def starts(fragments: Fragments) -> list[list[int]]:
    """Return the offset of each fragment of each frame: PS3.5, A.4."""
    ends = iter(accumulate((8 + len(f) for frame in fragments for f in frame), initial=0))
    return [[next(ends) for _ in frame] for frame in fragments]


def items(fragments: Fragments, table: list[int] | None) -> bytes:
    """Return the items of the offset table, if any, and of the fragments."""
    values = [f for frame in fragments for f in frame]
    if table is not None:
        values.insert(0, struct.pack(f"<{len(table)}I", *table))
    return b"".join(ITEM + struct.pack("<I", len(v)) + v for v in values)


def rewritten(file: Path, value: bytes) -> None:
    """Write items into a file byte for byte; pydicom would pad them to an even length."""
    head = file.read_bytes().split(PIXELS)[0]
    file.write_bytes(head + PIXELS + value + END)


def multi(folder: Path, stored: Stored, syntax: UID, value: bytes, **attributes: Any) -> None:
    """Write all frames into one file."""
    files = write_series(folder.parent / "single", stored, SPACING_MM)
    file = folder / "e.dcm"
    enhanced(files, file)
    ds = pydicom.dcmread(file)
    set_encapsulated(ds, syntax, value)
    for keyword, attribute in attributes.items():
        setattr(ds, keyword, attribute)
    ds.save_as(file)


def parts(syntax: UID, stored: Stored, count: int) -> Fragments:
    return [list(fragment_frame(ENCODERS[syntax](v), count)) for v in stored]


WRONG_TABLE_WARNING = "the offset table does not fit the fragments in 5 of the images that were decoded"
TABLES: dict[str, Callable[[Fragments], list[int] | None]] = {
    "zeros": lambda fragments: [0] * len(fragments),
    "only the first": lambda _: [0],
    "one too few": lambda fragments: [s[0] for s in starts(fragments)][:-1],
    "shifted by one": lambda fragments: [*[s[0] for s in starts(fragments)][1:], sum(map(len, fragments[0]))],
    "beside the fragments": lambda fragments: [s[0] + 4 for s in starts(fragments)],
    "of each fragment": lambda fragments: [offset for s in starts(fragments) for offset in s],
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("wrong", TABLES)
@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name)
def test_fragments_locate_frames_if_the_offset_table_is_wrong(
    tmp_path: Path, stored: Stored, syntax: UID, wrong: str, count: int
) -> None:
    fragments = parts(syntax, stored, count)
    multi(tmp_path / "multi", stored, syntax, items(fragments, TABLES[wrong](fragments)))
    right = count == 1 and wrong == "of each fragment"
    assert warnings_of_read(tmp_path / "multi", stored) == ([] if right else [WRONG_TABLE_WARNING])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name)
def test_frames_without_an_offset_table_are_found(tmp_path: Path, stored: Stored, syntax: UID, count: int) -> None:
    fragments = parts(syntax, stored, count)
    multi(tmp_path / "empty", stored, syntax, items(fragments, []))
    assert warnings_of_read(tmp_path / "empty", stored) == []
    multi(tmp_path / "absent", stored, syntax, items(fragments, None))
    (text,) = warnings_of_read(tmp_path / "absent", stored)
    assert text.startswith("no offset table precedes the fragments")


@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name)
def test_an_offset_table_in_another_order_than_the_fragments_is_rejected(
    tmp_path: Path, stored: Stored, syntax: UID
) -> None:
    # It is unclear which is right: pydicom follows the table, GDCM the fragments.
    fragments = parts(syntax, stored, 1)
    multi(tmp_path / "multi", stored, syntax, items(fragments, [s[0] for s in starts(fragments)][::-1]))
    with pytest.raises(DecodeError, match="its offset table does not ascend"):
        gpuprep.read(only_series(tmp_path / "multi"))


@pytest.mark.parametrize("table", [True, False], ids=["table", "no table"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name)
def test_missing_frames_are_rejected(tmp_path: Path, stored: Stored, syntax: UID, count: int, table: bool) -> None:
    fragments = parts(syntax, stored, count)
    offsets = [s[0] for s in starts(fragments)] if table else []
    multi(tmp_path / "multi", stored, syntax, items(fragments[:-1], offsets))
    with pytest.raises(DecodeError, match=r"e\.dcm frame \d.* make up 4 frames, not 5"):
        gpuprep.read(only_series(tmp_path / "multi"))


@pytest.mark.parametrize("wrong", [[8], [4, 12], [2**32 - 1]], ids=str)
@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name)
def test_a_single_frame_needs_no_offset_table(tmp_path: Path, stored: Stored, syntax: UID, wrong: list[int]) -> None:
    def change(ds: Dataset, k: int) -> None:
        fragments = parts(syntax, stored[k : k + 1], 3)
        table = [wrong, starts(fragments)[0], [0]][min(k, 2)]
        set_encapsulated(ds, syntax, items(fragments, table))

    write_series(tmp_path, stored, SPACING_MM, change=change)
    assert warnings_of_read(tmp_path, stored) == [WRONG_TABLE_WARNING.replace("5", "2")]


def test_an_extended_offset_table_that_does_not_fit_is_ignored(tmp_path: Path, stored: Stored) -> None:
    fragments = parts(JPEG2000Lossless, stored, 1)
    right = [s[0] for s in starts(fragments)]
    lengths = struct.pack("<5Q", *(len(f[0]) for f in fragments))
    for name, offsets in {"shifted": [n + right[1] for n in right], "zeros": [0] * 5, "short": right[:2]}.items():
        table = struct.pack(f"<{len(offsets)}Q", *offsets)
        multi(
            tmp_path / name, stored, JPEG2000Lossless, items(fragments, []),
            ExtendedOffsetTable=table, ExtendedOffsetTableLengths=lengths,
        )  # fmt: skip
        file = tmp_path / name / "e.dcm"
        file.write_bytes(file.read_bytes()[: -len(END)])
        texts = warnings_of_read(tmp_path / name, stored)
        assert [t.split(" in 5")[0] for t in texts] == [
            "no sequence delimiter follows the fragments", "the offset table does not fit the fragments"
        ]  # fmt: skip


# Lengths


@pytest.mark.parametrize("how", ["plain", "gzip"])
@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name)
@pytest.mark.parametrize("fault", ["padding not counted", "padding counted and absent"])
def test_a_fragment_of_odd_length_with_a_wrong_length_field_is_read(
    tmp_path: Path, stored: Stored, syntax: UID, fault: str, how: str
) -> None:
    # PS3.5, A.4: fragments have an even length.
    def odd(stream: bytes) -> bytes:
        return stream if len(stream) % 2 else stream + b"\0"

    files = encoded(tmp_path, stored, syntax)
    for file, values in zip(files, stored, strict=True):
        fragment = odd(ENCODERS[syntax](values))
        if fault == "padding not counted":
            item = ITEM + struct.pack("<I", len(fragment)) + fragment + b"\0"
        else:
            item = ITEM + struct.pack("<I", len(fragment) + 1) + fragment
        rewritten(file, ITEM + bytes(4) + item)
    pack(files, how)
    assert warnings_of_read(tmp_path, stored) == [
        "the length of a fragment is wrong by one byte in 5 of the images that were decoded"
    ]


@pytest.mark.parametrize("shift", [1, -1])
def test_a_length_that_is_wrong_by_one_does_not_shift_other_fragments(
    tmp_path: Path, stored: Stored, shift: int
) -> None:
    values = [f[0] for f in parts(JPEG2000Lossless, stored, 1)]
    values = [v if (len(v) % 2) else v + b"\0" for v in values]
    extra, added = (0, b"\0") if shift > 0 else (1, b"")
    value = ITEM + bytes(4) + b"".join(ITEM + struct.pack("<I", len(v) + extra) + v + added for v in values)
    multi(tmp_path / "multi", stored, JPEG2000Lossless, ITEM + bytes(4))
    rewritten(tmp_path / "multi" / "e.dcm", value)
    assert [t.split(" in 5")[0] for t in warnings_of_read(tmp_path / "multi", stored)] == [
        "the length of a fragment is wrong by one byte"
    ]


def with_defined_length(file: Path) -> None:
    """Give the pixels of a file a defined length, without a delimiter."""
    head, value = file.read_bytes().split(PIXELS)
    value = value.removesuffix(END)
    file.write_bytes(head + PIXELS[:8] + struct.pack("<I", len(value)) + value)


@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name)
def test_fragments_in_an_element_of_defined_length_are_read(tmp_path: Path, stored: Stored, syntax: UID) -> None:
    for file in encoded(tmp_path, stored, syntax):
        with_defined_length(file)
    assert warnings_of_read(tmp_path, stored) == [
        "no sequence delimiter follows the fragments in 5 of the images that were decoded"
    ]


# Pixels that are not encoded


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("how", ["plain", "gzip"])
@pytest.mark.parametrize(
    "syntax", [JPEGLosslessSV1, RLELossless, UID("1.2.840.10008.1.2.4.110")], ids=lambda uid: uid.name
)
def test_native_pixels_under_an_encapsulated_syntax_are_read(
    tmp_path: Path, stored: Stored, syntax: UID, how: str, frames: int
) -> None:
    files = write_series(tmp_path / "in", stored, SPACING_MM)
    if frames > 1:
        (tmp_path / "multi").mkdir()
        enhanced(files, tmp_path / "multi" / "e.dcm")
        files = [tmp_path / "multi" / "e.dcm"]
    for file in files:
        renamed(file, syntax)
    pack(files, how)
    series = only_series(files[0].parent)
    assert np.array_equal(gpuprep.read(series).stored, stored)
    (warning,) = gpuprep.audit(series).warnings
    assert warning.code == "encapsulation"
    assert warning.text.startswith("pixels that are not encoded, although the transfer syntax says so, in ")
    assert gpuprep.audit(series, gpuprep.Rules(policy="strict")).verdict == "ok"


@pytest.mark.parametrize("change", [-4, -2, 2, 100])
def test_native_pixels_of_another_length_under_an_encapsulated_syntax_are_rejected(
    tmp_path: Path, stored: Stored, change: int
) -> None:
    def resize(ds: Dataset, _: int) -> None:
        ds.PixelData = ds.PixelData[:change] if change < 0 else ds.PixelData + bytes(change)

    file = write_series(tmp_path, stored[:1], SPACING_MM, change=resize)[0]
    renamed(file, JPEGLSLossless)
    with pytest.raises(DecodeError, match="no fragment where one should be"):
        PixelReader().read(headers_of(file), np.empty(SHAPE[1:], np.int16))


def headers_of(file: Path) -> SliceHeader:
    ((image,),) = (contents.images for contents in read_headers([str(file)]))
    return image.header


@pytest.mark.parametrize("syntax", [None, *ENCODERS], ids=lambda uid: uid.name if uid else "native")
def test_zero_frames_are_read_as_one_frame(tmp_path: Path, stored: Stored, syntax: UID | None) -> None:
    def change(ds: Dataset, k: int) -> None:
        ds.NumberOfFrames = 0
        if syntax:
            set_encapsulated(ds, syntax, encapsulate([ENCODERS[syntax](stored[k])]))

    write_series(tmp_path, stored, SPACING_MM, change=change)
    series = only_series(tmp_path)
    assert np.array_equal(gpuprep.read(series).stored, stored)
    (warning,) = gpuprep.audit(series).warnings
    assert (warning.code, warning.text.split(", in ")[0]) == ("encapsulation", "Number of Frames 0, taken as 1")


def test_data_after_the_delimiter_are_ignored(damaged: Callable[..., Series], stored: Stored) -> None:
    series = damaged(lambda head, items: head + items[: -len(END)] + END[:4] + b"garbage" * 1000)
    assert np.array_equal(gpuprep.read(series).stored, stored)


@pytest.mark.parametrize("length", [0, 1, 50, 100_000, 2**31, 2**32 - 1])
@pytest.mark.parametrize("at", [4, FRAGMENT + 4], ids=["offset table", "fragment"])
def test_a_wrong_length_is_rejected_without_allocating_memory(
    damaged: Callable[..., Series], at: int, length: int
) -> None:
    series = damaged(lambda head, items: head + items[:at] + length.to_bytes(4, "little") + items[at + 4 :])
    tracemalloc.start()
    with pytest.raises(DecodeError, match="S1-0003"):
        gpuprep.read(series)
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


def test_another_tag_among_the_fragments_is_reported(damaged: Callable[..., Series]) -> None:
    series = damaged(lambda head, items: head + items[:FRAGMENT] + b"\xfe\xff\x0d\xe0" + items[FRAGMENT + 4 :])
    with pytest.raises(DecodeError, match=r"S1-0003.* no fragment where one should be, 12 bytes into its pixels"):
        gpuprep.read(series)


def test_fragments_without_an_end_are_rejected(damaged: Callable[..., Series]) -> None:
    series = damaged(lambda head, items: head + (ITEM + bytes(4)) * 300_000 + items)
    with pytest.raises(DecodeError, match=r"S1-0003.* does not end"):
        gpuprep.read(series)


def test_pixel_data_without_items_are_rejected(damaged: Callable[..., Series]) -> None:
    series = damaged(lambda head, _: head + END)
    with pytest.raises(DecodeError, match=r"S1-0003.* cannot be decoded"):
        gpuprep.read(series)


@pytest.mark.parametrize("time_differs", [True, False], ids=["by its time", "by its content"])
def test_a_file_that_changed_since_the_scan_is_rejected(tmp_path: Path, stored: Stored, time_differs: bool) -> None:
    target = encoded(tmp_path, stored)[2]
    series = only_series(tmp_path)
    status = target.stat()
    target.write_bytes(target.read_bytes().replace(PIXELS, bytes(6) + PIXELS))
    if not time_differs:
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DecodeError, match=r"S1-0003.* changed since the scan") as caught:
        gpuprep.read(series)
    assert caught.value.code == ("changed" if time_differs else "pixels")


def test_an_unknown_transfer_syntax_is_rejected(tmp_path: Path, stored: Stored) -> None:
    for file in encoded(tmp_path, stored):
        ds = pydicom.dcmread(file)
        ds.file_meta.TransferSyntaxUID = UID("1.2.3.4.5")
        ds.save_as(file, implicit_vr=False, little_endian=True)
    with pytest.raises(DecodeError, match=r"transfer syntax 1\.2\.3\.4\.5 in .* is not supported"):
        gpuprep.read(only_series(tmp_path))
