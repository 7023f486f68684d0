"""Crops of volumes: a cropped volume equals the same part of the whole one, on every backend and engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import axial
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpuprep.compute.backend import Backend
from gpuprep.compute.crop import with_margin
from gpuprep.compute.process import host_chunks
from gpuprep.core.axis_part import AxisPart
from gpuprep.core.geometry import Geometry, IndexBox, Placement
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.plan import Plan, make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.volume import StoredVolume

OBLIQUE = np.array([[0.1, 0.8, 0.0, -100.0], [0.05, 0.0, 0.6, -90.0], [-2.4, 0.1, 0.05, 5.0], [0, 0, 0, 1]])
SAGITTAL = np.array([[1.5, 0, 0, -20.0], [0, 0, 0.7, -90.0], [0, -0.9, 0, 5.0], [0, 0, 0, 1]])
ALONG = np.cumsum([0.0, *np.linspace(0.6, 1.4, 28)])
UNEVEN = Placement(ALONG * 28 / ALONG[-1], None, (26, 31))
GAP = Placement(np.r_[0.0:14, 21.0:29], None, (26, 31))
TILTED = Placement(np.arange(29.0), np.stack([np.linspace(5.3, 0, 29), np.linspace(0, 2.4, 29)], axis=1), (20, 28))

STACKS = {
    "axial": (axial((29, 26, 31), (2.5, 0.7, 0.8)), None),
    "oblique": (Geometry((29, 26, 31), OBLIQUE), None),
    "sagittal": (Geometry((29, 26, 31), SAGITTAL), None),
    "uneven": (axial((29, 26, 31), (2.5, 0.7, 0.8)), UNEVEN),
    "gap": (axial((29, 26, 31), (2.5, 0.7, 0.8)), GAP),
    "uneven and oblique": (Geometry((29, 26, 31), OBLIQUE), UNEVEN),
    "tilted": (axial((29, 26, 31), (2.5, 0.7, 0.8)), TILTED),
}
BOXES = (
    IndexBox((3, 5, 8), (20, 19, 30)),
    IndexBox((0, 0, 0), (29, 26, 5)),
    IndexBox((14, 12, 11), (15, 13, 12)),
    IndexBox((15, 2, 3), (17, 20, 20)),
    IndexBox((27, 0, 30), (29, 1, 31)),
)
RECIPES = {
    "default": {},
    "as acquired": {"spacing_mm": None},
    "coarse": {"spacing_mm": (6.0, 2.0, 3.0)},
    "fine": {"spacing_mm": (2.5, 0.3, 0.4)},
    "turned": {"orient": "LPS"},
    "corner": {"align": "corner"},
    "blurred": {"anti_alias": "resample", "spacing_mm": (6.0, 2.0, 2.0)},
    "linear": {"order": 1},
    "nearest": {"order": 0},
    "quintic": {"order": 5},
}


def stack(name: str) -> StoredVolume:
    geometry, placement = STACKS[name]
    shape = geometry.shape if placement is None else (len(placement.along), *placement.matrix)
    stored = np.random.default_rng(1).integers(0, 3000, shape).astype(np.int16)
    slope, intercept = np.linspace(0.9, 1.1, shape[0]), np.linspace(-1024, -1000, shape[0])
    return StoredVolume(stored, slope, intercept, None, geometry, HuStatistics(), (), placement)


def run(volume: StoredVolume, plan: Plan, backend: Backend, engine: Any) -> NDArray[Any]:
    return np.concatenate([chunk.copy() for chunk in host_chunks(volume, plan, backend, engine)])


def part_of(whole: Plan, cropped: Plan) -> tuple[slice, ...]:
    """Return where the cropped output lies in the whole one, by the affines; they must share a grid of voxels."""
    to_whole = np.linalg.inv(whole.target.affine) @ cropped.target.affine
    np.testing.assert_allclose(to_whole[:3, :3], np.eye(3), atol=1e-9)
    start = np.rint(to_whole[:3, 3]).astype(int)
    np.testing.assert_allclose(to_whole[:3, 3], start, atol=1e-6)
    return tuple(slice(low, low + n) for low, n in zip(start.tolist(), cropped.target.shape, strict=True))


@pytest.mark.parametrize("engine", ["operators", "ndimage"])
@pytest.mark.parametrize("recipe_name", RECIPES)
@pytest.mark.parametrize("name", STACKS)
def test_a_cropped_volume_equals_that_part_of_the_whole(
    name: str, recipe_name: str, backend: Backend, engine: Any
) -> None:
    recipe = Recipe(size=None, window_hu=None, **RECIPES[recipe_name])  # type: ignore[arg-type]
    volume = stack(name)
    whole = make_plan(volume.geometry, recipe, volume.placement)
    expected = run(volume, whole, backend, engine)
    for box in BOXES:
        cropped = make_plan(volume.geometry, recipe, volume.placement, box)
        values = run(volume, cropped, backend, engine)
        assert values.shape == cropped.target.shape
        within = part_of(whole, cropped)
        assert np.abs(values - expected[within]).max() < 0.01
        # The box is covered: the corners of its outer voxels lie in the output, and by less than a voxel too much.
        corners = np.array(np.meshgrid(*zip(box.start, box.stop, strict=True))).reshape(3, -1).T - 0.5
        at = np.linalg.solve(cropped.target.affine, np.c_[volume.geometry.points_mm(corners), np.ones(8)].T)[:3]
        if recipe.align == "edge":
            assert (at.min(axis=1) > -0.5 - 1e-6).all()
            assert (at.max(axis=1) < np.array(cropped.target.shape) - 0.5 + 1e-6).all()
            assert (at.min(axis=1) < 0.5).all()
            assert (at.max(axis=1) > np.array(cropped.target.shape) - 1.5).all()


@pytest.mark.parametrize("name", ["axial", "oblique", "uneven"])
def test_pixels_that_are_not_resampled_stay_as_they_are(name: str, backend: Backend) -> None:
    volume, box = stack(name), BOXES[0]
    if volume.placement is not None:
        volume = replace(volume, placement=replace(volume.placement, along=np.arange(29.0)))
    plan = make_plan(volume.geometry, Recipe(spacing_mm=None, size=None, window_hu=None), volume.placement, box)
    hu = volume.stored * volume.slope[:, None, None].astype(np.float32)
    hu = np.maximum(hu + volume.intercept[:, None, None].astype(np.float32), -1024)
    hu[hu <= -1024] = -1000
    np.testing.assert_allclose(run(volume, plan, backend, "operators"), hu[box.slices], atol=1e-3)


def test_only_what_the_box_needs_is_read(backend: Backend) -> None:
    shape = (200, 300, 300)
    stored = np.zeros(shape, dtype=np.int16)
    asked: list[int] = []

    class Counting(StoredVolume):
        def slab(self, start: int, stop: int, empty: Any = None) -> NDArray[Any]:
            asked.extend(range(start, stop))
            return super().slab(start, stop, empty)

    geometry = axial(shape, (1.0, 0.7, 0.7))
    volume = Counting(stored, np.ones(200), np.zeros(200), None, geometry, HuStatistics())
    plan = make_plan(geometry, Recipe(size=None), None, IndexBox((90, 100, 100), (110, 200, 200)))
    assert plan.read == IndexBox((90, 83, 83), (110, 217, 217))  # 1 mm stays along slices; a spline reaches 17 pixels
    run(volume, plan, backend, "operators")
    assert sorted(asked) == list(range(90, 110))


def test_the_size_of_slices_is_reached_from_the_box() -> None:
    geometry = axial((10, 100, 100), (1.0, 1.0, 1.0))
    box = IndexBox((2, 20, 30), (8, 60, 80))
    stretched = make_plan(geometry, Recipe(size=(80, 50)), None, box).target
    assert stretched.shape == (6, 80, 50)
    assert stretched.spacing_mm == (1.0, 0.5, 1.0)
    assert stretched.points_mm([-0.5, -0.5, -0.5]).tolist() == geometry.points_mm([1.5, 19.5, 29.5]).tolist()
    padded = make_plan(geometry, Recipe(size=(64, 64), fit="pad"), None, box).target
    assert padded.points_mm([0, 12, 7]).tolist() == geometry.points_mm([2, 20, 30]).tolist()


def test_a_slice_that_only_fits_when_cropped_is_refused_when_it_is_whole() -> None:
    geometry = axial((10, 100, 100), (1.0, 1.0, 1.0))
    recipe = Recipe(size=(64, 64), fit="pad", crop="body")
    make_plan(geometry, recipe)  # the box is not known yet
    with pytest.raises(Exception, match="100 × 100 do not fit into 64 × 64"):
        make_plan(geometry, recipe, None, IndexBox((0, 0, 0), geometry.shape))


def test_a_margin_ends_where_the_volume_ends() -> None:
    geometry = axial((20, 100, 100), (3.0, 0.7, 1.0))
    grown = with_margin(IndexBox((2, 50, 5), (19, 60, 10)), geometry, 10)
    assert grown == IndexBox((0, 35, 0), (20, 75, 20))  # 4 slices, 15 rows and 10 columns more on each side


@given(st.data(), st.integers(1, 60), st.integers(1, 90), st.booleans())
@example(None, 10, 30, False)
def test_outputs_of_a_part_are_those_that_touch_the_box(data: Any, n_in: int, n_out: int, corner: bool) -> None:
    low = 3 if data is None else data.draw(st.integers(0, n_in - 1))
    high = 5 if data is None else data.draw(st.integers(low + 1, n_in))
    part = AxisPart.of(n_in, n_out, (low, high), corner=corner, along=None, order=1, sigma=0.0, cut=True)
    step = (n_in - 1) / max(1, n_out - 1) if corner else n_in / n_out
    centres = step * np.arange(n_out) + (0 if corner else step / 2 - 0.5)
    touching = (centres + step / 2 > low - 0.5 + 1e-6) & (centres - step / 2 < high - 0.5 - 1e-6)
    made = (np.arange(n_out) >= part.start) & (np.arange(n_out) < part.stop)
    if n_in == n_out:
        assert (part.start, part.stop) == (low, high)
    elif touching.any():
        assert made.tolist() == touching.tolist()
    else:  # corners in a box of which no output is near
        assert made.sum() == 1
    needed = np.clip(centres[made], 0, n_in - 1)
    assert part.low <= np.floor(needed.min())
    assert np.ceil(needed.max()) < part.high <= n_in
