"""The order of copies and kernels: the GPU path gives right values in every order of work that CUDA allows.

Each test runs in several random orders on the simulated machine. Without a wait, or without freeing memory at the right
time and place, values are wrong in some of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from conftest import stored_volume
from numpy.typing import NDArray
from simulated_cuda import Gpu, Machine, simulate

from gpuprep.compute import pinned_transfer
from gpuprep.compute.backend import Engine, NumpyBackend, open_gpus
from gpuprep.compute.process import host_chunks, process
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.volume import StoredVolume

pytestmark = pytest.mark.usefixtures("cupy_on_host")

SPACING = (3.0, 0.7, 0.8)
GPUS = (Gpu("GPU-0", "first"), Gpu("GPU-1", "second"))
RECIPES = [
    Recipe(size=(40, 44), dtype="uint8"),
    Recipe(size=(64, 64), fit="pad", dtype="uint16"),
    Recipe(size=None, window_hu=None),
    Recipe(spacing_mm=None, size=None, dtype="uint8"),
]


def orders(count: int = 10) -> Iterator[None]:
    """Simulate two GPUs with another order of work each time."""
    for seed in range(count):
        simulate(Machine(gpus=GPUS, seed=seed))
        yield


def small_chunks(backend: Any) -> Any:
    """Return a backend whose buffers are used several times by a small volume."""
    backend.chunk_slices, backend.slab_slices = 8, 4
    return backend


def run(volume: StoredVolume, recipe: Recipe, backend: Any, engine: Engine = "operators") -> NDArray[Any]:
    plan = make_plan(volume.geometry, recipe)
    return np.concatenate([chunk.copy() for chunk in host_chunks(volume, plan, backend, engine)])


def worst(volume: StoredVolume, recipe: Recipe, engine: Engine = "operators") -> float:
    """Return the largest difference to the CPU's values in several orders of work; NaN if there are any."""
    expected = run(volume, recipe, small_chunks(NumpyBackend("matmul")), engine).astype(np.float64)
    found = [run(volume, recipe, small_chunks(open_gpus([0])[0]), engine) for _ in orders(5)]
    return float(np.max([np.abs(values - expected).max() for values in found]))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("engine", ["operators", "ndimage"])
def test_values_equal_those_of_the_cpu_in_every_order(noise: Any, recipe: Recipe, engine: Engine) -> None:
    # 31 slices in slabs of 4 and chunks of 8: every buffer is used several times, the last one only in part.
    volume = stored_volume(noise((31, 20, 17)), SPACING)
    # Integers may differ by one step where values round differently.
    assert worst(volume, recipe, engine) <= (1 if recipe.dtype != "float32" else 0.5)


@pytest.mark.parametrize("function", ["a download is not waited for", "a buffer is filled while it is copied up"])
def test_a_missing_wait_gives_wrong_values(noise: Any, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    if "download" in function:
        monkeypatch.setattr(pinned_transfer, "_completed", lambda _, host: host)
    else:
        monkeypatch.setattr(pinned_transfer._Buffer, "wait", lambda _: None)
    assert not worst(stored_volume(noise((31, 20, 17)), SPACING), Recipe(size=None, window_hu=None)) <= 0.5


def sums_of_a_volume_that_is_still_read(noise: Any, ordinal: int) -> list[tuple[float, float]]:
    """Return the expected sum of a volume and the one that another stream computes, for each order of work.

    The volume is deleted before that stream has read it, and two sessions follow.
    """
    cupy = import_module("cupy")
    volume, other = (stored_volume(noise((12, 20, 17), seed), (1.0, 1.0, 1.0)) for seed in range(2))
    recipe = Recipe(size=None, window_hu=None)
    expected = float(process(volume, recipe, backend=NumpyBackend("matmul")).values.sum(dtype=np.float64))
    found = []
    for _ in orders():
        backend = open_gpus([ordinal])[0]
        with cupy.cuda.Device(ordinal):
            stream = cupy.cuda.Stream(non_blocking=True)
        result = process(volume, recipe, backend=backend)
        with cupy.cuda.Device(ordinal), stream:
            total = result.values.sum(dtype=np.float64)
        del result
        for _ in range(2):
            process(other, recipe, backend=backend)
        with cupy.cuda.Device(ordinal), stream:
            found.append((expected, float(total)))
    return found


@pytest.mark.parametrize("ordinal", [0, 1])
def test_a_returned_volume_that_is_still_read_is_not_overwritten(noise: Any, ordinal: int) -> None:
    for expected, found in sums_of_a_volume_that_is_still_read(noise, ordinal):
        assert abs(found - expected) < 1


@pytest.mark.parametrize("ordinal", [0, 1])
def test_without_freed_memory_a_returned_volume_would_be_overwritten(
    noise: Any, monkeypatch: pytest.MonkeyPatch, ordinal: int
) -> None:
    backend = import_module("gpuprep.compute.cupy_backend").CupyBackend
    monkeypatch.setattr(backend, "_free_memory", lambda _: None)
    sums = sums_of_a_volume_that_is_still_read(noise, ordinal)
    assert not all(abs(found - expected) < 1 for expected, found in sums)


def test_the_work_of_a_session_is_done_when_it_has_ended() -> None:
    cupy = import_module("cupy")
    for _ in orders():
        with open_gpus([0])[0].session():
            values = cupy.empty(1000, np.float32)  # the only memory, so none is freed, which would wait
            values[...] = 4
        with cupy.cuda.Stream(non_blocking=True):
            assert float(values.sum()) == 4000


@pytest.mark.parametrize("ordinal", [0, 1])
def test_a_session_leaves_no_memory_on_its_device(noise: Any, ordinal: int) -> None:
    cupy = import_module("cupy")
    simulate(Machine(gpus=GPUS))
    run(stored_volume(noise((12, 20, 17)), SPACING), RECIPES[0], open_gpus([ordinal])[0])
    assert cupy.cuda.Device(0).mem_info[0] == cupy.cuda.Device(1).mem_info[0] == GPUS[0].memory_bytes
