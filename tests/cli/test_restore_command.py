"""The command `restore`: one prediction, folders of predictions, resuming, and requests that cannot be met."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from cohort import Running, gpuprep, python, write_cohort
from filelock import FileLock
from numpy.typing import NDArray

import gpuprep as package
from gpuprep.errors import OutputError, PredictionError
from gpuprep.output.find_predictions import OutputNames, find_predictions
from gpuprep.testing import outlines, write_series

SHAPE, SPACING_MM = (6, 16, 16), (2.0, 0.8, 0.7)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """OUT of a conversion of s000, s001 and s002 that doubles rows and columns and keeps slices."""
    recipe = package.Recipe(spacing_mm=None, size=(32, 32), format="npy", dtype="uint8")
    run = package.convert(write_cohort(tmp_path / "ct", 3), tmp_path / "out", recipe, backend="cpu")
    assert run.counts == {"ok": 3}
    return tmp_path / "out"


def folders(out: Path) -> list[Path]:
    return sorted(file.parent for file in out.rglob("volume.json"))


def labels(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return labels of slices as acquired, and the same on the grid of the output."""
    native = np.random.default_rng(seed).integers(0, 4, SHAPE).astype(np.uint8)
    return native, native.repeat(2, axis=1).repeat(2, axis=2)


def restored(folder: Path) -> list[dict[str, str]]:
    with open(folder / "restored.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def run(*words: str | Path) -> Any:
    return gpuprep("restore", *words)


def identity(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


@pytest.mark.parametrize("name", ["r.nii", "r.nii.gz", "r.npy"])
def test_one_prediction_is_restored_to_a_file_of_the_format_of_its_ending(tmp_path: Path, out: Path, name: str) -> None:
    native, prediction = labels(0)
    np.save(tmp_path / "p.npy", prediction)
    ended = run(tmp_path / "p.npy", "--to", folders(out)[0], "--out", tmp_path / name)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"{tmp_path / name} has 3 labels on 6 slices of 16 × 16"
    assert f"label 2: {(native == 2).sum()} voxels" in ended.stdout.splitlines()
    if name.endswith(".npy"):
        found = np.load(tmp_path / name)
    else:
        image = SimpleITK.ReadImage(tmp_path / name)
        found = SimpleITK.GetArrayFromImage(image)
        assert image.GetOrigin() == pytest.approx((-100, -120, -300))  # of write_series
        assert image.GetSpacing() == pytest.approx(SPACING_MM[::-1])
        assert image.GetDirection() == pytest.approx(np.eye(3).ravel())
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, native)
    assert not list(tmp_path.glob(".part*"))


def test_json_and_quiet_replace_the_lines(tmp_path: Path, out: Path) -> None:
    native, prediction = labels(0)
    np.save(tmp_path / "p.npy", prediction)
    words = (tmp_path / "p.npy", "--to", folders(out)[0] / "volume.json", "--out", tmp_path / "r.npy")
    found = json.loads(run(*words, "--json").stdout)
    assert found["labels"][0] == {"value": 1, "name": None, "voxels": int((native == 1).sum())}
    assert found["shape"] == list(SHAPE)
    assert run(*words, "--quiet").stdout == ""
    assert run(*words, "--quiet").stderr == ""


def test_the_threshold_applies_to_the_probability_of_one_structure(tmp_path: Path, out: Path) -> None:
    native = np.random.default_rng(0).random(SHAPE)
    np.save(tmp_path / "p.npy", native.repeat(2, axis=1).repeat(2, axis=2))
    for threshold, words in ((0.5, ()), (0.8, ("--threshold", "0.8"))):
        ended = run(tmp_path / "p.npy", "--to", folders(out)[0], "--out", tmp_path / "r.npy", *words)
        assert ended.returncode == 0, ended.stderr
        np.testing.assert_array_equal(np.load(tmp_path / "r.npy"), native.astype(np.float32) >= threshold)
    np.save(tmp_path / "p.npy", np.zeros((2, 6, 32, 32)))
    ended = run(tmp_path / "p.npy", "--to", folders(out)[0], "--out", tmp_path / "r.npy", "--threshold", "0.8")
    assert ended.returncode == 2
    assert "of classes the largest" in ended.stderr


def write_predictions(folder: Path, out: Path) -> list[NDArray[np.uint8]]:
    """Write a prediction of each output: NIfTI by nnU-Net's name, its probabilities, one by path, one by last part."""
    truth = [labels(n) for n in range(3)]
    folder.mkdir()
    affine = np.array(json.loads((folders(out)[0] / "volume.json").read_text())["affine_lps"])[:, [2, 1, 0, 3]]
    image = nibabel.Nifti1Image(truth[0][1].T, np.diag([-1, -1, 1, 1]) @ affine)
    nibabel.save(image, folder / "ct_s000_0000.nii.gz")
    (folder / "plans.json").write_text("{}")
    (folder / "ct_s000.pkl").write_bytes(b"")
    classes = np.stack([truth[1][1] == n for n in range(4)]).astype(np.float16)
    np.savez_compressed(folder / "ct_s001.npz", probabilities=classes)
    (folder / "ct").mkdir()
    np.save(folder / "ct" / "s002.npy", truth[2][1])
    return [native for native, _ in truth]


def test_predictions_of_a_folder_are_matched_by_name_and_restored(tmp_path: Path, out: Path) -> None:
    truth = write_predictions(tmp_path / "preds", out)
    ended = run(tmp_path / "preds", "--to", out, "--out", tmp_path / "res", "--jobs", "2")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"3 predictions: 3 restored; results in {tmp_path / 'res'}\n"
    names = ["ct_s000_0000.nii.gz", "ct_s001.nii.gz", "ct/s002.nii.gz"]
    assert sorted(p.relative_to(tmp_path / "res").as_posix() for p in (tmp_path / "res").rglob("*.*")) == sorted(
        [*names, "restored.csv", ".restored.csv.lock"]
    )
    for name, native in zip(names, truth, strict=True):
        image = SimpleITK.ReadImage(tmp_path / "res" / name)
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), native)
    rows = {row["prediction"]: row for row in restored(tmp_path / "res")}
    assert {name: (row["output"], row["result"]) for name, row in rows.items()} == {
        "ct_s000_0000.nii.gz": ("ct/s000", names[0]),
        "ct_s001.npz": ("ct/s001", names[1]),
        "ct/s002.npy": ("ct/s002", names[2]),
    }


