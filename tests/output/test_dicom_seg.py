"""DICOM SEG as other readers see it: voxels where the originals have them, references, codes, and refusals."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import seg_points
import SimpleITK
from numpy.typing import NDArray
from pydicom import Dataset
from segmentations import read
from test_sources import enhanced, wrapped

import gpuprep
from gpuprep.core.mask_options import Masks
from gpuprep.core.series import SliceHeader
from gpuprep.dicom.stack import Stack
from gpuprep.errors import GpuprepError, InputError, OutputError, RequestError
from gpuprep.masks.structure_codes import coded
from gpuprep.output.dicom_seg import Kind, SegOptions, write_seg
from gpuprep.testing import write_series

SHAPE, SPACING_MM, ORIGIN_MM = (8, 20, 24), (3.0, 2.0, 1.5), (-100.25, -120.5, -300.75)
NAMES = {1: "lung_left", 2: "liver", 5: "my structure"}
MADE = datetime(2024, 2, 3, 4, 5, 6)
KINDS: tuple[Kind, ...] = ("binary", "labelmap")
LANDMARK = (5, 3, 4)
"""Slice, row and column of a voxel of its own."""


def tilted(ds: Dataset, k: int) -> None:
    x, y, z = map(float, ds.ImagePositionPatient)
    ds.ImagePositionPatient = [x, y + 0.7 * k, z]


def uneven(ds: Dataset, k: int) -> None:
    x, y, z = map(float, ds.ImagePositionPatient)
    ds.ImagePositionPatient = [x, y, z + (0.8 if k > 4 else 0)]


def lost(ds: Dataset, k: int) -> None:
    ds.ImagePositionPatient = [*ORIGIN_MM[:2], ORIGIN_MM[2] + 3 * (k + (k > 4))]


CASES: dict[str, dict[str, Any]] = {
    "axial": {},
    "sagittal": {"orientation": (0, 1, 0, 0, 0, -1)},
    "coronal": {"orientation": (1, 0, 0, 0, 0, -1)},
    "prone": {"orientation": (-1, 0, 0, 0, -1, 0)},
    "feet first": {"orientation": (-1, 0, 0, 0, 1, 0)},
    "oblique": {"orientation": (0.6, 0.8, 0, -0.64, 0.48, 0.6)},
    "tilted": {"change": tilted},
    "uneven": {"change": uneven},
    "lost": {"change": lost},
}

# The first voxel plus 5 slices of 3 mm along row × column, 3 rows of 2 mm and 4 columns of 1.5 mm, by hand.
LANDMARK_MM = {
    "axial": (-100.25 + 6, -120.5 + 6, -300.75 + 15),
    "sagittal": (-100.25 - 15, -120.5 + 6, -300.75 - 6),
    "coronal": (-100.25 + 6, -120.5 + 15, -300.75 - 6),
    "prone": (-100.25 - 6, -120.5 - 6, -300.75 + 15),
    "feet first": (-100.25 - 6, -120.5 + 6, -300.75 - 15),
    # row × column = (0.48, −0.36, 0.8)
    "oblique": (-100.25 + 7.2 - 3.84 + 3.6, -120.5 - 5.4 + 2.88 + 4.8, -300.75 + 12 + 3.6),
    "tilted": (-100.25 + 6, -120.5 + 6 + 3.5, -300.75 + 15),
    "uneven": (-100.25 + 6, -120.5 + 6, -300.75 + 15.8),
    "lost": (-100.25 + 6, -120.5 + 6, -300.75 + 18),
}


def written(folder: Path, **how: Any) -> tuple[list[Path], Stack]:
    """Write a series, and return its files in spatial order with its stack."""
    stored = np.random.default_rng(0).integers(0, 2000, SHAPE).astype(np.int16)
    files = write_series(folder, stored, SPACING_MM, origin_mm=ORIGIN_MM, **how)
    (series,) = gpuprep.discover(folder)
    return files, gpuprep.stack(series, gpuprep.Rules(max_missing_share=0.2))


def labels(dtype: Any = np.uint8) -> NDArray[Any]:
    """Return labels of three structures; the landmark is one of its own."""
    values = np.zeros(SHAPE, dtype)
    values[2:4, 3:6, 4:9] = 1
    values[6:, 10:, 10:23] = 2
    values[3, 0, 0] = 2
    values[LANDMARK] = 5
    return values


def masks(values: NDArray[Any], names: Mapping[int, str] = NAMES) -> dict[str, NDArray[np.bool_]]:
    return {name: values == label for label, name in names.items()}


def write(
    to: Path,
    values: NDArray[Any],
    headers: tuple[SliceHeader, ...],
    names: Mapping[int, str] = NAMES,
    **options: Any,
) -> tuple[str, ...]:
    codes = {name: coded(name) for name in names.values()}
    return write_seg(values, names, headers, codes, to, SegOptions(made=MADE, **options))


def check_same(found: seg_points.Points, expected: seg_points.Points) -> None:
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert found[name].shape == points.shape
        np.testing.assert_allclose(found[name], points, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_voxels_lie_where_the_originals_have_them(tmp_path: Path, case: str, kind: Kind) -> None:
    files, stacked = written(tmp_path / "ct", **CASES[case])
    values = labels()
    notes = write(tmp_path / "seg.dcm", values, stacked.slices, kind=kind)
    assert [note.startswith("slices leave a regular grid by up to ") for note in notes] == (
        [True] if case in ("tilted", "uneven") else []
    )
    check_same(seg_points.of_seg(tmp_path / "seg.dcm"), seg_points.of_images(files, masks(values)))
    np.testing.assert_allclose(seg_points.of_seg(tmp_path / "seg.dcm")["my structure"], [LANDMARK_MM[case]], atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_highdicom_finds_the_labels_by_the_images(tmp_path: Path, case: str, kind: Kind) -> None:
    files, stacked = written(tmp_path / "ct", **CASES[case])
    values = labels()
    write(tmp_path / "seg.dcm", values, stacked.slices, kind=kind)
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    uids = [pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in files]
    numbers = {segment.SegmentLabel: int(segment.SegmentNumber) for segment in seg.SegmentSequence}
    for name, mask in masks(values).items():
        found = seg.get_pixels_by_source_instance(
            uids, segment_numbers=[numbers[name]], assert_missing_frames_are_empty=True
        )
        np.testing.assert_array_equal(found[..., 0].astype(bool), mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_gpuprep_reads_the_same_voxels(tmp_path: Path, case: str, kind: Kind) -> None:
    files, stacked = written(tmp_path / "ct", **CASES[case])
    values = labels()
    write(tmp_path / "seg.dcm", values, stacked.slices, kind=kind)
    found = {}
    for structure in read(tmp_path / "seg.dcm").structures:
        points = []
        for raster in structure.rasters:
            assert raster.geometry is not None
            row, column = np.nonzero(raster.mask)
            index = np.column_stack([np.zeros(len(row)), row + raster.row, column + raster.column])
            points.append(raster.geometry.points_mm(index))
        found[structure.name] = seg_points.in_order(np.concatenate(points))
    check_same(found, seg_points.of_images(files, masks(values)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_series_gets_the_labels_that_were_written(tmp_path: Path, kind: Kind) -> None:
    _, stacked = written(tmp_path / "ct")
    values = labels()
    write(tmp_path / "seg.dcm", values, stacked.slices, kind=kind)
    recipe = gpuprep.Recipe(
        spacing_mm=None, size=None, window_hu=None, dtype="int16", format="npy",
        masks=Masks(aliases=tuple((name, (name,)) for name in NAMES.values())),
    )  # fmt: skip
    run = gpuprep.convert(tmp_path / "ct", tmp_path / "out", recipe, masks=tmp_path / "seg.dcm", backend="cpu")
    (result,) = run.results
    assert result.labels is not None
    found = np.load(tmp_path / "out" / result.folder / "labels.npy")
    for label in result.labels:
        np.testing.assert_array_equal(found == label["value"], masks(values)[label["name"]])


def test_simpleitk_reads_the_frames(tmp_path: Path) -> None:
    _, stacked = written(tmp_path / "ct", **CASES["oblique"])
    write(tmp_path / "seg.dcm", labels(), stacked.slices)
    image = SimpleITK.ReadImage(str(tmp_path / "seg.dcm"))
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image) > 0, ds.pixel_array > 0)
    assert ds.NumberOfFrames == 6  # 2 of the lung, 3 of the liver, the landmark
    first = ds.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient
    np.testing.assert_allclose(image.GetOrigin(), [float(v) for v in first], atol=1e-9)
    np.testing.assert_allclose(np.reshape(image.GetDirection(), (3, 3))[:, 0], (0.6, 0.8, 0), atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_each_frame_refers_to_its_image_and_the_object_to_all(tmp_path: Path, kind: Kind) -> None:
    files, stacked = written(tmp_path / "ct")
    write(tmp_path / "seg.dcm", labels(), stacked.slices, kind=kind)
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    originals = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    by_z = {float(o.ImagePositionPatient[2]): o.SOPInstanceUID for o in originals}
    for frame in ds.PerFrameFunctionalGroupsSequence:
        (item,) = frame.DerivationImageSequence[0].SourceImageSequence
        z = float(frame.PlanePositionSequence[0].ImagePositionPatient[2])
        assert (item.ReferencedSOPInstanceUID, item.SpatialLocationsPreserved) == (by_z[z], "YES")
        assert item.ReferencedSOPClassUID == pydicom.uid.CTImageStorage
        assert "ReferencedFrameNumber" not in item
    (series,) = ds.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == originals[0].SeriesInstanceUID
    assert {i.ReferencedSOPInstanceUID for i in series.ReferencedInstanceSequence} == set(by_z.values())
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert ds[keyword].value == originals[0][keyword].value
    assert ds.SeriesInstanceUID != originals[0].SeriesInstanceUID
    assert (ds.Modality, ds.Manufacturer, ds.SeriesDescription) == ("SEG", "gpuprep", "Segmentation")


@pytest.mark.parametrize("how", ["gzip", "zip", "zip-file", "enhanced", "enhanced-zip", "enhanced-rle"])
def test_originals_may_be_packed_and_multi_frame(tmp_path: Path, how: str) -> None:
    stored = np.random.default_rng(0).integers(0, 2000, (7, 20, 24)).astype(np.int16)
    files = write_series(tmp_path / "ct", stored, SPACING_MM, origin_mm=ORIGIN_MM)
    source = wrapped(files, tmp_path / "packed", how)
    (series,) = gpuprep.discover(source)
    values = labels()[:7]
    write(tmp_path / "seg.dcm", values, gpuprep.stack(series).slices)
    check_same(seg_points.of_seg(tmp_path / "seg.dcm"), seg_points.of_images(files, masks(values)))
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    referred = ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    frames = {
        f.DerivationImageSequence[0].SourceImageSequence[0].get("ReferencedFrameNumber"): float(
            f.PlanePositionSequence[0].ImagePositionPatient[2]
        )
        for f in ds.PerFrameFunctionalGroupsSequence
    }
    if how.startswith("enhanced"):
        order = [3, 0, 6, 2, 1, 5, 4]  # as `wrapped` arranges the frames
        assert [item.ReferencedSOPClassUID for item in referred] == [pydicom.uid.EnhancedCTImageStorage]
        assert frames == {order.index(k) + 1: ORIGIN_MM[2] + 3 * k for k in (2, 3, 5, 6)}
    else:
        assert len(referred) == 7
        assert set(frames) == {None}


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


def fails(error: type[GpuprepError], expected: str, call: Callable[[], object]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


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
        patch.setattr("gpuprep.output.dicom_seg.flush", full)
        fails(OutputError, "cannot be written: No space left", lambda: write(to, labels(), stacked.slices))
    assert to.read_bytes() == b"former"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct", "seg.dcm"]
    fails(OutputError, "cannot be written", lambda: write(tmp_path / "no" / "seg.dcm", labels(), stacked.slices))
    write(to, labels(), stacked.slices)
    assert pydicom.dcmread(to).Modality == "SEG"


def test_frames_of_several_files_are_referred_to(tmp_path: Path) -> None:
    files, _ = written(tmp_path / "ct")
    for n, part in enumerate((files[:4], files[4:])):
        enhanced(part, tmp_path / "enhanced" / f"{n}.dcm")
    (series,) = gpuprep.discover(tmp_path / "enhanced")
    write(tmp_path / "seg.dcm", labels(), gpuprep.stack(series).slices)
    check_same(seg_points.of_seg(tmp_path / "seg.dcm"), seg_points.of_images(files, masks(labels())))
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    assert len(ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 2
