"""Holds the CUDA source of the one kernel that resamples on a GPU, and its launches.

The kernel resamples along the middle axis of an array (outer, rows, inner) by the tables of
`gpuprep.compute.resample_blocks`. On the way in it can turn stored values into HU, on the way out it applies a window
and rounds to an integer type. It writes the result with the same order of axes, or with the last two exchanged: two
launches that exchange them resample a slice along both axes, and all reads and writes are of adjacent memory.

Shapes, tables and values of a series are arguments. So a kernel is compiled once per pair of voxel types. The source is
plain text, so that tests can compile it for the host without a GPU. HU are bit-identical to those of
`gpuprep.core.hounsfield`, except for denormal floats, which CuPy's options set to 0: products and sums are rounded
separately (`__fmul_rn`, `__fadd_rn`), because a compiler could otherwise contract them into one operation that rounds
once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from gpuprep.compute.resample_blocks import OUTPUTS, BlockTables
from gpuprep.core.hounsfield import AIR_HU, LOWEST_HU

NAME = "resample"

LANES, WARPS = 32, 8
"""Threads of a CUDA block along both axes: a warp computes `OUTPUTS` rows of `LANES` columns."""

ROWS = WARPS * OUTPUTS
"""Rows of a CUDA block."""

STORED_TYPES = {
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned int",
}
"""Types of stored values, and their names in CUDA."""

OUTPUT_TYPES = {"float32": "float", "uint8": "unsigned char", "uint16": "unsigned short", "int16": "short"}


class Variant(NamedTuple):
    """Voxel types that the kernel is compiled for, as names of NumPy dtypes."""

    read: str
    """A type of stored values, which become HU; or float32, which stays as it is."""
    written: str
    """float32, or an integer type to round to."""

    @property
    def options(self) -> tuple[str, ...]:
        """Options of the compiler."""
        stored, rounded = int(self.read != "float32"), int(self.written != "float32")
        types = f"-DIN={(STORED_TYPES | OUTPUT_TYPES)[self.read]}", f"-DOUT={OUTPUT_TYPES[self.written]}"
        return *types, f"-DSTORED={stored}", f"-DROUNDED={rounded}"


VARIANTS = (
    *(Variant(stored, "float32") for stored in STORED_TYPES),
    *(Variant("float32", written) for written in OUTPUT_TYPES),
)
"""All variants: stored values become HU in float32, and float32 becomes an output type."""


class Window(NamedTuple):
    """Range in HU, and the shift in HU and the scale that follow: see `gpuprep.core.hounsfield.window`."""

    low_hu: float = -math.inf
    high_hu: float = math.inf
    shift_hu: float = 0.0
    scale: float = 1.0


class Rescale(NamedTuple):
    """Conversion of stored values to HU, slice by slice: see `gpuprep.core.hounsfield.to_hu`."""

    slope: Any
    """Array of float32 on the device, shape (slices,)."""
    intercept: Any
    """Array of float32 on the device, shape (slices,)."""
    padding: Any
    """Array of the type of the stored values on the device, shape (slices, 2); None without declared padding."""
    rule: str
    """Padding rule of the recipe: "air", "keep" or "minus2000-to-0"."""


SOURCE = f"""
#define LANES {LANES}
#define WARPS {WARPS}
#define OUTPUTS {OUTPUTS}
#define ROWS {ROWS}

__device__ __forceinline__ OUT finished(
    float value, float low, float high, float shift, float scale, float least, float most
) {{
    const float scaled = __fmul_rn(__fadd_rn(fminf(fmaxf(value, low), high), shift), scale);
#if ROUNDED
    return (OUT) fminf(fmaxf(rintf(scaled), least), most);
#else
    return scaled;
#endif
}}

#if STORED
__device__ __forceinline__ float hu(
    IN stored, float slope, float intercept, bool declared, IN lowest, IN highest, bool air, bool zero
) {{
    const IN kept = zero && stored == (IN) -2000 ? (IN) 0 : stored;
    const float number = __fadd_rn(__fmul_rn((float) kept, slope), intercept);
    const bool filled = declared && stored >= lowest && stored <= highest;
    return air && (filled || number < {LOWEST_HU}f) ? {AIR_HU}f : number;
}}
#endif

