"""Opens, lists and stats files on disk, or at URLs that fsspec supports (``s3://bucket/dicom``).

Paths without "://" go straight to the operating system. fsspec is imported with the first URL, in each process by
itself, since its connections and its thread do not survive a fork. Errors of a store are raised as `OSError` with their
reason, like errors of a disk.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat as modes
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from gpuprep.errors import GpuprepError, RequestError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

WHOLE_BYTES = 16 << 20
"""Size of the first request for an object that is read completely; smaller objects need no further one."""

HEAD_BYTES = 64 << 10
"""Size of the first request for an object whose header is read; it covers nearly all headers."""

BLOCK_BYTES = 4 << 20
"""Size of further requests; some of these blocks are cached."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_PACKAGES = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
"""Required package by scheme, and the extra that installs it."""


def is_url(path: str) -> bool:
    """Return whether a path is a URL rather than a path on disk."""
    return "://" in path and _URL.match(path) is not None


def normalised_path(path: str | os.PathLike[str]) -> str:
    """Return an input path in normal form: ``file://`` URLs as paths on disk, other URLs without trailing slashes.

    Raises
    ------
    RequestError
        If a URL holds a password or a query, since it would appear in manifests and messages.
    """
    path = os.fspath(path)
    if not is_url(path):
        return path
    scheme, _, rest = path.partition("://")
    host, slash, local = rest.partition("/")
    if scheme == "file":
        if host not in ("", "localhost") or not slash:
            raise RequestError(f"{path}: give an absolute path after file://, as in file:///folder")
        return unquote(f"/{local}")
    if "?" in rest or "@" in host:
        raise RequestError(
            f"the {scheme}:// URL holds a password or a query, which would appear in messages and manifests: give "
            "credentials in the environment or a file that its library reads"
        )
    return f"{scheme}://{rest.rstrip('/')}"


def is_requested_folder(path: str) -> bool:
    """Return whether a requested path is a folder.

    Raises
    ------
    RequestError
        If it does not exist or cannot be read.
    """
    try:
        return modes.S_ISDIR(stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError) as exc:  # a name with a NUL
        raise RequestError(f"{path} does not exist") from exc
    except OSError as exc:
        raise RequestError(f"{path} cannot be read: {exc.strerror}") from exc


def isdir(path: str) -> bool:
    """Return whether a path is a folder."""
    return modes.S_ISDIR(_mode(path)) if is_url(path) else os.path.isdir(path)


def absolute(path: str | os.PathLike[str]) -> str:
    """Return an absolute path. Symbolic links are resolved only if it contains "..", which applies to link targets."""
    path = normalised_path(path)
    if is_url(path):
        return path
    return os.path.realpath(path) if os.pardir in path.split(os.sep) else os.path.abspath(path)


def isfile(path: str) -> bool:
    """Return whether a path is a file."""
    return modes.S_ISREG(_mode(path)) if is_url(path) else os.path.isfile(path)


def _mode(url: str) -> int:
    try:
        return stat(url).st_mode
    except OSError:
        return 0


def stat(path: str) -> os.stat_result:
    """Return the status of a path; for a URL, only type, size, modification time and inode (a hash) are set."""
    if not is_url(path):
        return os.stat(path)
    with _store(path) as (fs, key):
        return _status(path, fs.info(key))


