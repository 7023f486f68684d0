"""Matching of segmentations to volumes by images, series, frame of reference and study."""

from __future__ import annotations

import gzip
import json
import sqlite3
import zipfile
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import Dataset, Sequence
from pydicom.uid import UID, CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage
from segmentations import write_rtstruct, write_seg
from test_convert_masks import SPACING_MM
from test_sources import enhanced
from typer.testing import CliRunner

import gpuprep
from gpuprep import Recipe
from gpuprep.cli.app import app
from gpuprep.core.geometry import Geometry
from gpuprep.dicom.discover import discover
from gpuprep.pipeline.events import Listener
from gpuprep.pipeline.scan import scan
from gpuprep.testing import write_series

ORIGIN_MM = (-10.0, -20.0, 30.0)
FEW = (4, 8, 10)
GRID = Geometry(FEW, np.array([[0, 0, 1, -10], [0, 1, 0, -20], [2, 0, 0, 30], [0, 0, 0, 1.0]]))
ABSENT = ["1.2.99.1", "1.2.99.2"]
"""SOP Instance UIDs of absent images."""


def images(
    folder: Path, first: int, *, series: str = "1.2.1", study: str = "1.2.8", frame: str = "1.2.7", **tags: Any
) -> list[str]:
    """Write four slices with SOP Instance UIDs numbered from `first`; return the UIDs."""
    uids = [f"1.2.5.{first + k}" for k in range(FEW[0])]

    def change(ds: Dataset, k: int) -> None:
        ds.StudyInstanceUID, ds.FrameOfReferenceUID = study, frame
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(uids[k])
        for keyword, value in tags.items():
            setattr(ds, keyword, value)
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID

    stored = np.arange(np.prod(FEW), dtype=np.int16).reshape(FEW)
    for file in write_series(folder, stored, SPACING_MM, series_uid=series, origin_mm=ORIGIN_MM, change=change):
        file.rename(file.with_name(f"{first}-{file.name}"))
    return uids


def structures(
    path: Path,
    *,
    series: str = "1.2.1",
    study: str = "",
    frame: str = "",
    listed: Iterable[str] = (),
    drawn_on: Iterable[str] = (),
    number: int = 0,
) -> Path:
    """Write a structure set with one contour per image in `drawn_on`, or one contour that names no image."""
    drawn_on = list(drawn_on)

    def change(ds: Dataset) -> None:
        contours = ds.ROIContourSequence[0].ContourSequence
        for contour, uid in zip(contours, drawn_on, strict=False):
            contour.ContourImageSequence = Sequence([reference(uid, number)])
        referenced = ds.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
        referenced.ReferencedSOPInstanceUID = study
        if not series:
            del ds.ReferencedFrameOfReferenceSequence

    square = [(-8.0, -18.0, 32.0), (-4.0, -18.0, 32.0), (-4.0, -14.0, 32.0), (-8.0, -14.0, 32.0)]
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_rtstruct(
        path, {"a": [square] * max(1, len(drawn_on))}, series_uid=series, frame_uid=frame, sop_uids=list(listed),
        change=change,
    )  # fmt: skip


def segments(
    path: Path,
    *,
    series: str = "1.2.1",
    study: str = "",
    frame: str = "",
    listed: Iterable[str] = (),
    drawn_on: Iterable[str] = (),
    number: int = 0,
) -> Path:
    """Write a SEG with two marked and two empty frames, derived from the images in `drawn_on`."""
    drawn_on = list(drawn_on)

    def change(ds: Dataset) -> None:
        ds.StudyInstanceUID = study
        referenced = Sequence([reference(uid) for uid in listed])
        ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence = referenced
        if not series:
            del ds.ReferencedSeriesSequence
        for n, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
            if drawn_on:  # references of empty frames must be ignored
                uid = drawn_on[n % len(drawn_on)] if n < 2 else "1.2.5.9999"
                source = Dataset()
                source.SourceImageSequence = Sequence([reference(uid, number)])
                group.DerivationImageSequence = Sequence([source])

    mask = np.zeros(FEW, bool)
    mask[:2, 2:5, 3:6] = True
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_seg(path, {"a": mask}, GRID, sparse=False, series_uid=series, frame_uid=frame, change=change)


