"""Lists the writers by format. A writer stores one volume from chunks of slices, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gpuprep.output.writers.content import Content, OnFileFinished
from gpuprep.output.writers.nifti import write_nifti
from gpuprep.output.writers.npy import write_npy
from gpuprep.output.writers.omezarr import write_omezarr
from gpuprep.output.writers.tiff import write_slices, write_stack

Writer = Callable[[Path, Iterator[NDArray[Any]], Content, OnFileFinished], tuple[str, ...]]
"""``write(path, chunks, content, finish_file)`` writes a file or folder at `path`, whose name has the ending of the
recipe, calls `finish_file` with each finished file, and returns warnings about the volume."""

WRITERS: dict[str, Writer] = {
    "tif": write_slices,
    "tif-stack": write_stack,
    "nifti": write_nifti,
    "zarr": write_omezarr,
    "npy": write_npy,
}
