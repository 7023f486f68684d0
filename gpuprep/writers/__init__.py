"""Output formats by name. A writer stores one volume from chunks of slices, in order, and knows nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gpuprep.writers.content import Content, Settle
from gpuprep.writers.tiff import write_slices, write_stack

Writer = Callable[[Path, Iterator[NDArray[Any]], Content, Settle], tuple[str, ...]]
"""``write(path, chunks, content, settle)`` makes a folder, or a file with a suffix of its own, at `path`, tells
`settle` of files that are finished, and returns warnings about what it wrote."""

WRITERS: dict[str, Writer] = {"tif": write_slices, "tif-stack": write_stack}
