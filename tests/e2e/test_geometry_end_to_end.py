"""Voxels that encode their position must keep it through stacking, resampling, resizing and writing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from pydicom import Dataset

import gpuprep
from gpuprep.core.recipe import Recipe
from gpuprep.testing import write_series

ORIGIN = (-12.5, 33.25, -101.75)
OBLIQUE = (0.9541666, -0.2080757, 0.2151061, 0.2785886, 0.880128, -0.3843997)
ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "prone": (-1, 0, 0, 0, -1, 0),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": OBLIQUE,
}
GRIDS = {
    "thick": ((41, 57, 63), (2.5, 0.703125, 0.703125), Recipe(window_hu=None, size=(80, 76))),
    "not-square": ((37, 61, 45), (3.27, 0.9765625, 1.3), Recipe(window_hu=None, size=(33, 47))),
    "thin": ((53, 44, 59), (0.7, 1.9, 0.55), Recipe(window_hu=None, size=None)),
    "coarse": ((45, 51, 57), (1.25, 0.84, 0.84), Recipe(window_hu=None, size=(51, 90), spacing_mm=(2.0, 0.9, 1.1))),
    "crop": ((41, 57, 63), (2.5, 0.7, 0.7), Recipe(window_hu=None, size=(64, 40), fit="crop", order=1)),
    "resize-only": ((41, 57, 63), (2.5, 0.7, 0.8), Recipe(window_hu=None, size=(90, 70), spacing_mm=None)),
}
BORDER = 12
"""Distance from the border, in source voxels, within which the repeated border values affect a cubic spline."""


@pytest.mark.parametrize("orientation", ORIENTATIONS.values(), ids=ORIENTATIONS)
@pytest.mark.parametrize(("shape", "spacing", "recipe"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_voxel_of_a_file_contains_its_distance_in_mm(
    tmp_path: Path,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    recipe: Recipe,
    orientation: tuple[float, ...],
    axis: int,
) -> None:
    # Traps 13 to 15, 17, 35. HU is exactly the distance in mm from the first voxel along one axis of the stack: along
    # rows and columns the stored value is the index and the slope is the spacing; along slices, each slice has a
    # different intercept. The value of every output voxel must equal its position by the affine in volume.json.
    stored = np.zeros(shape, dtype=np.int16)
    if axis:
        stored += np.arange(shape[axis], dtype=np.int16).reshape((1, -1, 1) if axis == 1 else (1, 1, -1))

    def ramp(ds: Dataset, k: int) -> None:
        ds.RescaleSlope = f"{spacing[axis]:.10g}"
        ds.RescaleIntercept = f"{spacing[0] * k:.10g}" if axis == 0 else "0"
        del ds.PixelPaddingValue

    write_series(tmp_path / "dicom", stored, spacing, origin_mm=ORIGIN, orientation=orientation, change=ramp)
    run = gpuprep.convert(tmp_path / "dicom", tmp_path / "out", recipe, backend="cpu")
    assert run.counts == {"ok": 1}
    folder = tmp_path / "out" / run.results[0].folder
    sidecar = json.loads((folder / "volume.json").read_text())
    values = np.stack([tifffile.imread(f) for f in sorted(folder.glob("*.tif"))])
    assert list(values.shape) == sidecar["shape"]

    affine = np.array(sidecar["affine_lps"])
    indices = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij"), axis=-1)
    points = indices @ affine[:3, :3].T + affine[:3, 3]
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    directions = np.stack([np.cross(row, column), column, row], axis=1)
    directions = directions / np.linalg.norm(directions, axis=0)
    distances_mm = (points - np.array(ORIGIN)) @ directions
    voxels = distances_mm / np.array(spacing)
    inside = ((voxels > BORDER) & (voxels < np.array(shape) - 1 - BORDER)).all(axis=-1)
    assert inside.sum() > 1000
    assert np.abs(values - distances_mm[..., axis])[inside].max() < 1e-3


def test_the_example_of_the_usage_page_has_the_documented_shapes(tmp_path: Path) -> None:
    spacing = (3.0, 0.6816, 0.6816)
    write_series(tmp_path / "dicom", np.zeros((108, 512, 512), dtype=np.int16), spacing)
    series = gpuprep.discover(tmp_path / "dicom")[0]
    volume = gpuprep.process(gpuprep.read(series), Recipe(size=None, dtype="uint8"), backend="cpu")
    assert volume.shape == (324, 349, 349)
    assert volume.spacing_mm == pytest.approx((1.0, 512 * 0.6816 / 349, 512 * 0.6816 / 349))
    run = gpuprep.convert(tmp_path / "dicom", tmp_path / "out", Recipe(dtype="uint8"), backend="cpu")
    files = sorted((tmp_path / "out" / run.results[0].folder).glob("*.tif"))
    assert len(files) == 324
    assert tifffile.imread(files[0]).shape == (512, 512)
