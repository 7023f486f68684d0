"""Regression tests with hostile inputs, found by fuzzing and by hand."""

from __future__ import annotations

import gzip
import os
import shutil
import sqlite3
import zipfile
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from conftest import encoded_natively
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, generate_uid

import gpuprep
from gpuprep.core.recipe import Recipe
from gpuprep.dicom.audit import audit
from gpuprep.dicom.headers import Contents, read_headers
from gpuprep.pipeline.cohort import convert
from gpuprep.pipeline.estimate import Forecast
from gpuprep.pipeline.events import Listener, Run
from gpuprep.pipeline.scan import scan
from gpuprep.testing import write_series

SMALL = Recipe(spacing_mm=None, size=(8, 8))
SPACING_MM = (2.5, 0.8, 0.7)
Change = Callable[[Dataset, int], None]


def write(folder: Path, count: int = 8, change: Change | None = None, **options: Any) -> list[Path]:
    rng = np.random.default_rng(count)
    stored = rng.integers(0, 2000, (count, 16, 20)).astype(np.int16)
    return write_series(folder, stored, SPACING_MM, change=change, **options)


def converted(folder: Path, out: Path, recipe: Recipe = SMALL, **options: Any) -> Run:
    return convert(folder, out, recipe, backend="cpu", **options)


# --- sizes in a header cost no memory and no time --------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_a_huge_matrix_is_rejected_before_memory_is_allocated(tmp_path: Path, compressed: bool) -> None:
    def huge(ds: Dataset, _: int) -> None:
        if compressed:
            ds.compress(RLELossless, encoding_plugin="pydicom")
        ds.Rows, ds.Columns = 65535, 1

    write(tmp_path, change=huge)
    found = audit(gpuprep.discover(tmp_path)[0])
    assert found.verdict == "rejected"
    assert "65535 × 1 pixels a slice, more than 8192 a side" in found.reason


@pytest.mark.parametrize("packed", [False, True])
def test_no_memory_is_allocated_for_an_element_with_a_length_of_4_gb(tmp_path: Path, packed: bool) -> None:
    files = write(tmp_path)
    content = bytearray(files[3].read_bytes())
    at = content.index(b"\x08\x00\x60\x00CS")  # Modality, explicit VR: changed to a VR with a 32-bit length
    content[at + 4 : at + 8] = b"UN\0\0"
    content[at + 8 : at + 8] = (0xFFFFFFFE).to_bytes(4, "little")
    files[3].write_bytes(content)
    if packed:
        files[3].with_suffix(".gz").write_bytes(gzip.compress(bytes(content)))
        files[3].unlink()
    cohort = gpuprep.discover(tmp_path)
    assert [reason for _, reason in cohort.unreadable] == [
        "ValueError: an element announces 4294967294 bytes in a header"
    ]
    assert len(cohort[0].slices) == 7


def test_a_deflated_bomb_is_unpacked_only_up_to_the_header_limit(tmp_path: Path) -> None:
    files = write(tmp_path, 12)
    ds = pydicom.dcmread(files[3])
    content = encoded_natively(ds, DeflatedExplicitVRLittleEndian)
    end = content.index(b"1.2.840.10008.1.2.1.99") + 22
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = b"\x09\x00\x10\x00UN\0\0" + (2**31).to_bytes(4, "little") + bytes(2**20)
    bomb = packer.compress(zeros) + b"".join(packer.compress(bytes(2**20)) for _ in range(300)) + packer.flush()
    files[3].write_bytes(content[: content.index(b"\x02\x00", end) if b"\x02\x00" in content[end:] else end] + bomb)
    found = sorted((len(series.slices), audit(series).verdict) for series in gpuprep.discover(tmp_path))
    assert found == [(1, "rejected"), (11, "fixed")]


