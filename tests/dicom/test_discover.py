"""Tests of `gpuprep.dicom.discover`: series found, files passed over, and unreadable files reported."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import pytest
from conftest import encoded_natively
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RLELossless,
)

from gpuprep.core.series import Series, SliceHeader
from gpuprep.core.stacking_rules import Rules
from gpuprep.dicom.discover import Cohort, discover
from gpuprep.dicom.read import read
from gpuprep.dicom.stack import stack
from gpuprep.errors import InputError, RequestError
from gpuprep.testing import write_series

Change = Callable[[Dataset, int], None]

CT = "1.2.840.10008.5.1.4.1.1.2"
SPACING = (2.5, 0.8, 0.7)


def noise(slices: int, rows: int = 16, columns: int = 20) -> NDArray[np.int16]:
    return np.random.default_rng(0).integers(-2000, 3000, (slices, rows, columns)).astype(np.int16)


def write(folder: Path, slices: int = 3, change: Change | None = None, **options: Any) -> list[Path]:
    """Write a series, of which S1-0001.dcm is the top slice."""
    return write_series(folder, noise(slices), SPACING, change=change, **options)


def as_class(uid: str) -> Change:
    """Return a change of the SOP class of an image."""

    def change(ds: Dataset, _: int) -> None:
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UID(uid)

    return change


def overwrite_value(file: Path, tag: int, vr: bytes, value: bytes) -> None:
    """Overwrite the value of a short element with arbitrary bytes."""
    data = file.read_bytes()
    start = data.index(struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr)
    end = start + 8 + int.from_bytes(data[start + 6 : start + 8], "little")
    file.write_bytes(data[: start + 6] + struct.pack("<H", len(value)) + value + data[end:])


def only_series(cohort: Cohort) -> Series:
    (series,) = cohort
    return series


def header(file: Path) -> SliceHeader:
    """Return the header of the only image of a file."""
    (found,) = only_series(discover(file)).slices
    return found


def paths(cohort: Cohort) -> list[str]:
    return sorted(s.path for series in cohort for s in series.slices)


def names(series: Series) -> set[str]:
    return {os.path.basename(s.path) for s in series.slices}


# Files and folders


def test_files_are_found_at_any_depth_whatever_they_are_called(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b b" / "-c" / "d.e"
    deep.mkdir(parents=True)
    targets = ["1.2.840.113619.2.55", "IM0", "-x.dcm", "x.txt", ".hidden", "no extension at all"]
    files = write(tmp_path / "ct", len(targets))
    for file, target in zip(files, targets, strict=True):
        file.rename((deep if target != "IM0" else tmp_path) / target)
    cohort = discover(tmp_path)
    assert names(only_series(cohort)) == set(targets)
    assert only_series(cohort).folder == str(tmp_path)
    assert cohort.passed_over == {}
    assert cohort.unreadable == ()


def test_files_that_are_not_dicom_are_counted(tmp_path: Path) -> None:
    # Trap 42.
    write(tmp_path)
    for name, content in {
        "empty": b"", "note.txt": b"DICM is not in the right place", "a.xml": b"<?xml version='1.0'?><a/>",
        "tiny": b"\x08", "zeros": bytes(131), "long.bin": bytes(range(256)) * 8, "Thumbs.db": b"\xd0\xcf\x11\xe0" * 99,
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    cohort = discover(tmp_path)
    assert len(only_series(cohort).slices) == 3
    assert cohort.passed_over == {"not DICOM": 7}
    assert cohort.unreadable == ()


@pytest.mark.parametrize("first", [b"\x08\0\0\0", b"\x02\0\0\0", b"\x08\0\x05\0", b"\0\x08\0\x05"])
def test_binary_files_that_begin_like_dicom_are_counted_as_not_dicom(tmp_path: Path, first: bytes) -> None:
    write(tmp_path)
    for n, rest in enumerate((b"", b"\0" * 50, bytes(range(200)), b"text " * 99)):
        (tmp_path / f"{n}.bin").write_bytes(first + rest)
    cohort = discover(tmp_path)
    assert len(only_series(cohort).slices) == 3
    assert sum(cohort.passed_over.values()) + len(cohort.unreadable) == 4


def test_other_dicom_objects_are_counted_by_sop_class(tmp_path: Path) -> None:
    # Trap 9, trap 42.
    write(tmp_path)
    for n, (uid, count) in enumerate(
        {
            "1.2.840.10008.5.1.4.1.1.4": 3,
            "1.2.840.10008.5.1.4.1.1.481.3": 1,
            "1.2.840.10008.5.1.4.1.1.66.4": 1,
            "1.2.840.10008.5.1.4.1.1.7": 2,
            "1.2.826.0.1.3680043.9.9999": 1,
        }.items()
    ):
        write(tmp_path / str(n), count, as_class(uid))
    cohort = discover(tmp_path)
    assert len(only_series(cohort).slices) == 3
    assert cohort.unreadable == ()
    assert cohort.passed_over == {
        "MR Image Storage": 3,
        "RT Structure Set Storage": 1,
        "Segmentation Storage": 1,
        "Secondary Capture Image Storage": 2,
        "DICOM of an unknown SOP class": 1,
    }


def test_objects_without_pixels_are_counted_by_sop_class(tmp_path: Path) -> None:
    # Like a real structure set: sequences, and no attributes of images.
    def change(ds: Dataset, _: int) -> None:
        as_class("1.2.840.10008.5.1.4.1.1.481.3")(ds, 0)
        for keyword in ("PixelData", "Rows", "Columns", "BitsAllocated", "PixelRepresentation", "PixelPaddingValue"):
            delattr(ds, keyword)
        contour = Dataset()
        contour.ContourData = ["1", "2", "3"]
        ds.ROIContourSequence = [contour]

    write(tmp_path, 1, change)
    assert discover(tmp_path).passed_over == {"RT Structure Set Storage": 1}


def test_a_dicomdir_is_counted_by_sop_class(tmp_path: Path) -> None:
    # Its SOP class is in the meta group only.
    (file,) = write(tmp_path, 1)
    ds = pydicom.dcmread(file)
    ds.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    ds.clear()
    ds.FileSetID = "DISK1"
    ds.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    file.unlink()
    assert discover(tmp_path).passed_over == {"Media Storage Directory Storage": 1}


def test_enhanced_ct_is_found_as_a_multi_frame_image(tmp_path: Path) -> None:
    def change(ds: Dataset, _: int) -> None:
        as_class("1.2.840.10008.5.1.4.1.1.2.1")(ds, 0)
        ds.NumberOfFrames = 2
        ds.PixelData = ds.PixelData * 2

    write(tmp_path, 1, change)
    assert only_series(discover(tmp_path)).slices[0].frames == 2


@pytest.mark.parametrize(
    ("syntax", "meta"),
    [(ExplicitVRLittleEndian, True), (ExplicitVRLittleEndian, False), (ImplicitVRLittleEndian, False),
     (ExplicitVRBigEndian, False)],
    ids=["no preamble", "bare explicit", "bare implicit", "bare big endian"],
)  # fmt: skip
def test_data_sets_without_preamble_or_meta_group_are_found(tmp_path: Path, syntax: UID, meta: bool) -> None:
    for file in write(tmp_path):
        data = encoded_natively(pydicom.dcmread(file), syntax, meta=meta)
        file.write_bytes(data[132:] if meta else data)
    series = only_series(discover(tmp_path))
    assert len(series.slices) == 3
    assert {s.transfer_syntax for s in series.slices} == {syntax}
    assert (series.rows, series.columns, series.pixel_spacing_mm) == (16, 20, (0.8, 0.7))


def test_single_files_are_accepted_as_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path)
    cohort = discover([files[0], str(files[2])])
    assert paths(cohort) == sorted([str(files[0]), str(files[2])])
    monkeypatch.chdir(tmp_path)
    assert paths(discover(files[1].name)) == [str(files[1])]


def test_single_files_that_are_not_ct_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    cohort = discover(tmp_path / "a.txt")
    assert len(cohort) == 0
    assert cohort.passed_over == {"not DICOM": 1}


@pytest.mark.parametrize("missing", ["missing", "file/below"])
def test_a_missing_path_raises_request_error(tmp_path: Path, missing: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=f"{missing} does not exist"):
        discover([tmp_path, tmp_path / missing])


def test_an_empty_folder_gives_an_empty_cohort(tmp_path: Path) -> None:
    assert discover(tmp_path) == Cohort((), {}, ())
    assert discover([]) == Cohort((), {}, ())


def test_files_given_more_than_once_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Trap 6: otherwise every position would occur twice.
    files = write(tmp_path / "a" / "b", 4)
    monkeypatch.chdir(tmp_path)
    given_: list[Path | str] = [
        tmp_path,
        tmp_path,
        tmp_path / "a",
        "a/b/../b",
        files[0],
        files[0],
        f"a/b/{files[1].name}",
    ]
    for order in (given_, given_[::-1]):
        assert paths(discover(order)) == sorted(map(str, files))


def test_a_folder_that_is_also_linked_is_read_once(tmp_path: Path) -> None:
    files = write(tmp_path / "z", 4)
    (tmp_path / "a").symlink_to(tmp_path / "z")
    for given_ in ([tmp_path], [tmp_path / "a", tmp_path / "z"], [tmp_path / "z", tmp_path]):
        assert sorted(map(os.path.realpath, paths(discover(given_)))) == sorted(map(str, files))


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", 4)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    series = only_series(discover(tmp_path / "in"))
    assert len(series.slices) == 4
    assert series.folder == str(tmp_path / "in" / "link")


def test_parent_of_a_link_is_resolved_as_the_system_does(tmp_path: Path) -> None:
    # link/../ct is next to the target of the link, not next to the link.
    files = write(tmp_path / "store" / "ct")
    (tmp_path / "store" / "x").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store" / "x")
    cohort = discover(f"{tmp_path}/link/../ct")
    assert cohort.unreadable == ()
    assert sorted(map(os.path.realpath, paths(cohort))) == sorted(map(str, files))


def test_circular_links_terminate(tmp_path: Path) -> None:
    files = write(tmp_path / "a" / "b", 4)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    assert paths(discover(tmp_path)) == sorted(map(str, files))


def test_a_file_and_links_to_it_are_read_once(tmp_path: Path) -> None:
    # Trap 6: cohorts are often assembled from links.
    files = write(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for file in files:
        (tmp_path / "b" / file.name).symlink_to(file)
    assert len(only_series(discover(tmp_path)).slices) == 3


def test_a_link_given_together_with_its_folder_is_read_once(tmp_path: Path) -> None:
    files = write(tmp_path / "store")
    (tmp_path / "view").mkdir()
    links = [tmp_path / "view" / file.name for file in files]
    for link, file in zip(links, files, strict=True):
        link.symlink_to(file)
    assert len(only_series(discover([links[0], tmp_path / "view"])).slices) == 3


def test_a_dangling_link_is_reported(tmp_path: Path) -> None:
    # As in a partially fetched data set.
    files = write(tmp_path)
    files[0].rename(tmp_path / "gone")
    files[0].symlink_to(tmp_path / "nowhere")
    (tmp_path / "gone").unlink()
    cohort = discover(tmp_path)
    assert len(only_series(cohort).slices) == 2
    assert [path for path, _ in cohort.unreadable] == [str(files[0])]


def test_a_folder_without_read_permission_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its files may be missing from a series. Root may list any folder, so the refusal is simulated.
    files = write(tmp_path / "open")
    closed = tmp_path / "closed\n"
    write(closed)
    really = os.scandir

    def refuse(folder: str) -> Any:
        if os.fspath(folder) == str(closed):
            raise PermissionError(13, "Permission denied", folder)
        return really(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    cohort = discover(tmp_path)
    assert paths(cohort) == sorted(map(str, files))
    assert cohort.unreadable == ((f"{tmp_path}/closed\\n", "cannot be listed: Permission denied"),)


def test_the_excluded_folder_is_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path / "in")
    write(tmp_path / "in" / "out" / "deep")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "in" / "out")
    monkeypatch.chdir(tmp_path)
    for exclude in (tmp_path / "in" / "out", "in/out", "in/../in/out/", tmp_path / "in" / "link"):
        assert paths(discover(tmp_path, exclude=exclude)) == sorted(map(str, files))
    assert len(discover(tmp_path, exclude=tmp_path / "not there")) == 2


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    write(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    both_ends = os.open(tmp_path / "pipe", os.O_RDWR)  # so that opening the pipe fails the test instead of blocking
    os.write(both_ends, bytes(200))
    try:
        assert discover(tmp_path).passed_over == {"not a regular file": 1}
        assert discover(tmp_path / "pipe").passed_over == {"not a regular file": 1}
    finally:
        os.close(both_ends)


def test_file_names_with_invalid_utf_8_or_a_newline_are_found(tmp_path: Path) -> None:
    strange = tmp_path / os.fsdecode(b"caf\xe9\n\x1b[31m")
    write(strange)
    (strange / "S1-0001.dcm").rename(strange / os.fsdecode(b"\xff\nslice"))
    cohort = discover(tmp_path)
    assert len(stack(only_series(cohort)).slices) == 3
    assert pickle.loads(pickle.dumps(cohort)) == cohort  # noqa: S301 - our own bytes
    for s in only_series(cohort).slices:
        assert os.path.exists(s.path)
        assert s.name.isprintable()
        assert s.name.encode("utf-8")
    assert {s.name for s in only_series(cohort).slices} == {"S1-0002.dcm", "S1-0003.dcm", "\\udcff\\nslice"}


def test_names_of_unreadable_files_are_printable(tmp_path: Path) -> None:
    strange = tmp_path / os.fsdecode(b"caf\xe9\n")
    (file,) = write(strange, 1)
    overwrite_value(file, 0x00080016, b"UI", b"1.2.840.10008.5.1.4.1.1.2\0")
    file.unlink()
    file.symlink_to("nowhere")
    ((path, reason),) = discover(tmp_path).unreadable
    assert path.endswith("caf\\udce9\\n/S1-0001.dcm")
    assert (path + reason).isprintable()


# Damaged headers


def test_a_file_truncated_anywhere_is_reported_or_rejected(tmp_path: Path) -> None:
    # Trap 42. The file must not be counted as no CT: the rest of the series may look complete.
    files = write(tmp_path)
    whole = files[2].read_bytes()
    after_class = (
        whole.index(CT.encode()) + len(CT) + 1
    )  # the class in the meta group: from here on it is known to be CT
    silent = []
    for size in range(after_class, len(whole), 7):
        files[2].write_bytes(whole[:size])
        cohort = discover(tmp_path)
        assert {str(files[0]), str(files[1])} <= set(paths(cohort))
        if str(files[2]) in dict(cohort.unreadable):
            continue
        if any(files[2].name == name for series in cohort for name, _ in series.left_out):
            continue
        holder = next((s for s in cohort if files[2].name in names(s)), None)
        if holder is None:
            silent.append((size, cohort.passed_over))
        elif size < whole.index(b"\xe0\x7f\x10\x00OW") + 12:
            with pytest.raises(InputError, match=r"S1-0001\.dcm"):
                stack(holder)
    assert silent == []


def test_a_deflated_file_truncated_anywhere_is_reported_or_rejected(tmp_path: Path) -> None:
    # Trap 42: the rest inflates to the beginning of a data set.
    file = write(tmp_path)[2]
    whole = encoded_natively(pydicom.dcmread(file), DeflatedExplicitVRLittleEndian)
    for size in range(whole.index(CT.encode()) + len(CT) + 1, len(whole) - 2, 29):
        file.write_bytes(whole[:size])
        cohort = discover(tmp_path)
        if str(file) in dict(cohort.unreadable) or any(file.name == n for s in cohort for n, _ in s.left_out):
            continue
        (holder,) = (s for s in cohort if file.name in names(s))
        with pytest.raises(InputError, match=r"S1-0001\.dcm"):
            read(holder)


def test_a_damaged_sop_class_is_reported_as_unreadable(tmp_path: Path) -> None:
    # Trap 42: the meta group says CT, the data set has an unknown class.
    file = write(tmp_path)[2]
    overwrite_value(file, 0x00080016, b"UI", b"1.2.840.10008.5.1.7.1.1.2\0")
    cohort = discover(tmp_path)
    reported = [path for path, _ in cohort.unreadable] + paths(cohort)
    assert str(file) in reported, cohort.passed_over


def test_an_unreadable_header_does_not_affect_other_files(tmp_path: Path) -> None:
    # Trap 42.
    def change(ds: Dataset, k: int) -> None:
        if k == 1:
            ds.NumberOfFrames = -1

    files = write(tmp_path, 5, change)
    cohort = discover(tmp_path)
    assert cohort.unreadable == ((str(files[1]), "ValueError: Number of Frames is '-1'"),)
    assert paths(cohort) == sorted(str(f) for f in files if f != files[1])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(132, 1005), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_header_never_makes_the_scan_fail(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        write(folder, 2)
    good, bad = folder / "S1-0001.dcm", folder / "S1-0002.dcm"
    data = bytearray(good.read_bytes())
    for place, value in flips:
        data[place] = value
    bad.write_bytes(data)
    cohort = discover(folder)
    assert str(good) in paths(cohort)
    left_out = sum(len(series.left_out) for series in cohort)
    assert len(paths(cohort)) + len(cohort.unreadable) + sum(cohort.passed_over.values()) + left_out == 2


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"04.785156E-01 ", 0.4785156), (b"+18.5 ", 18.5), (b".001", 0.001), (b"001.000000E+00", 1.0),
        (b" 2.5", 2.5), (b"1.5\0", 1.5), (b"-1E3", -1000.0),
        (b"abc ", None), (b"", None), (b"  ", None), (b"nan ", None), (b"inf ", None), (b"1e999 ", None),
        (b"1,5 ", 1.5), (b"1\\2 ", None), (b"\xff\xfe", None), (b"--1 ", None),
    ],
)  # fmt: skip
def test_decimal_strings_are_read_leniently_and_garbage_is_none(
    tmp_path: Path, text: bytes, value: float | None
) -> None:
    (file,) = write(tmp_path, 1)
    overwrite_value(file, 0x00281053, b"DS", text)
    assert header(file).rescale_slope == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b".5\\04.785156E-01 ", (0.5, 0.4785156)), (b"+0.8\\.7", (0.8, 0.7)),
        (b"0.5 ", None), (b"0.5\\", None), (b"abc\\0.5 ", None), (b"0\\0 ", None), (b"0.5\\-0.5", None),
        (b"1\\2\\3 ", None), (b"", None),
    ],
)  # fmt: skip
def test_an_incomplete_pixel_spacing_is_none(tmp_path: Path, text: bytes, value: tuple[float, float] | None) -> None:
    (file,) = write(tmp_path, 1)
    overwrite_value(file, 0x00280030, b"DS", text)
    assert only_series(discover(file)).pixel_spacing_mm == value


@pytest.mark.parametrize("text", [b"1\\2 ", b"1\\2\\x ", b"1\\2\\3\\4 ", b"1\\2\\nan ", b""])
def test_an_incomplete_position_is_none(tmp_path: Path, text: bytes) -> None:
    (file,) = write(tmp_path, 1)
    overwrite_value(file, 0x00200032, b"DS", text)
    assert header(file).position_mm is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"+7", 7), (b"007 ", 7), (b"-3", -3), (b"0 ", 0),
        (b"abc ", None), (b"", None), (b" ", None), (b"1\\2 ", None), (b"nan ", None), (b"inf ", None),
        (b"1e999 ", None), (b"99999999999999999999", None),  # an integer string holds 32 bits, SQLite 64
    ],
)  # fmt: skip
def test_integer_strings_are_read_leniently_and_garbage_is_none(tmp_path: Path, text: bytes, value: int | None) -> None:
    (file,) = write(tmp_path, 1)
    overwrite_value(file, 0x00200013, b"IS", text)
    assert header(file).instance_number == value
    overwrite_value(file, 0x00200011, b"IS", text)
    assert only_series(discover(file)).series_number == value


@pytest.mark.parametrize(
    ("tag", "vr", "value"),
    [
        (0x00280010, b"US", b"\x10"),  # Rows: half a number
        (0x00280010, b"US", b"\x10\0\x10\0"),  # two numbers
        (0x00280010, b"US", b""),
        (0x00280120, b"SS", b"\x30"),  # Pixel Padding Value
        (0x00280102, b"US", b"\0"),  # High Bit
        (0x00280100, b"US", b"\0\0"),  # Bits Allocated 0
    ],
)
def test_a_slice_with_a_damaged_binary_value_is_kept(tmp_path: Path, tag: int, vr: bytes, value: bytes) -> None:
    # Without the slice, the series might look complete.
    (file,) = write(tmp_path, 1)
    overwrite_value(file, tag, vr, value)
    cohort = discover(file)
    assert cohort.unreadable == ()
    assert paths(cohort) == [str(file)]


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize(
    ("vr", "value", "signed", "expected"),
    [
        ("SS", -2000, True, -2000), ("US", 63536, True, -2000), ("US", 63536, False, 63536),
        ("SS", -2000, False, 63536), ("US", 0, True, 0), ("SS", -32768, True, -32768),
    ],
)  # fmt: skip
def test_padding_has_the_sign_of_the_pixels(
    tmp_path: Path, syntax: UID, vr: str, value: int, signed: bool, expected: int
) -> None:
    # Trap 26.
    def change(ds: Dataset, _: int) -> None:
        del ds.PixelPaddingValue
        ds.add_new("PixelPaddingValue", vr, value)
        ds.add_new("PixelPaddingRangeLimit", vr, value)
        ds.PixelRepresentation = int(signed)

    (file,) = write(tmp_path, 1, change)
    file.write_bytes(encoded_natively(pydicom.dcmread(file), syntax))
    assert (header(file).padding, header(file).padding_limit) == (expected, expected)


def test_padding_of_eight_bit_pixels_is_read_from_eight_bits(tmp_path: Path) -> None:
    # Trap 26: −100 is written in two bytes nevertheless.
    def change(ds: Dataset, _: int) -> None:
        ds.PixelPaddingValue = -100

    write_series(tmp_path, np.zeros((1, 16, 20), dtype=np.int8), SPACING, change=change)
    assert only_series(discover(tmp_path)).slices[0].padding == -100


def test_attributes_are_read_as_they_were_written(tmp_path: Path) -> None:
    def change(ds: Dataset, _: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = "0.0444", "-8.5"
        ds.BitsStored, ds.HighBit = 12, 11
        ds.AcquisitionNumber, ds.TemporalPositionIdentifier = 2, 3

    (file,) = write(tmp_path, 1, change, series_number=7, series_uid="1.2.3.4")
    ds = pydicom.dcmread(file)
    series, found = only_series(discover(file)), header(file)
    assert (series.series_uid, series.series_number, series.part, series.key) == ("1.2.3.4", 7, 0, "1.2.3.4")
    assert (series.study_uid, series.frame_of_reference_uid) == (ds.StudyInstanceUID, ds.FrameOfReferenceUID)
    assert (series.rows, series.columns, series.pixel_spacing_mm) == (16, 20, (0.8, 0.7))
    assert series.orientation == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    assert series.folder == str(tmp_path)
    assert found == SliceHeader(
        path=str(file), member=None, frame=0, frames=1, file_bytes=file.stat().st_size,
        mtime_ns=file.stat().st_mtime_ns, sop_instance_uid=ds.SOPInstanceUID, instance_number=1,
        position_mm=(-100, -120, -300), localizer=False, secondary=False, modality="CT", temporal_position=3,
        acquisition_number=2,
        acquisition_time=found.acquisition_time, reconstruction=found.reconstruction, phase="", rescale_slope=0.0444,
        rescale_intercept=-8.5, rescale_type="HU", photometric="MONOCHROME2", samples_per_pixel=1, bits_allocated=16,
        bits_stored=12, high_bit=11, signed=True, padding=-2000, padding_limit=None,
        transfer_syntax="1.2.840.10008.1.2.1", pixel_offset=found.pixel_offset, pixel_bytes=640,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"AcquisitionTime": "120001"}, "acquisition_time"),
        ({"AcquisitionDate": "20250102"}, "acquisition_time"),
        ({"AcquisitionDateTime": "20250101120000.5"}, "acquisition_time"),
        ({"ConvolutionKernel": "LUNG"}, "reconstruction"),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]}, "reconstruction"),
        ({"ContentTime": "120001", "InstanceNumber": 9}, None),
    ],
)
def test_times_and_reconstructions_are_kept_as_hashes_only(
    tmp_path: Path, changes: dict[str, Any], differs: str | None
) -> None:
    # Traps 6, 33.
    def plain(ds: Dataset, _: int) -> None:
        ds.AcquisitionDate, ds.AcquisitionTime, ds.ConvolutionKernel = "20250101", "120000", "STANDARD"

    def other(ds: Dataset, k: int) -> None:
        plain(ds, k)
        for keyword, value in changes.items():
            setattr(ds, keyword, value)

    one, two = (
        header(write(tmp_path / name, 1, change, series_uid="1.2.3")[0])
        for name, change in (("one", plain), ("two", other))
    )
    assert (one.acquisition_time != two.acquisition_time) is (differs == "acquisition_time")
    assert (one.reconstruction != two.reconstruction) is (differs == "reconstruction")
    for found in (one, two):
        text = repr(found._replace(path="", mtime_ns=0, sop_instance_uid=""))  # these contain arbitrary digits
        assert not any(said in text for said in ("20250101", "1200", "STANDARD", "LUNG", "PRIMARY"))


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_the_pixel_offset_is_where_the_pixels_begin(tmp_path: Path, syntax: UID, meta: bool) -> None:
    # Trap 29: sequences, private elements, an icon with Pixel Data, and an element after the pixels.
    def change(ds: Dataset, _: int) -> None:
        icon = Dataset()
        icon.Rows, icon.Columns, icon.BitsAllocated = 2, 2, 8
        icon.add_new("PixelData", "OB", b"\1\2\3\4")
        ds.IconImageSequence = [icon]
        ds.add_new(0x00091010, "OB", b"\xe0\x7f\x10\x00OW\0\0\0\0")
        ds.add_new(0xFFFCFFFC, "OB", bytes(20))

    for file, pixels in zip(write(tmp_path, 3, change), noise(3), strict=True):
        file.write_bytes(encoded_natively(pydicom.dcmread(file), syntax, meta=meta))
        found = header(file)
        assert found.pixel_offset is not None
        assert found.pixel_bytes == 640
        data = file.read_bytes()[found.pixel_offset : found.pixel_offset + 640]
        assert data == pixels.astype("<i2").tobytes()


def test_the_pixel_offset_in_big_endian_files_is_where_the_pixels_begin(tmp_path: Path) -> None:
    # Trap 29.
    (file,) = write(tmp_path, 1)
    file.write_bytes(encoded_natively(pydicom.dcmread(file), ExplicitVRBigEndian))
    found = header(file)
    assert found.transfer_syntax == ExplicitVRBigEndian
    assert found.pixel_offset is not None
    assert found.pixel_bytes == 640
    assert file.read_bytes()[found.pixel_offset : found.pixel_offset + 640] == noise(1).astype(">i2").tobytes()


def test_the_pixel_offset_in_deflated_files_counts_inflated_bytes(tmp_path: Path) -> None:
    # Trap 29.
    (file,) = write(tmp_path, 1)
    data = encoded_natively(pydicom.dcmread(file), DeflatedExplicitVRLittleEndian)
    file.write_bytes(data)
    # PS3.10, 7.1: preamble and prefix are 128 + 4 bytes; an element of 12 bytes with the length of the rest follows.
    unpacked = zlib.decompress(data[144 + int.from_bytes(data[140:144], "little") :], -zlib.MAX_WBITS)
    found = header(file)
    assert found.transfer_syntax == DeflatedExplicitVRLittleEndian
    assert found.pixel_offset is not None
    assert found.pixel_bytes == 640
    assert unpacked[found.pixel_offset : found.pixel_offset + 640] == noise(1).astype("<i2").tobytes()


def test_encoded_pixels_have_no_pixel_offset(tmp_path: Path) -> None:
    # Trap 29.
    (file,) = write(tmp_path, 1)
    ds = pydicom.dcmread(file)
    ds.compress(RLELossless)
    ds.save_as(file)
    assert header(file).transfer_syntax == RLELossless
    assert (header(file).pixel_offset, header(file).pixel_bytes) == (None, None)


# Series


def test_one_folder_may_hold_several_series_and_one_series_several_folders(tmp_path: Path) -> None:
    write(tmp_path / "a", 3, series_uid="1.1", series_number=1)
    for n, file in enumerate(write(tmp_path / "a", 4, series_uid="1.2", series_number=2)):
        (tmp_path / "a" / str(n % 2)).mkdir(exist_ok=True)
        file.rename(tmp_path / "a" / str(n % 2) / file.name)
    write(tmp_path / "b", 2, series_uid="1.3", series_number=1)
    cohort = discover(tmp_path)
    assert [(s.key, len(s.slices), Path(s.folder).name) for s in cohort] == [
        ("1.1", 3, "a"), ("1.2", 4, "a"), ("1.3", 2, "b"),
    ]  # fmt: skip
    assert cohort[1] is cohort.series[1]
    assert cohort[1:] == cohort.series[1:]


def test_a_series_in_two_input_folders_is_one_series(tmp_path: Path) -> None:
    files = write(tmp_path / "a", 4, series_uid="1.1")
    (tmp_path / "b").mkdir()
    files[0].rename(tmp_path / "b" / files[0].name)
    series = only_series(discover([tmp_path / "b", tmp_path / "a"]))
    assert len(series.slices) == 4
    assert series.folder == str(tmp_path)


def test_series_are_sorted_by_folder_and_number(tmp_path: Path) -> None:
    for number, folder in ((10, "a"), (9, "a"), (1, "b")):
        write(tmp_path / folder, 2, series_number=number)

    def unnumbered(ds: Dataset, _: int) -> None:
        ds.SeriesNumber = None

    write(tmp_path / "a", 2, unnumbered, series_number=77)
    assert [s.series_number for s in discover(tmp_path)] == [9, 10, None, 1]


def test_equal_geometry_does_not_join_series(tmp_path: Path) -> None:
    # Two kernels of one acquisition differ in the series UID only.
    write(tmp_path, 3, series_uid="1.1", series_number=1)
    write(tmp_path, 3, series_uid="1.2", series_number=2)
    assert [len(s.slices) for s in discover(tmp_path)] == [3, 3]


OTHER_KINDS: list[tuple[str, Any, str]] = [
    ("ImageOrientationPatient", [1, 0, 0, 0, 0, -1], "other orientation"),
    ("PixelSpacing", [0.8, 0.71], "other pixel spacing"),
    ("PixelSpacing", [0.7, 0.8], "other pixel spacing"),
    ("Rows", 20, "other matrix"),
    ("Columns", 16, "other matrix"),
]
NOT_SLICES: list[tuple[str, Any, str]] = [
    ("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"], "localizer"),
    ("SamplesPerPixel", 3, "colour"),
]


INCOMPLETE: list[tuple[str, Any, str]] = [
    ("ImageOrientationPatient", None, "no Image Orientation (Patient)"),
    ("PixelSpacing", None, "no Pixel Spacing"),
    ("ImageType", ["DERIVED", "SECONDARY"], "secondary image"),
]


@pytest.mark.parametrize(("keyword", "value", "why"), OTHER_KINDS + NOT_SLICES + INCOMPLETE)
def test_two_images_of_another_kind_are_left_out_with_the_reason(
    tmp_path: Path, keyword: str, value: Any, why: str
) -> None:
    # Traps 9, 10: a scout or a screenshot inside the series.
    def change(ds: Dataset, k: int) -> None:
        ds["PixelData"].VR = "OW"
        if k in (1, 3):
            setattr(ds, keyword, value)

    write(tmp_path, 6, change, series_uid="1.2.3")
    series = only_series(discover(tmp_path))
    assert (series.key, series.part, len(series.slices)) == ("1.2.3", 0, 4)
    assert series.left_out == (("S1-0003.dcm", why), ("S1-0005.dcm", why))
    assert [i.code for i in series.irregularities] == ["left-out"]
    assert f"S1-0003.dcm ({why})" in series.irregularities[0].text


@pytest.mark.parametrize(("keyword", "value"), [(keyword, value) for keyword, value, _ in OTHER_KINDS])
def test_three_images_of_another_kind_are_a_separate_volume(tmp_path: Path, keyword: str, value: Any) -> None:
    # Traps 9, 10: a second reconstruction inside the series.
    def change(ds: Dataset, k: int) -> None:
        if k in (1, 3, 5):
            setattr(ds, keyword, value)

    write(tmp_path, 7, change, series_uid="1.2.3")
    large, small = discover(tmp_path)
    assert (large.key, large.part, len(large.slices)) == ("1.2.3#1", 1, 4)
    assert (small.key, small.part, len(small.slices)) == ("1.2.3#2", 2, 3)
    assert names(small) == {"S1-0006.dcm", "S1-0004.dcm", "S1-0002.dcm"}
    assert large.label == "series-1-c47f5b-part1"  # printf 1.2.3 | sha256sum
    assert large.left_out == small.left_out == ()
    assert [[i.code for i in s.irregularities] for s in (large, small)] == [["mixed"], ["mixed"]]


@pytest.mark.parametrize(("keyword", "value", "why"), NOT_SLICES)
def test_any_number_of_images_that_are_not_slices_is_left_out(
    tmp_path: Path, keyword: str, value: Any, why: str
) -> None:
    # Traps 9, 10.
    def change(ds: Dataset, k: int) -> None:
        ds["PixelData"].VR = "OW"
        if k < 4:
            setattr(ds, keyword, value)

    write(tmp_path, 7, change)
    series = only_series(discover(tmp_path))
    assert names(series) == {"S1-0001.dcm", "S1-0002.dcm", "S1-0003.dcm"}
    assert [reason for _, reason in series.left_out] == [why] * 4


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("AcquisitionNumber", (1, 2)),
        ("TemporalPositionIdentifier", (1, 2)),
        ("AcquisitionTime", ("120000", "120030.5")),
        ("ConvolutionKernel", ("STANDARD", "LUNG")),
    ],
)
def test_acquisitions_with_equal_positions_are_separate_volumes(
    tmp_path: Path, keyword: str, values: tuple[Any, Any]
) -> None:
    # Trap 6: every position twice, interleaved as files are.
    def change(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-100, -120, -300 + k // 2 * 2.5]
        setattr(ds, keyword, values[k % 2])

    write(tmp_path, 10, change, series_uid="1.2.3")
    one, two = discover(tmp_path)
    assert (one.key, two.key) == ("1.2.3#1", "1.2.3#2")
    # File S1-0010 is k = 0; the volume of the file first by Instance Number comes first: S1-0001, k = 9.
    assert names(one) == {f"S1-{n:04}.dcm" for n in (1, 3, 5, 7, 9)}
    assert names(two) == {f"S1-{n:04}.dcm" for n in (2, 4, 6, 8, 10)}
    for series in (one, two):
        assert [i.code for i in series.irregularities] == ["acquisitions"]
        assert stack(series).geometry.spacing_mm[0] == pytest.approx(2.5)


@pytest.mark.parametrize("policy", ["strict", "keep"])
def test_other_policies_than_fix_record_acquisitions_without_splitting_them(
    tmp_path: Path, policy: Literal["strict", "keep"]
) -> None:
    # Trap 6.
    def change(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-100, -120, -300 + k // 2 * 2.5]
        ds.AcquisitionNumber = k % 2

    write(tmp_path, 10, change)
    series = only_series(discover(tmp_path, Rules(policy=policy)))
    assert len(series.slices) == 10
    assert [i.code for i in series.irregularities] == ["acquisitions"]


def test_small_differences_do_not_split_a_series(tmp_path: Path) -> None:
    # Trap 8: rounding of cosines and spacings.
    def change(ds: Dataset, k: int) -> None:
        if k % 2:
            ds.ImageOrientationPatient = ["1", "0.0001", "0", "-0.0001", "1", "0"]
            ds.PixelSpacing = ["0.8001", "0.7"]

    write(tmp_path, 6, change)
    series = only_series(discover(tmp_path))
    assert (series.part, len(series.slices)) == (0, 6)
    assert series.key == series.series_uid


def test_slices_without_a_series_uid_are_grouped_by_folder_and_rejected(tmp_path: Path) -> None:
    def change(ds: Dataset, _: int) -> None:
        del ds.SeriesInstanceUID

    for folder in "ab":
        write(tmp_path / folder, 3, change)
    cohort = discover(tmp_path)
    assert [(Path(s.folder).name, len(s.slices)) for s in cohort] == [("a", 3), ("b", 3)]
    for series in cohort:
        with pytest.raises(InputError, match="no Series Instance UID"):
            stack(series)


def test_the_key_of_each_series_is_unique(tmp_path: Path) -> None:
    # Trap 33: the manifest has one row per key. Without a UID, only folder and part distinguish series.
    def without_uid(ds: Dataset, k: int) -> None:
        del ds.SeriesInstanceUID
        if k > 2:
            ds.Rows, ds.Columns = 20, 16

    for folder in "ab":
        write(tmp_path / folder, 6, without_uid)
    write(tmp_path / "c", series_uid="1.2.3")
    keys = [s.key for s in discover(tmp_path)]
    assert len(keys) == 5
    assert len(set(keys)) == len(keys)


# Order, identity, privacy


def map_in_order(order: Callable[[list[Any]], Iterable[Any]]) -> Callable[..., Iterator[Any]]:
    """Return a `map_` whose results come in another order, as from worker processes."""
    return lambda function, tasks: iter([(task, function(task)) for task in order(tasks)])


def test_series_do_not_depend_on_the_order_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Trap 1. Two stacks of equal length in one UID, names interleaved; cosines that differ by rounding.
    def change(ds: Dataset, k: int) -> None:
        if k in (0, 3, 4):
            ds.PixelSpacing = ["0.9", "0.9"]
            ds.ImagePositionPatient = [0, 0, 2.5 * k if k else 5]
        if k % 2:
            ds.ImageOrientationPatient = ["1", "0.0001", "0", "-0.0001", "1", "0"]

    write(tmp_path, 6, change)
    monkeypatch.setattr("gpuprep.dicom.discover.FILES_PER_TASK", 1)
    seen = []
    for order in (list, lambda tasks: tasks[::-1], lambda tasks: tasks[3:] + tasks[:3]):
        cohort = discover(tmp_path, map_=map_in_order(order))
        seen.append([(s.key, s.fingerprint, names(s), s.orientation, s.pixel_spacing_mm, s.folder) for s in cohort])
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


def test_counts_and_errors_do_not_depend_on_the_order_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    write(tmp_path / "mr", 2, as_class("1.2.840.10008.5.1.4.1.1.4"))
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text("text")
        (tmp_path / f"link{n}").symlink_to(f"nowhere{n}")
    monkeypatch.setattr("gpuprep.dicom.discover.FILES_PER_TASK", 2)
    one, two = (discover(tmp_path, map_=map_in_order(order)) for order in (list, reversed))
    assert one.passed_over == two.passed_over == {"MR Image Storage": 2, "not DICOM": 3}
    assert list(one.passed_over) == list(two.passed_over)
    assert one.unreadable == two.unreadable
    assert len(one.unreadable) == 3


# The index of headers


class RecordingMap:
    """A `map_` that records the files whose headers are read."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, function: Callable[[Any], Any], tasks: list[list[str]]) -> Iterator[Any]:
        for task in tasks:
            self.names += [os.path.basename(path) for path in task]
            yield task, function(task)


