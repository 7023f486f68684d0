"""Compiles a CUDA kernel with g++ and runs it on the host, and reports mistakes that a GPU does not report.

* Blocks and the threads of a block run in random order. `__syncthreads()` is a barrier of all threads of the block; if
  some of them do not reach it, the kernel fails instead of hanging.
* Every read and write is checked: it must be within an array that was passed, within shared memory, or of the thread's
  own variables. The compiler emits calls for this (`-fsanitize=kernel-address`), which cuda_on_host.cpp answers.
* So are indices of shared arrays, overflows of signed integers, shifts, and conversions out of an integer's range.
* Shared memory has NaN in all its bytes when a block starts.
* Arguments must have the type of the parameter; CUDA would read whatever bytes are there.
* Products and sums are contracted (`-ffp-contract=fast`) like NVRTC's, unless written as `__fmul_rn` and `__fadd_rn`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_THREADS = 1024
"""Largest number of threads in a block."""

MOST_SHARED_BYTES = 48 * 1024
"""Largest size of static shared memory."""

POISON = np.uint16(0x7FFD)
"""Content of memory that was not written: NaN as float16, float32 and float64, and large as an integer."""

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
CHECKS = [
    "-fsanitize=kernel-address",
    *(f"--param=asan-{name}=0" for name in ("instrumentation-with-call-threshold", "globals", "stack")),
    "-fsanitize=bounds,alignment,signed-integer-overflow,shift,integer-divide-by-zero,float-cast-overflow",
]
BUILD = ["-O2", "-fPIC", "-Wall", "-Werror"]
KERNEL_ONLY = [
    "-ffp-contract=fast",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-gnu-unique",
    "-Wno-unknown-pragmas",
    "-Wno-sign-compare",
]
RUNTIME_ONLY = ["-std=c++17", "-U_FORTIFY_SOURCE"]  # _FORTIFY_SOURCE forbids to jump between stacks

_running = threading.Lock()
"""A kernel has one state for each process."""


class CompileError(Exception):
    """A kernel does not compile; NVRTC would refuse it too."""


class LaunchError(ValueError):
    """A kernel cannot be launched with these sizes or arguments."""


class KernelFault(AssertionError):  # noqa: N818 - what the kernel has
    """A kernel has made a mistake while it ran."""


class Pointer(NamedTuple):
    """Memory that is passed to a kernel: address, bytes that it may use, and NumPy's kind and size of its elements."""

    address: int
    low: int
    high: int
    dtype: np.dtype[Any]


Launch = Callable[..., None]


class _Index(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class _Parameter(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char),
        ("bytes", ctypes.c_int),
        ("alignment", ctypes.c_int),
        ("pointer", ctypes.c_bool),
    )


