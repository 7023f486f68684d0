"""Turns errors into one line and an exit code, and prints results to standard output."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

from gpuprep.core.formatting import printable
from gpuprep.errors import GpuprepError, RequestError
from gpuprep.executors.signals import Stop


@contextmanager
def errors_to_exit_codes() -> Iterator[Stop]:
    """Turn errors into one clear line and an exit code; Ctrl-C and SIGTERM utter the wish to stop that is given."""
    stop = Stop(_tell_of_stopping)
    signal.signal(signal.SIGINT, stop.interrupt)
    signal.signal(signal.SIGTERM, stop.interrupt)
    try:
        _check_folder()
        yield stop
    except GpuprepError as exc:
        complain(str(exc))
        raise typer.Exit(exc.exit_code) from exc
    except OSError as exc:
        complain(str(exc))
        raise typer.Exit(1) from exc
    except KeyboardInterrupt as exc:
        complain(INTERRUPTED)
        raise typer.Exit(130) from exc


INTERRUPTED = "interrupted; what is finished stays, and the same command goes on from there"


def _tell_of_stopping() -> None:
    # Not by print, which the signal may have come in the middle of.
    with suppress(OSError):
        os.write(2, b"gpuprep: finishing what is in flight; once more stops now\n")


def _check_folder() -> None:
    try:
        os.getcwd()
    except OSError as exc:
        raise RequestError("the current folder no longer exists: go to another one") from exc


def complain(text: str) -> None:
    """Print one line of error; by itself, so that it works in the middle of an import."""
    with suppress(OSError):  # where nobody listens, the exit code has to do
        print(f"gpuprep: {printable(text)}", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Have it be no error if whoever reads standard output has seen enough."""
    from gpuprep.cli.console import mute

    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        mute(sys.stdout)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    with readers_may_leave():
        print(json.dumps(value, indent=1))  # noqa: T201


def print_csv(rows: list[dict[str, Any]]) -> None:
    """Print dicts as lines of a table; what they hold within becomes columns of its own, and lists JSON."""
    import csv

    flat = [
        {k: v for k, v in row.items() if k != "audit"} | {f"audit_{k}": v for k, v in (row["audit"] or {}).items()}
        for row in rows
    ]
    with readers_may_leave():
        writer = csv.DictWriter(sys.stdout, list(dict.fromkeys(k for row in flat for k in row)))
        writer.writeheader()
        for row in flat:
            writer.writerow({k: json.dumps(v) if isinstance(v, list | tuple | dict) else v for k, v in row.items()})


def header_index(given: str | None) -> Path | None:
    """Return where headers are kept between scans; None where that is not wanted."""
    if given == "none":
        return None
    if given is not None:
        return Path(given)
    from gpuprep.dicom.header_cache import default_index

    return default_index()
