"""Tests of headers whose values violate their VR: they are read correctly, or not at all."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

import gpuprep
from gpuprep.core.series import Image, Series
from gpuprep.dicom.headers import read_headers
from gpuprep.dicom.odd_numbers import with_points
from gpuprep.errors import InputError, IntensityError
from gpuprep.testing import write_series

SPACING_MM = (2.5, 0.8, 0.7)
STORED = np.random.default_rng(0).integers(0, 3000, (4, 12, 14)).astype(np.int16)


def only_series(folder: Path) -> Series:
    (series,) = gpuprep.discover(folder)
    return series


# Rescale Type


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("US", "US"),
        ("HU_MOD", "HU_MOD"),
        ("Z_EFF", "Z_EFF"),
        ("PCT", "PCT"),
        ("DENSITY", "DENSITY"),
        ("HUMAN", "HUMAN"),
        ("Hounsfield Ward", "another"),
        ("Hunt^Hugh", "another"),
        ("HUANG LI", "another"),
        ("Hughes", "another"),
        ("A" * 17, "another"),
    ],
)
def test_another_rescale_type_is_rejected_and_named_only_if_it_is_a_code(tmp_path: Path, word: str, named: str) -> None:
    def change(ds: Dataset, _: int) -> None:
        ds.RescaleType = word

    write_series(tmp_path, STORED, SPACING_MM, change=change)
    with pytest.raises(IntensityError) as caught:
        gpuprep.read(only_series(tmp_path))
    assert caught.value.code == "rescale-type"
    assert f"; the type is {named}; --assume-hu" in str(caught.value)
    assert named == word or word not in str(caught.value)


# Binary numbers instead of text, and text instead of binary numbers


STRUCT_FORMATS = {"FD": "d", "FL": "f", "SL": "i", "SS": "h", "SV": "q", "UL": "I", "US": "H", "UV": "Q"}
LONG_VRS = {"SV", "UV", "UN"}
"""PS3.5, 7.1.2: VRs with a length field of four bytes."""


def rewrite_element(file: Path, keyword: str, vr: str, value: bytes, order: str = "<") -> None:
    """Write an element into a file byte for byte, replacing the existing one if there is one."""
    big = order == ">"
    ds = pydicom.dcmread(file)
    plain = Dataset()
    for element in ds:
        if element.keyword != keyword:
            plain.add(element)
    if big:
        plain.PixelData = np.frombuffer(plain.PixelData, "<u2").astype(">u2").tobytes()
    tag = tag_for_keyword(keyword)
    assert tag is not None
    before, after = (Dataset() for _ in range(2))
    for element in plain:
        (before if element.tag < tag else after).add(element)
    written = []
    for part in (before, after):
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, part, implicit_vr=False, little_endian=not big)
        written.append(buffer.getvalue())
    length = struct.pack(order + ("2xI" if vr in LONG_VRS else "H"), len(value))
    new = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF) + vr.encode() + length + value
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian if big else ExplicitVRLittleEndian
    head = DicomBytesIO()
    write_file_meta_info(head, ds.file_meta)
    file.write_bytes(bytes(128) + b"DICM" + head.getvalue() + written[0] + new + written[1])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_series(tmp_path, STORED[:1], SPACING_MM)[0]


def image(file: Path) -> Image:
    (contents,) = read_headers([str(file)])
    assert not contents.unreadable
    (only_series,) = contents.images
    return only_series


def struct_packed(vr: str, order: str, *values: float) -> bytes:
    return struct.pack(
        f"{order}{len(values)}{STRUCT_FORMATS[vr]}", *(v if vr in ("FD", "FL") else int(v) for v in values)
    )


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("vr", STRUCT_FORMATS)
def test_binary_numbers_in_place_of_decimals_are_exact(file: Path, vr: str, order: str) -> None:
    signed = vr not in ("UL", "US", "UV")
    position = (-120.5, 33.25, 10.0) if vr in ("FD", "FL") else (-120.0, 33.0, 10.0) if signed else (120.0, 33.0, 10.0)
    rewrite_element(file, "ImagePositionPatient", vr, struct_packed(vr, order, *position), order)
    assert image(file).header.position_mm == position
    # pydicom reads the same value.
    assert tuple(map(float, pydicom.dcmread(file).ImagePositionPatient)) == position


@pytest.mark.parametrize("order", "<>")
def test_every_decimal_string_may_be_binary(file: Path, order: str) -> None:
    cosines = (0.6, 0.8, 0.0, -0.8, 0.6, 0.0)
    for keyword, values in {
        "ImageOrientationPatient": cosines, "PixelSpacing": (0.7, 0.3), "RescaleSlope": (0.0444,),
        "RescaleIntercept": (-1024.5,),
    }.items():  # fmt: skip
        rewrite_element(file, keyword, "FD", struct_packed("FD", order, *values), order)
        read = image(file)
        attributes = {
            "ImageOrientationPatient": read.orientation, "PixelSpacing": read.pixel_spacing_mm,
            "RescaleSlope": (read.header.rescale_slope,), "RescaleIntercept": (read.header.rescale_intercept,),
        }  # fmt: skip
        assert attributes[keyword] == values
        write_series(file.parent, STORED[:1], SPACING_MM)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("vr", "value"),
    [("SS", -1024), ("SS", 0), ("SL", -1024), ("SV", -1024), ("FL", -1024.0), ("FD", -1024.0), ("US", 0)],
)
def test_the_rescale_intercept_may_be_binary(file: Path, vr: str, value: float, order: str) -> None:
    rewrite_element(file, "RescaleIntercept", vr, struct_packed(vr, order, value), order)
    assert image(file).header.rescale_intercept == value


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("vr", STRUCT_FORMATS)
@pytest.mark.parametrize("number", [1, 32, 49, 300, 12337])
def test_integer_strings_may_be_binary(file: Path, vr: str, number: int, order: str) -> None:
    rewrite_element(file, "InstanceNumber", vr, struct_packed(vr, order, number), order)
    assert image(file).header.instance_number == number


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("vr", ["US", "UL", "SS", "SL"])
@pytest.mark.parametrize("frames", [0, 1])
def test_a_binary_number_of_frames_of_0_or_1_is_read_as_one_frame(file: Path, vr: str, frames: int, order: str) -> None:
    rewrite_element(file, "NumberOfFrames", vr, struct_packed(vr, order, frames), order)
    header = image(file).header
    assert (header.frames, header.remarks) == (1, "" if frames else "frames-0")


@pytest.mark.parametrize("frames", [2, 32])
def test_a_binary_number_of_several_frames_is_read(file: Path, frames: int) -> None:
    rewrite_element(file, "NumberOfFrames", "US", struct_packed("US", "<", frames))
    assert image(file).header.frames == frames


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("vr", "text"),
    [
        ("IS", b"12"),
        ("IS", b"12  "),
        ("DS", b"12.0"),
        ("FL", None),
        ("FD", None),
        ("UL", None),
        ("SS", None),
    ],
)
def test_rows_may_be_text_or_floating_point(file: Path, vr: str, text: bytes | None, order: str) -> None:
    value = struct_packed(vr, order, 12) if text is None else text
    rewrite_element(file, "Rows", vr, value + b" " * (len(value) % 2), order)
    assert image(file).rows == 12


@pytest.mark.parametrize("value", [b"12.5", b"many", b"", b"1e9 ", b"12\\14 "])
def test_rows_that_are_not_a_number_are_not_guessed(file: Path, value: bytes) -> None:
    rewrite_element(file, "Rows", "DS", value)
    assert image(file).rows in (0, int.from_bytes(value[:2], "little"))


@pytest.mark.parametrize("vr", ["FD", "FL", "SL", "UL", "SV"])
@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        ("ImagePositionPatient", b"-120.50\\33.250\\10.000"), ("ImagePositionPatient", b"1\\2\\3.00"),
        ("PixelSpacing", b"0.700000\\0.30000"), ("RescaleIntercept", b"-1024.00"), ("RescaleIntercept", b"-500"),
        ("RescaleSlope", b"1.000000"), ("RescaleSlope", b"1.00000\0"),
    ],
)  # fmt: skip
def test_digits_under_a_binary_vr_are_read_as_text(file: Path, vr: str, keyword: str, text: bytes) -> None:
    # With the damaged VR, −120.5 mm would be read as 10⁻⁷⁷ mm.
    rewrite_element(file, keyword, "DS", text)
    expected = image(file)
    write_series(file.parent, STORED[:1], SPACING_MM)
    rewrite_element(file, keyword, vr, text)
    result = image(file)
    assert result.header.position_mm == expected.header.position_mm
    assert result.pixel_spacing_mm == expected.pixel_spacing_mm
    assert (result.header.rescale_slope, result.header.rescale_intercept) == (
        expected.header.rescale_slope, expected.header.rescale_intercept,
    )  # fmt: skip


@pytest.mark.parametrize("value", [bytes(7), bytes(9), b"", struct.pack("<2d", 1, 2), struct.pack("<d", float("nan"))])
def test_a_binary_number_of_invalid_length_or_value_is_none(file: Path, value: bytes) -> None:
    rewrite_element(file, "RescaleSlope", "FD", value)
    assert image(file).header.rescale_slope is None


# Decimal commas


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("0,7\\0,7", 2, "0.7\\0.7"),
        ("0,700\\0,350", 2, "0.700\\0.350"),
        ("1,000\\1,000", 2, "1.000\\1.000"),  # 1000 mm is no pixel spacing
        ("-120,500\\33,25\\10", 3, "-120.500\\33.25\\10"),
        ("-120,500\\-130,250\\10,000", 3, "-120.500\\-130.250\\10.000"),  # otherwise the slice would be 120 m away
        ("1,0\\0\\0\\0\\1,0\\0", 6, "1.0\\0\\0\\0\\1.0\\0"),
        ("-1024,000", 1, "-1024.000"),
        ("-1024,0", 1, "-1024.0"),
        ("1,5e-2", 1, "1.5e-2"),
        (",5", 1, ".5"),
        ("5,", 1, "5."),
        (" 0,7 \\ 0,7 ", 2, "0.7\\0.7"),
        ("0.7,0.7", 2, "0.7\\0.7"),
        ("-120.5,33.25,10.0", 3, "-120.5\\33.25\\10.0"),
        # Ambiguous or invalid:
        ("-1,024", 1, ""),
        ("-1,024\\-120\\35", 3, ""),
        ("-1,024\\-1,200\\-1,100", 3, ""),
        ("0,7,0,7", 2, ""),
        ("1,2", 2, ""),
        ("0,7\\0.7", 2, ""),
        ("1,024.5", 1, ""),
        ("1.024,5", 1, ""),
        ("1,024,000", 1, ""),
        ("0.7,0.7", 1, ""),
        ("0.7,7", 2, ""),
        (",", 1, ""),
        ("a,b", 1, ""),
        ("0,7\\", 2, ""),
    ],
)
def test_commas_are_converted_only_if_unambiguous(text: str, count: int, expected: str) -> None:
    most = {1: 65536.0, 2: 0.0, 3: 10_000.0, 6: 0.0}[count]
    assert with_points(text, count, most) == expected


@given(st.lists(st.floats(-2000, 2000), min_size=3, max_size=3), st.integers(1, 8))
def test_decimal_commas_give_the_number_that_was_written(values: list[float], digits: int) -> None:
    written = [f"{v:.{digits}f}" for v in values]
    read = with_points("\\".join(written).replace(".", ","), 3, 10_000.0)
    assert read in ("", "\\".join(written))
    if digits != 3:
        assert read


def test_a_series_with_decimal_commas_equals_the_one_with_points(tmp_path: Path) -> None:
    reference = write_series(tmp_path / "points", STORED, SPACING_MM)
    write_series(tmp_path / "commas", STORED, SPACING_MM)
    for file in sorted((tmp_path / "commas").iterdir()):
        for keyword in (
            "ImagePositionPatient",
            "ImageOrientationPatient",
            "PixelSpacing",
            "RescaleSlope",
            "RescaleIntercept",
        ):
            value = pydicom.dcmread(file)[keyword].value
            numbers = [value] if isinstance(value, str | float) else value
            text = "\\".join(f"{float(v):.6f}" for v in numbers).replace(".", ",")
            rewrite_element(file, keyword, "DS", text.encode() + b" " * (len(text) % 2))
    series = only_series(tmp_path / "commas")
    result, expected = gpuprep.read(series), gpuprep.read(only_series(tmp_path / "points"))
    assert len(reference) == len(STORED)
    np.testing.assert_allclose(result.geometry.affine, expected.geometry.affine, atol=1e-9)
    assert np.array_equal(result.stored, expected.stored)
    assert np.array_equal(result.slope, expected.slope)
    assert np.array_equal(result.intercept, expected.intercept)
    audit = gpuprep.audit(series)
    assert (audit.verdict, audit.codes) == ("ok", ("decimal-comma",))


@pytest.mark.parametrize(
    ("keyword", "text"),
    [("RescaleIntercept", "-1,024"), ("PixelSpacing", "0,7,0,7 "), ("ImagePositionPatient", "-1,024\\-1,200\\-1,100")],
)
def test_an_ambiguous_comma_rejects_the_series(tmp_path: Path, keyword: str, text: str) -> None:
    for file in write_series(tmp_path, STORED, SPACING_MM):
        rewrite_element(file, keyword, "DS", text.encode() + b" " * (len(text) % 2))
    with pytest.raises(InputError, match="absent, unreadable or impossible"):
        gpuprep.read(only_series(tmp_path))


def test_functional_groups_may_hold_binary_numbers(tmp_path: Path) -> None:
    from test_sources import enhanced

    file = tmp_path / "e.dcm"
    enhanced(write_series(tmp_path / "single", STORED, SPACING_MM), file)
    ds = pydicom.dcmread(file)
    for group in ds.PerFrameFunctionalGroupsSequence:
        plane = group.PlanePositionSequence[0]
        position = [float(v) for v in plane.ImagePositionPatient]
        del plane.ImagePositionPatient
        plane.add_new("ImagePositionPatient", "FD", position)
    ds.save_as(file)
    stored: Any = gpuprep.read(only_series(tmp_path / "e.dcm"))
    assert np.array_equal(stored.stored, STORED)
    assert stored.geometry.spacing_mm == pytest.approx(SPACING_MM)
