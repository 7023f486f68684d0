"""Tests of Pixel Data in unusual files: offset of the words, bits that hold the value, sign, and excess data."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from conftest import encoded_natively
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from scipy import ndimage
from test_sources import enhanced, wrapped

import gpuprep
from gpuprep.core.recipe import Recipe
from gpuprep.errors import IntensityError
from gpuprep.pipeline.scan import scan
from gpuprep.testing import write_series

Stored = NDArray[Any]
Change = Callable[[Dataset, int], None]

SPACING_MM = (2.5, 0.8, 0.7)


def only_series(folder: Path) -> gpuprep.Series:
    (series,) = gpuprep.discover(folder)
    return series


# Offset of the words


PIXELS = b"\xe0\x7f\x10\x00OW\0\0"
LONG_VRS = ["OB", "OD", "OF", "OL", "OV", "OW", "SV", "UC", "UN", "UR", "UT", "UV"]
"""PS3.5, 7.1.2: VRs that are followed by two reserved bytes and a length of four bytes."""


def ramp(size: int, slices: int = 3) -> NDArray[np.int16]:
    """Return slices whose values count the columns, so that a shift by one column is detected."""
    return (
        np.tile(np.arange(size, dtype=np.int16), (slices, size, 1)) + np.arange(slices, dtype=np.int16)[:, None, None]
    )


def with_pixel_vr(file: Path, vr: bytes, syntax: UID = ExplicitVRLittleEndian) -> None:
    """Rewrite a file in a native syntax, with other bytes as VR and reserved bytes of *Pixel Data*."""
    data = encoded_natively(
        pydicom.dcmread(file), ExplicitVRBigEndian if syntax == ExplicitVRBigEndian else ExplicitVRLittleEndian
    )
    old = b"\x7f\xe0\x00\x10OW\0\0" if syntax == ExplicitVRBigEndian else PIXELS
    at = data.rindex(old) + 4
    data = data[:at] + vr + data[at + 4 :]
    if syntax == DeflatedExplicitVRLittleEndian:
        meta = encoded_natively(pydicom.dcmread(file), syntax)
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
def test_pixels_begin_after_the_explicit_element_header_with_any_vr(tmp_path: Path, vr: bytes, syntax: UID) -> None:
    stored = ramp(64)
    for file in write_series(tmp_path, stored, SPACING_MM):
        with_pixel_vr(file, vr, syntax)
    np.testing.assert_array_equal(gpuprep.read(only_series(tmp_path)).stored, stored)


@pytest.mark.parametrize("vr", [b"UN\0\0", b"OF\0\0", b"OW  ", b"??\0\0"])
def test_pixels_of_a_large_matrix_begin_after_the_explicit_element_header(tmp_path: Path, vr: bytes) -> None:
    stored = ramp(512)
    for file in write_series(tmp_path, stored, SPACING_MM):
        with_pixel_vr(file, vr)
    np.testing.assert_array_equal(gpuprep.read(only_series(tmp_path)).stored, stored)


@pytest.mark.parametrize("vr", [b"US", b"SS", b"DS", b"IS"])
def test_pixels_begin_after_a_vr_with_a_short_length(tmp_path: Path, vr: bytes) -> None:
    stored = ramp(64)
    for file in write_series(tmp_path, stored, SPACING_MM):
        data = file.read_bytes()
        at = data.rindex(PIXELS)
        file.write_bytes(data[: at + 4] + vr + (64 * 64 * 2).to_bytes(2, "little") + data[at + 12 :])
        assert pydicom.dcmread(file).get_item(0x7FE00010).value == data[at + 12 :]
    np.testing.assert_array_equal(gpuprep.read(only_series(tmp_path)).stored, stored)


@pytest.mark.parametrize("size", [64, 512])
@pytest.mark.parametrize("others", [ImplicitVRLittleEndian, ExplicitVRLittleEndian], ids=lambda uid: uid.keyword)
def test_pixel_data_may_have_another_vr_encoding_than_the_data_set(tmp_path: Path, others: UID, size: int) -> None:
    stored = ramp(size)
    for file in write_series(tmp_path, stored, SPACING_MM):
        data = encoded_natively(pydicom.dcmread(file), others)
        length = (size * size * 2).to_bytes(4, "little")
        explicit, implicit = PIXELS + length, PIXELS[:4] + length
        old, new = (implicit, explicit) if others == ImplicitVRLittleEndian else (explicit, implicit)
        assert data.count(old) == 1
        file.write_bytes(data.replace(old, new))
    np.testing.assert_array_equal(gpuprep.read(only_series(tmp_path)).stored, stored)


@pytest.mark.parametrize("size", [(2, 20), (7, 11), (16, 20), (64, 64), (141, 149), (337, 62), (512, 512)])
def test_a_length_is_not_mistaken_for_a_vr(tmp_path: Path, size: tuple[int, int]) -> None:
    # 141 × 149 × 2 bytes are 0xA422, 337 × 62 × 2 are 0xA33C. First letters of VRs of pixels are odd numbers.
    stored = np.random.default_rng(0).integers(0, 3000, (3, *size)).astype(np.int16)
    for file in write_series(tmp_path, stored, SPACING_MM):
        file.write_bytes(encoded_natively(pydicom.dcmread(file), ImplicitVRLittleEndian))
    np.testing.assert_array_equal(gpuprep.read(only_series(tmp_path)).stored, stored)


@pytest.mark.parametrize("letters", ["DS", "DA", "FL", "LO", "PN", "TM"])
def test_a_length_that_spells_a_vr_is_read_as_a_length(tmp_path: Path, letters: str) -> None:
    # "DS" is 0x5344 = 21316 bytes: an implicit element of 10658 pixels.
    pixels = int.from_bytes(letters.encode(), "little") // 2
    rows = next(n for n in range(1, pixels) if pixels % n == 0 and pixels // n <= 8192)
    stored = np.random.default_rng(0).integers(0, 3000, (3, rows, pixels // rows)).astype(np.int16)
    for file in write_series(tmp_path, stored, SPACING_MM):
        file.write_bytes(encoded_natively(pydicom.dcmread(file), ImplicitVRLittleEndian))
        assert b"\xe0\x7f\x10\x00" + letters.encode() + b"\0\0" in file.read_bytes()
    np.testing.assert_array_equal(gpuprep.read(only_series(tmp_path)).stored, stored)


@pytest.mark.parametrize("vr", [b"OB\0\0", b"OW  ", b"UN\0\0", b"OF\0\x01"])
def test_encoded_pixels_begin_after_the_explicit_element_header_with_any_vr(tmp_path: Path, vr: bytes) -> None:
    stored = ramp(64)

    def encode(ds: Dataset, k: int) -> None:
        ds.file_meta.TransferSyntaxUID = JPEGLSLossless
        ds.PixelData = encapsulate([bytes(imagecodecs.jpegls_encode(stored[k].view("u2")))])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True

    for file in write_series(tmp_path, stored, SPACING_MM, change=encode):
        data = file.read_bytes()
        at = data.rindex(b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff") + 4
        file.write_bytes(data[:at] + vr + data[at + 4 :])
    np.testing.assert_array_equal(gpuprep.read(only_series(tmp_path)).stored, stored)


@pytest.mark.parametrize(
    ("keyword", "dtype", "bits"), [("FloatPixelData", "<f4", 32), ("DoubleFloatPixelData", "<f8", 64)]
)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=lambda uid: uid.keyword)
def test_float_pixels_are_rejected_by_name(tmp_path: Path, keyword: str, dtype: str, bits: int, syntax: UID) -> None:
    def change(ds: Dataset, k: int) -> None:
        del ds.PixelData
        ds.BitsAllocated = bits
        setattr(ds, keyword, np.full((16, 20), -1000.5 + k, dtype).tobytes())

    for file in write_series(tmp_path, np.zeros((3, 16, 20), np.int16), SPACING_MM, change=change):
        file.write_bytes(encoded_natively(pydicom.dcmread(file), syntax))
    cohort = gpuprep.discover(tmp_path)
    assert len(cohort) == 0
    assert len(cohort.unreadable) == 3
    name = {
        "FloatPixelData": "Float Pixel Data (7FE0,0008)",
        "DoubleFloatPixelData": "Double Float Pixel Data (7FE0,0009)",
    }
    assert all(f"its pixels are {name[keyword]}" in reason for _, reason in cohort.unreadable)


# Bits and sign of the values


NATIVE = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
SYNTAXES = [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless]
KEEP, STRICT = Recipe(policy="keep"), Recipe(policy="strict")


def body(slices: int = 6, size: int = 48, metal_hu: int = 900) -> NDArray[np.int32]:
    """Return HU of a body in air, with lungs, a spine or metal, with soft edges and noise."""
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) / (size / 2)
    hu = np.full((slices, size, size), -1000.0)
    hu[:, (x / 0.85) ** 2 + (y / 0.7) ** 2 < 1] = 40
    hu[:, ((np.abs(x) - 0.4) / 0.25) ** 2 + (y / 0.4) ** 2 < 1] = -850
    hu[:, x**2 + (y - 0.45) ** 2 < 0.03] = metal_hu
    hu = ndimage.gaussian_filter(hu, (0, 1, 1)) + np.random.default_rng(0).normal(0, 12, hu.shape)
    return np.asarray(np.clip(np.rint(hu), -1024, None), dtype=np.int32)


def chest(slices: int = 6, size: int = 96, metal_hu: int = 900, soft: float = 0, noise_hu: float = 8) -> Stored:
    """Return HU of a body in air with edges blurred by `soft` pixels; 0 gives sharp edges, far above the noise."""
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) / (size / 2)
    hu = np.full((slices, size, size), -1000.0)
    hu[:, (x / 0.85) ** 2 + (y / 0.7) ** 2 < 1] = 40
    hu[:, ((np.abs(x) - 0.4) / 0.25) ** 2 + (y / 0.4) ** 2 < 1] = -850
    hu[:, x**2 + (y - 0.4) ** 2 < 0.05] = metal_hu
    hu = ndimage.gaussian_filter(hu, (0, soft, soft)) + np.random.default_rng(0).normal(0, noise_hu, hu.shape)
    return np.asarray(np.clip(np.rint(hu), -1024, None), dtype=np.int32)


def declare(bits: int, high: int, *, signed: bool = False, intercept: int = -1024, slope: float = 1) -> Change:
    """Return a change of the attributes that describe the words."""

    def change(ds: Dataset, _: int) -> None:
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, high, int(signed)
        ds.RescaleIntercept, ds.RescaleSlope = intercept, slope
        if "PixelPaddingValue" in ds:
            del ds.PixelPaddingValue

    return change


def series_of(folder: Path, words: Stored, change: Change, syntax: UID = ExplicitVRLittleEndian) -> gpuprep.Series:
    """Write words unchanged, in a syntax that keeps all bits."""
    for file in write_series(folder, words, SPACING_MM, change=change):
        ds = pydicom.dcmread(file)
        if syntax == RLELossless:
            declared_bits = ds.BitsStored, ds.HighBit
            ds.BitsStored, ds.HighBit = 16, 15
            ds.compress(RLELossless, generate_instance_uid=False)
            ds.BitsStored, ds.HighBit = declared_bits
            ds.save_as(file, enforce_file_format=True)
        else:
            file.write_bytes(encoded_natively(ds, syntax))
    return only_series(folder)


def write_streams(
    folder: Path, encode: Callable[[int], bytes], slices: int, size: int, change: Change, syntax: UID
) -> gpuprep.Series:
    """Write code streams unchanged."""

    def set_stream(ds: Dataset, k: int) -> None:
        change(ds, k)
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = encapsulate([encode(k)])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True

    write_series(folder, np.zeros((slices, size, size), np.uint16), SPACING_MM, change=set_stream)
    return only_series(folder)


def j2k(values: Stored, bits: int = 16) -> bytes:
    return bytes(
        imagecodecs.jpeg2k_encode(
            np.ascontiguousarray(values), level=0, codecformat="j2k", reversible=True, bitspersample=bits
        )
    )


def hu_of(volume: gpuprep.StoredVolume) -> NDArray[np.float64]:
    return np.asarray(volume.stored * volume.slope[:, None, None] + volume.intercept[:, None, None])


def converted_status(series: gpuprep.Series, tmp_path: Path, policy: str = "fix") -> tuple[str, tuple[str, ...]]:
    """Return status and codes of a conversion."""
    recipe = Recipe(spacing_mm=None, size=None, window_hu=None, policy=policy)  # type: ignore[arg-type]
    (result,) = gpuprep.convert(series.folder, tmp_path / f"out-{policy}", recipe, backend="cpu").results
    return result.status, result.codes


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless], ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("signed", [True, False])
def test_values_in_the_low_bits_are_read_despite_high_bit(tmp_path: Path, syntax: UID, signed: bool) -> None:
    hu = body()
    words = hu.astype(np.int16).view(np.uint16) if signed else (hu + 1024).astype(np.uint16)
    change = declare(12, 15, signed=signed, intercept=0 if signed else -1024)
    volume = gpuprep.read(series_of(tmp_path, words, change, syntax))
    np.testing.assert_array_equal(hu_of(volume), hu)
    (note,) = volume.warnings
    assert "High Bit 15 " in note
    assert note.endswith("low bits taken")


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless], ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("high", [13, 15])
def test_values_shifted_up_to_high_bit_are_read_without_a_warning(tmp_path: Path, syntax: UID, high: int) -> None:
    hu = body()
    words = ((hu + 1024) << (high - 11)).astype(np.uint16)
    volume = gpuprep.read(series_of(tmp_path, words, declare(12, high), syntax))
    np.testing.assert_array_equal(hu_of(volume), hu)
    assert volume.warnings == ()


def test_slices_with_low_values_only_are_read_like_the_others_in_any_order(tmp_path: Path) -> None:
    # Values of 0 to 15 are plausible in both readings; one slice with larger values decides.
    values = np.random.default_rng(0).integers(0, 15, (6, 16, 20)).astype(np.uint16)
    values[4, 2:9] += 1000
    series = series_of(tmp_path, values << 4, declare(12, 15))
    np.testing.assert_array_equal(gpuprep.read(series).stored, values)
    low = series_of(tmp_path / "low", values, declare(12, 15))
    reader = gpuprep.dicom.read.SeriesReader(low)
    slabs = np.concatenate([reader.slab(k, k + 1) for k in reversed(range(6))][::-1])
    np.testing.assert_array_equal(slabs, values)
    np.testing.assert_array_equal(gpuprep.read(low).stored, values)


@pytest.mark.parametrize(
    "words",
    [
        np.random.default_rng(0).integers(0, 2**8, (4, 16, 20)) << 4,  # low and high bits are both empty
        np.random.default_rng(0).integers(0, 2**16, (4, 16, 20)),  # all bits vary
    ],
    ids=["both readings fit", "no reading fits"],
)
def test_ambiguous_bits_are_rejected_with_both_readings(tmp_path: Path, words: Stored) -> None:
    series = series_of(tmp_path / "in", words.astype(np.uint16), declare(12, 15))
    with pytest.raises(
        IntensityError, match=r"High Bit 15 .* HU; by the low bits, .* HU; it is unclear which"
    ) as caught:
        gpuprep.read(series)
    assert caught.value.code == "bits"
    assert converted_status(series, tmp_path) == ("rejected", ("bits",))
    np.testing.assert_array_equal(gpuprep.read(series, KEEP).stored, words >> 4)


def test_an_overlay_above_values_in_the_low_bits_is_dropped(tmp_path: Path) -> None:
    hu = body()
    words = (hu + 1024).astype(np.uint16)
    words[:, 10:20, 5:30] |= 0x8000
    np.testing.assert_array_equal(hu_of(gpuprep.read(series_of(tmp_path, words, declare(12, 15)))), hu)


def test_an_overlay_below_values_at_high_bit_is_dropped(tmp_path: Path) -> None:
    hu = body()
    words = ((hu + 1024) << 4).astype(np.uint16)
    words[:, 10:20, 5:30] |= 0x0003
    volume = gpuprep.read(series_of(tmp_path, words, declare(12, 15)))
    np.testing.assert_array_equal(hu_of(volume), hu)
    assert volume.warnings == ()


def test_slices_of_one_series_may_have_different_high_bits(tmp_path: Path) -> None:
    hu = body()
    words = (hu + 1024).astype(np.uint16)
    words[::2] <<= 4

    def change(ds: Dataset, k: int) -> None:
        declare(12, 15 if k % 2 == 0 else 11)(ds, k)

    np.testing.assert_array_equal(hu_of(gpuprep.read(series_of(tmp_path, words, change))), hu)


@pytest.mark.parametrize("kind", ["high bit", "sign", "beyond"])
def test_frames_of_one_file_are_read_like_single_images(tmp_path: Path, kind: str) -> None:
    hu = body(metal_hu=4500 if kind == "beyond" else 900)
    stored = hu.astype(np.int16).view(np.uint16) if kind == "sign" else (hu + 1024).astype(np.uint16)
    bits, high = {"high bit": (12, 15), "sign": (16, 15), "beyond": (12, 11)}[kind]
    files = write_series(tmp_path / "single", stored, SPACING_MM, change=declare(bits, high))
    enhanced(files, tmp_path / "multi" / "0.dcm")
    ds = pydicom.dcmread(tmp_path / "multi" / "0.dcm")
    if kind == "sign":
        ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
        ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0].RescaleIntercept = "0"
        ds.PixelData = encapsulate([j2k(h.astype(np.int16)) for h in hu])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        ds.save_as(tmp_path / "multi" / "0.dcm", enforce_file_format=True)
    volume = gpuprep.read(only_series(tmp_path / "multi"))
    np.testing.assert_array_equal(hu_of(volume), hu)
    assert len(volume.warnings) == 1


@pytest.mark.parametrize("how", ["gzip", "zip"])
def test_high_bit_is_corrected_in_gzip_and_zip_files(tmp_path: Path, how: str) -> None:
    hu = body()
    files = write_series(tmp_path / "in", (hu + 1024).astype(np.uint16), SPACING_MM, change=declare(12, 15))
    packed = wrapped(files, tmp_path / "packed", how)
    np.testing.assert_array_equal(hu_of(gpuprep.read(only_series(packed))), hu)


def test_a_wrong_high_bit_is_rejected_by_strict_and_followed_by_keep(tmp_path: Path) -> None:
    words = (body() + 1024).astype(np.uint16)
    series = series_of(tmp_path / "in", words, declare(12, 15))
    assert converted_status(series, tmp_path) == ("fixed", ("bits",))
    assert converted_status(series, tmp_path, "strict") == ("rejected", ("bits",))
    assert converted_status(series, tmp_path, "keep") == ("ok", ("bits",))
    np.testing.assert_array_equal(gpuprep.read(series, KEEP).stored, words >> 4)


@pytest.mark.parametrize(("stored", "allocated"), [(8, 8), (7, 8), (5, 8)])
def test_high_bit_is_corrected_in_words_of_eight_bits(tmp_path: Path, stored: int, allocated: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**stored, (4, 16, 20)).astype(np.uint8)
    series = series_of(tmp_path / "low", values, declare(stored, allocated - 1, slope=8))
    np.testing.assert_array_equal(gpuprep.read(series).stored, values)
    series = series_of(tmp_path / "high", values << (allocated - stored), declare(stored, allocated - 1, slope=8))
    np.testing.assert_array_equal(gpuprep.read(series).stored, values)


# Sign


@pytest.mark.parametrize("bits", [12, 16])
def test_a_signed_stream_under_an_unsigned_header_is_read_as_signed(tmp_path: Path, bits: int) -> None:
    hu = body()
    series = write_streams(
        tmp_path / "in", lambda k: j2k(hu[k].astype(np.int16), bits), 6, 48,
        declare(bits, bits - 1, intercept=0), JPEG2000Lossless,
    )  # fmt: skip
    volume = gpuprep.read(series)
    assert volume.stored.dtype == np.int16
    np.testing.assert_array_equal(hu_of(volume), hu)
    assert any(note.endswith("read as signed") for note in volume.warnings)
    assert converted_status(series, tmp_path) == ("fixed", ("sign",))
    assert converted_status(series, tmp_path, "strict") == ("rejected", ("sign",))


@pytest.mark.parametrize("bits", [12, 16])
def test_an_unsigned_stream_under_a_signed_header_is_read_with_the_plausible_sign(tmp_path: Path, bits: int) -> None:
    hu = body(metal_hu=2800)
    stored = hu + 1024 if bits == 12 else (hu + 1024) * 14  # up to 53000
    series = write_streams(
        tmp_path / "unsigned", lambda k: j2k(stored[k].astype(np.uint16), bits), 6, 48,
        declare(bits, bits - 1, signed=True), JPEG2000Lossless,
    )  # fmt: skip
    if bits == 16:
        with pytest.raises(IntensityError, match=r"signed by Pixel Representation .* unsigned"):
            gpuprep.read(series)  # 53,000 HU are no CT numbers either
    else:
        volume = gpuprep.read(series)
        np.testing.assert_array_equal(hu_of(volume), hu)
        assert any(note.endswith("read as unsigned") for note in volume.warnings)
    low = hu.clip(None, 2000)
    correct = write_streams(
        tmp_path / "signed", lambda k: j2k((low[k] & (2**bits - 1)).astype(np.uint16), bits), 6, 48,
        declare(bits, bits - 1, signed=True, intercept=0), JPEG2000Lossless,
    )  # fmt: skip
    volume = gpuprep.read(correct)
    np.testing.assert_array_equal(hu_of(volume), low)
    assert volume.warnings == ()


ENCODERS_WITHOUT_SIGN: dict[UID, Callable[[Stored], bytes]] = {
    JPEGLSLossless: lambda v: bytes(imagecodecs.jpegls_encode(v)),
    JPEGLosslessSV1: lambda v: bytes(imagecodecs.ljpeg_encode(v, bitspersample=16)),
    JPEG2000Lossless: j2k,
}


@pytest.mark.parametrize("syntax", ENCODERS_WITHOUT_SIGN, ids=lambda uid: uid.keyword)
def test_streams_without_sign_under_an_unsigned_header_are_read_as_signed_if_only_that_is_plausible(
    tmp_path: Path, syntax: UID
) -> None:
    hu = body()
    words = hu.astype(np.int16).view(np.uint16)
    change = declare(16, 15, intercept=0)
    volume = gpuprep.read(
        write_streams(tmp_path, lambda k: ENCODERS_WITHOUT_SIGN[syntax](words[k]), 6, 48, change, syntax)
    )
    np.testing.assert_array_equal(hu_of(volume), hu)
    (note,) = volume.warnings
    assert "-1024 to " in note
    assert note.endswith("read as signed")


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless], ids=lambda uid: uid.keyword)
def test_words_of_negative_numbers_under_an_unsigned_header_are_read_as_signed(tmp_path: Path, syntax: UID) -> None:
    hu = body()
    volume = gpuprep.read(
        series_of(tmp_path, hu.astype(np.int16).view(np.uint16), declare(16, 15, intercept=0), syntax)
    )
    np.testing.assert_array_equal(hu_of(volume), hu)


def test_slices_without_negative_values_are_read_like_the_others(tmp_path: Path) -> None:
    hu = body(9)
    hu[[0, 2, 4, 6]] += 1024
    change = declare(16, 15, intercept=0)
    streams = [j2k(h.astype(np.int16)) for h in hu]
    series = write_streams(tmp_path, lambda k: streams[k], 9, 48, change, JPEG2000Lossless)
    np.testing.assert_array_equal(hu_of(gpuprep.read(series)), hu)
    reader = gpuprep.dicom.read.SeriesReader(series)
    slabs = np.concatenate([reader.slab(k, k + 1) for k in reversed(range(9))][::-1])
    np.testing.assert_array_equal(slabs, hu)


def test_a_sign_that_contradicts_the_stream_is_decided_at_the_first_slice_that_needs_it(tmp_path: Path) -> None:
    # Values need the 12th bit in one slice only, which is not among those that are sampled.
    stored = np.clip(body(12) + 1024, 0, 2047)
    stored[1] = body(12, metal_hu=2500)[1] + 1024
    assert (stored > 2047).any(axis=(1, 2)).sum() == 1
    series = write_streams(
        tmp_path / "unsigned", lambda k: j2k(stored[k].astype(np.uint16), 12), 12, 48,
        declare(12, 11, signed=True), JPEG2000Lossless,
    )  # fmt: skip
    reader = gpuprep.dicom.read.SeriesReader(series)
    slabs = np.concatenate([reader.slab(k, k + 1) for k in reversed(range(12))][::-1])
    np.testing.assert_array_equal(slabs, stored)
    assert [i.code for i in reader.irregularities] == ["sign"]
    assert converted_status(series, tmp_path) == ("fixed", ("sign",))
    hu = body(12) + 1024
    hu[1] -= 1024
    correct = write_streams(
        tmp_path / "signed", lambda k: j2k(hu[k].astype(np.int16).view(np.uint16)), 12, 48,
        declare(16, 15, signed=True, intercept=0), JPEG2000Lossless,
    )  # fmt: skip
    np.testing.assert_array_equal(hu_of(gpuprep.read(correct)), hu)
    assert converted_status(correct, tmp_path / "right") == ("ok", ())


def test_negative_values_in_a_single_unsampled_slice_reject_the_series(tmp_path: Path) -> None:
    hu = body(12) + 1024
    hu[1] -= 1024  # not among the sampled slices
    series = series_of(tmp_path, hu.astype(np.int16).view(np.uint16), declare(16, 15, intercept=0))
    with pytest.raises(IntensityError, match="unsigned by Pixel Representation"):
        gpuprep.read(series)


def test_large_unsigned_values_in_a_single_unsampled_slice_reject_the_series(tmp_path: Path) -> None:
    hu = chest(12).clip(None, -1)
    hu[1] = chest(12)[1]  # not among the sampled slices
    change = declare(16, 15, signed=True, intercept=-32768)
    series = series_of(tmp_path, (hu + 32768).astype(np.uint16), change)
    with pytest.raises(IntensityError, match="signed by Pixel Representation"):
        gpuprep.read(series)


def test_unsigned_padding_becomes_signed_with_the_pixels(tmp_path: Path) -> None:
    hu = body()
    hu[:, :4, :4] = hu[:, -4:, :4] = hu[:, :4, -4:] = hu[:, -4:, -4:] = -2000

    def change(ds: Dataset, k: int) -> None:
        declare(16, 15, intercept=0)(ds, k)
        ds.add_new("PixelPaddingValue", "US", 63536)

    streams = [j2k(h.astype(np.int16)) for h in hu]
    volume = gpuprep.read(write_streams(tmp_path, lambda k: streams[k], 6, 48, change, JPEG2000Lossless))
    np.testing.assert_array_equal(hu_of(volume), hu)
    assert volume.padding is None  # below all CT numbers: air anyway


def test_unsigned_values_of_sixteen_bits_stay_unsigned(tmp_path: Path) -> None:
    # A fine rescale: 0.1 HU per step, up to 5500 HU.
    stored = ((body(metal_hu=5400) + 1024) * 10).clip(0, 65535).astype(np.uint16)
    assert stored.max() > 32768

    def change(ds: Dataset, k: int) -> None:
        declare(16, 15)(ds, k)
        ds.RescaleSlope = "0.1"

    volume = gpuprep.read(series_of(tmp_path, stored, change))
    np.testing.assert_array_equal(volume.stored, stored)
    assert volume.warnings == ()


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.keyword)
def test_unsigned_words_under_a_signed_header_are_read_as_unsigned_if_only_that_is_plausible(
    tmp_path: Path, syntax: UID
) -> None:
    hu = chest()
    change = declare(16, 15, signed=True, intercept=-32768)
    series = series_of(tmp_path / "in", (hu + 32768).astype(np.uint16), change, syntax)
    volume = gpuprep.read(series)
    assert volume.stored.dtype == np.uint16
    np.testing.assert_array_equal(hu_of(volume), hu)
    (note,) = volume.warnings
    assert note.endswith("read as unsigned")
    assert converted_status(series, tmp_path) == ("fixed", ("sign",))
    assert converted_status(series, tmp_path, "strict") == ("rejected", ("sign",))
    assert converted_status(series, tmp_path, "keep")[1] == ("sign",)


@pytest.mark.parametrize("syntax", ENCODERS_WITHOUT_SIGN, ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("kind", ["offset", "fine", "air"])
def test_streams_without_sign_are_read_with_the_other_sign_if_only_that_is_plausible(
    tmp_path: Path, kind: str, syntax: UID
) -> None:
    hu = chest(soft=1, metal_hu=2800 if kind == "fine" else 900)
    bits, signed, slope, intercept = {
        "offset": (16, True, 1, -32768),
        "fine": (16, True, 0.0625, -1024),
        "air": (12, False, 1, 0),
    }[kind]
    words = (((hu - intercept) / slope).astype(np.int64) & (2**bits - 1)).astype(np.uint16)
    change = declare(bits, bits - 1, signed=signed, intercept=intercept, slope=slope)
    series = write_streams(tmp_path, lambda k: ENCODERS_WITHOUT_SIGN[syntax](words[k]), 6, 96, change, syntax)
    np.testing.assert_array_equal(hu_of(gpuprep.read(series)), hu)


@pytest.mark.parametrize("intercept", [-1024, -1000])
@pytest.mark.parametrize(("bits", "slope"), [(16, 0.0625), (16, 0.125), (8, 16)])
def test_bone_that_would_be_below_air_by_a_signed_header_is_read_as_unsigned(
    tmp_path: Path, bits: int, slope: float, intercept: int
) -> None:
    bits_of_hu = round(2**bits * slope)
    hu = chest(10, metal_hu=min(round(0.8 * bits_of_hu), 6000) + intercept, soft=1)
    stored = np.rint((hu.clip(intercept) - intercept) / slope).astype(np.int64)
    assert 2 ** (bits - 1) < stored.max() < 2**bits

    def change(ds: Dataset, k: int) -> None:
        declare(bits, bits - 1, signed=True, intercept=intercept, slope=slope)(ds, k)

    words = stored.astype(np.uint8 if bits == 8 else np.uint16)
    series = series_of(tmp_path / "in", words, change)
    np.testing.assert_array_equal(gpuprep.read(series).stored, stored)
    assert converted_status(series, tmp_path) == ("fixed", ("sign",))


def test_sharp_bone_below_air_is_rejected_if_neighbours_are_inconclusive(tmp_path: Path) -> None:
    # Bone differs from lung by 2690 HU if unsigned, and by 1406 HU if signed: both are too much for neighbours.
    hu = chest(metal_hu=40)
    hu[:, 38:58, 24:34] += 1840 + 850  # within a lung
    stored = (hu + 1024) * 16
    change = declare(16, 15, signed=True, slope=0.0625)
    series = series_of(tmp_path / "in", stored.astype(np.uint16), change)
    with pytest.raises(IntensityError, match=r"HU or -10\d\d to \d+ HU; it is unclear which") as caught:
        gpuprep.read(series)
    assert caught.value.code == "sign"
    np.testing.assert_array_equal(gpuprep.read(series, KEEP).stored, stored.astype(np.uint16).view(np.int16))


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("bits", [12, 13, 16])
def test_air_under_an_unsigned_header_without_room_for_air_is_read_as_signed(
    tmp_path: Path, bits: int, syntax: UID
) -> None:
    hu = chest()
    series = series_of(
        tmp_path / "in", (hu & (2**bits - 1)).astype(np.uint16), declare(bits, bits - 1, intercept=0), syntax
    )
    volume = gpuprep.read(series)
    assert volume.stored.dtype == np.int16
    np.testing.assert_array_equal(hu_of(volume), hu)
    assert converted_status(series, tmp_path) == ("fixed", ("sign",))
    assert converted_status(series, tmp_path, "strict") == ("rejected", ("sign",))


def test_air_in_words_of_eight_bits_is_read_as_signed(tmp_path: Path) -> None:
    stored = chest() // 16
    change = declare(8, 7, intercept=0, slope=16)
    series = series_of(tmp_path, (stored & 0xFF).astype(np.uint8), change)
    np.testing.assert_array_equal(gpuprep.read(series).stored, stored)


def test_air_that_neighbours_do_not_confirm_gives_a_warning(tmp_path: Path) -> None:
    # −1000 HU differs from soft tissue (40 HU) by 1040 HU; read as unsigned (1048 HU), it differs by 1008 HU.
    words = ((chest() // 8) & 0xFF).astype(np.uint8)
    series = series_of(tmp_path / "in", words, declare(8, 7, intercept=0, slope=8))
    np.testing.assert_array_equal(gpuprep.read(series).stored, words)
    assert converted_status(series, tmp_path) == ("ok", ("sign",))


def test_a_sign_with_too_little_evidence_is_rejected(tmp_path: Path) -> None:
    hu = chest(2, size=24)  # too few pairs of neighbours
    series = series_of(tmp_path, (hu & 0xFFF).astype(np.uint16), declare(12, 11, intercept=0))
    with pytest.raises(IntensityError, match=r"HU or -10\d\d to \d+ HU; it is unclear which"):
        gpuprep.read(series)


@pytest.mark.parametrize("metal_hu", [2000, 3120, 3500])
@pytest.mark.parametrize("soft", [0.7, 1])
def test_unsigned_values_without_air_stay_unsigned(tmp_path: Path, soft: float, metal_hu: int) -> None:
    # Metal and bone, without values below 0 HU.
    hu = chest(metal_hu=metal_hu, soft=soft).clip(0)
    volume = gpuprep.read(series_of(tmp_path, hu.astype(np.uint16), declare(12, 11, intercept=0)))
    np.testing.assert_array_equal(hu_of(volume), hu)
    assert volume.warnings == ()


def fill(stored: Stored, value: int) -> Stored:
    """Return stored values with fill around a circle and in part of it."""
    size = stored.shape[1]
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    stored[:, x**2 + y**2 > (size / 2) ** 2] = value
    stored[:, : size // 5] = value
    return stored


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("value", [-2000, -32768])
@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (1, 0), (0.0625, -1024), (1, -8192)])
def test_fill_in_signed_words_keeps_its_sign(
    tmp_path: Path, value: int, slope: float, intercept: int, declared: bool
) -> None:
    stored = np.rint((chest() - intercept) / slope).astype(np.int32)
    stored = fill(stored.clip(None, 32767), value)

    def change(ds: Dataset, k: int) -> None:
        declare(16, 15, signed=True, intercept=intercept, slope=slope)(ds, k)
        if declared:
            ds.add_new("PixelPaddingValue", "SS", value)

    volume = gpuprep.read(series_of(tmp_path, stored.astype(np.int16).view(np.uint16), change))
    np.testing.assert_array_equal(volume.stored, stored)
    assert volume.warnings == ()


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (1, 0), (0.0625, -1024), (1, -8192)])
@pytest.mark.parametrize("noise", [0, 15, 300])
def test_noise_around_zero_keeps_its_sign(tmp_path: Path, slope: float, intercept: int, noise: int) -> None:
    stored = np.rint(np.random.default_rng(0).normal(0, noise, (6, 48, 48))).astype(np.int16)
    change = declare(16, 15, signed=True, intercept=intercept, slope=slope)
    volume = gpuprep.read(series_of(tmp_path, stored.view(np.uint16), change))
    np.testing.assert_array_equal(volume.stored, stored)
    assert [note for note in volume.warnings if "hold one value" not in note] == []


@pytest.mark.parametrize("metal", [3071, 32767])
@pytest.mark.parametrize("intercept", [0, -1024])
def test_saturated_metal_in_signed_words_stays_positive(tmp_path: Path, metal: int, intercept: int) -> None:
    stored = chest() - intercept
    stored[2:4, 40:44, 40:44] = metal
    change = declare(16, 15, signed=True, intercept=intercept)
    volume = gpuprep.read(series_of(tmp_path, stored.astype(np.int16).view(np.uint16), change))
    np.testing.assert_array_equal(volume.stored, stored)
    assert not any("Pixel Representation" in note for note in volume.warnings)


@pytest.mark.parametrize("slices", [[2, 3], [0, 1, 2, 3, 4, 5], [1]])
@pytest.mark.parametrize("intercept", [-1024, 0])
def test_metal_saturated_at_the_largest_unsigned_word_stays_positive(
    tmp_path: Path, slices: list[int], intercept: int
) -> None:
    stored = chest(6).clip(intercept) - intercept
    stored[slices, 40:46, 40:46] = 65535
    series = series_of(tmp_path / "in", stored.astype(np.uint16), declare(16, 15, intercept=intercept))
    volume = gpuprep.read(series)
    np.testing.assert_array_equal(volume.stored, stored)
    (note,) = volume.warnings
    assert f"HU of {36 * len(slices)} voxels are above 30000" in note
    assert converted_status(series, tmp_path) == ("ok", ("hu-range",))


# Values beyond Bits Stored


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless], ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("signed", [True, False])
def test_values_beyond_bits_stored_that_continue_the_image_are_kept(tmp_path: Path, syntax: UID, signed: bool) -> None:
    hu = body(metal_hu=4500)
    words = hu.astype(np.int16).view(np.uint16) if signed else (hu + 1024).astype(np.uint16)
    change = declare(12, 11, signed=signed, intercept=0 if signed else -1024)
    volume = gpuprep.read(series_of(tmp_path, words, change, syntax))
    assert hu.max() > 4095
    np.testing.assert_array_equal(hu_of(volume), hu)
    (note,) = volume.warnings
    assert "12 bits stored" in note
    assert note.endswith("whole words taken")


@pytest.mark.parametrize("syntax", ENCODERS_WITHOUT_SIGN, ids=lambda uid: uid.keyword)
def test_streams_with_values_beyond_bits_stored_are_read_with_all_bits(tmp_path: Path, syntax: UID) -> None:
    hu = body(metal_hu=4500)
    words = (hu + 1024).astype(np.uint16)
    series = write_streams(
        tmp_path / "in", lambda k: ENCODERS_WITHOUT_SIGN[syntax](words[k]), 6, 48, declare(12, 11), syntax
    )
    np.testing.assert_array_equal(hu_of(gpuprep.read(series)), hu)
    assert converted_status(series, tmp_path) == ("fixed", ("bits",))
    assert converted_status(series, tmp_path, "strict") == ("rejected", ("bits",))


def test_values_beyond_bits_stored_in_one_slice_do_not_change_the_others(tmp_path: Path) -> None:
    hu = body(12)
    hu[7] = body(12, metal_hu=4500)[7]
    series = series_of(tmp_path, (hu + 1024).astype(np.uint16), declare(12, 11))
    reader = gpuprep.dicom.read.SeriesReader(series)
    slabs = np.concatenate([reader.slab(k, k + 1) for k in reversed(range(12))][::-1])
    np.testing.assert_array_equal(slabs - 1024.0, hu)
    np.testing.assert_array_equal(hu_of(gpuprep.read(series)), hu)


@pytest.mark.parametrize("bit", [12, 15])
def test_an_undeclared_overlay_is_dropped_with_a_warning(tmp_path: Path, bit: int) -> None:
    hu = body()
    words = (hu + 1024).astype(np.uint16)
    words[:, 5:9, 5:30] |= 1 << bit
    words[:, 20:40, 22] |= 1 << bit
    series = series_of(tmp_path / "in", words, declare(12, 11))
    volume = gpuprep.read(series)
    np.testing.assert_array_equal(hu_of(volume), hu)
    (note,) = volume.warnings
    assert "as an overlay: they are dropped" in note
    assert converted_status(series, tmp_path) == ("ok", ("bits",))


def test_a_declared_overlay_is_dropped_even_along_edges(tmp_path: Path) -> None:
    hu = body()
    words = (hu + 1024).astype(np.uint16)
    words[hu > -400] |= 1 << 12  # a filled outline, with the edges of the body

    def change(ds: Dataset, k: int) -> None:
        declare(12, 11)(ds, k)
        ds.add_new(0x60000100, "US", 16)
        ds.add_new(0x60000102, "US", 12)

    volume = gpuprep.read(series_of(tmp_path, words, change))
    np.testing.assert_array_equal(hu_of(volume), hu)
    assert volume.warnings == ()


REGIONS: dict[str, Callable[[Stored], Stored]] = {
    "outline": lambda hu: (hu > -400) ^ np.roll(hu > -400, 1, 2),
    "body": lambda hu: hu > -400,
    "lung": lambda hu: (hu > -900) & (hu < -600),
    "bone": lambda hu: hu > 300,
}


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("region", REGIONS)
def test_an_undeclared_overlay_along_edges_of_tissue_is_dropped_with_a_warning(
    tmp_path: Path, region: str, syntax: UID
) -> None:
    hu = chest(12)
    words = (hu + 1024).astype(np.uint16)
    words[REGIONS[region](hu)] |= 1 << 12
    series = series_of(tmp_path / "in", words, declare(12, 11), syntax)
    volume = gpuprep.read(series)
    np.testing.assert_array_equal(hu_of(volume), hu)
    (note,) = volume.warnings
    assert "as an overlay: they are dropped" in note
    assert converted_status(series, tmp_path) == ("ok", ("bits",))


@pytest.mark.parametrize("planes", [[12], [13], [14], [15], [12, 13], [12, 14, 15]])
def test_undeclared_overlays_in_any_bits_are_dropped(tmp_path: Path, planes: list[int]) -> None:
    hu = chest(12)
    words = (hu + 1024).astype(np.uint16)
    for n, plane in enumerate(planes):
        words[list(REGIONS.values())[n](hu)] |= 1 << plane
    np.testing.assert_array_equal(hu_of(gpuprep.read(series_of(tmp_path, words, declare(12, 11)))), hu)


@pytest.mark.parametrize("extended", [True, False])
def test_an_undeclared_overlay_on_signed_values_is_dropped(tmp_path: Path, extended: bool) -> None:
    hu = chest(12)
    words = (hu & (0xFFFF if extended else 0xFFF)).astype(np.uint16)
    words[hu > 300] |= 1 << 12
    change = declare(12, 11, signed=True, intercept=0)
    volume = gpuprep.read(series_of(tmp_path, words, change))
    np.testing.assert_array_equal(hu_of(volume), hu)
    (note,) = volume.warnings
    assert "as an overlay: they are dropped" in note


def test_bits_along_edges_of_one_slice_are_rejected_as_they_may_be_sharp_metal(tmp_path: Path) -> None:
    hu = chest(8)
    words = (hu + 1024).astype(np.uint16)
    words[3][hu[3] > 300] |= 1 << 12
    series = series_of(tmp_path / "in", words, declare(12, 11))
    with pytest.raises(
        IntensityError, match=r"without the bits beyond, .*, with them .*; it is unclear which"
    ) as caught:
        gpuprep.read(series)
    assert caught.value.code == "bits"
    assert converted_status(series, tmp_path) == ("rejected", ("bits",))
    np.testing.assert_array_equal(hu_of(gpuprep.read(series, KEEP)), hu)


@pytest.mark.parametrize("metal_hu", [3500, 6000, 20000])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("soft", [0.7, 1])
def test_metal_beyond_bits_stored_with_blurred_edges_is_kept(
    tmp_path: Path, soft: float, signed: bool, metal_hu: int
) -> None:
    hu = chest(metal_hu=metal_hu, soft=soft, noise_hu=20)
    words = hu.astype(np.int16).view(np.uint16) if signed else (hu + 1024).astype(np.uint16)
    change = declare(12, 11, signed=signed, intercept=0 if signed else -1024)
    volume = gpuprep.read(series_of(tmp_path, words, change))
    np.testing.assert_array_equal(hu_of(volume), hu)


def test_sharp_metal_beyond_bits_stored_in_sign_extended_words_is_kept(tmp_path: Path) -> None:
    hu = chest(12, metal_hu=3000)
    series = series_of(tmp_path, hu.astype(np.int16).view(np.uint16), declare(12, 11, signed=True, intercept=0))
    np.testing.assert_array_equal(hu_of(gpuprep.read(series)), hu)


@pytest.mark.parametrize("signed", [True, False])
def test_declared_padding_beyond_bits_stored_is_padding(tmp_path: Path, signed: bool) -> None:
    hu = body()
    stored = hu if signed else hu + 1024
    fill = -3000 if signed else 5000
    stored[:, :6, :6] = stored[:, -6:, :6] = stored[:, 20:30, 20:30] = fill

    def change(ds: Dataset, k: int) -> None:
        declare(12, 11, signed=signed, intercept=0 if signed else -1024)(ds, k)
        ds.add_new("PixelPaddingValue", "SS" if signed else "US", fill)

    words = stored.astype(np.int16).view(np.uint16)
    volume = gpuprep.read(series_of(tmp_path, words, change))
    np.testing.assert_array_equal(volume.stored, stored)
    assert volume.warnings == ()


def test_negative_words_under_an_unsigned_header_of_twelve_bits_are_rejected_with_both_readings(tmp_path: Path) -> None:
    hu = body()
    series = series_of(tmp_path, hu.astype(np.int16).view(np.uint16), declare(12, 11, intercept=0))
    with pytest.raises(IntensityError, match=r"0 to 4095 HU without .*, -10\d\d to \d+ HU as signed") as caught:
        gpuprep.read(series)
    assert caught.value.code == "sign"
    np.testing.assert_array_equal(gpuprep.read(series, KEEP).stored, hu & 0xFFF)


def test_signed_values_of_twelve_bits_without_sign_extension_keep_their_sign(tmp_path: Path) -> None:
    hu = body()
    words = (hu & 0xFFF).astype(np.uint16)
    volume = gpuprep.read(series_of(tmp_path, words, declare(12, 11, signed=True, intercept=0)))
    np.testing.assert_array_equal(hu_of(volume), hu)
    assert volume.warnings == ()


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("bits", [10, 12, 13])
def test_signed_values_with_sharp_edges_need_no_sign_extension(tmp_path: Path, syntax: UID, bits: int) -> None:
    slope = 4 if bits == 10 else 1
    stored = chest() // slope
    words = (stored & (2**bits - 1)).astype(np.uint16)
    change = declare(bits, bits - 1, signed=True, intercept=0, slope=slope)
    volume = gpuprep.read(series_of(tmp_path, words, change, syntax))
    np.testing.assert_array_equal(volume.stored, stored)
    assert volume.warnings == ()


@pytest.mark.parametrize("how", ["frames", "gzip", "zip"])
@pytest.mark.parametrize("kind", ["nothing above", "overlay", "offset", "air"])
def test_sharp_edges_are_read_correctly_in_multi_frame_gzip_and_zip_files(tmp_path: Path, kind: str, how: str) -> None:
    hu = chest(12)
    bits, signed, intercept, words = {
        "nothing above": (12, True, 0, hu & 0xFFF),
        "overlay": (12, False, -1024, (hu + 1024) | np.where(hu > 300, 1 << 12, 0)),
        "offset": (16, True, -32768, hu + 32768),
        "air": (12, False, 0, hu & 0xFFF),
    }[kind]
    change = declare(bits, bits - 1, signed=signed, intercept=intercept)
    files = write_series(tmp_path / "in", words.astype(np.uint16), SPACING_MM, change=change)
    if how == "frames":
        enhanced(files, tmp_path / "out" / "0.dcm")
        ds = pydicom.dcmread(tmp_path / "out" / "0.dcm")
        ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0].RescaleIntercept = str(intercept)
        ds.save_as(tmp_path / "out" / "0.dcm")
    else:
        wrapped(files, tmp_path / "out", how)
    volume = gpuprep.read(only_series(tmp_path / "out"))
    np.testing.assert_array_equal(hu_of(volume), hu)
    assert len(volume.warnings) == (kind != "nothing above")


@pytest.mark.parametrize("noise_hu", [0, 40])
@pytest.mark.parametrize("size", [24, 96])
def test_small_or_noisy_signed_images_need_no_sign_extension(tmp_path: Path, size: int, noise_hu: float) -> None:
    hu = chest(size=size, noise_hu=noise_hu)
    words = (hu & 0xFFF).astype(np.uint16)
    series = series_of(tmp_path / "in", words, declare(12, 11, signed=True, intercept=0))
    np.testing.assert_array_equal(hu_of(gpuprep.read(series)), hu)
    for policy in ("fix", "strict", "keep"):
        assert converted_status(series, tmp_path, policy) == ("ok", ())


def test_noise_in_signed_words_without_sign_extension_is_read_as_declared(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-2048, 2048, (6, 32, 32))
    series = series_of(tmp_path, (values & 0xFFF).astype(np.uint16), declare(12, 11, signed=True, intercept=0))
    np.testing.assert_array_equal(gpuprep.read(series).stored, values)


@pytest.mark.parametrize("metal_hu", [1500, 2500])
@pytest.mark.parametrize("soft", [0, 1])
@pytest.mark.parametrize("intercept", [-1024, -1000])
def test_sharp_bone_of_unsigned_values_under_a_signed_header_does_not_wrap(
    tmp_path: Path, soft: float, metal_hu: int, intercept: int
) -> None:
    # By the header, it would be below air, like fill.
    hu = chest(metal_hu=metal_hu, soft=soft).clip(intercept)
    change = declare(12, 11, signed=True, intercept=intercept)
    series = series_of(tmp_path / "in", (hu - intercept).astype(np.uint16), change)
    np.testing.assert_array_equal(hu_of(gpuprep.read(series)), hu)
    assert converted_status(series, tmp_path) == ("fixed", ("bits",))


def test_fill_without_sign_extension_keeps_its_sign(tmp_path: Path) -> None:
    stored = chest() + 1024
    stored[:, :20] = stored[:, :, :9] = -2000
    series = series_of(tmp_path, (stored & 0xFFF).astype(np.uint16), declare(12, 11, signed=True))
    volume = gpuprep.read(series)
    np.testing.assert_array_equal(volume.stored, stored)
    assert volume.warnings == ()


def test_unsigned_values_under_a_signed_header_of_twelve_bits_do_not_wrap(tmp_path: Path) -> None:
    hu = body(metal_hu=2500)
    series = series_of(tmp_path, (hu + 1024).astype(np.uint16), declare(12, 11, signed=True))
    np.testing.assert_array_equal(hu_of(gpuprep.read(series)), hu)


# Modality LUTs, material maps and excess data


def verdicts(folder: Path, out: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Return verdicts and codes of a scan, after comparing them with those of a conversion."""
    recipe = Recipe(spacing_mm=None, size=None, window_hu=None)
    scanned: list[tuple[str, tuple[str, ...]]] = [
        (o.audit.verdict, o.audit.codes) for o in scan(folder, recipe).planned if o.audit
    ]
    converted = gpuprep.convert(folder, out, recipe, backend="cpu").results
    assert [(r.status, r.codes) for r in converted] == scanned
    return scanned


