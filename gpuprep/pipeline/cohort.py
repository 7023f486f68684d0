"""The cohort: what is there, what has to be done, doing it, and the record of it."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

from gpuprep._version import __version__
from gpuprep.compute.backend import Backend, BackendName, Engine, checked_engine, get_backend
from gpuprep.compute.memory_estimate import USABLE
from gpuprep.core.formatting import printable
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import FOLDER_UID, Series
from gpuprep.core.shard import WHOLE, Shard
from gpuprep.dicom.audit import audit
from gpuprep.dicom.discover import Cohort, discover
from gpuprep.dicom.headers import Contents
from gpuprep.errors import OutputError, RequestError
from gpuprep.executors.processes import (
    FOR_HEADERS,
    Executor,
    WorkerDiedError,
    answers,
)
from gpuprep.executors.resources import Means, chosen_means, means_of
from gpuprep.executors.signals import Stop
from gpuprep.files.filesystem import absolute, given, resolved
from gpuprep.output.folder_store import Output
from gpuprep.output.manifest import (
    DONE,
    Manifest,
    RunRecord,
    SeriesResult,
    Status,
    manifest_path,
    now,
    open_manifest,
    shards_of,
    this_host,
)
from gpuprep.output.nnunet import Layout, arrange, check
from gpuprep.output.object_store import at_hand, open_out, output_at, place_of
from gpuprep.pipeline.convert_series import Task, convert_series
from gpuprep.pipeline.decide import Outlook, outlooks
from gpuprep.pipeline.estimate import Experience, Forecast, experience
from gpuprep.pipeline.events import Listener, Results, Run, Tally
from gpuprep.pipeline.job import Work, doubtful_files, patients_of, placed, task_of, work_on
from gpuprep.pipeline.match_masks import Matched, matched, used_names
from gpuprep.pipeline.pseudonyms import Pseudonyms, crosswalk_row, planned_row
from gpuprep.pipeline.retry import Attempts

log = logging.getLogger(__name__)

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class Scan(NamedTuple):
    """What is under some paths, and what a run would make of it."""

    cohort: Cohort
    outlooks: list[Outlook]
    forecast: Forecast


def scan(
    paths: Paths,
    recipe: Recipe | None = None,
    *,
    masks: Paths | None = None,
    out: str | os.PathLike[str] | None = None,
    backend: BackendName | Backend = "cpu",
    engine: Engine = "operators",
    index: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    shard: Shard = WHOLE,
    layout: Layout = "folders",
    names: Pseudonyms | None = None,
    calibrate: bool = False,
    listener: Listener | None = None,
) -> Scan:
    """Return what is under some paths and what would happen to each series; reads headers only, and writes no output.

    Parameters
    ----------
    paths : path or iterable of paths
        Folders or files.
    recipe : Recipe, optional
        The default recipe where absent.
    masks : path, iterable of paths or "auto", optional
        As for `convert`.
    out : path, optional
        The output folder of earlier runs: what is complete there would be skipped.
    backend, engine, shard, layout, names
        As for `convert`: what is needed depends on them.
    index : path, optional
        As for `gpuprep.discover`.
    jobs : int, optional
        Processes that read headers, and that would convert; absent: this one.
    calibrate : bool
        Whether to convert one series into a temporary folder where `out` has no history to expect a time from.
    listener : Listener, optional
        Is told which segmentation goes where.
    """
    recipe = recipe or Recipe()
    recipe.check_installed()
    paths = _listed(paths)
    if out is not None:
        _check_apart(paths, place_of(out))
        _check_layout(layout, out, recipe, shard)
    chosen = get_backend(backend) if isinstance(backend, str) else backend
    means = means_of([chosen], jobs, USABLE, None if calibrate else FOR_HEADERS)
    try:
        cohort = _renamed(_discover(paths, recipe, out, index, means.executor), names)
        matches = _matched(cohort, paths, recipe, masks, means.executor, out)
        if matches is not None and listener is not None:
            listener.matched(matches)
        expected, forecast = _expected(
            cohort, matches, means, paths, recipe, out, engine=engine, shard=shard, names=names, calibrate=calibrate
        )
    finally:
        means.executor.stop()
    return Scan(cohort, expected, forecast)


def _expected(
    cohort: Cohort,
    matches: Matched | None,
    means: Means,
    paths: list[str],
    recipe: Recipe,
    out: str | os.PathLike[str] | None,
    *,
    engine: Engine,
    shard: Shard,
    names: Pseudonyms | None,
    calibrate: bool,
) -> tuple[list[Outlook], Forecast]:
    """Return the outlook of every series, and what a run would take; nothing is written into `out`."""
    output, manifest = None, None
    with ExitStack() as opened:
        if out is not None:
            output, top = output_at(out), opened.enter_context(at_hand(out, manifest_path(Path()).name))
            if manifest_path(top).is_file():
                manifest = opened.enter_context(closing(Manifest(manifest_path(top), reading=True)))
                _check_names(names, manifest, out)
        values = manifest.label_values() if manifest and matches and recipe.masks.layout == "labels" else {}
        share = [s for s in cohort if shard.has(s.public_uid)]
        expected = list(outlooks(cohort, share, paths, recipe, matches, values, output, manifest, names=names))
        forecast = _forecast(means, recipe, manifest, output)
    todo = []
    for outlook in expected:
        needs = outlook.needs(means.backend, engine)
        forecast.add(outlook, needs)
        if outlook.action == "convert":
            todo.append(work_on(outlook, needs))
    if calibrate and forecast.experience is None and todo:
        todo.sort(key=lambda work: work.needs.voxels)
        forecast.experience = _trial(todo[len(todo) // 2], means, recipe, engine)
    return expected, forecast


def _trial(work: Work, means: Means, recipe: Recipe, engine: Engine) -> Experience | None:
    """Convert a series into a temporary folder, twice, since the first time includes what a worker loads; compare."""
    values = tuple((name, n) for n, (name, _) in enumerate(work.label_values, 1))  # nobody has given any yet
    work = replace(work, folder="trial", label_values=values)
    with tempfile.TemporaryDirectory() as folder, open_out(folder) as output:
        for _ in range(2):
            task = task_of(work, recipe=recipe, engine=engine, backend=means.backend, output=output, doubtful={})
            outcomes = list(means.executor.run(convert_series, [task]))
            output.retire(work.folder, work.series.key)
    _, result = outcomes[0]
    if isinstance(result, WorkerDiedError) or result.status not in DONE:
        return None
    return Experience.of([result], recipe)


def convert(
    paths: Paths,
    out: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    masks: Paths | None = None,
    backend: BackendName | Backend = "auto",
    engine: Engine = "operators",
    jobs: int | None = None,
    gpus: Sequence[int] | None = None,
    scheduler: str | None = None,
    shard: Shard = WHOLE,
    layout: Layout = "folders",
    names: Pseudonyms | None = None,
    only: Collection[Status] | None = None,
    limit: int | None = None,
    limit_s: float | None = None,
    memory_share: float = USABLE,
    room_check: bool = True,
    index: str | os.PathLike[str] | None = None,
    listener: Listener | None = None,
    stop: Stop | None = None,
) -> Run:
    """Convert every CT series under some paths into a folder of its own under `out`.

    A series whose output is complete, and whose input, recipe and gpuprep version are unchanged since, is skipped
    before anything of it is decoded. A bad series is recorded with its reason and never stops the others.

    Parameters
    ----------
    paths : path or iterable of paths
        Folders, searched to any depth, or files; as for `gpuprep.discover`.
    out : path
        Where outputs and the manifest go; made if need be. May be the URL of a folder in an object store, such as
        ``s3://bucket/folder``: see `gpuprep.output.object_store`.
    recipe : Recipe, optional
        The default recipe where absent. With ``image=False`` only masks are made.
    masks : path, iterable of paths or "auto", optional
        Segmentation files, or folders of them, to make masks of; "auto": what DICOM objects and LIDC XML there are
        among the inputs. Absent: none.
    backend : {"auto", "cpu", "gpu"} or Backend
        Where to compute.
    engine : {"operators", "ndimage"}
        How to compute.
    jobs : int, optional
        Series at a time, in a process each. Absent: on the CPU one after the other in this process, on a GPU as many as
        its memory and the cores allow. Few of them work on the GPU at any one time; the others read and write.
    gpus : sequence of int, optional
        GPUs to use; absent: all. A process sees one of them.
    scheduler : str, optional
        Address of a Dask scheduler whose workers convert, or "local" for `jobs` workers of Dask on this machine. They
        must see the same paths.
    shard : Shard, optional
        The part of the cohort that this run converts; others may convert theirs at the same time into the same `out`.
        The manifest is that shard's until all are merged.
    layout : {"folders", "nnunet"}
        "nnunet": at its end, unless it is stopped, the run also arranges all that this recipe has made in `out` as
        nnU-Net v2 wants to find it: see `gpuprep.output.nnunet`.
    names : Pseudonyms, optional
        What stands for UIDs, patients and paths in `out`; the crosswalk is written beside its key. Absent: folders are
        named as those of the input, and the manifest has UIDs and paths.
    only : collection of str, optional
        Only series with such a status in the manifest.
    limit : int, optional
        At most so many series are converted in this run.
    limit_s : float, optional
        A series that takes longer fails. Needs `jobs`.
    memory_share : float
        Share of the free memory that concurrent series may be predicted to take.
    room_check : bool
        Whether to begin only if the disk seems to have room for all outputs.
    index : path, optional
        As for `gpuprep.discover`.
    listener : Listener, optional
        Told what happens.
    stop : Stop, optional
        Asks the run to finish what is in flight, and to begin nothing more.

    Returns
    -------
    Run
        With the result of every series; those of an earlier run have status "skipped".

    Raises
    ------
    RequestError
        If a path does not exist, `out` lies in an input, cannot be made or has too little room, or another run is
        writing into it.
    BackendError
        If the backend cannot run here.
    OutputError
        If the manifest or another of the run's own files cannot be written.
    KeyboardInterrupt
        In whatever order. What was finished stays; the next run does the rest.

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
    recipe = recipe or Recipe()
    recipe.check_installed()
    if recipe.advice:
        log.warning("%s", recipe.advice)
    listener = listener or Listener()
    paths = _listed(paths)
    out = place_of(out)
    _check_apart(paths, out)
    _check_layout(layout, out, recipe, shard)
    _check_numbers(limit, limit_s, jobs if scheduler is None else jobs or 1, memory_share)
    checked_engine(engine)
    means = chosen_means(backend, gpus, scheduler, jobs, memory_share)
    executor = means.executor
    crosswalk: dict[str, dict[str, str]] = {}
    with open_out(out, shard) as output, closing(open_manifest(output.root, shard)) as manifest:
        try:
            _check_names(names, manifest, out)
            manifest.settle_naming(names.check if names else "")
            cohort = _discover(paths, recipe, out, index, executor)
            cohort = _renamed(cohort, names)
            listener.scanned(cohort)
            matches = _matched(cohort, paths, recipe, masks, executor, out)
            _check_both_stay(recipe, matches, manifest, out)
            output.write_text("recipe.toml", recipe.to_toml())
            manifest.account(cohort.passed_over, names.paths(cohort.unreadable) if names else cohort.unreadable)
            if matches is not None:
                manifest.account_segmentations(() if names else matches.rows)
                listener.matched(matches)
            values = _label_values(matches, recipe, manifest, names)
            if values:
                output.write_text("labels.json", json.dumps(values, indent=1, ensure_ascii=False))
            chosen = [s for s in cohort if shard.has(s.public_uid) and _wanted(s, only, manifest)]
            forecast = _forecast(means, recipe, manifest, output)
            works, postponed = [], 0
            for outlook in outlooks(cohort, chosen, paths, recipe, matches, values, output, manifest, names=names):
                if outlook.action == "convert" and limit is not None and forecast.todo - forecast.rejected >= limit:
                    postponed += 1
                    continue
                needs = outlook.needs(means.backend, engine)
                forecast.add(outlook, needs)
                works.append(work_on(outlook, needs))
            patients = patients_of(works, executor) if names else {}
            if names is not None:
                works = [placed(work, names, patients) for work in works]
                names.write_crosswalk(
                    {
                        w.series.key: planned_row(w.series, w.folder, patients[w.series.key] or "")
                        for w in works
                        if w.action == "convert"
                    }
                )
            if room_check and forecast.misfit:
                raise RequestError(f"{out}: {forecast.misfit}")
            manifest.begin_run(_record(forecast, recipe, means.backend, paths, masks, engine, names, layout))
            listener.planned(forecast)

            task = partial(task_of, recipe=recipe, engine=engine, backend=means.backend, output=output, names=names)
            doubtful = doubtful_files(cohort)
            tasks = (task(w, doubtful=doubtful) for w in works if w.action == "convert")
            stop = stop or Stop()
            outcomes = Attempts(executor, output, forecast.disk_share, limit_s, stop)
            tally: dict[str, Tally] = defaultdict(Tally)
            done: dict[str, Status] = {}
            by_key = {w.series.key: w.series for w in works} if names else {}
            with stop.in_flight():
                for result in _results(works, task, outcomes.of(tasks), manifest):
                    done[result.key] = result.status
                    _count(tally, result)
                    if names is not None:
                        crosswalk[result.key] = crosswalk_row(result, by_key[result.key])
                    listener.finished(result)
            _forget_former_parts(cohort, done, paths, manifest, output)
            manifest.end_run("interrupted" if stop.asked else "finished")
            arranged = arrange(output, manifest, recipe) if layout == "nnunet" and not stop.asked else None
        except KeyboardInterrupt:
            manifest.end_run("interrupted")
            raise
        finally:
            executor.stop()
            try:
                if names is not None and crosswalk:
                    names.write_crosswalk(crosswalk)
            finally:
                manifest.write_csv()
    run = Run(
        results=Results(
            output.lasting(manifest.path.name), tuple(done), frozenset(k for k, s in done.items() if s == "skipped")
        ),
        passed_over=cohort.passed_over,
        unreadable=cohort.unreadable,
        tallies=dict(tally),
        found=len(cohort) if recipe.image or matches is None else sum(map(bool, matches.by_key.values())),
        postponed=postponed,
        unmatched=matches.complaints if matches is not None else (),
        unused=matches.unused if matches is not None else (),
        stopped=len(works) - len(done) if stop.asked else None,
        arranged=arranged,
    )
    listener.ended(run)
    return run


