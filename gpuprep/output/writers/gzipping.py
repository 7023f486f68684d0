"""Writes one gzip member, its blocks deflated by several threads as pigz does; every reader takes it for plain gzip.

Deflating, not disk or arithmetic, is what takes the time of a ``.nii.gz``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpuprep.executors.cores import usable_cores

BLOCK_BYTES = 2**20
"""Memory holds a few blocks for each thread, whatever is written."""

MOST_THREADS = 8
"""Then the disk is what takes the time. Where all cores have a worker each, threads share them out at no loss."""

LEVEL = 2
"""Of ISA-L. Per core, on CT: float32 134 MB/s to 0.70 of the size, int16 144 MB/s to 0.49. zlib's level 1: 23 MB/s
to 0.71, 38 MB/s to 0.48; its level 6: 16 MB/s to 0.70, 10 MB/s to 0.48."""


@contextmanager
def gzipped(path: Path) -> Iterator[Callable[[memoryview], object]]:
    """Open a gzip file and give the function that appends bytes to it; they are copied before it returns.

    Raises
    ------
    OSError
        If the file cannot be written, here, by a later call of that function, or as the context is left.
    """
    from isal import igzip_threaded  # an extra

    threads = min(MOST_THREADS, usable_cores())
    with igzip_threaded.open(path, "wb", compresslevel=LEVEL, threads=threads, block_size=BLOCK_BYTES) as f:
        yield f.write
