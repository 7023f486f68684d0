"""Exports rows of series as CSV, JSON lines, Parquet, or tables of pyarrow and pandas."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from gpuprep.errors import RequestError
from gpuprep.output.columns import Column, Kind

ROWS_AT_A_TIME = 1000

Rows = Iterable[Mapping[str, Any]]
"""Rows with the values of each column, by its name."""
Columns = Mapping[str, Column]


def write_csv(rows: Rows, columns: Columns, to: Path | None) -> None:
    """Write CSV like ``manifest.csv``: lists and objects are JSON in their cells. None: to standard output."""
    with _opened(to, "w") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([column.to_cell(row[name]) for name, column in columns.items()])


def write_json_lines(rows: Rows, to: Path | None) -> None:
    """Write JSON lines: one object per series."""
    with _opened(to, "w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def write_parquet(rows: Rows, columns: Columns, to: Path | None) -> None:
    """Write Parquet: numbers, text and lists have their own types; objects are JSON text.

    Raises
    ------
    RequestError
        If pyarrow is not installed.
    """
    pyarrow = _pyarrow("Parquet")
    schema = _schema(columns)
    with _opened(to, "wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for batch in _batched(rows):
            writer.write_table(arrow_table(batch, columns))


def arrow_table(rows: Rows, columns: Columns) -> Any:
    """Return rows as a table of pyarrow, with the types of `write_parquet`.

    Raises
    ------
    RequestError
        If pyarrow is not installed.
    """
    pyarrow = _pyarrow("a table")
    plain = [{k: c.to_cell(row[k]) if c.kind.nested else row[k] for k, c in columns.items()} for row in rows]
    return pyarrow.Table.from_pylist(plain, _schema(columns))


def data_frame(table: Any) -> Any:
    """Return a table of pyarrow as a data frame of pandas.

    Raises
    ------
    RequestError
        If pandas is not installed.
    """
    try:
        return table.to_pandas()
    except ImportError as exc:
        raise RequestError(f"a data frame needs pandas ({exc}): pip install pandas") from exc


def _pyarrow(what: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise RequestError(f"{what} needs pyarrow ({exc}): pip install 'gpuprep[parquet]'") from exc
    return pyarrow


def _schema(columns: Columns) -> Any:
    pyarrow = _pyarrow("a table")
    return pyarrow.schema([(name, _arrow_type(pyarrow, column.kind)) for name, column in columns.items()])


def _batched(rows: Rows) -> Iterator[list[Mapping[str, Any]]]:
    left = iter(rows)
    while batch := list(islice(left, ROWS_AT_A_TIME)):
        yield batch


def _arrow_type(pyarrow: Any, kind: Kind) -> Any:
    """Return the Arrow type of a column."""
    one = pyarrow.type_for_alias(kind.arrow)
    return pyarrow.list_(one) if kind.is_arrow_list else one


@contextmanager
def _opened(to: Path | None, mode: str) -> Iterator[IO[Any]]:
    """Open a file for writing; None: standard output."""
    if to is None:
        yield sys.stdout if mode == "w" else sys.stdout.buffer
        return
    try:
        text: dict[str, Any] = {"encoding": "utf-8", "newline": ""} if mode == "w" else {}
        file: IO[Any] = to.open(mode, **text)
    except OSError as exc:
        raise RequestError(f"cannot write {to}: {exc.strerror}") from exc
    with file:
        yield file