def reference(uid: str, number: int = 0) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, uid
    if number:
        item.ReferencedFrameNumber = number
    return item


both_kinds = pytest.mark.parametrize("write", [structures, segments], ids=["RTSTRUCT", "SEG"])
Write = Callable[..., Path]


class Unmatched(Listener):
    """Records the reports about segmentations without a series."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.unused: list[str] = []

    def matched(self, matched: Any) -> None:
        self.complaints = [why for _, why in matched.complaints]
        self.unused = [why for _, why in matched.unused]


def matches(folder: Path, masks: Any) -> tuple[dict[str, tuple[str, ...]], Unmatched]:
    """Return the codes of volumes with segmentations by their first SOP Instance UID, and the unmatched ones."""
    unmatched = Unmatched()
    found = scan(folder, masks=masks, listener=unmatched)
    matched = [o for o in found.planned if o.segmentations]
    return {min(s.sop_instance_uid for s in o.series.slices): o.codes for o in matched}, unmatched


def volumes(folder: Path, masks: Any) -> set[str]:
    return set(matches(folder, masks)[0])


# Volumes that share a Series Instance UID


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Three patients with the same Series Instance UID but different frames of reference and studies."""
    for n in (1, 2, 3):
        images(tmp_path / "ct" / f"p{n}", 100 * n, study=f"1.2.8.{n}", frame=f"1.2.7.{n}", PatientID=f"P{n}")
    return tmp_path / "ct"


@pytest.fixture
def phases(tmp_path: Path) -> Path:
    """Three acquisitions of one series at the same positions."""
    for n in (1, 2, 3):
        images(tmp_path / "ct", 100 * n, AcquisitionNumber=n)
    assert len(discover(tmp_path / "ct")) == 3
    return tmp_path / "ct"


@both_kinds
@pytest.mark.parametrize("cohort", ["patients", "phases"])
@pytest.mark.parametrize("how", ["drawn_on", "listed"])
@pytest.mark.parametrize("n", [1, 3])
def test_masks_go_to_the_volume_whose_images_they_name_if_volumes_share_a_series_uid(
    tmp_path: Path, request: pytest.FixtureRequest, cohort: str, write: Write, how: str, n: int
) -> None:
    folder = request.getfixturevalue(cohort)
    named: dict[str, Any] = {how: [f"1.2.5.{100 * n + 1}"]}
    path = write(
        tmp_path / "seg.dcm", frame="1.2.7.1", study="1.2.8.1", **named
    )  # both have lower priority than the images
    assert volumes(folder, path) == {f"1.2.5.{100 * n}"}


@both_kinds
def test_images_drawn_on_have_priority_over_a_list_of_all_images(tmp_path: Path, phases: Path, write: Write) -> None:
    everything = [f"1.2.5.{100 * n + k}" for n in (1, 2, 3) for k in range(4)]
    path = write(tmp_path / "seg.dcm", listed=everything, drawn_on=["1.2.5.202"])
    assert volumes(phases, path) == {"1.2.5.200"}
    assert volumes(phases, write(path, listed=everything)) == {"1.2.5.100", "1.2.5.200", "1.2.5.300"}


@both_kinds
def test_each_volume_whose_images_are_named_gets_the_masks(tmp_path: Path, phases: Path, write: Write) -> None:
    path = write(tmp_path / "seg.dcm", drawn_on=["1.2.5.101", "1.2.5.303"])
    found, _ = matches(phases, path)
    assert set(found) == {"1.2.5.100", "1.2.5.300"}
    assert not any("mask-volumes" in codes for codes in found.values())


@both_kinds
def test_if_the_named_images_are_absent_the_frame_of_reference_decides(
    tmp_path: Path, patients: Path, write: Write
) -> None:
    path = write(tmp_path / "seg.dcm", frame="1.2.7.2", listed=ABSENT, drawn_on=ABSENT)
    assert volumes(patients, path) == {"1.2.5.200"}


