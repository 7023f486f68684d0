"""Writes and converts the demo cohort: synthetic patients as DICOM, two with missing slices, one with outlines."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from gpuprep.compute.backend import BackendName, NumpyBackend, get_backend
from gpuprep.core.recipe import Recipe
from gpuprep.errors import RequestError
from gpuprep.pipeline.cohort import convert
from gpuprep.pipeline.events import Listener, Run
from gpuprep.testing import outlines, thorax, write_series

THIN, THICK = (3.0, 1.6, 1.6), (5.0, 1.5, 1.5)
"""Voxel spacings in mm (slices, rows, columns), coarse so that the demo takes seconds."""


@dataclass(frozen=True, slots=True)
class Demo:
    """Folders that the demo wrote, and its run."""

    dicom: Path
    masks: Path
    volumes: Path
    run: Run


def write_cohort(folder: Path) -> None:
    """Write four patients: a regular chest, two series in one folder, one missing slice, and six missing slices."""
    write_series(folder / "patient-1" / "chest", thorax((60, 224, 224), THIN, seed=1), THIN)
    for number in (2, 3):
        stored = thorax((30, 240, 240), THICK, seed=number)
        write_series(folder / "patient-2", stored, THICK, series_number=number)
    for number, missing in ((3, range(10, 11)), (4, range(8, 14))):
        files = write_series(folder / f"patient-{number}", thorax((24, 224, 224), THIN, seed=number + 1), THIN)
        for n in missing:
            files[n].unlink()
    (folder / "patient-1" / "notes.txt").write_text("Files that are no CT images may lie anywhere.\n")


def write_outlines(folder: Path) -> None:
    """Write heart and spine of the first patient as text, into a folder named like that of its series."""
    series_folder = folder / "patient-1" / "chest"
    series_folder.mkdir(parents=True)
    lines = ["structure x_mm y_mm z_mm"]
    for name, contours in outlines((60, 224, 224), THIN).items():
        lines += [f"{name} {x:.3f} {y:.3f} {z:.3f}" for points in contours for x, y, z in points]
    (series_folder / "outlines.txt").write_text("\n".join(lines) + "\n")


def run_demo(
    out: Path, *, backend: BackendName = "auto", jobs: int | None = None, listener: Listener | None = None
) -> Demo:
    """Write the cohort to ``OUT/dicom`` and ``OUT/masks`` and convert it to ``OUT/volumes``.

    Four series are converted, one of them with labels, and one is rejected.
    """
    dicom, masks, volumes = out / "dicom", out / "masks", out / "volumes"
    try:
        for folder, write in ((dicom, write_cohort), (masks, write_outlines)):
            if not folder.exists():
                part = folder.with_suffix(".part")
                shutil.rmtree(part, ignore_errors=True)
                write(part)
                part.rename(folder)
    except OSError as exc:
        raise RequestError(f"cannot write into {out}: {exc.strerror}; choose another folder") from exc
    chosen = get_backend(backend)
    if chosen.body == "loops":
        chosen = NumpyBackend("matmul")  # compiling the loops for the first time would take longer than the demo
    run = convert(dicom, volumes, Recipe(), masks=masks, backend=chosen, jobs=jobs, listener=listener)
    return Demo(dicom, masks, volumes, run)
