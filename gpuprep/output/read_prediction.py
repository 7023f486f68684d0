"""Reads predictions of models: NIfTI, OME-Zarr, TIFF, NumPy, and the probabilities of nnU-Net.

The axes of a prediction become those of the output: slices, rows, columns. Only NIfTI tells where its voxels lie; if it
does, its axes may be permuted and reversed. A file that does not tell has the axes of the output.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import printable
from gpuprep.core.geometry import Geometry
from gpuprep.errors import GpuprepError, PredictionError, RequestError
from gpuprep.output.own_files import SIDECAR
from gpuprep.output.writers.nifti import RAS

SLICE_ENDINGS = (".tif", ".tiff")

FIRST_VOXEL, CORNERS = 0.25, 0.75
"""Largest distance in voxels along each axis between the first voxels of a file and of the output, and between their
corners. A quaternion describes a turn of nearly 180°, as of nearly every CT, to a thousandth only, around the first
voxel: that is half a voxel at the end of 512."""

LARGEST_PROBABILITY = 1.5
"""Larger values of a NIfTI file of scaled integers are labels, which nibabel scaled: 2.004 is 2."""

NEARLY_WHOLE = 1e-3
"""Largest distance from whole numbers of such values if all are labels up to 1: 1.00000006 is 1."""


def read_prediction(path: str | os.PathLike[str], grid: Geometry) -> NDArray[Any]:
    """Return a prediction with the axes of an output.

    Parameters
    ----------
    path : path
        A ``.nii``, ``.nii.gz``, ``.npy``, ``.npz``, ``.tif`` or ``.ome.zarr``, or a folder with a TIFF for each slice.
    grid : Geometry
        Grid of the output.

    Returns
    -------
    array, shape (k, j, i) or (classes, k, j, i)
        Values as stored; a memory map for a ``.npy``. Unless the file tells where its voxels lie, it is the caller who
        compares the shape with that of the output.

    Raises
    ------
    PredictionError
        If the file cannot be read, or lies elsewhere.
    RequestError
        If the package of the format is not installed, or the path does not exist.
    """
    file = Path(path)
    if not (file.is_file() or file.is_dir()):  # a pipe would be waited for
        raise RequestError(f"there is no prediction {file}")
    if file.is_dir() and (file / SIDECAR).exists():
        raise RequestError(f"{file} is the folder of an output: give the file or folder of a prediction")
    ending = ending_of(file.name)
    read = _READERS.get(ending) if file.is_dir() == (ending in ("", ".zarr", ".ome.zarr")) else None
    if read is None:
        raise PredictionError(
            f"{file} is no prediction: give a .nii, .nii.gz, .npy, .npz or .tif file, an .ome.zarr, or a folder of "
            "slices as .tif"
        )
    try:
        return read(file, grid)
    except GpuprepError:
        raise
    except ImportError as exc:
        extra = "zarr" if exc.name == "zarr" else "nifti"
        raise RequestError(
            f"{file} needs {exc.name}, which cannot be imported: pip install 'gpuprep[{extra}]'"
        ) from exc
    except MemoryError as exc:
        raise PredictionError(f"{file} cannot be read: not enough memory") from exc
    except Exception as exc:  # a damaged file can make the libraries raise almost anything
        reason = printable(" ".join(str(exc).split()))
        raise PredictionError(f"{file} cannot be read ({type(exc).__name__}: {reason})") from exc


def ending_of(name: str) -> str:
    """Return the ending of a prediction's file name, in lower case; "" for other names."""
    lower = name.lower()
    return next((ending for ending in _READERS if ending and lower.endswith(ending)), "")


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sorting key by which ``9.tif`` comes before ``10.tif``."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _from_slices(folder: Path, _: Geometry) -> NDArray[Any]:
    import tifffile

    names = sorted((n for n in os.listdir(folder) if n.lower().endswith(SLICE_ENDINGS)), key=natural_order)
    if not names:
        raise PredictionError(f"{folder} has no slices as .tif: give a prediction, or with --to OUT a folder of them")
    slices = [tifffile.imread(folder / name) for name in names]
    if len(shapes := {s.shape for s in slices}) > 1:
        raise PredictionError(f"the slices in {folder} have several shapes: {sorted(shapes)}")
    return np.stack(slices)


def _from_stack(file: Path, _: Geometry) -> NDArray[Any]:
    import tifffile

    return np.asarray(tifffile.imread(file))


def _from_npy(file: Path, _: Geometry) -> NDArray[Any]:
    return np.asanyarray(np.load(file, mmap_mode="r", allow_pickle=False))


