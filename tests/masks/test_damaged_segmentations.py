"""Damaged segmentations that still name their series: the series is rejected, not converted without its masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian
from segmentations import read, write_rtstruct, write_seg
from test_convert_masks import LEFT, LEFT_BOX, ORIGIN_MM, RAW, SHAPE, SPACING_MM, Ct

import gpuprep
from gpuprep.core.geometry import Geometry
from gpuprep.errors import SegmentationError

PLACEHOLDER = b"7777.77"
"""Value in Contour Data that is replaced by one of `DAMAGE`, which have the same length."""

DAMAGE = {
    "NaN": b"NaN    ",
    "decimal-comma": b"-12,500",
    "empty-value": b"12\\\\34 ",
    "two-points": b"1.2.3  ",
    "words": b"eleven ",
    "too-far": b"1.0E+99",
}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Ct, Ct]:
    return Ct(tmp_path / "dicom" / "a"), Ct(tmp_path / "dicom" / "b", series_number=2)


def rois_with_placeholder() -> dict[str, Any]:
    odd = LEFT[1].copy()
    odd[2, 1] = float(PLACEHOLDER)
    return {"left": [LEFT[0], odd, LEFT[2]]}


def results(tmp_path: Path, masks: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    run = gpuprep.convert(tmp_path / "dicom", tmp_path / "out", RAW, masks=masks, backend="cpu")
    assert run.unmatched == ()
    return {Path(r.source).name: (r.status, r.codes) for r in run.results}


REJECTED = {"a": ("ok", ()), "b": ("rejected", ("mask-damaged",))}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_invalid_coordinates_reject_the_series_that_the_file_names(
    tmp_path: Path, pair: tuple[Ct, Ct], damage: bytes
) -> None:
    _, ct = pair
    (tmp_path / "masks").mkdir()
    path = write_rtstruct(
        tmp_path / "masks" / "rs.dcm", rois_with_placeholder(), series_uid=ct.uid, frame_uid=ct.frame_uid
    )
    content = path.read_bytes()
    assert content.count(PLACEHOLDER) == 1
    path.write_bytes(content.replace(PLACEHOLDER, damage))
    assert results(tmp_path, tmp_path / "masks") == REJECTED


@pytest.mark.parametrize("named", ["series", "listed images", "images of contours", "frame"])
def test_a_damaged_file_rejects_its_series_by_any_reference(tmp_path: Path, pair: tuple[Ct, Ct], named: str) -> None:
    _, ct = pair

    def change(ds: Dataset) -> None:
        image = Dataset()
        image.ReferencedSOPInstanceUID = ct.sop_uids[1]
        if named == "images of contours":
            for contour in ds.ROIContourSequence[0].ContourSequence:
                contour.ContourImageSequence = [image]
        if named in ("images of contours", "frame"):
            del ds.ReferencedFrameOfReferenceSequence
        ds.ROIContourSequence[0].ContourSequence[1].ContourGeometricType = "CLOSED_PLANAR"
        ds.ROIContourSequence[0].ContourSequence[1].ContourData = ["1", "2", "3", "4"]

    (tmp_path / "masks").mkdir()
    write_rtstruct(
        tmp_path / "masks" / "rs.dcm",
        {"left": LEFT},
        series_uid=ct.uid if named == "series" else "1.2.3.99",
        frame_uid=ct.frame_uid if named == "frame" else "1.2.3.98",
        sop_uids=ct.sop_uids if named == "listed images" else (),
        change=change,
    )
    assert results(tmp_path, tmp_path / "masks") == REJECTED


def grid() -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = np.diag(SPACING_MM)[::-1]
    affine[:3, 3] = ORIGIN_MM
    return Geometry(SHAPE, affine)


def test_a_segmentation_image_without_its_pixels_rejects_its_series(tmp_path: Path, pair: tuple[Ct, Ct]) -> None:
    _, ct = pair
    (tmp_path / "masks").mkdir()
    path = write_seg(tmp_path / "masks" / "seg.dcm", {"a": LEFT_BOX > 0}, grid(), series_uid=ct.uid)
    path.write_bytes(path.read_bytes()[:-20])
    assert results(tmp_path, tmp_path / "masks") == REJECTED


def test_lidc_xml_that_breaks_off_rejects_the_series_in_its_header(tmp_path: Path, pair: tuple[Ct, Ct]) -> None:
    _, ct = pair
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "069.xml").write_text(
        '<?xml version="1.0"?><LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader>'
        f"<SeriesInstanceUid>{ct.uid}</SeriesInstanceUid></ResponseHeader><readingSession><unblindedReadNodule>"
    )
    expected = {"a": ("ok", ()), "b": ("rejected", ("mask",))}
    assert results(tmp_path, tmp_path / "masks") == expected


def references(path: Path) -> tuple[tuple[str, ...], str, frozenset[str]]:
    """Return series UIDs, frame of reference UID and SOP Instance UIDs in the error of a damaged file."""
    with pytest.raises(SegmentationError) as caught:
        read(path)
    return caught.value.series_uids, caught.value.frame_of_reference_uid, caught.value.sop_uids


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_references_are_read_in_every_transfer_syntax(tmp_path: Path, syntax: Any) -> None:
    def change(ds: Dataset) -> None:
        ds.ROIContourSequence[0].ContourSequence[0].ContourData = ["1", "2", "3", "4"]

    path = write_rtstruct(
        tmp_path / "rs.dcm",
        {"a": LEFT},
        series_uid="1.2.9",
        frame_uid="1.2.8",
        sop_uids=["1.7"],
        syntax=syntax,
        change=change,
    )
    assert references(path) == (("1.2.9",), "1.2.8", frozenset({"1.7"}))


def test_a_file_cut_within_sequences_of_undefined_length_still_names_its_series(tmp_path: Path) -> None:
    # pydicom parses such sequences while it reads the file, and so fails for the whole file.
    def undefined(ds: Dataset) -> None:
        for keyword in ("ReferencedFrameOfReferenceSequence", "StructureSetROISequence", "ROIContourSequence"):
            ds[keyword].is_undefined_length = True

    path = write_rtstruct(
        tmp_path / "rs.dcm", {"a": LEFT}, series_uid="1.2.9", frame_uid="1.2.8", sop_uids=["1.7"], change=undefined
    )
    content = path.read_bytes()
    contours = content.index(bytes.fromhex("06303900"))
    for end in range(contours + 20, len(content) - 8, 7):
        path.write_bytes(content[:end])
        series, _, sops = references(path)
        assert (series, sops) == (("1.2.9",), frozenset({"1.7"}))


def test_a_file_without_references_has_none_in_its_error(tmp_path: Path) -> None:
    (tmp_path / "no.dcm").write_bytes(bytes(128) + b"DICM" + bytes(100))
    assert references(tmp_path / "no.dcm") == ((), "", frozenset())
