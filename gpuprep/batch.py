"""The cohort: what is there, what has to be done, doing it, and the record of it."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from gpuprep.auditing import Audit, Verdict, audit
from gpuprep.backend import Backend, BackendName, Engine, checked_engine, get_backend
from gpuprep.conversion import DEVICE_MEMORY, Task, convert_series, left_out
from gpuprep.discovery import Cohort, discover
from gpuprep.errors import PlanError, RequestError
from gpuprep.executors import (
    FOR_HEADERS,
    FOR_LOOPS,
    FOR_VOLUMES,
    Budget,
    Executor,
    Here,
    Processes,
    WorkerDiedError,
    answers,
    usable_cores,
)
from gpuprep.headers import Contents
from gpuprep.layout import absolute, layout
from gpuprep.logs import quiet_libraries
from gpuprep.manifest import Manifest, SeriesResult, now
from gpuprep.matching import Glimpse, Matched, fingerprint, matched, used_names
from gpuprep.memory import AT_REST_BYTES, CONTEXT_BYTES, for_volumes, host_bytes_free, mask_bytes, needed_bytes, workers
from gpuprep.output import contents, open_output, retire, write_text
from gpuprep.places import given, is_url
from gpuprep.plan import Plan, make_plan
from gpuprep.recipe import Recipe
from gpuprep.series import Series
from gpuprep.text import printable

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

DONE = ("ok", "fixed", "skipped")
"""Of a series whose output is there."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What would happen to one series, from its headers alone."""

    series: Series
    action: Literal["convert", "skip", "reject"]
    folder: str
    """Relative to OUT."""
    plan: Plan | None
    audit: Audit | None = None
    """Absent for a series that is skipped: nothing about it has changed."""
    reason: str = ""
    code: str = ""
    """Of that reason, if it is not in the headers."""
    known: bool = False
    """Whether the manifest has an earlier output of this series in that folder."""
    segmentations: tuple[Glimpse, ...] = ()
    """What masks would be made of …"""
    structures: tuple[str, ...] = ()
    """… and of what in them, by the names that are used."""

    @property
    def verdict(self) -> Verdict | Literal["skipped"]:
        """What the headers amount to."""
        if self.audit is None:
            return "skipped"
        return "rejected" if self.action == "reject" else self.audit.verdict

    @property
    def codes(self) -> tuple[str, ...]:
        """The reasons for the verdict, for programs."""
        if self.audit is None:
            return ()
        return (self.code,) if self.code else self.audit.codes


@dataclass(frozen=True, slots=True)
class Run:
    """What a run did."""

    results: tuple[SeriesResult, ...]
    passed_over: Mapping[str, int]
    unreadable: tuple[tuple[str, str], ...]
    postponed: int = 0
    """Series left for later by `limit`."""
    unmatched: tuple[tuple[str, str], ...] = ()
    """Segmentations that belong to no series: (path, why)."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of series by status."""
        return dict(Counter(r.status for r in self.results))

    @property
    def exit_code(self) -> int:
        """0 all done, 1 some series rejected or failed, or some file unreadable or unmatched, 3 nothing found."""
        bad = bool(self.unreadable or self.unmatched)
        if not self.results and not self.postponed:
            return 1 if bad else 3
        bad = bad or any(r.status in ("rejected", "failed") for r in self.results)
        return 1 if bad else 0


class Listener:
    """Hears what a run does; every method may be overridden, none has to be."""

    def scanned(self, cohort: Cohort) -> None:
        """All headers are read."""

    def matched(self, matched: Matched) -> None:
        """Every segmentation has its series, or has none."""

    def planned(self, outlooks: list[Outlook]) -> None:
        """Every series has its outlook; conversion begins."""

    def finished(self, result: SeriesResult) -> None:
        """One series is done with."""


