"""Reads boxes of voxels from finished outputs, and of each file only as much as its format requires."""

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
from gpuprep.output.own_files import SCHEMA, SIDECAR

_T = TypeVar("_T")

Box = tuple[slice, slice, slice]
"""Ranges of slices, rows and columns, inside the volume and without steps."""


def full_box(shape: Shape3) -> Box:
    """Return the box of a whole volume."""
    k, j, i = shape
    return slice(0, k), slice(0, j), slice(0, i)


def checked_sidecar(found: Any, where: str) -> dict[str, Any]:
    """Return the content of a ``volume.json``; raise OutputError if it is no object, or of a later version."""
    if not isinstance(found, dict):
        raise OutputError(f"{where} is no finished output ({SIDECAR} holds no object): see gpuprep verify")
    schema = found.get("schema", 0)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise OutputError(f"{where} was written by a later version of gpuprep (schema {schema!r}): install that")
    return found


@dataclass(frozen=True)
class FinishedOutput:
    """The output of one series. It keeps no file open, so it can be pickled and sent to other processes.

    Parameters
    ----------
    folder : path
        Output folder with a ``volume.json``.

    Raises
    ------
    OutputError
        On access to an attribute or to voxels, if the folder is no finished output or a file cannot be read.
    """

    folder: Path

    @cached_property
    def sidecar(self) -> dict[str, Any]:
        """Content of ``volume.json``."""
        try:
            found = json.loads((self.folder / SIDECAR).read_bytes())
        except (OSError, ValueError, RecursionError) as exc:
            raise OutputError(f"{self.folder} is no finished output ({exc}): see gpuprep verify") from exc
        return checked_sidecar(found, str(self.folder))

    @cached_property
    def recipe(self) -> Recipe:
        """Recipe of the output."""
        return self._parsed(lambda s: Recipe.from_dict(s["recipe"]))

    @cached_property
    def geometry(self) -> Geometry:
        """Grid of the volume."""
        return self._parsed(lambda s: Geometry(tuple(s["shape"]), np.array(s["affine_lps"], dtype=np.float64)))

    @cached_property
    def hu(self) -> tuple[float, float]:
        """HU per unit of the image, and HU of value 0; an output of masks alone has none."""
        return self._parsed(lambda s: (float(s["hu"]["slope"]), float(s["hu"]["intercept"])))

    @cached_property
    def files(self) -> dict[str, str]:
        """File, or folder of a Zarr array, with the label volume of each structure, by the structure's name."""
        return self._parsed(lambda s: {str(label["name"]): str(label["file"]) for label in s.get("labels", ())})

    @cached_property
    def values(self) -> dict[str, int]:
        """Value of each structure in its label volume, by the structure's name."""
        return self._parsed(lambda s: {str(label["name"]): int(label["value"]) for label in s.get("labels", ())})

    def image(self, box: Box | None = None) -> NDArray[Any]:
        """Return stored values of the image in a box, or of the whole volume: array of the shape of the box."""
        name = "volume" + self.recipe.ending if self.recipe.ending else ""
        return self._read(name, box)

    def mask(self, file: str, box: Box | None = None) -> NDArray[Any]:
        """Return the labels in a box: array of uint8 or uint16.

        Parameters
        ----------
        file : str
            File of a label volume, one of the values of `files`.
        box : tuple of slice, optional
            Slices, rows and columns. Default: the whole volume.
        """
        stored = self._read(file, box)
        return _integer_labels(self.folder / file, stored) if self.recipe.format == "nifti" else stored

    def _parsed(self, parse: Callable[[dict[str, Any]], _T]) -> _T:
        """Return a value parsed from ``volume.json``; raise OutputError if that fails."""
        sidecar = self.sidecar
        try:
            return parse(sidecar)
        except (KeyError, TypeError, ValueError, AttributeError, GpuprepError) as exc:
            raise OutputError(
                f"{self.folder / SIDECAR} is not as it was written ({type(exc).__name__}: {exc}): see gpuprep verify"
            ) from exc

    def _check_sizes(self, name: str) -> None:
        """Raise OutputError if a file of a volume has another size than listed; Zarr would read a lost one as air."""
        sizes = self._parsed(lambda s: {file: int(entry["bytes"]) for file, entry in s["outputs"].items()})
        for file, size in sizes.items():
            if file == name or file.startswith(f"{name}/"):
                path = self.folder / file
                try:
                    found = os.path.getsize(path)
                except OSError as exc:
                    raise OutputError(f"{path} cannot be read ({exc.strerror}): see gpuprep verify") from exc
                if found != size:
                    raise OutputError(
                        f"{path} cannot be read (it has {found} bytes instead of {size}): see gpuprep verify"
                    )

    def _read(self, name: str, box: Box | None) -> NDArray[Any]:
        path, shape = self.folder / name, self.geometry.shape
        box = box or full_box(shape)
        if self.recipe.ending:
            # A Zarr group also contains the label volumes; the array itself is "0".
            self._check_sizes(f"{name}/0" if self.recipe.format == "zarr" else name)
        try:
            found = _READERS[self.recipe.ending](path, shape, box)
        except ImportError as exc:
            raise RequestError(
                f"{path} needs {exc.name}, which cannot be imported: pip install 'gpuprep[{self.recipe.format}]'"
            ) from exc
        except Exception as exc:  # a damaged file can make the libraries raise almost anything
            reason = printable(" ".join(str(exc).split()))
            raise OutputError(f"{path} cannot be read ({type(exc).__name__}: {reason}): see gpuprep verify") from exc
        expected = tuple(s.stop - s.start for s in box)
        if found.shape != expected:
            raise OutputError(f"{path} has voxels of shape {found.shape} instead of {expected}: see gpuprep verify")
        # A copy, since a later run may replace a mapped file; in native byte order, since ImageJ stacks are big-endian.
        return np.array(found, found.dtype.newbyteorder("="), order="C")