@pytest.mark.parametrize("frames", ["2147483648", "-1", "3.5", "many"])
def test_an_impossible_number_of_frames_is_an_error_not_1_frame(tmp_path: Path, frames: str) -> None:
    files = write(tmp_path)
    content = files[3].read_bytes()
    at = content.index(b"\x28\x00\x10\x00US")  # before Rows
    padded = frames.encode() + b" " * (len(frames) % 2)
    element = b"\x28\x00\x08\x00IS" + len(padded).to_bytes(2, "little") + padded
    files[3].write_bytes(content[:at] + element + content[at:])
    cohort = gpuprep.discover(tmp_path)
    assert [reason for _, reason in cohort.unreadable] == [f"ValueError: Number of Frames is {frames!r}"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_header_that_continues_with_zeros_is_unreadable(tmp_path: Path, packed: bool) -> None:
    files = write(tmp_path)
    content = files[3].read_bytes()
    content = content[: content.index(b"\xe0\x7f\x10\x00")] + bytes(20_000_000)
    if packed:
        files[3].with_suffix(".gz").write_bytes(gzip.compress(content))
        files[3].unlink()
    else:
        files[3].write_bytes(content)
    cohort = gpuprep.discover(tmp_path)
    assert len(cohort[0].slices) == 7
    assert "the header does not end" in cohort.unreadable[0][1]


def test_an_empty_sequence_of_frames_is_named(tmp_path: Path) -> None:
    def empty(ds: Dataset, k: int) -> None:
        if k == 3:
            ds.PerFrameFunctionalGroupsSequence = []

    write(tmp_path, change=empty)
    assert [reason for _, reason in gpuprep.discover(tmp_path).unreadable] == [
        "ValueError: 0 functional groups for 1 frames"
    ]


# --- lost slices are reported ----------------------------------------------------------------------------------------


def test_a_circular_link_does_not_affect_other_files_of_its_folder(tmp_path: Path) -> None:
    files = write(tmp_path / "in")
    (tmp_path / "in" / "S1-0004a").symlink_to("S1-0004a")
    run = converted(tmp_path / "in", tmp_path / "out")
    (result,) = run.results
    assert (result.status, result.slices) == ("ok", len(files))
    assert "a slice may be missing" in result.warnings[0]
    assert [Path(path).name for path, _ in run.unreadable] == ["S1-0004a"]
    assert run.exit_code == 1


def test_a_rejected_series_is_not_warned_of_unreadable_files_in_its_folder(tmp_path: Path) -> None:
    # Its own images are of no known series: counted as doubtful files, they would be warned of by themselves.
    def without_uid(ds: Dataset, _: int) -> None:
        del ds.SeriesInstanceUID

    write_series(tmp_path / "dicom", np.zeros((4, 8, 8), np.int16), (3, 9, 9), change=without_uid)
    recipe = Recipe(spacing_mm=None, size=None)
    (result,) = convert(tmp_path / "dicom", tmp_path / "out", recipe, backend="cpu").results
    assert (result.status, result.warnings) == ("rejected", ())


def test_files_packed_twice_are_reported_as_unreadable(tmp_path: Path) -> None:
    files = write(tmp_path / "plain")
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "export.zip", "w") as archive:
        for n, file in enumerate(files):
            content = file.read_bytes()
            archive.writestr(f"{n}.dcm.gz" if n % 2 else f"{n}.dcm", gzip.compress(content) if n % 2 else content)
    cohort = gpuprep.discover(tmp_path / "in")
    assert len(cohort.unreadable) == 4
    assert "packed twice: unpack the outer archive" in cohort.unreadable[0][1]


def test_a_third_frame_of_reference_does_not_join_two_others(tmp_path: Path) -> None:
    # Two interleaved acquisitions, each in a different frame of reference, and a scout in a third.
    for number, shift in ((1, 0.0), (2, 1.25)):
        frame = f"1.9.{number}"

        def framed(ds: Dataset, k: int, frame: str = frame) -> None:
            ds.FrameOfReferenceUID = "1.9.77" if frame == "1.9.2" and k == 7 else frame
            if ds.FrameOfReferenceUID == "1.9.77":
                ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

        write(tmp_path / str(number), 8, framed, series_uid="1.2.3", origin_mm=(0.0, 0.0, shift))
    volumes = gpuprep.discover(tmp_path)
    assert sorted(len(v.slices) for v in volumes) == [7, 8]
    assert {len({s.path.split("/")[-2] for s in v.slices}) for v in volumes} == {1}


