"""The GPU path, on a GPU or on a simulated one.

On a machine with a GPU, `python -m pytest -m gpu` also runs all tests with the fixture `backend` on the GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import axial, stored_volume
from numpy.typing import NDArray
from scipy import ndimage
from simulated_cuda import Gpu, simulation
from skimage.transform import resize as skimage_resize

from gpuprep.compute.backend import Engine, NumpyBackend, get_backend
from gpuprep.compute.memory_estimate import device_bytes
from gpuprep.compute.process import host_chunks
from gpuprep.core.geometry import Placement
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.volume import StoredVolume
from gpuprep.errors import DeviceMemoryError
from gpuprep.pipeline.cohort import convert
from gpuprep.testing import thorax, write_series

pytestmark = pytest.mark.gpu

SPACING = (3.0, 0.6816, 0.6816)
ENGINES = ("operators", "ndimage")
TOLERANCE_HU = {"operators": 0.01, "ndimage": 0.5}


@pytest.fixture
def without_values(gpu: Any) -> None:
    """Let a simulated GPU skip its work, so that large volumes take no time."""
    if is_simulated(gpu):
        simulation().computes = False


def is_simulated(gpu: Any) -> bool:
    return bool(gpu.device.startswith(Gpu().name))


@pytest.fixture
def cupy(gpu: Any) -> Any:  # noqa: ARG001 - skipped without a GPU
    return import_module("cupy")


@pytest.fixture
def pool(cupy: Any) -> Iterator[Any]:
    """CuPy's memory pool, empty and without a limit before and after the test."""
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    yield pool
    pool.set_limit(size=0)
    pool.free_all_blocks()


def run(volume: StoredVolume, recipe: Recipe, backend: Any, engine: Engine) -> NDArray[Any]:
    plan = make_plan(volume.geometry, recipe, volume.placement)
    return np.concatenate([chunk.copy() for chunk in host_chunks(volume, plan, backend, engine)])


@pytest.fixture(scope="module")
def chest() -> StoredVolume:
    return stored_volume(thorax((40, 48, 52), (3.0, 3.4, 3.4)), (3.0, 1.8, 1.8))


HU = Recipe(window_hu=None, size=None)


@pytest.mark.parametrize("align", ["edge", "corner"])
@pytest.mark.parametrize("engine", ENGINES)
def test_hu_equal_those_of_the_cpu(gpu: Any, chest: StoredVolume, engine: Engine, align: Any) -> None:
    recipe = replace(HU, align=align)
    values = run(chest, recipe, gpu, engine)
    expected = run(chest, recipe, NumpyBackend("matmul"), engine)
    assert np.abs(values - expected).max() <= TOLERANCE_HU[engine]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((50, 9, 8), (3.0, 1.0, 1.0)),  # SciPy leaves the last slice at 0
        ((3, 512, 24), (1.0, 0.703125, 1.0)),  # CuPy's float32 positions would leave the last row at 0
        ((3, 24, 512), (1.0, 1.0, 0.703125)),
        ((50, 512, 7), (3.0, 0.703125, 2.0)),
    ],
)
def test_the_classic_zoom_leaves_the_same_planes_at_zero_as_scipy(
    gpu: Any, engine: Engine, shape: Any, spacing: Any, order: int
) -> None:
    stored = np.full(shape, 324, np.int16)  # −700 HU
    recipe = replace(Recipe.preset("classic"), size=None, window_hu=None, order=order)
    values = run(stored_volume(stored, spacing), recipe, gpu, engine)
    factors = [m / n for n, m in zip(shape, values.shape, strict=True)]
    expected = ndimage.zoom(np.full(shape, -700.0), factors, order=order)
    np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE_HU[engine])


@pytest.mark.parametrize("engine", ENGINES)
def test_hu_equal_those_of_scipy_in_float64(gpu: Any, chest: StoredVolume, engine: Engine) -> None:
    # The expected values use SciPy alone; `padding="keep"` leaves the padding as it is.
    values = run(chest, replace(HU, padding="keep"), gpu, engine)
    factors = [m / n for n, m in zip(chest.stored.shape, values.shape, strict=True)]
    hu = chest.stored.astype(np.float64) - 1024
    expected = ndimage.zoom(hu, factors, order=3, mode="nearest", grid_mode=True)
    assert np.abs(values - expected).max() <= TOLERANCE_HU[engine]


