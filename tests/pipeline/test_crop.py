"""Series cropped to structures: image, masks, affine and records, with values worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from segmentations import write_rtstruct
from test_convert_masks import LEFT, LEFT_BOX, ORIGIN_MM, RAW, RIGHT, RIGHT_BOX, SHAPE, SPACING_MM, Ct, convert, volume
from typer.testing import CliRunner

import gpuprep
from gpuprep import Masks, Recipe
from gpuprep.cli.app import app
from gpuprep.compute.backend import Backend
from gpuprep.errors import PlanError, RecipeError, RequestError
from gpuprep.output.verify import AllManifests
from gpuprep.testing import thorax, write_series

# LEFT covers slices 1 to 3, rows and columns 5 to 9; RIGHT covers slices 2 to 5, rows 5 to 9, columns 13 to 17.
CROPPED = replace(RAW, crop="mask:left", crop_margin_mm=2.0)
BOX = (slice(0, 5), slice(3, 12), slice(3, 12))  # one slice of 2 mm and two pixels of 1 mm more on each side


@pytest.fixture
def ct(tmp_path: Path) -> Ct:
    return Ct(tmp_path / "dicom" / "patient-1")


@pytest.fixture
def structures(tmp_path: Path, ct: Ct) -> Path:
    rois = {"left": LEFT, "right": RIGHT}
    return write_rtstruct(tmp_path / "rs.dcm", rois, series_uid=ct.uid, frame_uid=ct.frame_uid)


HU = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) - 1024


def described(out: Path, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / folder / "volume.json").read_text())
    return found


def test_image_and_masks_are_cropped_to_the_same_box(tmp_path: Path, structures: Path) -> None:
    run = convert(tmp_path, structures, CROPPED)
    assert run.counts == {"ok": 1}
    (result,) = run.results
    folder = tmp_path / "out" / result.folder
    np.testing.assert_array_equal(volume(folder), HU[BOX])
    np.testing.assert_array_equal(volume(folder / "labels"), (LEFT_BOX + 2 * RIGHT_BOX)[BOX])
    found = described(tmp_path / "out", result.folder)
    x, y, z = ORIGIN_MM
    np.testing.assert_allclose(np.array(found["affine_lps"])[:3, 3], (x + 3, y + 3, z))
    assert found["shape"] == [5, 9, 9]
    assert found["source"]["shape"] == list(SHAPE)
    assert found["crop"] == {
        "to": "mask:left",
        "margin_mm": 2.0,
        "start": [0, 3, 3],
        "stop": [5, 12, 12],
        "corners_mm": [[x + 3, y + 3, z], [x + 11, y + 11, z + 4 * SPACING_MM[0]]],
        "share": round(5 * 9 * 9 / (6 * 20 * 24), 4),
    }
    assert [row.crop for row in AllManifests(tmp_path / "out")] == [found["crop"]]
    assert "right: it reaches beyond the box to which the series is cropped" in result.warnings


def test_a_crop_to_all_structures_has_all_of_them(tmp_path: Path, structures: Path) -> None:
    run = convert(tmp_path, structures, replace(RAW, crop="mask", crop_margin_mm=0.0))
    folder = tmp_path / "out" / run.results[0].folder
    np.testing.assert_array_equal(volume(folder), HU[1:6, 5:10, 5:18])
    assert not run.results[0].warnings


def test_a_structure_that_is_not_there_is_named(tmp_path: Path, structures: Path) -> None:
    recipe = replace(RAW, crop="mask:left,Heart", crop_margin_mm=0.0)
    (result,) = convert(tmp_path, structures, recipe).results
    assert result.crop is not None
    assert (result.crop["start"], result.crop["stop"]) == ([1, 5, 5], [4, 10, 10])
    assert result.codes == ("crop-partial",)
    assert "nothing of Heart is drawn on the series: it is cropped to left" in result.warnings


@pytest.mark.usefixtures("ct")
def test_flags_about_a_crop_need_a_crop(tmp_path: Path) -> None:
    for flag, value in (("--margin", "20"), ("--crop-missing", "reject")):
        words = ["convert", str(tmp_path / "dicom"), "-o", str(tmp_path / "o"), flag, value]
        ran = CliRunner().invoke(app, words)
        assert ran.exit_code == 2
        assert "without crop: give --crop body, lungs or mask" in ran.output


def test_names_are_those_of_aliases_in_any_case(tmp_path: Path, structures: Path) -> None:
    masks = Masks(aliases=(("lung l", ("left",)),))
    recipe = replace(RAW, crop="mask: Lung  L ", crop_margin_mm=0.0, masks=masks)
    run = convert(tmp_path, structures, recipe)
    assert described(tmp_path / "out", run.results[0].folder)["crop"]["stop"] == [4, 10, 10]


def test_masks_alone_are_cropped_like_their_image(tmp_path: Path, structures: Path) -> None:
    run = convert(tmp_path, structures, replace(CROPPED, image=False))
    folder = tmp_path / "out" / run.results[0].folder
    np.testing.assert_array_equal(volume(folder / "labels"), (LEFT_BOX + 2 * RIGHT_BOX)[BOX])


def test_a_tilted_uneven_series_is_cropped_where_its_slices_lie(tmp_path: Path) -> None:
    # Slice k lies at z = 2, 4, 6, 8.5, 10.5, 12.5, 14.5 mm, and is shifted by 0.5 rows per mm along z.
    positions = [2.0, 4, 6, 8.5, 10.5, 12.5, 14.5]
    stored = np.random.default_rng(0).integers(900, 1100, (7, 20, 24)).astype(np.int16)

    def place(ds: Any, k: int) -> None:
        ds.ImagePositionPatient = [0.0, 0.5 * positions[k], positions[k]]

    files = write_series(tmp_path / "dicom" / "ct", stored, (2.0, 1.0, 1.0), change=place)
    header = pydicom.dcmread(files[0], stop_before_pixels=True)
    contours = [
        np.array([(x, y + 0.5 * z, z) for x, y in ((4.5, 6.5), (9.5, 6.5), (9.5, 11.5), (4.5, 11.5))])
        for z in positions[2:5]
    ]
    path = write_rtstruct(
        tmp_path / "rs.dcm",
        {"node": contours},
        series_uid=str(header.SeriesInstanceUID),
        frame_uid=str(header.FrameOfReferenceUID),
    )
    whole = convert(tmp_path, path, replace(RAW, masks=Masks(layout="labels")))
    recipe = replace(RAW, crop="mask", crop_margin_mm=1.0)
    cropped = gpuprep.convert(tmp_path / "dicom", tmp_path / "cropped", recipe, masks=path)
    assert whole.counts == cropped.counts == {"fixed": 1}
    box = described(tmp_path / "cropped", cropped.results[0].folder)["crop"]
    within = tuple(slice(low, high) for low, high in zip(box["start"], box["stop"], strict=True))
    first, second = tmp_path / "out" / whole.results[0].folder, tmp_path / "cropped" / cropped.results[0].folder
    np.testing.assert_allclose(volume(second), volume(first)[within], atol=1)  # rounded to integers
    labels = volume(first / "labels")
    np.testing.assert_array_equal(volume(second / "labels"), labels[within])
    assert volume(second / "labels").sum() == labels.sum() > 0
    # By hand: rows 7 to 11 at y = 0.5 z + 7 … 11, so y from 10 to 16.25 mm, and z from 6 to 10.5 mm; margin 1 mm.
    corners = np.array(box["corners_mm"])
    assert (corners[0] <= (4, 9, 5 + 0.01)).all()
    assert (corners[1] >= (10, 17.25 - 1.01, 11.5 - 1.01)).all()


@pytest.mark.parametrize("crop", ["mask:heart", "mask"])
def test_a_series_without_the_structure_is_kept_whole_or_rejected(tmp_path: Path, ct: Ct, crop: str) -> None:
    Ct(tmp_path / "dicom" / "patient-2")
    rois = {"heart" if crop == "mask" else "left": LEFT}
    path = write_rtstruct(tmp_path / "rs.dcm", rois, series_uid=ct.uid, frame_uid=ct.frame_uid)
    recipe = replace(RAW, crop=crop, crop_margin_mm=0.0)
    run = convert(tmp_path, path, recipe)
    lacking = {r.source.rpartition("/")[2]: r for r in run.results if "crop-not-found" in r.codes}
    assert set(lacking) == ({"patient-2"} if crop == "mask" else {"patient-1", "patient-2"})
    assert all(r.shape == SHAPE and r.crop is None for r in lacking.values())
    text = "no voxel is drawn on the series; its structures: none: not cropped"
    assert text in lacking["patient-2"].warnings or crop != "mask"
    if crop != "mask":
        text = "no voxel of heart is drawn on the series; its structures: left: not cropped"
        assert text in lacking["patient-1"].warnings
    again = gpuprep.convert(tmp_path / "dicom", tmp_path / "strict", replace(recipe, crop_missing="reject"), masks=path)
    rejected = {r.source.rpartition("/")[2]: r for r in again.results if r.status == "rejected"}
    assert set(rejected) == set(lacking)
    assert all(r.codes == ("crop-not-found",) for r in rejected.values())


@pytest.mark.usefixtures("ct")
def test_a_crop_to_structures_needs_segmentations(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="needs segmentations: give --masks"):
        convert(tmp_path, None, CROPPED)
    with pytest.raises(RecipeError, match="crop = 'mask:left' needs segmentations"):
        gpuprep.load(tmp_path / "dicom", CROPPED, backend="cpu")
    ran = CliRunner().invoke(app, ["convert", str(tmp_path / "dicom"), "-o", str(tmp_path / "o"), "--crop", "mask"])
    assert ran.exit_code == 2


@pytest.mark.parametrize("crop", ["bodies", "", "mask:", "mask:a,,b", "lungs:left", "BODY", 3, True, "mask: ,a"])
def test_an_impossible_crop_is_refused_with_the_choices(crop: Any) -> None:
    with pytest.raises(RecipeError, match="choose body, lungs, mask, mask:NAME"):
        Recipe(crop=crop)


def test_a_recipe_file_may_crop() -> None:
    recipe = Recipe.from_dict({"crop": "mask:left, right lung", "crop_margin_mm": 5, "crop_missing": "reject"})
    assert (recipe.crop_kind, recipe.crop_names) == ("mask", ("left", "right lung"))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict({"crop": "none"}) == Recipe()
    assert Recipe(crop="body").sha256 != Recipe().sha256


def test_a_lost_manifest_does_not_lose_the_box(tmp_path: Path, structures: Path) -> None:
    before = convert(tmp_path, structures, CROPPED).results[0]
    for file in (tmp_path / "out").glob("manifest.sqlite*"):
        file.unlink()
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*.tif")}
    after = convert(tmp_path, structures, CROPPED).results[0]
    assert (after.crop, after.codes, after.warnings) == (before.crop, before.codes, before.warnings)
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*.tif")} == files


def test_the_preview_shows_the_box_above_the_output(tmp_path: Path, structures: Path) -> None:
    run = convert(tmp_path, structures, CROPPED)
    picture = np.asarray(Image.open(tmp_path / "out" / run.results[0].folder / "preview.jpg")).astype(int)
    assert picture.shape[0] == 128 + 4 + 128
    yellow = (picture[..., 0] - picture[..., 2] > 90) & (picture[..., 1] > 130)
    rows, columns = np.nonzero(yellow[:128, :154])  # the slice: 20 × 24 mm at 6.4 pixels per mm
    # Rows and columns 3 to 11 of 20 and 24, on every fourth: drawn from 0 or 4 to 12.
    assert 0 <= rows.min() <= 26
    assert 70 <= rows.max() <= 80
    assert 70 <= columns.max() <= 80


def test_a_prediction_on_the_cropped_grid_returns_to_the_whole_series(tmp_path: Path, structures: Path) -> None:
    run = convert(tmp_path, structures, CROPPED)
    folder = tmp_path / "out" / run.results[0].folder
    restored = gpuprep.restore(volume(folder / "labels"), folder)
    expected = np.zeros(SHAPE, np.uint8)
    expected[BOX] = (LEFT_BOX + 2 * RIGHT_BOX)[BOX]
    np.testing.assert_array_equal(restored.values, expected)  # background outside of the box
    assert restored.names == {1: "left", 2: "right"}


@pytest.mark.gpu
@pytest.mark.parametrize("crop", ["body", "lungs", "mask:left"])
def test_a_device_has_the_same_box_and_labels_as_the_host(tmp_path: Path, gpu: Backend, crop: str) -> None:
    files = write_series(tmp_path / "dicom" / "ct", thorax((20, 96, 96), (6.0, 4.0, 4.0)), (6.0, 4.0, 4.0))
    first = pydicom.dcmread(files[0], stop_before_pixels=True)
    x, y, z = map(float, first.ImagePositionPatient)
    corners = np.array([(x + 100, y + 120), (x + 160, y + 120), (x + 160, y + 200), (x + 100, y + 200)])
    contours = [np.column_stack([corners, np.full(4, z + 6.0 * k)]) for k in range(4, 12)]
    uids = first.SeriesInstanceUID, first.FrameOfReferenceUID
    path = write_rtstruct(tmp_path / "rs.dcm", {"left": contours}, series_uid=uids[0], frame_uid=uids[1])
    recipe = Recipe(crop=crop, size=None, window_hu=None)
    found = []
    for name, backend in (("cpu", "cpu"), ("gpu", gpu)):
        run = gpuprep.convert(tmp_path / "dicom", tmp_path / name, recipe, masks=path, backend=backend)
        assert run.results[0].status == "ok", run.results[0].reason
        folder = tmp_path / name / run.results[0].folder
        found.append((run.results[0].crop, volume(folder), volume(folder / "labels")))
    (box, values, labels), (other_box, other_values, other_labels) = found
    assert box is not None
    assert box["share"] < 1
    assert box == other_box
    assert np.abs(values - other_values).max() < 0.01
    np.testing.assert_array_equal(labels, other_labels)


def test_a_volume_in_memory_is_cropped_or_says_that_it_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hu = np.full((8, 64, 64), -1000, dtype=np.int16)
    hu[:, 20:40, 10:50] = 40
    write_series(tmp_path / "body", hu + 1024, (5.0, 4.0, 4.0))
    recipe = Recipe(crop="body", crop_margin_mm=0.0, spacing_mm=None, size=None)
    cropped = gpuprep.load(tmp_path / "body", recipe, backend="cpu")
    assert cropped.shape == (8, 20, 40)
    assert not caplog.records
    write_series(tmp_path / "air", np.full((8, 64, 64), 24, dtype=np.int16) + np.arange(64, dtype=np.int16), (5, 4, 4))
    assert gpuprep.load(tmp_path / "air", recipe, backend="cpu").shape == (8, 64, 64)
    (record,) = caplog.records
    assert record.getMessage().startswith("no body: ")
    assert record.getMessage().endswith(": not cropped")
    with pytest.raises(PlanError, match="no body"):
        gpuprep.load(tmp_path / "air", replace(recipe, crop_missing="reject"), backend="cpu")


def test_a_plan_error_has_a_code() -> None:
    assert PlanError("too large").code == "plan"
