"""Outputs in object stores equal those on disk, appear complete or not at all, and one run writes at a time."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_filesystem import SMALL, SPACING_MM, put
from typer.testing import CliRunner

import gpuprep
from gpuprep import Recipe
from gpuprep.cli.app import app
from gpuprep.core.shard import Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.executors.processes import InProcessExecutor
from gpuprep.files import filesystem
from gpuprep.output import bucket_lock, object_store
from gpuprep.output.manifest import Manifest
from gpuprep.output.object_store import Bucket, open_bucket
from gpuprep.output.records import SeriesResult
from gpuprep.output.verify import AllManifests, status, verify
from gpuprep.pipeline.events import Listener
from gpuprep.pipeline.scan import scan
from gpuprep.testing import write_series

OUT = "memory://out/x"


@pytest.fixture
def dicom(tmp_path: Path, noise: Callable[..., NDArray[np.int16]]) -> Path:
    """Two series of a few small slices."""
    stored = noise((5, 14, 18)) - 1500
    for n in (1, 2):
        write_series(tmp_path / "dicom" / f"p{n}", stored + n, SPACING_MM, series_uid=f"1.2.{n}")
    return tmp_path / "dicom"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs to which this process uploads files."""
    urls: list[str] = []
    upload = filesystem.upload

    def counted(file: str | Path, url: str) -> None:
        urls.append(url)
        upload(file, url)

    monkeypatch.setattr(filesystem, "upload", counted)
    return urls


def volumes(urls: list[str]) -> list[str]:
    """Return the URLs that are not those of manifests."""
    return [url for url in urls if "manifest" not in url]


def files(out: Path) -> dict[str, bytes]:
    """Return every file under OUT with its content, except manifests and the work folder, which differ between runs."""
    found = (f for f in sorted(out.rglob("*")) if f.is_file() and ".gpuprep" not in f.parts)
    return {str(f.relative_to(out)): f.read_bytes() for f in found if not f.name.startswith("manifest.")}


def objects(fs: Any, url: str) -> dict[str, bytes]:
    """Return every object below a URL with its content, without manifests."""
    top = fs._strip_protocol(url)
    names = [name for name in fs.find(top) if not name[len(top) + 1 :].startswith("manifest.")]
    return {name[len(top) + 1 :]: fs.cat_file(name) for name in names}


def no_scratch(folder: Path) -> bool:
    return not [f for f in folder.iterdir() if f.name.startswith("gpuprep-")]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder for temporary files, which must be empty afterwards."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert no_scratch(folder)


@pytest.mark.usefixtures("scratch")
def test_objects_equal_the_files_of_a_run_on_disk(tmp_path: Path, dicom: Path, memory: Any, sent: list[str]) -> None:
    here = gpuprep.convert(dicom, tmp_path / "here", SMALL)
    there = gpuprep.convert(dicom, OUT + "/", SMALL)
    assert objects(memory, OUT) == files(tmp_path / "here")
    assert [(r.key, r.folder, r.files, r.bytes, r.sha256) for r in there.results] == [
        (r.key, r.folder, r.files, r.bytes, r.sha256) for r in here.results
    ]
    assert {"manifest.csv", "manifest.sqlite"} <= {name.rpartition("/")[2] for name in memory.find("/out/x")}
    assert [url for url in volumes(sent) if "/p1/" in url][-1] == f"{OUT}/dicom/p1/volume.json"

    sent.clear()
    assert gpuprep.convert(dicom, OUT, SMALL).counts == {"skipped": 2}
    assert volumes(sent) == []
    assert scan(dicom, SMALL, out=OUT).forecast.skipped == 2

    other = Recipe(spacing_mm=None, size=None, dtype="int16", window_hu=None, format="tif-stack")
    assert gpuprep.convert(dicom, OUT, other).counts == {"ok": 2}
    gpuprep.convert(dicom, tmp_path / "other", other)
    assert objects(memory, OUT) == files(tmp_path / "other")


def test_a_file_url_is_treated_as_a_path(tmp_path: Path, dicom: Path) -> None:
    gpuprep.convert(dicom, f"file://{tmp_path}/out", SMALL)
    assert (tmp_path / "out" / "dicom" / "p1" / "volume.json").is_file()
    with pytest.raises(RequestError, match="lies in the output folder"):
        gpuprep.convert(dicom, f"file://{tmp_path}", SMALL)


