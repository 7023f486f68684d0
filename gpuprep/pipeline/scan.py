"""Scans a cohort without converting it: what is there, what would happen to it, and what that would take."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gpuprep.compute.backend import Backend, BackendName, get_backend
from gpuprep.compute.memory_estimate import USABLE
from gpuprep.core.recipe import Recipe
from gpuprep.dicom.discover import Cohort
from gpuprep.executors.processes import FOR_HEADERS, WorkerDiedError
from gpuprep.executors.resources import Means, means_of
from gpuprep.output.manifest import Manifest, manifest_path
from gpuprep.output.object_store import at_hand, open_out, output_at, place_of
from gpuprep.output.records import DONE
from gpuprep.pipeline.convert_series import convert_series
from gpuprep.pipeline.decide import Needs, Outlook, outlooks
from gpuprep.pipeline.estimate import Experience, Forecast
from gpuprep.pipeline.events import Listener
from gpuprep.pipeline.job import task_of
from gpuprep.pipeline.match_masks import Matched
from gpuprep.pipeline.options import ConvertOptions, Paths, as_list
from gpuprep.pipeline.prepare import blank_forecast, check_apart, check_layout, check_names, matches_of, series_under


class Scan(NamedTuple):
    """What is under some paths, and what a run would make of it.

    Examples
    --------
    >>> cohort, outlooks, forecast = gpuprep.scan(".")  # an empty folder
    >>> len(cohort), outlooks, forecast.output_bytes
    (0, [], 0)
    """

    cohort: Cohort
    outlooks: list[Outlook]
    forecast: Forecast


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
    """Return what is under some paths and what would happen to each series; reads headers only, and writes no output.

    Parameters
    ----------
    paths : path or iterable of paths
        Folders or files.
    recipe : Recipe, optional
        The default recipe where absent.
    out : path, optional
        The output folder of earlier runs: what is complete there would be skipped.
    backend : {"auto", "cpu", "gpu"} or Backend
        Where it would be computed: what is needed depends on it.
    calibrate : bool
        Whether to convert one series into a temporary folder where `out` has no history to expect a time from.
    listener : Listener, optional
        Is told which segmentation goes where.
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
    >>> for outlook in gpuprep.scan("dicom").outlooks:
    ...     print(outlook.verdict, outlook.action, outlook.plan.target.shape)
    ok convert (36, 512, 512)
    """
    asked = ConvertOptions(recipe=recipe or Recipe(), backend=backend, **options)
    return scan_cohort(as_list(paths), asked, out, listener or Listener(), calibrate=calibrate)


def scan_cohort(
    paths: list[str],
    options: ConvertOptions,
    out: str | os.PathLike[str] | None,
    listener: Listener,
    *,
    calibrate: bool = False,
) -> Scan:
    """Look at a cohort as `scan` does."""
    if out is not None:
        check_apart(paths, place_of(out))
        check_layout(options.layout, out, options.recipe, options.shard)
    chosen = get_backend(options.backend) if isinstance(options.backend, str) else options.backend
    means = means_of([chosen], options.jobs, USABLE, None if calibrate else FOR_HEADERS)
    try:
        cohort = series_under(paths, options, out, means.executor)
        matches = matches_of(cohort, paths, options, means.executor, out)
        if matches is not None:
            listener.matched(matches)
        expected, forecast = _expected(cohort, matches, means, paths, options, out)
        _count(expected, forecast, means, options, calibrate=calibrate)
    finally:
        means.executor.stop()
    return Scan(cohort, expected, forecast)


def _expected(
    cohort: Cohort,
    matches: Matched | None,
    means: Means,
    paths: list[str],
    options: ConvertOptions,
    out: str | os.PathLike[str] | None,
) -> tuple[list[Outlook], Forecast]:
    """Return the outlook of every series, and a forecast without them; nothing is written into `out`."""
    recipe, names = options.recipe, options.names
    output, manifest = None, None
    with ExitStack() as opened:
        if out is not None:
            output, top = output_at(out), opened.enter_context(at_hand(out, manifest_path(Path()).name))
            if manifest_path(top).is_file():
                manifest = opened.enter_context(closing(Manifest(manifest_path(top), reading=True)))
                check_names(names, manifest, out)
        values = manifest.label_values() if manifest and matches and recipe.masks.layout == "labels" else {}
        share = [s for s in cohort if options.shard.has(s.public_uid)]
        expected = list(outlooks(cohort, share, paths, recipe, matches, values, output, manifest, names=names))
        return expected, blank_forecast(means, recipe, manifest, output)


def _count(
    expected: list[Outlook], forecast: Forecast, means: Means, options: ConvertOptions, *, calibrate: bool
) -> None:
    """Add each series to the forecast; where it has no history to go by, and may, try one."""
    todo: list[tuple[Needs, Outlook]] = []
    for outlook in expected:
        needs = outlook.needs(means.backend, options.engine)
        forecast.add(outlook, needs)
        if outlook.action == "convert":
            todo.append((needs, outlook))
    if calibrate and forecast.experience is None and todo:
        todo.sort(key=lambda found: found[0].voxels)
        forecast.experience = _tried(*todo[len(todo) // 2], means, options)


def _tried(needs: Needs, outlook: Outlook, means: Means, options: ConvertOptions) -> Experience | None:
    """Convert a series into a temporary folder, twice, since the first time includes what a worker loads; compare."""
    values = tuple((name, n) for n, (name, _) in enumerate(outlook.label_values, 1))  # nobody has given any yet
    plain = replace(options, names=None)
    outlook = replace(outlook, folder="trial", former=None, label_values=values)
    with tempfile.TemporaryDirectory() as folder, open_out(folder) as output:
        task = task_of(outlook, needs, plain, means.backend, output)
        for _ in range(2):
            outcomes = list(means.executor.run(convert_series, [task]))
            output.retire(task.folder, task.series.key)
    _, result = outcomes[0]
    if isinstance(result, WorkerDiedError) or result.status not in DONE:
        return None
    return Experience.of([result], options.recipe)