def _status(url: str, info: dict[str, Any]) -> os.stat_result:
    mode = modes.S_IFREG if info["type"] == "file" else modes.S_IFDIR
    identity = int.from_bytes(hashlib.sha256(url.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    status = (mode, identity, -1, 1, 0, 0, info.get("size") or 0, 0, 0, 0)
    return os.stat_result(status, {"st_mtime_ns": _mtime_ns(info)})


def _mtime_ns(info: dict[str, Any]) -> int:
    """Return the modification time. A hash of the ETag, if there is one, replaces the fraction of a second.

    Listings and objects report the time with different precision, and two versions may be less than that apart.
    """
    times = [info[key] for key in ("LastModified", "mtime", "last_modified", "created") if info.get(key)]
    time = times[0].timestamp() if times and isinstance(times[0], datetime) else float(times[0]) if times else 0.0
    if etag := info.get("ETag") or info.get("etag"):
        digest = hashlib.sha256(str(etag).strip('"').encode()).digest()
        return int(time) * 10**9 + int.from_bytes(digest[:8], "big") % 10**9
    return int(time * 10**9)


def real_path(path: str | os.PathLike[str]) -> str:
    """Return the real path on disk, by which folders are compared; a URL is returned in normal form."""
    path = normalised_path(path)
    return path if is_url(path) else os.path.realpath(path)


def walk_folders(
    top: str, entered: set[str | None], cannot_list: Callable[[str, OSError], None] = lambda *_: None
) -> Iterator[tuple[str, list[str]]]:
    """Yield the folders at or below one on disk, sorted, each with the sorted paths of its other entries.

    Parameters
    ----------
    top : str
        Path of the first folder.
    entered : set of str or None
        Real paths of folders to leave out. Each yielded folder is added, since links may form cycles.
    cannot_list : callable
        Called with each folder that cannot be listed, and the error.
    """
    pending = [top]
    while pending:
        folder = pending.pop()
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        paths: list[str] = []
        below: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    (below if _is_folder(entry) else paths).append(entry.path)
        except OSError as exc:
            cannot_list(folder, exc)
        pending += reversed(below)
        yield folder, paths


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a cyclic link, or one into a forbidden folder; its neighbours are still listed
        return False


def walk(url: str, exclude: str | None = None) -> Iterator[tuple[str, list[tuple[str, os.stat_result]]]]:
    """Yield the folders with files at or below a URL, sorted, each with the paths and status of its files.

    `exclude` is a folder that is left out, with everything below it.
    """
    folders: dict[str, list[tuple[str, os.stat_result]]] = defaultdict(list)
    with _store(url) as (fs, key):
        # One flat listing: stores have no folders, and a listing without folders returns 1000 objects per request.
        for name, info in fs.find(key, detail=True).items():
            if info["type"] == "file" and not name.endswith("/"):  # empty objects ending in "/" represent folders
                path = url + name[len(key) :]
                folders[os.path.dirname(path)].append((path, _status(path, info)))
    for folder in sorted(folders):
        if exclude is None or not f"{folder}/".startswith(f"{exclude}/"):
            yield folder, sorted(folders[folder])


def folder_entries(folder: str) -> list[str]:
    """Return the names of the direct entries of a folder."""
    if not is_url(folder):
        return os.listdir(folder)
    with _store(folder) as (fs, key):
        return [os.path.basename(name.rstrip("/")) for name in fs.ls(key, detail=False)]


def opened(path: str, *, head: bool = False) -> io.RawIOBase:
    """Open a file for reading, unbuffered; `head` means that mostly its beginning will be read."""
    return _Object(path, HEAD_BYTES if head else WHOLE_BYTES) if is_url(path) else _File(path)


def fetched(url: str, start: int, stop: int) -> bytes:
    """Return the bytes [start, stop) of an object with one request; fewer if it ends before."""
    with _store(url) as (fs, key):
        try:
            data: bytes = fs.cat_file(key, start=start, end=stop)
        except Exception:  # stores refuse ranges that begin at or beyond the end
            if fs.info(key)["size"] <= start:
                return b""
            raise
    return data


def read_bytes(url: str) -> bytes:
    """Return the whole object at a URL."""
    with _store(url) as (fs, key):
        data: bytes = fs.cat_file(key)
    return data


def write_bytes(url: str, data: bytes, *, new: bool = False) -> None:
    """Write an object atomically; with `new`, fail if it exists, provided that the store supports this check."""
    with _store(url) as (fs, key):
        fs.pipe_file(key, data, **({"mode": "create"} if new else {}))


def upload(file: str | os.PathLike[str], url: str) -> None:
    """Copy a file on disk to a URL."""
    with _store(url) as (fs, key):
        fs.put_file(os.fspath(file), key)


def download(url: str, file: str | os.PathLike[str]) -> None:
    """Copy an object to a file on disk."""
    with _store(url) as (fs, key):
        fs.get_file(key, os.fspath(file))


def remove(url: str) -> None:
    """Remove an object if it exists."""
    with suppress(FileNotFoundError), _store(url) as (fs, key):
        fs.rm_file(key)


class _File(io.FileIO):
    """A file on disk that closes without a ResourceWarning, since archive readers may be dropped while open."""

    def __del__(self) -> None:
        self.close()


class _Object(io.RawIOBase):
    """An object at a URL: its first bytes are requested at once, the rest in blocks on demand."""

    _block_file: Any = None

    def __init__(self, url: str, first_bytes: int) -> None:
        super().__init__()
        self.name = url
        self._first = fetched(url, 0, first_bytes)
        self._size = len(self._first) if len(self._first) < first_bytes else None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._first[self._position : self._position + len(view)]
        if not data and self._size is None:
            blocks = self._blocks()
            with _store(self.name):
                blocks.seek(self._position)
                data = blocks.read(len(view))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self.closed:
            raise ValueError("seek of closed file")
        end = self._length() if whence == os.SEEK_END else 0
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence, end)
        if position < 0:
            raise ValueError("negative position")
        self._position = position
        return position

    def close(self) -> None:
        if self._block_file is not None:
            self._block_file.close()
        super().close()

    def _length(self) -> int:
        if self._size is not None:
            return self._size
        blocks = self._blocks()
        with _store(self.name):
            return int(blocks.seek(0, os.SEEK_END))

    def _blocks(self) -> Any:
        if self._block_file is None:
            with _store(self.name) as (fs, key):
                self._block_file = fs.open(key, "rb", block_size=BLOCK_BYTES, cache_type="blockcache")
        return self._block_file


@contextmanager
def _store(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the file system of a URL and the path in it; turn errors of its library into an `OSError`."""
    fs = _file_system(url)
    try:
        yield fs, fs._strip_protocol(url)
    except (GpuprepError, MemoryError):
        raise
    except FileNotFoundError as exc:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from exc
    except PermissionError as exc:
        raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)} ({_one_line(exc)})", url) from exc
    except Exception as exc:  # the libraries of stores have their own error classes
        raise OSError(errno.EIO, _one_line(exc), url) from exc


def _one_line(exc: Exception) -> str:
    """Return the text of an error as one line, without the queries of URLs, which may hold signatures."""
    text = str((isinstance(exc, OSError) and exc.strerror) or exc) or type(exc).__name__
    return " ".join(re.sub(r"(://[^\s?\"']*)\?[^\s\"']*", r"\1", text).split())


def _file_system(url: str) -> Any:
    scheme = url.partition("://")[0]
    try:
        import fsspec

        # Without a cache of listings, since objects may change between the scan and the reading of pixels.
        return fsspec.filesystem(scheme, use_listings_cache=False)  # fsspec returns one instance per process
    except ImportError as exc:
        package, extra = _PACKAGES.get(scheme, ("", ""))
        how = f"{package}: pip install 'gpuprep[{extra}]'" if package else f"a package that is not installed ({exc})"
        raise RequestError(f"{scheme}:// needs {how}") from exc
    except ValueError as exc:
        raise RequestError(f"{url}: {scheme}:// is unknown to fsspec") from exc


def rooted(path: str) -> str:
    """Return an absolute path in a form common to disks and URLs: ``s3://a/b`` becomes ``/s3/a/b``."""
    return "/{}/{}".format(*path.split("://", 1)) if is_url(path) else path


def common_folder(folders: Iterable[str]) -> str:
    """Return the deepest common folder; "/" if there is none."""
    folders = list(folders)
    schemes = {folder.partition("://")[0] if is_url(folder) else "" for folder in folders}
    common = os.path.commonpath(map(rooted, folders))
    if schemes == {""}:
        return common
    _, scheme, *below = common.split("/", 2)
    return f"{scheme}://{below[0]}" if len(schemes) == 1 and below else "/"
