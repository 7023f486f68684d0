"""Tests of `Geometry`: voxel positions after resizing and cropping, against extents, centres and SciPy."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from gpuprep.core.geometry import Geometry, Shape3
from gpuprep.errors import GeometryError

Floats = NDArray[np.float64]

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
thick_shapes = st.tuples(st.integers(2, 40), st.integers(2, 40), st.integers(2, 40))
spacings = st.tuples(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10))
points = st.tuples(st.floats(-500, 500), st.floats(-500, 500), st.floats(-500, 500))


@st.composite
def geometries(draw: st.DrawFn, shape: st.SearchStrategy[Shape3] = shapes) -> Geometry:
    """Draw a grid of any orientation, spacing and handedness, with or without shear."""
    rotation = Rotation.from_rotvec(draw(st.tuples(*[st.floats(-3, 3)] * 3))).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.array(draw(spacings)) * draw(st.sampled_from([(1, 1, 1), (-1, 1, 1), (1, 1, -1)]))
    affine[:3, 0] += draw(st.floats(-0.3, 0.3)) * affine[:3, 1]
    affine[:3, 3] = draw(points)
    return Geometry(draw(shape), affine)


def by_hand(affine: Floats, index: tuple[float, ...]) -> Floats:
    """Return the position of an index, summed column by column of the affine."""
    k, j, i = index
    return np.asarray(affine[:3, 0] * k + affine[:3, 1] * j + affine[:3, 2] * i + affine[:3, 3])


def corners(low: float, high: Shape3, add: float) -> list[tuple[float, ...]]:
    return list(product(*((low, n + add) for n in high)))


@settings(deadline=None)
@given(geometries(), points)
def test_points_follow_the_affine(geometry: Geometry, index: tuple[float, ...]) -> None:
    assert geometry.points_mm(index) == pytest.approx(by_hand(geometry.affine, index), abs=1e-8)


@settings(deadline=None)
@given(geometries(), shapes)
def test_resizing_keeps_the_outer_faces(geometry: Geometry, shape: Shape3) -> None:
    # Traps 14, 15, 17: no shift of half a voxel, and the spacing follows from the extent.
    resized = geometry.resized(shape)
    assert resized.shape == shape
    for old, new in zip(corners(-0.5, geometry.shape, -0.5), corners(-0.5, shape, -0.5), strict=True):
        assert resized.points_mm(new) == pytest.approx(by_hand(geometry.affine, old), abs=1e-7)
    expected = [s * n / m for s, n, m in zip(geometry.spacing_mm, geometry.shape, shape, strict=True)]
    assert resized.spacing_mm == pytest.approx(expected, rel=1e-9)


@settings(deadline=None)
@given(geometries(thick_shapes), thick_shapes)
def test_corner_resizing_keeps_the_outer_centres(geometry: Geometry, shape: Shape3) -> None:
    # Trap 14: the spacing is (n − 1)/(m − 1), not n/m.
    resized = geometry.corner_resized(shape)
    for old, new in zip(corners(0, geometry.shape, -1), corners(0, shape, -1), strict=True):
        assert resized.points_mm(new) == pytest.approx(by_hand(geometry.affine, old), abs=1e-7)


@pytest.mark.parametrize(("source", "target"), [((1, 4, 4), (3, 4, 4)), ((3, 4, 4), (1, 4, 4))])
def test_corner_resizing_of_a_single_voxel_keeps_the_first_centre(source: Shape3, target: Shape3) -> None:
    geometry = Geometry(source, np.diag([2.0, 3.0, 4.0, 1.0])).corner_resized(target)
    assert geometry.origin_mm == (0.0, 0.0, 0.0)
    assert geometry.spacing_mm == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("grid_mode", [True, False])
@pytest.mark.parametrize("target", [(11, 7, 9), (3, 14, 8)])
def test_resized_grids_lie_where_scipy_samples(target: Shape3, grid_mode: bool) -> None:
    # SciPy zooms a volume whose values are positions; the result holds the positions of the new voxels.
    source = (5, 9, 8)
    affine = np.array([[0.1, 0.2, 0.7, -30], [0.3, 0.8, -0.2, 12], [2.4, -0.1, 0.2, 77], [0, 0, 0, 1]])
    geometry = Geometry(source, affine)
    resized = geometry.resized(target) if grid_mode else geometry.corner_resized(target)
    place = np.moveaxis(np.array([by_hand(affine, index) for index in np.ndindex(source)]).reshape(*source, 3), 3, 0)
    factors = [m / n for n, m in zip(source, target, strict=True)]
    expected = np.stack(
        [ndimage.zoom(axis, factors, order=1, grid_mode=grid_mode, mode="nearest") for axis in place], axis=-1
    )
    indices = np.moveaxis(np.indices(target), 0, -1)
    values = resized.points_mm(indices)
    scale = np.array(source) / np.array(target)
    old = indices * scale + (scale - 1) / 2 if grid_mode else indices.astype(float)
    inside = ((old >= 0) & (old <= np.array(source) - 1)).all(axis=-1) if grid_mode else np.ones(target, dtype=bool)
    assert inside.sum() > 50
    assert np.abs(values - expected)[inside].max() < 1e-9


@settings(deadline=None)
@given(geometries(), shapes)
def test_resizing_there_and_back_is_the_same_grid(geometry: Geometry, shape: Shape3) -> None:
    back = geometry.resized(shape).resized(geometry.shape)
    assert back.shape == geometry.shape
    np.testing.assert_allclose(back.affine, geometry.affine, atol=1e-9)
    assert back.is_close(geometry)


@settings(deadline=None)
@given(geometries(), st.tuples(*[st.integers(-20, 20)] * 3), shapes, points)
def test_cropping_only_shifts_the_index(
    geometry: Geometry, start: tuple[int, int, int], shape: Shape3, index: tuple[float, ...]
) -> None:
    cropped = geometry.cropped(start, shape)
    there = tuple(a + b for a, b in zip(index, start, strict=True))
    assert cropped.shape == shape
    assert cropped.spacing_mm == pytest.approx(geometry.spacing_mm)
    assert cropped.points_mm(index) == pytest.approx(by_hand(geometry.affine, there), abs=1e-7)


def test_spacing_and_origin_by_hand() -> None:
    # Trap 35: three different spacings along (k, j, i); rows run along −y, columns along z.
    affine = [[0, 0, 0.6, 10], [0, -0.8, 0, 20], [2.5, 0, 0, -30], [0, 0, 0, 1]]
    geometry = Geometry((4, 5, 6), np.array(affine))
    assert geometry.spacing_mm == (2.5, 0.8, 0.6)
    assert geometry.origin_mm == (10.0, 20.0, -30.0)
    assert geometry.points_mm((3, 4, 5)).tolist() == [13, pytest.approx(16.8), -22.5]


@settings(deadline=None)
@given(geometries())
def test_pickling_and_copying_keep_the_grid(geometry: Geometry) -> None:
    for twin in (pickle.loads(pickle.dumps(geometry)), copy.deepcopy(geometry)):  # noqa: S301 - our own bytes
        assert twin.shape == geometry.shape
        np.testing.assert_array_equal(twin.affine, geometry.affine)
        assert not twin.affine.flags.writeable


def test_a_grid_cannot_be_changed_through_the_array_it_was_made_of() -> None:
    affine = np.eye(4)
    geometry = Geometry((2, 2, 2), affine)
    affine[0, 0] = 7
    assert geometry.affine[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        geometry.affine[0, 0] = 7


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 0, 4), (4, 4, 0), (4, -1, 4)])
def test_an_axis_without_voxels_is_refused(shape: Shape3) -> None:
    with pytest.raises(GeometryError, match="at least one voxel along each axis"):
        Geometry(shape, np.eye(4))


@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 4, 4, 4)])
def test_a_grid_has_three_axes(shape: Shape3) -> None:
    with pytest.raises(GeometryError):
        Geometry(shape, np.eye(4))


@pytest.mark.parametrize(
    "affine",
    [np.eye(3), np.eye(4)[:3], np.zeros((4, 4)), np.diag([1, 1, 0, 1]), np.diag([1, np.nan, 1, 1]),
     np.diag([1, 1, np.inf, 1]), np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])],
)  # fmt: skip
def test_a_singular_non_finite_or_misshapen_affine_is_refused(affine: Floats) -> None:
    with pytest.raises(GeometryError, match="finite, invertible 4 × 4"):
        Geometry((2, 2, 2), affine)


@settings(deadline=None)
@given(geometries(), st.floats(-0.9e-4, 0.9e-4))
def test_grids_that_differ_by_float_noise_are_close(geometry: Geometry, shift_mm: float) -> None:
    affine = geometry.affine.copy()
    affine[0, 3] += shift_mm
    assert geometry.is_close(Geometry(geometry.shape, affine))


def test_grids_that_differ_are_not_close() -> None:
    geometry = Geometry((4, 5, 6), np.diag([2.0, 0.7, 0.8, 1.0]))
    moved = geometry.affine.copy()
    moved[1, 3] += 2e-4
    assert not geometry.is_close(Geometry((4, 5, 6), moved))
    assert not geometry.is_close(Geometry((4, 5, 6), np.diag([2.0, 0.7001, 0.8, 1.0])))
    assert not geometry.is_close(Geometry((4, 6, 5), geometry.affine))


def test_grids_with_exchanged_axes_are_not_close() -> None:
    # Trap 35: exchanging rows and columns of a square slice leaves its first and last voxel in place.
    geometry = Geometry((4, 4, 4), np.eye(4))
    for order in ([0, 2, 1, 3], [1, 0, 2, 3], [1, 2, 0, 3]):
        assert not geometry.is_close(Geometry((4, 4, 4), geometry.affine[:, order]))
