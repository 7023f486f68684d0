"""Names, codes, text and UIDs of DICOM SEG, and what cannot be written."""

from __future__ import annotations

import resource
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import seg_points
from numpy.typing import NDArray
from pydicom import Dataset
from seg_points import check_same
from seg_series import KINDS, NAMES, SHAPE, fails, labels, masks, write, written

import gpuprep
from gpuprep.errors import InputError, OutputError, RequestError
from gpuprep.output.dicom_seg import Kind, SegOptions


def test_structures_have_names_codes_and_colours(tmp_path: Path) -> None:
    _, stacked = written(tmp_path / "ct")
    write(tmp_path / "seg.dcm", labels(), stacked.slices, algorithm="nnU-Net", algorithm_version="2.5")
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    lung, liver, mine = ds.SegmentSequence
    assert [s.SegmentNumber for s in (lung, liver, mine)] == [1, 2, 3]
    assert [s.SegmentLabel for s in (lung, liver, mine)] == ["lung_left", "liver", "my structure"]
    kinds = [s.SegmentedPropertyTypeCodeSequence[0] for s in (lung, liver, mine)]
    assert [(k.CodingSchemeDesignator, k.CodeValue, k.CodeMeaning) for k in kinds] == [
        ("SCT", "39607008", "Lung"), ("SCT", "10200004", "Liver"), ("99GPUPREP", "MY_STRUCTURE", "my structure"),
    ]  # fmt: skip
    (side,) = kinds[0].SegmentedPropertyTypeModifierCodeSequence
    assert (side.CodeValue, side.CodeMeaning) == ("7771000", "Left")
    assert not any("SegmentedPropertyTypeModifierCodeSequence" in k for k in kinds[1:])
    categories = [s.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning for s in (lung, liver, mine)]
    assert categories == ["Anatomical Structure", "Anatomical Structure", "Tissue"]
    assert ds.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == "99GPUPREP"
    assert {(s.SegmentAlgorithmType, s.SegmentAlgorithmName) for s in ds.SegmentSequence} == {("AUTOMATIC", "nnU-Net")}
    assert lung.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "2.5"
    assert len({tuple(s.RecommendedDisplayCIELabValue) for s in ds.SegmentSequence}) == 3


def test_equal_input_makes_equal_files(tmp_path: Path) -> None:
    _, stacked = written(tmp_path / "ct")
    for name in ("a", "b"):
        write(tmp_path / name, labels(), stacked.slices)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other = labels()
    other[0, 0, 0] = 1
    write(tmp_path / "c", other, stacked.slices)
    write(tmp_path / "d", labels(), stacked.slices, algorithm="another")
    found = [pydicom.dcmread(tmp_path / name) for name in "acd"]
    assert len({ds.SOPInstanceUID for ds in found}) == len({ds.SeriesInstanceUID for ds in found}) == 3
    assert {(ds.ContentDate, ds.ContentTime) for ds in found} == {("20240203", "040506")}


