"""Tests of reading gzip'd files and zip archives: sound ones, damaged ones and zip bombs."""

from __future__ import annotations

import errno
import gc
import gzip
import io
import os
import struct
import threading
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuprep.files import archives
from gpuprep.files.archives import GZIP_MEMBER, ContainerError, Member, kind, members, open_member, safe_parts
from gpuprep.testing import write_series

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
NOISE = np.random.default_rng(0).bytes(300_000)
MIXED = NOISE + bytes(300_000) + NOISE[:1000]
MB = 1 << 20


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    archives._open_cached.cache_clear()


def archive(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", method) as z:
        for name, content in files.items():
            z.writestr(name, content)
    return str(path)


def patched(path: str, *changes: tuple[int, bytes]) -> str:
    """Overwrite bytes of a file; negative positions count from the end."""
    data = bytearray(Path(path).read_bytes())
    for at, new in changes:
        at %= len(data)
        data[at : at + len(new)] = new
    Path(path).write_bytes(data)
    return path


def central(path: str) -> int:
    """Return the position of the central directory."""
    return Path(path).read_bytes().index(b"PK\x01\x02")


def content(path: str, name: str) -> bytes:
    with open_member(path, name) as f:
        return f.read()


def drain(f: BinaryIO, piece: int) -> None:
    while f.read(piece):
        pass


def peak_bytes(action: Callable[[], object]) -> int:
    """Return the peak of memory that an action allocates."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that grows by one for each chunk that is unpacked."""
    seen: list[bool] = []
    real = archives._Stream._advance

    def counting(stream: Any) -> bool:
        seen.append(real(stream))
        return seen[-1]

    monkeypatch.setattr(archives._Stream, "_advance", counting)
    return seen


def parses() -> int:
    return archives._open_cached.cache_info().misses


# Sound files


def test_the_container_format_is_detected_from_the_first_bytes(tmp_path: Path) -> None:
    assert kind(Path(archive(tmp_path / "a", {"x": b"1"})).read_bytes()[:4]) == "zip"
    assert kind(Path(archive(tmp_path / "b", {})).read_bytes()[:4]) == "zip"
    assert kind(gzip.compress(b"")[:4]) == "gzip"
    for other in (b"", b"P", b"PK", b"PK\x01\x02", bytes(132) + b"DICM", b"\x1f"):
        assert kind(other) is None


@pytest.mark.parametrize("method", METHODS)
def test_members_of_every_method_read_back(tmp_path: Path, method: int) -> None:
    files = {"b/mixed.dcm": MIXED, "a": b"", "b/ü Ω.txt": b"short", "noise": NOISE}
    path = archive(tmp_path / "a.zip", files, method)
    assert list(members(path)) == [Member(name, len(data)) for name, data in files.items()]
    assert {name: content(path, name) for name in files} == files
    assert list(members(archive(tmp_path / "b.zip", {}, method))) == []


def test_folders_and_links_are_not_listed_as_members(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.mkdir("folder")
        z.writestr("folder/file", b"1")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        z.writestr(link, b"/etc/passwd")
        z.writestr(zipfile.ZipInfo("dos"), b"2")
        piped = zipfile.ZipInfo("-")  # the entry that `zip` makes for its standard input
        piped.external_attr = 0o010600 << 16
        z.writestr(piped, b"3")
    assert [m.name for m in members(str(path))] == ["folder/file", "dos", "-"]
    with pytest.raises(ContainerError, match="no such member"):
        open_member(str(path), "link")


def test_the_later_of_two_members_with_one_name_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"twice": b"1"})
    with zipfile.ZipFile(path, "a") as z, pytest.warns(UserWarning, match="Duplicate"):
        z.writestr("twice", b"2")
    assert [m.error for m in members(path)] == ["a later member has the same name", ""]
    assert content(path, "twice") == b"2"


def test_an_archive_after_a_script_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"#!/bin/sh\nexit\n" + Path(archive(path, {"x": MIXED})).read_bytes())
    assert content(str(path), "x") == MIXED


def test_zip64_archives_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    files = {f"{n}.dcm": NOISE[n : n + 1000 * n] for n in range(6)}
    path = archive(tmp_path / "a.zip", files)
    data = Path(path).read_bytes()
    assert b"PK\x06\x06" in data
    assert data.count(b"\xff\xff\xff\xff") >= 3  # the 64-bit fields have to be read
    assert [(m.name, m.bytes, m.error) for m in members(path)] == [(k, len(v), "") for k, v in files.items()]
    assert {name: content(path, name) for name in files} == files


