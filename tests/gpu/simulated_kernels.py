"""`cupy.RawKernel` and `RawModule`, whose CUDA source is compiled for the host."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import numpy as np
from cuda_on_host import CompileError, Kernel, Pointer, compile_kernel
from simulated_array import _enqueue, ndarray
from simulated_cuda import KERNEL_S, simulation


class CompileException(Exception):  # noqa: N818 - CuPy's name
    """`cupy.cuda.compiler.CompileException`."""

    def __init__(self, msg: str, source: str, name: str, options: Any, backend: str = "nvrtc") -> None:
        super().__init__(msg)
        self.source, self.name, self.options, self.backend = source, name, options, backend


CompileException.__module__ = "cupy.cuda.compiler"


class CompiledModule:
    """Compiled source, with the functions of `cupy.cuda.Module`."""

    def __init__(self, source: str, options: tuple[str, ...]) -> None:
        self._source = source
        self._options = options

    def get_function(self, name: str) -> Kernel:
        try:
            return compile_kernel(self._source, name, self._options)
        except CompileError as exc:
            raise CompileException(str(exc), self._source, name, self._options) from exc


def compile_module_with_cache(source: str, options: tuple[str, ...] = (), **_: Any) -> CompiledModule:
    """Stand for the function through which CuPy compiles everything; tests replace it to count."""
    return CompiledModule(source, options)


class RawModule:
    """`cupy.RawModule` of a source."""

    def __init__(self, *, code: str, options: tuple[str, ...] = (), backend: str = "nvrtc") -> None:
        self._code, self._options = code, options
        assert backend == "nvrtc"

    def get_function(self, name: str) -> RawKernel:
        return RawKernel(self._code, name, self._options)


class RawKernel:
    """`cupy.RawKernel`. Views are passed as the address of their first element."""

    def __init__(self, code: str, name: str, options: tuple[str, ...] = (), backend: str = "nvrtc") -> None:
        if not isinstance(options, tuple):
            raise TypeError("Argument 'options' has incorrect type (expected tuple)")
        assert backend == "nvrtc"
        self.code, self.name, self.options = code, name, options
        self._compiled: dict[Any, Kernel] = {}

    def compile(self) -> None:
        self._kernel()

    def _kernel(self) -> Kernel:
        device = simulation().device()
        if device not in self._compiled:
            self._compiled[device] = _module(self.code, self.options).get_function(self.name)
        return self._compiled[device]

    def __call__(self, grid: Any, block: Any, args: Iterable[Any], *, shared_mem: int = 0) -> None:
        if not isinstance(grid, tuple) or not isinstance(block, tuple):
            raise TypeError("Expected tuple")
        assert not shared_mem, "dynamic shared memory is not simulated"
        kernel = self._kernel()
        args = list(args)
        arrays = [a for a in args if isinstance(a, ndarray)]
        launch = kernel.prepared(
            [max(1, int(n)) for n in grid], [max(1, int(n)) for n in block], [_passed(a) for a in args]
        )
        views = [a._view for a in arrays]
        seed = simulation().next_seed()

        def run() -> None:
            assert views is not None  # keeps the memory, which the launch has as numbers
            launch(seed)

        _enqueue(arrays, run, KERNEL_S)


def _module(code: str, options: tuple[str, ...]) -> CompiledModule:
    """Return compiled source; each is compiled once."""
    modules = simulation().modules
    if (code, options) not in modules:
        modules[code, options] = import_module("cupy.cuda.compiler")._compile_module_with_cache(code, options)
    module: CompiledModule = modules[code, options]
    return module


def _passed(value: Any) -> Any:
    """Return an argument as CuPy passes it."""
    if isinstance(value, ndarray):
        view = value._view
        return Pointer(view.ctypes.data, *np.lib.array_utils.byte_bounds(view), view.dtype)
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise TypeError(
                f"You are trying to pass a numpy.ndarray of shape {value.shape} as a kernel parameter. Only "
                "numpy.ndarrays of size one can be passed by value."
            )
        return value.reshape(())[()]
    if value is None or isinstance(value, np.generic):
        return value
    if isinstance(value, (bool, int, float)):
        return np.asarray(value)[()]
    raise TypeError(f"Unsupported type {type(value)}")
