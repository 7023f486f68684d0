"""Resampling tables against the matrix from SciPy, and compiled loops against matrix products."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import axial
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from gpuprep.compute import resample_matrix, resample_taps
from gpuprep.compute.backend import NumpyBackend
from gpuprep.compute.process import host_chunks
from gpuprep.compute.slice_summary import Summary, summary
from gpuprep.core.geometry import Placement
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.sampling import lost_samples
from gpuprep.core.volume import StoredVolume

RULES = [("nearest", True), ("constant", False), ("mirror", True)]


def dense(tables: resample_taps.LineTables, samples: int) -> NDArray[np.float64]:
    """Return the matrix that the tables represent, by applying them to unit vectors."""
    values = np.eye(samples)
    if tables.recursion.shape[1]:
        p, q, g = tables.recursion.astype(np.float64)
        for k in range(samples):
            values[k] = p[k] * values[k] - (q[k] * values[k - 1] if k else 0)
        for k in reversed(range(samples - 1)):
            values[k] -= g[k] * values[k + 1]
    matrix = np.zeros((tables.n_out, samples))
    for row, start, weights in zip(matrix, tables.start.astype(int), tables.weights, strict=True):
        row[:] = weights @ values[start : start + tables.taps]
    return matrix


@given(n=st.integers(1, 600), m=st.integers(1, 800))
@example(50, 150)
@example(512, 360)
def test_lost_samples_are_those_that_scipy_leaves_at_zero(n: int, m: int) -> None:
    # Expected values from SciPy, for a line of ones. Whether an output is lost does not depend on the order.
    ones = np.ones((1, n))
    zoomed = ndimage.zoom(ones, (1, m / n), order=1)[0]
    assert lost_samples(n, m, "constant", False).tolist() == np.flatnonzero(zoomed == 0).tolist()
    assert not lost_samples(n, m, "nearest", True).size
    assert not lost_samples(n, m, "mirror", True).size


@settings(max_examples=150)
@given(
    n=st.integers(1, 70),
    m=st.integers(1, 150),
    order=st.sampled_from([0, 1, 2, 3, 5]),
    rule=st.sampled_from(RULES),
    sigma=st.sampled_from([0.0, 0.0, 0.7]),
)
def test_tables_equal_the_matrix_from_scipy(n: int, m: int, order: int, rule: tuple[str, bool], sigma: float) -> None:
    mode, grid_mode = rule
    options: dict[str, Any] = {"order": order, "mode": mode, "grid_mode": grid_mode, "sigma": sigma}
    expected = resample_matrix.matrix(n, m, along=None, blur_mode="nearest", **options)
    tables = resample_taps.build(n, m, along=None, blur_mode="nearest", **options)
    # An error of 3e-7 is 0.001 HU at 4000 HU.
    assert np.abs(dense(tables, n) - expected).max() < 3e-7
    assert (np.diff(tables.start.astype(int)) >= 0).all()  # otherwise slices that were dropped would be requested


def test_cubic_tables_have_four_weights_and_linear_ones_two() -> None:
    options: dict[str, Any] = {"mode": "nearest", "grid_mode": True, "blur_mode": "nearest", "along": None}
    assert resample_taps.build(512, 349, order=3, sigma=0.0, **options).taps == 4
    assert resample_taps.build(349, 512, order=1, sigma=0.0, **options).taps == 2
    assert resample_taps.build(512, 349, order=3, sigma=0.5, **options).taps > 20


@st.composite
def volumes(draw: st.DrawFn) -> StoredVolume:
    shape = draw(st.tuples(st.integers(1, 45), st.integers(2, 40), st.integers(2, 40)))
    spacing_mm = draw(st.tuples(*[st.sampled_from([0.4, 0.7, 1.0, 1.3, 2.5])] * 3))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    stored = rng.integers(-2200, 3000, shape).astype(draw(st.sampled_from([np.int16, np.int32])))
    placement = None
    if shape[0] > 3 and draw(st.booleans()):
        along = np.arange(shape[0]) + rng.uniform(-0.3, 0.3, shape[0])
        placement = Placement(along, None, (shape[1], shape[2]))
    padding = np.tile(np.array([40, 60], dtype=stored.dtype), (shape[0], 1)) if draw(st.booleans()) else None
    slope, intercept = rng.choice([0.5, 1.0, -1.0], shape[0]), np.full(shape[0], -24.0)
    return StoredVolume(
        stored, slope, intercept, padding, axial(shape, spacing_mm), HuStatistics(), placement=placement
    )


@settings(max_examples=80)
@given(
    volume=volumes(),
    order=st.sampled_from([0, 1, 3, 3, 5]),
    align=st.sampled_from(["edge", "corner"]),
    fit=st.sampled_from(["stretch", "crop"]),
    size=st.sampled_from([None, (16, 24), (64, 50)]),
    anti_alias=st.sampled_from(["none", "both"]),
    padding=st.sampled_from(["air", "keep", "minus2000-to-0"]),
    orient=st.sampled_from(["native", "LPS"]),
)
def test_loops_and_matrix_products_give_the_same_volume(volume: StoredVolume, order: int, **fields: Any) -> None:
    recipe = Recipe(order=order, window_hu=(-1000.0, 3000.0), dtype="float32", **fields)
    plan = make_plan(volume.geometry, recipe, volume.placement)

    def processed(body: Any) -> NDArray[Any]:
        return np.concatenate([c.copy() for c in host_chunks(volume, plan, NumpyBackend(body))])

    expected, values = processed("matmul"), processed("loops")
    assert values.shape == plan.target.shape
    assert np.abs(values - expected).max() * 4000 < 0.01  # HU


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_loops_round_as_numpy_does(dtype: Any) -> None:
    # A ramp in HU with values of n + 0.5 in output units: both round half to even.
    stored = np.tile(np.arange(64, dtype=np.int16), (3, 4, 1))
    recipe = Recipe(spacing_mm=None, size=None, dtype=dtype, window_hu=(0.0, 31.875 if dtype == "uint8" else 32.0))
    volume = StoredVolume(stored, np.full(3, 0.0625), np.zeros(3), None, axial(stored.shape, (1, 1, 1)), HuStatistics())
    plan = make_plan(volume.geometry, recipe)
    expected = np.round(np.clip(np.arange(64, dtype=np.float32) / 16, *recipe.window_hu or ()) * np.float32(plan.scale))
    for chunk in host_chunks(volume, plan, NumpyBackend("loops")):
        assert chunk.dtype == dtype
        assert (chunk == expected.astype(dtype)).all()


@given(
    values=st.lists(st.integers(-32768, 32767), min_size=1, max_size=40),
    slope=st.sampled_from([1.0, -1.0, 0.37, 1e-3, 40.0]),
    intercept=st.sampled_from([-1024.0, 0.0, 5000.0, -9000.0]),
    declared=st.one_of(st.none(), st.tuples(st.integers(-3000, 3000), st.integers(-3000, 3000))),
)
def test_the_summary_of_a_slice_equals_a_count_in_python(
    values: list[int], slope: float, intercept: float, declared: tuple[int, int] | None
) -> None:
    padding = None if declared is None else np.array(declared, dtype=np.int16)
    low, high = (1, 0) if declared is None else declared
    outside = sum(v * slope + intercept < -1024 or low <= v <= high for v in values)
    expected = Summary(min(values), max(values), sum(values), outside)
    slice_ = np.array([values], dtype=np.int16)
    for loops in (False, True):
        assert summary(slice_, slope, intercept, padding, loops=loops) == expected


def test_matrix_products_are_used_if_numba_is_disabled() -> None:
    code = "from gpuprep.compute.backend import get_backend; print(get_backend('cpu').body)"
    for switch, body in (("0", "loops"), ("1", "matmul")):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"NUMBA_DISABLE_JIT": switch},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == body


def test_a_damaged_numba_cache_is_ignored(tmp_path: Path) -> None:
    code = (
        "import numpy as np; from gpuprep.compute.slice_summary import summary; "
        "print(summary(np.full((2, 3), 7, np.int16), 1.0, 0.0, None, loops=True))"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    for damage in (b"", b"\x80", b"no pickle"):
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "Summary(low=7, high=7, total=42, padding=0)"
        files = [f for f in tmp_path.rglob("*") if f.is_file()]
        assert files
        for file in files:
            file.write_bytes(damage)


def test_rescaling_rounds_twice_as_numpy_does() -> None:
    # 10240 · 0.7 − 8192 is −1024 if the product is rounded; otherwise it is slightly less and becomes air (−1000 HU).
    stored, slope, intercept = (
        np.full((1, 2, 2), 10240, np.int16),
        np.array([0.7], np.float32),
        np.array([-8192], np.float32),
    )
    expected = np.float32(10240) * np.float32(0.7) + np.float32(-8192)
    assert expected == -1024
    assert (NumpyBackend("loops").to_hu(stored, slope, intercept, None, "air") == expected).all()