def test_the_classic_recipe_equals_the_library_calls(gpu: Any, noise: Any) -> None:
    stored = noise((9, 40, 37))
    resampled = ndimage.zoom(stored.astype(np.float64) - 1024, (3.0, 27 / 40, 25 / 37), order=3)
    windowed = np.clip((resampled + 1000) / 1400, 0, 1)
    expected = np.stack([skimage_resize(s, (64, 50)) for s in windowed])
    recipe = replace(Recipe.preset("classic"), size=(64, 50))
    values = run(stored_volume(stored, SPACING), recipe, gpu, "operators")
    assert np.abs(values - expected).max() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "uint8", "uint16", "int16"])
def test_two_runs_are_bit_identical_in_every_dtype(gpu: Any, chest: StoredVolume, dtype: Any, engine: Engine) -> None:
    recipe = Recipe(dtype=dtype, size=(100, 110))
    first, second = (run(chest, recipe, gpu, engine) for _ in range(2))
    assert first.dtype == np.dtype(dtype)
    assert first.tobytes() == second.tobytes()
    expected = run(chest, recipe, NumpyBackend("matmul"), engine).astype(np.float64)
    # Integers may differ by one step where values round differently.
    hu_per_unit = 1400 / {"float32": 1.0, "uint8": 255.0, "uint16": 65535.0, "int16": 1400.0}[dtype]
    step = 0 if dtype == "float32" else 1
    assert np.abs(first - expected).max() <= TOLERANCE_HU[engine] / hu_per_unit + step


@pytest.mark.parametrize("stored_type", ["int16", "uint16", "int32"])
@pytest.mark.parametrize("rule", ["air", "keep", "minus2000-to-0"])
def test_padding_and_rescale_are_bit_identical_to_the_cpu(gpu: Any, noise: Any, stored_type: str, rule: Any) -> None:
    stored = (noise((7, 19, 23)) + (0 if stored_type == "uint16" else -2100)).astype(stored_type)
    base = stored_volume(stored, (1.0, 1.0, 1.0))
    padding = np.array([[5, 40]] * 3 + [[1, 0]] * 4, dtype=stored_type)
    volume = replace(base, slope=np.linspace(0.7, 1.3, 7), intercept=np.linspace(-1024, -8, 7), padding=padding)
    recipe = Recipe(spacing_mm=None, size=None, window_hu=None, padding=rule)
    values = run(volume, recipe, gpu, "operators")
    np.testing.assert_array_equal(values, run(volume, recipe, NumpyBackend("matmul"), "operators"))


def shapes() -> list[tuple[int, int, int]]:
    """Return twenty different shapes of volumes."""
    return [(20 + 3 * n, 64 + 5 * n, 90 - 2 * n) for n in range(20)]


