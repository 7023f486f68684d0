"""One gzip member whose blocks are deflated by several threads, as pigz does it: every reader takes it for plain gzip.

Each block is a stream of raw deflate of its own, without its end: a sync flush leaves it at a whole byte, so that the
blocks stand one after the other. Deflating, not disk or arithmetic, is what takes the time of a ``.nii.gz``.

References
----------
RFC 1951 (deflate), 3.2; RFC 1952 (gzip), 2.3; M. Adler, pigz.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from gpuprep.executors.cores import usable_cores

BLOCK_BYTES = 2**20
"""Long enough that what each block lacks, the 32 kB before it, costs less than 0.1 %."""

MOST_THREADS = 8
"""Then the disk is what takes the time. Where all cores have a worker each, threads share them out at no loss."""

LEVEL = 2
"""Of ISA-L. Per core, on CT: float32 134 MB/s to 0.70 of the size, int16 144 MB/s to 0.49. zlib's level 1: 23 MB/s
to 0.71, 38 MB/s to 0.48; its level 6: 16 MB/s to 0.70, 10 MB/s to 0.48."""

_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # gzip, deflate, no flags, no time, no extra flags, system unknown
_LAST = b"\x03\0"  # an empty block that says that it is the last one


@contextmanager
def gzipped(path: Path) -> Iterator[Callable[[memoryview], None]]:
    """Open a gzip file and give the function that appends bytes to it.

    They are copied before it returns. Memory holds two blocks for each thread, whatever is written.
    """
    from isal import isal_zlib  # an extra

    def deflated(block: bytes) -> bytes:
        stream = isal_zlib.compressobj(LEVEL, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)
        return stream.compress(block) + stream.flush(isal_zlib.Z_SYNC_FLUSH)

    threads = min(MOST_THREADS, usable_cores())
    waiting: deque[Future[bytes]] = deque()
    crc = size = 0
    with open(path, "wb") as f, ThreadPoolExecutor(threads, thread_name_prefix="gpuprep-gzip") as pool:
        f.write(_HEADER)

        def append(data: memoryview) -> None:
            nonlocal crc, size
            for start in range(0, len(data), BLOCK_BYTES):
                block = bytes(data[start : start + BLOCK_BYTES])
                crc, size = isal_zlib.crc32(block, crc), size + len(block)
                if len(waiting) == 2 * threads:
                    f.write(waiting.popleft().result())
                waiting.append(pool.submit(deflated, block))

        yield append
        while waiting:
            f.write(waiting.popleft().result())
        f.write(_LAST + struct.pack("<2L", crc, size % 2**32))