def test_a_label_map_keeps_the_values_of_labels(tmp_path: Path) -> None:
    _, stacked = written(tmp_path / "ct")
    values = labels(np.uint16)
    values[values == 2] = 300
    values[values == 5] = 65535
    names = {1: "lung", 300: "liver", 65535: "heart"}
    write(tmp_path / "seg.dcm", values, stacked.slices, names, kind="labelmap")
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    assert {s.SegmentNumber: s.SegmentLabel for s in ds.SegmentSequence} == {0: "Background", **names}
    occupied = values[(values > 0).any(axis=(1, 2))]
    assert sorted(map(bytes, ds.pixel_array)) == sorted(map(bytes, occupied))
    write(tmp_path / "binary.dcm", values, stacked.slices, names)
    check_same(seg_points.of_seg(tmp_path / "binary.dcm"), seg_points.of_seg(tmp_path / "seg.dcm"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_structure_without_a_voxel_is_left_out_with_a_note(tmp_path: Path, kind: Kind) -> None:
    _, stacked = written(tmp_path / "ct")
    notes = write(tmp_path / "seg.dcm", labels(), stacked.slices, {**NAMES, 3: "heart"}, kind=kind)
    assert notes == ("1 structure without a voxel left out: heart",)
    found = [s.SegmentLabel for s in pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence]
    assert found[-3:] == ["lung_left", "liver", "my structure"]
    notes = write(tmp_path / "seg.dcm", np.zeros(SHAPE, np.uint8), stacked.slices, kind=kind)
    assert notes == ("no structure has a voxel: each has one empty frame",)
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    assert not ds.pixel_array.any()
    assert ds.NumberOfFrames == (3 if kind == "binary" else 1)
    assert len(ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == len(stacked.slices)


def test_text_of_any_alphabet_survives(tmp_path: Path) -> None:
    def change(ds: Dataset, _: int) -> None:
        ds.SpecificCharacterSet = "ISO_IR 100"
        ds.PatientName = "Müller^Jörg"

    _, stacked = written(tmp_path / "ct", change=change)
    names = {1: "Knöchel\\links", 2: "肝臓", 5: "x" * 80}
    write(tmp_path / "seg.dcm", labels(), stacked.slices, names)
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    assert str(ds.PatientName) == "Müller^Jörg"
    assert [s.SegmentLabel for s in ds.SegmentSequence] == ["Knöchel_links", "肝臓", "x" * 64]


def test_malformed_values_of_the_originals_are_not_repeated(tmp_path: Path) -> None:
    def change(ds: Dataset, _: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds.PatientBirthDate, ds.StudyTime, ds.PatientSex, ds.StudyID = "unknown", "noon", "X", None
            ds.StudyDate, ds.PatientAge, ds.LossyImageCompression = "20200102", "044Y", "01"
            ds.LossyImageCompressionRatio = "8"
        del ds.FrameOfReferenceUID, ds.SliceThickness

    _, stacked = written(tmp_path / "ct", change=change)
    (note,) = write(tmp_path / "seg.dcm", labels(), stacked.slices)
    assert note.endswith("has no Frame of Reference UID: the segmentation has a new one")
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    assert [ds[k].value or "" for k in ("PatientBirthDate", "StudyTime", "PatientSex", "StudyID")] == [""] * 4
    assert (ds.StudyDate, ds.PatientAge) == ("20200102", "044Y")
    assert (ds.LossyImageCompression, ds.LossyImageCompressionRatio) == ("01", 8)
    assert ds.FrameOfReferenceUID


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        (labels()[0], NAMES, "labels are uint8 of shape (20, 24): give uint8 or uint16, slices first"),
        (labels().astype(np.int16), NAMES, "labels are int16 of shape"),
        (labels().astype(np.uint32), NAMES, "labels are uint32 of shape"),
        (labels()[:7], NAMES, "there are labels of 7 slices, and 8 original slices"),
        (labels(), {1: "a", 2: "b"}, "1 voxel have labels without a name: 5"),
        (labels(), {}, "there is no structure to write"),
        (labels(), {0: "background"}, "there is no structure to write"),
        (labels(), {**NAMES, 65536: "x"}, "label 65536 (x) is beyond 65535"),
        (labels(), {**NAMES, -1: "x"}, "label -1 (x) is beyond 65535"),
    ],
)
def test_labels_that_cannot_be_written_are_refused(
    tmp_path: Path, values: NDArray[Any], names: dict[int, str], expected: str
) -> None:
    _, stacked = written(tmp_path / "ct")
    fails(RequestError, expected, lambda: write(tmp_path / "seg.dcm", values, stacked.slices, names))
    assert not (tmp_path / "seg.dcm").exists()


def test_labels_of_another_matrix_are_refused(tmp_path: Path) -> None:
    _, stacked = written(tmp_path / "ct")
    expected = "has 20 × 24 pixels, and the labels 20 × 23"
    fails(InputError, expected, lambda: write(tmp_path / "seg.dcm", labels()[..., :23], stacked.slices))


def test_originals_that_changed_since_the_scan_are_refused(tmp_path: Path) -> None:
    files, stacked = written(tmp_path / "ct")
    first, second = files[3].read_bytes(), files[4].read_bytes()

    def attempt() -> None:
        write(tmp_path / "seg.dcm", labels(), stacked.slices)

    files[3].write_bytes(second)
    fails(InputError, f"{files[3].name} changed since the scan", attempt)
    files[3].write_bytes(b"no DICOM at all" * 20)
    fails(InputError, files[3].name, attempt)
    files[3].unlink()
    fails(InputError, f"{files[3].name} cannot be read: No such file", attempt)
    files[3].write_bytes(first)
    ds = pydicom.dcmread(files[3])
    del ds.SOPInstanceUID
    ds.save_as(files[3])
    fails(InputError, f"{files[3].name} lacks a UID", attempt)
    ds.SOPInstanceUID, ds.StudyInstanceUID = stacked.slices[3].sop_instance_uid, "1.2.3"
    ds.save_as(files[3])
    fails(InputError, f"{files[3].name} is of another study", attempt)


def test_decimal_commas_are_read_as_in_the_scan(tmp_path: Path) -> None:
    files, _ = written(tmp_path / "ct")
    expected = seg_points.of_images(files, masks(labels()))
    for file in files:
        file.write_bytes(file.read_bytes().replace(b"DS\x06\x002\\1.5 ", b"DS\x06\x002\\1,5 "))
    (series,) = gpuprep.discover(tmp_path / "ct")
    assert series.slices[0].remarks == "comma"
    write(tmp_path / "seg.dcm", labels(), gpuprep.stack(series).slices)
    check_same(seg_points.of_seg(tmp_path / "seg.dcm"), expected)


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_malformed_uids_are_referred_to_as_they_are(tmp_path: Path) -> None:
    def change(ds: Dataset, k: int) -> None:
        ds.SOPInstanceUID = f"image-{k}"

    _, stacked = written(tmp_path / "ct", change=change)
    write(tmp_path / "seg.dcm", labels(), stacked.slices)
    referred = pydicom.dcmread(tmp_path / "seg.dcm").ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert [item.ReferencedSOPInstanceUID for item in referred] == [f"image-{k}" for k in range(8)]


def test_images_that_share_a_uid_are_refused(tmp_path: Path) -> None:
    def change(ds: Dataset, k: int) -> None:
        if k in (2, 4):
            ds.SOPInstanceUID = "1.2.3"

    _, stacked = written(tmp_path / "ct", change=change)
    fails(InputError, "share a SOP Instance UID", lambda: write(tmp_path / "seg.dcm", labels(), stacked.slices))


def test_a_full_disk_and_a_malformed_value_are_one_plain_line(tmp_path: Path) -> None:
    def change(ds: Dataset, _: int) -> None:
        ds.add_new("StudyID", "US", 3)  # instead of SH

    _, stacked = written(tmp_path / "ct")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OutputError, match=r"seg.dcm cannot be written: File too large$"):
            write(tmp_path / "seg.dcm", labels(), stacked.slices)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _, stacked = written(tmp_path / "other", change=change)
    with pytest.raises(InputError, match="an original has a malformed value") as caught:
        write(tmp_path / "seg.dcm", labels(), stacked.slices)
    assert "Traceback" not in str(caught.value)
    assert not list(tmp_path.glob("seg*"))


def test_images_at_one_position_are_refused(tmp_path: Path) -> None:
    _, stacked = written(tmp_path / "ct")
    twice = (*stacked.slices[:7], stacked.slices[6])
    fails(InputError, "share a position", lambda: write(tmp_path / "seg.dcm", labels(), twice))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "fractional"}, "kind = 'fractional'"),
        ({"algorithm": ""}, "algorithm = ''"),
        ({"algorithm": "a\\b"}, "algorithm = "),
        ({"algorithm_version": "v" * 65}, "algorithm_version = "),
        ({"series_description": "a\nb"}, "series_description = "),
        ({"series_number": 0}, "series_number = 0"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], expected: str) -> None:
    fails(RequestError, expected, lambda: replace(SegOptions(), **options))


def test_without_highdicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stacked = written(tmp_path / "ct")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    expected = "pip install 'gpuprep[seg]'"
    fails(RequestError, expected, lambda: write(tmp_path / "seg.dcm", labels(), stacked.slices))


def test_a_former_file_survives_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stacked = written(tmp_path / "ct")
    to = tmp_path / "seg.dcm"
    to.write_bytes(b"former")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gpuprep.files.replacing.flush", full)
        fails(OutputError, "cannot be written: No space left", lambda: write(to, labels(), stacked.slices))
    assert to.read_bytes() == b"former"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct", "seg.dcm"]
    fails(OutputError, "cannot be written", lambda: write(tmp_path / "no" / "seg.dcm", labels(), stacked.slices))
    write(to, labels(), stacked.slices)
    assert pydicom.dcmread(to).Modality == "SEG"
