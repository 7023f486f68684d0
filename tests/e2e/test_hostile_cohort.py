"""Of 100 series, a tenth is faulty in ten ways: the others are converted as if the faulty ones were absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLSLossless, generate_uid

from gpuprep.testing import write_series

SERIES = 100
SPACING_MM = (2.0, 0.9, 0.8)


def rewritten(change: Callable[[Dataset], None], which: slice) -> Callable[[list[Path]], None]:
    """Return a function that changes the data set of some files of a series."""

    def apply(files: list[Path]) -> None:
        for file in files[which]:
            ds = pydicom.dcmread(file)
            change(ds)
            ds.save_as(file)

    return apply


def lose(numbers: slice) -> Callable[[list[Path]], None]:
    def apply(files: list[Path]) -> None:
        for file in files[numbers]:
            file.unlink()

    return apply


def cut(files: list[Path]) -> None:
    files[4].write_bytes(files[4].read_bytes()[:-200])


def no_pixels(ds: Dataset) -> None:
    del ds.PixelData


def coloured(ds: Dataset) -> None:
    ds.PhotometricInterpretation = "PALETTE COLOR"


def other_type(ds: Dataset) -> None:
    ds.RescaleType = "US"


def no_rescale(ds: Dataset) -> None:
    del ds.RescaleSlope


def zeros(ds: Dataset) -> None:
    ds.PixelData = bytes(len(ds.PixelData))


def another_image(files: list[Path]) -> None:
    ds = pydicom.dcmread(files[5])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.PixelData = ds.PixelData[::-1]
    ds.save_as(files[5].with_name("again.dcm"))


def damaged_stream(ds: Dataset) -> None:
    stream = bytes(imagecodecs.jpegls_encode(ds.pixel_array.view(np.uint16)))
    ds.PixelData = encapsulate([stream[:300] + stream[340:]])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEGLSLossless


WAYS: dict[str, tuple[str, Callable[[list[Path]], None]]] = {
    # code in the manifest: part of its reason, damage to the files
    "gap": ("4 missing in 10.000 mm", lose(slice(4, 8))),
    "one-slice": ("one slice only", lose(slice(1, None))),
    "truncated": ("it is truncated", cut),
    "missing-tag": ("Pixel Data absent", rewritten(no_pixels, slice(3, 4))),
    "photometric": ("Photometric Interpretation not MONOCHROME2", rewritten(coloured, slice(None))),
    "rescale-type": ("Rescale Type not HU", rewritten(other_type, slice(None))),
    "rescale": ("Rescale Slope absent", rewritten(no_rescale, slice(2, 3))),
    "blank": ("holds one value (0, -1024 HU) throughout", rewritten(zeros, slice(6, 7))),
    "duplicate": ("differ in their pixels", another_image),
    "pixels": ("JPEG-LS Lossless Image Compression) cannot be decoded", rewritten(damaged_stream, slice(7, 8))),
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the cohort; the names of folders with faulty series contain the code."""
    folder = tmp_path_factory.mktemp("cohort") / "dicom"
    ways = list(WAYS)
    for n in range(SERIES):
        stored = np.random.default_rng(n).integers(0, 2000, (12, 20, 24)).astype(np.int16)
        broken = ways[n // 10 % 10] if n % 10 == 7 else ""
        files = write_series(
            folder / f"patient-{n:03d}{broken and '-' + broken}", stored, SPACING_MM, series_uid=f"1.2.3.{n}"
        )
        if broken:
            WAYS[broken][1](files)
    return folder


def converted(folder: Path, out: Path) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "gpuprep", "convert", str(folder), "--out", str(out), "--json", "--jobs", "2"]
    small = ["--size", "16", "--spacing", "3", "--dtype", "int16", "--index", "none", "--backend", "cpu"]
    run = subprocess.run([*command, *small], check=False, capture_output=True, text=True)
    return run.returncode, json.loads(run.stdout), run.stderr


def test_exactly_the_intact_series_are_converted_and_do_not_depend_on_the_others(cohort: Path, tmp_path: Path) -> None:
    # Traps 4, 6, 34, 41, 42.
    code, report, said = converted(cohort, tmp_path / "all")
    assert code == 1
    assert "Traceback" not in said
    results = {Path(r["source"]).name: r for r in report["series"]}
    broken = {name: r for name, r in results.items() if name.count("-") > 1}
    assert (len(results), len(broken)) == (SERIES, SERIES // 10)
    for name, result in broken.items():
        way = name.split("-", 2)[2]
        assert (result["status"], result["codes"]) == ("rejected", [way]), result
        assert WAYS[way][0] in result["reason"]
        assert result["folder"] == ""
    assert {r["status"] for name, r in results.items() if name not in broken} == {"ok"}

    alone = tmp_path / "sound"
    # Links have the same modification time, which is part of the fingerprint in volume.json.
    shutil.copytree(cohort, alone / cohort.name, copy_function=os.link)
    for name in broken:
        shutil.rmtree(alone / cohort.name / name)
    code, report, _ = converted(alone / cohort.name, tmp_path / "without")
    assert (code, report["counts"]) == (0, {"ok": SERIES - len(broken)})
    outputs = [
        {
            f.relative_to(out): f.read_bytes()
            for f in out.rglob("*")
            if f.is_file() and f.parent != out and ".gpuprep" not in f.parts
        }
        for out in (tmp_path / "all", tmp_path / "without")
    ]
    assert len(outputs[0]) == 10 * (
        SERIES - len(broken)
    )  # 12 slices of 2 mm are 8 of 3 mm, preview.jpg and volume.json
    assert outputs[0] == outputs[1]
