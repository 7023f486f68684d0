"""Tests of `gpuprep.dicom.read`: stored values from every syntax, rescale, padding, and errors for bad files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from conftest import encoded_natively
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from gpuprep.core.hounsfield import padding_to_air, stored_to_hu
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import Series
from gpuprep.core.volume import StoredVolume
from gpuprep.dicom.discover import discover
from gpuprep.dicom.read import SeriesReader, read
from gpuprep.errors import DecodeError, MissingTagError
from gpuprep.testing import write_series

Stored = NDArray[Any]
Change = Callable[[Dataset, int], None]

SPACING = (2.5, 0.8, 0.7)
PLAIN = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
NATIVE = [*PLAIN, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
ENCAPSULATED = [RLELossless, JPEGLSLossless, JPEG2000Lossless, HTJ2KLossless, JPEGLosslessSV1]


def integers(low: int, high: int, dtype: str, shape: tuple[int, int, int] = (3, 16, 20)) -> Stored:
    """Return noise that contains both ends of [low, high]."""
    values = np.random.default_rng(0).integers(low, high + 1, shape)
    values[:, 0, :2] = low, high
    return values.astype(dtype)


def write(
    folder: Path, stored: Stored, syntax: UID = ExplicitVRLittleEndian, change: Change | None = None
) -> list[Path]:
    files = write_series(folder, stored, SPACING, change=change)
    for file in files:
        if syntax in NATIVE:
            file.write_bytes(encoded_natively(pydicom.dcmread(file), syntax))
        else:
            encode_file(file, syntax)
    return files


def encode_file(file: Path, syntax: UID, stream: Callable[[bytes], bytes] = bytes) -> None:
    """Encode the pixels of a file losslessly; `stream` may change the result."""
    ds = pydicom.dcmread(file)
    pixels = np.frombuffer(ds.PixelData, f"<{'i' if ds.PixelRepresentation else 'u'}2").reshape(ds.Rows, ds.Columns)
    if syntax == JPEG2000Lossless:
        frame = imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", reversible=True)
    elif syntax == HTJ2KLossless:
        if not imagecodecs.HTJ2K.available:
            pytest.skip("imagecodecs has no HTJ2K encoder here")
        frame = imagecodecs.htj2k_encode(pixels, reversible=True)
    elif syntax == JPEGLosslessSV1:  # its code streams have no sign
        frame = imagecodecs.ljpeg_encode(pixels.view(np.uint16))
    else:
        ds.compress(syntax, generate_instance_uid=False)
        frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    ds.PixelData = encapsulate([stream(bytes(frame))])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(file, enforce_file_format=True)


def only_series(folder: Path) -> Series:
    (series,) = discover(folder)
    return series


KEEP = Recipe(policy="keep")
"""Accepts the whole range of 16 bits, although most values are no CT numbers."""


def read_folder(folder: Path, recipe: Recipe | None = None) -> StoredVolume:
    return read(only_series(folder), recipe)


def no_padding(ds: Dataset, _: int) -> None:
    if "PixelPaddingValue" in ds:
        del ds.PixelPaddingValue


# Every transfer syntax


KINDS = {
    "signed": (integers(-32768, 32767, "int16", (2, 34, 40)), 16),
    "unsigned": (integers(0, 65535, "uint16", (2, 34, 40)), 16),
    "signed 12 bits": (integers(-2048, 2047, "int16", (2, 34, 40)), 12),
    "unsigned 12 bits": (integers(0, 4095, "uint16", (2, 34, 40)), 12),
}


@pytest.mark.parametrize("syntax", [*NATIVE, *ENCAPSULATED], ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("kind", KINDS)
def test_every_lossless_syntax_gives_the_same_stored_values(tmp_path: Path, syntax: UID, kind: str) -> None:
    # Traps 24, 25, 29, 30: 34 rows, 40 columns, both ends of the range.
    stored, bits = KINDS[kind]

    def change(ds: Dataset, k: int) -> None:
        no_padding(ds, k)
        ds.BitsStored, ds.HighBit = bits, bits - 1

    write(tmp_path, stored, syntax, change)
    volume = read_folder(tmp_path, KEEP)
    assert volume.stored.dtype == stored.dtype
    np.testing.assert_array_equal(volume.stored, stored)


def test_an_unsigned_jpeg_2000_stream_under_a_signed_header_is_read_as_signed(tmp_path: Path) -> None:
    # Trap 25: an unsigned code stream under Pixel Representation 1.
    stored = integers(-2000, 3000, "int16", (2, 34, 40))

    def unsigned(frame: bytes) -> bytes:
        pixels = imagecodecs.jpeg2k_decode(frame)
        return bytes(imagecodecs.jpeg2k_encode(pixels.view(np.uint16), level=0, codecformat="j2k", reversible=True))

    for file in write(tmp_path, stored):
        encode_file(file, JPEG2000Lossless, unsigned)
    np.testing.assert_array_equal(read_folder(tmp_path).stored, stored)


def test_slices_of_one_series_may_be_in_different_syntaxes(tmp_path: Path) -> None:
    # Trap 42.
    stored = integers(-2000, 3000, "int16", (9, 34, 40))
    files = write_series(tmp_path, stored, SPACING)
    for file, syntax in zip(files, [*NATIVE, *ENCAPSULATED], strict=True):
        if syntax in NATIVE:
            file.write_bytes(encoded_natively(pydicom.dcmread(file), syntax))
        else:
            encode_file(file, syntax)
    np.testing.assert_array_equal(read_folder(tmp_path).stored, stored)


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian], ids=lambda uid: uid.keyword
)
def test_a_file_without_preamble_and_meta_group_is_read(tmp_path: Path, syntax: UID) -> None:
    # Trap 29.
    stored = integers(-2000, 3000, "int16")
    for file in write(tmp_path, stored):
        file.write_bytes(encoded_natively(pydicom.dcmread(file), syntax, meta=False))
    np.testing.assert_array_equal(read_folder(tmp_path).stored, stored)


@pytest.mark.parametrize(
    ("declared", "true"),
    [(ExplicitVRLittleEndian, ImplicitVRLittleEndian), (ImplicitVRLittleEndian, ExplicitVRLittleEndian)],
    ids=["explicit declared", "implicit declared"],
)
def test_a_wrong_transfer_syntax_does_not_shift_the_pixels(tmp_path: Path, declared: UID, true: UID) -> None:
    # Trap 29. pydicom reads the header nevertheless; because of data after the pixels, a wrong offset raises no error.
    stored = integers(-2000, 3000, "int16")

    def trailing(ds: Dataset, _: int) -> None:
        ds.add_new(0xFFFCFFFC, "OB", bytes(64))

    for file in write(tmp_path, stored, change=trailing):
        ds = pydicom.dcmread(file)
        ds.file_meta.TransferSyntaxUID = declared
        meta = DicomBytesIO()
        meta.is_little_endian, meta.is_implicit_VR = True, False
        write_file_meta_info(meta, ds.file_meta)
        file.write_bytes(bytes(128) + b"DICM" + meta.getvalue() + encoded_natively(ds, true, meta=False))
    try:
        volume = read_folder(tmp_path)
    except DecodeError:
        return  # a rejection is correct too
    np.testing.assert_array_equal(volume.stored, stored)


def test_encoded_pixels_under_a_native_syntax_are_rejected(tmp_path: Path) -> None:
    # Trap 29: fragments of noise are longer than the pixels, so the file is long enough.
    for file in write(tmp_path, integers(-32768, 32767, "int16"), RLELossless):
        ds = pydicom.dcmread(file)
        assert len(ds.PixelData) > 640
        file.write_bytes(file.read_bytes().replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.1\0"))
    with pytest.raises(DecodeError, match=r"S1-000[123]\.dcm"):
        read_folder(tmp_path)


# Bits


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless], ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("high_bit", [11, 12, 13, 15])
@pytest.mark.parametrize("signed", [True, False])
def test_bits_outside_bits_stored_are_dropped(tmp_path: Path, syntax: UID, high_bit: int, signed: bool) -> None:
    # Trap 24: 12 bits of 16, an old overlay in the others, in old files High Bit not Bits Stored − 1 (PS3.5, 8.1.1).
    expected = integers(-2048, 2047, "int16") if signed else integers(0, 4095, "uint16")
    shift = high_bit - 11
    mask = np.uint16(0xFFF << shift)
    others = integers(0, 65535, "uint16")
    if shift:  # without a shift, these bits would be part of the image
        others[:] = 0
        others[:, 4:9, 5:12] = 0xFFFF
    raw = (expected.view(np.uint16) << shift) & mask | others & ~mask

    def change(ds: Dataset, k: int) -> None:
        no_padding(ds, k)
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, high_bit, int(signed)

    write(tmp_path, raw, syntax, change)
    volume = read_folder(tmp_path)
    np.testing.assert_array_equal(volume.stored, expected)
    assert (volume.statistics.low, volume.statistics.high) == (expected.min() - 1024.0, expected.max() - 1024.0)


def test_each_slice_has_its_own_bits_stored(tmp_path: Path) -> None:
    # Trap 24, and the quirk of 12 and 13 bits in one series.
    stored = integers(0, 0, "uint16")
    stored[:] = np.array([0xFABC, 0xFABC, 0xFABC])[:, None, None]

    def change(ds: Dataset, k: int) -> None:
        ds.BitsStored, ds.HighBit = (12, 11) if k != 1 else (13, 12)

    write(tmp_path, stored, change=change)
    assert read_folder(tmp_path).stored[:, 3, 3].tolist() == [0xABC, 0x1ABC, 0xABC]


@pytest.mark.parametrize("syntax", [*PLAIN, DeflatedExplicitVRLittleEndian], ids=lambda uid: uid.keyword)
@pytest.mark.parametrize(("dtype", "low", "high"), [("uint8", 0, 255), ("int8", -128, 127)])
def test_eight_bits_are_read_with_their_sign(tmp_path: Path, syntax: UID, dtype: str, low: int, high: int) -> None:
    # An odd number of bytes, which DICOM pads.
    stored = integers(low, high, dtype, (3, 15, 21))
    write(tmp_path, stored, syntax, no_padding)
    volume = read_folder(tmp_path)
    assert volume.stored.dtype == np.dtype("uint16" if dtype == "uint8" else "int16")
    np.testing.assert_array_equal(volume.stored, stored)


def test_signed_and_unsigned_slices_keep_their_values(tmp_path: Path) -> None:
    # Traps 23, 24: neither type of 16 bits holds both.
    stored = integers(0, 65535, "uint16")
    stored[1, 0, 0] = 0x8000

    def change(ds: Dataset, k: int) -> None:
        ds.PixelRepresentation = int(k == 1)

    write(tmp_path, stored, change=change)
    expected = stored.astype(np.int32)
    expected[1] = stored[1].view(np.int16)
    volume = read_folder(tmp_path, KEEP)
    assert expected.min() == -32768
    assert expected.max() == 65535
    np.testing.assert_array_equal(volume.stored, expected)
    assert (volume.statistics.low, volume.statistics.high) == (-32768 - 1024, 65535 - 1024)


# Rescale and statistics


def test_each_slice_keeps_its_own_rescale_in_spatial_order(tmp_path: Path) -> None:
    # Trap 23: file names are in reverse spatial order.
    slopes, intercepts = ["1", "0.0444", "2.5"], ["-1024", "-8.5", "04.785156E-01"]

    def change(ds: Dataset, k: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = slopes[k], intercepts[k]

    write(tmp_path, integers(0, 3000, "int16"), change=change)
    volume = read_folder(tmp_path)
    assert volume.slope.tolist() == [1, 0.0444, 2.5]
    assert volume.intercept.tolist() == [-1024, -8.5, 0.4785156]
    assert volume.slope.dtype == volume.intercept.dtype == np.float64


@pytest.mark.parametrize("dtype", ["int16", "uint16"])
def test_hu_statistics_are_those_of_all_voxels(tmp_path: Path, dtype: str) -> None:
    # Trap 23: per slice, padding included; one slope is negative.
    stored = integers(*((-2000, 3000) if dtype == "int16" else (0, 65535)), dtype, (4, 16, 20))
    slopes, intercepts = [1.0, 0.0444, -1.5, 3.0], [-1024.0, 0.25, 10.0, -500.5]

    def change(ds: Dataset, k: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = f"{slopes[k]:g}", f"{intercepts[k]:g}"

    write(tmp_path, stored, change=change)
    hu = stored.astype(np.float64) * np.reshape(slopes, (4, 1, 1)) + np.reshape(intercepts, (4, 1, 1))
    volume = read_folder(tmp_path, KEEP)
    assert volume.statistics.low == pytest.approx(hu.min(), rel=1e-14)
    assert volume.statistics.high == pytest.approx(hu.max(), rel=1e-14)
    assert volume.statistics.mean == pytest.approx(hu.mean(), rel=1e-12)


def test_the_grid_is_the_one_that_was_written(tmp_path: Path) -> None:
    # Trap 35: 3 slices, 16 rows, 20 columns at 2.5 × 0.8 × 0.7 mm.
    stored = integers(-2000, 3000, "int16")
    write(tmp_path, stored)
    volume = read_folder(tmp_path)
    assert volume.geometry.shape == (3, 16, 20)
    assert volume.geometry.spacing_mm == pytest.approx(SPACING)
    assert volume.geometry.points_mm((2, 15, 19)) == pytest.approx((-100 + 13.3, -120 + 12, -295))
    np.testing.assert_array_equal(volume.stored, stored)
    assert volume.warnings == ()


# Padding


def padded(folder: Path, stored: Stored, *values: tuple[str, int, int | None] | None) -> StoredVolume:
    """Read a series whose slices declare padding: (VR, value, range limit)."""

    def change(ds: Dataset, k: int) -> None:
        no_padding(ds, k)
        declared = values[k]
        if declared is not None:
            vr, value, limit = declared
            ds.add_new("PixelPaddingValue", vr, value)
            if limit is not None:
                ds.add_new("PixelPaddingRangeLimit", vr, limit)

    write(folder, stored, change=change)
    return read_folder(folder, KEEP)


def air_mask(volume: StoredVolume) -> NDArray[np.bool_]:
    """Return which voxels are −1000 HU after padding is replaced by air."""
    hu = stored_to_hu(volume.stored, volume.slope.astype(np.float32), volume.intercept.astype(np.float32))
    return np.asarray(padding_to_air(hu, volume.stored, volume.padding) == -1000)


def ramp(low: int, high: int, dtype: str, slices: int) -> Stored:
    """Return every integer in [low, high], in each slice."""
    return np.tile(np.arange(low, high + 1).astype(dtype), (slices, 2, 1))


def test_each_slice_keeps_its_own_padding_in_spatial_order(tmp_path: Path) -> None:
    # Trap 26: a value, a range in either order, none. 24 is −1000 HU; below 0 is below −1024 HU and always air.
    stored = ramp(-3000, 1000, "int16", 4)
    volume = padded(tmp_path, stored, ("SS", 77, None), ("SS", -2000, 100), ("SS", 100, 50), None)
    v = stored[0]
    for k, declared in enumerate((v == 77, (v >= -2000) & (v <= 100), (v >= 50) & (v <= 100), v == 24)):
        np.testing.assert_array_equal(air_mask(volume)[k], declared | (v < 0) | (v == 24))
    assert volume.warnings == ()


@pytest.mark.parametrize("declared", [("SS", -2000, None), ("US", 63536, None)])
def test_padding_of_signed_pixels_is_signed_under_either_vr(
    tmp_path: Path, declared: tuple[str, int, int | None]
) -> None:
    # Trap 26: 63536 is −2000, which is −950 HU under this rescale.
    def change(ds: Dataset, _: int) -> None:
        no_padding(ds, 0)
        ds.add_new("PixelPaddingValue", *declared[:2])
        ds.RescaleIntercept = "1050"

    stored = ramp(-2050, -1000, "int16", 2)
    write(tmp_path, stored, change=change)
    volume = read_folder(tmp_path)
    np.testing.assert_array_equal(air_mask(volume), (stored == -2000) | (stored == -2050))
    assert volume.warnings == ()


@pytest.mark.parametrize("declared", [("SS", -2000, None), ("US", 63536, None)])
def test_padding_of_unsigned_pixels_is_unsigned_under_either_vr(
    tmp_path: Path, declared: tuple[str, int, int | None]
) -> None:
    # Trap 26: 63536 is 62512 HU; −2000 has the same bits.
    stored = ramp(63000, 65535, "uint16", 2)
    volume = padded(tmp_path, stored, declared, declared)
    np.testing.assert_array_equal(air_mask(volume), stored == 63536)


def test_padding_has_the_sign_of_its_slice_in_a_mixed_series(tmp_path: Path) -> None:
    # The same 16 bits: 62512 HU where unsigned, −3024 HU where signed.
    stored = ramp(63000, 65535, "uint16", 2)

    def change(ds: Dataset, k: int) -> None:
        ds.PixelRepresentation = k
        ds.add_new("PixelPaddingValue", "US", 63536)

    write(tmp_path, stored, change=change)
    air = air_mask(read_folder(tmp_path, KEEP))
    np.testing.assert_array_equal(air[0], stored[0] == 63536)
    np.testing.assert_array_equal(air[1], stored[1].view(np.int16) < 0)


def test_a_series_without_declared_padding_has_none(tmp_path: Path) -> None:
    volume = padded(tmp_path, integers(-2000, 3000, "int16", (2, 16, 20)), None, None)
    assert volume.padding is None
    assert volume.warnings == ()


def test_padding_in_the_range_of_tissue_is_ignored_with_a_warning(tmp_path: Path) -> None:
    # Trap 26: 1064 is 40 HU. The first slice's 100 still counts.
    stored = ramp(25, 1500, "int16", 3)
    volume = padded(tmp_path, stored, ("SS", 100, None), ("SS", 1064, None), ("SS", 1064, None))
    expected = stored == 100
    expected[1:] = False
    np.testing.assert_array_equal(air_mask(volume), expected)
    (warning,) = volume.warnings
    assert "Pixel Padding Value 1064 " in warning
    assert " 40 HU" in warning
    assert "in 2 slices" in warning


def test_a_padding_range_that_includes_tissue_is_ignored_with_a_warning(tmp_path: Path) -> None:
    # Trap 26: 25 … 1064 would be everything up to 40 HU.
    stored = ramp(25, 1500, "int16", 2)
    volume = padded(tmp_path, stored, ("SS", -2000, 1064), ("SS", -2000, 1064))
    assert not air_mask(volume).any()
    (warning,) = volume.warnings
    assert " 40 HU" in warning  # the end of the range that is tissue, not −3024 HU


@pytest.mark.parametrize(("value", "accepted"), [(1, True), (123, True), (125, False), (4095, False), (4097, True)])
def test_padding_may_be_air_or_above_tissue(tmp_path: Path, value: int, accepted: bool) -> None:
    # −1023, −901, −899, 3071 and 3073 HU.
    stored = ramp(25 if value > 24 else 0, 5000, "int16", 2)
    volume = padded(tmp_path, stored, ("SS", value, None), ("SS", value, None))
    expected = (stored == value) & accepted | (stored == 24)
    np.testing.assert_array_equal(air_mask(volume), expected)
    assert len(volume.warnings) == (not accepted)


# Unreadable and implausible pixels


@pytest.mark.parametrize("lost", [1, 10, 640])
def test_a_truncated_file_is_rejected_by_name(tmp_path: Path, lost: int) -> None:
    # Trap 42.
    file = write(tmp_path, integers(-2000, 3000, "int16"))[1]
    os.truncate(file, file.stat().st_size - lost)
    with pytest.raises(DecodeError, match=rf"S1-0002\.dcm ends after {640 - lost} of 640 bytes.*truncated"):
        read_folder(tmp_path)


def test_a_file_that_was_truncated_after_the_scan_is_rejected_by_name(tmp_path: Path) -> None:
    file = write(tmp_path, integers(-2000, 3000, "int16"))[1]
    series = only_series(tmp_path)
    before = file.stat()
    os.truncate(file, 100)
    with pytest.raises(DecodeError, match=r"S1-0002\.dcm changed since the scan"):
        read(series)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DecodeError, match=r"S1-0002\.dcm ends after 0 of 640 bytes"):
        read(series)
    file.unlink()
    with pytest.raises(DecodeError, match=r"S1-0002\.dcm cannot be read: No such file"):
        read(series)


@pytest.mark.parametrize(
    "syntax", [*PLAIN, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian], ids=lambda uid: uid.keyword
)
def test_pixel_data_shorter_than_the_matrix_are_rejected(tmp_path: Path, syntax: UID) -> None:
    # Trap 42. Data after the pixels must not be read as pixels.
    def shorten(ds: Dataset, k: int) -> None:
        if k == 1:
            ds.PixelData = ds.PixelData[:-2]
        ds.add_new(0xFFFCFFFC, "OB", bytes(64))

    write(tmp_path, integers(-2000, 3000, "int16"), syntax, shorten)
    with pytest.raises(DecodeError, match=r"S1-0002\.dcm declares 638 bytes of pixels where 640 are needed"):
        read_folder(tmp_path)


@pytest.mark.parametrize("value", [-1000, 0, 24])
def test_a_blank_slice_next_to_images_is_rejected_by_name(tmp_path: Path, value: int) -> None:
    # Trap 42: half-written.
    stored = integers(-2000, 3000, "int16")
    stored[1] = value + 1024
    write(tmp_path, stored)
    with pytest.raises(DecodeError, match=rf"S1-0002\.dcm holds one value \({value + 1024}, {value} HU\)") as caught:
        read_folder(tmp_path)
    assert caught.value.code == "blank"
    keep = Recipe(policy="keep", padding="keep")
    volume = read(discover(tmp_path, keep.rules)[0], keep)
    np.testing.assert_array_equal(volume.stored, stored)
    assert volume.warnings == ("1 slices hold one value throughout",)


@pytest.mark.parametrize("padded", [[0], [0, 1, 2], [9], [8, 9], [0, 1, 7, 8, 9]], ids=str)
@pytest.mark.parametrize("value", [-3024, -2000, -1024, -1000])
@pytest.mark.parametrize("policy", ["fix", "strict"])
def test_slices_of_declared_padding_at_the_ends_of_a_stack_are_accepted(
    tmp_path: Path, padded: list[int], value: int, policy: Any
) -> None:
    def declare(ds: Dataset, _: int) -> None:
        ds.add_new("PixelPaddingValue", "SS", value + 1024)

    stored = integers(0, 3000, "int16", (10, 16, 20))
    stored[padded] = value + 1024
    write(tmp_path, stored, change=declare)
    recipe = Recipe(policy=policy, padding="keep")
    series = discover(tmp_path, recipe.rules)[0]
    volume = read(series, recipe)
    np.testing.assert_array_equal(volume.stored, stored)
    assert f"{len(padded)} slices hold one value throughout" in volume.warnings
    reader = SeriesReader(series, recipe)  # in slabs, last one first
    for start in (7, 4, 0):
        stop = min(start + 4, 10)
        np.testing.assert_array_equal(reader.slab(start, stop), stored[start:stop])


@pytest.mark.parametrize(
    ("padded", "value", "declared", "refused"),
    [
        ([4], -2000, -2000, 4),  # a lost image
        ([0, 4, 9], -2000, -2000, 4),
        ([0], -1000, None, 0),
        ([0], -1000, -2000, 0),
        ([9], 40, 40, 9),  # tissue is never padding
    ],
)
def test_other_blank_slices_are_rejected_whatever_padding_is_declared(
    tmp_path: Path, padded: list[int], value: int, declared: int | None, refused: int
) -> None:
    def declare(ds: Dataset, _: int) -> None:
        if declared is not None:
            ds.add_new("PixelPaddingValue", "SS", declared + 1024)

    stored = integers(0, 3000, "int16", (10, 16, 20))
    stored[padded] = value + 1024
    write(tmp_path, stored, change=declare)
    with pytest.raises(DecodeError, match=rf"S1-{10 - refused:04}\.dcm holds one value"):  # the last file is the lowest
        read_folder(tmp_path)


def test_blank_slices_within_a_padding_range_at_the_ends_are_accepted(tmp_path: Path) -> None:
    def declare(ds: Dataset, _: int) -> None:
        ds.add_new("PixelPaddingValue", "SS", -3000)
        ds.add_new("PixelPaddingRangeLimit", "SS", -1000)

    stored = integers(0, 3000, "int16", (6, 16, 20))
    stored[0], stored[5] = -2000, -1500
    write(tmp_path, stored, change=declare)
    np.testing.assert_array_equal(read(discover(tmp_path)[0], Recipe(padding="keep")).stored, stored)


def test_a_volume_of_one_value_is_read_with_a_warning(tmp_path: Path) -> None:
    write(tmp_path, np.full((3, 16, 20), 1024, dtype=np.int16))
    assert read(discover(tmp_path)[0]).warnings == ("3 slices hold one value throughout",)


@pytest.mark.parametrize("syntax", ENCAPSULATED, ids=lambda uid: uid.keyword)
@pytest.mark.parametrize(
    "damage",
    [lambda s: s[: len(s) // 4 * 2], lambda s: bytes(len(s)), lambda _: b"\0\0"],
    ids=["half", "zeros", "stub"],
)
def test_a_damaged_stream_is_rejected_with_file_name_and_syntax(
    tmp_path: Path, syntax: UID, damage: Callable[[bytes], bytes]
) -> None:
    # Traps 30, 42.
    files = write(tmp_path, integers(-2000, 3000, "int16", (3, 34, 40)))
    for k, file in enumerate(files):
        encode_file(file, syntax, damage if k == 1 else bytes)
    with pytest.raises(DecodeError) as caught:
        read_folder(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"S1-0002.dcm ({syntax.name}) cannot be decoded: ")
    assert "\n" not in text


def test_a_truncated_encoded_file_is_rejected_by_name(tmp_path: Path) -> None:
    # Trap 42.
    file = write(tmp_path, integers(-2000, 3000, "int16", (3, 34, 40)), RLELossless)[1]
    os.truncate(file, file.stat().st_size - 500)
    with pytest.raises(DecodeError, match=r"S1-0002\.dcm ends within its pixels: it is truncated") as caught:
        read_folder(tmp_path)
    assert caught.value.code == "truncated"


def jpeg_ls(pixels: NDArray[np.uint16]) -> bytes:
    return bytes(imagecodecs.jpegls_encode(pixels))


def jpeg_2000(pixels: NDArray[np.uint16]) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", reversible=True))


OTHER_MATRICES = {
    "JPEG-LS, smaller": (JPEGLSLossless, jpeg_ls, (17, 40)),
    "JPEG-LS, larger": (JPEGLSLossless, jpeg_ls, (68, 40)),
    "JPEG-LS, on its side": (JPEGLSLossless, jpeg_ls, (40, 34)),
    "JPEG 2000, on its side": (JPEG2000Lossless, jpeg_2000, (40, 34)),
    "JPEG 2000, three samples": (JPEG2000Lossless, jpeg_2000, (34, 40, 3)),
}

READ = """
import sys
from gpuprep import discover
from gpuprep.errors import DecodeError
from gpuprep.dicom.read import read
try:
    read(discover(sys.argv[1])[0])
