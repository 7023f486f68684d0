"""Where the arithmetic runs: NumPy on the host, or CuPy on a GPU.

Kernels take their namespace from the array they are given. What a backend adds is the way there and back, and the
two library calls of the ``ndimage`` engine, which have other names on each side. `gpuprep._cupy` is imported only when
a GPU is asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np

from gpuprep.errors import BackendError, RequestError

log = logging.getLogger(__name__)

BackendName = Literal["auto", "cpu", "gpu"]
Engine = Literal["operators", "ndimage"]
"""How the arithmetic is done on either: banded matrices, or the libraries' own calls."""
Body = Literal["matmul", "loops"]
"""How banded matrices are applied: by an array library, or on the host by loops that Numba compiles."""


class Backend(Protocol):
    """What `process` needs to know of the machine under it."""

    name: str
    device: str
    chunk_slices: int
    """Output slices made at a time along z: the more, the less often the source slices are read."""
    slab_slices: int
    """Slices that then go through window and resize at a time: few stay in a CPU's cache, more keep a GPU busy."""
    body: Body
    """What does the arithmetic of the engine ``operators``."""

    def session(self) -> AbstractContextManager[Any]:
        """Make the device and a stream of its own current in this thread; around the work on one volume."""
        ...

    def to_device(self, host: Any) -> Any:
        """Return a host array as an array of this backend."""
        ...

    def to_host(self, array: Any) -> Any:
        """Return an array of this backend as NumPy."""
        ...

    def zoom(self, values: Any, factors: Sequence[float], *, order: int, mode: str, grid_mode: bool) -> Any:
        """Return `scipy.ndimage.zoom`, or its namesake on the device."""
        ...

    def gaussian_filter(self, values: Any, sigma: Sequence[float], *, mode: str) -> Any:
        """Return `scipy.ndimage.gaussian_filter`, or its namesake on the device."""
        ...

    def resize(self, values: Any, shape: Sequence[int], *, mode: str, anti_aliasing: bool) -> Any:
        """Return `skimage.transform.resize`, linear and with the range kept, or its namesake on the device."""
        ...


class NumpyBackend:
    """NumPy, SciPy and scikit-image; going to the device and back is the identity."""

    name = "cpu"
    device = "cpu"
    chunk_slices = 16
    slab_slices = 4

    def __init__(self, body: Body | None = None) -> None:
        self.body: Body = body or ("loops" if numba_works() else "matmul")

    def session(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def to_device(self, host: Any) -> Any:
        return host

    def to_host(self, array: Any) -> Any:
        return array

    def zoom(self, values: Any, factors: Sequence[float], *, order: int, mode: str, grid_mode: bool) -> Any:
        from scipy import ndimage

        return ndimage.zoom(values, factors, order=order, mode=mode, grid_mode=grid_mode)

    def gaussian_filter(self, values: Any, sigma: Sequence[float], *, mode: str) -> Any:
        from scipy import ndimage

        return ndimage.gaussian_filter(values, sigma, mode=mode)

    def resize(self, values: Any, shape: Sequence[int], *, mode: str, anti_aliasing: bool) -> Any:
        from skimage.transform import resize

        resized = resize(
            values, shape, order=1, mode=mode, clip=False, preserve_range=True, anti_aliasing=anti_aliasing
        )
        return np.asarray(resized, dtype=values.dtype)


def numba_works() -> bool:
    """Whether Numba is there to compile loops; nothing is imported for it."""
    return find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")


def checked_engine(name: str) -> Engine:
    """Return the name of an engine, or raise a RequestError."""
    if name not in get_args(Engine):
        raise RequestError(f"there is no engine {name!r}: choose one of {', '.join(get_args(Engine))}")
    return cast(Engine, name)


def get_backend(name: BackendName = "auto") -> Backend:
    """Return the backend of that name.

    Parameters
    ----------
    name : {"auto", "cpu", "gpu"}
        "auto" takes the GPU where one works and says once, in the log, why not otherwise; "gpu" never falls back.

    Raises
    ------
    BackendError
        If "gpu" is asked for and cannot run, with the reason and the remedy.
    """
    if name not in ("auto", "cpu", "gpu"):
        raise BackendError(f"there is no backend {name!r}: choose auto, cpu or gpu")
    if name == "cpu":
        return NumpyBackend()
    return open_gpu() if name == "gpu" else _gpu_or_cpu()


@cache
def _gpu_or_cpu() -> Backend:
    """Look for a GPU once per process, and say once that there is none."""
    try:
        return open_gpu()
    except BackendError as exc:
        log.warning("no GPU, so the CPU computes: %s", exc)
        return NumpyBackend()


def open_gpu() -> Backend:
    """Return the CuPy backend on the first GPU, or raise a BackendError that says what is missing."""
    try:
        from gpuprep._cupy import CupyBackend
    except ImportError as exc:
        raise BackendError(
            f"CuPy or cuCIM is not installed ({exc}): pip install 'gpuprep[cuda12]' or 'gpuprep[cuda13]'"
        ) from exc
    return CupyBackend()
