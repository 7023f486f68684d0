"""Conversion of cohorts: faulty series never stop others, each series has a status, and no work is repeated."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
from numpy.typing import NDArray
from pydicom import Dataset, config
from pydicom.dataelem import RawDataElement
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import JPEG2000Lossless

from gpuprep.compute.backend import NumpyBackend, numba_works
from gpuprep.core.recipe import Recipe
from gpuprep.dicom.discover import Cohort
from gpuprep.dicom.headers import Contents, read_headers
from gpuprep.errors import BackendError, OutputError, RequestError
from gpuprep.output.folder_store import open_output
from gpuprep.output.records import SeriesResult
from gpuprep.pipeline.cohort import convert
from gpuprep.pipeline.estimate import Forecast
from gpuprep.pipeline.events import Listener, Run
from gpuprep.pipeline.scan import scan
from gpuprep.testing import write_series

SPACING = (2.5, 0.8, 0.7)
SMALL = Recipe(spacing_mm=(5.0, 2.0, 2.0), size=(6, 5), order=1)
AS_STORED = Recipe(spacing_mm=None, size=None, window_hu=None, padding="keep")
OWN_FILES = ("recipe.toml", "manifest.csv", "manifest.sqlite")


def pixels(slices: int = 6, seed: int = 0) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(0, 3000, (slices, 20, 24)).astype(np.int16)


def add(folder: Path, *, seed: int = 0, slices: int = 6, **options: Any) -> list[Path]:
    """Write a series of 20 × 24 pixels with a spacing of 2.5 × 0.8 × 0.7 mm."""
    return write_series(folder, pixels(slices, seed), SPACING, **options)


def go(paths: Any, out: Path, recipe: Recipe = SMALL, **options: Any) -> Run:
    return convert(paths, out, recipe, backend="cpu", **options)


def statuses(run: Run) -> dict[str, str]:
    """Return the status of each series by the name of its source folder."""
    return {os.path.basename(r.source): r.status for r in run.results}


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of the manifest by the name of the source folder, read with SQLite alone."""
    with closing(sqlite3.connect(out / "manifest.sqlite")) as db:
        db.row_factory = sqlite3.Row
        return {os.path.basename(row["source"]): dict(row) for row in db.execute("SELECT * FROM series")}


def csv_rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "manifest.csv").open(newline="", encoding="utf-8") as f:
        return {os.path.basename(row["source"]): row for row in csv.DictReader(f)}


