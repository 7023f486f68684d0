"""Compiles the loops for the usual types, or loads them from Numba's cache, by being imported.

The fork server does that once, so that workers are born with the loops. Where compiled loops cannot be kept on disk, it
compiles them for all types, because each worker would have to compile what it lacks.
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

PATIENCE_S = 1.5
"""Before compiling deserves a word."""

USUAL: tuple[Dtype, ...] = ("float32", "uint8")
UNUSUAL: tuple[Dtype, ...] = ("int16", "uint16")


def _warm() -> None:
    _compile(np.int16, USUAL)
    if compiled_loops().unkept.is_set():
        _compile(np.int16, UNUSUAL)
        for stored in (np.uint16, np.uint8, np.int8):
            _compile(stored, USUAL[:1])  # the type of the output matters after the HU are made


def _compile(stored_type: type[np.integer[Any]], dtypes: tuple[Dtype, ...]) -> None:
    """Compile the loops for one type of stored values and some of the output."""
    stored = np.arange(5 * 9 * 9).reshape(5, 9, 9).astype(stored_type)
    ones = np.ones(len(stored))
    volume = StoredVolume(stored, ones, ones, None, Geometry(stored.shape, np.diag([2.0, 2, 2, 1])), HuStatistics())
    summary(stored[0], 1.0, 0.0, None, loops=True)
    for dtype in dtypes:
        process(volume, Recipe(dtype=dtype, size=(8, 8)), backend=NumpyBackend("loops"))


def _say() -> None:
    """Say so if it is compiling that takes its time: a busy machine may be as slow to load what it has."""
    while not _done.wait(PATIENCE_S):
        with contextlib.suppress(Exception):  # as below
            from gpuprep.compute.numba_kernels import compiling, unkept

            if unkept.is_set():  # said already, and for longer than once
                return
            if compiling.is_set():
                logging.getLogger("gpuprep").warning(
                    "compiling the inner loops for this processor: ten to thirty seconds, once per installation"
                )
                return


_done = threading.Event()
_saying = threading.Thread(target=_say)
_saying.start()
try:
    with contextlib.suppress(Exception):  # which would end the fork server; the first series will say what is wrong
        _warm()
finally:
    _done.set()
    _saying.join()  # no thread may live when processes are forked
