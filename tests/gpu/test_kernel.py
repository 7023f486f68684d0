"""The CUDA kernel, compiled by g++ and executed thread by thread, against float64 SciPy and NumPy.

Mutations of its source have to fail the same checks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from cuda_on_host import COMPILER, KernelFault, compile_kernel, virtual_array
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpuprep.compute import cuda_kernels, resample_blocks, resample_matrix
from gpuprep.compute.cuda_kernels import LANES, ROWS, STORED_TYPES, VARIANTS, Rescale, Window
from gpuprep.compute.resample_blocks import OUTPUTS, BlockTables

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")

CUBIC: dict[str, Any] = {
    "along": None, "order": 3, "mode": "nearest", "grid_mode": True, "sigma": 0.0, "blur_mode": "nearest"
}  # fmt: skip


def run(
    values: NDArray[Any], out: NDArray[Any], tables: BlockTables, *, source: str = "", seed: int = 0, **options: Any
) -> None:
    """Launch the kernel, or a mutation of it, as `CupyBackend` does."""
    variant = cuda_kernels.variant(values.dtype, out.dtype)
    kernel = compile_kernel(source or cuda_kernels.SOURCE, cuda_kernels.NAME, variant.options)
    arguments = cuda_kernels.arguments(values, out, tables, **options)
    kernel(cuda_kernels.grid(values.shape, tables.n_out), cuda_kernels.BLOCK, arguments, seed=seed)


def poisoned(shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
    """Return an array with NaN or −7 in it, so that values that are not written show."""
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else np.array(-7).astype(dtype), dtype)


def noise(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1024, 3000, shape).astype(np.float32)


def along_rows(values: NDArray[Any], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values of shape (outer, rows, inner), resampled in float64."""
    return np.asarray(np.einsum("qr,orc->oqc", matrix, values.astype(np.float64)))


def check_resampling(
    shape: tuple[int, int, int], outputs: int, *, source: str = "", seed: int = 0, transposed: bool = False, **step: Any
) -> None:
    """Compare with the matrix from SciPy. Float32 holds 4000 HU to 2.4e-4; the sums have up to 28 terms."""
    step = CUBIC | step
    values = noise(shape, seed)
    matrix = resample_matrix.matrix(shape[1], outputs, **step)
    expected = along_rows(values, matrix)
    expected = expected.transpose(0, 2, 1) if transposed else expected
    out = poisoned(expected.shape)
    run(values, out, resample_blocks.build(shape[1], outputs, **step), source=source, seed=seed, transposed=transposed)
    assert np.abs(out - expected).max() < 0.003


sizes = st.integers(1, 70)


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), sizes, sizes),
    outputs=st.integers(1, 140),
    order=st.sampled_from([0, 1, 3, 3, 5]),
    rule=st.sampled_from([("nearest", True), ("constant", False), ("mirror", True)]),
    sigma=st.sampled_from([0.0, 0.0, 1.3]),
    transposed=st.booleans(),
    seed=st.integers(0, 10**6),
)
@example(shape=(1, 1, 1), outputs=1, order=3, rule=("nearest", True), sigma=0.0, transposed=True, seed=1)
@example(shape=(1, 1, 33), outputs=65, order=3, rule=("nearest", True), sigma=0.0, transposed=True, seed=2)
@example(shape=(2, 65, 1), outputs=1, order=3, rule=("nearest", True), sigma=0.0, transposed=False, seed=3)
@example(shape=(1, 50, 32), outputs=150, order=3, rule=("constant", False), sigma=0.0, transposed=False, seed=4)
def test_any_shape_is_resampled_as_by_scipy(
    shape: Any, outputs: int, order: int, rule: tuple[str, bool], sigma: float, transposed: bool, seed: int
) -> None:
    step: dict[str, Any] = {"order": order, "mode": rule[0], "grid_mode": rule[1], "sigma": sigma}
    check_resampling(shape, outputs, seed=seed, transposed=transposed, **step)