def outputs(out: Path) -> dict[str, bytes]:
    """Return the content of every file of every series under OUT."""
    files = (p for p in out.rglob("*") if p.is_file() and ".gpuprep" not in p.parts and p.name not in OWN_FILES)
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def file_versions(out: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of every file of every series under OUT."""
    return {name: ((s := os.stat(out / name)).st_ino, s.st_mtime_ns) for name in outputs(out)}


def sidecar(out: Path, result: SeriesResult) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / result.folder / "volume.json").read_text())
    return loaded


def volume(out: Path, folder: str) -> NDArray[Any]:
    """Return the slices of an output, stacked in the order of their names."""
    return np.stack([tifffile.imread(f) for f in sorted((out / folder).glob("*.tif"))])


def truncate(file: Path, missing: int = 100) -> None:
    os.truncate(file, file.stat().st_size - missing)


def undecodable(ds: Dataset, _: int) -> None:
    """Set the transfer syntax to JPEG 2000 with an invalid stream."""
    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
    ds.PixelData = encapsulate([b"this is no code stream"])
    ds["PixelData"].is_undefined_length = True


class DeadlyBackend(NumpyBackend):
    """Backend that kills its process on series of 7 slices, like the kernel does when memory runs out."""

    def to_device(self, host: Any) -> Any:
        if host.shape == (7,):  # the rescale slopes, one per slice
            os.kill(os.getpid(), signal.SIGKILL)
        return host


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def dicom(tmp_path: Path) -> Path:
    """A cohort of two regular series."""
    add(tmp_path / "dicom" / "p1", seed=1)
    add(tmp_path / "dicom" / "p2", seed=2)
    return tmp_path / "dicom"


# --- faulty series among valid ones


def test_a_cohort_is_converted_and_recorded(dicom: Path, out: Path) -> None:
    run = go(dicom, out)
    assert statuses(run) == {"p1": "ok", "p2": "ok"}
    assert (run.counts, run.exit_code, run.postponed) == ({"ok": 2}, 0, 0)
    for name, row in rows(out).items():
        folder = out / row["folder"]
        assert folder == out / "dicom" / name
        # 6 slices of 2.5 mm, 20 rows of 0.8 mm, 24 columns of 0.7 mm at 5 × 2 × 2 mm, then 6 × 5.
        slices = ["0000.tif", "0001.tif", "0002.tif"]
        assert sorted(p.name for p in folder.iterdir()) == [*slices, "preview.jpg", "volume.json"]
        assert json.loads(row["shape"]) == [3, 6, 5]
        assert (row["status"], row["reason"], row["slices"], row["files"]) == ("ok", "", 6, 5)
        assert row["bytes"] == sum(p.stat().st_size for p in folder.iterdir())
        assert json.loads(row["source_shape"]) == [6, 20, 24]
        assert json.loads(row["source_spacing_mm"]) == pytest.approx(SPACING)
        stored = pixels(seed=int(name[1])).astype(float) - 1024
        assert (row["hu_min"], row["hu_max"]) == (stored.min(), stored.max())
        assert row["hu_mean"] == pytest.approx(stored.mean())
        assert (row["backend"], row["engine"], row["version"]) == ("cpu", "operators", "0.1.0")
    assert {k: r["status"] for k, r in csv_rows(out).items()} == {"p1": "ok", "p2": "ok"}
    assert Recipe.load(out / "recipe.toml") == SMALL


def test_bad_series_never_stop_the_others(
    dicom: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traps 4, 42.
    monkeypatch.setattr("gpuprep.executors.resources.get_backends", lambda *_: [DeadlyBackend()])
    # 1 of 8 is more than a tenth. The remaining 7 slices do not reach the backend, because the series is rejected.
    add(dicom / "gap", slices=8)[3].unlink()
    truncate(add(dicom / "short")[2])
    add(dicom / "garbled", change=undecodable)
    add(dicom / "deadly", slices=7)
    add(dicom / "single", slices=1)
    run = go(dicom, out, jobs=2)
    expected = {
        "p1": ("ok", ""),
        "p2": ("ok", ""),
        "gap": ("rejected", "GeometryError: slices are 2.500 mm apart (median), but not all: 1 missing in 5.000"),
        "short": ("rejected", "DecodeError: S1-0004.dcm ends after 860 of 960 bytes of pixels"),
        "garbled": ("rejected", "DecodeError: S1-0006.dcm (JPEG 2000 Image Compression (Lossless Only)) cannot be"),
        "deadly": ("failed", "WorkerDiedError: the worker was killed, most often for lack of memory"),
        "single": ("rejected", "GeometryError: one slice only (S1-0001.dcm)"),
    }
    results = {os.path.basename(r.source): (r.status, r.reason) for r in run.results}
    in_sqlite = {k: (r["status"], r["reason"]) for k, r in rows(out).items()}
    in_csv = {k: (r["status"], r["reason"]) for k, r in csv_rows(out).items()}
    assert results == in_sqlite == in_csv
    assert set(results) == set(expected)
    for name, (status, reason) in expected.items():
        assert results[name][0] == status, name
        assert results[name][1].startswith(reason), name
    assert run.exit_code == 1
    assert run.counts == {"ok": 2, "rejected": 4, "failed": 1}
    assert sorted(os.listdir(out / "dicom")) == ["p1", "p2"]
    # The outputs of the valid series equal those of a run without the others.
    alone = tmp_path / "alone"
    assert statuses(go([dicom / "p1", dicom / "p2"], alone)) == {"p1": "ok", "p2": "ok"}
    assert outputs(out) == {f"dicom/{name}": content for name, content in outputs(alone).items()}


def read_or_die(files: list[str]) -> list[Contents]:
    """Read headers, but kill the process at one file, like a crash of the interpreter."""
    if any(file.endswith("p2/S1-0003.dcm") for file in files):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_headers(files)


def test_a_file_whose_header_kills_the_reader_is_reported_as_unreadable(
    dicom: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trap 42. Both series are read in one task.
    monkeypatch.setattr("gpuprep.dicom.discover.read_headers", read_or_die)
    run = go(dicom, out, jobs=2)
    ((path, reason),) = run.unreadable
    assert path == str(dicom / "p2" / "S1-0003.dcm")
    assert reason.startswith("the worker was killed")
    assert statuses(run) == {"p1": "ok", "p2": "rejected"}  # 1 of 6 missing
    assert run.exit_code == 1


def test_a_corrected_series_is_recorded_as_fixed_and_skipped_in_later_runs(dicom: Path, out: Path) -> None:
    # Trap 4.
    add(dicom / "p3", slices=12)[5].unlink()
    run = go(dicom, out)
    assert statuses(run) == {"p1": "ok", "p2": "ok", "p3": "fixed"}
    assert run.exit_code == 0
    row = rows(out)["p3"]
    assert json.loads(row["codes"]) == ["gap"]
    (text,) = json.loads(row["irregularities"])
    assert "1 missing in 5.000 mm between S1-0008.dcm and S1-0006.dcm" in text
    assert json.loads(row["source_shape"]) == [12, 20, 24]
    assert row["slices"] == 11
    assert json.loads(row["audit"])["missing"] == 1
    assert statuses(go(dicom, out)) == {"p1": "skipped", "p2": "skipped", "p3": "skipped"}
    again = go(dicom, out, replace(SMALL, policy="strict"))
    assert statuses(again) == {"p1": "ok", "p2": "ok", "p3": "rejected"}


def undeclared(ds: Dataset, _: int) -> None:
    """Fill the corners outside the circular field of view with an undeclared value: 976 HU."""
    del ds.PixelPaddingValue
    stored = np.frombuffer(ds.PixelData, "<i2").reshape(20, 24).copy()
    y, x = np.ogrid[:20, :24]
    stored[(y - 9.5) ** 2 + (x - 11.5) ** 2 > 10**2] = 2000
    ds.PixelData = stored.tobytes()


def test_undeclared_padding_becomes_air_and_is_recorded(dicom: Path, out: Path) -> None:
    # Trap 26.
    add(dicom / "p3", change=undeclared)
    assert statuses(go(dicom, out)) == {"p1": "ok", "p2": "ok", "p3": "fixed"}
    row = rows(out)["p3"]
    assert json.loads(row["codes"]) == ["padding"]
    assert "6 slices have 976 HU all around the circle" in json.loads(row["irregularities"])[0]


def test_policy_strict_also_rejects_irregularities_found_in_pixels(dicom: Path, out: Path) -> None:
    add(dicom / "p3", change=undeclared)
    run = go(dicom, out, replace(SMALL, policy="strict"))
    assert statuses(run) == {"p1": "ok", "p2": "ok", "p3": "rejected"}


def test_a_rejected_series_is_tried_again_and_converted_when_repaired(dicom: Path, out: Path) -> None:
    file = add(dicom / "p3")[2]
    whole = file.read_bytes()
    truncate(file)
    assert statuses(go(dicom, out)) == {"p1": "ok", "p2": "ok", "p3": "rejected"}
    file.write_bytes(whole)
    assert statuses(go(dicom, out)) == {"p1": "skipped", "p2": "skipped", "p3": "ok"}
    assert rows(out)["p3"]["reason"] == ""


def test_a_bug_in_one_series_is_a_failure_of_that_series(
    dicom: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(dicom / "p3", slices=7)

    class BuggyBackend(NumpyBackend):
        def to_device(self, host: Any) -> Any:
            if host.shape == (7,):
                raise ZeroDivisionError("a bug")
            return host

    monkeypatch.setattr("gpuprep.executors.resources.get_backends", lambda *_: [BuggyBackend()])
    run = go(dicom, out)
    assert statuses(run) == {"p1": "ok", "p2": "ok", "p3": "failed"}
    assert rows(out)["p3"]["reason"] == "ZeroDivisionError: a bug"


def test_a_series_to_which_the_recipe_cannot_be_applied_is_rejected_without_others(dicom: Path, out: Path) -> None:
    add(dicom / "wide", slices=3)
    write_series(dicom / "large", np.zeros((3, 40, 24), np.int16), SPACING)
    run = go(dicom, out, Recipe(spacing_mm=None, size=(32, 32), fit="pad"))
    assert statuses(run) == {"p1": "ok", "p2": "ok", "wide": "ok", "large": "rejected"}
    assert rows(out)["large"]["reason"].startswith("PlanError: slices of 40 × 24 do not fit into 32 × 32")


def test_a_series_number_of_any_length_does_not_stop_the_others(dicom: Path, out: Path) -> None:
    # An integer string of a damaged file may exceed the 64 bits of SQLite.
    for file in add(dicom / "p3"):
        ds = pydicom.dcmread(file)
        tag = Tag("SeriesNumber")
        ds._dict[tag] = RawDataElement(tag, "IS", 20, b"99999999999999999999", 0, False, True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with config.disable_value_validation():
                ds.save_as(file)
    run = go(dicom, out)
    assert statuses(run) | {"p3": ""} == {"p1": "ok", "p2": "ok", "p3": ""}


def test_an_unwritable_output_folder_fails_only_its_series(dicom: Path, out: Path) -> None:
    (out / "dicom").mkdir(parents=True)
    (out / "dicom" / "p1").write_text("mine")
    run = go(dicom, out)
    assert statuses(run) == {"p1": "failed", "p2": "ok"}
    assert rows(out)["p1"]["reason"].startswith("OutputError: ")
    assert (out / "dicom" / "p1").read_text() == "mine"


# --- repeated runs


def test_a_second_run_changes_no_file(dicom: Path, out: Path) -> None:
    first = go(dicom, out)
    before, record = file_versions(out), rows(out)
    second = go(dicom, out)
    assert file_versions(out) == before
    assert rows(out) == record
    assert statuses(second) == {"p1": "skipped", "p2": "skipped"}
    assert second.exit_code == 0
    by_key = {r.key: r for r in first.results}
    assert all(replace(r, status="ok") == by_key[r.key] for r in second.results)


def touch_an_input(dicom: Path, out: Path) -> None:  # noqa: ARG001
    file = next((dicom / "p1").iterdir())
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def rewrite_an_input(dicom: Path, out: Path) -> None:  # noqa: ARG001
    file = sorted((dicom / "p1").iterdir())[0]
    ds = pydicom.dcmread(file)
    ds.PixelData = ds.PixelData[2:] + ds.PixelData[:2]
    ds.save_as(file)


def delete_a_slice(dicom: Path, out: Path) -> None:  # noqa: ARG001
    (out / "dicom" / "p1" / "0001.tif").unlink()


def truncate_a_slice(dicom: Path, out: Path) -> None:  # noqa: ARG001
    truncate(out / "dicom" / "p1" / "0001.tif", 1)


def delete_the_sidecar(dicom: Path, out: Path) -> None:  # noqa: ARG001
    (out / "dicom" / "p1" / "volume.json").unlink()


def delete_the_folder(dicom: Path, out: Path) -> None:  # noqa: ARG001
    shutil.rmtree(out / "dicom" / "p1")


def forget_the_series(dicom: Path, out: Path) -> None:  # noqa: ARG001
    with closing(sqlite3.connect(out / "manifest.sqlite", isolation_level=None)) as db:
        db.execute("DELETE FROM series WHERE source LIKE '%p1'")


@pytest.mark.parametrize(
    "change",
    [
        touch_an_input,
        rewrite_an_input,
        delete_a_slice,
        truncate_a_slice,
        delete_the_sidecar,
        delete_the_folder,
    ],
)
def test_only_changed_series_are_converted_again(dicom: Path, out: Path, change: Callable[[Path, Path], None]) -> None:
    # Trap 34.
    go(dicom, out)
    before, contents = file_versions(out), outputs(out)
    change(dicom, out)
    assert statuses(go(dicom, out)) == {"p1": "ok", "p2": "skipped"}
    after = file_versions(out)
    assert set(after) == set(before)
    assert all(after[f] == before[f] for f in before if f.startswith("dicom/p2/"))
    assert all(after[f] != before[f] for f in before if f.startswith("dicom/p1/"))
    same = {f: c for f, c in outputs(out).items() if f.endswith(".tif")} == {
        f: c for f, c in contents.items() if f.endswith(".tif")
    }
    assert same is (change is not rewrite_an_input)
    assert statuses(go(dicom, out)) == {"p1": "skipped", "p2": "skipped"}


@pytest.mark.parametrize("lost", ["a row", "the manifest"])
def test_a_volume_whose_record_is_lost_is_recognised_and_not_converted_again(dicom: Path, out: Path, lost: str) -> None:
    # Like after a kill between the writing of volume and row, or when a damaged manifest was moved away.
    go(dicom, out)
    before, known = file_versions(out), rows(out)["p1"]
    if lost == "a row":
        forget_the_series(dicom, out)
    else:
        (out / "manifest.sqlite").unlink()
    run = go(dicom, out)
    assert statuses(run) == {"p1": "ok", "p2": "skipped" if lost == "a row" else "ok"}
    assert file_versions(out) == before
    aside = {name: known[name] for name in ("finished", "read_s", "process_s", "write_s")}
    assert rows(out)["p1"] | aside == known
    assert statuses(go(dicom, out)) == {"p1": "skipped", "p2": "skipped"}


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_volume_without_record_that_is_damaged_in_one_bit_is_converted_again(dicom: Path, out: Path) -> None:
    go(dicom, out)
    before = outputs(out)
    forget_the_series(dicom, out)
    damage(out / "dicom" / "p1" / "0001.tif")
    assert statuses(go(dicom, out)) == {"p1": "ok", "p2": "skipped"}
    assert outputs(out) == before


def test_a_foreign_file_beside_an_output_changes_nothing(dicom: Path, out: Path) -> None:
    # Desktop programs create such files.
    go(dicom, out)
    (out / "dicom" / "p1" / ".DS_Store").write_bytes(b"\0" * 100)
    before = file_versions(out)
    assert statuses(go(dicom, out)) == {"p1": "skipped", "p2": "skipped"}
    assert file_versions(out) == before


def test_another_recipe_converts_everything_again(dicom: Path, out: Path) -> None:
    go(dicom, out)
    stack = replace(SMALL, format="tif-stack")
    assert statuses(go(dicom, out, stack)) == {"p1": "ok", "p2": "ok"}
    files = ("preview.jpg", "volume.json", "volume.tif")
    assert sorted(outputs(out)) == [f"dicom/{p}/{f}" for p in ("p1", "p2") for f in files]
    assert Recipe.load(out / "recipe.toml") == stack
    # A field that changes values but not sizes.
    assert statuses(go(dicom, out, replace(stack, window_hu=(-500.0, 500.0)))) == {"p1": "ok", "p2": "ok"}


def test_another_version_converts_everything_again(dicom: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(dicom, out)
    monkeypatch.setattr("gpuprep._version.__version__", "99")
    assert statuses(go(dicom, out)) == {"p1": "ok", "p2": "ok"}


def delete_an_input(dicom: Path) -> None:
    sorted((dicom / "p1").iterdir())[2].unlink()


def damage_an_input(dicom: Path) -> None:
    file = sorted((dicom / "p1").iterdir())[2]
    ds = pydicom.dcmread(file)
    undecodable(ds, 0)
    ds.save_as(file)


@pytest.mark.parametrize("damage", [delete_an_input, damage_an_input], ids=["found by the scan", "found by the reader"])
def test_a_series_that_becomes_rejected_keeps_its_former_output_and_gets_a_warning(
    dicom: Path, out: Path, damage: Callable[[Path], None]
) -> None:
    go(dicom, out)
    before = file_versions(out)
    damage(dicom)
    for _ in range(2):
        run = go(dicom, out)
        assert statuses(run) == {"p1": "rejected", "p2": "skipped"}
        assert run.exit_code == 1
        assert file_versions(out) == before
        row = rows(out)["p1"]
        assert (row["status"], row["folder"], row["files"], row["bytes"]) == ("rejected", "dicom/p1", 0, 0)
        assert json.loads(row["warnings"]) == ["the output of an earlier run is still in dicom/p1"]


def test_a_rejected_series_without_former_output_gets_no_warning_about_it(dicom: Path, out: Path) -> None:
    go(dicom, out)
    shutil.rmtree(out / "dicom" / "p1")
    delete_an_input(dicom)
    go(dicom, out)
    row = rows(out)["p1"]
    assert (row["status"], row["folder"], row["warnings"]) == ("rejected", "", "[]")


def test_a_repaired_series_replaces_its_former_output(dicom: Path, out: Path) -> None:
    go(dicom, out)
    file = sorted((dicom / "p1").iterdir())[2]
    whole = file.read_bytes()
    truncate(file)
    go(dicom, out)
    file.write_bytes(whole)
    assert statuses(go(dicom, out)) == {"p1": "ok", "p2": "skipped"}
    row = rows(out)["p1"]
    assert (row["status"], row["folder"], row["files"], row["warnings"]) == ("ok", "dicom/p1", 5, "[]")
    assert statuses(go(dicom, out)) == {"p1": "skipped", "p2": "skipped"}


def test_a_series_whose_input_is_absent_keeps_its_output_and_its_row(dicom: Path, out: Path) -> None:
    go(dicom, out)
    before = file_versions(out)
    shutil.rmtree(dicom / "p1")
    assert statuses(go(dicom, out)) == {"p2": "skipped"}
    assert file_versions(out) == before
    assert {k: r["status"] for k, r in rows(out).items()} == {"p1": "ok", "p2": "ok"}


def test_series_can_be_added_to_a_cohort_later(dicom: Path, out: Path) -> None:
    go(dicom, out)
    before = file_versions(out)
    add(dicom / "p3", seed=3)
    assert statuses(go(dicom, out)) == {"p1": "skipped", "p2": "skipped", "p3": "ok"}
    assert file_versions(out).items() > before.items()


def test_a_second_series_in_a_folder_does_not_move_finished_outputs(dicom: Path, out: Path) -> None:
    go(dicom, out)
    before = file_versions(out)
    add(dicom / "p1", seed=9, series_number=2)
    run = go(dicom, out)
    assert sorted(r.status for r in run.results) == ["ok", "skipped", "skipped"]
    assert file_versions(out).items() > before.items()
    # With another recipe the first series may move, and its former output is removed.
    run = go(dicom, out, replace(SMALL, order=0))
    assert run.counts == {"ok": 3}
    folders = {r.folder for r in run.results}
    assert len(folders) == 3
    assert {os.path.dirname(f) for f in outputs(out)} == folders
    assert go(dicom, out, replace(SMALL, order=0)).counts == {"skipped": 3}


@pytest.mark.parametrize("second", ["p1", "p1/below"])
def test_a_series_is_converted_after_the_other_series_of_its_folder_is_gone(
    dicom: Path, out: Path, second: str
) -> None:
    # Its folder would contain the other output.
    files = add(dicom / second, seed=9, series_number=2)
    assert go(dicom, out).counts == {"ok": 3}
    for file in files:
        file.unlink()
    run = go(dicom, out, replace(SMALL, order=0))
    assert [(r.status, r.reason) for r in run.results] == [("ok", "")] * 2


def test_a_series_above_the_output_of_an_absent_series_is_converted(dicom: Path, out: Path) -> None:
    files = add(dicom / "p3" / "below", seed=3)
    assert go(dicom, out).counts == {"ok": 3}
    for file in files:
        file.unlink()
    add(dicom / "p3", seed=4)
    run = go(dicom, out)
    assert [(r.status, r.reason) for r in run.results] == [("skipped", ""), ("skipped", ""), ("ok", "")]


def test_a_limit_postpones_the_rest(dicom: Path, out: Path) -> None:
    add(dicom / "p3", seed=3)
    seen = []
    for _ in range(4):
        run = go(dicom, out, limit=1)
        assert run.exit_code == 0
        seen.append((run.counts, run.postponed))
    assert seen == [({"ok": 1}, 2), ({"skipped": 1, "ok": 1}, 1), ({"skipped": 2, "ok": 1}, 0), ({"skipped": 3}, 0)]


def test_a_limit_counts_converted_series_but_not_rejected_ones(dicom: Path, out: Path) -> None:
    add(dicom / "a")[2].unlink()
    run = go(dicom, out, limit=1)
    assert (statuses(run), run.postponed) == ({"a": "rejected", "p1": "ok"}, 1)


# --- invalid requests


def test_a_run_without_series_has_exit_code_3(tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no DICOM")
    run = go(tmp_path / "empty", out)
    assert (list(run.results), run.exit_code, dict(run.passed_over)) == ([], 3, {"not DICOM": 1})
    assert csv_rows(out) == {}


def unreadable(file: Path) -> Path:
    """Write a DICOM file that is truncated in its first element."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00\xff")
    return file


