"""Encoded pixels are read where the scan found them: whole, in fragments, of many frames, packed, and damaged."""

from __future__ import annotations

import gzip
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import UID, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless
from test_sources import enhanced

import gpuprep
from gpuprep.errors import DecodeError
from gpuprep.phantom import write_series
from gpuprep.series import Series

Stored = NDArray[np.int16]
SHAPE, SPACING_MM = (5, 24, 26), (2.5, 0.8, 0.7)
PIXELS = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
"""PS3.5, 7.1.2: tag, VR and the length that announces items; these follow at once."""
ITEM, END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"


@pytest.fixture
def stored(noise: Callable[..., Stored]) -> Stored:
    return noise(SHAPE)


def run_lengths(values: NDArray[Any]) -> bytes:
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
    RLELossless: run_lengths,
}


def put(ds: Dataset, syntax: UID, value: bytes) -> None:
    """Give a data set encapsulated pixels."""
    ds.PixelData = value
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = syntax


def encoded(folder: Path, stored: Stored, syntax: UID = JPEGLSLossless, **options: Any) -> list[Path]:
    """Write an encapsulated series; the options are pydicom's."""

    def change(ds: Dataset, k: int) -> None:
        put(ds, syntax, encapsulate([ENCODERS[syntax](stored[k])], **options))

    return write_series(folder, stored, SPACING_MM, change=change)


