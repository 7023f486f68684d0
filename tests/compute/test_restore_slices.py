"""Labels and probabilities on the slices as acquired, against distances computed by brute force, and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import axial
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from test_resample_labels import GRIDS, RECIPES, blobs, resampled

from gpuprep.compute.restore_slices import restore_slices
from gpuprep.core.geometry import Geometry, Placement
from gpuprep.core.plan import Plan, make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.restored import OutputGrid, Restored
from gpuprep.errors import GeometryError, PlanError, PredictionError, RequestError


def grid_of(plan: Plan) -> OutputGrid:
    return OutputGrid(plan.target, plan.source, plan.placement)


def slice_points_mm(grid: OutputGrid) -> NDArray[np.float64]:
    """Return where the voxels of the slices lie by the definition of a placement, shape (slices, rows, columns, 3)."""
    n, j, i = np.indices(grid.slices_shape)
    if grid.placement is None:
        return grid.source.points_mm(np.stack([n, j, i], axis=-1))
    shift = np.zeros((len(n), 2)) if grid.placement.shift is None else grid.placement.shift
    rows, columns = j + shift[:, 0][:, None, None], i + shift[:, 1][:, None, None]
    return grid.source.points_mm(np.stack([grid.placement.along[n], rows, columns], axis=-1))


def nearest(values: NDArray[Any], positions: NDArray[np.float64], later: NDArray[np.bool_]) -> NDArray[Any]:
    """Return the values at the voxels with the smallest distance along each axis; 0 if that is a voxel outside.

    Parameters
    ----------
    positions : array of float64, shape (…, 3)
        In voxels.
    later : array of bool, shape (3,)
        Which of two voxels at equal distance is taken along each axis.
    """
    index, inside = [], np.ones(positions.shape[:-1], bool)
    for axis, voxels in enumerate(values.shape):
        at = np.round(positions[..., axis], 6)
        away = np.abs(at[..., None] - np.arange(-1, voxels + 1))
        found = voxels - away[..., ::-1].argmin(axis=-1) if later[axis] else away.argmin(axis=-1) - 1
        inside &= (found >= 0) & (found < voxels)
        index.append(np.clip(found, 0, voxels - 1))
    return np.asarray(np.where(inside, values[tuple(index)], 0))


def to_voxels(grid: Geometry, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((points_mm - grid.affine[:3, 3]) @ np.linalg.inv(grid.affine[:3, :3]).T)


def expected(prediction: NDArray[Any], grid: OutputGrid) -> NDArray[Any]:
    """Return the labels of the nearest voxels; of equally near ones those that come first along the source."""
    step = np.linalg.inv(grid.target.affine[:3, :3]) @ grid.source.affine[:3, :3]
    later = np.array([step[axis][np.abs(step[axis]).argmax()] < 0 for axis in range(3)])
    return nearest(prediction, to_voxels(grid.target, slice_points_mm(grid)), later)


@st.composite
def rotations(draw: st.DrawFn) -> NDArray[np.float64]:
    """Draw directions of slices, rows and columns: any, or along the axes of the patient in any order and direction."""
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    if draw(st.booleans()):
        return np.asarray(np.linalg.qr(rng.normal(size=(3, 3)))[0])
    return np.asarray(np.eye(3)[:, rng.permutation(3)] * rng.choice([-1, 1], 3))


LENGTHS = st.tuples(*[st.integers(1, 7)] * 3)
SPACINGS = st.sampled_from([0.5, 0.7, 1.0, 1.5, 2.0, 3.0])


@st.composite
def plans(draw: st.DrawFn, *, irregular: bool = True) -> Plan:
    """Draw a plan of any recipe, for a regular or an irregular stack."""
    matrix = draw(LENGTHS)
    affine = np.eye(4)
    affine[:3, :3] = draw(rotations()) * [draw(SPACINGS) for _ in range(3)]
    affine[:3, 3] = draw(st.sampled_from([(0.0, 0.0, 0.0), (-211.3, 12.77, 1003.1)]))
    placement, shape = None, matrix
    if irregular and draw(st.booleans()):
        steps = draw(st.lists(st.sampled_from([0.5, 1.0, 1.25, 2.0]), min_size=matrix[0] - 1, max_size=matrix[0] - 1))
        along = np.concatenate([[0.0], np.cumsum(steps)])
        pairs = st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.3])] * 2)
        shift = np.array(draw(st.lists(pairs, min_size=matrix[0], max_size=matrix[0])))
        placement = Placement(along, shift - shift.min(axis=0), matrix[1:])
        shape = (int(np.ceil(along[-1])) + 1, *placement.canvas)
    spacing = draw(st.one_of(st.none(), st.tuples(*[SPACINGS] * 3)))
    size = draw(st.one_of(st.none(), st.tuples(*[st.integers(1, 12)] * 2)))
    recipe = Recipe(
        spacing_mm=spacing,
        size=size,
        fit=draw(st.sampled_from(["stretch", "crop", "pad"])),
        orient=draw(st.sampled_from(["native", "LPS"])),
        align=draw(st.sampled_from(["edge", "edge", "corner"])),
    )
    try:
        return make_plan(Geometry(shape, affine), recipe, placement)
    except PlanError:  # slices that do not fit
        assume(False)
        raise


@given(plans(), st.integers(0, 2**31))
def test_labels_are_those_of_the_nearest_voxels(plan: Plan, seed: int) -> None:
    prediction = np.random.default_rng(seed).integers(0, 65536, plan.target.shape).astype(np.uint16)
    got = restore_slices(prediction, grid_of(plan))
    assert got.shape == grid_of(plan).slices_shape
    np.testing.assert_array_equal(got, expected(prediction, grid_of(plan)))


def is_no_coarser(plan: Plan) -> bool:
    """Return whether no axis of the output is coarser than the grid of the series, or than its closest slices."""
    finest_mm = np.array(plan.source.spacing_mm)
    if plan.placement is not None:
        finest_mm[0] *= np.diff(plan.placement.along).min(initial=1.0)
    axes = np.abs(np.linalg.inv(plan.source.affine[:3, :3]) @ plan.target.affine[:3, :3]).argmax(axis=0)
    return bool((np.array(plan.target.spacing_mm) <= finest_mm[axes] + 1e-9).all())


@given(plans(), st.integers(0, 2**31))
def test_labels_return_unchanged_from_an_output_that_is_no_coarser(plan: Plan, seed: int) -> None:
    # A voxel of the output is at most half a voxel away from the slice's voxel, so its nearest one is that voxel.
    assume(is_no_coarser(plan))
    grid = grid_of(plan)
    labels = np.random.default_rng(seed).integers(1, 65536, grid.slices_shape).astype(np.uint16)
    got = restore_slices(resampled(labels, plan, "nearest", placement=plan.placement), grid)
    inside = expected(np.ones(plan.target.shape, np.uint8), grid)
    np.testing.assert_array_equal(got, labels * inside)


@given(plans(irregular=False), st.integers(0, 2**31))
def test_labels_of_a_coarser_output_are_those_of_both_nearest_voxels(plan: Plan, seed: int) -> None:
    # The conversion looks up native labels at the voxels of the output, this looks up the output at native voxels.
    grid = grid_of(plan)
    labels = np.random.default_rng(seed).integers(1, 65536, grid.slices_shape).astype(np.uint16)
    points_mm = plan.target.points_mm(np.moveaxis(np.indices(plan.target.shape), 0, -1))
    native = to_voxels(plan.source, points_mm)
    converted = nearest(labels, native, np.array([True] * 3))
    got = restore_slices(resampled(labels, plan, "nearest"), grid)
    np.testing.assert_array_equal(got, expected(converted, grid))


SHAPES = ("ball", "straw of one voxel", "sheet of one voxel", "single voxel")


def drawn(name: str, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    labels = np.zeros(shape, np.uint8)
    k, j, i = (n // 2 for n in shape)
    if name == "ball":
        z, y, x = np.indices(shape)
        labels[((z - k) / 3) ** 2 + ((y - j) / 9) ** 2 + ((x - i) / 9) ** 2 < 1] = 1
    elif name == "straw of one voxel":
        labels[:, j, i] = 1
    elif name == "sheet of one voxel":
        labels[:, j, :] = 1
    else:
        labels[k, j, i] = 1
    return labels


EXACT = ("1 mm", "1 mm, stretched", "padded", "as acquired")
"""Recipes of `RECIPES` that lose nothing: here, they make a voxel of 1 mm or less of one of 3.1 × 1.21 × 1.33 mm."""


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("recipe", EXACT)
def test_thin_structures_return_unchanged_from_a_finer_output(name: str, recipe: str) -> None:
    labels = drawn(name, (11, 40, 48))
    plan = make_plan(axial((11, 40, 48), (3.1, 1.21, 1.33)), RECIPES[recipe])
    assert labels.any()
    if recipe == "1 mm, stretched":
        assert plan.target.shape == (34, 61, 50)
    if recipe == "padded":
        assert plan.target.shape[1:] == (70, 90)
    np.testing.assert_array_equal(restore_slices(resampled(labels, plan, "nearest"), grid_of(plan)), labels)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_classes_are_interpolated_as_by_scipy_before_the_largest_is_taken(grid: Geometry, recipe: Recipe) -> None:
    plan = make_plan(grid, recipe)
    labels = resampled(blobs(grid.shape, 3), plan, "nearest")
    noise = np.random.default_rng(0).random((4, *plan.target.shape))
    classes = np.stack([ndimage.gaussian_filter((labels == v) + 0.3 * noise[v], 0.7) for v in range(4)])
    classes /= classes.sum(axis=0)
    positions = np.moveaxis(to_voxels(plan.target, slice_points_mm(grid_of(plan))), -1, 0)
    shares = np.stack(
        [ndimage.map_coordinates(c, positions, order=1, mode="nearest", prefilter=False) for c in classes]
    )
    end = np.array(plan.target.shape)[:, None, None, None] - 0.5
    inside = ((positions > -0.5 - 1e-6) & (positions < end + 1e-6)).all(axis=0)
    best = np.sort(shares, axis=0)
    clear = best[-1] - best[-2] > 1e-5
    assert clear.mean() > 0.95
    got = restore_slices(classes.astype(np.float32), grid_of(plan))
    np.testing.assert_array_equal(got[clear], np.where(inside, shares.argmax(axis=0), 0)[clear])
    for threshold in (None, 0.2):
        got = restore_slices(classes[1], grid_of(plan), threshold)
        clear = np.abs(shares[1] - (threshold or 0.5)) > 1e-5
        np.testing.assert_array_equal(got[clear], (inside & (shares[1] > (threshold or 0.5)))[clear])


def test_probabilities_of_a_tilted_and_uneven_stack_are_interpolated_at_true_positions() -> None:
    # A linear function of position is interpolated without error, so the threshold cuts along its level.
    along = np.array([0.0, 1.1, 1.9, 3.2, 4.0])
    placement = Placement(along, np.stack([np.linspace(0, 2.6, 5), np.linspace(1.3, 0, 5)], axis=1), (9, 8))
    grid = axial((5, *placement.canvas), (2.0, 0.9, 0.7))
    plan = make_plan(grid, Recipe(size=None), placement)
    direction, level = np.array([0.02, 0.035, 0.045]), 0.5

    def linear(points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((points_mm - grid.points_mm([2, 5, 4])) @ direction + level)

    prediction = linear(plan.target.points_mm(np.moveaxis(np.indices(plan.target.shape), 0, -1)))
    assert 0 < prediction.min() < prediction.max() < 1
    points_mm = slice_points_mm(grid_of(plan))
    inner = to_voxels(plan.target, points_mm)
    clear = ((inner > 0) & (inner < np.array(plan.target.shape) - 1)).all(axis=-1)
    clear &= np.abs(linear(points_mm) - level) > 1e-4
    assert clear.mean() > 0.3
    got = restore_slices(prediction, grid_of(plan))
    np.testing.assert_array_equal(got[clear], (linear(points_mm) > level)[clear])
    assert 0.2 < got.mean() < 0.8


def test_what_a_recipe_cuts_off_is_background() -> None:
    plan = make_plan(axial((3, 6, 8), (1.0, 1.0, 1.0)), Recipe(spacing_mm=None, size=(4, 2), fit="crop"))
    for prediction in (
        np.full((3, 4, 2), 7),
        np.full((3, 4, 2), 0.75),
        np.stack([np.full((3, 4, 2), v) for v in (0, 1)]),
    ):
        got = restore_slices(prediction, grid_of(plan))
        assert (got[:, 1:5, 3:5] > 0).all()
        got[:, 1:5, 3:5] = 0
        assert not got.any()


def test_of_equally_near_voxels_the_earlier_one_counts_and_of_equal_classes_the_first() -> None:
    # Each voxel of 2 mm becomes two of 1 mm, and its centre lies between them.
    plan = make_plan(axial((1, 1, 3), (2.0, 2.0, 2.0)), Recipe(size=None))
    prediction = np.arange(24).reshape(2, 2, 6) + 1
    assert restore_slices(prediction, grid_of(plan)).tolist() == [[[1, 3, 5]]]
    turned = OutputGrid(Geometry((2, 2, 6), plan.target.affine @ flip(5)), plan.source, None)
    assert restore_slices(prediction[:, :, ::-1], turned).tolist() == [[[1, 3, 5]]]
    assert not restore_slices(np.full((3, 2, 2, 6), 0.25), grid_of(plan)).any()
    assert (restore_slices(np.stack([np.full((2, 2, 6), v) for v in (0.2, 0.4, 0.4)]), grid_of(plan)) == 1).all()


def test_a_probability_equal_to_the_threshold_counts() -> None:
    grid = OutputGrid(axial((2, 2, 6), (1, 1, 1)), axial((2, 2, 6), (1, 1, 1)), None)
    assert restore_slices(np.full((2, 2, 6), 0.5), grid).all()
    assert restore_slices(np.full((2, 2, 6), 0.75), grid, 0.75).all()
    assert not restore_slices(np.full((2, 2, 6), 0.7499), grid, 0.75).any()


def test_the_nearest_even_slices_are_those_of_least_squares() -> None:
    # Slices at 0, 1 and 4 mm: the straight line through (n, z) is 2 n − 1/3, at most 2/3 mm away.
    placement = Placement(np.array([0.0, 0.5, 2.0]), None, (4, 5))
    restored = Restored(np.zeros((3, 4, 5), np.uint8), axial((3, 4, 5), (2.0, 0.5, 0.5)), placement, {}, "", "")
    grid, away_mm = restored.regular_grid()
    assert grid.shape == (3, 4, 5)
    assert grid.spacing_mm == pytest.approx((2.0, 0.5, 0.5))
    assert grid.origin_mm == pytest.approx((-100, -120, -300 - 1 / 3))
    assert away_mm == pytest.approx(2 / 3)
    alone = Restored(restored.values[:1], restored.geometry, Placement(np.zeros(1), None, (4, 5)), {}, "", "")
    assert alone.regular_grid()[0].spacing_mm == pytest.approx((2.0, 0.5, 0.5))
    assert alone.regular_grid()[0].origin_mm == pytest.approx((-100, -120, -300))


def flip(last: int) -> NDArray[np.float64]:
    """Return the matrix that reverses columns."""
    matrix = np.diag([1.0, 1.0, -1.0, 1.0])
    matrix[2, 3] = last
    return matrix


@pytest.mark.parametrize(
    ("prediction", "dtype"),
    [
        (np.full((2, 2, 6), 255, np.int64), np.uint8),
        (np.full((2, 2, 6), 256.0), np.uint16),
        (np.full((2, 2, 6), True), np.uint8),
        (np.full((1, 2, 2, 6), 3, np.float16), np.uint8),
    ],
    ids=["integers", "floats", "bool", "one channel"],
)
def test_whole_numbers_of_any_type_are_labels(prediction: NDArray[Any], dtype: Any) -> None:
    got = restore_slices(prediction, OutputGrid(axial((2, 2, 6), (1, 1, 1)), axial((2, 2, 6), (1, 1, 1)), None))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, prediction.reshape(2, 2, 6))


BAD = {
    "shape": (np.zeros((2, 6, 2)), r"shape \(2, 6, 2\), but the output has \(2, 2, 6\)"),
    "two axes": (np.zeros((2, 6)), r"shape \(2, 6\), but the output has \(2, 2, 6\)"),
    "classes last": (np.zeros((2, 2, 6, 3)), r"shape \(2, 2, 6, 3\), but the output has \(2, 2, 6\)"),
    "no class": (np.zeros((0, 2, 2, 6)), r"shape \(0, 2, 2, 6\), but the output has \(2, 2, 6\)"),
    "nan": (np.where(np.arange(24).reshape(2, 2, 6) == 20, np.nan, 0), r"NaN in plane \(1,\)"),
    "infinite": (np.full((2, 2, 6), np.inf), "up to inf"),
    "negative": (np.full((2, 2, 6), -1), "down to -1"),
    "a logit": (np.full((2, 2, 2, 6), -0.5), "down to -0.5"),
    "large": (np.full((2, 2, 6), 65536), "up to 65536: labels are below 65536"),
    "percent": (np.full((2, 2, 6), 45.3), "up to 45.3, not all whole: probabilities are at most 1"),
    "complex": (np.zeros((2, 2, 6), complex), "complex"),
    "objects": (np.full((2, 2, 6), None), "object"),
}


@pytest.mark.parametrize(("prediction", "message"), BAD.values(), ids=BAD)
def test_what_is_neither_label_nor_probability_is_refused_in_one_line(prediction: NDArray[Any], message: str) -> None:
    grid = OutputGrid(axial((2, 2, 6), (1, 1, 1)), axial((2, 2, 6), (1, 1, 1)), None)
    with pytest.raises(PredictionError, match=message) as caught:
        restore_slices(prediction, grid)
    assert "\n" not in str(caught.value)


def test_a_threshold_that_means_nothing_is_refused() -> None:
    grid = OutputGrid(axial((2, 2, 6), (1, 1, 1)), axial((2, 2, 6), (1, 1, 1)), None)
    for threshold in (0, -1, 1.5, float("nan")):
        with pytest.raises(RequestError, match="no probability"):
            restore_slices(np.full((2, 2, 6), 0.5), grid, threshold)
    with pytest.raises(RequestError, match="of classes the largest"):
        restore_slices(np.full((2, 2, 2, 6), 0.5), grid, 0.5)
    assert (restore_slices(np.full((2, 2, 6), 2), grid, 0.5) == 2).all()  # one prediction of many may have labels


def test_grids_whose_axes_are_not_parallel_are_refused() -> None:
    turned = np.array(axial((2, 2, 6), (1, 1, 1)).affine)
    turned[0, 1] = 0.01
    with pytest.raises(GeometryError, match="not parallel"):
        OutputGrid(Geometry((2, 2, 6), turned), axial((2, 2, 6), (1, 1, 1)), None).axis_maps()
