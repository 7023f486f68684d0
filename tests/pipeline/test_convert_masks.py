"""Conversion of segmentations with their images: matching, label volumes, and reports about parts left out."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from numpy.typing import NDArray
from segmentations import write_rtstruct, write_seg
from typer.testing import CliRunner

import gpuprep
from gpuprep import Masks, Recipe
from gpuprep.cli.app import app
from gpuprep.core.geometry import Geometry
from gpuprep.errors import RequestError
from gpuprep.pipeline.events import Run
from gpuprep.pipeline.scan import scan
from gpuprep.testing import write_series

SHAPE = (6, 20, 24)
SPACING_MM = (2.0, 1.0, 1.0)
ORIGIN_MM = (-10.0, -20.0, 30.0)

RAW = Recipe(spacing_mm=None, size=None, dtype="int16", window_hu=None)
"""No resampling, so that masks equal the outlines as drawn."""


class Ct:
    """A series on disk."""

    def __init__(self, folder: Path, **options: Any) -> None:
        values = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
        self.folder = folder
        self.files = write_series(folder, values, SPACING_MM, **({"origin_mm": ORIGIN_MM} | options))
        first = pydicom.dcmread(self.files[0], stop_before_pixels=True)
        self.uid, self.frame_uid = str(first.SeriesInstanceUID), str(first.FrameOfReferenceUID)
        self.sop_uids = [str(pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID) for f in self.files]


def square(k: int, low: float = 4.5, high: float = 9.5, right: float = 0) -> NDArray[np.float64]:
    """Return a square on slice k from row and column `low` to `high`, moved right by `right` columns."""
    corners = np.array([(low + right, low), (high + right, low), (high + right, high), (low + right, high)])
    return np.column_stack([corners + ORIGIN_MM[:2], np.full(4, ORIGIN_MM[2] + SPACING_MM[0] * k)])


def box(ks: range, rows: slice, columns: slice, value: int = 1) -> NDArray[Any]:
    expected = np.zeros(SHAPE, np.uint8)
    expected[ks.start : ks.stop, rows, columns] = value
    return expected


LEFT = [square(k) for k in range(1, 4)]
RIGHT = [square(k, right=8) for k in range(2, 6)]
LEFT_BOX = box(range(1, 4), slice(5, 10), slice(5, 10))
RIGHT_BOX = box(range(2, 6), slice(5, 10), slice(13, 18))


def rtstruct(path: Path, ct: Ct, **rois: Any) -> Path:
    return write_rtstruct(path, rois or {"left": LEFT, "right": RIGHT}, series_uid=ct.uid, frame_uid=ct.frame_uid)


def volume(folder: Path) -> NDArray[Any]:
    return np.stack([tifffile.imread(f) for f in sorted(folder.glob("*.tif"))])


def sidecar(run: Run, out: Path, n: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / run.results[n].folder / "volume.json").read_text())
    return found


@pytest.fixture
def ct(tmp_path: Path) -> Ct:
    return Ct(tmp_path / "dicom" / "patient-1")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def convert(tmp_path: Path, masks: Any, recipe: Recipe = RAW, **options: Any) -> Run:
    return gpuprep.convert(tmp_path / "dicom", tmp_path / "out", recipe, masks=masks, **options)


def test_labels_are_written_beside_the_image_on_the_same_grid(tmp_path: Path, ct: Ct, out: Path) -> None:
    run = convert(tmp_path, rtstruct(tmp_path / "rs.dcm", ct))
    assert run.counts == {"ok": 1}
    assert run.exit_code == 0
    folder = out / run.results[0].folder
    labels = volume(folder / "labels")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, LEFT_BOX + 2 * RIGHT_BOX)
    assert volume(folder).shape == labels.shape
    found = sidecar(run, out)
    left, right = found["labels"]
    assert (left["name"], left["value"], left["file"], left["contours"], left["slices"]) == ("left", 1, "labels", 3, 3)
    assert (left["source_voxels"], left["voxels"]) == (75, 75)
    assert (left["source_ml"], left["ml"]) == (pytest.approx(0.15), pytest.approx(0.15))  # 75 × 2 mm³
    assert (right["name"], right["value"], right["voxels"]) == ("right", 2, 100)
    (source,) = found["segmentations"]
    assert source["format"] == "RTSTRUCT"
    assert "SOP Class UID" in source["why"]
    assert json.loads((out / "labels.json").read_text()) == {"left": 1, "right": 2}
    assert run.results[0].labels == tuple(found["labels"])


def test_a_label_stack_is_one_file_with_voxel_size(tmp_path: Path, ct: Ct, out: Path) -> None:
    run = convert(tmp_path, rtstruct(tmp_path / "rs.dcm", ct), replace(RAW, format="tif-stack", compression="zlib"))
    folder = out / run.results[0].folder
    assert sorted(f.name for f in folder.iterdir()) == ["labels.tif", "preview.jpg", "volume.json", "volume.tif"]
    with tifffile.TiffFile(folder / "labels.tif") as tif:
        np.testing.assert_array_equal(tif.asarray(), LEFT_BOX + 2 * RIGHT_BOX)
        metadata = tif.imagej_metadata or {}
        assert (metadata["spacing"], metadata["unit"]) == (2.0, "mm")
        assert (metadata["min"], metadata["max"]) == (0, 2)
        assert "c1" not in metadata  # no calibration, because labels are no HU
    assert sidecar(run, out)["labels"][0]["file"] == "labels.tif"


def test_with_per_roi_each_structure_has_a_separate_volume(tmp_path: Path, ct: Ct, out: Path) -> None:
    recipe = replace(RAW, masks=Masks(layout="per-roi"))
    names = {"left/lung": LEFT, "..": RIGHT, "LEFT/lung": RIGHT}
    run = convert(tmp_path, write_rtstruct(tmp_path / "rs.dcm", names, series_uid=ct.uid), recipe)
    labels = sidecar(run, out)["labels"]
    assert [label["name"] for label in labels] == list(names)
    files = [label["file"] for label in labels]
    assert len({f.casefold() for f in files}) == 3  # different even on a case-insensitive file system
    assert all(f.count("/") == 1 and f.startswith("masks/") and ".." not in f.split("/") for f in files)
    folder = out / run.results[0].folder
    for file, expected in zip(files, (LEFT_BOX, RIGHT_BOX, RIGHT_BOX), strict=True):
        np.testing.assert_array_equal(volume(folder / file), expected)
    assert convert(tmp_path, tmp_path / "rs.dcm", recipe).counts == {"skipped": 1}


def test_overlapping_structures_are_refused_by_name_unless_written_per_roi(tmp_path: Path, ct: Ct, out: Path) -> None:
    overlapping = {"GTV": LEFT, "PTV": [square(k, 3.5, 10.5) for k in range(6)], "elsewhere": RIGHT}
    path = write_rtstruct(tmp_path / "rs.dcm", overlapping, series_uid=ct.uid)
    run = convert(tmp_path, path)
    (result,) = run.results
    assert (result.status, result.codes) == ("rejected", ("mask-overlap",))
    assert "GTV and PTV (75 voxels)" in result.reason
    assert "--mask-layout per-roi" in result.reason
    assert "elsewhere" not in result.reason
    assert not list(out.rglob("*.tif"))  # the image is not written without its masks
    assert convert(tmp_path, path, replace(RAW, masks=Masks(layout="per-roi"))).counts == {"ok": 1}
    chosen = convert(tmp_path, path, replace(RAW, masks=Masks(roi="^ptv$|else")))
    assert [label["name"] for label in sidecar(chosen, out)["labels"]] == ["PTV", "elsewhere"]


def test_aliases_give_the_same_name_and_value_in_every_series(tmp_path: Path, out: Path) -> None:
    one, other = (Ct(tmp_path / "dicom" / p) for p in ("a", "b"))
    (tmp_path / "rs").mkdir()
    rtstruct(tmp_path / "rs" / "a.dcm", one, Lung_L=LEFT, z=RIGHT)
    rtstruct(tmp_path / "rs" / "b.dcm", other, **{"other": RIGHT, "left  LUNG": LEFT})
    recipe = replace(RAW, masks=Masks(aliases={"lung_r": ["R"], "lung_l": ["lung_l", "Left lung"]}))  # type: ignore[arg-type]
    run = convert(tmp_path, tmp_path / "rs", recipe)
    assert json.loads((out / "labels.json").read_text()) == {"lung_r": 1, "lung_l": 2, "other": 3, "z": 4}
    for n, name in ((0, "z"), (1, "other")):
        found = {label["name"]: label["value"] for label in sidecar(run, out, n)["labels"]}
        assert found == {"lung_l": 2, name: {"other": 3, "z": 4}[name]}
        np.testing.assert_array_equal(volume(out / run.results[n].folder / "labels") == 2, LEFT_BOX == 1)


def test_two_names_of_one_alias_in_one_file_are_refused(tmp_path: Path, ct: Ct) -> None:
    path = rtstruct(tmp_path / "rs.dcm", ct, **{"Lung L": LEFT, "Left lung": RIGHT})
    run = convert(tmp_path, path, replace(RAW, masks=Masks(aliases={"lung": ["lung l", "left lung"]})))  # type: ignore[arg-type]
    assert run.results[0].status == "rejected"
    assert "both stand for lung" in run.results[0].reason


def test_equal_names_in_two_files_are_distinguished(tmp_path: Path, ct: Ct, out: Path) -> None:
    rtstruct(tmp_path / "anna.dcm", ct, GTV=LEFT)
    rtstruct(tmp_path / "bert.dcm", ct, GTV=RIGHT)
    run = convert(tmp_path, [tmp_path / "anna.dcm", tmp_path / "bert.dcm"])
    assert [label["name"] for label in sidecar(run, out)["labels"]] == ["GTV (anna)", "GTV (bert)"]


def test_a_label_value_is_never_given_to_another_structure(tmp_path: Path, ct: Ct, out: Path) -> None:
    convert(tmp_path, rtstruct(tmp_path / "rs.dcm", ct, m=LEFT))
    other = Ct(tmp_path / "dicom" / "patient-0")
    second = rtstruct(tmp_path / "second.dcm", other, a=RIGHT, m=LEFT)
    run = convert(tmp_path, [tmp_path / "rs.dcm", second])
    assert run.counts == {"ok": 1, "skipped": 1}
    assert json.loads((out / "labels.json").read_text()) == {"m": 1, "a": 2}


def test_more_than_255_structures_are_written_as_uint16(tmp_path: Path, ct: Ct, out: Path) -> None:
    rois = {f"roi {n:03}": [square(n % 6, 0.5, 1.5)] if n < 6 else [] for n in range(300)} | {"zz": RIGHT}
    run = convert(tmp_path, write_rtstruct(tmp_path / "rs.dcm", rois, series_uid=ct.uid))
    labels = volume(out / run.results[0].folder / "labels")
    assert labels.dtype == np.uint16
    assert labels.max() == 301
    np.testing.assert_array_equal(labels == 301, RIGHT_BOX == 1)


def test_unchanged_segmentations_are_skipped_and_changed_ones_converted_again(
    tmp_path: Path, ct: Ct, out: Path
) -> None:
    path = rtstruct(tmp_path / "rs.dcm", ct)
    assert convert(tmp_path, path).counts == {"ok": 1}
    assert convert(tmp_path, path).counts == {"skipped": 1}
    rtstruct(path, ct, left=LEFT, right=LEFT[:1] * 0 + RIGHT[:2])
    run = convert(tmp_path, path)
    assert run.counts == {"ok": 1}
    np.testing.assert_array_equal(
        volume(out / run.results[0].folder / "labels") == 2, box(range(2, 4), slice(5, 10), slice(13, 18)) == 1
    )


def test_a_lost_label_file_is_written_again(tmp_path: Path, ct: Ct, out: Path) -> None:
    path = rtstruct(tmp_path / "rs.dcm", ct)
    run = convert(tmp_path, path)
    (out / run.results[0].folder / "labels" / "0002.tif").unlink()
    assert convert(tmp_path, path).counts == {"ok": 1}
    assert len(list((out / run.results[0].folder / "labels").iterdir())) == 6


def test_a_foreign_file_among_the_labels_is_not_removed(tmp_path: Path, ct: Ct, out: Path) -> None:
    path = rtstruct(tmp_path / "rs.dcm", ct)
    stranger = out / convert(tmp_path, path).results[0].folder / "labels" / "corrected.nii"
    stranger.write_text("a day's work")
    run = convert(tmp_path, path, replace(RAW, dtype="float32"))
    assert run.results[0].status == "failed"
    assert "also holds labels/corrected.nii, which gpuprep did not write" in run.results[0].reason
    assert stranger.read_text() == "a day's work"


def test_masks_without_image_equal_those_with_image(tmp_path: Path, ct: Ct) -> None:
    path = rtstruct(tmp_path / "rs.dcm", ct)
    recipe = Recipe(size=(30, 40))
    beside = gpuprep.convert(ct.folder, tmp_path / "both", recipe, masks=path)
    alone = gpuprep.convert(ct.folder, tmp_path / "alone", replace(recipe, image=False), masks=path)
    folders = [tmp_path / o / r.results[0].folder for o, r in (("both", beside), ("alone", alone))]
    np.testing.assert_array_equal(volume(folders[0] / "labels"), volume(folders[1] / "labels"))
    assert not list(folders[1].glob("*.tif"))
    found = sidecar(alone, tmp_path / "alone")
    assert found["affine_lps"] == sidecar(beside, tmp_path / "both")["affine_lps"]
    assert "hu" not in found


def test_masks_without_image_never_replace_images(tmp_path: Path, ct: Ct, out: Path) -> None:
    convert(tmp_path, None)
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*.tif")}
    with pytest.raises(RequestError, match="holds images, which masks alone would replace"):
        convert(tmp_path, rtstruct(tmp_path / "rs.dcm", ct), replace(RAW, image=False))
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*.tif")} == before


def test_images_without_masks_never_replace_masks(tmp_path: Path, ct: Ct, out: Path) -> None:
    convert(tmp_path, rtstruct(tmp_path / "rs.dcm", ct))
    with pytest.raises(RequestError, match="holds masks, which would go: give --masks again"):
        convert(tmp_path, None)
    assert len(list(out.rglob("labels/*.tif"))) == 6


def test_segmentations_without_a_series_are_reported_and_affect_no_series(tmp_path: Path, ct: Ct, out: Path) -> None:
    (tmp_path / "rs").mkdir()
    rtstruct(tmp_path / "rs" / "right.dcm", ct)
    write_rtstruct(tmp_path / "rs" / "stray.dcm", {"x": LEFT}, series_uid="1.2.3.4", frame_uid="1.2.3.5")
    (tmp_path / "rs" / "notes.txt").write_text("Contours by A. B.\nas discussed\n")
    (tmp_path / "rs" / "README.md").write_text("# Contours\n")
    (tmp_path / "rs" / "legend.txt").write_text('1 255 0 0 1 1 1 "left"\n2 0 255 0 1 1 1 "right"\n')
    shutil.copy(ct.files[0], tmp_path / "rs" / "slice.dcm")  # an image in the folder gives no complaint
    run = convert(tmp_path, tmp_path / "rs")
    assert run.counts == {"ok": 1}
    assert run.exit_code == 1
    reasons = {Path(path).name: why for path, why in run.unmatched}
    assert set(reasons) == {"stray.dcm", "notes.txt"}
    assert "refers to a series and a frame of reference that are not here" in reasons["stray.dcm"]
    with closing(sqlite3.connect(out / "manifest.sqlite")) as db:
        rows = {Path(r[0]).name: r for r in db.execute("SELECT * FROM segmentations")}
    assert rows["right.dcm"][3] == ct.uid
    assert rows["right.dcm"][1] == "RTSTRUCT"
    assert rows["slice.dcm"][4].startswith("CT Image Storage cannot be read as a segmentation")
    assert "a legend only" in rows["legend.txt"][4]


def test_a_damaged_segmentation_rejects_its_series_and_no_other(tmp_path: Path, ct: Ct) -> None:
    other = Ct(tmp_path / "dicom" / "patient-2")
    (tmp_path / "masks" / "patient-2").mkdir(parents=True)
    shutil.copy(rtstruct(tmp_path / "rs.dcm", ct), tmp_path / "masks" / "rs.dcm")
    (tmp_path / "masks" / "patient-2" / "tumour_0003.txt").write_text("1 2\n3 4\n5 six\n")
    run = convert(tmp_path, tmp_path / "masks")
    found = {Path(r.source).name: r for r in run.results}
    assert found["patient-1"].status == "ok"
    assert (found["patient-2"].status, found["patient-2"].codes) == ("rejected", ("mask",))
    assert "tumour_0003.txt: line 3, column 3: a word is no number" in found["patient-2"].reason
    assert run.exit_code == 1
    assert other.uid in {r.key for r in run.results}


def test_a_series_without_segmentations_has_no_labels(tmp_path: Path, ct: Ct, out: Path) -> None:
    Ct(tmp_path / "dicom" / "patient-2")
    run = convert(tmp_path, rtstruct(tmp_path / "rs.dcm", ct))
    assert run.counts == {"ok": 2}
    bare = next(r for r in run.results if r.key != ct.uid)
    assert bare.labels is None
    assert "labels" not in json.loads((out / bare.folder / "volume.json").read_text())
    alone = gpuprep.convert(
        tmp_path / "dicom", tmp_path / "alone", replace(RAW, image=False), masks=tmp_path / "rs.dcm"
    )
    assert [r.key for r in alone.results] == [ct.uid]


def test_auto_finds_structure_sets_and_segs_among_the_images(tmp_path: Path, ct: Ct, out: Path) -> None:
    rtstruct(ct.folder / "rs.dcm", ct, left=LEFT)
    affine = np.array([[0, 0, 1, -10], [0, 1, 0, -20], [2, 0, 0, 30], [0, 0, 0, 1.0]])
    write_seg(ct.folder / "seg.dcm", {"right": RIGHT_BOX > 0}, Geometry(SHAPE, affine), series_uid=ct.uid)
    (ct.folder / "notes.xml").write_text("<notes/>")
    write_rtstruct(ct.folder / "of-an-mr.dcm", {"x": LEFT}, series_uid="1.2.3.4")
    for again in ("ok", "skipped"):  # the second time, they are read from the header index
        run = convert(tmp_path, "auto", index=tmp_path / "index.sqlite")
        assert run.counts == {again: 1}
        assert run.exit_code == 0
    labels = {label["name"]: label["value"] for label in sidecar(run, out)["labels"]}
    values = volume(out / run.results[0].folder / "labels")
    np.testing.assert_array_equal(values == labels["left"], LEFT_BOX == 1)
    np.testing.assert_array_equal(values == labels["right"], RIGHT_BOX == 1)


def test_one_text_file_per_slice_by_number_z_or_uid(tmp_path: Path, ct: Ct, out: Path) -> None:
    points = "5\t5\n10\t5\n10\t10\n5\t10\n"  # ImageJ counts from the corner: pixels 5 to 9
    names = {
        "number": [f"left_{k}" for k in range(1, 4)],
        "z": [f"left_z{ORIGIN_MM[2] + 2 * k:g}" for k in range(1, 4)],
        "uid": [f"left_{ct.sop_uids[k]}" for k in range(1, 4)],
    }
    for how, stems in names.items():
        folder = tmp_path / how
        folder.mkdir()
        for stem in stems:
            (folder / f"{stem}.txt").write_text(points)
        recipe = replace(RAW, masks=Masks(units="px", index_base=0, slice_order="stack"))
        run = convert(tmp_path, folder, recipe)
        assert run.counts == {"ok": 1}, run.results[0].reason
        (label,) = sidecar(run, out)["labels"]
        assert (label["name"], label["contours"], label["slices"]) == ("left", 3, 3)
        np.testing.assert_array_equal(volume(out / run.results[0].folder / "labels"), LEFT_BOX)


def test_ambiguous_slice_numbers_are_refused_with_the_options_that_settle_them(tmp_path: Path, out: Path) -> None:
    Ct(tmp_path / "dicom" / "p")
    lines = ["slice x y"] + [
        f"{k} {x} {y}" for k in (1, 2, 3) for x, y in ((4.5, 4.5), (9.5, 4.5), (9.5, 9.5), (4.5, 9.5))
    ]
    (tmp_path / "points.txt").write_text("\n".join(lines))
    run = convert(tmp_path, tmp_path / "points.txt", replace(RAW, masks=Masks(units="px")))
    assert run.results[0].status == "rejected"
    assert "use --index-base 0|1 and --slice-order stack|instance" in run.results[0].reason
    for masks, first in (
        (Masks(units="px", slice_order="stack", index_base=0), 1),
        (Masks(units="px", slice_order="instance"), 3),  # Instance Numbers fall from 6 to 1
    ):
        run = convert(tmp_path, tmp_path / "points.txt", replace(RAW, masks=masks))
        expected = box(range(first, first + 3), slice(5, 10), slice(5, 10))
        np.testing.assert_array_equal(volume(out / run.results[0].folder / "labels"), expected)


def test_slice_numbers_with_only_one_interpretation_are_accepted(tmp_path: Path, out: Path) -> None:
    # Instance Numbers fall from 6 to 1, as on many scanners; 0 occurs, so the numbers are indices along the normal.
    Ct(tmp_path / "dicom" / "p")
    lines = ["slice x y"] + [
        f"{k} {x} {y}" for k in (0, 1) for x, y in ((4.5, 4.5), (9.5, 4.5), (9.5, 9.5), (4.5, 9.5))
    ]
    (tmp_path / "points.txt").write_text("\n".join(lines))
    run = convert(tmp_path, tmp_path / "points.txt", replace(RAW, masks=Masks(units="px")))
    np.testing.assert_array_equal(
        volume(out / run.results[0].folder / "labels"), box(range(2), slice(5, 10), slice(5, 10))
    )


def test_text_files_are_matched_to_series_by_path(tmp_path: Path) -> None:
    cohort = {name: Ct(tmp_path / "dicom" / name) for name in ("p1", "p10", "p2")}
    content = "x_mm y_mm z_mm\n" + "\n".join(f"{x} {y} {z}" for x, y, z in square(2))
    places = {
        "masks/p1/tumour.txt": "p1",  # the same relative path
        "masks/p10.txt": "p10",
        f"masks/other/{cohort['p2'].uid}.txt": "p2",
        "masks/nobody.txt": "",
    }
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(content)
    (cohort["p2"].folder / "beside.txt").write_text(content)
    recipe = replace(RAW, masks=Masks(layout="per-roi"))
    run = convert(tmp_path, [tmp_path / "masks", cohort["p2"].folder / "beside.txt"], recipe)
    used = {Path(r.source).name: {Path(s["path"]).name for s in r.segmentations or ()} for r in run.results}
    assert used == {"p1": {"tumour.txt"}, "p10": {"p10.txt"}, "p2": {f"{cohort['p2'].uid}.txt", "beside.txt"}}
    ((path, why),) = run.unmatched
    assert Path(path).name == "nobody.txt"
    assert "gpuprep mask FILE --series DICOM_DIR" in why


def test_parts_of_a_segmentation_that_are_left_out_are_reported(tmp_path: Path, ct: Ct, out: Path) -> None:
    # Trap 40: contours are matched by position, with a tolerance of half a slice.
    near = square(2) + np.array([0, 0, 0.9])  # slices are 2 mm apart
    between = square(4) + np.array([0, 0, 1.0 + 0.1])
    slanting = square(3)
    slanting[:2, 2] += 2.5
    rois = {
        "found": [near, square(3), square(9), square(-1) - np.array([0, 0, 5])],
        "rounded": [between],
        "slanting": [slanting, square(5, right=8)],
        "empty": [],
        "small": [square(5, 4.6, 4.9)],
    }
    run = convert(tmp_path, write_rtstruct(tmp_path / "rs.dcm", rois, series_uid=ct.uid))
    assert run.counts == {"ok": 1}
    notes = " | ".join(run.results[0].warnings)
    assert "found: 2 contours left out: on no slice of the series" in notes
    assert "slanting: 1 contour left out: across slices" in notes
    assert "empty: it is empty" in notes
    assert "small: it covers no voxel" in notes
    by_name = {label["name"]: label for label in sidecar(run, out)["labels"]}
    assert set(by_name) == {"found", "rounded", "slanting", "small"}
    labels = volume(out / run.results[0].folder / "labels")
    found, rounded = (labels == by_name[name]["value"] for name in ("found", "rounded"))
    np.testing.assert_array_equal(found, box(range(2, 4), slice(5, 10), slice(5, 10)) == 1)
    np.testing.assert_array_equal(
        rounded, box(range(5, 6), slice(5, 10), slice(5, 10)) == 1
    )  # position 4.55 is nearest to slice 5


def test_of_several_contour_planes_near_one_slice_the_nearest_is_used(tmp_path: Path, ct: Ct, out: Path) -> None:
    # By the even-odd rule, squares drawn 0.4 and 0.8 mm from one slice would erase each other.
    fine = [square(2) + np.array([0, 0, dz]) for dz in (-0.8, -0.4, 0.0, 0.4, 0.8)]
    run = convert(tmp_path, rtstruct(tmp_path / "rs.dcm", ct, fine=fine))
    np.testing.assert_array_equal(
        volume(out / run.results[0].folder / "labels"), box(range(2, 3), slice(5, 10), slice(5, 10))
    )
    assert "4 contours left out: between slices" in " ".join(run.results[0].warnings)


def test_a_structure_without_voxels_after_resampling_is_reported(tmp_path: Path, ct: Ct) -> None:
    # Trap 22.
    dot = [square(1, 4.5, 5.5)]  # one voxel
    run = convert(
        tmp_path, rtstruct(tmp_path / "rs.dcm", ct, dot=dot, left=RIGHT), Recipe(spacing_mm=(2, 5, 5), size=None)
    )
    assert "dot: of its 1 voxel none is left" in " ".join(run.results[0].warnings)
    labels = {label["name"]: label for label in run.results[0].labels or ()}
    assert (labels["dot"]["source_voxels"], labels["dot"]["voxels"]) == (1, 0)
    assert labels["left"]["voxels"] > 0


def test_contours_on_an_interpolated_slice_are_reported(tmp_path: Path, out: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "p")
    ct.files[3].unlink()
    recipe = replace(RAW, max_missing_share=0.5, spacing_mm=(2.0, 1.0, 1.0))
    run = convert(tmp_path, rtstruct(tmp_path / "rs.dcm", ct, left=LEFT), recipe)
    assert run.counts == {"fixed": 1}
    assert "left: 1 contour left out: on no slice of the series" in " ".join(run.results[0].warnings)
    # The interpolated slice has the labels of one neighbour; its image is a mixture of both.
    labels = volume(out / run.results[0].folder / "labels")
    assert labels.shape == SHAPE
    np.testing.assert_array_equal(labels[:3], LEFT_BOX[:3])
    assert labels[3].any() == labels[2].any() or not labels[3].any()


def test_outlines_on_a_tilted_series_keep_their_position_in_the_patient(tmp_path: Path, out: Path) -> None:
    # Each slice is shifted by 1 mm; outlines are in patient coordinates, so they are not.
    def tilt(ds: pydicom.Dataset, k: int) -> None:
        ds.ImagePositionPatient = [ORIGIN_MM[0] + 1.0 * k, ORIGIN_MM[1], ORIGIN_MM[2] + 2.0 * k]

    ct = Ct(tmp_path / "dicom" / "p", change=tilt)
    for policy in ("fix", "keep"):
        recipe = replace(RAW, policy=policy, spacing_mm=(2.0, 1.0, 1.0) if policy == "fix" else None)
        run = convert(tmp_path, rtstruct(tmp_path / "rs.dcm", ct, left=LEFT), recipe)
        labels = volume(out / run.results[0].folder / "labels")
        affine = np.array(sidecar(run, out)["affine_lps"])
        index = np.argwhere(labels)
        points = index @ affine[:3, :3].T + affine[:3, 3]
        assert len(points) == 75
        np.testing.assert_allclose(points.min(axis=0), np.array(ORIGIN_MM) + np.array([5, 5, 2]), atol=1e-6)
        np.testing.assert_allclose(points.max(axis=0), np.array(ORIGIN_MM) + np.array([9, 9, 6]), atol=1e-6)


def test_a_seg_on_a_coarser_grid_is_resampled_by_position(tmp_path: Path, ct: Ct, out: Path) -> None:
    # Half the resolution in every direction, frames twice as thick, edges aligned.
    affine = np.array([[0, 0, 2, -9.5], [0, 2, 0, -19.5], [4, 0, 0, 31], [0, 0, 0, 1.0]])
    coarse = np.zeros((3, 10, 12), bool)
    coarse[1, 2:5, 6:9] = True
    path = write_seg(tmp_path / "seg.dcm", {"x": coarse}, Geometry((3, 10, 12), affine), series_uid=ct.uid)
    run = convert(tmp_path, path)
    expected = np.repeat(np.repeat(np.repeat(coarse, 2, 0), 2, 1), 2, 2)
    np.testing.assert_array_equal(volume(out / run.results[0].folder / "labels"), expected)


def test_labels_are_identical_with_and_without_worker_processes(tmp_path: Path, ct: Ct) -> None:
    path = rtstruct(tmp_path / "rs.dcm", ct)
    recipe = Recipe(size=(30, 40), masks=Masks(resampling="smooth"))
    runs = {n: gpuprep.convert(ct.folder, tmp_path / f"out{n}", recipe, masks=path, jobs=n or None) for n in (0, 2)}
    folders = [tmp_path / f"out{n}" / run.results[0].folder / "labels" for n, run in runs.items()]
    assert [f.read_bytes() for f in sorted(folders[0].iterdir())] == [
        f.read_bytes() for f in sorted(folders[1].iterdir())
    ]


def test_scan_shows_the_segmentations_of_each_series(tmp_path: Path, ct: Ct) -> None:
    path = rtstruct(tmp_path / "rs.dcm", ct)
    (planned,) = scan(tmp_path / "dicom", RAW, masks=path).planned
    (summary,) = planned.segmentations
    assert (summary.format, summary.names) == ("RTSTRUCT", ("left", "right"))


def run_cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments), "--index", "none"])


def test_the_flag_masks_takes_several_files(tmp_path: Path, ct: Ct, out: Path) -> None:
    one, two = rtstruct(tmp_path / "1.dcm", ct, left=LEFT), rtstruct(tmp_path / "2.dcm", ct, right=RIGHT)
    done = run_cli(
        "convert", ct.folder, "--masks", one, two, "--out", out, "--spacing", "none", "--size", "none", "--json"
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [label["name"] for label in report["series"][0]["labels"]] == ["left", "right"]
    assert report["unmatched"] == []


def test_the_command_mask_writes_masks_without_image(tmp_path: Path, ct: Ct, out: Path) -> None:
    path = rtstruct(tmp_path / "rs.dcm", ct)
    flags = (
        "--spacing",
        "none",
        "--size",
        "none",
        "--mask-layout",
        "per-roi",
        "--roi",
        "LEFT",
        "--format",
        "tif-stack",
    )
    done = run_cli("mask", path, "--series", ct.folder, "--out", out, *flags)
    assert done.exit_code == 0, done.output
    files = sorted(str(f.relative_to(out)) for f in out.rglob("*.tif"))
    assert [Path(f).parts[-2:] for f in files] == [("masks", "left.tif")]
    np.testing.assert_array_equal(tifffile.imread(out / files[0]), LEFT_BOX)
    # The preview has its outline on black: slices of 20 × 24 mm are 128 × 154 pixels, 6.4 per mm: box from 32 to 63.
    (preview,) = out.rglob("preview.jpg")
    lit = imagecodecs.jpeg8_decode(preview.read_bytes())[:, :154].max(axis=2) > 128
    expected = np.zeros((128, 154), dtype=bool)
    expected[32:64, 32:64] = True
    expected[33:63, 33:63] = False
    assert np.array_equal(lit, expected)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--masks", "nowhere.dcm"), 2, "the segmentation nowhere.dcm does not exist"),
        (("--masks", "auto", "x"), 2, "--masks auto excludes paths"),
        (("--masks", "auto", "--roi", "("), 2, "masks.roi = '(' is no regular expression"),
        (("--masks", "auto", "--text-format", "excel"), 2, "masks.text_format = 'excel': choose one of imagej-xy"),
        (("--masks", "auto", "--seg-threshold", "2"), 2, "masks.threshold = 2.0"),
    ],
)
def test_an_invalid_request_gives_one_line(tmp_path: Path, ct: Ct, arguments: Any, code: int, words: str) -> None:
    done = run_cli("convert", ct.folder, "--out", tmp_path / "out", "--quiet", *arguments)
    assert done.exit_code == code
    (line,) = done.stderr.strip().splitlines()
    assert words in line


def test_the_screen_shows_recognised_and_unmatched_segmentations(tmp_path: Path, ct: Ct) -> None:
    path = rtstruct(tmp_path / "rs.dcm", ct)
    stray = write_rtstruct(tmp_path / "stray.dcm", {"x": LEFT}, series_uid="1.2.3.4")
    shown = run_cli("convert", ct.folder, "--masks", path, stray, "--out", tmp_path / "out", "--dry-run")
    assert "rs.dcm: RTSTRUCT (SOP Class UID: RT Structure Set Storage) with left, right" in " ".join(
        shown.stdout.split()
    )
    done = run_cli("convert", ct.folder, "--masks", path, stray, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "unmatched" in done.stderr
    assert "1 segmentation without a series" in " ".join(done.stdout.split())
