"""Stores outputs in an object store, at a URL that fsspec can open: see also `gpuprep.output.folder_store`.

A store has no rename, so an output is complete if it has a ``volume.json``. This is uploaded after all other objects of
the folder, and removed before any of them changes. It has the size and the CRC-32 of each, so an interrupted upload is
recognised as incomplete. If the upload that replaces a former output is interrupted, there is neither until the next
run has converted the series again. During an upload, ``volume.json.part`` holds the key of the series; it tells a later
run what it may replace. Volumes and the manifest, a SQLite file, are first written into a scratch folder on disk
(``TMPDIR``). It needs space for the volumes in flight and remains only after a kill.

Guarantees: a folder with a ``volume.json`` is complete; only outputs of the same series, by their gpuprep names, are
replaced or removed; the manifest in the store is a consistent state of a run's manifest. A run that is killed loses the
rows since the last upload of the manifest (`UPLOAD_INTERVAL_S`); its volumes are recognised by the next run. If the
store has no conditional writes, two runs that begin within the same second may not see each other. If clocks of two
machines differ by more than `LEASE_S`, a lock that is held may look abandoned.
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
from typing import Any, ClassVar

from gpuprep.core.shard import WHOLE_COHORT, Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.files import filesystem
from gpuprep.output import folder_store
from gpuprep.output.bucket_lock import LEASE_S, BucketLock, is_held, lock_url, read_lock
from gpuprep.output.checksums import checksum
from gpuprep.output.folder_store import Output, PendingFolder, Written, open_output
from gpuprep.output.manifest import copy_manifest, manifest_path
from gpuprep.output.own_files import PREVIEW, SIDECAR, check_replaceable, checked_folder, is_own
from gpuprep.output.paths import WORK_FOLDER

UNFINISHED = f"{SIDECAR}.part"
"""Object with the key of the series that is being uploaded; removed when the output is complete."""

REQUESTS = 8
"""Concurrent requests of each worker; they mostly wait for the network."""

UPLOAD_INTERVAL_S = 60.0
"""Interval at which the manifest is uploaded and the lock renewed."""


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bucket(Output):
    """Access to an output folder in an object store; `root` and `work_folder` are scratch folders on disk."""

    url: str
    """URL of the output folder."""
    waits_for_disk: ClassVar[bool] = False

    def pending(self, folder: str) -> PendingFolder:
        return _PendingObjects(self, folder)

    def contents(self, folder: str) -> tuple[int, int]:
        sizes = [size for name, size in self.sizes(folder).items() if name == SIDECAR or is_own(name)]
        return len(sizes), sum(sizes)

    def intact(self, folder: str) -> tuple[dict[str, Any], Written] | None:
        """Return the ``volume.json`` of an output whose objects match it by name and size; None for any other.

        Their bytes are not read again: a store verifies each upload, and holds an object completely or not at all.
        """
        try:
            text = filesystem.read_bytes(f"{self.url}/{folder}/{SIDECAR}")
            sidecar = json.loads(text)
            listed = {name: file["bytes"] for name, file in sidecar["outputs"].items()} | {SIDECAR: len(text)}
            found = self.sizes(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if {name: size for name, size in found.items() if name == SIDECAR or is_own(name)} != listed:
            return None
        return sidecar, Written(len(listed), sum(listed.values()), hashlib.sha256(text).hexdigest())

    def damaged_files(self, folder: str, sha256: str) -> list[str]:
        url = f"{self.url}/{folder}"
        try:
            text = filesystem.read_bytes(f"{url}/{SIDECAR}")
            listed: dict[str, Any] = json.loads(text)["outputs"]
            if sha256 and hashlib.sha256(text).hexdigest() != sha256:
                return [SIDECAR]
            found = {name: size for name, size in self.sizes(folder).items() if is_own(name)}
            return sorted(found.keys() - listed.keys()) + [
                name
                for name, file in listed.items()
                if found.get(name) != file["bytes"] or checksum(f"{url}/{name}") != file["crc32"]
            ]
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return [SIDECAR]

    def foreign_names(self, folder: str) -> list[str]:
        return _foreign_names(self.sizes(folder))

    def holds(self, folder: str) -> bool:
        """Return whether the folder has a ``volume.json``; an interrupted upload has none."""
        return SIDECAR in self.sizes(folder)

    def preview(self, folder: str) -> bytes | None:
        try:
            return filesystem.read_bytes(f"{self.url}/{checked_folder(folder)}/{PREVIEW}")
        except (OSError, OutputError):
            return None

    def remove_output(self, folder: str, key: str) -> None:
        found = self.sizes(checked_folder(folder))
        url = f"{self.url}/{folder}"
        if SIDECAR in found and json.loads(filesystem.read_bytes(f"{url}/{SIDECAR}")).get("key") == key:
            filesystem.remove(f"{url}/{SIDECAR}")  # first, so that an incomplete output has no volume.json
            _for_each(filesystem.remove, (f"{url}/{name}" for name in found if is_own(name)))

    def write_text(self, name: str, text: str) -> None:
        filesystem.write_bytes(f"{self.url}/{name}", text.encode())

    def final_location(self, name: str) -> str:
        return f"{self.url}/{name}"

    def free_bytes(self) -> None:
        return None

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size in bytes of every object in a folder, by its name relative to the folder."""
        url = f"{self.url}/{folder}"
        try:
            files = [file for _, files in filesystem.walk(url) for file in files]
        except FileNotFoundError:
            return {}
        return {path[len(url) + 1 :]: status.st_size for path, status in files if path != url}


