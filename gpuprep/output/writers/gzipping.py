"""Writes one gzip member, whose blocks are deflated by several threads as pigz does; it is an ordinary gzip file.

Most of the time of a ``.nii.gz`` goes into deflating.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpuprep.executors.cores import usable_cores

BLOCK_BYTES = 2**20
"""Size of a block. Memory holds a few blocks for each thread."""

MOST_THREADS = 8
"""Maximum number of threads: with more, the disk is the bottleneck. They do no harm if each core has a worker."""

LEVEL = 2
"""Compression level of ISA-L. Per core, on CT: float32 134 MB/s to 0.70 of the size, int16 144 MB/s to 0.49. zlib's
level 1: 23 MB/s to 0.71, 38 MB/s to 0.48; its level 6: 16 MB/s to 0.70, 10 MB/s to 0.48."""


@contextmanager
def gzipped(path: Path) -> Iterator[Callable[[memoryview], object]]:
    """Open a gzip file and yield a function that appends bytes to it; they are copied before it returns.

    Raises
    ------
    OSError
        If the file cannot be written: on entry, by a call of that function, or on exit.
    """
    from isal import igzip_threaded  # an optional dependency

    threads = min(MOST_THREADS, usable_cores())
    with igzip_threaded.open(path, "wb", compresslevel=LEVEL, threads=threads, block_size=BLOCK_BYTES) as f:
        yield f.write