def test_a_second_run_skips_what_is_complete_and_unchanged(tmp_path: Path, out: Path) -> None:
    truth = write_predictions(tmp_path / "preds", out)
    words = (tmp_path / "preds", "--to", out, "--out", tmp_path / "res", "--as", "npy", "--json")
    assert json.loads(run(*words).stdout)["counts"] == {"restored": 3}
    files = sorted((tmp_path / "res").rglob("*.npy"))
    before = [identity(file) for file in files]
    for _ in range(2):
        assert json.loads(run(*words).stdout)["counts"] == {"skipped": 3}
        assert [identity(file) for file in files] == before
    changes: dict[str, Callable[[], object]] = {
        "another prediction": lambda: np.save(tmp_path / "preds" / "ct" / "s002.npy", labels(9)[1]),
        "result lost": lambda: (tmp_path / "res" / "ct" / "s002.npy").unlink(),
        "result cut": lambda: os.truncate(tmp_path / "res" / "ct" / "s002.npy", 500),
        "another volume.json": lambda: (out / "ct" / "s002" / "volume.json").write_text(
            json.dumps(json.loads((out / "ct" / "s002" / "volume.json").read_text()))
        ),
    }
    for name, change in changes.items():
        change()
        ended = json.loads(run(*words).stdout)
        assert ended["counts"] == {"restored": 1, "skipped": 2}, name
        np.testing.assert_array_equal(np.load(tmp_path / "res" / "ct" / "s002.npy"), labels(9)[0])
        np.testing.assert_array_equal(np.load(tmp_path / "res" / "ct_s001.npy"), truth[1])
    assert json.loads(run(*words, "--threshold", "0.4").stdout)["counts"].get("skipped") is None
    (tmp_path / "res" / "restored.csv").unlink()
    assert json.loads(run(*words).stdout)["counts"] == {"restored": 3}
    (tmp_path / "res" / "restored.csv").write_bytes(b"\xff\x00 damaged \n\n,,")
    assert json.loads(run(*words).stdout)["counts"] == {"restored": 3}


