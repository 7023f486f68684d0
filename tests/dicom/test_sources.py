"""Tests of file formats (native syntaxes, multi-frame, gzip, zip) with the same series, and of the header index."""

from __future__ import annotations

import gzip
import os
import sqlite3
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import encoded_natively
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

import gpuprep
from gpuprep.core.recipe import Recipe
from gpuprep.core.stacking_rules import Rules
from gpuprep.dicom.audit import audit
from gpuprep.dicom.header_cache import HeaderIndex
from gpuprep.pipeline.scan import scan
from gpuprep.testing import write_series

SHAPE, SPACING_MM = (7, 18, 22), (2.5, 0.8, 0.7)
UID = "1.2.3.4"


@pytest.fixture
def stored(noise: Callable[..., NDArray[np.int16]]) -> NDArray[np.int16]:
    return noise(SHAPE) - 1500  # with negative values


@pytest.fixture
def files(tmp_path: Path, stored: NDArray[np.int16]) -> list[Path]:
    return write_series(tmp_path / "plain", stored, SPACING_MM, series_uid=UID)


def enhanced(files: list[Path], target: Path, *, order: list[int] | None = None, compress: bool = False) -> None:
    """Write single frames as one enhanced image: positions and acquisition per frame, all else shared."""
    slices = [pydicom.dcmread(f) for f in files]
    slices = [slices[n] for n in order or range(len(slices))]
    ds = slices[0]
    shared, own = Dataset(), []
    measures, plane, values = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, plane.ImageOrientationPatient = ds.PixelSpacing, ds.ImageOrientationPatient
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = "1", "-1024", "HU"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    shared.PixelValueTransformationSequence = [values]
    for s in slices:
        place, content, group = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient, content.FrameAcquisitionNumber = s.ImagePositionPatient, 1
        group.PlanePositionSequence, group.FrameContentSequence = [place], [content]
        own.append(group)
    pixels = b"".join(s.PixelData for s in slices)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope",
                    "RescaleIntercept", "RescaleType", "SliceThickness", "InstanceNumber"):  # fmt: skip
        del ds[keyword]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    ds.NumberOfFrames, ds.PixelData = len(slices), pixels
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], own
    if compress:
        ds.compress(RLELossless, encoding_plugin="pydicom")
    target.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(target, enforce_file_format=True)