def _results(
    works: list[Work],
    task: Callable[..., Task],
    outcomes: Iterator[tuple[Task, SeriesResult]],
    manifest: Manifest,
) -> Iterator[SeriesResult]:
    """Yield a result per series, stored in the manifest: first those that need no work, then the rest as it is done."""
    for work in works:
        if work.action == "skip":
            former = manifest.get(work.series.key)
            assert former is not None  # noqa: S101 - that is why it is skipped
            yield replace(former, status="skipped")
        elif work.action == "reject":
            found = task(work, doubtful={})
            blank = found.blank(audit(work.series, found.recipe.rules))
            rejected = replace(blank, status="rejected", reason=work.reason, codes=work.codes, finished=now())
            yield _store(manifest, rejected, found)
    for found, result in outcomes:
        yield _store(manifest, result, found)


def _forget_former_parts(
    cohort: Cohort,
    done: Mapping[str, Status],
    paths: list[str],
    manifest: Manifest,
    output: Output,
) -> None:
    """Remove what earlier runs made of series that are now divided otherwise, once all their parts are there.

    Only what was made from under the paths of this run: elsewhere it may still be as it was.
    """
    parts: dict[str, list[str]] = defaultdict(list)
    regrouped: dict[tuple[str, bool], list[str]] = defaultdict(list)  # by UID what was by folder, or the reverse
    for series in cohort:
        if series.series_uid:
            parts[series.public_uid].append(series.key)
            regrouped[printable(series.folder), not series.public_uid.startswith(FOLDER_UID)].append(series.key)
    roots = [printable(absolute(path)) for path in paths]
    formers = list(manifest.columns("key", "series_uid", "source", "folder"))
    folders = {folder for key, _, _, folder in formers if key in done}
    for key, uid, source, folder in formers:
        now_there = parts.get(uid) or regrouped.get((source, uid.startswith(FOLDER_UID)), [])
        seen = any(source == root or source.startswith(root.rstrip("/") + "/") for root in roots)
        if not now_there or not seen or key in now_there:
            continue
        if all(done.get(part) in DONE for part in now_there):
            manifest.remove(key)
            if folder and folder not in folders:
                output.retire(folder, key)


