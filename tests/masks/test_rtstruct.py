"""Reading RT structure sets, and refusing damaged ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from conftest import encoded_natively
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from segmentations import check_truncations_are_refused, read, read_damaged, refused, setting, write_rtstruct

from gpuprep.errors import SegmentationError
from gpuprep.masks.model import Segmentation
from gpuprep.masks.rasterize import filled

SQUARE = [[0.5, 0.25, -3], [10.5, 0.25, -3], [10.5, 8.25, -3], [0.5, 8.25, -3]]
HOLE = [[3, 3, -3], [6, 3, -3], [6, 6, -3]]


def _offset(ds: Dataset, value: bytes) -> None:
    ds.ROIContourSequence[0].ContourSequence[0].ContourOffsetVector = value.decode().split("\\")


class TestReading:
    def test_contours_names_and_references_are_read(self, tmp_path: Path) -> None:
        rois: dict[str, list[Any]] = {"Lunge, rechts – groß": [SQUARE, HOLE, SQUARE], "empty": [], "GTV": [HOLE]}
        found = read(write_rtstruct(tmp_path / "rs.dcm", rois, series_uid="1.2.9", frame_uid="1.2.8", sop_uids=["1.7"]))
        assert [s.name for s in found.structures] == list(rois)
        assert [len(s.contours) for s in found.structures] == [3, 0, 1]
        outer, hole, _ = found.structures[0].contours
        assert outer.points.tolist() == SQUARE
        assert hole.points.tolist() == HOLE
        assert {(c.frame, c.rule, c.slice) for s in found.structures for c in s.contours} == {
            ("patient", "even-odd", None)
        }
        assert (found.format, found.series_uids, found.frame_of_reference_uid) == ("RTSTRUCT", ("1.2.9",), "1.2.8")
        assert found.sop_uids == {"1.7"}
        assert found.notes == ()

    def test_images_of_contours_are_collected(self, tmp_path: Path) -> None:
        def refer(ds: Dataset) -> None:
            for n, contour in enumerate(ds.ROIContourSequence[0].ContourSequence):
                image = Dataset()
                image.ReferencedSOPInstanceUID = f"1.2.{n // 2}"
                contour.ContourImageSequence = [image]

        found = read(write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE] * 4}, sop_uids=["1.9"], change=refer))
        assert found.sop_uids == {"1.2.0", "1.2.1", "1.9"}

    @pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "CLOSED_PLANAR_XOR"])
    def test_closed_contours_are_read_with_the_rule_of_their_type(self, tmp_path: Path, kind: str) -> None:
        (contour,) = read(write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE]}, kind=kind)).structures[0].contours
        assert contour.rule == ("even-odd" if kind == "CLOSED_PLANAR" else "xor")

    @pytest.mark.parametrize("kind", ["POINT", "OPEN_PLANAR", "OPEN_NONPLANAR"])
    def test_open_contours_are_left_out_with_a_note(self, tmp_path: Path, kind: str) -> None:
        def open_two(ds: Dataset) -> None:
            for contour in ds.ROIContourSequence[0].ContourSequence[:2]:
                contour.ContourGeometricType = kind

        found = read(write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE, SQUARE, HOLE]}, change=open_two))
        assert [c.points.tolist() for c in found.structures[0].contours] == [HOLE]
        assert found.notes == (f"ROI 'a': 2 contours left out: {kind}",)

    def test_an_unknown_contour_type_is_not_shown_in_the_note(self, tmp_path: Path) -> None:
        found = read(write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE]}, kind="DOE JANE"))
        assert found.notes == ("ROI 'a': 1 contours left out: no known type",)

    def test_contours_of_fewer_than_three_points_are_left_out_with_a_note(self, tmp_path: Path) -> None:
        found = read(write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE[:2], SQUARE]}))
        assert len(found.structures[0].contours) == 1
        assert found.notes == ("ROI 'a': 1 contours left out: fewer than 3 points",)

    def test_a_wrong_number_of_points_is_noted(self, tmp_path: Path) -> None:
        def miscount(ds: Dataset) -> None:
            ds.ROIContourSequence[0].ContourSequence[0].NumberOfContourPoints = 5

        found = read(write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE, HOLE]}, change=miscount))
        assert len(found.structures[0].contours) == 2
        assert found.notes == ("ROI 'a': 1 contour with a wrong Number of Contour Points",)

    def test_contour_offset_vector_moves_its_contour(self, tmp_path: Path) -> None:
        def offset(ds: Dataset) -> None:
            first, second, _ = ds.ROIContourSequence[0].ContourSequence
            first.ContourSlabThickness = "3"
            first.ContourOffsetVector = ["0", "-0.5", "6"]
            second.ContourOffsetVector = ["0", "0", "0"]

        found = read(write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE, SQUARE, HOLE]}, change=offset))
        first, second, third = found.structures[0].contours
        assert first.points.tolist() == [[x, y - 0.5, z + 6] for x, y, z in SQUARE]
        assert [second.points.tolist(), third.points.tolist()] == [SQUARE, HOLE]
        assert found.notes == ("ROI 'a': 1 contour moved by Contour Offset Vector",)

    @pytest.mark.parametrize("value", [b"0\\6", b"0\\0\\NaN", b"0\\0\\six", b"0\\0\\1E99"])
    def test_an_invalid_contour_offset_vector_is_refused(self, tmp_path: Path, value: bytes) -> None:
        path = write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE]}, change=lambda ds: _offset(ds, b"0\\0\\777777"))
        padded = value.ljust(10)
        content = path.read_bytes()
        assert b"0\\0\\777777" in content
        path.write_bytes(content.replace(b"0\\0\\777777", padded[:10]))
        assert "Contour Offset Vector" in refused(path)

    def test_equal_names_get_their_number_and_missing_ones_a_default(self, tmp_path: Path) -> None:
        def rename(ds: Dataset) -> None:
            for item, name in zip(ds.StructureSetROISequence, ["GTV", "GTV ", "", "GTV (1)"], strict=True):
                item.ROIName = name

        found = read(write_rtstruct(tmp_path / "rs.dcm", {n: [SQUARE] for n in "abcd"}, change=rename))
        assert [s.name for s in found.structures] == ["GTV (1) (1)", "GTV (2)", "ROI 3", "GTV (1)"]

    def test_an_roi_without_description_is_named_by_its_number(self, tmp_path: Path) -> None:
        def forget(ds: Dataset) -> None:
            del ds.StructureSetROISequence[1]

        found = read(write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE], "b": [HOLE]}, change=forget))
        assert [(s.name, len(s.contours)) for s in found.structures] == [("a", 1), ("ROI 2", 1)]

    def test_each_roi_keeps_its_frame_of_reference(self, tmp_path: Path) -> None:
        def move(ds: Dataset) -> None:
            ds.StructureSetROISequence[1].ReferencedFrameOfReferenceUID = "1.2.77"

        found = read(write_rtstruct(tmp_path / "rs.dcm", {n: [SQUARE] for n in "abc"}, frame_uid="1.2.8", change=move))
        assert found.frame_of_reference_uid == "1.2.8"
        assert [s.frame_of_reference_uid for s in found.structures] == ["1.2.8", "1.2.77", "1.2.8"]
        assert found.series_by_frame == {"1.2.8": {"1.2.3.4"}}
        assert found.notes == ()

    def test_a_structure_set_without_references_is_read(self, tmp_path: Path) -> None:
        def forget(ds: Dataset) -> None:
            del ds.ReferencedFrameOfReferenceSequence
            ds.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = ""

        found = read(write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE]}, change=forget))
        assert (found.series_uids, found.frame_of_reference_uid, found.sop_uids) == ((), "", frozenset())
        assert len(found.structures[0].contours) == 1

    @pytest.mark.parametrize(
        "syntax",
        [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
        ids=lambda s: str(s.name),
    )
    @pytest.mark.parametrize("meta", [True, False], ids=["meta", "bare"])
    def test_every_native_transfer_syntax_is_read(self, tmp_path: Path, syntax: Any, meta: bool) -> None:
        if syntax == DeflatedExplicitVRLittleEndian and not meta:
            pytest.skip("without a meta group, nothing states that it is deflated")
        written = pydicom.dcmread(write_rtstruct(tmp_path / "plain.dcm", {"ä": [SQUARE]}))
        path = tmp_path / "rs.dcm"
        path.write_bytes(encoded_natively(written, syntax, meta=meta))
        structure = read(path).structures[0]
        assert structure.name == "ä"
        assert structure.contours[0].points.tolist() == SQUARE

    def test_sequences_of_undefined_length_are_read(self, tmp_path: Path) -> None:
        def undefined(ds: Dataset) -> None:
            ds["ROIContourSequence"].is_undefined_length = True
            for item in ds.ROIContourSequence:
                item.is_undefined_length_sequence_item = True

        found = read(write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE], "b": [HOLE]}, change=undefined))
        assert [s.contours[0].points.tolist() for s in found.structures] == [SQUARE, HOLE]

    def test_importing_the_reader_does_not_import_pydicom(self) -> None:
        code = "import sys, gpuprep.masks.formats.dicom_objects; sys.exit('pydicom' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def with_contour_data(path: Path, data: bytes) -> Path:
    """Write a structure set whose second contour has `data` as its Contour Data."""
    placeholder = b"\\".join([b"1234.5"] * 12)
    write_rtstruct(path, {"GTV": [SQUARE, np.full((4, 3), 1234.5)]})
    content = path.read_bytes()
    assert content.count(placeholder) == 1
    path.write_bytes(content.replace(placeholder, data.ljust(len(placeholder))))
    return path


def at_depth(calls: int, function: Callable[[], str]) -> str:
    """Call a function with `calls` more frames on the call stack."""
    return at_depth(calls - 1, function) if calls else function()


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "value", "shown"),
        [
            (b"1\\2\\3\\x\\5\\6\\7\\8\\9", 4, "x"),
            (b"1\\2\\nan\\4\\5\\6\\7\\8\\9", 3, "nan"),
            (b"inf\\2\\3\\4\\5\\6\\7\\8\\9", 1, "inf"),
            (b"1\\2\\3\\4\\5\\6\\7\\8\\1e400", 9, "1e400"),
            (b"1\\2\\3\\4\\5\\6\\7\\8\\-1000001", 9, "-1000001"),
            (b"1\\1_0\\3\\4\\5\\6\\7\\8\\9", 2, "1_0"),
            (b"1\\2\\3\\4\\\\6\\7\\8\\9", 5, ""),
            (b"1\\2\\3\\4,5\\5\\6\\7\\8\\9", 4, "4,5"),
            (b"1\\2\\3\\\xff\xfe\\5\\6\\7\\8\\9", 4, "ÿþ"),
        ],
    )
    def test_an_invalid_coordinate_is_named_with_its_place(
        self, tmp_path: Path, data: bytes, value: int, shown: str
    ) -> None:
        text = refused(with_contour_data(tmp_path / "rs.dcm", data))
        assert f"ROI 'GTV', contour 2, value {value} of 9: '{shown}' is no coordinate" in text

    def test_an_incomplete_point_is_refused(self, tmp_path: Path) -> None:
        assert "contour 2: 8 values are no points" in refused(
            with_contour_data(tmp_path / "rs.dcm", b"1\\2\\3\\4\\5\\6\\7\\8")
        )

    @pytest.mark.parametrize(("data", "count"), [(b"", 0), (b"1\\2\\3\\4\\5\\6", 2)])
    def test_empty_and_short_contour_data_are_noted(self, tmp_path: Path, data: bytes, count: int) -> None:
        found = read(with_contour_data(tmp_path / "rs.dcm", data))
        assert len(found.structures[0].contours) == 1
        assert "ROI 'GTV': 1 contours left out: fewer than 3 points" in found.notes
        assert count < 3

    def test_two_rois_of_one_number_are_refused(self, tmp_path: Path) -> None:
        def clash(ds: Dataset) -> None:
            ds.StructureSetROISequence[1].ROINumber = 1

        path = write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE], "b": [HOLE]}, change=clash)
        assert "two ROIs, 'a' and 'b', have the number 1" in refused(path)

    def test_contours_without_roi_number_are_refused(self, tmp_path: Path) -> None:
        def forget(ds: Dataset) -> None:
            del ds.ROIContourSequence[1].ReferencedROINumber

        path = write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE], "b": [HOLE]}, change=forget)
        assert "do not say to which ROI" in refused(path)

    def test_a_structure_set_without_contours_is_refused(self, tmp_path: Path) -> None:
        def forget(ds: Dataset) -> None:
            del ds.ROIContourSequence

        assert "names 1 ROIs and has contours of 0" in refused(
            write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE]}, change=forget)
        )

    @pytest.mark.parametrize(
        ("uid", "name"),
        [
            ("1.2.840.10008.5.1.4.1.1.2", "CT Image Storage"),
            ("1.2.840.10008.5.1.4.1.1.66.5", "Surface Segmentation Storage"),
            ("1.2.3.4", "an object of an unknown SOP class"),
        ],
    )
    def test_other_dicom_objects_are_refused_by_name(self, tmp_path: Path, uid: str, name: str) -> None:
        path = write_rtstruct(tmp_path / "rs.dcm", {}, change=setting(SOPClassUID=uid))
        assert refused(path).startswith(f"{name} cannot be read as a segmentation")

    def test_every_truncated_file_is_refused(self, tmp_path: Path) -> None:
        whole = write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE, HOLE], "b": [HOLE]}).read_bytes()
        check_truncations_are_refused(tmp_path / "cut.dcm", whole)

    @pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"no DICOM at all\n" * 50, b"PK\3\4" * 100])
    def test_files_that_are_not_dicom_are_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x").write_bytes(content)
        assert "not DICOM" in refused(tmp_path / "x")

    def test_missing_files_and_folders_are_refused(self, tmp_path: Path) -> None:
        assert refused(tmp_path / "absent") == "it cannot be read: No such file or directory"
        assert refused(tmp_path) == "not a regular file"

    def test_deeply_nested_sequences_are_refused(self, tmp_path: Path) -> None:
        head = b"\x08\x00\x16\x00UI\x1e\x001.2.840.10008.5.1.4.1.1.481.3\0"
        level = b"\x06\x30\x39\x00SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
        (tmp_path / "deep").write_bytes(head + level * 20_000)
        for calls in range(12):  # the error depends on the function of pydicom that exceeds the recursion limit
            assert "nested too deeply" in at_depth(calls, lambda: refused(tmp_path / "deep"))

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_a_damaged_file_is_read_or_refused(self, tmp_path: Path, data: st.DataObject) -> None:
        path = write_rtstruct(tmp_path / "rs.dcm", {"a": [SQUARE, HOLE], "b": []}, sop_uids=["1.2"])
        if found := read_damaged(path, data):
            assert all(c.points.shape[1] == 3 for s in found.structures for c in s.contours)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.binary(max_size=300), st.booleans())
    def test_random_bytes_are_refused(self, tmp_path: Path, content: bytes, preamble: bool) -> None:
        path = tmp_path / "x"
        path.write_bytes(bytes(128) + b"DICM" + content if preamble else content)
        with pytest.raises(SegmentationError):
            read(path)


def slices(folder: Path) -> list[Dataset]:
    """Return the axial slices of a folder from the feet to the head."""
    return sorted(
        (pydicom.dcmread(p, stop_before_pixels=True) for p in folder.iterdir()),
        key=lambda ds: float(ds.ImagePositionPatient[2]),
    )


def rasterized(found: Segmentation, images: list[Dataset]) -> NDArray[np.bool_]:
    """Return the mask of the first structure of a file on axial slices."""
    volume = np.zeros((len(images), images[0].Rows, images[0].Columns), dtype=bool)
    z = np.array([float(ds.ImagePositionPatient[2]) for ds in images])
    by_slice: dict[int, list[NDArray[np.float64]]] = {}
    for contour in found.structures[0].contours:
        k = int(np.abs(z - contour.points[0, 2]).argmin())
        assert np.abs(contour.points[:, 2] - z[k]).max() < 0.01
        origin = np.array(images[k].ImagePositionPatient[:2], dtype=float)
        by_slice.setdefault(k, []).append((contour.points[:, :2] - origin) / np.array(images[k].PixelSpacing)[::-1])
    for k, polygons in by_slice.items():
        volume[k] = filled(polygons, volume.shape[1:])
    return volume


class TestRealFiles:
    @pytest.mark.parametrize(
        ("patient", "contours"), [("STS_002", 16), ("STS_008", 19), ("STS_019", 15), ("STS_042", 18)]
    )
    def test_masks_of_ibsi_equal_the_published_ones(self, data: Path, patient: str, contours: int) -> None:
        folder = data / "ibsi-sts-4" / "dicom" / patient / "CT"
        found = read(folder / "mask" / "RS.dcm")
        assert [(s.name, len(s.contours)) for s in found.structures] == [("GTV_Mass_CT", contours)]
        images = slices(folder / "image")
        assert found.series_uids == (images[0].SeriesInstanceUID,)
        assert found.frame_of_reference_uid == images[0].FrameOfReferenceUID
        truth = sitk.ReadImage(str(data / "ibsi-sts-4" / "nifti" / patient / "CT_mask.nii.gz"))
        np.testing.assert_allclose(truth.GetOrigin(), images[0].ImagePositionPatient, atol=1e-3)
        np.testing.assert_array_equal(rasterized(found, images), sitk.GetArrayFromImage(truth) != 0)

    @pytest.mark.parametrize(
        "name",
        [
            "4dlung-113-crop/**/*47.35/1-1.dcm",
            "rtutils-phantom/mock_data/rt.dcm",
            "rtutils-phantom/mock_data/invalid_reference_rt.dcm",
            "rtutils-phantom/mock_data/non_existent_reference_rt.dcm",
            "rtutils-phantom/empty/dummy_rt.dcm",
        ],
    )
    def test_points_are_those_of_pydicom(self, data: Path, name: str) -> None:
        (path,) = data.glob(name)
        found = read(path)
        ds = pydicom.dcmread(path, force=True)
        assert [s.name for s in found.structures] == [item.ROIName for item in ds.StructureSetROISequence]
        numbers = [item.ROINumber for item in ds.StructureSetROISequence]
        rois = {item.ReferencedROINumber: item for item in ds.ROIContourSequence}
        for number, structure in zip(numbers, found.structures, strict=True):
            expected = [np.array(c.ContourData, dtype=float).reshape(-1, 3) for c in rois[number].ContourSequence]
            assert [c.points.tolist() for c in structure.contours] == [e.tolist() for e in expected]
        assert found.notes == ()

    def test_contours_of_4dlung_lie_on_its_slices(self, data: Path) -> None:
        (path,) = data.glob("4dlung-113-crop/**/*47.35/1-1.dcm")
        (images,) = data.glob("4dlung-113-crop/**/*29543")
        z = np.array([float(ds.ImagePositionPatient[2]) for ds in slices(images)])
        found = read(path)
        assert {s.name: len(s.contours) for s in found.structures} == {
            "Tumor_c40": 28,
            "LN_c40": 21,
            "Carina_c40": 1,
            "Vertebra_c40": 5,
        }
        heights = np.array([c.points[0, 2] for s in found.structures for c in s.contours])
        inside = heights[(heights > z[0] - 1) & (heights < z[-1] + 1)]  # the series was cropped
        assert len(inside)
        assert np.abs(inside[:, None] - z).min(axis=1).max() < 0.01