class _PendingObjects(PendingFolder):
    """An output folder that is written on disk and uploaded on commit."""

    def __init__(self, bucket: Bucket, folder: str) -> None:
        super().__init__(bucket, folder)
        self._bucket = bucket
        self._folder = folder

    def _new_folder(self, output: Output) -> Path:
        # Workers of a scheduler may be on other machines, which have no scratch folder of this run.
        parent = output.work_folder if output.work_folder.is_dir() else None
        return Path(tempfile.mkdtemp(dir=parent, prefix="gpuprep-"))

    def _move_into_place(self, key: str, known: bool) -> None:
        """Upload the files, ``volume.json`` last."""
        url = f"{self._bucket.url}/{self._folder}"
        former = self._bucket.sizes(self._folder)
        if former:
            check_replaceable(url, _former_key(url, former), key, known, _foreign_names(former))
        files = sorted(f.relative_to(self.path).as_posix() for f in self.path.rglob("*") if f.is_file())
        files.remove(SIDECAR)
        filesystem.write_bytes(f"{url}/{UNFINISHED}", json.dumps({"key": key}).encode())
        if SIDECAR in former:
            filesystem.remove(f"{url}/{SIDECAR}")
        _for_each(lambda name: filesystem.upload(self.path / name, f"{url}/{name}"), files)
        stale = {name for name in former if is_own(name)} - set(files)
        _for_each(filesystem.remove, (f"{url}/{name}" for name in stale))
        filesystem.upload(self.path / SIDECAR, f"{url}/{SIDECAR}")
        with suppress(OSError):  # the output is complete even if this object stays
            filesystem.remove(f"{url}/{UNFINISHED}")


def _former_key(url: str, names: Iterable[str]) -> str | None:
    """Return the key of the series whose output, or interrupted upload, a folder holds; None if it names no series."""
    for name in (SIDECAR, UNFINISHED):
        if name in names:
            with suppress(ValueError, KeyError, TypeError):
                return str(json.loads(filesystem.read_bytes(f"{url}/{name}"))["key"])
    return None


def _foreign_names(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name not in (SIDECAR, UNFINISHED) and not is_own(name))


def _for_each(function: Callable[[str], None], names: Iterable[str]) -> None:
    """Call a function with each name, in several threads; raise the first error."""
    with ThreadPoolExecutor(REQUESTS) as threads:
        for _ in threads.map(function, names):
            pass


def resolve_out(out: str | os.PathLike[str]) -> str | Path:
    """Return OUT as the URL of a folder in an object store, or as an absolute path."""
    out = filesystem.normalised_path(out)
    return out if filesystem.is_url(out) else Path(os.path.abspath(out))


def output_for_reading(out: str | os.PathLike[str]) -> Output:
    """Return access to the outputs in OUT for reading, without a lock."""
    place = resolve_out(out)
    return Output(place, place / WORK_FOLDER) if isinstance(place, Path) else Bucket(Path(), Path(), place)


def open_out(out: str | os.PathLike[str], shard: Shard = WHOLE_COHORT) -> AbstractContextManager[Output]:
    """Open OUT for a run, on disk or in a store: see `gpuprep.output.folder_store.open_output`."""
    place = resolve_out(out)
    return open_output(place, shard) if isinstance(place, Path) else open_bucket(place, shard)


def is_open(out: str | os.PathLike[str], shard: Shard = WHOLE_COHORT) -> bool:
    """Return whether a whole run, or the run of the given shard, is writing into OUT at this moment."""
    place = resolve_out(out)
    return folder_store.is_open(place, shard) if isinstance(place, Path) else is_held(read_lock(lock_url(place, shard)))