def test_an_axis_of_uneven_positions_is_resampled_by_its_spline() -> None:
    along = (0.0, 1.0, 1.5, 3.0, 4.0, 6.0, 9.0)
    matrix = resample_matrix.matrix(10, 23, **CUBIC | {"along": along})
    values, out = noise((2, 7, 40)), poisoned((2, 23, 40))
    run(values, out, resample_blocks.build(10, 23, **CUBIC | {"along": along}))
    assert np.abs(out - along_rows(values, matrix)).max() < 0.003


def check_rescale(dtype: str, rule: str, *, source: str = "", declared: bool = True) -> None:
    """Compare HU bit by bit with products and sums that NumPy rounds one by one."""
    rng = np.random.default_rng(1)
    limits = np.iinfo(dtype)
    stored = rng.integers(max(limits.min, -3100), min(limits.max, 40_000), (5, 17, 43), endpoint=True).astype(dtype)
    stored[1, 2, :6] = np.array([-2000, 0, 63536, 7, 5, 6]).astype(dtype)
    stored[2, 3, :4] = [19, 20, 100, 101]  # at both ends of the padding range
    slope = np.array([1, 0.7310585, 2.5, -1, 1.0000001], np.float32)
    intercept = np.array([-1024, -1000.1, 0.3, 0, -8192], np.float32)
    padding = np.array([[1, 0], [0, 5], [20, 100], [limits.max, limits.max], [1, 0]]).astype(dtype)
    kept = np.where(stored == -2000, 0, stored).astype(dtype) if rule == "minus2000-to-0" else stored
    expected = kept.astype(np.float32) * slope[:, None, None] + intercept[:, None, None]
    if rule == "air":
        filled = (stored >= padding[:, :1, None]) & (stored <= padding[:, 1:, None]) & declared
        expected = np.where(filled | (expected < -1024), np.float32(-1000), expected)
    out = poisoned(stored.shape)
    rescale = Rescale(slope, intercept, padding if declared else None, rule)
    run(stored, out, resample_blocks.selection(17, 0, 17), source=source, rescale=rescale)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("rule", ["air", "keep", "minus2000-to-0"])
@pytest.mark.parametrize("dtype", STORED_TYPES)
def test_hu_of_stored_values_are_bit_identical_to_numpy(dtype: str, rule: str) -> None:
    check_rescale(dtype, rule)
    check_rescale(dtype, rule, declared=False)


def test_stored_values_become_hu_before_they_are_resampled() -> None:
    # Padding beside tissue would cause ringing otherwise.
    stored = np.full((2, 24, 40), 1064, np.int16)
    stored[:, :10] = -2000
    stored[1] += 10
    slope, intercept = np.ones(2, np.float32), np.array([-1024, -1034], np.float32)
    padding = np.array([[-2000, -2000], [-1990, -1990]], np.int16)
    hu = np.where(np.arange(24)[:, None] < 10, -1000.0, 40.0) * np.ones((2, 1, 40))
    expected = along_rows(hu, resample_matrix.matrix(24, 31, **CUBIC)).transpose(0, 2, 1)
    out = poisoned(expected.shape)
    rescale = Rescale(slope, intercept, padding, "air")
    run(stored, out, resample_blocks.build(24, 31, **CUBIC), transposed=True, rescale=rescale)
    assert np.abs(out - expected).max() < 0.001


TOPS = {"float32": 1.0, "uint8": 255.0, "uint16": 65535.0, "int16": None}


