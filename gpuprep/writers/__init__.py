"""Output formats by name. A writer fills one folder from chunks of slices, in order, and knows nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gpuprep.plan import Plan
from gpuprep.writers.tiff import write_slices, write_stack

Writer = Callable[[Path, Iterator[NDArray[Any]], Plan], tuple[str, ...]]
"""``write(folder, chunks, plan)`` returns warnings about what it wrote."""

WRITERS: dict[str, Writer] = {"tif": write_slices, "tif-stack": write_stack}
