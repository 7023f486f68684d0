"""Tests of what headers tell of the acquisition: kernel, dose, contrast, time and descriptions."""

from __future__ import annotations

import pickle
import sqlite3
import struct
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from elements import Element
from pydicom import Dataset
from test_element_stream import ct, element, header
from test_sources import enhanced

import gpuprep
from gpuprep.core.series import Image
from gpuprep.dicom import describe
from gpuprep.dicom.headers import read_headers
from gpuprep.testing import write_series


def image_of(folder: Path, *elements: Element, values: dict[str, bytes] | None = None) -> Image:
    """Return a CT image with further elements, given as such or by keyword and value."""
    written = [element(k, v + b" " * (len(v) % 2)) for k, v in (values or {}).items()]
    file = folder / "1.dcm"
    file.write_bytes(header(ct(*elements, *written)))
    (contents,) = read_headers([str(file)])
    assert not contents.unreadable
    return contents.images[0]


# Contrast medium


@pytest.mark.parametrize(
    ("values", "contrast"),
    [
        ({}, "unknown"),
        ({"ContrastBolusAgent": b""}, "unknown"),
        ({"ContrastBolusAgent": b"  "}, "unknown"),
        ({"ContrastBolusAgent": b"", "ContrastBolusRoute": b""}, "unknown"),
        ({"ContrastBolusAgent": b"OMNIPAQUE 350"}, "yes"),
        ({"ContrastBolusAgent": b"& IV"}, "yes"),
        ({"ContrastBolusAgent": b"NONE"}, "no"),
        ({"ContrastBolusAgent": b"None "}, "no"),
        ({"ContrastBolusAgent": b"without"}, "no"),
        ({"ContrastBolusAgent": b"NONE", "ContrastBolusRoute": b"IV"}, "yes"),
        ({"ContrastBolusAgent": b"", "ContrastBolusRoute": b"Oral & IV"}, "yes"),
        ({"ContrastBolusVolume": b"0"}, "no"),
        ({"ContrastBolusVolume": b"0.0", "ContrastBolusAgent": b""}, "no"),
        ({"ContrastBolusVolume": b"0", "ContrastBolusAgent": b"ULTRAVIST"}, "yes"),
        ({"ContrastBolusVolume": b"95.5"}, "yes"),
        ({"ContrastBolusVolume": b"some"}, "unknown"),
        ({"ContrastBolusAgentPhase": b"PRE_CONTRAST"}, "no"),
        ({"ContrastBolusAgentPhase": b"PRE_CONTRAST", "ContrastBolusAgent": b"IMERON"}, "no"),
        ({"ContrastBolusAgentPhase": b"POST_CONTRAST"}, "yes"),
        ({"ContrastBolusAgentPhase": b"IMMEDIATE"}, "yes"),
        ({"ContrastBolusAgentAdministered": b"NO"}, "no"),
        ({"ContrastBolusAgentAdministered": b"YES", "ContrastBolusAgentDetected": b"NO"}, "yes"),
        ({"ContrastBolusAgentDetected": b"MAYBE"}, "unknown"),
    ],
)
def test_contrast_is_told_by_agent_route_volume_and_phase(
    tmp_path: Path, values: dict[str, bytes], contrast: str
) -> None:
    assert image_of(tmp_path, values=values).description.contrast == contrast


# Time of the acquisition


