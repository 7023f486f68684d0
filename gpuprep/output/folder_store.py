"""Stores outputs in folders on disk that appear complete or not at all.

A series is written into a new folder inside the work folder (``OUT/.gpuprep``). When all its files are flushed to
disk, ``volume.json``, which lists them with their checksums, is written, and the folder is renamed into place; a former
output is exchanged for it in the same step. The next run removes what an interrupted run left in the work
folder. A lock keeps two runs from writing at the same time.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from filelock import FileLock, Timeout

from gpuprep.core.shard import WHOLE_COHORT, Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.files.replacing import atomic_writer, begin_flush, flush, make_folder
from gpuprep.output.checksums import checksum, hexadecimal
from gpuprep.output.own_files import (
    OWN_FOLDER,
    PREVIEW,
    SIDECAR,
    check_folder,
    checked_folder,
    contents,
    entries,
    foreign_names_in,
    is_own,
)
from gpuprep.output.paths import WORK_FOLDER

FLUSH_THREADS = 8
"""Threads that flush the files of a series. A single one would wait for the file system's journal once per file."""

LOCK_TIMEOUT_S = 0.5
"""Timeout for a lock that another process may take for a moment, only to see whether a run is active."""

WHOLE_LOCK_TIMEOUT_S = 10.0
"""Timeout for the lock of whole runs. Shards that start together check it one after the other."""

_RENAME_EXCHANGE = 2  # flag of renameat2(2)
_AT_FDCWD = -100  # relative paths start at the current folder


class Written(NamedTuple):
    """Size and checksum of a committed output folder."""

    files: int
    bytes: int
    sha256: str
    """SHA-256 of ``volume.json``, which has size and CRC-32 of every other file."""


