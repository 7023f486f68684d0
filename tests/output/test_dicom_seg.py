"""DICOM SEG as other readers see it: voxels where the originals have them, and references to the originals."""

from __future__ import annotations

from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import seg_points
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset
from scipy.spatial.transform import Rotation
from seg_points import check_same
from seg_series import CASES, KINDS, NAMES, ORIGIN_MM, SHAPE, SPACING_MM, labels, masks, write, written
from segmentations import read
from test_sources import enhanced, wrapped

import gpuprep
from gpuprep.core.mask_options import Masks
from gpuprep.output.dicom_seg import Kind
from gpuprep.testing import write_series

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


@settings(max_examples=15)
@given(
    turn=st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: sum(v * v for v in q) > 0.01),
    spacing_mm=st.tuples(*[st.floats(0.3, 6)] * 3),
    origin_mm=st.tuples(*[st.floats(-500, 500)] * 3),
)
def test_any_orientation_spacing_and_origin_are_kept(
    tmp_path_factory: pytest.TempPathFactory,
    turn: tuple[float, ...],
    spacing_mm: tuple[float, float, float],
    origin_mm: tuple[float, float, float],
) -> None:
    folder = tmp_path_factory.mktemp("any")
    axes = Rotation.from_quat(turn).as_matrix()
    orientation = (*axes[:, 0].tolist(), *axes[:, 1].tolist())
    stored = np.zeros(SHAPE, np.int16)
    files = write_series(folder / "ct", stored, spacing_mm, origin_mm=origin_mm, orientation=orientation)
    (series,) = gpuprep.discover(folder / "ct")
    values = labels()
    assert write(folder / "seg.dcm", values, gpuprep.stack(series).slices) == ()
    check_same(seg_points.of_seg(folder / "seg.dcm"), seg_points.of_images(files, masks(values)))


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
    seg._db_con.close()  # or Python 3.13 warns at some later time


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


def test_frames_of_several_files_are_referred_to(tmp_path: Path) -> None:
    files, _ = written(tmp_path / "ct")
    for n, part in enumerate((files[:4], files[4:])):
        enhanced(part, tmp_path / "enhanced" / f"{n}.dcm")
    (series,) = gpuprep.discover(tmp_path / "enhanced")
    write(tmp_path / "seg.dcm", labels(), gpuprep.stack(series).slices)
    check_same(seg_points.of_seg(tmp_path / "seg.dcm"), seg_points.of_images(files, masks(labels())))
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    assert len(ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 2


def test_images_with_a_series_each_are_referred_to(tmp_path: Path) -> None:
    def change(ds: Dataset, k: int) -> None:
        ds.SeriesInstanceUID = f"1.2.3.{k}"

    files = write_series(tmp_path / "ct", np.zeros(SHAPE, np.int16), SPACING_MM, change=change)
    rules = gpuprep.Rules(group_by="folder")
    (series,) = gpuprep.discover(tmp_path / "ct", rules)
    write(tmp_path / "seg.dcm", labels(), gpuprep.stack(series, rules).slices)
    check_same(seg_points.of_seg(tmp_path / "seg.dcm"), seg_points.of_images(files, masks(labels())))
    found = {
        item.SeriesInstanceUID: [i.ReferencedSOPInstanceUID for i in item.ReferencedInstanceSequence]
        for item in pydicom.dcmread(tmp_path / "seg.dcm").ReferencedSeriesSequence
    }
    uids = [pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in files]
    assert found == {f"1.2.3.{k}": [uid] for k, uid in enumerate(uids)}
