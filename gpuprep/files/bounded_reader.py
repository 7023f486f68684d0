"""Bounds what pydicom reads of a file, since it believes every length."""

from __future__ import annotations

import io
from typing import BinaryIO, cast

from gpuprep.files.archives import open_member
from gpuprep.files.filesystem import opened

LARGE_BYTES = 2**20
"""More is read piece by piece: memory is taken for what is there, not for what a damaged length announces."""

MOST_READS = 500_000
"""A header of thousands of frames takes fewer; zeros that go on for ever look like elements without end."""


class FrugalReader(io.BufferedReader):
    """A file that takes no memory for what is not there, and gives up on headers that do not end.

    Parameters
    ----------
    raw : RawIOBase
        The file.
    most_bytes : int, optional
        Refuse to read more at once.
    most_reads : int, optional
        Give up after so many.
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


def open_frugally(path: str, member: str | None, most_bytes: int | None = None) -> BinaryIO:
    """Open a file, or what is packed into it, for pydicom; as `FrugalReader` says."""
    if member is None:
        return FrugalReader(opened(path, head=most_bytes is not None), most_bytes)
    packed = cast(io.BufferedReader, open_member(path, member))
    return FrugalReader(packed.detach(), most_bytes)
