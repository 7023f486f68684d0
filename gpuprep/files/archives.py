"""Lists the files inside gzip'd files and zip archives, and reads them as streams without unpacking to disk."""

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
"""Member name of the content of a gzip'd file. Members of zip archives without a name cannot be opened."""

LARGEST_MEMBER_BYTES = 4 << 30
LARGEST_RATIO, RATIO_FREE_BYTES = 50, 64 << 20
"""Upper limit of unpacked size / packed size for members larger than `RATIO_FREE_BYTES`, against zip bombs."""
MOST_MEMBERS = 1_000_000
LARGEST_DIRECTORY_BYTES = 256 << 20

CHUNK_BYTES = 32 << 10
"""Bytes unpacked at a time. The first chunk usually contains the header; larger chunks are hardly faster."""

CACHED_ARCHIVES = 4
"""Number of open archives kept for further members."""


class ContainerError(OSError):
    """An archive or a member cannot be read; the text is one line."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an archive.

    Attributes
    ----------
    name : str
        Name as in the archive, which is untrusted: see `safe_parts`.
    bytes : int
        Declared unpacked size; for a gzip'd file, which declares none, its packed size.
    error : str
        Reason why it cannot be opened, or "".
    """

    name: str
    bytes: int
    error: str = ""


def kind(head: bytes) -> Literal["zip", "gzip"] | None:
    """Return the container format of a file, detected from its first four bytes."""
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    return "gzip" if head[:2] == b"\x1f\x8b" else None


def safe_parts(name: str) -> list[str]:
    """Return the path components of a member's name, made safe: joined below a folder, they stay inside it.

    Parameters
    ----------
    name : str
        Name as in the archive; may be absolute, or have drive letters, backslashes or ``..``.

    Returns
    -------
    list of str
        Names of folders and the file; empty if no part of the name remains.
    """
    name = re.sub(r"^(?:[A-Za-z]:|[\\/])+", "", name).replace("\0", "%00")
    return ["%2E%2E" if p == ".." else p for p in re.split(r"[\\/]", name) if p not in ("", ".")]


def members(path: str) -> Iterator[Member]:
    """Yield the regular files in an archive, in its order; nested archives are not entered.

    Parameters
    ----------
    path : str
        A zip archive, or a gzip'd file, which has one member, `GZIP_MEMBER`.

    Yields
    ------
    Member
        Members that cannot be opened are included, with the reason.

    Raises
    ------
    ContainerError
        If the archive is damaged or exceeds the limits of this module.
    """
    if _is_gzip(path):
        yield Member(GZIP_MEMBER, filesystem.stat(path).st_size)
        return
    archive = _archive(path)
    for info in archive.infolist():
        if _is_file(info):
            # An updated archive may hold a name twice. Unpacking programs keep the later member.
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
        A seekable stream. It unpacks only as far as it is read, in constant memory; seeking back by more than 32 KiB
        unpacks again from the start. The last bytes are returned only after the checksum was verified.

    Raises
    ------
    ContainerError
        If the member is absent or unreadable; from the methods of the file, if it is damaged, shorter than declared,
        or exceeds the limits of this module.
    """
    if member == GZIP_MEMBER:
        packed = filesystem.opened(path)
        if kind(packed.read(4) or b"") != "gzip":
            packed.close()
            raise ContainerError("not a gzip'd file")
        limit = min(LARGEST_MEMBER_BYTES, max(RATIO_FREE_BYTES, LARGEST_RATIO * packed.seek(0, os.SEEK_END)))
        return io.BufferedReader(_Stream(lambda: _open_gzip(packed), f"{path}/", None, limit, packed), CHUNK_BYTES)
    archive = _archive(path)
    info = archive.NameToInfo.get(member)
    if info is None or not _is_file(info):
        raise ContainerError("the archive has no such member")
    if error := _refusal(info):
        raise ContainerError(error)
    stream = _Stream(lambda: archive.open(info), f"{path}/{member}", info.file_size, info.file_size)
    return io.BufferedReader(stream, CHUNK_BYTES)


@contextmanager
def _damage_as_container_error() -> Iterator[None]:
    """Turn errors of zipfile, gzip and zlib on damaged files into a `ContainerError`; pass on errors of the disk."""
    try:
        yield
    except EOFError as exc:  # has no text
        raise ContainerError("cut short: the data end too early") from exc
    except (OSError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, ValueError, OverflowError) as exc:
        if isinstance(exc, ContainerError):
            raise
        # BadGzipFile has no errno. EINVAL results from seeking to impossible positions in damaged archives.
        if isinstance(exc, OSError) and exc.errno not in (None, errno.EINVAL):
            raise
        raise ContainerError(f"cannot be read: {' '.join(str(exc).split())}") from exc


def _is_gzip(path: str) -> bool:
    with filesystem.opened(path, head=True) as file:
        return kind(file.read(4) or b"") == "gzip"


def _open_gzip(packed: io.RawIOBase) -> gzip.GzipFile:
    packed.seek(0)
    return gzip.GzipFile(fileobj=packed)


class _ArchiveFile(io.BufferedReader):
    """File for zipfile, which reads the directory with one call; this call limits its size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST_DIRECTORY_BYTES:
            limit = LARGEST_DIRECTORY_BYTES
            raise ContainerError(f"the archive announces a directory of {size} bytes, more than the limit of {limit}")
        data = super().read(size)
        # The entries are counted before zipfile parses them, since the count in the end record may be wrong.
        if data.count(b"PK\x01\x02") > MOST_MEMBERS:
            raise ContainerError(f"the archive has more members than the limit of {MOST_MEMBERS}")
        return data

    def __del__(self) -> None:
        self.close()  # when the archive has left the cache and all its streams are closed


