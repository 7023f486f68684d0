"""Stores outputs in an object store, at a URL that fsspec can open: see also `gpuprep.output.folder_store`.

A store has no rename, so ``volume.json`` is what makes an output: it is put when all other objects of a folder are
there, and taken away before any of them changes. Since it has the size and the CRC-32 of each, an upload that broke off
is told from a whole one; where one breaks off while it replaces a former output, there is neither until the next run
has made it again. What is being uploaded carries a note with the key of its series, ``volume.json.part``; by
that a later run knows what it may replace. Volumes and the manifest, which is a file of SQLite, are made in a scratch
folder on disk (``TMPDIR``), which needs room for the volumes in flight, and stays behind only after a kill.

What is promised: a folder with a ``volume.json`` is whole; nothing is replaced or removed but outputs of the same
series, by the names that gpuprep gives; the manifest of the store is one that a run had at some moment. A run that is
killed loses what the manifest learned since it was last put back (`KEEPING_S`); its volumes are recognised. Where the
store knows no conditional writes, two runs that begin within the same second may not see each other, and where clocks
of machines differ by more than `LEASE_S`, a lock may be taken for one that was left behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from gpuprep.core.shard import WHOLE, Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.files import filesystem
from gpuprep.output import folder_store
from gpuprep.output.bucket_lock import LEASE_S, BucketLock, is_alive, lock_url, note_at
from gpuprep.output.folder_store import Output, PendingFolder, Written, checksum, open_output
from gpuprep.output.manifest import copy_manifest, manifest_path
from gpuprep.output.own_files import PREVIEW, SIDECAR, check_replaceable, inside, is_own
from gpuprep.output.paths import WORKSHOP

UNFINISHED = f"{SIDECAR}.part"
"""Says whose output is being uploaded; gone when it is there."""

REQUESTS = 8
"""At a time, by each worker; they wait for the network, mostly."""

KEEPING_S = 60.0
"""How often the manifest is put back, and the lock renewed."""


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bucket(Output):
    """A folder of outputs in an object store, as workers and the parent know it; `root` and `workshop` are scratch."""

    url: str

    def pending(self, folder: str) -> PendingFolder:
        return _PendingObjects(self, folder)

    def contents(self, folder: str) -> tuple[int, int]:
        sizes = [size for name, size in self.sizes(folder).items() if name == SIDECAR or is_own(name)]
        return len(sizes), sum(sizes)

    def intact(self, folder: str) -> tuple[dict[str, Any], Written] | None:
        """Return the ``volume.json`` of an output whose objects are just those it lists, by name and size.

        Their bytes are not read again: that a body arrives as it was sent is for the store, which checks it, and an
        object is there whole or not at all.
        """
        try:
            text = filesystem.read_bytes(f"{self.url}/{folder}/{SIDECAR}")
            sidecar = json.loads(text)
            listed = {name: file["bytes"] for name, file in sidecar["outputs"].items()} | {SIDECAR: len(text)}
            there = self.sizes(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if {name: size for name, size in there.items() if name == SIDECAR or is_own(name)} != listed:
            return None
        return sidecar, Written(len(listed), sum(listed.values()), hashlib.sha256(text).hexdigest())

    def torn(self, folder: str, sha256: str) -> list[str]:
        place = f"{self.url}/{folder}"
        try:
            text = filesystem.read_bytes(f"{place}/{SIDECAR}")
            listed: dict[str, Any] = json.loads(text)["outputs"]
            if sha256 and hashlib.sha256(text).hexdigest() != sha256:
                return [SIDECAR]
            there = {name: size for name, size in self.sizes(folder).items() if is_own(name)}
            return sorted(there.keys() - listed.keys()) + [
                name
                for name, file in listed.items()
                if there.get(name) != file["bytes"] or checksum(f"{place}/{name}") != file["crc32"]
            ]
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return [SIDECAR]

    def strangers(self, folder: str) -> list[str]:
        return _strangers(self.sizes(folder))

    def holds(self, folder: str) -> bool:
        """Whether there is an output at that place; what is left of an upload is none."""
        return SIDECAR in self.sizes(folder)

    def preview(self, folder: str) -> bytes | None:
        try:
            return filesystem.read_bytes(f"{self.url}/{inside(folder)}/{PREVIEW}")
        except (OSError, OutputError):
            return None

    def retire(self, folder: str, key: str) -> None:
        there = self.sizes(inside(folder))
        place = f"{self.url}/{folder}"
        if SIDECAR in there and json.loads(filesystem.read_bytes(f"{place}/{SIDECAR}")).get("key") == key:
            filesystem.remove(f"{place}/{SIDECAR}")  # first, so that what is left does not look complete
            _each(filesystem.remove, (f"{place}/{name}" for name in there if is_own(name)))

    def write_text(self, name: str, text: str) -> None:
        filesystem.write_bytes(f"{self.url}/{name}", text.encode())

    def lasting(self, name: str) -> str:
        return f"{self.url}/{name}"

    def free_bytes(self) -> None:
        return None

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size of every object in a folder, by its name from there on."""
        place = f"{self.url}/{folder}"
        try:
            files = [file for _, files in filesystem.walk(place) for file in files]
        except FileNotFoundError:
            return {}
        return {path[len(place) + 1 :]: status.st_size for path, status in files if path != place}


