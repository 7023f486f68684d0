"""Overlap of reading, copies and computation, on a stand-in for a GPU that makes silent errors visible."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import stored_volume
from numpy.typing import NDArray
from standin import DOWNLOAD_S, KERNEL_S, UPLOAD_S, SimulatedGpu

from gpuprep.compute import pinned_transfer
from gpuprep.compute.backend import Engine, NumpyBackend
from gpuprep.compute.process import host_chunks
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.volume import StoredVolume
from gpuprep.errors import DecodeError, DeviceLostError, DeviceMemoryError

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


RECIPES = [
    Recipe(size=(40, 44)),
    Recipe(size=(40, 44), dtype="uint8"),
    Recipe(size=(64, 64), fit="pad", dtype="uint16"),
    Recipe(size=None, dtype="int16"),
    Recipe(size=None, window_hu=None),
    Recipe.from_dict({"base": "classic", "size": [30, 30]}),
    Recipe(spacing_mm=None, size=None, dtype="uint8"),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("engine", ["operators", "ndimage"])
def test_the_stand_in_gives_the_same_values_as_the_cpu(noise: Any, recipe: Recipe, engine: Engine) -> None:
    # 31 slices in slabs of 4 and chunks of 8: every buffer is reused several times, and the last one is partly filled.
    volume = stored_volume(noise((31, 40, 37)), SPACING)
    cpu, foreign = NumpyBackend("matmul"), SimulatedGpu()
    for backend in (cpu, foreign):
        backend.chunk_slices, backend.slab_slices = 8, 4
    expected = run(volume, recipe, cpu, engine)
    values = run(volume, recipe, foreign, engine)
    assert values.dtype == expected.dtype
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("orientation", [(2, 0, 1), (0, 2, 1)])
def test_reoriented_stacks_are_uploaded_in_the_order_of_processing(
    noise: Any, orientation: tuple[int, int, int]
) -> None:
    volume = stored_volume(noise((11, 14, 13)), (1.0, 1.0, 1.0))
    affine = -volume.geometry.affine[:, [*orientation, 3]]
    affine[:, 3] *= -1
    volume = replace(volume, geometry=replace(volume.geometry, affine=affine))
    recipe = Recipe(orient="LPS", size=None, spacing_mm=(0.7, 1.3, 1.0), window_hu=None)
    foreign = SimulatedGpu()
    foreign.slab_slices = 4
    plan = make_plan(volume.geometry, recipe)
    assert any(plan.turn.flips)
    cpu = NumpyBackend("matmul")
    cpu.slab_slices = 4
    np.testing.assert_array_equal(run(volume, recipe, foreign), run(volume, recipe, cpu))


def test_the_stand_in_detects_missing_synchronisation(noise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Shows that the tests above can fail.
    volume = stored_volume(noise((31, 40, 37)), SPACING)
    foreign = SimulatedGpu()
    expected = run(volume, RECIPES[0], NumpyBackend("matmul"))
    with monkeypatch.context() as patched:
        patched.setattr(pinned_transfer, "_completed", lambda _, host: host)
        assert not np.array_equal(run(volume, RECIPES[0], foreign), expected)
    monkeypatch.setattr(pinned_transfer._Buffer, "wait", lambda _: None)
    with pytest.raises(AssertionError, match="overwritten while it was copied up"):
        run(volume, RECIPES[0], foreign)


def test_the_next_slab_is_read_while_the_device_processes_one(
    noise: Any, foreign: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first kernel of each slab waits until reading of the next slab has begun. Without reading ahead it times out.
    volume = stored_volume(noise((24, 10, 10)), SPACING)
    begun = {start: threading.Event() for start in (0, 8, 16, 24)}
    begun[24].set()  # no slab follows the last one
    reading: list[str] = []

    def slab(start: int, stop: int, empty: Any) -> NDArray[Any]:
        reading.append(threading.current_thread().name)
        begun[start].set()
        return volume.slab(start, stop, empty)

    computed = iter((8, 16, 24))
    to_hu = foreign.to_hu

    def compute(*args: Any) -> Any:
        assert begun[next(computed)].wait(60), "nothing is read ahead"
        return to_hu(*args)

    monkeypatch.setattr(foreign, "to_hu", compute)
    values = run(Source(volume, slab), RECIPES[0], foreign)
    np.testing.assert_array_equal(values, run(volume, RECIPES[0], NumpyBackend("matmul")))
    assert all(name.startswith("gpuprep-read") for name in reading)
    assert next(computed, None) is None


def test_a_read_error_is_raised_and_ends_the_reader_thread(noise: Any, foreign: SimulatedGpu) -> None:
    volume = stored_volume(noise((40, 10, 10)), SPACING)

    def slab(start: int, stop: int, empty: Any) -> NDArray[Any]:
        if start == 16:
            raise DecodeError("slice 17 is truncated", "truncated")
        return volume.slab(start, stop, empty)

    with pytest.raises(DecodeError, match="slice 17") as caught:
        run(Source(volume, slab), RECIPES[0], foreign)
    assert caught.value.code == "truncated"
    assert reader_threads() == []


def test_closing_the_iterator_early_ends_the_reader_thread(noise: Any, foreign: SimulatedGpu) -> None:
    volume = stored_volume(noise((64, 10, 10)), SPACING)
    chunks: Iterator[Any] = host_chunks(volume, make_plan(volume.geometry, RECIPES[0]), foreign)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert reader_threads() == []


@pytest.mark.parametrize("engine", ["operators", "ndimage"])
@pytest.mark.parametrize("to_the_end", [True, False])
def test_no_array_outlives_the_session(noise: Any, engine: Engine, to_the_end: bool) -> None:
    # A reference cycle would hold device memory until the next garbage collection, while other processes need it.
    volume = stored_volume(noise((20, 10, 10)), SPACING)
    foreign = SimulatedGpu()
    gc.collect()
    gc.disable()
    try:
        chunks = host_chunks(volume, make_plan(volume.geometry, RECIPES[1]), foreign, engine)
        next(chunks)
        if to_the_end:
            list(chunks)
        del chunks
        alive = [array for array in foreign.arrays if array() is not None]
    finally:
        gc.enable()
    assert len(foreign.arrays) > 5
    assert alive == []


@pytest.mark.parametrize(("slices", "uploads"), [(1, 1), (8, 1), (9, 2), (31, 4)])
def test_the_time_of_each_stage_is_measured_separately(noise: Any, slices: int, uploads: int) -> None:
    # Source and output have 1 mm, so nothing is resampled. Slabs of 8 slices are uploaded, windowed and downloaded.
    volume = stored_volume(noise((slices, 12, 12)), (1.0, 1.0, 1.0))
    seconds: dict[str, float] = {}
    list(host_chunks(volume, make_plan(volume.geometry, Recipe(size=None)), SimulatedGpu(), "operators", seconds))
    downloads = uploads
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
    plan = make_plan(volume.geometry, RECIPES[0])
    list(host_chunks(Source(volume, slab), plan, NumpyBackend("matmul"), "operators", seconds))
    assert all(np.shares_memory(s, volume.stored) for s in given)
    assert seconds == {}


def test_lack_of_memory_and_a_lost_device_are_different_errors(noise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("standin._lost", set())
    volume = stored_volume(noise((9, 30, 30)), SPACING)
    with pytest.raises(DeviceMemoryError, match="out of memory allocating 28800 bytes"):  # 8 × 30 × 30 floats
        run(volume, RECIPES[0], SimulatedGpu(largest=20_000))
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        run(volume, RECIPES[0], SimulatedGpu(lost_at=9))
    assert reader_threads() == []
