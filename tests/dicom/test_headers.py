"""Words and numbers of headers that are written in another way than DICOM asks: the same facts, or none."""

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


def found(folder: Path) -> Series:
    (series,) = gpuprep.discover(folder)
    return series


# Rescale Type


@pytest.mark.parametrize(
    ("word", "shown"),
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
def test_another_unit_is_refused_and_shown_where_it_is_a_code(tmp_path: Path, word: str, shown: str) -> None:
    def change(ds: Dataset, _: int) -> None:
        ds.RescaleType = word

    write_series(tmp_path, STORED, SPACING_MM, change=change)
    with pytest.raises(IntensityError) as caught:
        gpuprep.read(found(tmp_path))
    assert caught.value.code == "rescale-type"
    assert f"; the type is {shown}; --assume-hu" in str(caught.value)
    assert shown == word or word not in str(caught.value)


# Binary numbers where text is due, and text where binary ones are


FORMS = {"FD": "d", "FL": "f", "SL": "i", "SS": "h", "SV": "q", "UL": "I", "US": "H", "UV": "Q"}
LONG = {"SV", "UV", "UN"}
"""PS3.5, 7.1.2: VRs whose length has four bytes."""


def rewritten(file: Path, keyword: str, vr: str, value: bytes, order: str = "<") -> None:
    """Put an element into a file byte for byte, in place of the one that is there or before the one that follows."""
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
    length = struct.pack(order + ("2xI" if vr in LONG else "H"), len(value))
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
    (found,) = contents.images
    return found


def packed(vr: str, order: str, *values: float) -> bytes:
    return struct.pack(f"{order}{len(values)}{FORMS[vr]}", *(v if vr in ("FD", "FL") else int(v) for v in values))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("vr", FORMS)
def test_binary_numbers_in_place_of_decimals_are_exact(file: Path, vr: str, order: str) -> None:
    signed = vr not in ("UL", "US", "UV")
    position = (-120.5, 33.25, 10.0) if vr in ("FD", "FL") else (-120.0, 33.0, 10.0) if signed else (120.0, 33.0, 10.0)
    rewritten(file, "ImagePositionPatient", vr, packed(vr, order, *position), order)
    assert image(file).header.position_mm == position
    # pydicom alone reads the same.
    assert tuple(map(float, pydicom.dcmread(file).ImagePositionPatient)) == position


@pytest.mark.parametrize("order", "<>")
def test_every_decimal_may_be_binary(file: Path, order: str) -> None:
    cosines = (0.6, 0.8, 0.0, -0.8, 0.6, 0.0)
    for keyword, values in {
        "ImageOrientationPatient": cosines, "PixelSpacing": (0.7, 0.3), "RescaleSlope": (0.0444,),
        "RescaleIntercept": (-1024.5,),
    }.items():  # fmt: skip
        rewritten(file, keyword, "FD", packed("FD", order, *values), order)
        found = image(file)
        facts = {
            "ImageOrientationPatient": found.orientation, "PixelSpacing": found.pixel_spacing_mm,
            "RescaleSlope": (found.header.rescale_slope,), "RescaleIntercept": (found.header.rescale_intercept,),
        }  # fmt: skip
        assert facts[keyword] == values
        write_series(file.parent, STORED[:1], SPACING_MM)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("vr", "value"),
    [("SS", -1024), ("SS", 0), ("SL", -1024), ("SV", -1024), ("FL", -1024.0), ("FD", -1024.0), ("US", 0)],
)
def test_the_intercept_may_be_binary(file: Path, vr: str, value: float, order: str) -> None:
    rewritten(file, "RescaleIntercept", vr, packed(vr, order, value), order)
    assert image(file).header.rescale_intercept == value


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("vr", FORMS)
@pytest.mark.parametrize("number", [1, 32, 49, 300, 12337])
def test_integer_strings_may_be_binary(file: Path, vr: str, number: int, order: str) -> None:
    rewritten(file, "InstanceNumber", vr, packed(vr, order, number), order)
    assert image(file).header.instance_number == number


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("vr", ["US", "UL", "SS", "SL"])
@pytest.mark.parametrize("frames", [0, 1])
def test_a_binary_number_of_frames_is_one(file: Path, vr: str, frames: int, order: str) -> None:
    rewritten(file, "NumberOfFrames", vr, packed(vr, order, frames), order)
    header = image(file).header
    assert (header.frames, header.remarks) == (1, "" if frames else "frames-0")


@pytest.mark.parametrize("frames", [2, 32])
def test_a_binary_number_of_several_frames_is_not_one_frame(file: Path, frames: int) -> None:
    rewritten(file, "NumberOfFrames", "US", packed("US", "<", frames))
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
    value = packed(vr, order, 12) if text is None else text
    rewritten(file, "Rows", vr, value + b" " * (len(value) % 2), order)
    assert image(file).rows == 12


