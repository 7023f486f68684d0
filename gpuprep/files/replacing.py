"""Writes files that appear whole, on disk, or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def replacing(
    file: Path, *, within: Path | None = None, private: bool = False, errors: str = "strict"
) -> Iterator[TextIO]:
    """Open a text file that takes the place of a former one when it is closed; it is written beside it.

    Parameters
    ----------
    file : Path
        Where it will be. Where an error ends the writing, what was there stays.
    within : Path, optional
        The folder, on the same file system, in which it is written.
    private : bool
        Whether only its owner may read it.
    errors : str
        What becomes of characters that UTF-8 lacks, as for `open`.
    """
    part = (within or file.parent) / f"{file.name}.part"
    try:
        if private:  # also where a former run left one that others may read
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


def flush(path: Path) -> None:
    """Return when a file, or the names in a folder, are on disk: what loss of power must not take."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems know no such thing
            raise
    finally:
        os.close(file)
