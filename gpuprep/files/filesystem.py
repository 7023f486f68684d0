"""Opens, lists and stats files on disk, or at a URL that fsspec can open (``s3://bucket/dicom``).

A path on disk takes one look for "://", and goes to the system. fsspec is imported when the first URL is asked for, and
in every process anew: what it holds, connections and a thread, does not survive a fork. Whatever goes wrong behind a
URL is an `OSError` with its reason, as it would be on disk.
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
"""Objects that are smaller come with one request."""

HEAD_BYTES = 64 << 10
"""What is asked for first where only a header is wanted: nearly all of them, with one request."""

BLOCK_BYTES = 4 << 20
"""In such pieces the rest of a large object is read, and some of them kept."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_PACKAGES = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
"""Of a scheme: what it needs, and the extra that installs it."""


def is_url(path: str) -> bool:
    """Whether a path is a URL rather than a path on disk."""
    return "://" in path and _URL.match(path) is not None


def given(path: str | os.PathLike[str]) -> str:
    """Return a path as it is used from here on: ``file://`` is the path on disk, no URL ends with a slash.

    Raises
    ------
    RequestError
        If a URL holds a password or a query: it would end up in manifests and messages.
    """
    path = os.fspath(path)
    if not is_url(path):
        return path
    scheme, _, rest = path.partition("://")
    host, slash, local = rest.partition("/")
    if scheme == "file":
        if host not in ("", "localhost") or not slash:
            raise RequestError(f"{path}: after file:// goes the path from the root on: file:///folder")
        return unquote(f"/{local}")
    if "?" in rest or "@" in host:
        raise RequestError(
            f"the {scheme}:// URL holds a password or a query, which would be seen in messages and manifests: give "
            "credentials as its library takes them, in the environment or a file"
        )
    return f"{scheme}://{rest.rstrip('/')}"


def is_requested_folder(path: str) -> bool:
    """Return whether what was asked for is a folder.

    Raises
    ------
    RequestError
        If it does not exist, or cannot be asked about.
    """
    try:
        return modes.S_ISDIR(stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError) as exc:  # a name with a NUL
        raise RequestError(f"{path} does not exist") from exc
    except OSError as exc:
        raise RequestError(f"{path} cannot be read: {exc.strerror}") from exc


def isdir(path: str) -> bool:
    """Whether a path is a folder."""
    return modes.S_ISDIR(_mode(path)) if is_url(path) else os.path.isdir(path)


def absolute(path: str | os.PathLike[str]) -> str:
    """Return a path from the root on, as the system would go: up from a link's target, but links otherwise kept."""
    path = given(path)
    if is_url(path):
        return path
    return os.path.realpath(path) if os.pardir in path.split(os.sep) else os.path.abspath(path)


def isfile(path: str) -> bool:
    """Whether a path is a file."""
    return modes.S_ISREG(_mode(path)) if is_url(path) else os.path.isfile(path)


def _mode(url: str) -> int:
    try:
        return stat(url).st_mode
    except OSError:
        return 0


def stat(path: str) -> os.stat_result:
    """Return what the system says of a path; of a URL its kind, size, time of change and identity."""
    if not is_url(path):
        return os.stat(path)
    with _reached(path) as (fs, key):
        return _status(path, fs.info(key))


