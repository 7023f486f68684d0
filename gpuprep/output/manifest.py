"""Stores the result of every series and run of an output folder in an SQLite database."""

from __future__ import annotations

import csv
import os
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from gpuprep.core.shard import WHOLE_COHORT, Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.files.replacing import atomic_writer, flush
from gpuprep.output.columns import RUNS, SERIES, Column
from gpuprep.output.records import Entry, RunRecord, SeriesResult, State, now

_NAMES = ", ".join(SERIES)
_BY_SOURCE = "ORDER BY source, series_number, key"
Having = Literal["all", "new output", "image", "masks"]
_HAVING: dict[Having, str] = {
    "all": "",
    "new output": "WHERE folder != '' AND status IN ('ok', 'fixed')",
    "image": "WHERE folder != '' AND hu_mean IS NOT NULL",
    "masks": "WHERE folder != '' AND labels != '[]'",
}
FULL_DISK_WAITS_S = (0.1, 0.3, 1, 3)
"""Waits for space on a full disk: series that do not fit onto it free what they have written."""

_DISK_ERRORS = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR)
"""Errors of SQLite that the disk causes, not the content of the manifest."""


def manifest_path(out: Path, shard: Shard = WHOLE_COHORT) -> Path:
    """Return the path of the manifest of an output folder, or of a shard that is not merged yet."""
    return out / (f"manifest.{shard.name}.sqlite" if shard.name else "manifest.sqlite")


