"""gpuprep: converts a whole cohort, as users run it, and returns the time of each stage."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import Any

import gpuprep
from bench.compare.contenders import AbsentError
from gpuprep.compute.backend import Engine
from gpuprep.core.recipe import Recipe
from gpuprep.errors import BackendError
from gpuprep.output.records import DONE
from gpuprep.pipeline.estimate import Forecast
from gpuprep.pipeline.events import Listener, Run

STAGES = ("read", "process", "write", "upload", "kernels", "download")
"""Stages of a series, with times in `<stage>_s` of `SeriesResult`. The last three, on a device, overlap the others."""


class _Clock(Listener):
    """Records the time until the scan ends and conversion begins, and the predicted memory."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.planned_s = 0.0
        self.largest_bytes = 0
        self.at_rest_bytes = 0
        self.workers = 0

    def planned(self, forecast: Forecast) -> None:
        self.planned_s = time.perf_counter() - self.started
        self.largest_bytes, self.at_rest_bytes = forecast.largest_bytes, forecast.at_rest_bytes
        self.workers = forecast.workers


def convert_all(
    folders: list[Path],
    out: Path,
    *,
    recipe: dict[str, Any],
    engine: Engine = "operators",
    gpu: bool = False,
    jobs: int | None = None,
    index: str | None = None,
) -> dict[str, Any]:
    """Convert a cohort; return the output folder of each series, times of the stages, number of workers, and device."""
    clock = _Clock()
    try:
        run = gpuprep.convert(
            folders,
            out,
            Recipe.from_dict(recipe),
            backend="gpu" if gpu else "cpu",
            engine=engine,
            jobs=jobs,
            index=index,
            listener=clock,
        )
    except BackendError as exc:
        raise AbsentError(str(exc)) from exc
    unfinished = [f"{Path(r.source).name} {r.status}: {r.reason}" for r in run.results if r.status not in DONE]
    if unfinished or len(run.results) != len(folders):
        raise RuntimeError("; ".join(unfinished) or f"{len(run.results)} results for {len(folders)} series")
    return {
        "outputs": {Path(r.source).name: r.folder for r in run.results},
        "split": _split(run, clock.planned_s),
        "workers": clock.workers,
        "device": run.results[0].device,
        "predicted_process_bytes": None if gpu else clock.at_rest_bytes + clock.largest_bytes,
    }


def _split(run: Run, scan_s: float) -> dict[str, float]:
    """Return the mean seconds of each stage per series, and the seconds of the scan of the cohort."""
    split = {"scan_s": scan_s}
    for stage in STAGES:
        times = [getattr(r, f"{stage}_s", None) for r in run.results]
        known = [t for t in times if t is not None]
        if known:
            split[f"{stage}_s"] = fmean(known)
    return split