def test_an_archive_with_a_comment_and_data_descriptors_is_read(tmp_path: Path) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise OSError

        def tell(self) -> int:
            raise OSError

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("x", MIXED)
        z.writestr("y", NOISE)
        z.comment = b"remarks" * 1000
    path = tmp_path / "a.zip"
    path.write_bytes(pipe.getvalue())
    assert content(str(path), "x") == MIXED
    assert content(str(path), "y") == NOISE


@pytest.mark.parametrize("parts", [(MIXED,), (MIXED, NOISE, b"", b"tail"), (b"",)])
def test_a_gzip_file_of_one_or_several_parts_is_one_member(tmp_path: Path, parts: tuple[bytes, ...]) -> None:
    path = tmp_path / "a.dcm.gz"
    path.write_bytes(b"".join(gzip.compress(p) for p in parts) + bytes(70_000))  # zeros at the end, as on a tape
    assert list(members(str(path))) == [Member(GZIP_MEMBER, path.stat().st_size)]
    assert content(str(path), GZIP_MEMBER) == b"".join(parts)


# Seeking

steps = st.lists(
    st.tuples(st.sampled_from(["read", "set", "cur", "end"]), st.integers(-700_000, 700_000)), min_size=1, max_size=12
)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("three")
    (folder / "a.gz").write_bytes(gzip.compress(MIXED, 1))
    return [
        (archive(folder / "d.zip", {"x": MIXED}), "x"),
        (archive(folder / "s.zip", {"x": MIXED}, zipfile.ZIP_STORED), "x"),
        (str(folder / "a.gz"), GZIP_MEMBER),
    ]


@given(steps)
def test_members_seek_like_a_file_of_the_same_content(
    three: list[tuple[str, str]], steps: list[tuple[str, int]]
) -> None:
    for path, name in three:
        expected = io.BytesIO(MIXED)
        with open_member(path, name) as f:
            for step, n in steps:
                if step == "read":
                    assert f.read(abs(n)) == expected.read(abs(n))
                else:
                    whence = {"set": 0, "cur": 1, "end": 2}[step]
                    base = {"set": 0, "cur": expected.tell(), "end": len(MIXED)}[step]
                    if base + n >= 0:
                        assert f.seek(n, whence) == expected.seek(n, whence)
                assert f.tell() == expected.tell()


def test_invalid_seeks_and_closed_files_raise(three: list[tuple[str, str]]) -> None:
    for path, name in three:
        f = open_member(path, name)
        with pytest.raises(ValueError, match="negative"):
            f.seek(-1)
        assert f.readable()
        assert not f.writable()
        f.close()
        f.close()
        for use in (f.read, f.tell, lambda f=f: f.seek(0)):
            with pytest.raises(ValueError, match="closed"):
                use()


@pytest.mark.parametrize("method", [*METHODS, None])
def test_members_are_unpacked_only_as_far_as_they_are_read(
    tmp_path: Path, chunks: list[bool], method: int | None
) -> None:
    data = np.random.default_rng(1).bytes(4 * MB)
    if method is None:
        path, name = str(tmp_path / "a.gz"), GZIP_MEMBER
        Path(path).write_bytes(gzip.compress(data, 1))
    else:
        path, name = archive(tmp_path / "a.zip", {"x": data}, method), "x"
    with open_member(path, name) as f:
        assert f.read(132) == data[:132]
        f.seek(0)
        f.seek(5000, os.SEEK_CUR)
        f.seek(-12, os.SEEK_CUR)
        assert f.read(100) == data[4988:5088]
        if method is not None:
            assert f.seek(0, os.SEEK_END) == 4 * MB
            f.seek(0)
        assert f.read(1)
    assert len(chunks) <= 2
    chunks.clear()
    with open_member(path, name) as f:
        while len(piece := f.read(1000)) == 1000:
            f.seek(-20, os.SEEK_CUR)
        assert piece == data[-len(piece) :]
    assert len(chunks) < 4 * MB // archives.CHUNK_BYTES + 10  # short seeks backwards unpack nothing again


def test_memory_does_not_grow_with_the_member(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"x": bytes(20 * MB)})

    def read() -> None:
        with open_member(path, "x") as f:
            drain(f, 10_000)

    assert peak_bytes(read) < 2 * MB


