"""Converting as commands do: with what a person sees, a log if one is wanted, and an exit code at the end."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from gpuprep.cli.exit_codes import INTERRUPTED, complain, header_index, print_json
from gpuprep.errors import RequestError
from gpuprep.executors.signals import Stop, held_back

if TYPE_CHECKING:
    from gpuprep.core.recipe import Recipe


def run_conversion(
    paths: list[str], out: str, recipe: Recipe, masks: list[str] | Literal["auto"] | None, stop: Stop, *,
    backend: Any, jobs: int | None, index: str | None, log: Path | None, log_format: Literal["text", "json"],
    quiet: bool, json_: bool, memory_share: float | None = None, scheduler: str | None = None,
    report: bool = False, **how: Any,
) -> None:  # fmt: skip
    """Convert, show what happens as was asked for, and leave with the exit code."""
    with held_back():
        from gpuprep.cli.console import Complaints, Monitor, say, show_recipe, show_run
        from gpuprep.cli.run_log import Journal, Together
        from gpuprep.compute.backend import get_backend
        from gpuprep.compute.memory_estimate import USABLE
        from gpuprep.pipeline.cohort import convert
        from gpuprep.pipeline.events import Listener
        from gpuprep.report.html import write_report

    if quiet or json_:
        logging.getLogger("gpuprep").setLevel(logging.ERROR)
    started = time.perf_counter()
    if scheduler is None:
        chosen = get_backend(backend)
        backend, device = chosen.name, chosen.device
    else:
        device = f"whatever the workers of {scheduler} have"
    monitor: Any = nullcontext(Complaints() if quiet else Listener())
    if not (quiet or json_):
        show_recipe(recipe, device, how.get("engine", "operators"))
        monitor = Monitor()
    journal: Any = nullcontext(Listener()) if log is None else Journal.appending(log, log_format)
    with monitor as shown, journal as written:
        run = convert(
            paths, out, recipe, masks=masks, backend=backend,
            jobs=jobs_or_cores(jobs, backend), memory_share=USABLE if memory_share is None else memory_share,
            scheduler=scheduler, index=header_index(index), listener=Together(shown, written), stop=stop, **how,
        )  # fmt: skip
    page = write_report(out) if report else None
    if json_:
        print_json(
            {
                "counts": run.counts,
                "postponed": run.postponed,
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
            say(f"report in {page}")
    if run.exit_code == 3:
        what = "no CT series" if recipe.image else "no segmentation of a CT series"
        complain(f"{what} under {', '.join(paths)}")
    if run.stopped is not None:
        complain(INTERRUPTED)
    raise typer.Exit(run.exit_code)


def gpu_numbers(text: str | None) -> list[int] | None:
    """Return the GPUs that ``0,1`` means."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"--gpus {text!r}: give numbers separated by commas, such as 0,1") from None


def jobs_or_cores(jobs: int | None, backend: str) -> int | None:
    """Return one worker per core that this process may use; on a GPU, leave it to `batch`."""
    from gpuprep.executors.cores import usable_cores

    return jobs if jobs is not None or backend == "gpu" else usable_cores()
