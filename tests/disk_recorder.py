"""Records what this process does to the files and folders below one, step by step, and when it flushes them."""

from __future__ import annotations

import _pyio  # type: ignore[import-not-found]
import builtins
import ctypes
import io
import os
import sqlite3
import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Place = tuple[int, str]
"""Identity of a folder, and a name in it."""
EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
OF_SQLITE = ("-wal", "-shm", "-journal")


@dataclass(frozen=True)
class Change:
    """Names that change in one step: each with the identity of its new file or folder, or None if it is removed."""

    names: tuple[tuple[Place, int | None], ...]


@dataclass(frozen=True)
class Write:
    """Content of a file after a write."""

    file: int
    data: bytes
    mtime_ns: int


@dataclass(frozen=True)
class Flush:
    """A flush of a file, or of the entries of a folder."""

    inode: int


@dataclass(frozen=True)
class Commit:
    """Content of a database after a commit; `durable` if no later loss of power can undo it."""

    database: int
    data: bytes
    durable: bool


@dataclass(frozen=True)
class Report:
    """A series was reported as finished: from now on its output must survive."""

    key: str


Step = Change | Write | Flush | Commit | Report


@dataclass(frozen=True)
class Snapshot:
    """Names, files and their modification times at one moment, by identity; the folder above all has identity 0."""

    names: dict[Place, int]
    content: dict[int, bytes]
    mtimes_ns: dict[int, int]


