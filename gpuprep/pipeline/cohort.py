"""Converts a cohort: prepares, executes and finishes a run, and records it in the manifest."""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from gpuprep._version import __version__
from gpuprep.compute.backend import check_engine
from gpuprep.core.formatting import printable
from gpuprep.core.plan import CROP_NOT_FOUND
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import FOLDER_UID_PREFIX
from gpuprep.executors.resources import choose_resources
from gpuprep.executors.signals import Stop
from gpuprep.files.filesystem import absolute
from gpuprep.output.manifest import Manifest, open_manifest
from gpuprep.output.nnunet import NnunetCases, arrange
from gpuprep.output.object_store import open_out, resolve_out
from gpuprep.output.records import DONE, RunRecord, SeriesResult, Status, now, this_host
from gpuprep.pipeline.estimate import Forecast
from gpuprep.pipeline.events import Listener, Results, Run, Tally
from gpuprep.pipeline.options import ConvertOptions, Paths, as_list, options_with
from gpuprep.pipeline.prepare import Prepared, RunContext, check_apart, check_layout, prepare
from gpuprep.pipeline.pseudonyms import crosswalk_row
from gpuprep.pipeline.retry import Attempts
from gpuprep.pipeline.selection_file import SelectionFile
from gpuprep.pipeline.task import Task

log = logging.getLogger(__name__)


def convert(
    paths: Paths,
    out: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    listener: Listener | None = None,
    stop: Stop | None = None,
    **options: Any,
) -> Run:
    """Convert every CT series under some paths into a folder of its own under `out`.

    A series is skipped, before its pixel data are read, if its output is complete and its input, recipe and gpuprep
    version are unchanged. A series that cannot be converted is recorded with the reason and never stops the others.

    Parameters
    ----------
    paths : path or iterable of paths
        Folders, searched to any depth, or files; as for `gpuprep.discover`.
    out : path
        Output folder, made if it does not exist. May be the URL of a folder in an object store, such as
        ``s3://bucket/folder``: see `gpuprep.output.object_store`.
    recipe : Recipe, optional
        The default recipe where absent. With ``image=False`` only masks are made.
    listener : Listener, optional
        Its methods are called as the run proceeds.
    stop : Stop, optional
        Set it to finish the series in flight and to begin no others.
    **options
        Fields of `gpuprep.ConvertOptions`: masks, backend, engine, jobs, gpus, scheduler, shard, layout, names, select,
        record, only, limit, limit_s, memory_share, room_check, index. And those of `gpuprep.Select`, which replace
        those of the recipe: where, best_per, prefer, drop_duplicates.

    Returns
    -------
    Run
        The result of every series; series that are unchanged since an earlier run have status "skipped".

    Raises
    ------
    RequestError
        If a path does not exist, `out` lies in an input, cannot be made or has too little room, or another run is
        writing into it.
    BackendError
        If the backend cannot run here.
    OutputError
        If the manifest, or another file about the run, cannot be written.
    KeyboardInterrupt
        On a second Ctrl-C. Completed outputs are kept; the next run converts the rest.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> recipe = gpuprep.Recipe(size=(64, 64), dtype="uint8", format="tif-stack")
    >>> run = gpuprep.convert("dicom", "out", recipe, backend="cpu")
    >>> run.counts, run.exit_code
    ({'ok': 1}, 0)
    >>> sorted(file.name for file in Path("out/dicom").iterdir())
    ['preview.jpg', 'volume.json', 'volume.tif']
    >>> gpuprep.convert("dicom", "out", recipe, backend="cpu").counts  # nothing has changed
    {'skipped': 1}
    """
    asked = options_with(recipe, options)
    return run_cohort(as_list(paths), out, asked, listener or Listener(), stop or Stop())


