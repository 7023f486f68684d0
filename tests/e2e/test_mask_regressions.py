"""Regression tests for segmentations of images."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset
from segmentations import write_rtstruct, write_seg
from test_convert_masks import (
    LEFT,
    LEFT_BOX,
    RAW,
    RIGHT,
    RIGHT_BOX,
    SHAPE,
    Ct,
    convert,
    rtstruct,
    sidecar,
    square,
    volume,
)
from typer.testing import CliRunner

import gpuprep
from gpuprep import Masks
from gpuprep.cli.app import app
from gpuprep.core.geometry import Geometry
from gpuprep.errors import RequestError

COUNTED = replace(RAW, masks=Masks(index_base=0, slice_order="stack"))
OUTLINE = "4\t4\n10\t4\n10\t10\n4\t10\n"


@pytest.fixture
def ct(tmp_path: Path) -> Ct:
    return Ct(tmp_path / "dicom" / "patient-1")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def grid(tmp_path: Path) -> Geometry:
    run = convert(tmp_path, None)
    return Geometry(SHAPE, np.array(sidecar(run, tmp_path / "out")["affine_lps"]))


def test_equal_names_in_files_of_equal_names_are_distinguished_by_folder(tmp_path: Path, ct: Ct, out: Path) -> None:
    for folder, contours in (("anna", LEFT), ("bert", RIGHT)):
        (tmp_path / "rs" / folder).mkdir(parents=True)
        rtstruct(tmp_path / "rs" / folder / "rs.dcm", ct, GTV=contours)
    run = convert(tmp_path, tmp_path / "rs")
    labels = sidecar(run, out)["labels"]
    assert [label["name"] for label in labels] == ["GTV (anna/rs.dcm)", "GTV (bert/rs.dcm)"]
    np.testing.assert_array_equal(volume(out / run.results[0].folder / "labels"), LEFT_BOX + 2 * RIGHT_BOX)


def test_two_structures_never_share_a_label(tmp_path: Path, ct: Ct) -> None:
    rtstruct(tmp_path / "a.dcm", ct, GTV=LEFT)
    rtstruct(tmp_path / "b.dcm", ct, **{"GTV": RIGHT, "GTV (a)": [square(0, 12.5, 15.5)]})
    run = convert(tmp_path, [tmp_path / "a.dcm", tmp_path / "b.dcm"])
    assert run.results[0].status == "rejected"
    assert "two structures are called GTV (a) (in a.dcm and b.dcm)" in run.results[0].reason


@pytest.mark.usefixtures("ct")
def test_formats_that_share_a_folder_and_a_name_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    painted = np.zeros(SHAPE[1:], dtype=int)
    painted[12:15, 12:15] = 255
    for k in (2, 3):
        (folder / f"roi_{k}.txt").write_text(OUTLINE)
        np.savetxt(folder / f"roi_{k}.tsv", painted, "%d", "\t")
    run = convert(tmp_path, folder, COUNTED)
    assert run.results[0].status == "rejected"
    assert "two structures are called roi" in run.results[0].reason


def test_an_empty_structure_of_the_same_name_in_another_file_does_no_harm(tmp_path: Path, ct: Ct, out: Path) -> None:
    rtstruct(tmp_path / "a.dcm", ct, GTV=LEFT)
    rtstruct(tmp_path / "b.dcm", ct, GTV=[], other=RIGHT)
    run = convert(tmp_path, [tmp_path / "a.dcm", tmp_path / "b.dcm"])
    assert run.counts == {"ok": 1}
    assert [label["name"] for label in sidecar(run, out)["labels"]] == ["GTV (a)", "other"]
    assert convert(tmp_path, [tmp_path / "a.dcm", tmp_path / "b.dcm"]).counts == {"skipped": 1}


def test_a_file_name_that_is_not_utf_8_is_recorded_as_printable_text(tmp_path: Path, ct: Ct, out: Path) -> None:
    rtstruct(tmp_path / "a.dcm", ct, GTV=LEFT)
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/b\xff\n.dcm")
    os.rename(rtstruct(tmp_path / "b.dcm", ct, GTV=RIGHT), odd)
    run = convert(tmp_path, [str(tmp_path / "a.dcm"), odd])
    assert [label["name"] for label in sidecar(run, out)["labels"]] == ["GTV (a)", r"GTV (b\udcff\n)"]
    assert all(s["path"].isprintable() for s in sidecar(run, out)["segmentations"])


@pytest.mark.usefixtures("ct")
def test_two_files_of_one_slice_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("roi_02.txt", "roi_03.txt", "roi_3.txt"):
        (folder / name).write_text(OUTLINE)
    run = convert(tmp_path, folder, COUNTED)
    assert run.results[0].status == "rejected"
    assert "roi_03.txt and roi_3.txt both hold roi on one slice" in run.results[0].reason


def test_an_outline_stored_twice_counts_once_and_is_reported(tmp_path: Path, ct: Ct, out: Path) -> None:
    run = convert(tmp_path, rtstruct(tmp_path / "rs.dcm", ct, GTV=[*LEFT, LEFT[0]]))
    np.testing.assert_array_equal(volume(out / run.results[0].folder / "labels"), LEFT_BOX)
    assert any("GTV: 1 outline left out: the same as another" in note for note in run.results[0].warnings)


def test_outlines_on_thinner_slices_are_not_combined_on_one_slice(tmp_path: Path, out: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "patient-1")
    thin = [square(k, 4.5 - up, 9.5 + up) + np.array([0, 0, 1.5 * up]) for k in range(1, 4) for up in (0, 0.1)]
    run = convert(tmp_path, write_rtstruct(tmp_path / "rs.dcm", {"GTV": thin}, series_uid=ct.uid))
    np.testing.assert_array_equal(volume(out / run.results[0].folder / "labels"), LEFT_BOX)


@pytest.mark.parametrize("spacing_mm", ["2.0", None])
def test_a_seg_of_overlapping_slices_does_not_grow(tmp_path: Path, ct: Ct, out: Path, spacing_mm: str | None) -> None:
    def overlapping(ds: Dataset) -> None:
        measures = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        measures.SliceThickness, measures.SpacingBetweenSlices = "4.0", spacing_mm

    path = write_seg(tmp_path / "seg.dcm", {"a": LEFT_BOX > 0}, grid(tmp_path), series_uid=ct.uid, change=overlapping)
    run = convert(tmp_path, path)
    np.testing.assert_array_equal(volume(out / run.results[0].folder / "labels"), LEFT_BOX)


def test_symbolic_links_to_folders_are_searched_once(tmp_path: Path, ct: Ct, out: Path) -> None:
    real, folder = tmp_path / "real", tmp_path / "masks"
    real.mkdir()
    folder.mkdir()
    rtstruct(real / "rs.dcm", ct)
    (folder / "link").symlink_to(real)
    (folder / "rs.dcm").symlink_to(real / "rs.dcm")
    (real / "loop").symlink_to(folder)
    run = convert(tmp_path, [folder, real, real / "rs.dcm"])
    assert [label["name"] for label in sidecar(run, out)["labels"]] == ["left", "right"]


@pytest.mark.usefixtures("ct")
def test_a_pipe_is_refused_as_a_segmentation(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.dcm")
    with pytest.raises(RequestError, match="neither a file nor a folder"):
        convert(tmp_path, tmp_path / "pipe.dcm")


def test_a_folder_without_segmentations_is_reported(tmp_path: Path, ct: Ct) -> None:
    run = convert(tmp_path, ct.folder)
    assert run.unmatched == ((str(ct.folder), "it holds no segmentation"),)
    assert run.exit_code == 1


def test_outputs_in_a_folder_of_segmentations_are_ignored(tmp_path: Path, ct: Ct) -> None:
    rtstruct(tmp_path / "rs.dcm", ct)
    for counts in ({"ok": 1}, {"skipped": 1}):
        run = convert(tmp_path, tmp_path)
        assert (run.counts, run.unmatched) == (counts, ())


@pytest.mark.parametrize("after", [[], ["-q"]])
def test_masks_without_a_path_is_refused(tmp_path: Path, ct: Ct, after: Any) -> None:
    arguments = ["convert", str(ct.folder), "-o", str(tmp_path / "out"), "--index", "none", "--masks", *after]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--masks" in result.output
    assert not (tmp_path / "out").exists()


def test_outlines_beside_a_gap_that_is_kept_stay_on_their_slices(tmp_path: Path, out: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "patient-1")
    for k in (1, 2, 3):
        ct.files[k].unlink()
    corners = [square(k, 4.5, 6.5 + k) for k in range(6)]
    path = write_rtstruct(tmp_path / "rs.dcm", {"GTV": corners}, series_uid=ct.uid)
    run = convert(tmp_path, path, replace(RAW, policy="keep"))
    labels = volume(out / run.results[0].folder / "labels")
    assert [int(plane.sum()) for plane in labels] == [(2 + k) ** 2 for k in (0, 4, 5)]
    assert sum("left out" in note for note in run.results[0].warnings) >= 1


def test_a_header_beside_a_pinnacle_plan_is_part_of_it(tmp_path: Path, ct: Ct) -> None:
    folder = tmp_path / "plan"
    folder.mkdir()
    points = "".join(f"{x / 10} {-y / 10} {-z / 10}\n" for x, y, z in LEFT[0].tolist())
    curve = f"num_curve = 1;\ncurve={{\nnum_points = 4;\npoints={{\n{points}}};\n}};\n"
    (folder / "plan.roi").write_text(f"// Region of Interest file\nroi={{\nname: GTV\n{curve}}};\n")
    assert convert(tmp_path, folder).counts == {"ok": 1}
    header = folder / "ImageSet_0.header"
    header.write_text("patient_position : HFP\n")
    run = convert(tmp_path, folder)  # by this patient position, the outline is outside the series
    assert (run.counts, run.results[0].codes, run.unmatched) == ({"rejected": 1}, ("mask-empty",), ())
    header.write_text(f"patient_position : HFS\nseries_UID : {ct.uid}\n")
    assert convert(tmp_path, folder / "plan.roi").counts == {"ok": 1}
    assert convert(tmp_path, folder / "plan.roi").counts == {"skipped": 1}


def test_a_roi_that_matches_no_structure_is_reported(tmp_path: Path, ct: Ct) -> None:
    run = convert(tmp_path, rtstruct(tmp_path / "rs.dcm", ct), replace(RAW, masks=Masks(roi="^lung$")))
    words = "none of the 2 structures drawn on it has a name that --roi matches: no masks are written"
    assert words in run.results[0].warnings


def test_text_of_another_patient_is_not_applied_to_the_only_series(tmp_path: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "patient-1")
    content = "x_mm y_mm z_mm\n" + "\n".join(f"{x} {y} {z}" for x, y, z in LEFT[0])
    for name in ("patient-1/a.txt", "patient-2/a.txt", "patient-2.txt", "1.2.840.99.1.7.txt"):
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "masks" / name).write_text(content)
    for inputs in (tmp_path / "dicom", ct.folder):
        run = gpuprep.convert(inputs, tmp_path / "out", RAW, masks=tmp_path / "masks")
        (used,) = run.results[0].segmentations or ()
        assert used["path"].endswith("masks/patient-1/a.txt")
        assert sorted(Path(path).name for path, _ in run.unmatched) == ["1.2.840.99.1.7.txt", "a.txt", "patient-2.txt"]


def test_a_damaged_object_rejects_a_series_only_if_it_is_in_its_folder(tmp_path: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "patient-1")
    (tmp_path / "masks").mkdir()
    rtstruct(tmp_path / "masks" / "good.dcm", ct)
    bad = rtstruct(tmp_path / "masks" / "bad.dcm", ct)
    bad.write_bytes(bad.read_bytes()[:600])
    run = gpuprep.convert(tmp_path / "dicom", tmp_path / "out", RAW, masks=tmp_path / "masks")
    assert run.counts == {"ok": 1}
    assert [Path(path).name for path, _ in run.unmatched] == ["bad.dcm"]
    assert run.exit_code == 1
    bad.rename(ct.folder / "bad.dcm")
    run = gpuprep.convert(tmp_path / "dicom", tmp_path / "out2", RAW, masks=[tmp_path / "masks", ct.folder / "bad.dcm"])
    assert (run.results[0].status, run.results[0].codes) == ("rejected", ("mask-damaged",))


def test_masks_only_matches_files_of_a_folder_by_uid_and_applies_a_file_given_directly(tmp_path: Path) -> None:
    ct = Ct(tmp_path / "dicom")
    (tmp_path / "masks").mkdir()
    rtstruct(tmp_path / "masks" / "own.dcm", ct, left=LEFT)
    other = write_rtstruct(tmp_path / "masks" / "other.dcm", {"right": RIGHT}, series_uid="1.2.3", frame_uid="1.2.4")
    recipe = replace(RAW, image=False)
    run = gpuprep.convert(ct.folder, tmp_path / "out", recipe, masks=tmp_path / "masks")
    assert [label["name"] for label in run.results[0].labels or ()] == ["left"]
    assert [Path(path).name for path, _ in run.unmatched] == ["other.dcm"]
    run = gpuprep.convert(ct.folder, tmp_path / "out", recipe, masks=other)
    assert [label["name"] for label in run.results[0].labels or ()] == ["right"]
    notes = " ".join(run.results[0].warnings)
    assert "other.dcm refers to series 1.2.3, not to this one" in notes
    assert "other.dcm has another frame of reference" in notes


def test_a_dry_run_shows_rejected_series_and_segmentations_without_a_series(tmp_path: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "patient-1")
    (ct.folder / "outline.txt").write_text("1 2\n3 four\n")
    stray = write_rtstruct(tmp_path / "stray.dcm", {"x": LEFT}, series_uid="1.2.3", frame_uid="1.2.4")
    arguments = ["convert", str(tmp_path / "dicom"), "--masks", str(ct.folder / "outline.txt"), str(stray)]
    arguments += ["--out", str(tmp_path / "out"), "--index", "none"]
    told = CliRunner().invoke(app, [*arguments, "--dry-run", "--json"])
    assert told.exit_code == 1
    report = json.loads(told.stdout)
    (series,) = report["series"]
    assert (series["verdict"], series["codes"]) == ("rejected", ["mask"])
    assert "outline.txt: line 2, column 3" in series["reason"]
    assert [Path(path).name for path, _ in report["unmatched"]] == ["stray.dcm"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    (result,) = json.loads(done.stdout)["series"]
    assert (result["status"], result["codes"], result["reason"]) == ("rejected", ["mask"], series["reason"])
