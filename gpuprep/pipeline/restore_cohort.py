"""Brings a folder of predictions back to the slices as acquired; a bad prediction never stops the others."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gpuprep import _version
from gpuprep.core.formatting import printable
from gpuprep.core.series import Series
from gpuprep.errors import GpuprepError, NothingFoundError, OutputError, PredictionError, RequestError
from gpuprep.executors.processes import Executor, WorkerDiedError, never
from gpuprep.files.replacing import make_folder
from gpuprep.output.find_predictions import OutputNames, find_outputs, find_predictions, without_ending
from gpuprep.output.label_names import label_names_above
from gpuprep.output.own_files import SIDECAR
from gpuprep.output.read_prediction import ending_of
from gpuprep.output.read_volume import FinishedOutput
from gpuprep.output.restore_record import RestoredRow, RestoreRecord
from gpuprep.output.write_restored import RESTORED_FORMATS
from gpuprep.pipeline.restore_file import restore_file
from gpuprep.pipeline.restore_seg import SegRequest, series_by_key

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Task:
    """One prediction to restore."""

    prediction: Path
    output: Path
    result: Path
    as_: str
    threshold: float | None
    names: dict[int, str] | None
    """Names of the labels; None: those of the output."""
    seg: SegRequest | None
    originals: tuple[Series, ...]
    """The series of the output, for a SEG."""
    row: RestoredRow
    """Its row without a verdict."""
    former: RestoredRow | None
    """Its row of an earlier run."""


@dataclass(frozen=True, slots=True)
class RestoredCohort:
    """Result of a run over a folder of predictions."""

    rows: tuple[RestoredRow, ...]
    without_prediction: int
    """Number of outputs without a prediction."""
    stopped: bool
    """Whether a stop was requested before the last prediction."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of predictions by verdict."""
        return dict(Counter(row.verdict for row in self.rows))


def restore_cohort(
    predictions: Path,
    out: Path,
    results: Path,
    as_: str,
    threshold: float | None,
    executor: Executor,
    *,
    names: dict[int, str] | None = None,
    seg: SegRequest | None = None,
    found: Callable[[int], None] = lambda _: None,
    finished: Callable[[RestoredRow], None] = lambda _: None,
    stopped: Callable[[], bool] = never,
) -> RestoredCohort:
    """Restore every prediction in a folder, and record what became of each in ``restored.csv`` among the results.

    Parameters
    ----------
    predictions : Path
        Folder of predictions: see `gpuprep.output.find_predictions`.
    out : Path
        Output folder of the conversion.
    results : Path
        Folder of the results, made if absent. Complete and unchanged results in it are skipped.
    as_ : str
        Format of the results, a key of `RESTORED_FORMATS`.
    threshold : float, optional
        See `gpuprep.restore`.
    executor : Executor
        Executor of the tasks.
    names : dict of int to str, optional
        Names of the labels; by default those of the outputs.
    seg : SegRequest, optional
        Needed for the format "seg".
    found, finished : callable
        Called with the number of predictions, and with each row.
    stopped : callable
        Once it returns True, no more predictions begin.

    Raises
    ------
    NothingFoundError
        If there is no prediction, or no output.
    RequestError
        If the results would lie among the predictions, outputs or original images, or these among the results; or if
        another run writes the same results.
    OSError
        If the record cannot be written.
    """
    for place, what in ((predictions, "predictions"), (out, "outputs")):
        if not place.is_dir():
            raise RequestError(f"{place} is no folder of {what} on this machine")
        check_apart(results, place, what)
    for path in seg.paths if seg is not None else ():
        check_apart(results, Path(path), "original images")
    if results.exists() and not results.is_dir():
        raise RequestError(f"--out {results} is a file: give a folder for the results")
    outputs = find_outputs(out)
    if not outputs:
        raise NothingFoundError(f"{out} holds no output: give the --out of a conversion, or the folder of a series")
    files = list(find_predictions(predictions))
    if not files:
        raise NothingFoundError(f"{predictions} holds no prediction: .nii.gz, .nii, .npy, .npz, .tif or .ome.zarr")
    originals = series_by_key(seg, (out / name for name in outputs)) if seg is not None else {}
    found(len(files))
    make_folder(results)
    rows: list[RestoredRow] = []
    with RestoreRecord(results) as record:

        def finish(row: RestoredRow) -> None:
            rows.append(row)
            record.add(row)
            finished(row)

        tasks = []
        for row, decided in _matched(files, OutputNames(outputs), RESTORED_FORMATS[as_].endings[0]):
            if decided:
                finish(row)
            else:
                places = predictions / row.prediction, out / row.output, results / row.result
                own = tuple(_own(originals, places[1])) if seg is not None else ()
                former = record.former.get(row.prediction)
                tasks.append(_Task(*places, as_, threshold, names, seg, own, row, former))
        for task, outcome in executor.run(_restore_one, tasks, stopped=stopped):
            if isinstance(outcome, WorkerDiedError):
                outcome = replace(task.row, verdict="failed", result="", reason=str(outcome))
            finish(outcome)
        complete = len(rows) == len(files)
        if complete:
            record.finish()
    without = len(outputs) - len({row.output for row in rows} - {""})
    return RestoredCohort(tuple(sorted(rows, key=lambda row: row.prediction)), without, not complete)


