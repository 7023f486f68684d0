"""Evaluates conditions and orders of the user over the columns of series, as SQL in an SQLite database in memory.

SQLite itself parses the expressions. They can read the columns of one table and call the listed functions, nothing
else, and are ended after a number of steps.

References
----------
SQLite: sqlite.org/c3ref/set_authorizer.html, sqlite.org/security.html.
"""

from __future__ import annotations

import difflib
import re
import sqlite3
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from gpuprep.core.select_options import Select
from gpuprep.errors import RequestError
from gpuprep.output.columns import FACTS, NUMBER, SERIES, Column

KNOWN_COLUMNS: dict[str, Column] = {
    **{name: SERIES[name] for name in ("key", "series_uid", "study_uid", "series_number", "source", "slices")},
    "verdict": Column("verdict", SERIES["status"].kind, 'Verdict of the headers: "ok", "fixed" or "rejected".'),
    "codes": SERIES["codes"],
    **FACTS,
}
"""Columns that are known before a conversion, by name."""

FUNCTIONS = (
    "abs", "avg", "coalesce", "count", "glob", "ifnull", "iif", "instr", "length", "like", "lower", "ltrim", "max",
    "min", "nullif", "round", "rtrim", "sign", "substr", "sum", "total", "trim", "upper",
)  # fmt: skip
"""Functions that an expression may call."""
_OWN_FUNCTIONS = ("row_number", "first_value")
_OWN_COLUMNS = ("group", "candidate", "ROWID", "place", "best")
_NUMBER = Column("", NUMBER, "")

STEPS_PER_ROW, FIRST_STEPS = 2_000, 2_000_000
"""Limit of the steps of SQLite's virtual machine: an ordinary expression takes less than 100 per series."""
_STEPS_AT_A_TIME = 10_000
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 10,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
}


WHERE, PREFER = "--where", "--prefer"
"""Flags of the expressions, for messages."""


def check_select(select: Select) -> None:
    """Raise a RequestError if an expression is invalid, before anything is read."""
    if select.where is None and select.prefer is None:
        return
    with closing(SeriesTable()) as table:
        if select.where is not None:
            table.columns_of(select.where, WHERE)
        if select.prefer is not None:
            table.check_order(select.prefer, PREFER)


class Ranked(NamedTuple):
    """A series that another one of its group was preferred to."""

    key: str
    best: str
    """Key of the preferred series."""


