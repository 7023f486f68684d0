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
    """A stacked series in stored values, before rescaling: two bytes per voxel, on the host.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gpuprep.testing import thorax, write_series
    >>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))
    >>> volume = gpuprep.read(gpuprep.discover("dicom")[0])
    >>> volume.stored.shape, float(volume.slope[0]), float(volume.intercept[0])
    ((12, 32, 32), 1.0, -1024.0)
    >>> volume.statistics.low  # HU of the padding
    -3024.0
    """

    stored: NDArray[Any]
    """Stored values, integers, shape (k, j, i)."""
    slope: NDArray[np.float64]
    """*Rescale Slope* of each slice, HU per unit, shape (k,)."""
    intercept: NDArray[np.float64]
    """*Rescale Intercept* of each slice, HU, shape (k,)."""
    padding: NDArray[Any] | None
    """Lowest and highest stored value of padding per slice, in the dtype of `stored`, shape (k, 2).
    Lowest > highest for a slice that declares no padding; None if no slice declares any."""
    geometry: Geometry
    """Regular grid of the stack."""
    statistics: HuStatistics
    """Statistics of all voxels in HU, padding included."""
    warnings: tuple[str, ...] = ()
    """Texts of the warnings and irregularities that were found while reading."""
    placement: Placement | None = None
    """Positions of the slices in the grid; None if slice k is layer k of it: see `gpuprep.dicom.stack`."""

    def __post_init__(self) -> None:
        p = self.placement
        expected = self.geometry.shape if p is None else (len(p.along), *p.matrix)
        if self.stored.shape != expected:
            raise GeometryError(f"the stored values have shape {self.stored.shape}, but the stack has {expected}")

    def slab(self, start: int, stop: int, empty: Callable[[Any, Any], NDArray[Any]] | None = None) -> NDArray[Any]:
        """Return the stored values of slices [start, stop): a view, or a copy in an array made by `empty`."""
        if empty is None:
            return self.stored[start:stop]
        out = empty((stop - start, *self.stored.shape[1:]), self.stored.dtype)
        out[...] = self.stored[start:stop]
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """A processed volume: NumPy or CuPy values on a grid.

    `numpy.asarray(volume)` works if the values are on the host. `from_dlpack(volume)` of any array library takes them
    without a copy, on host or device.

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
    """Grid of the voxels."""
    hu_slope: float
    """HU per output unit: HU = values · `hu_slope` + `hu_intercept`, within the window."""
    hu_intercept: float
    """HU of output value 0."""

    def __post_init__(self) -> None:
        if tuple(self.values.shape) != self.geometry.shape:
            raise GeometryError(f"the values have shape {self.values.shape}, but the grid has {self.geometry.shape}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of slices, rows, columns."""
        return self.geometry.shape

    @property
    def affine(self) -> NDArray[np.float64]:
        """Matrix from index (k, j, i, 1) of a voxel centre to (x, y, z, 1) in millimetres, LPS; shape (4, 4)."""
        return self.geometry.affine

    @property
    def spacing_mm(self) -> Vector3:
        """Distance between voxel centres along (k, j, i), in millimetres."""
        return self.geometry.spacing_mm

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if hasattr(self.values, "__cuda_array_interface__"):
            raise TypeError("the values are on the GPU; use cupy.asnumpy(volume.values) to copy them to the host")
        return np.array(self.values, dtype=dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()