def test_a_bad_prediction_does_not_stop_the_others(tmp_path: Path, out: Path) -> None:
    write_predictions(tmp_path / "preds", out)
    preds = tmp_path / "preds"
    (preds / "ct_s000_0000.nii.gz").write_bytes((preds / "ct_s000_0000.nii.gz").read_bytes()[:200])
    np.save(preds / "ct_s001_0000.npy", np.zeros((6, 32, 31)))
    np.save(preds / "ct_s009.npy", np.zeros((6, 32, 32)))
    np.save(preds / "ct" / "s002.npy", np.full((6, 32, 32), np.nan))
    ended = run(preds, "--to", out, "--out", tmp_path / "res")
    assert ended.returncode == 1
    assert ended.stdout == f"5 predictions: 3 failed, 1 restored, 1 unmatched; results in {tmp_path / 'res'}\n"
    rows = {row["prediction"]: (row["verdict"], row["reason"], row["result"]) for row in restored(tmp_path / "res")}
    assert rows["ct_s001.npz"] == ("restored", "", "ct_s001.nii.gz")
    assert rows["ct_s009.npy"] == ("unmatched", "no output has the name ct_s009", "")
    assert rows["ct_s000_0000.nii.gz"][0] == "failed"
    assert "cannot be read" in rows["ct_s000_0000.nii.gz"][1]
    assert "(6, 32, 31), but the output has (6, 32, 32)" in rows["ct_s001_0000.npy"][1]
    assert "NaN" in rows["ct/s002.npy"][1]
    assert len(ended.stderr.splitlines()) == 4
    assert [p.name for p in (tmp_path / "res").rglob("*.nii.gz")] == ["ct_s001.nii.gz"]
    quiet = run(preds, "--to", out, "--out", tmp_path / "res", "--quiet")
    assert quiet.stdout == ""
    assert sorted(quiet.stderr.splitlines()) == sorted(ended.stderr.splitlines())


def test_the_result_of_a_former_prediction_does_not_outlive_a_bad_new_one(tmp_path: Path, out: Path) -> None:
    write_predictions(tmp_path / "preds", out)
    words = (tmp_path / "preds", "--to", out, "--out", tmp_path / "res", "--as", "npy")
    assert run(*words).returncode == 0
    np.save(tmp_path / "preds" / "ct" / "s002.npy", np.full((6, 32, 32), -1))
    assert run(*words).returncode == 1
    assert not (tmp_path / "res" / "ct" / "s002.npy").exists()


def test_labels_come_before_the_probabilities_of_the_same_case(tmp_path: Path, out: Path) -> None:
    truth = write_predictions(tmp_path / "preds", out)
    np.save(tmp_path / "preds" / "ct_s001.npy", labels(1)[1])
    ended = run(tmp_path / "preds", "--to", out, "--out", tmp_path / "res", "--as", "npy")
    assert ended.returncode == 0
    assert "1 passed over, 3 restored" in ended.stdout
    np.testing.assert_array_equal(np.load(tmp_path / "res" / "ct_s001.npy"), truth[1])
    nibabel.save(nibabel.Nifti1Image(labels(1)[1].T, None), tmp_path / "preds" / "ct_s001.nii")
    ended = run(tmp_path / "preds", "--to", out, "--out", tmp_path / "res", "--as", "npy")
    assert ended.returncode == 1
    assert ended.stderr.count("several predictions have this name: ct_s001.nii, ct_s001.npy") == 2


