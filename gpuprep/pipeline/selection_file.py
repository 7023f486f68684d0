"""Reads a file that lists the series to convert: a CSV, such as `gpuprep scan --csv` writes, or a list of UIDs."""

from __future__ import annotations

import csv
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from gpuprep.core.formatting import first_few, format_count, printable
from gpuprep.core.series import Series
from gpuprep.errors import RequestError
from gpuprep.files.filesystem import absolute

UID_COLUMNS = ("series_uid", "SeriesInstanceUID", "Series Instance UID", "Series UID", "series")
PATH_COLUMNS = ("source", "folder", "path")

LARGEST_BYTES = 2**30
"""Upper limit of the size of the file."""

_UID = re.compile(r"[0-9]+(\.[0-9]+){2,}")


class OutputName(NamedTuple):
    """Names of an output folder that the file gives; "" for none."""

    split: str
    """Folder in OUT that contains it, such as "train"."""
    case: str


@dataclass(frozen=True, slots=True)
class SelectionFile:
    """Series that a file lists: by key, by UID, or by folder."""

    path: str
    keys: dict[str, OutputName] = field(default_factory=dict)
    uids: dict[str, OutputName] = field(default_factory=dict)
    folders: dict[str, OutputName] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Return the content of a file.

        A CSV has a header that names a column ``key``, one of `UID_COLUMNS` or one of `PATH_COLUMNS`; the first that is
        not empty counts for a row. It may have the columns ``split`` and ``case``. Of any other file, lines that are a
        UID count, as in manifests of TCIA.

        Raises
        ------
        RequestError
            If it cannot be read, lists no series, or gives one series two names.
        """
        name = os.fspath(path)
        try:
            status = Path(path).stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_BYTES:  # reading a pipe would block
                raise RequestError(f"--select {name}: give a file of up to {LARGEST_BYTES} bytes")
            text = Path(path).read_text("utf-8-sig")
        except OSError as exc:
            raise RequestError(f"--select {name}: {exc.strerror}") from exc
        except UnicodeDecodeError as exc:
            raise RequestError(f"--select {name} is no text in UTF-8: {exc}") from exc
        except ValueError as exc:  # a path with a zero byte
            raise RequestError(f"--select {printable(name)}: {exc}") from exc
        found = cls(name)
        lines = text.splitlines()
        try:
            rows = list(_rows(text))
        except csv.Error as exc:
            raise RequestError(f"--select {name} is no CSV: {exc}") from exc
        if not rows:
            rows = [("uids", line.strip(), OutputName("", "")) for line in lines if _UID.fullmatch(line.strip())]
        for kind, value, output in rows:
            table: dict[str, OutputName] = getattr(found, kind)
            if unnamed := [given for given in output if given and not given.strip("/. ")]:
                raise RequestError(f"--select {name}: {unnamed[0]!r} is no name for the output of {printable(value)}")
            if table.setdefault(value, output) != output:
                raise RequestError(f"--select {name} lists {printable(value)} twice, with different names")
        if not rows:
            raise RequestError(
                f"--select {name} lists no series: give a CSV with a column key, series_uid or source, "
                "or a UID per line"
            )
        return found

    def chosen(self, cohort: Iterable[Series]) -> tuple[dict[str, OutputName], str]:
        """Return the names of the listed series, by key, and a phrase about lines without a series, "" for none."""
        names: dict[str, OutputName] = {}
        used: set[tuple[str, str]] = set()
        for series in cohort:
            places = [printable(series.folder), series.folder, *_parents(series.folder)]
            for kind, values in (
                ("keys", [series.key, series.own_key]),
                ("uids", [series.series_uid]),
                ("folders", places),
            ):
                table: dict[str, OutputName] = getattr(self, kind)
                hits = [value for value in values if value in table]
                used.update((kind, value) for value in hits)
                if hits:
                    names.setdefault(series.key, table[hits[0]])
        unused = [
            value for kind in ("keys", "uids", "folders") for value in getattr(self, kind) if (kind, value) not in used
        ]
        what = f"{format_count(len(unused), 'line')} of {self.path} without a series: {first_few(unused)}"
        return names, printable(what) if unused else ""


def _rows(text: str) -> Iterator[tuple[str, str, OutputName]]:
    """Yield the rows of a CSV: kind of the value, value, and names of the output; nothing if it is no CSV.

    A scan with a choice also writes the series that it leaves out, which are no part of the choice.
    """
    delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
    given = {_plain(column): column for column in reader.fieldnames or ()}
    columns = [
        (kind, given[_plain(column)])
        for kind, names in (("keys", ("key",)), ("uids", UID_COLUMNS), ("folders", PATH_COLUMNS))
        for column in names
        if _plain(column) in given
    ]
    if not columns:
        return
    for row in reader:
        values = ((kind, (row[column] or "").strip()) for kind, column in columns)
        kind, value = next(((kind, value) for kind, value in values if value), ("", ""))
        action, split, case = (
            (row[given[name]] or "").strip() if name in given else "" for name in ("action", "split", "case")
        )
        if value and action != "exclude":
            yield kind, absolute(value) if kind == "folders" else value, OutputName(split, case)


def _plain(column: str) -> str:
    return re.sub(r"[^a-z]", "", column.lower())


def _parents(folder: str) -> Iterator[str]:
    while (parent := os.path.dirname(folder)) != folder:
        yield parent
        folder = parent
