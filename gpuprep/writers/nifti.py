"""NIfTI-1 in one file, ``.nii`` or ``.nii.gz``: voxels with their place in RAS, which nibabel, ITK and others read.

Its order of voxels, first index fastest, is ours of (k, j, i) with the axes named the other way round; nothing moves.

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

from gpuprep.writers.content import Content, Settle, nothing
from gpuprep.writers.gzipping import gzipped

RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From LPS."""

SCANNER = 1
"""Code of an affine that leads to the coordinates of the scanner (NIFTI_XFORM_SCANNER_ANAT)."""


def write_nifti(
    path: Path, chunks: Iterator[NDArray[Any]], content: Content, settle: Settle = nothing
) -> tuple[str, ...]:
    """Write a ``.nii`` or ``.nii.gz``; readers get HU where a window is spread over the range of an integer type."""
    with _opened(path) as append:
        append(memoryview(_header(content)))
        for chunk in chunks:
            append(np.ascontiguousarray(chunk).data.cast("B"))
    settle(path)
    return ()


def _header(content: Content) -> bytes:
    from nibabel.nifti1 import Nifti1Header  # takes a second, and is an extra

    header = Nifti1Header()
    header.set_data_shape(content.shape[::-1])
    header.set_data_dtype(content.dtype)
    header.set_xyzt_units("mm")
    affine = RAS @ content.grid.affine[:, [2, 1, 0, 3]]
    header.set_sform(affine, SCANNER)
    # A quaternion holds a rotation only; where that is not all, pixdim alone is taken from it.
    header.set_qform(affine, SCANNER if _is_rigid(affine) else 0)
    slope, intercept = content.hu if content.hu and content.dtype in ("uint8", "uint16") else (1.0, 0.0)
    header["scl_slope"], header["scl_inter"] = slope, intercept
    header["cal_min"], header["cal_max"] = (value * slope + intercept for value in content.display)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return bytes(header.binaryblock) + bytes(4)  # no extensions


def _is_rigid(affine: NDArray[np.float64]) -> bool:
    """Whether the axes are perpendicular, as far as a header of float32 can tell."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.allclose(axes.T @ axes, np.eye(3), rtol=0, atol=1e-5))


@contextmanager
def _opened(path: Path) -> Iterator[Callable[[memoryview], Any]]:
    if path.suffix == ".gz":
        with gzipped(path) as append:
            yield append
    else:
        with open(path, "wb") as f:
            yield f.write