def test_names_that_are_no_text_are_recorded_and_recognised(tmp_path: Path, out: Path) -> None:
    (tmp_path / "preds" / "ct").mkdir(parents=True)
    name = os.fsdecode(b'h\xe4 "1",\n.npy')  # in Latin-1, with quotes and a line break
    (tmp_path / "preds" / "ct" / "s001").mkdir()
    np.save(tmp_path / "preds" / "ct" / "s001" / name, labels(1)[1])
    words = (tmp_path / "preds", "--to", out, "--out", tmp_path / "res", "--as", "npy")
    assert "1 restored" in run(*words).stdout
    np.testing.assert_array_equal(np.load(tmp_path / "res" / "ct" / "s001" / name), labels(1)[0])
    assert "1 skipped" in run(*words).stdout


def test_series_without_a_prediction_are_counted(tmp_path: Path, out: Path) -> None:
    write_predictions(tmp_path / "preds", out)
    (tmp_path / "preds" / "ct_s001.npz").unlink()
    ended = run(tmp_path / "preds", "--to", out, "--out", tmp_path / "res")
    assert "2 restored; 1 series without a prediction" in ended.stdout


def test_a_damaged_output_and_one_of_a_later_version_fail_alone(tmp_path: Path, out: Path) -> None:
    write_predictions(tmp_path / "preds", out)
    sidecar = json.loads((out / "ct" / "s000" / "volume.json").read_text())
    (out / "ct" / "s000" / "volume.json").write_text(json.dumps(sidecar | {"schema": 99}))
    (out / "ct" / "s001" / "volume.json").write_text("{")
    ended = run(tmp_path / "preds", "--to", out, "--out", tmp_path / "res")
    assert ended.returncode == 1
    assert "1 restored" in ended.stdout
    assert "later version of gpuprep (schema 99)" in ended.stderr
    assert "is no finished output" in ended.stderr


def test_requests_that_cannot_be_met_end_with_one_line(tmp_path: Path, out: Path) -> None:
    series = folders(out)[0]
    np.save(tmp_path / "p.npy", labels(0)[1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "full.npy").mkdir()
    (tmp_path / "preds").mkdir()
    np.save(tmp_path / "preds" / "ct_s000.npy", labels(0)[1])
    one, many = tmp_path / "p.npy", tmp_path / "preds"
    cases: list[tuple[int, str, list[Any]]] = [
        (2, "there is no prediction", [tmp_path / "absent.npy", "--to", series, "--out", tmp_path / "r.npy"]),
        (2, "ends in .nii.gz or .nii or .npy", [one, "--to", series, "--out", tmp_path / "r"]),
        (2, "ends in .npy", [one, "--to", series, "--out", tmp_path / "r.nii", "--as", "npy"]),
        (2, "has no volume.json", [one, "--to", out, "--out", tmp_path / "r.npy"]),
        (2, "has no volume.json", [one, "--to", tmp_path / "absent", "--out", tmp_path / "r.npy"]),
        (2, "would change", [one, "--to", series, "--out", one]),
        (2, "would change", [one, "--to", series, "--out", series / "r.npy"]),
        (2, "would change", [one, "--to", series, "--out", folders(out)[1] / "volume.npy"]),
        (2, "would change", [tmp_path / "empty", "--to", series, "--out", tmp_path / "empty" / "r.npy"]),
        (2, "no folder", [one, "--to", series, "--out", tmp_path / "absent" / "r.npy"]),
        (2, "no probability", [one, "--to", series, "--out", tmp_path / "r.npy", "--threshold", "1.5"]),
        (2, "lies in the folder of predictions", [many, "--to", out, "--out", many / "res"]),
        (2, "lies in the folder of outputs", [many, "--to", out, "--out", out / "res"]),
        (2, "has the predictions", [many, "--to", out, "--out", tmp_path]),
        (2, "has the outputs", [many, "--to", out / "ct", "--out", out]),
        (2, "are for --as seg", [one, "--to", series, "--out", tmp_path / "r.npy", "--algorithm", "net"]),
        (2, "are for --as seg", [one, "--to", series, "--out", tmp_path / "r.npy", "--seg-kind", "labelmap"]),
        (1, "full.npy cannot be written: Is a directory", [one, "--to", series, "--out", tmp_path / "full.npy"]),
        (2, "give a folder for the results", [many, "--to", out, "--out", one]),
        (2, "is no folder of outputs", [many, "--to", tmp_path / "absent", "--out", tmp_path / "res"]),
        (3, "holds no prediction", [tmp_path / "empty", "--to", out, "--out", tmp_path / "res"]),
        (3, "holds no output", [many, "--to", tmp_path / "empty", "--out", tmp_path / "res"]),
        (1, "has no slices", [tmp_path / "empty", "--to", series, "--out", tmp_path / "r.npy"]),
    ]
    for code, message, words in cases:
        ended = run(*words)
        assert (ended.returncode, ended.stdout) == (code, ""), words
        assert message in ended.stderr
        assert ended.stderr.startswith("gpuprep: ")
        assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "r.npy").exists()
    assert not (tmp_path / "res").exists()
    np.testing.assert_array_equal(np.load(one), labels(0)[1])


