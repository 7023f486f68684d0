"""The view for nnU-Net has the right cases, has a dataset.json only if it is complete, and spares foreign files."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from segmentations import write_rtstruct
from test_convert_masks import LEFT, LEFT_BOX, ORIGIN_MM, RIGHT, RIGHT_BOX, SHAPE, Ct
from typer.testing import CliRunner

import gpuprep
from gpuprep import Masks, Recipe
from gpuprep.cli.app import app
from gpuprep.core.shard import Shard
from gpuprep.errors import RequestError
from gpuprep.executors.processes import InProcessExecutor
from gpuprep.output.nnunet import case_names
from gpuprep.output.verify import verify
from gpuprep.pipeline.events import Run

RECIPE = Recipe(spacing_mm=None, size=None, dtype="int16", window_hu=None, format="tif-stack")
"""Recipe of a format that needs no extra."""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Output folder for two patients with structures and one without, who are written beside it."""
    for name, rois in (("p 1", {"left": LEFT, "right": RIGHT}), ("p2", {"right": RIGHT}), ("p3", {})):
        ct = Ct(tmp_path / "dicom" / name)
        if rois:
            (tmp_path / "masks").mkdir(exist_ok=True)
            path = tmp_path / "masks" / f"{name}.dcm"
            write_rtstruct(path, rois, series_uid=ct.uid, frame_uid=ct.frame_uid)
    return tmp_path / "out"


def convert(out: Path, recipe: Recipe = RECIPE, **options: Any) -> Run:
    top = out.parent
    how: dict[str, Any] = {"masks": top / "masks", "layout": "nnunet", "backend": "cpu"} | options
    return gpuprep.convert(top / "dicom", out, recipe, **how)


def view(out: Path) -> list[str]:
    """Return the files of the view."""
    folders = ("imagesTr", "labelsTr", "imagesTs")
    return sorted(f.relative_to(out).as_posix() for folder in folders for f in (out / folder).rglob("*"))