class _PendingObjects(PendingFolder):
    """A folder in the making on disk, that becomes objects."""

    def __init__(self, bucket: Bucket, folder: str) -> None:
        super().__init__(bucket, folder)
        self._bucket = bucket
        self._folder = folder

    def _made(self, output: Output) -> Path:
        # Workers of a scheduler may be on other machines, which have no scratch folder of this run.
        return Path(tempfile.mkdtemp(dir=output.workshop if output.workshop.is_dir() else None, prefix="gpuprep-"))

    def _place(self, key: str, known: bool) -> None:
        """Upload the files, ``volume.json`` last."""
        place = f"{self._bucket.url}/{self._folder}"
        there = self._bucket.sizes(self._folder)
        if there:
            check_replaceable(place, _former_key(place, there), key, known, _strangers(there))
        files = sorted(f.relative_to(self.path).as_posix() for f in self.path.rglob("*") if f.is_file())
        files.remove(SIDECAR)
        filesystem.write_bytes(f"{place}/{UNFINISHED}", json.dumps({"key": key}).encode())
        if SIDECAR in there:
            filesystem.remove(f"{place}/{SIDECAR}")
        _each(lambda name: filesystem.upload(self.path / name, f"{place}/{name}"), files)
        gone = {name for name in there if is_own(name)} - set(files)
        _each(filesystem.remove, (f"{place}/{name}" for name in gone))
        filesystem.upload(self.path / SIDECAR, f"{place}/{SIDECAR}")
        with suppress(OSError):  # the output is there, whatever becomes of the note
            filesystem.remove(f"{place}/{UNFINISHED}")


def _former_key(place: str, there: dict[str, int]) -> str | None:
    """Return the key of the series that a folder says it holds, or was about to hold."""
    for name in (SIDECAR, UNFINISHED):
        if name in there:
            with suppress(ValueError, KeyError, TypeError):
                return str(json.loads(filesystem.read_bytes(f"{place}/{name}"))["key"])
    return None


def _strangers(there: Iterable[str]) -> list[str]:
    return sorted(name for name in there if name not in (SIDECAR, UNFINISHED) and not is_own(name))


def _each(function: Callable[[str], None], names: Iterable[str]) -> None:
    """Do something with each name, several at a time; the first error ends it."""
    with ThreadPoolExecutor(REQUESTS) as threads:
        for _ in threads.map(function, names):
            pass


def place_of(out: str | os.PathLike[str]) -> str | Path:
    """Return OUT as it is used from here on: the URL of a folder in a store, or an absolute path."""
    out = filesystem.given(out)
    return out if filesystem.is_url(out) else Path(os.path.abspath(out))


def output_at(out: str | os.PathLike[str]) -> Output:
    """Return the outputs at OUT, to be looked at."""
    place = place_of(out)
    return Output(place, place / WORKSHOP) if isinstance(place, Path) else Bucket(Path(), Path(), place)


def open_out(out: str | os.PathLike[str], shard: Shard = WHOLE) -> AbstractContextManager[Output]:
    """Open OUT for a run, on disk or in a store: see `gpuprep.output.folder_store.open_output`."""
    place = place_of(out)
    return open_output(place, shard) if isinstance(place, Path) else open_bucket(place, shard)


def is_open(out: str | os.PathLike[str], shard: Shard = WHOLE) -> bool:
    """Whether a run is writing into OUT at this moment; for a shard, whether that one is."""
    place = place_of(out)
    return folder_store.is_open(place, shard) if isinstance(place, Path) else is_alive(note_at(lock_url(place, shard)))