def run_cohort(
    paths: list[str], out: str | os.PathLike[str], options: ConvertOptions, listener: Listener, stop: Stop
) -> Run:
    """Convert a cohort as `convert` does."""
    if options.recipe.advice:
        log.warning("%s", options.recipe.advice)
    out = resolve_out(out)
    check_apart(paths, out)
    check_layout(options.layout, out, options.recipe, options.shard)
    resources = choose_resources(options.backend, options.gpus, options.scheduler, options.jobs, options.memory_share)
    if options.scheduler is None:  # a Dask worker may have other packages
        check_engine(resources.backend, options.engine)
    done = _Done()
    with open_out(out, options.shard) as output, closing(open_manifest(output.root, options.shard)) as manifest:
        context = RunContext(paths, out, options, resources, output, manifest, listener)
        try:
            prepared = prepare(context)
            _execute(context, prepared, stop, done)
            arranged = _finish(context, prepared, stop, done)
        except KeyboardInterrupt:
            manifest.end_run("interrupted")
            raise
        finally:
            resources.executor.stop()
            try:
                if options.names is not None and done.crosswalk:
                    options.names.write_crosswalk(done.crosswalk)
            finally:
                manifest.write_csv()
    run = _run(context, prepared, stop, done, arranged)
    listener.ended(run)
    return run


@dataclass(slots=True)
class _Done:
    """Series that a run has finished so far."""

    states: dict[str, Status] = field(default_factory=dict)
    """Status of each series, by its key."""
    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    crosswalk: dict[str, dict[str, str]] = field(default_factory=dict)
    """Rows of the crosswalk, by the key of the series, where pseudonyms are used."""

    def add(self, result: SeriesResult) -> None:
        """Add a result."""
        self.states[result.key] = result.status
        tally = self.tallies[result.status]
        tally.series += 1
        tally.slices += result.slices
        tally.files += result.files
        tally.bytes += result.bytes
        if result.crop is not None:
            tally.cropped += 1
            tally.cropped_shares += result.crop["share"]
        elif result.status in DONE and CROP_NOT_FOUND in result.codes:
            tally.not_cropped += 1


def _execute(context: RunContext, prepared: Prepared, stop: Stop, done: _Done) -> None:
    """Convert the planned series, and store the result of every series in the manifest."""
    options, manifest = context.options, context.manifest
    manifest.begin_run(_record(context, prepared.forecast))
    context.listener.planned(prepared.forecast)
    attempts = Attempts(context.resources.executor, context.output, prepared.forecast.disk_share, options.limit_s, stop)
    by_key = {s.key: s for s in prepared.cohort} if options.names else {}
    # Closed before the output folder is: an exception may leave series that are being moved into place.
    with stop.in_flight(), closing(_results(prepared, attempts, manifest)) as results:
        for result in results:
            done.add(result)
            if options.names is not None:
                done.crosswalk[result.key] = crosswalk_row(result, by_key[result.key])
            context.listener.finished(result)


def _finish(context: RunContext, prepared: Prepared, stop: Stop, done: _Done) -> NnunetCases | None:
    """Remove outputs of earlier divisions of the series, and arrange outputs for nnU-Net if that is asked for."""
    _forget_former_parts(context, prepared, done)
    context.manifest.end_run("interrupted" if stop.asked else "finished")
    if context.options.layout != "nnunet" or stop.asked:
        return None
    return arrange(context.output, context.manifest, context.options.recipe)


def _run(context: RunContext, prepared: Prepared, stop: Stop, done: _Done, arranged: NnunetCases | None) -> Run:
    cohort, matches, states = prepared.cohort, prepared.matches, done.states
    image = context.options.recipe.image
    return Run(
        results=Results(
            context.output.final_location(context.manifest.path.name),
            tuple(states),
            frozenset(key for key, status in states.items() if status == "skipped"),
        ),
        passed_over=cohort.passed_over,
        unreadable=cohort.unreadable,
        tallies=dict(done.tallies),
        found=len(cohort) if image or matches is None else sum(map(bool, matches.by_key.values())),
        postponed=prepared.postponed,
        unlisted=prepared.complaint,
        unmatched=matches.complaints if matches is not None else (),
        unused=matches.unused if matches is not None else (),
        stopped=prepared.series - len(states) if stop.asked else None,
        arranged=arranged,
    )