@both_kinds
def test_if_frames_of_reference_are_equal_the_study_decides(tmp_path: Path, write: Write) -> None:
    # Two studies as two volumes, here with different pixel spacings.
    images(tmp_path / "ct" / "a", 100, study="1.2.8.1")
    images(tmp_path / "ct" / "b", 200, study="1.2.8.2", PixelSpacing=["0.5", "0.5"])
    path = write(tmp_path / "seg.dcm", frame="1.2.7", study="1.2.8.2", drawn_on=ABSENT)
    assert volumes(tmp_path / "ct", path) == {"1.2.5.200"}
    found, unmatched = matches(tmp_path / "ct", write(path, frame="1.2.7", study="1.2.8.77"))
    assert not found
    assert "2 volumes in different studies or frames of reference" in unmatched.complaints[0]


@both_kinds
def test_a_series_uid_of_several_patients_alone_matches_no_volume(tmp_path: Path, patients: Path, write: Write) -> None:
    path = write(tmp_path / "seg.dcm", frame="1.2.7.77", study="1.2.8.77", listed=ABSENT)
    found, unmatched = matches(patients, path)
    assert not found
    (why,) = unmatched.complaints
    assert "it refers to series 1.2.1, which is 3 volumes in different studies or frames of reference here" in why
    assert "gpuprep mask FILE --series DICOM_DIR" in why
    # In a run over the folder of one patient, only that patient matches.
    assert volumes(patients / "p2", path) == {"1.2.5.200"}


@both_kinds
def test_a_series_uid_of_several_phases_alone_matches_all_with_a_warning(
    tmp_path: Path, phases: Path, write: Write
) -> None:
    path = write(tmp_path / "seg.dcm", frame="1.2.7", study="1.2.8", listed=ABSENT)
    found, _ = matches(phases, path)
    assert set(found) == {"1.2.5.100", "1.2.5.200", "1.2.5.300"}
    assert all(codes == ("acquisitions", "mask-volumes") for codes in found.values())


def test_the_warning_is_in_the_output_and_on_the_screen(tmp_path: Path, phases: Path) -> None:
    path = structures(tmp_path / "rs.dcm", frame="1.2.7")
    text = "rs.dcm names the series and none of its images: its structures are on each of the 3 volumes of the series"
    shown = CliRunner().invoke(
        app, ["convert", str(phases), "--masks", str(path), "--out", str(tmp_path / "o"), "--dry-run", "--json"]
    )
    assert [o["warnings"] for o in json.loads(shown.stdout)["series"]] == [[text]] * 3
    recipe = Recipe(spacing_mm=None, size=None, format="npy")
    run = gpuprep.convert(phases, tmp_path / "out", recipe, masks=path, backend="cpu")
    assert run.counts == {"fixed": 3}
    for result in run.results:
        sidecar = json.loads((tmp_path / "out" / result.folder / "volume.json").read_text())
        assert text in sidecar["warnings"]
        assert "mask-volumes" in sidecar["codes"]
        assert result.codes == tuple(sidecar["codes"])