def _status(url: str, info: dict[str, Any]) -> os.stat_result:
    mode = modes.S_IFREG if info["type"] == "file" else modes.S_IFDIR
    identity = int.from_bytes(hashlib.sha256(url.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    status = (mode, identity, -1, 1, 0, 0, info.get("size") or 0, 0, 0, 0)
    return os.stat_result(status, {"st_mtime_ns": _changed_ns(info)})


def _changed_ns(info: dict[str, Any]) -> int:
    """Return the time of change. Where there is an ETag, it stands for what is less than a second.

    Listings and objects tell the same time with different precision, and two versions may be less than that apart.
    """
    times = [info[key] for key in ("LastModified", "mtime", "last_modified", "created") if info.get(key)]
    time = times[0].timestamp() if times and isinstance(times[0], datetime) else float(times[0]) if times else 0.0
    if etag := info.get("ETag") or info.get("etag"):
        digest = hashlib.sha256(str(etag).strip('"').encode()).digest()
        return int(time) * 10**9 + int.from_bytes(digest[:8], "big") % 10**9
    return int(time * 10**9)


def resolved(path: str | os.PathLike[str]) -> str:
    """Return a path by which one place on disk is told from another; a URL as it is."""
    path = given(path)
    return path if is_url(path) else os.path.realpath(path)


def folders_at(
    top: str, entered: set[str | None], cannot_list: Callable[[str, OSError], None] = lambda *_: None
) -> Iterator[tuple[str, list[str]]]:
    """Yield the folders at or below one on disk, sorted, each with the paths of all in it that are no folders.

    Parameters
    ----------
    top : str
        Path of the first folder.
    entered : set of str or None
        Real paths of folders that are left out; those that are yielded are added, for links may lead in circles.
    cannot_list : callable
        Told of folders that cannot be listed.
    """
    todo = [top]
    while todo:
        folder = todo.pop()
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
        todo += reversed(below)
        yield folder, paths


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or into a folder that may not be entered: no reason to lose its neighbours
        return False


def walk(url: str, exclude: str | None = None) -> Iterator[tuple[str, list[tuple[str, os.stat_result]]]]:
    """Yield the folders with files at or below a URL, sorted, each with its files and what `stat` says of them.

    `exclude` is a folder that is left out, with all below it.
    """
    folders: dict[str, list[tuple[str, os.stat_result]]] = defaultdict(list)
    with _reached(url) as (fs, key):
        # All at once: a store has no folders, and lists a thousand files with each request if not asked for any.
        for name, info in fs.find(key, detail=True).items():
            if info["type"] == "file" and not name.endswith("/"):  # some make empty objects that stand for folders
                path = url + name[len(key) :]
                folders[os.path.dirname(path)].append((path, _status(path, info)))
    for folder in sorted(folders):
        if exclude is None or not f"{folder}/".startswith(f"{exclude}/"):
            yield folder, sorted(folders[folder])


def listed(folder: str) -> list[str]:
    """Return the names of what lies right in a folder."""
    if not is_url(folder):
        return os.listdir(folder)
    with _reached(folder) as (fs, key):
        return [os.path.basename(name.rstrip("/")) for name in fs.ls(key, detail=False)]


def opened(path: str, *, head: bool = False) -> io.RawIOBase:
    """Open a file for reading, unbuffered; with `head`, mostly its beginning is going to be read."""
    return _Object(path, HEAD_BYTES if head else WHOLE_BYTES) if is_url(path) else _File(path)


def fetched(url: str, start: int, stop: int) -> bytes:
    """Return the bytes [start, stop) of what lies at a URL, with one request; fewer where it ends."""
    with _reached(url) as (fs, key):
        try:
            data: bytes = fs.cat_file(key, start=start, end=stop)
        except Exception:  # stores refuse to give what begins at the end
            if fs.info(key)["size"] <= start:
                return b""
            raise
    return data


def read_bytes(url: str) -> bytes:
    """Return all that lies at a URL."""
    with _reached(url) as (fs, key):
        data: bytes = fs.cat_file(key)
    return data


def write_bytes(url: str, data: bytes, *, new: bool = False) -> None:
    """Put an object at a URL, complete or not at all; with `new`, fail if there is one, where the store can tell."""
    with _reached(url) as (fs, key):
        fs.pipe_file(key, data, **({"mode": "create"} if new else {}))


def upload(file: str | os.PathLike[str], url: str) -> None:
    """Copy a file on disk to a URL."""
    with _reached(url) as (fs, key):
        fs.put_file(os.fspath(file), key)


def download(url: str, file: str | os.PathLike[str]) -> None:
    """Copy what lies at a URL to a file on disk."""
    with _reached(url) as (fs, key):
        fs.get_file(key, os.fspath(file))


def remove(url: str) -> None:
    """Remove what lies at a URL, if anything does."""
    with suppress(FileNotFoundError), _reached(url) as (fs, key):
        fs.rm_file(key)


class _File(io.FileIO):
    """A file on disk. What reads archives from it may be dropped unclosed, in any order: that is no reason to warn."""

    def __del__(self) -> None:
        self.close()


class _Object(io.RawIOBase):
    """What lies at a URL: its first bytes at once, and the rest in blocks if it is asked for."""

    _rest: Any = None

    def __init__(self, url: str, first_bytes: int) -> None:
        super().__init__()
        self.name = url
        self._first = fetched(url, 0, first_bytes)
        self._size = len(self._first) if len(self._first) < first_bytes else None
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._first[self._at : self._at + len(view)]
        if not data and self._size is None:
            blocks = self._blocks()
            with _reached(self.name):
                blocks.seek(self._at)
                data = blocks.read(len(view))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self.closed:
            raise ValueError("seek of closed file")
        end = self._length() if whence == os.SEEK_END else 0
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at}.get(whence, end)
        if at < 0:
            raise ValueError("negative position")
        self._at = at
        return at

    def close(self) -> None:
        if self._rest is not None:
            self._rest.close()
        super().close()

    def _length(self) -> int:
        if self._size is not None:
            return self._size
        blocks = self._blocks()
        with _reached(self.name):
            return int(blocks.seek(0, os.SEEK_END))

    def _blocks(self) -> Any:
        if self._rest is None:
            with _reached(self.name) as (fs, key):
                self._rest = fs.open(key, "rb", block_size=BLOCK_BYTES, cache_type="blockcache")
        return self._rest


@contextmanager
def _reached(url: str) -> Iterator[tuple[Any, str]]:
    """Give the file system of a URL and the path on it; turn whatever its library raises into an `OSError`."""
    fs = _file_system(url)
    try:
        yield fs, fs._strip_protocol(url)
    except (GpuprepError, MemoryError):
        raise
    except FileNotFoundError as exc:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from exc
    except PermissionError as exc:
        raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)} ({_words(exc)})", url) from exc
    except Exception as exc:  # libraries of stores raise what they like
        raise OSError(errno.EIO, _words(exc), url) from exc