except DecodeError as exc:
    print(exc)
"""


@pytest.mark.parametrize("case", OTHER_MATRICES)
def test_a_stream_of_another_matrix_is_rejected(tmp_path: Path, case: str) -> None:
    # Trap 42: under a header of 34 × 40. In a subprocess, because some decoders abort.
    syntax, encode, shape = OTHER_MATRICES[case]
    frame = encode(np.random.default_rng(0).integers(0, 4096, shape).astype(np.uint16))
    for k, file in enumerate(write(tmp_path, integers(-2000, 3000, "int16", (3, 34, 40)))):
        encode_file(file, syntax, (lambda _: frame) if k == 1 else bytes)
    reader = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=False)
    assert reader.returncode == 0, reader.stderr
    assert reader.stdout.startswith("S1-0002.dcm"), "read without an error"


def test_an_unknown_transfer_syntax_is_rejected_by_uid(tmp_path: Path) -> None:
    # Trap 30: a private syntax, which no decoder knows.
    def change(ds: Dataset, _: int) -> None:
        no_padding(ds, 0)

    files = write(tmp_path, integers(-2000, 3000, "int16"), change=change)
    for file in files:
        file.write_bytes(file.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.826.0.1.3680.9\0\0"))
    with pytest.raises(DecodeError, match=r"transfer syntax 1\.2\.826\.0\.1\.3680\.9 in S1-000[123]\.dcm"):
        read_folder(tmp_path)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian], ids=lambda uid: uid.keyword)
def test_a_file_without_pixels_is_rejected_by_name(tmp_path: Path, syntax: UID) -> None:
    # Trap 42.
    for k, file in enumerate(write(tmp_path, integers(-2000, 3000, "int16"), syntax)):
        if k == 1:
            ds = pydicom.dcmread(file)
            del ds.PixelData
            ds.save_as(file)
    with pytest.raises((MissingTagError, DecodeError), match=r"S1-0002\.dcm"):
        read_folder(tmp_path)


def test_control_characters_of_file_names_are_escaped_in_messages(tmp_path: Path) -> None:
    file = write(tmp_path, integers(-2000, 3000, "int16"))[1]
    os.truncate(file, file.stat().st_size - 2)
    file.rename(tmp_path / "a\n\x1b[31m")
    with pytest.raises(DecodeError, match=r"^a\\n\\x1b\[31m ends after"):
        read_folder(tmp_path)


def test_slabs_may_be_read_in_any_order(tmp_path: Path) -> None:
    # Trap 31. The statistics are those of all slices.
    stored = integers(-2000, 3000, "int16", (7, 16, 20))
    write(tmp_path, stored)
    reader = SeriesReader(only_series(tmp_path))
    for start, stop in ((5, 7), (0, 1), (1, 5)):
        np.testing.assert_array_equal(reader.slab(start, stop), stored[start:stop])
    assert reader.statistics.mean == pytest.approx(stored.mean() - 1024, rel=1e-12)
    assert (reader.statistics.low, reader.statistics.high) == (-3024, 1976)


def test_reading_does_not_depend_on_the_order_of_slices(tmp_path: Path) -> None:
    # Trap 1.
    stored = integers(-2000, 3000, "int16", (6, 16, 20))
    write(tmp_path, stored)
    series = only_series(tmp_path)
    for slices in (series.slices[::-1], series.slices[3:] + series.slices[:3]):
        np.testing.assert_array_equal(read(replace(series, slices=slices)).stored, stored)
