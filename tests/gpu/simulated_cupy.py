"""The modules `cupy`, `cupyx`, `cucim` and `cupy_backends` on a simulated machine: see `simulated_finder`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import simulated_array
import simulated_kernels
import simulated_streams
from simulated_array import computed, lifted, ndarray
from simulated_cuda import CUDARuntimeError
from simulated_memory import OutOfMemoryError, current_pool

NOT_IN_CUPY = frozenset({
    "asanyarray", "asmatrix", "bmat", "block", "busday_count", "busday_offset", "datetime_as_string",
    "datetime_data", "einsum_path", "frompyfunc", "fromregex", "geomspace", "getbufsize", "geterr", "geterrcall",
    "get_include", "histogram_bin_edges", "info", "insert", "is_busday", "isnat", "matvec", "nanpercentile",
    "nanquantile", "nested_iters", "polyder", "polydiv", "polyint", "setbufsize", "seterr", "seterrcall",
    "show_runtime", "spacing", "test", "unstack", "vecdot", "vecmat", "load", "loadtxt", "save", "savetxt",
    "savez", "savez_compressed", "genfromtxt", "fromfile", "fromiter", "frombuffer", "fromstring", "array2string",
    "array_repr", "array_str", "False_", "ScalarType", "True_", "busdaycalendar", "bytes_", "character", "clongdouble",
    "complex256", "datetime64", "errstate", "flexible", "float128", "little_endian", "longdouble", "matrix", "memmap",
    "ndenumerate", "nditer", "object_", "recarray", "record", "sctypeDict", "str_", "timedelta64", "typecodes", "void",
})  # fmt: skip
"""NumPy's names that CuPy has not, or that have to do with the host."""


def zoom(
    input: Any,  # noqa: A002
    zoom: Any,
    output: Any = None,
    order: int = 3,
    mode: str = "constant",
    cval: float = 0.0,
    prefilter: bool = True,
    *,
    grid_mode: bool = False,
) -> Any:
    """Compute `cupyx.scipy.ndimage.zoom` by SciPy."""
    from scipy import ndimage

    assert output is None
    options = {"order": order, "mode": mode, "cval": cval, "prefilter": prefilter, "grid_mode": grid_mode}
    shape = tuple(round(n * factor) for n, factor in zip(input.shape, zoom, strict=True))
    return computed(ndimage.zoom, (input, zoom), options, shape=shape)


def gaussian_filter(
    input: Any,  # noqa: A002
    sigma: Any,
    order: int = 0,
    output: Any = None,
    mode: str = "reflect",
    cval: float = 0.0,
    truncate: float = 4.0,
    radius: Any = None,
    axes: Any = None,
) -> Any:
    """Compute `cupyx.scipy.ndimage.gaussian_filter` by SciPy."""
    from scipy import ndimage

    assert output is None
    options = {"order": order, "mode": mode, "cval": cval, "truncate": truncate, "radius": radius, "axes": axes}
    return computed(ndimage.gaussian_filter, (input, sigma), options, shape=input.shape)


def resize(
    image: Any,
    output_shape: Sequence[int],
    order: int | None = None,
    mode: str = "reflect",
    cval: float = 0,
    clip: bool | None = None,
    preserve_range: bool = False,
    anti_aliasing: bool | None = None,
    anti_aliasing_sigma: Any = None,
) -> Any:
    """Compute `cucim.skimage.transform.resize` by scikit-image."""
    from skimage import transform

    options = {
        "order": order, "mode": mode, "cval": cval, "clip": True if clip is None else clip,
        "preserve_range": preserve_range, "anti_aliasing": anti_aliasing, "anti_aliasing_sigma": anti_aliasing_sigma,
    }  # fmt: skip
    return computed(transform.resize, (image, tuple(output_shape)), options, shape=tuple(output_shape))


@cache
def modules() -> dict[str, ModuleType]:
    """Return the modules by name."""
    found: dict[str, ModuleType] = {}

    def module(name: str, **content: Any) -> None:
        found[name] = ModuleType(name)
        found[name].__dict__.update(content, __path__=[])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(found[parent], child, found[name])

    module("cupy", **(_functions(np) | _own_functions()))
    module("cupy.linalg", **_functions(np.linalg))
    module("cupy.fft", **_functions(np.fft))
    module(
        "cupy.cuda",
        Device=simulated_streams.Device,
        Stream=simulated_streams.Stream,
        Event=simulated_streams.Event,
        MemoryHook=simulated_array.MemoryHook,
        get_current_stream=simulated_streams.get_current_stream,
        get_elapsed_time=simulated_streams.get_elapsed_time,
        is_available=lambda: _device_count() > 0,
    )
    module("cupy.cuda.device", Device=simulated_streams.Device)
    module("cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError)
    module(
        "cupy.cuda.compiler",
        CompileException=simulated_kernels.CompileException,
        _compile_module_with_cache=simulated_kernels.compile_module_with_cache,
    )
    runtime = {
        "CUDARuntimeError": CUDARuntimeError,
        "getDeviceCount": simulated_streams.get_device_count,
        "getDeviceProperties": simulated_streams.get_device_properties,
        "driverGetVersion": simulated_streams.driver_get_version,
        "runtimeGetVersion": simulated_streams.runtime_get_version,
    }
    module("cupy.cuda.runtime", **runtime)
    for name in ("cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.api"):
        module(name)
    module("cupy_backends.cuda.api.runtime", **runtime)
    module("cupyx", empty_pinned=simulated_array.empty_pinned)
    module("cupyx.scipy")
    module("cupyx.scipy.ndimage", zoom=zoom, gaussian_filter=gaussian_filter)
    module("cucim", __version__="0")
    module("cucim.skimage")
    module("cucim.skimage.transform", resize=resize)
    return found


def _device_count() -> int:
    try:
        return simulated_streams.get_device_count()
    except CUDARuntimeError:
        return 0


def _functions(library: Any) -> dict[str, Any]:
    """Return the names of a NumPy module that CuPy has too: functions on device arrays, types and constants."""
    found = {}
    for name in set(dir(library)) - NOT_IN_CUPY:
        value = getattr(library, name)
        if name.startswith("_") or isinstance(value, ModuleType):
            continue
        is_function = callable(value) and not isinstance(value, type)
        found[name] = lifted(name, value) if is_function else value
    return found


def _own_functions() -> dict[str, Any]:
    own = ("array", "asarray", "asnumpy", "ascontiguousarray", "empty", "empty_like")
    return {
        **{name: getattr(simulated_array, name) for name in own},
        **{name: getattr(np, name) for name in ("result_type", "can_cast", "issubdtype", "promote_types")},
        "ndarray": ndarray,
        "RawKernel": simulated_kernels.RawKernel,
        "RawModule": simulated_kernels.RawModule,
        "get_default_memory_pool": current_pool,
        "is_available": lambda: _device_count() > 0,
        "__version__": "14.1.1",
    }
