"""Folders that appear complete or not at all.

A series is written into a folder of its own in the workshop (``OUT/.gpuprep``), ``volume.json`` last, and then renamed
into place. What an interrupted run leaves in the workshop is swept by the next one, which a lock keeps from starting
while another is at work.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpuprep.errors import OutputError, RequestError
from gpuprep.layout import WORKSHOP

SIDECAR = "volume.json"

_OWN_NAME = re.compile(r"(labels/|masks/[^/]+/)?\d{4,}\.tif|(volume|labels|masks/[^/]+)\.tif")
"""Of a file in a series' folder, from there on."""
_OWN_FOLDER = re.compile(r"labels|masks(/[^/]+)?")


@contextmanager
def open_output(out: Path) -> Iterator[None]:
    """Make OUT, keep other runs out of it, and sweep what an interrupted one left behind.

    Raises
    ------
    RequestError
        If OUT cannot be made, or another run is writing into it.
    OutputError
        If writing the run's own files fails later: a full disk, say.
    """
    workshop = out / WORKSHOP
    try:
        workshop.mkdir(parents=True, exist_ok=True)
        lock = FileLock(workshop / "lock", blocking=False)
        lock.acquire()
    except Timeout as exc:
        raise RequestError(f"another gpuprep is writing into {out}: wait for it, or choose another --out") from exc
    except OSError as exc:
        raise RequestError(f"cannot write into {out}: {exc.strerror}; choose another --out") from exc
    try:
        _sweep(workshop)
        yield
    except (OSError, sqlite3.Error) as exc:
        raise OutputError(f"cannot write into {out}: {exc}") from exc
    finally:
        with suppress(OSError):
            _sweep(workshop)
        lock.release()


def _sweep(workshop: Path) -> None:
    for stale in workshop.iterdir():
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write a small text file at the top of OUT, complete or not at all."""
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_text(text, "utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


class PendingFolder:
    """A folder in the making: fill `path`, then `commit`."""

    def __init__(self, out: Path, name: str) -> None:
        self.path = out / WORKSHOP / uuid.uuid4().hex
        self.path.mkdir()
        self._final = out / name

    def commit(self, sidecar: dict[str, Any], *, known: bool = False) -> tuple[int, int]:
        """Add ``volume.json`` and move the folder into place; return number and bytes of its files.

        The former output of the same series is replaced: what stands there has a ``volume.json`` that says so, or the
        manifest does (`known`). Anything else in the way is left alone.

        Raises
        ------
        OutputError
            If the place is taken by something that is not this series' output.
        """
        with (self.path / SIDECAR).open("w", encoding="utf-8") as f:
            json.dump(sidecar, f, indent=1, allow_nan=False)
        files, size = contents(self.path)
        self._final.parent.mkdir(parents=True, exist_ok=True)
        if self._final.is_symlink() or self._final.exists():
            _check_replaceable(self._final, sidecar["key"], known)
            former = self.path.with_suffix(".former")
            self._final.rename(former)
            self.path.rename(self._final)
            shutil.rmtree(former, ignore_errors=True)
        else:
            self.path.rename(self._final)
        return files, size

    def discard(self) -> None:
        """Remove whatever was not moved into place."""
        shutil.rmtree(self.path, ignore_errors=True)


def contents(folder: Path) -> tuple[int, int]:
    """Return the number of an output's files and their bytes together; (0, 0) where there is no such folder."""
    try:
        sizes = [e.stat().st_size for name, e in _entries(folder) if (name == SIDECAR or _is_own(name)) and e.is_file()]
    except OSError:
        return 0, 0
    return len(sizes), sum(sizes)


def retire(folder: Path) -> None:
    """Remove the former output of a series that has moved elsewhere; other things in the folder stay."""
    sidecar = folder / SIDECAR
    if sidecar.is_file():
        sidecar.unlink()  # first, so that what is left does not look complete
        for name in [name for name, entry in _entries(folder) if _is_own(name) and entry.is_file()]:
            (folder / name).unlink()
        for below in (*folder.glob("masks/*"), folder / "masks", folder / "labels", folder):
            with suppress(OSError):  # not empty, or no folder
                below.rmdir()


def _check_replaceable(folder: Path, key: str, known: bool) -> None:
    hint = "move it away, or choose another --out"
    try:
        former = json.loads((folder / SIDECAR).read_text("utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        if not known or not folder.is_dir():
            raise OutputError(f"{folder} is in the way and is not an output of gpuprep: {hint}") from exc
    else:
        if former != key:
            raise OutputError(f"{folder} holds another series, {former}: {hint}")
    strangers = [n for n, entry in _entries(folder) if n != SIDECAR and not (_is_own(n) and entry.is_file())]
    if strangers:
        raise OutputError(f"{folder} also holds {min(strangers)}, which is not gpuprep's to remove: {hint}")


def _is_own(name: str) -> bool:
    """Whether a writer gives such a name to a file."""
    return _OWN_NAME.fullmatch(name) is not None


def _entries(folder: Path, below: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield what is in a series' folder, by its name from there on; of folders that masks go to, what is in them."""
    with os.scandir(folder / below) as entries:
        for entry in entries:
            name = below + entry.name
            if _OWN_FOLDER.fullmatch(name) and entry.is_dir(follow_symlinks=False):
                yield from _entries(folder, f"{name}/")
            else:
                yield name, entry
