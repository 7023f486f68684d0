"""dciodvfy and dcmqi, by which 3D Slicer reads DICOM SEG, accept ours, of synthetic and of real series.

dciodvfy: Debian's dicom3tools. dcmqi: of PyPI, on Linux with x86-64.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seg_points
import SimpleITK
from numpy.typing import NDArray
from pydicom import Dataset

import gpuprep
from gpuprep.core.series import SliceHeader
from gpuprep.masks.structure_codes import coded
from gpuprep.output.dicom_seg import Kind, SegOptions, write_seg
from gpuprep.testing import write_series

DCIODVFY = shutil.which("dciodvfy")
SEGIMAGE = shutil.which("segimage2itkimage", path=sysconfig.get_path("scripts")) or shutil.which("segimage2itkimage")
NAMES = {1: "lung_left", 2: "liver", 3: "my structure"}

needs_dciodvfy = pytest.mark.skipif(DCIODVFY is None, reason="no dciodvfy (Debian: apt-get install dicom3tools)")
needs_dcmqi = pytest.mark.skipif(SEGIMAGE is None, reason="no segimage2itkimage (pip install dcmqi)")

ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "coronal": (1, 0, 0, 0, 0, -1),
    "prone": (-1, 0, 0, 0, -1, 0),
    "feet first": (-1, 0, 0, 0, 1, 0),
    "oblique": (0.6, 0.8, 0, -0.64, 0.48, 0.6),
}
REAL = (
    *(f"ibsi-sts-4/dicom/{patient}" for patient in ("STS_002", "STS_008", "STS_019", "STS_042")),
    "dcmqi-seg/ct-3slice", "dcmqi-seg/24x38x3", "dcmqi-seg/23x38x3", "lidc-0001-jls/dicom", "lungdx-a0002",
    "4dlung-113-crop",
)  # fmt: skip


def boxes(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return labels of three structures in boxes that do not overlap, one of them in one slice."""
    slices, rows, columns = shape
    values = np.zeros(shape, np.uint8)
    values[: slices // 2 + 1, rows // 5 : rows // 2, columns // 6 : columns // 3] = 1
    values[slices // 3 :, rows // 2 :, columns // 2 : columns - 1] = 2
    values[slices // 2, 1, 2:4] = 3
    return values


def wrote(folder: Path, values: NDArray[np.uint8], headers: tuple[SliceHeader, ...], kind: Kind = "binary") -> Path:
    folder.mkdir(exist_ok=True)
    names = {label: name for label, name in NAMES.items() if (values == label).any()}
    write_seg(values, names, headers, {n: coded(n) for n in names.values()}, folder / "seg.dcm", SegOptions(kind=kind))
    return folder / "seg.dcm"


def errors(file: Path) -> set[str]:
    assert DCIODVFY is not None
    ran = subprocess.run([DCIODVFY, str(file)], capture_output=True, text=True, check=False)
    assert "Segmentation" in ran.stderr or "Segmentation" in ran.stdout or file.name != "seg.dcm"
    return {line for line in (ran.stdout + ran.stderr).splitlines() if "Error" in line}


def read_by_dcmqi(file: Path) -> seg_points.Points:
    """Return the positions of voxels as segimage2itkimage has them, by the label of the segment."""
    assert SEGIMAGE is not None
    out = file.with_name("itk")
    out.mkdir()
    words = [SEGIMAGE, "--inputDICOM", str(file), "--outputDirectory", str(out)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    printed = ran.stdout + ran.stderr
    assert ran.returncode == 0, printed
    assert not [line for line in printed.splitlines() if re.search("error|fail|^[WE]:", line, re.IGNORECASE)]
    meta = json.loads((out / "meta.json").read_text())
    segments = [segment for group in meta["segmentAttributes"] for segment in group]
    found: dict[str, list[NDArray[np.float64]]] = {}
    for volume in sorted(out.glob("*.nrrd")):
        image = SimpleITK.ReadImage(str(volume))
        array = SimpleITK.GetArrayFromImage(image)
        to_mm = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        for label in set(np.unique(array).tolist()) - {0}:
            (name,) = {s["SegmentLabel"] for s in segments if s["labelID"] == label}
            index = np.argwhere(array == label)[:, ::-1]
            found.setdefault(name, []).append(index @ to_mm.T + image.GetOrigin())
    return {name: seg_points.in_order(np.concatenate(points)) for name, points in found.items()}


def synthetic(folder: Path, **how: Any) -> tuple[list[Path], gpuprep.Stack]:
    stored = np.random.default_rng(0).integers(0, 2000, (12, 20, 24)).astype(np.int16)
    files = write_series(folder, stored, (3.0, 2.0, 1.5), **how)
    (series,) = gpuprep.discover(folder)
    return files, gpuprep.stack(series)


@needs_dcmqi
@pytest.mark.parametrize("kind", ["binary", "labelmap"])
@pytest.mark.parametrize("case", ORIENTATIONS)
def test_dcmqi_reads_every_voxel_at_its_place(tmp_path: Path, case: str, kind: Kind) -> None:
    files, stacked = synthetic(tmp_path / "ct", orientation=ORIENTATIONS[case])
    values = boxes((12, 20, 24))
    expected = seg_points.of_images(files, {name: values == label for label, name in NAMES.items()})
    seg_points.check_same(read_by_dcmqi(wrote(tmp_path / "seg", values, stacked.slices, kind)), expected, 1e-6)


@needs_dcmqi
def test_dcmqi_reads_a_series_with_a_lost_slice(tmp_path: Path) -> None:
    def change(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-100, -120, -300 + 3 * (k + (k > 5))]

    files, stacked = synthetic(tmp_path / "ct", change=change)
    values = boxes((12, 20, 24))
    expected = seg_points.of_images(files, {name: values == label for label, name in NAMES.items()})
    seg_points.check_same(read_by_dcmqi(wrote(tmp_path / "seg", values, stacked.slices)), expected, 1e-6)


@needs_dcmqi
@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_dcmqi_reads_a_segmentation_without_a_voxel(tmp_path: Path, kind: Kind) -> None:
    _, stacked = synthetic(tmp_path / "ct")
    codes = {name: coded(name) for name in NAMES.values()}
    write_seg(np.zeros((12, 20, 24), np.uint8), NAMES, stacked.slices, codes, tmp_path / "e.dcm", SegOptions(kind=kind))
    assert read_by_dcmqi(tmp_path / "e.dcm") == {}


@needs_dciodvfy
@pytest.mark.parametrize("case", ORIENTATIONS)
def test_dciodvfy_finds_no_error(tmp_path: Path, case: str) -> None:
    _, stacked = synthetic(tmp_path / "ct", orientation=ORIENTATIONS[case])
    assert errors(wrote(tmp_path / "seg", boxes((12, 20, 24)), stacked.slices)) == set()


def check(folder: Path, headers: tuple[SliceHeader, ...], matrix: tuple[int, int]) -> None:
    values = boxes((len(headers), *matrix))
    masks = {name: values == label for label, name in NAMES.items() if (values == label).any()}
    images = [(Path(header.path), header.frame) for header in headers]
    heights_mm = seg_points.heights_mm(images)
    assert heights_mm == sorted(heights_mm)
    file = wrote(folder, values, headers)
    expected = seg_points.of_images(images, masks)
    seg_points.check_same(seg_points.of_seg(file), expected, 1e-9)
    if SEGIMAGE is not None:
        seg_points.check_same(read_by_dcmqi(file), expected, 1e-4)  # it makes a volume of slices, whose distances vary
    if DCIODVFY is not None:
        assert errors(file) <= errors(images[0][0])


@pytest.mark.parametrize("where", REAL)
def test_segmentations_of_real_series(data: Path, tmp_path: Path, where: str) -> None:
    rules = gpuprep.Rules(assume_hu=True)
    found = gpuprep.discover(data / where, rules)
    assert len(found)
    for n, series in enumerate(found):
        stacked = gpuprep.stack(series, rules)
        check(tmp_path / str(n), stacked.slices, stacked.matrix)


def test_a_segmentation_of_a_single_real_slice(data: Path, tmp_path: Path) -> None:
    (series,) = gpuprep.discover(data / "highdicom-seg")
    check(tmp_path / "seg", series.slices, (series.rows, series.columns))
