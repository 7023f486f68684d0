"""Label resampling against SimpleITK (nearest) and SciPy (interpolated binary masks)."""

from __future__ import annotations

from typing import Any, Literal

import array_api_strict
import numpy as np
import pytest
import SimpleITK
from conftest import axial, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from gpuprep.compute.backend import Backend, NumpyBackend, get_backend
from gpuprep.compute.resample_labels import label_chunks, slice_volumes_ml
from gpuprep.core.geometry import Geometry, Placement
from gpuprep.core.plan import Plan, make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.errors import BackendError

Resampling = Literal["nearest", "smooth"]

WEIGHT_TOLERANCE = 4 / 256
"""Upper limit of the error of a voxel's weight from rounding positions to 1/256 voxel along each axis."""


class StrictBackend(NumpyBackend):
    """Backend with the arrays of array-api-strict, which have only the functions of the standard.

    They are on another device than NumPy's, so a hidden conversion fails.
    """

    device = array_api_strict.Device("device1")

    def __init__(self) -> None:
        super().__init__("matmul")

    def to_device(self, host: Any) -> Any:
        return array_api_strict.asarray(host, device=self.device, copy=True)


def on_host(array: Any) -> NDArray[Any]:
    if isinstance(array, array_api_strict._array_object.Array):
        assert array.device == StrictBackend.device
        return np.array(array.to_device(array_api_strict.Device("CPU_DEVICE")))
    return to_numpy(array)


