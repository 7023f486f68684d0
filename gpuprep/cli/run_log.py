"""Writes the log of a run: one line per event, as text or JSON, without names of patients.

Lines have series keys and numbers. Names of files and folders, and messages, which contain them, are only in the
manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, Self

from gpuprep.dicom.discover import Cohort
from gpuprep.errors import RequestError
from gpuprep.output.records import SeriesResult, now
from gpuprep.pipeline.estimate import Forecast
from gpuprep.pipeline.events import Listener, Run
from gpuprep.pipeline.match_masks import Matched

Format = Literal["text", "json"]


class EventLog(Listener):
    """Listener that writes events to a file, line by line."""

    def __init__(self, file: IO[str], format_: Format) -> None:
        self._file = file
        self._format = format_

    @classmethod
    @contextmanager
    def appending(cls, path: Path, format_: Format) -> Iterator[Self]:
        """Open a log that appends to a file.

        Raises
        ------
        RequestError
            If the file cannot be written.
        """
        try:
            file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as exc:
            raise RequestError(f"cannot write the log {path}: {exc.strerror}") from exc
        with file:
            yield cls(file, format_)

    def scanned(self, cohort: Cohort) -> None:
        others = sum(cohort.passed_over.values())
        self._write("scanned", {"series": len(cohort), "unreadable": len(cohort.unreadable), "passed_over": others})

    def matched(self, matched: Matched) -> None:
        counts = {"unmatched": len(matched.complaints), "unused": len(matched.unused)}
        self._write("matched", {"series": len(matched.by_key), **counts})

    def planned(self, forecast: Forecast) -> None:
        self._write("planned", forecast.to_dict())

    def finished(self, result: SeriesResult) -> None:
        facts = {
            "series": result.key,
            "codes": list(result.codes),
            "slices": result.slices,
            "files": result.files,
            "bytes": result.bytes,
            "seconds": round(result.read_s + result.process_s + result.write_s, 3),
            "device": result.device,
            "host": result.host,
        }
        self._write(result.status, facts, "error" if result.status in ("rejected", "failed") else "info")

    def ended(self, run: Run) -> None:
        self._write("ended", {"exit_code": run.exit_code, **run.counts})

    def _write(self, event: str, facts: Mapping[str, Any], level: str = "info") -> None:
        if self._format == "json":
            line = json.dumps({"time": now(), "level": level, "event": event, **facts})
        else:
            pairs = " ".join(f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in facts.items())
            line = f"{now()} {level:5} {event:9} {pairs}"
        self._file.write(line + "\n")


class Listeners(Listener):
    """Listener that passes each event on to several others."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def scanned(self, cohort: Cohort) -> None:
        for listener in self._listeners:
            listener.scanned(cohort)

    def matched(self, matched: Matched) -> None:
        for listener in self._listeners:
            listener.matched(matched)

    def planned(self, forecast: Forecast) -> None:
        for listener in self._listeners:
            listener.planned(forecast)

    def finished(self, result: SeriesResult) -> None:
        for listener in self._listeners:
            listener.finished(result)

    def ended(self, run: Run) -> None:
        for listener in self._listeners:
            listener.ended(run)
