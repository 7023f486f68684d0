"""Scans a cohort without converting it: its series, their verdicts, and the resources of a run."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpuprep.compute.backend import Backend, BackendName, get_backend
from gpuprep.compute.memory_estimate import USABLE_SHARE
from gpuprep.core.recipe import Recipe
from gpuprep.dicom.discover import Cohort
from gpuprep.executors.fork_server import HEADER_MODULES
from gpuprep.executors.processes import WorkerDiedError
from gpuprep.executors.resources import Resources, local_resources
from gpuprep.output.export import arrow_table, data_frame
from gpuprep.output.manifest import Manifest, manifest_path
from gpuprep.output.object_store import local_copies, open_out, output_for_reading, resolve_out
from gpuprep.output.records import DONE
from gpuprep.pipeline.choose import Choice, choose
from gpuprep.pipeline.convert_series import convert_series
from gpuprep.pipeline.decide import planned_series
from gpuprep.pipeline.estimate import Experience, Forecast
from gpuprep.pipeline.events import Listener
from gpuprep.pipeline.match_masks import Matched
from gpuprep.pipeline.options import ConvertOptions, Paths, as_list, options_with
from gpuprep.pipeline.planned_series import PlannedSeries
from gpuprep.pipeline.prepare import blank_forecast, check_apart, check_layout, check_names, matches_of, series_under
from gpuprep.pipeline.scan_rows import SCAN_COLUMNS, scan_row
from gpuprep.pipeline.task import Task


@dataclass(frozen=True, slots=True)
class Scan:
    """Result of a scan.

    Examples
    --------
    >>> found = gpuprep.scan(".")  # an empty folder
    >>> len(found.cohort), found.planned, found.forecast.output_bytes
    (0, [], 0)
    """

    cohort: Cohort
    planned: list[PlannedSeries]
    """Each series, with what a run would do with it."""
    forecast: Forecast
    unlisted: str = ""
    """Phrase about lines of the file of the selection without a series; "" if there are none."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per series, with the columns of ``gpuprep scan --csv``."""
        return [scan_row(planned) for planned in self.planned]

    def to_arrow(self) -> Any:
        """Return the rows as a table of pyarrow.

        Raises
        ------
        RequestError
            If pyarrow is not installed.
        """
        return arrow_table(self.rows(), SCAN_COLUMNS)

    def to_pandas(self) -> Any:
        """Return the rows as a data frame of pandas.

        Raises
        ------
        RequestError
            If pyarrow or pandas is not installed.
        """
        return data_frame(self.to_arrow())


def scan(
    paths: Paths,
    recipe: Recipe | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    backend: BackendName | Backend = "cpu",
    calibrate: bool = False,
    listener: Listener | None = None,
    **options: Any,
) -> Scan:
    """Return the series under some paths and what `convert` would do with each; reads headers only, writes no output.

    Parameters
    ----------
    paths : path or iterable of paths
        Folders or files.
    recipe : Recipe, optional
        The default recipe where absent.
    out : path, optional
        The output folder of earlier runs: series that are complete and unchanged there would be skipped.
    backend : {"auto", "cpu", "gpu"} or Backend
        Computes the volumes; the memory that they need depends on it.
    calibrate : bool
        Whether to convert one series into a temporary folder to estimate the time, where `out` has no earlier run.
    listener : Listener, optional
        Its method `matched` is called with the segmentations of each series.
    **options
        Others of `ConvertOptions`. Without `jobs`, headers are read in this process.

    Raises
    ------
    RequestError
        As `convert` raises.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> for planned in gpuprep.scan("dicom").planned:
    ...     print(planned.verdict, planned.action, planned.plan.target.shape)
    ok convert (36, 512, 512)
    """
    asked = options_with(recipe, {**options, "backend": backend})
    return scan_cohort(as_list(paths), asked, out, listener or Listener(), calibrate=calibrate)


def scan_cohort(
    paths: list[str],
    options: ConvertOptions,
    out: str | os.PathLike[str] | None,
    listener: Listener,
    *,
    calibrate: bool = False,
) -> Scan:
    """Scan a cohort as `scan` does."""
    if out is not None:
        check_apart(paths, resolve_out(out))
        check_layout(options.layout, out, options.recipe, options.shard)
    chosen = get_backend(options.backend) if isinstance(options.backend, str) else options.backend
    resources = local_resources([chosen], options.jobs, USABLE_SHARE, None if calibrate else HEADER_MODULES)
    try:
        cohort = series_under(paths, options, out, resources.executor)
        matches = matches_of(cohort, paths, options, resources.executor, out)
        if matches is not None:
            listener.matched(matches)
        choice = choose(cohort, options, matches, resources.executor)
        planned, forecast = _planned(cohort, choice, matches, resources, paths, options, out)
        for one in planned:
            forecast.add(one)
        todo = [one for one in planned if one.action == "convert"]
        if calibrate and forecast.experience is None and todo:
            todo.sort(key=lambda one: one.needs.voxels)
            forecast.experience = _experience(todo[len(todo) // 2], resources, options)
    finally:
        resources.executor.stop()
    return Scan(cohort, planned, forecast, choice.complaint)


def _planned(
    cohort: Cohort,
    choice: Choice,
    matches: Matched | None,
    resources: Resources,
    paths: list[str],
    options: ConvertOptions,
    out: str | os.PathLike[str] | None,
) -> tuple[list[PlannedSeries], Forecast]:
    """Return what would be done with every series, and a forecast without series; nothing is written into `out`."""
    recipe, names = options.recipe, options.names
    output, manifest = None, None
    with ExitStack() as opened:
        if out is not None:
            output, top = output_for_reading(out), opened.enter_context(local_copies(out, manifest_path(Path()).name))
            if manifest_path(top).is_file():
                manifest = opened.enter_context(closing(Manifest(manifest_path(top), reading=True)))
                check_names(names, manifest, out)
        values = manifest.label_values() if manifest and matches and recipe.masks.layout == "labels" else {}
        share = [s for s in cohort if options.shard.has(s.public_uid)]
        planned = planned_series(
            cohort, share, paths, options, resources.backend, choice, matches, values, output, manifest
        )
        return list(planned), blank_forecast(resources, recipe, manifest, output)


def _experience(planned: PlannedSeries, resources: Resources, options: ConvertOptions) -> Experience | None:
    """Convert a series twice into a temporary folder, and return the experience of the second time; None if it fails.

    The first time includes what a worker imports and compiles.
    """
    values = tuple((name, n) for n, (name, _) in enumerate(planned.label_values, 1))  # a cohort has no values yet
    planned = replace(planned.for_worker(), folder="trial", former=None, label_values=values)
    with tempfile.TemporaryDirectory() as folder, open_out(folder) as output:
        task = Task(
            planned=planned, recipe=options.recipe, engine=options.engine, backend=resources.backend, output=output
        )
        for _ in range(2):
            outcomes = list(resources.executor.run(convert_series, [task]))
            output.remove_output(planned.folder, planned.series.key)
    _, result = outcomes[0]
    if isinstance(result, WorkerDiedError) or result.status not in DONE:
        return None
    return Experience.of([result], options.recipe)
