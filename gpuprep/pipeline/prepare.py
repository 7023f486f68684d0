"""Prepares a run: finds series, matches segmentations, makes tasks, and forecasts what they take."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from gpuprep.core.formatting import printable
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import Series
from gpuprep.core.shard import Shard
from gpuprep.dicom.audit import audit
from gpuprep.dicom.discover import FILES_PER_TASK, Cohort, discover
from gpuprep.dicom.headers import Contents
from gpuprep.errors import OutputError, RequestError
from gpuprep.executors.processes import Executor, WorkerDiedError, run_batches
from gpuprep.executors.resources import Resources
from gpuprep.files.filesystem import real_path
from gpuprep.output.folder_store import Output
from gpuprep.output.label_names import LABELS
from gpuprep.output.manifest import Manifest, shards_of
from gpuprep.output.nnunet import Layout, check
from gpuprep.output.object_store import resolve_out
from gpuprep.output.records import Status
from gpuprep.pipeline.choose import choose
from gpuprep.pipeline.decide import planned_series
from gpuprep.pipeline.estimate import Forecast, experience
from gpuprep.pipeline.events import Listener
from gpuprep.pipeline.match_masks import Matched, matched, used_names
from gpuprep.pipeline.options import ConvertOptions
from gpuprep.pipeline.planned_series import PlannedSeries
from gpuprep.pipeline.pseudonyms import Pseudonyms, patient_ids, planned_row
from gpuprep.pipeline.series_facts import public_facts
from gpuprep.pipeline.task import Task


@dataclass(frozen=True, slots=True)
class RunContext:
    """Inputs, options, resources and outputs of a run."""

    paths: list[str]
    out: str | Path
    options: ConvertOptions
    resources: Resources
    output: Output
    manifest: Manifest
    listener: Listener


@dataclass(slots=True)
class Prepared:
    """Series of a run, by what is done with them."""

    cohort: Cohort
    matches: Matched | None
    """Segmentations of each series; None: no masks are made."""
    forecast: Forecast
    tasks: list[Task] = field(default_factory=list)
    """Series that are converted."""
    skipped: list[str] = field(default_factory=list)
    """Keys of series whose outputs are complete and unchanged."""
    left_out: list[Task] = field(default_factory=list)
    """Series that are excluded, or cannot be converted, as their headers or segmentations show."""
    complaint: str = ""
    """Phrase about lines of `ConvertOptions.select` without a series."""
    postponed: int = 0
    """Number of series that `ConvertOptions.limit` leaves for a later run."""

    @property
    def series(self) -> int:
        """Number of series that get a result."""
        return len(self.tasks) + len(self.skipped) + len(self.left_out)


def prepare(context: RunContext) -> Prepared:
    """Find the series of a run, decide what is done with each, and record recipe and labels in the output folder.

    Raises
    ------
    RequestError
        If the options contradict what the output folder holds, or the disk has too little room.
    """
    options, resources, output, manifest = context.options, context.resources, context.output, context.manifest
    names, recipe = options.names, options.recipe
    check_names(names, manifest, context.out)
    manifest.settle_naming(names.check if names else "")
    cohort = series_under(context.paths, options, context.out, resources.executor)
    context.listener.scanned(cohort)
    matches = matches_of(cohort, context.paths, options, resources.executor, context.out)
    _check_both_stay(recipe, matches, manifest, context.out)
    output.write_text("recipe.toml", options.stored_recipe.to_toml())
    manifest.account(cohort.passed_over, names.paths(cohort.unreadable) if names else cohort.unreadable)
    if matches is not None:
        manifest.account_segmentations(() if names else matches.rows)
        context.listener.matched(matches)
    values = _label_values(matches, recipe, manifest, names)
    if values:
        output.write_text(LABELS, json.dumps(values, indent=1, ensure_ascii=False))
    choice = choose(cohort, options, matches, resources.executor)
    forecast = blank_forecast(resources, recipe, manifest, output)
    prepared = Prepared(cohort, matches, forecast, complaint=choice.complaint)
    chosen = [s for s in cohort if options.shard.has(s.public_uid) and _wanted(s, options.only, manifest)]
    for planned in planned_series(
        cohort, chosen, context.paths, options, resources.backend, choice, matches, values, output, manifest
    ):
        _add(planned, context, prepared)
    if names is not None:
        _name_folders(prepared, names, resources.executor)
    if options.room_check and prepared.forecast.misfit:
        raise RequestError(f"{context.out}: {prepared.forecast.misfit}")
    return prepared


def _add(planned: PlannedSeries, context: RunContext, prepared: Prepared) -> None:
    """Add one series to those of its kind, and to the forecast."""
    limit = context.options.limit
    if planned.action == "convert" and limit is not None and len(prepared.tasks) >= limit:
        prepared.postponed += 1
        return
    prepared.forecast.add(planned)
    if planned.action == "skip":
        prepared.skipped.append(planned.series.key)
    elif planned.action == "convert":
        prepared.tasks.append(_task(planned.for_worker(), context))
    else:
        prepared.left_out.append(_task(planned, context))


def _task(planned: PlannedSeries, context: RunContext) -> Task:
    options = context.options
    return Task(
        planned=replace(planned, facts=public_facts(planned.facts, options.record)),
        recipe=options.stored_recipe,
        engine=options.engine,
        backend=context.resources.backend,
        output=context.output,
        names=options.names,
    )


def _name_folders(prepared: Prepared, names: Pseudonyms, executor: Executor) -> None:
    """Give each task the folder of its patient, and write the crosswalk of what is planned."""
    patients = _patients(prepared.tasks, executor)
    tasks, prepared.tasks = prepared.tasks, []
    rows = {}
    for task in tasks:
        series = task.planned.series
        patient = patients[series.key]
        if patient is None:  # in the folder of another patient it would be worse than missing
            rejected = task.planned.rejected("InputError: its Patient ID cannot be read", "changed")
            rejected = replace(rejected, audit=audit(series, task.recipe.rules))
            prepared.left_out.append(replace(task, planned=rejected))
        else:
            folder = names.folder(series, patient)
            prepared.tasks.append(replace(task, planned=replace(task.planned, folder=folder)))
            rows[series.key] = planned_row(series, folder, patient)
    names.write_crosswalk(rows)


def _patients(tasks: Sequence[Task], executor: Executor) -> dict[str, str | None]:
    """Return the *Patient ID* of the series of each task, by the key of the series; None: unreadable."""
    first_slices = {t.planned.series.slices[0]: t.planned.series.key for t in tasks}
    headers = list(first_slices)
    parts = [headers[i : i + FILES_PER_TASK] for i in range(0, len(headers), FILES_PER_TASK)]
    return {
        first_slices[header]: found
        for part, ids in run_batches(executor, patient_ids, parts, lambda *_: None)
        for header, found in zip(part, ids, strict=True)
    }


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


def matches_of(
    cohort: Cohort,
    paths: list[str],
    options: ConvertOptions,
    executor: Executor,
    out: str | os.PathLike[str] | None,
) -> Matched | None:
    """Return the segmentations of each series; None where no masks are made."""
    if options.masks is None:
        return None
    roots = None if options.masks == "auto" else list(options.masks)
    recipe = options.recipe
    return matched(cohort, paths, roots, recipe.masks, executor, exclude=out, alone=not recipe.image)


def check_names(names: Pseudonyms | None, manifest: Manifest, out: str | os.PathLike[str]) -> None:
    """Raise if `out` was made with other pseudonyms: every series would be converted again, under a second name."""
    manifests = [manifest.naming()]
    for path in shards_of(manifest.path.parent).values():
        # A manifest that is being made is unreadable yet; the merge of shards checks it again.
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


def _check_both_stay(recipe: Recipe, matches: Matched | None, manifest: Manifest, out: str | Path) -> None:
    """Raise if masks alone would replace outputs with images, or images alone would replace outputs with masks."""
    if not recipe.image and any(manifest.columns("key", of="image")):
        raise RequestError(
            f"{out} holds images, which masks alone would replace: choose another --out, or run gpuprep convert "
            "--masks into this one"
        )
    if matches is None and any(manifest.columns("key", of="masks")):
        raise RequestError(f"{out} holds masks, which would go: give --masks again, or choose another --out")


def check_layout(layout: Layout, out: str | os.PathLike[str], recipe: Recipe, shard: Shard) -> None:
    """Raise if nnU-Net could not train on the outputs of a run."""
    if layout == "nnunet":
        check(resolve_out(out), recipe, shard)


def check_apart(paths: list[str], out: str | Path) -> None:
    """Raise if volumes would be written among the input: OUT may lie inside an input, but no input inside OUT."""
    for path in paths:
        if f"{real_path(path)}/".startswith(f"{real_path(out).rstrip('/')}/"):
            raise RequestError(f"the input {path} lies in the output folder {out}: choose another --out")


def blank_forecast(resources: Resources, recipe: Recipe, manifest: Manifest | None, output: Output | None) -> Forecast:
    """Return a forecast without series."""
    return Forecast(
        workers=resources.workers,
        budget_bytes=resources.budget_bytes,
        at_rest_bytes=resources.at_rest_bytes,
        free_disk_bytes=output.free_bytes() if output else None,
        experience=experience(manifest, recipe, resources.backend.name),
        compressed=recipe.compression != "none",
    )


def series_under(
    paths: list[str], options: ConvertOptions, out: str | os.PathLike[str] | None, executor: Executor
) -> Cohort:
    """Return the cohort under some paths, read by an executor, with pseudonyms where the options have them."""

    def map_(
        function: Callable[[list[str]], list[Contents]], tasks: list[list[str]]
    ) -> Iterator[tuple[list[str], list[Contents]]]:
        def unreadable(file: str, exc: WorkerDiedError) -> Contents:
            return Contents(unreadable=[(printable(file), str(exc))], cacheable=False)

        return run_batches(executor, function, tasks, unreadable)

    cohort = discover(paths, options.recipe.rules, exclude=out, index=options.index, map_=map_)
    names = options.names
    return cohort if names is None else replace(cohort, series=tuple(names.series(s) for s in cohort))