def _archive(path: str) -> zipfile.ZipFile:
    status = filesystem.stat(path)
    # The process ID is part of the key, since forked processes share file positions. Threads may share: zipfile locks.
    return _open_cached(path, status.st_ino, status.st_size, status.st_mtime_ns, os.getpid())


@lru_cache(CACHED_ARCHIVES)
def _open_cached(path: str, *_: int) -> zipfile.ZipFile:
    """Open an archive once for all its members. It is closed when neither the cache nor a stream refers to it."""
    file = _ArchiveFile(filesystem.opened(path))
    try:
        with _damage_as_container_error():
            return zipfile.ZipFile(file)
    except BaseException:
        file.close()
        raise


def _is_file(info: zipfile.ZipInfo) -> bool:
    """Return whether a member is a regular file, or a pipe, the type that `zip` gives to its standard input."""
    unix = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0
    folder = info.filename.endswith(("/", "\\")) or info.external_attr & 0x10
    return not folder and unix in (0, stat.S_IFREG, stat.S_IFIFO)


def _refusal(info: zipfile.ZipInfo) -> str:
    """Return the reason why a member cannot be opened, according to the directory; "" if there is none."""
    if not info.filename:
        return "has no name"
    if info.flag_bits & (0x0001 | 0x0040 | 0x2000):
        return "encrypted"
    # zipfile does not limit the output of other methods, and they are not used for DICOM.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed with an unusual method, number {info.compress_type}"
    if info.file_size > LARGEST_MEMBER_BYTES:
        return f"announces {info.file_size} bytes, more than the limit of {LARGEST_MEMBER_BYTES}"
    if info.file_size > RATIO_FREE_BYTES and info.file_size > LARGEST_RATIO * info.compress_size:
        return f"announces {info.file_size} bytes, more than {LARGEST_RATIO} times its size in the archive"
    return ""


class _Stream(io.RawIOBase):
    """Seekable stream of an unpacked member with a size limit.

    The last two chunks are kept, so short seeks backwards need no unpacking. After an error, every read fails.
    """

    _file: IO[bytes] | gzip.GzipFile = io.BytesIO()  # placeholder until `_restart`

    def __init__(
        self,
        open_file: Callable[[], IO[bytes] | gzip.GzipFile],
        name: str,
        size: int | None,
        limit: int,
        packed: io.RawIOBase | None = None,  # is closed with this stream
    ):
        super().__init__()
        self._packed = packed
        self.name = name  # pydicom reads the name of buffered readers; no file of this name exists
        self._open_file, self._size, self._limit = open_file, size, limit
        self._position, self._failure = 0, ""
        self._restart()

    def _restart(self) -> None:
        self._file.close()  # instead of a seek, after which newer versions of zipfile no longer verify the checksum
        with _damage_as_container_error():
            self._file = self._open_file()
        self._unpacked, self._tail = 0, b""  # number of bytes unpacked, and the last two chunks of them

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self._position < self._unpacked - len(self._tail):
            self._restart()
        while self._position >= self._unpacked and self._advance():
            pass
        view = memoryview(buffer).cast("B")
        start = len(self._tail) - max(0, self._unpacked - self._position)
        data = self._tail[start : start + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # Unpacking waits for the next read, so seeking to the end for the size and back unpacks nothing.
        if self.closed:
            raise ValueError("seek of closed file")
        while whence == os.SEEK_END and self._size is None:  # the size of gzip'd data is known only at their end
            self._advance()
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence, self._size or 0)
        if position < 0:
            raise ValueError("negative position")
        self._position = position
        return position

    def close(self) -> None:
        self._file.close()
        if self._packed is not None:
            self._packed.close()
        super().close()

    def _advance(self) -> bool:
        """Unpack the next chunk; return whether there was one."""
        if self._failure:  # zipfile raises only once; later reads would look like the end of the file
            raise ContainerError(self._failure)
        try:
            with _damage_as_container_error():
                chunk = self._file.read(CHUNK_BYTES)
                if isinstance(self._file, gzip.GzipFile):
                    self._file.peek(1)  # verifies the checksum at the end, before the last bytes are returned
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
        self._tail = (self._tail + chunk)[-2 * CHUNK_BYTES :]
        return bool(chunk)
