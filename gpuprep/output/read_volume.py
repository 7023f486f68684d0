"""Reads boxes of voxels from finished outputs, and no more of a file than its format makes necessary."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.formatting import printable
from gpuprep.core.geometry import Geometry, Shape3
from gpuprep.core.recipe import Recipe
from gpuprep.errors import GpuprepError, OutputError, RequestError
from gpuprep.output.own_files import SIDECAR

_T = TypeVar("_T")

Box = tuple[slice, slice, slice]
"""Of slices, rows and columns, within the volume, without steps."""


def whole(shape: Shape3) -> Box:
    """Return the box of everything."""
    k, j, i = shape
    return slice(0, k), slice(0, j), slice(0, i)


@dataclass(frozen=True)
class Finished:
    """The output of one series. Keeps no file open, so that it may go to other processes.

    Parameters
    ----------
    folder : path
        With a ``volume.json``.

    Raises
    ------
    OutputError
        If it is no finished output; later, if a file of it cannot be read.
    """

    folder: Path

    @cached_property
    def sidecar(self) -> dict[str, Any]:
        """Content of ``volume.json``."""
        try:
            found = json.loads((self.folder / SIDECAR).read_bytes())
        except (OSError, ValueError, RecursionError) as exc:
            raise OutputError(f"{self.folder} is no finished output ({exc}): see gpuprep verify") from exc
        if not isinstance(found, dict):
            raise OutputError(f"{self.folder} is no finished output ({SIDECAR} holds no object): see gpuprep verify")
        return found

    @cached_property
    def recipe(self) -> Recipe:
        """How it was made."""
        return self._told(lambda said: Recipe.from_dict(said["recipe"]))

    @cached_property
    def geometry(self) -> Geometry:
        """Its grid."""
        return self._told(lambda said: Geometry(tuple(said["shape"]), np.array(said["affine_lps"], dtype=np.float64)))

    @cached_property
    def hu(self) -> tuple[float, float]:
        """HU per unit of the image, and HU of value 0; not for masks alone."""
        return self._told(lambda said: (float(said["hu"]["slope"]), float(said["hu"]["intercept"])))

    @cached_property
    def files(self) -> dict[str, str]:
        """File or folder of the volume that each structure is in, by its name."""
        return self._told(lambda said: {str(label["name"]): str(label["file"]) for label in said.get("labels", ())})

    @cached_property
    def values(self) -> dict[str, int]:
        """Value of each structure in its volume, by its name."""
        return self._told(lambda said: {str(label["name"]): int(label["value"]) for label in said.get("labels", ())})

    def image(self, box: Box | None = None) -> NDArray[Any]:
        """Return values of the image as they are stored, shape of the box; absent: all of it."""
        name = "volume" + self.recipe.ending if self.recipe.ending else ""
        return self._read(name, box)

    def mask(self, file: str, box: Box | None = None) -> NDArray[Any]:
        """Return labels: uint8 or uint16.

        Parameters
        ----------
        file : str
            One of `files`.
        box : tuple of slice, optional
            Absent: all of it.
        """
        found = self._read(file, box)
        return _whole_numbers(self.folder / file, found) if self.recipe.format == "nifti" else found

    def _told(self, get: Callable[[dict[str, Any]], _T]) -> _T:
        said = self.sidecar
        try:
            return get(said)
        except (KeyError, TypeError, ValueError, AttributeError, GpuprepError) as exc:
            raise OutputError(
                f"{self.folder / SIDECAR} is not as it was written ({type(exc).__name__}: {exc}): see gpuprep verify"
            ) from exc

    def _check(self, name: str) -> None:
        """Raise unless the files of a volume are as large as they were: to Zarr a lost one would be air."""
        sizes = self._told(lambda said: {file: int(entry["bytes"]) for file, entry in said["outputs"].items()})
        for file, size in sizes.items():
            if file == name or file.startswith(f"{name}/"):
                path = self.folder / file
                try:
                    found = os.path.getsize(path)
                except OSError as exc:
                    raise OutputError(f"{path} cannot be read ({exc.strerror}): see gpuprep verify") from exc
                if found != size:
                    raise OutputError(
                        f"{path} cannot be read (it has {found} bytes, and had {size}): see gpuprep verify"
                    )

    def _read(self, name: str, box: Box | None) -> NDArray[Any]:
        path, shape = self.folder / name, self.geometry.shape
        box = box or whole(shape)
        if self.recipe.ending:
            self._check(f"{name}/0" if self.recipe.format == "zarr" else name)  # labels lie beside the array
        try:
            found = _READERS[self.recipe.ending](path, shape, box)
        except ImportError as exc:
            raise RequestError(
                f"{path} needs {exc.name}, which cannot be imported: pip install 'gpuprep[{self.recipe.format}]'"
            ) from exc
        except Exception as exc:  # the libraries raise whatever a broken file provokes
            said = printable(" ".join(str(exc).split()))
            raise OutputError(f"{path} cannot be read ({type(exc).__name__}: {said}): see gpuprep verify") from exc
        expected = tuple(s.stop - s.start for s in box)
        if found.shape != expected:
            raise OutputError(f"{path} gave voxels of shape {found.shape} where {expected} belong: see gpuprep verify")
        # Not a map of a file, which a later run may replace; stacks for ImageJ are big-endian.
        return np.array(found, found.dtype.newbyteorder("="), order="C")


def _from_slices(path: Path, shape: Shape3, box: Box) -> NDArray[Any]:
    import tifffile

    digits = max(4, len(str(shape[0] - 1)))
    names = (f"{k:0{digits}d}.tif" for k in range(box[0].start, box[0].stop))
    return np.stack([tifffile.imread(path / name)[box[1:]] for name in names])


def _from_stack(path: Path, shape: Shape3, box: Box) -> NDArray[Any]:
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        if tiff.series[0].dataoffset is None:  # compressed, slice by slice
            slices = tiff.asarray(key=range(box[0].start, box[0].stop))
            return slices.reshape(-1, *shape[1:])[:, box[1], box[2]]
    found = tifffile.memmap(path, mode="r")
    return _from_map(path, found.offset, found.dtype, shape, box)


def _from_nifti(path: Path, shape: Shape3, box: Box) -> NDArray[Any]:
    from nibabel.nifti1 import Nifti1Image

    stored: Any = Nifti1Image.from_filename(path).dataobj
    if path.suffix == ".gz":  # all of it, or nothing
        return np.asarray(stored.get_unscaled().T[box])
    return _from_map(path, stored.offset, stored.dtype, shape, box)


def _whole_numbers(path: Path, stored: NDArray[Any]) -> NDArray[Any]:
    """Return labels, also of a file that nibabel wrote again.

    It keeps the integer type of the header for its float array and spreads what there is over the range of that type,
    so that stored values are others, and rescaled ones are whole numbers only nearly: 0.988 and 2.004 of eight labels.
    """
    from nibabel.nifti1 import Nifti1Image

    scaling: Any = Nifti1Image.from_filename(path).dataobj
    if (scaling.slope, scaling.inter) == (1, 0):
        return stored
    values = np.rint(stored * float(scaling.slope) + float(scaling.inter))
    return values.astype(np.uint8 if values.max(initial=0) < 256 else np.uint16)


def _from_npy(path: Path, shape: Shape3, box: Box) -> NDArray[Any]:
    found: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    return _from_map(path, found.offset, found.dtype, shape, box)


def _from_map(path: Path, offset: int, dtype: Any, shape: Shape3, box: Box) -> NDArray[Any]:
    """Return a box of a plain file, of which the rows are read that it touches."""
    with open(path, "rb") as f:
        memory = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    values: NDArray[Any] = np.ndarray(shape, dtype, memory, offset)
    if hasattr(memory, "madvise"):
        # Left alone, the system guesses: for a patch of 64³ it reads ten times as much, in eight times the time.
        memory.madvise(mmap.MADV_RANDOM)
        slice_bytes, row_bytes, _ = values.strides
        for k in range(box[0].start, box[0].stop):
            start = offset + k * slice_bytes + box[1].start * row_bytes
            stop = offset + k * slice_bytes + box[1].stop * row_bytes
            start -= start % mmap.PAGESIZE
            memory.madvise(mmap.MADV_WILLNEED, start, stop - start)
    return values[box]


def _from_zarr(path: Path, _: Shape3, box: Box) -> NDArray[Any]:
    import zarr

    return np.asarray(zarr.open_array(path / "0", mode="r")[box])


_READERS: dict[str, Callable[[Path, Shape3, Box], NDArray[Any]]] = {
    "": _from_slices,
    ".tif": _from_stack,
    ".nii": _from_nifti,
    ".nii.gz": _from_nifti,
    ".npy": _from_npy,
    ".ome.zarr": _from_zarr,
}
"""By what the name of a volume ends in."""
