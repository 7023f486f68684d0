"""`restore --as seg`: predictions as DICOM SEG on the original images, one and many, read by highdicom and pydicom."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from cohort import gpuprep, write_cohort
from numpy.typing import NDArray

import gpuprep as package

highdicom = pytest.importorskip("highdicom", reason="highdicom is not installed: pip install 'gpuprep[seg]'")

SHAPE = (6, 16, 16)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """OUT of a conversion of s000, s001 and s002 that doubles rows and columns and keeps slices."""
    recipe = package.Recipe(spacing_mm=None, size=(32, 32), format="npy", dtype="uint8")
    run = package.convert(write_cohort(tmp_path / "ct", 3), tmp_path / "out", recipe, backend="cpu")
    assert run.counts == {"ok": 3}
    return tmp_path / "out"


@pytest.fixture
def names(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "dataset.json"  # as nnU-Net has it
    file.write_text(json.dumps({"labels": {"background": 0, "liver": 1, "Lung_L": 2, "my thing": 3}}))
    return file


def labels(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 4, SHAPE).astype(np.uint8)


def predicted(file: Path, seed: int = 0) -> NDArray[np.uint8]:
    """Write a prediction on the grid of an output, and return it as it was on the slices."""
    file.parent.mkdir(parents=True, exist_ok=True)
    native = labels(seed)
    np.save(file, native.repeat(2, axis=1).repeat(2, axis=2))
    return native


def folders(out: Path) -> list[Path]:
    return sorted(file.parent for file in out.rglob("volume.json"))


def run(*words: str | Path) -> Any:
    return gpuprep("restore", *words)


def to_segs(tmp_path: Path, out: Path) -> list[str | Path]:
    """Return the words of a command that writes SEGs of a folder of predictions."""
    return ["--to", out, "--out", tmp_path / "segs", "--as", "seg", "--dicom", tmp_path / "ct"]


def by_slice(file: Path, dicom: Path) -> NDArray[np.uint8]:
    """Return the labels of a SEG on the slices of a series in order along z, by the UIDs it refers to, with pydicom."""
    images = [pydicom.dcmread(f, stop_before_pixels=True) for f in dicom.rglob("*.dcm")]
    order = [str(i.SOPInstanceUID) for i in sorted(images, key=lambda i: float(i.ImagePositionPatient[2]))]
    seg = pydicom.dcmread(file)
    found = np.zeros(SHAPE, np.uint8)
    for frame, item in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        uid = item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        number = item.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[order.index(str(uid))][frame > 0] = number
    return found


def test_a_prediction_becomes_a_seg_of_the_original_images(tmp_path: Path, out: Path, names: Path) -> None:
    native = predicted(tmp_path / "p.npy")
    words: list[str | Path] = ["--as", "seg", "--dicom", tmp_path / "ct", "--labels", names, "--algorithm", "my model"]
    ran = run(tmp_path / "p.npy", "--to", folders(out)[1], "--out", tmp_path / "p.dcm", *words)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"label 1 (liver): {np.count_nonzero(native == 1)} voxels" in ran.stdout
    np.testing.assert_array_equal(by_slice(tmp_path / "p.dcm", tmp_path / "ct" / "s001"), native)
    seg = highdicom.seg.segread(tmp_path / "p.dcm")
    described = [seg.get_segment_description(n) for n in (1, 2, 3)]
    assert [d.segment_label for d in described] == ["liver", "Lung_L", "my thing"]
    assert [d.segmented_property_type.meaning for d in described] == ["Liver", "Lung", "my thing"]
    assert described[0].algorithm_identification.name == "my model"


def test_the_ending_dcm_asks_for_a_seg(tmp_path: Path, out: Path, names: Path) -> None:
    predicted(tmp_path / "p.npy")
    words: list[str | Path] = ["--dicom", tmp_path / "ct", "--labels", names, "--seg-kind", "labelmap"]
    ran = run(tmp_path / "p.npy", "--to", folders(out)[0], "--out", tmp_path / "p.dcm", *words)
    assert ran.returncode == 0
    assert pydicom.dcmread(tmp_path / "p.dcm").SegmentationType == "LABELMAP"


def test_codes_of_a_recipe_are_used(tmp_path: Path, out: Path, names: Path) -> None:
    predicted(tmp_path / "p.npy")
    recipe = tmp_path / "codes.toml"
    recipe.write_text('[masks.codes]\n"My Thing" = {scheme = "SCT", value = "80891009", meaning = "Heart"}\n')
    words: list[str | Path] = ["--as", "seg", "--dicom", tmp_path / "ct", "--labels", names, "--recipe", recipe]
    assert run(tmp_path / "p.npy", "--to", folders(out)[0], "--out", tmp_path / "p.dcm", *words).returncode == 0
    described = highdicom.seg.segread(tmp_path / "p.dcm").get_segment_description(3)
    assert (described.segmented_property_type.value, described.segment_label) == ("80891009", "my thing")


def test_labels_of_the_output_folder_are_those_of_a_series_without_masks(tmp_path: Path, out: Path) -> None:
    predicted(tmp_path / "p.npy")
    (out / "labels.json").write_text(json.dumps({"heart": 1, "liver": 2, "spleen": 3}))
    words: list[str | Path] = ["--as", "seg", "--dicom", tmp_path / "ct"]
    assert run(tmp_path / "p.npy", "--to", folders(out)[0], "--out", tmp_path / "p.dcm", *words).returncode == 0
    seg = highdicom.seg.segread(tmp_path / "p.dcm")
    assert [seg.get_segment_description(n).segment_label for n in (1, 2, 3)] == ["heart", "liver", "spleen"]


def test_a_file_of_a_single_structure_has_its_name(tmp_path: Path, out: Path, names: Path) -> None:
    for name in ("liver", "lung_l", "other"):
        file = tmp_path / "predictions" / "ct" / "s000" / f"{name}.npy"
        native = predicted(file)
        np.save(file, (native > 1).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2))
    (out / "labels.json").write_text(json.dumps({"liver": 1, "Lung_L": 2}))
    words: list[str | Path] = ["--as", "seg", "--dicom", tmp_path / "ct"]
    given: list[list[str | Path]] = [[], ["--labels", names]]
    for labels_of in given:
        ran = run(tmp_path / "predictions", "--to", out, "--out", tmp_path / "segs", *words, *labels_of)
        assert ran.returncode == 0
        for name, expected in {"liver": "liver", "lung_l": "Lung_L", "other": "liver"}.items():
            (segment,) = pydicom.dcmread(tmp_path / "segs" / "ct" / "s000" / f"{name}.dcm").SegmentSequence
            assert (segment.SegmentNumber, segment.SegmentLabel) == (1, expected)
        prediction = tmp_path / "predictions" / "ct" / "s000" / "lung_l.npy"
        ran = run(prediction, "--to", folders(out)[0], "--out", tmp_path / "p.dcm", *words, *labels_of)
        assert "label 1 (Lung_L): " in ran.stdout
    predicted(tmp_path / "lung_l.npy")  # with several labels
    assert package.restore(tmp_path / "lung_l.npy", folders(out)[0]).names == {1: "liver", 2: "Lung_L"}


def test_the_table_of_labels_beside_predictions_names_them(tmp_path: Path, out: Path) -> None:
    (out / "labels.json").write_text(json.dumps({"bone": 1, "lung": 2, "skin": 3}))
    predicted(tmp_path / "predictions" / "ct" / "s000.npy")
    (tmp_path / "predictions" / "dataset.json").write_text(
        '{"labels": {"background": 0, "lung": 1, "bone": 2, "fat": 3}}'
    )
    words = to_segs(tmp_path, out)
    ran = run(tmp_path / "predictions", *words)
    assert ran.returncode == 0
    assert f"labels have the names in {tmp_path / 'predictions' / 'dataset.json'}" in ran.stdout.replace("\n", "")
    seg = highdicom.seg.segread(tmp_path / "segs" / "ct" / "s000.dcm")
    assert [seg.get_segment_description(n).segment_label for n in (1, 2, 3)] == ["lung", "bone", "fat"]


@pytest.mark.parametrize("one", [True, False])
def test_a_structure_of_several_is_not_named_by_guess(tmp_path: Path, out: Path, one: bool) -> None:
    (out / "labels.json").write_text(json.dumps({"heart": 1} if one else {"heart": 1, "liver": 2}))
    probability = np.random.default_rng(0).random((6, 32, 32))
    np.save(tmp_path / "p.npy", probability)
    words: list[str | Path] = ["--as", "seg", "--dicom", tmp_path / "ct"]
    ran = run(tmp_path / "p.npy", "--to", folders(out)[0], "--out", tmp_path / "p.dcm", *words)
    assert ran.returncode == (0 if one else 2)
    assert ("no label has a name" in ran.stderr) is not one
    named = {1: "heart"} if one else {}
    assert package.restore(probability, folders(out)[0]).names == named
    assert package.restore(probability > 0.5, folders(out)[0]).names == named
    classes = np.stack([probability / 2, probability / 3, probability / 3])
    assert package.restore(classes, folders(out)[0]).names == ({} if one else {1: "heart", 2: "liver"})


def test_a_folder_of_predictions_becomes_segs_and_is_resumed(tmp_path: Path, out: Path, names: Path) -> None:
    natives = [predicted(tmp_path / "predictions" / "ct" / f"s{n:03d}.npy", n) for n in range(3)]
    words = [*to_segs(tmp_path, out), "--labels", names]
    ran = run(tmp_path / "predictions", *words, "--json")
    assert (ran.returncode, json.loads(ran.stdout)["counts"]) == (0, {"restored": 3})
    for n, native in enumerate(natives):
        file = tmp_path / "segs" / "ct" / f"s{n:03d}.dcm"
        np.testing.assert_array_equal(by_slice(file, tmp_path / "ct" / f"s{n:03d}"), native)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "segs").rglob("*.dcm")}
    assert json.loads(run(tmp_path / "predictions", *words, "--json").stdout)["counts"] == {"skipped": 3}
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "segs").rglob("*.dcm")} == before
    changed = run(tmp_path / "predictions", *words, "--json", "--seg-kind", "labelmap")
    assert json.loads(changed.stdout)["counts"] == {"restored": 3}


def test_a_case_without_its_originals_fails_and_no_other_does(tmp_path: Path, out: Path, names: Path) -> None:
    for n in range(3):
        predicted(tmp_path / "predictions" / f"s{n:03d}.npy", n)
    next((tmp_path / "ct" / "s001").glob("*.dcm")).unlink()
    words = [*to_segs(tmp_path, out), "--labels", names]
    ran = run(tmp_path / "predictions", *words, "--json")
    assert ran.returncode == 1
    with open(tmp_path / "segs" / "restored.csv", encoding="utf-8", newline="") as f:
        rows = {row["prediction"]: row for row in csv.DictReader(f)}
    assert [rows[f"s{n:03d}.npy"]["verdict"] for n in range(3)] == ["restored", "failed", "restored"]
    assert "5 images of series" in rows["s001.npy"]["reason"]
    assert sorted(f.name for f in (tmp_path / "segs").glob("*.dcm")) == ["s000.dcm", "s002.dcm"]


def test_a_damaged_output_does_not_stop_the_others(tmp_path: Path, out: Path, names: Path) -> None:
    for n in range(3):
        predicted(tmp_path / "predictions" / f"s{n:03d}.npy", n)
    (folders(out)[0] / "volume.json").write_text("{")
    sidecar = json.loads((folders(out)[2] / "volume.json").read_text())
    (folders(out)[2] / "volume.json").write_text(json.dumps({k: v for k, v in sidecar.items() if k != "recipe"}))
    words = to_segs(tmp_path, out)
    ran = run(tmp_path / "predictions", *words, "--labels", names, "--json")
    assert (ran.returncode, json.loads(ran.stdout)["counts"]) == (1, {"restored": 1, "failed": 2})
    assert "is no finished output" in ran.stderr
    assert "KeyError: 'recipe'" in ran.stderr


def test_new_names_in_the_output_folder_make_a_new_seg(tmp_path: Path, out: Path) -> None:
    predicted(tmp_path / "predictions" / "s000.npy")
    words = to_segs(tmp_path, out)
    for found in ({"heart": 1, "liver": 2, "spleen": 3}, {"aorta": 1, "liver": 2, "spleen": 3}):
        (out / "labels.json").write_text(json.dumps(found))
        assert run(tmp_path / "predictions", *words).returncode == 0
        segments = pydicom.dcmread(tmp_path / "segs" / "s000.dcm").SegmentSequence
        assert [s.SegmentLabel for s in segments] == list(found)


def test_an_original_image_is_never_replaced(tmp_path: Path, out: Path, names: Path) -> None:
    (image,) = (tmp_path / "ct" / "s000").glob("*-0001.dcm")
    before = image.read_bytes()
    predicted(tmp_path / "predictions" / "ct" / "s000" / f"{image.stem}.npy")
    words: list[str | Path] = ["--as", "seg", "--dicom", tmp_path / "ct", "--labels", names]
    prediction = next((tmp_path / "predictions").rglob("*.npy"))
    one: list[str | Path] = [prediction, "--to", folders(out)[0], "--out", image]
    many: list[str | Path] = [tmp_path / "predictions", "--to", out, "--out", tmp_path / "ct"]
    for place in (one, many):
        ran = run(*place, *words)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert "lies in the folder of original images" in ran.stderr
    (tmp_path / "scans").mkdir()
    (tmp_path / "ct").rename(tmp_path / "scans" / "ct")
    words[words.index(tmp_path / "ct")] = tmp_path / "scans" / "ct"
    ran = run(tmp_path / "predictions", "--to", out, "--out", tmp_path / "scans", *words)
    assert "has the original images" in ran.stderr
    assert (tmp_path / "scans" / "ct" / "s000" / image.name).read_bytes() == before


def test_a_prediction_without_a_label_is_one_note(
    tmp_path: Path, out: Path, names: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.save(tmp_path / "p.npy", np.zeros((6, 32, 32), np.uint8))
    words: list[str | Path] = ["--as", "seg", "--dicom", tmp_path / "ct", "--labels", names]
    ran = run(tmp_path / "p.npy", "--to", folders(out)[0], "--out", tmp_path / "p.dcm", *words)
    assert (ran.returncode, ran.stderr, caplog.records) == (0, "", [])
    assert "no structure has a voxel: each has one empty frame" in ran.stdout
    assert len(pydicom.dcmread(tmp_path / "p.dcm").PerFrameFunctionalGroupsSequence) == 3


def test_outputs_with_pseudonyms_need_their_key(tmp_path: Path, names: Path) -> None:
    recipe = package.Recipe(spacing_mm=None, size=(32, 32), format="npy", dtype="uint8")
    write_cohort(tmp_path / "ct", 1)
    pseudonyms = package.Pseudonyms.load(tmp_path / "key", tmp_path / "out")
    package.convert(tmp_path / "ct", tmp_path / "out", recipe, backend="cpu", names=pseudonyms)
    native = predicted(tmp_path / "p.npy")
    words: list[str | Path] = ["--as", "seg", "--dicom", tmp_path / "ct", "--labels", names]
    (folder,) = folders(tmp_path / "out")
    refused = run(tmp_path / "p.npy", "--to", folder, "--out", tmp_path / "p.dcm", *words)
    assert refused.returncode == 2
    assert "pseudonym" in refused.stderr
    mistyped = run(tmp_path / "p.npy", "--to", folder, "--out", tmp_path / "p.dcm", *words, "--key", tmp_path / "kye")
    assert mistyped.returncode == 2
    assert "there is no key" in mistyped.stderr
    assert not (tmp_path / "kye").exists()
    ran = run(tmp_path / "p.npy", "--to", folder, "--out", tmp_path / "p.dcm", *words, "--key", tmp_path / "key")
    assert ran.returncode == 0
    np.testing.assert_array_equal(by_slice(tmp_path / "p.dcm", tmp_path / "ct"), native)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--as", "seg"], "--as seg needs the original images: give --dicom DIR"),
        (["--as", "npy", "--dicom", "ct"], "are for --as seg"),
        (["--as", "seg", "--dicom", "nowhere"], "nowhere"),
        (["--as", "seg", "--dicom", "ct", "--algorithm", " "], "algorithm = ' '"),
        (["--as", "seg", "--dicom", "ct"], "no label has a name, so there is no structure to write"),
        (["--as", "seg", "--dicom", "ct", "--labels", "few.json"], "name them too (--labels FILE)"),
        (["--as", "seg", "--dicom", "ct", "--labels", "blank.json"], "voxels have labels without a name: 1"),
        (["--as", "seg", "--dicom", "ct", "--labels", "none.json"], "none.json cannot be read"),
        (["--as", "seg", "--dicom", "ct", "--labels", "bad.json"], "bad.json is no JSON"),
        (["--as", "seg", "--dicom", "ct", "--labels", "twice.json"], "'a' and 'b' both have the value 1"),
        (["--as", "seg", "--dicom", "ct", "--labels", "list.json"], "is no table of labels"),
        (["--as", "seg", "--dicom", "ct", "--labels", "text.json"], "has the value '1': give a whole number for each"),
    ],
)
def test_an_impossible_request_is_one_line(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "few.json": '{"liver": 1}', "bad.json": "{", "twice.json": '{"a": 1, "b": 1}', "list.json": "[1]",
        "text.json": '{"a": "1"}', "blank.json": '{" ": 1, "b": 2, "c": 3}',
    }.items():  # fmt: skip
        Path(name).write_text(content)
    predicted(tmp_path / "p.npy")
    ending = "npy" if "npy" in words else "dcm"
    ran = run("p.npy", "--to", folders(out)[0], "--out", f"r.{ending}", *words)
    assert ran.returncode == 2
    assert text.replace("'", "") in ran.stderr.replace("'", "").replace("\n", " ")
    assert ran.stderr.count("\n") == 1
    assert not list(tmp_path.glob("r.*"))