class Kernel:
    """A compiled kernel: see `compile_kernel`."""

    def __init__(self, library: Path, name: str, *, has_barriers: bool) -> None:
        loaded = ctypes.CDLL(str(library))
        described = (_Parameter * 64)()
        self.parameters = described[: loaded.cuda_parameters(described)]
        loaded.cuda_shared_bytes.restype = ctypes.c_size_t
        self.name = name
        self.shared_bytes = loaded.cuda_shared_bytes()
        self._call = ctypes.cast(loaded.cuda_call, ctypes.c_void_p)
        self._launch = loaded.cuda_launch
        self._has_barriers = has_barriers

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        *,
        seed: int = 0,
        blocks: Sequence[tuple[int, int, int]] | None = None,
    ) -> None:
        """Run the kernel.

        Parameters
        ----------
        grid, block : sequence of int
            Numbers of blocks and of threads in a block.
        arguments : sequence
            `Pointer`, NumPy array or None for a pointer, NumPy scalar for anything else.
        seed : int
            Chooses the order of blocks and threads.
        blocks : sequence of (x, y, z), optional
            Run only these blocks of the grid.
        """
        self.prepared(grid, block, arguments)(seed, blocks)

    def prepared(self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any]) -> Launch:
        """Return a launch as a function of seed and blocks, which keeps the arguments' values, but not their memory."""
        sizes = [checked_size(grid, (2**31 - 1, 65535, 65535)), checked_size(block, (MOST_THREADS, MOST_THREADS, 64))]
        if prod(sizes[1]) > MOST_THREADS:
            raise LaunchError(f"a block has at most {MOST_THREADS} threads, not {prod(sizes[1])}")
        values, ranges = self.packed(arguments)
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        edges = (ctypes.c_size_t * (2 * len(ranges)))(*[edge for limits in ranges for edge in limits])
        x, y, _ = sizes[0]

        def launch(seed: int, blocks: Sequence[tuple[int, int, int]] | None = None) -> None:
            if blocks is None:
                numbers = np.random.default_rng(seed).permutation(prod(sizes[0])).astype(np.uint64)
            else:
                numbers = np.array([i + x * (j + y * k) for i, j, k in blocks], np.uint64)
            error = ctypes.create_string_buffer(500)
            assert len(values) == len(pointers)  # keeps what the pointers point to
            with _running:
                failed = self._launch(
                    pointers, edges, len(ranges), ctypes.byref(_Index(*sizes[0])), ctypes.byref(_Index(*sizes[1])),
                    numbers.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(len(numbers)), int(self._has_barriers),
                    ctypes.c_uint64(seed + 1), error, ctypes.c_size_t(len(error)),
                )  # fmt: skip
            if failed:
                raise KernelFault(f"{self.name}: {error.value.decode()}")

        return launch

    def packed(self, arguments: Sequence[Any]) -> tuple[list[Any], list[tuple[int, int]]]:
        """Return arguments as they are passed to the kernel, and the ranges of addresses that it may use.

        Raises
        ------
        LaunchError
            If they differ from the parameters in number or type.
        """
        if len(arguments) != len(self.parameters):
            raise LaunchError(f"{self.name} has {len(self.parameters)} parameters, not {len(arguments)}")
        values: list[Any] = []
        ranges = []
        for n, (argument, parameter) in enumerate(zip(arguments, self.parameters, strict=True)):
            if argument is None and parameter.pointer:
                values.append(ctypes.c_void_p(0))
                continue
            pointer = _pointer_to(argument) if isinstance(argument, np.ndarray) else argument
            is_pointer = isinstance(pointer, Pointer)
            dtype = pointer.dtype if is_pointer else np.asarray(argument).dtype
            kind = parameter.kind.decode()
            fits = kind == "v" or (kind, parameter.bytes) == (dtype.kind, dtype.itemsize)
            if is_pointer != parameter.pointer or not fits:
                wanted = f"{'pointer to ' * parameter.pointer}{kind}{parameter.bytes}"
                given = f"{'pointer to ' * is_pointer}{dtype.kind}{dtype.itemsize}"
                raise LaunchError(f"parameter {n} of {self.name} is a {wanted}, its argument a {given}")
            if is_pointer:
                if pointer.address % parameter.alignment:
                    raise LaunchError(f"argument {n} of {self.name} is not aligned to {parameter.alignment} bytes")
                values.append(ctypes.c_void_p(pointer.address))
                ranges.append((pointer.low, pointer.high))
            else:
                values.append(ctypes.create_string_buffer(np.asarray(argument).tobytes()))
        return values, ranges


def _pointer_to(array: NDArray[Any]) -> Pointer:
    return Pointer(array.ctypes.data, *np.lib.array_utils.byte_bounds(array), array.dtype)


def checked_size(size: Sequence[int], limits: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return three numbers of blocks or threads; raise a LaunchError if one is out of CUDA's limits."""
    x, y, z = (*size, 1, 1)[:3]
    if not all(1 <= n <= limit for n, limit in zip((x, y, z), limits, strict=True)):
        raise LaunchError(f"{tuple(size)} is out of the limits of a launch, 1 to {limits}")
    return x, y, z


def virtual_array(shape: Any, dtype: Any) -> NDArray[Any]:
    """Return an array of zeros of any size, of which only the pages that are written or read take memory."""
    size = prod(shape) * np.dtype(dtype).itemsize
    no_reserve = 0x4000
    memory = mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS | no_reserve)
    array: NDArray[Any] = np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)
    return array