def kernels_of(recipe: dict[str, Any]) -> list[int]:
    """Return the number of compiled kernels after each shape; for a fresh process."""
    compiler = import_module("cupy").cuda.compiler
    original, sources = compiler._compile_module_with_cache, []

    def count(source: str, *args: Any, **options: Any) -> Any:
        sources.append(source)
        return original(source, *args, **options)

    compiler._compile_module_with_cache = count
    backend, counts = get_backend("gpu"), []
    if is_simulated(backend):
        simulation().computes = False
    for shape in shapes():
        stored = np.random.default_rng(0).integers(0, 3000, shape).astype(np.int16)
        volume = stored_volume(stored, (2.5, 0.7 + shape[0] / 1000, 0.8))
        run(volume, Recipe.from_dict(recipe), backend, "operators")
        counts.append(len(sources))
    return counts


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(dtype="uint8"), Recipe(size=(300, 300), fit="pad", dtype="int16")])
def test_no_kernel_is_compiled_for_a_shape(recipe: Recipe) -> None:
    code = f"import json, test_gpu; print(json.dumps(test_gpu.kernels_of({recipe.to_dict()!r})))"
    path = os.pathsep.join([*sys.path, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    counts = json.loads(done.stdout)
    # Stored values to HU, HU to HU, and HU to the output type.
    assert 0 < counts[0] == counts[-1] <= 3, counts


def test_lack_of_memory_is_reported_and_all_memory_is_freed(gpu: Any, pool: Any, chest: StoredVolume) -> None:
    pool.set_limit(size=2**20)
    with pytest.raises(DeviceMemoryError, match=r"Out of memory allocating .* GB free"):
        run(chest, HU, gpu, "operators")
    assert pool.total_bytes() == 0
    pool.set_limit(size=0)
    assert run(chest, HU, gpu, "operators").shape[0] == 120


def test_memory_is_freed_wherever_it_ends_though_the_error_is_kept(gpu: Any, pool: Any, noise: Any) -> None:
    volume = stored_volume(noise((9, 10, 12)), (2.0, 1.0, 1.0))
    gpu.chunk_slices = gpu.slab_slices = 8
    plan = make_plan(volume.geometry, Recipe(size=(20, 22)))
    errors = []
    for limit in range(512, 100_000, 1024):
        pool.set_limit(size=limit)
        try:
            for _ in host_chunks(volume, plan, gpu):
                pass
        except DeviceMemoryError as exc:
            errors.append(exc)
        assert pool.total_bytes() == 0, limit
    assert 10 < len(errors) < 97


def test_smaller_chunks_fit_where_larger_ones_do_not(gpu: Any, pool: Any, chest: StoredVolume) -> None:
    plan = make_plan(chest.geometry, HU)
    expected = run(chest, HU, gpu, "operators")
    large = device_bytes(plan, gpu, "operators")
    gpu.chunk_slices, gpu.slab_slices = 1, 1
    small = device_bytes(plan, gpu, "operators")
    assert small < large / 2
    pool.free_all_blocks()
    pool.set_limit(size=(small + large) // 2)
    assert np.abs(run(chest, HU, gpu, "operators") - expected).max() <= TOLERANCE_HU["operators"]


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(dtype="uint8"), Recipe(size=None, spacing_mm=(1.0, 0.5, 0.5))])
def test_the_predicted_memory_is_within_a_third_above_the_peak(
    gpu: Any, cupy: Any, pool: Any, noise: Any, recipe: Recipe, engine: Engine
) -> None:
    if is_simulated(gpu) and engine == "ndimage":
        pytest.skip("CuPy's library functions allocate arrays that the stand-in does not")
    volume = stored_volume(noise((108, 512, 512)), SPACING)
    plan = make_plan(volume.geometry, recipe)
    run(volume, recipe, gpu, engine)  # cuBLAS and the kernels keep their memory
    pool.free_all_blocks()

    most = peak_bytes(cupy, pool, lambda: run(volume, recipe, gpu, engine))
    predicted = device_bytes(plan, gpu, engine)
    assert most <= predicted <= most / 0.75, (most, predicted)


def peak_bytes(cupy: Any, pool: Any, work: Callable[[], Any]) -> int:
    """Return the most memory that arrays on the device take during some work."""

    class Peak(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "peak"
        most = 0

        def malloc_postprocess(self, **_: Any) -> None:
            Peak.most = max(Peak.most, pool.used_bytes())

    with Peak():
        work()
    return Peak.most


COARSE = Recipe(spacing_mm=(2.0, 2.0, 2.0), size=None, window_hu=None)
DENSE = np.concatenate([np.linspace(0, 2, 41), np.arange(3, 40)])
"""Positions of slices: many close together, then one per layer of the grid."""
SIDEWAYS = np.stack([np.linspace(0, 3, 40), np.linspace(2, 0, 40)], axis=1)


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("chunk", [1, 9, 64])
@pytest.mark.parametrize("orient", ["native", "LPS"])
@pytest.mark.parametrize(
    ("recipe", "placement"),
    [
        (replace(COARSE, spacing_mm=(1.0, 0.7, 0.7)), None),
        (replace(COARSE, size=(120, 120)), None),
        (COARSE, Placement(DENSE, None, (60, 64))),
        (COARSE, Placement(np.arange(40.0), SIDEWAYS, (60, 64))),
    ],
    ids=["finer", "resized", "dense slices", "shifted slices"],
)
def test_the_predicted_memory_of_odd_stacks_and_chunks_is_not_under_the_peak(
    gpu: Any, cupy: Any, pool: Any, recipe: Recipe, placement: Placement | None, orient: Any, chunk: int
) -> None:
    grid = axial((40, 60, 64) if placement is None else (40, *placement.canvas), (1.0, 1.0, 1.0))
    coronal = replace(grid, affine=grid.affine[:, [1, 0, 2, 3]])
    count = 40 if placement is None else len(placement.along)
    ones = np.ones(count)
    stored = np.zeros((count, 60, 64), np.int16)
    volume = StoredVolume(stored, ones, ones, None, coronal, HuStatistics(), placement=placement)
    recipe = replace(recipe, orient=orient)
    gpu.chunk_slices, gpu.slab_slices = chunk, max(1, chunk // 2)
    most = peak_bytes(cupy, pool, lambda: run(volume, recipe, gpu, "operators"))
    assert most <= device_bytes(make_plan(coronal, recipe, placement), gpu, "operators")


def test_a_session_frees_its_memory_at_the_end(gpu: Any, pool: Any, chest: StoredVolume) -> None:
    # Other processes share the device.
    for _ in range(3):
        run(chest, Recipe(size=(64, 64)), gpu, "operators")
        assert pool.total_bytes() == 0


def test_the_times_of_all_stages_are_reported(gpu: Any, chest: StoredVolume) -> None:
    seconds: dict[str, float] = {}
    for _ in host_chunks(chest, make_plan(chest.geometry, Recipe(size=(64, 64))), gpu, "operators", seconds):
        pass
    assert set(seconds) == {"upload_s", "kernels_s", "download_s"}
    assert all(s > 0 for s in seconds.values())


def test_the_command_converts_a_cohort_on_the_gpu(gpu: Any, tmp_path: Path) -> None:
    for n in range(5):
        shape = (24 + n, 40, 44)
        write_series(tmp_path / "dicom" / f"p{n}", thorax(shape, (2.5, 3.0, 3.0), seed=n), (2.5, 3.0, 3.0))
    os.truncate(next((tmp_path / "dicom" / "p4").iterdir()), 2500)
    options = ["--size", "128", "--dtype", "uint8", "--jobs", "2", "--quiet"]
    command = [sys.executable, "-m", "gpuprep", "convert", str(tmp_path / "dicom"), "--out", str(tmp_path / "gpu")]
    done = subprocess.run([*command, "--backend", "gpu", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # one series is truncated
    on_cpu = convert(tmp_path / "dicom", tmp_path / "cpu", Recipe(size=(128, 128), dtype="uint8"), backend="cpu")
    again = convert(tmp_path / "dicom", tmp_path / "gpu", Recipe(size=(128, 128), dtype="uint8"), backend="gpu")
    assert again.counts["skipped"] == 4
    skipped = [r for r in again.results if r.status == "skipped"]
    assert {(r.backend, r.device) for r in skipped} == {("gpu", gpu.device)}
    assert all(r.kernels_s and r.upload_s and r.download_s for r in skipped)
    assert on_cpu.counts == {"ok": 4, "rejected": 1}
    names = sorted(p.relative_to(tmp_path / "cpu") for p in (tmp_path / "cpu").rglob("*.tif"))
    assert names == sorted(p.relative_to(tmp_path / "gpu") for p in (tmp_path / "gpu").rglob("*.tif"))
    for name in names:
        cpu, on_gpu = (tifffile.imread(tmp_path / which / name).astype(int) for which in ("cpu", "gpu"))
        assert np.abs(cpu - on_gpu).max() <= 1


def test_a_reoriented_stack_fits_into_its_predicted_memory(gpu: Any, pool: Any, noise: Any) -> None:
    geometry = axial((90, 120, 130), (1.0, 1.0, 1.0))
    coronal = replace(geometry, affine=geometry.affine[:, [1, 0, 2, 3]])
    volume = replace(stored_volume(noise((90, 120, 130)), (1.0, 1.0, 1.0)), geometry=coronal)
    recipe = Recipe(orient="LPS", size=None, window_hu=None)
    pool.set_limit(size=int(1.3 * device_bytes(make_plan(coronal, recipe), gpu, "operators")))
    np.testing.assert_array_equal(
        run(volume, recipe, gpu, "operators"), run(volume, recipe, NumpyBackend("matmul"), "operators")
    )
