"""Writes files atomically, makes folders, and flushes both to disk."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

_SYNC_FILE_RANGE_WRITE = 2  # flag of sync_file_range(2)


PART = ".part-"
"""Beginning of the name of a file that is not complete: see `replacing_path`."""


@contextmanager
def atomic_writer(
    file: Path, *, within: Path | None = None, private: bool = False, errors: str = "strict"
) -> Iterator[TextIO]:
    """Open a temporary text file that replaces `file` when the block ends without an error.

    Parameters
    ----------
    file : Path
        Path of the complete file. After an error, a former file of this path is unchanged.
    within : Path, optional
        Folder of the temporary file, on the same file system; by default that of `file`.
    private : bool
        Whether only the owner may read the file.
    errors : str
        Handling of text that UTF-8 cannot encode, as for `open`.
    """
    part = (within or file.parent) / f"{file.name}.part"
    try:
        if private:  # a part of a former run may be readable by others
            part.unlink(missing_ok=True)
        mode, kind = (0o600, os.O_EXCL) if private else (0o666, os.O_TRUNC)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | kind, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="", errors=errors) as f:
            yield f
        flush(part)
        part.replace(file)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def replacing_path(file: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `file` when the block ends without an error.

    It has the ending of `file` and is in the same folder. After an error, a former file is unchanged.
    """
    part = file.with_name(f"{PART}{file.name}")
    try:
        yield part
        flush(part)
        part.replace(file)
        flush(file.parent)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and the folders above it, where absent, and flush their names to disk."""
    absent = list(takewhile(lambda path: not path.is_dir(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for path in absent:
        flush(path.parent)


def begin_flush(path: str | os.PathLike[str]) -> None:
    """Have the system begin to write a file to disk, without waiting, where it can (Linux); `flush` has to follow.

    Many files that are flushed then need few commits of the file system's journal, instead of one each.
    """
    call = _sync_file_range()
    if call is None:
        return
    file = os.open(path, os.O_RDONLY)
    try:
        call(file, 0, 0, _SYNC_FILE_RANGE_WRITE)  # an error is found by `flush`
    finally:
        os.close(file)


@cache
def _sync_file_range() -> Callable[..., Any] | None:
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (AttributeError, TypeError, OSError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


def flush(path: str | os.PathLike[str]) -> None:
    """Flush a file, or the entries of a folder, to disk, so that they survive a loss of power."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by every file system
            raise
    finally:
        os.close(file)