def check_apart(results: Path, place: Path, what: str) -> None:
    """Raise RequestError if results lie in a folder that is read, or that folder in them: one could replace the other.

    Parameters
    ----------
    results, place : Path
        Results, and a file or folder that is read.
    what : str
        Content of the latter, for the message.
    """
    if results.resolve().is_relative_to(place.resolve()):
        raise RequestError(f"--out {results} lies in the folder of {what} {place}: choose one outside of it")
    if place.resolve().is_relative_to(results.resolve()):
        raise RequestError(f"--out {results} has the {what} {place} in it: choose a folder of its own")


def _own(originals: dict[str, Series], output: Path) -> Iterator[Series]:
    """Yield the original series of an output, if it is there."""
    with suppress(OutputError):  # a damaged output fails when it is restored
        if own := originals.get(str(FinishedOutput(output).sidecar.get("key"))):
            yield own


def _matched(names: list[str], outputs: OutputNames, ending: str) -> Iterator[tuple[RestoredRow, bool]]:
    """Yield the row of each prediction, and whether its verdict is known already."""
    same = defaultdict(list)
    for name in names:
        same[without_ending(name)].append(name)
    for stem, files in same.items():
        # nnU-Net writes the probabilities of a case beside its labels.
        labels = [name for name in files if ending_of(name) != ".npz"] or files
        for name in files:
            row = RestoredRow(name, "failed")
            if name not in labels:
                reason = f"{printable(labels[0])} is the prediction of the same name"
                yield replace(row, verdict="passed over", reason=reason), True
            elif len(labels) > 1:
                yield replace(row, reason=f"several predictions have this name: {printable(', '.join(labels))}"), True
            else:
                try:
                    yield replace(row, output=outputs.output_of(name), result=stem + ending), False
                except PredictionError as exc:
                    yield replace(row, verdict="unmatched", reason=str(exc)), True


def _restore_one(task: _Task) -> RestoredRow:
    """Restore one prediction; every error ends in its row. Runs in a worker."""
    row, former = task.row, task.former
    try:
        row = replace(row, made_of=_made_of(task))
        if former is not None and _is_result(former, task):
            if former.made_of == row.made_of:
                return replace(row, verdict="skipped", notes=former.notes, result_identity=former.result_identity)
            task.result.unlink()  # what it was made of has changed, and the new prediction may be bad
        _, notes = restore_file(
            task.prediction, task.output, task.result, task.as_, task.threshold, task.names, task.seg, task.originals
        )
        return replace(row, verdict="restored", notes="; ".join(notes), result_identity=_identity(task.result))
    except (GpuprepError, OSError, MemoryError) as exc:
        return replace(row, verdict="failed", result="", reason=printable(str(exc) or type(exc).__name__))
    except Exception as exc:  # a bug that one prediction provokes must not stop the others
        log.exception("prediction %s crashed", row.prediction)
        return replace(row, verdict="failed", result="", reason=printable(f"{type(exc).__name__}: {exc}"))


def _is_result(former: RestoredRow, task: _Task) -> bool:
    """Return whether a file is the complete result of an earlier run."""
    return former.result == task.row.result and former.result_identity == _identity(task.result) != ""


def _made_of(task: _Task) -> str:
    """Return a hash of what a result depends on: prediction, ``volume.json``, names, settings and version."""
    digest = hashlib.sha256((task.output / SIDECAR).read_bytes())
    parts = [task.prediction.name, _identity(task.prediction)]
    for folder, subfolders, files in os.walk(task.prediction):  # nothing, for a file
        subfolders.sort()
        parts += [f"{folder}/{name} {_identity(Path(folder, name))}" for name in sorted(files)]
    seg = task.seg and (task.seg.options, task.seg.masks, [s.fingerprint for s in task.originals])
    named = label_names_above(task.output.absolute().parents) if seg and task.names is None else task.names
    settings = task.as_, task.threshold, named, seg
    digest.update(repr((parts, settings, _version.__version__)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _identity(file: Path) -> str:
    """Return size and modification time of a file; "" if there is none."""
    with suppress(OSError):
        status = file.stat()
        return f"{status.st_size} {status.st_mtime_ns}"
    return ""