@contextmanager
def local_copies(out: str | os.PathLike[str], *names: str) -> Iterator[Path]:
    """Yield a folder on disk with files from the top of OUT: OUT itself, or for a URL a temporary one with copies.

    Parameters
    ----------
    out : path
        Output folder, a path or a URL.
    *names : str
        Names of the files to copy. Default: all manifests.
    """
    place = resolve_out(out)
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="gpuprep-") as folder:
        for name in _names_at_top(place):
            if name in names or (not names and _is_manifest(name)):
                filesystem.download(f"{place}/{name}", Path(folder, name))
        yield Path(folder)


def _names_at_top(url: str) -> list[str]:
    """Return the names directly in a folder of a store; none if it does not exist."""
    try:
        return filesystem.folder_entries(url)
    except FileNotFoundError:
        return []


def _is_manifest(name: str) -> bool:
    return name.startswith("manifest.") and name.endswith(".sqlite")


@contextmanager
def open_bucket(url: str, shard: Shard = WHOLE_COHORT) -> Iterator[Bucket]:
    """Lock a folder in a store against other runs, and keep its manifest on disk while the context is open.

    Raises
    ------
    RequestError
        If the folder cannot be written, or another run is writing into it.
    OutputError
        If the run's own files cannot be written later.
    """
    lock = BucketLock(url, shard)
    with ExitStack() as cleanup:
        try:
            lock.acquire()
            cleanup.callback(lock.release)
        except FileNotFoundError as exc:
            raise RequestError(f"cannot write into {url}: there is no such bucket") from exc
        except OSError as exc:
            raise RequestError(f"cannot write into {url}: {exc.strerror}; choose another --out") from exc
        try:
            scratch = Path(tempfile.mkdtemp(prefix="gpuprep-"))
            cleanup.callback(shutil.rmtree, scratch, ignore_errors=True)
            bucket = Bucket(scratch, scratch / WORK_FOLDER, url)
            bucket.work_folder.mkdir()
            with _ManifestSync(bucket, shard, lock).running():
                yield bucket
        except (OSError, sqlite3.Error) as exc:
            raise OutputError(f"cannot write into {url}: {exc}") from exc


class _ManifestSync:
    """Downloads the manifest, and uploads it at intervals and at the end of a run."""

    def __init__(self, bucket: Bucket, shard: Shard, lock: BucketLock) -> None:
        self._root, self._url = bucket.root, bucket.url
        self._lock = lock
        self._manifest = manifest_path(bucket.root, shard)
        self._merging: list[str] = []
        """Names of manifests of shards that will be merged into the manifest of OUT."""
        self._uploaded: object = None
        """Sizes and modification times of the manifest's files at its last upload."""
        for name in _names_at_top(bucket.url):
            if name in ("recipe.toml", self._manifest.name, manifest_path(bucket.root).name):
                filesystem.download(f"{bucket.url}/{name}", bucket.root / name)
            elif _is_manifest(name) and shard == WHOLE_COHORT:
                filesystem.download(f"{bucket.url}/{name}", bucket.root / name)
                self._merging.append(name)
            elif _is_manifest(name):
                (bucket.root / name).touch()  # a run over another shard only checks that this name exists

    @contextmanager
    def running(self) -> Iterator[None]:
        """Upload the manifest at intervals while the context is open, and once more when it is left."""
        ended = Event()
        thread = Thread(target=self._upload_at_intervals, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._upload()
            table = self._manifest.with_suffix(".csv")
            if table.is_file():
                filesystem.upload(table, f"{self._url}/{table.name}")

    def _upload_at_intervals(self, ended: Event) -> None:
        pause_s = UPLOAD_INTERVAL_S / 10  # the first time, so that `gpuprep status` soon finds a manifest
        while not ended.wait(pause_s):
            started = time.monotonic()
            try:
                self._upload()
            except (OSError, sqlite3.Error, OutputError) as exc:  # the upload at the end raises if it fails too
                log.warning("%s: the manifest cannot be uploaded, trying again later: %s", self._url, exc)
            # A large manifest is uploaded less often, but often enough to renew the lock.
            pause_s = min(max(UPLOAD_INTERVAL_S, 10 * (time.monotonic() - started)), LEASE_S / 3)

    def _upload(self) -> None:
        self._lock.renew()
        state = [(f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(self._root.glob(f"{self._manifest.name}*"))]
        if not self._manifest.is_file() or state == self._uploaded:
            return
        copy = self._root / WORK_FOLDER / self._manifest.name
        copy_manifest(self._manifest, copy)
        filesystem.upload(copy, f"{self._url}/{copy.name}")
        self._uploaded = state
        for name in [name for name in self._merging if not (self._root / name).exists()]:
            filesystem.remove(f"{self._url}/{name}")
            filesystem.remove(f"{self._url}/{Path(name).with_suffix('.csv')}")
            self._merging.remove(name)
