"""Converts one series from files to files, in a worker; every error of a series ends in its result."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from gpuprep import _version
from gpuprep.compute.memory_estimate import needed_bytes
from gpuprep.core.formatting import printable
from gpuprep.core.plan import Plan
from gpuprep.core.stacking_rules import codes, texts
from gpuprep.dicom.audit import Audit, audit
from gpuprep.errors import BackendError, DeviceMemoryError, GpuprepError, InputError, OutputError, PlanError
from gpuprep.executors.processes import request_replacement
from gpuprep.output.folder_store import PendingFolder, Written
from gpuprep.output.own_files import PREVIEW
from gpuprep.output.preview import MiddlePlanes, below, draw_crop, draw_preview, encode_jpeg
from gpuprep.output.records import SeriesResult, Status, now
from gpuprep.pipeline.sidecar import sidecar_of
from gpuprep.pipeline.task import Task

if TYPE_CHECKING:
    from gpuprep.compute.crop import Crop
    from gpuprep.compute.hu_slabs import Source
    from gpuprep.dicom.read import SeriesReader
    from gpuprep.pipeline.convert_masks import Masked

log = logging.getLogger(__name__)

DEVICE_MEMORY = "device-memory"
"""Code of a series that did not fit into the free memory of the device."""


@dataclass(frozen=True, slots=True)
class Filled:
    """A series whose files are written, but not yet flushed to disk and moved into place."""

    blank: SeriesResult
    """Result without output, in case of an error."""
    result: SeriesResult
    pending: PendingFolder
    sidecar: dict[str, Any]
    """Content of ``volume.json``, without the files."""


def convert_series(task: Task) -> SeriesResult:
    """Convert one series and return what happened; every error is in the result, and nothing is raised."""
    filled = fill_series(task)
    return commit_series(task, filled) if isinstance(filled, Filled) else filled


def fill_series(task: Task) -> Filled | SeriesResult:
    """Write the files of one series; return the result at once if there is nothing to commit."""
    result = task.result()
    try:
        audited = audit(task.planned.series, task.recipe.rules)
        result = task.result(audited)
        recognised = _recognised(task, result)
        if recognised is None:
            return _fill(task, audited, result)
        result = recognised
    except GpuprepError as exc:
        result = left_out(result, exc)
        if isinstance(exc, BackendError) and not isinstance(exc, DeviceMemoryError):
            request_replacement()  # a lost device is lost to this process only; a new one may find it
    except Exception as exc:  # a bug that one series provokes must not stop the others
        log.exception("series %s crashed", result.key)
        result = left_out(result, exc)
    return replace(result, finished=now())


def commit_series(task: Task, filled: Filled) -> SeriesResult:
    """Flush the files of a series to disk, move them into place, and return the result; nothing is raised."""
    started = time.perf_counter()
    try:
        written = filled.pending.commit(filled.sidecar, known=task.known)
        write_s = filled.result.write_s + time.perf_counter() - started
        result = _in_place(replace(filled.result, write_s=write_s), task, written)
    except OSError as exc:
        result = left_out(filled.blank, _unwritable(exc))
    except GpuprepError as exc:
        result = left_out(filled.blank, exc)
    except Exception as exc:
        log.exception("series %s crashed", filled.blank.key)
        result = left_out(filled.blank, exc)
    finally:
        filled.pending.discard()
    return replace(result, finished=now())


def left_out(result: SeriesResult, exc: Exception) -> SeriesResult:
    """Return the result of a series that was not converted because of an error."""
    status: Status = "rejected" if isinstance(exc, InputError | PlanError) else "failed"
    code = "error"
    if isinstance(exc, InputError | PlanError | OutputError):
        code = exc.code
    elif isinstance(exc, DeviceMemoryError):
        code = DEVICE_MEMORY
    return replace(result, status=status, reason=printable(f"{type(exc).__name__}: {exc}"), codes=(code,))


def _recognised(task: Task, blank: SeriesResult) -> SeriesResult | None:
    """Return the result of a complete output that equals what this task would make; None if there is none.

    Such an output exists if a run ended before its result was stored, or if the manifest was lost.
    """
    found = task.output.intact(task.planned.folder)
    if found is None:
        return None
    sidecar, written = found
    try:
        same = (sidecar["key"], sidecar["fingerprint"], sidecar["recipe_sha256"], sidecar["versions"]["gpuprep"])
        if same != (blank.key, blank.fingerprint, task.recipe.sha256, _version.__version__):
            return None
        source = sidecar["source"]
        made = {k: sidecar[k] for k in ("codes", "irregularities", "warnings", "shape", "spacing_mm")}
        made |= {k: sidecar[k] for k in ("labels", "segmentations") if k in sidecar}
        made |= {f"source_{k}": source[k] for k in ("shape", "spacing_mm")}
        made = {k: tuple(v) for k, v in made.items()}
        made["crop"] = sidecar["crop"]
        measured = ("hu_min", "hu_max", "hu_mean", "padding_share", "quality")
        made |= {k: source[k] for k in measured if k in source}
        made |= {k: sidecar[k] for k in ("engine", "backend", "device")}
        return _in_place(replace(blank, status=sidecar["verdict"], **made), task, written)
    except (KeyError, TypeError):
        return None


def _in_place(result: SeriesResult, task: Task, written: Written) -> SeriesResult:
    """Return a result with folder, size and checksum of its output."""
    return replace(result, folder=task.planned.folder, files=written.files, bytes=written.bytes, sha256=written.sha256)


def _fill(task: Task, audited: Audit, blank: SeriesResult) -> Filled:
    # Imported here, in the worker: the parent of a cohort only hands out tasks, and stays small.
    from gpuprep.pipeline.series_input import placed_structures, series_input

    if audited.stack is None:
        raise audited.error or AssertionError("neither stack nor reason")
    stacked = audited.stack
    given = series_input(task, stacked)
    plan, crop = given.plan, given.crop
    result = replace(
        blank,
        warnings=blank.warnings + texts(crop.warnings if crop else ()),
        source_shape=plan.source.shape,
        source_spacing_mm=plan.source.spacing_mm,
        crop=None if crop is None else crop.to_dict(plan.recipe, plan.source),
        process_s=given.crop_s,
    )
    masked: Masked | None = None
    image = MiddlePlanes(plan.target.shape) if plan.recipe.image else None
    labels: list[MiddlePlanes] = []
    try:
        pending = task.output.pending(task.planned.folder)
    except OSError as exc:
        raise _unwritable(exc) from exc
    filled: Filled | None = None
    try:
        irregularities, warnings = audited.irregularities, task.planned.match_warnings + audited.warnings
        if crop is not None:
            warnings += crop.warnings
        if given.pixels is not None and image is not None:
            reader, source = given.pixels
            result = _write_image(task, plan, reader, source, pending, result, image)
            irregularities += reader.irregularities
            warnings += reader.warnings + plan.warnings
        if task.planned.segmentations:
            from gpuprep.pipeline.convert_masks import write_masks

            started = time.perf_counter()
            wanted, masked = given.placed or placed_structures(task, stacked)
            values = dict(task.planned.label_values)
            labels = write_masks(wanted, masked, stacked, plan, task.backend, values, pending.path, pending.finish_file)
            result = replace(
                result,
                warnings=tuple(dict.fromkeys((*result.warnings, *masked.notes))),  # those of the writer may be there
                segmentations=tuple(masked.segmentations),
                labels=tuple(asdict(label) for label in masked.labels),
                masks_s=time.perf_counter() - started,
            )
        result = replace(
            result,
            status="fixed" if irregularities and task.recipe.policy == "fix" else "ok",
            codes=codes((*irregularities, *warnings)),
            irregularities=texts(irregularities),
            shape=plan.target.shape,
            spacing_mm=plan.target.spacing_mm,
        )
        started = time.perf_counter()
        _write_preview(plan, pending, image, labels, crop)
        pending.finish_rest()
        sidecar = sidecar_of(task, plan, task.public(result))
        result = replace(result, write_s=result.write_s + time.perf_counter() - started)
        filled = Filled(blank, result, pending, sidecar)
    except DeviceMemoryError as exc:
        need = needed_bytes(plan, task.backend, task.engine) / 1e9
        raise DeviceMemoryError(
            f"{exc}; in chunks of {task.backend.chunk_slices} slices the series needs about {need:.2f} GB"
        ) from exc
    except OSError as exc:
        raise _unwritable(exc) from exc
    finally:
        if filled is None:
            pending.discard()
    return filled


def _unwritable(exc: OSError) -> OutputError:
    full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
    return OutputError(f"cannot write the series: {exc}", "disk-full" if full else None)


def _write_image(
    task: Task,
    plan: Plan,
    reader: SeriesReader,
    source: Source,
    pending: PendingFolder,
    result: SeriesResult,
    planes: MiddlePlanes,
) -> SeriesResult:
    """Write the image of a series into a folder and return its result so far; `planes` keeps the middle planes."""
    from gpuprep.compute.process import host_chunks
    from gpuprep.output.writers import WRITERS
    from gpuprep.output.writers.content import Content

    started, read_before_s = time.perf_counter(), reader.seconds
    on_device: dict[str, Any] = {}
    chunks = _Timed(host_chunks(source, plan, task.backend, task.engine, on_device))
    ending = task.recipe.ending
    path = pending.path / f"volume{ending}" if ending else pending.path
    write = WRITERS[task.recipe.format]
    notes = write(path, planes.collecting(chunks), Content.image(plan), pending.finish_file) + _stretched(plan)
    read_s = reader.seconds - read_before_s
    return replace(
        result,
        warnings=result.warnings + texts(reader.warnings + plan.warnings) + notes,
        padding_share=reader.padding_voxels / reader.statistics.voxels,
        hu_min=reader.statistics.low,
        hu_max=reader.statistics.high,
        hu_mean=reader.statistics.mean,
        quality=reader.histogram.to_dict(),
        read_s=reader.seconds,
        process_s=result.process_s + max(0.0, chunks.seconds - read_s),  # a thread may have read at the same time
        write_s=time.perf_counter() - started - chunks.seconds,
        **on_device,
    )


def _write_preview(
    plan: Plan, pending: PendingFolder, image: MiddlePlanes | None, labels: list[MiddlePlanes], crop: Crop | None
) -> None:
    """Write the preview of a series into a folder: its output, and above it the box to which it is cropped."""
    from gpuprep.output.writers.content import Content

    picture = draw_preview(image, plan.target, *Content.image(plan).display, labels)
    if crop is not None and crop.found:
        picture = below(draw_crop(crop.coarse, plan.source, crop.box), picture)
    (pending.path / PREVIEW).write_bytes(encode_jpeg(picture))


def _stretched(plan: Plan) -> tuple[str, ...]:
    """Return a warning if slices that grew by a shear were stretched to another ratio of rows and columns."""
    _, rows_mm, columns_mm = plan.target.spacing_mm
    _, before_rows_mm, before_columns_mm = plan.resampled.spacing_mm
    changed = abs(rows_mm * before_columns_mm / (columns_mm * before_rows_mm) - 1)
    if not plan.shifted or changed < 0.01:
        return ()
    return (
        f"slices grew to {plan.resampled.shape[1]} × {plan.resampled.shape[2]} and were stretched to "
        f"{plan.target.shape[1]} × {plan.target.shape[2]}: pixels are {rows_mm:.4g} × {columns_mm:.4g} mm "
        "(--fit pad or --size none keep their shape)",
    )


class _Timed:
    """An iterator that measures the time in its source."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        try:
            return next(self._source)
        finally:
            self.seconds += time.perf_counter() - started
