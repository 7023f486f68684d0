"""Files inside gzip'd files and zip archives: against zipfile and gzip, and against archives made to do harm."""

from __future__ import annotations

import gzip
import io
import os
import struct
import threading
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuprep import containers
from gpuprep.containers import GZIP_MEMBER, ContainerError, Member, kind, members, open_member, safe_parts
from gpuprep.phantom import write_series

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
NOISE = np.random.default_rng(0).bytes(300_000)
MIXED = NOISE + bytes(300_000) + NOISE[:1000]
MB = 1 << 20


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    containers._parsed.cache_clear()


def archive(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", method) as z:
        for name, content in files.items():
            z.writestr(name, content)
    return str(path)


def patched(path: str, *changes: tuple[int, bytes]) -> str:
    """Overwrite bytes; negative positions count from the end."""
    data = bytearray(Path(path).read_bytes())
    for at, new in changes:
        at %= len(data)
        data[at : at + len(new)] = new
    Path(path).write_bytes(data)
    return path


def central(path: str, n: int = 0) -> int:
    """Position of the nth record in the directory."""
    data = Path(path).read_bytes()
    at = data.index(b"PK\x01\x02")
    for _ in range(n):
        at = data.index(b"PK\x01\x02", at + 4)
    return at


def content(path: str, name: str) -> bytes:
    with open_member(path, name) as f:
        return f.read()


def drain(f: BinaryIO, piece: int) -> None:
    while f.read(piece):
        pass


def watched(act: Callable[[], object]) -> int:
    """Return the most memory that something took at any time."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the length of whatever is read from files that containers opens."""
    lengths: list[int] = []

    class Counting(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            n = super().readinto(buffer)
            lengths.append(n or 0)
            return n or 0

    monkeypatch.setattr(containers, "open", lambda path, _: io.BufferedReader(Counting(path)), raising=False)
    return lengths


# What is sound


def test_kind_goes_by_the_first_bytes(tmp_path: Path) -> None:
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
    for name, data in files.items():
        assert content(path, name) == data


def test_folders_and_links_are_no_members(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.mkdir("folder")
        z.writestr("folder/file", b"1")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        z.writestr(link, b"/etc/passwd")
        z.writestr(zipfile.ZipInfo("dos"), b"2")
        piped = zipfile.ZipInfo("-")  # what `zip` makes of its standard input
        piped.external_attr = 0o010600 << 16
        z.writestr(piped, b"3")
    assert [m.name for m in members(str(path))] == ["folder/file", "dos", "-"]
    with pytest.raises(ContainerError, match="no such member"):
        open_member(str(path), "link")


def test_an_empty_archive_has_no_members(tmp_path: Path) -> None:
    assert list(members(archive(tmp_path / "a.zip", {}))) == []


def test_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    files = {f"{n}.dcm": NOISE[n : n + 1000 * n] for n in range(6)}
    path = archive(tmp_path / "a.zip", files)
    data = Path(path).read_bytes()
    assert b"PK\x06\x06" in data
    assert data.count(b"\xff\xff\xff\xff") >= 3  # so that the wide numbers are what is read
    assert [(m.name, m.bytes, m.error) for m in members(path)] == [(k, len(v), "") for k, v in files.items()]
    assert {name: content(path, name) for name in files} == files


def test_zip64_of_unknown_size_and_behind_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with path.open("wb") as f:
        f.write(b"#!/bin/sh\nexit\n")
        with zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED) as z, z.open("x", "w", force_zip64=True) as member:
            member.write(MIXED)
    start = Path(tmp_path / "b.zip")
    start.write_bytes(b"prefix" + path.read_bytes() + b"")  # offsets are now off by the prefix
    for p in (path, start):
        assert content(str(p), "x") == MIXED


def test_an_archive_with_a_comment_and_data_descriptors(tmp_path: Path) -> None:
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


def test_lzma_without_end_marker(tmp_path: Path) -> None:
    """7-Zip writes none. Here it is cut off: the marker is what remains after the content."""
    path = archive(tmp_path / "a.zip", {"x": MIXED, "y": b""}, zipfile.ZIP_LZMA)
    at = central(path)
    packed = struct.unpack_from("<L", Path(path).read_bytes(), at + 20)[0]
    patched(path, (at + 20, struct.pack("<L", packed - 5)))
    assert content(path, "x") == MIXED


@pytest.mark.parametrize("parts", [(MIXED,), (MIXED, NOISE, b"", b"tail"), (b"",)])
def test_gzip_is_one_member_of_one_or_several_parts(tmp_path: Path, parts: tuple[bytes, ...]) -> None:
    path = tmp_path / "a.dcm.gz"
    path.write_bytes(b"".join(gzip.compress(p) for p in parts) + bytes(70_000))  # filled up as on a tape
    assert list(members(str(path))) == [Member(GZIP_MEMBER, path.stat().st_size)]
    assert content(str(path), GZIP_MEMBER) == b"".join(parts)


def test_gzip_parts_at_every_position_of_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(b"".join(gzip.compress(bytes([n]) * n) for n in range(20)))
    for size in range(1, 70):
        monkeypatch.setattr(containers, "CHUNK_BYTES", size)
        assert content(str(path), GZIP_MEMBER) == b"".join(bytes([n]) * n for n in range(20))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 7, 100])
