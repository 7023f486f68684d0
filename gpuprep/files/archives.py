"""Lists files inside gzip'd files and zip archives, and reads them as streams; nothing is unpacked to disk."""

from __future__ import annotations

import errno
import gzip
import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, TYPE_CHECKING, BinaryIO, Literal

from gpuprep.files import filesystem

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

GZIP_MEMBER = ""
"""The content of a gzip'd file has the empty name; no member of an archive can be opened by it."""

LARGEST_MEMBER_BYTES = 4 << 30
LARGEST_RATIO, RATIO_FREE_BYTES = 50, 64 << 20
"""Nothing may unpack to more than so many times its size, once it is larger than the second number: a zip bomb."""
MOST_MEMBERS = 1_000_000
LARGEST_DIRECTORY_BYTES = 256 << 20

CHUNK_BYTES = 32 << 10
"""What is unpacked at a time. A header is in the first one, and a larger one is hardly faster."""

CACHED_ARCHIVES = 4


class ContainerError(OSError):
    """The archive, or what is in it, cannot be read; the text is one line."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an archive.

    Attributes
    ----------
    name : str
        As in the archive, and so not to be trusted: see `safe_parts`.
    bytes : int
        Size when unpacked, as announced; of a gzip'd file, which announces none, its own size.
    error : str
        Why it cannot be opened, or nothing.
    """

    name: str
    bytes: int
    error: str = ""


def kind(head: bytes) -> Literal["zip", "gzip"] | None:
    """Return what the first four bytes of a file announce; the name of the file does not matter."""
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    return "gzip" if head[:2] == b"\x1f\x8b" else None


def safe_parts(name: str) -> list[str]:
    """Return the path components of a member's name, such that joined below a folder they never leave it.

    Parameters
    ----------
    name : str
        As in the archive: absolute, with drive letters, backslashes, ``..``, whatever its maker fancied.

    Returns
    -------
    list of str
        Names for folders and a file; none where nothing of the name is left.
    """
    name = re.sub(r"^(?:[A-Za-z]:|[\\/])+", "", name).replace("\0", "%00")
    return ["%2E%2E" if p == ".." else p for p in re.split(r"[\\/]", name) if p not in ("", ".")]


def members(path: str) -> Iterator[Member]:
    """Yield the regular files in an archive, in its order. Archives among them are not entered.

    Parameters
    ----------
    path : str
        A zip archive; or a gzip'd file, which has one member, `GZIP_MEMBER`.

    Yields
    ------
    Member
        Also those that cannot be opened, with the reason.

    Raises
    ------
    ContainerError
        If the archive is damaged or beyond the limits of this module.
    """
    if _is_gzip(path):
        yield Member(GZIP_MEMBER, filesystem.stat(path).st_size)
        return
    archive = _archive(path)
    for info in archive.infolist():
        if _is_file(info):
            # An archive that was added to may hold a file twice. What unpacks it ends up with the later one.
            replaced = archive.getinfo(info.filename) is not info
            error = _refusal(info) or ("a later member has the same name" if replaced else "")
            yield Member(info.filename, info.file_size, error)


def open_member(path: str, member: str) -> BinaryIO:
    """Open a file inside an archive for reading.

    Parameters
    ----------
    path : str
        A zip archive or a gzip'd file.
    member : str
        A name that `members` yields.

    Returns
    -------
    binary file
        Can seek. It unpacks no more than is read, in constant memory; going back by more than 32 KiB begins again at
        the front. The last bytes come only after the checksum has turned out right.

    Raises
    ------
    ContainerError
        If the member is absent or unreadable; from the methods of the file, if it turns out to be damaged, shorter
        than announced, or beyond the limits of this module.
    """
    if member == GZIP_MEMBER:
        packed = filesystem.opened(path)
        if kind(packed.read(4) or b"") != "gzip":
            packed.close()
            raise ContainerError("not a gzip'd file")
        limit = min(LARGEST_MEMBER_BYTES, max(RATIO_FREE_BYTES, LARGEST_RATIO * packed.seek(0, os.SEEK_END)))
        return io.BufferedReader(_Stream(lambda: _unpacking(packed), f"{path}/", None, limit, packed), CHUNK_BYTES)
    archive = _archive(path)
    info = archive.NameToInfo.get(member)
    if info is None or not _is_file(info):
        raise ContainerError("the archive has no such member")
    if error := _refusal(info):
        raise ContainerError(error)
    stream = _Stream(lambda: archive.open(info), f"{path}/{member}", info.file_size, info.file_size)
    return io.BufferedReader(stream, CHUNK_BYTES)


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn what zipfile, gzip and zlib make of damaged files into a `ContainerError`; disks may fail as they do."""
    try:
        yield
    except EOFError as exc:  # has no text
        raise ContainerError("cut short: its data have no end") from exc
    except (OSError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, ValueError, OverflowError) as exc:
        if isinstance(exc, ContainerError):
            raise
        # BadGzipFile has no number; the other one comes from positions that no file can have.
        if isinstance(exc, OSError) and exc.errno not in (None, errno.EINVAL):
            raise
        raise ContainerError(f"cannot be read: {' '.join(str(exc).split())}") from exc


def _is_gzip(path: str) -> bool:
    with filesystem.opened(path, head=True) as file:
        return kind(file.read(4) or b"") == "gzip"


def _unpacking(packed: io.RawIOBase) -> gzip.GzipFile:
    packed.seek(0)
    return gzip.GzipFile(fileobj=packed)


class _ArchiveFile(io.BufferedReader):
    """What zipfile reads from. It asks for the directory in one piece, which is where its size can be limited."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST_DIRECTORY_BYTES:
            limit = LARGEST_DIRECTORY_BYTES
            raise ContainerError(f"the archive announces a directory of {size} bytes, more than the limit of {limit}")
        data = super().read(size)
        # Counted before anything is made of them, for the number in the end record is only a claim.
        if data.count(b"PK\x01\x02") > MOST_MEMBERS:
            raise ContainerError(f"the archive has more members than the limit of {MOST_MEMBERS}")
        return data

    def __del__(self) -> None:
        self.close()  # an archive that left the cache, and all of whose streams are closed


