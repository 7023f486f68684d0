"""Holds the CUDA source of the two passes over voxels that CuPy's `ElementwiseKernel` fuses into one kernel each.

Text only, so that it can be compiled for the host and tried without a GPU. No shape is in it: a kernel is compiled
once per type of voxel. Each one computes to the bit what `gpuprep.core.hounsfield` does in several passes, which is why
the product and the sum are kept apart: a compiler may contract them into one operation, which rounds once.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuprep.core.hounsfield import AIR_HU, LOWEST_HU


@dataclass(frozen=True, slots=True)
class Kernel:
    """What `cupy.ElementwiseKernel` takes."""

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
"""Stored integers to HU with padding made air: see `gpuprep.core.hounsfield.to_hu`.

`plane` is the number of voxels in a slice."""

_WINDOWED = "__fmul_rn(__fadd_rn(fminf(fmaxf(values, low), high), shift), scale)"

WINDOW = Kernel(
    "gpuprep_window",
    "float32 values, float32 low, float32 high, float32 shift, float32 scale",
    "float32 out",
    f"out = {_WINDOWED}",
)
"""The window alone: see `gpuprep.core.hounsfield.finish`."""

QUANTISE = Kernel(
    "gpuprep_quantise",
    "float32 values, float32 low, float32 high, float32 shift, float32 scale, float32 least, float32 most",
    "T out",
    f"out = static_cast<T>(fminf(fmaxf(rintf({_WINDOWED}), least), most))",
)
"""The window and then the integers of the output: see `gpuprep.core.hounsfield.finish`."""
