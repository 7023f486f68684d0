"""Writes NumPy's file format, uncompressed: ``numpy.load(file, mmap_mode="r")`` reads only the requested slices.

References
----------
NEP 1, A Simple File Format for NumPy Arrays; ``numpy.lib.format``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from gpuprep.output.writers.appending import appended
from gpuprep.output.writers.content import Content, OnFileFinished, ignore_finished_file


def write_npy(
    path: Path, chunks: Iterator[NDArray[Any]], content: Content, finish_file: OnFileFinished = ignore_finished_file
) -> tuple[str, ...]:
    """Write a ``.npy`` of shape (k, j, i); its affine is in ``volume.json``."""
    header = {"descr": npy.dtype_to_descr(np.dtype(content.dtype)), "fortran_order": False, "shape": content.shape}
    first = io.BytesIO()
    npy.write_array_header_1_0(first, header)
    with appended(path, finish_file) as append:
        append(first.getbuffer())
        for chunk in chunks:
            append(np.ascontiguousarray(chunk))
    return ()
