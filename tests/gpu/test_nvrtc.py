"""Compiles kernels with the NVRTC that CuPy uses, and reads the result; needs the wheels but neither GPU nor driver.

CuPy's own code chooses headers and options. Only its last step is replaced, which loads the binary into a device.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpuprep.compute.cuda_kernels import NAME, SOURCE, VARIANTS, Rescale, Variant, arguments
from gpuprep.compute.resample_blocks import selection

pytestmark = pytest.mark.skipif(
    find_spec("cupy") is None or find_spec("cucim") is None, reason="CuPy or cuCIM is not installed"
)

ARCHITECTURES = ("70", "80", "90", "100", "120")
"""Compute capabilities of Volta, Ampere, Hopper, and Blackwell in data centres and workstations."""

REGISTERS = 64
"""Registers per thread with which four blocks of 256 threads are resident: half the threads of a multiprocessor."""

STORED = [v for v in VARIANTS if v.read != "float32"]
ROUNDED = [v for v in VARIANTS if v.written != "float32"]


def private(module: str, name: str) -> Any:
    """Return a private member of CuPy or cuCIM; skip the test if this version has none of that name."""
    owner = import_module(module)
    if not hasattr(owner, name):
        pytest.skip(f"{module} of this version has no {name}")
    return getattr(owner, name)


Compile = Callable[..., tuple[Any, str]]
"""Takes source, options, `arch` and `ptx`; returns a cubin or PTX, and the log of the compiler."""


@pytest.fixture(scope="module")
def compile_only() -> Iterator[Compile]:
    """CuPy's function that compiles a kernel, up to where it would load the result into a device."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield _compile_only(monkeypatch)


def _compile_only(monkeypatch: pytest.MonkeyPatch) -> Compile:
    compiler: Any = import_module("cupy.cuda.compiler")
    core: Any = import_module("cupy._core.core")
    compile_module = private("cupy.cuda.compiler", "_compile_module_with_cache")
    # Memoised per device, so even for a given architecture CuPy would ask for the current device.
    option_of = private("cupy.cuda.compiler", "_get_arch_for_options_for_nvrtc")
    loaded: list[Any] = []
    module = SimpleNamespace(load=loaded.append, _set_mapping=lambda _: None)

    def without_module(*args: Any, **kwargs: Any) -> None:
        compile_module(*args, **kwargs)  # what it returns is no module of CuPy's type

    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")  # always compile
    monkeypatch.setattr(compiler, "_compile_module_with_cache", without_module)
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", option_of.__wrapped__)
    monkeypatch.setattr(compiler, "function", SimpleNamespace(Module=lambda: module))

    def compile_source(
        source: str, options: tuple[str, ...] = (), *, arch: str, ptx: bool = False, cupy_headers: bool = False
    ) -> tuple[Any, str]:
        log = io.StringIO()
        monkeypatch.setattr(compiler, "_use_ptx", ptx)
        core.compile_with_cache(source, options, arch=arch, prepend_cupy_headers=cupy_headers, log_stream=log)
        binary = loaded.pop()
        return (binary.decode() if ptx and isinstance(binary, bytes) else binary), log.getvalue()

    return compile_source


def skip_unless_supported(arch: str) -> None:
    nvrtc: Any = import_module("cupy").cuda.nvrtc
    if int(arch) not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {'.'.join(map(str, nvrtc.getVersion()))} does not compile for sm_{arch}")


def name_of(variant: Variant) -> str:
    return f"{variant.read}-{variant.written}"


@pytest.fixture(scope="module")
def ptx_of(compile_only: Compile) -> Callable[[Variant], Ptx]:
    return cache(lambda variant: Ptx(compile_only(SOURCE, variant.options, arch="80", ptx=True)[0]))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_variant_compiles_for_every_architecture_without_spilling(compile_only: Compile, arch: str) -> None:
    skip_unless_supported(arch)
    for variant in VARIANTS:
        cubin, log = compile_only(SOURCE, (*variant.options, "--ptxas-options=-v"), arch=arch)
        assert cubin[:4] == b"\x7fELF"
        assert f"Compiling entry function '{NAME}' for 'sm_{arch}'" in log
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log, name_of(variant)
        (registers,) = map(int, re.findall(r"Used (\d+) registers", log))
        assert registers <= REGISTERS, name_of(variant)


