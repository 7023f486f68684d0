"""Compiles the loops for the usual types, or loads them from Numba's cache, by being imported.

The fork server does that once, so that workers are born with the loops.
"""

from __future__ import annotations

import contextlib
import logging
import threading

import numpy as np

from gpuprep.backend import NumpyBackend
from gpuprep.geometry import Geometry
from gpuprep.intensity import HuStatistics
from gpuprep.padding import summary
from gpuprep.processing import process
from gpuprep.recipe import Dtype, Recipe
from gpuprep.volume import StoredVolume

PATIENCE_S = 1.5
"""Before compiling deserves a word."""

USUAL: tuple[Dtype, ...] = ("float32", "uint8")


def _warm() -> None:
    stored = np.arange(5 * 9 * 9, dtype=np.int16).reshape(5, 9, 9)
    ones = np.ones(len(stored))
    volume = StoredVolume(stored, ones, ones, None, Geometry(stored.shape, np.diag([2.0, 2, 2, 1])), HuStatistics())
    summary(stored[0], 1.0, 0.0, None, loops=True)
    for dtype in USUAL:
        process(volume, Recipe(dtype=dtype, size=(8, 8)), backend=NumpyBackend("loops"))


def _say() -> None:
    """Say so if it is compiling that takes its time: a busy machine may be as slow to load what it has."""
    while not _done.wait(PATIENCE_S):
        with contextlib.suppress(Exception):  # as below
            from gpuprep.loops import compiling

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