class SeriesTable:
    """A table of series, one row each, that is read by the expressions of the user.

    Parameters
    ----------
    rows : iterable of mapping
        Values by the names of `KNOWN_COLUMNS`, and ``group`` for `worse_ones`.

    Raises
    ------
    RequestError
        From its methods: an expression is invalid, reads or does what it may not, or takes too many steps.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._db = sqlite3.connect(":memory:", isolation_level=None)
        declared = ", ".join(f'"{name}" {column.kind.sqlite}' for name, column in KNOWN_COLUMNS.items())
        self._db.execute(f'CREATE TABLE series ({declared}, "group" TEXT, candidate INTEGER DEFAULT 1)')
        names = [*KNOWN_COLUMNS, "group"]
        marks = ", ".join("?" * len(names))
        columns = ", ".join(f'"{name}"' for name in names)
        self._db.executemany(
            f"INSERT INTO series ({columns}) VALUES ({marks})",  # noqa: S608
            ([_cell(row, name) for name in names] for row in rows),
        )
        self._count = self._db.execute("SELECT count(*) FROM series").fetchone()[0]
        self._read: set[str] = set()
        """Columns that the expression reads."""
        self._readable: Container[str] = KNOWN_COLUMNS
        for limit, value in _LIMITS.items():
            self._db.setlimit(limit, value)

    def close(self) -> None:
        """Discard the table."""
        self._db.close()

    def columns_of(self, expression: str, flag: str) -> list[str]:
        """Return the columns that a condition reads, in the order of `KNOWN_COLUMNS`; `flag` names it in messages."""
        with self._reading(flag, expression):
            # Once alone and once in parentheses, so that it can be nothing but an expression.
            for condition in (expression, f"({expression}\n)"):
                self._db.execute(f"EXPLAIN SELECT 1 FROM series WHERE {condition}\n")  # noqa: S608
            return [name for name in KNOWN_COLUMNS if name in self._read]

    def check_order(self, terms: str, flag: str) -> None:
        """Raise unless `terms` is a list of terms as after ORDER BY."""
        for term in order_terms(terms):
            if (match := re.fullmatch(r"-\s*(\w+)", term)) and KNOWN_COLUMNS.get(match[1], _NUMBER).kind.cell is str:
                raise RequestError(f"{flag} {terms!r}: {match[1]} is text: give {match[1]} DESC")
        with self._reading(flag, terms):
            self._db.execute(f"EXPLAIN SELECT 1 FROM series ORDER BY {terms}\n")  # noqa: S608
        with self._reading(flag, terms, _OWN_COLUMNS):
            self._db.execute(f"EXPLAIN {_worse(terms)}")

    def values(self, expression: str, flag: str) -> Iterator[tuple[str, bool | None]]:
        """Yield the key of each series and whether a condition is true; None: unknown, as a value is absent."""
        self.columns_of(expression, flag)
        with self._reading(flag, expression):
            rows = self._db.execute(f"SELECT key, ({expression}\n) IS TRUE, ({expression}\n) IS NULL FROM series")  # noqa: S608
            found = [(str(key), None if unknown else bool(true)) for key, true, unknown in rows]
        yield from found

    def keep(self, keys: Iterable[str]) -> None:
        """Let only these series take part in `worse_ones`."""
        self._db.execute("UPDATE series SET candidate = 0")
        self._db.executemany("UPDATE series SET candidate = 1 WHERE key = ?", ((key,) for key in keys))

    def worse_ones(self, terms: str, flag: str) -> list[Ranked]:
        """Return the series that are not the first of their group; sound series come before rejected ones."""
        with self._reading(flag, terms, _OWN_COLUMNS):
            return [Ranked(*row) for row in self._db.execute(_worse(terms))]

    @contextmanager
    def _reading(self, flag: str, expression: str, others: Iterable[str] = ()) -> Iterator[None]:
        """Allow nothing but reading the known columns, and some others; turn errors of SQLite into a RequestError."""
        for name in _QUOTED.findall(expression):  # SQLite takes a quoted name for text if there is no such column
            if name and name.replace('""', '"') not in KNOWN_COLUMNS:
                raise RequestError(f"{flag} {expression!r}: {_unknown(name)}; text is put in single quotes")
        steps = 0
        most = (FIRST_STEPS + STEPS_PER_ROW * self._count) // _STEPS_AT_A_TIME

        def one_more() -> bool:
            nonlocal steps
            steps += 1
            return bool(steps > most)

        self._read.clear()
        self._readable = {*KNOWN_COLUMNS, *others}
        self._db.set_progress_handler(one_more, _STEPS_AT_A_TIME)
        self._db.set_authorizer(self._permit)
        try:
            yield
        except (sqlite3.Error, sqlite3.Warning, ValueError) as exc:
            raise RequestError(f"{flag} {expression!r}: {_in_words(exc)}") from exc
        finally:
            self._db.set_authorizer(None)
            self._db.set_progress_handler(None, 0)

    def _permit(self, action: int, one: str | None, two: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_SELECT:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ and one in ("series", "") and (not two or two in self._readable):
            self._read.add(two or "")
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION and (two or "").lower() in FUNCTIONS + _OWN_FUNCTIONS:
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY


def _worse(terms: str) -> str:
    wanted = (term if _WITH_NULLS.search(term) else f"{term} NULLS LAST" for term in order_terms(terms))
    order = f"verdict = 'rejected', {', '.join(wanted)}, rowid"
    return (
        "SELECT key, best FROM (SELECT key, row_number() OVER w AS place, first_value(key) OVER w AS best FROM series "  # noqa: S608
        f'WHERE candidate = 1 AND "group" IS NOT NULL WINDOW w AS (PARTITION BY "group" ORDER BY {order}\n)) '
        "WHERE place > 1"
    )


_TERM = re.compile(r"""--.*|/\*.*?\*/|[^,()'"/-]+|'(?:[^']|'')*'|"(?:[^"]|"")*"|.""", re.DOTALL)
"""A comment, a text, a quoted name, or what is between them."""
_QUOTED = re.compile(r"""--.*|/\*.*?\*/|'(?:[^']|'')*'|"((?:[^"]|"")*)\"""", re.DOTALL)
"""Finds quoted names, after what may contain quotation marks of other meaning."""
_WITH_NULLS = re.compile(r"\s+NULLS\s+(FIRST|LAST)\s*$", re.IGNORECASE)


def order_terms(terms: str) -> list[str]:
    """Return the terms of an ORDER BY, which commas outside parentheses and quotes separate, without comments."""
    found, depth = [""], 0
    for part in _TERM.findall(terms):
        depth += {"(": 1, ")": -1}.get(part, 0)
        if part == "," and depth == 0:
            found.append("")
        elif not part.startswith(("--", "/*")):
            found[-1] += part
    return [term.strip() for term in found]


def _cell(row: Mapping[str, Any], name: str) -> Any:
    value = row[name]
    return KNOWN_COLUMNS[name].to_cell(value) if name in KNOWN_COLUMNS else value


def _unknown(name: str) -> str:
    """Return that there is no such column, with the nearest ones."""
    near = difflib.get_close_matches(name.lower(), list(KNOWN_COLUMNS), n=3, cutoff=0.5)
    nearest = f"; the nearest are {', '.join(near)}" if near else ""
    return f"there is no column {name!r}{nearest} (gpuprep scan --columns lists them all)"


def _in_words(exc: Exception) -> str:
    """Return what is wrong with an expression, and what to do."""
    text = str(exc)
    if match := re.fullmatch(r"no such column: (.*)", text):
        return _unknown(match[1])
    if match := re.fullmatch(r"(?:no such function|not authorized to use function): (.*)", text):
        return f"it may not call {match[1]}, only {', '.join(FUNCTIONS)}"
    if "not authorized" in text or "prohibited" in text or "no such table" in text:
        return "it may only read the columns of series: gpuprep scan --columns lists them"
    if "interrupted" in text:
        return "it takes too many steps: give a simpler expression"
    if "one statement" in text or "incomplete" in text or "syntax error" in text or "unrecognized token" in text:
        return f"it is no expression of SQL ({text})"
    return text
