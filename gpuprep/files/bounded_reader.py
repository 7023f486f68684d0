"""Limits what pydicom reads from a file, since pydicom trusts every declared length."""

from __future__ import annotations

import io
from typing import BinaryIO, cast

from gpuprep.files.archives import open_member
from gpuprep.files.filesystem import opened

LARGE_BYTES = 2**20
"""Larger reads are split into pieces of this size, so that a damaged length allocates no more than the file holds."""

MOST_READS = 500_000
"""Upper limit of reads per header. A header of thousands of frames needs fewer; a long run of zeros would need more,
since pydicom parses it as elements."""


class BoundedReader(io.BufferedReader):
    """A file that allocates memory only for bytes that exist, and fails on endless headers.

    Parameters
    ----------
    raw : RawIOBase
        The file.
    most_bytes : int, optional
        Upper limit of bytes per read.
    most_reads : int, optional
        Upper limit of reads.

    Raises
    ------
    ValueError
        From `read`: if a limit is exceeded.
    """

    def __init__(self, raw: io.RawIOBase, most_bytes: int | None = None, most_reads: int = MOST_READS) -> None:
        super().__init__(raw)
        self._most_bytes = most_bytes
        self._most_reads = most_reads
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > self._most_reads:
            raise ValueError(f"more than {self._most_reads} elements: the header does not end")
        if size is None or size <= LARGE_BYTES:
            return super().read(size)
        if self._most_bytes is not None and size > self._most_bytes:
            raise ValueError(f"an element announces {size} bytes in a header")
        pieces = []
        while size > 0 and (piece := super().read(min(size, LARGE_BYTES))):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


def open_bounded(path: str, member: str | None, most_bytes: int | None = None) -> BinaryIO:
    """Open a file, or a member of an archive, as a `BoundedReader` for pydicom."""
    if member is None:
        return BoundedReader(opened(path, head=most_bytes is not None), most_bytes)
    packed = cast(io.BufferedReader, open_member(path, member))
    return BoundedReader(packed.detach(), most_bytes)
