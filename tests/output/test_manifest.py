"""The manifest keeps results in SQLite and CSV as they are, and files that are no manifest are refused."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuprep.core.shard import WHOLE_COHORT, Shard
from gpuprep.dicom.header_cache import File, HeaderIndex
from gpuprep.dicom.headers import Contents
from gpuprep.errors import OutputError
from gpuprep.output.columns import SERIES
from gpuprep.output.manifest import Manifest, open_manifest
from gpuprep.output.records import SeriesFacts, SeriesResult
from gpuprep.output.verify import AllManifests

OK = SeriesResult(
    key="1.2.3",
    series_uid="1.2.3",
    study_uid="1.2",
    series_number=7,
    source="/data/p1",
    status="fixed",
    codes=("gap", "tilt"),
    irregularities=("1 missing, between a and b", "leans by 5°"),
    warnings=("first, with a comma", 'second "quoted"\nand on a new line'),
    slices=108,
    source_shape=(108, 512, 512),
    source_spacing_mm=(3.0, 0.6816, 0.6816),
    hu_min=-3024.0,
    hu_max=1234.5,
    hu_mean=-612.0625,
    padding_share=0.125,
    quality={"voxels": 1000, "air_peak_hu": -998, "bands": {"air": 0.25}},
    audit={"slices": 108, "gaps": [{"after": "a", "mm": 6.0, "missing": 1}], "tilt_deg": None},
    folder="data/p1",
    shape=(324, 512, 512),
    spacing_mm=(1.0, 0.681640625, 0.681640625),
    files=325,
    bytes=339_746_304_123,
    read_s=0.5,
    process_s=0.25,
    write_s=0.125,
    engine="operators",
    backend="cpu",
    device="cpu",
    fingerprint="f" * 64,
    recipe_sha256="e" * 64,
    version="0.1.0",
    sha256="d" * 64,
    host="node7",
    finished="2026-01-02T03:04:05+00:00",
)
BARE = SeriesResult(
    key="9.9#2", series_uid="9.9", study_uid="", series_number=None, source="/data/p0", status="rejected",
    reason="GeometryError: gap",
)  # fmt: skip


@pytest.fixture
def manifest(tmp_path: Path) -> Iterator[Manifest]:
    with closing(Manifest(tmp_path / "manifest.sqlite")) as opened:
        yield opened


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_a_result_comes_back_as_it_was_put(manifest: Manifest) -> None:
    manifest.put(OK)
    manifest.put(BARE)
    assert manifest.get("1.2.3") == OK
    assert manifest.get("9.9#2") == BARE
    assert manifest.get("1.2") is None


def test_none_and_empty_lists_stay_apart(manifest: Manifest) -> None:
    manifest.put(BARE)
    found = manifest.get(BARE.key)
    assert found is not None
    assert found.warnings == ()
    assert (found.series_number, found.shape, found.spacing_mm, found.hu_min) == (None, None, None, None)


def test_tuples_come_back_as_tuples_of_the_same_numbers(manifest: Manifest) -> None:
    manifest.put(OK)
    found = manifest.get(OK.key)
    assert found is not None
    assert found.shape == (324, 512, 512)
    assert isinstance(found.shape, tuple)
    assert all(isinstance(v, int) for v in found.shape)
    assert found.spacing_mm == (1.0, 0.681640625, 0.681640625)


TEXTS = st.text(max_size=20)
FLOATS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
RESULTS = st.builds(
    SeriesResult,
    key=st.just("1"),
    series_uid=TEXTS,
    study_uid=TEXTS,
    series_number=st.none() | st.integers(-(2**31), 2**31),
    source=TEXTS,
    status=st.sampled_from(["ok", "rejected", "failed"]),
    reason=TEXTS,
    warnings=st.lists(TEXTS, max_size=3).map(tuple),
    source_shape=st.none() | st.tuples(*[st.integers(1, 9999)] * 3),
    source_spacing_mm=st.none() | st.tuples(*[st.floats(1e-3, 1e3)] * 3),
    hu_min=FLOATS,
    hu_mean=FLOATS,
    folder=TEXTS,
    bytes=st.integers(0, 2**62),
    read_s=st.floats(0, 1e6),
)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RESULTS)
def test_any_result_is_read_as_it_was_put(manifest: Manifest, result: SeriesResult) -> None:
    manifest.put(result)
    assert manifest.get("1") == result


def test_a_later_result_replaces_the_former_one(manifest: Manifest) -> None:
    manifest.put(OK)
    later = replace(OK, status="failed", reason="OutputError: disk full", warnings=(), shape=None)
    manifest.put(later)
    assert list(manifest) == [later]


def test_results_are_listed_by_source_then_number(manifest: Manifest) -> None:
    second = replace(OK, key="a", series_number=8)
    third = replace(OK, key="0", source="/data/p2")
    for result in (third, second, OK, BARE):
        manifest.put(result)
    assert list(manifest) == [BARE, OK, second, third]


def test_results_are_kept_when_a_manifest_is_reopened(tmp_path: Path) -> None:
    for _ in range(2):
        with closing(Manifest(tmp_path / "manifest.sqlite")) as manifest:
            manifest.put(OK)
    with closing(Manifest(tmp_path / "manifest.sqlite")) as manifest:
        assert list(manifest) == [OK]


def test_a_reader_sees_each_result_as_soon_as_it_is_put(manifest: Manifest, tmp_path: Path) -> None:
    # So a kill loses no result that was put, and `sqlite3 manifest.sqlite` works while a run writes.
    with closing(sqlite3.connect(tmp_path / "manifest.sqlite")) as reader:
        for n in range(3):
            manifest.put(replace(OK, key=str(n)))
            assert reader.execute("SELECT count(*) FROM series").fetchone() == (n + 1,)


def test_csv_holds_exactly_the_rows_of_the_manifest(manifest: Manifest, tmp_path: Path) -> None:
    manifest.put(OK)
    manifest.put(BARE)
    manifest.write_csv()
    bare, ok = csv_rows(tmp_path)
    assert list(ok) == list(SERIES)
    absent = dict.fromkeys((f.name for f in fields(SeriesFacts)), "")
    assert ok | {"warnings": "", "irregularities": "", "audit": "", "quality": "", "shape": ""} == absent | {
        "key": "1.2.3",
        "series_uid": "1.2.3",
        "study_uid": "1.2",
        "series_number": "7",
        "source": "/data/p1",
        "status": "fixed",
        "reason": "",
        "codes": '["gap", "tilt"]',
        "irregularities": "",
        "warnings": "",
        "slices": "108",
        "source_shape": "[108, 512, 512]",
        "source_spacing_mm": "[3.0, 0.6816, 0.6816]",
        "crop": "",
        "hu_min": "-3024.0",
        "hu_max": "1234.5",
        "hu_mean": "-612.0625",
        "padding_share": "0.125",
        "quality": "",
        "audit": "",
        "segmentations": "",
        "labels": "",
        "masks_s": "",
        "folder": "data/p1",
        "shape": "",
        "spacing_mm": "[1.0, 0.681640625, 0.681640625]",
        "files": "325",
        "bytes": "339746304123",
        "read_s": "0.5",
        "process_s": "0.25",
        "write_s": "0.125",
        "upload_s": "",
        "kernels_s": "",
        "download_s": "",
        "engine": "operators",
        "backend": "cpu",
        "device": "cpu",
        "fingerprint": "f" * 64,
        "recipe_sha256": "e" * 64,
        "version": "0.1.0",
        "sha256": "d" * 64,
        "host": "node7",
        "finished": "2026-01-02T03:04:05+00:00",
    }
    assert json.loads(ok["warnings"]) == ["first, with a comma", 'second "quoted"\nand on a new line']
    assert json.loads(ok["irregularities"]) == ["1 missing, between a and b", "leans by 5°"]
    assert json.loads(ok["audit"]) == {
        "slices": 108, "gaps": [{"after": "a", "mm": 6.0, "missing": 1}], "tilt_deg": None,
    }  # fmt: skip
    assert json.loads(ok["quality"]) == {"voxels": 1000, "air_peak_hu": -998, "bands": {"air": 0.25}}
    assert json.loads(ok["shape"]) == [324, 512, 512]
    assert (bare["key"], bare["status"], bare["reason"]) == ("9.9#2", "rejected", "GeometryError: gap")
    assert (bare["series_number"], bare["shape"], bare["hu_min"], bare["warnings"]) == ("", "", "", "[]")
    assert (bare["codes"], bare["irregularities"], bare["padding_share"], bare["audit"]) == ("[]", "[]", "", "")


def test_csv_of_an_empty_manifest_is_its_heading(manifest: Manifest, tmp_path: Path) -> None:
    manifest.write_csv()
    heading, *rest = (tmp_path / "manifest.csv").read_text().splitlines()
    assert heading.startswith(
        "key,series_uid,study_uid,series_number,source,status,reason,codes,irregularities,warnings,"
    )
    assert rest == []


def test_csv_is_replaced_completely_or_not_at_all(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trap 34.
    manifest.put(OK)
    manifest.write_csv()
    before = (tmp_path / "manifest.csv").read_bytes()
    manifest.put(BARE)

    def break_off(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gpuprep.files.replacing.flush", break_off)
        with pytest.raises(KeyboardInterrupt):
            manifest.write_csv()
    assert (tmp_path / "manifest.csv").read_bytes() == before
    manifest.write_csv()
    assert len(csv_rows(tmp_path)) == 2
    assert not any(p.name.startswith("manifest.csv.") for p in tmp_path.iterdir())


def test_other_and_unreadable_files_are_those_of_the_last_scan(manifest: Manifest, tmp_path: Path) -> None:
    manifest.account({"not DICOM": 3, "MR Image Storage": 1}, (("/a", "EOFError: short"), ("/b", "cannot be listed")))
    manifest.account({"not DICOM": 2}, (("/b", "EOFError: short"),))
    with closing(sqlite3.connect(tmp_path / "manifest.sqlite")) as reader:
        assert reader.execute("SELECT * FROM passed_over").fetchall() == [("not DICOM", 2)]
        assert reader.execute("SELECT * FROM unreadable").fetchall() == [("/b", "EOFError: short")]


def corrupt(file: Path) -> None:
    file.write_bytes(b"this is no database" * 100)


def cut(file: Path) -> None:
    with closing(Manifest(file)) as manifest:
        manifest.put(OK)
    file.write_bytes(file.read_bytes()[:1000])


def make_folder(file: Path) -> None:
    file.mkdir()


@pytest.mark.parametrize("damage", [corrupt, cut, make_folder])
def test_a_file_that_is_no_database_is_an_output_error_with_the_remedy(tmp_path: Path, damage: Any) -> None:
    file = tmp_path / "manifest.sqlite"
    damage(file)
    with pytest.raises(
        OutputError, match=r"manifest\.sqlite cannot be used as manifest .*move it away, or choose another"
    ):
        Manifest(file)


def test_a_manifest_in_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be used as manifest"):
        Manifest(tmp_path / "absent" / "manifest.sqlite")


def test_a_database_with_other_columns_is_an_output_error_and_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "manifest.sqlite"
    with closing(sqlite3.connect(file, isolation_level=None)) as foreign:
        foreign.execute("CREATE TABLE series (key TEXT PRIMARY KEY, title TEXT)")
        foreign.execute("INSERT INTO series VALUES ('1', 'The Wire')")
    with pytest.raises(OutputError, match="written by another version of gpuprep: choose another --out"):
        Manifest(file)
    with closing(sqlite3.connect(file)) as foreign:
        assert foreign.execute("SELECT * FROM series").fetchall() == [("1", "The Wire")]


def test_an_empty_file_is_no_manifest_to_read(tmp_path: Path) -> None:
    file = tmp_path / "manifest.sqlite"
    file.touch()
    with pytest.raises(OutputError, match=r"manifest\.sqlite cannot be used as manifest \(it is empty\)"):
        Manifest(file, reading=True)


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("bytes", "many"), ("folder", b"7"), ("status", None), ("hu_mean", "dense"), ("key", b"1"), ("slices", 2.5),
        ("codes", '"gap"'), ("codes", "[" * 100_000), ("audit", "[]"), ("warnings", "no JSON"), ("shape", "3"),
        ("finished", "7"),
    ],
)  # fmt: skip
def test_a_cell_of_the_wrong_type_is_an_output_error(tmp_path: Path, column: str, cell: object) -> None:
    file = tmp_path / "manifest.sqlite"
    with closing(Manifest(file)) as manifest:
        manifest.put(OK)
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute(f"UPDATE series SET {column} = ?", (cell,))  # noqa: S608
    with closing(Manifest(file, reading=True)) as manifest:
        unusable = partial(pytest.raises, OutputError, match="cannot be used as manifest")
        with unusable():
            list(manifest)
        with unusable():
            list(manifest.columns("series_uid", column))


def test_a_manifest_without_a_later_column_can_be_read_and_extended(tmp_path: Path) -> None:
    file = tmp_path / "manifest.sqlite"
    with closing(Manifest(file)) as manifest:
        manifest.put(OK)
    with closing(sqlite3.connect(file, isolation_level=None)) as old:
        for column in ("upload_s", "kernels_s", "download_s", "quality"):
            old.execute(f"ALTER TABLE series DROP COLUMN {column}")
    before = file.read_bytes()
    with closing(Manifest(file, reading=True)) as manifest:  # as it is: others may be reading it, or it may be a copy
        assert list(manifest) == [replace(OK, quality=None)]
    assert file.read_bytes() == before
    shard = tmp_path / "manifest.1-of-2.sqlite"
    shard.write_bytes(before)
    with closing(Manifest(tmp_path / "whole.sqlite")) as whole:
        whole.take_over(shard, WHOLE_COHORT)
        assert list(whole) == [replace(OK, quality=None)]
    later = replace(OK, key="2", upload_s=0.5, kernels_s=1.5, download_s=2.5)
    with closing(Manifest(file)) as manifest:
        assert list(manifest) == [replace(OK, quality=None)]
        manifest.put(later)
        manifest.write_csv()
    with closing(Manifest(file)) as manifest:
        assert manifest.get("2") == later
    names = list(SERIES)
    assert [list(row) for row in csv_rows(tmp_path)] == [names, names]
    assert [row["kernels_s"] for row in csv_rows(tmp_path)] == ["", "1.5"]


def test_a_manifest_that_can_no_longer_be_written_is_an_output_error(manifest: Manifest, tmp_path: Path) -> None:
    # For example because of a full disk or a lost mount; this test removes a table instead.
    with closing(sqlite3.connect(tmp_path / "manifest.sqlite", isolation_level=None)) as saboteur:
        saboteur.execute("DROP TABLE series")
        saboteur.execute("DROP TABLE unreadable")
    words = r"cannot write .*: no such table"
    with pytest.raises(OutputError, match=words):
        manifest.put(OK)
    with pytest.raises(OutputError, match=words):
        manifest.account({}, ())
    with pytest.raises(OutputError, match=words):
        manifest.write_csv()


def test_a_csv_that_cannot_be_written_is_an_output_error(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").mkdir()
    manifest.put(OK)
    with pytest.raises(OutputError, match=r"manifest\.csv"):
        manifest.write_csv()


# --- connections are closed after errors


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """Collect all connections to databases that are opened from here on."""
    made: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def kept(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        made.append(connect(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", kept)
    return made


def assert_closed(connections: list[sqlite3.Connection]) -> None:
    assert connections
    for connection in connections:
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
            connection.execute("SELECT 1")


def make_empty(file: Path) -> None:
    file.touch()


def make_foreign(file: Path) -> None:
    with closing(sqlite3.connect(file)) as foreign, foreign:
        foreign.execute("CREATE TABLE series (key TEXT PRIMARY KEY, title TEXT)")


def make_frozen(file: Path) -> None:
    """Make a manifest from before a column was added, to which none can be added."""
    with closing(Manifest(file)):
        pass
    with closing(sqlite3.connect(file)) as old, old:
        old.execute("ALTER TABLE series DROP COLUMN quality")
        old.execute("ALTER TABLE series RENAME TO kept")
        old.execute("CREATE VIEW series AS SELECT * FROM kept")


def make_whole(file: Path) -> None:
    with closing(Manifest(file)) as manifest:
        manifest.put(OK)


@pytest.mark.parametrize("reading", [False, True])
@pytest.mark.parametrize("make", [corrupt, cut, make_empty, make_foreign, make_frozen, make_whole])
def test_a_manifest_is_closed_whether_it_can_be_used_or_not(
    tmp_path: Path, make: Any, reading: bool, connections: list[sqlite3.Connection]
) -> None:
    file = tmp_path / "manifest.sqlite"
    make(file)
    with suppress(OutputError), closing(Manifest(file, reading=reading)) as manifest:
        assert list(manifest) == ([OK] if make is make_whole else [])
        assert make in (make_whole, make_empty, make_frozen)
    assert_closed(connections)


def test_a_stop_while_a_manifest_is_opened_closes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connections: list[sqlite3.Connection]
) -> None:
    def stop(_: Manifest) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "_prepared", stop)
    with pytest.raises(KeyboardInterrupt):
        Manifest(tmp_path / "manifest.sqlite")
    assert_closed(connections)


@pytest.mark.parametrize("damaged", ["manifest.sqlite", "manifest.1-of-2.sqlite"])
@pytest.mark.parametrize("shard", [WHOLE_COHORT, Shard(2, 2)])
def test_a_manifest_that_cannot_take_over_another_is_closed(
    tmp_path: Path, damaged: str, shard: Shard, connections: list[sqlite3.Connection]
) -> None:
    make_whole(tmp_path / "manifest.sqlite")
    make_whole(tmp_path / "manifest.1-of-2.sqlite")
    corrupt(tmp_path / damaged)
    with suppress(OutputError), closing(open_manifest(tmp_path, shard)) as manifest:
        assert shard == Shard(2, 2)  # it does not read the manifest of the other shard
        assert damaged == "manifest.1-of-2.sqlite"
        assert list(manifest) == [OK]
    assert_closed(connections)


def test_manifests_are_closed_if_one_of_them_is_damaged(tmp_path: Path, connections: list[sqlite3.Connection]) -> None:
    make_whole(tmp_path / "manifest.1-of-2.sqlite")
    corrupt(tmp_path / "manifest.2-of-2.sqlite")
    with pytest.raises(OutputError, match=r"2-of-2\.sqlite cannot be used as manifest"):
        AllManifests(tmp_path)
    assert_closed(connections)


def make_index(file: Path) -> None:
    HeaderIndex(file).close()


@pytest.mark.parametrize("make", [corrupt, make_foreign, make_empty, make_index])
def test_an_index_of_headers_is_closed_whether_it_can_be_used_or_not(
    tmp_path: Path, make: Any, connections: list[sqlite3.Connection]
) -> None:
    file = tmp_path / "headers.sqlite"
    make(file)
    index = HeaderIndex(file)
    used = len(connections)
    assert index.known("/data", [], complete=False) == {}
    index.close()
    assert len(connections) == used
    assert_closed(connections)


@pytest.mark.parametrize("action", ["known", "add"])
def test_an_index_of_headers_that_breaks_while_it_is_used_is_closed(
    tmp_path: Path, action: str, connections: list[sqlite3.Connection], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "headers.sqlite"
    index = HeaderIndex(file)
    with closing(sqlite3.connect(file)) as saboteur, saboteur:
        (table,) = saboteur.execute("SELECT name FROM sqlite_master WHERE name LIKE 'files_%'").fetchone()
        saboteur.execute(f"DROP TABLE {table}")
    if action == "known":
        assert index.known("/data", [], complete=False) == {}
    else:
        index.add([File("/data/a", 1, 1, (1, 1))], [Contents()])
    assert "cannot be used" in caplog.text
    assert_closed(connections)
