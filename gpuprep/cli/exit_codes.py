"""Turns errors into one line and an exit code, and prints results as JSON to standard output."""

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
    """Turn errors into one line and an exit code; SIGINT and SIGTERM request a graceful stop by the yielded `Stop`."""
    stop = Stop(_announce_stop)
    signal.signal(signal.SIGINT, stop.interrupt)
    signal.signal(signal.SIGTERM, stop.interrupt)
    try:
        _check_current_folder()
        yield stop
    except GpuprepError as exc:
        print_error(str(exc))
        raise typer.Exit(exc.exit_code) from exc
    except OSError as exc:
        print_error(str(exc))
        raise typer.Exit(1) from exc
    except KeyboardInterrupt as exc:
        print_error(INTERRUPTED)
        raise typer.Exit(130) from exc


INTERRUPTED = "interrupted; completed outputs are kept: run the same command again to continue"


def _announce_stop() -> None:
    # Not by print, which the signal may have interrupted.
    with suppress(OSError):
        os.write(2, b"gpuprep: finishing the series in flight; interrupt again to end those that are not on disk yet\n")


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except OSError as exc:
        raise RequestError("the current folder no longer exists: change to another one") from exc


def print_error(text: str) -> None:
    """Print one line to standard error, without other modules, so that it works during an interrupted import."""
    with suppress(OSError):  # if standard error is closed, the exit code has to suffice
        print(f"gpuprep: {printable(text)}", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def ignore_closed_pipe() -> Iterator[None]:
    """Ignore it if the reader of standard output closes its pipe."""
    from gpuprep.cli.console import discard_output

    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output(sys.stdout)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    with ignore_closed_pipe():
        print(json.dumps(value, indent=1))  # noqa: T201


def header_index(given: str | None) -> Path | None:
    """Return the file of the header cache for the value of ``--index``; None for no cache."""
    if given == "none":
        return None
    if given is not None:
        return Path(given)
    from gpuprep.dicom.header_cache import default_index

    return default_index()