class Ptx:
    """Instructions of one kernel, and which registers each reads and writes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.instructions = [line.strip().rstrip(";") for line in text.splitlines() if line.startswith("\t")]
        self._made_by: dict[str, list[str]] = {}
        for instruction in self.instructions:
            for register in self.written(instruction):
                self._made_by.setdefault(register, []).append(instruction)

    @staticmethod
    def name(instruction: str) -> str:
        return re.sub(r"^@\S+\s+", "", instruction).split()[0]

    @staticmethod
    def _operands(instruction: str) -> list[str]:
        """Return operands; those of a vector, in braces, are one."""
        return re.findall(r"\{[^}]*\}|[^\s,]+", re.sub(r"^(@\S+\s+)?\S+\s*", "", instruction))

    def written(self, instruction: str) -> list[str]:
        if self.name(instruction).startswith(("st.", "bra", "bar.", "ret", ".")):
            return []
        return re.findall(r"%\w+", self._operands(instruction)[0])

    def read(self, instruction: str) -> list[str]:
        return [o for operand in self._operands(instruction)[1:] for o in re.findall(r"%\w+", operand)]

    def named(self, pattern: str) -> list[str]:
        return [i for i in self.instructions if re.fullmatch(pattern, self.name(i))]

    def makers(self, register: str) -> set[str]:
        """Return the names of the instructions that write a register."""
        return {self.name(i) for i in self._made_by.get(register, ())}

    def users(self, register: str) -> list[str]:
        """Return the instructions that compute with a register, or with what a selection may take from it."""
        users = [i for i in self.instructions if register in self.read(i)]
        selections = [i for i in users if self.name(i).startswith("selp.")]
        selected = [user for i in selections for made in self.written(i) for user in self.users(made)]
        return [i for i in users if i not in selections] + selected


FUSED = r"(fma|mad)\.\w.*f32"
INTEGER_TO_FLOAT = r"cvt\.rn\.f32\.[su]\d+"
FLOAT_TO_INTEGER = r"cvt\.\w+(\.ftz)?\.[su]\d+\.f32"
WEIGHTS = "ld.global.nc.v4.f32"


def fused_without_weight(ptx: Ptx) -> list[str]:
    """Return operations that round a product and a sum once, without that a factor is a weight of a sample."""
    fused = ptx.named(FUSED)
    return [i for i in fused if WEIGHTS not in {m for r in ptx.read(i)[:2] for m in ptx.makers(r)}]


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_only_products_with_weights_are_fused_with_sums(ptx_of: Callable[[Variant], Ptx], variant: Variant) -> None:
    ptx = ptx_of(variant)
    assert ptx.named(FUSED)
    assert fused_without_weight(ptx) == []


@pytest.mark.parametrize("variant", STORED, ids=name_of)
def test_stored_values_are_converted_by_a_product_and_a_sum_that_both_round(
    ptx_of: Callable[[Variant], Ptx], variant: Variant
) -> None:
    ptx = ptx_of(variant)
    converted = ptx.named(INTEGER_TO_FLOAT)
    assert converted
    for conversion in converted:
        products = ptx.users(*ptx.written(conversion))
        assert {ptx.name(i) for i in products} == {"mul.rn.ftz.f32"}
        sums = [user for i in products for user in ptx.users(*ptx.written(i))]
        assert {ptx.name(i) for i in sums} == {"add.rn.ftz.f32"}


@pytest.mark.parametrize("variant", ROUNDED, ids=name_of)
def test_integers_are_rounded_to_nearest_even_then_limited(ptx_of: Callable[[Variant], Ptx], variant: Variant) -> None:
    ptx = ptx_of(variant)
    integers = ptx.named(FLOAT_TO_INTEGER)
    assert integers
    for conversion in integers:
        chain: list[str] = []
        (register,) = ptx.read(conversion)
        while (makers := ptx.makers(register)) and chain[-1:] != ["cvt.rni.f32.f32"]:
            (maker,) = makers
            chain.append(maker)
            (made,) = [i for i in ptx.named(re.escape(maker)) if register in ptx.written(i)]
            register = ptx.read(made)[0]
        assert chain == ["min.ftz.f32", "max.ftz.f32", "cvt.rni.f32.f32"]


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_there_is_no_double_precision_no_division_of_64_bits_and_no_local_memory(
    ptx_of: Callable[[Variant], Ptx], variant: Variant
) -> None:
    assert re.findall(r"\S+\.f64|(?:div|rem)\.[su]64|\S*\.local\S*|\bcall\b", ptx_of(variant).text) == []


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_arguments_of_a_launch_have_the_sizes_of_the_parameters_of_the_kernel(
    ptx_of: Callable[[Variant], Ptx], variant: Variant
) -> None:
    # CuPy passes the bytes of an argument and does not know the parameters, so another type shifts or misreads them.
    values, out = np.zeros((2, 8, 40), variant.read), np.zeros((2, 8, 40), variant.written)
    per_slice = np.zeros(2, np.float32)
    rescale = Rescale(per_slice, per_slice, np.zeros((2, 2), variant.read), "air") if variant in STORED else None
    given = arguments(values, out, selection(8, 0, 8), rescale=rescale)
    bits = [64 if isinstance(a, np.ndarray) else 8 * a.itemsize for a in given]
    floats = [isinstance(a, np.float32) for a in given]
    parameters = re.findall(rf"\.param \.([bfsu])(\d+) (?:\.ptr\S* )?.*{NAME}_param_\d+", ptx_of(variant).text)
    assert [int(size) for _, size in parameters] == bits
    assert [kind == "f" for kind, _ in parameters] == floats


def test_the_reader_of_ptx_notices_what_it_looks_for(compile_only: Compile) -> None:
    source = """
    extern "C" __global__ void wrong(const short* stored, const float* slope, float* out, long long size, int n) {
        float spilled[64];
        for (int i = 0; i < n; ++i) spilled[i] = stored[i] * slope[0] + slope[1];
        out[size / n] = (int) (spilled[n] * 0.1);
    }"""
    ptx = Ptx(compile_only(source, arch="80", ptx=True)[0])
    assert fused_without_weight(ptx)
    (conversion, *_) = ptx.named(INTEGER_TO_FLOAT)
    assert {ptx.name(i) for i in ptx.users(*ptx.written(conversion))} == {"fma.rn.ftz.f32"}
    for pattern in (r"div\.s64", r"mul\.f64", r"st\.local\.f32", r"ld\.local\.f32"):
        assert ptx.named(pattern), pattern
    (integer,) = ptx.named(r"cvt\.rzi\.s32\.f64")
    assert "cvt.rni.f32.f32" not in ptx.makers(ptx.read(integer)[0])
    _, log = compile_only(source, ("--ptxas-options=-v",), arch="80")
    assert "256 bytes stack frame" in log


def test_a_kernel_that_does_not_compile_is_an_error(compile_only: Compile) -> None:
    compiler: Any = import_module("cupy.cuda.compiler")
    with pytest.raises(compiler.CompileException, match="undefined"):
        compile_only('extern "C" __global__ void wrong() { nothing(); }', arch="80")


def kernels_of_engine_ndimage() -> Iterator[tuple[str, Any, list[tuple[str, int]], int]]:
    """Yield name, kernel, inputs as (dtype, dimensions) and output dimensions for `--engine ndimage`."""
    float32 = np.float32
    zoom = private("cupyx.scipy.ndimage._interp_kernels", "_get_zoom_kernel").__wrapped__
    for order, mode, padding in ((3, "nearest", 12), (1, "mirror", 0)):
        kernel = zoom(
            3, False, (324, 349, 349), mode, order=order, integer_output=False, grid_mode=mode == "nearest",
            nprepad=padding, float_dtype=float32,
        )  # fmt: skip
        yield f"zoom of order {order}", kernel, [("float32", 3), ("float32", 1)], 1
    correlate = private("cupyx.scipy.ndimage._filters", "_get_correlate_kernel").__wrapped__
    kernel = correlate("nearest", (1, 9, 1), "int", (0, 4, 0), 0.0)
    yield "gaussian_filter", kernel, [("float32", 3), ("float32", 3)], 3
    resize = private("cucim.skimage._vendored._ndimage_interp_kernels", "_get_zoom_kernel").__wrapped__
    kernel = resize(
        3, False, (64, 512, 512), "nearest", order=1, integer_output=False, grid_mode=True, nprepad=0,
        float_dtype=float32, batch_axes=(0,), output_c_contiguous=True,
    )  # fmt: skip
    yield "resize of cuCIM", getattr(kernel, "kernel", kernel), [("float32", 3), ("float32", 1)], 1


def elementwise_source(kernel: Any, inputs: list[tuple[str, int]], ndim: int) -> str:
    """Return the source that CuPy generates for an ElementwiseKernel, contiguous inputs and an output of float32."""
    cupy: Any = import_module("cupy")
    carray, info = import_module("cupy._core._carray"), private("cupy._core._kernel", "_ArgInfo")
    array, indexer = 1, 2  # kinds of _ArgInfo
    types = tuple(np.dtype(dtype) for dtype, _ in inputs)
    in_types, out_types, type_map = kernel._decide_params_type(types, (np.dtype("float32"),))
    dimensions = [n for _, n in inputs] + [ndim]
    arguments = [
        info(array, cupy.ndarray, np.dtype(t), n, True, True)
        for t, n in zip((*in_types, *out_types), dimensions, strict=True)
    ]
    code = private("cupy._core._kernel", "_get_elementwise_kernel_code")
    text: str = code(
        (*arguments, info(indexer, carray.Indexer, None, ndim, True, True)),
        type_map, kernel.params, kernel.operation, kernel.name, kernel.preamble,
    )  # fmt: skip
    return text


def test_the_kernels_of_engine_ndimage_compile(compile_only: Compile) -> None:
    for name, kernel, inputs, ndim in kernels_of_engine_ndimage():
        cubin, _ = compile_only(elementwise_source(kernel, inputs, ndim), arch="90", cupy_headers=True)
        assert cubin[:4] == b"\x7fELF", name


def test_the_spline_filter_of_engine_ndimage_compiles(compile_only: Compile) -> None:
    kernel = private("cupyx.scipy.ndimage._spline_prefilter_core", "get_raw_spline1d_kernel").__wrapped__(
        1, 3, "nearest", order=3, index_type="int", data_type="float", pole_type="float",
        block_size=2 ** math.ceil(math.log2(132 / 32)),
    )  # fmt: skip
    cubin, _ = compile_only(kernel.code, kernel.options, arch="90")
    assert cubin[:4] == b"\x7fELF"