@pytest.fixture(params=["numpy", "strict", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """NumPy, array-api-strict, and a GPU; a simulated one takes seconds for each test."""
    if request.param != "gpu":
        return NumpyBackend("matmul") if request.param == "numpy" else StrictBackend()
    try:
        return get_backend("gpu")
    except BackendError as exc:
        pytest.skip(str(exc))


def resampled(
    labels: NDArray[Any],
    plan: Plan,
    resampling: Resampling,
    backend: Backend | None = None,
    placement: Placement | None = None,
) -> NDArray[Any]:
    backend = backend or NumpyBackend("matmul")
    with backend.session():
        return np.concatenate([on_host(c) for c in label_chunks(labels, plan, placement, resampling, backend)])


def blobs(shape: tuple[int, int, int], count: int = 5, seed: int = 0, dtype: Any = np.uint8) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype)
    z, y, x = np.indices(shape)
    for value in range(1, count + 1):
        c, r = rng.uniform(0, 1, 3) * shape, rng.uniform(0.15, 0.4, 3) * shape
        labels[((z - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 + ((x - c[2]) / r[2]) ** 2 < 1] = value
    return labels


def oblique(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Geometry:
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing_mm
    affine[:3, 3] = 12.3, -45.6, 78.9
    return Geometry(shape, affine)


def sitk_image(values: NDArray[Any], geometry: Geometry) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(values)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection((geometry.affine[:3, 2::-1] / np.array(geometry.spacing_mm)[::-1]).ravel().tolist())
    return image


def by_simpleitk(labels: NDArray[Any], plan: Plan) -> NDArray[Any]:
    target = sitk_image(np.zeros(plan.target.shape, np.uint8), plan.target)
    return SimpleITK.GetArrayFromImage(
        SimpleITK.Resample(
            sitk_image(labels, plan.source), target, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor, 0
        )
    )


def source_positions(plan: Plan) -> NDArray[np.float64]:
    """Return the positions of the output voxels in source voxels, by the affines: shape (3, k, j, i)."""
    index = np.indices(plan.target.shape).reshape(3, -1).T
    source = (plan.target.points_mm(index) - plan.source.affine[:3, 3]) @ np.linalg.inv(plan.source.affine[:3, :3]).T
    return source.T.reshape(3, *plan.target.shape)


RECIPES = {
    "1 mm": Recipe(size=None),
    "1 mm, stretched": Recipe(size=(61, 50)),
    "padded": Recipe(size=(70, 90), fit="pad"),
    "cropped": Recipe(size=(20, 90), fit="crop"),
    "coarse": Recipe(spacing_mm=(7.0, 2.2, 2.9), size=None),
    "as acquired": Recipe(spacing_mm=None, size=None),
    "turned": Recipe(size=(40, 60), orient="LPS"),
    "classic": Recipe(align="corner", size=(61, 50)),
}
GRIDS = {
    "axial": axial((11, 40, 48), (3.1, 0.71, 0.83)),
    "oblique": oblique((11, 40, 48), (3.1, 0.71, 0.83)),
    "sagittal": Geometry((11, 40, 48), np.array([[3.1, 0, 0, 5], [0, 0, 0.83, 6], [0, -0.71, 0, 7], [0, 0, 0, 1.0]])),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_nearest_labels_equal_those_of_simpleitk(grid: Geometry, recipe: Recipe, backend: Backend) -> None:
    plan = make_plan(grid, recipe)
    labels = blobs(grid.shape)
    got = resampled(labels, plan, "nearest", backend)
    assert got.dtype == np.uint8
    assert got.shape == plan.target.shape
    positions = source_positions(plan)
    clear = (np.abs(positions - np.floor(positions) - 0.5) > 1e-4).all(axis=0)  # half-way, both voxels are nearest
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(got[clear], by_simpleitk(labels, plan)[clear])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_smooth_takes_the_label_with_the_largest_interpolated_mask(
    grid: Geometry, recipe: Recipe, backend: Backend
) -> None:
    # Trap 22: SciPy interpolates the binary mask of each label in float64; the largest value wins.
    plan = make_plan(grid, recipe)
    labels = blobs(grid.shape, dtype=np.uint16)
    got = resampled(labels, plan, "smooth", backend)
    assert got.dtype == np.uint16
    positions = source_positions(plan)
    shares = np.stack(
        [
            ndimage.map_coordinates((labels == v).astype(float), positions, order=1, mode="nearest", prefilter=False)
            for v in range(labels.max() + 1)
        ]
    )
    inside = ((positions > -0.5) & (positions < np.array(grid.shape)[:, None, None, None] - 0.5)).all(axis=0)
    shares[0, ~inside], shares[1:, ~inside] = 1, 0
    best = np.sort(shares, axis=0)
    clear = best[-1] - best[-2] > 2 * WEIGHT_TOLERANCE
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(got[clear], shares.argmax(axis=0)[clear])


@pytest.mark.parametrize("resampling", ["nearest", "smooth"])
def test_a_gpu_gives_identical_labels(resampling: Resampling, gpu: Backend) -> None:
    grid = oblique((5, 20, 24), (3.1, 1.4, 1.6))
    plan = make_plan(grid, Recipe(size=(31, 25)))
    labels = blobs(grid.shape, seed=2)
    np.testing.assert_array_equal(
        resampled(labels, plan, resampling, gpu), resampled(labels, plan, resampling, NumpyBackend("matmul"))
    )


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
    st.tuples(*[st.floats(0.3, 3)] * 3),
    st.integers(0, 2**31),
    st.sampled_from(["nearest", "smooth"]),
)
def test_no_new_label_values_occur(shape: Any, spacing_mm: Any, seed: int, resampling: Resampling) -> None:
    # Interpolation as numbers would give values between 1 and 200 at a border of these labels.
    labels = np.random.default_rng(seed).choice([0, 1, 7, 200, 255], shape).astype(np.uint8)
    plan = make_plan(axial(shape, spacing_mm), Recipe(size=None))
    assert set(np.unique(resampled(labels, plan, resampling))) <= set(np.unique(labels))


@given(st.integers(0, 2**31), st.sampled_from(["nearest", "smooth"]))
def test_labels_are_unchanged_on_an_unchanged_grid(seed: int, resampling: Resampling) -> None:
    shape = (3, 8, 9)
    labels = np.random.default_rng(seed).integers(0, 65536, shape).astype(np.uint16)
    for recipe in (Recipe(spacing_mm=None, size=None), Recipe(spacing_mm=(1, 1, 1), size=(8, 9))):
        # The second recipe shrinks and then stretches the image; labels are looked up in one step.
        plan = make_plan(axial(shape, (1.0, 0.7, 0.6)), recipe)
        np.testing.assert_array_equal(resampled(labels, plan, resampling), labels)


def test_labels_at_the_border_of_the_source_reach_the_border_of_the_output() -> None:
    labels = np.full((4, 5, 6), 3, np.uint8)
    plan = make_plan(axial((4, 5, 6), (2.5, 1.7, 1.7)), Recipe(size=None))
    for resampling in ("nearest", "smooth"):
        assert (resampled(labels, plan, resampling) == 3).all()


def test_an_empty_label_volume_stays_empty() -> None:
    plan = make_plan(axial((4, 5, 6), (2.5, 1.7, 1.7)), Recipe(size=None))
    for resampling in ("nearest", "smooth"):
        got = resampled(np.zeros((4, 5, 6), np.uint8), plan, resampling)
        assert got.shape == plan.target.shape
        assert not got.any()


@pytest.mark.parametrize("resampling", ["nearest", "smooth"])
def test_labels_of_a_tilted_and_uneven_stack_are_looked_up_at_true_slice_positions(
    resampling: Resampling, backend: Backend
) -> None:
    # A ball is painted slice by slice at the true slice positions. On the regular grid it must be a ball again.
    rng = np.random.default_rng(1)
    count, matrix = 24, (60, 50)
    along = np.arange(count) + np.r_[0, rng.uniform(-0.15, 0.15, count - 2), 0]
    shift = np.stack([np.linspace(0, 9.7, count), np.linspace(3.2, 0, count)], axis=1)
    placement = Placement(along, shift, matrix)
    grid = axial((count, *placement.canvas), (1.5, 1.0, 1.0))
    centre, radius = np.array([12.0 * 1.5, 33.0, 26.0]), 12.0
    j, i = np.indices(matrix)
    labels = np.stack(
        [
            (a * 1.5 - centre[0]) ** 2 + (j + s[0] - centre[1]) ** 2 + (i + s[1] - centre[2]) ** 2 < radius**2
            for a, s in zip(along, shift, strict=True)
        ]
    ).astype(np.uint8)
    plan = make_plan(grid, Recipe(size=None), placement)
    got = resampled(labels, plan, resampling, backend, placement)
    index = np.indices(plan.target.shape).reshape(3, -1)
    at = (plan.target.affine[[2, 1, 0], :3] @ index).T + plan.target.affine[[2, 1, 0], 3] - grid.affine[[2, 1, 0], 3]
    distance = np.linalg.norm(at - centre, axis=1).reshape(plan.target.shape)
    # The border is known to within half a slice and half a pixel.
    assert got[distance < radius - 1.1].all()
    assert not got[distance > radius + 1.1].any()
    truth = distance < radius
    dice = 2 * (got.astype(bool) & truth).sum() / (got.astype(bool).sum() + truth.sum())
    assert dice > 0.96


def test_voxel_volumes_extend_half_way_to_the_neighbour_slices() -> None:
    grid = axial((5, 4, 4), (2.0, 0.5, 0.5))  # a layer is 0.5 mm³
    plan = make_plan(grid, Recipe())
    np.testing.assert_allclose(slice_volumes_ml(plan, None), np.full(5, 0.5e-3))
    placement = Placement(np.array([0.0, 1.0, 4.0]), None, (4, 4))
    plan = make_plan(grid, Recipe(), placement)
    np.testing.assert_allclose(slice_volumes_ml(plan, placement), np.array([1.0, 2.0, 2.0]) * 0.5e-3)