def _from_npz(file: Path, _: Geometry) -> NDArray[Any]:
    with open(file, "rb") as f, np.load(f, allow_pickle=False) as found:  # NumPy does not close a damaged one
        names = list(found)
        if "probabilities" not in names and len(names) != 1:
            raise PredictionError(f"{file} has the arrays {', '.join(names) or 'none'}: name one of them probabilities")
        return np.asarray(found["probabilities" if "probabilities" in names else names[0]])


def _from_zarr(folder: Path, _: Geometry) -> NDArray[Any]:
    import zarr

    found: Any = zarr.open(folder, mode="r")
    return np.asarray((found if isinstance(found, zarr.Array) else found["0"])[...])


def _from_nifti(file: Path, grid: Geometry) -> NDArray[Any]:
    import nibabel

    if file.suffix.lower() == ".gz":
        _check_gzip(file)
    image: Any = nibabel.load(file)
    proxy = image.dataobj
    stored = np.asanyarray(proxy)
    if proxy.dtype.kind in "iu" and stored.dtype.kind == "f":
        whole = np.rint(stored)
        if stored.max() > LARGEST_PROBABILITY or np.abs(stored - whole).max() < NEARLY_WHOLE:
            stored = whole
    # NIfTI has i first. Its further axes, for classes, become the first ones; empty ones among them are removed.
    values: NDArray[Any] = stored.T
    values = values.reshape(*(n for n in values.shape[:-3] if n != 1), *values.shape[-3:])
    stated = _affine(image)
    if values.ndim < 3 or stated is None:
        return values
    affine = RAS @ stated[:, [2, 1, 0, 3]]
    turned = _turned(values, affine, grid)
    if turned is None:
        raise PredictionError(
            f"{file} lies elsewhere than the output: it has {values.shape[-3:]} slices, rows and columns with the "
            f"affine {_text(affine)}, the output {grid.shape} with {_text(grid.affine)} (LPS, mm)"
        )
    return turned


def _check_gzip(file: Path) -> None:
    """Raise an error if a gzip file is damaged: nibabel stops before the checksum at its end."""
    from isal import igzip

    with igzip.open(file) as f:
        while f.read(2**20):
            pass


def _affine(image: Any) -> NDArray[np.float64] | None:
    """Return the affine of a NIfTI file, to RAS; None if the file does not tell where its voxels lie.

    That is the sform, or else the qform. Programs that do not know it have code 0, or write the identity, in RAS or in
    LPS, maybe only in one of both.
    """
    for read in (image.get_sform, image.get_qform):
        matrix, code = read(coded=True)
        if code and not any(np.allclose(matrix, known, rtol=0, atol=1e-6) for known in (np.eye(4), RAS)):
            return np.asarray(matrix, np.float64)
    return None


def _turned(values: NDArray[Any], affine: NDArray[np.float64], grid: Geometry) -> NDArray[Any] | None:
    """Return values whose axes are permuted and reversed so that they lie on a grid; None if they lie elsewhere."""
    to_grid = np.linalg.inv(grid.affine) @ affine
    shape = values.shape[-3:]
    far = np.array(shape) - 1
    corners = np.array(list(product((0, 1), repeat=3)))
    ends = (corners * far) @ to_grid[:3, :3].T + to_grid[:3, 3]  # where the corners of the file lie in the grid
    for axes in permutations(range(3)):
        if tuple(shape[a] for a in axes) != grid.shape:
            continue
        for flips in product((False, True), repeat=3):
            expected = np.where(flips, 1 - corners[:, axes], corners[:, axes]) * (np.array(grid.shape) - 1)
            away = np.abs(expected - ends)
            if away[0].max() <= FIRST_VOXEL and away.max() <= CORNERS:
                lead = values.ndim - 3
                turned = values.transpose((*range(lead), *(lead + a for a in axes)))
                k, j, i = (slice(None, None, -1 if flip else 1) for flip in flips)
                return turned[..., k, j, i]
    return None


def _text(affine: NDArray[np.float64]) -> str:
    return str(np.round(affine[:3], 3).tolist())


_READERS: dict[str, Callable[[Path, Geometry], NDArray[Any]]] = {
    ".nii.gz": _from_nifti,
    ".nii": _from_nifti,
    ".npy": _from_npy,
    ".npz": _from_npz,
    ".tif": _from_stack,
    ".tiff": _from_stack,
    ".ome.zarr": _from_zarr,
    ".zarr": _from_zarr,
    "": _from_slices,
}
"""Readers by the ending of a name; "" for a folder of slices."""
