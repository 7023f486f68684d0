"""Tests of transfer syntaxes: supported ones give equal stored values, all others are rejected by name."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from conftest import encoded_natively, renamed
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

import gpuprep
from gpuprep.cli.doctor import COMPRESSED_SYNTAXES
from gpuprep.core.series import Series
from gpuprep.dicom.uids import ENCODINGS, NATIVE, syntax_name
from gpuprep.errors import DecodeError
from gpuprep.testing import write_series

SHAPE, SPACING_MM = (4, 11, 13), (2.5, 0.8, 0.7)
GE = "1.2.840.113619.5.2"
DEFLATED_FRAMES, UNCOMPRESSED = "1.2.840.10008.1.2.8.1", "1.2.840.10008.1.2.1.98"


@pytest.fixture
def stored(noise: Callable[..., NDArray[np.int16]]) -> NDArray[np.int16]:
    return noise(SHAPE)


def only_series(folder: Path) -> Series:
    (series,) = gpuprep.discover(folder)
    return series


# Private syntax of GE: big-endian pixels, everything else is implicit VR little endian


def write_big_endian_words(folder: Path, stored: NDArray[Any], syntax: UID = ImplicitVRLittleEndian) -> None:
    def swap(ds: Dataset, _: int) -> None:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()

    for file in write_series(folder, stored, SPACING_MM, change=swap):
        file.write_bytes(encoded_natively(pydicom.dcmread(file), syntax))
        renamed(file, GE)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_big_endian_words_in_a_little_endian_file_are_read(
    tmp_path: Path, stored: NDArray[np.int16], dtype: Any, packed: bool
) -> None:
    values = stored if dtype == np.int16 else stored.view(np.uint16) // 2
    write_big_endian_words(tmp_path, values)
    for file in sorted(tmp_path.iterdir()) if packed else []:
        file.with_suffix(".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    series = only_series(tmp_path)
    assert {s.transfer_syntax for s in series.slices} == {GE}
    assert np.array_equal(gpuprep.read(series).stored, values)
    assert gpuprep.audit(series).codes == ()


def test_the_byte_order_of_pixels_with_an_explicit_vr_is_not_guessed(tmp_path: Path, stored: NDArray[np.int16]) -> None:
    write_big_endian_words(tmp_path, stored, ExplicitVRLittleEndian)
    with pytest.raises(
        DecodeError, match=r"113619\.5\.2 \(GE Private .* order of bytes of its pixels is not known"
    ) as caught:
        gpuprep.read(only_series(tmp_path))
    assert caught.value.code == "syntax"


def test_the_byte_order_of_eight_bit_pixels_is_not_guessed(tmp_path: Path) -> None:
    def eight_bits(ds: Dataset, _: int) -> None:
        ds.BitsAllocated = ds.BitsStored = 8
        ds.HighBit = 7
        ds.PixelData = bytes(range(12)) * 11

    for file in write_series(tmp_path, np.zeros((4, 11, 12), np.int16), SPACING_MM, change=eight_bits):
        file.write_bytes(encoded_natively(pydicom.dcmread(file), ImplicitVRLittleEndian))
        renamed(file, GE)
    with pytest.raises(DecodeError, match="order of bytes") as caught:
        gpuprep.read(only_series(tmp_path))
    assert caught.value.code == "syntax"


# Uncompressed and deflated frames


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", [DEFLATED_FRAMES, UNCOMPRESSED], ids=["deflated", "uncompressed"])
def test_uncompressed_and_deflated_frames_equal_native_pixels(tmp_path: Path, syntax: str, bits: int) -> None:
    # PS3.5, 8.1.1: bits above Bits Stored are not part of the value.
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 2**bits, (4, 11, 13)).astype("u1" if bits == 8 else "<u2")
    raw = values if bits == 8 else values | (rng.integers(0, 2 ** (16 - bits), values.shape) << bits).astype("<u2")

    def encoded(k: int) -> bytes:
        data = raw[k].tobytes()
        return zlib.compress(data, wbits=-zlib.MAX_WBITS) if syntax == DEFLATED_FRAMES else data

    def change(ds: Dataset, k: int) -> None:
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = values.itemsize * 8, bits, bits - 1, 0
        ds.RescaleIntercept = 0
        ds.PixelData = encapsulate([encoded(k)])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless

    for file in write_series(tmp_path, np.zeros(SHAPE, np.uint16), SPACING_MM, change=change):
        renamed(file, syntax)
    keep = gpuprep.Recipe(policy="keep")  # accepts the whole range of 16 bits
    assert np.array_equal(gpuprep.read(only_series(tmp_path), keep).stored, values)


# Unsupported syntaxes


UNREAD = [
    *(f"1.2.840.10008.1.2.4.{n}" for n in (92, 93, 94, 95, *range(100, 109), 204, 205)),
    "1.2.840.10008.1.2.7.1", "1.2.840.10008.1.2.7.2", "1.2.840.10008.1.2.7.3",
    "1.2.840.10008.1.2.6.1", "1.2.840.10008.1.2.6.2", "1.2.840.10008.1.2.20",
    "1.2.840.10008.1.2.4.999", "1.2.276.0.1", "1.2.840.10008.5.1.4.1.1.2",
]  # fmt: skip


@pytest.mark.parametrize("syntax", UNREAD)
def test_an_unsupported_syntax_is_rejected_from_headers(tmp_path: Path, stored: NDArray[np.int16], syntax: str) -> None:
    for file in write_series(tmp_path, stored, SPACING_MM):
        renamed(file, syntax)
        if syntax.endswith((".95", ".205")):  # deflated after the meta group
            length = read_file_meta_info(file).FileMetaInformationGroupLength
            head, body = file.read_bytes()[: 144 + length], file.read_bytes()[144 + length :]
            file.write_bytes(head + zlib.compress(body, wbits=-zlib.MAX_WBITS))
    audit = gpuprep.audit(only_series(tmp_path))
    assert (audit.verdict, audit.codes) == ("rejected", ("syntax",))
    known = f" ({UID(syntax).name})" if UID(syntax).name != syntax else ""
    if "Papyrus" not in audit.reason:  # pydicom has no name for it
        assert f"transfer syntax {syntax}{known} in S1-" in audit.reason


def test_one_slice_in_an_unsupported_syntax_rejects_the_series(tmp_path: Path, stored: NDArray[np.int16]) -> None:
    files = write_series(tmp_path, stored, SPACING_MM)
    renamed(files[2], "1.2.840.10008.1.2.4.102")
    audit = gpuprep.audit(only_series(tmp_path))
    assert audit.codes == ("syntax",)
    assert "in S1-0002.dcm is not supported" in audit.reason


# Names


def test_every_supported_syntax_has_a_name() -> None:
    for uid in (*NATIVE, *ENCODINGS):
        assert syntax_name(uid) != uid or uid.rpartition(".")[2] in {str(n) for n in range(58, 70)}
    assert syntax_name("1.2.840.10008.1.2.4.110") == "JPEG XL Lossless"
    assert syntax_name("1.2.840.10008.1.2.1") == "Explicit VR Little Endian"
    assert syntax_name("1.2.3") == "1.2.3"


def test_names_are_those_of_the_standard_where_pydicom_has_them() -> None:
    for uid in map(UID, (*NATIVE, *ENCODINGS)):
        if uid.name != uid:
            assert syntax_name(uid) == uid.name


def test_doctor_examines_every_encoding() -> None:
    assert set(COMPRESSED_SYNTAXES) <= ENCODINGS.keys()
    assert {ENCODINGS[uid] for uid in COMPRESSED_SYNTAXES} == set(ENCODINGS.values())
