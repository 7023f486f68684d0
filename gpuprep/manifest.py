"""What happened to one series: the record that workers send home and the manifest keeps."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from gpuprep.errors import OutputError
from gpuprep.output import write_text

Status = Literal["ok", "fixed", "skipped", "rejected", "failed"]
"""ok: converted. fixed: converted, and what was irregular put right. skipped: complete and unchanged since an earlier
run. rejected: what is on disk cannot be converted truthfully. failed: something went wrong on the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesResult:
    """One line of the manifest."""

    key: str
    """Series Instance UID, with ``#part`` where one UID stands for several stacks."""
    series_uid: str
    study_uid: str
    series_number: int | None
    source: str
    """Folder the slices lie in."""
    status: Status
    reason: str = ""
    """Why it was rejected or failed: "Error: text"."""
    codes: tuple[str, ...] = ()
    """Why it was rejected, or what was irregular, for programs: "gap", "tilt", …"""
    irregularities: tuple[str, ...] = ()
    """What was irregular and what was done about it, for people."""
    warnings: tuple[str, ...] = ()
    slices: int = 0
    source_shape: tuple[int, int, int] | None = None
    source_spacing_mm: tuple[float, float, float] | None = None
    hu_min: float | None = None
    """Of the stacked series, before padding is replaced."""
    hu_max: float | None = None
    hu_mean: float | None = None
    padding_share: float | None = None
    """Of the voxels of the stack."""
    audit: dict[str, Any] | None = None
    """What was measured on the headers: see `Audit.to_dict`."""
    segmentations: tuple[dict[str, Any], ...] | None = None
    """Files that masks were made of, each with its format and by what that was recognised."""
    labels: tuple[dict[str, Any], ...] | None = None
    """Structures, each with its value and file, and voxels and ml before and after resampling: see `Label`."""
    folder: str = ""
    """Relative to OUT."""
    shape: tuple[int, int, int] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    files: int = 0
    bytes: int = 0
    read_s: float = 0.0
    process_s: float = 0.0
    write_s: float = 0.0
    upload_s: float | None = None
    """Of the device's time; the device works while the host reads and writes."""
    kernels_s: float | None = None
    download_s: float | None = None
    masks_s: float | None = None
    engine: str = ""
    backend: str = ""
    device: str = ""
    fingerprint: str = ""
    """Of the input: see `Series.fingerprint`."""
    recipe_sha256: str = ""
    version: str = ""
    finished: str = ""
    """UTC, ISO 8601."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def now() -> str:
    """Return the time for `SeriesResult.finished`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


_COLUMNS = [f.name for f in fields(SeriesResult)]
_NAMES = ", ".join(_COLUMNS)
_ROWS = f"SELECT {_NAMES} FROM series "  # noqa: S608
"""In this order, whatever the order of an older manifest."""
_BY_SOURCE = "ORDER BY source, series_number, key"
_LISTS = (
    "codes",
    "irregularities",
    "warnings",
    "source_shape",
    "source_spacing_mm",
    "shape",
    "spacing_mm",
    "segmentations",
    "labels",
)
_JSON = (*_LISTS, "audit")