@pytest.mark.parametrize(("intercept", "hu"), [("-1024", "-1024 HU"), ("-8192", "-8192 HU")])
def test_a_slice_of_zeros_among_images_rejects_the_series_whatever_its_hu(
    tmp_path: Path, intercept: str, hu: str
) -> None:
    def half_written(ds: Dataset, k: int) -> None:
        ds.RescaleIntercept = intercept
        if k == 4:
            ds.PixelData = bytes(len(ds.PixelData))

    write(tmp_path / "in", change=half_written)
    (result,) = converted(tmp_path / "in", tmp_path / "out").results
    assert (result.status, result.codes) == ("rejected", ("blank",))
    assert f"S1-0004.dcm holds one value (0, {hu}) throughout" in result.reason


def test_files_that_change_between_scan_and_reading_reject_the_series(tmp_path: Path) -> None:
    files = write(tmp_path / "in")

    class Swap(Listener):
        def planned(self, forecast: Forecast) -> None:  # noqa: ARG002
            first, second = files[0].read_bytes(), files[5].read_bytes()
            files[0].write_bytes(second)
            files[5].write_bytes(first)

    (result,) = converted(tmp_path / "in", tmp_path / "out", listener=Swap()).results
    assert (result.status, result.codes) == ("rejected", ("changed",))


def test_an_aborted_acquisition_does_not_affect_complete_ones(tmp_path: Path) -> None:
    for number, count in ((1, 8), (2, 8), (3, 2)):

        def acquired(ds: Dataset, _: int, number: int = number) -> None:
            ds.AcquisitionNumber, ds.FrameOfReferenceUID, ds.StudyInstanceUID = number, "1.9", "1.8"

        write(tmp_path / str(number), count, acquired, series_uid="1.2.3")
    volumes = gpuprep.discover(tmp_path)
    assert [len(v.slices) for v in volumes] == [8, 8]
    assert [why for v in volumes for _, why in v.left_out] == ["other acquisition"] * 2
    assert [audit(v).verdict for v in volumes] == ["fixed", "fixed"]


@pytest.mark.parametrize("keyword", ["TriggerTime", "KVP", "ConvolutionKernel", "NominalPercentageOfCardiacPhase"])
def test_phases_and_energies_are_separated(tmp_path: Path, keyword: str) -> None:
    for number in (1, 2):

        def phase(ds: Dataset, _: int, number: int = number) -> None:
            setattr(ds, keyword, f"B{number}" if keyword == "ConvolutionKernel" else 60.0 * number)
            ds.FrameOfReferenceUID, ds.StudyInstanceUID = "1.9", "1.8"

        write(tmp_path / str(number), 8, phase, series_uid="1.2.3")
    volumes = gpuprep.discover(tmp_path)
    assert [len(v.slices) for v in volumes] == [8, 8]
    assert {len({s.path.split("/")[-2] for s in v.slices}) for v in volumes} == {1}


# --- existing outputs are not lost -----------------------------------------------------------------------------------


@pytest.mark.parametrize("application", ["precious", "manifest"])
def test_another_database_is_never_used_as_header_index(tmp_path: Path, application: str) -> None:
    write(tmp_path / "in")
    index = tmp_path / "other.sqlite"
    if application == "precious":
        with closing(sqlite3.connect(index)) as db, db:
            db.execute("CREATE TABLE precious (x)")
            db.execute("INSERT INTO precious VALUES (42)")
    else:
        converted(tmp_path / "in", tmp_path / "out")
        index = tmp_path / "out" / "manifest.sqlite"
    with closing(sqlite3.connect(index)) as db:
        before = list(db.iterdump())
    cohort = scan(tmp_path / "in", index=index).cohort
    assert len(cohort) == 1
    with closing(sqlite3.connect(index)) as db:
        assert list(db.iterdump()) == before


def two_parts(folder: Path) -> None:
    """Write a series with two matrix sizes, each in a separate folder."""
    rng = np.random.default_rng(1)
    for name, shape in (("a", (8, 16, 20)), ("b", (6, 20, 16))):
        stored = rng.integers(0, 2000, shape).astype(np.int16)
        write_series(folder / name, stored, SPACING_MM, series_uid="1.2.3")