def test_chunks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: int, size: int) -> None:
    data = NOISE[:500] + bytes(5000) + NOISE[:10]
    path = archive(tmp_path / "a.zip", {"x": data}, method)
    monkeypatch.setattr(containers, "CHUNK_BYTES", max(size, 16) if method == zipfile.ZIP_LZMA else size)
    assert content(path, "x") == data


# Reading here and there

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
def test_seeks_as_a_file_of_the_same_content(three: list[tuple[str, str]], steps: list[tuple[str, int]]) -> None:
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


def test_odd_seeks_and_closed_files_raise(three: list[tuple[str, str]]) -> None:
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


@pytest.mark.parametrize("method", METHODS[:2])
def test_a_header_is_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: int) -> None:
    data = np.random.default_rng(1).bytes(4 * MB)
    path = archive(tmp_path / "a.zip", {"x": data}, method)
    packed = tmp_path / "a.gz"
    packed.write_bytes(gzip.compress(data, 1))
    lengths = bytes_read(monkeypatch)
    for p, name in ((path, "x"), (str(packed), GZIP_MEMBER)):
        lengths.clear()
        with open_member(p, name) as f:
            assert f.read(132) == data[:132]
            f.seek(0)
            f.seek(5000, os.SEEK_CUR)
            f.seek(-12, os.SEEK_CUR)
            assert f.read(100) == data[4988:5088]
        assert sum(lengths) < 300_000


def test_small_steps_back_deep_inside_do_not_begin_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gz"
    data = np.random.default_rng(1).bytes(4 * MB)
    path.write_bytes(gzip.compress(data, 1))
    lengths = bytes_read(monkeypatch)
    with open_member(str(path), GZIP_MEMBER) as f:
        while len(piece := f.read(1000)) == 1000:
            f.seek(-20, os.SEEK_CUR)
        assert piece == data[-len(piece) :]
    assert sum(lengths) < 5 * MB


def test_looking_for_the_size_unpacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.zip", {"x": np.random.default_rng(1).bytes(4 * MB)})
    lengths = bytes_read(monkeypatch)
    with open_member(path, "x") as f:
        assert f.seek(0, os.SEEK_END) == 4 * MB
        f.seek(0)
        assert f.read(1)
    assert sum(lengths) < 300_000


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_member(tmp_path: Path, method: int) -> None:
    """Four kilobytes of bzip2 or LZMA may be eighty megabytes. They need some for themselves, whatever the member."""
    path = archive(tmp_path / "a.zip", {"x": bytes(40 * MB)}, method)

    def read() -> None:
        with open_member(path, "x") as f:
            drain(f, 10_000)

    assert watched(read) < (10 if method in METHODS[2:] else 2) * MB


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


