"""Compares the outputs of contenders with the recipe that they claim, computed by SciPy in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

import gpuprep

LOW_HU, HIGH_HU = -1000.0, 400.0
SIZE = (512, 512)
TOLERANCE_HU = 0.05
"""Tolerance for computation in float32. For uint8 output, half a quantisation step is added."""


def hounsfield(folder: Path) -> tuple[NDArray[np.float64], tuple[float, float, float]]:
    """Return the HU of a series with padding replaced by air, and its spacing in mm (slices, rows, columns)."""
    volume = gpuprep.read(gpuprep.discover(folder)[0])
    hu = volume.stored * volume.slope[:, None, None] + volume.intercept[:, None, None]
    air = hu < -1024
    if volume.padding is not None:
        low, high = volume.padding[:, :1, None], volume.padding[:, 1:, None]
        air |= (volume.stored >= low) & (volume.stored <= high)
    hu[air] = -1000
    return hu, volume.geometry.spacing_mm


def reference(hu: NDArray[np.float64], spacing_mm: tuple[float, float, float], order: int) -> NDArray[np.float32]:
    """Return the values of the default recipe, computed in float64 with `scipy.ndimage.zoom` only."""
    target = [max(1, round(n * mm)) for n, mm in zip(hu.shape, spacing_mm, strict=True)]
    values = _zoomed(hu, target, order)
    values = (np.clip(values, LOW_HU, HIGH_HU) - LOW_HU) / (HIGH_HU - LOW_HU)
    resized = np.empty((len(values), *SIZE), dtype=np.float32)
    for k, image in enumerate(values):
        resized[k] = _zoomed(image, SIZE, 1)
    return resized


def _zoomed(values: NDArray[np.float64], shape: Any, order: int) -> NDArray[np.float64]:
    factors = [m / n for n, m in zip(values.shape, shape, strict=True)]
    zoomed: NDArray[np.float64] = ndimage.zoom(values, factors, order=order, mode="nearest", grid_mode=True)
    return zoomed


def read_output(folder: Path) -> NDArray[Any]:
    """Return the output of a contender for a series, slices or one stack, scaled to [0, 1]."""
    files = sorted(folder.glob("*.tif"))
    images = [tifffile.imread(f) for f in files]
    values: NDArray[Any] = images[0] if len(images) == 1 else np.stack(images)
    return values / np.float32(255) if values.dtype == np.uint8 else values


def largest_difference_hu(values: NDArray[Any], expected: NDArray[np.float32]) -> float:
    """Return the largest difference in HU of two volumes scaled to [0, 1]."""
    pairs = zip(values, expected, strict=True)
    return max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in pairs) * (HIGH_HU - LOW_HU)


def tolerance_hu(dtype: str) -> float:
    """Return the tolerance in HU for a contender that writes this dtype."""
    return TOLERANCE_HU + ((HIGH_HU - LOW_HU) / 255 / 2 if dtype == "uint8" else 0)


def inner(shape: tuple[int, ...], source_shape: tuple[int, ...], border: int) -> tuple[slice, ...]:
    """Return the part of the output inside a border given in source voxels: at least the middle third of each axis."""
    widths = [min(math.ceil(border * m / n), m // 3) for m, n in zip(shape, source_shape, strict=True)]
    return tuple(slice(width, m - width) for width, m in zip(widths, shape, strict=True))
