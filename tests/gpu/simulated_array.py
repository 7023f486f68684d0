"""`cupy.ndarray` in simulated device memory, and NumPy's functions on it.

An array cannot be converted to NumPy implicitly. Everything that computes is queued on the current stream; the result's
shape and dtype come from a trial with zeros. Functions that return views do so at once, like CuPy's.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from simulated_cuda import DOWNLOAD_S, UPLOAD_S, simulation
from simulated_memory import Memory, PinnedPool, current_pool
from simulated_streams import Device, Stream, get_current_stream

VIEWS = frozenset(
    {"reshape", "transpose", "permute_dims", "moveaxis", "swapaxes", "rollaxis", "flip", "flipud", "fliplr"}
    | {"expand_dims", "squeeze", "broadcast_to", "ravel", "atleast_1d", "atleast_2d", "atleast_3d", "diagonal", "real"}
)
"""Functions that return a view if they can."""

SYNCHRONOUS = frozenset({"nonzero", "flatnonzero", "argwhere", "unique", "unique_values", "compress", "extract"})
"""Functions whose result has a shape that depends on the values, so the host waits for them."""

METHODS = (
    *(
        "all",
        "any",
        "argmax",
        "argmin",
        "clip",
        "cumprod",
        "cumsum",
        "diagonal",
        "dot",
        "flatten",
        "max",
        "mean",
        "min",
    ),
    *("nonzero", "prod", "ravel", "repeat", "round", "squeeze", "std", "sum", "swapaxes", "take", "trace", "var"),
)
"""Methods of NumPy's arrays that need no code of their own."""

pinned = PinnedPool()


class MemoryHook:
    """`cupy.cuda.MemoryHook`."""

    name = "MemoryHook"
    active: tuple[MemoryHook, ...] = ()

    def __enter__(self) -> MemoryHook:
        MemoryHook.active += (self,)
        return self

    def __exit__(self, *_: object) -> None:
        MemoryHook.active = tuple(hook for hook in MemoryHook.active if hook is not self)

    def malloc_preprocess(self, **details: Any) -> None:
        """Do nothing before an allocation."""

    def malloc_postprocess(self, **details: Any) -> None:
        """Do nothing after an allocation."""