def test_unchanged_files_are_not_read_again_and_give_the_same_cohort(tmp_path: Path) -> None:
    files = write(tmp_path / "in", 4)
    write(tmp_path / "in" / "mr", 1, as_class("1.2.840.10008.5.1.4.1.1.4"))
    write(tmp_path / "in" / "deep", 3)[0].write_bytes(bytes(128) + b"DICM" + b"\x02\0\0\0UL\4\0\xff")
    (tmp_path / "in" / "notes.txt").write_text("text")
    plain = discover(tmp_path / "in")
    index = tmp_path / "index" / "headers.sqlite"
    first, second, third = RecordingMap(), RecordingMap(), RecordingMap()
    assert discover(tmp_path / "in", index=index, map_=first) == plain
    assert len(first.names) == 9
    assert discover(tmp_path / "in", index=index, map_=second) == plain
    assert second.names == []
    # One touched, one new, one gone.
    os.utime(files[0], ns=(1, 1))
    (tmp_path / "in" / "more.txt").write_text("text")
    files[1].unlink()
    assert discover(tmp_path / "in", index=index, map_=third) == discover(tmp_path / "in")
    assert sorted(third.names) == ["S1-0004.dcm", "more.txt"]


@pytest.mark.parametrize("content", [b"no database at all" * 99, b""], ids=["text", "empty"])
def test_an_invalid_index_is_ignored(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "in", 4)
    (tmp_path / "index").write_bytes(content)
    assert discover(tmp_path / "in", index=tmp_path / "index") == discover(tmp_path / "in")