def test_pydicom_reads_members(tmp_path: Path) -> None:
    write_series(tmp_path / "series", np.arange(2048, dtype=np.int16).reshape(2, 32, 32), (1.0, 1.0, 1.0))
    files = {f.name: f.read_bytes() for f in sorted((tmp_path / "series").iterdir())}
    path = archive(tmp_path / "a.zip", files)
    for member in members(path):
        with open_member(path, member.name) as f:
            ds = pydicom.dcmread(f, stop_before_pixels=True)
            assert ds.Rows == 32
            f.seek(0)
            whole = pydicom.dcmread(f)
        assert whole.PixelData == pydicom.dcmread(tmp_path / "series" / member.name).PixelData


# Damaged files


def refused(path: str, name: str, match: str) -> None:
    """Assert that reading at once and in pieces raises, and that a second attempt raises again."""
    with pytest.raises(ContainerError, match=match) as info:
        content(path, name)
    assert "\n" not in str(info.value)
    assert isinstance(info.value, OSError)
    try:
        f = open_member(path, name)
    except ContainerError:
        return
    with f:
        for _ in range(2):
            with pytest.raises(ContainerError, match=match):
                drain(f, 777)


def test_damaged_gzip_files_are_refused(tmp_path: Path) -> None:
    data = gzip.compress(MIXED)
    path = tmp_path / "a.gz"
    for length in (5, 12, 1000, len(data) // 2, len(data) - 9, len(data) - 8, len(data) - 1):
        path.write_bytes(data[:length])
        refused(str(path), GZIP_MEMBER, "cut short")
    for garbage in (b"x", b"\x1f", b"\x1f\x8b", b"\0\0garbage" * 10_000):
        path.write_bytes(data + garbage)
        refused(str(path), GZIP_MEMBER, "Not a gzipped file|cut short")
    for at in (20, len(data) // 2, len(data) - 8, len(data) - 2):
        path.write_bytes(data)
        patched(str(path), (at, bytes([data[at] ^ 0x55])))
        refused(str(path), GZIP_MEMBER, "cannot be read|cut short")


def test_the_last_bytes_of_damaged_files_are_not_returned(tmp_path: Path) -> None:
    """A reader that requests exactly the declared size does not reach the end, but must still get an error."""
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(MIXED)[:-1])
    wrong = archive(tmp_path / "a.zip", {"x": MIXED})
    patched(wrong, (central(wrong) + 16, b"\1\2\3\4"))
    for p, name in ((str(path), GZIP_MEMBER), (wrong, "x")):
        with open_member(p, name) as f, pytest.raises(ContainerError):
            f.read(len(MIXED))
        with open_member(p, name) as f, pytest.raises(ContainerError):
            f.readinto(bytearray(len(MIXED)))  # type: ignore[attr-defined]


def test_files_that_are_neither_gzip_nor_zip_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data in (b"", b"PK", b"PK\x03\x04", b"PK\x05\x06", NOISE):
        path.write_bytes(data)
        with pytest.raises(ContainerError, match="not a zip file"):
            list(members(str(path)))
        with pytest.raises(ContainerError, match="not a zip file"):
            open_member(str(path), "x")
        with pytest.raises(ContainerError, match="not a gzip'd file"):
            open_member(str(path), GZIP_MEMBER)
    for name in ("x", GZIP_MEMBER):
        with pytest.raises(FileNotFoundError):
            open_member(str(tmp_path / "absent"), name)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [(8, flag, "encrypted") for flag in (0x1, 0x41, 0x2000)]
    + [(10, n, f"compressed with an unusual method, number {n}") for n in (1, 6, 9, 12, 14, 93, 99)]
    + [(28, 0, "has no name")],
)
def test_members_that_cannot_be_opened_are_listed_with_the_reason(
    tmp_path: Path, field: int, value: int, error: str
) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED, "y": NOISE})
    patched(path, (central(path) + field, struct.pack("<H", value)))
    if field == 28:  # the bytes of the name become an extra field
        patched(path, (central(path) + 30, b"\1"), (26, b"\0\0\1"))
    assert [m.error for m in members(path)] == [error, ""]
    if field == 28:
        refused(path, "", "not a gzip")
    else:
        refused(path, "x", error)
    assert content(path, "y") == NOISE