class Manifest:
    """The record of truth of an output folder: one row per series, the last thing that happened to it.

    SQLite in WAL mode: readers may look while a run writes, and a kill at any moment loses at most the row in flight.

    Raises
    ------
    OutputError
        If the file cannot be opened or is not a manifest.
    """

    def __init__(self, path: Path) -> None:
        self._csv = path.with_suffix(".csv")
        columns = ", ".join(f"{f.name} {_type(f)}" for f in fields(SeriesResult))
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"CREATE TABLE IF NOT EXISTS series ({columns}, PRIMARY KEY (key))")
            self._db.execute("CREATE TABLE IF NOT EXISTS unreadable (path TEXT PRIMARY KEY, reason TEXT)")
            self._db.execute("CREATE TABLE IF NOT EXISTS passed_over (kind TEXT PRIMARY KEY, files INTEGER)")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS segmentations "
                "(path TEXT, format TEXT, why TEXT, series TEXT, reason TEXT, PRIMARY KEY (path, series))"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS label_values (name TEXT PRIMARY KEY, value INTEGER UNIQUE)")
            have = [row[1] for row in self._db.execute("PRAGMA table_info(series)")]
        except sqlite3.Error as exc:
            raise OutputError(
                f"{path} cannot be used as manifest ({exc}): move it away, or choose another --out"
            ) from exc
        added = [f for f in fields(SeriesResult) if f.default is None and f.name not in have]
        if set(have) | {f.name for f in added} != set(_COLUMNS):
            raise OutputError(f"{path} was written by another version of gpuprep: choose another --out")
        with self._writing():
            for f in added:  # by a version that knows more than the one that wrote it
                self._db.execute(f"ALTER TABLE series ADD COLUMN {f.name} {_type(f)}")

    def put(self, result: SeriesResult) -> None:
        """Store a result in place of the series' former one."""
        row = [json.dumps(v) if k in _JSON and v is not None else v for k, v in asdict(result).items()]
        marks = ", ".join("?" * len(_COLUMNS))
        with self._writing():
            self._db.execute(f"INSERT OR REPLACE INTO series ({_NAMES}) VALUES ({marks})", row)  # noqa: S608

    def remove(self, key: str) -> None:
        """Forget a series."""
        with self._writing():
            self._db.execute("DELETE FROM series WHERE key = ?", (key,))

    def get(self, key: str) -> SeriesResult | None:
        """Return the last result of a series."""
        row = self._db.execute(_ROWS + "WHERE key = ?", (key,)).fetchone()
        return None if row is None else _result(row)

    def __iter__(self) -> Iterator[SeriesResult]:
        """Yield every result, by source folder."""
        for row in self._db.execute(_ROWS + _BY_SOURCE):
            yield _result(row)

    def account(self, passed_over: dict[str, int], unreadable: tuple[tuple[str, str], ...]) -> None:
        """Store what the last scan found beside CT images."""
        with self._writing():
            self._db.execute("BEGIN")
            self._db.execute("DELETE FROM unreadable")
            self._db.execute("DELETE FROM passed_over")
            self._db.executemany("INSERT OR REPLACE INTO unreadable VALUES (?, ?)", unreadable)
            self._db.executemany("INSERT INTO passed_over VALUES (?, ?)", sorted(passed_over.items()))
            self._db.execute("COMMIT")

    def account_segmentations(self, rows: Iterable[tuple[str, str, str, str, str]]) -> None:
        """Store what became of each segmentation: path, format, why it was taken for it, series, why it has none."""
        with self._writing():
            self._db.execute("BEGIN")
            self._db.execute("DELETE FROM segmentations")
            self._db.executemany("INSERT OR REPLACE INTO segmentations VALUES (?, ?, ?, ?, ?)", rows)
            self._db.execute("COMMIT")

    def label_values(self, names: Iterable[str] = ()) -> dict[str, int]:
        """Return the label value of every structure ever seen, new ones counted on: a value never changes hands."""
        values: dict[str, int] = dict(self._db.execute("SELECT name, value FROM label_values"))
        new = [name for name in dict.fromkeys(names) if name not in values]
        if not new:
            return values
        first = max(values.values(), default=0) + 1
        with self._writing():
            added = {name: first + n for n, name in enumerate(new)}
            self._db.execute("BEGIN")
            self._db.executemany("INSERT INTO label_values VALUES (?, ?)", added.items())
            self._db.execute("COMMIT")
        return values | added

    def write_csv(self) -> None:
        """Write ``manifest.csv`` beside the manifest, complete or not at all."""
        with self._writing():
            text = io.StringIO()
            writer = csv.writer(text)
            writer.writerow(_COLUMNS)
            writer.writerows(self._db.execute(_ROWS + _BY_SOURCE))
            write_text(self._csv, text.getvalue())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as exc:
            raise OutputError(f"cannot write into {self._csv.parent}: {exc}") from exc

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()


def _type(field: Field[Any]) -> str:
    types = {"int": "INTEGER", "float": "REAL"}
    return types.get(str(field.type).removesuffix(" | None"), "TEXT")


def _result(row: tuple[Any, ...]) -> SeriesResult:
    values = dict(zip(_COLUMNS, row, strict=True))
    for k in _JSON:
        value = values[k] and json.loads(values[k])
        values[k] = tuple(value) if k in _LISTS and value is not None else value
    return SeriesResult(**values)
