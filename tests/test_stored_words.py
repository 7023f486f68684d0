"""What the words of Pixel Data mean where files are odd: where they begin, which bits count, which sign they have."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from conftest import natively
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
)

import gpuprep
from gpuprep.phantom import write_series

Stored = NDArray[Any]
Change = Callable[[Dataset, int], None]

SPACING_MM = (2.5, 0.8, 0.7)


def found(folder: Path) -> gpuprep.Series:
    (series,) = gpuprep.discover(folder)
    return series


# Where they begin


PIXELS = b"\xe0\x7f\x10\x00OW\0\0"
LONG_VRS = ["OB", "OD", "OF", "OL", "OV", "OW", "SV", "UC", "UN", "UR", "UT", "UV"]
"""PS3.5, 7.1.2: two reserved bytes and a length of four follow these VRs."""


def ramp(size: int, slices: int = 3) -> NDArray[np.int16]:
    """Return slices whose columns count, so that a shift by one column is seen."""
    return (
        np.tile(np.arange(size, dtype=np.int16), (slices, size, 1)) + np.arange(slices, dtype=np.int16)[:, None, None]
    )


def relabelled(file: Path, vr: bytes, syntax: UID = ExplicitVRLittleEndian) -> None:
    """Write a file in a native syntax, with other bytes where the VR and the two reserved bytes of the pixels are."""
    data = natively(
        pydicom.dcmread(file), ExplicitVRBigEndian if syntax == ExplicitVRBigEndian else ExplicitVRLittleEndian
    )
    old = b"\x7f\xe0\x00\x10OW\0\0" if syntax == ExplicitVRBigEndian else PIXELS
    at = data.rindex(old) + 4
    data = data[:at] + vr + data[at + 4 :]
    if syntax == DeflatedExplicitVRLittleEndian:
        meta = natively(pydicom.dcmread(file), syntax)
        group = 132 + 12 + int.from_bytes(meta[140:144], "little")
        plain = 132 + 12 + int.from_bytes(data[140:144], "little")
        squeeze = zlib.compressobj(wbits=-15)
        data = meta[:group] + squeeze.compress(data[plain:]) + squeeze.flush()
    file.write_bytes(data)


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
    ids=lambda uid: uid.keyword,
)
@pytest.mark.parametrize(
    "vr", [v.encode() + b"\0\0" for v in LONG_VRS] + [b"OW  ", b"OW\0\x01", b"UN\xff\xff", b"OX\0\0"]
)
def test_pixels_begin_behind_the_explicit_header_whatever_its_vr(tmp_path: Path, vr: bytes, syntax: UID) -> None:
    stored = ramp(64)
    for file in write_series(tmp_path, stored, SPACING_MM):
        relabelled(file, vr, syntax)
    np.testing.assert_array_equal(gpuprep.read(found(tmp_path)).stored, stored)


@pytest.mark.parametrize("vr", [b"UN\0\0", b"OF\0\0", b"OW  ", b"??\0\0"])
def test_pixels_of_a_large_matrix_begin_behind_the_explicit_header(tmp_path: Path, vr: bytes) -> None:
    stored = ramp(512)
    for file in write_series(tmp_path, stored, SPACING_MM):
        relabelled(file, vr)
    np.testing.assert_array_equal(gpuprep.read(found(tmp_path)).stored, stored)


@pytest.mark.parametrize("vr", [b"US", b"SS", b"DS", b"IS"])
def test_a_vr_with_a_short_length_has_its_pixels_behind_it(tmp_path: Path, vr: bytes) -> None:
    stored = ramp(64)
    for file in write_series(tmp_path, stored, SPACING_MM):
        data = file.read_bytes()
        at = data.rindex(PIXELS)
        file.write_bytes(data[: at + 4] + vr + (64 * 64 * 2).to_bytes(2, "little") + data[at + 12 :])
        assert pydicom.dcmread(file).get_item(0x7FE00010).value == data[at + 12 :]
    np.testing.assert_array_equal(gpuprep.read(found(tmp_path)).stored, stored)


@pytest.mark.parametrize("size", [64, 512])
@pytest.mark.parametrize("others", [ImplicitVRLittleEndian, ExplicitVRLittleEndian], ids=lambda uid: uid.keyword)
def test_pixels_may_have_a_vr_where_the_others_have_none_and_the_reverse(
    tmp_path: Path, others: UID, size: int
) -> None:
    stored = ramp(size)
    for file in write_series(tmp_path, stored, SPACING_MM):
        data = natively(pydicom.dcmread(file), others)
        length = (size * size * 2).to_bytes(4, "little")
        explicit, implicit = PIXELS + length, PIXELS[:4] + length
        old, new = (implicit, explicit) if others == ImplicitVRLittleEndian else (explicit, implicit)
        assert data.count(old) == 1
        file.write_bytes(data.replace(old, new))
    np.testing.assert_array_equal(gpuprep.read(found(tmp_path)).stored, stored)


@pytest.mark.parametrize("size", [(2, 20), (7, 11), (16, 20), (64, 64), (141, 149), (337, 62), (512, 512)])
def test_no_length_without_a_vr_is_taken_for_one(tmp_path: Path, size: tuple[int, int]) -> None:
    # 141 × 149 × 2 bytes are 0xA422, 337 × 62 × 2 are 0xA33C; no even number has a letter of a pixel's VR first.
    stored = np.random.default_rng(0).integers(0, 3000, (3, *size)).astype(np.int16)
    for file in write_series(tmp_path, stored, SPACING_MM):
        file.write_bytes(natively(pydicom.dcmread(file), ImplicitVRLittleEndian))
    np.testing.assert_array_equal(gpuprep.read(found(tmp_path)).stored, stored)


@pytest.mark.parametrize("letters", ["DS", "DA", "FL", "LO", "PN", "TM"])
def test_a_length_without_vr_may_read_as_letters(tmp_path: Path, letters: str) -> None:
    # "DS" is 0x5344 = 21316 bytes: an implicit element of 10658 pixels.
    pixels = int.from_bytes(letters.encode(), "little") // 2
    rows = next(n for n in range(1, pixels) if pixels % n == 0 and pixels // n <= 8192)
    stored = np.random.default_rng(0).integers(0, 3000, (3, rows, pixels // rows)).astype(np.int16)
    for file in write_series(tmp_path, stored, SPACING_MM):
        file.write_bytes(natively(pydicom.dcmread(file), ImplicitVRLittleEndian))
        assert b"\xe0\x7f\x10\x00" + letters.encode() + b"\0\0" in file.read_bytes()
    np.testing.assert_array_equal(gpuprep.read(found(tmp_path)).stored, stored)


@pytest.mark.parametrize("vr", [b"OB\0\0", b"OW  ", b"UN\0\0", b"OF\0\x01"])
def test_encoded_pixels_begin_behind_the_explicit_header_whatever_its_vr(tmp_path: Path, vr: bytes) -> None:
    stored = ramp(64)

    def encode(ds: Dataset, k: int) -> None:
        ds.file_meta.TransferSyntaxUID = JPEGLSLossless
        ds.PixelData = encapsulate([bytes(imagecodecs.jpegls_encode(stored[k].view("u2")))])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True

    for file in write_series(tmp_path, stored, SPACING_MM, change=encode):
        data = file.read_bytes()
        at = data.rindex(b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff") + 4
        file.write_bytes(data[:at] + vr + data[at + 4 :])
    np.testing.assert_array_equal(gpuprep.read(found(tmp_path)).stored, stored)


@pytest.mark.parametrize(
    ("keyword", "dtype", "bits"), [("FloatPixelData", "<f4", 32), ("DoubleFloatPixelData", "<f8", 64)]
)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=lambda uid: uid.keyword)
def test_float_pixels_are_refused_by_name(tmp_path: Path, keyword: str, dtype: str, bits: int, syntax: UID) -> None:
    def change(ds: Dataset, k: int) -> None:
        del ds.PixelData
        ds.BitsAllocated = bits
        setattr(ds, keyword, np.full((16, 20), -1000.5 + k, dtype).tobytes())

    for file in write_series(tmp_path, np.zeros((3, 16, 20), np.int16), SPACING_MM, change=change):
        file.write_bytes(natively(pydicom.dcmread(file), syntax))
    cohort = gpuprep.discover(tmp_path)
    assert len(cohort) == 0
    assert len(cohort.unreadable) == 3
    name = {
        "FloatPixelData": "Float Pixel Data (7FE0,0008)",
        "DoubleFloatPixelData": "Double Float Pixel Data (7FE0,0009)",
    }
    assert all(f"its pixels are {name[keyword]}" in reason for _, reason in cohort.unreadable)
