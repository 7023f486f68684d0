"""What is known of each series until its turn comes, and the task that is made of it then."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from gpuprep.compute.backend import Backend, Engine
from gpuprep.core.formatting import printable
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import Series
from gpuprep.core.stacking_rules import SeriesWarning
from gpuprep.dicom.discover import FILES_PER_TASK, Cohort
from gpuprep.executors.processes import Executor, answers
from gpuprep.output.folder_store import Output
from gpuprep.pipeline.convert_series import Task
from gpuprep.pipeline.decide import Needs, Outlook
from gpuprep.pipeline.pseudonyms import Pseudonyms, patient_ids


@dataclass(frozen=True, slots=True)
class Work:
    """What is kept of the outlook of a series until its turn comes: not its plan and audit, which are large."""

    series: Series
    action: Literal["convert", "skip", "reject"]
    folder: str
    known: bool
    """Whether the manifest has an earlier output of this series in that folder."""
    former_folder: str
    """Where the manifest has one."""
    reason: str
    codes: tuple[str, ...]
    segmentations: tuple[str, ...]
    warnings: tuple[SeriesWarning, ...]
    """About which segmentations go to the series."""
    label_values: tuple[tuple[str, int], ...]
    fingerprint: str
    needs: Needs


def doubtful_files(cohort: Cohort) -> dict[str, int]:
    """Return the number of files by folder that may be slices of the series in it, and cannot be read as such."""
    doubtful = Counter(folder for path, _ in cohort.unreadable for folder in (os.path.dirname(path), path))
    for nameless in (s for s in cohort if not s.series_uid):
        doubtful[printable(nameless.folder)] += len(nameless.slices)
    return dict(doubtful)


def work_on(outlook: Outlook, needs: Needs) -> Work:
    """Return what is kept of an outlook."""
    former = outlook.former
    return Work(
        series=outlook.series,
        action=outlook.action,
        folder=outlook.folder,
        known=former is not None and former.folder == outlook.folder,
        former_folder=former.folder if former is not None else "",
        reason=outlook.reason,
        codes=outlook.codes,
        segmentations=tuple(g.path for g in outlook.segmentations),
        warnings=tuple(w for g in outlook.segmentations if (w := g.warning) is not None),
        label_values=outlook.label_values,
        fingerprint=outlook.fingerprint,
        needs=needs,
    )


def task_of(
    work: Work,
    *,
    recipe: Recipe,
    engine: Engine,
    backend: Backend,
    output: Output,
    doubtful: Mapping[str, int],
    names: Pseudonyms | None = None,
) -> Task:
    """Return the task that does the work; `doubtful` is of `doubtful_files`."""
    unreadable = doubtful.get(printable(work.series.folder), 0)
    note = f"{unreadable} files in its folder are unreadable or of no known series: a slice may be missing"
    return Task(
        series=work.series,
        recipe=recipe,
        engine=engine,
        backend=backend,
        output=output,
        folder=work.folder,
        known=work.known,
        notes=(note,) if unreadable else (),
        segmentations=work.segmentations,
        warnings=work.warnings,
        label_values=work.label_values,
        fingerprint=work.fingerprint,
        names=names,
        needed_bytes=work.needs.memory_bytes,
        output_bytes=work.needs.output_bytes,
    )


def patients_of(works: list[Work], executor: Executor) -> dict[str, str | None]:
    """Return the *Patient ID* of each series that is to be converted, by the key of the series; None: unreadable."""
    todo = [w.series for w in works if w.action == "convert"]
    firsts = {s.slices[0]: s.key for s in todo}
    headers = list(firsts)
    tasks = [headers[i : i + FILES_PER_TASK] for i in range(0, len(headers), FILES_PER_TASK)]
    return {
        firsts[header]: found
        for task, ids in answers(executor, patient_ids, tasks, lambda *_: None)
        for header, found in zip(task, ids, strict=True)
    }


def placed(work: Work, names: Pseudonyms, patients: Mapping[str, str | None]) -> Work:
    """Return the work on a series with the folder that its patient gives it."""
    if work.action != "convert":
        return work
    patient = patients[work.series.key]
    if patient is None:  # among those of somebody else it would be worse than missing
        return replace(work, action="reject", reason="InputError: its Patient ID cannot be read", codes=("changed",))
    folder = names.folder(work.series, patient)
    return replace(work, folder=folder, known=folder == work.former_folder)