# What is not sound


def refused(path: str, name: str, match: str) -> None:
    """Both whole and piecewise, the stream must raise, and go on raising."""
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


def test_gzip_cut_short(tmp_path: Path) -> None:
    data = gzip.compress(MIXED)
    path = tmp_path / "a.gz"
    for cut in (5, 12, 1000, len(data) // 2, len(data) - 9, len(data) - 8, len(data) - 1):
        path.write_bytes(data[:cut])
        refused(str(path), GZIP_MEMBER, "cut short")


def test_the_last_bytes_come_only_from_sound_files(tmp_path: Path) -> None:
    """Whoever asks for exactly the bytes there are never sees the end, and must hear of damage all the same."""
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(MIXED)[:-1])
    wrong = archive(tmp_path / "a.zip", {"x": MIXED})
    patched(wrong, (central(wrong) + 16, b"\1\2\3\4"))
    for p, name in ((str(path), GZIP_MEMBER), (wrong, "x")):
        with open_member(p, name) as f, pytest.raises(ContainerError):
            f.read(len(MIXED))
        with open_member(p, name) as f, pytest.raises(ContainerError):
            f.readinto(bytearray(len(MIXED)))  # type: ignore[attr-defined]


@pytest.mark.parametrize("garbage", [b"x", b"\x1f", b"\x1f\x8b", b"\0\0garbage" * 10_000])
def test_gzip_with_something_else_behind(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(MIXED) + garbage)
    refused(str(path), GZIP_MEMBER, "unpacked|cut short")


def test_gzip_with_flipped_bits(tmp_path: Path) -> None:
    data = gzip.compress(MIXED)
    for at in (20, len(data) // 2, len(data) - 8, len(data) - 2):
        path = tmp_path / "a.gz"
        path.write_bytes(data)
        patched(str(path), (at, bytes([data[at] ^ 0x55])))
        refused(str(path), GZIP_MEMBER, "unpacked|cut short")


def test_neither_gzip_nor_zip(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data in (b"", b"PK", b"PK\x03\x04", b"PK\x05\x06", NOISE):
        path.write_bytes(data)
        with pytest.raises(ContainerError, match="no zip archive"):
            list(members(str(path)))
        with pytest.raises(ContainerError, match="no zip archive"):
            open_member(str(path), "x")
        with pytest.raises(ContainerError, match="not a gzip'd file"):
            open_member(str(path), GZIP_MEMBER)
    with pytest.raises(FileNotFoundError):
        open_member(str(tmp_path / "absent"), "x")


def test_encrypted_members(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED, "y": NOISE})
    for flag in (b"\1\0", b"\x41\0", b"\0\x20"):
        patched(path, (central(path) + 8, flag), (6, flag))
        assert [m.error for m in members(path)] == ["encrypted", ""]
        refused(path, "x", "encrypted")
        assert content(path, "y") == NOISE


@pytest.mark.parametrize("method", [1, 6, 9, 93, 99])
def test_unknown_methods(tmp_path: Path, method: int) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED, "y": NOISE})
    patched(path, (central(path) + 10, struct.pack("<H", method)))
    assert [m.error for m in members(path)] == [f"compressed with an unknown method, number {method}", ""]
    refused(path, "x", "unknown method")


@pytest.mark.parametrize("method", METHODS)
def test_wrong_checksum_and_flipped_bits(tmp_path: Path, method: int) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED, "y": NOISE}, method)
    data = Path(path).read_bytes()
    patched(path, (central(path) + 16, b"\1\2\3\4"))
    refused(path, "x", "checksum")
    assert content(path, "y") == NOISE
    for at in range(40, 300_000, 37_011):
        Path(path).write_bytes(data)
        patched(path, (at, bytes([data[at] ^ 0x55])))
        refused(path, "x", "checksum|unpack|cut short|window")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lie", [-1, -5000, 1, 5000, 100 * MB])
