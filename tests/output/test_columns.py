"""The table of columns: it has every field of the records, and SQLite, CSV and Parquet hold what it says."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from pydicom.datadict import tag_for_keyword

from gpuprep.output.columns import (
    NUMBER,
    NUMBERS,
    OBJECT,
    OBJECTS,
    RUNS,
    SERIES,
    TEXT,
    TEXTS,
    TIME,
    WHOLE,
    WHOLES,
    Column,
    Kind,
)
from gpuprep.output.export import write_parquet
from gpuprep.output.manifest import Manifest
from gpuprep.output.records import RunRecord, SeriesResult

TABLES = pytest.mark.parametrize(("table", "record"), [(SERIES, SeriesResult), (RUNS, RunRecord)])

FIRST_MANIFEST = """CREATE TABLE series (
key TEXT, series_uid TEXT, study_uid TEXT, series_number INTEGER, source TEXT, status TEXT, reason TEXT, codes TEXT,
irregularities TEXT, warnings TEXT, slices INTEGER, source_shape TEXT, source_spacing_mm TEXT, hu_min REAL, hu_max REAL,
hu_mean REAL, padding_share REAL, quality TEXT, audit TEXT, segmentations TEXT, labels TEXT, folder TEXT, shape TEXT,
spacing_mm TEXT, files INTEGER, bytes INTEGER, read_s REAL, process_s REAL, write_s REAL, upload_s REAL, kernels_s REAL,
download_s REAL, masks_s REAL, engine TEXT, backend TEXT, device TEXT, fingerprint TEXT, recipe_sha256 TEXT,
version TEXT, sha256 TEXT, host TEXT, finished TEXT, PRIMARY KEY (key))"""
"""The table as it was when columns were first declared; manifests of that time have to open for ever."""


@TABLES
def test_the_columns_are_the_fields(table: Mapping[str, Column], record: Any) -> None:
    assert sorted(table) == sorted(f.name for f in fields(record))


def kind_of(hint: Any) -> Kind:
    """Return the kind of a type of Python."""
    if get_origin(hint) is Literal:
        return TEXT
    if get_origin(hint) is tuple:
        return {str: TEXTS, int: WHOLES, float: NUMBERS}.get(get_args(hint)[0], OBJECTS)
    return {str: TEXT, int: WHOLE, float: NUMBER}.get(hint, OBJECT)


@TABLES
def test_a_column_holds_the_type_of_its_field(table: Mapping[str, Column], record: Any) -> None:
    for name, hint in get_type_hints(record).items():
        optional = NoneType in get_args(hint)
        hint = next(kind for kind in get_args(hint) if kind is not NoneType) if optional else hint
        kind = TIME if name in ("started", "ended", "finished") else kind_of(hint)
        assert (table[name].kind, table[name].optional) == (kind, optional), name


@pytest.mark.parametrize("column", [*SERIES.values(), *RUNS.values()], ids=lambda column: column.name)
def test_a_column_has_a_meaning_and_the_unit_in_its_name(column: Column) -> None:
    assert column.meaning
    units = {"_mm": "mm", "_s": "s", "_hu": "HU"}
    assert column.unit == next((unit for end, unit in units.items() if column.name.endswith(end)), column.unit)


def test_keywords_are_those_of_dicom() -> None:
    tags = {name: tag_for_keyword(column.keyword) for name, column in SERIES.items() if column.keyword}
    assert None not in tags.values()
    assert tags.items() >= {"series_uid": 0x0020000E, "study_uid": 0x0020000D, "series_number": 0x00200011}.items()


def test_a_manifest_of_the_first_columns_opens(tmp_path: Path) -> None:
    file = tmp_path / "manifest.sqlite"
    with closing(sqlite3.connect(file, isolation_level=None)) as old:
        old.execute(FIRST_MANIFEST)
        declared = old.execute("SELECT name, type FROM pragma_table_info('series')").fetchall()
    with closing(Manifest(file)) as manifest:
        assert list(manifest) == []
    with closing(Manifest(tmp_path / "new.sqlite")):
        pass
    for path in (file, tmp_path / "new.sqlite"):
        with closing(sqlite3.connect(path)) as found:
            columns = found.execute("SELECT name, type FROM pragma_table_info('series')").fetchall()
        assert set(declared) <= set(columns)


@pytest.mark.parametrize(
    ("column", "value", "cell"),
    [
        ("codes", ("gap", "tilt"), '["gap", "tilt"]'),
        ("shape", (3, 512, 512), "[3, 512, 512]"),
        ("shape", None, None),
        ("audit", {"slices": 3}, '{"slices": 3}'),
        ("labels", ({"name": "lung"},), '[{"name": "lung"}]'),
        ("reason", "", ""),
        ("hu_min", -1024.0, -1024.0),
    ],
)
def test_lists_and_objects_are_json_in_a_cell(column: str, value: object, cell: object) -> None:
    assert SERIES[column].to_cell(value) == cell
    assert SERIES[column].from_cell(cell) == value


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("codes", None),
        ("codes", "{}"),
        ("audit", "null"),
        ("shape", 3),
        ("reason", b"x"),
        ("bytes", 1.0),
        ("key", None),
    ],
)
def test_a_cell_of_another_type_is_refused(column: str, cell: object) -> None:
    with pytest.raises(ValueError, match=f"^{column} is "):
        SERIES[column].from_cell(cell)


def test_parquet_has_numbers_and_lists_as_such_and_objects_as_json(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    write_parquet([], SERIES, tmp_path / "empty.parquet")
    schema = parquet.read_schema(tmp_path / "empty.parquet")
    types = {name: str(schema.field(name).type).replace("element", "item") for name in schema.names}
    expected = {
        "key": "string", "series_number": "int64", "hu_mean": "double", "codes": "list<item: string>",
        "shape": "list<item: int64>", "spacing_mm": "list<item: double>", "audit": "string", "labels": "string",
    }  # fmt: skip
    assert {name: types[name] for name in expected} == expected
