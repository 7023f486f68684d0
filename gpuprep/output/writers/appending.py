"""Writes a file from beginning to end, and computes its checksum meanwhile, so that it need not be read again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gpuprep.output.checksums import crc32
from gpuprep.output.writers.content import OnFileFinished


@contextmanager
def appended(
    path: str | os.PathLike[str], finish_file: OnFileFinished, *, start: int | None = None
) -> Iterator[Callable[[Any], None]]:
    """Open a file and yield a function that appends the bytes of a contiguous array or other buffer to it.

    The file is new. Or, if `start` is given, it has bytes up to there, which stay, and others behind what is appended,
    which stay too. `finish_file` is called at the end, unless there was an error.
    """
    with open(path, "wb" if start is None else "r+b", buffering=0) as f:
        value = crc32(f.read(start)) if start else 0

        def append(part: Any) -> None:
            nonlocal value
            view = memoryview(part).cast("B")
            value = crc32(view, value)
            while view:  # an unbuffered write may write only a part
                view = view[f.write(view) :]

        yield append
        if start is not None:
            value = crc32(f.read(), value)
    finish_file(path, value)