def _words(exc: Exception) -> str:
    """Return an error as one line, without the queries of URLs in it, which may be signed."""
    text = str((isinstance(exc, OSError) and exc.strerror) or exc) or type(exc).__name__
    return " ".join(re.sub(r"(://[^\s?\"']*)\?[^\s\"']*", r"\1", text).split())


def _file_system(url: str) -> Any:
    scheme = url.partition("://")[0]
    try:
        import fsspec

        # What is listed today may be changed tomorrow, or by the time its pixels are read.
        return fsspec.filesystem(scheme, use_listings_cache=False)  # the same one for every call in a process
    except ImportError as exc:
        package, extra = _PACKAGES.get(scheme, ("", ""))
        how = f"{package}: pip install 'gpuprep[{extra}]'" if package else f"a package that is not installed ({exc})"
        raise RequestError(f"{scheme}:// needs {how}") from exc
    except ValueError as exc:
        raise RequestError(f"{url}: {scheme}:// is unknown to fsspec") from exc


def rooted(path: str) -> str:
    """Return an absolute path such that paths on disk and URLs can be compared: ``s3://a/b`` lies at ``/s3/a/b``."""
    return "/{}/{}".format(*path.split("://", 1)) if is_url(path) else path


def common_folder(folders: Iterable[str]) -> str:
    """Return the deepest folder that holds some folders; "/" where they have none in common."""
    folders = list(folders)
    schemes = {folder.partition("://")[0] if is_url(folder) else "" for folder in folders}
    common = os.path.commonpath(map(rooted, folders))
    if schemes == {""}:
        return common
    _, scheme, *below = common.split("/", 2)
    return f"{scheme}://{below[0]}" if len(schemes) == 1 and below else "/"
