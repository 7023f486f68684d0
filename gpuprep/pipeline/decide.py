"""Decides what is done with each series, from its headers and the manifest; no pixel data are decoded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

from gpuprep import _version
from gpuprep.compute.backend import Backend, Engine
from gpuprep.compute.memory_estimate import WRITING_BYTES, mask_bytes, needed_bytes
from gpuprep.core.formatting import printable
from gpuprep.core.plan import Plan
from gpuprep.core.series import Series
from gpuprep.dicom.audit import audit
from gpuprep.dicom.discover import Cohort
from gpuprep.output.folder_store import Output
from gpuprep.output.manifest import Manifest
from gpuprep.output.paths import assign_folders
from gpuprep.output.records import DONE, Entry
from gpuprep.pipeline.choose import Choice
from gpuprep.pipeline.judge import judge
from gpuprep.pipeline.match_masks import Matched, fingerprint, used_names
from gpuprep.pipeline.options import ConvertOptions
from gpuprep.pipeline.planned_series import Needs, PlannedSeries
from gpuprep.pipeline.pseudonyms import Pseudonyms
from gpuprep.pipeline.segmentation_files import SegmentationSummary

STORED_BYTES = 2
"""Bytes per stored value."""


def planned_series(
    cohort: Cohort,
    chosen: Iterable[Series],
    paths: list[str],
    options: ConvertOptions,
    backend: Backend,
    choice: Choice,
    matches: Matched | None,
    values: Mapping[str, int],
    output: Output | None,
    manifest: Manifest | None,
) -> Iterator[PlannedSeries]:
    """Yield what will be done with some series of a cohort.

    With pseudonyms the output folder of a series stays empty: it depends on the patient, which is not known yet.

    Parameters
    ----------
    cohort : Cohort
        All series: the output folder of one depends on the others.
    chosen : iterable of Series
        The series of this run.
    paths : list of str
        Inputs under which the cohort was found.
    options : ConvertOptions
        Recipe, engine and pseudonyms.
    backend : Backend
        Computes the volumes; their memory depends on it.
    choice : Choice
        What the user chose among the cohort.
    matches : Matched, optional
        Segmentations of each series; absent: no masks are made.
    values : mapping of str to int
        Label values of structures, where they share volumes.
    output, manifest : optional
        Outputs and manifest of earlier runs.
    """
    recipe, names = options.recipe, options.names
    recipe_sha256 = recipe.sha256
    taken = {folder: key for folder, key in manifest.columns("folder", "key") if folder} if manifest else {}
    folders = {} if names else assign_folders(cohort, paths, taken, choice.names)
    shared = recipe.masks.layout == "labels"
    doubtful = doubtful_files(cohort)
    for series in chosen:
        found = matches.by_key.get(series.key, ()) if matches is not None else ()
        if not found and not recipe.image:
            continue
        structures = tuple(used_names(found, recipe.masks, names.of if names else None))
        label_values = tuple((name, values.get(name, 0)) for name in structures) if shared else ()
        unreadable = doubtful.get(printable(series.folder), 0)
        note = f"{unreadable} files in its folder are unreadable or of no known series: a slice may be missing"
        planned = PlannedSeries(
            series=series,
            action="skip",
            notes=(note,) if unreadable else (),
            fingerprint=fingerprint_in_out(series, found, label_values, names),
            former=manifest.entry(series.key) if manifest else None,
            segmentations=found,
            structures=structures,
            label_values=label_values,
        )
        named = any(choice.names.get(series.key, ()))
        if left := choice.left_out.get(series.key):
            audited = audit(series, recipe.rules)
            yield replace(planned, audit=audited, facts=choice.facts(series, audited)).excluded(left.reason, left.code)
        elif (
            planned.former
            and output
            and not (named and planned.former.folder != folders[series.key])
            and _is_complete(planned.fingerprint, recipe_sha256, output, planned.former)
        ):
            yield replace(planned, folder=planned.former.folder)
        else:
            yield _checked(replace(planned, folder=folders.get(series.key, "")), options, choice, backend)


def _checked(planned: PlannedSeries, options: ConvertOptions, choice: Choice, backend: Backend) -> PlannedSeries:
    """Return a series with its audit, and with its plan or the reason why there is none."""
    audited = audit(planned.series, options.recipe.rules)
    planned = replace(planned, audit=audited, facts=choice.facts(planned.series, audited))
    plan, reason, code = judge(audited, options.recipe, planned.segmentations)
    if plan is None:
        return planned.rejected(reason, code)
    needs = _needs(plan, backend, options.engine, masks=bool(planned.segmentations))
    return replace(planned, action="convert", plan=plan, needs=needs)


def _needs(plan: Plan, backend: Backend, engine: Engine, *, masks: bool) -> Needs:
    """Return the resources that a conversion takes."""
    image = plan.recipe.image
    memory = needed_bytes(plan, backend, engine) if image else 0
    if masks:  # after the image
        memory = max(memory, mask_bytes(plan, backend))
    if backend.name == "cpu":  # else it is the memory of the device
        memory += WRITING_BYTES.get(plan.recipe.format, 0)
        memory += STORED_BYTES * prod(plan.read.shape) if plan.recipe.crop else 0  # all slices, to find the box
    return Needs(plan.output_bytes if image else 0, memory, prod(plan.source.shape) + prod(plan.target.shape))


def doubtful_files(cohort: Cohort) -> dict[str, int]:
    """Return the number of files by folder that may be slices of the series in it, and cannot be read as such."""
    doubtful = Counter(folder for path, _ in cohort.unreadable for folder in (os.path.dirname(path), path))
    for nameless in (s for s in cohort if not s.series_uid):
        doubtful[printable(nameless.folder)] += len(nameless.slices)
    return dict(doubtful)


def fingerprint_in_out(
    series: Series, found: Sequence[SegmentationSummary], values: Sequence[tuple[str, int]], names: Pseudonyms | None
) -> str:
    """Return the fingerprint of a series as it may be stored in OUT.

    With pseudonyms it is keyed, so that nobody who has the files can recognise the series by it.
    """
    plain = fingerprint(series, found, values)
    return plain if names is None else names.of("input", plain)


def _is_complete(wanted: str, recipe_sha256: str, output: Output, former: Entry) -> bool:
    """Whether an earlier output was made of exactly this input, recipe and version, and has all its files."""
    same = (former.fingerprint, former.recipe_sha256, former.version) == (wanted, recipe_sha256, _version.__version__)
    return same and former.status in DONE and output.contents(former.folder) == (former.files, former.bytes)