def _from_slices(path: Path, shape: Shape3, box: Box) -> NDArray[Any]:
    import tifffile

    digits = max(4, len(str(shape[0] - 1)))
    names = (f"{k:0{digits}d}.tif" for k in range(box[0].start, box[0].stop))
    return np.stack([tifffile.imread(path / name)[box[1:]] for name in names])


def _from_stack(path: Path, shape: Shape3, box: Box) -> NDArray[Any]:
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        if tiff.series[0].dataoffset is None:  # compressed slice by slice: decode those of the box
            slices = tiff.asarray(key=range(box[0].start, box[0].stop))
            return slices.reshape(-1, *shape[1:])[:, box[1], box[2]]
    found = tifffile.memmap(path, mode="r")
    return _from_map(path, found.offset, found.dtype, shape, box)


def _from_nifti(path: Path, shape: Shape3, box: Box) -> NDArray[Any]:
    from nibabel.nifti1 import Nifti1Image

    stored: Any = Nifti1Image.from_filename(path).dataobj
    if path.suffix == ".gz":  # has to be decompressed as a whole
        return np.asarray(stored.get_unscaled().T[box])
    return _from_map(path, stored.offset, stored.dtype, shape, box)


def _integer_labels(path: Path, stored: NDArray[Any]) -> NDArray[Any]:
    """Return integer labels, also for a file that was edited and saved with nibabel.

    When nibabel saves a float array with an integer header, it scales the values to the full range of the integer type.
    Stored values then differ from the labels, and rescaled ones are only close to integers: 0.988 and 2.004 for 1 and 2
    among eight labels.
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
    """Return a box of an uncompressed file, mapped so that only the rows of the box are read."""
    with open(path, "rb") as f:
        memory = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    values: NDArray[Any] = np.ndarray(shape, dtype, memory, offset)
    if hasattr(memory, "madvise"):
        # Read-ahead of the system would read ten times as much for a patch of 64³ voxels, in eight times the time.
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
"""Readers by the ending of a volume's file name."""