def _results(prepared: Prepared, attempts: Attempts, manifest: Manifest) -> Generator[SeriesResult, None, None]:
    """Store the result of each series in the manifest and yield it: those that are not converted first."""
    for key in prepared.skipped:
        former = manifest.get(key)
        assert former is not None  # noqa: S101 - only series of the manifest are skipped
        yield replace(former, status="skipped")
    for task in prepared.left_out:
        yield _store(manifest, task.left_out(), task)
    for task, result in attempts.of(iter(prepared.tasks)):
        yield _store(manifest, result, task)


def _forget_former_parts(context: RunContext, prepared: Prepared, done: _Done) -> None:
    """Remove outputs of series that are now divided into other volumes, once all of those are complete.

    Outputs of series that lie elsewhere than under the paths of this run are kept: they may be unchanged there.
    """
    parts: dict[str, list[str]] = defaultdict(list)
    # Series that are now grouped by UID, and were by folder, or the reverse.
    regrouped: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for series in prepared.cohort:
        if series.series_uid:
            parts[series.public_uid].append(series.key)
            regrouped[printable(series.folder), not series.public_uid.startswith(FOLDER_UID_PREFIX)].append(series.key)
    roots = [printable(absolute(path)) for path in context.paths]
    formers = list(context.manifest.columns("key", "series_uid", "source", "folder"))
    folders = {folder for key, _, _, folder in formers if key in done.states}
    for key, uid, source, folder in formers:
        now_there = parts.get(uid) or regrouped.get((source, uid.startswith(FOLDER_UID_PREFIX)), [])
        seen = any(source == root or source.startswith(root.rstrip("/") + "/") for root in roots)
        if not now_there or not seen or key in now_there:
            continue
        if all(done.states.get(part) in DONE for part in now_there):
            if folder and folder not in folders:
                context.output.remove_output(folder, key)
            context.manifest.remove(key)


def _store(manifest: Manifest, result: SeriesResult, task: Task) -> SeriesResult:
    """Store a result in the manifest, without UIDs where pseudonyms are used, and return it.

    A former output in another folder is removed once the new one is complete. If the series failed this time, the
    former output stays, and a warning of the result names its folder.
    """
    former = manifest.entry(result.key)
    if former is not None and former.folder and not result.folder and task.output.holds(former.folder):
        note = f"the output of an earlier run is still in {former.folder}"
        result = replace(result, folder=former.folder, warnings=(*result.warnings, note))
    # Before the new row, because until then the former one names the folder, if the run ends here.
    if former is not None and former.folder and former.folder != result.folder:
        task.output.remove_output(former.folder, result.key)
    manifest.put(task.public(result))
    return result


def _record(context: RunContext, forecast: Forecast) -> RunRecord:
    """Return the record of a run that begins, without the paths of its inputs where pseudonyms are used."""
    options, backend = context.options, context.resources.backend
    masks = options.masks
    asked = {
        "paths": [absolute(p) for p in context.paths],
        "masks": masks if masks is None or masks == "auto" else [absolute(p) for p in masks],
        "engine": options.engine,
        "layout": options.layout,
        "select": absolute(options.select.path) if isinstance(options.select, SelectionFile) else None,
        "record": sorted(options.record),
    }
    return RunRecord(
        started=now(),
        host=this_host(),
        pid=os.getpid(),
        version=__version__,
        recipe_sha256=options.recipe.sha256,
        device=backend.device or backend.name,
        series=forecast.series,
        skipped=forecast.skipped,
        todo=forecast.todo,
        request=json.dumps({} if options.names else asked),
    )