class ndarray:  # noqa: N801 - CuPy's name
    """`cupy.ndarray`."""

    __array_priority__ = 100

    def __init__(self, shape: Any, dtype: Any = float, *, order: str = "C") -> None:
        shape = (int(shape),) if isinstance(shape, (int, np.integer)) else tuple(map(int, shape))
        dtype = np.dtype(dtype)
        self._memory = allocate(prod(shape) * dtype.itemsize)
        flat = self._memory.bytes[: prod(shape) * dtype.itemsize].view(dtype)
        self._view: NDArray[Any] = flat.reshape(shape) if order == "C" else flat.reshape(shape[::-1]).T

    @classmethod
    def _over(cls, view: NDArray[Any], memory: Memory) -> ndarray:
        array = cls.__new__(cls)
        array._view, array._memory = view, memory
        return array

    shape = property(
        lambda self: self._view.shape, lambda self, shape: setattr(self, "_view", _shaped(self._view, shape))
    )
    dtype = property(lambda self: self._view.dtype)
    ndim = property(lambda self: self._view.ndim)
    size = property(lambda self: self._view.size)
    nbytes = property(lambda self: self._view.nbytes)
    itemsize = property(lambda self: self._view.itemsize)
    strides = property(lambda self: self._view.strides)
    flags = property(lambda self: self._view.flags)
    T = property(lambda self: self.transpose())
    mT = property(lambda self: self.swapaxes(-1, -2))  # noqa: N815 - CuPy's name
    device = property(lambda self: Device(self._memory.device.ordinal))

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__":
            return NotImplemented
        return computed(ufunc, inputs, options)

    def set(self, arr: Any, stream: Stream | None = None) -> None:
        """Copy from the host, in the order of the stream. Page-locked memory is read when the copy runs."""
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if arr.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if not self.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        self._upload(arr, stream or get_current_stream(), UPLOAD_S)

    def _upload(self, host: NDArray[Any], stream: Stream, duration_s: float) -> None:
        simulated, target = simulation(), self._view
        page_locked = pinned.locate(host) if host.flags.c_contiguous else None
        source = host.copy() if page_locked is None else page_locked  # the driver copies pageable memory at once

        def run() -> None:
            target[...] = source
            simulated.inspect(source)

        self._check_place(stream)
        simulated.copies.append(("up", str(self.dtype), self.shape))
        simulated.enqueue(*stream.place, run, duration_s)

    def get(
        self,
        stream: Stream | None = None,
        order: str = "C",
        out: NDArray[Any] | None = None,
        blocking: bool = True,
    ) -> NDArray[Any]:
        """Copy to the host, in the order of the stream; the host waits if `blocking`, or if `out` is pageable."""
        stream = stream or get_current_stream()
        source = self._view
        if out is None:
            out = np.empty(self.shape, self.dtype, order="F" if order == "F" else "C")
        elif not isinstance(out, np.ndarray):
            raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
        elif out.dtype != self.dtype:
            raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
        elif out.shape != self.shape:
            raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual shape: {out.shape}")
        elif not out.flags.c_contiguous and not out.flags.f_contiguous:
            raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
        self._check_place(stream)
        simulation().copies.append(("down", str(self.dtype), self.shape))
        page_locked = pinned.locate(out)
        target = out if page_locked is None else page_locked
        operation = simulation().enqueue(*stream.place, lambda: np.copyto(target, source), DOWNLOAD_S)
        if blocking or page_locked is None:
            simulation().wait([operation])
        return out

    def _check_place(self, stream: Stream) -> None:
        simulation().check()
        if stream.place[0] is not self._memory.device:
            raise ValueError(
                "Array device must be same as the current device: array device = "
                f"{self._memory.device.ordinal} while current = {stream.place[0].ordinal}"
            )

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __getitem__(self, index: Any) -> Any:
        entries = index if isinstance(index, tuple) else (index,)
        if any(isinstance(entry, ndarray) and entry.dtype == bool for entry in entries):
            return computed(operator.getitem, (self, index), {}, wait=True)
        if any(isinstance(entry, (ndarray, np.ndarray, list)) for entry in entries):
            return computed(operator.getitem, (self, index), {})
        if not any(entry is Ellipsis for entry in entries):
            entries = (*entries, Ellipsis)  # so that a single element is a view too
        return self._over(self._view[entries], self._memory)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError(f"Unsupported type {type(value)}")
        arrays = _arrays_in((self, index, value))
        views = _replaced((self, index, value), _view_of)
        _enqueue(arrays, lambda: operator.setitem(*views))

    def __len__(self) -> int:
        return len(self._view)

    def __iter__(self) -> Any:
        return (self[n] for n in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __index__(self) -> int:
        return operator.index(self.get()[()])

    def __reduce__(self) -> Any:
        return asarray, (self.get(),)

    def fill(self, value: Any) -> None:
        self[...] = value

    def copy(self, order: str = "C") -> ndarray:
        return array(self, copy=True, order=order)

    def view(self, dtype: Any = None) -> ndarray:
        return self._over(self._view.view() if dtype is None else self._view.view(dtype), self._memory)

    def astype(self, dtype: Any, order: str = "K", casting: str = "unsafe", *, copy: bool = True) -> Any:
        if not copy and self.dtype == np.dtype(dtype):
            return self
        return computed(np.ndarray.astype, (self, dtype), {"order": order, "casting": casting})

    def reshape(self, *shape: Any, order: str = "C") -> Any:
        return viewed(np.reshape, (self, shape[0] if len(shape) == 1 else shape), {"order": order})

    def transpose(self, *axes: Any) -> Any:
        return viewed(np.transpose, (self, (axes[0] if len(axes) == 1 else axes) or None), {})


def _shaped(view: NDArray[Any], shape: Any) -> NDArray[Any]:
    shaped = view.reshape(shape)
    if view.size and not np.may_share_memory(shaped, view):
        raise AttributeError("Incompatible shape for in-place modification")
    return shaped


def allocate(size: int) -> Memory:
    """Return memory of the current device, for use on the current stream."""
    device, queue = get_current_stream().place
    for hook in MemoryHook.active:
        hook.malloc_preprocess(device_id=device.ordinal, size=size, mem_size=size)
    try:
        return current_pool().allocate(size, queue)
    finally:
        for hook in MemoryHook.active:
            hook.malloc_postprocess(device_id=device.ordinal, size=size, mem_size=size, mem_ptr=0, pmem_id=0)


def _arrays_in(values: Any) -> list[ndarray]:
    """Return the device arrays in nested tuples, lists and dicts."""
    if isinstance(values, ndarray):
        return [values]
    if isinstance(values, (tuple, list, dict)):
        parts = values.values() if isinstance(values, dict) else values
        return [array for part in parts for array in _arrays_in(part)]
    return []


def _replaced(values: Any, change: Callable[[ndarray], Any]) -> Any:
    """Return nested tuples, lists and dicts with each device array replaced."""
    if isinstance(values, ndarray):
        return change(values)
    if isinstance(values, dict):
        return {key: _replaced(part, change) for key, part in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_replaced(part, change) for part in values)
    if isinstance(values, np.ndarray) and values.ndim:
        raise TypeError(f"Unsupported type {type(values)}")
    return values


def _view_of(array: ndarray) -> NDArray[Any]:
    return array._view


def _enqueue(arrays: Sequence[ndarray], run: Callable[[], Any], duration_s: float = 0.0) -> Any:
    """Queue work with these arrays on the current stream."""
    stream = get_current_stream()
    for used in arrays:
        used._check_place(stream)

    def quietly() -> None:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()

    return simulation().enqueue(*stream.place, quietly, duration_s)


def computed(
    function: Callable[..., Any],
    arguments: Any,
    options: dict[str, Any],
    *,
    wait: bool = False,
    shape: tuple[int, ...] | None = None,
) -> Any:
    """Return the result of a NumPy function on device arrays, computed in the order of the stream.

    If its shape depends on values (`wait`), the host waits for the arrays. If `shape` is given, the result has it, and
    the dtype of the first array.
    """
    arrays = _arrays_in((arguments, options))
    views = _replaced((arguments, options), _view_of)
    if wait:
        simulation().wait([_enqueue(arrays, lambda: None)])
        trial = function(*views[0], **views[1])
    elif shape is not None:
        trial = np.broadcast_to(np.zeros((), arrays[0].dtype), shape)
    else:
        trials = _replaced((arguments, options), lambda a: np.zeros(a.shape, a.dtype))
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = function(*trials[0], **trials[1])
    out = options.get("out")
    if out is not None:
        _enqueue(arrays, lambda: function(*views[0], **views[1]))
        return out
    several = isinstance(trial, (tuple, list))
    parts = trial if several else [trial]
    if not all(isinstance(part, (np.ndarray, np.generic)) for part in parts):
        return trial
    results = [ndarray(part.shape, part.dtype) for part in parts]

    def run() -> None:
        values = function(*views[0], **views[1])
        for result, value in zip(results_views, values if several else [values], strict=True):
            result[...] = value

    results_views = [result._view for result in results]
    _enqueue([*arrays, *results], run)
    return tuple(results) if several else results[0]


def viewed(function: Callable[..., Any], arguments: Any, options: dict[str, Any]) -> Any:
    """Return the view that a NumPy function returns, or a computed result if it copies."""
    source = arguments[0]
    if isinstance(source, ndarray):
        view = function(source._view, *arguments[1:], **options)
        if not source.size or np.may_share_memory(view, source._view):
            return ndarray._over(view, source._memory)
    return computed(function, arguments, options)


def lifted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a NumPy function as CuPy's function of the same name."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if name in VIEWS:
            return viewed(function, arguments, options)
        return computed(function, arguments, options, wait=name in SYNCHRONOUS)

    return call


def array(object: Any, dtype: Any = None, copy: bool = True, order: str = "K", *, blocking: bool = False) -> ndarray:  # noqa: A002
    """Return a device array with the values of a device or host array."""
    if isinstance(object, ndarray):
        if not copy and (dtype is None or object.dtype == np.dtype(dtype)):
            return object
        result: ndarray = computed(np.array, (object,), {"dtype": dtype, "order": order})
        return result
    host = np.array(object, dtype=dtype) if not isinstance(object, np.ndarray) else np.asarray(object, dtype)
    result = ndarray(host.shape, host.dtype)
    result._upload(host, get_current_stream(), 0.0)
    if blocking:
        get_current_stream().synchronize()
    return result


def asarray(a: Any, dtype: Any = None, order: str | None = None, *, blocking: bool = False) -> ndarray:
    return array(a, dtype, copy=False, order=order or "K", blocking=blocking)


def asnumpy(
    a: Any, stream: Stream | None = None, order: str = "C", out: Any = None, *, blocking: bool = True
) -> NDArray[Any]:
    if isinstance(a, ndarray):
        return a.get(stream, order, out, blocking)
    return np.asarray(a)


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    if isinstance(a, ndarray) and a.flags.c_contiguous and dtype in (None, a.dtype):
        return a
    result: ndarray = computed(np.ascontiguousarray, (a,), {"dtype": dtype})
    return result


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


def empty_like(prototype: ndarray, dtype: Any = None) -> ndarray:
    return ndarray(prototype.shape, dtype or prototype.dtype)


def empty_pinned(shape: Any, dtype: Any = float) -> NDArray[Any]:
    """Return page-locked host memory."""
    simulation().device()
    return pinned.allocate(shape, dtype)


def _add_operators() -> None:
    """Give `ndarray` the operators and methods of NumPy's."""
    binary = [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "matmul",
    ]
    comparisons = ["lt", "le", "eq", "ne", "gt", "ge"]
    for name in (*binary, *comparisons, "neg", "pos", "abs", "invert"):
        function = getattr(operator, f"__{name}__")
        setattr(ndarray, f"__{name}__", lambda *values, _f=function: computed(_f, values, {}))
    for name in binary:
        function = getattr(operator, f"__{name}__")
        setattr(ndarray, f"__r{name}__", lambda a, b, _f=function: computed(_f, (b, a), {}))
        if name != "matmul":
            setattr(ndarray, f"__i{name}__", lambda a, b, _f=function: _in_place(_f, a, b))
    ndarray.__hash__ = None  # type: ignore[assignment]
    for name in METHODS:
        function = getattr(np, name) if name != "flatten" else np.ndarray.flatten
        setattr(ndarray, name, lifted(name, function))


def _in_place(function: Callable[..., Any], target: ndarray, value: Any) -> ndarray:
    target[...] = computed(function, (target, value), {})
    return target


_add_operators()