@both_kinds
@pytest.mark.parametrize("phase", [0, 1])
def test_referenced_frames_distinguish_the_volumes_of_a_multi_frame_image(
    tmp_path: Path, write: Write, phase: int
) -> None:
    # One file, one SOP Instance UID, two phases of four frames.
    for n in (1, 2):
        images(tmp_path / "plain", 100 * n, AcquisitionNumber=n)
    files = sorted((tmp_path / "plain").iterdir(), key=lambda f: (f.name[:3], -int(f.stem[-4:])))
    enhanced(files, tmp_path / "ct" / "e.dcm")
    ds = pydicom.dcmread(tmp_path / "ct" / "e.dcm")
    for n, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        group.FrameContentSequence[0].FrameAcquisitionNumber = 1 + n // 4
    ds.save_as(tmp_path / "ct" / "e.dcm")
    parts = discover(tmp_path / "ct")
    assert [sorted(s.frame for s in part.slices) for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    unmatched = Unmatched()
    path = write(tmp_path / "seg.dcm", drawn_on=[ds.SOPInstanceUID], number=2 + 4 * phase)
    found = scan(tmp_path / "ct", masks=path, listener=unmatched).planned
    assert [bool(o.segmentations) for o in found] == [phase == 0, phase == 1]
    # Without a frame number, all volumes of the image match.
    found = scan(tmp_path / "ct", masks=write(path, drawn_on=[ds.SOPInstanceUID])).planned
    assert [bool(o.segmentations) for o in found] == [True, True]


LEFT_OUT = "it is drawn on images that were left out of their series: "


@both_kinds
@pytest.mark.parametrize("listed", [["1.2.5.901"], ["1.2.5.101", "1.2.5.201", "1.2.5.901"]], ids=["it", "all"])
def test_masks_drawn_on_an_image_that_was_left_out_match_no_volume(
    tmp_path: Path, phases: Path, write: Write, listed: list[str]
) -> None:
    # A fourth acquisition of one slice.
    images(tmp_path / "more", 900, AcquisitionNumber=9)
    (one,) = (f for f in (tmp_path / "more").iterdir() if pydicom.dcmread(f).SOPInstanceUID == "1.2.5.901")
    one.rename(phases / "one.dcm")
    assert [len(s.slices) for s in discover(phases)] == [4, 4, 4]
    path = write(tmp_path / "seg.dcm", drawn_on=["1.2.5.901"], listed=listed)
    by_uid, unmatched = matches(phases, path)
    assert (by_uid, unmatched.complaints) == ({}, [f"{LEFT_OUT}one.dcm (other acquisition)"])
    path = write(tmp_path / "seg.dcm", drawn_on=["1.2.5.901", "1.2.5.201"], listed=listed)
    assert volumes(phases, path) == {"1.2.5.200"}


@both_kinds
def test_masks_drawn_on_a_scout_match_no_volume(tmp_path: Path, write: Write) -> None:
    images(tmp_path / "ct", 100)
    images(tmp_path / "ct", 900, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert [len(s.slices) for s in discover(tmp_path / "ct")] == [4]
    for how in ("drawn_on", "listed"):
        named: dict[str, Any] = {how: ["1.2.5.901"]}
        by_uid, unmatched = matches(tmp_path / "ct", write(tmp_path / "seg.dcm", **named))
        (why,) = unmatched.complaints
        assert (by_uid, why.startswith(LEFT_OUT), why.endswith("(localizer)")) == ({}, True, True)
    assert volumes(tmp_path / "ct", write(tmp_path / "seg.dcm")) == {"1.2.5.100"}


@both_kinds
def test_masks_drawn_on_a_frame_that_was_left_out_match_no_volume(tmp_path: Path, write: Write) -> None:
    # One file with two phases of four frames, and one frame of a third phase at the second position.
    for n in (1, 2):
        images(tmp_path / "plain", 100 * n, AcquisitionNumber=n)
    files = sorted((tmp_path / "plain").iterdir(), key=lambda f: (f.name[:3], -int(f.stem[-4:])))
    enhanced([*files, files[1]], tmp_path / "ct" / "e.dcm")
    ds = pydicom.dcmread(tmp_path / "ct" / "e.dcm")
    for n, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        group.FrameContentSequence[0].FrameAcquisitionNumber = 1 + n // 4
    ds.save_as(tmp_path / "ct" / "e.dcm")
    assert [len(part.slices) for part in discover(tmp_path / "ct")] == [4, 4]
    path = write(tmp_path / "seg.dcm", drawn_on=[ds.SOPInstanceUID], number=9)
    by_uid, unmatched = matches(tmp_path / "ct", path)
    assert (by_uid, unmatched.complaints) == ({}, [f"{LEFT_OUT}e.dcm frame 9 (other acquisition)"])


@both_kinds
def test_of_two_copies_of_an_image_the_one_in_the_named_series_matches(tmp_path: Path, write: Write) -> None:
    images(tmp_path / "ct" / "a", 100, series="1.2.1")
    images(tmp_path / "ct" / "b", 100, series="1.2.2")
    for series in ("1.2.1", "1.2.2"):
        path = write(tmp_path / "seg.dcm", series=series, drawn_on=["1.2.5.101"])
        found = scan(tmp_path / "ct", masks=path).planned
        assert [o.series.series_uid for o in found if o.segmentations] == [series]


@both_kinds
def test_images_have_priority_over_the_named_series(tmp_path: Path, write: Write) -> None:
    images(tmp_path / "ct" / "a", 100, series="1.2.1")
    images(tmp_path / "ct" / "b", 200, series="1.2.2")
    assert volumes(tmp_path / "ct", write(tmp_path / "seg.dcm", series="1.2.1", drawn_on=["1.2.5.201"])) == {
        "1.2.5.200"
    }


def test_references_of_contours_that_are_left_out_are_ignored(tmp_path: Path, phases: Path) -> None:
    def leave_out_the_first(ds: Dataset) -> None:
        first, second = ds.ROIContourSequence[0].ContourSequence
        first.ContourGeometricType = "OPEN_PLANAR"
        first.ContourImageSequence = Sequence([reference("1.2.5.101")])
        second.ContourImageSequence = Sequence([reference("1.2.5.201")])

    square = [(-8.0, -18.0, 32.0), (-4.0, -18.0, 32.0), (-4.0, -14.0, 32.0)]
    path = write_rtstruct(tmp_path / "rs.dcm", {"a": [square] * 2}, series_uid="1.2.1", change=leave_out_the_first)
    assert volumes(phases, path) == {"1.2.5.200"}


# Series of other modalities

OTHERS = {"MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage, "OT": "1.2.840.10008.5.1.4.1.1.7"}


@pytest.fixture(params=OTHERS)
def modality(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def cohort_of_two(folder: Path, modality: str) -> None:
    """Write a CT and another series in the same frame of reference."""
    images(folder / "ct", 100)
    images(folder / "other", 900, series="1.2.9", Modality=modality, SOPClassUID=OTHERS[modality])


@both_kinds
@pytest.mark.parametrize("how", ["by series", "by images", "by listed images"])
def test_masks_of_another_modality_are_not_applied_to_the_ct_in_its_frame_of_reference(
    tmp_path: Path, write: Write, modality: str, how: str
) -> None:
    cohort_of_two(tmp_path / "in", modality)
    ways: dict[str, dict[str, Any]] = {
        "by series": {"series": "1.2.9"},
        "by images": {"series": "", "drawn_on": ["1.2.5.902"]},
        "by listed images": {"series": "1.2.77", "listed": ["1.2.5.902"]},
    }
    why = f"it refers to series 1.2.9 of modality {modality}, which is not converted"
    path = write(tmp_path / "in" / "other" / "seg.dcm", frame="1.2.7", **ways[how])
    for _ in range(2):  # the second time, the images are read from the header index
        unmatched = Unmatched()
        found = scan(tmp_path / "in", masks="auto", listener=unmatched, index=tmp_path / "index.sqlite").planned
        assert [len(o.segmentations) for o in found] == [0]
        assert (unmatched.complaints, unmatched.unused) == ([], [why])
    found_by_name, unmatched = matches(tmp_path / "in", path)
    assert not found_by_name
    assert (unmatched.complaints, unmatched.unused) == ([why], [])


@both_kinds
def test_masks_that_name_a_ct_and_another_series_go_to_the_ct(tmp_path: Path, write: Write) -> None:
    cohort_of_two(tmp_path / "in", "PT")
    path = write(tmp_path / "seg.dcm", series="1.2.9", frame="1.2.7", drawn_on=["1.2.5.102", "1.2.5.902"])
    assert volumes(tmp_path / "in", path) == {"1.2.5.100"}


@both_kinds
def test_masks_that_name_an_absent_series_go_to_the_only_ct_in_their_frame_of_reference(
    tmp_path: Path, write: Write
) -> None:
    cohort_of_two(tmp_path / "in", "MR")
    path = write(tmp_path / "seg.dcm", series="1.2.77", frame="1.2.7", listed=ABSENT, drawn_on=ABSENT)
    assert volumes(tmp_path / "in", path) == {"1.2.5.100"}


@pytest.mark.parametrize("how", ["gzip", "zip"])
def test_images_of_other_modalities_are_also_found_in_archives(tmp_path: Path, how: str) -> None:
    cohort_of_two(tmp_path / "in", "MR")
    files = list((tmp_path / "in" / "other").iterdir())
    if how == "zip":
        with zipfile.ZipFile(tmp_path / "in" / "other.zip", "w") as archive:
            for file in files:
                archive.write(file, file.name)
    for file in files:
        if how == "gzip":
            file.with_suffix(".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    _, unmatched = matches(tmp_path / "in", structures(tmp_path / "rs.dcm", series="1.2.9", frame="1.2.7"))
    assert unmatched.complaints == ["it refers to series 1.2.9 of modality MR, which is not converted"]


def test_a_cohort_lists_series_of_other_modalities_but_no_other_files(tmp_path: Path) -> None:
    cohort_of_two(tmp_path, "MR")
    structures(tmp_path / "rs.dcm")
    report = pydicom.dcmread(next((tmp_path / "ct").iterdir()))
    report.SOPClassUID, report.SeriesInstanceUID = "1.2.840.10008.5.1.4.1.1.88.11", "1.2.10"
    del report.Rows, report.PixelData
    report.save_as(tmp_path / "report.dcm")
    others = discover(tmp_path).others
    assert {uid: (o.modality, len(o.sop_digests)) for uid, o in others.items()} == {"1.2.9": ("MR", 4)}


# Segmentations without a series


def test_with_auto_unmatched_segmentations_are_reported_without_failure(tmp_path: Path) -> None:
    cohort_of_two(tmp_path / "in", "MR")
    path = structures(tmp_path / "in" / "rs.dcm", series="1.2.77", frame="1.2.78")
    words = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--index", "none", "--backend", "cpu"]
    why = "it refers to a series and a frame of reference that are not here"
    for more in ([], ["--quiet"]):
        done = CliRunner().invoke(app, [*words, "--masks", "auto", *more])
        assert done.exit_code == 0, done.output
        assert f"unmatched  {path}: {why}" in done.stderr
    dry = CliRunner().invoke(app, [*words, "--masks", "auto", "--dry-run"])
    assert dry.exit_code == 0
    assert f"unmatched  {path}: {why}" in dry.stdout
    report = json.loads(CliRunner().invoke(app, [*words, "--masks", "auto", "--json"]).stdout)
    assert (report["unmatched"], report["unused"]) == ([], [[str(path), why]])
    with closing(sqlite3.connect(tmp_path / "out" / "manifest.sqlite")) as db:
        assert list(db.execute("SELECT path, reason FROM segmentations")) == [(str(path), why)]
    named = CliRunner().invoke(app, [*words, "--masks", str(path), "--json"])
    assert named.exit_code == 1
    assert json.loads(named.stdout)["unmatched"] == [[str(path), why]]


def test_of_many_unmatched_segmentations_the_first_are_shown_and_all_are_recorded(tmp_path: Path) -> None:
    images(tmp_path / "in" / "ct", 100)
    for n in range(25):
        structures(tmp_path / "in" / f"rs{n:02}.dcm", series="1.2.77", frame="1.2.78")
    words = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--index", "none", "--backend", "cpu"]
    done = CliRunner().invoke(app, [*words, "--masks", "auto", "--quiet"])
    assert done.exit_code == 0
    lines = done.stderr.splitlines()
    assert sum(line.startswith("unmatched  /") for line in lines) == 20
    assert "unmatched  5 more" in lines[-1]
    with closing(sqlite3.connect(tmp_path / "out" / "manifest.sqlite")) as db:
        assert next(db.execute("SELECT count(*) FROM segmentations")) == (25,)