def seconds(*when: Any) -> float:
    """Return the seconds since the beginning of year 1, with 1 day for the beginning itself."""
    return (datetime(*when) - datetime(1, 1, 1)).total_seconds() + 86_400


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"AcquisitionDateTime": b"20200229123456"}, seconds(2020, 2, 29, 12, 34, 56)),
        ({"AcquisitionDateTime": b"20200229123456.250000"}, seconds(2020, 2, 29, 12, 34, 56, 250_000)),
        ({"AcquisitionDateTime": b"20200229123456.5+0100"}, seconds(2020, 2, 29, 12, 34, 56, 500_000)),
        ({"AcquisitionDateTime": b"20200229123456-0800"}, seconds(2020, 2, 29, 12, 34, 56)),
        ({"AcquisitionDateTime": b"202002291234"}, seconds(2020, 2, 29, 12, 34)),
        ({"AcquisitionDate": b"20200229", "AcquisitionTime": b"123456.789"}, seconds(2020, 2, 29, 12, 34, 56, 789_000)),
        ({"AcquisitionDate": b"2020.02.29", "AcquisitionTime": b"12:34:56"}, seconds(2020, 2, 29, 12, 34, 56)),
        ({"AcquisitionDate": b"20200229", "AcquisitionTime": b"1234"}, seconds(2020, 2, 29, 12, 34)),
        ({"AcquisitionTime": b"000001"}, seconds(1, 1, 1, 0, 0, 1)),
        (
            {"AcquisitionDateTime": b"20200229", "AcquisitionDate": b"20200229", "AcquisitionTime": b"070000"},
            seconds(2020, 2, 29, 7),
        ),
        (
            {"AcquisitionDateTime": b"20200229080000", "AcquisitionDate": b"20200301", "AcquisitionTime": b"070000"},
            seconds(2020, 2, 29, 8),
        ),
        ({"AcquisitionDate": b"20200229"}, None),
        ({"AcquisitionDateTime": b"20200230123456"}, None),
        ({"AcquisitionDateTime": b"20201301123456"}, None),
        ({"AcquisitionDateTime": b"00000101123456"}, None),
        ({"AcquisitionDateTime": b"20200229250000"}, None),
        ({"AcquisitionDateTime": b"20200229126100"}, None),
        ({"AcquisitionDateTime": b"yesterday noon"}, None),
        ({"AcquisitionDate": b"20200229", "AcquisitionTime": b"noon"}, None),
        ({}, None),
    ],
)
def test_acquisition_times_are_dt_or_da_and_tm_without_their_time_zone(
    tmp_path: Path, values: dict[str, bytes], expected: float | None
) -> None:
    assert image_of(tmp_path, values=values).acquired_s == expected


@pytest.mark.parametrize(
    ("values", "study_time"),
    [
        ({"StudyDate": b"20200229", "StudyTime": b"0710"}, "202002290710"),
        ({"StudyDate": b"20200229"}, "20200229"),
        ({"StudyDate": b"", "StudyTime": b"0710"}, ""),
        ({"StudyTime": b"0710"}, ""),
    ],
)
def test_a_study_without_a_date_has_no_place_in_time(tmp_path: Path, values: dict[str, bytes], study_time: str) -> None:
    assert image_of(tmp_path, values=values).description.study_time == study_time


# Texts


@pytest.mark.parametrize(
    ("charset", "value", "expected"),
    [
        (b"", b"Thorax 1.0", "Thorax 1.0"),
        (b"ISO_IR 100", b"Sch\xe4del nativ", "Schädel nativ"),
        (b"ISO_IR 192", "頭部 CT".encode(), "頭部 CT"),
        (b"ISO_IR 144", b"\xb3\xe0\xe3\xd4\xd8", "Груди"),  # ISO 8859-5
        (b"GB18030", "胸部平扫".encode("gb18030"), "胸部平扫"),
        (b"\\ISO 2022 IR 87", b"\x1b$BF,It\x1b(B CT", "頭部 CT"),
        (b"ISO 2022 IR 13\\ISO 2022 IR 87", b"\xb1\xb2\x1b$BF,\x1b(J", "ｱｲ頭"),
        (b"ISO 2022 IR 6\\ISO 2022 IR 87", b"\x1b$BF,It\x1b(B", "頭部"),
        (b"UNKNOWN", b"Sch\xe4del", "Schädel"),
        (b"ISO_IR 192", b"Sch\xe4del", "Sch\ufffddel"),
        (b"", b"a\x1bb", ""),  # a damaged length would include the next elements
        (b"ISO_IR 100", b" Thorax \\ Abd\xf3men\0", "Thorax\\Abdómen"),
        (b"", b"line\nline", ""),
        (b"", b"x" * 70, "x" * 64),
        (b"ISO_IR 100", b"\xe4" * 70, "ä" * 64),
    ],
)
def test_descriptions_are_read_in_the_character_set_of_the_file(
    tmp_path: Path, charset: bytes, value: bytes, expected: str
) -> None:
    keywords = ("SeriesDescription", "ProtocolName", "StudyDescription", "Manufacturer", "ManufacturerModelName")
    values = {"SpecificCharacterSet": charset, **dict.fromkeys(keywords, value)}
    said = image_of(tmp_path, values=values).description
    texts = (said.series_description, said.protocol_name, said.study_description, said.manufacturer, said.model)
    assert texts == (expected,) * 5