def check_window(
    dtype: str, window_hu: tuple[float, float] | None, *, source: str = "", transposed: bool = False
) -> None:
    """Compare windowed and rounded values bit by bit with NumPy's."""
    rng = np.random.default_rng(2)
    halves = np.arange(-1400, 500, 0.5)  # are rounded to even
    edges = [-1000, 400, 32767.5, -32768.5, 65535.5, 255.5, 0.5, 1.5, -0.5]
    values = np.concatenate([rng.uniform(-40_000, 80_000, 1991), rng.uniform(-1400, 500, 2000), halves, edges])
    values = values.astype(np.float32).reshape(3, 40, 65)
    expected, top, window = values, TOPS[dtype], None
    if window_hu is not None:
        low, high = map(np.float32, window_hu)
        scale, shift = (np.float32(top / (high - low)), -low) if top else (np.float32(1), np.float32(0))
        expected = (np.clip(values, low, high) + shift) * scale
        window = Window(*window_hu, float(shift), float(scale))
    if dtype != "float32":
        expected = np.clip(np.rint(expected), np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)
    expected = expected.transpose(0, 2, 1) if transposed else expected
    out = poisoned(expected.shape, dtype)
    run(values, out, resample_blocks.selection(40, 0, 40), source=source, window=window, transposed=transposed)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("window_hu", [None, (-1000.0, 400.0), (-1350.5, 149.25)])
@pytest.mark.parametrize("dtype", TOPS)
@pytest.mark.parametrize("transposed", [False, True])
def test_windowed_and_rounded_values_are_bit_identical_to_numpy(dtype: str, window_hu: Any, transposed: bool) -> None:
    check_window(dtype, window_hu, transposed=transposed)


def check_ring(*, source: str = "") -> None:
    """Resample a line of which only the last 24 samples are in memory, sample r in row r modulo 24."""
    values, step = noise((1, 100, 45)), CUBIC | {"order": 1}
    tables = resample_blocks.build(100, 150, **step).part(72, 96)
    low, high = tables.samples
    assert 24 < low < high - 12 < 72  # the rows that are needed are on both sides of the end of the ring
    ring = poisoned((1, 24, 45))
    for row in range(high - 24, high):
        ring[0, row % 24] = values[0, row]
    out = poisoned((1, 24, 45))
    run(ring, out, tables, source=source)
    assert np.abs(out - along_rows(values, resample_matrix.matrix(100, 150, **step))[:, 72:96]).max() < 0.001


def test_samples_are_found_in_a_ring_of_rows() -> None:
    check_ring()


@pytest.mark.parametrize("transposed", [False, True])
def test_only_the_given_rows_and_columns_of_a_view_are_written(transposed: bool) -> None:
    values = noise((2, 20, 37))
    shape = (2, 37, 9) if transposed else (2, 9, 37)
    canvas = poisoned((2, 60, 70))
    view = canvas[::-1, 5 : 5 + shape[1], 3 : 3 + shape[2]]  # slices in reverse order, as of a stack from head to feet
    run(values, view, resample_blocks.build(20, 9, **CUBIC), transposed=transposed)
    expected = along_rows(values, resample_matrix.matrix(20, 9, **CUBIC))
    assert np.abs(view - (expected.transpose(0, 2, 1) if transposed else expected)).max() < 0.003
    assert np.isnan(canvas).sum() == canvas.size - view.size


@pytest.mark.parametrize(
    ("shape", "block"),
    [((70, 4096, 8192), (255, 63, 69)), ((1, 40, 2**27 + 5), (2**22, 0, 0))],
    ids=["slices", "columns"],
)
def test_indices_beyond_two_to_the_31_are_right(shape: tuple[int, int, int], block: tuple[int, int, int]) -> None:
    # The arrays are in virtual memory; only the last block is computed.
    values, out = virtual_array(shape, np.int16), virtual_array(shape, np.float32)
    assert values.size > 2**31
    columns, rows = slice(block[0] * LANES, None), slice(block[1] * ROWS, None)
    expected = np.random.default_rng(3).integers(-500, 500, values[-1, rows, columns].shape)
    values[-1, rows, columns] = expected
    tables = resample_blocks.selection(shape[1], 0, shape[1])
    slope, intercept = np.ones(shape[0], np.float32), np.zeros(shape[0], np.float32)
    arguments = cuda_kernels.arguments(values, out, tables, rescale=Rescale(slope, intercept, None, "keep"))
    kernel = compile_kernel(cuda_kernels.SOURCE, cuda_kernels.NAME, cuda_kernels.variant("int16", "float32").options)
    kernel(cuda_kernels.grid(shape, shape[1]), cuda_kernels.BLOCK, arguments, blocks=[block])
    np.testing.assert_array_equal(out[-1, rows, columns], expected)


