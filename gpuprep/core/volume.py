"""Defines `StoredVolume` and `Volume`: voxels with their geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.geometry import Geometry, Placement, Vector3
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.errors import GeometryError


@dataclass(frozen=True, slots=True, eq=False)
class StoredVolume:
    """A stacked series as its files hold it: two bytes per voxel, on the host.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> volume = gpuprep.read(gpuprep.discover("dicom")[0])
    >>> volume.stored.shape, float(volume.slope[0]), float(volume.intercept[0])
    ((12, 32, 32), 1.0, -1024.0)
    >>> volume.statistics.low  # HU of what the scanner did not measure
    -3024.0
    """

    stored: NDArray[Any]
    """Stored values, integers, shape (k, j, i)."""
    slope: NDArray[np.float64]
    """*Rescale Slope* of each slice, HU per unit, shape (k,)."""
    intercept: NDArray[np.float64]
    """*Rescale Intercept* of each slice, HU, shape (k,)."""
    padding: NDArray[Any] | None
    """Lowest and highest stored value that means padding, per slice, in the dtype of `stored`, shape (k, 2).
    A slice that declares none has lowest > highest; None where no slice declares any."""
    geometry: Geometry
    """The regular grid of the stack."""
    statistics: HuStatistics
    """Of all voxels in HU, padding included."""
    warnings: tuple[str, ...] = ()
    placement: Placement | None = None
    """Where the slices lie in that grid, if not one in each layer: see `gpuprep.dicom.stack`."""

    def __post_init__(self) -> None:
        p = self.placement
        expected = self.geometry.shape if p is None else (len(p.along), *p.matrix)
        if self.stored.shape != expected:
            raise GeometryError(f"voxels of shape {self.stored.shape} where {expected} belong")

    def slab(self, start: int, stop: int, empty: Callable[[Any, Any], NDArray[Any]] | None = None) -> NDArray[Any]:
        """Return the stored values of slices [start, stop), as they lie here or in an array that `empty` made."""
        if empty is None:
            return self.stored[start:stop]
        out = empty((stop - start, *self.stored.shape[1:]), self.stored.dtype)
        out[...] = self.stored[start:stop]
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """A processed volume: NumPy or CuPy values on a grid.

    `numpy.asarray(volume)` works where the values are on the host, and `from_dlpack(volume)` of any array library
    takes them without a copy, wherever they are.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> recipe = gpuprep.Recipe(size=(64, 64))
    >>> volume = gpuprep.process(gpuprep.read(gpuprep.discover("dicom")[0]), recipe, backend="cpu")
    >>> volume.shape, volume.hu_slope, volume.hu_intercept
    ((36, 64, 64), 1400.0, -1000.0)
    >>> import numpy
    >>> float(numpy.asarray(volume).min())  # air, at the lower end of the window
    0.0
    """

    values: Any
    """Array of the recipe's dtype, shape (k, j, i)."""
    geometry: Geometry
    hu_slope: float
    """HU = values · `hu_slope` + `hu_intercept`, within the window."""
    hu_intercept: float

    def __post_init__(self) -> None:
        if tuple(self.values.shape) != self.geometry.shape:
            raise GeometryError(f"voxels of shape {self.values.shape} on a grid of {self.geometry.shape}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of slices, rows, columns."""
        return self.geometry.shape

    @property
    def affine(self) -> NDArray[np.float64]:
        """Index (k, j, i, 1) of a voxel centre to (x, y, z, 1) in millimetres, LPS; shape (4, 4)."""
        return self.geometry.affine

    @property
    def spacing_mm(self) -> Vector3:
        """Distance between voxel centres along (k, j, i), in millimetres."""
        return self.geometry.spacing_mm

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if hasattr(self.values, "__cuda_array_interface__"):
            raise TypeError("the values are on the GPU; use cupy.asnumpy(volume.values) to copy them down")
        return np.array(self.values, dtype=dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()
