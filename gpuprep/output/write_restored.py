"""Writes labels on the slices as acquired, each format by a function in `RESTORED_FORMATS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gpuprep.core.geometry import NEGLIGIBLE_SHIFT_MM
from gpuprep.core.recipe import Recipe
from gpuprep.core.restored import Restored
from gpuprep.errors import OutputError, RequestError
from gpuprep.files.replacing import replacing_path
from gpuprep.output.writers.content import Content
from gpuprep.output.writers.nifti import write_nifti as write_volume_as_nifti
from gpuprep.output.writers.npy import write_npy as write_volume_as_npy


class RestoredFormat(NamedTuple):
    """Format of restored labels."""

    endings: tuple[str, ...]
    """Endings of a file's name; the first is the default."""
    write: Callable[[Restored, Path], tuple[str, ...]] | None
    """Writes a file and returns notes. The file appears when it is complete. None for a format that needs the original
    images: see `gpuprep.pipeline.restore_seg`."""


def write_nifti(restored: Restored, file: Path) -> tuple[str, ...]:
    """Write a ``.nii`` or ``.nii.gz`` with the affine of the slices.

    Evenly leaning slices have a sheared affine. NIfTI cannot describe unevenly placed slices: the affine is then that
    of the nearest even slices, and a note has the largest distance.

    Raises
    ------
    RequestError
        If nibabel or isal is not installed.
    """
    grid, away_mm = restored.regular_grid()
    content = Content(grid, restored.values.dtype.name, "none", (0, max(1, int(restored.values.max()))), 0)
    try:
        with replacing_path(file) as part:
            leaning = write_volume_as_nifti(part, iter(restored.values[:, None]), content)
    except ImportError as exc:
        raise RequestError(f"{file} needs {exc.name}, which cannot be imported: pip install 'gpuprep[nifti]'") from exc
    notes = []
    if leaning:
        notes.append(f"slices lean by {grid.lean_mm:.3g} mm in all, so the affine has a shear: ITK refuses the file")
    if away_mm > NEGLIGIBLE_SHIFT_MM:
        notes.append(f"slices are unevenly placed, up to {away_mm:.3g} mm from where a NIfTI affine puts them")
    return tuple(notes)


def write_npy(restored: Restored, file: Path) -> tuple[str, ...]:
    """Write a ``.npy`` of shape (slices, rows, columns)."""
    content = Content(restored.regular_grid()[0], restored.values.dtype.name, "none", (0, 1), 0)
    with replacing_path(file) as part:
        return write_volume_as_npy(part, iter([restored.values]), content)


RESTORED_FORMATS: dict[str, RestoredFormat] = {
    "nifti": RestoredFormat((".nii.gz", ".nii"), write_nifti),
    "npy": RestoredFormat((".npy",), write_npy),
    "seg": RestoredFormat((".dcm",), None),
}
"""Formats by the value of ``--as``."""


def write_result(as_: str, restored: Restored, file: Path) -> tuple[str, ...]:
    """Write labels in a format that needs nothing else, and return notes.

    Raises
    ------
    RequestError
        If the format needs more, or its package is not installed.
    OutputError
        If the file cannot be written.
    """
    write = RESTORED_FORMATS[as_].write
    if write is None:
        raise RequestError(f"{as_} needs the original images: give --dicom")
    try:
        return write(restored, file)
    except OSError as exc:
        raise OutputError(f"{file} cannot be written: {exc.strerror or exc}") from exc


def check_installed(as_: str) -> None:
    """Raise RequestError if a package that a format needs is not installed."""
    if as_ == "nifti":
        Recipe(format="nifti").check_installed()


def format_of(name: str) -> str | None:
    """Return the format with the ending of a file name; None if there is none."""
    endings = ((name_, ending) for name_, f in RESTORED_FORMATS.items() for ending in f.endings)
    return next((name_ for name_, ending in endings if name.lower().endswith(ending)), None)