@dataclass(frozen=True, slots=True)
class Output:
    """Access to an output folder, for the parent process and for workers; see `open_output`."""

    root: Path
    """Folder that holds the manifest during a run."""
    work_folder: Path
    """Folder for unfinished outputs of this run."""
    waits_for_disk: ClassVar[bool] = True
    """Whether a commit mostly waits for the disk of this machine, so that others can use the processor meanwhile."""

    def pending(self, folder: str) -> PendingFolder:
        """Return a new folder that becomes `folder` when it is committed."""
        return PendingFolder(self, folder)

    def contents(self, folder: str) -> tuple[int, int]:
        """Return the number of files of an output and their total size in bytes; (0, 0) if there is no such folder."""
        return contents(self.root / checked_folder(folder))

    def intact(self, folder: str) -> tuple[dict[str, Any], Written] | None:
        """Return the ``volume.json`` of an output whose files all match its checksums; None for any other."""
        try:
            text = (self.root / checked_folder(folder) / SIDECAR).read_bytes()
            sha256 = hashlib.sha256(text).hexdigest()
            if self.damaged_files(folder, sha256):
                return None
            sidecar = json.loads(text)
            sizes = [file["bytes"] for file in sidecar["outputs"].values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return sidecar, Written(len(sizes) + 1, sum(sizes) + len(text), sha256)

    def damaged_files(self, folder: str, sha256: str) -> list[str]:
        """Return the files of an output that have changed, are missing, or are not listed in ``volume.json``.

        Parameters
        ----------
        folder : str
            Output folder, relative to OUT.
        sha256 : str
            SHA-256 of its ``volume.json``, which has the checksums of the others; "" if unknown.
        """
        path = self.root / checked_folder(folder)
        try:
            text = (path / SIDECAR).read_bytes()
            listed: dict[str, Any] = json.loads(text)["outputs"]
            if (sha256 and hashlib.sha256(text).hexdigest() != sha256) or not all(map(is_own, listed)):
                return [SIDECAR]
            found = {name for name, entry in entries(path) if name != SIDECAR and is_own(name) and entry.is_file()}
            return sorted(found - set(listed)) + [name for name, file in listed.items() if _differs(path / name, file)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return [SIDECAR]

    def foreign_names(self, folder: str) -> list[str]:
        """Return the names of files in an output folder that gpuprep did not write."""
        return foreign_names_in(self.root / checked_folder(folder))

    def holds(self, folder: str) -> bool:
        """Return whether there is a folder of this name."""
        return (self.root / checked_folder(folder)).is_dir()

    def preview(self, folder: str) -> bytes | None:
        """Return the preview picture of an output as JPEG; None if it has none."""
        try:
            return (self.root / checked_folder(folder) / PREVIEW).read_bytes()
        except (OSError, OutputError):
            return None

    def remove_output(self, folder: str, key: str) -> None:
        """Remove the output of a series from a folder; files that are not gpuprep's stay."""
        remove_output(self.root / checked_folder(folder), key, self.work_folder)

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file at the top of OUT, complete or not at all."""
        write_text(self.root / name, text, self.work_folder)

    def final_location(self, name: str) -> str:
        """Return the path or URL of a file at the top of OUT after the run."""
        return str(self.root / name)

    def free_bytes(self) -> int | None:
        """Return the free disk space in bytes, or None if it is unlimited; OUT itself need not exist yet."""
        for path in (self.root, *self.root.parents):
            with suppress(FileNotFoundError):
                return shutil.disk_usage(path).free
        raise FileNotFoundError(f"no part of {self.root} exists")


@contextmanager
def open_output(out: Path, shard: Shard = WHOLE_COHORT) -> Iterator[Output]:
    """Make OUT, lock it against other runs, and remove what an interrupted run left behind.

    Different shards of one cohort may run at the same time, each with its own work folder. Two runs of one shard
    exclude each other, and a run over the whole cohort excludes every other run.

    Raises
    ------
    RequestError
        If OUT cannot be made, or another run is writing into it.
    OutputError
        If the run's own files cannot be written later, for instance because the disk is full.
    """
    top = out / WORK_FOLDER
    output = Output(out, top / shard.name if shard.name else top)
    with ExitStack() as locks:
        try:
            make_folder(output.work_folder)
            _lock(top, shard, locks)
        except Timeout as exc:
            raise RequestError(f"another gpuprep is writing into {out}: wait for it, or choose another --out") from exc
        except OSError as exc:
            raise RequestError(f"cannot write into {out}: {exc.strerror}; choose another --out") from exc
        try:
            _remove_unfinished(output)
            yield output
        except (OSError, sqlite3.Error) as exc:
            raise OutputError(f"cannot write into {out}: {exc}") from exc
        finally:
            with suppress(OSError):
                _remove_unfinished(output)


def _lock(top: Path, shard: Shard, locks: ExitStack) -> None:
    """Take the lock of a shard, or for a whole run all locks; raise Timeout if another run holds one of them."""
    whole = FileLock(top / "lock")
    if shard.name:
        locks.enter_context(FileLock(top / shard.name / "lock", timeout=LOCK_TIMEOUT_S))
        # A shard takes this lock only for a moment, to check it; a whole run keeps it.
        with whole.acquire(timeout=WHOLE_LOCK_TIMEOUT_S):
            return
    locks.enter_context(whole.acquire(timeout=LOCK_TIMEOUT_S))
    for path in top.glob("*-of-*/lock"):
        locks.enter_context(FileLock(path, timeout=LOCK_TIMEOUT_S))


def is_open(out: Path, shard: Shard = WHOLE_COHORT) -> bool:
    """Return whether a whole run, or the run of the given shard, is writing into OUT at this moment."""
    lock = out / WORK_FOLDER / shard.name / "lock"
    try:
        with FileLock(lock, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that cannot be written has no active run
        return False


def _remove_unfinished(output: Output) -> None:
    """Remove unfinished outputs; move back a former output whose replacement was interrupted."""
    shards = list(output.work_folder.glob("*-of-*"))  # a whole run holds their locks
    for work_folder in (output.work_folder, *shards):
        for note in work_folder.glob("*.place"):
            former = note.with_suffix(".former")
            if former.is_dir():  # otherwise nothing was renamed, and the note may be incomplete
                final = output.root / note.read_text("utf-8")
                if not final.exists():
                    former.rename(final)
                flush(final.parent)
            note.unlink()
        for part in work_folder.glob("*.part"):
            part.unlink()
        for stale in work_folder.iterdir():
            if stale.is_dir() and stale not in shards:
                shutil.rmtree(stale, ignore_errors=True)


def write_text(file: Path, text: str, work_folder: Path | None = None) -> None:
    """Write a small text file at the top of OUT, complete or not at all, by way of this run's own work folder."""
    with atomic_writer(file, within=work_folder) as f:
        f.write(text)


class PendingFolder:
    """An output folder that is being written: fill `path`, then `commit`, in this process or another one."""

    def __init__(self, output: Output, folder: str) -> None:
        self.path = self._new_folder(output)
        self._root = output.root
        self._final = output.root / folder
        self._checksums: dict[str, str] = {}
        """CRC-32 of finished files, by their paths."""

    def _new_folder(self, output: Output) -> Path:
        path = output.work_folder / uuid.uuid4().hex
        path.mkdir()
        return path

    def finish_file(self, file: str | os.PathLike[str], crc32: int | None = None) -> None:
        """Begin to write a finished file to disk, and take note of its CRC-32, which is computed if it is not known."""
        begin_flush(file)
        self._checksums[os.fspath(file)] = checksum(file) if crc32 is None else hexadecimal(crc32)

    def finish_rest(self) -> None:
        """Finish the files that `finish_file` was not called for."""
        for folder, _, names in os.walk(self.path):
            for file in (os.path.join(folder, name) for name in names):
                if file not in self._checksums:
                    self.finish_file(file)

    def commit(self, sidecar: dict[str, Any], *, known: bool = False) -> Written:
        """Flush all files to disk, add ``volume.json``, and move the folder into place, in one step.

        A former output of the same series is replaced, if its ``volume.json`` has the key of the series or the manifest
        lists it (`known`). Anything else at the same path is left alone.

        Raises
        ------
        OutputError
            If the path is taken by something that is not an output of this series.
        """
        outputs = self._flushed_outputs()
        text = _as_json(sidecar, outputs).encode()
        (self.path / SIDECAR).write_bytes(text)
        flush(self.path / SIDECAR)
        for folder, _, _ in os.walk(self.path, topdown=False):
            flush(folder)
        self._move_into_place(sidecar["key"], known)
        self.discard()
        size = sum(file["bytes"] for file in outputs.values()) + len(text)
        return Written(len(outputs) + 1, size, hashlib.sha256(text).hexdigest())

    def _flushed_outputs(self) -> dict[str, dict[str, Any]]:
        """Flush all files to disk; return size and checksum of each by its name, in order."""
        self.finish_rest()
        files = sorted(self._checksums)
        with ThreadPoolExecutor(FLUSH_THREADS) as threads:
            parts = list(threads.map(self._flushed, (files[k::FLUSH_THREADS] for k in range(FLUSH_THREADS))))
        found = {file: size_and_checksum for part in parts for file, size_and_checksum in part.items()}
        start = len(os.path.join(self.path, ""))
        return {file[start:].replace(os.sep, "/"): found[file] for file in files}

    def _flushed(self, files: list[str]) -> dict[str, dict[str, Any]]:
        found = {}
        for file in files:
            flush(file)
            found[file] = {"bytes": os.path.getsize(file), "crc32": self._checksums[file]}
        return found

    def _move_into_place(self, key: str, known: bool) -> None:
        make_folder(self._final.parent)
        if self._final.is_symlink() or self._final.exists():
            check_folder(self._final, key, known)
            _swap(self.path, self._final, self._root)
        else:
            self.path.rename(self._final)
        flush(self._final.parent)

    def discard(self) -> None:
        """Remove the uncommitted folder, or the former output that a commit exchanged for it."""
        shutil.rmtree(self.path, ignore_errors=True)


def _as_json(sidecar: dict[str, Any], outputs: dict[str, dict[str, Any]]) -> str:
    """Return the text of ``volume.json``, with one line for each file, since there may be thousands."""
    text = json.dumps(sidecar, indent=1, allow_nan=False)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(file)}" for name, file in outputs.items())
    return text.removesuffix("\n}") + f',\n "outputs": {{\n{lines}\n }}\n}}'


def _swap(new: Path, final: Path, root: Path) -> None:
    """Exchange a new folder for the one at its final path."""
    if _exchanged(new, final):
        return
    # Otherwise two steps. If the run ends between them, the next one finds this note and moves the former folder back.
    # So the note has to be on disk before the first, and both have to be on disk before it is removed.
    note, former = new.with_suffix(".place"), new.with_suffix(".former")
    note.write_text(str(final.relative_to(root)), "utf-8")
    flush(note)
    flush(note.parent)
    final.rename(former)
    try:
        new.rename(final)
    except OSError:
        former.rename(final)
        flush(final.parent)
        note.unlink()
        raise
    flush(final.parent)
    note.unlink()
    former.rename(new)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return False if the system cannot (only Linux can, on local file systems)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError, OSError):
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def remove_output(folder: Path, key: str, work_folder: Path | None = None) -> None:
    """Remove the output of a series from a folder; the output of another series, and other files, stay.

    A folder without other files is first moved into the work folder, if one is given, so that it disappears as a whole.
    """
    sidecar = folder / SIDECAR
    try:
        owner = json.loads(sidecar.read_text("utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if owner != key or (work_folder is not None and _moved_away(folder, work_folder)):
        return
    sidecar.unlink()  # first, so that an incomplete output has no volume.json
    flush(folder)
    for name in [name for name, entry in entries(folder) if is_own(name) and entry.is_file()]:
        (folder / name).unlink()
    for below, _, _ in os.walk(folder, topdown=False):
        if below == str(folder) or OWN_FOLDER.fullmatch(os.path.relpath(below, folder)):
            with suppress(OSError):  # not empty
                os.rmdir(below)


def _moved_away(folder: Path, work_folder: Path) -> bool:
    """Remove a folder by way of the work folder; return False if it has files of others, or lies on another disk."""
    removed = work_folder / uuid.uuid4().hex
    if foreign_names_in(folder):
        return False
    try:
        folder.rename(removed)
    except OSError:
        return False
    flush(folder.parent)
    shutil.rmtree(removed, ignore_errors=True)
    return True


def _differs(file: Path, listed: dict[str, Any]) -> bool:
    """Return whether a file has another size or checksum than ``volume.json`` lists, or cannot be read."""
    try:
        return (os.path.getsize(file), checksum(file)) != (listed["bytes"], listed["crc32"])
    except OSError:
        return True