def test_an_input_inside_the_output_is_refused(dicom: Path, memory: Any) -> None:
    put(dicom, f"{OUT}/dicom")
    with pytest.raises(RequestError, match=f"the input {OUT}/dicom lies in the output folder {OUT}"):
        gpuprep.convert(f"{OUT}/dicom", OUT, SMALL)
    # An output inside an input is accepted, and is not searched.
    run = gpuprep.convert("memory://out", "memory://out/x/made", SMALL)
    assert run.counts == {"ok": 2}
    assert gpuprep.convert("memory://out", "memory://out/x/made", SMALL).counts == {"skipped": 2}
    assert memory.isfile("/out/x/made/recipe.toml")


class BrokenError(Exception):
    """An exception that a library may raise."""


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("replacing", [False, True])
def test_an_interrupted_upload_is_unfinished_and_the_next_run_completes_it(
    tmp_path: Path, dicom: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, replacing: bool
) -> None:
    if replacing:
        gpuprep.convert(dicom, OUT, Recipe(size=(12, 12)))
    put_file = type(memory).put_file

    def failing(self: Any, lpath: str, rpath: str, **kwargs: Any) -> None:
        if rpath.endswith("/p1/0003.tif"):
            raise BrokenError("the line is down")
        put_file(self, lpath, rpath, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", failing)
        run = gpuprep.convert(dicom, OUT, SMALL)
    assert run.counts == {"ok": 1, "failed": 1}
    (failed,) = [r for r in run.results if r.status == "failed"]
    assert failed.reason.startswith("OutputError: cannot write the series: [Errno 5] the line is down")
    assert failed.folder == ""
    there = objects(memory, OUT)
    assert "dicom/p2/volume.json" in there
    assert "dicom/p1/volume.json" not in there
    assert "dicom/p1/volume.json.part" in there
    assert [(f.kind, f.path) for f in verify(OUT, InProcessExecutor(), lambda: None)] == [("unfinished", "dicom/p1")]

    assert gpuprep.convert(dicom, OUT, SMALL).counts == {"ok": 1, "skipped": 1}
    gpuprep.convert(dicom, tmp_path / "here", SMALL)
    assert objects(memory, OUT) == files(tmp_path / "here")
    assert list(verify(OUT, InProcessExecutor(), lambda: None)) == []


@pytest.mark.usefixtures("memory")
def test_volumes_without_a_row_are_recognised(dicom: Path, memory: Any, sent: list[str]) -> None:
    gpuprep.convert(dicom, OUT, SMALL)
    first = objects(memory, OUT)
    for name in [n for n in memory.find("/out/x") if "manifest." in n]:  # as after a kill
        memory.rm_file(name)
    sent.clear()
    run = gpuprep.convert(dicom, OUT, SMALL)
    assert (run.counts, volumes(sent)) == ({"ok": 2}, [])
    assert objects(memory, OUT) == first
    assert gpuprep.convert(dicom, OUT, SMALL).counts == {"skipped": 2}
    # An output that differs from its volume.json is converted again.
    memory.pipe_file("/out/x/dicom/p2/0001.tif", b"short")
    assert gpuprep.convert(dicom, OUT, SMALL).counts == {"skipped": 1, "ok": 1}
    assert objects(memory, OUT) == first


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("notes.txt", b"mine", "memory://out/x/dicom/p1 is in the way and is not an output of gpuprep"),
        ("0000.tif", b"mine", "memory://out/x/dicom/p1 is in the way and is not an output of gpuprep"),
        ("volume.json", b'{"key": "9.9"}', "memory://out/x/dicom/p1 holds another series, 9.9"),
        ("volume.json.part", b'{"key": "9.9"}', "memory://out/x/dicom/p1 holds another series, 9.9"),
        ("below/volume.json", b'{"key": "9.9"}', "is in the way"),
    ],
)
def test_foreign_objects_are_neither_replaced_nor_removed(
    dicom: Path, memory: Any, name: str, content: bytes, text: str
) -> None:
    memory.pipe_file(f"/out/x/dicom/p1/{name}", content)
    run = gpuprep.convert(dicom, OUT, SMALL)
    (failed,) = [r for r in run.results if r.status == "failed"]
    assert text in failed.reason
    assert {n: c for n, c in objects(memory, OUT).items() if "p1" in n} == {f"dicom/p1/{name}": content}


