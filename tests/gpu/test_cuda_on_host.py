"""Kernels that run on the host: what is right gives the values of a GPU, and each mistake is reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_on_host import COMPILER, CompileError, KernelFault, LaunchError, compile_kernel, virtual_array
from numpy.typing import NDArray

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")

TRANSPOSE = """
extern "C" __global__ void __launch_bounds__(256)
transpose(const float* __restrict__ in, float* __restrict__ out, const int rows, const int columns) {
    __shared__ float tile[32][33];
    const int column = blockIdx.x * 32 + threadIdx.x, top = blockIdx.y * 32;
    for (int r = threadIdx.y; r < 32; r += blockDim.y)
        if (column < columns && top + r < rows) tile[r][threadIdx.x] = in[(long long) (top + r) * columns + column];
    BARRIER
    const int row = top + threadIdx.x;
    for (int r = threadIdx.y; r < 32; r += blockDim.y)
        if (row < rows && blockIdx.x * 32 + r < columns + MORE)
            out[(long long) (blockIdx.x * 32 + r) * rows + row - FEWER] = tile[threadIdx.x + TILE][r];
}
"""
RIGHT = {"BARRIER": "__syncthreads();", "MORE": "0", "FEWER": "0", "TILE": "0"}


def transposed(values: NDArray[Any], changes: dict[str, str], seed: int = 0) -> NDArray[Any]:
    """Return the transpose of an array, or what a kernel with changes makes of it."""
    options = tuple(f"-D{name}={value}" for name, value in (RIGHT | changes).items())
    kernel = compile_kernel(TRANSPOSE, "transpose", options)
    rows, columns = values.shape
    out = np.full((columns, rows), np.nan, np.float32)
    kernel((-(-columns // 32), -(-rows // 32)), (32, 8), (values, out, np.int32(rows), np.int32(columns)), seed=seed)
    return out


def one(body: str, *arguments: Any, parameters: str = "float* out") -> None:
    """Run a kernel in one thread."""
    kernel = compile_kernel(f'extern "C" __global__ void kernel({parameters}) {{ {body} }}', "kernel")
    kernel((1,), (1,), arguments)


def numbers(shape: Any) -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.random.default_rng(0).random(shape).astype(np.float32)
    return values


@pytest.mark.parametrize("seed", range(3))
def test_a_kernel_with_shared_memory_and_a_barrier_transposes(seed: int) -> None:
    values = numbers((70, 41))
    np.testing.assert_array_equal(transposed(values, {}, seed), values.T)


@pytest.mark.parametrize("seed", range(3))
def test_without_the_barrier_values_are_wrong(seed: int) -> None:
    assert np.isnan(transposed(numbers((32, 32)), {"BARRIER": ""}, seed)).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MORE": "1"}, r"write of 4 bytes outside of every array; nearest is array 1 of 11480 bytes, at byte 11"),
        ({"FEWER": "1"}, r"write of 4 bytes outside .* at byte -4; thread \(0, 0, 0\) of block \(0, 0, 0\)"),
        ({"TILE": "1"}, r"index out of the bounds of an array in line 12"),
        ({"BARRIER": "if (threadIdx.x < 5) return; __syncthreads();"}, "barrier in line 8, which thread .* not reach"),
        ({"BARRIER": "if (threadIdx.y) __syncthreads();"}, "barrier in line 8, which thread .* not reach"),
    ],
    ids=["beyond the end", "before the start", "beyond shared memory", "early return", "divergent barrier"],
)
def test_a_kernel_with_a_mistake_fails_and_the_next_one_runs(changes: dict[str, str], message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        transposed(numbers((70, 41)), changes)
    np.testing.assert_array_equal(transposed(numbers((70, 41)), {}), numbers((70, 41)).T)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("out[0] = out[1];", "read of 4 bytes outside of every array"),
        ("int n = 65536 * (int) (out[0] + 32768); out[0] = n;", "overflow of a product in line 1"),
        ("out[0] = (int) (out[0] + 3e9f);", "conversion to an integer out of its range"),
        ("out[0] = 1 << (int) (out[0] + 32);", "shift by too many bits"),
        ("out[0] = 5 / (int) out[0];", "division by zero"),
        ("*(int*) ((char*) out + 1) = 1;", "misaligned access"),
        ("float* none = nullptr; out[0] = none[(int) out[0]];", "read of 4 bytes"),
    ],
)
def test_undefined_behaviour_is_reported(body: str, message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        one(body, np.zeros(1, np.float32))


def test_threads_and_blocks_run_in_an_order_that_the_seed_chooses() -> None:
    source = """
    extern "C" __global__ void note(int* log, int* count) { log[(*count)++] = blockIdx.x * 4 + threadIdx.x; }
    """
    orders = []
    for seed in (1, 1, 2):
        log, count = np.zeros(40, np.int32), np.zeros(1, np.int32)
        compile_kernel(source, "note")((10,), (4,), (log, count), seed=seed)
        assert sorted(log) == list(range(40))
        assert set(log[:4] // 4) == {log[0] // 4}  # one block after the other
        orders.append(log.tolist())
    assert orders[0] == orders[1] != orders[2]
    assert list(range(40)) not in orders


def test_shared_memory_is_not_a_number_when_a_block_starts_also_that_of_templates() -> None:
    source = """
    template <int N> __device__ float* shared() { __shared__ float values[N]; return values; }
    extern "C" __global__ void kernel(float* out) {
        __shared__ float plain[4];
        float* of_template = shared<4>();
        out[2 * blockIdx.x] = plain[threadIdx.x];
        out[2 * blockIdx.x + 1] = of_template[threadIdx.x];
        plain[threadIdx.x] = of_template[threadIdx.x] = 1;
    }
    """
    out = np.zeros(6, np.float32)
    compile_kernel(source, "kernel")((3,), (1,), (out,))
    assert np.isnan(out).all()


def test_products_and_sums_are_contracted_unless_they_are_written_as_intrinsics() -> None:
    # 1 + 2⁻¹² squared is 1 + 2⁻¹¹ + 2⁻²⁴, which float32 rounds to 1 + 2⁻¹¹.
    values = np.full(2, 1 + 2**-12, np.float32)
    source = """
    extern "C" __global__ void kernel(float* v, float less) {
        v[0] = __fsub_rn(__fmul_rn(v[0], v[0]), less);
        v[1] = v[1] * v[1] - less;
    }
    """
    compile_kernel(source, "kernel")((1,), (1,), (values, np.float32(1 + 2**-11)))
    assert values[0] == 0
    assert values[1] in (0, 2**-24)  # 0 on a processor without fused multiply-add
    values[:] = 1 + 2**-12
    compile_kernel(source, "kernel", ("--fmad=false",))((1,), (1,), (values, np.float32(1 + 2**-11)))
    assert values[1] == 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (np.int32(5), "parameter 1 of kernel is a i8, its argument a i4"),
        (5.0, "is a i8, its argument a f8"),
        (np.zeros(1, np.int64), "is a i8, its argument a pointer to i8"),
    ],
)
def test_an_argument_of_another_type_is_refused(argument: Any, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        one("out[0] = n;", np.zeros(1, np.float32), argument, parameters="float* out, const long long n")


def test_arrays_of_another_type_alignment_or_number_are_refused() -> None:
    for wrong in (np.zeros(1, np.float64), np.zeros(1, np.int32)):
        with pytest.raises(LaunchError, match="is a pointer to f4"):
            one("out[0] = 0;", wrong)
    floats = np.zeros(12, np.float32)
    aligned = floats[-floats.ctypes.data % 16 // 4 :]
    with pytest.raises(LaunchError, match="not aligned to 16 bytes"):
        one("out->x = 0;", aligned[1:], parameters="float4* out")
    with pytest.raises(LaunchError, match="has 1 parameters, not 2"):
        one("out[0] = 0;", np.zeros(1, np.float32), np.int32(1))


@pytest.mark.parametrize(
    ("grid", "block"), [((0,), (32,)), ((1, 65536), (32,)), ((1,), (1025,)), ((1,), (64, 32)), ((1,), (1, 1, 65))]
)
def test_a_launch_beyond_the_limits_is_refused(grid: Any, block: Any) -> None:
    kernel = compile_kernel('extern "C" __global__ void kernel(float* out) { out[0] = 0; }', "kernel")
    with pytest.raises(LaunchError, match=r"out of the limits|at most 1024 threads"):
        kernel(grid, block, (np.zeros(1, np.float32),))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("#include <cmath>\n", "NVRTC has no C\\+\\+ library: #include <cmath>"),
        (
            'extern "C" __global__ void kernel(float* out) { out[0] = std::abs(out[0]); }',
            "no C\\+\\+ library: std::abs",
        ),
        ('extern "C" __global__ void kernel(int32_t* out) { out[0] = 0; }', "int32_t"),
        ('extern "C" __global__ void kernel(float* out) { out[0] = value; }', "kernel.cu:1.*value"),
        (
            'extern "C" __global__ void kernel(float* out) { __shared__ float t[12289]; t[0] = 1; out[0] = t[1]; }',
            "too much shared data: 49",
        ),
    ],
    ids=["header", "library", "type", "name", "shared memory"],
)
def test_a_source_that_nvrtc_refuses_does_not_compile(source: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        compile_kernel(source, "kernel")
    with pytest.raises(CompileError, match="unrecognized option '-march=native'"):
        compile_kernel("", "kernel", ("-march=native",))


def test_indices_beyond_two_to_the_31_are_reached_in_virtual_memory() -> None:
    count = 2**31 + 1000
    values, out = virtual_array((count,), np.float32), virtual_array((count,), np.float32)
    values[-1] = 5
    source = """
    extern "C" __global__ void kernel(const float* in, float* out, const long long n) {
        const TYPE i = blockIdx.x * (TYPE) blockDim.x + threadIdx.x;
        if (i < n) out[i] = in[i] + 1;
    }
    """
    kernel = compile_kernel(source, "kernel", ("-DTYPE=long long",))
    blocks = -(-count // 256)
    kernel((blocks,), (256,), (values, out, np.int64(count)), blocks=[(blocks - 1, 0, 0)])
    assert out[-1] == 6
    wrong = compile_kernel(source, "kernel", ("-DTYPE=int",))
    with pytest.raises(KernelFault, match=r"overflow of a product|outside of every array"):
        wrong((blocks,), (256,), (values, out, np.int64(count)), blocks=[(blocks - 1, 0, 0)])