@pytest.mark.parametrize("alone", [True, False])
def test_an_unreadable_file_is_named_and_gives_exit_code_1(dicom: Path, out: Path, alone: bool) -> None:
    if alone:
        shutil.rmtree(dicom)
    file = unreadable(dicom / "broken.dcm")
    run = go(dicom, out)
    assert run.counts == ({} if alone else {"ok": 2})
    assert run.exit_code == 1
    assert [path for path, _ in run.unreadable] == [str(file)]
    with closing(sqlite3.connect(out / "manifest.sqlite")) as db:
        assert db.execute("SELECT path, reason FROM unreadable").fetchall() == list(run.unreadable)
    file.unlink()
    if not alone:
        assert go(dicom, out).exit_code == 0


def test_a_path_that_does_not_exist_is_a_bad_request(dicom: Path, out: Path) -> None:
    with pytest.raises(RequestError, match=r"absent does not exist"):
        go([dicom, dicom / "absent"], out)
    assert outputs(out) == {}


@pytest.mark.parametrize("spelling", ["", ".", "../dicom"])
def test_output_equal_to_input_is_refused(dicom: Path, spelling: str) -> None:
    before = sorted(dicom.rglob("*"))
    with pytest.raises(RequestError, match=r"lies in the output folder .*: choose another --out"):
        go(dicom, dicom / spelling)
    assert sorted(dicom.rglob("*")) == before