def _archive(path: str) -> zipfile.ZipFile:
    status = filesystem.stat(path)
    # Processes must not share a file, for each would move the other's position; threads may, zipfile has a lock.
    return _parsed(path, status.st_ino, status.st_size, status.st_mtime_ns, os.getpid())


@lru_cache(CACHED_ARCHIVES)
def _parsed(path: str, *_: int) -> zipfile.ZipFile:
    """Open an archive, once for all of its members. It is closed when neither the cache nor a stream refers to it."""
    file = _ArchiveFile(filesystem.opened(path))
    try:
        with _one_line():
            return zipfile.ZipFile(file)
    except BaseException:
        file.close()
        raise


def _is_file(info: zipfile.ZipInfo) -> bool:
    """Whether a member is a regular file, or a pipe, as `zip` calls what it was given through one; links are not."""
    unix = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0
    folder = info.filename.endswith(("/", "\\")) or info.external_attr & 0x10
    return not folder and unix in (0, stat.S_IFREG, stat.S_IFIFO)


def _refusal(info: zipfile.ZipInfo) -> str:
    """Return why a member cannot be opened, as far as the directory shows."""
    if not info.filename:
        return "has no name"
    if info.flag_bits & (0x0001 | 0x0040 | 0x2000):
        return "encrypted"
    # Others are expanded by zipfile without bound, and nobody packs DICOM so.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed with an unusual method, number {info.compress_type}"
    if info.file_size > LARGEST_MEMBER_BYTES:
        return f"announces {info.file_size} bytes, more than the limit of {LARGEST_MEMBER_BYTES}"
    if info.file_size > RATIO_FREE_BYTES and info.file_size > LARGEST_RATIO * info.compress_size:
        return f"announces {info.file_size} bytes, more than {LARGEST_RATIO} times its size in the archive"
    return ""


class _Stream(io.RawIOBase):
    """A file of zipfile or gzip within limits, whose failures last, and with small steps back that cost nothing."""

    _file: IO[bytes] | gzip.GzipFile = io.BytesIO()  # until there is one

    def __init__(
        self,
        opened: Callable[[], IO[bytes] | gzip.GzipFile],
        name: str,
        size: int | None,
        limit: int,
        packed: io.RawIOBase | None = None,  # is closed with this one
    ):
        super().__init__()
        self._packed = packed
        self.name = name  # pydicom asks a buffered reader for one; where it looks, nothing may be
        self._opened, self._size, self._limit = opened, size, limit
        self._at, self._failure = 0, ""
        self._restart()

    def _restart(self) -> None:
        self._file.close()  # and no seek, after which newer versions of zipfile no longer look at the checksum
        with _one_line():
            self._file = self._opened()
        self._unpacked, self._last = 0, b""  # how much there was so far, and the last two chunks of it

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self._at < self._unpacked - len(self._last):
            self._restart()
        while self._at >= self._unpacked and self._advance():
            pass
        view = memoryview(buffer).cast("B")
        start = len(self._last) - max(0, self._unpacked - self._at)
        data = self._last[start : start + len(view)]
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # Nothing moves until something is read: those who look for the size, and come back, unpack nothing.
        if self.closed:
            raise ValueError("seek of closed file")
        while whence == os.SEEK_END and self._size is None:  # gzip: to know it, one has to go there
            self._advance()
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at}.get(whence, self._size or 0)
        if at < 0:
            raise ValueError("negative position")
        self._at = at
        return at

    def close(self) -> None:
        self._file.close()
        if self._packed is not None:
            self._packed.close()
        super().close()

    def _advance(self) -> bool:
        """Unpack the next chunk; return whether there was one."""
        if self._failure:  # zipfile complains only once, and what follows looks like the end
            raise ContainerError(self._failure)
        try:
            with _one_line():
                chunk = self._file.read(CHUNK_BYTES)
                if isinstance(self._file, gzip.GzipFile):
                    self._file.peek(1)  # at the end it looks at the checksum: before the last bytes are handed out
            self._unpacked += len(chunk)
            if self._unpacked > self._limit:
                raise ContainerError(f"unpacks to more than {self._limit} bytes, the limit for its size")
            if not chunk and self._size not in (None, self._unpacked):
                raise ContainerError(f"unpacks to {self._unpacked} bytes, but announces {self._size}")
        except ContainerError as exc:
            self._failure = str(exc)
            raise
        if not chunk:
            self._size = self._unpacked
        self._last = (self._last + chunk)[-2 * CHUNK_BYTES :]
        return bool(chunk)