def with_lut(ds: Dataset, *, rescale: bool) -> None:
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [4096, 0, 16], "HU", list(range(4096))
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    ds.ModalityLUTSequence = [table]
    if not rescale:
        del ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType


@pytest.mark.parametrize("assumed", [False, True])
@pytest.mark.parametrize("first", [0, 2])
def test_a_modality_lut_instead_of_a_rescale_is_rejected(tmp_path: Path, first: int, assumed: bool) -> None:
    def change(ds: Dataset, k: int) -> None:
        if k >= first:
            with_lut(ds, rescale=False)

    write_series(tmp_path, ramp(32), SPACING_MM, change=change)
    with pytest.raises(IntensityError, match="Modality LUT Sequence in place of Rescale Slope") as caught:
        gpuprep.read(only_series(tmp_path), Recipe(assume_hu=assumed))
    assert caught.value.code == "rescale"


def test_a_modality_lut_beside_a_rescale_gives_a_warning(tmp_path: Path) -> None:
    write_series(tmp_path / "in", ramp(32), SPACING_MM, change=lambda ds, _: with_lut(ds, rescale=True))
    assert verdicts(tmp_path / "in", tmp_path / "out") == [("ok", ("modality-lut",))]
    np.testing.assert_array_equal(gpuprep.read(only_series(tmp_path / "in")).stored, ramp(32))