def packed(files: list[Path], how: str) -> None:
    """Put the files of a folder into what cohorts are sent in."""
    if how == "zip":
        with zipfile.ZipFile(files[0].parent / "export.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, file.name)
    for file in files:
        if how == "gzip":
            file.with_suffix(".gz").write_bytes(gzip.compress(file.read_bytes()))
        if how != "plain":
            file.unlink()


def found(folder: Path, **options: Any) -> Series:
    (series,) = gpuprep.discover(folder, **options)
    return series


@pytest.fixture
def no_more_headers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let no header be parsed from now on."""

    def never(*_: Any, **__: Any) -> Dataset:
        pytest.fail("a header is parsed twice")

    return lambda: monkeypatch.setattr(pydicom, "dcmread", never)


@pytest.mark.parametrize("how", ["plain", "gzip", "zip"])
@pytest.mark.parametrize("options", [{}, {"has_bot": False}, {"fragments_per_frame": 5, "has_bot": False}], ids=str)
@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name)
def test_no_header_is_parsed_twice(
    tmp_path: Path, stored: Stored, no_more_headers: Callable[[], None], syntax: UID, options: Any, how: str
) -> None:
    packed(encoded(tmp_path, stored, syntax, **options), how)
    series = found(tmp_path)
    no_more_headers()
    assert np.array_equal(gpuprep.read(series).stored, stored)


def test_what_the_index_remembers_is_enough(
    tmp_path: Path, stored: Stored, no_more_headers: Callable[[], None]
) -> None:
    encoded(tmp_path / "dicom", stored)
    index = tmp_path / "headers.sqlite"
    first = found(tmp_path / "dicom", index=index)
    no_more_headers()
    again = found(tmp_path / "dicom", index=index)
    assert again == first
    assert np.array_equal(gpuprep.read(again).stored, stored)


@pytest.mark.parametrize("how", ["plain", "gzip", "zip"])
@pytest.mark.parametrize(
    "options",
    [{}, {"has_bot": False}, {"fragments_per_frame": 3}, {"fragments_per_frame": 3, "has_bot": False}],
    ids=str,
)
def test_each_frame_of_several_is_found(
    tmp_path: Path, stored: Stored, no_more_headers: Callable[[], None], options: Any, how: str
) -> None:
    files = write_series(tmp_path / "single", stored, SPACING_MM)
    order = [3, 0, 4, 1, 2]
    file = tmp_path / "multi" / "e.dcm"
    enhanced(files, file, order=order)
    ds = pydicom.dcmread(file)
    put(ds, JPEGLSLossless, encapsulate([ENCODERS[JPEGLSLossless](stored[n]) for n in order], **options))
    ds.save_as(file)
    packed([file], how)
    series = found(tmp_path / "multi")
    no_more_headers()
    assert np.array_equal(gpuprep.read(series).stored, stored)


def test_an_extended_offset_table_is_followed(tmp_path: Path, stored: Stored) -> None:
    files = write_series(tmp_path / "single", stored, SPACING_MM)
    file = tmp_path / "multi" / "e.dcm"
    enhanced(files, file)
    ds = pydicom.dcmread(file)
    value, offsets, lengths = encapsulate_extended([ENCODERS[JPEG2000Lossless](v) for v in stored])
    put(ds, JPEG2000Lossless, value)
    ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = offsets, lengths
    ds.save_as(file)
    assert np.array_equal(gpuprep.read(found(tmp_path / "multi")).stored, stored)
    ds.ExtendedOffsetTable = offsets[8:16] + offsets[:8] + offsets[16:]  # which nothing else would notice
    ds.save_as(file)
    with pytest.raises(DecodeError, match="does not ascend"):
        gpuprep.read(found(tmp_path / "multi"))


@pytest.fixture
def damaged(tmp_path: Path, stored: Stored) -> Callable[[Callable[[bytes, bytes], bytes]], Series]:
    """Change the third file, given as what precedes its items and the rest, and find the series."""

    def make(change: Callable[[bytes, bytes], bytes]) -> Series:
        target = encoded(tmp_path / "dicom", stored)[2]
        head, items = target.read_bytes().split(PIXELS)
        target.write_bytes(change(head + PIXELS, items))
        return found(tmp_path / "dicom")

    return make


FRAGMENT = 12
"""Where the first fragment's item begins: after that of an offset table of one entry."""


@pytest.mark.parametrize(
    "keep",
    [0, 5, 8, FRAGMENT - 1, FRAGMENT, FRAGMENT + 3, FRAGMENT + 7, FRAGMENT + 8, FRAGMENT + 200, -100, -8, -7, -5],
)
@pytest.mark.parametrize("how", ["plain", "gzip", "zip"])
def test_a_file_that_ends_within_its_items_is_truncated(
    damaged: Callable[..., Series], tmp_path: Path, keep: int, how: str
) -> None:
    series = damaged(lambda head, items: head + items[: keep if keep >= 0 else len(items) + keep])
    if how != "plain":
        packed(sorted((tmp_path / "dicom").iterdir()), how)
        series = found(tmp_path / "dicom")
    with pytest.raises(DecodeError, match=r"S1-0003.* ends within its pixels: it is truncated") as caught:
        gpuprep.read(series)
    assert caught.value.code == "truncated"


def test_what_follows_the_delimiter_does_not_matter(damaged: Callable[..., Series], stored: Stored) -> None:
    series = damaged(lambda head, items: head + items[: -len(END)] + END[:4] + b"garbage" * 1000)
    assert np.array_equal(gpuprep.read(series).stored, stored)


@pytest.mark.parametrize("length", [0, 1, 50, 100_000, 2**31, 2**32 - 1])
@pytest.mark.parametrize("at", [4, FRAGMENT + 4], ids=["offset table", "fragment"])
def test_a_wrong_length_is_no_image_and_takes_no_memory(damaged: Callable[..., Series], at: int, length: int) -> None:
    series = damaged(lambda head, items: head + items[:at] + length.to_bytes(4, "little") + items[at + 4 :])
    tracemalloc.start()
    with pytest.raises(DecodeError, match="S1-0003"):
        gpuprep.read(series)
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


def test_another_tag_among_the_fragments_is_named(damaged: Callable[..., Series]) -> None:
    series = damaged(lambda head, items: head + items[:FRAGMENT] + b"\xfe\xff\x0d\xe0" + items[FRAGMENT + 4 :])
    with pytest.raises(DecodeError, match=r"S1-0003.* no fragment where one should be, 12 bytes into its pixels"):
        gpuprep.read(series)


def test_fragments_without_end_are_given_up(damaged: Callable[..., Series]) -> None:
    series = damaged(lambda head, items: head + (ITEM + bytes(4)) * 300_000 + items)
    with pytest.raises(DecodeError, match=r"S1-0003.* does not end"):
        gpuprep.read(series)


def test_no_items_are_no_image(damaged: Callable[..., Series]) -> None:
    series = damaged(lambda head, _: head + END)
    with pytest.raises(DecodeError, match=r"S1-0003.* cannot be decoded"):
        gpuprep.read(series)


@pytest.mark.parametrize("noticed", [True, False], ids=["by its time", "by its content"])
def test_a_file_that_changed_since_the_scan_is_refused(tmp_path: Path, stored: Stored, noticed: bool) -> None:
    target = encoded(tmp_path, stored)[2]
    series = found(tmp_path)
    status = target.stat()
    target.write_bytes(target.read_bytes().replace(PIXELS, bytes(6) + PIXELS))
    if not noticed:
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DecodeError, match=r"S1-0003.* changed since the scan") as caught:
        gpuprep.read(series)
    assert caught.value.code == ("changed" if noticed else "pixels")


def test_an_unknown_transfer_syntax_is_refused(tmp_path: Path, stored: Stored) -> None:
    for file in encoded(tmp_path, stored):
        ds = pydicom.dcmread(file)
        ds.file_meta.TransferSyntaxUID = UID("1.2.3.4.5")
        ds.save_as(file, implicit_vr=False, little_endian=True)
    with pytest.raises(DecodeError, match="not a transfer syntax"):
        gpuprep.read(found(tmp_path))
