"""Tests of inputs at URLs: the same volumes and folders as from disk, and one-line errors for unreadable URLs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from segmentations import write_rtstruct
from test_convert_masks import LEFT, LEFT_BOX, RAW, Ct, volume
from test_pinnacle import TRIANGLE, image, written
from test_sources import wrapped
from typer.testing import CliRunner

import gpuprep
from gpuprep import Recipe
from gpuprep.cli.app import app
from gpuprep.errors import DecodeError, RequestError
from gpuprep.files import filesystem
from gpuprep.masks.formats import pinnacle
from gpuprep.pipeline.events import Listener
from gpuprep.pipeline.scan import scan
from gpuprep.testing import write_series

fsspec = pytest.importorskip("fsspec")

SPACING_MM = (2.5, 0.8, 0.7)
SMALL = Recipe(spacing_mm=None, size=None, dtype="int16", window_hu=None)


def put(source: Path, url: str) -> str:
    """Copy a file, or all files of a folder, to a URL."""
    for file in [source] if source.is_file() else sorted(source.rglob("*")):
        if file.is_file():
            target = f"{url}/{file.relative_to(source)}" if source.is_dir() else url
            fs, key = fsspec.core.url_to_fs(target)
            fs.pipe_file(key, file.read_bytes())
    return url


@pytest.fixture
def stored(noise: Callable[..., NDArray[np.int16]]) -> NDArray[np.int16]:
    return noise((7, 18, 22)) - 1500


@pytest.fixture
def plain(tmp_path: Path, stored: NDArray[np.int16]) -> list[Path]:
    return write_series(tmp_path / "dicom" / "p1", stored, SPACING_MM, series_uid="1.2.3")


def outputs(out: Path) -> dict[str, bytes]:
    """Return every file of the volumes under OUT, without the fingerprints in volume.json, which hold input times."""
    found = {}
    for file in sorted(out.rglob("*/*")):
        if file.name == "volume.json":
            content = json.loads(file.read_text())
            del content["fingerprint"]
            found[str(file.relative_to(out))] = json.dumps(content).encode()
        elif file.is_file() and ".gpuprep" not in file.parts:
            found[str(file.relative_to(out))] = file.read_bytes()
    return found


@pytest.mark.parametrize(
    ("path", "url", "used"),
    [
        ("s3://bucket/a/", True, "s3://bucket/a"),
        ("memory://a", True, "memory://a"),
        ("file:///a/b%20c", True, "/a/b c"),
        ("file://localhost/a", True, "/a"),
        ("/a/s3://b", False, "/a/s3://b"),
        ("s3:/bucket", False, "s3:/bucket"),
        ("://", False, "://"),
        (Path("a"), False, "a"),
    ],
)
def test_urls_are_distinguished_from_paths(path: str | Path, url: bool, used: str) -> None:
    assert (filesystem.is_url(str(path)), filesystem.normalised_path(path)) == (url, used)


@pytest.mark.parametrize("url", ["s3://key:hush@bucket/a", "https://host/a?Signature=hush", "file://host/a"])
def test_urls_with_a_password_query_or_file_host_are_refused(url: str) -> None:
    with pytest.raises(RequestError, match=r"absolute path after file|password or a query") as caught:
        gpuprep.discover(url)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("folders", "common"),
    [
        (["/a/b", "/a/c"], "/a"),
        (["s3://b/x"], "s3://b/x"),
        (["s3://b/x/1", "s3://b/x/2"], "s3://b/x"),
        (["s3://b/x", "s3://b/y"], "s3://b"),
        (["s3://b/x", "s3://c/x"], "/"),
        (["s3://b/x", "gs://b/x"], "/"),
        (["s3://b/x", "/s3/b/x"], "/"),
    ],
)
def test_common_folder_of_paths_and_urls(folders: list[str], common: str) -> None:
    assert filesystem.common_folder(folders) == common


def test_fsspec_is_not_imported_without_urls(plain: list[Path]) -> None:
    folder = str(plain[0].parent)
    code = f"import gpuprep, sys; assert len(gpuprep.discover({folder!r})) == 1; print('fsspec' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("url", "absent", "text"),
    [
        ("s3://b/a", "fsspec", "s3:// needs s3fs: pip install 'gpuprep[s3]'"),
        ("gs://b/a", "gcsfs", "gs:// needs gcsfs: pip install 'gpuprep[gcs]'"),
        ("nothing://b/a", "nothing", "nothing://b/a: nothing:// is unknown to fsspec"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, absent: str, text: str) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(RequestError) as caught:
        gpuprep.discover(url)
    assert str(caught.value) == text


def test_file_urls_are_treated_as_paths(tmp_path: Path, plain: list[Path]) -> None:
    folder = plain[0].parent.parent
    assert gpuprep.discover(f"file://{folder}").series == gpuprep.discover(folder).series
    gpuprep.convert(f"file://{folder}/", tmp_path / "out", SMALL)
    (result,) = gpuprep.convert(folder, tmp_path / "out", SMALL).results
    assert (result.status, result.folder, result.source) == ("skipped", "dicom/p1", str(plain[0].parent))


@pytest.mark.usefixtures("memory")
def test_volumes_and_folders_equal_those_from_disk(
    tmp_path: Path, plain: list[Path], stored: NDArray[np.int16]
) -> None:
    write_series(tmp_path / "dicom" / "p2" / "ct", stored[:5] + 9, SPACING_MM)
    put(tmp_path / "dicom", "memory://dicom")
    here = gpuprep.convert(tmp_path / "dicom", tmp_path / "here", SMALL)
    there = gpuprep.convert("memory://dicom", tmp_path / "there", SMALL)
    assert [r.status for r in there.results] == [r.status for r in here.results] == ["ok", "ok"]
    assert outputs(tmp_path / "there") == outputs(tmp_path / "here")
    assert [(r.folder, r.source) for r in there.results] == [
        ("dicom/p1", "memory://dicom/p1"),
        ("dicom/p2/ct", "memory://dicom/p2/ct"),
    ]
    assert "memory://dicom/p2/ct" in (tmp_path / "there" / "manifest.csv").read_text()
    assert gpuprep.convert("memory://dicom/", tmp_path / "there", SMALL).counts == {"skipped": 2}
    single = gpuprep.discover([f"memory://dicom/p1/{plain[0].name}", "memory://dicom/p1"])
    assert [len(s.slices) for s in single] == [7]


@pytest.mark.usefixtures("memory")
def test_paths_on_disk_and_urls_are_converted_in_one_run(tmp_path: Path, plain: list[Path]) -> None:
    put(write_series(tmp_path / "other", np.ones((5, 8, 8), np.int16), SPACING_MM)[0].parent, "memory://bucket/p9")
    out = tmp_path / "out"
    run = gpuprep.convert([plain[0].parent, "memory://bucket/p9"], out, Recipe(policy="keep"))
    folder = str(plain[0].parent)[1:]
    assert {r.source: r.folder for r in run.results} == {f"/{folder}": folder, "memory://bucket/p9": "memory/bucket/p9"}
    # One series in both places has no common folder.
    for file in plain[4:]:
        put(file, f"memory://bucket/rest/{file.name}")
        file.unlink()
    (series,) = gpuprep.discover([plain[0].parent, "memory://bucket/rest"])
    assert (series.folder, len(series.slices)) == ("/", 7)


WRAPPINGS = ["gzip", "zip", "zip-stored", "zip-file", "enhanced", "enhanced-zip", "enhanced-rle", "deflated",
             "enhanced-deflated", "dicomdir", "bare-implicit"]  # fmt: skip


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("how", WRAPPINGS)
def test_every_wrapping_is_read(
    tmp_path: Path,
    plain: list[Path],
    stored: NDArray[np.int16],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    large: bool,
) -> None:
    if large:  # neither objects nor headers fit into the first request
        for name, size in {"WHOLE_BYTES": 300, "HEAD_BYTES": 200, "BLOCK_BYTES": 700}.items():
            monkeypatch.setattr(filesystem, name, size)
    given = wrapped(plain, tmp_path / "wrapped", how)
    put(tmp_path / "wrapped", "memory://wrapped")
    (series,) = gpuprep.discover(f"memory://{given.relative_to(tmp_path)}")
    (expected,) = gpuprep.discover(given)
    assert series.folder == expected.folder.replace(str(tmp_path), "memory:/")
    np.testing.assert_array_equal(gpuprep.read(series).stored, stored)


def test_objects_seek_like_files(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/a", bytes(range(100)))
    memory.pipe_file("/empty", b"")
    monkeypatch.setattr(filesystem, "HEAD_BYTES", 10)
    with filesystem.opened("memory://a", head=True) as f:
        assert (f.read(3), f.read(20), f.read(4)) == (bytes(range(3)), bytes(range(3, 10)), bytes(range(10, 14)))
        assert (f.seek(-2, 2), f.read(9), f.read(9), f.seek(200), f.read(1)) == (98, b"bc", b"", 200, b"")
        with pytest.raises(ValueError, match="negative"):
            f.seek(-1)
    with pytest.raises(ValueError, match="closed"):
        f.seek(0)
    with filesystem.opened("memory://empty") as f:
        assert (f.seek(0, 2), f.read()) == (0, b"")


def test_objects_changed_since_the_scan_are_not_read(plain: list[Path], memory: Any) -> None:
    put(plain[0].parent, "memory://p")
    (series,) = gpuprep.discover("memory://p")
    memory.pipe_file(f"/p/{plain[3].name}", plain[3].read_bytes()[:-1])
    with pytest.raises(DecodeError, match=f"{plain[3].name} changed since the scan"):
        gpuprep.read(series)
    memory.rm_file(f"/p/{plain[3].name}")
    with pytest.raises(DecodeError, match=f"{plain[3].name} cannot be read: No such file"):
        gpuprep.read(series)


def test_an_unchanged_tree_is_scanned_again_without_opening_a_file(
    tmp_path: Path, plain: list[Path], memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(plain[0].parent, "memory://p/a")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(plain[0], "x")
    put(tmp_path / "b.zip", "memory://p/b.zip")
    memory.pipe_file("/p/notes.txt", b"not DICOM")
    opened: list[str] = []
    whole = filesystem.fetched

    def fetched(url: str, start: int, stop: int) -> bytes:
        opened.append(url)
        return whole(url, start, stop)

    monkeypatch.setattr(filesystem, "fetched", fetched)
    index = tmp_path / "headers.sqlite"
    first = gpuprep.discover("memory://p", index=index)
    assert len(set(opened)) == 9
    opened.clear()
    assert gpuprep.discover("memory://p", index=index) == first
    assert opened == []
    memory.pipe_file(f"/p/a/{plain[2].name}", plain[2].read_bytes())
    gpuprep.discover("memory://p", index=index)
    assert set(opened) == {f"memory://p/a/{plain[2].name}"}


def test_the_etag_is_part_of_the_modification_time() -> None:
    def changed(etag: str, second: float, **more: Any) -> int:
        return filesystem._mtime_ns({"type": "file", "LastModified": second, "ETag": etag, **more})

    # Listings have milliseconds, the object itself has seconds; some stores omit the quotes.
    assert changed('"one"', 1_700_000_000.123) == changed("one", 1_700_000_000)
    assert changed("one", 1_700_000_000) != changed("two", 1_700_000_000)
    assert changed("one", 1_700_000_000) // 10**9 == 1_700_000_000


@pytest.mark.usefixtures("memory")
def test_an_output_folder_at_a_url_is_excluded_from_the_search(plain: list[Path]) -> None:
    for folder in ("in", "out", "out/below", "outer"):
        put(plain[0], f"memory://p/{folder}/1")
    cohort = gpuprep.discover("memory://p", exclude="memory://p/out")
    assert sorted(s.path for series in cohort for s in series.slices) == ["memory://p/in/1", "memory://p/outer/1"]


def test_segmentations_at_urls_are_used(tmp_path: Path, memory: Any) -> None:
    ct = Ct(tmp_path / "ct")
    put(ct.folder, "memory://dicom/ct")
    (tmp_path / "masks").mkdir()
    write_rtstruct(tmp_path / "masks" / "rt.dcm", {"left": LEFT}, series_uid=ct.uid, frame_uid=ct.frame_uid)
    put(tmp_path / "masks", "memory://masks")
    memory.pipe_file("/masks/.hidden", b"no segmentation")
    for masks in ("memory://masks", "memory://masks/rt.dcm", f"file://{tmp_path}/masks"):
        out = tmp_path / masks.replace("/", "-")
        run = gpuprep.convert("memory://dicom", out, RAW, masks=[masks])
        assert (run.counts, run.unmatched) == ({"ok": 1}, ())
        np.testing.assert_array_equal(volume(out / run.results[0].folder / "labels"), LEFT_BOX)
        # The modification time in a listing equals that of the object itself.
        assert gpuprep.convert("memory://dicom", out, RAW, masks=[masks]).counts == {"skipped": 1}
    put(tmp_path / "masks", "memory://dicom/rt")
    (planned,) = scan("memory://dicom", RAW, masks="auto").planned
    assert [g.path for g in planned.segmentations] == ["memory://dicom/rt/rt.dcm"]
    assert gpuprep.read_segmentation("memory://masks/rt.dcm").structures[0].name == "left"
    with pytest.raises(RequestError, match=r"^memory://nowhere does not exist$"):
        scan("memory://dicom", RAW, masks=["memory://nowhere"])


def test_headers_beside_a_pinnacle_segmentation_are_found_at_urls(memory: Any) -> None:
    memory.pipe_file("/p/ImageSet_0.header", image("HFP", (0, 0)).encode())
    for folder in ("memory://p", "memory://p/Plan_0"):
        memory.pipe_file(f"{folder}/plan.roi", b"")
        found = pinnacle.read(written([("a", [TRIANGLE])]), f"{folder}/plan.roi")
        assert (found.beside, found.series_uids) == (("memory://p/ImageSet_0.header",), ("1.2.3",))


def test_errors_of_a_store_are_one_line(memory: Any, monkeypatch: pytest.MonkeyPatch, plain: list[Path]) -> None:
    put(plain[0].parent, "memory://p")

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError("Forbidden")

    def failed(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no answer from\nhttps://host/a?Signature=hush or elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "cat_file", refused)
        cohort = gpuprep.discover("memory://p")
    assert len(cohort.unreadable) == 7
    assert "Permission denied (Forbidden)" in cohort.unreadable[0][1]
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "find", failed)
        assert gpuprep.discover("memory://p").unreadable == (
            ("memory://p", "cannot be listed: no answer from https://host/a or elsewhere"),
        )
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "info", refused)
        result = CliRunner().invoke(app, ["scan", "memory://p", "--index", "none", "--jobs", "1"])
    assert result.exit_code == 2
    assert result.stderr == "gpuprep: memory://p cannot be read: Permission denied (Forbidden)\n"


def test_a_cohort_on_s3_is_converted_as_from_disk(
    tmp_path: Path, stored: NDArray[np.int16], plain: list[Path], s3: Any
) -> None:
    dicom = tmp_path / "dicom"
    for how in ("gzip", "zip"):
        files = write_series(tmp_path / "more" / how, stored, SPACING_MM, series_uid=f"1.2.3.{len(how)}")
        wrapped(files, dicom / how, how)
    put(dicom, "s3://bucket/dicom")
    here = gpuprep.convert(dicom, tmp_path / "here", SMALL)
    there = gpuprep.convert("s3://bucket/dicom", tmp_path / "there", SMALL, backend="cpu", jobs=2)
    assert [r.status for r in there.results] == ["ok", "ok", "ok"]
    assert {r.source for r in there.results} >= {"s3://bucket/dicom/gzip", "s3://bucket/dicom/p1"}
    assert {r.key: r.folder for r in there.results} == {r.key: r.folder for r in here.results}
    assert outputs(tmp_path / "there") == outputs(tmp_path / "here")

    class Removing(Listener):
        def planned(self, _: Any) -> None:
            s3.rm_file(f"bucket/dicom/p1/{plain[3].name}")

    run = gpuprep.convert("s3://bucket/dicom", tmp_path / "again", SMALL, backend="cpu", jobs=2, listener=Removing())
    assert run.counts == {"ok": 2, "rejected": 1}
    (rejected,) = [r for r in run.results if r.status == "rejected"]
    assert rejected.reason == f"DecodeError: {plain[3].name} cannot be read: No such file or directory"


def test_number_of_requests_per_slice_on_s3(plain: list[Path], s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(plain[0].parent, "s3://bucket/cost")
    (tmp := plain[0].parent.parent / "gz").mkdir()
    for file in plain:
        (tmp / file.name).write_bytes(gzip.compress(file.read_bytes()))
    put(tmp, "s3://bucket/cost-gz")
    requests: list[str] = []
    call = type(s3)._call_s3

    async def counted(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        requests.append(method)
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(type(s3), "_call_s3", counted)
    for url, gets in (("s3://bucket/cost", 7), ("s3://bucket/cost-gz", 14)):
        (series,) = gpuprep.discover(url)
        assert (requests.count("get_object"), requests.count("head_object")) == (gets, 1 + 7)  # 1: is it a folder?
        assert requests.count("list_objects_v2") <= 2
        requests.clear()
        gpuprep.read(series)
        assert requests == ["head_object", "get_object"] * 7
        requests.clear()


def test_empty_objects_and_folder_markers_are_handled(s3: Any) -> None:
    for key in ("odd/", "odd/below/", "odd/empty", "odd/empty.dcm"):
        s3.pipe_file(f"bucket/{key}", b"")
    cohort = gpuprep.discover("s3://bucket/odd")
    assert cohort.passed_over == {"not DICOM": 1}
    assert cohort.unreadable == (("s3://bucket/odd/empty.dcm", "ValueError: the file is empty"),)


def test_absent_or_unreachable_s3_objects_are_one_line_errors(
    tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("s3://no-such-bucket", "s3://no-such-bucket/a", "s3://bucket/nothing"):
        with pytest.raises(RequestError, match=f"^{url} does not exist$"):
            gpuprep.discover(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(type(s3), "retries", 1)
    type(s3).clear_instance_cache()
    result = CliRunner().invoke(app, ["convert", "s3://bucket/a", "--out", str(tmp_path / "out"), "--backend", "cpu"])
    type(s3).clear_instance_cache()
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        'gpuprep: s3://bucket/a cannot be read: Could not connect to the endpoint URL: "http://127.0.0.1:9/bucket/a"'
    )
