"""A small cohort to look at: synthetic patients as DICOM, two of them with slices missing on purpose, converted."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from gpuprep.backend import BackendName, NumpyBackend, get_backend
from gpuprep.batch import Listener, Run, convert
from gpuprep.errors import RequestError
from gpuprep.phantom import thorax, write_series
from gpuprep.recipe import Recipe

THIN, THICK = (3.0, 1.6, 1.6), (5.0, 1.5, 1.5)
"""Spacings in mm: coarse, so that the demo is a matter of seconds."""


@dataclass(frozen=True, slots=True)
class Demo:
    """Where the demo put things."""

    dicom: Path
    volumes: Path
    run: Run


def write_cohort(folder: Path) -> None:
    """Write four patients: a plain chest, two series in one folder, one slice lost, and a whole block of them."""
    write_series(folder / "patient-1" / "chest", thorax((60, 224, 224), THIN, seed=1), THIN)
    for number in (2, 3):
        stored = thorax((30, 240, 240), THICK, seed=number)
        write_series(folder / "patient-2", stored, THICK, series_number=number)
    for number, lost in ((3, range(10, 11)), (4, range(8, 14))):
        files = write_series(folder / f"patient-{number}", thorax((24, 224, 224), THIN, seed=number + 1), THIN)
        for n in lost:
            files[n].unlink()
    (folder / "patient-1" / "notes.txt").write_text("Files that are no CT images may lie anywhere.\n")


def run_demo(
    out: Path, *, backend: BackendName = "auto", jobs: int | None = None, listener: Listener | None = None
) -> Demo:
    """Write the cohort to ``OUT/dicom`` and convert it to ``OUT/volumes``; four series come out, one is rejected."""
    dicom, volumes = out / "dicom", out / "volumes"
    try:
        if not dicom.exists():
            part = out / "dicom.part"
            shutil.rmtree(part, ignore_errors=True)
            write_cohort(part)
            part.rename(dicom)
    except OSError as exc:
        raise RequestError(f"cannot write into {out}: {exc.strerror}; choose another folder") from exc
    chosen = get_backend(backend)
    if chosen.body == "loops":
        chosen = NumpyBackend("matmul")  # the first time, compiling the loops would take longer than the whole demo
    run = convert(dicom, volumes, Recipe(), backend=chosen, jobs=jobs, listener=listener)
    return Demo(dicom, volumes, run)
