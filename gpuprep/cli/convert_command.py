"""Runs a conversion for a command: shows its progress, writes its log, and exits with its exit code."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import typer

from gpuprep.cli.exit_codes import INTERRUPTED, print_error, print_json
from gpuprep.executors.signals import Stop, signals_blocked

if TYPE_CHECKING:
    from gpuprep.compute.backend import BackendName
    from gpuprep.pipeline.options import ConvertOptions


def run_conversion(
    paths: list[str],
    out: str,
    options: ConvertOptions,
    stop: Stop,
    *,
    log: Path | None,
    log_format: Literal["text", "json"],
    quiet: bool,
    json_: bool,
    report: bool = False,
) -> None:
    """Convert, print or log progress as the flags ask for, and exit with the exit code of the run."""
    with signals_blocked():
        from gpuprep.cli.console import Monitor, ProblemPrinter, print_line, show_recipe, show_run
        from gpuprep.cli.run_log import EventLog, Listeners
        from gpuprep.compute.backend import get_backend
        from gpuprep.pipeline.cohort import run_cohort
        from gpuprep.pipeline.events import Listener
        from gpuprep.report.html import write_report

    if quiet or json_:
        logging.getLogger("gpuprep").setLevel(logging.ERROR)
    started = time.perf_counter()
    if options.scheduler is None and isinstance(options.backend, str):
        chosen = get_backend(options.backend)
        options = replace(options, backend=cast("BackendName", chosen.name))
        device = chosen.device
    else:
        device = f"chosen by each worker of {options.scheduler}"
    monitor: Any = nullcontext(ProblemPrinter() if quiet else Listener())
    if not (quiet or json_):
        show_recipe(options.recipe, device, options.engine)
        monitor = Monitor()
    event_log: Any = nullcontext(Listener()) if log is None else EventLog.appending(log, log_format)
    with monitor as console_listener, event_log as log_listener:
        run = run_cohort(paths, out, options, Listeners(console_listener, log_listener), stop)
    page = write_report(out) if report else None
    if json_:
        print_json(
            {
                "counts": run.counts,
                "postponed": run.postponed,
                "unlisted": run.unlisted,
                "stopped": run.stopped,
                "passed_over": run.passed_over,
                "unreadable": run.unreadable,
                "unmatched": run.unmatched,
                "unused": run.unused,
                "arranged": run.arranged and run.arranged._asdict(),
                "seconds": round(time.perf_counter() - started, 3),
                "series": [r.to_dict() for r in run.results],
            }
        )
    elif not quiet:
        show_run(run, out, time.perf_counter() - started)
        if page is not None:
            print_line(f"report in {page}")
    if run.exit_code == 3:
        missing = "no CT series" if options.recipe.image else "no segmentation of a CT series"
        print_error(f"{missing} under {', '.join(paths)}")
    if run.stopped is not None:
        print_error(INTERRUPTED)
    raise typer.Exit(run.exit_code)
