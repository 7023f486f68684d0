"""ROIs in several frames of reference: each is painted only on the series in whose frame it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset
from segmentations import write_rtstruct, write_seg
from test_convert_masks import LEFT, LEFT_BOX, ORIGIN_MM, RAW, RIGHT, RIGHT_BOX, SHAPE, SPACING_MM, Ct, volume

import gpuprep
from gpuprep import Masks
from gpuprep.core.geometry import Geometry
from gpuprep.output.records import SeriesResult

PER_ROI = replace(RAW, masks=Masks(layout="per-roi"))
UNKNOWN_FRAME = "1.2.840.99.77"
"""Frame of reference that no image has."""


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Ct, Ct]:
    """Return two series of one patient; the second is shifted by 3 rows, 3 columns and 1 slice in its own frame."""
    moved = (ORIGIN_MM[0] + 3, ORIGIN_MM[1] + 3, ORIGIN_MM[2] + 2)
    return Ct(tmp_path / "dicom" / "a"), Ct(tmp_path / "dicom" / "b", origin_mm=moved, series_number=2)


def write(
    path: Path, ct: Ct, frames: dict[str, str], rois: dict[str, Any], series: Mapping[str, Sequence[str]]
) -> Path:
    """Write a structure set with the given frame of each ROI, and the given series listed under each frame."""

    def change(ds: Dataset) -> None:
        for item in ds.StructureSetROISequence:
            item.ReferencedFrameOfReferenceUID = frames[item.ROIName]
        ds.ReferencedFrameOfReferenceSequence = [_listed(frame, uids) for frame, uids in series.items()]

    return write_rtstruct(path, rois, series_uid=ct.uid, change=change)


def _listed(frame: str, uids: Sequence[str]) -> Dataset:
    item, study = Dataset(), Dataset()
    item.FrameOfReferenceUID = frame
    study.RTReferencedSeriesSequence = []
    for uid in uids:
        series = Dataset()
        series.SeriesInstanceUID = uid
        study.RTReferencedSeriesSequence.append(series)
    item.RTReferencedStudySequence = [study]
    return item


def convert(tmp_path: Path, masks: Path, recipe: gpuprep.Recipe = PER_ROI) -> dict[str, SeriesResult]:
    run = gpuprep.convert(tmp_path / "dicom", tmp_path / "out", recipe, masks=masks, backend="cpu")
    return {Path(r.source).name: r for r in run.results}


def painted(tmp_path: Path, result: SeriesResult) -> dict[str, NDArray[np.bool_]]:
    folder = tmp_path / "out" / result.folder
    return {label["name"]: volume(folder / label["file"]) > 0 for label in result.labels or ()}


def test_each_series_gets_the_rois_of_its_own_frame(tmp_path: Path, pair: tuple[Ct, Ct]) -> None:
    a, b = pair
    frames = {"A": a.frame_uid, "B": b.frame_uid, "A2": a.frame_uid}
    lists = {a.frame_uid: [a.uid], b.frame_uid: [b.uid]}
    found = convert(tmp_path, write(tmp_path / "rs.dcm", a, frames, {"A": LEFT, "B": LEFT, "A2": RIGHT}, lists))
    on_a, on_b = painted(tmp_path, found["a"]), painted(tmp_path, found["b"])
    assert (set(on_a), set(on_b)) == ({"A", "A2"}, {"B"})
    np.testing.assert_array_equal(on_a["A"], LEFT_BOX > 0)
    np.testing.assert_array_equal(on_a["A2"], RIGHT_BOX > 0)
    expected = np.zeros(SHAPE, bool)
    expected[0:3, 2:7, 2:7] = True  # slices 1 to 3, rows and columns 5 to 9 of the first series
    np.testing.assert_array_equal(on_b["B"], expected)
    words = "left out, it is drawn in another frame of reference than that of the series"
    assert found["a"].warnings == (f"rs.dcm: B: {words}",)
    assert found["b"].warnings == (f"rs.dcm: A: {words}", f"rs.dcm: A2: {words}")


def test_rois_in_the_frame_of_an_absent_series_are_left_out_even_if_most_are_in_it(tmp_path: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "a")
    frames = {"A": ct.frame_uid, "B": UNKNOWN_FRAME, "C": UNKNOWN_FRAME, "D": UNKNOWN_FRAME}
    rois = {"A": LEFT, "B": RIGHT, "C": RIGHT, "D": []}
    found = convert(tmp_path, write(tmp_path / "rs.dcm", ct, frames, rois, {ct.frame_uid: [ct.uid]}))["a"]
    assert set(painted(tmp_path, found)) == {"A"}
    notes = " | ".join(found.warnings)
    assert "B: left out, it is drawn in another frame" in notes
    assert "C: left out, it is drawn in another frame" in notes
    assert "D: left out" not in notes  # nothing is drawn in it
    assert "rs.dcm has another frame" not in notes


def test_a_replaced_frame_that_all_rois_share_is_accepted_with_a_warning(tmp_path: Path) -> None:
    # As after anonymisation: no ROI is in the frame of the images.
    ct = Ct(tmp_path / "dicom" / "a")
    frames = {"A": UNKNOWN_FRAME, "B": UNKNOWN_FRAME}
    for lists in ({UNKNOWN_FRAME: [ct.uid]}, {ct.frame_uid: [ct.uid]}, {"": [ct.uid]}):
        path = write(tmp_path / "rs.dcm", ct, frames, {"A": LEFT, "B": RIGHT}, lists)
        found = convert(tmp_path, path)["a"]
        masks = painted(tmp_path, found)
        np.testing.assert_array_equal(masks["A"], LEFT_BOX > 0)
        np.testing.assert_array_equal(masks["B"], RIGHT_BOX > 0)
        assert found.warnings == ("rs.dcm has another frame of reference than the series",)


def test_of_two_replaced_frames_the_one_that_lists_the_series_is_taken(tmp_path: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "a")
    lists = {UNKNOWN_FRAME: ["1.2.3.99"], UNKNOWN_FRAME + ".1": [ct.uid]}
    path = write(
        tmp_path / "rs.dcm", ct, {"A": UNKNOWN_FRAME + ".1", "B": UNKNOWN_FRAME}, {"A": LEFT, "B": LEFT}, lists
    )
    found = convert(tmp_path, path)["a"]
    assert set(painted(tmp_path, found)) == {"A"}
    assert "B: left out, it is drawn in another frame of reference" in found.warnings[0]
    assert "rs.dcm has another frame of reference than the series" in found.warnings


def test_a_listed_series_without_rois_in_its_frame_gets_no_labels(tmp_path: Path, pair: tuple[Ct, Ct]) -> None:
    a, b = pair
    lists = {a.frame_uid: [a.uid], b.frame_uid: [b.uid]}
    found = convert(tmp_path, write(tmp_path / "rs.dcm", a, {"A": a.frame_uid}, {"A": LEFT}, lists), RAW)
    assert found["a"].labels
    assert not found["b"].labels
    assert any("nothing is drawn on it" in note for note in found["b"].warnings)


def test_ambiguous_frames_reject_the_series(tmp_path: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "a")
    path = write(tmp_path / "rs.dcm", ct, {"A": UNKNOWN_FRAME, "B": "1.2.5"}, {"A": LEFT, "B": LEFT}, {"": [ct.uid]})
    found = convert(tmp_path, path)["a"]
    assert (found.status, found.codes) == ("rejected", ("mask-frame",))
    assert "rs.dcm: its ROIs have 2 frames of reference, none of which is that of the series" in found.reason


def test_an_roi_without_frame_is_painted(tmp_path: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "a")
    frames = {"A": "", "B": ct.frame_uid, "C": UNKNOWN_FRAME}
    path = write(tmp_path / "rs.dcm", ct, frames, dict.fromkeys("ABC", LEFT), {ct.frame_uid: [ct.uid]})
    assert set(painted(tmp_path, convert(tmp_path, path)["a"])) == {"A", "B"}


def test_a_seg_in_another_frame_that_names_the_series_is_painted_with_a_warning(tmp_path: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "a")
    step, row, column = np.diag(SPACING_MM)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([step, row, column], axis=1)[::-1]
    affine[:3, 3] = ORIGIN_MM
    path = tmp_path / "seg.dcm"
    write_seg(path, {"A": LEFT_BOX > 0}, Geometry(SHAPE, affine), series_uid=ct.uid, frame_uid=UNKNOWN_FRAME)
    found = convert(tmp_path, path)["a"]
    np.testing.assert_array_equal(painted(tmp_path, found)["A"], LEFT_BOX > 0)
    assert found.warnings == ("seg.dcm has another frame of reference than the series",)