def _store(manifest: Manifest, result: SeriesResult, task: Task) -> SeriesResult:
    """Store a result, as far as it may be known there, and return it.

    An output that has been replaced by one in another folder is removed. Where nothing replaces it, it stays and the
    result says so: what failed today must not cost what was made yesterday.
    """
    former = manifest.entry(result.key)
    if former is not None and former.folder and not result.folder and task.output.holds(former.folder):
        note = f"the output of an earlier run is still in {former.folder}"
        result = replace(result, folder=former.folder, warnings=(*result.warnings, note))
    manifest.put(task.public(result))
    if former is not None and former.folder and former.folder != result.folder:
        task.output.retire(former.folder, result.key)
    return result


def _count(tallies: dict[str, Tally], result: SeriesResult) -> None:
    tally = tallies[result.status]
    tally.series += 1
    tally.slices += result.slices
    tally.files += result.files
    tally.bytes += result.bytes


def _wanted(series: Series, only: Collection[Status] | None, manifest: Manifest) -> bool:
    """Whether the manifest has a series with such a status."""
    if only is None:
        return True
    former = manifest.entry(series.key)
    return former is not None and former.status in only


def _label_values(
    matches: Matched | None, recipe: Recipe, manifest: Manifest, pseudonyms: Pseudonyms | None
) -> dict[str, int]:
    """Return the label value of every structure of the cohort, where structures share volumes."""
    if matches is None or recipe.masks.layout != "labels" or not any(matches.by_key.values()):
        return {}
    hide = pseudonyms.of if pseudonyms else None
    names = {name for found in matches.by_key.values() for name in used_names(found, recipe.masks, hide)}
    return manifest.label_values([*recipe.masks.first_names, *sorted(names)])