def test_output_equal_to_input_by_a_link_is_refused(dicom: Path, out: Path) -> None:
    out.symlink_to(dicom)
    with pytest.raises(RequestError, match="lies in the output folder"):
        go(dicom, out)


def test_an_output_folder_inside_the_input_is_ignored_by_the_next_run(dicom: Path) -> None:
    out = dicom / "volumes"
    assert statuses(go(dicom, out)) == {"p1": "ok", "p2": "ok"}
    before = file_versions(out)
    run = go(dicom, out)
    assert statuses(run) == {"p1": "skipped", "p2": "skipped"}
    assert file_versions(out) == before
    assert dict(run.passed_over) == {}


def test_an_output_folder_that_contains_the_input_is_refused(tmp_path: Path) -> None:
    dicom = tmp_path / "dicom"
    for number in (1, 2):
        add(dicom / "p1", seed=number, series_number=number)
    before = sorted(dicom.rglob("*"))
    with pytest.raises(RequestError, match=rf"the input {dicom} lies in the output folder {tmp_path}"):
        go(dicom, tmp_path)
    assert sorted(dicom.rglob("*")) == before


@pytest.mark.parametrize(
    "options",
    [{"jobs": 0}, {"jobs": -1}, {"limit": -1}, {"limit": 0}, {"engine": "numba"}],
    ids=lambda options: str(options),
)
def test_an_invalid_option_is_a_bad_request(dicom: Path, out: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(RequestError, match=name):
        go(dicom, out, **options)
    assert not out.exists() or outputs(out) == {}


def test_an_unknown_backend_starts_nothing(dicom: Path, out: Path) -> None:
    with pytest.raises(BackendError, match="there is no backend 'tpu'"):
        convert(dicom, out, backend="tpu")
    assert not out.exists()


def test_an_output_in_use_is_refused_and_unchanged(dicom: Path, out: Path) -> None:
    with open_output(out), pytest.raises(RequestError, match="another gpuprep is writing into"):
        go(dicom, out)
    assert outputs(out) == {}
    assert go(dicom, out).exit_code == 0


def test_a_foreign_manifest_is_an_output_error_and_unchanged(dicom: Path, out: Path) -> None:
    out.mkdir()
    (out / "manifest.sqlite").write_text("mine" * 1000)
    with pytest.raises(OutputError, match="cannot be used as manifest"):
        go(dicom, out)
    assert (out / "manifest.sqlite").read_text() == "mine" * 1000
    assert outputs(out) == {}


def test_a_manifest_that_breaks_during_the_run_is_an_output_error(dicom: Path, out: Path) -> None:
    # Like on a full disk; the test drops a table instead.
    class Saboteur(Listener):
        def scanned(self, cohort: Cohort) -> None:  # noqa: ARG002
            with closing(sqlite3.connect(out / "manifest.sqlite", isolation_level=None)) as db:
                db.execute("DROP TABLE series")

    with pytest.raises(OutputError, match=r"cannot write .*: no such table"):
        go(dicom, out, listener=Saboteur())


@pytest.mark.parametrize("name", ["recipe.toml", "manifest.csv"])
def test_a_record_that_cannot_be_written_is_an_output_error(dicom: Path, out: Path, name: str) -> None:
    # A full disk raises OSError too; the test puts a folder at the path instead.
    (out / name).mkdir(parents=True)
    with pytest.raises((OutputError, RequestError), match=name):
        go(dicom, out)


# --- options and interfaces of a run


@pytest.mark.parametrize("recipe", [SMALL, replace(SMALL, format="tif-stack", dtype="uint16", compression="zlib")])
def test_serial_and_parallel_runs_give_the_same_bytes(tmp_path: Path, recipe: Recipe) -> None:
    for n in range(4):
        add(tmp_path / "dicom" / f"p{n}", seed=n, slices=5 + n)
    assert go(tmp_path / "dicom", tmp_path / "serial", recipe).counts == {"ok": 4}
    assert go(tmp_path / "dicom", tmp_path / "parallel", recipe, jobs=2).counts == {"ok": 4}
    serial = outputs(tmp_path / "serial")
    assert len([f for f in serial if f.endswith(".tif")]) >= 4
    assert outputs(tmp_path / "parallel") == serial


def test_a_run_leaves_no_worker_running(dicom: Path, out: Path) -> None:
    go(dicom, out, jobs=2)
    assert multiprocessing.active_children() == []


def test_inputs_may_be_one_path_or_several_folders_or_files(dicom: Path, out: Path, tmp_path: Path) -> None:
    assert go(str(dicom), out).counts == {"ok": 2}
    assert go((p for p in [dicom / "p1", str(dicom / "p2")]), tmp_path / "many").counts == {"ok": 2}
    files = sorted((dicom / "p1").iterdir())
    assert go(files, tmp_path / "files").counts == {"ok": 1}
    assert go([], tmp_path / "none").exit_code == 3


def test_a_relative_output_is_relative_to_the_folder_where_the_run_started(
    dicom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = go("dicom", Path("out"))
    assert run.counts == {"ok": 2}
    assert (tmp_path / "out" / "dicom" / "p1" / "volume.json").is_file()
    assert all(os.path.isabs(r.source) for r in run.results)
    monkeypatch.chdir("/")
    assert go(dicom, tmp_path / "out").counts == {"skipped": 2}


class Recorder(Listener):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def scanned(self, cohort: Cohort) -> None:
        self.events.append(("scanned", len(cohort)))

    def planned(self, forecast: Forecast) -> None:
        self.events.append(("planned", forecast.series, forecast.skipped, forecast.rejected))

    def finished(self, result: SeriesResult) -> None:
        self.events.append(result)

    def ended(self, run: Run) -> None:
        self.events.append(run)


def test_the_listener_gets_every_event_once_and_in_order(dicom: Path, out: Path) -> None:
    add(dicom / "bad", seed=3)[1].unlink()
    go(dicom, out, limit=1)
    recorder = Recorder()
    run = go(dicom, out, listener=recorder)
    assert recorder.events[:2] == [
        ("scanned", 3),
        ("planned", 3, 1, 1),
    ]
    assert recorder.events[2:] == [*run.results, run]
    assert statuses(run) == {"bad": "rejected", "p1": "skipped", "p2": "ok"}


def test_the_listener_gets_a_result_after_it_is_on_disk(dicom: Path, out: Path) -> None:
    # So the listener can open the volume, and a kill at that moment loses nothing.
    class Checker(Listener):
        def finished(self, result: SeriesResult) -> None:
            assert (out / result.folder / "volume.json").is_file()
            assert rows(out)[os.path.basename(result.source)]["status"] == "ok"

    assert go(dicom, out, listener=Checker()).counts == {"ok": 2}


def test_an_interruption_between_two_series_keeps_the_first_and_its_record(dicom: Path, out: Path) -> None:
    class Impatient(Listener):
        def finished(self, result: SeriesResult) -> None:  # noqa: ARG002
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(dicom, out, listener=Impatient())
    assert {k: r["status"] for k, r in csv_rows(out).items()} == {"p1": "ok"}
    assert {os.path.dirname(f) for f in outputs(out)} >= {"dicom/p1"}  # the other may have been moved into place too
    assert statuses(go(dicom, out)) == {"p1": "skipped", "p2": "ok"}


# --- scan


def test_scan_predicts_the_actions_of_convert(dicom: Path, out: Path) -> None:
    add(dicom / "bad", seed=3)[1].unlink()
    go(dicom, out, limit=1)
    found = scan(dicom, SMALL, out=out)
    cohort, planned = found.cohort, found.planned
    assert len(cohort) == 3
    actions = {os.path.basename(o.series.folder): (o.action, o.folder) for o in planned}
    assert actions == {"bad": ("reject", ""), "p1": ("skip", "dicom/p1"), "p2": ("convert", "dicom/p2")}
    plans = {os.path.basename(o.series.folder): o.plan for o in planned}
    assert plans["p2"] is not None
    assert plans["p2"].target.shape == (3, 6, 5)
    assert plans["p2"].output_bytes == 3 * 6 * 5 * 4
    reason = next(o.reason for o in planned if o.action == "reject")
    go(dicom, out)
    assert rows(out)["bad"]["reason"] == reason


def test_scan_writes_nothing(dicom: Path, out: Path) -> None:
    scan(dicom, SMALL)
    scan(dicom, SMALL, out=out)
    assert not out.exists()
    go(dicom, out)
    everything = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(out.rglob("*")) if p.is_file()}
    scan(dicom, SMALL, out=out)
    scan(dicom, replace(SMALL, order=0), out=out)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(out.rglob("*")) if p.is_file()} == everything


