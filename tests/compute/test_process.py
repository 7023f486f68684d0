"""Resampling, window, resize and quantising against SciPy and scikit-image in float64, on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import axial, stored_volume
from numpy.typing import NDArray
from scipy import ndimage
from simulated_cuda import simulation
from skimage.transform import resize as skimage_resize

from gpuprep.compute.backend import Backend, Engine, NumpyBackend, get_backend
from gpuprep.compute.process import host_chunks, process
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.volume import StoredVolume
from gpuprep.errors import PlanError, RequestError

ENGINES = ["operators", "ndimage"]
SPACING = (3.0, 0.6816, 0.7)
HU_ONLY = Recipe(window_hu=None, size=None, padding="keep")


def run(volume: StoredVolume, recipe: Recipe, backend: Backend, engine: Engine) -> NDArray[Any]:
    plan = make_plan(volume.geometry, recipe)
    return np.concatenate([chunk.copy() for chunk in host_chunks(volume, plan, backend, engine)])


def scipy_hu(stored: NDArray[Any], factors: tuple[float, ...], order: int = 3, **options: Any) -> NDArray[np.float64]:
    return np.asarray(ndimage.zoom(stored.astype(np.float64) - 1024, factors, order=order, **options))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_resampling_equals_scipy_in_float64(noise: Any, backend: Backend, engine: Engine, order: int) -> None:
    # Traps 16, 19: the same grid convention on every backend, and no border of zeros.
    stored = noise((9, 40, 37))
    shape = (27, 27, 26)  # round(9 · 3), round(40 · 0.6816), round(37 · 0.7)
    factors = tuple(m / n for n, m in zip(stored.shape, shape, strict=True))
    expected = scipy_hu(stored, factors, order, mode="nearest", grid_mode=True)
    values = run(stored_volume(stored, SPACING), replace(HU_ONLY, order=order), backend, engine)
    assert values.shape == shape
    assert values.dtype == np.float32
    assert np.abs(values - expected).max() < 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_corner_alignment_equals_scipy_defaults(noise: Any, backend: Backend, engine: Engine) -> None:
    stored = noise((9, 40, 37))
    expected = scipy_hu(stored, (27 / 9, 27 / 40, 26 / 37))
    values = run(stored_volume(stored, SPACING), replace(HU_ONLY, align="corner"), backend, engine)
    assert np.abs(values - expected).max() < 0.01


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [(64, 50), (20, 20), (30, 12)])
def test_classic_recipe_equals_the_library_calls(
    noise: Any, backend: Backend, engine: Engine, size: tuple[int, int]
) -> None:
    # Trap 26: −2000 becomes 0 before rescaling. Sizes grow and shrink; scikit-image anti-aliases the latter.
    stored = noise((9, 40, 37))
    stored[:, :3, :5] = -2000
    image = stored.copy()
    image[image == -2000] = 0
    resampled = scipy_hu(image, (27 / 9, 27 / 40, 26 / 37))
    windowed = np.clip((resampled + 1000) / 1400, 0, 1)
    expected = np.stack([skimage_resize(s, size) for s in windowed])
    recipe = replace(Recipe.preset("classic"), size=size)
    values = run(stored_volume(stored, SPACING), recipe, backend, engine)
    assert np.abs(values - expected).max() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_default_recipe_equals_the_library_calls(noise: Any, backend: Backend, engine: Engine) -> None:
    stored = noise((9, 40, 37))
    resampled = scipy_hu(stored, (27 / 9, 27 / 40, 26 / 37), mode="nearest", grid_mode=True)
    windowed = (np.clip(resampled, -1000, 400) + 1000) / 1400
    expected = np.stack([skimage_resize(s, (64, 48), mode="edge") for s in windowed])
    values = run(stored_volume(stored, SPACING), Recipe(size=(64, 48), padding="keep"), backend, engine)
    assert np.abs(values - expected).max() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_constant_volume_stays_constant(backend: Backend, engine: Engine) -> None:
    # Trap 19.
    stored = np.full((7, 33, 31), 1024 + 40, dtype=np.int16)
    values = run(stored_volume(stored, SPACING), HU_ONLY, backend, engine)
    assert np.abs(values - 40).max() < 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_anti_aliasing_is_applied_only_if_requested(noise: Any, engine: Engine) -> None:
    # Trap 20: white noise must lose contrast, and a ramp must not change.
    recipe = replace(HU_ONLY, spacing_mm=(1.0, 4.0, 4.0), order=1)
    shape = (2, 80, 80)
    sd = {}
    for flag in ("none", "resample"):
        values = run(
            stored_volume(noise(shape), (1.0, 1.0, 1.0)), replace(recipe, anti_alias=flag), NumpyBackend(), engine
        )
        sd[flag] = values.std()
    sigma = (4 - 1) / 2
    filtered = ndimage.gaussian_filter(noise(shape).astype(float), (0, sigma, sigma), mode="nearest")
    expected = ndimage.zoom(filtered, (1, 0.25, 0.25), order=1, mode="nearest", grid_mode=True)
    assert sd["resample"] < 0.5 * sd["none"]
    assert sd["resample"] == pytest.approx(expected.std(), rel=1e-4)
    ramp = np.broadcast_to(np.arange(80, dtype=np.int16) * 10, shape).copy()
    on = run(stored_volume(ramp, (1.0, 1.0, 1.0)), replace(recipe, anti_alias="resample"), NumpyBackend(), engine)
    off = run(stored_volume(ramp, (1.0, 1.0, 1.0)), recipe, NumpyBackend(), engine)
    assert np.abs(on - off)[:, :, 4:-4].max() < 0.01
    assert np.abs(off[0, 0] - (10 * (np.arange(20) * 4 + 1.5) - 1024)).max() < 1e-3  # edge-aligned, by hand


@pytest.mark.parametrize("engine", ENGINES)
def test_anti_aliasing_of_the_resize_can_be_requested_separately(noise: Any, backend: Backend, engine: Engine) -> None:
    stored = noise((3, 40, 40))
    recipe = Recipe(spacing_mm=None, window_hu=None, size=(10, 16), padding="keep", anti_alias="resize")
    hu = stored.astype(np.float64) - 1024
    expected = np.stack([skimage_resize(s, (10, 16), mode="edge", anti_aliasing=True, preserve_range=True) for s in hu])
    values = run(stored_volume(stored, (1.0, 1.0, 1.0)), recipe, backend, engine)
    assert np.abs(values - expected).max() < 0.01


@pytest.mark.parametrize(
    ("dtype", "low", "high", "expected"),
    [
        ("float32", -1000.0, 400.0, [0.0, 0.0, 1000 / 1400, 1.0, 1.0]),
        ("uint8", -1000.0, 400.0, [0, 0, 182, 255, 255]),  # 182.14
        ("uint16", -1000.0, 400.0, [0, 0, 46811, 65535, 65535]),  # 46810.7
        ("int16", -1000.0, 400.0, [-1000, -1000, 0, 400, 400]),
    ],
)
def test_windowed_values_in_each_output_type_equal_values_computed_by_hand(
    backend: Backend, dtype: Any, low: float, high: float, expected: list[float]
) -> None:
    # Trap 28: the window is applied to floats, and quantisation comes last.
    stored = np.broadcast_to(np.array([-976, 24, 1024, 1424, 4095], dtype=np.int16), (2, 3, 5)).copy()
    recipe = Recipe(spacing_mm=None, size=None, window_hu=(low, high), dtype=dtype, padding="keep")
    values = run(stored_volume(stored, (1.0, 1.0, 1.0)), recipe, backend, "operators")
    assert values.dtype == np.dtype(dtype)
    np.testing.assert_allclose(values[1, 2], expected, atol=1e-6)


def test_int16_keeps_hu_beyond_12_bits_up_to_the_limit_of_the_type(backend: Backend) -> None:
    # Trap 21, and HU above 3071: only the output type clips.
    stored = np.array([[[0, 32767, 0, 60000]]], dtype=np.uint16).repeat(2, axis=0)
    recipe = Recipe(spacing_mm=None, size=None, window_hu=None, dtype="int16", padding="keep")
    values = run(stored_volume(stored, (1.0, 1.0, 1.0)), recipe, backend, "operators")
    assert values[0, 0].tolist() == [-1024, 31743, -1024, 32767]


def test_hu_slope_and_intercept_of_the_output_restore_hu(noise: Any) -> None:
    stored = noise((3, 8, 8))
    for dtype, tolerance in (("float32", 1e-3), ("uint8", 1400 / 255 / 2 + 1e-3), ("uint16", 0.011), ("int16", 1e-3)):
        volume = process(
            stored_volume(stored, (1.0, 1.0, 1.0)),
            Recipe(spacing_mm=None, size=None, dtype=dtype),  # type: ignore[arg-type]
            backend="cpu",
        )
        hu = np.asarray(volume).astype(np.float64) * volume.hu_slope + volume.hu_intercept
        assert np.abs(hu - np.clip(stored.astype(float) - 1024, -1000, 400)).max() <= tolerance


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("fit", "size"), [("pad", (9, 12)), ("crop", (3, 4)), ("crop", (9, 4)), ("crop", (5, 7))])
def test_pad_and_crop_keep_voxels_about_the_centre(
    noise: Any, backend: Backend, engine: Engine, fit: Any, size: tuple[int, int]
) -> None:
    stored = noise((2, 5, 7))
    recipe = Recipe(spacing_mm=None, size=size, fit=fit, window_hu=None, padding="keep")
    volume = stored_volume(stored, (2.0, 0.5, 0.7))
    values = run(volume, recipe, backend, engine)
    target = make_plan(volume.geometry, recipe).target
    assert values.shape == (2, *size)
    # Each output voxel that lies on a source voxel has its value; all others are air.
    inverse = np.linalg.inv(volume.geometry.affine)
    for index in np.ndindex(values.shape):
        k, j, i = np.round(inverse[:3, :3] @ target.points_mm(index) + inverse[:3, 3], 6)
        inside = 0 <= j < 5 and 0 <= i < 7
        expected = float(stored[int(k), int(j), int(i)]) - 1024 if inside else -1000.0
        assert values[index] == expected
    # Centred: the numbers of voxels cropped or added on the two sides differ by at most one.
    before = np.array(make_plan(volume.geometry, recipe).offset)
    after = np.array([5, 7]) - np.array(size) - before
    assert np.abs(after - before).max() <= 1


def test_padded_air_is_in_output_units(noise: Any) -> None:
    volume = stored_volume(noise((2, 5, 7)), (1.0, 1.0, 1.0))
    recipe = Recipe(spacing_mm=None, size=(9, 9), fit="pad", window_hu=(-1200, 800), dtype="uint8")
    assert run(volume, recipe, NumpyBackend(), "operators")[0, 0, 0] == round(200 / 2000 * 255)


def test_fit_pad_refuses_to_crop() -> None:
    with pytest.raises(PlanError, match=r"600 × 600 do not fit into 512 × 512.*--fit crop"):
        make_plan(axial((3, 600, 600), (1.0, 1.0, 1.0)), Recipe(fit="pad"))


def test_an_absurdly_large_output_is_refused_when_planning() -> None:
    with pytest.raises(PlanError, match="more than 16384 along an axis"):
        make_plan(axial((3, 512, 512), (3000.0, 1.0, 1.0)), Recipe(spacing_mm=(0.1, 1.0, 1.0)))


def test_padding_becomes_air_before_interpolation(backend: Backend) -> None:
    # Trap 27: an area of −3024 HU beside tissue must not cause ringing: the result equals that for an area of air.
    stored = np.full((4, 24, 24), 1064, dtype=np.int16)
    stored[:, :, :10] = -2000
    air = stored.copy()
    air[air == -2000] = 24
    volume = replace_padding(stored_volume(stored, (2.0, 0.7, 0.7)), (-2000, -2000))
    recipe = replace(HU_ONLY, padding="air")
    values = run(volume, recipe, backend, "operators")
    expected = run(stored_volume(air, (2.0, 0.7, 0.7)), recipe, backend, "operators")
    np.testing.assert_array_equal(values, expected)


def test_undeclared_padding_below_any_ct_number_becomes_air(backend: Backend) -> None:
    # Trap 26: LIDC images are filled with −2048 HU and declare another value.
    stored = np.array([[[-1024, -1, 0, 1, 1024]]], dtype=np.int16).repeat(2, axis=0)
    recipe = Recipe(spacing_mm=None, size=None, window_hu=None)
    values = run(stored_volume(stored, (1.0, 1.0, 1.0)), recipe, backend, "operators")
    assert values[0, 0].tolist() == [-1000, -1000, -1024, -1023, 0]


def test_each_slice_has_its_own_padding_and_rescale(backend: Backend) -> None:
    # Trap 23.
    stored = np.array([[[10, 20]], [[10, 20]], [[10, 20]]], dtype=np.int16)
    base = stored_volume(stored, (1.0, 1.0, 1.0))
    volume = StoredVolume(
        stored, np.array([1.0, 2.5, -1.0]), np.array([-100.0, 0.5, 0.0]),
        np.array([[10, 10], [32767, -32768], [15, 25]], dtype=np.int16), base.geometry, HuStatistics(),
    )  # fmt: skip
    recipe = Recipe(spacing_mm=None, size=None, window_hu=None)
    values = run(volume, recipe, backend, "operators")
    assert values[:, 0].tolist() == [[-1000, -80], [25.5, 50.5], [-10, -1000]]


def test_axes_with_an_unchanged_size_are_not_resampled(noise: Any, backend: Backend) -> None:
    # No prefilter and no rounding: values are bit-identical.
    stored = noise((5, 30, 30))
    recipe = replace(HU_ONLY, spacing_mm=(1.0, 0.999, 1.001), dtype="int16")
    values = run(stored_volume(stored, (1.0, 1.0, 1.0)), recipe, backend, "operators")
    np.testing.assert_array_equal(values, stored - 1024)


@pytest.mark.usefixtures("cupy_on_host")
@pytest.mark.parametrize("engine", ENGINES)
def test_integers_are_uploaded_once_and_each_chunk_is_downloaded_once(noise: Any, engine: Engine) -> None:
    stored, gpu = noise((9, 40, 37)), get_backend("gpu")
    simulation().copies.clear()
    values = run(stored_volume(stored, SPACING), Recipe(size=(16, 16)), gpu, engine)
    assert values.shape == (27, 16, 16)
    up = [t for t in simulation().copies if t[0] == "up"]
    integers = [t for t in up if t[1] == "int16"]
    assert sum(t[2][0] for t in integers) == 9
    assert all(t[2][1:] == (40, 37) for t in integers)
    assert max(np.prod(t[2]) for t in up if t[1] != "int16") <= 1000  # the other uploads are tables
    down = [t for t in simulation().copies if t[0] == "down"]
    assert sum(t[2][0] for t in down) == 27
    assert all(t[1] == "float32" and t[2][1:] == (16, 16) for t in down)


@pytest.mark.parametrize("align", ["edge", "corner"])
@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (7.0, 1.6, 0.4), (0.9, 3.0, 3.0)])
def test_engines_agree_with_anti_aliasing_everywhere(
    noise: Any, gpu: Backend, align: Any, order: int, spacing: tuple[float, float, float]
) -> None:
    # Each axis shrinks and grows; there are more slices than the sliding window of the operators holds.
    volume = stored_volume(noise((90, 21, 24)), (2.5, 0.8, 0.7))
    recipe = Recipe(
        spacing_mm=spacing, align=align, order=order, anti_alias="both", window_hu=None, size=(9, 40), padding="keep"
    )
    gpu.chunk_slices, gpu.slab_slices = 16, 3
    expected = run(volume, recipe, NumpyBackend(), "ndimage")
    for backend in (NumpyBackend("matmul"), NumpyBackend("loops"), gpu):
        assert np.abs(run(volume, recipe, backend, "operators") - expected).max() < 0.01


def test_results_do_not_depend_on_the_chunk_size(noise: Any) -> None:
    volume = stored_volume(noise((40, 30, 31)), (2.0, 0.7, 1.3))
    backend = NumpyBackend("matmul")
    whole = np.asarray(process(volume, HU_ONLY, backend=backend))
    for chunk, slab in ((1, 1), (7, 3), (1000, 1000)):
        backend.chunk_slices, backend.slab_slices = chunk, slab
        np.testing.assert_allclose(np.asarray(process(volume, HU_ONLY, backend=backend)), whole, atol=1e-3)


def test_a_processed_volume_supports_dlpack_and_numpy(noise: Any) -> None:
    volume = process(stored_volume(noise((3, 8, 8)), (1.0, 1.0, 1.0)), Recipe(size=None), backend="cpu")
    assert np.shares_memory(np.from_dlpack(volume), volume.values)
    assert np.asarray(volume) is not None
    assert volume.shape == (3, 8, 8)
    assert volume.spacing_mm == (1.0, 1.0, 1.0)


def test_an_unknown_engine_is_refused(noise: Any) -> None:
    with pytest.raises(RequestError, match="there is no engine 'numba'"):
        process(stored_volume(noise((3, 8, 8)), (1.0, 1.0, 1.0)), engine="numba", backend="cpu")  # type: ignore[arg-type]


def replace_padding(volume: StoredVolume, padding: tuple[int, int]) -> StoredVolume:
    pairs = np.tile(np.array(padding, dtype=volume.stored.dtype), (len(volume.stored), 1))
    return replace(volume, padding=pairs)
