"""Predicted device and host memory against the traced memory of the same computation on the host."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import axial, stored_volume

from gpuprep.compute.backend import Engine, NumpyBackend
from gpuprep.compute.memory_estimate import (
    CONTEXT_BYTES,
    device_bytes,
    host_bytes,
    host_bytes_free,
    volume_memory_bytes,
    worker_count,
)
from gpuprep.compute.process import host_chunks
from gpuprep.core.geometry import Placement
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe


class Fused(NumpyBackend):
    """CPU backend whose element-wise passes allocate only their result, like the fused kernels of a GPU."""

    def to_hu(self, stored: Any, slope: Any, intercept: Any, padding: Any, rule: str) -> Any:
        out = np.empty(stored.shape, np.float32)
        for k in range(len(stored)):
            row = slice(k, k + 1)
            declared = None if padding is None else padding[row]
            out[row] = super().to_hu(stored[row], slope[row], intercept[row], declared, rule)
        return out

    def finish(self, values: Any, window: Any, dtype: str) -> Any:
        if window is None and dtype == "float32":
            return values
        out = np.empty(values.shape, dtype)
        for k in range(len(values)):
            out[k] = super().finish(values[k], window, dtype)
        return out


def peak_bytes(shape: tuple[int, int, int], spacing: Any, recipe: Recipe, backend: NumpyBackend, engine: Engine) -> int:
    volume = stored_volume(np.zeros(shape, np.int16), spacing)
    plan = make_plan(volume.geometry, recipe)
    for _ in host_chunks(volume, plan, backend, engine):  # fills the cache of operators, which is not device memory
        pass
    tracemalloc.start()
    try:
        for _ in host_chunks(volume, plan, backend, engine):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("shape", "spacing", "recipe"),
    [
        ((60, 128, 128), (3.0, 0.6816, 0.6816), Recipe(size=(128, 128))),
        ((60, 128, 128), (3.0, 0.6816, 0.6816), Recipe(size=(128, 128), dtype="uint8")),
        ((60, 96, 96), (1.0, 2.0, 2.0), Recipe(size=None, dtype="int16")),
        ((40, 96, 112), (2.0, 0.5, 0.5), Recipe(size=(200, 200), fit="pad", dtype="uint16", anti_alias="both")),
        ((90, 128, 128), (1.0, 1.0, 1.0), Recipe(size=None)),
    ],
)
@pytest.mark.parametrize("engine", ["operators", "ndimage"])
def test_predicted_device_memory_is_at_most_four_times_the_traced_memory(
    shape: tuple[int, int, int], spacing: Any, recipe: Recipe, engine: Engine
) -> None:
    backend = Fused("matmul")
    backend.chunk_slices, backend.slab_slices = 32, 16
    plan = make_plan(axial(shape, spacing), recipe)
    predicted = device_bytes(plan, backend, engine)
    traced = peak_bytes(shape, spacing, recipe, backend, engine)
    # The host makes no copies for `matmul`, has no padding for a prefilter, and holds the integers once.
    assert traced <= predicted <= 4 * traced, (traced, predicted)


@pytest.mark.parametrize(
    ("shape", "spacing", "recipe", "engine"),
    [
        ((60, 256, 256), (3.0, 0.6816, 0.6816), Recipe(size=(256, 256)), "operators"),
        ((60, 256, 256), (3.0, 0.6816, 0.6816), Recipe(size=(256, 256), dtype="uint8"), "operators"),
        ((200, 256, 256), (0.7, 0.7, 0.7), Recipe(dtype="uint8"), "operators"),
        ((40, 200, 200), (1.25, 1.97, 1.97), Recipe(size=None), "operators"),
        ((60, 256, 256), (3.0, 0.7, 0.7), Recipe(order=5), "operators"),
        ((40, 96, 96), (3.0, 0.6816, 0.6816), Recipe(size=(96, 96)), "ndimage"),
        ((40, 96, 96), (1.25, 1.5, 1.5), Recipe(size=(96, 96), dtype="uint8"), "ndimage"),
    ],
)
def test_predicted_host_memory_is_within_25_percent_of_the_traced_memory(
    shape: tuple[int, int, int], spacing: Any, recipe: Recipe, engine: Engine
) -> None:
    backend = NumpyBackend("loops")
    predicted = host_bytes(make_plan(axial(shape, spacing), recipe), backend, engine)
    # Unlike with the reader, the whole series is in memory here, and slices are views of it.
    traced = peak_bytes(shape, spacing, recipe, backend, engine)
    assert 0.75 * traced <= predicted <= 1.25 * traced, (traced, predicted)


def test_free_host_memory_is_positive_and_at_most_the_total() -> None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("no /proc/meminfo: not Linux")
    total = 1024 * int(meminfo.read_text().split("MemTotal:")[1].split()[0])
    free = host_bytes_free()
    assert free is not None
    assert 0 < free <= total


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable:\n", "MemAvailable: many kB\n"])
def test_free_host_memory_is_none_if_it_cannot_be_read(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: text)
    assert host_bytes_free() is None


def test_smaller_chunks_need_less_memory() -> None:
    plan = make_plan(axial((400, 512, 512), (1.25, 0.7, 0.7)), Recipe(dtype="uint8"))
    backend = NumpyBackend("matmul")
    predictions = []
    for divisor in (1, 4, 64):
        backend.chunk_slices, backend.slab_slices = 64 // divisor, max(1, 32 // divisor)
        predictions.append(device_bytes(plan, backend, "operators"))
    first, second, third = predictions
    assert third < second / 2 < first / 4
    # The estimate does not grow with the number of slices …
    longer = make_plan(axial((4000, 512, 512), (1.25, 0.7, 0.7)), Recipe(dtype="uint8"))
    assert device_bytes(longer, backend, "operators") < 1.05 * third
    # … except for the engine "ndimage", which holds the whole volume in float32 before and after resampling.
    assert device_bytes(longer, backend, "ndimage") > 4 * (4000 * 512 * 512 + 5000 * 358 * 358)


def test_a_stack_with_another_slice_axis_is_held_whole() -> None:
    geometry = axial((300, 256, 256), (1.0, 1.0, 1.0))
    coronal = replace(geometry, affine=geometry.affine[:, [1, 0, 2, 3]])
    plan = make_plan(coronal, Recipe(orient="LPS"))
    assert plan.turn.axes[0] != 0
    assert device_bytes(plan, NumpyBackend("matmul"), "operators") > 4 * 300 * 256 * 256


def test_uneven_stacks_have_an_estimate() -> None:
    grid = axial((100, 64, 64), (1.0, 1.0, 1.0))
    along = np.sort(np.concatenate([[0.0, 99.0], np.random.default_rng(0).uniform(0, 99, 60)]))
    plan = make_plan(grid, Recipe(size=None), Placement(along, None, (64, 64)))
    assert device_bytes(plan, NumpyBackend("matmul"), "operators") > 0


@pytest.mark.parametrize(
    ("free_gb", "wanted", "expected"),
    [(140, 16, 16), (8, 16, 5), (1, 16, 1), (8, 2, 2)],  # 0.8 · 8 GB / 2 / 0.63 GB = 5.09
)
def test_cuda_contexts_take_at_most_half_of_the_usable_memory(free_gb: int, wanted: int, expected: int) -> None:
    free = free_gb * 10**9
    assert worker_count(free, wanted) == expected
    left = volume_memory_bytes(free, expected)
    assert left == max(0, int(0.8 * free) - expected * CONTEXT_BYTES)
    assert expected == 1 or left >= 0.4 * free