def test_two_runs_do_not_write_the_same_results(tmp_path: Path, out: Path) -> None:
    write_predictions(tmp_path / "preds", out)
    words = (tmp_path / "preds", "--to", out, "--out", tmp_path / "res", "--jobs", "1")
    assert run(*words).returncode == 0
    before = (tmp_path / "res" / "restored.csv").read_bytes()
    with FileLock(tmp_path / "res" / ".restored.csv.lock"):
        ended = run(*words, "--threshold", "0.4")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "another gpuprep is writing into" in ended.stderr
    assert (tmp_path / "res" / "restored.csv").read_bytes() == before
    assert run(*words).stdout.startswith("3 predictions: 3 skipped")


def convert_with_masks(tmp_path: Path, *, image: bool, masks: package.Masks = package.Masks()) -> Path:  # noqa: B008
    """Convert a series with outlines of two structures; return the folder of its output."""
    write_cohort(tmp_path / "ct", 1)
    lines = ["structure x_mm y_mm z_mm"]
    for name, contours in outlines(SHAPE, SPACING_MM).items():
        lines += [f"{name} {x:.3f} {y:.3f} {z:.3f}" for points in contours for x, y, z in points]
    (tmp_path / "outlines.txt").write_text("\n".join(lines))
    recipe = package.Recipe(image=image, format="npy", spacing_mm=(1.0, 0.5, 0.5), size=None, masks=masks)
    run = package.convert(tmp_path / "ct", tmp_path / "out", recipe, masks=tmp_path / "outlines.txt", backend="cpu")
    assert run.counts == {"ok": 1}
    (folder,) = folders(tmp_path / "out")
    return folder


def test_an_output_of_masks_alone_takes_predictions_too(tmp_path: Path) -> None:
    folder = convert_with_masks(tmp_path, image=False)
    found = package.restore(folder / "labels.npy", folder)
    assert found.names == {1: "heart", 2: "spine"}
    voxels = {s["name"]: s["source_voxels"] for s in json.loads((folder / "volume.json").read_text())["labels"]}
    assert {found.names[n]: int((found.values == n).sum()) for n in (1, 2)} == voxels


@pytest.mark.parametrize("roi", [None, "spine"])
def test_a_volume_for_each_structure_tells_no_name_of_a_label(tmp_path: Path, roi: str | None) -> None:
    # All such volumes have the value 1, also where a series has one structure: label 1 of a model may be another.
    folder = convert_with_masks(tmp_path, image=True, masks=package.Masks(layout="per-roi", roi=roi))
    assert package.restore(np.load(folder / "masks" / "spine.npy"), folder).names == {}


