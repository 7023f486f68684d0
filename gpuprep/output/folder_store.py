"""Stores outputs in folders on disk that appear complete or not at all.

A series is written into a folder of its own in the workshop (``OUT/.gpuprep``). Each file is on disk, and its checksum
known, before ``volume.json`` lists them all; that is written last, and then the folder is renamed into place, in one
step with the former one if there is any. What an interrupted run leaves in the workshop is swept by the next one, which
a lock keeps from starting while another is at work.
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from gpuprep.core.shard import WHOLE, Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.files.filesystem import opened
from gpuprep.files.replacing import flush, replacing
from gpuprep.output.own_files import (
    OWN_FOLDER,
    PREVIEW,
    SIDECAR,
    check_folder,
    contents,
    entries,
    inside,
    is_own,
    strangers_in,
)
from gpuprep.output.paths import WORKSHOP

SETTLING_THREADS = 4
"""They wait for the disk, mostly; one would wait for a journal once per file."""

ASKING_S = 0.5
"""Time for whoever only looks whether a run is on, by taking its lock, to let go of it."""

OTHER_SHARD_S = 10.0
"""Time for shards that start together to look at the lock of whole runs, one after the other."""

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_FROM_HERE = -100  # AT_FDCWD: paths as for any other call


class Written(NamedTuple):
    """What stands in its place after a commit."""

    files: int
    bytes: int
    sha256: str
    """Of ``volume.json``, which has size and CRC-32 of every other file."""


@dataclass(frozen=True, slots=True)
class Output:
    """A folder of outputs, as workers and the parent know it; `open_output` gives it."""

    root: Path
    """Where the manifest is during a run."""
    workshop: Path
    """Where this run makes what is not finished."""

    def pending(self, folder: str) -> PendingFolder:
        """Return a new folder that will become `folder`."""
        return PendingFolder(self, folder)

    def contents(self, folder: str) -> tuple[int, int]:
        """Return the number of an output's files and their bytes together; (0, 0) where there is no such folder."""
        return contents(self.root / inside(folder))

    def intact(self, folder: str) -> tuple[dict[str, Any], Written] | None:
        """Return the ``volume.json`` of an output all of whose files are as it says, to the bit; None for any other."""
        try:
            text = (self.root / inside(folder) / SIDECAR).read_bytes()
            sha256 = hashlib.sha256(text).hexdigest()
            if self.torn(folder, sha256):
                return None
            sidecar = json.loads(text)
            sizes = [file["bytes"] for file in sidecar["outputs"].values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return sidecar, Written(len(sizes) + 1, sum(sizes) + len(text), sha256)

    def torn(self, folder: str, sha256: str) -> list[str]:
        """Return the files of an output that are not as they were written, or not there, or there besides.

        Parameters
        ----------
        folder : str
            The output.
        sha256 : str
            Of its ``volume.json``, which has the checksums of the others; "" if nobody knows it any more.
        """
        place = self.root / inside(folder)
        try:
            text = (place / SIDECAR).read_bytes()
            listed: dict[str, Any] = json.loads(text)["outputs"]
            if (sha256 and hashlib.sha256(text).hexdigest() != sha256) or not all(map(is_own, listed)):
                return [SIDECAR]
            there = {name for name, entry in entries(place) if name != SIDECAR and is_own(name) and entry.is_file()}
            return sorted(there - set(listed)) + [name for name, file in listed.items() if _differs(place / name, file)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return [SIDECAR]

    def strangers(self, folder: str) -> list[str]:
        """Return what is in an output's folder and not of it."""
        return strangers_in(self.root / inside(folder))

    def holds(self, folder: str) -> bool:
        """Whether there is anything at that place."""
        return (self.root / inside(folder)).is_dir()

    def preview(self, folder: str) -> bytes | None:
        """Return the small picture of an output, as JPEG; None where there is none."""
        try:
            return (self.root / inside(folder) / PREVIEW).read_bytes()
        except (OSError, OutputError):
            return None

    def retire(self, folder: str, key: str) -> None:
        """Remove the former output of a series that has moved elsewhere; other things in the folder stay."""
        retire(self.root / inside(folder), key)

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file at the top, complete or not at all."""
        write_text(self.root / name, text, self.workshop)

    def lasting(self, name: str) -> str:
        """Return where a file at the top is to be found when the run is over."""
        return str(self.root / name)

    def free_bytes(self) -> int | None:
        """Return how much the disk has left for us, None if there is no end; OUT itself need not be there yet."""
        for path in (self.root, *self.root.parents):
            with suppress(FileNotFoundError):
                return shutil.disk_usage(path).free
        raise FileNotFoundError(f"no part of {self.root} exists")


@contextmanager
def open_output(out: Path, shard: Shard = WHOLE) -> Iterator[Output]:
    """Make OUT, keep other runs out of it, and sweep what an interrupted one left behind.

    Shards of one cohort may be at work at the same time, each in a workshop of its own; but not two runs of the same
    shard, and none beside a run over everything.

    Raises
    ------
    RequestError
        If OUT cannot be made, or another run is writing into it.
    OutputError
        If writing the run's own files fails later: a full disk, say.
    """
    top = out / WORKSHOP
    output = Output(out, top / shard.name if shard.name else top)
    with ExitStack() as locks:
        try:
            output.workshop.mkdir(parents=True, exist_ok=True)
            _lock(top, shard, locks)
        except Timeout as exc:
            raise RequestError(f"another gpuprep is writing into {out}: wait for it, or choose another --out") from exc
        except OSError as exc:
            raise RequestError(f"cannot write into {out}: {exc.strerror}; choose another --out") from exc
        try:
            _sweep(output)
            yield output
        except (OSError, sqlite3.Error) as exc:
            raise OutputError(f"cannot write into {out}: {exc}") from exc
        finally:
            with suppress(OSError):
                _sweep(output)


def _lock(top: Path, shard: Shard, locks: ExitStack) -> None:
    """Take the lock of a shard, or all of them; raise Timeout where somebody else has one."""
    everything = FileLock(top / "lock")
    if shard.name:
        locks.enter_context(FileLock(top / shard.name / "lock", timeout=ASKING_S))
        # Others look at it for a moment, as this one does; a run over everything keeps it.
        with everything.acquire(timeout=OTHER_SHARD_S):
            return
    locks.enter_context(everything.acquire(timeout=ASKING_S))
    for held in top.glob("*-of-*/lock"):
        locks.enter_context(FileLock(held, timeout=ASKING_S))


def is_open(out: Path, shard: Shard = WHOLE) -> bool:
    """Whether a run is writing into OUT at this moment; for a shard, whether that one is."""
    lock = out / WORKSHOP / shard.name / "lock"
    try:
        with FileLock(lock, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that cannot be written: nobody does
        return False


def _sweep(output: Output) -> None:
    """Remove what is not finished; put back a former output that was on its way out when a run ended."""
    shards = list(output.workshop.glob("*-of-*"))  # a run over everything holds their locks
    for workshop in (output.workshop, *shards):
        for note in workshop.glob("*.place"):
            former, place = note.with_suffix(".former"), output.root / note.read_text("utf-8")
            if former.is_dir() and not place.exists():
                former.rename(place)
            note.unlink()
        for part in workshop.glob("*.part"):
            part.unlink()
        for stale in workshop.iterdir():
            if stale.is_dir() and stale not in shards:
                shutil.rmtree(stale, ignore_errors=True)


def write_text(file: Path, text: str, workshop: Path | None = None) -> None:
    """Write a small text file at the top of OUT, complete or not at all; made in a workshop, which no other run has."""
    with replacing(file, within=workshop) as f:
        f.write(text)


class PendingFolder:
    """A folder in the making: fill `path`, then `commit`."""

    def __init__(self, output: Output, folder: str) -> None:
        self.path = self._made(output)
        self._root = output.root
        self._final = output.root / folder
        self._threads: ThreadPoolExecutor | None = None
        self._settled: dict[Path, Future[dict[str, Any]]] = {}

    def _made(self, output: Output) -> Path:
        path = output.workshop / uuid.uuid4().hex
        path.mkdir()
        return path

    def settle(self, file: Path) -> None:
        """Have a finished file written to disk, and its checksum taken, while others are being made."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(SETTLING_THREADS)
        self._settled[file] = self._threads.submit(_settled, file)

    def commit(self, sidecar: dict[str, Any], *, known: bool = False) -> Written:
        """Add ``volume.json`` and move the folder into place, in one step.

        The former output of the same series is replaced: what stands there has a ``volume.json`` that says so, or the
        manifest does (`known`). Anything else in the way is left alone.

        Raises
        ------
        OutputError
            If the place is taken by something that is not this series' output.
        """
        outputs: dict[str, Any] = {}
        for folder, _, names in os.walk(self.path):
            for name in names:
                file = Path(folder, name)
                if file not in self._settled:
                    self.settle(file)
        for file, future in sorted(self._settled.items()):
            outputs[file.relative_to(self.path).as_posix()] = future.result()
        text = json.dumps(sidecar | {"outputs": outputs}, indent=1, allow_nan=False).encode()
        (self.path / SIDECAR).write_bytes(text)
        flush(self.path / SIDECAR)
        for folder, _, _ in os.walk(self.path, topdown=False):
            flush(Path(folder))
        self._place(sidecar["key"], known)
        self.discard()
        size = sum(file["bytes"] for file in outputs.values()) + len(text)
        return Written(len(outputs) + 1, size, hashlib.sha256(text).hexdigest())

    def _place(self, key: str, known: bool) -> None:
        """Move the folder into place."""
        self._final.parent.mkdir(parents=True, exist_ok=True)
        if self._final.is_symlink() or self._final.exists():
            check_folder(self._final, key, known)
            _swap(self.path, self._final, self._root)
        else:
            self.path.rename(self._final)
        flush(self._final.parent)

    def discard(self) -> None:
        """Remove whatever was not moved into place, or is no longer there."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        shutil.rmtree(self.path, ignore_errors=True)


def _settled(file: Path) -> dict[str, Any]:
    flush(file)
    return {"bytes": os.path.getsize(file), "crc32": checksum(file)}


def checksum(file: str | os.PathLike[str]) -> str:
    """Return the CRC-32 of a file, or of what lies at a URL, as in gzip and zip, in eight hexadecimal digits."""
    crc = _crc32()
    value = 0
    with opened(os.fspath(file)) as f:
        while block := f.read(2**20):
            value = crc(block, value)
    return f"{value:08x}"


@cache
def _crc32() -> Callable[[bytes, int], int]:
    from imagecodecs import deflate_crc32  # 25 times as fast as the one of zlib

    return deflate_crc32  # type: ignore[no-any-return, unused-ignore]


def _swap(new: Path, place: Path, root: Path) -> None:
    """Put a folder where another one stands, which is then where the new one was."""
    if _exchanged(new, place):
        return
    # Two steps then; a run that ends between them leaves a note for the next one.
    note, former = new.with_suffix(".place"), new.with_suffix(".former")
    note.write_text(str(place.relative_to(root)), "utf-8")
    flush(note)
    place.rename(former)
    try:
        new.rename(place)
    except OSError:
        former.rename(place)
        note.unlink()
        raise
    note.unlink()
    former.rename(new)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step where the system can: Linux, on local file systems."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError, OSError):
        return False
    if call(_FROM_HERE, os.fsencode(one), _FROM_HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def retire(folder: Path, key: str) -> None:
    """Remove the output of a series from a folder; that of another one, and all else in it, stays."""
    sidecar = folder / SIDECAR
    try:
        owner = json.loads(sidecar.read_text("utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if owner == key:
        sidecar.unlink()  # first, so that what is left does not look complete
        for name in [name for name, entry in entries(folder) if is_own(name) and entry.is_file()]:
            (folder / name).unlink()
        for below, _, _ in os.walk(folder, topdown=False):
            if below == str(folder) or OWN_FOLDER.fullmatch(os.path.relpath(below, folder)):
                with suppress(OSError):  # not empty
                    os.rmdir(below)


def _differs(file: Path, listed: dict[str, Any]) -> bool:
    """Whether a file is not what is listed."""
    try:
        return (os.path.getsize(file), checksum(file)) != (listed["bytes"], listed["crc32"])
    except OSError:
        return True