class Recorder:
    """Records the steps below a folder, while `recording`. Nothing is really flushed.

    Functions of `os`, `ctypes` and `sqlite3` are wrapped. Files that are written come from `_pyio`, the implementation
    of `io` in Python, so that every write is a call of `os.write`.

    Parameters
    ----------
    top : path
        An existing folder, whose own name is durable.
    """

    def __init__(self, top: Path) -> None:
        self.top = top
        self.steps: list[Step] = []
        self.folders: set[int] = set()
        """Identities of folders; all others are files."""
        self._lock = threading.RLock()
        self._identities: dict[tuple[int, int], int] = {}
        """Own identity of each file and folder by device and inode; the system may use an inode again."""
        self._names: dict[Place, int] = {}
        self._content: dict[int, bytes] = {}
        self._count = 0
        self._mtimes_ns: dict[int, int] = {}
        self._new(top.stat())
        for folder, below, files in os.walk(top):
            for name in (*below, *files):
                path = os.path.join(folder, name)
                place = self._place(path)
                assert place is not None
                status = os.stat(path)
                # A hard link has the identity of the first one.
                known = self._identities.get((status.st_dev, status.st_ino))
                identity = self._names[place] = self._new(status) if known is None else known
                if stat.S_ISREG(status.st_mode):
                    self._content[identity] = Path(path).read_bytes()
                    self._mtimes_ns[identity] = status.st_mtime_ns
        self.first = Snapshot(dict(self._names), dict(self._content), dict(self._mtimes_ns))

    def _new(self, status: os.stat_result) -> int:
        identity = self._identities[status.st_dev, status.st_ino] = self._count
        self._count += 1
        if stat.S_ISDIR(status.st_mode):
            self.folders.add(identity)
        return identity

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the steps of this process until the end of the block, and check that none was missed."""
        with pytest.MonkeyPatch.context() as patch:
            self._wrap(patch)
            yield
        assert self._recorded() == self._real(), "a step was not recorded: see the functions that Recorder wraps"

    def _wrap(self, patch: pytest.MonkeyPatch) -> None:
        for module in (builtins, io):
            patch.setattr(module, "open", self._opening(io.open))
        wrappers: dict[Callable[..., Callable[..., Any]], tuple[str, ...]] = {
            self._creating: ("open",),
            self._making: ("mkdir",),
            self._renaming: ("rename", "replace"),
            self._linking: ("link",),
            self._removing: ("unlink", "remove", "rmdir"),
            self._flushing: ("fsync", "fdatasync"),
            self._writing: ("write", "writev", "pwrite", "pwritev", "truncate", "ftruncate"),
        }
        for wrap, names in wrappers.items():
            for name in names:
                patch.setattr(os, name, wrap(getattr(os, name)))
        patch.setattr(ctypes, "CDLL", self._library(ctypes.CDLL))
        patch.setattr(sqlite3, "connect", self._connecting(sqlite3.connect))

    def report(self, key: str) -> None:
        """Record that the series with this key was reported as finished."""
        with self._lock:
            self.steps.append(Report(key))

    def _place(self, path: Any, dir_fd: int | None = None) -> Place | None:
        """Return the place of a path; None if it is not below the recorded folder."""
        path = os.fsdecode(path)
        try:
            status = os.stat(os.path.dirname(os.path.abspath(path))) if dir_fd is None else os.fstat(dir_fd)
        except OSError:
            return None
        folder = self._identities.get((status.st_dev, status.st_ino))
        return None if folder is None else (folder, os.path.basename(path))

    def _change(self, *names: tuple[Place, int | None]) -> None:
        self.steps.append(Change(names))
        for place, identity in names:
            if identity is None:
                self._names.pop(place, None)
            else:
                self._names[place] = identity

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opening(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = set(mode) & set("wax+")
            ours = isinstance(file, int) or self._place(file) is not None
            return (_pyio.open if writes and ours else real)(file, mode, *args, **kwargs)

        return opening

    def _creating(self, real: Callable[..., int]) -> Callable[..., int]:
        def creating(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            place = self._place(path, dir_fd) if flags & (os.O_CREAT | os.O_TRUNC) else None
            if place is None:
                return real(path, flags, mode, dir_fd=dir_fd)
            with self._lock:
                descriptor = real(path, flags, mode, dir_fd=dir_fd)
                if place not in self._names:
                    self._change((place, self._new(os.fstat(descriptor))))
                self._wrote(descriptor)
                return descriptor

        return creating

    def _making(self, real: Callable[..., None]) -> Callable[..., None]:
        def making(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            with self._lock:
                real(path, mode, dir_fd=dir_fd)
                if (place := self._place(path, dir_fd)) is not None:
                    self._change((place, self._new(os.stat(path, dir_fd=dir_fd))))

        return making

    def _renaming(self, real: Callable[..., None]) -> Callable[..., None]:
        def renaming(one: Any, other: Any, **dir_fds: int | None) -> None:
            with self._lock:
                source = self._place(one, dir_fds.get("src_dir_fd"))
                target = self._place(other, dir_fds.get("dst_dir_fd"))
                real(one, other, **dir_fds)
                if source is not None and target is not None:
                    self._change((source, None), (target, self._names[source]))

        return renaming

    def _linking(self, real: Callable[..., None]) -> Callable[..., None]:
        def linking(one: Any, other: Any, **options: Any) -> None:
            with self._lock:
                real(one, other, **options)
                source, target = self._place(one), self._place(other)
                if source is not None and target is not None:
                    self._change((target, self._names[source]))

        return linking

    def _removing(self, real: Callable[..., None]) -> Callable[..., None]:
        def removing(path: Any, *, dir_fd: int | None = None) -> None:
            with self._lock:
                real(path, dir_fd=dir_fd)
                if (place := self._place(path, dir_fd)) is not None and place in self._names:
                    self._change((place, None))

        return removing

    def _flushing(self, real: Callable[[Any], None]) -> Callable[[Any], None]:
        def flushing(file: Any) -> None:
            status = os.fstat(file if isinstance(file, int) else file.fileno())
            identity = self._identities.get((status.st_dev, status.st_ino))
            if identity is None:
                real(file)
                return
            with self._lock:
                self.steps.append(Flush(identity))

        return flushing

    def _writing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def writing(file: Any, *args: Any, **kwargs: Any) -> Any:
            with self._lock:
                result = real(file, *args, **kwargs)
                self._wrote(file)
                return result

        return writing

    def _wrote(self, file: Any) -> None:
        status = os.stat(file)
        identity = self._identities.get((status.st_dev, status.st_ino))
        if identity is None or not stat.S_ISREG(status.st_mode):
            return
        data = Path(f"/proc/self/fd/{file}" if isinstance(file, int) else file).read_bytes()
        # Equal data, such as zeros in a gap of a file, change the modification time.
        if (data, status.st_mtime_ns) != (self._content.get(identity), self._mtimes_ns.get(identity)):
            self._content[identity], self._mtimes_ns[identity] = data, status.st_mtime_ns
            self.steps.append(Write(identity, data, status.st_mtime_ns))

    def _library(self, real: Callable[..., Any]) -> Callable[..., Any]:
        recorder = self

        class Library:
            """A C library whose `renameat2` is recorded."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self._library = real(*args, **kwargs)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._library, name)

            def renameat2(self, at: int, one: bytes, other_at: int, other: bytes, flags: int) -> int:
                with recorder._lock:
                    result: int = self._library.renameat2(at, one, other_at, other, flags)
                    places = recorder._place(one), recorder._place(other)
                    if result == 0 and places[0] is not None and places[1] is not None:
                        assert flags == EXCHANGE
                        names = recorder._names
                        recorder._change((places[0], names[places[1]]), (places[1], names[places[0]]))
                    return result

        return Library

    def _connecting(self, real: Callable[..., sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
        recorder = self

        class Connection(sqlite3.Connection):
            """A connection that records what each statement commits."""

            place: Place | None = None
            _had_log = False

            def execute(self, *args: Any) -> sqlite3.Cursor:
                with recorder._lock:
                    cursor = super().execute(*args)
                    if self.place is not None and not self.in_transaction:
                        self._record(self.place)
                    return cursor

            def _record(self, place: Place) -> None:
                log = super().execute("PRAGMA journal_mode").fetchone()[0] == "wal"
                (synchronous,) = super().execute("PRAGMA synchronous").fetchone()
                # FULL flushes a write-ahead log at each commit, NORMAL when it is copied into the database, which
                # every other journal mode needs. Only EXTRA flushes the removal of a journal.
                left_log, self._had_log = self._had_log and not log, log
                empty = super().execute("PRAGMA page_count").fetchone() == (0,)
                recorder._committed(
                    place, b"" if empty else self.serialize(), synchronous >= (2 if log else 3), left_log
                )

        def connecting(database: Any, *args: Any, **kwargs: Any) -> sqlite3.Connection:
            place = None if kwargs.get("uri") else self._place(database)
            if place is None:
                return real(database, *args, **kwargs)
            connection = real(database, *args, factory=Connection, **kwargs)
            assert isinstance(connection, Connection)
            connection.place = place
            return connection

        return connecting

    def _committed(self, place: Place, data: bytes, durable: bool, all_durable: bool) -> None:
        if place not in self._names:
            self._change((place, self._count))
            self._count += 1
        database = self._names[place]
        if data != self._content.get(database) or all_durable:
            self._content[database] = data
            self.steps.append(Commit(database, data, durable or all_durable))

    def _recorded(self) -> dict[str, bytes | None]:
        """Return the content of each path, None for folders, as recorded."""
        found: dict[str, bytes | None] = {}
        for path, identity in paths(self._names, self.folders):
            found[path] = None if identity in self.folders else self._content[identity]
        return found

    def _real(self) -> dict[str, bytes | None]:
        """Return the content of each path, None for folders; of databases as recorded, since those bytes may differ."""
        recorded = self._recorded()
        found: dict[str, bytes | None] = {}
        for path in sorted(self.top.rglob("*")):
            name = path.relative_to(self.top).as_posix()
            if not name.endswith(OF_SQLITE):
                known = recorded.get(name) if name.endswith(".sqlite") else None
                found[name] = known or (None if path.is_dir() else path.read_bytes())
        return found


def paths(names: Mapping[Place, int], folders: set[int]) -> Iterator[tuple[str, int]]:
    """Yield each path below the top, which has identity 0, with its identity; folders before what they contain."""
    entries: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for (folder, name), identity in names.items():
        entries[folder].append((name, identity))
    waiting = [("", 0)]
    while waiting:
        prefix, folder = waiting.pop()
        for name, identity in sorted(entries[folder]):
            yield f"{prefix}{name}", identity
            if identity in folders:
                waiting.append((f"{prefix}{name}/", identity))