class Manifest:
    """The manifest of an output folder: one row per series with its latest result, and one per run.

    SQLite in WAL mode with one writer, so that others can read during a run. A kill loses at most the row being
    written, a power failure the last few rows; the next run then recognises their outputs by ``volume.json``.

    Parameters
    ----------
    path : path
        File of the database.
    reading : bool
        Open read-only: a run may be writing the file, or the disk may be read-only.

    Raises
    ------
    OutputError
        If the file cannot be opened or is not a manifest.
    """

    def __init__(self, path: Path, *, reading: bool = False) -> None:
        self.path = path
        self._run: int | None = None
        self._reading = reading
        with ExitStack() as opened:
            try:
                self._db = opened.enter_context(closing(_connected(path, reading)))
                have = self._prepared()
            except sqlite3.Error as exc:
                if getattr(exc, "sqlite_errorcode", 0) & 0xFF in _DISK_ERRORS:
                    raise OutputError(f"cannot write into {path.parent}: {exc}") from exc
                raise self._unusable(exc) from exc
            if not have:
                raise self._unusable(ValueError("it is empty"))
            added = [c for c in SERIES.values() if c.optional and c.name not in have]
            if {*have, *(c.name for c in added)} != set(SERIES):
                raise OutputError(f"{path} was written by another version of gpuprep: choose another --out")
            # An earlier version wrote it. If it is opened read-only, absent columns are read as NULL.
            self._absent = frozenset(c.name for c in added) if reading else frozenset()
            with self._writing():
                for c in () if reading else added:
                    self._db.execute(f"ALTER TABLE series ADD COLUMN {c.name} {c.kind.sqlite}")
            opened.pop_all()  # the connection stays open until `close`

    def _prepared(self) -> list[str]:
        """Create missing tables, and return the columns of the table of series."""
        if not self._reading:
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]  # before anything is written
            if found != "ok":
                raise sqlite3.DatabaseError(f"it is damaged: {found.splitlines()[-1]}")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            for table in _TABLES:
                self._db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        return [row[1] for row in self._db.execute("PRAGMA table_info(series)")]

    def _unusable(self, exc: Exception) -> OutputError:
        return OutputError(
            f"{self.path} cannot be used as manifest ({exc}): move it away, or choose another --out; without it, "
            "complete volumes are recognised by their volume.json and kept"
        )

    def _rows(self, query: str, *values: str | int) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a query; SQLite reports damage only when it reads the damaged page."""
        try:
            yield from self._db.execute(query, values)
        except sqlite3.Error as exc:
            raise self._unusable(exc) from exc

    def _selected(self, names: Collection[str]) -> str:
        """Return a column list for a query of series, with NULL for columns that an older manifest lacks."""
        return ", ".join(f"NULL AS {name}" if name in self._absent else name for name in names)

    def _cells(
        self, table: Mapping[str, Column], names: Collection[str], rest: str, *values: str | int
    ) -> Iterator[tuple[Any, ...]]:
        """Yield some columns of a table, checked, because SQLite does not enforce the types of its cells.

        Parameters
        ----------
        table : mapping of str to Column
            `SERIES` or `RUNS`.
        names : collection of str
            Columns to return.
        rest : str
            The rest of the query, from the name of the table on.
        *values
            Values of its placeholders.
        """
        columns = [table[name] for name in names]
        selected = self._selected(names) if table is SERIES else ", ".join(names)
        for row in self._rows(f"SELECT {selected} FROM {rest}", *values):  # noqa: S608
            try:
                yield tuple(column.from_cell(cell) for column, cell in zip(columns, row, strict=True))
            except (ValueError, RecursionError) as exc:
                raise self._unusable(exc) from exc

    def _results(self, rest: str, *values: str | int) -> Iterator[SeriesResult]:
        for row in self._cells(SERIES, SERIES, f"series {rest}", *values):
            yield SeriesResult(**dict(zip(SERIES, row, strict=True)))

    def put(self, result: SeriesResult) -> None:
        """Store the result of a series, which replaces its former one."""
        row = [column.to_cell(getattr(result, name)) for name, column in SERIES.items()]
        marks = ", ".join("?" * len(row))
        with self._writing():
            for wait_s in (*FULL_DISK_WAITS_S, None):
                try:
                    self._db.execute(f"INSERT OR REPLACE INTO series ({_NAMES}) VALUES ({marks})", row)  # noqa: S608
                    return
                except sqlite3.OperationalError as exc:
                    if exc.sqlite_errorcode != sqlite3.SQLITE_FULL or wait_s is None:
                        raise
                    time.sleep(wait_s)

    def remove(self, key: str) -> None:
        """Remove a series."""
        with self._writing():
            self._db.execute("DELETE FROM series WHERE key = ?", (key,))

    def get(self, key: str) -> SeriesResult | None:
        """Return the latest result of a series; None if there is none."""
        return next(self._results("WHERE key = ?", key), None)

    def entry(self, key: str) -> Entry | None:
        """Return the entry of a series; None if there is none."""
        row = next(self._cells(SERIES, Entry._fields, "series WHERE key = ?", key), None)
        return None if row is None else Entry(*row)

    def __iter__(self) -> Iterator[SeriesResult]:
        """Yield every result, sorted by source folder."""
        yield from self._results(_BY_SOURCE)

    def count(self) -> int:
        """Return the number of series."""
        # Not `__len__`, which would run a query for each truth test, and make an empty manifest false.
        return int(next(self._rows("SELECT count(*) FROM series"))[0])

    def examples(self, recipe_sha256: str, version: str, backend: str, most: int) -> Iterator[SeriesResult]:
        """Yield up to `most` series that were converted with a recipe, version and backend."""
        converted = "status IN ('ok', 'fixed') AND read_s + coalesce(masks_s, 0) > 0"
        alike = "recipe_sha256 = ? AND version = ? AND backend = ?"
        return self._results(f"WHERE {converted} AND {alike} LIMIT ?", recipe_sha256, version, backend, most)

    def columns(self, *names: str, of: Having = "all") -> Iterator[tuple[Any, ...]]:
        """Yield some columns of all series, or of those whose output has something, sorted by source folder."""
        return self._cells(SERIES, names, f"series {_HAVING[of]} {_BY_SOURCE}")

    def account(self, passed_over: Mapping[str, int], unreadable: Iterable[tuple[str, str]]) -> None:
        """Store the files of the latest scan that are no CT images or cannot be read."""
        with self._transaction():
            self._db.execute("DELETE FROM unreadable")
            self._db.execute("DELETE FROM passed_over")
            self._db.executemany("INSERT OR REPLACE INTO unreadable VALUES (?, ?)", unreadable)
            self._db.executemany("INSERT INTO passed_over VALUES (?, ?)", sorted(passed_over.items()))

    def account_segmentations(self, rows: Iterable[tuple[str, str, str, str, str]]) -> None:
        """Store the segmentations: path, format, how it was recognised, series, and the reason if it has none."""
        with self._transaction():
            self._db.execute("DELETE FROM segmentations")
            self._db.executemany("INSERT OR REPLACE INTO segmentations VALUES (?, ?, ?, ?, ?)", rows)

    def label_values(self, names: Iterable[str] = ()) -> dict[str, int]:
        """Return the label values of all structures, with new values for new names; a value is never reused."""
        values: dict[str, int] = dict(self._rows("SELECT name, value FROM label_values"))
        new = [name for name in dict.fromkeys(names) if name not in values]
        if not new:
            return values
        first = max(values.values(), default=0) + 1
        added = {name: first + n for n, name in enumerate(new)}
        with self._transaction():
            self._db.executemany("INSERT INTO label_values VALUES (?, ?)", added.items())
        return values | added

    def naming(self) -> str | None:
        """Return the mark of the key of the pseudonyms; "" if the names are those of the source; None: not set yet."""
        if next(self._rows("SELECT 1 FROM sqlite_master WHERE name = 'naming'"), None):
            marks = [mark for (mark,) in self._rows("SELECT mark FROM naming")]
            if marks:
                return str(marks[0])
        return "" if self.count() or self.last_run() else None  # versions without pseudonyms have no table

    def settle_naming(self, mark: str) -> None:
        """Set the mark of the key of the pseudonyms, which cannot be changed later."""
        with self._writing():
            self._db.execute("INSERT OR IGNORE INTO naming VALUES (?)", (mark,))

    def begin_run(self, run: RunRecord) -> None:
        """Store a run that begins."""
        with self._writing():
            marks = ", ".join("?" * len(RUNS))
            self._run = self._db.execute(
                f"INSERT OR REPLACE INTO runs ({', '.join(RUNS)}) VALUES ({marks})",  # noqa: S608
                list(asdict(run).values()),
            ).lastrowid

    def end_run(self, state: State) -> None:
        """Store the end of the run that `begin_run` stored, if any."""
        with self._writing():
            self._db.execute("UPDATE runs SET ended = ?, state = ? WHERE rowid = ?", (now(), state, self._run))

    def last_run(self) -> RunRecord | None:
        """Return the run that began last; None if there is none."""
        row = next(self._cells(RUNS, RUNS, "runs ORDER BY started DESC LIMIT 1"), None)
        return None if row is None else RunRecord(**dict(zip(RUNS, row, strict=True)))

    def finished_since(self, started: str) -> tuple[int, str]:
        """Return the number of series finished since a time, and the time of the last one."""
        count, last = next(
            self._rows("SELECT count(*), coalesce(max(finished), '') FROM series WHERE finished >= ?", started)
        )
        try:
            return count, SERIES["finished"].from_cell(last)
        except ValueError as exc:
            raise self._unusable(exc) from exc

    def unreadable(self) -> int:
        """Return the number of files that the latest scan could not read."""
        return int(next(self._rows("SELECT count(*) FROM unreadable"))[0])

    def take_over(self, other: Path, shard: Shard) -> None:
        """Copy another manifest into this one, replacing the rows of the series of a shard, in one transaction.

        It is on disk before this returns, so the other manifest may be removed.

        Raises
        ------
        OutputError
            If the other file is no manifest.
        RequestError
            If a structure has another label value there, or its pseudonyms have another key, so that its volumes and
            those of this manifest do not fit together.
        """
        with closing(Manifest(other, reading=True)) as there:  # checks its columns
            ours, theirs, columns = self.naming(), there.naming(), there._selected(SERIES)
        if None not in (ours, theirs) and ours != theirs:
            raise RequestError(
                f"{other} was made with other --names or another --key than {self.path.name}: give all shards the "
                "same; convert again into another --out"
            )
        self._db.create_function("belongs", 1, shard.has, deterministic=True)
        with self._writing():
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("ATTACH ? AS other", (os.fspath(other),))
            try:
                clash = self._db.execute(
                    "SELECT o.name, o.value, CASE WHEN l.name = o.name THEN l.value ELSE 'so has ' || l.name END "
                    "FROM label_values l JOIN other.label_values o ON (l.name = o.name) != (l.value = o.value)"
                ).fetchone()
                if clash:
                    name, theirs, ours = clash
                    raise RequestError(
                        f"{other}: {name} has label value {theirs}, and {ours} in {self.path.name}: shards of one "
                        "cohort must see all of it, and the same --masks; convert again into another --out"
                    )
                with self._transaction():
                    self._db.execute("DELETE FROM series WHERE belongs(series_uid)")
                    self._db.execute(
                        f"INSERT INTO series ({_NAMES}) SELECT {columns} FROM other.series WHERE belongs(series_uid)"  # noqa: S608
                    )
                    for table in ("unreadable", "passed_over", "segmentations", "label_values", "runs", "naming"):
                        self._db.execute(f"INSERT OR REPLACE INTO {table} SELECT * FROM other.{table}")  # noqa: S608
            finally:
                self._db.execute("DETACH other")
                self._db.execute("PRAGMA synchronous = NORMAL")

    def write_csv(self) -> None:
        """Write ``manifest.csv`` beside the manifest, atomically."""
        with self._writing(), atomic_writer(self.path.with_suffix(".csv")) as f:
            writer = csv.writer(f)
            writer.writerow(SERIES)
            writer.writerows(self._db.execute(f"SELECT {self._selected(SERIES)} FROM series {_BY_SOURCE}"))  # noqa: S608

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._writing():
            self._db.execute("BEGIN")
            try:
                yield
            except BaseException:
                with suppress(sqlite3.Error):  # what went wrong first is what counts
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as exc:
            raise OutputError(f"cannot write into {self.path.parent}: {exc}") from exc

    def close(self) -> None:
        """Let go of the file."""
        with closing(self._db):
            if not self._reading:
                # Without a log beside it, it can be read where nothing can be written. Somebody may be reading it now.
                with suppress(sqlite3.Error):
                    self._db.execute("PRAGMA journal_mode = DELETE")


def copy_manifest(file: Path, copy: Path) -> None:
    """Copy one moment of a manifest, whatever is being written into it meanwhile."""
    copy.unlink(missing_ok=True)
    with closing(sqlite3.connect(file)) as one, closing(sqlite3.connect(copy)) as other:
        one.backup(other)
        other.execute("PRAGMA journal_mode = DELETE")


def shards_of(out: Path) -> dict[Shard, Path]:
    """Return the manifests of shards in OUT that are not merged yet.

    Raises
    ------
    RequestError
        If they are shards of different divisions of the cohort.
    """
    found = {}
    for path in sorted(out.glob("manifest.*-of-*.sqlite")):
        with suppress(RequestError):
            found[Shard.parse(path.name.split(".")[1].replace("-of-", "/"))] = path
    if len({shard.count for shard in found}) > 1:
        names = ", ".join(shard.name for shard in found)
        raise RequestError(f"{out} holds shards of different divisions ({names}): keep those of one")
    return found


def merge(manifest: Manifest) -> list[Shard]:
    """Merge the manifests of shards beside a manifest into it, and remove them; the caller holds the lock of OUT."""
    shards = shards_of(manifest.path.parent)
    for shard, path in shards.items():
        manifest.take_over(path, shard)
        path.with_suffix(".csv").unlink(missing_ok=True)
        flush(path.parent)  # without the manifest, nothing would lead the next run to its CSV
        for file in (path, *path.parent.glob(f"{path.name}-*")):
            file.unlink(missing_ok=True)
    return list(shards)


def open_manifest(out: Path, shard: Shard = WHOLE_COHORT) -> Manifest:
    """Open the manifest of a run: that of OUT after merging its shards, or that of a shard, a copy of it at first.

    Raises
    ------
    OutputError, RequestError
        As `Manifest`; and if there are shards of another division of the cohort.
    """
    path, whole = manifest_path(out, shard), manifest_path(out)
    others = [other for other in shards_of(out) if other.count != shard.count] if shard.name else []
    if others:
        raise RequestError(f"{out} holds {others[0].name}, a shard of another division: gpuprep merge {out} first")
    fresh = not path.exists()
    with ExitStack() as opened:
        manifest = opened.enter_context(closing(Manifest(path)))
        if not shard.name:
            merge(manifest)
        elif fresh and whole.exists():
            manifest.take_over(whole, WHOLE_COHORT)
        opened.pop_all()  # the caller closes the manifest
    return manifest


def _connected(path: Path, reading: bool) -> sqlite3.Connection:
    if not reading:
        return sqlite3.connect(path, isolation_level=None)
    uri = path.absolute().as_uri()
    with closing(sqlite3.connect(f"{uri}?mode=ro", uri=True)) as db, suppress(sqlite3.OperationalError):
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return sqlite3.connect(f"{uri}?mode=ro", uri=True, isolation_level=None)
    # SQLite cannot create the index of its write-ahead log on a read-only disk; "immutable" does without it.
    return sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, isolation_level=None)


def _declared(table: Mapping[str, Column]) -> str:
    return ", ".join(f"{name} {column.kind.sqlite}" for name, column in table.items())


_TABLES = (
    f"series ({_declared(SERIES)}, PRIMARY KEY (key))",
    "unreadable (path TEXT PRIMARY KEY, reason TEXT)",
    "passed_over (kind TEXT PRIMARY KEY, files INTEGER)",
    "segmentations (path TEXT, format TEXT, why TEXT, series TEXT, reason TEXT, PRIMARY KEY (path, series))",
    "label_values (name TEXT PRIMARY KEY, value INTEGER UNIQUE)",
    f"runs ({_declared(RUNS)}, PRIMARY KEY (started, host, pid))",
    "naming (mark TEXT PRIMARY KEY)",
)