def test_announced_size_is_a_lie(tmp_path: Path, method: int, lie: int) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED}, method)
    # The checksum is the one of what is announced, where that is the front of the content.
    announced = len(MIXED) + lie
    crc = zlib.crc32(MIXED[:announced])
    patched(path, (central(path) + 16, struct.pack("<L", crc)), (central(path) + 24, struct.pack("<L", announced)))
    refused(path, "x", "announces|Corrupt")  # LZMA may miss the content that should not be there


def test_archives_cut_short(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED, "y": NOISE})
    data = Path(path).read_bytes()
    for cut in (100, len(data) // 2, central(path) + 10, len(data) - 22, len(data) - 1):
        Path(path).write_bytes(data[:cut])
        refused(path, "x", "end record")
    for missing in (1, 50, 1000):  # from the middle
        Path(path).write_bytes(data[:5000] + data[5000 + missing :])
        with pytest.raises(ContainerError, match="lost a part"):
            list(members(path))


def test_damaged_directories(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED, "y": NOISE})
    data = Path(path).read_bytes()
    for at, new in (
        (central(path), b"XX"),
        (central(path, 1), b"XX"),
        (central(path) + 28, b"\xff\xff"),
        (central(path, 1) + 28, b"\xff\xff"),
        (-10, b"\xff\xff\xff\x0f"),
        (-18, b"\1\0"),
    ):
        Path(path).write_bytes(data)
        patched(path, (at, new))
        with pytest.raises(ContainerError):
            list(members(path))
        with pytest.raises(ContainerError):
            open_member(path, "y")


def test_members_elsewhere_than_announced(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED, "y": NOISE})
    data = Path(path).read_bytes()
    patched(path, (central(path) + 42, struct.pack("<L", 1)))
    refused(path, "x", "is not where")
    Path(path).write_bytes(data)
    patched(path, (30, b"z"))
    refused(path, "x", "another name")
    Path(path).write_bytes(data)
    patched(path, (central(path) + 20, struct.pack("<L", 0x7FFF_FFFF)))
    refused(path, "x", "overlaps")
    assert content(path, "y") == NOISE


def test_one_bad_name_does_not_sink_the_archive(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"ü": b"1", "y": NOISE, "twice": b"1"})
    with zipfile.ZipFile(path, "a") as z, pytest.warns(UserWarning, match="Duplicate"):
        z.writestr("twice", b"2")
    patched(path, (central(path) + 46, b"\xff\xff"), (30, b"\xff\xff"))
    listed = list(members(path))
    assert [m.error for m in listed] == ["", "", "a later member has the same name", ""]
    assert [m.name for m in listed[1:]] == ["y", "twice", "twice"]
    assert content(path, listed[0].name) == b"1"
    assert content(path, "twice") == b"2"


def test_nameless_members(tmp_path: Path) -> None:
    """The empty name is that of a gzip'd file's content."""
    path = archive(tmp_path / "a.zip", {"x": b"1", "y": b"2"})
    short = struct.pack("<2H", 0, 1)  # what was the name is an extra field
    patched(path, (26, short), (central(path) + 28, short))
    assert [(m.name, m.error) for m in members(path)] == [("", "has no name"), ("y", "")]
    with pytest.raises(ContainerError, match="not a gzip"):
        open_member(path, "")


def test_overlapping_members(tmp_path: Path) -> None:
    """The second member lies inside the first, which is stored."""
    inner = archive(tmp_path / "inner.zip", {"y": bytes(MB)})
    path = archive(tmp_path / "a.zip", {"x": Path(inner).read_bytes(), "y": b"1"}, zipfile.ZIP_STORED)
    record = central(inner)
    fields = Path(inner).read_bytes()[record + 10 : record + 28]
    second = Path(path).read_bytes().rindex(b"PK\x01\x02")
    patched(path, (second + 10, fields), (second + 42, struct.pack("<L", 31)))
    assert [m.error for m in members(path)] == ["overlaps another member", ""]
    refused(path, "x", "overlaps")
    assert content(path, "y") == bytes(MB)  # one of the two is enough