def volumes_in(out: Path) -> set[str]:
    return {str(f.parent.relative_to(out)) for f in out.rglob("volume.json")}


def test_volumes_postponed_by_limit_keep_their_former_outputs(tmp_path: Path) -> None:
    two_parts(tmp_path / "in")
    converted(tmp_path / "in", tmp_path / "out")
    made = volumes_in(tmp_path / "out")
    assert len(made) == 2
    converted(tmp_path / "in", tmp_path / "out", Recipe(spacing_mm=None, size=(8, 8), order=1), limit=1)
    assert volumes_in(tmp_path / "out") == made


def test_a_run_over_part_of_the_input_keeps_the_outputs_of_the_rest(tmp_path: Path) -> None:
    two_parts(tmp_path / "in")
    converted(tmp_path / "in", tmp_path / "out")
    assert volumes_in(tmp_path / "out") == {"in/a", "in/b"}
    converted(tmp_path / "in" / "a", tmp_path / "out")
    assert "in/b" in volumes_in(tmp_path / "out")


def test_a_series_that_later_extends_into_another_folder_is_converted_again(tmp_path: Path) -> None:
    files = write(tmp_path / "all", 8, series_uid="1.2.3")
    for n, file in enumerate(files):
        target = tmp_path / "in" / ("a" if n < 5 else "b") / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    later = tmp_path / "later"
    (tmp_path / "in" / "b").rename(later)
    assert converted(tmp_path / "in", tmp_path / "out").counts == {"ok": 1}
    later.rename(tmp_path / "in" / "b")
    for _ in range(2):
        run = converted(tmp_path / "in", tmp_path / "out")
        assert run.exit_code == 0
    (result,) = run.results
    assert result.slices == 8
    assert volumes_in(tmp_path / "out") == {result.folder}


def test_a_damaged_row_of_the_header_index_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = write(tmp_path / "in")
    index = tmp_path / "headers.sqlite"
    gpuprep.discover(tmp_path / "in", index=index)
    with closing(sqlite3.connect(index)) as db:
        (name,) = db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'files_%'").fetchone()
        for damage in ("[1, 2", "[[[]], 3, null]", "7"):
            db.execute(f"UPDATE {name} SET contents = ?", (damage,))  # noqa: S608
            db.commit()
            assert len(gpuprep.discover(tmp_path / "in", index=index)[0].slices) == len(files)
            contents = db.execute(f"SELECT DISTINCT contents = ? FROM {name}", (damage,)).fetchall()  # noqa: S608
            assert contents == [(0,)]
    assert caplog.text == ""


def test_big_endian_pixels_in_a_zip_archive_are_read_correctly(
    tmp_path: Path, noise: Callable[..., NDArray[np.int16]]
) -> None:
    files = write_series(tmp_path / "plain", noise((5, 16, 20)), SPACING_MM, series_uid="1.2.3")
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for n, file in enumerate(files):
            archive.writestr(str(n), encoded_natively(pydicom.dcmread(file), ExplicitVRBigEndian))
    volume = gpuprep.read(gpuprep.discover(tmp_path / "in")[0])
    assert np.array_equal(volume.stored, noise((5, 16, 20)))


def test_a_folder_that_cannot_be_listed_gives_its_series_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in", series_uid=generate_uid())
    (tmp_path / "in" / "below").mkdir()
    listing = os.scandir

    def refused(path: str) -> Any:
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(os, "scandir", refused)
    (result,) = converted(tmp_path / "in", tmp_path / "out").results
    assert result.status == "ok"
    assert "a slice may be missing" in result.warnings[0]


def test_sequences_nested_too_deeply_are_reported_at_any_depth_of_the_caller(tmp_path: Path) -> None:
    head = b"\x08\0\x16\0UI\x1a\x001.2.840.10008.5.1.4.1.1.2\0"
    level = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    file = tmp_path / "deep.dcm"
    file.write_bytes(head + level * 20_000)

    def found(calls: int) -> Contents:
        return found(calls - 1) if calls else read_headers([str(file)])[0]

    for calls in range(12):  # in some functions of pydicom, exceeding the recursion limit raises another error
        assert found(calls) == Contents(unreadable=[(str(file), "its sequences are nested too deeply")])