def wrapped(files: list[Path], folder: Path, how: str) -> Path:
    """Write the series in another file format, and return the path for gpuprep."""
    folder.mkdir()
    if how == "gzip":
        for file in files:
            (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    elif how in ("zip", "zip-stored", "zip-file"):
        method = zipfile.ZIP_STORED if how == "zip-stored" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(folder / "export.zip", "w", method) as archive:
            archive.writestr("README.txt", "not DICOM")
            for n, file in enumerate(files):
                archive.write(file, f"study/../series/{n}")
        return folder / "export.zip" if how == "zip-file" else folder
    elif how.startswith("enhanced"):
        order = [3, 0, 6, 2, 1, 5, 4]
        enhanced(files, folder / "enhanced.dcm", order=order, compress=how == "enhanced-rle")
        if how == "enhanced-zip":
            with zipfile.ZipFile(folder / "enhanced.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(folder / "enhanced.dcm", "e")
            (folder / "enhanced.dcm").unlink()
        if how == "enhanced-deflated":
            ds = pydicom.dcmread(folder / "enhanced.dcm")
            (folder / "enhanced.dcm").write_bytes(encoded_natively(ds, DeflatedExplicitVRLittleEndian))
    elif how == "dicomdir":
        for file in files:
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
        return folder / "DICOMDIR"
    else:
        syntax, meta = {
            "implicit": (ImplicitVRLittleEndian, True),
            "big-endian": (ExplicitVRBigEndian, True),
            "deflated": (DeflatedExplicitVRLittleEndian, True),
            "bare-implicit": (ImplicitVRLittleEndian, False),
            "bare-explicit": (ExplicitVRLittleEndian, False),
            "bare-big-endian": (ExplicitVRBigEndian, False),
        }[how]
        for file in files:
            (folder / file.name).write_bytes(encoded_natively(pydicom.dcmread(file), syntax, meta=meta))
    return folder


WRAPPINGS = (
    "implicit", "big-endian", "deflated", "bare-implicit", "bare-explicit", "bare-big-endian", "gzip", "zip",
    "zip-stored", "zip-file", "dicomdir", "enhanced", "enhanced-rle", "enhanced-zip", "enhanced-deflated",
)  # fmt: skip


@pytest.mark.parametrize("how", WRAPPINGS)
def test_every_file_format_gives_the_same_volume(
    tmp_path: Path, files: list[Path], stored: NDArray[np.int16], how: str
) -> None:
    # Traps 1, 23, 24, 29.
    plain = gpuprep.read(gpuprep.discover(tmp_path / "plain")[0])
    (series,) = gpuprep.discover(wrapped(files, tmp_path / how, how))
    assert audit(series).verdict == "ok"
    volume = gpuprep.read(series)
    assert volume.stored.dtype == np.int16
    assert np.array_equal(volume.stored, stored)
    assert volume.geometry.is_close(plain.geometry, atol_mm=0)
    assert volume.statistics == plain.statistics


@pytest.mark.parametrize("how", ["zip", "gzip", "enhanced-zip"])
def test_outputs_of_archives_are_in_the_output_folder_and_are_resumed(
    tmp_path: Path, files: list[Path], how: str
) -> None:
    source = wrapped(files, tmp_path / "in", how)
    recipe = Recipe(size=None, dtype="int16")
    first = gpuprep.convert(source, tmp_path / "out", recipe, backend="cpu")
    assert first.counts == {"ok": 1}
    assert gpuprep.convert(source, tmp_path / "out", recipe, backend="cpu").counts == {"skipped": 1}
    outside = {p for p in tmp_path.iterdir() if p.name not in ("in", "out", "plain")}
    assert not outside
    (folder,) = {f.parent for f in (tmp_path / "out").rglob("volume.json")}
    assert folder.resolve().is_relative_to(tmp_path / "out")


def test_frames_of_two_acquisitions_become_two_volumes(tmp_path: Path, files: list[Path]) -> None:
    # Trap 6, in one file: acquisition numbers are in the functional groups of the frames.
    enhanced(files, tmp_path / "e" / "two.dcm")
    ds = pydicom.dcmread(tmp_path / "e" / "two.dcm")
    later = [Dataset() for _ in range(SHAPE[0])]
    for group, item in zip(ds.PerFrameFunctionalGroupsSequence, later, strict=True):
        item.update(pydicom.dataset.Dataset(group))
        content = Dataset()
        content.FrameAcquisitionNumber = 2
        item.FrameContentSequence = [content]
    ds.PerFrameFunctionalGroupsSequence = [*ds.PerFrameFunctionalGroupsSequence, *later]
    first = ds.pixel_array
    ds.NumberOfFrames = 2 * SHAPE[0]
    ds.PixelData = np.concatenate([first, first + 100]).tobytes()
    ds.save_as(tmp_path / "e" / "two.dcm")
    volumes = [gpuprep.read(series) for series in gpuprep.discover(tmp_path / "e")]
    assert len(volumes) == 2
    assert np.array_equal(volumes[0].stored, first)
    assert np.array_equal(volumes[1].stored, first + 100)


def test_frames_without_positions_are_rejected(tmp_path: Path, files: list[Path]) -> None:
    ds = pydicom.dcmread(files[0])
    ds.NumberOfFrames, ds.PixelData = 3, ds.PixelData * 3
    del ds.ImagePositionPatient
    ds.SOPClassUID = CTImageStorage
    (tmp_path / "m").mkdir()
    ds.save_as(tmp_path / "m" / "multi.dcm")
    found = audit(gpuprep.discover(tmp_path / "m")[0])
    assert found.codes == ("multi-frame",)
    assert "multi-frame image of 3 frames (multi.dcm" in found.reason


# --- the index -------------------------------------------------------------------------------------------------------

opened: list[str] = []
recording = False


def _record_open(event: str, args: tuple[object, ...]) -> None:
    if recording and event == "open" and isinstance(args[0], str):
        opened.append(args[0])


sys.addaudithook(_record_open)


@pytest.fixture
def opened_files() -> Iterator[Callable[[], list[str]]]:
    """Return a function that lists the files opened by this process since the fixture was set up."""
    global recording
    opened.clear()
    recording = True
    yield lambda: list(opened)
    recording = False


def test_rescanning_an_unchanged_folder_opens_no_file(
    tmp_path: Path, files: list[Path], opened_files: Callable[[], list[str]]
) -> None:
    tree, index = tmp_path / "plain", tmp_path / "index" / "headers.sqlite"
    enhanced(files, tree / "more" / "enhanced.dcm")
    (tree / "notes.txt").write_text("not DICOM")
    (tree / "broken.dcm").write_bytes(files[0].read_bytes()[:150])
    with zipfile.ZipFile(tree / "export.zip", "w") as archive:
        archive.write(files[0], "x")

    def scanned() -> list[object]:
        found = scan(tree, index=index)
        cohort, planned = found.cohort, found.planned
        assert cohort.passed_over == {"not DICOM": 1}
        assert [Path(path).name for path, _ in cohort.unreadable] == ["broken.dcm"]
        return [(o.series, o.verdict, o.audit and o.audit.to_dict()) for o in planned]

    first = scanned()
    assert any(str(tree) in name for name in opened_files())
    opened.clear()
    assert scanned() == first
    assert [name for name in opened_files() if name.startswith(str(tree))] == []


@pytest.mark.parametrize("change", ["content", "time", "new", "gone", "renamed"])
def test_only_changed_files_are_read_again(
    tmp_path: Path, files: list[Path], opened_files: Callable[[], list[str]], change: str
) -> None:
    tree, index = tmp_path / "plain", tmp_path / "headers.sqlite"
    scan(tree, index=index)
    target = files[3]
    if change == "content":
        ds = pydicom.dcmread(target)
        ds.RescaleIntercept = "-1000"
        ds.save_as(target)
    elif change == "time":
        os.utime(target, ns=(1, 1))
    elif change == "new":
        target = tree / "new.dcm"
        target.write_bytes(files[0].read_bytes())
    elif change == "gone":
        target.unlink()
    else:
        target = target.rename(tree / "renamed.dcm")
    opened.clear()
    cohort = scan(tree, index=index).cohort
    assert {n for n in opened_files() if n.startswith(str(tree))} == (set() if change == "gone" else {str(target)})
    expected = gpuprep.discover(tree)
    assert cohort.series == expected.series
    assert len(cohort[0].slices) == {"new": 8, "gone": 6}.get(change, 7)
    if change in ("gone", "renamed"):
        with closing(sqlite3.connect(index)) as db:
            rows = db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'files_%'").fetchall()
            names = [n for (n,) in db.execute(f"SELECT name FROM {rows[0][0]}")]  # noqa: S608
        assert files[3].name.encode() not in names


@pytest.mark.parametrize("damage", ["nonsense", "folder", "another", "values"])
def test_an_unusable_index_does_not_change_the_result(tmp_path: Path, files: list[Path], damage: str) -> None:
    index = tmp_path / "headers.sqlite"
    expected = gpuprep.discover(tmp_path / "plain")
    if damage == "nonsense":
        index.write_bytes(b"this is no database" * 100)
    elif damage == "folder":
        index.mkdir()
    elif damage == "another":
        with closing(sqlite3.connect(index)) as db, db:
            db.execute("CREATE TABLE files_of_an_older_version (x)")
    else:
        gpuprep.discover(tmp_path / "plain", index=index)
        with closing(sqlite3.connect(index)) as db, db:
            (name,) = db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'files_%'").fetchone()
            db.execute(f"UPDATE {name} SET contents = '[1, 2'")  # noqa: S608
    assert gpuprep.discover(tmp_path / "plain", index=index) == expected
    assert len(files) == len(expected[0].slices)


def test_files_with_invalid_utf_8_names_are_kept_in_the_index(tmp_path: Path, files: list[Path]) -> None:
    invalid_utf8 = os.fsencode(tmp_path / "plain") + b"/\xff\xfe-1.dcm"
    os.rename(files[0], invalid_utf8)
    index = tmp_path / "headers.sqlite"
    first = gpuprep.discover(tmp_path / "plain", index=index)
    assert len(first[0].slices) == SHAPE[0]
    assert gpuprep.discover(tmp_path / "plain", index=index) == first


def test_scanning_a_single_file_keeps_its_neighbours_in_the_index(
    tmp_path: Path, files: list[Path], opened_files: Callable[[], list[str]]
) -> None:
    index = tmp_path / "headers.sqlite"
    gpuprep.discover(tmp_path / "plain", index=index)
    gpuprep.discover(files[2], index=index)
    opened.clear()
    gpuprep.discover(tmp_path / "plain", index=index)
    assert [n for n in opened_files() if n.startswith(str(tmp_path / "plain"))] == []


def test_the_index_contains_no_patient_name_and_no_date(tmp_path: Path, stored: NDArray[np.int16]) -> None:
    def name(ds: Dataset, _: int) -> None:
        ds.PatientName, ds.PatientID, ds.AcquisitionDate, ds.AcquisitionTime = (
            "Doe^Jane",
            "MRN0042",
            "20240229",
            "235959",
        )

    write_series(tmp_path / "plain", stored, SPACING_MM, change=name)
    index = tmp_path / "headers.sqlite"
    gpuprep.discover(tmp_path / "plain", index=index)
    content = b"".join(f.read_bytes() for f in tmp_path.glob("headers.sqlite*"))
    for secret in (b"Doe", b"MRN0042", b"20240229", b"235959"):
        assert secret not in content


def test_two_indexes_can_be_open_at_once(tmp_path: Path, files: list[Path]) -> None:
    index = tmp_path / "headers.sqlite"
    other = HeaderIndex(index)
    first = gpuprep.discover(tmp_path / "plain", index=index)
    other.close()
    assert gpuprep.discover(tmp_path / "plain", index=index) == first
    assert len(first[0].slices) == len(files)


def test_strict_rules_apply_to_archives(tmp_path: Path, files: list[Path]) -> None:
    files[3].unlink()
    source = wrapped(files[:3] + files[4:], tmp_path / "in", "zip")
    rules = Rules(policy="strict")
    assert audit(gpuprep.discover(source, rules)[0], rules).codes == ("gap",)