def test_all_variants_compile_and_the_source_has_no_values_of_a_series() -> None:
    for variant in VARIANTS:
        compile_kernel(cuda_kernels.SOURCE, cuda_kernels.NAME, variant.options)
    for word in ("512", "349", "108", "-1000.0f : 0", "400.0f"):
        assert word not in cuda_kernels.SOURCE


@cache
def checks() -> tuple[Callable[[str], None], ...]:
    """Return the checks that a mutation has to fail, the quickest first."""
    return (
        lambda source: check_rescale("int16", "air", source=source),
        lambda source: check_rescale("int16", "minus2000-to-0", source=source),
        lambda source: check_window("uint8", (-1350.5, 149.25), source=source, transposed=True),
        lambda source: check_window("int16", None, source=source),
        lambda source: check_ring(source=source),
        lambda source: check_resampling((2, 50, 37), 75, source=source),
        lambda source: check_resampling((2, 37, 50), 75, source=source, transposed=True),
    )


MUTATIONS = {
    "first sample one too early": ("row = first[block] % in_rows", "row = (first[block] + in_rows - 1) % in_rows"),
    "one sample too few": ("t < width;", "t < width - 1;"),
    "one sample too many": ("t < width;", "t <= width;"),
    "ring wraps late": ("if (++row == in_rows)", "if (++row > in_rows)"),
    "ring does not wrap": ("row = 0;\n                sample = line;", "row = 0;"),
    "weights of the next output": ("sum[3] += u.w * value;", "sum[3] += v.x * value;"),
    "weights of the next block": ("(long long) block * width", "(long long) (block + 1) * width"),
    "column beyond the last": ("if (column < inner && block", "if (column <= inner && block"),
    "row beyond the last": ("if (column < inner && q < out_rows)", "if (column < inner && q <= out_rows)"),
    "transposed row beyond the last": ("top + r < out_rows)", "top + r <= out_rows)"),
    "swapped axes": ("tile[lane][warp * OUTPUTS + r] = sum[r];", "tile[warp * 4 + r % 4][lane + r / 4] = sum[r];"),
    "missing barrier": ("    __syncthreads();\n", ""),
    "slices at the distance of a row": ("slice * (in_rows * inner)", "slice * inner"),
    "all slices have the rescale of the first": ("m = slope[slice]", "m = slope[0]"),
    "contracted rescale": ("__fadd_rn(__fmul_rn((float) kept, slope), intercept)", "(float) kept * slope + intercept"),
    "padding without its upper limit": ("stored <= highest", "stored < highest"),
    "padding is not air": ("filled = declared", "filled = !declared"),
    "-2000 after rescaling": ("zero && stored == (IN) -2000", "zero && stored == (IN) -1999"),
    "truncation instead of rounding": ("rintf(scaled)", "scaled"),
    "no limit above": ("fminf(fmaxf(rintf(scaled), least), most)", "fmaxf(rintf(scaled), least)"),
    "shift after the scale": (
        "__fmul_rn(__fadd_rn(fminf(fmaxf(value, low), high), shift), scale)",
        "__fadd_rn(__fmul_rn(fminf(fmaxf(value, low), high), scale), shift)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_kernel_is_detected(name: str) -> None:
    before, after = MUTATIONS[name]
    assert cuda_kernels.SOURCE.count(before) == 1
    source = cuda_kernels.SOURCE.replace(before, after)
    for check in checks():
        try:
            check(source)
        except (AssertionError, KernelFault):
            return
    pytest.fail("no check failed")


@pytest.mark.parametrize("number", range(7))
def test_the_checks_of_mutations_pass_without_one(number: int) -> None:
    checks()[number](cuda_kernels.SOURCE)
    assert OUTPUTS == 8