@cache
def compile_kernel(source: str, name: str, options: tuple[str, ...] = ()) -> Kernel:
    """Compile a kernel, or load it if any process of this user has already compiled it.

    Parameters
    ----------
    source : str
        CUDA C++ without headers.
    name : str
        Function with ``extern "C" __global__``.
    options : tuple of str
        Options of NVRTC: ``-D``, ``-U``, ``--std``, ``--fmad``.

    Raises
    ------
    CompileError
        If the source does not compile, or includes a header, which NVRTC would not find.
    """
    if COMPILER is None:
        raise CompileError("no g++")
    if include := re.search(r"^\s*#\s*include.*|\bstd::\w+", source, re.MULTILINE):
        raise CompileError(f"NVRTC has no C++ library: {include[0].strip()}")
    text = f'#include "cuda_on_host.h"\n#line 1 "{name}.cu"\n{source}\nCUDA_KERNEL({name})\n'
    flags = [*BUILD, *KERNEL_ONLY, *CHECKS, *_host_flags(), *_compiler_options(options), f"-I{HERE}"]
    library = _cached(text, flags)
    kernel = Kernel(library, name, has_barriers="__syncthreads" in f"{source}{options}")
    if kernel.shared_bytes > MOST_SHARED_BYTES:
        raise CompileError(f"{name} uses too much shared data: {kernel.shared_bytes} bytes of {MOST_SHARED_BYTES}")
    return kernel


def _compiler_options(options: tuple[str, ...]) -> list[str]:
    """Return options of NVRTC as options of g++."""
    known = []
    for option in options:
        if re.fullmatch(r"-[DU]\w+(=.*)?", option):
            known.append(option)
        elif match := re.fullmatch(r"--?std=(c\+\+\d\d)", option):
            known.append(f"-std={match[1]}")
        elif match := re.fullmatch(r"--?fmad=(true|false)", option):
            known.append("-ffp-contract=" + ("fast" if match[1] == "true" else "off"))
        else:
            raise CompileError(f"unrecognized option {option!r}")
    return known if any("std=" in option for option in known) else ["-std=c++17", *known]


@cache
def _host_flags() -> tuple[str, ...]:
    """Return the flag for fused multiply-add, where g++ does not assume it."""
    if platform.machine() != "x86_64":
        return ()
    info = Path("/proc/cpuinfo")
    return ("-mfma",) if info.exists() and re.search(r"\bfma\b", info.read_text()) else ()


@cache
def _folder() -> Path:
    """Return the folder of compiled kernels, shared by all processes of this user."""
    folder = Path(tempfile.gettempdir()) / f"cuda-on-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} belongs to another user"
    return folder


@cache
def _version() -> str:
    """Return a text that changes with the compiler and with the files beside this one."""
    version = subprocess.run([str(COMPILER), "--version"], capture_output=True, text=True, check=True).stdout
    return version + "".join((HERE / f"cuda_on_host.{suffix}").read_text() for suffix in ("h", "cpp"))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join([_version(), *texts]).encode()).hexdigest()[:32]


def _cached(text: str, flags: list[str]) -> Path:
    """Return the library that g++ makes of a source, from the cache if it is there."""
    library = _folder() / f"{_digest(text, *flags)}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=_folder()) as work:
        source, kernel, built = (f"{work}/kernel.{suffix}" for suffix in ("cpp", "o", "so"))
        Path(source).write_text(text)
        _run_compiler(*flags, "-c", source, "-o", kernel)
        before, runtime, after = (_runtime(part) for part in ("BEFORE", "RUNTIME", "AFTER"))
        _run_compiler("-shared", "-o", built, before, kernel, after, runtime)
        os.replace(built, library)  # atomic: another process may compile the same kernel
    return library


@cache
def _runtime(part: str) -> str:
    """Return the object file of a part of cuda_on_host.cpp."""
    compiled = _folder() / f"{_digest(part, *BUILD, *RUNTIME_ONLY)}.o"
    if not compiled.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as work:
            _run_compiler(
                *BUILD, *RUNTIME_ONLY, f"-DCUDA_{part}", "-c", str(HERE / "cuda_on_host.cpp"), "-o", f"{work}/part.o"
            )
            os.replace(f"{work}/part.o", compiled)
    return str(compiled)


def _run_compiler(*arguments: str) -> None:
    assert COMPILER is not None
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(done.stderr)