# --- output folders


def test_no_two_series_share_an_output_folder(tmp_path: Path, out: Path) -> None:
    # Trap 33: two sites, each with a patient 0042; two series in one folder; all have series number 1.
    seeds = {}
    for seed, name in enumerate(["site-a/0042", "site-b/0042", "site-b/0042", "site-b/42", "site-b"]):
        for file in add(tmp_path / name, seed=seed, series_uid=f"1.2.{seed}"):
            file.rename(file.with_name(f"{seed}-{file.name}"))  # the next series has files with the same names
        seeds[f"1.2.{seed}"] = seed
    run = go([tmp_path / "site-a", tmp_path / "site-b"], out, AS_STORED)
    assert run.counts == {"ok": 5}
    folders = [r.folder for r in run.results]
    assert len(set(folders)) == 5
    assert not any(f != g and f.startswith(f"{g}/") for f in folders for g in folders)
    assert {f for f in folders if "series-" not in f} == {"site-a/0042", "site-b/42"}
    for result in run.results:
        assert sidecar(out, result)["series_uid"] == result.series_uid
        np.testing.assert_array_equal(
            volume(out, result.folder), pixels(seed=seeds[result.series_uid]).astype(np.float32) - 1024
        )


# --- volume.json


def test_volume_json_maps_voxels_to_the_patient(small_series: Path, out: Path) -> None:
    # 6 slices of 20 × 24 at 2.5 × 0.8 × 0.7 mm, first voxel at (−100, −120, −300). At 1 mm: 15 × 16 × 17 voxels.
    # The extent is kept, so the column spacing is 16.8/17 mm, and the origin moves by half the change in spacing.
    run = go(small_series, out, Recipe(size=None))
    found = sidecar(out, run.results[0])
    across = 16.8 / 17
    assert found["shape"] == [15, 16, 17]
    # Trap 17: the actual spacing, not the requested one.
    assert found["spacing_mm"] == pytest.approx([1.0, 1.0, across])
    assert np.array(found["affine_lps"]) == pytest.approx(
        np.array(
            [
                [0, 0, across, -100 - 0.35 + across / 2],
                [0, 1, 0, -120 - 0.4 + 0.5],
                [1, 0, 0, -300 - 1.25 + 0.5],
                [0, 0, 0, 1],
            ]
        )
    )
    assert found["source"]["shape"] == [6, 20, 24]
    assert found["source"]["spacing_mm"] == pytest.approx([2.5, 0.8, 0.7])
    assert np.array(found["source"]["affine_lps"]) == pytest.approx(
        np.array([[0, 0, 0.7, -100], [0, 0.8, 0, -120], [2.5, 0, 0, -300], [0, 0, 0, 1]])
    )