def test_values_of_codes_are_joined_by_backslashes_without_their_padding(tmp_path: Path) -> None:
    values = {
        "ImageType": b"DERIVED \\PRIMARY\\ AXIAL\0",
        "ConvolutionKernel": b"Br40d\\3",
        "ScanOptions": b"HELIX \\",
        "BodyPartExamined": b" CHEST",
    }
    said = image_of(tmp_path, values=values).description
    assert said.image_type == "DERIVED\\PRIMARY\\AXIAL"
    assert (said.kernel, said.scan_options, said.body_part) == ("Br40d\\3", "HELIX\\", "CHEST")


# Numbers


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (b"120", 120.0),
        (b" 1.2E+2 ", 120.0),
        (b"0", 0.0),
        (b"120,5", 120.5),
        (b"", None),
        (b"high", None),
        (b"120\\140", None),
        (b"1_20", None),
        (b"nan", None),
        (b"1e999", None),
    ],
)
def test_malformed_numbers_are_absent(tmp_path: Path, value: bytes, number: float | None) -> None:
    keywords = ("KVP", "SliceThickness", "ReconstructionDiameter", "XRayTubeCurrent", "Exposure")
    image = image_of(tmp_path, values=dict.fromkeys(keywords, value))
    said, dose = image.description, image.dose
    assert (said.kvp, said.slice_thickness_mm, said.reconstruction_diameter_mm) == (number,) * 3
    assert (dose.tube_current_ma, dose.exposure_mas) == (number,) * 2


@pytest.mark.parametrize(
    ("vr", "value", "number"),
    [
        (b"FD", struct.pack("<d", 0.984375), 0.984375),
        (b"FL", struct.pack("<f", 0.5), 0.5),
        (b"DS", b"0.984375", 0.984375),
        (b"FD", struct.pack("<d", float("nan")), None),
        (b"FD", struct.pack("<d", float("inf")), None),
        (b"FD", b"\0\0", None),
        (b"FD", b"", None),
    ],
)
def test_pitch_and_ctdivol_are_binary_or_decimal_strings(
    tmp_path: Path, vr: bytes, value: bytes, number: float | None
) -> None:
    tags = {"SpiralPitchFactor": 0x0018_9311, "CTDIvol": 0x0018_9345}
    image = image_of(tmp_path, *(Element(tag, vr, value) for tag in tags.values()))
    assert (image.description.pitch, image.dose.ctdivol_mgy) == (number, number)


def test_every_image_with_a_decimal_comma_is_remarked_even_if_others_tell_the_same(tmp_path: Path) -> None:
    describe._known.clear()
    remarks = [image_of(tmp_path, values={"KVP": b"120,5"}).header.remarks for _ in range(2)]
    assert remarks == ["comma", "comma"]
    assert image_of(tmp_path, values={"KVP": b"120.5"}).header.remarks == ""


# Functional groups


def item(**values: Any) -> Dataset:
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