def test_an_output_with_a_foreign_object_is_not_replaced(dicom: Path, memory: Any) -> None:
    gpuprep.convert(dicom, OUT, SMALL)
    memory.pipe_file("/out/x/dicom/p1/notes.txt", b"mine")
    before = objects(memory, OUT)
    run = gpuprep.convert(dicom, OUT, Recipe(size=(12, 12)))
    (failed,) = [r for r in run.results if r.status == "failed"]
    assert "also holds notes.txt, which gpuprep did not write" in failed.reason
    assert failed.warnings[-1] == "the output of an earlier run is still in dicom/p1"
    assert {n: c for n, c in objects(memory, OUT).items() if "p1" in n} == {
        n: c for n, c in before.items() if "p1" in n
    }
    assert ("stray", "dicom/p1/notes.txt") in [(f.kind, f.path) for f in verify(OUT, InProcessExecutor(), lambda: None)]


def test_status_verify_and_manifest_work_on_a_store(dicom: Path, memory: Any, tmp_path: Path) -> None:
    gpuprep.convert(dicom, OUT, SMALL)
    found = status(OUT)
    assert (found.counts, [p.state for p in found.progress]) == ({"ok": 2}, ["finished"])
    memory.pipe_file("/out/x/dicom/p1/0001.tif", memory.cat_file("/out/x/dicom/p1/0001.tif")[:-1] + b"!")
    memory.rm_file("/out/x/dicom/p2/0002.tif")
    memory.pipe_file("/out/x/dicom/p2/0009.tif", b"more")
    memory.pipe_file("/out/x/notes.txt", b"mine")
    for name in ("volume.json", "0000.tif", "labels/0000.tif"):
        memory.pipe_file(f"/out/x/lost/{name}", b"{}")
    findings = list(verify(OUT, InProcessExecutor(), lambda: None))
    assert sorted((f.kind, f.path) for f in findings) == [
        ("stray", "notes.txt"),
        ("torn", "dicom/p1/0001.tif"),
        ("torn", "dicom/p2/0002.tif"),
        ("torn", "dicom/p2/0009.tif"),
        ("unrecorded", "lost"),
    ]
    result = CliRunner().invoke(app, ["manifest", OUT, "--csv", "--to", str(tmp_path / "all.csv")])
    assert (result.exit_code, len((tmp_path / "all.csv").read_text().splitlines())) == (0, 3)
    memory.rm("/out/x/dicom/p1", recursive=True)
    assert ("missing", "dicom/p1") in [(f.kind, f.path) for f in verify(OUT, InProcessExecutor(), lambda: None)]
    with pytest.raises(RequestError, match="memory://nothing/here has no manifest"):
        AllManifests("memory://nothing/here")


@pytest.mark.usefixtures("memory")
def test_series_with_equal_paths_get_sibling_folders(tmp_path: Path, dicom: Path, memory: Any) -> None:
    gpuprep.convert(dicom, OUT, SMALL)
    write_series(tmp_path / "other" / "dicom" / "p1", np.zeros((5, 14, 18), np.int16), SPACING_MM, series_uid="1.2.3")
    assert gpuprep.convert(tmp_path / "other" / "dicom", OUT, SMALL).counts == {"ok": 1}
    assert not list(verify(OUT, InProcessExecutor(), lambda: None))
    folders = sorted(name.rpartition("/")[0] for name in memory.find("/out/x") if name.endswith("/volume.json"))
    # The digest by sha256sum.
    assert folders == [f"/out/x/dicom/{name}" for name in ("p1", "p1-series-1-c47f5b", "p2")]


def test_shards_have_separate_manifests_until_they_are_merged(dicom: Path, memory: Any) -> None:
    for number in (1, 2):
        gpuprep.convert(dicom, OUT, SMALL, shard=Shard(number, 2))
    names = {n.rpartition("/")[2] for n in memory.find("/out/x", maxdepth=1)}
    assert {"manifest.1-of-2.sqlite", "manifest.2-of-2.sqlite", "manifest.1-of-2.csv"} <= names
    assert "manifest.sqlite" not in names
    assert status(OUT).counts == {"ok": 2}
    with pytest.raises(RequestError, match="a shard of another division"):
        gpuprep.convert(dicom, OUT, SMALL, shard=Shard(1, 3))
    result = CliRunner().invoke(app, ["merge", OUT])
    assert result.exit_code == 0
    assert "2 shards merged into memory://out/x/manifest.sqlite" in " ".join(result.output.split())
    names = {n.rpartition("/")[2] for n in memory.find("/out/x", maxdepth=1)}
    assert {n for n in names if n.startswith("manifest.")} == {"manifest.sqlite", "manifest.csv"}
    assert gpuprep.convert(dicom, OUT, SMALL).counts == {"skipped": 2}