def written(out: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of each file of the view."""
    stats = {name: (out / name).stat() for name in [*view(out), "dataset.json"]}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_series_with_equal_paths_are_separate_cases(tmp_path: Path) -> None:
    for site, rois in (("a", LEFT), ("b", RIGHT)):
        ct = Ct(tmp_path / site / "dicom" / "p1")
        write_rtstruct(tmp_path / f"{site}.dcm", {"organ": rois}, series_uid=ct.uid, frame_uid=ct.frame_uid)
        how: dict[str, Any] = {"masks": tmp_path / f"{site}.dcm", "layout": "nnunet", "backend": "cpu"}
        run = gpuprep.convert(tmp_path / site / "dicom", tmp_path / "out", RECIPE, **how)
        assert run.counts == {"ok": 1}
    files = sorted((tmp_path / "out" / "labelsTr").glob("*.tif"), key=lambda f: len(f.name))
    labels = [tifffile.imread(f) for f in files]
    np.testing.assert_array_equal(labels, [LEFT_BOX, RIGHT_BOX])  # dicom_p1 and dicom_p1-series-…
    assert not list(verify(tmp_path / "out", InProcessExecutor(), lambda: None))


VIEW = [
    "imagesTr/dicom_p2.json",
    "imagesTr/dicom_p2_0000.tif",
    "imagesTr/dicom_p_1.json",
    "imagesTr/dicom_p_1_0000.tif",
    "imagesTs/dicom_p3.json",
    "imagesTs/dicom_p3_0000.tif",
    "labelsTr/dicom_p2.json",
    "labelsTr/dicom_p2.tif",
    "labelsTr/dicom_p_1.json",
    "labelsTr/dicom_p_1.tif",
]


def dataset(out: Path) -> Any:
    return json.loads((out / "dataset.json").read_text())


def test_series_with_labels_are_training_cases_and_others_test_cases(out: Path) -> None:
    run = convert(out)
    assert run.arranged == (2, 1, 0)
    assert view(out) == VIEW
    assert dataset(out) == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "left": 1, "right": 2},
        "numTraining": 2,
        "file_ending": ".tif",
        "overwrite_image_reader_writer": "Tiff3DIO",
    }
    image = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    stored = tifffile.imread(out / "imagesTr" / "dicom_p_1_0000.tif")
    assert len(np.unique(stored.astype(int) - image)) == 1  # the values that the series was made of, and an intercept
    np.testing.assert_array_equal(tifffile.imread(out / "labelsTr" / "dicom_p_1.tif"), LEFT_BOX + 2 * RIGHT_BOX)
    np.testing.assert_array_equal(tifffile.imread(out / "labelsTr" / "dicom_p2.tif"), 2 * RIGHT_BOX)
    for name in ("imagesTr/dicom_p2.json", "labelsTr/dicom_p2.json", "imagesTs/dicom_p3.json"):
        assert json.loads((out / name).read_text()) == {"spacing": [2.0, 1.0, 1.0]}  # slices first
    # The files are hard links, and the folders of series do not change.
    assert (out / "dicom" / "p2" / "volume.tif").samefile(out / "imagesTr" / "dicom_p2_0000.tif")
    assert sorted(f.name for f in (out / "dicom" / "p2").iterdir()) == [
        "labels.tif",
        "preview.jpg",
        "volume.json",
        "volume.tif",
    ]
    assert list(verify(out, InProcessExecutor(), lambda: None)) == []


def test_nifti_cases_have_no_json_files(out: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    convert(out, replace(RECIPE, format="nifti", compression="zlib"))
    assert view(out) == [name.replace(".tif", ".nii.gz") for name in VIEW if not name.endswith(".json")]
    assert dataset(out)["file_ending"] == ".nii.gz"
    assert "overwrite_image_reader_writer" not in dataset(out)
    labels = np.asarray(nibabel.load(out / "labelsTr" / "dicom_p2.nii.gz").dataobj)
    np.testing.assert_array_equal(labels.transpose(), 2 * RIGHT_BOX)


@pytest.mark.parametrize("format_", ["nifti", "tif-stack"])
def test_a_series_with_leaning_slices_is_no_case_and_has_a_warning(out: Path, format_: Any) -> None:
    # nnU-Net would ignore the shear: it reads NIfTI with nibabel if ITK refuses it, and TIFF cannot describe shear.
    tilt = np.deg2rad(15)
    Ct(out.parent / "dicom" / "p4", orientation=(1, 0, 0, 0, float(np.cos(tilt)), float(-np.sin(tilt))))
    files = sorted((out.parent / "dicom" / "p4").iterdir())
    for file in files:  # the table moves along z, not along the normal: six slices of 2 mm lean by 10 sin 15° mm
        ds = pydicom.dcmread(file)
        along_mm = (np.array(ds.ImagePositionPatient, float) - ORIGIN_MM) @ (0, np.sin(tilt), np.cos(tilt))
        k = round(float(along_mm) / 2)
        ds.ImagePositionPatient = [*ORIGIN_MM[:2], ORIGIN_MM[2] + 2.0 * k]
        ds.save_as(file)
    compression: Any = "zlib" if format_ == "nifti" else "none"
    policies: tuple[tuple[Any, tuple[int, int, int]], ...] = (("keep", (2, 1, 1)), ("fix", (2, 2, 0)))
    for policy, arranged in policies:
        run = convert(out, replace(RECIPE, format=format_, compression=compression, policy=policy))
        assert run.counts == ({"ok": 4} if policy == "keep" else {"ok": 3, "fixed": 1})
        assert run.arranged == arranged
        (leaning,) = (r for r in run.results if r.folder.endswith("p4"))
        assert ("leaning" in leaning.codes) == (policy == "keep")
        assert any("p4" in name for name in view(out)) == (policy == "fix")
        warnings = [w for w in leaning.warnings if w.startswith("slices lean by 2.59 mm in all")]
        assert len(warnings) == (policy == "keep")


def test_the_view_changes_with_the_recipe_and_stays_if_nothing_changed(out: Path) -> None:
    convert(out)
    before = written(out)
    assert convert(out).counts == {"skipped": 3}
    assert written(out) == before
    # Without "left": "right" keeps its value 2, so value 1 is named too, because values have to be consecutive.
    only = replace(RECIPE, masks=Masks(roi="right"))
    run = convert(out, only, limit=2)
    assert run.arranged == (2, 0, 1)  # one series is not yet made by this recipe
    assert view(out) == [name for name in VIEW if "Ts" not in name]
    assert dataset(out)["labels"] == {"background": 0, "left": 1, "right": 2}
    np.testing.assert_array_equal(tifffile.imread(out / "labelsTr" / "dicom_p_1.tif"), 2 * RIGHT_BOX)
    assert convert(out, replace(RECIPE, masks=Masks(roi="left"))).arranged == (1, 2, 0)
    assert dataset(out)["labels"] == {"background": 0, "left": 1}
    assert [name for name in view(out) if name.startswith("labelsTr")] == [
        "labelsTr/dicom_p_1.json",
        "labelsTr/dicom_p_1.tif",
    ]


def test_a_run_with_layout_folders_leaves_the_view_unchanged(out: Path) -> None:
    convert(out)
    assert convert(out, replace(RECIPE, dtype="float32"), layout="folders").arranged is None
    assert tifffile.imread(out / "imagesTr" / "dicom_p2_0000.tif").dtype == np.int16


def put_notes_among_images(out: Path) -> Path:
    (out / "imagesTr" / "notes.txt").write_text("mine")
    return out / "imagesTr" / "notes.txt"


def put_a_case_of_my_own(out: Path) -> Path:
    shutil.copy(out / "labelsTr" / "dicom_p2.tif", out / "labelsTr" / "mine.tif")
    return out / "labelsTr" / "mine.tif"


def correct_labels(out: Path) -> Path:
    file = out / "labelsTr" / "dicom_p2.tif"
    file.unlink()
    tifffile.imwrite(file, LEFT_BOX)
    return file


def add_a_licence(out: Path) -> Path:
    (out / "dataset.json").write_text(json.dumps(dataset(out) | {"licence": "CC0"}))
    return out / "dataset.json"


def put_a_file_for_a_folder(out: Path) -> Path:
    shutil.rmtree(out / "imagesTs")
    (out / "imagesTs").write_text("mine")
    return out / "imagesTs"


@pytest.mark.parametrize(
    "change", [put_notes_among_images, put_a_case_of_my_own, correct_labels, add_a_licence, put_a_file_for_a_folder]
)
def test_a_foreign_file_in_the_view_is_refused_before_conversion(out: Path, change: Any) -> None:
    convert(out)
    file = change(out)
    content = file.read_bytes()
    words = f"{re.escape(str(file))} is not a file that gpuprep made for nnU-Net, or it has changed since: move"
    with pytest.raises(RequestError, match=words):
        convert(out, replace(RECIPE, dtype="float32"))
    assert file.read_bytes() == content
    assert tifffile.imread(out / "dicom" / "p2" / "volume.tif").dtype == np.int16


def test_a_foreign_dataset_is_not_taken_over(out: Path) -> None:
    (out / "imagesTr").mkdir(parents=True)
    (out / "imagesTr" / "liver_0000.nii.gz").write_bytes(b"")
    with pytest.raises(RequestError, match="liver_0000"):
        convert(out)


def test_verify_accepts_files_of_the_view_and_reports_others(out: Path) -> None:
    convert(out)
    put_notes_among_images(out)
    assert [(f.kind, f.path) for f in verify(out, InProcessExecutor(), lambda: None)] == [
        ("stray", "imagesTr/notes.txt")
    ]


@pytest.mark.parametrize("survives", range(4))
def test_an_interrupted_view_has_no_dataset_json_and_the_next_run_completes_it(
    out: Path, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    convert(out)
    links = 0

    def link(*args: Any) -> None:
        nonlocal links
        links += 1
        if links > survives:
            raise KeyboardInterrupt
        os.symlink(*args)

    with monkeypatch.context() as patch:
        patch.setattr("gpuprep.output.nnunet.os.link", link)
        with pytest.raises(KeyboardInterrupt):
            convert(out, replace(RECIPE, dtype="float32"))
    assert not (out / "dataset.json").exists()
    assert convert(out, replace(RECIPE, dtype="float32")).arranged == (2, 1, 0)
    assert view(out) == VIEW
    assert tifffile.imread(out / "imagesTr" / "dicom_p2_0000.tif").dtype == np.float32


@pytest.mark.parametrize("symlinks", [True, False])
def test_symbolic_links_or_copies_replace_unsupported_hard_links(
    out: Path, monkeypatch: pytest.MonkeyPatch, symlinks: bool
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("gpuprep.output.nnunet.os.link", refused)
    if not symlinks:
        monkeypatch.setattr("gpuprep.output.nnunet.Path.symlink_to", refused)
    for _ in range(2):
        convert(out)
    moved = out.with_name("moved")
    out.rename(moved)  # relative links remain valid
    assert view(moved) == VIEW
    assert (moved / "imagesTr" / "dicom_p2_0000.tif").is_symlink() is symlinks
    np.testing.assert_array_equal(tifffile.imread(moved / "labelsTr" / "dicom_p2.tif"), 2 * RIGHT_BOX)
    assert list(verify(moved, InProcessExecutor(), lambda: None)) == []


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"format": "tif"}, {}, "choose --format nifti --compression zlib, or --format tif-stack"),
        ({"format": "npy"}, {}, "choose --format nifti --compression zlib, or --format tif-stack"),
        ({"masks": Masks(layout="per-roi")}, {}, "choose --mask-layout labels"),
        ({"image": False}, {}, "needs images"),
        ({}, {"shard": Shard(1, 2)}, "gpuprep merge OUT, then run it once more with --layout nnunet"),
        ({}, {"layout": "nnUNet"}, "choose one of folders, nnunet"),
    ],
)
def test_options_that_nnunet_cannot_use_are_refused_before_conversion(
    out: Path, changes: Any, options: Any, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        convert(out, replace(RECIPE, **changes), **options)
    assert not out.exists()


def test_the_view_in_an_object_store_is_refused(small_series: Path) -> None:
    with pytest.raises(RequestError, match="needs a folder on disk, not memory://bucket/out"):
        gpuprep.convert(small_series, "memory://bucket/out", RECIPE, layout="nnunet", backend="cpu")


def test_a_case_whose_json_is_named_volume_json_is_not_taken_for_an_output(tmp_path: Path) -> None:
    Ct(tmp_path / "volume")
    run = gpuprep.convert(tmp_path / "volume", tmp_path / "out", RECIPE, layout="nnunet", backend="cpu")
    assert run.results[0].folder == "volume"
    assert view(tmp_path / "out") == ["imagesTs/volume.json", "imagesTs/volume_0000.tif"]
    assert list(verify(tmp_path / "out", InProcessExecutor(), lambda: None)) == []


def test_structure_names_that_nnunet_reserves_get_a_suffix(tmp_path: Path) -> None:
    ct = Ct(tmp_path / "dicom" / "p")
    (tmp_path / "masks").mkdir()
    rois = {"background": LEFT, "ignore": RIGHT}
    write_rtstruct(tmp_path / "masks" / "rs.dcm", rois, series_uid=ct.uid, frame_uid=ct.frame_uid)
    convert(tmp_path / "out")
    expected = {"background": 0, "background (structure)": 1, "ignore (structure)": 2}
    assert dataset(tmp_path / "out")["labels"] == expected


def test_a_source_folder_named_like_a_folder_of_the_view_is_renamed(tmp_path: Path) -> None:
    Ct(tmp_path / "imagesTr" / "p")
    run = gpuprep.convert(tmp_path / "imagesTr", tmp_path / "out", RECIPE, layout="nnunet", backend="cpu")
    assert run.results[0].folder == "%69magesTr/p"
    assert view(tmp_path / "out") == ["imagesTs/69magesTr_p.json", "imagesTs/69magesTr_p_0000.tif"]


def test_retry_uses_the_layout_of_the_last_run(out: Path) -> None:
    damaged = sorted((out.parent / "dicom" / "p2").iterdir())[2]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-100])
    words = ["convert", out.parent / "dicom", "--out", out, "--masks", out.parent / "masks", "--layout", "nnunet"]
    words += ["--format", "tif-stack", "--size", "none", "--spacing", "none"]
    alike = ["--backend", "cpu", "--jobs", "1", "--index", "none", "--json"]
    first = CliRunner().invoke(app, [str(word) for word in words + alike])
    assert (first.exit_code, json.loads(first.stdout)["arranged"]) == (1, {"training": 1, "others": 1, "apart": 0})
    damaged.write_bytes(content)
    second = CliRunner().invoke(app, ["retry", str(out), "--rejected", *alike])
    assert (second.exit_code, json.loads(second.stdout)["arranged"]) == (0, {"training": 2, "others": 1, "apart": 0})
    assert view(out) == VIEW


@given(st.lists(st.text("aAbB_/ .é-", min_size=1, max_size=5), unique=True, max_size=8))
def test_case_names_are_plain_and_unique(folders: list[str]) -> None:
    names = case_names(folders)
    assert list(names) == folders
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) for name in names.values())
    assert len({name.lower() for name in names.values()}) == len(folders)


def test_a_case_keeps_the_name_of_its_folder_and_a_long_one_is_cut() -> None:
    names = case_names(["site/p1", "site/P2", "site_p2", "x" * 300])
    assert names["site/p1"] == "site_p1"
    assert re.fullmatch("site_P2-[0-9a-f]{16}", names["site/P2"])
    assert re.fullmatch("site_p2-[0-9a-f]{16}", names["site_p2"])
    assert len(names["x" * 300]) == 200