def _matched(
    cohort: Cohort,
    paths: list[str],
    recipe: Recipe,
    masks: Paths | None,
    executor: Executor,
    out: str | os.PathLike[str] | None,
) -> Matched | None:
    """Return which segmentation goes to which series; None where masks are not asked for."""
    if masks is None:
        return None
    roots = None if masks == "auto" else _listed(masks)
    return matched(cohort, paths, roots, recipe.masks, executor, exclude=out, alone=not recipe.image)


def _check_names(names: Pseudonyms | None, manifest: Manifest, out: str | os.PathLike[str]) -> None:
    """Raise if `out` was made with other names: every series would be converted again, under two names."""
    manifests = [manifest.naming()]
    for path in shards_of(manifest.path.parent).values():
        # One that is just being made is none yet; whoever merges them looks again.
        with suppress(OutputError), closing(Manifest(path, reading=True)) as other:
            manifests.append(other.naming())
    own = names.check if names else ""
    former = next((mark for mark in manifests if mark not in (None, own)), own)
    if former == own:
        return
    if not former:
        raise RequestError(f"{out} was made without --names hash: choose another --out, or leave it out")
    if names is None:
        raise RequestError(f"{out} was made with --names hash: give it again with its --key, or choose another --out")
    raise RequestError(f"{out} was made with another --key than {names.file}: give that, or choose another --out")


