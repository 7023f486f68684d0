"""Conversion of real CT, compared with values measured by pydicom and with common notebook code."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
from conftest import made_once

import gpuprep
from bench.compare import classic
from gpuprep.compute.backend import Engine, NumpyBackend
from gpuprep.compute.process import host_chunks
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe

CHESTS = ("lidc-0001-jls", "lungdx-a0002", "4dlung-113-crop")
SOME_SLICES = 5
ENGINES: tuple[Engine, ...] = ("operators", "ndimage")


def catalogue(data: Path) -> dict[str, dict[str, Any]]:
    """Return the properties of the chest series by UID, measured with pydicom alone."""
    index = json.loads((data / "INDEX.json").read_text())
    datasets = [d for d in index["datasets"] if d["name"] in CHESTS]
    return {s["series_uid"]: s for d in datasets for s in d["series"] if s["modality"] == "CT"}


@pytest.fixture(scope="module")
def converted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert three real collections by the command line, to uint8 to save disk space."""

    def convert(out: Path) -> None:
        command = [sys.executable, "-m", "gpuprep", "convert", *(str(data / name) for name in CHESTS)]
        run = subprocess.run(
            [*command, "--out", str(out), "--backend", "cpu", "--dtype", "uint8", "--json"],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        report = json.loads(run.stdout)
        assert report["counts"] == {"ok": 4}
        assert report["passed_over"] == {"LIDC-IDRI XML": 1, "RT Structure Set Storage": 1, "not DICOM": 19}
        assert report["unreadable"] == []

    return made_once(tmp_path_factory, "real-ct", convert)


def test_four_series_have_the_expected_shapes(data: Path, converted: Path) -> None:
    facts = catalogue(data)
    sidecars = [json.loads(f.read_text()) for f in converted.rglob("volume.json")]
    assert {s["series_uid"] for s in sidecars} == set(facts)
    for sidecar in sidecars:
        fact = facts[sidecar["series_uid"]]
        slices = round(fact["n"] * fact["normal_gaps"][0][0])
        assert sidecar["shape"] == [slices, 512, 512]
        assert sidecar["spacing_mm"][0] == pytest.approx(fact["n"] * fact["normal_gaps"][0][0] / slices)


def test_hu_of_every_series_equal_the_catalogue(data: Path, converted: Path) -> None:
    with closing(sqlite3.connect(converted / "manifest.sqlite")) as db:
        rows = db.execute("SELECT series_uid, hu_min, hu_max, hu_mean FROM series WHERE status = 'ok'").fetchall()
    facts = catalogue(data)
    for uid, low, high, mean in rows:
        fact = facts.pop(uid)["pydicom_hu"]
        assert (low, high) == (fact["min"], fact["max"])
        assert mean == pytest.approx(fact["mean"], abs=1e-4)
    assert not facts


def test_every_slice_file_exists_and_is_readable(converted: Path) -> None:
    for sidecar in converted.rglob("volume.json"):
        count, rows, columns = json.loads(sidecar.read_text())["shape"]
        names = sorted(f.name for f in sidecar.parent.glob("*.tif"))
        assert names == [f"{k:04d}.tif" for k in range(count)]
        assert tifffile.imread(sidecar.parent / names[-1]).shape == (rows, columns)


@pytest.fixture(params=["lungdx-a0002", "4dlung-113-crop"])
def chest(data: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Folder with some slices from the middle of a chest: the notebook code takes half a minute for all slices."""
    series = gpuprep.discover(data / request.param)[0]
    files = sorted((s.path for s in series.slices), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    folder = tmp_path / "chest"
    folder.mkdir()
    for path in files[len(files) // 2 :][:SOME_SLICES]:
        shutil.copy(path, folder)
    return folder


def test_the_classic_recipe_equals_common_notebook_code(chest: Path, tmp_path: Path) -> None:
    classic.convert(str(chest), str(tmp_path / "classic"))
    run = gpuprep.convert(chest, tmp_path / "out", Recipe.preset("classic"), backend="cpu")
    ours = tmp_path / "out" / run.results[0].folder
    names = sorted(f.name for f in (tmp_path / "classic").iterdir())
    assert names == sorted(f.name for f in ours.glob("*.tif"))
    worst = max(
        float(np.abs(tifffile.imread(ours / n) - tifffile.imread(tmp_path / "classic" / n)).max()) for n in names
    )
    assert worst <= 1e-5


@pytest.mark.parametrize("preset", ["default", "classic"])
def test_engines_agree_before_windowing(chest: Path, preset: str) -> None:
    recipe = Recipe.from_dict({"base": preset, "window_hu": "none", "size": "none"})
    volume = gpuprep.read(gpuprep.discover(chest)[0])
    plan = make_plan(volume.geometry, recipe)
    first, second = (
        np.concatenate([chunk.copy() for chunk in host_chunks(volume, plan, NumpyBackend(), engine)])
        for engine in ENGINES
    )
    assert np.abs(first - second).max() <= 0.01