@contextmanager
def at_hand(out: str | os.PathLike[str], *names: str) -> Iterator[Path]:
    """Give the folder in which files at the top of OUT can be read: OUT itself, or one on disk that has copies of them.

    Parameters
    ----------
    out : path
        Where outputs are.
    *names : str
        The files; absent: all manifests.
    """
    place = place_of(out)
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="gpuprep-") as folder:
        for name in _top(place):
            if name in names or (not names and _is_manifest(name)):
                filesystem.download(f"{place}/{name}", Path(folder, name))
        yield Path(folder)


def _top(url: str) -> list[str]:
    """Return the names right in a folder of a store, which need not be there yet."""
    try:
        return filesystem.listed(url)
    except FileNotFoundError:
        return []


def _is_manifest(name: str) -> bool:
    return name.startswith("manifest.") and name.endswith(".sqlite")


@contextmanager
def open_bucket(url: str, shard: Shard = WHOLE) -> Iterator[Bucket]:
    """Keep other runs out of a folder in a store, and have its manifest on disk while it is open.

    Raises
    ------
    RequestError
        If nothing can be written there, or another run is writing into it.
    OutputError
        If writing the run's own files fails later.
    """
    lock = BucketLock(url, shard)
    with ExitStack() as ending:
        try:
            lock.take()
            ending.callback(lock.release)
        except FileNotFoundError as exc:
            raise RequestError(f"cannot write into {url}: there is no such bucket") from exc
        except OSError as exc:
            raise RequestError(f"cannot write into {url}: {exc.strerror}; choose another --out") from exc
        try:
            scratch = Path(tempfile.mkdtemp(prefix="gpuprep-"))
            ending.callback(shutil.rmtree, scratch, ignore_errors=True)
            bucket = Bucket(scratch, scratch / WORKSHOP, url)
            bucket.workshop.mkdir()
            with _Keeper(bucket, shard, lock).at_work():
                yield bucket
        except (OSError, sqlite3.Error) as exc:
            raise OutputError(f"cannot write into {url}: {exc}") from exc


class _Keeper:
    """Fetches the manifest, and puts it back now and then and at the end."""

    def __init__(self, bucket: Bucket, shard: Shard, lock: BucketLock) -> None:
        self._root, self._url = bucket.root, bucket.url
        self._lock = lock
        self._manifest = manifest_path(bucket.root, shard)
        self._merging: list[str] = []
        """Manifests of shards, to be merged into that of all."""
        self._kept: object = None
        for name in _top(bucket.url):
            if name in ("recipe.toml", self._manifest.name, manifest_path(bucket.root).name):
                filesystem.download(f"{bucket.url}/{name}", bucket.root / name)
            elif _is_manifest(name) and shard == WHOLE:
                filesystem.download(f"{bucket.url}/{name}", bucket.root / name)
                self._merging.append(name)
            elif _is_manifest(name):
                (bucket.root / name).touch()  # that there is such a shard is all that another one looks at

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep the manifest while something is done."""
        ended = Event()
        thread = Thread(target=self._go_on, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._put_back()
            table = self._manifest.with_suffix(".csv")
            if table.is_file():
                filesystem.upload(table, f"{self._url}/{table.name}")

    def _go_on(self, ended: Event) -> None:
        pause_s = KEEPING_S / 10  # at first, so that those who ask soon find one
        while not ended.wait(pause_s):
            started = time.monotonic()
            try:
                self._put_back()
            except (OSError, sqlite3.Error, OutputError) as exc:  # it may work the next time; the end is what counts
                log.warning("%s: the manifest cannot be put back for now: %s", self._url, exc)
            # A large manifest is put back less often, but no less often than the lock has to be renewed.
            pause_s = min(max(KEEPING_S, 10 * (time.monotonic() - started)), LEASE_S / 3)

    def _put_back(self) -> None:
        self._lock.renew()
        changed = [(f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(self._root.glob(f"{self._manifest.name}*"))]
        if not self._manifest.is_file() or changed == self._kept:
            return
        copy = self._root / WORKSHOP / self._manifest.name
        copy_manifest(self._manifest, copy)
        filesystem.upload(copy, f"{self._url}/{copy.name}")
        self._kept = changed
        for name in [name for name in self._merging if not (self._root / name).exists()]:
            filesystem.remove(f"{self._url}/{name}")
            filesystem.remove(f"{self._url}/{Path(name).with_suffix('.csv')}")
            self._merging.remove(name)
