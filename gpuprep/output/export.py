"""Exports the manifest as CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from gpuprep.errors import RequestError
from gpuprep.output.columns import SERIES, Kind
from gpuprep.output.records import SeriesResult

ROWS_AT_A_TIME = 1000


def write_csv(results: Iterable[SeriesResult], to: Path | None) -> None:
    """Write CSV like ``manifest.csv``: lists and objects are JSON in their cells."""
    with _opened(to, "w") as file:
        writer = csv.writer(file)
        writer.writerow(SERIES)
        for result in results:
            writer.writerow([SERIES[name].to_cell(value) for name, value in result.to_dict().items()])


def write_json_lines(results: Iterable[SeriesResult], to: Path | None) -> None:
    """Write JSON lines: one object per series."""
    with _opened(to, "w") as file:
        for result in results:
            file.write(json.dumps(result.to_dict()) + "\n")


def write_parquet(results: Iterable[SeriesResult], to: Path | None) -> None:
    """Write Parquet: numbers, text and lists have their own types; audit and labels are JSON text.

    Raises
    ------
    RequestError
        If pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise RequestError(f"Parquet needs pyarrow ({exc}): pip install 'gpuprep[parquet]'") from exc
    schema = pyarrow.schema([(name, _arrow_type(pyarrow, column.kind)) for name, column in SERIES.items()])
    with _opened(to, "wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for rows in _batched(results):
            plain = [
                {k: SERIES[k].to_cell(v) if SERIES[k].kind.nested else v for k, v in row.to_dict().items()}
                for row in rows
            ]
            writer.write_table(pyarrow.Table.from_pylist(plain, schema))


def _batched(results: Iterable[SeriesResult]) -> Iterator[tuple[SeriesResult, ...]]:
    rows = iter(results)
    while batch := tuple(islice(rows, ROWS_AT_A_TIME)):
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
