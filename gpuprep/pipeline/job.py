"""Makes the task of each series that is to be converted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gpuprep.compute.backend import Backend
from gpuprep.core.formatting import printable
from gpuprep.dicom.discover import FILES_PER_TASK, Cohort
from gpuprep.executors.processes import Executor, answers
from gpuprep.output.folder_store import Output
from gpuprep.pipeline.convert_series import Task
from gpuprep.pipeline.decide import Needs, Outlook
from gpuprep.pipeline.options import ConvertOptions
from gpuprep.pipeline.pseudonyms import Pseudonyms, patient_ids


def doubtful_files(cohort: Cohort) -> dict[str, int]:
    """Return the number of files by folder that may be slices of the series in it, and cannot be read as such."""
    doubtful = Counter(folder for path, _ in cohort.unreadable for folder in (os.path.dirname(path), path))
    for nameless in (s for s in cohort if not s.series_uid):
        doubtful[printable(nameless.folder)] += len(nameless.slices)
    return dict(doubtful)


def task_of(
    outlook: Outlook,
    needs: Needs,
    options: ConvertOptions,
    backend: Backend,
    output: Output,
    doubtful: Mapping[str, int] | None = None,
) -> Task:
    """Return the task that converts a series, without its plan and audit, which are large.

    `doubtful` is what `doubtful_files` returns.
    """
    unreadable = (doubtful or {}).get(printable(outlook.series.folder), 0)
    note = f"{unreadable} files in its folder are unreadable or of no known series: a slice may be missing"
    return Task(
        series=outlook.series,
        recipe=options.recipe,
        engine=options.engine,
        backend=backend,
        output=output,
        folder=outlook.folder,
        former_folder=outlook.former.folder if outlook.former is not None else "",
        notes=(note,) if unreadable else (),
        segmentations=tuple(g.path for g in outlook.segmentations),
        warnings=tuple(w for g in outlook.segmentations if (w := g.warning) is not None),
        label_values=outlook.label_values,
        fingerprint=outlook.fingerprint,
        names=options.names,
        needed_bytes=needs.memory_bytes,
        output_bytes=needs.output_bytes,
    )


def patients_of(tasks: Sequence[Task], executor: Executor) -> dict[str, str | None]:
    """Return the *Patient ID* of the series of each task, by the key of the series; None: unreadable."""
    firsts = {t.series.slices[0]: t.series.key for t in tasks}
    headers = list(firsts)
    parts = [headers[i : i + FILES_PER_TASK] for i in range(0, len(headers), FILES_PER_TASK)]
    return {
        firsts[header]: found
        for part, ids in answers(executor, patient_ids, parts, lambda *_: None)
        for header, found in zip(part, ids, strict=True)
    }


def placed(task: Task, names: Pseudonyms, patient: str) -> Task:
    """Return a task with the folder that the patient of its series gives it."""
    return replace(task, folder=names.folder(task.series, patient))