def test_an_empty_modality_lut_sequence_is_ignored(tmp_path: Path) -> None:
    def change(ds: Dataset, _: int) -> None:
        ds.ModalityLUTSequence = []

    write_series(tmp_path / "in", ramp(32), SPACING_MM, change=change)
    assert verdicts(tmp_path / "in", tmp_path / "out") == [("ok", ())]


def with_material_maps(kind: str) -> Change:
    """Return a change that makes every other image a material map at the position of an image in HU."""

    def change(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [0, 0, 2.5 * (k // 2)]
        if k % 2 and kind in ("Z_EFF", "ED", "MGML"):
            ds.RescaleType, ds.RescaleSlope, ds.RescaleIntercept = kind, "0.01", "0"
        elif k % 2:
            ds.ImageType = ["DERIVED", "PRIMARY", "AXIAL", kind]
            ds.RescaleSlope, ds.RescaleIntercept = "0.01", "0"
            if kind == "MAT_SPECIFIC":
                del ds.RescaleType

    return change


@pytest.mark.parametrize("kind", ["Z_EFF", "ED", "MGML", "EFF_ATOMIC_NUM", "ELECTRON_DENSITY", "MAT_SPECIFIC"])
def test_material_maps_beside_images_in_hu_are_left_out(tmp_path: Path, kind: str) -> None:
    stored = np.random.default_rng(0).integers(0, 2000, (8, 20, 24)).astype(np.int16)
    write_series(tmp_path / "in", stored, SPACING_MM, change=with_material_maps(kind))
    assert verdicts(tmp_path / "in", tmp_path / "out") == [("fixed", ("left-out",))]
    series = only_series(tmp_path / "in")
    assert [why for _, why in series.left_out] == ["material map"] * 4
    np.testing.assert_array_equal(gpuprep.read(series).stored, stored[::2])


@pytest.mark.parametrize("kind", ["Z_EFF", "MAT_FRACTIONAL"])
def test_a_series_of_material_maps_is_rejected(tmp_path: Path, kind: str) -> None:
    def change(ds: Dataset, _: int) -> None:
        if kind == "Z_EFF":
            ds.RescaleType = kind
        else:
            ds.ImageType = ["DERIVED", "PRIMARY", "AXIAL", kind]

    write_series(tmp_path / "in", ramp(32), SPACING_MM, change=change)
    assert verdicts(tmp_path / "in", tmp_path / "out") == [("rejected", ("rescale-type",))]


@pytest.mark.parametrize("own", ["RescaleType", "FrameType"])
def test_material_maps_among_the_frames_of_a_file_are_left_out(tmp_path: Path, own: str) -> None:
    stored = np.random.default_rng(0).integers(0, 2000, (6, 20, 24)).astype(np.int16)
    enhanced(write_series(tmp_path / "single", stored, SPACING_MM), tmp_path / "multi" / "0.dcm")
    ds = pydicom.dcmread(tmp_path / "multi" / "0.dcm")
    for n, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        if n >= 4:
            group.PlanePositionSequence = ds.PerFrameFunctionalGroupsSequence[n - 4].PlanePositionSequence
            item = Dataset()
            if own == "RescaleType":
                item.RescaleSlope, item.RescaleIntercept, item.RescaleType = "0.1", "0", "Z_EFF"
                group.PixelValueTransformationSequence = [item]
            else:
                item.FrameType = ["DERIVED", "PRIMARY", "VOLUME", "EFF_ATOMIC_NUM"]
                group.CTImageFrameTypeSequence = [item]
    ds.save_as(tmp_path / "multi" / "0.dcm")
    series = only_series(tmp_path / "multi")
    assert [why for _, why in series.left_out] == ["material map"] * 2
    np.testing.assert_array_equal(gpuprep.read(series).stored, stored[:4])


@pytest.mark.parametrize(("more", "codes"), [(0, ()), (2, ()), (640, ("excess",))])
@pytest.mark.parametrize("syntax", NATIVE, ids=lambda uid: uid.keyword)
def test_undeclared_pixels_after_a_single_frame_give_a_warning(
    tmp_path: Path, more: int, codes: tuple[str, ...], syntax: UID
) -> None:
    stored = ramp(20)[:, :16]

    def change(ds: Dataset, _: int) -> None:
        ds.PixelData += bytes(more)

    for file in write_series(tmp_path / "in", stored, SPACING_MM, change=change):
        ds = pydicom.dcmread(file)
        file.write_bytes(encoded_natively(ds, syntax))
    assert verdicts(tmp_path / "in", tmp_path / "out") == [("ok", codes)]
    np.testing.assert_array_equal(gpuprep.read(only_series(tmp_path / "in")).stored, stored)


def test_an_undeclared_frame_in_a_multi_frame_file_gives_a_warning(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 2000, (6, 20, 24)).astype(np.int16)
    enhanced(write_series(tmp_path / "single", stored, SPACING_MM), tmp_path / "multi" / "0.dcm")
    assert verdicts(tmp_path / "multi", tmp_path / "out") == [("ok", ())]
    ds = pydicom.dcmread(tmp_path / "multi" / "0.dcm")
    ds.PixelData += stored[0].tobytes()
    ds.save_as(tmp_path / "multi" / "0.dcm")
    assert verdicts(tmp_path / "multi", tmp_path / "again") == [("ok", ("excess",))]


@pytest.mark.parametrize("syntax", ENCODERS_WITHOUT_SIGN, ids=lambda uid: uid.keyword)
def test_an_undeclared_encoded_frame_gives_a_warning_and_is_not_read(tmp_path: Path, syntax: UID) -> None:
    hu = body(3)
    words = (hu + 1024).astype(np.uint16)

    def change(ds: Dataset, k: int) -> None:
        declare(12, 11)(ds, k)
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = encapsulate(
            [ENCODERS_WITHOUT_SIGN[syntax](v) for v in (words[k], words[k] + 100)[: 1 + (k == 1)]], has_bot=False
        )
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True

    write_series(tmp_path / "in", words, SPACING_MM, change=change)
    series = only_series(tmp_path / "in")
    volume = gpuprep.read(series)
    np.testing.assert_array_equal(hu_of(volume), hu)
    assert [note for note in volume.warnings if "more encoded images than frames in 1 files, 2 in S1-0002.dcm" in note]


def test_an_impossible_high_bit_gives_a_warning(tmp_path: Path) -> None:
    write_series(tmp_path / "in", (body(4) + 1024).astype(np.uint16), SPACING_MM, change=declare(12, 7))
    assert verdicts(tmp_path / "in", tmp_path / "out") == [("ok", ("bits",))]
    np.testing.assert_array_equal(hu_of(gpuprep.read(only_series(tmp_path / "in"))), body(4))
