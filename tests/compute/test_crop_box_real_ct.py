"""Boxes of body and lungs on real CT, compared with masks that SimpleITK computes at full resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray

import gpuprep
from gpuprep.compute.coarse_hu import coarse_hu
from gpuprep.compute.crop_box import FoundBox, find_box
from gpuprep.core.volume import StoredVolume

CHESTS = [("lidc-0001-jls", 0, 3), ("lungdx-a0002", 0, 1), ("4dlung-113-crop", 0, 2), ("dcmqi-seg", 4, 1)]
"""Folder, number of the series in it, and the step between slices that SimpleITK examines."""
LIMBS = [0, 1, 2, 3]


def stacked(data: Path, name: str, number: int, step: int = 1) -> tuple[StoredVolume, NDArray[np.float64]]:
    """Return a series, and the HU of every `step`-th slice."""
    volume = gpuprep.read(gpuprep.discover(data / name)[number])
    hu = volume.stored[::step] * volume.slope[::step, None, None] + volume.intercept[::step, None, None]
    return volume, np.where(hu < -1024, -1000, hu)


def box_of(volume: StoredVolume, kind: Any) -> FoundBox:
    return find_box(volume, coarse_hu(volume), kind)


def image_of(mask: NDArray[np.bool_]) -> Any:
    return SimpleITK.GetImageFromArray(mask.astype(np.uint8))


def opened(mask: NDArray[np.bool_], pixels: int) -> Any:
    """Return a mask without what is narrower than a disc, in the plane of the slices."""
    return SimpleITK.BinaryMorphologicalOpening(image_of(mask), [pixels, pixels, 0], SimpleITK.sitkBall)


def large_parts(image: Any, share: float) -> NDArray[np.bool_]:
    """Return the connected parts with at least a share of the voxels of the largest one."""
    labels = SimpleITK.GetArrayFromImage(SimpleITK.ConnectedComponent(image))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    large: NDArray[np.bool_] = (sizes >= share * sizes.max())[labels]
    return large


def excess(result: FoundBox, mask: NDArray[np.bool_], step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return by how many voxels a box is larger than a mask of every `step`-th slice, at the start and end of axes."""
    assert result.box is not None, result.warnings
    inside = np.argwhere(mask) * (step, 1, 1)
    return inside.min(axis=0) - result.box.start, np.array(result.box.stop) - 1 - inside.max(axis=0)


@pytest.mark.parametrize(("name", "number", "step"), CHESTS)
def test_boxes_of_chests_hold_skin_and_lungs_and_little_more(data: Path, name: str, number: int, step: int) -> None:
    volume, hu = stacked(data, name, number, step)
    body = large_parts(opened(hu > -500, 7), 1)
    low, high = excess(box_of(volume, "body"), body, step)
    assert min(*low, *high) >= 0
    assert max(*low[1:], *high[1:]) <= 4
    assert max(low[0], high[0]) < step

    filled = np.stack([SimpleITK.GetArrayFromImage(SimpleITK.BinaryFillhole(image_of(s))) > 0 for s in body])
    smooth = SimpleITK.GetArrayFromImage(SimpleITK.Median(SimpleITK.GetImageFromArray(hu), [2, 2, 0]))
    lungs = large_parts(opened(filled & (smooth < -500) & (smooth > -950), 3), 0.02)
    low, high = excess(box_of(volume, "lungs"), lungs, step)
    assert min(*low, *high) >= 0
    assert max(*low[1:], *high[1:]) <= 4
    assert max(low[0], high[0]) < step + 2  # the disc leaves out tips


@pytest.mark.parametrize("number", LIMBS)
def test_limbs_have_a_body_without_the_table_and_no_lungs(data: Path, number: int) -> None:
    volume, hu = stacked(data, "ibsi-sts-4", number)
    low, high = excess(box_of(volume, "body"), large_parts(opened(hu > -500, 4), 1), 1)
    assert min(*low, *high) >= 0
    assert max(*low, *high) <= 4
    result = box_of(volume, "lungs")
    assert result.box is None
    assert [w.code for w in result.warnings] == ["crop-not-found"]


def test_slices_of_air_have_no_body(data: Path) -> None:
    volume, hu = stacked(data, "d2n-failing", 0)
    assert hu.max() < -700
    result = box_of(volume, "body")
    assert result.box is None
    assert [w.code for w in result.warnings] == ["crop-not-found"]