def test_the_fingerprint_depends_on_the_files_alone(tmp_path: Path) -> None:
    files = write(tmp_path / "a", 4)
    series = only_series(discover(tmp_path))
    first = series.fingerprint
    for slices in itertools.permutations(series.slices):
        assert replace(series, slices=slices).fingerprint == first
    # Copied elsewhere under other names, with equal times: the same.
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "c")
    for n, file in enumerate(sorted((tmp_path / "b" / "c").iterdir())):
        file.rename(file.with_name(f"{9 - n}"))
    assert only_series(discover(tmp_path / "b")).fingerprint == first
    # Touched, longer, another instance, fewer: different.
    seen = {first}
    status = files[2].stat()
    os.utime(files[2], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    seen.add(only_series(discover(tmp_path / "a")).fingerprint)
    with files[2].open("ab") as f:
        f.write(b"\0\0")
    os.utime(files[2], ns=(status.st_atime_ns, status.st_mtime_ns))
    seen.add(only_series(discover(tmp_path / "a")).fingerprint)
    other = series.slices[0]._replace(sop_instance_uid="1.2.3")
    seen.add(replace(series, slices=(other, *series.slices[1:])).fingerprint)
    files[0].unlink()
    seen.add(only_series(discover(tmp_path / "a")).fingerprint)
    assert len(seen) == 5


def test_the_cohort_contains_no_patient_data(tmp_path: Path) -> None:
    def identifying(ds: Dataset, _: int) -> None:
        assert ds.PatientName == "Phantom^Thorax"
        ds.InstitutionName = ds.ImageComments = ds.RequestedProcedureDescription = "Sesame^Clinic"
        ds.ReferringPhysicianName, ds.AccessionNumber = "Sesame^Who", "SESAME1"
        ds.add_new(0x00091001, "LO", "Sesame private")

    def structures(ds: Dataset, _: int) -> None:
        identifying(ds, 0)
        as_class("1.2.840.10008.5.1.4.1.1.481.3")(ds, 0)

    write(tmp_path / "ct", 3, identifying)
    write(tmp_path / "rt", 1, structures)
    spoiled, cut, deflated = write(tmp_path / "bad", 3, identifying)
    overwrite_value(spoiled, 0x00280030, b"DS", b"no\\number")
    cut.write_bytes(cut.read_bytes()[:420])
    deflated.write_bytes(encoded_natively(pydicom.dcmread(deflated), DeflatedExplicitVRLittleEndian)[:-400])
    cohort = discover(tmp_path)
    out = [pickle.dumps(cohort), repr(cohort).encode()]
    for series in cohort:
        try:
            stack(series)
        except InputError as exc:
            out.append(str(exc).encode())
    for secret in (b"phantom", b"thorax", b"sesame", b"19000101"):
        assert all(secret not in text.lower() for text in out)


def test_an_empty_dcm_file_is_reported(tmp_path: Path) -> None:
    # An aborted copy leaves such files; the series looks complete without them.
    files = write_series(tmp_path / "ct", np.zeros((4, 5, 6), dtype=np.int16), (2.5, 0.8, 0.7))
    files[-1].write_bytes(b"")
    cohort = discover(tmp_path)
    assert cohort.unreadable == ((str(files[-1]), "ValueError: the file is empty"),)
    assert [len(s.slices) for s in cohort] == [3]
