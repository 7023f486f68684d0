"""Writes NIfTI-1 in one file, ``.nii`` or ``.nii.gz``, with the affine in RAS.

NIfTI stores the first index (i) fastest. This equals our C order of (k, j, i), so voxels are written as they are.

References
----------
NIfTI-1 data format (nifti1.h, NIMH DFWG, 2003): pixdim, qform, sform, scl_slope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.geometry import NEGLIGIBLE_SHIFT_MM
from gpuprep.output.writers.appending import appended
from gpuprep.output.writers.content import Content, OnFileFinished, ignore_finished_file
from gpuprep.output.writers.gzipping import gzipped

RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""LPS to RAS."""

SCANNER = 1
"""Code for an affine to scanner coordinates (NIFTI_XFORM_SCANNER_ANAT)."""


def write_nifti(
    path: Path, chunks: Iterator[NDArray[Any]], content: Content, finish_file: OnFileFinished = ignore_finished_file
) -> tuple[str, ...]:
    """Write a ``.nii`` or ``.nii.gz``; unsigned integers get a slope and intercept with which readers return HU."""
    header = _header(content)
    with _opened(path, finish_file) as append:
        append(memoryview(header.binaryblock + bytes(4)))  # no extensions
        for chunk in chunks:
            append(np.ascontiguousarray(chunk).data.cast("B"))
    if header["qform_code"]:
        return ()
    return (f"slices lean, and only the sform of {path.name} describes that: nibabel reads it, ITK refuses the file",)


def _header(content: Content) -> Any:
    from nibabel.nifti1 import Nifti1Header  # takes a second, and is an optional dependency

    header = Nifti1Header()
    header.set_data_shape(content.shape[::-1])
    header.set_data_dtype(content.dtype)
    header.set_xyzt_units("mm")
    affine = RAS @ content.grid.affine[:, [2, 1, 0, 3]]
    header.set_sform(affine, SCANNER)
    # A quaternion cannot describe shear. ITK needs one, and uses it if the axes of the sform are not perpendicular to
    # four digits.
    header.set_qform(affine, SCANNER)
    apart_mm = np.abs(_without_shear(affine[:3, :3]) - affine[:3, :3]) @ content.shape[::-1]
    if apart_mm.max() > NEGLIGIBLE_SHIFT_MM:
        header["qform_code"] = 0
    slope, intercept = content.hu if content.hu and content.dtype in ("uint8", "uint16") else (1.0, 0.0)
    header["scl_slope"], header["scl_inter"] = slope, intercept
    header["cal_min"], header["cal_max"] = (value * slope + intercept for value in content.display)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header


def _without_shear(axes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the nearest perpendicular axes of the same lengths: what a quaternion and *pixdim* describe.

    The header is not asked for them, because nibabel takes its quaternion for a turn of exactly 180° if it is within
    0.07° of one. That is nearly every CT, since LPS is turned to RAS.
    """
    lengths = np.linalg.norm(axes, axis=0)
    left, _, right = np.linalg.svd(axes / lengths)
    return np.asarray(left @ right * lengths)


@contextmanager
def _opened(path: Path, finish_file: OnFileFinished) -> Iterator[Callable[[memoryview], Any]]:
    if path.suffix == ".gz":
        with gzipped(path) as append:
            yield append
        finish_file(path)
    else:
        with appended(path, finish_file) as append:
            yield append