def _renamed(cohort: Cohort, names: Pseudonyms | None) -> Cohort:
    return cohort if names is None else replace(cohort, series=tuple(names.series(s) for s in cohort))


def _check_both_stay(recipe: Recipe, matches: Matched | None, manifest: Manifest, out: str | Path) -> None:
    """Raise if masks alone would replace volumes that hold images, or images alone such that hold masks."""
    if not recipe.image and any(manifest.columns("key", where="WHERE folder != '' AND hu_mean IS NOT NULL")):
        raise RequestError(
            f"{out} holds images, which masks alone would replace: choose another --out, or run gpuprep convert "
            "--masks into this one"
        )
    if matches is None and any(manifest.columns("key", where="WHERE folder != '' AND labels != '[]'")):
        raise RequestError(f"{out} holds masks, which would go: give --masks again, or choose another --out")


def _check_layout(layout: Layout, out: str | os.PathLike[str], recipe: Recipe, shard: Shard) -> None:
    if layout not in get_args(Layout):
        raise RequestError(f"layout = {layout!r}: choose one of {', '.join(get_args(Layout))}")
    if layout == "nnunet":
        check(place_of(out), recipe, shard)


def _check_numbers(limit: int | None, limit_s: float | None, jobs: int | None, memory_share: float) -> None:
    if limit is not None and limit < 1:
        raise RequestError(f"limit = {limit}: give at least 1")
    if jobs is not None and jobs < 1:
        raise RequestError(f"jobs = {jobs}: give at least 1")
    if limit_s is not None and not 0 < limit_s < float("inf"):
        raise RequestError(f"time limit = {limit_s:g} s: give more than 0, and no infinity")
    if limit_s is not None and jobs is None:
        raise RequestError("a time limit needs jobs: nothing can end a series in this process")
    if not 0 < memory_share <= 1:
        raise RequestError(f"memory share = {memory_share:g}: give more than 0, and at most 1")


