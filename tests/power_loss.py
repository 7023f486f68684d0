"""Makes the states in which a loss of power may leave a disk, from a record of what was done to it.

A file has the content of its last flush, or all of what was written since, nothing, a part, or zeros. For the names of
files and folders there are two models:

* `Journal`, as in ext4 and XFS: changes persist in their order, and a flush of any file persists all earlier ones.
* `Entries`, all that POSIX guarantees: changes persist in any order, except those of one name, and only a flush of
  their folder makes them durable. A rename between two folders is one change.

SQLite is trusted: a database has the content of the last commit that its settings make durable, or of a later one.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from disk_recorder import Change, Commit, Flush, Place, Recorder, Report, Step, Write, paths


class FileSystem(Protocol):
    """Which changes of names a file system has made durable."""

    durable: dict[Place, int]
    pending: list[Change]

    def flush(self, inode: int, only: str = "") -> None:
        """Make durable what a flush of a file or folder guarantees; `only` one name in that folder, if given."""

    def outcomes(self, chance: random.Random, count: int) -> Iterator[list[Change]]:
        """Yield pending changes that survive: none, all, and other choices, of which up to `count` are random."""


class Journal:
    """Changes persist in their order; each flush persists all earlier ones."""

    def __init__(self, names: Mapping[Place, int]) -> None:
        self.durable = dict(names)
        self.pending: list[Change] = []

    def flush(self, inode: int, only: str = "") -> None:  # noqa: ARG002
        apply(self.pending, self.durable)
        self.pending = []

    def outcomes(self, chance: random.Random, count: int) -> Iterator[list[Change]]:  # noqa: ARG002
        yield []
        for length in range(len(self.pending), 0, -1):
            yield self.pending[:length]


class Entries:
    """Changes persist in any order, except those of one name; a flush of a folder persists those of its names."""

    def __init__(self, names: Mapping[Place, int]) -> None:
        self.durable = dict(names)
        self.pending: list[Change] = []

    def flush(self, inode: int, only: str = "") -> None:
        kept: list[Change] = []
        left: list[Change] = []
        needed: set[Place] = set()
        for change in reversed(self.pending):
            places = {place for place, _ in change.names}
            if places & needed or any(folder == inode and only in ("", name) for folder, name in places):
                needed |= places
                kept.append(change)
            else:
                left.append(change)
        apply(kept[::-1], self.durable)
        self.pending = left[::-1]

    def outcomes(self, chance: random.Random, count: int) -> Iterator[list[Change]]:
        yield []
        if self.pending:
            yield self.pending
        for lost in range(len(self.pending)):
            yield self._without({lost})
        for _ in range(count if len(self.pending) > 2 else 0):
            share = chance.random()
            yield self._without({n for n in range(len(self.pending)) if chance.random() < share})

    def _without(self, lost: set[int]) -> list[Change]:
        """Return the pending changes without some, given by number, and without later ones of the same names."""
        found: list[Change] = []
        names: set[Place] = set()
        for number, change in enumerate(self.pending):
            places = {place for place, _ in change.names}
            if number in lost or places & names:
                names |= places
            else:
                found.append(change)
        return found


def apply(changes: list[Change], names: dict[Place, int]) -> None:
    """Apply changes to names."""
    for change in changes:
        for place, identity in change.names:
            if identity is None:
                names.pop(place, None)
            else:
                names[place] = identity


@dataclass(frozen=True)
class File:
    """A file after a loss of power."""

    identity: int
    """Hard links have the same one."""
    data: bytes
    mtime_ns: int | None


@dataclass(frozen=True)
class State:
    """The content of a disk after a loss of power."""

    files: dict[str, File | None]
    """Files by path; None for folders, which precede what they contain."""

    def below(self, folder: str) -> dict[str, bytes]:
        """Return the content of the files in a folder by their path in it."""
        start = f"{folder}/"
        return {p[len(start) :]: f.data for p, f in self.files.items() if f is not None and p.startswith(start)}

    def write(self, top: Path) -> None:
        """Make a folder with this content, in place of one that may be there."""
        shutil.rmtree(top, ignore_errors=True)
        top.mkdir()
        first: dict[int, Path] = {}
        for name, file in self.files.items():
            path = top / name
            if file is None:
                path.mkdir()
            elif file.identity in first:
                path.hardlink_to(first[file.identity])
            else:
                path.write_bytes(file.data)
                first[file.identity] = path
                if file.mtime_ns is not None:
                    os.utime(path, ns=(file.mtime_ns, file.mtime_ns))


class Disk:
    """What is durable after some steps, in each model of a file system, and what is pending."""

    def __init__(self, recorder: Recorder) -> None:
        first = recorder.first
        self.models: dict[str, FileSystem] = {"journal": Journal(first.names), "entries": Entries(first.names)}
        self.reported: set[str] = set()
        """Keys of the series that were reported as finished."""
        self._folders = recorder.folders
        self._content = dict(first.content)
        self._durable = dict(first.content)
        self._mtimes_ns = dict(first.mtimes_ns)
        self._commits: dict[int, list[bytes]] = {}
        """Contents of each database that may be left: that of the last durable commit, and those of later ones."""

    def advance(self, step: Step) -> None:
        """Apply one more step."""
        match step:
            case Change():
                for model in self.models.values():
                    model.pending.append(step)
            case Write(file, data, mtime_ns):
                self._content[file] = data
                self._mtimes_ns[file] = mtime_ns
            case Flush(inode):
                if inode in self._content:
                    self._durable[inode] = self._content[inode]
                for model in self.models.values():
                    model.flush(inode)
            case Commit(database, data, durable):
                former = self._commits.get(database, [self._durable.get(database, b"")])
                self._commits[database] = [data] if durable else [*former, data]
                if durable:
                    self._settle(database)
            case Report(key):
                self.reported = self.reported | {key}

    def _settle(self, database: int) -> None:
        """Make durable the name of a database."""
        for model in self.models.values():
            for folder, name in [
                place for change in model.pending for place, inode in change.names if inode == database
            ]:
                model.flush(folder, name)

    def states(self, model: str, chance: random.Random, count: int) -> Iterator[State]:
        """Yield states that a loss of power may leave, `count` of them with a random choice of names that survive."""
        for number, names in enumerate(self.models[model].outcomes(chance, count)):
            if number < 2:  # no names or all of them; in the worst case, later rows of a manifest survive, or none
                yield self._state(model, chance, names, data=0, commits=1)
                yield self._state(model, chance, names, data=0, commits=0)
            yield self._state(model, chance, names, data=chance.random(), commits=chance.random())

    def _state(self, model: str, chance: random.Random, names: list[Change], data: float, commits: float) -> State:
        """Return a state with some surviving changes; the shares are probabilities that something else survives."""
        left = dict(self.models[model].durable)
        apply(names, left)
        files: dict[str, File | None] = {}
        known: dict[int, File] = {}
        for path, identity in paths(left, self._folders):
            if identity in self._folders:
                files[path] = None
                continue
            if identity not in known:
                content = self._survivor(identity, data, commits, chance)
                known[identity] = File(identity, content, self._mtimes_ns.get(identity))
            files[path] = known[identity]
        return State(files)

    def _survivor(self, file: int, share: float, commits: float, chance: random.Random) -> bytes:
        """Return the content that a file may have."""
        if file in self._commits:
            versions = self._commits[file]
            return versions[round(commits * (len(versions) - 1))]
        whole, durable = self._content.get(file, b""), self._durable.get(file, b"")
        if whole == durable or chance.random() < share:
            return whole
        return chance.choice((b"", durable, whole[: chance.randint(0, len(whole))], bytes(len(whole))))


def disks(recorder: Recorder) -> Iterator[Disk]:
    """Yield the same disk after each step, from none to all."""
    disk = Disk(recorder)
    yield disk
    for step in recorder.steps:
        disk.advance(step)
        yield disk