def test_every_key_of_volume_json_is_documented(tmp_path: Path) -> None:
    sidecar = json.loads((convert_with_masks(tmp_path, image=True) / "volume.json").read_text())
    keys = {*sidecar} - {"source"} | {f"source.{key}" for key in sidecar["source"]}
    page = (Path(__file__).parents[2] / "docs" / "restore.md").read_text("utf-8").split("## volume.json")[1]
    rows = re.findall(r"(?m)^\| (`.*?) \|", page)
    assert {key for row in rows for key in re.findall(r"`([^`]+)`", row)} == keys


# Outputs of early versions --------------------------------------------------------------------------------------------


def early(out: Path, **changes: Any) -> dict[str, Any]:
    """Return a ``volume.json`` as it was written before it had a schema number."""
    sidecar: dict[str, Any] = json.loads((folders(out)[0] / "volume.json").read_text())
    del sidecar["schema"], sidecar["source"]["placement"]
    sidecar["source"] |= changes.pop("source", {})
    return sidecar | changes


def test_regular_series_of_early_versions_are_restored_and_irregular_ones_refused(out: Path) -> None:
    native, prediction = labels(0)
    np.testing.assert_array_equal(package.restore(prediction, early(out)).values, native)
    np.testing.assert_array_equal(package.restore(prediction, early(out, codes=["hu-range"])).values, native)
    for changes in ({"codes": ["tilt"]}, {"codes": ["uneven", "bits"]}, {"source": {"slices": 5}}):
        with pytest.raises(OutputError, match=r"early version of gpuprep.*convert it again"):
            package.restore(prediction, early(out, **changes))


def test_damaged_contents_of_volume_json_are_refused_in_one_line(out: Path) -> None:
    sidecar = json.loads((folders(out)[0] / "volume.json").read_text())
    placement = {"along": [0, 1, 2, 3, 4, 5], "shift": None, "matrix": [16, 16]}
    sheared = np.array(sidecar["affine_lps"])
    sheared[0, 1] = 1
    damages: list[dict[str, Any]] = [
        {"shape": [6, 32]},
        {"shape": [6, 32, 0]},
        {"shape": None},
        {"affine_lps": np.zeros((4, 4)).tolist()},
        {"affine_lps": sheared.tolist()},
        {"affine_lps": [["a"] * 4] * 4},
        {"source": None},
        {"source": sidecar["source"] | {"placement": placement | {"along": [0, 2, 1, 3, 4, 5]}}},
        {"source": sidecar["source"] | {"placement": placement | {"along": []}}},
        {"source": sidecar["source"] | {"placement": placement | {"along": [float("nan")] * 6}}},
        {"source": sidecar["source"] | {"placement": placement | {"shift": [[0, 0]]}}},
        {"source": sidecar["source"] | {"placement": placement | {"matrix": [10**6, 10**6]}}},
        {"source": sidecar["source"] | {"placement": placement | {"matrix": [0, 16]}}},
        {"source": sidecar["source"] | {"shape": [2**31, 1, 1]}},
        {"source": sidecar["source"] | {"placement": {}}},
        {"source": sidecar["source"] | {"placement": 7}},
        {"labels": [{"name": "heart"}]},
        {"schema": "1"},
        {"schema": 2},
    ]
    for damage in damages:
        with pytest.raises(OutputError) as caught:
            package.restore(labels(0)[1], sidecar | damage)
        assert "\n" not in str(caught.value), damage
    with pytest.raises(PredictionError, match="is no array"):
        package.restore([[1, 2], [3]], sidecar)
    for key in ("shape", "affine_lps", "source", "key", "series_uid"):
        with pytest.raises(OutputError, match=f"not as it was written.*{key}"):
            package.restore(labels(0)[1], {k: v for k, v in sidecar.items() if k != key})


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "output"),
    [
        ("ct/a b/1.2.840.nii.gz", "ct/a b/1.2.840"),
        ("ct/a b/1.2.840/labels", "ct/a b/1.2.840"),
        ("ct/a b/1.2.840/heart.nii.gz", "ct/a b/1.2.840"),
        ("ct_a_b_1.2.840.nii.gz", "ct/a b/1.2.840"),
        ("ct_a_b_1.2.840_0000.npz", "ct/a b/1.2.840"),
        ("fold_0/validation/ct_a_b_1.2.840.nii.gz", "ct/a b/1.2.840"),
        ("1.2.840.NII.GZ", "ct/a b/1.2.840"),
        ("1.2.840_0000.tif", "ct/a b/1.2.840"),
        ("1.2.840/pred.npy", "ct/a b/1.2.840"),
        ("ct/x/chest.npy", "ct/x/chest"),
        ("ct_y_chest.npy", "ct/y/chest"),
        ("ct/y_0001.ome.zarr", "ct/y_0001"),
    ],
)
def test_predictions_are_matched_by_path_by_case_name_and_by_last_part(prediction: str, output: str) -> None:
    names = OutputNames(["ct/a b/1.2.840", "ct/x/chest", "ct/y/chest", "ct/y_0001"])
    assert names.output_of(prediction) == output


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ("chest.npy", "2 outputs have the name chest: ct/x/chest, ct/y/chest"),
        ("other.npy", "no output has the name other"),
        ("ct_x_chest_0001.npy", "no output has the name ct_x_chest_0001"),
        ("ct.npy", "no output has the name ct"),
    ],
)
def test_predictions_without_exactly_one_output_are_named(prediction: str, message: str) -> None:
    with pytest.raises(package.errors.PredictionError, match=message):
        OutputNames(["ct/x/chest", "ct/y/chest"]).output_of(prediction)