@pytest.mark.parametrize("value", [b"12.5", b"many", b"", b"1e9 ", b"12\\14 "])
def test_rows_that_are_no_number_are_none(file: Path, value: bytes) -> None:
    rewritten(file, "Rows", "DS", value)
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
def test_digits_under_the_name_of_a_binary_vr_stay_digits(file: Path, vr: str, keyword: str, text: bytes) -> None:
    # A damaged VR must not turn −120.5 mm into 10⁻⁷⁷ mm.
    rewritten(file, keyword, "DS", text)
    right = image(file)
    write_series(file.parent, STORED[:1], SPACING_MM)
    rewritten(file, keyword, vr, text)
    ours = image(file)
    assert ours.header.position_mm == right.header.position_mm
    assert ours.pixel_spacing_mm == right.pixel_spacing_mm
    assert (ours.header.rescale_slope, ours.header.rescale_intercept) == (
        right.header.rescale_slope, right.header.rescale_intercept,
    )  # fmt: skip


@pytest.mark.parametrize("value", [bytes(7), bytes(9), b"", struct.pack("<2d", 1, 2), struct.pack("<d", float("nan"))])
def test_a_binary_number_of_another_length_is_none(file: Path, value: bytes) -> None:
    rewritten(file, "RescaleSlope", "FD", value)
    assert image(file).header.rescale_slope is None


# Decimal commas


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("0,7\\0,7", 2, "0.7\\0.7"),
        ("0,700\\0,350", 2, "0.700\\0.350"),
        ("1,000\\1,000", 2, "1.000\\1.000"),  # 1000 mm between pixels is none
        ("-120,500\\33,25\\10", 3, "-120.500\\33.25\\10"),
        ("-120,500\\-130,250\\10,000", 3, "-120.500\\-130.250\\10.000"),  # else it lies 120 m away
        ("1,0\\0\\0\\0\\1,0\\0", 6, "1.0\\0\\0\\0\\1.0\\0"),
        ("-1024,000", 1, "-1024.000"),
        ("-1024,0", 1, "-1024.0"),
        ("1,5e-2", 1, "1.5e-2"),
        (",5", 1, ".5"),
        ("5,", 1, "5."),
        (" 0,7 \\ 0,7 ", 2, "0.7\\0.7"),
        ("0.7,0.7", 2, "0.7\\0.7"),
        ("-120.5,33.25,10.0", 3, "-120.5\\33.25\\10.0"),
        # What could be wrong:
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
def test_commas_are_points_where_nothing_else_can_be_meant(text: str, count: int, expected: str) -> None:
    most = {1: 65536.0, 2: 0.0, 3: 10_000.0, 6: 0.0}[count]
    assert with_points(text, count, most) == expected


@given(st.lists(st.floats(-2000, 2000), min_size=3, max_size=3), st.integers(1, 8))
def test_commas_of_a_locale_give_the_number_that_was_written(values: list[float], digits: int) -> None:
    written = [f"{v:.{digits}f}" for v in values]
    read = with_points("\\".join(written).replace(".", ","), 3, 10_000.0)
    assert read in ("", "\\".join(written))
    if digits != 3:
        assert read


def test_a_series_with_decimal_commas_lies_where_it_says(tmp_path: Path) -> None:
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
            rewritten(file, keyword, "DS", text.encode() + b" " * (len(text) % 2))
    series = found(tmp_path / "commas")
    ours, right = gpuprep.read(series), gpuprep.read(found(tmp_path / "points"))
    assert len(reference) == len(STORED)
    np.testing.assert_allclose(ours.geometry.affine, right.geometry.affine, atol=1e-9)
    assert np.array_equal(ours.stored, right.stored)
    assert np.array_equal(ours.slope, right.slope)
    assert np.array_equal(ours.intercept, right.intercept)
    audit = gpuprep.audit(series)
    assert (audit.verdict, audit.codes) == ("ok", ("decimal-comma",))


@pytest.mark.parametrize(
    ("keyword", "text"),
    [("RescaleIntercept", "-1,024"), ("PixelSpacing", "0,7,0,7 "), ("ImagePositionPatient", "-1,024\\-1,200\\-1,100")],
)
def test_a_comma_that_could_mean_two_things_rejects(tmp_path: Path, keyword: str, text: str) -> None:
    for file in write_series(tmp_path, STORED, SPACING_MM):
        rewritten(file, keyword, "DS", text.encode() + b" " * (len(text) % 2))
    with pytest.raises(InputError, match="absent, unreadable or impossible"):
        gpuprep.read(found(tmp_path))


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
    stored: Any = gpuprep.read(found(tmp_path / "e.dcm"))
    assert np.array_equal(stored.stored, STORED)
    assert stored.geometry.spacing_mm == pytest.approx(SPACING_MM)
