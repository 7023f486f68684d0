"""Compiles the loops for the common types, or loads them from Numba's cache, when it is imported.

The fork server imports it once, so that worker processes start with compiled loops. If compiled loops cannot be cached
on disk, they are compiled for all types here, because each worker would have to compile the missing ones.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

import numpy as np

from gpuprep.compute.backend import NumpyBackend, compiled_loops
from gpuprep.compute.process import process
from gpuprep.compute.slice_summary import summary
from gpuprep.core.geometry import Geometry
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.recipe import Dtype, Recipe
from gpuprep.core.volume import StoredVolume

WARN_AFTER_S = 1.5
"""Seconds of compilation after which a warning is logged."""

COMMON_DTYPES: tuple[Dtype, ...] = ("float32", "uint8")
OTHER_DTYPES: tuple[Dtype, ...] = ("int16", "uint16")


def _warm() -> None:
    _compile(np.int16, COMMON_DTYPES)
    if compiled_loops().uncached.is_set():
        _compile(np.int16, OTHER_DTYPES)
        for stored in (np.uint16, np.uint8, np.int8):
            _compile(stored, COMMON_DTYPES[:1])  # only the loops before the HU depend on the stored type


def _compile(stored_type: type[np.integer[Any]], dtypes: tuple[Dtype, ...]) -> None:
    """Compile the loops for one type of stored values and the given output types."""
    stored = np.arange(5 * 9 * 9).reshape(5, 9, 9).astype(stored_type)
    ones = np.ones(len(stored))
    volume = StoredVolume(stored, ones, ones, None, Geometry(stored.shape, np.diag([2.0, 2, 2, 1])), HuStatistics())
    summary(stored[0], 1.0, 0.0, None, loops=True)
    for dtype in dtypes:
        process(volume, Recipe(dtype=dtype, size=(8, 8)), backend=NumpyBackend("loops"))


def _warn_of_compilation() -> None:
    """Log a warning if compiling the loops is slow; slow loading of cached loops is not reported."""
    while not _done.wait(WARN_AFTER_S):
        with contextlib.suppress(Exception):  # as below
            from gpuprep.compute.numba_kernels import compiling, uncached

            if uncached.is_set():  # `compiled_loops` has already logged a warning
                return
            if compiling.is_set():
                logging.getLogger("gpuprep").warning(
                    "compiling the inner loops for this processor: ten to thirty seconds, once per installation"
                )
                return


_done = threading.Event()
_watcher = threading.Thread(target=_warn_of_compilation)
_watcher.start()
try:
    with contextlib.suppress(Exception):  # an exception would end the fork server; the first series reports the error
        _warm()
finally:
    _done.set()
    _watcher.join()  # no thread may be running when processes are forked