// in: (outer, in_rows, inner); sample r of a line is in row r % in_rows
// out: (outer, out_rows, inner), or transposed: (outer, inner, out_rows); out_outer and out_row are strides in elements
extern "C" __global__ void __launch_bounds__(LANES * WARPS)
{NAME}(
    const IN* __restrict__ in, const long long inner, const int in_rows,
    OUT* __restrict__ out, const long long out_outer, const long long out_row, const int out_rows,
    const bool transposed,
    const int* __restrict__ first, const float* __restrict__ weights, const int width,
    const float low, const float high, const float shift, const float scale, const float least, const float most
#if STORED
    , const float* __restrict__ slope, const float* __restrict__ intercept, const IN* __restrict__ padding,
    const bool declared, const bool air, const bool zero
#endif
) {{
    __shared__ float tile[LANES][ROWS + 1];  // one more, so that the rows of the tile start in different memory banks
    const int lane = threadIdx.x, warp = threadIdx.y, slice = blockIdx.z;
    const long long left = (long long) blockIdx.x * LANES, column = left + lane;
    const int top = blockIdx.y * ROWS, block = blockIdx.y * WARPS + warp;
    float sum[OUTPUTS] = {{0}};

    if (column < inner && block * OUTPUTS < out_rows) {{
        const IN* const line = in + slice * (in_rows * inner) + column;
        const float4* weight = reinterpret_cast<const float4*>(weights) + (long long) block * width * (OUTPUTS / 4);
        int row = first[block] % in_rows;
        const IN* sample = line + row * inner;
#if STORED
        const float m = slope[slice], b = intercept[slice];
        const IN lowest = declared ? padding[2 * slice] : 0, highest = declared ? padding[2 * slice + 1] : 0;
#endif
        for (int t = 0; t < width; ++t) {{
#if STORED
            const float value = hu(*sample, m, b, declared, lowest, highest, air, zero);
#else
            const float value = *sample;
#endif
            const float4 u = weight[0], v = weight[1];
            sum[0] += u.x * value;
            sum[1] += u.y * value;
            sum[2] += u.z * value;
            sum[3] += u.w * value;
            sum[4] += v.x * value;
            sum[5] += v.y * value;
            sum[6] += v.z * value;
            sum[7] += v.w * value;
            weight += OUTPUTS / 4;
            sample += inner;
            if (++row == in_rows) {{
                row = 0;
                sample = line;
            }}
        }}
    }}

    OUT* const to = out + slice * out_outer;
    if (!transposed) {{
        for (int r = 0; r < OUTPUTS; ++r) {{
            const int q = block * OUTPUTS + r;
            if (column < inner && q < out_rows)
                to[q * out_row + column] = finished(sum[r], low, high, shift, scale, least, most);
        }}
        return;
    }}
    for (int r = 0; r < OUTPUTS; ++r) tile[lane][warp * OUTPUTS + r] = sum[r];
    __syncthreads();
    const int thread = warp * LANES + lane, r = thread % ROWS;
    for (int c = thread / ROWS; c < LANES; c += LANES * WARPS / ROWS) {{
        if (left + c < inner && top + r < out_rows)
            to[(left + c) * out_row + top + r] = finished(tile[c][r], low, high, shift, scale, least, most);
    }}
}}
"""

BLOCK = (LANES, WARPS)


def grid(shape: tuple[int, ...], outputs: int) -> tuple[int, int, int]:
    """Return the number of CUDA blocks along each axis, for values of shape (outer, rows, inner)."""
    return -(-shape[2] // LANES), -(-outputs // ROWS), shape[0]


def arguments(
    values: Any,
    out: Any,
    tables: BlockTables,
    *,
    transposed: bool = False,
    window: Window | None = None,
    rescale: Rescale | None = None,
) -> tuple[Any, ...]:
    """Return the arguments of the kernel.

    Parameters
    ----------
    values : array, shape (outer, rows, inner), contiguous
        Samples. `rows` may be fewer than the samples of a line, if earlier ones have been overwritten: sample r is in
        row r % `rows`.
    out : array, shape (outer, outputs, inner), or (outer, inner, outputs) if `transposed`
        Memory for the result; adjacent along the last axis.
    tables : BlockTables
        Tables on the device.
    transposed : bool
        Whether to exchange the last two axes.
    window : Window, optional
        Window for the result.
    rescale : Rescale, optional
        Rescale of stored values; None for values of float32.
    """
    size = out.dtype.itemsize
    limits: Sequence[float] = (0, 0) if out.dtype.kind == "f" else (np.iinfo(out.dtype).min, np.iinfo(out.dtype).max)
    floats = (*(window or Window()), *limits)
    found = (
        values, np.int64(values.shape[2]), np.int32(values.shape[1]),
        out, np.int64(out.strides[0] // size), np.int64(out.strides[1] // size), np.int32(tables.n_out),
        np.bool_(transposed), tables.first, tables.weights, np.int32(tables.weights.shape[1]), *map(np.float32, floats),
    )  # fmt: skip
    if rescale is None:
        return found
    declared, zero = rescale.padding is not None, rescale.rule == "minus2000-to-0"
    padding = rescale.padding if declared else values  # not read
    flags = declared, rescale.rule == "air", zero and np.iinfo(values.dtype).min <= -2000
    return *found, rescale.slope, rescale.intercept, padding, *map(np.bool_, flags)


def variant(read: DTypeLike, written: DTypeLike) -> Variant:
    """Return the variant for the dtypes of two arrays."""
    return Variant(np.dtype(read).name, np.dtype(written).name)