def scan(
    paths: Paths,
    recipe: Recipe | None = None,
    *,
    masks: Paths | None = None,
    out: str | os.PathLike[str] | None = None,
    index: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    listener: Listener | None = None,
) -> tuple[Cohort, list[Outlook]]:
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
    index : path, optional
        As for `gpuprep.discover`.
    jobs : int, optional
        Processes that read headers; absent: this one.
    listener : Listener, optional
        Is told which segmentation goes where.
    """
    recipe = recipe or Recipe()
    paths = _listed(paths)
    if out is not None:
        _check_apart(paths, Path(out))
    executor = Here() if jobs is None else Processes(jobs, quiet_libraries, FOR_HEADERS)
    try:
        cohort = _discover(paths, recipe, out, index, executor)
        matches = _matched(cohort, paths, recipe, masks, executor, out)
        if matches is not None and listener is not None:
            listener.matched(matches)
    finally:
        executor.stop()
    if out is not None and (Path(out) / "manifest.sqlite").exists():
        with closing(Manifest(Path(out) / "manifest.sqlite")) as manifest:
            return cohort, _outlooks(cohort, paths, recipe, matches, Path(out), manifest)
    return cohort, _outlooks(cohort, paths, recipe, matches, None, None)


def convert(
    paths: Paths,
    out: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    masks: Paths | None = None,
    backend: Backend | BackendName = "auto",
    engine: Engine = "operators",
    jobs: int | None = None,
    limit: int | None = None,
    index: str | os.PathLike[str] | None = None,
    listener: Listener | None = None,
) -> Run:
    """Convert every CT series under some paths into a folder of its own under `out`.

    Parameters
    ----------
    paths : path or iterable of paths
        Folders, searched to any depth, or files; as for `gpuprep.discover`.
    out : path
        Where volumes, ``manifest.sqlite``, ``manifest.csv`` and ``recipe.toml`` go.
    recipe : Recipe, optional
        The default recipe where absent.
    masks : path, iterable of paths or "auto", optional
        Segmentation files, or folders of them, to make masks of; "auto": RTSTRUCT, SEG and LIDC-IDRI XML among the
        inputs. Each goes to the series it belongs to: see `gpuprep.matching.match`.
    backend, engine
        As for `gpuprep.process`.
    jobs : int, optional
        Series at a time, each in a worker process. Absent: on the CPU one after the other in this process; on a GPU
        one per core. On a GPU never more than its memory has room for.
    limit : int, optional
        Convert at most so many series now.
    index : path, optional
        As for `gpuprep.discover`.
    listener : Listener, optional
        Is told what happens.

    Returns
    -------
    Run
        One result per series. A series that is rejected or fails is a result, not an exception.

    Raises
    ------
    RequestError, BackendError
        If the run as a whole cannot start.
    OutputError
        If the manifest cannot be written.
    KeyboardInterrupt
        After an interruption, once everything is in order. What was finished stays; the next run does the rest.
    """
    recipe = recipe or Recipe()
    listener = listener or Listener()
    paths = _listed(paths)
    out = Path(os.path.abspath(out))
    _check_apart(paths, out)
    if limit is not None and limit < 1:
        raise RequestError(f"limit = {limit}: give at least 1")
    checked_engine(engine)
    chosen = get_backend(backend) if isinstance(backend, str) else backend
    executor, budget = _executor(chosen, jobs)
    with open_output(out), closing(Manifest(out / "manifest.sqlite")) as manifest:
        try:
            cohort = _discover(paths, recipe, out, index, executor)
            listener.scanned(cohort)
            matches = _matched(cohort, paths, recipe, masks, executor, out)
            _check_both_stay(recipe, matches, manifest, out)
            write_text(out / "recipe.toml", recipe.to_toml())
            manifest.account(cohort.passed_over, cohort.unreadable)
            if matches is not None:
                manifest.account_segmentations(matches.rows)
                listener.matched(matches)
            outlooks = _outlooks(cohort, paths, recipe, matches, out, manifest)
            todo = [o for o in outlooks if o.action == "convert"]
            now_, later = (todo, []) if limit is None else (todo[:limit], todo[limit:])
            postponed = {o.series.key for o in later}
            listener.planned([o for o in outlooks if o.series.key not in postponed])

            results = []
            doubtful = Counter(folder for path, _ in cohort.unreadable for folder in (os.path.dirname(path), path))
            for nameless in (s for s in cohort if not s.series_uid):
                doubtful[printable(nameless.folder)] += len(nameless.slices)
            values = _label_values(outlooks, recipe, manifest)
            if values:
                write_text(out / "labels.json", json.dumps(values, indent=1, ensure_ascii=False))
            tasks = {o.series.key: _task(o, recipe, engine, chosen, out, doubtful, values) for o in outlooks}
            outcomes = _converted([tasks[o.series.key] for o in now_], executor, budget)
            for result in _results(outlooks, outcomes, tasks, manifest):
                results.append(result)
                listener.finished(result)
            _forget_former_parts(results, {o.series.key for o in outlooks}, paths, manifest, out)
        finally:
            executor.stop()
            manifest.write_csv()
    unmatched = matches.complaints if matches is not None else ()
    return Run(tuple(results), cohort.passed_over, cohort.unreadable, len(later), unmatched)


def _results(
    outlooks: list[Outlook], outcomes: Iterator[tuple[Task, SeriesResult]], tasks: dict[str, Task], manifest: Manifest
) -> Iterator[SeriesResult]:
    """Yield a result per series, stored in the manifest: first those that need no work, then the rest as it is done."""
    for outlook in outlooks:
        task = tasks[outlook.series.key]
        if outlook.action == "skip":
            former = manifest.get(outlook.series.key)
            assert former is not None  # noqa: S101 - that is why it is skipped
            yield replace(former, status="skipped")
        elif outlook.action == "reject":
            codes = outlook.codes
            rejected = replace(task.blank, status="rejected", reason=outlook.reason, codes=codes, finished=now())
            yield _store(manifest, rejected, task.out)
    for task, result in outcomes:
        yield _store(manifest, result, task.out)


def _converted(todo: list[Task], executor: Executor, budget: Budget | None) -> Iterator[tuple[Task, SeriesResult]]:
    """Yield what became of each task; those that found too little memory on a device are tried again, alone.

    First as they are, when all others are done and their memory is free; then in smaller chunks.
    """
    again = []
    for task, outcome in executor.run(convert_series, todo, budget):
        result = _result(task, outcome)
        if DEVICE_MEMORY in result.codes:
            again.append(task)
        else:
            yield task, result
    for task in again:
        # The library calls of the other engine take a volume whole, whatever the chunks.
        divisors = (1, 4, 64) if task.engine == "operators" else (1,)
        for attempt in (_smaller(task, divisor) for divisor in divisors):
            executor.stop()  # workers that have nothing to do still hold memory
            ((_, outcome),) = executor.run(convert_series, [attempt])
            result = _result(attempt, outcome)
            if DEVICE_MEMORY not in result.codes:
                break
        else:
            advice = "alone on the device: ask for a coarser --spacing or a smaller --size, or use --backend cpu"
            result = replace(result, reason=f"{result.reason}, {advice}")
        yield task, result


def _result(task: Task, outcome: SeriesResult | WorkerDiedError) -> SeriesResult:
    if isinstance(outcome, WorkerDiedError):
        return replace(left_out(task.blank, outcome), finished=now())
    return outcome


def _smaller(task: Task, divisor: int) -> Task:
    """Return a task that takes so many times fewer slices at a time."""
    backend = copy(task.backend)
    backend.chunk_slices = max(1, backend.chunk_slices // divisor)
    backend.slab_slices = max(1, backend.slab_slices // divisor)
    return replace(task, backend=backend)


def _forget_former_parts(
    results: list[SeriesResult], keys: set[str], paths: list[str], manifest: Manifest, out: Path
) -> None:
    """Remove what earlier runs made of series that are now divided otherwise, once all their parts are there.

    Only what was made from under the paths of this run: elsewhere it may still be as it was.
    """
    by_uid: dict[str, list[SeriesResult]] = defaultdict(list)
    for result in results:
        by_uid[result.series_uid].append(result)
    postponed = {key.partition("#")[0] for key in keys - {r.key for r in results}}
    roots = [printable(absolute(path)) for path in paths]
    for former in list(manifest):
        parts = by_uid.get(former.series_uid, []) if former.series_uid else []
        seen = any(former.source == root or former.source.startswith(root.rstrip("/") + "/") for root in roots)
        if not parts or not seen or former.key in keys or former.series_uid in postponed:
            continue
        if all(part.status in DONE for part in parts):
            manifest.remove(former.key)
            if former.folder and former.folder not in {part.folder for part in parts}:
                retire(out / former.folder)


def _store(manifest: Manifest, result: SeriesResult, out: Path) -> SeriesResult:
    """Store a result and return it as stored.

    An output that has been replaced by one in another folder is removed. Where nothing replaces it, it stays and the
    result says so: what failed today must not cost what was made yesterday.
    """
    former = manifest.get(result.key)
    if former is not None and former.folder and not result.folder and (out / former.folder).is_dir():
        note = f"the output of an earlier run is still in {former.folder}"
        result = replace(result, folder=former.folder, warnings=(*result.warnings, note))
    manifest.put(result)
    if former is not None and former.folder and former.folder != result.folder:
        retire(out / former.folder)
    return result


def _outlooks(
    cohort: Cohort,
    paths: list[str],
    recipe: Recipe,
    matches: Matched | None,
    out: Path | None,
    manifest: Manifest | None,
) -> list[Outlook]:
    taken = {r.folder: r.key for r in manifest if r.folder} if manifest else {}
    folders = layout(cohort, paths, taken)
    shared = recipe.masks.layout == "labels"
    values = manifest.label_values() if manifest is not None and matches is not None and shared else {}
    outlooks = []
    for series in cohort:
        found = matches.by_key.get(series.key, ()) if matches is not None else ()
        if not found and not recipe.image:
            continue
        names = tuple(used_names(found, recipe.masks))
        outlook = partial(Outlook, series, segmentations=found, structures=names)
        former = manifest.get(series.key) if manifest else None
        # Label values are those that its structures would get now.
        now_ = fingerprint(series, found, [(name, values.get(name, 0)) for name in names] if shared else [])
        if out and former and _complete(now_, recipe, out, former):
            outlooks.append(outlook("skip", former.folder, None))
            continue
        audited = audit(series, recipe.rules)
        if audited.stack is None:
            outlooks.append(outlook("reject", "", None, audited, audited.reason))
            continue
        try:
            plan = make_plan(audited.stack.geometry, recipe, audited.stack.placement)
        except PlanError as exc:
            outlooks.append(outlook("reject", "", None, audited, f"PlanError: {exc}", "plan"))
            continue
        if bad := [g for g in found if g.error]:
            reason = f"SegmentationError: {printable(os.path.basename(bad[0].path))}: {bad[0].error}"
            outlooks.append(outlook("reject", "", None, audited, reason, bad[0].code))
        else:
            folder = folders[series.key]
            known = former is not None and former.folder == folder
            outlooks.append(outlook("convert", folder, plan, audited, known=known))
    return outlooks


def _label_values(outlooks: list[Outlook], recipe: Recipe, manifest: Manifest) -> dict[str, int]:
    """Return the label value of every structure of the cohort, where structures share volumes."""
    if recipe.masks.layout != "labels" or not any(o.segmentations for o in outlooks):
        return {}
    names = {name for o in outlooks for name in o.structures}
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


def _check_both_stay(recipe: Recipe, matches: Matched | None, manifest: Manifest, out: Path) -> None:
    """Raise if masks alone would replace volumes that hold images, or images alone such that hold masks."""
    made = [r for r in manifest if r.folder]
    if not recipe.image and any(r.hu_mean is not None for r in made):
        raise RequestError(
            f"{out} holds images, which masks alone would replace: choose another --out, or run gpuprep convert "
            "--masks into this one"
        )
    if matches is None and any(r.labels for r in made):
        raise RequestError(f"{out} holds masks, which would go: give --masks again, or choose another --out")


def _complete(fingerprint_: str, recipe: Recipe, out: Path, former: SeriesResult) -> bool:
    """Whether an earlier output stands for exactly this input and recipe, and is all there."""
    from gpuprep import __version__

    same = (former.fingerprint, former.recipe_sha256, former.version) == (
        fingerprint_,
        recipe.sha256,
        __version__,
    )
    return same and former.status in DONE and contents(out / former.folder) == (former.files, former.bytes)


def _task(
    outlook: Outlook,
    recipe: Recipe,
    engine: Engine,
    backend: Backend,
    out: Path,
    doubtful: Mapping[str, int],
    values: Mapping[str, int],
) -> Task:
    series, found = outlook.series, outlook.segmentations
    unreadable = doubtful.get(printable(series.folder), 0)
    note = f"{unreadable} files in its folder are unreadable or of no known series: a slice may be missing"
    own = [(name, values[name]) for name in outlook.structures] if values else []
    return Task(
        series=series,
        recipe=recipe,
        engine=engine,
        backend=backend,
        out=out,
        folder=outlook.folder,
        known=outlook.known,
        audit=outlook.audit.to_dict() if outlook.audit else None,
        irregularities=outlook.audit.irregularities if outlook.audit else (),
        notes=(note,) if unreadable else (),
        segmentations=tuple(g.path for g in found),
        label_values=tuple(own),
        fingerprint=fingerprint(series, found, own),
        needed_bytes=_needed_bytes(outlook, backend, engine),
    )


def _needed_bytes(outlook: Outlook, backend: Backend, engine: Engine) -> int:
    """Return what a series needs at one time: for its image, and after that for its masks."""
    if outlook.plan is None:
        return 0
    image = needed_bytes(outlook.plan, backend, engine) if outlook.plan.recipe.image else 0
    return max(image, mask_bytes(outlook.plan, backend) if outlook.segmentations else 0)


def _executor(backend: Backend, jobs: int | None) -> tuple[Executor, Budget | None]:
    """Return what runs the tasks, and what they share."""
    if jobs is not None and jobs < 1:
        raise RequestError(f"jobs = {jobs}: give at least 1")
    free, at_rest = backend.free_bytes(), CONTEXT_BYTES
    if free is None:
        if jobs is None:
            return Here(), None
        free, at_rest = host_bytes_free(), AT_REST_BYTES[backend.body]
    else:
        jobs = workers(free, jobs or usable_cores())
    budget = None if free is None else Budget(for_volumes(free, jobs, at_rest), lambda task: int(task.needed_bytes))
    return Processes(jobs, quiet_libraries, FOR_LOOPS if backend.body == "loops" else FOR_VOLUMES), budget


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


def _check_apart(paths: list[str], out: Path) -> None:
    """Raise if volumes would be written among the input: OUT may lie inside an input, but no input inside OUT."""
    for path in paths:
        if not is_url(path) and Path(path).resolve().is_relative_to(out.resolve()):
            raise RequestError(f"the input {path} lies in the output folder {out}: choose another --out")


def _listed(paths: Paths) -> list[str]:
    return [given(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