def test_the_spacing_in_volume_json_includes_the_resize(small_series: Path, out: Path) -> None:
    # Trap 17. 8 rows cover 16 mm, 34 columns 16.8 mm.
    found = sidecar(out, go(small_series, out, Recipe(size=(8, 34))).results[0])
    assert found["shape"] == [15, 8, 34]
    assert found["spacing_mm"] == pytest.approx([1.0, 2.0, 16.8 / 34])
    assert [row[3] for row in found["affine_lps"][:3]] == pytest.approx(
        [-100 - 0.35 + 8.4 / 34, -120 - 0.4 + 1.0, -300 - 1.25 + 0.5]
    )


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
@pytest.mark.parametrize(
    "orientation",
    [(1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1), (-1, 0, 0, 0, -1, 0), (0.8, 0.6, 0, -0.6, 0.8, 0)],
    ids=["axial", "coronal", "sagittal", "prone", "turned"],
)
def test_a_blob_keeps_its_position_in_the_patient(
    tmp_path: Path, out: Path, orientation: tuple[float, ...], fit: Any
) -> None:
    # Traps 15, 35: whole conversions, with a different spacing along each axis.
    spacing, centre, origin = (3.0, 1.5, 1.2), np.array([5.2, 11.7, 13.4]), np.array([-40.0, 30.0, 7.0])
    shape = (12, 24, 30)
    k, j, i = np.indices(shape)
    squared = sum(((axis - c) * s) ** 2 for axis, c, s in zip((k, j, i), centre, spacing, strict=True))
    stored = np.round(1024 + 1000 * np.exp(-squared / (2 * 4.0**2))).astype(np.int16)
    write_series(tmp_path / "dicom", stored, spacing, orientation=orientation, origin_mm=(-40.0, 30.0, 7.0))
    row, column = np.array(orientation[:3], dtype=float), np.array(orientation[3:], dtype=float)
    # By the standard, a step along a row leads to the next column. The slice direction is row × column.
    expected = (
        origin + np.cross(row, column) * spacing[0] * centre[0] + column * spacing[1] * centre[1]
        + row * spacing[2] * centre[2]
    )  # fmt: skip
    size = {"stretch": (40, 44), "pad": (52, 51), "crop": (31, 32)}[fit]
    recipe = Recipe(spacing_mm=(1.0, 1.0, 1.0), window_hu=None, size=size, fit=fit)
    run = go(tmp_path / "dicom", out, recipe)
    values = np.clip(volume(out, run.results[0].folder), 50, None) - 50  # so that air and tails have no weight
    affine = np.array(sidecar(out, run.results[0])["affine_lps"])
    weights = values / values.sum()
    index = [float((weights * axis).sum()) for axis in np.indices(values.shape)]
    assert affine[:3, :3] @ index + affine[:3, 3] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("dtype", "step"), [("float32", 1e-3), ("uint8", 1400 / 255), ("uint16", 0.0214), ("int16", 0)]
)
def test_slope_and_intercept_in_volume_json_restore_hu(small_series: Path, out: Path, dtype: Any, step: float) -> None:
    recipe = Recipe(spacing_mm=None, size=None, dtype=dtype, padding="keep")
    (result,) = go(small_series, out, recipe).results
    found = sidecar(out, result)
    stored = volume(out, result.folder)
    assert stored.dtype == dtype == found["dtype"]
    hu = stored.astype(float) * found["hu"]["slope"] + found["hu"]["intercept"]
    wanted = np.clip(np.random.default_rng(0).integers(0, 3000, (6, 20, 24)) - 1024.0, -1000, 400)
    assert np.abs(hu - wanted).max() <= step / 2 + 1e-3
    assert found["hu"]["window"] == [-1000, 400]


