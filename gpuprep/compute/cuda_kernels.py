"""Holds the CUDA source of the fused kernels for `cupy.ElementwiseKernel`: HU conversion, and window with quantisation.

The source is plain text, so that tests can compile it for the host without a GPU. It contains no shapes: a kernel is
compiled once per voxel type. Results are bit-identical to those of `gpuprep.core.hounsfield`. For that, products and
sums are rounded separately (`__fmul_rn`, `__fadd_rn`); a compiler could otherwise contract them into one operation that
rounds once.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuprep.core.hounsfield import AIR_HU, LOWEST_HU


@dataclass(frozen=True, slots=True)
class Kernel:
    """Arguments of `cupy.ElementwiseKernel`."""

    name: str
    inputs: str
    outputs: str
    operation: str


HU = Kernel(
    "gpuprep_hu",
    "T stored, raw float32 slope, raw float32 intercept, raw T padding, int64 plane, "
    "bool zero, bool air, bool declared",
    "float32 hu",
    f"""
    const ptrdiff_t k = i / plane;
    const T value = zero && stored == static_cast<T>(-2000) ? static_cast<T>(0) : stored;
    const float number = __fadd_rn(__fmul_rn(static_cast<float>(value), slope[k]), intercept[k]);
    const bool filled = declared && stored >= padding[2 * k] && stored <= padding[2 * k + 1];
    hu = air && (filled || number < {LOWEST_HU}f) ? {AIR_HU}f : number;
    """,
)
"""Convert stored values to HU and padding to air: see `gpuprep.core.hounsfield.to_hu`.

`plane` is the number of voxels in a slice."""

_WINDOWED = "__fmul_rn(__fadd_rn(fminf(fmaxf(values, low), high), shift), scale)"

WINDOW = Kernel(
    "gpuprep_window",
    "float32 values, float32 low, float32 high, float32 shift, float32 scale",
    "float32 out",
    f"out = {_WINDOWED}",
)
"""Apply the window: see `gpuprep.core.hounsfield.finish`."""

QUANTISE = Kernel(
    "gpuprep_quantise",
    "float32 values, float32 low, float32 high, float32 shift, float32 scale, float32 least, float32 most",
    "T out",
    f"out = static_cast<T>(fminf(fmaxf(rintf({_WINDOWED}), least), most))",
)
"""Apply the window and round to the integer type of the output: see `gpuprep.core.hounsfield.finish`."""