def test_predictions_are_found_among_other_files(tmp_path: Path) -> None:
    for name in (
        "a.nii.gz", "b.NII", "c/d.npz", "c/e.tif", "slices/0000.tif", "slices/0001.tif", "v.ome.zarr/0/c/0/0/0",
        "v.ome.zarr/zarr.json", "top.npy", "plans.json", "a.pkl", "0001.tif", ".part-x.npy", "finished/volume.json",
        "finished/0000.tif", "finished/labels/0000.tif",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(find_predictions(tmp_path)) == [
        "0001.tif", "a.nii.gz", "b.NII", "c/d.npz", "c/e.tif", "slices", "top.npy", "v.ome.zarr",
    ]  # fmt: skip


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "scratch" / "fold_0").mkdir(parents=True)
    (tmp_path / "scratch" / "fold_0" / "a.nii.gz").touch()
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "fold_0").symlink_to(tmp_path / "scratch" / "fold_0")
    (tmp_path / "scratch" / "fold_0" / "up").symlink_to(tmp_path / "predictions")
    assert list(find_predictions(tmp_path / "predictions")) == ["fold_0/a.nii.gz"]


# Ends of runs ---------------------------------------------------------------------------------------------------------

SLOW_WRITER = """
import os, time
from gpuprep.output import write_restored
fast = write_restored.RESTORED_FORMATS["npy"].write
def slow(restored, file):
    with write_restored.replacing_path(file) as part:
        part.write_bytes(b"half")
        while not os.path.exists(os.environ["GO"]):
            time.sleep(0.01)
    return fast(restored, file)
write_restored.RESTORED_FORMATS["npy"] = write_restored.RestoredFormat((".npy",), slow)
"""
"""Writer that writes half a file, and the rest when a file exists."""