@pytest.fixture
def enhanced_file(tmp_path: Path) -> Path:
    """Return an enhanced CT image of four frames: some attributes shared, some of each frame, some of the image."""
    file = tmp_path / "enhanced.dcm"
    enhanced(write_series(tmp_path / "single", np.zeros((4, 8, 8), np.int16), (2.5, 0.8, 0.7)), file)
    ds = pydicom.dcmread(file)
    for keyword in ("KVP", "ConvolutionKernel"):
        if keyword in ds:
            del ds[keyword]
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    ds.Manufacturer, ds.ManufacturerModelName = "ACME", "Scanner"
    (shared,) = ds.SharedFunctionalGroupsSequence
    shared.PixelMeasuresSequence[0].SliceThickness = "3.0"
    shared.CTReconstructionSequence = [item(ConvolutionKernel=["Qr40", "2"], ReconstructionDiameter=350.0)]
    shared.CTXRayDetailsSequence = [item(KVP=100.0)]
    shared.CTTableDynamicsSequence = [item(SpiralPitchFactor=0.75)]
    shared.CTAcquisitionTypeSequence = [item(AcquisitionType="SPIRAL")]
    shared.CTImageFrameTypeSequence = [item(FrameType=["ORIGINAL", "PRIMARY", "AXIAL", "NONE"])]
    shared.ContrastBolusUsageSequence = [item(ContrastBolusAgentAdministered="YES", ContrastBolusAgentDetected="NO")]
    for n, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        group.CTExposureSequence = [item(XRayTubeCurrentInmA=100.0 + n, ExposureInmAs=50.0 + 2 * n, CTDIvol=8.0 - n)]
        group.FrameContentSequence[0].FrameAcquisitionDateTime = f"2020022912000{n}.5"
    ds.save_as(file)
    return file


def test_functional_groups_of_enhanced_ct_tell_kernel_thickness_and_dose(enhanced_file: Path) -> None:
    (series,) = gpuprep.discover(enhanced_file)
    said = series.description
    assert said.image_type == "ORIGINAL\\PRIMARY\\AXIAL\\NONE"
    assert (said.kernel, said.slice_thickness_mm, said.reconstruction_diameter_mm) == ("Qr40\\2", 3.0, 350.0)
    assert (said.kvp, said.pitch, said.acquisition_type, said.contrast) == (100.0, 0.75, "SPIRAL", "yes")
    assert (said.manufacturer, said.model) == ("ACME", "Scanner")
    assert series.dose == pytest.approx((101.5, 53.0, 6.5))
    assert series.acquired_s == (seconds(2020, 2, 29, 12, 0, 0, 500_000), seconds(2020, 2, 29, 12, 0, 3, 500_000))


def test_groups_of_frames_overrule_shared_ones_and_most_frames_decide(enhanced_file: Path) -> None:
    ds = pydicom.dcmread(enhanced_file)
    for group, thickness in zip(ds.PerFrameFunctionalGroupsSequence, (1.0, 2.0, 2.0, 1.0), strict=True):
        group.PixelMeasuresSequence = [item(SliceThickness=thickness, PixelSpacing=[0.8, 0.7])]
    ds.PerFrameFunctionalGroupsSequence[3].CTXRayDetailsSequence = [item(KVP=140.0)]
    ds.save_as(enhanced_file)
    (contents,) = read_headers([str(enhanced_file)])
    assert [image.description.slice_thickness_mm for image in contents.images] == [1.0, 2.0, 2.0, 1.0]
    assert [image.description.kvp for image in contents.images] == [100.0, 100.0, 100.0, 140.0]
    (series,) = gpuprep.discover(enhanced_file)
    assert (series.description.slice_thickness_mm, series.description.kvp) == (1.0, 100.0)


# The description of a series


def test_each_attribute_of_a_series_is_that_of_most_slices_and_the_first_of_equally_frequent_ones(
    tmp_path: Path,
) -> None:
    def change(ds: Dataset, k: int) -> None:
        file = 4 - k  # the first file has the last slice
        ds.KVP = (80, 100, 100, 120, 100)[file]
        ds.SliceThickness = (None, "3", "2", "2", "3")[file]
        ds.ProtocolName = ("", "", "", "Thorax", "")[file]
        ds.ContrastBolusAgent = ("", "", "", "NONE", "")[file]
        ds.XRayTubeCurrent = (100, 200, 300, None, None)[file]

    write_series(tmp_path, np.zeros((5, 8, 8), np.int16), (2.5, 0.8, 0.7), change=change)
    (series,) = gpuprep.discover(tmp_path)
    said = series.description
    assert (said.kvp, said.slice_thickness_mm) == (100.0, 3.0)
    assert (said.protocol_name, said.contrast) == ("Thorax", "no")
    assert series.dose.tube_current_ma == 200.0