@pytest.mark.parametrize("method", METHODS)
def test_damaged_members_are_refused(tmp_path: Path, method: int) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED, "y": NOISE}, method)
    data = Path(path).read_bytes()
    at = central(path)
    changes = [(at + 16, b"\1\2\3\4")]  # the checksum
    changes += [(at + 24, struct.pack("<L", len(MIXED) + lie)) for lie in (-5000, -1, 1, 5000, 100 * MB)]
    changes += [(at + 20, struct.pack("<L", 1000)), (at + 42, b"\1"), (at + 42, b"\xf0\xff\xff\xff"), (30, b"z")]
    changes += [(n, bytes([data[n] ^ 0x55])) for n in range(40, 300_000, 37_011)]
    for change in changes:
        Path(path).write_bytes(data)
        patched(path, change)
        refused(path, "x", "cannot be read|cut short|announces")
        assert content(path, "y") == NOISE


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED, "y": NOISE})
    data = Path(path).read_bytes()
    at = central(path)
    for cut in (100, len(data) // 2, at + 10, len(data) - 22, len(data) - 1):
        Path(path).write_bytes(data[:cut])
        refused(path, "x", "not a zip file")
    for missing in (1, 50, 1000):  # from the middle
        Path(path).write_bytes(data[:5000] + data[5000 + missing :])
        refused(path, "x", "cannot be read")
    version_99, utf8 = (at + 6, b"\x63\0"), (at + 8, b"\0\x08")
    for changes in ([(at, b"XX")], [(-10, b"\xff\xff\xff\x0f")], [version_99], [utf8, (at + 46, b"\xff")]):
        Path(path).write_bytes(data)
        patched(path, *changes)
        with pytest.raises(ContainerError):
            list(members(path))
        refused(path, "y", "cannot be read")


def test_disk_errors_keep_their_errno(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED})

    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with open_member(path, "x") as f:
        monkeypatch.setattr(archives._ArchiveFile, "read", broken)
        with pytest.raises(OSError, match="Input") as info:
            f.read()
    assert info.value.errno == errno.EIO


# Zip bombs