def test_a_second_run_is_refused_unless_it_is_another_shard(memory: Any) -> None:
    one, other = Shard(1, 2), Shard(2, 2)
    with open_bucket(OUT) as bucket:
        assert object_store.is_open(OUT)
        for shard in (Shard(1, 1), one):
            with pytest.raises(RequestError, match=r"another gpuprep is writing into .* process \d+ on .* remove memo"):
                open_bucket(OUT, shard).__enter__()
        assert isinstance(bucket, Bucket)
    assert not object_store.is_open(OUT)
    with open_bucket(OUT, one), open_bucket(OUT, other):
        for shard in (Shard(1, 1), one):
            with pytest.raises(RequestError, match="another gpuprep is writing"):
                open_bucket(OUT, shard).__enter__()
        assert (object_store.is_open(OUT), object_store.is_open(OUT, one)) == (False, True)
    assert memory.find("/out/x") == []


@pytest.mark.parametrize("silent", [False, True])
def test_locks_work_in_a_store_without_conditional_writes(
    memory: Any, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    pipe_file = type(memory).pipe_file

    def unconditional(self: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create" and not silent:
            raise NotImplementedError("a header you provided implies functionality that is not implemented")
        pipe_file(self, path, value)

    monkeypatch.setattr(type(memory), "pipe_file", unconditional)
    with open_bucket(OUT), pytest.raises(RequestError, match="another gpuprep is writing"):
        open_bucket(OUT).__enter__()
    # Two runs have both seen no lock: the one that wrote last holds it.
    note = filesystem.read_bytes

    def beaten(url: str) -> bytes:
        content = json.loads(note(url))
        return json.dumps(content | {"token": "other"}).encode()

    monkeypatch.setattr(filesystem, "read_bytes", beaten)
    with pytest.raises(RequestError, match="another gpuprep is writing"):
        open_bucket(OUT).__enter__()


def test_a_lock_of_a_dead_process_is_taken_over(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()

    def left(home: str) -> None:
        note = {"host": "h", "pid": process.pid, "home": home, "since": "s", "token": "t"}
        note["renewed"] = datetime.now(UTC).isoformat()
        memory.pipe_file("/out/x/.gpuprep/lock", json.dumps(note).encode())

    monkeypatch.setattr(bucket_lock, "process_namespace", lambda: "here")
    left("there")
    with pytest.raises(RequestError, match=f"process {process.pid} on h, since s"):
        open_bucket(OUT).__enter__()
    left("here")
    with open_bucket(OUT):
        assert object_store.is_open(OUT)


def test_an_abandoned_lock_is_taken_over(memory: Any) -> None:
    def left(seconds_ago: float) -> None:
        renewed = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat()
        note = {"host": "h", "pid": 7, "since": "s", "token": "t", "renewed": renewed}
        memory.pipe_file("/out/x/.gpuprep/lock", json.dumps(note).encode())

    left(bucket_lock.LEASE_S - 60)
    with pytest.raises(RequestError, match="process 7 on h, since s"):
        open_bucket(OUT).__enter__()
    left(bucket_lock.LEASE_S + 60)
    with open_bucket(OUT, Shard(1, 2)):
        pass
    with open_bucket(OUT):
        pass
    memory.pipe_file("/out/x/.gpuprep/lock", b"no lock")
    with open_bucket(OUT):
        pass
    with pytest.raises(OutputError, match="was taken over by another run"), open_bucket(OUT):
        left(0)
    assert json.loads(memory.cat_file("/out/x/.gpuprep/lock"))["token"] == "t"  # noqa: S105


def row(key: str) -> SeriesResult:
    return SeriesResult(key=key, series_uid=key, study_uid="", series_number=1, source="/", status="ok")


def test_the_manifest_is_uploaded_at_intervals(memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(object_store, "UPLOAD_INTERVAL_S", 0.02)

    def rows() -> int:
        if not memory.exists("/out/x/manifest.sqlite"):
            return 0
        (tmp_path / "m.sqlite").write_bytes(memory.cat_file("/out/x/manifest.sqlite"))
        # The file system in memory shows objects before they are complete.
        with closing(sqlite3.connect(tmp_path / "m.sqlite")) as db, suppress(sqlite3.DatabaseError):
            return int(db.execute("SELECT count(*) FROM series").fetchone()[0])
        return 0

    with open_bucket(OUT) as bucket, closing(Manifest(bucket.root / "manifest.sqlite")) as manifest:
        for count in (1, 2):
            manifest.put(row(f"1.{count}"))
            for _ in range(500):
                if rows() == count:
                    break
                time.sleep(0.02)
            assert rows() == count
        manifest.put(row("1.3"))
    assert rows() == 3


@pytest.mark.usefixtures("scratch")
def test_an_interrupted_run_uploads_its_manifest(dicom: Path, memory: Any) -> None:
    class Interrupting(Listener):
        def finished(self, _: SeriesResult) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpuprep.convert(dicom, OUT, SMALL, listener=Interrupting())
    assert status(OUT).counts == {"ok": 1}
    assert memory.isfile("/out/x/manifest.csv")
    assert gpuprep.convert(dicom, OUT, SMALL).counts == {"skipped": 1, "ok": 1}


def test_a_network_failure_raises_a_one_line_error(
    dicom: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    class Cutting(Listener):
        def planned(self, _: Any) -> None:
            def failing(*_: Any, **__: Any) -> None:
                raise BrokenError("no route to host")

            for name in ("put_file", "pipe_file", "find", "cat_file"):
                monkeypatch.setattr(type(memory), name, failing)

    heard: list[str] = []

    class Hearing(Cutting):
        def finished(self, result: SeriesResult) -> None:
            heard.append(result.reason)

    with pytest.raises(OutputError, match=r"^cannot write into memory://out/x: \[Errno 5\] no route to host"):
        gpuprep.convert(dicom, OUT, SMALL, listener=Hearing())
    assert len(heard) == 2
    assert "OutputError: cannot write the series: [Errno 5] no route to host" in heard[0]
    assert no_scratch(scratch)


def test_a_round_trip_on_s3(tmp_path: Path, dicom: Path, s3: Any) -> None:
    put(dicom, "s3://bucket/dicom")
    here, out = tmp_path / "here", "s3://bucket/trip/x"

    def command(*words: str) -> int:
        result = CliRunner().invoke(app, [*words])
        assert result.exit_code < 2, result.stderr
        return result.exit_code

    def convert(where: str | Path, recipe: Recipe = SMALL) -> dict[str, int]:
        return gpuprep.convert("s3://bucket/dicom", where, recipe).counts

    def written(kind: str) -> dict[str, str]:
        return {n: i["ETag"] + str(i["LastModified"]) for n, i in s3.find(out, detail=True).items() if kind in n}

    flags = ["--spacing", "none", "--size", "none", "--window", "none", "--dtype", "int16"]
    how = ["--backend", "cpu", "--index", "none", "-q"]
    assert command("convert", "s3://bucket/dicom", "--out", out, "--jobs", "2", *how, *flags) == 0
    convert(here)
    assert objects(s3, out) == files(here)

    before = written("/dicom/")
    assert convert(out) == {"skipped": 2}
    for name in written("manifest."):
        s3.rm_file(name)
    assert convert(out) == {"ok": 2}
    assert convert(out) == {"skipped": 2}
    assert written("/dicom/") == before

    stacks = replace(SMALL, format="tif-stack")
    assert convert(out, stacks) == convert(here, stacks) == {"ok": 2}
    assert objects(s3, out) == files(here)

    s3.pipe_file(f"{out}/dicom/p1/volume.tif", b"damaged")
    assert command("verify", out, "--mark", "--jobs", "1") == 1
    assert command("retry", out, "--jobs", "1", *how) == 0
    assert objects(s3, out) == files(here)
    assert status(out).counts == {"ok": 2}


def test_locks_and_denied_writes_are_reported_on_s3(dicom: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_bucket("s3://bucket/locked"):
        with pytest.raises(RequestError, match="another gpuprep is writing into s3://bucket/locked"):
            open_bucket("s3://bucket/locked").__enter__()
        # The store itself refuses a second lock, even if the first one is not read before.
        with pytest.raises(OSError, match="condition"):
            filesystem.write_bytes("s3://bucket/locked/.gpuprep/lock", b"", new=True)
    with open_bucket("s3://bucket/locked"):
        pass
    with pytest.raises(RequestError, match=r"^cannot write into s3://no-such/x: there is no such bucket$"):
        gpuprep.convert(dicom, "s3://no-such/x", SMALL)

    call = type(s3)._call_s3

    async def refused(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "put_object":
            raise PermissionError("Access Denied")
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(type(s3), "_call_s3", refused)
    with pytest.raises(RequestError, match=r"^cannot write into s3://bucket/no: Permission denied \(Access Denied\)"):
        gpuprep.convert(dicom, "s3://bucket/no", SMALL)
