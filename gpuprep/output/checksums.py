"""Computes the CRC-32 of files, as in gzip and zip."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from gpuprep.files.filesystem import opened

if TYPE_CHECKING:
    from collections.abc import Callable


def checksum(file: str | os.PathLike[str]) -> str:
    """Return the CRC-32 of a file or of the object at a URL, as eight hexadecimal digits."""
    value = 0
    with opened(os.fspath(file)) as f:
        while block := f.read(2**20):
            value = crc32(block, value)
    return hexadecimal(value)


def hexadecimal(crc32: int) -> str:
    """Return a CRC-32 as it is written in ``volume.json``: eight hexadecimal digits."""
    return f"{crc32:08x}"


def crc32(data: memoryview | bytes, value: int = 0) -> int:
    """Return the CRC-32 of data that follow others, whose CRC-32 is `value`."""
    return _deflate_crc32()(data, value)


@cache
def _deflate_crc32() -> Callable[[memoryview | bytes, int], int]:
    from imagecodecs import deflate_crc32  # 25 times as fast as zlib.crc32

    return deflate_crc32  # type: ignore[no-any-return, return-value, unused-ignore]