# Bombs


def zeros(megabytes: int) -> bytes:
    """Deflated: one block over and over."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(MB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * megabytes + packer.flush()


def zip_of(path: Path, packed: bytes, size: int) -> str:
    """An archive around data that announce `size` bytes."""
    archive(path, {"x": b"1"}, zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    record = bytearray(data[at:end])
    struct.pack_into("<2L", record, 20, len(packed), size)
    tail = bytearray(data[end:])
    struct.pack_into("<L", tail, 16, 31 + len(packed))
    path.write_bytes(data[:31] + packed + record + tail)
    return str(path)


def test_ten_megabytes_of_zeros_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes(10 * MB)))
    assert content(str(path), GZIP_MEMBER) == bytes(10 * MB)
    assert content(archive(tmp_path / "a.zip", {"x": bytes(10 * MB)}), "x") == bytes(10 * MB)


def test_bombs_are_refused(tmp_path: Path) -> None:
    gib = zeros(1024)
    assert len(gib) < 2 * MB
    honest = zip_of(tmp_path / "honest.zip", gib, 1 << 30)
    error = f"announces {1 << 30} bytes, more than 200 times its size in the archive"
    assert [m.error for m in members(honest)] == [error]
    lying = zip_of(tmp_path / "lying.zip", gib, 1000)
    packed = tmp_path / "a.gz"
    packed.write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + gib + bytes(8))

    def fall_for(path: str, name: str) -> None:
        with open_member(path, name) as f:
            drain(f, MB)

    def try_all() -> None:
        for path, name in ((honest, "x"), (lying, "x"), (str(packed), GZIP_MEMBER)):
            with pytest.raises(ContainerError, match="more than"):
                fall_for(path, name)

    assert watched(try_all) < 4 * MB


def test_largest_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.zip", {"x": NOISE})
    packed = tmp_path / "a.gz"
    packed.write_bytes(gzip.compress(NOISE))
    monkeypatch.setattr(containers, "LARGEST_MEMBER_BYTES", len(NOISE))
    assert content(path, "x") == content(str(packed), GZIP_MEMBER) == NOISE
    containers._parsed.cache_clear()
    monkeypatch.setattr(containers, "LARGEST_MEMBER_BYTES", len(NOISE) - 1)
    refused(path, "x", "announces 300000 bytes, more than the limit of 299999")
    refused(str(packed), GZIP_MEMBER, "more than 299999")


def test_the_window_of_lzma_is_no_larger_than_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED}, zipfile.ZIP_LZMA)
    patched(path, (31 + 5, b"\xff\xff\xff\xff"))
    assert content(path, "x") == MIXED
    monkeypatch.setattr(containers, "LARGEST_WINDOW_BYTES", 100_000)
    refused(path, "x", "window")


@pytest.mark.parametrize("wide", [False, True])
def test_huge_directories_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: bool) -> None:
    """A sparse file of two gigabytes whose end record calls nearly all of it its directory."""
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
    lengths = bytes_read(monkeypatch)

    def look() -> None:
        with pytest.raises(ContainerError, match="a directory of"):
            list(members(str(path)))

    assert watched(look) < 2 * MB
    assert sum(lengths) < 300_000


def test_most_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.zip", {f"{n}": b"" for n in range(20)})
    monkeypatch.setattr(containers, "MOST_MEMBERS", 19)
    with pytest.raises(ContainerError, match="announces 20 members, more than the limit of 19"):
        list(members(path))
    patched(path, (-14, b"\1\0\1\0"))  # it says that there is one
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
def test_safe_parts(name: str, parts: list[str]) -> None:
    assert safe_parts(name) == parts


@given(st.one_of(st.text(), st.text("./\\:C\0a")))
def test_safe_parts_stay_below(name: str) -> None:
    path = os.path.join("/base", *safe_parts(name))
    assert os.path.normpath(path) == path
    assert path == "/base" or path.startswith("/base/")
    assert "\0" not in path


# The cache


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    real = containers._read_directory

    def counting(file: BinaryIO, size: int) -> Any:
        seen.append(os.path.basename(file.name))
        return real(file, size)

    monkeypatch.setattr(containers, "_read_directory", counting)
    return seen


def test_a_directory_is_read_once(tmp_path: Path, parses: list[str]) -> None:
    files = {f"{n}": bytes([n]) * n for n in range(100)}
    path = archive(tmp_path / "a.zip", files)
    list(members(path))
    assert {name: content(path, name) for name in files} == files
    assert parses == ["a.zip"]


def test_a_changed_archive_is_read_again(tmp_path: Path, parses: list[str]) -> None:
    path = archive(tmp_path / "a.zip", {"x": b"old"}, zipfile.ZIP_STORED)
    assert content(path, "x") == b"old"
    status = os.stat(path)
    archive(tmp_path / "a.zip", {"x": b"new"}, zipfile.ZIP_STORED)  # of the same size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert content(path, "x") == b"new"
    assert parses == ["a.zip"] * 2


def test_the_cache_keeps_the_last_few(tmp_path: Path, parses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [archive(tmp_path / f"{n}", {"x": MIXED, "y": b""}) for n in range(6)]
    held = open_member(paths[0], "x")
    for n in (0, 1, 2, 3, 0, 4, 0, 1):  # when 4 comes, 1 is the one unused for longest
        open_member(paths[n], "x").close()
    assert parses == ["0", "1", "2", "3", "4", "1"]
    with held:
        assert held.read() == MIXED
    monkeypatch.setattr(containers, "MOST_MEMBERS", 3)
    open_member(paths[5], "x").close()
    assert len(containers._cache) == 1


def test_threads_read_one_archive_at_once(tmp_path: Path, parses: list[str]) -> None:
    files = {f"{n}": NOISE[n : n + 100_000] for n in range(16)}
    path = archive(tmp_path / "a.zip", files)
    others = [archive(tmp_path / f"{n}.zip", {"x": bytes([n])}) for n in range(8)]
    results: dict[str, bool] = {}
    ready = threading.Barrier(8)

    def work(k: int) -> None:
        ready.wait()
        for name in list(files)[k % 4 :: 4]:
            with open_member(path, name) as f:
                pieces = []
                while piece := f.read(3000):
                    pieces.append(piece)
            content(others[k], "x")
            results[f"{k} {name}"] = b"".join(pieces) == files[name]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 32
    assert all(results.values())
    assert set(parses) == {"a.zip", *(os.path.basename(p) for p in others)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads
def test_a_fork_while_another_thread_reads_a_directory(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED})
    assert content(path, "x") == MIXED
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with containers._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = os.fork()
    if not child:
        os._exit(0 if content(path, "x") == MIXED else 1)
    try:
        assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        thread.join()


def test_parent_and_child_read_the_same_archive_after_a_fork(tmp_path: Path) -> None:
    files = {f"{n}": NOISE[n : n + 50_000] for n in range(50)}
    path = archive(tmp_path / "a.zip", files)
    list(members(path))
    child = os.fork()
    sound = all(content(path, name) == data for name, data in files.items())
    if not child:
        os._exit(0 if sound else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert sound


def test_refusals_leave_no_file_open(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"x": MIXED})
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(ContainerError):
            open_member(path, "absent")
        with pytest.raises(ContainerError):
            open_member(path, GZIP_MEMBER)
        content(path, "x")
    assert len(os.listdir("/proc/self/fd")) == before
