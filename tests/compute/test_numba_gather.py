"""Tests that neighbours picked eight at a time give the same sums, bit by bit, as neighbours loaded one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpuprep.compute import resample_taps
from gpuprep.compute.backend import NumpyBackend
from gpuprep.compute.process import process
from gpuprep.core.geometry import Geometry
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.recipe import Recipe
from gpuprep.core.volume import StoredVolume
from gpuprep.testing import thorax

numba_gather = pytest.importorskip("gpuprep.compute.numba_gather")
numba_kernels = pytest.importorskip("gpuprep.compute.numba_kernels")

needs_permutations = pytest.mark.skipif(not numba_gather.PERMUTES, reason="this processor has no AVX2")


def tables(
    n_in: int, n_out: int, order: int, mode: str = "nearest", grid_mode: bool = True
) -> resample_taps.LineTables:
    """Return the tables of a line without blur."""
    return resample_taps.build(
        n_in, n_out, along=None, order=order, mode=mode, grid_mode=grid_mode, sigma=0.0, blur_mode="nearest"
    )


lines = st.tuples(
    st.integers(4, 300),
    st.integers(8, 400),
    st.sampled_from([1, 3]),
    st.sampled_from([("nearest", True), ("constant", False), ("mirror", True)]),
).map(lambda line: tables(*line[:3], *line[3]))


def gathered(line: Any, some: resample_taps.LineTables, vectors: int) -> Any:
    """Return the sums of a line."""
    out = np.full(some.n_out, np.nan, dtype=np.float32)
    numba_kernels.gather(line, some.start, some.weights_transposed, vectors, out)
    return out


@needs_permutations
@given(lines, st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_eight_sums_at_a_time_equal_single_ones_and_read_nothing_beyond_the_line(
    some: resample_taps.LineTables, seed: int
) -> None:
    assume(some.vectors > 0)
    memory = np.full(some.n_in + 64, np.nan, dtype=np.float32)
    line = memory[32 : 32 + some.n_in]
    line[:] = np.random.default_rng(seed).normal(0, 1000, some.n_in)
    sums = gathered(line, some, some.vectors)
    assert sums.tobytes() == gathered(line, some, 0).tobytes()
    exact = np.array([some.weights[x].astype(float) @ line[s : s + some.taps] for x, s in enumerate(some.start)])
    np.testing.assert_allclose(sums, exact, rtol=0, atol=1e-2)


@given(lines)
@settings(max_examples=200)
def test_all_samples_of_eight_outputs_lie_in_the_vectors_of_the_tables(some: resample_taps.LineTables) -> None:
    assume(some.vectors > 0)
    length = 8 * some.vectors
    for x in range(0, some.n_out, 8):
        outputs = range(min(x, some.n_out - 8), min(x, some.n_out - 8) + 8)
        samples = [int(some.start[q]) + t for q in outputs for t in range(some.taps)]
        first = min(samples[0], some.n_in - length)
        assert first >= 0
        assert first <= min(samples)
        assert max(samples) < first + length


@pytest.mark.parametrize(
    ("n_in", "n_out", "order", "vectors"),
    [
        (349, 512, 1, 1),  # 8 · 349/512 = 5.5, and two samples per output: 7.5 at most
        (512, 349, 3, 2),  # 8 · 512/349 = 11.7, and four samples: 15.3
        (512, 200, 3, 0),  # 20.5: too many for two vectors
        (7, 16, 1, 0),  # a vector would reach beyond the line
        (8, 16, 1, 1),
        (300, 7, 1, 0),  # fewer than eight outputs
    ],
)
def test_number_of_vectors(n_in: int, n_out: int, order: int, vectors: int) -> None:
    assert tables(n_in, n_out, order).vectors == vectors


@needs_permutations
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(dtype="uint8", size=(200, 77)), Recipe(size=None, order=1)])
def test_volumes_are_equal_with_and_without_permutations(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    spacing_mm = (2.5, 0.7, 0.8)
    stored = thorax((9, 96, 90), spacing_mm)
    grid = Geometry(stored.shape, np.diag([*spacing_mm, 1.0])[[2, 1, 0, 3]])
    volume = StoredVolume(stored, np.ones(9), np.full(9, -1024.0), None, grid, HuStatistics())
    resample_taps.build.cache_clear()
    picked = process(volume, recipe, backend=NumpyBackend("loops")).values
    with monkeypatch.context() as patch:
        patch.setattr(resample_taps, "_vectors", lambda *_: 0)
        resample_taps.build.cache_clear()
        single = process(volume, recipe, backend=NumpyBackend("loops")).values
    resample_taps.build.cache_clear()
    assert picked.tobytes() == single.tobytes()
