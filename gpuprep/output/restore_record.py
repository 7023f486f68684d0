"""Records what became of each prediction of a folder in ``restored.csv``, from which a later run sees what is done."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from filelock import FileLock, Timeout

from gpuprep.errors import RequestError
from gpuprep.files.replacing import atomic_writer

RECORD = "restored.csv"

Verdict = Literal["restored", "skipped", "passed over", "unmatched", "failed"]
"""restored; skipped: complete and unchanged; passed over: another file has the same prediction; unmatched: no output
has such a name; failed: with a reason."""


@dataclass(frozen=True, slots=True)
class RestoredRow:
    """What became of one prediction."""

    prediction: str
    """Path below the folder of predictions."""
    verdict: Verdict
    reason: str = ""
    notes: str = ""
    """Remarks about a result, such as slices that NIfTI cannot place."""
    output: str = ""
    """Folder of the output below OUT."""
    result: str = ""
    """Path below the folder of results."""
    made_of: str = ""
    """Identity of the prediction and of ``volume.json``, and the settings."""
    result_identity: str = ""
    """Size and modification time of the result; "" if there is none."""

    def public(self) -> dict[str, str]:
        """Return the row without what only a later run needs."""
        return {name: value for name, value in asdict(self).items() if name not in ("made_of", "result_identity")}


COLUMNS = tuple(field.name for field in fields(RestoredRow))


class RestoreRecord:
    """The record in a folder of results. Rows are appended as they come, so they survive the end of a run.

    Parameters
    ----------
    folder : Path
        Folder of results.

    Raises
    ------
    RequestError
        If another run writes into that folder.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / RECORD
        self._lock = FileLock(folder / f".{RECORD}.lock")
        try:
            self._lock.acquire(blocking=False)
        except Timeout as exc:
            raise RequestError(
                f"another gpuprep is writing into {folder}: wait for it, or choose another --out"
            ) from exc
        self.former = {row.prediction: row for row in _rows(self._file)}
        self._rows: dict[str, RestoredRow] = {}
        self._write(self.former.values())  # without the torn last row of a run that was killed
        self._appended: Any = None

    def __enter__(self) -> Self:
        self._appended = open(self._file, "a", encoding="utf-8", errors="surrogateescape", newline="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._appended.close()
        self._lock.release()

    def add(self, row: RestoredRow) -> None:
        """Append a row."""
        self._rows[row.prediction] = row
        csv.writer(self._appended).writerow(asdict(row).values())
        self._appended.flush()

    def finish(self) -> None:
        """Write the rows of a complete run alone, in the order of their names."""
        self._write(row for _, row in sorted(self._rows.items()))

    def _write(self, rows: Iterable[RestoredRow]) -> None:
        with atomic_writer(self._file, errors="surrogateescape") as f:
            writer = csv.writer(f)
            writer.writerow(COLUMNS)
            writer.writerows(asdict(row).values() for row in rows)


def _rows(file: Path) -> list[RestoredRow]:
    """Return the complete rows of a record; none if it is damaged, so that all is done again."""
    with (
        suppress(OSError, csv.Error, KeyError, UnicodeError),
        open(file, encoding="utf-8", errors="surrogateescape", newline="") as f,
    ):
        found = [row for row in csv.DictReader(f) if None not in row.values()]
        return [RestoredRow(**{name: row[name] for name in COLUMNS}) for row in found]  # type: ignore[arg-type]
    return []