def _forecast(means: Means, recipe: Recipe, manifest: Manifest | None, output: Output | None) -> Forecast:
    """Return a forecast without series."""
    return Forecast(
        workers=means.workers,
        room=means.room,
        at_rest_bytes=means.at_rest_bytes,
        free_disk_bytes=output.free_bytes() if output else None,
        experience=experience(manifest, recipe, means.backend.name),
        compressed=recipe.compression != "none",
    )


def _record(
    forecast: Forecast,
    recipe: Recipe,
    backend: Backend,
    paths: list[str],
    masks: Paths | None,
    engine: Engine,
    names: Pseudonyms | None,
    layout: Layout,
) -> RunRecord:
    """Return what the manifest keeps of a run that begins; of one with pseudonyms, not what it reads."""
    asked = {
        "paths": [absolute(p) for p in paths],
        "masks": None if masks is None else masks if masks == "auto" else [absolute(p) for p in _listed(masks)],
        "engine": engine,
        "layout": layout,
    }
    return RunRecord(
        started=now(),
        host=this_host(),
        pid=os.getpid(),
        version=__version__,
        recipe_sha256=recipe.sha256,
        device=backend.device or backend.name,
        series=forecast.series,
        skipped=forecast.skipped,
        todo=forecast.todo,
        request=json.dumps({} if names else asked),
    )


def _discover(
    paths: list[str],
    recipe: Recipe,
    out: str | os.PathLike[str] | None,
    index: str | os.PathLike[str] | None,
    executor: Executor,
) -> Cohort:
    """Return the cohort, its headers read by an executor."""

    def map_(
        function: Callable[[list[str]], list[Contents]], tasks: list[list[str]]
    ) -> Iterator[tuple[list[str], list[Contents]]]:
        def unreadable(file: str, exc: WorkerDiedError) -> Contents:
            return Contents(unreadable=[(printable(file), str(exc))], lasting=False)

        return answers(executor, function, tasks, unreadable)

    return discover(paths, recipe.rules, exclude=out, index=index, map_=map_)


def _check_apart(paths: list[str], out: str | Path) -> None:
    """Raise if volumes would be written among the input: OUT may lie inside an input, but no input inside OUT."""
    for path in paths:
        if f"{resolved(path)}/".startswith(f"{resolved(out).rstrip('/')}/"):
            raise RequestError(f"the input {path} lies in the output folder {out}: choose another --out")


def _listed(paths: Paths) -> list[str]:
    return [given(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