def test_volume_json_records_source_recipe_and_versions(small_series: Path, out: Path) -> None:
    (result,) = go(small_series, out).results
    found = sidecar(out, result)
    header = pydicom.dcmread(next(small_series.rglob("*.dcm")))
    assert found["series_uid"] == found["key"] == header.SeriesInstanceUID
    assert found["study_uid"] == header.StudyInstanceUID
    assert found["frame_of_reference_uid"] == header.FrameOfReferenceUID
    assert Recipe.from_dict(found["recipe"]) == SMALL
    assert found["recipe_sha256"] == SMALL.sha256
    assert found["axes"].startswith("kji")
    assert (found["engine"], found["backend"], found["warnings"]) == ("operators", "cpu", [])
    assert found["source"]["slices"] == 6
    assert found["source"]["transfer_syntaxes"] == ["Explicit VR Little Endian"]
    hu = np.random.default_rng(0).integers(0, 3000, (6, 20, 24)) - 1024.0
    assert (found["source"]["hu_min"], found["source"]["hu_max"]) == (hu.min(), hu.max())
    assert found["source"]["hu_mean"] == pytest.approx(hu.mean())
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["gpuprep"] == "0.1.0"


def test_a_doubtful_padding_value_is_a_warning_in_every_record(tmp_path: Path, out: Path) -> None:
    # Trap 26.
    def tissue(ds: Dataset, _: int) -> None:
        ds.PixelPaddingValue = 1064  # 40 HU

    add(tmp_path / "dicom", change=tissue)
    (result,) = go(tmp_path / "dicom", out).results
    (warning,) = result.warnings
    assert "Pixel Padding Value 1064 is 40 HU" in warning
    assert sidecar(out, result)["warnings"] == [warning]
    assert json.loads(rows(out)["dicom"]["warnings"]) == [warning]
    assert result.status == "ok"


def test_a_tiff_stack_has_slices_and_no_channels(small_series: Path, out: Path) -> None:
    # Trap 36.
    recipe = Recipe(spacing_mm=(2.0, 1.0, 1.0), size=(9, 7), format="tif-stack", dtype="uint8")
    (result,) = go(small_series, out, recipe).results
    with tifffile.TiffFile(out / result.folder / "volume.tif") as tiff:
        (series,) = tiff.series
        assert (series.axes, series.shape, str(series.dtype)) == ("ZYX", (8, 9, 7), "uint8")
        assert tiff.imagej_metadata is not None
        assert tiff.imagej_metadata["slices"] == 8
        assert "channels" not in tiff.imagej_metadata
        assert tiff.imagej_metadata["unit"] == "mm"
        assert tiff.imagej_metadata["spacing"] == pytest.approx(6 * 2.5 / 8)
        rows_per_mm = tiff.pages[0].tags["YResolution"].value  # type: ignore[union-attr]
        assert rows_per_mm[0] / rows_per_mm[1] == pytest.approx(9 / 16, rel=1e-5)