@pytest.mark.parametrize(("first", "mean"), [(1e308, None), (5.0, 4.0)])
def test_impossible_doses_have_no_mean_and_stop_nothing(tmp_path: Path, first: float, mean: float | None) -> None:
    def change(ds: Dataset, k: int) -> None:
        ds.CTDIvol = 1e308 if first > 5 else first - 2 * k

    write_series(tmp_path, np.zeros((2, 8, 8), np.int16), (2.0, 1.0, 1.0), change=change)
    (series,) = gpuprep.discover(tmp_path)
    assert series.dose.ctdivol_mgy == mean


# The header index


def described_series(folder: Path, count: int = 10) -> list[Path]:
    def change(ds: Dataset, k: int) -> None:
        ds.ConvolutionKernel, ds.SeriesDescription, ds.XRayTubeCurrent = "B30f", "Thorax", str(100 + k)

    stored = np.zeros((count, 8, 8), np.int16)
    return write_series(folder, stored, (2.0, 1.0, 1.0), series_uid="1.2.3", change=change)


def in_index(index: Path, query: str, *values: str) -> list[Any]:
    """Run a query on the table of descriptions of an index."""
    with closing(sqlite3.connect(index, isolation_level=None)) as db:
        (name,) = (n for (n,) in db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'descriptions_%'"))
        return db.execute(query.replace("descriptions", name), values).fetchall()


def test_the_images_of_a_series_share_one_description_also_in_the_index(tmp_path: Path) -> None:
    files = described_series(tmp_path / "dicom")
    images = [image for contents in read_headers([str(f) for f in files]) for image in contents.images]
    assert len({id(image.description) for image in images}) == 1
    index = tmp_path / "index.sqlite"
    (first,) = gpuprep.discover(tmp_path / "dicom", index=index)
    ((text,),) = in_index(index, "SELECT description FROM descriptions")
    assert ("B30f" in text, "Thorax" in text) == (True, True)
    (again,) = gpuprep.discover(tmp_path / "dicom", index=index)
    assert again == first
    assert (again.description.kernel, again.dose.tube_current_ma) == ("B30f", 104.5)
    assert (again.description.series_description, again.patient) == ("Thorax", first.patient)


def test_an_index_without_its_descriptions_is_read_anew_and_mended(tmp_path: Path) -> None:
    described_series(tmp_path / "dicom")
    index = tmp_path / "index.sqlite"
    (first,) = gpuprep.discover(tmp_path / "dicom", index=index)
    for damage in ("[1]", "no JSON", ""):
        in_index(index, "UPDATE descriptions SET description = ?", damage)
        assert gpuprep.discover(tmp_path / "dicom", index=index).series == (first,)
        ((text,),) = in_index(index, "SELECT description FROM descriptions")
        assert "B30f" in text
    in_index(index, "DELETE FROM descriptions")
    assert gpuprep.discover(tmp_path / "dicom", index=index).series == (first,)
    assert len(in_index(index, "SELECT description FROM descriptions")) == 1


def test_an_index_of_another_version_is_made_anew_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    described_series(tmp_path / "dicom")
    index = tmp_path / "index.sqlite"
    with closing(sqlite3.connect(index)) as db:
        db.execute("CREATE TABLE files_0123456789ab (folder BLOB, name BLOB)")
    assert len(gpuprep.discover(tmp_path / "dicom", index=index)) == 1
    message = "the index of headers is of another version: it is made anew, and every header is read once"
    assert caplog.messages == [message]
    assert len(gpuprep.discover(tmp_path / "dicom", index=index)) == 1
    assert len(caplog.messages) == 1


def test_workers_get_no_description(tmp_path: Path) -> None:
    described_series(tmp_path / "dicom")
    (planned,) = gpuprep.scan(tmp_path / "dicom").planned
    assert planned.facts.series_description == "Thorax"
    assert b"Thorax" not in pickle.dumps(planned.for_worker().series)
