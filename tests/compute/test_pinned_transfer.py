"""Overlap of reading, copies and computation, on a simulated GPU; `test_order_of_work` checks the values."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from conftest import stored_volume
from numpy.typing import NDArray
from simulated_cuda import DOWNLOAD_S, KERNEL_S, UPLOAD_S, Gpu, Machine

from gpuprep.compute.backend import Backend, Engine, NumpyBackend, get_backend
from gpuprep.compute.process import host_chunks
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.volume import StoredVolume
from gpuprep.errors import DecodeError, DeviceLostError, DeviceMemoryError

pytestmark = pytest.mark.usefixtures("cupy_on_host")

SPACING = (3.0, 0.7, 0.8)


class Source:
    """Volume with a replaceable function for reading slabs."""

    def __init__(self, volume: StoredVolume, slab: Callable[..., NDArray[Any]]) -> None:
        self.geometry, self.placement = volume.geometry, volume.placement
        self.slope, self.intercept, self.padding = volume.slope, volume.intercept, volume.padding
        self.slab = slab


def reader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("gpuprep-read")]


def run(source: Any, recipe: Recipe, backend: Any, engine: Engine = "operators") -> NDArray[Any]:
    plan = make_plan(source.geometry, recipe)
    return np.concatenate([chunk.copy() for chunk in host_chunks(source, plan, backend, engine)])


RECIPE = Recipe(size=(40, 44))


@pytest.fixture
def simulated() -> Backend:
    """Return a simulated GPU that processes slabs of 8 slices."""
    backend = get_backend("gpu")
    backend.chunk_slices, backend.slab_slices = 16, 8
    return backend


@pytest.mark.parametrize("orientation", [(2, 0, 1), (0, 2, 1)])
def test_reoriented_stacks_are_uploaded_in_the_order_of_processing(
    noise: Any, simulated: Backend, orientation: tuple[int, int, int]
) -> None:
    volume = stored_volume(noise((11, 14, 13)), (1.0, 1.0, 1.0))
    affine = -volume.geometry.affine[:, [*orientation, 3]]
    affine[:, 3] *= -1
    volume = replace(volume, geometry=replace(volume.geometry, affine=affine))
    recipe = Recipe(orient="LPS", size=None, spacing_mm=(0.7, 1.3, 1.0), window_hu=None)
    plan = make_plan(volume.geometry, recipe)
    assert any(plan.turn.flips)
    assert np.abs(run(volume, recipe, simulated) - run(volume, recipe, NumpyBackend("matmul"))).max() < 0.01


def test_the_next_slab_is_read_while_the_device_processes_one(
    noise: Any, simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first kernel of each slab waits until reading of the next slab has begun. Without reading ahead it times out.
    volume = stored_volume(noise((24, 10, 10)), SPACING)
    begun = {start: threading.Event() for start in (0, 8, 16, 24)}
    begun[24].set()  # no slab follows the last one
    reading: list[str] = []
    slabs: list[NDArray[Any]] = []

    def slab(start: int, stop: int, empty: Any) -> NDArray[Any]:
        reading.append(threading.current_thread().name)
        begun[start].set()
        slabs.append(volume.slab(start, stop, empty))
        return slabs[-1]

    computed = iter((8, 16, 24))
    resample = simulated.resample

    def compute(values: Any, *args: Any, **options: Any) -> None:
        if values.dtype == np.int16:
            assert begun[next(computed)].wait(60), "nothing is read ahead"
        resample(values, *args, **options)

    monkeypatch.setattr(simulated, "resample", compute)
    values = run(Source(volume, slab), RECIPE, simulated)
    assert np.abs(values - run(volume, RECIPE, NumpyBackend("matmul"))).max() < 1e-5
    assert all(name.startswith("gpuprep-read") for name in reading)
    assert not any(np.shares_memory(a, b) for a, b in pairwise(slabs))  # the upload of the first may not have begun
    assert next(computed, None) is None


def test_a_read_error_is_raised_and_ends_the_reader_thread(noise: Any, simulated: Backend) -> None:
    volume = stored_volume(noise((40, 10, 10)), SPACING)

    def slab(start: int, stop: int, empty: Any) -> NDArray[Any]:
        if start == 16:
            raise DecodeError("slice 17 is truncated", "truncated")
        return volume.slab(start, stop, empty)

    with pytest.raises(DecodeError, match="slice 17") as caught:
        run(Source(volume, slab), RECIPE, simulated)
    assert caught.value.code == "truncated"
    assert reader_threads() == []


def test_closing_the_iterator_early_ends_the_reader_thread(noise: Any, simulated: Backend) -> None:
    volume = stored_volume(noise((64, 10, 10)), SPACING)
    chunks: Iterator[Any] = host_chunks(volume, make_plan(volume.geometry, RECIPE), simulated)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert reader_threads() == []


@pytest.mark.parametrize("engine", ["operators", "ndimage"])
@pytest.mark.parametrize("to_the_end", [True, False])
def test_no_array_outlives_the_session(noise: Any, simulated: Backend, engine: Engine, to_the_end: bool) -> None:
    # A reference cycle would hold device memory until the next garbage collection, while other processes need it.
    volume = stored_volume(noise((20, 10, 10)), SPACING)
    pool = import_module("cupy").get_default_memory_pool()
    gc.collect()
    gc.disable()
    try:
        chunks = host_chunks(volume, make_plan(volume.geometry, replace(RECIPE, dtype="uint8")), simulated, engine)
        next(chunks)
        if to_the_end:
            list(chunks)
        else:
            assert pool.used_bytes() > 0
        del chunks
        assert pool.total_bytes() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize(("slices", "uploads"), [(1, 1), (8, 1), (9, 2), (31, 4)])
def test_the_time_of_each_stage_is_measured_separately(
    noise: Any, simulated: Backend, slices: int, uploads: int
) -> None:
    # Source and output have 1 mm, so nothing is resampled. Slabs of 8 slices become HU, and 16 at a time are windowed.
    volume = stored_volume(noise((slices, 12, 12)), (1.0, 1.0, 1.0))
    seconds: dict[str, float] = {}
    list(host_chunks(volume, make_plan(volume.geometry, Recipe(size=None)), simulated, "operators", seconds))
    downloads = -(-slices // 16)
    assert seconds == {
        "upload_s": uploads * UPLOAD_S,
        "kernels_s": (uploads + downloads) * KERNEL_S,
        "download_s": downloads * DOWNLOAD_S,
    }


def test_the_cpu_uses_no_thread_and_no_copy_and_reports_no_transfer_times(noise: Any) -> None:
    volume = stored_volume(noise((9, 10, 10)), SPACING)
    given: list[NDArray[Any]] = []

    def slab(start: int, stop: int) -> NDArray[Any]:
        assert threading.current_thread() is threading.main_thread()
        given.append(volume.slab(start, stop))
        return given[-1]

    seconds: dict[str, float] = {}
    plan = make_plan(volume.geometry, RECIPE)
    list(host_chunks(Source(volume, slab), plan, NumpyBackend("matmul"), "operators", seconds))
    assert all(np.shares_memory(s, volume.stored) for s in given)
    assert seconds == {}


@pytest.mark.parametrize(
    ("cupy_on_host", "error", "message"),
    [
        (Machine(largest_bytes=20_000), DeviceMemoryError, r"Out of memory allocating .* has 10\.00 GB free"),
        (Machine(fatal_value=3001), DeviceLostError, "illegal memory access"),
        (Machine(gpus=(Gpu(memory_bytes=20_000),)), DeviceMemoryError, r"Out of memory .* has 0\.00 GB free"),
    ],
    indirect=["cupy_on_host"],
)
def test_lack_of_memory_and_a_lost_device_are_different_errors(
    noise: Any, simulated: Backend, error: type[Exception], message: str
) -> None:
    stored = noise((9, 40, 40))
    stored[8, 20, 20] = 3001
    with pytest.raises(error, match=message):
        run(stored_volume(stored, SPACING), RECIPE, simulated)
    assert reader_threads() == []