def test_tiff_slices_have_their_pixel_size(small_series: Path, out: Path) -> None:
    # Trap 36.
    (result,) = go(small_series, out, Recipe(size=(8, 34))).results
    with tifffile.TiffFile(out / result.folder / "0000.tif") as tiff:
        tags = tiff.pages[0].tags  # type: ignore[union-attr]
        assert tags["ResolutionUnit"].value == 3  # centimetre
        per_cm = {name: tags[name].value[0] / tags[name].value[1] for name in ("XResolution", "YResolution")}
        assert per_cm == pytest.approx({"XResolution": 340 / 16.8, "YResolution": 5.0}, rel=1e-5)
        description = json.loads(tiff.pages[0].description)  # type: ignore[union-attr]
    assert description["spacing_mm"] == pytest.approx([1.0, 2.0, 16.8 / 34])


def test_outputs_and_rows_are_removed_when_a_series_is_divided_differently(tmp_path: Path) -> None:
    # Trap 6: two acquisitions at the same positions, first rejected, then separated, then one of them removed.
    rng = np.random.default_rng(0)
    for number in (1, 2):

        def acquired(ds: Dataset, _: int, number: int = number) -> None:
            ds.AcquisitionNumber, ds.FrameOfReferenceUID = number, "1.9"

        stored = rng.integers(0, 2000, (4, 12, 14)).astype(np.int16)
        write_series(tmp_path / "in" / str(number), stored, (2.0, 1.0, 1.0), series_uid="1.2.3", change=acquired)
    out, small = tmp_path / "out", {"size": (8, 8), "spacing_mm": None}

    def converted(**changes: Any) -> tuple[dict[str, int], dict[str, str], set[Path]]:
        run = convert(tmp_path / "in", out, Recipe(**small, **changes), backend="cpu")  # type: ignore[arg-type]
        with closing(sqlite3.connect(out / "manifest.sqlite")) as db:
            rows = db.execute("SELECT key, folder FROM series").fetchall()
        return run.counts, dict(rows), {f.parent.relative_to(out) for f in out.rglob("volume.json")}

    counts, rows, folders = converted(policy="strict")
    assert (counts, set(rows), folders) == ({"rejected": 1}, {"1.2.3"}, set())
    counts, rows, folders = converted()
    assert (counts, set(rows)) == ({"fixed": 2}, {"1.2.3#1", "1.2.3#2"})
    assert folders == set(map(Path, rows.values()))
    shutil.rmtree(tmp_path / "in" / "2")
    counts, rows, folders = converted()
    assert (counts, set(rows)) == ({"ok": 1}, {"1.2.3"})
    assert folders == set(map(Path, rows.values()))


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Convert "in" to "first" in a process that finds no compiled loops; return the folder of both, and stderr."""
    top = tmp_path_factory.mktemp("first-run")
    for n in range(3):
        stored = np.random.default_rng(n).integers(0, 3000, (9 + n, 40, 37)).astype(np.int16)
        write_series(top / "in" / f"p{n}", stored, (2.5, 0.8, 0.7))
    how = ["--size", "48", "--dtype", "uint8", "--backend", "cpu"]
    run = subprocess.run(
        [sys.executable, "-m", "gpuprep", "convert", str(top / "in"), "--out", str(top / "first"), *how],
        env=os.environ | {"NUMBA_CACHE_DIR": str(top / "numba")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return top, run.stderr


def test_outputs_do_not_depend_on_workers_resumption_or_compilation(
    first_run: tuple[Path, str], tmp_path: Path
) -> None:
    # One worker or several, one run or two, loops compiled or loaded from the cache.
    top, _ = first_run
    recipe = Recipe(size=(48, 48), dtype="uint8")
    for out, jobs, limit in (("one", 1, None), ("two", 2, None), ("here", None, None), ("resumed", 2, 1)):
        if limit:
            assert convert(top / "in", tmp_path / out, recipe, backend="cpu", jobs=jobs, limit=limit).postponed == 2
        run = convert(top / "in", tmp_path / out, recipe, backend="cpu", jobs=jobs)
        assert set(run.counts) <= {"ok", "skipped"}

    def slices(out: Path) -> dict[str, bytes]:
        return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*.tif")}

    expected = slices(top / "first")
    assert len(expected) == round(9 * 2.5) + round(10 * 2.5) + round(11 * 2.5)
    for name in ("one", "two", "here", "resumed"):
        assert slices(tmp_path / name) == expected, name


def test_the_first_run_on_a_machine_reports_the_compilation(first_run: tuple[Path, str]) -> None:
    top, stderr = first_run
    assert "compiling the inner loops" in stderr
    assert list((top / "numba").rglob("*.nbc"))


@pytest.mark.skipif(not numba_works(), reason="Numba is not installed")
def test_cached_loops_are_loaded_without_what_numba_needs_to_compile(first_run: tuple[Path, str]) -> None:
    top, _ = first_run
    code = (
        "import sys, gpuprep.compute.numba_warmup, gpuprep.compute.numba_kernels as loops; "
        "print(loops.compiling.is_set(), {'numba.np.linalg', 'scipy.linalg'} & set(sys.modules))"
    )
    env = os.environ | {"NUMBA_CACHE_DIR": str(top / "numba")}
    loaded = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert loaded.stdout == "False set()\n"


def test_a_broken_numba_gives_a_reason_and_no_traceback(
    tmp_path: Path, small_series: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr("gpuprep.compute.numba_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "gpuprep.compute.numba_kernels", None)  # makes its import fail
    (result,) = convert(small_series, tmp_path / "out", backend="cpu").results
    assert result.status == "failed"
    assert "set NUMBA_DISABLE_JIT=1 to run without it" in result.reason
    assert not caplog.records


@pytest.mark.parametrize(("compression", "warnings_"), [("zstd", 1), ("zlib", 0), ("none", 0)])
def test_a_stack_that_imagej_cannot_open_gives_one_warning(
    tmp_path: Path, small_series: Path, caplog: pytest.LogCaptureFixture, compression: Any, warnings_: int
) -> None:
    recipe = Recipe(size=(16, 16), format="tif-stack", compression=compression)
    with caplog.at_level("WARNING", logger="gpuprep"):
        convert(small_series, tmp_path / "out", recipe, backend="cpu")
    assert [r.getMessage() for r in caplog.records] == [
        "ImageJ cannot open a TIFF compressed with zstd: use --compression zlib or none"
    ] * warnings_