def zeros(megabytes: int) -> bytes:
    """Return deflated zeros, made of one repeated block."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(MB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * megabytes + packer.flush()


def zip_of(path: Path, packed: bytes, size: int) -> str:
    """Make an archive of one deflated member whose directory announces `size` bytes."""
    archive(path, {"x": b"1"}, zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    record = bytearray(data[at:end])
    struct.pack_into("<2L", record, 20, len(packed), size)
    tail = bytearray(data[end:])
    struct.pack_into("<L", tail, 16, 31 + len(packed))
    path.write_bytes(data[:31] + packed + record + tail)
    return str(path)


def test_zip_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "RATIO_FREE_BYTES", 10 * MB)
    bomb = zeros(50)
    assert len(bomb) < 100_000
    honest = zip_of(tmp_path / "honest.zip", bomb, 50 * MB)
    error = f"announces {50 * MB} bytes, more than 50 times its size in the archive"
    assert [m.error for m in members(honest)] == [error]
    lying = zip_of(tmp_path / "lying.zip", bomb, 1000)
    packed = tmp_path / "a.gz"
    packed.write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + bomb + bytes(8))

    def try_all() -> None:
        for path, name, match in ((honest, "x", error), (lying, "x", "CRC"), (str(packed), GZIP_MEMBER, "more than")):
            with pytest.raises(ContainerError, match=match), open_member(path, name) as f:
                drain(f, MB)

    assert peak_bytes(try_all) < 4 * MB
    with open_member(str(packed), GZIP_MEMBER) as f, pytest.raises(ContainerError, match="more than"):
        f.seek(0, os.SEEK_END)


def test_members_above_the_size_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.zip", {"x": NOISE})
    packed = tmp_path / "a.gz"
    packed.write_bytes(gzip.compress(NOISE))
    monkeypatch.setattr(archives, "LARGEST_MEMBER_BYTES", len(NOISE))
    assert content(path, "x") == content(str(packed), GZIP_MEMBER) == NOISE
    monkeypatch.setattr(archives, "LARGEST_MEMBER_BYTES", len(NOISE) - 1)
    refused(path, "x", "announces 300000 bytes, more than the limit of 299999")
    refused(str(packed), GZIP_MEMBER, "more than 299999")


@pytest.mark.parametrize("wide", [False, True])
def test_huge_directories_are_refused_without_loading(tmp_path: Path, wide: bool) -> None:
    """The end record of a sparse file of two gigabytes declares nearly all of it as the directory."""
    path, size = tmp_path / "a.zip", 2 << 30
    if wide:
        end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size - 1000, 1000)
        end += struct.pack("<4sLQL", b"PK\6\7", 0, size, 1)
        end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF, 0)
    else:
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size - 1000, 1000, 0)
    with path.open("wb") as f:
        f.write(b"PK\3\4")
        f.seek(size)
        f.write(end)

    def list_members() -> None:
        with pytest.raises(ContainerError, match="a directory of"):
            list(members(str(path)))

    assert peak_bytes(list_members) < 2 * MB


def test_archives_with_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.zip", {f"{n}": b"" for n in range(20)})
    monkeypatch.setattr(archives, "MOST_MEMBERS", 19)
    for claim in (20, 1):
        patched(path, (-14, struct.pack("<2H", claim, claim)))
        with pytest.raises(ContainerError, match="more members than the limit of 19"):
            list(members(path))


# Names


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.dcm", ["a", "b.dcm"]),
        ("/etc/passwd", ["etc", "passwd"]),
        ("../../x", ["%2E%2E", "%2E%2E", "x"]),
        ("a/./b//c/", ["a", "b", "c"]),
        ("a\\..\\b", ["a", "%2E%2E", "b"]),
        ("C:\\scans\\1.dcm", ["scans", "1.dcm"]),
        ("c:..", ["%2E%2E"]),
        ("/C:/x", ["x"]),
        ("\\\\server\\share\\x", ["server", "share", "x"]),
        ("...", ["..."]),
        ("a\0b", ["a%00b"]),
        ("", []),
        (".", []),
    ],
)
def test_safe_parts_of_names(name: str, parts: list[str]) -> None:
    assert safe_parts(name) == parts


@given(st.one_of(st.text(), st.text("./\\:C\0a")))
def test_safe_parts_stay_below_the_folder(name: str) -> None:
    path = os.path.join("/base", *safe_parts(name))
    assert os.path.normpath(path) == path
    assert path == "/base" or path.startswith("/base/")
    assert "\0" not in path


# The cache


def test_a_directory_is_read_once(tmp_path: Path) -> None:
    files = {f"{n}": bytes([n]) * n for n in range(100)}
    path = archive(tmp_path / "a.zip", files)
    list(members(path))
    assert {name: content(path, name) for name in files} == files
    assert parses() == 1


def test_a_changed_archive_is_read_again(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"x": b"old"}, zipfile.ZIP_STORED)
    assert content(path, "x") == b"old"
    status = os.stat(path)
    archive(tmp_path / "a.zip", {"x": b"new"}, zipfile.ZIP_STORED)  # same size as before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert content(path, "x") == b"new"
    assert parses() == 2


def test_streams_outlive_the_cache_and_leave_no_file_open(tmp_path: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    paths = [archive(tmp_path / f"{n}", {"x": MIXED}) for n in range(6)]
    with open_member(paths[0], "x") as held:
        for path in paths:
            with pytest.raises(ContainerError, match="no such member"):
                open_member(path, "absent")
            content(path, "x")
        assert held.read(10) == MIXED[:10]
        archives._open_cached.cache_clear()
        assert held.read() == MIXED[10:]
    Path(paths[0]).write_bytes(b"PK")
    with pytest.raises(ContainerError):
        open_member(paths[0], "x")
    del held
    gc.collect()  # pytest holds exceptions in reference cycles
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_read_one_archive_at_the_same_time(tmp_path: Path) -> None:
    files = {f"{n}": NOISE[n : n + 100_000] for n in range(16)}
    path = archive(tmp_path / "a.zip", files)
    others = [archive(tmp_path / f"{n}.zip", {"x": bytes([n])}) for n in range(8)]
    ready = threading.Barrier(8)

    def work(k: int) -> bool:
        ready.wait()
        sound = True
        for name in list(files)[k % 4 :: 4]:
            with open_member(path, name) as f:
                sound &= f.read(3000) + f.read() == files[name]
            sound &= content(others[k], "x") == bytes([k])
        return sound

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [True] * 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads
def test_parent_and_child_read_the_same_archive_after_a_fork(tmp_path: Path) -> None:
    files = {f"{n}": NOISE[n : n + 50_000] for n in range(50)}
    path = archive(tmp_path / "a.zip", files)
    list(members(path))
    child = os.fork()
    sound = False
    try:
        sound = all(content(path, name) == data for name, data in files.items())
    finally:
        if not child:
            os._exit(0 if sound else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert sound
