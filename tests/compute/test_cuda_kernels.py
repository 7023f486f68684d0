"""The CUDA source of the fused kernels, compiled for the host by a C++ compiler, against `gpuprep.core.hounsfield`.

The tests emulate the code that CuPy puts around the source: a loop over elements, arguments by value or as pointers.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpuprep.compute import cuda_kernels
from gpuprep.compute.cuda_kernels import Kernel
from gpuprep.core import hounsfield

COMPILER = shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

C_TYPES = {
    "float32": "float", "int64": "long long", "bool": "bool", "uint8": "unsigned char", "uint16": "unsigned short",
    "int16": "short", "int32": "int",
}  # fmt: skip

FRAME = """
#include <cmath>
#include <cstddef>
using std::fminf; using std::fmaxf; using std::rintf;
static float __fadd_rn(float a, float b) {{ return a + b; }}
static float __fmul_rn(float a, float b) {{ return a * b; }}
extern "C" void run({declared}) {{
  for (ptrdiff_t i = 0; i < _count; ++i) {{
    {elements}
    {operation};
  }}
}}
"""


def compiled(kernel: Kernel, voxel: str, folder: Path) -> Callable[..., NDArray[Any]]:
    """Return the kernel for one voxel type as a Python function of its inputs."""
    declared, elements, raw = ["ptrdiff_t _count"], [], []
    inputs = [(p.split()[-2], p.split()[-1], p.split()[0] == "raw") for p in kernel.inputs.split(", ")]
    ((out_type, out_name),) = [p.split() for p in kernel.outputs.split(", ")]
    for n, (kind, name, is_raw) in enumerate([*inputs, (out_type, out_name, False)]):
        c = C_TYPES[voxel if kind == "T" else kind]
        if is_raw:
            declared.append(f"const {c}* {name}")
        elif n == 0 or n == len(inputs):  # voxel arrays: input and output
            declared.append(f"{c}* _raw_{name}")
            elements.append(f"{c}& {name} = _raw_{name}[i];")
        else:
            declared.append(f"{c} {name}")
        raw.append(is_raw or n == 0)
    source = FRAME.format(declared=", ".join(declared), elements="\n".join(elements), operation=kernel.operation)
    source = re.sub(r"\bT\b", C_TYPES[voxel], source)
    (folder / "kernel.cpp").write_text(source)
    assert COMPILER is not None
    options = ["-O2", "-ffp-contract=off", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *options, "-o", folder / "kernel.so", folder / "kernel.cpp"], check=True)
    function = ctypes.CDLL(str(folder / "kernel.so")).run

    def run(*arguments: Any) -> NDArray[Any]:
        voxels = arguments[0]
        out = np.empty(voxels.shape, np.dtype(voxel if out_type == "T" else out_type))
        passed: list[Any] = [ctypes.c_ssize_t(voxels.size)]
        for (kind, _, _), argument, is_raw in zip(inputs, arguments, raw, strict=False):
            if is_raw:
                assert argument.flags.c_contiguous
                passed.append(ctypes.c_void_p(argument.ctypes.data))
            else:
                types = {"float32": ctypes.c_float, "int64": ctypes.c_longlong, "bool": ctypes.c_bool}
                passed.append(types[kind](argument))
        function(*passed, ctypes.c_void_p(out.ctypes.data))
        return out

    return run


@needs_compiler
@pytest.mark.parametrize("rule", ["air", "keep", "minus2000-to-0"])
@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32"])
def test_hu_of_the_kernel_are_bit_identical(tmp_path: Path, dtype: str, rule: str) -> None:
    rng = np.random.default_rng(1)
    low, high = (-3100, 40000) if dtype == "int32" else (-3100, 32767) if dtype == "int16" else (0, 65535)
    stored = rng.integers(low, high, (5, 17, 13), endpoint=True).astype(dtype)
    stored[1, 2, :4] = np.array([-2000, 0, 63536 - 65536, 7]).astype(dtype)  # as uint16, −2000 is 63536
    slope = np.array([1, 0.7310585, 2.5, -1, 1.0000001], np.float32)
    intercept = np.array([-1024, -1000.1, 0.3, 0, -8192], np.float32)
    padding = np.array([[1, 0], [0, 5], [-20 if low else 20, 500], [32767, 32767], [1, 0]]).astype(dtype)
    run = compiled(cuda_kernels.HU, dtype, tmp_path)
    for declared in (None, padding) if rule == "air" else (None,):
        expected = hounsfield.to_hu(stored, slope, intercept, declared, rule)
        table = stored if declared is None else declared
        zero = rule == "minus2000-to-0" and dtype != "uint16"
        hu = run(stored, slope, intercept, table, 17 * 13, zero, rule == "air", declared is not None)
        assert hu.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(hu, expected)
    if rule == "air":
        assert (hu == -1000).any()
        assert not (hu[~np.isin(hu, [-1000])] < -1024).any()


@needs_compiler
@pytest.mark.parametrize("window", [None, (-1000.0, 400.0), (-1350.5, 149.25)])
@pytest.mark.parametrize("dtype", ["float32", "uint8", "uint16", "int16"])
def test_window_and_quantisation_of_the_kernels_are_bit_identical(
    tmp_path: Path, dtype: str, window: tuple[float, float] | None
) -> None:
    rng = np.random.default_rng(2)
    values = np.concatenate(
        [
            rng.uniform(-40_000, 80_000, 4000),
            rng.uniform(-1400, 500, 20_000),
            np.arange(-1400, 500, 0.5),  # halves, which are rounded to even
            [-1000, 400, 32767.5, -32768.5, 65535.5, 255.5, 0.5, 1.5, -0.5],
        ]
    ).astype(np.float32)
    top = {"float32": 1.0, "uint8": 255.0, "uint16": 65535.0, "int16": None}[dtype]
    scale, shift_hu = 1.0, 0.0
    if window and top:
        scale, shift_hu = top / (window[1] - window[0]), -window[0]
    arguments = (*(window or (-np.inf, np.inf)), shift_hu, scale)
    expected = hounsfield.finish(values, None if window is None else (*window, scale, shift_hu), dtype)
    if dtype == "float32":
        out = compiled(cuda_kernels.WINDOW, dtype, tmp_path)(values, *arguments)
    else:
        limits = np.iinfo(dtype)
        run = compiled(cuda_kernels.QUANTISE, dtype, tmp_path)
        out = run(values, *arguments, float(limits.min), float(limits.max))
    assert out.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(out, expected)


def test_kernels_contain_no_constants_of_a_series() -> None:
    # Values that differ between series are arguments, so a kernel is compiled per type and not per shape or recipe.
    for kernel in (cuda_kernels.HU, cuda_kernels.WINDOW, cuda_kernels.QUANTISE):
        numbers = set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?", kernel.operation))
        assert numbers <= {"0", "1", "2", "2000", "1000.0", "1024.0"}