class SlowRun:
    """A run in another process that waits in the middle of the first result."""

    def __init__(self, tmp_path: Path, out: Path) -> None:
        self.res, self.go = tmp_path / "res", tmp_path / "go"
        self.truth = write_predictions(tmp_path / "preds", out)
        self.words = ["-m", "gpuprep", "restore", str(tmp_path / "preds"), "--to", str(out), "--out", str(self.res)]
        self.words += ["--as", "npy", "--jobs", "1"]
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(SLOW_WRITER)
        paths = [str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"GO": str(self.go), "PYTHONPATH": os.pathsep.join(paths)}
        self.running = Running(self.words, env=environment)

    def begin(self) -> None:
        assert self.running.wait_until(lambda: any(self.res.rglob(".part-*")))
        assert self.names() == []

    def names(self) -> list[str]:
        return sorted(p.name for p in self.res.rglob("*.npy") if not p.name.startswith(".part-"))

    def check_next_run(self, counts: str) -> None:
        ended = python(*self.words)
        assert ended.returncode == 0, ended.stderr
        assert f"3 predictions: {counts};" in ended.stdout
        for name, native in zip(("ct_s000_0000.npy", "ct_s001.npy", "ct/s002.npy"), self.truth, strict=True):
            np.testing.assert_array_equal(np.load(self.res / name), native)
        assert not list(self.res.rglob(".part-*"))


def test_a_result_that_was_not_complete_never_counts(tmp_path: Path, out: Path) -> None:
    run = SlowRun(tmp_path, out)
    with run.running:
        run.begin()
        run.running.kill_all()
        run.running.end()
    assert run.names() == []
    run.check_next_run("3 restored")


def test_an_interrupted_run_finishes_the_result_in_flight_and_can_be_continued(tmp_path: Path, out: Path) -> None:
    run = SlowRun(tmp_path, out)
    with run.running:
        run.begin()
        run.running.signal(signal.SIGINT)
        time.sleep(0.3)  # it arrives before the result is complete
        run.go.touch()
        assert run.running.end() == 130
    assert "run the same command again to continue" in run.running.stderr
    done = len(run.names())
    assert 1 <= done < 3
    run.check_next_run(f"{3 - done} restored, {done} skipped")


def test_a_second_interrupt_ends_the_run_at_once(tmp_path: Path, out: Path) -> None:
    run = SlowRun(tmp_path, out)
    with run.running:
        run.begin()
        run.running.signal(signal.SIGINT)
        time.sleep(0.3)  # otherwise the system merges both
        run.running.signal(signal.SIGINT)
        assert run.running.end() == 130
    assert run.names() == []
    run.check_next_run("3 restored")


def test_a_run_that_was_killed_between_results_continues(tmp_path: Path, out: Path) -> None:
    write_predictions(tmp_path / "preds", out)
    words = (tmp_path / "preds", "--to", out, "--out", tmp_path / "res", "--as", "npy", "--json")
    assert json.loads(run(*words).stdout)["counts"] == {"restored": 3}
    record = tmp_path / "res" / "restored.csv"
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(lines[:2]) + lines[2][: len(lines[2]) // 2])  # the second row is torn
    assert json.loads(run(*words).stdout)["counts"] == {"skipped": 1, "restored": 2}
    assert len(restored(tmp_path / "res")) == 3


def test_help_loads_no_numpy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom gpuprep.cli.app import app\n"
        "CliRunner().invoke(app, ['restore', '--help'])\nprint('numpy' in sys.modules)"
    )
    assert python("-c", code).stdout == "False\n"


def test_an_absent_nibabel_is_named(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "p.npy", labels(0)[1])
    monkeypatch.setitem(sys.modules, "nibabel.nifti1", None)
    ended = run(tmp_path / "p.npy", "--to", folders(out)[0], "--out", tmp_path / "r.nii.gz")
    assert ended.returncode == 2
    assert "pip install 'gpuprep[nifti]'" in ended.stderr


def test_many_labels_are_written_as_uint16(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", np.zeros((3, 20, 30), np.int16), SPACING_MM)
    recipe = package.Recipe(spacing_mm=None, size=None, format="npy")
    package.convert(tmp_path / "ct", tmp_path / "out", recipe, backend="cpu")
    prediction = np.arange(1800).reshape(3, 20, 30)
    np.save(tmp_path / "p.npy", prediction)
    assert run(tmp_path / "p.npy", "--to", folders(tmp_path / "out")[0], "--out", tmp_path / "r.nii").returncode == 0
    found = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(tmp_path / "r.nii"))
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, prediction)
